"""`ecliptic index FOLDER`: make or refresh the index that `search` asks; with an option, look after one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ecliptic.apps.cli._inputs import picture_folder
from ecliptic.apps.cli._shell import (
    DEFAULT_MODEL,
    Json,
    bad_json,
    bad_lines,
    counting,
    emit,
    fail,
    note,
    open_model,
    warn,
)

if TYPE_CHECKING:
    from ecliptic.apps.index import Index
    from ecliptic.core.encoder import HFEncoder
    from ecliptic.core.exported import ExportedModel

NEEDS = True
RESUME = "what was done is kept: run the same command again to go on"


def index(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="Pictures, searched through all sub-folders. With the options below: an index, or its folder."
        ),
    ] = None,
    index: Annotated[
        str | None,
        typer.Option("--index", help="Where the index lives: a folder, NAME.lance or a URL. Default: FOLDER/.ecliptic"),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help=f"Default: the index's own, {DEFAULT_MODEL} for a new one.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures the model sees at a time.")] = 32,
    fast: Annotated[
        bool | None,
        typer.Option(
            "--fast/--exact",
            help="Decode large JPEGs at a fraction of their size: several times as fast, embeddings differ slightly. "
            "Default: the index's own way, exact for a new one.",
        ),
    ] = None,
    export: Annotated[
        bool, typer.Option(help="Keep an exported copy of the model in the cache: searches then start without torch.")
    ] = True,
    check: Annotated[bool, typer.Option("--check", help="Is all data sound, and what does fast search miss?")] = False,
    duplicates: Annotated[bool, typer.Option("--duplicates", help="Groups of pictures with the same bytes.")] = False,
    at_least: Annotated[
        float | None, typer.Option("--at-least", min=-1, max=1, help="With --duplicates: alike, by cosine (try 0.97).")
    ] = None,
    merge: Annotated[str | None, typer.Option("--merge", help="Take over the pictures of another index.")] = None,
    remove: Annotated[
        str | None, typer.Option("--remove", help="Forget paths that match, as in '2024/*.jpg'; files stay.")
    ] = None,
    compact: Annotated[bool, typer.Option("--compact", help="Give back the space of what was removed.")] = False,
    json: Json = False,
) -> None:
    """Index a folder of pictures, or bring its index up to date.

    Only new and changed pictures are looked at; moved ones are recognised by their content. Pictures that cannot be
    read are listed and do not stop the work. Interrupted or killed, the same command goes on where it stopped.

    With --check, --duplicates, --merge, --remove or --compact, that is done to the index instead, and no model is
    needed; without FOLDER, to the nearest index from here upwards.
    """
    chosen = {
        "--check": check,
        "--duplicates": duplicates,
        "--merge": merge is not None,
        "--remove": remove is not None,
        "--compact": compact,
    }
    named = [name for name, given in chosen.items() if given]
    if len(named) > 1:
        fail(f"{' and '.join(named)} are different jobs: name one at a time")
    if at_least is not None and not duplicates:
        fail("--at-least says how alike --duplicates must be: give both")
    if not named:
        if folder is None:
            fail("name a folder of pictures")
        _refresh(folder, index, model, batch_size, fast, export, json)
        return
    if model is not None:
        fail(f"{named[0]} works on stored vectors: leave out --model")
    from ecliptic.apps.index import Index

    with Index.open(_find(index if index is not None else folder)) as target:
        if check:
            _check(target, json)
        elif duplicates:
            _duplicates(target, at_least, json)
        elif merge is not None:
            _merge(target, merge, json)
        elif remove is not None:
            _remove(target, remove, json)
        else:
            with counting("linking", "rows") as linking:
                dropped = target.compact(graph_progress=linking)
            value = {"index": target.folder, "pictures": len(target), "dropped": dropped}
            emit(value, json, f"{dropped:,} vectors that no picture owned are gone from {target.folder}")


def _find(place: str | Path | None) -> Path:
    from ecliptic.apps.cli.search import find_index

    return find_index(None if place is None else Path(place))


def _refresh(
    folder: Path, index: str | None, model: str | None, batch_size: int, fast: bool | None, export: bool, json: bool
) -> None:
    picture_folder(folder)
    from ecliptic.apps.index import Index, NoIndexError, is_lance
    from ecliptic.apps.index.relevance import of_index
    from ecliptic.apps.index.towers import TowerEmbedder, decoded_fast

    place = folder / ".ecliptic" if index is None else index if is_lance(index) else Path(index)
    if isinstance(place, Path) and place.exists() and not place.is_dir():
        fail(f"{place} is a file: --index names a folder")
    try:
        with Index.open(place) as existing:
            own, own_fast = existing.source or DEFAULT_MODEL, decoded_fast(existing.signature)
    except NoIndexError:
        own, own_fast = DEFAULT_MODEL, bool(fast)
    if fast is not None and fast != own_fast:
        fail(
            f"the index {place} was made with {'fast' if own_fast else 'exact'} decoding, and the two are not mixed: "
            f"leave {'--fast' if fast else '--exact'} out, or make another index with --index"
        )
    source = own if model is None else model
    encoder = open_model(source)
    embedder = TowerEmbedder(encoder, own_fast)
    kept_as = str(Path(source).resolve()) if Path(source).exists() else source
    with Index.create(place, embedder.signature, root=folder, source=kept_as) as target:
        with ExitStack() as stack:
            advance = stack.enter_context(counting("indexing"))
            link: Callable[[int, int], None] | None = None

            def linking(done: int, total: int) -> None:
                nonlocal link
                if link is None:
                    stack.close()  # one bar after the other
                    link = stack.enter_context(counting("linking", "rows"))
                link(done, total)

            change = target.add(folder, embedder, batch_size=batch_size, progress=advance, graph_progress=linking)
        held = len(target)
        of_index(target, encoder.encode_texts)  # kept: a search finds at hand what it judges relevance by
    twin = _keep_twin(encoder) if export and held else None
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
        "exported": twin,
        "fast": own_fast,
        "pictures": held,
        **counts,
        "embedded": change.embedded,
        "bad": bad_json(bad),
    }
    told = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "nothing to do"
    emit(value, json, f"{held:,} pictures in {place} ({told})")
    if not held:
        fail(f"none of the {len(bad):,} pictures below {folder} could be read", 1)


def _keep_twin(encoder: HFEncoder | ExportedModel) -> Path | None:
    """Export the model for later searches. That it cannot be exported costs them time, nothing else."""
    from ecliptic.apps.exported import keep_twin, place, twin
    from ecliptic.core.exported import ExportedModel, ExportError

    if isinstance(encoder, ExportedModel):
        return None
    if twin(encoder.id) is not None:
        return place(encoder.id)
    note("exporting the model, so that searches start without torch ...")
    try:
        return keep_twin(encoder)
    except (ExportError, OSError) as error:
        warn(f"note: searches will start with torch, because the model was not exported: {error}")
        return None


def _check(target: Index, json: bool) -> None:
    found = target.check()
    value: dict[str, Any] = {
        "index": target.folder,
        "model": target.signature.model,
        "sound": not found.problems,
        "problems": found.problems,
        "pictures": len(target),
        "rows_in_graph": found.covered,
        "recall_at_10": found.recall,
        "interval": found.interval,
        "milliseconds": found.milliseconds,
        "milliseconds_every_row": found.milliseconds_every,
    }
    lines = found.problems or [f"{len(target):,} pictures in {target.folder}, all sound"]
    if found.recall is not None and found.interval is not None:
        low, high = found.interval
        how = f"a graph over {found.covered:,} rows" if found.covered else "every row"
        lines.append(
            f"search looks at {how}: {found.recall:.4f} of the true ten best ({low:.4f} to {high:.4f}) "
            f"in {found.milliseconds:.1f} ms, with every row {found.milliseconds_every:.1f} ms"
        )
    emit(value, json, "\n".join(lines))
    if found.problems:
        raise typer.Exit(1)


def _duplicates(target: Index, at_least: float | None, json: bool) -> None:
    groups = target.duplicates(at_least)
    value = {"index": target.folder, "at_least": at_least, "groups": groups}
    emit(value, json, "\n\n".join("\n".join(group) for group in groups) or "no duplicates")


def _merge(target: Index, place: str, json: bool) -> None:
    from ecliptic.apps.index import Index

    with Index.open(_find(place)) as other, counting("linking", "rows") as linking:
        change = target.merge(other, graph_progress=linking)
        source = other.folder
    counts = {"added": len(change.added), "changed": len(change.changed), "known": change.unchanged}
    value = {"index": target.folder, "merged": source, "pictures": len(target), **counts, "bad": bad_json(change.bad)}
    told = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "nothing to do"
    emit(value, json, f"{len(target):,} pictures in {target.folder} ({told})")


def _remove(target: Index, glob: str, json: bool) -> None:
    gone = target.remove(glob=glob)
    if not gone:
        warn(f"no indexed path matches {glob!r}")
    value = {"index": target.folder, "pictures": len(target), "removed": gone}
    emit(value, json, f"{len(target):,} pictures in {target.folder} ({len(gone):,} removed; the files are untouched)")
    if not gone:
        raise typer.Exit(1)
