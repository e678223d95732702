"""Softmax in two sweeps instead of three: exponentials as pairs that cannot overflow. arXiv 2001.04438.

exp(x) = m * 2^n, with m in [sqrt(1/2), sqrt(2)] and n a whole number held as a float, so that no maximum has to be known before
adding up. Pairs of one sum can be computed in any blocks and merged. On a CPU, float32 goes through a compiled kernel (AVX-512,
AVX2 with FMA, or plain C++, chosen when it is loaded), which reads 2 and writes 1 value per element where others move 4 or 5;
where it was not built, and for other types and devices, the same pairs are computed by torch, as exactly but no faster.

Conventions: -inf counts for nothing, and a row (or mask) that leaves nothing gives zeros, where `torch.softmax` gives NaN.
float16 and bfloat16 are computed in float32. All functions can be differentiated; `three_pass_recompute` and
`three_pass_reload` are what the two sweeps are measured against.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOG2E, LN2 = 1 / math.log(2), math.log(2)
# exp on [-ln 2 / 2, ln 2 / 2] for float32, from c5 to c0: the coefficients of the paper's implementation.
POLYNOMIAL = tuple(
    float.fromhex(c)
    for c in ("0x1.0F9F9Cp-7", "0x1.573A1Ap-5", "0x1.555A80p-3", "0x1.FFFDC6p-2", "0x1.FFFFF6p-1", "0x1p0")
)
LIMIT = 8e6  # times log2(e) it stays below 2^24, up to which a float32 holds every whole number
ALGORITHMS = ("two_pass", "recompute", "reload")
BACKENDS = {"plain": 1, "avx2": 2, "avx512": 4}
VERSION = 1  # of the compiled functions


class Pair(NamedTuple):
    """m * 2^n, elementwise; n whole or -inf. (0, -inf) is zero."""

    m: Tensor
    n: Tensor


def ext_exp(x: Tensor) -> Pair:
    """exp(x) as a pair of x's shape, in float32 or float64: section 4, algorithm 4. -inf gives zero, NaN and +inf NaN."""
    x = _wide(x)
    whole = (x.double() * LOG2E).round()  # in float64, because torch promises no FMA
    n, t = whole.to(x.dtype), (x.double() - whole * LN2).to(x.dtype)
    if x.dtype == torch.float64:
        m = t.exp()
    else:
        m = torch.full_like(t, POLYNOMIAL[0])
        for c in POLYNOMIAL[1:]:
            m = m * t + c
    nothing = x == -torch.inf
    return Pair(m.masked_fill(nothing, 0.0).masked_fill(x == torch.inf, torch.nan), n.masked_fill(nothing, -torch.inf))


def ext_add(a: Pair, b: Pair) -> Pair:
    """The sum of two pairs: exact but for one rounding of m, since powers of two only move the exponent."""
    n = torch.maximum(a.n, b.n)
    return Pair(a.m * _power(a.n - n) + b.m * _power(b.n - n), n)


def ext_sum(pair: Pair, dim: int = -1) -> Pair:
    """The sum along a dimension, which goes."""
    n = pair.n.amax(dim, keepdim=True)
    return Pair((pair.m * _power(pair.n - n)).sum(dim), n.squeeze(dim))


def two_pass_softmax(x: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """exp(x) / sum of exp(x) along `dim`, in [0, 1], of x's shape and type. mask: bool, broadcast to x, true where x counts."""
    return _softmax(x, dim, mask, "two_pass")


def three_pass_recompute(x: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """The same, by maximum, sum, quotient; each exponential is computed twice: 3 reads and 1 write per element."""
    return _softmax(x, dim, mask, "recompute")


def three_pass_reload(x: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """The same, by maximum, sum, quotient; exponentials are stored and read back: 3 reads and 2 writes per element."""
    return _softmax(x, dim, mask, "reload")


def two_pass_logsumexp(x: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """log of the sum of exp(x) along `dim`, which goes: n ln 2 + log m, from one sweep. -inf where nothing counts."""
    rows = _rows(x, dim, mask)
    found: Tensor = _LogSumExp.apply(rows)
    return found.to(x.dtype)


class SoftmaxAccumulator:
    """Softmax over columns that arrive in blocks, as attention over blocks of keys needs it: the two sweeps, taken apart.

    `update` takes in scores (..., k) and, if given, values (..., k, d). `log_sum_exp` and `average` (the softmax-weighted mean of
    all values so far, (..., d)) may be asked at any time; `probabilities` turns a block of scores into its share of the whole.
    Blocks may come in any order and be of any size.
    """

    def __init__(self) -> None:
        self.total: Pair | None = None
        self._weighted: Tensor | None = None  # sum of exp(score) * value, (..., d), as m of a pair with the total's n

    def update(self, scores: Tensor, values: Tensor | None = None) -> SoftmaxAccumulator:
        if self.total is not None and (values is None) != (self._weighted is None):
            raise ValueError("either all blocks come with values or none does")
        terms = ext_exp(scores)
        part = ext_sum(terms)
        before = (
            Pair(torch.zeros_like(part.m), torch.full_like(part.n, -torch.inf)) if self.total is None else self.total
        )
        self.total = ext_add(before, part)
        if values is not None:
            weights = terms.m * _power(terms.n - self.total.n[..., None])
            fresh = (weights[..., None, :] @ values.to(weights.dtype))[..., 0, :]
            if self._weighted is not None:
                fresh = fresh + self._weighted * _power(before.n - self.total.n)[..., None]
            self._weighted = fresh
        return self

    def log_sum_exp(self) -> Tensor:
        total = self._whole()
        return torch.where(total.m > 0, total.n * LN2 + total.m.log(), total.m.log())

    def average(self) -> Tensor:
        """Zeros where nothing counted."""
        total = self._whole()
        if self._weighted is None:
            raise ValueError("no block came with values")
        return torch.where(total.m[..., None] > 0, self._weighted / total.m[..., None].clamp(min=0.5), 0.0)

    def probabilities(self, scores: Tensor) -> Tensor:
        """(..., k) scores of any block -> their probabilities in the whole."""
        return _quotient(ext_exp(scores), self._whole()).to(scores.dtype)

    def _whole(self) -> Pair:
        if self.total is None:
            raise ValueError("no block has been taken in yet: call update() first")
        return self.total


# -- the kernel ----------------------------------------------------------------------------------------------------------------


def backends() -> tuple[str, ...]:
    """Instruction sets of the compiled kernel that this processor has, the best last; empty where it was not built."""
    kernel = _kernel()
    found = 0 if kernel is None else kernel.ecliptic_softmax_backends()
    return tuple(name for name, bit in BACKENDS.items() if found & bit)


def native_softmax(
    x: Tensor,
    algorithm: str = "two_pass",
    *,
    out: Tensor | None = None,
    backend: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """The compiled kernel itself on (rows, columns) float32 on the CPU, for benchmarks: no gradient. None means the best, and
    torch's own number of threads. Raises RuntimeError where the kernel was not built."""
    kernel = _kernel()
    if kernel is None:
        raise RuntimeError("the compiled softmax is not there: install the package with a C++ compiler at hand")
    if x.ndim != 2 or x.dtype != torch.float32 or x.device.type != "cpu" or (x.numel() and x.stride(1) != 1):
        raise ValueError(
            f"x must be float32 (rows, columns) on the CPU, columns side by side, not {x.dtype} {tuple(x.shape)}"
        )
    y = torch.empty(x.shape, dtype=torch.float32) if out is None else out
    if y.shape != x.shape or y.dtype != torch.float32 or not y.is_contiguous():
        raise ValueError("out must be contiguous float32 of x's shape")
    if y.data_ptr() == x.data_ptr() and x.numel():
        raise ValueError("out must not be x itself")
    bit = 0 if backend is None else BACKENDS[backend]
    if backend is not None and backend not in backends():
        raise ValueError(f"this processor has no {backend}; it has {', '.join(backends())}")
    rows, columns = x.shape
    if rows and columns:
        kernel.ecliptic_softmax(
            x.data_ptr(), y.data_ptr(), rows, columns, x.stride(0),
            ALGORITHMS.index(algorithm), threads or torch.get_num_threads(), bit,
        )  # fmt: skip
    return y


@cache
def _kernel() -> Any:
    folder = Path(__file__).parent / "native"
    file = next((path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_softmax{suffix}").exists()), None)
    if file is None:
        return None
    try:
        kernel = ctypes.CDLL(str(file))
        version = kernel.ecliptic_softmax_version()
    except (OSError, AttributeError) as error:
        warnings.warn(
            f"{file} cannot be used ({error}); softmax runs in torch. Install the package again", stacklevel=2
        )
        return None
    if version != VERSION:
        warnings.warn(f"{file} is of another version; softmax runs in torch. Install the package again", stacklevel=2)
        return None
    pointer, long, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    kernel.ecliptic_softmax.argtypes = [pointer, pointer, long, long, long, small, small, small]
    kernel.ecliptic_softmax.restype = None
    kernel.ecliptic_exp_sum.argtypes = [pointer, pointer, pointer, pointer, long, long, long, small, small]
    kernel.ecliptic_exp_sum.restype = None
    return kernel


# -- parts ---------------------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, not {x.dtype}")
    return x if x.dtype == torch.float64 else x.float()


def _power(d: Tensor) -> Tensor:
    """2^d for whole d <= 0; what the type cannot hold as a normal number is 0. NaN (-inf less -inf) is 1: the m there is 0."""
    least = -1022 if d.dtype == torch.float64 else -126
    return torch.where(d >= least, torch.exp2(d.clamp(min=least)), 0.0).masked_fill(d.isnan(), 1.0)


def _quotient(terms: Pair, total: Pair) -> Tensor:
    inverse = torch.where(total.m == 0, 0.0, 1 / total.m)
    return terms.m * inverse[..., None] * _power(terms.n - total.n[..., None])


def _rows(x: Tensor, dim: int, mask: Tensor | None) -> Tensor:
    """x in at least float32, what does not count at -inf, `dim` last."""
    x = _wide(x)
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, true where x counts, not {mask.dtype}")
        x = x.masked_fill(~mask, -torch.inf)
    return x.movedim(dim, -1)


def _softmax(x: Tensor, dim: int, mask: Tensor | None, algorithm: str) -> Tensor:
    y: Tensor = _Softmax.apply(_rows(x, dim, mask), algorithm)
    return y.movedim(-1, dim).to(x.dtype)


def _usable(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0 and _kernel() is not None


def _forward(x: Tensor, algorithm: str) -> Tensor:
    if _usable(x):
        flat = x.reshape(-1, x.shape[-1])
        if flat.stride(1) != 1 or flat.shape[1] == 1:
            flat = flat.contiguous()
        return native_softmax(flat, algorithm).view(x.shape)
    if not x.numel():
        return torch.empty_like(x)
    most = x.amax(-1, keepdim=True)
    if algorithm == "two_pass":
        terms = ext_exp(x)
        pairs = _quotient(terms, ext_sum(terms))
        if x.dtype == torch.float64 or not bool(((most > LIMIT) | ((most < 1000 - LIMIT) & (most > -torch.inf))).any()):
            return pairs
        beyond = (most > LIMIT) | (most < 1000 - LIMIT)
        return torch.where(beyond, _shifted(x, most), pairs)
    return _shifted(x, most)


def _shifted(x: Tensor, most: Tensor) -> Tensor:
    """Softmax with the maximum taken off first."""
    terms = (x - most).exp().masked_fill((most == -torch.inf) & (x == most), 0.0)
    total = terms.sum(-1, keepdim=True)
    return torch.where(total == 0, 0.0, terms / total)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, algorithm: str) -> Tensor:
        y = _forward(x.detach(), algorithm)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return y * (grad - (grad * y).sum(-1, keepdim=True)), None


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        found = _log_sum_exp(x.detach())
        ctx.save_for_backward(x, found)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, found = ctx.saved_tensors
        return grad[..., None] * _shifted(x, found[..., None])


def _log_sum_exp(x: Tensor) -> Tensor:
    if not x.numel():
        return torch.full(x.shape[:-1], -torch.inf, dtype=x.dtype, device=x.device)
    if _usable(x):
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        m, n = torch.empty(2, len(flat))
        within = torch.empty(len(flat), dtype=torch.uint8)
        _kernel().ecliptic_exp_sum(
            flat.data_ptr(), m.data_ptr(), n.data_ptr(), within.data_ptr(), len(flat), flat.shape[1], flat.shape[1],
            torch.get_num_threads(), 0,
        )  # fmt: skip
        found = (n.double() * LN2 + m.double().log()).float()
        beyond = within == 0
        if bool(beyond.any()):
            found[beyond] = torch.logsumexp(flat[beyond], -1)
        return found.view(x.shape[:-1])
    most = x.amax(-1)
    total = ext_sum(ext_exp(x))
    pairs = (total.n.double() * LN2 + total.m.double().log()).to(x.dtype)
    plain = torch.logsumexp(x, -1)
    return torch.where((most.abs() < LIMIT - 1000) | (x.dtype == torch.float64) & most.isfinite(), pairs, plain)
