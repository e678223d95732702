"""`evaluate`: whatever the subject and whatever the records hold, the protocol that fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from ecliptic.eval.report import Report, join
from ecliptic.eval.retrieval import retrieval
from ecliptic.eval.subjects import as_records, encode, has
from ecliptic.eval.zero_shot import classify, zero_shot

if TYPE_CHECKING:
    from ecliptic.core.contracts import Predictor, Record
    from ecliptic.core.encoder import HFEncoder

Task = Literal["retrieval", "zero_shot"]


def evaluate(
    subject: HFEncoder | Predictor,
    records: Iterable[Record],
    *,
    task: Task | None = None,
    classes: Sequence[str] | Mapping[str, str] | None = None,
    templates: str | Sequence[str] = "photo",
    encoder: HFEncoder | None = None,
    batch_size: int = 32,
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Records with captions: `retrieval`; with labels: `zero_shot`; with both: both, from one pass over the pictures.

    task chooses one of them. A fitted predictor is judged by `classify` on the labels (encoder: whose preprocessing it
    needs, if it does not hold one). progress: called with the number of pictures after each batch.
    """
    from ecliptic.core.contracts import Predictor

    records = as_records(records)
    if not len(records):
        raise ValueError(f"{records.name} holds no records: there is nothing to evaluate")
    captioned = has(records, "caption") or has(records, "captions")
    labelled = has(records, "label")
    if isinstance(subject, Predictor):
        if not labelled:
            raise ValueError(f"{records.name} has no 'label': a {type(subject).__name__} is judged by labels")
        return classify(
            subject,
            records,
            encoder=encoder,
            batch_size=batch_size,
            resamples=resamples,
            seed=seed,
            progress=progress,
        )
    wanted = [task] if task else ["retrieval"] * captioned + ["zero_shot"] * labelled
    if task not in (None, "retrieval", "zero_shot"):
        raise ValueError(f"no task {task!r}: there are retrieval and zero_shot")
    if not wanted:
        raise ValueError(
            f"{records.name} has neither 'caption' (for retrieval) nor 'label' (for zero-shot classification)"
        )
    encoded = encode(subject, records, batch_size, progress)
    reports = []
    if "retrieval" in wanted:
        reports.append(retrieval(subject, records, resamples=resamples, seed=seed, encoded=encoded))
    if "zero_shot" in wanted:
        reports.append(zero_shot(subject, records, classes, templates, resamples=resamples, seed=seed, encoded=encoded))
    if len(reports) == 1:
        return reports[0]
    for report in reports:  # each counts its own pictures; under one roof the keys say whose
        side = "retrieval" if report is reports[0] else "zero_shot"
        for key in ("pictures.used", "pictures.skipped"):
            report.details[f"{side}.{key}"] = report.details.pop(key)
    return join(f"{subject.name} on {records.name}", reports, " · ".join(r.subtitle for r in reports))
