"""Attention with another softmax, for any model of `transformers` that dispatches its attention by name.

`register(name, probabilities)` makes scores -> probabilities an attention implementation, `register_attention` a whole function
of queries, keys and values; `use(model, name)` switches a model, or one tower of it, over. The mask function is registered with
it: without one, CLIP's text tower would silently stop being causal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import dropout as drop

Probabilities = Callable[[nn.Module, Tensor], Tensor]
"""(the attention module, scores (B, heads, queries, keys), hidden keys at the type's lowest number) -> the same shape."""

Attend = Callable[..., tuple[Tensor, Tensor | None]]
"""What `transformers` calls: (module, queries (B, heads, Q, d), keys and values (B, groups, K, d), an additive mask or None;
scaling=, dropout=, and further names of the model's) -> (context (B, Q, heads, d), weights (B, heads, Q, K) or None)."""

PREFIX = "ecliptic-"


def register(name: str, probabilities: Probabilities) -> str:
    """Make `probabilities` an attention implementation, and return the name `transformers` knows it by.

    The module is there for settings and parameters that a method hangs on it. Registering a name again replaces it.
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
        key, value = expand_groups(module, key), expand_groups(module, value)
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if attention_mask is not None:
            scores = scores + attention_mask[..., : key.shape[-2]]
        weights = drop(probabilities(module, scores).to(value.dtype), dropout, module.training)
        return (weights @ value).transpose(1, 2).contiguous(), weights

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
