"""Attention with another softmax, for any model of `transformers` that dispatches its attention by name.

`register(name, probabilities)` makes scores -> probabilities an attention implementation, `register_attention` a whole function
of queries, keys and values; `use(model, name)` switches a model, or one tower of it, over. The mask function is registered with
it: without one, CLIP's text tower would silently stop being causal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop

Probabilities = Callable[[nn.Module, Tensor], Tensor]
"""(the attention module, scores (B, heads, queries, keys), hidden keys at the type's lowest number) -> the same shape."""

Attend = Callable[..., tuple[Tensor, Tensor | None]]
"""What `transformers` calls: (module, queries (B, heads, Q, d), keys and values (B, groups, K, d), an additive mask or None;
scaling=, dropout=, and further names of the model's) -> (context (B, Q, heads, d), weights (B, heads, Q, K) or None)."""

Context = Callable[[nn.Module, Tensor], Tensor]
"""(the attention module, what its heads gathered (B, heads, queries, d)) -> the same shape."""

PREFIX = "ecliptic-"

Tap = Callable[[str, Tensor], Tensor]
TAP = "attention_tap"
"""Attribute of an attention module: `tap(point, tensor) -> tensor`, called where attention runs through `register` with its
"scores" (before the mask), "values", "probabilities" and "context", to measure or to round them. See `tapped`."""


def register(name: str, probabilities: Probabilities, context: Context | None = None) -> str:
    """Make `probabilities` an attention implementation, and return the name `transformers` knows it by.

    context: what is done to the heads' outputs before they are joined, if anything. The module is there for settings and
    parameters that a method hangs on it. Registering a name again replaces it.
    """

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        tap: Tap = getattr(module, TAP, _untouched)
        key, value = expand_groups(module, key), tap("values", expand_groups(module, value))
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = tap("scores", scores)
        if attention_mask is not None:
            scores = scores + attention_mask[..., : key.shape[-2]]
        weights = tap("probabilities", probabilities(module, scores).to(value.dtype))
        weights = drop(weights, dropout, module.training)
        gathered = weights @ value if context is None else context(module, weights @ value)
        return tap("context", gathered).transpose(1, 2).contiguous(), weights

    return register_attention(name, attend)


def register_attention(name: str, attend: Attend, *, boolean_mask: bool = False) -> str:
    """Make `attend` an attention implementation, with the mask of the eager one, and return its name in `transformers`.

    boolean_mask: give it masks as SDPA gets them instead, true where a key is seen, and None where is_causal says it all
    (key j is seen by query i if j <= i) or nothing is hidden: long sequences then need no mask of (queries, keys).
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

    full = PREFIX + name
    AttentionInterface.register(full, attend)
    AttentionMaskInterface.register(full, sdpa_mask if boolean_mask else eager_mask)
    return full


def expand_groups(module: nn.Module, heads: Tensor) -> Tensor:
    """Keys or values (B, groups, K, d) -> (B, heads, K, d): each group repeated for the heads of `module` that share it."""
    groups = getattr(module, "num_key_value_groups", 1)
    return heads.repeat_interleave(groups, 1) if groups > 1 else heads


def use(model: nn.Module, name: str) -> None:
    """Switch a `transformers` model, or one tower of it, to an implementation that `register` named, in place.

    Raises ValueError for a model whose attention cannot be switched.
    """
    switch: Any = getattr(model, "set_attn_implementation", None)
    configs = [m.config for m in model.modules() if hasattr(m, "config") and hasattr(m.config, "_attn_implementation")]
    if switch is None or not configs:
        raise ValueError(f"{type(model).__name__} has no attention that can be switched")
    switch(name)
    if any(config._attn_implementation != name for config in configs):
        raise ValueError(f"{type(model).__name__} does not dispatch its attention by name: it keeps its own")


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that dispatch attention by name, by their own names in the model. ValueError if there are none."""
    projections = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
    found = {
        name: module
        for name, module in model.named_modules()
        if hasattr(getattr(module, "config", None), "_attn_implementation")
        and any(all(isinstance(getattr(module, part, None), nn.Module) for part in parts) for parts in projections)
    }
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention with projections of query, key and value of its own")
    return found


def tapped(model: nn.Module, taps: Mapping[str, Tap]) -> Callable[[], None]:
    """Hang taps on attention modules, by name, in place; returns what takes them off again.

    Modules on an attention of `transformers` compute plain softmax attention meanwhile, which gives the same. Taps of attention
    that went by `register_attention` are never called.
    """
    plain = register("softmax", plain_softmax)
    modules = attention_modules(model)
    switched = []
    for name, tap in taps.items():
        setattr(modules[name], TAP, tap)
        config: Any = modules[name].config
        if not str(config._attn_implementation).startswith(PREFIX):
            switched.append((config, config._attn_implementation))
            config._attn_implementation = plain

    def undo() -> None:
        for name in taps:
            delattr(modules[name], TAP)
        for config, before in switched:
            config._attn_implementation = before

    return undo


def _untouched(_point: str, x: Tensor) -> Tensor:
    return x


def plain_softmax(_module: nn.Module | None, scores: Tensor) -> Tensor:
    """The `Probabilities` of ordinary attention; half precision is computed, and given back, in float32."""
    return torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
