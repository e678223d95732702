"""The encoder: two towers, one joint space, whatever checkpoint is inside.

`load(source)` opens a hub name, a local folder, an OpenAI or open_clip weight file, or a built-in ("offline", "tiny"), and
gives an `HFEncoder` around a transformers `CLIPModel`, `SiglipModel` or `VisionTextDualEncoderModel`. Every method takes and
returns such an encoder.

Fast where it changes nothing: captions are trimmed to the longest of their batch wherever attention is causal or masked,
sorted into batches of equal length, equal captions encoded once; pictures are decoded beside the model.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize as unit

from ecliptic.core.anatomy import Anatomy, Tower, anatomy, outputs_of, siglip_token_pool
from ecliptic.core.contracts import Features, Tokens
from ecliptic.core.exported import EXPORT_CARD
from ecliptic.core.files import atomic_folder, require_own
from ecliptic.core.inputs import (
    Decode,
    Overflow,
    average_windows,
    encode_ids,
    encode_pictures,
    pad,
    windows,
    within_limit,
)
from ecliptic.core.inputs import TextTooLong as TextTooLong
from ecliptic.core.inputs import TruncationWarning as TruncationWarning
from ecliptic.core.inputs import open_picture as open_picture
from ecliptic.core.preprocess import ImagePreprocess
from ecliptic.core.shortcut import last_block_at

CARD = "ecliptic.json"  # what was done to the model, beside its weights
BUILT_IN = ("offline", "tiny")
_FAMILIES = {
    "clip": ("transformers.models.clip.modeling_clip", "CLIPModel"),
    "siglip": ("transformers.models.siglip.modeling_siglip", "SiglipModel"),
    "vision-text-dual-encoder": (
        "transformers.models.vision_text_dual_encoder.modeling_vision_text_dual_encoder",
        "VisionTextDualEncoderModel",
    ),
}


class LoadError(ValueError):
    """A model could not be opened; the message says which, why, and what to do."""


class Encoder(nn.Module):
    """Two towers into one space. `images` and `texts` take tensors; what stands around them takes pictures and strings.

    any_size: whether `images` takes pixels of any size that holds whole patches, or only those of `preprocess`.
    """

    any_size = True

    @property
    @abstractmethod
    def dim(self) -> int:
        """Size of the joint space."""

    @property
    @abstractmethod
    def scale(self) -> Tensor:
        """What cosines are multiplied by: 1 / temperature."""

    @property
    @abstractmethod
    def bias(self) -> Tensor | None:
        """What is added to every logit (SigLIP), or None."""

    @abstractmethod
    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures -> (B, 3, H, W) float32, with the checkpoint's own transform."""

    @abstractmethod
    def tokenize(self, texts: Sequence[str], overflow: Literal["error", "truncate"] = "truncate") -> Tokens:
        """Captions -> ids and mask, padded no further than the tower needs."""

    @abstractmethod
    def images(
        self, pixels: Tensor, *, patches: bool = False, layers: Sequence[int] = (), normalize: bool = True
    ) -> Features:
        """(B, 3, H, W) -> pooled (B, D); with `patches`, tokens (B, rows * columns, D) as well."""

    @abstractmethod
    def texts(
        self, tokens: Tokens, *, words: bool = False, layers: Sequence[int] = (), normalize: bool = True
    ) -> Features:
        """Tokens -> pooled (B, D); with `words`, tokens (B, L, D) as well."""

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """Unit rows (B, D) and (K, D) -> (B, K): scale * cosine + bias."""
        scores = self.scale * image @ text.T
        return scores if self.bias is None else scores + self.bias


class HFEncoder(Encoder):
    """An `Encoder` around a transformers dual encoder.

    model: CLIPModel, SiglipModel or VisionTextDualEncoderModel. tokenizer: its transformers tokenizer, or None (then texts
    must come as ids). transform: how pictures become tensors. name: for people. history: the steps applied since loading.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        transform: ImagePreprocess,
        name: str = "model",
        history: Sequence[Mapping[str, Any]] = (),
    ):
        super().__init__()
        if (kind := model.config.model_type) not in _FAMILIES:
            raise TypeError(
                f"{type(model).__name__} ({kind}) is not a dual encoder this toolkit knows: {', '.join(_FAMILIES)}"
            )
        self.model: Any = model.eval()
        self.tokenizer = tokenizer
        self.transform = transform
        self.name = name
        self.history: tuple[dict[str, Any], ...] = tuple(dict(step) for step in history)

    @classmethod
    def from_hf(cls, model: Any, tokenizer: Any, processor: Mapping[str, Any], name: str = "model") -> Self:
        """From objects in memory; `processor` is the content of a preprocessor_config.json."""
        return cls(model, tokenizer, ImagePreprocess.from_processor(processor), name)

    # What it is

    @cached_property
    def anatomy(self) -> Anatomy:
        return anatomy(self.model)

    @property
    def dim(self) -> int:
        projection = self.anatomy.text.projection
        assert projection is not None
        return int(projection.out_features)

    @property
    def scale(self) -> Tensor:
        return self.model.logit_scale.exp().reshape(())

    @property
    def bias(self) -> Tensor | None:
        found = getattr(self.model, "logit_bias", None)
        return None if found is None else found.reshape(())

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @property
    def image_size(self) -> int:
        """Side in pixels of the square pictures the preprocessing gives."""
        height, width = self.transform.crop or self.transform.size or (self.transform.side,) * 2
        return max(height, width)

    @property
    def max_tokens(self) -> int:
        """Longest caption in tokens, special ones included."""
        limit = int(self.anatomy.text.module.config.max_position_embeddings)
        told = getattr(self.tokenizer, "model_max_length", None)
        return min(limit, int(told)) if told else limit

    @property
    def id(self) -> str:
        """Name and a digest of weights, config and preprocessing: equal exactly if embeddings are."""
        digest = hashlib.blake2b(digest_size=8)
        config = _lasting(self.model.config.to_dict())
        digest.update(json.dumps([config, repr(self.transform)], sort_keys=True, default=str).encode())
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return f"{self.name}-{digest.hexdigest()}"

    def clone(self) -> Self:
        """An independent copy: changing one leaves the other as it is."""
        return type(self)(copy.deepcopy(self.model), self.tokenizer, self.transform, self.name, self.history)

    def __sklearn_clone__(self) -> Self:
        return self  # frozen model shared between folds; a ModelStep that wants a copy says so

    def record_step(self, slug: str, args: Mapping[str, Any], *, reshapes: bool = False) -> None:
        """Note that a step made this model what it is; saved with the weights.

        reshapes: the architecture is no longer what the config says, so `load` calls the step's `reshape` first. `slug` must
        then be a method's, and `args` what its constructor takes.
        """
        step = {"step": slug, "args": dict(args), **({"reshapes": True} if reshapes else {})}
        json.dumps(step)  # a step that cannot be written down must fail now, not when the model is saved
        self.history = (*self.history, step)

    def extra_repr(self) -> str:
        return f"name={self.name!r}, dim={self.dim}, steps={[step['step'] for step in self.history]}"

    # Inputs

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        return self.transform(images)

    def tokenize(self, texts: Sequence[str], overflow: Literal["error", "truncate"] = "truncate") -> Tokens:
        """Captions -> Tokens. `overflow` says what happens to captions beyond `max_tokens`: an error that names the first,
        or cutting them before their end-of-text token with a `TruncationWarning`."""
        return self._padded(self._ids(texts, overflow))

    def _ids(self, texts: Sequence[str], overflow: str) -> list[list[int]]:
        if self.tokenizer is None:
            raise LoadError(f"{self.name} has no tokenizer: load it from a folder that holds one, or pass tokenizer=")
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings, not one string")
        if not len(texts):
            return []
        # The tokenizer's own warning about length is ours to give, with the number of captions and the policy.
        ids: list[list[int]] = self.tokenizer(list(texts), padding=False, truncation=False, verbose=False)["input_ids"]
        if overflow == "windows":
            return ids
        return within_limit(ids, self.max_tokens, set(self.tokenizer.all_special_ids), overflow, self.name)

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tokens:
        """Rows of ids -> Tokens (B, longest), or as long as the tower reads where it was trained so."""
        ids, mask = pad(rows, self.pad_id, self.max_tokens if self.anatomy.text.padded else 0)
        return Tokens(torch.from_numpy(ids), torch.from_numpy(mask))

    @property
    def pad_id(self) -> int:
        """The token that fills captions up; 0 where the tokenizer names none."""
        found = getattr(self.tokenizer, "pad_token_id", None)
        return int(found) if found is not None else 0

    # Towers

    def images(
        self, pixels: Tensor, *, patches: bool = False, layers: Sequence[int] = (), normalize: bool = True
    ) -> Features:
        """(B, 3, H, W) normalised pixels -> Features; positions are interpolated for any size that holds whole patches.

        With `patches`, tokens (B, rows * columns, D) are the last layer's patches through the model's own norm and
        projection (for SigLIP: through its pooling head as if each patch were alone). `layers`: raw outputs of those blocks.
        """
        tower = self.anatomy.image
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels must be (B, 3, H, W), got {tuple(pixels.shape)}")
        height, width = pixels.shape[-2:]
        if height < tower.patch or width < tower.patch:
            raise ValueError(f"pixels of {height} x {width} hold no patch of {tower.patch} x {tower.patch}")
        native = getattr(tower.module.config, "image_size", None)
        options = tower.options(resized=(height, width) != (native, native), patches=patches or bool(layers))
        pooled_token = 0 if tower.prefix and not patches else None  # SigLIP's head reads every patch
        with outputs_of(tower.blocks, layers) as kept, self._last_block(tower, pooled_token):
            out = tower.module(pixel_values=pixels.to(self.device), **options)
        pooled = out.pooler_output if tower.projection is None else tower.projection(out.pooler_output)
        tokens = self.patch_tokens(out.last_hidden_state) if patches else None
        return Features(
            pooled=unit(pooled, dim=-1) if normalize else pooled,
            tokens=tokens,
            layers=kept,
            grid=(height // tower.patch, width // tower.patch) if patches or layers else None,
        )

    def patch_tokens(self, hidden: Tensor) -> Tensor:
        """Last hidden states (B, prefix + N, W) -> patches in the joint space (B, N, D)."""
        tower = self.anatomy.image
        hidden = hidden[:, tower.prefix :]
        if self.model.config.model_type == "siglip":  # normed already
            return siglip_token_pool(tower.module.head, hidden)
        if self.model.vision_model.config.model_type.startswith("clip"):  # CLIP norms only the pooled token itself
            assert tower.norm is not None
            hidden = tower.norm(hidden)
        assert tower.projection is not None
        return tower.projection(hidden)

    def texts(
        self, tokens: Tokens, *, words: bool = False, layers: Sequence[int] = (), normalize: bool = True
    ) -> Features:
        """Tokens (B, L) -> Features. Columns that are padding in every row are dropped first where that changes nothing."""
        tower = self.anatomy.text
        ids, mask = tokens.ids.to(self.device), tokens.mask.to(self.device)
        if ids.shape[1] > self.max_tokens:
            raise TextTooLong(f"{ids.shape[1]} tokens, {self.name} reads {self.max_tokens}")
        if not tower.padded and len(ids):
            longest = int(mask.sum(-1).max())
            ids, mask = ids[:, :longest], mask[:, :longest]
        pooled_token = None if words or not (tower.causal or tower.padded) else self._end(ids)
        with outputs_of(tower.blocks, layers) as kept, self._last_block(tower, pooled_token):
            # Causal towers pool at the end of text, which no padding reaches; SigLIP saw its padding in training.
            attention = {} if tower.causal or tower.padded else {"attention_mask": mask.long()}
            out = tower.module(input_ids=ids, **attention)
        pooled = out.pooler_output
        project = tower.projection if not tower.padded else None  # SigLIP's head has already been applied
        return Features(
            pooled=self._finish(pooled, project, normalize),
            tokens=None if not words else tower.projection(out.last_hidden_state) if tower.projection else None,
            layers=kept,
            mask=mask if words or layers else None,
        )

    @staticmethod
    def _last_block(tower: Tower, position: Tensor | int | None) -> AbstractContextManager[None]:
        return nullcontext() if position is None else last_block_at(tower.blocks, position, tower.causal)

    def _end(self, ids: Tensor) -> Tensor | int:
        """Where transformers pools a causal or padded text tower: SigLIP at the last position, CLIP at the end of text."""
        tower = self.anatomy.text
        if tower.padded:
            return ids.shape[1] - 1
        eos = tower.module.eos_token_id  # configs from before transformers 4.31 say 2 and mean the highest id
        return ids.argmax(-1) if eos == 2 else (ids == eos).int().argmax(-1)

    @staticmethod
    def _finish(pooled: Tensor, projection: nn.Module | None, normalize: bool) -> Tensor:
        pooled = pooled if projection is None else projection(pooled)
        return unit(pooled, dim=-1) if normalize else pooled

    # Pictures and strings to embeddings

    @torch.no_grad()
    def encode_images(
        self,
        images: Iterable[Any],
        batch_size: int = 32,
        *,
        workers: int = 2,
        decode: Decode | None = None,
        errors: dict[int, Exception] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Pictures, or paths to them, -> (N, D) float32 unit rows on the CPU, decoded in threads beside the model.

        decode: turns an item into a picture (default: pictures as they are, anything else opened as a file, in full), or
        "fast": the same, but large JPEGs decoded at a fraction of their size; several times as fast on photographs, and the
        embedding differs slightly. errors: if given, an item that fails is noted there under its position and its row is
        zero; otherwise the first failure is raised.
        progress: called with the number of items after each batch.
        """
        rows = encode_pictures(
            images,
            batch_size,
            transform=self.transform,
            dim=self.dim,
            run=self.encode_pixels,
            workers=workers,
            decode=decode,
            errors=errors,
            progress=progress,
        )
        return torch.from_numpy(rows)

    @torch.inference_mode()
    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """(B, 3, H, W) float32, as the transform gives it -> (B, D) float32 unit rows."""
        return self.images(torch.from_numpy(pixels)).pooled.float().cpu().numpy()

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], batch_size: int = 128, overflow: Overflow = "truncate") -> Tensor:
        """Captions -> (N, D) float32 unit rows on the CPU, in the order given.

        overflow: "error", "truncate" (warns), or "windows": a long caption is read in consecutive windows whose unit
        embeddings are averaged and made unit again.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings, not one string")
        ids = self._ids(texts, overflow)
        if overflow == "windows":
            parts, owner = windows(ids, self.max_tokens, set(self.tokenizer.all_special_ids))
            return torch.from_numpy(average_windows(self._encode_ids(parts, batch_size), owner, len(texts)))
        return torch.from_numpy(self._encode_ids(ids, batch_size))

    def _encode_ids(self, ids: list[list[int]], batch_size: int) -> np.ndarray:
        def run(rows: Sequence[Sequence[int]]) -> np.ndarray:
            with torch.inference_mode():
                return self.texts(self._padded(rows)).pooled.float().cpu().numpy()

        return encode_ids(ids, batch_size, self.dim, run)

    # Files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that both `load` and transformers open. It appears whole or not at all."""
        folder = Path(folder)
        require_own(folder, "config.json")
        with atomic_folder(folder, replace=True) as draft:
            with _no_bars():
                self.model.save_pretrained(draft)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(draft)
            _write_json(draft / "preprocessor_config.json", self.transform.to_processor())
            _write_json(draft / CARD, {"format": 1, "name": self.name, "id": self.id, "steps": list(self.history)})


def load(source: str | Path, *, activation: str | None = None, tokenizer: Any = None) -> HFEncoder:
    """Open an encoder.

    source: "offline" or "tiny"; a local Hugging Face or open_clip folder; an OpenAI or open_clip weight file (.pt, .bin,
    .safetensors); else a name on the Hugging Face hub. activation: "quick_gelu" or "gelu", for weight files that do not
    say which they were trained with (OpenAI's are known); contradicting what a config says is an error. tokenizer: a
    transformers tokenizer, for weight files that come without one. Raises LoadError.

    A folder that `export` or `compress` wrote gives an `ExportedEncoder`: the same answers, and nothing inside to train.
    """
    if isinstance(source, str) and source in BUILT_IN:
        from importlib import import_module

        module: Any = import_module(f"ecliptic.models.{source}")
        built: HFEncoder = module.load()
        return built
    path = Path(source)
    if (path / EXPORT_CARD).is_file():
        from ecliptic.core.exported import ExportedModel, ExportError
        from ecliptic.core.exported_encoder import ExportedEncoder

        try:
            exported: Any = ExportedEncoder(ExportedModel.open(path))
        except ExportError as error:
            raise LoadError(str(error)) from error
        return exported
    if path.is_dir():
        if (path / "open_clip_config.json").exists() and not _is_hf_folder(path):
            from ecliptic.core.convert import load_open_clip_folder

            return load_open_clip_folder(path, activation, tokenizer)
        return _load_folder(path, activation, tokenizer)
    if path.is_file():
        from ecliptic.core.convert import load_weight_file

        return load_weight_file(path, activation, tokenizer)
    if path.suffix in {".pt", ".pth", ".bin", ".safetensors"} or path.is_absolute() or str(source).startswith("."):
        raise LoadError(f"{source}: no such file or folder")
    return _load_hub(str(source), activation, tokenizer)


def _is_hf_folder(path: Path) -> bool:
    if not (path / "config.json").exists():
        return False
    return _read_json(path / "config.json").get("model_type") in _FAMILIES


def _load_folder(path: Path, activation: str | None, tokenizer: Any) -> HFEncoder:
    if not (path / "config.json").exists():
        raise LoadError(f"{path}: no config.json in it, so this is not a saved model")
    return _from_pretrained(str(path), activation, tokenizer, local=True)


def _load_hub(name: str, activation: str | None, tokenizer: Any) -> HFEncoder:
    if name.count("/") > 1 or not name.strip():
        raise LoadError(
            f"{name!r} is neither a file, a folder, a built-in ({', '.join(BUILT_IN)}) nor a hub name (owner/model)"
        )
    try:
        return _from_pretrained(name, activation, tokenizer, local=False)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise LoadError(
            f"{name!r} is no local folder and could not be fetched from the Hugging Face hub ({reason}). "
            f"Without a network use a local folder or a built-in: {', '.join(BUILT_IN)}"
        ) from error


def _from_pretrained(source: str, activation: str | None, tokenizer: Any, local: bool) -> HFEncoder:
    from importlib import import_module

    from transformers import AutoConfig, AutoTokenizer

    folder = Path(source)
    if not local or "ecliptic" in (folder / "config.json").read_text(encoding="utf-8", errors="replace"):
        import_module("ecliptic.core.towers")  # registers the towers of our own models with transformers
    config = AutoConfig.from_pretrained(source, local_files_only=local)
    if config.model_type not in _FAMILIES:
        raise LoadError(f"{source}: a {config.model_type} model has no two towers; supported: {', '.join(_FAMILIES)}")
    module, name = _FAMILIES[config.model_type]
    card = _read_json(folder / CARD) if local and (folder / CARD).exists() else {}
    family: Any = getattr(import_module(module), name)
    check_activation(config, source, activation)
    steps = [step for step in card.get("steps", ()) if step.get("reshapes")]
    try:
        with _no_bars():
            model, info = (_reshaped(family, steps, source) if steps else family).from_pretrained(
                source,
                output_loading_info=True,
                local_files_only=local,
                dtype=torch.float32,
                attn_implementation="sdpa",
            )
    except (RuntimeError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise LoadError(f"{source}: {error}") from error
    model.__class__ = family
    if missing := sorted(info["missing_keys"]):
        raise LoadError(f"{source}: the weights lack {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}")
    if wrong := info.get("mismatched_keys"):
        raise LoadError(f"{source}: shapes differ from the config in {sorted(str(key) for key in wrong)[:5]}")
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        except (OSError, ValueError, KeyError, TypeError):
            tokenizer = None  # images still work; tokenising says what is missing
    processor = _processor_config(source, local)
    label = card.get("name") or (folder.resolve().name if local else source)
    return HFEncoder(model, tokenizer, ImagePreprocess.from_processor(processor), label, card.get("steps", ()))


def _reshaped(family: Any, steps: Sequence[Mapping[str, Any]], source: str) -> Any:
    """A class that builds the family's model and then gives it the architecture of these steps, so that `from_pretrained`,
    with whatever it renames between files and modules, fills in their weights as well."""
    from ecliptic.core.method import MethodError, get

    made = []
    for step in steps:
        try:
            made.append(get(step["step"])(**step["args"]))
        except (MethodError, TypeError) as error:
            raise LoadError(f"{source} was given its architecture by a step that is not here: {error}") from error

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        family.__init__(self, config, *args, **kwargs)
        encoder: Encoder = HFEncoder(self, None, ImagePreprocess())
        for step in made:
            encoder = step.reshape(encoder)
        for module in self.modules():  # transformers must not start weights that may no longer be what it expects
            module._is_hf_initialized = not module._non_persistent_buffers_set

    return type(family.__name__, (family,), {"__init__": build, "__module__": family.__module__})


def _processor_config(source: str, local: bool) -> dict[str, Any]:
    if local:
        for name in ("preprocessor_config.json", "processor_config.json"):
            if (Path(source) / name).exists():
                return _read_json(Path(source) / name)
        raise LoadError(f"{source}: no preprocessor_config.json, so how to prepare pictures is unknown")
    from huggingface_hub import hf_hub_download

    return _read_json(Path(hf_hub_download(source, "preprocessor_config.json")))


def check_activation(config: Any, source: str, activation: str | None) -> None:
    """A model run with the wrong GELU answers plausibly and worse: refuse contradictions instead.

    OpenAI's published CLIP weights are known to use quick_gelu whatever a converted config says.
    """
    towers: list[Any] = [getattr(config, name, None) for name in ("vision_config", "text_config")]
    said = {tower.hidden_act for tower in towers if getattr(tower, "hidden_act", None)}
    if activation is not None and config.model_type == "clip" and said != {activation}:
        raise LoadError(f"{source}: its config says {sorted(said)}, you said {activation!r}: one of the two is wrong")
    name = str(getattr(config, "_name_or_path", "") or source)
    if config.model_type == "clip" and "openai/clip" in name.replace("\\", "/") and said != {"quick_gelu"}:
        raise LoadError(f"{source}: OpenAI's CLIP was trained with quick_gelu, its config says {sorted(said)}")


# Small parts


def _lasting(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what merely says where and how this copy was made."""
    passing = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
    return {
        key: _lasting(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in passing
    }


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers draws a progress bar even for weights that open in milliseconds; ours are drawn where the work is long."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LoadError(f"{path}: not valid JSON ({error})") from error
    return found


def _write_json(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
