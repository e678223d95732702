"""Learning to classify by prompts: the loss that few-shot methods share, with the text tower inside the graph.

`PromptClassifier` is cross-entropy over class prompts that are encoded anew in every step, so that whatever is trained, in
either tower, is felt. `LearntContext` trains words of the prompt instead of the towers (CoOp).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.checkpoint import checkpoint

from ecliptic.core.contracts import Features, Objective, Tokens, Views
from ecliptic.core.encoder import Encoder, HFEncoder
from ecliptic.core.prompting import text_from_embeddings, token_embeddings, with_context
from ecliptic.core.zeroshot import class_prompts, mean_prompt

CLIP_SCALE = 100.0  # 1 / temperature of every released CLIP; arXiv 2103.00020, section 2.5, clips it there
DRAWN = 16  # context vectors where none are given; arXiv 2109.01134, section 4.1
CHUNK = 256  # prompts encoded at a time where gradients are wanted; ours


@dataclass(frozen=True)
class PromptClassifier(Objective):
    """Cross-entropy over all classes of tau * cos(picture, class), in nats, >= 0; reads `label`, a name in `classes`.

    tau: None for CLIP's 100, or, for a model with a logit bias (SigLIP), its own scale; the bias is the same for every class
    and cancels in the softmax. chunk: prompts beyond this many are encoded in chunks of it, each once more in the backward
    pass, so that memory hardly grows with the number of classes.
    """

    classes: tuple[str, ...]
    templates: str | tuple[str, ...] = "photo"
    tau: float | None = None
    chunk: int = CHUNK

    needs: ClassVar[frozenset[str]] = frozenset({"image"})
    fields: ClassVar[tuple[str, ...]] = ("label",)

    def __post_init__(self) -> None:
        _check(self.classes, self.templates, self.tau, self.chunk)

    def bind(self, encoder: Encoder) -> PromptClassifier:
        """The same with its prompts in tokens. Raises TextTooLong for a name that the text tower cannot read whole."""
        tokens = encoder.tokenize(class_prompts(self.classes, self.templates), overflow="error")
        return _Bound(**{item.name: getattr(self, item.name) for item in fields(self)}, tokens=tokens)

    def encode(self, encoder: Encoder, batch: Mapping[str, Any]) -> Views:
        return self.bind(encoder).encode(encoder, batch)

    def terms(self, views: Views) -> dict[str, Tensor]:
        return {"cross_entropy": classification_loss(views, self.tau)}


@dataclass(frozen=True)
class _Bound(PromptClassifier):
    tokens: Tokens = None  # type: ignore[assignment]  # always given; fields with defaults come before it

    def bind(self, encoder: Encoder) -> PromptClassifier:
        return self

    def encode(self, encoder: Encoder, batch: Mapping[str, Any]) -> Views:
        rows = in_chunks(lambda tokens: encoder.texts(tokens).pooled, self.tokens, self.chunk)
        return labelled_views(encoder, batch, mean_prompt(rows, len(self.classes)), self.classes)


class LearntContext(nn.Module, Objective):
    """CoOp (arXiv 2109.01134): the same loss, where all that is learnt are `count` vectors in front of every class name.

    They are shared by all classes, so `head` makes a classifier for names never trained on, too. Towers stay as they are with
    `Train(LearntContext(classes), trainable=NOTHING).run(encoder, shots).objective`.

    start: words whose embeddings the context starts from; None draws it from N(0, 0.02^2) by `seed`. Both, and the four
    words, as in section 3.1 and the released configs.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"image"})
    fields: ClassVar[tuple[str, ...]] = ("label",)
    context: nn.Parameter  # (count, width), made by `bind`
    _tokens: Tokens

    def __init__(
        self,
        classes: Sequence[str],
        count: int = 4,
        start: str | None = "a photo of a",
        template: str = "{}.",
        tau: float | None = None,
        chunk: int = CHUNK,
        seed: int = 0,
    ):
        super().__init__()
        _check(classes, template, tau, chunk)
        if count < 1:
            raise ValueError(f"count={count}: there must be at least one context vector")
        self.classes, self.count, self.start, self.template = tuple(classes), count, start, template
        self.tau, self.chunk, self.seed = tau, chunk, seed

    def bind(self, encoder: Encoder) -> LearntContext:
        """The same with its context at the start, for this encoder. ValueError if `start` has another number of tokens."""
        tower = cast(HFEncoder, encoder)
        bound = LearntContext(self.classes, self.count, self.start, self.template, self.tau, self.chunk, self.seed)
        bound.context = nn.Parameter(first_context(tower, self.start, self.count, self.seed))
        bound._tokens = tower.tokenize(class_prompts(self.classes, self.template), overflow="error")
        return bound

    def encode(self, encoder: Encoder, batch: Mapping[str, Any]) -> Views:
        rows = class_rows(cast(HFEncoder, encoder), self.context, self._tokens, self.chunk)
        return labelled_views(encoder, batch, mean_prompt(rows, len(self.classes)), self.classes)

    def terms(self, views: Views) -> dict[str, Tensor]:
        return {"cross_entropy": classification_loss(views, self.tau)}

    @torch.no_grad()
    def head(self, encoder: HFEncoder, names: Sequence[str]) -> Tensor:
        """K class names, trained on or not, -> (K, D) float32 unit rows on the CPU, as `zero_shot_head` gives them."""
        tokens = encoder.tokenize(class_prompts(names, self.template), overflow="error")
        return class_rows(encoder, self.context, tokens, self.chunk).float().cpu()


@torch.no_grad()
def first_context(encoder: HFEncoder, start: str | None, count: int | None = None, seed: int = 0) -> Tensor:
    """(count, W): the token embeddings of the words `start`, or, where that is None, draws from N(0, 0.02^2) by `seed`.

    count: None takes as many as there are words, or 16 (arXiv 2109.01134, section 4.1). ValueError if both are given and differ.
    """
    if count is not None and count < 1:
        raise ValueError(f"count={count}: there must be at least one context vector")
    if start is None:
        width = cast(nn.Embedding, encoder.anatomy.text.table).embedding_dim
        drawn = torch.randn(DRAWN if count is None else count, width, generator=torch.Generator().manual_seed(seed))
        return 0.02 * drawn
    tokens = encoder.tokenize([start], overflow="error")
    special = set(encoder.tokenizer.all_special_ids)
    words = [i for i, token in enumerate(tokens.ids[0].tolist()) if token not in special]
    if count is not None and len(words) != count:
        raise ValueError(f"start={start!r} has {len(words)} tokens, count is {count}: make them agree")
    return token_embeddings(encoder, tokens)[0, words].clone()


def class_rows(encoder: HFEncoder, context: Tensor, tokens: Tokens, chunk: int = CHUNK) -> Tensor:
    """Class names as tokens (K, L) -> unit rows (K, D), `context` (M, W) in front of each. Gradients flow into the context."""
    return in_chunks(
        lambda part: text_from_embeddings(encoder, *with_context(encoder, context, part)).pooled, tokens, chunk
    )


NOTHING = r"(?!)"
"""For `trainable=`: the pattern that no name matches, where only the objective learns."""


def labelled_views(encoder: Encoder, batch: Mapping[str, Any], classes: Tensor, names: Sequence[str]) -> Views:
    """Views of a batch with `image` and `label`, and the embeddings of the classes (K, D), in the order of `names`.

    Several processes gather what belongs to a picture, its label too, hence a view (B, K) of zeros and ones. The classes
    are the same in all of them and hang beside the views.
    """
    place = {name: k for k, name in enumerate(names)}
    if unknown := sorted({str(label) for label in batch["label"]} - place.keys()):
        raise ValueError(f"labels that are none of the classes: {', '.join(map(repr, unknown[:5]))}")
    truth = torch.tensor([place[str(label)] for label in batch["label"]], device=classes.device)
    image = encoder.images(batch["image"])
    views = Views(
        {"image": image, "label": Features(one_hot(truth, len(names)).to(classes))}, encoder.scale, encoder.bias
    )
    views.classes = classes  # type: ignore[attr-defined]
    return views


def classification_loss(views: Views, tau: float | None) -> Tensor:
    """The views of `labelled_views` -> scalar: mean over pictures of -log softmax(tau * cos)[label]."""
    scale = logit_scale(views.scale, views.bias, tau)
    return cross_entropy(scale * views["image"].pooled @ views.classes.T, views["label"].pooled)  # type: ignore[attr-defined]


def logit_scale(scale: Tensor, bias: Tensor | None, tau: float | None = None) -> Tensor | float:
    """What cosines are multiplied by: `tau`, or else CLIP's 100, or the model's own `scale` where it has a logit bias."""
    return (CLIP_SCALE if bias is None else scale) if tau is None else tau


def in_chunks(encode: Callable[[Tokens], Tensor], tokens: Tokens, chunk: int) -> Tensor:
    """Tokens (N, L) -> rows (N, D), at most `chunk` at a time; beyond one chunk activations are not kept for gradients."""
    if len(tokens.ids) <= chunk:
        return encode(tokens)

    def one(ids: Tensor, mask: Tensor) -> Tensor:
        return encode(Tokens(ids, mask))

    parts = zip(tokens.ids.split(chunk), tokens.mask.split(chunk))
    kept = not torch.is_grad_enabled()
    return torch.cat([one(*part) if kept else checkpoint(one, *part, use_reentrant=False) for part in parts])


def _check(classes: Sequence[str], templates: str | Sequence[str], tau: float | None, chunk: int) -> None:
    class_prompts(classes, templates)
    if len(classes) < 2:
        raise ValueError(f"there is nothing to choose between: one class only ({classes[0]})")
    if tau is not None and not tau > 0:
        raise ValueError(f"tau={tau}: cosines are multiplied by it, so it must be positive")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: at least one prompt must be encoded at a time")
