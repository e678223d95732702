"""TIP-X of SuS-X: Tip-Adapter that also compares pictures by what the class texts say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from ecliptic.baselines._shots import CachePredictor
from ecliptic.core.contracts import Record
from ecliptic.core.support_predictor import check_weights, grid_named
from ecliptic.data.shot_tensors import check_shots
from ecliptic.data.shots import folds_of, tiny_records
from ecliptic.ops.cache_model import cache_keys
from ecliptic.ops.support_cache import LABEL_FREE, TEMPERATURE, Support


@dataclass(eq=False)
class SusX(CachePredictor):
    """Tip-Adapter minus gamma times a divergence of class distributions (arXiv 2211.16198), as a few-shot method.

    The support are the labelled pictures given, or any features: `fit_features` takes those of generated or retrieved
    pictures alike. The paper prints phi(-M) for the divergence M; as its code does, M is rescaled first and negated then.
    The ranges for that are frozen where the weights are chosen (the released code takes the validation affinities' at test,
    too, but the test batch's divergence).
    """

    classes: tuple[str, ...] | None = None  # None: the labels found, sorted
    templates: str | tuple[str, ...] = "photo"  # as `core.zeroshot.zero_shot_head` takes them
    alpha: float | None = None
    beta: float | None = None
    gamma: float | None = None  # 0: Tip-Adapter
    grid: Literal["coarse", "paper"] = "coarse"
    temp: float = TEMPERATURE  # of the class distributions; released code
    views: int = 10  # augmented views averaged into each key; 0: the picture as it is
    folds: int = 4  # without validation pictures the weights are cross-validated in this many parts; ours
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
        """The same from tensors: features (N, D) and text (K, D), unit rows, labels (N,) int64, views (V, N, D).

        Where nothing can be validated, the weights are `LABEL_FREE` (ours), which leave the divergence out.
        """
        self._check_settings()
        names = check_shots(features, labels, text, views=views, validation=validation, classes=classes)
        keys = features if views is None else cache_keys(views)
        self._keep(names, Support(keys, labels), text, scale, logit_bias)
        given = {"alpha": self.alpha, "beta": self.beta, "gamma": self.gamma, "delta": 0.0}
        default = LABEL_FREE.given(**given)
        fold = folds_of(labels, self.folds, self.seed)
        self._choose(grid_named(self.grid).fixed(**given), default, validation, features, fold)
        return self

    def _check_settings(self) -> None:
        grid_named(self.grid)
        check_weights(self.alpha, self.beta, self.gamma)
        if not self.temp > 0:
            raise ValueError(f"temp={self.temp}: cosines are divided by it, so it must be positive")

    @classmethod
    def tiny(cls) -> tuple[SusX, list[Record]]:
        return cls(views=2), tiny_records()
