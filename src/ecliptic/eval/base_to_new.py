"""Base-to-new: learnt from some classes, judged on those and on others that are known by name only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ecliptic.eval import metrics
from ecliptic.eval.report import FRACTION, Number, Report
from ecliptic.eval.subjects import Encoded, as_records, encode, values

if TYPE_CHECKING:
    from torch import Tensor

    from ecliptic.core.contracts import Record
    from ecliptic.core.encoder import HFEncoder


def harmonic_mean(base: float, new: float) -> float:
    """2 / (1 / base + 1 / new); 0 where either is 0. Low as soon as one of the two is."""
    return 2 * base * new / (base + new) if base > 0 and new > 0 else 0.0


def base_to_new(
    encoder: HFEncoder,
    records: Iterable[Record],
    base: Sequence[str],
    new: Sequence[str],
    templates: str | Sequence[str] = "photo",
    *,
    head: Callable[[HFEncoder, Sequence[str]], Tensor] | None = None,
    batch_size: int = 32,
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    encoded: Encoded | None = None,
) -> Report:
    """Accuracy on pictures of `base` among the base classes, on those of `new` among the new ones, and their harmonic mean.

    head: makes the classifiers, (encoder, K names) -> (K, D) unit rows, such as the `head` of a learnt context; by default
    class prompts in `templates`. Records with other labels are left out. ValueError if a half has no pictures, or a class
    stands in both. Numbers: `base_to_new.base`, `.new` (95 % bootstrap intervals over pictures), `.harmonic_mean`.
    """
    from ecliptic.core.zeroshot import zero_shot_head

    if both := sorted(set(base) & set(new)):
        raise ValueError(f"classes that are base and new at once: {', '.join(map(repr, both[:5]))}")
    records = as_records(records)
    found = encoded or encode(encoder, records, batch_size, progress)
    labels = [str(label) for label in values(records, "label")]
    report = Report(
        f"Base to new: {encoder.name} on {records.name}", subtitle=f"{len(base)} base and {len(new)} new classes"
    )
    for key, names in (("base", list(base)), ("new", list(new))):
        rows = [row for row, i in enumerate(found.kept) if labels[int(i)] in names]
        if not rows:
            raise ValueError(f"{records.name} holds no picture of the {key} classes")
        weights = zero_shot_head(encoder, names, templates) if head is None else head(encoder, names)
        answers = (found.features[rows] @ weights.T).argmax(-1).tolist()
        hits = [names[answer] == labels[int(found.kept[row])] for answer, row in zip(answers, rows, strict=True)]
        interval = metrics.proportion_interval(hits, resamples=resamples, seed=seed)
        report.numbers[f"base_to_new.{key}"] = Number(sum(hits) / len(hits), *interval, n=len(hits), unit=FRACTION)
    mean = harmonic_mean(*(report.numbers[f"base_to_new.{key}"].value for key in ("base", "new")))
    report.numbers["base_to_new.harmonic_mean"] = Number(mean, unit=FRACTION)
    report.notes += found.skipped.note(found.of)
    return report
