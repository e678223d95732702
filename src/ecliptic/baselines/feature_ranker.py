"""A quantity by ridge regression on frozen features: what every learnt way of ordering pictures has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ecliptic.core.contracts import Pairs, Record
from ecliptic.core.encoder import Encoder
from ecliptic.core.quantity_predictor import QuantityPredictor
from ecliptic.data.quantities import values_of
from ecliptic.data.shots import check_features, encode_views, tiny_records

PENALTIES = tuple(10.0 ** (e / 2) for e in range(-8, 7))  # scikit-learn's alpha; ours, wide enough for unit rows


@dataclass(eq=False)
class FeatureRanker(QuantityPredictor):
    """Ridge regression (scikit-learn), its penalty chosen by leaving out one picture at a time, which costs no further fit.

    Learns from records with `image` and `value`, or `quantities` with the instruction. Learnt: weight_ (D,), bias_, penalty_.
    """

    instruction: str = "value"
    penalties: tuple[float, ...] = PENALTIES

    def fit(self, encoder: Encoder, pairs: Pairs) -> Self:
        """ValueError for a record without a number, or values that are all the same; said before any picture is opened."""
        if not self.penalties or min(self.penalties) <= 0:
            raise ValueError(f"penalties={self.penalties}: give positive ones to choose from")
        values = torch.from_numpy(values_of(pairs, self.instruction))
        self.fit_features(encode_views(encoder, pairs)[0], values)
        self.encoder_ = encoder
        return self

    def fit_features(self, features: Tensor, values: Tensor) -> Self:
        """The same from features (N, D), unit rows, and values (N,)."""
        from sklearn.linear_model import RidgeCV

        check_features(features)
        model = RidgeCV(alphas=self.penalties).fit(features.double().numpy(), values.double().numpy())
        self.weight_ = torch.from_numpy(model.coef_).float().contiguous()
        self.bias_, self.penalty_ = float(model.intercept_), float(model.alpha_)
        self.learnt_, self.trained_parameters_ = features.shape[1], 0
        return self

    def quantity(self, features: Tensor) -> Tensor:
        return features @ self.weight_ + self.bias_

    @classmethod
    def tiny(cls) -> tuple[FeatureRanker, list[Record]]:
        return cls(), [{**record, "value": i % 5} for i, record in enumerate(tiny_records())]
