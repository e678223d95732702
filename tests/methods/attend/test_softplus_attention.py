"""Softplus attention: against loops written from the paper, its identities, and inside models of `transformers`."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from ecliptic.core.encoder import load
from ecliptic.methods.attend.softplus_attention import (
    LSSA,
    LSSAR,
    PHIS,
    SOFTMAX,
    Form,
    SoftplusAttention,
    attention,
    attention_weights,
    replace_attention,
    reweight,
)
from tests.towers import FAMILIES

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def causal(length, width=None):
    return torch.ones(length, width or length, dtype=torch.bool).tril()


# The equations


def loop(q, k, visible, form):
    """Steps 1 to 5 for one head, entry by entry, from the paper; q (Q, d), k (K, d) lists of numbers in float64."""
    d, out = len(q[0]), []
    for i, row in enumerate(q):
        seen = [j for j in range(len(k)) if visible[i][j]]
        n = len(seen)
        b = [0.0] * len(k)
        for j in seen:
            dot = sum(x * y for x, y in zip(row, k[j]))
            if form.cosine:
                dot /= math.sqrt(sum(x * x for x in row)) * math.sqrt(sum(y * y for y in k[j]))
                z = math.log(d) * math.log(n) * dot
            else:
                z = dot / math.sqrt(d)
            phi = {
                "exp": math.exp,
                "softplus": lambda t: math.log(1 + math.exp(t)),
                "sigmoid": lambda t: 1 / (1 + math.exp(-t)),
                "relu": lambda t: max(t, 0.0),
            }
            b[j] = phi[form.phi](z)
        total = sum(b)
        a = [x / total if total else 0.0 for x in b] if form.normalise else b
        if form.reweight is not None:
            offset = 0.0 if n <= form.offset_rows else 1.0
            c = [max(0.0, x * n - offset) ** form.reweight for x in a]
            a = [x / sum(c) for x in c] if sum(c) else a
        out.append(a)
    return torch.tensor(out, dtype=torch.float64)


MASKS = {
    "causal": causal(9),
    "all": torch.ones(9, 9, dtype=torch.bool),
    "padded on the left": causal(9) & (torch.arange(9) >= 3),
    "two texts in one row": causal(9) & (torch.arange(9)[:, None] // 5 == torch.arange(9) // 5),
    "a window of 4": causal(9) & ~torch.ones(9, 9, dtype=torch.bool).tril(-4),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("power", [None, 1, 3, 15])
def test_the_paper_in_loops(mask, phi, normalise, cosine, power):
    form = Form(phi=phi, normalise=normalise, cosine=cosine, reweight=power)
    q, k = drawn(2, 3, 9, 5), drawn(2, 3, 9, 5, seed=1)
    found = attention_weights(q, k, MASKS[mask], form)
    for b in range(2):
        for h in range(3):
            want = loop(q[b, h].tolist(), k[b, h].tolist(), MASKS[mask].tolist(), form)
            assert_close(found[b, h], want, rtol=1e-9, atol=1e-12)


def test_two_rows_by_hand():
    # d = 4; the second row sees N = 2 keys at cosines 1 and 0: Z = log 4 * log 2 = 0.9609 and 0.
    q = torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 0, 0]])
    k = torch.tensor([[0, 5.0, 0, 0], [0, 0, 3.0, 0]])
    one, other = math.log1p(math.exp(math.log(4) * math.log(2))), math.log(2)
    first = one / (one + other)
    assert_close(attention_weights(q, k, causal(2), LSSA), torch.tensor([[1.0, 0.0], [first, 1 - first]]))
    power = first**15 / (first**15 + (1 - first) ** 15)  # no offset: a row of at most three keys
    assert_close(attention_weights(q, k, causal(2), LSSAR), torch.tensor([[1.0, 0.0], [power, 1 - power]]))
    whole = attention_weights(q, k, causal(2), Form(offset_rows=0))
    assert_close(whole, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))  # only what is above the uniform half stays


@pytest.mark.parametrize("form", [LSSA, LSSAR, Form(reweight=3)])
def test_rows_are_distributions_over_what_is_seen(form):
    q, k = drawn(2, 4, 40, 8, dtype=torch.float32), drawn(2, 4, 40, 8, seed=1, dtype=torch.float32)
    found = attention_weights(q, k, causal(40), form)
    assert_close(found.sum(-1), torch.ones(2, 4, 40), rtol=0, atol=1e-5)
    assert (found >= 0).all()
    assert (found[..., ~causal(40)] == 0).all()


def test_re_weighting_keeps_exactly_what_is_above_uniform():
    q, k = drawn(1, 2, 30, 8), drawn(1, 2, 30, 8, seed=1)
    before, after = (attention_weights(q, k, causal(30), form) for form in (LSSA, Form(reweight=2)))
    above = before > 1 / torch.arange(1.0, 31)[:, None]
    assert torch.equal(after[..., 3:, :] > 0, above[..., 3:, :])
    assert torch.equal(after[..., :3, :] > 0, before[..., :3, :] > 0)


@pytest.mark.parametrize("length", [7, 513, 16384])
@pytest.mark.parametrize("power", [1, 15, 63])
def test_identical_keys_share_evenly_and_stay_so(length, power):
    q = drawn(1, 1, length, 8, dtype=torch.float32)[:, :, -4:].requires_grad_()
    k = torch.full((1, 1, length, 8), 0.3)
    visible = causal(length)[-4:]
    n = visible.sum(-1, keepdim=True)
    for form in (LSSA, Form(reweight=power)):
        found = attention_weights(q, k, visible, form)
        assert_close(found[0, 0], visible / n, rtol=1e-5, atol=0)
    found[..., 0].sum().backward()
    assert q.grad.isfinite().all()


def test_rounding_is_not_sharpened():
    """Keys equal but for the last digit: the differences are noise, and the fifteenth power of noise would pick one key."""
    n = 1000
    noise = torch.randint(-4, 5, (1, n), generator=torch.Generator().manual_seed(0)) * torch.finfo(torch.float32).eps
    row = (1 + noise) / n
    assert torch.equal(reweight(row, torch.tensor([[float(n)]]), 15), row)


def test_power_one_without_offset_changes_nothing():
    q, k = drawn(1, 2, 12, 8), drawn(1, 2, 12, 8, seed=1)
    same = Form(reweight=1, offset_rows=12)
    assert_close(attention_weights(q, k, causal(12), same), attention_weights(q, k, causal(12), LSSA))


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_exp_without_cosines_is_softmax(scale):
    q, k = drawn(2, 2, 12, 8, dtype=torch.float32) * scale, drawn(2, 2, 12, 8, seed=1, dtype=torch.float32)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(~causal(12), -torch.inf)
    assert_close(attention_weights(q, k, causal(12), SOFTMAX), scores.softmax(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [LSSA, LSSAR])
def test_lengths_of_queries_and_keys_do_not_matter(form):
    q, k = drawn(1, 2, 12, 8), drawn(1, 2, 12, 8, seed=1)
    here = attention_weights(q, k, causal(12), form)
    assert_close(attention_weights(7.3 * q, 0.02 * k, causal(12), form), here, rtol=1e-8, atol=1e-12)


def test_sharper_with_the_power():
    q, k = drawn(2, 2, 64, 8), drawn(2, 2, 64, 8, seed=1)
    entropies = []
    for power in (1, 3, 15, 63):
        a = attention_weights(q, k, causal(64), Form(reweight=power))
        entropies.append(-(a * a.clamp_min(1e-300).log()).sum(-1))
    for wide, narrow in pairwise(entropies):
        assert (narrow <= wide + 1e-9).all()
    assert entropies[-1].mean() < 0.5 * entropies[0].mean()


@pytest.mark.parametrize("excess", [1e-4, 1e-2, 16383.0])
def test_neither_overflow_nor_underflow(excess):
    """Three entries stand above uniform by e, e and e/2, however large or small e is: weights 1 : 1 : 2^-15."""
    n = 16384
    row = torch.full((1, n), (n - 2.5 * min(excess, 1000.0)) / n / n - 3 / n**2)
    row[0, :3] = (1 + excess * torch.tensor([1, 1, 0.5])) / n
    found = reweight(row, torch.tensor([[float(n)]]), 15)
    want = torch.tensor([1, 1, 2.0**-15]) / (2 + 2.0**-15)
    assert_close(found[0, :3], want, rtol=0.02, atol=0)  # float32 holds an excess of 1e-4 over 1 to three digits
    assert_close(found.sum(), torch.tensor(1.0))


def test_half_precision_goes_through_float32():
    q, k = (x.bfloat16() for x in (drawn(1, 2, 300, 8), drawn(1, 2, 300, 8, seed=1)))
    found = attention_weights(q, k, causal(300), LSSAR)
    assert found.dtype == torch.float32
    assert_close(found, attention_weights(q.float(), k.float(), causal(300), LSSAR))
    context, _ = attention(q, k, k, causal=True)
    assert context.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention_weights(q.float(), k.float(), causal(300), LSSAR), found)


@pytest.mark.parametrize("form", [LSSA, LSSAR, SOFTMAX, Form(phi="sigmoid")])
def test_rows_that_see_nothing_are_zero_and_have_gradients(form):
    q, k = drawn(1, 1, 5, 8).requires_grad_(), drawn(1, 1, 5, 8, seed=1).requires_grad_()
    hidden = causal(5)
    hidden[2] = False
    found = attention_weights(q, k, hidden, form)
    assert (found[0, 0, 2] == 0).all()
    (found * drawn(1, 1, 5, 5, seed=2)).sum().backward()
    assert q.grad.isfinite().all()
    assert k.grad.isfinite().all()


@pytest.mark.parametrize("form", [LSSA, Form(reweight=2), LSSAR, Form(phi="exp", reweight=3)])
def test_gradients(form):
    q, k = drawn(1, 1, 6, 5).requires_grad_(), drawn(1, 1, 6, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: attention_weights(q, k, causal(6), form), (q, k))


def test_gradients_reach_keys_below_uniform():
    """The denominator of step 4 sees every key, even those that step 5 then drops."""
    q, k = drawn(1, 1, 9, 8), drawn(1, 1, 9, 8, seed=1).requires_grad_()
    last = attention_weights(q, k, causal(9), Form(reweight=2))[0, 0, -1]
    dropped = last == 0
    assert 0 < dropped.sum() < 9
    last.square().sum().backward()
    assert (k.grad[0, 0].abs().sum(-1) > 0).all()


# Whole attention: masks of every kind, chunks


def test_masks_of_every_kind_say_the_same():
    q, k, v = (drawn(2, 3, 9, 5, seed=s) for s in range(3))
    visible = causal(9)
    want = attention_weights(q, k, visible, LSSAR) @ v
    lowest = torch.zeros(9, 9, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
    for mask in (
        visible,
        visible[None, None].expand(2, 3, 9, 9),
        lowest,
        lowest.masked_fill(~visible, -torch.inf),
        None,
    ):
        context, weights = attention(q, k, v, mask, causal=mask is None)
        assert_close(context, want)
        assert_close(weights @ v, want)
    assert not torch.allclose(attention(q, k, v)[0], want)  # neither a mask nor causal: all is seen


def test_a_mask_may_also_bias():
    q, k, v = (drawn(1, 2, 6, 5, seed=s) for s in range(3))
    slope = -0.3 * (torch.arange(6.0)[:, None] - torch.arange(6.0)).abs().double()
    scores = (q @ k.transpose(-1, -2) / math.sqrt(5) + slope).masked_fill(~causal(6), -torch.inf)
    as_mask = slope.masked_fill(~causal(6), torch.finfo(torch.float64).min)
    want = scores.softmax(-1) @ v
    assert_close(attention(q, k, v, as_mask, SOFTMAX)[0], want)
    assert_close(attention(q, k, v, None, SOFTMAX, causal=True, bias=slope)[0], want)
    assert_close(attention(q, k, v, causal(6), SOFTMAX, bias=slope)[0], want)


@pytest.mark.parametrize("mask", [None, "boolean", "added", "one row for all"])
@pytest.mark.parametrize("block", [1, 2 * 3 * 10 * 4])
def test_chunks_of_rows_change_nothing(mask, block):
    q, k, v = (drawn(2, 3, 10, 5, seed=s) for s in range(3))
    given = {
        "boolean": causal(10)[None, None],
        "added": torch.zeros(2, 1, 10, 10).masked_fill(~causal(10), torch.finfo(torch.float32).min),
        "one row for all": (torch.arange(10) < torch.tensor([[10], [6]]))[:, None, None],
    }.get(mask)
    whole, weights = attention(q, k, v, given, causal=True)
    parts, none = attention(q, k, v, given, causal=True, block=block)
    assert none is None
    assert_close(parts, whole, rtol=1e-12, atol=1e-14)
    assert_close(attention(q, k, v, given, causal=True, block=block, keep=True)[1], weights, rtol=1e-12, atol=1e-14)


def test_an_empty_batch_stays_empty():
    context, weights = attention(*(torch.zeros(0, 3, 10, 5) for _ in range(3)), causal=True)
    assert context.shape == (0, 3, 10, 5)
    assert weights.shape == (0, 3, 10, 10)


def test_memory_does_not_grow_with_the_square_of_the_length():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.untyped_storage().nbytes())
            return out

    q, k, v = (drawn(1, 1, 2048, 4, seed=s, dtype=torch.float32) for s in range(3))
    with Largest() as seen:
        attention(q, k, v, causal=True, block=1 << 15)
    assert seen.size <= 4 << 15 < 4 * 2048**2


def test_heads_too_narrow_for_their_scale():
    with pytest.raises(ValueError, match="heads of width 2: the scale log d vanishes"):
        attention_weights(drawn(1, 1, 3, 2), drawn(1, 1, 3, 2), causal(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"phi": "tanh"}, "choose exp, softplus, sigmoid, relu"),
        ({"reweight": 0.5}, "at least 1, or None"),
        ({"reweight": float("nan")}, "at least 1, or None"),
        ({"offset_rows": -1}, "0 or more"),
    ],
)
def test_bad_forms_are_refused(settings, message):
    for cls in (Form, SoftplusAttention):
        with pytest.raises(ValueError, match=message):
            cls(**settings)


# Models of transformers


def language(kind="llama"):
    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=4, n_positions=64))
    elif kind == "bert":
        model = BertModel(BertConfig(vocab_size=40, **SMALL))
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, pad_token_id=0, **SMALL))
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(5)  # or attention would hardly matter
    return model.eval()


def ids(batch=2, length=12):
    return torch.randint(1, 40, (batch, length), generator=torch.Generator().manual_seed(0))


def changed(kind="llama", form=LSSAR):
    model = language(kind)
    replace_attention(model, form, retrain=True)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_softmax_by_this_road_is_softmax(kind):
    model, tokens = language(kind), ids()
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    before = [model(tokens, attention_mask=m)[0] for m in (None, mask)]
    replace_attention(model, SOFTMAX)
    after = [model(tokens, attention_mask=m)[0] for m in (None, mask)]
    assert_close(after[0], before[0], rtol=1e-4, atol=1e-4)
    assert_close(after[1][mask.bool()], before[1][mask.bool()], rtol=1e-4, atol=1e-4)


def test_a_decoder_calls_the_equations():
    """One layer's context recomputed from its queries and keys, groups shared by heads and positions included."""
    model, kept = changed(), {}
    layer = model.model.layers[0].self_attn
    layer.o_proj.register_forward_pre_hook(lambda _, inputs: kept.update(context=inputs[0]))
    layer.register_forward_pre_hook(lambda _, args, kwargs: kept.update(kwargs), with_kwargs=True)
    model(ids())
    hidden = kept["hidden_states"]
    cos, sin = kept["position_embeddings"]

    def heads(projection, count):
        return projection(hidden).view(2, 12, count, 6).transpose(1, 2)

    def turned(x):  # RoPE: the first half of a head's width is paired with the second
        return x * cos[:, None] + torch.cat([-x[..., 3:], x[..., :3]], -1) * sin[:, None]

    q, k, v = turned(heads(layer.q_proj, 4)), turned(heads(layer.k_proj, 2)), heads(layer.v_proj, 2)
    for b in range(2):
        for h in range(4):
            weights = loop(q[b, h].tolist(), k[b, h // 2].tolist(), causal(12).tolist(), LSSAR)
            want = weights @ v[b, h // 2].double()
            assert_close(kept["context"][b, :, 6 * h : 6 * h + 6].double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_token_changes_nothing_before_it(kind):
    model, tokens = changed(kind), ids()
    other = tokens.clone()
    other[:, 7] = other[:, 7] % 39 + 1
    before, after = model(tokens).logits, model(other).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
@pytest.mark.parametrize("steps", [(1,) * 12, (5, 1, 1, 5), (12,)])
def test_decoding_with_a_cache_is_the_whole_forward(kind, cache, steps):
    model, tokens = changed(kind), ids()
    store = StaticCache(model.config, max_cache_len=16) if cache is StaticCache else DynamicCache(config=model.config)
    found, at = [], 0
    for count in steps:
        found.append(model(tokens[:, at : at + count], past_key_values=store, use_cache=True).logits)
        at += count
    assert_close(torch.cat(found, 1), model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(kind, side):
    model, tokens = changed(kind), ids(1, 7)
    filler = torch.zeros(1, 5, dtype=torch.long)
    order = [filler, tokens] if side == "left" else [tokens, filler]
    mask = torch.cat([torch.full_like(part, int(part is tokens)) for part in order], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    padded = model(torch.cat(order, 1), attention_mask=mask, position_ids=positions).logits
    assert_close(padded[mask.bool()], model(tokens).logits[0], rtol=1e-4, atol=1e-4)
    assert padded.isfinite().all()


def test_packed_texts_do_not_see_each_other():
    model, tokens = changed(), ids(1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = model(tokens, position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(tokens[:, :5]).logits, model(tokens[:, 5:]).logits], 1)
    assert_close(packed, apart, rtol=1e-4, atol=1e-4)


def test_long_causal_texts_need_no_mask(monkeypatch):
    seen = []
    real = attention
    monkeypatch.setattr(
        "ecliptic.methods.attend.softplus_attention.attention",
        lambda q, k, v, mask, *rest, **more: seen.append(mask) or real(q, k, v, mask, *rest, **more),
    )
    changed()(ids())
    assert seen == [None, None]


def test_bidirectional_models_see_all_that_is_not_padding():
    model, tokens = changed("bert"), ids()
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    whole = model(tokens, attention_mask=mask).last_hidden_state
    assert_close(whole[1:, :8], model(tokens[1:, :8]).last_hidden_state, rtol=1e-4, atol=1e-4)
    other = tokens.clone()
    other[0, 9] = other[0, 9] % 39 + 1
    assert not torch.allclose(model(other, attention_mask=mask).last_hidden_state[0, 0], whole[0, 0])


def test_pictures_of_another_size():
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(image_size=16, patch_size=8, **SMALL)).eval()
    replace_attention(model, retrain=True)
    found = model(torch.randn(2, 3, 32, 32), interpolate_pos_encoding=True).last_hidden_state
    assert found.shape == (2, 17, 24)
    assert found.isfinite().all()


def test_positions_as_biases_are_kept():
    torch.manual_seed(0)
    config = T5Config(vocab_size=40, d_model=24, d_kv=6, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    before = model(input_ids=ids(), decoder_input_ids=ids()).logits
    replace_attention(model, SOFTMAX)
    assert_close(model(input_ids=ids(), decoder_input_ids=ids()).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("extra", "message"), [({"softcap": 30.0}, "softcap"), ({"s_aux": torch.zeros(4)}, "sinks")])
def test_what_it_cannot_do_is_refused(extra, message):
    from transformers import AttentionInterface

    call = AttentionInterface()[changed().config._attn_implementation]
    q = torch.randn(1, 2, 3, 6)
    with pytest.raises(ValueError, match=message):
        call(nn.Module(), q, q, q, None, **extra)


def test_generating_and_training():
    model = changed()
    tokens = ids(1, 5)
    told = model.generate(tokens, max_new_tokens=6, do_sample=False)
    plain = model.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(told, plain)
    model.train()
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for n, p in model.named_parameters() if "q_proj" in n)


def test_weights_on_request():
    model = changed()
    found = model(ids(), output_attentions=True).attentions
    assert len(found) == 2
    assert_close(found[0].sum(-1), torch.ones(2, 4, 12))


def test_scores_of_a_trained_model_are_not_changed_unasked(tmp_path):
    model = language()
    with pytest.raises(ValueError, match=r"trained for other scores .*retrain=True"):
        replace_attention(model)
    assert model.config._attn_implementation == "sdpa"
    replace_attention(model, Form(phi="exp", cosine=False, reweight=15))  # re-weighting alone
    replace_attention(model, LSSA, retrain=True)
    replace_attention(model, LSSAR)  # it is LSSA's by now, and re-weighting comes after the scores
    with pytest.raises(ValueError, match="would answer noise"):
        replace_attention(model, SOFTMAX)
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not torch.allclose(opened(ids()).logits, model(ids()).logits, atol=1e-2)
    replace_attention(opened)  # allowed, because the config says what it was trained for
    assert_close(opened(ids()).logits, model(ids()).logits)


# Encoders


def inputs(encoder):
    pixels = drawn(2, 3, encoder.image_size, encoder.image_size, dtype=torch.float32)
    return pixels, encoder.tokenize(["one", "a rather longer caption"])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_changes_only_in_the_towers_chosen(family):
    encoder = FAMILIES[family]()
    pixels, tokens = inputs(encoder)
    step = SoftplusAttention(towers=("text",), retrain=True)
    after = step.apply(encoder)
    assert torch.equal(after.images(pixels).pooled, encoder.images(pixels).pooled)
    assert not torch.allclose(after.texts(tokens).pooled, encoder.texts(tokens).pooled, atol=1e-4)
    assert encoder.anatomy.text.module.config._attn_implementation == "sdpa"
    assert after.id != encoder.id


@pytest.mark.parametrize("family", FAMILIES)
def test_a_caption_alone_or_beside_a_longer_one(family):
    encoder = SoftplusAttention(retrain=True).apply(FAMILIES[family]())
    both = encoder.texts(encoder.tokenize(["one", "a rather longer caption"])).pooled
    assert_close(encoder.texts(encoder.tokenize(["one"])).pooled, both[:1], rtol=1e-4, atol=1e-5)


def test_clip_stays_causal():
    encoder = SoftplusAttention(retrain=True).apply(FAMILIES["clip"]())
    first, second = (encoder.texts(encoder.tokenize([t]), words=True).tokens for t in ("a cat on", "a cat off"))
    assert torch.equal(first[0, :2], second[0, :2])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_encoder_keeps_its_attention(family, tmp_path):
    made = SoftplusAttention(reweight=3, retrain=True).apply(FAMILIES[family]())
    made.save_pretrained(tmp_path / "model")
    opened = load(tmp_path / "model")
    pixels, tokens = inputs(made)
    assert_close(opened.images(pixels).pooled, made.images(pixels).pooled)
    assert_close(opened.texts(tokens).pooled, made.texts(tokens).pooled)
    assert opened.history == made.history
    assert opened.id == made.id
    sharper = SoftplusAttention(reweight=15).apply(opened)  # no refusal: its scores stay
    assert not torch.allclose(sharper.images(pixels).pooled, made.images(pixels).pooled, atol=1e-4)


def test_a_trained_encoder_is_not_destroyed_unasked():
    encoder = FAMILIES["clip"]()
    with pytest.raises(ValueError, match=r"retrain=True if it is going to be trained, or keep the scores"):
        SoftplusAttention().apply(encoder)
    SoftplusAttention(phi="exp", cosine=False, reweight=3).apply(encoder)


def test_towers_are_named():
    with pytest.raises(ValueError, match="choose from image, text"):
        SoftplusAttention(towers="text")
