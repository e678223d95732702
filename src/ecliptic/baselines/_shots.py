"""What the cache baselines share: labelled pictures and class prompts as features, then `fit_features`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

from torch import Tensor

from ecliptic.core.contracts import Pairs
from ecliptic.core.encoder import Encoder
from ecliptic.core.support_predictor import SupportPredictor
from ecliptic.core.zeroshot import template_set, zero_shot_head
from ecliptic.data.shots import encode_shots


class CachePredictor(SupportPredictor):
    """A support cache of few labelled pictures. Subclasses have the settings named here and check their own."""

    classes: tuple[str, ...] | None
    templates: str | tuple[str, ...]
    views: int
    seed: int

    def fit(self, encoder: Encoder, pairs: Pairs, validation: Pairs | None = None) -> Self:
        """Learn from records with `image` and `label`; weights are chosen on `validation`, or as the class says."""
        template_set(self.templates)
        self._check_settings()  # what is wrong is said before any picture is opened
        shots = encode_shots(encoder, pairs, validation, classes=self.classes, views=self.views, seed=self.seed)
        self.fit_features(
            shots.features,
            shots.labels,
            zero_shot_head(encoder, shots.classes, self.templates),  # type: ignore[arg-type]
            views=shots.views,
            validation=shots.validation,
            classes=shots.classes,
            scale=encoder.scale,
            logit_bias=encoder.bias,
        )
        self.encoder_ = encoder
        return self

    @abstractmethod
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

    @abstractmethod
    def _check_settings(self) -> None: ...
