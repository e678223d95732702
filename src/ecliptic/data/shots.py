"""Few labelled pictures: which ones, in which views, as which features and numbers. What every adapter starts with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ecliptic.core.contracts import Pairs, Record
from ecliptic.core.encoder import Encoder
from ecliptic.core.progress import Progress
from ecliptic.data.feature_store import open_store, picture_key
from ecliptic.data.images import open_image
from ecliptic.data.records import unit_hash
from ecliptic.ops.augment import random_view


class Shots(NamedTuple):
    """Labelled pictures as features.

    classes: names. features (N, d) unit rows. labels (N,) int64, positions in `classes`. views (V, N, d): augmented
    views of the same pictures, or None. validation: features and labels of other pictures, or None.
    """

    classes: tuple[str, ...]
    features: Tensor
    labels: Tensor
    views: Tensor | None = None
    validation: tuple[Tensor, Tensor] | None = None


def encode_shots(
    encoder: Encoder,
    pairs: Pairs,
    validation: Pairs | None = None,
    *,
    classes: Sequence[str] | None = None,
    views: int = 0,
    seed: int = 0,
    crop: tuple[float, float] = (0.5, 1.0),
) -> Shots:
    """Labelled records, and optionally more of them to validate on, as features. Labels are checked first."""
    if classes is not None:
        check_classes(classes)
    names, labels = labels_of(pairs, classes)
    check_labels(labels, len(labels), names)
    truth = None if validation is None else labels_of(validation, names)[1]
    features, seen = encode_views(encoder, pairs, views, seed, crop)
    held = None
    if validation is not None and truth is not None:
        held = (encode_views(encoder, validation)[0], truth)
    return Shots(names, features, labels, seen, held)


def labels_of(pairs: Pairs, classes: Sequence[str] | None = None) -> tuple[tuple[str, ...], Tensor]:
    """Class names (by default the labels found, sorted) and the labels (N,) int64 of the records; opens no picture.

    Raises ValueError for no records, a record without a label (KeyError from `Records`), a label outside `classes`.
    """
    found = pairs.column("label") if hasattr(pairs, "column") else [_label(i, r) for i, r in enumerate(pairs)]
    if not found:
        raise ValueError("there are no records to learn from")
    found = [str(label) for label in found]
    names = tuple(sorted(set(found))) if classes is None else tuple(classes)
    place = {name: i for i, name in enumerate(names)}
    if unknown := sorted(set(found) - place.keys()):
        raise ValueError(f"labels that are none of the classes: {', '.join(map(repr, unknown[:5]))}; classes: {names}")
    return names, torch.tensor([place[label] for label in found])


def partial_labels(
    pairs: Pairs, classes: Sequence[str] | None = None, *, ignore: bool = False
) -> tuple[tuple[str, ...], Tensor]:
    """As `labels_of` where some records have no `label`, or None: class names and labels (N,) int64, -1 for those.

    ignore: take every record for one of those, whatever label it has.
    """
    walk = pairs.undecoded() if hasattr(pairs, "undecoded") else pairs
    found = [None if ignore or record.get("label") is None else str(record["label"]) for record in walk]
    if not found:
        raise ValueError("there are no records to learn from")
    names = tuple(sorted({label for label in found if label is not None})) if classes is None else tuple(classes)
    check_classes(names)
    place: dict[str | None, int] = {None: -1, **{name: i for i, name in enumerate(names)}}
    if unknown := sorted({label for label in found if label is not None and label not in place}):
        raise ValueError(f"labels that are none of the classes: {', '.join(map(repr, unknown[:5]))}; classes: {names}")
    return names, torch.tensor([place[label] for label in found])


def _label(position: int, record: Record) -> Any:
    if record.get("label") is None:
        raise ValueError(f"record {record.get('id', position)!r} has no label; it has {', '.join(map(repr, record))}")
    return record["label"]


def encode_views(
    encoder: Encoder, pairs: Pairs, views: int = 0, seed: int = 0, crop: tuple[float, float] = (0.5, 1.0)
) -> tuple[Tensor, Tensor | None]:
    """Records -> features of the plain pictures (N, d), and of their augmented views (V, N, d) unless `views` is 0.

    A view is a random resized crop of a share of the area within `crop`, mirrored half of the time. It depends only on
    (seed, record id, number of the view), so neither order nor company changes it. Under an open
    `data.feature_store.keeping`, only what is not kept yet is computed.
    """
    if views < 0:
        raise ValueError(f"views must be 0 or more, got {views}")
    store = open_store()
    if store is None:
        rows = _encode(encoder, pairs, range(views + 1), seed, crop)
    else:
        cheap = list(pairs.undecoded()) if hasattr(pairs, "undecoded") else list(pairs)
        plain = [picture_key(record) for record in cheap]
        found = [store.rows(encoder, plain, _encoder_of(encoder, pairs, 0, seed, crop))]
        for view in range(1, views + 1):
            keys = [
                f"{plain[i]} view {seed} {record.get('id', i)} {view} {tuple(crop)}" for i, record in enumerate(cheap)
            ]
            found.append(store.rows(encoder, keys, _encoder_of(encoder, pairs, view, seed, crop)))
        rows = torch.stack(found)
    return rows[0].contiguous(), rows[1:].contiguous() if views else None


def _encoder_of(
    encoder: Encoder, pairs: Pairs, view: int, seed: int, crop: tuple[float, float]
) -> Callable[[list[int]], Tensor]:
    """What computes one view of the records at some positions."""

    def encode(positions: list[int]) -> Tensor:
        wanted = set(positions)
        if hasattr(pairs, "undecoded"):  # Records: only these are opened
            chosen: Any = pairs[positions]  # type: ignore[index]
        else:
            chosen = [{"id": i, **record} for i, record in enumerate(pairs) if i in wanted]
        return _encode(encoder, chosen, [view], seed, crop)[0]

    return encode


def _encode(encoder: Encoder, pairs: Pairs, views: Sequence[int], seed: int, crop: tuple[float, float]) -> Tensor:
    """Records -> (V, N, d), the views with these numbers, 0 being the plain picture."""
    tower: Any = encoder
    size, side = _sizes(encoder)

    def items() -> Iterator[tuple[Any, str, int]]:
        for i, record in enumerate(pairs):
            image, key = record["image"], str(record.get("id", i))
            yield from ((image, key, view) for view in views)

    def picture(item: tuple[Any, str, int]) -> Image.Image:
        image, key, view = item
        if not isinstance(image, Image.Image):
            image = open_image(image)
        if view == 0:
            return image
        generator = torch.Generator().manual_seed(int(unit_hash(seed, f"{key}/{view}") * 2**53))
        return _framed(random_view(image, size, generator, crop), side)

    count = getattr(pairs, "__len__", None)
    with Progress("encoding pictures", count() * len(views) if count else None, unit="pictures") as bar:
        rows: Tensor = tower.encode_images(items(), decode=picture, progress=bar.advance)
    return rows.reshape(-1, len(views), rows.shape[-1]).transpose(0, 1)


@dataclass(frozen=True)
class RandomView:
    """For `augment=` of the trainer: each time a random resized crop of a picture, half of the time mirrored.

    size: of the view in pixels. side: to which the encoder resizes before it cuts `size` out of the middle. crop: share of the
    area that is kept. `for_encoder` fills in the first two.
    """

    size: int
    side: int
    crop: tuple[float, float] = (0.08, 1.0)  # what training on ImageNet made usual; CoOp and its successors keep it

    @classmethod
    def for_encoder(cls, encoder: Encoder, crop: tuple[float, float] = (0.08, 1.0)) -> Self:
        return cls(*_sizes(encoder), crop)

    def __call__(self, record: Record, generator: np.random.Generator) -> Record:
        own = torch.Generator().manual_seed(int(generator.integers(2**62)))
        return {**record, "image": _framed(random_view(record["image"], self.size, own, self.crop), self.side)}


def _sizes(encoder: Encoder) -> tuple[int, int]:
    tower: Any = encoder
    return tower.image_size, tower.transform.side


def _framed(view: Image.Image, side: int) -> Image.Image:
    """The view in a margin that the encoder's own centre crop cuts off again."""
    if side <= view.width:
        return view
    frame = Image.new("RGB", (side, side))
    frame.paste(view, ((side - view.width) // 2, (side - view.height) // 2))
    return frame


def take_shots(pairs: Pairs, shots: int, seed: int = 0) -> list[Record]:
    """`shots` records of each label, drawn at random by (seed, record id) alone, in the order they stand in.

    ValueError, naming the class, if there are fewer of one.
    """
    chosen = set(rows := shot_rows(pairs, shots, seed))
    if hasattr(pairs, "column"):
        return list(pairs[rows])  # type: ignore[index]  # Records: only these are opened
    return [record for i, record in enumerate(pairs) if i in chosen]


def shot_rows(pairs: Pairs, shots: int, seed: int = 0) -> list[int]:
    """The positions of those that `take_shots` takes, in order; opens no picture. Fewer shots are a part of more."""
    if shots < 1:
        raise ValueError(f"shots={shots}: at least one picture of each class is needed")
    names, labels = labels_of(pairs)
    ids = pairs.column("id") if hasattr(pairs, "column") else [r.get("id", i) for i, r in enumerate(pairs)]
    chosen: list[int] = []
    for k, name in enumerate(names):
        rows = (labels == k).nonzero()[:, 0].tolist()
        if len(rows) < shots:
            raise ValueError(f"{name!r} has only {len(rows)} pictures, {shots} are asked for")
        chosen += sorted(rows, key=lambda i: unit_hash(seed, str(ids[i])))[:shots]
    return sorted(chosen)


def split_classes(classes: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The base-to-new protocol (CoCoOp, arXiv 2203.05557): learn from the first half of the classes, be judged on both.

    With an odd number the base has one more, as in its released code.
    """
    check_classes(classes)
    half = math.ceil(len(classes) / 2)
    return tuple(classes[:half]), tuple(classes[half:])


def check_labels(labels: Tensor, n: int, classes: Sequence[str], *, every_class: bool = True) -> None:
    """Raise a ValueError that names what is wrong with the labels (N,) of N samples of these classes.

    every_class: each class needs at least one sample.
    """
    check_classes(classes)
    if labels.shape != (n,) or labels.is_floating_point():
        raise ValueError(f"labels must be ({n},) integers, got {tuple(labels.shape)} {labels.dtype}")
    if int(labels.min()) < 0 or int(labels.max()) >= len(classes):
        raise ValueError(f"labels must lie in 0..{len(classes) - 1}, found {int(labels.min())}..{int(labels.max())}")
    missing = sorted(set(range(len(classes))) - set(labels.tolist()))
    if every_class and missing:
        raise ValueError(f"no pictures of {', '.join(repr(classes[k]) for k in missing[:5])}: every class needs one")


def check_classes(classes: Sequence[str]) -> None:
    """Raise a ValueError unless there are two or more class names, all different."""
    if isinstance(classes, str):
        raise ValueError(f"classes must be a list of names, not the one string {classes!r}")
    if len(classes) < 2:
        raise ValueError(f"there is nothing to choose between: one class only ({', '.join(classes) or 'none'})")
    if len(set(classes)) < len(classes):
        raise ValueError(f"class names must differ: {tuple(classes)}")


def check_features(features: Tensor, text: Tensor | None = None, n_classes: int | None = None) -> None:
    """Raise a ValueError that names what is wrong with features (N, d), or with text vectors (K, d) beside them.

    With `text` the features must be unit rows, since cosines are what is added up.
    """
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features must be (N, d) with N > 0, got {tuple(features.shape)}")
    if not (finite := features.isfinite().all(-1)).all():
        raise ValueError(f"features of row {', '.join(map(str, (~finite).nonzero()[:5, 0].tolist()))} are not finite")
    if text is None:
        return
    if text.ndim != 2 or text.shape[1] != features.shape[1] or len(text) != (n_classes or len(text)):
        raise ValueError(f"text must be ({n_classes or 'K'}, {features.shape[1]}), got {tuple(text.shape)}")
    if float((features.norm(dim=-1) - 1).abs().max()) > 1e-2:
        raise ValueError("features must be unit rows: divide each by its norm")


def folds_of(labels: Tensor, folds: int, seed: int = 0) -> Tensor:
    """(N,) -> (N,) int64, the fold that holds each sample out, or -1 for never: the only sample of a class.

    The samples of a class are dealt out in random order, so each fold leaves every class at least one sample.
    """
    generator = torch.Generator().manual_seed(seed)
    found = torch.full_like(labels, -1)
    for k in sorted(set(labels.tolist())):
        rows = (labels == k).nonzero()[:, 0]
        if len(rows) > 1 and folds > 1:
            found[rows[torch.randperm(len(rows), generator=generator)]] = torch.arange(len(rows)) % folds
    return found


def label_map(classes: Sequence[str], subset: Sequence[str]) -> Tensor:
    """(K, S) of 0 and 1: logits over `classes` times this are logits over `subset`, in its order."""
    place = {name: i for i, name in enumerate(classes)}
    if unknown := [name for name in subset if name not in place]:
        raise ValueError(f"not among the classes learnt: {', '.join(map(repr, unknown))}")
    chosen = torch.zeros(len(classes), len(subset))
    chosen[[place[name] for name in subset], list(range(len(subset)))] = 1
    return chosen


def tiny_records() -> list[Record]:
    """Twelve small pictures of different sizes in three colours, labelled and captioned: data for `tiny()` of a method."""
    records = []
    for i in range(12):
        name = ("red", "green", "blue")[i % 3]
        colour = tuple(255 - 12 * i if part == name else 10 * i for part in ("red", "green", "blue"))
        image = Image.new("RGB", (32 + i, 40), colour)
        image.paste((255, 255, 255 - 20 * i), (i, 4, i + 8, 20))
        records.append({"id": f"tiny-{i}", "image": image, "label": name, "caption": f"a photo of a {name} square"})
    return records
