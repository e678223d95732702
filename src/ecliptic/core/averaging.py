"""Averages of weights: along a run (EMA), and between the model before and after fine-tuning (WiSE-FT).

Both keep the architecture and cost nothing at inference. The first smooths the last steps of training; the second trades what a
model learnt against what it could do before, and often loses little of either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ecliptic.core.contracts import ModelStep, Pairs

if TYPE_CHECKING:
    from ecliptic.core.encoder import Encoder, HFEncoder

E = TypeVar("E", bound="Encoder")


class Ema:
    """Exponential moving average of parameters, updated after each step: average <- d * average + (1 - d) * parameter.

    d = min(decay, (1 + t) / (10 + t)) after t updates, so that short runs are not held at their start (TensorFlow's
    `ExponentialMovingAverage` with `num_updates`). decay = 0 is the parameter itself. Kept in the parameters' own precision.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"ema={decay}: must be at least 0 and below 1; 0.999 is common")
        self.parameters, self.decay = dict(parameters), decay
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """step: how many updates of the weights are done, this one included."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, value in self.parameters.items():
            self.average[name].lerp_(value, weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters and their averages; a second time puts them back."""
        for name, value in self.parameters.items():
            held = value.clone()
            value.copy_(self.average[name])
            self.average[name].copy_(held)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While open, the parameters are the averages."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def state_dict(self) -> dict[str, Tensor]:
        return self.average

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, value in self.average.items():
            value.copy_(state[name])


def interpolate(before: Encoder, after: E, alpha: float) -> E:
    """A new encoder with weights (1 - alpha) * before + alpha * after: WiSE-FT, arXiv 2109.01903, equation 1.

    alpha: 0 gives the weights of `before`, 1 those of `after`; between them the paper finds most of the new accuracy together
    with most of the old robustness, 0.5 being its choice where nothing can be measured. Everything that is no floating-point
    weight, and the history, is of `after`. Raises ValueError for encoders of different architectures.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: must lie between 0 (before) and 1 (after)")
    old, new = before.state_dict(), after.state_dict()
    differing = sorted(old.keys() ^ new.keys()) or [name for name in old if old[name].shape != new[name].shape]
    if differing:
        raise ValueError(
            f"the two encoders differ in architecture, first in {differing[0]}: only one and the same can be mixed"
        )
    mixed = cast(E, cast("HFEncoder", after).clone())
    with torch.no_grad():
        for name, value in mixed.state_dict().items():
            if value.is_floating_point():
                value.mul_(alpha).add_(old[name].to(value), alpha=1 - alpha)
    return mixed


@dataclass(frozen=True)
class WiseFt(ModelStep):
    """`interpolate` as a step: apply it to the fine-tuned encoder. alpha=1 changes nothing."""

    before: Any  # an encoder, or what `ecliptic.load` opens
    alpha: float = 0.5  # arXiv 2109.01903: the recommendation where nothing can be measured

    def apply(self, encoder: Encoder, pairs: Pairs | None = None) -> Encoder:
        from ecliptic.core.encoder import load

        before = load(self.before) if isinstance(self.before, str) else self.before
        mixed = cast("HFEncoder", interpolate(before, encoder, self.alpha))
        mixed.record_step("wise_ft", {"before": before.id, "alpha": self.alpha})
        return mixed
