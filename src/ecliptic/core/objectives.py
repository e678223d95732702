"""The plain objectives that everything else is compared with: InfoNCE (CLIP) and the pairwise sigmoid (SigLIP)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ecliptic.core.contracts import Objective, Views
from ecliptic.core.ring import ring_info_nce, ring_sigmoid_loss
from ecliptic.ops.contrastive import duplicates, info_nce, sigmoid_loss
from ecliptic.ops.tiled_contrastive import no_autocast, tiled_info_nce, tiled_sigmoid_loss

TILED_ABOVE = 1024
"""Batches larger than this are tiled; below, the (B, B) logits are a few MiB and plain InfoNCE is up to a few ms faster.
Ours, measured: benchmarks/contrastive.py."""


def same_caption(views: Views) -> Tensor | None:
    """(B, B) bool, true where two rows of the batch have equal captions; None where the trainer did not say.

    The trainer sets `views.groups`, (B,) int64, equal exactly where the captions are.
    """
    return None if views.groups is None else duplicates(views.groups)


@dataclass(frozen=True)
class InfoNCE(Objective):
    """Symmetric InfoNCE, CLIP (arXiv 2103.00020). In nats, >= 0, log B for an encoder that cannot tell the pairs apart."""

    skip_duplicates: bool = True  # equal captions are not negatives; ours, and the plain loss where there are none
    tile: int | None = None  # side of a tile of logits; None tiles batches above TILED_ABOVE. The same loss either way
    ring: bool = False  # between processes pass texts round instead of gathering all in each. The same loss either way

    needs: ClassVar[frozenset[str]] = frozenset({"image", "text"})

    @property
    def local(self) -> bool:
        """Whether `terms` wants this process's own views, not those of the whole batch."""
        return self.ring

    def terms(self, views: Views) -> dict[str, Tensor]:
        image, text = views["image"].pooled, views["text"].pooled
        groups = views.groups if self.skip_duplicates else None
        if self.ring:
            return {"info_nce": ring_info_nce(image, text, views.scale, groups, self.tile)}
        if self.tile is not None or len(image) > TILED_ABOVE:
            return {"info_nce": tiled_info_nce(image, text, views.scale, groups, self.tile)}
        same = same_caption(views) if self.skip_duplicates else None
        return {"info_nce": info_nce(_logits(views, image, text), same)}


@dataclass(frozen=True)
class Sigmoid(Objective):
    """Pairwise sigmoid loss, SigLIP (arXiv 2303.15343). In nats per picture, >= 0.

    An encoder without a learnt `logit_bias` gets the fixed `bias` instead.
    """

    bias: float = -10.0  # the paper's initial value, section 3.2: most pairs of a batch are negatives
    skip_duplicates: bool = True  # ours; as in InfoNCE
    tile: int | None = None  # as in InfoNCE
    ring: bool = False  # as in InfoNCE

    needs: ClassVar[frozenset[str]] = frozenset({"image", "text"})

    @property
    def local(self) -> bool:
        """Whether `terms` wants this process's own views, not those of the whole batch."""
        return self.ring

    def terms(self, views: Views) -> dict[str, Tensor]:
        image, text = views["image"].pooled, views["text"].pooled
        groups = views.groups if self.skip_duplicates else None
        bias = self.bias if views.bias is None else views.bias
        if self.ring:
            bias = torch.as_tensor(bias, device=image.device)
            return {"sigmoid": ring_sigmoid_loss(image, text, views.scale, bias, groups, self.tile)}
        if self.tile is not None or len(image) > TILED_ABOVE:
            return {"sigmoid": tiled_sigmoid_loss(image, text, views.scale, bias, groups, self.tile)}
        same = same_caption(views) if self.skip_duplicates else None
        return {"sigmoid": sigmoid_loss(_logits(views, image, text) + bias, same)}


def _logits(views: Views, image: Tensor, text: Tensor) -> Tensor:
    """(B, B), scale * cosine, in at least float32 under autocast too: tiled or not, a batch has the same loss."""
    kind = torch.promote_types(image.dtype, torch.float32)
    with no_autocast(image):
        return views.scale * image.to(kind) @ text.to(kind).T
