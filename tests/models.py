"""Tiny random models of `transformers` with one tower each, and inputs for them, for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
PICTURES = {"image_size": 16, "patch_size": 8}
OWN: dict[str, dict[str, Any]] = {
    "bert": {"vocab_size": 40},
    "opt": {"vocab_size": 40, "ffn_dim": 32, "word_embed_proj_dim": 24},
    "vit": PICTURES,
    "dinov2": PICTURES,
}
IDS = torch.arange(12).view(2, 6) + 3


def small(kind: Any, **config: Any) -> Any:
    """A model of the class `kind` in evaluation mode, with the same weights every time; config: beyond the usual."""
    shape = {
        name: value
        for name, value in SMALL.items()
        if kind.config_class.model_type != "opt" or name != "intermediate_size"
    }
    torch.manual_seed(0)
    return kind(kind.config_class(**{**shape, **OWN[kind.config_class.model_type], **config})).eval()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
