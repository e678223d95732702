"""The plain objectives that everything else is compared with: InfoNCE (CLIP) and the pairwise sigmoid (SigLIP)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ecliptic.core.contracts import Objective, Views
from ecliptic.ops.contrastive import duplicates, info_nce, sigmoid_loss


def same_caption(views: Views) -> Tensor | None:
    """(B, B) bool, true where two rows of the batch have equal captions; None where the trainer did not say.

    The trainer sets `views.groups`, (B,) int64, equal exactly where the captions are.
    """
    return None if views.groups is None else duplicates(views.groups)


@dataclass(frozen=True)
class InfoNCE(Objective):
    """Symmetric InfoNCE, CLIP (arXiv 2103.00020). In nats, >= 0, log B for an encoder that cannot tell the pairs apart."""

    skip_duplicates: bool = True  # equal captions are not negatives; ours, and the plain loss where there are none

    needs: ClassVar[frozenset[str]] = frozenset({"image", "text"})

    def terms(self, views: Views) -> dict[str, Tensor]:
        logits = views.scale * views["image"].pooled @ views["text"].pooled.T
        return {"info_nce": info_nce(logits, same_caption(views) if self.skip_duplicates else None)}


@dataclass(frozen=True)
class Sigmoid(Objective):
    """Pairwise sigmoid loss, SigLIP (arXiv 2303.15343). In nats per picture, >= 0.

    An encoder without a learnt `logit_bias` gets the fixed `bias` instead.
    """

    bias: float = -10.0  # the paper's initial value, section 3.2: most pairs of a batch are negatives
    skip_duplicates: bool = True  # ours; as in InfoNCE

    needs: ClassVar[frozenset[str]] = frozenset({"image", "text"})

    def terms(self, views: Views) -> dict[str, Tensor]:
        logits = views.scale * views["image"].pooled @ views["text"].pooled.T
        logits = logits + (self.bias if views.bias is None else views.bias)
        return {"sigmoid": sigmoid_loss(logits, same_caption(views) if self.skip_duplicates else None)}
