"""Rendered, captioned scenes: ground truth that real data lacks, made on demand and the same for everybody.

    records = scenes("train", n=10_000, kind="single", size=64, seed=0)
    batch = draw("train", range(128), size=32)           # the fast path: uint8 arrays and captions, no PIL

A scene is described on the unit square, so `size` changes its resolution and nothing else. Training and test streams are
disjoint, and some combinations of attributes never occur but in the split "heldout" (see `World.holdout`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ecliptic.data.records import Records
from ecliptic.data.scenes import words
from ecliptic.data.scenes.canvas import Pictures, boxes_of, outline, render
from ecliptic.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    CORNERS,
    DEFECTS,
    EVENTS,
    GROUNDS,
    KINDS,
    LIGHTINGS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    TEXTURES,
    Defect,
    Motion,
    Scene,
    Thing,
    World,
    combinations,
    frame,
    held_out,
    relation_holds,
    sample,
)

if TYPE_CHECKING:
    from ecliptic.core.contracts import Record

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "CORNERS",
    "DEFECTS",
    "EVENTS",
    "GROUNDS",
    "KINDS",
    "LIGHTINGS",
    "POSITIONS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "TEXTURES",
    "Batch",
    "Defect",
    "Motion",
    "Pictures",
    "Scene",
    "SceneRecords",
    "Thing",
    "World",
    "combinations",
    "draw",
    "frame",
    "held_out",
    "outline",
    "relation_holds",
    "render",
    "sample",
    "scenes",
]


def scenes(
    split: str = "train",
    n: int = 1000,
    seed: int = 0,
    size: int = 64,
    *,
    kind: str = "single",
    label: str | Sequence[str] = "shape",
    names: Sequence[str] = ("texture", "colour", "shape"),
    clean: bool = False,
    **options: Any,
) -> Records:
    """`n` scenes of a split, drawn when they are looked at.

    split: "train", "val", "test" (disjoint streams, the same distribution) or "heldout" (only the combinations of
        attributes that the other three never show). Scene i is the same whatever n is.
    kind: "single" (one thing), "pair" (two, in a relation), "multi" (2 to 4 different things), "count" (1 to 5 of the same
        thing), "defect" (one thing, half of them damaged), "video" (a clip), "mixed" (single, pair, multi and count).
    label: the attribute, or the attributes in order, that make up `label`, as in ("colour", "shape") -> "red circle".
    names: what the short `caption` may name, of "size", "texture", "colour", "shape"; a plain texture stays unsaid.
    clean: also `clean`, the same picture evenly lit and without noise.
    options: the fields of `World`.

    A record has `id`; `image` (PIL RGB; before loading, the `Scene`, which `render` draws at any size); `caption`;
    `captions` (paraphrases, all true, the first names the most); `long_caption` (every attribute); `negatives`, captions
    that differ from `captions[0]` in exactly one point and are false, with what is wrong in `negative_kinds`; `label`;
    `attributes` (dict; `things` lists them all); `phrases`, one a thing. Drawn when loaded: `mask` (size, size) uint8, k
    where the k-th thing is seen; `boxes` (n, 4) float32, x0 y0 x1 y1 in pixels, x1 and y1 exclusive, tight around the
    visible pixels of `mask`; `defect_mask` (size, size) uint8. Clips also have `frames` (T images), `frame_masks`
    (T, size, size), `frame_boxes` (T, n, 4), zeros where the thing is not there, and `removed`, the frames without the
    thing; their `image` is the scene in the middle of the clip.

    ValueError: an unknown option or value, with what it may be.
    """
    world = _world(split, kind, size, options)
    if n < 0:
        raise ValueError(f"n is {n}; it cannot be negative")
    chosen = (label,) if isinstance(label, str) else tuple(label)
    named = (names,) if isinstance(names, str) else tuple(names)
    for name in named:
        if name not in words.NAMES:
            raise ValueError(f"names has {name!r}; it may hold {', '.join(words.NAMES)}")
    known = [key for key in words.attributes(sample(world, kind, split, seed, 0)) if key != "things"]
    for name in chosen:
        if name not in known:
            raise ValueError(f"no attribute {name!r} to use as label; there are {', '.join(known)}")
    tag = _tag(world)

    def get(i: int) -> Record:
        scene = sample(world, kind, split, seed, i)
        facts = words.attributes(scene)
        id = f"scenes/{kind}{tag}/{split}/{seed}/{i}"
        lies = words.negatives(scene, Random(f"{id} negatives"))
        return {
            "id": id,
            "image": scene,
            "caption": words.short_caption(scene, named),
            "captions": words.paraphrases(scene),
            "long_caption": words.long_caption(scene),
            "negatives": list(lies.values()),
            "negative_kinds": list(lies),
            "label": " ".join(str(facts[name]) for name in chosen),
            "attributes": facts,
            "phrases": [words.fact(t, ("texture", "colour", "shape")).phrase() for t in scene.things],
        }

    def load(records: Sequence[Record]) -> list[Record]:
        drawn = _drawn([record["image"] for record in records], size, world.frames, clean)
        return [{**record, **more} for record, more in zip(records, drawn, strict=True)]

    return SceneRecords(n, get, load, f"scenes/{kind}{tag}/{split}")


class SceneRecords(Records):
    """`Records` that can also be drawn many at once: `batch(indices)` gives what indexing gives, much faster."""

    def __init__(
        self, n: int, get: Callable[[int], Record], many: Callable[[Sequence[Record]], list[Record]], name: str
    ):
        super().__init__(n, get, load=lambda record: many([record])[0], name=name)
        self._many = many

    def batch(self, indices: Iterable[int]) -> list[Record]:
        """The records at these places, drawn together; the trainer asks for them so."""
        return self._many([self._cheap(self._position(int(i))) for i in indices])

    def _pick(self, rows: Sequence[int]) -> Records:
        return SceneRecords(len(rows), lambda i: self._get(rows[i]), self._many, self.name)


@dataclass(frozen=True)
class Batch:
    """Scenes drawn together. images, masks, defects as in `Pictures`; `captions` one a scene; `scenes` for the rest."""

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    defects: NDArray[np.uint8]
    captions: list[str]
    scenes: list[Scene]


def draw(
    split: str,
    indices: Iterable[int],
    seed: int = 0,
    size: int = 64,
    *,
    kind: str = "single",
    caption: Callable[[Scene], str] | Sequence[str] = ("texture", "colour", "shape"),
    **options: Any,
) -> Batch:
    """Many scenes at once, without PIL: pixel for pixel those that `scenes` gives.

    caption: what the captions may name, as `names` of `scenes`, or a function from `Scene` to text.
    """
    world = _world(split, kind, size, options)
    chosen = [sample(world, kind, split, seed, i) for i in indices]
    pictures = render(chosen, size)
    if callable(caption):
        captions = [caption(scene) for scene in chosen]
    else:
        captions = [words.short_caption(scene, caption) for scene in chosen]
    return Batch(*pictures, captions, chosen)


def _world(split: str, kind: str, size: int, options: dict[str, Any]) -> World:
    if kind not in KINDS:
        raise ValueError(f"no kind {kind!r} of scenes: it may be {', '.join(KINDS)}")
    if size < 16:
        raise ValueError(f"size is {size}: scenes need at least 16 pixels")
    known = [field.name for field in fields(World)]
    for name in options:
        if name not in known:
            raise ValueError(f"scenes has no option {name!r}; it has {', '.join(known)}")
    world = World(**options)
    combinations(world, split)  # raises where there is nothing to draw from
    return world


def _tag(world: World) -> str:
    """Nothing for the default world, else a short name of this one: other pictures need other ids."""
    if world == World():
        return ""
    return "-" + hashlib.blake2b(repr(world).encode(), digest_size=4).hexdigest()


def _drawn(scenes: Sequence[Scene], size: int, frames: int, clean: bool) -> list[dict[str, Any]]:
    """The part of each record that has to be drawn."""
    pictures = render(scenes, size)
    found: list[dict[str, Any]] = [
        {
            "image": Image.fromarray(image),
            "mask": mask,
            "boxes": boxes_of(mask, len(scene.things)),
            "defect_mask": defect,
        }
        for scene, image, mask, defect in zip(scenes, *pictures, strict=True)
    ]
    if clean:
        lit = render([replace(scene, lighting="even", noise=0.0) for scene in scenes], size)
        for record, image in zip(found, lit.images, strict=True):
            record["clean"] = Image.fromarray(image)
    for record, scene in zip(found, scenes, strict=True):
        if scene.motion:
            record |= _clip(scene, size, frames)
    return found


def _clip(scene: Scene, size: int, frames: int) -> dict[str, Any]:
    moving = render([frame(scene, t / (frames - 1)) for t in range(frames)], size)
    empty = render([replace(scene, things=scene.things[1:])], size).images[0]
    return {
        "frames": [Image.fromarray(image) for image in moving.images],
        "frame_masks": moving.masks,
        "frame_boxes": np.stack([boxes_of(mask, len(scene.things)) for mask in moving.masks]),
        "removed": [Image.fromarray(empty) for _ in range(frames)],
    }
