"""A progress bar that knows when nobody is looking: on stderr if that is a terminal, otherwise silent.

Whatever takes long has one, so this is also where long work can be told to stop: see `time_limit`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

T = TypeVar("T")
_DEADLINE: ContextVar[float | None] = ContextVar("deadline", default=None)
_BUSY: ContextVar[bool] = ContextVar("a bar is shown", default=False)


class OutOfTime(Exception):
    """Work inside `time_limit` went on for too long, and was stopped at its next step."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime out of the first step of any progress bar in this block that ends later than `seconds` from now.

    Of limits inside each other the earliest counts.
    """
    now, outer = time.monotonic(), _DEADLINE.get()
    token = _DEADLINE.set(now + seconds if outer is None else min(outer, now + seconds))
    try:
        yield
    finally:
        _DEADLINE.reset(token)


class Progress:
    """`with Progress("training", total=400, unit="images") as bar: bar.advance(1, units=32, note="loss 0.41")`.

    total: how many steps there are, or None if nobody knows. unit: what the throughput counts; `units` defaults to the steps.
    start: steps already done before (a resumed job); they do not count as throughput.
    shown: None decides by whether stderr is a terminal. A bar inside the block of another one that is shown stays silent.
    """

    def __init__(
        self, title: str, total: int | None = None, *, unit: str = "", start: int = 0, shown: bool | None = None
    ):
        self.title, self.total, self.unit, self.start = title, total, unit, start
        self.shown = sys.stderr.isatty() if shown is None else shown
        self.units = 0
        self._bar: RichProgress | None = None

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        if self.shown and not _BUSY.get():
            self._token = _BUSY.set(True)
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[rate]}"),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=False,
            )
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.start, rate="", note="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            _BUSY.reset(self._token)

    @property
    def rate(self) -> float:
        """Units per second since the bar was opened."""
        return self.units / max(time.perf_counter() - self._began, 1e-9)

    def advance(self, steps: int = 1, *, units: int | None = None, note: str | None = None) -> None:
        """Count `steps` more; `note` replaces the text at the end of the line. Raises OutOfTime past a `time_limit`."""
        if (deadline := _DEADLINE.get()) is not None and time.monotonic() > deadline:
            raise OutOfTime(f"{self.title}: stopped, its time is over")
        self.units += steps if units is None else units
        if self._bar is not None:
            rate = f"{self.rate:,.4g} {self.unit}/s" if self.unit else ""
            if note is None:
                self._bar.update(self._task, advance=steps, rate=rate)
            else:
                self._bar.update(self._task, advance=steps, rate=rate, note=note)


def track(items: Iterable[T], title: str, total: int | None = None, *, unit: str = "") -> Iterator[T]:
    """Walk over `items` under a progress bar."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(title, total, unit=unit) as bar:
        for item in items:
            yield item
            bar.advance()
