"""MetaCLIP: keep the pairs whose words are in a fixed list of concepts, and thin out the concepts that everybody writes of.

No model takes part. Every caption is searched for the entries of a metadata list; captions without any are dropped. An entry
found in more than `t` captions passes each of them with probability t / count, all others pass theirs always, and a pair
stays if one of its entries passes it. So the tail is kept whole and the head is cut to about `t` draws per entry.

    step = MetaClip("wordnet", t=100)
    print(step.report(pool))                            # what would stay, and how even it is
    curated = step.apply(pool)

Where the pool lies in parts, count them apart and add: `counts = sum(step.count(part) for part in parts)`; then
`replace(step, counts=counts).apply(part)` decides about each part as it would about the whole.

The cap is on what an entry selects by itself: a frequent entry that stands beside rare ones ends above `t`, and that is meant.
Balance last, after whatever else drops pairs (failed downloads, duplicates): what is lost afterwards unbalances the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
import string
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ecliptic.core.contracts import DataStep, Pairs, Record
from ecliptic.core.method import Paper, method
from ecliptic.data.select import select, undecoded
from ecliptic.data.shards import Stream
from ecliptic.data.shots import tiny_records
from ecliptic.data.text import read_text
from ecliptic.data.wordnet import WordNet, wordnet

Counts = NDArray[np.uint64]
Mode = Literal["bernoulli", "closed_form"]
Texts = Literal["caption", "each", "one"]
MODES, TEXTS = ("bernoulli", "closed_form"), ("caption", "each", "one")

TAIL_MASS = 0.06  # of the published 400M pairs: entries below t = 20,000 hold about this share of all matches


@method(
    Paper("Demystifying CLIP Data", arxiv="2309.16671", year=2023),
    purpose="choose training pairs by their captions alone: drop noise, thin out what is frequent, keep all that is rare",
    claim="at a fixed number of training pairs, balanced curation beats random sampling on rare concepts by far and on all of "
    "them in the mean; without the cap, or with counts that belong to other entries, it does not",
)
@dataclass(frozen=True, eq=False)
class MetaClip(DataStep):
    """Matched and balanced pairs, in the order they came; of each only (seed, its `id`, its text, the counts) decide.

    texts: "caption" looks at that field alone. With several candidate texts in `captions`, "each" tests each of them and
    leaves those that pass, the first as `caption` (the published demonstration); "one" picks one that matches at random
    and tests it alone (the later pipeline of the same authors, which goes with mode "closed_form").
    """

    metadata: str | Sequence[str] = "wordnet"  # entries; or a file of them, a line each or a JSON list; or the synsets
    t: float | None = None  # captions per entry; math.inf only drops what matches nothing. None: from `tail_mass`
    tail_mass: float = TAIL_MASS  # share of all matches that entries below t hold: what to keep equal between pools
    counts: ArrayLike | None = None  # uint64 (M,), texts per entry in the whole pool. None: count what `apply` gets
    mode: Mode = "bernoulli"  # one draw per matched entry, or one with their joint probability: the same law
    texts: Texts = "caption"
    seed: int = 0

    def apply(self, pairs: Pairs) -> Pairs:
        """The pairs that stay. Records and lists are decided on now, without opening a picture; a stream is counted the
        first time it is walked over, which takes memory for the entries and not for the pairs."""
        decide = _Decision(self, pairs)
        return select(pairs, decide.keep, decide.change)

    def online(self, pairs: Pairs) -> Pairs:
        """As `apply`, but every walk over the result is an epoch with draws of its own: for a training loop.

        Over the epochs a frequent concept then shows all of its pairs, though few in each.
        """
        return _Online(self, pairs)

    def count(self, pairs: Pairs) -> Counts:
        """uint64 (M,): how many texts match each entry. The counts of the parts of a pool add up to those of the whole."""
        texts = chain.from_iterable(self.texts_of(record) for record in undecoded(pairs))
        return count_entries(map(self.matcher.match, texts), len(self.matcher.entries))

    def report(self, pairs: Pairs) -> Curation:
        """What `apply` does to this pool, in numbers; opens no picture."""
        decide = _Decision(self, pairs)
        entries = self.matcher.entries
        records = texts = matched = kept = 0
        expected = 0.0

        def kept_matches() -> Iterator[list[int]]:
            nonlocal records, texts, matched, kept, expected
            for record in undecoded(pairs):
                found = [self.matcher.match(text) for text in self.texts_of(record)]
                passed = decide.passed(record, found)
                records, texts = records + 1, texts + len(found)
                matched, kept = matched + any(found), kept + bool(passed)
                expected += self._expected(found, decide.balancer)
                yield from (found[j] for j in passed)

        after = count_entries(kept_matches(), len(entries))
        return Curation(
            records=records,
            texts=texts,
            matched=matched,
            kept=kept,
            expected=expected,
            t=decide.t,
            before=decide.counts,
            after=after,
            entries=entries,
        )

    @cached_property
    def matcher(self) -> Matcher:
        return Matcher(load_metadata(self.metadata))

    def texts_of(self, record: Record) -> list[str]:
        """The texts of a record that are searched."""
        if self.texts not in TEXTS:
            raise ValueError(f"texts must be one of {', '.join(TEXTS)}, not {self.texts!r}")
        name = "captions" if self.texts != "caption" and record.get("captions") else "caption"
        found: Any = record.get(name)
        texts = list(found) if name == "captions" else [found]
        if not all(isinstance(text, str) for text in texts):
            have = ", ".join(map(repr, record))
            raise ValueError(f"record {record.get('id')!r} needs {name!r} as text, to be curated by it; it has: {have}")
        return texts

    def _expected(self, found: Sequence[Sequence[int]], balancer: Balancer) -> float:
        """How probable it is that a record with these matches stays."""
        each = [balancer.probability(matches) for matches in found if matches]
        if self.texts == "one":
            return sum(each) / len(each) if each else 0.0
        return 1.0 - math.prod(1.0 - p for p in each)

    @classmethod
    def tiny(cls) -> tuple[MetaClip, list[Record]]:
        return cls(("red", "green square", "nothing"), t=2, counts=(4, 4, 0), seed=1), tiny_records()


class _Decision:
    """What a step decides about the records of a pool, which is counted when the first decision needs it.

    like: a decision about the same pool, whose counts serve for this one, too.
    """

    def __init__(self, step: MetaClip, pairs: Pairs, epoch: int = 0, like: _Decision | None = None):
        if isinstance(pairs, Iterator):
            raise TypeError("pairs must be re-iterable (a list, Records, a Stream), not an iterator or generator")
        self.step, self.pairs, self.epoch, self.like = step, pairs, epoch, like
        self.change = self._change if step.texts != "caption" else None

    @cached_property
    def counts(self) -> Counts:
        if self.like is not None:
            return self.like.counts
        if self.step.counts is None:
            return self.step.count(self.pairs)
        return _checked(self.step.counts, len(self.step.matcher.entries))

    @cached_property
    def t(self) -> float:
        return tail_threshold(self.counts, self.step.tail_mass) if self.step.t is None else self.step.t

    @cached_property
    def balancer(self) -> Balancer:
        return Balancer(entry_prob(self.counts, self.t), self.step.mode, self.step.seed)

    def keep(self, record: Record) -> bool:
        return bool(self._passed(record))

    def _change(self, record: Record) -> Record:
        """The record with the texts that passed."""
        texts = self.step.texts_of(record)
        left = [texts[j] for j in self._passed(record)]
        return {**record, "caption": left[0], "captions": left}

    def _passed(self, record: Record) -> list[int]:
        return self.passed(record, [self.step.matcher.match(text) for text in self.step.texts_of(record)])

    def passed(self, record: Record, found: Sequence[Sequence[int]]) -> list[int]:
        """Which of the texts stay, by their matches."""
        if (id := record.get("id")) is None:
            raise ValueError(
                "records need an 'id', by which it is decided whether they stay: give each one of its own, or use "
                "Records.from_list(records), which numbers them"
            )
        able = [j for j, matches in enumerate(found) if matches]
        if self.step.texts == "one" and able:
            draw = uniform(text_key(self.step.seed, id, -1, self.epoch), 0)
            able = [able[int(draw * len(able))]]
        return [j for j in able if self.balancer.keep(id, found[j], j, self.epoch)]


class _Online:
    """See `MetaClip.online`. The pool is counted once."""

    def __init__(self, step: MetaClip, pairs: Pairs):
        self.counted, self.epochs = _Decision(step, pairs), 0

    def __iter__(self) -> Iterator[Record]:
        epoch, self.epochs = self.epochs, self.epochs + 1
        step, pairs = self.counted.step, self.counted.pairs
        decide = _Decision(step, pairs, epoch, self.counted)
        kept = select(pairs, decide.keep, decide.change)
        if isinstance(kept, Stream):
            kept.passes = epoch  # so that it also shuffles anew
        return iter(kept)


@dataclass(frozen=True, eq=False)
class Curation:
    """What curating a pool did. before, after: uint64 (M,), texts per entry among all and among those that stayed.

    records, texts: in the pool. matched: records with at least one match. kept: records that stay; expected: the mean of that
    number over all seeds.
    """

    records: int
    texts: int
    matched: int
    kept: int
    expected: float
    t: float
    before: Counts
    after: Counts
    entries: tuple[str, ...] = field(repr=False)

    @property
    def tail_mass(self) -> float:
        """Share of the matches that belongs to entries below t."""
        return tail_mass(self.before, self.t)

    @property
    def gini(self) -> tuple[float, float]:
        """Inequality of the entry counts before and after, over the entries that occur in the pool at all."""
        there = self.before > 0
        return gini(self.before[there]), gini(self.after[there])

    def head(self, n: int = 10) -> list[tuple[str, int, int]]:
        """The most frequent entries, with their counts before and after."""
        order = np.argsort(-self.before.astype(np.int64), kind="stable")[:n]
        return [(self.entries[e], int(self.before[e]), int(self.after[e])) for e in order if self.before[e]]

    def to_json(self) -> dict[str, Any]:
        before, after = self.gini
        return {
            "records": self.records,
            "texts": self.texts,
            "matched": self.matched,
            "matched_share": self.matched / max(self.records, 1),
            "kept": self.kept,
            "kept_share": self.kept / max(self.records, 1),
            "expected": self.expected,
            "t": self.t if math.isfinite(self.t) else None,
            "tail_mass": self.tail_mass,
            "entries": len(self.entries),
            "entries_found": int((self.before > 0).sum()),
            "entries_above_t": int((self.before > self.t).sum()),
            "gini_before": before,
            "gini_after": after,
            "head": [{"entry": entry, "before": a, "after": b} for entry, a, b in self.head()],
        }

    def __str__(self) -> str:
        said = self.to_json()
        shown = ", ".join(f"{entry} {a:,} -> {b:,}" for entry, a, b in self.head(5))
        return "\n".join(
            [
                f"{self.records:,} records, {self.matched:,} matched ({said['matched_share']:.1%}), "
                f"{self.kept:,} kept ({said['kept_share']:.1%}; {self.expected:,.0f} expected)",
                f"t = {self.t:,.0f}: {said['entries_above_t']:,} of the {said['entries_found']:,} entries found are above it, "
                f"those below it hold {self.tail_mass:.1%} of all matches",
                f"Gini of the entry counts {said['gini_before']:.3f} -> {said['gini_after']:.3f}",
                f"most frequent: {shown or 'none'}",
            ]
        )


# ------------------------------------------------------------------------------------------------------ metadata


@dataclass(frozen=True)
class Limits:
    """What an entry must reach in its own list; the released `build_metadata.py`, made for the English Wikipedia."""

    unigram_count: float = 100
    bigram_pmi: float = 30.0  # bits. No pair of words in a corpus of N can exceed log2 N: lower it for small ones
    title_views: float = 70
    entries: int = 500_000  # where the list ends


def build_metadata(
    words: WordNet | Iterable[str] = (),
    unigram_counts: Mapping[str, float] | None = None,
    bigram_pmi: Mapping[str, float] | None = None,
    title_views: Mapping[str, float] | None = None,
    limits: Limits = Limits(),
) -> list[str]:
    """The list of concepts: "0" to "99", all `words` (WordNet: the names of its synsets), then frequent words, pairs of
    words that belong together, and titles that are looked up, each from the highest down. Each entry once.

    Empty entries and single punctuation marks are left out, as in the released code. Section 3.1 of the paper.
    """
    found = dict.fromkeys(str(number) for number in range(100))
    found.update(dict.fromkeys(synset_names(words) if isinstance(words, WordNet) else words))
    for values, least in (
        (unigram_counts, limits.unigram_count),
        (bigram_pmi, limits.bigram_pmi),
        (title_views, limits.title_views),
    ):
        chosen = [(-value, entry) for entry, value in (values or {}).items() if value >= least]
        found.update(dict.fromkeys(entry for _, entry in sorted(chosen)))
    dropped = {"", *string.punctuation}
    return list(islice((entry for entry in found if entry not in dropped), limits.entries))


def synset_names(words: WordNet) -> list[str]:
    """The name of each synset up to its first dot: the first lemma, in lower case, as NLTK writes it ("st" for St. Louis)."""
    return list(dict.fromkeys(synset.lemmas[0].lower().partition(".")[0] for synset in words))


def count_words(texts: Iterable[str]) -> tuple[Counter[str], Counter[str]]:
    """How often each word, and each two words in a row, occur in a corpus. Words are what `Matcher` takes for words;
    punctuation marks are none, and no pair reaches across one."""
    words: Counter[str] = Counter()
    pairs: Counter[str] = Counter()
    for text in texts:
        tokens = spaced(text).split()
        words.update(token for token in tokens if token not in string.punctuation)
        pairs.update(f"{a} {b}" for a, b in pairwise(tokens) if not {a, b} & set(string.punctuation))
    return words, pairs


def bigram_pmi(words: Mapping[str, int], pairs: Mapping[str, int]) -> dict[str, float]:
    """Pointwise mutual information of each pair in bits: log2(n12 N / (n1 n2)), N the number of all words (NLTK's)."""
    total = sum(words.values())
    found = {}
    for pair, count in pairs.items():
        a, b = pair.split(" ")
        found[pair] = math.log2(count * total / (words[a] * words[b]))
    return found


def sum_title_views(records: Iterable[tuple[str, int]], least: int = 50) -> dict[str, int]:
    """Views per title over hourly records (title, views) as Wikimedia publishes them: `_` for spaces; records below `least`
    and titles with ":" (other name spaces) are left out, as in the released code."""
    found: Counter[str] = Counter()
    for title, views in records:
        if views >= least and ":" not in title:
            found[title.replace("_", " ").strip()] += views
    return dict(found)


def load_metadata(metadata: str | Sequence[str]) -> list[str]:
    """Entries given as such, the name "wordnet", or a file: a JSON list, or an entry a line."""
    if not isinstance(metadata, str | Path):
        return list(metadata)
    if metadata == "wordnet":
        return build_metadata(wordnet())
    path = Path(metadata)
    if not path.is_file():
        raise ValueError(f"metadata must be 'wordnet', a file or a list of entries; there is no file {metadata}")
    text = read_text(path)
    if path.suffix.lower() != ".json":
        return list(dict.fromkeys(line for line in text.splitlines() if line.strip()))
    found = json.loads(text)
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise ValueError(f"{path} must hold a JSON list of strings, the entries")
    return found


# ------------------------------------------------------------------------------------------------------ matching

_MARKS = ",.;:?!`"
_SPACES = "\t\n\r"


def spaced(text: str) -> str:
    """The text as it is searched: a space before and after it and around each of , . ; : ? ! `, and for tabs and line ends."""
    text = f" {text} "
    for mark in _MARKS:
        text = text.replace(mark, f" {mark} ")
    for space in _SPACES:
        text = text.replace(space, " ")
    return text


class Matcher:
    """Finds the entries whose " entry " is a part of `spaced(text)`: whole words, case and hyphens as they are.

    That is so exactly where the entry, split at each single space, is a run of the text's words split the same way, empty
    ones between two spaces included. So single words and pairs are looked up in dictionaries, and longer runs only where
    their first two words stand: the time does not depend on how many entries there are.
    """

    def __init__(self, metadata: Sequence[str]):
        self.entries = tuple(metadata)
        places = {entry: e for e, entry in enumerate(self.entries)}
        if len(places) < len(self.entries) or "" in places:
            twice = [entry for entry, count in Counter(self.entries).items() if count > 1]
            what = f"{twice[0]!r} is there twice" if twice else "one is empty"
            raise ValueError(f"metadata must be different entries, none of them empty: {what}")
        self._words: dict[str, int] = {}
        self._pairs: dict[tuple[str, str], int] = {}
        self._runs: dict[str, int] = {}
        lengths: dict[tuple[str, str], set[int]] = {}
        for entry, e in places.items():
            words = entry.split(" ")
            if len(words) == 1:
                self._words[entry] = e
            elif len(words) == 2:
                self._pairs[words[0], words[1]] = e
            else:
                self._runs[entry] = e
                lengths.setdefault((words[0], words[1]), set()).add(len(words))
        self._lengths = {pair: tuple(sorted(found)) for pair, found in lengths.items()}

    def __len__(self) -> int:
        return len(self.entries)

    def match(self, text: str) -> list[int]:
        """The numbers of the entries that the text contains, each once, in order."""
        words = spaced(text)[1:-1].split(" ")
        pairs = list(pairwise(words))
        found = {*map(self._words.get, words), *map(self._pairs.get, pairs)}
        if not self._lengths.keys().isdisjoint(pairs):
            for start, pair in enumerate(pairs):
                for length in self._lengths.get(pair, ()):
                    found.add(self._runs.get(" ".join(words[start : start + length])))
        return sorted(e for e in found if e is not None)


class Index(NamedTuple):
    """Which entry occurs in which text, a row for each: entries (R,) uint32, texts (R,) uint64, in the order of the texts."""

    entries: NDArray[np.uint32]
    texts: NDArray[np.uint64]


def inverted_index(match_lists: Iterable[Sequence[int]], first: int = 0) -> Index:
    """The rows of texts number `first`, `first` + 1 and so on: parts of a pool are indexed apart and laid end to end."""
    entries, texts = array("I"), array("Q")
    for number, matches in enumerate(match_lists, first):
        entries.extend(matches)
        texts.extend([number] * len(matches))
    return Index(np.frombuffer(entries, np.uint32), np.frombuffer(texts, np.uint64)) if entries else _EMPTY


_EMPTY = Index(np.empty(0, np.uint32), np.empty(0, np.uint64))
_CHUNK = 1 << 20  # matches held while counting


def count_entries(match_lists: Iterable[Sequence[int]], n: int) -> Counts:
    """uint64 (n,): in how many texts each entry occurs. Memory for the n entries, however many texts there are."""
    counts = np.zeros(n, np.uint64)
    held = array("I")
    for matches in match_lists:
        held.extend(matches)
        if len(held) >= _CHUNK:
            counts += _tally(held, n)
            held = array("I")
    return counts + _tally(held, n)


def _tally(entries: array[int], n: int) -> Counts:
    return np.bincount(entries, minlength=n).astype(np.uint64) if len(entries) else np.zeros(n, np.uint64)


# ------------------------------------------------------------------------------------------------------ balancing


def entry_prob(counts: ArrayLike, t: float) -> NDArray[np.float64]:
    """(M,): t / max(count, t), with which an entry passes a text that it matches. 1 for the tail, and for t = infinity."""
    if not t > 0:
        raise ValueError(f"t must be above 0 (math.inf keeps all that match), not {t}")
    counts = np.asarray(counts, np.float64)
    return np.where(counts > t, t / np.maximum(counts, 1), 1.0)


def tail_mass(counts: ArrayLike, t: float) -> float:
    """Share of all matches that belongs to entries with fewer than t of them."""
    counts = np.asarray(counts, np.float64)
    return float(counts[counts < t].sum() / max(counts.sum(), 1))


def tail_threshold(counts: ArrayLike, p: float) -> int:
    """The count t at which the share of the entries up to it, smallest first, reaches p: tail_mass(counts, t) < p, and at
    t + 1 it is at least p. The released code takes the nearest count instead, which may be one below."""
    if not 0 < p <= 1:
        raise ValueError(f"tail_mass must lie in (0, 1], not {p}")
    there = np.sort(np.asarray(counts, np.uint64))
    there = there[there > 0]
    if not len(there):
        return 1
    share = np.cumsum(there).astype(np.float64) / float(there.sum())
    return int(there[min(int(np.searchsorted(share, p - 1e-12)), len(there) - 1)])


def gini(counts: ArrayLike) -> float:
    """Inequality of the counts: 0 where all are equal, towards 1 where one has everything."""
    x = np.sort(np.asarray(counts, np.float64))
    if not len(x) or not x.sum():
        return 0.0
    rank = np.arange(1, len(x) + 1)
    return float(((2 * rank - len(x) - 1) * x).sum() / (len(x) * x.sum()))


class Balancer:
    """Decides which texts stay, given the probability (M,) of each entry.

    mode "bernoulli": each matched entry draws for itself, and any success keeps the text. "closed_form": one draw with
    P = 1 - prod(1 - p) over the matched entries. Both are the same law with other draws. A draw depends on the seed, the
    record's id and the entry's number alone, never on what else is in the pool, or where.
    """

    def __init__(self, prob: ArrayLike, mode: Mode = "bernoulli", seed: int = 0):
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
        self.prob = np.asarray(prob, np.float64)
        self.mode, self.seed = mode, seed
        self._prob = self.prob.tolist()  # numbers of Python are faster one by one

    def probability(self, matches: Sequence[int]) -> float:
        """P, the probability that a text with these matches stays; 0 without any."""
        return 1.0 - float(math.prod(1.0 - self._prob[e] for e in matches))

    def keep(self, id: object, matches: Sequence[int], text: int = 0, epoch: int = 0) -> bool:
        """Whether the text with these matches stays. id: of its record; text: which of the record's texts it is."""
        key = text_key(self.seed, id, text, epoch)
        if self.mode == "closed_form":
            return uniform(key, 0) < self.probability(matches)
        return any(self._prob[e] >= 1 or uniform(key, 1 + e) < self._prob[e] for e in matches)

    def keep_index(self, index: Index, ids: Iterable[object], epoch: int = 0) -> NDArray[np.bool_]:
        """`keep` of many texts at once, the same decisions: ids of texts 0 to N - 1 -> bool (N,)."""
        keys = np.array([text_key(self.seed, id, 0, epoch) for id in ids], np.uint64)
        texts, p = index.texts.astype(np.int64), self.prob[index.entries]
        if self.mode == "bernoulli":
            kept = np.zeros(len(keys), bool)
            kept[texts[uniforms(keys[texts], 1 + index.entries.astype(np.uint64)) < p]] = True
            return kept
        missed = np.ones(len(keys))
        np.multiply.at(missed, texts, 1.0 - p)
        return uniforms(keys, np.zeros(len(keys), np.uint64)) < 1.0 - missed


_GAMMA, _MIX1, _MIX2, _WORD = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, (1 << 64) - 1


def text_key(seed: int, id: object, text: int = 0, epoch: int = 0) -> int:
    """The key of a record's text (64 bits), from which all draws about it follow. text: which of its candidate texts."""
    name = f"{seed}\0{epoch}\0{text}\0{id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")


def uniform(key: int, number: int) -> float:
    """Draw `number` of a key, in [0, 1): SplitMix64 (Steele, Lea and Flood 2014) as a generator with a counter."""
    z = (key + (number + 1) * _GAMMA) & _WORD
    z = ((z ^ (z >> 30)) * _MIX1) & _WORD
    z = ((z ^ (z >> 27)) * _MIX2) & _WORD
    return float((z ^ (z >> 31)) >> 11) / 2**53


def uniforms(keys: NDArray[np.uint64], numbers: NDArray[np.uint64]) -> NDArray[np.float64]:
    """`uniform` of many, equal bit for bit."""
    z = keys + (numbers + np.uint64(1)) * np.uint64(_GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX2)
    draws: NDArray[np.float64] = ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53
    return draws


def _checked(counts: ArrayLike, n: int) -> Counts:
    found = np.asarray(counts)
    if found.shape != (n,) or found.dtype.kind not in "iu" or (found < 0).any():
        raise ValueError(f"counts must be ({n},) whole numbers, one for each entry, not {found.dtype} {found.shape}")
    return found.astype(np.uint64)
