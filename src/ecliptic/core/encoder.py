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
import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.functional import normalize as unit

from ecliptic.core.anatomy import Anatomy, Tower, anatomy, outputs_of, siglip_token_pool
from ecliptic.core.contracts import Features, Tokens
from ecliptic.core.files import atomic_folder
from ecliptic.core.preprocess import ImagePreprocess
from ecliptic.core.shortcut import last_block_at

Overflow = Literal["error", "truncate", "windows"]
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


class TextTooLong(ValueError):
    """A caption has more tokens than the text tower reads."""


class TruncationWarning(UserWarning):
    """Captions were cut to the text tower's limit (their end-of-text token was kept)."""


class Encoder(nn.Module):
    """Two towers into one space. `images` and `texts` take tensors; what stands around them takes pictures and strings."""

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

    def record_step(self, slug: str, args: Mapping[str, Any]) -> None:
        """Note that a step made this model what it is; saved with the weights."""
        step = {"step": slug, "args": dict(args)}
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
        return _pad(self._ids(texts, overflow), self._pad_id, self.max_tokens if self.anatomy.text.padded else 0)

    def _ids(self, texts: Sequence[str], overflow: str) -> list[list[int]]:
        if self.tokenizer is None:
            raise LoadError(f"{self.name} has no tokenizer: load it from a folder that holds one, or pass tokenizer=")
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings, not one string")
        if not len(texts):
            return []
        limit = self.max_tokens
        # The tokenizer's own warning about length is ours to give, with the number of captions and the policy.
        ids: list[list[int]] = self.tokenizer(list(texts), padding=False, truncation=False, verbose=False)["input_ids"]
        long = [i for i, row in enumerate(ids) if len(row) > limit]
        if not long:
            return ids
        if overflow == "error":
            raise TextTooLong(
                f"caption {long[0]} has {len(ids[long[0]])} tokens, {self.name} reads {limit}: "
                'shorten it, or choose overflow="truncate" or "windows"'
            )
        if overflow != "truncate":
            raise ValueError(f'overflow must be "error" or "truncate" here, not {overflow!r}')
        warnings.warn(f"{len(long)} of {len(ids)} captions cut to {limit} tokens", TruncationWarning, stacklevel=3)
        for i in long:
            ids[i] = self._cut(ids[i], limit)
        return ids

    def _cut(self, ids: list[int], limit: int) -> list[int]:
        """Keep the special tokens at the end: pooling reads them, and losing them costs accuracy silently."""
        special = set(self.tokenizer.all_special_ids)
        tail = next((n for n in range(len(ids)) if ids[len(ids) - 1 - n] not in special), 0)
        return ids[: limit - tail] + (ids[len(ids) - tail :] if tail else [])

    @property
    def _pad_id(self) -> int:
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
        tokens = self._patch_tokens(out.last_hidden_state) if patches else None
        return Features(
            pooled=unit(pooled, dim=-1) if normalize else pooled,
            tokens=tokens,
            layers=kept,
            grid=(height // tower.patch, width // tower.patch) if patches or layers else None,
        )

    def _patch_tokens(self, hidden: Tensor) -> Tensor:
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
        decode: Callable[[Any], Image.Image] | None = None,
        errors: dict[int, Exception] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Pictures, or paths to them, -> (N, D) float32 unit rows on the CPU, decoded in threads beside the model.

        decode: turns an item into a picture (default: pictures as they are, anything else opened as a file). errors: if given,
        an item that fails is noted there under its position and its row is zero; otherwise the first failure is raised.
        progress: called with the number of items after each batch.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        read = decode or open_picture
        failed: dict[int, Exception] = {}
        rows: list[Tensor] = []

        def prepare(item: Any) -> np.ndarray:
            return self.transform.resized(read(item))

        for start, batch in _batches(_ahead(prepare, images, workers, 4 * batch_size), batch_size):
            arrays = [array for array in batch if not isinstance(array, Exception)]
            for offset, array in enumerate(batch):
                if isinstance(array, Exception):
                    if errors is None:
                        raise array
                    failed[start + offset] = array
            block = torch.zeros(len(batch), self.dim)
            if arrays:
                kept = [offset for offset, array in enumerate(batch) if not isinstance(array, Exception)]
                with torch.inference_mode():
                    pixels = torch.from_numpy(self.transform.normalise(np.stack(arrays)))
                    pooled = self.images(pixels).pooled.float().cpu()
                block[kept] = pooled  # copied, so that what leaves is an ordinary tensor, usable under autograd
            rows.append(block)
            if progress is not None:
                progress(len(batch))
        if errors is not None:
            errors.update(failed)
        return torch.cat(rows) if rows else torch.empty(0, self.dim)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], batch_size: int = 128, overflow: Overflow = "truncate") -> Tensor:
        """Captions -> (N, D) float32 unit rows on the CPU, in the order given.

        overflow: "error", "truncate" (warns), or "windows": a long caption is read in consecutive windows whose unit
        embeddings are averaged and made unit again.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings, not one string")
        if overflow == "windows":
            ids, owner = self._windows(texts)
            embedded = self._encode_ids(ids, batch_size)
            total = torch.zeros(len(texts), self.dim).index_add_(0, torch.tensor(owner, dtype=torch.long), embedded)
            return unit(total, dim=-1)
        return self._encode_ids(self._ids(texts, overflow), batch_size)

    def _encode_ids(self, ids: list[list[int]], batch_size: int) -> Tensor:
        # Equal captions once, the rest in order of length: batches then hold hardly any padding.
        unique = sorted({tuple(row) for row in ids}, key=lambda row: (len(row), row))
        place = {row: i for i, row in enumerate(unique)}
        fill = self.max_tokens if self.anatomy.text.padded else 0
        found = torch.empty(len(unique), self.dim)
        for start, rows in _by_length(unique, batch_size):
            with torch.inference_mode():
                pooled = self.texts(_pad(rows, self._pad_id, fill)).pooled.float().cpu()
            found[start : start + len(rows)] = pooled  # copied, so that what leaves is usable under autograd
        return found[[place[tuple(row)] for row in ids]]

    def _windows(self, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """Token ids of every window, and which text each belongs to. Special tokens surround each window."""
        if self.tokenizer is None:
            raise LoadError(f"{self.name} has no tokenizer: load it from a folder that holds one, or pass tokenizer=")
        ids, owner = [], []
        special = set(self.tokenizer.all_special_ids)
        for i, row in enumerate(
            self.tokenizer(list(texts), padding=False, truncation=False, verbose=False)["input_ids"]
        ):
            head = next((n for n, token in enumerate(row) if token not in special), len(row))
            tail = (
                next((n for n, token in enumerate(reversed(row)) if token not in special), 0) if head < len(row) else 0
            )
            body, room = row[head : len(row) - tail], self.max_tokens - head - tail
            for start in range(0, max(len(body), 1), room):
                ids.append(row[:head] + body[start : start + room] + (row[len(row) - tail :] if tail else []))
                owner.append(i)
        return ids, owner

    # Files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that both `load` and transformers open. It appears whole or not at all."""
        folder = Path(folder)
        if folder.exists() and not (folder / "config.json").exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} holds other files: choose an empty folder")
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
    """
    if isinstance(source, str) and source in BUILT_IN:
        from importlib import import_module

        module: Any = import_module(f"ecliptic.models.{source}")
        built: HFEncoder = module.load()
        return built
    path = Path(source)
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
    try:
        with _no_bars():
            model, info = family.from_pretrained(
                source,
                output_loading_info=True,
                local_files_only=local,
                dtype=torch.float32,
                attn_implementation="sdpa",
            )
    except (RuntimeError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise LoadError(f"{source}: {error}") from error
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


def _pad(rows: Sequence[Sequence[int]], pad: int, fill: int = 0) -> Tokens:
    """Rows of ids -> Tokens (B, longest), or (B, fill) if that is longer."""
    longest = max([fill, *(len(row) for row in rows)])
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = True
    return Tokens(ids, mask)


def _by_length(rows: Sequence[tuple[int, ...]], size: int) -> Iterator[tuple[int, Sequence[tuple[int, ...]]]]:
    """Cut rows sorted by length into batches: at most `size` rows, and from 16 rows on no more than a token of padding each."""
    start = 0
    for end in range(1, len(rows) + 1):
        full = end - start >= size
        longer = end < len(rows) and end - start >= 16 and len(rows[end]) > len(rows[start]) + 1
        if full or longer or end == len(rows):
            yield start, rows[start:end]
            start = end


def open_picture(item: Any) -> Image.Image:
    """A picture as it is, anything else opened as a file: upright, in RGB, on white where it is transparent.

    `ecliptic.data.images.open_image` does the same for files of any quality; pass it as `decode`.
    """
    if isinstance(item, Image.Image):
        return item
    with Image.open(item) as image:
        upright = ImageOps.exif_transpose(image)
        if not upright.has_transparency_data:
            return upright.convert("RGB")
        upright = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")


def _ahead(work: Callable[[Any], Any], items: Iterable[Any], workers: int, bound: int) -> Iterator[Any]:
    """work(item) for each item in order, computed in threads at most `bound` items ahead; failures come as the exception."""
    if workers < 1:
        for item in items:
            yield _attempt(work, item)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Any]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(_attempt, work, item))
                if len(waiting) >= bound:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _attempt(work: Callable[[Any], Any], item: Any) -> Any:
    try:
        return work(item)
    except Exception as error:
        return error


def _batches(items: Iterable[Any], size: int) -> Iterator[tuple[int, list[Any]]]:
    """(position of the first item, items) for consecutive runs of `size`."""
    start, batch = 0, []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield start, batch
            start, batch = start + size, []
    if batch:
        yield start, batch


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
