"""CapS-Adapter: how its support is made, where its weights come from, and what it is sold for.

The equations have their loops in tests/ops/test_support_cache.py.
"""

import itertools

import pytest
import torch
from PIL import Image
from torch import tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from ecliptic.core.predictor_io import load_predictor
from ecliptic.core.zeroshot import zero_shot_head
from ecliptic.data.images import ImageError
from ecliptic.data.records import Records
from ecliptic.data.shots import encode_views, folds_of, tiny_records
from ecliptic.methods.adapt.caps_adapter import (
    ATTEMPTS,
    CapsAdapter,
    build_support,
    captioned_prompt,
    class_captions,
    is_dark,
)
from ecliptic.ops.cache_model import tip_adapter_logits
from ecliptic.ops.support_cache import (
    GRIDS,
    LABEL_FREE,
    Reference,
    Support,
    compare,
    held_out,
    m_adapter_logits,
    search_m_adapter,
)
from tests.towers import FAMILIES, clip_encoder

HUES = {"red": (250, 20, 20), "green": (20, 250, 20), "blue": (20, 20, 250)}


def rows(*shape, seed=0):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def shots(each=6, k=3, d=12, noise=0.4, seed=0):
    """Features, labels, texts and captions (N, d) of k classes around centres of their own."""
    centres, labels = rows(k, d, seed=90), torch.arange(k).repeat_interleave(each)
    features = normalize(centres[labels] + noise * rows(k * each, d, seed=seed), dim=-1)
    captions = normalize(centres[labels] + rows(k * each, d, seed=seed + 50), dim=-1)
    return features, labels, normalize(centres + rows(k, d, seed=91), dim=-1), captions


def painter(log=None):
    """A generator that paints the hue its prompt names, a little differently for each seed."""

    def paint(prompt, seed):
        if log is not None:
            log.append((prompt, seed))
        (hue,) = {colour for name, colour in HUES.items() if name in prompt.split(".")[0]}
        return Image.new("RGB", (32, 32), tuple(min(255, v + seed % 7) for v in hue))

    return paint


# The support


def test_prompts_are_the_class_then_the_caption():
    assert captioned_prompt("cup", "A white cup on a table.") == "A photo of cup. A white cup on a table."
    assert captioned_prompt("cup") == "A photo of cup."
    assert captioned_prompt("Peru", "Mountains.", "In {}. ") == "In Peru. Mountains."


def test_support_is_every_class_with_its_captions_in_turn():
    encoder, log = clip_encoder(), []
    captions = {"red": ["one", "two", "three"], "blue": ["four"], "green": []}
    support = build_support(captions, painter(log), encoder, n=5, seed=3)
    assert support.classes == ("red", "blue", "green")
    assert support.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    said = [prompt for prompt, _ in log]
    assert sorted(said[:3]) == sorted(f"A photo of red. {c}" for c in captions["red"])
    assert said[3:5] == said[:2]  # and round again
    assert said[5:] == ["A photo of blue. four"] * 5 + ["A photo of green."] * 5
    assert len({seed for _, seed in log}) == 15  # a seed for each picture
    assert_close(support.caption_keys, encoder.encode_texts(said))
    assert_close(support.image_keys, encoder.encode_images([painter()(*call) for call in log]))
    assert_close(support.image_keys.norm(dim=-1), torch.ones(15))
    again = build_support(captions, painter(), encoder, n=5, seed=3)
    assert torch.equal(again.image_keys, support.image_keys)
    orders = set()
    for seed in range(8):
        log.clear()
        build_support(captions, painter(log), encoder, n=3, seed=seed)
        orders.add(tuple(prompt for prompt, _ in log[:3]))
    assert len(orders) > 1  # shuffled by the seed


def test_black_and_broken_pictures_are_drawn_again_with_the_next_caption():
    calls = itertools.count()
    log = []

    def faulty(prompt, seed):
        call = next(calls)
        log.append((prompt, seed))
        if call == 0:
            return Image.new("RGB", (32, 32), (4, 5, 4))  # mean 4.3
        if call == 1:
            raise ImageError("x.png", "truncated")
        return Image.new("RGB", (32, 32), (200, 10, 10))

    encoder = clip_encoder()
    support = build_support({"red": ["a", "b", "c"], "blue": ["d"]}, faulty, encoder, n=1)
    assert len(log) == 4
    assert len({prompt for prompt, _ in log[:3]}) == 3
    assert len({seed for _, seed in log}) == 4
    kept = encoder.encode_texts([log[2][0], log[3][0]])
    assert_close(support.caption_keys, kept)  # the caption of the picture that was kept, not of those rejected


def test_a_generator_that_never_works_is_given_up():
    count = []

    def black(prompt, seed):
        count.append(prompt)
        return Image.new("RGB", (8, 8))

    with pytest.raises(
        ValueError, match=rf"no usable picture of 'a' in {ATTEMPTS} attempts, the last: its mean is below 5"
    ):
        build_support({"a": ["x"], "b": ["y"]}, black, clip_encoder(), n=2)
    assert len(count) == ATTEMPTS
    with pytest.raises(ValueError, match=r"no usable picture of 'a' in .*nowhere"):
        build_support({"a": ["x"], "b": ["y"]}, lambda prompt, seed: "nowhere.png", clip_encoder())


def test_dark_is_a_mean_below_5():
    assert is_dark(Image.new("RGB", (4, 4), (4, 5, 5)))
    assert not is_dark(Image.new("RGB", (4, 4), (5, 5, 5)))
    assert not is_dark(Image.new("L", (4, 4), 3), threshold=2.0)


def test_paths_may_be_generated(tmp_path):
    Image.new("RGB", (32, 32), (250, 20, 20)).save(tmp_path / "a.png")
    support = build_support({"x": [], "y": []}, lambda prompt, seed: tmp_path / "a.png", clip_encoder(), n=1)
    assert torch.equal(support.image_keys[0], support.image_keys[1])


def test_long_captions_are_cut_without_a_warning():
    encoder = clip_encoder()
    support = build_support({"red": ["word " * 200], "blue": []}, painter(), encoder, n=1)
    assert support.caption_keys.shape == (2, encoder.dim)


def test_captions_are_the_records_own_or_a_captioners():
    records = tiny_records()
    own = class_captions(records, per_class=2, seed=1)
    assert list(own) == ["blue", "green", "red"]
    assert own["red"] == ["a photo of a red square"] * 2
    seen = []

    def captioner(image):
        seen.append(image.size)
        return f"{image.width} wide"

    made = class_captions(records, captioner, per_class=2, classes=("red", "green", "blue"), seed=1)
    assert [len(v) for v in made.values()] == [2, 2, 2]
    assert len(seen) == 6
    assert {w for v in made.values() for w in v} == {f"{width} wide" for width, _ in seen}
    every = class_captions(records, captioner)
    assert [len(v) for v in every.values()] == [4, 4, 4]
    chosen = {tuple(class_captions(records, captioner, 2, seed=seed)["red"]) for seed in range(8)}
    assert len(chosen) > 1


def test_only_the_pictures_to_be_captioned_are_opened():
    opened = []

    def load(record):
        opened.append(record["id"])
        return {**record, "image": Image.new("RGB", (4, 4))}

    facts = [{"id": str(i), "image": i, "label": "ab"[i % 2], "caption": f"c{i}"} for i in range(8)]
    records = Records(8, lambda i: dict(facts[i]), load=load)
    own = class_captions(records, per_class=1)
    assert not opened
    made = class_captions(records, lambda image: "seen", per_class=1)
    assert made == {"a": ["seen"], "b": ["seen"]}
    assert [f"c{i}" for i in opened] == sorted([*own["a"], *own["b"]])


# Weights


def test_without_captions_and_divergence_it_is_tip_adapter():
    f, labels, text, captions = shots()
    judge = CapsAdapter(alpha=1.3, beta=4.0, gamma=0.0, delta=0.0)
    judge.fit_features(f, labels, text, captions=captions, scale=20.0)
    test = rows(9, 12, seed=5)
    assert torch.equal(
        judge.predict_features(test).scores, tip_adapter_logits(20.0 * test @ text.T, test, f, labels, 1.3, 4.0)
    )


def test_validation_pictures_decide_and_give_the_statistics():
    f, labels, text, captions = shots()
    held, truth = rows(30, 12, seed=6), torch.arange(30) % 3
    judge = CapsAdapter().fit_features(f, labels, text, captions=captions, validation=(held, truth), scale=20.0)
    support = Support(f, labels, captions)
    choice = search_m_adapter(compare(held, text, support, scale=20.0), labels, truth)
    assert (judge.alpha_, judge.beta_, judge.gamma_, judge.delta_) == tuple(choice.weights)
    assert judge.reference_ == tuple(choice.reference)
    assert judge.validation_accuracy_ == choice.accuracy
    test = rows(9, 12, seed=5)
    wanted = m_adapter_logits(test, text, support, *choice.weights, scale=20.0, reference=choice.reference)
    assert torch.equal(judge.predict_features(test).scores, wanted)


def test_shots_are_cross_validated():
    f, labels, text, captions = shots(noise=1.0)
    judge = CapsAdapter(folds=3, seed=2).fit_features(f, labels, text, captions=captions, scale=2.0)
    found, (rows_, counted) = Support(f, labels, captions), held_out(labels, folds_of(labels, 3, 2))
    choice = search_m_adapter(compare(f[rows_], text, found, scale=2.0), labels, labels[rows_], counted=counted)
    assert (judge.alpha_, judge.beta_, judge.gamma_, judge.delta_) == tuple(choice.weights)
    assert judge.validation_accuracy_ == choice.accuracy
    noise = CapsAdapter().fit_features(rows(18, 12, seed=3), labels, text, captions=rows(18, 12, seed=4))
    assert noise.validation_accuracy_ < 0.7  # no shot recognises itself


@pytest.mark.parametrize("judge", [CapsAdapter(folds=0), CapsAdapter()])
def test_without_anything_to_validate_on_the_weights_are_label_free(judge):
    judge.fit_features(*shots(each=1)[:3], captions=shots(each=1)[3])
    assert (judge.alpha_, judge.beta_, judge.gamma_, judge.delta_) == tuple(LABEL_FREE) == (1.0, 5.5, 0.0, 0.5)
    assert judge.validation_accuracy_ is None


def test_given_weights_stay():
    f, labels, text, captions = shots()
    judge = CapsAdapter(alpha=2.0, delta=0.35).fit_features(f, labels, text, captions=captions)
    assert (judge.alpha_, judge.delta_) == (2.0, 0.35)
    assert judge.beta_ in GRIDS["coarse"].betas
    free = CapsAdapter(beta=9.0, gamma=2.0, folds=0).fit_features(f, labels, text, captions=captions)
    assert (free.alpha_, free.beta_, free.gamma_, free.delta_) == (1.0, 9.0, 2.0, 0.5)
    assert free.reference_[1][1] > 0  # ranges of the support among itself
    assert CapsAdapter(grid="paper", beta=1.0, delta=0.5).fit_features(f, labels, text, captions=captions).alpha_ >= 0.1


def test_without_captions_there_is_no_delta():
    f, labels, text, _ = shots()
    for judge in (CapsAdapter(), CapsAdapter(folds=0)):
        assert judge.fit_features(f, labels, text).delta_ == 0
    with pytest.raises(ValueError, match=r"delta=0.5 mixes caption keys in, but there are none"):
        CapsAdapter(delta=0.5).fit_features(f, labels, text)


def test_captions_that_tell_classes_apart_are_used_where_pictures_do_not():
    """Pictures of the support are noise, their captions are not: cross-modal keys carry what there is."""
    _, labels, _, captions = shots(each=8, noise=0.8)
    held, truth, _, _ = shots(each=20, noise=0.8, seed=7)
    mute = rows(3, 12, seed=92)  # class names that say nothing
    settings = {"captions": captions, "validation": (held, truth), "scale": 1.0}
    judge = CapsAdapter().fit_features(rows(24, 12, seed=8), labels, mute, **settings)
    alone = CapsAdapter(delta=0.0).fit_features(rows(24, 12, seed=8), labels, mute, **settings)
    assert judge.delta_ > 0.4
    assert judge.validation_accuracy_ > alone.validation_accuracy_ + 0.1


@pytest.mark.parametrize(("setting", "value"), [("kl_space", "feature"), ("temp", 0.1), ("normalise_modalities", True)])
def test_settings_reach_the_equations(setting, value):
    f, labels, text, captions = shots()
    weights = {"alpha": 3.0, "beta": 4.0, "gamma": 5.0, "delta": 0.5}
    judge = CapsAdapter(**weights, **{setting: value}).fit_features(f, labels, text, captions=captions, scale=20.0)
    test, support = rows(9, 12, seed=5), Support(f, labels, captions)
    reference = Reference(*judge.reference_)
    wanted = m_adapter_logits(test, text, support, **weights, scale=20.0, reference=reference, **{setting: value})
    assert torch.equal(judge.predict_features(test).scores, wanted)
    plain = m_adapter_logits(test, text, support, **weights, scale=20.0, reference=reference)
    assert not torch.allclose(wanted, plain, atol=1e-4)


# From pictures


@pytest.mark.parametrize("family", FAMILIES)
def test_shots_and_their_captions_are_the_support(family):
    encoder, records = FAMILIES[family](), tiny_records()
    del records[3]["caption"]  # a red one: the prompt alone stands for it
    judge = CapsAdapter(views=2, seed=1).fit(encoder, records)
    plain, views = encode_views(encoder, records, 2, seed=1)
    prompts = [captioned_prompt(r["label"], r.get("caption")) for r in records]
    assert prompts[3] == "A photo of red."
    assert_close(judge.image_keys_, normalize(views.mean(0), dim=-1))
    assert_close(judge.caption_keys_, encoder.encode_texts(prompts))
    assert judge.classes_ == ("blue", "green", "red")
    assert_close(judge.text_, zero_shot_head(encoder, ("blue", "green", "red")))
    assert judge.scale_ == pytest.approx(float(encoder.scale.detach()))
    assert judge.trained_parameters_ == 0
    zero = CapsAdapter(alpha=0.0, gamma=0.0, views=0).fit(encoder, records)
    with torch.no_grad():
        assert_close(zero.predict_features(plain).scores, encoder.logits(plain, judge.text_))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_generated_support(family):
    encoder, records = FAMILIES[family](), tiny_records()
    support = build_support(class_captions(records), painter(), encoder, n=3)
    judge = CapsAdapter().fit_support(encoder, support, validation=records)
    assert judge.validation_accuracy_ is not None
    assert judge.encoder_ is encoder
    assert torch.equal(judge.image_keys_, support.image_keys)
    free = CapsAdapter().fit_support(encoder, support)
    assert (free.alpha_, free.beta_, free.gamma_, free.delta_) == tuple(LABEL_FREE)
    some = CapsAdapter().fit_support(encoder, support, validation=[r for r in records if r["label"] != "red"])
    assert some.classes_ == ("blue", "green", "red")  # validation need not show every class
    said = judge.predict(encoder.preprocess([r["image"] for r in records]))
    assert said.scores.shape == (12, 3)


def test_saved_and_opened_it_answers_the_same(tmp_path):
    encoder, records = clip_encoder(), tiny_records()
    support = build_support(class_captions(records), painter(), encoder, n=3)
    judge = CapsAdapter(gamma=2.0, normalise_modalities=True).fit_support(encoder, support, validation=records)
    judge.save(tmp_path / "judge")
    again = load_predictor(tmp_path / "judge", encoder)
    pixels = encoder.preprocess([r["image"] for r in records])
    assert torch.equal(again.predict(pixels).scores, judge.predict(pixels).scores)
    assert again.get_params() == judge.get_params()


# Mistakes


def test_bad_settings_are_named_before_any_picture_is_opened():
    records = [{"image": "nowhere.png", "label": name} for name in "xy"]
    for judge, message in [
        (CapsAdapter(alpha=-1.0), "alpha=-1.0: it must not be negative"),
        (CapsAdapter(delta=2.0), r"delta=2.0: it must lie in \[0, 1\]"),
        (CapsAdapter(grid="fine"), "grid='fine': choose from coarse, paper"),
        (CapsAdapter(prompt="A photo. "), r"prompt='A photo. ' has no \{\}"),
        (CapsAdapter(temp=0.0), "temp=0.0"),
        (CapsAdapter(kl_space="words"), "kl_space='words': choose 'class' or 'feature'"),
        (CapsAdapter(folds=-1), "folds=-1"),
        (CapsAdapter(templates="fotos"), "no template set"),
        (CapsAdapter(classes=("x", "z")), "none of the classes: 'y'"),
        (CapsAdapter(views=-1), "views must be 0 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            judge.fit(None, records)
        if "views" not in message and "classes" not in message:
            with pytest.raises(ValueError, match=message):
                judge.fit_support(None, Support(rows(2, 4), tensor([0, 1]), None, ("x", "y")))


def test_bad_supports_are_named():
    encoder, d = clip_encoder(), 24
    for support, message in [
        (Support(rows(2, d), tensor([0, 1])), "no class names"),
        (Support(rows(2, d), tensor([0, 0]), None, ("x", "y")), "no pictures of 'y'"),
        (Support(rows(2, d), tensor([0, 1]), rows(3, d), ("x", "y")), r"caption_keys must be \(2, 24\), got \(3, 24\)"),
        (Support(rows(2, 5), tensor([0, 1]), None, ("x", "y")), r"text must be \(2, 5\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            CapsAdapter().fit_support(encoder, support)
    fine = Support(rows(2, d), tensor([0, 1]), rows(2, d), ("x", "y"))
    with pytest.raises(ValueError, match="none of the classes: 'z'"):
        CapsAdapter().fit_support(None, fine, validation=[{"image": None, "label": "z"}])
    f, labels, text, captions = shots()
    with pytest.raises(ValueError, match=r"captions must be \(18, 12\), got \(17, 12\)"):
        CapsAdapter().fit_features(f, labels, text, captions=captions[:17])


def test_bad_captions_are_named():
    records = tiny_records()
    with pytest.raises(ValueError, match="per_class=0"):
        class_captions(records, per_class=0)
    with pytest.raises(ValueError, match="no pictures of 'pink' to caption"):
        class_captions(records, classes=("red", "green", "blue", "pink"))
    del records[5]["caption"]
    with pytest.raises(ValueError, match=r"record 'tiny-5' has no caption: give captioner="):
        class_captions(records)
    for change, message in [({"n": 0}, "n=0"), ({"prompt": "x"}, "has no {}")]:
        with pytest.raises(ValueError, match=message):
            build_support({"a": [], "b": []}, painter(), clip_encoder(), **change)
    with pytest.raises(ValueError, match="one class only"):
        build_support({"a": []}, painter(), clip_encoder())
