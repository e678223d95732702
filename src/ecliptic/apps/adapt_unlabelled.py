"""Pictures without any label, and the names of the classes: which method, and which pictures to label first.

Without labels nothing can be measured, and nothing here pretends to. Every method answers; the one whose answers agree most
with those of the others is kept (of equals the first, words alone before all); and the pictures on which they disagree most are
shown, because a label there says most.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ecliptic.apps.adaptation import AdaptationError
from ecliptic.apps.selection import Candidate, fit_candidate, probabilities, readable
from ecliptic.core.progress import OutOfTime, Progress, time_limit
from ecliptic.data.feature_store import FeatureStore, keeping
from ecliptic.data.records import Records
from ecliptic.data.shots import check_classes
from ecliptic.eval.report import FRACTION, BarChart, Gallery, Number, Report, Section, Table
from ecliptic.eval.subjects import Thumbnails

if TYPE_CHECKING:
    from ecliptic.core.contracts import Predictor
    from ecliptic.core.encoder import HFEncoder

SHOWN = 24  # pictures to label first

# As in `selection.ROSTER`: cheapest first.
ROSTER = (
    Candidate("zero_shot", "zero_shot", only_pictures=True),
    Candidate("zero_shot_ensemble", "zero_shot", {"templates": "ensemble"}, only_pictures=True),
    Candidate("gda_unlabelled", "gda:GdaUnlabelled", only_pictures=True),
    Candidate("pseudolabel_ul", "pseudolabel_tuning", {"paradigm": "ul"}, only_pictures=True),
    Candidate("nola", "nola", only_pictures=True),
)


@dataclass
class Agreed:
    """The method kept, fitted on all pictures, and how far the others agree with it. bad: (id, reason)."""

    judge: Predictor
    winner: Candidate
    report: Report
    classes: tuple[str, ...]
    unlabelled: int
    bad: list[tuple[str, str]]


def choose_unlabelled(
    encoder: HFEncoder,
    records: Records,
    work: str | Path,
    classes: Sequence[str],
    *,
    candidates: Sequence[Candidate] | None = None,
    minutes: float = 4.0,
) -> Agreed:
    """Fit every method of `ROSTER` (or the candidates) that fits into `minutes`, and keep the one most others agree with.

    work: a folder for features. AdaptationError where no picture can be read.
    """
    names = tuple(classes)
    check_classes(names)
    store = FeatureStore(Path(work) / "features")
    keys, bad = readable(encoder, records, store)
    seen = records[[i for i, key in enumerate(keys) if key]]
    if not len(seen):
        raise AdaptationError(f"none of the {len(records)} pictures can be read")
    began = time.monotonic()
    roster = [replace(candidate, only_pictures=True) for candidate in (ROSTER if candidates is None else candidates)]
    said: dict[str, NDArray[np.float64]] = {}
    fitted: dict[str, tuple[Candidate, Any, float]] = {}
    problems: list[list[str]] = []
    with keeping(store), Progress("trying methods", len(roster), unit="methods") as bar:
        for candidate in roster:
            start = time.monotonic()
            left = 60 * minutes - (start - began)
            try:
                with time_limit(left if said else 1e9):
                    judge = fit_candidate(encoder, candidate, seen, names)
                    said[candidate.name] = probabilities(judge, encoder, seen, names)
                fitted[candidate.name] = (candidate, judge, time.monotonic() - start)
            except OutOfTime:
                problems.append([candidate.name, "not in the time left"])
            except (ValueError, TypeError, ImportError, ArithmeticError) as error:
                problems.append([candidate.name, str(error).splitlines()[0]])
            bar.advance(note=candidate.name)
    if not said:
        raise AdaptationError(f"no method could be fitted; first: {': '.join(problems[0])}")
    answers = {name: rows.argmax(1) for name, rows in said.items()}
    agreement = {name: _agreement(name, answers) for name in said}
    winner = max(agreement, key=lambda name: agreement[name])
    report = _report(records.name, encoder.name, seen, names, answers, agreement, winner, fitted)
    if problems:
        report.tables.append(Table(["method", "why"], problems, "Not in the comparison"))
    return Agreed(fitted[winner][1], fitted[winner][0], report, names, len(seen), bad)


def _agreement(name: str, answers: dict[str, NDArray[np.int64]]) -> float:
    """Mean over the other methods of the share of pictures that both name alike; 1 for a method on its own."""
    others = [float((answers[name] == answers[other]).mean()) for other in answers if other != name]
    return float(np.mean(others)) if others else 1.0


def _report(
    where: str,
    model: str,
    seen: Records,
    names: tuple[str, ...],
    answers: dict[str, NDArray[np.int64]],
    agreement: dict[str, float],
    winner: str,
    fitted: dict[str, tuple[Candidate, Any, float]],
) -> Report:
    votes = np.stack(list(answers.values()))
    split = np.array([len(np.unique(column)) for column in votes.T])
    report = Report(f"{winner} agrees best with the others on {Path(where).name or where}")
    report.subtitle = f"{len(seen)} pictures without label, {len(names)} classes, {len(answers)} methods on {model}"
    report.numbers = {
        "agreement.of_the_winner": Number(agreement[winner], n=len(seen), unit=FRACTION),
        "agreement.of_all": Number(float((split == 1).mean()), n=len(seen), unit=FRACTION),
    }
    bars = {name: Number(value, unit=FRACTION) for name, value in agreement.items()}
    report.figures = [BarChart(bars, "How often a method agrees with another", most=1.0, highlight=winner)]
    report.tables = [
        Table(
            ["method", *answers, "seconds to fit"],
            [
                [
                    name,
                    *(Number(float((answers[name] == answers[other]).mean()), unit=FRACTION) for other in answers),
                    round(fitted[name][2], 2),
                ]
                for name in answers
            ],
            "Share of pictures named alike",
        ),
        Table(
            ["class", "pictures"],
            [[name, int((answers[winner] == k).sum())] for k, name in enumerate(names)],
            f"What {winner} says",
        ),
    ]
    report.notes = [
        "No picture is labelled, so no accuracy can be given: agreement says which methods see the same, not which are right. "
        "With a dozen labels of each class, `ecliptic adapt` measures, and chooses by that."
    ]
    thumbnails = Thumbnails(seen)
    first = np.argsort(-split, kind="stable")[: min(SHOWN, int((split > 1).sum()))]
    pictures = [
        thumbnails.show(int(i), names[answers[winner][i]], note=_others(votes[:, i], answers[winner][i], names))
        for i in first
    ]
    if pictures:
        text = "The methods disagree most about these: a label here says most."
        report.sections.append(Section("Label these first", text, Gallery(pictures)))
    return report


def _others(votes: NDArray[np.int64], own: int, names: tuple[str, ...]) -> str:
    rest = [names[k] for k in dict.fromkeys(votes.tolist()) if k != own]
    return f"or {', '.join(rest)}" if rest else ""
