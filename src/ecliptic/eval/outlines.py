"""Boxes drawn over a picture, with labels that can be read on anything and do not cover each other."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

BEST = (255, 210, 30)
OTHERS = (255, 255, 255)
INK = (18, 18, 22)  # around lines and below words: what keeps them apart from light backgrounds

Place = tuple[int, int, int, int]


def draw_boxes(
    image: Image.Image, boxes: Sequence[Sequence[float]], labels: Sequence[str] | None = None
) -> Image.Image:
    """A new RGB picture with the boxes (x0, y0, x1, y1 in pixels, best first) drawn in: the first in yellow, others thinner.

    labels: a short text for each box, "" for none; one that finds no place where it covers no other label is left out.
    Raises ValueError if labels and boxes differ in number.
    """
    words = [""] * len(boxes) if labels is None else list(labels)
    if len(words) != len(boxes):
        raise ValueError(f"{len(boxes)} boxes and {len(words)} labels: there must be one for each")
    out = image.convert("RGB").copy()
    unit = max(1.0, max(out.size) / 400)  # lines and letters grow with the picture
    frames = [_inside(box, out.size) for box in boxes]
    draw = ImageDraw.Draw(out)
    for rank in reversed(range(len(frames))):  # the best on top
        thick = max(2, round(unit * (1.5 if rank == 0 else 1.0)))
        _frame(draw, frames[rank], thick, BEST if rank == 0 else OTHERS)
    taken: list[Place] = []
    for rank, (frame, text) in enumerate(zip(frames, words)):
        if not text.strip():
            continue
        chip = _chip(text, max(11, round(unit * (10 if rank == 0 else 8))), out.width, rank == 0)
        place = _free(frame, chip.size, out.size, taken, max(2, round(2 * unit)))
        if place is not None:
            out.paste(chip, place[:2], chip)
            taken.append(place)
    return out


def _inside(box: Sequence[float], size: tuple[int, int]) -> Place:
    """To whole pixels, within the picture, at least one pixel each way."""
    x0, y0 = (min(max(round(box[i]), 0), size[i] - 1) for i in (0, 1))
    x1, y1 = (min(max(round(box[i + 2]), low + 1), size[i]) for i, low in ((0, x0), (1, y0)))
    return x0, y0, x1, y1


def _frame(draw: ImageDraw.ImageDraw, place: Place, thick: int, colour: tuple[int, int, int]) -> None:
    """A line just inside the box, with a dark hair on either side of it."""
    x0, y0, x1, y1 = place[0], place[1], place[2] - 1, place[3] - 1
    hair = max(1, thick // 3)
    draw.rectangle((x0, y0, x1, y1), outline=INK, width=thick + 2 * hair)
    if x1 - x0 > 2 * hair and y1 - y0 > 2 * hair:
        draw.rectangle((x0 + hair, y0 + hair, x1 - hair, y1 - hair), outline=colour, width=thick)


def _chip(text: str, letters: int, width: int, best: bool) -> Image.Image:
    """The words on a plate with round corners, RGBA; cut with an ellipsis where the picture is too narrow for them."""
    fine = 3  # drawn three times as large and shrunk, for smooth corners
    font = ImageFont.load_default(letters * fine)
    room = width - letters
    while len(text) > 1 and font.getlength(text) > room * fine:
        text = text[:-2].rstrip() + "…"
    ascent, descent = font.getmetrics() if isinstance(font, ImageFont.FreeTypeFont) else (letters * fine, 0)
    pad = round(0.45 * letters * fine)
    size = (round(font.getlength(text)) + 2 * pad, ascent + descent + pad // 2)
    chip = Image.new("RGBA", size, (*INK, 0))
    draw = ImageDraw.Draw(chip)
    draw.rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), radius=round(0.3 * size[1]), fill=(*INK, 235))
    draw.text((size[0] / 2, size[1] / 2), text, fill=BEST if best else OTHERS, font=font, anchor="mm")
    return chip.resize((max(1, size[0] // fine), max(1, size[1] // fine)), Image.Resampling.LANCZOS)


def _free(
    frame: Place, size: tuple[int, int], within: tuple[int, int], taken: Sequence[Place], gap: int
) -> Place | None:
    """The first place for a label that covers no other: at a corner, above, below, then inside its box."""
    x0, y0, x1, y1 = frame
    wide, tall = size
    above, below, inside, low = y0 - tall - gap, y1 + gap, y0 + 2 * gap, y1 - tall - 2 * gap
    left, right, middle = x0, x1 - wide, (x0 + x1 - wide) // 2
    spots = [(x, y) for y in (above, below) for x in (left, right, middle)]
    spots += [(x, y) for y in (inside, low) for x in (left + 2 * gap, right - 2 * gap, middle)]
    for x, y in spots:
        x = min(
            max(x, 0), max(within[0] - wide, 0)
        )  # sideways a label may give way, up and down it would leave its box
        place = (x, y, x + wide, y + tall)
        if y >= 0 and y + tall <= within[1] and not any(_meet(place, other, gap) for other in taken):
            return place
    return None


def _meet(a: Place, b: Place, gap: int) -> bool:
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap
