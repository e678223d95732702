"""`ecliptic search QUERY`: find pictures by text, by a picture, or by both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ecliptic.apps.cli._inputs import one_picture
from ecliptic.apps.cli._shell import DEFAULT_MODEL, Json, emit, fail, load_model, text_vector, warn

NEEDS = True


def search(
    query: Annotated[str | None, typer.Argument(help="What to look for, in words.")] = None,
    image: Annotated[list[Path] | None, typer.Option("--image", "-i", help="Look like this picture.")] = None,
    minus: Annotated[list[str] | None, typer.Option("--minus", help="Words that should not apply.")] = None,
    index: Annotated[Path | None, typer.Option("--index", help="An index, or the folder it was made for. [.]")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many hits.")] = 10,
    glob: Annotated[str | None, typer.Option("--glob", "-g", help="Only paths that match, as in '2024/*.jpg'.")] = None,
    files: Annotated[bool, typer.Option("--files", "-f", help="Print plain paths, best first, for pipes.")] = False,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Default: the one that made the index.")] = None,
    json: Json = False,
) -> None:
    """Search an index by text, by a picture, or by a mix of both.

    Several parts are added up as directions; what --minus names is subtracted. The score is the cosine between
    query and picture: compare scores within one query only.
    """
    if query is None and not image:
        fail("nothing to look for: give words, or --image with a picture")
    if query is not None and not query.strip():
        fail("the query is empty: say what to look for")
    from ecliptic.apps.index import Index

    wanted = [one_picture(path) for path in image or []]
    with Index.open(find_index(index)) as target:
        if len(target) == 0:
            fail(f"the index {target.folder} holds no pictures yet: run `ecliptic index` on the folder again")
        from ecliptic.apps.index.towers import TowerEmbedder

        encoder = load_model((target.source or DEFAULT_MODEL) if model is None else model)
        target.require(TowerEmbedder(encoder).signature)
        parts = [] if query is None else [text_vector(encoder, query)]
        parts += list(encoder.encode_images(wanted)) if wanted else []
        parts += [-text_vector(encoder, words) for words in minus or []]
        hits = target.search(sum(part.numpy() for part in parts), k, glob=glob)
    if not hits and glob is not None:
        warn(f"no indexed path matches {glob!r}")
    value = {
        "query": query,
        "images": image or [],
        "minus": minus or [],
        "index": target.folder,
        "model": target.signature.model,
        "hits": [{"path": hit.path, "score": round(hit.score, 6), **hit.extra} for hit in hits],
    }
    lines = [hit.path if files else f"{hit.score:6.3f}  {hit.path}" for hit in hits]
    emit(value, json, "\n".join(lines))
    if not hits:
        raise typer.Exit(1)


def find_index(place: Path | None) -> Path:
    """The index itself, or the folder that holds it as `.ecliptic`; without a name, the nearest one upwards."""
    if place is None:
        here = Path.cwd()
        for folder in (here, *here.parents):
            if (folder / ".ecliptic" / "index.db").is_file():
                return folder / ".ecliptic"
        fail("no index here: run `ecliptic index FOLDER` first, or name one with --index")
    if (place / "index.db").is_file():
        return place
    if (place / ".ecliptic" / "index.db").is_file():
        return place / ".ecliptic"
    if not place.exists():
        fail(f"no such index: {place}")
    fail(f"there is no index in {place}: run `ecliptic index {place}` first")
