"""Run a function in several processes that know each other by gloo, for tests of what is distributed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_processes(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` in `count` processes of one thread each; what each returned, by rank. It must be importable."""
    mp.get_context("forkserver").set_forkserver_preload(["torch._dynamo"])  # what takes longest to import, once
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_one, (count, folder, function, arguments), nprocs=count, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _one(rank: int, count: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    try:
        torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
