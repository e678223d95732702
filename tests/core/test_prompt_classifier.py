"""The prompt classifier against cross-entropy written as loops, and what training by it does and does not touch."""

import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from ecliptic.core.batches import collate
from ecliptic.core.contracts import Features, Views
from ecliptic.core.encoder import TextTooLong
from ecliptic.core.prompt_classifier import (
    NOTHING,
    LearntContext,
    PromptClassifier,
    classification_loss,
    in_chunks,
)
from ecliptic.core.train import Train
from ecliptic.core.zeroshot import zero_shot_head
from ecliptic.data.shots import tiny_records
from tests.towers import FAMILIES, clip_encoder, siglip_encoder

NAMES = ("red", "green", "blue")


@pytest.fixture(params=FAMILIES)
def encoder(request):
    return FAMILIES[request.param]()


def loss_of(objective, encoder, records=None):
    objective = objective.bind(encoder)
    views = objective.encode(encoder, collate(encoder, records or tiny_records(), objective))
    return objective.terms(views)["cross_entropy"]


def slow_loss(encoder, templates, tau):
    """One picture and one prompt at a time, in float64."""
    total = 0.0
    for record in tiny_records():
        image = encoder.encode_images([record["image"]])[0].double()
        logits = []
        for name in NAMES:
            rows = [encoder.encode_texts([t.replace("{}", name)])[0].double() for t in templates]
            mean = sum(rows) / len(rows)
            logits.append(tau * float(image @ mean / mean.norm()))
        largest = max(logits)
        total += largest + math.log(sum(math.exp(v - largest) for v in logits)) - logits[NAMES.index(record["label"])]
    return total / len(tiny_records())


@pytest.mark.parametrize("templates", [("a photo of a {}.",), ("a {}", "a drawing of a {}.")])
def test_loss_is_cross_entropy_over_prompts(encoder, templates):
    own = 100.0 if encoder.bias is None else encoder.scale.item()  # SigLIP its own scale, all others CLIP's 100
    for tau in (None, 7.0):
        found = loss_of(PromptClassifier(NAMES, templates, tau), encoder)
        assert_close(found.item(), slow_loss(encoder, templates, tau or own), rtol=1e-4, atol=1e-4)


def test_two_pictures_by_hand():
    # Cosines (1, 0) and (0.6, 0.8), labels 0 and 0: with tau 10 ln(1 + e^-10) and ln(1 + e^2).
    views = Views({"image": Features(tensor([[1.0, 0.0], [0.6, 0.8]]))}, tensor(3.0))
    views["label"] = Features(tensor([[1.0, 0.0], [1.0, 0.0]]))
    views.classes = torch.eye(2)
    expected = (math.log1p(math.exp(-10)) + math.log1p(math.exp(2))) / 2
    assert_close(classification_loss(views, 10.0), tensor(expected))
    assert classification_loss(views, None) > 9  # 100, not the model's own 3: half of 20
    views.bias = tensor(-10.0)  # SigLIP: its own scale; the bias itself cancels
    assert_close(classification_loss(views, None), tensor((math.log1p(math.exp(-3)) + math.log1p(math.exp(0.6))) / 2))


@pytest.mark.parametrize("make", [PromptClassifier, LearntContext])
def test_chunks_change_neither_loss_nor_gradient(make, encoder):
    names, records = [f"{a} {b}" for a in "abc" for b in NAMES], tiny_records()
    records = [{**r, "label": f"{'abc'[i % 3]} {r['label']}"} for i, r in enumerate(records)]
    found = []
    for chunk in (100, 2):
        objective = make(tuple(names), chunk=chunk, **({"start": None} if make is LearntContext else {}))
        objective = objective.bind(encoder)
        encoder.zero_grad()
        loss = loss_of_bound(objective, encoder, records)
        loss.backward()
        grads = {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
    assert_close(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    assert any("text" in name for name in found[0][1])
    for name, grad in found[0][1].items():
        assert_close(grad, found[1][1][name], rtol=1e-3, atol=1e-4)


def loss_of_bound(objective, encoder, records):
    return objective.terms(objective.encode(encoder, collate(encoder, records, objective)))["cross_entropy"]


def test_chunks_are_recomputed_only_where_gradients_are_wanted():
    encoder, sizes = clip_encoder(), []
    tokens = encoder.tokenize(["a cat", "a dog", "the moon", "a ball", "a cup"])

    def embed(part):
        sizes.append(len(part.ids))
        return encoder.texts(part).pooled

    in_chunks(embed, tokens, 2).sum().backward()
    assert sorted(sizes) == sorted(2 * [2, 2, 1])
    sizes.clear()
    with torch.no_grad():
        in_chunks(embed, tokens, 2)
    assert sizes == [2, 2, 1]


def test_both_towers_feel_the_loss(encoder):
    loss_of(PromptClassifier(NAMES), encoder).backward()
    for tower in (encoder.anatomy.image, encoder.anatomy.text):
        assert float(next(tower.blocks[0].parameters()).grad.abs().sum()) > 0


@pytest.mark.parametrize("family", ["clip", "siglip"])  # the random dual encoder's pictures are nearly all the same
def test_training_by_it_learns_the_classes(family):
    encoder = FAMILIES[family]()
    before = loss_of(PromptClassifier(NAMES), encoder)
    step = Train(PromptClassifier(NAMES), steps=20, batch_size=12, lr=3e-3, warmup=0)
    after = loss_of(PromptClassifier(NAMES), step.apply(encoder, tiny_records()))
    assert after < 0.8 * before


# The learnt context


def test_a_context_of_words_is_those_words(encoder):
    tokens = encoder.tokenize(["a photo of a"]).mask[0].sum() - (1 if encoder.anatomy.text.padded else 2)
    bound = LearntContext(NAMES, count=int(tokens), template="{}.").bind(encoder)
    expected = zero_shot_head(encoder, NAMES, "a photo of a {}.")
    assert_close(bound.head(encoder, NAMES), expected, rtol=1e-4, atol=1e-5)
    assert_close(loss_of_bound(bound, encoder, tiny_records()), loss_of(PromptClassifier(NAMES), encoder))


def test_only_the_context_is_trained(encoder):
    weights = {name: value.clone() for name, value in encoder.state_dict().items()}
    step = Train(LearntContext(NAMES, start=None), trainable=NOTHING, steps=8, batch_size=12, lr=0.1, warmup=0)
    trained = step.run(encoder, tiny_records())
    assert all(torch.equal(value, trained.encoder.state_dict()[name]) for name, value in weights.items())
    assert trained.log[-1]["loss"] < trained.log[0]["loss"]
    drawn = LearntContext(NAMES, start=None).bind(encoder).context
    assert (trained.objective.context - drawn).abs().max() > 0.01
    head = trained.objective.head(encoder, ("cup", "red"))
    assert head.shape == (2, encoder.dim)
    assert_close(head.norm(dim=-1), torch.ones(2))
    assert not head.requires_grad


def test_the_first_context_depends_on_the_seed():
    encoder = clip_encoder()
    first = [LearntContext(NAMES, start=None, seed=seed).bind(encoder).context for seed in (0, 0, 1)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    assert abs(float(first[0].detach().std()) - 0.02) < 0.005


# Errors


@pytest.mark.parametrize("make", [PromptClassifier, LearntContext])
def test_what_cannot_be_trained_is_said_first(make):
    with pytest.raises(ValueError, match="one class only"):
        make(("red",))
    with pytest.raises(ValueError, match="occurs twice"):
        make(("red", "red"))
    with pytest.raises(TypeError, match="not the one string"):
        make("red")
    with pytest.raises(ValueError, match="tau=0"):
        make(NAMES, tau=0.0)
    with pytest.raises(ValueError, match="chunk=0"):
        make(NAMES, chunk=0)
    long = make((*NAMES, "x " * 60), **({"start": None} if make is LearntContext else {}))
    with pytest.raises(TextTooLong, match=r"has .* tokens"):
        long.bind(clip_encoder())


def test_labels_and_contexts_that_do_not_fit():
    with pytest.raises(ValueError, match="none of the classes: 'blue'"):
        loss_of(PromptClassifier(("red", "green")), clip_encoder())
    unlabelled = [{**record, "label": None} for record in tiny_records()]
    with pytest.raises(ValueError, match=r"record 0 .* has no 'label'"):
        Train(PromptClassifier(NAMES), steps=1, batch_size=2).apply(clip_encoder(), unlabelled)
    with pytest.raises(ValueError, match="has 1 tokens, count is 4"):
        LearntContext(NAMES, start="a").bind(siglip_encoder())
    with pytest.raises(ValueError, match="at least one context vector"):
        LearntContext(NAMES, count=0)
