"""Softplus attention with re-weighting against softmax: small decoders trained on 64 characters, read over up to 1,024.

Text: sources of the standard library of the Python that runs this, which another version changes slightly; its last tenth is
held out. Arms differ in their attention alone: two layers, two heads of width 32, rotary positions, one initialisation and one
order of batches per seed.

- loss.L: cross-entropy in nats per character, over the last 64 characters of windows of L + 1; all arms and lengths share
  these characters, only what stands before them differs.
- rise: loss.1024 - loss.64.

The arms `*_then_15` are trained without re-weighting and get it afterwards, without another step of training.
"""

from __future__ import annotations

import sysconfig
from collections import Counter
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from ecliptic.core.claims import Claim, Gate
from ecliptic.methods.attend.softplus_attention import LSSA, SOFTMAX, Form, replace_attention

FILES, LETTERS, WIDTH, HEADS, LAYERS = 60, 95, 64, 2, 2
TRAINED, LENGTHS, ASKED, WINDOWS = 64, (64, 128, 256, 512, 1024), 64, 64
STEPS, BATCH, RATE = 700, 16, 2e-3
ARMS = {  # trained with, read with
    "softmax": (SOFTMAX, SOFTMAX),
    "lssa": (LSSA, LSSA),
    "lssar_3": (Form(reweight=3), Form(reweight=3)),
    "lssar_15": (Form(reweight=15), Form(reweight=15)),
    "softmax_then_15": (SOFTMAX, Form(phi="exp", cosine=False, reweight=15)),
    "lssa_then_15": (LSSA, Form(reweight=15)),
}


def against_softmax(says: str, arm: str, metric: str, margin: float, **more: object) -> Gate:
    return Gate(f"{metric}: {says}", arm, "softmax", margin, metric, lower=True, **more)  # type: ignore[arg-type]


CLAIM = Claim(
    says="read over 16 times its training length, a decoder with softplus attention and a re-weighting of power 15 loses less "
    "than half of what one with softmax loses; without the re-weighting, or with a power of 3, it does not",
    arms=tuple(ARMS),
    mode="difference",
    seeds=(0, 1, 2),
    gates=(  # margins from a reference run of one seed with another decoder, set before the first run
        against_softmax("softmax's against that of power 15", "lssar_15", "rise", 2.0, mode="ratio"),
        against_softmax("power 15", "lssar_15", "loss.512", 0.2),
        against_softmax("power 15", "lssar_15", "loss.1024", 0.4),
        against_softmax("power 15", "lssar_15", "loss.64", -0.25, note="at this size sharp rows cost a little"),
        against_softmax("no re-weighting", "lssa", "loss.64", -0.05),
        against_softmax("softmax's against no re-weighting's", "lssa", "rise", 1.25, mode="ratio", kind="control"),
        against_softmax("softmax's against that of power 3", "lssar_3", "rise", 1.25, mode="ratio", kind="control"),
        against_softmax("re-weighting after training", "lssa_then_15", "loss.1024", 0.4, gate=False),
        against_softmax("re-weighting after training", "softmax_then_15", "loss.1024", 0.4, gate=False),
    ),
)


def run(arm: str, seed: int) -> dict[str, float]:
    """Losses at every length and their rise."""
    trained_with, read_with = ARMS[arm]
    model = trained(trained_with, seed)
    replace_attention(model, read_with)
    found = {f"loss.{length}": loss(model, length, seed) for length in LENGTHS}
    replace_attention(model, trained_with)
    return {**found, "rise": found[f"loss.{LENGTHS[-1]}"] - found[f"loss.{LENGTHS[0]}"]}


@cache
def trained(form: Form, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=LETTERS + 1,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTHS[-1],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).train()
    replace_attention(model, form, retrain=True)
    data = text()[0]
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=STEPS)
    for _ in range(STEPS):
        starts = torch.randint(len(data) - TRAINED, (BATCH, 1), generator=generator)
        windows = data[starts + torch.arange(TRAINED + 1)]
        optimiser.zero_grad()
        of_each(model, windows).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model.eval()


def of_each(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """(B, L + 1) -> (B, L) nats: how badly each character but the first is foreseen."""
    logits = model(windows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")


@torch.no_grad()
def loss(model: LlamaForCausalLM, length: int, seed: int) -> float:
    data = text()[1]
    ends = torch.randint(LENGTHS[-1] + 1, len(data), (WINDOWS, 1), generator=torch.Generator().manual_seed(1000 + seed))
    windows = data[ends - torch.arange(length, -1, -1)]
    return float(torch.cat([of_each(model, part)[:, -ASKED:] for part in windows.split(8)]).mean())


@cache
def text() -> tuple[Tensor, Tensor]:
    """Characters as numbers, the most frequent first and one for all the rest: nine tenths to train on, one to ask."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:FILES]
    whole = "".join(file.read_text(encoding="utf-8") for file in files)
    known = {letter: i for i, (letter, _) in enumerate(Counter(whole).most_common(LETTERS))}
    data = torch.tensor([known.get(letter, LETTERS) for letter in whole])
    return data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
