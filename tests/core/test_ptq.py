"""Simulated 8-bit models: which points are rounded, by a layer computed by hand, and what stays in float."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm
from torch.overrides import _get_current_function_mode_stack
from torch.testing import assert_close
from transformers.models.bert.modeling_bert import BertForMaskedLM
from transformers.models.opt.modeling_opt import OPTForCausalLM
from transformers.models.vit.modeling_vit import ViTForImageClassification

from ecliptic.core.attention import register, register_attention, use
from ecliptic.core.ptq import grids, ptq
from ecliptic.ops.quantize import fake_quantize, percentile, symmetric
from tests.models import IDS, normal, small
from tests.towers import FAMILIES


def vit():
    return small(ViTForImageClassification, initializer_range=0.2)


def bert():
    return small(BertForMaskedLM, initializer_range=0.2)


def opt():
    return small(OPTForCausalLM, init_std=0.2)


def pictures(count=4, seed=0):
    return normal(count, 3, 16, 16, seed=seed)


@torch.no_grad()
def test_a_vit_computed_by_hand_with_every_point_rounded():
    model, x = vit(), pictures()
    quantised = ptq(model, [x, pictures(seed=1)])
    grid = grids(quantised)

    def at(point, value):
        return fake_quantize(value, grid.pop(point))

    def linear(name, layer, value):
        weight = fake_quantize(layer.weight, symmetric(layer.weight.abs().max()))
        return at(f"{name}.rounding", value @ weight.T + layer.bias)

    def norm(name, layer, value):
        return at(f"{name}.rounding", layer_norm(value, (24,), layer.weight, layer.bias, layer.eps))

    def heads(value):
        return value.view(4, 5, 3, 8).transpose(1, 2)

    embed = model.vit.embeddings
    projection = embed.patch_embeddings.projection
    kernel = fake_quantize(projection.weight, symmetric(projection.weight.abs().max()))
    patches = torch.nn.functional.conv2d(x, kernel, projection.bias, stride=8)
    patches = at("vit.embeddings.patch_embeddings.projection.rounding", patches).flatten(2).transpose(1, 2)
    hidden = torch.cat([embed.cls_token.expand(4, -1, -1), patches], 1) + embed.position_embeddings
    hidden = at("vit.embeddings.rounded_sums.0", hidden)
    for i, block in enumerate(model.vit.layers):
        name, attention = f"vit.layers.{i}", block.attention
        normed = norm(f"{name}.layernorm_before", block.layernorm_before, hidden)
        q, k, v = (
            heads(linear(f"{name}.attention.{part}", getattr(attention, part), normed))
            for part in ("q_proj", "k_proj", "v_proj")
        )
        scores = at(f"{name}.attention.roundings.scores", q @ k.transpose(2, 3) / 8**0.5)
        weights = at(f"{name}.attention.roundings.probabilities", scores.softmax(-1))
        context = at(f"{name}.attention.roundings.context", weights @ v).transpose(1, 2).reshape(4, 5, 24)
        hidden = at(f"{name}.rounded_sums.0", linear(f"{name}.attention.o_proj", attention.o_proj, context) + hidden)
        normed = norm(f"{name}.layernorm_after", block.layernorm_after, hidden)
        wide = at(f"{name}.mlp.activation_fn.rounding", gelu(linear(f"{name}.mlp.fc1", block.mlp.fc1, normed)))
        hidden = at(f"{name}.rounded_sums.1", linear(f"{name}.mlp.fc2", block.mlp.fc2, wide) + hidden)
    last = norm("vit.layernorm", model.vit.layernorm, hidden)
    expected = model.classifier(last[:, 0])  # the head stays in float
    assert_close(quantised(x).logits, expected, rtol=1e-4, atol=1e-5)
    assert not grid  # and there is no point besides
    assert (quantised(x).logits - model(x).logits).abs().max() > 1e-4


@pytest.mark.parametrize(("build", "x"), [(bert, IDS), (opt, IDS), (vit, pictures())])
def test_eight_bits_are_close_sixteen_closer_and_none_the_same(build, x):
    model = build()
    before = copy.deepcopy(model.state_dict())
    truth = model(x).logits.detach()

    def error(**settings):
        return float((ptq(model, [x], **settings)(x).logits.detach() - truth).abs().mean() / truth.abs().mean())

    assert error(w_bits=None, a_bits=None) == 0
    assert 1e-4 < error() < 0.2
    assert error(w_bits=16, a_bits=16) < 0.01 * error()
    assert error(w_bits=None) < error() * 1.5
    assert error(w_bits=4, a_bits=4) > 3 * error()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x).logits, truth)
    assert not any(module._forward_hooks for module in model.modules())


def test_points_of_post_norm_and_causal_models():
    found = grids(ptq(bert(), [IDS]))
    layer = "bert.encoder.layer.1"
    assert {name.removeprefix(layer + ".") for name in found if name.startswith(layer)} == {
        *(f"attention.self.{part}.rounding" for part in ("query", "key", "value")),
        *(f"attention.self.roundings.{part}" for part in ("scores", "probabilities", "context")),
        *("attention.output.dense.rounding", "attention.output.rounded_sums.0", "attention.output.LayerNorm.rounding"),
        *("intermediate.dense.rounding", "intermediate.intermediate_act_fn.rounding"),
        *("output.dense.rounding", "output.rounded_sums.0", "output.LayerNorm.rounding"),
    }
    found = grids(ptq(opt(), [IDS]))
    layer = "model.decoder.layers.1"
    assert {name.removeprefix(layer + ".") for name in found if name.startswith(layer)} == {
        *(f"self_attn.{part}.rounding" for part in ("q_proj", "k_proj", "v_proj", "out_proj")),
        *(f"self_attn.roundings.{part}" for part in ("scores", "probabilities", "context")),
        *("rounded_sums.0", "rounded_sums.1", "self_attn_layer_norm.rounding", "final_layer_norm.rounding"),
        *("fc1.rounding", "activation_fn.rounding", "fc2.rounding"),
    }
    assert all(grid.low == 0 and grid.high == 255 and grid.scale.ndim == 0 for grid in found.values())


def test_scores_are_rounded_before_the_mask():
    model = opt()
    grid = grids(ptq(model, [IDS]))["model.decoder.layers.0.self_attn.roundings.scores"]
    assert grid.scale < 1  # with the mask's lowest numbers in it, the step would be 1e36


def test_a_head_tied_to_the_embedding_stays_in_float():
    model = opt()
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    quantised = ptq(model, [IDS])
    assert torch.equal(quantised.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(quantised.model.decoder.embed_tokens.weight, model.lm_head.weight)
    assert not any(name.startswith("lm_head") for name in grids(quantised))


def test_what_is_skipped_stays_with_all_that_is_inside():
    quantised = ptq(vit(), [pictures()], skip=(r"layers\.1$", "classifier"))
    assert not [name for name in grids(quantised) if "layers.1" in name]
    assert torch.equal(quantised.vit.layers[1].mlp.fc1.weight, vit().vit.layers[1].mlp.fc1.weight)
    assert "classifier.rounding" in grids(ptq(vit(), [pictures()], skip=()))


def test_modules_that_say_so_stay_in_float():
    model = vit()
    model.vit.layers[0].mlp.full_precision = True
    assert not [name for name in grids(ptq(model, [pictures()])) if "layers.0.mlp" in name]


def test_the_range_is_the_estimates_running_mean():
    model, batches = vit(), [pictures(seed=i) for i in range(3)]
    low = high = None
    for batch in batches:
        out = model.vit.embeddings.patch_embeddings.projection(batch)
        low = out.min() if low is None else 0.9 * low + 0.1 * out.min()
        high = out.max() if high is None else 0.9 * high + 0.1 * out.max()
    name = "vit.embeddings.patch_embeddings.projection.rounding"
    assert_close(grids(ptq(model, batches, w_bits=None))[name].scale, ((high - low) / 255).detach())
    narrow = grids(ptq(model, batches, w_bits=None, estimate=partial(percentile, percent=90)))[name]
    assert narrow.scale < 0.8 * (high - low) / 255


def test_attention_of_ones_own_is_rounded_too():
    def hard(_module, scores):
        return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores)

    model = vit()
    use(model, register("hard-for-ptq", hard))
    quantised = ptq(model, [pictures()])
    assert_close(grids(quantised)["vit.layers.0.attention.roundings.probabilities"].scale, torch.tensor(1 / 255))


def test_attention_that_shows_nothing_is_refused():
    def attend(module, query, key, value, mask, **_):
        return value.transpose(1, 2).contiguous(), None

    model = vit()
    use(model, register_attention("opaque-for-ptq", attend))
    with pytest.raises(ValueError, match=r"vit\.layers\.0\.attention does not show its scores"):
        ptq(model, [pictures()])
    with pytest.raises(ValueError, match="holds no batches"):
        ptq(vit(), [])
    with pytest.raises(ValueError, match="no attention"):
        ptq(nn.Linear(2, 2), [torch.zeros(1, 2)])


@pytest.mark.parametrize("family", FAMILIES)
def test_encoders(family):
    encoder = FAMILIES[family]()
    pixels, tokens = normal(3, 3, 32, 32), encoder.tokenize(["a cat", "a small dog", "one"])
    quantised = ptq(encoder, [(pixels, tokens)])
    for ours, truth in (
        (quantised.images(pixels), encoder.images(pixels)),
        (quantised.texts(tokens), encoder.texts(tokens)),
    ):
        assert not torch.equal(ours.pooled, truth.pooled)
        assert (ours.pooled * truth.pooled).sum(-1).min() > 0.97
    assert encoder.anatomy.image.module.config._attn_implementation == "sdpa"
    half = ptq(encoder, [pixels])
    with pytest.raises(ValueError, match="no calibration batch came by here"):
        half.texts(tokens)
    assert not _get_current_function_mode_stack()  # even though the call broke off in the middle
    assert_close(half.images(pixels).pooled, quantised.images(pixels).pooled)


def test_a_copy_stands_on_its_own():
    quantised = ptq(vit(), [pictures()])
    before = quantised(pictures()).logits
    other = copy.deepcopy(quantised)
    assert torch.equal(other(pictures()).logits, before)
    for module in other.modules():
        if getattr(module, "scale", None) is not None:
            module.scale *= 30
    assert not torch.allclose(other(pictures()).logits, before, atol=1e-2)
    assert torch.equal(quantised(pictures()).logits, before)
