"""The command line: one small file per verb; a verb is the function that has its file's name.

Only the verb asked for is imported, and each imports what is heavy inside its function, so that help and the catalogue
start at once. Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 nothing worked, 2 bad input,
130 interrupted.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from ecliptic.apps.cli._shell import guarded


def verbs() -> list[str]:
    """The files of this folder; names with an underscore are machinery."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("_"))


def build(only: str | None = None) -> typer.Typer:
    """The application with all verbs, or with one."""
    app = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode=None,  # plain help, at half the start-up time
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(help="Find, name, highlight and learn from pictures by text.")
    def ecliptic(
        version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    ) -> None:
        pass

    for name in verbs() if only is None else [only]:
        module: Any = import_module(f"{__name__}.{name}")
        resume = getattr(module, "RESUME", "")
        app.command(name, no_args_is_help=getattr(module, "NEEDS", False))(guarded(getattr(module, name), resume))
    return app


def main(arguments: list[str] | None = None) -> None:
    """The console script."""
    given = sys.argv[1:] if arguments is None else arguments
    only = given[0] if given and given[0] in verbs() else None
    build(only)(given, prog_name="ecliptic")


def _version(asked: bool) -> None:
    if asked:
        from ecliptic import __version__

        typer.echo(f"ecliptic {__version__}")
        raise typer.Exit
