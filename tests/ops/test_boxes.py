from __future__ import annotations

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from ecliptic.ops.boxes import box_area, box_iou, check_boxes


def pixels(box, size=12):
    """The unit squares inside a box with whole corners."""
    x0, y0, x1, y1 = map(int, box)
    return {(x, y) for x in range(max(x0, 0), min(x1, size)) for y in range(max(y0, 0), min(y1, size))}


def test_iou_counts_shared_squares():
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 12, (40, 2, 2), generator=generator).double().sort(1).values
    boxes = torch.cat([corners[:, 0], corners[:, 1]], 1)
    found = box_iou(boxes[:20], boxes[20:])
    for i in range(20):
        for j in range(20):
            a, b = pixels(boxes[i]), pixels(boxes[20 + j])
            expected = len(a & b) / len(a | b) if a | b else 0.0
            assert_close(found[i, j].item(), expected, rtol=1e-12, atol=0)


def test_a_quarter_shared_by_hand():
    a, b = tensor([[0.0, 0, 2, 2]]), tensor([[1.0, 1, 3, 3]])
    assert_close(box_iou(a, b), tensor([[1 / 7]]))
    assert_close(box_iou(a, b, offset=1), tensor([[4 / 14]]))  # 3 x 3 boxes that share 2 x 2 inclusive pixels
    assert_close(box_area(a, offset=1), tensor([9.0]))


def test_many_at_once():
    boxes = torch.rand(3, 5, 4).sort(-1).values[..., [0, 1, 2, 3]]
    together = box_iou(boxes, boxes)
    assert together.shape == (3, 5, 5)
    for one, of in zip(together, boxes):
        assert_close(one, box_iou(of, of))


def test_empty_boxes_overlap_nothing():
    empty = tensor([[1.0, 1, 1, 1]])
    assert box_iou(empty, empty).item() == 0


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (torch.zeros(4), r"must be \(N, 4\)"),
        (torch.zeros(2, 5), r"must be \(N, 4\)"),
        (tensor([[0.0, 0, float("nan"), 1]]), "not finite"),
        (tensor([[0.0, 0, 1, 1], [5.0, 0, 1, 1]]), "box 1 has its corners the wrong way round"),
    ],
)
def test_what_is_no_box_is_refused(boxes, message):
    with pytest.raises(ValueError, match=message):
        check_boxes(boxes)


def test_whole_numbers_are_refused():
    with pytest.raises(TypeError, match="floating point"):
        check_boxes(torch.zeros(1, 4, dtype=torch.int64))
