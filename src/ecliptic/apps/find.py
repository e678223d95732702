"""Where in a picture a phrase is meant, as boxes, and whether it is there at all.

1. A heat map of the phrase (`picture_heatmaps`, the picture seen at twice the model's size) is compared with windows of many
   sizes and with its own connected parts. A box is the better the higher the map inside it than around it, and the more of
   the map it holds.
2. The best few dozen are cut out and encoded like pictures of their own. A box's score is the geometric mean of three numbers
   in [0, 1]: how the cut-out fits the phrase rather than the background, and the two by which the map chose it.
3. Soft-NMS (arXiv 1704.04503) thins out what overlaps a better box; what then scores far below the best is left out.
4. Whether the phrase is there is judged as `ecliptic search` judges an index (`ecliptic.apps.index.relevance`), the cut-outs
   taking the place of its pictures: by how far the phrase fits one of them better than a thousand common things do.

The settings are ours, chosen on one half of the pictures of benchmarks/find.py; docs/find.md has the figures of the other half.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ecliptic.apps.heat import SOFTNESS
from ecliptic.apps.index.relevance import Relevance, load_background
from ecliptic.core.dense import BACKGROUND, picture_heatmaps
from ecliptic.core.preprocess import ImagePreprocess
from ecliptic.core.zeroshot import zero_shot_head
from ecliptic.methods.detect.soft_nms import soft_nms
from ecliptic.ops.boxes import check_boxes
from ecliptic.ops.regions import level_boxes, ring_contrast, soft_iou, windows

if TYPE_CHECKING:
    from ecliptic.core.encoder import HFEncoder

SCALES = (1.0, 0.75, 0.5, 0.35, 0.25)  # sides of windows, as shares of the picture's shorter side
ASPECTS = (1.0, 1.6, 0.625)
STEP = 0.34
LEVELS = (0.35, 0.45, 0.55, 0.65, 0.75, 0.85)  # of the heat map, whose connected parts are proposed
SMALLEST = 0.004  # of the picture's area, for such a part
CELLS = 128  # of the longer side of the map that boxes are held against
LEAST = (
    4  # cells of that map, for a side of a window; what keeps the windows of a very long picture from being too many
)
FLAT = 1e-3  # a map that spans less, in units of probability, is not stretched to all of [0, 1]
SIGMA = 0.3  # of Soft-NMS; at its usual 0.5, more parts of one thing are left beside it
BATCH = 32  # boxes encoded at a time
WORTH = 0.7  # boxes with less than this share of the best box's score are not given
SLOPE = 0.8  # of the log-odds of relevance, per unit of excess; `python -m benchmarks.find calibrate`
LIMIT = 2.0  # the excess of relevance 0.5: four of five phrases that are there lie above (same command)


@dataclass(frozen=True, eq=False)
class Found:
    """What was found of `text` in a picture of `size` (width, height).

    boxes (K, 4) x0 y0 x1 y1 in pixels and scores (K,) in [0, 1], best first; they are given in any case. present: whether to
    believe them. relevance: in [0, 1], how surely the phrase is there at all; comparable across pictures and phrases.
    proposals (N, 4), proposal_scores (N,) and proposal_kinds: the boxes that were cut out and encoded, best by the map first.
    considered: how many boxes there were of each kind, and how many were encoded. heat (rows, columns) in [0, 1]: the map.
    """

    text: str
    size: tuple[int, int]
    boxes: Tensor
    scores: Tensor
    relevance: float
    proposals: Tensor
    proposal_scores: Tensor
    proposal_kinds: tuple[str, ...]
    considered: dict[str, int]
    heat: Tensor

    @property
    def present(self) -> bool:
        return self.relevance >= 0.5


def find(
    encoder: HFEncoder, image: Image.Image, text: str, *, boxes: Tensor | None = None, looks: int = 32, zoom: int = 2
) -> Found:
    """One phrase in one picture; for many pictures make a `Finder`, which takes the same settings."""
    return Finder(encoder, text, looks=looks, zoom=zoom)(image, boxes)


@dataclass(frozen=True, eq=False)
class Finder:
    """A phrase, ready to be looked for in many pictures.

    looks: how many proposals are encoded; the time grows with it. zoom: at how many times the model's size the heat map is
    made; 3 finds smaller things and takes three times as long. top: how many boxes to give at most. Raises ValueError for an
    empty phrase or settings below 1, and TextTooLong for a phrase beyond the model's limit.
    """

    encoder: HFEncoder
    text: str
    looks: int = 32
    zoom: int = 2
    top: int = 5

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("the text is empty: say what to look for")
        for name in ("looks", "zoom", "top"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        _ = self._phrase  # a phrase too long for the model fails here, before any picture

    def __call__(self, image: Image.Image, boxes: Tensor | None = None) -> Found:
        """image: any size. boxes (N, 4) in its pixels: look at these alone instead of windows and parts of the heat map."""
        picture = self._reduced(image.convert("RGB"))
        heat = self._heat(picture)
        rows, columns = heat.shape
        pixels = torch.tensor([image.width / columns, image.height / rows] * 2)  # of the picture, in a cell of the map
        if boxes is None:
            kinds = {
                "windows": windows(columns, rows, scales=SCALES, aspects=ASPECTS, step=STEP, least=LEAST),
                "parts": level_boxes(heat, LEVELS, smallest=SMALLEST),
            }
        else:
            kinds = {"given": check_inside(boxes, image.size) / pixels}
        found = torch.cat(list(kinds.values()))
        names = [kind for kind, some in kinds.items() for _ in some]
        held = (ring_contrast(heat, found).clamp(min=0) * soft_iou(heat, found).clamp(min=0)).float()
        chosen = held.sort(descending=True, stable=True).indices[: self.looks if boxes is None else None]
        found, held = found[chosen], held[chosen]
        seen = self._encode(picture, found / torch.tensor([columns / picture.width, rows / picture.height] * 2))
        scores = (self._fit(seen) * held).pow(1 / 3)
        kept = soft_nms(found, scores, sigma=SIGMA, max_out=self.top)
        keep = kept.keep[kept.scores >= WORTH * kept.scores[0]]
        excess = Relevance.fit(self._common, seen).excess(self._phrase, seen).max()
        return Found(
            text=self.text,
            size=image.size,
            boxes=found[keep] * pixels,
            scores=kept.scores[: len(keep)],
            relevance=torch.sigmoid(torch.tensor(SLOPE * (excess - LIMIT))).item(),
            proposals=found * pixels,
            proposal_scores=scores,
            proposal_kinds=tuple(names[i] for i in chosen.tolist()),
            considered={kind: len(some) for kind, some in kinds.items()} | {"encoded": len(found)},
            heat=heat,
        )

    @cached_property
    def _phrase(self) -> Tensor:
        """(D,)"""
        return zero_shot_head(self.encoder, [self.text], "plain")[0]

    @cached_property
    def _common(self) -> np.ndarray:
        """(M, D), a thousand captions of common things; kept in the cache between runs."""
        return load_background(self.encoder.id, self.encoder.encode_texts)

    @cached_property
    def _nothing(self) -> Tensor:
        """(5, D), the background of the heat map."""
        return self.encoder.encode_texts(list(BACKGROUND))

    @cached_property
    def _squeezed(self) -> ImagePreprocess:
        """The encoder's transform without its crop: the ends of a box count as much as its middle."""
        own = self.encoder.transform
        return replace(own, shortest=None, size=own.crop or own.size or (own.side, own.side), crop=None)

    def _reduced(self, image: Image.Image) -> Image.Image:
        """No larger than needed: the smallest window of a picture that is not too long is as large as the model sees it."""
        longest = round(self.encoder.image_size / min(SCALES))
        if max(image.size) <= longest:
            return image
        share = longest / max(image.size)
        size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
        return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3)

    def _heat(self, picture: Image.Image) -> Tensor:
        """(rows, columns) from 0 to 1, of at most `CELLS` a side; near 0 everywhere where there is no contrast to speak of."""
        heat = picture_heatmaps(self.encoder, picture, [self.text], scale=SOFTNESS, zoom=self.zoom)[0]
        share = CELLS / max(heat.shape)
        if share < 1:
            size = (max(1, round(heat.shape[0] * share)), max(1, round(heat.shape[1] * share)))
            heat = interpolate(heat[None, None], size=size, mode="area")[0, 0]
        return (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=FLAT)

    def _encode(self, picture: Image.Image, boxes: Tensor) -> Tensor:
        """boxes (N, 4) in pixels -> (N, D) unit rows of what is in them."""
        rows = []
        for start in range(0, len(boxes), BATCH):
            crops = []
            for x0, y0, x1, y1 in boxes[start : start + BATCH].round().long().tolist():
                x0, y0 = min(x0, picture.width - 1), min(y0, picture.height - 1)
                crops.append(picture.crop((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))))
            rows.append(torch.from_numpy(self.encoder.encode_pixels(self._squeezed.pixels(crops))))
        return torch.cat(rows)

    def _fit(self, seen: Tensor) -> Tensor:
        """(N, D) -> (N,) in [0, 1]: the phrase's probability against the background, as in `patch_scores`."""
        scale = self.encoder.scale.detach().float().cpu()
        return torch.sigmoid(scale * (seen @ self._phrase) - (scale * (seen @ self._nothing.T)).logsumexp(-1))


def check_inside(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """boxes (N, 4) in pixels of a picture of `size` (width, height), as float32; raises ValueError for what cannot be one.

    That is no box at all, corners the wrong way round, less than a pixel, or a part outside the picture (a pixel is forgiven).
    """
    boxes = boxes.float()
    check_boxes(boxes)
    if not len(boxes):
        raise ValueError("there are no boxes to look at")
    width, height = size
    for row, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        said = f"box {row} ({x0:g}, {y0:g}, {x1:g}, {y1:g})"
        if x0 < -1 or y0 < -1 or x1 > width + 1 or y1 > height + 1:
            raise ValueError(
                f"{said} lies outside the picture of {width} x {height}: boxes are x0, y0, x1, y1 in pixels, the last two "
                "a corner and not a size"
            )
        if x1 - x0 < 1 or y1 - y0 < 1:
            raise ValueError(f"{said} is smaller than a pixel: boxes are in pixels, not in shares of the picture")
    return torch.minimum(boxes.clamp(min=0), torch.tensor([width, height] * 2, dtype=torch.float32))
