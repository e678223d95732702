"""`ecliptic search QUERY`: find pictures by text, by a picture, or by both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ecliptic.apps.cli._inputs import one_picture
from ecliptic.apps.cli._shell import DEFAULT_MODEL, Json, emit, fail, load_model, open_model, text_vector, warn

if TYPE_CHECKING:
    from ecliptic.apps.index import Index
    from ecliptic.core.encoder import HFEncoder
    from ecliptic.core.ort import OrtEncoder

NEEDS = True


def search(
    query: Annotated[str | None, typer.Argument(help="What to look for, in words.")] = None,
    image: Annotated[list[Path] | None, typer.Option("--image", "-i", help="Look like this picture.")] = None,
    minus: Annotated[list[str] | None, typer.Option("--minus", help="Words that should not apply.")] = None,
    index: Annotated[Path | None, typer.Option("--index", help="An index, or the folder it was made for. [.]")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many hits.")] = 10,
    glob: Annotated[str | None, typer.Option("--glob", "-g", help="Only paths that match, as in '2024/*.jpg'.")] = None,
    where: Annotated[
        list[str] | None, typer.Option("--where", "-w", help="Only pictures with this field, as in year=2024.")
    ] = None,
    files: Annotated[bool, typer.Option("--files", "-f", help="Print plain paths, best first, for pipes.")] = False,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Default: the one that made the index.")] = None,
    json: Json = False,
) -> None:
    """Search an index by text, by a picture, or by a mix of both.

    Several parts are added up as directions; what --minus names is subtracted. The score is the cosine between
    query and picture: compare scores within one query only. Several --where must all hold; a value that reads as a
    number is one, quotes make it a text, as in --where 'room="12"'. Where `index` has left an exported twin of its
    model in the cache, that one answers, without torch.
    """
    if query is None and not image:
        fail("nothing to look for: give words, or --image with a picture")
    if query is not None and not query.strip():
        fail("the query is empty: say what to look for")
    fields = dict(_field(text) for text in where or [])
    pictures = [one_picture(path) for path in image or []]
    from ecliptic.apps.index import Index

    with Index.open(find_index(index)) as target:
        if len(target) == 0:
            fail(f"the index {target.folder} holds no pictures yet: run `ecliptic index` on the folder again")
        encoder = open_encoder(target, model)
        hits = target.search(_direction(encoder, query, pictures, minus or []), k, glob=glob, where=fields)
    if not hits and (glob is not None or fields):
        warn(f"no indexed picture has {' and '.join(where or [])}" if fields else f"no indexed path matches {glob!r}")
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


def open_encoder(target: Index, model: str | None) -> HFEncoder | OrtEncoder:
    """What embeds a query for this index: its model's exported twin if there is one, else the model, or the one named."""
    from ecliptic.apps.exported import twin
    from ecliptic.apps.index.towers import decoded_fast, signature

    if model is not None:
        encoder = open_model(model)
    else:
        encoder = twin(target.signature.model) or load_model(target.source or DEFAULT_MODEL)
    target.require(signature(encoder, decoded_fast(target.signature)))
    return encoder


def _direction(
    encoder: HFEncoder | OrtEncoder, query: str | None, pictures: Sequence[Any], minus: Sequence[str]
) -> Any:
    """The sum of the unit rows of all parts, those of `minus` subtracted: (D,)."""
    import numpy as np

    parts = [] if query is None else [np.asarray(text_vector(encoder, query))]
    parts += list(np.asarray(encoder.encode_images(pictures))) if pictures else []
    parts += [-np.asarray(text_vector(encoder, words)) for words in minus]
    return np.sum(parts, axis=0)


def _field(text: str) -> tuple[str, str | float]:
    """`name=value`; a value that is a number, true, false or a quoted text in JSON is that, any other a text."""
    from json import JSONDecodeError, loads

    name, sign, value = text.partition("=")
    if not sign or not name.strip() or not value.strip():
        fail(f"--where takes name=value, as in year=2024, not {text!r}")
    if '"' in name:
        fail(f"--where: a field's name holds no quotes: {name}")
    try:
        found = loads(value)
    except JSONDecodeError:
        found = value.strip()
    return name.strip(), found if isinstance(found, str | int | float) else value.strip()


def find_index(place: Path | None) -> Path:
    """The index itself, or the folder that holds it as `.ecliptic`; without a name, the nearest one upwards."""
    from ecliptic.apps.index.lance import is_lance

    if place is not None and is_lance(place):
        return place
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
