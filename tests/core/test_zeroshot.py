import pytest
import torch
from torch.testing import assert_close

from ecliptic.core.zeroshot import (
    TEMPLATES,
    keeping_heads,
    prompts,
    template_set,
    zero_shot_head,
    zero_shot_probabilities,
)
from tests.towers import clip_encoder, dual_encoder, siglip_encoder

ENCODERS = {"clip": clip_encoder, "siglip": siglip_encoder, "dual": dual_encoder}
NAMES = ["cat", "small dog", "a red ball"]


@pytest.mark.parametrize("kind", ENCODERS)
def test_head_is_the_loop_over_classes_and_templates(kind):
    encoder = ENCODERS[kind]()
    templates = ("a photo of a {}.", "{} on a mat", "{} and {}")
    rows = []
    for name in NAMES:
        total = torch.zeros(encoder.dim, dtype=torch.float64)
        for template in templates:
            with torch.no_grad():
                e = encoder.texts(encoder.tokenize([template.replace("{}", name)]), normalize=False).pooled[0].double()
            total += e / e.norm()
        mean = total / len(templates)
        rows.append(mean / mean.norm())
    head = zero_shot_head(encoder, NAMES, templates)
    assert head.shape == (3, encoder.dim)
    assert_close(head, torch.stack(rows).float(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ENCODERS)
def test_one_template_is_the_encoders_own_embedding(kind):
    encoder = ENCODERS[kind]()
    assert torch.equal(zero_shot_head(encoder, NAMES, "{}"), encoder.encode_texts(NAMES))


def test_order_of_classes_is_the_order_of_rows():
    encoder = clip_encoder()
    head = zero_shot_head(encoder, NAMES, "ensemble")
    assert_close(zero_shot_head(encoder, NAMES[::-1], "ensemble"), head.flip(0), atol=1e-5, rtol=0)


def test_braces_that_are_not_ours_stay():
    assert prompts("{0} {x}", ("{} in {braces}", "two: {} {}")) == ["{0} {x} in {braces}", "two: {0} {x} {0} {x}"]


def test_template_sets_by_name():
    assert set(TEMPLATES) >= {"plain", "photo", "drawing", "ensemble"}
    assert all("{}" in template for chosen in TEMPLATES.values() for template in chosen)
    assert template_set("photo") == ("a photo of a {}.",)
    assert template_set("a {} here") == ("a {} here",)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], "photo", "no class names"),
        (["cat", "dog", "cat "], "photo", "'cat' occurs twice, at 0 and 2"),
        (["cat", " "], "photo", "class 1 has an empty name"),
        (["cat"], [], "no templates"),
        (["cat"], ["a photo of"], "no {} where"),
        (["cat"], ["  "], "template is empty"),
        (["cat"], "potho", "no template set 'potho'"),
    ],
)
def test_bad_input_is_named(names, templates, message):
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("}", r"\}")):
        zero_shot_head(clip_encoder(), names, templates)


def test_types_are_checked():
    with pytest.raises(TypeError, match="one string"):
        zero_shot_head(clip_encoder(), "cat")
    with pytest.raises(TypeError, match="class 1 is 3"):
        zero_shot_head(clip_encoder(), ["cat", 3])


def test_a_class_name_is_not_cut_silently():
    with pytest.raises(ValueError, match="tokens"):
        zero_shot_head(clip_encoder(), ["cat " * 60])


@pytest.mark.parametrize("kind", ENCODERS)
def test_probabilities_are_the_softmax_of_scaled_cosines(kind):
    encoder = ENCODERS[kind]()
    image = torch.nn.functional.normalize(
        torch.randn(4, encoder.dim, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    head = zero_shot_head(encoder, NAMES)
    expected = (encoder.scale.item() * image.double() @ head.double().T).softmax(-1)  # any bias cancels
    assert_close(zero_shot_probabilities(encoder, image, head), expected.float(), atol=1e-5, rtol=0)


def test_heads_that_are_kept_are_encoded_once(monkeypatch):
    encoder = clip_encoder()
    plain, asked = encoder.encode_texts, []

    def counting(texts, **options):
        asked.append(len(texts))
        return plain(texts, **options)

    monkeypatch.setattr(encoder, "encode_texts", counting)
    wanted = zero_shot_head(encoder, ["cat", "dog"], "ensemble")
    with keeping_heads():
        for _ in range(3):
            head = zero_shot_head(encoder, ["cat", "dog"], "ensemble")
            assert torch.equal(head, wanted)
            head.zero_()  # what is given away is a copy
        assert len(asked) == 2
        zero_shot_head(encoder, ["dog", "cat"], "ensemble")
        zero_shot_head(encoder, ["cat", "dog"], "photo")
        assert len(asked) == 4
        with torch.no_grad():
            next(iter(encoder.model.text_model.parameters())).mul_(2)
        assert not torch.equal(zero_shot_head(encoder, ["cat", "dog"], "ensemble"), wanted)
        assert len(asked) == 5
    zero_shot_head(encoder, ["cat", "dog"], "photo")
    assert len(asked) == 6
