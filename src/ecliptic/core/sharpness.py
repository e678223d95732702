"""Sharpness: by how much a loss rises near the weights, on average or at worst, in all of them or in some.

With steps in proportion to the weights' own size ("adaptive", arXiv 2102.11600, 2302.07011) it does not change when one layer is
made larger and the next smaller by the same factor, as plain sharpness does though the function is the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

State = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> scalar."""
Kind = Literal["avg", "max"]
Moving = Mapping[str, tuple[nn.Parameter, Tensor]]
"""Parameters that move, each with its c: it moves by c u."""

ASCENT = 20  # steps; from the adaptive-sharpness literature, arXiv 2302.07011


def directional_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy in nats of logits divided by their norm, each picture's own: without that, sharpness mostly measures the
    scale of the logits."""
    inputs, labels = batch
    logits = model(inputs)
    return cross_entropy(logits / logits.norm(dim=-1, keepdim=True).clamp_min(1e-12), labels)


def sharpness(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    rho: float,
    kind: Kind = "avg",
    norm: float = math.inf,
    adaptive: bool = True,
    names: Iterable[str] | None = None,
    samples: int = 20,
    seed: int = 0,
) -> float:
    """By how much the loss, in its own units, rises within rho of the weights; in evaluation mode, mean over the batches.

    avg: E L(w + d) - L(w), d normal with standard deviation rho c; each draw counts with its mirror image (ours: what is odd
    in d cancels exactly). max: the highest L(w + d) - L(w) that ascent finds with |d / c| <= rho in `norm`, 2 or inf; >= 0.
    adaptive: c = |w| + 1e-3 rms(w), of each tensor, so that zero weights may move (arXiv 2102.11600); otherwise 1.
    names: only these parameters move; draws do not depend on which. The model is not changed.
    """
    check_sharpness(rho, kind, norm, samples)
    own = copy.deepcopy(model).eval()
    moving = _moving(own, names, adaptive)
    found = []
    for batch in batches:
        if kind == "avg":
            found.append(_average_rise(own, loss, batch, rho, moving, samples, seed))
        else:
            found.append(_worst(own, loss, batch, rho, norm, moving, None, seed)[0])
    if not found:
        raise ValueError("there are no batches to ask for the loss")
    return sum(found) / len(found)


def worst_case(
    model: nn.Module,
    loss: Loss,
    batch: Any,
    rho: float,
    norm: float = math.inf,
    adaptive: bool = True,
    names: Iterable[str] | None = None,
    start: State | None = None,
    seed: int = 0,
) -> tuple[float, dict[str, Tensor]]:
    """The highest rise of the loss found within |u| <= rho, with d = c u, and its u by parameter. start: a u to begin at, such as
    that of a smaller rho or of fewer layers; the result is then never below what it gives."""
    check_sharpness(rho, "max", norm, 1)
    own = copy.deepcopy(model).eval()
    return _worst(own, loss, batch, rho, norm, _moving(own, names, adaptive), start, seed)


def _worst(
    own: nn.Module, loss: Loss, batch: Any, rho: float, norm: float, moving: Moving, start: State | None, seed: int
) -> tuple[float, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    u = {}
    for name, (parameter, _) in moving.items():  # off the point itself, where the gradient may be zero
        u[name] = torch.randn(parameter.shape, generator=generator).to(parameter)
        if start is not None:
            u[name] = start.get(name, torch.zeros_like(u[name])).to(u[name])
    _project(u, rho if start is not None else 0.01 * rho, norm)
    with _moved(moving, {}), torch.no_grad():
        here = float(loss(own, batch))
    best, found = 0.0, {name: torch.zeros_like(value) for name, value in u.items()}
    for step in range(ASCENT + 1):
        with _moved(moving, u), torch.enable_grad():
            value = loss(own, batch)
            gradients = torch.autograd.grad(value, [p for p, _ in moving.values()], allow_unused=True)
        if float(value.detach()) - here > best:
            best, found = float(value.detach()) - here, {name: part.clone() for name, part in u.items()}
        if step == ASCENT:
            break
        # 2.5 / steps of the radius each (arXiv 1706.06083), in u, where the gradient is c g
        towards = {
            name: torch.zeros_like(c) if g is None else c * g
            for (name, (_, c)), g in zip(moving.items(), gradients, strict=True)
        }
        length = 1.0 if norm == math.inf else math.sqrt(sum(float(t.square().sum()) for t in towards.values()))
        for name, t in towards.items():
            u[name] += 2.5 * rho / ASCENT * (t.sign() if norm == math.inf else t / max(length, 1e-12))
        _project(u, rho, norm)
    return best, found


def _average_rise(
    model: nn.Module, loss: Loss, batch: Any, rho: float, moving: Moving, samples: int, seed: int
) -> float:
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    with torch.no_grad():
        with _moved(moving, {}):
            here = float(loss(model, batch))
        for _ in range(samples):
            u = {}
            for name, parameter in model.named_parameters():
                draw = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                if name in moving:
                    u[name] = rho * draw.to(parameter)
            for side in (1, -1):
                with _moved(moving, {name: side * value for name, value in u.items()}):
                    total += float(loss(model, batch)) - here
    return total / (2 * samples)


def _moving(model: nn.Module, names: Iterable[str] | None, adaptive: bool) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """The parameters that move, each with its c."""
    known = dict(model.named_parameters())
    chosen = list(known if names is None else names)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"there is no parameter {unknown[0]!r}; there are {', '.join(list(known)[:5])} ...")
    for name, parameter in known.items():
        parameter.requires_grad_(name in set(chosen))

    def c(w: Tensor) -> Tensor:
        return w.abs() + 1e-3 * w.square().mean().sqrt() if adaptive else torch.ones_like(w)

    return {name: (known[name], c(known[name].detach())) for name in chosen}


@contextmanager
def _moved(moving: Moving, u: State) -> Iterator[None]:
    """While open, the parameters are w + c u."""
    kept = {name: parameter.detach().clone() for name, (parameter, _) in moving.items()}
    with torch.no_grad():
        for name, part in u.items():
            moving[name][0].add_(moving[name][1] * part)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                moving[name][0].copy_(value)


def _project(u: dict[str, Tensor], rho: float, norm: float) -> None:
    """Into the ball, in place."""
    if norm == math.inf:
        for part in u.values():
            part.clamp_(-rho, rho)
        return
    length = math.sqrt(sum(float(part.square().sum()) for part in u.values()))
    for part in u.values():
        part.mul_(min(1.0, rho / max(length, 1e-30)))


def check_sharpness(rho: float, kind: str, norm: float, samples: int) -> None:
    """ValueError that names the setting of `sharpness` that cannot be."""
    if not rho >= 0:
        raise ValueError(f"rho={rho}: the radius must not be negative")
    if kind not in ("avg", "max"):
        raise ValueError(f"kind={kind!r}: choose 'avg' or 'max'")
    if norm not in (2, math.inf):
        raise ValueError(f"norm={norm}: choose 2 or math.inf")
    if samples < 1:
        raise ValueError(f"samples={samples}: at least one draw is needed")
