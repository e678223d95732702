"""Activation outliers, and heads and tokens that do nothing, in any model of `transformers`. arXiv 2306.12929, sections 3 and 5.

Outliers: for each sample of a batch, the largest magnitude of an activation and its kurtosis, averaged over samples. Idle heads:
how much of their attention lies on keys whose values are close to zero, how many rows are zero throughout (clipped softmax), and
how far the gate is open (gated attention).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecliptic.core.anatomy import parts
from ecliptic.core.attention import attention_modules, tapped
from ecliptic.core.ptq import Run, feed

EMPTY = 0.1
"""A key says nothing to a head where its value is shorter than this share of the head's mean over the sample; ours."""


@dataclass(frozen=True)
class Heads:
    """What the heads of one attention module do, averaged over batches; (H,) for each head, (T,) for each position.

    idle: share of what a head could have added that it does not: 1 - gate * (attention on keys that are not empty), from 0 to 1
    (a gate above 1, rescaled, counts as 1). on_empty: attention on empty keys. zero_rows: share of rows without any attention.
    gate: mean of the gate, or None. received: attention that a position gets from all queries and heads, in mean 1 where rows sum
    to 1. value: length of its value, relative to the head's mean. token_gate: mean of the gate at a position, or None.
    """

    idle: Tensor
    on_empty: Tensor
    zero_rows: Tensor
    gate: Tensor | None
    received: Tensor
    value: Tensor
    token_gate: Tensor | None


@dataclass(frozen=True)
class Outliers:
    """max_inf_norm: over the modules; avg_kurtosis, max_kurtosis: mean and largest over those whose kurtosis is taken.

    per_module: name -> "inf_norm" and, except for inputs of post-norms (".input"), "kurtosis". heads: by attention module.
    """

    max_inf_norm: float
    avg_kurtosis: float
    max_kurtosis: float
    per_module: dict[str, dict[str, float]]
    heads: dict[str, Heads] = field(default_factory=dict)

    @property
    def zero_rows(self) -> float:
        """Share of attention rows without any attention, over all heads."""
        return float(torch.stack([heads.zero_rows.mean() for heads in self.heads.values()]).mean())

    def save_svg(self, path: str | Path) -> Path:
        """Draw both halves: the largest magnitude along the model, and how idle each head is. Returns the path."""
        path = Path(path)
        path.write_text(figure(self), encoding="utf-8")
        return path


def inf_norm(x: Tensor) -> Tensor:
    """(B, ...) -> (B,): max |x| of each sample."""
    return x.detach().flatten(1).abs().amax(1)


def kurtosis(x: Tensor) -> Tensor:
    """(B, ...) -> (B,): mean((x - mean)^4) / (std^4 + 1e-6) of each sample, std unbiased; 3 for normal values."""
    x = x.detach().flatten(1).float()
    centred = x - x.mean(1, keepdim=True)
    return centred.pow(4).mean(1) / (x.std(1).pow(4) + 1e-6)


@torch.no_grad()
def outlier_metrics(
    model: nn.Module,
    batches: Iterable[Any],
    modules: Iterable[str] | None = None,
    *,
    run: Run = feed,
) -> Outliers:
    """Run the model, in evaluation mode, over batches as `run` takes them, and measure.

    modules: names of those whose outputs are watched, or, with ".input" after the name, their inputs. None takes the paper's:
    for post-norm blocks (BERT) output of the FFN, input and output of the norm after it; else output of block, FFN, attention
    projection and both norms, and the last norm's.
    A sample is what shares the first index of the batch, padding included: give batches without.
    ValueError without batches, or where none of the modules is reached.
    """
    averages: dict[str, _Mean] = {}
    heads: dict[str, _Watch] = {}
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    seen = 0
    try:
        with _watching(model, modules, averages), _taps(model, heads):
            for batch in batches:
                run(model, batch)
                seen += 1
    finally:
        for module, flag in training:
            module.training = flag
    if not seen or not averages:
        raise ValueError(
            "nothing was measured: there are no batches" if not seen else "no batch reached a watched module"
        )
    per_module = {name: mean.values() for name, mean in averages.items()}
    tails = [found["kurtosis"] for found in per_module.values() if "kurtosis" in found]
    return Outliers(
        max_inf_norm=max(found["inf_norm"] for found in per_module.values()),
        avg_kurtosis=sum(tails) / len(tails),
        max_kurtosis=max(tails),
        per_module=per_module,
        heads={name: watch.found() for name, watch in heads.items() if watch.sums},
    )


class _Mean:
    """Sums of named figures over samples."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, count: int, **sums: Tensor) -> None:
        self.count += count
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def values(self) -> dict[str, float]:
        return {name: float(value) / self.count for name, value in self.sums.items()}


def watched(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose outputs the paper measures, by name; ".input" after a name stands for what goes in.

    ValueError if the model has no blocks whose layout `ecliptic.core.anatomy` knows.
    """
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, block in model.named_modules():
        try:
            layers = parts(block)
        except TypeError:
            continue
        inside |= set(block.modules())
        if layers.pre_norm:
            chosen = (layers.norm1, layers.out, layers.norm2, layers.fc2)
            found |= {names[layer]: layer for layer in chosen} | {name: block}
        else:
            found |= {names[layers.fc2]: layers.fc2, names[layers.norm2]: layers.norm2}
            found[names[layers.norm2] + _INPUT] = layers.norm2
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no blocks that are known: say which modules to watch, modules=[...]"
        )
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _LAST_NORMS and module not in inside:
            found[name] = module
    return found


_INPUT = ".input"
_LAST_NORMS = ("post_layernorm", "layernorm", "final_layer_norm")


@contextmanager
def _watching(model: nn.Module, modules: Iterable[str] | None, averages: dict[str, _Mean]) -> Iterator[None]:
    if modules is None:
        chosen = watched(model)
    else:
        chosen = {name: model.get_submodule(name.removesuffix(_INPUT)) for name in modules}
    size = _BatchSize()

    def measure(name: str) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            x = x.reshape(size.now, -1) if x.ndim == 2 else x  # OPT's feed-forward layers get (B T, width)
            figures = {"inf_norm": inf_norm(x).sum()}
            if modules is not None or not name.endswith(_INPUT):
                figures["kurtosis"] = kurtosis(x).sum()
            averages.setdefault(name, _Mean()).add(len(x), **figures)

        return see

    with ExitStack() as hooks:
        for module in attention_modules(model).values():
            hooks.callback(module.register_forward_pre_hook(size.see, with_kwargs=True).remove)
        for name, module in chosen.items():
            see = measure(name)
            if name.endswith(_INPUT):
                handle = module.register_forward_pre_hook(lambda _m, args, see=see: see(args[0]))
            else:
                handle = module.register_forward_hook(
                    lambda _m, _args, out, see=see: see(out[0] if isinstance(out, tuple) else out)
                )
            hooks.callback(handle.remove)
        yield


class _BatchSize:
    """How many samples the attention modules last saw: some layers get them joined with the tokens."""

    now = 1

    def see(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self.now = len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])


@contextmanager
def _taps(model: nn.Module, heads: dict[str, _Watch]) -> Iterator[None]:
    modules = attention_modules(model)
    heads |= {name: _Watch() for name in modules}
    with ExitStack() as hooks:
        hooks.callback(tapped(model, {name: watch.tap for name, watch in heads.items()}))
        for name, module in modules.items():
            gate = getattr(module, "head_gate", None)
            if isinstance(gate, nn.Module):
                hooks.callback(gate.register_forward_hook(heads[name].see_gate).remove)
        yield


class _Watch:
    """Gathers what `Heads` tells of one module, from its taps."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.relative = self.empty = self.carried = self.gate = torch.empty(0)

    def tap(self, point: str, x: Tensor) -> Tensor:
        if point == "values":
            length = x.detach().norm(dim=-1)  # (B, H, K)
            self.relative = length / length.mean(-1, keepdim=True).clamp_min(1e-12)
            self.empty = (self.relative < EMPTY).to(x.dtype)
            self.gate = torch.empty(0)
        elif point == "probabilities":
            on_empty = (x * self.empty[:, :, None]).sum(-1)  # (B, H, Q)
            self.carried = x.sum(-1) - on_empty
            self._add("on_empty", on_empty.mean((0, 2)))
            self._add("zero_rows", (x == 0).all(-1).to(x.dtype).mean((0, 2)))
            self._add("received", x.sum(2).mean((0, 1)))
            self._add("value", self.relative.mean((0, 1)))
        elif point == "context":
            gate = self.gate if len(self.gate) else torch.ones_like(self.carried)
            self._add("idle", 1 - (gate.clamp(max=1) * self.carried).mean((0, 2)))
            if len(self.gate):
                self._add("gate", gate.mean((0, 2)))
                self._add("token_gate", gate.mean((0, 1)))
        return x

    def see_gate(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self.gate = output.detach()[..., 0]  # (B, H, Q)

    def _add(self, name: str, value: Tensor) -> None:
        """Add up over batches; positions that not all batches have are averaged over those that do."""
        longest = max(len(value), len(self.sums.get(name, value)))
        total, count = value.new_zeros(longest), value.new_zeros(longest)
        for part, counted in ((value, torch.ones_like(value)), (self.sums.get(name), self.counts.get(name))):
            if part is not None and counted is not None:
                total[: len(part)] += part
                count[: len(part)] += counted
        self.sums[name], self.counts[name] = total, count

    def found(self) -> Heads:
        means = {name: (self.sums[name] / self.counts[name]).cpu() for name in self.sums}
        return Heads(
            **{name: means[name] for name in ("idle", "on_empty", "zero_rows", "received", "value")},
            gate=means.get("gate"),
            token_gate=means.get("token_gate"),
        )


# The figure


def figure(found: Outliers) -> str:
    """An SVG: inf-norm of the watched modules in the model's order, as bars on a logarithmic scale; below, a square for each
    head, one column a layer, the darker the idler."""
    norms = [(name, value["inf_norm"]) for name, value in found.per_module.items()]
    wide = max(360, 60 + 9 * len(norms))
    top = max(1.0, *(value for _, value in norms))
    decades = max(1, len(str(int(top))))

    def height(value: float) -> float:
        return max(1.0, 120 * min(1.0, float(torch.tensor(max(value, 1.0)).log10()) / decades))

    rows = max((len(heads.idle) for heads in found.heads.values()), default=0)
    tall = 190 + 14 * rows
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {tall}" font-family="sans-serif" font-size="10">',
        f'<rect width="{wide}" height="{tall}" fill="white"/>',
        f'<text x="40" y="14">largest magnitude by module, log scale (max {found.max_inf_norm:.1f}; '
        f"kurtosis {found.avg_kurtosis:.1f})</text>",
    ]
    for decade in range(decades + 1):
        y = 145 - 120 * decade / decades
        lines.append(f'<path d="M40 {y:.1f}H{wide - 10}" stroke="#ddd"/>')
        lines.append(f'<text x="36" y="{y + 3:.1f}" text-anchor="end">{10**decade}</text>')
    for i, (name, value) in enumerate(norms):
        bar = height(value)
        lines.append(
            f'<rect x="{44 + 9 * i}" y="{145 - bar:.1f}" width="7" height="{bar:.1f}" fill="#1464b4">'
            f"<title>{name}: {value:.2f}</title></rect>"
        )
    lines.append('<text x="40" y="170">heads by layer: white at work, black idle</text>')
    for layer, (name, heads) in enumerate(found.heads.items()):
        for head, idle in enumerate(heads.idle.tolist()):
            shade = round(255 * (1 - min(max(idle, 0.0), 1.0)))
            lines.append(
                f'<rect x="{44 + 14 * layer}" y="{178 + 14 * head}" width="12" height="12" fill="rgb({shade},{shade},{shade})" '
                f'stroke="#888"><title>{name}, head {head}: {idle:.0%} idle</title></rect>'
            )
    return "\n".join([*lines, "</svg>"]) + "\n"
