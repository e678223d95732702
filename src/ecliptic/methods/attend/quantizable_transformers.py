"""Clipped softmax and gated attention: heads that can do nothing cheaply, so that no activation need become huge.

A head that has nothing to add for a token puts its attention on tokens whose values are near zero. Softmax never reaches zero, so
the logits it takes to silence the others grow for as long as training goes on, through layer norm, by a few enormous
activations, and 8 bits cannot hold those beside the rest. Clipped softmax stretches probabilities and cuts them to [0, 1]:
zero takes a moderate logit, and what is cut gets no gradient. Gated attention multiplies what a head gathered by a learnt
sigmoid of the token.

`make_quantizable` puts either into any model of `transformers`, `QuantizableTransformer` into the towers of an encoder.
`ecliptic.core.outliers` measures the outliers and the idle heads, `ecliptic.core.ptq` what 8 bits cost.

- From scratch: either. Clipping as strong as published (alpha 2 to 4) starts with every row cut to nothing, and may stay so: see
  `alpha_warmup`.
- On a trained model: gates with `rescale` leave its function as it is (but for weights of 0.01), and are learnt in fine-tuning.
  Clipping changes what it computes. For causal models the paper recommends gates alone.
- Clipped rows sum to at most 1 (gamma < 0): what reads attention as a distribution must divide by the sum, or skip.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from ecliptic.core.anatomy import TOWERS
from ecliptic.core.attention import attention_modules, plain_softmax, register, use
from ecliptic.core.contracts import ModelStep, Pairs, Record
from ecliptic.core.encoder import Encoder, HFEncoder
from ecliptic.core.method import Paper, method
from ecliptic.data.shots import tiny_records

Model = TypeVar("Model", bound=nn.Module)
Gates = Literal["linear", "mlp", "all_heads", "constant", "mean"]
ATTENTIONS = ("gated", "clipped", "vanilla")
GATES = ("linear", "mlp", "all_heads", "constant", "mean")


@dataclass(frozen=True)
class Attention:
    """Which attention, and its settings; those of the other kinds are not looked at.

    Clipped: `alpha`, with gamma = -alpha / T, or `gamma` itself. T is `keys`: a number; "maximum", the tower's longest text, or
    the patches there are; "visible" (ours, for causal and padded towers), the keys that each row can see.
    alpha_warmup: training passes (begin, end) between which alpha rises from 0; ours. They are counted in the model, and saved.
    Clipping that would cut a uniform row to nothing, gamma <= -zeta / (T - 1), is refused unless it is warmed up or allowed.

    Gated: `gate` as in `AttentionGate`; `rescale` divides by `pi_init`, for models trained without gates.
    """

    attention: Literal["gated", "clipped", "vanilla"] = "gated"
    alpha: float | None = None  # 2 to 4 work best for BERT, section 5.1; 3.2 there
    gamma: float | None = None  # -0.025 for BERT at T = 128
    zeta: float = 1.0  # above 1 it adds nothing by itself, table 1
    keys: int | Literal["maximum", "visible"] = "maximum"
    alpha_warmup: tuple[int, int] | None = None
    allow_dead_start: bool = False
    gate: Gates = "linear"  # ViT, OPT-125m; "mlp" for BERT
    pi_init: float = 0.5  # 0.25 for OPT-125m
    rescale: bool = True
    std: float | None = None  # of the gate's weights; None: 0.01 with rescale (section 5.3), else as nn.Linear starts
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.alpha_warmup, list):  # from a recipe, or from a saved model's history
            object.__setattr__(self, "alpha_warmup", tuple(self.alpha_warmup))
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention={self.attention!r}: choose {', '.join(ATTENTIONS)}")
        if self.attention == "gated":
            if self.gate not in GATES:
                raise ValueError(f"gate={self.gate!r}: choose {', '.join(GATES)}")
            if not 0 < self.pi_init < 1:
                raise ValueError(f"pi_init={self.pi_init}: must lie between 0 and 1")
        if self.attention == "clipped":
            self._check_clipping()

    def _check_clipping(self) -> None:
        if (self.alpha is None) == (self.gamma is None):
            raise ValueError("clipped softmax takes either alpha (gamma = -alpha / T) or gamma")
        if (self.alpha or 0.0) < 0 or (self.gamma or 0.0) > 0 or self.zeta < 1:
            raise ValueError("clipped softmax takes alpha >= 0, gamma <= 0 and zeta >= 1")
        if self.keys not in ("maximum", "visible") and not (isinstance(self.keys, int) and self.keys > 1):
            raise ValueError(f"keys={self.keys!r}: a number above 1, 'maximum' or 'visible'")
        if self.alpha_warmup is not None:
            begin, end = self.alpha_warmup
            if self.alpha is None or not 0 <= begin < end:
                raise ValueError("alpha_warmup takes (begin, end) in training passes, begin < end, and alpha")


def make_quantizable(
    model: Model, attention: Literal["gated", "clipped", "vanilla"] = "gated", **settings: Any
) -> Model:
    """Swap the attention of every layer of a `transformers` model, or of one tower, in place; all weights stay. Returns it.

    settings: fields of `Attention`. "vanilla" is plain softmax through the same code. Parameters of gates are on the attention
    modules as `head_gate`, state of clipping as `clipping`, so that they are trained and saved with the model; to open what
    was saved, build the model, call this with the same settings, and load the state dict.
    ValueError for models whose attention cannot be switched, or that were changed before.
    """
    choice = Attention(attention, **settings)
    modules = attention_modules(model)
    if changed := [
        name for name, module in modules.items() if hasattr(module, "head_gate") or hasattr(module, "clipping")
    ]:
        raise ValueError(f"{type(model).__name__} was made quantizable before: {changed[0]} has gates or clipping")
    new = [
        _part(module, choice, layer) for layer, module in enumerate(modules.values())
    ]  # refuses before anything changes
    use(model, _register(attention))
    for module, part in zip(modules.values(), new):
        if isinstance(part, AttentionGate):
            module.head_gate = part
            module.register_forward_pre_hook(part.see, with_kwargs=True)
        elif part is not None:
            module.clipping = part
    return model


@method(
    Paper(
        "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing",
        arxiv="2306.12929",
        year=2023,
    ),
    purpose="train transformers without activation outliers, so that plain 8-bit quantisation works",
    claim="a head that must do nothing keeps its logits small with clipped softmax, where softmax's grow without end; outliers "
    "put into a model ruin it at 8 bits, and the metrics see them",
)
@dataclass(frozen=True)
class QuantizableTransformer(Attention, ModelStep):
    """`Attention` for the chosen towers of an encoder. Gates with `rescale` and std=0 change nothing before they are trained."""

    towers: tuple[str, ...] = TOWERS

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.towers, list):
            object.__setattr__(self, "towers", tuple(self.towers))
        if isinstance(self.towers, str) or not self.towers or set(self.towers) - set(TOWERS):
            raise ValueError(f"towers={self.towers!r}: choose from {', '.join(TOWERS)}, as a tuple")

    @classmethod
    def tiny(cls) -> tuple[Self, list[Record]]:
        return cls(gate="mlp", std=0.5), tiny_records()

    @classmethod
    def neutral(cls) -> Self:
        return cls(std=0.0)

    def apply(self, encoder: Encoder, pairs: Pairs | None = None) -> HFEncoder:
        assert isinstance(encoder, HFEncoder)
        changed = self.reshape(encoder.clone())
        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        changed.record_step("quantizable_transformers", settings, reshapes=True)
        return changed

    def reshape(self, encoder: Encoder) -> HFEncoder:
        assert isinstance(encoder, HFEncoder)
        settings = {item.name: getattr(self, item.name) for item in fields(Attention)}
        for tower in self.towers:
            make_quantizable(getattr(encoder.anatomy, tower).module, **settings)
        return encoder


def _register(attention: str) -> str:
    if attention == "clipped":
        return register("clipped-softmax", _clip)
    if attention == "gated":
        return register("gated-softmax", plain_softmax, _gate)
    return register("vanilla-softmax", plain_softmax)


def _clip(module: Any, scores: Tensor) -> Tensor:
    found: Tensor = module.clipping(scores)
    return found


def _gate(module: Any, context: Tensor) -> Tensor:
    gate: Tensor = module.head_gate.of_seen()
    return context * gate


def _part(module: Any, choice: Attention, layer: int) -> nn.Module | None:
    """What an attention module needs: a gate, the state of clipping, or nothing."""
    if choice.attention == "vanilla":
        return None
    if choice.attention == "clipped":
        return ClippedSoftmax.of(choice, module.config)
    weight: Tensor = (module.q_proj if hasattr(module, "q_proj") else module.query).weight
    heads = module.num_heads if hasattr(module, "num_heads") else module.num_attention_heads
    std = 0.01 if choice.std is None and choice.rescale else choice.std
    gate = AttentionGate(
        heads,
        weight.shape[1] // heads,
        choice.gate,
        choice.pi_init,
        choice.rescale,
        std,
        seed=(choice.seed << 10) + layer,
    )
    return gate.to(weight.device, weight.dtype)


# Clipped softmax


def clipped_softmax(x: Tensor, gamma: float | Tensor, zeta: float = 1.0, dim: int = -1) -> Tensor:
    """clip((zeta - gamma) softmax(x) + gamma, 0, 1), equation 4; x scores with the mask added, any shape.

    gamma <= 0 (a tensor must broadcast with x), zeta >= 1. Probabilities below -gamma / (zeta - gamma) become exactly 0, those
    above (1 - gamma) / (zeta - gamma) exactly 1, and neither lets a gradient through. gamma = 0 with zeta = 1 is softmax.
    Half precision is computed, and given back, in float32.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return ((zeta - gamma) * torch.softmax(x, dim, dtype=wide) + gamma).clamp(0.0, 1.0)


def gamma_from_alpha(alpha: float | Tensor, keys: int | Tensor) -> Any:
    """-alpha / T, section 5.1: as strong at any length."""
    return -alpha / keys


def starts_dead(gamma: float, zeta: float, keys: int) -> bool:
    """Whether a uniform row over so many keys is cut to nothing: gamma <= -zeta / (T - 1), or alpha >= T / (T - 1)."""
    return -gamma * (keys - 1) >= zeta


def visible_keys(scores: Tensor) -> Tensor:
    """(..., queries, keys) with hidden keys at the type's lowest number -> how many a row sees, (..., queries, 1), at least 1."""
    return (scores > torch.finfo(scores.dtype).min / 2).sum(-1, keepdim=True).clamp_min(1)


class ClippedSoftmax(nn.Module):
    """Scores, mask added, to clipped probabilities. `passes` () counts the training passes where alpha is warmed up."""

    passes: Tensor

    def __init__(
        self,
        alpha: float | None = None,
        gamma: float | None = None,
        zeta: float = 1.0,
        keys: int | None = None,
        visible: bool = False,
        alpha_warmup: tuple[int, int] | None = None,
    ):
        """keys: T, or None for the keys that there are. visible: T is the number of keys that each row sees."""
        super().__init__()
        self.alpha, self.fixed, self.zeta, self.keys, self.visible = alpha, gamma, zeta, keys, visible
        self.alpha_warmup = alpha_warmup
        if alpha_warmup is not None:
            self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    @classmethod
    def of(cls, choice: Attention, config: Any) -> ClippedSoftmax:
        """For a tower with this config. ValueError for clipping that starts dead."""
        longest = getattr(config, "max_position_embeddings", None)
        keys = choice.keys if isinstance(choice.keys, int) else longest if choice.keys == "maximum" else None
        at_start = keys or longest or _patches(config)
        if choice.alpha_warmup is None and not choice.allow_dead_start and at_start:
            gamma: Any = choice.gamma if choice.alpha is None else gamma_from_alpha(choice.alpha, at_start)
            if starts_dead(gamma, choice.zeta, at_start):
                most = choice.zeta * at_start / (at_start - 1)
                raise ValueError(
                    f"alpha={-gamma * at_start:.4g} cuts uniform rows over {at_start} keys to nothing, as rows are before "
                    f"training: output and gradient would be zero. Take alpha below {most:.4g}, let it rise "
                    "(alpha_warmup=(begin, end) in steps), or say "
                    "allow_dead_start=True where logits are known to spread by themselves"
                )
        return cls(choice.alpha, choice.gamma, choice.zeta, keys, choice.keys == "visible", choice.alpha_warmup)

    def gamma(self, scores: Tensor) -> float | Tensor:
        """As it is now: a number, or one for each row (..., queries, 1)."""
        if self.alpha is None:
            assert self.fixed is not None
            return self.fixed
        alpha: float | Tensor = self.alpha
        if self.alpha_warmup is not None:
            begin, end = self.alpha_warmup
            alpha = alpha * ((self.passes - begin) / (end - begin)).clamp(0.0, 1.0)
        found: float | Tensor = gamma_from_alpha(
            alpha, visible_keys(scores) if self.visible else self.keys or scores.shape[-1]
        )
        return found

    def forward(self, scores: Tensor) -> Tensor:
        found = clipped_softmax(scores, self.gamma(scores), self.zeta)
        if self.alpha_warmup is not None and self.training and torch.is_grad_enabled():
            self.passes += 1
        return found

    def extra_repr(self) -> str:
        strength = f"gamma={self.fixed}" if self.alpha is None else f"alpha={self.alpha}"
        keys = "visible" if self.visible else self.keys
        return f"{strength}, zeta={self.zeta}, keys={keys}, alpha_warmup={self.alpha_warmup}"


def _patches(config: Any) -> int | None:
    """How many keys a ViT with this config has, the class token included."""
    side, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not isinstance(side, int) or not isinstance(patch, int):
        return None
    return (side // patch) ** 2 + (0 if config.model_type.startswith("siglip") else 1)


# Gated attention


class AttentionGate(nn.Module):
    """How much of what each head gathered is let through, for each token: sigmoid(G(x)), equation 5.

    kind, with d the width of a head's slice of x: "linear", w_h . x_h + b_h on the head's own slice, heads (d + 1) parameters;
    "mlp", d -> d / 4 -> ReLU -> 1 for each head; "all_heads", one linear layer from all of x; "constant", b_h alone; "mean", the
    linear one averaged over the tokens before the sigmoid. The last two, for ablation, cannot tell tokens apart, and "mean" reads
    padding and later tokens too. b is such that the gate starts at pi_init. rescale: divide by pi_init, so that it starts at 1.
    std: of normal weights (0: all zero); None for those of nn.Linear.
    """

    full_precision = True  # quantisation leaves it as it is, section 5

    def __init__(
        self,
        heads: int,
        width: int,
        kind: Gates = "linear",
        pi_init: float = 0.5,
        rescale: bool = False,
        std: float | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.heads, self.width, self.kind = heads, width, kind
        self.factor = 1 / pi_init if rescale else 1.0
        self.seen: Tensor | None = None
        generator = torch.Generator("cpu").manual_seed(seed)

        def drawn(*shape: int) -> nn.Parameter:
            if std is not None:
                return nn.Parameter(std * torch.randn(*shape, generator=generator, device="cpu"))
            return nn.Parameter((2 * torch.rand(*shape, generator=generator, device="cpu") - 1) / math.sqrt(shape[-1]))

        inner = max(1, width // 4)
        if kind == "mlp":
            self.inner = drawn(heads, inner, width)
            self.inner_bias = nn.Parameter(torch.zeros(heads, inner, device="cpu"))
        if kind != "constant":
            self.weight = drawn(heads, {"mlp": inner, "all_heads": heads * width}.get(kind, width))
        self.bias = nn.Parameter(torch.full((heads,), math.log(pi_init / (1 - pi_init)), device="cpu"))

    def forward(self, hidden: Tensor) -> Tensor:
        """x, the input of the attention block, (B, T, heads * width) -> (B, heads, T, 1)."""
        batch, length, _ = hidden.shape
        bias = self.bias[:, None]
        if self.kind == "constant":
            logits = bias.expand(batch, self.heads, length)
        elif self.kind == "all_heads":
            logits = torch.einsum("btd,hd->bht", hidden, self.weight) + bias
        else:
            slices = hidden.view(batch, length, self.heads, self.width)
            if self.kind == "mlp":
                slices = torch.relu(torch.einsum("bthd,hid->bthi", slices, self.inner) + self.inner_bias)
            logits = torch.einsum("bthd,hd->bht", slices, self.weight) + bias
            if self.kind == "mean":
                logits = logits.mean(-1, keepdim=True).expand(-1, -1, length)
        return self.factor * torch.sigmoid(logits)[..., None]

    def see(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before attention runs: keep its input, which the attention function does not get."""
        self.seen = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def of_seen(self) -> Tensor:
        """The gate of the input kept, which is let go."""
        hidden, self.seen = self.seen, None
        found: Tensor = self(hidden)
        return found

    def extra_repr(self) -> str:
        return f"heads={self.heads}, width={self.width}, kind={self.kind!r}, factor={self.factor:g}"
