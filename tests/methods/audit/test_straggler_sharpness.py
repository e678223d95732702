"""The path between two models, stragglers found by hand, sparsifying, and the audit on every kind of tower."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import kendalltau
from torch import Tensor, nn
from torch.testing import assert_close

from ecliptic.data.shots import tiny_records
from ecliptic.methods.audit.straggler_sharpness import (
    ALPHAS,
    Curve,
    Run,
    TowerClassifier,
    accuracy,
    find_stragglers,
    interpolated,
    layers_of,
    rank_correlation,
    report,
    rft_curve,
    sparsify,
    straggler_sharpness,
    tiny,
)
from tests.core.lessons import moved, weights
from tests.towers import FAMILIES, clip_encoder, siglip_encoder

NAMES = ("blue", "green", "red")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 2)).eval()


def nothing(model: nn.Module) -> float:
    return 0.0


# The path


def test_the_ends_are_the_ends_bit_for_bit():
    one, two = net(0).state_dict(), net(1).state_dict()
    assert all(
        value.equal(one[name]) for name, value in interpolated(one, two, 0.0).items() if value.is_floating_point()
    )
    assert all(value.equal(two[name]) for name, value in interpolated(one, two, 1.0).items())
    mixed = interpolated(one, two, 0.25, ["0.weight"])
    assert_close(mixed["0.weight"], 0.75 * one["0.weight"] + 0.25 * two["0.weight"])
    assert all(mixed[name].equal(two[name]) for name in two if name != "0.weight")
    assert mixed["2.num_batches_tracked"].dtype == torch.int64
    for alpha in ALPHAS:  # between equal ends nothing moves, up to rounding
        for name, value in interpolated(one, one, alpha).items():
            assert_close(value, one[name])
    with pytest.raises(ValueError, match=r"alpha=1\.5"):
        interpolated(one, two, 1.5)
    with pytest.raises(ValueError, match="architecture, first in"):
        interpolated(one, {**two, "more": torch.zeros(1)}, 0.5)


def test_a_linear_model_has_a_convex_path_without_a_barrier():
    x, y = random(30, 4), random(30, seed=1)
    model = nn.Linear(4, 1, bias=False).double()

    def squares(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(x)[:, 0] - y).square().mean())

    ends = [{"weight": 3 * random(1, 4, seed=seed)} for seed in (2, 3)]
    curve = rft_curve(model, *ends, nothing, nothing, squares)
    values = torch.tensor(curve.loss, dtype=torch.float64)
    assert_close(values.diff(n=3), torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-9)  # exactly quadratic
    assert (values.diff(n=2) > 0).all()
    assert curve.barrier == 0.0


def test_gain_barrier_and_failure_by_hand():
    alphas = (0.0, 0.5, 1.0)
    curve = Curve(alphas, (0.5, 0.8, 0.9), (0.6, 0.75, 0.7), (1.0, 1.5, 0.4))
    assert curve.gain == pytest.approx(0.05)
    assert curve.best == 0.5
    assert curve.barrier == pytest.approx(0.8)  # 1.5 - (1.0 + 0.4) / 2
    assert not curve.fails
    assert curve.inner == 0.75
    assert Curve(alphas, (0,) * 3, (0.7, 0.6, 0.5), (1.0, 0.0, 1.0)).fails  # no mix beats the zero-shot model
    assert Curve(alphas, (0,) * 3, (0.5, 0.4, 0.9), (1.0, 0.0, 1.0)).fails  # a dip
    flat = Curve(alphas, (0.5,) * 3, (0.5,) * 3, (1.0,) * 3)
    assert (flat.gain, flat.barrier, flat.best) == (0.0, 0.0, 0.0)


def test_the_curve_asks_at_every_alpha_and_leaves_the_model():
    model, seen = net(0), []
    ends, before = (net(1).state_dict(), net(2).state_dict()), weights(model)

    def first_weight(model: nn.Module) -> float:
        assert not model.training
        return model[0].weight[0, 0].item()

    curve = rft_curve(model, *ends, first_weight, first_weight, nothing, recalibrate=lambda m: seen.append(m))
    line = [(1 - a) * float(ends[0]["0.weight"][0, 0]) + a * float(ends[1]["0.weight"][0, 0]) for a in ALPHAS]
    assert curve.inside == pytest.approx(line)
    assert len(seen) == len(ALPHAS)
    assert not moved(before, model)
    for wrong in ((0.0, 0.5), (1.0, 0.0), (), (0.0, 1.0), (0.0, 0.5, 0.5, 1.0)):
        with pytest.raises(ValueError, match="ascend from 0 to 1"):
            rft_curve(model, *ends, nothing, nothing, nothing, alphas=wrong)


# Stragglers


class Two(nn.Module):
    def __init__(self, first: float, second: float):
        super().__init__()
        self.first = nn.Parameter(torch.tensor(first))
        self.second = nn.Parameter(torch.tensor(second))


def test_a_layer_that_dips_or_cannot_be_rewound_is_a_straggler():
    def made(first: Any, second: Any) -> Any:
        return lambda model: first(model.first.item()) + second(model.second.item())

    layers = {"first": ["first"], "second": ["second"]}
    ends = Two(0.0, 0.0).state_dict(), Two(1.0, 1.0).state_dict()
    # the second dips by 0.4 below the line in the middle; the first loses 0.3 where it is rewound, on a straight line
    scored = find_stragglers(
        Two(0.0, 0.0), *ends, made(lambda a: 0.3 * a, lambda a: -0.4 * (a == 0.5)), layers, (0.0, 0.5, 1.0)
    )
    assert [layer for layer, _ in scored] == ["second", "first"]
    assert [score for _, score in scored] == pytest.approx([0.4, 0.3])
    # half of the way back costs less than half: below the line, and lost at the end
    scored = find_stragglers(Two(0.0, 0.0), *ends, made(lambda a: a**2, lambda a: 0.0), layers, (0.0, 0.5, 1.0))
    assert dict(scored) == pytest.approx({"first": 0.25 + 1.0, "second": 0.0})
    same = find_stragglers(Two(0.0, 0.0), ends[1], ends[1], made(lambda a: a, lambda a: a), layers)
    assert same == [("first", 0.0), ("second", 0.0)]


def test_sparsifying_by_hand():
    before, after = {"w": torch.tensor([[1.0, 1.0], [0.0, 4.0]])}, {"w": torch.tensor([[1.1, -3.0], [0.5, 4.2]])}
    kept = {"w": after["w"], "b": torch.ones(2)}
    assert sparsify(kept, ["w"], 0.5, "weight")["w"].tolist() == [[0.0, -3.0], [0.0, pytest.approx(4.2)]]
    assert_close(sparsify(kept, ["w"], 0.5, "delta", before)["w"], torch.tensor([[1.0, -3.0], [0.5, 4.0]]))
    assert sparsify(kept, ["w"], 1.0, "delta", before)["w"].equal(before["w"])
    for on in ("weight", "delta"):
        assert all(value.equal(kept[name]) for name, value in sparsify(kept, ["w"], 0.0, on, before).items())
    assert sparsify(kept, ["w"], 1.0, "weight")["b"].equal(kept["b"])
    assert kept["w"].equal(after["w"])
    for wrong, message in (({"amount": 2.0}, "amount=2"), ({"on": "size"}, "on='size'"), ({}, "reference")):
        with pytest.raises(ValueError, match=message):
            sparsify(kept, ["w"], **{"amount": 0.5, **wrong})


# A population


def made(error: float, total: float, straggler: float) -> Run:
    curve = Curve((0.0, 0.5, 1.0), (0.5,) * 3, (0.2, 1 - error, 1 - error), (1.0,) * 3)
    return Run("r", curve, total, {"a": straggler, "b": 1.0, "c": 2.0, "d": 3.0}, ("a",), 0.0, 0.0)


def test_correlations_over_a_population():
    runs = [made(0.1 * k, total=float(-k), straggler=float([1, 2, 4, 3, 5][k - 1])) for k in range(1, 6)]
    found = report(runs).numbers
    assert found["tau.all_weights"].value == pytest.approx(-1.0)
    assert found["tau.stragglers"].value == pytest.approx(0.8)  # one of ten pairs the wrong way round
    assert found["tau.other_layers"].value == 0.0  # they do not vary
    assert found["tau.stragglers"].low <= 0.8 <= found["tau.stragglers"].high
    assert found["interpolation.share_failing"].value == 0.0
    assert found["interpolation.share_no_worse_than_both_ends"].value == 1.0
    assert "tau.stragglers" not in report(runs[:3]).numbers
    assert len(report(runs).tables[0].rows) == 5
    with pytest.raises(ValueError, match="no runs"):
        report([])


def test_kendalls_tau_is_scipys_with_ties():
    for seed in range(6):
        x, y = (random(12, seed=seed + k).mul(2).round().tolist() for k in (0, 50))
        assert rank_correlation(x, y, resamples=10).value == pytest.approx(kendalltau(x, y).statistic)
    with pytest.raises(ValueError, match="two or more pairs"):
        rank_correlation([1.0], [1.0])


# Encoders


@pytest.fixture(params=FAMILIES)
def encoder(request: Any) -> Any:
    return FAMILIES[request.param]()


def test_the_classifier_is_the_zero_shot_one_in_layers(encoder):
    from ecliptic.core.zeroshot import zero_shot_head

    before = weights(encoder)
    model = TowerClassifier(encoder, NAMES)
    pixels = encoder.preprocess([r["image"] for r in tiny_records()])
    with torch.no_grad():
        logits = model(pixels)
        cosines = encoder.images(pixels).pooled @ zero_shot_head(encoder, NAMES).T
    scale = 100.0 if encoder.bias is None else float(encoder.scale.detach())
    assert_close(logits, scale * cosines, rtol=1e-4, atol=1e-4)
    layers = model.layers()
    assert sorted(name for names in layers.values() for name in names) == sorted(n for n, _ in model.named_parameters())
    assert [f"block {i}" in layers for i in range(4)] == [True, True, True, False]
    assert {"embeddings", "classifier"} <= set(layers)
    assert not any("text" in name for name in model.state_dict())
    assert not moved(before, encoder)


def test_siglips_pooling_head_is_a_layer_of_its_own():
    layers = TowerClassifier(siglip_encoder(), NAMES).layers()
    assert any("attention" in name for name in layers["head"])
    assert "projection" not in layers
    assert "projection" in TowerClassifier(clip_encoder(), NAMES).layers()


def test_layers_of_any_other_model():
    assert layers_of(net(0)) == {
        "0": ["0.weight", "0.bias"],
        "2": ["2.weight", "2.bias"],
        "3": ["3.weight", "3.bias"],
    }
    assert layers_of(Two(0.0, 0.0)) == {"": ["first", "second"]}


def test_the_audit_of_an_encoder(encoder):
    found = straggler_sharpness(encoder, **tiny())
    assert {"interpolation.gain", "interpolation.share_failing"} <= set(found.numbers)
    assert "straggler" in str(found).lower()
    same = straggler_sharpness(encoder, **{**tiny(), "tuned": {"itself": encoder}})
    assert same.numbers["interpolation.gain"].value == 0.0
    assert same.numbers["interpolation.gain_sparse"].value == 0.0


def test_accuracy_counts():
    model = nn.Identity()
    batches = [(torch.eye(2), torch.tensor([0, 0])), (torch.eye(2)[:1], torch.tensor([0]))]
    assert accuracy(model, batches) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rho": -1.0}, "rho=-1"),
        ({"kind": "mean"}, "kind="),
        ({"norm": 3.0}, "norm=3"),
        ({"samples": 0}, "samples=0"),
        ({"top": 0.0}, "top=0"),
        ({"tuned": {}}, "tuned is empty"),
        ({"shifted": {}}, "shifted is empty"),
        ({"templates": "none such"}, "no template set"),
        ({"classes": ("red", "green")}, "'blue'"),
        ({"kappas": (2.0,)}, "kappas"),
        ({"alphas": (0.5, 1.0)}, "alphas"),
    ],
)
def test_what_is_wrong_is_said_before_any_picture_is_opened(wrong, message):
    records = [{**record, "image": "there is no such file.png"} for record in tiny_records()]
    with pytest.raises(ValueError, match=message):
        straggler_sharpness(clip_encoder(), **{**tiny(), "pairs": records, **wrong})


def test_models_that_cannot_be_mixed_are_named():
    with pytest.raises(ValueError, match=r"tuned\['other'\] has another architecture"):
        straggler_sharpness(clip_encoder(), **{**tiny(), "tuned": {"other": siglip_encoder()}})
    with pytest.raises(TypeError, match=r"tuned\['text'\] is a str"):
        straggler_sharpness(clip_encoder(), **{**tiny(), "tuned": {"text": "tiny"}})


def test_the_null_is_drawn_from_random_layers():
    runs = [made(0.1 * k, total=1.0, straggler=float(k)) for k in range(1, 7)]
    found = report(runs, draws=40).numbers["tau.random_layers"]
    assert found.n == 40
    assert found.low <= found.value <= found.high
    assert found.high < 1.0
    assert not math.isnan(found.value)
