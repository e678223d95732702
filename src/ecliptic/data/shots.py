"""Few labelled pictures: records to features, labels to numbers, folds to validate on. What every adapter starts with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ecliptic.core.contracts import Pairs, Record
from ecliptic.core.encoder import HFEncoder
from ecliptic.core.progress import Progress
from ecliptic.data.images import open_image
from ecliptic.data.records import unit_hash
from ecliptic.ops.augment import random_view


def labels_of(pairs: Pairs, classes: Sequence[str] | None) -> tuple[tuple[str, ...], Tensor]:
    """Class names and the labels (N,) int64 of the records, checked before any picture is opened."""
    found = pairs.column("label") if hasattr(pairs, "column") else [_label(i, r) for i, r in enumerate(pairs)]
    if not found:
        raise ValueError("there are no records to learn from")
    found = [str(label) for label in found]
    names = tuple(sorted(set(found))) if classes is None else tuple(classes)
    place = {name: i for i, name in enumerate(names)}
    if unknown := sorted(set(found) - place.keys()):
        raise ValueError(f"labels that are none of the classes: {', '.join(map(repr, unknown[:5]))}; classes: {names}")
    return names, torch.tensor([place[label] for label in found])


def _label(position: int, record: Record) -> str:
    if record.get("label") is None:
        raise ValueError(f"record {record.get('id', position)!r} has no label; it has {', '.join(map(repr, record))}")
    return str(record["label"])


def encode_views(encoder: Encoder, pairs: Pairs, views: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Records -> features of the plain pictures (N, d), and of their augmented views (V, N, d) unless `views` is 0.

    Views are random resized crops of half to all of the area, half of them mirrored. What a view looks like depends only
    on (seed, record id, number of the view).
    """
    side = getattr(getattr(encoder, "transform", None), "side", None) or 0

    def items() -> Iterator[tuple[Any, str, int]]:
        for i, record in enumerate(pairs):
            for view in range(views + 1):
                yield record["image"], str(record.get("id", i)), view

    def picture(item: tuple[Any, str, int]) -> Image.Image:
        image, key, view = item
        if not isinstance(image, Image.Image):
            image = open_image(image)
        if view == 0:
            return image
        generator = torch.Generator().manual_seed(int(unit_hash(seed, f"{key}/{view}") * 2**53))
        shown = random_view(image, encoder.image_size, generator, CROP)
        if side <= encoder.image_size:
            return shown
        frame = Image.new("RGB", (side, side))  # what the encoder's own centre crop would cut off
        frame.paste(shown, ((side - shown.width) // 2, (side - shown.height) // 2))
        return frame

    total = len(pairs) * (views + 1) if hasattr(pairs, "__len__") else None
    with Progress("encoding pictures", total, unit="pictures") as bar:
        found = encoder.encode_images(items(), decode=picture, progress=bar.advance)
    found = found.reshape(-1, views + 1, found.shape[-1]).transpose(0, 1)
    return found[0].contiguous(), found[1:].contiguous() if views else None


def check_shots(
    features: Tensor, labels: Tensor | None, classes: Sequence[str], text: Tensor | None, *, every_class: bool = True
) -> None:
    """Raise a ValueError that names what is wrong with features (N, d), labels (N,) or text (K, d)."""
    if len(classes) < 2:
        raise ValueError(f"there is nothing to choose between: one class only ({', '.join(classes) or 'none'})")
    if len(set(classes)) < len(classes):
        raise ValueError(f"class names must differ: {tuple(classes)}")
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features must be (N, d) with N > 0, got {tuple(features.shape)}")
    if not (finite := features.isfinite().all(-1)).all():
        raise ValueError(f"features of row {', '.join(map(str, (~finite).nonzero()[:5, 0].tolist()))} are not finite")
    if text is not None:
        if text.shape != (len(classes), features.shape[1]):
            raise ValueError(f"text must be ({len(classes)}, {features.shape[1]}), got {tuple(text.shape)}")
        if float((features.norm(dim=-1) - 1).abs().max()) > 1e-2:
            raise ValueError("features must be unit rows: divide each by its norm")
    if labels is None:
        return
    if labels.shape != (len(features),) or labels.is_floating_point():
        raise ValueError(f"labels must be ({len(features)},) integers, got {tuple(labels.shape)} {labels.dtype}")
    if int(labels.min()) < 0 or int(labels.max()) >= len(classes):
        raise ValueError(f"labels must lie in 0..{len(classes) - 1}, found {int(labels.min())}..{int(labels.max())}")
    missing = sorted(set(range(len(classes))) - set(labels.tolist()))
    if every_class and missing:
        raise ValueError(f"no pictures of {', '.join(repr(classes[k]) for k in missing[:5])}: every class needs one")


def folds_of(labels: Tensor, folds: int, seed: int = 0) -> Tensor:
    """(N,) -> (N,) int64, the fold that holds each sample out, or -1 for never: the only sample of a class.

    The samples of a class are dealt out in random order, so each fold leaves every class at least one sample.
    """
    generator = torch.Generator().manual_seed(seed)
    found = torch.full_like(labels, -1)
    for k in labels.unique():
        rows = (labels == k).nonzero()[:, 0]
        if len(rows) > 1 and folds > 1:
            found[rows[torch.randperm(len(rows), generator=generator)]] = torch.arange(len(rows)) % folds
    return found


def label_map(classes: Sequence[str], subset: Sequence[str]) -> Tensor:
    """(K, S) of 0 and 1: logits over `classes` times this are logits over `subset`."""
    place = {name: i for i, name in enumerate(classes)}
    if unknown := [name for name in subset if name not in place]:
        raise ValueError(f"not among the classes learnt: {', '.join(map(repr, unknown))}")
    chosen = torch.zeros(len(classes), len(subset))
    chosen[[place[name] for name in subset], range(len(subset))] = 1
    return chosen
