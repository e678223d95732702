"""The contrastive losses against loops in float64, values by hand, and their identities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ecliptic.core import objectives
from ecliptic.core.contracts import Features, Views
from ecliptic.core.objectives import InfoNCE, Sigmoid, same_caption
from ecliptic.ops.contrastive import duplicates, info_nce, sigmoid_loss


def some_logits(b: int = 7, seed: int = 0) -> Tensor:
    return 5 * torch.randn(b, b, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_info_nce(logits: Tensor, same: list[list[bool]]) -> float:
    """Figure 3 of arXiv 2103.00020 as loops: -log softmax of the diagonal, over rows and over columns, halved."""
    b = len(logits)
    total = 0.0
    for i in range(b):
        row = [float(logits[i, j]) for j in range(b) if j == i or not same[i][j]]
        column = [float(logits[j, i]) for j in range(b) if j == i or not same[j][i]]
        for values in (row, column):
            top = max(values)
            total += top + math.log(sum(math.exp(v - top) for v in values)) - float(logits[i, i])
    return total / (2 * b)


def slow_sigmoid(logits: Tensor, same: list[list[bool]]) -> float:
    """Algorithm 1 of arXiv 2303.15343 as loops: -log sigmoid(z * logit), summed over pairs, over B."""
    b = len(logits)
    total = 0.0
    for i in range(b):
        for j in range(b):
            if i != j and same[i][j]:
                continue
            z = 1 if i == j else -1
            total += math.log1p(math.exp(-z * float(logits[i, j])))
    return total / b


LOSSES = pytest.mark.parametrize(("fast", "slow"), [(info_nce, slow_info_nce), (sigmoid_loss, slow_sigmoid)])


@LOSSES
@pytest.mark.parametrize("groups", [range(7), (0, 1, 0, 2, 1, 0, 3), (0,) * 7])
def test_equals_the_loops(fast, slow, groups):
    logits, same = some_logits(), duplicates(list(groups))
    assert_close(fast(logits, same), torch.tensor(slow(logits, same.tolist()), dtype=torch.float64))


@LOSSES
def test_no_duplicates_is_the_plain_loss(fast, slow):
    logits = some_logits()
    nobody = torch.zeros(7, 7, dtype=torch.bool)
    assert_close(fast(logits), torch.tensor(slow(logits, nobody.tolist()), dtype=torch.float64))
    assert_close(fast(logits, duplicates(range(7))), fast(logits), rtol=0, atol=0)
    assert_close(
        fast(logits, nobody), fast(logits), rtol=0, atol=0
    )  # the diagonal is kept, whatever the mask says of it


def test_info_nce_by_hand():
    assert_close(info_nce(torch.zeros(5, 5)), torch.tensor(math.log(5)))
    # rows: log(e + 1) - 1 and log(1 + 1); columns: log(e + 1) - 1 and log(1 + 1)
    expected = (math.log(math.e + 1) - 1 + math.log(2)) / 2
    assert_close(info_nce(torch.tensor([[1.0, 0.0], [0.0, 0.0]])), torch.tensor(expected))
    assert_close(
        info_nce(torch.zeros(4, 4), torch.ones(4, 4, dtype=torch.bool)), torch.tensor(0.0)
    )  # nothing to tell apart


def test_sigmoid_by_hand():
    assert_close(sigmoid_loss(torch.zeros(3, 3)), torch.tensor(3 * math.log(2)))  # nine pairs of log 2, over three
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    expected = sum(math.log1p(math.exp(v)) for v in (-2.0, -1.0, 0.5, -3.0)) / 2
    assert_close(sigmoid_loss(logits), torch.tensor(expected))


@LOSSES
def test_a_constant_and_the_order_of_the_batch(fast, slow):
    logits, order = some_logits(), torch.randperm(7, generator=torch.Generator().manual_seed(1))
    assert_close(fast(logits[order][:, order]), fast(logits))
    shifted = fast(logits + 3)
    if fast is info_nce:
        assert_close(shifted, fast(logits))
    else:
        assert not torch.isclose(shifted, fast(logits))


@LOSSES
def test_duplicates_get_no_gradient(fast, slow):
    logits = some_logits(4).requires_grad_()
    fast(logits, duplicates(["a", "b", "a", "c"])).backward()
    assert logits.grad is not None
    zero = logits.grad == 0
    assert zero.nonzero().tolist() == [[0, 2], [2, 0]]


@LOSSES
def test_gradient(fast, slow):
    same = duplicates([0, 1, 0, 2])
    assert torch.autograd.gradcheck(lambda z: fast(z, same), some_logits(4).requires_grad_())


@LOSSES
def test_half_precision_is_summed_in_float32(fast, slow):
    logits = some_logits().bfloat16()
    loss = fast(logits)
    assert loss.dtype == torch.float32
    nobody = torch.zeros(7, 7, dtype=torch.bool).tolist()
    assert_close(loss, torch.tensor(slow(logits.double(), nobody), dtype=torch.float32))


@LOSSES
def test_large_logits_stay_finite(fast, slow):
    logits = (1e4 * torch.eye(3)).requires_grad_()
    loss = fast(logits - 1e4)
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@LOSSES
@pytest.mark.parametrize("shape", [(3, 4), (3,), (0, 0)])
def test_only_square_logits(fast, slow, shape):
    with pytest.raises(ValueError, match="square"):
        fast(torch.zeros(shape))


@LOSSES
def test_only_a_fitting_mask(fast, slow):
    with pytest.raises(ValueError, match=r"same must be bool of shape \(3, 3\)"):
        fast(torch.zeros(3, 3), torch.eye(3))
    with pytest.raises(ValueError, match=r"same must be bool of shape \(3, 3\)"):
        fast(torch.zeros(3, 3), torch.ones(3, 1, dtype=torch.bool))


def test_duplicates():
    expected = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)
    for groups in (["a dog", "a cat", "a dog"], torch.tensor([7, -2, 7]), [7, -2, 7], [("x",), ("y",), ("x",)]):
        assert_close(duplicates(groups), expected)
    assert duplicates([]).shape == (0, 0)
    with pytest.raises(ValueError, match="one-dimensional"):
        duplicates(torch.zeros(2, 2, dtype=torch.int64))


def some_views(bias: float | None = None, groups: list[int] | None = None) -> Views:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.nn.functional.normalize(torch.randn(4, 6, generator=generator), dim=-1) for _ in range(2)]
    views = Views(
        {"image": Features(rows[0]), "text": Features(rows[1])},
        torch.tensor(9.0),
        None if bias is None else torch.tensor(bias),
    )
    if groups is not None:
        views.groups = torch.tensor(groups)
    return views


def test_objectives_scale_shift_and_skip_duplicates():
    views = some_views()
    cosines = (views["image"].pooled @ views["text"].pooled.T).double()
    nobody = torch.zeros(4, 4, dtype=torch.bool).tolist()
    assert same_caption(views) is None
    assert InfoNCE().terms(views)["info_nce"].item() == pytest.approx(slow_info_nce(9 * cosines, nobody), rel=1e-5)
    assert Sigmoid().terms(views)["sigmoid"].item() == pytest.approx(slow_sigmoid(9 * cosines - 10, nobody), rel=1e-5)
    learnt = some_views(bias=-2.0)
    assert Sigmoid().terms(learnt)["sigmoid"].item() == pytest.approx(slow_sigmoid(9 * cosines - 2, nobody), rel=1e-5)

    grouped, same = some_views(groups=[5, 6, 5, 7]), duplicates([5, 6, 5, 7]).tolist()
    assert InfoNCE().terms(grouped)["info_nce"].item() == pytest.approx(slow_info_nce(9 * cosines, same), rel=1e-5)
    assert Sigmoid().terms(grouped)["sigmoid"].item() == pytest.approx(slow_sigmoid(9 * cosines - 10, same), rel=1e-5)
    plain = InfoNCE(skip_duplicates=False).terms(grouped)["info_nce"].item()
    assert plain == pytest.approx(slow_info_nce(9 * cosines, nobody), rel=1e-5)
    plain = Sigmoid(skip_duplicates=False).terms(grouped)["sigmoid"].item()
    assert plain == pytest.approx(slow_sigmoid(9 * cosines - 10, nobody), rel=1e-5)


@pytest.mark.parametrize("objective", [InfoNCE, Sigmoid])
@pytest.mark.parametrize("skip", [True, False])
def test_objectives_are_the_same_in_tiles(objective, skip, monkeypatch):
    for views in (some_views(), some_views(bias=-2.0, groups=[5, 6, 5, 7])):
        (whole,) = objective(skip_duplicates=skip).terms(views).values()
        (tiled,) = objective(skip_duplicates=skip, tile=3).terms(views).values()
        assert_close(tiled, whole)
        monkeypatch.setattr(objectives, "TILED_ABOVE", 3)
        (large,) = objective(skip_duplicates=skip).terms(views).values()
        monkeypatch.undo()
        assert_close(large, whole)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (cast,) = objective(skip_duplicates=skip).terms(views).values()
        assert_close(cast, whole, rtol=0, atol=0)
