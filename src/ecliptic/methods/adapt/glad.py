"""GLAD: few-shot LoRA whose gradient is steered by the gradient at a worst-case neighbour of the weights.

With a few pictures of each class LoRA fits them and forgets the rest. Sharpness-aware minimisation (arXiv 2010.01412) asks
for the gradient where a small step uphill leads; GLAD takes that one as a reference direction, by which it steers the
gradient of the task. Training then ends where the loss is low and flat, at no cost in parameters or at inference.

The equations could not be read in full and no code was released. Sure are: LoRA, the reference by one step uphill, and that it
steers the direction of the original gradient. Reconstructed, hence (uncertain): the rule by which it steers (`MODES`, all
offered), and the hyper-parameters, CLIP-LoRA's (arXiv 2405.18541).

`Glad` is the whole recipe. `GradientRegulariser` changes the gradients of any training, of `core.train.fit` or a loop of
your own; `regularised` is the rule on plain tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ecliptic.core.contracts import Pairs, Record
from ecliptic.core.encoder import Encoder
from ecliptic.core.few_shot_tuning import LoraPredictor
from ecliptic.core.method import Paper, method
from ecliptic.data.shots import RandomView, check_labels, labels_of, tiny_records

Mode = Literal["orthogonal", "blend", "project"]
Direction = Literal["ascent", "random"]
MODES: tuple[str, ...] = get_args(Mode)
TINY = 1e-12  # in denominators


@method(
    Paper("GLAD: Generalizable Tuning for Vision-Language Models", arxiv="2507.13089", year=2025),
    purpose="tune both towers by LoRA on a few labelled pictures, and keep what they know of other classes and domains",
    claim="the steered gradient ends in flatter minima than plain LoRA, with base classes as good and new ones better; "
    "a random direction in place of the worst one does neither",
)
@dataclass(eq=False)
class Glad(LoraPredictor):
    """LoRA trained by cross-entropy over class prompts with a `GradientRegulariser`. Needs records with `image` and `label`.

    steered_: for each update {"cosine": mean cosine of gradient and reference over tensors, "conflicts": share of tensors where
    it is negative}, so that one can tell whether the regulariser had anything to do. rho=0, or lam=0 with "orthogonal" or
    "blend", is plain LoRA (`baselines.lora_tuning`), number for number. Each update takes two passes.
    """

    lr: float = 2e-3  # ours; (uncertain) 2e-4 for 500 updates for each picture of a class, CLIP-LoRA
    steps: int = 20  # ours: with two passes each about a minute on one core with "offline"
    rho: float = 0.05  # radius of the neighbourhood; (uncertain) SAM's usual value; small towers need 0.1 to 0.3
    mode: Mode = "orthogonal"  # ours, see `regularised`
    lam: float = 1.0  # weight of the reference; ours
    refresh: int = 1  # the reference is computed anew every so many updates; 2 to 5 is cheaper
    direction: Direction = "ascent"  # "random": an ablation, see `GradientRegulariser`

    def fit(self, encoder: Encoder, pairs: Pairs) -> Self:
        """Learn from labelled records. The regulariser's figures of each update are in `steered_` afterwards."""
        tower = self._check(encoder)
        steer = GradientRegulariser(self.rho, self.mode, self.lam, self.refresh, self.direction, self.seed)
        names, labels = labels_of(pairs, self.classes)
        check_labels(labels, len(labels), names)
        augment = None if self.crop is None else RandomView.for_encoder(tower, self.crop)
        log = self._train_lora(encoder, pairs, names, len(labels), augment, steer)
        self.steered_ = [row["gradient"] for row in log if "gradient" in row]
        return self

    @classmethod
    def tiny(cls) -> tuple[Glad, list[Record]]:
        return cls(steps=3, batch_size=6, lr=2e-2, rho=0.3), tiny_records()


# The regulariser


@dataclass
class GradientRegulariser:
    """Steers the gradients of an update by those at phi + rho g / |g|; for `gradient_transform=` of the trainer, or `step`.

    One norm is taken over all tensors: with one each, small matrices would be moved too far. The weights themselves are put
    back from a copy, bit for bit. Both passes see the same batch and the same random draws (dropout).

    refresh: with k > 1 a reference serves k updates: of each tensor its difference from g, times |g now| / |g then|, is what is
    added to the gradient of later updates (ours; after LookSAM, arXiv 2203.02714).
    direction: "random" goes as far in a random direction instead, to see what the worst one is worth.
    Where the gradient is zero or not finite (an overflow under fp16) it is left as it is: there is no neighbour.
    """

    rho: float = 0.05
    mode: Mode = "orthogonal"
    lam: float = 1.0
    refresh: int = 1
    direction: Direction = "ascent"
    seed: int = 0  # of random directions

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rho) and self.rho >= 0):
            raise ValueError(f"rho={self.rho}: the radius must not be negative; 0 is plain training")
        if not math.isfinite(self.lam):
            raise ValueError(f"lam={self.lam}: the weight of the reference must be a number; 0 is plain training")
        if self.refresh < 1:
            raise ValueError(f"refresh={self.refresh}: the reference must be computed every 1 or more updates")
        for name, known in (("mode", MODES), ("direction", get_args(Direction))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(known)}")
        self._shift: dict[str, Tensor] = {}
        self._norm, self._steps = 1.0, 0

    def __call__(
        self, step: int, parameters: Mapping[str, nn.Parameter], again: Callable[[], Any]
    ) -> dict[str, float] | None:
        """Change the gradients of `parameters` in place; `again` computes them anew at the weights as they are then.

        step: how many updates are done. Returns the figures, or None where there was nothing to steer by.
        """
        used = {name: p for name, p in parameters.items() if p.grad is not None}
        gradient = [p.grad.detach().clone() for p in used.values() if p.grad is not None]
        norm = global_norm(gradient)
        if self.rho == 0 or not (math.isfinite(norm) and norm > 0):
            return None
        if step % self.refresh == 0 or not self._shift:
            reference = self._reference(step, list(used.values()), gradient, norm, again)
            if self.refresh > 1:
                pairs = zip(used, reference, gradient, strict=True)
                self._shift, self._norm = {name: r - g for name, r, g in pairs}, norm
        else:
            shifts = (self._shift.get(name) for name in used)
            reference = [g if s is None else g + s * (norm / self._norm) for g, s in zip(gradient, shifts, strict=True)]
        for parameter in parameters.values():
            parameter.grad = None
        for parameter, g, r in zip(used.values(), gradient, reference, strict=True):
            parameter.grad = regularised(g, r, self.mode, self.lam)
        return agreement(gradient, reference)

    def step(
        self, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor]
    ) -> dict[str, float] | None:
        """One update in a training loop of your own; returns the figures.

        closure: computes the loss of one and the same batch; neither steps nor calls backward. torch's generators serve both
        passes alike, and go on as after one; running statistics see the batch twice.
        """
        known = {str(i): parameter for i, parameter in enumerate(parameters)}

        def gradients() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                closure().backward()  # type: ignore[no-untyped-call]

        start, cuda = torch.get_rng_state(), torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        started = torch.cuda.get_rng_state_all() if cuda else []
        gradients()

        def again() -> None:
            torch.set_rng_state(start)
            if cuda:
                torch.cuda.set_rng_state_all(started)
            gradients()

        told = self(self._steps, known, again)
        self._steps += 1
        optimizer.step()
        return told

    def _reference(
        self, step: int, parameters: list[nn.Parameter], gradient: list[Tensor], norm: float, again: Callable[[], Any]
    ) -> list[Tensor]:
        """The gradient at the neighbour; the weights are the same bits afterwards, whatever happens."""
        direction, length = gradient, norm
        if self.direction == "random":
            draw = torch.Generator().manual_seed(int(np.random.SeedSequence([self.seed, step]).generate_state(1)[0]))
            direction = [torch.randn(g.shape, generator=draw).to(g) for g in gradient]
            length = global_norm(direction)
        kept = [p.detach().clone() for p in parameters]
        try:
            with torch.no_grad():
                for parameter, towards in zip(parameters, direction, strict=True):
                    parameter.add_(towards, alpha=self.rho / (length + TINY))
            again()
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)
        return [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in parameters]

    def state_dict(self) -> dict[str, Any]:
        """The reference that later updates still use."""
        return {"shift": dict(self._shift), "norm": self._norm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._shift, self._norm = dict(state["shift"]), float(state["norm"])


# The rule, on plain tensors


def regularised(gradient: Tensor, reference: Tensor, mode: Mode = "orthogonal", lam: float = 1.0) -> Tensor:
    """g, the gradient of one tensor, and g_s, that at the neighbour, of the same shape -> g_r, the gradient to update with.

    blend: (1 - lam) g + lam g_s; lam=0 is plain training, lam=1 SAM (arXiv 2010.01412).
    orthogonal: g + lam (g_s - <g_s, g> / |g|^2 g): what of g_s is orthogonal to g is added, so <g_r, g> = |g|^2 for any lam: the
        task loses nothing of its own component. The default, ours.
    project: g where <g, g_s> >= 0, else g - <g, g_s> / |g_s|^2 g_s: only a gradient that points against the reference is
        changed, and loses the part that does. Closest to the paper's words (uncertain), as in ProGrad (arXiv 2205.14865); it
        hardly ever acts, since the two nearly always agree. lam has no part in it.
    """
    if mode == "blend":
        return gradient if lam == 0 else (1 - lam) * gradient + lam * reference
    along = (gradient * reference).sum()
    if mode == "orthogonal":
        if lam == 0:
            return gradient
        return gradient + lam * (reference - along / (gradient.square().sum() + TINY) * gradient)
    return gradient if along >= 0 else gradient - along / (reference.square().sum() + TINY) * reference


def agreement(gradient: Sequence[Tensor], reference: Sequence[Tensor]) -> dict[str, float]:
    """ "cosine": the mean over tensors of their cosine, -1 to 1; "conflicts": the share of tensors where it is below 0."""
    cosines = [
        float((g * r).sum() / (g.norm() * r.norm()))
        for g, r in zip(gradient, reference, strict=True)
        if float(g.norm() * r.norm()) > 0
    ]
    if not cosines:
        return {"cosine": 1.0, "conflicts": 0.0}
    return {"cosine": sum(cosines) / len(cosines), "conflicts": sum(c < 0 for c in cosines) / len(cosines)}


def global_norm(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm of all numbers in all tensors."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))
