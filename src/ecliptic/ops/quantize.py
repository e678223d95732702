"""Uniform quantisation, simulated: grids, the ranges they cover, and a linear layer in integers. arXiv 2306.12929, section 5.

Real numbers are held as codes, whole numbers of a few bits: x = scale * (code - zero). Weights take a symmetric grid (zero is 0),
activations an asymmetric one of unsigned codes. `fake_quantize` rounds to the grid and stays in floats, which is what a model
simulated in 8 bits computes; `IntegerLinear` adds up the codes themselves, bit for bit as an integer kernel does.

Rounding is half to even, as in ONNX and torch. 0.0 always has a code of its own and comes back as exactly 0.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

Range = tuple[Tensor, Tensor]
"""(lowest, highest) value that a grid should cover, scalars."""


class Grid(NamedTuple):
    """scale > 0 and zero (whole, in [low, high]): of one element for a whole tensor, or of a shape that broadcasts with it."""

    scale: Tensor
    zero: Tensor
    low: int
    high: int


def symmetric(largest: Tensor, bits: int = 8) -> Grid:
    """The grid of weights: codes in [-127, 127] for 8 bits, scale = largest / 127, zero = 0.

    largest: max |w|, one for all, or one for each output channel ((out, 1) for a linear layer). 0 gives scale 1.
    """
    high = 2 ** (_bits(bits) - 1) - 1
    scale = _positive(_finite(largest) / high)
    return Grid(scale, torch.zeros_like(scale), -high, high)


def asymmetric(low: Tensor, high: Tensor, bits: int = 8) -> Grid:
    """The grid of activations: codes in [0, 255] for 8 bits, scale = (high - low) / 255, zero = round(-low / scale).

    The range is widened to hold 0. An empty one (low = high = 0) gives scale 1.
    """
    top = 2 ** _bits(bits) - 1
    low, high = _finite(low).clamp(max=0.0), _finite(high).clamp(min=0.0)
    scale = _positive((high - low) / top)
    return Grid(scale, (-low / scale).round().clamp(0, top), 0, top)


def quantize(x: Tensor, grid: Grid) -> Tensor:
    """Values -> codes, int32, of x's shape; what lies outside the grid goes to its end."""
    return (torch.round(x / grid.scale) + grid.zero).clamp(grid.low, grid.high).to(torch.int32)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """Codes -> values, in the type of the grid's scale."""
    return (codes - grid.zero) * grid.scale


def fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """Values rounded to the grid: off by at most scale / 2 inside its range. Has no useful gradient."""
    codes = (torch.round(x / grid.scale) + grid.zero).clamp(grid.low, grid.high)
    return (codes - grid.zero) * grid.scale


# Ranges


def minmax(x: Tensor) -> Range:
    """Lowest and highest value."""
    low, high = torch.aminmax(x.detach())
    return low, high


def percentile(x: Tensor, percent: float = 99.999) -> Range:
    """The (100 - percent)th and the percent-th percentile, interpolated linearly; outliers beyond are cut off."""
    if not 50 < percent <= 100:
        raise ValueError(f"percent={percent}: must be above 50 and at most 100, such as 99.99 or 99.999")
    values = x.detach().flatten().sort().values  # torch.quantile takes no more than 16 million values

    def at(share: float) -> Tensor:
        place = share * (len(values) - 1)
        below = int(place)
        above = min(below + 1, len(values) - 1)
        return torch.lerp(values[below], values[above], place - below)

    return at(1 - percent / 100), at(percent / 100)


def least_squares(x: Tensor, bits: int = 8, candidates: int = 100, like: Callable[..., Grid] = asymmetric) -> Range:
    """The range with the least squared error of rounding, of `candidates` equal steps from nothing to min and max.

    like: `asymmetric`, or `symmetric` for a range (-m, m) of weights. Ours: both ends shrink in proportion.
    """
    x = x.detach()
    low, high = minmax(x)
    if like is symmetric:
        high = torch.maximum(-low, high)
        low = -high

    def error(share: float) -> float:
        ends = (high * share,) if like is symmetric else (low * share, high * share)
        return float((fake_quantize(x, like(*ends, bits=bits)) - x).square().sum(dtype=torch.float64))

    best = min((k / candidates for k in range(candidates, 0, -1)), key=error)
    return low * best, high * best


class RunningRange:
    """The range of an activation over calibration batches: r <- 0.9 r + 0.1 r_batch, the first batch initialises.

    estimate: what one batch says, `minmax` or another of the above (`functools.partial` for its settings).
    """

    def __init__(self, estimate: Callable[[Tensor], Range] = minmax, momentum: float = 0.9):
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}: must be at least 0 and below 1")
        self.estimate, self.momentum = estimate, momentum
        self.range: Range | None = None

    def update(self, x: Tensor) -> None:
        found = self.estimate(x)
        if self.range is not None:
            keep = self.momentum
            found = tuple(keep * old + (1 - keep) * new for old, new in zip(self.range, found))  # type: ignore[assignment]
        self.range = found

    def grid(self, bits: int = 8) -> Grid:
        if self.range is None:
            raise ValueError("no batch was seen, so there is no range: call update first")
        return asymmetric(*self.range, bits=bits)


# A linear layer in integers


class IntegerLinear(nn.Module):
    """A linear layer whose products and sums are those of integers: codes in, int32 accumulators, codes or floats out.

    y = s_x s_w (sum_k (x_k - z_x) w_k + b), with b the bias in whole steps of s_x s_w. Every sum is exact, so the result does not
    depend on the order of summation. With an output grid the accumulators are brought to it by one float32 factor
    s_x s_w / s_y, rounded half to even, as ONNX Runtime's QLinearMatMul does.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self, weight: Tensor, weight_grid: Grid, bias: Tensor | None, source: Grid, target: Grid | None = None
    ):
        """weight (out, in) codes on a symmetric grid; bias (out,) floats. source, target: grids of x and y.

        OverflowError if the accumulators could leave int32.
        """
        super().__init__()
        self.source, self.target = source, target
        self.step = (source.scale * weight_grid.scale.flatten()).float()  # of the accumulators, () or (out,)
        codes = torch.zeros(len(weight)) if bias is None else torch.round(bias.detach() / self.step)
        span = max(float((source.zero - source.low).max()), float((source.high - source.zero).max()))
        reach = float((weight.abs().sum(-1) * span + codes.abs()).max())
        if reach > 2**31 - 1:
            raise OverflowError(f"sums of up to {reach:.3g} leave int32: the layer is too wide, or its bias too large")
        self.register_buffer("weight", weight.to(torch.int8))
        self.register_buffer("bias", codes.to(torch.int32))

    @classmethod
    def of(cls, layer: nn.Linear, source: Grid, target: Grid | None = None, bits: int = 8) -> IntegerLinear:
        """A float layer's weights rounded to one symmetric min-max grid."""
        grid = symmetric(layer.weight.detach().abs().max(), bits)
        return cls(quantize(layer.weight.detach(), grid), grid, layer.bias, source, target)

    def accumulate(self, codes: Tensor) -> Tensor:
        """Codes (..., in) -> int32 accumulators (..., out), bias included."""
        centred = codes.double() - self.source.zero.double()
        sums = (
            centred @ self.weight.double().T
        )  # whole numbers below 2^53: exact in float64, and faster than in integers
        return sums.to(torch.int32) + self.bias

    def requantize(self, accumulators: Tensor) -> Tensor:
        """Accumulators -> codes on the output grid, int32. ValueError without one."""
        if self.target is None:
            raise ValueError("this layer gives floats: it was made without an output grid")
        factor = (self.step / self.target.scale).float()
        codes = torch.round(accumulators.float() * factor) + self.target.zero
        return codes.clamp(self.target.low, self.target.high).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        """Floats (..., in) -> floats (..., out), on the output grid if there is one."""
        sums = self.accumulate(quantize(x, self.source))
        if self.target is None:
            return sums * self.step
        return dequantize(self.requantize(sums), self.target)


def _bits(bits: int) -> int:
    if not 2 <= bits <= 16:
        raise ValueError(f"bits={bits}: must be from 2 to 16")
    return bits


def _finite(value: Tensor) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        raise ValueError("the range is not finite: the tensor holds NaN or infinity")
    return value.detach()


def _positive(scale: Tensor) -> Tensor:
    """1 where there is no range, and never so small that dividing by it overflows."""
    return torch.where(scale > 0, scale.clamp_min(torch.finfo(scale.dtype).tiny), torch.ones_like(scale))
