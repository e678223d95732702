"""Straggler sharpness: does averaging weights before and after fine-tuning help, and which layers stand in its way?

Robust fine-tuning (WiSE-FT, arXiv 2109.01903) mixes a zero-shot and a fine-tuned model, which usually, but not always,
helps under shift. The paper asks what tells when: not the sharpness of the loss in all weights, but that in a few straggler
layers, which lag behind or spoil the path between the two; making those sparse mends it.

No code was released and the full text could not be read. (uncertain) is how stragglers are found, here by moving one layer
along the path while the others stay fine-tuned, which of two ways of sparsifying was used (`on`), and all defaults. At the scale
of this project's claim the paper's correlation does not show; the claim says so.

`straggler_sharpness` audits an encoder and models tuned from it:

    report = straggler_sharpness(load("tiny"), {"lr 1e-3": tuned}, records, {"noise": noisy_records})
    print(report)

The parts take any `nn.Module`: `interpolated`, `rft_curve`, `sharpness`, `find_stragglers`, `sparsify`, `report`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ecliptic.core.contracts import ModelStep, Pairs, Record
from ecliptic.core.encoder import Encoder, HFEncoder
from ecliptic.core.method import Paper, method
from ecliptic.core.prompt_classifier import PromptClassifier, logit_scale
from ecliptic.core.sharpness import Kind, Loss, State, check_sharpness, directional_loss, sharpness
from ecliptic.core.train import Train
from ecliptic.core.tuned import check_tunable
from ecliptic.core.zeroshot import template_set, zero_shot_head
from ecliptic.data.shots import check_labels, labels_of, tiny_records
from ecliptic.eval.report import FRACTION, Number, Report, Table

Score = Callable[[nn.Module], float]
"""A model, at some weights -> a number, such as its accuracy."""

ALPHAS = tuple(k / 10 for k in range(11))  # WiSE-FT's grid
KAPPAS = (0.1, 0.3, 0.5, 0.7, 0.9)  # (uncertain)


@method(
    Paper(
        "In Search of the Successful Interpolation: On the Role of Sharpness in CLIP Generalization",
        arxiv="2410.16476",
        year=2024,
    ),
    purpose="tell whether averaging a model before and after fine-tuning helps under shift, and which layers are in its way",
    claim="the best mix is hardly ever worse than both ends under shift, and fails where the learning rate was largest; "
    "whether sharp straggler layers foretell that is reported",
)
def straggler_sharpness(
    encoder: Encoder,
    tuned: Mapping[str, Any],
    pairs: Pairs,
    shifted: Mapping[str, Pairs],
    *,
    classes: Sequence[str] | None = None,
    templates: str | Sequence[str] = "photo",
    alphas: Sequence[float] = ALPHAS,
    rho: float = 0.05,
    kind: Kind = "avg",
    norm: float = math.inf,
    samples: int = 20,
    top: float = 0.25,
    kappas: Sequence[float] = KAPPAS,
    batch_size: int = 256,
    seed: int = 0,
) -> Report:
    """Audit models tuned from `encoder` as classifiers of pictures: gains of mixing, stragglers, sharpness, and sparsifying.

    tuned: by name, encoders of the same architecture, or steps (such as `Train`) that make one of `encoder` and `pairs`. pairs:
    labelled pictures of the domain tuned on, preferably not those tuned on; stragglers, sharpness and kappa come from them
    alone. shifted: by name, labelled pictures of other domains. The classifier is the words' embedding before and after.
    rho: 0.05 to 0.1 for "avg", 5e-4 to 2e-3 for "max" with norm inf, 0.25 to 1 with norm 2. top: share of the layers that
    are called stragglers.
    Raises ValueError or TypeError before any picture is encoded.
    """
    template_set(templates)
    check_sharpness(rho, kind, norm, samples)
    if not tuned or not shifted:
        raise ValueError(f"{'tuned' if not tuned else 'shifted'} is empty: there is nothing to compare")
    if not 0 < top <= 1:
        raise ValueError(f"top={top}: a share of the layers, above 0 and up to 1")
    _check_alphas(alphas)
    if any(not 0 <= kappa <= 1 for kappa in kappas):
        raise ValueError(f"kappas={tuple(kappas)}: shares of the weights, 0 to 1")
    names, labels = labels_of(pairs, classes)
    check_labels(labels, len(labels), names)
    truths = {name: labels_of(records, names)[1] for name, records in shifted.items()}
    before = check_tunable(encoder)
    for name, given in tuned.items():
        _check_tuned(name, given, before)
    model = TowerClassifier(before, names, templates)
    theta0, layers = _copied(model), model.layers()
    pixels = _pixels(before, pairs)
    others = {name: (_pixels(before, records), truths[name]) for name, records in shifted.items()}
    batches = list(zip(torch.split(pixels, batch_size), torch.split(labels, batch_size)))

    def inside(classifier: nn.Module) -> float:
        return accuracy(classifier, batches)

    def outside(classifier: nn.Module) -> float:
        found = [accuracy(classifier, [(x, y)]) for x, y in others.values()]
        return sum(found) / len(found)

    runs = []
    for name, given in tuned.items():
        after = given.apply(before, pairs) if isinstance(given, ModelStep) else given
        theta1 = _copied(TowerClassifier(check_tunable(after), names, templates))
        runs.append(
            audit_run(
                name, model, theta0, theta1, layers, inside, outside, batches, alphas=alphas, rho=rho, kind=kind, norm=norm,
                samples=samples, top=top, kappas=kappas, seed=seed,
            )
        )  # fmt: skip
    return report(runs, seed=seed)


class TowerClassifier(nn.Module):
    """The picture tower of an encoder with class prompts as a linear layer: what is mixed, and what sharpness is asked of.

    `classifier` (K, D) are the prompts' unit rows; `scale`, a buffer, multiplies cosines. Pixels (B, 3, H, W) -> logits (B, K).
    """

    scale: Tensor

    def __init__(self, encoder: HFEncoder, names: Sequence[str], templates: str | Sequence[str] = "photo"):
        super().__init__()
        own = encoder.clone()
        self._encoder = [own]  # in a list: its text tower is no part of this module
        self.tower, self.projection = own.anatomy.image.module, own.anatomy.image.projection
        self.classifier = nn.Parameter(zero_shot_head(own, names, templates).to(own.device))
        self.register_buffer("scale", torch.as_tensor(logit_scale(own.scale.detach(), own.bias)).float().clone())

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.scale * self._encoder[0].images(pixels).pooled @ self.classifier.T
        return found

    def layers(self) -> dict[str, list[str]]:
        """Names of the parameters of each layer: blocks, embeddings, norms outside the blocks, SigLIP's attention-pooling head
        ("head"), projection, and classifier."""
        of_block = {
            id(p): f"block {i}" for i, b in enumerate(self._encoder[0].anatomy.image.blocks) for p in b.parameters()
        }
        found: dict[str, list[str]] = {}
        for name, parameter in self.named_parameters():
            path = name.split(".")
            plain = path[1] if path[0] == "tower" else path[0]
            found.setdefault(of_block.get(id(parameter), plain), []).append(name)
        return found


def layers_of(model: nn.Module) -> dict[str, list[str]]:
    """For any other model: each module that holds parameters itself is a layer."""
    return {
        prefix: [f"{prefix}.{name}".lstrip(".") for name, _ in own]
        for prefix, module in model.named_modules()
        if (own := list(module.named_parameters(recurse=False)))
    }


# The path


def interpolated(theta0: State, theta1: State, alpha: float, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """(1 - alpha) theta0 + alpha theta1 for parameters and buffers `names` (None: all); the others are those of theta1.

    alpha = 0 and 1 give the ends bit for bit. What is no floating-point number is theta1's. ValueError for other alphas, or
    where the two do not agree in names and shapes.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: must lie between 0 and 1")
    differing = sorted(theta0.keys() ^ theta1.keys()) or [n for n in theta0 if theta0[n].shape != theta1[n].shape]
    if differing:
        raise ValueError(f"the two ends differ in architecture, first in {differing[0]}")
    chosen = set(theta1 if names is None else names)

    def mixed(name: str) -> Tensor:
        old, new = theta0[name], theta1[name]
        if name not in chosen or alpha == 1 or not new.is_floating_point():
            return new.clone()
        return old.clone() if alpha == 0 else (1 - alpha) * old + alpha * new

    return {name: mixed(name) for name in theta1}


class Curve(NamedTuple):
    """Along the path, one value for each alpha: accuracies in the tuned domain and under shift, in [0, 1], and loss in nats."""

    alphas: tuple[float, ...]
    inside: tuple[float, ...]
    outside: tuple[float, ...]
    loss: tuple[float, ...]

    @property
    def gain(self) -> float:
        """max over alpha of shifted accuracy, less the better end: 0 where no mix is better. Never negative."""
        return max(self.outside) - max(self.outside[0], self.outside[-1])

    @property
    def best(self) -> float:
        """The alpha of the highest shifted accuracy."""
        return self.alphas[int(np.argmax(self.outside))]

    @property
    def inner(self) -> float:
        """The highest shifted accuracy strictly between the ends: unlike `gain`, it can be worse than they are."""
        return max(self.outside[1:-1])

    @property
    def fails(self) -> bool:
        """No mix, nor the tuned model, beats the zero-shot one, or there is a dip: a mix worse than both ends."""
        return max(self.outside) <= self.outside[0] or min(self.outside) < min(self.outside[0], self.outside[-1])

    @property
    def barrier(self) -> float:
        """max over alpha of loss less the straight line between the ends, in nats; 0 at the ends, so never negative."""
        line = [(1 - a) * self.loss[0] + a * self.loss[-1] for a in self.alphas]
        return max(0.0, *(value - straight for value, straight in zip(self.loss, line, strict=True)))


def rft_curve(
    model: nn.Module,
    theta0: State,
    theta1: State,
    inside: Score,
    outside: Score,
    loss: Score,
    alphas: Sequence[float] = ALPHAS,
    recalibrate: Callable[[nn.Module], Any] | None = None,
) -> Curve:
    """Accuracies and loss at each alpha, ascending from 0 to 1. recalibrate: called at each, to estimate batch statistics anew
    in models that have them."""
    _check_alphas(alphas)
    own, rows = copy.deepcopy(model).eval(), []
    for alpha in alphas:
        mixed = _at(own, interpolated(theta0, theta1, alpha))
        if recalibrate is not None:
            recalibrate(mixed)
        rows.append((inside(mixed), outside(mixed), loss(mixed)))
    return Curve(tuple(alphas), *map(tuple, zip(*rows)))


def _check_alphas(alphas: Sequence[float]) -> None:
    if list(alphas) != sorted(set(alphas)) or len(alphas) < 3 or (alphas[0], alphas[-1]) != (0, 1):
        raise ValueError(f"alphas={tuple(alphas)}: must ascend from 0 to 1, both included and others between")


# Stragglers


def find_stragglers(
    model: nn.Module,
    theta0: State,
    theta1: State,
    inside: Score,
    layers: Mapping[str, Sequence[str]],
    alphas: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
) -> list[tuple[str, float]]:
    """Every layer with its score, worst first (ties: in the order of the model). inside: accuracy, on the tuned domain only.

    One layer moves along the path while the rest stay tuned. Its score is how far accuracy dips below the line between its ends,
    plus what is lost where it is rewound altogether (uncertain).
    """
    own, scores = copy.deepcopy(model).eval(), []
    for layer, names in layers.items():
        row = []
        for alpha in alphas:
            row.append(inside(_at(own, interpolated(theta0, theta1, alpha, names))))
        dip = max((1 - a) * row[0] + a * row[-1] - value for a, value in zip(alphas, row, strict=True))
        scores.append((layer, dip + max(0.0, row[-1] - row[0])))
    return sorted(scores, key=lambda item: -item[1])


def sparsify(
    theta1: State,
    names: Iterable[str],
    amount: float,
    on: Literal["weight", "delta"] = "delta",
    reference: State | None = None,
) -> dict[str, Tensor]:
    """theta1 with the `amount` of smallest entries of each tensor `names` set to zero (on="weight"), or, of the smallest changes,
    back to `reference`, which is theta0 (on="delta"). amount=0 changes nothing; "delta" with 1 gives the reference's layer."""
    if not 0 <= amount <= 1:
        raise ValueError(f"amount={amount}: a share, 0 to 1")
    if on not in ("weight", "delta"):
        raise ValueError(f"on={on!r}: choose 'weight' or 'delta'")
    if on == "delta" and reference is None:
        raise ValueError("on='delta' resets to reference=, the weights before tuning")
    found = {name: value.clone() for name, value in theta1.items()}
    for name in names:
        value = theta1[name]
        goal = torch.zeros_like(value) if on == "weight" else cast(State, reference)[name]
        smallest = (value - goal).abs().flatten().argsort(stable=True)[: round(amount * value.numel())]
        found[name].view(-1)[smallest] = goal.flatten()[smallest]
    return found


# A population of tuned models


def plain_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy in nats."""
    inputs, labels = batch
    return cross_entropy(model(inputs), labels)


@dataclass(frozen=True)
class Run:
    """One tuned model: its curve, the sharpness of the best mix in all weights and in each layer, its stragglers (worst first),
    and the gain after these were made sparse by `kappa`, chosen on the tuned domain (0: not at all)."""

    name: str
    curve: Curve
    total: float
    layers: Mapping[str, float]
    stragglers: tuple[str, ...]
    sparse_gain: float
    kappa: float

    def mean_sharpness(self, chosen: Iterable[str]) -> float:
        values = [self.layers[name] for name in chosen]
        return sum(values) / len(values) if values else 0.0

    @property
    def others(self) -> tuple[str, ...]:
        return tuple(name for name in self.layers if name not in self.stragglers)


def audit_run(
    name: str,
    model: nn.Module,
    theta0: State,
    theta1: State,
    layers: Mapping[str, Sequence[str]],
    inside: Score,
    outside: Score,
    batches: Sequence[Any],
    *,
    loss: Loss = plain_loss,
    sharp_loss: Loss = directional_loss,
    alphas: Sequence[float] = ALPHAS,
    rho: float = 0.05,
    kind: Kind = "avg",
    norm: float = math.inf,
    samples: int = 20,
    top: float = 0.25,
    kappas: Sequence[float] = KAPPAS,
    seed: int = 0,
) -> Run:
    """Everything about one tuned model. Shifted pictures are asked for the curves only, never to choose.

    loss: of the curve and its barrier. sharp_loss: whose sharpness is measured.
    """

    def mean_loss(mixed: nn.Module) -> float:
        with torch.no_grad():
            return float(torch.stack([loss(mixed, batch) for batch in batches]).mean())

    curve = rft_curve(model, theta0, theta1, inside, outside, mean_loss, alphas)
    scored = find_stragglers(model, theta0, theta1, inside, layers)
    chosen = tuple(layer for layer, _ in scored[: max(1, round(top * len(scored)))])
    mixed = _at(copy.deepcopy(model), interpolated(theta0, theta1, curve.best))
    options: dict[str, Any] = {"rho": rho, "kind": kind, "norm": norm, "samples": samples, "seed": seed}
    total = sharpness(mixed, sharp_loss, batches, **options)
    each = {layer: sharpness(mixed, sharp_loss, batches, names=names, **options) for layer, names in layers.items()}
    lagging = [name for layer in chosen for name in layers[layer]]
    best, kappa, sparse = -1.0, 0.0, curve
    for amount in (0.0, *kappas):
        thin = sparsify(theta1, lagging, amount, "delta", theta0)
        found = rft_curve(model, theta0, thin, inside, outside, mean_loss, alphas)
        if (value := max(found.inside)) > best:
            best, kappa, sparse = value, amount, found
    return Run(name, curve, total, each, chosen, sparse.gain, kappa)


def rank_correlation(x: Sequence[float], y: Sequence[float], resamples: int = 1000, seed: int = 0) -> Number:
    """Kendall's tau-b with its 95 % bootstrap interval over the pairs; 0 where either does not vary."""
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"a correlation needs two or more pairs, got {len(x)} and {len(y)} values")
    rng, a, b = np.random.default_rng(seed), np.asarray(x, float), np.asarray(y, float)
    draws = rng.integers(len(a), size=(resamples, len(a)))
    low, high = np.quantile([_tau(a[rows], b[rows]) for rows in draws], [0.025, 0.975])
    return Number(_tau(a, b), float(low), float(high), n=len(a))


def _tau(a: np.ndarray, b: np.ndarray) -> float:
    order = np.sign(a[:, None] - a) * np.sign(b[:, None] - b)
    ties = (np.sign(a[:, None] - a) != 0).sum() * float((np.sign(b[:, None] - b) != 0).sum())
    return float(order.sum() / math.sqrt(ties)) if ties else 0.0


def report(runs: Sequence[Run], resamples: int = 1000, draws: int = 20, seed: int = 0) -> Report:
    """Gains and stragglers of every run and, with four or more, rank correlations over the population of the error under shift of
    the best mix with: sharpness of all weights, of stragglers, of the other layers, and the barrier.

    `random layers` is the null: as many layers drawn at random in the place of stragglers, `draws` times. Models of one ancestor
    are not independent, and with twelve of them |tau| < 0.4 is noise.
    """
    if not runs:
        raise ValueError("there are no runs to report on")
    curves = [run.curve for run in runs]
    shares = {
        "no_worse_than_both_ends": [c.inner >= max(c.outside[0], c.outside[-1]) for c in curves],
        "better_than_both_ends": [c.gain > 0 for c in curves],
        "failing": [c.fails for c in curves],
    }
    numbers = {f"interpolation.share_{name}": _mean(values) for name, values in shares.items()}
    numbers["interpolation.gain"] = _mean([c.gain for c in curves])
    numbers["interpolation.gain_sparse"] = _mean([run.sparse_gain for run in runs])
    if len(runs) >= 4:
        error = [1 - max(c.outside) for c in curves]
        predictors = {
            "all_weights": [run.total for run in runs],
            "stragglers": [run.mean_sharpness(run.stragglers) for run in runs],
            "other_layers": [run.mean_sharpness(run.others) for run in runs],
            "barrier": [c.barrier for c in curves],
        }
        for name, values in predictors.items():
            numbers[f"tau.{name}"] = rank_correlation(values, error, resamples, seed)
        rng = np.random.default_rng(seed)
        null = []
        for _ in range(draws):
            picked = [rng.permutation(list(run.layers))[: len(run.stragglers)] for run in runs]
            values = [run.mean_sharpness(map(str, chosen)) for run, chosen in zip(runs, picked, strict=True)]
            null.append(_tau(np.asarray(values), np.asarray(error)))
        low, high = (float(end) for end in np.quantile(null, [0.025, 0.975]))
        numbers["tau.random_layers"] = Number(
            float(np.mean(null)), min(low, float(np.mean(null))), max(high, float(np.mean(null))), n=draws
        )
    columns = ("model", "shifted, frozen", "shifted, tuned", "shifted, best mix", "alpha", "gain", "barrier", "sharpness",
               "of stragglers", "stragglers", "gain, sparse", "kappa")  # fmt: skip
    rows = [
        (run.name, run.curve.outside[0], run.curve.outside[-1], max(run.curve.outside), run.curve.best, run.curve.gain,
         run.curve.barrier, run.total, run.mean_sharpness(run.stragglers), ", ".join(run.stragglers), run.sparse_gain, run.kappa)
        for run in runs
    ]  # fmt: skip
    return Report("Straggler sharpness", numbers, [Table(columns, rows, "tuned models")])


def _mean(values: Sequence[float]) -> Number:
    return Number(sum(values) / len(values), n=len(values), unit=FRACTION)


# Small parts


def _check_tuned(name: str, given: Any, before: HFEncoder) -> None:
    if isinstance(given, ModelStep):
        return
    if not isinstance(given, HFEncoder):
        raise TypeError(f"tuned[{name!r}] is a {type(given).__name__}: give encoders, or steps that make one")
    shapes, own = ({n: v.shape for n, v in e.state_dict().items()} for e in (before, given))
    if shapes != own:
        raise ValueError(
            f"tuned[{name!r}] has another architecture than {before.name}: only one and the same can be mixed"
        )


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Share of inputs whose highest logit is the label's."""
    right = count = 0
    with torch.no_grad():
        for inputs, labels in batches:
            answers = model(inputs).argmax(-1).cpu()
            right, count = right + int((answers == labels).sum()), count + len(labels)
    return right / count


def _at(model: nn.Module, state: State) -> nn.Module:
    """The model with these weights, in place."""
    model.load_state_dict(dict(state))
    return model


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _pixels(encoder: HFEncoder, pairs: Pairs) -> Tensor:
    return encoder.preprocess([record["image"] for record in pairs])


def tiny() -> dict[str, Any]:
    """Arguments for the contract tests: a model tuned for two steps, one shift."""
    records = tiny_records()
    darker: list[Record] = [{**r, "image": r["image"].point(lambda v: v // 2)} for r in records]
    step = Train(PromptClassifier(("blue", "green", "red")), steps=2, batch_size=6, lr=1e-3, warmup=0, freeze=("text",))
    return {
        "tuned": {"two steps": step}, "pairs": records, "shifted": {"darker": darker}, "alphas": (0.0, 0.5, 1.0),
        "samples": 1, "kappas": (0.5,),
    }  # fmt: skip
