"""What stands before the towers, whatever runs them: pictures opened ahead in threads, captions within the model's limit.

PyTorch (`core.encoder`) and ONNX Runtime (`core.exported`) both embed through here, so that they cannot drift apart. Needs numpy
and Pillow alone: a search with an exported model imports this, and must not import torch.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from ecliptic.core.preprocess import ImagePreprocess

Overflow = Literal["error", "truncate", "windows"]
Ids = list[list[int]]  # token ids of captions, special tokens included
Decode = Callable[[Any], Image.Image] | Literal["fast"]


class TextTooLong(ValueError):
    """A caption has more tokens than the text tower reads."""


class TruncationWarning(UserWarning):
    """Captions were cut to the text tower's limit (their end-of-text token was kept)."""


# Pictures


def open_picture(item: Any, fast_side: int = 0) -> Image.Image:
    """A picture as it is, anything else opened as a file: upright, in RGB, on white where it is transparent.

    fast_side: if above 0, large JPEGs are decoded at a fraction of their size (see `shrink_on_load`). `open_image` of
    `ecliptic.data.images` does the same for files of any quality; pass it as `decode`.
    """
    if isinstance(item, Image.Image):
        return item
    with Image.open(item) as image:
        if fast_side:
            shrink_on_load(image, fast_side)
        upright = ImageOps.exif_transpose(image)
        if not upright.has_transparency_data:
            return upright.convert("RGB")
        upright = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")


def shrink_on_load(image: Image.Image, min_side: int) -> None:
    """Let a JPEG that was opened but not yet read decode at 1/2, 1/4 or 1/8, both sides staying >= `min_side`.

    The decoder then leaves the high frequencies of each 8 x 8 block out, which is most of its work. Other formats are
    left alone.
    """
    short = min(image.size)
    if image.format in ("JPEG", "MPO") and short > min_side:
        width, height = (-(-side * min_side // short) for side in image.size)
        image.draft(None, (width, height))  # Pillow rounds the scale down for us


def encode_pictures(
    images: Iterable[Any],
    batch_size: int,
    *,
    transform: ImagePreprocess,
    dim: int,
    run: Callable[[np.ndarray], np.ndarray],
    workers: int,
    decode: Decode | None,
    errors: dict[int, Exception] | None,
    progress: Callable[[int], None] | None,
) -> np.ndarray:
    """Pictures, or paths to them, -> (N, dim) float32; `run` takes pixels (B, 3, H, W) to rows (B, dim).

    The rest is described at `HFEncoder.encode_images`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(decode, str) and decode != "fast":
        raise ValueError(f'decode must be "fast", a function, or None for exact decoding, not {decode!r}')
    read = partial(open_picture, fast_side=transform.fast_side) if isinstance(decode, str) else decode or open_picture
    failed: dict[int, Exception] = {}
    blocks: list[np.ndarray] = []
    for start, batch in _batches(
        _ahead(lambda item: transform.resized(read(item)), images, workers, 4 * batch_size), batch_size
    ):
        kept = []
        for offset, array in enumerate(batch):
            if not isinstance(array, Exception):
                kept.append(offset)
            elif errors is None:
                raise array
            else:
                failed[start + offset] = array
        block = np.zeros((len(batch), dim), np.float32)
        if kept:
            block[kept] = run(transform.normalise(np.stack([batch[offset] for offset in kept])))
        blocks.append(block)
        if progress is not None:
            progress(len(batch))
    if errors is not None:
        errors.update(failed)
    return np.concatenate(blocks) if blocks else np.empty((0, dim), np.float32)


def _ahead(work: Callable[[Any], Any], items: Iterable[Any], workers: int, bound: int) -> Iterator[Any]:
    """work(item) for each item in order, computed in threads at most `bound` items ahead; failures come as the exception."""
    if workers < 1:
        for item in items:
            yield _attempt(work, item)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Any]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(_attempt, work, item))
                if len(waiting) >= bound:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _attempt(work: Callable[[Any], Any], item: Any) -> Any:
    try:
        return work(item)
    except Exception as error:
        return error


def _batches(items: Iterable[Any], size: int) -> Iterator[tuple[int, list[Any]]]:
    """(position of the first item, items) for consecutive runs of `size`."""
    start, batch = 0, []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield start, batch
            start, batch = start + size, []
    if batch:
        yield start, batch


# Captions


def within_limit(ids: Ids, limit: int, special: Collection[int], overflow: str, name: str) -> Ids:
    """`ids` with captions of more than `limit` tokens dealt with as `overflow` says: "error", or "truncate" with a warning.

    special: ids of the special tokens; those at the end survive the cut. name: the model's, for messages.
    """
    long = [i for i, row in enumerate(ids) if len(row) > limit]
    if not long:
        return ids
    if overflow == "error":
        raise TextTooLong(
            f"caption {long[0]} has {len(ids[long[0]])} tokens, {name} reads {limit}: "
            'shorten it, or choose overflow="truncate" or "windows"'
        )
    if overflow != "truncate":
        raise ValueError(f'overflow must be "error" or "truncate" here, not {overflow!r}')
    warnings.warn(f"{len(long)} of {len(ids)} captions cut to {limit} tokens", TruncationWarning, stacklevel=4)
    ids = list(ids)
    for i in long:
        ids[i] = _cut(ids[i], limit, special)
    return ids


def _cut(ids: list[int], limit: int, special: Collection[int]) -> list[int]:
    """Keep the special tokens at the end: pooling reads them, and losing them costs accuracy silently."""
    tail = next((n for n in range(len(ids)) if ids[len(ids) - 1 - n] not in special), 0)
    return ids[: limit - tail] + (ids[len(ids) - tail :] if tail else [])


def windows(ids: Ids, limit: int, special: Collection[int]) -> tuple[Ids, list[int]]:
    """Token ids of consecutive windows of `limit` tokens, and which caption each belongs to. Special tokens surround each."""
    parts: Ids = []
    owner: list[int] = []
    for i, row in enumerate(ids):
        head = next((n for n, token in enumerate(row) if token not in special), len(row))
        tail = next((n for n, token in enumerate(reversed(row)) if token not in special), 0) if head < len(row) else 0
        body, room = row[head : len(row) - tail], limit - head - tail
        for start in range(0, max(len(body), 1), room):
            parts.append(row[:head] + body[start : start + room] + (row[len(row) - tail :] if tail else []))
            owner.append(i)
    return parts, owner


def average_windows(rows: np.ndarray, owner: Sequence[int], n: int) -> np.ndarray:
    """(windows, D) unit rows -> (n, D): the mean of each caption's windows, made unit again."""
    total = np.zeros((n, rows.shape[1]), np.float32)
    np.add.at(total, np.asarray(owner, np.int64), rows)
    return total / np.maximum(np.linalg.norm(total, axis=-1, keepdims=True), 1e-12)


def encode_ids(ids: Ids, batch_size: int, dim: int, run: Callable[[Sequence[Sequence[int]]], np.ndarray]) -> np.ndarray:
    """Token ids -> (N, dim) float32; `run` takes a batch of ids to its rows.

    Equal captions are encoded once, the rest in order of length: batches then hold hardly any padding.
    """
    unique = sorted({tuple(row) for row in ids}, key=lambda row: (len(row), row))
    place = {row: i for i, row in enumerate(unique)}
    found = np.empty((len(unique), dim), np.float32)
    for start, rows in _by_length(unique, batch_size):
        found[start : start + len(rows)] = run(rows)
    return found[[place[tuple(row)] for row in ids]] if ids else found


def _by_length(rows: Sequence[tuple[int, ...]], size: int) -> Iterator[tuple[int, Sequence[tuple[int, ...]]]]:
    """Cut rows sorted by length into batches: at most `size` rows, and from 16 rows on no more than a token of padding each."""
    start = 0
    for end in range(1, len(rows) + 1):
        full = end - start >= size
        longer = end < len(rows) and end - start >= 16 and len(rows[end]) > len(rows[start]) + 1
        if full or longer or end == len(rows):
            yield start, rows[start:end]
            start = end


def pad(rows: Sequence[Sequence[int]], value: int, fill: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids -> ids (B, L) int64 and mask (B, L) bool, True at real tokens; L is the longest row, or `fill` if longer."""
    longest = max([fill, *(len(row) for row in rows)])
    ids = np.full((len(rows), longest), value, np.int64)
    mask = np.zeros((len(rows), longest), np.bool_)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    return ids, mask
