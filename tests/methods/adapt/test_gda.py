"""GDA against its equations written as loops, the invariants of the closed form, and what it is sold for."""

import math
import pickle

import numpy as np
import pytest
import torch
from torch import tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from ecliptic.core.predictor_io import load_predictor
from ecliptic.core.zeroshot import zero_shot_head
from ecliptic.data.shots import encode_views, tiny_records
from ecliptic.methods.adapt.gda import (
    GRID,
    Gda,
    GdaNewClasses,
    GdaUnlabelled,
    ensemble,
    gda_classifier,
    new_class_classifier,
    select_alpha,
    unlabelled_classifier,
)
from ecliptic.ops.gaussian import SHRINKAGES, discriminant
from tests.towers import FAMILIES, clip_encoder, siglip_encoder


def rows(*shape, seed=0, unit=True):
    found = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(found, dim=-1) if unit else found


def blobs(n_per_class=8, k=4, d=12, seed=0, condition=30.0):
    """Unit rows around random means with one anisotropic covariance, and their classes' (noisy) text vectors."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(k, d, generator=generator, dtype=torch.float64)
    spread = torch.logspace(0, math.log10(condition) / 2, d, dtype=torch.float64)
    labels = torch.arange(n_per_class * k) % k
    noise = torch.randn(n_per_class * k, d, generator=generator, dtype=torch.float64) * spread * 0.5
    text = means + torch.randn(k, d, generator=generator, dtype=torch.float64)
    return normalize(means[labels] + noise, dim=-1), labels, normalize(text, dim=-1)


# The equations, as loops


def slow_gda(x, y, k):
    """Steps 2-5 with explicit sums and numpy's general inverse."""
    x, n, d = x.double().numpy(), len(x), x.shape[1]
    means = [sum(x[i] for i in range(n) if y[i] == c) / int((y == c).sum()) for c in range(k)]
    cov = np.zeros((d, d))
    for i in range(n):
        z = x[i] - means[int(y[i])]
        cov += np.outer(z, z) / (n - 1)
    p = d * np.linalg.inv((n - 1) * cov + np.trace(cov) * np.eye(d))
    weight = np.stack([p @ m for m in means], 1)
    bias = np.array([math.log(1 / k) - 0.5 * m @ p @ m for m in means])
    return torch.from_numpy(weight), torch.from_numpy(bias)


@pytest.mark.parametrize(("n", "d"), [(8, 12), (2, 40), (50, 6)])  # around, below and above full rank
def test_classifier_is_the_closed_form(n, d):
    x, y, _ = blobs(n, d=d)
    head = gda_classifier(x, y, 4)
    weight, bias = slow_gda(x, y, 4)
    assert_close(head.weight, weight)
    assert_close(head.bias, bias)


def test_unequal_counts_keep_a_uniform_prior_and_pool_the_covariance():
    x, y, _ = blobs(20)
    keep = (y != 1) | (torch.arange(len(y)) < 9)  # class 1 is left two pictures, the others twenty
    x, y = x[keep], y[keep]
    assert int((y == 1).sum()) == 2
    head = gda_classifier(x, y, 4)
    weight, bias = slow_gda(x, y, 4)
    assert_close(head.weight, weight)
    assert_close(head.bias, bias)


def test_two_classes_by_hand():
    # Means (2, 0) and (0, 0); deviations (+-1, 0) and (0, +-1): cov = diag(2, 2)/3, N = 4, d = 2, trace = 4/3,
    # P = 2 / (3 * 2/3 + 4/3) I = 0.6 I; w = (1.2, 0) and 0; b = -ln 2 - 1.2 and -ln 2.
    x = tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    head = gda_classifier(x, tensor([0, 0, 1, 1]), 2)
    assert_close(head.weight, tensor([[1.2, 0.0], [0.0, 0.0]], dtype=torch.float64))
    assert_close(head.bias, tensor([-1.2, 0.0], dtype=torch.float64) - math.log(2))


def slow_base_to_new(base, text, k, copies):
    d = base.shape[1]
    base, text = base.numpy(), text.numpy()
    p, means = np.zeros((d, d)), []
    for t in text:
        order = sorted(range(len(base)), key=lambda i: -float(t @ base[i]))[:k]
        members = [base[i] for i in order] + [t] * copies
        means.append(sum(members) / len(members))
        scatter = sum(np.outer(base[i] - t, base[i] - t) for i in order) / (k - 1)
        p += d * np.linalg.inv((k - 1) * scatter + np.trace(scatter) * np.eye(d)) / len(text)
    weight = np.stack([p @ m for m in means], 1)
    bias = np.array([math.log(1 / len(text)) - 0.5 * m @ p @ m for m in means])
    return torch.from_numpy(weight), torch.from_numpy(bias)


def test_new_classes_are_made_from_neighbours_and_text():
    base, text = rows(90, 7), rows(3, 7, seed=1)
    for k, copies in [(64, 16), (5, 2)]:
        head = new_class_classifier(base, text, k, copies)
        weight, bias = slow_base_to_new(base, text, k, copies)
        assert_close(head.weight, weight)
        assert_close(head.bias, bias)
    few = new_class_classifier(base[:10], text)  # fewer base pictures than neighbours wanted: all of them
    assert_close(few.weight, slow_base_to_new(base[:10], text, 10, 16)[0])
    with pytest.raises(ValueError, match="two or more base features"):
        new_class_classifier(base[:1], text)


def test_base_classes_use_the_pseudo_inverse_of_the_mean_covariance():
    x, y, _ = blobs(5, d=9)
    means = [x[y == c].mean(0) for c in range(4)]
    cov = sum(np.cov(x[y == c].numpy().T) for c in range(4)) / 4
    p = torch.from_numpy(np.linalg.pinv(cov, hermitian=True))
    head = gda_classifier(x, y, 4, "mean_pinv")
    assert_close(head.weight, torch.stack([p @ m for m in means], 1), rtol=1e-6, atol=1e-6)
    assert_close(head.bias, tensor([math.log(1 / 4) - 0.5 * float(m @ p @ m) for m in means], dtype=torch.float64))


def slow_em(x, text, scale, alpha, rounds):
    n, d, k = len(x), x.shape[1], len(text)
    x, text = x.numpy(), text.numpy()

    def softmax(v):
        e = np.exp(v - v.max())
        return e / e.sum()

    r = np.stack([softmax(scale * text @ f) for f in x])
    for _ in range(rounds):
        means = [sum(r[i, c] * x[i] for i in range(n)) / sum(r[i, c] for i in range(n)) for c in range(k)]
        cov = np.zeros((d, d))
        for i in range(n):
            for c in range(k):
                cov += r[i, c] * np.outer(x[i] - means[c], x[i] - means[c]) / n
        p = d * np.linalg.inv((n - 1) * cov + np.trace(cov) * np.eye(d))
        weight = np.stack([p @ m for m in means], 1)
        bias = np.array([math.log(1 / k) - 0.5 * m @ p @ m for m in means])
        r = np.stack([softmax(scale * text @ f + alpha * (f @ weight + bias)) for f in x])
    return torch.from_numpy(weight), torch.from_numpy(bias), torch.from_numpy(r)


@pytest.mark.parametrize("rounds", [1, 3])
def test_em_is_its_two_steps(rounds):
    x, _, text = blobs(8, k=3, d=6)
    found = unlabelled_classifier(x, text, scale=8.0, alpha=0.7, rounds=rounds, tolerance=0.0)
    weight, bias, r = slow_em(x, text, 8.0, 0.7, rounds)
    assert_close(found.head.weight, weight)
    assert_close(found.head.bias, bias)
    assert_close(found.responsibilities, r)
    assert (found.rounds, found.converged) == (rounds, False)


def test_em_stops_when_nothing_moves_and_survives_classes_nobody_resembles():
    x, _, text = blobs(10, k=3, d=6)
    found = unlabelled_classifier(x, text, scale=30.0, rounds=200)
    again = unlabelled_classifier(x, text, scale=30.0, rounds=found.rounds + 50)
    assert found.converged
    assert found.rounds < 200
    assert_close(found.head.weight, again.head.weight)
    far = torch.cat([text, -x.mean(0, keepdim=True)])
    assert unlabelled_classifier(x, normalize(far, dim=-1), scale=1e5).head.weight.isfinite().all()
    same = x[:1].expand(5, -1)
    assert unlabelled_classifier(same, text).head.weight.isfinite().all()  # no spread at all: P = I
    with pytest.raises(ValueError, match="at least one round"):
        unlabelled_classifier(x, text, rounds=0)


# Relations


@pytest.mark.parametrize("family", FAMILIES)
def test_alpha_zero_is_zero_shot_bit_for_bit(family):
    encoder = FAMILIES[family]()
    judge = Gda(alpha=0.0, views=1).fit(encoder, tiny_records())
    pixels = encoder.preprocess([r["image"] for r in tiny_records()])
    with torch.no_grad():
        expected = encoder.logits(encoder.images(pixels).pooled, zero_shot_head(encoder, ("blue", "green", "red")))
    assert torch.equal(judge.predict(pixels).scores, expected)


def test_the_models_own_scale_and_bias_are_used():
    encoder = siglip_encoder()
    judge = Gda(views=0).fit(encoder, tiny_records())
    assert_close(judge.scale_, encoder.scale.detach())
    assert_close(judge.logit_bias_, tensor(-10.0))
    assert not judge.scale_.requires_grad
    assert_close(Gda(views=0).fit(clip_encoder(), tiny_records()).logit_bias_, tensor(0.0))


def test_softmax_is_that_of_the_distances():
    x, y, _ = blobs()
    head = gda_classifier(x, y, 4)
    d, n = x.shape[1], len(x)
    means = torch.stack([x[y == c].mean(0) for c in range(4)])
    z = x - means[y]
    cov = z.T @ z / (n - 1)
    p = d * torch.linalg.inv((n - 1) * cov + cov.trace() * torch.eye(d))
    slow = torch.stack([-0.5 * ((x - m) @ p * (x - m)).sum(-1) for m in means], -1)
    assert_close(head(x).softmax(-1), slow.softmax(-1), rtol=0, atol=1e-5)


def test_unshrunk_is_invariant_to_affine_maps():
    x, y, _ = blobs(200, d=6)
    a, c = rows(6, 6, seed=5, unit=False) + 2 * torch.eye(6), rows(6, seed=6, unit=False)
    moved = x @ a.T + c
    before = gda_classifier(x, y, 4, "pinv")(x).argmax(-1)
    assert torch.equal(gda_classifier(moved, y, 4, "pinv")(moved).argmax(-1), before)
    assert not torch.equal(gda_classifier(moved, y, 4, "identity")(moved).argmax(-1), before)  # what P is for


def test_permuting_classes_permutes_logits():
    x, y, text = blobs()
    order = tensor([2, 0, 3, 1])  # new position of each class
    one = Gda(alpha=1.0).fit_features(x, y, text)
    two = Gda(alpha=1.0).fit_features(x, order[y], text[order.argsort()])
    assert_close(two.predict_features(x).scores[:, order], one.predict_features(x).scores)


def test_duplicating_everything_changes_p_only_through_n():
    x, y, _ = blobs()
    n, d = len(x), x.shape[1]
    means = torch.stack([x[y == c].mean(0) for c in range(4)])
    z = x - means[y]
    cov = 2 * z.T @ z / (2 * n - 1)
    p = d * torch.linalg.inv((2 * n - 1) * cov + cov.trace() * torch.eye(d))
    doubled = gda_classifier(torch.cat([x, x]), torch.cat([y, y]), 4)
    assert_close(doubled.weight, discriminant(means, p).weight)


def test_identity_precision_is_the_nearest_class_mean():
    x, y, _ = blobs()
    means = torch.stack([x[y == c].mean(0) for c in range(4)])
    assert torch.equal(gda_classifier(x, y, 4, "identity")(x).argmax(-1), torch.cdist(x, means).argmin(-1))


@pytest.mark.parametrize("shrinkage", [*SHRINKAGES, "mean_pinv"])
def test_every_estimator_gives_a_usable_classifier(shrinkage):
    x, y, text = blobs(30)
    judge = Gda(shrinkage=shrinkage).fit_features(x, y, text)
    assert float((judge.predict_features(x).scores.argmax(-1) == y).double().mean()) > 0.6
    assert judge.shrinkage_ == shrinkage


# The weight


def test_alpha_is_the_best_of_the_grid_and_the_smallest_among_equals():
    zero_shot = tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    gaussian = tensor([[0.0, 0.5], [-1.0, 1.0], [0.0, 0.0]])
    labels = tensor([0, 1, 1])  # the second picture needs alpha > 0.5, the first alpha < 2
    found = select_alpha(zero_shot, gaussian, labels, (0.1, 1.0, 1.5, 10.0))
    assert found.alpha == 1.0
    assert found.accuracy == {0.1: 2 / 3, 1.0: 1.0, 1.5: 1.0, 10.0: 2 / 3}
    assert select_alpha(zero_shot, 0 * gaussian, labels).alpha == GRID[0]


def test_given_validation_decides():
    x, y, text = blobs(16)
    good, bad = x, normalize(text[y] + 0.01 * x, dim=-1)  # the second set is what the text says: no Gaussian needed
    assert Gda().fit_features(x, y, text, validation=(good, y)).alpha_ > GRID[0]
    assert Gda().fit_features(x, y, text, validation=(bad, y)).alpha_ == GRID[0]


def test_cross_validation_holds_out_every_view_of_a_picture():
    x, y, text = blobs(4)
    text = text.roll(1, 0)  # useless text: alpha depends on the Gaussian part alone
    noise = 1e-3 * rows(3, *x.shape, seed=9)
    random = rows(*x.shape, seed=3)  # pictures that say nothing about their class
    judge = Gda().fit_features(random, y, text, views=normalize(random + noise, dim=-1))
    # If views of a held-out picture were left in, each picture would be recognised by its own views.
    assert max(judge.validation_accuracy_.values()) < 0.6
    assert Gda(folds=2).fit_features(x, y, text).validation_accuracy_.keys() == set(GRID)


def test_one_shot_without_views_falls_back_to_identity_and_the_usual_weight():
    x, y, text = blobs(1)
    judge = Gda().fit_features(x, y, text)
    assert (judge.shrinkage_, judge.alpha_, judge.validation_accuracy_) == ("identity", 1.0, {})
    assert_close(judge.weight_, x[y.argsort()].T.float())
    three = Gda().fit_features(x.repeat(3, 1), y.repeat(3), text)  # one picture thrice is no spread either
    assert three.shrinkage_ == "identity"
    some = torch.cat([x, x[:1] + 0.1 * rows(1, 12, seed=4)])  # one class with two pictures is enough for P
    assert Gda(alpha=1.0).fit_features(normalize(some, dim=-1), torch.cat([y, y[:1]]), text).shrinkage_ == "ks"


def test_one_shot_with_views_has_a_covariance():
    judge = Gda(views=3).fit(clip_encoder(), tiny_records()[:3])
    assert (judge.shrinkage_, judge.alpha_) == ("ks", 1.0)


def test_views_are_samples_of_their_own_not_averaged():
    x, y, text = blobs(3)
    views = normalize(x + 0.3 * rows(5, *x.shape, seed=2), dim=-1)
    judge = Gda(alpha=1.0).fit_features(x, y, text, views=views)
    weight, bias = slow_gda(views.reshape(-1, x.shape[1]), y.repeat(5), 4)
    assert_close(judge.weight_, weight.float())
    assert_close(judge.bias_, bias.float())
    averaged = gda_classifier(views.mean(0), y, 4)
    assert (averaged.weight - weight).abs().max() > 1.0


# From pictures


def test_fit_is_fit_features_on_encoded_views():
    encoder, records = clip_encoder(), tiny_records()
    judge = Gda(views=4, seed=3).fit(encoder, records)
    plain, views = encode_views(encoder, records, 4, seed=3)
    labels = tensor([("blue", "green", "red").index(r["label"]) for r in records])
    text = zero_shot_head(encoder, ("blue", "green", "red"))
    by_hand = Gda(seed=3).fit_features(plain, labels, text, views=views, scale=encoder.scale)
    assert judge.classes_ == ("blue", "green", "red")
    assert_close(judge.weight_, by_hand.weight_)
    assert judge.alpha_ == by_hand.alpha_
    assert torch.equal(plain, encoder.encode_images([r["image"] for r in records]))


def test_colours_are_learnt_from_pictures():
    encoder, records = clip_encoder(), tiny_records()
    judge = Gda(views=5).fit(encoder, records[:9], validation=records[9:])
    answer = judge.predict(encoder.preprocess([r["image"] for r in records]))
    assert answer.labels == [r["label"] for r in records]
    assert answer.scores.shape == (12, 3)
    assert Gda(views=5, text=False).fit(encoder, records).predict(
        encoder.preprocess([r["image"] for r in records])
    ).labels == [r["label"] for r in records]


def test_a_part_of_the_label_space():
    encoder, records = clip_encoder(), tiny_records()
    judge = Gda(views=1).fit(encoder, records)
    pixels = encoder.preprocess([r["image"] for r in records])
    part, whole = judge.predict(pixels, classes=("red", "blue")), judge.predict(pixels)
    assert part.classes == ("red", "blue")
    assert torch.equal(part.scores, whole.scores[:, [2, 0]])
    assert set(part.labels) <= {"red", "blue"}
    with pytest.raises(ValueError, match="not among the classes learnt: 'pink'"):
        judge.predict(pixels, classes=("red", "pink"))


def test_new_classes_from_pictures_of_others():
    encoder, records = clip_encoder(), tiny_records()
    judge = GdaNewClasses(new_classes=("cup", "boat"), neighbours=8, views=2).fit(encoder, records)
    plain, views = encode_views(encoder, records, 2)
    head = new_class_classifier(views.flatten(0, 1), zero_shot_head(encoder, ("cup", "boat")), neighbours=8)
    assert_close(judge.weight_, head.weight.float())
    assert judge.predict_features(plain).classes == ("cup", "boat")
    base = Gda(shrinkage="mean_pinv", views=2).fit(encoder, records)
    assert_close(judge.predict_base(plain).scores, base.predict_features(plain).scores)
    assert judge.alpha_ == base.alpha_  # chosen on base pictures


def test_unlabelled_pictures_need_no_label():
    encoder, records = clip_encoder(), tiny_records()
    bare = [{"id": r["id"], "image": r["image"]} for r in records]
    names = ("red", "green", "blue")
    judge = GdaUnlabelled(classes=names).fit(encoder, bare)
    features = encoder.encode_images([r["image"] for r in records])
    found = unlabelled_classifier(features, zero_shot_head(encoder, names), encoder.scale.item(), alpha=12 / 24)
    assert_close(judge.weight_, found.head.weight.float())
    assert (judge.rounds_, judge.converged_) == (found.rounds, found.converged)
    assert judge.predict_features(features).classes == names


# What it is sold for


def test_noisy_directions_are_silenced():
    x, y, text = blobs(60, k=5, d=20, condition=400.0, seed=1)
    train, test = slice(0, 80), slice(80, None)

    def accuracy(shrinkage):
        judge = Gda(shrinkage=shrinkage).fit_features(x[train], y[train], text)
        return float((judge.predict_features(x[test]).scores.argmax(-1) == y[test]).double().mean())

    assert accuracy("ks") > accuracy("identity") + 0.1


@pytest.mark.parametrize("seed", range(3))
def test_em_gains_over_the_text_it_starts_from_however_many_pictures(seed):
    for n_per_class in (40, 160):
        x, y, text = blobs(n_per_class, d=16, seed=seed)
        judge = GdaUnlabelled(rounds=40).fit_features(x, text, scale=10.0)
        zero_shot = float(((x @ text.T).argmax(-1) == y).double().mean())
        found = float((judge.predict_features(x).scores.argmax(-1) == y).double().mean())
        assert found > zero_shot + 0.05
        assert judge.alpha_ == 4 * n_per_class / 16


# Keeping


@pytest.mark.parametrize("kind", [Gda, GdaNewClasses, GdaUnlabelled])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_opened_it_answers_the_same(kind, family, tmp_path):
    encoder = FAMILIES[family]()
    judge, records = kind.tiny()
    judge.fit(encoder, records).save(tmp_path / "judge")
    pixels = encoder.preprocess([r["image"] for r in records])
    for again in (kind.load(tmp_path / "judge", encoder), load_predictor(tmp_path / "judge", encoder)):
        assert type(again) is kind
        assert torch.equal(again.predict(pixels).scores, judge.predict(pixels).scores)
        assert again.get_params() == judge.get_params()


def test_fitted_judges_can_be_pickled():
    x, y, text = blobs()
    judge = Gda().fit_features(x, y, text)
    again = pickle.loads(pickle.dumps(judge))
    assert torch.equal(again.predict_features(x).scores, judge.predict_features(x).scores)


def test_scikit_learn_can_clone_it():
    from sklearn.base import clone

    judge = Gda(views=0, alpha=0.5).fit(clip_encoder(), tiny_records())
    copy = clone(judge)
    assert copy.get_params() == judge.get_params()
    assert not hasattr(copy, "weight_")


# Mistakes


def shots(**change):
    x, y, text = blobs()
    return {"features": x, "labels": y, "text": text} | change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(32, dtype=torch.int64), "text": rows(1, 12)}, "one class only"),
        ({"labels": torch.arange(32) % 3}, "no pictures of '3'"),
        ({"labels": torch.arange(32) % 5}, r"labels must lie in 0..3, found 0..4"),
        ({"labels": torch.arange(30) % 4}, r"labels must be \(32,\) integers"),
        ({"labels": torch.rand(32)}, "integers"),
        ({"text": rows(4, 11)}, r"text must be \(4, 12\), got \(4, 11\)"),
        ({"text": rows(3, 12), "classes": tuple("abcd")}, r"text must be \(4, 12\)"),
        ({"features": blobs()[0].index_fill(0, tensor([3, 7]), math.nan)}, "row 3, 7 are not finite"),
        ({"features": 5 * blobs()[0]}, "must be unit rows"),
        ({"features": torch.empty(0, 12), "labels": torch.empty(0, dtype=torch.int64)}, "N > 0"),
        ({"classes": ("a", "b", "b", "c")}, "class names must differ"),
        ({"views": torch.ones(2, 31, 12)}, r"views must be \(V, 32, 12\)"),
        ({"validation": (rows(3, 11), tensor([0, 1, 2]))}, r"validation features must be \(N, 12\), got \(3, 11\)"),
        ({"validation": (rows(3, 12), tensor([0, 1, 9]))}, "labels must lie in"),
    ],
)
def test_bad_tensors_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Gda().fit_features(**shots(**change))


def test_bad_records_are_named_before_any_picture_is_opened():
    class Never:
        def __getattr__(self, name):
            raise AssertionError("the model was asked")

    records = [{"id": "a", "image": "nowhere.png", "label": "x"}, {"id": "b", "image": "nowhere.png", "label": "y"}]
    bad = [
        (Gda(), [], "no records"),
        (Gda(), records[:1], r"one class only \(x\)"),
        (Gda(), [records[0], {"id": "b", "image": None}], "'b' has no label; it has 'id', 'image'"),
        (Gda(classes=("x", "z")), records, "none of the classes: 'y'"),
        (Gda(classes=("x", "y", "z")), records, "no pictures of 'z'"),
        (Gda(classes="xy"), records, "list of names"),
        (Gda(shrinkage="none"), records, "shrinkage must be one of ks"),
        (Gda(templates="photos"), records, "no template set 'photos'"),
        (GdaNewClasses(new_classes=("z",), templates=()), records, "there are no templates"),
        (Gda(views=-1), records, "views must be 0 or more"),
        (GdaNewClasses(), records, "needs new_classes="),
        (GdaUnlabelled(), records, "needs classes="),
        (GdaUnlabelled(classes=("x",)), records, "needs classes="),
    ]
    for judge, pairs, message in bad:
        with pytest.raises(ValueError, match=message):
            judge.fit(Never(), pairs)
    with pytest.raises(ValueError, match="none of the classes: 'z'"):
        Gda().fit(Never(), records, validation=[{"image": None, "label": "z"}])


def test_use_before_fit_and_on_the_wrong_features():
    with pytest.raises(ValueError, match=r"learnt nothing yet: call fit\(\) first"):
        Gda().predict_features(rows(2, 12))
    judge = Gda().fit_features(*blobs())
    with pytest.raises(ValueError, match=r"features must be \(B, 12\), got \(2, 11\)"):
        judge.predict_features(rows(2, 11))
    with pytest.raises(ValueError, match="no encoder here"):
        judge.predict(torch.zeros(1, 3, 32, 32))


def test_inputs_are_left_alone():
    x, y, text = blobs()
    before = x.clone(), y.clone(), text.clone()
    Gda().fit_features(x, y, text).predict_features(x)
    GdaUnlabelled().fit_features(x, text)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, y, text)))
    zero_shot = x @ text.T
    assert ensemble(zero_shot, zero_shot, 0.0) is zero_shot
