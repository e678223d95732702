"""Classifiers that see a picture only as the pooled feature of a frozen encoder.

That is most of few-shot adaptation: features are computed once, kept, and every fit after that takes seconds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ecliptic.core.contracts import Prediction, Predictor


class FeaturePredictor(Predictor):
    """`predict` by way of `predict_features`; a subclass says how features become class scores, in `scores_of`.

    classes_: names, in the order of the columns. trained_parameters_: how many numbers gradient descent has changed.
    """

    classes_: tuple[str, ...]
    trained_parameters_: int

    @abstractmethod
    def scores_of(self, features: Tensor) -> Tensor:
        """Unit rows (B, D) -> (B, K), higher means more of that class."""

    @torch.no_grad()
    def predict(self, pixels: Tensor, classes: Sequence[str] | None = None) -> Prediction:
        """Pixels (B, 3, H, W), as `encoder.preprocess` gives them -> scores (B, K) and labels.

        classes: answer among these only, in this order.
        """
        if (encoder := getattr(self, "encoder_", None)) is None:
            raise ValueError("no encoder here: call fit(encoder, pairs) first, or predict_features on features")
        return self.predict_features(encoder.images(pixels).pooled.float().cpu(), classes)

    @torch.no_grad()
    def predict_features(self, features: Tensor, classes: Sequence[str] | None = None) -> Prediction:
        """Unit features (B, D) -> scores (B, K) and labels. ValueError before `fit`, or for features of another width."""
        if not hasattr(self, "classes_"):
            raise ValueError(f"{type(self).__name__} has learnt nothing yet: call fit() first")
        if features.ndim != 2:
            raise ValueError(f"features must be (B, D), got {tuple(features.shape)}")
        return answer(self.scores_of(features), self.classes_, classes)


def answer(scores: Tensor, known: Sequence[str], wanted: Sequence[str] | None = None) -> Prediction:
    """Scores (B, K) over the classes `known` -> Prediction, among `wanted` only if given, in its order."""
    names = tuple(known)
    if wanted is not None:
        place = {name: k for k, name in enumerate(names)}
        if unknown := [name for name in wanted if name not in place]:
            raise ValueError(f"not among the classes learnt: {', '.join(map(repr, unknown[:5]))}")
        if not len(wanted):
            raise ValueError("classes is empty: name at least one of those learnt")
        scores, names = scores[:, [place[name] for name in wanted]], tuple(wanted)
    return Prediction(scores=scores, labels=[names[k] for k in scores.argmax(-1).tolist()], classes=names)
