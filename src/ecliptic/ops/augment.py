"""Random views of a picture, reproducible from a seed and indifferent to what else is being augmented."""

from __future__ import annotations

import math

import torch
from PIL import Image


def resized_crop_box(
    size: tuple[int, int],
    generator: torch.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """A random box (left, top, right, bottom) in pixels inside a picture of `size` (width, height).

    Its share of the area is uniform in `scale`, the logarithm of width / height uniform in the logarithms of `ratio`,
    its place uniform. After ten boxes that do not fit: the largest centred box within `ratio`.
    """
    width, height = size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        share, shape, x, y = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area = width * height * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = math.exp(low + (high - low) * shape)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_view(
    image: Image.Image,
    size: int,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
) -> Image.Image:
    """A random resized crop, bicubic with antialiasing, mirrored with probability `flip`: (size, size) pixels, RGB.

    The picture given is not changed.
    """
    box = resized_crop_box(image.size, generator, scale, ratio)
    mirrored = float(torch.rand((), generator=generator)) < flip
    view = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else view
