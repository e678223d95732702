"""`ecliptic train SOURCE`: tune an encoder on captioned pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ecliptic.apps.cli._inputs import has, open_records
from ecliptic.apps.cli._shell import DEFAULT_MODEL, Json, Model, emit, fail, load_model

if TYPE_CHECKING:
    from ecliptic.core.encoder import HFEncoder

NEEDS = True
RESUME = "the last checkpoint is kept: run the same command again to go on"


def train(
    source: Annotated[str, typer.Argument(help="A built-in source, a folder, a CSV or Parquet file, or tar shards.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the trained model.")],
    model: Model = DEFAULT_MODEL,
    objective: Annotated[str, typer.Option(help="infonce, sigmoid, or the name of a method with a loss.")] = "infonce",
    steps: Annotated[int, typer.Option(min=1, help="Updates of the weights.")] = 400,
    batch_size: Annotated[int, typer.Option(min=2, help="Pairs per update; each is the others' negative.")] = 64,
    lr: Annotated[float, typer.Option(min=0.0, help="Peak learning rate.")] = 1e-5,
    freeze: Annotated[list[str] | None, typer.Option(help="A tower to leave as it is: image or text.")] = None,
    seed: Annotated[int, typer.Option(help="Order of the data and every random draw.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again instead of resuming.")] = False,
    json: Json = False,
) -> None:
    """Train a model further on pictures with captions.

    The result is a new model in OUT. Checkpoints and a log (log.jsonl) go to OUT.checkpoints; the same command resumes
    from them. The defaults are careful ones for small data: a low learning rate, and equal captions never count as
    each other's negatives.
    """
    if out.exists() and any(out.iterdir()) and not (out / "config.json").exists():
        fail(f"{out} holds other files: choose an empty folder")
    records = open_records(source)
    if not has(records, "caption"):
        fail(f"{source} has no captions, and training needs pairs: a CSV with columns image and caption, for example")
    from ecliptic.core.train import Train

    checkpoints = out.with_name(f"{out.name}.checkpoints")
    encoder = load_model(model)
    step = Train(
        _objective(objective),
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        freeze=tuple(freeze or ()),
        seed=seed,
        checkpoints=checkpoints,
        checkpoint_every=checkpoint_every,
        resume=not fresh,
    )
    trained = step.run(encoder, records)
    result = cast("HFEncoder", trained.encoder)
    result.name = out.name
    result.save_pretrained(out)
    losses = [row["loss"] for row in trained.log if "loss" in row]
    value = {
        "out": out,
        "id": result.id,
        "base": encoder.id,
        "steps": steps,
        "records": len(records),
        "loss": {"first": losses[0], "last": losses[-1]} if losses else None,
        "log": checkpoints / "log.jsonl",
    }
    told = f", loss {losses[0]:.3f} -> {losses[-1]:.3f}" if losses else ""
    emit(value, json, f"{out}: {steps} steps on {len(records):,} records{told}\nuse it with --model {out}")


def _objective(name: str) -> Any:
    from ecliptic.core.objectives import InfoNCE, Sigmoid

    plain: dict[str, Any] = {"infonce": InfoNCE, "sigmoid": Sigmoid}
    if (key := name.lower().replace("-", "").replace("_", "")) in plain:
        return plain[key]()
    from ecliptic.core.contracts import Objective
    from ecliptic.core.method import cards, get

    found = get(name)
    if isinstance(found, type) and issubclass(found, Objective):
        return found()
    losses = [f"{card.slug}:{part}" for card in cards() for part, kind in card.parts if kind == "Objective"]
    fail(f"{name} is no loss; choose one of {', '.join([*plain, *losses])}")
