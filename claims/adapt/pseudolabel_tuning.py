"""Pseudolabel tuning against zero-shot and its own parts, on rendered shapes in a style that `tiny` has never seen.

800 pictures without labels, 1,200 to test on, in eight shapes drawn as outlines; `tiny` learnt filled ones. All arms that train
tune a context of four words that starts at "a photo of a", at the same rate, over features computed once. FPL sees far fewer
pictures than GRIP, so it also runs with as many updates (`fpl_long`), and so does choosing once (`once_long`).

- zero_shot; fpl (K = 16), fpl_long, ifpl (five rounds of 16); grip (five rounds, K = 20 ... 100).
- confidence: the surest half of the pool, whatever class, once; grip_confidence: GRIP's numbers, chosen so.
- once: K = 100 from the start; once_long. random: random labels of all; oracle: true labels of all. chance: one in eight.

accuracy; worst3, the mean accuracy of the three worst classes; std over the classes. All in [0, 1].

The published pilot shifted the size of things. `tiny` knows larger ones as well as its own (zero-shot 0.99), so another shift
was taken, by zero-shot accuracy and a linear probe on seed 100. How many epochs a round has was set there, too; all arms had
been seen there, and on seed 101, before these seeds ran, the margins unchanged.

One gate of twelve fails, by 0.0003. GRIP has 0.695 against 0.637 of FPL and 0.639 of FPL with as many updates, but the gate, made
stricter than the paper's, takes the better of the two on each seed, and FPL's few pictures happen to be good ones on seed 0.
Whoever runs FPL cannot know which of the two lengths to take. The margin stays as it was set.

What carries the gain is the balance, not the growth: all at once is as good as GRIP once it may take as many updates. Random
labels fall far below zero-shot, but not to chance: the margin of that control is ours, the paper's summary says chance.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ecliptic.baselines.coop import Coop
from ecliptic.core.claims import Claim, Gate
from ecliptic.core.encoder import HFEncoder, load
from ecliptic.core.zeroshot import zero_shot_head
from ecliptic.data.scenes import SHAPES, scenes
from ecliptic.data.shots import encode_views, labels_of
from ecliptic.methods.adapt.pseudolabel_tuning import PseudolabelTuning

SHIFT: dict[str, Any] = {"style": "drawing"}
SHOWN = SHAPES[:8]
POOL, TESTED = 800, 1200
WORDS = "a photo of a {}"
TRAINING: dict[str, Any] = {"tau": 15.0, "lr": 0.5, "epochs": 10}  # scale and rate of the published pilot
GRIP_UPDATES, FPL_UPDATES, ONCE_UPDATES = 150, 8, 50  # an epoch of each, all rounds together, in batches of 16
ARMS: dict[str, dict[str, Any]] = {
    "fpl": {"strategy": "fpl"},
    "fpl_long": {"strategy": "fpl", "epochs": 10 * GRIP_UPDATES // FPL_UPDATES},
    "ifpl": {"strategy": "ifpl"},
    "grip": {"strategy": "grip"},
    "grip_going_on": {"strategy": "grip", "restart": False},
    "confidence": {"strategy": "fpl", "top_k": POOL // len(SHOWN) // 2, "selection": "confidence"},
    "grip_confidence": {"strategy": "grip", "selection": "confidence"},
    "once": {"strategy": "fpl", "top_k": POOL // len(SHOWN)},
    "once_long": {"strategy": "fpl", "top_k": POOL // len(SHOWN), "epochs": 10 * GRIP_UPDATES // ONCE_UPDATES},
}


def gate(says: str, better: str, than: str | tuple[str, ...], margin: float, **more: Any) -> Gate:
    return Gate(says, better, than, margin, more.pop("metric", "accuracy"), **more)


CLAIM = Claim(
    says="without labels GRIP beats FPL and zero-shot and lifts the worst classes most; a global confidence threshold gains "
    "nothing and lets them fall",
    arms=("chance", "zero_shot", "random", "oracle", *ARMS),
    mode="difference",
    gates=(  # margins from the paper's summary, set before the first run on these seeds
        gate("headroom: the same tuning on true labels", "oracle", "zero_shot", 0.10, kind="headroom"),
        gate("zero-shot is good enough to begin with (0.40)", "zero_shot", "chance", 0.275, kind="headroom"),
        gate("GRIP against zero-shot", "grip", "zero_shot", 0.05),
        gate("GRIP against FPL, also with as many updates", "grip", ("fpl", "fpl_long"), 0.03),
        gate("FPL against zero-shot", "fpl", "zero_shot", 0.0),
        gate("GRIP on the three worst classes", "grip", "zero_shot", 0.10, metric="worst3"),
        gate("GRIP makes classes more even (std)", "grip", "zero_shot", 0.0, metric="std", lower=True),
        gate("growing against all at once", "grip", "once", 0.0),
        gate("a confidence threshold gains nothing", "confidence", "zero_shot", 0.01, kind="control"),
        gate("and lets the three worst classes fall", "confidence", "zero_shot", 0.0, metric="worst3", kind="control"),
        gate("nor does one that grows", "grip_confidence", "zero_shot", 0.01, kind="control"),
        gate("random labels", "random", "zero_shot", -0.10, kind="control"),
        gate("random labels against chance", "random", "chance", 0.05, kind="control", gate=False,
             note="labels that say nothing pull no class in any direction: they wear the words out, slowly"),
        gate("growing against all at once with as many updates", "grip", "once_long", 0.0, gate=False),
        gate("GRIP against IFPL", "grip", "ifpl", 0.0, gate=False),
        gate("starting afresh against going on", "grip", "grip_going_on", 0.0, gate=False),
        gate("GRIP against true labels", "grip", "oracle", 0.0, gate=False),
        gate("the surest of each class: their labels against those of a threshold", "fpl", "confidence", 0.0,
             metric="right", gate=False),
        gate("GRIP's last labels against all at once", "grip", "once", 0.0, metric="right", gate=False),
    ),
)  # fmt: skip


def run(arm: str, seed: int) -> dict[str, float]:
    """Accuracy of one arm; `right`, the share of its last pseudolabels that are true."""
    pool, truth, test, asked = data(seed)
    if arm == "chance":
        return {"accuracy": 1 / len(SHOWN)}
    if arm == "zero_shot":
        return measured(test @ zero_shot_head(tiny(), SHOWN, WORDS).T, asked)
    if arm in ("random", "oracle"):
        drawn = torch.randint(len(SHOWN), (POOL,), generator=torch.Generator().manual_seed(seed))
        judge = Coop(template="{}", batch_size=16, weight_decay=0.1, seed=seed, **TRAINING)
        judge.fit_features(tiny(), pool, truth if arm == "oracle" else drawn, classes=SHOWN)
        return measured(judge.scores_of(test), asked)
    learnt = PseudolabelTuning(SHOWN, templates=WORDS, seed=seed, **TRAINING | ARMS[arm]).fit_features(tiny(), pool)
    last = learnt.rounds_[-1]
    right = float((truth[last["rows"]] == last["labels"]).double().mean())
    return measured(learnt.scores_of(test), asked) | {"right": right}


def measured(scores: Tensor, truth: Tensor) -> dict[str, float]:
    hit = (scores.argmax(-1) == truth).double()
    classes = torch.stack([hit[truth == c].mean() for c in range(len(SHOWN))])
    return {
        "accuracy": float(hit.mean()),
        "worst3": float(classes.sort().values[:3].mean()),
        "std": float(classes.std(correction=0)),
    }


class Data(NamedTuple):
    pool: Tensor
    truth: Tensor
    test: Tensor
    asked: Tensor


@cache
def tiny() -> HFEncoder:
    return load("tiny")


@cache
def data(seed: int) -> Data:
    def drawn(split: str, n: int) -> tuple[Tensor, Tensor]:
        records = scenes(split, n, seed + 3000, tiny().image_size, shapes=SHOWN, holdout=(), **SHIFT)
        return encode_views(tiny(), records)[0], labels_of(records, SHOWN)[1]

    return Data(*drawn("train", POOL), *drawn("test", TESTED))
