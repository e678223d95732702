"""MetaCLIP against the naive loops of its definition, the laws of its draws, and what sharding must not change."""

import itertools
import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ecliptic.data.debian import SourceUnavailable, package_folder
from ecliptic.data.records import Records
from ecliptic.data.shards import Stream, webdataset, write_shards
from ecliptic.data.wordnet import Synset, WordNet, wordnet
from ecliptic.methods.curate.metaclip import (
    Balancer,
    Limits,
    Matcher,
    MetaClip,
    bigram_pmi,
    build_metadata,
    count_entries,
    count_words,
    entry_prob,
    gini,
    inverted_index,
    load_metadata,
    spaced,
    sum_title_views,
    tail_mass,
    tail_threshold,
    text_key,
    uniform,
    uniforms,
)


def naive(text: str, metadata: list[str]) -> list[int]:
    """The definition: every entry, with a space on either side, looked for in the whole text."""
    return [e for e, entry in enumerate(metadata) if f" {entry} " in spaced(text)]


# Metadata


def synsets(*names: str) -> WordNet:
    return WordNet({f"n{i:08d}": Synset(f"n{i:08d}", (name,), "", (), ()) for i, name in enumerate(names)})


def test_metadata_is_a_union_in_order():
    found = build_metadata(
        synsets("dog", "Canis familiaris", "St. Louis", "dog", "7"),
        unigram_counts={"rare": 99, "the": 500, "often": 100, ",": 1000, "dog": 900, "": 100},
        bigram_pmi={"hot dog": 30.0, "of the": 29.9, "Hong Kong": 31.0},
        title_views={"Paris": 70, "Nowhere": 69, "Hong Kong": 1000},
    )
    numbers = [str(i) for i in range(100)]
    words = ["dog", "canis familiaris", "st"]
    assert found == [*numbers, *words, "the", "often", "Hong Kong", "hot dog", "Paris"]
    assert build_metadata(["a dog"], limits=Limits(entries=101)) == [*numbers, "a dog"]
    assert build_metadata() == numbers
    assert build_metadata(unigram_counts={"x": 3}, limits=Limits(unigram_count=3)) == [*numbers, "x"]


def test_the_synsets_are_as_many_as_the_published_list_has():
    try:
        package_folder("wordnet-base", "usr/share/wordnet", fetch=False)
    except SourceUnavailable:
        pytest.skip("the Debian package wordnet-base is neither installed nor in the cache")
    found = build_metadata(wordnet())
    assert len(found) == 86_654  # with the numbers; the released description of the metadata
    assert {"dog", "ice cream", "99", "natural language processing"} <= set(found)
    assert {"", "."}.isdisjoint(found)


def test_words_and_pairs_of_a_corpus_by_hand():
    words, pairs = count_words(["a big dog", "a big, dog"])
    assert words == {"a": 2, "big": 2, "dog": 2}
    assert pairs == {"a big": 2, "big dog": 1}  # the comma parts the second
    assert bigram_pmi(words, pairs) == {"a big": pytest.approx(math.log2(3)), "big dog": pytest.approx(math.log2(1.5))}


def test_views_of_titles_are_added_up():
    records = [("New_York", 60), ("New_York", 49), ("New_York", 50), ("Talk:Dog", 900), ("Cat", 50)]
    assert sum_title_views(records) == {"New York": 110, "Cat": 50}


def test_metadata_from_files(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(["a, b", "dog"]), encoding="utf-8")
    (tmp_path / "list.txt").write_text("dog\nhot dog\n\ndog\n", encoding="utf-8")
    (tmp_path / "bad.json").write_text('{"dog": 1}', encoding="utf-8")
    assert load_metadata(str(tmp_path / "list.json")) == ["a, b", "dog"]
    assert load_metadata(str(tmp_path / "list.txt")) == ["dog", "hot dog"]
    assert load_metadata(("x", "y")) == ["x", "y"]
    with pytest.raises(ValueError, match="must hold a JSON list of strings"):
        load_metadata(str(tmp_path / "bad.json"))
    with pytest.raises(ValueError, match="'wordnet', a file or a list of entries; there is no file wordnets"):
        load_metadata("wordnets")


# Matching


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dog", " dog "),
        ("a,b", " a , b "),
        ("Wow!? `x`", " Wow !  ?   ` x `  "),
        ("a\tb\r\nc", " a b  c "),
        ('the dog\'s $5 (half-off) & "more"', ' the dog\'s $5 (half-off) & "more" '),
        ("", "  "),
        ("3.5:1;", " 3 . 5 : 1 ;  "),
    ],
)
def test_text_as_it_is_searched(text, expected):
    assert spaced(text) == expected


@pytest.mark.parametrize(
    ("entry", "text", "expected"),
    [
        ("cat", "a cat cat", True),
        ("red red", "red red red", True),  # the runs share a word
        ("cat", "(cat)", False),
        ("cat", "cats", False),
        ("cat", "Cat", False),
        ("cat", "a cat, a dog", True),
        ("cat a", "cat, a", False),
        ("half-off", "now half-off!", True),
        ("off", "half-off", False),
        ("dog 's", "dog's", False),
        ("a  b", "a\r\nb", True),  # an entry with two spaces
        ("a  b", "a b", False),
        ("a b", "a\nb", True),
        ("a , b", "a,b", True),
        ("a , b", "a, b", False),  # the text then has two spaces
        ("a, b", "a, b", False),  # an entry with a mark inside a word can never match
        ("in the middle of", "right in the middle of it", True),
        ("in the middle of", "in the middle", False),
        ("New York City", "New York City", True),
        (" x", "a  x", True),
        ("x ", "x\t\ty", True),
    ],
)
def test_matches_by_hand(entry, text, expected):
    assert bool(Matcher([entry]).match(text)) is expected
    assert bool(naive(text, [entry])) is expected


WORD = st.sampled_from(["red", "cat", "a", "A", "the", ",", "!", "", " ", "\n", "it's", "x-y", "é"])
TEXT = st.lists(WORD, max_size=12).flatmap(lambda words: st.sampled_from([" ".join(words), "".join(words)]))


@settings(max_examples=400, deadline=None)
@given(
    metadata=st.lists(st.lists(WORD, min_size=1, max_size=5).map(" ".join).filter(bool), unique=True, max_size=30),
    text=TEXT,
)
def test_the_matcher_is_the_naive_loop(metadata, text):
    assert Matcher(metadata).match(text) == naive(text, metadata)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), text=st.text("ab ,.\n", max_size=20))
def test_so_it_is_where_entries_are_cut_out_of_the_text(data, text):
    whole = spaced(text)
    cuts = [(i, j) for i in range(len(whole)) for j in range(i + 1, len(whole) + 1)]
    chosen = data.draw(st.lists(st.sampled_from(cuts), max_size=20))
    metadata = list(dict.fromkeys(whole[i:j] for i, j in chosen))
    assert Matcher(metadata).match(text) == naive(text, metadata)


def test_longer_entries_that_begin_alike():
    metadata = ["a b", "a b c", "a b c d", "b c", "c d e f g", "a b x"]
    for n in range(1, 8):
        for words in itertools.product("abcd", repeat=min(n, 4)):
            text = " ".join([*words, *"efg"[: max(0, n - 4)]])
            assert Matcher(metadata).match(text) == naive(text, metadata)
    assert Matcher(metadata).match("a b c d e f g") == [0, 1, 2, 3, 4]


def test_entries_must_differ_and_say_something():
    assert len(Matcher([])) == 0
    assert Matcher([]).match("anything") == []
    with pytest.raises(ValueError, match="'dog' is there twice"):
        Matcher(["dog", "cat", "dog"])
    with pytest.raises(ValueError, match="one is empty"):
        Matcher(["dog", ""])


# Counting


def zipf(n=3000, entries=60, exponent=1.1, most=3, seed=0):
    """Match lists: 1 to `most` different entries each, drawn by Zipf's law."""
    rng = np.random.default_rng(seed)
    p = np.arange(1, entries + 1) ** -exponent
    return [
        sorted(rng.choice(entries, size=rng.integers(1, most + 1), replace=False, p=p / p.sum()).tolist())
        for _ in range(n)
    ]


def test_counts_are_texts_per_entry():
    matches = [[0, 2], [], [2], [2, 3]]
    counts = count_entries(matches, 5)
    assert counts.dtype == np.uint64
    assert counts.tolist() == [1, 0, 3, 1, 0]
    index = inverted_index(matches)
    assert index.entries.tolist() == [0, 2, 2, 2, 3]
    assert index.texts.tolist() == [0, 0, 2, 3, 3]
    assert (index.entries.dtype, index.texts.dtype) == (np.uint32, np.uint64)
    assert np.bincount(index.entries, minlength=5).tolist() == counts.tolist()
    assert inverted_index([[], []]).entries.shape == (0,)


def test_parts_count_as_the_whole(monkeypatch):
    from ecliptic.methods.curate import metaclip

    matches = zipf()
    whole = count_entries(matches, 60)
    slow = [sum(e in found for found in matches) for e in range(60)]
    assert whole.tolist() == slow
    for cuts in ([1000], [1, 2, 2999], [500, 500, 2000]):
        parts = [matches[a:b] for a, b in itertools.pairwise([0, *cuts, len(matches)])]
        assert sum(count_entries(part, 60) for part in parts).tolist() == slow
        starts = np.cumsum([0, *map(len, parts)])
        joined = [inverted_index(part, int(start)) for part, start in zip(parts, starts)]
        assert np.concatenate([part.texts for part in joined]).tolist() == inverted_index(matches).texts.tolist()
    monkeypatch.setattr(metaclip, "_CHUNK", 7)
    assert count_entries(iter(matches), 60).tolist() == slow


def test_text_numbers_beyond_32_bits():
    assert inverted_index([[3]], first=5_000_000_000).texts.tolist() == [5_000_000_000]


# Probabilities


def test_probability_of_an_entry():
    assert entry_prob([0, 5, 10, 20, 1000], 10).tolist() == [1, 1, 1, 0.5, 0.01]
    assert entry_prob([0, 5, 2**40], math.inf).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="t must be above 0"):
        entry_prob([1], 0)


def test_tail_mass_and_its_inverse_by_hand():
    counts = np.array([1, 2, 3, 4, 10, 0], np.uint64)  # shares up to each: 0.05, 0.15, 0.3, 0.5, 1
    assert tail_mass(counts, 4) == pytest.approx(0.3)
    assert tail_mass(counts, 5) == pytest.approx(0.5)
    assert tail_mass(counts, math.inf) == 1
    assert [tail_threshold(counts, p) for p in (0.01, 0.05, 0.15, 0.16, 0.3, 0.31, 0.5, 0.51, 1)] == [
        1, 1, 2, 3, 3, 4, 4, 10, 10,
    ]  # fmt: skip
    assert tail_threshold([0, 0], 0.5) == 1
    with pytest.raises(ValueError, match=r"tail_mass must lie in \(0, 1\], not 0"):
        tail_threshold(counts, 0)


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(any),
    p=st.floats(0.001, 1.0),
    t=st.integers(1, 60),
)
def test_threshold_is_where_the_tail_reaches_its_mass(counts, p, t):
    found = tail_threshold(counts, p)
    assert tail_mass(counts, found) < p + 1e-9
    assert tail_mass(counts, found + 1) >= p - 1e-9
    mass = tail_mass(counts, t)
    if mass > 0:  # back and forth: the largest count below t
        assert tail_threshold(counts, mass) == max(c for c in counts if 0 < c < t)


def test_gini_by_hand():
    assert gini([5, 5, 5]) == pytest.approx(0)
    assert gini([0, 0, 0, 8]) == pytest.approx(0.75)
    x = [1, 2, 7, 3, 0]
    slow = sum(abs(a - b) for a in x for b in x) / (2 * len(x) * sum(x))
    assert gini(x) == pytest.approx(slow)
    assert gini([]) == gini([0]) == 0


# Draws


def test_draws_are_the_published_generator():
    # SplitMix64 from state 1234567, as in Vigna's reference implementation (prng.di.unimi.it)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [uniform(1234567, i) for i in range(4)] == [(x >> 11) / 2**53 for x in expected]


def test_draws_are_uniform_and_independent():
    keys = np.array([text_key(0, i) for i in range(20000)], np.uint64)
    first, second = (uniforms(keys, np.full(len(keys), n, np.uint64)) for n in (0, 1))
    assert all(uniform(int(key), 1) == u for key, u in zip(keys[:100], second[:100]))
    for u in (first, second):
        assert abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / len(u))
        counts = np.histogram(u, 20, (0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi-squared, 19 degrees of freedom: 50 is beyond 1 in 7,000
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(len(keys))
    assert len(set(keys.tolist())) == len(keys)
    assert len({text_key(s, i, j, e) for s in (0, 1) for i in ("a", "b") for j in (0, 1) for e in (0, 1)}) == 16


# Balancing


@pytest.mark.parametrize("mode", ["bernoulli", "closed_form"])
def test_kept_numbers_follow_the_law(mode):
    matches = zipf()
    prob = entry_prob(count_entries(matches, 60), 40)
    expected = [1 - math.prod(1 - prob[e] for e in found) for found in matches]
    mean, sigma = sum(expected), math.sqrt(sum(p * (1 - p) for p in expected))
    totals = []
    for seed in range(5):
        balancer = Balancer(prob, mode, seed)
        kept = [balancer.keep(f"r{i}", found) for i, found in enumerate(matches)]
        totals.append(sum(kept))
        assert abs(totals[-1] - mean) < 4 * sigma
        rare = [i for i, found in enumerate(matches) if any(prob[e] == 1 for e in found)]
        assert all(kept[i] for i in rare), "a text with an entry of the tail was dropped"
        assert 0 < len(rare) < len(matches)
        assert (balancer.keep_index(inverted_index(matches), [f"r{i}" for i in range(len(matches))]) == kept).all()
    assert len(set(totals)) > 1
    assert balancer.probability(matches[0]) == pytest.approx(expected[0])


def test_each_entry_draws_for_itself():
    """Two entries of probability 1/2 keep a text 3 times in 4, and the draws of one entry do not copy the other's."""
    balancer = Balancer([0.5, 0.5])
    one, two, both = ([balancer.keep(i, m) for i in range(8000)] for m in ([0], [1], [0, 1]))
    assert both == [a or b for a, b in zip(one, two)]
    assert abs(sum(both) / 8000 - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 8000)
    assert abs(np.corrcoef(one, two)[0, 1]) < 4 / math.sqrt(8000)


def test_one_entry_a_text_is_cut_to_t():
    matches = zipf(20000, 30, most=1)
    counts = count_entries(matches, 30)
    balancer = Balancer(entry_prob(counts, 200))
    kept = balancer.keep_index(inverted_index(matches), range(len(matches)))
    after = count_entries(itertools.compress(matches, kept), 30)
    for before, left in zip(counts.tolist(), after.tolist()):
        assert left == before if before <= 200 else abs(left - 200) <= 4 * math.sqrt(200)


def test_a_frequent_entry_beside_rare_ones_ends_above_the_cap():
    matches = [[0, 1 + i % 50] for i in range(1000)] + [[0]] * 1000
    counts = count_entries(matches, 51)
    kept = Balancer(entry_prob(counts, 20)).keep_index(inverted_index(matches), range(2000))
    after = count_entries(itertools.compress(matches, kept), 51)
    assert after[0] > 1000  # all that stand beside a rare one, and some twenty of the others
    assert after[0] < 1000 + 50


def test_nothing_matched_is_never_kept():
    for mode in ("bernoulli", "closed_form"):
        assert not Balancer([1.0], mode).keep("a", [])
        assert Balancer([1.0], mode).keep_index(inverted_index([[], [0]]), "ab").tolist() == [False, True]
    with pytest.raises(ValueError, match="mode must be one of bernoulli, closed_form"):
        Balancer([1.0], "both")


# The step


ENTRIES = ["dog", "cat", "red dog", "yak", "emu"]


def pool(n=400, seed=0) -> list[dict]:
    rng = np.random.default_rng(seed)
    texts = ["a dog", "the red dog.", "a cat", "a yak and a dog", "emu!", "IMG_1234.jpg", "hello there"]
    chosen = rng.choice(len(texts), n, p=[0.35, 0.15, 0.25, 0.03, 0.02, 0.1, 0.1])
    image = Image.new("RGB", (4, 4))
    return [{"id": f"p{i}", "image": image, "caption": texts[c]} for i, c in enumerate(chosen)]


def ids(pairs) -> list[str]:
    return [record["id"] for record in pairs]


def by_definition(records, entries, t, seed) -> list[str]:
    """The whole method as loops: count, then let every matched entry draw."""
    found = [naive(record["caption"], entries) for record in records]
    counts = [sum(e in matches for matches in found) for e in range(len(entries))]
    kept = []
    for record, matches in zip(records, found):
        key = text_key(seed, record["id"])
        if any(uniform(key, 1 + e) < t / max(counts[e], t) for e in matches):
            kept.append(record["id"])
    return kept


def test_the_step_is_its_definition():
    records = pool()
    for seed in (0, 7):
        step = MetaClip(ENTRIES, t=20, seed=seed)
        expected = by_definition(records, ENTRIES, 20, seed)
        assert 40 < len(expected) < 100
        assert ids(step.apply(records)) == expected
        assert ids(step.apply(Records.from_list(records))) == expected
    assert by_definition(records, ENTRIES, 20, 0) != by_definition(records, ENTRIES, 20, 7)


def test_without_a_cap_all_that_match_stay():
    records = pool()
    matched = [r["id"] for r in records if naive(r["caption"], ENTRIES)]
    assert 0 < len(matched) < len(records)
    for t in (math.inf, max(MetaClip(ENTRIES).count(records))):
        assert ids(MetaClip(ENTRIES, t=float(t)).apply(records)) == matched
    assert ids(MetaClip(ENTRIES, tail_mass=1.0).apply(records)) == matched


def test_every_rare_one_stays_whatever_the_seed():
    records = pool()
    rare = {r["id"] for r in records if "yak" in r["caption"] or "emu" in r["caption"]}
    assert rare
    for seed in range(20):
        assert rare <= set(ids(MetaClip(ENTRIES, t=20, seed=seed).apply(records)))


def test_parts_of_a_pool_are_decided_on_as_the_whole():
    records = pool()
    step = MetaClip(ENTRIES, t=20, seed=3)
    parts = [records[:50], records[50:51], records[51:]]
    counts = sum(step.count(part) for part in parts)
    assert counts.tolist() == step.count(records).tolist()
    whole = ids(step.apply(records))
    apart = replace(step, counts=counts)
    assert [id for part in parts for id in ids(apart.apply(part))] == whole
    shuffled = [records[i] for i in np.random.default_rng(0).permutation(len(records))]
    assert sorted(ids(step.apply(shuffled))) == sorted(whole)
    own = [id for part in parts for id in ids(step.apply(part))]
    assert own != whole, "counting each part for itself is another method"


def test_more_pairs_do_not_move_the_draws():
    records = pool()
    few, many = (MetaClip(ENTRIES, t=20, counts=[n, 50, 30, 5, 5]) for n in (150, 300))
    assert set(ids(many.apply(records))) < set(ids(few.apply(records)))  # a smaller p keeps a part of the same pairs


def test_streams_and_shards(tmp_path):
    records = pool(60)
    paths = write_shards(Records.from_list(records), tmp_path, max_count=25)
    step = MetaClip(ENTRIES, t=5)
    expected = by_definition(records, ENTRIES, 5, 0)
    stream = step.apply(Stream(paths))
    assert ids(stream) == ids(stream) == expected
    assert ids(step.apply(webdataset(paths))) == expected
    assert sorted(ids(step.apply(Stream(paths, shuffle=7, seed=1)))) == sorted(expected)
    parts = [ids(step.apply(Stream(paths, rank=rank, world=3))) for rank in range(3)]
    assert [*itertools.chain(*parts)] == expected, "each process counts the whole pool"

    class Pool:
        walks = 0

        def __iter__(self):
            self.walks += 1
            return iter(records)

    source = Pool()
    stream = step.apply(source)
    assert source.walks == 0
    assert ids(stream) == ids(stream) == expected
    assert source.walks == 3  # once to count
    with pytest.raises(TypeError, match="must be re-iterable"):
        step.apply(iter(records))


def test_online_draws_anew_every_epoch():
    records = pool()
    step = MetaClip(ENTRIES, t=20)

    class Pool:
        def __iter__(self):
            return iter(records)

    for source in (records, Records.from_list(records), Pool()):
        loader = step.online(source)
        epochs = [ids(loader) for _ in range(30)]
        assert epochs[0] == ids(step.apply(records))
        assert epochs == [ids(again) for again in itertools.repeat(step.online(source), 30)]
        assert len(set(map(tuple, epochs))) == 30
    loader = step.online(Pool())
    first, second = iter(loader), iter(loader)  # two walks side by side do not mix their epochs
    pairs = list(itertools.zip_longest(first, second))
    assert [[r["id"] for r in walk if r] for walk in zip(*pairs)] == epochs[:2]
    balancer = Balancer(entry_prob(step.count(records), 20))
    matcher = Matcher(ENTRIES)
    expected = sum(balancer.probability(matcher.match(r["caption"])) for r in records)
    assert abs(np.mean([len(epoch) for epoch in epochs]) - expected) < 4 * math.sqrt(expected / 30)
    assert len(set(itertools.chain(*epochs))) > 2 * expected, "over the epochs other pairs are seen"


def test_online_over_shards_also_shuffles_anew(tmp_path):
    paths = write_shards(Records.from_list(pool(60)), tmp_path, max_count=25)
    loader = MetaClip(ENTRIES, t=math.inf).online(Stream(paths, shuffle=20, seed=1))
    first, second = ids(loader), ids(loader)
    assert first != second
    assert sorted(first) == sorted(second) == sorted(r["id"] for r in pool(60) if naive(r["caption"], ENTRIES))


def test_the_report_counts_what_apply_does():
    records = pool()
    step = MetaClip(ENTRIES, t=20, seed=1)
    told = step.report(records)
    kept = step.apply(records)
    assert (told.records, told.texts, told.kept) == (400, 400, len(kept))
    assert told.matched == sum(bool(naive(r["caption"], ENTRIES)) for r in records)
    assert told.before.tolist() == step.count(records).tolist()
    assert told.after.tolist() == step.count(kept).tolist()
    variance = told.expected
    assert abs(told.kept - told.expected) < 4 * math.sqrt(variance)
    assert told.gini[1] < told.gini[0]
    assert told.tail_mass == tail_mass(told.before, 20)
    assert told.head(1) == [("dog", int(told.before[0]), int(told.after[0]))]
    said = json.loads(json.dumps(told.to_json()))
    assert said["kept"] == told.kept
    assert said["entries_above_t"] == int((told.before > 20).sum())
    for word in ("400 records", f"{told.kept:,} kept", "t = 20", "most frequent: dog"):
        assert word in str(told)
    empty = MetaClip(["unheard of"]).report(records)
    assert (empty.matched, empty.kept, empty.expected) == (0, 0, 0)
    assert "most frequent: none" in str(empty)


def test_t_is_read_off_the_tail():
    records = pool()
    step = MetaClip(ENTRIES, tail_mass=0.1)
    counts = step.count(records)
    assert step.report(records).t == tail_threshold(counts, 0.1)
    assert tail_mass(counts, tail_threshold(counts, 0.1)) < 0.1


# Several texts


def several(n=300) -> list[dict]:
    """Records with an alt text and a title, of which one, both or none match."""
    rng = np.random.default_rng(5)
    texts = ["a dog", "a cat", "nothing", "emu!"]
    chosen = rng.choice(4, (n, 3), p=[0.5, 0.3, 0.18, 0.02])
    return [
        {"id": f"s{i}", "caption": texts[row[0]], "captions": [texts[c] for c in row]} for i, row in enumerate(chosen)
    ]


def test_each_text_by_itself():
    records = several()
    step = MetaClip(ENTRIES, t=30, texts="each", seed=2)
    counts = step.count(records)
    assert counts.tolist() == [
        sum(entry in naive_words for r in records for naive_words in map(str.split, r["captions"]))
        for entry in ENTRIES[:2]
    ] + [0, 0, sum(text == "emu!" for r in records for text in r["captions"])]
    prob = entry_prob(counts, 30)
    expected = {}
    for record in records:
        left = [
            text
            for j, text in enumerate(record["captions"])
            if any(uniform(text_key(2, record["id"], j), 1 + e) < prob[e] for e in naive(text, ENTRIES))
        ]
        if left:
            expected[record["id"]] = left
    found = step.apply(records)
    assert {r["id"]: r["captions"] for r in found} == expected
    assert all(r["caption"] == r["captions"][0] for r in found)
    assert any(len(r["captions"]) > 1 for r in found)
    assert len(records[0]["captions"]) == 3
    told = step.report(records)
    assert (told.records, told.texts, told.kept) == (300, 900, len(found))
    assert told.after.sum() == sum(len(naive(text, ENTRIES)) for r in found for text in r["captions"])


def test_one_text_at_random():
    records = several(2000)
    step = MetaClip(ENTRIES, t=100, texts="one", mode="closed_form")
    prob = entry_prob(step.count(records), 100)
    found = step.apply(records)
    assert all(len(r["captions"]) == 1 and naive(r["caption"], ENTRIES) for r in found)
    law = []
    for record in records:
        each = [prob[naive(t, ENTRIES)[0]] for t in record["captions"] if naive(t, ENTRIES)]
        law.append(np.mean(each) if each else 0.0)
    assert abs(len(found) - sum(law)) < 4 * math.sqrt(sum(p * (1 - p) for p in law))
    assert step.report(records).expected == pytest.approx(sum(law))
    everything = MetaClip(ENTRIES, t=math.inf, texts="one").apply(records)
    both = [r for r in records if {"a dog", "a cat"} <= set(r["captions"]) and "emu!" not in r["captions"]]
    picked = {r["id"]: r["caption"] for r in everything}
    share = np.mean([picked[r["id"]] == "a dog" for r in both])
    assert 0.5 < share < 0.68  # 0.62 by the draw of the pool: either may be picked, the more frequent one more often


def test_records_with_a_single_caption_are_welcome_in_every_mode():
    records = pool()
    for texts in ("each", "one"):
        kept = MetaClip(ENTRIES, t=math.inf, texts=texts).apply(records)
        assert ids(kept) == [r["id"] for r in records if naive(r["caption"], ENTRIES)]
        assert all(r["captions"] == [r["caption"]] for r in kept)


# Keeping, and mistakes


def test_a_step_can_be_sent_to_another_process():
    step = MetaClip(ENTRIES, t=20)
    step.matcher.match("a dog")
    assert ids(pickle.loads(pickle.dumps(step)).apply(pool())) == ids(step.apply(pool()))


@pytest.mark.parametrize(
    ("step", "records", "message"),
    [
        (MetaClip(ENTRIES), [{"caption": "a dog"}], "need an 'id', by which it is decided"),
        (MetaClip(ENTRIES), [{"id": "a", "label": "dog"}], "'a' needs 'caption' as text.*it has: 'id', 'label'"),
        (MetaClip(ENTRIES), [{"id": "a", "caption": None}], "'a' needs 'caption' as text"),
        (MetaClip(ENTRIES, texts="each"), [{"id": "a", "captions": [3]}], "'a' needs 'captions' as text"),
        (MetaClip(ENTRIES, texts="all"), pool(3), "texts must be one of caption, each, one"),
        (MetaClip(ENTRIES, mode="sure"), pool(3), "mode must be one of bernoulli"),
        (MetaClip(ENTRIES, t=0), pool(3), "t must be above 0"),
        (MetaClip(ENTRIES, tail_mass=2), pool(3), "tail_mass must lie in"),
        (MetaClip(ENTRIES, counts=[1, 2]), pool(3), r"counts must be \(5,\) whole numbers"),
        (MetaClip(ENTRIES, counts=[1.5] * 5), pool(3), "whole numbers"),
        (MetaClip(["dog", "dog"]), pool(3), "'dog' is there twice"),
    ],
)
def test_mistakes_are_named(step, records, message):
    with pytest.raises(ValueError, match=message):
        step.apply(records)
