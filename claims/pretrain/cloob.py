"""CLOOB against CLIP and against each of its two changes alone, from the same encoder and with equal further training.

Scenes of two things, ten colours by three shapes, whose captions name both from left to right, so that few in a batch are
equal. A two-layer ViT (36 pixels, patches of 6, width 64) and a text tower as small learn with CLIP's loss for 600 steps; from
there on each arm goes its own way for 250 steps. Retrieval needs that start: before, all embeddings are alike.
(With beta 0 the loss is constant, which a test shows without any training.)

participation: the participation ratio of the covariance of 600 held-out pictures of one thing each; k99: how many directions
hold 99 % of their variance; text_participation: of the captions of 600 held-out pairs; recall: text-to-image R@1 among 200
held-out pairs, in [0, 1], the mean over five such sets: one set alone leaves a standard error of 0.03 per arm, too coarse
for a margin of 0.06.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from ecliptic.core.claims import Claim, Gate
from ecliptic.core.contracts import Record
from ecliptic.core.encoder import HFEncoder
from ecliptic.core.train import Train
from ecliptic.data.scenes import scenes
from ecliptic.eval.metrics import recall_at_k
from ecliptic.methods.pretrain.cloob import Cloob
from ecliptic.models.tiny import MEAN, SPREAD, tokenizer
from ecliptic.ops.spectrum import directions_holding, participation_ratio

SIDE, PATCH, WIDTH = 36, 6, 64
PAIRS, SETS = 200, 5
WORLD: dict[str, Any] = {
    "shapes": ("square", "ring", "cross"),
    "textures": ("plain",),
    "relations": ("left of",),
    "sizes": ("medium",),
    "rotation": 0.0,
    "backgrounds": ("plain",),
    "lightings": ("even",),
    "holdout": (),
}
ARMS = {
    "clip": Cloob(objective="infonce", hopfield=False),
    "infoloob": Cloob(hopfield=False),
    "hopfield": Cloob(objective="infonce"),
    "cloob": Cloob(),
    "identity": Cloob(beta=1000.0),
}

CLAIM = Claim(
    says="after equal further training CLOOB keeps more directions of the image embedding in use than InfoNCE, and than "
    "retrieval or InfoLOOB alone, while it finds pictures nearly as well",
    arms=tuple(ARMS),
    seeds=(0, 1, 2),
    gates=(  # set before the first run, from a pilot on other pictures with one seed
        Gate("participation, pictures: CLOOB against CLIP", "cloob", "clip", 1.3, "participation"),
        Gate("participation, pictures: against InfoLOOB alone", "cloob", "infoloob", 1.15, "participation"),
        Gate("participation, pictures: against retrieval alone", "cloob", "hopfield", 1.15, "participation"),
        Gate("R@1: CLOOB within 6 points of CLIP", "cloob", "clip", -0.06, "recall", mode="difference"),
        Gate(
            "control, beta 1000, where retrieval changes nothing but the cross terms: against CLIP",
            "identity",
            "clip",
            1.3,
            "participation",
            kind="control",
        ),
        Gate("k99, pictures: CLOOB against CLIP", "cloob", "clip", 1.0, "k99", gate=False),
        Gate("participation, texts: CLOOB against CLIP", "cloob", "clip", 1.0, "text_participation", gate=False),
    ),
    note="R@1 was first measured among one set of 200 pairs a seed, which gave -0.065 with a standard error of about 0.03; now "
    "it is the mean over five sets, the margin being the same.",
)


def run(arm: str, seed: int) -> dict[str, float]:
    """Figures of one arm on held-out pictures."""
    encoder = Train(ARMS[arm], steps=250, lr=5e-4, batch_size=64, seed=seed).apply(started(seed), pictures(seed))
    return figures(encoder, seed)


@cache
def started(seed: int) -> HFEncoder:
    """The encoder that every arm begins with: 600 steps of CLIP's loss."""
    return Train(ARMS["clip"], steps=600, lr=1e-3, batch_size=64, seed=seed).apply(blank(seed), pictures(seed))  # type: ignore[return-value]


def figures(encoder: HFEncoder, seed: int) -> dict[str, float]:
    singles = encoder.encode_images(loaded("test", 600, seed, "single", "picture"))
    images = encoder.encode_images(loaded("test", PAIRS * SETS, seed, "pair", "picture"))
    words = encoder.encode_texts(loaded("test", PAIRS * SETS, seed, "pair", "caption"))
    found = [
        recall_at_k((some @ said.T).numpy(), ks=(1,))["text_to_image.recall@1"]
        for some, said in zip(images.split(PAIRS), words.split(PAIRS))
    ]
    return {
        "participation": participation_ratio(singles),
        "k99": float(directions_holding(singles)),
        "text_participation": participation_ratio(words[:600]),
        "recall": sum(found) / SETS,
    }


@cache
def pictures(seed: int) -> list[Record]:
    found = scenes("train", 4000, seed, SIDE, kind="pair", **WORLD)
    return [{"id": r["id"], "image": np.asarray(r["image"]), "caption": r["caption"]} for r in found]


@cache
def loaded(split: str, n: int, seed: int, kind: str, what: str) -> list[Any]:
    found = scenes(split, n, seed, SIDE, kind=kind, **WORLD)
    return [record["image" if what == "picture" else "caption"] for record in found]


def blank(seed: int) -> HFEncoder:
    """The untrained model, with weights drawn from the seed alone."""
    from transformers import CLIPConfig, CLIPModel

    words = tokenizer()
    shared = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": WIDTH,
    }
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = CLIPConfig(
        vision_config={**shared, "image_size": SIDE, "patch_size": PATCH},
        text_config={**shared, **ends, "vocab_size": len(words), "max_position_embeddings": 64},
        projection_dim=WIDTH,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "image_mean": list(MEAN),
        "image_std": list(SPREAD),
    }
    return HFEncoder.from_hf(model, words, processor, name="cloob-claim")
