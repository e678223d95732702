"""Tip-Adapter, TIP-X and M-Adapter against their equations as loops, the identities between them, and the search."""

import itertools
import math

import pytest
import torch
from torch import tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from ecliptic.ops.cache_model import tip_adapter_logits
from ecliptic.ops.support_cache import (
    GRIDS,
    Comparison,
    Grid,
    Reference,
    Support,
    Weights,
    compare,
    count_right,
    held_out,
    interval,
    kl_divergence,
    log_distribution,
    m_adapter,
    m_adapter_logits,
    mix,
    reference_of,
    rescale,
    search_m_adapter,
)


def unit(*shape, seed=0):
    found = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(found, dim=-1)


def world(b=7, k=3, each=4, d=10, seed=0):
    """Pictures (b, d), texts (k, d) and a support of `each` items a class with captions, drawn at random."""
    labels = torch.arange(k).repeat(each)
    support = Support(unit(k * each, d, seed=seed + 1), labels, unit(k * each, d, seed=seed + 2))
    return unit(b, d, seed=seed), unit(k, d, seed=seed + 3), support


# The equations, as loops


def slow_softmax(values):
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def slow_kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def slow_m_adapter(f, text, support, alpha, beta, gamma, delta, temp, scale, kl_space):
    """Equations 4 to 9 of the method, one number at a time; ranges over the whole batch."""
    images, captions, labels = support.image_keys.tolist(), support.caption_keys.tolist(), support.labels.tolist()
    f, text = f.tolist(), text.tolist()

    def dot(x, y):
        return sum(a * b for a, b in zip(x, y))

    def distribution(x):
        return slow_softmax([dot(x, t) / temp for t in text] if kl_space == "class" else [v / temp for v in x])

    a = [[(1 - delta) * dot(x, i) + delta * dot(x, c) for i, c in zip(images, captions)] for x in f]
    m = [[slow_kl(distribution(x), distribution(i)) for i in images] for x in f]
    least_a, most_a = min(map(min, a)), max(map(max, a))
    least_m, most_m = min(map(min, m)), max(map(max, m))
    logits = [[scale * dot(x, t) for t in text] for x in f]
    for i, j in itertools.product(range(len(f)), range(len(images))):
        psi = -((m[i][j] - least_m) / (most_m - least_m) * (most_a - least_a) + least_a)
        logits[i][labels[j]] += alpha * math.exp(-beta * (1 - a[i][j])) + gamma * psi
    return tensor(logits, dtype=torch.float64)


@pytest.mark.parametrize("kl_space", ["class", "feature"])
@pytest.mark.parametrize("delta", [0.0, 0.3, 1.0])
def test_logits_by_loops(delta, kl_space):
    f, text, support = world()
    values = {"alpha": 1.7, "beta": 2.5, "gamma": 0.8, "delta": delta, "temp": 0.4, "scale": 20.0, "kl_space": kl_space}
    assert_close(m_adapter_logits(f, text, support, **values), slow_m_adapter(f, text, support, **values))


def test_the_temperature_is_a_half_and_the_scale_100_unless_told():
    f, text, support = world()
    wanted = slow_m_adapter(f, text, support, 1.0, 5.5, 2.0, 0.5, 0.5, 100.0, "class")
    assert_close(m_adapter_logits(f, text, support, 1.0, 5.5, 2.0, 0.5), wanted)


def test_the_two_kl_spaces_differ():
    f, text, support = world()
    found = [compare(f, text, support, kl_space=space).divergence for space in ("class", "feature")]
    assert float((found[0] - found[1]).abs().max()) > 0.01
    assert log_distribution(f, text, 0.5, "feature").shape == f.shape
    assert log_distribution(f, text).shape == (7, 3)


def test_divergence_by_hand():
    # KL((1/2, 1/2) || (1/4, 3/4)) = ln 2 / 2 + ln(2/3) / 2
    p, q = tensor([[0.5, 0.5]]).log(), tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    assert_close(kl_divergence(p, q), tensor([[0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.0]], dtype=torch.float64))


# The invariants


def test_without_captions_and_divergence_it_is_tip_adapter_bit_for_bit():
    f, text, support = (x.float() if isinstance(x, torch.Tensor) else x for x in world())
    support = support._replace(image_keys=support.image_keys.float(), caption_keys=support.caption_keys.float())
    zero_shot = 100.0 * f @ text.T
    tip = tip_adapter_logits(zero_shot, f, support.image_keys, support.labels, 1.3, 4.0)
    assert torch.equal(m_adapter_logits(f, text, support, 1.3, 4.0, gamma=0.0, delta=0.0), tip)
    assert not torch.equal(m_adapter_logits(f, text, support, 1.3, 4.0, gamma=0.0, delta=0.1), tip)


def test_without_weights_it_is_zero_shot_bit_for_bit():
    f, text, support = world()
    assert torch.equal(m_adapter_logits(f, text, support, 0.0, 9.0, 0.0, 0.5), 100.0 * f @ text.T)
    assert torch.equal(m_adapter_logits(f, text, support, 0.0, 9.0, 0.0, 0.5, scale=7.0), 7.0 * f @ text.T)


def test_divergence_from_oneself_is_zero_and_never_negative():
    _, text, support = world(k=5, each=40)
    p = log_distribution(support.image_keys.float(), text.float())
    m = kl_divergence(p, p)
    assert_close(m.diagonal(), torch.zeros(len(p), dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(m.min()) >= 0
    assert float(m.max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(5))
def test_rescaled_has_exactly_the_other_range(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    m, a = (torch.randn(30, 40, generator=generator, dtype=dtype) * s for s in (1e-3, 0.7))
    found = rescale(m, interval(m), interval(a))
    assert found.dtype == dtype
    assert interval(found) == interval(a)
    assert torch.equal(found.flatten().argsort(), m.flatten().argsort())


def test_rescaling_by_hand_outside_and_in_a_point():
    x = tensor([0.0, 1.0, 2.0, 3.0])
    assert_close(rescale(x, (1.0, 2.0), (10.0, 20.0)), tensor([0.0, 10.0, 20.0, 30.0]))
    assert_close(rescale(x, (2.0, 2.0), (10.0, 20.0)), torch.full((4,), 10.0))


def test_captions_alone_do_not_see_the_pictures_of_the_support():
    f, text, support = world()
    other = support._replace(image_keys=unit(12, 10, seed=9))
    weights = {"alpha": 2.0, "beta": 3.0, "gamma": 0.0, "delta": 1.0}
    assert torch.equal(m_adapter_logits(f, text, support, **weights), m_adapter_logits(f, text, other, **weights))
    turned = {**weights, "delta": 0.9}
    assert not torch.equal(m_adapter_logits(f, text, support, **turned), m_adapter_logits(f, text, other, **turned))


def test_twice_the_support_at_half_the_weight_is_the_same():
    f, text, support = world()
    twice = Support(*(torch.cat([part, part]) for part in support[:3]))
    one = m_adapter_logits(f, text, support, 3.0, 2.0, 0.0, 0.4)
    assert_close(m_adapter_logits(f, text, twice, 1.5, 2.0, 0.0, 0.4), one)


def test_blunt_votes_add_alpha_n_to_every_class():
    f, text, support = world(each=4)
    zero_shot = 100.0 * f @ text.T
    found = m_adapter_logits(f, text, support, 5.0, 0.0, 0.0, 0.5)
    assert_close(found, zero_shot + 5.0 * 4)
    assert torch.equal(found.argmax(-1), zero_shot.argmax(-1))


def test_permuting_the_support_changes_nothing():
    f, text, support = world()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    turned = Support(*(part[order] for part in support[:3]))
    assert_close(
        m_adapter_logits(f, text, turned, 2.0, 4.0, 1.0, 0.3), m_adapter_logits(f, text, support, 2.0, 4.0, 1.0, 0.3)
    )


# Frozen statistics


def test_with_a_frozen_reference_a_picture_does_not_depend_on_its_company():
    f, text, support = world(b=20)
    for normalise in (False, True):
        reference = reference_of(compare(f[:9], text, support), 0.4, normalise_modalities=normalise)
        values = {"alpha": 2.0, "beta": 4.0, "gamma": 3.0, "delta": 0.4, "normalise_modalities": normalise}
        whole = m_adapter_logits(f, text, support, **values, reference=reference)
        for i in range(20):
            assert_close(m_adapter_logits(f[i : i + 1], text, support, **values, reference=reference)[0], whole[i])
        own = torch.cat([m_adapter_logits(part, text, support, **values) for part in f.split(10)])
        assert float((own - whole).abs().max()) > 1e-3  # with the statistics of its batch it does


def test_the_batchs_own_statistics_are_those_of_reference_of():
    f, text, support = world()
    found = compare(f, text, support)
    reference = reference_of(found, 0.4)
    assert reference.affinity == interval(mix(found, 0.4))
    assert reference.divergence == interval(found.divergence)
    weights = Weights(1.0, 2.0, 3.0, 0.4)
    assert torch.equal(m_adapter(found, support.labels, weights, reference), m_adapter(found, support.labels, weights))


def test_normalised_modalities_are_z_scores_in_the_pictures_unit():
    f, text, support = world(b=30)
    found = compare(f, text, support)
    shifted = found._replace(captions=0.1 * found.captions - 0.7)  # a range of its own, as SigLIP's
    reference = reference_of(shifted, 0.5, normalise_modalities=True)
    a, c = found.images, shifted.captions
    z = 0.5 * (a - a.mean()) / a.std(correction=0) + 0.5 * (c - c.mean()) / c.std(correction=0)
    assert_close(mix(shifted, 0.5, reference), z * a.std(correction=0) + a.mean())
    plain = reference_of(found, 0.5, normalise_modalities=True)
    assert_close(mix(found, 0.5, plain), mix(shifted, 0.5, reference))  # whatever the shift was
    assert mix(shifted, 0.0, reference) is shifted.images


def test_entries_that_do_not_count_are_in_no_statistic():
    x = tensor([[1.0, 9.0], [2.0, -9.0]])
    counted = tensor([[0.5, 0.0], [2.0, 0.0]])
    found = Comparison(torch.zeros(2, 2), x, x + 1, x.abs())
    reference = reference_of(found, 0.5, counted)
    assert reference == Reference((1.5, 2.5), (1.0, 2.0), (1.5, 0.5), (2.5, 0.5))


def test_what_is_missing_is_said():
    f, text, support = world()
    with pytest.raises(ValueError, match=r"delta=0.5 mixes caption keys in, but this support has none"):
        m_adapter_logits(f, text, support._replace(caption_keys=None), 1.0, 1.0, 0.0, 0.5)
    with pytest.raises(ValueError, match=r"gamma is not 0, but the divergence was left out"):
        m_adapter(compare(f, text, support, kl=False), support.labels, Weights(1.0, 1.0, 1.0))


# The search


def random_problem(seed, b=60, k=4, each=5):
    f, text, support = world(b, k, each, 12, seed)
    return compare(f, text, support, scale=3.0), support.labels, torch.arange(b) % k


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_search_is_exhaustive(seed, normalise):
    found, labels, truth = random_problem(seed)
    grid = Grid((1.0, 8.0), (0.0, 0.4, 3.0), (0.0, 0.2, 1.0, 5.0), (0.0, 0.5, 1.0))
    choice = search_m_adapter(found, labels, truth, grid, normalise_modalities=normalise)
    every = {}
    for beta, alpha, gamma, delta in itertools.product(*grid):
        weights = Weights(alpha, beta, gamma, delta)
        logits = m_adapter(found, labels, weights, normalise_modalities=normalise)
        every[weights] = float((logits.argmax(-1) == truth).double().mean())
    best = max(every.values())
    assert choice.accuracy == best
    assert choice.weights == next(w for w, accuracy in every.items() if accuracy == best)
    assert choice.reference == reference_of(found, choice.weights.delta, normalise_modalities=normalise)
    assert len(set(every.values())) > 5  # the grid does make a difference


def test_counting_is_that_of_argmax():
    generator = torch.Generator().manual_seed(0)
    base, one, two = (torch.randn(200, 5, generator=generator) for _ in range(3))
    two[:50] = 0  # gamma is of no account
    two[50:100, 2] = two[50:100, 3]
    truth = torch.arange(200) % 5
    alphas, gammas = (0.0, 0.3, 2.0), (0.0, 0.1, 0.7, 4.0)
    slow = tensor([[int(((base + a * one + g * two).argmax(-1) == truth).sum()) for g in gammas] for a in alphas])
    assert torch.equal(count_right(base, one, two, truth, alphas, gammas), slow)


def test_counting_in_parts_counts_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    base, one, two = (torch.randn(50, 5, generator=generator) for _ in range(3))
    whole = count_right(base, one, two, torch.arange(50) % 5, (0.0, 1.0), (0.0, 1.0))
    monkeypatch.setattr("ecliptic.ops.support_cache._CELLS", 70)
    assert torch.equal(count_right(base, one, two, torch.arange(50) % 5, (0.0, 1.0), (0.0, 1.0)), whole)


def test_ties_count_as_wrong():
    zero = torch.zeros(4, 3)
    assert count_right(zero, zero, zero, tensor([0, 1, 2, 0]), (1.0,), (0.0, 1.0)).tolist() == [[0, 0]]


def test_without_captions_or_with_fixed_weights_only_the_rest_is_searched():
    found, labels, truth = random_problem(1)
    assert search_m_adapter(found._replace(captions=None), labels, truth).weights.delta == 0
    choice = search_m_adapter(found, labels, truth, GRIDS["coarse"].fixed(alpha=7.0, delta=0.25))
    assert (choice.weights.alpha, choice.weights.delta) == (7.0, 0.25)
    assert choice.weights.beta in GRIDS["coarse"].betas
    assert GRIDS["coarse"].fixed() == GRIDS["coarse"]
    tip = search_m_adapter(found._replace(divergence=None), labels, truth, Grid((1.0, 5.0), (0.5, 1.0)))
    assert (tip.weights.gamma, tip.weights.delta) == (0.0, 0.0)


def test_grids_are_those_of_the_paper():
    betas, alphas, gammas, deltas = GRIDS["paper"]
    assert [len(values) for values in GRIDS["paper"]] == [200, 20, 50, 11]
    assert alphas[0] == 0.1
    assert alphas[1] - alphas[0] == pytest.approx(2.495)
    assert (betas[0], gammas[0], deltas[0], deltas[-1]) == (1, 0.1, 0, 1)
    assert max(betas) < 50
    assert max(alphas) < 50
    assert max(gammas) < 30
    for values in itertools.chain(*GRIDS.values()):
        assert list(values) == sorted(set(values))


# Cross-validation


def test_what_is_held_out_has_no_vote_and_the_rest_stands_for_it():
    labels, fold = tensor([0, 0, 0, 1, 1, 2]), tensor([0, 1, 2, 0, 1, -1])
    rows, counted = held_out(labels, fold)
    assert rows.tolist() == [0, 1, 2, 3, 4]
    for i, row in enumerate(rows.tolist()):
        for j in range(6):
            kept = [m for m in range(6) if labels[m] == labels[j] and fold[m] != fold[row]]
            wanted = int((labels == labels[j]).sum()) / len(kept) if j in kept else 0.0
            assert counted[i, j] == pytest.approx(wanted)
    assert_close(counted[:, :3].sum(1), torch.full((5,), 3.0))  # each class has the votes of all its items


def test_searching_with_counts_is_searching_with_the_items_left():
    _, text, support = world(b=1, k=3, each=4)
    labels = support.labels
    fold = torch.arange(12) // 3 % 2
    rows, counted = held_out(labels, fold)
    grid = Grid((2.0,), (0.0, 1.0, 9.0), (0.0, 0.7), (0.0, 0.4))
    queries = unit(12, 10, seed=5)
    found = compare(queries, text, support, scale=2.0)
    choice = search_m_adapter(found, labels, labels[rows], grid, counted.double())
    hits = {}
    for beta, alpha, gamma, delta in itertools.product(*grid):
        reference, right = reference_of(found, delta, counted), 0
        for i in rows.tolist():
            kept = (fold != fold[i]).nonzero()[:, 0]
            left = Support(*(part[kept] for part in support[:3]))
            logits = m_adapter_logits(
                queries[i : i + 1], text, left, 2 * alpha, beta, 2 * gamma, delta, scale=2.0, reference=reference
            )  # half of the items are left
            right += int(logits.argmax() == labels[i])
        hits[Weights(alpha, beta, gamma, delta)] = right / 12
    assert choice.accuracy == max(hits.values())
    assert hits[choice.weights] == max(hits.values())
    assert len(set(hits.values())) > 2
