"""A classifier that may refuse: pictures that look like none of its classes are called "unknown"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from ecliptic.core.contracts import Pairs, Prediction, Predictor, Record
from ecliptic.core.encoder import Encoder
from ecliptic.core.known import DISTANCES, UNKNOWN, distance_statistics, distances, keeping_threshold
from ecliptic.core.method import MethodError, get
from ecliptic.data.feature_store import FeatureStore, keeping, open_store
from ecliptic.data.records import Records
from ecliptic.data.shots import check_labels, encode_views, folds_of, labels_of, tiny_records
from ecliptic.eval.ood import TRAINING_FREE, ScoresTheUnknown, scale_of, training_free_scores

PARTS = 10  # at least, in which distances are held out; ours


@dataclass(eq=False)
class Refusing(Predictor):
    """Any classifier, a score for how known a picture looks, and the threshold below which it is refused.

    method, settings: the classifier, by its slug. score: one of `eval.ood.TRAINING_FREE`, told from its class scores; one of
    `core.known.DISTANCES`, told from features; or a score of the classifier's own (`ctw` of clipn). keep: the threshold lies
    where this share of known pictures is kept. It is set on pictures that the classifier, fitted `folds` more times, did not see.

    Learnt: inner_, the fitted classifier; known_, statistics of features, if `score` is a distance; threshold_.
    """

    method: str = "zero_shot"
    settings: Mapping[str, Any] = field(default_factory=dict)
    score: str = "mcm"
    keep: float = 0.95  # the level usual since arXiv 1610.02136
    folds: int = 4
    seed: int = 0

    def fit(self, encoder: Encoder, pairs: Pairs) -> Self:
        """Learn from records with `image` and `label`. ValueError where no class has two, of which to hold one out."""
        if not 0 < self.keep < 1:
            raise ValueError(f"keep={self.keep}: the share of known pictures to keep lies between 0 and 1")
        kind = self.classifier()
        names, labels = labels_of(pairs, self.settings.get("classes"))
        check_labels(labels, len(labels), names)
        if int(torch.bincount(labels).max()) < 2:
            raise ValueError(
                "no class has two pictures: the threshold is set on known pictures that were not learnt from"
            )
        with keeping(open_store() or FeatureStore()):
            self._learn(encoder, kind(**self.settings), pairs, labels)
            if self.score in DISTANCES:
                held = self._held_distances(encoder, pairs, labels)
            else:
                held = self._held_scores(encoder, pairs, labels, kind)
        self.threshold_ = keeping_threshold(held, self.keep)
        return self

    def _held_scores(self, encoder: Encoder, pairs: Pairs, labels: Tensor, kind: type[Predictor]) -> Tensor:
        """Of every picture, by a fit that has not seen it; with the settings that the fit on all of them chose for itself.

        A penalty chosen anew in each part would give each part scores of another scale, and a threshold that suits none.
        """
        given = dict(self.settings)
        for name, value in self.inner_.get_params().items():
            chosen = getattr(self.inner_, f"{name}_", None)
            if value is None and isinstance(chosen, int | float | str):
                given[name] = chosen
        fold, held = folds_of(labels, self.folds, self.seed), []
        for k in range(int(fold.max()) + 1):
            rows, out = (fold != k).nonzero()[:, 0].tolist(), (fold == k).nonzero()[:, 0].tolist()
            part = replace(self)._learn(encoder, kind(**given), _some(pairs, rows), labels[rows])
            held.append(part._of(encoder, _some(pairs, out)))
        return torch.cat(held)

    def _held_distances(self, encoder: Encoder, pairs: Pairs, labels: Tensor) -> Tensor:
        """The same in more parts, which cost little: distances shrink as more is known, so a part should lack few pictures."""
        features = encode_views(encoder, pairs)[0]
        fold, held = folds_of(labels, max(self.folds, PARTS), self.seed), []
        for k in range(int(fold.max()) + 1):
            known = distance_statistics(features[fold != k], _compact(labels[fold != k]))[self.score]
            held.append(distances(self.score, features[fold == k], known))
        return torch.cat(held)

    def classifier(self) -> type[Predictor]:
        """Its class. ValueError for a method that does not name pictures, or a score it does not have."""
        try:
            kind = get(self.method)
        except MethodError as error:
            raise ValueError(str(error)) from None
        if not (isinstance(kind, type) and issubclass(kind, Predictor)):
            raise ValueError(f"method={self.method!r} does not name pictures: choose one that is a Predictor")
        if self.score not in (*TRAINING_FREE, *DISTANCES) and not issubclass(kind, ScoresTheUnknown):
            known = ", ".join((*TRAINING_FREE, *DISTANCES))
            raise ValueError(f"score={self.score!r}: {self.method} has no scores of its own; there are {known}")
        return kind

    @torch.no_grad()
    def predict(self, pixels: Tensor) -> Prediction:
        """Pixels (B, 3, H, W) -> class scores (B, K), and labels, of which those of refused pictures are "unknown"."""
        said: Prediction = self.inner_.predict(pixels)
        if said.labels is None:
            raise TypeError(f"{self.method} gives no labels, so there is nothing to refuse")
        kept = (self._score(pixels, said) >= self.threshold_).tolist()
        labels = [label if known else UNKNOWN for label, known in zip(said.labels, kept, strict=True)]
        return replace(said, labels=labels)

    @torch.no_grad()
    def is_known(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) -> (B,) bool: whether the score reaches `threshold_`."""
        return self._score(pixels) >= self.threshold_

    @torch.no_grad()
    def ood_scores(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels (B, 3, H, W) -> the score by its name, (B,), higher is more known."""
        return {self.score: self._score(pixels)}

    @property
    def classes_(self) -> tuple[str, ...]:
        """What pictures that are not refused are called."""
        return tuple(self.inner_.classes_)

    def _learn(self, encoder: Encoder, classifier: Predictor, pairs: Pairs, labels: Tensor) -> Self:
        self.inner_: Any = classifier.fit(encoder, pairs)
        self.encoder_ = encoder
        self.known_: dict[str, Tensor] = {}
        if self.score in DISTANCES:
            features = encode_views(encoder, pairs)[0]
            self.known_ = distance_statistics(features, _compact(labels))[self.score]
        return self

    def _score(self, pixels: Tensor, said: Prediction | None = None) -> Tensor:
        """(B,) float64. said: what the classifier says of these pictures, if that is known already."""
        if not hasattr(self, "inner_"):
            raise ValueError("Refusing has learnt nothing yet: call fit() first")
        if (encoder := self.encoder_) is None:
            raise ValueError("no encoder here: call fit(encoder, pairs) first")
        if self.score in DISTANCES:
            return distances(self.score, encoder.images(pixels).pooled.float().cpu(), self.known_)
        if self.score in TRAINING_FREE:
            return self._of_logits(self.inner_.predict(pixels) if said is None else said)
        return self._own(self.inner_.ood_scores(pixels))

    def _score_features(self, features: Tensor) -> Tensor | None:
        """The same from unit features (B, D), or None if the classifier needs the picture itself."""
        if self.score in DISTANCES:
            return distances(self.score, features, self.known_)
        if self.score in TRAINING_FREE:
            return (
                self._of_logits(self.inner_.predict_features(features))
                if hasattr(self.inner_, "predict_features")
                else None
            )
        return (
            self._own(self.inner_.ood_scores_features(features))
            if hasattr(self.inner_, "ood_scores_features")
            else None
        )

    def _of_logits(self, said: Prediction) -> Tensor:
        if said.scores is None:
            raise TypeError(f"{self.method} gives no class scores, so there is nothing to refuse by")
        scale = scale_of(self.inner_, self.encoder_)  # type: ignore[arg-type]
        return self._own(training_free_scores(said.scores.float().cpu(), scale))

    def _own(self, found: Mapping[str, Tensor]) -> Tensor:
        if self.score not in found:
            raise ValueError(f"score={self.score!r}: {self.method} has {', '.join(found)}, and the distances there are")
        return found[self.score].double().cpu()

    def _of(self, encoder: Encoder, pairs: Pairs, batch: int = 32) -> Tensor:
        """Scores of records, from kept features where that will do."""
        found = self._score_features(encode_views(encoder, pairs)[0])
        if found is not None:
            return found
        records = list(pairs)
        pixels = (
            encoder.preprocess([record["image"] for record in records[start : start + batch]])
            for start in range(0, len(records), batch)
        )
        return torch.cat([self._score(some) for some in pixels])

    @classmethod
    def tiny(cls) -> tuple[Refusing, list[Record]]:
        return cls("linear_probe", {"strength": 1.0}, score="energy", folds=2), tiny_records()


def _compact(labels: Tensor) -> Tensor:
    """(N,) -> 0..K-1 of the classes that are there."""
    places: Tensor = torch.unique(labels, return_inverse=True)[1]
    return places


def _some(pairs: Pairs, rows: Sequence[int]) -> Pairs:
    if isinstance(pairs, Records):
        return pairs[rows]
    wanted = set(rows)
    return [{"id": str(i), **record} for i, record in enumerate(pairs) if i in wanted]
