"""Classifying by a support set of pictures and captions: Tip-Adapter, TIP-X and M-Adapter, and one search for their weights.

All three add votes of support items to the zero-shot logits l0 = scale * f T' (unit rows throughout):

    Tip-Adapter (arXiv 2111.03930)   l0 + alpha exp(-beta (1 - A)) L                    A = f F_img'
    TIP-X       (arXiv 2211.16198)   ... + gamma psi L                  psi = -rescale(KL(p_f || p_support), to the range of A)
    M-Adapter   (arXiv 2405.16591)   the same with A = (1 - delta) f F_img' + delta f F_cap'

so M-Adapter with delta = 0 is TIP-X, with gamma = 0 besides Tip-Adapter, and with alpha = 0 besides the zero-shot baseline,
each bit for bit. `compare` measures a batch against a support once; `m_adapter` and `search_m_adapter` work on what it gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

KlSpace = Literal["class", "feature"]
Interval = tuple[float, float]  # least and greatest
TEMPERATURE = 0.5  # of the class distributions that are compared; SuS-X and CapS-Adapter, released code
_CELLS = 1 << 22  # numbers held at a time while weights are counted; ours


class Support(NamedTuple):
    """M support items of K classes: unit rows `image_keys` (M, d) and `caption_keys` (M, d) or None, `labels` (M,) int64.

    classes: names in the order of the labels, where they are known.
    """

    image_keys: Tensor
    labels: Tensor
    caption_keys: Tensor | None = None
    classes: tuple[str, ...] = ()


class Comparison(NamedTuple):
    """What B pictures have in common with M support items.

    zero_shot (B, K): logits. images, captions (B, M): cosines with the keys. divergence (B, M): KL in nats, >= 0. Where a
    part is None, delta (captions) or gamma (divergence) must be 0.
    """

    zero_shot: Tensor
    images: Tensor
    captions: Tensor | None = None
    divergence: Tensor | None = None


class Weights(NamedTuple):
    """alpha: of the votes; beta: their sharpness; gamma: of the divergence; delta in [0, 1]: the captions' share."""

    alpha: float
    beta: float
    gamma: float = 0.0
    delta: float = 0.0

    def given(self, **values: float | None) -> Weights:
        """The same with those of the values that are not None."""
        return self._replace(**{name: float(value) for name, value in values.items() if value is not None})


LABEL_FREE = Weights(1.0, 5.5, 0.0, 0.5)
"""Where nothing can be validated: a choice of ours, in no paper."""

TIP_START = Weights(1.17, 1.0)
"""Where Tip-Adapter's search and training start: released ImageNet configuration (other sets start alpha at up to 2)."""


class Reference(NamedTuple):
    """Statistics of a reference batch (validation pictures), so that logits do not depend on the batch they come in.

    affinity: range of the mixed cosines; divergence: range of the KL; images, captions: mean and deviation of the cosines.
    """

    affinity: Interval
    divergence: Interval = (0.0, 0.0)
    images: Interval = (0.0, 1.0)
    captions: Interval = (0.0, 1.0)


def compare(
    features: Tensor,
    text: Tensor,
    support: Support,
    *,
    scale: float = 100.0,
    temp: float = TEMPERATURE,
    kl_space: KlSpace = "class",
    kl: bool = True,
) -> Comparison:
    """Pictures (B, d) and class texts (K, d), unit rows, against a support. kl: False leaves the divergence out."""
    cosines = features @ support.image_keys.T
    captions = None if support.caption_keys is None else features @ support.caption_keys.T
    divergence = None
    if kl:
        ours, theirs = (log_distribution(x, text, temp, kl_space) for x in (features, support.image_keys))
        divergence = kl_divergence(ours, theirs).to(features.dtype)
    return Comparison(scale * features @ text.T, cosines, captions, divergence)


def log_distribution(features: Tensor, text: Tensor, temp: float = TEMPERATURE, kl_space: KlSpace = "class") -> Tensor:
    """(N, d) and (K, d) unit rows -> (N, K) float64, log softmax over classes of cosine / temp.

    kl_space "feature" gives (N, d), log softmax over the coordinates of f / temp: what the released M-Adapter computes where
    its paper means the classes (uncertain whether on purpose), for comparison only.
    """
    features = features.double()
    return ((features @ text.double().T if kl_space == "class" else features) / temp).log_softmax(-1)


def kl_divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """Log distributions (B, K) and (M, K) -> (B, M): KL(ours_i || theirs_j) in nats, >= 0; float64, for the terms cancel."""
    p, log_q = ours.double().exp(), theirs.double()
    return ((p * ours.double()).sum(-1, keepdim=True) - p @ log_q.T).clamp_min(0)


def rescale(x: Tensor, source: Interval, target: Interval) -> Tensor:
    """Map `source` linearly onto `target`, ends exactly onto ends; a source of one point goes to the lower end.

    What lies outside of `source` lands outside of `target`.
    """
    if source[1] <= source[0]:
        return torch.full_like(x, target[0])
    share = (x.double() - source[0]) / (source[1] - source[0])
    return (target[0] * (1 - share) + target[1] * share).to(x.dtype)


def interval(x: Tensor, counted: Tensor | None = None) -> Interval:
    """Least and greatest of x, among the entries whose `counted` is not 0."""
    chosen = x if counted is None else x[counted != 0]
    return float(chosen.min()), float(chosen.max())


def mix(found: Comparison, delta: float, reference: Reference | None = None) -> Tensor:
    """(B, M): (1 - delta) * image cosines + delta * caption cosines.

    reference: bring the captions' cosines to the mean and deviation of the images' first, for towers where the two kinds
    lie in different ranges (SigLIP); z-scores of both would mix the same, this keeps the unit in which beta is meant.
    """
    if delta == 0:
        return found.images
    if found.captions is None:
        raise ValueError(f"delta={delta} mixes caption keys in, but this support has none")
    captions = found.captions
    if reference is not None:
        (mean, deviation), (own, spread) = reference.images, reference.captions
        captions = (captions - own) / max(spread, 1e-12) * deviation + mean
    return (1 - delta) * found.images + delta * captions


def reference_of(
    found: Comparison, delta: float, counted: Tensor | None = None, *, normalise_modalities: bool = False
) -> Reference:
    """The statistics to freeze, of a batch at this delta. counted (B, M): leave out the entries where it is 0."""
    spread = Reference((0.0, 0.0), (0.0, 0.0), *(_moments(x, counted) for x in (found.images, found.captions)))
    return spread._replace(
        affinity=interval(mix(found, delta, spread if normalise_modalities else None), counted),
        divergence=(0.0, 0.0) if found.divergence is None else interval(found.divergence, counted),
    )


def _moments(x: Tensor | None, counted: Tensor | None) -> Interval:
    if x is None:
        return 0.0, 1.0
    chosen = (x if counted is None else x[counted != 0]).double()
    return float(chosen.mean()), float(chosen.std(correction=0))


def votes(affinity: Tensor, labels: Tensor, n_classes: int, beta: float, counted: Tensor | None = None) -> Tensor:
    """(B, M) -> (B, K): sum over items j of a class of exp(-beta (1 - affinity_j)), times counted_j if given."""
    weight = torch.exp(-beta * (1 - affinity))
    return (weight if counted is None else weight * counted) @ one_hot(labels, n_classes).to(affinity)


def divergence_votes(
    found: Comparison, affinity: Tensor, labels: Tensor, reference: Reference, counted: Tensor | None = None
) -> Tensor:
    """psi L: (B, K), minus the sum over items of a class of the divergence, rescaled to the range of the affinities."""
    if found.divergence is None:
        raise ValueError("gamma is not 0, but the divergence was left out: compare(..., kl=True)")
    psi = -rescale(found.divergence, reference.divergence, reference.affinity)
    return (psi if counted is None else psi * counted) @ one_hot(labels, found.zero_shot.shape[1]).to(affinity)


def m_adapter(
    found: Comparison,
    labels: Tensor,
    weights: Weights,
    reference: Reference | None = None,
    *,
    normalise_modalities: bool = False,
) -> Tensor:
    """(B, K) logits; labels (M,) of the support. reference: None takes this batch's own statistics, as the papers' code does."""
    alpha, beta, gamma, delta = weights
    if alpha == 0 and gamma == 0:
        return found.zero_shot
    if reference is None:
        reference = reference_of(found, delta, normalise_modalities=normalise_modalities)
    affinity = mix(found, delta, reference if normalise_modalities else None)
    logits = found.zero_shot
    if alpha != 0:
        logits = logits + alpha * votes(affinity, labels, logits.shape[1], beta)
    if gamma != 0:
        logits = logits + gamma * divergence_votes(found, affinity, labels, reference)
    return logits


def m_adapter_logits(
    features: Tensor,
    text: Tensor,
    support: Support,
    alpha: float,
    beta: float,
    gamma: float = 0.0,
    delta: float = 0.0,
    temp: float = TEMPERATURE,
    *,
    scale: float = 100.0,
    reference: Reference | None = None,
    kl_space: KlSpace = "class",
    normalise_modalities: bool = False,
) -> Tensor:
    """Equations of M-Adapter from features (B, d) and texts (K, d), unit rows, to logits (B, K); see the top of this file."""
    found = compare(features, text, support, scale=scale, temp=temp, kl_space=kl_space, kl=gamma != 0)
    weights = Weights(alpha, beta, gamma, delta)
    return m_adapter(found, support.labels, weights, reference, normalise_modalities=normalise_modalities)


# Choosing the weights


class Grid(NamedTuple):
    """Values to search, each ascending: among equally accurate choices the smallest beta wins, then alpha, gamma, delta."""

    betas: tuple[float, ...]
    alphas: tuple[float, ...]
    gammas: tuple[float, ...] = (0.0,)
    deltas: tuple[float, ...] = (0.0,)

    def fixed(
        self,
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        delta: float | None = None,
    ) -> Grid:
        """The same with one value only where one is given."""

        def one(values: tuple[float, ...], value: float | None) -> tuple[float, ...]:
            return values if value is None else (float(value),)

        return Grid(one(self.betas, beta), one(self.alphas, alpha), one(self.gammas, gamma), one(self.deltas, delta))


DELTAS = tuple(i / 10 for i in range(11))
GRIDS = {
    "coarse": Grid(  # ours: zero among the weights, and sharper votes than the paper's for encoders that crowd their features
        (1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
        (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
        (0.0, 0.1, 0.3, 1.0, 3.0, 10.0),
        DELTAS,
    ),
    "paper": Grid(  # 200 x 20 x 50 x 11 values, released `madapter.py`: 1 to 50, 0.1 to 50, 0.1 to 30, ends left out; 0 to 1
        tuple(1 + 0.245 * i for i in range(200)),
        tuple(0.1 + 2.495 * i for i in range(20)),
        tuple(0.1 + 0.598 * i for i in range(50)),
        DELTAS,
    ),
}


class Choice(NamedTuple):
    """The weights found, the statistics to freeze with them, and their accuracy on the validation pictures."""

    weights: Weights
    reference: Reference
    accuracy: float


def search_m_adapter(
    found: Comparison,
    labels: Tensor,
    truth: Tensor,
    grid: Grid = GRIDS["coarse"],
    counted: Tensor | None = None,
    *,
    normalise_modalities: bool = False,
) -> Choice:
    """The weights of the highest accuracy on validation pictures: their comparison, support labels (M,), truth (B,).

    counted (B, M): by how much each item votes on each picture, 0 for not at all (see `held_out`). Every combination of the
    grid is judged. Only deltas and betas are walked through; alphas are done at once, and for each the gammas for which a
    picture is answered rightly form one interval, since all margins are linear in gamma.
    """
    if found.captions is None:
        grid = grid._replace(deltas=(0.0,))
    n_classes = found.zero_shot.shape[1]
    right = torch.zeros([len(values) for values in grid], dtype=torch.int64)
    references = []
    for d, delta in enumerate(grid.deltas):
        reference = reference_of(found, delta, counted, normalise_modalities=normalise_modalities)
        references.append(reference)
        affinity = mix(found, delta, reference if normalise_modalities else None)
        psi = torch.zeros_like(found.zero_shot)
        if grid.gammas != (0.0,):
            psi = divergence_votes(found, affinity, labels, reference, counted)
        for b, beta in enumerate(grid.betas):
            said = votes(affinity, labels, n_classes, beta, counted)
            right[b, :, :, d] = count_right(found.zero_shot, said, psi, truth, grid.alphas, grid.gammas)
    b, a, g, d = (right == right.max()).nonzero()[0].tolist()
    weights = Weights(grid.alphas[a], grid.betas[b], grid.gammas[g], grid.deltas[d])
    return Choice(weights, references[d], int(right.max()) / len(truth))


def count_right(
    base: Tensor, one: Tensor, two: Tensor, truth: Tensor, alphas: Sequence[float], gammas: Sequence[float]
) -> Tensor:
    """(A, G) int64: how many of B rows of base + alpha * one + gamma * two, each (B, K), are largest at truth (B,).

    Ties count as wrong. In float64, whatever came in.
    """
    alpha, gamma = (torch.tensor(values, dtype=torch.float64) for values in (alphas, gammas))
    n_classes, total = base.shape[1], torch.zeros(len(alpha), len(gamma), dtype=torch.int64)
    rows = max(1, _CELLS // (len(alpha) * max(n_classes, len(gamma))))
    for parts in zip(base.split(rows), one.split(rows), two.split(rows), truth.split(rows)):
        own = parts[3][:, None]
        free, slope, turn = (x.double().gather(1, own) - x.double() for x in parts[:3])  # margins over each class
        free = free.scatter(1, own, torch.inf)  # over the true class itself there is none to keep
        margin = free + alpha[:, None, None] * slope  # at gamma = 0; right where margin + gamma * turn > 0 for all
        bound = -margin / turn.where(turn != 0, 1.0)
        low = bound.where(turn > 0, -torch.inf).where((turn != 0) | (margin > 0), torch.inf).amax(-1, keepdim=True)
        high = bound.where(turn < 0, torch.inf).amin(-1, keepdim=True)
        total += ((gamma > low) & (gamma < high)).sum(1)
    return total


def held_out(labels: Tensor, fold: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-validation over the support: labels (M,), fold (M,), -1 for never held out -> rows (R,), counted (R, M).

    counted: 0 for items of the picture's own fold, otherwise by how much the class has fewer items without that fold, so that
    weights chosen on parts fit the whole (votes are sums over the items of a class).
    """
    rows = (fold >= 0).nonzero()[:, 0]
    kept = fold[rows, None] != fold  # (R, M)
    of_class = one_hot(labels).to(torch.float32)
    share = (kept.float() @ of_class) / of_class.sum(0).clamp_min(1)  # (R, K) of each class that is left
    return rows, kept / share[:, labels].clamp_min(1e-12)
