"""MoCoOp against loops in float64, its identities, and its paths on every kind of tower."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import eye, tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from ecliptic.core.batches import collate
from ecliptic.core.prompt_classifier import NOTHING, LearntContext, PromptClassifier, logit_scale
from ecliptic.core.train import Train
from ecliptic.data.shots import tiny_records
from ecliptic.methods.adapt.mocoop import (
    GROUPS,
    MoCoOp,
    PromptMixture,
    gate_loss,
    gate_target,
    hard_prototypes,
    mixed_logits,
    mixing_weights,
    split_template,
    text_to_text_loss,
    vision_norms,
)
from tests.towers import DIM, FAMILIES, clip_encoder, siglip_encoder

NAMES = ("red", "green", "blue")
TEMPLATES = ("a satellite photo of a {}.", "{} texture", "a photo of the {}, pixelated.", "a drawing of a {} on a mat")
SINGLE = tuple((template,) for template in TEMPLATES)


@pytest.fixture(params=FAMILIES)
def encoder(request):
    return FAMILIES[request.param]()


def random(*shape, seed=0, unit=True):
    found = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(found, dim=-1) if unit else found


def shaken(mixture, seed=1, by=0.1):
    """Off its start, so that nothing is zero or equal by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in mixture.parameters():
            value += by * torch.randn(value.shape, generator=generator)
    return mixture


# The mathematics


def test_weights_are_a_softmax_over_the_best_and_nothing_else():
    routes = random(40, 5, unit=False)
    found = mixing_weights(routes, 2)
    for row, weights in zip(routes.tolist(), found.tolist(), strict=True):
        first, second = sorted(row)[-1], sorted(row)[-2]
        total = math.exp(first) + math.exp(second)
        for r, a in zip(row, weights, strict=True):
            assert a == pytest.approx(math.exp(r) / total if r >= second else 0.0, abs=1e-12)
        assert sum(a != 0 for a in weights) == 2
    assert_close(found.sum(-1), torch.ones(40, dtype=torch.float64))
    assert_close(mixing_weights(routes, 5), routes.softmax(-1))


def test_logits_mix_features_without_making_them_unit_again():
    image, experts, weights = random(4, DIM), random(3, 5, DIM, seed=1), random(4, 3, seed=2).abs()
    found = mixed_logits(image, experts, weights, 7.0)
    for b in range(4):
        for c in range(5):
            mixed = sum(weights[b, g] * experts[g, c] for g in range(3))
            assert float(found[b, c]) == pytest.approx(7.0 * float(image[b] @ mixed), abs=1e-10)


def test_the_order_of_experts_does_not_matter():  # invariant 3
    image, experts, routes = random(6, DIM), random(5, 4, DIM, seed=1), random(6, 5, seed=2, unit=False)
    order = [3, 0, 4, 1, 2]
    straight = mixed_logits(image, experts, mixing_weights(routes, 2), 10.0)
    assert_close(mixed_logits(image, experts[order], mixing_weights(routes[:, order], 2), 10.0), straight)


def test_gate_target_by_hand_and_by_loops():
    image, hard, labels = random(6, DIM), random(5, 3, DIM, seed=1), tensor([0, 1, 2, 0, 1, 2])
    found = gate_target(image, hard, labels)
    for b, y in enumerate(labels.tolist()):
        s = [float(image[b] @ hard[g, y]) for g in range(5)]
        best = sorted(range(5), key=lambda g: s[g])[-2:]
        lifted = [math.exp(v + 10 * (g in best)) for g, v in enumerate(s)]
        assert_close(found[b], tensor(lifted, dtype=torch.float64) / sum(lifted))
    routes = random(6, 5, seed=3, unit=False)
    expected = 0.0
    for b in range(6):
        total = math.log(sum(math.exp(r) for r in routes[b].tolist()))
        expected -= sum(float(found[b, g]) * (float(routes[b, g]) - total) for g in range(5)) / 6
    assert float(gate_loss(routes, found)) == pytest.approx(expected)


def test_two_groups_share_the_gates_target():  # invariant 4
    for groups in (2, 5, 30):
        q = gate_target(random(50, DIM), random(groups, 4, DIM, seed=groups), torch.arange(50) % 4)
        assert_close(q.sum(-1), torch.ones(50, dtype=torch.float64))
        assert float(q.topk(2).values.sum(-1).min()) >= 0.999


def test_gradients_reach_the_picture_through_the_target():  # as in the official code, which does not detach it
    image = random(3, DIM).requires_grad_()
    routes = random(3, 4, seed=5, unit=False)
    gate_loss(routes, gate_target(image, random(4, 2, DIM, seed=1), tensor([0, 1, 0]))).backward()
    assert image.grad.abs().sum() > 0


def test_orthonormal_classes_met_exactly_leave_this_much():  # invariant 5
    for classes in (3, 16):
        rows = eye(classes, dtype=torch.float64).repeat(4, 1, 1)
        expected = math.log(math.e + classes - 1) - 1
        assert float(text_to_text_loss(rows, rows)) == pytest.approx(expected)


def test_text_loss_by_loops_and_no_gradient_to_the_prototypes():
    experts, hard = random(3, 5, DIM).requires_grad_(), random(3, 5, DIM, seed=1).requires_grad_()
    expected = 0.0
    for g in range(3):
        for c in range(5):
            cosines = [float((experts[g, c] @ hard[g, other]).detach()) for other in range(5)]
            expected += (math.log(sum(map(math.exp, cosines))) - cosines[c]) / 15
    loss = text_to_text_loss(experts, hard)
    assert float(loss.detach()) == pytest.approx(expected)
    loss.backward()
    assert experts.grad.abs().sum() > 0
    assert hard.grad is None


# Templates and tokens


def test_contexts_are_counted_in_tokens(encoder):
    for template in TEMPLATES:
        shape = split_template(encoder, template)
        whole = encoder.tokenizer(template.replace("{}", "thing"), add_special_tokens=False)["input_ids"]
        parts = [len(part) for part in (shape.before, shape.after, shape.stop)]
        name = whole[parts[0] : len(whole) - parts[1] - parts[2]]
        assert [*shape.before, *name, *shape.after, *shape.stop] == whole
    assert len(split_template(encoder, TEMPLATES[0]).before) > 4  # a "satellite" has several
    assert split_template(encoder, TEMPLATES[1]).before == []
    assert [len(split_template(encoder, t).stop) for t in TEMPLATES] == [1, 0, 1, 0]


def test_a_template_that_runs_into_the_name_is_refused():
    known: dict[str, int] = {}

    def whole_words(texts, **_):
        return {"input_ids": [[known.setdefault(word, len(known)) for word in text.split()] for text in texts]}

    encoder = SimpleNamespace(tokenizer=whole_words)
    shape = split_template(encoder, "a photo of {} on a mat .")
    assert [len(part) for part in (shape.before, shape.after, shape.stop)] == [3, 3, 1]
    for template in ("an un{} cat", "{}s", "a {}-like cat", "a cat or {}."):
        with pytest.raises(ValueError, match="run into one another: put spaces around"):
            split_template(encoder, template)


def test_at_the_start_each_expert_is_its_template(encoder):  # invariant 1
    names = (*NAMES, "satellite", "a small dog")
    mixture = PromptMixture(names, SINGLE, top_k=2).bind(encoder)
    with torch.no_grad():
        found = mixture.experts(encoder)
    for g, template in enumerate(TEMPLATES):
        expected = encoder.encode_texts([template.replace("{}", name) for name in names])
        assert_close(found[g], expected, atol=1e-5, rtol=0)
    assert_close(found, mixture.hard, atol=1e-5, rtol=0)


def test_prototypes_are_means_of_unit_prompts():
    encoder, group = clip_encoder(), ("a photo of a {}.", "a drawing of a {}.", "{}")
    found = hard_prototypes(encoder, NAMES, (group, group[:1]))
    for c, name in enumerate(NAMES):
        rows = [encoder.encode_texts([template.replace("{}", name)])[0] for template in group]
        assert_close(found[0, c], normalize(sum(rows) / 3, dim=0))
        assert_close(found[1, c], rows[0])


def test_what_is_learnt_stands_where_it_belongs():
    """Turning one context into another template's words makes that template's features."""
    encoder = clip_encoder()
    mixture = PromptMixture(NAMES, (("a photo of a {} on the mat.",),), top_k=1).bind(encoder)
    other = PromptMixture(NAMES, (("a drawing of a {} and red ball.",),), top_k=1).bind(encoder)
    lengths = [(len(m.before[0]), len(m.after[0])) for m in (mixture, other)]
    assert lengths[0] == lengths[1], lengths
    mixture.load_state_dict(other.state_dict())
    with torch.no_grad():
        found = mixture.experts(encoder)[0]
    assert_close(found, encoder.encode_texts([f"a drawing of a {name} and red ball." for name in NAMES]))


# The objective


def views_of(mixture, encoder):
    return mixture.encode(encoder, collate(encoder, tiny_records(), mixture))


def test_losses_are_the_three_of_the_paper(encoder):
    mixture = shaken(PromptMixture(NAMES, SINGLE, ("yellow",)).bind(encoder))
    views = views_of(mixture, encoder)
    found = {name: term.detach() for name, term in mixture.terms(views).items()}
    image, experts, hard = (x.detach().double() for x in (views["image"].pooled, views.classes, mixture.hard))
    weight, bias = (p.detach().double() for p in (mixture.router.weight, mixture.router.bias))
    scale = float(logit_scale(encoder.scale.detach(), encoder.bias))
    assert scale == (100.0 if encoder.bias is None else pytest.approx(math.exp(4.0)))
    classes = gate = 0.0
    for b, record in enumerate(tiny_records()):
        y = NAMES.index(record["label"])
        routes = weight @ image[b] + bias
        best = routes.argsort()[-2:]
        a = routes[best].softmax(0)
        logits = scale * torch.stack(
            [image[b] @ sum(a[k] * experts[g, c] for k, g in enumerate(best)) for c in range(3)]
        )
        classes += float(logits.logsumexp(0) - logits[y]) / 12
        s = hard[:, y] @ image[b]
        s[s.argsort()[-2:]] += 10
        gate -= float(s.softmax(0) @ routes.log_softmax(0)) / 12
    text = -(experts @ hard.transpose(1, 2)).log_softmax(-1).diagonal(dim1=1, dim2=2).mean()
    assert float(found["classes"]) == pytest.approx(classes, rel=1e-4, abs=1e-4)
    assert float(found["gate"]) == pytest.approx(gate, rel=1e-4)
    assert float(found["text_to_text"]) == pytest.approx(5 * float(text), rel=1e-4)
    assert experts.shape == (4, 4, DIM)


def test_weight_zero_leaves_a_term_out():
    encoder = clip_encoder()
    mixture = PromptMixture(NAMES, SINGLE, ("yellow",), text_weight=0.0, gate_weight=0.0).bind(encoder)
    assert set(mixture.terms(views_of(mixture, encoder))) == {"classes"}
    assert mixture.hard.shape[1] == 3  # only the text-to-text loss reads further names
    doubled = PromptMixture(NAMES, SINGLE, ("yellow",), text_weight=10.0, gate_weight=2.0).bind(encoder)
    usual = PromptMixture(NAMES, SINGLE, ("yellow",)).bind(encoder)
    twice, once = (m.terms(views_of(m, encoder)) for m in (doubled, usual))
    for name in ("gate", "text_to_text"):
        assert_close(twice[name], 2 * once[name])


def test_one_group_alone_is_coop(encoder):  # invariant 2
    words = len(split_template(encoder, "a photo of a {}.").before)
    settings = {"top_k": 1, "text_weight": 0.0, "gate_weight": 0.0, "correction": False}
    mixture = PromptMixture(NAMES, (("a photo of a {}.",),), **settings).bind(encoder)
    coop = LearntContext(NAMES, words, "a photo of a").bind(encoder)
    shaken(mixture.before)
    with torch.no_grad():
        coop.context.copy_(mixture.before[0])
    terms = []
    for objective in (mixture, coop):
        found = next(iter(objective.terms(views_of(objective, encoder)).values()))
        found.backward()
        terms.append(found.detach())
    assert_close(*terms, rtol=1e-4, atol=1e-4)
    assert_close(mixture.before[0].grad, coop.context.grad, rtol=1e-3, atol=1e-4)
    shaken(mixture.router, by=3.0)
    assert_close(mixture.terms(views_of(mixture, encoder))["classes"].detach(), terms[0], rtol=1e-4, atol=1e-4)


def test_chunks_change_neither_loss_nor_gradient(encoder):
    found = []
    for chunk in (256, 5, 1):
        mixture = shaken(PromptMixture(NAMES, SINGLE, ("yellow",), chunk=chunk).bind(encoder))
        sum(mixture.terms(views_of(mixture, encoder)).values()).backward()
        found.append([p.grad for p in mixture.parameters()])
    for part in found[1:]:
        for one, other in zip(found[0], part, strict=True):
            assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_gradients_reach_all_that_is_learnt(encoder):
    mixture = shaken(PromptMixture(NAMES, SINGLE).bind(encoder))
    sum(mixture.terms(views_of(mixture, encoder)).values()).backward()
    for name, value in mixture.named_parameters():
        assert value.numel() == 0 or value.grad.abs().sum() > 0, name
    assert not PromptMixture(NAMES, SINGLE, correction=False).bind(encoder).correction.requires_grad


def test_the_router_keeps_its_precision_under_autocast():
    mixture = PromptMixture(NAMES, SINGLE).bind(clip_encoder())
    image = random(8, DIM).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = mixture.routes(image)
    assert found.dtype == torch.float32
    assert torch.equal(found, mixture.router(image))


def test_the_trainer_trains_it_with_frozen_towers():
    encoder = clip_encoder()
    trained = Train(
        PromptMixture(NAMES, SINGLE), steps=4, batch_size=6, lr=0.05, optimizer="sgd", trainable=NOTHING
    ).run(encoder, tiny_records())
    assert all(torch.equal(value, trained.encoder.state_dict()[name]) for name, value in encoder.state_dict().items())
    start = PromptMixture(NAMES, SINGLE).bind(encoder).state_dict()
    moved = {name for name, value in trained.objective.state_dict().items() if not torch.equal(value, start[name])}
    assert moved == {name for name, value in start.items() if value.numel()}


# The predictor


def judge(**settings):
    return MoCoOp(**({"groups": SINGLE, "extra_classes": ("yellow",), "epochs": 4, "batch_size": 6} | settings))


def pixels_of(encoder):
    return encoder.preprocess([record["image"] for record in tiny_records()])


def features_of(encoder):
    labels = tensor([NAMES.index(record["label"]) for record in tiny_records()])
    return encoder.encode_images([record["image"] for record in tiny_records()]), labels


@pytest.mark.parametrize(
    "make", [clip_encoder, siglip_encoder]
)  # the random dual encoder's pictures are nearly all the same
def test_it_learns(make):
    encoder = make()
    features, labels = features_of(encoder)

    def loss(found):
        return float(torch.nn.functional.cross_entropy(found.predict_features(features).scores, labels))

    start = judge(lr=0.0).fit_features(encoder, features, labels, classes=NAMES)
    learnt = judge(epochs=30, lr=0.1).fit_features(encoder, features, labels, classes=NAMES)
    assert loss(learnt) < 0.7 * loss(start)


def test_unlearnt_and_alone_it_is_zero_shot(encoder):
    """One group, nothing trained: the prompts as they are written, tau * cosine."""
    found = judge(groups=SINGLE[:1], top_k=1, lr=0.0, epochs=1).fit(encoder, tiny_records())
    zero_shot = PromptClassifier(("blue", "green", "red"), TEMPLATES[0]).bind(encoder)
    with torch.no_grad():
        views = zero_shot.encode(encoder, collate(encoder, tiny_records(), zero_shot))
    scale = logit_scale(encoder.scale.detach(), encoder.bias)
    expected = scale * views["image"].pooled @ views.classes.T
    assert_close(found.predict(pixels_of(encoder)).scores, expected, rtol=1e-3, atol=1e-3)


def test_features_and_pictures_teach_the_same(encoder):
    features, labels = features_of(encoder)
    one = judge(classes=NAMES).fit(encoder, tiny_records())
    two = judge().fit_features(encoder, features, labels, classes=NAMES)
    assert_close(one.predict(pixels_of(encoder)).scores, two.predict_features(features).scores, rtol=1e-3, atol=1e-3)
    shapes = [split_template(encoder, template) for template in TEMPLATES]
    width = encoder.anatomy.text.width
    words = sum(len(shape.before) + len(shape.after) for shape in shapes)
    assert one.trained_parameters_ == width * words + 4 * DIM + 4 + DIM
    assert judge(correction=False).fit(encoder, tiny_records()).trained_parameters_ == one.trained_parameters_ - DIM


def test_other_classes_by_name_alone(encoder, tmp_path):  # invariant 6
    found = judge(lr=0.1).fit(encoder, tiny_records())
    before = {name: value.clone() for name, value in found.state_.items()}
    names = ("yellow", "a small dog")
    other = found.for_classes(names)
    assert other.classes_ == names
    assert found.classes_ == ("blue", "green", "red")
    assert all(torch.equal(other.state_[name], value) for name, value in before.items())
    features, _ = features_of(encoder)
    assert torch.equal(other.route_features(features), found.route_features(features))
    again = found.for_classes(found.classes_)
    assert_close(again.experts_, found.experts_, rtol=1e-4, atol=1e-5)
    other.save(tmp_path / "a")
    opened = MoCoOp.load(tmp_path / "a", encoder)
    assert torch.equal(opened.predict_features(features).scores, other.predict_features(features).scores)
    assert_close(opened.for_classes(NAMES).experts_[:, [2, 1, 0]], found.experts_, rtol=1e-4, atol=1e-5)


def test_two_experts_answer_each_picture(encoder):
    found = judge().fit(encoder, tiny_records())
    features, _ = features_of(encoder)
    weights = found.route_features(features)
    assert ((weights > 0).sum(-1) == 2).all()
    assert_close(weights.sum(-1), torch.ones(12))
    scores = found.predict_features(features).scores
    for b in range(12):
        mixed = sum(weights[b, g] * found.experts_[g] for g in weights[b].nonzero()[:, 0].tolist())
        assert_close(scores[b], found.scale_ * mixed @ features[b], rtol=1e-4, atol=1e-4)


def test_views_stand_for_their_pictures():
    encoder = clip_encoder()
    features, labels = features_of(encoder)
    same = features[None].repeat(3, 1, 1)
    plain = judge().fit_features(encoder, features, labels, classes=NAMES)
    found = judge().fit_features(encoder, features, labels, views=same, classes=NAMES)
    assert torch.equal(found.experts_, plain.experts_)
    assert not torch.equal(
        judge(views=2).fit(encoder, tiny_records()).experts_, judge().fit(encoder, tiny_records()).experts_
    )
    with pytest.raises(ValueError, match=r"views must be \(V, 12, 24\)"):
        judge().fit_features(encoder, features, labels, views=same[:, :5], classes=NAMES)


def test_norms_of_the_picture_tower(encoder, tmp_path):
    names = vision_norms(encoder)
    assert len(names) == 3 * 2 * 2
    found = judge(tune_vision_ln=True, lr=0.1).fit(encoder, tiny_records())
    assert found.norms_.keys() == set(names)
    tuned = found.tuned_encoder()
    changed = {n for n, value in tuned.state_dict().items() if not torch.equal(value, encoder.state_dict()[n])}
    assert changed == set(names)
    plain = judge(lr=0.1).fit(encoder, tiny_records())
    assert found.trained_parameters_ == plain.trained_parameters_ + sum(
        value.numel() for value in found.norms_.values()
    )
    pixels = pixels_of(encoder)
    with torch.no_grad():
        rows = tuned.images(pixels).pooled
    assert_close(found.predict(pixels).scores, found.predict_features(rows).scores, rtol=1e-4, atol=1e-4)
    found.save(tmp_path / "a")
    opened = MoCoOp.load(tmp_path / "a", encoder)
    assert torch.equal(opened.predict(pixels).scores, found.predict(pixels).scores)
    assert torch.equal(
        opened.for_classes(NAMES).predict(pixels).scores, found.for_classes(NAMES).predict(pixels).scores
    )


def test_norms_learn_at_a_tenth_of_the_rate(monkeypatch):
    seen = {}

    def run(self, encoder, pairs):
        seen.update(groups=self.groups, lr=self.lr, names=[n for n, _ in encoder.named_parameters()])
        raise KeyboardInterrupt

    monkeypatch.setattr(Train, "run", run)
    encoder = clip_encoder()
    with pytest.raises(KeyboardInterrupt):
        judge(tune_vision_ln=True).fit(encoder, tiny_records())
    ((pattern, values),) = seen["groups"].items()
    assert values == {"lr": pytest.approx(0.1 * seen["lr"])}
    assert [name for name in seen["names"] if re.search(pattern, f"encoder.{name}")] == vision_norms(encoder)


def test_the_recipe_of_the_official_configs():
    settings = MoCoOp(epochs=50)._settings(8 * 16)
    assert settings["steps"] == 50 * 4
    assert (settings["optimizer"], settings["lr"], settings["weight_decay"]) == ("sgd", 0.032, 5e-4)
    assert (settings["betas"][0], settings["grad_clip"]) == (0.9, 1.0)
    assert (MoCoOp().text_weight, MoCoOp().gate_weight, MoCoOp().top_k) == (5.0, 1.0, 2)
    PromptMixture(NAMES, GROUPS)  # the default groups are groups


# Bad input


@pytest.mark.parametrize(
    ("error", "message", "settings"),
    [
        (ValueError, "groups is empty", {"groups": ()}),
        (TypeError, "groups holds the string 'a {}': a group is a tuple", {"groups": ("a {}",)}),
        (ValueError, r"template 'a cat' has no \{\}", {"groups": (("a cat",),)}),
        (ValueError, "names the class twice", {"groups": (("{} is {}",),)}),
        (ValueError, "class name 'red' changes how 'a ma'", {"groups": (*SINGLE[:1], ("a ma{} and",))}),
        (ValueError, "top_k=5: there are 4 groups", {"top_k": 5}),
        (ValueError, "text_weight=-1", {"text_weight": -1.0}),
        (ValueError, "gate_weight=nan", {"gate_weight": math.nan}),
        (ValueError, "tau=0", {"tau": 0.0}),
        (ValueError, "class 'yellow' occurs twice", {"extra_classes": ("yellow", "yellow")}),
        (ValueError, "exceed the 32 tokens that tiny-clip reads", {"extra_classes": ("x y " * 20,)}),
        (
            ValueError,
            "class name 'at' changes how 'a m' before it",
            {"groups": (("a m{}.",),), "top_k": 1, "extra_classes": ("at",)},
        ),
        (ValueError, "none of the classes: 'blue'", {"classes": ("red", "green")}),
    ],
)
@pytest.mark.parametrize("tune", [False, True])
def test_what_is_wrong_is_said_before_any_picture_is_opened(error, message, settings, tune):
    records = [{**record, "image": "no such file.png"} for record in tiny_records()]
    with pytest.raises(error, match=message):
        judge(tune_vision_ln=tune, **settings).fit(clip_encoder(), records)


def test_what_else_is_refused():
    encoder = clip_encoder()
    features, labels = features_of(encoder)
    with pytest.raises(ValueError, match="tune_vision_ln=True changes the features"):
        judge(tune_vision_ln=True).fit_features(encoder, features, labels, classes=NAMES)
    with pytest.raises(ValueError, match="give classes="):
        judge().fit_features(encoder, features, labels)
    with pytest.raises(ValueError, match="learnt nothing yet"):
        judge().for_classes(NAMES)
    with pytest.raises(ValueError, match="no label"):
        judge().fit(encoder, [{**tiny_records()[0], "label": None}])
    encoder.__dict__["anatomy"] = replace(encoder.anatomy, image=replace(encoder.anatomy.image, joined=True))
    with pytest.raises(TypeError, match="set tune_vision_ln=False"):
        judge(tune_vision_ln=True).fit(encoder, tiny_records())
    found = judge().fit_features(encoder, features, labels, classes=NAMES)
    with pytest.raises(ValueError, match=r"features must be \(B, 24\)"):
        found.predict_features(features[:, :5])
    with pytest.raises(ValueError, match="class names must differ"):
        found.for_classes(("cup", "cup"))
