"""Recipes as users meet them: a YAML file, the steps `data` and `evaluate`, and the report at the end."""

from __future__ import annotations

import difflib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from ecliptic.core.pipeline import Action, Done, Outcome, Recipe, RecipeError, State
from ecliptic.data.records import Records
from ecliptic.data.sources import open_source
from ecliptic.eval import evaluate
from ecliptic.eval.report import Cell, Number, Report, Section, Table

Part = Literal["all", "train", "test"]
TRAIN = 0.8  # share of a source that `part: train` means; by record id, so that it never changes sides

EXAMPLE = """\
name: first steps
steps:
  - load: tiny
  - data: {source: scenes, part: train}
  - train: {objective: infonce, steps: 100, batch_size: 64, lr: 1e-5}
  - evaluate: {source: scenes, part: test}
"""


class Data(Action):
    """`data: SOURCE`: the records that the steps after it work on.

    part: train is four records in five, test the others, always the same ones. shots: at most so many of each label.
    limit: at most so many in all. Which ones is decided by seed and record id.
    """

    gives = "pairs"
    kept = False

    def __init__(
        self, source: str, part: Part = "all", shots: int | None = None, limit: int | None = None, seed: int = 0
    ):
        for name, value in (("shots", shots), ("limit", limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.source, self.part, self.shots, self.limit, self.seed = source, part, shots, limit, seed

    def run(self, state: State, folder: Path) -> str:
        records = self.records()
        state.pairs = records
        return f"{len(records):,} records of {self.source} ({_checksum(records):08x})"

    def records(self) -> Records:
        """Open the source and choose. Raises what `open_source` raises, and ValueError where nothing is left."""
        records = part_of(open_source(self.source), self.part)
        if self.shots is not None or self.limit is not None:
            records = records.shuffle(self.seed)
        if self.shots is not None:
            records = _few(records, self.shots)
        if self.limit is not None:
            records = records[: self.limit]
        if not len(records):
            raise ValueError(
                f"{self.source} holds no records{'' if self.part == 'all' else f' in its part {self.part}'}"
            )
        return records


class Evaluate(Action):
    """`evaluate: SOURCE`: the fitted predictor, or the model where there is none, on records with captions or labels.

    name: what the report calls it. part: as in `data`. template: the sentence around a label, or a set of them.
    """

    needs = ("encoder",)
    gives = "report"

    def __init__(
        self,
        source: str,
        part: Part = "all",
        name: str | None = None,
        task: Literal["retrieval", "zero_shot"] | None = None,
        template: str = "photo",
        batch_size: int = 32,
    ):
        self.source, self.part, self.name, self.task = source, part, name, task
        self.template, self.batch_size = template, batch_size

    def run(self, state: State, folder: Path) -> str:
        subject: Any = state.judge or state.encoder
        templates = [self.template] if "{}" in self.template else self.template
        records = part_of(open_source(self.source), self.part)
        report = evaluate(
            subject, records, task=self.task, templates=templates, batch_size=self.batch_size, encoder=state.encoder
        )
        report.html(folder / "report.html")
        report.save(folder / "report.json")
        (folder / "title.txt").write_text(report.title, encoding="utf-8")
        self.restore(state, folder)
        return ", ".join(f"{key} {number.text}" for key, number in list(report.numbers.items())[:3])

    def restore(self, state: State, folder: Path) -> None:
        numbers = {key: Number(**value) for key, value in json.loads((folder / "report.json").read_text()).items()}
        title = self.name or (folder / "title.txt").read_text(encoding="utf-8")
        state.reports.append((title, Report(title, numbers)))


def part_of(records: Records, part: Part) -> Records:
    """All records, the four in five to learn from, or the others."""
    if part == "all":
        return records
    train, test = records.split(TRAIN)
    return train if part == "train" else test


def read(file: str | Path) -> tuple[str, Recipe]:
    """A recipe file -> its name (the file's where it says none) and the recipe, checked, its sources opened.

    Raises RecipeError naming step, argument and what would fit; OSError where the file cannot be read.
    """
    import yaml

    file = Path(file)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    name, lines = file.stem, content
    if isinstance(content, dict):
        if unknown := sorted(set(map(str, content)) - {"name", "steps"}):
            near = difflib.get_close_matches(unknown[0], ("name", "steps"), 1)
            raise RecipeError(
                f"{file}: unknown {unknown[0]!r}; "
                + (f"did you mean {near[0]}?" if near else "there are name and steps")
            )
        name, lines = str(content.get("name", name)), content.get("steps")
    if not isinstance(lines, list):
        raise RecipeError(f"{file} holds no list of steps; for example:\n\n{EXAMPLE}")
    recipe = Recipe(lines, {"data": Data, "evaluate": Evaluate})
    for step in recipe.steps:  # a misspelt source must not show after hours of training
        if isinstance(step.action, Data | Evaluate):
            try:
                opened = step.action.records() if isinstance(step.action, Data) else open_source(step.action.source)
            except ValueError as error:
                raise RecipeError(f"step {step.number} ({step.name}): {error}") from error
            if not len(opened):
                raise RecipeError(f"step {step.number} ({step.name}): {step.action.source} holds no records")
    return name, recipe


def run(
    file: str | Path, folder: str | Path, *, fresh: bool = False, told: Callable[[Done], None] | None = None
) -> tuple[Outcome, Report]:
    """Run a recipe file into a folder (see `Recipe.run`) and write report.html and report.json there."""
    name, recipe = read(file)
    outcome = recipe.run(folder, fresh=fresh, told=told)
    report = summary(name, outcome)
    report.commands.append(f"ecliptic run {file} --out {folder}")
    report.html(Path(folder) / "report.html")
    report.save(Path(folder) / "report.json")
    return outcome, report


def summary(name: str, outcome: Outcome) -> Report:
    """One report for a run: what each step did, then every evaluation; with several, keys begin with their titles."""
    report = Report(name, subtitle="What was done, and what came of it.")
    rows: list[list[Cell]] = [
        [done.step.number, done.step.name, _said(done.step.arguments), done.outcome, f"{done.seconds:.1f} s"]
        for done in outcome.steps
    ]
    report.tables.append(Table(["step", "method", "arguments", "outcome", "time"], rows, "Steps"))
    found: dict[str, dict[str, Number]] = {}
    for title, measured in outcome.state.reports:
        while title in found:
            title += "'"
        found[title] = measured.numbers
    if len(found) == 1:
        report.numbers = {key: number for key, number in next(iter(found.values())).items() if "[" not in key}
    elif found:
        report.details = {
            f"{title}: {key}": number for title, numbers in found.items() for key, number in numbers.items()
        }
        keys = dict.fromkeys(key for numbers in found.values() for key in numbers if "[" not in key)
        compared = [[key, *(numbers.get(key) for numbers in found.values())] for key in keys]
        report.tables.append(Table(["", *found], compared, "Evaluations"))
    left = [("model", outcome.model), ("predictor", outcome.predictor)]
    left += [
        (f"evaluation {done.step.number} with its pictures", done.folder / "report.html")
        for done in outcome.steps
        if done.folder is not None and (done.folder / "report.html").exists()
    ]
    lines = [f"{what}: `{path}`" for what, path in left if path is not None]
    if lines:
        report.sections.append(Section("Where it lies", "\n\n".join(lines)))
    return report


def _checksum(records: Records) -> int:
    """Of what can be read without opening a picture: other records under the same number must not go unnoticed."""
    total = zlib.crc32("\n".join(records.ids).encode())
    for key in ("caption", "label"):
        try:
            total = zlib.crc32("\n".join(map(str, records.column(key))).encode(), total)
        except KeyError:
            continue
    return total


def _said(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in arguments.items())


def _few(records: Records, shots: int) -> Records:
    """The first `shots` records of each label."""
    seen: dict[str, int] = {}
    chosen = []
    for i, label in enumerate(map(str, records.column("label"))):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= shots:
            chosen.append(i)
    return records[chosen]
