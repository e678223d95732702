"""What is true of a scene, in words: short, long and paraphrased captions, and negatives wrong in exactly one point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from ecliptic.data.scenes.world import (
    COLOURS,
    DEFECTS,
    DIRECTIONS,
    POSITIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
)

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WHERE = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
    "top left": "in the top left",
    "top right": "in the top right",
    "bottom left": "in the bottom left",
    "bottom right": "in the bottom right",
}
LIGHT = {
    "even": "evenly lit",
    "bright": "brightly lit",
    "dim": "dimly lit",
    "backlit": "lit from behind",
    "lit from the left": "lit from the left",
    "lit from the right": "lit from the right",
}
GROUND = {
    "plain": "a plain {} background",
    "gradient": "a {} gradient",
    "cloudy": "a cloudy {} background",
    "tiled": "a tiled {} background",
    "lined": "a lined {} background",
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NAMES = ("size", "texture", "colour", "shape")  # the order in which a phrase names them


@dataclass(frozen=True)
class Fact:
    """What a phrase says of one thing; None is left unsaid."""

    shape: str | None
    colour: str | None = None
    texture: str | None = None
    size: str | None = None
    position: str | None = None

    def noun(self, plural: bool = False) -> str:
        """ "small striped red circle" or "small striped red circles"."""
        shape = self.shape or "thing"
        if plural:
            shape = {"cross": "crosses"}.get(shape, shape + "s")
        return " ".join(word for word in (self.size, self.texture, self.colour, shape) if word)

    def phrase(self) -> str:
        words = with_article(self.noun())
        return f"{words} {WHERE[self.position]}" if self.position else words


@dataclass(frozen=True)
class Said:
    """A caption in parts: what it says and in which form."""

    form: str  # "list", "relation", "count", "defect", "clip"
    facts: tuple[Fact, ...]
    relation: str | None = None
    count: int = 1
    defect: str | None = None
    event: str | None = None
    style: str = "filled"

    def text(self) -> str:
        if self.form == "relation":
            words = f"{self.facts[0].phrase()} {self.relation} {self.facts[1].phrase()}"
        elif self.form == "count":
            words = f"{NUMBERS[self.count]} {self.facts[0].noun(plural=self.count != 1)}"
        elif self.form == "defect":
            noun = self.facts[0].noun()
            words = f"{with_article(noun)} with a {self.defect}" if self.defect else f"an undamaged {noun}"
        elif self.form == "clip":
            words = f"{self.facts[0].phrase()} {self.event}"
        else:
            words = _list([fact.phrase() for fact in self.facts])
        return f"a line drawing of {words}" if self.style == "drawing" else words


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _list(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def fact(thing: Thing, names: Sequence[str], *, plain: bool = False, position: bool = False) -> Fact:
    """What to say of a thing if only `names` may be named. plain: say "plain" too instead of leaving it out."""
    texture = thing.texture if "texture" in names and (plain or thing.texture != "plain") else None
    return Fact(
        thing.shape if "shape" in names else None,
        thing.colour if "colour" in names else None,
        texture,
        thing.size if "size" in names else None,
        thing.position if position else None,
    )


def event_words(scene: Scene) -> str | None:
    """What happens in a clip, to follow a noun: "moving to the right"."""
    motion = scene.motion
    if motion is None:
        return None
    if motion.event == "moves":
        return _moving(motion.direction or "right")
    if motion.event == "changes colour":
        return f"turning {motion.colour_after}"
    return {"appears": "appearing", "vanishes": "vanishing", "rests": "at rest"}[motion.event]


def _moving(direction: str) -> str:
    return f"moving {direction}" if direction in ("up", "down") else f"moving to the {direction}"


def said(scene: Scene, names: Sequence[str], *, plain: bool = False, everything: bool = False) -> Said:
    """The one-line caption of a scene. everything: sizes and positions too, where a single thing has them to itself."""
    if scene.kind == "count":
        shape, colour, texture = scene.counted or ("", "", "")
        named = Fact(
            shape if "shape" in names else None,
            colour if "colour" in names else None,
            texture if "texture" in names and (plain or texture != "plain") else None,
        )
        return Said("count", (named,), count=scene.count, style=scene.style)
    several = len(scene.things) > 1
    facts = tuple(
        fact(t, names, plain=plain, position=everything and scene.kind == "single" and not several)
        for t in scene.things
    )
    if scene.kind == "pair":
        return Said("relation", facts, relation=scene.relation, style=scene.style)
    if scene.kind == "defect":
        return Said("defect", facts, defect=scene.defect.kind if scene.defect else None, style=scene.style)
    if scene.kind == "video":
        return Said("clip", facts, event=event_words(scene), style=scene.style)
    return Said("list", facts, style=scene.style)


def short_caption(scene: Scene, names: Sequence[str]) -> str:
    """What `names` allows to be named and no more; "plain" goes without saying."""
    return said(scene, names).text()


def full_caption(scene: Scene) -> str:
    """One line with everything that its form can hold: `negatives` differ from this one."""
    return _full(scene).text()


def _full(scene: Scene) -> Said:
    names = NAMES if scene.kind in ("single", "defect", "video") else NAMES[1:]
    return said(scene, names, plain=True, everything=True)


def paraphrases(scene: Scene) -> list[str]:
    """Different true captions: other words, other choices of what to name. The first is the full one."""
    brief = said(scene, ("colour", "shape")).text()
    middle = said(scene, NAMES[1:]).text()
    texts = [full_caption(scene), middle, brief, f"a picture of {middle}"]
    ground = GROUND[scene.background].format(scene.ground_name)
    if scene.kind == "single" and scene.style == "filled":
        thing = scene.things[0]
        short = fact(thing, ("colour", "shape"))
        bare = fact(thing, ("shape",))
        texts += [
            short.noun(),
            f"{with_article(bare.noun())} that is {thing.colour}",
            f"there is {fact(thing, NAMES[2:], position=True).phrase()}",
            f"{fact(thing, ('size', 'colour', 'shape')).phrase()} on {with_article(scene.ground_name)} background",
            f"one {thing.texture} {thing.shape}, {thing.size} and {thing.colour}",
        ]
    elif scene.kind == "pair" and scene.relation:
        a, b = said(scene, ("colour", "shape")).facts
        if scene.relation in OPPOSITE:
            texts.append(f"{b.phrase()} {OPPOSITE[scene.relation]} {a.phrase()}")
        else:
            texts.append(f"{b.phrase()} with {a.phrase()} in it")
        texts.append(f"{a.phrase()} and {b.phrase()}")
    elif scene.kind == "multi":
        texts.append(
            f"a picture with {NUMBERS[len(scene.things)]} thing{'s' if len(scene.things) > 1 else ''}: {brief}"
        )
        texts.append(_list([fact(t, ("shape",)).phrase() for t in scene.things]))
    elif scene.kind == "count":
        texts.append(f"there {'is' if scene.count == 1 else 'are'} {brief}")
    texts.append(f"{brief} on {ground}")
    return list(dict.fromkeys(texts))


def long_caption(scene: Scene) -> str:
    """Every attribute, in sentences."""
    drawn = "line drawing" if scene.style == "drawing" else "clip" if scene.motion else "picture"
    things = scene.things
    sentences = []
    facts = [fact(t, NAMES, plain=True, position=scene.motion is None) for t in things]
    if not things:
        sentences.append(f"The {drawn} shows nothing.")
    elif len(things) == 1:
        sentences.append(f"The {drawn} shows {facts[0].phrase()}.")
    else:
        sentences.append(f"The {drawn} shows {NUMBERS[len(things)]} things.")
        sentences.append(f"There is {_list([f.phrase() for f in facts])}.")
    if scene.kind == "count":
        sentences.append(f"It has {said(scene, NAMES[1:]).text().removeprefix('a line drawing of ')}.")
    if scene.relation:
        a, b = (fact(t, ("colour", "shape")).noun() for t in things[:2])
        sentences.append(f"The {a} is {scene.relation} the {b}.")
    if scene.kind == "defect":
        sentences.append(f"The {things[0].shape} has a {scene.defect.kind}." if scene.defect else "It is undamaged.")
    if scene.motion:
        middle = {
            "moves": f"moves {_moving(scene.motion.direction or 'right').removeprefix('moving ')}",
            "changes colour": f"turns {scene.motion.colour_after}",
            "appears": "appears",
            "vanishes": "vanishes",
            "rests": "stays where it is",
        }[scene.motion.event]
        sentences.append(f"The {things[0].shape} {middle}.")
    sentences.append(f"Behind is {GROUND[scene.background].format(scene.ground_name)}.")
    sentences.append(f"The scene is {LIGHT[scene.lighting]}.")
    return " ".join(sentences)


def negatives(scene: Scene, r: Random) -> dict[str, str]:
    """What is wrong -> a caption that differs from `full_caption(scene)` in exactly that and is false of the scene."""
    truth = _full(scene)
    wrong: dict[str, Said] = {}
    present = {(t.shape, t.colour) for t in scene.things}

    def other(values: Sequence[str], *but: str | None) -> str:
        rest = [v for v in values if v not in but]
        return rest[int(r.random() * len(rest))]

    at = int(r.random() * len(truth.facts))  # the thing to lie about
    f = truth.facts[at]

    def lie(**change: Any) -> Said:
        return replace(truth, facts=(*truth.facts[:at], replace(f, **change), *truth.facts[at + 1 :]))

    if truth.form == "count" and truth.count == 0:  # "no blue stars" would be true of most pictures
        return {"count": replace(truth, count=1).text()}
    wrong["colour"] = lie(colour=other(tuple(COLOURS), f.colour, *(c for s, c in present if s == f.shape)))
    wrong["shape"] = lie(shape=other(SHAPES, f.shape, *(s for s, c in present if c == f.colour)))
    wrong["texture"] = lie(texture=other(TEXTURES[:4], f.texture))
    if f.size:
        wrong["size"] = lie(size=other(tuple(SIZES), f.size))
    if f.position:
        wrong["position"] = lie(position=other(POSITIONS, f.position))
    if truth.form == "relation":
        a, b = truth.facts
        wrong["order"] = replace(truth, facts=(b, a))
        if truth.relation in OPPOSITE:
            wrong["relation"] = replace(truth, relation=OPPOSITE[truth.relation])
        if a.colour != b.colour and a.shape != b.shape:
            wrong["binding"] = replace(truth, facts=(replace(a, colour=b.colour), replace(b, colour=a.colour)))
    if truth.form == "count":
        near = [n for n in (truth.count - 1, truth.count + 1) if 1 <= n <= 9]
        wrong["count"] = replace(truth, count=near[int(r.random() * len(near))])
    if truth.form == "defect":
        wrong["defect"] = replace(truth, defect=None if truth.defect else other(DEFECTS))
        if truth.defect:
            wrong["kind of defect"] = replace(truth, defect=other(DEFECTS, truth.defect))
    if scene.motion:
        if scene.motion.direction:
            wrong["direction"] = replace(truth, event=_moving(other(tuple(DIRECTIONS), scene.motion.direction)))
        events = {"moves": _moving("left"), "appears": "appearing", "vanishes": "vanishing", "rests": "at rest"}
        wrong["event"] = replace(truth, event=events[other(tuple(events), scene.motion.event)])
    return {kind: caption.text() for kind, caption in wrong.items()}


def attributes(scene: Scene) -> dict[str, Any]:
    """What can be asked of a scene. Of several things the first gives shape, colour, texture, size and position."""
    things = [
        {"shape": t.shape, "colour": t.colour, "texture": t.texture, "size": t.size, "position": t.position}
        for t in scene.things
    ]
    shape, colour, texture = scene.counted or ("", "", "")
    first = things[0] if things else {"shape": shape, "colour": colour, "texture": texture, "size": "", "position": ""}
    if scene.kind == "count":
        first = {**first, "shape": shape, "colour": colour, "texture": texture}
    return {
        **first,
        "kind": scene.kind,
        "count": scene.count if scene.kind == "count" else len(things),
        "relation": scene.relation or "",
        "background": scene.background,
        "ground": scene.ground_name,
        "lighting": scene.lighting,
        "defect": scene.defect.kind if scene.defect else "none",
        "event": scene.motion.event if scene.motion else "",
        "direction": (scene.motion.direction or "") if scene.motion else "",
        "style": scene.style,
        "things": things,
    }
