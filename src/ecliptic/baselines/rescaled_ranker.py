"""An instructed ranker on values of any unit: it learns from standard scores, and answers in the unit it was given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ecliptic.core.contracts import Features, Pairs, Prediction, Predictor, Record
from ecliptic.core.encoder import Encoder, open_picture
from ecliptic.core.method import MethodError, get
from ecliptic.core.progress import Progress
from ecliptic.data.quantities import values_of
from ecliptic.data.shots import tiny_records

SPREAD = (
    3.0  # standard deviation of what the inner one learns from: its losses are made for values within some tens; ours
)


@dataclass(eq=False)
class RescaledRanker(Predictor):
    """method, settings: a predictor that learns from patches and instructed values, such as `ranking_adapter`. pool: patches are
    averaged in squares of so many by so many, which makes it as many times faster; 1: none.

    Learns from records with `image` and `value`, or `quantities` with the instruction. Learnt: inner_, fitted on values of mean 0
    and standard deviation `SPREAD`; shift_ and scale_, which give the unit back.
    """

    instruction: str = "value"
    method: str = "ranking_adapter"
    settings: Mapping[str, Any] = field(default_factory=dict)
    pool: int = 2

    def fit(self, encoder: Encoder, pairs: Pairs) -> Self:
        """ValueError for a record without a number, or values that are all the same; said before any picture is opened."""
        self._inner()
        values = values_of(pairs, self.instruction)
        return self.fit_patches(encoder, encode_pooled(encoder, pairs, self.pool), values)

    def fit_patches(self, encoder: Encoder, patches: Tensor, values: NDArray[np.float64]) -> Self:
        """The same from patches (N, P, D), as `encode_pooled` gives them, and values (N,)."""
        inner = self._inner()
        self.shift_, self.scale_ = float(values.mean()), float(values.std()) / SPREAD
        scores = (values - self.shift_) / self.scale_
        self.inner_: Any = inner.fit_patches(encoder, patches[None], [self.instruction], scores[:, None])
        self.encoder_ = encoder
        return self

    @torch.no_grad()
    def predict(self, pixels: Tensor) -> Prediction:
        """Pixels (B, 3, H, W) -> scores (B, 1), the quantity in the unit of the values learnt from."""
        if not hasattr(self, "inner_"):
            raise ValueError("RescaledRanker has learnt nothing yet: call fit() first")
        if self.encoder_ is None:
            raise ValueError("no encoder here: call fit(encoder, pairs) first")
        return self.predict_patches(pooled(self.encoder_.images(pixels, patches=True), self.pool))

    @torch.no_grad()
    def predict_patches(self, patches: Tensor) -> Prediction:
        """The same from patches (B, P, D), as `encode_pooled` gives them."""
        scores = self.inner_.score_patches(patches, self.instruction)
        return Prediction(scores=(self.shift_ + self.scale_ * scores)[:, None], classes=(self.instruction,))

    @property
    def trained_parameters_(self) -> int:
        """How many numbers gradient descent has changed."""
        return sum(value.numel() for value in getattr(self.inner_, "weights_", {}).values())

    def _inner(self) -> Any:
        try:
            kind = get(self.method)
        except MethodError as error:
            raise ValueError(str(error)) from None
        if not (isinstance(kind, type) and hasattr(kind, "fit_patches") and hasattr(kind, "score_patches")):
            raise ValueError(
                f"method={self.method!r} does not order pictures by their patches, as ranking_adapter does"
            )
        if self.pool < 1:
            raise ValueError(f"pool={self.pool}: patches are averaged in squares of at least one by one")
        return kind(**{"instructions": (self.instruction,), **self.settings})

    @classmethod
    def tiny(cls) -> tuple[RescaledRanker, list[Record]]:
        small = {"heads": 2, "layers": 1, "text_prompts": 4, "rank_tokens": 3, "width": 8, "steps": 3, "batch_size": 6}
        return cls("the light", settings=small), [{**r, "value": 100 * i} for i, r in enumerate(tiny_records())]


def pooled(features: Features, pool: int) -> Tensor:
    """Features with patches on a grid -> (B, P', D), averaged in squares of `pool` by `pool`, smaller at the border."""
    if features.tokens is None or features.grid is None:
        raise TypeError("the encoder gives no patches on a grid: it must honour images(..., patches=True)")
    tokens = features.tokens.detach().float()
    grid = tokens.mT.reshape(len(tokens), -1, *features.grid)
    return avg_pool2d(grid, pool, ceil_mode=True).flatten(2).mT.contiguous()


@torch.no_grad()
def encode_pooled(encoder: Encoder, pairs: Pairs, pool: int, batch: int = 32) -> Tensor:
    """Records -> pooled patches (N, P', D), float32, of the pictures in order."""
    found: list[Tensor] = []
    group: list[Any] = []
    count = getattr(pairs, "__len__", None)
    with Progress("encoding patches", count() if count else None, unit="pictures") as bar:

        def encode() -> None:
            pixels = encoder.preprocess([open_picture(i) if isinstance(i, str | Path) else i for i in group])
            found.append(pooled(encoder.images(pixels, patches=True), pool))
            bar.advance(len(group))
            group.clear()

        for record in pairs:
            group.append(record["image"])
            if len(group) == batch:
                encode()
        if group:
            encode()
    return torch.cat(found)
