"""WordNet 3.0 (Debian wordnet-base): synsets, their words, glosses and what is a kind of what.

Ids are written as ImageNet writes them: part of speech and eight digits, "n02084071" for dog.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ecliptic.data.debian import package_folder

_FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}


@dataclass(frozen=True, slots=True)
class Synset:
    """A meaning. lemmas: its words, the most usual first, blanks for underscores. hypernyms: ids one step up."""

    id: str
    lemmas: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    hypernyms: tuple[str, ...]

    @property
    def pos(self) -> str:
        """Part of speech: n, v, a or r."""
        return self.id[0]


class WordNet:
    """Synsets by id and by word. `find` is case-insensitive; meanings come in the order of the data files."""

    def __init__(self, synsets: dict[str, Synset]):
        self.synsets = synsets
        self._by_word: dict[str, list[Synset]] = {}
        for synset in synsets.values():
            for lemma in dict.fromkeys(lemma.lower() for lemma in synset.lemmas):
                self._by_word.setdefault(lemma, []).append(synset)
        self._hyponyms: dict[str, list[str]] = {}
        for synset in synsets.values():
            for parent in synset.hypernyms:
                self._hyponyms.setdefault(parent, []).append(synset.id)

    def __len__(self) -> int:
        return len(self.synsets)

    def __iter__(self) -> Iterator[Synset]:
        return iter(self.synsets.values())

    def __getitem__(self, id: str) -> Synset:
        return self.synsets[id]

    def find(self, word: str) -> list[Synset]:
        """The meanings of a word or phrase; none if WordNet does not know it."""
        return list(self._by_word.get(word.lower().replace("_", " "), ()))

    def words(self) -> list[str]:
        """Every word and phrase once (lower case), sorted."""
        return sorted(self._by_word)

    def ancestors(self, id: str) -> list[Synset]:
        """All hypernyms up to the top, the nearest first, each once."""
        return self._walk(id, lambda here: self.synsets[here].hypernyms)

    def descendants(self, id: str) -> list[Synset]:
        """All kinds of this, the nearest first, each once."""
        return self._walk(id, lambda here: tuple(self._hyponyms.get(here, ())))

    def _walk(self, id: str, step: object) -> list[Synset]:
        assert callable(step)
        seen, level, found = {id}, [id], list[Synset]()
        while level:
            level = [up for here in level for up in step(here)]
            level = [here for here in dict.fromkeys(level) if here not in seen and here in self.synsets]
            seen.update(level)
            found += [self.synsets[here] for here in level]
        return found


@cache
def wordnet(pos: str = "nvar") -> WordNet:
    """WordNet with the given parts of speech (n nouns, v verbs, a adjectives, r adverbs). Parsing all takes 1-2 s, once."""
    unknown = set(pos) - set(_FILES)
    if unknown or not pos:
        raise ValueError(f"parts of speech are n, v, a and r, got {pos!r}")
    folder = package_folder("wordnet-base", "usr/share/wordnet")
    return WordNet({synset.id: synset for part in pos for synset in parse(folder / f"data.{_FILES[part]}")})


def parse(path: Path) -> Iterator[Synset]:
    """The synsets of one data file; its format is described in wndb(5WN)."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("  "):  # the licence
                continue
            data, _, gloss = line.partition("|")
            fields = data.split()
            kind = "a" if fields[2] == "s" else fields[2]  # a satellite adjective is stored with the adjectives
            count = int(fields[3], 16)
            words = [re.sub(r"\((?:a|p|ip)\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2]]
            start = 5 + 2 * count
            pointers = [fields[i : i + 4] for i in range(start, start + 4 * int(fields[start - 1]), 4)]
            up = tuple(f"{part}{offset}" for symbol, offset, part, _ in pointers if symbol in ("@", "@i"))
            text, examples = _gloss(gloss.strip())
            yield Synset(f"{kind}{fields[0]}", tuple(words), text, examples, up)


def _gloss(text: str) -> tuple[str, tuple[str, ...]]:
    """Definition and quoted examples."""
    at = text.find('; "')
    if at < 0:
        return text, ()
    return text[:at], tuple(re.findall(r'"([^"]*)"', text[at:]))
