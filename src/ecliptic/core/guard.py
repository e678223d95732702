"""Fine-tuning without collapse: measure what the model could do before, again afterwards, and mend it by weight averaging.

Fine-tuning CLIP on a small set can ruin in one epoch what it knew about everything else. The guard is a small set of other
pictures. Where its score falls, WiSE-FT interpolations between the two models are tried, and the one that keeps the most of the
training while holding the score is offered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from ecliptic.core.averaging import E, interpolate
from ecliptic.core.contracts import Record
from ecliptic.core.inputs import open_picture
from ecliptic.core.zeroshot import zero_shot_head

if TYPE_CHECKING:
    from ecliptic.core.encoder import Encoder, HFEncoder

GRID = tuple(round(0.1 * i, 1) for i in range(10))  # alphas tried; ours
Score = Callable[["Encoder"], float]


class ForgettingWarning(UserWarning):
    """Training cost the model more on the guard's pictures than it was allowed to."""


@dataclass(frozen=True)
class Guarded:
    """What the guard measured: scores in [0, 1] where it measures accuracy or recall, higher is better.

    before, after: of the encoder given and of the trained one. tolerance: the fall that is allowed. scores: alpha -> score of
    the interpolation, 0 being the encoder given; empty where nothing fell. alpha: the one to choose, 1 for the trained
    encoder as it is. repaired: whether the encoder returned is that interpolation.
    """

    before: float
    after: float
    tolerance: float
    scores: Mapping[float, float] = field(default_factory=dict)
    repaired: bool = False

    @property
    def fell(self) -> bool:
        return self.before - self.after > self.tolerance

    @property
    def alpha(self) -> float:
        """The largest alpha, that is the most training kept, whose score holds; failing all, that of the best score."""
        if not self.fell:
            return 1.0
        held = [alpha for alpha, score in self.scores.items() if self.before - score <= self.tolerance]
        return max(held) if held else max(self.scores, key=lambda alpha: self.scores[alpha])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for logs and histories."""
        scores = {f"{alpha:g}": score for alpha, score in self.scores.items()}
        found = {"before": self.before, "after": self.after, "tolerance": self.tolerance, "fell": self.fell}
        return found | ({"alpha": self.alpha, "scores": scores, "repaired": self.repaired} if self.fell else {})


def scorer(guard: Score | Iterable[Record]) -> Score:
    """The guard as a function: one as it is; of records with `label` zero-shot accuracy, with `caption` recall@1.

    Accuracy: over all pictures, among the labels that occur, put into "a photo of a {}.". Recall@1: the mean of both
    directions; a hit is any item with the same caption. Pictures and embeddings are made anew each time.
    """
    if callable(guard):
        return guard
    if isinstance(guard, str):
        raise TypeError(f"guard={guard!r}: must be records or a function, not a name; open the records first")
    records = cast("Sequence[Record]", guard if hasattr(guard, "__getitem__") else list(guard))
    if not len(records):
        raise ValueError("guard holds no records: there is nothing to measure")
    for name, measure in (("label", accuracy), ("caption", recall)):
        if any(value is not None for value in _column(records, name)):
            return lambda encoder: measure(cast("HFEncoder", encoder), records)
    raise ValueError("guard: its records have neither 'label' nor 'caption': there is nothing to measure")


def accuracy(encoder: HFEncoder, records: Sequence[Record]) -> float:
    """Share of pictures whose own label is the closest of those that occur."""
    images, labels = _pictures(encoder, records, "label")
    names = sorted(set(labels))
    if len(names) < 2:
        raise ValueError(f"guard: its records have one label only ({names[0]!r}): there is nothing to tell apart")
    head = zero_shot_head(encoder, [name.replace("_", " ").strip() for name in names])
    answer = (images @ head.T).argmax(-1)
    return float(np.mean([names[i] == label for i, label in zip(answer.tolist(), labels, strict=True)]))


def recall(encoder: HFEncoder, records: Sequence[Record]) -> float:
    """Recall@1, mean of picture to caption and caption to picture."""
    images, captions = _pictures(encoder, records, "caption")
    similarity = images @ encoder.encode_texts(captions).T
    numbers = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    group = torch.tensor([numbers[caption] for caption in captions])
    hits = [group[similarity.argmax(dim)] == group for dim in (0, 1)]
    return float(torch.stack(hits).double().mean())


def repaired(
    before: Encoder,
    after: E,
    score: Score,
    tolerance: float,
    first: float,
    last: float,
    device: torch.device | str = "cpu",
) -> tuple[E, Guarded]:
    """Score the interpolations, on `device`, if `last`, the score of `after`, is too far below `first`, that of `before`.

    Returns the one to choose, or `after` itself where nothing fell, and what was found.
    """
    found = Guarded(first, last, tolerance)
    if not found.fell:
        return after, found
    scores = {0.0: first}
    for alpha in GRID[1:]:
        scores[alpha] = float(score(interpolate(before, after, alpha).to(device)))
    found = Guarded(first, last, tolerance, scores)
    return interpolate(before, after, found.alpha), found


def _pictures(encoder: HFEncoder, records: Sequence[Record], field: str) -> tuple[Tensor, list[str]]:
    """Embeddings (N, D) of the pictures that can be read and have the field, and its values."""
    column = _column(records, field)
    kept = [i for i, value in enumerate(column) if value is not None]
    errors: dict[int, Exception] = {}
    rows = encoder.encode_images(kept, decode=lambda i: open_picture(records[i]["image"]), errors=errors)
    for error in errors.values():
        if not isinstance(error, OSError | ValueError):  # no broken picture, but a fault in the program
            raise error
    good = [place for place in range(len(kept)) if place not in errors]
    if not good:
        raise ValueError(
            f"guard: none of its {len(kept)} pictures can be read; the first: {next(iter(errors.values()))}"
        )
    return rows[good], [str(column[kept[place]]) for place in good]


def _column(records: Sequence[Record], field: str) -> list[Any]:
    """The field of each record, None where it is missing; no picture is opened for it where the source knows how."""
    if not hasattr(records, "column"):
        return [record.get(field) for record in records]
    try:
        return list(cast(Any, records).column(field))
    except KeyError:
        return [None] * len(records)
