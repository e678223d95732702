"""What a training run borrows and gives back: generators, training flags, gradients, Ctrl-C and accelerate's own state."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator


def seed_all(*numbers: int) -> None:
    """Seed every generator from these numbers alone."""
    words = np.random.SeedSequence(numbers).generate_state(3, np.uint32)
    torch.manual_seed((int(words[0]) << 31) ^ int(words[1]))
    np.random.seed(int(words[2]))  # noqa: NPY002  the global generator, for code that draws from it
    random.seed(int(words[2]))


@contextmanager
def own_randomness() -> Iterator[None]:
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
def modes(module: nn.Module) -> Iterator[None]:
    """Put every submodule's training flag back at the end."""
    before = [(child, child.training) for child in module.modules()]
    try:
        yield
    finally:
        for child, training in before:
            child.training = training


@contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Put every buffer (running statistics) back at the end."""
    before = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


@contextmanager
def only(module: nn.Module, chosen: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Only `chosen` require grad; parts without any of them stay in evaluation mode (dropout, running statistics)."""
    flags = [(p, p.requires_grad) for p in module.parameters()]
    ids = {id(p) for p in chosen.values()}
    with modes(module):
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
def own_accelerator(device: torch.device, precision: str) -> Iterator[Accelerator]:
    """An accelerator of our own. Its settings are process-wide in accelerate, so the caller's, if any, are put back.

    Under torchrun or accelerate launch it joins the processes first; that bond stays until they end.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    whole, part = dict(AcceleratorState._shared_state), dict(PartialState._shared_state)
    AcceleratorState._reset_state(reset_partial_state=part.get("num_processes", 1) == 1)
    try:
        accelerator = Accelerator(
            mixed_precision=precision, cpu=device.type == "cpu", step_scheduler_with_optimizer=False
        )
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise NotImplementedError(
                f"accelerate is set up for {accelerator.distributed_type.value}; training here keeps whole weights in each "
                "process: start it with torchrun, or with `accelerate launch --multi_gpu` and neither FSDP nor DeepSpeed"
            )
        yield accelerator
    finally:
        for state, before in ((AcceleratorState._shared_state, whole), (PartialState._shared_state, part)):
            state.clear()
            state.update(before)


class Interrupt:
    """Holds the first Ctrl-C back until the weights are whole; a second one comes through at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
