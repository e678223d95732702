"""PerceptionCLIP on a rendered "Waterbirds": a model that took the background for the object, asked with and without it.

Eight shapes in two kinds, on land (khaki, beige, cloudy) or on water (navy, slate, lined). A small CLIP with a convolutional
stem learns them for 350 steps, kind and background independent, then goes on for 200 steps in which 95 % of one kind lie on
land and 95 % of the other on water: a shortcut. Half of the captions name the background, so that the text tower knows it.
(Steps, rates and the size of the shapes were chosen on another seed by plain prompts alone.)

Of 3,000 test scenes, as many in each (background, kind): `average` and `worst`, how often the shape named is of the right kind,
over all and in the worst cell; `context`, how often the likeliest background is the true one, for plain prompts the share of
the more frequent one. Temperatures are chosen by the average accuracy on 1,000 other scenes.

before: the model of the first 350 steps. silent: no caption names a background. letters: land and water are called by random
letters, the mean of five draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ecliptic.core.claims import Claim, Gate
from ecliptic.core.contracts import Features, Prediction, Record, Tokens, Views
from ecliptic.core.encoder import Encoder, HFEncoder
from ecliptic.core.objectives import InfoNCE
from ecliptic.core.train import Train
from ecliptic.data.scenes import SHAPES, draw
from ecliptic.eval.groups import group_accuracy
from ecliptic.methods.adapt.perceptionclip import Factors, PerceptionClip, random_letters, wrong_context
from ecliptic.models.tiny import MEAN, SPREAD, tokenizer

SIDE, PATCH, WIDTH = 32, 8, 64
CLASSES = SHAPES[:8]
KINDS = (CLASSES[0::2], CLASSES[1::2])  # circle, triangle, cross, heart; square, star, ring, crescent
GROUNDS: dict[str, dict[str, Any]] = {
    "land": {"grounds": ("khaki", "beige"), "backgrounds": ("cloudy",)},
    "water": {"grounds": ("navy", "slate"), "backgrounds": ("lined",)},
}
WORLD: dict[str, Any] = {"textures": ("plain",), "lightings": ("even",), "sizes": ("large",), "holdout": ()}
PLACES = {"background": {"land": ["on land"], "water": ["on water"]}}
UNSAID = {"background": {"unsaid": [""], **PLACES["background"]}}
TEMPERATURES = (0.5, 1.0, 3.0, 5.0, 10.0)
DRAWS = 5  # of random letters

CLAIM = Claim(
    says="in a model with a background shortcut, conditioning on the inferred background raises worst-group accuracy far above "
    "plain prompts and a prompt ensemble, at no cost in the average; wrong or meaningless context does not",
    arms={
        "plain": ("plain", "shortcut"),
        "ensemble": ("ensemble", "shortcut"),
        "two_step": ("two_step", "shortcut"),
        "unsaid": ("unsaid", "shortcut"),
        "without_y": ("without_y", "shortcut"),
        "oracle": ("oracle", "shortcut"),
        "wrong": ("wrong", "shortcut"),
        "letters": ("letters", "shortcut"),
        "plain_before": ("plain", "before"),
        "two_step_before": ("two_step", "before"),
        "plain_silent": ("plain", "silent"),
        "two_step_silent": ("two_step", "silent"),
    },
    mode="difference",
    gates=(  # margins set before the first run
        Gate("worst group: PerceptionCLIP against plain prompts", "two_step", "plain", 0.2, "worst"),
        Gate("worst group: against a prompt ensemble", "two_step", "ensemble", 0.1, "worst"),
        Gate("average: against plain prompts and the ensemble", "two_step", ("plain", "ensemble"), 0.0, "average"),
        Gate("background inferred with the classes: against guessing", "two_step", "plain", 0.3, "context"),
        Gate("background inferred without them: against guessing", "without_y", "plain", 0.3, "context"),
        Gate("worst group: the true background against the wrong one", "oracle", "wrong", 0.1, "worst"),
        Gate("worst group: the shortcut costs plain prompts", "plain_before", "plain", 0.2, "worst", kind="headroom"),
        Gate("worst group: random letters against plain prompts", "letters", "plain", 0.01, "worst", kind="control"),
        Gate("average: random letters against plain prompts", "letters", "plain", 0.01, "average", kind="control"),
        Gate(
            "worst group, where captions named no background: against plain prompts",
            "two_step_silent",
            "plain_silent",
            0.05,
            "worst",
            kind="control",
        ),
        Gate("worst group: with an empty value too", "unsaid", "plain", 0.2, "worst", gate=False),
        Gate("worst group: background inferred without the classes", "without_y", "plain", 0.2, "worst", gate=False),
        Gate("worst group: inferred against true background", "two_step", "oracle", -0.02, "worst", gate=False),
        Gate("average before the shortcut: no loss", "two_step_before", "plain_before", -0.02, "average", gate=False),
        Gate(
            "average before the shortcut: no gain",
            "two_step_before",
            "plain_before",
            0.02,
            "average",
            kind="control",
            gate=False,
        ),
        *(
            Gate(
                f"worst group: with an empty value, temperature {t:g}",
                "unsaid",
                "plain",
                0.2,
                f"worst at {t:g}",
                gate=False,
            )
            for t in TEMPERATURES
        ),
    ),
    note="Random letters fail as a control: whatever follows the comma undoes part of the shortcut, because the text tower has "
    "seen nothing there but the two backgrounds. On another seed letters gained 0.10 to 0.17 in the worst group, in each draw; "
    "with a colour after the comma in a quarter of the captions they gained 0.02 to 0.14, but then the true background was only "
    "0.05 better than the wrong one. So here a part of the gain, less than half, is owed to saying anything at all. The model "
    "that never read of a background takes no shortcut, so that its control passes without having been put to the test.",
)


class Pictures(NamedTuple):
    """Features (N, D), positions of the classes, of the kinds and of the backgrounds (N,)."""

    features: Tensor
    shape: Tensor
    kind: Tensor
    ground: Tensor


def run(arm: tuple[str, str], seed: int) -> dict[str, float]:
    """Figures of one way to ask one model."""
    way, state = arm
    if way == "letters":
        drawn = [figures("two_step", state, seed, random_letters(PLACES, DRAWS * seed + k)) for k in range(DRAWS)]
        return {name: float(np.mean([found[name] for found in drawn])) for name in drawn[0]}
    return figures(way, state, seed, UNSAID if way == "unsaid" else PLACES)


def figures(way: str, state: str, seed: int, factors: Factors) -> dict[str, float]:
    encoder, held, test = model(state, seed), encoded("val", state, seed), encoded("test", state, seed)
    judge = PerceptionClip(
        CLASSES, {} if way == "plain" else factors, infer="without_y" if way == "without_y" else "with_y"
    )
    judge.fit(encoder)
    judge.temperature_ = judge.select(held.features, held.shape).value
    if way == "ensemble":
        said = judge.predict_ensemble(test.features)
    elif way in ("oracle", "wrong"):
        said = judge.predict_given(
            test.features, test.ground if way == "oracle" else wrong_context(test.ground, 2, seed)
        )
    else:
        said = judge.predict_features(test.features)
    found = by_group(said, test)
    found["context"] = named(judge, test)
    for temperature in TEMPERATURES if way in ("plain", "unsaid") else ():
        judge.temperature_ = temperature
        found[f"worst at {temperature:g}"] = by_group(judge.predict_features(test.features), test)["worst"]
    return found


def by_group(said: Prediction, test: Pictures) -> dict[str, float]:
    assert said.labels is not None
    hits = [float(label in KINDS[kind]) for label, kind in zip(said.labels, test.kind.tolist(), strict=True)]
    found = group_accuracy(hits, test.ground.tolist(), test.kind.tolist())
    return {"average": found.average, "worst": found.worst}


def named(judge: PerceptionClip, test: Pictures) -> float:
    """How often the likeliest of land and water is the true one; without any to choose from, the more frequent one."""
    places = [i for i, names in enumerate(judge.contexts_) if set(names) & GROUNDS.keys()]
    if not places:
        return float(test.ground.bincount().max() / len(test.ground))
    told = judge.perceive_features(test.features).context[:, places].argmax(-1)
    return float((told == test.ground).double().mean())


# Scenes


@cache
def pool(split: str, n: int, seed: int, usual: float, named: bool) -> list[Record]:
    """`n` scenes, as many of each kind, the share `usual` of each on its own ground: land for the first, water for the second."""
    records: list[Record] = []
    for kind, shapes in enumerate(KINDS):
        for ground, (place, look) in enumerate(GROUNDS.items()):
            count = round(n / 2 * (usual if kind == ground else 1 - usual))
            drawn = draw(split, range(count), 10 * seed + 2 * kind + ground, SIDE, shapes=shapes, **WORLD, **look)
            for i, (image, scene) in enumerate(zip(drawn.images, drawn.scenes, strict=True)):
                shape = scene.things[0].shape
                caption = f"a photo of a {shape}, on {place}." if named and i % 2 else f"a photo of a {shape}."
                facts = {"shape": CLASSES.index(shape), "kind": kind, "ground": ground}
                records.append({"id": f"{kind}-{ground}-{i}", "image": image, "caption": caption, **facts})
    return records


@cache
@torch.inference_mode()
def encoded(split: str, state: str, seed: int) -> Pictures:
    records = pool(split, {"val": 1000, "test": 3000}[split], 2 * seed, 0.5, False)
    encoder = model(state, seed)
    pixels = torch.from_numpy(encoder.transform.normalise(np.stack([record["image"] for record in records])))
    features = torch.cat([encoder.images(part).pooled for part in pixels.split(500)]).clone()
    return Pictures(
        features, *(torch.tensor([record[name] for record in records]) for name in ("shape", "kind", "ground"))
    )


# Models


@cache
def model(state: str, seed: int) -> HFEncoder:
    if state == "before":
        return started(seed, named=True)
    named = state != "silent"
    skewed = pool("train", 8000, 2 * seed + 1, 0.95, named)
    return learnt(started(seed, named), skewed, steps=200, lr=1e-3, seed=seed)


@cache
def started(seed: int, named: bool) -> HFEncoder:
    return learnt(blank(seed), pool("train", 16000, 2 * seed, 0.5, named), steps=350, lr=1.5e-3, seed=seed)


def learnt(encoder: HFEncoder, records: list[Record], steps: int, lr: float, seed: int) -> HFEncoder:
    return Train(FewCaptions(), steps=steps, lr=lr, batch_size=128, seed=seed).apply(encoder, records)  # type: ignore[return-value]


@dataclass(frozen=True)
class FewCaptions(InfoNCE):
    """InfoNCE where a batch of 128 has at most 24 different captions: each is encoded once."""

    def encode(self, encoder: Encoder, batch: Mapping[str, Any]) -> Views:
        rows, place = batch["text"].ids.unique(dim=0, return_inverse=True)
        first = torch.stack([(place == k).nonzero()[0, 0] for k in range(len(rows))])
        said = encoder.texts(Tokens(rows, batch["text"].mask[first])).pooled
        return Views(
            {"image": encoder.images(batch["image"]), "text": Features(said[place])}, encoder.scale, encoder.bias
        )


class Stem(nn.Sequential):
    """(B, 3, 32, 32) -> (B, width, 4, 4) by three convolutions instead of one: shapes are learnt in few steps."""

    def __init__(self, width: int):
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 24), (24, 48), (48, width)):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.GroupNorm(4, outputs), nn.ReLU()]
        super().__init__(*layers[:-1])

    @property
    def weight(self) -> Tensor:
        """Asked for its type by transformers."""
        return self[0].weight  # type: ignore[return-value]


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
        model.vision_model.embeddings.patch_embedding = Stem(WIDTH)
    model.logit_scale.data.fill_(math.log(1 / 0.07))  # as CLIP starts
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "image_mean": list(MEAN),
        "image_std": list(SPREAD),
    }
    return HFEncoder.from_hf(model, words, processor, name="perceptionclip-claim")
