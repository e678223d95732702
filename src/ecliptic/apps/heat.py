"""A text drawn over a picture: where it is meant, in colours that stay apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ecliptic.core.dense import BACKGROUND, picture_heatmaps

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ecliptic.core.encoder import HFEncoder

SOFTNESS = 8.0  # ours; a model's own scale (20 to 100) pushes every place that fits to 1, and the map becomes one blot


def heat_of(
    encoder: HFEncoder, picture: Image.Image, texts: Sequence[str], versus: Sequence[str] | None = None
) -> Tensor:
    """(K, height, width) in [0, 1]: each text against what else there is, soft enough for differences to show."""
    return picture_heatmaps(encoder, picture, texts, background=versus or BACKGROUND, scale=SOFTNESS)
