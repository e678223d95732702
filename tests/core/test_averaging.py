"""Averages of weights: EMA along a run, WiSE-FT between two models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ecliptic.core import checkpoint
from ecliptic.core.averaging import Ema, WiseFt, interpolate
from ecliptic.core.contracts import Objective, Views
from ecliptic.core.encoder import Encoder, load
from ecliptic.core.objectives import InfoNCE
from ecliptic.core.train import Train
from tests.core.lessons import assert_same, moved, pictures, weights
from tests.towers import FAMILIES, clip_encoder, siglip_encoder


def short(**settings: Any) -> Train:
    return Train(InfoNCE(), **{"steps": 6, "batch_size": 8, "lr": 1e-2, "warmup": 0, **settings})


def test_the_average_by_hand():
    weight = nn.Parameter(torch.tensor([1.0]))
    average = Ema({"w": weight}, decay=0.25)
    for step, value in ((1, 2.0), (2, 4.0)):
        with torch.no_grad():
            weight.fill_(value)
        average.update(step)
    # d = 2/11 after the first update, and 3/12 = 0.25 after the second
    first = 2 / 11 * 1 + 9 / 11 * 2
    assert_close(average.average["w"], torch.tensor([0.25 * first + 0.75 * 4]))
    with average.applied():
        assert_close(weight.detach(), torch.tensor([0.25 * first + 3]))
    assert weight.item() == 4.0
    with pytest.raises(ValueError, match="ema=1"):
        Ema({"w": weight}, decay=1)


def test_training_gives_back_the_average():
    encoder, seen = clip_encoder(), []

    class Watched(InfoNCE):
        def terms(self, views: Views) -> dict[str, Tensor]:
            seen.append(views.scale.detach().log())
            return super().terms(views)

    done = Train(Watched(), steps=4, batch_size=8, lr=1e-2, warmup=0, ema=0.9).run(encoder, pictures())
    values = [*seen[1:], done.last.scale.log()]  # after each update
    average = seen[0].item()
    for step, value in enumerate(values, 1):
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * value.item()
    assert done.encoder.scale.log().item() == pytest.approx(average, abs=1e-6)
    assert_same(done.last, Train(InfoNCE(), steps=4, batch_size=8, lr=1e-2, warmup=0).apply(encoder, pictures()))
    assert moved(weights(done.last), done.encoder)
    assert done.encoder.history[-1]["args"]["ema"] == 0.9
    assert_same(short(ema=0.0).apply(encoder, pictures()), short().apply(encoder, pictures()))


def test_evaluation_sees_the_average_and_training_does_not():
    seen = []

    def evaluate(encoder: Encoder) -> dict[str, float]:
        seen.append(weights(encoder))
        return {}

    done = short(ema=0.9, evaluate=evaluate, evaluate_every=3).run(clip_encoder(), pictures())
    assert len(seen) == 2
    assert not moved(seen[-1], done.encoder)
    assert_same(done.last, short().apply(clip_encoder(), pictures()))


def test_a_stopped_average_goes_on_bit_for_bit(tmp_path):
    stopping = True

    def stop(encoder: Encoder) -> dict[str, float]:
        if stopping:
            raise KeyboardInterrupt
        return {}

    common = {"ema": 0.9, "evaluate": stop, "evaluate_every": 3, "checkpoints": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        short(**common).apply(clip_encoder(), pictures())
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [3]
    stopping = False
    resumed = short(**common).run(clip_encoder(), pictures())
    straight = short(ema=0.9).run(clip_encoder(), pictures())
    assert_same(resumed.encoder, straight.encoder)
    assert_same(resumed.last, straight.last)
    with pytest.raises(ValueError, match=r"another run \(ema: 0.9 there, 0.5 here\)"):
        short(ema=0.5, checkpoints=tmp_path).apply(clip_encoder(), pictures())


def test_what_the_objective_learns_is_averaged_too():
    class Headed(nn.Module, Objective):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(24, 24)

        def terms(self, views: Views) -> dict[str, Tensor]:
            return {"apart": (self.head(views["image"].pooled) - views["text"].pooled).square().mean()}

    with torch.random.fork_rng():
        torch.manual_seed(0)
        objective = Headed()
    plain, averaged = (
        Train(objective, steps=4, batch_size=8, lr=1e-2, ema=ema).run(clip_encoder(), pictures()) for ema in (None, 0.9)
    )
    assert isinstance(plain.objective, nn.Module)
    assert moved(weights(plain.objective), averaged.objective) == {"head.weight", "head.bias"}


# -- WiSE-FT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_interpolation_lies_on_the_line(family):
    before, after = FAMILIES[family](0), FAMILIES[family](1)
    old, new = weights(before), weights(after)
    assert_same(interpolate(before, after, 0.0), before)
    assert_same(interpolate(before, after, 1.0), after)
    mixed = interpolate(before, after, 0.25).state_dict()
    assert mixed.keys() == old.keys()
    for name, value in mixed.items():
        expected = 0.75 * old[name] + 0.25 * new[name] if value.is_floating_point() else new[name]
        assert_close(value, expected, msg=name)
    assert not moved(old, before)
    assert not moved(new, after)


def test_interpolation_wants_one_architecture():
    with pytest.raises(ValueError, match=r"alpha=1\.5"):
        interpolate(clip_encoder(), clip_encoder(), 1.5)
    with pytest.raises(ValueError, match="differ in architecture, first in model"):
        interpolate(clip_encoder(), siglip_encoder(), 0.5)


def test_interpolation_as_a_step_is_saved_with_its_history(tmp_path):
    before, after = clip_encoder(0), clip_encoder(1)
    before.save_pretrained(tmp_path / "before")
    assert_same(WiseFt(before, alpha=1.0).apply(after), after)
    mixed = WiseFt(str(tmp_path / "before")).apply(after)
    assert_same(mixed, interpolate(before, after, 0.5))
    mixed.save_pretrained(tmp_path / "mixed")
    opened = load(tmp_path / "mixed")
    assert_same(opened, mixed)
    assert opened.history[-1]["step"] == "wise_ft"
    assert opened.history[-1]["args"]["alpha"] == 0.5
