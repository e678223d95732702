"""An encoder as the index sees it: bytes to pixels in threads, pixels to unit rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ecliptic.apps.index.index import Refused
from ecliptic.apps.index.store import Signature
from ecliptic.data.images import ImageError, open_image

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from ecliptic.core.encoder import HFEncoder


class TowerEmbedder:
    """`Embedder` around an image tower."""

    def __init__(self, encoder: HFEncoder):
        self.encoder = encoder
        transform = hashlib.blake2b(repr(encoder.transform).encode(), digest_size=8).hexdigest()
        self.signature = Signature(encoder.id, transform, encoder.dim)

    def prepare(self, data: bytes) -> Tensor:
        """A file's bytes -> pixels (1, 3, H, W)."""
        try:
            picture = open_image(data)
        except ImageError as error:
            raise Refused(error.reason) from error
        return self.encoder.preprocess([picture])

    @torch.inference_mode()
    def embed(self, prepared: Sequence[Tensor]) -> NDArray[Any]:
        """Pixels -> (B, dim) float32 unit rows."""
        rows: NDArray[Any] = self.encoder.images(torch.cat(list(prepared))).pooled.float().cpu().numpy()
        return rows
