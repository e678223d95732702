"""The encoder against transformers' own forward pass, on every family of towers."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from ecliptic.core.contracts import ModelStep, Tokens
from ecliptic.core.encoder import CARD, HFEncoder, LoadError, TextTooLong, TruncationWarning, load
from tests.towers import DIM, FAMILIES, PATCH, SIZE, WORDS, clip_encoder, siglip_encoder

CAPTIONS = ["a cat", "a photo of a small dog and a red ball", "the moon", "a cat", "a drawing of a blue circle"]


def pictures(n: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (20 + 7 * i, 45, 3), dtype=np.uint8)) for i in range(n)]


@pytest.fixture(params=FAMILIES)
def encoder(request) -> HFEncoder:
    return FAMILIES[request.param]()


def full_tokens(encoder: HFEncoder, texts: list[str]) -> Tokens:
    """Captions padded to the tower's full length, as a plain user of transformers would."""
    out = encoder.tokenizer(texts, padding="max_length", max_length=WORDS, return_tensors="pt")
    return Tokens(out["input_ids"], out["attention_mask"].bool())


# Parity


def test_logits_equal_transformers(encoder):
    pixels = encoder.preprocess(pictures(3))
    tokens = full_tokens(encoder, CAPTIONS)
    given = {} if encoder.anatomy.text.padded else {"attention_mask": tokens.mask.long()}
    with torch.no_grad():
        expected = encoder.model(pixel_values=pixels, input_ids=tokens.ids, **given).logits_per_image
        found = encoder.logits(encoder.images(pixels).pooled, encoder.texts(encoder.tokenize(CAPTIONS)).pooled)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_logits_equal_transformers_at_the_shape_of_vit_b_32(family):
    from transformers.models.clip.configuration_clip import CLIPConfig
    from transformers.models.clip.modeling_clip import CLIPModel
    from transformers.models.siglip.configuration_siglip import SiglipConfig
    from transformers.models.siglip.modeling_siglip import SiglipModel

    from ecliptic.core.preprocess import ImagePreprocess

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "clip":
            config = CLIPConfig()
            model = CLIPModel(config)
            eos = config.text_config.eos_token_id
        else:
            config = SiglipConfig(vision_config={"patch_size": 32})
            model = SiglipModel(config)
            eos = 1
        encoder = HFEncoder(model, None, ImagePreprocess())
        pixels = torch.randn(2, 3, 224, 224)
        length = config.text_config.max_position_embeddings
        ids = torch.randint(3, 30000, (2, length))
    ids[:, 9:] = eos
    mask = torch.arange(length)[None] <= torch.tensor([[9], [9]])
    with torch.no_grad():
        expected = model(pixel_values=pixels, input_ids=ids).logits_per_image
        found = encoder.logits(encoder.images(pixels).pooled, encoder.texts(Tokens(ids, mask)).pooled)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_trimming_and_bucketing_change_nothing(encoder):
    together = encoder.encode_texts(CAPTIONS, batch_size=2)
    with torch.no_grad():
        one_by_one = torch.cat([encoder.texts(full_tokens(encoder, [text])).pooled for text in CAPTIONS])
    assert_close(together, one_by_one, atol=1e-5, rtol=0)


def test_trimming_happens_only_where_it_is_exact(encoder):
    seen = []
    handle = encoder.anatomy.text.blocks[0].register_forward_hook(lambda m, i, out: seen.append(out[0].shape[-2]))
    with torch.no_grad():
        encoder.texts(full_tokens(encoder, ["a cat"]))
    handle.remove()
    assert (seen[0] == WORDS) == encoder.anatomy.text.padded


def test_clip_text_is_causal_and_siglip_text_is_not():
    for build, causal in ((clip_encoder, True), (siglip_encoder, False)):
        encoder = build()
        tokens = full_tokens(encoder, ["a photo of a cat"])
        changed = tokens.ids.clone()
        changed[:, 4] = 40
        with torch.no_grad():
            before = encoder.texts(tokens, layers=[-1]).layers[-1][:, 2]
            after = encoder.texts(Tokens(changed, tokens.mask), layers=[-1]).layers[-1][:, 2]
        assert torch.equal(before, after) == causal


def test_pictures_in_any_batches_from_any_number_of_threads(encoder):
    images = pictures(7)
    with torch.no_grad():
        expected = torch.cat([encoder.images(encoder.preprocess([image])).pooled for image in images])
    for batch_size, workers in ((1, 0), (3, 1), (32, 2)):
        assert_close(encoder.encode_images(images, batch_size, workers=workers), expected, atol=1e-5, rtol=0)


def test_paths_are_read_as_pictures(tmp_path):
    encoder, images = clip_encoder(), pictures(3)
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    assert torch.equal(encoder.encode_images(sorted(tmp_path.iterdir())), encoder.encode_images(images))


def test_files_open_upright_and_on_white(tmp_path):
    from ecliptic.core.encoder import open_picture

    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (4, 2))
    turned.getexif()[0x0112] = 6  # turn by a quarter
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif())
    assert open_picture(tmp_path / "turned.jpg").size == (2, 4)


def test_a_bad_picture_is_raised_or_noted(tmp_path):
    encoder = clip_encoder()
    (tmp_path / "bad.png").write_bytes(b"nothing")
    items = [*pictures(2), tmp_path / "bad.png", pictures(1)[0]]
    with pytest.raises(OSError, match=r"bad\.png"):
        encoder.encode_images(items, batch_size=2)
    errors: dict[int, Exception] = {}
    found = encoder.encode_images(items, batch_size=2, errors=errors)
    assert list(errors) == [2]
    assert torch.equal(found[2], torch.zeros(DIM))
    assert_close(found[3], encoder.encode_images(pictures(1))[0])


def test_embeddings_can_be_trained_on(encoder):
    rows = encoder.encode_texts(CAPTIONS)
    head = torch.nn.Linear(DIM, 2)
    head(rows).sum().backward()  # tensors from inference mode would refuse
    assert head.weight.grad is not None


def test_nothing_gives_nothing(encoder):
    assert encoder.encode_texts([]).shape == (0, DIM)
    assert encoder.encode_images([]).shape == (0, DIM)
    assert encoder.encode_texts([""]).isfinite().all()


# Features


def test_patches_keep_their_grid_at_any_size(encoder):
    for height, width in ((SIZE, SIZE), (48, 32), (64, 72), (PATCH, PATCH)):
        with torch.no_grad():
            features = encoder.images(torch.randn(2, 3, height, width), patches=True, layers=[0, -1])
        rows, columns = height // PATCH, width // PATCH
        assert features.grid == (rows, columns)
        assert features.tokens.shape == (2, rows * columns, DIM)
        prefix = encoder.anatomy.image.prefix
        assert features.layers[0].shape[1] == features.layers[-1].shape[1] == rows * columns + prefix


def test_a_patch_knows_its_place(encoder):
    """Change one corner of the picture: of the first block's patches only those that see it through attention change, and the
    most by far is the patch itself."""
    pixels = torch.randn(1, 3, 48, 64)
    changed = pixels.clone()
    changed[..., 3 * PATCH : 4 * PATCH, 5 * PATCH : 6 * PATCH] += 3
    with torch.no_grad():
        a = encoder.images(pixels, patches=True, layers=[0])
        b = encoder.images(changed, patches=True, layers=[0])
    difference = (a.layers[0] - b.layers[0]).norm(dim=-1)[0, encoder.anatomy.image.prefix :]
    assert difference.argmax() == 3 * a.grid[1] + 5


def test_layers_are_the_blocks_outputs(encoder):
    pixels = encoder.preprocess(pictures(2))
    with torch.no_grad():
        features = encoder.images(pixels, layers=[0, 1, 2, -1], patches=True)
        hidden = encoder.model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states
        assert_close(features.layers[0], hidden[1])
        assert_close(features.layers[1], hidden[2])
        assert torch.equal(features.layers[2], features.layers[-1])
        tower = encoder.anatomy.image
        normed = tower.norm(features.layers[-1])
        if encoder.model.config.model_type == "siglip":
            # Attention over a single patch, as the pooling head itself computes it.
            alone = torch.stack([tower.module.head(normed[:, i : i + 1]) for i in range(normed.shape[1])], 1)
            assert_close(features.tokens, alone, atol=1e-5, rtol=1e-5)
        else:
            assert_close(features.tokens, tower.projection(normed[:, 1:]), atol=1e-6, rtol=1e-5)


def test_layers_that_do_not_exist_are_refused(encoder):
    with pytest.raises(IndexError, match="3 blocks"):
        encoder.images(torch.randn(1, 3, SIZE, SIZE), layers=[3])


def test_words_are_in_the_joint_space_and_the_pooled_one_is_among_them():
    encoder = clip_encoder()
    with torch.no_grad():
        features = encoder.texts(encoder.tokenize(CAPTIONS), words=True, normalize=False)
    last = features.mask.sum(-1) - 1
    assert_close(features.tokens[torch.arange(len(CAPTIONS)), last], features.pooled)


def test_pooled_rows_are_unit_unless_asked_otherwise(encoder):
    with torch.no_grad():
        rows = encoder.images(encoder.preprocess(pictures(2))).pooled
        raw = encoder.images(encoder.preprocess(pictures(2)), normalize=False).pooled
    assert_close(rows.norm(dim=-1), torch.ones(2))
    assert_close(raw / raw.norm(dim=-1, keepdim=True), rows)
    assert (raw.norm(dim=-1) - 1).abs().min() > 1e-3


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 4, 32, 32), (1, 3, 32, 4)])
def test_pixels_of_the_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match="pixels"):
        clip_encoder().images(torch.zeros(shape))


# Long captions


def test_a_long_caption_is_an_error_or_cut_before_its_end(encoder):
    long = "a cat and " * 40
    with pytest.raises(TextTooLong, match=r"caption 1 .* reads 32"):
        encoder.tokenize(["a cat", long], overflow="error")
    with pytest.warns(TruncationWarning, match="1 of 2 captions"):
        tokens = encoder.tokenize(["a cat", long], overflow="truncate")
    whole = encoder.tokenizer([long])["input_ids"][0]
    tail = 1
    assert tokens.ids[1].tolist() == whole[: WORDS - tail] + whole[-tail:]
    assert tokens.mask[1].all()


def test_windows_are_the_mean_of_their_parts():
    encoder = clip_encoder()
    words = encoder.tokenizer("a cat and a dog " * 12)["input_ids"]
    body, room = words[1:-1], WORDS - 2
    parts = [words[:1] + body[i : i + room] + words[-1:] for i in range(0, len(body), room)]
    assert len(parts) > 2
    with torch.no_grad():
        rows = torch.cat([encoder.texts(Tokens(torch.tensor([p]), torch.ones(1, len(p)).bool())).pooled for p in parts])
    expected = torch.nn.functional.normalize(rows.mean(0), dim=-1)
    found = encoder.encode_texts(["a cat", "a cat and a dog " * 12], overflow="windows")
    assert_close(found[1], expected, atol=1e-5, rtol=0)
    assert_close(found[0], encoder.encode_texts(["a cat"])[0], atol=1e-6, rtol=0)


def test_short_captions_never_warn(encoder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode_texts(CAPTIONS)


def test_one_string_is_not_a_list_of_letters(encoder):
    for call in (encoder.tokenize, encoder.encode_texts):
        with pytest.raises(TypeError, match="list of strings"):
            call("a cat")


# Files


def test_save_and_load_give_the_same_answers(encoder, tmp_path):
    encoder.record_step("long_clip", {"tokens": 248})
    encoder.save_pretrained(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.history == ({"step": "long_clip", "args": {"tokens": 248}},)
    assert (again.name, again.id, again.max_tokens) == (encoder.name, encoder.id, encoder.max_tokens)
    ours, theirs = encoder.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # Kernels may differ in the last bit with the alignment of memory-mapped weights.
    assert_close(again.encode_texts(CAPTIONS), encoder.encode_texts(CAPTIONS), atol=1e-6, rtol=0)
    assert_close(again.encode_images(pictures(2)), encoder.encode_images(pictures(2)), atol=1e-6, rtol=0)
    assert torch.equal(again.scale, encoder.scale)
    if encoder.bias is not None:
        assert torch.equal(again.bias, encoder.bias)


class Bottleneck(ModelStep):
    """Puts a layer of its own behind the first query projection: an architecture that no config describes."""

    def __init__(self, width: int):
        self.width = width

    def apply(self, encoder, pairs=None):
        changed = self.reshape(encoder.clone())
        changed.record_step("bottleneck", {"width": self.width}, reshapes=True)
        return changed

    def reshape(self, encoder):
        attention = getattr(encoder.anatomy.image.blocks[0], "self_attn", None)
        attention = attention or encoder.anatomy.image.blocks[0].attention
        inside = attention.q_proj.in_features
        with torch.random.fork_rng():
            narrow, wide = torch.nn.Linear(inside, self.width), torch.nn.Linear(self.width, inside)
        attention.q_proj = torch.nn.Sequential(narrow, wide)
        return encoder


def test_a_reshaped_model_is_rebuilt_and_filled(encoder, tmp_path, monkeypatch):
    import ecliptic.core.method

    monkeypatch.setattr(ecliptic.core.method, "get", lambda slug: {"bottleneck": Bottleneck}[slug])
    changed = Bottleneck(5).apply(encoder)
    changed.save_pretrained(tmp_path / "a")
    again = load(tmp_path / "a")
    assert type(again.model) is type(changed.model)
    assert again.history == ({"step": "bottleneck", "args": {"width": 5}, "reshapes": True},)
    left, right = changed.model.state_dict(), again.model.state_dict()
    assert left.keys() == right.keys()
    assert any(value.shape == (5, encoder.anatomy.image.width) for value in right.values())
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert torch.equal(again.encode_images(pictures(2)), changed.encode_images(pictures(2)))
    assert torch.equal(again.encode_texts(CAPTIONS), changed.encode_texts(CAPTIONS))
    copied = again.clone()
    copied.save_pretrained(tmp_path / "b")
    assert load(tmp_path / "b").id == again.id


def test_a_reshaped_model_whose_step_is_missing_says_so(encoder, tmp_path):
    changed = Bottleneck(5).apply(encoder)
    changed.save_pretrained(tmp_path / "a")
    with pytest.raises(LoadError, match="given its architecture by a step that is not here: no method 'bottleneck'"):
        load(tmp_path / "a")


def test_saving_again_replaces_and_never_mixes(tmp_path):
    clip_encoder().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "stale.txt").write_text("left over")
    siglip_encoder().save_pretrained(tmp_path / "m")
    assert load(tmp_path / "m").model.config.model_type == "siglip"
    assert not (tmp_path / "m" / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_folder_of_other_things_is_not_overwritten(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="other files"):
        clip_encoder().save_pretrained(tmp_path)
    assert (tmp_path / "holiday.jpg").read_bytes() == b"precious"


def test_transformers_opens_what_we_save(tmp_path):
    from transformers.models.clip.modeling_clip import CLIPModel

    encoder = clip_encoder()
    encoder.save_pretrained(tmp_path / "m")
    model = CLIPModel.from_pretrained(tmp_path / "m")
    pixels = encoder.preprocess(pictures(1))
    with torch.no_grad():
        theirs = model.get_image_features(pixel_values=pixels).pooler_output
    assert_close(torch.nn.functional.normalize(theirs, dim=-1), encoder.encode_images(pictures(1)))


def test_the_id_follows_weights_preprocessing_and_nothing_else(tmp_path):
    a, b = clip_encoder(), clip_encoder()
    assert a.id == b.id != clip_encoder(seed=1).id
    with torch.no_grad():
        b.model.visual_projection.weight[0, 0] += 1e-3
    assert a.id != b.id
    from dataclasses import replace

    c = clip_encoder()
    c.transform = replace(c.transform, resample=2)
    assert a.id != c.id


def test_a_clone_is_independent_and_a_fold_shares():
    from sklearn.base import clone

    encoder = clip_encoder()
    before = encoder.encode_texts(["a cat"])
    copy = encoder.clone()
    with torch.no_grad():
        copy.model.text_projection.weight.zero_()
    copy.record_step("x", {})
    assert torch.equal(encoder.encode_texts(["a cat"]), before)
    assert encoder.history == ()
    assert clone(encoder) is encoder


# Loading what is broken


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_errors_at_load_say_what_and_why(tmp_path):
    for source, message in (
        (tmp_path / "none", "no such file"),
        (tmp_path, "no config.json"),
        ("a/b/c", "neither a file"),
        ("", "no config.json|neither"),
    ):
        with pytest.raises(LoadError, match=message):
            load(source)


def test_a_model_without_its_logit_bias_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    siglip_encoder().save_pretrained(tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    del weights["logit_bias"]
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match="logit_bias"):
        load(tmp_path / "m")


def test_openai_weights_with_the_wrong_activation_are_refused(tmp_path):
    folder = tmp_path / "openai" / "clip-vit-tiny"
    encoder = clip_encoder()
    encoder.model.config.vision_config.hidden_act = "gelu"
    encoder.model.config.text_config.hidden_act = "gelu"
    encoder.save_pretrained(folder)
    with pytest.raises(LoadError, match="quick_gelu"):
        load(folder)
    encoder.save_pretrained(tmp_path / "mine")
    with pytest.raises(LoadError, match="one of the two is wrong"):
        load(tmp_path / "mine", activation="quick_gelu")
    assert load(tmp_path / "mine", activation="gelu").dim == DIM


def test_other_models_and_damaged_folders_are_refused(tmp_path):
    clip_encoder().save_pretrained(tmp_path / "m")
    edit(tmp_path / "m" / "config.json", model_type="bert")
    with pytest.raises(LoadError, match="no two towers"):
        load(tmp_path / "m")
    clip_encoder().save_pretrained(tmp_path / "n")
    (tmp_path / "n" / "preprocessor_config.json").unlink()
    with pytest.raises(LoadError, match="preprocessor_config"):
        load(tmp_path / "n")
    clip_encoder().save_pretrained(tmp_path / "o")
    (tmp_path / "o" / CARD).write_text("{")
    with pytest.raises(LoadError, match="JSON"):
        load(tmp_path / "o")


def test_a_model_without_a_tokenizer_still_sees(tmp_path):
    encoder = clip_encoder()
    blind = HFEncoder(encoder.model, None, encoder.transform)
    assert blind.encode_images(pictures(1)).shape == (1, DIM)
    with pytest.raises(LoadError, match="tokenizer"):
        blind.encode_texts(["a cat"])
