"""How well `ecliptic find` boxes things, and says that they are not there, on photographs with known things in them.

    python -m benchmarks.find              # the reporting half; writes benchmarks/results/find.json and into docs/find.md
    python -m benchmarks.find calibrate    # the choosing half: LIMIT and SLOPE of ecliptic.apps.find, looks, Soft-NMS

Tux Paint stamps (alpha masks, so that boxes are exact; the "offline" model has never seen them) are pasted onto photographs,
each with a second one of another kind to lead astray, and asked for by their English caption. Stamps fall into two halves by a
hash of their name, photographs by hand; nothing of the reporting half was used to choose a setting. Compared are, on the same
pictures: a box around the whole picture; the best connected part of the heat map; the best window by the map; both without
encoding any; and what `find` gives, from windows alone and from both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.measure import RESULTS, commit, machine
from ecliptic.apps.find import ASPECTS, LEVELS, LIMIT, SCALES, SIGMA, SLOPE, SMALLEST, STEP, WORTH, Finder, Found
from ecliptic.core.encoder import HFEncoder, load
from ecliptic.data.sources import open_source
from ecliptic.methods.detect.soft_nms import soft_nms
from ecliptic.ops.boxes import box_iou
from ecliptic.ops.regions import level_boxes, ring_contrast, soft_iou, windows

PAGE = RESULTS.parents[1] / "docs" / "find.md"
PHOTOS = {
    "choose": ("motorcycle_left", "astronaut", "flower", "grass", "camera"),
    "report": ("coffee", "china", "rocket", "chelsea", "gravel"),
}
SIDE = 600  # the photographs' longer side
SIZES = {
    "small": 0.3,
    "middle": 0.5,
    "large": 0.75,
}  # longer side of the stamp, as a share of the photograph's shorter one
OTHER = 0.4  # the same of the stamp that is not asked for, and of each of two alike
KINDS = ("animals", "food", "vehicles", "household", "clothes", "hobbies", "sports", "military")
LEAST = 60  # pixels a side of a stamp

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Stamp:
    """kind: its top folder. caption: of up to four plain words. picture, mask: cut to the mask's own box."""

    kind: str
    caption: str
    picture: Image.Image
    mask: Image.Image


@dataclass(frozen=True)
class Scene:
    """picture: with `boxes`, where what `caption` says is (one, or two alike). absent: the caption of what is not there."""

    picture: Image.Image
    caption: str
    boxes: list[Box]
    absent: str
    size: str


def stamps(half: str) -> list[Stamp]:
    """Those of one half that are photographs or careful drawings of one thing with a plain name."""
    found = []
    for record in open_source("stamps"):
        name, kind = str(record["id"]).removeprefix("stamps/"), record["category"][0]
        words = record["caption"].rstrip(".!")
        digest = int(hashlib.md5(name.encode()).hexdigest(), 16) % 2
        if ("choose", "report")[digest] != half or kind not in KINDS or "cartoon" in name:
            continue
        if not re.fullmatch(r"(An? )?[A-Za-z -]+", words) or len(words.split()) > 4:
            continue
        box = record["mask"].point(lambda v: 255 if v >= 128 else 0).getbbox()
        if box is not None and min(box[2] - box[0], box[3] - box[1]) >= LEAST:
            caption = words[0].lower() + words[1:]
            found.append(Stamp(kind, caption, record["image"].crop(box), record["mask"].crop(box)))
    return found


def photographs(half: str) -> list[Image.Image]:
    found = {str(record["id"]).removeprefix("photos/"): record["image"] for record in open_source("photos")}
    scaled = []
    for name in PHOTOS[half]:
        picture = found[name].convert("RGB")
        share = SIDE / max(picture.size)
        size = (round(picture.width * share), round(picture.height * share))
        scaled.append(picture.resize(size, Image.Resampling.BICUBIC))
    return scaled


def scenes(
    half: str, number: int, sizes: Sequence[str] = tuple(SIZES), alike: int = 1, seed: int = 0
) -> Iterator[Scene]:
    """alike: how many times the thing is there."""
    draw = random.Random(seed)
    things, views = stamps(half), photographs(half)
    draw.shuffle(things)
    made = 0
    while made < number:
        thing, size = things[made % len(things)], sizes[made % len(sizes)]
        picture = draw.choice(views).copy()
        boxes: list[Box] = []
        for _ in range(alike):
            paste(picture, thing, OTHER if alike > 1 else SIZES[size], draw, boxes)
        if len(boxes) < alike:
            continue  # no room for two of them in this photograph: draw another
        other = draw.choice([stamp for stamp in things if stamp.kind != thing.kind])
        paste(picture, other, OTHER, draw, list(boxes))
        absent = draw.choice([stamp for stamp in things if stamp.kind not in (thing.kind, other.kind)])
        yield Scene(picture, thing.caption, boxes, absent.caption, size)
        made += 1


def paste(picture: Image.Image, stamp: Stamp, share: float, draw: random.Random, taken: list[Box]) -> None:
    """Put the stamp somewhere where it covers none of `taken`, and add its box there; if that fails 200 times, do nothing."""
    factor = share * min(picture.size) / max(stamp.picture.size)
    wide, tall = (max(1, round(side * factor)) for side in stamp.picture.size)
    for _ in range(200):
        x, y = draw.randint(0, picture.width - wide), draw.randint(0, picture.height - tall)
        if all(x >= b[2] or b[0] >= x + wide or y >= b[3] or b[1] >= y + tall for b in taken):
            mask = stamp.mask.resize((wide, tall), Image.Resampling.LANCZOS)
            picture.paste(stamp.picture.resize((wide, tall), Image.Resampling.LANCZOS), (x, y), mask)
            taken.append((x, y, x + wide, y + tall))
            return


# What is compared


def candidates(found: Found) -> dict[str, Tensor]:
    """The best box (4,) of each way."""
    width, height = found.size
    rows, columns = found.heat.shape
    pixels = torch.tensor([width / columns, height / rows] * 2)
    parts = level_boxes(found.heat, LEVELS, smallest=SMALLEST)
    some = windows(columns, rows, scales=SCALES, aspects=ASPECTS, step=STEP)
    everything = torch.cat([parts, some])
    whole = torch.tensor([0.0, 0, width, height])
    own = torch.tensor([kind == "windows" for kind in found.proposal_kinds])
    best_window = found.proposal_scores.where(own, -1.0).argmax()
    return {
        "whole picture": whole,
        "best part of the map": _best(found.heat, parts) * pixels if len(parts) else whole,
        "best window by the map": _best(found.heat, some) * pixels,
        "best of both by the map": _best(found.heat, everything) * pixels,
        "find, windows alone": found.proposals[best_window] if bool(own.any()) else whole,
        "find": found.boxes[0],
    }


def _best(heat: Tensor, boxes: Tensor) -> Tensor:
    return boxes[(ring_contrast(heat, boxes).clamp(min=0) * soft_iou(heat, boxes)).argmax()]


def overlap(box: Tensor, truth: Sequence[Box]) -> float:
    """Best IoU of one box with the true ones."""
    return float(box_iou(box[None], torch.tensor(truth, dtype=torch.float32)).max())


def both(found: Found, truth: Sequence[Box], sigma: float, worth: float) -> tuple[int, int]:
    """After Soft-NMS: how many of the true boxes some box meets at IoU 0.5, and how many boxes meet none."""
    kept = soft_nms(found.proposals, found.proposal_scores, sigma=sigma, max_out=5)
    boxes = found.proposals[kept.keep[kept.scores >= worth * kept.scores[0]]]
    meets = box_iou(boxes, torch.tensor(truth, dtype=torch.float32)) >= 0.5
    return int(meets.any(0).sum()), int((~meets.any(1)).sum())


def excess(found: Found) -> float:
    """What `relevance` is made of."""
    return LIMIT + float(np.log(found.relevance / (1 - found.relevance))) / SLOPE


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean IoU and share of at least 0.5, with the 95 % interval of that by bootstrap over pictures."""
    iou = np.asarray(values)
    draws = np.random.default_rng(0).choice(iou >= 0.5, (2000, len(iou))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    recall = float((iou >= 0.5).mean())
    return {
        "mean IoU": round(float(iou.mean()), 3),
        "recall": round(recall, 3),
        "interval": [round(float(low), 3), round(float(high), 3)],
    }


def gain(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """How much higher the mean IoU is on the same pictures, with its 95 % interval by bootstrap over them."""
    difference = np.asarray(ours) - np.asarray(theirs)
    draws = np.random.default_rng(0).choice(difference, (2000, len(difference))).mean(1)
    return {
        "mean": round(float(difference.mean()), 3),
        "interval": [round(float(x), 3) for x in np.percentile(draws, [2.5, 97.5])],
    }


def auc(present: Sequence[float], absent: Sequence[float]) -> float:
    """Chance that a phrase that is there lies above one that is not."""
    a, b = np.asarray(present)[:, None], np.asarray(absent)[None]
    return float(((a > b) + 0.5 * (a == b)).mean())


# The two commands


def report(encoder: HFEncoder, number: int) -> dict[str, Any]:
    began, clock = time.process_time(), time.perf_counter()
    rows: list[dict[str, float]] = []
    sizes, present, absent, seconds = [], [], [], []
    for i, scene in enumerate(scenes("report", number)):
        start = time.process_time()
        found = Finder(encoder, scene.caption)(scene.picture)
        seconds.append(time.process_time() - start)
        rows.append({name: overlap(box, scene.boxes) for name, box in candidates(found).items()})
        sizes.append(scene.size)
        present.append(found)
        if 2 * i < number:
            absent.append(Finder(encoder, scene.absent)(scene.picture))
        print(f"{scene.caption}: {rows[-1]['find']:.2f}, relevance {found.relevance:.2f}", flush=True)
    pairs = [
        both(Finder(encoder, scene.caption)(scene.picture), scene.boxes, SIGMA, WORTH)
        for scene in scenes("report", number // 8, alike=2, seed=1)
    ]
    right = [found for found, row in zip(present, rows) if row["find"] >= 0.5]
    return {
        "command": "python -m benchmarks.find",
        "commit": commit(),
        "machine": machine(),
        "pictures": number,
        "boxes": {
            name: {
                "all": summary([row[name] for row in rows]),
                **{size: summary([row[name] for row, of in zip(rows, sizes) if of == size]) for size in SIZES},
            }
            for name in rows[0]
        },
        "mean IoU of find minus that of": {
            name: gain([row["find"] for row in rows], [row[name] for row in rows]) for name in rows[0] if name != "find"
        },
        "nothing here": {
            "present": len(present),
            "absent": len(absent),
            "kept": round(sum(found.present for found in present) / len(present), 3),
            "kept, of the boxed right": round(sum(found.present for found in right) / max(len(right), 1), 3),
            "told so": round(sum(not found.present for found in absent) / len(absent), 3),
            "auc": round(auc([f.relevance for f in present], [f.relevance for f in absent]), 3),
        },
        "two alike": {
            "pictures": len(pairs),
            "found": round(sum(hits for hits, _ in pairs) / (2 * len(pairs)), 3),
            "wrong boxes a picture": round(sum(misses for _, misses in pairs) / len(pairs), 2),
        },
        "seconds of CPU a picture, median": round(float(np.median(seconds)), 2),
        "seconds of CPU in all": round(time.process_time() - began),
        "seconds in all": round(time.perf_counter() - clock),
    }


def calibrate(encoder: HFEncoder, number: int) -> None:
    """Print what the choosing half says."""
    from sklearn.linear_model import LogisticRegression

    there, absent, founds, truths = [], [], [], []
    for scene in scenes("choose", number):
        founds.append(Finder(encoder, scene.caption, looks=64)(scene.picture))
        truths.append(scene.boxes)
        there.append(excess(Finder(encoder, scene.caption)(scene.picture)))
        absent.append(excess(Finder(encoder, scene.absent)(scene.picture)))
    for looks in (1, 8, 16, 32, 64):
        ious = [overlap(f.proposals[f.proposal_scores[:looks].argmax()], truth) for f, truth in zip(founds, truths)]
        print(f"{looks} looks: {summary(ious)}")
    logistic = LogisticRegression(C=1e6).fit(np.array([*there, *absent])[:, None], [1] * number + [0] * number)
    print(f"LIMIT {np.quantile(there, 0.2):.2f}, SLOPE {logistic.coef_[0, 0]:.2f}, AUC {auc(there, absent):.3f}")
    print(f"there {np.quantile(there, [0.1, 0.2, 0.3, 0.5])}, absent {np.quantile(absent, [0.5, 0.7, 0.8, 0.9])}")
    pairs = [(Finder(encoder, s.caption)(s.picture), s.boxes) for s in scenes("choose", number // 2, alike=2, seed=1)]
    for sigma in (0.1, 0.3, 0.5):
        for worth in (0.4, 0.5, 0.6, 0.7):
            two = np.sum([both(f, truth, sigma, worth) for f, truth in pairs], 0) / len(pairs)
            one = np.sum([both(f, truth, sigma, worth) for f, truth in zip(founds, truths)], 0) / number
            shown = f"of two {two[0] / 2:.2f}, wrong {two[1]:.2f}; of one {one[0]:.2f}, wrong {one[1]:.2f}"
            print(f"sigma {sigma}, worth {worth}: {shown}")


BEGIN, END = "<!-- written by python -m benchmarks.find -->", "<!-- end -->"


def page(result: dict[str, Any]) -> str:
    """The figures as docs/find.md shows them."""
    told, two = result["nothing here"], result["two alike"]
    lines = ["| best box | mean IoU | recall at IoU 0.5 (95 %) | small | middle | large |", "|---|---|---|---|---|---|"]
    for name, rows in result["boxes"].items():
        low, high = rows["all"]["interval"]
        sizes = " | ".join(f"{rows[size]['recall']:.2f}" for size in SIZES)
        lines.append(
            f"| {name} | {rows['all']['mean IoU']:.2f} | {rows['all']['recall']:.2f} ({low:.2f} to {high:.2f}) | {sizes} |"
        )
    ahead = result["mean IoU of find minus that of"]["best part of the map"]
    low, high = ahead["interval"]
    lines += [
        "",
        f"On the same pictures, the mean IoU of find less that of the best part of the map is {ahead['mean']:+.2f} (95 %",
        f"interval {low:+.2f} to {high:+.2f}).",
        "",
        f"{result['pictures']} pictures; small, middle and large things are {', '.join(map(str, SIZES.values()))} of the",
        "picture's shorter side long. Of the phrases that are there,",
        f"{told['kept']:.0%} are found to be ({told['kept, of the boxed right']:.0%} of those boxed right); of {told['absent']}",
        f"that are not, {told['told so']:.0%} are told so; the area under the curve is {told['auc']:.2f}. Of two alike in one",
        f"picture ({two['pictures']} pictures), {two['found']:.0%} get a box of their own, beside {two['wrong boxes a picture']}",
        f"wrong boxes a picture. A picture takes {result['seconds of CPU a picture, median']} seconds of CPU.",
    ]
    return "\n".join([BEGIN, "", *lines, "", END])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("report", "calibrate"), default="report")
    parser.add_argument("--pictures", type=int, default=48)
    args = parser.parse_args()
    encoder = load("offline")
    if args.what == "calibrate":
        calibrate(encoder, args.pictures)
        return
    result = report(encoder, args.pictures)
    (RESULTS / "find.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
    PAGE.write_text(before + page(result) + after, encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
