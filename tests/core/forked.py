"""Run a function in several processes that find each other as torchrun's do, for tests of training.

One fresh Python imports everything once and forks the processes, which costs a fraction of starting each of them anew.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def run_forked(counts: Sequence[int], name: str, folder: Path) -> dict[int, list[Any]]:
    """`name` is "module:function"; the function gets a folder. -> for each number of processes what each returned, by rank."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.core.forked", name, str(folder), *map(str, counts)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        count: [torch.load(folder / f"{count}-{rank}.pt", weights_only=False) for rank in range(count)]
        for count in counts
    }


def _child(name: str, folder: Path, rank: int, count: int, port: int) -> int:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    if count > 1:
        os.environ.update({key: str(value) for key, value in own.items()}, MASTER_ADDR="127.0.0.1")
    module, function = name.split(":")
    (folder / str(count)).mkdir(exist_ok=True)
    try:
        found = getattr(importlib.import_module(module), function)(folder / str(count))
        torch.save(found, folder / f"{count}-{rank}.pt")
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _main(name: str, folder: Path, counts: Sequence[int]) -> int:
    importlib.import_module(name.split(":")[0])
    torch.set_num_threads(1)
    worst = 0
    for count in counts:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(count):
            child = os.fork()
            if not child:
                code = _child(name, folder, rank, count, port)
                sys.stderr.flush()
                os._exit(code)
            children.append(child)
        for child in children:
            worst = max(worst, abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
    return worst


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], Path(sys.argv[2]), [int(count) for count in sys.argv[3:]]))
