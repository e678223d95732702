"""Classifiers whose towers were tuned: the frozen encoder, and the few tensors in which the tuned one differs from it.

Only those tensors are kept and saved. The tuned encoder is built from both when it is first asked; weights that are the
same in both are shared, so that it takes little more memory than what was learnt.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor

from ecliptic.core.checkpoint import plain
from ecliptic.core.contracts import Prediction, Predictor
from ecliptic.core.encoder import Encoder, HFEncoder
from ecliptic.core.feature_predictor import answer
from ecliptic.core.lora import low_rank_additions
from ecliptic.core.predictor_io import learnt_by
from ecliptic.core.prompt_classifier import logit_scale
from ecliptic.core.zeroshot import zero_shot_head

A, B = ".lora_A", ".lora_B"  # after the name of a weight: the two factors of what is added to it


class TunedPredictor(Predictor):
    """Names pictures with tuned towers. A subclass trains, and calls `_keep` at the end of `fit`; the rest is here.

    state_: what differs from the frozen encoder, by the names of its `state_dict()`: a tensor that replaces one, or factors
    "NAME.lora_A" (r, in) and "NAME.lora_B" (out, r) of what is added to one. classes_: names, in the order of the columns.
    text_: (K, D) unit rows, the classifier. scale_: what cosines are multiplied by. trained_parameters_: how many numbers
    gradient descent has changed.

    A subclass with more than towers to it (prompts, a head of its own) overrides `class_rows`, and `scores_of` if need be.
    """

    templates: Any = "photo"  # as `core.zeroshot.zero_shot_head` takes them
    tau: float | None = None  # as `core.prompt_classifier.PromptClassifier` takes it
    state_: dict[str, Tensor]
    classes_: tuple[str, ...]
    text_: Tensor
    scale_: float
    trained_parameters_: int
    _tuned: HFEncoder | None = None

    @torch.no_grad()
    def predict(self, pixels: Tensor, classes: Sequence[str] | None = None) -> Prediction:
        """Pixels (B, 3, H, W), as `encoder.preprocess` gives them -> scores (B, K), scaled cosines, and labels.

        classes: answer among these only, in this order. For names not learnt, see `for_classes`.
        """
        tuned = self._encoder()
        return answer(self.scores_of(tuned.images(pixels).pooled.float().cpu()), self.classes_, classes)

    def scores_of(self, features: Tensor) -> Tensor:
        """Unit rows (B, D) of the tuned image tower -> (B, K)."""
        return self.scale_ * features @ self.text_.T

    @torch.no_grad()
    def for_classes(self, names: Sequence[str]) -> Self:
        """The same for other classes, trained on or not, by their names; shares the tuned towers with this one."""
        tuned = self._encoder()
        other = self.clone()
        for name, value in learnt_by(self).items():
            setattr(other, name, value)
        other.encoder_, other._tuned = self.encoder_, tuned
        other.classes_, other.text_ = tuple(names), self.class_rows(tuned, names)
        return other

    def class_rows(self, tuned: HFEncoder, names: Sequence[str]) -> Tensor:
        """K class names -> (K, D) float32 unit rows on the CPU. Raises ValueError for names that are empty or occur twice."""
        return zero_shot_head(tuned, names, self.templates)

    def tuned_encoder(self) -> HFEncoder:
        """A plain encoder of its own with the tuned weights, for everything else that an encoder is good for."""
        own = self._encoder().clone()
        own.record_step(type(self).__name__, plain(self.get_params()))
        return own

    def _keep(self, encoder: Encoder, classes: Sequence[str], state: Mapping[str, Tensor], trained: int) -> Self:
        """What `fit` learnt. state: see the class; tensors are taken to the CPU. trained: how many numbers were trained."""
        self.encoder_, self._tuned = cast(HFEncoder, encoder), None
        self.state_ = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
        self.classes_, self.trained_parameters_ = tuple(classes), trained
        self.scale_ = float(logit_scale(encoder.scale.detach(), encoder.bias, self.tau))
        self.text_ = self.class_rows(self._encoder(), classes)
        return self

    def _encoder(self) -> HFEncoder:
        """The tuned encoder, which shares unchanged weights with the frozen one: to ask, never to train."""
        if not hasattr(self, "state_"):
            raise ValueError(f"{type(self).__name__} has learnt nothing yet: call fit() first")
        if (frozen := getattr(self, "encoder_", None)) is None:
            raise ValueError(f"{type(self).__name__} needs the model it was fitted on: load(folder, encoder)")
        if self._tuned is None:
            self._tuned = with_tensors(frozen, self.state_)
        return self._tuned

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_tuned"}


def check_tunable(encoder: Encoder) -> HFEncoder:
    """The encoder, if its weights can be trained; an exported one only answers: TypeError."""
    if not isinstance(encoder, HFEncoder):
        raise TypeError(f"{type(encoder).__name__} has no layers to train: load what it was exported from")
    return encoder


def changed_tensors(before: HFEncoder, after: HFEncoder) -> dict[str, Tensor]:
    """What of `after`, parameters and buffers, differs from `before`, by name. ValueError for other architectures."""
    old, new = before.state_dict(), after.state_dict()
    differing = sorted(old.keys() ^ new.keys()) or [name for name in old if old[name].shape != new[name].shape]
    if differing:
        raise ValueError(f"the two encoders differ in architecture, first in {differing[0]}")
    return {name: value.detach().clone() for name, value in new.items() if not value.equal(old[name].to(value))}


def adapter_tensors(adapted: HFEncoder) -> dict[str, Tensor]:
    """The adapters of an encoder, as `with_tensors` takes them."""
    pairs = low_rank_additions(adapted).items()
    return {name + suffix: factor for name, pair in pairs for suffix, factor in zip((A, B), pair, strict=True)}


@torch.no_grad()
def with_tensors(encoder: HFEncoder, state: Mapping[str, Tensor]) -> HFEncoder:
    """A new encoder in which tensors are replaced or added to, see `TunedPredictor.state_`; all others are shared.

    ValueError for a name the encoder does not have, a shape that does not fit, or a factor without the other.
    """
    current = encoder.state_dict(keep_vars=True)
    fresh = {name: value.to(current[name]) for name, value in _resolved(current, state).items()}
    shared = {id(value): value for name, value in current.items() if name not in fresh}
    model = copy.deepcopy(encoder.model, shared)
    tuned = type(encoder)(model, encoder.tokenizer, encoder.transform, encoder.name, encoder.history)
    for name, value in tuned.state_dict(keep_vars=True).items():
        if name in fresh:
            value.copy_(fresh[name])
    return tuned


def _resolved(current: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Full tensors by name."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removesuffix(A).removesuffix(B)
        if name not in current:
            raise ValueError(f"there is no {name!r} in this encoder: the tensors were learnt on another architecture")
        if name in found:
            continue
        if name != key:
            if missing := {name + A, name + B} - state.keys():
                raise ValueError(f"{min(missing)!r} is missing: an addition needs both of its factors")
            value = current[name] + (state[name + B] @ state[name + A]).to(current[name])
        if value.shape != current[name].shape:
            raise ValueError(f"{name!r} is {tuple(value.shape)}, this encoder's is {tuple(current[name].shape)}")
        found[name] = value
    return found
