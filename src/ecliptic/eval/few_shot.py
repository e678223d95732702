"""Few shots: one protocol for every way to adapt a model, on the same pictures, with what each costs.

`deal` sets pictures aside to be judged on, once and for all; `episode` draws k of each class from the rest, such that the four
shots contain the two. A cell is one fit and all that can be asked of it:

- `shots`: k shots of every class -> accuracy, calibration error, accuracy on pictures of another domain;
- `base_to_new`: k shots of the first half of the classes (CoCoOp, arXiv 2203.05557) -> accuracy on either half, their harmonic
  mean, and how well pictures of the unknown half are told apart (AUROC, FPR at 95 % TPR);
- `cold`: the same fit as `shots` with no feature kept from before -> what it costs with encoding.

    task = deal(encoder, records, held_out=20)
    report = few_shot(lambda classes, seed: Gda(classes=classes, seed=seed), encoder, task, journal=Journal("gda.jsonl"))
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ecliptic.eval import metrics
from ecliptic.eval.base_to_new import harmonic_mean
from ecliptic.eval.report import FRACTION, Number, Report, Table
from ecliptic.eval.subjects import as_records

if TYPE_CHECKING:
    from torch import Tensor

    from ecliptic.core.contracts import Predictor, Record
    from ecliptic.core.encoder import HFEncoder
    from ecliptic.data.records import Records

SHOTS = (1, 2, 4, 8, 16)  # CoOp, arXiv 2109.01134, section 4.1, and all that followed it
SEEDS = (0, 1, 2)  # same source
COLD_SHOTS = 4  # where the cost with encoding is measured; ours

Maker = Callable[[tuple[str, ...], int], "Predictor"]
"""(classes, seed) -> an unfitted predictor whose columns are these classes."""

Draw = Callable[["Records", int, int, tuple[str, ...]], "Records"]
"""(pool, shots, seed, classes) -> the records to fit on: `episode`, or one of its kin."""

Found = dict[str, Any]
"""What a cell measured, JSON-ready."""


class Cell(NamedTuple):
    """One fit: what is asked, shots of each class, and the seed of the draw and of the predictor."""

    kind: Literal["shots", "base_to_new", "cold"]
    shots: int
    seed: int


class Exam:
    """Labelled pictures to be judged on, prepared once: as features for predictors on frozen features, as pixels for others.

    Pixels stay in memory, 600 KB for each picture of 224 x 224.
    """

    def __init__(self, encoder: HFEncoder, records: Iterable[Record], batch_size: int = 32):
        self.encoder, self.records, self.batch_size = encoder, as_records(records), batch_size
        if not len(self.records):
            raise ValueError(f"{self.records.name} holds no records to be judged on")
        self.labels = [str(label) for label in self.records.column("label")]

    @cached_property
    def features(self) -> Tensor:
        """(N, D) unit rows of the frozen encoder; from the open feature store, where there is one."""
        from ecliptic.data.shots import encode_views

        return encode_views(self.encoder, self.records)[0]

    @cached_property
    def pixels(self) -> Tensor:
        """(N, 3, H, W) as the encoder's own preprocessing gives them."""
        import torch

        starts = range(0, len(self.records), self.batch_size)
        runs = (self.records[start : start + self.batch_size] for start in starts)
        return torch.cat([self.encoder.preprocess([record["image"] for record in run]) for run in runs])

    def batches(self, rows: NDArray[np.int64] | None = None) -> Iterator[Tensor]:
        """Pixels of the pictures at these positions (default: all), some at a time."""
        chosen = np.arange(len(self.labels)) if rows is None else rows
        for start in range(0, len(chosen), self.batch_size):
            yield self.pixels[chosen[start : start + self.batch_size]]

    def ask(
        self, judge: Predictor, rows: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.float64], tuple[str, ...]]:
        """-> scores (N, K) of the pictures at these positions (default: all), and the classes of the columns.

        TypeError for a predictor without class scores.
        """
        if hasattr(judge, "predict_features"):
            said = [judge.predict_features(self.features if rows is None else self.features[rows])]
        else:
            said = [judge.predict(pixels) for pixels in self.batches(rows)]
        scores = [each.scores for each in said]
        classes = said[0].classes
        if classes is None or any(row is None for row in scores):
            raise TypeError(f"{type(judge).__name__} gives no class scores: few shots judge what names pictures")
        return np.concatenate([row.detach().float().cpu().numpy() for row in scores if row is not None]), classes

    def rows(self, names: Iterable[str]) -> NDArray[np.int64]:
        """Positions of the pictures with one of these labels."""
        wanted = set(names)
        return np.array([i for i, label in enumerate(self.labels) if label in wanted], dtype=np.int64)


@dataclass
class Task:
    """Pictures dealt out: a pool to draw shots from, an exam on others, and perhaps one in another domain.

    classes: in the order of their columns; the first half of them is the base. elsewhere: holds some of the classes, and is
    answered among those alone. templates: by which words stand in for new classes that a predictor cannot learn.
    """

    classes: tuple[str, ...]
    pool: Records
    exam: Exam
    elsewhere: Exam | None = None
    templates: str | tuple[str, ...] = "photo"

    @cached_property
    def id(self) -> str:
        """Of the model, the classes and all pictures: what a figure depends on beside the predictor."""
        digest = hashlib.blake2b(digest_size=8)
        ids = [self.pool.ids, self.exam.records.ids, self.elsewhere.records.ids if self.elsewhere else []]
        digest.update(json.dumps([self.exam.encoder.id, self.classes, self.templates, *ids]).encode())
        return digest.hexdigest()

    @property
    def most(self) -> int:
        """How many shots of every class there are."""
        labels = list(map(str, self.pool.column("label")))
        return min(labels.count(name) for name in self.classes)


def deal(
    encoder: HFEncoder,
    records: Iterable[Record],
    classes: Sequence[str] | None = None,
    *,
    shots: int = max(SHOTS),
    held_out: int = 20,
    elsewhere: Iterable[Record] | None = None,
    templates: str | tuple[str, ...] = "photo",
    seed: int = 0,
) -> Task:
    """Set `held_out` pictures of each class aside, fewer where otherwise less than `shots` would be left to draw from.

    Which ones depends on (seed, record id) alone. classes: by default the labels found, sorted; records with other labels are
    left out. ValueError, naming the class, where there are fewer than `shots` + 1 pictures.
    """
    from ecliptic.core.zeroshot import template_set
    from ecliptic.data.records import unit_hash
    from ecliptic.data.shots import check_classes

    template_set(templates)
    if shots < 1 or held_out < 1:
        raise ValueError(f"shots={shots}, held_out={held_out}: both must be at least 1")
    records = as_records(records)
    labels = [None if label is None else str(label) for label in records.column("label")]
    names = tuple(sorted({label for label in labels if label is not None})) if classes is None else tuple(classes)
    check_classes(names)
    ids = records.ids
    pool, exam = [], []
    for name in names:
        rows = sorted(
            (i for i, label in enumerate(labels) if label == name), key=lambda i: unit_hash(seed, f"held out {ids[i]}")
        )
        if len(rows) <= shots:
            raise ValueError(f"{name!r} has {len(rows)} pictures: {shots} shots and one to be judged on are needed")
        aside = min(held_out, len(rows) - shots)
        exam += rows[:aside]
        pool += rows[aside:]
    return Task(
        names,
        records[sorted(pool)],
        Exam(encoder, records[sorted(exam)]),
        None if elsewhere is None else Exam(encoder, as_records(elsewhere).filter(lambda r: r.get("label") in names)),
        templates,
    )


def episode(pool: Records, shots: int, seed: int, classes: Sequence[str] | None = None) -> Records:
    """`shots` pictures of each class, by (seed, record id) alone: fewer shots are a part of more."""
    return _drawn(pool, shots, seed, classes)[0]


def unlabelled_episode(pool: Records, shots: int, seed: int, classes: Sequence[str] | None = None) -> Records:
    """The same pictures without their labels, for methods that learn from pictures alone."""
    return _without_labels(episode(pool, shots, seed, classes))


def semi_supervised_episode(pool: Records, shots: int, seed: int, classes: Sequence[str] | None = None) -> Records:
    """The same with their labels, and behind them all other pictures of these classes in the pool without labels."""
    drawn, rest = _drawn(pool, shots, seed, classes)
    return drawn + _without_labels(rest)


def _drawn(pool: Records, shots: int, seed: int, classes: Sequence[str] | None) -> tuple[Records, Records]:
    from ecliptic.data.shots import shot_rows

    if classes is not None:
        pool = pool[[str(label) in classes for label in pool.column("label")]]
    rows = shot_rows(pool, shots, seed)
    return pool[rows], pool[sorted(set(range(len(pool))) - set(rows))]


def _without_labels(records: Records) -> Records:
    return records.map(lambda record: {**record, "label": None}, images=False)


# Cells


def cells(
    shots: Sequence[int] = SHOTS, seeds: Sequence[int] = SEEDS, base_shots: int | None = max(SHOTS)
) -> list[Cell]:
    """All fits of the protocol: of one seed before the next, the cheap ones first."""
    found: list[Cell] = []
    for seed in seeds:
        found += [Cell("shots", k, seed) for k in sorted(shots)]
        found += [Cell("base_to_new", base_shots, seed)] if base_shots else []
    return [*found, Cell("cold", min(COLD_SHOTS, max(shots)), min(seeds))]


def run_cell(cell: Cell, make: Maker, encoder: HFEncoder, task: Task, draw: Draw = episode) -> Found:
    """One fit, and what it is judged by; see the module. Seconds are CPU seconds of this process.

    Every cell has `seconds` and `memory` (MiB of resident memory that the fit took beyond what there was before, None where the
    system does not tell) and `trained` (numbers changed by gradient descent).
    """
    if cell.kind == "base_to_new":
        return _base_to_new(cell, make, encoder, task, draw)
    drawn = draw(task.pool, cell.shots, cell.seed, task.classes)
    judge, cost = _fitted(make, encoder, task.classes, drawn, cell.seed, cold=cell.kind == "cold")
    if cell.kind == "cold":
        return cost
    scores, columns = task.exam.ask(judge)
    found = {**cost, **_judged(scores, columns, task.classes, task.exam.labels)}
    if task.elsewhere is not None:
        scores, columns = task.elsewhere.ask(judge)
        shared = [name for name in task.classes if name in set(task.elsewhere.labels)]
        found["elsewhere"] = _judged(scores, columns, shared, task.elsewhere.labels)["accuracy"]
    return found


def _base_to_new(cell: Cell, make: Maker, encoder: HFEncoder, task: Task, draw: Draw) -> Found:
    from ecliptic.core.zeroshot import zero_shot_head
    from ecliptic.data.shots import split_classes

    base, new = split_classes(task.classes)
    drawn = draw(task.pool, cell.shots, cell.seed, base)
    judge, cost = _fitted(make, encoder, base, drawn, cell.seed)
    exam, known, unknown = task.exam, task.exam.rows(base), task.exam.rows(new)
    scores, columns = exam.ask(judge)
    on_base = _judged(scores[known], columns, base, [exam.labels[i] for i in known])["accuracy"]
    by_name = hasattr(judge, "for_classes")
    if by_name:
        new_scores, new_columns = exam.ask(judge.for_classes(new), unknown)
    else:  # what cannot know new classes leaves them to the words
        head = zero_shot_head(encoder, new, task.templates)
        new_scores, new_columns = (exam.features[unknown] @ head.T).numpy(), new
    on_new = _judged(new_scores, new_columns, new, [exam.labels[i] for i in unknown])["accuracy"]
    return {
        **cost,
        "base": on_base,
        "new": on_new,
        "harmonic_mean": harmonic_mean(on_base, on_new),
        "new_by": "the method" if by_name else "zero-shot",
        "ood": _told_apart(judge, encoder, exam, scores, known, unknown),
    }


def _told_apart(
    judge: Any, encoder: HFEncoder, exam: Exam, scores: NDArray[Any], known: NDArray[Any], unknown: NDArray[Any]
) -> dict[str, dict[str, float]]:
    """By each score of `eval.ood`, and by the predictor's own."""
    import torch

    from ecliptic.eval.ood import ScoresTheUnknown, scale_of, training_free_scores

    said = training_free_scores(torch.from_numpy(scores), scale_of(judge, encoder))
    if isinstance(judge, ScoresTheUnknown):
        own = [judge.ood_scores(pixels) for pixels in exam.batches()]
        said |= {name: torch.cat([part[name] for part in own]) for name in own[0]}
    rows = np.concatenate([known, unknown])
    positive = np.arange(len(rows)) < len(known)
    found = {}
    for name, row in said.items():
        curve = metrics.roc(row.detach().cpu().numpy()[rows], positive)
        found[name] = {"auroc": curve.area(), "fpr95": curve.fpr(0.95)}
    return found


def _judged(
    scores: NDArray[Any], columns: Sequence[str], among: Sequence[str], labels: Sequence[str]
) -> dict[str, float]:
    """Accuracy and calibration error (15 bins) of scores (N, K) with these columns, answered among some of them."""
    place = {name: k for k, name in enumerate(columns)}
    if missing := [name for name in among if name not in place]:
        raise ValueError(f"the predictor has no column for {missing[0]!r}; it has {', '.join(map(repr, columns))}")
    whole = scores.astype(np.float64)
    chosen = whole[:, [place[name] for name in among]]
    if (whole >= 0).all() and np.allclose(whole.sum(1), 1, atol=1e-3):  # probabilities already, as in `classify`
        probabilities = chosen / chosen.sum(1, keepdims=True).clip(1e-12)
    else:
        probabilities = metrics.softmax(chosen)
    truth = np.array([list(among).index(label) for label in labels])
    hits = chosen.argmax(1) == truth
    confidence = probabilities.max(1).clip(0, 1)
    return {"accuracy": float(hits.mean()), "ece": metrics.calibration_error(confidence, hits.astype(float))}


# Cost


def _fitted(
    make: Maker, encoder: HFEncoder, classes: tuple[str, ...], drawn: Records, seed: int, *, cold: bool = False
) -> tuple[Any, Found]:
    """A fitted predictor and what the fit took; where it had to encode pictures for an open store, of a second fit."""
    from ecliptic.data.feature_store import FeatureStore, keeping, open_store

    def once() -> tuple[Any, Found]:
        judge = make(classes, seed)
        with measured() as cost:
            judge.fit(encoder, drawn)
        return judge, {**cost, "trained": getattr(judge, "trained_parameters_", None)}

    if cold:
        with keeping(FeatureStore()) as fresh:
            judge, cost = once()
        return judge, {**cost, "encoded": len(fresh)}
    store = open_store()
    before = 0 if store is None else len(store)
    judge, cost = once()
    return once() if store is not None and len(store) > before else (judge, cost)


@contextmanager
def measured() -> Iterator[Found]:
    """Fills in `seconds` of CPU time and `memory`, the peak in MiB above what was resident before, at the end of the block.

    The peak is the system's (Linux: VmHWM, which is reset first), elsewhere None. What an allocator had kept from earlier work
    and gave again does not show.
    """
    found: Found = {"seconds": None, "memory": None}
    gc.collect()
    before, began = _resident(reset=True), time.process_time()
    yield found
    found["seconds"] = time.process_time() - began
    if before is not None and (peak := _resident(peak=True)) is not None:
        found["memory"] = max(0.0, peak - before)


def _resident(*, peak: bool = False, reset: bool = False) -> float | None:
    """MiB in memory now, or the most since the last reset."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) / 1024 for x in lines if x.startswith("VmHWM:" if peak else "VmRSS:")), None)


# Keeping and summing up


class Journal:
    """Finished cells as lines of JSON, each written at once: whatever was killed goes on where it stopped."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._found: dict[str, Found] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the last line of a killed process
            self._found[_key(entry["key"])] = entry["found"]

    def get(self, key: Sequence[Any]) -> Found | None:
        return self._found.get(_key(key))

    def add(self, key: Sequence[Any], found: Found) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._found[_key(key)] = found
        whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("" if whole else "\n") + json.dumps({"key": list(key), "found": found}) + "\n")

    def __len__(self) -> int:
        return len(self._found)


def _key(parts: Sequence[Any]) -> str:
    return json.dumps(list(parts))


def few_shot(
    make: Maker,
    encoder: HFEncoder,
    task: Task,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = SEEDS,
    *,
    base_shots: int | None = max(SHOTS),
    draw: Draw = episode,
    name: str = "",
    journal: Journal | None = None,
    progress: Callable[[Cell, Found], None] | None = None,
) -> Report:
    """Run the whole protocol on one predictor; see the module.

    make: (classes, seed) -> an unfitted predictor. base_shots: of each base class, None to leave base-to-new out. draw: what
    a fit gets to see, `episode`, `unlabelled_episode` or `semi_supervised_episode`. journal: cells found there under `name` are
    not measured again.

    Numbers, each the mean over seeds with a 95 % Student interval: `few_shot.accuracy[k]`, `.ece[k]`, `.elsewhere[k]`,
    `.seconds[k]`, `.memory[k]`; `base_to_new.base`, `.new`, `.harmonic_mean`; `ood.SCORE.auroc`, `.fpr95`;
    `few_shot.seconds_with_encoding`, `few_shot.trained`. ValueError for shots that the pool does not hold, before any fit.
    """
    if not seeds or not shots or min(shots) < 1:
        raise ValueError(f"shots={tuple(shots)}, seeds={tuple(seeds)}: give at least one of each, shots from 1 on")
    if (wanted := max([*shots, base_shots or 0])) > task.most:
        raise ValueError(f"{wanted} shots are asked for, but one class has only {task.most} pictures to draw from")
    found: dict[Cell, Found] = {}
    for cell in cells(shots, seeds, base_shots):
        key = (name, task.id, *cell)
        kept = None if journal is None else journal.get(key)
        found[cell] = run_cell(cell, make, encoder, task, draw) if kept is None else kept
        if journal is not None and kept is None:
            journal.add(key, found[cell])
        if progress is not None:
            progress(cell, found[cell])
    report = Report(f"Few shots: {name or type(make(task.classes, 0)).__name__} on {task.pool.name}")
    report.subtitle = f"{len(task.classes)} classes, {len(task.exam.labels)} pictures to be judged on"
    report.numbers = summary(found, len(task.exam.labels))
    rows = [
        [f"{k}", *(report.numbers.get(f"few_shot.{key}[{k}]") for key in ("accuracy", "ece", "elsewhere"))]
        for k in sorted(shots)
    ]
    report.tables.append(Table(["shots", "accuracy", "calibration error", "other domain"], rows, "By shots"))
    report.notes.append(f"Intervals: 95 %, Student over {len(seeds)} seeds, which draw the shots.")
    if any(cell.kind == "base_to_new" and each["new_by"] == "zero-shot" for cell, each in found.items()):
        report.notes.append("It cannot learn classes by name: new ones were left to zero-shot words.")
    return report


def summary(found: Mapping[Cell, Found], pictures: int | None = None) -> dict[str, Number]:
    """Means over seeds with 95 % Student intervals; see `few_shot` for the names. pictures: that each value rests on."""
    groups: dict[str, list[float]] = {}
    for cell, each in found.items():
        for key, value in _flat(cell, each):
            groups.setdefault(key, []).append(value)
    return {key: over_seeds(values, _unit(key), pictures) for key, values in groups.items()}


def _flat(cell: Cell, found: Found) -> Iterator[tuple[str, float]]:
    if cell.kind == "cold":
        yield "few_shot.seconds_with_encoding", found["seconds"]
        return
    if cell.kind == "base_to_new":
        yield from ((f"base_to_new.{key}", found[key]) for key in ("base", "new", "harmonic_mean"))
        for score, pair in found["ood"].items():
            yield from ((f"ood.{score}.{key}", value) for key, value in pair.items())
        return
    for key in ("accuracy", "ece", "elsewhere", "seconds", "memory"):
        if found.get(key) is not None:
            yield f"few_shot.{key}[{cell.shots}]", found[key]
    if found.get("trained") is not None:
        yield "few_shot.trained", found["trained"]


def _unit(key: str) -> str:
    kinds = {"seconds": "s", "memory": "MiB", "trained": ""}
    return next((unit for kind, unit in kinds.items() if f".{kind}" in key), FRACTION)


def over_seeds(values: Sequence[float], unit: str = FRACTION, n: int | None = None) -> Number:
    """The mean and its 95 % Student interval, within [0, 1] for fractions; no interval of one value."""
    from ecliptic.core.claims import half_width

    mean, half = float(np.mean(values)), half_width(values)
    if half is None:
        return Number(mean, n=n, unit=unit)
    low, high = mean - half, mean + half
    if unit == FRACTION:
        low, high = max(0.0, low), min(1.0, high)
    return Number(mean, min(low, mean), max(high, mean), n=n, unit=unit)
