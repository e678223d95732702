"""A quantity by its nearest neighbours: the mean value of the known pictures that look most alike."""

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


@dataclass(eq=False)
class NeighbourRanker(QuantityPredictor):
    """k-nearest-neighbour regression by cosine; k is the best of `neighbours` when each picture is left out in turn.

    Learns from records with `image` and `value`, or `quantities` with the instruction. Learnt: memory_ (N, D), values_ (N,), k_.
    """

    instruction: str = "value"
    neighbours: tuple[int, ...] = (1, 3, 5, 9, 15)

    def fit(self, encoder: Encoder, pairs: Pairs) -> Self:
        """ValueError for a record without a number, or values that are all the same; said before any picture is opened."""
        if not self.neighbours or min(self.neighbours) < 1:
            raise ValueError(f"neighbours={self.neighbours}: give numbers of at least 1 to choose from")
        values = torch.from_numpy(values_of(pairs, self.instruction))
        self.fit_features(encode_views(encoder, pairs)[0], values)
        self.encoder_ = encoder
        return self

    def fit_features(self, features: Tensor, values: Tensor) -> Self:
        """The same from features (N, D), unit rows, and values (N,), N at least 2."""
        check_features(features)
        if len(features) < 2:
            raise ValueError("one picture has no neighbours: give at least two")
        self.memory_, self.values_ = features.float().contiguous(), values.float().contiguous()
        alone = (self.memory_ @ self.memory_.T).fill_diagonal_(-torch.inf)
        order = alone.argsort(dim=-1, descending=True, stable=True)
        known = sorted({min(k, len(features) - 1) for k in self.neighbours})
        errors = [(self.values_[order[:, :k]].mean(-1) - self.values_).square().mean().item() for k in known]
        self.k_ = known[errors.index(min(errors))]
        self.learnt_, self.trained_parameters_ = features.shape[1], 0
        return self

    def quantity(self, features: Tensor) -> Tensor:
        order = (features @ self.memory_.T).argsort(dim=-1, descending=True, stable=True)
        return self.values_[order[:, : self.k_]].mean(-1)

    @classmethod
    def tiny(cls) -> tuple[NeighbourRanker, list[Record]]:
        return cls(neighbours=(2, 4)), [{**record, "value": i % 5} for i, record in enumerate(tiny_records())]
