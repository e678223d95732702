"""`ecliptic embed SOURCE --out DIR`: embeddings as plain files for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ecliptic.apps.cli._inputs import open_records, picture_folder
from ecliptic.apps.cli._shell import (
    DEFAULT_MODEL,
    Json,
    Model,
    bad_json,
    bad_lines,
    counting,
    emit,
    fail,
    open_model,
    warn,
)

NEEDS = True
RESUME = "finished shards are kept: run the same command again to go on"


def embed(
    source: Annotated[str, typer.Argument(help="A built-in source, a folder, a CSV or Parquet file, or tar shards.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the embeddings.")],
    model: Model = DEFAULT_MODEL,
    dtype: Annotated[str, typer.Option(help="float16 or float32.")] = "float16",
    shard: Annotated[int, typer.Option(min=1, help="Records per file.")] = 10_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures the model sees at a time.")] = 32,
    fast: Annotated[
        bool, typer.Option("--fast", help="Decode large JPEGs at a fraction of their size; embeddings differ slightly.")
    ] = False,
    json: Json = False,
) -> None:
    """Embed pictures, and captions where there are any.

    Writes img_emb/img_emb_N.npy (unit rows), text_emb/text_emb_N.npy, and metadata/metadata_N.jsonl with one line per
    row; pictures that cannot be read are listed in errors.jsonl. A shard appears whole or not at all, and finished
    ones are not done again.
    """
    if dtype not in ("float16", "float32"):
        fail(f"no dtype {dtype!r}: float16 or float32")
    if Path(source).is_dir():
        picture_folder(Path(source))
    records = open_records(source)
    from ecliptic.apps.embedding import embed_records

    encoder = open_model(model)
    with counting("embedding") as advance:
        done = embed_records(
            encoder, records, out, dtype=dtype, shard=shard, batch_size=batch_size, fast=fast, progress=advance
        )
    if not json:
        for line in bad_lines(done.bad):
            warn(line)
    value = {
        "out": out,
        "model": encoder.id,
        "dim": encoder.dim,
        "rows": done.rows,
        "shards": done.shards,
        "resumed": done.resumed,
        "captions": done.captions,
        "bad": bad_json(done.bad),
    }
    told = f", {done.resumed} of {done.shards} shards were there already" if done.resumed else ""
    emit(value, json, f"{done.rows:,} rows of {encoder.dim} in {out}{told}")
    if not done.rows:
        fail(f"none of the {len(records):,} pictures could be read", 1)
