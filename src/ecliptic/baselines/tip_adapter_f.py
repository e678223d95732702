"""Tip-Adapter-F: Tip-Adapter whose keys are trained on the labelled pictures they start from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ecliptic.baselines._shots import CachePredictor
from ecliptic.core.contracts import Record
from ecliptic.core.support_predictor import check_weights, number
from ecliptic.core.train import Settings
from ecliptic.core.train import fit as train
from ecliptic.data.shot_tensors import check_shots
from ecliptic.data.shots import folds_of, tiny_records
from ecliptic.ops.cache_model import ALPHAS, BETAS, cache_keys, tip_adapter_logits
from ecliptic.ops.support_cache import TIP_START, Comparison, Grid, Support, held_out, search_m_adapter


@dataclass(eq=False)
class TipAdapterF(CachePredictor):
    """The keys of Tip-Adapter as the weights of a linear layer, trained by cross-entropy (arXiv 2111.03930, section 3.2).

    They are trained at the weights that the search starts from; alpha and beta are chosen afterwards on validation pictures,
    else by cross-validation over the shots, with keys trained anew for each fold. The released code keeps the epoch that is best
    on the test set; here the last one counts. Every epoch sees one of `views` at random of each picture, whose features are kept.
    """

    classes: tuple[str, ...] | None = None  # None: the labels found, sorted
    templates: str | tuple[str, ...] = "photo"  # as `core.zeroshot.zero_shot_head` takes them
    alpha: float | None = None
    beta: float | None = None
    epochs: int = 20  # released code, as all values of the training
    batch_size: int = 256
    lr: float = 1e-3
    views: int = 10  # averaged into the starting keys, and what is trained on; 0: the picture as it is
    folds: int = 4  # for the cross-validation; ours
    seed: int = 0

    def fit_features(
        self,
        features: Tensor,
        labels: Tensor,
        text: Tensor,
        *,
        views: Tensor | None = None,
        validation: tuple[Tensor, Tensor] | None = None,
        classes: Sequence[str] | None = None,
        scale: Tensor | float = 100.0,
        logit_bias: Tensor | float | None = None,
    ) -> Self:
        """The same from tensors: features (N, D) and text (K, D), unit rows, labels (N,) int64, views (V, N, D)."""
        self._check_settings()
        names = check_shots(features, labels, text, views=views, validation=validation, classes=classes)
        features = features.detach().clone()  # tensors made in inference mode cannot take part in training
        seen = features[None] if views is None else views.detach().clone()
        self._keep(names, Support(self._trained(seen, labels, text, scale), labels), text, scale, logit_bias)
        self.trained_parameters_ = self.image_keys_.numel()
        fold = folds_of(labels, self.folds, self.seed)
        grid = Grid(BETAS, ALPHAS).fixed(self.alpha, self.beta)
        if validation is not None or not (fold >= 0).any():
            self._choose(grid, TIP_START.given(alpha=self.alpha, beta=self.beta), validation)
            return self
        rows, counted = held_out(labels, fold)
        affinity = torch.zeros(len(labels), len(labels), dtype=features.dtype)  # to the keys of the picture's own fold
        for k in range(int(fold.max()) + 1):
            kept, held = (fold != k).nonzero()[:, 0], (fold == k).nonzero()[:, 0]
            keys = self._trained(seen[:, kept], labels[kept], text, scale)
            affinity[held[:, None], kept] = features[held] @ keys.T
        found = Comparison(self.scale_ * features[rows] @ text.to(features).T, affinity[rows])
        self._take(*search_m_adapter(found, labels, labels[rows], grid, counted.to(features)))
        return self

    def _trained(self, views: Tensor, labels: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
        """Keys (M, D), trained from the means of the views (V, M, D) on these views."""
        cache = _Cache(cache_keys(views) if len(views) > 1 else views[0])
        alpha, beta = TIP_START.given(alpha=self.alpha, beta=self.beta)[:2]
        zero_shot = (number(scale) * views @ text.to(views).T).detach()
        per_epoch = math.ceil(len(labels) / self.batch_size)

        def batch(i: int) -> tuple[Tensor, Tensor]:
            """(view, shot) of a part of the epoch's shuffled shots."""
            rng = np.random.default_rng([self.seed, i // per_epoch])
            order = torch.from_numpy(rng.permutation(len(labels)))
            view = torch.from_numpy(rng.integers(len(views), size=len(labels)))
            part = slice(i % per_epoch * self.batch_size, (i % per_epoch + 1) * self.batch_size)
            return view[part], order[part]

        def loss(drawn: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
            logits = tip_adapter_logits(zero_shot[drawn], views[drawn], cache.keys, labels, alpha, beta)
            return {"cross_entropy": cross_entropy(logits, labels[drawn[1]])}

        how = Settings(
            steps=self.epochs * per_epoch,
            lr=self.lr,
            weight_decay=0.01,  # what torch's AdamW does if not told, as in the released code
            betas=(0.9, 0.999),
            eps=1e-4,
            warmup=0,
            grad_clip=None,
            seed=self.seed,
            workers=1,
        )
        train(cache, loss, batch, how, title="Tip-Adapter-F", unit="pictures")
        return cache.keys.detach().clone()

    def _check_settings(self) -> None:
        check_weights(self.alpha, self.beta)
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr}: must be positive")
        if self.alpha == 0:
            raise ValueError("alpha=0 lets the keys have no say, so there is nothing to train: use ZeroShot")

    @classmethod
    def tiny(cls) -> tuple[TipAdapterF, list[Record]]:
        return cls(epochs=3, views=2, folds=2), tiny_records()


class _Cache(nn.Module):
    def __init__(self, keys: Tensor):
        super().__init__()
        self.keys = nn.Parameter(keys.detach().clone())
