"""Pictures to pixels, exactly as the checkpoint's own processor does it, without torchvision and, but for the last step, torch.

The resize and crop arithmetic follows the Pillow processors of transformers to the bit (the long side is truncated, not
rounded: rounding moves pixels by up to 1.85 normalised units on a 640 x 480 picture). Rescaling and normalising are one
look-up per channel, since an 8-bit picture has only 256 values to transform.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # arXiv 2103.00020, official code
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)  # SigLIP
# A JPEG decoder shrinks with a coarse filter, so it must leave more than the model reads. Ours: at 2 times, a rendered scene
# kept a cosine of 0.987 with its exact embedding ("tiny"); at 3, all pictures tried kept 0.999.
FAST_MARGIN = 3

# What the published processors use where their saved config leaves a key out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIP": {"size": {"shortest_edge": 224}, "crop_size": 224, "center": True, "mean": CLIP_MEAN, "std": CLIP_STD},
    "Siglip": {"size": {"height": 224, "width": 224}, "crop_size": None, "center": False, "mean": HALF, "std": HALF},
    "ViT": {
        "size": {"height": 224, "width": 224},
        "crop_size": None,
        "center": False,
        "mean": HALF,
        "std": HALF,
        "resample": 2,
    },
}


@dataclass(frozen=True)
class ImagePreprocess:
    """Resize, centre-crop, rescale, normalise.

    shortest: target of the shorter side in pixels (aspect kept), or None when `size` (height, width) is forced.
    crop: (height, width) of the centre crop, zero-padded where the picture is smaller, or None.
    resample: Pillow's filter number.
    """

    shortest: int | None = 224
    size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = (224, 224)
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resample: int = int(Image.Resampling.BICUBIC)
    rescale: float = 1 / 255

    def __post_init__(self) -> None:
        if (self.shortest is None) == (self.size is None):
            raise ValueError("give either `shortest` or `size`, not both")

    @classmethod
    def from_processor(cls, config: Mapping[str, Any]) -> ImagePreprocess:
        """From the contents of a Hugging Face `preprocessor_config.json`. Settings we cannot honour are errors."""
        config = config.get("image_processor", config)
        kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "CLIP")
        default = next((value for name, value in _DEFAULTS.items() if kind.startswith(name)), _DEFAULTS["CLIP"])
        if config.get("do_pad"):
            raise ValueError("preprocessor_config.json: do_pad is not supported")
        size = config.get("size", default["size"]) if config.get("do_resize", True) else None
        if size is None:
            raise ValueError(
                "preprocessor_config.json: do_resize=false leaves pictures of many sizes; resize is required"
            )
        center = config.get("do_center_crop", default["center"])
        crop = config.get("crop_size", default["crop_size"]) if center else None
        shortest, forced = _size(size, square=not kind.startswith("CLIP"))
        normalise = config.get("do_normalize", True)
        return cls(
            shortest=shortest,
            size=forced,
            crop=None if crop is None else _pair(crop),
            mean=tuple(config.get("image_mean") or default["mean"]) if normalise else (0.0, 0.0, 0.0),
            std=tuple(config.get("image_std") or default["std"]) if normalise else (1.0, 1.0, 1.0),
            resample=int(config.get("resample", default.get("resample", 3))),
            rescale=float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0,
        )

    def to_processor(self) -> dict[str, Any]:
        """The same settings as a `preprocessor_config.json` that transformers reads."""
        size = {"shortest_edge": self.shortest} if self.size is None else dict(zip(("height", "width"), self.size))
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": size,
            "resample": self.resample,
            "do_center_crop": self.crop is not None,
            **({} if self.crop is None else {"crop_size": dict(zip(("height", "width"), self.crop))}),
            "do_rescale": True,
            "rescale_factor": self.rescale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def zoomed(self, factor: int) -> ImagePreprocess:
        """The same at `factor` times the size. A tower that interpolates its positions then sees patches of finer things."""
        if factor < 1:
            raise ValueError(f"a zoom of {factor}: it is a whole number from 1 on")
        return replace(
            self,
            shortest=None if self.shortest is None else factor * self.shortest,
            size=None if self.size is None else (factor * self.size[0], factor * self.size[1]),
            crop=None if self.crop is None else (factor * self.crop[0], factor * self.crop[1]),
        )

    @property
    def side(self) -> int:
        """The smallest side in pixels that a decoder must deliver for nothing to be lost."""
        return self.shortest if self.shortest is not None else max(self.size or (0,))

    @property
    def fast_side(self) -> int:
        """The side in pixels below which fast decoding must not shrink a picture: `side` with room for the resize, ours."""
        return FAST_MARGIN * self.side

    @cached_property
    def _table(self) -> np.ndarray:
        """(3, 256) float32: normalised value of each byte, in the order and precision that transformers computes it."""
        values = (np.arange(256, dtype=np.uint8).astype(np.float64) * self.rescale).astype(np.float32)
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return ((values[None] - mean[:, None]) / std[:, None]).astype(np.float32)

    def resized(self, image: Image.Image) -> np.ndarray:
        """One picture -> (H, W, 3) uint8 at the size the model sees, before normalising."""
        if image.mode != "RGB":
            image = image.convert("RGB")
        width, height = image.size
        if self.size is not None:
            target = (self.size[1], self.size[0])
        else:
            short, long = min(width, height), max(width, height)
            assert self.shortest is not None
            scaled = int(self.shortest * long / short)
            target = (self.shortest, scaled) if width <= height else (scaled, self.shortest)
        if image.size != target:
            image = image.resize(target, Image.Resampling(self.resample))
        pixels = np.asarray(image)
        return pixels if self.crop is None else _center_crop(pixels, self.crop)

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """(..., H, W, 3) uint8 -> (..., 3, H, W) float32."""
        channels = [np.take(self._table[c], pixels[..., c]) for c in range(3)]
        return np.stack(channels, axis=-3)

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size -> (B, 3, H, W) float32."""
        import torch

        return torch.from_numpy(self.pixels(images))

    def pixels(self, images: Sequence[Image.Image]) -> np.ndarray:
        """What a call gives, as an array: (B, 3, H, W) float32."""
        if not len(images):
            height, width = self.crop or self.size or (self.side, self.side)
            return np.empty((0, 3, height, width), np.float32)
        arrays = [self.resized(image) for image in images]
        if len({array.shape for array in arrays}) > 1:
            raise ValueError("pictures of different shapes stay different without a crop: give them one at a time")
        return self.normalise(np.stack(arrays))


def _size(size: Any, square: bool) -> tuple[int | None, tuple[int, int] | None]:
    """transformers' size dictionary or bare number -> (shortest, (height, width)), one of the two None."""
    if isinstance(size, int):
        return (None, (size, size)) if square else (size, None)
    if "shortest_edge" in size and "longest_edge" not in size:
        return int(size["shortest_edge"]), None
    if "height" in size and "width" in size:
        return None, (int(size["height"]), int(size["width"]))
    raise ValueError(f"preprocessor_config.json: size {size} is not supported; use shortest_edge, or height and width")


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))


def _center_crop(pixels: np.ndarray, crop: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) -> (*crop, 3); zeros where the picture is smaller than the crop."""
    height, width = pixels.shape[:2]
    top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
    if top >= 0 and left >= 0:
        return pixels[top : top + crop[0], left : left + crop[1]]
    # transformers pads with the ceiling on the top and left, then crops the padded picture from its middle.
    tall, wide = max(crop[0], height), max(crop[1], width)
    padded = np.zeros((tall, wide, 3), pixels.dtype)
    pad_top, pad_left = -((height - tall) // 2), -((width - wide) // 2)
    padded[pad_top : pad_top + height, pad_left : pad_left + width] = pixels
    top, left = (tall - crop[0]) // 2, (wide - crop[1]) // 2
    return padded[top : top + crop[0], left : left + crop[1]]
