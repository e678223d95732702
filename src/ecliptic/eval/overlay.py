"""Heat maps drawn over pictures: colour says how much, and so does opacity, so that what does not matter stays visible.

`COLOURS` is a ramp of 17 sRGB anchors whose lightness (OKLab L, Ottosson 2020) rises evenly from 0.22 to 0.94 while the
hue turns from violet through red to yellow: equal steps look like equal steps, also in grey and to colour-blind eyes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

COLOURS: tuple[tuple[int, int, int], ...] = (
    (32, 2, 75),
    (52, 3, 89),
    (74, 4, 99),
    (97, 6, 105),
    (122, 9, 106),
    (147, 10, 104),
    (173, 13, 98),
    (198, 16, 87),
    (218, 40, 71),
    (235, 64, 49),
    (246, 92, 22),
    (248, 123, 23),
    (251, 148, 28),
    (253, 172, 46),
    (254, 196, 67),
    (254, 218, 81),
    (254, 241, 61),
)


def colour(values: ArrayLike) -> NDArray[np.uint8]:
    """Values in [0, 1], any shape -> the same shape + (3,), sRGB bytes; values outside are clipped."""
    table = np.asarray(COLOURS, dtype=float)
    at = np.clip(np.asarray(values, dtype=float), 0.0, 1.0) * (len(table) - 1)
    low = np.minimum(at.astype(int), len(table) - 2)
    part = (at - low)[..., None]
    return np.asarray(np.rint(table[low] * (1 - part) + table[low + 1] * part), dtype=np.uint8)


def stretch(heat: ArrayLike, low: float | None = None, high: float | None = None) -> NDArray[np.float64]:
    """(H, W) in any unit -> [0, 1]: `low` becomes 0, `high` becomes 1, by default the map's own ends.

    Give the same ends to maps that the reader will compare. A map without contrast becomes 0 everywhere.
    """
    h = np.asarray(heat, dtype=float)
    if h.ndim != 2 or 0 in h.shape:
        raise ValueError(f"a heat map is (H, W), got {h.shape}")
    if not np.isfinite(h).all():
        raise ValueError("the heat map holds NaN or infinity")
    low = float(h.min()) if low is None else low
    high = float(h.max()) if high is None else high
    if high - low <= 1e-12:
        return np.zeros_like(h)
    return np.clip((h - low) / (high - low), 0.0, 1.0)


def overlay(
    image: Image.Image,
    heat: ArrayLike,
    *,
    low: float | None = None,
    high: float | None = None,
    opacity: float = 0.85,
    gamma: float = 1.5,
    legend: str | tuple[str, str] | None = None,
) -> Image.Image:
    """Draw heat (H, W), higher is stronger, over the picture; the map is resized (bilinear) to the picture.

    low, high: what 0 and full strength mean (default: the ends of this map; see `stretch`). opacity: of the strongest
    place; elsewhere it is opacity * strength^gamma (gamma is ours: above 1 the background stays clean). legend: adds a
    colour bar below the picture, with one word on its right or (left, right). Returns a new RGB picture.
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must lie in [0, 1], got {opacity}")
    strength = stretch(heat, low, high)
    picture = image.convert("RGB")
    resized = Image.fromarray(strength.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR)
    s = np.clip(np.asarray(resized, dtype=float), 0.0, 1.0)
    alpha = (opacity * s**gamma)[..., None]
    grey = np.asarray(picture.convert("L"), dtype=float)[..., None]
    quiet = 0.45 * np.asarray(picture, dtype=float) + 0.55 * grey  # colours of the picture step back behind the map's
    mixed = (1 - alpha) * quiet + alpha * colour(s)
    out = Image.fromarray(np.rint(mixed).astype(np.uint8))
    return out if legend is None else _with_legend(out, ("", legend) if isinstance(legend, str) else legend)


def _with_legend(picture: Image.Image, words: Sequence[str]) -> Image.Image:
    """The picture with a strip below it: left word, colour bar, right word."""
    size = max(11, round(picture.width / 32))
    font = ImageFont.load_default(size)
    strip = 2 * size
    out = Image.new("RGB", (picture.width, picture.height + strip), "white")
    out.paste(picture, (0, 0))
    draw = ImageDraw.Draw(out)
    left, right = (draw.textlength(word, font) for word in words)
    middle = picture.height + strip / 2
    start = round(size / 2 + (left + size / 2 if left else 0))
    stop = round(picture.width - size / 2 - (right + size / 2 if right else 0))
    if left:
        draw.text((size / 2, middle), words[0], fill=(70, 70, 70), font=font, anchor="lm")
    if right:
        draw.text((picture.width - size / 2, middle), words[1], fill=(70, 70, 70), font=font, anchor="rm")
    if stop - start > 4:
        bar = colour(np.tile(np.linspace(0, 1, stop - start), (max(size // 2, 4), 1)))
        out.paste(Image.fromarray(bar), (start, round(middle - len(bar) / 2)))
    return out
