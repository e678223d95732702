"""NoLA, "no labels attached": a self-supervised picture encoder teaches CLIP to name an unlabelled collection.

CLIP knows the names of classes, but sees coarsely; self-supervised features are finer, but nameless. So CLIP, with class
descriptions, names the few pictures it is surest of; a small head learns those names on the self-supervised features, in which
classes are purer, and so corrects the rest; and that head teaches CLIP's picture tower on strongly augmented views of all
pictures: a few visual prompts, the LayerNorms, and the classifier matrix. Afterwards the teacher is not needed any more.

`NoLA` is the whole; `build_cde`, `select_confident`, `train_labeller`, `Student` and `smoothed_cross_entropy` are its parts. With
teacher="clip" the tower learns from CLIP's own labels instead, the paper's rival (LaFTer, arXiv 2305.18287) in its essence.

Where paper and released code (`fazliimam/NoLA`) leave something open: 16 prompts as in the config, while a comment there says 50
for all experiments (uncertain); the second colour jitter of the strong view is taken as the first (uncertain); the released code
chooses its checkpoint, and stops, by labelled validation pictures, which is a leak: here training has a fixed length, or the
checkpoint is the one that agrees best with the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from ecliptic.core.batches import Order
from ecliptic.core.contracts import Pairs, Prediction, Record
from ecliptic.core.encoder import Encoder, HFEncoder
from ecliptic.core.feature_predictor import answer
from ecliptic.core.frozen_features import FEATURES, Phi, check_phi, default_phi
from ecliptic.core.method import Paper, method
from ecliptic.core.progress import Progress
from ecliptic.core.prompting import images_with_prompts
from ecliptic.core.train import Settings
from ecliptic.core.train import fit as train
from ecliptic.core.tuned import TunedPredictor, check_tunable
from ecliptic.core.zeroshot import prompts as prompts_of
from ecliptic.core.zeroshot import template_set
from ecliptic.data.shots import check_classes, tiny_records
from ecliptic.data.views import StrongBatches, encoded_strong_batches, weak_views

Descriptions = Mapping[str, Sequence[str]]

USUAL_NORM = 10.0  # about |z| of OpenAI's CLIP, which is what sets the temperature where z is not normalised
TEACHERS, SELECTIONS = ("labeller", "clip"), ("last", "agreement")


@method(
    Paper(
        "CLIP meets DINO for Tuning Zero-Shot Classifier using Unlabeled Image Collections",
        arxiv="2411.19346",
        year=2024,
    ),
    purpose="adapt to a collection of pictures without labels, given only the names (or descriptions) of its classes",
    claim="under a shift that hurts CLIP, a head on features that the shift spares is a better teacher than CLIP's own labels, "
    "and the tower it teaches beats zero-shot without a label",
)
@dataclass(eq=False)
class NoLA(TunedPredictor):
    """Learns from pictures alone; labels, if there are any, are not looked at.

    Scores are logits, C z as the student sees a picture. `phi` is needed in `fit` only: any frozen encoder of pictures, such as
    a DINO; by default the transformer inside "offline" (DINOv2's architecture), else designed features (`features`).
    "offline" pools a convolutional network, which prompts and LayerNorms do not reach: there C alone is tuned.

    classifier_ (K, D): C. prompts_ (V, W), V = 0 for none. gain_: see `Student`. tuned_: which of "prompts", "norms" and
    "classifier" were. labeller_: state of the `Labeller`, empty with teacher="clip". pseudo_labelled_: how many pictures of each
    class taught it. agreement_: with select="agreement", what share student and teacher named alike after each epoch.
    """

    classes: tuple[str, ...] = ()
    descriptions: Descriptions | None = (
        None  # class -> sentences about it, as an LLM writes them; the paper has about 50
    )
    templates: str | tuple[str, ...] = "photo"  # beside the sentences, each with the same weight as one of them
    teacher: Literal["labeller", "clip"] = "labeller"  # "clip": its own argmax, the control
    features: Literal["auto", "backbone", "handcrafted"] = "auto"  # which phi, where `fit` is given none
    least: int = 16  # pictures of a class that CLIP labels, at least
    share: float = 0.2  # and of N / K
    hidden: int = 256
    labeller_epochs: int = 50
    labeller_lr: float = 1e-3
    labeller_batch: int = 32
    prompts: int = 16  # visual prompt tokens; see above (uncertain)
    norms: bool = True  # tune the LayerNorms of the picture tower
    student_scale: float | None = None  # a number: of cosines; None: see `Student`
    smoothing: float = 0.1
    select: Literal["last", "agreement"] = "last"  # which epoch's student is kept; neither looks at a label
    epochs: int = 50
    batch_size: int = (
        64  # ours, so that a few hundred pictures make enough steps; the paper has 512. Fewer if there are fewer
    )
    lr: float = 4e-3
    weight_decay: float = 0.01  # of prompts, C and, as in the released code, the weights of LayerNorms; not of biases
    crop: tuple[float, float] = (0.2, 1.0)  # share of the area that a strong view keeps
    views: int = 4  # strong views of each picture, encoded once, where C alone is tuned; ours
    seed: int = 0

    def fit(self, encoder: Encoder, pairs: Pairs, *, phi: Phi | None = None) -> Self:
        """Learn from the pictures of `pairs`. ValueError for settings that make no sense, before any picture is opened."""
        self._check()
        tower = check_tunable(encoder)
        text = build_cde(tower, self.classes, self.descriptions, self.templates)
        records: Any = pairs if hasattr(pairs, "__getitem__") and hasattr(pairs, "__len__") else list(pairs)
        if not len(records):
            raise ValueError("there are no records to learn from")
        phi = phi or default_phi(tower, self.features)
        seen = look(tower, records, phi if self.teacher == "labeller" else None)
        labels, labeller = self._teach(tower, seen, text)

        student = self._student(tower, text, float(seen.norms.mean()))
        self._train(student, tower, records, labels)
        before = tower.state_dict()
        learnt = {name: value.detach() for name, value in student.encoder.named_parameters() if name in student.tuned}
        trained = sum(p.numel() for name, p in student.named_parameters() if student.trains(name))
        self._keep(encoder, self.classes, {n: v for n, v in learnt.items() if not v.equal(before[n])}, trained)
        self.classifier_ = student.classifier.detach().float().cpu().clone()
        self.prompts_ = student.prompts.detach().float().cpu().clone()
        self.gain_, self.labeller_ = student.gain, {} if labeller is None else dict(labeller.state_dict())
        self.tuned_ = student.parts
        return self

    def _check(self) -> None:
        if not self.classes:
            raise ValueError("NoLA needs classes=: the names of two or more classes, since there are no labels")
        check_classes(self.classes)
        template_set(self.templates)
        check_descriptions(self.classes, self.descriptions)
        for name, known in (("teacher", TEACHERS), ("select", SELECTIONS), ("features", FEATURES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(known)}")
        for name in ("least", "hidden", "labeller_epochs", "labeller_batch", "epochs", "batch_size", "views"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("prompts", "share", "labeller_lr", "lr", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop={self.crop}: least and largest share of the area, above 0 and at most 1")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing={self.smoothing}: it goes from 0 to below 1")
        if self.student_scale is not None and not self.student_scale > 0:
            raise ValueError(f"student_scale={self.student_scale}: must be positive, or None for the tower's own")

    def _teach(self, encoder: HFEncoder, seen: Seen, text: Tensor) -> tuple[Tensor, Labeller | None]:
        """Labels (N,) of all pictures from their weak views alone, and who gave them."""
        with torch.no_grad():
            probabilities = (float(encoder.scale) * seen.clip @ text.T).softmax(-1)
        chosen = select_confident(
            probabilities, pseudo_label_count(len(probabilities), len(text), self.least, self.share)
        )
        self.pseudo_labelled_ = tuple(torch.bincount(chosen.labels, minlength=len(text)).tolist())
        if seen.features is None:
            return probabilities.argmax(-1), None
        labeller = train_labeller(
            seen.features[chosen.rows],
            chosen.labels,
            Labeller(seen.features.shape[1], len(text), self.hidden, self.seed).standardised(seen.features),
            epochs=self.labeller_epochs,
            lr=self.labeller_lr,
            batch_size=self.labeller_batch,
            seed=self.seed,
        )
        return labeller.label(seen.features), labeller

    def _student(self, encoder: HFEncoder, text: Tensor, norm: float) -> Student:
        reached = not encoder.anatomy.image.joined
        start = first_prompts(self.prompts if reached else 0, encoder.anatomy.image.width, self.seed)
        gain = self.student_scale or max(1.0, USUAL_NORM / norm)
        return Student(encoder.clone(), text, start, gain, self.student_scale is not None, self.norms and reached)

    def _train(self, student: Student, encoder: HFEncoder, records: Any, labels: Tensor) -> None:
        size = min(self.batch_size, len(records))
        batches: Any = StrongBatches(encoder, records, labels, size, self.seed, self.crop)
        if len(student.parts) == 1:  # z of a view is the same in every epoch
            batches = encoded_strong_batches(encoder, records, labels, size, self.views, self.seed, self.crop)
        per_epoch = len(records) // size
        best: dict[str, Any] = {"agreement": -1.0}

        def agreement() -> dict[str, float]:
            with torch.no_grad():
                said = [
                    student(pixels.to(encoder.device)).argmax(-1).cpu() for _, pixels in weak_views(encoder, records)
                ]
            found = float((torch.cat(said) == labels).double().mean())
            if found > best["agreement"]:
                own = {name: p.detach().clone() for name, p in student.named_parameters() if student.trains(name)}
                best.update(agreement=found, state=own)
            return {"agreement": found}

        def loss(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            logits = student(batch["pixels"]) if "pixels" in batch else student.head(batch["z"])
            return {"cross_entropy": smoothed_cross_entropy(logits, batch["label"], self.smoothing)}

        chooses = self.select == "agreement"
        log = train(
            student,
            loss,
            batches,
            Settings(
                steps=self.epochs * per_epoch,
                weight_decay=self.weight_decay,
                groups={r"^encoder\..*weight$": {"weight_decay": self.weight_decay}}
                if "norms" in student.parts
                else {},
                evaluate_every=per_epoch if chooses else 0,
                lr=self.lr,
                **_PLAIN,
                seed=self.seed,
            ),
            trainable=lambda name, _: student.trains(name),
            evaluate=agreement if chooses else None,
            title="student",
            unit="pictures",
        )
        self.agreement_ = tuple(row["evaluate"]["agreement"] for row in log if "evaluate" in row)
        if chooses:
            student.load_state_dict(best["state"], strict=False)

    @torch.no_grad()
    def predict(self, pixels: Tensor, classes: Sequence[str] | None = None) -> Prediction:
        """Pixels (B, 3, H, W), as `encoder.preprocess` gives them -> the student's logits (B, K), and labels.

        classes: answer among these only, in this order. For names not learnt, see `for_classes`.
        """
        seen = images_with_prompts(self._encoder(), pixels, self.prompts_, normed=False, normalize=False)
        return answer(self.scores_of(seen.pooled.float().cpu()), self.classes_, classes)

    def scores_of(self, features: Tensor) -> Tensor:
        """z (B, D) of the student, not normalised -> (B, K)."""
        z = normalize(features, dim=-1) if self.student_scale is not None else features
        return self.gain_ * z @ self.classifier_.T

    def for_classes(self, names: Sequence[str], descriptions: Descriptions | None = None) -> Self:
        """The same student for other classes. Where all names are among those learnt, their rows of C; else rows from text.

        Trained rows and rows from text do not share a scale, so they are not mixed. descriptions: of the new names; None for
        those of the settings.
        """
        known = set(names) <= set(self.classes_)
        other = super().for_classes(names)
        if descriptions is not None:
            other.descriptions = descriptions
            other.text_ = other.class_rows(self._encoder(), names)
        place = {name: k for k, name in enumerate(self.classes_)}
        other.classifier_ = self.classifier_[[place[name] for name in names]] if known else other.text_
        return other

    def class_rows(self, tuned: HFEncoder, names: Sequence[str]) -> Tensor:
        described = {name: said for name, said in (self.descriptions or {}).items() if name in names}
        return build_cde(tuned, names, described, self.templates)

    @classmethod
    def tiny(cls) -> tuple[NoLA, list[Record]]:
        return cls(("red", "green", "blue"), prompts=2, epochs=2, batch_size=6, labeller_epochs=3), tiny_records()


# 1. Words


def build_cde(
    encoder: HFEncoder, classes: Sequence[str], descriptions: Descriptions | None = None, templates: Any = "photo"
) -> Tensor:
    """Class description embeddings (K, D), unit rows: the mean of all unit sentences of a class, made unit again.

    Sentences are those of `descriptions` and the filled templates, each counted once, so that many descriptions drown few
    templates (as in the released "cdte" mode). A class without descriptions has its templates alone: without any this is
    `zero_shot_head`. Raises ValueError as `check_descriptions` does, and TextTooLong for a sentence the tower cannot read whole.
    """
    check_descriptions(classes, descriptions)
    said = [[*(descriptions or {}).get(name, ()), *prompts_of(name, templates)] for name in classes]
    rows = encoder.encode_texts([text for texts in said for text in texts], overflow="error")
    return normalize(torch.stack([part.mean(0) for part in rows.split([len(texts) for texts in said])]), dim=-1)  # type: ignore[no-untyped-call]


def check_descriptions(classes: Sequence[str], descriptions: Descriptions | None) -> None:
    """Raise a ValueError that names the class whose descriptions are none of the classes, no list, or empty."""
    for name, sentences in (descriptions or {}).items():
        if name not in classes:
            raise ValueError(f"descriptions has {name!r}, which is none of the classes {', '.join(classes[:5])} ...")
        if isinstance(sentences, str) or not all(isinstance(s, str) and s.strip() for s in sentences):
            raise ValueError(f"descriptions[{name!r}] must be a list of sentences, none of them empty")


# 2. Which pictures CLIP labels


class Chosen(NamedTuple):
    """Pictures by their places (n,), each at most once, and their pseudo-labels (n,)."""

    rows: Tensor
    labels: Tensor


def pseudo_label_count(pictures: int, classes: int, least: int = 16, share: float = 0.2) -> int:
    """Pictures that CLIP labels per class: max(16, floor(0.2 N / K))."""
    return max(least, math.floor(share * pictures / classes))


def select_confident(probabilities: Tensor, per_class: int) -> Chosen:
    """(N, K) -> for every class the `per_class` pictures predicted as it with the highest probability.

    A class that is nobody's first prediction takes those whose second prediction it is, or third. A picture chosen for two
    classes keeps the first of them, in the order of classes. A class may still get nothing.
    """
    ranked = probabilities.argsort(dim=-1, descending=True, stable=True)[:, :3]
    rows: list[int] = []
    labels: list[int] = []
    taken: set[int] = set()
    for k in range(probabilities.shape[1]):
        candidates = next((found for place in ranked.T if len(found := (place == k).nonzero()[:, 0])), None)
        if candidates is None:
            continue
        order = probabilities[candidates, k].argsort(descending=True, stable=True)[:per_class]
        mine = [row for row in candidates[order].tolist() if row not in taken]
        taken.update(mine)
        rows += mine
        labels += [k] * len(mine)
    return Chosen(torch.tensor(rows, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64))


# 3. The labeller


class Labeller(nn.Module):
    """h: (B, d) features -> (B, K) logits, W2 relu(W1 x + b1) + b2.

    Features are first centred and scaled by `mean` and `spread`, 0 and 1 until `standardised`, which is ours: those of DINO, the
    paper's, are nearly so by themselves, others are not. Weights start as torch's linear layers do, drawn from `seed`.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, width: int, classes: int, hidden: int = 256, seed: int = 0):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.first, self.second = nn.Linear(width, hidden, device="meta"), nn.Linear(hidden, classes, device="meta")
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.first, self.second):
            bound = layer.in_features**-0.5
            for name, value in layer.named_parameters():
                start = (2 * torch.rand(value.shape, generator=generator) - 1) * bound
                setattr(layer, name, nn.Parameter(start))

    def standardised(self, features: Tensor) -> Self:
        """Take mean and spread from features (N, d); directions in which they do not vary are left unscaled."""
        self.mean, spread = features.mean(0), features.std(0, correction=0)
        self.spread = torch.where(spread > 1e-6 * spread.max().clamp_min(1e-12), spread, torch.ones_like(spread))
        return self

    def forward(self, features: Tensor) -> Tensor:
        hidden: Tensor = self.first((features - self.mean) / self.spread)
        return cast(Tensor, self.second(hidden.relu()))

    @torch.no_grad()
    def label(self, features: Tensor) -> Tensor:
        """(N, d) -> (N,) int64: the label of each."""
        return cast(Tensor, self(features)).argmax(-1)


def train_labeller(
    features: Tensor,
    labels: Tensor,
    labeller: Labeller,
    *,
    epochs: int = 50,
    lr: float = 1e-3,
    batch_size: int = 32,
    seed: int = 0,
) -> Labeller:
    """Train in place by cross-entropy on features (n, d) and labels (n,) with Adam; gives the labeller back."""
    order = Order(len(labels), min(batch_size, len(labels)), seed)

    def batch(i: int) -> dict[str, Tensor]:
        rows = torch.from_numpy(order(i))
        return {"features": features[rows], "label": labels[rows]}

    def loss(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"cross_entropy": smoothed_cross_entropy(labeller(given["features"]), given["label"], 0.0)}

    how = Settings(steps=epochs * order.per_epoch, lr=lr, weight_decay=0.0, **_PLAIN, seed=seed)
    train(labeller, loss, batch, how, title="labeller", unit="pictures")
    return labeller


# torch's own Adam at a constant rate: the released schedule has no milestones
_PLAIN: dict[str, Any] = {
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "schedule": "constant",
    "warmup": 0,
    "grad_clip": None,
}


# 4. The student


class Student(nn.Module):
    """CLIP's picture tower with prompts among its patches, and a classifier without bias: pixels (B, 3, H, W) -> (B, K).

    classifier: C (K, D), starts as the class embeddings. prompts: (V, W), put behind position embeddings and pre-LayerNorm
    (section 4 of the released model), dropped after the last block: SigLIP's pooling head does not see them. norms: tune every
    LayerNorm of the tower, that of SigLIP's pooling head included.
    Logits are gain * C z. Unit z (`cosine`) make gain a scale of cosines. Otherwise |z| sets the temperature: released code has
    gain 1 for |z| of about 10; `NoLA` lifts towers with smaller z to that (ours).
    """

    def __init__(
        self, encoder: HFEncoder, classifier: Tensor, prompts: Tensor, gain: float, cosine: bool, norms: bool = True
    ):
        super().__init__()
        self.encoder, self.gain, self.cosine = encoder, gain, cosine
        self.classifier = nn.Parameter(classifier.clone().to(encoder.device))
        self.prompts = nn.Parameter(prompts.clone().to(encoder.device))
        self.tuned = norm_names(encoder) if norms else frozenset()
        self.parts = (
            *(("prompts",) if len(prompts) else ()),
            *(("norms",) if self.tuned else ()),
            "classifier",
        )

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.encoder.eval()  # as in the released code: no dropout while the tower learns
        return self

    def trains(self, name: str) -> bool:
        """Whether a parameter of this module, by its name, is trained."""
        return name in self.parts or name.removeprefix("encoder.") in self.tuned

    def forward(self, pixels: Tensor) -> Tensor:
        z = images_with_prompts(self.encoder, pixels, self.prompts, normed=False, normalize=False).pooled
        return self.head(z)

    def head(self, z: Tensor) -> Tensor:
        """(B, D), as the tower gives it -> (B, K)."""
        return self.gain * (normalize(z, dim=-1) if self.cosine else z) @ self.classifier.T


def norm_names(encoder: HFEncoder) -> frozenset[str]:
    """The parameters of all LayerNorms of the picture tower, by their names in the encoder."""
    tower = encoder.anatomy.image.module
    norms = {id(p) for module in tower.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    return frozenset(name for name, p in encoder.named_parameters() if id(p) in norms)


def first_prompts(count: int, width: int, seed: int = 0) -> Tensor:
    """(V, W) uniform in [-v, v], v = sqrt(6 / (3 * 16 * 16 + W)), whatever the patch size (released code)."""
    bound = math.sqrt(6 / (3 * 16 * 16 + width))
    return (2 * torch.rand(count, width, generator=torch.Generator().manual_seed(seed)) - 1) * bound


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.1) -> Tensor:
    """(B, K), (B,) -> scalar in nats: mean of (1 - e) * -log p[label] + e / K * sum over k of -log p[k]."""
    target = (1 - smoothing) * one_hot(labels, logits.shape[-1]) + smoothing / logits.shape[-1]
    return -(target * logits.log_softmax(-1)).sum(-1).mean()


# Both frozen encoders


class Seen(NamedTuple):
    """Weak views of N pictures: unit features (N, D) of CLIP, |z| (N,) before they were made unit, features (N, d) of phi."""

    clip: Tensor
    norms: Tensor
    features: Tensor | None


@torch.no_grad()
def look(encoder: HFEncoder, records: Pairs, phi: Phi | None = None) -> Seen:
    """Every picture once, as CLIP prepares it, through both frozen encoders; rows in the order of the records."""
    z, features = [], []
    with Progress("looking at pictures", len(cast(Any, records)), unit="pictures") as bar:
        for pictures, pixels in weak_views(encoder, records):
            z.append(encoder.images(pixels, normalize=False).pooled.float().cpu())
            if phi is not None:
                features.append(check_phi(phi(pictures), len(pictures)))
            bar.advance(len(pictures))
    pooled = torch.cat(z)
    return Seen(normalize(pooled, dim=-1), pooled.norm(dim=-1), torch.cat(features) if features else None)
