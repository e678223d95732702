"""Clipped softmax and gated attention: the equations, the invariants of arXiv 2306.12929, and every kind of model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close
from transformers.models.bert.modeling_bert import BertModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model
from transformers.models.opt.modeling_opt import OPTModel
from transformers.models.vit.modeling_vit import ViTModel

from ecliptic.core.attention import attention_modules
from ecliptic.core.encoder import load
from ecliptic.core.objectives import InfoNCE
from ecliptic.core.outliers import outlier_metrics
from ecliptic.core.train import Train
from ecliptic.data.shots import tiny_records
from ecliptic.methods.attend.quantizable_transformers import (
    GATES,
    AttentionGate,
    ClippedSoftmax,
    QuantizableTransformer,
    clipped_softmax,
    gamma_from_alpha,
    make_quantizable,
    starts_dead,
    visible_keys,
)
from tests.models import IDS, normal, small
from tests.towers import FAMILIES

MODELS = {
    "bert": (BertModel, {"max_position_embeddings": 16, "initializer_range": 0.5}),
    "opt": (OPTModel, {"max_position_embeddings": 16, "init_std": 0.5, "dropout": 0.0}),
    "vit": (ViTModel, {"initializer_range": 0.5}),
    "dinov2": (Dinov2Model, {"initializer_range": 0.5}),
}


def made(kind):
    model, config = MODELS[kind]
    return small(model, **config)


def quiet():
    """So quiet that all probabilities of a row are alike."""
    return small(ViTModel, initializer_range=1e-4)


def fed(kind):
    return IDS if kind in ("bert", "opt") else normal(2, 3, 16, 16)


# Clipped softmax


def test_neutral_clipping_is_softmax():
    x = 4 * normal(3, 5, 7)
    assert_close(clipped_softmax(x, 0.0, 1.0), x.softmax(-1), rtol=0, atol=1e-7)
    assert_close(clipped_softmax(x, 0.0, 1.0, dim=1), x.softmax(1), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("gamma", "zeta"), [(-0.03, 1.0), (0.0, 1.03), (-0.1, 1.2)])
def test_the_equation_as_loops(gamma, zeta):
    x = 3 * normal(4, 9, dtype=torch.float64)
    expected = []
    for row in x.tolist():
        total = sum(math.exp(v) for v in row)
        expected.append([min(1.0, max(0.0, (zeta - gamma) * math.exp(v) / total + gamma)) for v in row])
    assert_close(clipped_softmax(x, gamma, zeta), tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_what_is_cut_is_exactly_zero_or_one_and_learns_nothing():
    gamma, zeta = -0.05, 1.02
    x = tensor([4.0, 0.5, 0.0, -3.0, 9.0]).requires_grad_()
    p = x.detach().softmax(-1)
    low, high = p < -gamma / (zeta - gamma), p > (1 - gamma) / (zeta - gamma)
    assert low.tolist() == [True, True, True, True, False]
    assert high.tolist() == [False, False, False, False, True]
    out = clipped_softmax(x, gamma, zeta)
    assert (out[low] == 0).all()
    assert (out[high] == 1).all()
    for j in range(5):
        (gradient,) = torch.autograd.grad(clipped_softmax(x, gamma, zeta)[j], x)
        assert torch.equal(gradient, torch.zeros(5))
    inside = clipped_softmax(x, -0.001, 1.0)
    (gradient,) = torch.autograd.grad(inside[0], x)  # (zeta - gamma) times softmax's own
    own = 1.001 * p[0] * ((torch.arange(5) == 0).float() - p)
    assert_close(gradient, own)


@pytest.mark.parametrize("keys", [2, 16, 197])
def test_a_uniform_row_is_a_no_op_from_alpha_t_over_t_minus_1(keys):
    x, limit = torch.zeros(keys, dtype=torch.float64), keys / (keys - 1)
    for alpha in (0.5, 0.999 * limit, 1.001 * limit, 3.0):
        out = clipped_softmax(x, gamma_from_alpha(alpha, keys))
        expected = max(0.0, (1 + alpha / keys) / keys - alpha / keys)
        assert_close(out, torch.full_like(x, expected), rtol=1e-9, atol=1e-12)
        assert (out == 0).all() == (alpha >= limit) == starts_dead(-alpha / keys, 1.0, keys)


def test_rows_sum_to_at_most_one_and_hidden_keys_get_nothing():
    scores = normal(2, 3, 6, 6) + torch.full((6, 6), torch.finfo(torch.float32).min).triu(1)
    assert visible_keys(scores)[0, 0, :, 0].tolist() == [1, 2, 3, 4, 5, 6]
    for keys, visible in ((6, False), (None, True)):
        out = ClippedSoftmax(alpha=0.9, keys=keys, visible=visible)(scores)
        assert (out.triu(1) == 0).all()
        assert (out.sum(-1) <= 1 + 1e-6).all()
    rows = [clipped_softmax(scores[0, 0, i, : i + 1], -0.9 / (i + 1)) for i in range(6)]
    for i, row in enumerate(rows):  # each row as if its keys were all there are
        assert_close(out[0, 0, i, : i + 1], row)
    assert_close(out[0, 0, 0, 0], tensor(1.0))


def test_half_precision_is_computed_in_float32():
    x = (8 * normal(4, 50)).half()
    assert clipped_softmax(x, -0.01).dtype == torch.float32
    assert_close(clipped_softmax(x, -0.01), clipped_softmax(x.float(), -0.01))


def test_alpha_rises_between_two_passes_and_only_in_training(tmp_path):
    part = ClippedSoftmax(alpha=2.0, keys=4, alpha_warmup=(2, 6))
    scores, seen = torch.zeros(1, 1, 1, 4), []
    for _ in range(8):
        seen.append(float(part.gamma(scores)))
        part(scores)
    assert_close(seen, [-a / 4 for a in (0, 0, 0, 0.5, 1, 1.5, 2, 2)])
    part.eval()(scores)
    with torch.no_grad():
        part.train()(scores)
    assert part.passes == 8
    again = ClippedSoftmax(alpha=2.0, keys=4, alpha_warmup=(2, 6))
    again.load_state_dict(part.state_dict())
    assert_close(float(again.gamma(scores)), -0.5)


# Gates


@pytest.mark.parametrize("kind", GATES)
def test_gates_as_loops(kind):
    heads, width, tokens = 3, 8, 5
    gate = AttentionGate(heads, width, kind, pi_init=0.25, std=0.7, seed=3).double()
    x = normal(2, tokens, heads * width, dtype=torch.float64)
    gate.requires_grad_(False)
    if kind == "mlp":
        gate.inner_bias.data = normal(heads, 2, seed=1, dtype=torch.float64)
    expected = torch.zeros(2, heads, tokens, 1, dtype=torch.float64)
    for b in range(2):
        for h in range(heads):
            logits = []
            for t in range(tokens):
                own = x[b, t, h * width : (h + 1) * width]
                g = float(gate.bias[h])
                if kind in ("linear", "mean"):
                    g += sum(float(own[i] * gate.weight[h, i]) for i in range(width))
                if kind == "all_heads":
                    g += sum(float(x[b, t, i] * gate.weight[h, i]) for i in range(heads * width))
                if kind == "mlp":
                    for j in range(width // 4):
                        z = float(gate.inner_bias[h, j]) + sum(
                            float(own[i] * gate.inner[h, j, i]) for i in range(width)
                        )
                        g += max(0.0, z) * float(gate.weight[h, j])
                logits.append(g)
            if kind == "mean":
                logits = [sum(logits) / tokens] * tokens
            for t in range(tokens):
                expected[b, h, t, 0] = 1 / (1 + math.exp(-logits[t]))
    assert_close(gate(x), expected)
    counts = {"linear": 3 * 9, "mean": 3 * 9, "mlp": 3 * (8 * 2 + 2 + 2 + 1), "all_heads": 3 * 24 + 3, "constant": 3}
    assert sum(p.numel() for p in gate.parameters()) == counts[kind]


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("pi", [0.25, 0.5, 0.9])
def test_without_weights_the_gate_is_pi_and_with_rescaling_one(kind, pi):
    x = normal(2, 4, 24)
    assert_close(AttentionGate(3, 8, kind, pi, std=0.0)(x), torch.full((2, 3, 4, 1), pi))
    assert_close(AttentionGate(3, 8, kind, pi, True, std=0.0)(x), torch.ones(2, 3, 4, 1))


@pytest.mark.parametrize("kind", MODELS)
def test_a_gate_of_pi_multiplies_the_output_of_the_block_by_pi(kind):
    plain, gated = made(kind), make_quantizable(made(kind), "gated", pi_init=0.3, rescale=False, std=0.0)
    for model in (plain, gated):  # the output projection's bias is no part of what heads gather
        for module in model.modules():
            if hasattr(module, "out_proj") or hasattr(module, "o_proj"):
                getattr(module, "out_proj", getattr(module, "o_proj", None)).bias.data.zero_()
    seen = {}

    def keep(name):
        return lambda module, args, out: seen.__setitem__(name, out[0].detach())

    for name, model in (("plain", plain), ("gated", gated)):
        next(iter(attention_modules(model).values())).register_forward_hook(keep(name))
        model(fed(kind))
    assert_close(seen["gated"], 0.3 * seen["plain"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_each_head_has_its_own_gate(kind):
    gated, silenced = make_quantizable(made(kind), rescale=False, std=0.0, pi_init=0.999999), made(kind)
    for module in attention_modules(gated).values():
        module.head_gate.bias.data[0] = -50.0
    for module in attention_modules(silenced).values():
        value = module.v_proj if hasattr(module, "v_proj") else module.value
        value.weight.data[:8], value.bias.data[:8] = 0.0, 0.0
    expected = silenced(fed(kind)).last_hidden_state
    assert_close(gated(fed(kind)).last_hidden_state, expected, rtol=1e-3, atol=1e-3)


# In models


@pytest.mark.parametrize("kind", MODELS)
def test_what_changes_nothing(kind):
    before = made(kind)(fed(kind)).last_hidden_state
    for settings in (
        {"attention": "vanilla"},
        {"attention": "clipped", "gamma": 0.0},
        {"attention": "clipped", "alpha": 0.0, "keys": "visible"},
        {"gate": "mlp", "pi_init": 0.25, "std": 0.0},
    ):
        after = make_quantizable(made(kind), **settings)(fed(kind)).last_hidden_state
        assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_clipping_and_gates_reach_every_layer(kind):
    for settings, name in (({"attention": "clipped", "alpha": 0.9}, "clipping"), ({"std": 1.0}, "head_gate")):
        model = make_quantizable(made(kind), **settings)
        assert not torch.allclose(
            model(fed(kind)).last_hidden_state, made(kind)(fed(kind)).last_hidden_state, atol=1e-3
        )
        assert len([key for key, _ in model.named_modules() if key.endswith(name)]) == 2
        assert all(getattr(module, name) is not None for module in attention_modules(model).values())


def test_fine_tuning_starts_close_to_what_the_model_was():
    encoder = load("tiny")
    changed = QuantizableTransformer().apply(encoder)
    pixels = normal(4, 3, encoder.image_size, encoder.image_size)
    assert (changed.images(pixels).pooled * encoder.images(pixels).pooled).sum(-1).min() > 0.999
    gates = [value for name, value in changed.named_parameters() if name.endswith("head_gate.weight")]
    assert_close(torch.cat([gate.flatten() for gate in gates]).std(), tensor(0.01), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    "settings", [{"attention": "clipped", "alpha": 0.9, "keys": "visible"}, {"gate": "all_heads", "std": 1.0}]
)
def test_causal_models_stay_causal_and_padding_hidden(settings):
    model = make_quantizable(made("opt"), **settings)
    changed = IDS.clone()
    changed[:, 4] = 1
    before, after = model(IDS).last_hidden_state, model(changed).last_hidden_state
    assert_close(after[:, :4], before[:, :4], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after[:, 4:], before[:, 4:], atol=1e-3)
    model = make_quantizable(made("bert"), **settings)
    padded = torch.cat([IDS, torch.zeros(2, 3, dtype=torch.long)], 1)
    mask = (torch.arange(9) < 6).long().expand(2, 9)
    longer = model(padded, attention_mask=mask).last_hidden_state[:, :6]
    assert_close(longer, model(IDS).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_the_number_of_keys_follows_the_model():
    text = attention_modules(make_quantizable(made("bert"), "clipped", alpha=1.0))["encoder.layer.0.attention.self"]
    assert text.clipping.gamma(torch.zeros(1, 1, 6, 6)) == -1 / 16  # the longest text, whatever this one's length
    patches = attention_modules(make_quantizable(made("vit"), "clipped", alpha=1.0))["layers.0.attention"]
    assert patches.clipping.gamma(torch.zeros(1, 1, 10, 10)) == -1 / 10  # as many as there are, at any resolution
    told = attention_modules(make_quantizable(made("vit"), "clipped", alpha=1.0, keys=20))["layers.0.attention"]
    assert told.clipping.gamma(torch.zeros(1, 1, 10, 10)) == -1 / 20


def test_a_dead_start_is_refused_or_warmed_up_and_can_be_seen():
    with pytest.raises(ValueError, match=r"cuts uniform rows over 16 keys to nothing.*below 1.067.*alpha_warmup"):
        make_quantizable(made("bert"), "clipped", alpha=3.2)
    with pytest.raises(ValueError, match="over 5 keys"):
        make_quantizable(made("vit"), "clipped", gamma=-0.3)
    dead = make_quantizable(quiet().train(), "clipped", alpha=3.0, allow_dead_start=True)
    assert outlier_metrics(dead, [normal(2, 3, 16, 16)]).zero_rows == 1
    dead(normal(2, 3, 16, 16)).last_hidden_state.square().sum().backward()
    assert all((p.grad == 0).all() for name, p in dead.named_parameters() if "q_proj" in name or "v_proj" in name)
    warmed = make_quantizable(quiet().train(), "clipped", alpha=3.0, alpha_warmup=(2, 4))
    warmed(normal(2, 3, 16, 16)).last_hidden_state.square().sum().backward()
    assert any((p.grad != 0).any() for name, p in warmed.named_parameters() if "v_proj" in name)
    assert outlier_metrics(warmed, [normal(2, 3, 16, 16)]).zero_rows == 0
    for _ in range(4):
        warmed(normal(2, 3, 16, 16))
    assert outlier_metrics(warmed, [normal(2, 3, 16, 16)]).zero_rows == 1


def test_copies_have_gates_of_their_own_and_keep_no_input():
    model = make_quantizable(made("vit"), std=1.0)
    x = fed("vit")
    before = model(x).last_hidden_state.detach()
    other = copy.deepcopy(model)
    for module in attention_modules(other).values():
        assert module.head_gate.seen is None
        module.head_gate.bias.data.fill_(-50.0)
    assert not torch.allclose(other(x).last_hidden_state, before, atol=1e-2)
    assert_close(model(x).last_hidden_state, before)


def test_parameters_are_saved_with_a_plain_model():
    model = make_quantizable(made("opt"), gate="all_heads", std=1.0, seed=1)
    other = make_quantizable(made("opt"), gate="all_heads", std=1.0, seed=2)
    assert not torch.allclose(other(IDS).last_hidden_state, model(IDS).last_hidden_state, atol=1e-3)
    state = model.state_dict()
    assert "decoder.layers.0.self_attn.head_gate.weight" in state
    other.load_state_dict(state)
    assert_close(other(IDS).last_hidden_state, model(IDS).last_hidden_state)
    layers = list(attention_modules(model).values())
    assert not torch.equal(layers[0].head_gate.weight, layers[1].head_gate.weight)


# In encoders


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_are_trained_saved_and_opened(family, tmp_path):
    encoder = FAMILIES[family]()
    changed = QuantizableTransformer(gate="mlp").apply(encoder)
    done = Train(InfoNCE(), steps=3, batch_size=6, lr=1e-2).apply(changed, tiny_records())
    before, after = changed.state_dict(), done.state_dict()
    gates = [name for name in after if "head_gate" in name]
    assert len(gates) == 4 * 6  # weight, bias and two more in three layers of two towers
    moved = [name for name in gates if not torch.equal(before[name], after[name])]
    assert {name.rpartition(".")[2] for name in moved} == {"weight", "bias", "inner", "inner_bias"}
    done.save_pretrained(tmp_path / "model")
    opened = load(tmp_path / "model")
    for name in gates:
        assert torch.equal(opened.state_dict()[name], after[name])
    pixels = normal(2, 3, 32, 32)
    assert_close(opened.images(pixels).pooled, done.images(pixels).pooled)
    assert_close(opened.texts(encoder.tokenize(["a cat"])).pooled, done.texts(encoder.tokenize(["a cat"])).pooled)
    assert [step["step"] for step in opened.history] == ["quantizable_transformers", "train"]


def test_the_warm_up_goes_on_where_it_was_saved(tmp_path):
    step = QuantizableTransformer("clipped", alpha=2.0, keys="visible", alpha_warmup=(1, 5))
    encoder = step.apply(FAMILIES["clip"]())
    done = Train(InfoNCE(), steps=3, batch_size=6, lr=1e-3).apply(encoder, tiny_records())
    done.save_pretrained(tmp_path / "model")
    opened = load(tmp_path / "model")
    for model in (done, opened):
        parts = [module for module in model.modules() if isinstance(module, ClippedSoftmax)]
        assert len(parts) == 6
        assert all(part.passes == 3 and part.alpha_warmup == (1, 5) for part in parts)
        assert_close(float(parts[0].gamma(torch.zeros(1, 1, 1, 10))), -0.1)  # alpha is at half its height
    assert_close(opened.images(normal(1, 3, 32, 32)).pooled, done.images(normal(1, 3, 32, 32)).pooled)


def test_one_tower_only():
    encoder = FAMILIES["siglip"]()
    changed = QuantizableTransformer(towers=("text",), std=1.0).apply(encoder)
    pixels = normal(1, 3, 32, 32)
    assert_close(changed.images(pixels).pooled, encoder.images(pixels).pooled)
    assert all("text_model" in name for name in changed.state_dict() if "head_gate" in name)


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "relu"}, "choose gated, clipped, vanilla"),
        ({"gate": "conv"}, "choose linear, mlp"),
        ({"pi_init": 1.0}, "pi_init=1.0"),
        ({"attention": "clipped"}, "either alpha"),
        ({"attention": "clipped", "alpha": 1.0, "gamma": -0.1}, "either alpha"),
        ({"attention": "clipped", "gamma": 0.1}, "gamma <= 0"),
        ({"attention": "clipped", "gamma": 0.0, "zeta": 0.9}, "zeta >= 1"),
        ({"attention": "clipped", "alpha": 0.5, "keys": "all"}, "keys='all'"),
        ({"attention": "clipped", "alpha": 0.5, "alpha_warmup": (5, 5)}, "begin < end"),
        ({"towers": "text"}, "choose from image, text"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        QuantizableTransformer(**settings)


def test_what_was_changed_before_is_refused():
    model = make_quantizable(made("vit"))
    with pytest.raises(ValueError, match="made quantizable before"):
        make_quantizable(model, "clipped", alpha=0.5)
    with pytest.raises(ValueError, match="Linear has no attention"):
        make_quantizable(torch.nn.Linear(2, 2))
