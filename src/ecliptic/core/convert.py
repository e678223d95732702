"""OpenAI and open_clip weights to transformers models and back, without either package.

Two layouts are known: CLIP's own (ViT towers; OpenAI's files and most of open_clip) and SigLIP's as open_clip stores it (a timm
image trunk beside its own text tower). One table of names serves both directions, so a round trip is exact by construction
and each direction tests the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ecliptic.core.encoder import HFEncoder, LoadError, _read_json
from ecliptic.core.preprocess import CLIP_MEAN, CLIP_STD, HALF, ImagePreprocess

State = dict[str, Tensor]
# Attention head sizes by tower width where they are not 64 (open_clip's H, g and bigG; SigLIP's so400m).
_HEAD = {1280: 80, 1408: 88, 1664: 104, 1152: 72}
_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True)
class Rule:
    """One line of the table: `there` is their name, `here` ours.

    how: "same"; "transpose"; "flat" (they have a leading axis of 1); "scalar" (() here) and "one" ((1,) here); "qkv" (they
    stack the three); "q+kv" (we stack what they keep as `there` and `also`).
    """

    there: str
    here: tuple[str, ...]
    how: Literal["same", "transpose", "flat", "scalar", "one", "qkv", "q+kv"] = "same"
    also: str = ""


def from_open_clip(
    state: Mapping[str, Tensor], *, activation: str | None = None, config: Mapping[str, Any] | None = None
) -> Any:
    """OpenAI or open_clip state dict -> CLIPModel or SiglipModel in float32.

    activation: "quick_gelu" or "gelu"; needed for CLIP's layout, since weights do not tell (ignored by SigLIP, which has one).
    config: the "model_cfg" of an open_clip_config.json, if there is one. LoadError names keys that are missing or left over.
    """
    state = {name.removeprefix("module."): value.float() for name, value in state.items() if name not in _OPENAI_EXTRAS}
    state = {name: value for name, value in state.items() if not name.endswith(".attn_mask")}
    siglip = any(name.startswith("visual.trunk.") for name in state)
    if siglip:
        model, rules = _siglip_model(state, config or {})
    elif "visual.conv1.weight" in state:
        if "text.token_embedding.weight" in state:  # open_clip's custom-text form of the same model
            state = {name.removeprefix("text."): value for name, value in state.items()}
        model, rules = _clip_model(state, activation, config or {})
    else:
        raise LoadError(
            "these weights are neither CLIP's ViT layout nor open_clip's SigLIP layout (ResNet towers are not supported)"
        )
    converted: State = {}
    for rule in rules:
        _forward(rule, state, converted)
    if state:
        raise LoadError(f"{len(state)} weights have no place: {', '.join(sorted(state)[:5])}")
    wanted = set(model.state_dict())
    if lacking := wanted - set(converted):
        raise LoadError(f"the weights lack {', '.join(sorted(lacking)[:5])}")
    model.load_state_dict(converted)
    return model.eval()


def to_open_clip(model: Any) -> State:
    """CLIPModel -> OpenAI/open_clip layout; SiglipModel -> open_clip's layout. The inverse of `from_open_clip`."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    config = model.config
    rules = _clip_rules if config.model_type == "clip" else _siglip_rules
    layers = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers
    out: State = {}
    for rule in rules(*layers):
        _backward(rule, state, out)
    return out


def load_weight_file(path: Path, activation: str | None = None, tokenizer: Any = None) -> HFEncoder:
    """Open a .pt, .bin or .safetensors file of OpenAI or open_clip weights."""
    state, openai = read_state(path)
    beside = path.parent / "open_clip_config.json"
    config = _read_json(beside) if beside.exists() else {}
    return _assemble(path, state, config, "quick_gelu" if openai else None, activation, tokenizer)


def load_open_clip_folder(path: Path, activation: str | None = None, tokenizer: Any = None) -> HFEncoder:
    """Open a folder as open_clip pushes it: open_clip_config.json beside its weights."""
    names = ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")
    found = next((path / name for name in names if (path / name).exists()), None)
    if found is None:
        raise LoadError(f"{path}: open_clip_config.json is there, its weights are not ({', '.join(names)})")
    state, _ = read_state(found)
    return _assemble(path, state, _read_json(path / "open_clip_config.json"), None, activation, tokenizer)


def read_state(path: Path) -> tuple[State, bool]:
    """A weight file -> its tensors, and whether it is one of OpenAI's own archives."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path), False
        if _is_torchscript(path):
            state = torch.jit.load(path, map_location="cpu").state_dict()
            return state, "input_resolution" in state
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise LoadError(f"{path}: not readable as weights ({str(error).splitlines()[0]})") from error
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise LoadError(f"{path}: holds no state dict (names to tensors)")
    return loaded, False


def _is_torchscript(path: Path) -> bool:
    import zipfile

    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _assemble(
    path: Path, state: State, config: Mapping[str, Any], known: str | None, activation: str | None, tokenizer: Any
) -> HFEncoder:
    model_config = config.get("model_cfg", {})
    if model_config:
        quick = bool(model_config.get("quick_gelu", False))
        known = "quick_gelu" if quick else "gelu"
    if known is not None and activation not in (None, known):
        raise LoadError(f"{path}: was trained with {known}, you said {activation!r}")
    try:
        model = from_open_clip(state, activation=activation or known, config=model_config)
    except LoadError as error:
        raise LoadError(f"{path}: {error}") from error
    siglip = model.config.model_type == "siglip"
    side = model.config.vision_config.image_size
    told = config.get("preprocess_cfg", {})
    mean = tuple(told.get("mean", HALF if siglip else CLIP_MEAN))
    std = tuple(told.get("std", HALF if siglip else CLIP_STD))
    squash = told.get("resize_mode", "squash" if siglip else "shortest") == "squash"
    transform = (
        ImagePreprocess(shortest=None, size=(side, side), crop=None, mean=mean, std=std)
        if squash
        else ImagePreprocess(shortest=side, crop=(side, side), mean=mean, std=std)
    )
    folder = path if path.is_dir() else path.parent
    name = path.name if path.is_dir() else path.stem
    return HFEncoder(model, tokenizer or _tokenizer_beside(folder, siglip), transform, name)


def _tokenizer_beside(folder: Path, siglip: bool) -> Any:
    """A tokenizer saved beside the weights, or CLIP's vocabulary out of an installed open_clip; None if there is neither."""
    if (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists():
        from transformers import AutoTokenizer, CLIPTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError):
            return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    spec = None if siglip else find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        return None
    vocabulary = Path(next(iter(spec.submodule_search_locations))) / "bpe_simple_vocab_16e6.txt.gz"
    return clip_tokenizer(vocabulary) if vocabulary.exists() else None


def clip_tokenizer(vocabulary: Path) -> Any:
    """CLIP's tokenizer from its published merges file (bpe_simple_vocab_16e6.txt.gz): 49,408 tokens, 77 per caption."""
    import gzip

    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    with gzip.open(vocabulary, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges: Any = [tuple(line.split()) for line in lines]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    table = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=table, merges=merges, model_max_length=77)


# Building the model that the shapes describe


def _clip_model(state: State, activation: str | None, config: Mapping[str, Any]) -> tuple[Any, list[Rule]]:
    from transformers.models.clip.configuration_clip import CLIPConfig
    from transformers.models.clip.modeling_clip import CLIPModel

    if activation not in ("quick_gelu", "gelu"):
        raise LoadError(
            "weights alone do not tell which GELU they were trained with, and the wrong one answers plausibly and worse: "
            'pass activation="quick_gelu" (OpenAI, DFN, early MetaCLIP) or "gelu" (LAION, DataComp)'
        )
    width, patch = state["visual.conv1.weight"].shape[0], state["visual.conv1.weight"].shape[-1]
    grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    words = state["ln_final.weight"].shape[0]
    vision_layers, text_layers = _count(state, "visual.transformer.resblocks"), _count(state, "transformer.resblocks")
    vision_cfg, text_cfg = config.get("vision_cfg", {}), config.get("text_cfg", {})
    head = vision_cfg.get("head_width", _HEAD.get(width, 64))
    heads = text_cfg.get("heads", words // 64)
    built = CLIPConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": vision_layers,
            "num_attention_heads": max(width // head, 1),
            "image_size": grid * patch,
            "patch_size": patch,
            "hidden_act": activation,
        },
        text_config={
            "hidden_size": words,
            "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": text_layers,
            "num_attention_heads": max(heads, 1),
            "max_position_embeddings": state["positional_embedding"].shape[0],
            "vocab_size": state["token_embedding.weight"].shape[0],
            "hidden_act": activation,
            # The published vocabulary ends in start and end of text.
            "bos_token_id": state["token_embedding.weight"].shape[0] - 2,
            "eos_token_id": state["token_embedding.weight"].shape[0] - 1,
            "pad_token_id": state["token_embedding.weight"].shape[0] - 1,
        },
        projection_dim=state["text_projection"].shape[1],
    )
    return CLIPModel(built), list(_clip_rules(vision_layers, text_layers))


def _siglip_model(state: State, config: Mapping[str, Any]) -> tuple[Any, list[Rule]]:
    from transformers.models.siglip.configuration_siglip import SiglipConfig
    from transformers.models.siglip.modeling_siglip import SiglipModel

    if "logit_bias" not in state:
        raise LoadError(
            "SigLIP weights without logit_bias: scores would be off by a constant of about 10; the file is incomplete"
        )
    if "visual.trunk.attn_pool.latent" not in state:
        raise LoadError("only open_clip's SigLIP models with attention pooling are supported among timm trunks")
    width, patch = (
        state["visual.trunk.patch_embed.proj.weight"].shape[0],
        state["visual.trunk.patch_embed.proj.weight"].shape[-1],
    )
    grid = round(state["visual.trunk.pos_embed"].shape[1] ** 0.5)
    words = state["text.ln_final.weight"].shape[0]
    vision_layers, text_layers = _count(state, "visual.trunk.blocks"), _count(state, "text.transformer.resblocks")
    heads = config.get("text_cfg", {}).get("heads", max(words // _HEAD.get(words, 64), 1))
    built = SiglipConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": state["visual.trunk.blocks.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": vision_layers,
            "num_attention_heads": max(width // _HEAD.get(width, 64), 1),
            "image_size": grid * patch,
            "patch_size": patch,
        },
        text_config={
            "hidden_size": words,
            "intermediate_size": state["text.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": text_layers,
            "num_attention_heads": heads,
            "max_position_embeddings": state["text.positional_embedding"].shape[0],
            "vocab_size": state["text.token_embedding.weight"].shape[0],
            "projection_size": state["text.text_projection.weight"].shape[0],
        },
    )
    return SiglipModel(built), list(_siglip_rules(vision_layers, text_layers))


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    found = {int(match[1]) for name in state if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))}
    if not found:
        raise LoadError(f"the weights lack {prefix}.*")
    return max(found) + 1


# The table


def _clip_rules(vision_layers: int, text_layers: int) -> Iterator[Rule]:
    yield Rule("logit_scale", ("logit_scale",), "scalar")
    yield Rule("text_projection", ("text_projection.weight",), "transpose")
    yield Rule("visual.proj", ("visual_projection.weight",), "transpose")
    yield Rule("token_embedding.weight", ("text_model.embeddings.token_embedding.weight",))
    yield Rule("positional_embedding", ("text_model.embeddings.position_embedding.weight",))
    yield Rule("visual.class_embedding", ("vision_model.embeddings.class_embedding",))
    yield Rule("visual.conv1.weight", ("vision_model.embeddings.patch_embedding.weight",))
    yield Rule("visual.positional_embedding", ("vision_model.embeddings.position_embedding.weight",))
    yield from _pair("ln_final", "text_model.final_layer_norm")
    yield from _pair("visual.ln_pre", "vision_model.pre_layrnorm")
    yield from _pair("visual.ln_post", "vision_model.post_layernorm")
    yield from _resblocks("visual.transformer.resblocks", "vision_model.encoder.layers", vision_layers)
    yield from _resblocks("transformer.resblocks", "text_model.encoder.layers", text_layers)


def _siglip_rules(vision_layers: int, text_layers: int) -> Iterator[Rule]:
    yield Rule("logit_scale", ("logit_scale",), "one")
    yield Rule("logit_bias", ("logit_bias",), "one")
    yield Rule("text.token_embedding.weight", ("text_model.embeddings.token_embedding.weight",))
    yield Rule("text.positional_embedding", ("text_model.embeddings.position_embedding.weight",))
    yield from _pair("text.ln_final", "text_model.final_layer_norm")
    yield from _pair("text.text_projection", "text_model.head")
    yield from _resblocks("text.transformer.resblocks", "text_model.encoder.layers", text_layers)
    yield from _pair("visual.trunk.patch_embed.proj", "vision_model.embeddings.patch_embedding")
    yield Rule("visual.trunk.pos_embed", ("vision_model.embeddings.position_embedding.weight",), "flat")
    yield from _pair("visual.trunk.norm", "vision_model.post_layernorm")
    for i in range(vision_layers):
        there, here = f"visual.trunk.blocks.{i}", f"vision_model.encoder.layers.{i}"
        yield from _pair(f"{there}.norm1", f"{here}.layer_norm1")
        yield from _pair(f"{there}.norm2", f"{here}.layer_norm2")
        yield from _pair(f"{there}.attn.proj", f"{here}.self_attn.out_proj")
        yield from _pair(f"{there}.mlp.fc1", f"{here}.mlp.fc1")
        yield from _pair(f"{there}.mlp.fc2", f"{here}.mlp.fc2")
        for kind in ("weight", "bias"):
            yield Rule(f"{there}.attn.qkv.{kind}", tuple(f"{here}.self_attn.{c}_proj.{kind}" for c in "qkv"), "qkv")
    there, here = "visual.trunk.attn_pool", "vision_model.head"
    yield Rule(f"{there}.latent", (f"{here}.probe",))
    yield from _pair(f"{there}.proj", f"{here}.attention.out_proj")
    yield from _pair(f"{there}.norm", f"{here}.layernorm")
    yield from _pair(f"{there}.mlp.fc1", f"{here}.mlp.fc1")
    yield from _pair(f"{there}.mlp.fc2", f"{here}.mlp.fc2")
    for kind in ("weight", "bias"):
        yield Rule(f"{there}.q.{kind}", (f"{here}.attention.in_proj_{kind}",), "q+kv", also=f"{there}.kv.{kind}")


def _resblocks(there: str, here: str, layers: int) -> Iterator[Rule]:
    for i in range(layers):
        a, b = f"{there}.{i}", f"{here}.{i}"
        yield from _pair(f"{a}.ln_1", f"{b}.layer_norm1")
        yield from _pair(f"{a}.ln_2", f"{b}.layer_norm2")
        yield from _pair(f"{a}.attn.out_proj", f"{b}.self_attn.out_proj")
        yield from _pair(f"{a}.mlp.c_fc", f"{b}.mlp.fc1")
        yield from _pair(f"{a}.mlp.c_proj", f"{b}.mlp.fc2")
        for kind in ("weight", "bias"):
            yield Rule(f"{a}.attn.in_proj_{kind}", tuple(f"{b}.self_attn.{c}_proj.{kind}" for c in "qkv"), "qkv")


def _pair(there: str, here: str) -> Iterator[Rule]:
    for kind in ("weight", "bias"):
        yield Rule(f"{there}.{kind}", (f"{here}.{kind}",))


def _forward(rule: Rule, state: State, out: State) -> None:
    """Move what `rule` names from their layout to ours, out of `state`."""
    needed = [rule.there, *([rule.also] if rule.also else [])]
    if lacking := [name for name in needed if name not in state]:
        raise LoadError(f"the weights lack {', '.join(lacking)}")
    value = state.pop(rule.there)
    if rule.how == "qkv":
        for name, part in zip(rule.here, value.chunk(3)):
            out[name] = part.clone()
    elif rule.how == "q+kv":
        out[rule.here[0]] = torch.cat([value, state.pop(rule.also)])
    elif rule.how == "transpose":
        out[rule.here[0]] = value.T.contiguous()
    elif rule.how == "flat":
        out[rule.here[0]] = value[0]
    elif rule.how in ("scalar", "one"):
        out[rule.here[0]] = value.reshape(1 if rule.how == "one" else ())
    else:
        out[rule.here[0]] = value


def _backward(rule: Rule, state: Mapping[str, Tensor], out: State) -> None:
    """The inverse of `_forward`."""
    value = state[rule.here[0]]
    if rule.how == "qkv":
        out[rule.there] = torch.cat([state[name] for name in rule.here])
    elif rule.how == "q+kv":
        width = value.shape[0] // 3
        out[rule.there], out[rule.also] = value[:width].clone(), value[width:].clone()
    elif rule.how == "transpose":
        out[rule.there] = value.T.contiguous()
    elif rule.how == "flat":
        out[rule.there] = value[None]
    elif rule.how in ("scalar", "one"):
        out[rule.there] = value.reshape(())
    else:
        out[rule.there] = value
