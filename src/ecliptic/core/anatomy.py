"""One map from any Hugging Face tower to its parts, so that no method needs to know whose attribute is called what.

`anatomy(model)` names the blocks, embeddings, final norm and projection of both towers; `parts(block)` names the projections
inside one block. Towers differ in three ways that matter to methods: special tokens before the patches, causality of the
text, and where the pooled vector comes from. All three stand here and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOWERS = ("image", "text")
"""The towers by the names that settings use: fields of `Anatomy`."""


@dataclass(frozen=True)
class Tower:
    """One tower of a dual encoder.

    module: the Hugging Face model. embed: the module whose output enters the first block (after it come norms only).
    table: the token embedding of a text tower. prefix: tokens before the first patch. causal: a word sees only earlier ones.
    padded: the tower was trained on captions padded to full length without a mask (SigLIP), so padding must stay.
    norm: applied to the last hidden states. projection: hidden -> joint space, or None where the pooling head already does it.
    joined: a network beside the blocks makes the pooled vector (the picture tower of "offline"): the blocks do not change it.
    """

    module: Any  # transformers models: their attributes are theirs, not nn.Module's
    blocks: nn.ModuleList
    embed: nn.Module
    norm: nn.Module | None
    projection: Any | None  # nn.Linear, or an adapter around one
    width: int
    prefix: int = 0
    patch: int = 0
    table: nn.Embedding | None = None
    causal: bool = False
    padded: bool = False
    joined: bool = False

    def options(self, *, resized: bool, patches: bool) -> dict[str, Any]:
        """Keyword arguments of an image tower's call, as far as it knows them.

        resized: interpolate the positions; some towers must be told. patches: whether anybody will read patches or blocks;
        a tower of several backbones can leave some out if not.
        """
        known = inspect.signature(self.module.forward).parameters
        given: dict[str, Any] = {"interpolate_pos_encoding": True} if resized else {}
        if not patches:
            given["patches"] = False
        return {name: value for name, value in given.items() if name in known}


@dataclass(frozen=True)
class Anatomy:
    image: Tower
    text: Tower


@dataclass(frozen=True)
class Parts:
    """The layers inside one transformer block. norm1 comes before attention and norm2 before the MLP in pre-norm blocks,
    after them in post-norm ones (BERT)."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    out: nn.Linear
    fc1: nn.Linear
    fc2: nn.Linear
    norm1: nn.Module
    norm2: nn.Module
    heads: int
    pre_norm: bool


# Attribute paths per family of blocks, first match wins.
_BLOCKS: tuple[Mapping[str, str], ...] = (
    {  # CLIP, SigLIP
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.out_proj",
        "fc1": "mlp.fc1", "fc2": "mlp.fc2", "norm1": "layer_norm1", "norm2": "layer_norm2",
        "heads": "self_attn.num_heads",
    },
    {  # DINOv2
        "q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj", "out": "attention.o_proj",
        "fc1": "mlp.fc1", "fc2": "mlp.fc2", "norm1": "norm1", "norm2": "norm2",
        "heads": "attention.num_attention_heads",
    },
    {  # ViT
        "q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj", "out": "attention.o_proj",
        "fc1": "mlp.fc1", "fc2": "mlp.fc2", "norm1": "layernorm_before", "norm2": "layernorm_after",
        "heads": "attention.num_attention_heads",
    },
    {  # BERT: post-norm
        "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
        "out": "attention.output.dense", "fc1": "intermediate.dense", "fc2": "output.dense",
        "norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm",
        "heads": "attention.self.num_attention_heads",
    },
    {  # OPT
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.out_proj",
        "fc1": "fc1", "fc2": "fc2", "norm1": "self_attn_layer_norm", "norm2": "final_layer_norm",
        "heads": "self_attn.num_heads",
    },
)  # fmt: skip


def parts(block: nn.Module) -> Parts:
    """The layers of one block of any supported tower. TypeError names the block's class when it is not known."""
    for paths in _BLOCKS:
        found = {name: _walk(block, path) for name, path in paths.items()}
        if all(value is not None for value in found.values()):
            return Parts(**found, pre_norm="LayerNorm" not in paths["norm1"])
    raise TypeError(f"do not know the parts of {type(block).__name__}: add its layout to ecliptic.core.anatomy")


def swap(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands inside `root`, in place. ValueError if it stands nowhere."""
    places = [(parent, name) for parent in root.modules() for name, child in parent.named_children() if child is old]
    if not places:
        raise ValueError(f"this {type(root).__name__} does not hold that {type(old).__name__}")
    for parent, name in places:
        setattr(parent, name, new)


def anatomy(model: Any) -> Anatomy:
    """Map a CLIPModel, SiglipModel or VisionTextDualEncoderModel."""
    vision, text = model.vision_model, model.text_model
    siglip = _is_siglip(model)
    image_tower = _image_tower(vision, getattr(model, "visual_projection", None))
    text_tower = _text_tower(text, text.head if siglip else model.text_projection)
    return Anatomy(image_tower, text_tower)


def _image_tower(module: Any, projection: Any | None) -> Tower:
    config = module.config
    core = getattr(module, "backbone", module)  # a joined tower says which of its parts is the transformer
    backbone = core.config
    norm = next((getattr(core, name) for name in ("post_layernorm", "layernorm") if hasattr(core, name)), None)
    siglip = config.model_type.startswith("siglip")
    return Tower(
        module=module,
        blocks=_blocks(core),
        embed=core.embeddings,
        norm=norm,
        projection=projection,
        width=int(backbone.hidden_size),
        prefix=0 if siglip else 1 + int(getattr(backbone, "num_register_tokens", 0)),
        patch=int(backbone.patch_size),
        joined=core is not module,
    )


def _text_tower(module: Any, projection: Any | None) -> Tower:
    core = getattr(module, "backbone", module)
    embeddings = core.embeddings
    table = embeddings.token_embedding if hasattr(embeddings, "token_embedding") else embeddings.word_embeddings
    kind = module.config.model_type
    return Tower(
        module=module,
        blocks=_blocks(core),
        embed=embeddings,
        norm=getattr(core, "final_layer_norm", None),
        projection=projection,
        width=int(core.config.hidden_size),
        table=table,
        causal=kind.startswith("clip"),
        padded=kind.startswith("siglip"),
    )


def _blocks(module: nn.Module) -> nn.ModuleList:
    for path in ("encoder.layers", "encoder.layer", "layers", "layer"):
        found = _walk(module, path)
        if isinstance(found, nn.ModuleList):
            return found
    raise TypeError(f"do not know where {type(module).__name__} keeps its blocks: add it to ecliptic.core.anatomy")


def _walk(root: Any, path: str) -> Any:
    for name in path.split("."):
        root = getattr(root, name, None)
        if root is None:
            return None
    return root


def _is_siglip(model: Any) -> bool:
    kind: str = model.config.model_type
    return kind.startswith("siglip")


@contextmanager
def outputs_of(blocks: nn.ModuleList, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect what the blocks at `layers` (negative counts from the end) put out while the context is open."""
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            kept[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    if bad := [layer for layer in layers if not -len(blocks) <= layer < len(blocks)]:
        raise IndexError(f"layers {bad} do not exist: this tower has {len(blocks)} blocks")
    handles = [blocks[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def siglip_token_pool(head: Any, hidden: Tensor) -> Tensor:
    """(B, N, W) normed patches -> (B, N, W): what SigLIP's pooling head would return were each patch the only one.

    Attention over a single key returns that key's value, so this is exact, and it puts patches in the joint space.
    """
    attention = head.attention
    value = attention.in_proj_weight.chunk(3)[2]
    bias = attention.in_proj_bias.chunk(3)[2]
    seen = attention.out_proj(torch.nn.functional.linear(hidden, value, bias))
    return seen + head.mlp(head.layernorm(seen))
