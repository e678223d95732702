"""Out of distribution: pictures of the known classes against pictures of none of them.

A subject gives each picture scores that say how much it looks known. How well a score orders the two kinds is its AUROC, known
being positive, and its FPR at 95 % TPR; how good a decision without any threshold is, its balanced accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ecliptic.eval import metrics
from ecliptic.eval.report import FRACTION, BarChart, Gallery, Number, Report, Section, Table
from ecliptic.eval.subjects import Skipped, Thumbnails, as_records, batches, encode, readable, values
from ecliptic.eval.zero_shot import SHOWN, class_words

if TYPE_CHECKING:
    from torch import Tensor

    from ecliptic.core.contracts import Predictor, Record
    from ecliptic.core.encoder import HFEncoder
    from ecliptic.data.records import Records

TPR = 0.95  # the level usual since arXiv 1610.02136
TRAINING_FREE = ("msp", "max_logit", "energy", "mcm")
"""What every subject with class scores is judged by; see `ecliptic.ops.ood_scores`."""


@runtime_checkable
class ScoresTheUnknown(Protocol):
    """A predictor with scores of its own for how much a picture looks like one of its classes; `ood` asks for them."""

    def ood_scores(self, pixels: Tensor) -> Mapping[str, Tensor]:
        """Pixels (B, 3, H, W) -> by name (B,), higher is more like a known class. Any scale: only their order is judged."""
        ...


@runtime_checkable
class RefusesTheUnknown(Protocol):
    """A predictor that decides by itself whether a picture is of one of its classes, with no threshold to set."""

    def is_known(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) -> (B,) bool, true for a known class."""
        ...


def training_free_scores(logits: Tensor, scale: float) -> dict[str, Tensor]:
    """Class logits (B, K) -> each of `TRAINING_FREE` (B,), higher is more known.

    scale: what cosines were multiplied by to give these logits; MCM asks for the cosines. A bias that all classes share changes
    nothing: it cancels in two of them and shifts the other two. Where each row is probabilities, only `msp` means anything.
    """
    from ecliptic.ops.ood_scores import energy, max_logit, mcm, msp

    if _are_probabilities(logits):
        return {"msp": logits.amax(-1)}
    return {"msp": msp(logits), "max_logit": max_logit(logits), "energy": energy(logits), "mcm": mcm(logits, scale)}


def ood(
    subject: HFEncoder | Predictor,
    known: Iterable[Record],
    unknown: Iterable[Record],
    classes: Sequence[str] | Mapping[str, str] | None = None,
    templates: str | Sequence[str] = "photo",
    *,
    encoder: HFEncoder | None = None,
    scale: float | None = None,
    batch_size: int = 32,
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """How well a subject tells records of known classes from records of none. No label of `unknown` is looked at.

    subject: an encoder, asked by class prompts (classes: as `zero_shot` takes them, by default the labels of `known`), or a
    fitted predictor with class scores. A predictor that also `ScoresTheUnknown` or `RefusesTheUnknown` is judged by that too;
    its own scores take precedence over training-free ones of the same name. encoder: whose preprocessing a predictor needs,
    if it does not hold one. scale: of a predictor's scores, for MCM; by default its `scale_`, else 100, or with a logit bias
    (SigLIP) the model's own.

    Numbers: `ood.NAME.auroc` and `ood.NAME.fpr95` of each score; for a decision `ood.decision.balanced_accuracy`,
    `.known_kept`, `.unknown_refused`; `ood.known.accuracy` where the known records have labels. All with 95 % intervals.
    """
    from ecliptic.core.contracts import Predictor

    sides = [as_records(known), as_records(unknown)]
    for records, kind in zip(sides, ("known", "unknown"), strict=True):
        if not len(records):
            raise ValueError(f"{records.name} holds no {kind} records: it takes pictures of both kinds")
    if isinstance(subject, Predictor):
        found = [_ask(subject, records, encoder, scale, batch_size, progress) for records in sides]
        name = type(subject).__name__
    else:
        words = class_words(classes, values(sides[0], "label"), "label", sides[0].name)
        found = [_match(subject, records, words, templates, batch_size, progress) for records in sides]
        name = subject.name
    report = ood_report(
        {key: (found[0].scores[key], found[1].scores[key]) for key in found[0].scores},
        None if found[0].kept_known is None else (found[0].kept_known, found[1].kept_known),
        resamples=resamples,
        seed=seed,
    )
    report.title = f"Out of distribution: {name} on {sides[0].name} against {sides[1].name}"
    report.subtitle = (
        f"{len(found[0].rows)} known pictures of {len(found[0].classes)} classes, {len(found[1].rows)} unknown"
    )
    _add_accuracy(report, found[0], values(sides[0], "label"), resamples, seed)
    for records, side in zip(sides, found, strict=True):
        report.notes += side.skipped.note(len(records))
    report.sections += _pictures(sides, found)
    return report


def ood_report(
    scores: Mapping[str, tuple[Any, Any]],
    decision: tuple[Any, Any] | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Report:
    """The numbers of `ood` from arrays.

    scores: name -> ((N,) of the known, (M,) of the unknown). decision: the same of truth values, true for known.
    """
    report = Report("Out of distribution")
    rows: list[list[str | int | Number | None]] = []
    for name, (inside, outside) in scores.items():
        both = np.concatenate([np.asarray(inside, dtype=float), np.asarray(outside, dtype=float)])
        curve = metrics.roc(both, np.arange(len(both)) < len(inside))
        area, rate = curve.intervals(TPR, resamples=resamples, seed=seed)
        report.numbers[f"ood.{name}.auroc"] = Number(curve.area(), *area, n=len(both), unit=FRACTION)
        report.numbers[f"ood.{name}.fpr95"] = Number(curve.fpr(TPR), *rate, n=len(both), unit=FRACTION)
        rows.append([name, *(report.numbers[f"ood.{name}.{key}"] for key in ("auroc", "fpr95"))])
    if decision is not None:
        kept, refused = np.asarray(decision[0], dtype=bool), ~np.asarray(decision[1], dtype=bool)
        for key, hits in (("known_kept", kept), ("unknown_refused", refused)):
            interval = metrics.proportion_interval(hits, resamples=resamples, seed=seed)
            report.numbers[f"ood.decision.{key}"] = Number(float(hits.mean()), *interval, n=len(hits), unit=FRACTION)
        report.numbers["ood.decision.balanced_accuracy"] = _balanced(kept, refused, resamples, seed)
    if rows:
        bars = {str(row[0]): row[1] for row in rows if isinstance(row[1], Number)}
        report.figures.append(BarChart(bars, "AUROC: known above unknown"))
        report.tables.append(Table(["score", "AUROC", "FPR at 95 % TPR"], rows, "Scores"))
    report.notes.append(
        f"Intervals: 95 %, percentile bootstrap over pictures, known and unknown apart, {resamples} resamples, seed {seed}."
    )
    return report


def _balanced(kept: NDArray[Any], refused: NDArray[Any], resamples: int, seed: int) -> Number:
    """The mean of two independent shares, each drawn from its Jeffreys posterior: honest too where all pictures agree."""
    rng = np.random.default_rng(seed)
    drawn = [rng.beta(hits.sum() + 0.5, (~hits).sum() + 0.5, resamples) for hits in (kept, refused)]
    low, high = np.quantile(sum(drawn) / 2, [0.025, 0.975])
    said = np.concatenate([kept, ~refused])
    value = metrics.balanced_accuracy(said, np.arange(len(said)) < len(kept))
    return Number(value, min(float(low), value), max(float(high), value), n=len(said), unit=FRACTION)


# Asking the subject


@dataclass
class _Side:
    """What a subject said of the known, or of the unknown, records."""

    scores: dict[str, NDArray[Any]]  # name -> (n,)
    kept_known: NDArray[Any] | None  # (n,) bool
    best: NDArray[Any]  # (n,) place of the best class
    classes: tuple[str, ...]
    rows: NDArray[Any]  # (n,) positions of the records that could be read
    skipped: Skipped


def _match(
    encoder: HFEncoder, records: Records, words: Mapping[str, str], templates: Any, batch_size: int, progress: Any
) -> _Side:
    """An encoder by class prompts, its logits at its own scale, as everywhere in evaluation."""
    from ecliptic.core.zeroshot import zero_shot_head

    head = zero_shot_head(encoder, list(words.values()), templates)
    found = encode(encoder, records, batch_size, progress)
    scale = encoder.scale.item()
    logits = scale * found.features @ head.T
    scores = {name: row.numpy() for name, row in training_free_scores(logits, scale).items()}
    return _Side(scores, None, logits.argmax(-1).numpy(), tuple(words), found.kept, found.skipped)


def _ask(
    predictor: Predictor, records: Records, encoder: HFEncoder | None, scale: float | None, size: int, progress: Any
) -> _Side:
    kind = type(predictor).__name__
    preparing = encoder or getattr(predictor, "encoder_", None)
    if preparing is None:
        raise TypeError(f"{kind} holds no encoder: pass encoder= so that pictures can be prepared")
    scale = scale_of(predictor, preparing) if scale is None else scale
    errors: dict[int, Exception] = {}
    rows: list[int] = []
    parts: list[dict[str, NDArray[Any]]] = []
    classes: tuple[str, ...] = ()
    for positions, pictures in batches(records, range(len(records)), size, errors):
        pixels = preparing.preprocess(pictures)
        said = predictor.predict(pixels)
        if said.scores is None or said.classes is None:
            raise TypeError(f"{kind} gives no class scores, so there is nothing to tell known from unknown by")
        logits = said.scores.detach().float().cpu()
        found = dict(training_free_scores(logits, scale))
        if isinstance(predictor, ScoresTheUnknown):
            found |= predictor.ood_scores(pixels)
        part = {f"score {name}": _row(kind, name, row, len(positions)) for name, row in found.items()}
        if isinstance(predictor, RefusesTheUnknown):
            part["decision"] = _row(kind, "is_known", predictor.is_known(pixels), len(positions)).astype(bool)
        parts.append({**part, "best": logits.argmax(-1).numpy()})
        rows += positions
        classes = said.classes
        if progress is not None:
            progress(len(positions))
    skipped = readable(records, errors)
    whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    scores = {key.removeprefix("score "): row for key, row in whole.items() if key.startswith("score ")}
    return _Side(scores, whole.get("decision"), whole["best"], classes, np.array(rows), skipped)


def _row(kind: str, name: str, found: Tensor, n: int) -> NDArray[Any]:
    if tuple(found.shape) != (n,):
        raise TypeError(f"{kind}: {name!r} is {tuple(found.shape)}, not ({n},), one value a picture")
    return found.detach().cpu().numpy()


def scale_of(predictor: Predictor, encoder: HFEncoder) -> float:
    """What a predictor multiplied cosines by: its own `scale_`, else 100, or with a logit bias (SigLIP) the model's own."""
    from ecliptic.core.prompt_classifier import logit_scale

    own = getattr(predictor, "scale_", None)
    return float(logit_scale(encoder.scale.detach(), encoder.bias) if own is None else own)


def _are_probabilities(scores: Tensor) -> bool:
    return bool((scores >= 0).all()) and bool(((scores.sum(-1) - 1).abs() < 1e-3).all())


# Telling


def _add_accuracy(report: Report, side: _Side, labels: Sequence[Any], resamples: int, seed: int) -> None:
    """Of the known pictures whose label is one of the classes: how many are named right, whatever is thought of them."""
    truth = [None if labels[i] is None else str(labels[i]) for i in side.rows]
    hits = [float(side.classes[b] == t) for b, t in zip(side.best, truth, strict=True) if t in side.classes]
    if hits:
        interval = metrics.proportion_interval(hits, resamples=resamples, seed=seed)
        report.numbers["ood.known.accuracy"] = Number(float(np.mean(hits)), *interval, n=len(hits), unit=FRACTION)


def _pictures(sides: Sequence[Records], found: Sequence[_Side]) -> list[Section]:
    """What each kind is most mistaken for, by the predictor's own score or else by MSP."""
    name = next((key for key in found[0].scores if key not in TRAINING_FREE), "msp")
    stories = (
        ("Known, and least known by its looks", "Pictures of known classes with the lowest", 1),
        ("Unknown, and most known by its looks", "Pictures of no known class with the highest", -1),
    )
    sections = []
    for records, side, (title, text, sign) in zip(sides, found, stories, strict=True):
        thumbnails, scores = Thumbnails(records), side.scores[name]
        pictures = [
            thumbnails.show(int(side.rows[r]), side.classes[side.best[r]], score=float(scores[r]))
            for r in np.argsort(sign * scores, kind="stable")[:SHOWN]
        ]
        sections.append(Section(title, f"{text} {name}, and the class each is closest to.", Gallery(pictures)))
    return sections
