"""GLAD against plain LoRA: `tiny` learns four shapes from eight pictures each, in a domain it has not seen.

Things are larger than any in its training and turned to any angle. Base are four of eight shapes, new the others, known by
name only. All arms that train do so for the same 80 updates on the same 32 pictures, from the same start.
That weight 0 is plain LoRA, and a vanishing radius its limit, are tests.

`base`, `new`: accuracy in [0, 1] in that domain, each among its own four classes. `harmonic_mean`: of the two. `domain`:
accuracy among all eight in the domain of pre-training. `sharpness`, in nats: how much the loss on other pictures of base classes
rises by one step of length 0.1 along its gradient, over the trained numbers. `drift`: sum over layers of |B A|. `cosine`,
`conflicts`: of gradient and reference over the run.

Three gates of eight fail: minima are flatter on every seed, by a fifth to a fourth where two fifths were asked for, and the
harmonic mean of base and new classes does not move. What was tried before these seeds, on seed 100 (sharpness, harmonic mean;
plain LoRA -> orthogonal): tau 100 with dropout 0.25 .401 -> .304, .595 -> .621 (SAM .221, .632); the same on fc1 and fc2 with
alpha 4 .929 -> .721, .632 -> .635 (SAM .782, .616), and .699 -> .921 in the domain of pre-training; the model's own tau and no
dropout .199 -> .107, .584 -> .601. The last was taken, by a rule set before it ran. A likely reason, not tested: with alpha/rank
of 1/4, a radius of 0.3 over the factors is a small one over the weights.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ecliptic.baselines.lora_tuning import LoraTuning
from ecliptic.core.claims import Claim, Gate
from ecliptic.core.contracts import Record
from ecliptic.core.encoder import HFEncoder, load
from ecliptic.core.few_shot_tuning import LoraPredictor, PooledLora
from ecliptic.core.tuned import A, B
from ecliptic.core.zeroshot import class_prompts, zero_shot_head
from ecliptic.data.scenes import SHAPES, scenes
from ecliptic.data.shots import take_shots
from ecliptic.eval.base_to_new import harmonic_mean
from ecliptic.methods.adapt.glad import Glad

WORDS = "a {}"
NAMES = SHAPES[:8]
BASE, NEW = NAMES[:4], NAMES[4:]
SHIFT: dict[str, Any] = {"size_range": (0.40, 0.45), "rotation": 180.0}
SHOTS, TESTED, HELD = 8, 600, 200
RADIUS = 0.1
TRAINED: dict[str, Any] = {
    "classes": BASE,
    "templates": WORDS,
    "rank": 4,
    "dropout": 0.0,
    "tau": 31.6,
    "lr": 2e-3,
    "steps": 80,
    "batch_size": 16,
    "crop": None,
}
ARMS: dict[str, dict[str, Any]] = {
    "zero_shot": {},
    "linear_probe": {},
    "lora": {},
    "orthogonal": {"mode": "orthogonal", "rho": 0.3},
    "blend": {"mode": "blend", "rho": 0.3},
    "random": {"mode": "orthogonal", "rho": 0.3, "direction": "random"},
}


def gate(says: str, better: str, margin: float, metric: str, than: str = "lora", **more: Any) -> Gate:
    return Gate(says, better, than, margin, metric, **more)


CLAIM = Claim(
    says="from eight pictures of each base class, LoRA with the steered gradient ends in flatter minima than plain LoRA, names "
    "base classes as well and new classes better",
    arms=tuple(ARMS),
    mode="difference",
    gates=(  # margins set before the first run on these seeds
        gate("headroom: a linear probe on a hundred pictures of each base class", "linear_probe", 0.15, "base", than="zero_shot",
             kind="headroom"),
        gate("flatter: sharpness, as a ratio", "orthogonal", 1 / 0.6, "sharpness", mode="ratio", lower=True),
        gate("harmonic mean of base and new classes", "orthogonal", 0.02, "harmonic_mean"),
        gate("base classes", "orthogonal", -0.01, "base"),
        gate("the domain of pre-training", "orthogonal", -0.01, "domain"),
        gate("SAM is flatter as well", "blend", 1 / 0.6, "sharpness", mode="ratio", lower=True),
        gate("a random direction of equal length is no flatter", "random", 1.1, "sharpness", mode="ratio", lower=True,
             kind="control"),
        gate("nor is its harmonic mean higher", "random", 0.01, "harmonic_mean", kind="control"),
        gate("harmonic mean with SAM", "blend", 0.02, "harmonic_mean", gate=False),
        gate("new classes", "orthogonal", 0.0, "new", gate=False),
        gate("harmonic mean, against SAM", "orthogonal", 0.0, "harmonic_mean", than="blend", gate=False),
        gate("harmonic mean of plain LoRA, against zero-shot", "lora", 0.0, "harmonic_mean", than="zero_shot", gate=False),
    ),
)  # fmt: skip


def run(arm: str, seed: int) -> dict[str, float]:
    return adapted(arm, seed)


@cache
def adapted(arm: str, seed: int) -> dict[str, float]:
    if arm == "zero_shot":
        return accuracies(tiny(), seed)
    if arm == "linear_probe":
        return {"base": linear_probe(seed)}
    return measured(trained(arm, seed), seed)


def trained(arm: str, seed: int, **other: Any) -> LoraPredictor:
    settings = {**TRAINED, **ARMS[arm], **other, "seed": seed}
    return (LoraTuning if arm == "lora" else Glad)(**settings).fit(tiny(), data(seed).shots)


def measured(judge: LoraPredictor, seed: int) -> dict[str, float]:
    found = accuracies(judge.tuned_encoder(), seed) | {"sharpness": sharpness(judge, seed)}
    pairs = [(judge.state_[name], judge.state_[name.removesuffix(A) + B]) for name in judge.state_ if name.endswith(A)]
    found["drift"] = sum(float((b @ a).norm()) for a, b in pairs)
    for name in ("cosine", "conflicts"):
        steered = getattr(judge, "steered_", [])
        if steered:
            found[name] = sum(row[name] for row in steered) / len(steered)
    return found


# Pictures, accuracy, sharpness


class Data(NamedTuple):
    shots: list[Record]
    many: list[Record]
    held: list[Record]
    test: list[Record]
    domain: list[Record]


@cache
def tiny() -> HFEncoder:
    return load("tiny")


@cache
def data(seed: int) -> Data:
    def drawn(split: str, n: int, shapes: tuple[str, ...], **options: Any) -> list[Record]:
        records = scenes(split, n, seed + 7000, tiny().image_size, shapes=shapes, holdout=(), **options)
        return [{"id": r["id"], "image": r["image"], "label": r["label"]} for r in records]

    many = drawn("train", 400, BASE, **SHIFT)
    return Data(
        take_shots(many, SHOTS, seed), many, drawn("val", HELD, BASE, **SHIFT), drawn("test", TESTED, NAMES, **SHIFT),
        drawn("test", TESTED, NAMES),
    )  # fmt: skip


def accuracies(encoder: HFEncoder, seed: int) -> dict[str, float]:
    found = {}
    shifted, usual = data(seed).test, data(seed).domain
    for metric, records, names in (("base", shifted, BASE), ("new", shifted, NEW), ("domain", usual, NAMES)):
        asked = [r for r in records if r["label"] in names]
        scores = encoder.encode_images([r["image"] for r in asked]) @ zero_shot_head(encoder, names, WORDS).T
        answers = np.array(names)[scores.argmax(-1).numpy()]
        found[metric] = float((answers == np.array([r["label"] for r in asked])).mean())
    return found | {"harmonic_mean": harmonic_mean(found["base"], found["new"])}


def sharpness(judge: LoraPredictor, seed: int) -> float:
    """L(phi + R g / |g|) - L(phi), g the gradient of L at phi, over the adapters' numbers, as they were trained."""
    adapted = PooledLora(judge.rank, judge.alpha, judge.towers, judge.parts).adapt(tiny())
    known = dict(adapted.named_parameters())
    numbers = []
    with torch.no_grad():
        for name, value in judge.state_.items():
            weight, factor = name.rsplit(".lora_", 1)
            parameter = known[f"{weight.removesuffix('.weight')}.lora_{factor}.default.weight"]
            parameter.copy_(value if factor == "A" else value * judge.rank / judge.alpha)
            numbers.append(parameter)
    pixels = adapted.preprocess([r["image"] for r in data(seed).held])
    labels = torch.tensor([BASE.index(r["label"]) for r in data(seed).held])
    words = adapted.tokenize(class_prompts(BASE, WORDS))

    def loss() -> Tensor:
        return cross_entropy(judge.scale_ * adapted.images(pixels).pooled @ adapted.texts(words).pooled.T, labels)

    here = loss()
    gradient = torch.autograd.grad(here, numbers)
    norm = torch.stack([g.square().sum() for g in gradient]).sum().sqrt()
    with torch.no_grad():
        for parameter, g in zip(numbers, gradient, strict=True):
            parameter += RADIUS * g / norm
        return float(loss() - here.detach())


def linear_probe(seed: int) -> float:
    from sklearn.linear_model import LogisticRegression

    many, test = data(seed).many, [r for r in data(seed).test if r["label"] in BASE]
    rows, asked = (tiny().encode_images([r["image"] for r in records]).numpy() for records in (many, test))
    fit = LogisticRegression(C=30.0, max_iter=300).fit(rows, [r["label"] for r in many])
    return float(fit.score(asked, [r["label"] for r in test]))
