"""PerceptionCLIP against loops written from the paper, its exact identities, and its diagnostics."""

import math

import pytest
import torch
from torch import tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from ecliptic.core.zeroshot import zero_shot_head, zero_shot_probabilities
from ecliptic.data.shots import tiny_records
from ecliptic.eval.groups import group_accuracy
from ecliptic.methods.adapt.perceptionclip import (
    FACTORS,
    PerceptionClip,
    classify,
    compose,
    conditioned,
    context_embeddings,
    context_with_classes,
    context_without_classes,
    random_letters,
    sentence,
    wrong_context,
)
from tests.towers import FAMILIES, clip_encoder, siglip_encoder

PLACES = {"place": {"": [""], "mat": ["on a mat", "on mats"], "moon": ["on the moon"]}}
SIZES = {"size": {"any": [""], "small": ["small", "little"]}}


def some_scores(b=5, k=4, z=3, seed=0, spread=6.0):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(b, k, z, generator=generator, dtype=torch.float64)


def pixels_of(encoder):
    return encoder.preprocess([record["image"] for record in tiny_records()])


def fitted(encoder, factors=PLACES, **settings):
    return PerceptionClip(factors=factors, **settings).fit(encoder, tiny_records())


# The equations, as loops


def slow(scores, temperature, generic=None):
    """p(y|x) and p(z|x) by explicit sums over one picture's scores (K, Z)."""
    classes, contexts = scores.shape
    if generic is None:
        weight = [sum(math.exp(scores[y, z] / temperature) for y in range(classes)) for z in range(contexts)]
    else:
        weight = [math.exp(generic[z] / temperature) for z in range(contexts)]
    weight = [w / sum(weight) for w in weight]
    answer = []
    for y in range(classes):
        total = 0.0
        for z in range(contexts):
            total += weight[z] * math.exp(scores[y, z]) / sum(math.exp(scores[c, z]) for c in range(classes))
        answer.append(total)
    return answer, weight


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 10.0])
def test_both_steps_are_the_papers_sums(temperature):
    scores = some_scores()
    generic = some_scores(seed=1)[:, 0]
    with_y, without_y = context_with_classes(scores, temperature), context_without_classes(generic, temperature)
    for i in range(len(scores)):
        for log_context, told in ((with_y, None), (without_y, generic[i])):
            classes, context = slow(scores[i], temperature, told)
            assert_close(log_context[i].exp(), tensor(context, dtype=torch.float64))
            assert_close(classify(scores, log_context)[i].exp(), tensor(classes, dtype=torch.float64))


def test_two_classes_two_contexts_by_hand():
    # f = [[ln 3, 0], [0, 0]]: S_z = 4, 2, so p(z) = 2/3, 1/3; p(y=0|z) = 3/4, 1/2; p(y=0) = 2/3 * 3/4 + 1/3 * 1/2 = 2/3
    scores = tensor([[[math.log(3.0), 0.0], [0.0, 0.0]]])
    context = context_with_classes(scores)
    assert_close(context.exp(), tensor([[2 / 3, 1 / 3]]))
    assert_close(classify(scores, context).exp(), tensor([[2 / 3, 1 / 3]]))
    assert_close(conditioned(scores, tensor([0])).exp(), tensor([[0.75, 0.25]]))
    assert_close(conditioned(scores, tensor([1])).exp(), tensor([[0.5, 0.5]]))


def test_scores_of_a_hundred_do_not_overflow():
    for kind in (torch.float32, torch.bfloat16):
        scores = (100 * torch.sign(some_scores(seed=3))).to(kind)
        context = context_with_classes(scores, 0.5)
        assert classify(scores, context).isfinite().all()
        assert context.isfinite().all()


# Identities


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("infer", ["with_y", "without_y"])
def test_an_empty_description_is_plain_zero_shot(family, temperature, infer):
    encoder = FAMILIES[family]()
    with torch.no_grad():
        images = encoder.images(pixels_of(encoder)).pooled
    head = zero_shot_head(encoder, ("blue", "green", "red"), "a photo of a {}.")
    expected = zero_shot_probabilities(encoder, images, head)
    for factors in ({}, {"place": {"unspecified": [""]}}):
        judge = fitted(encoder, factors, temperature=temperature, infer=infer)
        assert_close(judge.predict(pixels_of(encoder)).scores, expected, rtol=0, atol=1e-6)
        assert_close(judge.predict_ensemble(images).scores, expected, rtol=0, atol=1e-6)
        assert_close(judge.perceive(pixels_of(encoder)).context, torch.ones(len(images), 1), rtol=0, atol=1e-6)


def test_a_hot_context_is_uniform_and_a_cold_one_certain():
    scores, generic = some_scores(), some_scores(seed=1)[:, 0]
    mean = torch.stack([conditioned(scores, torch.full((5,), z)).exp() for z in range(3)]).mean(0)
    for log_context in (context_without_classes(generic, math.inf), context_with_classes(scores, math.inf)):
        assert_close(log_context.exp(), torch.full((5, 3), 1 / 3, dtype=torch.float64))
        assert_close(classify(scores, log_context).exp(), mean)
    for log_context, best in (
        (context_without_classes(generic, 1e-3), generic.argmax(-1)),
        (context_with_classes(scores, 1e-3), scores.amax(1).argmax(-1)),  # log-sum-exp becomes the maximum over classes
    ):
        assert_close(log_context.exp(), torch.eye(3, dtype=torch.float64)[best])
        assert_close(classify(scores, log_context), conditioned(scores, best))


def test_a_value_given_twice_counts_twice_and_all_twice_changes_nothing():
    scores = some_scores()
    once, weights = context_with_classes(scores, 3.0), context_with_classes(scores, 3.0).exp()
    twice = torch.cat([scores, scores[..., :1]], -1)
    doubled = weights * tensor([2.0, 1.0, 1.0])
    expected = classify(scores, (doubled / doubled.sum(-1, keepdim=True)).log())
    assert_close(classify(twice, context_with_classes(twice, 3.0)), expected)
    every = torch.cat([scores, scores], -1)
    assert_close(classify(every, context_with_classes(every, 3.0)), classify(scores, once))


def test_the_same_words_twice_count_twice_in_the_whole_method():
    encoder = clip_encoder()
    both = {"place": {"": [""], "mat": ["on a mat"], "again": ["on a mat"]}}
    judge, single = fitted(encoder, both), fitted(encoder, {"place": {"": [""], "mat": ["on a mat"]}})
    context = judge.perceive(pixels_of(encoder)).context
    assert_close(context[:, 1], context[:, 2])
    ratio = single.perceive(pixels_of(encoder)).context
    assert_close(context[:, 1] / context[:, 0], ratio[:, 1] / ratio[:, 0])


def test_at_temperature_one_it_is_the_marginal_of_one_softmax_over_all_prompts():
    scores = some_scores()
    joint = scores.flatten(1).softmax(-1).reshape(scores.shape)
    context = context_with_classes(scores)
    assert_close(classify(scores, context).exp(), joint.sum(-1))
    assert_close(context.exp(), joint.sum(1))
    other = classify(scores, context_with_classes(scores, 3.0)).exp()
    assert float((other - joint.sum(-1)).abs().max()) > 0.01  # and at no other


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("infer", ["with_y", "without_y"])
def test_the_whole_method_is_the_loop_over_its_sentences(family, infer):
    encoder = FAMILIES[family]()
    judge = fitted(encoder, {**PLACES, **SIZES}, infer=infer, temperature=3.0)
    seen = judge.perceive(pixels_of(encoder))
    assert seen.classes.shape == (12, 3)
    assert seen.context.shape == (12, 6)
    for rows in seen:
        assert_close(rows.sum(-1), torch.ones(12), rtol=0, atol=1e-6)
    with torch.no_grad():
        images = encoder.images(pixels_of(encoder)).pooled.double()
    said = [
        [""],
        ["small", "little"],
        ["on a mat", "on mats"],
        ["on a mat, small", "on a mat, little", "on mats, small", "on mats, little"],
        ["on the moon"],
        ["on the moon, small", "on the moon, little"],
    ]
    scale = float(encoder.scale.detach())

    def score(word, z):
        texts = [f"a photo of a {word}{', ' + d if d else ''}." for d in said[z]]
        row = normalize(encoder.encode_texts(texts).double().mean(0), dim=-1)
        return scale * images @ row

    scores = torch.stack([torch.stack([score(w, z) for z in range(6)], -1) for w in ("blue", "green", "red")], 1)
    generic = torch.stack([score("object", z) for z in range(6)], -1)
    for i in range(0, 12, 5):
        classes, context = slow(scores[i], 3.0, generic[i] if infer == "without_y" else None)
        assert_close(seen.classes[i], tensor(classes), rtol=1e-4, atol=1e-5)
        assert_close(seen.context[i], tensor(context), rtol=1e-4, atol=1e-5)


def test_the_temperature_touches_the_context_alone():
    encoder = clip_encoder()
    features = normalize(torch.randn(6, encoder.dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    one, ten = (fitted(encoder, temperature=t) for t in (1.0, 10.0))
    given = tensor([0, 1, 2, 0, 1, 2])
    assert torch.equal(one.predict_given(features, given).scores, ten.predict_given(features, given).scores)
    assert not torch.equal(one.perceive_features(features).context, ten.perceive_features(features).context)


def test_logit_bias_cancels():
    encoder = siglip_encoder()
    before = fitted(encoder).predict(pixels_of(encoder)).scores
    with torch.no_grad():
        encoder.model.logit_bias.fill_(3.0)
    assert torch.equal(fitted(encoder).predict(pixels_of(encoder)).scores, before)


def test_many_pictures_are_answered_in_parts(monkeypatch):
    encoder = clip_encoder()
    judge, pixels = fitted(encoder, infer="without_y"), pixels_of(encoder)
    whole = judge.perceive(pixels)
    features = encoder.encode_images([record["image"] for record in tiny_records()])
    given = judge.predict_given(features, torch.arange(12) % 3).scores
    monkeypatch.setattr("ecliptic.methods.adapt.perceptionclip.SCORES", 45)  # five pictures of 3 classes in 3 contexts
    assert_close(judge.perceive(pixels), whole)
    assert_close(judge.predict_given(features, torch.arange(12) % 3).scores, given)


# Words


def test_contexts_are_combined_with_every_synonym():
    found = compose({**PLACES, **SIZES})
    assert [context.names for context in found] == [
        ("", "any"), ("", "small"), ("mat", "any"), ("mat", "small"), ("moon", "any"), ("moon", "small"),
    ]  # fmt: skip
    assert found[0].descriptions == ("",)
    assert found[3].descriptions == ("on a mat, small", "on a mat, little", "on mats, small", "on mats, little")
    turned = compose({**SIZES, **PLACES})
    assert turned[4].descriptions == ("small, on a mat", "small, on mats", "little, on a mat", "little, on mats")
    assert compose({}) == (((), ("",)),)
    for factor, values in FACTORS.items():
        assert any("" in synonyms for synonyms in values.values()), f"{factor} cannot be left unsaid"
    assert len(compose(FACTORS)) == math.prod(len(values) for values in FACTORS.values())


def test_sentences():
    assert sentence("a photo of a {}", "duck", "on water") == "a photo of a duck, on water."
    assert sentence("a photo of a {}", "duck", "") == "a photo of a duck."
    assert sentence("a photo of a {}, a type of bird", "{wren}", "") == "a photo of a {wren}, a type of bird."


def test_embeddings_are_class_major_and_average_synonyms_in_any_order():
    encoder = clip_encoder()
    contexts = compose(PLACES)
    rows = context_embeddings(encoder, ["cat", "dog"], contexts)
    assert rows.shape == (2, 3, encoder.dim)
    assert_close(rows[1, 2], encoder.encode_texts(["a photo of a dog, on the moon."])[0])
    both = encoder.encode_texts(["a photo of a cat, on a mat.", "a photo of a cat, on mats."])
    assert_close(rows[0, 1], normalize(both.mean(0), dim=-1))
    turned = compose({"place": {"mat": ["on mats", "on a mat"]}})
    assert_close(context_embeddings(encoder, ["cat"], turned)[0, 0], rows[0, 1])


def test_embeddings_do_not_depend_on_how_many_are_encoded_at_a_time(monkeypatch):
    encoder = clip_encoder()
    whole = context_embeddings(encoder, ["cat", "dog", "cup"], compose(PLACES))
    monkeypatch.setattr("ecliptic.methods.adapt.perceptionclip.SENTENCES", 5)
    assert_close(context_embeddings(encoder, ["cat", "dog", "cup"], compose(PLACES)), whole)


# Diagnostics


def test_random_letters_keep_the_form_and_nothing_else():
    found = random_letters(PLACES, seed=1)
    assert found["place"][""] == [""]
    assert [len(word) for word in found["place"]["mat"][0].split()] == [2, 1, 3]
    assert found["place"]["moon"][0] != "on the moon"
    assert found == random_letters(PLACES, seed=1)
    assert found != random_letters(PLACES, seed=2)
    assert compose(found)  # can be used as factors


def test_a_wrong_context_is_never_the_true_one_and_any_other():
    truth = torch.arange(3000) % 3
    wrong = wrong_context(truth, 3, seed=0)
    assert not (wrong == truth).any()
    assert set(((wrong - truth) % 3).tolist()) == {1, 2}
    assert 0.45 < float(((wrong - truth) % 3 == 1).double().mean()) < 0.55
    assert torch.equal(wrong_context(tensor([0, 1]), 2), tensor([1, 0]))
    with pytest.raises(ValueError, match="only one context"):
        wrong_context(truth, 1)


def shortcut_space(n=400, seed=0):
    """Pictures = class + strong background + noise; prompts that name the background carry it, plain ones half of one's.

    Class 0 is thought to go with background 0: its plain prompt leans there, as after training on such pairs.
    """
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    kind, ground = axes[:2], axes[2:4]
    label, place = torch.arange(n) % 2, torch.arange(n) // 2 % 2
    noise = 0.1 * torch.randn(n, 16, generator=generator)
    pictures = normalize(kind[label] + 2 * ground[place] + noise, dim=-1)
    plain = normalize(kind + 0.8 * ground, dim=-1)[:, None]
    told = normalize(kind[:, None] + 0.2 * ground[:, None] + 2 * ground[None], dim=-1)
    return pictures, label, place, torch.cat([plain, told], 1)


def test_stating_the_background_explains_a_shortcut_away():
    pictures, label, place, text = shortcut_space()
    scores = 30 * torch.einsum("bd,kzd->bkz", pictures, text)

    def worst(log_probabilities):
        return group_accuracy(log_probabilities.argmax(-1) == label, place, label).worst

    assert worst(scores[..., 0]) < 0.1
    two_step = classify(scores[..., 1:], context_with_classes(scores[..., 1:]))
    assert worst(two_step) > 0.9
    right, wrong = (conditioned(scores, 1 + given) for given in (place, wrong_context(place, 2)))
    assert worst(right) > 0.9
    rows = torch.arange(len(label))
    assert float(wrong[rows, label].mean()) < 3 * float(right[rows, label].mean())  # log probabilities of the truth
    assert bool((context_with_classes(scores[..., 1:]).argmax(-1) == place).all())


# Choosing the temperature


def test_the_temperature_is_chosen_on_other_pictures():
    encoder = clip_encoder()
    judge = PerceptionClip(factors=PLACES, temperature=None, grid=(1.0, 3.0)).fit(
        encoder, tiny_records(), tiny_records()
    )
    truth = tensor([("blue", "green", "red").index(record["label"]) for record in tiny_records()])
    for value, reached in judge.validation_accuracy_.items():
        alone = fitted(encoder, temperature=value)
        hits = alone.predict(pixels_of(encoder)).scores.argmax(-1) == truth
        assert reached == pytest.approx(float(hits.double().mean()))
    assert judge.temperature_ == max(judge.validation_accuracy_, key=judge.validation_accuracy_.get)
    assert judge.temperature is None  # the setting stays what it was


def test_average_and_worst_group_can_choose_differently():
    # Hot contexts are right on the many, cold ones on the few: three classes' worth of scores made by hand.
    judge = fitted(clip_encoder(), {"place": {"a": ["on a mat"], "b": ["on the moon"]}}, grid=(0.1, 100.0))
    rows = normalize(torch.randn(60, judge.text_.shape[-1], generator=torch.Generator().manual_seed(0)), dim=-1)
    answers = {t: fitted(clip_encoder(), judge.factors, temperature=t).predict_features(rows) for t in judge.grid}
    cold, hot = (answers[t].scores.argmax(-1) for t in judge.grid)
    differ = (cold != hot).nonzero()[:, 0]
    assert len(differ) >= 2
    same = (cold == hot).nonzero()[:, 0][:3]
    chosen = torch.cat([differ[:1].repeat(3), differ[1:2], same])
    truth = torch.cat([hot[differ[:1]].repeat(3), cold[differ[1:2]], cold[same]])
    # on average hot wins (3 against 1); the group of the one picture that cold alone gets right decides the worst
    assert judge.select(rows[chosen], truth).value == 100.0
    group = ["many"] * 3 + ["few"] + ["many"] * 3
    accuracy = judge.select(rows[chosen], truth, group).accuracy
    assert accuracy[100.0] == 0.0
    by_hand = group_accuracy((cold[chosen] == truth).double().numpy(), group, truth.tolist()).worst
    assert accuracy[0.1] == pytest.approx(by_hand)


def test_equals_go_to_the_first_of_the_grid():
    judge = fitted(clip_encoder(), {}, grid=(3.0, 1.0, 10.0))  # without factors no temperature matters
    rows = normalize(torch.randn(5, judge.text_.shape[-1], generator=torch.Generator().manual_seed(0)), dim=-1)
    assert judge.select(rows, tensor([0, 1, 2, 0, 1])).value == 3.0


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "a photo"}, "no {}"),
        ({"template": "a photo of a {}."}, "full stop"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": None}, "validation"),
        ({"grid": (1.0, -1.0)}, "temperature=-1.0"),
        ({"infer": "both"}, "with_y"),
        ({"factors": ["land", "water"]}, "factors must map"),
        ({"factors": {"background": ["on land"]}}, "factor 'background'"),
        ({"factors": {"background": {}}}, "factor 'background'"),
        ({"factors": {"background": {"land": "on land"}}}, "'land': give a list"),
        ({"factors": {"background": {"land": []}}}, "'land': give a list"),
        ({"factors": {"background": {"land": ["on land."]}}}, "bare text"),
        ({"factors": {"background": {"land": [" on land"]}}}, "bare text"),
        ({"classes": ("cat", "cat")}, "twice"),
    ],
)
def test_wrong_settings_say_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        PerceptionClip(**settings).fit(clip_encoder(), tiny_records())


def test_wrong_values_say_what_is_wrong():
    judge = fitted(clip_encoder())
    with pytest.raises(ValueError, match="call fit"):
        PerceptionClip().predict_features(torch.ones(1, 4))
    with pytest.raises(ValueError, match="features must be"):
        judge.predict_features(torch.ones(1, 4))
    rows = normalize(torch.ones(2, judge.text_.shape[-1]), dim=-1)
    with pytest.raises(ValueError, match=r"0\.\.2"):
        judge.predict_given(rows, tensor([0, 3]))
    with pytest.raises(ValueError, match="integers"):
        conditioned(some_scores(2), tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="give both or neither"):
        PerceptionClip().fit(clip_encoder(), tiny_records(), tiny_records())


def test_pairs_are_not_needed_where_classes_are_named():
    judge = PerceptionClip(("cat", "dog"), PLACES).fit(clip_encoder())
    assert judge.classes_ == ("cat", "dog")
    assert judge.contexts_ == (("",), ("mat",), ("moon",))
