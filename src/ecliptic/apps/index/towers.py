"""An encoder as the index sees it: bytes to pixels in threads, pixels to unit rows. Works with torch and with an export."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ecliptic.apps.index.index import Refused
from ecliptic.apps.index.store import Signature

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ecliptic.core.encoder import HFEncoder
    from ecliptic.core.exported import ExportedModel

FAST = "+fast"  # ends the id of the image transform where large JPEGs were decoded at a fraction of their size


def signature(encoder: HFEncoder | ExportedModel, fast: bool = False) -> Signature:
    """What an index remembers of its maker. Fast decoding is part of it: vectors of the two kinds are not mixed."""
    transform = hashlib.blake2b(repr(encoder.transform).encode(), digest_size=8).hexdigest()
    return Signature(encoder.id, transform + (FAST if fast else ""), encoder.dim)


def decoded_fast(made_by: Signature) -> bool:
    """Whether an index was made with fast decoding."""
    return made_by.preprocess.endswith(FAST)


class TowerEmbedder:
    """`Embedder` around an image tower. fast: decode large JPEGs at a fraction of their size, as `decode="fast"` does."""

    def __init__(self, encoder: HFEncoder | ExportedModel, fast: bool = False):
        self.encoder = encoder
        self.fast = fast
        self.signature = signature(encoder, fast)

    def prepare(self, data: bytes) -> NDArray[np.uint8]:
        """A file's bytes -> (H, W, 3) as the model sees it, before normalising."""
        from ecliptic.data.images import ImageError, open_image  # brings Pillow, which a search in words does without

        transform = self.encoder.transform
        try:
            picture = open_image(data, fast=self.fast, min_side=transform.fast_side)
        except ImageError as error:
            raise Refused(error.reason) from error
        return transform.resized(picture)

    def embed(self, prepared: Sequence[NDArray[np.uint8]]) -> NDArray[Any]:
        """Pictures as prepared -> (B, dim) float32 unit rows."""
        return self.encoder.encode_pixels(self.encoder.transform.normalise(np.stack(prepared)))
