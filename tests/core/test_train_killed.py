"""A run that is killed again and again, or meets a full disk, ends with the weights of an undisturbed one."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ecliptic.core import checkpoint
from ecliptic.core.objectives import InfoNCE
from ecliptic.core.train import Train
from tests.core.lessons import assert_same, pictures
from tests.towers import clip_encoder

ROOT = Path(__file__).parents[2]
KILLS, STEPS = 10, 60


def training(folder: Path | None, **more: Any) -> Train:
    """Everything that a checkpoint could forget: Adam, an average, accumulated batches, augmentation."""

    def turned(record: Any, rng: Any) -> Any:
        return {**record, "image": record["image"].rotate(rng.uniform(-20, 20))}

    settings = {"steps": STEPS, "batch_size": 4, "lr": 1e-3, "accumulate": 2, "ema": 0.9, "augment": turned}
    return Train(InfoNCE(), **settings, checkpoints=folder, checkpoint_every=1, **more)


def go_on(folder: str, seed: int) -> None:
    """One attempt after another, each in a process of its own that dies at a moment drawn from the seed; then a whole one.

    Half of the moments lie inside the writing of a checkpoint, half anywhere. Forked, so that importing is paid for once.
    """
    torch.set_num_threads(1)
    draws = random.Random(seed)
    for attempt in range(KILLS):
        inside, patience = attempt % 2 == 0, draws.uniform(0, 0.03)
        writes, share = draws.randrange(1, 4), draws.random()
        child = os.fork()
        if not child:
            if inside:
                die_while_writing(writes, share)
            training(Path(folder)).apply(clip_encoder(), pictures())
            os._exit(0)
        if not inside:
            wanted, begun = newest(folder) + writes, time.monotonic()
            while newest(folder) < wanted and time.monotonic() - begun < 30:
                time.sleep(0.001)
            time.sleep(patience)
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(f"attempt {attempt} inside={inside} code={code} at={newest(folder)}", flush=True)
    encoder = training(Path(folder)).apply(clip_encoder(), pictures())
    torch.save(encoder.state_dict(), Path(folder) / "result")


def newest(folder: str) -> int:
    """The step of the newest whole checkpoint."""
    return max((step for step, _ in checkpoint.checkpoints(Path(folder))), default=0)


def die_while_writing(number: int, share: float) -> None:
    """From now on: write a share of the bytes of the `number`th checkpoint, and be killed."""
    whole, written = torch.save, 0

    def save(state: Any, file: Any) -> None:
        nonlocal written
        written += 1
        whole(state, file)
        if written == number:
            file.flush()
            file.truncate(int(share * file.tell()))
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save


def test_killed_ten_times(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    script = f"from tests.core.test_train_killed import go_on; go_on({str(tmp_path)!r}, seed=0)"
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    attempts = [line for line in done.stdout.splitlines() if line.startswith("attempt")]
    killed = [line for line in attempts if f"code={-signal.SIGKILL}" in line]
    assert len(attempts) == KILLS
    assert len(killed) == KILLS, attempts
    assert sum("inside=True" in line for line in killed) == KILLS // 2
    result = torch.load(tmp_path / "result")
    straight = training(None).apply(clip_encoder(), pictures()).state_dict()
    assert result.keys() == straight.keys()
    for name, value in straight.items():
        assert torch.equal(result[name], value), name
    steps = [step for step, _ in checkpoint.checkpoints(tmp_path)]
    assert steps == [STEPS - 1, STEPS]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_full_disk_while_a_checkpoint_is_written(tmp_path):
    """The kernel itself refuses: no file of this process may grow beyond a limit, as on a disk with so much space left."""
    straight = training(None).apply(clip_encoder(), pictures())
    train = training(tmp_path, evaluate=lambda _: limit(size // 2) if not made_space else {}, evaluate_every=5)
    size, made_space = 400_000, False
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python has it; then writing gives EFBIG

    def limit(count: int) -> dict[str, float]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
        return {}

    try:
        with pytest.raises(
            OSError, match=r"cannot write checkpoint .*step-00000005\.pt.*the checkpoints before it are intact"
        ):
            train.apply(clip_encoder(), pictures())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    found = checkpoint.checkpoints(tmp_path)
    assert [step for step, _ in found] == [3, 4]
    assert all(path.stat().st_size > size // 2 for _, path in found)  # that is what did not fit
    assert checkpoint.load(found[-1][1])["step"] == 4
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    made_space = True
    assert_same(train.apply(clip_encoder(), pictures()), straight)
