"""Refusing what is none of a user's classes: which classifier and which score tell it best, and how well they will.

`choose_ood` tries classifiers with every score that can be read off them, and distances that need none; chooses by nested
cross-validation (`ecliptic.eval.nested_ood`); and fits the winner with the threshold that keeps most of what is known. Without
pictures of unknown things, classes of the user's own stand for them in turn, neither learnt from nor named.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ecliptic.apps.adaptation import AdaptationError, predictor, words_of
from ecliptic.apps.selection import (
    Candidate,
    Pictures,
    Tried,
    fit_candidate,
    fit_file,
    kept_fit,
    not_compared,
    readable,
    try_fits,
    usual_settings,
)
from ecliptic.baselines.refusing import Refusing
from ecliptic.core.known import DISTANCES, UNKNOWN, distance_statistics, distances
from ecliptic.core.progress import Progress
from ecliptic.data.feature_store import FeatureStore, keeping, picture_key
from ecliptic.data.images import ImageError
from ecliptic.data.records import Records
from ecliptic.data.shots import encode_views
from ecliptic.eval import metrics
from ecliptic.eval.nested_ood import (
    NestedOod,
    Split,
    auroc_difference,
    auroc_interval,
    judge_ood,
    mean_auroc,
    refusals,
    with_classes_left_out,
    with_unknown,
)
from ecliptic.eval.ood import scale_of, training_free_scores
from ecliptic.eval.report import FRACTION, BarChart, Gallery, Number, Report, Section, Table
from ecliptic.eval.subjects import Thumbnails

if TYPE_CHECKING:
    from ecliptic.core.encoder import HFEncoder

WORDS = "zero_shot"
USUAL = f"{WORDS} + mcm"  # what everything is compared with: class names and maximum concept matching, arXiv 2211.13445
FEATURES = Candidate("features", "")  # the distances, which need no classifier
SHOWN = 12  # pictures in a gallery

# Cheapest first, for that is the order of trying, and of two that are equally good the earlier is chosen.
ROSTER = (
    Candidate(WORDS, "zero_shot"),
    Candidate("gda", "gda", {"views": 0}),
    Candidate("linear_probe", "linear_probe"),
    Candidate("clipn", "clipn", {"steps": 20}),  # a third of its own default, for time
)


@dataclass
class ChosenOod:
    """The winner, fitted on all labelled pictures with its threshold, and how it was found.

    winner: the classifier that names pictures, under the name of the pair, "classifier + score", or of a distance alone. unknown:
    how many pictures of unknown things there were, 0 where classes were left out instead. unlabelled: records of the known that
    had no label and were not used. bad: (id, reason) of pictures that could not be read.
    """

    judge: Refusing
    winner: Candidate
    report: Report
    classes: tuple[str, ...]
    counts: dict[str, int]
    unknown: int
    unlabelled: int
    tried: list[Tried]
    bad: list[tuple[str, str]]


def choose_ood(
    encoder: HFEncoder,
    records: Records,
    work: str | Path,
    *,
    unknown: Records | None = None,
    candidates: Sequence[Candidate] | None = None,
    minutes: float = 4.0,
    shots: int | None = None,
    folds: int = 4,
    words: Mapping[str, str] | None = None,
    keep: float = 0.95,
    seed: int = 0,
) -> ChosenOod:
    """Try candidates (default: `ROSTER`) until `minutes` of fitting are over; choose, judge, fit the winner with its threshold.

    records: `image` and `label` of the classes to know. unknown: `image` of things that are none of them, never learnt from;
    without it, classes are left out in turn, which takes at least four. work: a folder for features and finished fits. shots: at
    most so many pictures of a class. words: label -> what to call it. keep: the share of known pictures that shall be kept.
    AdaptationError where there is nothing to choose on; words alone and the distances are always tried, whatever the time.
    """
    roster = _checked(records, unknown, minutes, folds, keep, words, candidates)
    labels = [record.get("label") for record in records.undecoded()]
    given = [i for i, label in enumerate(labels) if label not in (None, "")]
    store = FeatureStore(Path(work) / "features")
    pictures = Pictures.of(encoder, records[given], store, words, shots, seed)
    keys, bad = ([], []) if unknown is None else readable(encoder, unknown, store)
    if unknown is not None and not any(keys):
        raise AdaptationError(f"none of the {len(unknown)} unknown pictures can be read")
    strange = Records.from_list([]) if unknown is None else unknown[[i for i, key in enumerate(keys) if key]]
    try:
        split = (
            with_classes_left_out(pictures.truth, folds, seed)
            if unknown is None
            else with_unknown(pictures.truth, len(strange), folds, seed)
        )
    except ValueError as error:
        raise AdaptationError(f"{error}; or give pictures of other things, as unknown") from None
    if not split.folds:
        raise AdaptationError("no class has two pictures: one to learn from and one to judge on are needed")
    pictures.keys += [key for key in keys if key]
    trial = _Trial(encoder, pictures, strange, split, Path(work) / "fits")
    plan = split.plan
    began = time.monotonic()
    with keeping(store), Progress("trying scores", (len(roster) + 1) * len(plan), unit="fits") as bar:
        tried = [try_fits(FEATURES, plan, np.inf, trial.fit_features, bar.advance)]
        for candidate in roster:
            left = np.inf if candidate.name == WORDS else 60 * minutes - (time.monotonic() - began)
            fit = trial.fitting(candidate)
            tried.append(try_fits(candidate, plan, left, fit, bar.advance))
        answers = _answers(tried)
        if USUAL not in answers:
            raise AdaptationError(f"class names alone could not be asked: {tried[1].problem}")
        found = judge_ood(answers, split)
        naming = _naming(found.winner, tried, pictures, split)
        judge = Refusing(
            naming.method,
            usual_settings(encoder, naming, pictures.classes),
            score=found.winner.rpartition(" + ")[2],
            keep=keep,
            folds=folds,
            seed=seed,
        ).fit(encoder, pictures.labelled)
    report = _report(encoder, records.name, trial, tried, found, naming, keep, seed)
    counts = dict(Counter(pictures.classes[k] for k in pictures.truth))
    return ChosenOod(
        judge,
        replace(naming, name=found.winner),
        report,
        pictures.classes,
        counts,
        len(strange),
        len(records) - len(given),
        tried,
        pictures.bad + bad,
    )


def _checked(
    records: Records,
    unknown: Records | None,
    minutes: float,
    folds: int,
    keep: float,
    words: Mapping[str, str] | None,
    candidates: Sequence[Candidate] | None,
) -> list[Candidate]:
    """What can be seen to be wrong before any picture is opened; the candidates to try, words first."""
    if not minutes > 0:
        raise AdaptationError(f"minutes={minutes}: give the methods some time")
    if not 0 < keep < 1:
        raise AdaptationError(f"keep={keep}: the share of known pictures to keep lies between 0 and 1, such as 0.95")
    if folds < 3:
        raise AdaptationError(f"folds={folds}: to choose, judge and learn takes at least three")
    counts = Counter(str(r["label"]) for r in records.undecoded() if r.get("label") not in (None, ""))
    names = words_of(sorted(counts), words)
    if len(counts) < 2:
        raise AdaptationError(f"there is nothing to know apart: one class only ({', '.join(counts) or 'none'})")
    if UNKNOWN in names.values():
        raise AdaptationError(f"a class is called {UNKNOWN!r}, as refused pictures are: give its pictures as unknown")
    if max(counts.values()) < 2:
        raise AdaptationError("no class has two pictures: one to learn from and one to judge on are needed")
    if unknown is None and len(counts) < 4:
        raise AdaptationError(
            f"{len(counts)} classes are too few to leave some out in turn: it takes four, or pictures of other things, as unknown"
        )
    if unknown is not None:
        if not len(unknown):
            raise AdaptationError(f"{unknown.name} holds no pictures: unknown are pictures of none of the classes")
        if len(unknown) < folds:
            raise AdaptationError(f"{len(unknown)} unknown pictures are too few for folds={folds}: give more of them")
        both = _keys(records).keys() & (others := _keys(unknown)).keys()
        if both:
            name = others[min(both)]
            raise AdaptationError(
                f"{len(both)} of the {len(unknown)} unknown pictures are also pictures of the classes, such as {name!r}: "
                "unknown are pictures of other things"
            )
    for candidate in candidates or ():
        predictor(candidate.method, candidate.settings)
    roster = list(ROSTER if candidates is None else candidates)
    return [ROSTER[0], *(c for c in roster if c.name != WORDS)]


def _keys(records: Records) -> dict[str, str]:
    """What tells pictures apart -> id; without those that cannot be read."""
    found = {}
    for record in records.undecoded():
        try:
            found[picture_key(record)] = str(record.get("id"))
        except (ImageError, OSError):
            continue
    return found


# One candidate


@dataclass
class _Trial:
    """All pictures, the labelled ones first, and what the fits that a split asks for say of those they have not seen."""

    encoder: HFEncoder
    pictures: Pictures
    strange: Records
    split: Split
    kept: Path

    @property
    def everything(self) -> Records:
        return self.pictures.labelled + self.strange if len(self.strange) else self.pictures.labelled

    def fitting(self, candidate: Candidate) -> Any:
        """For `try_fits`: a classifier's fit, asked for every score that can be read off it, and for the names it gives."""

        def fit(left_out: frozenset[int], remaining: float) -> tuple[Any, float, int | None]:
            rows = self.split.learnt(left_out)
            classes = tuple(self.pictures.classes[k] for k in sorted({*self.pictures.truth[rows]}))

            def learn() -> Any:
                return fit_candidate(self.encoder, candidate, self.pictures.labelled[rows], classes)

            return kept_fit(self._file(candidate, rows), remaining, learn, lambda fitted: self._ask(fitted, rows))

        return fit

    def fit_features(self, left_out: frozenset[int], remaining: float) -> tuple[Any, float, int | None]:
        """For `try_fits`: the distances."""
        import torch

        rows = self.split.learnt(left_out)

        def learn() -> Any:
            own = encode_views(self.encoder, self.pictures.labelled[rows])[0]
            places = np.unique(self.pictures.truth[rows], return_inverse=True)[1]
            return distance_statistics(own, torch.from_numpy(places))

        def ask(known: Any) -> dict[str, NDArray[Any]]:
            unseen, features = self._unseen(rows)
            said = {score: distances(score, features, known[score]) for score in DISTANCES}
            return {score: self._spread(unseen, value.numpy()) for score, value in said.items()}

        return kept_fit(self._file(FEATURES, rows), remaining, learn, ask)

    def _ask(self, fitted: Any, rows: NDArray[np.int64], batch: int = 32) -> dict[str, NDArray[Any]]:
        import torch

        unseen, features = self._unseen(rows)
        scale = scale_of(fitted, self.encoder)
        parts: list[dict[str, Any]] = []
        own: Callable[[Any], Mapping[str, Any]]
        with torch.no_grad():
            if hasattr(fitted, "predict_features"):
                own = getattr(fitted, "ood_scores_features", lambda _: {})
                parts.append(self._read(fitted, fitted.predict_features(features), own(features), scale))
            else:
                own = getattr(fitted, "ood_scores", lambda _: {})
                for start in range(0, len(unseen), batch):
                    some = self.everything[unseen[start : start + batch]]
                    pixels = self.encoder.preprocess([record["image"] for record in some])
                    parts.append(self._read(fitted, fitted.predict(pixels), own(pixels), scale))
        return {name: self._spread(unseen, np.concatenate([part[name] for part in parts])) for name in parts[0]}

    def _read(self, fitted: Any, said: Any, own: Mapping[str, Any], scale: float) -> dict[str, NDArray[Any]]:
        if said.scores is None or said.classes is None:
            raise TypeError(f"{type(fitted).__name__} gives no class scores, so there is nothing to refuse by")
        logits = said.scores.float().cpu()
        # Scores of its own come on top of class scores that other candidates have as well (clipn's are those of words alone).
        found = {name: row.cpu().numpy() for name, row in (own or training_free_scores(logits, scale)).items()}
        place = np.array([self.pictures.classes.index(name) for name in said.classes])
        return {**found, "named": place[logits.argmax(-1).numpy()]}

    def _unseen(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], Any]:
        unseen = np.setdiff1d(np.arange(len(self.split.known)), rows)
        return unseen, encode_views(self.encoder, self.everything[unseen])[0]

    def _spread(self, unseen: NDArray[np.int64], values: NDArray[Any]) -> NDArray[np.float64]:
        found = np.full(len(self.split.known), np.nan)
        found[unseen] = values
        return found

    def _file(self, candidate: Candidate, rows: NDArray[np.int64]) -> Path:
        kinds = [type(predictor(candidate.method, candidate.settings))] if candidate.method else []
        names = [self.pictures.classes[k] for k in self.pictures.truth]
        content = [self.pictures.model, candidate.method, sorted(candidate.settings.items()), rows.tolist()]
        content += [self.pictures.keys, names, "ood"]
        return fit_file(self.kept, kinds, content)


def _answers(tried: Sequence[Tried]) -> dict[str, dict[frozenset[int], Any]]:
    """ "classifier + score", or a distance alone -> what a fit left out -> scores (T,). The classifiers' first."""
    found: dict[str, dict[frozenset[int], Any]] = {}
    for entry in [*tried[1:], tried[0]]:
        if entry.problem:
            continue
        for left_out, said in entry.answers.items():
            for score in said:
                if score != "named":
                    name = score if entry.candidate is FEATURES else f"{entry.candidate.name} + {score}"
                    found.setdefault(name, {})[left_out] = said[score]
    return found


def _naming(winner: str, tried: Sequence[Tried], pictures: Pictures, split: Split) -> Candidate:
    """Who names what is not refused: the winner's own classifier, or beside a distance the one that is right most often."""
    done = [entry for entry in tried if entry.candidate is not FEATURES and not entry.problem]
    own, _, _ = winner.rpartition(" + ")
    if own:
        return next(entry.candidate for entry in done if entry.candidate.name == own)
    shares = [float(_hits(entry, pictures, split)[1].mean()) for entry in done]
    found: Candidate = done[int(np.argmax(shares))].candidate
    return found


def _hits(entry: Tried, pictures: Pictures, split: Split) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Held-out known pictures, and whether each is named right."""
    rows = np.concatenate([split.held({k}, k)[0] for k in split.folds])
    named = np.concatenate([entry.answers[frozenset({k})]["named"][split.held({k}, k)[0]] for k in split.folds])
    return rows, (named == pictures.truth[rows]).astype(float)


# The report


def _report(
    encoder: HFEncoder,
    where: str,
    trial: _Trial,
    tried: Sequence[Tried],
    found: NestedOod,
    naming: Candidate,
    keep: float,
    seed: int,
) -> Report:
    split, pictures, given = trial.split, trial.pictures, len(trial.strange)
    entries = {entry.candidate.name: entry for entry in tried if not entry.problem}
    bars = {
        name: Number(
            mean_auroc(parts),
            *auroc_interval(parts, split, seed=seed),
            n=sum(len(p.unknown) for p in parts),
            unit=FRACTION,
        )
        for name, parts in found.parts.items()
    }
    order = sorted(bars, key=lambda name: -bars[name].value)
    often = Counter(found.chosen)
    percent = f"{keep:.0%}".replace("%", " %")
    hits = _hits(entries[naming.name], pictures, split)[1]
    honest = Number(
        mean_auroc(found.honest), *auroc_interval(found.honest, split, seed=seed), n=bars[order[0]].n, unit=FRACTION
    )
    gain = auroc_difference(found.honest, found.parts[USUAL], split, seed=seed)
    report = Report(
        f"{found.winner} tells {Path(where).name or where} from other things best",
        {
            "refusing.auroc": honest,
            "refusing.words_alone": bars[USUAL],
            "refusing.gain": Number(*gain, n=honest.n, unit=FRACTION),
            "refusing.unknown_refused": _refused(found.honest, split, keep, seed),
            "refusing.known_named_right": _share(hits, None, seed),
        },
    )
    of = f"{given} pictures of other things" if given else f"{len(split.folds)} groups of classes left out in turn"
    report.subtitle = (
        f"{len(pictures.truth)} pictures of {len(pictures.classes)} classes against {of}; "
        f"{len(bars)} scores on {encoder.name}"
    )
    report.figures = [
        BarChart({n: bars[n] for n in order}, "AUROC: known above unknown", most=1.0, highlight=found.winner),
        _histogram(found, split, seed),
    ]
    rows: list[list[Any]] = []
    for name in order:
        own = entries[name.rpartition(" + ")[0] or FEATURES.name]
        named = None if own.candidate is FEATURES else _share(_hits(own, pictures, split)[1], None, seed)
        rows.append(
            [
                name + (" (winner)" if name == found.winner else ""),
                bars[name],
                _refused(found.parts[name], split, keep, seed),
                named,
                round(own.seconds, 2),
                own.trained,
                often[name],
            ]
        )
    columns = ["classifier + score", "AUROC", "unknown refused", "known named right"]
    report.tables = [
        Table([*columns, "seconds to fit", "trained numbers", "chosen in folds"], rows, "Leaderboard"),
        *([] if given else [_per_class(found, pictures, split, keep, seed)]),
    ]
    report.tables += not_compared(tried)
    report.notes = _notes(given, found, naming, percent)
    if gain[1] <= 0:
        report.notes.insert(
            1, f"Whether that is better than class names alone ({USUAL}) is not certain: the gain may be 0."
        )
    report.sections = _galleries(trial, entries[naming.name], found, keep)
    return report


def _notes(given: int, found: NestedOod, naming: Candidate, percent: str) -> list[str]:
    kind = (
        "The unknown pictures were never learnt from, and those that judge a choice took no part in it. How well other unknown "
        "things are refused depends on how like these they are."
        if given
        else "There were no pictures of unknown things, so classes of your own stood for them in turn: each was neither learnt "
        "from nor named while its pictures were judged. Things less like your classes than they are like each other will be "
        "easier to refuse; and with all classes learnt, nothing of your own is left to check the final predictor with."
    )
    beside = (
        f" {naming.name} names what is not refused, for it is right most often." if " + " not in found.winner else ""
    )
    return [
        f"AUROC is the chance that a picture of your classes looks more known than one of something else; 50 % is guessing. The "
        f"headline is that of the whole procedure: in each of {len(found.chosen)} parts, whatever was chosen without it is "
        "judged on it. The leaderboard's own figures are plain cross-validation, and that of its first line is a little too "
        "good, for it was chosen by it.",
        f"The threshold is set on pictures of your classes that were not learnt from, so that about {percent} of such pictures "
        f"are kept; so it was in each part for “unknown refused”.{beside}",
        kind,
        "Intervals: 95 %, bootstrap over known pictures and over "
        + ("unknown pictures." if given else "the classes left out, each with all its pictures."),
    ]


def _refused(parts: Any, split: Split, keep: float, seed: int) -> Number:
    rows, hits = refusals(parts, keep)
    return _share(hits, split.group[rows], seed)


def _share(hits: NDArray[np.float64], groups: NDArray[Any] | None, seed: int) -> Number:
    interval = metrics.proportion_interval(hits, groups, seed=seed)
    return Number(float(hits.mean()), *interval, n=len(hits), unit=FRACTION)


def _histogram(found: NestedOod, split: Split, seed: int) -> BarChart:
    """How many of the unknown pictures look more known than which share of the known ones of their fold."""
    below = np.concatenate([(p.known_scores[:, None] < p.unknown_scores[None]).mean(0) for p in found.honest])
    groups = split.group[np.concatenate([p.unknown for p in found.honest])]
    ends = {"up to 5 %": 0.05, "5 to 25 %": 0.25, "25 to 50 %": 0.5, "50 to 75 %": 0.75, "75 to 100 %": 1.0}
    bars, low = {}, -1.0
    for name, high in ends.items():
        bars[name] = _share(((below > low) & (below <= high)).astype(float), groups, seed)
        low = high
    return BarChart(bars, "Unknown pictures, by how many of the known they look more known than", most=1.0)


def _per_class(found: NestedOod, pictures: Pictures, split: Split, keep: float, seed: int) -> Table:
    rows, hits = refusals(found.honest, keep)
    owner = pictures.truth[rows]
    table: list[list[Any]] = []
    for k, name in enumerate(pictures.classes):
        own = hits[owner == k]
        table.append([name, len(own), _share(own, None, seed) if len(own) else None])
    table.sort(key=lambda line: (line[2] is None, line[2].value if isinstance(line[2], Number) else 0.0))
    return Table(["class, while it was left out", "pictures", "refused"], table, "Hardest to refuse")


def _galleries(trial: _Trial, naming: Tried, found: NestedOod, keep: float) -> list[Section]:
    """The unknown that look most known, and the known that look least so, each by rank within its own fold."""
    thumbnails = Thumbnails(trial.everything)
    classes, truth = trial.pictures.classes, trial.pictures.truth
    kept, lost = [], []
    refused = dict(zip(*(part.tolist() for part in refusals(found.honest, keep)), strict=True))
    for k, part in zip(trial.split.folds, found.honest, strict=True):
        named = naming.answers[frozenset({k})]["named"]
        for row, score in zip(part.unknown.tolist(), part.unknown_scores, strict=True):
            kept.append((float((part.known_scores < score).mean()), row, classes[int(named[row])]))
        for row, score in zip(part.known.tolist(), part.known_scores, strict=True):
            lost.append((float((part.unknown_scores > score).mean()), row, classes[int(named[row])]))
    most = [entry for entry in sorted(kept, key=lambda e: (-e[0], e[1])) if not refused[entry[1]]][:SHOWN]
    least = [entry for entry in sorted(lost, key=lambda e: (-e[0], e[1])) if entry[0] > 0][:SHOWN]

    def called(row: int) -> str:
        return f"is {classes[truth[row]]}" if row < len(truth) else "is none of the classes"

    wrong = [
        thumbnails.show(row, f"taken for {name}", score=f"{100 * share:.0f} %", note=called(row), good=False)
        for share, row, name in most
    ]
    close = [
        thumbnails.show(row, called(row), score=f"{100 * share:.0f} %", note=f"looks like {name}")
        for share, row, name in least
    ]
    kept_text = "Unknown pictures that were kept, with the share of known pictures that look less known than they do."
    lost_text = "Known pictures, with the share of unknown ones that look more known than they do."
    return [
        Section(
            "Most wrongly kept", kept_text if wrong else "None: every unknown picture was refused.", Gallery(wrong)
        ),
        Section(
            "Most nearly refused", lost_text if close else "None: all look more known than any other.", Gallery(close)
        ),
    ]
