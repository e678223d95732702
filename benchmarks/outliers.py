"""Do activation outliers grow in small transformers, and do clipped softmax and gates prevent them? arXiv 2306.12929 at CPU size.

Two models, three arms each (plain softmax, clipped, gated), which differ in nothing else:
- text: a BERT (post-norm) that restores masked tokens of Python's standard library, files it has never seen to test;
- vision: a ViT that names colour and shape of small things on large plain backgrounds.

All six are trained in turns, `SLICE` steps at a time, so that whenever the run is stopped they have learnt equally long. After
each turn: quality on held-out data in float, largest magnitude, kurtosis. At the end: quality in 8 bits (weights and activations,
static, one scale a tensor) with three calibration sets, and which heads are idle. The learning rate is constant after warm-up.

    python -m benchmarks.outliers --minutes 60 --work runs/outliers    # goes on where the last one stopped
    python -m benchmarks.outliers --report    # writes the figures into docs/attention.md, and docs/outliers.svg
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.measure import RESULTS, commit, machine
from ecliptic.core.checkpoint import checkpoints, load
from ecliptic.core.outliers import Outliers, outlier_metrics
from ecliptic.core.ptq import ptq
from ecliptic.core.train import Settings, fit, seed_all
from ecliptic.data.scenes import COLOURS, SHAPES, draw
from ecliptic.methods.attend.quantizable_transformers import make_quantizable

STEPS, SLICE = 40_000, 500
SHAPE = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
WORDS, LENGTH, ROWS = 1000, 128, 4  # tokens of the vocabulary, of a sequence; sequences in a batch
SIDE, PATCH, PICTURES, POOL = 32, 4, 16, 20_000  # pixels; pictures in a batch, and to learn from
WARMUP = 500
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    # alpha starts at 0 and rises after the warm-up: at full strength from the start every row would be cut to nothing
    "text": {
        "vanilla": {"attention": "vanilla"},
        "clipped": {"attention": "clipped", "alpha": 3.0, "alpha_warmup": (500, 1500)},
        "gated": {"attention": "gated", "gate": "mlp", "rescale": False},
    },
    "vision": {
        "vanilla": {"attention": "vanilla"},
        "clipped": {"attention": "clipped", "alpha": 2.0, "alpha_warmup": (500, 1500)},
        "gated": {"attention": "gated", "gate": "linear", "rescale": False},
    },
}
RATES = {"text": 2e-3, "vision": 1e-3}

Batch = dict[str, Tensor]


@dataclass
class Task:
    """A model and its data. build: a model with a config of its own, which names its attention. quality: batches -> figures,
    "loss" in nats and what people look at."""

    build: Callable[[], Any]
    batch: Callable[[int], Batch]
    held_out: list[Batch]
    loss: Callable[[Any, Batch], Tensor]
    quality: Callable[[Any, list[Batch]], dict[str, float]]


# Text


@cache
def corpus() -> tuple[Tensor, Tensor]:
    """Token ids of the standard library, (training, test), one file in ten to test."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path for path in sorted(folder.glob("*.py")) + sorted(folder.glob("[a-z]*/*.py")) if path.stat().st_size > 2000
    ]
    files = [path for path in files if not {"test", "idlelib", "site-packages", "lib2to3"} & set(path.parts)]
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=WORDS, special_tokens=special, show_progress=False))
    ids = [torch.tensor(encoded.ids) for encoded in raw.encode_batch(texts)]
    return torch.cat([x for i, x in enumerate(ids) if i % 10]), torch.cat(ids[::10])


def masked(ids: Tensor, number: int, rows: int, salt: int) -> Batch:
    """Windows at random places, 15 % of the tokens to restore: of those 80 % masked, 10 % replaced, 10 % left (BERT)."""
    r = torch.Generator().manual_seed(salt * 1_000_003 + number)
    starts = torch.randint(len(ids) - LENGTH, (rows,), generator=r)
    words = torch.stack([ids[s : s + LENGTH - 2] for s in starts.tolist()])
    words = torch.cat([torch.full((rows, 1), 1), words, torch.full((rows, 1), 2)], 1)
    chosen = torch.rand(words.shape, generator=r) < 0.15
    chosen[:, 0] = chosen[:, -1] = False
    how = torch.rand(words.shape, generator=r)
    shown = torch.where(chosen & (how < 0.8), 3, words)
    other = torch.randint(4, WORDS, words.shape, generator=r)
    shown = torch.where(chosen & (how >= 0.8) & (how < 0.9), other, shown)
    return {"input_ids": shown, "labels": words.masked_fill(~chosen, -100)}


def text() -> Task:
    from transformers.models.bert.configuration_bert import BertConfig
    from transformers.models.bert.modeling_bert import BertForMaskedLM

    train, test = corpus()
    config = BertConfig(
        vocab_size=WORDS,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SHAPE,
    )

    def losses(model: Any, batch: Batch) -> Tensor:
        hidden = model.bert(batch["input_ids"]).last_hidden_state
        at = batch["labels"] != -100
        return cross_entropy(model.cls(hidden[at]), batch["labels"][at])  # only where something is asked

    def quality(model: Any, batches: list[Batch]) -> dict[str, float]:
        loss = statistics.fmean(float(losses(model, batch)) for batch in batches)
        return {"loss": loss, "perplexity": math.exp(loss)}

    return Task(
        build=lambda: BertForMaskedLM(copy.deepcopy(config)),
        batch=lambda i: masked(train, i, ROWS, 1),
        held_out=[masked(test, i, 16, 2) for i in range(16)],
        loss=losses,
        quality=quality,
    )


# Pictures


def pictures(split: str, count: int) -> Batch:
    options: dict[str, Any] = {
        "backgrounds": ("plain",),
        "textures": ("plain",),
        "sizes": ("small", "medium"),
        "holdout": (),
    }
    drawn = draw(split, range(count), size=SIDE, **options)
    things = [scene.things[0] for scene in drawn.scenes]
    labels = [SHAPES.index(thing.shape) * len(COLOURS) + list(COLOURS).index(thing.colour) for thing in things]
    return {"pixel_values": torch.from_numpy(drawn.images.copy()), "labels": torch.tensor(labels)}


def floats(batch: Batch) -> Batch:
    pixels = batch["pixel_values"].permute(0, 3, 1, 2).float() / 127.5 - 1
    return {"pixel_values": pixels, "labels": batch["labels"]}


def vision() -> Task:
    from transformers.models.vit.configuration_vit import ViTConfig
    from transformers.models.vit.modeling_vit import ViTForImageClassification

    pool, test = pictures("train", POOL), floats(pictures("test", 1024))
    config = ViTConfig(image_size=SIDE, patch_size=PATCH, num_labels=len(SHAPES) * len(COLOURS), **SHAPE)

    def drawn(i: int) -> Batch:
        rows = torch.randint(POOL, (PICTURES,), generator=torch.Generator().manual_seed(i))
        return floats({name: value[rows] for name, value in pool.items()})

    def quality(model: Any, batches: list[Batch]) -> dict[str, float]:
        logits = torch.cat([model(batch["pixel_values"]).logits for batch in batches])
        labels = torch.cat([batch["labels"] for batch in batches])
        return {
            "loss": float(cross_entropy(logits, labels)),
            "accuracy": float((logits.argmax(-1) == labels).float().mean()),
        }

    return Task(
        build=lambda: ViTForImageClassification(copy.deepcopy(config)),
        batch=drawn,
        held_out=[{name: value[i : i + 64] for name, value in test.items()} for i in range(0, 1024, 64)],
        loss=lambda model, batch: cross_entropy(model(batch["pixel_values"]).logits, batch["labels"]),
        quality=quality,
    )


TASKS = {"text": text, "vision": vision}


def inputs(batch: Batch) -> Tensor:
    return batch["input_ids"] if "input_ids" in batch else batch["pixel_values"]


# Training in turns


@dataclass
class Arm:
    """One model being trained, and what was measured after each turn."""

    task: str
    name: str
    work: Path
    trend: list[dict[str, float]] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"{self.task}-{self.name}"

    def start(self, task: Task) -> nn.Module:
        with torch.random.fork_rng():
            seed_all(0)
            model = task.build()
        made = make_quantizable(model, **ARMS[self.task][self.name])
        folder = self.work / self.label
        if left := checkpoints(folder):
            step, path = left[-1]
            made.load_state_dict(load(path)["model"], strict=False)
            trend = json.loads((folder / "trend.json").read_text())
            self.trend = [point for point in trend if point["step"] <= step]
        return made

    def turn(self, task: Task, model: nn.Module) -> None:
        """Train on for one slice, measure, leave a checkpoint: an interrupt that comes when it is due."""

        def measure() -> Mapping[str, float]:
            found = measured(task, model)
            self.trend.append({"step": (len(self.trend) + 1) * SLICE, **found})
            raise KeyboardInterrupt

        folder = self.work / self.label
        settings = Settings(
            steps=STEPS, lr=RATES[self.task], weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8, schedule="constant",
            warmup=WARMUP, checkpoints=folder, checkpoint_every=STEPS, keep=1, evaluate_every=SLICE, seed=0,
        )  # fmt: skip
        try:
            fit(model, lambda batch: {"loss": task.loss(model, batch)}, task.batch, settings, evaluate=measure)
        except KeyboardInterrupt:
            if not self.trend or self.trend[-1]["step"] % SLICE:
                raise
        (folder / "trend.json").write_text(json.dumps(self.trend))


@torch.no_grad()
def measured(task: Task, model: nn.Module) -> dict[str, float]:
    batches = task.held_out[:4]
    found = outlier_metrics(model, [inputs(batch) for batch in batches])
    norms = {"inf_norm": found.max_inf_norm, "kurtosis": found.avg_kurtosis, "max_kurtosis": found.max_kurtosis}
    return {**task.quality(model, batches), **norms, "zero_rows": found.zero_rows, "idle": idle(found)}


def idle(found: Outliers) -> float:
    return float(torch.stack([heads.idle.mean() for heads in found.heads.values()]).mean())


@torch.no_grad()
def final(task: Task, model: nn.Module) -> dict[str, Any]:
    """Float against W8A8, calibrated three times on 16 training batches; outliers and idle heads."""
    model.eval()
    found = outlier_metrics(model, [inputs(batch) for batch in task.held_out])
    told: dict[str, Any] = {
        "float": task.quality(model, task.held_out),
        "w8a8": [],
        "inf_norm": found.max_inf_norm,
        "kurtosis": found.avg_kurtosis,
        "max_kurtosis": found.max_kurtosis,
        "zero_rows": found.zero_rows,
        "per_module": found.per_module,
        "idle": {name: [round(x, 3) for x in heads.idle.tolist()] for name, heads in found.heads.items()},
        "gate": {
            name: [round(x, 3) for x in heads.gate.tolist()]
            for name, heads in found.heads.items()
            if heads.gate is not None
        },
    }
    for seed in range(3):
        batches = [inputs(task.batch(10**7 + 16 * seed + i)) for i in range(16)]
        told["w8a8"].append(task.quality(ptq(model, batches), task.held_out))
    return told


# Reporting

DOCS = Path(__file__).parents[1] / "docs"
MARKS = ("<!-- outliers: written by python -m benchmarks.outliers --report -->", "<!-- end of outliers -->")
SHADES = {"vanilla": "#c0392b", "clipped": "#1464b4", "gated": "#2e8b57"}


def report() -> None:
    """Write the tables into their place in docs/attention.md, and the figure."""
    content = json.loads((RESULTS / "outliers.json").read_text(encoding="utf-8"))
    page = DOCS / "attention.md"
    page.write_text(with_tables(page.read_text(encoding="utf-8"), content), encoding="utf-8")
    (DOCS / "outliers.svg").write_text(curves(content["found"]), encoding="utf-8")


def with_tables(page: str, content: Mapping[str, Any]) -> str:
    """The page with what is between the marks replaced by these figures."""
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n{tables(content)}\n{MARKS[1]}{after}"


def tables(content: Mapping[str, Any]) -> str:
    lines = []
    for task, (name, form) in {"text": ("perplexity", "{:.2f}"), "vision": ("accuracy", "{:.3f}")}.items():
        lines += [
            "",
            f"{task.capitalize()}, {content['settings']['steps']:,} steps:",
            "",
            f"| attention | {name} | at W8A8 | max inf-norm | avg kurtosis | max kurtosis | rows without attention |",
            "|---|---|---|---|---|---|---|",
        ]
        for arm in ARMS[task]:
            found = content["found"][f"{task}-{arm}"]
            rounded = [one[name] for one in found["w8a8"]]
            cells = [form.format(found["float"][name]), form.format(statistics.fmean(rounded))]
            cells += [f"{found[key]:.1f}" for key in ("inf_norm", "kurtosis", "max_kurtosis")]
            lines.append(f"| {arm} | " + " | ".join(cells) + f" | {found['zero_rows']:.0%} |")
    lines += [
        "",
        "W8A8 is the mean of three calibrations of 16 batches. `benchmarks/results/outliers.json` has the course of all.",
    ]
    return "\n".join(lines)


def curves(found: Mapping[str, Any]) -> str:
    """Largest magnitude over the steps of training, one panel for each model, as an SVG."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 620 250" font-family="sans-serif" font-size="10">',
        '<rect width="620" height="250" fill="white"/>',
    ]
    for panel, task in enumerate(ARMS):
        left = 40 + 300 * panel
        trends = {arm: found[f"{task}-{arm}"]["trend"] for arm in ARMS[task]}
        steps = max(point["step"] for trend in trends.values() for point in trend)
        top = 10 * math.ceil(max(point["inf_norm"] for trend in trends.values() for point in trend) / 10)
        parts.append(f'<path d="M{left} 30V200H{left + 250}" fill="none" stroke="#888"/>')
        parts.append(f'<text x="{left}" y="20">{task}: largest magnitude against steps</text>')
        for at in (0.0, 0.5, 1.0):
            parts.append(f'<text x="{left - 5}" y="{203 - 170 * at:.0f}" text-anchor="end">{top * at:g}</text>')
            parts.append(f'<text x="{left + 250 * at:.0f}" y="214" text-anchor="middle">{steps * at:.0f}</text>')
        for row, (arm, trend) in enumerate(trends.items()):
            line = " ".join(
                f"{left + 250 * p['step'] / steps:.1f},{200 - 170 * p['inf_norm'] / top:.1f}" for p in trend
            )
            parts.append(f'<polyline points="{line}" fill="none" stroke="{SHADES[arm]}" stroke-width="1.5"/>')
            parts.append(f'<text x="{left + 70 * row}" y="235" fill="{SHADES[arm]}">{arm}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="start no further round after so many")
    parser.add_argument("--steps", type=int, default=STEPS, help="stop after so many")
    parser.add_argument("--work", type=Path, default=Path("runs/outliers"), help="folder for checkpoints")
    parser.add_argument("--report", action="store_true", help="train nothing, write what was found into the docs")
    options = parser.parse_args()
    if options.report:
        report()
        return 0
    torch.set_num_threads(1)
    began = time.monotonic()
    tasks = {name: make() for name, make in TASKS.items()}
    arms = [Arm(task, name, options.work) for task in tasks for name in ARMS[task]]
    models = {arm.label: arm.start(tasks[arm.task]) for arm in arms}
    ahead = max(len(arm.trend) for arm in arms)  # a run that was killed within a round
    while (done := min(len(arm.trend) for arm in arms)) < ahead or (
        time.monotonic() - began < 60 * options.minutes and done * SLICE < options.steps
    ):
        for arm in arms:
            if len(arm.trend) == done:
                arm.turn(tasks[arm.task], models[arm.label])
                print(arm.label, {k: round(v, 3) for k, v in arm.trend[-1].items()}, file=sys.stderr, flush=True)
    rounds = min(len(arm.trend) for arm in arms)
    found = {arm.label: {"trend": arm.trend[:rounds], **final(tasks[arm.task], models[arm.label])} for arm in arms}
    content = {
        "command": f"python -m benchmarks.outliers --steps {rounds * SLICE}",
        "machine": machine(),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "commit": commit(),
        "settings": {
            "arms": ARMS,
            "rates": RATES,
            "shape": SHAPE,
            "steps": rounds * SLICE,
            "length": LENGTH,
            "seed": 0,
        },
        "found": found,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "outliers.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
