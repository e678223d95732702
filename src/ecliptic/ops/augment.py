"""Random views of a picture, reproducible from a seed and indifferent to what else is being augmented."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageEnhance, ImageFilter


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


# Strong views: what else changes a picture and leaves what it shows


def colour_jitter(
    image: Image.Image,
    generator: torch.Generator,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.1,
) -> Image.Image:
    """An RGB picture with its light and colours changed at random, the four changes in random order.

    brightness, contrast, saturation: the picture is blended with black, with its mean grey, with its own grey version, by a
    factor uniform in [max(0, 1 - x), 1 + x], where 1 leaves it as it is. hue: colours are turned by a share of the circle
    uniform in [-hue, hue], at most 0.5. With all four 0 the picture stays as it is.
    """
    if not (min(brightness, contrast, saturation) >= 0 and 0 <= hue <= 0.5):
        raise ValueError(
            f"brightness={brightness}, contrast={contrast}, saturation={saturation} must not be negative, "
            f"hue={hue} lies in 0..0.5"
        )
    draws = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    blends = (
        (ImageEnhance.Brightness, brightness),
        (ImageEnhance.Contrast, contrast),
        (ImageEnhance.Color, saturation),
    )
    for change in torch.randperm(4, generator=generator).tolist():
        if change == 3:
            image = turned_hue(image, hue * (2 * draws[3] - 1))
            continue
        blend, strength = blends[change]
        low, high = max(0.0, 1 - strength), 1 + strength
        if strength:
            image = blend(image).enhance(low + (high - low) * draws[change])
    return image


def turned_hue(image: Image.Image, share: float) -> Image.Image:
    """An RGB picture with every hue turned by this share of the circle: 1/3 makes red green, and greys stay grey."""
    steps = round(share * 256) % 256
    if not steps:
        return image
    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point([(level + steps) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def random_perspective(image: Image.Image, generator: torch.Generator, distortion: float = 0.2) -> Image.Image:
    """The picture as if seen from aside: each corner moves inwards by up to distortion / 2 of the side; black around it."""
    if not 0 <= distortion < 1:
        raise ValueError(f"distortion={distortion}: it goes from 0 to below 1")
    width, height = image.size
    in_x, in_y = (distortion / 2 * torch.rand(2, 4, generator=generator, dtype=torch.float64)).tolist()
    corners = ((0.0, 0.0), (width, 0.0), (width, height), (0.0, height))
    moved = [
        (x + (width if x == 0 else -width) * dx, y + (height if y == 0 else -height) * dy)
        for (x, y), dx, dy in zip(corners, in_x, in_y, strict=True)
    ]
    coefficients = perspective_coefficients(moved, corners)
    return image.transform(image.size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR)


def perspective_coefficients(
    output: Sequence[tuple[float, float]], source: Sequence[tuple[float, float]]
) -> tuple[float, ...]:
    """Eight numbers a..h with x = (a u + b v + c) / (g u + h v + 1), y = (d u + e v + f) / (g u + h v + 1) for four pairs of
    points (u, v) of the output and (x, y) of the source: what Pillow's transform reads."""
    rows, values = [], []
    for (u, v), (x, y) in zip(output, source, strict=True):
        rows += [[u, v, 1, 0, 0, 0, -u * x, -v * x], [0, 0, 0, u, v, 1, -u * y, -v * y]]
        values += [x, y]
    system = torch.tensor(rows, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    return tuple(torch.linalg.solve(*system).tolist())


def strong_view(
    image: Image.Image,
    size: int,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.2, 1.0),
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1),
    distortion: float = 0.2,
    sigma: tuple[float, float] = (0.1, 2.0),
) -> Image.Image:
    """A view in which little is left as it was but what is shown: (size, size) pixels, RGB.

    In this order: random resized crop and mirror (`random_view`), `colour_jitter` 8 times in 10, `random_perspective` every
    other time, `colour_jitter` again, Gaussian blur. sigma: range of its width in pixels of a view of 224, in proportion for
    others. Order and strengths: the strong view of NoLA (arXiv 2411.19346, released code); the second jitter is as the first.
    """
    view = random_view(image, size, generator, scale)
    jittered, tilted, again, blurred = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    if jittered < 0.8:
        view = colour_jitter(view, generator, *jitter)
    if tilted < 0.5:
        view = random_perspective(view, generator, distortion)
    if again < 0.8:
        view = colour_jitter(view, generator, *jitter)
    width = sigma[0] + (sigma[1] - sigma[0]) * blurred
    return view.filter(ImageFilter.GaussianBlur(width * size / 224))
