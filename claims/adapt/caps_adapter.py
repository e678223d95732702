"""CapS-Adapter: is a support of pictures generated from captions of the target better than one generated from class names?

Rendered scenes and the `tiny` model, which learnt filled shapes, upright. The captioner is the renderer's own caption of four
target pictures of each class ("a line drawing of a small striped red circle"); the generator is the renderer, which draws what a
prompt names and leaves all else to chance. CapS: a support from these captions. SuS: one from the class names alone.

- drawings: eight shapes, named as they are; the target are line drawings, which no class name says.
- turned: the same drawings at any angle, which neither names nor captions say.
- kinds: four shapes in two colours each, filled as `tiny` learnt them; the names tell the shape only ("circle of kind one"), the
  captions the colour. No style to learn here: what words that tell classes apart add as keys. Reported, judges nothing.

Ten generated pictures of each class, ten labelled ones to choose weights on, 800 to test on. Accuracy in [0, 1]; `delta` is the
share of the captions that was chosen. `zero_shot_biased` is zero-shot with one bias for each class, fitted on the same labelled
pictures: what these give without any support.

History. The targets were looked at on seeds 100 to 103: `turned` is here because TIP-X with SuS gained 0.026 on `drawings`
there. A first run on seeds 0 to 4 judged random keys against plain zero-shot on `drawings` as well, and failed that gate by
+0.052 (SuS with divergence: +0.017). The reason: on `drawings` zero-shot gives one class half of all answers, and any support
shifts the classes against each other by sums over its keys, of which validation picks what repairs that; eight fitted biases
alone gain about 0.18. So the biased head came in, as a further baseline that CapS must beat; on `drawings` those controls are
reported and do not judge, on `turned`, where biases gain next to nothing, they do; all was measured anew on new seeds.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from ecliptic.core.claims import Claim, Gate
from ecliptic.core.contracts import Record
from ecliptic.core.encoder import HFEncoder, load
from ecliptic.core.zeroshot import zero_shot_head
from ecliptic.data.scenes import COLOURS, SHAPES, SIZES, TEXTURES, draw, scenes
from ecliptic.data.shots import encode_views, labels_of
from ecliptic.methods.adapt.caps_adapter import CapsAdapter, build_support, class_captions
from ecliptic.ops.support_cache import Support

CAPTIONED, GENERATED, VALIDATED, PLENTY, TESTED = 4, 10, 10, 80, 800  # of each class, the last of all
CAPTIONS = ("size", "texture", "colour", "shape")
KINDS = {f"{hue} {shape}": f"{shape} of kind {kind}" for shape in ("circle", "star", "heart", "cross")
         for hue, kind in (("red", "one"), ("blue", "two"))}  # fmt: skip


class World(NamedTuple):
    """Options of `scenes`, the attributes that make the label, and the class name of each label."""

    options: dict[str, Any]
    label: tuple[str, ...]
    names: dict[str, str]


SHOWN = {shape: shape for shape in SHAPES[:8]}
DRAWN: dict[str, Any] = {"style": "drawing", "shapes": tuple(SHOWN), "holdout": ()}
WORLDS = {
    "drawings": World(DRAWN, ("shape",), SHOWN),
    "turned": World({**DRAWN, "rotation": 180.0}, ("shape",), SHOWN),
    "kinds": World(
        {"shapes": ("circle", "star", "heart", "cross"), "colours": ("red", "blue"), "holdout": ()},
        ("colour", "shape"),
        KINDS,
    ),
}
TIP: dict[str, Any] = {"gamma": 0.0, "delta": 0.0}
TIP_X: dict[str, Any] = {"delta": 0.0}


class Arm(NamedTuple):
    """pictures: from which support; captions: the same, or shuffled over all classes, or those of CapS; settings: weights."""

    pictures: str
    captions: str = "own"
    settings: dict[str, Any] = {}  # noqa: RUF012  (read only)
    validated: bool = True


ARMS: dict[str, Any] = {
    "zero_shot": None,
    "zero_shot_biased": None,
    "linear_probe": None,
    "sus_tip": Arm("sus", settings=TIP),
    "sus_tip_x": Arm("sus", settings=TIP_X),
    "sus": Arm("sus"),
    "caps_tip": Arm("caps", settings=TIP),
    "caps_tip_x": Arm("caps", settings=TIP_X),
    "caps": Arm("caps"),
    "caps_votes": Arm("caps", settings={"gamma": 0.0}),
    "caps_captions": Arm("caps", settings={"gamma": 0.0, "delta": 1.0}),
    "caps_shuffled": Arm("caps", captions="shuffled"),
    "sus_pictures": Arm("sus", captions="caps"),
    "random": Arm("random"),
    "label_free": Arm("caps", validated=False),
}


def gate(task: str, says: str, better: str, than: str | tuple[str, ...], margin: float, **more: Any) -> Gate:
    return Gate(f"{task}: {says}", better, than, margin, more.pop("metric", task), **more)


SUS = ("sus_tip", "sus_tip_x", "sus")


def gates(task: str, **controls: Any) -> tuple[Gate, ...]:
    """Three points over SuS, two over zero-shot, controls within one: set before the first run on these seeds."""
    against: Any = {"than": "zero_shot", "margin": 0.01, "kind": "control"}
    return (
        gate(task, "a linear probe on 80 pictures of each class", "linear_probe", "zero_shot", 0.1, kind="headroom"),
        gate(task, "CapS against SuS, whichever way SuS is used", "caps", SUS, 0.03),
        gate(task, "CapS against zero-shot", "caps", "zero_shot", 0.02),
        gate(task, "CapS against zero-shot with fitted biases", "caps", "zero_shot_biased", 0.02),
        gate(task, "SuS as a cache of votes gains nothing", "sus_tip", **against),
        gate(task, "SuS with divergence gains nothing", "sus_tip_x", **against, **controls),
        gate(task, "SuS with divergence and captions gains nothing", "sus", **against, **controls),
        gate(task, "pictures of SuS with captions of CapS gain nothing", "sus_pictures", **against, **controls),
        gate(task, "random keys gain nothing", "random", **against, **controls),
        gate(task, "captions shuffled over the classes are no better", "caps_shuffled", "caps", 0.01, kind="control"),
    )


BY_BIAS = "a support shifts the classes against each other, which repairs a head that favours one of them"

CLAIM = Claim(
    says="a support drawn from captions of a few target pictures beats zero-shot and the same cache with a support drawn from "
    "class names, whose votes gain nothing where the target's style is one that the names do not say",
    arms={name: name for name in ARMS},
    mode="difference",
    seeds=(5, 6, 7, 8, 9),
    gates=(
        *gates("drawings", gate=False, note=BY_BIAS),
        *gates("turned"),
        gate("turned", "random keys lose nothing", "zero_shot", "random", 0.01, kind="control"),
        gate("drawings", "fitted biases, against zero-shot", "zero_shot_biased", "zero_shot", 0.0, gate=False),
        gate("turned", "fitted biases, against zero-shot", "zero_shot_biased", "zero_shot", 0.0, gate=False),
        gate("drawings", "caption keys: M-Adapter against TIP-X", "caps", "caps_tip_x", 0.0, gate=False),
        gate("turned", "caption keys: M-Adapter against TIP-X", "caps", "caps_tip_x", 0.0, gate=False),
        gate("kinds", "caption keys: M-Adapter against TIP-X", "caps", "caps_tip_x", 0.0, gate=False),
        gate("kinds", "caption keys, votes alone: against Tip-Adapter", "caps_votes", "caps_tip", 0.0, gate=False),
        gate("kinds", "caption keys alone, against picture keys alone", "caps_captions", "caps_tip", 0.0, gate=False),
        gate("drawings", "caption keys alone, against zero-shot", "caps_captions", "zero_shot", 0.0, gate=False),
        *(gate(task, "delta chosen", "caps", "caps_tip_x", 0.0, gate=False, metric=f"{task}.delta") for task in WORLDS),
        gate("drawings", "divergence: TIP-X against Tip-Adapter, both on CapS", "caps_tip_x", "caps_tip", 0.0, gate=False),
        gate("turned", "divergence: TIP-X against Tip-Adapter, both on CapS", "caps_tip_x", "caps_tip", 0.0, gate=False),
        gate("drawings", "weights chosen without labels, against zero-shot", "label_free", "zero_shot", 0.0, gate=False),
        gate("kinds", "CapS against SuS", "caps", SUS, 0.0, gate=False),
    ),
    note="Where a style is to be learnt, caption keys add nothing to picture keys, and alone nothing to zero-shot: a caption is "
    "a key among the texts, close to the class prompts, and the zero-shot logits have said that already. Where captions name "
    "what the class names leave out (kinds), they are as good as generated pictures, and both together no better: a first run "
    "on seeds 0 to 4 gave them +0.011 there, these seeds nothing. On drawings most of the gain over zero-shot is a matter "
    "of class biases, which validation labels repair without any support (zero_shot_biased): that first run judged random keys "
    "against plain zero-shot there and failed that gate by +0.052. Hence the further baseline, new seeds, and that such "
    "controls judge on turned drawings only.",
)  # fmt: skip


def run(arm: str, seed: int) -> dict[str, float]:
    """Accuracy of one arm on each task, and the delta it uses."""
    found = {}
    for name in WORLDS:
        task = made(name, seed)
        test, truth = task.test
        if arm == "linear_probe":
            found[name] = linear_probe(task)
            continue
        if ARMS[arm] is None:
            scores = task.scale * test @ task.text.T
            if arm == "zero_shot_biased":
                scores = scores + biases(task)
        else:
            judge = fitted(ARMS[arm], task, seed)
            scores, found[f"{name}.delta"] = judge.scores_of(test), judge.delta_
        found[name] = float((scores.argmax(-1) == truth).double().mean())
    return found


def fitted(arm: Arm, task: Task, seed: int) -> CapsAdapter:
    support = task.supports[arm.pictures]
    captions = support.caption_keys
    assert captions is not None
    if arm.captions == "shuffled":
        captions = captions[torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed))]
    elif arm.captions != "own":
        captions = task.supports[arm.captions].caption_keys
    judge = CapsAdapter(**arm.settings, folds=0)
    return judge.fit_features(
        support.image_keys,
        support.labels,
        task.text,
        captions=captions,
        validation=task.validation if arm.validated else None,
        scale=task.scale,
    )


class Task(NamedTuple):
    """Features and labels to choose weights on, to test on, and plenty to see what there is to gain; supports by name."""

    text: Tensor
    supports: dict[str, Support]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    plenty: tuple[Tensor, Tensor]
    scale: float


@cache
def towers() -> HFEncoder:
    return load("tiny")


@cache
def made(name: str, seed: int) -> Task:
    world, encoder = WORLDS[name], towers()
    names = tuple(world.names.values())

    def features(records: list[Record]) -> tuple[Tensor, Tensor]:
        return encode_views(encoder, records)[0], labels_of(records, names)[1]

    captions = class_captions(pictures(world, "train", seed, CAPTIONED), classes=names)
    supports = {
        "caps": build_support(captions, generated, encoder, n=GENERATED, seed=seed),
        "sus": build_support(dict.fromkeys(names, ()), generated, encoder, n=GENERATED, seed=seed),
    }
    generator = torch.Generator().manual_seed(seed)
    images, words = (
        normalize(torch.randn(len(names) * GENERATED, encoder.dim, generator=generator), dim=-1) for _ in "iw"
    )
    supports["random"] = Support(images, supports["sus"].labels, words, names)
    return Task(
        zero_shot_head(encoder, names, "a {}"),
        supports,
        features(pictures(world, "val", seed, VALIDATED)),
        features(list(scenes_of(world, "test", seed, TESTED))),
        features(pictures(world, "train", seed + 500, PLENTY)),
        encoder.scale.item(),
    )


def generated(prompt: str, seed: int) -> Image.Image:
    """The renderer as a generator: what the prompt names is drawn so, the rest is left to chance."""
    said = prompt.replace(".", " ").split()
    options: dict[str, Any] = {"holdout": (), "style": "drawing" if "drawing" in said else "filled"}
    for field, values in {"shapes": SHAPES, "colours": COLOURS, "textures": TEXTURES, "sizes": SIZES}.items():
        if known := tuple(word for word in said if word in values):
            options[field] = known[-1:]
    return Image.fromarray(draw("train", [0], seed, towers().image_size, **options).images[0])


def scenes_of(world: World, split: str, seed: int, n: int) -> Iterable[Record]:
    records = scenes(split, n, seed + 1000, towers().image_size, label=world.label, names=CAPTIONS, **world.options)
    return ({**record, "label": world.names[record["label"]]} for record in records)


def pictures(world: World, split: str, seed: int, each: int) -> list[Record]:
    """The first `each` of every class."""
    found: dict[str, list[Record]] = {name: [] for name in world.names.values()}
    for record in scenes_of(world, split, seed, 3 * each * len(found)):
        if len(found[record["label"]]) < each:
            found[record["label"]].append(record)
    assert all(len(some) == each for some in found.values())
    return [record for some in found.values() for record in some]


def biases(task: Task) -> Tensor:
    """(K,) added to the zero-shot logits: the maximum-likelihood fit to the validation labels, weights left as they are."""
    features, labels = task.validation
    logits = (task.scale * features @ task.text.T).double()
    found = torch.zeros(logits.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([found], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = cross_entropy(logits + found, labels)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)
    return found.detach().float()


def linear_probe(task: Task) -> float:
    from sklearn.linear_model import LogisticRegression

    fits = [LogisticRegression(C=c, max_iter=500).fit(*map(Tensor.numpy, task.plenty)) for c in (1.0, 10.0, 100.0)]
    (held, answers), (test, truth) = ((x.numpy(), y.numpy()) for x, y in (task.validation, task.test))
    return float(max(fits, key=lambda fit: fit.score(held, answers)).score(test, truth))
