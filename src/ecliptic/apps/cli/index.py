"""`ecliptic index FOLDER`: make or refresh the index that `search` asks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ecliptic.apps.cli._inputs import picture_folder
from ecliptic.apps.cli._shell import DEFAULT_MODEL, Json, bad_json, bad_lines, counting, emit, fail, load_model, warn

NEEDS = True
RESUME = "what was done is kept: run the same command again to go on"


def index(
    folder: Annotated[Path, typer.Argument(help="Pictures, searched through all sub-folders.")],
    index: Annotated[
        Path | None, typer.Option("--index", help="Where the index lives. Default: FOLDER/.ecliptic")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help=f"Default: the index's own, {DEFAULT_MODEL} for a new one.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures the model sees at a time.")] = 32,
    json: Json = False,
) -> None:
    """Index a folder of pictures, or bring its index up to date.

    Only new and changed pictures are looked at; moved ones are recognised by their content. Pictures that cannot be
    read are listed and do not stop the work. Interrupted or killed, the same command goes on where it stopped.
    """
    picture_folder(folder)
    from ecliptic.apps.index import Index, NoIndexError
    from ecliptic.apps.index.towers import TowerEmbedder

    place = index or folder / ".ecliptic"
    if place.exists() and not place.is_dir():
        fail(f"{place} is a file: --index names a folder")
    try:
        with Index.open(place) as existing:
            own = existing.source or DEFAULT_MODEL
    except NoIndexError:
        own = DEFAULT_MODEL
    source = own if model is None else model
    embedder = TowerEmbedder(load_model(source))
    kept_as = str(Path(source).resolve()) if Path(source).exists() else source
    with Index.create(place, embedder.signature, root=folder, source=kept_as) as target:
        with counting("indexing") as advance:
            change = target.add(folder, embedder, batch_size=batch_size, progress=advance)
        held = len(target)
    bad = change.bad + [entry for entry in change.unreadable if entry[0] not in dict(change.bad)]
    if not json:
        for line in bad_lines(bad):
            warn(line)
    counts = {
        "added": len(change.added),
        "changed": len(change.changed),
        "moved": len(change.moved),
        "removed": len(change.removed),
        "unchanged": change.unchanged,
    }
    value = {
        "index": place,
        "model": embedder.signature.model,
        "pictures": held,
        **counts,
        "embedded": change.embedded,
        "bad": bad_json(bad),
    }
    told = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "nothing to do"
    emit(value, json, f"{held:,} pictures in {place} ({told})")
    if not held:
        fail(f"none of the {len(bad):,} pictures below {folder} could be read", 1)
