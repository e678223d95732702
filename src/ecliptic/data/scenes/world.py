"""What can stand in a scene, and how one is drawn from (seed, split, index).

Each scene has its own random stream, so it depends neither on how many scenes are asked for nor on their order. The
first numbers of the stream have fixed uses: an option that shifts one attribute (size, lighting, noise) leaves the
others of the same scene as they were wherever it can.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import product
from random import Random
from typing import TypeVar

from ecliptic.data.scenes.canvas import outline

T = TypeVar("T")
RGB = tuple[float, float, float]
Combination = tuple[str, str, str]  # shape, colour, texture

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "crescent", "hexagon", "diamond")
TEXTURES = ("plain", "striped", "dotted", "checkered", "netted", "zigzag", "banded", "speckled")
COLOURS: dict[str, RGB] = {
    "red": (0.84, 0.15, 0.16),
    "orange": (0.97, 0.51, 0.11),
    "yellow": (0.98, 0.85, 0.20),
    "green": (0.16, 0.62, 0.25),
    "cyan": (0.16, 0.78, 0.83),
    "blue": (0.15, 0.33, 0.86),
    "purple": (0.50, 0.22, 0.70),
    "pink": (0.97, 0.52, 0.74),
    "white": (0.97, 0.97, 0.97),
    "black": (0.10, 0.10, 0.12),
}
GROUNDS: dict[str, RGB] = {
    "silver": (0.80, 0.81, 0.83),
    "grey": (0.52, 0.53, 0.55),
    "slate": (0.30, 0.35, 0.42),
    "beige": (0.86, 0.79, 0.67),
    "khaki": (0.58, 0.55, 0.40),
    "mint": (0.74, 0.87, 0.78),
    "lavender": (0.79, 0.76, 0.88),
    "navy": (0.11, 0.15, 0.29),
    "maroon": (0.32, 0.12, 0.17),
}
SIZES = {"small": (0.14, 0.18), "medium": (0.21, 0.26), "large": (0.30, 0.34)}  # radius in picture widths
BACKGROUNDS = ("plain", "gradient", "cloudy", "tiled", "lined")
LIGHTINGS = ("even", "bright", "dim", "backlit", "lit from the left", "lit from the right")
POSITIONS = ("left", "right", "top", "bottom", "centre")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
RELATIONS = ("left of", "right of", "above", "below", "inside")
DEFECTS = ("scratch", "spot", "missing piece")
EVENTS = ("moves", "appears", "vanishes", "changes colour", "rests")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
KINDS = ("single", "pair", "multi", "count", "defect", "video", "mixed")
SPLITS = ("train", "val", "test", "heldout")

REACH = 1.085  # no outline leaves this circle (in radii); with it nothing is ever clipped by the picture's edge
CONTAINERS = {"circle": 0.92, "square": 0.76, "ring": 0.53, "hexagon": 0.84, "heart": 0.58, "triangle": 0.54}
"""Shapes that another can lie inside of, with the radius of the disc at their middle that is free for it."""
CONTRAST = 40.0  # least CIE76 distance between a thing and its ground; 2 is just noticeable
SIDES = (5 / 12, 7 / 12)  # left of the first is "left", right of the second "right", between them the middle


@dataclass(frozen=True, slots=True)
class Thing:
    """One object. x, y, r in picture widths; angles in radians; `rgb` as painted, `second` is its texture's other colour."""

    shape: str
    colour: str
    texture: str
    x: float
    y: float
    r: float
    rgb: RGB
    second: RGB
    angle: float = 0.0
    turn: float = 0.0  # of the texture
    phase: float = 0.0
    outlined: float = 0.0  # 1: line drawing
    shadow: float = 1.0

    @property
    def size(self) -> str:
        return size_name(self.r)

    @property
    def position(self) -> str:
        return position_name(self.x, self.y)


@dataclass(frozen=True, slots=True)
class Defect:
    """Damage to a scene's first thing in that thing's local coordinates: a capsule from (x, y) to (x + u, y + v)."""

    kind: str
    x: float
    y: float
    u: float
    v: float
    width: float
    rgb: RGB


@dataclass(frozen=True, slots=True)
class Motion:
    """What happens to a clip's first thing. `start`, `end`: centres; `when` in [0, 1]: the moment of the event."""

    event: str
    direction: str | None
    start: tuple[float, float]
    end: tuple[float, float]
    when: float
    colour_after: str | None = None


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything needed to draw a picture at any size. `relation` holds between the first thing and the second."""

    kind: str
    things: tuple[Thing, ...]
    ground_name: str
    ground: RGB
    background: str = "plain"
    lighting: str = "even"
    relation: str | None = None
    count: int = 1  # things of the first kind
    counted: tuple[str, str, str] | None = None  # shape, colour, texture that `count` counts
    defect: Defect | None = None
    motion: Motion | None = None
    clutter: tuple[Thing, ...] = ()
    style: str = "filled"
    noise: float = 0.0
    slope: tuple[float, float] = (0.0, 1.0)  # direction of a gradient or of lines
    level: float = 1.0  # of the weakest light
    lamp: tuple[float, float] = (0.5, 0.5)
    seed: int = 0  # of noise and clouds


@dataclass(frozen=True)
class World:
    """What scenes are made of. A name given twice is twice as likely.

    Content
        shapes, colours, textures, sizes, positions, relations, lightings, defects, events: the values to draw from.
        backgrounds, grounds: kinds and colours of the background. style: "filled" or "drawing" (outlines only).
        count: least and most things, for kind "count" (0..9) and "multi" (1..9). distractors: other things beside those counted.
        defect_rate: share of damaged things. frames: length of a clip.
    Compositional split
        holdout: attributes whose combinations are kept out of train, val and test and are all there is in "heldout";
        one in five is. None or () holds nothing out.
    Distribution
        zipf: exponent of the frequency of (shape, colour, texture) by rank, the same ranking for every seed; 0 is uniform.
        spurious: (source, target, rate): with probability `rate` the target attribute (texture, background, lighting,
        size, position) is the one that belongs to the value of the source (shape, colour or texture), for instance
        ("shape", "texture", 1.0) ties each shape to one texture. Texture, size and position only where one thing is shown.
    Shift
        size_range: radii in picture widths in place of those of `sizes`. clutter: pieces of low contrast behind things, at
        `clutter_contrast` (fraction of full range). jitter: spread of the colours (fraction of full range). noise: sensor
        noise, standard deviation as a fraction of full range. rotation: most degrees a thing is turned.
    """

    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    textures: tuple[str, ...] = TEXTURES[:4]
    sizes: tuple[str, ...] = tuple(SIZES)
    positions: tuple[str, ...] = POSITIONS
    relations: tuple[str, ...] = RELATIONS
    backgrounds: tuple[str, ...] = BACKGROUNDS[:3]
    grounds: tuple[str, ...] = tuple(GROUNDS)
    lightings: tuple[str, ...] = ("even", *LIGHTINGS)
    defects: tuple[str, ...] = DEFECTS
    defect_rate: float = 0.5
    events: tuple[str, ...] = EVENTS
    frames: int = 8
    count: tuple[int, int] | None = None
    distractors: tuple[int, int] = (0, 0)
    style: str = "filled"
    holdout: tuple[str, ...] = ("shape", "colour")
    zipf: float = 0.0
    spurious: tuple[str, str, float] | None = None
    size_range: tuple[float, float] | None = None
    clutter: int = 0
    clutter_contrast: float = 0.07
    jitter: float = 0.02
    noise: float = 0.0
    rotation: float = 12.0

    def __post_init__(self) -> None:
        for field in fields(self):  # lists from YAML or the command line become tuples, so that a world can be hashed
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
            elif value is None and field.name == "holdout":
                object.__setattr__(self, field.name, ())
            elif isinstance(value, str) and field.name not in ("style",):
                object.__setattr__(self, field.name, (value,))
        known: dict[str, Sequence[str]] = {
            "shapes": SHAPES,
            "colours": tuple(COLOURS),
            "textures": TEXTURES,
            "sizes": tuple(SIZES),
            "positions": POSITIONS + CORNERS,
            "relations": RELATIONS,
            "backgrounds": BACKGROUNDS,
            "grounds": tuple(GROUNDS),
            "lightings": LIGHTINGS,
            "defects": DEFECTS,
            "events": EVENTS,
            "holdout": ("shape", "colour", "texture"),
        }
        for name, values in known.items():
            given = getattr(self, name)
            for value in given:
                if value not in values:
                    raise ValueError(f"{name} has {value!r}; it may hold {', '.join(values)}")
            if not given and name != "holdout":
                raise ValueError(f"{name} is empty; it may hold {', '.join(values)}")
        if self.style not in ("filled", "drawing"):
            raise ValueError(f"style is {self.style!r}; it may be 'filled' or 'drawing'")
        if self.size_range and not 0.05 <= self.size_range[0] <= self.size_range[1] <= 0.45:
            raise ValueError(f"size_range is {self.size_range}; radii go from 0.05 to 0.45 picture widths, least first")
        if self.count and not 0 <= self.count[0] <= self.count[1] <= 9:
            raise ValueError(f"count is {self.count}; it goes from 0 to 9, least first")
        if self.spurious:
            source, target, rate = self.spurious
            targets = ("texture", "background", "lighting", "size", "position")
            if source not in ("shape", "colour", "texture") or target not in targets or not 0 <= rate <= 1:
                raise ValueError(
                    f"spurious is {self.spurious}; give (shape|colour|texture, {'|'.join(targets)}, rate in 0..1)"
                )
        for name in ("defect_rate", "noise", "jitter", "clutter_contrast"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it goes from 0 to 1")
        if self.frames < 2:
            raise ValueError(f"frames is {self.frames}; a clip has at least 2")
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation is {self.rotation}; it goes from 0 to 180 degrees")
        if not 0 <= self.clutter <= 200:
            raise ValueError(f"clutter is {self.clutter}; it goes from 0 to 200 pieces")


def held_out(shape: str, colour: str, texture: str, holdout: Sequence[str]) -> bool:
    """Whether this combination is kept for the split "heldout": one in five, spread so that each value keeps others.

    It depends on the names alone, not on the values a world draws from or on a seed: models trained with different
    settings have never seen the same combinations.
    """
    if not holdout:
        return False
    at = {
        "shape": SHAPES.index(shape),
        "colour": 2 * list(COLOURS).index(colour),
        "texture": 3 * TEXTURES.index(texture),
    }
    return sum(at[name] for name in holdout) % 5 == 0


@lru_cache(maxsize=256)
def combinations(world: World, split: str) -> tuple[tuple[Combination, ...], tuple[float, ...]]:
    """The (shape, colour, texture) a split draws from and their cumulative probabilities (the last is 1)."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: it may be {', '.join(SPLITS)}")
    if split == "heldout" and not world.holdout:
        raise ValueError("the split 'heldout' needs holdout=, the attributes whose combinations are held out")
    every = sorted(product(world.shapes, world.colours, world.textures))  # a name given twice counts twice
    chosen = [c for c in every if held_out(*c, world.holdout) == (split == "heldout")]
    if not chosen:
        side = "in" if split == "heldout" else "outside"
        raise ValueError(f"no combination of these shapes, colours and textures lies {side} the held-out ones")
    order = Random(5).sample(range(len(chosen)), len(chosen))
    weights = [(1 + rank) ** -world.zipf for rank in order]
    total, running, cumulative = sum(weights), 0.0, []
    for weight in weights:
        running += weight
        cumulative.append(running / total)
    cumulative[-1] = 1.0
    return tuple(chosen), tuple(cumulative)


def size_name(r: float) -> str:
    """small, medium or large, for a radius in picture widths."""
    return "small" if r < 0.195 else "medium" if r < 0.28 else "large"


def position_name(x: float, y: float) -> str:
    """One of the nine cells of a 3 x 3 layout, for a centre in picture widths."""
    column = "left" if x < SIDES[0] else "right" if x > SIDES[1] else ""
    row = "top" if y < SIDES[0] else "bottom" if y > SIDES[1] else ""
    return f"{row} {column}".strip() or "centre"


def relation_holds(relation: str, a: Thing, b: Thing) -> bool:
    """Whether a stands in this relation to b: by centres along the axis that dominates, or by containment."""
    dx, dy = a.x - b.x, a.y - b.y
    if relation == "inside":
        return b.shape in CONTAINERS and math.hypot(dx, dy) + REACH * a.r <= CONTAINERS[b.shape] * b.r + 1e-9
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    return along > 0.12 and along > 1.3 * (abs(dy) if relation in ("left of", "right of") else abs(dx))


# ------------------------------------------------------------------------------------------------------ colours


def contrast(a: Sequence[float], b: Sequence[float]) -> float:
    """Distance of two sRGB colours in [0, 1] in CIE L*a*b* (CIE76); about 2 is just noticeable."""
    return math.dist(_lab(a), _lab(b))


def _lab(rgb: Sequence[float]) -> tuple[float, float, float]:
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb]
    matrix = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    white = (0.9505, 1.0, 1.089)
    x, y, z = (
        (t ** (1 / 3) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116)
        for t in (
            sum(m * v for m, v in zip(row, linear, strict=True)) / w for row, w in zip(matrix, white, strict=True)
        )
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@lru_cache(maxsize=65536)
def visible_grounds(paints: frozenset[tuple[str, bool]], grounds: tuple[str, ...]) -> tuple[str, ...]:
    """The grounds on which things of these (colour, is it textured?) stand out; where none will do, the best one."""
    worst = {g: min(_room(colour, textured, g) for colour, textured in paints) for g in grounds}
    return tuple(g for g in grounds if worst[g] >= 1) or (max(worst, key=lambda g: worst[g]),)


@lru_cache(maxsize=1024)
def _room(colour: str, textured: bool, ground: str) -> float:
    """Contrast with the ground in units of what is needed; the second colour of a texture needs half as much."""
    dim = contrast([v / 2 for v in COLOURS[colour]], [v / 2 for v in GROUNDS[ground]])
    main = min(contrast(COLOURS[colour], GROUNDS[ground]) / CONTRAST, dim / (0.7 * CONTRAST))
    return min(main, contrast(second_colour(COLOURS[colour]), GROUNDS[ground]) / (CONTRAST / 2)) if textured else main


def second_colour(rgb: RGB) -> RGB:
    """The other colour of a texture: much darker, or for dark colours much lighter, of the same hue."""
    light = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2]
    vivid = max(rgb) - min(rgb) > 0.2  # white and black stay apart: neither goes as far as the middle grey
    if light > 0.4:
        keep = 0.42 if vivid else 0.62
        return (keep * rgb[0], keep * rgb[1], keep * rgb[2])
    lift = 0.55 if vivid else 0.36
    return (rgb[0] + lift * (1 - rgb[0]), rgb[1] + lift * (1 - rgb[1]), rgb[2] + lift * (1 - rgb[2]))


def _jitter(rgb: RGB, spread: float, r: Random) -> RGB:
    a, b, c = (min(1.0, max(0.0, v + spread * (2 * r.random() - 1))) for v in rgb)
    return a, b, c


# ------------------------------------------------------------------------------------------------------ sampling


def _pick(values: Sequence[T], u: float) -> T:
    return values[int(u * len(values))]


def _between(low: float, high: float, u: float) -> float:
    return low + (high - low) * u


def stream(seed: int, split: str, kind: str, index: int) -> Random:
    """The random numbers of one scene. Streams of different splits, kinds, seeds or indices have nothing in common."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: it may be {', '.join(SPLITS)}")
    return Random(
        ((abs(seed) * 2 + (seed < 0)) << 72) + (index << 8) + (KINDS.index(kind) << 4) + SPLITS.index(split) + 1
    )


def sample(world: World, kind: str, split: str, seed: int, index: int) -> Scene:
    """Scene number `index` of a split."""
    r = stream(seed, split, kind, index)
    if kind == "mixed":
        kind = _pick(("single", "single", "pair", "multi", "count"), r.random())
    combos, cumulative = combinations(world, split)
    u = [r.random() for _ in range(24)]  # fixed uses, see below; whatever needs an unknown number of draws comes later
    picture = _Picture(world, r, u)
    first = _draw(combos, cumulative, u[0])
    if kind in ("single", "defect", "video"):
        scene = picture.single(kind, first)
    elif kind == "pair":
        scene = picture.pair(first, combos, cumulative)
    else:
        scene = picture.several(kind, first, combos, cumulative)
    if kind == "defect":
        scene = picture.damage(scene)
    if kind == "video":
        scene = picture.move(scene, combos)
    return scene


def _draw(combos: Sequence[Combination], cumulative: Sequence[float], u: float) -> Combination:
    return combos[min(bisect_right(cumulative, u), len(combos) - 1)]


class _Picture:
    """One scene in the making. u[0] first thing, u[1:4] size, u[4:7] place, u[7:17] background and light, u[17:] events."""

    def __init__(self, world: World, r: Random, u: list[float]):
        self.world, self.r, self.u = world, r, u

    def tie(self, target: str, first: Combination, values: tuple[str, ...], u: float) -> str:
        """A value of an attribute that may be tied to the first thing's."""
        chosen = _pick(values, u)
        if self.world.spurious:
            source, tied, rate = self.world.spurious
            if tied == target and self.u[23] < rate:
                at = ("shape", "colour", "texture").index(source)
                every = (SHAPES, tuple(COLOURS), TEXTURES)[at]
                return values[every.index(first[at]) % len(values)]
        return chosen

    def thing(self, what: Combination, x: float, y: float, radius: float) -> Thing:
        shape, colour, texture = what
        r = self.r
        rgb = _jitter(COLOURS[colour], self.world.jitter, r)
        angle = math.radians(self.world.rotation) * (2 * r.random() - 1)
        turn, phase = math.pi * r.random(), r.random()
        drawing = 1.0 if self.world.style == "drawing" else 0.0
        return Thing(
            shape, colour, texture, x, y, radius, rgb, second_colour(rgb), angle, turn, phase, drawing, 1.0 - drawing
        )

    def scene(self, kind: str, things: list[Thing], first: Combination, **more: object) -> Scene:
        world, u = self.world, self.u
        paints = frozenset((t.colour, t.texture != "plain") for t in things) or frozenset({(first[1], False)})
        name = _pick(visible_grounds(paints, world.grounds), u[7])
        ground = _jitter(GROUNDS[name], world.jitter, self.r)
        turn = 2 * math.pi * u[10]
        lighting = self.tie("lighting", first, world.lightings, u[9])
        level = {"dim": (0.48, 0.62), "backlit": (0.36, 0.48)}.get(lighting, (0.38, 0.5))
        return Scene(
            kind=kind,
            things=tuple(things),
            ground_name=name,
            ground=ground,
            background=self.tie("background", first, world.backgrounds, u[8]),
            lighting=lighting,
            clutter=self.clutter(ground),
            style=world.style,
            noise=world.noise,
            slope=(math.cos(turn), math.sin(turn)),
            level=_between(*level, u[11]),
            lamp=(_between(0.38, 0.62, u[12]), _between(0.38, 0.62, u[13])),
            seed=int(u[14] * 2**32),
            **more,  # type: ignore[arg-type]
        )

    def clutter(self, ground: RGB) -> tuple[Thing, ...]:
        pieces, r, world = [], self.r, self.world
        for _ in range(world.clutter):
            c = world.clutter_contrast
            a, b, d = (min(1.0, max(0.0, v + (c if r.random() < 0.5 else -c))) for v in ground)
            rgb = (a, b, d)
            x, y, radius, angle = r.random(), r.random(), _between(0.05, 0.14, r.random()), math.pi * r.random()
            pieces.append(Thing("bar", "", "plain", x, y, radius, rgb, rgb, angle, shadow=0.0))
        return tuple(pieces)

    def single(self, kind: str, first: Combination) -> Scene:
        world, u = self.world, self.u
        shape, colour, texture = first
        if world.spurious and world.spurious[1] == "texture":
            texture = self.tie("texture", first, world.textures, u[3])
            first = (shape, colour, texture)
        sizes = tuple(s for s in world.sizes if s != "small") or world.sizes if kind == "defect" else world.sizes
        low, high = world.size_range or SIZES[self.tie("size", first, sizes, u[1])]
        radius = _between(low, high, u[2])
        place = self.tie("position", first, world.positions, u[4])
        x, y = _place(place, radius, u[5], u[6])
        return self.scene(kind, [self.thing(first, x, y, radius)], first, counted=first)

    def pair(self, first: Combination, combos: Sequence[Combination], cumulative: Sequence[float]) -> Scene:
        world, u = self.world, self.u
        relations = world.relations
        relation = _pick(relations, u[4])
        second = self.other([first], combos, cumulative)
        if relation == "inside":
            holders = _holders(first[1], combos)
            if holders:
                second = _pick(holders, u[3])
            else:
                relation = _pick([k for k in relations if k != "inside"] or ["left of"], u[3])
        if relation == "inside":
            outer = _between(0.36, 0.40, u[1]) if not world.size_range else min(0.40, max(0.3, world.size_range[1]))
            inner = min(_between(0.11, 0.15, u[2]), 0.98 * CONTAINERS[second[0]] * outer / REACH)
            x, y = (0.5 + (0.46 - REACH * outer) * (2 * v - 1) for v in u[5:7])
            things = [self.thing(first, x, y, inner), self.thing(second, x, y, outer)]
        else:
            low, high = world.size_range or (0.12, 0.21)
            sizes = [min(0.21, _between(low, high, v)) for v in u[1:3]]
            if not world.size_range:
                sizes = [_between(0.12, 0.16, v * 2) if v < 0.5 else _between(0.2, 0.21, v * 2 - 1) for v in u[1:3]]
            a, b = sizes
            gap = _between(0.02, 0.06, u[5])
            reach = REACH * (a + b) + gap  # distance of the centres
            free = 1 - 2 * 0.015 - REACH * (a + b) - reach
            near = 0.015 + REACH * a + max(free, 0.0) * u[6]  # of the left or upper one
            side = [
                _between(max(0.3, REACH * s + 0.015), min(0.7, 1 - REACH * s - 0.015), self.r.random()) for s in sizes
            ]
            side[1] = side[0] + max(-0.5 * reach, min(0.5 * reach, side[1] - side[0]))
            centres = [(near, side[0]), (near + reach, side[1])]
            if relation in ("right of", "below"):
                shift = REACH * (b - a)
                centres = [(near + shift + reach, side[0]), (near + shift, side[1])]
            if relation in ("above", "below"):
                centres = [(q, p) for p, q in centres]
            things = [self.thing(c, *xy, s) for c, xy, s in zip((first, second), centres, sizes, strict=True)]
        return self.scene("pair", things, first, relation=relation, counted=first)

    def other(
        self, taken: Sequence[Combination], combos: Sequence[Combination], cumulative: Sequence[float]
    ) -> Combination:
        """A combination that shares no (shape, colour) with those taken, so that each phrase fits one thing."""
        names = {c[:2] for c in taken}
        for _ in range(50):
            c = _draw(combos, cumulative, self.r.random())
            if c[:2] not in names:
                return c
        rest = [c for c in combos if c[:2] not in names]
        if not rest:
            raise ValueError(f"{len(taken) + 1} different things need more combinations of shapes and colours")
        return _pick(rest, self.r.random())

    def several(
        self, kind: str, first: Combination, combos: Sequence[Combination], cumulative: Sequence[float]
    ) -> Scene:
        world, u, r = self.world, self.u, self.r
        low, high = world.count or ((1, 5) if kind == "count" else (2, 4))
        number = low + int(u[4] * (high - low + 1))
        if kind == "count":
            extra = world.distractors[0] + int(u[5] * (world.distractors[1] - world.distractors[0] + 1))
            if number == 0:
                extra = max(extra, 1)
            extra = min(extra, 9 - number)
            what = [first] * number
        else:
            number, extra, what = max(number, 1), max(number, 1) - 1, [first]
        for _ in range(extra):
            what.append(self.other([first, *what], combos, cumulative))
        cells = 1 if len(what) == 1 else 2 if len(what) <= 4 else 3
        half = 0.5 / cells
        largest = (half - 0.012) / REACH
        low_r, high_r = world.size_range or (
            (0.24, 0.34) if cells == 1 else (0.12, 0.21) if cells == 2 else (0.105, 0.15)
        )
        spots = r.sample(range(cells * cells), len(what))
        things = []
        for c, spot in zip(what, spots, strict=True):
            radius = min(largest, _between(low_r, high_r, r.random()))
            slack = max(0.0, half - 0.012 - REACH * radius)
            x = (spot % cells + 0.5) / cells + slack * (2 * r.random() - 1)
            y = (spot // cells + 0.5) / cells + slack * (2 * r.random() - 1)
            things.append(self.thing(c, x, y, radius))
        return self.scene(kind, things, first, count=number if kind == "count" else 1, counted=first)

    def damage(self, scene: Scene) -> Scene:
        u, r, world = self.u, self.r, self.world
        if u[17] >= world.defect_rate:
            return scene
        kind = _pick(world.defects, u[18])
        thing = scene.things[0]
        spots = [(2 * r.random() - 1, 2 * r.random() - 1) for _ in range(96)]
        depths = [float(d) for d in outline(thing.shape, [s[0] for s in spots], [s[1] for s in spots])]
        if kind == "missing piece":
            at = min(range(len(spots)), key=lambda i: abs(depths[i]))
            defect = Defect(kind, *spots[at], 0.0, 0.0, _between(0.27, 0.36, u[19]), thing.rgb)
        else:
            deep = min(depths)
            paints = (thing.rgb,) if thing.texture == "plain" else (thing.rgb, thing.second)
            at = next(i for i, d in enumerate(depths) if d <= max(deep, -0.3) * 0.8)
            ink = max(((0.05, 0.05, 0.06), (0.98, 0.98, 0.98)), key=lambda c: min(contrast(c, p) for p in paints))
            if kind == "spot":
                defect = Defect(kind, *spots[at], 0.0, 0.0, _between(0.14, 0.2, u[19]), ink)
            else:
                turn, half = 2 * math.pi * u[20], _between(0.3, 0.5, u[19])
                x, y = spots[at]
                du, dv = half * math.cos(turn), half * math.sin(turn)
                defect = Defect(kind, x - du, y - dv, 2 * du, 2 * dv, 0.075, ink)
        return replace(scene, defect=defect)

    def move(self, scene: Scene, combos: Sequence[Combination]) -> Scene:
        u, world = self.u, self.world
        event = _pick(world.events, u[17])
        thing = scene.things[0]
        radius = min(thing.r, 0.24)
        low, high = 0.012 + REACH * radius, 0.988 - REACH * radius
        x, y = (min(high, max(low, v)) for v in (thing.x, thing.y))
        start = end = (x, y)
        direction = None
        colour_after = None
        when = 0.5
        if event == "moves":
            direction = _pick(tuple(DIRECTIONS), u[18])
            dx, dy = DIRECTIONS[direction]
            a = _between(low, low + 0.15 * (high - low), u[19])
            b = _between(high - 0.15 * (high - low), high, u[20])
            if dx:
                start, end = ((a, y), (b, y)) if dx > 0 else ((b, y), (a, y))
            else:
                start, end = ((x, a), (x, b)) if dy > 0 else ((x, b), (x, a))
        elif event == "appears":
            when = _between(0.15, 0.45, u[18])
        elif event in ("vanishes", "changes colour"):
            when = _between(0.6, 0.85, u[18])
        if event == "changes colour":
            ground = GROUNDS[scene.ground_name]
            after = sorted({c[1] for c in combos if c[0] == thing.shape and c[1] != thing.colour})
            after = [c for c in after if contrast(COLOURS[c], ground) >= CONTRAST]
            if after:
                colour_after = _pick(after, u[19])
            else:
                event = "rests"
        thing = replace(thing, x=start[0], y=start[1], r=radius)
        motion = Motion(event, direction, start, end, when, colour_after)
        middle = frame(replace(scene, things=(thing,), motion=motion), 0.5)
        return replace(scene, things=middle.things, motion=motion)


@lru_cache(maxsize=1024)
def _holders(colour: str, combos: Sequence[Combination]) -> tuple[Combination, ...]:
    """What a thing of this colour can lie inside of and still stand out, plain where possible."""
    seen = [c for c in combos if c[0] in CONTAINERS and contrast(COLOURS[c[1]], COLOURS[colour]) >= CONTRAST]
    return tuple(c for c in seen if c[2] == "plain") or tuple(seen)


def _place(place: str, radius: float, u: float, v: float) -> tuple[float, float]:
    """A centre in one of the nine cells, clear of its borders and with the thing inside the picture."""
    edge = 0.012 + REACH * radius
    low, high = SIDES[0] - 0.025, SIDES[1] + 0.025

    def along(side: str, t: float) -> float:
        if side == "low":
            return _between(min(edge, low), low, t)
        if side == "high":
            return _between(high, max(1 - edge, high), t)
        return _between(0.45, 0.55, t)

    column = "low" if "left" in place else "high" if "right" in place else "mid"
    row = "low" if "top" in place else "high" if "bottom" in place else "mid"
    x, y = (min(1 - edge, max(edge, c)) for c in (along(column, u), along(row, v)))  # a very large thing moves inwards
    return x, y


def frame(scene: Scene, time: float) -> Scene:
    """A clip's scene at `time` in [0, 1]: the first thing moved, recoloured or left out. Relations do not survive."""
    motion = scene.motion
    if motion is None:
        return scene
    if (motion.event == "vanishes" and time >= motion.when) or (motion.event == "appears" and time < motion.when):
        return replace(scene, things=scene.things[1:])
    thing = scene.things[0]
    x, y = (_between(a, b, time) for a, b in zip(motion.start, motion.end, strict=True))
    thing = replace(thing, x=x, y=y)
    if motion.colour_after and time >= motion.when:
        rgb = COLOURS[motion.colour_after]
        thing = replace(thing, colour=motion.colour_after, rgb=rgb, second=second_colour(rgb))
    return replace(scene, things=(thing, *scene.things[1:]))
