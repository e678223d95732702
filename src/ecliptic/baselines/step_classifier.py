"""Any step that tunes an encoder on labelled pictures, as a classifier of pictures: CLIP-SVD, or one of your own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ecliptic.core.contracts import ModelStep, Pairs, Record
from ecliptic.core.encoder import Encoder, HFEncoder
from ecliptic.core.method import MethodError, get
from ecliptic.core.tuned import TunedPredictor, changed_tensors, check_tunable
from ecliptic.core.zeroshot import template_set
from ecliptic.data.shots import check_labels, labels_of, tiny_records


@dataclass(eq=False)
class StepClassifier(TunedPredictor):
    """Apply a `ModelStep` to the encoder, and name pictures by class prompts in what comes out.

    step: its slug, such as "clip_svd". settings: its own, by name; `classes` and `templates` are handed on to a step that has
    them. The step must leave the architecture as it is.
    """

    step: str = "clip_svd"
    settings: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None  # None: the labels found, sorted
    templates: str | tuple[str, ...] = "photo"

    def fit(self, encoder: Encoder, pairs: Pairs) -> Self:
        """Learn from records with `image` and `label`. ValueError for a slug of no step, or settings it does not have."""
        template_set(self.templates)
        names, labels = labels_of(pairs, self.classes)
        check_labels(labels, len(labels), names)
        frozen = check_tunable(encoder)
        tuned = self._step(names).apply(frozen, pairs)
        assert isinstance(tuned, HFEncoder)
        state = changed_tensors(frozen, tuned)
        return self._keep(frozen, names, state, sum(value.numel() for value in state.values()))

    def _step(self, names: tuple[str, ...]) -> ModelStep:
        try:
            kind = get(self.step)
        except MethodError as error:
            raise ValueError(str(error)) from None
        if not (isinstance(kind, type) and issubclass(kind, ModelStep)):
            raise ValueError(f"step={self.step!r} is no step that changes an encoder")
        known = inspect.signature(kind).parameters
        if unknown := sorted(set(self.settings) - set(known)):
            raise ValueError(f"settings has {unknown[0]!r}: {self.step} has {', '.join(known)}")
        given = {"classes": names, "templates": self.templates}
        step: ModelStep = kind(**{k: v for k, v in given.items() if k in known} | dict(self.settings))
        return step

    @classmethod
    def tiny(cls) -> tuple[StepClassifier, list[Record]]:
        return cls(settings={"steps": 3, "batch_size": 6, "lr": 5e-3}), tiny_records()
