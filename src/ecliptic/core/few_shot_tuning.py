"""Tuning towers on a few labelled pictures by cross-entropy over class prompts: what full fine-tuning and LoRA share.

A subclass reads the labels (`data.shots.labels_of`), calls `_train`, and keeps what differs from the frozen encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

from ecliptic.core.anatomy import TOWERS
from ecliptic.core.batches import Augment
from ecliptic.core.contracts import Pairs
from ecliptic.core.encoder import Encoder, HFEncoder
from ecliptic.core.lora import Lora
from ecliptic.core.prompt_classifier import PromptClassifier
from ecliptic.core.train import GradientTransform, Train, Trained
from ecliptic.core.tuned import TunedPredictor, adapter_tensors, check_tunable


@dataclass(eq=False)
class FewShotPredictor(TunedPredictor):
    """Settings of a short training with AdamW and a cosine schedule, and the training itself."""

    classes: tuple[str, ...] | None = None  # names in the order wanted; None: the labels found, sorted
    templates: str | tuple[str, ...] = "photo"  # as `core.zeroshot.zero_shot_head` takes them
    lr: float = 2e-4
    weight_decay: float = 0.01
    steps: int = 40
    batch_size: int = 32  # fewer where there are fewer pictures
    crop: tuple[float, float] | None = (0.5, 1.0)  # share of the area that a training view keeps; None: no views
    tau: float | None = None  # see `PromptClassifier`: CLIP's 100, SigLIP's own scale
    seed: int = 0

    def _train(
        self, encoder: Encoder, pairs: Pairs, names: Sequence[str], count: int, augment: Augment | None, **options: Any
    ) -> Trained:
        """Train on `count` labelled records. options: further ones of `Train`."""
        trainer = Train(
            PromptClassifier(tuple(names), self.templates, self.tau),
            steps=self.steps,
            batch_size=max(1, min(self.batch_size, count)),
            augment=augment,
            lr=self.lr,
            weight_decay=self.weight_decay,
            betas=(0.9, 0.999),
            eps=1e-8,  # with the betas, torch's own, as in the released few-shot codes
            grad_clip=None,
            warmup=0,
            seed=self.seed,
            **options,
        )
        return trainer.run(encoder, pairs)

    def _check(self, encoder: Encoder) -> HFEncoder:
        """Say what is wrong before any picture is opened; the trainer and its parts check the rest of the settings."""
        if self.crop is not None and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop={self.crop}: the least and the largest share of the area, above 0 and up to 1")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: must be at least 1")
        return check_tunable(encoder)


@dataclass(eq=False)
class FullTuningPredictor(FewShotPredictor):
    """All weights of `towers`, their projections included; the temperature stays as it is."""

    towers: tuple[str, ...] = TOWERS

    def _tune(
        self, encoder: HFEncoder, pairs: Pairs, names: Sequence[str], count: int, augment: Augment | None
    ) -> HFEncoder:
        """The encoder after training on `count` labelled records."""
        freeze = tuple(name for name in TOWERS if name not in self.towers)
        done = self._train(encoder, pairs, names, count, augment, freeze=freeze, trainable=_is_no_temperature)
        return cast(HFEncoder, done.encoder)

    def _check(self, encoder: Encoder) -> HFEncoder:
        if isinstance(self.towers, str) or not self.towers or set(self.towers) - set(TOWERS):
            raise ValueError(f"towers={self.towers!r}: choose from {', '.join(TOWERS)}, as a tuple")
        return super()._check(encoder)


def _is_no_temperature(name: str, _: object) -> bool:
    return name.split(".")[-1] not in ("logit_scale", "logit_bias")


@dataclass(eq=False)
class LoraPredictor(FewShotPredictor):
    """The same with LoRA (arXiv 2106.09685): frozen weights, and a learnt addition B A to the layers `parts` of every block.

    A picture tower whose pooled vector does not come from its blocks (that of "offline") gets the addition on its projection.
    """

    rank: int = 2  # this and the next three: CLIP-LoRA, arXiv 2405.18541, section 4
    alpha: float = 1.0  # the addition is scaled by alpha / rank
    dropout: float = 0.25  # on what enters A
    parts: tuple[str, ...] = ("q", "k", "v")  # also out, fc1, fc2, projection
    towers: tuple[str, ...] = TOWERS

    def _train_lora(
        self,
        encoder: Encoder,
        pairs: Pairs,
        names: Sequence[str],
        count: int,
        augment: Augment | None,
        gradient_transform: GradientTransform | None = None,
    ) -> list[dict[str, Any]]:
        """Train on `count` labelled records, keep the adapters, and return the log."""
        lora = PooledLora(self.rank, self.alpha, tuple(self.towers), tuple(self.parts), self.dropout, self.seed)
        done = self._train(encoder, pairs, names, count, augment, lora=lora, gradient_transform=gradient_transform)
        state = adapter_tensors(cast(HFEncoder, done.adapters))
        self._keep(encoder, names, state, sum(value.numel() for value in state.values()))
        return done.log


@dataclass(frozen=True)
class PooledLora(Lora):
    """`Lora` for losses on pooled vectors: in a joined picture tower, whose blocks do not reach it, on the projection instead."""

    def targets(self, encoder: HFEncoder) -> list[str]:
        image = encoder.anatomy.image
        if not (image.joined and "image" in self.towers):
            return super().targets(encoder)
        own = {item.name: getattr(self, item.name) for item in fields(Lora)}
        found = Lora(**{**own, "towers": ("text",)}).targets(encoder) if "text" in self.towers else []
        return found + Lora(**{**own, "towers": ("image",), "parts": ("projection",)}).targets(encoder)
