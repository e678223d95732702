"""Whether "nothing here matches" is said at the right queries: asked of an index for things it holds and things it does not.

    python -m benchmarks.relevance              # stamps and photos with "offline", scenes with "tiny"; writes the result file
    python -m benchmarks.relevance calibrate    # fit the weights of ecliptic.apps.index.relevance on clip art; prints them
    python -m benchmarks.relevance background   # write ecliptic/apps/index/background.py anew

Queries about things that are there: every caption, and every noun of the pool (below) that a caption or file name holds, plain
and as "A noun."; those of them that plain search answers, with a right picture among the first ten. Queries about absent things,
worded alike: nouns of the pool that are not there, plain and as "A noun.", weighted so that there are as many animals, as much
food and so on as among the nouns that are there; and captions in which such a noun has taken the place of the noun.

The pool: nouns for things one can see, from WordNet, that its tagged texts use at least twice in that sense, and the names of
ImageNet's classes. Half of it (by a hash) makes queries; the other half is the background that `search` compares with, so
that no query here is known to it. What counts as there is decided by `Contents.why`, without looking at scores, and by hand
(`BY_HAND`, for "stamps" and "photos"). Thresholds and weights come from clip art, which shares no picture with the test.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ecliptic
from benchmarks.measure import RESULTS, commit, machine
from ecliptic.apps.index import background, relevance
from ecliptic.apps.index.relevance import FIRST, Relevance
from ecliptic.data.debian import package_folder
from ecliptic.data.sources import open_source
from ecliptic.data.wordnet import wordnet

Floats = NDArray[np.float64]

SEEN, NOT_SEEN = ("n00002684", "n00021265", "n07555863"), ("n00007846", "n00027167", "n08620061")
# physical object, food (twice); and not: person, location, point

FLAT = 0.272  # the cosine that four of five answered queries reach on clip art (`calibrate`), to compare with

# Absent by the rules but, read against the captions, there in some way, or nothing that one could see. Decided by reading the
# list against the captions; scores of many had been seen by then, and none was a reason.
BY_HAND = {
    "no one thing to be seen": """
        amen corner; angora; capsule; clip; contrivance; curio; dance; detector; diamondback; diet; editorial; entanglement;
        etcetera; foil; government office; groom; hardware; heaver; interlayer; irons; journalism; landmass; loggerhead; manual;
        masterpiece; modernism; musical; musical comedy; original; output; overall; pet; plumbing; pseudophloem; queen;
        radio source; rib; rig; rooms; sash; sham; silent movie; slab; slit; sorrel; soundtrack; stall; tangle; third base;
        tidewater; titi; virus; work of art; workings
        """,
    "part of, or around, something that is there": """
        back porch; balustrade; barnyard; blackboard; bookshelf; boot; bridle; buckle; car mirror; chimney; church bell; cockpit;
        coast; collar; computer keyboard; conducting wire; costume; dome; door; ear; fence rail; flagpole; grape arbor; gutter;
        highroad; hook; keyboard; lane; lumber; mask; military uniform; mouthpiece; mustache; nipple; pant leg; plank; pocket;
        pollen; porch; prayer rug; radar; rail; railroad station; rear window; riding boot; roadway; seat belt; sensor; sidewalk;
        sill; slat; sleeve; steps; stirrup; throttle; timber; toilet seat; trigger; trunk; typewriter keyboard; veranda;
        windshield; wire
        """,
    "another word for something that is there, or a kind of it that may be": """
        apartment building; bell cote; bolete; bow tie; cabin; calf; capillary; daisy; dinner; dungeon; earthstar; grenade;
        hand grenade; hare; hen-of-the-woods; high explosive; hut; hutment; lilac; manzanita; meal; observation dome; peony;
        poppy; prison; saloon; seal; stupa; violet; yellow lady's slipper
        """,
}


# The pool


@cache
def pool() -> list[str]:
    """Nouns for things to be seen, the most used first, then names of ImageNet's classes."""
    from ecliptic.models.offline import CLASSES

    used: Counter[str] = Counter()
    main: dict[str, int] = {}
    for line in (_wordnet_folder() / "cntlist.rev").read_text(encoding="utf-8").splitlines():
        key, number, count = line.split()  # cntlist(5WN): dog%1:05:00:: 1 42
        word, _, kind = key.partition("%")
        if kind.startswith("1"):
            used[word.replace("_", " ")] += int(count)
            if number == "1":
                main[word.replace("_", " ")] = int(count)
    classes = [line.split("\t")[1].split(", ")[0].lower() for line in CLASSES.read_text(encoding="utf-8").splitlines()]
    often = [word for word, count in used.most_common() if count >= 2 and main.get(word, 0) >= 0.5 * count]
    return list(dict.fromkeys([*filter(_visible, often), *(word for word in classes if word in _senses())]))


def queried(noun: str) -> bool:
    """Which half of the pool asks; the other is the background."""
    return int(hashlib.md5(noun.encode()).hexdigest(), 16) % 2 == 1


def _wordnet_folder() -> Path:
    return package_folder("wordnet-base", "usr/share/wordnet")


@cache
def _senses() -> dict[str, list[str]]:
    """Noun -> ids of its meanings, the most usual first (index.noun, wndb(5WN))."""
    found = {}
    for line in (_wordnet_folder() / "index.noun").read_text(encoding="utf-8").splitlines():
        if not line.startswith("  "):
            fields = line.split()
            found[fields[0].replace("_", " ")] = [f"n{offset}" for offset in fields[6 + int(fields[3]) :]]
    return found


@cache
def _kinds() -> dict[str, str]:
    """Id -> WordNet's file of it: 05 animals, 06 artefacts, 13 food, 20 plants and so on."""
    lines = (_wordnet_folder() / "data.noun").read_text(encoding="utf-8").splitlines()
    return {f"n{line[:8]}": line[9:11] for line in lines if not line.startswith("  ")}


def kind(noun: str) -> str:
    return _kinds()[_senses()[noun][0]]


def _visible(noun: str) -> bool:
    net = wordnet("n")
    if noun not in _senses() or noun not in net[_senses()[noun][0]].lemmas:  # names are written with capitals
        return False
    above = {synset.id for synset in net.ancestors(_senses()[noun][0])} | {_senses()[noun][0]}
    return not above.intersection(NOT_SEEN) and bool(above.intersection(SEEN))


# What an index holds


class Contents:
    """The words of captions and names, and what they mean."""

    def __init__(self, texts: Sequence[str]):
        self.words = {phrase for text in texts for phrase in phrases(text)}
        self.meanings = {sense for word in self.words for sense in _senses().get(word, ())}
        self.above = {synset.id for sense in self.meanings for synset in wordnet("n").ancestors(sense)}

    def why(self, noun: str) -> str:
        """Why a noun counts as there; empty if it does not. Every meaning of every word in the index counts."""
        net = wordnet("n")
        sense = _senses()[noun][0]
        if self.words & set(singulars(noun)):
            return "the word itself"
        if " " in noun and noun.rsplit(" ", 1)[1] in self.words:
            return "its last word"
        if self.words & {lemma.lower() for lemma in net[sense].lemmas}:
            return "a synonym"
        if sense in self.above:
            return "a kind of it"
        if any(up.id in self.meanings and _few_kinds(up.id) for up in net.ancestors(sense)[:4]):
            return "what it is a kind of"
        return ""


@cache
def _few_kinds(sense: str) -> bool:
    """Narrower than "animal" or "structure", which would count everything as there."""
    return len(wordnet("n").descendants(sense)) < 300


def phrases(text: str) -> set[str]:
    """One to three words in a row, also in the singular."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).replace("_", " ").lower()
    words = [word.removesuffix("'s") for word in re.findall(r"[a-z']+", spaced)]
    runs = (" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1))
    return {form for run in runs for form in singulars(run)}


def singulars(word: str) -> list[str]:
    """The word and what it may be the plural of."""
    found = [word]
    for ending, instead in (("ies", "y"), ("es", ""), ("men", "man"), ("ves", "f"), ("ves", "fe")):
        if word.endswith(ending):
            found.append(word.removesuffix(ending) + instead)
    if word.endswith("s") and not word.endswith("ss"):
        found.append(word[:-1])
    return found


# Queries


@dataclass(frozen=True)
class World:
    """A collection and what is asked of it. pictures (N, D); right: for each query the pictures that answer it.

    related: those that show it in any way. style: "noun", "A noun." or "caption". weight: so that absent nouns are of the same
    kinds as those that are there.
    """

    pictures: Floats
    background: Floats
    present: list[str]
    present_style: list[str]
    present_vectors: Floats
    right: list[list[int]]
    related: list[list[int]]
    absent: list[str]
    absent_style: list[str]
    absent_vectors: Floats
    weight: Floats
    counts: dict[str, Any]


def sentence(noun: str) -> str:
    return f"{'An' if noun[0] in 'aeiou' else 'A'} {noun}."


def build(
    pictures: Floats,
    captions: Sequence[str],
    names: Sequence[str],
    said: Sequence[str],
    encode: Callable[[list[str]], Floats],
    by_hand: frozenset[str] = frozenset(),
) -> World:
    """captions, names: of each picture, which make the queries; said: all that is known to be there."""
    asking = [noun for noun in pool() if queried(noun)]
    contents = Contents(said)
    reasons = {noun: contents.why(noun) or ("by hand" if noun in by_hand else "") for noun in asking}
    absent = [noun for noun in asking if not reasons[noun]]
    held = [phrases(caption) | phrases(name.rsplit("/", 1)[-1]) for caption, name in zip(captions, names)]
    nouns = {noun: found for noun in asking if (found := [i for i, words in enumerate(held) if noun in words])}
    unique = sorted(set(captions))
    present = [*unique, *nouns, *map(sentence, nouns)]
    right = [[i for i, other in enumerate(captions) if other == caption] for caption in unique]
    right += list(nouns.values()) * 2
    each = [Contents([caption, name]) for caption, name in zip(captions, names)]
    shown = {noun: [i for i, there in enumerate(each) if i in nouns[noun] or there.why(noun)] for noun in nouns}
    related = right[: len(unique)] + [shown[noun] for noun in nouns] * 2
    vectors = encode(present)
    ranks = [rank(row, pictures, best) for row, best in zip(vectors, right)]
    answered = [place < FIRST for place in ranks]
    swapped = list(swap(unique, list(nouns), absent))
    share, there = Counter(map(kind, absent)), Counter(map(kind, nouns))
    fair = np.array([there[kind(noun)] / share[kind(noun)] for noun in absent]) / len(nouns)
    return World(
        pictures,
        encode(background.captions()),
        [text for text, yes in zip(present, answered) if yes],
        [style for style, yes in zip(_styles(len(unique), len(nouns)), answered) if yes],
        vectors[answered],
        [best for best, yes in zip(right, answered) if yes],
        [some for some, yes in zip(related, answered) if yes],
        [*swapped, *absent, *map(sentence, absent)],
        _styles(len(swapped), len(absent)),
        encode([*swapped, *absent, *map(sentence, absent)]),
        np.concatenate([np.full(len(swapped), 1 / max(len(swapped), 1)), fair, fair]),
        {
            "pictures": len(pictures),
            "asked": len(asking),
            "not absent, by rule": dict(Counter(reason for reason in reasons.values() if reason)),
            "absent nouns": len(absent),
            "absent captions": len(swapped),
            "captions": len(unique),
            "nouns": len(nouns),
            "answered": sum(answered),
            "answered first": ranks.count(0),
        },
    )


def _styles(captions: int, nouns: int) -> list[str]:
    return ["caption"] * captions + ["noun"] * nouns + ["A noun."] * nouns


def rank(query: Floats, pictures: Floats, right: Sequence[int]) -> int:
    """How many pictures are above the best right one."""
    scores = pictures @ query
    return int((scores > scores[list(right)].max()).sum())


def swap(captions: Sequence[str], nouns: Sequence[str], absent: Sequence[str]) -> Iterator[str]:
    """Short captions with their noun replaced by an absent one of its kind; none that still names a thing or has a name in it."""
    draw = random.Random(0)
    of_kind: dict[str, list[str]] = defaultdict(list)
    for noun in absent:
        of_kind[kind(noun)].append(noun)
    things = set(pool())
    for caption in captions:
        for noun in nouns:
            found = re.search(rf"\b{re.escape(noun)}\b", caption.lower())
            if found is None or not of_kind[kind(noun)]:
                continue
            start, end = caption[: found.start()], caption[found.end() :]
            if len(caption.split()) > 4 or re.search(r"\s[A-Z“\"]", caption) or things & phrases(f"{start} | {end}"):
                continue
            new = draw.choice(of_kind[kind(noun)])
            letter = "n" if new[0] in "aeiou" else ""
            article = re.sub(r"\b([Aa])n? $", rf"\1{letter} ", start)
            yield article + new + end
            break


# The worlds


def stamps_and_photos(encoder: Any) -> World:
    records = [*open_source("stamps"), *open_source("photos")]
    names = [
        f"{record['id']} {record['label'] if record['id'].startswith('photos') else ''}".strip() for record in records
    ]
    by_hand = frozenset(word.strip() for words in BY_HAND.values() for word in words.split(";"))
    return build(
        np.asarray(encoder.encode_images(record["image"] for record in records), np.float64),
        [record["caption"] for record in records],
        names,
        [text for record, name in zip(records, names) for text in (record["caption"], *name.split("/")[1:])],
        lambda texts: np.asarray(encoder.encode_texts(texts), np.float64),
        by_hand,
    )


def clip_art() -> Iterator[World]:
    """Five collections of some 400 drawings, each searched with "offline" as it would be had it not seen them (its folds)."""
    import torch
    from torch.nn.functional import normalize

    from ecliptic.data.clipart import clipart
    from ecliptic.models import offline_recipe as recipe

    settings = recipe.Settings()
    words, cnn = recipe.Sentences(), recipe.Cnn()
    drawings = recipe.gather(words, cnn)
    names = recipe.class_names(words)
    known = {row["id"]: row for row in clipart().undecoded()}
    fold = recipe.folds(drawings)
    for k in range(recipe.FOLDS):
        seen = drawings.where((fold != k) | drawings.emoji)
        asked = drawings.where((fold == k) & drawings.things & ~drawings.emoji)
        head = recipe.fit(seen, names, cnn.classify, settings, recipe.Spectrum.of(seen.features))

        def encode(texts: list[str], head: dict[str, torch.Tensor] = head) -> Floats:
            rows = recipe.describe_texts(words([text.lower() for text in texts]), head, settings)
            return normalize(rows, dim=-1).numpy().astype(np.float64)

        rows = [known[id] for id in asked.ids]
        pictures = normalize(recipe.describe_pictures(asked.features, head, cnn.classify, settings), dim=-1)
        said = [text for row in rows for text in (row["caption"], row["description"], row["id"], *row["keywords"])]
        yield build(pictures.numpy().astype(np.float64), [row["caption"] for row in rows], asked.ids, said, encode)


# What is measured


def verdicts(world: World, vectors: Floats, judge: Relevance) -> tuple[Floats, Floats, Floats]:
    """For each query, of its first ten hits: the greatest relevance, the greatest excess and the best cosine."""
    found, excess, cosine = [], [], []
    for query in vectors:
        scores = world.pictures @ query
        hits = world.pictures[np.argsort(-scores)[:FIRST]]
        found.append(judge.score(query, hits).max())
        excess.append(judge.excess(query, hits).max())
        cosine.append(scores.max())
    return np.array(found), np.array(excess), np.array(cosine)


def even(styles: Sequence[str], weight: Floats | None = None) -> Floats:
    """Weights under which captions count as much as nouns (plain and as a sentence together); their sum is 1."""
    w = np.ones(len(styles)) if weight is None else weight.copy()
    captions = np.array([style == "caption" for style in styles])
    for part in (captions, ~captions):
        w[part] /= 2 * max(w[part].sum(), 1e-12)
    return np.asarray(w / w.sum())


def weighted_bootstrap(hits: Floats, weight: Floats, groups: Sequence[str], seed: int = 0) -> list[float]:
    """95 % percentile interval of the weighted mean; forms of one query are drawn together."""
    _, index = np.unique(groups, return_inverse=True)
    value, mass = np.bincount(index, weights=hits * weight), np.bincount(index, weights=weight)
    draws = np.random.default_rng(seed).integers(0, len(mass), (2000, len(mass)))
    means = value[draws].sum(1) / np.maximum(mass[draws].sum(1), 1e-12)
    return [round(float(x), 3) for x in np.quantile(means, [0.025, 0.975])]


def curve(present: Floats, absent: Floats, kept: Floats, refused: Floats) -> list[list[float]]:
    """[share of absent refused, share of present kept] at every threshold; kept, refused: weights that sum to 1."""
    levels = np.unique(np.concatenate([present, absent, [np.inf]]))
    return [[float(refused[absent < level].sum()), float(kept[present >= level].sum())] for level in levels]


def kept_where(points: list[list[float]], refused: float) -> float:
    """The largest share kept among thresholds that refuse at least so much."""
    return round(max(kept for share, kept in points if share >= refused - 1e-9), 3)


def measure(world: World, clip_art_cosine: float | None = None) -> dict[str, Any]:
    """One world: the verdict at its fixed threshold, the whole curve, and a flat cosine cut-off chosen in hindsight."""
    judge = Relevance.fit(world.background, world.pictures)
    there, _, there_cosine = verdicts(world, world.present_vectors, judge)
    gone, _, gone_cosine = verdicts(world, world.absent_vectors, judge)
    kept, refused = even(world.present_style), even(world.absent_style, world.weight)
    ours, flat = curve(there, gone, kept, refused), curve(there_cosine, gone_cosine, kept, refused)
    stems = [
        text.lower().removeprefix("an ").removeprefix("a ").rstrip(".") for text in (*world.present, *world.absent)
    ]
    said = {
        "kept": round(float(kept[there >= 0.5].sum()), 3),
        "kept_interval": weighted_bootstrap((there >= 0.5).astype(float), kept, stems[: len(there)]),
        "refused": round(float(refused[gone < 0.5].sum()), 3),
        "refused_interval": weighted_bootstrap((gone < 0.5).astype(float), refused, stems[len(there) :]),
    }
    if clip_art_cosine is not None:
        said["flat, from clip art"] = [
            round(float(refused[gone_cosine < clip_art_cosine].sum()), 3),
            round(float(kept[there_cosine >= clip_art_cosine].sum()), 3),
        ]
    best = max(flat, key=min)
    styles = {}
    for style in dict.fromkeys(world.present_style):
        a, b = np.array(world.present_style) == style, np.array(world.absent_style) == style
        weight = world.weight[b] / world.weight[b].sum()
        styles[style] = {
            "present": int(a.sum()),
            "absent": int(b.sum()),
            "kept": round(float((there[a] >= 0.5).mean()), 3),
            "refused": round(float(weight[gone[b] < 0.5].sum()), 3),
        }
    wrongly_kept = dict.fromkeys(world.absent[i] for i in np.argsort(-gone))
    wrongly_refused = dict.fromkeys(world.present[i] for i in np.argsort(there))
    gone_by, there_by = dict(zip(world.absent, gone)), dict(zip(world.present, there))
    return {
        "counts": world.counts,
        "at the threshold": said,
        "by style": styles,
        "curve": {str(share): [kept_where(ours, share), kept_where(flat, share)] for share in SHARES},
        "best balance": {
            "relevance": [round(x, 3) for x in max(ours, key=min)],
            "flat": [round(x, 3) for x in best],
        },
        "points": {"relevance": thinned(ours), "flat": thinned(flat)},
        "auroc": {
            name: round(weighted_auroc(a, b, kept, refused), 3)
            for name, a, b in (("relevance", there, gone), ("flat", there_cosine, gone_cosine))
        },
        "failures": {
            "said to be there": [[text, round(float(gone_by[text]), 2)] for text in list(wrongly_kept)[:12]],
            "refused": [[text, round(float(there_by[text]), 2)] for text in list(wrongly_refused)[:12]],
        },
    }


SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def thinned(points: list[list[float]], count: int = 60) -> list[list[float]]:
    """Enough of a curve to draw it."""
    chosen = sorted({round(i) for i in np.linspace(0, len(points) - 1, count)})
    return [[round(x, 3) for x in points[i]] for i in chosen]


def weighted_auroc(present: Floats, absent: Floats, kept: Floats, refused: Floats) -> float:
    """The chance that a present query lies above an absent one, ties half; weights sum to 1."""
    order = np.argsort(absent)
    below = np.concatenate([[0.0], np.cumsum(refused[order])])
    ends = [below[np.searchsorted(absent[order], present, side)] for side in ("left", "right")]
    return float(((ends[0] + ends[1]) / 2 * kept).sum())


def taken_away(world: World) -> dict[str, Any]:
    """The nouns that were answered, asked once more without the pictures that show them: the same words, now absent."""
    judge = Relevance.fit(world.background, world.pictures)
    there, gone = [], []
    for i, style in enumerate(world.present_style):
        if style != "caption" and len(world.related[i]) < len(world.pictures) / 2:
            left = np.delete(world.pictures, world.related[i], axis=0)
            query = world.present_vectors[i]
            for pictures, found in ((world.pictures, there), (left, gone)):
                hits = pictures[np.argsort(-(pictures @ query))[:FIRST]]
                found.append(judge.score(query, hits).max())
    same = np.full(len(there), 1 / max(len(there), 1))
    return {
        "queries": len(there),
        "kept": round(float(np.mean(np.array(there) >= 0.5)), 3),
        "refused": round(float(np.mean(np.array(gone) < 0.5)), 3),
        "best balance": [round(x, 3) for x in max(curve(np.array(there), np.array(gone), same, same), key=min)],
    }


def rendered(encoder: Any, n: int = 400) -> World:
    """Scenes of some colours and shapes, asked for every combination of a colour and a shape that is not in the background."""
    from ecliptic.data.scenes import COLOURS, SHAPES, TEXTURES, scenes

    pairs = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    asked = [pair for pair in pairs if queried(pair)]
    hidden = set(asked[::2])  # in no picture
    drawn = []
    for record in scenes("test", n=3 * n, size=48):
        if f"{record['attributes']['colour']} {record['attributes']['shape']}" not in hidden and len(drawn) < n:
            drawn.append(record)
    shown = [f"{record['attributes']['colour']} {record['attributes']['shape']}" for record in drawn]
    pictures = np.asarray(encoder.encode_images(record["image"] for record in drawn), np.float64)
    present = [pair for pair in asked if pair in shown]
    absent = [pair for pair in asked if pair not in shown]
    known = [pair for pair in pairs if pair not in asked]
    around = [f"a {pair}" for pair in known] + [f"a {texture} {pair}" for pair in known for texture in TEXTURES]

    def encode(texts: list[str]) -> Floats:
        return np.asarray(encoder.encode_texts(texts), np.float64)

    vectors = encode([f"a {pair}" for pair in present])
    right = [[i for i, pair in enumerate(shown) if pair == wanted] for wanted in present]
    answered = np.array([rank(row, pictures, best) < FIRST for row, best in zip(vectors, right)])
    return World(
        pictures,
        encode(around),
        [pair for pair, yes in zip(present, answered) if yes],
        ["noun"] * int(answered.sum()),
        vectors[answered],
        [best for best, yes in zip(right, answered) if yes],
        [best for best, yes in zip(right, answered) if yes],
        absent,
        ["noun"] * len(absent),
        encode([f"a {pair}" for pair in absent]),
        np.ones(len(absent)),
        {"pictures": n, "background": len(around), "asked": len(asked), "answered": int(answered.sum())},
    )


def calibrate() -> None:
    """Slope of a logistic regression on clip art; the excess and the cosine that four of five answered queries reach."""
    excess, cosine, truth, weights = [], [], [], []
    for world in clip_art():
        print(json.dumps(world.counts))
        judge = Relevance.fit(world.background, world.pictures)
        for yes, vectors, weight in (
            (1.0, world.present_vectors, even(world.present_style)),
            (0.0, world.absent_vectors, even(world.absent_style, world.weight)),
        ):
            _, found, best = verdicts(world, vectors, judge)
            excess.append(found)
            cosine.append(best)
            truth.append(np.full(len(vectors), yes))
            weights.append(weight / recipe_folds())
    x, y, w = np.concatenate(excess), np.concatenate(truth), np.concatenate(weights)
    slope, offset = logistic(x[:, None], y, 2500 * w)
    there, gone, kept, refused = x[y == 1], x[y == 0], w[y == 1], w[y == 0]
    limit, flat = reached(there, kept), reached(np.concatenate(cosine)[y == 1], kept)
    print(
        f"SLOPE = {slope:.2f}, LIMIT = {limit:.2f}, FLAT = {flat:.3f}; even odds at an excess of {-offset / slope:.2f}"
    )
    points = curve(there, gone, kept, refused)
    print("there it refuses", float(refused[gone < limit].sum()), "; best balance", max(points, key=min))


def reached(values: Floats, weight: Floats, share: float = 0.8) -> float:
    """The value that a share of the weight lies at or above."""
    order = np.argsort(-values)
    return float(values[order][np.searchsorted(np.cumsum(weight[order]), share)])


def recipe_folds() -> int:
    from ecliptic.models.offline_recipe import FOLDS

    return FOLDS


def logistic(x: Floats, y: Floats, weight: Floats) -> Floats:
    """(n, d), (n,) in {0, 1}, (n,) -> d slopes and the intercept, by Newton steps."""
    design = np.column_stack([x, np.ones(len(x))])
    beta = np.zeros(design.shape[1])
    for _ in range(30):
        chance = 1 / (1 + np.exp(-design @ beta))
        slope = design.T @ (weight * (chance - y))
        beta -= np.linalg.solve((design.T * (weight * chance * (1 - chance))) @ design, slope)
    return beta


def write_background() -> None:
    """The other half of the pool, as a module: text files would need to be declared to the packager."""
    words = [noun for noun in pool() if not queried(noun)]
    lines = textwrap.wrap("; ".join(words), 118)
    path = Path(background.__file__)
    before, _, rest = path.read_text(encoding="utf-8").partition('_THINGS = """\n')
    path.write_text(
        f'{before}_THINGS = """\n' + "\n".join(lines) + '\n"""' + rest.partition('"""')[2], encoding="utf-8"
    )
    print(f"{len(words)} captions in {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("measure", "calibrate", "background"), default="measure")
    what = parser.parse_args().what
    if what != "measure":
        return {"calibrate": calibrate, "background": write_background}[what]()
    found: dict[str, Any] = {"command": "python -m benchmarks.relevance", "commit": commit(), "machine": machine()}
    for name, make in (("offline", stamps_and_photos), ("tiny", rendered)):
        encoder = ecliptic.load(name)
        world = make(encoder)
        found[name] = {"model": encoder.id, **measure(world, FLAT if name == "offline" else None)}
        if name == "offline":
            found[name]["taken away"] = taken_away(world)
        for key in ("counts", "at the threshold", "by style", "curve", "best balance", "auroc", "taken away"):
            print(name, key, found[name].get(key))
    found["scale"] = {"slope": relevance.SLOPE, "limit": relevance.LIMIT}
    found["by hand"] = {reason: sorted(word.strip() for word in words.split(";")) for reason, words in BY_HAND.items()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "relevance.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
