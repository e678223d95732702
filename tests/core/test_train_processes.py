"""Several processes make the updates of one: the same losses, gradients, weights, checkpoints and interrupts."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ecliptic.core import checkpoint
from ecliptic.core.batches import collate
from ecliptic.core.contracts import Objective, Views
from ecliptic.core.distributed import rank
from ecliptic.core.encoder import Encoder, HFEncoder
from ecliptic.core.objectives import InfoNCE, Sigmoid
from ecliptic.core.train import Train, Trained
from tests.core.forked import run_forked
from tests.core.lessons import pictures
from tests.towers import FAMILIES, clip_encoder

COUNTS = (1, 2, 4)


class Headed(nn.Module, Objective):
    """Learns something itself, leaves a parameter unused, and draws a random number."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 24, bias=False, dtype=torch.float64)
        nn.init.eye_(self.head.weight)
        self.unused = nn.Parameter(torch.ones(3, 3, dtype=torch.float64))

    def terms(self, views: Views) -> dict[str, Tensor]:
        apart = (self.head(views["image"].pooled) - views["text"].pooled).square().sum(-1)
        return {"apart": apart.mean(), "noise": (torch.rand(len(apart)) * apart).mean()}


class Stream:
    """Re-iterable, without length or index."""

    def __iter__(self) -> Any:
        return iter(pictures(2))


def exact(family: str = "clip") -> HFEncoder:
    return FAMILIES[family]().double()


def trained(family: str, objective: Objective, records: Any = None, **settings: Any) -> Trained:
    common = {"steps": 4, "batch_size": 8, "lr": 1e-3, "warmup": 0}
    return Train(objective, **common | settings).run(exact(family), pictures(2) if records is None else records)


def gradient(family: str, objective: Objective, **settings: Any) -> dict[str, Any]:
    """What one step of plain descent takes off the weights is the gradient."""
    plain = {"steps": 1, "lr": 1.0, "optimizer": "sgd", "betas": (0.0, 0.0), "weight_decay": 0.0, "grad_clip": None}
    done = trained(family, objective, **plain | settings)
    before, after = exact(family).state_dict(), done.encoder.state_dict()
    return {"loss": done.log[0]["loss"], "gradient": {name: before[name] - after[name] for name in before}}


def told(done: Trained) -> dict[str, Any]:
    return {
        "weights": done.encoder.state_dict(),
        "objective": done.objective.state_dict() if isinstance(done.objective, nn.Module) else {},
        "losses": [row["loss"] for row in done.log],
        "norms": [row["grad_norm"] for row in done.log],
    }


def interrupted(folder: Path) -> list[int]:
    """Ctrl-C reaches one process only, in the middle of a run: all stop after the same step. Then all go on."""

    def evaluate(encoder: Encoder) -> Mapping[str, float]:
        if rank() == int(os.environ.get("WORLD_SIZE", 1)) - 1:
            signal.raise_signal(signal.SIGINT)
        return {}

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test-suite in the background starts out deaf to it
    settings = {"checkpoints": folder, "evaluate": evaluate, "evaluate_every": 2, "steps": 4}
    with pytest.raises(KeyboardInterrupt):
        trained("clip", InfoNCE(), **settings)
    return [step for step, _ in checkpoint.checkpoints(folder)]


def refused(**settings: Any) -> str:
    try:
        trained("clip", InfoNCE(), **settings)
    except ValueError as error:
        return str(error)
    return ""


def everything(folder: Path) -> dict[str, Any]:
    """What every process of every world does; the tests compare."""
    found: dict[str, Any] = {}
    for family in ("clip", "siglip"):
        for objective in (InfoNCE(), Sigmoid()):
            case = f"{family}-{type(objective).__name__}"
            found[f"gradient {case}"] = gradient(family, objective)
            found[f"weights {case}"] = told(trained(family, objective))
    found["weights frozen"] = told(trained("clip", InfoNCE(), freeze=("image",), accumulate=2))
    found["weights headed"] = told(trained("clip", Headed(), trainable="projection"))
    found["weights chunked"] = told(trained("clip", InfoNCE(), chunk=1))
    found["weights ring"] = told(trained("clip", InfoNCE(ring=True)))
    found["weights averaged"] = told(trained("clip", InfoNCE(), ema=0.5))
    found["weights stream"] = told(trained("clip", InfoNCE(), records=Stream()))
    found["stopped at"] = interrupted(folder / "stopped")
    found["weights resumed"] = told(trained("clip", InfoNCE(), checkpoints=folder / "stopped"))
    found["files"] = sorted(path.name for path in (folder / "stopped").iterdir())
    found["batch of 6"] = refused(batch_size=6)
    return found


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    return run_forked(COUNTS, "tests.core.test_train_processes:everything", tmp_path_factory.mktemp("worlds"))


@pytest.mark.parametrize("count", COUNTS[1:])
@pytest.mark.parametrize("case", ["clip-InfoNCE", "clip-Sigmoid", "siglip-InfoNCE", "siglip-Sigmoid"])
def test_the_loss_and_the_gradient_are_those_of_one_process(worlds, count, case):
    alone = worlds[1][0][f"gradient {case}"]
    assert max(value.abs().max() for value in alone["gradient"].values()) > 1e-2
    for found in worlds[count]:
        assert found[f"gradient {case}"]["loss"] == pytest.approx(alone["loss"], abs=1e-9)
        assert_close(found[f"gradient {case}"]["gradient"], alone["gradient"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("count", COUNTS[1:])
def test_the_weights_are_those_of_one_process(worlds, count):
    cases = [name for name in worlds[1][0] if name.startswith("weights")]
    assert len(cases) == 11
    for case in cases:
        alone = worlds[1][0][case]
        for found in worlds[count]:
            assert found[case]["losses"] == pytest.approx(alone["losses"], abs=1e-7), case
            assert found[case]["norms"] == pytest.approx(alone["norms"], abs=1e-7), case
            assert_close(found[case]["weights"], alone["weights"], rtol=0, atol=1e-7)
            assert_close(found[case]["objective"], alone["objective"], rtol=0, atol=1e-7)
            assert all(value.equal(worlds[count][0][case]["weights"][k]) for k, value in found[case]["weights"].items())


def test_what_the_objective_learns_is_averaged_and_what_nobody_uses_stays(worlds):
    learnt = worlds[2][0]["weights headed"]["objective"]
    assert not learnt["head.weight"].equal(torch.eye(24, dtype=torch.float64))
    assert learnt["unused"].equal(torch.ones(3, 3, dtype=torch.float64))  # not even weight decay


def test_an_interrupt_in_one_process_stops_all_and_all_go_on(worlds):
    for count in COUNTS:
        for found in worlds[count]:
            assert found["stopped at"] == [2]
            assert_close(found["weights resumed"], worlds[1][0]["weights clip-InfoNCE"], rtol=0, atol=1e-7)
            assert found["files"] == ["log.jsonl", "step-00000002.pt", "step-00000004.pt"]


def test_chunks_and_processes_together_make_the_updates_of_one_batch(worlds):
    assert_close(worlds[4][0]["weights chunked"], worlds[1][0]["weights clip-InfoNCE"], rtol=0, atol=1e-7)


def test_texts_passed_round_make_the_updates_of_texts_gathered(worlds):
    assert_close(worlds[4][0]["weights ring"], worlds[1][0]["weights clip-InfoNCE"], rtol=0, atol=1e-7)


def test_a_batch_that_cannot_be_divided_is_refused(worlds):
    assert [found["batch of 6"] for found in worlds[1] + worlds[2]] == ["", "", ""]
    for found in worlds[4]:
        assert found["batch of 6"] == "batch_size=6 cannot be divided evenly over 4 processes: choose a multiple of 4"


def test_groups_are_numbers_of_the_caption_alone():
    encoder, records = clip_encoder(), pictures(2)
    whole = collate(encoder, records, InfoNCE())["group"]
    part = collate(encoder, records[5:7], InfoNCE())["group"]
    assert whole[5:7].equal(part)
    assert whole[:16].equal(whole[16:])  # the same captions again
    assert len(set(whole.tolist())) == 16
    assert whole.dtype == torch.int64
    assert whole.min() >= 0
