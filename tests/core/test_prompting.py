"""Prompts on every tower: neutral ones change nothing, learnt ones get gradients, special positions stay where they are."""

import pytest
import torch
from torch.testing import assert_close

from ecliptic.core.anatomy import parts
from ecliptic.core.prompting import images_with_prompts, text_from_embeddings, token_embeddings, with_context
from tests.towers import DIM, FAMILIES, SIZE, clip_encoder

CAPTIONS = ["a cat", "a photo of a small dog and a red ball"]


@pytest.fixture(params=FAMILIES)
def encoder(request):
    return FAMILIES[request.param]()


def test_the_tables_own_rows_give_the_plain_features(encoder):
    tokens = encoder.tokenize(CAPTIONS)
    with torch.no_grad():
        found = text_from_embeddings(encoder, token_embeddings(encoder, tokens), tokens).pooled
        assert torch.equal(found, encoder.texts(tokens).pooled)


def test_context_made_of_words_is_those_words():
    """Context vectors equal to the embeddings of "a photo of" must give what writing "a photo of" gives."""
    encoder = clip_encoder()
    words = encoder.tokenizer("a photo of")["input_ids"][1:-1]
    context = token_embeddings(encoder, type(encoder.tokenize(["x"]))(torch.tensor([words]), None))[0].detach()
    embeddings, tokens = with_context(encoder, context, encoder.tokenize(["a cat", "the moon"]))
    with torch.no_grad():
        found = text_from_embeddings(encoder, embeddings, tokens).pooled
    assert_close(found, encoder.encode_texts(["a photo of a cat", "a photo of the moon"]), atol=1e-5, rtol=0)


def test_context_gets_gradients_and_the_towers_state_is_untouched(encoder):
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    context = torch.randn(4, encoder.anatomy.text.width, requires_grad=True)
    embeddings, tokens = with_context(encoder, context, encoder.tokenize(CAPTIONS))
    text_from_embeddings(encoder, embeddings, tokens).pooled.sum().backward()
    assert context.grad.abs().sum() > 0
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    tokens = encoder.tokenize(CAPTIONS)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())


def test_a_different_context_per_caption(encoder):
    width = encoder.anatomy.text.width
    contexts = torch.randn(2, 3, width)
    with torch.no_grad():
        both = text_from_embeddings(encoder, *with_context(encoder, contexts, encoder.tokenize(CAPTIONS))).pooled
        for i in range(2):
            alone = text_from_embeddings(
                encoder, *with_context(encoder, contexts[i], encoder.tokenize(CAPTIONS[i : i + 1]))
            )
            assert_close(both[i], alone.pooled[0], atol=1e-5, rtol=0)


def test_too_much_context_is_refused(encoder):
    with pytest.raises(ValueError, match="exceed"):
        with_context(encoder, torch.zeros(31, encoder.anatomy.text.width), encoder.tokenize(CAPTIONS))


def test_deep_text_prompts_replace_their_positions():
    encoder = clip_encoder()
    tokens = encoder.tokenize(CAPTIONS)
    words = token_embeddings(encoder, tokens)
    prompt = torch.randn(2, encoder.anatomy.text.width, requires_grad=True)
    seen = {}
    handle = encoder.anatomy.text.blocks[1].register_forward_hook(
        lambda m, args, kwargs, out: seen.update(given=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    plain = text_from_embeddings(encoder, words, tokens).pooled
    found = text_from_embeddings(encoder, words, tokens, deep={1: (1, prompt)}).pooled
    handle.remove()
    assert torch.equal(seen["given"][:, 1:3], prompt.expand(2, -1, -1))
    assert (found - plain).abs().max() > 1e-4
    found.sum().backward()
    assert prompt.grad.abs().sum() > 0


def test_visual_prompts(encoder):
    pixels = torch.randn(2, 3, SIZE, SIZE)
    width, layers = encoder.anatomy.image.width, len(encoder.anatomy.image.blocks)
    prompts = torch.randn(5, width, requires_grad=True)
    deep = {i: torch.randn(5, width, requires_grad=True) for i in range(1, layers)}
    plain = encoder.images(pixels, patches=True)
    assert torch.equal(images_with_prompts(encoder, pixels, None).pooled, plain.pooled)
    found = images_with_prompts(encoder, pixels, prompts, deep, patches=True)
    assert found.tokens.shape == plain.tokens.shape == (2, 16, DIM)
    assert (found.pooled - plain.pooled).abs().max() > 1e-4
    found.pooled[:, 0].sum().backward()
    assert all(prompt.grad.abs().sum() > 0 for prompt in (prompts, *deep.values()))
    assert torch.equal(encoder.images(pixels).pooled, plain.pooled)


def test_prompts_that_do_not_fit_are_refused(encoder):
    width = encoder.anatomy.image.width
    with pytest.raises(ValueError, match="5 are needed"):
        images_with_prompts(encoder, torch.randn(1, 3, SIZE, SIZE), torch.zeros(5, width), {1: torch.zeros(4, width)})
    with pytest.raises(ValueError, match="differ"):
        text_from_embeddings(encoder, torch.zeros(1, 3, 32), encoder.tokenize(CAPTIONS))


def test_anatomy_names_what_attention_uses(encoder):
    """Zeroing the output projection and the MLP's second layer found by name must leave only the residual stream."""
    for tower, run in (
        (encoder.anatomy.image, lambda: encoder.images(torch.ones(1, 3, SIZE, SIZE), layers=[0])),
        (encoder.anatomy.text, lambda: encoder.texts(encoder.tokenize(CAPTIONS), layers=[0])),
    ):
        found = parts(tower.blocks[0])
        assert found.q.in_features == found.k.in_features == found.v.in_features == tower.width
        assert found.fc1.out_features == found.fc2.in_features
        assert found.heads == 4
        given = {}
        handle = tower.blocks[0].register_forward_pre_hook(
            lambda m, args, kwargs, given=given: given.update(x=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        with torch.no_grad():
            for layer in (found.out, found.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
            output = run().layers[0]
        handle.remove()
        expected = given["x"]
        if not found.pre_norm:
            expected = found.norm2(found.norm1(expected))
        assert_close(output, expected)


def test_unknown_blocks_are_named():
    with pytest.raises(TypeError, match="Linear"):
        parts(torch.nn.Linear(2, 2))
