"""The log of a training run: JSON lines, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Log:
    """JSON lines, one per step, flushed as they come. Resuming drops the rows after the checkpoint.

    path: of the file, or None to keep the rows in memory only. start: the step the run goes on from. tensorboard: a folder for
    scalars `loss`, `terms/*`, `lr`, `grad_norm`, `samples_per_s` and `evaluate/*`, or None. writing: false in all processes but
    one, which then only read what was there.
    """

    def __init__(self, path: Path | None, start: int, tensorboard: Path | None = None, writing: bool = True):
        self.path = path if writing else None
        self.rows: list[dict[str, Any]] = []
        if start and path is not None and path.exists():
            lines = map(_row, path.read_text().splitlines())
            self.rows = [row for row in lines if row and row["step"] <= start]
        self._board = _board(tensorboard, start) if writing and tensorboard is not None else None

    def __enter__(self) -> Log:
        if self.path is not None:
            try:
                self._open(self.path)
            except OSError as error:
                raise self._failure(error) from error
        return self

    def _open(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.writing")
        try:
            part.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        # Unbuffered: after a failed write there is nothing left that closing would try to write again.
        self._file = path.open("ab", buffering=0)

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.path is not None:
            line = (json.dumps(row) + "\n").encode()
            try:
                if self._file.write(line) != len(
                    line
                ):  # what is left of a disk takes part of a line, and says no next time
                    raise OSError("no space left for a whole line")
            except OSError as error:
                raise self._failure(error) from error
        if self._board is not None:
            for name, value in scalars(row):
                self._board.add_scalar(name, value, row["step"])

    def _failure(self, error: OSError) -> OSError:
        return OSError(
            f"cannot write the log {self.path}: {error}; the checkpoints are intact: make space and run again to go on"
        )


def scalars(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """A row of the log as TensorBoard's flat names."""
    for name in ("loss", "lr", "grad_norm", "samples_per_s"):
        yield name, row[name]
    for group in ("terms", "gradient", "evaluate"):
        for name, value in row.get(group, {}).items():
            yield f"{group}/{name}", value


def _board(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError('tensorboard=... needs TensorBoard: pip install "ecliptic[train]"') from error
    return SummaryWriter(folder, purge_step=start + 1 if start else None)


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:  # the last line of a killed run
        return None
    return row if isinstance(row, dict) else None
