"""Grids, ranges and the integer layer: by hand, against torch, and bit for bit against ONNX Runtime."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn, tensor
from torch.testing import assert_close

from ecliptic.ops.quantize import (
    Grid,
    IntegerLinear,
    RunningRange,
    asymmetric,
    dequantize,
    fake_quantize,
    least_squares,
    minmax,
    percentile,
    quantize,
    symmetric,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_symmetric_grid_by_hand():
    grid = symmetric(tensor(12.7))
    assert_close(grid.scale, tensor(0.1))
    assert (grid.low, grid.high) == (-127, 127)
    codes = quantize(tensor([12.7, -12.7, 0.0, 0.26, -0.24, 99.0]), grid)
    assert codes.tolist() == [127, -127, 0, 3, -2, 127]
    assert codes.dtype == torch.int32


def test_an_asymmetric_grid_by_hand():
    grid = asymmetric(tensor(-1.0), tensor(1.55))  # 2.55 over 255 steps
    assert_close(grid.scale, tensor(0.01))
    assert grid.zero == 100
    assert (grid.low, grid.high) == (0, 255)
    assert quantize(tensor([-1.0, 0.0, 1.55, 0.026, 9.0, -9.0]), grid).tolist() == [0, 100, 255, 103, 255, 0]


@pytest.mark.parametrize(("low", "high", "zero"), [(2.0, 5.1, 0), (-5.1, -2.0, 255)])
def test_the_range_is_widened_to_hold_zero(low, high, zero):
    grid = asymmetric(tensor(low), tensor(high))
    assert_close(grid.scale, tensor(5.1 / 255))
    assert grid.zero == zero


@pytest.mark.parametrize("bits", [4, 8])
def test_what_lies_on_the_grid_stays_and_the_rest_moves_by_half_a_step_at_most(bits):
    x = 3 * normal(4000)
    for grid in (symmetric(x.abs().max(), bits), asymmetric(*minmax(x), bits=bits)):
        once = fake_quantize(x, grid)
        assert torch.equal(fake_quantize(once, grid), once)
        codes = torch.arange(grid.low, grid.high + 1)
        assert torch.equal(quantize(dequantize(codes, grid), grid), codes.int())
        assert (once - x).abs().max() <= grid.scale * (0.5 + 1e-4) + (grid.scale / 2 if grid.low == 0 else 0)
        inside = (x > dequantize(tensor(grid.low), grid)) & (x < dequantize(tensor(grid.high), grid))
        assert inside.float().mean() > 0.98
        assert ((once - x).abs()[inside] <= grid.scale * (0.5 + 1e-4)).all()
        assert torch.equal(dequantize(quantize(x, grid), grid), once)
        assert fake_quantize(torch.zeros(3), grid).tolist() == [0.0, 0.0, 0.0]


def test_the_same_as_torch():
    x = 2 * normal(5000) + 1
    grid = asymmetric(*minmax(x))
    theirs = torch.fake_quantize_per_tensor_affine(x, float(grid.scale), int(grid.zero), 0, 255)
    ours = fake_quantize(x, grid)
    apart = (ours - theirs).abs() > 1e-5  # torch multiplies by 1 / scale, which may turn the last bit of a tie
    assert apart.float().mean() < 1e-3
    weights = normal(32, 16)
    channels = symmetric(weights.abs().amax(1, keepdim=True))
    whole = torch.fake_quantize_per_channel_affine(
        weights, channels.scale.flatten(), torch.zeros(32, dtype=torch.int32), 0, -127, 127
    )
    assert_close(fake_quantize(weights, channels), whole)


def test_an_empty_range_keeps_zero():
    for grid in (symmetric(tensor(0.0)), asymmetric(tensor(0.0), tensor(0.0))):
        assert fake_quantize(torch.zeros(4), grid).tolist() == [0.0] * 4
        assert grid.scale == 1


def test_percentiles_are_numpys():
    x = normal(10_001)
    for percent in (99.0, 99.99, 100.0):
        low, high = percentile(x, percent)
        assert_close(
            [float(low), float(high)], list(np.percentile(x.numpy(), [100 - percent, percent])), rtol=1e-5, atol=1e-6
        )


def test_an_outlier_is_cut_off_by_percentile_and_by_least_squares():
    x = normal(20_000)
    x[0] = 1000.0
    assert minmax(x)[1] == 1000
    assert percentile(x, 99.99)[1] < 6
    few = x[:1000]
    shares = [k / 100 for k in range(1, 101)]
    errors = [
        float((fake_quantize(few, asymmetric(few.min() * s, few.max() * s, 4)) - few).double().square().sum())
        for s in shares
    ]
    best = shares[int(np.argmin(errors))]
    low, high = least_squares(few, bits=4)
    assert_close(high, few.max() * best)
    assert_close(low, few.min() * best)


def test_least_squares_of_weights_is_symmetric_and_no_worse_than_min_max():
    w = normal(3000) ** 3
    low, high = least_squares(w, bits=4, like=symmetric)
    assert low == -high

    def error(largest):
        return float((fake_quantize(w, symmetric(largest, 4)) - w).square().sum())

    assert error(high) < 0.8 * error(w.abs().max())


def test_the_running_range_by_hand():
    running = RunningRange()
    with pytest.raises(ValueError, match="no batch was seen"):
        running.grid()
    for batch in ([-1.0, 2.0], [-3.0, 4.0], [0.0, 0.0]):
        running.update(tensor(batch))
    # low -1, then -0.9 - 0.3 = -1.2, then -1.08; high 2, then 1.8 + 0.4 = 2.2, then 1.98
    assert_close(torch.stack(running.range), tensor([-1.08, 1.98]))
    grid = running.grid()
    assert_close(grid.scale, tensor(3.06 / 255))
    assert grid.zero == 90
    cut = RunningRange(partial(percentile, percent=99.0))
    cut.update(torch.arange(101.0))
    assert_close(torch.stack(cut.range), tensor([1.0, 99.0]))


# The integer layer


def layer(inputs=48, outputs=20, bias=True, seed=0):
    made = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        made.weight.copy_(normal(outputs, inputs, seed=seed))
        if bias:
            made.bias.copy_(normal(outputs, seed=seed + 1))
    return made


def grids(x, linear):
    return asymmetric(*minmax(x)), asymmetric(*minmax(linear(x).detach()))


def test_accumulators_are_sums_of_codes_in_python_integers():
    x, linear = normal(3, 48), layer()
    source, _ = grids(x, linear)
    ours = IntegerLinear.of(linear, source)
    codes = quantize(x, source)
    expected = [
        [
            sum((int(c) - int(source.zero)) * int(w) for c, w in zip(row, weights)) + int(b)
            for weights, b in zip(ours.weight, ours.bias)
        ]
        for row in codes
    ]
    assert ours.accumulate(codes).tolist() == expected
    assert ours.accumulate(codes).dtype == torch.int32


def test_it_computes_what_the_fake_quantised_layer_does():
    x, linear = normal(64, 48), layer()
    source, target = grids(x, linear)
    weight = fake_quantize(linear.weight.detach(), symmetric(linear.weight.detach().abs().max()))
    simulated = fake_quantize(x, source).double() @ weight.double().T + linear.bias.detach().double()
    ours = IntegerLinear.of(linear, source)
    assert_close(ours(x).double(), simulated, rtol=1e-5, atol=float(ours.step))  # the bias is in whole steps
    rounded = IntegerLinear.of(linear, source, target)(x)
    assert ((rounded - simulated).abs() <= target.scale * 0.51 + ours.step).all()
    without = layer(bias=False)
    exact = fake_quantize(x, source).double() @ weight.double().T
    assert_close(IntegerLinear.of(without, source)(x).double(), exact, rtol=1e-6, atol=1e-6)


def test_bit_for_bit_what_onnx_runtime_computes():
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    x, linear = normal(200, 48), layer(bias=False)
    source, target = grids(x, linear)
    ours = IntegerLinear.of(linear, source, target)
    grid = symmetric(linear.weight.detach().abs().max())

    def constant(name, value):
        return onnx.numpy_helper.from_array(value, name)

    names = ["a", "a_scale", "a_zero", "b", "b_scale", "b_zero", "y_scale", "y_zero"]
    graph = helper.make_graph(
        [helper.make_node("QLinearMatMul", names, ["y"])],
        "one",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, [200, 48])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [200, 20])],
        [
            constant("a_scale", np.float32(source.scale)),
            constant("a_zero", np.uint8(source.zero)),
            constant("b", ours.weight.numpy().T.copy()),
            constant("b_scale", np.float32(grid.scale)),
            constant("b_zero", np.int8(0)),
            constant("y_scale", np.float32(target.scale)),
            constant("y_zero", np.uint8(target.zero)),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    codes = quantize(x, source)
    (theirs,) = session.run(None, {"a": codes.numpy().astype(np.uint8)})
    assert np.array_equal(theirs, ours.requantize(ours.accumulate(codes)).numpy())


def test_one_scale_for_each_output_channel():
    x, linear = normal(30, 48), layer()
    with torch.no_grad():
        linear.weight[0] *= 100
    source, _ = grids(x, linear)
    weight = linear.weight.detach()
    channels = symmetric(weight.abs().amax(1, keepdim=True))
    ours = IntegerLinear(quantize(weight, channels), channels, linear.bias, source)
    whole = IntegerLinear.of(linear, source)
    truth = linear(fake_quantize(x, source)).detach()
    assert (ours(x) - truth)[:, 1:].abs().mean() < 0.1 * (whole(x) - truth)[:, 1:].abs().mean()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: symmetric(tensor(1.0), 1), "bits=1"),
        (lambda: asymmetric(tensor(float("nan")), tensor(1.0)), "NaN or infinity"),
        (lambda: percentile(normal(5), 40), "percent=40"),
        (lambda: RunningRange(momentum=1.0), "momentum=1.0"),
        (
            lambda: IntegerLinear.of(layer(), Grid(tensor(1.0), tensor(0.0), 0, 255)).requantize(tensor([1])),
            "output grid",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_sums_that_could_overflow_are_refused():
    wide = torch.full((1, 70_000), 127, dtype=torch.int32)
    grid = Grid(tensor(1.0), tensor(0.0), 0, 255)
    with pytest.raises(OverflowError, match="leave int32"):
        IntegerLinear(wide, symmetric(tensor(127.0)), None, grid)
    big = layer(4, 1)
    with torch.no_grad():
        big.bias.fill_(1e9)
    with pytest.raises(OverflowError, match="its bias too large"):
        IntegerLinear.of(big, asymmetric(tensor(0.0), tensor(1.0)))
