"""Choosing records by what they say, before any picture is opened: what every step that reads captions needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ecliptic.data.records import Records
from ecliptic.data.shards import Stream

if TYPE_CHECKING:
    from ecliptic.core.contracts import Pairs, Record

Keep = Callable[["Record"], bool]
Change = Callable[["Record"], "Record"]


def undecoded(pairs: Pairs) -> Iterator[Record]:
    """Every record once, with pictures as they are stored where the source allows that (`Records`, `Stream`).

    Of a `Stream` these are the records of all shards, whichever of them this process reads.
    """
    return pairs.undecoded() if isinstance(pairs, Records | Stream) else iter(pairs)


def select(pairs: Pairs, keep: Keep, change: Change | None = None) -> Pairs:
    """The records for which `keep` is true, in order, and as `change` returns them; both see undecoded records.

    `Records` and lists are chosen from now and stay what they are, with a length and an index. Everything else is chosen
    from whenever it is walked over, again at each walk. Neither function may change the record it is given.
    """
    if isinstance(pairs, Iterator):
        raise TypeError("pairs must be re-iterable (a list, Records, a Stream), not an iterator or generator")
    if isinstance(pairs, Records):
        chosen = pairs[[i for i, record in enumerate(pairs.undecoded()) if keep(record)]]
        return chosen if change is None else chosen.map(change, images=False)
    if isinstance(pairs, list | tuple):
        return [record if change is None else change(record) for record in pairs if keep(record)]
    return pairs.select(keep, change) if isinstance(pairs, Stream) else _Selected(pairs, keep, change)


class _Selected:
    """A selection that is made anew whenever it is walked over."""

    def __init__(self, pairs: Pairs, keep: Keep, change: Change | None):
        self.pairs, self.keep, self.change = pairs, keep, change

    def __iter__(self) -> Iterator[Record]:
        for record in self.pairs:
            if self.keep(record):
                yield record if self.change is None else self.change(record)
