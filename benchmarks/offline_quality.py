"""What the "offline" model can do: retrieval on the Tux Paint stamps, and naming photographs. It learns from neither.

    python -m benchmarks.offline_quality [--json FILE]

The picture of the query's own caption counts as the one right answer, even where several have the same caption; the figures
with duplicates credited stand beside. Baseline: the CNN's ten likeliest classes times embeddings of the class names, no
training; chance.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit

import ecliptic
from benchmarks.measure import RESULTS, commit
from ecliptic.core.zeroshot import zero_shot_head
from ecliptic.data.sources import open_source
from ecliptic.models import offline

KS = (1, 5, 10)
# Pictures of scikit-image and scikit-learn by file, with the label that is right among the 40 below. Left out: pictures
# without a subject to name (colour tests, disparity maps, synthetic blobs) and the second of a stereo pair.
RIGHT = {
    "astronaut": "an astronaut", "brick": "a brick wall", "camera": "a photographer with a camera",
    "cell": "a cell under the microscope",
    "chelsea": "a cat", "china": "a temple", "clock_motion": "a clock", "coffee": "a cup of coffee", "coins": "coins",
    "flower": "a flower", "grass": "grass", "gravel": "gravel", "horse": "a horse", "hubble_deep_field": "galaxies in space",
    "moon": "the moon", "motorcycle_left": "a motorcycle", "page": "a page of text", "retina": "the retina of an eye",
    "rocket": "a rocket", "text": "handwriting",
}  # fmt: skip
LABELS = [
    *RIGHT.values(), "a dog", "a bird", "a fish", "a butterfly", "a car", "a bicycle", "an airplane", "a ship", "a train",
    "a tree", "a mountain", "a beach", "a house", "a chair", "a book", "a guitar", "a pizza", "an apple", "a shoe", "a computer",
]  # fmt: skip
# The ten that the goal for this model names, and what it is held to: eight right.
TEN = ("chelsea", "coffee", "motorcycle_left", "rocket", "astronaut", "camera", "horse", "coins", "moon", "retina")


def recall(scores: Tensor, same: Tensor | None = None) -> list[float]:
    """(queries, answers), right ones on the diagonal. Ties lose. same: (Q, A) bool, answers to credit as well."""
    right = torch.eye(len(scores), dtype=torch.bool) if same is None else same
    best = scores.masked_fill(~right, -torch.inf).max(1).values
    rank = (scores.masked_fill(right, -torch.inf) >= best[:, None]).sum(1)
    return [round(float((rank < k).float().mean()), 3) for k in KS]


def both(scores: Tensor, same: Tensor | None = None) -> dict[str, list[float]]:
    return {"text_to_image": recall(scores, same), "image_to_text": recall(scores.T, same)}


def baseline(encoder: Any, records: Any, captions: list[str]) -> Tensor:
    """Ten likeliest classes, each by the embedding of its first name, no training."""
    from ecliptic.models.offline_recipe import Cnn, Sentences

    words = Sentences()
    names = [line.split("\t")[1].split(", ")[0] for line in offline.CLASSES.read_text(encoding="utf-8").splitlines()]
    cnn = Cnn()
    chance = (cnn.features(records) @ cnn.classify["weight"].T + cnn.classify["bias"]).softmax(-1)
    top = chance.topk(10, dim=-1)
    pictures = (words(names)[top.indices] * top.values[..., None]).sum(1)
    return words(captions) @ unit(pictures, dim=-1).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS / "offline_quality.json")
    args = parser.parse_args()
    encoder = ecliptic.load("offline")
    stamps = open_source("stamps")
    captions = stamps.column("caption")
    labels = stamps.column("label")
    pictures = encoder.encode_images(record["image"] for record in stamps)
    scores = encoder.encode_texts(captions) @ pictures.T
    same = torch.tensor([[a == b for b in captions] for a in captions])
    found: dict[str, Any] = {"model": encoder.id, "commit": commit(), "pictures": len(captions), "ks": KS}
    found["chance"] = [round(k / len(captions), 3) for k in KS]
    found["baseline"] = both(baseline(encoder, stamps, captions))
    found["offline"] = both(scores)
    found["offline, duplicates credited"] = both(scores, same)
    ranks = (scores >= scores.diagonal()[:, None]).sum(1) - 1
    found["by category"] = {
        label: [count, *(round(float((ranks[[x == label for x in labels]] < k).float().mean()), 2) for k in KS)]
        for label, count in Counter(labels).most_common()
    }
    photos = open_source("photos")
    kept = [(Path(id).stem, i) for i, id in enumerate(photos.column("id")) if Path(id).stem in RIGHT]
    head = zero_shot_head(encoder, LABELS, templates=("{}",))
    chosen = (encoder.encode_images(photos[i]["image"] for _, i in kept) @ head.T).topk(3)
    named = {}
    for (name, _), row, values in zip(kept, chosen.indices, chosen.values):
        top = [f"{LABELS[i]} {value:.2f}" for i, value in zip(row.tolist(), values.tolist())]
        named[name] = {"right": LABELS[int(row[0])] == RIGHT[name], "wanted": RIGHT[name], "top": top}
    found["photographs"] = named
    found["right of all"] = [sum(row["right"] for row in named.values()), len(named)]
    found["right of the ten"] = [
        sum(named[name]["right"] for name in TEN if name in named),
        sum(name in named for name in TEN),
    ]
    worst = ranks.argsort(descending=True)[:15].tolist()
    found["failures"] = [
        f"{captions[i]} rank {int(ranks[i]) + 1}, first is {captions[int(scores[i].argmax())]}" for i in worst
    ]
    for key, value in found.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, row in value.items():
                print(f"  {name}: {row}")
        else:
            print(f"{key}: {value}")
    args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
