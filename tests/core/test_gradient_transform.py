"""Gradients changed before an update: what a transform is given, what it may ask for, and that the loop stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ecliptic.core import checkpoint
from ecliptic.core.lora import Lora, is_adapter
from ecliptic.core.objectives import InfoNCE
from ecliptic.core.train import Settings, Train, fit
from tests.core.lessons import assert_same, pictures
from tests.core.small_run import regression
from tests.towers import clip_encoder

Again = Callable[[], Mapping[str, float]]


def grads(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def timeless(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("samples_per_s", "waited", "gradient")} for row in log]


class Looking:
    """Changes nothing, but looks at everything."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, step: int, parameters: Mapping[str, nn.Parameter], again: Again) -> dict[str, float]:
        self.steps.append(step)
        assert all(name.startswith(("first", "norm", "last")) for name in parameters)
        before = grads(parameters)
        terms = again()
        assert set(terms) == {"squares", "noise"}
        after = grads(parameters)
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert value.equal(after[name]), f"{name}: other draws the second time"
        return {"seen": float(len(before))}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("transform", [Looking(), lambda step, parameters, again: None])
def test_a_transform_that_changes_nothing_changes_no_bit(transform, accumulate):
    settings = Settings(steps=6, lr=0.01, accumulate=accumulate, workers=1)
    plain, log = regression(settings)
    looked, again = regression(settings, gradient_transform=transform)
    assert_same(plain, looked)  # running statistics too, though batches were seen twice
    assert timeless(again) == timeless(log)
    assert "gradient" not in log[0]
    if isinstance(transform, Looking):
        assert transform.steps[-6:] == [0, 1, 2, 3, 4, 5]
        assert all(row["gradient"] == {"seen": 6.0} for row in again)


def test_the_update_is_made_with_the_changed_gradient_which_is_clipped_afterwards():
    weight = nn.ParameterList([nn.Parameter(torch.tensor([1.0, 2.0]))])

    def times_ten(step: int, parameters: Mapping[str, nn.Parameter], again: Again) -> None:
        for parameter in parameters.values():
            parameter.grad = 10 * parameter.grad

    settings = Settings(
        steps=1, lr=0.1, optimizer="sgd", betas=(0.0, 0.9), weight_decay=0.0, warmup=0, schedule="constant", grad_clip=25.0
    )  # fmt: skip
    log = fit(weight, lambda x: {"dot": (weight[0] * x).sum()}, [torch.tensor([3.0, 4.0])], settings,
              gradient_transform=times_ten)  # fmt: skip
    assert log[0]["grad_norm"] == pytest.approx(50.0)
    assert_close(weight[0].detach(), torch.tensor([1.0, 2.0]) - 0.1 * torch.tensor([15.0, 20.0]))


def test_the_second_gradient_is_taken_where_the_weights_are_then():
    weight = nn.ParameterList([nn.Parameter(torch.tensor([1.0, 2.0]))])
    seen = []

    def elsewhere(step: int, parameters: Mapping[str, nn.Parameter], again: Again) -> None:
        here = weight[0].detach().clone()
        with torch.no_grad():
            weight[0] += 1
        seen.append(again())
        seen.append(weight[0].grad.clone())
        with torch.no_grad():
            weight[0].copy_(here)

    settings = Settings(steps=1, lr=0.1, workers=1)
    fit(weight, lambda x: {"squares": (weight[0] ** 2).sum()}, [torch.zeros(1)], settings, gradient_transform=elsewhere)
    assert seen[0] == {"squares": 13.0}
    assert seen[1].tolist() == [4.0, 6.0]


@dataclass
class Momentum:
    """A transform with a state: gradients, averaged over the steps."""

    decay: float = 0.5

    def __post_init__(self) -> None:
        self.average: dict[str, Tensor] = {}

    def __call__(self, step: int, parameters: Mapping[str, nn.Parameter], again: Again) -> None:
        for name, parameter in parameters.items():
            old = self.average.get(name, torch.zeros_like(parameter)) if step else torch.zeros_like(parameter)
            self.average[name] = parameter.grad = self.decay * old + parameter.grad

    def state_dict(self) -> dict[str, Any]:
        return dict(self.average)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = dict(state)


def test_its_state_travels_with_the_checkpoint(tmp_path):
    common = {"steps": 8, "lr": 0.01, "workers": 1}
    straight, _ = regression(Settings(**common), gradient_transform=Momentum())
    settings = Settings(**common, checkpoints=tmp_path, checkpoint_every=3)
    with pytest.raises(ZeroDivisionError):
        regression(settings, gradient_transform=Momentum(), after_step=lambda step: 1 / 0 if step == 5 else None)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [3]
    resumed, _ = regression(settings, gradient_transform=Momentum())
    assert_same(straight, resumed)


def test_an_interrupt_inside_leaves_no_checkpoint_of_weights_elsewhere(tmp_path):
    def perturb(step: int, parameters: Mapping[str, nn.Parameter], again: Again) -> None:
        if step == 3:
            with torch.no_grad():
                next(iter(parameters.values())).add_(100)
            raise KeyboardInterrupt

    settings = Settings(steps=4, lr=0.01, checkpoints=tmp_path, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        regression(settings, gradient_transform=perturb)
    newest = checkpoint.checkpoints(tmp_path)[-1]
    assert newest[0] == 2
    stored = checkpoint.load(newest[1])["model"]
    assert max(float(value.abs().max()) for value in stored.values() if value.is_floating_point()) < 50


def test_an_encoder_is_trained_through_it_and_says_so():
    chosen: list[set[str]] = []

    @dataclass
    class Halved:
        share: float = 0.5

        def __call__(self, step: int, parameters: Mapping[str, nn.Parameter], again: Again) -> dict[str, float]:
            chosen.append(set(parameters))
            for parameter in parameters.values():
                parameter.grad = self.share * parameter.grad
            return {"share": self.share}

    train = Train(InfoNCE(), steps=2, batch_size=8, lr=1e-2, warmup=0, lora=Lora(rank=2), gradient_transform=Halved())
    done = train.run(clip_encoder(), pictures())
    assert len(chosen) == 2
    assert all(is_adapter(name) for name in chosen[0])
    assert done.log[-1]["gradient"] == {"share": 0.5}
    assert done.encoder.history[-1]["args"]["gradient_transform"] == {"name": "Halved", "share": 0.5}
    plain = Train(InfoNCE(), steps=2, batch_size=8, lr=1e-2, warmup=0, lora=Lora(rank=2)).run(
        clip_encoder(), pictures()
    )
    assert "gradient_transform" not in plain.encoder.history[-1]["args"]
    assert done.log[0]["grad_norm"] == pytest.approx(plain.log[0]["grad_norm"] / 2, rel=1e-5)
