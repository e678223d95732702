from __future__ import annotations

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from ecliptic.eval.detection import COCO_IOU, Boxes, average_precision
from ecliptic.ops.boxes import box_iou


def square(x, y, side=10.0):
    return [x, y, x + side, y + side]


def loops(found, truth, level, max_boxes=100):
    """The same protocol, one box at a time, precision read off a list."""
    ranked = []
    for picture, (boxes, scores) in enumerate(found):
        order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:max_boxes]
        taken = set()
        for place, i in enumerate(order):
            best, which = level - 1e-12, None
            for j in range(len(truth[picture])):
                o = box_iou(boxes[i : i + 1].double(), truth[picture][j : j + 1].double()).item()
                if j not in taken and o >= best and (which is None or o > best):
                    best, which = o, j
            if which is not None:
                taken.add(which)
            ranked.append((-float(scores[i]), picture, place, which is not None))
    ranked.sort(key=lambda item: item[:3])
    total, right, curve = sum(map(len, truth)), 0, []
    for n, (*_, hit) in enumerate(ranked, start=1):
        right += hit
        curve.append((right / total, right / n))
    reached = [max((p for r, p in curve if r >= k / 100), default=0.0) for k in range(101)]
    return sum(reached) / 101


def test_the_protocol_as_loops():
    generator = torch.Generator().manual_seed(0)
    found, truth = [], []
    for _ in range(12):
        n, m = (int(torch.randint(0, high, (1,), generator=generator)) for high in (9, 4))
        true = 40 * torch.rand(m, 2, generator=generator)
        truth.append(torch.cat([true, true + 12], 1))
        near = torch.cat([true, 40 * torch.rand(n, 2, generator=generator)])
        near = near + torch.randn(near.shape, generator=generator)
        found.append(
            Boxes(torch.cat([near, near + 12], 1), torch.rand(len(near), generator=generator).round(decimals=1))
        )
    expected = tensor([loops(found, truth, level) for level in COCO_IOU], dtype=torch.float64)
    assert_close(average_precision(found, truth), expected, rtol=1e-12, atol=1e-12)
    assert 0.05 < expected.mean() < 0.95
    few = tensor([loops(found, truth, level, 2) for level in COCO_IOU], dtype=torch.float64)
    assert_close(average_precision(found, truth, max_boxes=2), few, rtol=1e-12, atol=1e-12)


def test_by_hand():
    truth = [tensor([square(0, 0), square(50, 0)])]
    # Right, wrong, right: precision 1 up to recall 1/2, then 2/3.
    found = [Boxes(tensor([square(0, 0), square(20, 20), square(50, 0)]), tensor([0.9, 0.8, 0.7]))]
    assert_close(average_precision(found, truth, (0.5,)).item(), (51 * 1 + 50 * 2 / 3) / 101)


def test_a_second_box_on_the_same_object_is_wrong():
    truth = [tensor([square(0, 0)])]
    twice = [Boxes(tensor([square(0, 0), square(0, 0)]), tensor([0.9, 0.8]))]
    assert average_precision(twice, truth, (0.5,)).item() == 1  # all is found before the duplicate
    truth = [tensor([square(0, 0), square(50, 50)])]
    found = [Boxes(tensor([square(0, 0), square(0, 0), square(50, 50)]), tensor([0.9, 0.8, 0.7]))]
    assert_close(average_precision(found, truth, (0.5,)).item(), (51 + 50 * 2 / 3) / 101)


def test_perfect_missing_and_empty():
    truth = [tensor([square(0, 0)]), torch.zeros(0, 4)]
    right = [Boxes(truth[0], tensor([0.3])), Boxes(torch.zeros(0, 4), torch.zeros(0))]
    assert_close(average_precision(right, truth), torch.ones(10, dtype=torch.float64))
    nothing = [Boxes(torch.zeros(0, 4), torch.zeros(0))] * 2
    assert average_precision(nothing, truth).sum() == 0


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="no picture holds a true box"):
        average_precision([Boxes(torch.zeros(0, 4), torch.zeros(0))], [torch.zeros(0, 4)])
    with pytest.raises(ValueError, match="1 pictures with found boxes, 0 with true"):
        average_precision([Boxes(torch.zeros(0, 4), torch.zeros(0))], [])
