"""The tiled losses against the plain ones, which tests/ops/test_contrastive.py holds to loops written from the papers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from ecliptic.ops.contrastive import duplicates, info_nce, sigmoid_loss
from ecliptic.ops.tiled_contrastive import TILE, Block, LogSumExp, tiled_info_nce, tiled_sigmoid_loss

NAMES = ("image", "text", "scale", "bias")


def inputs(b: int, d: int = 6, dtype: torch.dtype = torch.float64, scale: float = 7.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(b)
    image = torch.randn(b, d, generator=generator, dtype=torch.float64)
    text = image + torch.randn(b, d, generator=generator, dtype=torch.float64)
    values = (normalize(image, dim=-1), normalize(text, dim=-1), torch.tensor(scale), torch.tensor(-3.0))
    return {name: value.to(dtype).requires_grad_() for name, value in zip(NAMES, values)}


def plain_info_nce(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, groups: Tensor | None) -> Tensor:
    return info_nce(scale * image @ text.T, None if groups is None else duplicates(groups))


def plain_sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, groups: Tensor | None) -> Tensor:
    return sigmoid_loss(scale * image @ text.T + bias, None if groups is None else duplicates(groups))


def our_info_nce(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, groups: Tensor | None, **more: Any
) -> Tensor:
    return tiled_info_nce(image, text, scale, groups, **more)


LOSSES = pytest.mark.parametrize(
    ("ours", "plain"), [(our_info_nce, plain_info_nce), (tiled_sigmoid_loss, plain_sigmoid)]
)


def graded(loss: Callable[..., Tensor], given: dict[str, Tensor], *arguments: Any, **more: Any) -> dict[str, Tensor]:
    """The loss, three times over, and its gradients."""
    leaves = {name: value.detach().clone().requires_grad_(value.requires_grad) for name, value in given.items()}
    value = 3 * loss(*leaves.values(), *arguments, **more)
    value.backward()
    return {"loss": value.detach()} | {name: x.grad for name, x in leaves.items() if x.grad is not None}


def agree(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(
            found[name],
            value,
            rtol=0,
            atol=atol * max(1.0, float(value.abs().max())),
            msg=lambda m, name=name: f"{name}: {m}",
        )


@LOSSES
@pytest.mark.parametrize("b", [1, 2, 7, 12])
@pytest.mark.parametrize("tile", [1, 3, 4, 12, 100, None])
@pytest.mark.parametrize("grouped", [False, True])
def test_loss_and_gradients_equal_the_plain_ones(ours, plain, b, tile, grouped):
    groups = torch.arange(b) * 5 % 4 if grouped else None
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        given = inputs(b, dtype=dtype)
        agree(graded(ours, given, groups, tile=tile), graded(plain, given, groups), atol)


@LOSSES
@pytest.mark.parametrize("scale", [0.0, 100.0])
def test_no_scale_and_the_largest(ours, plain, scale):
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        given = inputs(9, dtype=dtype, scale=scale)
        groups = torch.tensor([0, 1, 2, 0, 3, 4, 5, 5, 6])
        agree(graded(ours, given, groups, tile=4), graded(plain, given, groups), atol)


@LOSSES
def test_larger_than_a_tile_of_the_automatic_size(ours, plain):
    given = inputs(TILE + 77, d=64, dtype=torch.float32, scale=20.0)
    agree(graded(ours, given, None), graded(plain, given, None), 1e-6)


@LOSSES
@pytest.mark.parametrize("groups", [None, torch.tensor([3, 1, 3, 2, 1])])
def test_gradcheck(ours, plain, groups):
    given = tuple(inputs(5, d=3).values())
    assert torch.autograd.gradcheck(lambda *x: ours(*x, groups, tile=2), given)


@LOSSES
@pytest.mark.parametrize(
    "learns", [("image",), ("text",), ("scale",), ("bias",), ("text", "scale"), ("image", "bias"), ()]
)
def test_only_what_learns_gets_a_gradient(ours, plain, learns):
    if ours is our_info_nce and learns == ("bias",):
        pytest.skip("InfoNCE has no bias")
    given = {name: value.detach().requires_grad_(name in learns) for name, value in inputs(6).items()}
    if not learns:
        assert not ours(*given.values(), None, tile=4).requires_grad
        assert_close(ours(*given.values(), None, tile=4), plain(*given.values(), None))
        return
    agree(graded(ours, given, None, tile=4), graded(plain, given, None), 1e-12)


@LOSSES
def test_without_recording_gradients(ours, plain):
    given = inputs(6)
    with torch.no_grad():
        assert_close(ours(*given.values(), None, tile=4), plain(*given.values(), None))


@LOSSES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(ours, plain, dtype):
    half = inputs(9, dtype=dtype)
    full = {name: value.detach().float().requires_grad_() for name, value in half.items()}
    found, expected = graded(ours, half, None, tile=4), graded(plain, full, None)
    assert found["loss"].dtype == torch.float32
    assert_close(found["loss"], expected["loss"], rtol=0, atol=2e-6)
    for name in expected:
        if name != "loss":
            assert found[name].dtype == dtype
            assert_close(found[name], expected[name].to(dtype), rtol=0.01, atol=1e-3)


@LOSSES
def test_autocast_does_not_reach_it(ours, plain):
    given = inputs(9, dtype=torch.float32)
    expected = graded(ours, given, None, tile=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = graded(ours, given, None, tile=4)
    agree(found, expected, 0)


@LOSSES
def test_numbers_may_stand_for_scale_and_bias(ours, plain):
    image, text, scale, bias = inputs(5).values()
    learnt = scale.detach().reshape(1).requires_grad_()
    assert_close(ours(image, text, 7.0, -3.0, None), plain(image, text, scale, bias, None))
    ours(image, text, learnt, -3.0, None).backward()
    assert learnt.grad is not None
    assert learnt.grad.shape == (1,)


@LOSSES
def test_all_captions_equal(ours, plain):
    given, groups = inputs(5), torch.zeros(5, dtype=torch.int64)
    agree(graded(ours, given, groups, tile=2), graded(plain, given, groups), 1e-12)
    if ours is our_info_nce:
        assert float(graded(ours, given, groups, tile=2)["loss"]) == pytest.approx(0, abs=1e-12)


def test_by_hand():
    same = torch.ones(5, 1)
    assert_close(tiled_info_nce(same, same, 3.0, tile=2), torch.tensor(math.log(5)))  # all logits equal
    # nine pairs with logit 1 * 1 + -1 = 0, of log 2 each, over three
    assert_close(
        tiled_sigmoid_loss(torch.ones(3, 1), torch.ones(3, 1), 1.0, -1.0, tile=2), torch.tensor(3 * math.log(2))
    )


@LOSSES
def test_never_a_whole_matrix(ours, plain, monkeypatch):
    """No tile is larger than asked for, and each is seen as often as the docstring says."""
    tiles, groups = [], set()
    whole = Block.tiles

    def watched(self):
        groups.add(self.groups is None)
        for rows, columns, logits, diagonal in whole(self):
            tiles.append(tuple(logits.shape))
            yield rows, columns, logits, diagonal

    monkeypatch.setattr(Block, "tiles", watched)
    graded(ours, inputs(7), torch.arange(7), tile=3)
    assert groups == {True}  # no two are equal: nothing is compared
    assert max(tiles) == (3, 3)
    assert sum(a * b for a, b in tiles) == 49 * (2 if ours is our_info_nce else 1)


def test_sums_that_arrive_in_parts():
    values = 50 * torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[1, :3] = -torch.inf  # a part with nothing in it
    running = LogSumExp.empty(4, values)
    for part in (slice(0, 3), slice(3, 4), slice(4, 9)):
        running.add(slice(0, 4), values[:, part], 1)
    expected = values.logsumexp(1)
    assert_close(running.minus(torch.zeros(4, dtype=torch.float64)), expected)
    assert_close(running.softmax(slice(1, 3), values[1:3], 1), values[1:3].softmax(1))


@LOSSES
def test_what_does_not_fit(ours, plain):
    image, text, scale, bias = inputs(4).values()
    with pytest.raises(ValueError, match=r"must both be \(B, D\)"):
        ours(image, text[:3], scale, bias, None)
    with pytest.raises(ValueError, match=r"must both be \(B, D\)"):
        ours(image[:0], text[:0], scale, bias, None)
    with pytest.raises(ValueError, match=r"groups must be of shape \(4,\)"):
        ours(image, text, scale, bias, torch.zeros(3))
    with pytest.raises(ValueError, match="tile=0"):
        ours(image, text, scale, bias, None, tile=0)
    with pytest.raises(ValueError, match="scalars"):
        ours(image, text, torch.ones(2), bias, None)


@LOSSES
def test_the_second_derivative_is_refused(ours, plain):
    given = inputs(4)
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(ours(*given.values(), None), given["image"], create_graph=True)
