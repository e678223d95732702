"""Low-rank adapters: LoRA (arXiv 2106.09685) through peft, on the towers of any encoder.

A linear layer W gets a learnt addition (alpha / rank) B A, with A (rank, in) random and B (out, rank) zero: at first nothing
changes, and what training adds is 100 to 1000 times smaller than the model. `merge` writes the addition into W.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecliptic.core.anatomy import TOWERS, Tower, parts
from ecliptic.core.contracts import ModelStep, Pairs
from ecliptic.core.encoder import Encoder, HFEncoder
from ecliptic.core.files import atomic_folder, require_own

LAYERS = ("q", "k", "v", "out", "fc1", "fc2", "projection")
_PREFIX = "base_model.model."  # what peft's own classes put before each name


class AdaptedEncoder(HFEncoder):
    """An encoder with adapters in its layers. `save_pretrained` writes it merged; for the adapters alone, `save_adapters`."""

    def save_pretrained(self, folder: str | Path) -> None:
        merge(self).save_pretrained(folder)


@dataclass(frozen=True)
class Lora(ModelStep):
    """Adapters on the layers `parts` in every block of `towers`, frozen weights around them.

    `Train(..., lora=Lora())` trains them and gives back a merged encoder; as a step of its own, `Lora().apply(encoder)` gives an
    encoder with adapters that change nothing yet, and are all of it that requires grad. Needs peft, the extra `train`.
    """

    rank: int = 8  # arXiv 2106.09685, table 6: more changes little
    alpha: float = 16.0  # the addition is scaled by alpha / rank; official repository, GLUE commands
    towers: tuple[str, ...] = TOWERS
    parts: tuple[str, ...] = ("q", "v")  # section 4.2 and table 5; also k, out, fc1, fc2, projection
    dropout: float = 0.0  # on the adapters' input, in training
    seed: int = 0  # of A

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be at least 0 and below 1")
        for name, known in (("towers", TOWERS), ("parts", LAYERS)):
            given = getattr(self, name)
            if isinstance(given, str) or not given or set(given) - set(known):
                raise ValueError(f"{name}={given!r}: choose from {', '.join(known)}, as a tuple")

    def apply(self, encoder: Encoder, pairs: Pairs | None = None) -> AdaptedEncoder:
        adapted = self.adapt(encoder)
        adapted.record_step("lora", self.settings())
        return adapted

    def adapt(self, encoder: Encoder) -> AdaptedEncoder:
        """As `apply`, without a note in the history."""
        assert isinstance(encoder, HFEncoder)
        _refuse_adapted(encoder)
        config = _peft().LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets(encoder),
            base_model_name_or_path=encoder.name,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return _adapted(encoder, config)

    def targets(self, encoder: HFEncoder) -> list[str]:
        """Names of the linear layers that get an adapter, as in `encoder.model.named_modules()`."""
        wanted = [
            id(layer)
            for name in self.towers
            for layer in _layers(getattr(encoder.anatomy, name), self.parts)
            if isinstance(layer, nn.Linear)
        ]
        found = [name for name, module in encoder.model.named_modules() if id(module) in wanted]
        if not found:
            raise ValueError(f"{encoder.name} has no linear layer among towers={self.towers}, parts={self.parts}")
        return found

    def settings(self) -> dict[str, Any]:
        """Plain values, for the history."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_" in name


def merge(encoder: HFEncoder) -> HFEncoder:
    """A new, plain encoder with the adapters' additions written into the linear layers: same answers, original architecture."""
    from peft.tuners.lora import LoraLayer

    model = copy.deepcopy(encoder.model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)
            model.set_submodule(name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.requires_grad_(True)
    return HFEncoder(model, encoder.tokenizer, encoder.transform, encoder.name, encoder.history)


def low_rank_additions(encoder: HFEncoder) -> dict[str, tuple[Tensor, Tensor]]:
    """Adapted weights by their name in the plain encoder -> A (rank, in) and B (out, rank), with B A what is added to each.

    The factor alpha / rank is in B.
    """
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, layer in encoder.named_modules():
        if isinstance(layer, LoraLayer):
            a, b = (getattr(layer, part)["default"].weight.detach() for part in ("lora_A", "lora_B"))
            found[f"{name}.weight"] = (a.clone(), layer.scaling["default"] * b)
    if not found:
        raise ValueError(f"{encoder.name} has no adapters: add them by Lora(...).apply(encoder)")
    return found


def save_adapters(encoder: HFEncoder, folder: str | Path) -> Path:
    """Write the adapters alone, as peft does: adapter_config.json and adapter_model.safetensors.

    `load_adapters`, and `peft.PeftModel.from_pretrained(encoder.model, folder)` on the encoder without adapters, open it.
    """
    from safetensors.torch import save_file

    config = _config(encoder)
    state = _peft().get_peft_model_state_dict(encoder.model, save_embedding_layers=False)
    folder = Path(folder)
    require_own(folder, "adapter_config.json")
    with atomic_folder(folder, replace=True) as draft:
        config.save_pretrained(draft)
        tensors = {_PREFIX + name: value.detach().cpu().contiguous() for name, value in state.items()}
        save_file(tensors, draft / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def load_adapters(encoder: HFEncoder, folder: str | Path) -> AdaptedEncoder:
    """A new encoder with the adapters that `save_adapters`, or peft for the same architecture, wrote."""
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "adapter_config.json").exists():
        raise FileNotFoundError(f"{folder}: no adapter_config.json in it, so these are no saved adapters")
    config = _peft().LoraConfig.from_pretrained(str(folder))
    adapted = _adapted(encoder, config)
    state = {
        name.removeprefix(_PREFIX): value for name, value in load_file(folder / "adapter_model.safetensors").items()
    }
    wanted = _peft().get_peft_model_state_dict(adapted.model, save_embedding_layers=False)
    if differing := sorted(name for name in wanted.keys() ^ state.keys()) or [
        name for name in wanted if wanted[name].shape != state[name].shape
    ]:
        raise ValueError(f"{folder}: its adapters do not fit {encoder.name}, first {differing[0]}")
    _peft().set_peft_model_state_dict(adapted.model, state)
    return adapted


def _adapted(encoder: HFEncoder, config: Any) -> AdaptedEncoder:
    _refuse_adapted(encoder)
    model = copy.deepcopy(encoder.model)
    _peft().inject_adapter_in_model(config, model)
    return AdaptedEncoder(model.eval(), encoder.tokenizer, encoder.transform, encoder.name, encoder.history)


def _refuse_adapted(encoder: HFEncoder) -> None:
    if isinstance(encoder, AdaptedEncoder):
        raise ValueError(f"{encoder.name} has adapters already: merge(encoder) first")


def _layers(tower: Tower, names: Sequence[str]) -> list[Any]:
    inside = [name for name in names if name != "projection"]
    found = [getattr(parts(block), name) for block in tower.blocks for name in inside]
    return [*found, tower.projection] if "projection" in names else found


def _config(encoder: HFEncoder) -> Any:
    known = getattr(encoder.model, "peft_config", None)
    if not known:
        raise ValueError(f"{encoder.name} has no adapters: add them by Lora(...).apply(encoder)")
    return known["default"]


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError('LoRA needs peft: pip install "ecliptic[train]"') from error
    return peft
