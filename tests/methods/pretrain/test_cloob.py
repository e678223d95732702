"""CLOOB: its loss as loops, its identities, what tells InfoLOOB from InfoNCE, and training under it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus
from torch.testing import assert_close

from ecliptic.core.contracts import Features, Views
from ecliptic.core.method import get
from ecliptic.core.objectives import InfoNCE
from ecliptic.core.train import Train
from ecliptic.methods.pretrain.cloob import Cloob, anchored, cloob_loss
from ecliptic.ops.contrastive import duplicates, info_loob, leave_one_out
from tests.core.processes import run_processes
from tests.methods.pretrain.cloob_share import shared
from tests.towers import FAMILIES

TAU_30 = torch.tensor(30.0, dtype=torch.float64)


def pairs(n: int = 6, d: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = x + torch.randn(n, d, generator=generator, dtype=torch.float64)
    return normalize(x, dim=-1), normalize(y, dim=-1)


def views(n: int = 6, groups: list[int] | None = None) -> Views:
    x, y = pairs(n)
    found = Views({"image": Features(x), "text": Features(y)}, torch.tensor(9.0))
    found.groups = None if groups is None else torch.tensor(groups)
    return found


def dot(a: list[float], b: list[float]) -> float:
    return sum(p * q for p, q in zip(a, b))


def recalled(state: list[float], memory: list[list[float]], beta: float) -> list[float]:
    weights = [math.exp(beta * dot(state, m)) for m in memory]
    mixed = [sum(w * m[k] for w, m in zip(weights, memory)) for k in range(len(state))]
    return [v / math.sqrt(dot(mixed, mixed)) for v in mixed]


def slow_cloob(x: list[list[float]], y: list[list[float]], beta: float, inverse_tau: float) -> float:
    """tau * [InfoLOOB(U_x, U_y) + InfoLOOB(V_y, V_x)] with U from the pictures' memory and V from the texts', as loops."""
    total = 0.0
    for memory, anchors, others in ((x, x, y), (y, y, x)):
        a, b = ([recalled(s, memory, beta) for s in states] for states in (anchors, others))
        for i in range(len(a)):
            negatives = sum(math.exp(inverse_tau * dot(a[i], b[j])) for j in range(len(b)) if j != i)
            total += (math.log(negatives) - inverse_tau * dot(a[i], b[i])) / len(a)
    return total / inverse_tau


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


@pytest.mark.parametrize("beta", [0.0, 8.0, 14.3])
def test_equals_the_loops(beta):
    x, y = pairs()
    expected = slow_cloob(x.tolist(), y.tolist(), beta, 30)
    assert float(total(cloob_loss(x, y, beta, TAU_30))) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert float(total(Cloob(beta=beta).terms(views()))) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_two_matched_pairs_by_hand():
    # [[3, 1], [0, 2]]: row 1 is log(e^1) - 3 = -2, row 2 is log(e^0) - 2 = -2.
    assert_close(info_loob(torch.tensor([[3.0, 1.0], [0.0, 2.0]])), torch.tensor(-2.0))


def test_infonce_of_a_row_is_the_softplus_of_its_infoloob():
    logits = 5 * torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same = duplicates([0, 1, 0, 2, 3, 4, 1])
    for mask in (None, same):
        kept = logits if mask is None else logits.masked_fill(mask & ~torch.eye(7, dtype=torch.bool), -torch.inf)
        expected = kept.logsumexp(1) - logits.diagonal()
        assert_close(softplus(leave_one_out(logits, mask)), expected, rtol=0, atol=1e-8)  # softplus is cut off at 20
        assert_close(leave_one_out(logits, mask).exp().log1p(), expected, rtol=0, atol=1e-12)


def test_without_retrieval_infonce_is_clips_loss():
    for groups in (None, [3, 1, 3, 4, 5, 1]):
        given = views(groups=groups)
        clip = Cloob(objective="infonce", hopfield=False).terms(given)
        given.scale = torch.tensor(30.0)
        assert_close(total(clip), 2 / 30 * InfoNCE().terms(given)["info_nce"], rtol=0, atol=1e-9)


def test_no_beta_no_learning():
    x, y = (part.requires_grad_() for part in pairs(8))
    loss = total(cloob_loss(x, y, 0.0, TAU_30))
    assert_close(loss, torch.tensor(2 * math.log(7) / 30, dtype=torch.float64))
    loss.backward()
    assert x.grad is not None
    assert y.grad is not None
    assert max(x.grad.abs().max(), y.grad.abs().max()) < 1e-12


@pytest.mark.parametrize("inverse_tau", [1.0, 14.3, 100.0])
def test_with_two_pairs_tau_falls_out(inverse_tau):
    a, b = pairs(2)
    by_hand = ((a * b.flip(0)).sum(-1) - (a * b).sum(-1)).mean()
    tau = torch.tensor(inverse_tau, dtype=torch.float64)
    assert_close(anchored(a, b, tau, "infoloob") / tau, by_hand, rtol=0, atol=1e-12)


def test_pulling_a_pair_closer_never_stops_paying():
    """|d L / d positive| in cosine units: exactly 1 / N of InfoLOOB, (1 - p) / N of InfoNCE, which fades away."""
    n = 4
    for positive in (0.0, 0.3, 0.9):
        cosines = (positive * torch.eye(n, dtype=torch.float64)).requires_grad_()
        rows = leave_one_out(30 * cosines)
        (loob,) = torch.autograd.grad((rows / 30).mean(), cosines, retain_graph=True)
        (nce,) = torch.autograd.grad((softplus(rows, threshold=100) / 30).mean(), cosines)
        left = (n - 1) / (math.exp(30 * positive) + n - 1)  # 1 - p
        assert_close(loob.diagonal(), torch.full((n,), -1 / n, dtype=torch.float64))
        assert_close(nce.diagonal(), torch.full((n,), -left / n, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("settings", [{}, {"hopfield": False}, {"objective": "infonce"}])
def test_the_order_of_pairs_does_not_matter(settings):
    given, order = views(groups=[3, 1, 3, 4, 5, 1]), torch.tensor([4, 2, 0, 5, 1, 3])
    turned = Views({name: Features(f.pooled[order]) for name, f in given.items()}, given.scale)
    turned.groups = given.groups[order]
    assert_close(dict(Cloob(**settings).terms(turned)), dict(Cloob(**settings).terms(given)))


def test_memories_are_not_mixed():
    """Text to image has to be image to text with the sides swapped, memory and all."""
    x, y = pairs()
    ways, swapped = cloob_loss(x, y, 8.0, TAU_30), cloob_loss(y, x, 8.0, TAU_30)
    assert_close(ways["image_to_text"], swapped["text_to_image"])
    assert_close(ways["text_to_image"], swapped["image_to_text"])
    assert not torch.isclose(ways["image_to_text"], ways["text_to_image"])


def test_equal_captions_are_no_negatives():
    x, y = pairs()
    groups = [0, 1, 2, 0, 3, 4]
    y = y[[0, 1, 2, 0, 4, 5]]
    given = Views({"image": Features(x), "text": Features(y)}, torch.tensor(1.0))
    given.groups = torch.tensor(groups)
    loss = total(Cloob(hopfield=False).terms(given))
    plain = total(Cloob(hopfield=False, skip_duplicates=False).terms(given))
    cosines, expected = 30 * x @ y.T, 0.0
    for logits in (cosines, cosines.T):
        for i in range(6):
            negatives = [float(logits[i, j]) for j in range(6) if groups[j] != groups[i]]
            expected += (math.log(sum(map(math.exp, negatives))) - float(logits[i, i])) / 6 / 30
    assert float(loss) == pytest.approx(expected)
    assert plain > loss
    leaf = x.clone().requires_grad_()
    everything_equal = Views({"image": Features(leaf), "text": Features(y)}, torch.tensor(1.0))
    everything_equal.groups = torch.zeros(6, dtype=torch.int64)
    none = total(Cloob().terms(everything_equal))
    none.backward()
    assert float(none.detach()) == 0
    assert leaf.grad is not None
    assert not leaf.grad.any()


def test_gradients():
    assert torch.autograd.gradcheck(
        lambda x, y: total(cloob_loss(x, y, 8.0, TAU_30)), [p.requires_grad_() for p in pairs(4)]
    )


def test_half_precision_and_autocast_are_computed_in_float32():
    x, y = (part.float() for part in pairs())
    expected = total(cloob_loss(x, y, 8.0, TAU_30))
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(total(cloob_loss(x, y, 8.0, TAU_30)), expected, rtol=0, atol=0)
    half = total(cloob_loss(x.bfloat16(), y.bfloat16(), 8.0, TAU_30))
    assert half.dtype == torch.float32
    assert_close(half, total(cloob_loss(x.bfloat16().float(), y.bfloat16().float(), 8.0, TAU_30)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "clip"}, "choose infoloob or infonce"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"inverse_tau": 0.07}, "between 1 and 100"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Cloob(**settings)


def test_one_pair_cannot_leave_one_out():
    with pytest.raises(ValueError, match="at least two"):
        Cloob().terms(views(1))


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_training_lowers_the_loss_and_leaves_the_encoders_own_scale(family):
    _, records = Cloob.tiny()
    records = [{**record, "caption": f"{record['label']} {i}"} for i, record in enumerate(records)]
    encoder = FAMILIES[family]()
    done = Train(Cloob(), steps=12, batch_size=12, lr=1e-3, warmup=0).run(encoder, records)
    assert done.log[-1]["loss"] < done.log[0]["loss"]
    assert_close(done.encoder.scale, encoder.scale, rtol=0, atol=0)


def test_a_learnt_temperature_is_trained_and_stays_within_its_bounds():
    _, records = Cloob.tiny()
    for start, rate in ((30.0, 1e-2), (100.0, 1e-2), (1.0, 1e-2)):
        settings = Cloob(learn_inverse_tau=True, inverse_tau=start)
        done = Train(settings, steps=6, batch_size=12, lr=rate, warmup=0).run(FAMILIES["clip"](), records)
        learnt = done.objective.log_inverse_tau.detach()
        assert float(learnt) != pytest.approx(math.log(start))
        done.objective.terms(views())  # brings it back within bounds before it is used
        assert 0 <= float(learnt) <= math.log(100) + 1e-6
    assert Cloob().bind(FAMILIES["clip"]()) == Cloob()


def test_the_memory_is_the_batch_of_all_processes():
    alone = shared()
    assert alone["gradient"].abs().max() > 1e-3
    for found in run_processes(2, shared):
        assert_close(found, alone, rtol=0, atol=1e-12)


def test_found_by_its_name():
    assert get("cloob") is Cloob
