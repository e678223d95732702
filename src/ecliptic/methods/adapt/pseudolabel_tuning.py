"""Pseudolabel tuning (FPL, IFPL, GRIP): the model's own answers label pictures, and prompts are tuned on the surest of them.

Which answers are believed decides everything. A global threshold of confidence keeps the classes that the model knows anyway, and
makes the poor ones poorer; the K surest pictures *of each class* give every class the same say. GRIP repeats that with a
growing K, labelling anew with the prompts learnt so far, until the whole pool takes part.

One loss serves three settings: `ssl`, a few labelled pictures of all classes beside the pool; `trzsl`, labels for some classes
and a pool of the others; `ul`, no labels at all. `select_top_k`, `grip_schedule` and `unified_loss` are the paper's equations on
plain tensors.

Where the paper and its released code differ we follow the paper: pictures for a class are chosen by the clean form of top-K,
independent of the order of the pool (the released lists are only sorted once they overflow); gamma is |pseudo| / |labelled|
in all strategies. (uncertain) Whether prompts start afresh in each round, see `restart`, and how many epochs the iterative
strategies take: the released configs have 150 in every round, the paper may mean 50.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ecliptic.core.batches import Order
from ecliptic.core.contracts import Pairs, Record, Tokens
from ecliptic.core.encoder import Encoder, HFEncoder, open_picture
from ecliptic.core.method import Paper, method
from ecliptic.core.prompt_classifier import class_rows, first_context, logit_scale
from ecliptic.core.prompt_learning import (
    PromptPredictor,
    Prompts,
    UnifiedPrompts,
    Vectors,
    encode_with_prompts,
    first_visual,
    learn_prompts,
)
from ecliptic.core.prompting import check_promptable, with_context
from ecliptic.core.train import Settings
from ecliptic.core.zeroshot import class_prompts, template_set, zero_shot_head
from ecliptic.data.shots import check_classes, check_features, encode_views, partial_labels, tiny_records

PARADIGMS = ("ssl", "trzsl", "ul")
STRATEGIES = ("fpl", "ifpl", "grip")
MODALITIES = ("text", "image", "multi")
SELECTIONS = ("top_k", "confidence")
RATES = {"text": 0.1, "image": 0.1, "multi": 0.01}  # learning rates of the released configs
COUNTS = {"text": 16, "image": 16, "multi": 4}  # prompts of each kind, same source
WARMUP = 5 / 150  # five epochs of 150, same source; there by the epoch, here by the update
HELD_FROM = 10  # the released code holds pictures out where K is at least this


@method(
    Paper(
        "Enhancing CLIP with CLIP: Exploring Pseudolabeling for Limited-Label Prompt Tuning",
        arxiv="2306.01669",
        year=2023,
    ),
    purpose="name pictures better without labels, or with few, by tuning prompts on the model's own surest answers",
    claim="without labels, the surest pictures of each class in growing number (GRIP) beat a few of them (FPL) and zero-shot, "
    "and lift the worst classes most; a global confidence threshold does not",
)
@dataclass(eq=False)
class PseudolabelTuning(PromptPredictor):
    """Learns from records with `image`; those with a `label` are labelled ("ul" does not look), the others are the pool.

    rounds_: for each round k (C,), pictures wanted of each class; rows (n,), which records; labels (n,), positions in `classes_`;
    confidence (n,) in [0, 1]; held_out_accuracy, or None. The pictures are encoded once where only words are learnt.
    """

    classes: tuple[str, ...] | None = None  # all names to choose among; None, in ssl only: the labels found, sorted
    paradigm: Literal["ssl", "trzsl", "ul"] = "ul"
    strategy: Literal["fpl", "ifpl", "grip"] = "grip"
    modality: Literal["text", "image", "multi"] = "text"  # which prompts are learnt; multi: both, by UPT
    templates: str | tuple[str, ...] = "photo"  # prompts of the first labels, and of "image" throughout
    template: str = "{}"  # the class name as it follows the learnt context
    start: str | None = "a photo of a"  # words the context starts from; None, the paper's: drawn, as always in multi
    count: int | None = None  # context vectors; None: as many as `start` has tokens, else 16, in multi 4
    visual_count: int | None = None  # visual prompts; None: 16, in multi 4
    top_k: int = 16  # pictures per class, fpl and ifpl
    quantile: int = 20  # percent of the pool by which GRIP grows; 100 // quantile rounds, of ifpl too; the paper has 10
    selection: Literal["top_k", "confidence"] = "top_k"  # "confidence" takes as many, whatever class: for comparison
    priors: Mapping[str, float] | None = None  # how frequent classes are, by name, for skewed pools; None: all alike
    gamma: float | None = None  # weight of the labelled mean; None: as `loss_weights` says
    lam: float | None = None  # weight of the pseudolabelled mean (lambda); None: likewise
    restart: bool = True  # each round from the first values, as "re-initialised" is read here (uncertain); False: go on
    held_out: float = 0.0  # ours; released: 0.2 of the labels, and of the pseudolabels where K >= 10, for a mere report
    epochs: int = 6  # of each round; ours, a minute for 20 classes with 8 pictures each; the paper has 150
    batch_size: int = 16
    lr: float | None = None  # None: 0.1, in multi 0.01
    momentum: float = 0.9
    weight_decay: float = 0.1
    tau: float | None = None  # what cosines are multiplied by; None: CLIP's 100, SigLIP's own scale
    seed: int = 0

    def fit(self, encoder: Encoder, pairs: Pairs) -> Self:
        """Learn from records; what is wrong with them or the settings is said before any picture is opened."""
        if self.paradigm == "ul" and self.classes is None:
            raise ValueError("paradigm='ul' needs classes=: the names to choose among, since labels are not looked at")
        names, labels = partial_labels(pairs, self.classes, ignore=self.paradigm == "ul")
        tower, task = self._checked(encoder, names), self._task(names, labels)
        pool: Pool
        if self.modality == "text":
            pool = _Features(encode_views(tower, pairs)[0])
        else:
            pool = _Pictures(tower, pairs)
        return self._learn(tower, names, task, pool)

    def fit_features(
        self, encoder: Encoder, features: Tensor, labels: Tensor | None = None, *, classes: Sequence[str] | None = None
    ) -> Self:
        """The same from unit features (N, D) of the frozen tower, textual prompts only. labels (N,) int64, positions in `classes`
        (by default the setting's), -1 for none; None: no labels at all."""
        if self.modality != "text":
            raise ValueError(f"modality={self.modality!r} changes the features of pictures: use fit(encoder, pairs)")
        names = classes if classes is not None else self.classes
        if names is None:
            raise ValueError("classes is missing: the names are what prompts are made of")
        check_classes(names)
        if labels is None or self.paradigm == "ul":
            labels = torch.full((len(features),), -1)
        if labels.shape != (len(features),) or labels.is_floating_point() or int(labels.max()) >= len(names):
            raise ValueError(f"labels must be ({len(features)},) integers below {len(names)}, -1 for none")
        tower, task = self._checked(encoder, names), self._task(names, labels)
        check_features(features, features.new_zeros(len(names), tower.dim))
        return self._learn(tower, names, task, _Features(features))

    def _learn(self, tower: HFEncoder, names: Sequence[str], task: Task, pool: Pool) -> Self:
        """Label, train, label anew, for as many rounds as the strategy has."""
        scale = logit_scale(tower.scale.detach(), tower.bias, self.tau)
        text = zero_shot_head(tower, names, self.templates)
        tokens = tower.tokenize(class_prompts(names, self.template), overflow="error")
        prompts, rounds = self._prompts(tower), self._schedule(task)
        vectors, rows = Vectors(), text
        self.rounds_: list[dict[str, Any]] = []
        for i, k in enumerate(rounds):
            chosen = self._choose(tower, task, pool.encoded(task.unlabelled, vectors.visual), rows, k, float(scale))
            if i and self.restart:
                prompts = self._prompts(tower)
            train, held = split_held_out(task, chosen, self.held_out, k >= HELD_FROM, _mixed(self.seed, i))
            self._train(tower, prompts, text if self.modality == "image" else tokens, train, pool, scale, i)
            with torch.no_grad():
                vectors = cast(Vectors, prompts())
                rows = text if vectors.context is None else class_rows(tower, vectors.context, tokens).float().cpu()
            self.rounds_.append(
                {
                    "k": torch.tensor(task.counts(k)),
                    "rows": task.unlabelled[chosen.rows],
                    "labels": chosen.labels,
                    "confidence": chosen.confidence,
                    "held_out_accuracy": held_out_accuracy(held, pool, vectors, rows),
                }
            )
        return self._hold(tower, prompts, names, scale)

    def _choose(
        self, tower: HFEncoder, task: Task, features: Tensor, rows: Tensor, k: int, scale: float
    ) -> PseudoLabels:
        """Pseudolabels of the pool, among the classes that want some; labels are positions among all."""
        bias = None if tower.bias is None else float(tower.bias.detach())
        sure = log_odds(scale * features.double() @ rows[task.wanted].double().T, bias)
        counts = task.counts(k)
        chosen = select_top_k(sure, counts) if self.selection == "top_k" else select_surest(sure, sum(counts))
        return chosen._replace(labels=task.wanted[chosen.labels])

    def _train(
        self,
        tower: HFEncoder,
        prompts: nn.Module,
        classes: Tokens | Tensor,
        data: Examples,
        pool: Pool,
        scale: Tensor | float,
        i: int,
    ) -> None:
        gamma, lam = loss_weights(self.paradigm, int(data.labelled.sum()), int((~data.labelled).sum()))
        gamma = gamma if self.gamma is None else self.gamma
        lam = lam if self.lam is None else self.lam
        seed = _mixed(self.seed, i)
        order = Order(len(data.rows), min(self.batch_size, len(data.rows)), seed)

        def batches(step: int) -> dict[str, Tensor]:
            at = torch.from_numpy(order(step))
            return {"image": pool.batch(data.rows[at]), "target": data.target[at], "labelled": data.labelled[at]}

        def loss(logits: Tensor, batch: Mapping[str, Any]) -> dict[str, Tensor]:
            return unified_loss(logits, batch["target"], batch["labelled"], gamma, lam)

        how = Settings(
            steps=self.epochs * order.per_epoch,
            lr=RATES[self.modality] if self.lr is None else self.lr,
            optimizer="sgd",
            betas=(self.momentum, 0.999),
            groups={"": {"weight_decay": self.weight_decay}},  # of UPT's vectors too, as in the released code
            warmup=WARMUP,
            grad_clip=None,
            seed=seed,
        )
        title = f"{self.strategy}, round {i + 1}"
        learn_prompts(tower, prompts, classes, batches, loss, how, scale=scale, title=title)

    def _prompts(self, tower: HFEncoder) -> nn.Module:
        """The prompts at their start."""
        words = COUNTS[self.modality] if self.count is None else self.count
        marks = COUNTS[self.modality] if self.visual_count is None else self.visual_count
        if self.modality == "image":
            return Prompts(visual=first_visual(tower, marks, self.seed))
        if self.modality == "text":
            return Prompts(first_context(tower, self.start, self.count, self.seed))
        visual = first_visual(tower, marks, self.seed, "uniform")
        return UnifiedPrompts(first_context(tower, None, words, self.seed), visual, seed=self.seed)

    def _schedule(self, task: Task) -> tuple[int, ...]:
        """K of each round."""
        rounds = 100 // self.quantile
        if self.strategy == "grip":
            return grip_schedule(len(task.unlabelled), len(task.wanted), rounds)
        return (min(self.top_k, len(task.unlabelled)),) * (rounds if self.strategy == "ifpl" else 1)

    def _task(self, names: Sequence[str], labels: Tensor) -> Task:
        """Who is labelled, who is not, and which classes want pseudolabels. ValueError where the paradigm does not fit."""
        known = sorted(set(labels[labels >= 0].tolist()))
        wanted = [c for c in range(len(names)) if self.paradigm != "trzsl" or c not in known]
        if self.paradigm != "ul" and not known:
            raise ValueError(f"paradigm={self.paradigm!r} needs records with a `label`, and there are none: use 'ul'")
        if not wanted:
            raise ValueError(
                f"paradigm='trzsl' is for classes without labels, and all {len(names)} have some: use 'ssl', or more classes="
            )
        unlabelled = (labels < 0).nonzero()[:, 0]
        if not len(unlabelled):
            raise ValueError(
                "every record has a label: unlabelled ones, whose `label` is None, are what this learns from"
            )
        priors = None
        if self.priors is not None:
            if missing := [names[c] for c in wanted if not self.priors.get(names[c], 0) > 0]:
                raise ValueError(f"priors needs a positive share of {', '.join(map(repr, missing[:5]))}")
            if unknown := sorted(set(self.priors) - set(names)):
                raise ValueError(f"priors names {unknown[0]!r}, which is none of the classes")
            priors = tuple(float(self.priors[names[c]]) for c in wanted)
        return Task(labels, unlabelled, torch.tensor(wanted), priors)

    def _checked(self, encoder: Encoder, names: Sequence[str]) -> HFEncoder:
        """The encoder, once it is known that training can begin."""
        known = {"paradigm": PARADIGMS, "strategy": STRATEGIES, "modality": MODALITIES, "selection": SELECTIONS}
        for setting, choices in known.items():
            if getattr(self, setting) not in choices:
                raise ValueError(f"{setting}={getattr(self, setting)!r}: choose one of {', '.join(choices)}")
        for setting in ("epochs", "batch_size", "top_k"):
            if getattr(self, setting) < 1:
                raise ValueError(f"{setting}={getattr(self, setting)}: must be at least 1")
        if not 1 <= self.quantile <= 100:
            raise ValueError(f"quantile={self.quantile}: percent of the pool by which GRIP grows, 1 to 100")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: a share, at least 0 and below 1")
        for setting in ("gamma", "lam"):
            if getattr(self, setting) is not None and getattr(self, setting) < 0:
                raise ValueError(f"{setting}={getattr(self, setting)}: a weight of the loss, not negative")
        for setting in ("count", "visual_count"):
            if getattr(self, setting) is not None and getattr(self, setting) < 1:
                raise ValueError(f"{setting}={getattr(self, setting)}: must be at least 1")
        template_set(self.templates)
        tower = check_promptable(encoder, image=self.modality != "text")
        tokens = tower.tokenize(class_prompts(names, self.template), overflow="error")
        with torch.no_grad():
            if (context := cast(Vectors, self._prompts(tower)()).context) is not None:
                with_context(tower, context, tokens)  # raises where both together are too long
        return tower

    @classmethod
    def tiny(cls) -> tuple[PseudolabelTuning, list[Record]]:
        settings: dict[str, Any] = {"start": None, "count": 2, "quantile": 50, "epochs": 2, "batch_size": 4}
        return cls(classes=("red", "green", "blue"), **settings), tiny_records()


# The mathematics, on plain tensors


class PseudoLabels(NamedTuple):
    """rows (n,): positions in the pool, one possibly several times. labels (n,): the class each is taken for. confidence (n,)."""

    rows: Tensor
    labels: Tensor
    confidence: Tensor


def log_odds(logits: Tensor, bias: float | None = None) -> Tensor:
    """(N, C) -> (N, C) float64: log p / (1 - p), which ranks as the probabilities do and tells apart those that round to 1.

    p is the softmax over the classes; with a logit bias (SigLIP), or where there is but one class, the sigmoid of each.
    """
    logits = logits.double()
    if bias is not None or logits.shape[1] == 1:
        return logits + (bias or 0.0)
    best, top = logits.max(-1, keepdim=True)
    others = logits.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)  # of all but the best
    log_p = logits - torch.logaddexp(best, others)
    return (log_p - torch.log1p(-log_p.exp())).scatter(-1, top, best - others)  # p is at most 1/2 but for the best


def select_top_k(scores: Tensor, counts: Sequence[int]) -> PseudoLabels:
    """Scores (N, C), higher is surer, as `log_odds` gives them, -> counts[c] pictures of each class c, class by class.

    First the best of those whose best class it is; where these are too few, the best of all others. So every class gets its
    number even if it is nobody's best, and a picture may serve several; all are taken where counts[c] >= N. Among equals the
    earlier.
    """
    own, rows, labels = scores.argmax(-1), [], []
    for c, count in enumerate(counts):
        order = scores[:, c].argsort(descending=True, stable=True)
        mine = own[order] == c
        taken = torch.cat([order[mine], order[~mine]])[:count]
        rows.append(taken)
        labels.append(torch.full_like(taken, c))
    row, label = torch.cat(rows), torch.cat(labels)
    return PseudoLabels(row, label, scores[row, label].sigmoid().float())


def select_surest(scores: Tensor, count: int) -> PseudoLabels:
    """Scores (N, C) -> the `count` pictures with the highest score of their best class, whichever that is: no balance."""
    best, label = scores.max(-1)
    rows = best.argsort(descending=True, stable=True)[:count]
    return PseudoLabels(rows, label[rows], best[rows].sigmoid().float())


def grip_schedule(pool: int, classes: int, rounds: int) -> tuple[int, ...]:
    """K_i = floor(i * floor(|U| / I) / C) for i = 1 ... I, section 3.3; at most floor(|U| / C), and at least 1 (ours)."""
    return tuple(max(1, min(i * (pool // rounds) // classes, pool // classes)) for i in range(1, rounds + 1))


def loss_weights(paradigm: str, labelled: int, pseudo: int) -> tuple[float, float]:
    """(gamma, lambda), section 3.1: ssl |pseudo| / |labelled| and 1; trzsl 1 and |labelled| / |pseudo|; ul 0 and 1."""
    if paradigm == "ul" or not labelled:
        return 0.0, 1.0
    return (pseudo / labelled, 1.0) if paradigm == "ssl" else (1.0, labelled / pseudo)


def unified_loss(logits: Tensor, target: Tensor, labelled: Tensor, gamma: float, lam: float) -> dict[str, Tensor]:
    """logits (B, C), target (B,), labelled (B,) bool -> gamma * mean CE of the labelled and lambda * mean CE of the others,
    in nats; a mean over nothing is 0 (section 3.1)."""
    losses = cross_entropy(logits, target, reduction="none")
    means = (losses * part / part.sum().clamp(min=1) for part in (labelled, ~labelled))
    return {name: w * mean.sum() for name, w, mean in zip(("labelled", "pseudo"), (gamma, lam), means, strict=True)}


class Task(NamedTuple):
    """labels (N,), -1 for none; unlabelled (U,), their positions; wanted (C',): the classes to pseudolabel; their priors."""

    labels: Tensor
    unlabelled: Tensor
    wanted: Tensor
    priors: tuple[float, ...] | None = None

    def counts(self, k: int) -> list[int]:
        """How many pictures each class gets where `k` is the mean: k each, or by the priors, largest remainders first."""
        if self.priors is None:
            return [k] * len(self.wanted)
        shares = [k * len(self.priors) * prior / sum(self.priors) for prior in self.priors]
        found = [floor(share) for share in shares]
        for c in sorted(range(len(shares)), key=lambda c: found[c] - shares[c])[: k * len(shares) - sum(found)]:
            found[c] += 1
        return [max(1, n) for n in found]


class Examples(NamedTuple):
    """What one round learns from, or is judged on: rows (n,) of all records, target (n,), labelled (n,) bool."""

    rows: Tensor
    target: Tensor
    labelled: Tensor


def split_held_out(
    task: Task, chosen: PseudoLabels, share: float, of_pseudo: bool, seed: int
) -> tuple[Examples, Examples]:
    """(to learn from, held out): `share` of the labelled and, if so wished, of the pseudolabelled, at random."""
    known = (task.labels >= 0).nonzero()[:, 0]
    rows = torch.cat([known, task.unlabelled[chosen.rows]])
    target = torch.cat([task.labels[known], chosen.labels])
    labelled = torch.arange(len(rows)) < len(known)
    generator, held = torch.Generator().manual_seed(seed), torch.zeros(len(rows), dtype=torch.bool)
    for part, wanted in ((labelled.nonzero()[:, 0], True), ((~labelled).nonzero()[:, 0], of_pseudo)):
        if wanted:
            held[part[torch.randperm(len(part), generator=generator)][: int(share * len(part))]] = True
    examples = [Examples(rows[side], target[side], labelled[side]) for side in (~held, held)]
    return examples[0], examples[1]


def held_out_accuracy(held: Examples, pool: Pool, vectors: Vectors, rows: Tensor) -> float | None:
    """Share of the held-out pictures that are given the label they carry, true or pseudo; None where there are none."""
    if not len(held.rows):
        return None
    said = (pool.encoded(held.rows, vectors.visual) @ rows.T).argmax(-1)
    return float((said == held.target).float().mean())


# Data


class Pool(Protocol):
    """Pictures by position: `batch` as the loss wants them, `encoded` as unit rows under visual prompts, or without."""

    def batch(self, rows: Tensor) -> Tensor: ...

    def encoded(self, rows: Tensor, visual: Tensor | None) -> Tensor: ...


class _Features:
    """Pictures of which the frozen tower's features say all: only words are learnt."""

    def __init__(self, features: Tensor):
        self.features = features

    def batch(self, rows: Tensor) -> Tensor:
        return self.features[rows]

    def encoded(self, rows: Tensor, visual: Tensor | None) -> Tensor:
        return self.features[rows]


class _Pictures:
    """Pictures whose features change with the visual prompts: read anew each time, so that they need no memory."""

    def __init__(self, encoder: HFEncoder, pairs: Pairs):
        self.encoder = encoder
        self.records: Any = pairs if hasattr(pairs, "__getitem__") and hasattr(pairs, "__len__") else list(pairs)

    def batch(self, rows: Tensor) -> Tensor:
        return self.encoder.preprocess([_opened(image) for image in self._images(rows)])

    def encoded(self, rows: Tensor, visual: Tensor | None) -> Tensor:
        return encode_with_prompts(self.encoder, self._images(rows), visual)

    def _images(self, rows: Tensor) -> Iterator[Any]:
        return (self.records[i]["image"] for i in rows.tolist())


def _opened(image: Any) -> Any:
    return open_picture(image) if isinstance(image, str | Path) else image


def _mixed(seed: int, i: int) -> int:
    return int(np.random.SeedSequence([seed, i]).generate_state(1)[0])
