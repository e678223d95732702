"""Computing the last block for one token only gives what computing it for all gives, and steps aside for anything unusual."""

import pytest
import torch
from torch.testing import assert_close

from tests.towers import FAMILIES, SIZE, clip_encoder

CAPTIONS = ["a cat", "a photo of a small dog and a red ball", "the moon and a cup of coffee"]


def tokens_computed(encoder, tower, run) -> int:
    """How many rows the last MLP saw."""
    seen = []
    block = tower.blocks[-1]
    original = type(block.mlp).forward

    def counting(self, hidden):
        if self is block.mlp:
            seen.append(hidden.numel() // hidden.shape[-1])
        return original(self, hidden)

    type(block.mlp).forward = counting
    try:
        run()
    finally:
        type(block.mlp).forward = original
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_full_forward_pass(family):
    encoder = FAMILIES[family]()
    pixels, tokens = torch.randn(3, 3, SIZE, SIZE), encoder.tokenize(CAPTIONS)
    full = encoder.images(pixels).pooled.detach(), encoder.texts(tokens).pooled.detach()  # gradients on: no shortcut
    with torch.inference_mode():
        short = encoder.images(pixels).pooled, encoder.texts(tokens).pooled
    for a, b in zip(full, short):
        assert_close(a, b.clone(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("family", "image", "text"), [("clip", 3, 3), ("siglip", 48, 3)])
def test_it_is_taken_where_it_is_exact(family, image, text):
    encoder = FAMILIES[family]()
    pixels, tokens = torch.randn(3, 3, SIZE, SIZE), encoder.tokenize(CAPTIONS)
    with torch.inference_mode():
        assert tokens_computed(encoder, encoder.anatomy.image, lambda: encoder.images(pixels)) == image
        assert tokens_computed(encoder, encoder.anatomy.text, lambda: encoder.texts(tokens)) == text


def test_the_old_end_of_text_convention():
    encoder = clip_encoder()
    encoder.model.text_model.eos_token_id = 2
    tokens = encoder.tokenize(CAPTIONS)
    tokens.ids[:, 2] = (
        len(encoder.tokenizer) - 1
    )  # the highest id is now in the middle, and that is where such checkpoints pool
    full = encoder.texts(tokens).pooled.detach()
    with torch.inference_mode():
        assert_close(encoder.texts(tokens).pooled.clone(), full, atol=1e-6, rtol=1e-5)


def test_it_steps_aside():
    encoder = clip_encoder()
    pixels = torch.randn(3, 3, SIZE, SIZE)
    block = encoder.anatomy.image.blocks[-1]

    def count():
        with torch.no_grad():
            return tokens_computed(encoder, encoder.anatomy.image, lambda: encoder.images(pixels))

    assert count() == 3
    handle = block.self_attn.register_forward_hook(lambda *_: None)
    assert count() == 51
    handle.remove()
    assert count() == 3
    block.self_attn.config._attn_implementation = "custom"
    with pytest.raises(
        Exception, match="custom"
    ):  # the real forward pass looks the function up: the shortcut did not hide it
        count()
    block.self_attn.config._attn_implementation = "sdpa"
    encoder.train()
    assert count() == 51
    encoder.eval()
    # Where gradients are wanted, methods may train or hook what the shortcut leaves out.
    assert tokens_computed(encoder, encoder.anatomy.image, lambda: encoder.images(pixels)) == 51
    assert count() == 3

    class Changed(type(block.self_attn)):
        pass

    block.self_attn.__class__ = Changed
    assert count() == 51


def test_patches_words_and_layers_are_complete():
    encoder = clip_encoder()
    pixels, tokens = torch.randn(2, 3, SIZE, SIZE), encoder.tokenize(CAPTIONS)
    full = encoder.images(pixels, patches=True, layers=[-1]), encoder.texts(tokens, words=True, layers=[-1])
    with torch.inference_mode():
        short = encoder.images(pixels, patches=True, layers=[-1]), encoder.texts(tokens, words=True, layers=[-1])
    for a, b in zip(full, short):
        assert_close(a.tokens.detach(), b.tokens.clone(), atol=1e-6, rtol=1e-5)
        assert_close(a.layers[-1].detach(), b.layers[-1].clone(), atol=1e-6, rtol=1e-5)
    with torch.inference_mode():
        only_layers = encoder.images(pixels, layers=[-1]).layers[-1]
    assert_close(only_layers.clone(), full[0].layers[-1].detach(), atol=1e-6, rtol=1e-5)
