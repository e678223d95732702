"""Attention by name: the mask comes along, gradients and grouped heads work, and what cannot be switched says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import BertModel, Dinov2Model, OPTModel, ViTModel

from ecliptic.core.attention import PREFIX, register, register_attention, use
from tests.models import IDS, small
from tests.towers import FAMILIES

PLAIN = register("plain-for-tests", lambda module, scores: torch.softmax(scores, -1))
LANGUAGE = {"bert": BertModel, "opt": OPTModel}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_softmax_under_another_name_gives_the_same_answers(family):
    encoder = FAMILIES[family]()
    pixels = torch.randn(3, 3, encoder.image_size, encoder.image_size, generator=torch.Generator().manual_seed(0))
    tokens = encoder.tokenize(["one", "a rather longer caption", "two words"])
    before = encoder.images(pixels).pooled, encoder.texts(tokens, words=True)
    for tower in (encoder.anatomy.image, encoder.anatomy.text):
        use(tower.module, PLAIN)
    after = encoder.images(pixels).pooled, encoder.texts(tokens, words=True)
    assert_close(after[0], before[0], rtol=1e-5, atol=1e-6)
    assert_close(after[1].pooled, before[1].pooled, rtol=1e-5, atol=1e-6)
    mask = tokens.mask
    assert_close(after[1].tokens[mask], before[1].tokens[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "opt"])
def test_language_models_keep_their_masks(kind):
    model = small(LANGUAGE[kind])
    ids = IDS
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    before = model(ids, attention_mask=mask).last_hidden_state
    use(model, PLAIN)
    after = model(ids, attention_mask=mask).last_hidden_state
    assert_close(after[0], before[0], rtol=1e-5, atol=1e-5)
    assert_close(after[1, :4], before[1, :4], rtol=1e-5, atol=1e-5)
    changed = ids.clone()
    changed[:, 4] = 1
    early = model(changed, attention_mask=mask).last_hidden_state[0, :4]
    assert torch.allclose(early, after[0, :4], atol=1e-6) == (kind == "opt")  # only that one is causal


@pytest.mark.parametrize("kind", [ViTModel, Dinov2Model])
def test_vision_models(kind):
    model = small(kind)
    pixels = torch.randn(2, 3, 16, 16)
    before = model(pixels).last_hidden_state
    use(model, PLAIN)
    assert_close(model(pixels).last_hidden_state, before, rtol=1e-5, atol=1e-5)


def test_scores_are_what_the_function_gets_and_probabilities_what_counts():
    seen = []

    def hard(module, scores):
        seen.append((type(module).__name__, scores.shape))
        return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores)

    encoder = FAMILIES["clip"]()
    pixels = torch.randn(2, 3, encoder.image_size, encoder.image_size, generator=torch.Generator().manual_seed(0))
    before = encoder.images(pixels).pooled
    use(encoder.anatomy.image.module, register("hard-for-tests", hard))
    assert not torch.allclose(encoder.images(pixels).pooled, before, atol=1e-3)
    assert seen[0][0] == "CLIPAttention"
    assert seen[0][1][0] == 2
    text = FAMILIES["clip"]().texts(encoder.tokenize(["a"])).pooled
    assert_close(encoder.texts(encoder.tokenize(["a"])).pooled, text)  # the other tower keeps its own


def test_gradients_reach_the_weights():
    model = small(OPTModel).train()
    use(model, PLAIN)
    model(torch.arange(6).view(1, 6)).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "q_proj.weight" in name)


def test_keys_shared_by_heads():
    from transformers import AttentionInterface

    attend = AttentionInterface()[PLAIN]
    module = nn.Module()
    module.num_key_value_groups, module.training = 2, False
    query, key, value = (torch.randn(1, heads, 5, 4) for heads in (4, 2, 2))
    out, weights = attend(module, query, key, value, None)
    whole = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert_close(out, whole.transpose(1, 2))
    assert weights.shape == (1, 4, 5, 5)


def test_what_cannot_be_switched_says_so():
    with pytest.raises(ValueError, match="Linear has no attention"):
        use(nn.Linear(2, 2), PLAIN)
    assert PLAIN.startswith(PREFIX)


def test_boolean_masks_where_asked_and_none_where_causality_says_it_all():
    seen = []

    def attend(module, query, key, value, mask, scaling, **options):
        seen.append(mask)
        causal = mask is None and query.shape[2] > 1
        out = nn.functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    name = register_attention("boolean-for-tests", attend, boolean_mask=True)
    model, ids = small(OPTModel), IDS
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    before = [model(ids, attention_mask=m).last_hidden_state for m in (None, mask)]
    use(model, name)
    after = [model(ids, attention_mask=m).last_hidden_state for m in (None, mask)]
    assert_close(after[0], before[0], rtol=1e-5, atol=1e-5)
    assert_close(after[1][mask.bool()], before[1][mask.bool()], rtol=1e-5, atol=1e-5)
    assert [None if m is None else m.dtype for m in seen] == [None, None, torch.bool, torch.bool]
