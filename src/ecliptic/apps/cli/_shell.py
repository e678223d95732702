"""What every verb shares: options, output, and errors that tell the user what to do."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from ecliptic.core.encoder import HFEncoder
    from ecliptic.core.exported import ExportedModel

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Model = Annotated[
    str, typer.Option("--model", "-m", help="A built-in (offline, tiny), a folder, a weight file, or a hub name.")
]
DEFAULT_MODEL = "offline"
SHOWN = 5  # how many bad files a message lists; --json lists all


class Complaint(Exception):
    """A message for the user and the exit code: 2 for bad input, 1 where nothing worked."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def emit(value: Any, as_json: bool, text: str | Callable[[], str]) -> None:
    """The result, to stdout: `value` as JSON, or `text`."""
    if as_json:
        sys.stdout.write(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        shown = text if isinstance(text, str) else text()
        if shown:
            encoding = sys.stdout.encoding or "utf-8"
            sys.stdout.write(shown.encode(encoding, "replace").decode(encoding) + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Something pleasant to know; to stderr, and only if a person is watching."""
    if sys.stderr.isatty():
        warn(text)


def warn(text: str) -> None:
    """Something the user must know; to stderr, always."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


@contextmanager
def counting(title: str, unit: str = "pictures") -> Iterator[Callable[[int, int], None]]:
    """A progress bar for work that learns its size when it starts: call it with (done, total)."""
    from contextlib import ExitStack

    from ecliptic.core.progress import Progress

    with ExitStack() as stack:
        bar: Progress | None = None
        seen = 0

        def advance(done: int, total: int) -> None:
            nonlocal bar, seen
            if bar is None:
                bar = stack.enter_context(Progress(title, total, unit=unit))
            bar.advance(done - seen)
            seen = done

        yield advance


def guarded(work: Callable[..., None], resume: str = "") -> Callable[..., None]:
    """The verb with errors turned into messages and exit codes; Ctrl-C says how to go on."""

    @functools.wraps(work)
    def run(*arguments: Any, **options: Any) -> None:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                work(*arguments, **options)
        except KeyboardInterrupt:
            warn(f"\ninterrupted; {resume}" if resume else "\ninterrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of a pipe has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if os.environ.get("ECLIPTIC_DEBUG") or not _meant_for_the_user(error):
                raise
            warn(f"ecliptic: {_message(error)}")
            raise typer.Exit(_code(error)) from None

    return run


def load_model(name: str) -> HFEncoder:
    """Open an encoder for a verb."""
    if not name.strip():
        raise Complaint("--model is empty: name a built-in (offline, tiny), a folder, a weight file, or a hub name")
    from ecliptic.core.encoder import BUILT_IN, load

    if name not in BUILT_IN and not Path(name).exists() and "/" not in name:
        from difflib import get_close_matches

        if near := get_close_matches(name.lower(), BUILT_IN, 1, 0.6):
            raise Complaint(f"no model {name!r}; did you mean {near[0]}?")
    note(f"loading {name} ...")
    return load(name)


def open_model(name: str) -> HFEncoder | ExportedModel:
    """Open an encoder for a verb that only embeds: an exported one as it is, anything else with torch."""
    from ecliptic.core.exported import EXPORT_CARD, ExportedModel

    if name.strip() and Path(name, EXPORT_CARD).is_file():
        return ExportedModel.open(name)
    return load_model(name)


def text_vector(encoder: HFEncoder | ExportedModel, text: str) -> Any:
    """One text -> (D,) tensor, or array from an exported model; beyond the tower's limit it is cut, and said so."""
    from ecliptic.core.inputs import TruncationWarning

    if not text.strip():
        raise Complaint("the query is empty: say what to look for")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TruncationWarning)
        row = encoder.encode_texts([text])[0]
    if any(issubclass(entry.category, TruncationWarning) for entry in caught):
        warn(
            f"note: the query has {len(text):,} characters, more than the {encoder.max_tokens} tokens that "
            f"{encoder.name} reads; only its beginning counts"
        )
    return row


def bad_lines(bad: list[tuple[str, str]], what: str = "could not be read") -> list[str]:
    """A count and the first few, for people."""
    if not bad:
        return []
    lines = [f"{len(bad):,} {'picture' if len(bad) == 1 else 'pictures'} {what}:"]
    lines += [f"  {path}: {reason.removeprefix(f'{path}: ')}" for path, reason in bad[:SHOWN]]
    if len(bad) > SHOWN:
        lines.append(f"  and {len(bad) - SHOWN:,} more (--json lists them all)")
    return lines


def bad_json(bad: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"path": path, "reason": reason.removeprefix(f"{path}: ")} for path, reason in bad]


def fail(message: str, code: int = 2) -> NoReturn:
    raise Complaint(message, code)


def _meant_for_the_user(error: Exception) -> bool:
    """Our own exceptions, errors of the file system, and the plain ones that our code raised itself as a check."""
    if type(error).__module__.partition(".")[0] == "ecliptic":
        return True
    return isinstance(error, OSError) or _is_a_check(error)


def _is_a_check(error: Exception) -> bool:
    """Raised by a `raise` of ours, in so many words; the same kind of error out of any other line is a fault."""
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(__file__).resolve().parents[2]
    if not frames or not Path(frames[-1].filename).is_relative_to(package):
        return False
    return (frames[-1].line or "").startswith("raise ")


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    return str(error) or type(error).__name__


def _code(error: Exception) -> int:
    if isinstance(error, Complaint):
        return error.code
    return 1 if type(error).__name__ in ("DiskFullError", "IndexBusyError", "NonFiniteLoss") else 2


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if not issubclass(category, (DeprecationWarning, PendingDeprecationWarning, FutureWarning)):
        warn(f"note: {message}")


def _plain(value: Any) -> Any:
    """JSON for what verbs give: paths as strings, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
