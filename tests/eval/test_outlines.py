from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ecliptic.eval import outlines
from ecliptic.eval.outlines import BEST, INK, OTHERS, draw_boxes


def plain(size=(400, 300), colour="white"):
    return Image.new("RGB", size, colour)


def at(image, x, y):
    return image.getpixel((x, y))


def test_the_picture_stays_and_the_inside_of_boxes_too():
    image = plain()
    before = image.tobytes()
    drawn = draw_boxes(image, [(50, 60, 200, 220)])
    assert image.tobytes() == before
    assert drawn.size == image.size
    pixels = np.asarray(drawn)
    assert (pixels[70:210, 60:190] == 255).all()
    changed = (pixels != 255).any(2)
    assert not changed[:60].any()
    assert not changed[220:].any()
    assert not changed[:, :50].any()
    assert not changed[:, 200:].any()


@pytest.mark.parametrize("colour", ["white", "black", "#ffd21e", "#7f7f7f"])
def test_lines_stand_out_from_any_background(colour):
    """Across the frame, both the line's colour and its dark hair: one of the two differs from whatever is there."""
    row = np.asarray(draw_boxes(plain(colour=colour), [(50, 60, 200, 220)]))[140, 45:62]
    assert (row == BEST).all(1).sum() >= 2
    assert (row == INK).all(1).sum() >= 2


def test_the_best_is_yellow_and_on_top():
    drawn = draw_boxes(plain(), [(50, 60, 200, 220), (50, 60, 350, 260)])
    assert at(drawn, 51, 140) == BEST
    assert at(drawn, 348, 140) == OTHERS


def places(monkeypatch, boxes, labels, size=(400, 300)):
    """Where labels were put: found by painting chips in a colour of their own."""
    found = []
    free = outlines._free

    def note(*arguments):
        found.append(free(*arguments))
        return found[-1]

    monkeypatch.setattr(outlines, "_free", note)
    draw_boxes(plain(size), boxes, labels)
    return found


def test_labels_cover_no_other_and_stay_in_the_picture(monkeypatch):
    draw = np.random.default_rng(0)
    for _ in range(20):
        corners = np.sort(draw.integers(0, 300, (8, 2, 2)), axis=1)
        boxes = [(*a, *b) for a, b in corners.tolist()]
        found = [place for place in places(monkeypatch, boxes, ["something 0.52"] * 8, (300, 300)) if place]
        assert found
        for i, a in enumerate(found):
            assert a[0] >= 0
            assert a[1] >= 0
            assert a[2] <= 300
            assert a[3] <= 300
            for b in found[i + 1 :]:
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_a_label_sits_above_its_box_or_inside_where_there_is_no_room(monkeypatch):
    (above,) = places(monkeypatch, [(100, 100, 300, 200)], ["a cat"])
    assert (above[0], above[3] <= 100) == (100, True)
    (inside,) = places(monkeypatch, [(0, 0, 400, 300)], ["a cat"])
    assert inside[1] >= 0
    assert inside[3] <= 40


def test_a_long_text_is_cut_to_the_picture(monkeypatch):
    (place,) = places(monkeypatch, [(10, 40, 100, 140)], ["a very long description of what is there " * 4], (160, 150))
    assert place[2] <= 160


def test_empty_labels_and_degenerate_boxes_draw():
    for size in ((1, 1), (12, 9)):
        drawn = draw_boxes(plain(size), [(0, 0, 1, 1), (3, 3, 3, 3)], ["", "x"])
        assert drawn.size == size
    assert draw_boxes(plain(), [], []).tobytes() == plain().tobytes()


def test_labels_and_boxes_must_be_as_many():
    with pytest.raises(ValueError, match="2 boxes and 1 labels"):
        draw_boxes(plain(), [(0, 0, 5, 5), (1, 1, 9, 9)], ["a"])
