"""GLAD: the rule by hand, SAM as an oracle, quadratics in closed form, and LoRA as the limit of every mode."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn, tensor
from torch.testing import assert_close

from ecliptic.baselines.lora_tuning import LoraTuning
from ecliptic.core import checkpoint
from ecliptic.core.batches import collate
from ecliptic.core.lora import Lora, is_adapter
from ecliptic.core.prompt_classifier import PromptClassifier
from ecliptic.core.train import Settings, fit
from ecliptic.data.shots import tiny_records
from ecliptic.methods.adapt.glad import MODES, Glad, GradientRegulariser, agreement, global_norm, regularised
from tests.core.lessons import moved, weights
from tests.towers import FAMILIES, clip_encoder

SHORT: dict[str, Any] = {"steps": 3, "batch_size": 6, "lr": 2e-2, "seed": 3}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The rule


def test_the_rule_by_hand():
    g, r = tensor([2.0, 0.0]), tensor([1.0, 3.0])
    assert regularised(g, r, "blend", 0.25).tolist() == [1.75, 0.75]
    assert_close(regularised(g, r, "orthogonal", 0.5), tensor([2.0, 1.5]))  # r less its part along g is (0, 3)
    assert regularised(g, r, "project").equal(g)  # they agree
    against = tensor([-1.0, 1.0])
    assert_close(regularised(g, against, "project"), tensor([1.0, 1.0]))  # g - (-2 / 2) against


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, 4.0, -2.0])
def test_orthogonal_leaves_the_task_its_own_component(lam):
    for seed in range(5):
        g, r = random(7, 4, seed=seed), random(7, 4, seed=100 + seed)
        assert_close((regularised(g, r, "orthogonal", lam) * g).sum(), g.square().sum(), rtol=1e-10, atol=0)


def test_projected_gradients_never_point_against_the_reference():
    conflicts = 0
    for seed in range(40):
        g, r = random(6, seed=seed), random(6, seed=100 + seed)
        found = regularised(g, r, "project")
        assert float((found * r).sum()) >= -1e-7
        conflicts += not found.equal(g)
        # the nearest such point: what was taken away lies along the reference
        assert_close((g - found).norm(), max(-(g * r).sum(), tensor(0.0, dtype=torch.float64)) / r.norm())
    assert 10 < conflicts < 30


def test_weight_zero_is_the_gradient_itself_bit_for_bit():
    g, r = random(5).float(), random(5, seed=1).float()
    for mode in ("blend", "orthogonal"):
        assert regularised(g, r, mode, 0.0).equal(g)
    assert regularised(g, r, "blend", 1.0).equal(r)


def test_agreement_counts_tensors():
    one = [tensor([1.0, 0.0]), tensor([1.0]), tensor([0.0])]
    two = [tensor([0.0, 2.0]), tensor([-3.0]), tensor([5.0])]  # cosines 0 and -1; nothing can be said of the third
    assert agreement(one, two) == {"cosine": -0.5, "conflicts": 0.5}
    assert agreement([tensor([0.0])], [tensor([1.0])]) == {"cosine": 1.0, "conflicts": 0.0}
    assert global_norm([tensor([3.0]), tensor([[0.0, 4.0]])]) == 5.0


# Two passes


class Bowl(nn.Module):
    """1/2 phi' H phi in two tensors."""

    def __init__(self, hessian: Tensor, start: Tensor):
        super().__init__()
        self.hessian = hessian
        self.first, self.second = nn.Parameter(start[:2].clone()), nn.Parameter(start[2:].clone())

    def forward(self) -> Tensor:
        phi = torch.cat([self.first, self.second])
        return phi @ self.hessian @ phi / 2


def bowl() -> tuple[Bowl, Tensor, Tensor]:
    root, start = random(5, 5), random(5, seed=1)
    return Bowl(root @ root.T, start), root @ root.T, start


def test_on_a_quadratic_the_reference_is_known_in_closed_form():
    model, hessian, start = bowl()
    regulariser = GradientRegulariser(rho=0.3, mode="blend", lam=1.0)
    told = regulariser.step(model.parameters(), torch.optim.SGD(model.parameters(), lr=0.1), model)
    g = hessian @ start
    reference = g + 0.3 * hessian @ g / g.norm()  # one norm over both tensors
    assert_close(torch.cat([model.first, model.second]).detach(), start - 0.1 * reference)
    cosines = [torch.cosine_similarity(g[a:b], reference[a:b], dim=0) for a, b in ((0, 2), (2, 5))]
    assert told["cosine"] == pytest.approx(float(sum(cosines)) / 2)


def test_blend_with_weight_one_is_sharpness_aware_minimisation():
    """arXiv 2010.01412, algorithm 1, written out; five steps of Adam."""
    mine, hessian, start = bowl()
    regulariser, optimizer = GradientRegulariser(0.2, "blend", 1.0), torch.optim.Adam(mine.parameters(), lr=0.05)
    theirs = [start.clone()]
    sam = torch.optim.Adam(theirs, lr=0.05)
    for _ in range(5):
        regulariser.step(mine.parameters(), optimizer, mine)
        w = theirs[0]
        g = hessian @ w
        w.grad = hessian @ (w + 0.2 * g / g.norm())
        sam.step()
    assert_close(torch.cat([mine.first, mine.second]).detach(), theirs[0], rtol=0, atol=1e-6)


def test_weights_are_put_back_bit_for_bit():
    model = Bowl(torch.eye(5) * 3, torch.tensor([0.1, 1e-8, 3e7, 0.7, 1 / 3]))
    before = weights(model)
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    for direction in ("ascent", "random"):
        GradientRegulariser(rho=10.0, direction=direction).step(model.parameters(), still, model)
        assert not moved(before, model)

    def fails() -> None:
        raise KeyboardInterrupt

    model().backward()
    with pytest.raises(KeyboardInterrupt):
        GradientRegulariser(rho=10.0)(0, dict(model.named_parameters()), fails)
    assert not moved(before, model)


def test_both_passes_draw_the_same_and_the_generator_goes_on_as_after_one():
    layer, drop = nn.Linear(8, 1), nn.Dropout(0.5)
    x, masks = torch.ones(4, 8), []

    def loss() -> Tensor:
        seen = drop(x)
        masks.append(seen)
        return layer(seen).square().mean()

    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    regulariser = GradientRegulariser(rho=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(2):
            regulariser.step(layer.parameters(), optimizer, loss)
        last = torch.random.get_rng_state()
        torch.manual_seed(0)
        one, two = drop(x), drop(x)
        assert torch.random.get_rng_state().equal(last)
    assert len(masks) == 4
    assert masks[0].equal(masks[1])
    assert masks[2].equal(masks[3])
    assert masks[0].equal(one)
    assert masks[2].equal(two)
    assert not one.equal(two)


@pytest.mark.parametrize("mode", MODES)
def test_a_vanishing_radius_is_plain_training(mode):
    for rho, atol in ((1e-3, 0.05), (1e-6, 5e-5)):
        model, hessian, start = bowl()
        GradientRegulariser(rho, mode, 1.0).step(model.parameters(), torch.optim.SGD(model.parameters(), lr=1.0), model)
        found = start - torch.cat([model.first, model.second]).detach()
        assert_close(found, hessian @ start, rtol=0, atol=atol)
    model, hessian, start = bowl()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert GradientRegulariser(0.0, mode).step(model.parameters(), optimizer, model) is None
    assert_close(start - torch.cat([model.first, model.second]).detach(), hessian @ start)


def test_a_random_direction_has_the_same_length_and_the_seed_says_which():
    model = Bowl(torch.eye(5, dtype=torch.float64), random(5, seed=1))
    seen = []
    for seed in (0, 0, 1):
        parameters = dict(model.named_parameters())
        model.zero_grad()
        model().backward()

        def again(parameters: dict[str, nn.Parameter] = parameters) -> None:
            seen.append(torch.cat([p.detach() for p in parameters.values()]) - random(5, seed=1))

        GradientRegulariser(rho=0.7, direction="random", seed=seed)(0, parameters, again)
    assert all(float(step.norm()) == pytest.approx(0.7) for step in seen)
    assert seen[0].equal(seen[1])
    assert not seen[0].equal(seen[2])
    assert abs(float(torch.cosine_similarity(seen[0], random(5, seed=1), dim=0))) < 0.99


def test_a_gradient_without_a_direction_stays_as_it_is():
    model, _, _ = bowl()
    parameters = dict(model.named_parameters())
    for value in (0.0, math.inf, math.nan):
        for p in parameters.values():
            p.grad = torch.full_like(p, value)
        before = {name: p.grad.clone() for name, p in parameters.items()}
        assert GradientRegulariser(0.5)(0, parameters, lambda: pytest.fail("no second pass is needed")) is None
        assert all(torch.equal(p.grad.nan_to_num(7), before[name].nan_to_num(7)) for name, p in parameters.items())


def test_an_old_reference_serves_until_it_is_refreshed():
    model, hessian, start = bowl()
    calls = []

    def loss() -> Tensor:
        calls.append(1)
        return model()

    regulariser, optimizer = GradientRegulariser(0.3, "blend", 1.0, refresh=2), torch.optim.SGD(model.parameters(), 0.1)
    phi, passes = start, []
    for step in range(4):
        regulariser.step(model.parameters(), optimizer, loss)
        passes.append(len(calls))
        g = hessian @ phi
        if step % 2 == 0:
            shift, norm = 0.3 * hessian @ g / g.norm(), g.norm()
            phi = phi - 0.1 * (g + shift)
        else:
            phi = phi - 0.1 * (g + shift * g.norm() / norm)
        assert_close(torch.cat([model.first, model.second]).detach(), phi)
    assert passes == [2, 3, 5, 6]


def test_an_interrupted_training_goes_on_with_the_reference_it_had(tmp_path):
    def run(folder: Any = None, stop: int = 0) -> Bowl:
        model, _, _ = bowl()
        settings = Settings(steps=6, lr=0.01, workers=1, checkpoints=folder, checkpoint_every=2)
        regulariser = GradientRegulariser(0.3, refresh=3)
        fit(model, lambda _: {"bowl": model()}, [tensor(0.0)], settings, gradient_transform=regulariser,
            after_step=lambda step: 1 / 0 if step == stop else None)  # fmt: skip
        return model

    with pytest.raises(ZeroDivisionError):
        run(tmp_path, stop=3)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [2]
    assert not moved(weights(run()), run(tmp_path))


# The method


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["blend", "orthogonal"])
def test_weight_zero_is_plain_lora_number_for_number(family, mode):
    encoder = FAMILIES[family]()
    plain = LoraTuning(**SHORT).fit(encoder, tiny_records())
    judge = Glad(**SHORT, mode=mode, lam=0.0, rho=0.3).fit(encoder, tiny_records())
    assert all(value.equal(plain.state_[name]) for name, value in judge.state_.items())
    steered = Glad(**SHORT, mode=mode, rho=0.3).fit(encoder, tiny_records())
    assert not all(value.equal(plain.state_[name]) for name, value in steered.state_.items())
    assert judge.trained_parameters_ == plain.trained_parameters_ == steered.trained_parameters_


def test_radius_zero_is_plain_lora_and_has_nothing_to_tell():
    encoder = clip_encoder()
    plain = LoraTuning(**SHORT).fit(encoder, tiny_records())
    judge = Glad(**SHORT, rho=0.0).fit(encoder, tiny_records())
    assert all(value.equal(plain.state_[name]) for name, value in judge.state_.items())
    assert judge.steered_ == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_update_tells_how_far_gradient_and_reference_agree(family):
    encoder = FAMILIES[family]()
    before = weights(encoder)
    judge = Glad(**SHORT, rho=0.3).fit(encoder, tiny_records())
    assert [set(row) for row in judge.steered_] == [{"cosine", "conflicts"}] * 3
    assert all(-1 <= row["cosine"] < 1 and 0 <= row["conflicts"] <= 1 for row in judge.steered_)
    assert not moved(before, encoder)
    assert judge.for_classes(("a boat", "red")).classes_ == ("a boat", "red")


@pytest.mark.parametrize("family", FAMILIES)
def test_at_first_answers_are_the_frozen_ones_and_only_b_has_a_gradient(family):
    encoder = FAMILIES[family]()
    adapted = Lora(rank=2, alpha=1.0, parts=("q", "k", "v")).adapt(encoder)
    pixels = encoder.preprocess([r["image"] for r in tiny_records()])
    assert adapted.images(pixels).pooled.equal(encoder.images(pixels).pooled)
    objective = PromptClassifier(("red", "green", "blue")).bind(adapted)
    batch = collate(adapted, tiny_records(), objective)
    objective.terms(objective.encode(adapted, batch))["cross_entropy"].backward()
    for name, parameter in adapted.named_parameters():
        if is_adapter(name):
            assert (float(parameter.grad.abs().sum()) == 0) == (".lora_A." in name), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": -0.1}, "rho=-0.1"),
        ({"rho": math.inf}, "rho=inf"),
        ({"lam": math.nan}, "lam=nan"),
        ({"refresh": 0}, "refresh=0"),
        ({"mode": "sam"}, "mode='sam': choose one of orthogonal, blend, project"),
        ({"direction": "down"}, "direction='down'"),
        ({"rank": 0}, "rank=0"),
        ({"classes": ("red", "green")}, "'blue'"),
    ],
)
def test_what_is_wrong_is_said_before_any_picture_is_opened(settings, message):
    records = [{**record, "image": "there is no such file.png"} for record in tiny_records()]
    with pytest.raises(ValueError, match=message):
        Glad(**settings).fit(clip_encoder(), records)
