"""MoCoOp: a soft prompt for each group of hand-written templates, and a router that mixes the two best for each picture.

One learnt prompt must fit every style that a data set holds, and drifts away from what the model knows. Here templates are
grouped by meaning (photograph, drawing, poor quality ...), each group's first template starts one soft prompt with words on
both sides of the name, and a linear router on the picture's feature picks and mixes. Two further losses use the templates as
they were written: the router learns to prefer the groups that fit the picture under its true label, and each soft prompt keeps
the classes, also those known by name only, where its group's templates put them.

`MoCoOp` is the predictor, `PromptMixture` the objective for the trainer; both are a few lines around `hard_prototypes`,
`mixing_weights`, `mixed_logits`, `gate_target`, `gate_loss` and `text_to_text_loss`, which take plain tensors.

Groups are the method's main setting. The released configurations order them like this: the data set's own template ("a centered
satellite photo of {}."), a general photo, many / large / small, low quality (low resolution, pixelated), good quality; ImageNet
has 31 templates in 20 groups, EuroSAT groups of [1, 1, 2, 2, 4, 2] templates, Pets [1, 2, 1, 1, 4, 2], DTD, Caltech and Aircraft
[1, 1, 1, 4, 2], Food [1, 3, 4, 2]. `GROUPS`, the default, is ours.

Where paper, code and this file differ: the code counts a context in words but cuts it out of BPE tokens, which shifts the class
name wherever a word has two tokens; here tokens are counted. It adds noise to templates' features that no loss reads; left out.
Its warm-up is constant (1e-5 for 3 to 7 epochs); ours is the trainer's linear one. That dyabel/mocoop is the authors' own
repository is likely, not certain (the paper links an anonymous copy). tau is exp(logit_scale), which is 100 for CLIP: for a
model whose own scale is far from that give `tau`, or the loss on classes drowns the gate's.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize
from torch.utils.checkpoint import checkpoint

from ecliptic.core.anatomy import parts
from ecliptic.core.batches import Order
from ecliptic.core.contracts import Objective, Pairs, Prediction, Predictor, Record, Tokens, Views
from ecliptic.core.encoder import Encoder, HFEncoder
from ecliptic.core.feature_predictor import FeaturePredictor
from ecliptic.core.inputs import pad
from ecliptic.core.method import Paper, method
from ecliptic.core.prompt_classifier import CHUNK, labelled_views, logit_scale
from ecliptic.core.prompting import check_promptable, text_from_embeddings, token_embeddings, with_context
from ecliptic.core.train import Settings, Train, fit
from ecliptic.core.tuned import with_tensors
from ecliptic.core.zeroshot import class_prompts, template_set, zero_shot_head
from ecliptic.data.shots import (
    RandomView,
    check_classes,
    check_features,
    check_labels,
    encode_views,
    labels_of,
    tiny_records,
)

Groups = tuple[tuple[str, ...], ...]

GROUPS: Groups = (  # ours: what photographs and drawings of things differ in
    ("a photo of a {}.",),
    ("a drawing of a {}.", "a sketch of a {}.", "an illustration of a {}."),
    ("a low resolution photo of a {}.", "a blurry photo of a {}.", "a dark photo of a {}."),
    ("a close-up photo of a {}.", "a photo of a large {}.", "a photo of a small {}."),
)
BOOST = 10.0  # added to the best groups' similarities before the softmax of `gate_target`; section on the gate, official code
NORM_RATE = 0.1  # learning rate of the picture tower's norms over that of the prompts, official code


@method(
    Paper("Mixture of Prompt Learning for Vision Language Models", arxiv="2409.12011", year=2024),
    purpose="learn several prompts for pictures of mixed styles, routed by the picture, without losing classes not shown",
    claim="on pictures of mixed styles it is better than one learnt prompt on classes shown and on classes not shown; its gate's "
    "loss is what makes the router see styles, its text-to-text loss what keeps classes not shown",
)
@dataclass(eq=False)
class MoCoOp(FeaturePredictor, Predictor):
    """Few-shot classification by a mixture of learnt prompts; reads records with `image` and `label`.

    Learnt: `state_`, the contexts of every group, the router and the correction, by name; `norms_`, the picture tower's norms
    where `tune_vision_ln` has changed them, else empty; `experts_` (G, K, D), the class embeddings that follow.
    Pictures are encoded once unless norms are tuned, which takes a pass through both towers in every step.
    """

    classes: tuple[str, ...] | None = None  # names in the order wanted; None: the labels found, sorted
    extra_classes: tuple[str, ...] = ()  # known by name only, to be asked for later: the text-to-text loss reads them
    groups: Groups = GROUPS  # templates with one {} each; an expert starts from the first of its group
    top_k: int = 2  # experts mixed for a picture
    text_weight: float = 5.0  # lambda_t
    gate_weight: float = 1.0  # lambda_g
    correction: bool = True  # learn w, added to every class embedding before it is normalised
    tune_vision_ln: bool = False  # train the norms of the picture tower's blocks as well: True in the paper, far slower
    epochs: int = 10  # ours, for the time it takes; official configs 25 or 50, for ImageNet 10 at a batch of 1
    batch_size: int = 32  # fewer where there are fewer pictures
    lr: float = 0.032  # for a batch of 32; official configs, 0.002 for one of 1
    views: int = 0  # augmented views of each picture to learn from in its place, encoded once; the paper draws new ones each step
    crop: tuple[float, float] = (0.08, 1.0)  # share of the area that a view keeps
    tau: float | None = None  # see `core.prompt_classifier.logit_scale`: CLIP's 100, SigLIP's own scale
    seed: int = 0

    def fit(self, encoder: Encoder, pairs: Pairs) -> Self:
        """Learn from labelled records. What is wrong with settings, labels or names is said before a picture is opened."""
        tower = check_promptable(encoder)
        names, labels = labels_of(pairs, self.classes)
        check_labels(labels, len(labels), names)
        self._settings(len(labels))
        if self.tune_vision_ln:
            return self._fit_with_norms(tower, names, pairs, len(labels))
        loss = self.objective(names).bind(tower)
        features, views = encode_views(encoder, pairs, self.views, self.seed, self.crop)
        return self._learn(tower, loss, features if views is None else views, labels)

    def fit_features(
        self,
        encoder: Encoder,
        features: Tensor,
        labels: Tensor,
        *,
        views: Tensor | None = None,
        classes: Sequence[str] | None = None,
    ) -> Self:
        """The same from the encoder's features (N, D), unit rows, and labels (N,) int64, positions in `classes`.

        views (V, N, D): augmented views of the same pictures, which then stand for them; one of V is drawn for each step.
        """
        if self.tune_vision_ln:
            raise ValueError("tune_vision_ln=True changes the features themselves: call fit(encoder, pairs)")
        names = classes if classes is not None else self.classes
        if names is None:
            raise ValueError("labels are numbers here: give classes=, the names that they are positions in")
        check_labels(labels, len(features), names)
        check_features(features)
        if views is not None and views.shape[1:] != features.shape:
            raise ValueError(f"views must be (V, {', '.join(map(str, features.shape))}), got {tuple(views.shape)}")
        tower = check_promptable(encoder)
        return self._learn(tower, self.objective(names).bind(tower), features if views is None else views, labels)

    def objective(self, names: Sequence[str]) -> PromptMixture:
        """The loss for these classes, not yet bound to an encoder."""
        return PromptMixture(
            names,
            self.groups,
            tuple(name for name in self.extra_classes if name not in names),
            top_k=self.top_k,
            text_weight=self.text_weight,
            gate_weight=self.gate_weight,
            correction=self.correction,
            tau=self.tau,
            seed=self.seed,
        )

    @torch.no_grad()
    def predict(self, pixels: Tensor, classes: Sequence[str] | None = None) -> Prediction:
        """Pixels (B, 3, H, W), as `encoder.preprocess` gives them -> scores (B, K), scaled cosines, and labels.

        classes: answer among these only, in this order; for names never trained on, see `for_classes`.
        """
        return self.predict_features(self._encoder().images(pixels).pooled.float().cpu(), classes)

    def scores_of(self, features: Tensor) -> Tensor:
        """Unit rows (B, D), with tuned norms those of `tuned_encoder()`, -> (B, K)."""
        return mixed_logits(features, self.experts_, self.route_features(features), self.scale_)

    @torch.no_grad()
    def route_features(self, features: Tensor) -> Tensor:
        """Unit rows (B, D) -> (B, G): how much each group's expert counts; `top_k` of a row are above 0, and sum to 1."""
        if features.shape[1:] != self.experts_.shape[2:]:
            raise ValueError(f"features must be (B, {self.experts_.shape[2]}), got {tuple(features.shape)}")
        logits = linear(features.float(), self.state_["router.weight"], self.state_["router.bias"])
        return mixing_weights(logits, self.top_k)

    @torch.no_grad()
    def for_classes(self, names: Sequence[str]) -> Self:
        """The same for other classes, by their names: contexts, router and correction stay what they are."""
        if not hasattr(self, "state_"):
            raise ValueError("MoCoOp has learnt nothing yet: call fit() first")
        other = copy.copy(self)
        mixture = self.objective(names).started(self._encoder())
        mixture.load_state_dict(self.state_)
        other.classes_ = tuple(names)
        other.experts_ = mixture.embedded(self._encoder(), names).float().cpu()
        return other

    def tuned_encoder(self) -> HFEncoder:
        """An encoder of its own with the tuned norms: that whose features `predict_features` takes."""
        return self._encoder().clone()

    def _encoder(self) -> HFEncoder:
        if (frozen := getattr(self, "encoder_", None)) is None:
            raise ValueError("no encoder here: call fit(encoder, pairs) first, or load(folder, encoder)")
        if not self.norms_:
            return cast(HFEncoder, frozen)
        if self._tuned is None:
            self._tuned = with_tensors(frozen, self.norms_)
        return self._tuned

    _tuned: HFEncoder | None = field(default=None, init=False, repr=False)

    def _settings(self, pictures: int) -> dict[str, Any]:
        """For the trainer. ValueError for what it would not take."""
        for name, least in (("epochs", 1), ("batch_size", 1), ("views", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        found: dict[str, Any] = {
            "steps": self.epochs * (pictures // min(self.batch_size, pictures)),
            "lr": self.lr,
            "optimizer": "sgd",
            "betas": (0.9, 0.999),  # momentum; with the next, Dassl's defaults
            "weight_decay": 5e-4,
            "grad_clip": 1.0,
            "seed": self.seed,
        }
        Settings(**found)
        return found

    def _learn(self, tower: HFEncoder, loss: PromptMixture, samples: Tensor, labels: Tensor) -> Self:
        """samples: features (N, D), or (V, N, D)."""
        samples = samples[None] if samples.ndim == 2 else samples
        order = Order(len(labels), min(self.batch_size, len(labels)), self.seed)
        scale = logit_scale(tower.scale.detach(), tower.bias, self.tau)

        def batch(i: int) -> tuple[Tensor, Tensor]:
            rows = torch.from_numpy(order(i))
            view = np.random.default_rng([self.seed, i]).integers(len(samples), size=len(rows))
            return samples[torch.from_numpy(view), rows], labels[rows]

        loss.to(tower.device)
        fit(
            nn.ModuleDict({"encoder": tower, "objective": loss}),
            lambda pair: loss.losses(*pair, loss.experts(tower), scale),
            batch,
            Settings(**self._settings(len(labels))),
            trainable=lambda name, p: name.startswith("objective.") and p.requires_grad,
        )
        return self._keep(tower, tower, loss, {})

    def _fit_with_norms(self, tower: HFEncoder, names: Sequence[str], pairs: Pairs, pictures: int) -> Self:
        pattern = "|".join(f"(^|[.]){re.escape(name)}$" for name in vision_norms(tower))
        trained = Train(
            self.objective(names),
            batch_size=min(self.batch_size, pictures),
            trainable=pattern,
            groups={pattern: {"lr": NORM_RATE * self.lr}},
            augment=RandomView.for_encoder(tower, self.crop) if self.views else None,
            **self._settings(pictures),
        ).run(tower, pairs)
        tuned = cast(HFEncoder, trained.encoder)
        changed = {name: tuned.get_parameter(name) for name in vision_norms(tower)}
        return self._keep(tower, tuned, cast(PromptMixture, trained.objective), changed)

    @torch.no_grad()
    def _keep(self, encoder: HFEncoder, tuned: HFEncoder, loss: PromptMixture, norms: Mapping[str, Tensor]) -> Self:
        def plain(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value.detach().cpu().contiguous().clone() for name, value in named.items()}

        self.encoder_, self._tuned, self.classes_ = encoder, None, loss.classes
        self.state_, self.norms_ = plain(loss.state_dict()), plain(norms)
        self.scale_ = float(logit_scale(encoder.scale, encoder.bias, self.tau))
        self.experts_ = loss.experts(tuned)[:, : len(loss.classes)].float().cpu()
        learnt = [*(p for p in loss.parameters() if p.requires_grad), *norms.values()]
        self.trained_parameters_ = sum(p.numel() for p in learnt)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_tuned": None}

    @classmethod
    def tiny(cls) -> tuple[MoCoOp, list[Record]]:
        groups = (("a photo of a {}.",), ("a red {} on a mat.", "a {}."), ("{} and a cat.",))
        return cls(groups=groups, extra_classes=("yellow",), epochs=3, batch_size=6), tiny_records()


def vision_norms(encoder: HFEncoder) -> list[str]:
    """Names of the weights and biases of both norms in every block of the picture tower.

    TypeError where they change no answer.
    """
    if encoder.anatomy.image.joined:
        raise TypeError(
            f"the pooled vector of {encoder.name} comes from a convolutional network beside the blocks whose norms would be "
            "tuned: set tune_vision_ln=False"
        )
    layers = [getattr(parts(block), name) for block in encoder.anatomy.image.blocks for name in ("norm1", "norm2")]
    wanted = {id(p) for layer in layers for p in layer.parameters()}
    return [name for name, p in encoder.named_parameters() if id(p) in wanted]


# The objective


class PromptMixture(nn.Module, Objective):
    """The three losses, each in nats: classes (>= 0), gate and text_to_text; reads `label`, a name in `classes`.

    Trained: `before` and `after`, for each group the vectors (M, W) in front of the class name and (A, W) behind it; `router`,
    Linear(D, G); `correction` w (1, D). Towers stay as they are with `Train(PromptMixture(classes), trainable=NOTHING)`.
    `bind` makes all of that for an encoder. A full stop at the end of a template is not learnt.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"image"})
    fields: ClassVar[tuple[str, ...]] = ("label",)
    hard: Tensor  # (G, C, D) unit rows, of `classes` and then `extra_classes`
    before: nn.ParameterList
    after: nn.ParameterList
    router: nn.Linear
    correction: nn.Parameter
    _shapes: list[Shape]
    _tokens: list[Tokens]

    def __init__(
        self,
        classes: Sequence[str],
        groups: Sequence[Sequence[str]] = GROUPS,
        extra_classes: Sequence[str] = (),
        *,
        top_k: int = 2,
        text_weight: float = 5.0,
        gate_weight: float = 1.0,
        correction: bool = True,
        tau: float | None = None,
        chunk: int = CHUNK,
        seed: int = 0,
    ):
        super().__init__()
        check_classes(classes)
        class_prompts((*classes, *extra_classes))
        self.groups = check_groups(groups)
        if not 1 <= top_k <= len(self.groups):
            raise ValueError(f"top_k={top_k}: there are {len(self.groups)} groups, so choose 1 to {len(self.groups)}")
        for name, value in (("text_weight", text_weight), ("gate_weight", gate_weight)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}: a loss's weight is 0 or more")
        if tau is not None and not tau > 0:
            raise ValueError(f"tau={tau}: cosines are multiplied by it, so it must be positive")
        if chunk < 1:
            raise ValueError(f"chunk={chunk}: at least one prompt must be encoded at a time")
        self.classes, self.extra_classes = tuple(classes), tuple(extra_classes)
        self.top_k, self.text_weight, self.gate_weight = top_k, text_weight, gate_weight
        self.corrects, self.tau, self.chunk, self.seed = correction, tau, chunk, seed

    def bind(self, encoder: Encoder) -> Self:
        """The same at its start for this encoder. Raises ValueError for a name or template beyond what the tower reads."""
        tower = check_promptable(encoder)
        bound = self.started(tower)
        names = (*self.classes, *(self.extra_classes if self.text_weight else ()))  # only that loss reads the others
        bound._tokens = bound.tokens(tower, names)
        bound.register_buffer("hard", hard_prototypes(tower, names, self.groups), persistent=False)
        return bound

    @torch.no_grad()
    def started(self, encoder: HFEncoder) -> Self:
        """The same with its parameters at their start and no classes yet: to load what was learnt into."""
        made = copy.deepcopy(self)
        made._shapes = [split_template(encoder, group[0]) for group in self.groups]
        made.before, made.after = (
            nn.ParameterList([_embedded(encoder, getattr(shape, side)) for shape in made._shapes])
            for side in ("before", "after")
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            made.router = nn.Linear(encoder.dim, len(self.groups))
        made.correction = nn.Parameter(torch.zeros(1, encoder.dim), requires_grad=self.corrects)
        return made

    def tokens(self, encoder: HFEncoder, names: Sequence[str]) -> list[Tokens]:
        """For each group the tokens of "NAME." (C, L), without its contexts. ValueError for a name that does not fit."""
        return [name_tokens(encoder, shape, names) for shape in self._shapes]

    def experts(self, encoder: HFEncoder, tokens: Sequence[Tokens] | None = None) -> Tensor:
        """(G, C, D) unit rows T_gc: each expert's embeddings of all classes, those of `tokens` if given."""
        given = self._tokens if tokens is None else tokens
        runs = _runs([len(part.ids) for part in given], self.chunk)
        kept = len(runs) == 1 or not torch.is_grad_enabled()

        def embed(run: list[tuple[int, slice]]) -> Tensor:
            prompts = [self._prompts(encoder, g, Tokens(given[g].ids[rows], given[g].mask[rows])) for g, rows in run]
            return text_from_embeddings(encoder, *_stacked(prompts), normalize=False).pooled

        rows = torch.cat([embed(run) if kept else checkpoint(embed, run, use_reentrant=False) for run in runs])
        return normalize(rows.view(len(given), -1, encoder.dim) + self.correction, dim=-1)

    def embedded(self, encoder: HFEncoder, names: Sequence[str]) -> Tensor:
        """(G, K, D) unit rows of other names."""
        class_prompts(names)
        return self.experts(encoder, self.tokens(encoder, names))

    def _prompts(self, encoder: HFEncoder, g: int, tokens: Tokens) -> tuple[Tensor, Tokens]:
        return with_context(encoder, self.before[g], tokens, self.after[g], tail=len(self._shapes[g].stop))

    def encode(self, encoder: Encoder, batch: Mapping[str, Any]) -> Views:
        return labelled_views(encoder, batch, self.experts(cast(HFEncoder, encoder)), self.classes)

    def terms(self, views: Views) -> dict[str, Tensor]:
        labels = views["label"].pooled.argmax(-1)
        scale = logit_scale(views.scale, views.bias, self.tau)
        return self.losses(views["image"].pooled, labels, views.classes, scale)  # type: ignore[attr-defined]

    def losses(self, image: Tensor, labels: Tensor, experts: Tensor, scale: Tensor | float) -> dict[str, Tensor]:
        """image (B, D) unit rows, labels (B,), experts (G, C, D) -> the terms with their weights; one of weight 0 is left out."""
        labels, image = labels.to(experts.device), image.to(experts.device)
        known, routes = len(self.classes), self.routes(image)
        scores = mixed_logits(image, experts[:, :known], mixing_weights(routes, self.top_k), scale)
        terms = {"classes": cross_entropy(scores, labels)}
        if self.gate_weight:
            target = gate_target(image, self.hard[:, :known], labels, self.top_k)
            terms["gate"] = self.gate_weight * gate_loss(routes, target)
        if self.text_weight:
            terms["text_to_text"] = self.text_weight * text_to_text_loss(experts, self.hard)
        return terms

    def routes(self, image: Tensor) -> Tensor:
        """(B, D) -> (B, G), the router's logits, in its own precision even under autocast: in halves the top two tie and flip."""
        with torch.autocast(image.device.type, enabled=False):
            return cast(Tensor, self.router(image.to(self.router.weight.dtype)))

    @classmethod
    def tiny(cls) -> tuple[PromptMixture, list[Record]]:
        groups = (("a photo of a {}.",), ("a red {} on a mat.", "a {}."), ("{} and a cat.",))
        return cls(("red", "green", "blue"), groups, ("yellow",)), tiny_records()


# The mathematics, on plain tensors


def hard_prototypes(encoder: HFEncoder, names: Sequence[str], groups: Sequence[Sequence[str]]) -> Tensor:
    """C names -> H (G, C, D) float32 unit rows: the mean over each group's templates of unit embeddings, made unit again."""
    return torch.stack([zero_shot_head(encoder, names, tuple(group)) for group in groups])


def mixing_weights(routes: Tensor, top_k: int) -> Tensor:
    """Router logits (B, G) -> (B, G): softmax over the `top_k` largest of each row, exactly 0 elsewhere."""
    best = routes.topk(top_k, dim=-1)
    return torch.zeros_like(routes).scatter(-1, best.indices, best.values.softmax(-1))


def mixed_logits(image: Tensor, experts: Tensor, weights: Tensor, scale: Tensor | float) -> Tensor:
    """image (B, D), experts (G, C, D), weights (B, G) -> (B, C): scale * f . sum_g a_g T_gc, the sum not made unit again."""
    return scale * torch.einsum("bg,bd,gcd->bc", weights.to(image), image, experts)


def gate_target(image: Tensor, hard: Tensor, labels: Tensor, top_k: int = 2) -> Tensor:
    """image (B, D), hard (G, C, D), labels (B,) -> q (B, G), rows of sum 1: softmax of s_g = f . H_gy, the best ones + 10.

    So the `top_k` groups whose templates, with the true name in them, are nearest to the picture share nearly all of it, and
    nearly equally. Gradients reach the picture's feature through q as well, as in the official code.
    """
    similarity = torch.einsum("bd,gbd->bg", image, hard[:, labels].to(image))
    best = similarity.topk(top_k, dim=-1).indices
    return (similarity + torch.zeros_like(similarity).scatter(-1, best, BOOST)).softmax(-1)


def gate_loss(routes: Tensor, target: Tensor) -> Tensor:
    """Router logits (B, G), q (B, G) -> mean over pictures of -sum_g q_g log softmax(r)_g, in nats."""
    return -(target * routes.log_softmax(-1)).sum(-1).mean()


def text_to_text_loss(experts: Tensor, hard: Tensor) -> Tensor:
    """T and H, (G, C, D) unit rows -> mean over g and c of -log softmax_c'(T_gc . H_gc')[c], without a temperature, in nats.

    Never near 0: even orthonormal classes met exactly leave log(e + C - 1) - 1. It is a weak and steady pull.
    """
    cosines = torch.einsum("gcd,ged->gce", experts, hard.detach().to(experts))
    return -cosines.log_softmax(-1).diagonal(dim1=-2, dim2=-1).mean()


# Templates and tokens


def _runs(counts: Sequence[int], chunk: int) -> list[list[tuple[int, slice]]]:
    """Prompts of several experts, in order, cut into runs of at most `chunk` prompts: (expert, which of its prompts)."""
    runs: list[list[tuple[int, slice]]] = [[]]
    room = chunk
    for g, count in enumerate(counts):
        start = 0
        while start < count:
            if not room:
                runs.append([])
                room = chunk
            stop = min(count, start + room)
            runs[-1].append((g, slice(start, stop)))
            start, room = stop, room - (stop - start)
    return runs


def _stacked(prompts: Sequence[tuple[Tensor, Tokens]]) -> tuple[Tensor, Tokens]:
    """Embeddings (B, L, W) and tokens (B, L) of different lengths as one batch; what is added is masked, and never read."""
    longest = max(embeddings.shape[1] for embeddings, _ in prompts)

    def filled(x: Tensor) -> Tensor:
        short = longest - x.shape[1]
        return torch.cat([x, x[:, -1:].expand(-1, short, *x.shape[2:])], 1) if short else x

    embeddings = torch.cat([filled(embeddings) for embeddings, _ in prompts])
    ids = torch.cat([filled(tokens.ids) for _, tokens in prompts])
    places = torch.arange(longest, device=ids.device)
    counts = torch.cat([tokens.mask.sum(-1) for _, tokens in prompts])
    return embeddings, Tokens(ids, places < counts[:, None])


class Shape(NamedTuple):
    """Token ids of a template without special ones: before the class name, behind it, and the full stop at the end.

    prefix: the text before the name.
    """

    prefix: str
    before: list[int]
    after: list[int]
    stop: list[int]


def check_groups(groups: Sequence[Sequence[str]]) -> Groups:
    """Groups as tuples. ValueError or TypeError for what are none, or a first template without exactly one {}."""
    if isinstance(groups, str) or not groups:
        raise ValueError("groups is empty: give at least one group of templates, such as (('a photo of a {}.',),)")
    for group in groups:
        if isinstance(group, str):
            raise TypeError(f"groups holds the string {group!r}: a group is a tuple of templates, ({group!r},)")
        if template_set(tuple(group))[0].count("{}") > 1:
            raise ValueError(f"template {group[0]!r} names the class twice: the first of a group must have one {{}}")
    return tuple(tuple(group) for group in groups)


def split_template(encoder: HFEncoder, template: str) -> Shape:
    """A template's tokens on both sides of its {}, as the tokenizer sees them in a sentence: whole words cannot be counted on.

    ValueError where the tokens of the words around {} depend on what is put in, as in "un{}ed".
    """
    prefix, _, rest = template.partition("{}")
    body = rest[:-1] if rest.endswith(".") else rest
    head, named, sentence, full = _plain(
        encoder, [prefix.rstrip(), f"{prefix}thing", f"{prefix}thing{body}", f"{prefix}thing{rest}"]
    )
    steps = ((head, named), (named, sentence), (sentence, full))
    if any(longer[: len(shorter)] != shorter for shorter, longer in steps):
        raise ValueError(
            f"template {template!r}: its words and the class name run into one another: put spaces around {{}}"
        )
    return Shape(prefix, head, sentence[len(named) :], full[len(sentence) :])


def name_tokens(encoder: HFEncoder, shape: Shape, names: Sequence[str]) -> Tokens:
    """C names -> Tokens (C, L) of "NAME." with special tokens, NAME as it is spelt behind the template's first words."""
    spelt = _plain(encoder, [shape.prefix + name.strip() for name in names])
    if wrong := [n for n, ids in zip(names, spelt, strict=True) if ids[: len(shape.before)] != shape.before]:
        raise ValueError(f"class name {wrong[0]!r} changes how {shape.prefix!r} before it is read: spell it otherwise")
    first, last = _special(encoder)
    added = len(shape.before) + len(shape.after)
    rows = [[*first, *ids[len(shape.before) :], *shape.stop, *last] for ids in spelt]
    if long := [name for name, row in zip(names, rows, strict=True) if len(row) + added > encoder.max_tokens]:
        raise ValueError(
            f"class name {long[0]!r} and the {added} words around it in {shape.prefix!r}... exceed the {encoder.max_tokens} "
            f"tokens that {encoder.name} reads: shorten the name or the template"
        )
    ids, mask = pad(rows, encoder.pad_id, encoder.max_tokens if encoder.anatomy.text.padded else 0)
    return Tokens(torch.from_numpy(ids), torch.from_numpy(mask))


def _plain(encoder: HFEncoder, texts: Sequence[str]) -> list[list[int]]:
    """Token ids without special ones; none for an empty text."""
    ids = encoder.tokenizer(list(texts), add_special_tokens=False, padding=False, truncation=False, verbose=False)
    return [list(row) if text.strip() else [] for text, row in zip(texts, ids["input_ids"], strict=True)]


def _special(encoder: HFEncoder) -> tuple[list[int], list[int]]:
    """What the tokenizer puts around a text."""
    whole, bare = encoder.tokenizer("thing")["input_ids"], _plain(encoder, ["thing"])[0]
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def _embedded(encoder: HFEncoder, ids: Sequence[int]) -> nn.Parameter:
    row = torch.tensor([ids], dtype=torch.int64).reshape(1, -1)
    return nn.Parameter(token_embeddings(encoder, Tokens(row, torch.ones_like(row, dtype=torch.bool)))[0].clone())
