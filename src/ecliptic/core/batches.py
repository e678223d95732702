"""From records to batches: an order that depends only on the seed, collating, and decoding beside the model.

Batch `i` is a function of (seed, i) and of nothing else, so a resumed run goes on at the exact record without any saved state,
and it does not matter how many threads prepare the batches, or how many processes share one.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ecliptic.core.contracts import Objective, Pairs, Record

if TYPE_CHECKING:
    from ecliptic.core.encoder import Encoder

B = TypeVar("B")
Batch = Mapping[str, Any]
_TOKENIZING = threading.Lock()  # tokenizers are shared between encoders and keep state of their own
Augment = Callable[[Record, np.random.Generator], Record]
Part = Callable[[int], slice]


def _all(count: int) -> slice:
    return slice(count)


class Order:
    """`Order(n, size, seed)(i)` -> int64 indices of batch `i`: a new permutation per epoch, an incomplete last batch dropped."""

    def __init__(self, n: int, size: int, seed: int):
        if not 1 <= size <= n:
            raise ValueError(f"batch_size={size} does not fit {n} records: choose 1 <= batch_size <= {n}")
        self.n, self.size, self.seed = n, size, seed
        self.per_epoch = n // size
        self._last: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def epoch(self, i: int) -> int:
        return i // self.per_epoch

    def __call__(self, i: int) -> np.ndarray:
        epoch, position = divmod(i, self.per_epoch)
        known, permutation = self._last  # one tuple, so that threads never see halves of two epochs
        if known != epoch:
            permutation = np.random.default_rng([self.seed, epoch]).permutation(self.n)
            self._last = (epoch, permutation)
        return permutation[position * self.size : (position + 1) * self.size]


class Indexed:
    """Batches of anything with a length and an index. `pairs.batch(indices)`, where offered, replaces the walk over records:
    it gives columns (name -> sequence of len(indices)), whose pictures may be one uint8 array (B, H, W, 3).

    A record that cannot be read (OSError, ValueError) is replaced by another, drawn from (seed, epoch,
    index), and noted in `unreadable` (index -> reason). Ten unreadable ones in a row raise.

    part: size -> which rows of each batch to prepare, asked when a batch is made (of several processes each prepares its own).
    """

    def __init__(
        self,
        pairs: Sequence[Record],
        size: int,
        seed: int,
        collate: Callable[[list[Record]], Batch],
        augment: Augment | None,
        part: Part = _all,
    ):
        self.pairs, self.seed, self.collate, self.augment, self.part = pairs, seed, collate, augment, part
        self.order = Order(len(pairs), size, seed)
        self.threads_allowed = True
        self.unreadable: dict[int, str] = {}

    def __call__(self, i: int) -> Batch:
        indices = self.order(i)[self.part(self.order.size)]
        many = getattr(self.pairs, "batch", None)
        epoch = self.order.epoch(i)
        if many is not None:
            records = _rows(many(indices))
        else:
            records = [self._readable(epoch, int(index)) for index in indices]
        if self.augment is not None:
            records = [
                _augmented(self.augment, record, self.seed, epoch, int(index))
                for record, index in zip(records, indices)
            ]
        return self.collate(records)

    def _readable(self, epoch: int, index: int) -> Record:
        others = np.random.default_rng([self.seed, epoch, index])
        for _ in range(10):
            try:
                record = self.pairs[index]
                return {**record, "image": _picture(record["image"])} if _is_path(record.get("image")) else record
            except (OSError, ValueError) as error:  # pictures that cannot be decoded are ValueErrors
                self.unreadable[index] = str(error)
                failure = error
            index = int(others.integers(len(self.pairs)))
        raise OSError(f"ten records in a row cannot be read, the last one {index}: {failure}") from failure


class Streamed:
    """Batches of an iterable that can only be walked over: shuffled within a window, restarted at its end.

    Asked for a later batch than the next one (a resumed run), it walks there; an earlier one is an error.
    """

    def __init__(
        self,
        pairs: Iterable[Record],
        size: int,
        seed: int,
        collate: Callable[[list[Record]], Batch],
        augment: Augment | None,
        window: int = 1024,
        part: Part = _all,
    ):
        self.pairs, self.size, self.seed, self.window = pairs, size, seed, max(window, size)
        self.collate, self.augment, self.part = collate, augment, part
        self.threads_allowed = False
        self._lock = threading.Lock()
        self._next = 0
        self._groups = self._walk()

    def __call__(self, i: int) -> Batch:
        with self._lock:
            if i < self._next:
                raise ValueError(f"a stream cannot go back from batch {self._next} to batch {i}")
            while self._next < i:
                next(self._groups)
                self._next += 1
            self._next += 1
            records = next(self._groups)
        mine = range(self.size)[self.part(self.size)]
        if self.augment is not None:
            return self.collate([_augmented(self.augment, records[place], self.seed, i, place) for place in mine])
        return self.collate([records[place] for place in mine])

    def _walk(self) -> Iterator[list[Record]]:
        epoch = 0
        while True:
            group: list[Record] = []
            complete = 0
            for record in _shuffled(self.pairs, self.window, np.random.default_rng([self.seed, epoch])):
                group.append(record)
                if len(group) == self.size:
                    complete += 1
                    yield group
                    group = []
            if not complete:
                raise ValueError(f"batch_size={self.size}, but the stream has only {len(group)} records")
            epoch += 1


def _shuffled(items: Iterable[Record], window: int, rng: np.random.Generator) -> Iterator[Record]:
    held: list[Record] = []
    for item in items:
        if len(held) < window:
            held.append(item)
            continue
        place = int(rng.integers(window))
        held[place], item = item, held[place]
        yield item
    for place in rng.permutation(len(held)):
        yield held[place]


def _rows(columns: Mapping[str, Sequence[Any]] | list[Record]) -> list[Record]:
    if not isinstance(columns, Mapping):
        return columns
    names = list(columns)
    return [dict(zip(names, values)) for values in zip(*columns.values(), strict=True)]


def collate(encoder: Encoder, records: Sequence[Record], objective: Objective) -> dict[str, Any]:
    """Records -> the batch that `Objective.encode` reads.

    image: (B, 3, S, S) float32, from `pixels` where the records hold them, else from `image`: a picture, a path, or a uint8 array
        (H, W, 3), which goes straight to normalising when it has the encoder's size already.
    text: Tokens of `caption`. group: (B,) int64, equal where the captions are.
    Each name in the objective's `fields` is added as it stands in the records: numbers and arrays stacked, the rest as a list.
    """
    batch: dict[str, Any] = {}
    if "image" in objective.needs:
        batch["image"] = _pixels(encoder, records)
    captions = [record.get("caption") for record in records]
    if "text" in objective.needs:
        with _TOKENIZING:
            batch["text"] = encoder.tokenize([_caption(record) for record in records])
    if all(isinstance(caption, str) for caption in captions):
        batch["group"] = torch.tensor([_number(str(caption)) for caption in captions])
    for name in getattr(objective, "fields", ()):
        batch[name] = _stacked(name, records)
    return batch


def _pixels(encoder: Encoder, records: Sequence[Record]) -> Tensor:
    if all("pixels" in record for record in records):
        return torch.stack([torch.as_tensor(record["pixels"], dtype=torch.float32) for record in records])
    images = [_need(record, "image") for record in records]
    if all(isinstance(image, np.ndarray | Tensor) for image in images):
        stack = np.stack([np.asarray(image) for image in images])
        if stack.dtype != np.uint8 or stack.ndim != 4 or stack.shape[-1] != 3:
            raise ValueError(f"arrays of pictures must be uint8 (H, W, 3), not {stack.dtype} {stack.shape[1:]}")
        transform = getattr(encoder, "transform", None)
        if transform is not None and stack.shape[1:3] == (transform.crop or transform.size):
            return torch.from_numpy(transform.normalise(stack))
        images = [Image.fromarray(array) for array in stack]
    return encoder.preprocess([_picture(image) for image in images])


def _is_path(image: Any) -> bool:
    return isinstance(image, str | Path)


def _picture(image: Any) -> Any:
    if _is_path(image):
        from ecliptic.core.encoder import open_picture

        return open_picture(image)
    return image


def _augmented(augment: Augment, record: Record, *seeds: int) -> Record:
    if "image" in record:
        record = {**record, "image": _picture(record["image"])}
    return augment(record, np.random.default_rng(seeds))


def _stacked(name: str, records: Sequence[Record]) -> Any:
    values = [_need(record, name) for record in records]
    if isinstance(values[0], Tensor | np.ndarray):
        return torch.stack([torch.as_tensor(value) for value in values])
    if isinstance(values[0], bool | int | float | np.number):
        return torch.as_tensor(values)
    return values


def _need(record: Record, name: str) -> Any:
    value = record.get(name)
    if value is None:
        raise ValueError(f"record {record.get('id', '(no id)')!r} has no {name!r}")
    return value


def _caption(record: Record) -> str:
    caption = _need(record, "caption")
    if not isinstance(caption, str):
        raise TypeError(f"record {record.get('id', '(no id)')!r}: caption must be a string, not {caption!r}")
    return caption


def _number(text: str) -> int:
    """A stable number below 2**63: equal for equal texts in every process, and for no others in practice."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def check(pairs: Pairs | None, objective: Objective, custom: bool) -> None:
    """Before any work starts: are there records, and do they hold what the objective needs? Looks at cheap columns only."""
    name = type(objective).__name__
    if pairs is None:
        raise ValueError(f"Train({name}) needs pairs: apply(encoder, pairs)")
    if isinstance(pairs, Iterator):
        raise TypeError(
            "pairs must be re-iterable (a list, Records, a re-openable stream), not an iterator or generator"
        )
    if isinstance(pairs, Sized) and not len(pairs):
        raise ValueError("pairs is empty: there is nothing to train on")
    if custom:
        return
    wanted: list[tuple[str, ...]] = []
    if "image" in objective.needs:
        wanted.append(("image", "pixels"))
    if "text" in objective.needs:
        wanted.append(("caption",))
    wanted += [(field,) for field in getattr(objective, "fields", ())]
    records = pairs if isinstance(pairs, list | tuple) else _first(pairs)
    for place, record in enumerate(records):
        for names in wanted:
            if all(record.get(field) is None for field in names):
                alternatives = " or ".join(repr(field) for field in names)
                raise ValueError(
                    f"record {place} ({record.get('id', 'no id')!r}) has no {alternatives}, which Train({name}) needs; "
                    f"it has {sorted(key for key, value in record.items() if value is not None)}"
                )
        if "text" in objective.needs and not isinstance(record["caption"], str):
            raise ValueError(f"record {place}: 'caption' must be a string, not {record['caption']!r}")
    if "text" in objective.needs:
        for place, caption in cheap_column(pairs, "caption"):
            if not isinstance(caption, str):
                raise ValueError(f"record {place} has no 'caption', which Train({name}) needs (it is {caption!r})")


def cheap_column(pairs: Pairs, key: str, most: int = 1000) -> Iterator[tuple[int, Any]]:
    """(position, `record[key]`) of up to `most` records spread evenly over the source; nothing where that would decode."""
    if not isinstance(pairs, Sized):
        return
    step = -(-len(pairs) // most)
    if isinstance(pairs, list | tuple):
        yield from ((place, pairs[place].get(key)) for place in range(0, len(pairs), step))
    elif hasattr(pairs, "column"):
        yield from zip(range(0, len(pairs), step), cast(Any, pairs)[::step].column(key))


def _first(pairs: Pairs) -> list[Record]:
    try:
        return [next(iter(pairs))]
    except StopIteration:
        raise ValueError("pairs is empty: there is nothing to train on") from None
    except (OSError, ValueError):  # an unreadable first picture says nothing about the others
        return []


def prefetch(batches: Callable[[int], B], indices: range, workers: int, depth: int = 2) -> Iterator[B]:
    """The batches in order, prepared by `workers` threads at most `workers + depth` ahead; 0 workers prepare none ahead."""
    if workers < 1:
        yield from map(batches, indices)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="batches")
    waiting: deque[Future[B]] = deque()
    ahead = iter(indices)
    try:
        for i in ahead:
            waiting.append(pool.submit(batches, i))
            if len(waiting) >= workers + depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
