"""The only training loop, on accelerate: `fit` trains any parameters under any loss, `Train` an encoder under an objective.

What makes a run repeatable: batch `i` depends only on (seed, i), and every step seeds all generators from (seed, step,
process). So a checkpoint needs no generator state, a resumed run equals an undisturbed one bit for bit on a CPU, and neither
the generators' global state nor the encoder that was given is changed by training.
"""

from __future__ import annotations

import copy
import json
import math
import random
import re
import signal
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, Sized
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from ecliptic.core import checkpoint
from ecliptic.core.batches import Augment, Batch, Indexed, Streamed, cheap_column, check, collate, prefetch
from ecliptic.core.contracts import ModelStep, Objective, Pairs, Record
from ecliptic.core.progress import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ecliptic.core.encoder import Encoder, HFEncoder

B = TypeVar("B")
M = TypeVar("M", bound=nn.Module)
Trainable = str | Callable[[str, nn.Parameter], bool]

LN_100 = math.log(100)  # arXiv 2103.00020, section 2.5: the logits are never scaled by more than 100

TOWERS = ("image", "text")


class NonFiniteLoss(ArithmeticError):
    """A loss or gradient became infinite or NaN. Weights were not updated with it, and the last checkpoint stands."""


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


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
        for name in ("optimizer", "schedule", "precision"):
            choices = {"optimizer": ("adamw", "sgd"), "schedule": SCHEDULES, "precision": ("no", "bf16", "fp16")}[name]
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")

    @property
    def warmup_steps(self) -> int:
        return int(self.warmup if self.warmup >= 1 else self.warmup * self.steps)


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
    after_step: called with the number of updates done, after each (clamps, moving averages).
    evaluate: every `settings.evaluate_every` steps and at the end, in evaluation mode; its numbers go into that step's row.
    extras: further state to keep in checkpoints. identity: plain values that a checkpoint must agree with to be resumed.

    A row: step, loss and terms (as before the update), lr, grad_norm (before clipping), samples_per_s, waited (share of the time
    spent waiting for data), and evaluate.
    Raises NonFiniteLoss, and KeyboardInterrupt after saving a checkpoint where a folder is given.
    """
    get = batches if callable(batches) else _in_turn(batches)
    chosen = select(module, trainable)
    device = next(iter(chosen.values())).device
    stored = _Store(module, chosen, settings, extras or {}, identity or {})

    with ExitStack() as stack:
        stack.enter_context(_own_randomness())
        stack.enter_context(_only(module, chosen))
        accelerator = stack.enter_context(_accelerator(device, settings.precision))
        model = accelerator.prepare_model(_Step(module, loss_fn), device_placement=False)
        optimizer = accelerator.prepare_optimizer(_optimizer(chosen, settings), device_placement=False)
        start = stored.resume(optimizer, accelerator)
        log = stack.enter_context(_Log(settings, start, active=accelerator.is_main_process))
        interrupt = stack.enter_context(_Interrupt())
        bar = stack.enter_context(Progress(title, settings.steps, unit=unit, start=start))
        threads = settings.workers if getattr(get, "threads_allowed", True) else min(settings.workers, 1)
        wanted = range(start * settings.accumulate, settings.steps * settings.accumulate)
        stream = stack.enter_context(_closing(prefetch(get, wanted, threads)))

        step, updating = start, False
        try:
            while step < settings.steps:
                interrupt.check()
                began = time.perf_counter()
                group = [next(stream) for _ in range(settings.accumulate)]
                waited = time.perf_counter() - began

                terms = _gradients(accelerator, model, group, settings.seed, step, device)
                norm = float(accelerator.clip_grad_norm_(list(chosen.values()), settings.grad_clip or math.inf))
                _require_finite(step + 1, terms, norm, stored.newest, scaled=accelerator.scaler is not None)

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
                count = sum(map(_size, group)) * accelerator.num_processes
                row: dict[str, Any] = {"step": step, "loss": sum(terms.values()), "terms": terms}
                row |= {"lr": settings.lr * share, "grad_norm": norm, "samples_per_s": count / seconds}
                row |= {"waited": waited / seconds}
                every = settings.evaluate_every
                try:
                    if evaluate is not None and (step == settings.steps or (every and step % every == 0)):
                        row["evaluate"] = _evaluated(module, evaluate)
                finally:  # the step is done, whatever becomes of its evaluation
                    log.write(row)
                bar.advance(units=count, note=f"loss {row['loss']:.4g}")
                if step % settings.checkpoint_every == 0 or step == settings.steps:
                    stored.save(step, optimizer, accelerator)
        except KeyboardInterrupt:
            if not updating and stored.at != step:
                stored.save(step, optimizer, accelerator)
            raise
    return log.rows


class _Step(nn.Module):
    """Module and loss in one forward, which is where accelerate hangs autocast and gradient synchronisation."""

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
    """Add up the gradient of one update over its batches; returns the mean terms. Chunked large batches replace this."""
    from accelerate.utils import send_to_device

    sums: dict[str, float] = {}
    for place, batch in enumerate(group):
        _seed(seed, step, place, accelerator.process_index)
        if device.type != "cpu":
            batch = send_to_device(batch, device, non_blocking=True)
        last = place == len(group) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            terms = model(batch)
            loss = torch.stack([term.reshape(()).float() for term in terms.values()]).sum() / len(group)
            if not loss.requires_grad:
                raise ValueError(f"no loss term ({', '.join(terms)}) depends on a trained parameter")
            accelerator.backward(loss)
        values = {name: term.detach().double().reshape(()) for name, term in terms.items()}
        for name, value in accelerator.reduce(values, "mean").items():
            sums[name] = sums.get(name, 0.0) + float(value) / len(group)
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
    with _modes(module):
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


# -- what a run borrows and gives back ---------------------------------------------------------------------------------


def _seed(*numbers: int) -> None:
    """Seed every generator from these numbers alone."""
    words = np.random.SeedSequence(numbers).generate_state(3, np.uint32)
    torch.manual_seed((int(words[0]) << 31) ^ int(words[1]))
    np.random.seed(int(words[2]))  # noqa: NPY002  the global generator, for code that draws from it
    random.seed(int(words[2]))


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Put the state of the global generators of torch, numpy and random back at the end."""
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    plain, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)  # noqa: NPY002


@contextmanager
def _modes(module: nn.Module) -> Iterator[None]:
    """Put every submodule's training flag back at the end."""
    before = [(child, child.training) for child in module.modules()]
    try:
        yield
    finally:
        for child, training in before:
            child.training = training


@contextmanager
def _only(module: nn.Module, chosen: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Only `chosen` require grad; parts without any of them stay in evaluation mode (dropout, running statistics)."""
    flags = [(p, p.requires_grad) for p in module.parameters()]
    ids = {id(p) for p in chosen.values()}
    with _modes(module):
        module.train()
        for child in module.modules():
            own = list(child.parameters())
            if own and not any(id(p) in ids for p in own):
                child.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in ids)
        try:
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
                if id(parameter) in ids:
                    parameter.grad = None


@contextmanager
def _accelerator(device: torch.device, precision: str) -> Iterator[Accelerator]:
    """An accelerator of our own. Its settings are process-wide in accelerate, so the caller's, if any, are put back."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    whole, part = dict(AcceleratorState._shared_state), dict(PartialState._shared_state)
    AcceleratorState._reset_state(reset_partial_state=part.get("num_processes", 1) == 1)
    try:
        accelerator = Accelerator(
            mixed_precision=precision, cpu=device.type == "cpu", step_scheduler_with_optimizer=False
        )
        if accelerator.num_processes > 1:
            raise NotImplementedError("training over several processes is not supported yet: start one process")
        yield accelerator
    finally:
        for state, before in ((AcceleratorState._shared_state, whole), (PartialState._shared_state, part)):
            state.clear()
            state.update(before)


@contextmanager
def _closing(stream: Iterator[B]) -> Iterator[Iterator[B]]:
    try:
        yield stream
    finally:
        cast(Any, stream).close()


class _Interrupt:
    """Holds the first Ctrl-C back until the weights are whole; a second one comes through at once."""

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> _Interrupt:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def check(self) -> None:
        if self._asked:
            raise KeyboardInterrupt


class _Store:
    """A run's checkpoints: the trained parameters, all buffers, the optimiser, the step, and what the run must agree with."""

    def __init__(
        self,
        module: nn.Module,
        chosen: Mapping[str, nn.Parameter],
        settings: Settings,
        extras: Mapping[str, Stateful],
        identity: Mapping[str, Any],
    ):
        self.module, self.chosen, self.settings, self.extras = module, chosen, settings, extras
        self.folder = None if settings.checkpoints is None else Path(settings.checkpoints)
        self.newest: Path | None = None
        self.mine: list[Path] = []
        self.at = -1
        if self.folder is not None:
            same = {name: _plain(getattr(settings, name)) for name in _DECISIVE} | _plain(dict(identity))
            self.identity = {**same, "trained parameters": sorted(chosen), "frozen weights": self._frozen()}

    def resume(self, optimizer: Any, accelerator: Accelerator) -> int:
        """Load the newest checkpoint, if there is one to go on from; returns the steps done."""
        found = checkpoint.checkpoints(self.folder) if self.folder is not None and self.settings.resume else []
        if not found:
            return 0
        step, path = found[-1]
        state = checkpoint.load(path)
        differing = [name for name in self.identity if state["identity"].get(name) != self.identity[name]]
        if differing:
            listed = "; ".join(
                f"{name}: {_short(state['identity'].get(name))} there, {_short(self.identity[name])} here"
                for name in differing
            )
            raise ValueError(
                f"{path} is of another run ({listed}). Use the same settings, another folder, or resume=False to start afresh"
            )
        self.module.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler is not None and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
        for name, extra in self.extras.items():
            extra.load_state_dict(state["extras"][name])
        self.newest, self.at, self.mine = path, step, [path for _, path in found]
        return step

    def save(self, step: int, optimizer: Any, accelerator: Accelerator) -> None:
        if self.folder is None or not accelerator.is_main_process:
            return
        buffers = {name for name, _ in self.module.named_buffers()}
        state = {
            "step": step,
            "identity": self.identity,
            "model": {k: v for k, v in self.module.state_dict().items() if k in self.chosen or k in buffers},
            "optimizer": optimizer.state_dict(),
            "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            "extras": {name: extra.state_dict() for name, extra in self.extras.items()},
        }
        self.newest, self.at = checkpoint.save(self.folder, step, state), step
        self.mine = [*(path for path in self.mine if path != self.newest), self.newest][-self.settings.keep :]
        for _, path in checkpoint.checkpoints(self.folder):
            if path not in self.mine:  # older ones, and those of a run that this one starts afresh
                path.unlink()

    def _frozen(self) -> int:
        """A checksum of the weights that are not trained, and so not stored."""
        total = 0
        for name, parameter in self.module.named_parameters():
            if name not in self.chosen:
                data = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                total = zlib.crc32(cast(Any, data), zlib.crc32(name.encode(), total))
        return total


class _Log:
    """JSON lines, one per step, flushed as they come. Resuming drops the rows after the checkpoint."""

    def __init__(self, settings: Settings, start: int, active: bool):
        path = settings.log
        if path is None and settings.checkpoints is not None:
            path = Path(settings.checkpoints) / "log.jsonl"
        self.path = Path(path) if path is not None and active else None
        self.start = start
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> _Log:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.start and self.path.exists():
                lines = map(_row, self.path.read_text().splitlines())
                self.rows = [row for row in lines if row and row["step"] <= self.start]
            part = self.path.with_name(f".{self.path.name}.writing")
            part.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            part.replace(self.path)
            self._file = self.path.open("a")
        return self

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            self._file.close()

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.path is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:  # the last line of a killed run
        return None
    return row if isinstance(row, dict) else None


def _plain(value: Any) -> Any:
    """The value as JSON would give it back; what JSON does not know becomes its name."""

    def name(thing: Any) -> str:
        if isinstance(thing, Path):
            return str(thing)
        return str(getattr(thing, "id", None) or getattr(thing, "__qualname__", None) or type(thing).__qualname__)

    return json.loads(json.dumps(value, default=name))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# -- an encoder under an objective -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """What `Train.run` gives: the new encoder, the objective with whatever it learnt, the log (see `fit`), and which records
    could not be read (index -> reason)."""

    encoder: Encoder
    objective: Objective
    log: list[dict[str, Any]]
    unreadable: Mapping[int, str]


@dataclass(frozen=True)
class Train(Settings, ModelStep):
    """Train an encoder under an objective: `Train(InfoNCE(), steps=400, batch_size=256).apply(encoder, pairs)`.

    An objective may further offer
    - `collate(encoder, records) -> batch`, in place of the default (`ecliptic.core.batches.collate`), or only `fields`, the names
      of further record fields to put into the batch (teacher vectors, cached features);
    - `bind(encoder) -> objective`, called once on the encoder to be trained, to size what it learns;
    and if it is an nn.Module, its own parameters (those that require grad) are trained with the encoder's, on a copy.
    """

    objective: Objective
    batch_size: int = field(default=256, kw_only=True)
    trainable: Trainable | None = field(default=None, kw_only=True)  # names as in encoder.named_parameters(); None: all
    freeze: tuple[str, ...] = field(default=(), kw_only=True)  # "image", "text": towers with their projections
    augment: Augment | None = field(
        default=None, kw_only=True
    )  # (record, generator) -> record; drawn from (seed, epoch, index)
    collate: Callable[[Encoder, list[Record]], Batch] | None = field(default=None, kw_only=True)
    evaluate: Callable[[Encoder], Mapping[str, float]] | None = field(default=None, kw_only=True)
    device: str | None = field(default=None, kw_only=True)  # None: the encoder's own, or a GPU if there is one

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := set(self.freeze) - set(TOWERS):
            raise ValueError(f"freeze={sorted(unknown)}: choose from {', '.join(TOWERS)}")

    def apply(self, encoder: Encoder, pairs: Pairs | None = None) -> Encoder:
        return self.run(encoder, pairs).encoder

    def run(self, encoder: Encoder, pairs: Pairs | None) -> Trained:
        """As `apply`, with the objective and the log beside the new encoder."""
        own_collate = self.collate or getattr(self.objective, "collate", None)
        check(pairs, self.objective, custom=own_collate is not None)
        assert pairs is not None
        student = cast("HFEncoder", encoder).clone()
        home = student.device
        student.to(self._device(home))
        objective, module = _bound(self.objective, student)
        frozen = {id(p) for tower in self.freeze for p in _tower(student, tower)}

        def make(records: list[Record]) -> Batch:
            if own_collate is not None:
                return cast(Batch, own_collate(student, records))
            return collate(student, records, objective)

        def loss(batch: Batch) -> dict[str, Tensor]:
            views = objective.encode(student, batch)
            if "group" in batch:
                views.groups = batch["group"]
            return objective.terms(views)

        indexed = hasattr(pairs, "__len__") and hasattr(pairs, "__getitem__")
        kind: Any = Indexed if indexed else Streamed
        batches = kind(pairs, self.batch_size, self.seed, make, self.augment)
        evaluate = self.evaluate
        log = fit(
            module,
            loss,
            batches,
            self,
            trainable=lambda name, parameter: self._accepts(name, parameter, frozen),
            after_step=_scale_clamp(student),
            evaluate=None if evaluate is None else lambda: evaluate(student),
            identity={"records": _records(pairs)} | self._said(),
            unit="pairs",
        )
        student.to(home)
        student.eval()
        student.record_step("train", self.arguments())
        unreadable: dict[int, str] = getattr(batches, "unreadable", {})
        if unreadable:
            index, reason = next(iter(unreadable.items()))
            warnings.warn(
                f"{len(unreadable)} records could not be read and were replaced, the first {index}: {reason}",
                stacklevel=2,
            )
        return Trained(student, objective, log, unreadable)

    def arguments(self) -> dict[str, Any]:
        """What was asked for, in plain values, for the encoder's history: settings that differ from their defaults."""
        changed = {}
        for item in fields(self):
            value = getattr(self, item.name)
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            if item.name in _DECISIVE and value != default:
                changed[item.name] = _plain(value)
        return {**self._said(), "steps": self.steps, "seed": self.seed, **changed}

    def _said(self) -> dict[str, Any]:
        said: dict[str, Any] = {"objective": describe(self.objective), "batch_size": self.batch_size}
        for name in ("trainable", "freeze", "augment", "collate"):
            if value := getattr(self, name):
                said[name] = _plain(value)
        return said

    def _accepts(self, name: str, parameter: nn.Parameter, frozen: Set[int]) -> bool:
        if name.startswith("objective."):
            return parameter.requires_grad
        name = name.removeprefix("encoder.")
        if id(parameter) in frozen:
            return False
        if self.trainable is None:
            return parameter.requires_grad
        if callable(self.trainable):
            return self.trainable(name, parameter)
        return re.search(self.trainable, name) is not None

    def _device(self, home: torch.device) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        return torch.device("cuda") if home.type == "cpu" and torch.cuda.is_available() else home


def describe(objective: Objective) -> dict[str, Any]:
    """An objective as plain values: its class's name and its dataclass fields (a model among them by its id)."""
    values: dict[str, Any] = {}
    if is_dataclass(objective):
        values = {item.name: getattr(objective, item.name) for item in fields(objective)}
    return {"name": type(objective).__name__, **_plain(values)}


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


def _scale_clamp(encoder: Encoder) -> Callable[[int], None]:
    """Keep every `logit_scale` at ln 100 or below."""
    scales = [p for name, p in encoder.named_parameters() if name.split(".")[-1] == "logit_scale"]

    def clamp(step: int) -> None:
        for scale in scales:
            if scale.requires_grad:
                scale.clamp_(max=LN_100)

    return clamp
