"""Naming pictures: zero-shot classification, and any other classifier by the same measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ecliptic.eval import metrics
from ecliptic.eval.report import FRACTION, BarChart, Confusion, Gallery, Number, Report, Section, Table
from ecliptic.eval.subjects import Encoded, Thumbnails, as_records, batches, encode, readable, values

if TYPE_CHECKING:
    from ecliptic.core.contracts import Predictor, Record
    from ecliptic.core.encoder import HFEncoder
    from ecliptic.data.records import Records

SHOWN = 12  # pictures in a gallery
CHARTED = 30  # classes up to which each gets a bar


def zero_shot(
    encoder: HFEncoder,
    records: Iterable[Record],
    classes: Sequence[str] | Mapping[str, str] | None = None,
    templates: str | Sequence[str] = "photo",
    *,
    field: str = "label",
    batch_size: int = 32,
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    encoded: Encoded | None = None,
) -> Report:
    """Classify each picture by the closest class prompt and compare with its `label`.

    classes: label -> the words that go into the templates, or just the labels (underscores are read as spaces); by default
    those that occur. It may hold more than occur. templates: see `ecliptic.core.zeroshot`. encoded: embeddings of these
    records, if you have them. Pictures that cannot be opened are left out and counted, and so are records without a label;
    a label outside `classes` is an error.

    Numbers: `zero_shot.accuracy`, `.balanced_accuracy` (mean over classes), `.top5` (above five classes), `.ece`
    (calibration error of the softmax confidence, 15 bins), each with its 95 % bootstrap interval over pictures; details:
    `zero_shot.accuracy[class]`, `pictures.used`, `pictures.skipped`.
    """
    from ecliptic.core.zeroshot import template_set, zero_shot_head, zero_shot_probabilities

    records = as_records(records)
    labels = values(records, field)
    words = class_words(classes, labels, field, records.name)
    chosen = template_set(templates)
    head = zero_shot_head(encoder, list(words.values()), chosen)
    found = encoded or encode(encoder, records, batch_size, progress)
    kept, truth = _truth(found.kept, labels, list(words), field)
    place = {int(i): row for row, i in enumerate(found.kept)}
    rows = [place[int(i)] for i in kept]
    probabilities = zero_shot_probabilities(encoder, found.features[rows], head).numpy()
    report = classification_report(
        probabilities, truth, tuple(words), "zero_shot", records=records, kept=kept, resamples=resamples, seed=seed
    )
    report.title = f"Zero-shot classification: {encoder.name} on {records.name}"
    shown = " · ".join(f"`{t}`" for t in chosen[:3]) + (f" and {len(chosen) - 3} more" if len(chosen) > 3 else "")
    report.subtitle = f"{len(kept)} pictures, {len(words)} classes, prompts {shown}"
    _account(report, found.of, found.skipped.note(found.of), len(found.skipped.entries), len(found.kept) - len(kept))
    return report


def classify(
    predictor: Predictor,
    records: Iterable[Record],
    *,
    encoder: HFEncoder | None = None,
    field: str = "label",
    batch_size: int = 32,
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """The same measures for a fitted predictor that names classes; keys begin with `classification`.

    encoder: whose preprocessing makes the pixels; by default the one the predictor was fitted with (`encoder_`). Scores
    whose rows are probabilities are taken as they are, others go through a softmax; without scores there is no
    calibration error.
    """
    records = as_records(records)
    if not len(records):
        raise ValueError(f"{records.name} holds no records: there is nothing to evaluate")
    preparing = encoder or getattr(predictor, "encoder_", None)
    if preparing is None:
        raise TypeError(f"{type(predictor).__name__} holds no encoder: pass encoder= so that pictures can be prepared")
    labels = values(records, field)
    errors: dict[int, Exception] = {}
    kept: list[int] = []
    scores: list[NDArray[Any]] = []
    answers: list[str] = []
    classes: tuple[str, ...] | None = None
    for positions, pictures in batches(records, range(len(records)), batch_size, errors):
        said = predictor.predict(preparing.preprocess(pictures))
        if said.scores is not None and said.classes is not None:
            scores.append(said.scores.detach().float().cpu().numpy())
        elif said.labels is not None:
            answers += said.labels
        else:
            raise TypeError(f"{type(predictor).__name__} names no classes: it gives neither scores nor labels")
        classes = said.classes or classes
        kept += positions
        if progress is not None:
            progress(len(positions))
    skipped = readable(records, errors)
    known = list(classes or sorted({*answers, *(str(label) for label in labels if label is not None)}))
    index = {name: i for i, name in enumerate(known)}
    used, truth = _truth(np.array(kept), labels, known, field)
    place = {i: row for row, i in enumerate(kept)}
    rows = [place[int(i)] for i in used]
    if scores:
        given = np.concatenate(scores)[rows]
        sums_to_one = bool((given >= 0).all() and np.allclose(given.sum(1), 1, atol=1e-3))
        probabilities = given if sums_to_one else metrics.softmax(given)
    else:
        probabilities = np.eye(len(known))[[index[answers[row]] for row in rows]]
    report = classification_report(
        probabilities,
        truth,
        tuple(known),
        "classification",
        records=records,
        kept=used,
        confident=bool(scores),
        resamples=resamples,
        seed=seed,
    )
    report.title = f"Classification: {type(predictor).__name__} on {records.name}"
    report.subtitle = f"{len(used)} pictures, {len(known)} classes"
    _account(report, len(records), skipped.note(len(records)), len(skipped.entries), len(kept) - len(used))
    return report


def class_words(
    classes: Sequence[str] | Mapping[str, str] | None, labels: Sequence[Any], field: str, where: str
) -> dict[str, str]:
    """label -> words for the prompt."""
    if isinstance(classes, str):
        raise TypeError(f"classes must be a sequence of labels, not the one string {classes!r}")
    if isinstance(classes, Mapping):
        words = dict(classes)
    else:
        names = sorted({str(label) for label in labels if label is not None}) if classes is None else list(classes)
        if not names:
            raise ValueError(f"{where} has no {field!r}: name the classes, or choose another field")
        if len(set(names)) != len(names):
            raise ValueError(f"class {next(n for n in names if names.count(n) > 1)!r} occurs twice")
        words = {name: str(name).replace("_", " ").strip() for name in names}
    return words


def _truth(
    kept: NDArray[Any], labels: Sequence[Any], classes: Sequence[str], field: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions with a label and the index of each label."""
    index = {name: i for i, name in enumerate(classes)}
    unknown = sorted({str(labels[i]) for i in kept if labels[i] is not None and str(labels[i]) not in index})
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise ValueError(f"{field} outside the classes: {', '.join(map(repr, unknown[:5]))}{more}; add them to classes")
    used = np.array([i for i in kept if labels[i] is not None], dtype=np.int64)
    if not len(used):
        raise ValueError(f"no picture has a {field!r}: there is nothing to compare with")
    return used, np.array([index[str(labels[i])] for i in used], dtype=np.int64)


def _account(report: Report, total: int, notes: list[str], skipped: int, unlabelled: int) -> None:
    """Say what was left out, as notes and as numbers."""
    report.notes += notes
    if unlabelled:
        report.notes.append(f"{unlabelled} of {total} pictures have no label and were left out.")
    report.details["pictures.used"] = Number(total - skipped - unlabelled)
    report.details["pictures.skipped"] = Number(skipped)


def classification_report(
    probabilities: NDArray[Any],
    truth: NDArray[np.int64],
    classes: tuple[str, ...],
    key: str,
    *,
    records: Records | None = None,
    kept: NDArray[np.int64] | None = None,
    confident: bool = True,
    resamples: int = 1000,
    seed: int = 0,
) -> Report:
    """probabilities (N, K), truth (N,) -> numbers under `key`, per-class table, confusions and the surest mistakes.

    records, kept (N,): where the pictures are, for the galleries. confident: False if the probabilities only say which
    class was named; then nothing is said about calibration.
    """
    draw: dict[str, Any] = {"resamples": resamples, "seed": seed}
    n, size = probabilities.shape
    hits = metrics.top_k_hits(probabilities, truth)
    answer = probabilities.argmax(1)
    confidence = probabilities.max(1).clip(0, 1)
    report = Report("Classification")
    report.numbers[f"{key}.accuracy"] = Number(
        float(hits.mean()), *metrics.proportion_interval(hits, **draw), n=n, unit=FRACTION
    )
    present = np.flatnonzero(np.bincount(truth, minlength=size))
    if len(present) > 1:

        def balanced(h: NDArray[Any], t: NDArray[Any]) -> float:
            return float(np.nanmean(metrics.per_class_accuracy(h, t, size)))

        report.numbers[f"{key}.balanced_accuracy"] = Number(
            balanced(hits, truth), *metrics.bootstrap(balanced, hits, truth, **draw), n=len(present), unit=FRACTION
        )
    if confident and size > 5:
        five = metrics.top_k_hits(probabilities, truth, 5)
        report.numbers[f"{key}.top5"] = Number(
            float(five.mean()), *metrics.proportion_interval(five, **draw), n=n, unit=FRACTION
        )
    if confident:
        ece = metrics.bootstrap(metrics.calibration_error, confidence, hits, **draw)
        report.numbers[f"{key}.ece"] = Number(metrics.calibration_error(confidence, hits), *ece, n=n, unit=FRACTION)
    report.notes.append(f"Intervals: 95 %, percentile bootstrap over pictures, {resamples} resamples, seed {seed}.")

    matrix = metrics.confusion_matrix(truth, answer, size)
    per_class: dict[str, Number] = {}
    rows: list[list[str | int | Number | None]] = []
    for i in present:
        own = hits[truth == i]
        per_class[classes[i]] = Number(
            float(own.mean()), *metrics.proportion_interval(own, **draw), n=len(own), unit=FRACTION
        )
        report.details[f"{key}.accuracy[{classes[i]}]"] = per_class[classes[i]]
        others = matrix[i].copy()
        others[i] = 0
        most = f"{classes[int(others.argmax())]} ({others.max()})" if others.any() else None
        rows.append([classes[i], len(own), per_class[classes[i]], most])
    order = sorted(range(len(rows)), key=lambda r: (per_class[classes[present[r]]].value, classes[present[r]]))
    if 1 < len(present) <= CHARTED:
        bars = {classes[present[r]]: per_class[classes[present[r]]] for r in reversed(order)}
        report.figures.append(BarChart(bars, "Accuracy per class"))
    report.tables.append(
        Table(["class", "pictures", "accuracy", "most often taken for"], [rows[r] for r in order], "Per class")
    )
    if size > 1 and (matrix.sum() - np.trace(matrix)):
        report.figures.append(Confusion(matrix.tolist(), classes, "Confusions"))
    if records is not None and kept is not None:
        report.sections += _pictures(Thumbnails(records), kept, probabilities, truth, answer, hits, classes, confident)
    return report


def _pictures(
    thumbnails: Thumbnails,
    kept: NDArray[np.int64],
    probabilities: NDArray[Any],
    truth: NDArray[np.int64],
    answer: NDArray[np.int64],
    hits: NDArray[Any],
    classes: tuple[str, ...],
    confident: bool,
) -> list[Section]:
    """The mistakes made with most confidence, and the right answers given with least and most."""

    def show(rows: NDArray[np.int64], good: bool) -> Gallery:
        pictures = []
        for r in rows:
            score = Number(float(probabilities[r, answer[r]]), unit=FRACTION) if confident else None
            own = f" ({100 * probabilities[r, truth[r]]:.1f} %)" if confident else ""
            note = "" if good else f"truth: {classes[truth[r]]}{own}"
            pictures.append(thumbnails.show(int(kept[r]), classes[answer[r]], score=score, good=good, note=note))
        return Gallery(pictures)

    surest = np.argsort(-probabilities.max(1), kind="stable")
    wrong = surest[hits[surest] < 0.5][:SHOWN]
    right = surest[hits[surest] >= 0.5]
    sections = []
    if len(wrong):
        text = "Wrong answers, those given with most confidence first." if confident else "Wrong answers."
        sections.append(Section("Mistaken", text, show(wrong, False)))
    if len(right):
        half = SHOWN // 2
        chosen = right if len(right) <= SHOWN else np.concatenate([right[:half], right[-half:]])
        text = "Right answers: the surest, then those that were close calls." if confident else "Right answers."
        sections.append(Section("Named right", text, show(chosen, True)))
    return sections
