"""Training checkpoints: whole or not there. Written beside, flushed to disk, then renamed; a kill leaves the one before."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from ecliptic.core.files import sync_folder

_NAME = re.compile(r"step-(\d{8,})\.pt")


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of every complete checkpoint in the folder, oldest first."""
    if not folder.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write the state (tensors and plain values) after `step` steps. On failure (a full disk, say) what was there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    for stale in folder.glob(".step-*.writing"):
        stale.unlink()
    part = folder / f".{path.name}.writing"
    try:
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write checkpoint {path}: {error}; the checkpoints before it are intact") from error
    sync_folder(folder)
    return path


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU. Only tensors and plain values are unpickled, so a foreign file cannot run code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"cannot read checkpoint {path}: {error}; delete it to go on from the one before") from error
    assert isinstance(state, dict)
    return state
