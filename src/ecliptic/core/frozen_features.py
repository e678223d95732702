"""A second pair of eyes: frozen encoders of pictures that know no names, for methods that learn from two.

Any callable will do, such as a DINO of transformers; what stands here needs nothing that is not installed already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ecliptic.core.encoder import HFEncoder
from ecliptic.ops.handcrafted import handcrafted

Phi = Callable[[Sequence[Image.Image]], Tensor]
"""A frozen encoder of pictures: B pictures of one size, RGB, -> (B, d) features."""

FEATURES = ("auto", "backbone", "handcrafted")
"""The names that `default_phi` knows."""


@dataclass(frozen=True)
class HandcraftedFeatures:
    """Pictures -> (B, 784): gradients by orientation and colours (`ops.handcrafted`) of the picture at size x size pixels."""

    size: int = 64  # ours

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        return handcrafted(torch.from_numpy(_resized(pictures, self.size)).movedim(-1, 1).float() / 255)


@dataclass(frozen=True)
class BackboneFeatures:
    """Pictures -> (B, 2 W): class token and mean patch of the transformer in a joined tower, after its last norm.

    size: pixels a side, in whole patches; time goes with its square.
    """

    encoder: HFEncoder
    size: int = 224

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels = torch.from_numpy(self.encoder.transform.normalise(_resized(pictures, self.size)))
        backbone: Any = self.encoder.anatomy.image.module.backbone
        tokens: Tensor = backbone(pixels.to(self.encoder.device)).last_hidden_state
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], -1)


def default_phi(encoder: HFEncoder, features: str = "auto") -> Phi:
    """A frozen encoder by name: "handcrafted"; "backbone", the transformer beside the network that pools pictures in the joined
    tower of "offline"; "auto", that where there is one. ValueError for another name, or where there is no such transformer."""
    if features not in FEATURES:
        raise ValueError(f"features={features!r}: choose one of {', '.join(FEATURES)}")
    joined = encoder.anatomy.image.joined
    if features == "backbone" and not joined:
        raise ValueError(
            f"features='backbone': {encoder.name} has no second network beside its own; choose 'handcrafted', or give phi"
        )
    return BackboneFeatures(encoder) if joined and features != "handcrafted" else HandcraftedFeatures()


def check_phi(features: Tensor, count: int) -> Tensor:
    """What a phi gave for `count` pictures, as float32 on the CPU. ValueError if it is not (count, d), or not finite."""
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != count:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"phi must give a tensor ({count}, d) for {count} pictures, it gave {shape}")
    if not features.isfinite().all():
        raise ValueError("phi gave features that are not finite")
    return features.detach().float().cpu()


def _resized(pictures: Sequence[Image.Image], size: int) -> np.ndarray:
    """(B, size, size, 3) uint8."""
    small = [p.convert("RGB").resize((size, size), Image.Resampling.BICUBIC) for p in pictures]
    return np.stack([np.asarray(p) for p in small])
