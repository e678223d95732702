"""WiSE-FT: full fine-tuning, then the weights between the model before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ecliptic.core.averaging import interpolate
from ecliptic.core.contracts import Pairs, Record
from ecliptic.core.encoder import Encoder, HFEncoder
from ecliptic.core.few_shot_tuning import FullTuningPredictor
from ecliptic.core.tuned import changed_tensors
from ecliptic.core.zeroshot import zero_shot_head
from ecliptic.data.shots import RandomView, check_labels, folds_of, labels_of, tiny_records

GRID = tuple(k / 10 for k in range(11))  # arXiv 2109.01903, figure 1 and section 4


@dataclass(eq=False)
class WiseFtTuning(FullTuningPredictor):
    """Robust fine-tuning of zero-shot models, arXiv 2109.01903: (1 - alpha) * frozen + alpha * tuned, in all weights.

    alpha_: the share taken. held_out_accuracy_: of each alpha of `grid` on pictures held out, where it was chosen on them;
    the model is then trained again on all pictures.
    """

    lr: float = 1e-4  # this and the next two as in `full_tuning`
    steps: int = 25
    batch_size: int = 16
    alpha: float | None = 0.5  # the paper's, where nothing can be measured; None: the best of `grid` on held-out shots
    grid: tuple[float, ...] = GRID
    folds: int = 4  # one part of so many is held out to choose alpha on; ours

    def fit(self, encoder: Encoder, pairs: Pairs) -> Self:
        """Learn from records with `image` and `label`."""
        tower = self._check(encoder)
        names, labels = labels_of(pairs, self.classes)
        check_labels(labels, len(labels), names)
        chosen = (self.alpha, {}) if self.alpha is not None else self._choose(tower, list(pairs), names, labels)
        tuned = self._tune(tower, pairs, names, len(labels), self._views(tower))
        trained = sum(value.numel() for value in changed_tensors(tower, tuned).values())
        self.alpha_, self.held_out_accuracy_ = chosen
        return self._keep(encoder, names, changed_tensors(tower, interpolate(tower, tuned, self.alpha_)), trained)

    @torch.no_grad()
    def _choose(
        self, encoder: HFEncoder, records: list[Record], names: tuple[str, ...], labels: Tensor
    ) -> tuple[float, dict[float, float]]:
        """The alpha of the highest accuracy on held-out pictures, of several the one nearest to 0.5, and all accuracies."""
        held = folds_of(labels, self.folds, self.seed) == 0
        if not held.any():
            raise ValueError(
                "alpha=None holds pictures out to choose it on, and there is one of each class: give alpha"
            )
        rest = [record for record, out in zip(records, held.tolist(), strict=True) if not out]
        with torch.enable_grad():
            tuned = self._tune(encoder, rest, names, len(rest), self._views(encoder))
        shown = [record["image"] for record, out in zip(records, held.tolist(), strict=True) if out]
        found = {}
        for alpha in self.grid:
            mixed = interpolate(encoder, tuned, alpha)
            scores = mixed.encode_images(shown) @ zero_shot_head(mixed, names, self.templates).T
            found[alpha] = float((scores.argmax(-1) == labels[held]).double().mean())
        return max(found, key=lambda alpha: (found[alpha], -abs(alpha - 0.5))), found

    def _views(self, encoder: HFEncoder) -> RandomView | None:
        return None if self.crop is None else RandomView.for_encoder(encoder, self.crop)

    def _check(self, encoder: Encoder) -> HFEncoder:
        for alpha in self.grid if self.alpha is None else (self.alpha,):
            if not 0 <= alpha <= 1:
                raise ValueError(f"alpha={alpha}: must lie between 0 (frozen) and 1 (tuned)")
        if self.alpha is None and (not self.grid or self.folds < 2):
            raise ValueError("alpha=None needs a grid to choose from, and folds of 2 or more to hold one out")
        return super()._check(encoder)

    @classmethod
    def tiny(cls) -> tuple[WiseFtTuning, list[Record]]:
        return cls(steps=3, batch_size=6, lr=1e-3, alpha=None, grid=(0.0, 0.5, 1.0), folds=2), tiny_records()
