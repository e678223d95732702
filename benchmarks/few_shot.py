"""All adaptation methods and what papers compare them with, on one model, the same pictures and the same draws.

    python -m benchmarks.few_shot --minutes 40 --work runs/few_shot    # goes on where the last one stopped
    python -m benchmarks.few_shot --report --work runs/few_shot        # writes the result file from what is there

Model: "offline". Pictures: Open Clip Art. A class is a folder of the second level with all below it; those count whose name is
a word, or words, that WordNet has as a noun (one of them, or several), and of these the twenty with the most pictures; links to
other drawings are left out, and of each class 48 are kept, at random. So "flags" and "fruit" are among them, and so are "icons"
and "led": the noise is part of it.
The other domain: Tux Paint stamps that are no drawings, where a folder of their path is called like a class.

What learns is found, not listed: every predictor of the stage adapt and every baseline that takes `classes`. Cells are done in
the order of what they tell for what they cost. Where a fit takes longer than `--limit` seconds, nothing larger of that method is
tried. Cells are kept by a digest of the method's file: one that has changed is measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch

from benchmarks.measure import RESULTS, commit, machine
from ecliptic.core.claims import code_digest
from ecliptic.core.contracts import Pairs, Predictor
from ecliptic.core.encoder import Encoder, HFEncoder, load
from ecliptic.core.feature_predictor import FeaturePredictor
from ecliptic.core.method import baselines, cards
from ecliptic.core.progress import OutOfTime, time_limit
from ecliptic.data.clipart import clipart
from ecliptic.data.feature_store import FeatureStore, keeping
from ecliptic.data.records import Records, unit_hash
from ecliptic.data.shots import encode_shots, encode_views
from ecliptic.data.stamps import stamps
from ecliptic.data.wordnet import WordNet, wordnet
from ecliptic.eval.few_shot import (
    SEEDS,
    SHOTS,
    Cell,
    Draw,
    Found,
    Journal,
    Task,
    cells,
    deal,
    episode,
    over_seeds,
    run_cell,
    semi_supervised_episode,
    summary,
    unlabelled_episode,
)

CLASSES, EACH = (
    20,
    48,
)  # pictures of a class that are kept: 16 shots, 16 to be judged on, and as many again without labels
HELD_OUT, ELSEWHERE = 16, 12  # pictures of a class to be judged on, and at most so many of the other domain
TEMPLATE = "a drawing of {}."  # for all that take prompts; folders are named in the plural, and no other was tried
VIEWS = 4  # augmented views of each picture, where a method's own number is 10: less than half the time, for all alike
LIMIT = 90.0  # seconds for one fit

NAMES, UNSEEN = "names alone", "pictures alone"
DRAWS: dict[str, Draw] = {
    "labels": episode,
    NAMES: episode,  # it has to be given some, and opens none
    UNSEEN: unlabelled_episode,
    "labels, and the rest of the pool without": semi_supervised_episode,
}


# The pictures


def drawings() -> tuple[Records, tuple[str, ...]]:
    """Clip art by the rule above, with its label, and the classes in alphabetical order."""
    records = clipart(duplicates=False).map(_kind, images=False)
    records = records[[label is not None for label in records.column("label")]]
    known = wordnet("n")
    counts = Counter(records.column("label"))
    names = [name for name in counts if is_noun(name, known)]
    chosen = sorted(sorted(names, key=lambda name: (-counts[name], name))[:CLASSES])
    return some_of_each(records, chosen, EACH), tuple(chosen)


def some_of_each(records: Records, classes: Sequence[str], most: int) -> Records:
    """At most so many of each class, by their ids alone; records with other labels are left out."""
    labels, ids = records.column("label"), records.ids
    rows: list[int] = []
    for name in classes:
        own = [i for i, label in enumerate(labels) if label == name]
        rows += sorted(own, key=lambda i: unit_hash(0, f"kept {ids[i]}"))[:most]
    return records[sorted(rows)]


def _kind(record: dict[str, Any]) -> dict[str, Any]:
    folders = record["category"]
    return {**record, "label": folders[1].replace("_", " ") if len(folders) > 1 else None}


def is_noun(name: str, known: WordNet) -> bool:
    """Whether WordNet has the phrase, or each of its words, as a noun, in the singular or the plural."""
    return any(map(known.find, singulars(name))) or all(any(map(known.find, singulars(word))) for word in name.split())


def singulars(word: str) -> list[str]:
    """The word, and what it may be the plural of: the rules for nouns of WordNet's `morphy`."""
    endings = (
        ("s", ""),
        ("ses", "s"),
        ("xes", "x"),
        ("zes", "z"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("men", "man"),
        ("ies", "y"),
    )
    return [word, *(word.removesuffix(many) + one for many, one in endings if word.endswith(many))]


def photographs(classes: Sequence[str]) -> Records:
    """Stamps that are no drawings, labelled by the deepest folder called like a class; a few of each."""

    def labelled(record: dict[str, Any]) -> dict[str, Any]:
        folders = record["category"]
        found = [folder for folder in folders if folder in classes]
        return {**record, "label": found[-1] if found and "cartoon" not in folders else None}

    return some_of_each(stamps().map(labelled, images=False), classes, ELSEWHERE)


def task_of(encoder: HFEncoder) -> Task:
    records, classes = drawings()
    return deal(
        encoder, records, classes, held_out=HELD_OUT, elsewhere=photographs(classes), templates=(TEMPLATE,), seed=0
    )


# What is compared


@dataclass(frozen=True)
class Variant:
    """One row of a method: its settings, what it gets to see, and, rarely, what stands between it and the protocol."""

    name: str = ""  # behind the method's own
    settings: Mapping[str, Any] = field(default_factory=dict)
    sees: str = "labels"
    wrap: Callable[[Any], Predictor] | None = None
    only: str = ""  # the kind of cell, if not all


class BothHalves(FeaturePredictor):
    """`GdaNewClasses` as the protocol asks it: the base classes first, then a classifier for new ones out of the same shots."""

    def __init__(self, judge: Any):
        self.judge = judge

    def fit(self, encoder: Encoder, pairs: Pairs) -> Self:
        self.encoder_, self._pairs = encoder, pairs
        self.judge.set_params(new_classes=("something", "something else"))  # not asked before `for_classes` names them
        self.judge.fit(encoder, pairs)
        self.classes_, self.trained_parameters_ = self.judge.base_classes_, 0
        return self

    def scores_of(self, features: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.judge.predict_base(features).scores
        return scores

    def for_classes(self, names: Sequence[str]) -> Predictor:
        judge: Predictor = self.judge.clone().set_params(new_classes=tuple(names)).fit(self.encoder_, self._pairs)
        return judge


class Peer(FeaturePredictor):
    """A scikit-learn classifier directly on the frozen features."""

    def __init__(self, kind: Callable[[], Any], classes: tuple[str, ...]):
        self.kind, self.classes = kind, classes

    def fit(self, encoder: Encoder, pairs: Pairs) -> Self:
        shots = encode_shots(encoder, pairs, classes=self.classes)
        self.encoder_, self.classes_ = encoder, shots.classes
        self._model = self.kind().fit(shots.features.double().numpy(), shots.labels.numpy())
        return self

    def scores_of(self, features: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._model.decision_function(features.double().numpy())).float()


def logistic_regression() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=1000)


def linear_discriminant() -> Any:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")


PEERS: dict[str, Callable[[], Any]] = {
    "scikit-learn, LogisticRegression": logistic_regression,
    "scikit-learn, LDA with shrinkage": linear_discriminant,
}

VARIANTS: dict[str, tuple[Variant, ...]] = {
    "zero_shot": (Variant(sees=NAMES), Variant("prompt ensemble", {"templates": "ensemble"}, NAMES)),
    "coop": (Variant(settings={"start": "a drawing of"}),),
    "step_classifier": (Variant("clip_svd, 100 steps", {"step": "clip_svd", "settings": {"steps": 100}}),),
    "gda:GdaNewClasses": (Variant(wrap=BothHalves, only="base_to_new"),),
    "gda:GdaUnlabelled": (Variant(sees=UNSEEN),),
    "nola": (Variant(sees=UNSEEN),),
    "pseudolabel_tuning": (
        Variant("grip", {"paradigm": "ul", "strategy": "grip", "start": "a drawing of"}, UNSEEN),
        Variant("fpl", {"paradigm": "ul", "strategy": "fpl", "start": "a drawing of"}, UNSEEN),
        Variant(
            "ssl, grip",
            {"paradigm": "ssl", "strategy": "grip", "start": "a drawing of"},
            "labels, and the rest of the pool without",
        ),
    ),
    "perceptionclip": (Variant("medium", {"template": "a drawing of {}"}, NAMES),),
}
"""Rows of those that need other settings than `classes`, `templates` and `seed`, or come in several forms."""


@dataclass(frozen=True)
class Entry:
    """A row of the table. kind: "baseline", "method" or "peer". files: whose code the figures depend on."""

    name: str
    kind: str
    make: Callable[[tuple[str, ...], int], Predictor]
    sees: str
    files: tuple[Path, ...]
    link: str | None = None
    settings: str = ""
    only: str = ""

    @cached_property
    def digest(self) -> str:
        parts = [*map(code_digest, self.files), self.settings, self.sees]
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=6).hexdigest()

    def cells(self) -> list[Cell]:
        """What is to be measured: of what sees no pictures, one of each kind."""
        found = cells(SHOTS, SEEDS) if self.sees != NAMES else cells((max(SHOTS),), (min(SEEDS),))
        return [cell for cell in found if self.only in ("", cell.kind)]


def entries() -> list[Entry]:
    """Everything that names pictures among classes it is given."""
    found = []
    for slug in baselines():
        name = "".join(word.capitalize() for word in slug.split("_"))
        found += _rows("baseline", slug, getattr(importlib.import_module(f"ecliptic.baselines.{slug}"), name))
    for card in cards():
        for name, kind in card.parts if card.stage == "adapt" else ():
            if kind == "Predictor":
                part = getattr(importlib.import_module(card.module), name)
                found += _rows("method", card.slug if name == card.name else f"{card.slug}:{name}", part, card.link)
    for name, model in PEERS.items():
        found.append(Entry(name, "peer", lambda c, s, model=model: Peer(model, c), "labels", ()))
    return found


def _rows(kind: str, slug: str, cls: type[Predictor], link: str | None = None) -> list[Entry]:
    known = inspect.signature(cls).parameters
    if "classes" not in known:  # it does something else with pictures than to name them
        return []
    usual: dict[str, Any] = {}
    if "templates" in known and known["templates"].default == "photo":
        usual["templates"] = (TEMPLATE,)
    if "views" in known and known["views"].default == 10:
        usual["views"] = VIEWS
    rows = []
    for variant in VARIANTS.get(slug, (Variant(),)):
        settings = usual | dict(variant.settings)
        files = [Path(inspect.getfile(cls))]
        if (step := settings.get("step")) is not None:
            files += [card.file for card in cards() if card.slug == step]
        if slug == "perceptionclip":
            settings["factors"] = {"medium": importlib.import_module(cls.__module__).FACTORS["medium"]}

        def make(classes: tuple[str, ...], seed: int, settings: Any = settings, wrap: Any = variant.wrap) -> Predictor:
            judge = cls(classes=classes, **settings, **({"seed": seed} if "seed" in known else {}))
            return wrap(judge) if wrap else judge

        name = f"{slug}, {variant.name}" if variant.name else slug
        told = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        rows.append(Entry(name, kind, make, variant.sees, tuple(files), link, told, variant.only))
    return rows


# Running


@dataclass
class Runner:
    """Cells in the order of what they tell for what they cost, as far as the time goes."""

    task: Task
    journal: Journal
    limit: float = LIMIT
    commit: str = field(default_factory=commit)

    def key(self, entry: Entry, cell: Cell) -> tuple[Any, ...]:
        return (entry.name, entry.digest, self.task.id, *cell)

    def get(self, entry: Entry, cell: Cell) -> Found | None:
        """What is known of a cell; an error only for as long as nothing at all has changed."""
        found = self.journal.get(self.key(entry, cell))
        return None if found is not None and found.get("commit", self.commit) != self.commit else found

    def done(self, entry: Entry) -> dict[Cell, Found]:
        """What was measured; of what sees no pictures, the same for all shots and seeds."""
        found = {cell: each for cell in entry.cells() if (each := self.get(entry, cell)) and "seconds" in each}
        if entry.sees == NAMES:
            kinds = {cell.kind: each for cell, each in found.items()}
            return {cell: kinds[cell.kind] for cell in cells(SHOTS, SEEDS) if cell.kind in kinds}
        return found

    def why_not(self, entry: Entry, cell: Cell) -> str:
        """Why a cell is not tried, or nothing: an error, or the time it would take."""
        for other in entry.cells():
            each = self.get(entry, other)
            if each is not None and "error" in each and (other.kind, other.shots) == (cell.kind, cell.shots):
                return str(each["error"])
            if each is not None and "stopped" in each and other.shots <= cell.shots:
                return f"stopped after {each['stopped']:.0f} s at {other.shots} shots"
        seconds = self.expected(entry, cell)
        return f"would take about {seconds:.0f} s" if seconds > self.limit else ""

    def expected(self, entry: Entry, cell: Cell, what: str = "seconds") -> float:
        """Seconds of a fit (or all that is `spent` on the cell), from what is known of the method; 5 where nothing is.

        Once a fit takes long, with the root of the shots: some train for so many steps, others for so many epochs.
        """
        known = [(other.shots, each[what]) for other, each in self.done(entry).items() if other.kind != "cold"]
        if not known:
            return 5.0 * math.sqrt(cell.shots / 4)
        near = min(known, key=lambda pair: abs(math.log(pair[0] / cell.shots)))
        ratio = math.sqrt(cell.shots / near[0])
        return near[1] * (max(1.0, ratio) if near[1] > 5 else 1.0)

    def worth(self, cell: Cell) -> float:
        kinds = {"cold": 2.0, "base_to_new": 4.0}
        return kinds.get(cell.kind, {1: 3.0, 4: 3.0, 16: 5.0}.get(cell.shots, 1.5)) / (1 + cell.seed)

    def next(self, found: Sequence[Entry]) -> tuple[Entry, Cell] | None:
        open_cells = [
            (self.expected(entry, cell, "spent") / self.worth(cell), -i, entry, cell)
            for i, entry in enumerate(found)
            for cell in entry.cells()
            if self.get(entry, cell) is None and not self.why_not(entry, cell)
        ]
        if not open_cells:
            return None
        _, _, entry, cell = min(open_cells, key=lambda item: item[:2])
        return entry, cell

    def run(self, entry: Entry, cell: Cell) -> Found:
        began = time.process_time()
        found: Found
        try:
            # of the clock: the machine may have other work, and pictures are to be judged too
            with time_limit(2 * self.limit):
                found = run_cell(cell, entry.make, self.task.exam.encoder, self.task, DRAWS[entry.sees])
        except (OutOfTime, KeyboardInterrupt) as stop:
            found = {"stopped": time.process_time() - began}
            if isinstance(stop, KeyboardInterrupt):
                if found["stopped"] > self.limit:  # else it is left to the next run
                    self.journal.add(self.key(entry, cell), found | {"spent": found["stopped"]})
                raise
        except Exception as error:  # a method that fails is a row that says so, and the others go on
            found = {"error": f"{type(error).__name__}: {error}", "commit": self.commit}
        found["spent"] = time.process_time() - began
        self.journal.add(self.key(entry, cell), found)
        return found


def prepare(task: Task) -> None:
    """Encode what most methods will ask for, so that no fit is stopped for it: the views of all shots, and the exams."""
    _ = task.exam.features, task.elsewhere and task.elsewhere.features
    for seed in SEEDS:
        encode_views(task.exam.encoder, episode(task.pool, max(SHOTS), seed, task.classes), VIEWS, seed)


# Reporting

TIP, COOP, GDA, UNLABELLED = "2111.03930", "2109.01134", "2402.04087", "2306.01669"
SVD, GRIP = "step_classifier, clip_svd, 100 steps", "pseudolabel_tuning, grip"
PAPERS = (  # better, than, metric, whose claim if not that of the first, what it says
    ("tip_adapter", "zero_shot", "accuracy", TIP, "a cache of a few pictures beats words alone, without training"),
    ("tip_adapter_f", "tip_adapter", "accuracy", TIP, "training the cache's keys beats leaving them"),
    ("coop", "zero_shot", "accuracy", COOP, "learnt prompts beat handcrafted ones"),
    ("coop", "linear_probe", "accuracy", COOP, "learnt prompts beat a linear probe, most with few shots"),
    ("gda", "tip_adapter", "accuracy", GDA, "Gaussians with one covariance beat a cache"),
    ("gda", "zero_shot", "accuracy", GDA, "Gaussians with one covariance beat words alone"),
    ("gda:GdaUnlabelled", "zero_shot", "accuracy", GDA, "without labels, too, they beat words alone"),
    ("gda:GdaNewClasses", "zero_shot", "new", GDA, "for classes known by name only, too, they beat words alone"),
    ("glad", "lora_tuning", "harmonic_mean", "", "a regularised gradient generalises better than plain LoRA"),
    ("glad", "lora_tuning", "elsewhere", "", "a regularised gradient generalises better than plain LoRA"),
    ("mocoop", "coop", "accuracy", "", "a mixture of prompts beats a single one"),
    ("mocoop", "coop", "new", "", "a mixture of prompts forgets less of classes that it was not shown"),
    ("caps_adapter", "sus_x", "accuracy", "", "captions among the keys beat TIP-X"),
    ("sus_x", "tip_adapter", "accuracy", "2211.16198", "comparing by words as well (TIP-X) beats a plain cache"),
    (GRIP, "pseudolabel_tuning, fpl", "accuracy", UNLABELLED, "pseudolabels in growing number beat a few fixed ones"),
    (GRIP, "zero_shot", "accuracy", UNLABELLED, "tuning on the model's own answers beats words alone"),
    ("nola", "zero_shot", "accuracy", "", "tuning without labels beats words alone"),
    (SVD, "coop", "accuracy", "2509.03740", "tuning singular values beats learnt prompts"),
    (SVD, "lora_tuning", "harmonic_mean", "2509.03740", "tuning singular values generalises better than LoRA"),
    ("wise_ft_tuning", "full_tuning", "elsewhere", "2109.01903", "averaged weights hold better in another domain"),
    ("perceptionclip, medium", "zero_shot", "accuracy", "", "saying the context beats leaving it unsaid"),
)
AT = (1, 4, 16)  # shots at which pairs are told


def paired(better: Mapping[Cell, Found], than: Mapping[Cell, Found], metric: str) -> dict[str, dict[str, Any]]:
    """Differences on the same draws, by shots: mean over the seeds that both have, with a 95 % Student interval."""
    found = {}
    kind = "base_to_new" if metric in ("base", "new", "harmonic_mean") else "shots"
    for k in (max(SHOTS),) if kind == "base_to_new" else AT:
        both = [Cell(kind, k, seed) for seed in SEEDS]  # type: ignore[arg-type]
        gaps = [better[c][metric] - than[c][metric] for c in both if c in better and c in than]
        if gaps:
            number = over_seeds(gaps, "")
            found[str(k)] = {"mean": number.value, "low": number.low, "high": number.high, "seeds": len(gaps)}
    return found


def report(runner: Runner, found: Sequence[Entry]) -> dict[str, Any]:
    """All that was measured by the code as it stands, with what was not and why."""
    task, rows = runner.task, []
    for entry in found:
        done = runner.done(entry)
        missing = {}
        for cell in entry.cells():
            if cell not in done:
                missing[f"{cell.kind} {cell.shots} {cell.seed}"] = runner.why_not(entry, cell) or "no time left"
        by = {each["new_by"] for each in done.values() if "new_by" in each}
        rows.append(
            {
                "name": entry.name,
                "kind": entry.kind,
                "link": entry.link,
                "settings": entry.settings,
                "sees": entry.sees,
                "digest": entry.digest,
                "new classes by": ", ".join(sorted(by)),
                "numbers": {key: number.to_json() for key, number in summary(done, len(task.exam.labels)).items()},
                "seeds": dict(Counter(f"{cell.kind} {cell.shots}" for cell in done)),
                "missing": missing,
                "cells": [[*cell, _rounded(each)] for cell, each in done.items()],
            }
        )
    by_name = {entry.name: runner.done(entry) for entry in found}
    links = {entry.name: entry.link for entry in found}
    pairs = [
        {"better": a, "than": b, "metric": metric, "link": _arxiv(source) or links[a], "says": says, "by shots": gaps}
        for a, b, metric, source, says in PAPERS
        if a in by_name and b in by_name and (gaps := paired(by_name[a], by_name[b], metric))
    ]
    pool, labels = Counter(task.pool.column("label")), Counter(task.exam.labels)
    abroad = Counter(task.elsewhere.labels) if task.elsewhere else {}
    return {
        "command": "python -m benchmarks.few_shot",
        "machine": machine(),
        "versions": {p: version(p) for p in ("torch", "transformers", "scikit-learn", "numpy")},
        "commit": runner.commit,
        "settings": {
            "model": task.exam.encoder.name,
            "classes": {
                name: {"pool": pool[name], "judged on": labels[name], "elsewhere": abroad.get(name, 0)}
                for name in task.classes
            },
            "template": TEMPLATE,
            "views": VIEWS,
            "shots": SHOTS,
            "seeds": SEEDS,
            "limit": runner.limit,
            "task": task.id,
            "seconds a picture": _encoding(runner, found),
        },
        "rows": rows,
        "pairs": pairs,
    }


def _arxiv(number: str) -> str | None:
    return f"https://arxiv.org/abs/{number}" if number else None


def _encoding(runner: Runner, found: Sequence[Entry]) -> float | None:
    """CPU seconds that encoding a picture takes, from the probe's cold fit, which encodes each once and does little else."""
    for entry in found:
        for cell, each in runner.done(entry).items() if entry.name == "linear_probe" else ():
            if cell.kind == "cold" and each.get("encoded"):
                return float(each["seconds"] / each["encoded"])
    return None


def _say(began: float, job: tuple[Entry, Cell], found: Found) -> None:
    told = ("accuracy", "harmonic_mean", "seconds", "spent", "stopped", "error")
    shown = {key: _rounded(found[key]) for key in told if key in found}
    print(f"{time.process_time() - began:.0f} s: {job[0].name} {tuple(job[1])} {shown}", file=sys.stderr, flush=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return round(value, 5) if isinstance(value, float) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40.0, help="of CPU time; start no further cell after so many")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that one fit may take")
    parser.add_argument("--work", type=Path, default=Path("runs/few_shot"), help="folder for cells and features")
    parser.add_argument("--only", default="", help="methods whose name holds this")
    parser.add_argument("--prepare", action="store_true", help="encode pictures and stop")
    parser.add_argument("--report", action="store_true", help="measure nothing, write what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    encoder = load("offline")
    runner = Runner(task_of(encoder), Journal(options.work / "cells.jsonl"), options.limit)
    found = [entry for entry in entries() if options.only in entry.name]
    if not options.report:
        with keeping(FeatureStore(options.work / "features")):
            prepare(runner.task)
            if options.prepare:
                return 0
            print(f"{time.process_time() - began:.0f} s: ready, {len(found)} rows", file=sys.stderr, flush=True)
            while time.process_time() - began < 60 * options.minutes:
                if (job := runner.next(found)) is None:
                    break
                _say(began, job, runner.run(*job))
    RESULTS.mkdir(exist_ok=True)
    content = json.dumps(report(runner, entries()), indent=1) + "\n"
    (RESULTS / "few_shot.json").write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
