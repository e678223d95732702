"""Full fine-tuning of the picture tower, the text tower or both by cross-entropy over class prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from ecliptic.core.contracts import Pairs, Record
from ecliptic.core.encoder import Encoder
from ecliptic.core.few_shot_tuning import FullTuningPredictor
from ecliptic.core.tuned import changed_tensors
from ecliptic.data.shots import RandomView, check_labels, labels_of, tiny_records


@dataclass(eq=False)
class FullTuning(FullTuningPredictor):
    """The class prompts, read anew in every step, are the classifier (as in FLYP, arXiv 2212.00638), so that names never
    trained on can be asked for. `state_` is as large as the towers.
    """

    lr: float = 1e-4  # ours; for ViT-B and larger 1e-5 is common (arXiv 2109.01903, appendix)
    steps: int = 25  # ours: with 16 pictures a step about a minute on one core with "offline"
    batch_size: int = 16

    def fit(self, encoder: Encoder, pairs: Pairs) -> Self:
        """Learn from records with `image` and `label`."""
        tower = self._check(encoder)
        names, labels = labels_of(pairs, self.classes)
        check_labels(labels, len(labels), names)
        augment = None if self.crop is None else RandomView.for_encoder(tower, self.crop)
        state = changed_tensors(tower, self._tune(tower, pairs, names, len(labels), augment))
        return self._keep(encoder, names, state, sum(value.numel() for value in state.values()))

    @classmethod
    def tiny(cls) -> tuple[FullTuning, list[Record]]:
        return cls(steps=3, batch_size=6, lr=1e-3), tiny_records()
