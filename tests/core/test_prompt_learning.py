"""Learning prompts: cached features against full training, UPT against loops in float64, and what is and is not changed."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from ecliptic.core.batches import Order, collate
from ecliptic.core.prompt_classifier import NOTHING, LearntContext, first_context
from ecliptic.core.prompt_learning import (
    PromptPredictor,
    Prompts,
    UnifiedPrompts,
    Vectors,
    encode_with_prompts,
    first_visual,
    learn_prompts,
    prompted_logits,
    trained_count,
)
from ecliptic.core.prompting import images_with_prompts
from ecliptic.core.train import Settings, Train
from ecliptic.core.zeroshot import class_prompts, zero_shot_head
from ecliptic.data.shots import tiny_records
from tests.towers import FAMILIES, PATCH, clip_encoder

NAMES = ("red", "green", "blue")
SETTINGS = {"steps": 8, "lr": 0.1, "optimizer": "sgd", "weight_decay": 0.01, "warmup": 2, "grad_clip": None}


@pytest.fixture(params=FAMILIES)
def encoder(request):
    return FAMILIES[request.param]()


def tokens_of(encoder):
    return encoder.tokenize(class_prompts(NAMES, "{}."))


def batches_of(encoder, images):
    """Batches of six, with `images` (N, ...) as features or as pixels."""
    truth = torch.tensor([NAMES.index(record["label"]) for record in tiny_records()])
    order = Order(len(truth), 6, 0)
    return lambda i: {"image": images[order(i)], "target": truth[order(i)]}


def loss(logits, batch):
    return {"cross_entropy": cross_entropy(logits, batch["target"])}


def pixels_of(encoder):
    return encoder.preprocess([record["image"] for record in tiny_records()])


def learnt(encoder, prompts, classes, images, **changes):
    learn_prompts(
        encoder, prompts, classes, batches_of(encoder, images), loss, Settings(**SETTINGS | changes), scale=20.0
    )
    return prompts


# Cached features


def test_cached_features_learn_what_full_training_learns(encoder):
    """Three ways to the same context: features, pixels through the frozen tower, and the trainer over an objective."""
    lr = 20.0 if encoder.name == "tiny-dual" else 0.1  # its pictures are nearly all the same, so gradients are small
    start = first_context(encoder, None, 3, 0)
    features = encoder.encode_images([record["image"] for record in tiny_records()])
    cached = learnt(encoder, Prompts(start), tokens_of(encoder), features, lr=lr).context
    full = learnt(encoder, Prompts(start), tokens_of(encoder), pixels_of(encoder), lr=lr).context
    step = Train(LearntContext(NAMES, 3, None, tau=20.0), trainable=NOTHING, batch_size=6, **SETTINGS | {"lr": lr})
    trained = step.run(encoder, tiny_records()).objective.context
    assert (cached - start).abs().max() > 1e-2
    assert_close(cached, full, rtol=1e-5, atol=1e-5)
    assert_close(cached, trained, rtol=1e-5, atol=1e-5)
    logits = [
        prompted_logits(encoder, Vectors(context.detach()), tokens_of(encoder), images, 1.0).detach()
        for context, images in ((cached, features), (full, pixels_of(encoder)))
    ]
    assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_logits_are_scaled_cosines(encoder):
    context, images = first_context(encoder, None, 2, 1), pixels_of(encoder)[:4]
    with torch.no_grad():
        found = prompted_logits(encoder, Vectors(context), tokens_of(encoder), images, 7.0)
    bound = LearntContext(NAMES, 2, None, seed=1).bind(encoder)
    rows, features = (
        bound.head(encoder, NAMES).double(),
        encoder.encode_images([r["image"] for r in tiny_records()[:4]]),
    )
    for i, feature in enumerate(features.double()):
        for k, row in enumerate(rows):
            assert_close(
                found[i, k].item(), float(7 * feature @ row / feature.norm() / row.norm()), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("kind", ["context", "visual", "both", "unified"])
def test_only_prompts_are_trained(kind):
    encoder = clip_encoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    flags = [p.requires_grad for p in encoder.parameters()]
    context, visual = first_context(encoder, None, 2, 0), first_visual(encoder, 3, 0)
    prompts = {
        "context": lambda: Prompts(context),
        "visual": lambda: Prompts(visual=visual),
        "both": lambda: Prompts(context, visual),
        "unified": lambda: UnifiedPrompts(context, visual, width=8),
    }[kind]()
    start = {name: value.detach().clone() for name, value in prompts.named_parameters()}
    classes = zero_shot_head(encoder, NAMES) if kind == "visual" else tokens_of(encoder)
    learnt(encoder, prompts, classes, pixels_of(encoder))
    # A shift of all keys changes no softmax: where the weight decay is 0, their bias would stay.
    assert all(not torch.equal(value, start[name]) for name, value in prompts.named_parameters() if "bias" not in name)
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert flags == [p.requires_grad for p in encoder.parameters()]
    assert all(p.grad is None for p in encoder.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())
    assert trained_count(prompts) == sum(value.numel() for value in start.values())


@pytest.mark.parametrize("family", ["clip", "siglip"])  # the random dual encoder's pictures are nearly all the same
def test_every_kind_of_prompt_lowers_the_loss(family):
    encoder = FAMILIES[family]()
    context, visual = first_context(encoder, None, 2, 0), first_visual(encoder, 3, 0)
    settings = Settings(**SETTINGS | {"steps": 25, "lr": 0.3})
    for prompts, classes in (
        (Prompts(context), tokens_of(encoder)),
        (Prompts(visual=visual), zero_shot_head(encoder, NAMES)),
        (UnifiedPrompts(context, visual, width=8), tokens_of(encoder)),
    ):
        images = (
            pixels_of(encoder)
            if prompts().visual is not None
            else encoder.encode_images([record["image"] for record in tiny_records()])
        )
        batch = {"image": images, "target": torch.tensor([NAMES.index(r["label"]) for r in tiny_records()])}
        log = learn_prompts(encoder, prompts, classes, lambda i, batch=batch: batch, loss, settings, scale=5.0)
        assert min(row["loss"] for row in log) < log[0]["loss"] - 1e-4


# Unified prompts


def slow_unified(prompts, heads):
    """UPT's equations, one token and one head at a time, in float64."""
    state = {name: value.detach().double() for name, value in prompts.state_dict().items()}

    def line(x, name):
        return state[f"{name}.weight"] @ x + state[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean()
        return (
            centred / math.sqrt(float(centred.square().mean()) + 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]
        )

    tokens = [line(x, "into.0") for x in state["context"]] + [line(x, "into.1") for x in state["visual"]]
    for block in range(len(prompts.blocks)):
        at, width = f"blocks.{block}", len(tokens[0])
        size, seen = width // heads, []
        qkv = [line(norm(x, f"{at}.norm1"), f"{at}.qkv") for x in tokens]
        for i in range(len(tokens)):
            parts = []
            for head in range(heads):
                q, keys, values = (
                    [row[kind * width + head * size : kind * width + (head + 1) * size] for row in qkv]
                    for kind in range(3)
                )
                weights = torch.stack([q[i] @ key / math.sqrt(size) for key in keys]).exp()
                parts.append(sum(w * v for w, v in zip(weights / weights.sum(), values)))
            seen.append(line(torch.cat(parts), f"{at}.out"))
        tokens = [x + y for x, y in zip(tokens, seen)]
        for i, x in enumerate(tokens):
            hidden = line(norm(x, f"{at}.norm2"), f"{at}.fc1")
            tokens[i] = x + line(hidden / (1 + (-1.702 * hidden).exp()), f"{at}.fc2")
    words = len(state["context"])
    return [line(x, "back.0") for x in tokens[:words]], [line(x, "back.1") for x in tokens[words:]]


@pytest.mark.parametrize(("heads", "layers"), [(1, 1), (2, 2)])
def test_unified_prompts_against_loops(heads, layers):
    prompts = UnifiedPrompts(torch.randn(3, 10), torch.randn(2, 6), width=8, heads=heads, layers=layers, seed=3)
    with torch.no_grad():
        for parameter in prompts.parameters():  # norms and biases off their neutral values
            parameter.add_(
                0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
        found = prompts()
    context, visual = slow_unified(prompts, heads)
    assert_close(found.context, torch.stack(context).float(), rtol=1e-4, atol=1e-5)
    assert_close(found.visual, torch.stack(visual).float(), rtol=1e-4, atol=1e-5)


def test_unified_prompts_come_from_the_seed_and_join_the_towers():
    state = torch.random.get_rng_state()
    one, two, other = (UnifiedPrompts(torch.ones(2, 4), torch.ones(3, 5), width=8, seed=s) for s in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(one().context, two().context)
    assert not torch.equal(one().context, other().context)
    one().visual.sum().backward()
    assert one.context.grad.abs().sum() > 0  # words reach the visual tokens
    with pytest.raises(ValueError, match="width=9"):
        UnifiedPrompts(torch.ones(2, 4), torch.ones(3, 5), width=9, heads=2)


def test_where_visual_tokens_start():
    encoder = clip_encoder()
    width = encoder.anatomy.image.width
    drawn = first_visual(encoder, 500, 0)
    assert_close(float(drawn.std()), width**-0.5, rtol=0.03, atol=0)
    even = first_visual(encoder, 500, 0, "uniform")
    bound = math.sqrt(6 / (3 * PATCH**2 + width))
    assert_close(float(even.abs().max()), bound, rtol=1e-3, atol=0)
    assert_close(float(even.std()), bound / math.sqrt(3), rtol=0.03, atol=0)
    assert torch.equal(drawn, first_visual(encoder, 500, 0))


# The parts


def test_encoding_with_prompts_is_the_tower_with_prompts(encoder):
    visual, images = first_visual(encoder, 3, 0), [record["image"] for record in tiny_records()]
    with torch.no_grad():
        expected = images_with_prompts(encoder, pixels_of(encoder), visual).pooled
    assert_close(encode_with_prompts(encoder, images, visual, 5), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(encode_with_prompts(encoder, images, None), encoder.encode_images(images))


def test_what_does_not_fit_is_refused():
    encoder = clip_encoder()
    with pytest.raises(ValueError, match="nothing to learn"):
        Prompts()
    with pytest.raises(ValueError, match="give pixels"):
        prompted_logits(
            encoder, Prompts(visual=first_visual(encoder, 2))(), torch.zeros(3, 24), torch.zeros(2, 24), 1.0
        )
    with pytest.raises(ValueError, match="not as tokens"):
        prompted_logits(encoder, Vectors(), tokens_of(encoder), torch.zeros(2, 24), 1.0)
    with pytest.raises(ValueError, match="count=0"):
        first_context(encoder, None, 0)


class Held(PromptPredictor):
    """The smallest predictor with prompts: as they are drawn."""

    template, templates, visual = "{}.", "photo", True

    def fit(self, encoder, pairs):
        visual = first_visual(encoder, 2, 0) if self.visual else None
        context = None if self.visual == "alone" else first_context(encoder, None, 3, 0)
        return self._hold(encoder, Prompts(context, visual), NAMES, 9.0)


@pytest.mark.parametrize("visual", [False, True, "alone"])
def test_a_predictor_with_prompts(encoder, visual):
    judge = Held()
    judge.visual = visual
    with pytest.raises(ValueError, match="call fit"):
        judge.predict(torch.zeros(1, 3, 32, 32))
    judge.fit(encoder, [])
    pixels = pixels_of(encoder)
    state = judge.state_
    assert set(state) == ({"context"} if not visual else {"visual"} if visual == "alone" else {"context", "visual"})
    classes = zero_shot_head(encoder, NAMES) if visual == "alone" else tokens_of(encoder)
    with torch.no_grad():
        expected = prompted_logits(encoder, Vectors(**state), classes, pixels, 9.0)
    found = judge.predict(pixels)
    assert_close(found.scores, expected, rtol=1e-5, atol=1e-5)
    assert found.labels == [NAMES[k] for k in expected.argmax(-1).tolist()]
    assert torch.equal(judge.predict_features(judge.features(pixels)).scores, found.scores)
    other = judge.for_classes(["cup", "red"])
    assert_close(other.predict(pixels).scores[:, 1], found.scores[:, 0], rtol=1e-4, atol=1e-4)
    assert (judge.classes_, other.classes_) == (NAMES, ("cup", "red"))
    assert judge.trained_parameters_ == sum(value.numel() for value in state.values())
    with pytest.raises(ValueError, match="features must be"):
        judge.predict_features(torch.zeros(2, 5))


def test_collating_is_not_needed_for_features(encoder):
    """The batches of full training are those of the cached one: the same rows in the same order."""
    seen = []
    objective = LearntContext(NAMES, 3, None).bind(encoder)
    records = [{**record, "place": i} for i, record in enumerate(tiny_records())]
    step = Train(
        LearntContext(NAMES, 3, None), trainable=NOTHING, steps=3, batch_size=6, workers=0,
        collate=lambda e, rows: seen.append([row["place"] for row in rows]) or collate(e, rows, objective),
    )  # fmt: skip
    step.run(encoder, records)
    order = Order(len(records), 6, 0)
    assert seen == [order(i).tolist() for i in range(3)]
