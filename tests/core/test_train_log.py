"""The log of a run: JSON lines and TensorBoard say the same, and a full disk is told and survived."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ecliptic.core import checkpoint
from ecliptic.core.train import Settings
from ecliptic.core.train_log import Log, scalars
from tests.core.lessons import assert_same
from tests.core.small_run import regression


def boarded(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_rows_as_flat_names():
    row = {"step": 3, "loss": 1.5, "terms": {"a": 1.0, "b": 0.5}, "lr": 0.1, "grad_norm": 2.0, "samples_per_s": 9.0}
    plain = {"loss": 1.5, "lr": 0.1, "grad_norm": 2.0, "samples_per_s": 9.0, "terms/a": 1.0, "terms/b": 0.5}
    assert dict(scalars({**row, "waited": 0.1})) == plain
    assert dict(scalars({**row, "evaluate": {"recall": 0.25}})) == {**plain, "evaluate/recall": 0.25}


def test_tensorboard_says_what_the_log_says(tmp_path):
    def evaluate() -> dict[str, float]:
        return {"recall": 0.25}

    settings = Settings(steps=4, checkpoints=tmp_path, checkpoint_every=2, tensorboard=True, evaluate_every=2)

    def stop(step: int) -> None:
        if step == 4 and stopping:
            raise KeyboardInterrupt

    stopping = True
    with pytest.raises(KeyboardInterrupt):
        regression(settings, evaluate=evaluate, after_step=stop)
    stopping = False
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [2]
    _, log = regression(settings, evaluate=evaluate)
    board = boarded(tmp_path / "tensorboard")
    assert set(board) == {
        "loss", "lr", "grad_norm", "samples_per_s", "terms/squares", "terms/noise", "evaluate/recall",
    }  # fmt: skip
    for name in ("loss", "lr", "grad_norm"):
        assert [step for step, _ in board[name]] == [1, 2, 3, 4]  # step 3 once, though it was done twice
        assert [value for _, value in board[name]] == pytest.approx([row[name] for row in log], rel=1e-6)
    assert board["evaluate/recall"] == [(2, 0.25), (4, 0.25)]
    regression(Settings(steps=1, tensorboard=tmp_path / "elsewhere"))
    assert boarded(tmp_path / "elsewhere")["loss"][0][0] == 1
    with pytest.raises(ValueError, match="tensorboard=True writes beside the checkpoints"):
        Settings(tensorboard=True)


def test_without_tensorboard_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r'pip install "ecliptic\[train\]"'):
        regression(Settings(steps=1, tensorboard=tmp_path))


class FullDisk:
    """A file that takes `room` more bytes, then part of a line, then nothing."""

    def __init__(self, file: Any, room: int):
        self.file, self.room = file, room

    def write(self, line: bytes) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count: int = self.file.write(line[: self.room])
        self.room -= count
        return count

    def close(self) -> None:
        self.file.close()


@pytest.mark.parametrize("room", [1200, 0])
def test_a_full_disk_while_logging_stops_the_run_which_goes_on(tmp_path, monkeypatch, room):
    entered = Log.__enter__

    def full(self: Log) -> Log:
        entered(self)
        self._file = FullDisk(self._file, room)
        return self

    settings = Settings(steps=10, lr=0.01, checkpoints=tmp_path, checkpoint_every=2)
    monkeypatch.setattr(Log, "__enter__", full)
    with pytest.raises(
        OSError, match=r"cannot write the log .*log\.jsonl: .*checkpoints are intact: make space and run"
    ):
        regression(settings)
    steps = [step for step, _ in checkpoint.checkpoints(tmp_path)]
    assert steps == ([2, 4] if room else [])
    monkeypatch.undo()
    model, log = regression(settings)
    assert_same(model, regression(Settings(steps=10, lr=0.01))[0])
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [*range(1, 11)]
    assert [row["step"] for row in log] == [*range(1, 11)]


def test_a_full_disk_when_the_log_is_opened_is_told(tmp_path, monkeypatch):
    def full(self: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"cannot write the log .*No space left"):
        regression(Settings(steps=1, log=tmp_path / "log.jsonl"))
    assert not list(tmp_path.iterdir())
