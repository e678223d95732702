"""`ecliptic run RECIPE`: a file of steps, from data and model to one report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ecliptic.apps.cli._shell import Json, emit, fail, warn

NEEDS = True
RESUME = "finished steps are kept: run the same command again to go on"


def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML file with a list of steps.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for what the steps leave. Default: RECIPE.run")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check the recipe and say what it would do.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do every step again.")] = False,
    json: Json = False,
) -> None:
    """Run a recipe: a list of steps, each a method with its arguments.

    Names, arguments, order and data sources are checked before anything starts. Every step keeps what it made in OUT, so
    that an interrupted run goes on where it was and a changed recipe repeats only what the change touches. It ends in
    OUT/report.html.
    """
    if not recipe.is_file():
        fail(f"no such recipe: {recipe}")
    folder = out or recipe.with_suffix(".run")
    if folder.exists() and not folder.is_dir():
        fail(f"{folder} is a file: --out names a folder")
    from ecliptic.apps import recipes

    if check:
        name, read = recipes.read(recipe)
        steps = [{"step": step.number, "name": step.name, "arguments": step.arguments} for step in read.steps]
        lines = [f"{step['step']:3}  {step['name']}  {step['arguments'] or ''}" for step in steps]
        emit({"name": name, "steps": steps}, json, "\n".join(lines))
        return
    from ecliptic.core.pipeline import Done
    from ecliptic.data.cache import lock

    def told(done: Done) -> None:
        how = "was done before" if done.resumed else f"{done.seconds:.1f} s"
        warn(f"{done.step.number}. {done.step.name}: {done.outcome} ({how})")

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock(folder / "run", timeout=0):
            outcome, report = recipes.run(recipe, folder, fresh=fresh, told=told)
    except TimeoutError:
        fail(f"another run is writing to {folder}: wait for it, or choose another --out", 1)
    steps = [
        {
            "step": done.step.number,
            "name": done.step.name,
            "outcome": done.outcome,
            "seconds": round(done.seconds, 3),
            "resumed": done.resumed,
        }
        for done in outcome.steps
    ]
    value = {
        "out": folder,
        "report": folder / "report.html",
        "model": outcome.model,
        "predictor": outcome.predictor,
        "steps": steps,
        "numbers": report.to_json(),
    }
    emit(value, json, lambda: f"{report}\n\n{folder / 'report.html'}")
