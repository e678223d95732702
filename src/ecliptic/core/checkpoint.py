"""Training checkpoints: whole or not there. Written beside, flushed to disk, then renamed; a kill leaves the one before."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn

from ecliptic.core.distributed import world_size
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


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Store:
    """A run's checkpoints: the trained parameters, all buffers, the optimiser, the step, and what the run must agree with.

    folder: where they lie, or None to keep none. keep: how many of the newest. identity: plain values that a checkpoint must
    agree with to be gone on from. extras: further state, by name. Of several processes the main one writes and all read.
    """

    def __init__(
        self,
        folder: str | Path | None,
        module: nn.Module,
        chosen: Mapping[str, nn.Parameter],
        *,
        identity: Mapping[str, Any],
        extras: Mapping[str, Stateful],
        keep: int = 2,
        resume: bool = True,
    ):
        self.folder = None if folder is None else Path(folder)
        self.module, self.chosen, self.extras = module, chosen, extras
        self.keep, self.resuming = keep, resume
        self.newest: Path | None = None
        self.mine: list[Path] = []
        self.at = -1
        if self.folder is not None:
            trained = {"trained parameters": sorted(chosen), "frozen weights": self._frozen()}
            self.identity = {**plain(dict(identity)), **trained}

    def resume(self, optimizer: Any, scaler: Any = None) -> int:
        """Load the newest checkpoint, if there is one to go on from; returns the steps done."""
        found = checkpoints(self.folder) if self.folder is not None and self.resuming else []
        self._agree(found[-1][0] if found else 0)
        if not found:
            return 0
        step, path = found[-1]
        state = load(path)
        differing = [name for name in self.identity if state["identity"].get(name) != self.identity[name]]
        if differing:
            listed = "; ".join(
                f"{name}: {_short(state['identity'].get(name))} there, {_short(self.identity[name])} here"
                for name in differing
            )
            raise ValueError(
                f"{path} is of another run ({listed}). Use the same settings, another folder, or resume=False to start afresh"
            )
        self.module.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        for name, extra in self.extras.items():
            extra.load_state_dict(state["extras"][name])
        self.newest, self.at, self.mine = path, step, [path for _, path in found]
        return step

    def save(self, step: int, optimizer: Any, scaler: Any = None) -> None:
        if self.folder is None:
            return
        buffers = {name for name, _ in self.module.named_buffers()}
        state = {
            "step": step,
            "identity": self.identity,
            "model": {k: v for k, v in self.module.state_dict().items() if k in self.chosen or k in buffers},
            "optimizer": optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "extras": {name: extra.state_dict() for name, extra in self.extras.items()},
        }
        self.newest, self.at = save(self.folder, step, state), step
        self.mine = [*(path for path in self.mine if path != self.newest), self.newest][-self.keep :]
        for _, path in checkpoints(self.folder):
            if path not in self.mine:  # older ones, and those of a run that this one starts afresh
                path.unlink()

    def _agree(self, step: int) -> None:
        """All processes must go on from the same step: the folder has to be one that all of them see."""
        if self.folder is None or world_size() == 1:
            return
        found: list[Any] = [None] * world_size()
        torch.distributed.all_gather_object(found, step)
        if len(set(found)) > 1:
            raise ValueError(
                f"the processes find different checkpoints in {self.folder} (steps {found}, by process): "
                "the folder must be one that all of them share"
            )

    def _frozen(self) -> int:
        """A checksum of the weights that are not trained, and so not stored."""
        total = 0
        for name, parameter in self.module.named_parameters():
            if name not in self.chosen:
                data = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                total = zlib.crc32(cast(Any, data), zlib.crc32(name.encode(), total))
        return total


def plain(value: Any) -> Any:
    """The value as JSON would give it back; what JSON does not know becomes its name."""

    def name(thing: Any) -> str:
        if isinstance(thing, Path):
            return str(thing)
        return str(getattr(thing, "id", None) or getattr(thing, "__qualname__", None) or type(thing).__qualname__)

    return json.loads(json.dumps(value, default=name))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
