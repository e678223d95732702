"""CLIPN: a second text tower that has learnt to say no, and with it "this is none of the classes".

CLIP can say which class fits best, not that none does: its text tower hardly hears a "no". CLIPN copies that tower and trains the
copy alone on pictures with captions: for a caption that does not belong to a picture the copy's text shall fit the
picture better than the original's, for one that does, worse. Each class then has a yes and a no, whose two-way softmax is
the probability that a picture is of it. Two rules decide from these without any threshold, and since the original
tower still names the class, known pictures are named exactly as before.

`SayNo` and `SayNoByHand` are what is trained under (learnt "no" prompts, or templates with the word), `Clipn` is the
predictor around them; the losses and the rules are functions of tensors. Whether the ATD rule compares the mass of "none"
with p or with q p is unclear in the paper (uncertain), and the released code does not decide at all: see `atd_compare`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ecliptic.core.batches import collate
from ecliptic.core.contracts import Features, Objective, Pairs, Record, Tokens, Views
from ecliptic.core.encoder import Encoder, HFEncoder
from ecliptic.core.feature_predictor import FeaturePredictor
from ecliptic.core.method import Paper, method
from ecliptic.core.objectives import same_caption
from ecliptic.core.prompt_classifier import NOTHING
from ecliptic.core.prompting import added_to_words
from ecliptic.core.train import Train
from ecliptic.core.tuned import changed_tensors, check_tunable, with_tensors
from ecliptic.core.zeroshot import class_prompts, prompts, template_set, zero_shot_head
from ecliptic.data.records import unit_hash
from ecliptic.data.shots import check_classes, check_features, encode_views, tiny_records
from ecliptic.ops.tiled_contrastive import no_autocast

Pair = tuple[str, str]
PAIRED: tuple[Pair, ...] = (
    ("a photo of {}", "a photo of no {}"),  # these two from the paper; the others ours, in the same way
    ("a painting of {}", "a painting of no {}"),
    ("a picture of {}", "a picture of no {}"),
    ("an image of {}", "an image of no {}"),
    ("a drawing of {}", "a drawing of no {}"),
)
"""Templates with and without the "no", for `Clipn(paired=PAIRED)`."""

EPS = 1e-4  # released code: without it the distance has an infinite gradient where both texts are the same


# The losses


def no_probability(yes: Tensor, no: Tensor) -> Tensor:
    """Logits of a text and of its "no" -> the chance that the picture is not of it: e^no / (e^yes + e^no)."""
    return (no - yes).sigmoid()


def image_text_loss(yes: Tensor, no: Tensor, spared: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """ITBO: logits (N, N), pictures down and captions across -> (matched, mismatched), two means in nats, each >= 0.

    matched: mean of -log(1 - p_no) over the diagonal. mismatched: mean of -log p_no over the rest, without the pairs that
    `spared` (N, N) bool marks, whose caption is true of the other picture too; 0 where none is left. Two means, so that
    N - 1 negatives do not drown a positive.
    """
    if yes.ndim != 2 or yes.shape != no.shape or yes.shape[0] != yes.shape[1]:
        raise ValueError(f"logits must be (N, N), got {tuple(yes.shape)} and {tuple(no.shape)}")
    difference = yes - no  # of logits: a softmax and then its logarithm underflow in half precision
    wrong = ~torch.eye(len(yes), dtype=torch.bool, device=yes.device)
    if spared is not None:
        wrong &= ~spared
    matched = -logsigmoid(difference.diagonal()).mean()
    mismatched = -(logsigmoid(-difference) * wrong).sum() / wrong.sum().clamp(min=1)
    return matched, mismatched


def opposite_loss(text: Tensor, text_no: Tensor, eps: float = EPS) -> Tensor:
    """TSO: unit rows (N, D) -> mean of 2 - |t - t_no|, in [0, 2] but for eps: 0 where a "no" is the opposite of its text.

    Its gradient is zero in direction where both are the same, so it cannot start to move a copy by itself.
    """
    return (2 - (2 - 2 * (text * text_no).sum(-1) + eps).sqrt()).mean()


def entailed(says: Tensor, holds: Tensor) -> Tensor:
    """says (N, F), holds (N, F) of zeros and ones -> (N, N) bool: caption j says something, and all of it holds of picture i."""
    contradicted = (1 - holds) @ says.T
    return (contradicted < 0.5) & (says.sum(-1) > 0.5)


# The rules


def competing_to_win(yes: Tensor, no: Tensor) -> Tensor:
    """CTW: logits (B, K) -> (B,) in [0, 1]: 1 - p_no of the class with the largest yes. Known exactly if above 1/2."""
    best = yes.argmax(-1, keepdim=True)
    return (yes - no).gather(-1, best)[..., 0].sigmoid()


def agreeing_to_differ(yes: Tensor, no: Tensor) -> Tensor:
    """ATD: logits (B, K) -> (B,) in [0, 1]: sum over classes of p (1 - p_no), p the softmax of yes; the rest is "none"."""
    return (yes.softmax(-1) * (yes - no).sigmoid()).sum(-1)


def atd_is_known(yes: Tensor, no: Tensor, compare: Literal["p", "qp"] = "p") -> Tensor:
    """(B,) bool: the mass of "none", sum of p p_no, is not above the largest p (or, "qp", the largest p (1 - p_no))."""
    p = yes.softmax(-1)
    none = (p * no_probability(yes, no)).sum(-1)
    rival = p if compare == "p" else p * (yes - no).sigmoid()
    return none <= rival.amax(-1)


# What is trained


class SayNo(nn.Module, Objective):
    """The loss of CLIPN; what learns is a copy of the encoder's text tower, and "no" prompts for it.

    `Train(SayNo(), trainable=NOTHING).run(encoder, pairs).objective` leaves the encoder as it is. Three terms, each times its
    weight: `matched` and `mismatched` (`image_text_loss`) and `opposite` (`opposite_loss`); there is no contrastive term.

    prompts: how many tables (L, W) are learnt, zeros at the start, one of which, or their mean, is added to *all* word
    embeddings of a caption, special tokens and padding included. In training each caption draws one of `prompts` + 1; else
    it is the mean.
    facts: with it, records say in `says` which of these facts their caption states and in `holds` which are true of their
    picture, and a caption that is true of another picture of the batch is not trained as its "no". Equal captions never are.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"image", "text", "text_no"})
    rowwise: ClassVar[bool] = True
    waivers: ClassVar[dict[str, str]] = {
        "gradients": "pictures are pulled along the difference of a text and its no, which is zero at the start"
    }
    text_no: nn.Module
    projection_no: nn.Module | None
    prompt_no: nn.Parameter | None
    _shell: tuple[HFEncoder]  # in a tuple, so that the picture tower in it does not become a part of this module

    def __init__(
        self,
        prompts: int = 16,
        weights: tuple[float, float, float] = (0.5, 0.5, 0.5),
        facts: Sequence[str] = (),
    ):
        super().__init__()
        if prompts < 0:
            raise ValueError(f"prompts={prompts}: must not be negative; 0 trains the tower alone")
        if len(weights) != 3 or not all(w >= 0 for w in weights) or not sum(weights[:2]):
            raise ValueError(
                f"weights={weights}: (matched, mismatched, opposite), none negative, and not the last alone, which moves nothing"
            )
        self.prompts, self.weights, self.facts = prompts, tuple(weights), tuple(facts)

    @property
    def fields(self) -> tuple[str, ...]:
        """Further record fields that the trainer must put into a batch."""
        return ("says", "holds") if self.facts else ()

    def bind(self, encoder: Encoder) -> Self:
        """The same with its own text tower, an exact copy of this encoder's. TypeError for an encoder without layers."""
        tower = check_tunable(encoder)
        bound = type(self)(*self._arguments())
        no = with_tensors(tower, text_tensors(tower))
        bound._shell = (no,)
        bound.text_no = no.anatomy.text.module.requires_grad_(True)
        projection = (
            None if no.anatomy.text.padded else no.anatomy.text.projection
        )  # SigLIP's head stands inside the tower
        bound.projection_no = None if projection is None else projection.requires_grad_(True)
        width = no.anatomy.text.width
        bound.prompt_no = nn.Parameter(torch.zeros(self.prompts, no.max_tokens, width)) if self.prompts else None
        return bound.eval()

    def _arguments(self) -> tuple[Any, ...]:
        return self.prompts, self.weights, self.facts

    def encode(self, encoder: Encoder, batch: Mapping[str, Any]) -> Views:
        """Reads `image` (or `features`, (B, D) unit rows, in its place) and `text`, and for `text_no` the same words."""
        text, text_no = self._words(batch)
        with added_to_words(self._shell[0], self._additions(len(text_no.ids))):
            no = self._shell[0].texts(text_no)
        views = Views({"image": _pictures(encoder, batch)}, encoder.scale, encoder.bias)
        views |= {"text": encoder.texts(text), "text_no": no}
        for name in self.fields:
            views[name] = Features(_multi_hot(batch[name], self.facts).to(no.pooled))
        return views

    def terms(self, views: Views) -> dict[str, Tensor]:
        image, text, no = (views[name].pooled for name in ("image", "text", "text_no"))
        kind = torch.promote_types(image.dtype, torch.float32)
        with no_autocast(image):
            image, text, no = image.to(kind), text.to(kind), no.to(kind)
            spared = same_caption(views)
            if self.facts:
                told = entailed(views["says"].pooled, views["holds"].pooled)
                spared = told if spared is None else spared | told
            matched, mismatched = image_text_loss(views.scale * image @ text.T, views.scale * image @ no.T, spared)
            found = (matched, mismatched, opposite_loss(text, no))
        names = ("matched", "mismatched", "opposite")
        return {name: w * term for name, w, term in zip(names, self.weights, found, strict=True)}

    def _words(self, batch: Mapping[str, Any]) -> tuple[Tokens, Tokens]:
        """Tokens for the one tower, and for the other."""
        return batch["text"], batch["text"]

    def _additions(self, count: int) -> Tensor:
        """(L, W), or in training (count, L, W): one of the prompts, or their mean, for each caption."""
        if self.prompt_no is None:
            return torch.zeros(1, self._shell[0].anatomy.text.width)
        mean = self.prompt_no.mean(0)
        if not self.training:
            return mean
        # The trainer seeds the global generator in every step, as it does for dropout.
        drawn = torch.randint(len(self.prompt_no) + 1, (count,)).to(mean.device)
        return torch.cat([self.prompt_no, mean[None]])[drawn]

    @classmethod
    def tiny(cls) -> tuple[Self, list[Record]]:
        return cls(), tiny_records()


class SayNoByHand(SayNo):
    """The same with the word "no" instead of learnt prompts: each caption is put into a pair of templates, drawn anew each time.

    The text tower reads the first of the pair, its copy the second; outside of training that is the first pair.
    """

    rowwise: ClassVar[bool] = False
    waivers: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        paired: Sequence[Pair] = PAIRED,
        weights: tuple[float, float, float] = (0.5, 0.5, 0.5),
        facts: Sequence[str] = (),
    ):
        super().__init__(0, weights, facts)
        self.paired = check_paired(paired)

    def _arguments(self) -> tuple[Any, ...]:
        return self.paired, self.weights, self.facts

    def collate(self, encoder: Encoder, records: Sequence[Record]) -> dict[str, Any]:
        """As the trainer's own, with the tokens of every caption in every pair of templates."""
        rest = "features" if records[0].get("features") is not None else "image"
        batch = collate(encoder, records, _asking({"image"} if rest == "image" else set(), self.fields))
        if rest == "features":
            batch |= collate(encoder, records, _asking(set(), ("features", "group")))
        for name, side in (("text", 0), ("text_no", 1)):
            captions = [
                {**r, "caption": pair[side].replace("{}", r["caption"])} for r in records for pair in self.paired
            ]
            batch[name] = collate(encoder, captions, _asking({"text"}))["text"]
        return batch

    def _words(self, batch: Mapping[str, Any]) -> tuple[Tokens, Tokens]:
        count = len(batch["text"].ids) // len(self.paired)
        drawn = torch.randint(len(self.paired), (count,)) if self.training else torch.zeros(count, dtype=torch.int64)
        rows = (torch.arange(count) * len(self.paired) + drawn).to(batch["text"].ids.device)
        return tuple(Tokens(batch[name].ids[rows], batch[name].mask[rows]) for name in ("text", "text_no"))  # type: ignore[return-value]


def text_tensors(encoder: HFEncoder) -> dict[str, Tensor]:
    """All parameters and buffers of the text tower and its projection, by their names in the encoder's `state_dict()`."""
    tower = encoder.anatomy.text
    modules = [tower.module] if tower.projection is None else [tower.module, tower.projection]
    own = {id(value) for module in modules for value in module.state_dict(keep_vars=True).values()}
    return {name: value for name, value in encoder.state_dict(keep_vars=True).items() if id(value) in own}


# The predictor


@method(
    Paper("CLIPN for Zero-Shot OOD Detection: Teaching CLIP to Say No", arxiv="2308.12213", year=2023),
    purpose="notice pictures of none of the classes, without a threshold to set, and name the others as before",
    claim="a text tower trained to say no tells pictures of unknown classes apart better than softmax confidence and maximum "
    "concept matching, and decides without a threshold; an untrained copy, or one that saw no mismatched pairs, does not",
)
@dataclass(eq=False)
class Clipn(FeaturePredictor):
    """Learns from records with `image` and `caption`, or with `label`, whose caption is then the label in one of `templates`.

    Scores and answers are those of zero-shot classification, bit for bit; beside them `ood_scores` and `is_known`
    (`eval.ood`) say whether a picture is of any class at all. Classes need not occur in training, and pictures of much else
    are the better lesson: from the known classes alone "no" is learnt among those only.
    Class prompts and captions should be alike: where captions are long and prompts a single noun, the "no" transfers badly.

    Records may hold `says` and `holds`, lists of facts: see `SayNo`. Learnt: text_, text_no_ (K, D) unit rows; state_, what of
    the text tower differs in the copy, by its names in the encoder; prompts_ (P, L', W), up to the last word that occurred.
    """

    classes: tuple[str, ...] | None = None  # names in the order wanted; None: the labels found, sorted
    templates: str | tuple[str, ...] = (
        "photo"  # as `core.zeroshot.zero_shot_head` takes them; both towers read the same
    )
    prompts: int = 16  # learnt "no" prompts, as in the paper; 0 for none
    paired: tuple[Pair, ...] | None = (
        None  # such as PAIRED: no learnt prompts, and these templates instead of `templates`
    )
    rule: Literal["ctw", "atd"] = "ctw"  # for `is_known`; the paper reports both
    atd_compare: Literal["p", "qp"] = "p"  # (uncertain) what the mass of "none" is compared with
    tau: float | None = (
        None  # None: the model's own scale, as in training; 100 in every released CLIP, the paper's constant
    )
    weights: tuple[float, float, float] = (0.5, 0.5, 0.5)  # matched, mismatched, opposite; released code
    steps: int = 40  # ours, a minute for "offline" on one core; ten epochs of CC3M there, 14,000. 0 trains nothing: all q are 1/2
    batch_size: int = 64  # ours; 2,048 there
    lr: float = 3e-4  # this and the next two from the released command
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.2
    seed: int = 0

    def fit(self, encoder: Encoder, pairs: Pairs) -> Self:
        """Train the copy. ValueError for a record with neither caption nor label, or where nothing names the classes."""
        rows = self._lessons(encoder, pairs)  # what is wrong is said before any picture is opened
        return self._learn(encoder, encode_views(encoder, pairs)[0], *rows)

    def fit_features(self, encoder: Encoder, features: Tensor, pairs: Pairs) -> Self:
        """The same from features (N, D), unit rows of the pictures of `pairs`, which are then not opened."""
        rows = self._lessons(encoder, pairs)
        check_features(features, features)
        if len(features) != len(rows[1]):
            raise ValueError(f"there are {len(features)} features and {len(rows[1])} records")
        return self._learn(encoder, features, *rows)

    def _lessons(self, encoder: Encoder, pairs: Pairs) -> tuple[tuple[str, ...], list[Record], tuple[str, ...]]:
        """Class names, one record without its picture per picture, and all facts that they name."""
        tower = check_tunable(encoder)
        for name, value, known in (("rule", self.rule, ("ctw", "atd")), ("atd_compare", self.atd_compare, ("p", "qp"))):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        if self.tau is not None and not self.tau > 0:
            raise ValueError(f"tau={self.tau}: cosines are multiplied by it, so it must be positive")
        self._objective(())
        records = _without_pictures(pairs, ("id", "caption", "label", "says", "holds"))
        if not records:
            raise ValueError("there are no records to learn from")
        names = self.classes
        if names is None:
            names = tuple(sorted({str(record["label"]) for record in records if record["label"] is not None}))
            if not names:
                raise ValueError("no record has a label: say which classes to tell apart, classes=(...)")
        if isinstance(names, str) or len(names) != 1:  # one class alone is a fair question here: is it that, or not?
            check_classes(names)
        tower.tokenize(class_prompts(names, self._templates(1)), overflow="error")
        lessons = [self._lesson(i, record) for i, record in enumerate(records)]
        facts = sorted({fact for lesson in lessons for fact in (*lesson.get("says", ()), *lesson.get("holds", ()))})
        return tuple(names), lessons, tuple(facts)

    def _lesson(self, place: int, record: Record) -> Record:
        id, caption, label = str(place if record["id"] is None else record["id"]), record["caption"], record["label"]
        if caption is not None and not isinstance(caption, str):
            raise TypeError(f"record {id!r}: caption must be a string, not {caption!r}")
        if caption is None and label is None:
            raise ValueError(
                f"record {id!r} has neither 'caption' nor 'label': one of them says what is in the picture"
            )
        group = f"caption {caption}"
        if caption is None:
            written = ("{}",) if self.paired else prompts(str(label), self.templates)
            caption = written[int(unit_hash(self.seed, id) * len(written))].replace("{}", str(label))
            group = f"label {label}"  # different templates, one thing: not each other's "no"
        lesson = {"id": id, "caption": caption, "group": int(unit_hash(0, group) * 2**53)}
        told = {key: record[key] for key in ("says", "holds") if record[key] is not None}
        for key, value in told.items():
            if isinstance(value, str) or not isinstance(value, Iterable):
                raise TypeError(f"record {id!r}: {key} must be a list of facts, not {value!r}")
        return {**lesson, **{key: [str(fact) for fact in value] for key, value in told.items()}}

    def _objective(self, facts: Sequence[str]) -> SayNo:
        if self.paired is not None:
            return SayNoByHand(self.paired, self.weights, facts)
        template_set(self.templates)
        return SayNo(self.prompts, self.weights, facts)

    def _templates(self, side: Literal[0, 1]) -> Any:
        return self.templates if self.paired is None else tuple(pair[side] for pair in self.paired)

    def _learn(
        self, encoder: Encoder, features: Tensor, names: tuple[str, ...], lessons: list[Record], facts: tuple[str, ...]
    ) -> Self:
        frozen = cast(HFEncoder, encoder)
        empty: Record = {"says": [], "holds": []} if facts else {}
        rows = [{**empty, **lesson, "features": row} for lesson, row in zip(lessons, features, strict=True)]
        learnt = self._trained(frozen, rows, facts)
        self.state_ = {name: value.cpu() for name, value in changed_tensors(frozen, learnt._shell[0]).items()}
        self.encoder_ = frozen
        vars(self).pop("_no", None)
        self.prompts_ = _trimmed(learnt.prompt_no, frozen)
        self.trained_parameters_ = sum(p.numel() for p in learnt.parameters()) if self.steps else 0
        self.scale_ = float(encoder.scale.detach()) if self.tau is None else float(self.tau)
        self.logit_bias_ = 0.0 if encoder.bias is None else float(encoder.bias.detach())
        return self._take(names)

    def _trained(self, encoder: HFEncoder, rows: list[Record], facts: Sequence[str]) -> SayNo:
        objective = self._objective(facts)
        if self.steps == 0:
            return objective.bind(encoder)
        trainer = Train(
            objective,
            steps=self.steps,
            batch_size=min(self.batch_size, len(rows)),
            lr=self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            warmup=0,
            grad_clip=None,
            seed=self.seed,
            trainable=NOTHING,
            collate=getattr(objective, "collate", None) or _collate_with(("features", "group", *objective.fields)),
        )
        return cast(SayNo, trainer.run(encoder, rows).objective)

    def _take(self, names: Sequence[str]) -> Self:
        """Both heads for these classes: mean over templates of unit prompts, made unit again."""
        self.classes_ = tuple(names)
        no = self.no_encoder()
        self.text_ = zero_shot_head(cast(HFEncoder, self.encoder_), names, self._templates(0))
        with torch.no_grad(), added_to_words(no, self.prompts_.mean(0).to(no.device)):
            self.text_no_ = zero_shot_head(no, names, self._templates(1))
        return self

    def for_classes(self, names: Sequence[str]) -> Self:
        """The same for other classes, in training or not, by their names; shares what was learnt with this one."""
        self._check_fitted()
        other = self.clone()
        for name, value in vars(self).items():
            if name.endswith("_") or name == "_no":
                setattr(other, name, value)
        return other._take(names)

    def no_encoder(self) -> HFEncoder:
        """The encoder with the copy as its text tower, which shares all else; `prompts_.mean(0)` is for `added_to_words`."""
        self._check_fitted()
        if (frozen := getattr(self, "encoder_", None)) is None:
            raise ValueError("Clipn needs the model it was fitted on: load(folder, encoder)")
        found = cast("HFEncoder | None", vars(self).get("_no"))
        if found is None:
            found = self._no = with_tensors(cast(HFEncoder, frozen), self.state_)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_no"}

    def scores_of(self, features: Tensor) -> Tensor:
        return self.scale_ * features @ self.text_.T + self.logit_bias_

    @torch.no_grad()
    def logits(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features (B, D) -> yes and no, (B, K) each: scaled cosines. A bias would cancel between the two."""
        self._check_fitted()
        if features.ndim != 2 or features.shape[1] != self.text_.shape[1]:
            raise ValueError(f"features must be (B, {self.text_.shape[1]}), got {tuple(features.shape)}")
        return self.scale_ * features @ self.text_.T, self.scale_ * features @ self.text_no_.T

    def ood_scores(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels (B, 3, H, W) -> `ctw` and `atd`, (B,) in [0, 1], higher is more like a known class."""
        return self.ood_scores_features(self._see(pixels))

    def ood_scores_features(self, features: Tensor) -> dict[str, Tensor]:
        """The same from unit features (B, D)."""
        yes, no = self.logits(features)
        return {"ctw": competing_to_win(yes, no), "atd": agreeing_to_differ(yes, no)}

    def is_known(self, pixels: Tensor, rule: Literal["ctw", "atd"] | None = None) -> Tensor:
        """Pixels (B, 3, H, W) -> (B,) bool: of one of the classes, by this rule or the predictor's own."""
        return self.is_known_features(self._see(pixels), rule)

    def is_known_features(self, features: Tensor, rule: Literal["ctw", "atd"] | None = None) -> Tensor:
        """The same from unit features (B, D)."""
        yes, no = self.logits(features)
        if (rule or self.rule) == "atd":
            return atd_is_known(yes, no, self.atd_compare)
        return competing_to_win(yes, no) > 0.5

    @torch.no_grad()
    def _see(self, pixels: Tensor) -> Tensor:
        self._check_fitted()
        return cast(HFEncoder, self.encoder_).images(pixels).pooled.float().cpu()

    def _check_fitted(self) -> None:
        if not hasattr(self, "state_"):
            raise ValueError("Clipn has learnt nothing yet: call fit() first")

    @classmethod
    def tiny(cls) -> tuple[Clipn, list[Record]]:
        return cls(prompts=2, steps=3, batch_size=6), tiny_records()


# Small parts


def check_paired(paired: Sequence[Pair]) -> tuple[Pair, ...]:
    """Pairs of templates, each with a place for the name. ValueError says which is none."""
    pairs = tuple(tuple(pair) for pair in paired)
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"paired={paired!r}: give pairs of templates, such as ('a photo of {{}}', 'a photo of no {{}}')"
        )
    for side in (0, 1):
        template_set([pair[side] for pair in pairs])
    return cast("tuple[Pair, ...]", pairs)


def _pictures(encoder: Encoder, batch: Mapping[str, Any]) -> Features:
    return Features(batch["features"]) if "features" in batch else encoder.images(batch["image"])


def _asking(needs: set[str], fields: Sequence[str] = ()) -> Any:
    """What `collate` wants to know of an objective."""
    return SimpleNamespace(needs=needs, fields=fields)


def _collate_with(fields: Sequence[str]) -> Callable[[Encoder, list[Record]], Mapping[str, Any]]:
    def together(encoder: Encoder, records: list[Record]) -> Mapping[str, Any]:
        return collate(encoder, records, _asking({"text"}, fields))

    return together


def _without_pictures(pairs: Pairs, keys: Sequence[str]) -> list[Record]:
    """These fields of each record, None where it has none; opens no picture of `Records`, and walks once over all else."""
    cheap = cast(Pairs, pairs.undecoded()) if hasattr(pairs, "undecoded") else pairs
    return [{key: record.get(key) for key in keys} for record in cheap]


def _multi_hot(lists: Sequence[Sequence[str]], facts: Sequence[str]) -> Tensor:
    """B lists of facts -> (B, F) of zeros and ones."""
    place = {fact: k for k, fact in enumerate(facts)}
    found = torch.zeros(len(lists), len(facts))
    for row, own in enumerate(lists):
        if unknown := [fact for fact in own if fact not in place]:
            raise ValueError(f"facts that are none of the objective's: {', '.join(map(repr, unknown[:5]))}")
        found[row, [place[fact] for fact in own]] = 1
    return found


def _trimmed(table: Tensor | None, encoder: HFEncoder) -> Tensor:
    """(P, L, W) -> (P, L', W) without the positions at the end that no caption has reached; no prompts are one of zeros."""
    if table is None:
        return torch.zeros(1, 1, encoder.anatomy.text.width)
    used = table.detach().abs().sum((0, 2)).nonzero()
    return table.detach().cpu()[:, : int(used.max()) + 1 if len(used) else 1].contiguous().clone()
