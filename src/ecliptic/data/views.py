"""Weak and strong views of unlabelled pictures: what a teacher sees, and what its student has to recognise as the same.

The weak view of a picture is how the encoder's own preprocessing cuts it; strong ones are `ops.augment.strong_view`. Views
depend on (seed, epoch or number of the view, place of the record) and on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ecliptic.core.batches import Indexed, Order
from ecliptic.core.contracts import Pairs, Record
from ecliptic.core.encoder import HFEncoder
from ecliptic.core.progress import Progress
from ecliptic.data.images import open_image
from ecliptic.ops.augment import strong_view

T = TypeVar("T")
Crop = tuple[float, float]
CROP = (0.2, 1.0)  # share of the area that a strong view keeps; NoLA, arXiv 2411.19346, released code
ENCODED = 32  # pictures encoded at a time; ours


def weak_views(encoder: HFEncoder, records: Pairs) -> Iterator[tuple[list[Image.Image], Tensor]]:
    """Some records at a time, in order: their pictures as the encoder cuts them, RGB, and the same normalised (B, 3, H, W)."""
    for group in _groups(records):
        arrays = [encoder.transform.resized(_picture(record)) for record in group]
        yield [Image.fromarray(array) for array in arrays], _normalised(encoder, arrays)


class StrongBatches(Indexed):
    """Batch number -> `pixels` (B, 3, H, W), a strong view of each of some pictures, and `label` (B,), for `core.train.fit`.

    labels (N,): what each record of `records` is taught, in the place of any label of its own. crop: share of the area that a
    view keeps. Every epoch has other views.
    """

    def __init__(
        self, encoder: HFEncoder, records: Sequence[Record], labels: Tensor, size: int, seed: int = 0, crop: Crop = CROP
    ):
        def augment(record: Record, rng: np.random.Generator) -> Record:
            return {**record, "image": _strong(encoder, record, int(rng.integers(2**62)), crop)}

        def make(group: list[Record]) -> dict[str, Tensor]:
            pixels = _normalised(encoder, [record["image"] for record in group])
            return {"pixels": pixels, "label": torch.stack([record["label"] for record in group])}

        super().__init__(_Taught(records, labels), size, seed, make, augment)


@torch.no_grad()
def encoded_strong_batches(
    encoder: HFEncoder,
    records: Sequence[Record],
    labels: Tensor,
    size: int,
    views: int,
    seed: int = 0,
    crop: Crop = CROP,
) -> Callable[[int], Mapping[str, Tensor]]:
    """The same for a tower that stays as it is: `z` (B, D), not normalised, of `views` strong views of each picture.

    Each view is encoded once, now; epochs take the views in turn.
    """
    z: list[Tensor] = []
    with Progress("encoding strong views", views * len(records), unit="pictures") as bar:
        for view in range(views):
            for group in _groups(enumerate(records)):
                seeds = [int(np.random.default_rng([seed, view, i]).integers(2**62)) for i, _ in group]
                arrays = [_strong(encoder, record, own, crop) for (_, record), own in zip(group, seeds, strict=True)]
                z.append(encoder.images(_normalised(encoder, arrays), normalize=False).pooled.float())
                bar.advance(len(group))
    seen, order = torch.cat(z).reshape(views, len(records), -1), Order(len(records), size, seed)

    def batch(i: int) -> dict[str, Tensor]:
        rows = torch.from_numpy(order(i))
        return {"z": seen[order.epoch(i) % views, rows], "label": labels[rows]}

    return batch


class _Taught(Sequence[Record]):
    """Records of a picture and the teacher's label for it, which so cannot come apart."""

    def __init__(self, records: Sequence[Record], labels: Tensor):
        if len(records) != len(labels):
            raise ValueError(f"{len(labels)} labels for {len(records)} records")
        self.records, self.labels = records, labels

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: Any) -> Any:
        return {"image": _picture(self.records[i]), "label": self.labels[i]}


def _picture(record: Record) -> Image.Image:
    if (image := record.get("image")) is None:
        raise ValueError(f"record {record.get('id', '(no id)')!r} has no 'image'")
    return image if isinstance(image, Image.Image) else open_image(image)


def _strong(encoder: HFEncoder, record: Record, seed: int, crop: Crop) -> np.ndarray:
    return np.asarray(strong_view(_picture(record), encoder.image_size, torch.Generator().manual_seed(seed), crop))


def _normalised(encoder: HFEncoder, arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(encoder.transform.normalise(np.stack(arrays))).to(encoder.device)


def _groups(items: Iterable[T], size: int = ENCODED) -> Iterator[list[T]]:
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group
