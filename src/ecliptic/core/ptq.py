"""Post-training quantisation, simulated, of any model of `transformers`: what 8 bits would answer. arXiv 2306.12929, section 5.

`ptq` gives a copy whose weights lie on a symmetric grid and whose activations are rounded, by one static scale for each tensor,
where an integer implementation would round them: outputs of linear, convolution and embedding layers, attention scores before the
mask, probabilities, the heads' context, residual sums, outputs of norms and of activation functions. Ranges come from a few
batches without labels. In float stay the final heads, biases, the inside of softmax and norms, whatever says
`full_precision = True` (gates), and `nn.MultiheadAttention` (SigLIP's pooling head). One copy runs in one thread at a time.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ecliptic.core.attention import attention_modules, tapped
from ecliptic.core.contracts import Tokens
from ecliptic.ops.quantize import Grid, Range, RunningRange, asymmetric, fake_quantize, minmax, symmetric

Model = TypeVar("Model", bound=nn.Module)
Run = Callable[[Any, Any], Any]

HEADS = (r"(^|\.)(lm_head|classifier|head|visual_projection|text_projection|predictions\.decoder)$",)
"""Patterns of the modules that `ptq` leaves in float: final heads, and CLIP's projections into the joint space."""

_WEIGHTED = (nn.Linear, nn.Embedding, nn.Conv2d)
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)  # what is in them is called by itself, and iterated over
_TAPS = ("scores", "probabilities", "context")


def feed(model: Any, batch: Any) -> Any:
    """Run a model on a batch: a mapping by keywords, anything else as it is. An encoder reads pixels, `Tokens`, or both as
    (pixels, tokens)."""
    if hasattr(model, "images") and hasattr(model, "texts"):
        parts = batch if isinstance(batch, tuple) and not isinstance(batch, Tokens) else (batch,)
        return [model.texts(part) if isinstance(part, Tokens) else model.images(part) for part in parts]
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def ptq(
    model: Model,
    calibration: Iterable[Any],
    w_bits: int | None = 8,
    a_bits: int | None = 8,
    skip: Iterable[str] = HEADS,
    *,
    estimate: Callable[[Tensor], Range] = minmax,
    momentum: float = 0.9,
    run: Run = feed,
) -> Model:
    """A copy that answers as if it were quantised; the model itself stays as it is.

    calibration: batches as `run` takes them; the paper takes 16 for BERT. w_bits, a_bits: None leaves weights, or activations, in
    float. skip: patterns, searched in the names of modules, of what stays in float, with all that is inside. estimate: the
    range of one batch, from `ecliptic.ops.quantize` (`percentile`, `least_squares`); over batches it runs on with `momentum`.
    ValueError for attention whose scores cannot be seen (see `ecliptic.core.attention.tapped`), or without batches.
    """
    made = copy.deepcopy(model).eval()
    modules = dict(_to_round("", made, [re.compile(pattern) for pattern in skip]))
    if w_bits is not None:
        for module in modules.values():
            if isinstance(module, _WEIGHTED):
                _round_weight(module, w_bits)
    if a_bits is not None:
        _hang(made, modules, lambda: Rounding(a_bits, estimate, momentum))
        _calibrate(made, calibration, run)
    return made


def grids(model: nn.Module) -> dict[str, Grid]:
    """Where a model that `ptq` gave rounds its activations: the name of each point, and its grid."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Rounding) and (grid := module.grid) is not None:
            found[name] = grid
    return found


class Rounding(nn.Module):
    """One place where activations are rounded: watches them during calibration, rounds afterwards."""

    scale: Tensor | None
    zero: Tensor | None

    def __init__(self, bits: int, estimate: Callable[[Tensor], Range] = minmax, momentum: float = 0.9):
        super().__init__()
        self.bits = bits
        self.running: RunningRange | None = RunningRange(estimate, momentum)
        self.register_buffer("scale", None)
        self.register_buffer("zero", None)

    @property
    def grid(self) -> Grid | None:
        if self.scale is None or self.zero is None:
            return None
        return Grid(self.scale, self.zero, 0, 2**self.bits - 1)

    def freeze(self) -> None:
        if self.running is not None and self.running.range is not None:
            self.scale, self.zero, _, _ = asymmetric(*self.running.range, bits=self.bits)
        self.running = None

    def forward(self, x: Tensor) -> Tensor:
        if self.running is not None:
            self.running.update(x)
            return x
        if (grid := self.grid) is None:
            raise ValueError(
                "no calibration batch came by here, so there is no range: calibrate with inputs of this kind too"
            )
        return fake_quantize(x, grid)

    def after(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        """As a forward hook: round what a module gives, or the first of it."""
        return (self(output[0]), *output[1:]) if isinstance(output, tuple) else self(output)


def _round_weight(module: nn.Module, bits: int) -> None:
    """A weight of its own on the grid: one that is tied to a head's must leave the head's as it is."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    module.weight = nn.Parameter(
        fake_quantize(weight.detach(), symmetric(weight.detach().abs().max(), bits)), weight.requires_grad
    )


def _to_round(name: str, module: nn.Module, skip: Sequence[re.Pattern[str]]) -> Iterator[tuple[str, nn.Module]]:
    """A module and those inside it by name, without what stays in float."""
    if any(pattern.search(name) for pattern in skip) or isinstance(module, nn.MultiheadAttention):
        return
    if getattr(module, "full_precision", False):
        return
    yield name, module
    for child, inside in module.named_children():
        yield from _to_round(f"{name}.{child}" if name else child, inside, skip)


def _hang(model: nn.Module, modules: Mapping[str, nn.Module], new: Callable[[], Rounding]) -> None:
    """Put a `Rounding` at every point of these modules of the model."""
    adds = _Adds()
    attentions = {name: module for name, module in attention_modules(model).items() if name in modules}
    rounded = set(modules.values())
    for module in [m for m in model.modules() if not isinstance(m, _LISTS)]:
        inside = [*module.children()] and module not in attentions.values() and not _is_activation(module)
        place = _Sums(adds, new if inside and module in rounded else None)
        module.register_forward_pre_hook(place.enter)
        module.register_forward_hook(place.leave, always_call=True)
        if inside and module in rounded:
            module.rounded_sums = place.roundings
    for module in rounded:
        if isinstance(module, _WEIGHTED) or "Norm" in type(module).__name__ or _is_activation(module):
            module.rounding = new()
            module.register_forward_hook(module.rounding.after)
    taps = {}
    for name, module in attentions.items():
        module.roundings = taps[name] = _Taps({point: new() for point in _TAPS})
    tapped(model, {name: points.tap for name, points in taps.items()})


def _is_activation(module: nn.Module) -> bool:
    kind = type(module)
    return (
        kind.__module__ in ("torch.nn.modules.activation", "transformers.activations")
        and "Softmax" not in kind.__name__
    )


def _calibrate(model: nn.Module, calibration: Iterable[Any], run: Run) -> None:
    batches = 0
    with torch.no_grad():
        for batch in calibration:
            run(model, batch)
            batches += 1
    if not batches:
        raise ValueError("calibration holds no batches: give some inputs without labels, 16 batches or so")
    for module in model.modules():
        if isinstance(module, Rounding):
            module.freeze()
    attentions: dict[str, Any] = dict(attention_modules(model))
    for name, module in attentions.items():
        query = module.q_proj if hasattr(module, "q_proj") else module.query
        if hasattr(module, "roundings") and query.rounding.grid and not module.roundings["scores"].grid:
            raise ValueError(
                f"{name} does not show its scores: its attention must go by ecliptic.core.attention.register, "
                "not by register_attention"
            )


class _Taps(nn.ModuleDict):
    """The roundings inside one attention module, by point."""

    def tap(self, point: str, x: Tensor) -> Tensor:
        found: Tensor = self[point](x) if point in self else x
        return found


class _Adds(TorchFunctionMode):
    """Sees the additions that Python code makes while a model runs, and rounds those of hidden states, for whichever module is
    running innermost: residual sums are no modules that one could hook."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[_Sums] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.running and getattr(func, "__name__", "") in _ADDS and _hidden_states(args, out):
            return self.running[-1].round(out)
        return out


_ADDS = ("add", "__add__", "__radd__", "__iadd__", "add_")


def _hidden_states(args: Sequence[Any], out: Any) -> bool:
    """Whether this was a sum of two floating (batch, tokens, width) or (tokens, width): masks have four dimensions."""
    return (
        len(args) == 2
        and all(isinstance(x, Tensor) and x.is_floating_point() and 2 <= x.ndim <= 3 for x in args)
        and args[0].shape[-1] == args[1].shape[-1] == out.shape[-1]
    )


class _Sums:
    """The sums that one module makes itself, outside its children, in the order in which it makes them."""

    def __init__(self, adds: _Adds, new: Callable[[], Rounding] | None):
        self.adds, self.new, self.roundings, self.count = adds, new, nn.ModuleList(), 0

    def enter(self, _module: nn.Module, _inputs: Any) -> None:
        if not self.adds.running:
            self.adds.__enter__()
        self.adds.running.append(self)
        self.count = 0

    def leave(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self.adds.running.pop()
        if not self.adds.running:
            self.adds.__exit__(None, None, None)

    def round(self, x: Tensor) -> Tensor:
        if self.new is None:
            return x
        if self.count == len(self.roundings):
            self.roundings.append(self.new())
        self.count += 1
        found: Tensor = self.roundings[self.count - 1](x)
        return found
