"""CoOp: the words in front of every class name are learnt from labelled pictures, the model stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ecliptic.core.batches import Order
from ecliptic.core.contracts import Pairs, Record, Tokens
from ecliptic.core.encoder import Encoder, HFEncoder
from ecliptic.core.prompt_classifier import first_context, logit_scale
from ecliptic.core.prompt_learning import PromptPredictor, Prompts, learn_prompts
from ecliptic.core.prompting import check_promptable, with_context
from ecliptic.core.train import Settings
from ecliptic.core.zeroshot import class_prompts
from ecliptic.data.shots import check_classes, check_features, check_labels, encode_shots, labels_of, tiny_records


@dataclass(eq=False)
class Coop(PromptPredictor):
    """Learning to Prompt for Vision-Language Models (arXiv 2109.01134), one context for all classes, in front of the name.

    The pictures' features do not change, so each is computed once. The paper draws the context anew where it is longer than its
    four words; its defaults are those of the released configs, but for the length of training.
    """

    classes: tuple[str, ...] | None = None  # names in the order wanted; None: the labels found, sorted
    count: int | None = None  # context vectors; None: as many as `start` has tokens, 16 where there is none
    start: str | None = "a photo of a"  # words the context starts from; None: drawn from N(0, 0.02^2)
    template: str = "{}."  # what follows the context
    views: int = 0  # augmented views of each picture, of which a batch takes one; the paper draws new ones every time
    epochs: int = (
        40  # ours: a minute for 20 classes with 8 pictures each; the paper has 50 to 200, the more shots the more
    )
    batch_size: int = 32  # fewer where there are fewer pictures
    lr: float = 2e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    tau: float | None = None  # what cosines are multiplied by; None: CLIP's 100, SigLIP's own scale
    seed: int = 0

    def fit(self, encoder: Encoder, pairs: Pairs) -> Self:
        """Learn from records with `image` and `label`."""
        names, _ = labels_of(pairs, self.classes)
        self._start(encoder, names)  # what is wrong is said before any picture is opened
        shots = encode_shots(encoder, pairs, classes=self.classes, views=self.views, seed=self.seed)
        return self.fit_features(encoder, shots.features, shots.labels, views=shots.views, classes=shots.classes)

    def fit_features(
        self,
        encoder: Encoder,
        features: Tensor,
        labels: Tensor,
        *,
        views: Tensor | None = None,
        classes: Sequence[str] | None = None,
    ) -> Self:
        """The same from tensors: features (N, D) unit rows, labels (N,) int64, positions in `classes` (by default the setting's).

        views (V, N, D): augmented views of the same pictures, which then stand for them.
        """
        names = classes if classes is not None else self.classes
        if names is None:
            raise ValueError("classes is missing: the names are what prompts are made of")
        tower, context, tokens = self._start(encoder, names)
        check_features(features)
        check_labels(labels, len(features), names)
        if features.shape[1] != tower.dim:
            raise ValueError(f"features must be (N, {tower.dim}) for {tower.name}, got {tuple(features.shape)}")
        if views is not None and views.shape[1:] != features.shape:
            raise ValueError(f"views must be (V, {', '.join(map(str, features.shape))}), got {tuple(views.shape)}")
        samples = features[None] if views is None else views
        order = Order(len(features), min(self.batch_size, len(features)), self.seed)

        def batches(i: int) -> dict[str, Tensor]:
            rows = torch.from_numpy(order(i))
            view = int(np.random.default_rng([self.seed, i]).integers(len(samples)))
            return {"image": samples[view, rows], "target": labels[rows]}

        def loss(logits: Tensor, batch: Mapping[str, Any]) -> dict[str, Tensor]:
            return {"cross_entropy": cross_entropy(logits, batch["target"])}

        scale, prompts = logit_scale(tower.scale.detach(), tower.bias, self.tau), Prompts(context)
        learn_prompts(tower, prompts, tokens, batches, loss, self._settings(order), scale=scale, title="CoOp")
        return self._hold(tower, prompts, names, scale)

    def _settings(self, order: Order) -> Settings:
        return Settings(
            steps=self.epochs * order.per_epoch,
            lr=self.lr,
            optimizer="sgd",
            betas=(self.momentum, 0.999),
            weight_decay=self.weight_decay,
            warmup=order.per_epoch
            if self.epochs > 1
            else 0,  # the paper's first epoch is at a rate of 1e-5, ours rises
            grad_clip=None,
            seed=self.seed,
        )

    def _start(self, encoder: Encoder, names: Sequence[str]) -> tuple[HFEncoder, Tensor, Tokens]:
        """The encoder, the context to start from and the class names in tokens, once it is known that training can begin."""
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        check_classes(names)
        tower = check_promptable(encoder)
        context = first_context(tower, self.start, self.count, self.seed)
        tokens = tower.tokenize(class_prompts(names, self.template), overflow="error")
        with torch.no_grad():
            with_context(tower, context, tokens)  # raises where both together are too long
        return tower, context, tokens

    @classmethod
    def tiny(cls) -> tuple[Coop, list[Record]]:
        return cls(start=None, count=2, epochs=2, batch_size=6, lr=0.1, views=2), tiny_records()
