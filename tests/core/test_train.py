# ruff: noqa: NPY002  the global generators of numpy are what is being watched here
"""The training loop: what moves, what does not, and that a stopped run goes on as if nothing had happened."""

from __future__ import annotations

import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

from ecliptic.core import checkpoint
from ecliptic.core.batches import Indexed, Order, Streamed, cheap_column, collate, prefetch
from ecliptic.core.contracts import Features, Objective, Record, Views
from ecliptic.core.encoder import Encoder
from ecliptic.core.objectives import InfoNCE, Sigmoid
from ecliptic.core.progress import Progress, track
from ecliptic.core.train import LN_100, NonFiniteLoss, Settings, Train, fit, parameter_groups, rate, select
from tests.core.lessons import COLOURS, assert_same, moved, pictures, weights
from tests.core.small_run import LEARNT, Dropped, X, Y, regression
from tests.towers import FAMILIES, clip_encoder, dual_encoder


def short(**settings: Any) -> Train:
    return Train(InfoNCE(), **{"steps": 4, "batch_size": 8, "lr": 1e-3, **settings})


# -- an encoder under an objective -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_learns_the_pairs(family):
    encoder = FAMILIES[family]()
    records = [{"image": Image.new("RGB", (32, 32), rgb), "caption": f"a {name} box"} for name, rgb in COLOURS.items()]
    objective: Objective = Sigmoid() if family == "siglip" else InfoNCE()
    trained = Train(objective, steps=60, batch_size=4, lr=2e-3).run(encoder, records)
    losses = [row["loss"] for row in trained.log]
    assert np.mean(losses[-5:]) < 0.7 * losses[0]
    if family == "dual":  # a random BERT, with its dropout, needs longer to tell all four apart
        return
    with torch.no_grad():
        image = trained.encoder.images(trained.encoder.preprocess([r["image"] for r in records])).pooled
        text = trained.encoder.texts(trained.encoder.tokenize([r["caption"] for r in records])).pooled
    assert trained.encoder.logits(image, text).argmax(-1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_encoder_given_stays_as_it_was(family):
    encoder = FAMILIES[family]()
    before, history = weights(encoder), encoder.history
    flags = [module.training for module in encoder.modules()]
    encoder.model.logit_scale.requires_grad_(False)
    new = short(steps=2).apply(encoder, pictures())
    assert not moved(before, encoder)
    assert encoder.history == history
    assert [module.training for module in encoder.modules()] == flags
    assert all(p.grad is None for p in encoder.parameters())
    assert moved(before, new)
    assert "model.logit_scale" not in moved(before, new)  # what does not require grad is not trained
    assert not any(module.training for module in new.modules())
    assert [p.requires_grad for p in new.parameters()] == [p.requires_grad for p in encoder.parameters()]


def test_history_says_what_was_done():
    new = short(weight_decay=0.3, freeze=("image",)).apply(clip_encoder(), pictures())
    assert new.history == (
        {
            "step": "train",
            "args": {
                "objective": {"name": "InfoNCE", **asdict(InfoNCE())},
                "batch_size": 8,
                "freeze": ["image"],
                "steps": 4,
                "seed": 0,
                "lr": 1e-3,
                "weight_decay": 0.3,
            },
        },
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_towers(family):
    encoder = FAMILIES[family]()
    before = weights(encoder)
    new = short(steps=2, freeze=("image",)).apply(encoder, pictures())
    names = moved(before, new)
    assert not [name for name in names if "vision" in name or "visual" in name]
    assert any("text_model" in name for name in names)
    new = short(steps=2, freeze=("image", "text")).apply(encoder, pictures())
    assert moved(before, new) <= {"model.logit_scale", "model.logit_bias"}
    with pytest.raises(ValueError, match="choose from image, text"):
        short(freeze=("vision",))


def test_only_what_a_pattern_or_a_predicate_chooses_moves():
    encoder = clip_encoder()
    before = weights(encoder)
    projections = {"model.visual_projection.weight", "model.text_projection.weight"}
    assert moved(before, short(trainable="projection").apply(encoder, pictures())) == projections
    new = short(trainable=lambda name, p: "projection" in name, freeze=("text",)).apply(encoder, pictures())
    assert moved(before, new) == {"model.visual_projection.weight"}
    with pytest.raises(ValueError, match=r"matches no parameter; there are model\.logit_scale"):
        short(trainable="adapter").apply(encoder, pictures())


def test_same_seed_same_weights_other_seed_other_weights():
    encoder, records = clip_encoder(), pictures(2)
    first = short(seed=0).apply(encoder, records)
    np.random.rand(5), random.random(), torch.rand(3)  # the global generators have no say
    assert_same(first, short(seed=0, workers=0).apply(encoder, records))
    assert moved(weights(first), short(seed=1).apply(encoder, records))


def test_global_generators_are_left_alone():
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(3), np.random.rand(3), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    short(augment=lambda record, rng: {**record, "image": record["image"].rotate(rng.uniform(-5, 5))}).apply(
        clip_encoder(), pictures()
    )
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])
    assert random.random() == expected[2]


def test_the_logit_scale_stays_at_one_hundred():
    encoder = clip_encoder()
    with torch.no_grad():
        encoder.model.logit_scale.fill_(LN_100 + 1)
    new = short(steps=1).apply(encoder, pictures())
    assert new.scale.item() == pytest.approx(100, rel=1e-5)
    new = short(steps=1, trainable="projection").apply(encoder, pictures())
    assert new.scale.item() > 200  # not trained, not touched


def test_equal_captions_are_not_negatives():
    records = [{**record, "caption": "a box"} for record in pictures()]
    log = short(steps=1).run(clip_encoder(), records).log
    assert log[0]["loss"] == pytest.approx(0, abs=1e-6)
    plain = Train(InfoNCE(skip_duplicates=False), steps=1, batch_size=8).run(clip_encoder(), records).log
    assert plain[0]["loss"] >= math.log(8) - 1e-3


def test_a_small_run_by_hand():
    """Two steps against plain torch: the order, the groups, the schedule, the clipping and AdamW itself."""
    encoder, records = clip_encoder(), pictures()
    train = Train(
        InfoNCE(), steps=2, batch_size=8, lr=1e-2, warmup=0, weight_decay=0.5, grad_clip=0.1, seed=3, workers=0
    )
    new = train.apply(encoder, records)

    hand = encoder.clone()
    matrices = [p for p in hand.parameters() if p.ndim >= 2]
    others = [p for p in hand.parameters() if p.ndim < 2]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    order = np.random.default_rng([3, 0]).permutation(16)
    for step in range(2):
        part = [records[i] for i in order[8 * step : 8 * step + 8]]
        image = hand.images(hand.preprocess([r["image"] for r in part])).pooled
        text = hand.texts(hand.tokenize([r["caption"] for r in part])).pooled
        logits, target = hand.scale * image @ text.T, torch.arange(8)
        loss = nn.functional.cross_entropy(logits, target) / 2 + nn.functional.cross_entropy(logits.T, target) / 2
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(hand.parameters(), 0.1)
        for group in adam.param_groups:
            group["lr"] = 1e-2 * (1 + math.cos(math.pi * step / 2)) / 2
        adam.step()
    for name, value in hand.state_dict().items():
        assert_close(new.state_dict()[name], value, rtol=1e-4, atol=1e-6)


# -- stopping and going on ---------------------------------------------------------------------------------------------


def stop_at(number: int):
    """Something to call in every step; raises KeyboardInterrupt at the `number`th call."""
    calls = iter(range(1, 1000))

    def during() -> None:
        if next(calls) == number:
            raise KeyboardInterrupt

    return during


def timeless(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("samples_per_s", "waited")} for row in log]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, optimizer, accumulate):
    common = {"steps": 10, "lr": 0.01, "optimizer": optimizer, "accumulate": accumulate, "workers": 1}
    straight, log = regression(Settings(**common))
    settings = Settings(**common, checkpoints=tmp_path, checkpoint_every=5)
    with pytest.raises(KeyboardInterrupt):
        regression(settings, after_step=lambda step: 1 / 0 if step == 10 else None, during=stop_at(8 * accumulate))
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [5, 7]
    checkpoint.checkpoints(tmp_path)[-1][1].unlink()  # running statistics may be a batch ahead there
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 7
    resumed, again = regression(settings)
    assert_same(straight, resumed)
    assert timeless(again) == timeless(log)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == list(
        range(1, 11)
    )


def test_training_an_encoder_goes_on_bit_for_bit(tmp_path):
    encoder, records = clip_encoder(), pictures(2)

    def turned(record: Record, rng: np.random.Generator) -> Record:
        return {**record, "image": record["image"].rotate(rng.uniform(-20, 20))}

    def stop(encoder: Encoder) -> dict[str, float]:
        if stopping:
            raise KeyboardInterrupt
        return {}

    stopping = True
    common = {"steps": 10, "augment": turned, "evaluate": stop, "evaluate_every": 5, "checkpoints": tmp_path / "a"}
    with pytest.raises(KeyboardInterrupt):
        short(**common).apply(encoder, records)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path / "a")] == [5]
    stopping = False
    resumed = short(**common).run(encoder, records)
    straight = short(**common | {"checkpoints": None, "workers": 0}).run(encoder, records)
    assert_same(resumed.encoder, straight.encoder)
    assert [row["loss"] for row in resumed.log] == [row["loss"] for row in straight.log]
    assert_same(short(**common).apply(encoder, records), straight.encoder)  # finished: nothing is left to do


KILLED = """
import os, signal, sys
from pathlib import Path
from ecliptic.core.train import Settings
from tests.core.lessons import COLOURS, assert_same, moved, pictures, weights
from tests.core.small_run import regression
step = 0
def during():
    global step
    step += 1
    if step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
regression(Settings(steps=10, lr=0.01, checkpoints=sys.argv[1], checkpoint_every=2), during=during)
"""


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "6"], env=environment, cwd=root)
    assert done.returncode == -signal.SIGKILL
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [2, 4]
    (tmp_path / ".step-00000006.pt.writing").write_bytes(b"half a file")
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')
    settings = Settings(steps=10, lr=0.01, checkpoints=tmp_path, checkpoint_every=2)
    assert_same(regression(settings)[0], regression(Settings(steps=10, lr=0.01))[0])
    assert not list(tmp_path.glob(".*"))


INTERRUPTED = """
import signal, sys
from ecliptic.core.train import Settings
from tests.core.small_run import regression
signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background is deaf to Ctrl-C
calls = iter(range(1, 1000))
def during():
    if next(calls) == 5:
        signal.raise_signal(signal.SIGINT)
try:
    regression(Settings(steps=10, lr=0.01, checkpoints=sys.argv[1]), during=during)
except KeyboardInterrupt:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    print("interrupted")
"""


def test_control_c_waits_for_whole_weights(tmp_path):
    """In a process of its own, whose signals nothing else has touched."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.stdout.split() == ["interrupted"], done.stderr
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [5]  # the step it came in was finished
    settings = Settings(steps=10, lr=0.01, checkpoints=tmp_path)
    assert_same(regression(settings)[0], regression(Settings(steps=10, lr=0.01))[0])


def test_no_checkpoint_with_half_updated_weights(tmp_path):
    def interrupted(step: int) -> None:
        if step == 4:  # the weights have moved, but the step is not complete
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regression(Settings(steps=10, checkpoints=tmp_path, checkpoint_every=2), after_step=interrupted)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [2]


def test_checkpoints_of_another_run_are_refused(tmp_path):
    regression(Settings(steps=4, checkpoints=tmp_path))
    with pytest.raises(ValueError, match=r"is of another run \(steps: 4 there, 6 here; lr: 0.0005 there, 0.1 here\)"):
        regression(Settings(steps=6, lr=0.1, checkpoints=tmp_path))
    with pytest.raises(ValueError, match=r"another run \(trained parameters: "):
        regression(Settings(steps=4, checkpoints=tmp_path), trainable="first")
    with pytest.raises(ValueError, match=r"another run \(data: None there, 'b' here"):
        regression(Settings(steps=4, checkpoints=tmp_path), identity={"data": "b"})
    _, log = regression(Settings(steps=2, checkpoints=tmp_path, resume=False))
    assert len(log) == 2
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [2]  # the old run's, though later, is gone


def test_frozen_weights_must_be_those_of_the_checkpoint(tmp_path):
    def run(scale: float) -> None:
        model = Dropped()
        with torch.no_grad():
            model.frozen[0].weight.mul_(scale)
        settings = Settings(steps=2, checkpoints=tmp_path)
        fit(model, lambda x: {"mean": model(x).mean()}, [X], settings, trainable=LEARNT)

    run(1.0)
    run(1.0)
    with pytest.raises(ValueError, match="frozen weights"):
        run(1.5)


def test_a_broken_checkpoint_is_named(tmp_path):
    settings = Settings(steps=4, checkpoints=tmp_path, checkpoint_every=2)
    regression(settings)
    newest = checkpoint.checkpoints(tmp_path)[-1][1]
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot read checkpoint .*step-00000004\.pt.*delete it"):
        regression(settings)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"a": torch.ones(3)})

    def full(state: Any, file: io.BufferedWriter) -> None:
        file.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"cannot write checkpoint .*the checkpoints before it are intact"):
        checkpoint.save(tmp_path, 2, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]
    assert_close(checkpoint.load(tmp_path / "step-00000001.pt")["a"], torch.ones(3))


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    regression(Settings(steps=7, checkpoints=tmp_path, checkpoint_every=2, keep=3))
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [4, 6, 7]


def test_extras_travel_with_the_checkpoint(tmp_path):
    class Average:
        def __init__(self) -> None:
            self.value = torch.zeros(())

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = state["value"]

    def run(stop: int | None) -> Average:
        average = Average()

        def after(step: int) -> None:
            average.value = 0.9 * average.value + step

        during = stop_at(stop) if stop else lambda: None
        settings = Settings(steps=6, checkpoints=tmp_path / str(bool(folder)), checkpoint_every=2)
        regression(settings, after_step=after, extras={"average": average}, during=during)
        return average

    folder = True
    with pytest.raises(KeyboardInterrupt):
        run(4)
    resumed = run(None)
    folder = False
    assert torch.equal(resumed.value, run(None).value)


# -- the generic loop --------------------------------------------------------------------------------------------------


def test_fit_trains_anything():
    prompt = nn.ParameterList([nn.Parameter(torch.zeros(3))])
    goal = torch.tensor([1.0, -2.0, 3.0])
    log = fit(
        prompt,
        lambda goal: {"distance": (prompt[0] - goal).square().sum()},
        [goal],
        Settings(steps=200, lr=0.1, weight_decay=0.0),
    )
    assert_close(prompt[0].detach(), goal, rtol=0, atol=0.05)
    assert log[0].keys() == {"step", "loss", "terms", "lr", "grad_norm", "samples_per_s", "waited"}
    assert log[0]["loss"] == 14.0  # before the first update
    assert log[0]["grad_norm"] == pytest.approx(2 * math.sqrt(14))  # before clipping
    assert [row["step"] for row in log] == list(range(1, 201))


def test_frozen_parts_do_not_move_nor_drop():
    before = weights(Dropped())
    model, _ = regression(Settings(steps=3))
    changed = moved(before, model)
    assert {name.split(".")[0] for name in changed} == {"first", "norm", "last"}
    assert "norm.running_mean" in changed
    assert all(p.requires_grad for p in model.parameters())
    assert all(child.training for child in model.modules())  # as it came


def test_every_step_draws_anew():
    _, log = regression(Settings(steps=6, lr=0.0))
    _, other = regression(Settings(steps=6, lr=0.0, seed=1))
    _, parts = regression(Settings(steps=3, lr=0.0, accumulate=2))
    noise = [row["terms"]["noise"] for row in [*log, *other, *parts]]
    assert len(set(noise)) == len(noise)


def test_accumulated_batches_are_one_batch_to_a_mean():
    halves = [(X[:32], Y[:32]), (X[32:], Y[32:])]
    models = []
    for batches, accumulate in (([(X, Y)], 1), (halves, 2)):
        model = nn.Linear(4, 1)
        nn.init.ones_(model.weight), nn.init.zeros_(model.bias)
        settings = Settings(steps=3, lr=0.1, optimizer="sgd", accumulate=accumulate, grad_clip=None)
        log = fit(model, lambda b, m=model: {"squares": (m(b[0]) - b[1]).square().mean()}, batches, settings)
        models.append((model, log))
    (whole, one), (parts, two) = models
    assert_close(parts.weight, whole.weight)
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-6)


def test_terms_are_added():
    weight = nn.Parameter(torch.tensor([1.0]))
    module = nn.ParameterList([weight])
    settings = Settings(steps=1, lr=1.0, optimizer="sgd", warmup=0, grad_clip=None)
    log = fit(module, lambda _: {"a": 3 * weight.sum(), "b": -weight.sum()}, [X], settings)
    assert log[0]["loss"] == 2.0
    assert log[0]["terms"] == {"a": 3.0, "b": -1.0}
    assert weight.item() == 1 - 2  # the gradient is 3 - 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, bad):
    calls = iter(range(1, 100))
    model = Dropped()

    def loss(x: Tensor) -> dict[str, Tensor]:
        factor = bad if next(calls) == 4 else 1.0
        return {"fine": model(x).square().mean(), "broken": factor * model(x).square().mean()}

    settings = Settings(steps=10, checkpoints=tmp_path, checkpoint_every=3)
    with pytest.raises(NonFiniteLoss, match=rf"not finite at step 4: fine=.*broken={bad}.*step-00000003\.pt"):
        fit(model, loss, [X], settings)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [3]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_gradient_that_is_not_finite_stops_the_run():
    weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(NonFiniteLoss, match=r"gradient is not finite at step 1.*no checkpoint was written"):
        fit(nn.ParameterList([weight]), lambda _: {"root": weight.sqrt().sum()}, [X], Settings(steps=2))


def test_losses_that_cannot_be_trained_are_refused():
    model = nn.Linear(4, 1)
    with pytest.raises(TypeError, match="'a' must be a scalar"):
        fit(model, lambda x: {"a": model(x)}, [X], Settings(steps=1))
    with pytest.raises(ValueError, match=r"no loss term \(a\) depends on a trained parameter"):
        fit(model, lambda x: {"a": x.mean()}, [X], Settings(steps=1))
    with pytest.raises(ValueError, match="no terms"):
        fit(model, lambda x: {}, [X], Settings(steps=1))
    with pytest.raises(ValueError, match="no batches"):
        fit(model, lambda x: {"a": model(x).mean()}, [], Settings(steps=1))


def test_bf16_runs_the_model_in_bf16_and_gives_float32():
    model, kinds = nn.Linear(4, 1), []

    def loss(x: Tensor) -> dict[str, Tensor]:
        out = model(x)
        kinds.append(out.dtype)
        return {"squares": out.square().mean()}

    fit(model, loss, [X], Settings(steps=2, precision="bf16"))
    fit(model, loss, [X], Settings(steps=1))  # the setting does not stick to the process
    assert kinds == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert model.weight.dtype == torch.float32


def test_a_run_inside_a_run():
    """Evaluation may train something itself (a probe)."""

    def probe() -> dict[str, float]:
        inner = nn.Linear(4, 1)
        nn.init.zeros_(inner.weight), nn.init.zeros_(inner.bias)
        rows = fit(inner, lambda x: {"s": (inner(x) - 1).square().mean()}, [X], Settings(steps=2, precision="bf16"))
        return {"probe": rows[-1]["loss"]}

    model, log = regression(Settings(steps=4, evaluate_every=2), evaluate=probe)
    assert [row["step"] for row in log if "evaluate" in row] == [2, 4]
    assert_same(model, regression(Settings(steps=4))[0])


def test_evaluation_sees_the_model_at_rest():
    model, seen = Dropped(), []

    def evaluate() -> dict[str, float]:
        seen.append(any(child.training for child in model.modules()))
        return {"loss": 0.5}

    log = fit(model, lambda x: {"m": model(x).mean()}, [X], Settings(steps=3, evaluate_every=2), evaluate=evaluate)
    assert seen == [False, False]
    assert [row.get("evaluate") for row in log] == [None, {"loss": 0.5}, {"loss": 0.5}]
    assert model.training


def test_settings_are_checked_at_once():
    for wrong, message in (
        ({"steps": 0}, "steps=0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"seed": -1}, "seed=-1"),
        ({"grad_clip": 0.0}, "grad_clip=0.0"),
        ({"schedule": "cosin"}, "schedule='cosin': choose one of cosine, linear, constant"),
        ({"precision": "bfloat16"}, "precision='bfloat16'"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings(**wrong)


# -- schedule, groups --------------------------------------------------------------------------------------------------


def test_schedule_by_hand():
    got = [rate(step, 8, warmup=4) for step in range(8)]
    half = math.sqrt(0.5)
    assert got == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert [rate(step, 4, schedule="linear") for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [rate(step, 3, warmup=1, schedule="constant") for step in range(3)] == [1.0, 1.0, 1.0]
    assert rate(8, 8, warmup=4, floor=0.1) == pytest.approx(0.1)
    assert rate(4, 8, warmup=4, floor=0.1) == 1.0
    assert Settings(steps=50, warmup=0.1).warmup_steps == 5
    assert Settings(steps=50, warmup=7).warmup_steps == 7


def test_the_schedule_reaches_the_optimizer():
    _, log = regression(Settings(steps=8, lr=2.0, warmup=4))
    assert [row["lr"] for row in log] == pytest.approx([2 * rate(step, 8, 4) for step in range(8)])


def test_norms_biases_and_scale_do_not_decay():
    encoder = clip_encoder()
    named = dict(encoder.named_parameters())
    groups = parameter_groups(named.items(), Settings(weight_decay=0.2))
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(named)
    for name, parameter in named.items():
        plain = "norm" in name or name.endswith("bias") or "logit_scale" in name or "class_embedding" in name
        assert decay[id(parameter)] == (0.0 if plain else 0.2), name


def test_vectors_decay_where_a_group_says_so():
    named = {"gain": torch.nn.Parameter(torch.ones(3)), "bias": torch.nn.Parameter(torch.ones(3))}
    groups = parameter_groups(named.items(), Settings(weight_decay=0.2, groups={"gain": {"weight_decay": 0.5}}))
    assert {id(p): g["weight_decay"] for g in groups for p in g["params"]} == {
        id(named["gain"]): 0.5,
        id(named["bias"]): 0.0,
    }


def test_groups_have_their_own_rates():
    named = dict(clip_encoder().named_parameters())
    settings = Settings(
        lr=1.0,
        weight_decay=0.2,
        groups={"visual_projection": {"lr": 5.0}, "vision|visual": {"lr": 0.1, "weight_decay": 0.0}},
    )
    rates = {
        id(p): (g["lr"], g["weight_decay"]) for g in parameter_groups(named.items(), settings) for p in g["params"]
    }
    assert rates[id(named["model.visual_projection.weight"])] == (5.0, 0.2)  # the first pattern wins
    assert rates[id(named["model.vision_model.embeddings.patch_embedding.weight"])] == (0.1, 0.0)
    assert rates[id(named["model.text_projection.weight"])] == (1.0, 0.2)
    assert rates[id(named["model.logit_scale"])] == (1.0, 0.0)
    with pytest.raises(ValueError, match=r"'nothing'.* matches no trained parameter"):
        parameter_groups(named.items(), Settings(groups={"nothing": {"lr": 1.0}}))
    with pytest.raises(ValueError, match="only lr and weight_decay"):
        parameter_groups(named.items(), Settings(groups={"model": {"rate": 1.0}}))


def test_a_group_with_rate_zero_stays():
    before = weights(clip_encoder())
    new = short(groups={"vision|visual": {"lr": 0.0}}).apply(clip_encoder(), pictures())
    assert not [name for name in moved(before, new) if "visi" in name or "visual" in name]


def test_select():
    model = Dropped()
    assert set(select(model, "^last")) == {"last.weight", "last.bias"}
    assert set(select(model, lambda name, p: p.ndim == 2)) == {"first.weight", "frozen.0.weight", "last.weight"}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires grad"):
        select(model, None)


# -- batches -----------------------------------------------------------------------------------------------------------


def test_the_order_is_a_permutation_per_epoch():
    order = Order(10, 3, seed=0)
    first = np.concatenate([order(i) for i in range(3)])
    second = np.concatenate([order(i) for i in range(3, 6)])
    assert len(set(first.tolist())) == len(set(second.tolist())) == 9
    assert first.tolist() != second.tolist()
    assert order(1).tolist() == Order(10, 3, seed=0)(1).tolist() == first[3:6].tolist()  # no memory of what came before
    assert order(1).tolist() != Order(10, 3, seed=1)(1).tolist()
    with pytest.raises(ValueError, match="batch_size=11 does not fit 10 records"):
        Order(10, 11, seed=0)


def test_augmentation_depends_on_the_record_not_on_the_batch():
    def draw(record: Record, rng: np.random.Generator) -> Record:
        return {**record, "number": rng.random()}

    records = [{"id": str(i), "index": i} for i in range(12)]
    seen = []
    for size in (3, 4):
        batches = Indexed(records, size, 0, lambda records: {r["index"]: r["number"] for r in records}, draw)
        first, second = (
            {k: v for i in range(n, n + 12 // size) for k, v in batches(i).items()} for n in (0, 12 // size)
        )
        assert len(first) == 12
        assert all(first[k] != second[k] for k in first)  # new in each epoch
        seen.append(first)
    assert seen[0] == seen[1]


def test_prefetching_keeps_the_order_and_the_bound():
    started, lock = [], threading.Lock()

    def make(i: int) -> int:
        with lock:
            started.append(i)
        time.sleep(0.002 * (i % 3))
        return i

    taken = []
    for value in prefetch(make, range(3, 20), workers=3, depth=2):
        taken.append(value)
        assert len(started) <= len(taken) + 5
    assert taken == list(range(3, 20))
    assert list(prefetch(make, range(4), workers=0)) == [0, 1, 2, 3]


def test_errors_while_preparing_come_out():
    def make(i: int) -> int:
        return 1 // (3 - i)

    with pytest.raises(ZeroDivisionError):
        list(prefetch(make, range(10), workers=2))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


class Stream:
    """Re-iterable, without length or index."""

    def __init__(self, records: list[Record]):
        self.records = records

    def __iter__(self):
        return iter(self.records)


def test_streams():
    def ids(records: list[Record]) -> list[str]:
        return [r["id"] for r in records]

    def stream(seed: int = 0) -> Streamed:
        return Streamed(Stream(pictures()), 5, seed, ids, None, window=8)

    one = stream()
    groups = [one(i) for i in range(6)]
    epoch = [name for group in groups[:3] for name in group]
    assert len(set(epoch)) == 15
    assert epoch != [r["id"] for r in pictures()][:15]
    assert stream()(4) == groups[4]  # a resumed run walks there
    assert stream(seed=1)(0) != groups[0]
    with pytest.raises(ValueError, match="cannot go back"):
        one(2)
    with pytest.raises(ValueError, match="the stream has only 16 records"):
        Streamed(Stream(pictures()), 20, 0, ids, None)(0)

    new = short().apply(clip_encoder(), Stream(pictures()))
    assert_same(new, short(workers=0).apply(clip_encoder(), Stream(pictures())))


@pytest.mark.parametrize("family", FAMILIES)
def test_arrays_and_cached_pixels_give_the_same_batch_as_pictures(family):
    encoder, records = FAMILIES[family](), pictures()[:3]
    expected = collate(encoder, records, InfoNCE())
    arrays = [{**r, "image": np.asarray(r["image"])} for r in records]
    larger = [{**r, "image": np.asarray(r["image"].resize((48, 40)))} for r in records]
    cached = [{"caption": r["caption"], "pixels": p} for r, p in zip(records, expected["image"])]
    assert_close(collate(encoder, arrays, InfoNCE())["image"], expected["image"], rtol=0, atol=0)
    assert_close(collate(encoder, cached, InfoNCE())["image"], expected["image"], rtol=0, atol=0)
    resized = encoder.preprocess([Image.fromarray(r["image"]) for r in larger])
    assert_close(collate(encoder, larger, InfoNCE())["image"], resized, rtol=0, atol=0)
    with pytest.raises(ValueError, match="must be uint8"):
        collate(encoder, [{**r, "image": np.zeros((32, 32, 3))} for r in records], InfoNCE())


def test_a_source_may_give_whole_batches():
    records = pictures()

    class Fast(list):
        asked = 0

        def batch(self, indices: np.ndarray) -> dict[str, Any]:
            Fast.asked += 1
            return {
                "image": np.stack([np.asarray(self[i]["image"]) for i in indices]),
                "caption": [self[i]["caption"] for i in indices],
            }

    fast = short().apply(clip_encoder(), Fast(records))
    assert Fast.asked == 4
    assert_same(fast, short().apply(clip_encoder(), records))


def test_paths_are_opened(tmp_path):
    records = pictures()
    for record in records:
        record["image"].save(tmp_path / f"{record['id']}.png")
    paths = [{**r, "image": tmp_path / f"{r['id']}.png"} for r in records]
    assert_same(short().apply(clip_encoder(), paths), short().apply(clip_encoder(), records))


def test_unreadable_pictures_are_replaced_and_named(tmp_path):
    records = pictures(2)
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    records[3] = {**records[3], "image": tmp_path / "bad.png"}
    with pytest.warns(UserWarning, match=r"1 records could not be read and were replaced, the first 3: .*bad\.png"):
        trained = short(workers=3).run(clip_encoder(), records)
    assert list(trained.unreadable) == [3]
    with pytest.warns(UserWarning, match="1 records"):
        assert_same(trained.encoder, short(workers=0).apply(clip_encoder(), records))
    for record in records:
        record["image"] = tmp_path / "bad.png"
    with pytest.raises(OSError, match=r"ten records in a row cannot be read.*bad\.png"):
        short().apply(clip_encoder(), records)


# -- what is missing is said before any work ---------------------------------------------------------------------------


def test_missing_fields_are_named():
    records = pictures()
    encoder = clip_encoder()
    with pytest.raises(
        ValueError,
        match=r"record 2 \('red-top-0'\) has no 'caption', which Train\(InfoNCE\) needs; it has \['id', 'image'\]",
    ):
        short().apply(encoder, [*records[:2], {"id": "red-top-0", "image": records[2]["image"]}, *records[3:]])
    with pytest.raises(ValueError, match=r"record 0 .* has no 'image' or 'pixels'"):
        short().apply(encoder, [{**r, "image": None} for r in records])
    with pytest.raises(ValueError, match="record 0: 'caption' must be a string, not 3"):
        short().apply(encoder, [{**r, "caption": 3} for r in records])
    with pytest.raises(ValueError, match="pairs is empty"):
        short().apply(encoder, [])
    with pytest.raises(ValueError, match="needs pairs"):
        short().apply(encoder)
    with pytest.raises(TypeError, match="not an iterator"):
        short().apply(encoder, iter(records))
    with pytest.raises(ValueError, match="batch_size=32 does not fit 16 records"):
        short(batch_size=32).apply(encoder, records)


def test_a_large_source_is_sampled_without_decoding():
    read = []

    class Column:
        def __init__(self, chosen: range):
            self.chosen = chosen

        def __len__(self) -> int:
            return len(self.chosen)

        def __getitem__(self, index: slice) -> Column:
            return Column(self.chosen[index])

        def column(self, key: str) -> list[Any]:
            read.extend(self.chosen)
            return [None if place == 2500 else key for place in self.chosen]

    found = dict(cheap_column(Column(range(5000)), "caption"))
    assert read == list(found) == list(range(0, 5000, 5))
    assert found[2500] is None
    assert found[0] == "caption"
    assert list(cheap_column([{"id": "a"}, {}], "id")) == [(0, "a"), (1, None)]
    assert list(cheap_column(Stream([]), "id")) == []


def test_records_of_another_source_are_refused(tmp_path):
    short(steps=1, checkpoints=tmp_path).apply(clip_encoder(), pictures())
    with pytest.raises(ValueError, match=r"another run .records: "):
        short(steps=1, checkpoints=tmp_path).apply(clip_encoder(), [{**r, "id": r["id"] + "!"} for r in pictures()])
    with pytest.raises(ValueError, match=r"another run .objective: .*InfoNCE.* there, .*Sigmoid.* here"):
        Train(Sigmoid(), steps=1, batch_size=8, lr=1e-3, checkpoints=tmp_path).apply(clip_encoder(), pictures())


# -- objectives that want more -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taught(Objective):
    """Match cached teacher vectors, and read no picture at all: the image view is made from a cached feature."""

    needs: ClassVar[frozenset[str]] = frozenset({"text", "teacher"})
    fields: ClassVar[tuple[str, ...]] = ("teacher", "weight", "note")
    seen: list[Any] = field(default_factory=list)

    def encode(self, encoder: Encoder, batch: Mapping[str, Any]) -> Views:
        self.seen.append({name: batch[name] for name in self.fields} | {"names": sorted(batch)})
        return Views({"text": encoder.texts(batch["text"]), "teacher": Features(batch["teacher"])}, encoder.scale)

    def terms(self, views: Views) -> dict[str, Tensor]:
        return {"match": (views["text"].pooled - views["teacher"].pooled).square().sum(-1).mean()}


def test_further_fields_reach_the_objective_and_pictures_are_not_touched():
    generator = torch.Generator().manual_seed(0)
    records = [
        {
            "id": str(i),
            "caption": f"box {i}",
            "teacher": torch.randn(24, generator=generator),
            "weight": i / 2,
            "note": "n",
        }
        for i in range(8)
    ]
    objective = Taught()
    log = Train(objective, steps=20, batch_size=8, lr=3e-3).run(clip_encoder(), records).log
    assert log[-1]["loss"] < log[0]["loss"]
    batch = objective.seen[0]
    assert batch["names"] == ["group", "note", "teacher", "text", "weight"]
    assert batch["teacher"].shape == (8, 24)
    assert batch["weight"].sum() == 14
    assert batch["note"] == ["n"] * 8
    with pytest.raises(ValueError, match=r"record 0 .* has no 'teacher'"):
        Train(Taught(), steps=1, batch_size=8).apply(clip_encoder(), pictures())


class Headed(nn.Module, Objective):
    """An objective that learns something itself."""

    def __init__(self, dim: int = 24):
        super().__init__()
        self.head = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.head.weight)

    def terms(self, views: Views) -> dict[str, Tensor]:
        return {"distance": (self.head(views["image"].pooled) - views["text"].pooled).square().sum(-1).mean()}


def test_what_an_objective_learns_is_trained_on_a_copy():
    objective, encoder = Headed(), clip_encoder()
    trained = Train(objective, steps=3, batch_size=8, lr=1e-2, trainable="projection").run(encoder, pictures())
    assert torch.equal(objective.head.weight, torch.eye(24))
    assert isinstance(trained.objective, Headed)
    assert not torch.equal(trained.objective.head.weight, torch.eye(24))
    assert moved(weights(encoder), trained.encoder) == {
        "model.visual_projection.weight",
        "model.text_projection.weight",
    }


@dataclass(frozen=True)
class Sized(Objective):
    def bind(self, encoder: Encoder) -> Headed:
        return Headed(encoder.dim)

    def terms(self, views: Views) -> dict[str, Tensor]:
        raise AssertionError("the bound objective is used")


def test_an_objective_is_sized_by_its_encoder():
    assert isinstance(Train(Sized(), steps=1, batch_size=4).run(dual_encoder(), pictures()).objective, Headed)


def test_an_own_collate():
    seen = []

    def own(encoder: Encoder, records: list[Record]) -> dict[str, Any]:
        seen.append(len(records))
        return collate(encoder, [{**r, "caption": r["words"]} for r in records], InfoNCE())

    records = [{"image": r["image"], "words": r["caption"]} for r in pictures()]
    new = short(collate=own).apply(clip_encoder(), records)
    assert seen == [8] * 4
    assert_same(new, short().apply(clip_encoder(), pictures()))


# -- progress ----------------------------------------------------------------------------------------------------------


def test_progress_is_silent_off_a_terminal(capsys):
    short(steps=2).apply(clip_encoder(), pictures())
    assert list(track(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_goes_to_stderr(capsys):
    with Progress("counting", 3, unit="images", shown=True) as bar:
        for _ in range(3):
            bar.advance(units=32, note="loss 0.5")
    out, err = capsys.readouterr()
    assert out == ""
    assert "counting" in err
    assert "3/3" in err
    assert "images/s" in err
    assert "loss 0.5" in err
    assert bar.units == 96


def test_no_warnings_from_a_plain_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short(steps=1).apply(clip_encoder(), pictures())
