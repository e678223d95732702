from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor
from torch.testing import assert_close

from ecliptic.ops.boxes import box_iou
from ecliptic.ops.regions import (
    box_sums,
    component_boxes,
    connected_components,
    level_boxes,
    ring_contrast,
    soft_iou,
    windows,
)


def flood(mask):
    """Parts by walking from cell to cell."""
    rows, columns = mask.shape
    label = torch.zeros(rows, columns, dtype=torch.int64)
    count = 0
    for r in range(rows):
        for c in range(columns):
            if mask[r, c] and not label[r, c]:
                count += 1
                todo = [(r, c)]
                while todo:
                    y, x = todo.pop()
                    if 0 <= y < rows and 0 <= x < columns and mask[y, x] and not label[y, x]:
                        label[y, x] = count
                        todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return label


def drawn(text):
    return tensor([[cell == "#" for cell in line.strip()] for line in text.strip().splitlines()])


SPIRAL = """
    #########
    ........#
    #######.#
    #.....#.#
    #.###.#.#
    #.#...#.#
    #.#####.#
    #.......#
    #########
"""


@given(
    st.integers(1, 9).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=9)
    )
)
@settings(max_examples=80, deadline=None)
def test_parts_are_those_that_walking_finds(cells):
    assert_close(connected_components(tensor(cells)), flood(tensor(cells)))


@pytest.mark.parametrize("share", [0.3, 0.55, 0.6, 0.8])
def test_parts_of_larger_maps(share):
    mask = torch.rand(40, 57, generator=torch.Generator().manual_seed(round(100 * share))) < share
    assert_close(connected_components(mask), flood(mask))


def test_a_spiral_is_one_part_and_corners_do_not_connect():
    assert connected_components(drawn(SPIRAL)).max() == 1
    assert_close(connected_components(drawn("#.\n.#")), tensor([[1, 0], [0, 2]]))


def test_maps_of_a_batch_are_labelled_each_by_itself():
    masks = torch.rand(2, 3, 7, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    together = connected_components(masks)
    for i in range(2):
        for j in range(3):
            assert_close(together[i, j], flood(masks[i, j]))
    assert connected_components(torch.zeros(0, 4, 4, dtype=torch.bool)).shape == (0, 4, 4)
    with pytest.raises(ValueError, match="bool"):
        connected_components(torch.ones(3, 3))


def test_boxes_of_parts_are_tight():
    mask = torch.rand(20, 30, generator=torch.Generator().manual_seed(3)) < 0.4
    label, found = flood(mask), component_boxes(mask)
    assert len(found) == label.max()
    for part, box in enumerate(found.tolist(), start=1):
        y, x = (label == part).nonzero(as_tuple=True)
        assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]
    assert component_boxes(torch.zeros(3, 3, dtype=torch.bool)).shape == (0, 4)
    with pytest.raises(ValueError, match=r"\(H, W\)"):
        component_boxes(torch.zeros(1, 3, 3, dtype=torch.bool))


def test_levels_of_a_map_are_shares_of_its_range():
    heat = tensor([[5.0, 5, 5, 5, 5], [5, 7, 5, 9, 5], [5, 5, 5, 9, 5]])  # two hills: half as high, and full
    both = tensor([[1.0, 1, 2, 2], [3, 1, 4, 3]])
    assert_close(level_boxes(heat, [0.4]), both)
    assert_close(level_boxes(heat, [0.6]), both[1:])
    assert_close(level_boxes(heat, [0.4, 0.6]), both)  # the same box at two levels is one
    assert_close(level_boxes(heat, [0.4], smallest=1.5 / 15), both[1:])
    assert level_boxes(torch.full((4, 4), 2.0), [0.5]).shape == (0, 4)
    with pytest.raises(ValueError, match="finite"):
        level_boxes(tensor([[0.0, math.nan]]), [0.5])


def test_windows_cover_the_picture_and_stay_inside():
    found = windows(300, 200, scales=(1.0, 0.5, 0.25), aspects=(1.0, 2.0, 0.5), step=0.4)
    assert bool((found[:, :2] >= 0).all())
    assert bool((found[:, 2] <= 300 + 1e-3).all() and (found[:, 3] <= 200 + 1e-3).all())
    assert len(found.unique(dim=0)) == len(found)
    small = windows(300, 200, scales=(0.25,), step=0.4)
    assert_close(small[:, 2:] - small[:, :2], torch.full((len(small), 2), 50.0))
    for i, last in ((0, 250.0), (1, 150.0)):  # from border to border, neighbours at most 0.4 of a side apart
        starts = small[:, i].unique()
        assert (starts[0], starts[-1]) == (0, last)
        assert float(starts.diff().max()) <= 0.4 * 50 + 1e-3
        assert_close(starts.diff(), starts.diff()[:1].expand(len(starts) - 1))


def test_windows_of_every_shape_by_hand():
    found = windows(100, 50, scales=(0.5,), aspects=(4.0,), step=1.0)
    assert_close(found, tensor([[x, y, x + 50, y + 12.5] for x in (0.0, 50.0) for y in (0.0, 12.5, 25.0, 37.5)]))
    assert_close(windows(100, 50, scales=(1.0,), aspects=(9.0,), step=0.5)[0, 2], tensor(100.0))  # no wider than it


def test_windows_of_a_strip_are_not_many():
    strip = windows(128, 1, scales=(1.0, 0.5), aspects=(1.0, 2.0), step=0.5, least=4)
    assert_close(strip, tensor([[2.0 * i, 0, 2 * i + 4, 1] for i in range(63)]))


@pytest.mark.parametrize(
    "wrong", [{"width": 0}, {"height": math.inf}, {"scales": (0.0,)}, {"aspects": (-1.0,)}, {"step": 0}]
)
def test_what_gives_no_windows_is_refused(wrong):
    with pytest.raises(ValueError, match=r"windows|positive"):
        windows(**{"width": 10, "height": 10, "scales": (1.0,), **wrong})


def test_any_object_of_a_size_has_a_window_that_overlaps_it_well():
    """What the step is for: within half a step each way, an object as large as a window keeps an IoU above a half."""
    found = windows(300, 200, scales=(0.25,), step=1 / 3)
    at = torch.rand(200, 2, generator=torch.Generator().manual_seed(1)) * tensor([250.0, 150.0])
    objects = torch.cat([at, at + 50], 1)
    assert float(box_iou(objects, found).max(1).values.min()) > 0.5


def cells(box, heat):
    """The integral over a box, cell by cell."""
    x0, y0, x1, y1 = box
    total = 0.0
    for r in range(heat.shape[0]):
        for c in range(heat.shape[1]):
            wide, tall = min(x1, c + 1) - max(x0, c), min(y1, r + 1) - max(y0, r)
            total += heat[r, c].item() * max(wide, 0) * max(tall, 0)
    return total


def some(seed=0, n=25):
    generator = torch.Generator().manual_seed(seed)
    heat = torch.rand(6, 9, generator=generator, dtype=torch.float64)
    ends = (torch.rand(n, 2, 2, generator=generator, dtype=torch.float64) * tensor([9.0, 6.0])).sort(1).values
    return heat, torch.cat([ends[:, 0], ends[:, 1]], 1)


def test_sums_over_boxes_with_corners_inside_cells():
    heat, boxes = some()
    boxes = torch.cat([boxes, tensor([[0.0, 0, 9, 6], [-2, -1, 3, 2.5], [8, 5, 20, 30], [3, 2, 3, 4]])])
    expected = [cells(box, heat) for box in boxes.tolist()]
    assert_close(box_sums(heat, boxes), tensor(expected, dtype=torch.float64))


def test_soft_iou_is_a_sum_of_minima_over_a_sum_of_maxima():
    heat, _ = some(1)
    for box in ([1, 1, 4, 5], [0, 0, 9, 6], [7, 2, 9, 3]):
        inside = torch.zeros_like(heat)
        inside[box[1] : box[3], box[0] : box[2]] = 1
        expected = torch.minimum(heat, inside).sum() / torch.maximum(heat, inside).sum()
        assert_close(soft_iou(heat, tensor([box], dtype=torch.float64))[0], expected)
    truth = torch.zeros(6, 9)
    truth[1:4, 2:7] = 1
    asked = tensor([[0.0, 0, 5, 5], [2, 1, 7, 4]])
    assert_close(soft_iou(truth, asked).float(), box_iou(asked, tensor([[2.0, 1, 7, 4]]))[:, 0])


def test_ring_contrast_is_inside_minus_around():
    heat, boxes = some(2)
    for box, found in zip(boxes.tolist(), ring_contrast(heat, boxes, margin=0.5).tolist()):
        x0, y0, x1, y1 = box
        wide, tall = 0.5 * (x1 - x0), 0.5 * (y1 - y0)
        outer = (max(x0 - wide, 0), max(y0 - tall, 0), min(x1 + wide, 9), min(y1 + tall, 6))
        area, whole = (x1 - x0) * (y1 - y0), (outer[2] - outer[0]) * (outer[3] - outer[1])
        inside = cells(box, heat)
        assert found == pytest.approx(inside / area - (cells(outer, heat) - inside) / (whole - area), abs=1e-9)


def test_around_the_whole_map_there_is_nothing():
    heat = torch.full((4, 5), 0.7)
    assert_close(ring_contrast(heat, tensor([[0.0, 0, 5, 4]])).item(), 0.7, atol=1e-6, rtol=0)
    assert ring_contrast(heat, tensor([[1.0, 1, 3, 3]])).item() == pytest.approx(0, abs=1e-6)
