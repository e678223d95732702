"""The joined picture tower and the mean-pooled text tower, tiny and random, against slow loops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize, relu6
from torch.testing import assert_close
from transformers import VisionTextDualEncoderConfig, VisionTextDualEncoderModel

from ecliptic.core.towers import (
    EfficientNetLite0,
    JoinedVisionConfig,
    JoinedVisionModel,
    MeanPooledTextConfig,
    MeanPooledTextModel,
    SameConv,
    resample,
)

VIT = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 56, "patch_size": 14}
BERT = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 50}


def vision_config() -> JoinedVisionConfig:
    return JoinedVisionConfig(
        backbone_config=dict(VIT),
        affinity_layer=2,
        looks=8,
        num_classes=10,
        name_size=12,
        named_classes=3,
        image_size=56,
    )


def text_config() -> MeanPooledTextConfig:
    return MeanPooledTextConfig(backbone_config=dict(BERT), memory=7, num_classes=10, looks=8)


@pytest.fixture(scope="module")
def dual() -> VisionTextDualEncoderModel:
    torch.manual_seed(0)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision_config(), text_config(), projection_dim=16)
    model = VisionTextDualEncoderModel(config).eval()
    for module in model.vision_model.cnn.modules():  # the usual small start would let the signal die in 50 layers
        if isinstance(module, SameConv):
            torch.nn.init.kaiming_normal_(module.weight)
    for head in (model.vision_model.describe, model.text_model.describe):
        for weight in head.parameters():
            torch.nn.init.normal_(weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def vision(dual: VisionTextDualEncoderModel) -> JoinedVisionModel:
    return dual.vision_model


@pytest.fixture(scope="module")
def text(dual: VisionTextDualEncoderModel) -> MeanPooledTextModel:
    return dual.text_model


def pixels(height: int = 56, width: int = 56, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("size", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (8, 5, 1), (9, 5, 2), (6, 1, 1)])
def test_same_convolution_pads_like_tensorflow(size: int, kernel: int, stride: int):
    torch.manual_seed(0)
    conv = SameConv(1, 1, kernel, stride)
    x = torch.randn(1, 1, size, size)
    count = -(-size // stride)
    before = max((count - 1) * stride + kernel - size, 0) // 2  # the odd pixel goes to the far side
    expected = torch.zeros(count, count)
    for r in range(count):
        for c in range(count):
            total = conv.bias.detach()[0].clone()
            for i in range(kernel):
                for j in range(kernel):
                    y, z = r * stride + i - before, c * stride + j - before
                    if 0 <= y < size and 0 <= z < size:
                        total += conv.weight.detach()[0, 0, i, j] * x[0, 0, y, z]
            expected[r, c] = total
    assert_close(conv(x)[0, 0].detach(), expected, rtol=0, atol=1e-5)


def test_the_cnn_covers_pictures_of_any_size():
    cnn = EfficientNetLite0().eval()
    with torch.inference_mode():
        assert cnn(pixels(64, 97, 1)).shape == (1, 1280, 2, 4)
        assert 0 <= float(cnn(pixels(64, 64, 1)).min()) <= float(cnn(pixels(64, 64, 1)).max()) <= 6


def test_picture_description_by_hand(vision: JoinedVisionModel):
    describe, config = vision.describe, vision.config
    features = torch.rand(1280, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        looks = torch.stack([(describe.looks.weight[i] * (features + 1e-6).sqrt()).sum() for i in range(8)])
        looks = looks + describe.looks.bias
        looks = looks / looks.norm()
        scores = [
            float((describe.classify.weight[c] * features).sum() + describe.classify.bias[c]) / 2.0 for c in range(10)
        ]
        total = sum(torch.tensor(s).exp() for s in scores)
        chance = torch.stack([torch.tensor(s).exp() / total for s in scores])
        best = sorted(range(10), key=lambda c: -scores[c])[: config.named_classes]
        names = sum(chance[c] * describe.names.weight[:, c] for c in best)
        rooted = chance.sqrt() - describe.class_centre
        expected = torch.cat([looks, rooted / rooted.norm(), 0.5 * names / names.norm()])
        assert_close(describe(features), expected, rtol=1e-4, atol=1e-5)


def test_a_description_is_three_unit_vectors(vision: JoinedVisionModel, text: MeanPooledTextModel):
    with torch.inference_mode():
        rows = vision(pixels()).pooler_output, text.describe(torch.randn(2, 12))
    for row in rows:
        looks, classes, names = row.split([8, 10, 12], dim=-1)
        for part, size in ((looks, 1.0), (classes, 1.0), (names, 0.5)):
            assert_close(part.norm(dim=-1), torch.full((2,), size), rtol=1e-4, atol=1e-4)


def test_sentence_description_by_hand(text: MeanPooledTextModel):
    describe = text.describe
    sentence = torch.randn(12, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        u = sentence / sentence.norm()
        near = torch.stack([(describe.memory_keys.weight[j] * u).sum() / 0.05 for j in range(7)]).exp()
        looks = sum(near[j] / near.sum() * describe.memory_values.weight[:, j] for j in range(7))
        classes = torch.stack([(describe.class_keys.weight[c] * u).sum() / 0.03 for c in range(10)]).exp()
        rooted = (classes / classes.sum()).sqrt() - describe.class_centre
        expected = torch.cat([looks / looks.norm(), rooted / rooted.norm(), 0.5 * u])
        assert_close(describe(sentence), expected, rtol=1e-4, atol=1e-5)


def test_a_caption_found_in_memory_brings_back_its_looks(text: MeanPooledTextModel):
    keys = normalize(torch.randn(7, 12, generator=torch.Generator().manual_seed(4)), dim=-1)
    values = normalize(torch.randn(7, 8, generator=torch.Generator().manual_seed(5)), dim=-1)
    before = {name: value.clone() for name, value in text.describe.state_dict().items()}
    try:
        with torch.no_grad():
            text.describe.memory_keys.weight.copy_(keys * 40)  # so sharp that only the caption itself counts
            text.describe.memory_values.weight.copy_(values.T)
            assert_close(text.describe(keys)[:, :8], values, rtol=1e-3, atol=1e-3)
    finally:
        text.describe.load_state_dict(before)


def test_patches_without_affinity_are_the_resampled_cnn(vision: JoinedVisionModel):
    x = pixels()
    with torch.inference_mode():
        out = vision(x)
        maps = vision.cnn(vision._for_cnn(x))
        states = vision.backbone(x, output_hidden_states=True).hidden_states
        alike = normalize(states[2][:, 1:], dim=-1)
        local = resample(maps, (4, 4), 14, 32).flatten(2).transpose(1, 2)
        for b in range(2):
            for n in range(16):
                near = torch.stack([(alike[b, n] * alike[b, m]).sum() / 0.1 for m in range(16)]).exp()
                mean = sum(near[m] / near.sum() * local[b, m] for m in range(16))
                assert_close(out.last_hidden_state[b, 1 + n], vision.describe(mean), rtol=1e-4, atol=1e-4)
        assert_close(out.last_hidden_state[:, 0], out.pooler_output)


def test_resampling_keeps_places():
    # A ramp over x in pixels: cell centres at 16, 48, 80; patches of 14 at 7, 21, ... read the ramp where they stand.
    ramp = torch.tensor([16.0, 48.0, 80.0]).expand(1, 1, 3, 3)
    found = resample(ramp, (6, 6), 14, 32)[0, 0]
    centres = torch.arange(6) * 14 + 7.0
    assert_close(found[0], centres.clamp(16, 80), rtol=0, atol=1e-4)
    assert_close(resample(ramp.transpose(2, 3), (6, 6), 14, 32)[0, 0], found.T)
    same = torch.randn(1, 3, 7, 7)  # 224 pixels: both grids cover the picture exactly, so this is plain interpolation
    assert_close(resample(same, (16, 16), 14, 32), interpolate(same, size=(16, 16), mode="bilinear"), rtol=0, atol=1e-5)


def test_any_size_of_whole_patches(vision: JoinedVisionModel):
    with torch.inference_mode():
        assert vision(pixels(70, 98)).last_hidden_state.shape == (2, 1 + 5 * 7, 30)


def test_without_patches_the_pooled_vector_is_the_same(vision: JoinedVisionModel):
    with torch.inference_mode():
        full, quick = vision(pixels()), vision(pixels(), patches=False)
    assert quick.last_hidden_state.shape == (2, 1, 30)
    assert torch.equal(full.pooler_output, quick.pooler_output)


def test_hidden_states_are_the_backbones(vision: JoinedVisionModel, text: MeanPooledTextModel):
    with torch.inference_mode():
        assert vision(pixels()).hidden_states is None
        states = vision(pixels(), output_hidden_states=True).hidden_states
        assert len(states) == 4
        assert states[-1].shape == (2, 17, 24)
        words = text(input_ids=torch.tensor([[1, 2, 3]]), output_hidden_states=True)
        assert len(words.hidden_states) == 3
        assert words.hidden_states[-1].shape == (1, 3, 12)
        assert len(text(input_ids=torch.tensor([[1, 2]]), return_dict=False)) == 2


def test_padding_changes_nothing(text: MeanPooledTextModel):
    with torch.inference_mode():
        short = text(input_ids=torch.tensor([[5, 6, 7]])).pooler_output
        ids, mask = torch.tensor([[5, 6, 7, 9, 9]]), torch.tensor([[1, 1, 1, 0, 0]])
        assert_close(text(input_ids=ids, attention_mask=mask).pooler_output, short, rtol=1e-4, atol=1e-5)
        assert (text(input_ids=ids).pooler_output - short).abs().max() > 1e-3


def test_embeddings_instead_of_ids(text: MeanPooledTextModel):
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        words = text.get_input_embeddings()(ids)
        assert_close(text(inputs_embeds=words).pooler_output, text(input_ids=ids).pooler_output)


def test_pictures_do_not_depend_on_their_batch_or_on_training_mode(vision: JoinedVisionModel):
    x = pixels(count=3)
    with torch.inference_mode():
        alone, together = vision(x[1:2]).last_hidden_state, vision(x).last_hidden_state[1:2]
        assert_close(alone, together, rtol=1e-4, atol=1e-4)
        vision.train()
        assert_close(vision(x).pooler_output, vision.eval()(x).pooler_output)


def test_gradients_reach_every_weight_and_stay_finite(dual: VisionTextDualEncoderModel):
    dual.zero_grad()
    batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    tokens = dual.visual_projection(dual.vision_model(torch.zeros(2, 3, 56, 56) + pixels()).last_hidden_state)
    (dual(**batch, pixel_values=pixels(), return_loss=True).loss + tokens.square().mean()).backward()
    idle = {name for name, p in dual.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    # the ViT serves by one block's affinities: what comes after that block, and its mask token, have no say
    allowed = (
        "vision_model.backbone.encoder.layer.2",
        "vision_model.backbone.layernorm",
        "vision_model.backbone.embeddings.mask",
    )
    assert not {name for name in idle if not name.startswith(allowed)}
    dual.zero_grad(set_to_none=True)


def test_round_trip_through_transformers(dual: VisionTextDualEncoderModel, tmp_path: Path):
    dual.save_pretrained(tmp_path)
    again = VisionTextDualEncoderModel.from_pretrained(tmp_path).eval()
    assert isinstance(again.vision_model, JoinedVisionModel)
    assert isinstance(again.text_model, MeanPooledTextModel)
    assert again.config.vision_config.weights == (1.0, 1.0, 0.5)
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "pixel_values": pixels()}
    with torch.inference_mode():
        logits = dual(**batch).logits_per_image
        assert_close(again(**batch).logits_per_image, logits, rtol=1e-5, atol=1e-5)
        assert abs(float(logits[0] - logits[1])) > 1e-3  # the two pictures do differ


def test_relu6_is_what_the_blocks_use():
    cnn = EfficientNetLite0().eval()
    with torch.inference_mode():
        x = pixels(32, 32, 1)
        block = cnn.blocks[1]
        y = relu6(cnn.stem(x))
        y = cnn.blocks[0](y)
        slow = block.project(relu6(block.depthwise(relu6(block.expand(y)))))
        assert_close(block(y), slow)
        assert not block.residual
        assert cnn.blocks[2].residual
