"""Classes as Gaussians that share one covariance: means, scatter, shrunk precisions, the linear classifier they imply.

Everything is computed in float64 whatever comes in (a covariance of unit vectors has eigenvalues near 1e-6), and comes
out in float64: cast where the result is used. Precisions are (d, d), symmetric.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

SHRINKAGES = ("ks", "pinv", "ledoit_wolf", "oas", "graphical_lasso", "identity")


class Linear(NamedTuple):
    """A linear classifier: `features (N, d) @ weight (d, K) + bias (K,)` are its logits, higher is more likely."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return features @ self.weight.to(features) + self.bias.to(features)


def class_means(features: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """(N, d), (N,) int64 -> (K, d) means, not normalised. A class without features is a ValueError."""
    features = features.double()
    counts = torch.bincount(labels, minlength=n_classes)
    if (counts == 0).any():
        raise ValueError(f"no features for class {counts.eq(0).nonzero()[0].item()} of {n_classes}")
    sums = torch.zeros(n_classes, features.shape[1], dtype=torch.float64, device=features.device)
    return sums.index_add_(0, labels, features) / counts[:, None]


def centred(features: Tensor, labels: Tensor, means: Tensor) -> Tensor:
    """(N, d) float64: every sample minus the mean of its own class."""
    return features.double() - means[labels]


def covariance(deviations: Tensor) -> Tensor:
    """(N, d) deviations from a mean -> (d, d) with divisor N - 1 (N = 1 gives zeros)."""
    deviations = deviations.double()
    return deviations.T @ deviations / max(len(deviations) - 1, 1)


def ks_precision(cov: Tensor, n: int) -> Tensor:
    """Kubokawa-Srivastava empirical Bayes: d [(n - 1) cov + tr(cov) I]^-1, invertible for any n unless cov is zero.

    An eigenvalue v of cov becomes d / ((n - 1) v + tr cov). Raises ValueError for a zero covariance.
    """
    cov = cov.double()
    d = len(cov)
    trace = cov.trace()
    if not trace > 0:
        raise ValueError("the covariance is zero: no class has two different samples")
    eye = torch.eye(d, dtype=cov.dtype, device=cov.device)
    return d * _spd_inverse((n - 1) * cov + trace * eye)


def precision(deviations: Tensor, shrinkage: str = "ks") -> Tensor:
    """Inverse covariance of centred samples (N, d), by one of `SHRINKAGES`.

    "ks": `ks_precision`. "pinv": pseudo-inverse of the sample covariance. "ledoit_wolf", "oas": inverse of the
    covariance shrunk towards its mean eigenvalue (Ledoit & Wolf 2004; Chen et al. 2010). "graphical_lasso": sparse
    inverse, scikit-learn, penalty 1 % of the mean variance (ours). "identity": I, the nearest class mean.
    """
    deviations = deviations.double()
    n, d = deviations.shape
    eye = torch.eye(d, dtype=torch.float64, device=deviations.device)
    if shrinkage == "identity":
        return eye
    if shrinkage not in SHRINKAGES:
        raise ValueError(f"shrinkage must be one of {', '.join(SHRINKAGES)}, not {shrinkage!r}")
    if not deviations.square().sum() > 0:
        raise ValueError("the covariance is zero: no class has two different samples")
    if shrinkage == "ks":
        return ks_precision(covariance(deviations), n)
    if shrinkage == "pinv":
        return torch.linalg.pinv(covariance(deviations), hermitian=True)
    if shrinkage == "graphical_lasso":
        return _graphical_lasso(covariance(deviations))
    cov = deviations.T @ deviations / n
    weight = _ledoit_wolf_weight(deviations, cov) if shrinkage == "ledoit_wolf" else _oas_weight(cov, n)
    return _spd_inverse((1 - weight) * cov + weight * cov.trace() / d * eye)


def discriminant(means: Tensor, precision: Tensor, log_prior: Tensor | None = None) -> Linear:
    """Bayes' rule for Gaussians that share a covariance: w_k = P mu_k, b_k = log p_k - mu_k' P mu_k / 2.

    means (K, d), precision (d, d), log_prior (K,), uniform if None. The logits are those of
    -(f - mu_k)' P (f - mu_k) / 2 + log p_k, less a term that no class changes.
    """
    weight = precision @ means.double().T
    bias = -(means.double().T * weight).sum(0) / 2
    if log_prior is None:
        return Linear(weight, bias - torch.tensor(float(len(means)), dtype=bias.dtype).log())
    return Linear(weight, bias + log_prior.double())


def _spd_inverse(matrix: Tensor) -> Tensor:
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    return (inverse + inverse.T) / 2


def _ledoit_wolf_weight(x: Tensor, cov: Tensor) -> Tensor:
    """Share of the scaled identity that minimises the expected Frobenius error, lemma 3.2 and 3.3 of the paper."""
    n, d = x.shape
    mean = cov.trace() / d
    spread = (cov - mean * torch.eye(d, dtype=cov.dtype, device=cov.device)).square().sum()
    noise = (x.square().sum(1).square().sum() / n - cov.square().sum()) / n
    return torch.where(spread > 0, (noise / spread).clamp(0, 1), torch.zeros_like(spread))


def _oas_weight(cov: Tensor, n: int) -> Tensor:
    """Oracle approximating shrinkage, equation 23 of Chen et al. in the form that scikit-learn uses."""
    d = len(cov)
    alpha, mean_squared = cov.square().mean(), (cov.trace() / d).square()
    top, bottom = alpha + mean_squared, (n + 1) * (alpha - mean_squared / d)
    return torch.where(bottom > 0, (top / bottom).clamp(max=1), torch.ones_like(bottom))


def _graphical_lasso(cov: Tensor) -> Tensor:
    from sklearn.covariance import graphical_lasso
    from sklearn.exceptions import ConvergenceWarning

    scale = cov.diagonal().mean()  # the solver's tolerances are absolute, and unit vectors have tiny variances
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        _, found = graphical_lasso((cov / scale).cpu().numpy(), alpha=0.01, max_iter=100)
    return torch.from_numpy(found).to(cov) / scale
