"""`ecliptic search QUERY`: find pictures by text, by a picture, or by both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ecliptic.apps.cli._inputs import one_picture
from ecliptic.apps.cli._shell import DEFAULT_MODEL, Json, emit, fail, load_model, open_model, text_vector, warn

if TYPE_CHECKING:
    from ecliptic.apps.index import Hit, Index
    from ecliptic.apps.index.relevance import Verdict
    from ecliptic.core.encoder import HFEncoder
    from ecliptic.core.exported import ExportedModel

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
    relevant: Annotated[
        bool, typer.Option("--relevant", help="Only hits that match; exit status 1 where none does.")
    ] = False,
    files: Annotated[bool, typer.Option("--files", "-f", help="Print plain paths, best first, for pipes.")] = False,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Default: the one that made the index.")] = None,
    json: Json = False,
) -> None:
    """Search an index by text, by a picture, or by a mix of both.

    Several parts are added up as directions; what --minus names is subtracted. The score is the cosine between
    query and picture: compare scores within one query only. For a query in words alone, the relevance beside it can
    be compared across queries: 50 % or more is a match, and where no hit is one, that is said. Several --where must
    all hold; a value that reads as a number is one, quotes make it a text, as in --where 'room="12"'. Where `index`
    has left an exported twin of its model in the cache, that one answers, without torch.
    """
    if query is None and not image:
        fail("nothing to look for: give words, or --image with a picture")
    if query is not None and not query.strip():
        fail("the query is empty: say what to look for")
    fields = dict(_field(text) for text in where or [])
    pictures = [one_picture(path) for path in image or []]
    if relevant and (pictures or minus):
        fail("--relevant judges queries in words alone: leave out --image and --minus")
    from ecliptic.apps.index import Index
    from ecliptic.apps.index.relevance import FIRST

    with Index.open(find_index(index)) as target:
        if len(target) == 0:
            fail(f"the index {target.folder} holds no pictures yet: run `ecliptic index` on the folder again")
        encoder = open_encoder(target, model)
        asked = _direction(encoder, query, pictures, minus or [])
        hits = target.search(asked, max(k, FIRST), glob=glob, where=fields)
        verdict = None if pictures or minus else _judged(target, encoder, asked, hits)
    if not hits and (glob is not None or fields):
        warn(f"no indexed picture has {' and '.join(where or [])}" if fields else f"no indexed path matches {glob!r}")
    shares = [None] * len(hits) if verdict is None else verdict.relevance.tolist()
    matches = None if verdict is None else verdict.matches
    shown = [(hit, share) for hit, share in zip(hits[:k], shares) if not relevant or share is None or share >= 0.5]
    if matches is False and hits and not json:
        warn(f"nothing here matches {query!r}{'' if relevant else '; the nearest are'}")
    value = {
        "query": query,
        "images": image or [],
        "minus": minus or [],
        "index": target.folder,
        "model": target.signature.model,
        "matches": matches,
        "hits": [
            {"path": hit.path, "score": round(hit.score, 6), "relevance": share and round(share, 4), **hit.extra}
            for hit, share in shown
        ],
    }
    lines = [hit.path if files else _line(hit, share) for hit, share in shown]
    emit(value, json, "\n".join(lines))
    if not shown:
        raise typer.Exit(1)


def _line(hit: Hit, share: float | None) -> str:
    """Cosine, relevance where there is one, and path."""
    return f"{hit.score:6.3f}  {'' if share is None else f'{share:4.0%}  '}{hit.path}"


def _judged(target: Index, encoder: HFEncoder | ExportedModel, asked: Any, hits: Sequence[Hit]) -> Verdict | None:
    """How relevant hits of a query in words are; None where nothing can be said of this index."""
    import numpy as np

    from ecliptic.apps.index.relevance import of_index

    judge = of_index(target, encoder.encode_texts)
    if judge is None:
        return None
    vectors = [target.vector(hit.path) for hit in hits]
    seen = [-asked if vector is None else vector for vector in vectors]  # None: removed between the search and now
    return judge.judge(asked, np.array(seen).reshape(-1, len(asked)))


def open_encoder(target: Index, model: str | None) -> HFEncoder | ExportedModel:
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
    encoder: HFEncoder | ExportedModel, query: str | None, pictures: Sequence[Any], minus: Sequence[str]
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
