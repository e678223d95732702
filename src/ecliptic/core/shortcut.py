"""The last block for one token only: what nobody reads need not be computed.

CLIP's towers pool a single token, and SigLIP's text tower the last. After the last block's keys and values every other token is
dead weight: its query, output projection and MLP, ten twelfths of the block, change nothing that is returned. Leaving them
out is exact, and saves 7 % of a twelve-layer tower. Only plain blocks take part: one that is hooked, wrapped, trained,
subclassed or uses an attention function of somebody's own runs in full.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

_PLAIN = {("CLIPEncoderLayer", "CLIPAttention"), ("SiglipEncoderLayer", "SiglipAttention")}


@contextmanager
def last_block_at(blocks: nn.ModuleList, position: Tensor | int, causal: bool) -> Iterator[None]:
    """While open, the last block computes only the token at `position` ((B,) or one for all) and passes the others through.

    causal: a token attends to itself and what is before it, else to all.
    """
    block: Any = blocks[-1]
    if not _plain(block):
        yield
        return

    def forward(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        batch, length, width = hidden_states.shape
        at = torch.as_tensor(position, device=hidden_states.device).expand(batch)
        rows = torch.arange(batch, device=hidden_states.device)
        attention = block.self_attn
        heads = attention.num_heads
        normed = block.layer_norm1(hidden_states)
        query = attention.q_proj(normed[rows, at]).view(batch, heads, 1, width // heads)
        key = attention.k_proj(normed).view(batch, length, heads, -1).transpose(1, 2)
        value = attention.v_proj(normed).view(batch, length, heads, -1).transpose(1, 2)
        mask = None
        if causal:
            mask = (torch.arange(length, device=at.device) <= at[:, None])[:, None, None]
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attention.scale)
        seen = hidden_states[rows, at] + attention.out_proj(mixed.reshape(batch, width))
        seen = seen + block.mlp(block.layer_norm2(seen))
        return hidden_states.index_put((rows, at), seen)

    block.forward = forward
    try:
        yield
    finally:
        del block.forward


def _plain(block: Any) -> bool:
    attention: Any = getattr(block, "self_attn", None)
    if torch.is_grad_enabled() or block.training or (type(block).__name__, type(attention).__name__) not in _PLAIN:
        return False
    if attention.config._attn_implementation not in ("sdpa", "eager"):
        return False
    return not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in block.modules()
    )
