"""`ecliptic train SOURCE`: tune an encoder on captioned pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ecliptic.apps.cli._inputs import has, open_records
from ecliptic.apps.cli._shell import DEFAULT_MODEL, Json, Model, emit, fail, load_model
from ecliptic.core.files import require_own

if TYPE_CHECKING:
    from ecliptic.core.encoder import HFEncoder
    from ecliptic.core.guard import Guarded

NEEDS = True
RESUME = "the last checkpoint is kept: run the same command again to go on"
LR, LR_ADAPTERS = 1e-5, 2e-4  # ours; adapters start from nothing and are few, so they take larger steps


def train(
    source: Annotated[str, typer.Argument(help="A built-in source, a folder, a CSV or Parquet file, or tar shards.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the trained model.")],
    model: Model = DEFAULT_MODEL,
    objective: Annotated[str, typer.Option(help="infonce, sigmoid, or the name of a method with a loss.")] = "infonce",
    steps: Annotated[int, typer.Option(min=1, help="Updates of the weights.")] = 400,
    batch_size: Annotated[int, typer.Option(min=2, help="Pairs per update; each is the others' negative.")] = 64,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Encode this many pairs at a time: large batches, little memory.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(min=0.0, help="Peak learning rate. Default: 1e-5, with adapters 2e-4.")
    ] = None,
    freeze: Annotated[
        list[str] | None, typer.Option(help="A tower to leave as it is: image or text. May be repeated.")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(min=1, help="Train low-rank adapters of this rank, and leave the rest as it is.")
    ] = None,
    ema: Annotated[
        float | None, typer.Option(min=0.0, max=0.9999999, help="Average the weights with this decay, such as 0.999.")
    ] = None,
    guard: Annotated[
        str | None,
        typer.Option(help="Other data, with labels or captions: measured before and after, to see forgetting."),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="If the guard's score fell, mix old and new weights until it holds.")
    ] = False,
    precision: Annotated[str, typer.Option(help="no (float32), bf16 or fp16.")] = "no",
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also log for TensorBoard.")] = False,
    seed: Annotated[int, typer.Option(help="Order of the data and every random draw.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again instead of resuming.")] = False,
    json: Json = False,
) -> None:
    """Train a model further on pictures with captions.

    The result is a new model in OUT. Checkpoints, a log (log.jsonl) and adapters go to OUT.checkpoints; the same command
    resumes from them, and one with other settings is refused unless --fresh. The defaults are careful ones for small
    data: a low learning rate, and equal captions never count as each other's negatives. With --guard DATA --repair the
    model does not unlearn what it knew. Under torchrun the processes share each batch.
    """
    require_own(out, "config.json")
    if repair and guard is None:
        fail("--repair needs to know what must not be forgotten: give --guard DATA as well")
    records = open_records(source)
    if not has(records, "caption"):
        fail(f"{source} has no captions, and training needs pairs: a CSV with columns image and caption, for example")
    guarding = None if guard is None else open_records(guard)
    if guarding is not None and not (has(guarding, "label") or has(guarding, "caption")):
        fail(f"--guard {guard} has neither labels nor captions: there is nothing to measure")
    from ecliptic.core.lora import Lora, save_adapters
    from ecliptic.core.pipeline import named_objective
    from ecliptic.core.train import Train

    checkpoints = out.with_name(f"{out.name}.checkpoints")
    step = Train(
        named_objective(objective)(),
        steps=steps,
        batch_size=batch_size,
        chunk=chunk,
        lr=lr if lr is not None else LR if lora_rank is None else LR_ADAPTERS,
        freeze=tuple(freeze or ()),
        lora=None if lora_rank is None else Lora(rank=lora_rank, alpha=2 * lora_rank),
        ema=ema,
        guard=guarding,
        guard_repair=repair,
        precision=cast(Any, precision),
        tensorboard=tensorboard,
        seed=seed,
        checkpoints=checkpoints,
        checkpoint_every=checkpoint_every,
        resume=not fresh,
    )
    encoder = load_model(model)
    trained = step.run(encoder, records)
    from ecliptic.core.distributed import rank

    if rank() != 0:  # the main process speaks and writes
        return
    result = cast("HFEncoder", trained.encoder)
    result.name = out.name
    result.save_pretrained(out)
    if trained.adapters is not None:
        save_adapters(cast("HFEncoder", trained.adapters), checkpoints / "adapters")
    losses = [row["loss"] for row in trained.log if "loss" in row]
    value = {
        "out": out,
        "id": result.id,
        "base": encoder.id,
        "steps": steps,
        "records": len(records),
        "loss": {"first": losses[0], "last": losses[-1]} if losses else None,
        "guard": None if trained.guard is None else {"data": guard, **trained.guard.as_dict()},
        "log": checkpoints / "log.jsonl",
    }
    told = f", loss {losses[0]:.3f} -> {losses[-1]:.3f}" if losses else ""
    lines = [f"{out}: {steps} steps on {len(records):,} records{told}"]
    if trained.guard is not None:
        lines.append(_kept(trained.guard, str(guard)))
    emit(value, json, "\n".join([*lines, f"use it with --model {out}"]))


def _kept(found: Guarded, data: str) -> str:
    """The guard's finding in a line: before, after, and what was done about it."""
    line = f"{data} (not trained on): {found.before:.3f} before, {found.after:.3f} after"
    if not found.fell:
        return line
    mixed = f"{100 * found.alpha:.0f} % new and {100 - 100 * found.alpha:.0f} % old weights"
    score = found.scores[found.alpha]
    return f"{line}; {mixed}: {score:.3f}" + (
        ", which is what was saved" if found.repaired else " (--repair saves that)"
    )
