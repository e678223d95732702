"""Softmax in two sweeps: against sums in extended precision, in every compiled form there is, and in torch's."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from ecliptic.ops import softmax as module
from ecliptic.ops.softmax import (
    ALGORITHMS,
    LIMIT,
    Pair,
    SoftmaxAccumulator,
    backends,
    ext_add,
    ext_exp,
    ext_sum,
    native_softmax,
    three_pass_recompute,
    three_pass_reload,
    two_pass_logsumexp,
    two_pass_softmax,
)

FORMS = {"two_pass": two_pass_softmax, "recompute": three_pass_recompute, "reload": three_pass_reload}
RANGES = [(-1000.0, 1000.0), (90.0, 100.0), (-1e5, 1e5), (-5.0, 5.0)]
INF, NAN = math.inf, math.nan


@pytest.fixture(params=["kernel", "torch"])
def either(request, monkeypatch):
    """With the compiled kernel, and without."""
    if request.param == "torch":
        monkeypatch.setattr(module, "_kernel", lambda: None)
    elif not backends():
        pytest.skip("the kernel was not built here")
    return request.param


def drawn(low, high, *shape, seed=0):
    return low + (high - low) * torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def exact(x):
    """Softmax of the last dimension, a sum over Python loops of 80-bit floats."""
    rows = x.numpy().astype(np.longdouble).reshape(-1, x.shape[-1])
    out = np.zeros(rows.shape)
    for r, row in enumerate(rows):
        top = max(row)
        terms = [np.exp(value - top) for value in row]
        total = np.longdouble(0)
        for term in terms:
            total += term
        out[r] = [float(term / total) for term in terms]
    return torch.from_numpy(out.reshape(x.shape))


def error(y, expected):
    """Largest relative error where the truth is above 1e-30."""
    kept = expected > 1e-30
    return ((y.double() - expected).abs()[kept] / expected[kept]).max().item()


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_close_to_the_truth_in_every_range(either, low, high):
    x = drawn(low, high, 2, 1500)
    truth = exact(x)
    for form in FORMS.values():
        y = form(x)
        assert error(y, truth) < 1e-6
        assert_close(y.sum(-1), torch.ones(2), rtol=2e-6, atol=0)


@pytest.mark.skipif(not backends(), reason="the kernel was not built here")
@pytest.mark.parametrize("n", [1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 127, 129, 1000])
def test_every_instruction_set_on_every_remainder(n):
    x = drawn(-30, 60, 3, n, seed=n)
    truth = exact(x)
    assert backends()[0] == "plain"
    for backend in backends():
        for algorithm in ALGORITHMS:
            # Three passes take the maximum off first, and that difference is rounded: to 4e-6 where it is near 90.
            limit = 1e-6 if algorithm == "two_pass" else 5e-6
            assert error(native_softmax(x, algorithm, backend=backend), truth) < limit, (backend, algorithm)


@pytest.mark.skipif(not backends(), reason="the kernel was not built here")
def test_outputs_too_large_for_a_cache_are_written_past_it():
    x = drawn(-20, 20, 1, (8 << 20) + 37)
    for algorithm in ALGORITHMS:
        out = torch.full((x.shape[1] + 5,), 7.0)[1:-4].view(1, -1)  # not aligned to what a vector store wants
        native_softmax(x, algorithm, out=out, threads=2)
        assert_close(out.double(), torch.softmax(x.double(), -1), rtol=5e-6, atol=1e-37)


@pytest.mark.skipif(not backends(), reason="the kernel was not built here")
def test_threads_share_rows_or_a_row():
    for shape in ((1, 300_000), (3, 100_000), (4000, 50)):
        x = drawn(-50, 50, *shape)
        one = native_softmax(x, threads=1)
        for threads in (2, 3, 5):
            assert_close(native_softmax(x, threads=threads), one, rtol=1e-6, atol=1e-37)


def test_pairs_hold_the_exponential():
    x = torch.cat([drawn(-20, 20, 4000), drawn(-1e5, 1e5, 4000), tensor([0.0])])
    m, n = ext_exp(x)
    assert m.min() > 0.7071
    assert m.max() < 1.4143
    assert torch.equal(n, n.round())
    for value, a, b in zip(x[:4000:40].tolist(), m[:4000:40].tolist(), n[:4000:40].tolist()):
        assert abs(a * 2**b / math.exp(value) - 1) < 3e-7
    m, n = ext_exp(x.double())
    assert_close(m.log() + n * math.log(2), x.double(), rtol=1e-14, atol=1e-14)


def test_sums_of_pairs():
    a, b = Pair(tensor(1.0), tensor(3.0)), Pair(tensor(1.25), tensor(-2.0))
    assert_close(ext_add(a, b).m * 2 ** ext_add(a, b).n, tensor(8.0 + 1.25 / 4))
    zero = Pair(tensor(0.0), tensor(-INF))
    assert ext_add(a, zero) == a
    assert ext_add(zero, zero) == zero
    far = ext_add(Pair(tensor(1.0), tensor(1e6)), Pair(tensor(1.0), tensor(-1e6)))
    assert far == Pair(tensor(1.0), tensor(1e6))
    x = drawn(-300, 300, 4, 600)
    whole, halves = ext_sum(ext_exp(x)), [ext_sum(ext_exp(part)) for part in x.split(250, -1)]
    merged = ext_add(ext_add(halves[0], halves[1]), halves[2])
    assert torch.equal(merged.n, whole.n)
    assert_close(merged.m, whole.m, rtol=5e-7, atol=0)


def test_by_hand(either):
    for form in FORMS.values():
        assert form(tensor([0.0, -500.0, -1000.0])).tolist() == [1, 0, 0]
        assert_close(form(torch.full((7,), 100.0)), torch.full((7,), 1 / 7), rtol=1e-6, atol=0)  # exp(100) overflows
        assert form(tensor([-INF, 3.0, -INF])).tolist() == [0, 1, 0]
        assert form(tensor([-INF, -INF])).tolist() == [0, 0]
        assert form(tensor([1e9, 1e9 - 512, 0.0])).tolist() == [1, 0, 0]  # beyond what pairs can hold
        assert form(tensor([-1e9, -1e9 - 512])).tolist() == [1, 0]
        assert form(tensor([LIMIT * 1.5, 0.0, LIMIT * 1.5])).tolist() == [0.5, 0, 0.5]
        assert form(tensor([1.0, NAN, 0.0])).isnan().all()
        assert form(tensor([-INF, NAN])).isnan().all()
        assert form(tensor([INF, 1.0] + [0.0] * 40)).isnan().all()


def test_nothing_becomes_nan_from_one_end_of_the_range_to_the_other(either):
    for scale in (1e-3, 1, 1e2, 1e3, 1e5):
        x = scale * drawn(-1, 1, 6, 333)
        for form in FORMS.values():
            assert form(x).isfinite().all()
        assert two_pass_logsumexp(x).isfinite().all()


def test_a_constant_changes_nothing(either):
    x = drawn(-8, 8, 5, 200)
    for shift in (-100.0, 37.5, 100.0):
        assert_close(two_pass_softmax(x + shift), two_pass_softmax(x), rtol=2e-5, atol=0)


def test_masks(either):
    x, mask = drawn(-9, 9, 2, 3, 40), drawn(0, 1, 2, 1, 40) > 0.5
    mask[1] = False
    y = two_pass_softmax(x, mask=mask)
    kept = mask.expand_as(x)[0, 0]
    assert_close(y[0][:, kept], torch.softmax(x[0][:, kept], -1))
    assert not y[0][:, ~kept].any()
    assert not y[1].any()  # nothing counts: zeros, not NaN
    assert two_pass_logsumexp(x, mask=mask)[1].tolist() == [-INF] * 3
    x.requires_grad_()
    (two_pass_softmax(x, mask=mask).square().sum() + two_pass_logsumexp(x, mask=mask)[0].sum()).backward()
    assert x.grad.isfinite().all()
    assert not x.grad[1].any()


def test_any_dimension_and_layout(either):
    x = drawn(-9, 9, 3, 4, 5)
    for dim in (0, 1, 2, -1, -2):
        assert_close(two_pass_softmax(x, dim), torch.softmax(x, dim))
        assert_close(two_pass_logsumexp(x, dim), torch.logsumexp(x, dim))
    assert_close(two_pass_softmax(x.transpose(0, 2)), torch.softmax(x.transpose(0, 2), -1))
    assert_close(two_pass_softmax(x[..., ::2]), torch.softmax(x[..., ::2], -1))
    assert_close(two_pass_softmax(x[:, :, 1:2]), torch.ones(3, 4, 1))
    for empty in (torch.zeros(0, 5), torch.zeros(5, 0)):
        assert two_pass_softmax(empty).shape == empty.shape
        assert two_pass_logsumexp(empty).shape == empty.shape[:-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype):
    x = drawn(-9, 9, 4, 50).to(dtype)
    y = two_pass_softmax(x)
    assert y.dtype == dtype
    close = {"rtol": 1e-12, "atol": 0} if dtype == torch.float64 else {}
    assert_close(y, torch.softmax(x.double(), -1).to(dtype), **close)
    assert two_pass_logsumexp(x).dtype == dtype


def test_logsumexp(either):
    for x in (drawn(-5, 5, 3, 700), drawn(-1e5, 1e5, 3, 700), torch.full((1, 9), 5e4), 1e8 * drawn(-1, 1, 2, 30)):
        assert_close(two_pass_logsumexp(x), torch.logsumexp(x.double(), -1).float(), rtol=1e-6, atol=1e-6)


def test_gradients():
    x = drawn(-3, 3, 3, 6).double().requires_grad_()
    for form in (*FORMS.values(), two_pass_logsumexp):
        assert torch.autograd.gradcheck(form, (x,))
        assert torch.autograd.gradgradcheck(form, (x,))
    mask = drawn(0, 1, 3, 6) > 0.3
    assert torch.autograd.gradcheck(lambda x: two_pass_softmax(x, 0, mask), (x,))


def test_gradients_of_the_kernel_are_those_of_torch(either):
    x, weight = drawn(-9, 9, 20, 300).requires_grad_(), drawn(-1, 1, 20, 300, seed=1)
    for ours, theirs in ((two_pass_softmax, torch.softmax), (two_pass_logsumexp, torch.logsumexp)):
        found = (ours(x, -1) * (weight if ours is two_pass_softmax else weight[:, 0])).sum()
        expected = (theirs(x, -1) * (weight if ours is two_pass_softmax else weight[:, 0])).sum()
        (a,), (b,) = torch.autograd.grad(found, x), torch.autograd.grad(expected, x)
        assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sizes", [(100,), (1, 99), (30, 50, 20), (1,) * 100])
def test_blocks_of_keys_give_what_all_at_once_give(sizes):
    scores, values = drawn(-400, 400, 2, 5, 100), drawn(-1, 1, 2, 5, 100, 8, seed=1)
    whole = torch.softmax(scores.double(), -1)
    blocks = SoftmaxAccumulator()
    for part, value in zip(scores.split(sizes, -1), values.split(sizes, -2)):
        blocks.update(part, value)
    assert_close(blocks.average().double(), (whole[..., None] * values.double()).sum(-2), rtol=1e-5, atol=1e-6)
    assert_close(blocks.log_sum_exp().double(), torch.logsumexp(scores.double(), -1), rtol=1e-6, atol=0)
    shares = torch.cat([blocks.probabilities(part) for part in scores.split(sizes, -1)], -1)
    assert error(shares, whole) < 1e-6


def test_blocks_in_which_nothing_counts():
    blocks = SoftmaxAccumulator().update(torch.full((2, 3), -INF), torch.ones(2, 3, 4))
    assert blocks.average().tolist() == [[0] * 4] * 2
    assert blocks.log_sum_exp().tolist() == [-INF] * 2
    blocks.update(torch.zeros(2, 2), torch.ones(2, 2, 4))
    assert blocks.average().tolist() == [[1] * 4] * 2
    assert blocks.probabilities(torch.zeros(2, 1)).tolist() == [[0.5]] * 2


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="floating point"):
        two_pass_softmax(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="mask must be bool"):
        two_pass_softmax(torch.zeros(3), mask=torch.zeros(3))
    with pytest.raises(ValueError, match="call update"):
        SoftmaxAccumulator().log_sum_exp()
    with pytest.raises(ValueError, match="no block came with values"):
        SoftmaxAccumulator().update(torch.zeros(2)).average()
    with pytest.raises(ValueError, match="either all blocks come with values"):
        SoftmaxAccumulator().update(torch.zeros(2)).update(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="at least one dimension"):
        two_pass_softmax(tensor(1.0))


@pytest.mark.skipif(not backends(), reason="the kernel was not built here")
def test_what_the_kernel_cannot_take_is_refused():
    x = torch.zeros(2, 3)
    for bad, message in ((x[0], "columns"), (x.double(), "float32"), (x.T, "columns side by side")):
        with pytest.raises(ValueError, match=message):
            native_softmax(bad)
    with pytest.raises(ValueError, match="not be x itself"):
        native_softmax(x, out=x)
    with pytest.raises(ValueError, match="contiguous float32 of x's shape"):
        native_softmax(x, out=torch.zeros(3, 3))
    with pytest.raises(KeyError):
        native_softmax(x, backend="sse9")


def test_a_library_of_another_version_is_not_used(monkeypatch):
    code = (
        "import warnings; warnings.simplefilter('error'); import ecliptic.ops.softmax as s; s.VERSION = 0\n"
        "try: s.backends()\nexcept UserWarning as w: print(w)\nelse: print('none')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "another version" in done.stdout if backends() else done.stdout.strip() == "none"
