"""Tip-Adapter: labelled pictures vote by their similarity, on top of the zero-shot logits; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ecliptic.baselines._shots import CachePredictor
from ecliptic.core.contracts import Record
from ecliptic.core.support_predictor import check_weights
from ecliptic.data.shot_tensors import check_shots
from ecliptic.data.shots import folds_of, tiny_records
from ecliptic.ops.cache_model import ALPHAS, BETAS, cache_keys
from ecliptic.ops.support_cache import TIP_START, Grid, Support


@dataclass(eq=False)
class TipAdapter(CachePredictor):
    """zero-shot + alpha * sum over shots of exp(-beta (1 - cos)), arXiv 2111.03930, equation 5.

    alpha and beta: None for the best of a grid on validation pictures, else by cross-validation over the shots; where neither is
    possible (one shot of each class) the values that the released search starts from.
    """

    classes: tuple[str, ...] | None = None  # None: the labels found, sorted
    templates: str | tuple[str, ...] = "photo"  # as `core.zeroshot.zero_shot_head` takes them
    alpha: float | None = None
    beta: float | None = None
    views: int = 10  # augmented views averaged into each key, released code; 0: the picture as it is
    folds: int = 4  # for the cross-validation; ours
    seed: int = 0

    @torch.no_grad()
    def fit_features(
        self,
        features: Tensor,
        labels: Tensor,
        text: Tensor,
        *,
        views: Tensor | None = None,
        validation: tuple[Tensor, Tensor] | None = None,
        classes: Sequence[str] | None = None,
        scale: Tensor | float = 100.0,
        logit_bias: Tensor | float | None = None,
    ) -> Self:
        """The same from tensors: features (N, D) and text (K, D), unit rows, labels (N,) int64, views (V, N, D)."""
        self._check_settings()
        names = check_shots(features, labels, text, views=views, validation=validation, classes=classes)
        keys = features if views is None else cache_keys(views)
        self._keep(names, Support(keys, labels), text, scale, logit_bias)
        grid = Grid(BETAS, ALPHAS).fixed(self.alpha, self.beta)
        fold = folds_of(labels, self.folds, self.seed)
        self._choose(grid, TIP_START.given(alpha=self.alpha, beta=self.beta), validation, features, fold)
        return self

    def _check_settings(self) -> None:
        check_weights(self.alpha, self.beta)

    @classmethod
    def tiny(cls) -> tuple[TipAdapter, list[Record]]:
        return cls(views=2), tiny_records()
