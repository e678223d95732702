"""`ecliptic claim SLUG`: measure again what a method claims, with its control."""

from __future__ import annotations

from typing import Annotated

import typer

from ecliptic.apps.cli._shell import Json, emit, fail

NEEDS = True
RESUME = "what was measured is kept: run the same command again to go on"


def claim(
    slug: Annotated[str | None, typer.Argument(help="A method, as `ecliptic methods` lists it.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Other seeds than the claim's own, as in 0,1,2.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what this code has measured before.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Run nothing: is the published result still fresh?")] = False,
    json: Json = False,
) -> None:
    """Measure what a method claims, against its own baseline.

    Exit code 0 if the claim holds with its control, 1 if not. Other seeds than the claim's own give a preliminary
    result, kept apart from the published one. Needs a checkout of the repository.
    """
    from ecliptic.core import claims
    from ecliptic.core.method import find

    if check:
        _check(slug, json)
        return
    if slug is None:
        fail("name a method, or use --check to look at all published results")
    try:
        chosen = None if seeds is None else tuple(int(part) for part in seeds.split(",") if part.strip())
    except ValueError:
        fail(f"--seeds {seeds!r}: write numbers with commas between them, as in 0,1,2")
    result = claims.run_claim(find(slug).slug, chosen, fresh=fresh)
    emit(result, json, lambda: claims.summary(result))
    if not result["holds"]:
        raise typer.Exit(1)


def _check(slug: str | None, json: bool) -> None:
    """All results, or one."""
    from ecliptic.core import claims
    from ecliptic.core.method import find

    if slug is None:
        problems = claims.check()
        emit({"problems": problems}, json, "\n".join(problems) or "METHODS.md and every result are up to date")
        if problems:
            raise typer.Exit(1)
        return
    name = find(slug).slug
    result = claims.read_result(name)
    if result is None:
        fail(f"{name} has no published result: run `ecliptic claim {name}`", 1)
    stale = claims.why_stale(result)
    told = f"{claims.summary(result)}\n\n" + (f"stale: {stale}" if stale else "measured by the code as it is")
    emit({**result, "stale": stale}, json, told)
    if stale or not result["holds"]:
        raise typer.Exit(1)
