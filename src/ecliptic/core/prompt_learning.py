"""Learning prompts in front of two frozen towers: words, visual tokens, or both out of one source.

Prompts are a module without inputs that gives `Vectors`: `Prompts` learns the vectors themselves, `UnifiedPrompts` makes those of
both towers out of one another (UPT). `learn_prompts` trains either. As long as no visual tokens are learnt the pictures'
features never change, so they are computed once: the same training, in seconds. `PromptPredictor` holds what was learnt.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ecliptic.core.contracts import Prediction, Tokens
from ecliptic.core.encoder import Encoder, HFEncoder
from ecliptic.core.feature_predictor import FeaturePredictor
from ecliptic.core.inputs import encode_pictures
from ecliptic.core.prompt_classifier import class_rows
from ecliptic.core.prompting import check_promptable, images_with_prompts
from ecliptic.core.train import Settings, fit
from ecliptic.core.zeroshot import class_prompts, mean_prompt, zero_shot_head


class Vectors(NamedTuple):
    """What prompts put into the towers.

    context: (M, W) in front of every class name (CoOp, arXiv 2109.01134), or None. visual: (P, W') behind the patches, before
    CLIP's first LayerNorm (VPT, arXiv 2203.12119), or None.
    """

    context: Tensor | None = None
    visual: Tensor | None = None

    def state(self) -> dict[str, Tensor]:
        """The tensors by name, cut off and on the CPU: what a predictor keeps."""
        return {name: x.detach().float().cpu().clone() for name, x in self._asdict().items() if x is not None}


class Prompts(nn.Module):
    """Vectors that are learnt as they stand, from the values given; those of the two towers know nothing of each other."""

    def __init__(self, context: Tensor | None = None, visual: Tensor | None = None):
        super().__init__()
        if context is None and visual is None:
            raise ValueError("there is nothing to learn: give context, visual, or both")
        self.context = None if context is None else nn.Parameter(context.detach().clone())
        self.visual = None if visual is None else nn.Parameter(visual.detach().clone())

    def forward(self) -> Vectors:
        return Vectors(self.context, self.visual)


class UnifiedPrompts(nn.Module):
    """UPT (arXiv 2210.07225): context (M, W) and visual tokens (P, W') brought to one width by linear maps, mixed by transformer
    blocks (pre-norm, CLIP's quick GELU), and brought back by two more. Maps and blocks are drawn by `seed` and learnt, too.

    After training only the vectors matter: the rest is no function of the input.
    """

    def __init__(
        self, context: Tensor, visual: Tensor, width: int = 128, heads: int = 1, layers: int = 1, seed: int = 0
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} cannot be split into heads={heads}: choose a divisor")
        self.context, self.visual = nn.Parameter(context.detach().clone()), nn.Parameter(visual.detach().clone())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = (context.shape[-1], visual.shape[-1])
            self.into = nn.ModuleList(nn.Linear(size, width) for size in sizes)
            self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
            self.back = nn.ModuleList(nn.Linear(width, size) for size in sizes)

    def forward(self) -> Vectors:
        mixed = torch.cat([self.into[0](self.context), self.into[1](self.visual)])
        for block in self.blocks:
            mixed = block(mixed)
        words = len(self.context)
        return Vectors(self.back[0](mixed[:words]), self.back[1](mixed[words:]))


class _Block(nn.Module):
    """(N, width) -> the same: x + attention(norm(x)), then x + mlp(norm(x)), as in CLIP's towers."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(count, 3, self.heads, -1).permute(1, 2, 0, 3)
        seen = scaled_dot_product_attention(q, k, v)
        x = x + self.out(seen.transpose(0, 1).reshape(count, width))
        hidden = self.fc1(self.norm2(x))
        return x + cast(Tensor, self.fc2(hidden * torch.sigmoid(1.702 * hidden)))


def first_visual(
    encoder: HFEncoder, count: int, seed: int = 0, spread: Literal["normal", "uniform"] = "normal"
) -> Tensor:
    """(count, W) drawn by `seed`: N(0, 1 / W), or VPT's U(-v, v) with v = sqrt(6 / (3 p^2 + W)), p the side of a patch."""
    tower, generator = encoder.anatomy.image, torch.Generator().manual_seed(seed)
    if spread == "normal":
        return torch.randn(count, tower.width, generator=generator) * tower.width**-0.5
    bound = math.sqrt(6 / (3 * tower.patch**2 + tower.width))
    return (2 * torch.rand(count, tower.width, generator=generator) - 1) * bound


# From prompts to logits


def prompted_logits(
    encoder: HFEncoder, vectors: Vectors, classes: Tokens | Tensor, images: Tensor, scale: Tensor | float
) -> Tensor:
    """-> (B, K): scale * cosine.

    classes: tokens (K, L), read behind the context, or unit rows (K, D) that are taken as they are. images: pixels
    (B, 3, H, W), or, without visual prompts, unit features (B, D).
    """
    if images.ndim == 4:
        images = images_with_prompts(encoder, images, vectors.visual).pooled
    elif vectors.visual is not None:
        raise ValueError("visual prompts change the features of pictures: give pixels (B, 3, H, W), not features")
    if isinstance(classes, Tensor):
        return scale * images @ classes.T
    if vectors.context is None:
        raise ValueError("no context is learnt: give the classes as rows (K, D), not as tokens")
    return scale * images @ class_rows(encoder, vectors.context, classes).T


def encode_with_prompts(
    encoder: HFEncoder, images: Iterable[Any], visual: Tensor | None, batch_size: int = 32
) -> Tensor:
    """Pictures or paths -> (N, D) float32 unit rows on the CPU, as `Encoder.encode_images`, with visual prompts (P, W)."""
    if visual is None:
        return encoder.encode_images(images, batch_size)

    @torch.inference_mode()
    def run(pixels: Any) -> Any:
        return images_with_prompts(encoder, torch.from_numpy(pixels), visual).pooled.float().cpu().numpy()

    rows = encode_pictures(
        images,
        batch_size,
        transform=encoder.transform,
        dim=encoder.dim,
        run=run,
        workers=2,
        decode=None,
        errors=None,
        progress=None,
    )
    return torch.from_numpy(rows)


# Training


def learn_prompts(
    encoder: HFEncoder,
    prompts: nn.Module,
    classes: Tokens | Tensor,
    batches: Callable[[int], Mapping[str, Any]],
    loss: Callable[[Tensor, Mapping[str, Any]], Mapping[str, Tensor]],
    settings: Settings,
    *,
    scale: Tensor | float,
    title: str = "learning prompts",
) -> list[dict[str, Any]]:
    """Train `prompts` in place and nothing else; returns the log of `core.train.fit`.

    classes: as in `prompted_logits`. batches: batch number -> whatever `loss` wants, and "image": unit features (B, D), or pixels
    where visual prompts are learnt. loss: logits (B, K) and the batch -> named terms, whose sum is minimised.
    """
    prompts.to(encoder.device)
    classes = classes.to(encoder.device)
    scale = scale.detach() if isinstance(scale, Tensor) else scale

    def terms(batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        return loss(prompted_logits(encoder, prompts(), classes, batch["image"], scale), batch)

    # The encoder is in the module so that the trainer holds its weights still.
    module = nn.ModuleDict({"encoder": encoder, "prompts": prompts})
    return fit(module, terms, batches, settings, trainable=r"^prompts\.", title=title, unit="pictures")


def trained_count(prompts: nn.Module) -> int:
    """How many numbers gradient descent changes."""
    return sum(p.numel() for p in prompts.parameters())


class PromptPredictor(FeaturePredictor):
    """A classifier by learnt prompts: softmax over scale_ * cosine, for any class names.

    state_: what was learnt, "context" (M, W) and "visual" (P, W), those there are. text_: (K, D) unit rows of `classes_`. scale_:
    what cosines are multiplied by. A subclass has the settings `template`, the class name as it follows the context, and
    `templates`, prompts for where no context is learnt.
    """

    template: str
    templates: str | tuple[str, ...]
    state_: dict[str, Tensor]
    text_: Tensor
    scale_: float

    def scores_of(self, features: Tensor) -> Tensor:
        if features.shape[1] != self.text_.shape[1]:
            raise ValueError(f"features must be (B, {self.text_.shape[1]}), got {tuple(features.shape)}")
        return self.scale_ * features @ self.text_.to(features).T

    @torch.no_grad()
    def predict(self, pixels: Tensor, classes: Sequence[str] | None = None) -> Prediction:
        """Pixels (B, 3, H, W), as `encoder.preprocess` gives them -> scores (B, K) and labels; `classes`: among these only."""
        return self.predict_features(self.features(pixels), classes)

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Pixels -> (B, D) unit rows as this predictor sees them: the frozen tower's own, unless there are visual prompts."""
        return images_with_prompts(self._towers(), pixels, self.state_.get("visual")).pooled.float().cpu()

    @torch.no_grad()
    def for_classes(self, names: Sequence[str]) -> Self:
        """The same prompts for other class names, trained on or not."""
        found = copy.copy(self)
        found.classes_, found.text_ = tuple(names), self._text(self._towers(), names)
        return found

    @torch.no_grad()
    def _hold(self, encoder: HFEncoder, prompts: nn.Module, names: Sequence[str], scale: Tensor | float) -> Self:
        """Keep what was learnt, and what follows from it: the last line of a subclass's `fit`."""
        self.state_ = cast(Vectors, prompts()).state()
        self.classes_, self.scale_ = tuple(names), float(scale)
        self.text_ = self._text(encoder, names)
        self.trained_parameters_ = trained_count(prompts)
        self.encoder_ = encoder
        return self

    def _text(self, encoder: HFEncoder, names: Sequence[str]) -> Tensor:
        context = self.state_.get("context")
        if context is None:
            return zero_shot_head(encoder, names, self.templates)
        tokens = encoder.tokenize(class_prompts(names, self.template), overflow="error")
        return mean_prompt(class_rows(encoder, context, tokens), len(names)).float().cpu()

    def _towers(self) -> HFEncoder:
        if (encoder := getattr(self, "encoder_", None)) is None:
            raise ValueError(f"{type(self).__name__} has learnt nothing yet: call fit() first")
        return check_promptable(cast(Encoder, encoder))
