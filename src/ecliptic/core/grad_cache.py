"""Exact large batches on small memory: gradient caching, GradCache (arXiv 2101.06983).

A contrastive loss couples all rows of a batch, but only through their embeddings. So the batch is encoded chunk by chunk without
keeping what a backward pass would need (the paper's step 1); the objective's gradient with respect to the embeddings is taken
(step 2); each chunk is then encoded again, with the same random numbers, and receives its share of that gradient (step 3).
The sum is the gradient of the full batch, for one more forward pass of the towers, and activations of one chunk at a time.

Steps 1 and 3 are what `torch.utils.checkpoint` does around a function, here around the encoding of a chunk. So the objective,
its own parameters, the temperature, mixed precision and gathering over processes all work as they do without chunks.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ecliptic.core.contracts import Features, Objective, Tokens, Views

if TYPE_CHECKING:
    from ecliptic.core.encoder import Encoder


def encode_in_chunks(objective: Objective, encoder: Encoder, batch: Mapping[str, Any], size: int) -> Views:
    """The views of `objective.encode(encoder, batch)`, `size` rows at a time, with the same gradient; see the module.

    Batch: a mapping of tensors, `Tokens`, lists and arrays with one entry per row; numbers and strings go to every chunk.
    """
    whole = list(chunks(batch, size))
    if len(whole) == 1:
        return objective.encode(encoder, batch)
    parts = [
        checkpoint(objective.encode, encoder, part, use_reentrant=False, context_fn=_same_numbers) for part in whole
    ]
    return join(parts)


def check_chunks(objective: Objective, module: nn.Module) -> None:
    """Refuse what cannot be encoded in chunks: rows must not depend on each other before the objective sees them.

    An objective with an `encode` of its own says that its rows do not by `rowwise = True`.
    """
    name = type(objective).__name__
    if type(objective).encode is not Objective.encode and not getattr(objective, "rowwise", False):
        raise ValueError(
            f"{name} has an encode() of its own, and chunk=... is exact only if each row of its views depends on its own row "
            f"of the batch alone: if so, set `rowwise = True` in {name}, otherwise leave chunk out"
        )
    for part, child in module.named_modules():
        if isinstance(child, _BatchNorm) and child.training:
            raise ValueError(
                f"{part} is a batch norm in training: its rows depend on each other, so chunk=... cannot be exact; freeze it"
            )


def chunks(batch: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """Cut a batch into runs of `size` rows, the last one possibly shorter."""
    counts = {name: count for name, value in batch.items() if (count := _rows(value)) is not None}
    if len(set(counts.values())) != 1:
        raise ValueError(f"chunk=... needs a batch whose entries have one length, not {counts}")
    for start in range(0, next(iter(counts.values())), size):
        yield {name: _cut(batch[name], slice(start, start + size)) for name in batch}


def join(parts: Sequence[Views]) -> Views:
    """The views of consecutive rows as one. Scale, bias and whatever else hangs on the views are the first part's.

    Captions may be padded to another length in each part: the shorter ones get zero tokens, which their mask marks as no words.
    """
    whole = copy.copy(parts[0])  # of its own class, with its own attributes
    whole.update({name: _join_features(name, [part[name] for part in parts]) for name in parts[0]})
    return whole


def _join_features(name: str, parts: Sequence[Features]) -> Features:
    first = parts[0]
    return replace(
        first,
        pooled=_cat(name, [part.pooled for part in parts], first),
        tokens=None if first.tokens is None else _cat(name, [part.tokens for part in parts], first),
        layers={depth: _cat(name, [part.layers[depth] for part in parts], first) for depth in first.layers},
        mask=None if first.mask is None else _cat(name, [part.mask for part in parts], first),
    )


def _cat(name: str, parts: Sequence[Tensor | None], features: Features) -> Tensor:
    rows = [part for part in parts if part is not None]
    if rows[0].ndim > 1 and len({part.shape[1] for part in rows}) > 1:
        if features.mask is None:
            raise ValueError(
                f"the {name!r} views of the chunks differ in length and have no mask, so they cannot be joined: "
                "pad them to one length, or give Features a mask"
            )
        longest = max(part.shape[1] for part in rows)
        rows = [pad(part, (0,) * 2 * (part.ndim - 2) + (0, longest - part.shape[1])) for part in rows]
    return torch.cat(rows)


def _rows(value: Any) -> int | None:
    """How many rows an entry of a batch has, or None if it has none."""
    if isinstance(value, Tokens):
        return len(value.ids)
    if isinstance(value, Tensor | np.ndarray):
        return len(value) if value.ndim else None
    return len(value) if isinstance(value, list | tuple) else None


def _cut(value: Any, rows: slice) -> Any:
    if isinstance(value, Tokens):
        return Tokens(value.ids[rows], value.mask[rows])
    return value if _rows(value) is None else value[rows]


def _same_numbers() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the first and the second encoding. torch's own generators are `checkpoint`'s business, these are others'."""
    plain, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002

    @contextmanager
    def again() -> Iterator[None]:
        now, then = random.getstate(), np.random.get_state()  # noqa: NPY002
        random.setstate(plain)
        np.random.set_state(arrays)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(now)
            np.random.set_state(then)  # noqa: NPY002

    return nullcontext(), again()
