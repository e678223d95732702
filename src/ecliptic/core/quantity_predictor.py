"""Predictors of one number a picture from the pooled feature of a frozen encoder."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ecliptic.core.contracts import Prediction, Predictor


class QuantityPredictor(Predictor):
    """`predict` by way of `predict_features`; a subclass says how features become numbers, in `quantity`.

    instruction: what the number is, a setting. learnt_: how wide features are.
    """

    instruction: str
    learnt_: int

    @abstractmethod
    def quantity(self, features: Tensor) -> Tensor:
        """Unit rows (B, D) -> (B,), in units of the values learnt from; higher is more."""

    @torch.no_grad()
    def predict(self, pixels: Tensor) -> Prediction:
        """Pixels (B, 3, H, W), as `encoder.preprocess` gives them -> scores (B, 1), the quantity."""
        if (encoder := getattr(self, "encoder_", None)) is None:
            raise ValueError("no encoder here: call fit(encoder, pairs) first, or predict_features on features")
        return self.predict_features(encoder.images(pixels).pooled.float().cpu())

    @torch.no_grad()
    def predict_features(self, features: Tensor) -> Prediction:
        """Unit features (B, D) -> scores (B, 1). ValueError before `fit`, or for features of another width."""
        if not hasattr(self, "learnt_"):
            raise ValueError(f"{type(self).__name__} has learnt nothing yet: call fit() first")
        if features.ndim != 2 or features.shape[1] != self.learnt_:
            raise ValueError(f"features must be (B, {self.learnt_}), got {tuple(features.shape)}")
        return Prediction(scores=self.quantity(features)[:, None], classes=(self.instruction,))
