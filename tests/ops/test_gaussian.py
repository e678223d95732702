"""Shared-covariance Gaussians against loops in float64, values by hand, and scikit-learn's estimators."""

import math

import numpy as np
import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from ecliptic.ops.gaussian import (
    SHRINKAGES,
    Linear,
    centred,
    class_means,
    covariance,
    discriminant,
    ks_precision,
    precision,
)


def blobs(n=60, d=5, k=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % k
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    means = 3 * torch.randn(k, d, generator=generator, dtype=torch.float64)
    return means[labels] + torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix, labels


def test_means_and_covariance_by_loops():
    x, y = blobs()
    means = class_means(x, y, 3)
    total = torch.zeros(5, 5, dtype=torch.float64)
    for k in range(3):
        members = [x[i] for i in range(len(x)) if y[i] == k]
        assert_close(means[k], sum(members) / len(members))
        for f in members:
            for a in range(5):
                for b in range(5):
                    total[a, b] += (f[a] - means[k][a]) * (f[b] - means[k][b])
    z = centred(x, y, means)
    assert_close(covariance(z), total / (len(x) - 1))
    assert_close(covariance(z), torch.cov(z.T))  # variables in rows


def test_half_precision_input_is_computed_in_double():
    x, y = blobs()
    assert class_means(x.half(), y, 3).dtype == torch.float64
    assert covariance(x.half()).dtype == torch.float64


def test_empty_class_is_named():
    with pytest.raises(ValueError, match="no features for class 1 of 3"):
        class_means(torch.ones(2, 2), tensor([0, 2]), 3)


def test_ks_eigenvalues():
    x, y = blobs(n=20, d=6)
    cov, n, d = covariance(centred(x, y, class_means(x, y, 3))), 20, 6
    p = ks_precision(cov, n)
    assert torch.equal(p, p.T)
    values, vectors = torch.linalg.eigh(cov)
    for value, vector in zip(values, vectors.T):
        assert_close(p @ vector, d / ((n - 1) * value + values.sum()) * vector, rtol=1e-5, atol=1e-9)


def test_ks_of_a_multiple_of_the_identity_by_hand():
    # d = 4, n = 11, s = 0.5: P = 4 / (0.5 * (10 + 4)) = 4/7
    assert_close(ks_precision(0.5 * torch.eye(4), 11), 4 / 7 * torch.eye(4, dtype=torch.float64))


def test_ks_is_defined_below_full_rank_and_nowhere_without_any_spread():
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    assert ks_precision(covariance(x - x.mean(0)), 3).isfinite().all()
    with pytest.raises(ValueError, match="covariance is zero"):
        ks_precision(torch.zeros(4, 4), 10)
    with pytest.raises(ValueError, match="covariance is zero"):
        precision(torch.zeros(10, 4))


@pytest.mark.parametrize("n", [8, 15, 200])
@pytest.mark.parametrize("name", ["ledoit_wolf", "oas"])
def test_shrinkage_agrees_with_scikit_learn(name, n):
    from sklearn.covariance import OAS, LedoitWolf

    z = torch.randn(n, 12, generator=torch.Generator().manual_seed(n), dtype=torch.float64) * torch.arange(1, 13)
    z = z - z.mean(0)
    reference = {"ledoit_wolf": LedoitWolf, "oas": OAS}[name](assume_centered=True).fit(z.numpy())
    assert_close(precision(z, name), torch.from_numpy(reference.precision_), rtol=1e-8, atol=1e-10)


def test_pinv_is_the_inverse_where_there_is_one_and_penrose_elsewhere():
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_close(precision(x, "pinv") @ covariance(x), torch.eye(6, dtype=torch.float64), rtol=1e-8, atol=1e-8)
    few = x[:3] - x[:3].mean(0)
    cov, inverse = covariance(few), precision(few, "pinv")
    assert_close(cov @ inverse @ cov, cov)
    assert_close(inverse @ cov @ inverse, inverse)


def test_graphical_lasso_finds_that_unlinked_variables_are_unlinked():
    generator = np.random.default_rng(0)
    chain = np.eye(4) + np.diag([0.45] * 3, 1) + np.diag([0.45] * 3, -1)  # neighbours only
    x = (
        torch.from_numpy(generator.multivariate_normal(np.zeros(4), np.linalg.inv(chain), 4000)) * 1e-2
    )  # unit-row sized
    found = precision(x, "graphical_lasso") * 1e-4
    assert_close(found, torch.from_numpy(chain), rtol=0, atol=0.12)
    assert found[0, 3].abs() < 0.05


def test_identity_is_the_nearest_mean():
    x, y = blobs()
    means = class_means(x, y, 3)
    nearest = torch.stack([(x - m).square().sum(-1) for m in means], -1).argmin(-1)
    assert torch.equal(discriminant(means, precision(x, "identity"))(x).argmax(-1), nearest)


def test_unknown_shrinkage_lists_the_known():
    with pytest.raises(ValueError, match="ks, pinv, ledoit_wolf"):
        precision(torch.eye(3), "shrink")


@pytest.mark.parametrize("name", SHRINKAGES)
def test_every_precision_is_symmetric_and_positive(name):
    x, y = blobs(n=40)
    p = precision(centred(x, y, class_means(x, y, 3)), name)
    assert_close(p, p.T)
    assert torch.linalg.eigvalsh(p).min() > 0


def test_discriminant_is_the_mahalanobis_distance():
    x, y = blobs()
    means = class_means(x, y, 3)
    p = precision(centred(x, y, means))
    slow = torch.zeros(len(x), 3, dtype=torch.float64)
    for i, f in enumerate(x):
        for k, m in enumerate(means):
            slow[i, k] = -0.5 * sum(
                (f[a] - m[a]) * p[a, b] * (f[b] - m[b]) for a in range(5) for b in range(5)
            ) + math.log(1 / 3)
    logits = discriminant(means, p)(x)
    assert_close(logits.softmax(-1), slow.softmax(-1), rtol=0, atol=1e-5)
    left = logits - slow  # the omitted term: the same for all classes
    assert_close(left, left[:, :1].expand(-1, 3))


def test_discriminant_by_hand_and_with_a_prior():
    # P = I, means (1, 0) and (0, 2): w as the means, b = -1/2 and -2, plus the logarithm of the prior.
    head = discriminant(tensor([[1.0, 0.0], [0.0, 2.0]]), torch.eye(2, dtype=torch.float64))
    assert_close(head.weight, tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64))
    assert_close(head.bias, tensor([-0.5, -2.0], dtype=torch.float64) - math.log(2))
    prior = tensor([0.9, 0.1]).log()
    assert_close(
        discriminant(tensor([[1.0, 0.0], [0.0, 2.0]]), torch.eye(2).double(), prior).bias - prior,
        head.bias + math.log(2),
    )


def test_linear_takes_the_type_of_the_features():
    head = Linear(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    assert head(torch.ones(3, 2)).dtype == torch.float32
