"""The contracts: the few shapes that every method takes and gives back.

Values travel one way, `Pairs -> Encoder -> Features -> Prediction -> Report`. A method is a `DataStep`, an `Objective`, a
`ModelStep`, a `Predictor`, or a plain function; nothing here knows any particular one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ecliptic.core.encoder import Encoder

Record = dict[str, Any]
"""One example: `image` (PIL image or path), `caption`, and optionally `label`, `mask`, `boxes`, `captions` and so on."""

Pairs = Iterable[Record]
"""Records that can be walked over more than once (a list, `ecliptic.data.Records`, a re-openable stream)."""


class Tokens(NamedTuple):
    """Tokenised captions. `ids` (B, L) int64; `mask` (B, L) bool, true on real tokens (end of text included)."""

    ids: Tensor
    mask: Tensor

    def to(self, device: torch.device | str) -> Tokens:
        return Tokens(self.ids.to(device), self.mask.to(device))


@dataclass(frozen=True)
class Features:
    """What a tower says about a batch.

    pooled: (B, D) in the joint space; unit rows unless the tower was called with `normalize=False`.
    tokens: (B, N, D) patches (row-major over `grid`, class token removed) or words, projected into the joint space and
        not normalised; None unless asked for.
    layers: raw hidden states (B, N', width) after the blocks asked for, with all special tokens still in place.
    grid: (rows, columns) of the patches. mask: (B, N) bool, true on real words.
    """

    pooled: Tensor
    tokens: Tensor | None = None
    layers: Mapping[int, Tensor] = field(default_factory=dict)
    grid: tuple[int, int] | None = None
    mask: Tensor | None = None


class Views(dict[str, Features]):
    """The features an objective asked for, by name, with the model's `scale` (1/temperature) and additive `bias`.

    groups: (B,) int64, equal exactly where two pairs have the same caption (then neither is the other's negative), or None.
    """

    def __init__(
        self, features: Mapping[str, Features], scale: Tensor, bias: Tensor | None = None, groups: Tensor | None = None
    ):
        super().__init__(features)
        self.scale = scale
        self.bias = bias
        self.groups = groups


@dataclass(frozen=True)
class Prediction:
    """What a predictor says about B pictures; only the fields its task has are filled.

    scores: (B, K), higher means more of that class. labels: the best class of each picture, by name.
    maps: (B, H, W), higher means more of what was asked for. boxes: per picture (n, 4), pixels, x0 y0 x1 y1.
    """

    scores: Tensor | None = None
    labels: list[str] | None = None
    classes: tuple[str, ...] | None = None
    maps: Tensor | None = None
    boxes: list[Tensor] | None = None
    text: list[str] | None = None


class DataStep(ABC):
    """Records in, records out, streaming. Decisions depend only on (seed, record id), so that shards agree."""

    @abstractmethod
    def apply(self, pairs: Pairs) -> Pairs:
        """Lazily transform the records; the input must stay re-iterable in the output."""


class Objective(ABC):
    """A loss. It sees features, not a model, and gives the same gradient under one process or many.

    Beyond `encode` and `terms` the trainer looks for four optional names: `fields`, further record fields to put in the
    batch; `collate(encoder, records) -> batch`, in place of the default one; `bind(encoder) -> objective`, to size learnt
    parts; `rowwise = True`, said by one whose own `encode` treats each row by itself, so that it may be given a batch in
    chunks. An objective that is also an `nn.Module` has its own parameters trained, on a copy.

    Of several processes each encodes its part of a batch, and `terms` sees the views of all of it, in every process; an
    objective with `local` true sees its own part's only, and talks to the other processes itself (`ecliptic.core.ring`).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"image", "text"})

    def encode(self, encoder: Encoder, batch: Mapping[str, Any]) -> Views:
        """Compute the views in `needs` from a collated batch (`image`: pixels (B, 3, H, W); `text`: Tokens)."""
        known = {"image", "text"}
        if not self.needs <= known:
            raise TypeError(f"{type(self).__name__} needs {sorted(self.needs - known)}: it must override encode()")
        views: dict[str, Features] = {}
        if "image" in self.needs:
            views["image"] = encoder.images(batch["image"])
        if "text" in self.needs:
            views["text"] = encoder.texts(batch["text"])
        return Views(views, encoder.scale, encoder.bias)

    @abstractmethod
    def terms(self, views: Views) -> dict[str, Tensor]:
        """Named scalars; the trainer minimises their sum."""


class ModelStep(ABC):
    """An encoder in, a changed copy out. The encoder that went in still says what it said before."""

    @abstractmethod
    def apply(self, encoder: Encoder, pairs: Pairs | None = None) -> Encoder: ...

    def reshape(self, encoder: Encoder) -> Encoder:
        """Give `encoder` the architecture this step yields, in place, weights arbitrary: `load` then fills them in.

        Only steps that change the architecture beyond the Hugging Face config need to override it; in `apply` they call
        `record_step(..., reshapes=True)`.
        """
        return encoder


class Predictor(ABC):
    """scikit-learn habits: the constructor stores, `fit` learns, what is learnt ends in `_`, `fit` returns `self`.

    `fit` keeps the frozen model as `encoder_`. Tensors, numbers, strings and lists, tuples and dicts of them can be
    saved; a copy by `clone` is unfitted and shares nothing that `fit` learnt.
    """

    encoder_: Encoder | None

    @abstractmethod
    def fit(self, encoder: Encoder, pairs: Pairs) -> Self: ...

    @abstractmethod
    def predict(self, pixels: Tensor) -> Prediction:
        """Pixels (B, 3, H, W), as `encoder.preprocess` gives them -> what this method says about each picture."""

    def save(self, folder: str | Path, *, with_encoder: bool = False) -> Path:
        """Write what `fit` learnt (and the model too, if asked) to a folder that `load` opens with the same answers."""
        from ecliptic.core.predictor_io import save_predictor

        return save_predictor(self, folder, with_encoder=with_encoder)

    @classmethod
    def load(cls, folder: str | Path, encoder: Encoder | None = None) -> Self:
        """Open what `save` wrote. `encoder` is the model it was fitted on, unless that was saved with it."""
        from ecliptic.core.predictor_io import load_predictor

        found: Self = load_predictor(folder, encoder, cls)
        return found

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments (scikit-learn's name for them)."""
        from ecliptic.core.predictor_io import settings_of

        return settings_of(self)

    def set_params(self, **settings: Any) -> Self:
        """Change settings by name; what was learnt stays until the next `fit`."""
        if unknown := settings.keys() - self.get_params().keys():
            raise ValueError(f"{type(self).__name__} has no setting {', '.join(sorted(unknown))}")
        for name, value in settings.items():
            setattr(self, name, value)
        return self

    def clone(self) -> Self:
        """The same settings, unfitted."""
        return type(self)(**self.get_params())
