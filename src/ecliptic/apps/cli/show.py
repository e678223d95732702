"""`ecliptic show SLUG`: all about one method."""

from __future__ import annotations

import textwrap
from typing import Annotated, Any

import typer

from ecliptic.apps.cli._shell import Json, emit, warn

NEEDS = True


def show(
    slug: Annotated[str, typer.Argument(help="A method or a baseline, as `ecliptic methods` lists them.")],
    json: Json = False,
) -> None:
    """Show all about one method: paper, claim, settings, text."""
    from ecliptic.core.method import baselines, find

    if (plain := slug.strip().lower().replace("-", "_")) in baselines():
        _baseline(plain, json)
        return
    card = find(slug)
    signature, documentation = _inside(card)
    value = {**card.as_dict(), "signature": signature, "documentation": documentation}

    def text() -> str:
        lines = [
            f"{card.slug} ({card.stage}, {card.kind})",
            f"{card.title} ({card.year}) {card.link}",
            "",
            *textwrap.wrap(f"For: {card.purpose}", 110, subsequent_indent="     "),
            *textwrap.wrap(f"Claim: {card.claim}", 110, subsequent_indent="       "),
            "",
        ]
        for name, kind in card.parts:
            lines += [f"{signature.get(name, name)}  [{kind}]", ""]
        lines += [documentation, "", f"File: {card.file}", f"Run its claim: ecliptic claim {card.slug}"]
        return "\n".join(lines)

    emit(value, json, text)


def _baseline(slug: str, json: bool) -> None:
    """A baseline has no paper of its own and no claim."""
    import inspect
    from importlib import import_module

    from ecliptic.core.method import get

    kind = get(slug)
    parts = (import_module(kind.__module__).__doc__ or "", kind.__doc__ or "")
    documentation = "\n\n".join(inspect.cleandoc(part) for part in parts if part)
    signature = f"{kind.__name__}{_signature(inspect.signature(kind))}"
    value = {"slug": slug, "stage": "baseline", "signature": signature, "documentation": documentation}
    emit(value, json, lambda: f"{slug} (baseline)\n\n{signature}\n\n{documentation}")


def _inside(card: Any) -> tuple[dict[str, str], str]:
    """Signatures by name and the module's text; without them where an extra is missing."""
    import inspect
    from importlib import import_module

    try:
        module = import_module(card.module)
    except ImportError as error:
        warn(f"note: the method cannot be imported here: {error}")
        return {}, ""
    signatures = {name: f"{name}{_signature(inspect.signature(getattr(module, name)))}" for name, _ in card.parts}
    own = getattr(module, card.name).__doc__ or ""
    return signatures, "\n\n".join(inspect.cleandoc(part) for part in (module.__doc__ or "", own) if part)


def _signature(signature: Any) -> str:
    """One argument a line where there are several, types as written."""
    parts = []
    for parameter in signature.parameters.values():
        kind, default = parameter.annotation, parameter.default
        typed = (
            "" if kind is parameter.empty else f": {kind if isinstance(kind, str) else getattr(kind, '__name__', kind)}"
        )
        parts.append(f"{parameter.name}{typed}" + ("" if default is parameter.empty else f" = {default!r}"))
    if len(parts) < 3:
        return f"({', '.join(parts)})"
    return "(\n" + "".join(f"    {part},\n" for part in parts) + ")"
