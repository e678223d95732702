"""Which method suits a user's own pictures: fit them all within a time, choose by cross-validation, judge the choice.

`choose` gives the winner, fitted on every labelled picture, and a report whose headline is honest: the accuracy of the whole
procedure, choice included, on pictures that neither the fit nor the choice has seen (`ecliptic.eval.nested`).
Every fit that is done is kept in a folder, so that a second call goes on where the first one stopped.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ecliptic.apps.adaptation import AdaptationError, predictor, words_of
from ecliptic.apps.naming import usual_templates
from ecliptic.core.contracts import Prediction
from ecliptic.core.files import atomic_file
from ecliptic.core.progress import OutOfTime, Progress, time_limit
from ecliptic.core.zeroshot import keeping_heads
from ecliptic.data.feature_store import FeatureStore, keeping, picture_key
from ecliptic.data.images import ImageError
from ecliptic.data.records import Records, unit_hash
from ecliptic.eval import metrics
from ecliptic.eval.nested import Nested, deal, fits, judge
from ecliptic.eval.report import FRACTION, BarChart, Number, Reliability, Report, Table
from ecliptic.eval.zero_shot import classification_report

if TYPE_CHECKING:
    from ecliptic.core.contracts import Predictor
    from ecliptic.core.encoder import HFEncoder

WORDS = "zero_shot"  # what everything is compared with
BINS = 10  # of the reliability diagram


@dataclass(frozen=True)
class Candidate:
    """A method with its settings. unlabelled: whether pictures without labels help it, so that it is worth a try where there are
    some. only_pictures: whether it ignores labels; it must then be told the classes."""

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    unlabelled: bool = False
    only_pictures: bool = False


# Cheapest first, for that is the order of trying, and of two that are equally good the earlier is chosen.
ROSTER = (
    Candidate(WORDS, "zero_shot"),
    Candidate("zero_shot_ensemble", "zero_shot", {"templates": "ensemble"}),
    Candidate("gda", "gda", {"views": 0, "templates": "ensemble"}),
    Candidate("linear_probe", "linear_probe"),
    Candidate("tip_adapter", "tip_adapter", {"views": 0, "templates": "ensemble"}),
    Candidate("sus_x", "sus_x", {"views": 0, "templates": "ensemble"}),
    Candidate("caps_adapter", "caps_adapter", {"views": 0, "templates": "ensemble"}),
    Candidate("tip_adapter_f", "tip_adapter_f", {"views": 0, "templates": "ensemble"}),
    Candidate("gda_unlabelled", "gda:GdaUnlabelled", unlabelled=True, only_pictures=True),
    Candidate("coop", "coop"),
    Candidate("pseudolabel_ssl", "pseudolabel_tuning", {"paradigm": "ssl"}, unlabelled=True),
    Candidate("gda_views", "gda", {"views": 5, "templates": "ensemble"}),
    Candidate("mocoop", "mocoop", {"tune_vision_ln": False}),
    Candidate("clip_svd", "step_classifier", {"step": "clip_svd", "settings": {"steps": 100}}),
    Candidate("lora_tuning", "lora_tuning"),
    Candidate("glad", "glad"),
    Candidate("wise_ft_tuning", "wise_ft_tuning"),
)


@dataclass
class Tried:
    """What became of a candidate. seconds: of the median fit. answers: by what was left out; here (N, K) probabilities.

    problem: why there are no answers, in words.
    """

    candidate: Candidate
    answers: dict[frozenset[int], Any] = field(default_factory=dict)
    seconds: float = 0.0
    trained: int | None = None
    problem: str = ""


@dataclass
class Chosen:
    """The winner, fitted on everything, and how it was found. bad: (id, reason) of pictures that could not be read."""

    judge: Predictor
    winner: Candidate
    report: Report
    classes: tuple[str, ...]
    counts: dict[str, int]
    unlabelled: int
    tried: list[Tried]
    bad: list[tuple[str, str]]


def choose(
    encoder: HFEncoder,
    records: Records,
    work: str | Path,
    *,
    candidates: Sequence[Candidate] | None = None,
    minutes: float = 4.0,
    shots: int | None = None,
    folds: int = 4,
    words: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Chosen:
    """Try candidates (default: all of `ROSTER` that fit) until `minutes` are over; choose, judge, and fit the winner.

    records: `image`, and `label` where it is known. work: a folder for features and finished fits. shots: at most so many
    labelled pictures of a class, by (seed, id); None: all. words: label -> what to call it.
    AdaptationError where there is nothing to choose on; words alone are always tried, whatever the time.
    """
    if not minutes > 0:
        raise AdaptationError(f"minutes={minutes}: give the methods some time")
    store = FeatureStore(Path(work) / "features")
    pictures = Pictures.of(encoder, records, store, words, shots, seed)
    began = time.monotonic()  # pictures are encoded whatever the time, and once
    fold = deal(pictures.truth, folds, seed)
    if not (fold >= 0).any():
        raise AdaptationError("no class has two labelled pictures: one to learn from and one to judge on are needed")
    roster = list(ROSTER) if candidates is None else list(candidates)
    if not any(candidate.name == WORDS for candidate in roster):
        roster.insert(0, ROSTER[0])
    roster = [c for c in roster if candidates is not None or len(pictures.loose) or not c.unlabelled]
    tried = []
    plan = fits(fold)
    with keeping(store), keeping_heads(), Progress("trying methods", len(roster) * len(plan), unit="fits") as bar:
        for candidate in roster:
            left = np.inf if candidate.name == WORDS else 60 * minutes - (time.monotonic() - began)
            tried.append(_try(encoder, pictures, candidate, fold, plan, left, Path(work) / "fits", bar.advance))
        done = [entry for entry in tried if not entry.problem]
        found = judge({entry.candidate.name: entry.answers for entry in done}, pictures.truth, fold)
        winner = next(entry.candidate for entry in done if entry.candidate.name == found.winner)
        fitted = _fit(encoder, winner, pictures, np.arange(len(pictures.truth)))
    report = _report(encoder, records.name, pictures, tried, found, seed)
    counts = Counter(pictures.classes[k] for k in pictures.truth)
    return Chosen(fitted, winner, report, pictures.classes, dict(counts), len(pictures.loose), tried, pictures.bad)


def known_candidates(methods: Sequence[str]) -> list[Candidate]:
    """Candidates by name: those of `ROSTER`, or any method or baseline with its default settings."""
    named = {candidate.name: candidate for candidate in ROSTER}
    found = [named.get(name) or Candidate(name, name) for name in methods]
    for candidate in found:
        predictor(candidate.method, candidate.settings)
    return found


# The pictures


@dataclass
class Pictures:
    """labelled: records with `label` in the words used; truth (N,): their classes; loose: readable records without label."""

    labelled: Records
    truth: NDArray[np.int64]
    loose: Records
    classes: tuple[str, ...]
    keys: list[str]  # of the labelled, then of the loose
    bad: list[tuple[str, str]]
    model: str  # the encoder's id, which takes reading all its weights

    @classmethod
    def of(
        cls,
        encoder: HFEncoder,
        records: Records,
        store: FeatureStore,
        words: Mapping[str, str] | None,
        shots: int | None,
        seed: int,
    ) -> Pictures:
        labels = [record.get("label") for record in records.undecoded()]
        given = [i for i, label in enumerate(labels) if label not in (None, "")]
        if shots is not None:
            given = _at_most(shots, given, labels, records.column("id"), seed)
        names = words_of([str(labels[i]) for i in given], words)
        chosen = [*given, *(i for i, label in enumerate(labels) if label in (None, ""))]
        keys, bad = readable(encoder, records[chosen], store)
        given = [i for i, key in zip(chosen, keys, strict=True) if key and labels[i] not in (None, "")]
        loose = [i for i, key in zip(chosen, keys, strict=True) if key and labels[i] in (None, "")]
        called = [names[str(labels[i])] for i in given]
        classes = tuple(sorted(set(called)))
        if len(classes) < 2:
            raise AdaptationError(f"there is nothing to tell apart: one class only ({', '.join(classes) or 'none'})")
        if silent := sorted(set(names.values()) - set(classes)):
            raise AdaptationError(f"none of the pictures of {silent[0]!r} can be read")
        labelled = records[given].map(lambda record: {**record, "label": names[str(record["label"])]}, images=False)
        truth = np.array([classes.index(name) for name in called], dtype=np.int64)
        return cls(labelled, truth, records[loose], classes, [key for key in keys if key], bad, encoder.id)

    def training(self, rows: NDArray[np.int64], candidate: Candidate) -> Records:
        """What a candidate learns from: the labelled pictures in `rows`, and the unlabelled ones if they help it."""
        chosen = self.labelled[rows]
        return chosen + self.loose if candidate.unlabelled and len(self.loose) else chosen


def _at_most(shots: int, rows: list[int], labels: list[Any], ids: list[str], seed: int) -> list[int]:
    taken: Counter[str] = Counter()
    kept = []
    for i in sorted(rows, key=lambda i: (unit_hash(seed, ids[i]), i)):
        if taken[str(labels[i])] < shots:
            taken[str(labels[i])] += 1
            kept.append(i)
    return sorted(kept)


def readable(encoder: HFEncoder, records: Records, store: FeatureStore) -> tuple[list[str], list[tuple[str, str]]]:
    """Encode every picture once. Returns the key of each, "" for those that cannot be read, which are listed with the reason."""
    import torch

    ids = records.column("id")
    keys: list[str] = []
    bad: list[tuple[str, str]] = []
    for i, record in enumerate(records.undecoded()):
        try:
            keys.append(picture_key(record))
        except (ImageError, OSError) as error:
            keys.append("")
            bad.append((str(ids[i]), str(error)))
    there = [i for i, key in enumerate(keys) if key]

    def encode(positions: list[int]) -> torch.Tensor:
        errors: dict[int, Exception] = {}
        wanted = [there[p] for p in positions]
        with Progress("encoding pictures", len(wanted), unit="pictures") as bar:
            rows = encoder.encode_images(
                wanted, decode=lambda i: records[i]["image"], errors=errors, progress=bar.advance
            )
        for p, error in errors.items():
            if not isinstance(error, ImageError | OSError):
                raise error
            rows[p] = torch.nan
            keys[wanted[p]] = ""
            bad.append((str(ids[wanted[p]]), str(error)))
        return rows

    if there:
        store.rows(encoder, [keys[i] for i in there], encode)
    return keys, bad


# One candidate


def _try(
    encoder: HFEncoder,
    pictures: Pictures,
    candidate: Candidate,
    fold: NDArray[np.int64],
    plan: Sequence[frozenset[int]],
    left: float,
    kept: Path,
    advance: Callable[..., None],
) -> Tried:
    def fit(left_out: frozenset[int], remaining: float) -> tuple[Any, float, int | None]:
        learnt = np.flatnonzero(~np.isin(fold, list(left_out)))
        unseen = np.setdiff1d(np.arange(len(pictures.truth)), learnt)

        def ask(fitted: Any) -> dict[str, NDArray[Any]]:
            answers = np.full((len(pictures.truth), len(pictures.classes)), np.nan)
            answers[unseen] = probabilities(fitted, encoder, pictures.labelled[unseen], pictures.classes)
            return {"answers": answers}

        file = _file(kept, pictures, candidate, learnt)
        said, took, trained = kept_fit(file, remaining, lambda: _fit(encoder, candidate, pictures, learnt), ask)
        return said["answers"], took, trained

    return try_fits(candidate, plan, left, fit, advance)


def try_fits(
    candidate: Any,
    plan: Sequence[frozenset[int]],
    left: float,
    fit: Callable[[frozenset[int], float], tuple[Any, float, int | None]],
    advance: Callable[..., None],
) -> Tried:
    """All fits of a candidate, or as many as show that they do not fit into the `left` seconds.

    fit: what it leaves out and the seconds that remain -> (answers, seconds it took, trained numbers), as `kept_fit` gives them.
    """
    entry = Tried(candidate)
    began = time.monotonic()
    seconds: list[float] = []
    for n, left_out in enumerate(plan):
        remaining = left - (time.monotonic() - began)
        try:
            answers, took, entry.trained = fit(left_out, remaining)
        except OutOfTime:
            entry.problem = "not in the time left"
        except (ValueError, TypeError, ImportError, ArithmeticError) as error:
            entry.problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        else:
            entry.answers[left_out] = answers
            seconds.append(took)
            # The first fit also computes what the others find in the store, augmented views for example.
            usual = float(np.median(seconds[1:] or seconds))
            if n in (1, 2) and usual * (len(plan) - n) > left - (time.monotonic() - began):
                entry.problem = f"not in the time left: {usual * len(plan) / 60:.1f} minutes"
        if entry.problem:
            advance(len(plan) - n)
            break
        advance(1, note=candidate.name)
    entry.seconds = float(np.median(seconds)) if seconds else 0.0
    return entry


def kept_fit(
    file: Path, remaining: float, fit: Callable[[], Any], ask: Callable[[Any], Mapping[str, NDArray[Any]]]
) -> tuple[dict[str, NDArray[Any]], float, int | None]:
    """What a fit says, the seconds it took and how many numbers it trained: from `file`, or else computed now and put there.

    ask: the fitted -> arrays by name. OutOfTime where it takes more than the `remaining` seconds.
    """
    if (found := _read_fit(file)) is not None:
        return found
    if remaining <= 0:
        raise OutOfTime
    began = time.monotonic()
    with time_limit(remaining) if np.isfinite(remaining) else nullcontext():
        fitted = fit()
    took = time.monotonic() - began
    said = dict(ask(fitted))
    trained = getattr(fitted, "trained_parameters_", None)
    with atomic_file(file) as handle:
        np.savez(handle, **said, seconds=took, trained=-1 if trained is None else trained)  # type: ignore[arg-type]
    return said, took, trained


def _read_fit(file: Path) -> tuple[dict[str, NDArray[Any]], float, int | None] | None:
    try:
        with np.load(file) as kept:
            said = {name: kept[name] for name in kept.files}
        seconds, trained = float(said.pop("seconds")), int(said.pop("trained"))
    except (OSError, ValueError, KeyError):
        return None
    return said, seconds, None if trained < 0 else trained


def fit_candidate(encoder: HFEncoder, candidate: Candidate, records: Records, classes: tuple[str, ...]) -> Any:
    """The candidate's predictor, fitted; with the templates usual for the encoder, unless it brings its own."""
    return predictor(candidate.method, usual_settings(encoder, candidate, classes)).fit(encoder, records)


def usual_settings(encoder: HFEncoder, candidate: Candidate, classes: tuple[str, ...]) -> dict[str, Any]:
    """The candidate's settings with what it leaves open."""
    settings = dict(candidate.settings)
    known = inspect.signature(type(predictor(candidate.method, settings))).parameters
    if "templates" in known:
        settings.setdefault("templates", usual_templates(encoder))
    if candidate.only_pictures or (candidate.unlabelled and "classes" in known):
        settings["classes"] = classes
    return settings


def _fit(encoder: HFEncoder, candidate: Candidate, pictures: Pictures, rows: NDArray[np.int64]) -> Any:
    return fit_candidate(encoder, candidate, pictures.training(rows, candidate), pictures.classes)


def probabilities(
    fitted: Any, encoder: HFEncoder, records: Records, classes: Sequence[str], batch: int = 32
) -> NDArray[np.float64]:
    """(N, K) of a fitted predictor over `classes`; from kept features where it takes features."""
    import torch

    from ecliptic.data.shots import encode_views

    said: list[Prediction] = []
    with torch.no_grad():
        if hasattr(fitted, "predict_features"):
            said.append(fitted.predict_features(encode_views(encoder, records)[0]))
        else:
            for start in range(0, len(records), batch):
                part = [record["image"] for record in records[start : start + batch]]
                said.append(fitted.predict(encoder.preprocess(part)))
    if said[0].scores is None or said[0].classes is None:
        raise TypeError(f"{type(fitted).__name__} gives no class scores, so it cannot be compared by accuracy")
    scores = torch.cat([one.scores for one in said if one.scores is not None]).double().cpu().numpy()
    given = scores[:, [said[0].classes.index(name) for name in classes]]
    whole = bool((given >= 0).all() and np.allclose(given.sum(1), 1, atol=1e-3))
    return given if whole else metrics.softmax(given)


def _file(kept: Path, pictures: Pictures, candidate: Candidate, learnt: NDArray[np.int64]) -> Path:
    kind = type(predictor(candidate.method, candidate.settings))
    seen = [(pictures.keys[i], pictures.classes[pictures.truth[i]]) for i in learnt]
    content = [
        pictures.model,
        candidate.method,
        sorted(candidate.settings.items()),
        seen,
        pictures.keys,
        pictures.classes,
    ]
    return fit_file(kept, [kind], content)


def fit_file(kept: Path, kinds: Sequence[type], content: Sequence[Any]) -> Path:
    """Where `kept_fit` keeps a fit: named by the sources of the classes that learn, and by `content`, which must hold all else
    that decides what it says: model, method, settings, pictures and labels."""
    source = b"".join(Path(inspect.getfile(kind)).read_bytes() for kind in kinds)
    digest = hashlib.blake2b(source + json.dumps(content, default=str).encode(), digest_size=16).hexdigest()
    return kept / f"{digest}.npz"


# The report


def _report(
    encoder: HFEncoder, where: str, pictures: Pictures, tried: Sequence[Tried], found: Nested, seed: int
) -> Report:
    rows, classes = found.judged, pictures.classes
    truth, said = pictures.truth[rows], found.probabilities[found.judged]
    report = classification_report(said, truth, classes, "adapted", records=pictures.labelled, kept=rows, seed=seed)
    hits = metrics.top_k_hits(said, truth)
    words = found.hits[WORDS][rows]
    own = report.numbers
    report.numbers = {
        "adapted.accuracy": own.pop("adapted.accuracy"),
        "adapted.words_alone": _share(words, seed),
        "adapted.gain": _difference(hits, words, seed),
        "adapted.ece": own.pop("adapted.ece"),
    }
    report.details |= own
    done = [entry for entry in tried if not entry.problem]
    bars = {entry.candidate.name: _share(found.hits[entry.candidate.name][rows], seed) for entry in done}
    report.figures = [
        BarChart(
            dict(sorted(bars.items(), key=lambda item: -item[1].value)),
            f"Cross-validated accuracy on {len(rows)} pictures",
            most=1.0,
            highlight=found.winner,
        ),
        *[figure for figure in report.figures if not isinstance(figure, BarChart)],
        Reliability(_bins(said.max(1), hits, seed), "How sure, and how often right"),
    ]
    often = Counter(found.chosen)
    order = sorted(done, key=lambda entry: -bars[entry.candidate.name].value)
    board = Table(
        ["method", "accuracy", "gain over words", "seconds to fit", "trained numbers", "chosen in folds"],
        [
            [
                entry.candidate.name + (" (winner)" if entry.candidate.name == found.winner else ""),
                bars[entry.candidate.name],
                None
                if entry.candidate.name == WORDS
                else _difference(found.hits[entry.candidate.name][rows], words, seed),
                round(entry.seconds, 2),
                entry.trained,
                often[entry.candidate.name],
            ]
            for entry in order
        ],
        "Leaderboard",
    )
    report.tables = [board, *report.tables]
    report.tables[1:1] = not_compared(tried)
    report.notes = [
        f"The headline is that of the whole procedure: in each of {len(found.chosen)} parts of the pictures, whatever "
        "cross-validation chose without that part names it. The leaderboard's own figures are plain cross-validation, and that "
        "of its first line is a little too good, for it was chosen by it.",
        *report.notes,
    ]
    report.title = f"{found.winner} suits {Path(where).name or where} best"
    counted = f"{len(pictures.truth)} labelled pictures of {len(classes)} classes"
    loose = f", {len(pictures.loose)} without label" if len(pictures.loose) else ""
    report.subtitle = f"{counted}{loose}; {len(done)} methods on {encoder.name}, judged on pictures they had not seen"
    return report


def not_compared(tried: Sequence[Tried]) -> list[Table]:
    """The table of candidates that are not in the comparison, where there are any."""
    rows = [[entry.candidate.name, entry.problem] for entry in tried if entry.problem]
    return [Table(["method", "why"], rows, "Not in the comparison")] if rows else []


def _share(hits: NDArray[np.float64], seed: int) -> Number:
    return Number(float(hits.mean()), *metrics.proportion_interval(hits, seed=seed), n=len(hits), unit=FRACTION)


def _difference(new: NDArray[np.float64], old: NDArray[np.float64], seed: int) -> Number:
    return Number(*metrics.paired_difference(new, old, seed=seed), n=len(new), unit=FRACTION)


def _bins(confidence: NDArray[np.float64], hits: NDArray[np.float64], seed: int) -> list[tuple[float, Number]]:
    edges = np.linspace(0, 1, BINS + 1)
    where = np.searchsorted(edges[1:-1], confidence.clip(0, 1), side="left")
    return [(float(confidence[where == b].mean()), _share(hits[where == b], seed)) for b in np.unique(where)]
