"""`ecliptic curate SOURCE --out SHARDS`: choose training pairs by their captions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ecliptic.apps.cli._inputs import has, open_records
from ecliptic.apps.cli._shell import Json, bad_json, bad_lines, counting, emit, fail, warn

if TYPE_CHECKING:
    from ecliptic.data.records import Records, SkipLog

NEEDS = True


def curate(
    source: Annotated[str, typer.Argument(help="A built-in source, a folder, a CSV or Parquet file, or tar shards.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder for tar shards, or a .csv that names the pictures.")
    ] = None,
    metadata: Annotated[
        str, typer.Option(help="Concepts to look for: a file with one a line, a JSON list, or wordnet.")
    ] = "wordnet",
    cap: Annotated[
        float | None, typer.Option("-t", "--cap", help="Captions per concept; inf only drops what has none.")
    ] = None,
    tail_mass: Annotated[
        float | None, typer.Option(help="In place of -t: share of all matches that rare concepts hold. [default: 0.06]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be kept.")] = False,
    json: Json = False,
) -> None:
    """Keep pairs whose captions name a concept, few per concept.

    Captions without any concept of the list are dropped; concepts that more than -t captions name are thinned out to about
    that many, and every pair of a rarer one stays (MetaCLIP, arXiv 2309.16671). Words match as they are written: "Dog" is
    not "dog".
    """
    if cap is not None and tail_mass is not None:
        fail("give either -t or --tail-mass: each says the same in another way")
    if (out is None) != dry_run:
        fail("--dry-run writes nothing: leave --out away" if dry_run else "say where to write with --out, or --dry-run")
    if out is not None and out.is_file():
        fail(f"{out} is there already: choose another name")
    records = open_records(source)
    if not has(records, "caption"):
        fail(f"{source} has no captions to choose by: a CSV with columns image and caption, for example")
    from dataclasses import replace

    from ecliptic.methods.curate.metaclip import TAIL_MASS, MetaClip

    step = MetaClip(metadata, cap, TAIL_MASS if tail_mass is None else tail_mass, seed=seed)
    step = replace(step, counts=step.count(records))  # both passes below need them
    report = step.report(records)
    if not report.matched:
        fail(f"no caption of {source} names any of the {len(report.entries):,} concepts, letter case included")
    value: dict[str, Any] = {"source": source, "metadata": metadata, "seed": seed, **report.to_json()}
    told = ""
    if out is not None:
        kept = step.apply(records)
        written, bad = _write(kept, out)  # type: ignore[arg-type]  # Records in, Records out
        if not json:
            for line in bad_lines([(skip.path or skip.id, skip.reason) for skip in bad]):
                warn(line)
        value |= {
            "out": out,
            "written": written,
            "bad": bad_json([(skip.path or skip.id, skip.reason) for skip in bad]),
        }
        told = f"\nwrote {written:,} pairs to {out}"
    emit(value, json, f"{report}{told}")


def _write(records: Records, out: Path) -> tuple[int, SkipLog]:
    """Shards, or a table of paths; how many pairs were written, and what could not be read."""
    from ecliptic.data.records import SkipLog

    log = SkipLog()
    if out.suffix.lower() == ".csv":
        return _table(records, out), log
    from ecliptic.data.shards import write_shards

    written = 0
    with counting("writing", "pairs") as advance:

        def progress(done: int) -> None:
            nonlocal written
            written = done
            advance(done, len(records))

        write_shards(records, out, log=log, progress=progress)
    return written, log


def _table(records: Records, out: Path) -> int:
    import csv

    from ecliptic.core.files import atomic_file

    rows = []
    for record in records.undecoded():
        image = record["image"]
        if not isinstance(image, str | Path):
            fail(f"the pictures of {records.name} are no files of their own: give --out a folder, for shards")
        label = {} if record.get("label") is None else {"label": record["label"]}
        rows.append({"id": record["id"], "image": Path(image).resolve(), "caption": record["caption"], **label})
    with atomic_file(out, "w") as handle:
        table = csv.DictWriter(
            handle, ["id", "image", "caption", *(["label"] if any("label" in r for r in rows) else [])]
        )
        table.writeheader()
        table.writerows(rows)
    return len(rows)
