"""Where in a picture a text is meant: heat maps from patch features.

The joint space was trained for whole pictures; its patches inherit enough of it to point (MaskCLIP, arXiv 2112.01071). This is
the plain form, without refinement: methods that sharpen it start here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from ecliptic.core.contracts import Tokens
from ecliptic.core.encoder import Encoder, HFEncoder
from ecliptic.core.zeroshot import zero_shot_head

BACKGROUND = ("a photo.", "a picture of something else.", "the background.", "a texture.", "nothing.")
"""Prompts that stand for what was not asked for; ours."""


def patch_scores(
    encoder: Encoder,
    pixels: Tensor,
    text: Tensor | Tokens,
    *,
    background: Tensor | Tokens | None = None,
    scale: Tensor | float | None = None,
) -> Tensor:
    """pixels (B, 3, H, W), text (K, D) or its tokens -> (B, K, rows, columns), one value per patch.

    Without background: cosine of patch and text, in [-1, 1]. With M background texts: the probability, in [0, 1], of each
    text by itself against all backgrounds, softmax(scale * [cos_k, cos_bg1 .. cos_bgM])[0]; texts do not compete with each
    other. With one background that is sigmoid(scale * (cos_k - cos_bg)). scale: the encoder's own unless given.
    """
    features = encoder.images(pixels, patches=True)
    if features.tokens is None or features.grid is None:
        raise TypeError(f"{type(encoder).__name__} gives no patch features: it must honour images(..., patches=True)")
    patches = normalize(features.tokens, dim=-1)
    scores = patches @ _rows(encoder, text).to(patches).T  # (B, N, K)
    if background is not None:
        factor = encoder.scale if scale is None else scale
        against = (factor * (patches @ _rows(encoder, background).to(patches).T)).logsumexp(-1, keepdim=True)
        scores = torch.sigmoid(factor * scores - against)
    rows, columns = features.grid
    return scores.transpose(1, 2).unflatten(-1, (rows, columns))


def text_heatmap(
    encoder: Encoder,
    pixels: Tensor,
    text: Tensor | Tokens,
    *,
    background: Tensor | Tokens | None = None,
    scale: Tensor | float | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """`patch_scores`, upsampled (bilinear) to the pixels, or to `size` (height, width): (B, K, H, W), higher is more."""
    scores = patch_scores(encoder, pixels, text, background=background, scale=scale)
    target = size or (pixels.shape[-2], pixels.shape[-1])
    return interpolate(scores, size=target, mode="bilinear", align_corners=False)


def picture_heatmaps(
    encoder: HFEncoder,
    image: Image.Image,
    texts: Sequence[str],
    *,
    background: Sequence[str] = BACKGROUND,
    templates: str | Sequence[str] = "plain",
    scale: Tensor | float | None = None,
    zoom: int = 1,
) -> Tensor:
    """One picture of any shape and K texts -> (K, height, width) on the CPU, aligned with the whole picture.

    The picture is padded to a square first, because most checkpoints would crop its ends away; the padding is cut off
    the maps again. An empty `background` gives plain cosines. zoom: how many times the checkpoint's own size the tower sees
    the picture at, a whole number: finer maps of smaller things, for some zoom^2 times the work or more; an exported model, which
    reads one size, sees that size.
    """
    square, (left, top) = _squared(image.convert("RGB"))
    head = zero_shot_head(encoder, texts, templates)
    rest = zero_shot_head(encoder, background, "{}") if background else None
    with torch.inference_mode():
        plain = zoom == 1 or not encoder.any_size
        pixels = encoder.preprocess([square]) if plain else encoder.transform.zoomed(zoom)([square])
        scores = patch_scores(encoder, pixels, head, background=rest, scale=scale)
        side = max(image.size)
        maps = interpolate(scores.float(), size=(side, side), mode="bilinear", align_corners=False)[0].cpu()
    return maps[:, top : top + image.height, left : left + image.width].clone()


def _rows(encoder: Encoder, text: Tensor | Tokens) -> Tensor:
    """(K, D) unit rows."""
    found = encoder.texts(text).pooled if isinstance(text, Tokens) else text
    if found.ndim != 2:
        raise ValueError(f"text must be (K, D) embeddings or Tokens, got shape {tuple(found.shape)}")
    return normalize(found, dim=-1)


def _squared(image: Image.Image) -> tuple[Image.Image, tuple[int, int]]:
    """The picture in the middle of a square of its longer side, filled with the median colour of its border."""
    side = max(image.size)
    corner = ((side - image.width) // 2, (side - image.height) // 2)
    if image.width == image.height:
        return image, corner
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    border = torch.cat([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    red, green, blue = border.median(0).values.tolist()
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, corner)
    return square, corner
