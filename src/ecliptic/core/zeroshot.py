"""The zero-shot head: class names become the weights of a classifier by way of prompts.

Each name is put into every template, each prompt becomes a unit embedding, their mean is made unit again: the prompt
ensemble of CLIP (arXiv 2103.00020, section 3.1.4). Everything in the toolkit that needs class embeddings uses this head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ecliptic.core.encoder import HFEncoder

TEMPLATES: dict[str, tuple[str, ...]] = {
    "plain": ("{}",),
    "photo": ("a photo of a {}.",),
    "drawing": ("a drawing of a {}.",),
    "ensemble": (  # ours: the views and media that pictures of things come in, short enough to stay cheap
        "a photo of a {}.",
        "a close-up photo of a {}.",
        "a photo of a small {}.",
        "a photo of a large {}.",
        "a photo of many {}.",
        "a drawing of a {}.",
        "a picture of the {}.",
        "this is a {}.",
    ),
}
"""Template sets by name, for `templates=` wherever it is asked for."""


def template_set(templates: str | Sequence[str]) -> tuple[str, ...]:
    """A set by its name, one template, or a sequence of them -> checked templates, each with at least one `{}`."""
    if isinstance(templates, str):
        if templates in TEMPLATES:
            return TEMPLATES[templates]
        if "{}" not in templates:
            raise ValueError(f"no template set {templates!r} (there are {', '.join(TEMPLATES)}), and it holds no {{}}")
        return (templates,)
    chosen = tuple(templates)
    if not chosen:
        raise ValueError("there are no templates: give at least one, such as 'a photo of a {}.'")
    for template in chosen:
        if not isinstance(template, str):
            raise TypeError(f"a template is text, got {template!r}")
        if not template.strip():
            raise ValueError("a template is empty: for the bare name write '{}'")
        if "{}" not in template:
            raise ValueError(f"template {template!r} has no {{}} where the class name goes")
    return chosen


def prompts(name: str, templates: str | Sequence[str] = "photo") -> list[str]:
    """The name in every template. Other braces, in names or templates, stay as they are."""
    return [template.replace("{}", name) for template in template_set(templates)]


def class_prompts(names: Sequence[str], templates: str | Sequence[str] = "photo") -> list[str]:
    """K class names in T templates -> K * T prompts, all of the first name first.

    Raises ValueError for no names, an empty name, or one that occurs twice.
    """
    if isinstance(names, str):
        raise TypeError(f"class names must be a sequence of strings, not the one string {names!r}")
    names = list(names)
    if not names:
        raise ValueError("there are no class names: at least one is needed")
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"class {i} is {name!r}: class names are text")
        if not name.strip():
            raise ValueError(f"class {i} has an empty name")
        if name.strip() in first:
            raise ValueError(f"class {name.strip()!r} occurs twice, at {first[name.strip()]} and {i}")
        first[name.strip()] = i
    chosen = template_set(templates)
    return [text for name in names for text in prompts(name.strip(), chosen)]


def zero_shot_head(
    encoder: HFEncoder,
    names: Sequence[str],
    templates: str | Sequence[str] = "photo",
    *,
    overflow: Literal["error", "truncate", "windows"] = "error",
) -> Tensor:
    """K class names -> (K, D) float32 unit rows on the CPU: mean over templates of unit prompts, made unit again.

    templates: a name in `TEMPLATES`, one template, or several. One template gives exactly the encoder's own embedding
    of that prompt. overflow: what to do with names too long for the text tower; cutting one silently would make another
    class of it, so the default is an error. Raises as `class_prompts` does.
    """
    texts = class_prompts(names, templates)
    kept = _HEADS.get()
    if kept is None:
        return mean_prompt(encoder.encode_texts(texts, overflow=overflow), len(names))
    heads = kept.setdefault(encoder, {})
    key = (_version(encoder), len(names), overflow, *texts)
    if key not in heads:
        heads[key] = mean_prompt(encoder.encode_texts(texts, overflow=overflow), len(names))
    return heads[key].clone()


_HEADS: ContextVar[WeakKeyDictionary[Any, dict[Any, Tensor]] | None] = ContextVar("heads", default=None)


@contextmanager
def keeping_heads() -> Iterator[None]:
    """While open, `zero_shot_head` encodes the same prompts once for each encoder, and again only after a weight has changed."""
    token = _HEADS.set(WeakKeyDictionary())
    try:
        yield
    finally:
        _HEADS.reset(token)


def _version(encoder: Any) -> int:
    """Grows with every write to a weight."""
    return sum(value._version for value in encoder.parameters())


def mean_prompt(embedded: Tensor, classes: int) -> Tensor:
    """Unit prompts (K * T, D), as `class_prompts` orders them, -> (K, D) unit rows: the mean of each class, made unit again."""
    grouped = embedded.reshape(classes, -1, embedded.shape[-1])
    return grouped[:, 0] if grouped.shape[1] == 1 else normalize(grouped.mean(1), dim=-1)


def zero_shot_probabilities(encoder: HFEncoder, images: Tensor, head: Tensor) -> Tensor:
    """images (N, D) and head (K, D), unit rows -> (N, K) on the CPU: softmax over classes of scaled cosines.

    SigLIP's bias is the same for every class and cancels.
    """
    with torch.inference_mode():
        logits = encoder.logits(images.to(encoder.device), head.to(encoder.device))
        found = logits.float().softmax(-1).cpu()
    return found.clone()
