"""CLIP-SVD against other ways of adapting `tiny` to a style it has never seen, from four pictures of each class.

Things come as blurred line drawings; `tiny` learnt filled ones. Classes are pairs of colour and shape; those of one colour of
the checkerboard over the table of pairs are base, the others new: no pair in both, every shape and colour in each. All arms
that train see the same 128 pictures of base classes for the same 200 steps, under the same loss and augmentation.

Accuracy in [0, 1]: `base` on pictures of base classes among those, `new` likewise, without a single picture of the latter.

Two gates of ten fail, with these margins. Full fine-tuning does not forget here: the shift is the same for all classes, so
new ones gain as much as base ones with every method that reaches the image tower, and CLIP-SVD has no lead on them. And the
random basis, at its own best rate, gains four fifths as much, not three: in a tower 96 wide, 96 gains of random directions
are a hundredth of a layer. Its lead over the random basis is there on each seed. The published experiments take pictures of
32 a step; 8 keep this run to minutes. The shift was chosen on other scenes, by zero-shot accuracy and linear probe: without
blur zero-shot was too good, with 2 pixels the probe little better, inverted backgrounds left nothing to gain. One run of CLIP-SVD
at blurs of 1.5 and 2 pixels had been seen by then.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ImageFilter
from torch import Tensor, nn
from torch.nn.functional import linear

from ecliptic.core.anatomy import parts, swap
from ecliptic.core.claims import Claim, Gate
from ecliptic.core.contracts import Record
from ecliptic.core.encoder import HFEncoder, load
from ecliptic.core.lora import Lora
from ecliptic.core.prompt_classifier import NOTHING, LearntContext, PromptClassifier
from ecliptic.core.train import Train
from ecliptic.core.zeroshot import zero_shot_head
from ecliptic.data.scenes import COLOURS, SHAPES, scenes
from ecliptic.data.shots import RandomView, take_shots
from ecliptic.eval.base_to_new import harmonic_mean
from ecliptic.methods.adapt.clip_svd import PARTS, ClipSvd, SvdLinear

SHIFT: dict[str, Any] = {"style": "drawing"}
BLUR = 1.5  # pixels of 48
WORDS = "a {}"
SHOWN, HUES = SHAPES[:8], tuple(COLOURS)[:8]
PAIRS = [(f"{hue} {shape}", (i + j) % 2) for i, shape in enumerate(SHOWN) for j, hue in enumerate(HUES)]
BASE = tuple(name for name, side in PAIRS if side == 0)
NEW = tuple(name for name, side in PAIRS if side == 1)
SHOTS, STEPS, BATCH = 4, 200, 8
CROP = (0.5, 1.0)  # of the area: the usual 0.08 would often miss a thing that covers a tenth of the picture
TESTED, VALIDATED = 1000, 300
MATCHED_EVERY = 50  # steps between the points at which full fine-tuning may be compared
FULL_LRS = (1e-4, 3e-4, 1e-3)  # the best on validation pictures of each seed counts
LRS = {  # the best of three to five on validation pictures of base classes, seed 100; none at the end of its range
    "prompt": 2e-2,
    "norms_biases": 1e-2,
    "lora": 3e-3,
    "random_basis": 1.6e-2,
    "clip_svd": 3.2e-2,
}
ARMS = (
    "zero_shot",
    "linear_probe",
    "prompt",
    "norms_biases",
    "lora",
    "full",
    "full_matched",
    "random_basis",
    "image_only",
    "text_only",
    "clip_svd",
)


def gate(says: str, than: str, margin: float, metric: str = "base", better: str = "clip_svd", **more: Any) -> Gate:
    return Gate(says, better, than, margin, metric, **more)


CLAIM = Claim(
    says="from four blurred drawings of each base class, training singular values lifts base classes as far as full "
    "fine-tuning and further than a learnt prompt, and leaves new classes better than full fine-tuning does",
    arms=ARMS,
    mode="difference",
    gates=(  # margins as the published experiment suggests them, set before the first run on these seeds
        gate("headroom: a linear probe on 25 pictures of each base class", "zero_shot", 0.15, better="linear_probe",
             kind="headroom"),
        gate("base classes, against zero-shot", "zero_shot", 0.15),
        gate("base classes, against a learnt prompt", "prompt", 0.03),
        gate("new classes, against zero-shot", "zero_shot", -0.01, "new"),
        gate("new classes, against full fine-tuning stopped at the same base accuracy", "full_matched", 0.03, "new"),
        gate("that base accuracy is not lower", "full_matched", 0.02, kind="control"),
        gate("nor higher", "clip_svd", 0.02, better="full_matched", kind="control"),
        gate("a random basis gains at most 60 % as much on base classes", "clip_svd", 0.6, "base_gain",
             better="random_basis", kind="control", mode="ratio"),
        gate("base classes, both towers against the image tower alone", "image_only", 0.0),
        gate("base classes, both towers against the text tower alone", "text_only", 0.0),
        gate("base classes, against full fine-tuning at its best rate", "full", 0.0, gate=False),
        gate("new classes, against full fine-tuning at its best rate", "full", 0.0, "new", gate=False),
        gate("harmonic mean, against full fine-tuning at its best rate", "full", 0.0, "harmonic_mean", gate=False),
        gate("harmonic mean, against LoRA of rank 2", "lora", 0.0, "harmonic_mean", gate=False),
        gate("harmonic mean, against norms and biases", "norms_biases", 0.0, "harmonic_mean", gate=False),
        gate("new classes, against a learnt prompt", "prompt", 0.0, "new", gate=False),
        gate("base classes, against a random basis", "random_basis", 0.0, gate=False),
        gate("new classes, against a random basis", "random_basis", 0.0, "new", gate=False),
    ),
)  # fmt: skip


def run(arm: str, seed: int) -> dict[str, float]:
    return adapted(arm, seed)


@cache
def adapted(arm: str, seed: int) -> dict[str, float]:
    """Adapt in one way, with the arm's own rate, and test."""
    if arm == "zero_shot":
        return measured(tiny(), seed)
    if arm == "linear_probe":
        return {"base": linear_probe(seed)}
    if arm == "full":
        last = [point for point in full_fine_tuning(seed) if point.step == STEPS]
        return max(last, key=lambda point: point.validation).found
    if arm == "full_matched":
        target = adapted("clip_svd", seed)["base"]
        return min(full_fine_tuning(seed), key=lambda point: abs(point.found["base"] - target)).found
    return trained(arm, seed, LRS.get(arm, LRS["clip_svd"]))


def trained(arm: str, seed: int, lr: float, pictures: str = "test") -> dict[str, float]:
    encoder, shots = tiny(), data(seed).shots
    if arm == "prompt":
        learnt = trainer(seed, lr, LearntContext(BASE, template="{}"), trainable=NOTHING).run(encoder, shots).objective
        assert isinstance(learnt, LearntContext)
        return measured(encoder, seed, pictures, learnt.head)
    if arm == "lora":
        changed = trainer(seed, lr, lora=Lora(rank=2, alpha=4.0, parts=PARTS, seed=seed)).apply(encoder, shots)
    elif arm == "norms_biases":
        changed = trainer(seed, lr, trainable=r"\.bias$|norm\w*\.weight$").apply(encoder, shots)
    elif arm == "random_basis":
        turned = in_random_bases(encoder, seed)
        changed = trainer(seed, lr, trainable=r"\.diagonal$", decaying=r"\.diagonal$").apply(turned, shots)
    else:
        towers = {"image_only": ("image",), "text_only": ("text",)}.get(arm, ("image", "text"))
        changed = ClipSvd(BASE, WORDS, towers, lr=lr, steps=STEPS, batch_size=BATCH, crop=CROP, seed=seed).apply(
            encoder, shots
        )
    return measured(changed, seed, pictures)


def trainer(seed: int, lr: float, objective: Any = None, decaying: str = "", **more: Any) -> Train:
    """The settings of `ClipSvd`, for whatever else is trained."""
    return Train(
        objective or PromptClassifier(BASE, WORDS),
        steps=STEPS,
        batch_size=BATCH,
        lr=lr,
        weight_decay=0.01,
        groups={decaying: {"weight_decay": 0.01}} if decaying else {},
        betas=(0.9, 0.999),
        eps=1e-8,
        grad_clip=None,
        warmup=0,
        floor=1e-6 / lr,
        augment=RandomView.for_encoder(tiny(), CROP),
        seed=seed,
        **more,
    )


class Point(NamedTuple):
    """Full fine-tuning after some steps: accuracy on validation pictures of base classes, and on the test."""

    lr: float
    step: int
    validation: float
    found: dict[str, float]


@cache
def full_fine_tuning(seed: int) -> list[Point]:
    points = []
    for lr in FULL_LRS:

        def look(encoder: Any) -> dict[str, float]:
            return measured(encoder, seed) | {"validation": measured(encoder, seed, "val")["base"]}

        step = trainer(
            seed, lr, trainable=lambda name, _: "logit_scale" not in name, evaluate=look, evaluate_every=MATCHED_EVERY
        )
        for row in step.run(tiny(), data(seed).shots).log:
            if "evaluate" in row:
                found = dict(row["evaluate"])
                points.append(Point(lr, row["step"], found.pop("validation"), found))
    return points


class RandomBasis(nn.Module):
    """W x + b + A diag(d) B x with random orthonormal A and B: the freedom of `SvdLinear`, in no particular directions."""

    def __init__(self, layer: nn.Linear, generator: torch.Generator):
        super().__init__()
        self.layer = layer
        exact = SvdLinear.of(layer, min(layer.weight.shape))
        turns = [torch.linalg.qr(torch.randn(exact.rank, exact.rank, generator=generator))[0] for _ in range(2)]
        self.register_buffer("left", exact.left @ turns[0])
        self.register_buffer("right", turns[1] @ exact.right)
        self.diagonal = nn.Parameter(torch.zeros(exact.rank))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.layer.weight + (self.left * self.diagonal) @ self.right, self.layer.bias)


def in_random_bases(encoder: HFEncoder, seed: int) -> HFEncoder:
    turned, generator = encoder.clone(), torch.Generator().manual_seed(seed)
    for tower in (turned.anatomy.image, turned.anatomy.text):
        for block in tower.blocks:
            for part in PARTS:
                layer = getattr(parts(block), part)
                swap(block, layer, RandomBasis(layer, generator))
    return turned


# Pictures and accuracy


class Data(NamedTuple):
    shots: list[Record]
    val: list[Record]
    test: list[Record]
    many: list[Record]


@cache
def tiny() -> HFEncoder:
    return load("tiny")


@cache
def data(seed: int) -> Data:
    def drawn(split: str, n: int) -> Any:
        options = {"shapes": SHOWN, "colours": HUES, "holdout": (), **SHIFT}
        return scenes(split, n, seed + 2000, tiny().image_size, label=("colour", "shape"), **options)

    def blurred(records: Any) -> list[Record]:
        blur = ImageFilter.GaussianBlur(BLUR)
        return [{"id": r["id"], "image": r["image"].filter(blur), "label": r["label"]} for r in records]

    pool = drawn("train", 1600)
    pool = pool[[i for i, label in enumerate(pool.column("label")) if label in BASE]]
    return Data(
        blurred(take_shots(pool, SHOTS, seed)), blurred(drawn("val", VALIDATED)), blurred(drawn("test", TESTED)),
        blurred(pool),
    )  # fmt: skip


def measured(encoder: HFEncoder, seed: int, pictures: str = "test", head: Any = None) -> dict[str, float]:
    records = getattr(data(seed), pictures)
    rows = encoder.encode_images([r["image"] for r in records])
    labels = np.array([r["label"] for r in records])
    found = {}
    for side, names in (("base", BASE), ("new", NEW)):
        weights = zero_shot_head(encoder, names, WORDS) if head is None else head(encoder, names)
        mine = np.isin(labels, names)
        answers = np.array(names)[(rows[torch.from_numpy(mine)] @ weights.T).argmax(-1).numpy()]
        found[side] = float((answers == labels[mine]).mean())
    if pictures == "test":
        found["harmonic_mean"] = harmonic_mean(found["base"], found["new"])
        found["base_gain"] = (
            found["base"] - (found if encoder is tiny() and head is None else adapted("zero_shot", seed))["base"]
        )
    return found


def linear_probe(seed: int) -> float:
    from sklearn.linear_model import LogisticRegression

    many, test = data(seed).many, [r for r in data(seed).test if r["label"] in BASE]
    rows, asked = (tiny().encode_images([r["image"] for r in records]).numpy() for records in (many, test))
    fit = LogisticRegression(C=30.0, max_iter=200).fit(rows, [r["label"] for r in many])
    return float(fit.score(asked, [r["label"] for r in test]))
