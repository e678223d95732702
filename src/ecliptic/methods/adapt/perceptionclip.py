"""PerceptionCLIP: first infer the context of a picture, then name the object given that context; CLIP alone, no training.

A prompt that leaves the background unsaid lets the background vote for classes it usually comes with. A prompt that states it,
"a photo of a landbird, on water.", explains it away: all classes get it, and what is left to compare is the object. The
context is not known, so CLIP is asked for a distribution over it, and the answers under each context are averaged.

`PerceptionClip` does the whole; `context_with_classes`, `context_without_classes` and `classify` are its equations on plain
scores. `conditioned`, `wrong_context` and `random_letters` are the diagnostics that tell context from mere words.
"""

from __future__ import annotations

import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal, NamedTuple, Self, cast

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ecliptic.core.contracts import Pairs, Prediction, Predictor, Record
from ecliptic.core.encoder import Encoder, HFEncoder
from ecliptic.core.method import Paper, method
from ecliptic.core.progress import Progress
from ecliptic.core.zeroshot import class_prompts, mean_prompt
from ecliptic.data.shots import check_labels, encode_views, labels_of, tiny_records
from ecliptic.eval.groups import group_accuracy

Factors = Mapping[str, Mapping[str, Sequence[str]]]
"""Factor -> value -> its synonyms, phrases that can follow the class after a comma; "" leaves the factor unsaid."""

GRID = (0.5, 0.8, 1.0, 3.0, 5.0, 10.0)  # temperatures tried on Waterbirds and CelebA; on ImageNet without the first two
SENTENCES = 4096  # prompts encoded at a time; ours
SCORES = 1 << 24  # scores held at a time, pictures * classes * contexts; ours

FACTORS: dict[str, dict[str, list[str]]] = {
    "background": {  # the values of the paper's complex Waterbirds set; wording ours
        "unspecified": [""],
        "land": ["on land"],
        "water": ["on water"],
        "forest": ["in a forest"],
        "sky": ["in the sky"],
        "street": ["on a street"],
        "grass": ["on grass"],
        "tree": ["on a tree"],
        "flowers": ["among flowers"],
        "beach": ["on a beach"],
        "human": ["with a person"],
        "branch": ["on a branch"],
    },
    "orientation": {  # factors of the paper's ImageNet set; values and wording from here on ours
        "upright": ["", "upright"],
        "upside down": ["upside down", "turned on its head"],
        "turned": ["turned on its side", "rotated"],
    },
    "illumination": {
        "unspecified": [""],
        "bright": ["in bright light", "brightly lit"],
        "dark": ["in the dark", "dimly lit"],
    },
    "quality": {
        "unspecified": [""],
        "good": ["of good quality", "in sharp focus"],
        "bad": ["of bad quality", "blurred"],
    },
    "medium": {
        "photo": [""],
        "drawing": ["drawn by hand", "as a sketch"],
        "art": ["as a painting", "as a sculpture"],
        "toy": ["as a toy", "made of plastic"],
    },
}
"""Contexts that pictures often differ in, to pick from: `factors={"background": FACTORS["background"]}`."""


class Context(NamedTuple):
    """One value of each factor, as `names` in the order of the factors, and every way to say them together."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]


class Perception(NamedTuple):
    """classes (B, K): p(y | x), and context (B, Z): p(z | x); each row sums to 1."""

    classes: Tensor
    context: Tensor


class Temperature(NamedTuple):
    """The best of a grid, and what each reached."""

    value: float
    accuracy: dict[float, float]


@method(
    Paper(
        "More Context, Less Distraction: Visual Classification by Inferring and Conditioning on Contextual Attributes",
        arxiv="2308.01313",
        year=2023,
    ),
    purpose="name pictures less by their surroundings and more by the object, from prompts alone, without training",
    claim="in a model with a background shortcut, conditioning on the inferred background raises the accuracy of the worst "
    "group far above plain prompts and a prompt ensemble; wrong or meaningless context does not",
)
@dataclass(eq=False)
class PerceptionClip(Predictor):
    """Two-step zero-shot classification. `fit` encodes prompts, and opens no picture but to choose a temperature.

    With no factors, or with the single value "", it is plain zero-shot classification, at every temperature. Give a factor
    an empty value ("unspecified") unless one of the others holds of every picture: whoever must choose a wrong context is
    hurt by it. The number of prompts is classes * contexts * synonyms.
    """

    classes: tuple[str, ...] | None = None  # names in the order wanted; None: the labels found, sorted
    factors: Factors = field(default_factory=dict)
    template: str = "a photo of a {}"  # no full stop: descriptions follow, then it is added
    infer: Literal["with_y", "without_y"] = "with_y"  # the paper's ClassAttr, its default, and PureAttr
    temperature: float | None = 1.0  # of the context; above 1 flatter, below 1 sharper. None: the best of `grid`
    grid: tuple[float, ...] = GRID
    generic: str = "object"  # stands for the class where the context is inferred without it: "bird", "celebrity"

    def fit(self, encoder: Encoder, pairs: Pairs = (), validation: Pairs | None = None) -> Self:
        """Encode the prompts. `pairs` give the class names where `classes` is None, and are else not looked at.

        validation: labelled records to choose the temperature on, with temperature=None; never those it is to be judged by.
        Raises ValueError for malformed factors or templates, TextTooLong for a prompt that the text tower cannot read whole.
        """
        check_template(self.template)
        contexts = compose(self.factors)
        if self.infer not in ("with_y", "without_y"):
            raise ValueError(f"infer must be 'with_y' or 'without_y', not {self.infer!r}")
        for value in (1.0 if self.temperature is None else self.temperature, *self.grid):
            _check_temperature(value)
        if (self.temperature is None) != (validation is not None):
            raise ValueError("temperature=None is chosen on validation=, labelled records: give both or neither")
        names = labels_of(pairs)[0] if self.classes is None else tuple(self.classes)
        tower = cast(HFEncoder, encoder)
        text = context_embeddings(tower, names, contexts, self.template)
        self.classes_, self.contexts_ = names, tuple(context.names for context in contexts)
        self.text_ = text
        self.generic_text_ = context_embeddings(tower, (self.generic,), contexts, self.template)[0]
        self.scale_ = tower.scale.detach().float().cpu().clone()
        self.encoder_ = encoder
        self.validation_accuracy_: dict[float, float] = {}
        if validation is None:
            self.temperature_ = float(cast(float, self.temperature))
        else:
            truth = labels_of(validation, names)[1]
            check_labels(truth, len(truth), names, every_class=False)
            found = self.select(encode_views(encoder, validation)[0], truth)
            self.temperature_, self.validation_accuracy_ = found.value, found.accuracy
        return self

    @torch.no_grad()
    def predict(self, pixels: Tensor) -> Prediction:
        """Pixels (B, 3, H, W), as `encoder.preprocess` gives them -> p(y | x) (B, K) as scores, and labels."""
        return self.predict_features(self._features(pixels))

    @torch.no_grad()
    def predict_features(self, features: Tensor) -> Prediction:
        """The same from unit features (B, d)."""
        return self._answer(self.perceive_features(features).classes)

    @torch.no_grad()
    def perceive(self, pixels: Tensor) -> Perception:
        """Pixels (B, 3, H, W) -> p(y | x) (B, K) and p(z | x) (B, Z), Z in the order of `contexts_`."""
        return self.perceive_features(self._features(pixels))

    @torch.no_grad()
    def perceive_features(self, features: Tensor) -> Perception:
        """The same from unit features (B, d)."""
        parts = []
        for some in self._chunks(features):
            classes, context = self._logs(some, self.temperature_)
            parts.append(Perception(classes.exp(), context.exp()))
        return Perception(*(torch.cat(rows) for rows in zip(*parts, strict=True)))

    @torch.no_grad()
    def predict_given(self, features: Tensor, context: Tensor) -> Prediction:
        """p(y | x, z) of unit features (B, d) for given contexts (B,) int64, positions in `contexts_`."""
        rows = zip(self._chunks(features), context.split(self._rows), strict=True)  # type: ignore[no-untyped-call]
        return self._answer(torch.cat([conditioned(self._scores(some), given) for some, given in rows]).exp())

    @torch.no_grad()
    def predict_ensemble(self, features: Tensor) -> Prediction:
        """The one-step baseline: each class's embeddings averaged over all contexts, then one softmax."""
        head = mean_prompt(self.text_.flatten(0, 1), len(self.classes_))
        return self._answer((self.scale_ * features.float().cpu() @ head.T).softmax(-1))

    @torch.no_grad()
    def select(
        self,
        features: Tensor,
        labels: Tensor,
        attribute: Sequence[str] | Tensor | None = None,
        grid: Sequence[float] | None = None,
    ) -> Temperature:
        """The temperature of the grid that serves these validation pictures best: features (N, d), labels (N,) int64.

        attribute (N,): then the accuracy of the worst group (attribute, class) decides instead of the average. Of equals the
        first of the grid is taken. Nothing is changed: set `temperature` and fit again, or assign `temperature_`.
        """
        accuracy = {}
        for value in self.grid if grid is None else grid:
            _check_temperature(value)
            rows = [self._logs(some, value)[0] for some in self._chunks(features)]
            hits = (torch.cat(rows).argmax(-1) == labels.cpu()).double()
            if attribute is None:
                accuracy[float(value)] = float(hits.mean())
            else:
                accuracy[float(value)] = group_accuracy(hits.numpy(), attribute, labels.tolist()).worst  # type: ignore[arg-type]
        return Temperature(max(accuracy, key=lambda value: accuracy[value]), accuracy)

    def _features(self, pixels: Tensor) -> Tensor:
        if (encoder := getattr(self, "encoder_", None)) is None:
            raise ValueError("no encoder here: call fit(encoder, pairs) first")
        return encoder.images(pixels).pooled.float().cpu()  # type: ignore[no-any-return]

    @property
    def _rows(self) -> int:
        """Pictures whose scores are held at a time."""
        return max(1, SCORES // (len(self.classes_) * len(self.contexts_)))

    def _chunks(self, features: Tensor) -> tuple[Tensor, ...]:
        if not hasattr(self, "text_"):
            raise ValueError(f"{type(self).__name__} has no prompts yet: call fit() first")
        if features.ndim != 2 or features.shape[1] != self.text_.shape[-1]:
            raise ValueError(f"features must be (B, {self.text_.shape[-1]}), got {tuple(features.shape)}")
        return features.float().cpu().split(self._rows)  # type: ignore[no-any-return, no-untyped-call]

    def _scores(self, features: Tensor) -> Tensor:
        """(B, d) -> (B, K, Z): scale * cosine. SigLIP's bias is the same everywhere and cancels in every softmax."""
        return self.scale_ * torch.einsum("bd,kzd->bkz", features, self.text_)

    def _logs(self, features: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """(B, d) -> log p(y | x) (B, K) and log p(z | x) (B, Z)."""
        scores = self._scores(features)
        if self.infer == "with_y":
            context = context_with_classes(scores, temperature)
        else:
            context = context_without_classes(self.scale_ * features @ self.generic_text_.T, temperature)
        return classify(scores, context), context

    def _answer(self, probabilities: Tensor) -> Prediction:
        labels = [self.classes_[k] for k in probabilities.argmax(-1).tolist()]
        return Prediction(scores=probabilities, labels=labels, classes=self.classes_)

    @classmethod
    def tiny(cls) -> tuple[PerceptionClip, list[Record]]:
        factors = {
            "place": {"unspecified": [""], "mat": ["on a mat", "on mats"]},
            "size": {"": [""], "small": ["small"]},
        }
        return cls(factors=factors, temperature=3.0), tiny_records()


# The equations, on scores f(y, z; x) = scale * cos(x, T_yz)


def context_with_classes(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """scores (B, K, Z) -> log p(z | x) (B, Z) with the classes summed over, "ClassAttr":

    p(z | x) = sum_y exp(f(y, z; x) / t) / sum_z sum_y exp(f(y, z; x) / t).
    """
    return log_softmax((scores / temperature).logsumexp(1), dim=-1)


def context_without_classes(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """scores (B, Z) of prompts with a generic noun -> log p(z | x) (B, Z), "PureAttr": log softmax_z(f(z; x) / t)."""
    return log_softmax(scores / temperature, dim=-1)


def classify(scores: Tensor, log_context: Tensor) -> Tensor:
    """scores (B, K, Z), log p(z | x) (B, Z) -> log p(y | x) (B, K), p(y | x) = sum_z p(z | x) softmax_y f(y, z; x).

    The temperature has no part in it. With `context_with_classes` at temperature 1 this is the marginal of one softmax over
    all K * Z prompts.
    """
    return (log_softmax(scores, dim=1) + log_context[:, None]).logsumexp(-1)


def conditioned(scores: Tensor, context: Tensor) -> Tensor:
    """scores (B, K, Z), one context each (B,) int64 -> log p(y | x, z) (B, K): the true one, or any other, for diagnosis."""
    if context.shape != scores.shape[:1] or context.is_floating_point():
        raise ValueError(f"context must be ({len(scores)},) integers, got {tuple(context.shape)} {context.dtype}")
    if len(context) and not 0 <= int(context.min()) <= int(context.max()) < scores.shape[-1]:
        raise ValueError(f"context must lie in 0..{scores.shape[-1] - 1}")
    picked = context.to(scores.device)[:, None, None].expand(-1, scores.shape[1], 1)
    return log_softmax(scores.gather(-1, picked)[..., 0], dim=-1)


# Words


def compose(factors: Factors) -> tuple[Context, ...]:
    """Every combination of one value of each factor, the last factor varying fastest; without factors the empty context.

    The descriptions of a combination are all combinations of its values' synonyms, joined by ", " in the order of the
    factors, which changes the sentence and so the embedding. ValueError names a malformed factor.
    """
    if not isinstance(factors, Mapping):
        raise ValueError(f"factors must map factor -> value -> synonyms, got a {type(factors).__name__}")
    for factor, values in factors.items():
        if not isinstance(values, Mapping) or not values:
            raise ValueError(
                f"factor {factor!r} must map one or more values to their synonyms, like {{'land': ['on land']}}"
            )
        for value, synonyms in values.items():
            if isinstance(synonyms, str) or not len(synonyms):
                raise ValueError(f"{factor} {value!r}: give a list of one or more synonyms, not {synonyms!r}")
            for phrase in synonyms:
                if not isinstance(phrase, str) or phrase != phrase.strip() or phrase.endswith((".", ",")):
                    raise ValueError(
                        f"{factor} {value!r}: {phrase!r} must be bare text, without spaces or stops around it"
                    )
    found = []
    for chosen in product(*(values.items() for values in factors.values())):
        phrases = product(*(synonyms for _, synonyms in chosen))
        descriptions = tuple(", ".join(filter(None, said)) for said in phrases)
        found.append(Context(tuple(str(value) for value, _ in chosen), descriptions))
    return tuple(found)


def sentence(template: str, name: str, description: str) -> str:
    """ "a photo of a duck, on water.", or, where the description is empty, "a photo of a duck." """
    return ", ".join(filter(None, (template.replace("{}", name), description))) + "."


def context_embeddings(
    encoder: HFEncoder, names: Sequence[str], contexts: Sequence[Context], template: str = "a photo of a {}"
) -> Tensor:
    """K class names in Z contexts -> (K, Z, D) float32 unit rows on the CPU.

    Each is the mean over the context's synonyms of unit prompts, made unit again. ValueError for malformed names.
    """
    check_template(template)
    class_prompts(names, template)  # for its checks of the names
    spoken = [description for context in contexts for description in context.descriptions]
    counts = [len(context.descriptions) for context in contexts]
    step = max(1, SENTENCES // len(spoken))
    parts = []
    with Progress("encoding prompts", len(names) * len(spoken), unit="prompts") as bar:
        for start in range(0, len(names), step):
            some = [name.strip() for name in names[start : start + step]]
            texts = [sentence(template, name, description) for name in some for description in spoken]
            rows = encoder.encode_texts(texts, overflow="error").reshape(len(some), len(spoken), -1)
            said = [mean_prompt(part.flatten(0, 1), len(some)) for part in rows.split(counts, dim=1)]  # type: ignore[no-untyped-call]
            parts.append(torch.stack(said, dim=1))
            bar.advance(len(texts))
    return torch.cat(parts)


def check_template(template: str) -> None:
    """Raise a ValueError unless a description can follow this template."""
    if not isinstance(template, str) or "{}" not in template:
        raise ValueError(f"template {template!r} has no {{}} where the class name goes")
    if template.rstrip().endswith("."):
        raise ValueError(f"template {template!r} ends in a full stop: leave it out, descriptions follow")


# Diagnostics


def random_letters(factors: Factors, seed: int = 0) -> dict[str, dict[str, list[str]]]:
    """The same factors with every word replaced by random lower-case letters of its length; empty phrases stay empty.

    What changes with them as with the true words is not owed to their meaning.
    """
    draw = random.Random(seed)

    def scrambled(phrase: str) -> str:
        return " ".join("".join(draw.choices(string.ascii_lowercase, k=len(word))) for word in phrase.split())

    return {
        factor: {value: [scrambled(phrase) for phrase in synonyms] for value, synonyms in values.items()}
        for factor, values in factors.items()
    }


def wrong_context(context: Tensor, contexts: int, seed: int = 0) -> Tensor:
    """(N,) int64 positions among `contexts` -> (N,) others, each drawn uniformly from those that differ."""
    if contexts < 2:
        raise ValueError("there is only one context: none of them is wrong")
    generator = torch.Generator().manual_seed(seed)
    return (context + torch.randint(1, contexts, context.shape, generator=generator)) % contexts


def _check_temperature(value: float) -> None:
    if not value > 0:
        raise ValueError(f"temperature={value}: scores are divided by it, so it must be positive")
