"""CLIPN on `tiny` and blurred scenes: are pictures of shapes, or of colours, noticed that no class prompt names?

Known are four of eight shapes (hard: through the blur the model names 83 % of them right) or three of six colours (easy: all).
The other half stands for the unknown, and its names are given to nobody at test. The copy of the text tower learns from
3,000 other scenes, of all shapes and colours, with captions of one to three words; captions that hold of another picture too
are not its "no". Prompts for the test are as in the captions.

Of 1,000 test scenes: `hard`, `easy`: AUROC of the arm's score, known above unknown; `hard fpr95`, `easy fpr95`; `hard decision`,
`easy decision`: balanced accuracy of its rule, without any threshold; `identical`: share of pictures named as by zero-shot with
the prompts of the test (by_hand has others).

ctw, atd: the two scores and rules of one and the same training; atd_qp: ATD's rule in its other reading. copy: the tower
untrained. no_negatives: trained without the mismatched pairs. shuffled: captions dealt out to other pictures. by_hand:
templates with "no" instead of learnt prompts. These four are judged by CTW. supervised: a linear probe that was shown unknown
pictures as such.

Chosen on seed 100, which is none of these: the blur, so that the confidences leave 20 points to gain, and the learning rate,
2e-3 of three (3e-4, 1e-3, 2e-3), for AUROC: `tiny` wants a higher one than the paper's towers. The margins are those planned
before that.
"""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ImageFilter
from torch import Tensor

from ecliptic.baselines.zero_shot import ZeroShot
from ecliptic.core.claims import Claim, Gate
from ecliptic.core.contracts import Record
from ecliptic.core.encoder import HFEncoder, load
from ecliptic.data.scenes import COLOURS, SHAPES, scenes
from ecliptic.data.scenes.words import with_article
from ecliptic.eval import metrics
from ecliptic.eval.ood import training_free_scores
from ecliptic.methods.adapt.clipn import PAIRED, Clipn, atd_is_known

SHOWN, HUES = SHAPES[:8], tuple(COLOURS)[:6]
WORLD: dict[str, Any] = {"shapes": SHOWN, "colours": HUES, "holdout": ()}
BLUR = 2.0  # pixels of 48
LESSONS, TESTED = 3000, 1000
NAMED = (("shape",), ("shape",), ("colour",), ("colour", "shape"), ("texture", "colour", "shape"))
FRAMES = ("{}", "a photo of {}", "a picture of {}")
WORDS = "a photo of a {}"
TASKS = {"hard": ("shape", SHOWN[:4], "{}"), "easy": ("colour", HUES[:3], "{} shape")}
SETTINGS: dict[str, Any] = {"templates": WORDS, "steps": 250, "batch_size": 96, "lr": 2e-3}
FREE = ("msp", "mcm", "max_logit", "energy")
TRAINED: dict[str, dict[str, Any]] = {
    "clipn": {},
    "copy": {"steps": 0},
    "no_negatives": {"weights": (0.5, 0.0, 0.5)},
    "shuffled": {},
    "by_hand": {"paired": PAIRED},
}
ARMS = ("ctw", "atd", "atd_qp", *FREE, "copy", "no_negatives", "shuffled", "by_hand", "supervised")

CLAIM = Claim(
    says="with the learnt no, pictures of unknown shapes are told apart better than by softmax confidence and concept matching, "
    "and the rule of the competing no decides without a threshold, at unchanged answers; without mismatched pairs, or from "
    "shuffled ones, it does not",
    arms=ARMS,
    mode="difference",
    gates=(
        Gate("hard: a probe that saw unknown pictures shows what there is to gain", "supervised", ("msp", "mcm"), 0.2, "hard",
             kind="headroom"),
        Gate("hard: AUROC of CTW against MSP and MCM", "ctw", ("msp", "mcm"), 0.2, "hard"),
        Gate("hard: AUROC of ATD against MSP and MCM", "atd", ("msp", "mcm"), 0.2, "hard"),
        Gate("hard: CTW decides right in 60 %, chance being 50", "ctw", "copy", 0.1, "hard decision"),
        Gate("hard: so does ATD", "atd", "copy", 0.1, "hard decision"),
        Gate("easy: CTW decides right in 95 %", "ctw", "copy", 0.45, "easy decision"),
        Gate("known pictures are named as by zero-shot, each of them", "ctw", "copy", 0.0, "identical"),
        Gate("no negatives, hard: no decision", "no_negatives", "copy", 0.05, "hard decision", kind="control"),
        Gate("no negatives, easy: no decision", "no_negatives", "copy", 0.05, "easy decision", kind="control"),
        Gate("no negatives, hard: AUROC falls", "no_negatives", "ctw", -0.1, "hard", kind="control"),
        Gate("shuffled pairs, hard: decisions get worse", "shuffled", "ctw", -0.1, "hard decision", kind="control"),
        Gate("shuffled pairs, easy: decisions get worse", "shuffled", "ctw", -0.2, "easy decision", kind="control"),
        Gate("easy: ATD decides right in 95 %", "atd", "copy", 0.45, "easy decision", gate=False),
        Gate("easy: so does ATD if it compares with q p", "atd_qp", "copy", 0.45, "easy decision", gate=False),
        Gate("hard: AUROC of CTW against the largest logit and energy", "ctw", ("max_logit", "energy"), 0.0, "hard",
             gate=False),
        Gate("easy: AUROC of CTW against MSP and MCM", "ctw", ("msp", "mcm"), 0.2, "easy", gate=False),
        Gate("hard: learnt prompts against templates with no", "ctw", "by_hand", 0.0, "hard", gate=False),
    ),
    note="ATD's rule with p, which is the default reading, was known from seed 100 to miss 95 % on the easy task, hence no gate: "
    "the softmax over three colours is so sharp that the largest p exceeds the mass of none even where every no is likely. "
    "Compared with q p, which makes it a choice among one more class, it decides as CTW does.",
)  # fmt: skip


class Pictures(NamedTuple):
    """features (N, D) unit rows, and the records without their pictures."""

    features: Tensor
    records: list[Record]


@cache
def tiny() -> HFEncoder:
    return load("tiny")


@cache
def pictures(split: str, n: int, seed: int) -> Pictures:
    drawn = scenes(split, n, seed + 3000, tiny().image_size, **WORLD)
    blur = ImageFilter.GaussianBlur(BLUR)
    features = tiny().encode_images(drawn, decode=lambda record: record["image"].filter(blur))
    return Pictures(features, [told(record, Random(f"{seed}/{record['id']}")) for record in drawn.undecoded()])


def told(record: Record, r: Random) -> Record:
    """A caption that names some of the attributes, what it says and what is true."""
    facts = record["attributes"]
    named = r.choice(NAMED)
    words = [facts[name] for name in named if facts[name] != "plain"]  # a plain texture goes without saying
    noun = " ".join([*words, "shape"] if named == ("colour",) else words)
    return {
        "id": record["id"],
        "noun": noun,
        "caption": r.choice(FRAMES).format(with_article(noun)),
        "says": [facts[name] for name in named],
        "holds": [facts[name] for name in ("shape", "colour", "texture")],
        "shape": facts["shape"],
        "colour": facts["colour"],
    }


@cache
def judge(kind: str, seed: int) -> Clipn:
    features, records = pictures("train", LESSONS, seed)
    lessons = [{key: record[key] for key in ("id", "caption", "says", "holds")} for record in records]
    if kind == "by_hand":  # templates take a noun
        lessons = [{**lesson, "caption": record["noun"]} for lesson, record in zip(lessons, records, strict=True)]
    if kind == "shuffled":
        order = list(range(len(lessons)))
        Random(seed).shuffle(order)
        other = [{key: lessons[i][key] for key in ("caption", "says")} for i in order]
        lessons = [{**lesson, **words} for lesson, words in zip(lessons, other, strict=True)]
    made = Clipn(classes=SHOWN[:4], seed=seed, **{**SETTINGS, **TRAINED[kind]})
    return made.fit_features(tiny(), features, lessons)


def run(arm: str, seed: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for task, (attribute, known, form) in TASKS.items():
        test = pictures("test", TESTED, seed)
        inside = np.array([record[attribute] in known for record in test.records])
        names = tuple(form.format(value) for value in known)
        if arm == "supervised":
            scores = supervised(attribute, known, seed)
        else:
            made = judge(arm if arm in TRAINED else "clipn", seed).for_classes(names)
            yes, no = made.logits(test.features)
            if arm in FREE:
                scores = training_free_scores(yes, made.scale_)[arm].numpy()
            else:
                rule = "atd" if arm.startswith("atd") else "ctw"
                scores = made.ood_scores_features(test.features)[rule].numpy()
                decided = (
                    atd_is_known(yes, no, "qp") if arm == "atd_qp" else made.is_known_features(test.features, rule)
                )
                found[f"{task} decision"] = metrics.balanced_accuracy(decided.numpy(), inside)
                plain = ZeroShot(classes=names, templates=made.templates).fit(tiny(), [])
                mine, others = (m.predict_features(test.features).labels or [] for m in (made, plain))
                same = float(np.mean([a == b for a, b in zip(mine, others, strict=True)]))
                found["identical"] = min(found.get("identical", 1.0), same)
        found[task] = metrics.auroc(scores, inside)
        found[f"{task} fpr95"] = metrics.fpr_at_tpr(scores, inside)
    return found


def supervised(attribute: str, known: tuple[str, ...], seed: int) -> np.ndarray[Any, Any]:
    from sklearn.linear_model import LogisticRegression

    features, records = pictures("train", LESSONS, seed)
    values = [record[attribute] for record in records]
    fit = LogisticRegression(C=30.0, max_iter=300).fit(features.numpy(), values)
    columns = torch.tensor([value in known for value in fit.classes_]).numpy()
    chances = fit.predict_proba(pictures("test", TESTED, seed).features.numpy())
    return np.asarray(chances[:, columns].sum(1))
