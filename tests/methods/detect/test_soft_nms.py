"""Soft-NMS against the paper's pseudo-code as plain loops, by hand, and by what must not change its answer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from ecliptic.methods.detect.soft_nms import soft_nms, soft_nms_mask
from ecliptic.ops.boxes import box_iou

METHODS = ("gaussian", "linear", "hard")


def overlap_of(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / area if area > 0 else 0.0


def paper(boxes, scores, method, iou_threshold=0.3, sigma=0.5, score_threshold=0.001):
    """Figure 2 of the paper, one box at a time."""
    left = {i: scores[i] for i in range(len(scores))}
    chosen = []
    while left:
        best = max(left, key=lambda i: (left[i], -i))
        chosen.append((best, left.pop(best)))
        for i in list(left):
            o = overlap_of(boxes[best], boxes[i])
            if method == "hard":
                if o > iou_threshold:
                    del left[i]
                    continue
            elif method == "linear":
                left[i] *= 1 - o if o >= iou_threshold else 1
            else:
                left[i] *= math.exp(-o * o / sigma)
            if left[i] < score_threshold:
                del left[i]
    return chosen


def crowd(n, seed, spread=60.0):
    generator = torch.Generator().manual_seed(seed)
    corner = spread * torch.rand(n, 2, generator=generator, dtype=torch.float64)
    size = 8 + 30 * torch.rand(n, 2, generator=generator, dtype=torch.float64)
    return torch.cat([corner, corner + size], 1), torch.rand(n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2, 7, 90])
def test_the_papers_pseudo_code_as_loops(method, n):
    for seed in range(5):
        boxes, scores = crowd(n, seed)
        settings = {
            "iou_threshold": 0.2 + 0.1 * seed,
            "sigma": 0.2 + 0.2 * seed,
            "score_threshold": (0, 0.001, 0.1)[seed % 3],
        }
        kept = soft_nms(boxes, scores, method=method, **settings)
        expected = paper(boxes.tolist(), scores.tolist(), method, **settings)
        assert kept.keep.tolist() == [i for i, _ in expected]
        assert_close(kept.scores, tensor([s for _, s in expected], dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_large_groups_in_order_of_left_edges(method, offset, monkeypatch):
    """What only looks at boxes within reach finds the same: far and near, on whole numbers, with equal and very low scores."""
    for seed in range(6):
        boxes, scores = crowd(120, seed, spread=(20.0, 300.0)[seed % 2])
        if seed > 2:
            boxes, scores = boxes.round(), (10 * scores).floor() / 10
        scores[::7] *= 0.001
        boxes[-1] += 1e4  # beside nothing
        scores[-1] = 0.0005
        whole = soft_nms(boxes, scores, method=method, box_offset=offset)
        with monkeypatch.context() as patch:
            patch.setattr("ecliptic.methods.detect.soft_nms._Boxes.LARGE", 1)
            found = soft_nms(boxes, scores, method=method, box_offset=offset)
        assert torch.equal(found.keep, whole.keep)
        assert_close(found.scores, whole.scores, rtol=1e-12, atol=0)


def test_three_boxes_by_hand():
    overlap = tensor([[1.0, 0.5, 0.4], [0.5, 1.0, 0.6], [0.4, 0.6, 1.0]])
    kept = soft_nms_mask(overlap, tensor([0.9, 0.8, 0.7]), method="linear", iou_threshold=0.3)
    assert kept.keep.tolist() == [0, 2, 1]  # 0.7 falls to 0.42 and 0.8 to 0.4, then to 0.4 * (1 - 0.6)
    assert_close(kept.scores, tensor([0.9, 0.42, 0.16]))


def test_two_equal_boxes():
    boxes, scores = tensor([[0.0, 0, 9, 9], [0.0, 0, 9, 9]]), tensor([0.5, 0.8])
    assert soft_nms(boxes, scores, method="hard").keep.tolist() == [1]
    assert soft_nms(boxes, scores, method="linear").keep.tolist() == [1]
    kept = soft_nms(boxes, scores, method="gaussian", sigma=0.5)
    assert kept.keep.tolist() == [1, 0]
    assert_close(kept.scores[1].item(), 0.5 * 0.135335, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_apart_it_is_a_plain_sort(method):
    corner = 100.0 * torch.arange(20)[:, None].expand(-1, 2)
    scores = torch.rand(20, generator=torch.Generator().manual_seed(0))
    kept = soft_nms(torch.cat([corner, corner + 50], 1), scores, method=method)
    assert kept.keep.tolist() == scores.argsort(descending=True).tolist()
    assert torch.equal(kept.scores, scores[kept.keep])


def test_a_wide_gaussian_decays_nothing():
    boxes, scores = crowd(50, 3)
    kept = soft_nms(boxes, scores, sigma=1e9, score_threshold=0)
    assert kept.keep.tolist() == scores.argsort(descending=True).tolist()


def test_the_gaussian_has_no_jump_and_the_linear_form_has_one():
    def second(method, o):
        return (
            soft_nms_mask(tensor([[1, o], [o, 1]]), tensor([1.0, 1.0]), method=method, iou_threshold=0.3)
            .scores[1]
            .item()
        )

    assert second("linear", 0.2999) == 1
    assert second("linear", 0.3) == pytest.approx(0.7)
    assert second("gaussian", 0.2999) == pytest.approx(second("gaussian", 0.3), abs=1e-3)


def test_an_overlap_of_exactly_the_threshold():
    overlap, scores = tensor([[1.0, 0.5], [0.5, 1.0]]), tensor([0.9, 0.8])
    assert soft_nms_mask(overlap, scores, method="hard", iou_threshold=0.5).keep.tolist() == [0, 1]
    assert_close(soft_nms_mask(overlap, scores, method="linear", iou_threshold=0.5).scores[1].item(), 0.4)


@pytest.mark.parametrize("method", METHODS)
def test_order_and_scale_of_the_input_do_not_matter(method):
    boxes, scores = crowd(60, 1)
    kept = soft_nms(boxes, scores, method=method)
    shuffle = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    again = soft_nms(boxes[shuffle], scores[shuffle], method=method)
    assert torch.equal(shuffle[again.keep], kept.keep)
    assert torch.equal(again.scores, kept.scores)
    scaled = soft_nms(4.0 * boxes, scores, method=method)  # a power of two: exactly the same overlaps
    assert torch.equal(scaled.keep, kept.keep)


@pytest.mark.parametrize("method", METHODS)
def test_scores_never_rise(method):
    boxes, scores = crowd(80, 2)
    kept = soft_nms(boxes, scores, method=method)
    assert bool((kept.scores <= scores[kept.keep]).all())
    assert bool((kept.scores.diff() <= 0).all())
    assert kept.scores[0] == scores.max()
    assert len(set(kept.keep.tolist())) == len(kept.keep)


@pytest.mark.parametrize("method", METHODS)
def test_images_and_classes_side_by_side_are_what_each_is_alone(method):
    boxes, scores = crowd(300, 5)
    generator = torch.Generator().manual_seed(1)
    classes = (torch.rand(300, generator=generator).square() * 7).long()  # groups of very different sizes
    images = torch.randint(0, 3, (300,), generator=generator)
    kept = soft_nms(boxes, scores, method=method, classes=classes, images=images)
    expected = {}
    for image in range(3):
        for c in range(7):
            rows = ((classes == c) & (images == image)).nonzero()[:, 0]
            alone = soft_nms(boxes[rows], scores[rows], method=method)
            expected |= dict(zip(rows[alone.keep].tolist(), alone.scores.tolist()))
    assert dict(zip(kept.keep.tolist(), kept.scores.tolist())) == expected
    assert kept.keep.tolist() == sorted(expected, key=lambda i: (-expected[i], i))


def test_a_given_overlap_is_the_same_as_boxes():
    boxes, scores = crowd(40, 7)
    for method in METHODS:
        a, b = soft_nms(boxes, scores, method=method), soft_nms_mask(box_iou(boxes, boxes), scores, method=method)
        assert torch.equal(a.keep, b.keep)
        assert_close(a.scores, b.scores)


def test_a_threshold_of_zero_only_adds_to_the_tail():
    boxes, scores = crowd(100, 4)
    for method in METHODS:
        cut, whole = (soft_nms(boxes, scores, method=method, score_threshold=t) for t in (0.05, 0.0))
        assert torch.equal(whole.keep[: len(cut.keep)], cut.keep)
        assert bool((whole.scores[len(cut.keep) :] < 0.05).all())


@pytest.mark.parametrize("n", [31, 32, 33, 64, 65])
def test_all_are_done_with_at_any_step(n):
    """Boxes that are put aside every 32 steps may just have been the last ones."""
    boxes = tensor([[0.0, 0, 9, 9]]).repeat(n, 1) + 100 * torch.arange(float(n))[:, None]
    scores = torch.linspace(1, 0.5, n)
    for kept in (soft_nms(boxes, scores), soft_nms_mask(torch.eye(n), scores)):
        assert kept.keep.tolist() == list(range(n))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_boxes_that_only_touch_and_boxes_in_one_place(method, offset):
    """A grid of whole numbers: many shared edges, many equal overlaps, many equal scores; only the first of equals may win."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 12, (150, 2), generator=generator).double()
    boxes = torch.cat([corner, corner + torch.randint(0, 5, (150, 2), generator=generator)], 1)
    scores = torch.randint(1, 6, (150,), generator=generator).double() / 5
    kept = soft_nms(boxes, scores, method=method, box_offset=offset)
    grown = boxes + tensor([0.0, 0, 1, 1]) * offset
    expected = paper(grown.tolist(), scores.tolist(), method)
    assert_close(kept.scores, tensor([s for _, s in expected], dtype=torch.float64), rtol=1e-12, atol=0)
    if method != "gaussian":  # exp rounds differently in math and in torch, and so decides some ties otherwise
        assert kept.keep.tolist() == [i for i, _ in expected]


def test_half_precision_is_computed_in_float32():
    boxes, scores = (x.bfloat16() for x in crowd(60, 8))
    kept, wide = soft_nms(boxes, scores), soft_nms(boxes.float(), scores.float())
    assert kept.scores.dtype == torch.bfloat16
    assert torch.equal(kept.keep, wide.keep)
    assert torch.equal(kept.scores, wide.scores.bfloat16())


def test_equal_scores_go_to_the_first():
    boxes = tensor([[0.0, 0, 9, 9]]).repeat(5, 1) + 100 * torch.arange(5.0)[:, None]
    assert soft_nms(boxes, torch.full((5,), 0.5)).keep.tolist() == [0, 1, 2, 3, 4]
    assert soft_nms(boxes, torch.full((5,), 0.5), classes=tensor([3, 1, 3, 0, 1])).keep.tolist() == [0, 1, 2, 3, 4]


def test_inclusive_corners_as_in_the_official_code():
    # With offset 1: 10 x 10 boxes sharing 5 x 10, IoU 50 / 150; without, 9 x 9 sharing 4 x 9, IoU 36 / 126.
    boxes, scores = tensor([[0.0, 0, 9, 9], [5.0, 0, 14, 9]]), tensor([0.9, 0.9])
    assert_close(soft_nms(boxes, scores, method="linear", box_offset=1).scores[1].item(), 0.9 * (1 - 1 / 3))
    assert_close(soft_nms(boxes, scores, method="linear").scores[1].item(), 0.9)  # 0.286 is below 0.3


def test_inputs_stay_and_no_gradient_is_kept():
    boxes, scores = crowd(30, 0)
    before = boxes.clone(), scores.clone()
    scores.requires_grad_()
    kept = soft_nms(boxes, scores)
    assert torch.equal(boxes, before[0])
    assert torch.equal(scores.detach(), before[1])
    assert not kept.scores.requires_grad


def test_nothing_in_nothing_out_and_at_most_so_many():
    assert soft_nms(torch.zeros(0, 4), torch.zeros(0)).keep.tolist() == []
    assert soft_nms(torch.zeros(0, 4), torch.zeros(0), classes=torch.zeros(0, dtype=torch.long)).keep.tolist() == []
    assert soft_nms_mask(torch.zeros(0, 0), torch.zeros(0)).keep.tolist() == []
    boxes, scores = crowd(30, 0)
    assert torch.equal(soft_nms(boxes, scores, max_out=4).keep, soft_nms(boxes, scores).keep[:4])
    assert soft_nms(boxes, scores, max_out=0).keep.tolist() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": tensor([0.1])}, r"scores must be floating point of shape \(2,\)"),
        ({"scores": tensor([0.1, -0.1])}, "not negative"),
        ({"scores": tensor([0.1, float("inf")])}, "finite"),
        ({"boxes": tensor([[0.0, 0, 1, 1], [3.0, 0, 1, 1]])}, "wrong way round"),
        ({"method": "soft"}, "choose gaussian, linear or hard"),
        ({"sigma": 0}, "sigma=0: must be positive"),
        ({"iou_threshold": 1.5}, r"must lie in \[0, 1\]"),
        ({"score_threshold": -1}, "must not be negative"),
        ({"classes": tensor([0.0, 1.0])}, "classes must be whole numbers"),
        ({"max_out": -1}, "must not be negative"),
        ({"box_offset": 1, "boxes": tensor([[0.0, 0, 1, 1], [0.0, 0, 0.5, 1]])}, "box_offset is in pixels"),
    ],
)
def test_bad_input_is_refused(change, message):
    given = {"boxes": tensor([[0.0, 0, 9, 9], [5.0, 0, 14, 9]]), "scores": tensor([0.9, 0.8])} | change
    with pytest.raises(ValueError, match=message):
        soft_nms(given.pop("boxes"), given.pop("scores"), **given)


def test_an_overlap_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        soft_nms_mask(tensor([[1.0, -0.5], [-0.5, 1.0]]), tensor([0.5, 0.5]))
