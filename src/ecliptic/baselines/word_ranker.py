"""A quantity by words alone: how much closer a picture is to "many circles" than to "few circles"."""

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
class WordRanker(QuantityPredictor):
    """Cosine with the instruction; of "much | little", the difference of the cosines with the two (arXiv 2207.12396, without
    its softmax, which orders alike). The order is that of the words whatever the values are: these only give the unit, by
    mean and standard deviation.

    Learns from records with `image` and `value`, or `quantities` with the instruction. Learnt: direction_ (D,), slope_, bias_.
    """

    instruction: str = "much | little"

    def fit(self, encoder: Encoder, pairs: Pairs) -> Self:
        """ValueError for an instruction without words, a record without a number, or values that are all the same."""
        words = poles(self.instruction)
        values = torch.from_numpy(values_of(pairs, self.instruction))
        with torch.no_grad():
            ends = encoder.texts(encoder.tokenize(list(words), overflow="error")).pooled.float().cpu()
        self.fit_features(encode_views(encoder, pairs)[0], values, ends)
        self.encoder_ = encoder
        return self

    def fit_features(self, features: Tensor, values: Tensor, ends: Tensor) -> Self:
        """The same from features (N, D), values (N,) and one or two texts (1 or 2, D), all unit rows."""
        check_features(features)
        self.direction_ = (ends[0] - ends[1] if len(ends) == 2 else ends[0]).contiguous()
        said = (features @ self.direction_).double()
        self.slope_ = float(values.double().std(correction=0) / said.std(correction=0).clamp_min(1e-12))
        self.bias_ = float(values.double().mean() - self.slope_ * said.mean())
        self.learnt_, self.trained_parameters_ = features.shape[1], 0
        return self

    def quantity(self, features: Tensor) -> Tensor:
        return self.slope_ * (features @ self.direction_) + self.bias_

    @classmethod
    def tiny(cls) -> tuple[WordRanker, list[Record]]:
        return cls("light | dark"), [{**record, "value": i % 5} for i, record in enumerate(tiny_records())]


def poles(instruction: str) -> tuple[str, ...]:
    """ "much | little" -> both, anything else as it is. ValueError for more than two, or none."""
    words = tuple(part.strip() for part in instruction.split("|"))
    if len(words) > 2 or not all(words):
        raise ValueError(
            f"instruction={instruction!r}: say what to order by, or both ends as in 'many cats | few cats'"
        )
    return words
