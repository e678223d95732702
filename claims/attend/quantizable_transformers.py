"""Why outliers grow, what it takes to do nothing, and what outliers cost at 8 bits. Three parts, exact enough to run in minutes.

(a) Pressure to do nothing. One head, 16 tokens of 16 numbers, 32 sequences. The value of token 0, a delimiter, is about 0.02 in
each channel, the others are normal; values are fixed, and the projections of query and key (and the gate) learn to make the
head's output small: Adam, 3e-3, 3000 steps. Weights start at 0.1 N(0, 1), so that logits start 0.6 wide like the reference
run's, biases at 0. `range`: mean over rows of the largest logit less the smallest, after 300, 1000 and 3000 steps; `loss`: mean
squared length of the output. Clipped softmax with alpha = 3 starts dead here, which for this task is the solution. `zeta_only`
stretches upwards instead of downwards (gamma = 0, zeta = 1.03), and must not help.

What was seen before: in a first run on these seeds weights started at N(0, 1) / 4, without biases; a query and its opposite
cannot then both favour the delimiter, no softmax head learnt to be silent (loss 0.77), and logits did not grow. Biases came, and
the start of the reference; a pilot of that on seed 100 grew 1.19- and 1.12-fold: the first margin is met narrowly on these.

(b) The gap of logits by which one key must stand above T - 1 equal others, so that these get less than eps in all (softmax) or
exactly nothing (clipped): found by bisection in 200 random settings, against the closed form. `error`: largest difference.

(c) Outliers put into a trained model. In every layer of `tiny` two channels of the values are multiplied by 200 and the matching
columns of the output projection divided by it: the same function in float. Zero-shot accuracy over colour and shape of 1,000
scenes, in float and with activations (weights in float) at 8 bits, calibrated on 16 batches of 32 other scenes. `inf_norm` and
`kurtosis` are those of the heads' joined contexts, by `outlier_metrics`.

That outliers grow by themselves in long training is no part of this: see docs/attention.md.
"""

from __future__ import annotations

import math
from functools import cache
from random import Random
from typing import Any

import torch
from torch import Tensor

from ecliptic.core.anatomy import parts
from ecliptic.core.claims import Claim, Gate
from ecliptic.core.encoder import HFEncoder, load
from ecliptic.core.outliers import outlier_metrics
from ecliptic.core.ptq import ptq
from ecliptic.core.zeroshot import zero_shot_head
from ecliptic.data.scenes import COLOURS, SHAPES, scenes
from ecliptic.methods.attend.quantizable_transformers import AttentionGate, clipped_softmax, gamma_from_alpha

TOKENS, WIDTH, SEQUENCES, RATE = 16, 16, 32, 3e-3
LOOKS = (300, 1000, 3000)
TESTED, CALIBRATED, FACTOR, CHANNELS = 1000, 16 * 32, 200.0, 2

CLAIM = Claim(
    says="a head that must do nothing keeps its logits small with clipped softmax, where softmax's grow without end, and does it "
    "better with a gate; and activation outliers alone, without any change in float, ruin a model at 8 bits",
    arms=(
        "softmax", "softmax_300", "softmax_1000", "clipped_3", "clipped_1", "gated", "zeta_only", "zeta_only_1000", "uniform",
        "gap_softmax", "gap_clipped", "clean", "clean_a8", "outliers", "outliers_a8",
    ),
    mode="ratio",
    gates=(  # margins as the published mechanism and its reference run suggest them, set before the first run
        Gate("softmax: logits grow from step 300 to 1000", "softmax_1000", "softmax_300", 1.25, "range"),
        Gate("softmax: and on to step 3000", "softmax", "softmax_1000", 1.10, "range"),
        Gate("clipped, alpha 3: range of at most 3", "clipped_3", "uniform", 3.0, "most", "control", "difference"),
        Gate("clipped, alpha 1: range of at most 3", "clipped_1", "uniform", 3.0, "most", "control", "difference"),
        Gate("gated: loss of at most 0.3 of softmax's", "gated", "softmax", 1 / 0.3, "loss", lower=True),
        Gate("zeta above 1 alone: range no smaller than softmax's by 15 %", "zeta_only", "softmax", 1.15, "range", "control",
             lower=True),
        Gate("zeta above 1 alone: and still growing", "zeta_only", "zeta_only_1000", 1.10, "range"),
        Gate("softmax's gap is the formula's", "gap_softmax", "uniform", 1e-6, "error", "control", "difference"),
        Gate("clipped softmax's gap is the formula's", "gap_clipped", "uniform", 1e-6, "error", "control", "difference"),
        Gate("without outliers 8 bits cost at most a point", "clean", "clean_a8", 0.01, "accuracy", "control", "difference"),
        Gate("with outliers they cost 20 points", "outliers", "outliers_a8", 0.20, "accuracy", mode="difference"),
        Gate("in float, outliers change no answer", "clean", "outliers", 0.001, "accuracy", "control", "difference"),
        Gate("inf-norm of the contexts", "outliers", "clean", 50.0, "inf_norm"),
        Gate("kurtosis of the contexts", "outliers", "clean", 10.0, "kurtosis",
             note="Where 2 channels of D rule, kurtosis is D / 2 times theirs: with D = 96 it hardly rises above 48-fold."),
        Gate("kurtosis of the contexts, as much as the norm", "outliers", "clean", 50.0, "kurtosis", gate=False),
        Gate("clipped, alpha 3: loss", "softmax", "clipped_3", 0.0, "loss", mode="difference", gate=False),
        Gate("gated: range of the logits", "gated", "softmax", 1.0, "range", lower=True, gate=False),
    ),
    note="A gate only damps the gradient of the logits, which drift on in this toy; so its loss is judged, not its range.",
)  # fmt: skip


def run(arm: str, seed: int) -> dict[str, float]:
    if arm.startswith("gap_"):
        return {"error": gap_error(arm.removeprefix("gap_"), seed)}
    if arm in ("clean", "clean_a8", "outliers", "outliers_a8"):
        return compressed(arm.startswith("outliers"), arm.endswith("_a8"), seed)
    at = next((step for step in LOOKS if arm.endswith(f"_{step}")), LOOKS[-1])
    looks = pressed(arm.removesuffix(f"_{at}"), seed)
    return {**looks[at], "most": max(look["range"] for look in looks.values()), "error": 0.0}


# (a) Pressure to do nothing


@cache
def pressed(variant: str, seed: int) -> dict[int, dict[str, float]]:
    """Train one head to be silent; what was found at each of `LOOKS`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, values = normal(SEQUENCES, TOKENS, WIDTH), normal(SEQUENCES, TOKENS, WIDTH)
    x[:, 0] = normal(WIDTH)  # the delimiter is the same everywhere
    values[:, 0] = 0.02 * normal(WIDTH)
    weights = [(0.1 * normal(WIDTH, WIDTH)).requires_grad_() for _ in range(2)]
    biases = [torch.zeros(WIDTH).requires_grad_() for _ in range(2)]
    gate = AttentionGate(1, WIDTH, "linear", pi_init=0.5, seed=seed) if variant == "gated" else None
    learnt = [*weights, *biases, *(gate.parameters() if gate else ())]
    if variant == "uniform":
        weights = [torch.zeros(WIDTH, WIDTH) for _ in range(2)]
    optimiser = torch.optim.Adam(learnt, RATE)
    found = {}
    for step in range(1, LOOKS[-1] + 1):
        query, key = (x @ weight + bias for weight, bias in zip(weights, biases))
        scores = query @ key.transpose(1, 2) / WIDTH**0.5
        out = probabilities(variant, scores) @ values
        if gate is not None:
            out = out * gate(x)[:, 0]
        loss = out.square().sum(-1).mean()
        if step in LOOKS:
            spread = (scores.amax(-1) - scores.amin(-1)).mean()
            found[step] = {"range": float(spread.detach()), "loss": float(loss.detach())}
        if variant != "uniform":
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return found


def probabilities(variant: str, scores: Tensor) -> Tensor:
    if variant.startswith("clipped_"):
        return clipped_softmax(scores, gamma_from_alpha(float(variant[-1]), TOKENS))
    if variant == "zeta_only":
        return clipped_softmax(scores, 0.0, 1.03)
    return scores.softmax(-1)


# (b) The gap it takes


def gap_error(kind: str, seed: int) -> float:
    """Largest difference of the gap found by bisection and the closed form, over random lengths, shares and alphas."""
    random, worst = Random(seed), 0.0
    for _ in range(200):
        keys, eps, alpha = random.randint(2, 600), 10 ** random.uniform(-6, -1), random.uniform(0.1, 4.0)
        gamma = gamma_from_alpha(alpha, keys)
        tau = -gamma / (1 - gamma)

        def silent(gap: float, keys: int = keys, eps: float = eps, gamma: float = gamma) -> bool:
            x = torch.zeros(keys, dtype=torch.float64)
            x[0] = gap
            if kind == "softmax":
                return float(x.softmax(-1)[1:].sum()) <= eps
            return float(clipped_softmax(x, gamma)[1:].sum()) == 0

        if kind == "softmax":
            told = math.log((keys - 1) * (1 - eps) / eps)
        else:
            told = math.log((1 - (keys - 1) * tau) / tau) if (keys - 1) * tau < 1 else 0.0
        worst = max(worst, abs(max(told, 0.0) - least(silent)))  # a gap below 0 is none: the others are silent anyway
    return worst


def least(holds: Any, low: float = 0.0, high: float = 60.0) -> float:
    """The smallest gap in [low, high] from which it holds."""
    if holds(low):
        return low
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


# (c) Outliers at 8 bits


@cache
def tiny() -> HFEncoder:
    return load("tiny")


@torch.no_grad()
def with_outliers(encoder: HFEncoder, seed: int) -> HFEncoder:
    """Two channels of the values in every layer FACTOR times as large, the output projection in proportion smaller."""
    changed, generator = encoder.clone(), torch.Generator().manual_seed(seed)
    for tower in (changed.anatomy.image, changed.anatomy.text):
        for block in tower.blocks:
            layers = parts(block)
            channels = torch.randperm(layers.v.out_features, generator=generator)[:CHANNELS]
            layers.v.weight[channels] *= FACTOR
            layers.v.bias[channels] *= FACTOR
            layers.out.weight[:, channels] /= FACTOR
    return changed


@cache
def compressed(outliers: bool, rounded: bool, seed: int) -> dict[str, float]:
    encoder = with_outliers(tiny(), seed) if outliers else tiny()
    size, names = encoder.image_size, [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    train = scenes("train", CALIBRATED, seed + 3000, size)[:]
    batches = [
        (encoder.preprocess([r["image"] for r in rows]), encoder.tokenize([r["caption"] for r in rows]))
        for rows in (train[i : i + 32] for i in range(0, CALIBRATED, 32))
    ]
    found = {}
    if not rounded:
        contexts = [f"{name}.input" for name, _ in encoder.named_modules() if name.endswith("self_attn.out_proj")]
        metrics = outlier_metrics(encoder, batches[:4], contexts)
        found = {"inf_norm": metrics.max_inf_norm, "kurtosis": metrics.avg_kurtosis}
    else:
        encoder = ptq(encoder, batches, w_bits=None)
    test = scenes("test", TESTED, seed + 3000, size, label=("colour", "shape"))[:]
    rows = encoder.encode_images([r["image"] for r in test])
    answers = (rows @ zero_shot_head(encoder, names, ("a {}",)).T).argmax(-1)
    right = [names[i] == r["label"] for i, r in zip(answers.tolist(), test)]
    return {**found, "accuracy": sum(right) / len(right)}
