"""The only training loop, on accelerate: `fit` trains any parameters under any loss, `Train` an encoder under an objective.

What makes a run repeatable: batch `i` depends only on (seed, i), and every step seeds all generators from (seed, step,
process). So a checkpoint needs no generator state, a resumed run equals an undisturbed one bit for bit on a CPU, and neither
the generators' global state nor the encoder that was given is changed by training.

Under several processes (torchrun, accelerate launch) `Train` makes the same updates as one process: each encodes its part of the
batch, the objective sees the views of the whole batch, gradients are averaged. Only the main process writes files.
"""

from __future__ import annotations

import copy
import math
import os
import re
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Set, Sized
from contextlib import ExitStack, closing, nullcontext
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from ecliptic.core.anatomy import TOWERS
from ecliptic.core.averaging import Ema
from ecliptic.core.batches import Augment, Batch, Indexed, Streamed, cheap_column, check, collate, prefetch
from ecliptic.core.borrowed import (
    Interrupt,
    modes,
    only,
    own_accelerator,
    own_randomness,
    seed_all,
    unchanged_buffers,
)
from ecliptic.core.checkpoint import Stateful, Store, plain
from ecliptic.core.contracts import ModelStep, Objective, Pairs, Record
from ecliptic.core.data_parallel import anybody, average, average_gradients, part_of, same_start
from ecliptic.core.distributed import gather_views, rank, world_size
from ecliptic.core.grad_cache import check_chunks, encode_in_chunks
from ecliptic.core.guard import ForgettingWarning, Guarded, Score, repaired, scorer
from ecliptic.core.lora import Lora, is_adapter, merge
from ecliptic.core.progress import Progress
from ecliptic.core.train_log import Log

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ecliptic.core.encoder import Encoder, HFEncoder

B = TypeVar("B")
Trainable = str | Callable[[str, nn.Parameter], bool]

LN_100 = math.log(100)  # arXiv 2103.00020, section 2.5: the logits are never scaled by more than 100

_OBJECTIVE = 1 << 31  # stands where steps have the place of a batch, so that an objective's draws are no encoder's


class GradientTransform(Protocol):
    """Changes the gradients of an update after they were computed (and averaged over processes) and before they are clipped.

    step: how many updates are done. parameters: what is trained, by name; their `.grad` is to be changed (None where nothing
    depends on one). again: computes the gradients anew, in place, at the weights as they are then, from the same batches with
    the same random draws, and returns the terms; buffers stay as they are. Weights must be left as they were found.
    With mixed precision fp16, gradients are still multiplied by the loss scale, and may be infinite. Numbers that are returned
    go into the row of the log. State that must survive an interrupt is asked for by `state_dict` and `load_state_dict`.
    """

    def __call__(
        self, step: int, parameters: Mapping[str, nn.Parameter], again: Callable[[], Mapping[str, float]]
    ) -> Mapping[str, float] | None: ...


class NonFiniteLoss(ArithmeticError):
    """A loss or gradient became infinite or NaN. Weights were not updated with it, and the last checkpoint stands."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train, whatever is trained. Defaults are CLIP's (arXiv 2103.00020, table 19) unless marked as ours."""

    steps: int = 1000  # updates of the weights; ours
    lr: float = 5e-4  # peak
    weight_decay: float = 0.1  # ours; decoupled, on matrices only
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd takes its momentum from betas[0]
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1  # below 1 a share of the steps, otherwise a number of steps; ours
    floor: float = 0.0  # the schedule ends at this share of lr
    grad_clip: float | None = 1.0  # largest norm of the whole gradient; ours
    groups: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # name pattern -> own lr, weight_decay
    accumulate: int = 1  # batches per update, their losses averaged: negatives come from one batch only
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0
    checkpoints: str | Path | None = None  # folder
    checkpoint_every: int = 500  # steps; also at the end, and at an interrupt
    keep: int = 2  # newest checkpoints kept
    resume: bool = True  # go on from the newest checkpoint in the folder
    log: str | Path | None = None  # JSONL; log.jsonl beside the checkpoints where there is such a folder
    tensorboard: str | Path | bool = False  # folder of the same scalars; True: tensorboard/ beside the checkpoints
    evaluate_every: int = 0  # steps; 0 for only at the end
    workers: int = 2  # threads that prepare batches

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("lr", "weight_decay", "warmup", "seed", "workers", "evaluate_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ValueError(f"grad_clip={self.grad_clip}: must be positive, or None for no clipping")
        if self.tensorboard is True and self.checkpoints is None:
            raise ValueError("tensorboard=True writes beside the checkpoints: give checkpoints=..., or a folder here")
        for name in ("optimizer", "schedule", "precision"):
            choices = {"optimizer": ("adamw", "sgd"), "schedule": SCHEDULES, "precision": ("no", "bf16", "fp16")}[name]
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")

    @property
    def warmup_steps(self) -> int:
        return int(self.warmup if self.warmup >= 1 else self.warmup * self.steps)

    @property
    def log_file(self) -> Path | None:
        beside = None if self.checkpoints is None else Path(self.checkpoints) / "log.jsonl"
        return beside if self.log is None else Path(self.log)

    @property
    def tensorboard_folder(self) -> Path | None:
        if self.tensorboard is True:
            return Path(cast("str | Path", self.checkpoints)) / "tensorboard"
        return Path(self.tensorboard) if self.tensorboard else None


SCHEDULES = ("cosine", "linear", "constant")
# What decides the weights that come out; a resumed run must agree in all of it.
_DECISIVE = (
    "steps", "lr", "weight_decay", "betas", "eps", "optimizer", "schedule", "warmup", "floor", "grad_clip", "groups",
    "accumulate", "precision", "seed",
)  # fmt: skip


def rate(step: int, steps: int, warmup: int = 0, schedule: str = "cosine", floor: float = 0.0) -> float:
    """The share of the peak learning rate at update `step` (from 0): linear warm-up to 1, then down towards `floor`.

    (step + 1) / warmup while step < warmup; then with t = (step - warmup) / (steps - warmup) in [0, 1):
    cosine (1 + cos(pi t)) / 2, linear 1 - t, constant 1, each scaled to end at `floor`.
    """
    if step < warmup:
        return (step + 1) / warmup
    t = (step - warmup) / max(steps - warmup, 1)
    fall = {"cosine": (1 + math.cos(math.pi * t)) / 2, "linear": 1 - t, "constant": 1.0}[schedule]
    return floor + (1 - floor) * fall


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], settings: Settings) -> list[dict[str, Any]]:
    """AdamW groups. Matrices and larger decay; vectors and scalars (norms, biases, class token, logit scale) do not.

    The first pattern of `settings.groups` that `re.search` finds in a name gives that parameter its own lr and weight decay,
    the latter to vectors too: whoever names them wants it.
    """
    named = list(named)
    for pattern, values in settings.groups.items():
        if unknown := set(values) - {"lr", "weight_decay"}:
            raise ValueError(f"groups[{pattern!r}]: unknown {sorted(unknown)}; only lr and weight_decay can be set")
        if not any(re.search(pattern, name) for name, _ in named):
            raise ValueError(
                f"groups[{pattern!r}] matches no trained parameter; there are {_examples(n for n, _ in named)}"
            )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        own = next((values for pattern, values in settings.groups.items() if re.search(pattern, name)), {})
        decay = own.get("weight_decay", settings.weight_decay if parameter.ndim >= 2 else 0.0)
        groups.setdefault((own.get("lr", settings.lr), decay), []).append(parameter)
    return [{"params": params, "lr": lr, "peak": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def select(module: nn.Module, trainable: Trainable | None) -> dict[str, nn.Parameter]:
    """The parameters to train, by name: those a pattern finds or a predicate accepts; None takes those that require grad."""
    named = dict(module.named_parameters())
    if not named:
        raise ValueError(
            "this model has no layers to train: an exported model only answers; load what it was made from"
        )
    if trainable is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad}
        if not chosen:
            raise ValueError("no parameter requires grad: say which to train, trainable='...'")
        return chosen
    accepts = trainable if callable(trainable) else (lambda name, _: re.search(trainable, name) is not None)
    chosen = {name: p for name, p in named.items() if accepts(name, p)}
    if not chosen:
        raise ValueError(f"trainable={trainable!r} matches no parameter; there are {_examples(named)}")
    return chosen


def fit(
    module: nn.Module,
    loss_fn: Callable[[B], Mapping[str, Tensor]],
    batches: Callable[[int], B] | Sequence[B],
    settings: Settings,
    *,
    trainable: Trainable | None = None,
    gradient_transform: GradientTransform | None = None,
    after_step: Callable[[int], None] | None = None,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    extras: Mapping[str, Stateful] | None = None,
    identity: Mapping[str, Any] | None = None,
    title: str = "training",
    unit: str = "samples",
) -> list[dict[str, Any]]:
    """Train the parameters of `module` in place, where they lie, and return the log: one row per step.

    loss_fn: a batch (moved to the module's device) -> named scalars, whose sum is minimised.
    batches: batch number -> batch, a pure function, called from several threads; or a sequence, taken in turn for ever.
    trainable: see `select`; all others keep their weights, buffers and evaluation mode, and requires_grad is put back afterwards.
    gradient_transform: changes the gradients before each update, see `GradientTransform`.
    after_step: called with the number of updates done, after each (clamps, moving averages).
    evaluate: every `settings.evaluate_every` steps and at the end, in evaluation mode; its numbers go into that step's row.
    extras: further state to keep in checkpoints. identity: plain values that a checkpoint must agree with to be resumed.

    A row: step, loss and terms (as before the update), lr, grad_norm (before clipping), samples_per_s, waited (share of the time
    spent waiting for data), gradient (the numbers of `gradient_transform`), and evaluate.
    Raises NonFiniteLoss, and KeyboardInterrupt after saving a checkpoint where a folder is given.

    Under several processes each takes its own part of a batch (`batches` sees to that, `data_parallel.part_of` says which), all
    start from the main one's weights, and the gradients are averaged. `evaluate` runs in all, and the main one's numbers count.
    """
    get = batches if callable(batches) else _in_turn(batches)
    extras = dict(extras or {})
    if hasattr(gradient_transform, "state_dict"):
        extras["gradient_transform"] = cast(Stateful, gradient_transform)
    chosen = select(module, trainable)
    device = next(iter(chosen.values())).device
    stored = Store(
        settings.checkpoints,
        module,
        chosen,
        identity={name: getattr(settings, name) for name in _DECISIVE} | dict(identity or {}),
        extras=extras,
        keep=settings.keep,
        resume=settings.resume,
    )

    with ExitStack() as stack:
        stack.enter_context(own_randomness())
        stack.enter_context(only(module, chosen))
        accelerator = stack.enter_context(own_accelerator(device, settings.precision))
        main, scaler = rank() == 0, accelerator.scaler
        # Evaluation mode, in accelerate's words: mixed precision, and no wrapper that averages gradients (we do).
        model = accelerator.prepare_model(_Step(module, loss_fn), device_placement=False, evaluation_mode=True)
        optimizer = accelerator.prepare_optimizer(_optimizer(chosen, settings), device_placement=False)
        start = stored.resume(optimizer, scaler)
        same_start(module)
        log = stack.enter_context(Log(settings.log_file, start, settings.tensorboard_folder, writing=main))
        interrupt = stack.enter_context(Interrupt())
        shown = None if main else False
        bar = stack.enter_context(Progress(title, settings.steps, unit=unit, start=start, shown=shown))
        threads = settings.workers if getattr(get, "threads_allowed", True) else min(settings.workers, 1)
        wanted = range(start * settings.accumulate, settings.steps * settings.accumulate)
        stream = stack.enter_context(closing(cast(Any, prefetch(get, wanted, threads))))

        def save(step: int) -> None:
            if main and stored.at != step:
                stored.save(step, optimizer, scaler)

        step, updating = start, False
        try:
            while step < settings.steps:
                if anybody(interrupt.asked, device):  # then all stop, after the same step
                    save(step)
                    anybody(False, device)
                    raise KeyboardInterrupt
                began = time.perf_counter()
                group = [next(stream) for _ in range(settings.accumulate)]
                waited = time.perf_counter() - began

                terms = _gradients(accelerator, model, group, settings.seed, step, device)
                average_gradients(list(chosen.values()))
                told: dict[str, float] | None = None
                if gradient_transform is not None:

                    def again(group: Sequence[Any] = group, step: int = step) -> Mapping[str, float]:
                        optimizer.zero_grad(set_to_none=True)
                        with unchanged_buffers(module):
                            found = _gradients(accelerator, model, group, settings.seed, step, device)
                        average_gradients(list(chosen.values()))
                        return found

                    updating = True  # weights may be elsewhere for a while
                    told = dict(gradient_transform(step, chosen, again) or {})
                    updating = False
                norm = float(accelerator.clip_grad_norm_(list(chosen.values()), settings.grad_clip or math.inf))
                _require_finite(step + 1, terms, norm, stored.newest, scaled=scaler is not None)

                share = rate(step, settings.steps, settings.warmup_steps, settings.schedule, settings.floor)
                for parameters in optimizer.param_groups:
                    parameters["lr"] = parameters["peak"] * share
                updating = True
                optimizer.step()
                if after_step is not None:
                    with torch.no_grad():
                        after_step(step + 1)
                step, updating = step + 1, False
                optimizer.zero_grad(set_to_none=True)

                seconds = time.perf_counter() - began
                count = sum(map(_size, group)) * world_size()
                row: dict[str, Any] = {"step": step, "loss": sum(terms.values()), "terms": terms}
                row |= {"lr": settings.lr * share, "grad_norm": norm, "samples_per_s": count / seconds}
                row |= {"waited": waited / seconds}
                if told:
                    row["gradient"] = told
                every = settings.evaluate_every
                try:
                    if evaluate is not None and (step == settings.steps or (every and step % every == 0)):
                        row["evaluate"] = _evaluated(module, evaluate)
                finally:  # the step is done, whatever becomes of its evaluation
                    log.write(row)
                bar.advance(units=count, note=f"loss {row['loss']:.4g}")
                if step % settings.checkpoint_every == 0 or step == settings.steps:
                    save(step)
        except KeyboardInterrupt:
            if not updating:
                save(step)
            raise
        anybody(False, device)  # nobody leaves before the last checkpoint is there
    return log.rows


class _Step(nn.Module):
    """Module and loss in one forward, which is where accelerate hangs autocast."""

    def __init__(self, module: nn.Module, loss_fn: Callable[[Any], Mapping[str, Tensor]]):
        super().__init__()
        self.module, self.loss_fn = module, loss_fn

    def forward(self, batch: Any) -> dict[str, Tensor]:
        terms = dict(self.loss_fn(batch))
        if not terms:
            raise ValueError("the loss has no terms")
        for name, term in terms.items():
            if not isinstance(term, Tensor) or term.numel() != 1:
                raise TypeError(f"loss term {name!r} must be a scalar tensor, not {getattr(term, 'shape', term)!r}")
        return terms


def _gradients(
    accelerator: Accelerator, model: nn.Module, group: Sequence[Any], seed: int, step: int, device: torch.device
) -> dict[str, float]:
    """Add up the gradient of one update over its batches; returns the mean terms, over processes too."""
    from accelerate.utils import send_to_device

    sums: dict[str, float] = {}
    for place, batch in enumerate(group):
        seed_all(seed, step, place, rank())
        if device.type != "cpu":
            batch = send_to_device(batch, device, non_blocking=True)
        terms = model(batch)
        loss = torch.stack([term.reshape(()).float() for term in terms.values()]).sum() / len(group)
        if not loss.requires_grad:
            raise ValueError(f"no loss term ({', '.join(terms)}) depends on a trained parameter")
        accelerator.backward(loss)
        values = average(torch.stack([term.detach().double().reshape(()) for term in terms.values()]))
        for name, value in zip(terms, values.tolist(), strict=True):
            sums[name] = sums.get(name, 0.0) + value / len(group)
    return sums


def _require_finite(step: int, terms: Mapping[str, float], norm: float, newest: Path | None, scaled: bool) -> None:
    bad = any(not math.isfinite(value) for value in terms.values())
    if not bad and (
        scaled or math.isfinite(norm)
    ):  # with loss scaling an overflowing gradient is skipped, not an error
        return
    what = "loss" if bad else "gradient"
    listed = ", ".join(f"{name}={value:g}" for name, value in terms.items())
    kept = "no checkpoint was written yet" if newest is None else f"the last good checkpoint is {newest}"
    raise NonFiniteLoss(
        f"the {what} is not finite at step {step}: {listed}, gradient norm {norm:g}; {kept}. "
        "Try a lower lr, more warmup, grad_clip, or precision='no'"
    )


def _optimizer(chosen: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    groups = parameter_groups(chosen.items(), settings)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.betas[0])
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)


def _evaluated(module: nn.Module, evaluate: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    with modes(module):
        module.eval()
        return {name: float(value) for name, value in evaluate().items()}


def _in_turn(batches: Sequence[B]) -> Callable[[int], B]:
    if not len(batches):
        raise ValueError("there are no batches")
    return lambda i: batches[i % len(batches)]


def _size(batch: Any) -> int:
    """How many samples a batch holds: the length of the first tensor in it."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    if isinstance(batch, Mapping):
        batch = batch.values()
    if isinstance(batch, Iterable) and not isinstance(batch, str):
        return next((size for size in map(_size, batch) if size), 0)
    return 0


def _examples(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" ... ({len(names)} in all)" if len(names) > 4 else "")


# -- an encoder under an objective -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """What `Train.run` gives: the new encoder, the objective with whatever it learnt, the log (see `fit`), and which records
    could not be read (index -> reason).

    last: the encoder as the last step left it; `encoder` itself unless that is averaged (`ema`) or repaired (`guard_repair`).
    adapters: with `lora`, the encoder before merging, for `ecliptic.core.lora.save_adapters`. guard: what the guard measured.
    """

    encoder: Encoder
    objective: Objective
    log: list[dict[str, Any]]
    unreadable: Mapping[int, str]
    last: Encoder
    adapters: Encoder | None = None
    guard: Guarded | None = None


@dataclass(frozen=True)
class Train(Settings, ModelStep):
    """Train an encoder under an objective: `Train(InfoNCE(), steps=400, batch_size=256).apply(encoder, pairs)`.

    An objective may further offer
    - `collate(encoder, records) -> batch`, in place of the default (`ecliptic.core.batches.collate`), or only `fields`, the names
      of further record fields to put into the batch (teacher vectors, cached features);
    - `bind(encoder) -> objective`, called once on the encoder to be trained, to size what it learns;
    - `rowwise = True`, if its own `encode` treats each row by itself, so that `chunk` may be used;
    and if it is an nn.Module, its own parameters (those that require grad) are trained with the encoder's, on a copy.

    trainable: a pattern or predicate over the names of `encoder.named_parameters()`; None takes those that require grad.
    freeze: "image", "text", towers with their projections. lora: train adapters, and what `trainable` names besides; they are
    merged into the result. augment: (record, generator) -> record, drawn from (seed, epoch, index).
    chunk: pairs encoded at a time in each process, for large batches on small memory (`ecliptic.core.grad_cache`).
    ema: decay of averaged weights, which then are the result (`ecliptic.core.averaging`).
    guard: what must not be unlearnt, records or a score (`ecliptic.core.guard`). It may fall by `guard_tolerance`; beyond, a
    warning says so, and with `guard_repair` the result is the WiSE-FT interpolation that keeps most of the training and holds.
    gradient_transform: changes the gradients before each update (`GradientTransform`).
    evaluate: encoder -> numbers for the log. device: None for the encoder's own, or a GPU if there is one.
    """

    objective: Objective
    batch_size: int = field(default=256, kw_only=True)  # over all processes
    trainable: Trainable | None = field(default=None, kw_only=True)
    freeze: tuple[str, ...] = field(default=(), kw_only=True)
    lora: Lora | None = field(default=None, kw_only=True)
    augment: Augment | None = field(default=None, kw_only=True)
    collate: Callable[[Encoder, list[Record]], Batch] | None = field(default=None, kw_only=True)
    chunk: int | None = field(default=None, kw_only=True)
    ema: float | None = field(default=None, kw_only=True)
    guard: Score | Iterable[Record] | None = field(default=None, kw_only=True)
    guard_tolerance: float = field(default=0.02, kw_only=True)  # ours
    guard_repair: bool = field(default=False, kw_only=True)
    gradient_transform: GradientTransform | None = field(default=None, kw_only=True)
    evaluate: Callable[[Encoder], Mapping[str, float]] | None = field(default=None, kw_only=True)
    device: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := set(self.freeze) - set(TOWERS):
            raise ValueError(f"freeze={sorted(unknown)}: choose from {', '.join(TOWERS)}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk={self.chunk}: must be at least 1, or None for the whole batch at a time")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema}: must be at least 0 and below 1; 0.999 is common")
        if not self.guard_tolerance >= 0:
            raise ValueError(f"guard_tolerance={self.guard_tolerance}: must not be negative")
        if self.guard_repair and self.guard is None:
            raise ValueError("guard_repair=True needs a guard to repair by: give guard=records or guard=function")

    def apply(self, encoder: Encoder, pairs: Pairs | None = None) -> Encoder:
        return self.run(encoder, pairs).encoder

    def run(self, encoder: Encoder, pairs: Pairs | None) -> Trained:
        """As `apply`, with the objective and the log beside the new encoder."""
        own_collate = self.collate or getattr(self.objective, "collate", None)
        check(pairs, self.objective, custom=own_collate is not None)
        assert pairs is not None
        score = None if self.guard is None else scorer(self.guard)
        student = cast("HFEncoder", encoder).clone() if self.lora is None else self.lora.adapt(encoder)
        home = student.device
        student.to(self._device(home))
        objective, module = _bound(self.objective, student)
        frozen = {id(p) for tower in self.freeze for p in _tower(student, tower)}

        def accepts(name: str, parameter: nn.Parameter) -> bool:
            return self._accepts(name, parameter, frozen)

        def make(records: list[Record]) -> Batch:
            if own_collate is not None:
                return cast(Batch, own_collate(student, records))
            return collate(student, records, objective)

        before = None if score is None else _score(score, student)
        average = None if self.ema is None else Ema(select(module, accepts), self.ema)
        clamp = _scale_clamp(student)

        def after_step(step: int) -> None:
            clamp(step)
            if average is not None:
                average.update(step)

        def evaluate() -> dict[str, float]:
            with nullcontext() if average is None else average.applied():
                found = dict(self.evaluate(student)) if self.evaluate is not None else {}
                if score is not None and before is not None:
                    found |= {"guard": _score(score, student), "guard_before": before}
                return found

        indexed = hasattr(pairs, "__len__") and hasattr(pairs, "__getitem__")
        kind: Any = Indexed if indexed else Streamed
        batches = kind(pairs, self.batch_size, self.seed, make, self.augment, part=part_of)
        log = fit(
            module,
            self._loss(objective, student),
            _Numbered(batches),
            self,
            trainable=accepts,
            gradient_transform=self.gradient_transform,
            after_step=after_step,
            evaluate=None if self.evaluate is None and score is None else evaluate,
            extras={} if average is None else {"ema": average},
            identity={"records": _records(pairs)} | self._said(),
            unit="pairs",
        )
        student.to(home)
        student.eval()
        unreadable: dict[int, str] = getattr(batches, "unreadable", {})
        if unreadable:
            index, reason = next(iter(unreadable.items()))
            warnings.warn(
                f"{len(unreadable)} records could not be read and were replaced, the first {index}: {reason}",
                stacklevel=2,
            )
        last = new = self._finished(student)
        if average is not None:
            average.swap()
            new = self._finished(student)
        guarded = None
        if score is not None and before is not None:
            told = log[-1].get("evaluate", {}) if log else {}
            after = float(told["guard"]) if "guard" in told else _score(score, new)
            guarded, new = self._guarded(encoder, new, score, before, after)
        return Trained(new, objective, log, unreadable, last, None if self.lora is None else student, guarded)

    def _loss(self, objective: Objective, student: HFEncoder) -> Callable[[tuple[int, Batch]], dict[str, Tensor]]:
        """A numbered batch -> the objective's terms, over the whole batch whichever part of it is this process's."""

        def loss(numbered: tuple[int, Batch]) -> dict[str, Tensor]:
            number, batch = numbered
            if self.chunk is None:
                views = objective.encode(student, batch)
            else:
                check_chunks(objective, student)
                views = encode_in_chunks(objective, student, batch, self.chunk)
            if "group" in batch:
                views.groups = batch["group"]
            if not getattr(objective, "local", False):
                views = gather_views(views)
            seed_all(self.seed, number, _OBJECTIVE)  # the same in every process: each sees the whole batch
            return objective.terms(views)

        return loss

    def _finished(self, student: HFEncoder) -> HFEncoder:
        """A plain encoder with the student's weights as they are now, and its history."""
        done = merge(student) if self.lora is not None else student.clone() if self.ema is not None else student
        done.record_step("train", self.arguments())
        return done

    def _guarded(
        self, before: Encoder, after: HFEncoder, score: Score, first: float, last: float
    ) -> tuple[Guarded, HFEncoder]:
        """Compare the guard's scores, warn and mend: (what was found, the encoder to give back)."""
        device = self._device(after.device)
        mended, found = repaired(before, after, score, self.guard_tolerance, first, last, device)
        if found.fell:
            held = f"alpha={found.alpha:g} of interpolate(before, after, alpha) has {found.scores[found.alpha]:.3f}"
            choice = (
                f"given back is the interpolation: {held}" if self.guard_repair else f"{held}: see guard_repair=True"
            )
            warnings.warn(
                f"the guard's score fell from {first:.3f} to {last:.3f}, by more than {self.guard_tolerance:g}; {choice}",
                ForgettingWarning,
                stacklevel=3,
            )
        if found.fell and self.guard_repair:
            found, after = replace(found, repaired=True), mended
        step = after.history[-1]
        after.history = (*after.history[:-1], {**step, "args": {**step["args"], "guard": found.as_dict()}})
        return found, after

    def arguments(self) -> dict[str, Any]:
        """What was asked for, in plain values, for the encoder's history: settings that differ from their defaults."""
        changed = {}
        for item in fields(self):
            value = getattr(self, item.name)
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            if item.name in _DECISIVE and value != default:
                changed[item.name] = plain(value)
        return {**self._said(), "steps": self.steps, "seed": self.seed, **changed}

    def _said(self) -> dict[str, Any]:
        said: dict[str, Any] = {"objective": describe(self.objective), "batch_size": self.batch_size}
        for name in ("trainable", "freeze", "augment", "collate", "ema"):
            if value := getattr(self, name):
                said[name] = plain(value)
        if self.gradient_transform is not None:
            said["gradient_transform"] = describe(self.gradient_transform)
        if self.lora is not None:
            said["lora"] = self.lora.settings()
        return said

    def _accepts(self, name: str, parameter: nn.Parameter, frozen: Set[int]) -> bool:
        if name.startswith("objective."):
            return parameter.requires_grad
        name = name.removeprefix("encoder.")
        if id(parameter) in frozen:
            return False
        if self.trainable is None:
            return parameter.requires_grad  # with adapters, those alone
        if self.lora is not None and is_adapter(name):
            return True
        if callable(self.trainable):
            return self.trainable(name, parameter)
        return re.search(self.trainable, name) is not None

    def _device(self, home: torch.device) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        if home.type != "cpu" or not torch.cuda.is_available():
            return home
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))  # one GPU for each process of a machine


class _Numbered:
    """Batches together with their numbers."""

    def __init__(self, batches: Any):
        self.batches, self.threads_allowed = batches, batches.threads_allowed

    def __call__(self, i: int) -> tuple[int, Batch]:
        return i, self.batches(i)


def describe(part: Any) -> dict[str, Any]:
    """An objective, or what else a run is made of, as plain values: its class's name, its dataclass fields (models by id)."""
    values: dict[str, Any] = {}
    if is_dataclass(part):
        values = {item.name: getattr(part, item.name) for item in fields(part)}
    return {"name": type(part).__name__, **plain(values)}


def _records(pairs: Pairs) -> list[int] | None:
    """How many records there are, and a checksum of some of their ids, where these can be had without decoding."""
    if not isinstance(pairs, Sized):
        return None
    ids = [str(id) for _, id in cheap_column(pairs, "id")]
    return [len(pairs), zlib.crc32("\n".join(ids).encode())]


def _bound(objective: Objective, encoder: HFEncoder) -> tuple[Objective, nn.Module]:
    """The objective to train with, and the module that holds all that may learn."""
    bind = getattr(objective, "bind", None)
    if bind is not None:
        objective = bind(encoder)
    elif isinstance(objective, nn.Module):
        objective = copy.deepcopy(objective)
    if not isinstance(objective, nn.Module):
        return objective, encoder
    objective.to(encoder.device)
    return objective, nn.ModuleDict({"encoder": encoder, "objective": objective})


def _tower(encoder: HFEncoder, name: str) -> list[nn.Parameter]:
    """The parameters of one tower, its projection included."""
    tower = getattr(encoder.anatomy, name)
    projection = [] if tower.projection is None else list(tower.projection.parameters())
    return [*tower.module.parameters(), *projection]


def _score(score: Score, encoder: Encoder) -> float:
    """The guard's score of the encoder at rest, without a trace in the generators."""
    with own_randomness(), modes(encoder), torch.no_grad():
        return float(score(cast(Any, encoder).eval()))


def _scale_clamp(encoder: Encoder) -> Callable[[int], None]:
    """Keep every `logit_scale` at ln 100 or below."""
    scales = [p for name, p in encoder.named_parameters() if name.split(".")[-1] == "logit_scale"]

    def clamp(step: int) -> None:
        for scale in scales:
            if scale.requires_grad:
                scale.clamp_(max=LN_100)

    return clamp
