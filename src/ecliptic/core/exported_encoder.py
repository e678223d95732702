"""An exported model as an `Encoder`: whatever needs embeddings, patches or zero-shot heads takes it like any other.

It answers as the model it was made from does, and has no layers inside: nothing can be trained, prompted or changed in it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ecliptic.core.contracts import Features, Tokens
from ecliptic.core.encoder import Encoder
from ecliptic.core.exported import ExportedModel, ExportError
from ecliptic.core.files import atomic_folder
from ecliptic.core.inputs import Decode, Overflow, TextTooLong, pad


class ExportedEncoder(Encoder):
    """An `Encoder` around an `ExportedModel`; `ecliptic.load(folder)` gives one for a folder that `export` or `compress` wrote.

    id, name, max_tokens, transform, history: the exported model's. Everything is on the CPU and in float32.
    """

    device = torch.device("cpu")
    any_size = False

    def __init__(self, exported: ExportedModel):
        super().__init__()
        self.exported = exported
        self.id, self.name, self.max_tokens = exported.id, exported.name, exported.max_tokens
        self.transform, self.history = exported.transform, exported.history

    @property
    def dim(self) -> int:
        return self.exported.dim

    @property
    def scale(self) -> Tensor:
        return torch.tensor(self.exported.scale)

    @property
    def bias(self) -> Tensor | None:
        return None if self.exported.bias is None else torch.tensor(self.exported.bias)

    @property
    def image_size(self) -> int:
        """Side in pixels of the square pictures the preprocessing gives."""
        return max(self.exported.size)

    @property
    def anatomy(self) -> Any:
        """Raises ExportError: there is nothing inside that could be named."""
        raise ExportError(
            f"{self.exported.folder} is an exported model: it has no layers to train, prompt or change. "
            f"Use the model that it was made from ({self.name})"
        )

    model = tokenizer = anatomy

    def clone(self) -> Self:
        return self  # nothing in it can change

    __sklearn_clone__ = clone

    def extra_repr(self) -> str:
        return f"name={self.name!r}, dim={self.dim}, folder={str(self.exported.folder)!r}"

    # Towers

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        return self.transform(images)

    def tokenize(self, texts: Sequence[str], overflow: Literal["error", "truncate"] = "truncate") -> Tokens:
        """Captions -> Tokens, as `HFEncoder.tokenize` gives them."""
        ids, mask = pad(self.exported.token_ids(texts, overflow), *self.exported.padding)
        return Tokens(torch.from_numpy(ids), torch.from_numpy(mask))

    @torch.no_grad()
    def images(
        self, pixels: Tensor, *, patches: bool = False, layers: Sequence[int] = (), normalize: bool = True
    ) -> Features:
        """(B, 3, H, W) of the one size that was exported -> Features. Raises ExportError for other sizes, for `layers`, for
        `normalize=False`, and for `patches` if they were left out."""
        self._plain(layers, normalize)
        size = self.exported.size
        if tuple(pixels.shape[1:]) != (3, *size):
            raise ExportError(f"{self.name} was exported for pictures (B, 3, {size[0]}, {size[1]}), got {pixels.shape}")
        given = pixels.detach().float().cpu().numpy()
        if not patches:
            return Features(torch.from_numpy(self.exported.encode_pixels(given)))
        rows, found = self.exported.encode_patches(given)
        side = self.exported.patch
        assert side is not None
        return Features(torch.from_numpy(rows), torch.from_numpy(found), grid=(size[0] // side, size[1] // side))

    @torch.no_grad()
    def texts(
        self, tokens: Tokens, *, words: bool = False, layers: Sequence[int] = (), normalize: bool = True
    ) -> Features:
        """Tokens (B, L) -> Features. Raises ExportError for `words`, `layers` and `normalize=False`."""
        self._plain(layers, normalize)
        if words:
            raise ExportError(f"{self.name} was exported: it gives captions, not their words")
        if tokens.ids.shape[1] > self.max_tokens:
            raise TextTooLong(f"{tokens.ids.shape[1]} tokens, {self.name} reads {self.max_tokens}")
        rows = [ids[mask].tolist() for ids, mask in zip(tokens.ids.cpu(), tokens.mask.cpu())]
        return Features(torch.from_numpy(self.exported.encode_ids(rows)))

    def _plain(self, layers: Sequence[int], normalize: bool) -> None:
        if layers or not normalize:
            raise ExportError(f"{self.name} was exported: it gives unit rows, no hidden states and no raw lengths")

    # Pictures and strings to embeddings

    def encode_images(
        self,
        images: Iterable[Any],
        batch_size: int = 32,
        *,
        workers: int = 2,
        decode: Decode | None = None,
        errors: dict[int, Exception] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Pictures, or paths to them, -> (N, D) float32 unit rows; arguments as for `HFEncoder.encode_images`."""
        return torch.from_numpy(
            self.exported.encode_images(
                images, batch_size, workers=workers, decode=decode, errors=errors, progress=progress
            )
        )

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """(B, 3, H, W) float32, as the transform gives it -> (B, D) float32 unit rows."""
        return self.exported.encode_pixels(pixels)

    def encode_texts(self, texts: Sequence[str], batch_size: int = 128, overflow: Overflow = "truncate") -> Tensor:
        """Captions -> (N, D) float32 unit rows in the order given; `overflow` as for `HFEncoder.encode_texts`."""
        return torch.from_numpy(self.exported.encode_texts(texts, batch_size, overflow))

    # Files

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the exported folder. It appears whole or not at all."""
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty: choose another folder")
        with atomic_folder(folder, replace=True) as draft:
            shutil.copytree(self.exported.folder, draft, dirs_exist_ok=True)
