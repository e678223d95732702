"""Sharpness on quadratics in closed form, its invariances, and the ascent that looks for the worst case."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ecliptic.core.sharpness import directional_loss, sharpness, worst_case
from tests.core.lessons import moved, weights


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Bowl(nn.Module):
    """1/2 w' H w in two tensors."""

    def __init__(self) -> None:
        super().__init__()
        root = random(6, 6)
        self.hessian = root @ root.T
        self.first, self.second = nn.Parameter(random(2, seed=1)), nn.Parameter(random(4, seed=2))


def bowl_loss(model: nn.Module, batch: float) -> Tensor:
    w = torch.cat([model.first, model.second])
    return batch * (w @ model.hessian @ w) / 2


def test_on_average_a_quadratic_rises_by_half_the_trace():
    model, trace = Bowl(), Bowl().hessian.diagonal()
    plain = {"rho": 0.3, "adaptive": False, "samples": 4000}
    whole = sharpness(model, bowl_loss, [1.0], **plain)
    assert whole == pytest.approx(0.045 * float(trace.sum()), rel=0.05)
    first, second = (sharpness(model, bowl_loss, [1.0], **plain, names=[name]) for name in ("first", "second"))
    assert first == pytest.approx(0.045 * float(trace[:2].sum()), rel=0.05)
    assert second == pytest.approx(0.045 * float(trace[2:].sum()), rel=0.05)
    # the same draws in each layer: what is left are the mixed terms, of mean 0
    assert first + second == pytest.approx(whole, rel=0.05)
    assert sharpness(model, bowl_loss, [1.0, 3.0], **plain) == pytest.approx(2 * whole)  # the mean over batches


def test_adaptive_steps_are_in_proportion_to_the_weights():
    model = Bowl()
    w = torch.cat([model.first, model.second]).detach()
    c = torch.cat([v.abs() + 1e-3 * v.square().mean().sqrt() for v in (w[:2], w[2:])])
    expected = 0.045 * float((c * c * model.hessian.diagonal()).sum())
    assert sharpness(model, bowl_loss, [1.0], rho=0.3, samples=4000) == pytest.approx(expected, rel=0.07)


def test_the_worst_case_of_a_quadratic():
    """At its minimum |d| <= rho finds 1/2 rho^2 of the largest eigenvalue; for a linear loss the corner, or the gradient."""
    model = Bowl()
    with torch.no_grad():
        model.first.zero_()
        model.second.zero_()
    top = float(torch.linalg.eigvalsh(model.hessian)[-1])
    found, u = worst_case(model, bowl_loss, 1.0, rho=0.5, norm=2, adaptive=False)
    assert found == pytest.approx(0.125 * top, rel=0.02)
    assert float(torch.cat(list(u.values())).norm()) <= 0.5 + 1e-9

    def slope(model: nn.Module, batch: float) -> Tensor:
        return 3 * model.first[0] - 4 * model.second[1]

    assert worst_case(model, slope, 1.0, 0.5, math.inf, adaptive=False)[0] == pytest.approx(3.5)
    assert worst_case(model, slope, 1.0, 0.5, 2, adaptive=False)[0] == pytest.approx(2.5, rel=1e-3)

    def gentle(model: nn.Module, batch: float) -> Tensor:
        return 1e-4 * slope(model, batch)  # steps depend on the direction of the gradient, not on its length

    assert worst_case(model, gentle, 1.0, 0.5, 2, adaptive=False)[0] == pytest.approx(2.5e-4, rel=1e-3)
    assert sharpness(model, slope, [1.0], 0.5, samples=3) == pytest.approx(
        0.0, abs=1e-12
    )  # draws and their mirror images


@pytest.mark.parametrize("norm", [2, math.inf])
def test_the_worst_case_never_falls_with_the_radius_nor_with_more_layers(norm):
    model = Bowl()
    value, u, seen = 0.0, None, []
    for rho in (0.0, 0.01, 0.1, 0.5):
        value, u = worst_case(model, bowl_loss, 1.0, rho, norm, start=u)
        seen.append(value)
    assert seen[0] == 0.0
    assert seen == sorted(seen)
    assert seen[-1] > 0
    one, u = worst_case(model, bowl_loss, 1.0, 0.3, norm, names=["second"])
    assert set(u) == {"second"}
    both, _ = worst_case(model, bowl_loss, 1.0, 0.3, norm, start=u)
    assert both >= one > 0
    assert sharpness(model, bowl_loss, [1.0], 0.0, "max", norm) == 0.0
    assert sharpness(model, bowl_loss, [1.0], 0.0, "avg") == 0.0


def net(scale: float = 1.0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():  # relu(s x) = s relu(x)
        model[0].weight *= scale
        model[0].bias *= scale
        model[2].weight /= scale
    return model


@pytest.mark.parametrize(("kind", "norm"), [("avg", 2), ("max", 2), ("max", math.inf)])
def test_adaptive_sharpness_sees_the_function_not_its_scaling(kind, norm):
    batch = (random(20, 5), torch.arange(20) % 3)
    found = [sharpness(net(s), directional_loss, [batch], 0.05, kind, norm) for s in (1.0, 7.0)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert abs(found[0]) > 1e-5
    plain = [sharpness(net(s), directional_loss, [batch], 0.05, kind, norm, adaptive=False) for s in (1.0, 7.0)]
    assert plain[0] != pytest.approx(plain[1], rel=0.05)


def test_the_loss_does_not_see_the_scale_of_the_logits():
    batch = (random(20, 5), torch.arange(20) % 3)
    louder = nn.Sequential(net(), nn.Linear(3, 3, bias=False).double())
    with torch.no_grad():
        louder[1].weight.copy_(9 * torch.eye(3))
    assert_close(directional_loss(louder, batch), directional_loss(net(), batch))


def test_the_model_the_generators_and_training_flags_stay():
    model, batch = net().float().train(), (torch.randn(4, 5), torch.arange(4) % 3)
    model[0].bias.requires_grad_(False)
    before, state = weights(model), torch.random.get_rng_state()
    for kind in ("avg", "max"):
        one, two = (sharpness(model, directional_loss, [batch], 0.1, kind, names=["0.bias"]) for _ in range(2))
        assert one == two
    assert not moved(before, model)
    assert torch.random.get_rng_state().equal(state)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": -1.0}, "rho=-1"),
        ({"rho": 1.0, "kind": "mean"}, "kind='mean'"),
        ({"rho": 1.0, "norm": 1}, "norm=1"),
        ({"rho": 1.0, "samples": 0}, "samples=0"),
        ({"rho": 1.0, "names": ["third"]}, "no parameter 'third'"),
    ],
)
def test_what_is_wrong_is_said(settings, message):
    with pytest.raises(ValueError, match=message):
        sharpness(Bowl(), bowl_loss, [1.0], **settings)
    with pytest.raises(ValueError, match="no batches"):
        sharpness(Bowl(), bowl_loss, [], 0.1)
