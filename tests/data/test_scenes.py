"""Rendered scenes against slow, separate geometry and against what their captions say."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from PIL import Image

from ecliptic.data import scenes as package
from ecliptic.data.scenes import (
    COLOURS,
    DEFECTS,
    GROUNDS,
    KINDS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    draw,
    held_out,
    render,
    scenes,
)
from ecliptic.data.scenes.words import WHERE
from ecliptic.data.scenes.world import REACH, contrast

# ------------------------------------------------------------------------------------------------ a slow renderer


def polygon(*points):
    """Even-odd rule, point by point."""

    def holds(x, y):
        inside = False
        for (ax, ay), (bx, by) in zip(points, (*points[1:], points[0]), strict=True):
            if (ay > y) != (by > y) and x < ax + (y - ay) / (by - ay) * (bx - ax):
                inside = not inside
        return inside

    return holds


def around(radius, angle):
    return radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))


STAR = [around(1.06 if k % 2 == 0 else 0.5, -90 + 36 * k) for k in range(10)]
PLUS = [(0.32, 0.96), (0.32, 0.32), (0.96, 0.32), (0.96, -0.32), (0.32, -0.32), (0.32, -0.96)]
HELD = {
    "circle": lambda x, y: math.hypot(x, y) < 0.92,
    "square": polygon((-0.76, -0.76), (0.76, -0.76), (0.76, 0.76), (-0.76, 0.76)),
    "triangle": polygon(*(around(1.08, a) for a in (-90, 30, 150))),
    "star": polygon(*STAR),
    "cross": polygon(*PLUS, *((-x, -y) for x, y in PLUS)),
    "ring": lambda x, y: 0.53 < math.hypot(x, y) < 0.94,
    "heart": lambda x, y: (
        polygon((0, -0.61), (0.82, 0.21), (0, 1.03), (-0.82, 0.21))(x, y)
        or math.hypot(abs(x) - 0.41, y + 0.2) < 0.41 * math.sqrt(2)
    ),
    "crescent": lambda x, y: math.hypot(x - 0.29, y) < 0.86 and math.hypot(x - 0.67, y) > 0.65,
    "hexagon": polygon(*(around(0.84 / math.cos(math.radians(30)), a) for a in range(30, 390, 60))),
    "diamond": polygon((0.64, 0), (0, 1.04), (-0.64, 0), (0, -1.04)),
}


def slow_mask(scene: Scene, size: int) -> np.ndarray:
    """Painter's algorithm, one pixel centre at a time; -1 where a pixel lies on an outline to within rounding."""
    mask = np.zeros((size, size), int)
    order = list(enumerate(scene.things, start=1))
    if scene.relation == "inside":
        order.reverse()
    for k, t in order:
        for i, j in product(range(size), range(size)):
            x, y = ((j + 0.5) / size - t.x) / t.r, ((i + 0.5) / size - t.y) / t.r
            x, y = x * math.cos(t.angle) + y * math.sin(t.angle), y * math.cos(t.angle) - x * math.sin(t.angle)
            votes = {HELD[t.shape](x + a, y + b) for a, b in ((0, 0), (1e-4, 0), (-1e-4, 0), (0, 1e-4), (0, -1e-4))}
            if len(votes) == 2:
                mask[i, j] = -1
            elif votes == {True}:
                mask[i, j] = k
    return mask


def test_the_oracle_knows_every_shape():
    assert set(HELD) == set(SHAPES)
    assert len(SHAPES) >= 8
    assert len(COLOURS) >= 8


@pytest.mark.parametrize("shape", SHAPES)
def test_mask_of_each_shape_equals_a_slow_one(shape):
    thing = Thing(shape, "red", "plain", 0.53, 0.46, 0.4, COLOURS["red"], COLOURS["red"], angle=0.3)
    scene = Scene("single", (thing,), "grey", GROUNDS["grey"])
    slow = slow_mask(scene, 48)
    fast = render([scene], 48).masks[0]
    assert ((fast == slow) | (slow == -1)).all()
    assert (slow == -1).sum() < 10


@pytest.mark.parametrize("kind", ["single", "pair", "multi", "count"])
def test_masks_and_boxes_equal_slow_ones(kind):
    for record, scene in zip(
        scenes("val", 5, 1, 40, kind=kind), draw("val", range(5), 1, 40, kind=kind).scenes, strict=True
    ):
        slow = slow_mask(scene, 40)
        assert record["mask"].dtype == np.uint8
        assert ((record["mask"] == slow) | (slow == -1)).all()
        for k in range(len(scene.things)):
            pixels = [(i, j) for i, j in product(range(40), range(40)) if record["mask"][i, j] == k + 1]
            rows, columns = zip(*pixels, strict=True)
            assert record["boxes"][k].tolist() == [min(columns), min(rows), max(columns) + 1, max(rows) + 1]
        assert len(record["boxes"]) == len(record["phrases"]) == len(record["attributes"]["things"])


# ------------------------------------------------------------------------------------------------ determinism


@pytest.mark.parametrize("kind", KINDS)
def test_a_scene_depends_on_seed_and_index_alone(kind):
    many, few = scenes("train", 30, 3, 32, kind=kind), scenes("train", 9, 3, 32, kind=kind)
    for i in (8, 2, 5):
        a, b = many[i], few[i]
        assert a.keys() == b.keys()
        assert np.array_equal(a["image"], b["image"])
        assert np.array_equal(a["mask"], b["mask"])
        for key in ("id", "caption", "captions", "negatives", "long_caption", "label"):
            assert a[key] == b[key]
    assert len(set(many.column("id"))) == 30


def test_what_is_drawn_beside_a_scene_does_not_touch_it():
    together = draw("train", range(200), size=32, kind="mixed", noise=0.05, clutter=3)
    for i in (0, 17, 199):
        alone = draw("train", [i], size=32, kind="mixed", noise=0.05, clutter=3)
        assert np.array_equal(alone.images[0], together.images[i])
        assert np.array_equal(alone.masks[0], together.masks[i])
        assert alone.captions[0] == together.captions[i]
    record = scenes("train", 20, size=32, kind="mixed", noise=0.05, clutter=3)[17]
    assert np.array_equal(record["image"], together.images[17])
    assert record["caption"] == together.captions[17]


def test_streams_are_disjoint():
    pictures = [
        image.tobytes()
        for split, seed in product(package.SPLITS, (0, 1, -1))
        for image in draw(split, range(20), seed, 24).images
    ]
    assert len(set(pictures)) == len(pictures)


@pytest.mark.parametrize("kind", ["single", "pair", "multi"])
def test_size_changes_only_the_resolution(kind):
    large, small = draw("test", range(12), size=256, kind=kind), draw("test", range(12), size=32, kind=kind)
    shrunk = large.images.reshape(12, 32, 8, 32, 8, 3).mean((2, 4))
    assert np.abs(shrunk - small.images).mean() < 4  # of 255
    share = (large.masks > 0).mean((1, 2)) / (small.masks > 0).mean((1, 2))
    assert (np.abs(share - 1) < 0.15).all()
    assert large.captions == small.captions


def test_a_shift_keeps_what_it_does_not_shift():
    plain = scenes("test", 30).column("attributes")
    for shift in (
        {"size_range": (0.36, 0.42)},
        {"noise": 0.1},
        {"clutter": 9},
        {"lightings": ["dim"]},
        {"backgrounds": ["tiled"]},
    ):
        for a, b in zip(plain, scenes("test", 30, **shift).column("attributes"), strict=True):
            assert [a[k] for k in ("shape", "colour", "texture")] == [b[k] for k in ("shape", "colour", "texture")]


@pytest.mark.parametrize("kind", ["mixed", "video", "defect"])
def test_a_batch_is_what_indexing_gives(kind):
    records = scenes("train", 40, 1, 32, kind=kind, clean=True)[5:35][[3, 1, 20]]
    for one, many in zip(records, records.batch([0, -2, 2]), strict=True):
        assert one.keys() == many.keys()
        for key, value in one.items():
            if key in ("frames", "removed"):
                assert all(np.array_equal(a, b) for a, b in zip(value, many[key], strict=True))
            else:
                assert np.array_equal(value, many[key]) if key != "attributes" else value == many[key]
    with pytest.raises(IndexError):
        records.batch([3])


def test_columns_are_read_without_drawing(monkeypatch):
    records = scenes("train", 20, label=("colour", "shape"))
    monkeypatch.setattr(package, "render", None)
    assert len(records.column("caption")) == 20
    assert all(re.fullmatch(r"\w+ \w+", label) for label in records.column("label"))
    with pytest.raises(TypeError):
        records[0]


# ------------------------------------------------------------------------------------------------ pictures


def test_nothing_is_clipped_or_hidden():
    for kind in ("single", "pair", "multi", "count", "defect", "video"):
        for scene, mask in zip(
            *(lambda b: (b.scenes, b.masks))(draw("train", range(150), size=48, kind=kind)), strict=True
        ):
            border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
            assert not border.any(), scene
            for k in range(len(scene.things)):
                assert (mask == k + 1).sum() >= 12, scene


def test_no_outline_reaches_further_than_is_reserved_for_it():
    for holds in HELD.values():
        assert not any(holds(*around(REACH, angle)) for angle in range(360))


def test_a_very_large_thing_stays_inside():
    masks = draw("train", range(60), size=32, size_range=(0.45, 0.45)).masks
    assert not masks[:, [0, -1]].any()
    assert not masks[:, :, [0, -1]].any()


def test_things_stand_out_from_their_background():
    """Mean colours of a thing and of a belt around it, in CIE L*a*b*, as drawn and lit."""
    batch = draw("train", range(300), size=48, textures=["plain"])
    for image, mask, scene in zip(batch.images, batch.masks, batch.scenes, strict=True):
        thing = mask > 0
        near = np.zeros_like(thing)
        for i, j in product(range(-5, 6), repeat=2):
            near |= np.roll(thing, (i, j), (0, 1))
        inner, outer = image[thing].mean(0) / 255, image[near & ~thing].mean(0) / 255
        assert contrast(inner, outer) > 15, scene


def test_colours_are_the_named_ones():
    """In even light the middle tone of a plain thing is nearest to its own colour of all."""
    batch = draw("train", range(200), size=48, textures=["plain"], lightings=["even"])
    for image, mask, scene in zip(batch.images, batch.masks, batch.scenes, strict=True):
        seen = np.median(image[mask == 1], axis=0) / 255
        assert min(COLOURS, key=lambda name: contrast(COLOURS[name], seen)) == scene.things[0].colour


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_paint_two_colours_and_the_main_one_prevails(texture):
    thing = Thing(
        "square", "yellow", texture, 0.5, 0.5, 0.4, (1.0, 1.0, 0.0), (0.0, 0.0, 1.0), 0.1, 0.6, 0.3, shadow=0.0
    )
    picture = render([Scene("single", (thing,), "grey", GROUNDS["grey"])], 200)
    blue = picture.images[0][50:150, 50:150, 2].ravel() / 255  # well inside
    share = blue.mean()
    assert share == 0 if texture == "plain" else 0.15 < share < 0.53
    assert ((blue > 0.02) & (blue < 0.98)).mean() < 0.25  # crisp: in-between tones only along the edges


def test_light():
    base = draw("test", range(40), lightings=["even"]).images.mean((1, 2, 3))
    assert (draw("test", range(40), lightings=["dim"]).images.mean((1, 2, 3)) < 0.7 * base).all()
    assert (draw("test", range(40), lightings=["bright"]).images.mean((1, 2, 3)) > base + 5).all()
    left = draw("test", range(40), lightings=["lit from the left"], backgrounds=["plain"]).images
    assert (left[:, :, :8].mean((1, 2, 3)) > left[:, :, -8:].mean((1, 2, 3))).all()
    back, even = (
        draw("test", range(40), lightings=[kind]).images.sum(-1).astype(float) for kind in ("backlit", "even")
    )
    ratio = back / np.maximum(even, 1)
    corners = np.stack([ratio[:, :6, :6], ratio[:, -6:, -6:], ratio[:, :6, -6:], ratio[:, -6:, :6]]).mean((0, 2, 3))
    assert (ratio[:, 26:38, 26:38].mean((1, 2)) < 0.75).all()
    assert (corners > 1.4 * ratio[:, 26:38, 26:38].mean((1, 2))).all()
    record = scenes("test", 3, lightings=["dim"], noise=0.1, clean=True)[1]
    clean = scenes("test", 3, lightings=["even"])[1]
    assert np.array_equal(record["clean"], clean["image"])


def test_noise_has_the_stated_spread():
    def grey(noise):
        return draw(
            "test", range(8), size=64, noise=noise, lightings=["dim"], grounds=["grey"], backgrounds=["plain"]
        ).images

    spread = (grey(0.04).astype(float) - grey(0.0)).std() / 255
    assert abs(spread - 0.04) < 0.002


# ------------------------------------------------------------------------------------------------ words

ATTRIBUTES = {"colour": tuple(COLOURS), "shape": SHAPES, "texture": TEXTURES, "size": tuple(SIZES)}


def parse(phrase: str) -> dict[str, str]:
    """ "a small plain red circle on the left" -> its attributes, one word each."""
    found = {}
    for position, words in WHERE.items():
        if phrase.endswith(" " + words):
            found["position"] = position
            phrase = phrase.removesuffix(" " + words)
    for word in phrase.split():
        singular = {"crosses": "cross"}.get(word, word if word == "cross" else word.removesuffix("s"))
        for name, values in ATTRIBUTES.items():
            if singular in values:
                assert name not in found, phrase
                found[name] = singular
    return found


def fits(said: dict[str, str], thing: dict[str, str]) -> bool:
    return all(thing[name] == value for name, value in said.items())


def centroid(mask: np.ndarray, k: int) -> tuple[float, float]:
    rows, columns = np.nonzero(mask == k)
    return columns.mean() + 0.5, rows.mean() + 0.5


def related(relation: str, mask: np.ndarray, a: int, b: int) -> bool:
    """By centroids of the visible pixels; inside: the box of a within that of b."""
    if relation == "inside":
        ra, ca = np.nonzero(mask == a)
        rb, cb = np.nonzero(mask == b)
        return rb.min() < ra.min() and ra.max() < rb.max() and cb.min() < ca.min() and ca.max() < cb.max()
    (ax, ay), (bx, by) = centroid(mask, a), centroid(mask, b)
    return {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[relation]


def true_of(caption: str, record) -> bool:
    """A slow reader of one-line captions, apart from the writer."""
    things, mask = record["attributes"]["things"], record["mask"]
    number = {"no": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}.get(caption.split()[0])
    if number is not None:
        return sum(fits(parse(caption), t) for t in things) == number
    for relation in ("left of", "right of", "above", "below", "inside"):
        if f" {relation} " in caption:
            first, second = (parse(part) for part in caption.split(f" {relation} "))
            return any(
                fits(first, a) and fits(second, b) and related(relation, mask, i, j)
                for i, a in enumerate(things, 1)
                for j, b in enumerate(things, 1)
                if i != j
            )
    damage = record["attributes"]["defect"]
    if caption.startswith("an undamaged ") and damage != "none":
        return False
    if " with a " in caption:
        caption, claimed = caption.split(" with a ")
        if claimed != damage:
            return False
    return all(any(fits(parse(part), t) for t in things) for part in re.split(r", | and ", caption))


@pytest.mark.parametrize("kind", ["single", "pair", "multi", "count", "defect"])
def test_captions_are_true_and_negatives_false_in_one_point(kind):
    seen = set()
    for record in scenes("train", 120, 5, 32, kind=kind, distractors=(0, 2)):
        assert true_of(record["caption"], record), record["caption"]
        assert true_of(record["captions"][0], record), record["captions"]
        assert len(record["captions"]) >= 4
        assert len(record["negatives"]) == len(record["negative_kinds"]) >= 3
        for what, wrong in zip(record["negative_kinds"], record["negatives"], strict=True):
            assert not true_of(wrong, record), (wrong, record["captions"][0])
            seen.add(what)
            if what in ATTRIBUTES:  # one word changed, and it is of that kind
                a, b = (
                    [w for w in re.findall(r"\w+", text) if w not in ("a", "an")]
                    for text in (record["captions"][0], wrong)
                )
                changed = [(p, q) for p, q in zip(a, b, strict=True) if p != q]
                assert len(changed) == 1, (record["captions"][0], wrong)
                (one,) = changed
                assert parse(one[0]).keys() == parse(one[1]).keys() == {what}
    expected = {"colour", "shape", "texture"}
    extra = {
        "single": {"size", "position"},
        "pair": {"relation", "order", "binding"},
        "count": {"count"},
        "defect": {"size", "defect", "kind of defect"},
    }
    assert seen == expected | extra.get(kind, set())


def test_none_of_a_kind_is_counted_as_zero():
    records = scenes("train", 20, kind="count", count=(0, 0))
    for record in records:
        assert record["caption"].startswith("no ")
        assert true_of(record["caption"], record)
        assert len(record["boxes"]) >= 1
        assert not any(true_of(wrong, record) for wrong in record["negatives"])


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "mixed"])
def test_paraphrases_name_only_what_is_there(kind):
    for record in scenes("train", 60, 2, 32, kind=kind):
        facts = record["attributes"]
        for caption in (*record["captions"], record["long_caption"], *record["phrases"]):
            words = re.findall(r"\w+", caption)
            words = [w if w == "cross" else {"crosses": "cross"}.get(w, w.removesuffix("s")) for w in words]
            ok = {t[name] for t in facts["things"] for name in ATTRIBUTES} | {facts["ground"], facts["background"]}
            if facts["event"] == "changes colour":
                ok.add(caption.rstrip(".").split(" turning ")[-1].split(" turns ")[-1].split(".")[0].split(" ")[0])
            known = [w for w in words if any(w in values for values in ATTRIBUTES.values()) or w in GROUNDS]
            assert set(known) <= ok, caption
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption), caption


def test_long_captions_name_everything():
    for kind in ("single", "multi", "pair"):
        for record in scenes("train", 20, kind=kind):
            facts = record["attributes"]
            needed = [facts["ground"], *(t[name] for t in facts["things"] for name in ATTRIBUTES)]
            needed += [WHERE[t["position"]] for t in facts["things"]] + (
                [facts["relation"]] if facts["relation"] else []
            )
            assert all(word in record["long_caption"] for word in needed)


def test_relations_hold_by_centroids():
    seen = set()
    for record in scenes("train", 200, 4, 48, kind="pair"):
        relation = record["attributes"]["relation"]
        seen.add(relation)
        assert related(relation, record["mask"], 1, 2)
        if relation != "inside":
            (ax, ay), (bx, by) = centroid(record["mask"], 1), centroid(record["mask"], 2)
            along, across = abs(ax - bx), abs(ay - by)
            if relation in ("above", "below"):
                along, across = across, along
            assert along > across  # and not rather the other kind of relation
    assert seen == set(package.RELATIONS)


def test_positions_agree_with_centroids():
    for record in scenes("train", 150, size=48):
        x, y = (v / 48 - 0.5 for v in centroid(record["mask"], 1))
        away = {"left": -x, "right": x, "top": -y, "bottom": y}
        position = record["attributes"]["position"]
        if position == "centre":
            assert max(abs(x), abs(y)) < 0.12
        else:
            assert max(away, key=lambda k: away[k]) == position


def test_short_captions_name_what_they_may():
    assert all(re.fullmatch(r"an? \w+", c) for c in scenes("train", 20, names=["shape"]).column("caption"))
    sized = scenes("train", 20, names=("size", "colour", "shape"))
    assert all(
        c.split()[1] == a["size"] for c, a in zip(sized.column("caption"), sized.column("attributes"), strict=True)
    )


# ------------------------------------------------------------------------------------------------ distribution


def combos(split, attributes=("shape", "colour"), n=1500, **options):
    return {
        tuple(t[name] for name in attributes)
        for facts in scenes(split, n, **options).column("attributes")
        for t in facts["things"]
    }


@pytest.mark.parametrize("kind", ["single", "pair", "multi", "count"])
def test_held_out_combinations_occur_only_there(kind):
    apart = {(s, c) for s, c in product(SHAPES, COLOURS) if held_out(s, c, "plain", ("shape", "colour"))}
    assert len(apart) == 20
    seen = combos("train", kind=kind) | combos("val", kind=kind, n=300) | combos("test", kind=kind, n=300)
    assert not seen & apart
    assert {s for s, _ in seen} == set(SHAPES)
    assert {c for _, c in seen} == set(COLOURS)
    new = combos("heldout", kind=kind)
    assert new <= apart
    assert {s for s, _ in new} == set(SHAPES)
    assert {c for _, c in new} == set(COLOURS)


def test_changing_colour_does_not_leak_a_held_out_combination():
    for scene in draw("train", range(400), size=16, kind="video", events=["changes colour"]).scenes:
        after = scene.motion.colour_after
        assert after is None or not held_out(scene.things[0].shape, after, "plain", ("shape", "colour"))


def test_other_attributes_can_be_held_out():
    assert len(combos("train", n=3000, holdout=None)) == 100
    names = ("shape", "texture")
    assert not combos("train", names, holdout=names) & combos("heldout", names, holdout=names)
    with pytest.raises(ValueError, match="heldout"):
        scenes("heldout", holdout=None)
    with pytest.raises(ValueError, match="no combination"):
        scenes("train", shapes=["circle"], colours=["red"])


def test_zipf_and_spurious():
    counts = np.unique(
        scenes("train", 2000, zipf=1.2, label=("shape", "colour", "texture")).column("label"), return_counts=True
    )[1]
    assert counts.max() > 20 * np.median(counts)
    tied = scenes("train", 200, spurious=("shape", "texture", 1.0), textures=TEXTURES, holdout=None).column(
        "attributes"
    )
    pairs = {(a["shape"], a["texture"]) for a in tied}
    assert len(pairs) == len({s for s, _ in pairs})
    loose = scenes("train", 600, spurious=("shape", "lighting", 0.8), lightings=["even", "dim"]).column("attributes")
    agree = np.mean([(SHAPES.index(a["shape"]) % 2 == 0) == (a["lighting"] == "even") for a in loose])
    assert 0.85 < agree < 0.95


# ------------------------------------------------------------------------------------------------ defects and clips


def test_defects_lie_on_the_thing():
    seen = set()
    for record, scene in zip(
        scenes("train", 120, size=64, kind="defect", label="defect"),
        draw("train", range(120), size=64, kind="defect").scenes,
        strict=True,
    ):
        seen.add(record["label"])
        hurt, thing = record["defect_mask"] > 0, record["mask"] > 0
        whole = render([replace(scene, defect=None)], 64)
        if record["label"] == "none":
            assert not hurt.any()
            continue
        assert hurt.sum() >= 6, record["label"]
        assert not (hurt & (whole.masks[0] == 0)).any()
        changed = (np.abs(np.asarray(record["image"], int) - whole.images[0]) > 12).any(-1)
        assert changed[hurt].mean() > 0.6
        if record["label"] == "missing piece":
            assert not (hurt & thing).any()
            assert ((hurt | thing) == (whole.masks[0] > 0)).all()
        else:
            assert (hurt & ~thing).sum() == 0
            near = sum(np.roll(thing, (i, j), (0, 1)) for i, j in product((-1, 0, 1), repeat=2)) > 0
            assert not changed[~near].any()  # outside nothing happens but to the pixels that the outline cuts
    assert seen == {"none", *DEFECTS}
    assert not any(r["defect_mask"].any() for r in scenes("train", 10, kind="defect", defect_rate=0.0))


def test_clips_show_what_their_captions_say():
    seen = set()
    for record in scenes("train", 60, size=32, kind="video", frames=6):
        event, there = record["attributes"]["event"], record["frame_masks"].any((1, 2))
        seen.add(event)
        assert len(record["frames"]) == len(record["removed"]) == 6
        assert isinstance(record["frames"][0], Image.Image)
        assert record["frame_boxes"].shape == (6, 1, 4)
        frames = np.stack([np.asarray(f, int) for f in record["frames"]])
        empty = np.asarray(record["removed"][0], int)
        far = np.abs(frames - empty).max(-1)
        assert (far[~there] == 0).all()
        assert (far[record["frame_masks"] > 0] > 12).mean() > 0.8
        boxes = record["frame_boxes"][:, 0]
        if event == "moves":
            way = {"right": (0, 1), "left": (0, -1), "down": (1, 1), "up": (1, -1)}[record["attributes"]["direction"]]
            assert (np.diff(boxes[:, way[0]]) * way[1] > 0).all()
        elif event == "appears":
            assert not there[0]
            assert there[-1]
        elif event == "vanishes":
            assert there[0]
            assert not there[-1]
        else:
            assert (boxes == boxes[0]).all()
            assert (np.abs(frames[0] - frames[-1]).max() > 30) == (event == "changes colour")
    assert seen == set(package.EVENTS)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "training"}, "no split 'training'"),
        ({"kind": "triple"}, "no kind 'triple'"),
        ({"size": 8}, "at least 16"),
        ({"n": -1}, "negative"),
        ({"colour": ["red"]}, "no option 'colour'"),
        ({"colours": ["crimson"]}, "crimson"),
        ({"colours": []}, "colours is empty"),
        ({"size_range": (0.4, 0.2)}, "size_range"),
        ({"size_range": (0.2, 0.8)}, "size_range"),
        ({"label": "hue"}, "no attribute 'hue'"),
        ({"names": ["hue"]}, "names has 'hue'"),
        ({"noise": 3.0}, "noise"),
        ({"style": "oil"}, "style"),
        ({"count": (3, 12)}, "count"),
        ({"spurious": ("shape", "colour", 1.0)}, "spurious"),
        ({"frames": 1}, "frames"),
    ],
)
def test_errors_name_the_field(arguments, message):
    with pytest.raises(ValueError, match=message):
        scenes(**arguments)
