"""Learn from a handful of labelled pictures and say honestly what that gained over words alone."""

from __future__ import annotations

import ast
import inspect
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ecliptic.data.images import ImageError
from ecliptic.data.records import Records, unit_hash

if TYPE_CHECKING:
    from ecliptic.core.contracts import Predictor
    from ecliptic.core.encoder import HFEncoder
    from ecliptic.eval.report import Report


class AdaptationError(ValueError):
    """The data or the method do not allow to adapt; the message says why."""


@dataclass
class Adapted:
    """A fitted predictor and how it compares with the zero-shot answers on pictures that it has not seen.

    report: `zero_shot.accuracy`, `adapted.accuracy`, and `gain`, their paired difference, each with a 95 % interval; among
        the details `most_frequent.accuracy`, that of always giving the answer which is right most often.
    bad: (id, reason) of pictures that could not be read.
    """

    judge: Predictor
    report: Report
    classes: tuple[str, ...]
    shots: dict[str, int]
    bad: list[tuple[str, str]]


def predictor(method: str, settings: Mapping[str, Any]) -> Any:
    """An unfitted predictor by slug. AdaptationError for a method of another kind or settings it does not have."""
    from ecliptic.core.contracts import Predictor
    from ecliptic.core.method import get

    kind = get(method)
    if not (isinstance(kind, type) and issubclass(kind, Predictor)):
        raise AdaptationError(f"{method} does not learn from labelled pictures: choose a method that is a Predictor")
    known = list(inspect.signature(kind).parameters)
    for name in settings:
        if name not in known:
            raise AdaptationError(f"{method} has no setting {name!r}; it has {', '.join(known)}")
    return kind(**settings)


def parse_settings(given: Sequence[str]) -> dict[str, Any]:
    """`name=value` pairs; a value is a Python literal, or else text."""
    settings: dict[str, Any] = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals or not name.strip().isidentifier():
            raise AdaptationError(f"{item!r} is no setting: write name=value")
        try:
            settings[name.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            settings[name.strip()] = text.strip()
    return settings


def adapt(
    encoder: HFEncoder,
    records: Records,
    judge: Any,
    *,
    shots: int = 8,
    held_out: int = 400,
    words: Mapping[str, str] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Adapted:
    """Fit `judge` on `shots` records per class, chosen by (seed, id), and judge it on up to `held_out` of the others.

    words: label -> what to call it in prompts and answers; by default the label with underscores as spaces.
    """
    import numpy as np
    import torch

    from ecliptic.core.zeroshot import zero_shot_head, zero_shot_probabilities
    from ecliptic.eval import metrics
    from ecliptic.eval.report import FRACTION, BarChart, Number, Table
    from ecliptic.eval.subjects import batches
    from ecliptic.eval.zero_shot import classification_report

    names = words_of([str(label) for label in records.column("label")], words)
    called = records.map(lambda record: {**record, "label": names[str(record["label"])]}, images=False)
    train, test, bad = split(called, shots, held_out, seed)
    classes = tuple(sorted(set(train.column("label"))))
    judge.fit(encoder, train)
    head = zero_shot_head(encoder, classes, getattr(judge, "templates", "photo"))
    errors: dict[int, Exception] = {}
    kept: list[int] = []
    before, after = [], []
    for positions, pictures in batches(test, range(len(test)), 32, errors):
        pixels = encoder.preprocess(pictures)
        with torch.inference_mode():
            seen = encoder.images(pixels).pooled.float().cpu()
        before.append(zero_shot_probabilities(encoder, seen, head).numpy())
        said = judge.predict_features(seen) if hasattr(judge, "predict_features") else judge.predict(pixels)
        if said.scores is None or said.classes is None:
            raise AdaptationError(f"{type(judge).__name__} gives no class scores, so it cannot be compared by accuracy")
        order = [said.classes.index(name) for name in classes]
        after.append(metrics.softmax(said.scores.float().cpu().numpy()[:, order]))
        kept += positions
        if progress is not None:
            progress(len(kept), len(test))
    bad += [(str(test[i : i + 1].column("id")[0]), str(error)) for i, error in sorted(errors.items())]
    if not kept:
        raise AdaptationError("none of the held-out pictures can be read")
    truth = np.array([classes.index(label) for label in test[kept].column("label")], dtype=np.int64)
    zero, adapted = np.concatenate(before), np.concatenate(after)
    report = classification_report(adapted, truth, classes, "adapted", records=test, kept=np.array(kept), seed=seed)
    old, new = metrics.top_k_hits(zero, truth), metrics.top_k_hits(adapted, truth)
    own = report.numbers
    start = Number(float(old.mean()), *metrics.proportion_interval(old, seed=seed), n=len(old), unit=FRACTION)
    gain = Number(*metrics.paired_difference(new, old, seed=seed), n=len(old), unit=FRACTION)
    report.numbers = {"zero_shot.accuracy": start, "adapted.accuracy": own.pop("adapted.accuracy"), "gain": gain}
    report.details |= own
    most = np.bincount(truth, minlength=len(classes)).argmax()
    always = (truth == most).astype(float)  # what never looking at a picture would give
    usual = Number(float(always.mean()), *metrics.proportion_interval(always, seed=seed), n=len(always), unit=FRACTION)
    report.details["most_frequent.accuracy"] = usual
    compared = {
        f"always “{classes[most]}”": usual,
        "words alone": start,
        f"with {_counted(train)}": report.numbers["adapted.accuracy"],
    }
    report.figures = [
        BarChart(compared, f"Accuracy on {len(kept)} other pictures", most=1.0),
        *[figure for figure in report.figures if not isinstance(figure, BarChart)],
    ]
    report.tables = [
        Table(
            ["class", "pictures", "words alone", "adapted"],
            [
                [name, int((truth == i).sum()), *(_share(hits, truth == i) for hits in (old, new))]
                for i, name in enumerate(classes)
            ],
            "Per class",
        )
    ]
    report.title = f"{type(judge).__name__} on {records.name}"
    report.subtitle = f"{_counted(train)}, judged on {len(kept)} other pictures of {len(classes)} classes"
    return Adapted(judge, report, classes, dict(Counter(train.column("label"))), bad)


def split(records: Records, shots: int, held_out: int, seed: int) -> tuple[Records, Records, list[tuple[str, str]]]:
    """Up to `shots` readable records of each class, up to `held_out` of the rest, and the bad ones met on the way.

    A class keeps at least one picture to be judged on. Which is which depends on (seed, id) alone.
    """
    if shots < 1 or held_out < 1:
        raise AdaptationError("shots and held_out must be at least 1")
    by_class: dict[str, list[int]] = defaultdict(list)
    ids, labels = records.column("id"), records.column("label")
    for i in sorted(range(len(records)), key=lambda i: (unit_hash(seed, ids[i]), i)):
        by_class[labels[i]].append(i)
    if len(by_class) < 2:
        raise AdaptationError(f"there is nothing to tell apart: one class only ({next(iter(by_class), 'none')})")
    few = sorted(name for name, found in by_class.items() if len(found) < 2)
    if few:
        raise AdaptationError(
            f"{few[0]!r} has one picture only: each class needs one to learn from and one to judge on"
        )
    train: list[int] = []
    rest: list[int] = []
    bad: list[tuple[str, str]] = []
    for name, found in sorted(by_class.items()):
        taken = 0
        for rank, i in enumerate(found):
            if taken == shots or (taken and rank == len(found) - 1):
                rest += found[rank:]
                break
            try:
                records[i]["image"].load()
            except (ImageError, OSError) as error:
                bad.append((str(ids[i]), str(error)))
                continue
            train.append(i)
            taken += 1
        if not taken:
            raise AdaptationError(f"none of the {len(found)} pictures of {name!r} can be read")
    # By another draw: the first one has just taken its smallest values out of every class, and out of small ones most.
    rest.sort(key=lambda i: (unit_hash(seed, f"held out/{ids[i]}"), i))
    return records[train], records[rest[:held_out]], bad


def words_of(labels: Sequence[str], words: Mapping[str, str] | None) -> dict[str, str]:
    """label -> what to call it in prompts and answers. AdaptationError for words given to a label that is not there."""
    known = sorted(set(labels))
    if unknown := sorted(set(words or {}) - set(known)):
        raise AdaptationError(f"no class {unknown[0]!r}; there are {', '.join(known[:20])}")
    return {label: (words or {}).get(label, label.replace("_", " ").strip()) for label in known}


def _counted(train: Records) -> str:
    counts = sorted(set(Counter(train.column("label")).values()))
    each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{each} {'picture' if counts == [1] else 'pictures'} per class"


def _share(hits: Any, rows: Any) -> Any:
    from ecliptic.eval import metrics
    from ecliptic.eval.report import FRACTION, Number

    own = hits[rows]
    if not len(own):
        return None
    return Number(float(own.mean()), *metrics.proportion_interval(own), n=len(own), unit=FRACTION)
