"""Several processes against one: the same loss, the same features and, after averaging over processes, the same gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from ecliptic.core import ring
from ecliptic.core.contracts import Features, Objective, Views
from ecliptic.core.distributed import gather, gather_views, rank, world_size
from ecliptic.core.objectives import InfoNCE, Sigmoid
from tests.core.processes import run_processes

BATCH, WIDTH, DIM = 12, 10, 6
GROUPS = (0, 1, 2, 0, 4, 5, 1, 7, 8, 9, 10, 4)  # equal ones lie on different processes, for 2 and for 4 of them
OBJECTIVES = {
    "info_nce": InfoNCE(),
    "info_nce, duplicates repel": InfoNCE(skip_duplicates=False),
    "sigmoid": Sigmoid(),
    "info_nce, tiled": InfoNCE(tile=5),
    "sigmoid, tiled": Sigmoid(tile=5),
    "info_nce, ring": InfoNCE(ring=True, tile=2),
    "info_nce, ring, duplicates repel": InfoNCE(ring=True, skip_duplicates=False),
    "sigmoid, ring": Sigmoid(ring=True, tile=2),
    "sigmoid, ring, duplicates repel": Sigmoid(ring=True, skip_duplicates=False),
}
PLAIN = {  # what one process computes on the whole batch, with all logits at once
    ("info_nce", False): InfoNCE(),
    ("info_nce", True): InfoNCE(skip_duplicates=False),
    ("sigmoid", False): Sigmoid(),
    ("sigmoid", True): Sigmoid(skip_duplicates=False),
}
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


class Towers(nn.Module):
    """Two linear towers, a temperature and a bias under an objective: all that DistributedDataParallel has to average."""

    def __init__(self, objective: Any):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image = nn.Parameter(torch.randn(WIDTH, DIM, generator=generator))
        self.text = nn.Parameter(torch.randn(WIDTH, DIM, generator=generator))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.bias = nn.Parameter(torch.tensor(-3.0))
        self.objective = objective

    def forward(self, image: Tensor, text: Tensor, groups: Tensor) -> Tensor:
        views = {"image": Features(normalize(image @ self.image, dim=-1))}
        views["text"] = Features(normalize(text @ self.text, dim=-1))
        own = Views(views, self.scale.exp(), self.bias, groups)
        terms = self.objective.terms(own if self.objective.local else gather_views(own))
        # 3: the loss need not be the end. The bias: to DistributedDataParallel an unused parameter is an error.
        return 3 * torch.stack(list(terms.values())).sum() + 0 * self.bias


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image, text = torch.randn(2, BATCH, WIDTH, generator=generator)
    return image, text, torch.tensor(GROUPS)


def learn(objective: Objective) -> dict[str, Tensor]:
    """Loss and gradients of this process's share of the batch, as DistributedDataParallel leaves them."""
    towers = Towers(objective)
    model = towers if world_size() == 1 else DistributedDataParallel(towers)
    size = BATCH // world_size()
    loss = model(*(part[rank() * size :][:size] for part in batch()))
    loss.backward()
    grads = {name: p.grad for name, p in towers.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | grads


def several() -> dict[str, Any]:
    """Everything that the tests ask of several processes, in one start of them."""
    found: dict[str, Any] = {name: learn(objective) for name, objective in OBJECTIVES.items()}
    found["numbers"] = (rank(), world_size())
    found["uneven"] = uneven(rank())
    found["refused"] = refused()
    found["never the whole batch"] = largest_block()
    found["unequal"] = unequal()
    return found


def uneven(n: int) -> dict[str, Any]:
    """Processes with n + 1 rows each, whose captions have n + 2 words, and losses that differ from each other."""
    rows = (torch.arange((n + 1) * 3.0).reshape(n + 1, 3) + 100 * n).requires_grad_()
    words = torch.full((n + 1, n + 2, 3), n + 1.0, requires_grad=True)
    mask = torch.ones(n + 1, n + 2, dtype=torch.bool)
    views = Views({"text": Features(rows, words, {4: 2 * words}, None, mask)}, torch.tensor(1.0))
    views.note = "kept"  # type: ignore[attr-defined]
    whole = gather_views(views)
    text = whole["text"]
    assert text.tokens is not None
    ((n + 1) * text.pooled.sum() + text.tokens.sum() + text.layers[4].square().sum() * n).backward()
    return {
        "pooled": text.pooled.detach(), "tokens": text.tokens.detach(), "mask": text.mask, "groups": whole.groups,
        "layer": text.layers[4].detach(), "rows.grad": rows.grad, "words.grad": words.grad, "note": whole.note,  # type: ignore[attr-defined]
        "numbers": gather(torch.full((n,), n)), "half": gather(torch.ones(1, 2, dtype=torch.bfloat16)).dtype,
    }  # fmt: skip


def refused() -> str:
    """Lengths that differ without a mask: an error in every process, not a wait for ever in some."""
    try:
        gather_views(Views({"text": Features(torch.ones(1, 3), torch.ones(1, rank() + 1, 3))}, torch.tensor(1.0)))
    except ValueError as error:
        return str(error)
    return ""


def largest_block() -> tuple[int, int]:
    """The most rows and columns of logits, whole tiles or not, that this process has at a time in a ring."""
    sizes = []
    seen = ring.info_nce_sums

    def watched(block: Any, *rest: Any) -> None:
        sizes.append((len(block.image), len(block.text)))
        seen(block, *rest)

    ring.info_nce_sums = watched
    try:
        learn(InfoNCE(ring=True))
    finally:
        ring.info_nce_sums = seen
    assert len(sizes) == world_size()
    return max(sizes)


def unequal() -> str:
    try:
        ring.ring_info_nce(torch.ones(rank() + 1, 3), torch.ones(rank() + 1, 3), torch.tensor(1.0))
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module", params=[2, 4])
def found(request) -> list[dict[str, Any]]:
    return run_processes(request.param, several)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_same_gradient_as_one_process(found, name):
    alone = learn(PLAIN[name.partition(",")[0], "repel" in name])
    assert {"loss", "image", "text", "scale", "bias"} == set(alone)
    assert alone["image"].abs().max() > 1e-3
    for one in found:
        for part, expected in alone.items():
            assert_close(one[name][part], expected, **CLOSE, msg=lambda m, part=part: f"{part}: {m}")


def test_every_process_has_its_number(found):
    assert [one["numbers"] for one in found] == [(i, len(found)) for i in range(len(found))]


def test_uneven_parts_are_padded_and_put_in_the_order_of_ranks(found):
    count = len(found)
    longest = count + 1
    for n, one in enumerate(found):
        got = one["uneven"]
        rows = [torch.arange((r + 1) * 3.0).reshape(r + 1, 3) + 100 * r for r in range(count)]
        assert_close(got["pooled"], torch.cat(rows))
        for r, part in enumerate(got["tokens"].split([r + 1 for r in range(count)])):
            assert_close(part[:, : r + 2], torch.full((r + 1, r + 2, 3), r + 1.0))
            assert not part[:, r + 2 :].any()
        lengths = torch.cat([torch.full((r + 1,), r + 2) for r in range(count)])
        assert_close(got["mask"], torch.arange(longest) < lengths[:, None])
        assert_close(got["layer"], 2 * got["tokens"])
        assert_close(got["numbers"], torch.cat([torch.full((r,), r) for r in range(count)]))
        assert got["half"] == torch.bfloat16
        assert got["note"] == "kept"
        assert got["groups"] is None
        # the sum over processes of what each asked for: weights 1 .. count on the rows, 0 .. count - 1 on the layers
        assert_close(got["rows.grad"], torch.full((n + 1, 3), sum(range(1, count + 1)) * 1.0))
        through_layers = sum(range(count)) * 8.0 * (n + 1)  # d (2 w)^2 / dw = 8 w
        assert_close(got["words.grad"], torch.full((n + 1, n + 2, 3), count + through_layers))


def test_lengths_without_a_mask_are_refused_everywhere(found):
    for one in found:
        assert "'text'" in one["refused"]
        assert "mask" in one["refused"]


def test_a_ring_holds_its_own_block_only(found):
    size = BATCH // len(found)
    assert {one["never the whole batch"] for one in found} == {(size, size)}


def test_a_ring_of_unequal_parts_is_refused_everywhere(found):
    for one in found:
        assert "must be the same in all processes" in one["unequal"]


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if "ring" in name])
def test_a_ring_of_one(name):
    alone = learn(PLAIN[name.partition(",")[0], "repel" in name])
    for part, value in learn(OBJECTIVES[name]).items():
        assert_close(value, alone[part], **CLOSE)


@pytest.mark.parametrize(
    "loss", [ring.ring_info_nce, lambda *a: ring.ring_sigmoid_loss(*a[:3], torch.tensor(0.0), *a[3:])]
)
def test_what_a_ring_refuses(loss):
    rows = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"must both be \(b, D\)"):
        loss(rows, rows[:2], torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"groups must be of shape \(3,\)"):
        loss(rows, rows, torch.tensor(1.0), torch.zeros(2))


def test_one_process_changes_nothing():
    assert (rank(), world_size()) == (0, 1)
    assert not dist.is_initialized()
    views = Views({"image": Features(torch.ones(2, 3))}, torch.tensor(1.0))
    assert gather_views(views) is views
    rows = torch.ones(2, 3)
    assert gather(rows) is rows
