"""Relevance: the score against slow loops, a world where the truth is known, and the properties a user relies on."""

from __future__ import annotations

import json
import math
from statistics import NormalDist

import numpy as np
import pytest

from ecliptic.apps.index import Index, background, relevance
from ecliptic.apps.index.relevance import FIRST, LIMIT, SLOPE, Relevance, load_background, of_index
from tests.apps.fakes import FakeEmbedder, write

DIM = 64


def unit(rows):
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


class World:
    """Concepts are directions; a text is one with little noise, a picture with more, and both share a common direction."""

    def __init__(self, seed=0, concepts=400, pictures=120, noise=1.0):
        rng = np.random.default_rng(seed)
        self.common = unit(rng.normal(size=DIM))
        self.concepts = unit(rng.normal(size=(concepts, DIM)))
        shown = rng.choice(concepts // 2, pictures)  # the second half of the concepts is in no picture
        self.pictures = unit(
            self.concepts[shown] + noise * rng.normal(size=(pictures, DIM)) / math.sqrt(DIM) + self.common
        )
        texts = unit(self.concepts + 0.2 * rng.normal(size=(concepts, DIM)) / math.sqrt(DIM) + 0.5 * self.common)
        asks = np.arange(concepts) % 2 == 1
        self.background = texts[~asks]
        self.present = texts[asks & np.isin(np.arange(concepts), shown)]
        self.absent = texts[asks & (np.arange(concepts) >= concepts // 2)]

    def verdicts(self, queries, judge=None, pictures=None):
        pictures = self.pictures if pictures is None else pictures
        judge = judge or Relevance.fit(self.background, pictures)
        return [judge.judge(query, best(query, pictures)) for query in queries]


def best(query, pictures, k=FIRST):
    return pictures[np.argsort(-(pictures @ query))[:k]]


def share_matching(verdicts):
    return np.mean([verdict.matches for verdict in verdicts])


def slowly(background, pictures, query, hit):
    """The relevance of one hit, from the description at the head of the module, in loops."""
    k = max(10, round(len(background) / 100))

    def lowered(text, picture, others):
        crowd = sorted((float(other @ picture) for other in others), reverse=True)[:k]
        return float(text @ picture) - 0.5 * sum(crowd) / k

    tops = []
    for i, caption in enumerate(background):
        others = [other for j, other in enumerate(background) if j != i]
        tops.append(max(lowered(caption, picture, others) for picture in pictures))
    low, middle = np.percentile(tops, [16, 50])
    excess = (lowered(query, hit, list(background)) - middle) / (middle - low)
    return 1 / (1 + math.exp(-SLOPE * (excess - LIMIT)))


def test_the_score_is_what_the_loops_say():
    world = World(concepts=120, pictures=9)
    judge = Relevance.fit(world.background, world.pictures)
    for query in (world.present[0], world.absent[0]):
        wanted = [slowly(world.background, world.pictures, query, hit) for hit in world.pictures]
        np.testing.assert_allclose(judge.score(query, world.pictures), wanted, rtol=2e-4)


def test_a_caption_of_the_background_is_not_held_against_itself():
    world = World(concepts=120, pictures=9)
    judge = Relevance.fit(world.background, world.pictures)
    without = Relevance(np.delete(judge.background, 3, axis=0), judge.level, judge.unit)
    query = world.background[3]
    np.testing.assert_allclose(judge.score(query, world.pictures), without.score(query, world.pictures), rtol=1e-5)


def test_what_is_there_is_told_from_what_is_not():
    for seed in range(3):
        world = World(seed)
        assert share_matching(world.verdicts(world.present)) > 0.9
        assert share_matching(world.verdicts(world.absent)) < 0.5


def test_pictures_that_show_nothing_make_nothing_match_more_than_the_background():
    """Noise for pictures: as many queries match as captions of the background lie above the limit, by construction."""
    rng = np.random.default_rng(5)
    texts, pictures = unit(rng.normal(size=(600, DIM))), unit(rng.normal(size=(80, DIM)))
    judge = Relevance.fit(texts[:300], pictures)
    share = share_matching(judge.judge(query, best(query, pictures)) for query in texts[300:])
    assert share == pytest.approx(1 - NormalDist().cdf(LIMIT), abs=0.09)


def test_relevance_grows_with_the_score_of_a_picture():
    world = World()
    judge = Relevance.fit(world.background, world.pictures)
    picture, other = world.pictures[0], unit(np.random.default_rng(1).normal(size=DIM))
    mixes = unit([a * picture + (1 - a) * other for a in np.linspace(0, 1, 12)])
    cosines = mixes @ picture
    found = [float(judge.score(query, picture[None])[0]) for query in mixes]
    assert (np.diff(cosines) > 0).all()
    assert (np.diff(found) > 0).all()
    assert 0 < min(found) < max(found) < 1


def test_a_picture_that_lies_near_every_text_needs_a_higher_score():
    world = World()
    judge = Relevance.fit(world.background, world.pictures)
    hub = unit(world.pictures.mean(0) + 3 * world.background.mean(0))
    query = world.absent[0]
    plain = world.pictures[np.abs(world.pictures @ query - hub @ query).argmin()]
    level = unit(plain + (hub @ query - plain @ query) * query)  # about the hub's cosine
    assert level @ query >= plain @ query - 1e-6 or hub @ query < plain @ query
    assert judge.score(query, hub[None])[0] < judge.score(query, level[None])[0]


def test_neither_order_nor_length_counts():
    world = World()
    shuffled = np.random.default_rng(0).permutation(len(world.pictures))
    one = Relevance.fit(world.background, world.pictures)
    two = Relevance.fit(3 * world.background[::-1], 0.1 * world.pictures[shuffled])
    hits = best(world.present[0], world.pictures)
    np.testing.assert_allclose(one.score(world.present[0], hits), two.score(7 * world.present[0], hits), rtol=1e-4)


def test_other_models_have_other_cosines_and_the_same_verdicts():
    """A constant direction in all pictures and all texts squeezes the cosines, as in CLIP; units follow."""
    world = World()
    wide = world.verdicts(world.present) + world.verdicts(world.absent)

    def squeeze(rows):
        return unit(np.concatenate([rows, np.full((len(rows), 1), 2.0)], axis=1))

    judge = Relevance.fit(squeeze(world.background), squeeze(world.pictures))
    narrow = [
        judge.judge(query, best(query, squeeze(world.pictures)))
        for query in squeeze(np.concatenate([world.present, world.absent]))
    ]
    for a, b in zip(wide, narrow):
        np.testing.assert_allclose(np.sort(a.relevance), np.sort(b.relevance), atol=0.02)


@pytest.mark.parametrize("pictures", [1, 5])
def test_tiny_indexes(pictures):
    """With one picture, or five, what they show still stands out against what they do not."""
    world = World(pictures=pictures, noise=0.5)
    assert share_matching(world.verdicts(world.present)) == 1
    assert share_matching(world.verdicts(world.absent)) < 0.5


def test_a_filter_leaves_the_scale_alone():
    """A hit is as relevant among few pictures as among all: the scale is the index's, not that of what the filter lets by."""
    world = World()
    judge = Relevance.fit(world.background, world.pictures)
    query = world.present[0]
    hits = best(query, world.pictures)
    np.testing.assert_allclose(judge.score(query, hits[2:5]), judge.score(query, hits)[2:5], rtol=1e-5)
    assert not judge.judge(query, world.pictures[np.argsort(world.pictures @ query)[:20]]).matches


def test_a_sample_stands_for_the_index():
    """The level from a quarter of the pictures, raised for the rest, is near that from all of them."""
    world = World(pictures=1200, concepts=2000)
    every = Relevance.fit(world.background, world.pictures)
    part = Relevance.fit(world.background, world.pictures[::4], total=1200)
    flat = Relevance.fit(world.background, world.pictures[::4])
    assert abs(part.level - every.level) < abs(flat.level - every.level)
    assert abs(part.level - every.level) < 0.5 * every.unit


def test_no_hits_match_nothing():
    world = World()
    verdict = Relevance.fit(world.background, world.pictures).judge(world.present[0], np.empty((0, DIM)))
    assert len(verdict.relevance) == 0
    assert not verdict.matches


def test_what_cannot_be_judged_is_refused():
    world = World()
    with pytest.raises(ValueError, match="at least 50"):
        Relevance.fit(world.background[:20], world.pictures)
    with pytest.raises(ValueError, match="pictures is empty"):
        Relevance.fit(world.background, world.pictures[:0])
    with pytest.raises(ValueError, match="query holds a vector that is zero"):
        Relevance.fit(world.background, world.pictures).score(np.zeros(DIM), world.pictures[:1])
    with pytest.raises(ValueError, match="shape"):
        Relevance.fit(world.background[0], world.pictures)


# The background


def test_the_captions_are_many_different_things():
    captions = background.captions()
    assert len(captions) == len(set(captions)) > 1000
    assert all(caption == caption.strip().lower() and caption for caption in captions)
    scenes = background.captions("tiny-0123")
    assert "a striped red circle" in scenes
    assert len(set(scenes)) == len(scenes) >= relevance.FEWEST


def test_the_background_is_encoded_once_per_model(tmp_path, monkeypatch):
    monkeypatch.setenv("ECLIPTIC_CACHE", str(tmp_path))
    calls = []

    def encode(texts):
        calls.append(len(texts))
        return np.random.default_rng(len(texts)).normal(size=(len(texts), 8))

    first = load_background("a/model", encode)
    np.testing.assert_array_equal(load_background("a/model", encode), first)
    assert calls == [len(background.captions())]
    load_background("another", encode)
    assert len(calls) == 2
    for path in (tmp_path / "background").iterdir():
        path.write_bytes(b"broken")
    np.testing.assert_array_equal(load_background("a/model", encode), first)
    assert len(calls) == 3


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ECLIPTIC_CACHE", str(tmp_path / "file"))
    assert load_background("m", lambda texts: np.ones((len(texts), 4))).shape == (len(background.captions()), 4)


# In an index


def encode_anything(texts):
    """(M, 16) rows that depend on the texts alone."""
    from tests.apps.fakes import vector_of

    return np.stack([vector_of(text.encode()) for text in texts])


def test_an_index_is_looked_at_once_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("ECLIPTIC_CACHE", str(tmp_path / "cache"))
    fitted = []
    real = Relevance.fit.__func__
    monkeypatch.setattr(Relevance, "fit", classmethod(lambda cls, *a, **k: fitted.append(1) or real(cls, *a, **k)))
    embedder = FakeEmbedder()
    with Index.create(tmp_path / "index", embedder.signature) as index:
        assert of_index(index, encode_anything) is None
        for i in range(6):
            write(tmp_path / f"pictures/{i}.png", f"picture {i}")
        index.add(tmp_path / "pictures", embedder)
        first, again = of_index(index, encode_anything), of_index(index, encode_anything)
        assert (first.level, first.unit) == (again.level, again.unit)
        assert len(fitted) == 1
        vectors = np.stack([index.vector(path) for path in index.paths()])
        plain = Relevance.fit(encode_anything(background.captions()).astype(np.float16), vectors)
        assert (first.level, first.unit) == pytest.approx((plain.level, plain.unit), abs=1e-3)
        write(tmp_path / "pictures/6.png", "picture 6")
        index.add(tmp_path / "pictures", embedder)
        of_index(index, encode_anything)
        assert len(fitted) == 3
        monkeypatch.setattr(relevance, "LARGEST", 6)
        assert of_index(index, encode_anything) is None


def test_a_large_index_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setenv("ECLIPTIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(relevance, "SAMPLE", 5)
    seen = []
    real = Relevance.fit.__func__
    monkeypatch.setattr(
        Relevance, "fit", classmethod(lambda cls, a, b, total: seen.append((len(b), total)) or real(cls, a, b, total))
    )
    embedder = FakeEmbedder()
    with Index.create(tmp_path / "index", embedder.signature) as index:
        for i in range(12):
            write(tmp_path / f"pictures/{i}.png", f"picture {i}")
        index.add(tmp_path / "pictures", embedder)
        of_index(index, encode_anything)
    assert seen == [(5, 12)]


# In the command line


@pytest.fixture
def scenery(tmp_path):
    """Rendered stars and hearts, red and blue, for `tiny`, which knows them; no circle, nothing green."""
    from ecliptic.data.scenes import scenes

    wanted = {(shape, colour) for shape in ("star", "heart") for colour in ("red", "blue")}
    found = 0
    for record in scenes("test", n=2000, size=48):
        if (record["attributes"]["shape"], record["attributes"]["colour"]) in wanted and found < 24:
            record["image"].save(tmp_path / f"{record['attributes']['colour']}-{record['label']}-{found}.png")
            found += 1
    return tmp_path


def test_search_says_when_nothing_matches(cli, scenery):
    assert cli("index", scenery, "--model", "tiny").exit_code == 0
    there = json.loads(cli("search", "a red star", "--index", scenery, "--json").stdout)
    assert there["matches"] is True
    assert len(there["hits"]) == 10
    assert "red-star" in there["hits"][0]["path"]
    assert there["hits"][0]["relevance"] > 0.75

    gone = cli("search", "a green circle", "--index", scenery, "--json")
    assert json.loads(gone.stdout)["matches"] is False
    assert len(json.loads(gone.stdout)["hits"]) == 10
    assert gone.exit_code == 0
    told = cli("search", "a green circle", "--index", scenery, "-k", 2)
    assert told.stderr == "nothing here matches 'a green circle'; the nearest are\n"
    assert len(told.stdout.splitlines()) == 2
    assert "%  " in told.stdout

    none = cli("search", "a green circle", "--index", scenery, "--relevant", "-f")
    assert (none.stdout, none.exit_code) == ("", 1)
    some = cli("search", "a red star", "--index", scenery, "--relevant", "-f", "-k", 24)
    assert some.stderr == ""
    every = json.loads(cli("search", "a red star", "--index", scenery, "-k", 24, "--json").stdout)["hits"]
    assert some.stdout.splitlines() == [hit["path"] for hit in every if hit["relevance"] >= 0.5]
    assert 0 < len(some.stdout.splitlines()) < 24
    first = cli("search", "a red star", "--index", scenery, "-k", 1, "--json")
    assert json.loads(first.stdout)["hits"] == there["hits"][:1]


def test_a_filter_keeps_each_relevance(cli, scenery):
    cli("index", scenery, "--model", "tiny")
    every = json.loads(cli("search", "a red star", "--index", scenery, "-k", 24, "--json").stdout)["hits"]
    hearts = json.loads(cli("search", "a red star", "--index", scenery, "-g", "*heart*", "--json").stdout)
    wanted = {hit["path"]: hit["relevance"] for hit in every}
    assert {hit["path"]: hit["relevance"] for hit in hearts["hits"]} == pytest.approx(
        {hit["path"]: wanted[hit["path"]] for hit in hearts["hits"]}, abs=1e-3
    )


def test_pictures_are_no_words(cli, scenery):
    cli("index", scenery, "--model", "tiny")
    picture = next(scenery.glob("*.png"))
    value = json.loads(cli("search", "--image", picture, "--index", scenery, "--json").stdout)
    assert value["matches"] is None
    assert value["hits"][0]["relevance"] is None
    assert "%" not in cli("search", "--image", picture, "--index", scenery).stdout
    assert "in words alone" in cli("search", "--image", picture, "--index", scenery, "--relevant").stderr


def test_a_model_to_which_all_texts_are_alike_gets_an_answer():
    """With the query's own caption left out there would be none to compare with."""
    rows = unit(np.ones((60, DIM)) + 1e-4 * np.random.default_rng(0).normal(size=(60, DIM)))
    found = Relevance.fit(rows[:59], rows[:5]).score(rows[59], rows[:5])
    assert np.isfinite(found).all()
