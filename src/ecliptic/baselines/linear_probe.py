"""A linear probe: logistic regression on frozen features, the yardstick of representation quality since CLIP's own paper."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ecliptic.core.contracts import Pairs, Record
from ecliptic.core.encoder import Encoder
from ecliptic.core.feature_predictor import FeaturePredictor
from ecliptic.data.shots import check_features, check_labels, encode_shots, folds_of, tiny_records

# scikit-learn's C. arXiv 2103.00020, appendix A.3, searches 1e-6 to 1e6 by halves; with few shots of unit rows nothing below 1e-2
# wins, and beyond 1e4 nothing changes any more.
STRENGTHS = tuple(10.0**e for e in range(-2, 5))


@dataclass(eq=False)
class LinearProbe(FeaturePredictor):
    """Multinomial logistic regression (scikit-learn, L-BFGS) with an L2 penalty chosen by cross-validation over the shots.

    It forgets the words: what it knows of a class is its pictures alone, hence no `for_classes`.
    """

    classes: tuple[str, ...] | None = None  # None: the labels found, sorted
    strength: float | None = None  # scikit-learn's C, the inverse of the penalty; None: the best of `strengths`
    strengths: tuple[float, ...] = STRENGTHS
    folds: int = 4  # over which C is chosen; ours
    views: int = 0  # augmented views of each picture to learn from as well
    seed: int = 0

    def fit(self, encoder: Encoder, pairs: Pairs) -> Self:
        """Learn from records with `image` and `label`."""
        if self.strength is None and not self.strengths:
            raise ValueError("strengths is empty: give the values of C to choose from, or strength=")
        if self.strength is not None and not self.strength > 0:
            raise ValueError(f"strength={self.strength}: C must be positive")
        shots = encode_shots(encoder, pairs, classes=self.classes, views=self.views, seed=self.seed)
        self.fit_features(shots.features, shots.labels, views=shots.views, classes=shots.classes)
        self.encoder_ = encoder
        return self

    def fit_features(
        self, features: Tensor, labels: Tensor, *, views: Tensor | None = None, classes: Sequence[str] | None = None
    ) -> Self:
        """The same from tensors: features (N, D) unit rows, labels (N,) int64, views (V, N, D) of the same pictures."""
        names = tuple(classes) if classes is not None else tuple(map(str, range(int(labels.max()) + 1)))
        check_features(features)
        check_labels(labels, len(features), names)
        samples = features[None] if views is None else torch.cat([features[None], views])
        self.strength_ = self._choose(samples, labels) if self.strength is None else float(self.strength)
        model = _logistic(samples, labels, torch.arange(len(labels)), self.strength_)
        weight, bias = _both_classes(model)
        self.weight_, self.bias_ = (torch.from_numpy(part).float().contiguous() for part in (weight, bias))
        self.classes_ = names
        self.trained_parameters_ = self.weight_.numel() + self.bias_.numel()
        return self

    def scores_of(self, features: Tensor) -> Tensor:
        return features @ self.weight_.T + self.bias_

    def _choose(self, samples: Tensor, labels: Tensor) -> float:
        """The C of the highest cross-validated accuracy; with one picture of each class the middle of the range."""
        fold = folds_of(labels, self.folds, self.seed)
        if not (fold >= 0).any():
            return self.strengths[len(self.strengths) // 2]
        order = np.argsort(self.strengths)  # each penalty starts from the optimum of the one before, a stronger one
        hits = np.zeros(len(self.strengths))
        for k in range(int(fold.max()) + 1):
            rows, held = (fold != k).nonzero()[:, 0], (fold == k).nonzero()[:, 0]
            model = None
            for i in order:
                model = _logistic(samples, labels, rows, self.strengths[i], model)
                hits[i] += (model.predict(samples[0, held].double().numpy()) == labels[held].numpy()).sum()
        return self.strengths[int(hits.argmax())]

    @classmethod
    def tiny(cls) -> tuple[LinearProbe, list[Record]]:
        return cls(strengths=(0.1, 10.0), folds=2), tiny_records()


def _logistic(samples: Tensor, labels: Tensor, rows: Tensor, strength: float, start: Any = None) -> Any:
    """The optimum for some rows; `start`: a model of the same rows whose weights to begin with, which is changed."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x = samples[:, rows].flatten(0, 1).double().numpy()
    y = labels[rows].repeat(len(samples)).numpy()
    model = start or LogisticRegression(max_iter=1000, tol=1e-4, warm_start=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # with hardly a penalty the optimum lies at infinity
        return model.set_params(C=strength).fit(x, y)


def _both_classes(model: Any) -> tuple[Any, Any]:
    """scikit-learn keeps one row for two classes, the second's: the first one's is zero."""
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    return weight, bias
