"""The contract checks themselves: small methods that keep every rule, and for each rule one that breaks it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from ecliptic.core.contracts import DataStep, ModelStep, Objective, Prediction, Predictor, Views
from ecliptic.data.shots import tiny_records
from tests.contracts.checks import CHECKS, Case, run_check
from tests.towers import FAMILIES, clip_encoder

COUNTER = {"n": 0}


def tick() -> int:
    """State where there should be none."""
    COUNTER["n"] += 1
    return COUNTER["n"]


# Methods that keep the rules


@dataclass(eq=False)
class Nearest(Predictor):
    """Similarity to the mean of each class."""

    seed: int = 0

    def fit(self, encoder, pairs):
        self.encoder_ = encoder
        self.classes_ = tuple(sorted({r["label"] for r in pairs}))
        rows = encoder.encode_images([r["image"] for r in pairs])
        labels = [r["label"] for r in pairs]
        self.means_ = torch.stack([rows[[x == c for x in labels]].mean(0) for c in self.classes_])
        return self

    @torch.no_grad()
    def predict(self, pixels):
        scores = self.encoder_.images(pixels).pooled @ self.means_.T
        return Prediction(scores=scores, labels=[self.classes_[i] for i in scores.argmax(-1)], classes=self.classes_)

    @classmethod
    def tiny(cls):
        return cls(), tiny_records()


@dataclass(frozen=True)
class Align(Objective):
    """Pull pairs together."""

    weight: float = 1.0
    needs: ClassVar[frozenset[str]] = frozenset({"image", "text"})

    def terms(self, views: Views):
        return {"align": -self.weight * (views["image"].pooled * views["text"].pooled).sum(-1).mean()}

    @classmethod
    def tiny(cls):
        return cls(), tiny_records()


@dataclass(frozen=True)
class Warmer(ModelStep):
    """A larger scale."""

    factor: float = 2.0

    def apply(self, encoder, pairs=None):
        changed = encoder.clone()
        with torch.no_grad():
            changed.model.logit_scale += float(np.log(self.factor))
            first = next(changed.model.vision_model.parameters())
            first.mul_(1 + 0.01 * (self.factor - 1))
        changed.record_step("warmer", {"factor": self.factor})
        return changed

    @classmethod
    def neutral(cls):
        return cls(factor=1.0)

    @classmethod
    def tiny(cls):
        return cls(), tiny_records()


class Stream:
    """Records that are worked on while they are walked over."""

    def __init__(self, pairs, keep):
        self.pairs, self.keep = pairs, keep

    def __iter__(self):
        return (r for r in map(self.keep, self.pairs) if r is not None)


@dataclass(frozen=True)
class Shout(DataStep):
    """Captions in capitals, one record in three left out."""

    def apply(self, pairs):
        return Stream(pairs, self.one)

    def one(self, record):
        if int(record["id"].split("-")[1]) % 3 == 0:
            return None
        return {**record, "caption": record["caption"].upper()}

    @classmethod
    def tiny(cls):
        return cls(), tiny_records()


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def tiny() -> dict[str, Any]:
    return {"x": torch.arange(4.0)}


GOOD = {"Predictor": Nearest, "Objective": Align, "ModelStep": Warmer, "DataStep": Shout, "function": double}

# Methods that break one


class NanScores(Nearest):
    def predict(self, pixels):
        return replace(super().predict(pixels), scores=super().predict(pixels).scores / 0)


class TooFew(Nearest):
    def predict(self, pixels):
        return replace(super().predict(pixels), labels=["one"])


class Forgetful(Nearest):
    def predict(self, pixels):
        return replace(super().predict(pixels), scores=super().predict(pixels).scores + tick())


class OrderBound(Nearest):
    def predict(self, pixels):
        said = super().predict(pixels)
        return replace(said, scores=said.scores + torch.arange(len(pixels))[:, None])


class BatchBound(Nearest):
    def predict(self, pixels):
        said = super().predict(pixels)
        return replace(said, scores=said.scores - said.scores.mean(0))


class DrawsGlobally(Nearest):
    def fit(self, encoder, pairs):
        torch.rand(1)
        return super().fit(encoder, pairs)


class Thaws(Nearest):
    def fit(self, encoder, pairs):
        encoder.requires_grad_(False)
        return super().fit(encoder, pairs)


class Trains(Nearest):
    def fit(self, encoder, pairs):
        with torch.no_grad():
            next(encoder.parameters()).add_(1.0)
        return super().fit(encoder, pairs)


class Relabels(Nearest):
    def fit(self, encoder, pairs):
        pairs[0]["label"] = "blue"
        return super().fit(encoder, pairs)


class Overwrites(Nearest):
    def predict(self, pixels):
        pixels.zero_()
        return super().predict(pixels)


class Graphic(Nearest):
    def predict(self, pixels):
        with torch.enable_grad():
            scores = self.encoder_.images(pixels).pooled @ self.means_.T
        return Prediction(scores=scores)


class Returns(Nearest):
    def fit(self, encoder, pairs):
        super().fit(encoder, pairs)


class Strays(Nearest):
    def fit(self, encoder, pairs):
        self.notes = 1
        return super().fit(encoder, pairs)


class Loses(Nearest):
    def fit(self, encoder, pairs):
        self._hidden = 1.0
        return super().fit(encoder, pairs)

    def predict(self, pixels):
        said = super().predict(pixels)
        return replace(said, scores=said.scores * getattr(self, "_hidden", 0.0))


class Meddles(Nearest):
    def __init__(self, seed=(0,)):
        self.seed = list(seed)


@dataclass(frozen=True)
class NanTerm(Align):
    def terms(self, views):
        return {"nan": super().terms(views)["align"] * float("nan")}


@dataclass(frozen=True)
class Vector(Align):
    def terms(self, views):
        return {"rows": (views["image"].pooled * views["text"].pooled).sum(-1)}


@dataclass(frozen=True)
class Drifting(Align):
    def terms(self, views):
        return {"align": super().terms(views)["align"] * tick()}


@dataclass(frozen=True)
class Weighted(Align):
    def terms(self, views):
        rows = (views["image"].pooled * views["text"].pooled).sum(-1)
        return {"align": (rows * torch.arange(len(rows))).mean()}


@dataclass(frozen=True)
class InPlace(Align):
    def terms(self, views):
        views["image"].pooled.data.mul_(0.5)
        return super().terms(views)


@dataclass(frozen=True)
class OneSided(Align):
    def terms(self, views):
        return {"align": -(views["image"].pooled * views["text"].pooled.detach()).sum(-1).mean()}


@dataclass(frozen=True)
class Undeclared(Align):
    needs: ClassVar[frozenset[str]] = frozenset({"image"})

    def encode(self, encoder, batch):
        texts = encoder.texts(encoder.tokenize(["a"] * len(batch["image"])))
        return Views({"image": encoder.images(batch["image"]), "text": texts}, encoder.scale)


@dataclass(frozen=True)
class Unpicklable(Align):
    weight: Any = 1.0

    @classmethod
    def tiny(cls):
        class Odd(float):
            pass

        return cls(Odd(1.0)), tiny_records()


class NanStep(Warmer):
    def apply(self, encoder, pairs=None):
        changed = super().apply(encoder, pairs)
        with torch.no_grad():
            for p in changed.parameters():
                p.fill_(float("nan"))
        return changed


class SameModel(Warmer):
    def apply(self, encoder, pairs=None):
        return encoder


class Shares(Warmer):
    def apply(self, encoder, pairs=None):
        changed = super().apply(encoder, pairs)
        changed.model.text_model = encoder.model.text_model
        return changed


class ChangesTheOld(Warmer):
    def apply(self, encoder, pairs=None):
        with torch.no_grad():
            encoder.model.logit_scale += 1
        return super().apply(encoder, pairs)


class RandomStep(Warmer):
    def apply(self, encoder, pairs=None):
        changed = super().apply(encoder, pairs)
        with torch.no_grad():
            next(changed.model.vision_model.parameters()).mul_(1 + tick())
        return changed


class NeverNeutral(Warmer):
    @classmethod
    def neutral(cls):
        return cls(factor=1.5)


class Unrecorded(Warmer):
    def apply(self, encoder, pairs=None):
        changed = super().apply(encoder, pairs)
        changed.history = encoder.history
        return changed


class Unsaved(Warmer):
    def apply(self, encoder, pairs=None):
        changed = super().apply(encoder, pairs)
        changed.model.vision_model.register_forward_hook(
            lambda m, i, out: type(out)({**out, "pooler_output": out.pooler_output + 1.0})
        )
        return changed


class BatchNormal(Warmer):
    def apply(self, encoder, pairs=None):
        changed = super().apply(encoder, pairs)

        def centre(module, inputs, out):
            return type(out)({**out, "pooler_output": out.pooler_output - 0.9 * out.pooler_output.mean(0)})

        changed.model.vision_model.register_forward_hook(centre)
        return changed


class Empties(Shout):
    def one(self, record):
        return None


class OneWalk(Shout):
    def apply(self, pairs):
        return iter(list(Stream(pairs, self.one)))


class Fickle(Shout):
    def one(self, record):
        return {**record, "caption": str(tick())}


class Positional(Shout):
    def apply(self, pairs):
        return [{**r, "caption": f"{i}"} for i, r in enumerate(pairs)]


class Backwards(Shout):
    def apply(self, pairs):
        return Stream(sorted(pairs, key=lambda r: r["id"], reverse=True), self.one)


class Hasty(Shout):
    def apply(self, pairs):
        return Stream([*pairs], self.one)


class Twice(Shout):
    def apply(self, pairs):
        return Stream(pairs, lambda r: self.one(pairs[r["place"]] if "place" in r else r))


class Counting(Shout):
    def apply(self, pairs):
        return [{**r, "caption": f"one of {len(pairs)}"} for r in pairs]


class InPlaceRecords(Shout):
    def one(self, record):
        record["caption"] = record["caption"].upper()
        return record


def infinite(x: torch.Tensor) -> torch.Tensor:
    return x / 0


def ticking(x: torch.Tensor) -> torch.Tensor:
    return x + tick()


def in_place(x: torch.Tensor) -> torch.Tensor:
    return x.add_(1)


# rule -> method that breaks it -> what the check must say
BROKEN: dict[tuple[str, str], dict[Any, str]] = {
    ("Predictor", "finite"): {NanScores: r"scores is not finite", TooFew: r"1 labels for 12 pictures"},
    ("Predictor", "deterministic"): {Forgetful: r"scores differs"},
    ("Predictor", "batch_order"): {OrderBound: r"another order: .scores differs"},
    ("Predictor", "batch_size"): {BatchBound: r"batch of 1: .scores differs"},
    ("Predictor", "inputs"): {
        DrawsGlobally: r"torch's global generator",
        Thaws: r"fit changed its encoder: .trained",
        Trains: r"fit changed its encoder: .weights",
        Relabels: r"fit changed its records: .0.label",
        Overwrites: r"predict changed its pixels",
    },
    ("Predictor", "no_gradients"): {Graphic: r"still carries gradients"},
    ("Predictor", "fit"): {Returns: r"return self", Strays: r"fit left \['notes'\]"},
    ("Predictor", "save_load"): {Loses: r"saved and opened: .scores differs"},
    ("Predictor", "clone"): {Meddles: r"constructor either does not set or modifies parameter seed"},
    ("Objective", "finite"): {NanTerm: r"nan is not finite", Vector: r"rows is \(12,\), not a scalar"},
    ("Objective", "deterministic"): {Drifting: r"align differs"},
    ("Objective", "batch_order"): {Weighted: r"another order: .align differs"},
    ("Objective", "inputs"): {InPlace: r"terms changed its views: .image"},
    ("Objective", "gradients"): {
        OneSided: r"no gradient reaches 'text'",
        Undeclared: r"'text' is pulled, but is not among the needs",
    },
    ("Objective", "save_load"): {Unpicklable: r"local object"},
    ("ModelStep", "finite"): {NanStep: r"not finite"},
    ("ModelStep", "copy"): {SameModel: r"gave back the encoder", Shares: r"shares weights"},
    ("ModelStep", "inputs"): {ChangesTheOld: r"apply changed its encoder: .weights"},
    ("ModelStep", "deterministic"): {RandomStep: r"images differs"},
    ("ModelStep", "neutral"): {NeverNeutral: r"neutral setting: .images differs"},
    ("ModelStep", "history"): {Unrecorded: r"records itself once"},
    ("ModelStep", "save_load"): {Unsaved: r"saved and opened: .images differs"},
    ("ModelStep", "batch_size"): {BatchNormal: r"batch of one: .images differs"},
    ("DataStep", "finite"): {Empties: r"kept nothing"},
    ("DataStep", "reiterable"): {OneWalk: r"walked over twice"},
    ("DataStep", "deterministic"): {Fickle: r"caption differs"},
    ("DataStep", "order"): {Positional: r"caption differs", Backwards: r"in another order than they went in"},
    ("DataStep", "lazy"): {Hasty: r"apply opened the pictures of", Twice: r"opened more than once"},
    ("DataStep", "shards"): {Counting: r"caption differs"},
    ("DataStep", "inputs"): {InPlaceRecords: r"apply changed its records"},
    ("function", "finite"): {infinite: r"not finite"},
    ("function", "deterministic"): {ticking: r"differs"},
    ("function", "inputs"): {in_place: r"changed its x"},
}


def case(subject: Any, kind: str) -> Case:
    return Case(subject.__name__, kind, subject)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", GOOD)
def test_a_good_method_keeps_every_rule(kind, family):
    for rule in CHECKS[kind]:
        assert run_check(case(GOOD[kind], kind), rule, FAMILIES[family]()) is None


@pytest.mark.parametrize(
    ("kind", "rule", "subject", "message"),
    [(kind, rule, subject, message) for (kind, rule), broken in BROKEN.items() for subject, message in broken.items()],
    ids=[f"{kind}-{rule}-{subject.__name__}" for (kind, rule), broken in BROKEN.items() for subject in broken],
)
def test_a_broken_method_is_caught_for_what_it_does(kind, rule, subject, message):
    with pytest.raises(Exception, match=message):
        run_check(case(subject, kind), rule, clip_encoder())


def test_every_rule_has_a_method_that_breaks_it():
    assert set(BROKEN) == {(kind, rule) for kind, rules in CHECKS.items() for rule in rules}
    assert sum(map(len, BROKEN.values())) == 44


def test_a_warning_is_an_error():
    class Warns(Nearest):
        def predict(self, pixels):
            import warnings

            warnings.warn("careful", stacklevel=1)
            return super().predict(pixels)

    with pytest.raises(UserWarning, match="careful"):
        run_check(case(Warns, "Predictor"), "finite", clip_encoder())


def test_a_waived_rule_gives_its_reason_and_must_fail():
    class Waived(BatchBound):
        waivers: ClassVar[dict[str, str]] = {"batch_size": "scores are relative to the batch"}

    class Needless(Nearest):
        waivers: ClassVar[dict[str, str]] = {"batch_size": "scores are relative to the batch"}

    assert run_check(case(Waived, "Predictor"), "batch_size", clip_encoder()) == "scores are relative to the batch"
    with pytest.raises(AssertionError, match="remove the waiver"):
        run_check(case(Needless, "Predictor"), "batch_size", clip_encoder())
    assert run_check(case(Waived, "Predictor"), "finite", clip_encoder()) is None
