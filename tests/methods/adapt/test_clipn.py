"""CLIPN against its equations written as loops, the invariants of the paper, and what it is sold for."""

import math
import pickle

import pytest
import torch
from PIL import Image
from torch import tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from ecliptic.baselines.zero_shot import ZeroShot
from ecliptic.core.batches import collate
from ecliptic.core.grad_cache import join
from ecliptic.core.predictor_io import load_predictor
from ecliptic.core.prompt_classifier import NOTHING
from ecliptic.core.prompting import text_from_embeddings, token_embeddings
from ecliptic.core.train import Train
from ecliptic.core.tuned import with_tensors
from ecliptic.data.records import Records
from ecliptic.data.shots import encode_views, tiny_records
from ecliptic.eval import ood
from ecliptic.eval.ood import RefusesTheUnknown, ScoresTheUnknown
from ecliptic.methods.adapt.clipn import (
    PAIRED,
    Clipn,
    SayNo,
    SayNoByHand,
    agreeing_to_differ,
    atd_is_known,
    competing_to_win,
    entailed,
    image_text_loss,
    no_probability,
    opposite_loss,
    text_tensors,
)
from tests.towers import FAMILIES, clip_encoder, dual_encoder


@pytest.fixture(params=FAMILIES)
def encoder(request):
    return FAMILIES[request.param]()


def logits(n=6, k=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(4 * torch.randn(n, k or n, generator=generator, dtype=torch.float64) for _ in range(2))


def views_of(objective, encoder, records=None):
    """The bound objective and its views of some records, as the trainer makes them."""
    records = records or tiny_records()[:6]
    bound = objective.bind(encoder)
    own = getattr(bound, "collate", None)
    batch = collate(encoder, records, bound) if own is None else own(encoder, records)
    views = bound.encode(encoder, batch)
    views.groups = batch["group"]
    return bound, views


def views_of_batch(objective, encoder):
    return objective.encode(encoder, collate(encoder, tiny_records()[:6], objective))


# The equations, as loops


def slow_losses(yes, no, spared):
    """ITBO by explicit fractions, positives and negatives each with their own mean."""
    n, positives, negatives = len(yes), [], []
    for i in range(n):
        for j in range(n):
            a, b = math.exp(yes[i, j]), math.exp(no[i, j])
            if i == j:
                positives.append(-math.log(1 - b / (a + b)))
            elif not spared[i, j]:
                negatives.append(-math.log(b / (a + b)))
    return sum(positives) / n, sum(negatives) / len(negatives)


def test_image_text_loss_is_the_loop():
    yes, no = logits()
    nobody = torch.zeros(6, 6, dtype=torch.bool)
    some = torch.rand(6, 6, generator=torch.Generator().manual_seed(3)) < 0.3
    for spared in (None, nobody, some):
        found = image_text_loss(yes, no, spared)
        expected = slow_losses(yes, no, nobody if spared is None else spared)
        assert_close(torch.stack(found), tensor(expected, dtype=torch.float64))


def test_no_negatives_are_no_term_and_positives_stay():
    yes, no = logits()
    matched, mismatched = image_text_loss(yes, no, torch.ones(6, 6, dtype=torch.bool))
    assert mismatched == 0
    assert_close(matched, image_text_loss(yes, no)[0])
    with pytest.raises(ValueError, match=r"must be \(N, N\), got \(2, 3\)"):
        image_text_loss(torch.zeros(2, 3), torch.zeros(2, 3))


def test_losses_survive_half_precision():
    yes = tensor([[60.0, -60.0], [-60.0, 60.0]], dtype=torch.bfloat16).requires_grad_()
    for sign in (1, -1):
        found = image_text_loss(sign * yes, -sign * yes)
        assert_close(torch.stack(found).float(), torch.full((2,), 0.0 if sign == 1 else 120.0))
        assert torch.autograd.grad(sum(found), yes)[0].isfinite().all()


def test_opposite_loss_by_hand():
    text = normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=-1)
    assert_close(opposite_loss(text, text).item(), 1.99)  # 2 - sqrt(1e-4)
    assert_close(opposite_loss(text, -text).item(), 2 - math.sqrt(4 + 1e-4))
    assert abs(opposite_loss(text, -text).item() + 2.5e-5) < 1e-9
    other = normalize(text + text.roll(1, 0), dim=-1)
    slow = [
        2 - math.sqrt(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) + 1e-4)
        for x, y in zip(text, other, strict=True)
    ]
    assert_close(opposite_loss(text, other).item(), sum(slow) / 5)


def test_the_opposite_loss_alone_cannot_move_a_copy():
    """At the start its gradient points along the text itself, which normalising takes away."""
    raw = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    text, copied = normalize(raw, dim=-1), raw.clone().requires_grad_()
    opposite_loss(text, normalize(copied, dim=-1)).backward()
    assert copied.grad.abs().max() < 1e-12
    with pytest.raises(ValueError, match="moves nothing"):
        SayNo(weights=(0.0, 0.0, 0.5))


def test_no_probability_is_the_two_way_softmax():
    yes, no = logits()
    assert_close(no_probability(yes, no), torch.stack([yes, no], -1).softmax(-1)[..., 1])


def test_entailed_is_the_subset_of_facts():
    facts = ("red", "blue", "circle", "large")
    says = [{"red"}, {"red", "circle"}, set(), {"blue"}]
    holds = [{"red", "circle", "large"}, {"blue", "circle"}, {"red"}, {"blue", "red"}]

    def hot(sets):
        return tensor([[float(f in s) for f in facts] for s in sets])

    expected = [[bool(s) and s <= h for s in says] for h in holds]  # picture i down, caption j across
    assert entailed(hot(says), hot(holds)).tolist() == expected


# The rules


def slow_rules(yes, no):
    """(CTW, ATD, mass of none, largest p, largest q p) of one picture."""
    e = [math.exp(x) for x in yes]
    p = [x / sum(e) for x in e]
    q = [math.exp(a) / (math.exp(a) + math.exp(b)) for a, b in zip(yes, no, strict=True)]
    best = max(range(len(yes)), key=lambda j: yes[j])
    none = sum((1 - b) * a for a, b in zip(p, q, strict=True))
    return (
        q[best],
        sum(a * b for a, b in zip(p, q, strict=True)),
        none,
        max(p),
        max(a * b for a, b in zip(p, q, strict=True)),
    )


def test_rules_are_the_loops():
    yes, no = logits(200, 4)
    expected = [slow_rules(a, b) for a, b in zip((yes / 4).tolist(), (no / 4).tolist(), strict=True)]
    yes, no = yes / 4, no / 4
    table = tensor(expected, dtype=torch.float64)
    assert_close(competing_to_win(yes, no), table[:, 0])
    assert_close(agreeing_to_differ(yes, no), table[:, 1])
    assert_close(table[:, 1] + table[:, 2], torch.ones(200, dtype=torch.float64))
    for compare, rival in (("p", table[:, 3]), ("qp", table[:, 4])):
        found = atd_is_known(yes, no, compare)
        assert torch.equal(found, table[:, 2] <= rival)
        assert 0 < found.sum() < 200
    assert (atd_is_known(yes, no, "p") != atd_is_known(yes, no, "qp")).any()


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
def test_where_every_no_is_alike_both_scores_are_it(c):
    yes, _ = logits(20, 5)
    no = yes - math.log(c / (1 - c))
    assert_close(competing_to_win(yes, no), torch.full((20,), c, dtype=torch.float64))
    assert_close(agreeing_to_differ(yes, no), torch.full((20,), c, dtype=torch.float64))


def test_with_one_class_both_rules_are_its_q():
    yes, no = logits(20, 1)
    assert_close(agreeing_to_differ(yes, no), competing_to_win(yes, no))
    assert_close(competing_to_win(yes, no), (yes - no)[:, 0].sigmoid())
    assert torch.equal(atd_is_known(yes, no, "qp"), competing_to_win(yes, no) >= 0.5)


# What is trained


@pytest.mark.parametrize("prompts", [0, 16])
def test_at_the_start_the_no_is_the_text_bit_for_bit(encoder, prompts):
    objective, views = views_of(SayNo(prompts), encoder)
    assert torch.equal(views["text_no"].pooled, views["text"].pooled)
    objective.training = True  # itself only: prompts are drawn, but no tower drops anything out
    again = views_of_batch(objective, encoder)
    assert torch.equal(again["text_no"].pooled, views["text"].pooled)
    terms = objective.terms(views)
    expected = {"matched": math.log(2) / 2, "mismatched": math.log(2) / 2, "opposite": 1.99 / 2}
    for name, value in expected.items():
        assert_close(terms[name].item(), value, atol=1e-4, rtol=0)


def test_terms_are_the_equations_with_the_models_scale(encoder):
    """On views of no meaning: logits with the model's scale, no bias, equal captions not each other's negatives."""
    objective, views = views_of(SayNo(weights=(1.0, 2.0, 3.0)), encoder)
    generator = torch.Generator().manual_seed(0)
    for name in ("image", "text", "text_no"):
        rows = normalize(torch.randn(6, encoder.dim, generator=generator), dim=-1)
        views[name] = type(views[name])(rows)
    views.groups = tensor([0, 1, 2, 0, 1, 2])
    image, text, no = (views[name].pooled.double() for name in ("image", "text", "text_no"))
    scale = encoder.scale.item()
    matched, mismatched = slow_losses(
        scale * image @ text.T, scale * image @ no.T, views.groups[:, None] == views.groups[None]
    )
    found = objective.terms(views)
    assert_close(found["matched"].item(), matched, rtol=1e-4, atol=1e-4)
    assert_close(found["mismatched"].item(), 2 * mismatched, rtol=1e-4, atol=1e-4)
    assert_close(found["opposite"].item(), 3 * opposite_loss(text, no).item(), rtol=1e-4, atol=1e-4)


def test_captions_that_hold_elsewhere_are_no_negatives():
    encoder = clip_encoder()
    records = tiny_records()[:3]  # red, green, blue
    facts = ("red", "green", "square")
    told = [
        {**records[0], "says": ["square"], "holds": ["red", "square"]},
        {**records[1], "says": ["green"], "holds": ["green", "square"]},
        {**records[2], "says": [], "holds": []},
    ]
    objective, views = views_of(SayNo(facts=facts), encoder, told)
    spared = entailed(views["says"].pooled, views["holds"].pooled)
    assert spared.tolist() == [[True, False, False], [True, True, False], [False, False, False]]
    yes = views.scale * views["image"].pooled @ views["text"].pooled.T
    no = 0.3 * yes.detach()
    views["text_no"] = type(views["text_no"])(0.3 * views["text"].pooled)
    assert_close(objective.terms(views)["mismatched"], image_text_loss(yes, no, spared)[1] / 2)
    assert objective.terms(views)["mismatched"] != image_text_loss(yes, no)[1] / 2
    with pytest.raises(ValueError, match="none of the objective's: 'round'"):
        views_of(SayNo(facts=facts), encoder, [{**r, "says": ["round"], "holds": []} for r in records])


def test_each_caption_draws_a_prompt_or_their_mean_and_the_test_is_the_mean():
    objective = SayNo(prompts=3).bind(clip_encoder())
    table = torch.randn(objective.prompt_no.shape, generator=torch.Generator().manual_seed(0))
    objective.prompt_no.data.copy_(table)
    assert torch.equal(objective._additions(5), table.mean(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = objective.train()._additions(4000)
    options = [*table, table.mean(0)]
    share = [float((drawn == option).flatten(1).all(1).float().mean()) for option in options]
    assert sum(share) == pytest.approx(1)
    assert all(abs(s - 1 / 4) < 0.03 for s in share)


def test_the_prompt_stands_on_every_word_and_on_no_other_tower(encoder):
    objective, before = views_of(SayNo(prompts=2), encoder)
    tokens = encoder.tokenize(["a cat", "a photo of a small dog"])
    batch = {"image": torch.zeros(2, 3, 32, 32), "text": tokens}
    direction = torch.randn(encoder.anatomy.text.width, generator=torch.Generator().manual_seed(0))  # no norm undoes it
    for position in range(int(tokens.mask[0].sum())):
        objective.prompt_no.data.zero_()[:, position] = direction
        after = objective.encode(encoder, batch)
        assert (after["text_no"].pooled - after["text"].pooled).abs().max() > 1e-4, position
        assert torch.equal(after["text"].pooled, encoder.texts(tokens).pooled)
    assert before["text"].pooled.shape == (6, encoder.dim)


def test_only_the_copy_learns_and_all_of_it(encoder):
    records = tiny_records()
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    done = Train(SayNo(prompts=2), steps=3, batch_size=6, trainable=NOTHING, warmup=0).run(encoder, records)
    for name, value in done.encoder.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all("_no" in name for name, _ in done.objective.named_parameters())
    shell = done.objective._shell[0]
    names = set(text_tensors(shell))
    own = {id(p) for p in done.objective.parameters()}
    for name, value in shell.state_dict(keep_vars=True).items():
        assert (id(value) in own) == (name in names and isinstance(value, torch.nn.Parameter)), name
    changed = {name for name, value in shell.state_dict().items() if not torch.equal(value, state[name])}
    assert changed <= names
    table = encoder.anatomy.text
    for module in (table.table, table.projection, table.blocks[0], table.blocks[-1]):
        inside = {id(v) for v in module.state_dict(keep_vars=True).values()}
        keys = {name for name, value in encoder.state_dict(keep_vars=True).items() if id(value) in inside}
        assert keys & changed
    assert done.objective.prompt_no.abs().sum() > 0


def test_parts_of_a_batch_joined_are_the_batch(encoder):
    """What several processes gather: views of parts, joined, give the terms of the whole."""
    records = [{**r, "says": [r["label"]], "holds": [r["label"]]} for r in tiny_records()[:6]]
    objective, whole = views_of(SayNo(facts=("red", "green", "blue")), encoder, records)
    objective.prompt_no.data.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)
    whole = objective.encode(encoder, collate(encoder, records, objective))
    parts = [objective.encode(encoder, collate(encoder, part, objective)) for part in (records[:2], records[2:])]
    assert_close(objective.terms(join(parts)), objective.terms(whole), atol=1e-5, rtol=1e-4)


def test_chunks_make_the_same_steps():
    def learnt(**more):
        step = Train(SayNo(prompts=0), steps=2, batch_size=6, trainable=NOTHING, warmup=0, **more)
        return step.run(clip_encoder(), tiny_records())

    plain, cut = learnt(), learnt(chunk=4)
    assert_close([row["loss"] for row in cut.log], [row["loss"] for row in plain.log], rtol=1e-5, atol=0)


def test_by_hand_the_first_tower_reads_the_first_and_the_copy_the_second(encoder):
    records = tiny_records()[:3]
    objective, views = views_of(SayNoByHand(), encoder, records)
    captions = [r["caption"] for r in records]
    assert_close(
        views["text"].pooled, encoder.texts(encoder.tokenize([PAIRED[0][0].format(c) for c in captions])).pooled
    )
    assert_close(
        views["text_no"].pooled, encoder.texts(encoder.tokenize([PAIRED[0][1].format(c) for c in captions])).pooled
    )
    batch = objective.collate(encoder, records * 20)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text, no = objective.train()._words(batch)
    rows = {}
    for i, (yes, other) in enumerate(zip(text.ids.tolist(), no.ids.tolist(), strict=True)):
        caption = captions[i % 3]
        fits = [
            k
            for k, pair in enumerate(PAIRED)
            if encoder.tokenize([pair[0].format(caption)]).ids[0].tolist()
            == yes[: len(encoder.tokenize([pair[0].format(caption)]).ids[0])]
        ]
        assert len(fits) == 1  # its own caption, in one of the templates
        second = encoder.tokenize([PAIRED[fits[0]][1].format(caption)]).ids[0].tolist()
        assert other[: len(second)] == second  # and the other tower in the same pair
        rows[fits[0]] = rows.get(fits[0], 0) + 1
    assert len(rows) == len(PAIRED)


# The predictor


def pixels_of(encoder, records):
    return encoder.preprocess([r["image"] for r in records])


@pytest.mark.parametrize("setting", [{}, {"templates": "ensemble"}, {"paired": PAIRED}])
def test_answers_are_those_of_zero_shot_bit_for_bit(encoder, setting):
    records = tiny_records()
    judge = Clipn(prompts=2, steps=3, batch_size=6, lr=0.01, **setting).fit(encoder, records)
    plain = ZeroShot(
        templates=tuple(yes for yes, _ in PAIRED) if "paired" in setting else setting.get("templates", "photo")
    )
    said, expected = (
        judge.predict(pixels_of(encoder, records)),
        plain.fit(encoder, records).predict(pixels_of(encoder, records)),
    )
    assert torch.equal(said.scores, expected.scores)
    assert said.labels == expected.labels
    assert not torch.equal(judge.text_no_, judge.text_)
    assert judge.trained_parameters_ > 1000


def test_the_no_of_a_class_is_the_copys_text_with_the_mean_prompt(encoder):
    judge = Clipn(prompts=2, steps=3, batch_size=6).fit(encoder, tiny_records())
    judge.prompts_ = 0.1 * torch.randn(judge.prompts_.shape, generator=torch.Generator().manual_seed(0))  # to be felt
    judge = judge.for_classes(judge.classes_)
    copied = with_tensors(encoder, judge.state_)
    tokens = copied.tokenize([f"a photo of a {name}." for name in judge.classes_])
    with torch.no_grad():
        plain = token_embeddings(copied, tokens)
        moved = plain.clone()
        length = min(plain.shape[1], judge.prompts_.shape[1])
        moved[:, :length] += (judge.prompts_[0] + judge.prompts_[1])[:length] / 2
        expected, without = (text_from_embeddings(copied, rows, tokens).pooled for rows in (moved, plain))
    assert_close(judge.text_no_, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(judge.text_no_, without, atol=1e-3)


def test_an_untrained_copy_says_one_half(encoder):
    records = tiny_records()
    judge = Clipn(steps=0, templates="ensemble").fit(encoder, records)
    pixels = pixels_of(encoder, records)
    assert torch.equal(judge.text_no_, judge.text_)
    scores = judge.ood_scores(pixels)
    assert torch.equal(scores["ctw"], torch.full((12,), 0.5))
    assert_close(scores["atd"], torch.full((12,), 0.5))
    assert not judge.is_known(pixels).any()  # not above one half
    assert torch.equal(judge.is_known(pixels, "atd"), judge.predict(pixels).scores.softmax(-1).amax(-1) >= 0.5)
    assert judge.state_ == {}
    assert judge.trained_parameters_ == 0


def test_it_learns_to_say_no(encoder):
    """Three classes of features that lie well apart: a picture's own class is then not refused, the others are."""
    records = [{"id": str(i), "label": ("red", "green", "blue")[i % 3]} for i in range(12)]
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, encoder.dim, generator=generator).repeat(4, 1)
    features = normalize(means + 0.3 * torch.randn(12, encoder.dim, generator=generator), dim=-1)
    judge = Clipn(steps=60, batch_size=12, lr=3e-3, weight_decay=0.0, prompts=2).fit_features(
        encoder, features, records
    )
    q = 1 - no_probability(*judge.logits(features))
    truth = tensor([judge.classes_.index(r["label"]) for r in records])
    own, others = q[torch.arange(12), truth], q[torch.arange(3)[None] != truth[:, None]]
    assert own.mean() > 0.7
    assert others.mean() < 0.3


def test_labels_alone_become_captions_and_are_not_each_others_no():
    judge = Clipn(templates=("a photo of a {}.", "a drawing of a {}."))
    records = [{k: r[k] for k in ("id", "image", "label")} for r in tiny_records()]
    names, lessons, facts = judge._lessons(clip_encoder(), records)
    assert names == ("blue", "green", "red")
    assert facts == ()
    written = {(r["label"], lesson["caption"]) for r, lesson in zip(records, lessons, strict=True)}
    assert written <= {(n, f"a {kind} of a {n}.") for n in names for kind in ("photo", "drawing")}
    assert len(written) > 3  # both templates occur
    groups = {(r["label"], lesson["group"]) for r, lesson in zip(records, lessons, strict=True)}
    assert len(groups) == len({g for _, g in groups}) == 3
    captioned = [{**r, "caption": "the same"} for r in records[:3]]
    assert len({lesson["group"] for lesson in judge._lessons(clip_encoder(), captioned)[1]}) == 1


def test_facts_reach_the_loss():
    """All captions hold of all pictures: there is nothing to say no to, so the result is that of no negatives at all."""
    records = [
        {**r, "caption": f"a {r['label']} thing, number {i}", "says": ["thing"], "holds": ["thing"]}
        for i, r in enumerate(tiny_records())
    ]
    encoder, setting = clip_encoder(), {"prompts": 2, "steps": 3, "batch_size": 6}
    told = Clipn(**setting).fit(encoder, records)
    untold = Clipn(**setting).fit(
        encoder, [{k: v for k, v in r.items() if k not in ("says", "holds")} for r in records]
    )
    without = Clipn(**setting, weights=(0.5, 0.0, 0.5)).fit(encoder, records)
    assert torch.equal(told.text_no_, without.text_no_)
    assert not torch.allclose(told.text_no_, untold.text_no_)


def test_other_classes_and_features_are_the_same_judge(encoder):
    records = tiny_records()
    setting = {"prompts": 2, "steps": 3, "batch_size": 6}
    judge = Clipn(**setting).fit(encoder, records)
    other = judge.for_classes(("a cup", "red"))
    direct = Clipn(classes=("a cup", "red"), **setting).fit_features(
        encoder, encode_views(encoder, records)[0], records
    )
    pixels = pixels_of(encoder, records)
    for a, b in ((other, direct),):
        assert a.classes_ == b.classes_ == ("a cup", "red")
        assert torch.equal(a.predict(pixels).scores, b.predict(pixels).scores)
        for name, score in a.ood_scores(pixels).items():
            assert torch.equal(score, b.ood_scores(pixels)[name])
    assert judge.classes_ == ("blue", "green", "red")
    one = judge.for_classes(("red",))
    assert_close(one.ood_scores(pixels)["atd"], one.ood_scores(pixels)["ctw"])


def test_saved_is_what_changed_and_it_opens_with_the_same_answers(encoder, tmp_path):
    records = tiny_records()
    judge = Clipn(prompts=2, steps=3, batch_size=6, rule="atd").fit(encoder, records)
    assert set(judge.state_) <= set(text_tensors(encoder))
    assert judge.prompts_.shape[1] <= encoder.max_tokens
    if not encoder.anatomy.text.padded:  # as long as the longest caption; SigLIP reads its padding, too
        assert judge.prompts_.shape[1] == int(encoder.tokenize([r["caption"] for r in records]).mask.sum(-1).max())
    pixels = pixels_of(encoder, records)
    opened = load_predictor(judge.save(tmp_path / "judge"), encoder)
    for again in (opened, pickle.loads(pickle.dumps(judge)), opened.for_classes(judge.classes_)):
        assert torch.equal(again.is_known(pixels), judge.is_known(pixels))
        for name, score in judge.ood_scores(pixels).items():
            assert torch.equal(again.ood_scores(pixels)[name], score)


def test_the_judge_goes_through_the_protocol():
    encoder, records = clip_encoder(), tiny_records()
    judge = Clipn(prompts=2, steps=3, batch_size=6).fit(encoder, records)
    assert isinstance(judge, ScoresTheUnknown)
    assert isinstance(judge, RefusesTheUnknown)
    unknown = [{"id": str(i), "image": Image.new("RGB", (32, 32), (40 * i, 90, 200 - 40 * i))} for i in range(4)]
    report = ood(judge, records, unknown, resamples=20)
    for name in ("ctw", "atd", "msp", "max_logit", "energy", "mcm"):
        assert report[f"ood.{name}.auroc"].n == 16
    kept = judge.is_known(pixels_of(encoder, records)).float().mean().item()
    assert report["ood.decision.known_kept"].value == pytest.approx(kept)
    right = [s == r["label"] for s, r in zip(judge.predict(pixels_of(encoder, records)).labels, records, strict=True)]
    assert report["ood.known.accuracy"].value == pytest.approx(sum(right) / 12)


def test_tau_sets_the_scale_of_both():
    encoder, records = clip_encoder(), tiny_records()
    judge = Clipn(prompts=2, steps=3, batch_size=6, tau=100.0).fit(encoder, records)
    features = encode_views(encoder, records)[0]
    yes, no = judge.logits(features)
    assert_close(yes, 100 * features @ judge.text_.T)
    assert_close(no, 100 * features @ judge.text_no_.T)
    assert Clipn(steps=0).fit(encoder, records).scale_ == pytest.approx(encoder.scale.item())


class Unopened(Records):
    """Records that must not be looked at."""

    def __init__(self, rows):
        super().__init__(len(rows), lambda i: rows[i], load=self._no)

    @staticmethod
    def _no(record):
        raise AssertionError("a picture was opened")


@pytest.mark.parametrize(
    ("setting", "change", "error", "says"),
    [
        ({"rule": "best"}, {}, ValueError, "rule must be one of ctw, atd, not 'best'"),
        ({"atd_compare": "q"}, {}, ValueError, "atd_compare must be one of p, qp"),
        ({"tau": 0.0}, {}, ValueError, r"tau=0\.0"),
        ({"prompts": -1}, {}, ValueError, "prompts=-1"),
        ({"weights": (0.5, 0.5)}, {}, ValueError, "matched, mismatched, opposite"),
        ({"templates": "a photo"}, {}, ValueError, "holds no {}"),
        ({"paired": ()}, {}, ValueError, "give pairs of templates"),
        ({"paired": (("a {}", "no"),)}, {}, ValueError, "'no' has no {}"),
        ({"classes": "cat"}, {}, ValueError, "not the one string"),
        ({"classes": ("cat", "cat")}, {}, ValueError, "must differ"),
        ({}, {"caption": None, "label": None}, ValueError, "'tiny-0' has neither 'caption' nor 'label'"),
        ({"classes": ("a", "b")}, {"caption": 7}, TypeError, "caption must be a string, not 7"),
        ({}, {"says": "red"}, TypeError, "'tiny-0': says must be a list of facts, not 'red'"),
    ],
)
def test_what_is_wrong_is_said_before_any_picture_is_opened(setting, change, error, says):
    records = tiny_records()
    records[0] = {**records[0], **change}
    with pytest.raises(error, match=says):
        Clipn(**setting).fit(clip_encoder(), Unopened(records))


def test_missing_things_are_named():
    encoder = clip_encoder()
    with pytest.raises(ValueError, match=r"no record has a label: say which classes to tell apart, classes="):
        Clipn().fit(encoder, [{k: r[k] for k in ("image", "caption")} for r in tiny_records()])
    with pytest.raises(ValueError, match="no records to learn from"):
        Clipn().fit(encoder, [])
    with pytest.raises(ValueError, match="3 features and 12 records"):
        Clipn().fit_features(encoder, torch.eye(24)[:3], tiny_records())
    for ask in (
        lambda j: j.ood_scores(torch.zeros(1, 3, 32, 32)),
        lambda j: j.for_classes(("a", "b")),
        lambda j: j.no_encoder(),
    ):
        with pytest.raises(ValueError, match="learnt nothing yet"):
            ask(Clipn())
    judge = Clipn(steps=0).fit(dual_encoder(), tiny_records())
    with pytest.raises(ValueError, match=r"features must be \(B, 24\)"):
        judge.ood_scores_features(torch.zeros(2, 5))
    judge.encoder_ = None
    vars(judge).pop("_no", None)
    with pytest.raises(ValueError, match="needs the model it was fitted on"):
        judge.for_classes(("a", "b"))
