"""GradCache: the gradient of the full batch, exactly, with activations of one chunk at a time."""

from __future__ import annotations

import random
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ecliptic.core.batches import collate
from ecliptic.core.contracts import Features, Objective, Tokens, Views
from ecliptic.core.encoder import Encoder, HFEncoder
from ecliptic.core.grad_cache import check_chunks, chunks, encode_in_chunks, join
from ecliptic.core.objectives import InfoNCE, Sigmoid
from ecliptic.core.train import Train
from tests.core.lessons import assert_same, pictures
from tests.towers import FAMILIES, clip_encoder


class Headed(nn.Module, Objective):
    """Learns something itself, and couples the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 24, bias=False)
        nn.init.eye_(self.head.weight)

    def terms(self, views: Views) -> dict[str, Tensor]:
        return InfoNCE().terms(Views({**views, "image": Features(self.head(views["image"].pooled))}, views.scale))


def _double(objective: Objective) -> Objective:
    return objective.double() if isinstance(objective, nn.Module) else objective


def gradients(encoder: HFEncoder, objective: Objective, batch: Mapping[str, Any], encode: Any) -> dict[str, Tensor]:
    module = nn.ModuleList([encoder] + ([objective] if isinstance(objective, nn.Module) else []))
    module.zero_grad()
    torch.manual_seed(1)
    views = encode(batch)
    sum(objective.terms(views).values()).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", [InfoNCE, Sigmoid, Headed])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_the_full_batch(family, make):
    encoder, objective = FAMILIES[family]().double(), _double(make())  # in evaluation mode: no dropout
    batch = collate(encoder, pictures()[:7], objective)
    full = gradients(encoder, objective, batch, lambda b: objective.encode(encoder, b))
    cached = gradients(encoder, objective, batch, lambda b: encode_in_chunks(objective, encoder, b, 3))
    assert full.keys() == cached.keys()
    assert any("logit_scale" in name for name in full)
    for name in full:
        assert_close(cached[name], full[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_the_same_in_both_passes(family):
    """With dropout the comparison is with the same chunks encoded once, their graphs kept."""
    encoder, objective = FAMILIES[family]().double(), InfoNCE()
    for tower in (encoder.anatomy.image, encoder.anatomy.text):
        tower.blocks[0].register_forward_hook(lambda m, _, out: nn.functional.dropout(out, 0.3, m.training))
    encoder.train()
    batch = collate(encoder, pictures()[:7], objective)

    def kept(b: Mapping[str, Any]) -> Views:
        return join([objective.encode(encoder, part) for part in chunks(b, 3)])

    graph = gradients(encoder, objective, batch, kept)
    cached = gradients(encoder, objective, batch, lambda b: encode_in_chunks(objective, encoder, b, 3))
    plain = gradients(encoder.eval(), objective, batch, kept)
    for name in graph:
        assert_close(cached[name], graph[name], rtol=0, atol=1e-9, msg=name)
    assert max((plain[name] - graph[name]).abs().max() for name in graph) > 1e-3  # the dropout did something


@dataclass(frozen=True)
class Jittered(Objective):
    """Draws from every generator while it encodes, row by row."""

    rowwise: ClassVar[bool] = True

    def encode(self, encoder: Encoder, batch: Mapping[str, Any]) -> Views:
        shift = 0.1 * torch.rand(1) + 0.1 * float(np.random.rand()) + 0.1 * random.random()  # noqa: NPY002
        image = encoder.images(batch["image"] * (1 + shift))
        return Views({"image": image, "text": encoder.texts(batch["text"])}, encoder.scale)

    def terms(self, views: Views) -> dict[str, Tensor]:
        return InfoNCE().terms(views)


def test_every_generator_is_the_same_in_both_passes():
    encoder, objective = clip_encoder().double(), Jittered()
    batch = collate(encoder, pictures()[:6], objective)

    def run(encode: Any) -> dict[str, Tensor]:
        np.random.seed(3), random.seed(3)  # noqa: NPY002
        return gradients(encoder, objective, batch, encode)

    graph = run(lambda b: join([objective.encode(encoder, part) for part in chunks(b, 2)]))
    cached = run(lambda b: encode_in_chunks(objective, encoder, b, 2))
    for name in graph:
        assert_close(cached[name], graph[name], rtol=0, atol=1e-9, msg=name)


def test_activations_of_one_chunk_at_a_time():
    encoder, objective = clip_encoder(), InfoNCE()
    blocks = [*encoder.anatomy.image.blocks, *encoder.anatomy.text.blocks]
    alive: list[tuple[weakref.ref[Tensor], int]] = []
    most = 0

    def rows() -> int:
        return sum(count for output, count in alive if output() is not None)

    def watch(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal most
        alive.append((weakref.ref(output), len(output)))
        most = max(most, rows())

    for block in blocks:
        block.register_forward_hook(watch)
    batch = collate(encoder, pictures(), objective)
    views = objective.encode(encoder, batch)
    assert rows() == most == len(blocks) * 16  # what a backward pass over the full batch keeps
    del views
    assert rows() == 0
    most = 0
    views = encode_in_chunks(objective, encoder, batch, 2)
    assert rows() == 0
    objective.terms(views)["info_nce"].backward()
    assert 0 < most <= len(blocks) * 2
    assert len(alive) == len(blocks) * (1 + 8 + 8)  # each chunk was encoded twice


def test_batches_are_cut_by_rows():
    tokens = Tokens(torch.arange(10).view(5, 2), torch.ones(5, 2, dtype=torch.bool))
    batch = {"image": torch.arange(5), "text": tokens, "note": list("abcde"), "weight": np.arange(5), "shared": 0.5}
    parts = list(chunks(batch, 2))
    assert [part["note"] for part in parts] == [["a", "b"], ["c", "d"], ["e"]]
    assert [part["image"].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert parts[2]["text"].ids.tolist() == [[8, 9]]
    assert parts[1]["weight"].tolist() == [2, 3]
    assert [part["shared"] for part in parts] == [0.5] * 3
    with pytest.raises(ValueError, match=r"one length, not \{'a': 2, 'b': 3\}"):
        list(chunks({"a": [1, 2], "b": [1, 2, 3]}, 2))


def test_views_are_joined_with_everything_they_hold():
    def part(rows: int, words: int, mask: bool = True) -> Views:
        told = torch.ones(rows, words, dtype=torch.bool) if mask else None
        text = Features(torch.ones(rows, 4), torch.ones(rows, words, 4), {1: torch.ones(rows, words, 3)}, None, told)
        image = Features(torch.zeros(rows, 4), grid=(2, 2))
        return Views({"text": text, "image": image}, torch.tensor(2.0), torch.tensor(-1.0))

    whole = join([part(2, 3), part(1, 5)])
    assert whole["text"].pooled.shape == (3, 4)
    assert whole["text"].tokens.sum((1, 2)).tolist() == [12, 12, 20]  # padded with zeros
    assert whole["text"].layers[1].shape == (3, 5, 3)
    assert whole["text"].mask.sum(1).tolist() == [3, 3, 5]
    assert whole["image"].grid == (2, 2)
    assert (whole.scale, whole.bias) == (2.0, -1.0)
    with pytest.raises(ValueError, match="'text' views of the chunks differ in length and have no mask"):
        join([part(2, 3, mask=False), part(1, 5, mask=False)])


def test_what_cannot_be_cut_is_refused():
    class Coupled(InfoNCE):
        def encode(self, encoder: Encoder, batch: Mapping[str, Any]) -> Views:
            return super().encode(encoder, batch)

    with pytest.raises(ValueError, match="set `rowwise = True` in Coupled"):
        Train(Coupled(), steps=1, batch_size=8, chunk=4).apply(clip_encoder(), pictures())
    Train(Jittered(), steps=1, batch_size=8, chunk=4).apply(clip_encoder(), pictures())
    with pytest.raises(ValueError, match="1 is a batch norm in training"):
        check_chunks(InfoNCE(), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    check_chunks(InfoNCE(), nn.Sequential(nn.BatchNorm1d(2)).eval())
    with pytest.raises(ValueError, match="chunk=0: must be at least 1"):
        Train(InfoNCE(), chunk=0)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_in_chunks(family, precision):
    common = {"steps": 3, "batch_size": 8, "lr": 1e-3, "warmup": 0, "precision": precision}

    def run(**more: Any) -> list[float]:
        return [row["loss"] for row in Train(Headed(), **common, **more).run(FAMILIES[family](), pictures()).log]

    losses = run(chunk=3)
    if family == "dual":  # BERT's dropout draws other numbers for other chunks
        assert losses == run(chunk=3)
    else:
        assert losses == pytest.approx(run(), abs=1e-5 if precision == "no" else 3e-2)
    assert losses[2] != losses[0]


def test_a_chunk_as_large_as_the_batch_is_the_plain_run():
    common = {"steps": 2, "batch_size": 8, "lr": 1e-3}
    plain = Train(InfoNCE(), **common).apply(clip_encoder(), pictures())
    assert_same(Train(InfoNCE(), **common, chunk=8).apply(clip_encoder(), pictures()), plain)
