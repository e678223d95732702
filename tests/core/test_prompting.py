"""Prompts on every tower: neutral ones change nothing, learnt ones get gradients, special positions stay where they are."""

import pytest
import torch
from torch.testing import assert_close

from ecliptic.core.anatomy import parts
from ecliptic.core.contracts import Tokens
from ecliptic.core.encoder import HFEncoder
from ecliptic.core.prompting import (
    added_to_words,
    check_promptable,
    images_with_prompts,
    text_from_embeddings,
    token_embeddings,
    with_context,
)
from tests.core.test_towers import dual as joined  # noqa: F401
from tests.core.test_towers import pixels as joined_pixels
from tests.towers import DIM, FAMILIES, SIZE, clip_encoder, tokenizer

CAPTIONS = ["a cat", "a photo of a small dog and a red ball"]


@pytest.fixture(params=FAMILIES)
def encoder(request):
    return FAMILIES[request.param]()


def test_the_tables_own_rows_give_the_plain_features(encoder):
    tokens = encoder.tokenize(CAPTIONS)
    with torch.no_grad():
        found = text_from_embeddings(encoder, token_embeddings(encoder, tokens), tokens).pooled
        assert torch.equal(found, encoder.texts(tokens).pooled)


def test_what_is_added_to_the_words_is_embeddings_moved_by_it(encoder):
    """Against `text_from_embeddings`: one addition for all, one for each, and one that ends before the captions do."""
    tokens = encoder.tokenize(CAPTIONS)
    length, width = tokens.ids.shape[1], encoder.anatomy.text.width
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        rows = token_embeddings(encoder, tokens)
        for shape in ((length, width), (len(CAPTIONS), length, width), (3, width), (length + 5, width)):
            addition = torch.randn(shape, generator=generator)
            moved = rows.clone()
            for i in range(len(CAPTIONS)):
                own = addition if addition.ndim == 2 else addition[i]
                for position in range(min(length, len(own))):
                    moved[i, position] += own[position]
            with added_to_words(encoder, addition):
                found = encoder.texts(tokens).pooled
            assert_close(found, text_from_embeddings(encoder, moved, tokens).pooled)
            assert not torch.allclose(found, encoder.texts(tokens).pooled, atol=1e-3)
        plain = encoder.encode_texts(CAPTIONS)
        with added_to_words(encoder, torch.zeros(length, width)):
            assert torch.equal(encoder.encode_texts(CAPTIONS), plain)
    assert not any(module._forward_hooks for module in encoder.modules())


def test_what_is_added_gets_gradients(encoder):
    addition = torch.zeros(2, encoder.anatomy.text.width, requires_grad=True)
    with added_to_words(encoder, addition):
        encoder.texts(encoder.tokenize(CAPTIONS)).pooled[:, 0].sum().backward()
    assert (addition.grad.abs().sum(-1) > 0).all()


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


def words_of(encoder, text):
    """The ids of a text's words, without special tokens."""
    return [i for i in encoder.tokenizer(text)["input_ids"] if i not in encoder.tokenizer.all_special_ids]


def rows_of(encoder, text):
    return token_embeddings(encoder, Tokens(torch.tensor([words_of(encoder, text)]), None))[0].detach()


def slow_context(encoder, before, after, tokens, tail):
    """The same layout, one vector at a time: rows of embeddings and of mask."""
    special, table = set(encoder.tokenizer.all_special_ids), encoder.anatomy.text.table.weight
    rows = []
    for ids, mask in zip(tokens.ids.tolist(), tokens.mask.tolist()):
        real = [i for i, m in zip(ids, mask) if m]
        end = [real.pop()] if real[-1] in special else []
        start = [real.pop(0)] if real[0] in special else []
        split = len(real) - tail
        row = [table[i] for i in start] + list(before) + [table[i] for i in real[:split]] + list(after)
        rows.append(row + [table[i] for i in real[split:] + end])
    return rows


@pytest.mark.parametrize(("count", "behind", "tail"), [(3, 2, 0), (0, 2, 1), (2, 3, 1), (4, 0, 0)])
def test_context_on_both_sides_against_a_slow_layout(encoder, count, behind, tail):
    before, after = (torch.randn(n, encoder.anatomy.text.width) for n in (count, behind))
    tokens = encoder.tokenize(["a cat.", "a small dog and a red ball."])
    found, laid = with_context(encoder, before, tokens, after, tail=tail)
    assert found.shape[:2] == laid.ids.shape == laid.mask.shape
    for i, row in enumerate(slow_context(encoder, before, after, tokens, tail)):
        assert torch.equal(found[i, : len(row)], torch.stack(row))
        assert laid.mask[i].tolist() == [place < len(row) for place in range(laid.mask.shape[1])]


def test_context_of_words_on_both_sides_is_those_words(encoder):
    """Names of different lengths: what follows them must follow each where it ends, before the full stop."""
    names = ["cat", "small dog and a ball"]
    before, after = rows_of(encoder, "a photo of a"), rows_of(encoder, " on a mat")
    laid = with_context(encoder, before, encoder.tokenize([f"{name}." for name in names]), after, tail=1)
    with torch.no_grad():
        found = text_from_embeddings(encoder, *laid).pooled
    assert_close(found, encoder.encode_texts([f"a photo of a {name} on a mat." for name in names]), atol=1e-5, rtol=0)


def test_no_context_at_all_is_the_caption_itself(encoder):
    nothing = torch.zeros(0, encoder.anatomy.text.width)
    tokens = encoder.tokenize(CAPTIONS)
    with torch.no_grad():
        found = text_from_embeddings(encoder, *with_context(encoder, nothing, tokens, nothing)).pooled
        assert torch.equal(found, encoder.texts(tokens).pooled)


def test_both_sides_get_gradients_and_may_differ_per_caption(encoder):
    width, tokens = encoder.anatomy.text.width, encoder.tokenize(CAPTIONS)
    before, after = (torch.randn(2, 2, width, requires_grad=True) for _ in range(2))
    both = text_from_embeddings(encoder, *with_context(encoder, before, tokens, after)).pooled
    both[1].sum().backward()
    for context in (before, after):
        assert context.grad[1].abs().sum() > 0
        assert context.grad[0].abs().sum() == 0
    with torch.no_grad():
        for i in range(2):
            one = with_context(encoder, before[i], encoder.tokenize(CAPTIONS[i : i + 1]), after[i])
            assert_close(both[i], text_from_embeddings(encoder, *one).pooled[0], atol=1e-5, rtol=0)


def test_a_tail_longer_than_the_caption_is_refused(encoder):
    rows = torch.zeros(1, encoder.anatomy.text.width)
    with pytest.raises(ValueError, match="caption 0 has no word in front"):
        with_context(encoder, rows, encoder.tokenize(["a", "a small dog"]), rows, tail=1)


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


def test_no_visual_prompts_is_the_picture_itself(encoder):
    pixels = torch.randn(2, 3, SIZE, SIZE)
    nothing = torch.zeros(0, encoder.anatomy.image.width)
    with torch.no_grad():
        assert torch.equal(images_with_prompts(encoder, pixels, nothing).pooled, encoder.images(pixels).pooled)


@pytest.mark.parametrize("normed", [True, False])
def test_visual_prompts_enter_where_they_should(encoder, normed):
    """What the first block reads: the picture's own tokens, then the prompts, normalised by CLIP's first norm or not."""
    pixels, tower = torch.randn(2, 3, SIZE, SIZE), encoder.anatomy.image
    prompts = torch.randn(5, tower.width)
    seen = []
    handle = tower.blocks[0].register_forward_hook(
        lambda m, args, kwargs, out: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        encoder.images(pixels)
        images_with_prompts(encoder, pixels, prompts, normed=normed)
        norm = getattr(tower.module, "pre_layrnorm", None)
        expected = norm(prompts) if norm is not None and normed else prompts
    handle.remove()
    assert_close(seen[1], torch.cat([seen[0], expected.expand(2, -1, -1)], 1))


def test_the_place_among_the_patches_does_not_matter():
    """Prompts between class token and patches, by hand through CLIP's own modules, give the same pooled vector."""
    encoder = clip_encoder()
    pixels, tower = torch.randn(2, 3, SIZE, SIZE), encoder.anatomy.image
    prompts = torch.randn(3, tower.width)
    with torch.no_grad():
        hidden = tower.embed(pixels)
        hidden = tower.module.pre_layrnorm(torch.cat([hidden[:, :1], prompts.expand(2, -1, -1), hidden[:, 1:]], 1))
        for block in tower.blocks:
            hidden = block(hidden, None)
        expected = torch.nn.functional.normalize(tower.projection(tower.norm(hidden[:, 0])), dim=-1)
        assert_close(images_with_prompts(encoder, pixels, prompts).pooled, expected, atol=1e-5, rtol=0)


def test_visual_prompts_that_would_do_nothing_are_refused(joined):  # noqa: F811
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 56}, "crop_size": 56}
    encoder = HFEncoder.from_hf(
        joined, tokenizer("bert"), {**processor, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    )
    prompts = torch.zeros(2, encoder.anatomy.image.width)
    with pytest.raises(TypeError, match="no effect on model: its pooled vector comes from a convolutional network"):
        images_with_prompts(encoder, joined_pixels(), prompts)
    assert check_promptable(encoder) is encoder  # words are another matter
    assert check_promptable(clip_encoder(), image=True).name == "tiny-clip"
    with pytest.raises(TypeError, match="ImageFolder takes no prompts"):
        check_promptable(type("ImageFolder", (), {})())


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
