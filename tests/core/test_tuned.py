"""Predictors with tuned towers: little is kept, much is shared, and the frozen encoder stays as it is."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ecliptic.core.contracts import Pairs
from ecliptic.core.encoder import Encoder, HFEncoder
from ecliptic.core.lora import Lora, is_adapter, low_rank_additions, merge
from ecliptic.core.prompt_classifier import CLIP_SCALE
from ecliptic.core.tuned import TunedPredictor, adapter_tensors, changed_tensors, check_tunable, with_tensors
from ecliptic.core.zeroshot import zero_shot_head
from ecliptic.data.shots import tiny_records
from tests.core.lessons import assert_same, moved, weights
from tests.towers import FAMILIES, clip_encoder, siglip_encoder

NAMES = ("red", "green", "blue")


@dataclass(eq=False)
class Shaken(TunedPredictor):
    """'Learns' by adding noise to norms and by random adapters."""

    templates: str = "photo"
    size: float = 0.05
    tau: float | None = None

    def fit(self, encoder: Encoder, pairs: Pairs) -> Self:
        tuned = check_tunable(encoder).clone()
        shake(tuned, "norm", self.size)
        adapted = shaken_adapters(tuned, self.size)
        state = changed_tensors(check_tunable(encoder), tuned) | adapter_tensors(adapted)
        return self._keep(encoder, NAMES, state, trained=7)


def shake(encoder: HFEncoder, pattern: str, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in encoder.named_parameters():
            if pattern in name:
                value += size * torch.randn(value.shape, generator=generator)


def shaken_adapters(encoder: HFEncoder, size: float) -> HFEncoder:
    adapted = Lora(rank=2, alpha=6.0, parts=("q", "fc1")).adapt(encoder)
    shake(adapted, ".lora_B", size)
    return adapted


def rows(encoder: HFEncoder) -> Tensor:
    with torch.no_grad():
        return encoder.images(pixels(encoder)).pooled


def pixels(encoder: HFEncoder) -> Tensor:
    return encoder.preprocess([r["image"] for r in tiny_records()])


@pytest.fixture(params=FAMILIES)
def encoder(request: Any) -> HFEncoder:
    return FAMILIES[request.param]()


def test_replaced_tensors_give_the_encoder_they_come_from(encoder):
    before, after = weights(encoder), encoder.clone()
    shake(after, "norm", 0.1)
    state = changed_tensors(encoder, after)
    assert state.keys() == moved(before, after)
    assert 0 < len(state) < len(before)
    built = with_tensors(encoder, state)
    assert_same(built, after)
    assert rows(built).equal(rows(after))
    assert not rows(built).equal(rows(encoder))
    assert not moved(before, encoder)
    assert changed_tensors(encoder, encoder) == {}
    assert_same(with_tensors(encoder, {}), encoder)


def test_factors_are_added_as_merging_adds_them(encoder):
    adapted = shaken_adapters(encoder, 0.2)
    state = adapter_tensors(adapted)
    assert len(state) == 2 * 2 * 3 * 2  # A, B; q, fc1; blocks; towers
    built = with_tensors(encoder, state)
    for name, value in merge(adapted).state_dict().items():
        assert_close(built.state_dict()[name], value, rtol=0, atol=1e-6)
    assert (rows(built) - rows(encoder)).abs().max() > 1e-3
    name, (a, b) = next(iter(low_rank_additions(adapted).items()))
    by_hand = encoder.state_dict()[name] + b @ a
    assert_close(built.state_dict()[name], by_hand)
    layer = next(v for n, v in adapted.named_parameters() if is_adapter(n) and "lora_B" in n)
    assert_close(b, 6.0 / 2 * layer.detach())  # alpha / rank stands in B


def test_adapters_at_their_start_change_no_bit(encoder):
    assert_same(with_tensors(encoder, adapter_tensors(Lora(rank=2).adapt(encoder))), encoder)


def test_what_did_not_change_is_shared_and_what_did_is_not(encoder):
    after = encoder.clone()
    shake(after, "norm", 0.1)
    state = changed_tensors(encoder, after)
    built = with_tensors(encoder, state).state_dict()
    for name, value in encoder.state_dict().items():
        assert (built[name].data_ptr() == value.data_ptr()) == (name not in state), name
    given = {name: value.data_ptr() for name, value in state.items()}
    assert all(built[name].data_ptr() != given[name] for name in given)


def test_tensors_that_do_not_fit_are_named():
    encoder = clip_encoder()
    name = "model.visual_projection.weight"
    with pytest.raises(ValueError, match=r"no 'model\.nothing'"):
        with_tensors(encoder, {"model.nothing": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"is \(2, 2\), this encoder's is \(24, 32\)"):
        with_tensors(encoder, {name: torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"lora_B' is missing"):
        with_tensors(encoder, {f"{name}.lora_A": torch.zeros(1, 32)})
    with pytest.raises(ValueError, match="differ in architecture"):
        changed_tensors(encoder, siglip_encoder())
    with pytest.raises(ValueError, match="no adapters"):
        low_rank_additions(encoder)


def test_predictions_are_scaled_cosines_with_the_tuned_towers(encoder):
    judge = Shaken().fit(encoder, tiny_records())
    tuned = judge.tuned_encoder()
    said = judge.predict(pixels(encoder))
    head = zero_shot_head(tuned, NAMES)
    scale = CLIP_SCALE if encoder.bias is None else encoder.scale.item()
    assert_close(said.scores, scale * rows(tuned) @ head.T, rtol=0, atol=1e-4)
    assert said.classes == NAMES
    assert said.labels == [NAMES[k] for k in said.scores.argmax(-1)]
    assert (head - zero_shot_head(encoder, NAMES)).abs().max() > 1e-4  # both towers are the tuned ones
    assert (rows(tuned) - rows(encoder)).abs().max() > 1e-4
    assert_close(Shaken(tau=7.0).fit(encoder, tiny_records()).predict(pixels(encoder)).scores, said.scores * 7 / scale)
    two = judge.predict(pixels(encoder), ("blue", "red"))
    assert two.scores.equal(said.scores[:, [2, 0]])
    assert set(two.labels) <= {"blue", "red"}


def test_other_classes_by_name(encoder):
    judge = Shaken(templates="plain").fit(encoder, tiny_records())
    before = judge.predict(pixels(encoder)).scores
    other = judge.for_classes(("a boat", "red"))
    said = other.predict(pixels(encoder))
    assert said.classes == ("a boat", "red")
    assert_close(said.scores[:, 1], before[:, 0])  # "red" is what it was
    assert judge.predict(pixels(encoder)).scores.equal(before)
    assert judge.classes_ == NAMES
    assert other._tuned is judge._tuned
    assert other.encoder_ is encoder
    assert other.trained_parameters_ == 7
    with pytest.raises(ValueError, match="occurs twice"):
        judge.for_classes(("a boat", "a boat"))


def test_only_what_was_learnt_is_saved(encoder, tmp_path):
    judge = Shaken().fit(encoder, tiny_records()).for_classes(("boat", "red", "green"))
    folder = judge.save(tmp_path / "judge")
    assert (folder / "predictor.safetensors").stat().st_size < 4 * sum(
        v.numel() for v in judge.state_.values()
    ) + 20_000
    opened = Shaken.load(folder, encoder)
    assert opened.predict(pixels(encoder)).scores.equal(judge.predict(pixels(encoder)).scores)
    assert opened.classes_ == ("boat", "red", "green")
    for copied in (copy.deepcopy(judge), pickle.loads(pickle.dumps(judge))):
        assert copied.predict(pixels(encoder)).scores.equal(judge.predict(pixels(encoder)).scores)


def test_changed_settings_do_not_reach_what_was_learnt():
    encoder = clip_encoder()
    judge = Shaken().fit(encoder, tiny_records())
    said = judge.predict(pixels(encoder)).scores
    judge.set_params(templates="plain", tau=3.0, size=1.0)
    assert judge.predict(pixels(encoder)).scores.equal(said)
    again = judge.fit(encoder, tiny_records()).predict(pixels(encoder)).scores
    assert again.equal(Shaken("plain", 1.0, 3.0).fit(encoder, tiny_records()).predict(pixels(encoder)).scores)
    assert not again.equal(said)


def test_the_tuned_encoder_is_ones_own():
    encoder = clip_encoder()
    judge, before = Shaken().fit(encoder, tiny_records()), weights(encoder)
    said = judge.predict(pixels(encoder)).scores
    assert judge.tuned_encoder().history[-1] == {
        "step": "Shaken",
        "args": {"templates": "photo", "size": 0.05, "tau": None},
    }
    shake(judge.tuned_encoder(), "", 1.0)
    assert not moved(before, encoder)
    assert judge.predict(pixels(encoder)).scores.equal(said)


def test_what_is_asked_too_early_is_said():
    with pytest.raises(ValueError, match="learnt nothing yet"):
        Shaken().predict(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="learnt nothing yet"):
        Shaken().for_classes(("a", "b"))

    class Exported(Encoder):
        pass

    Exported.__abstractmethods__ = frozenset()
    with pytest.raises(TypeError, match="no layers to train"):
        check_tunable(Exported())


def test_a_subclass_may_have_a_head_of_its_own():
    class Turned(Shaken):
        def class_rows(self, tuned: HFEncoder, names: Sequence[str]) -> Tensor:
            return -zero_shot_head(tuned, names, self.templates)

    encoder = clip_encoder()
    plain, turned = (kind().fit(encoder, tiny_records()) for kind in (Shaken, Turned))
    assert_close(turned.predict(pixels(encoder)).scores, -plain.predict(pixels(encoder)).scores)
    assert_close(
        turned.for_classes(("x", "y")).predict(pixels(encoder)).scores,
        -plain.for_classes(("x", "y")).predict(pixels(encoder)).scores,
    )
