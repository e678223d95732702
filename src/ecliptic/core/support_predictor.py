"""Predictors that answer by a support cache: what they keep, how they score, how they choose their weights.

Tip-Adapter, TIP-X and CapS-Adapter differ in which keys they keep and which weights they search; all else is here once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ecliptic.core.feature_predictor import FeaturePredictor
from ecliptic.ops.support_cache import (
    GRIDS,
    TEMPERATURE,
    Choice,
    Comparison,
    Grid,
    KlSpace,
    Reference,
    Support,
    Weights,
    compare,
    held_out,
    m_adapter,
    reference_of,
    search_m_adapter,
)


class SupportPredictor(FeaturePredictor):
    """Zero-shot logits plus what a support says, `ecliptic.ops.support_cache.m_adapter`.

    image_keys_ (M, D), caption_keys_ (M, D) or None, labels_ (M,): the support. text_ (K, D): class embeddings. scale_ and
    logit_bias_: the model's own. alpha_, beta_, gamma_, delta_: the weights. validation_accuracy_: theirs, or None where
    nothing could be validated. reference_: the statistics frozen with them.
    """

    temp: float = TEMPERATURE
    kl_space: KlSpace = "class"
    normalise_modalities: bool = False

    image_keys_: Tensor
    caption_keys_: Tensor | None
    labels_: Tensor
    text_: Tensor

    @property
    def support_(self) -> Support:
        return Support(self.image_keys_, self.labels_, self.caption_keys_, self.classes_)

    def scores_of(self, features: Tensor) -> Tensor:
        if features.shape[1] != self.image_keys_.shape[1]:
            raise ValueError(f"features must be (B, {self.image_keys_.shape[1]}), got {tuple(features.shape)}")
        found = self._compared(features, kl=self.gamma_ != 0)
        weights = Weights(self.alpha_, self.beta_, self.gamma_, self.delta_)
        reference = Reference(*self.reference_)
        logits = m_adapter(found, self.labels_, weights, reference, normalise_modalities=self.normalise_modalities)
        return logits + self.logit_bias_ if self.logit_bias_ else logits

    def _compared(self, features: Tensor, *, kl: bool, support: Support | None = None) -> Comparison:
        return compare(
            features,
            self.text_.to(features),
            _like(features, support or self.support_),
            scale=self.scale_,
            temp=self.temp,
            kl_space=self.kl_space,
            kl=kl,
        )

    def _keep(
        self,
        classes: Sequence[str],
        support: Support,
        text: Tensor,
        scale: Tensor | float,
        logit_bias: Tensor | float | None,
    ) -> None:
        self.classes_ = tuple(classes)
        self.image_keys_, self.labels_, self.caption_keys_ = support[:3]
        self.text_ = text
        self.scale_, self.logit_bias_ = number(scale), 0.0 if logit_bias is None else number(logit_bias)
        self.trained_parameters_ = 0

    def _choose(
        self,
        grid: Grid,
        default: Weights,
        validation: tuple[Tensor, Tensor] | None,
        queries: Tensor | None = None,
        fold: Tensor | None = None,
    ) -> None:
        """The best weights of the grid on `validation`, else by cross-validation over the support, else `default`.

        queries (M, D): what stands for the items of the support when they are held out. fold (M,): as `folds_of` gives it.
        """
        kl = grid.gammas != (0.0,)
        if validation is not None:
            features, truth = validation
            choice = self._searched(self._compared(features, kl=kl), truth, grid)
        elif queries is not None and fold is not None and bool((fold >= 0).any()):
            rows, counted = held_out(self.labels_, fold)
            found = self._compared(queries[rows], kl=kl)
            choice = self._searched(found, self.labels_[rows], grid, counted.to(queries))
        else:
            self._take(default, self._reference_among_themselves(default))
            return
        self._take(*choice)

    def _searched(self, found: Comparison, truth: Tensor, grid: Grid, counted: Tensor | None = None) -> Choice:
        normalise = self.normalise_modalities
        return search_m_adapter(found, self.labels_, truth, grid, counted, normalise_modalities=normalise)

    def _reference_among_themselves(self, weights: Weights) -> Reference:
        """The statistics of each support item against all others."""
        others = 1 - torch.eye(len(self.labels_), dtype=self.image_keys_.dtype)
        found = self._compared(self.image_keys_, kl=weights.gamma != 0)
        return reference_of(found, weights.delta, others, normalise_modalities=self.normalise_modalities)

    def _take(self, weights: Weights, reference: Reference, accuracy: float | None = None) -> None:
        self.alpha_, self.beta_, self.gamma_, self.delta_ = weights
        self.reference_ = tuple(reference)  # plain tuples can be saved
        self.validation_accuracy_ = accuracy


def number(value: Tensor | float) -> float:
    """A scalar, also one that requires grad, as a float."""
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def grid_named(name: str) -> Grid:
    """One of `GRIDS`; ValueError with their names for another."""
    if name not in GRIDS:
        raise ValueError(f"grid={name!r}: choose from {', '.join(GRIDS)}")
    return GRIDS[name]


def check_weights(
    alpha: float | None, beta: float | None, gamma: float | None = None, delta: float | None = None
) -> None:
    """ValueError that names the weight for one that is given and cannot be: below 0, or delta above 1."""
    for name, value in {"alpha": alpha, "beta": beta, "gamma": gamma, "delta": delta}.items():
        if value is not None and not 0 <= value <= (1 if name == "delta" else float("inf")):
            limits = "lie in [0, 1]" if name == "delta" else "not be negative"
            raise ValueError(f"{name}={value}: it must {limits}, or be None to be chosen")


def _like(features: Tensor, support: Support) -> Support:
    captions = None if support.caption_keys is None else support.caption_keys.to(features)
    return support._replace(image_keys=support.image_keys.to(features), caption_keys=captions)
