"""Ordering a user's pictures by a quantity: which way does it best, and how well it will.

`choose_rank` tries the words alone, regressions on frozen features, and an adapter that reads the instruction (`ranking_adapter`,
with its pair loss and without); chooses by nested cross-validation on rank correlation; and fits the winner on everything.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ecliptic.apps.adaptation import AdaptationError, predictor
from ecliptic.apps.selection import Candidate, Tried, fit_file, kept_fit, not_compared, readable, try_fits
from ecliptic.baselines.rescaled_ranker import encode_pooled
from ecliptic.baselines.word_ranker import poles
from ecliptic.core.files import atomic_file
from ecliptic.core.method import get
from ecliptic.core.progress import OutOfTime, Progress, time_limit
from ecliptic.data.feature_store import FeatureStore, keeping
from ecliptic.data.quantities import value_of
from ecliptic.data.records import Records
from ecliptic.data.shots import encode_views
from ecliptic.eval import metrics
from ecliptic.eval.nested import fits
from ecliptic.eval.nested_ranking import (
    NestedRanking,
    deal_values,
    judge_ranking,
    mean_pairwise_accuracy,
    mean_srcc,
    pairwise_interval,
    srcc_difference,
    srcc_interval,
)
from ecliptic.eval.ranking import mean_absolute_error
from ecliptic.eval.report import FRACTION, BarChart, Gallery, Number, Report, Section, Table
from ecliptic.eval.subjects import Thumbnails

if TYPE_CHECKING:
    from torch import Tensor

    from ecliptic.core.contracts import Predictor
    from ecliptic.core.encoder import HFEncoder

WORDS = "words"
UNSAID = "value"  # what to order by where nobody said it
SHOWN = 12  # worst mistakes
ORDERED = 24  # pictures shown in the predicted order
LADDER = (1000, 600, 400, 250, 150, 100, 50, 25)  # training steps of the adapter: as many as fit
TRIAL = 4  # training steps that show how long one takes
SPARE = 0.7  # the share of the time left that is planned for: machines are busier at times
MEMORY = 4e9  # bytes of patches that are kept at once

# As small as in claims/adapt/ranking_adapter.py, where it learns from a hundred pictures, with half its batch, for time.
SMALL: Mapping[str, Any] = {
    "width": 64,
    "heads": 4,
    "layers": 1,
    "text_prompts": 2,
    "rank_tokens": 8,
    "batch_size": 16,
    "lr": 1e-3,
}

# Cheapest first, for that is the order of trying, and of two that are equally good the earlier is chosen.
ROSTER = (
    Candidate(WORDS, "word_ranker"),
    Candidate("neighbours", "neighbour_ranker"),
    Candidate("ridge", "feature_ranker"),
    Candidate("ranking_adapter", "rescaled_ranker", {"settings": dict(SMALL)}),
    Candidate("ranking_adapter_regression", "rescaled_ranker", {"settings": {**SMALL, "rank_weight": 0.0}}),
)


@dataclass
class ChosenRank:
    """The winner, fitted on all pictures with a value, and how it was found.

    instruction: what pictures are ordered by. pictures: how many have a value and could be read; unvalued: how many have none and
    were not used. bad: (id, reason) of pictures that could not be read.
    """

    judge: Predictor
    winner: Candidate
    report: Report
    instruction: str
    pictures: int
    unvalued: int
    tried: list[Tried]
    bad: list[tuple[str, str]]


def choose_rank(
    encoder: HFEncoder,
    records: Records,
    work: str | Path,
    *,
    instruction: str | None = None,
    candidates: Sequence[Candidate] | None = None,
    minutes: float = 4.0,
    folds: int = 4,
    seed: int = 0,
) -> ChosenRank:
    """Try candidates (default: `ROSTER`) until `minutes` of fitting are over; choose, judge, and fit the winner.

    records: `image` and a number in `value`, or `quantities` with the instruction. instruction: what the number is, "number of
    circles", or both its ends, "many circles | few circles"; without it words alone are not tried. work: a folder for features
    and finished fits. AdaptationError where there is nothing to choose on; ridge regression is always tried, whatever the time.
    """
    if not minutes > 0:
        raise AdaptationError(f"minutes={minutes}: give the methods some time")
    said, values = _told(records, instruction)
    given = np.flatnonzero(~np.isnan(values))
    fold = _dealt(values[given], folds, seed)
    roster = list(ROSTER if candidates is None else candidates)
    for candidate in roster:
        predictor(candidate.method, candidate.settings)
    words = said or UNSAID
    try:
        encoder.tokenize(list(poles(words)), overflow="error")
    except ValueError as error:
        raise AdaptationError(str(error)) from None
    roster = [c for c in roster if said is not None or c.method != "word_ranker"]
    if not any(c.method == "feature_ranker" for c in roster):
        roster.insert(0, Candidate("ridge", "feature_ranker"))
    store = FeatureStore(Path(work) / "features")
    keys, bad = readable(encoder, records[given], store)
    whole = [i for i, key in enumerate(keys) if key]
    if len(whole) < len(given):
        given = given[whole]
        fold = _dealt(values[given], folds, seed)
    adapters = sum(candidate.method == "rescaled_ranker" for candidate in roster)
    keys, given_time = [key for key in keys if key], (minutes, adapters)
    trial = _Trial(encoder, records[given], values[given], words, keys, fold, Path(work), given_time)
    plan = fits(fold)
    tried: list[Tried] = []
    began = time.monotonic()
    with keeping(store), Progress("trying methods", len(roster) * len(plan), unit="fits") as bar:
        for candidate in roster:
            left = np.inf if candidate.method == "feature_ranker" else 60 * minutes - (time.monotonic() - began)
            waiting = adapters - sum(entry.candidate.method == "rescaled_ranker" for entry in tried)
            tried.append(trial.run(candidate, plan, left, waiting, bar.advance))
        done = [entry for entry in tried if not entry.problem]
        if not done:
            raise AdaptationError(f"nothing could be fitted; first: {tried[0].problem}")
        found = judge_ranking({entry.candidate.name: entry.answers for entry in done}, trial.values, fold)
        winner = next(entry.candidate for entry in done if entry.candidate.name == found.winner)
        judge = trial.fit(winner, np.arange(len(given)))
    report = _report(encoder, records.name, trial, tried, found, said, seed)
    return ChosenRank(
        judge, winner, report, words, len(given), len(records) - int((~np.isnan(values)).sum()), tried, bad
    )


def _told(records: Records, instruction: str | None) -> tuple[str | None, NDArray[np.float64]]:
    """What to order by, if anybody says it, and the values (N,), NaN where a record has none; opens no picture."""
    if instruction is not None:
        try:
            poles(instruction)
        except ValueError as error:
            raise AdaptationError(str(error)) from None
    cheap = list(records.undecoded())
    named = {
        str(name) for record in cheap if isinstance(record.get("quantities"), Mapping) for name in record["quantities"]
    }
    if instruction is None and len(named) > 1:
        raise AdaptationError(f"there are several quantities ({', '.join(sorted(named))}): say which, as instruction")
    if instruction is None and named:
        (instruction,) = named
    values = np.full(len(cheap), np.nan)
    for i, record in enumerate(cheap):
        quantities = record.get("quantities")
        own = quantities.get(instruction) if isinstance(quantities, Mapping) else None
        if own in (None, "") and record.get("value") in (None, ""):
            continue
        try:
            values[i] = value_of(record, instruction or UNSAID)
        except ValueError as error:
            raise AdaptationError(str(error)) from None
    if not cheap or np.isnan(values).all():
        raise AdaptationError(
            f"{records.name} has no values: a table needs a column `value` with a number for each picture"
        )
    return instruction, values


def _dealt(values: NDArray[np.float64], folds: int, seed: int) -> NDArray[np.int64]:
    if len(np.unique(values)) < 2:
        raise AdaptationError(f"all {len(values)} values are {values[0]:g}: there is no order to learn")
    try:
        return deal_values(values, folds, seed)
    except ValueError as error:
        raise AdaptationError(str(error)) from None


# One candidate


@dataclass
class _Trial:
    """The pictures with their values, and what the fits that cross-validation asks for say of those they have not seen."""

    encoder: HFEncoder
    records: Records
    values: NDArray[np.float64]
    words: str
    keys: list[str]
    fold: NDArray[np.int64]
    work: Path
    given: tuple[float, int]  # minutes, and how many adapters share them
    patches: Tensor | None = None
    planned: int | None = None
    steps: dict[str, int] = field(default_factory=dict)

    def run(
        self,
        candidate: Candidate,
        plan: Sequence[frozenset[int]],
        left: float,
        waiting: int,
        advance: Callable[..., None],
    ) -> Tried:
        """For `try_fits`. waiting: how many adapters, this one among them, share the time that is left."""
        began = time.monotonic()
        if candidate.method == "rescaled_ranker":
            try:
                self._prepare(candidate, left / max(waiting, 1), len(plan) + 1)
            except OutOfTime:
                advance(len(plan))
                return Tried(candidate, problem="not in the time left")
            except (ValueError, TypeError) as error:
                advance(len(plan))
                return Tried(candidate, problem=str(error).splitlines()[0])

        def fit(left_out: frozenset[int], remaining: float) -> tuple[Any, float, int | None]:
            rows = np.flatnonzero(~np.isin(self.fold, list(left_out)))
            unseen = np.flatnonzero(np.isin(self.fold, list(left_out)))

            def ask(judge: Any) -> dict[str, NDArray[Any]]:
                scores = np.full(len(self.values), np.nan)
                scores[unseen] = self._ask(judge, unseen)
                return {"scores": scores}

            found, took, trained = kept_fit(
                self._file(candidate, rows), remaining, lambda: self.fit(candidate, rows), ask
            )
            return found["scores"], took, trained

        return try_fits(candidate, plan, left - (time.monotonic() - began), fit, advance)

    def fit(self, candidate: Candidate, rows: NDArray[np.int64]) -> Any:
        """The candidate's predictor, fitted on these pictures."""
        judge = self._unfitted(candidate)
        if self.patches is not None and candidate.method == "rescaled_ranker":
            return judge.fit_patches(self.encoder, self.patches[rows], self.values[rows])
        return judge.fit(self.encoder, self.records[rows])

    def _unfitted(self, candidate: Candidate) -> Any:
        settings = dict(candidate.settings)
        if candidate.method != "rescaled_ranker":
            return predictor(candidate.method, {"instruction": self.words, **settings})
        if candidate.name in self.steps:
            settings["settings"] = {**settings.get("settings", {}), "steps": self.steps[candidate.name]}
        return predictor(candidate.method, {"instruction": poles(self.words)[0], **settings})

    def _ask(self, judge: Any, rows: NDArray[np.int64], batch: int = 32) -> NDArray[np.float64]:
        import torch

        if hasattr(judge, "predict_features"):
            said = judge.predict_features(encode_views(self.encoder, self.records[rows])[0])
        else:
            assert self.patches is not None
            scores = [
                judge.predict_patches(self.patches[rows[i : i + batch]]).scores for i in range(0, len(rows), batch)
            ]
            return torch.cat(scores)[:, 0].double().numpy()
        found: NDArray[np.float64] = said.scores[:, 0].double().numpy()
        return found

    def _prepare(self, candidate: Candidate, left: float, count: int) -> None:
        """The patches of all pictures, once, and the number of training steps, unless the candidate brings its own."""
        began = time.monotonic()
        if left <= 0:
            raise OutOfTime
        if self.patches is None:
            pool = self._unfitted(candidate).pool
            one = encode_pooled(self.encoder, self.records[:1], pool)
            if (needed := one.numel() * 4 * len(self.records)) > MEMORY:
                raise ValueError(f"patches of {len(self.records)} pictures need {needed / 1e9:.0f} GB of memory")
            with time_limit(left) if np.isfinite(left) else nullcontext():
                self.patches = encode_pooled(self.encoder, self.records, pool)
        if "steps" in candidate.settings.get("settings", {}):
            return
        if self.planned is None:
            self.planned = self._plan(candidate, left - (time.monotonic() - began), count)
        self.steps[candidate.name] = self.planned

    def _plan(self, candidate: Candidate, left: float, count: int) -> int:
        """So many steps that `count` fits end within `left` seconds, by a short trial; the same for all adapters.

        How many is kept beside the fits, so that a second call, given the same time, goes on with them.
        """
        content = json.dumps([self.model, self.keys, self.values.tolist(), self.words, self.given])
        file = self.work / "fits" / f"{hashlib.blake2b(content.encode(), digest_size=16).hexdigest()}.steps"
        if file.is_file():
            return int(file.read_text())
        began = time.monotonic()
        self.steps[candidate.name] = TRIAL
        self.fit(candidate, np.arange(len(self.values)))
        self.steps.pop(candidate.name)
        took = time.monotonic() - began
        affordable = TRIAL * SPARE * (left - took) / count / took
        steps = next((steps for steps in LADDER if steps <= affordable), None)
        if steps is None:
            raise OutOfTime
        with atomic_file(file) as handle:
            handle.write(str(steps).encode())
        return steps

    @cached_property
    def model(self) -> str:
        """The encoder's id, which takes reading all its weights."""
        return self.encoder.id

    def _file(self, candidate: Candidate, rows: NDArray[np.int64]) -> Path:
        judge = self._unfitted(candidate)
        kinds = [type(judge), *([get(judge.method)] if hasattr(judge, "method") else [])]
        content = [self.model, candidate.method, sorted(judge.get_params().items()), rows.tolist()]
        content += [self.keys, self.values.tolist(), "rank"]
        return fit_file(self.work / "fits", kinds, content)


# The report


def _report(
    encoder: HFEncoder,
    where: str,
    trial: _Trial,
    tried: Sequence[Tried],
    found: NestedRanking,
    said: str | None,
    seed: int,
) -> Report:
    values, fold, count = trial.values, trial.fold, len(trial.values)
    done = {entry.candidate.name: entry for entry in tried if not entry.problem}

    def srcc(scores: NDArray[np.float64]) -> Number:
        return Number(mean_srcc(scores, values, fold), *srcc_interval(scores, values, fold, seed=seed), n=count)

    bars = {name: srcc(scores) for name, scores in found.scores.items()}
    order = sorted(bars, key=lambda name: -bars[name].value)
    report = Report(
        f"{found.winner} orders {Path(where).name or where} best", {"ranking.rank_correlation": srcc(found.honest)}
    )
    words = next((n for n in order if done[n].candidate.method == "word_ranker"), None)
    if words is not None:
        gain = srcc_difference(found.honest, found.scores[words], values, fold, seed=seed)
        report.numbers |= {"ranking.words_alone": bars[words], "ranking.gain": Number(*gain, n=count)}
    report.numbers |= {"ranking.pairs_in_order": _pairs(found.honest, values, fold, seed)}
    report.numbers |= {"ranking.mean_error": _error(found.honest, values, seed)}
    middle = np.full(count, np.nan)
    for k in set(fold.tolist()):
        middle[fold == k] = np.median(values[fold != k])
    report.details = {"ranking.median.mean_error": _error(middle, values, seed)}
    by = f"by “{said}”" if said else "by their value"
    report.subtitle = (
        f"{count} pictures {by}; {len(done)} methods on {encoder.name}, judged on pictures they had not seen"
    )
    report.figures = [
        BarChart({n: bars[n] for n in order}, "Rank correlation (Spearman)", most=1.0, highlight=found.winner),
        _thirds(found.honest, values, fold, seed),
    ]
    often = Counter(found.chosen)
    rows = [
        [
            name + (" (winner)" if name == found.winner else ""),
            bars[name],
            _error(found.scores[name], values, seed),
            round(done[name].seconds, 2),
            done[name].trained,
            trial.steps.get(name),
            often[name],
        ]
        for name in order
    ]
    columns = [
        "method",
        "rank correlation",
        "mean error",
        "seconds to fit",
        "trained numbers",
        "steps",
        "chosen in folds",
    ]
    report.tables = [Table(columns, rows, "Leaderboard")]
    report.tables += not_compared(tried)
    report.notes = [
        "Rank correlation is 1 where the order is right, 0 where it is chance, and below 0 where it is the wrong way round. The "
        f"headline is that of the whole procedure: in each of {len(found.chosen)} parts, whatever was chosen without it is "
        "judged on it. The leaderboard's own figures are plain cross-validation, and that of its first line is a little too "
        "good, for it was chosen by it.",
        f"Always saying the median would be off by {report.details['ranking.median.mean_error'].text} on average.",
        *(["The words were not given, so nothing could be asked of words alone."] if said is None else []),
        "Intervals: 95 %, bootstrap over pictures.",
    ]
    if words is not None and gain[1] <= 0:
        report.notes.insert(1, "Whether that is better than the words alone is not certain: the gain may be 0.")
    report.sections = _galleries(trial, found.honest)
    return report


def _pairs(scores: NDArray[np.float64], values: NDArray[np.float64], fold: NDArray[np.int64], seed: int) -> Number:
    value = mean_pairwise_accuracy(scores, values, fold)
    return Number(value, *pairwise_interval(scores, values, fold, seed=seed), n=len(values), unit=FRACTION)


def _error(scores: NDArray[np.float64], values: NDArray[np.float64], seed: int) -> Number:
    interval = metrics.bootstrap_mean(np.abs(scores - values), seed=seed)
    return Number(mean_absolute_error(scores, values), *interval, n=len(values))


def _thirds(scores: NDArray[np.float64], values: NDArray[np.float64], fold: NDArray[np.int64], seed: int) -> BarChart:
    """Of the third that is put highest, how large a share truly belongs to the highest, middle and lowest third."""
    true, said = _places(values, fold), _places(scores, fold)
    top = said > 2 / 3
    bars = {}
    for name, low, high in (("highest", 2 / 3, 1.01), ("middle", 1 / 3, 2 / 3), ("lowest", -0.01, 1 / 3)):
        hits = ((true[top] > low) & (true[top] <= high)).astype(float)
        interval = metrics.proportion_interval(hits, seed=seed)
        bars[f"{name} third"] = Number(float(hits.mean()), *interval, n=len(hits), unit=FRACTION)
    return BarChart(bars, "Where those put into the highest third truly belong", most=1.0)


def _places(values: NDArray[np.float64], fold: NDArray[np.int64]) -> NDArray[np.float64]:
    """(N,) -> place within its fold, 0 the smallest, 1 the largest; equal values share theirs."""
    found = np.empty(len(values))
    for k in set(fold.tolist()):
        own = values[fold == k]
        below = (own[None] < own[:, None]).sum(1) + ((own[None] == own[:, None]).sum(1) - 1) / 2
        found[fold == k] = below / (len(own) - 1)
    return found


def _galleries(trial: _Trial, scores: NDArray[np.float64]) -> list[Section]:
    thumbnails, values = Thumbnails(trial.records), trial.values
    order = np.argsort(-scores, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(ORDERED, len(order))).round().astype(int))]
    apart = _places(scores, trial.fold) - _places(values, trial.fold)
    worst = np.argsort(-np.abs(apart), kind="stable")[:SHOWN]
    in_order = [thumbnails.show(int(i), f"true {values[i]:g}", score=f"said {scores[i]:.3g}") for i in chosen]
    mistakes = [
        thumbnails.show(
            int(i),
            f"true {values[i]:g}",
            score=f"said {scores[i]:.3g}",
            note=f"{abs(apart[i]):.0%} of the order too {'high' if apart[i] > 0 else 'low'}",
            good=False,
        )
        for i in worst
        if apart[i]
    ]
    some = "" if len(chosen) == len(order) else f", {len(chosen)} of {len(order)} at even distances"
    return [
        Section(
            "In the predicted order",
            f"Highest first{some}; each said by a fit that had not seen it.",
            Gallery(in_order),
        ),
        Section(
            "Worst mistakes",
            "Farthest from their place in the order.",
            Gallery(mistakes),
        ),
    ]
