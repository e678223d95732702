"""A model made small and fast for a CPU, and a report of what that cost, measured on the user's own pictures."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ecliptic.apps.naming import usual_templates
from ecliptic.core.contracts import Record
from ecliptic.core.export import CAPTIONS, export, samples
from ecliptic.core.exported import EXPORT_CARD, RUNTIMES, ExportedModel
from ecliptic.core.exported_encoder import ExportedEncoder
from ecliptic.core.files import atomic_folder, require_own
from ecliptic.core.inputs import TruncationWarning
from ecliptic.core.int8 import FLOOR, Activations, Quantised, mean_cosine, quantise_export
from ecliptic.core.zeroshot import class_prompts, zero_shot_head
from ecliptic.data.images import ImageError
from ecliptic.data.records import unit_hash

if TYPE_CHECKING:
    from ecliptic.core.encoder import HFEncoder
    from ecliptic.data.records import Records

REPORT = ("parity.json", "parity.md")
CALIBRATION, JUDGED, BATCH = 32, 256, 8  # pictures that set ranges, pictures that judge, and pictures at a time; ours
ROUNDS = 3
SUBJECTS = (
    "dog, cat, horse, bird, tree, flower, mountain, river, street, house, car, bicycle, train, boat, aeroplane, person, child, "
    "hand, face, table, chair, cup, bottle, apple, book, phone, clock, lamp, window, shoe, hat, ball, guitar, painting, sign"
)
SENTENCES = (  # of the lengths and kinds in which people describe pictures; ours
    "{}",
    "a photo of a {}.",
    "a close-up of an old {} on a wooden table",
    "two people are standing next to a {} in front of a large building on a sunny day",
)


@dataclass(frozen=True)
class Compressed:
    """What `compress` made, before against after. Rates are of prepared pictures, and of captions as strings.

    bytes: weights before, folder after. cosine_*: to the original's embeddings, mean and lowest, over pictures (captions) that
    set no range where there were enough. accuracy: zero-shot, over the labelled pictures, or None. agreement: share of these
    pictures that get the same name from both. float32: names of layers left as they were. own: whether pictures were the user's.
    """

    folder: Path
    model: str
    source: str
    runtime: str
    activations: str | None
    bytes: tuple[int, int]
    images_per_second: tuple[float, float]
    captions_per_second: tuple[float, float]
    cosine_images: tuple[float, float]
    cosine_captions: tuple[float, float]
    pictures: int
    captions: int
    unseen: bool
    own: bool
    classes: int
    accuracy: tuple[float, float] | None
    agreement: float | None
    float32: tuple[str, ...]
    unreadable: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}

    def __str__(self) -> str:
        def rates(what: str, pair: tuple[float, float]) -> str:
            return f"| {what} | {pair[0]:,.1f} | {pair[1]:,.1f} | {pair[1] / pair[0]:.2f}x |"

        what = "their own" if self.own else "a few built-in"
        lines = [
            f"# {self.model}",
            "",
            f"From {self.source}; runs on {self.runtime}"
            + ("" if self.activations is None else f", 8 bits, {self.activations} ranges")
            + f". Measured on {self.pictures:,} pictures ({what}"
            + ("" if self.unseen or self.activations != "static" else ", which also set the ranges")
            + f") and {self.captions:,} captions.",
            "",
            "| | before | after | |",
            "|---|---|---|---|",
            f"| size | {self.bytes[0] / 1e6:,.0f} MB | {self.bytes[1] / 1e6:,.0f} MB | {self.bytes[1] / self.bytes[0]:.0%} |",
            rates("images/s", self.images_per_second),
            rates("captions/s", self.captions_per_second),
            f"| cosine to before, pictures | 1 | {self.cosine_images[0]:.4f} | lowest {self.cosine_images[1]:.4f} |",
            f"| cosine to before, captions | 1 | {self.cosine_captions[0]:.4f} | lowest {self.cosine_captions[1]:.4f} |",
        ]
        if self.accuracy is not None:
            lines.append(
                f"| zero-shot accuracy, {self.classes} classes | {self.accuracy[0]:.1%} | {self.accuracy[1]:.1%} "
                f"| same name for {self.agreement:.1%} |"
            )
        if self.float32:
            lines += ["", f"Left in float32, because 8 bits cost them too much: {', '.join(self.float32)}."]
        return "\n".join(lines) + "\n"


def compress(
    encoder: HFEncoder,
    out: str | Path,
    *,
    int8: bool = True,
    calibrate: Records | None = None,
    runtime: str | None = None,
    floor: float = FLOOR,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Compressed:
    """Write `encoder` to `out` for ONNX Runtime or OpenVINO, in 8 bits if `int8`, and measure what changed.

    calibrate: pictures of the kind the model will see, with labels or captions if there are any: a few set the ranges of
    activations, others judge. Without them ranges are taken anew from every batch, and the judging is on a few built-in
    pictures. runtime: what the folder is for (default: OpenVINO where it is installed, which was faster wherever we measured;
    ONNX Runtime otherwise); either opens it. floor: mean cosine to the original that each tower keeps at least; layers that
    stand against it stay in float32. The folder also holds the report. Raises ExportError where the model cannot be exported,
    ValueError for settings or data that do not make sense.
    """
    out = Path(out)
    require_own(out, EXPORT_CARD)
    chosen = runtime or ("openvino" if find_spec("openvino") else "onnxruntime")
    if chosen not in RUNTIMES:
        raise ValueError(f"runtime={chosen!r}: choose {' or '.join(RUNTIMES)}")
    if find_spec(chosen) is None:
        raise ImportError(
            f'{chosen} is not installed: pip install "ecliptic[{chosen.replace("onnxruntime", "search")}]"'
        )
    progress("reading pictures")
    own, judges, unseen, unreadable = _pictures(encoder, calibrate, seed)
    classes = list(dict.fromkeys(record["label"] for record in own + judges if record.get("label")))
    captions = _captions(encoder, own + judges, classes)
    activations: Activations | None = ("static" if calibrate is not None else "dynamic") if int8 else None
    found: dict[str, Quantised] = {}
    with tempfile.TemporaryDirectory() as scratch:
        progress("exporting")
        plain = Path(scratch, "float32")
        export(encoder, plain)
        made = plain
        if activations is not None:
            made = Path(scratch, "int8")
            found = quantise_export(
                plain,
                made,
                _pixels(encoder, own),
                _token_batches(plain, captions[::2]),  # the others judge
                activations=activations,
                floor=floor,
                progress=progress,
            )
        card = json.loads((made / EXPORT_CARD).read_text(encoding="utf-8"))
        (made / EXPORT_CARD).write_text(
            json.dumps({**card, "runtime": chosen}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        progress("measuring")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)  # some samples are longer than any tower reads
            measured = _measure(encoder, made, judges, captions[1::2], classes)
        told = Compressed(
            **measured,
            folder=out,
            activations=activations,
            unseen=unseen,
            own=calibrate is not None,
            float32=tuple(name for tower in found.values() for name in tower.kept),
            unreadable=tuple(unreadable),
        )
        (made / REPORT[0]).write_text(json.dumps(told.to_json(), indent=2) + "\n", encoding="utf-8")
        (made / REPORT[1]).write_text(str(told), encoding="utf-8")
        with atomic_folder(out, replace=True) as draft:
            shutil.copytree(made, draft, dirs_exist_ok=True)
    return told


# Samples


def _pictures(
    encoder: HFEncoder, source: Records | None, seed: int
) -> tuple[list[Record], list[Record], bool, list[tuple[str, str]]]:
    """Records that set ranges, records that judge, whether these are others, and what could not be read.

    Pictures are kept as the model sees them, `pixels` (H, W, 3) in bytes: whole photographs would fill the memory.
    """
    resized = encoder.transform.resized
    if source is None:
        found = [{"pixels": resized(picture)} for picture in samples()]
        return found, found, False, []
    ids = source.column("id")
    order = sorted(range(len(source)), key=lambda i: unit_hash(seed, ids[i]))
    read: list[Record] = []
    bad: list[tuple[str, str]] = []
    for i in order:
        if len(read) == CALIBRATION + JUDGED:
            break
        try:
            record = source[i]
            kept = {key: record[key] for key in ("label", "caption") if record.get(key)}
            read.append({**kept, "pixels": resized(record["image"])})
        except ImageError as error:
            bad.append((error.path or str(i), error.reason))
    if not read:
        raise ValueError("none of the pictures to calibrate with could be read")
    if len(read) < 2 * BATCH:
        return read, read, False, bad
    cut = min(CALIBRATION, len(read) // 2)
    return read[:cut], read[cut:], True, bad


def _captions(encoder: HFEncoder, records: Sequence[Record], classes: Sequence[str]) -> list[str]:
    """The user's captions, their class names in the usual sentences, and enough of ours to see what sentences do."""
    theirs = [record["caption"] for record in records if isinstance(record.get("caption"), str)]
    named = class_prompts(classes, usual_templates(encoder)) if classes else []
    ours = [sentence.replace("{}", subject) for subject in SUBJECTS.split(", ") for sentence in SENTENCES]
    return list(dict.fromkeys([*theirs, *named, *CAPTIONS, *ours]))[: CALIBRATION + JUDGED]


def _token_batches(folder: Path, captions: Sequence[str]) -> list[dict[str, np.ndarray]]:
    """Captions as the text tower takes them, those of like length together."""
    model = ExportedModel.open(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        rows = sorted(model.token_ids(captions), key=len)
    return [model.text_feeds(part) for part in _batches(rows, BATCH)]


def _pixels(encoder: HFEncoder, records: Sequence[Record]) -> list[np.ndarray]:
    """Batches (B, 3, H, W) float32."""
    batches = _batches([record["pixels"] for record in records], BATCH)
    return [encoder.transform.normalise(np.stack(batch)) for batch in batches]


def _batches(items: Sequence[Any], size: int) -> list[list[Any]]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


# Measuring


def _measure(
    encoder: HFEncoder, folder: Path, judges: Sequence[Record], captions: Sequence[str], classes: Sequence[str]
) -> dict[str, Any]:
    """The fields of `Compressed` that are measured."""
    after = ExportedEncoder(ExportedModel.open(folder))
    sides: list[Any] = [encoder, after]
    batches = _pixels(encoder, judges)
    rows = [torch.from_numpy(np.concatenate([side.encode_pixels(batch) for batch in batches])) for side in sides]
    texts = [side.encode_texts(captions) for side in sides]
    pixels = batches[0]
    some = _repeated(captions, 8 * BATCH)
    labelled = [i for i, record in enumerate(judges) if record.get("label")]
    accuracy = agreement = None
    if len(classes) > 1 and labelled:
        truth = torch.tensor([classes.index(judges[i]["label"]) for i in labelled])
        heads = [zero_shot_head(side, classes, usual_templates(encoder)) for side in sides]
        named = [(row[labelled] @ head.T).argmax(-1) for row, head in zip(rows, heads, strict=True)]
        accuracy = tuple(float((answer == truth).float().mean()) for answer in named)
        agreement = float((named[0] == named[1]).float().mean())
    weights = sum(value.numel() * value.element_size() for value in encoder.state_dict().values())
    return {
        "model": after.id,
        "source": encoder.id,
        "runtime": after.exported.runtime,
        "bytes": (weights, sum(file.stat().st_size for file in folder.iterdir())),
        "images_per_second": _rates(len(pixels), *(lambda s=side: s.encode_pixels(pixels) for side in sides)),
        "captions_per_second": _rates(len(some), *(lambda s=side: s.encode_texts(some) for side in sides)),
        "cosine_images": _cosines(*rows),
        "cosine_captions": _cosines(*texts),
        "pictures": len(judges),
        "captions": len(captions),
        "classes": len(classes),
        "accuracy": accuracy,
        "agreement": agreement,
    }


def _rates(items: int, *calls: Callable[[], Any]) -> tuple[float, float]:
    """Items per second of two systems that take turns: each after one unmeasured call, the median of some rounds."""
    spent: list[list[float]] = [[], []]
    for turn in range(-1, ROUNDS):
        for side, call in zip(spent, calls, strict=True):
            start = time.perf_counter()
            call()
            if turn >= 0:
                side.append(time.perf_counter() - start)
    before, after = (items / statistics.median(side) for side in spent)
    return before, after


def _cosines(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    each = (a * b).sum(-1)
    return mean_cosine(a.numpy(), b.numpy()), float(each.min())


def _repeated(items: Sequence[Any], count: int) -> list[Any]:
    return [items[i % len(items)] for i in range(count)]
