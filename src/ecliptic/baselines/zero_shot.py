"""Words alone: class prompts as the classifier, or the mean of many prompts of each class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from ecliptic.core.contracts import Pairs, Record
from ecliptic.core.encoder import Encoder
from ecliptic.core.feature_predictor import FeaturePredictor
from ecliptic.core.zeroshot import template_set, zero_shot_head
from ecliptic.data.shots import check_classes, labels_of, tiny_records


@dataclass(eq=False)
class ZeroShot(FeaturePredictor):
    """The zero-shot head of CLIP (arXiv 2103.00020, section 3.1.4) as a predictor; learns nothing but the class names.

    templates: one prompt, or several for the prompt ensemble: `core.zeroshot.TEMPLATES` names sets of them.
    """

    classes: tuple[str, ...] | None = None  # None: the labels found, sorted
    templates: str | tuple[str, ...] = "photo"

    def fit(self, encoder: Encoder, pairs: Pairs) -> Self:
        """Read the class names off the records, unless `classes` gives them; no picture is opened."""
        template_set(self.templates)
        if self.classes is not None:
            check_classes(self.classes)
        names = labels_of(pairs)[0] if self.classes is None else tuple(self.classes)
        check_classes(names)
        return self._learn(encoder, names)

    def for_classes(self, names: Sequence[str]) -> Self:
        """The same for other classes."""
        return replace(self)._learn(self.encoder_, names)

    def scores_of(self, features: Tensor) -> Tensor:
        return self.scale_ * features @ self.text_.T + self.logit_bias_

    @torch.no_grad()
    def _learn(self, encoder: Any, names: Sequence[str]) -> Self:
        self.classes_ = tuple(names)
        self.text_ = zero_shot_head(encoder, self.classes_, self.templates)
        self.scale_ = float(encoder.scale)
        self.logit_bias_ = 0.0 if encoder.bias is None else float(encoder.bias)
        self.trained_parameters_ = 0
        self.encoder_ = encoder
        return self

    @classmethod
    def tiny(cls) -> tuple[ZeroShot, list[Record]]:
        return cls(), tiny_records()
