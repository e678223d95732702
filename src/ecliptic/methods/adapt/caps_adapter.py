"""CapS-Adapter: a support set made from captions of target pictures, used as pictures and as text, without training.

Cache methods vote with support pictures that resemble the picture at hand. Pictures generated from class names alone miss the
look of the target data. Here a captioner describes a few target pictures of each class, a generator draws new ones from "class +
caption", and both the drawn picture and the caption become keys: votes weigh the similarity to either, (1 - delta) to delta.

`class_captions` and `build_support` make the support from any captioner and generator, `CapsAdapter.fit_support` learns from
it; `CapsAdapter.fit` is the few-shot variant, whose support are the labelled pictures themselves with their own captions. The
equations are in `ecliptic.ops.support_cache`.

What the paper calls zero-shot sees labels all the same: a few target pictures of each class are captioned, and four weights are
chosen on labelled validation pictures. Without such pictures, `LABEL_FREE` weights are used (ours). Uncertain: how many pictures
each data set generates, and whether the released code means to compare softmaxes over feature coordinates (`kl_space`). The
released divergence leaves the last rows of a split at 0, and rescales by the batch at hand; here every row is computed, and the
ranges are frozen where the weights are chosen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ecliptic.core.contracts import Pairs, Record
from ecliptic.core.encoder import Encoder, TruncationWarning
from ecliptic.core.method import Paper, method
from ecliptic.core.progress import Progress
from ecliptic.core.support_predictor import SupportPredictor, check_weights, grid_named
from ecliptic.core.zeroshot import template_set, zero_shot_head
from ecliptic.data.images import ImageError, open_image
from ecliptic.data.records import unit_hash
from ecliptic.data.shot_tensors import check_shots, check_unit_rows
from ecliptic.data.shots import check_classes, encode_shots, encode_views, folds_of, labels_of, tiny_records
from ecliptic.ops.cache_model import cache_keys
from ecliptic.ops.support_cache import LABEL_FREE, TEMPERATURE, KlSpace, Support

Captioner = Callable[[Image.Image], str]
Generator = Callable[[str, int], "Image.Image | str | Path"]
"""(prompt, seed) -> a picture, or the path of one; another seed gives another picture of the same prompt."""

PROMPT = "A photo of {}. "  # released `generate_caps.py`; "In {}. " for the countries of country211
N_PER_CLASS = 10  # default of the released encoding script; the paper's value for each data set is uncertain
DARK = 5.0  # of 255; a picture with a lower mean is rejected, released `generate_caps.py`
ATTEMPTS = 10  # pictures drawn before giving up on one; ours


@method(
    Paper("CapS-Adapter: Caption-based MultiModal Adapter in Zero-Shot Classification", arxiv="2405.16591", year=2024),
    purpose="name pictures better by generated pictures that look like captions of the target data, without training",
    claim="a support drawn from captions of target pictures beats zero-shot and a support drawn from class names, whose votes "
    "gain nothing where the target's style is one that the names do not say; what caption keys add is reported",
)
@dataclass(eq=False)
class CapsAdapter(SupportPredictor):
    """Few labelled pictures (`fit`), or a generated support (`fit_support`). Weights left at None are chosen.

    The key of a caption is the embedding of `prompt` with the class name, then the record's `caption`; without one, of the
    prompt alone. What exceeds the text tower's length is cut, as in the paper.
    """

    classes: tuple[str, ...] | None = None  # names in the order wanted; None: the labels found, sorted
    templates: str | tuple[str, ...] = "photo"  # as `core.zeroshot.zero_shot_head` takes them; the paper: LLM sentences
    prompt: str = PROMPT
    alpha: float | None = None
    beta: float | None = None
    gamma: float | None = None  # 0: the variant without divergence
    delta: float | None = None  # 0: picture keys alone (TIP-X); 1: caption keys alone
    grid: Literal["coarse", "paper"] = "coarse"  # "paper" has 2.2 million combinations
    temp: float = TEMPERATURE
    kl_space: KlSpace = "class"  # "feature": as released
    normalise_modalities: bool = False  # bring both kinds of cosines to one range, for SigLIP-like towers
    views: int = 10  # augmented views averaged into the key of a real picture (Tip-Adapter); 0: the picture as it is
    folds: int = 4  # parts for cross-validation over real shots, without validation; 0: label-free weights; ours
    seed: int = 0

    def fit(self, encoder: Encoder, pairs: Pairs, validation: Pairs | None = None) -> Self:
        """The few-shot variant: records with `image`, `label` and, if they have one, `caption` are the support.

        Weights are chosen on `validation`, or by cross-validation over the shots.
        """
        self._check_settings()
        found = encode_shots(encoder, pairs, validation, classes=self.classes, views=self.views, seed=self.seed)
        prompts = _own_prompts(pairs, [found.classes[k] for k in found.labels.tolist()], self.prompt)
        self.fit_features(
            found.features,
            found.labels,
            zero_shot_head(encoder, found.classes, self.templates),  # type: ignore[arg-type]
            captions=_caption_keys(encoder, prompts),
            views=found.views,
            validation=found.validation,
            classes=found.classes,
            scale=encoder.scale,
            logit_bias=encoder.bias,
        )
        self.encoder_ = encoder
        return self

    def fit_support(self, encoder: Encoder, support: Support, validation: Pairs | None = None) -> Self:
        """Learn from a support as `build_support` gives it; weights chosen on labelled `validation`, else `LABEL_FREE`."""
        self._check_settings()
        if not support.classes:
            raise ValueError("the support has no class names: Support(..., classes=names)")
        truth = None if validation is None else labels_of(validation, support.classes)[1]
        text = zero_shot_head(encoder, support.classes, self.templates)  # type: ignore[arg-type]
        check_shots(support.image_keys, support.labels, text, classes=support.classes)
        if support.caption_keys is not None:
            check_unit_rows("caption_keys", support.caption_keys, support.image_keys.shape)
        held = None
        if validation is not None and truth is not None:
            held = encode_views(encoder, validation)[0], truth
        self._learn(support, text, held, encoder.scale, encoder.bias)
        self.encoder_ = encoder
        return self

    @torch.no_grad()
    def fit_features(
        self,
        features: Tensor,
        labels: Tensor,
        text: Tensor,
        *,
        captions: Tensor | None = None,
        views: Tensor | None = None,
        validation: tuple[Tensor, Tensor] | None = None,
        classes: Sequence[str] | None = None,
        scale: Tensor | float = 100.0,
        logit_bias: Tensor | float | None = None,
    ) -> Self:
        """`fit` from tensors: features (N, D), labels (N,) int64, text (K, D), captions (N, D), unit rows.

        views (V, N, D): augmented views of the same pictures, averaged into their keys. validation: features and labels.
        classes: names, by default "0", "1" ... Without captions delta is 0.
        """
        self._check_settings()
        names = check_shots(features, labels, text, views=views, validation=validation, classes=classes)
        if captions is not None:
            check_unit_rows("captions", captions, features.shape)
        keys = features if views is None else cache_keys(views)
        support = Support(keys, labels, captions, names)
        self._learn(support, text, validation, scale, logit_bias, queries=features)
        return self

    @torch.no_grad()
    def _learn(
        self,
        support: Support,
        text: Tensor,
        validation: tuple[Tensor, Tensor] | None,
        scale: Tensor | float,
        logit_bias: Tensor | float | None,
        queries: Tensor | None = None,
    ) -> None:
        if support.caption_keys is None and self.delta:
            raise ValueError(f"delta={self.delta} mixes caption keys in, but there are none: give captions, or delta=0")
        given = {"alpha": self.alpha, "beta": self.beta, "gamma": self.gamma, "delta": self.delta}
        self._keep(support.classes, support, text, scale, logit_bias)
        fold = folds_of(support.labels, self.folds, self.seed)
        default = LABEL_FREE if support.caption_keys is not None else LABEL_FREE._replace(delta=0.0)
        default = default.given(**given)
        self._choose(grid_named(self.grid).fixed(**given), default, validation, queries, fold)

    def _check_settings(self) -> None:
        template_set(self.templates)
        grid_named(self.grid)
        check_weights(self.alpha, self.beta, self.gamma, self.delta)
        _check_prompt(self.prompt)
        if not self.temp > 0:
            raise ValueError(f"temp={self.temp}: cosines are divided by it, so it must be positive")
        if self.kl_space not in ("class", "feature"):
            raise ValueError(f"kl_space={self.kl_space!r}: choose 'class' or 'feature'")
        if self.folds < 0:
            raise ValueError(f"folds={self.folds}: 2 or more parts, or 0 for label-free weights")

    @classmethod
    def tiny(cls) -> tuple[CapsAdapter, list[Record]]:
        return cls(views=2), tiny_records()


# The support


def class_captions(
    pairs: Pairs,
    captioner: Captioner | None = None,
    per_class: int | None = None,
    *,
    classes: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, list[str]]:
    """Captions of a few target pictures of each class: {class: captions}, in the order of the records.

    captioner: a picture -> what it shows; None takes the records' own `caption`. per_class: how many pictures of each class
    are drawn by (seed, record id); None for all. ValueError for a class without pictures or a record without a caption.
    """
    if per_class is not None and per_class < 1:
        raise ValueError(f"per_class={per_class}: at least one picture of each class must be captioned")
    names, labels = labels_of(pairs, classes)
    check_classes(names)
    ids = pairs.column("id") if hasattr(pairs, "column") else [r.get("id", i) for i, r in enumerate(pairs)]
    chosen: set[int] = set()
    for k, name in enumerate(names):
        rows = (labels == k).nonzero()[:, 0].tolist()
        if not rows:
            raise ValueError(f"no pictures of {name!r} to caption: every class needs one")
        chosen |= set(sorted(rows, key=lambda i: unit_hash(seed, str(ids[i])))[:per_class])
    found: dict[str, list[str]] = {name: [] for name in names}
    indexed: Any = pairs
    rows = sorted(chosen)
    some = indexed[rows] if hasattr(pairs, "column") else [r for i, r in enumerate(pairs) if i in chosen]
    for i, record in zip(rows, some.undecoded() if captioner is None and hasattr(some, "undecoded") else some):
        if captioner is None and not record.get("caption"):
            raise ValueError(f"record {ids[i]!r} has no caption: give captioner=, or records with `caption`")
        said = record["caption"] if captioner is None else captioner(_opened(record["image"]))
        found[names[int(labels[i])]].append(str(said))
    return found


@torch.no_grad()
def build_support(
    captions_by_class: Mapping[str, Sequence[str]],
    generator: Generator,
    encoder: Encoder,
    *,
    n: int = N_PER_CLASS,
    prompt: str = PROMPT,
    dark: float = DARK,
    seed: int = 0,
) -> Support:
    """`n` generated pictures of each class with their captions, as keys: equations 1-3 of the method.

    The prompt of a picture is `prompt` with the class name, then a caption; captions are shuffled and used in turn. A class with
    no captions gets the prompt alone, which is the support of SuS-X. A picture that cannot be opened or whose mean is below
    `dark` (of 255) is drawn again with the next caption and another seed; ValueError after `ATTEMPTS`.
    """
    check_classes(tuple(captions_by_class))
    _check_prompt(prompt)
    if n < 1:
        raise ValueError(f"n={n}: at least one picture of each class must be generated")
    kept: list[str] = []

    def pictures() -> Iterator[Image.Image]:
        for name, captions in captions_by_class.items():
            prompts = _in_turn(name, captions, prompt, seed)
            for i in range(n):
                picture, said = _accepted(name, i, prompts, generator, dark, seed)
                kept.append(said)
                yield picture

    tower: Any = encoder
    with Progress("generating", n * len(captions_by_class), unit="pictures") as bar:
        image_keys = tower.encode_images(pictures(), progress=bar.advance)
    labels = torch.arange(len(captions_by_class)).repeat_interleave(n)
    return Support(image_keys, labels, _caption_keys(encoder, kept), tuple(captions_by_class))


def captioned_prompt(name: str, caption: str | None = None, prompt: str = PROMPT) -> str:
    """The class name in the prompt, then the caption: "A photo of cup. A white cup on a table." """
    return (prompt.replace("{}", name) + (caption or "")).strip()


def is_dark(image: Image.Image, threshold: float = DARK) -> bool:
    """Whether the mean over pixels and channels is below the threshold (of 255): a generator's safety filter paints black."""
    return float(np.asarray(image.convert("RGB"), dtype=np.float64).mean()) < threshold


def _in_turn(name: str, captions: Sequence[str], prompt: str, seed: int) -> Iterator[str]:
    order = sorted(range(len(captions)), key=lambda i: unit_hash(seed, f"{name}/{i}"))
    prompts = [captioned_prompt(name, captions[i], prompt) for i in order] or [captioned_prompt(name, None, prompt)]
    while True:
        yield from prompts


def _accepted(
    name: str, i: int, prompts: Iterator[str], generator: Generator, dark: float, seed: int
) -> tuple[Image.Image, str]:
    """The first picture that is whole and not black, with its prompt."""
    reason = ""
    for attempt in range(ATTEMPTS):
        said = next(prompts)
        try:
            picture = _opened(generator(said, int(unit_hash(seed, f"{name}/{i}/{attempt}") * 2**31)))
        except ImageError as error:
            reason = str(error)
            continue
        if not is_dark(picture, dark):
            return picture, said
        reason = f"its mean is below {dark:g} of 255"
    raise ValueError(f"the generator gave no usable picture of {name!r} in {ATTEMPTS} attempts, the last: {reason}")


def _opened(image: Any) -> Image.Image:
    return image if isinstance(image, Image.Image) else open_image(image)


def _own_prompts(pairs: Pairs, names: Sequence[str], prompt: str) -> list[str]:
    """The captioned prompt of each record, whose class names are given; opens no picture."""
    cheap: Any = pairs.undecoded() if hasattr(pairs, "undecoded") else pairs
    return [captioned_prompt(name, record.get("caption"), prompt) for name, record in zip(names, cheap, strict=True)]


def _caption_keys(encoder: Any, prompts: Sequence[str]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # cutting is what the paper does
        keys: Tensor = encoder.encode_texts(prompts)
    return keys


def _check_prompt(prompt: str) -> None:
    if "{}" not in prompt:
        raise ValueError(f"prompt={prompt!r} has no {{}} where the class name goes")
