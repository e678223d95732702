"""Outliers and idle heads: kurtosis and norms by hand and as loops, the modules of the paper, and what is left behind."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch import nn, tensor
from torch.testing import assert_close
from transformers.models.bert.modeling_bert import BertModel
from transformers.models.opt.modeling_opt import OPTModel
from transformers.models.vit.modeling_vit import ViTModel

from ecliptic.core.attention import attention_modules, register, use
from ecliptic.core.outliers import figure, inf_norm, kurtosis, outlier_metrics, watched
from tests.models import IDS, normal, small
from tests.towers import FAMILIES


def vit():
    return small(ViTModel, initializer_range=0.3)


def bert():
    return small(BertModel)


def opt():
    return small(OPTModel)


def loops(x):
    """The definition, in Python numbers."""
    n, mean = len(x), sum(x) / len(x)
    std = (sum((v - mean) ** 2 for v in x) / (n - 1)) ** 0.5
    return sum((v - mean) ** 4 for v in x) / n / (std**4 + 1e-6)


def test_kurtosis_of_what_is_known():
    assert_close(kurtosis(normal(1, 100_000)), tensor([3.0]), rtol=0, atol=0.1)
    spike = torch.zeros(1, 5000)
    spike[0, 7] = 1000.0
    assert_close(kurtosis(spike), tensor([5000.0]), rtol=0.01, atol=0)
    x = normal(3, 4, 5) ** 3
    assert_close(kurtosis(x), tensor([loops(row.flatten().tolist()) for row in x]), rtol=1e-4, atol=1e-4)
    assert_close(inf_norm(tensor([[[1.0, -7.0]], [[0.5, 2.0]]])), tensor([7.0, 2.0]))


def test_samples_are_averaged_then_modules():
    model, batches = vit(), [normal(2, 3, 16, 16), normal(1, 3, 16, 16, seed=1)]
    found = outlier_metrics(model, batches)
    outputs = {}
    for name in found.per_module:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, name=name: outputs.setdefault(name, []).append(
                out[0] if isinstance(out, tuple) else out
            )
        )
    for batch in batches:
        model(batch)
    for name, told in found.per_module.items():
        samples = [sample.detach().flatten().tolist() for out in outputs[name] for sample in out]
        assert len(samples) == 3
        assert_close(told["inf_norm"], sum(max(map(abs, s)) for s in samples) / 3, rtol=1e-5, atol=0)
        assert_close(told["kurtosis"], sum(map(loops, samples)) / 3, rtol=1e-3, atol=0)
    told = list(found.per_module.values())
    assert found.max_inf_norm == max(value["inf_norm"] for value in told)
    assert_close(found.avg_kurtosis, sum(value["kurtosis"] for value in told) / len(told))
    assert found.max_kurtosis == max(value["kurtosis"] for value in told)


def test_the_modules_of_the_paper():
    layer = [f"encoder.layer.{i}.output" for i in range(2)]
    assert set(watched(bert())) == {
        f"{name}.{part}" for name in layer for part in ("dense", "LayerNorm", "LayerNorm.input")
    }
    layers = [f"decoder.layers.{i}" for i in range(2)]
    parts = ("", ".fc2", ".self_attn.out_proj", ".self_attn_layer_norm", ".final_layer_norm")
    assert set(watched(opt())) == {name + part for name in layers for part in parts} | {"decoder.final_layer_norm"}
    with pytest.raises(ValueError, match="which modules to watch"):
        watched(nn.Linear(2, 2))


def test_what_goes_into_a_post_norm_counts_for_the_norm_alone():
    model = bert()
    model.encoder.layer[1].output.dense.bias.data[3] = 500.0
    found = outlier_metrics(model, [IDS])
    inside = found.per_module["encoder.layer.1.output.LayerNorm.input"]
    assert found.max_inf_norm >= inside["inf_norm"] > 490
    assert "kurtosis" not in inside
    assert found.avg_kurtosis > 2 * outlier_metrics(bert(), [IDS]).avg_kurtosis


def test_layers_that_get_tokens_and_samples_joined():
    model = opt()
    found = outlier_metrics(model, [IDS])
    seen = []
    model.decoder.layers[1].fc2.register_forward_hook(lambda _m, _a, out: seen.append(out.detach()))
    model(IDS)
    assert seen[0].shape == (12, 24)
    expected = seen[0].view(2, -1).abs().amax(1).mean()
    assert_close(found.per_module["decoder.layers.1.fc2"]["inf_norm"], float(expected))


def test_heads_that_look_at_empty_keys_are_idle():
    model, x = vit(), normal(2, 3, 16, 16)

    def first_key(_module, scores):  # heads 0 and 1 look at the class token, head 2 at all alike
        weights = torch.full_like(scores, 1 / scores.shape[-1])
        weights[:, :2] = torch.eye(scores.shape[-1])[0]
        return weights

    use(model, register("first-key-for-tests", first_key))
    for block in model.layers:
        block.layernorm_before.register_forward_hook(lambda _m, _a, out: out.index_fill(1, tensor([0]), 0.0))
        block.attention.v_proj.bias.data.zero_()
        block.attention.v_proj.weight.data[16:] *= 1e-3  # head 2 is measured by its own values
    for heads in outlier_metrics(model, [x]).heads.values():
        assert_close(heads.on_empty, tensor([1.0, 1.0, 0.2]))
        assert_close(heads.idle, tensor([1.0, 1.0, 0.2]))
        assert_close(heads.received, tensor([5 * (2 + 0.2) / 3, *[5 * 0.2 / 3] * 4]))
        assert heads.value[0] == 0
        assert_close(heads.value.mean(), tensor(1.0))
        assert heads.gate is None
        assert (heads.zero_rows == 0).all()


def test_gates_and_empty_rows_make_idle():
    model, x = vit(), normal(2, 3, 16, 16)

    class Half(nn.Module):
        def forward(self, context):
            return torch.full((*context.shape[:-1], 1), 0.25)

    def nothing_for_head_0(_module, scores):
        weights = scores.softmax(-1).clone()
        weights[:, 0, 2:] = 0
        return weights

    name = register("half-for-tests", nothing_for_head_0, lambda module, context: context * module.head_gate(context))
    use(model, name)
    for module in attention_modules(model).values():
        module.head_gate = Half()
    found = outlier_metrics(model, [x])
    for heads in found.heads.values():
        assert_close(heads.zero_rows, tensor([0.6, 0.0, 0.0]))
        assert_close(heads.gate, tensor([0.25] * 3))
        assert_close(heads.token_gate, tensor([0.25] * 5))
        carried = 1 - heads.zero_rows - heads.on_empty
        assert_close(heads.idle, 1 - 0.25 * carried)
    assert_close(found.zero_rows, 0.2)


def test_texts_of_several_lengths():
    found = outlier_metrics(bert(), [IDS, IDS[:, :4]])
    for heads in found.heads.values():
        assert heads.received.shape == (6,)
        assert_close(heads.received[:4].mean(), tensor(1.0), rtol=0.3, atol=0)


def test_the_model_is_left_as_it_was():
    model = vit().train()
    before = model(normal(2, 3, 16, 16)).last_hidden_state
    outlier_metrics(model, [normal(2, 3, 16, 16)])
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(hasattr(module, "attention_tap") for module in model.modules())
    assert torch.equal(model(normal(2, 3, 16, 16)).last_hidden_state, before)
    with pytest.raises(ValueError, match="no batches"):
        outlier_metrics(model, [])


def test_modules_of_ones_own_choice_and_encoders():
    encoder = FAMILIES["clip"]()
    name = "model.vision_model.encoder.layers.0.mlp.fc1"
    found = outlier_metrics(encoder, [normal(2, 3, 32, 32)], [name])
    assert list(found.per_module) == [name]
    assert len(found.heads) == 3  # of the image tower, the text tower not being asked
    both = outlier_metrics(encoder, [(normal(2, 3, 32, 32), encoder.tokenize(["a cat", "two"]))])
    assert len(both.heads) == 6
    assert any("text_model" in name for name in both.per_module)


def test_the_figure_holds_every_module_and_head(tmp_path):
    found = outlier_metrics(vit(), [normal(2, 3, 16, 16)])
    root = ElementTree.parse(found.save_svg(tmp_path / "a.svg")).getroot()
    assert figure(found) == (tmp_path / "a.svg").read_text()
    titles = [node.text for node in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == len(found.per_module) + 2 * 3
    heights = [float(r.get("height")) for r in root.iter("{http://www.w3.org/2000/svg}rect") if r.get("width") == "7"]
    norms = [value["inf_norm"] for value in found.per_module.values()]
    assert heights.index(max(heights)) == norms.index(max(norms))
