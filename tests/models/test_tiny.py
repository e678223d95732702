"""The tiny model does what it was made for, and its lessons are what they say."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import CLIPModel

import ecliptic
from ecliptic.core.batches import collate
from ecliptic.data.scenes import COLOURS, SHAPES, draw, held_out, scenes
from ecliptic.models import tiny


@pytest.fixture(scope="module")
def encoder():
    return ecliptic.load("tiny")


def test_it_is_a_small_clip(encoder):
    assert isinstance(encoder.model, CLIPModel)
    assert sum(p.numel() for p in encoder.parameters()) <= 6_000_000
    assert sum(file.stat().st_size for file in tiny.FOLDER.iterdir()) <= 6_000_000
    assert encoder.name == "tiny"
    assert encoder.image_size == tiny.SIZE
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert [step["step"] for step in encoder.history] == ["train"] * len(tiny.STAGES)


def test_it_names_combinations_it_has_never_seen(encoder):
    found = tiny.evaluate(encoder, 300, "heldout", seed=11)
    assert found["shape_colour"] >= 0.8
    assert found["colour"] >= 0.95
    assert found["size"] >= 0.7


def test_pictures_and_strings_go_in(encoder):
    records = scenes("test", 6, size=200, lightings=["even"])
    rows = encoder.encode_images(records[i]["image"] for i in range(6))
    names = sorted({record["caption"] for record in records})
    texts = encoder.encode_texts(names)
    assert rows.shape == (6, encoder.dim)
    assert_close(rows.norm(dim=-1), torch.ones(6))
    right = [names[int(k)] == record["caption"] for k, record in zip((rows @ texts.T).argmax(-1), records, strict=True)]
    assert sum(right) >= 4
    assert encoder.images(torch.zeros(1, 3, 48, 48), patches=True).grid == (8, 8)


def test_any_text_can_be_read(encoder):
    for text in ("", "A RED circle!", "圆形 ünïcode \x00 🙂", "word " * 500):
        with pytest.warns() if len(text) > 999 else _nothing():
            tokens = encoder.tokenize([text])
        assert tokens.ids.shape[1] <= encoder.max_tokens
        assert tokens.ids[0, 0] == encoder.tokenizer.bos_token_id
        assert tokens.ids[0, -1] == encoder.tokenizer.eos_token_id
    assert_close(encoder.encode_texts(["A Red CIRCLE"]), encoder.encode_texts(["a red circle"]))
    text = "a striped triangle left of zebra 7"
    assert encoder.tokenizer.decode(encoder.tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text


class _nothing:
    def __enter__(self):
        return None

    def __exit__(self, *_):
        return False


def test_figures_belong_to_the_weights(encoder):
    card = json.loads((tiny.FOLDER / tiny.SIDECAR).read_text())
    assert card["parameters"] == sum(p.numel() for p in encoder.parameters())
    assert card["shorten"] == 1.0
    assert card["stages"] == json.loads(json.dumps([{**tiny.SHARED, **seen, **how} for seen, how in tiny.STAGES]))
    again = tiny.evaluate(encoder, 200, "heldout")
    assert abs(again["shape_colour"] - card["figures"]["heldout"]["shape_colour"]) < 0.12  # 200 of those 1,000 scenes


# ------------------------------------------------------------------------------------------------ lessons


@pytest.mark.parametrize(("easy", "mixed", "patches"), [(True, False, 24), (False, True, 64)])
def test_lessons_do_not_depend_on_the_batch(easy, mixed, patches):
    lessons = tiny.Lessons(1000, 4, easy, "the rest", mixed, patches)
    together = lessons.batch([5, 900, 17])
    for row, i in enumerate((5, 900, 17)):
        alone = lessons[i]
        assert alone["caption"] == together["caption"][row]
        for name in ("image", "said", "true", "keep", "cover"):
            assert np.array_equal(alone[name], together[name][row])
    with pytest.raises(IndexError):
        lessons[1000]


def test_lessons_never_show_a_held_out_combination():
    for kind in ("single", "count", "pair"):
        for scene in draw("train", range(300), 2, 16, kind=kind).scenes:
            assert not any(held_out(t.shape, t.colour, t.texture, ("shape", "colour")) for t in scene.things)


def test_captions_say_what_their_codes_say():
    batch = tiny.Lessons(2000, mixed=True).batch(range(300))
    values = tiny._VALUES
    words = {word for group in (*values[:4], values[5][1:6]) for word in group}
    for caption, said in zip(batch["caption"], batch["said"], strict=True):
        if said[0] == -2:
            assert any(r in caption for r in ("left of", "right of", "above", "below", "inside"))
            continue
        named = {values[k][code - 1] for k, code in enumerate(said) if code > 0 and k != 4}
        told = caption.rstrip(".").replace("crosses", "cross").split()
        told = {w if w == "cross" else w.removesuffix("s") for w in told}
        assert told & words == named, caption


def test_fits_equals_a_slow_loop():
    batch = tiny.Lessons(2000, mixed=True).batch(range(60))
    said, true = torch.tensor(batch["said"]), torch.tensor(batch["true"])
    fast = tiny.fits(said, true)
    for i, j in product(range(60), range(60)):
        slow = any(all(said[j, a] == 0 or said[j, a] == thing[a] for a in range(6)) for thing in true[i])
        assert bool(fast[i, j]) == slow
        if i == j:
            assert slow == bool(said[i, 0] != -2)
    assert 0.02 < fast.float().mean() < 0.3


def test_nothing_is_said_of_held_out_combinations():
    batch = tiny.Lessons(2000, mixed=True).batch(range(60))
    said, true = torch.tensor(batch["said"]), torch.tensor(batch["true"])
    fast = tiny.unseen(said, true)
    shapes, colours = ("", *SHAPES), ("", *COLOURS)

    def apart(shape, colour):
        return shape > 0 and colour > 0 and held_out(shapes[shape], colours[colour], "plain", ("shape", "colour"))

    for i, j in product(range(60), range(60)):
        slow = any(apart(said[j, 0], thing[1]) or apart(thing[0], said[j, 1]) for thing in true[i])
        assert bool(fast[i, j]) == slow
    assert not fast.diagonal().any()
    assert 0.1 < fast.float().mean() < 0.4


def test_patches_that_matter_are_kept():
    lessons, every = tiny.Lessons(100, patches=24), tiny.Lessons(100)
    some, full = lessons.batch(range(100)), every.batch(range(100))
    for keep, cover, whole in zip(some["keep"], some["cover"], full["cover"], strict=True):
        assert len(set(keep.tolist())) == 24
        assert np.array_equal(cover, whole[keep])
        left_out = np.delete(whole, keep)
        cut = (left_out > 0) & (left_out < 1)
        assert not cut.any() or ((cover > 0) & (cover < 1)).all()


def test_all_patches_are_the_plain_forward_pass():
    encoder = tiny.blank()
    lessons = tiny.Lessons(64, mixed=True)
    batch = collate(encoder, [lessons[i] for i in range(8)], tiny.Entailment())
    views = tiny.Entailment().encode(encoder, batch)
    plain = encoder.images(batch["image"], patches=True)
    assert_close(views["image"].pooled, plain.pooled)
    thing = torch.nn.functional.normalize((plain.tokens * batch["cover"][..., None]).sum(1), dim=-1)
    assert_close(views["thing"].pooled, thing)
    assert set(tiny.Entailment().terms(views)) == {"picture", "thing"}


def test_the_recipe_is_deterministic():
    torch.manual_seed(1)
    first = tiny.train(shorten=1e-6)
    torch.manual_seed(2)
    second = tiny.train(shorten=1e-6)
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(tiny.blank(0).model.visual_projection.weight, tiny.blank(1).model.visual_projection.weight)


def test_half_precision_keeps_what_it_learnt(tmp_path):
    encoder = tiny.blank()
    tiny.save(encoder, tmp_path / "out")
    again = ecliptic.load(tmp_path / "out")
    pixels = encoder.preprocess([Image.fromarray(i) for i in draw("test", range(4), size=48).images])
    assert_close(again.images(pixels).pooled, encoder.images(pixels).pooled, atol=2e-3, rtol=0)
    assert next(encoder.parameters()).dtype == torch.float32
