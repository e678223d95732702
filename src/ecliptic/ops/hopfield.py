"""Retrieval from a modern Hopfield network: one update of continuous states against stored patterns."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize


def retrieve(states: Tensor, memory: Tensor, beta: float) -> Tensor:
    """rownorm(softmax(beta * states @ memory.T) @ memory): arXiv 2110.11316, by the update rule of arXiv 2008.02217.

    states: (N, d) queries; memory: (M, d) stored patterns; unit rows in both. beta: inverse temperature, >= 0: 0 gives
    every state the mean direction of the memory, a large one the nearest stored pattern itself. Nothing is learnt in here.
    Returns (N, d), unit rows, differentiable in states and memory.
    """
    if states.ndim != 2 or memory.ndim != 2 or states.shape[1] != memory.shape[1] or not len(memory):
        raise ValueError(
            f"states and memory must be (N, d) and (M, d), M >= 1, not {tuple(states.shape)} and {tuple(memory.shape)}"
        )
    if beta < 0:
        raise ValueError(f"beta={beta}: must not be negative")
    return normalize((beta * states @ memory.T).softmax(-1) @ memory, dim=-1)
