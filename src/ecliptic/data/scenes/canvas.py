"""Drawing scenes: signed distances, anti-aliased paint and exact id maps, for many scenes at once.

Every quantity lives on the unit square (x to the right, y down), so a scene looks the same at any size. Only additions,
products, square roots and comparisons touch pixels, element by element: the picture of a scene does not depend on
which other scenes are drawn beside it, nor on the machine's maths library.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ecliptic.data.scenes.world import RGB, Defect, Scene, Thing

Array = Any  # NDArray[np.float32]: numpy's stubs widen it at every operation
Bytes = NDArray[np.uint8]


class Pictures(NamedTuple):
    """B scenes drawn at S pixels.

    images: (B, S, S, 3) uint8. masks: (B, S, S) uint8, 0 is background, k is the scene's k-th thing (from 1) where its
    outline holds the pixel's centre and nothing lies on top. defects: (B, S, S) uint8, 1 on damaged pixels.
    """

    images: Bytes
    masks: Bytes
    defects: Bytes


# ---------------------------------------------------------------------------------------------------------- shapes
# Each takes local coordinates (the thing's radius is 1, upright, y down) and gives a signed distance in radii, negative
# inside and exact in sign; beyond corners it is the distance to the mitred outline, a little less than Euclid's.


def _circle(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y) - np.float32(0.92)


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.76)


def _triangle(x: Array, y: Array) -> Array:
    side = np.float32(math.sqrt(3) / 2) * np.abs(x) - np.float32(0.5) * y
    return np.maximum(side, y) - np.float32(0.54)


def _star(x: Array, y: Array) -> Array:
    """Five tips at radius 1.06, dents at radius 0.5: fold into the wedge of the nearest tip, then one edge."""
    tips = [(math.sin(2 * math.pi * k / 5), -math.cos(2 * math.pi * k / 5)) for k in range(5)]
    along = np.full_like(x, -np.inf)
    for a, b in tips:
        along = np.maximum(along, np.float32(a) * x + np.float32(b) * y)
    across = np.sqrt(np.maximum(x * x + y * y - along * along, 0))
    outer, inner = 1.06, 0.5
    edge = (inner * math.cos(math.pi / 5) - outer, inner * math.sin(math.pi / 5))
    length = math.hypot(*edge)
    normal = (edge[1] / length, -edge[0] / length)
    return (along - np.float32(outer)) * np.float32(normal[0]) + across * np.float32(normal[1])


def _cross(x: Array, y: Array) -> Array:
    a, b = np.abs(x), np.abs(y)
    long, short = np.float32(0.96), np.float32(0.32)
    return np.minimum(np.maximum(a - long, b - short), np.maximum(a - short, b - long))


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.sqrt(x * x + y * y) - np.float32(0.735)) - np.float32(0.205)


def _heart(x: Array, y: Array) -> Array:
    """A square on its tip and two discs on its upper sides."""
    a, b, half = np.abs(x), y - np.float32(0.21), np.float32(0.41)
    square = (a + np.abs(b) - 2 * half) * np.float32(math.sqrt(0.5))
    disc = np.sqrt((a - half) ** 2 + (b + half) ** 2) - half * np.float32(math.sqrt(2))
    return np.minimum(square, disc)


def _crescent(x: Array, y: Array) -> Array:
    """A disc less a smaller disc to its right."""
    a = x - np.float32(0.29)
    disc = np.sqrt(a * a + y * y) - np.float32(0.86)
    bite = np.sqrt((a - np.float32(0.38)) ** 2 + y * y) - np.float32(0.65)
    return np.maximum(disc, -bite)


def _hexagon(x: Array, y: Array) -> Array:
    side = np.float32(0.5) * np.abs(x) + np.float32(math.sqrt(3) / 2) * np.abs(y)
    return np.maximum(side, np.abs(x)) - np.float32(0.84)


def _diamond(x: Array, y: Array) -> Array:
    wide, tall = 0.64, 1.04
    length = math.hypot(1 / wide, 1 / tall)
    return (
        np.float32(1 / wide / length) * np.abs(x) + np.float32(1 / tall / length) * np.abs(y) - np.float32(1 / length)
    )


def _bar(x: Array, y: Array) -> Array:
    """Clutter; not a shape that captions name."""
    return np.maximum(np.abs(x) - np.float32(0.96), np.abs(y) - np.float32(0.3))


OUTLINES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "crescent": _crescent,
    "hexagon": _hexagon,
    "diamond": _diamond,
    "bar": _bar,
}


def outline(shape: str, x: Array, y: Array) -> Array:
    """Signed distance in radii (negative inside) at local coordinates x, y of any equal shape."""
    return OUTLINES[shape](np.asarray(x, np.float32), np.asarray(y, np.float32))


# -------------------------------------------------------------------------------------------------------- textures
# Share of the second colour in [0, 1] at texture coordinates x, y (radii); `pixel` is the width of a pixel in radii.


def _wave(t: Array) -> Array:
    """A triangle wave of period 1: 1 at whole numbers, -1 halfway."""
    return np.abs(t - np.floor(t) - np.float32(0.5)) * 4 - 1


def _step(t: Array, pixel: Array) -> Array:
    """0 below 0, 1 above 0, one pixel wide."""
    return np.clip(t / pixel + np.float32(0.5), 0, 1)


def _striped(x: Array, y: Array, pixel: Array) -> Array:
    f = np.float32(1.6)
    return _step(_wave(x * f) - np.float32(0.12), 4 * f * pixel)


def _dotted(x: Array, y: Array, pixel: Array) -> Array:
    f = np.float32(1.75)
    a, b = x * f, y * f
    a, b = a - np.floor(a) - np.float32(0.5), b - np.floor(b) - np.float32(0.5)
    return _step(np.float32(0.33) - np.sqrt(a * a + b * b), f * pixel)


def _checkered(x: Array, y: Array, pixel: Array) -> Array:
    f = np.float32(1.1)
    a = np.clip(_wave(x * f) / (4 * f * pixel), -0.5, 0.5)
    b = np.clip(_wave(y * f) / (4 * f * pixel), -0.5, 0.5)
    return np.float32(0.5) + 2 * a * b


def _netted(x: Array, y: Array, pixel: Array) -> Array:
    f = np.float32(1.6)
    lines = np.maximum(_wave(x * f), _wave(y * f))
    return _step(lines - np.float32(0.6), 4 * f * pixel)


def _zigzag(x: Array, y: Array, pixel: Array) -> Array:
    f = np.float32(1.5)
    bend = np.float32(0.14) * _wave(y * np.float32(1.7))
    return _step(_wave((x + bend) * f), 4 * f * pixel)


def _banded(x: Array, y: Array, pixel: Array) -> Array:
    f = np.float32(2.1)
    return _step(_wave(np.sqrt(x * x + y * y) * f + np.float32(0.5)), 4 * f * pixel)


def _speckled(x: Array, y: Array, pixel: Array) -> Array:
    """Small dots on a rotated, jittered lattice: irregular to the eye."""
    f = np.float32(3.0)
    a, b = x * f, y * f
    i, j = np.floor(a), np.floor(b)
    h = _hash(i, j)
    g = _hash(j + 57, i - 131)
    radius = np.float32(0.14) + np.float32(0.26) * _hash(i + 19, j + 7)
    u = a - i - np.float32(0.35) - np.float32(0.3) * h
    v = b - j - np.float32(0.35) - np.float32(0.3) * g
    return _step(np.minimum(radius, 0.35) - np.sqrt(u * u + v * v), f * pixel)


TEXTURE_PAINT: dict[str, Callable[[Array, Array, Array], Array]] = {
    "striped": _striped,
    "dotted": _dotted,
    "checkered": _checkered,
    "netted": _netted,
    "zigzag": _zigzag,
    "banded": _banded,
    "speckled": _speckled,
}


def _hash(i: Array, j: Array, salt: NDArray[np.uint32] | int = 0) -> Array:
    """Whole numbers -> uniform noise in [0, 1), the same everywhere."""
    h = i.astype(np.int32).astype(np.uint32) * np.uint32(0x9E3779B1) ^ j.astype(np.int32).astype(np.uint32) * np.uint32(
        0x85EBCA6B
    )
    h = (h + np.asarray(salt, np.uint32)).astype(np.uint32)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    h = (h ^ (h >> np.uint32(12))) * np.uint32(0x297A2D39)
    h = h ^ (h >> np.uint32(15))
    return (h >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


# ---------------------------------------------------------------------------------------------------------- scenes


def render(scenes: Sequence[Scene], size: int) -> Pictures:
    """Draw scenes at `size` pixels. The result for a scene is the same whatever else is in the list."""
    if size < 16:
        raise ValueError(f"size is {size}: scenes need at least 16 pixels")
    images = np.empty((len(scenes), size, size, 3), np.uint8)
    masks = np.zeros((len(scenes), size, size), np.uint8)
    defects = np.zeros((len(scenes), size, size), np.uint8)
    chunk = max(1, min(256, 2**19 // size**2))  # stays near the cache
    for start in range(0, len(scenes), chunk):
        part = slice(start, start + chunk)
        _render(scenes[part], size, images[part], masks[part], defects[part])
    return Pictures(images, masks, defects)


def _render(scenes: Sequence[Scene], size: int, images: Bytes, masks: Bytes, defects: Bytes) -> None:
    canvas = _backgrounds(scenes, size)
    layers: dict[tuple[int, str, int, str], list[tuple[int, int, Thing, Defect | None]]] = defaultdict(list)
    for b, scene in enumerate(scenes):
        for k, thing in enumerate(scene.clutter):
            layers[k - 1000, thing.shape, _window(thing, size), ""].append((b, 0, thing, None))
        for k, thing in enumerate(scene.things):
            defect = scene.defect if k == 0 else None
            layer = len(scene.things) - k if scene.relation == "inside" else k  # what is inside comes last
            key = (layer, thing.shape, _window(thing, size), defect.kind if defect else "")
            layers[key].append((b, k + 1, thing, defect))
    for (_, shape, window, _), items in sorted(layers.items(), key=lambda item: item[0]):
        _paint(canvas, masks, defects, items, shape, window, size)
    _light(canvas, scenes, size)
    _grain(canvas, scenes, size)
    canvas *= 255
    canvas += np.float32(0.5)
    np.clip(canvas, 0, 255, out=canvas)
    for channel in range(3):
        images[..., channel] = canvas[channel]


def _window(thing: Thing, size: int) -> int:
    """Side in pixels of a square that holds the thing and its shadow, rounded up so that few sizes occur."""
    step = max(4, size // 8)
    return min(size, -(-(math.ceil(2 * 1.32 * thing.r * size) + 2) // step) * step)


def _centres(size: int) -> Array:
    return (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)


def _backgrounds(scenes: Sequence[Scene], size: int) -> Array:
    """(3, B, S, S) in [0, 1]: ground colour times a shade that the background's kind sets."""
    grid = _centres(size)
    ground = np.array([scene.ground for scene in scenes], np.float32)
    shade = np.ones((len(scenes), size, size), np.float32)
    kinds: dict[str, list[int]] = defaultdict(list)
    for b, scene in enumerate(scenes):
        kinds[scene.background].append(b)
    for kind, where in kinds.items():
        seeds = np.array([scenes[b].seed for b in where], np.uint32)[:, None, None]
        slope = np.array([scenes[b].slope for b in where], np.float32)
        if kind == "gradient":
            x, y = grid[None, None, :] - np.float32(0.5), grid[None, :, None] - np.float32(0.5)
            shade[where] += np.float32(0.36) * (slope[:, :1, None] * x + slope[:, 1:, None] * y)
        elif kind == "cloudy":
            cloud = np.float32(0.22) * _clouds(seeds, grid, 4) + np.float32(0.14) * _clouds(
                seeds + np.uint32(7), grid, 10
            )
            shade[where] += cloud - np.float32(0.18)
        elif kind == "tiled":
            pixel = np.float32(1 / size)
            tile = _checkered(grid[None, None, :] * 3 + slope[:, :1, None], grid[None, :, None] * 3, 3 * pixel)
            shade[where] += np.float32(0.16) * (tile - np.float32(0.5))
        elif kind == "lined":
            pixel = np.float32(1 / size)
            line = _striped(
                3 * (slope[:, :1, None] * grid[None, None, :] + slope[:, 1:, None] * grid[None, :, None]),
                shade[:1],
                3 * pixel,
            )
            shade[where] += np.float32(0.16) * (line - np.float32(0.5))
    return np.ascontiguousarray(ground.T)[:, :, None, None] * shade


def _clouds(seeds: NDArray[np.uint32], grid: Array, cells: int) -> Array:
    """(b, S, S) smooth noise in [0, 1) on a lattice of cells x cells."""
    nodes = np.arange(cells + 1, dtype=np.float32)
    lattice = _hash(nodes[None, :, None], nodes[None, None, :], seeds * np.uint32(2654435761))
    t = grid * np.float32(cells)
    i = np.minimum(t.astype(np.int64), cells - 1)
    w = t - i.astype(np.float32)
    w = w * w * (3 - 2 * w)
    rows = lattice[:, i] + (lattice[:, i + 1] - lattice[:, i]) * w[None, :, None]
    return rows[:, :, i] + (rows[:, :, i + 1] - rows[:, :, i]) * w


def _paint(
    canvas: Array,
    masks: Bytes,
    defects: Bytes,
    items: Sequence[tuple[int, int, Thing, Defect | None]],
    shape: str,
    window: int,
    size: int,
) -> None:
    """Draw one thing in each of several scenes: all of one shape, on windows of equal size."""
    scene = [item[0] for item in items]
    things = [item[2] for item in items]
    table = np.array([(t.x, t.y, t.r, math.cos(t.angle), math.sin(t.angle), t.outlined, t.shadow) for t in things])
    x, y, r, c, s, outlined, shadow = (column[:, None, None] for column in table.astype(np.float32).T)
    x0 = np.clip(np.floor(table[:, 0] * size - window / 2).astype(np.int64), 0, size - window)
    y0 = np.clip(np.floor(table[:, 1] * size - window / 2).astype(np.int64), 0, size - window)
    columns, rows = x0[:, None] + np.arange(window), y0[:, None] + np.arange(window)
    cuts = [
        (b, slice(top, top + window), slice(left, left + window))
        for b, top, left in zip(scene, y0.tolist(), x0.tolist(), strict=True)
    ]
    grid = _centres(size)
    u, v = (grid[columns][:, None, :] - x) / r, (grid[rows][:, :, None] - y) / r
    p, q = c * u + s * v, c * v - s * u
    unit = r * np.float32(size)  # pixels per radius
    pixel = 1 / unit

    distance = OUTLINES[shape](p, q)
    marks = [item[3] for item in items]
    hurt: Array | None = None
    damage = marks[0].kind if marks[0] else ""
    if marks[0]:
        ax, ay, bx, by, width = (
            column[:, None, None]
            for column in np.array([(m.x, m.y, m.u, m.v, m.width) for m in marks if m], np.float32).T
        )
        px, py = p - ax, q - ay
        along = np.clip(px * bx + py * by, 0, bx * bx + by * by) / np.maximum(bx * bx + by * by, np.float32(1e-6))
        hurt = np.sqrt((px - along * bx) ** 2 + (py - along * by) ** 2) - width
        harmed = (distance < 0) & (hurt < 0)
        if damage == "missing piece":
            distance = np.maximum(distance, -hurt)

    cover = np.clip(np.float32(0.5) - distance * unit, 0, 1)
    band = np.float32(0.13) + pixel * np.float32(0.4)
    cover -= outlined * np.clip(np.float32(0.5) - (distance + band) * unit, 0, 1)  # a drawing keeps the line only
    patch = np.empty((3, len(items), window, window), np.float32)
    for i, cut in enumerate(cuts):  # slices copy faster than index arrays
        patch[:, i] = canvas[:, *cut]
    if shadow.any():
        halo = np.clip(1 - distance * np.float32(1 / 0.26), 0, 1)
        side = np.clip(np.float32(0.62) + np.float32(0.38) * (u + v), 0, 1)
        patch *= 1 - (np.float32(0.34) * shadow) * halo * halo * side
    paint = base = _planes([t.rgb for t in things])
    textured = [i for i, t in enumerate(things) if t.texture != "plain"]
    if textured:
        share = np.zeros(distance.shape, np.float32)
        for texture in sorted({things[i].texture for i in textured}):
            at = [j for j in textured if things[j].texture == texture]
            turn = np.array(
                [(math.cos(things[j].turn), math.sin(things[j].turn), things[j].phase) for j in at], np.float32
            )
            tc, ts, phase = (column[:, None, None] for column in turn.T)
            a, b = p[at], q[at]
            if texture == "banded":
                share[at] = TEXTURE_PAINT[texture](a, b, pixel[at])
            else:
                share[at] = TEXTURE_PAINT[texture](tc * a + ts * b + phase, tc * b - ts * a + phase, pixel[at])
        paint = base + (_planes([t.second for t in things]) - base) * share
    relief = 1 + shadow * (np.float32(-0.07) * (u + v))  # lit from the top left
    relief *= 1 - shadow * (1 - outlined) * np.float32(0.2) * np.clip(1 + distance * np.float32(1 / 0.13), 0, 1)
    paint = paint * relief
    if hurt is not None and damage != "missing piece":
        wound = np.clip(np.float32(0.5) - hurt * unit, 0, 1)
        paint = paint + (_planes([m.rgb for m in marks if m]) - paint) * wound
    paint -= patch
    paint *= cover
    patch += paint
    inside = distance < 0
    for i, (cut, (_, number, _, _)) in enumerate(zip(cuts, items, strict=True)):
        canvas[:, *cut] = patch[:, i]
        if number:
            masks[cut][inside[i]] = number
        if hurt is not None:
            defects[cut][harmed[i]] = 1


def _planes(colours: Sequence[RGB]) -> Array:
    """(3, n, 1, 1)."""
    return np.ascontiguousarray(np.array(colours, np.float32).T)[:, :, None, None]


def _light(canvas: Array, scenes: Sequence[Scene], size: int) -> None:
    """Multiply by each scene's illumination, smooth over the unit square; `bright` lifts towards white instead."""
    grid = _centres(size)
    x, y = grid[None, None, :], grid[None, :, None]
    kinds: dict[str, list[int]] = defaultdict(list)
    for b, scene in enumerate(scenes):
        kinds[scene.lighting].append(b)
    for kind, where in kinds.items():
        if kind == "even":
            continue
        if kind == "bright":
            canvas[:, where] = canvas[:, where] * np.float32(0.8) + np.float32(0.23)
            continue
        level = np.array([scenes[b].level for b in where], np.float32)[:, None, None]
        if kind == "dim":
            light = np.broadcast_to(level, (len(where), 1, 1))
        elif kind == "backlit":
            lamp = np.array([scenes[b].lamp for b in where], np.float32)
            far = (x - lamp[:, :1, None]) ** 2 + (y - lamp[:, 1:, None]) ** 2
            light = level + (np.float32(1.3) - level) * (far / (far + np.float32(0.16)))
        else:  # lit from one side
            t = 1 - x if kind == "lit from the left" else x
            light = np.broadcast_to(level + (np.float32(1.12) - level) * t, (len(where), size, size))
        canvas[:, where] *= light


def _grain(canvas: Array, scenes: Sequence[Scene], size: int) -> None:
    """Sensor noise per pixel and channel, close to normal (a sum of three uniforms), sd = scene.noise of full range."""
    where = [b for b, scene in enumerate(scenes) if scene.noise > 0]
    if not where:
        return
    seeds = np.array([scenes[b].seed for b in where], np.uint32)[:, None, None]
    sd = np.array([scenes[b].noise for b in where], np.float32)[:, None, None]
    i, j = np.arange(size, dtype=np.float32)[None, :, None], np.arange(size, dtype=np.float32)[None, None, :]
    for channel in range(3):
        noise = sum((_hash(i, j, seeds * np.uint32(2 * k + 6 * channel + 1)) for k in range(3)), np.float32(-1.5))
        canvas[channel, where] += noise * (2 * sd)  # a sum of three uniforms has variance 1/4


def boxes_of(mask: Bytes, count: int) -> NDArray[np.float32]:
    """(n, 4) tight boxes x0 y0 x1 y1 in pixels, x1 and y1 exclusive, of ids 1..count; zeros where nothing is visible."""
    boxes = np.zeros((count, 4), np.float32)
    for k in range(count):
        hit = mask == k + 1
        columns, rows = hit.any(0).nonzero()[0], hit.any(1).nonzero()[0]
        if len(columns):
            boxes[k] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes
