"""Write an encoder as ONNX, held to the encoder's own answers before it counts.

Both towers end in unit rows, so cosines need no further work. Graphs hold standard operators of opset 17 only, float32, with
any batch size; captions have any length where attention is causal or masked, and the tower's full length where it was trained
on padding (SigLIP). The image tower takes pictures of the size that its preprocessing gives; a second graph over the same
weights gives their patches too.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize as unit

from ecliptic.core.exported import EXPORT_CARD, FORMAT, PATCHES, ExportedModel, ExportError
from ecliptic.core.files import atomic_folder, require_own
from ecliptic.core.inputs import TruncationWarning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ecliptic.core.encoder import HFEncoder

OPSET = 17
TOLERANCE = (
    1e-4  # largest difference of any component of a unit row; ours, some 100 times what float32 rounding makes of it
)
CAPTIONS = (
    "",
    "a cat",
    "A photo of a small dog, and a red ball!",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich; 敏捷的棕色狐狸 🦊",
    " ".join(f"{number} blue squares left of a green circle," for number in range(40)),  # longer than most towers read
)


@dataclass(frozen=True)
class Parity:
    """How far the exported towers are from torch: largest absolute difference of any component over the samples.

    patches: of their unit rows; None where they were left out.
    """

    images: float
    texts: float
    patches: float | None
    pictures: int
    captions: int


def export(
    encoder: HFEncoder,
    folder: str | Path,
    *,
    pictures: Sequence[Image.Image] | None = None,
    captions: Sequence[str] = CAPTIONS,
    patches: bool = True,
) -> Parity:
    """Write `encoder` to `folder` for `ecliptic.load` or `ExportedModel.open`; the folder appears whole or not at all.

    pictures, captions: samples on which the export must agree with the encoder (default: some of ours), token for token and
    to 1e-4 in every component. patches: also write the graph that heat maps need. Raises ExportError where the two do not
    agree, or where the encoder cannot be exported at all.
    """
    _require("onnx", "onnxruntime")
    folder = Path(folder)
    require_own(folder, EXPORT_CARD)
    if encoder.tokenizer is None or not getattr(encoder.tokenizer, "is_fast", False):
        raise ExportError(f"{encoder.name}: its tokenizer has no tokenizer.json form, so captions could not be read")
    if {value.dtype for value in encoder.parameters()} != {torch.float32}:
        raise ExportError(f"{encoder.name} is not in float32: convert it with .float() first")
    if encoder.device.type != "cpu":
        encoder = encoder.clone().cpu()
    with atomic_folder(folder, replace=True) as draft, _evaluating(encoder):
        card = _card(encoder, patches)
        encoder.tokenizer.backend_tokenizer.save(str(draft / "tokenizer.json"))
        _write_json(draft / "preprocessor_config.json", encoder.transform.to_processor())
        _write_json(draft / EXPORT_CARD, card)
        _write_towers(encoder, draft, patches)
        parity = _compare(encoder, ExportedModel.open(draft), samples() if pictures is None else pictures, captions)
        _write_json(draft / EXPORT_CARD, {**card, "parity": asdict(parity)})
    return parity


@torch.no_grad()
def _card(encoder: HFEncoder, patches: bool) -> dict[str, Any]:
    tower = encoder.anatomy.text
    return {
        "format": FORMAT,
        "id": encoder.id,
        "name": encoder.name,
        "dim": encoder.dim,
        "scale": float(encoder.scale),
        "bias": None if encoder.bias is None else float(encoder.bias),
        "steps": list(encoder.history),
        "image": {"size": _size(encoder), "patch": encoder.anatomy.image.patch if patches else None},
        "text": {
            "tokens": encoder.max_tokens,
            "fill": encoder.max_tokens if tower.padded else 0,
            "pad": encoder.pad_id,
            "special": sorted(encoder.tokenizer.all_special_ids),
            "mask": not (tower.causal or tower.padded),
        },
        "opset": OPSET,
        "versions": {name: version(name) for name in ("ecliptic", "torch", "transformers", "onnx", "onnxruntime")},
    }


class _Pictures(nn.Module):
    """(B, 3, H, W) -> (B, D) unit rows, and with `patches` (B, N, D) too: `HFEncoder.images` as one traceable function."""

    def __init__(self, encoder: HFEncoder, patches: bool):
        super().__init__()
        self.encoder = encoder
        self.patches = patches

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        tower = self.encoder.anatomy.image
        found = tower.module(pixel_values=pixels, **tower.options(resized=False, patches=self.patches))
        pooled = found.pooler_output
        rows = unit(pooled if tower.projection is None else tower.projection(pooled), dim=-1)
        return (rows, self.encoder.patch_tokens(found.last_hidden_state)) if self.patches else rows


class _Captions(nn.Module):
    """ids (B, L), and mask (B, L) int64 for towers that read one -> (B, D) unit rows: what `HFEncoder.texts` pools."""

    def __init__(self, encoder: HFEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        tower = self.encoder.anatomy.text
        pooled = tower.module(input_ids=ids, **({} if mask is None else {"attention_mask": mask})).pooler_output
        # SigLIP's head, which `projection` names too, has already been applied.
        return unit(pooled if tower.padded or tower.projection is None else tower.projection(pooled), dim=-1)


def _size(encoder: HFEncoder) -> list[int]:
    """Height and width of the pictures that the preprocessing gives; ExportError where the tower was not made for them."""
    height, width = encoder.transform.crop or encoder.transform.size or (encoder.image_size,) * 2
    native = getattr(encoder.anatomy.image.module.config, "image_size", None)
    if native is not None and (height, width) != (native, native):
        raise ExportError(
            f"{encoder.name} prepares pictures of {height} x {width} for a tower of {native} x {native}; "
            "only a tower's own size can be exported"
        )
    return [height, width]


def _write_towers(encoder: HFEncoder, folder: Path, patches: bool) -> None:
    tower = encoder.anatomy.text
    tokens = encoder.tokenize(["a cat on a mat", "a dog"])
    inputs = (tokens.ids,) if tower.causal or tower.padded else (tokens.ids, tokens.mask.long())
    names = ["ids", "mask"][: len(inputs)]
    length = {} if tower.padded else {1: "length"}
    _trace(_Captions(encoder), inputs, folder / "text.onnx", names, {name: {0: "batch", **length} for name in names})
    pixels = torch.zeros(2, 3, *_size(encoder))
    _trace(
        _Pictures(encoder, patches),
        (pixels,),
        folder / "image.onnx",
        ["pixels"],
        {"pixels": {0: "batch"}},
        ("rows", "patches") if patches else ("rows",),
    )


def _trace(
    tower: nn.Module,
    inputs: tuple[Tensor, ...],
    path: Path,
    names: list[str],
    free: dict[str, dict[int, str]],
    outputs: tuple[str, ...] = ("rows",),
) -> None:
    """Write one tower, as `write_graphs` does."""
    import onnx

    raw = path.with_name("raw")
    raw.mkdir()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the tracer's, on shapes it takes for constants: parity is measured below
            torch.onnx.export(
                tower.eval(),
                inputs,
                str(raw / path.name),
                dynamo=False,
                opset_version=OPSET,
                input_names=names,
                output_names=list(outputs),
                dynamic_axes={**free, **{name: {0: "batch"} for name in outputs}},
            )
        graph = onnx.load(raw / path.name)
    except Exception as error:  # anything at all comes out of a tracer
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ExportError(f"the tower for {path.name} cannot be exported: {reason}") from error
    write_graphs(graph, path)
    shutil.rmtree(raw)


def write_graphs(graph: Any, path: Path) -> None:
    """Write an ONNX model; its weights go into `<path>.data`, which ONNX Runtime maps into memory instead of reading it.

    One that has an output "patches" too is written twice over the same weights: `patches.onnx` beside `path` gives all that
    it gives, `path` itself only "rows" and what they need, which in a model of several backbones may be much less.
    """
    import onnx

    whole = path.with_name(PATCHES) if len(graph.graph.output) > 1 else path
    onnx.save_model(graph, whole, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
    if whole != path:
        light = onnx.load(whole, load_external_data=False)
        names = [value.name for value in light.graph.input]
        onnx.save_model(onnx.utils.Extractor(light).extract_model(names, ["rows"]), path)


def _compare(
    encoder: HFEncoder, exported: ExportedModel, pictures: Sequence[Image.Image], captions: Sequence[str]
) -> Parity:
    if repr(exported.transform) != repr(encoder.transform):
        raise ExportError(f"{encoder.name}: its transform {encoder.transform} cannot be written down")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        theirs = encoder.tokenizer(list(captions), padding=False, truncation=False, verbose=False)["input_ids"]
        if exported.token_ids(captions, "windows") != theirs:
            raise ExportError(f"{encoder.name}: tokenizer.json does not give the tokenizer's own ids")
        texts = _distance(encoder.encode_texts(captions).numpy(), exported.encode_texts(captions))
    images = _distance(encoder.encode_images(pictures).numpy(), exported.encode_images(pictures))
    patches = _patch_distance(encoder, exported, pictures) if exported.patch else None
    for what, found in (("pictures", images), ("captions", texts), ("patches", patches or 0.0)):
        if not found <= TOLERANCE:  # NaN too
            raise ExportError(
                f"{encoder.name}: exported, its {what} differ by {found:.1e} from torch's (at most {TOLERANCE:.0e} is "
                "allowed): nothing was written"
            )
    return Parity(images, texts, patches, len(pictures), len(captions))


def _patch_distance(encoder: HFEncoder, exported: ExportedModel, pictures: Sequence[Image.Image]) -> float:
    pixels = encoder.preprocess(pictures)
    with torch.inference_mode():
        theirs = encoder.images(pixels, patches=True).tokens
    assert theirs is not None
    ours = torch.from_numpy(exported.encode_patches(pixels.numpy())[1])
    return _distance(unit(theirs, dim=-1).numpy(), unit(ours, dim=-1).numpy())


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max(initial=0.0))


def samples() -> list[Image.Image]:
    """Pictures of several shapes with edges, gradients and grain, the same every time."""
    rng = np.random.default_rng(0)
    found = []
    for width, height in ((333, 222), (200, 301), (64, 64), (640, 480)):
        cells = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        smooth = np.asarray(cells.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        blocks = np.asarray(cells.resize((width, height), Image.Resampling.NEAREST), np.float32)
        grain = rng.normal(0, 8, (height, width, 3))
        found.append(Image.fromarray(np.clip(0.5 * smooth + 0.5 * blocks + grain, 0, 255).astype(np.uint8)))
    return found


@contextmanager
def _evaluating(encoder: HFEncoder) -> Iterator[None]:
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _require(*packages: str) -> None:
    from importlib.util import find_spec

    for name in packages:
        if find_spec(name) is None:
            raise ImportError(f'exporting needs {name}: pip install "ecliptic[export]"')


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
