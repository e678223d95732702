"""`ecliptic methods`: the catalogue, searched by words and, where none match, by meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ecliptic.apps.cli._shell import DEFAULT_MODEL, Json, Model, emit, fail, note

if TYPE_CHECKING:
    from ecliptic.core.method import Card


def methods(
    query: Annotated[str | None, typer.Argument(help="Words, or what you want: 'better few-shot accuracy'.")] = None,
    meaning: Annotated[bool, typer.Option("--meaning", help="Rank by meaning even if words match.")] = False,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="List what methods are compared with; `adapt` fits these, too.")
    ] = False,
    k: Annotated[int, typer.Option("-k", min=1, help="How many to show when ranked by meaning.")] = 5,
    model: Model = DEFAULT_MODEL,
    json: Json = False,
) -> None:
    """List the methods in the toolkit, or those that fit a need."""
    from ecliptic.core import method
    from ecliptic.core.method import cards

    if baselines:
        known = method.baselines()
        wide = max(map(len, known))
        emit(known, json, lambda: "\n".join(f"{slug:{wide}}  {text}" for slug, text in known.items()))
        return
    found = cards()
    if query is not None and query.strip():
        words = query.lower().split()
        matching = [card for card in found if all(word in _text(card) for word in words)]
        if matching and not meaning:
            found = matching
        else:
            note("no method has all these words; ranking by meaning")
            found = _by_meaning(query, found, model)[:k]
    emit([card.as_dict() for card in found], json, lambda: _table(found))


def _text(card: Card) -> str:
    return f"{card.slug} {card.slug.replace('_', ' ')} {card.stage} {card.title} {card.purpose} {card.claim}".lower()


def _by_meaning(query: str, found: list[Card], model: str) -> list[Card]:
    from ecliptic.apps.cli._shell import load_model, text_vector

    if not found:
        return []
    try:
        encoder = load_model(model)
    except (ImportError, ValueError) as error:
        fail(f"no method has all the words of {query!r}, and ranking by meaning needs a model: {error}", 1)
    wanted = text_vector(encoder, query)
    scores = encoder.encode_texts([f"{card.purpose} ({card.title})" for card in found], overflow="windows") @ wanted
    return [found[i] for i in scores.argsort(descending=True, stable=True).tolist()]


def _table(found: list[Card]) -> str:
    if not found:
        return "no methods"
    slug = max(len(card.slug) for card in found)
    stage = max(len(card.stage) for card in found)
    return "\n".join(f"{card.slug:{slug}}  {card.stage:{stage}}  {card.year or '':4}  {card.purpose}" for card in found)
