"""Pseudolabel tuning against the paper's rules written as loops, and its exact invariants on every kind of tower."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import tensor
from torch.nn.functional import cross_entropy, normalize
from torch.testing import assert_close

from ecliptic.core.prompt_classifier import class_rows
from ecliptic.core.prompt_learning import UnifiedPrompts, Vectors, first_visual, prompted_logits
from ecliptic.core.prompting import images_with_prompts
from ecliptic.core.zeroshot import class_prompts, zero_shot_head
from ecliptic.data.shots import tiny_records
from ecliptic.methods.adapt.pseudolabel_tuning import (
    PseudoLabels,
    PseudolabelTuning,
    Task,
    grip_schedule,
    log_odds,
    loss_weights,
    select_surest,
    select_top_k,
    split_held_out,
    unified_loss,
)
from tests.towers import FAMILIES, clip_encoder, siglip_encoder

NAMES = ("red", "green", "blue")
SHORT = {"classes": NAMES, "start": None, "count": 2, "quantile": 50, "epochs": 2, "batch_size": 4}


@pytest.fixture(params=FAMILIES)
def encoder(request):
    return FAMILIES[request.param]()


def unlabelled(records):
    return [{key: value for key, value in record.items() if key != "label"} for record in records]


def mixed(labelled=(0, 1, 2)):
    """Twelve records, those at `labelled` with a label."""
    return [r if i in labelled else {**r, "label": None} for i, r in enumerate(tiny_records())]


# Which labels are believed


def slow_top_k(scores, counts):
    """The clean form, class by class, from the paper's words."""
    table, found = scores.tolist(), []
    for c, count in enumerate(counts):
        best = {i for i, row in enumerate(table) if row.index(max(row)) == c}
        ranked = sorted(range(len(table)), key=lambda i: (i not in best, -table[i][c], i))
        found += [(i, c) for i in ranked[:count]]
    return found


@pytest.mark.parametrize(("pool", "classes", "k"), list(product([5, 9, 30], [2, 4], [1, 3, 5])))
def test_top_k_against_loops(pool, classes, k):
    scores = torch.randn(
        pool, classes, generator=torch.Generator().manual_seed(pool * classes + k), dtype=torch.float64
    )
    scores[:, -1] -= 2  # nobody's favourite
    found = select_top_k(scores, [k] * classes)
    assert list(zip(found.rows.tolist(), found.labels.tolist())) == slow_top_k(scores, [k] * classes)
    assert found.labels.bincount(minlength=classes).tolist() == [k] * classes  # exactly K, even of the last
    expected = [1 / (1 + math.exp(-float(scores[i, c]))) for i, c in zip(found.rows, found.labels)]
    assert_close(found.confidence, tensor(expected), atol=1e-6, rtol=0)


def test_top_k_by_hand():
    # Best classes: 0, 0, 0, 1. Two of each: class 0 its two surest; class 1 its only one, then the best of the others.
    scores = tensor([[3.0, 1.0], [5.0, 4.0], [4.0, 2.0], [0.0, 1.0]])
    found = select_top_k(scores, [2, 2])
    assert found.rows.tolist() == [1, 2, 3, 1]  # picture 1 serves both classes
    assert found.labels.tolist() == [0, 0, 1, 1]


def test_k_of_the_whole_pool_lists_every_picture_under_every_class():
    scores = torch.randn(7, 3)
    found = select_top_k(scores, [7, 7, 7])
    assert sorted(zip(found.rows.tolist(), found.labels.tolist())) == sorted(product(range(7), range(3)))


def test_the_choice_does_not_depend_on_the_order_of_the_pool():
    scores, order = torch.randn(20, 3), torch.randperm(20, generator=torch.Generator().manual_seed(0))
    one, two = select_top_k(scores, [4] * 3), select_top_k(scores[order], [4] * 3)
    assert one.rows.tolist() == order[two.rows].tolist()


def test_the_surest_are_not_balanced():
    scores = tensor([[3.0, 1.0], [5.0, 4.0], [4.0, 2.0], [0.0, 1.0]])
    found = select_surest(scores, 3)
    assert (found.rows.tolist(), found.labels.tolist()) == ([1, 2, 0], [0, 0, 0])


@pytest.mark.parametrize("bias", [None, -3.0])
def test_log_odds_against_loops(bias):
    logits = 4 * torch.randn(6, 4, dtype=torch.float64)
    found = log_odds(logits, bias)
    for row, odds in zip(logits.tolist(), found.tolist()):
        for c in range(4):
            p = math.exp(row[c]) / sum(map(math.exp, row)) if bias is None else 1 / (1 + math.exp(-row[c] - bias))
            assert_close(odds[c], math.log(p / (1 - p)), rtol=1e-9, atol=1e-9)


def test_log_odds_tell_apart_what_rounds_to_certainty():
    """At CLIP's scale of 100 the surest pictures all have probability 1 in float32, and the pool's order would decide."""
    logits = tensor([[90.0, 10.0], [95.0, 10.0], [80.0, 10.0]])
    assert torch.equal(logits.softmax(-1)[:, 0], torch.ones(3))
    found = log_odds(logits)
    assert_close(found[:, 0], tensor([80.0, 85.0, 70.0], dtype=torch.float64))
    assert_close(found[:, 1], -found[:, 0])
    assert select_top_k(found, [2, 0]).rows.tolist() == [1, 0]


def test_one_class_alone_is_ranked_by_likeness():
    """TRZSL with a single class unseen: a softmax over one class is always 1."""
    logits = tensor([[3.0], [9.0], [6.0]])
    assert select_top_k(log_odds(logits), [2]).rows.tolist() == [1, 2]


def test_grips_schedule():
    assert grip_schedule(1000, 10, 10) == tuple(range(10, 101, 10))
    assert grip_schedule(800, 8, 5) == (20, 40, 60, 80, 100)
    assert grip_schedule(1009, 10, 10)[-1] == 100  # floor(i * floor(1009 / 10) / 10)
    assert grip_schedule(12, 3, 10) == (1, 1, 1, 1, 1, 2, 2, 2, 3, 3)  # never nothing
    assert grip_schedule(4, 8, 2) == (1, 1)


def test_counts_follow_the_priors():
    task = Task(torch.full((9,), -1), torch.arange(9), torch.arange(3))
    assert task.counts(4) == [4, 4, 4]
    skewed = task._replace(priors=(6.0, 3.0, 1.0))
    assert skewed.counts(10) == [18, 9, 3]
    assert skewed.counts(1) == [2, 1, 1]  # 1.8, 0.9, 0.3: two remainders go out, and nobody is left with nothing
    assert sum(skewed.counts(7)) == 21


# The loss


def slow_loss(logits, target, labelled, gamma, lam):
    sums, counts = [0.0, 0.0], [0, 0]
    for row, y, known in zip(logits.double().tolist(), target.tolist(), labelled.tolist()):
        kind = 0 if known else 1
        sums[kind] += math.log(sum(math.exp(x) for x in row)) - row[y]
        counts[kind] += 1
    return [w * (s / n if n else 0.0) for w, s, n in zip((gamma, lam), sums, counts)]


@pytest.mark.parametrize("known", [[1, 1, 0, 0, 0], [0] * 5, [1] * 5])
def test_unified_loss_against_loops(known):
    logits, target = torch.randn(5, 3), tensor([0, 2, 1, 1, 0])
    found = unified_loss(logits, target, tensor(known).bool(), 0.7, 1.3)
    expected = slow_loss(logits, target, tensor(known).bool(), 0.7, 1.3)
    assert_close(found["labelled"].item(), expected[0], rtol=1e-5, atol=1e-6)
    assert_close(found["pseudo"].item(), expected[1], rtol=1e-5, atol=1e-6)


def test_without_labels_the_loss_is_plain_cross_entropy():
    logits, target = torch.randn(6, 4), tensor([0, 1, 2, 3, 0, 1])
    found = unified_loss(logits, target, torch.zeros(6, dtype=torch.bool), *loss_weights("ul", 0, 6))
    assert_close(sum(found.values()), cross_entropy(logits, target))


def test_with_as_many_labels_as_pseudolabels_it_is_the_sum_of_two_means():
    logits, target, known = torch.randn(6, 4), tensor([0, 1, 2, 3, 0, 1]), tensor([1, 1, 1, 0, 0, 0]).bool()
    found = unified_loss(logits, target, known, *loss_weights("ssl", 3, 3))
    expected = cross_entropy(logits[:3], target[:3]) + cross_entropy(logits[3:], target[3:])
    assert_close(sum(found.values()), expected)


def test_weights_of_the_paradigms():
    assert loss_weights("ssl", 4, 12) == (3.0, 1.0)  # gamma = |U| / |L|, not the inverse of the released iterative path
    assert loss_weights("trzsl", 4, 12) == (1.0, 1 / 3)
    assert loss_weights("ul", 0, 12) == (0.0, 1.0)


def test_what_is_held_out():
    task = Task(tensor([0, 1, -1, 0, -1, 1, -1, 1]), tensor([2, 4, 6]), tensor([0, 1]))
    chosen = PseudoLabels(tensor([0, 2, 1, 0]), tensor([0, 0, 1, 1]), torch.ones(4))
    train, held = split_held_out(task, chosen, 0.0, True, 0)
    assert train.rows.tolist() == [0, 1, 3, 5, 7, 2, 6, 4, 2]
    assert train.target.tolist() == [0, 1, 0, 1, 1, 0, 0, 1, 1]
    assert train.labelled.tolist() == [True] * 5 + [False] * 4
    assert len(held.rows) == 0
    train, held = split_held_out(task, chosen, 0.4, False, 0)
    assert (int(train.labelled.sum()), int((~train.labelled).sum())) == (3, 4)  # of the five labelled two
    train, held = split_held_out(task, chosen, 0.5, True, 0)
    assert (len(train.rows), len(held.rows)) == (5, 4)
    both = sorted(zip(torch.cat([train.rows, held.rows]).tolist(), torch.cat([train.target, held.target]).tolist()))
    assert both == sorted([(0, 0), (1, 1), (3, 0), (5, 1), (7, 1), (2, 0), (6, 0), (4, 1), (2, 1)])


# The whole


def test_first_labels_are_zero_shot_answers(encoder):
    """Rows, labels and confidences of FPL against one picture and one class at a time."""
    records = unlabelled(tiny_records())
    judge = PseudolabelTuning(**SHORT, strategy="fpl", top_k=2).fit(encoder, records)
    scale = 100.0 if encoder.bias is None else encoder.scale.item()
    head = zero_shot_head(encoder, NAMES).double()
    logits = [
        [scale * float(f @ t) for t in head] for f in encoder.encode_images([r["image"] for r in records]).double()
    ]
    odds = log_odds(tensor(logits, dtype=torch.float64), None if encoder.bias is None else encoder.bias.item())
    (found,) = judge.rounds_
    assert list(zip(found["rows"].tolist(), found["labels"].tolist())) == slow_top_k(odds, [2, 2, 2])
    expected = [1 / (1 + math.exp(-float(odds[i, c]))) for i, c in zip(found["rows"], found["labels"])]
    assert_close(found["confidence"], tensor(expected), rtol=1e-3, atol=1e-5)
    assert found["k"].tolist() == [2, 2, 2]
    assert found["held_out_accuracy"] is None


def test_grip_labels_anew_with_the_prompts_of_the_round_before():
    """Round two's labels are the answers of a predictor that stopped after round one."""
    encoder, records = clip_encoder(), unlabelled(tiny_records())
    settings = SHORT | {"epochs": 8, "lr": 0.5}
    judge = PseudolabelTuning(**settings, strategy="grip").fit(encoder, records)
    assert [r["k"].tolist() for r in judge.rounds_] == [[2, 2, 2], [4, 4, 4]]
    first = PseudolabelTuning(**settings, strategy="fpl", top_k=2).fit(encoder, records)
    assert torch.equal(first.rounds_[0]["rows"], judge.rounds_[0]["rows"])
    scores = first.predict(encoder.preprocess([r["image"] for r in records])).scores
    expected = slow_top_k(log_odds(scores), [4, 4, 4])
    found = judge.rounds_[1]
    assert list(zip(found["rows"].tolist(), found["labels"].tolist())) == expected
    features = encoder.encode_images([r["image"] for r in records])
    before = select_top_k(log_odds(100 * features @ zero_shot_head(encoder, NAMES).T), [4, 4, 4])
    assert list(zip(before.rows.tolist(), before.labels.tolist())) != expected  # the round made a difference


@pytest.mark.parametrize("modality", ["text", "image", "multi"])
@pytest.mark.parametrize("strategy", ["fpl", "ifpl", "grip"])
@pytest.mark.parametrize("paradigm", ["ssl", "trzsl", "ul"])
def test_every_paradigm_strategy_and_modality(paradigm, strategy, modality):
    encoder = clip_encoder()
    records = mixed((0, 1, 2)) if paradigm == "ssl" else mixed((0, 3, 6)) if paradigm == "trzsl" else tiny_records()
    settings = SHORT | {"visual_count": 2, "top_k": 2}
    judge = PseudolabelTuning(**settings, paradigm=paradigm, strategy=strategy, modality=modality).fit(encoder, records)
    said = judge.predict(encoder.preprocess([r["image"] for r in records]))
    assert said.scores.shape == (12, 3)
    assert said.scores.isfinite().all()
    assert len(judge.rounds_) == (1 if strategy == "fpl" else 2)
    for found in judge.rounds_:
        assert set(found["labels"].tolist()) == ({1, 2} if paradigm == "trzsl" else {0, 1, 2})
        assert all(paradigm == "ul" or records[i]["label"] is None for i in found["rows"].tolist())
    assert set(judge.state_) == {"text": {"context"}, "image": {"visual"}, "multi": {"context", "visual"}}[modality]
    again = PseudolabelTuning(**settings, paradigm=paradigm, strategy=strategy, modality=modality).fit(encoder, records)
    assert torch.equal(again.predict(encoder.preprocess([r["image"] for r in records])).scores, said.scores)


def test_cached_features_give_what_pictures_give(encoder):
    """Textual prompts: from features, from records, and logits of the towers run in full."""
    records = tiny_records()
    features = encoder.encode_images([r["image"] for r in records])
    cached = PseudolabelTuning(**SHORT).fit_features(encoder, features)
    judge = PseudolabelTuning(**SHORT).fit(encoder, records)
    assert torch.equal(cached.state_["context"], judge.state_["context"])
    pixels = encoder.preprocess([r["image"] for r in records])
    tokens, vectors = encoder.tokenize(class_prompts(NAMES, "{}")), Vectors(judge.state_["context"])
    with torch.no_grad():
        full = prompted_logits(encoder, vectors, tokens, pixels, 1.0)
    assert_close(cached.predict_features(features).scores / cached.scale_, full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("modality", ["text", "image", "multi"])
def test_only_prompts_change(modality):
    encoder = clip_encoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    judge = PseudolabelTuning(**SHORT, modality=modality, visual_count=3).fit(encoder, tiny_records())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())
    wide, width = encoder.anatomy.text.width, encoder.anatomy.image.width
    unified = UnifiedPrompts(torch.zeros(2, wide), torch.zeros(3, width))
    expected = {"text": 2 * wide, "image": 3 * width, "multi": sum(p.numel() for p in unified.parameters())}[modality]
    assert judge.trained_parameters_ == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_visual_prompts_are_seen_in_the_answers(family):
    encoder = FAMILIES[family]()
    judge = PseudolabelTuning(**SHORT, modality="image", visual_count=2, strategy="fpl", top_k=2).fit(
        encoder, tiny_records()
    )
    pixels = encoder.preprocess([r["image"] for r in tiny_records()])
    with torch.no_grad():
        rows = images_with_prompts(encoder, pixels, judge.state_["visual"]).pooled
    assert_close(
        judge.predict(pixels).scores, judge.scale_ * rows @ zero_shot_head(encoder, NAMES).T, rtol=1e-4, atol=1e-3
    )
    assert not torch.equal(judge.state_["visual"], first_visual(encoder, 2, 0))


def test_prompts_that_do_not_move_leave_zero_shot(encoder):
    """A rate of 0: the worded context is the words, so every round's labels and the answers are zero-shot's."""
    settings = SHORT | {
        "start": "a photo of a",
        "count": None,
        "template": "{}.",
        "lr": 0.0,
        "templates": "a photo of a {}.",
    }
    judge = PseudolabelTuning(**settings).fit(encoder, tiny_records())
    assert_close(judge.text_, zero_shot_head(encoder, NAMES, "a photo of a {}."), rtol=1e-4, atol=1e-5)


def test_few_labels_beside_the_pool_teach_the_task():
    """SSL on features around what a hidden context says of the names: the unlabelled half is named better than by zero-shot."""
    encoder, generator = clip_encoder(), torch.Generator().manual_seed(0)
    hidden = 0.1 * torch.randn(4, encoder.anatomy.text.width, generator=generator)
    with torch.no_grad():
        centres = class_rows(encoder, hidden, encoder.tokenize(class_prompts(NAMES, "{}")))
    truth = torch.arange(60) % 3
    features = normalize(centres[truth] + 0.01 * torch.randn(60, 24, generator=generator), dim=-1)
    before = (features[30:] @ zero_shot_head(encoder, NAMES).T).argmax(-1)
    settings = SHORT | {"epochs": 15, "count": 4, "batch_size": 16, "tau": 20.0, "weight_decay": 0.0}
    judge = PseudolabelTuning(**settings, paradigm="ssl", strategy="fpl", top_k=5)
    judge.fit_features(encoder, features, truth.where(torch.arange(60) < 30, -1))
    after = judge.predict_features(features[30:]).scores.argmax(-1)
    assert float((after == truth[30:]).float().mean()) > float((before == truth[30:]).float().mean()) + 0.2


def test_labels_are_not_looked_at_without_a_paradigm_that_does():
    encoder = clip_encoder()
    one = PseudolabelTuning(**SHORT).fit(encoder, tiny_records())
    two = PseudolabelTuning(**SHORT).fit(encoder, [{**r, "label": "no such class"} for r in tiny_records()])
    assert torch.equal(one.state_["context"], two.state_["context"])


def test_rounds_start_afresh_or_go_on():
    encoder = clip_encoder()
    settings = SHORT | {"epochs": 6, "lr": 0.5}
    afresh, on = (
        PseudolabelTuning(**settings, restart=restart).fit(encoder, tiny_records()) for restart in (True, False)
    )
    assert torch.equal(afresh.rounds_[1]["rows"], on.rounds_[1]["rows"])  # the first round is the same
    assert not torch.equal(afresh.state_["context"], on.state_["context"])


def test_other_classes_by_the_same_prompts(encoder):
    judge = PseudolabelTuning(**SHORT).fit(encoder, tiny_records())
    other = judge.for_classes(("blue", "cup"))
    pixels = encoder.preprocess([r["image"] for r in tiny_records()])
    assert_close(other.predict(pixels).scores[:, 0], judge.predict(pixels).scores[:, 2], rtol=1e-4, atol=1e-3)


def test_held_out_pictures_are_judged_and_not_learnt_from():
    encoder = clip_encoder()
    settings = SHORT | {"strategy": "fpl", "top_k": 10, "held_out": 0.2}
    held = PseudolabelTuning(**settings).fit(encoder, tiny_records())
    assert held.rounds_[0]["held_out_accuracy"] * 6 == pytest.approx(round(held.rounds_[0]["held_out_accuracy"] * 6))
    few = PseudolabelTuning(**settings | {"top_k": 9}).fit(encoder, tiny_records())
    assert few.rounds_[0]["held_out_accuracy"] is None  # K below 10


def test_sigmoid_ranks_siglip():
    encoder = siglip_encoder()
    judge = PseudolabelTuning(**SHORT, strategy="fpl", top_k=2).fit(encoder, tiny_records())
    (found,) = judge.rounds_
    cosines = encoder.encode_images([r["image"] for r in tiny_records()]) @ zero_shot_head(encoder, NAMES).T
    sigmoid = (encoder.scale * cosines + encoder.bias).sigmoid().detach()
    assert_close(found["confidence"], sigmoid[found["rows"], found["labels"]], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"paradigm": "semi"}, "paradigm='semi'"),
        ({"strategy": "grow"}, "strategy='grow'"),
        ({"modality": "audio"}, "modality='audio'"),
        ({"selection": "all"}, "selection='all'"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"quantile": 0}, "quantile=0"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"gamma": -1.0}, "gamma=-1.0"),
        ({"count": 0}, "count=0"),
        ({"visual_count": 0}, "visual_count=0"),
        ({"count": 31}, "exceed the 32"),
        ({"start": "a photo of a", "count": 1}, "count is 1"),
        ({"templates": "it"}, "no template set 'it'"),
        ({"classes": None}, "paradigm='ul' needs classes="),
        ({"classes": ("red",)}, "one class only"),
        ({"paradigm": "trzsl"}, "all 3 have some"),
        ({"paradigm": "ssl"}, "every record has a label"),
        ({"priors": {"red": 1.0}}, "priors needs a positive share of 'green', 'blue'"),
        ({"priors": {"red": 1, "green": 1, "blue": 1, "cup": 1}}, "priors names 'cup'"),
    ],
)
def test_what_is_wrong_is_said_before_any_picture_is_opened(settings, message, monkeypatch):
    encoder = clip_encoder()
    monkeypatch.setattr(encoder, "encode_images", lambda *args, **named: pytest.fail("pictures were encoded"))
    with pytest.raises(ValueError, match=message):
        PseudolabelTuning(**SHORT | settings).fit(encoder, tiny_records())


def test_records_and_tensors_that_do_not_fit_are_refused():
    encoder, features = clip_encoder(), normalize(torch.randn(4, 24), dim=-1)
    with pytest.raises(ValueError, match="needs records with a `label`"):
        PseudolabelTuning(**SHORT, paradigm="ssl").fit(encoder, unlabelled(tiny_records()))
    with pytest.raises(ValueError, match="there are no records"):
        PseudolabelTuning(**SHORT).fit(encoder, [])
    with pytest.raises(ValueError, match="none of the classes: 'green'"):
        PseudolabelTuning(**SHORT | {"classes": ("red", "blue")}, paradigm="ssl").fit(encoder, mixed())
    with pytest.raises(ValueError, match="modality='image' changes"):
        PseudolabelTuning(**SHORT, modality="image").fit_features(encoder, features)
    with pytest.raises(ValueError, match="integers below 3"):
        PseudolabelTuning(**SHORT, paradigm="ssl").fit_features(encoder, features, tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="unit rows"):
        PseudolabelTuning(**SHORT).fit_features(encoder, 2 * features)
    with pytest.raises(ValueError, match="classes is missing"):
        PseudolabelTuning(start=None).fit_features(encoder, features)


def test_the_paradigms_read_their_classes():
    """In ssl the classes may be read off the labels; in trzsl those without a label are the ones to pseudolabel."""
    encoder = clip_encoder()
    judge = PseudolabelTuning(**SHORT | {"classes": None}, paradigm="ssl").fit(encoder, mixed())
    assert judge.classes_ == ("blue", "green", "red")
