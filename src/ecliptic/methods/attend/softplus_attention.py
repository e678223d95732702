"""Softplus attention (LSSA) with re-weighting (LSSAR): rows that stay peaked however many keys there are.

Softmax is a positive map, exp, and a division by the row's sum. LSSA keeps the division, takes softplus of cosines, and lets
their scale grow with the logarithm of the number of keys a row sees, so that its entropy does not drift with length. LSSAR
then keeps only what lies above the uniform weight, raises it to a power and divides again. A decoder with rotary positions
that is trained with it reads texts of many times its training length, where softmax loses the thread.

`attention_weights` and `attention` are the equations, on tensors; `replace_attention` puts them into any model of
`transformers`, `SoftplusAttention` into the towers of an encoder. Weights that were trained with softmax are useless under
other scores, so both refuse to change the scores of a model unless told that it will be trained (`retrain=True`). The
re-weighting alone changes no scores, and can be switched on and off on a trained model; a version of the paper recommends that,
but in our claim it gains nothing.

What counts as a key is what a row's mask lets it see, so padding, packed sequences, a cache and sliding windows come out right.
In a tower without causality every row sees all L tokens, and the scale is a temperature log d * log L that depends on the
resolution or the caption; the paper is about causal decoders, so that use is an extrapolation of ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import normalize, pad, relu, softplus

from ecliptic.core.anatomy import TOWERS
from ecliptic.core.attention import expand_groups, register_attention, use
from ecliptic.core.contracts import ModelStep, Pairs, Record
from ecliptic.core.encoder import Encoder, HFEncoder
from ecliptic.core.method import Paper, method
from ecliptic.data.shots import tiny_records

PHIS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "softplus": softplus,
    "sigmoid": torch.sigmoid,
    "relu": relu,
}
BLOCK = 1 << 24  # weights computed at a time, over all heads; ours: 64 MiB of float32, a few of them alive together


@dataclass(frozen=True)
class Form:
    """Which attention: LSSAR as it stands, LSSA without `reweight`, softmax with `phi="exp", cosine=False, reweight=None`.

    phi: the positive map, one of exp, softplus, sigmoid, relu. normalise: divide each row by its sum (step 4). A row whose
    weights are all zero (relu) attends to nothing. cosine: unit queries and keys, times log d * log N (steps 1 and 2);
    otherwise plain products times the model's own scale. reweight: the power p >= 1 of step 5, or None for no re-weighting.
    offset_rows: rows that see at most so many keys are re-weighted without taking the uniform weight off.
    """

    phi: Literal["exp", "softplus", "sigmoid", "relu"] = "softplus"
    normalise: bool = True
    cosine: bool = True
    reweight: float | None = 15  # the paper's for long texts; 3 is best at the training length
    offset_rows: int = 3  # the paper's "first 3 rows", which see 1, 2 and 3 keys

    def __post_init__(self) -> None:
        if self.phi not in PHIS:
            raise ValueError(f"phi={self.phi!r}: choose {', '.join(PHIS)}")
        if self.reweight is not None and not self.reweight >= 1:
            raise ValueError(f"reweight={self.reweight}: the power is at least 1, or None for no re-weighting")
        if self.offset_rows < 0:
            raise ValueError(f"offset_rows={self.offset_rows}: a number of rows, 0 or more")

    @property
    def scores(self) -> tuple[str, bool, bool]:
        """What weights are trained for; re-weighting comes after, and may be switched on later."""
        return self.phi, self.normalise, self.cosine

    @property
    def name(self) -> str:
        parts = [self.phi, "l1" * self.normalise, "cosine" * self.cosine]
        parts += [] if self.reweight is None else [f"p{self.reweight:g}", f"o{self.offset_rows}"]
        return "-".join(["softplus_attention", *filter(None, parts)])


SOFTMAX = Form(phi="exp", cosine=False, reweight=None)
LSSA = Form(reweight=None)
LSSAR = Form()


# The equations: queries (..., Q, d), keys (..., K, d), what rows see (..., Q, K), true where row i sees key j


def attention_weights(
    query: Tensor,
    key: Tensor,
    visible: Tensor,
    form: Form = LSSAR,
    *,
    scaling: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Steps 1 to 5 -> (..., Q, K), at least 0 and exactly 0 where a key is hidden, in float32 or wider.

    Positions belong into queries and keys beforehand. scaling: 1/sqrt(d) if not given, without `form.cosine` only. bias: is
    added to the logits. Rows sum to 1 with `form.normalise` or `form.reweight`; rows that see no key are all zero.
    """
    wide = torch.promote_types(query.dtype, torch.float32)  # p = 15 is beyond what half precision holds
    seen = visible.sum(-1, keepdim=True).to(wide)
    with torch.autocast(query.device.type, enabled=False):
        z = logits(query.to(wide), key.to(wide), seen, form.cosine, scaling)
    weights = positive(z if bias is None else z + bias, visible, form.phi, shift=form.normalise)
    if form.normalise:
        weights = divide(weights, weights.sum(-1, keepdim=True))
    return weights if form.reweight is None else reweight(weights, seen, form.reweight, form.offset_rows)


def logits(query: Tensor, key: Tensor, seen: Tensor, cosine: bool = True, scaling: float | None = None) -> Tensor:
    """Steps 1 and 2: Z = log d * log N * cosine, with d the head's width and `seen` (..., Q, 1) the number N of keys."""
    width = query.shape[-1]
    if not cosine:
        return query @ key.transpose(-1, -2) * (width**-0.5 if scaling is None else scaling)
    if width < 3:
        raise ValueError(f"heads of width {width}: the scale log d vanishes, so cosine=True needs 3 or more")
    scale = math.log(width) * seen.clamp_min(1).log()
    return normalize(query, dim=-1) * scale @ normalize(key, dim=-1).transpose(-1, -2)


def positive(z: Tensor, visible: Tensor, phi: str, *, shift: bool = True) -> Tensor:
    """Step 3: B = phi(Z) where a key is seen, 0 elsewhere. shift: exp may be scaled per row, because a division follows."""
    z = z.masked_fill(~visible, 0)  # whatever is hidden must not overflow, or its gradient is NaN
    if phi == "exp" and shift:
        z = z - z.detach().masked_fill(~visible, -torch.inf).amax(-1, keepdim=True).nan_to_num(
            neginf=0
        )  # inf: none seen
    return PHIS[phi](z).masked_fill(~visible, 0)


def reweight(weights: Tensor, seen: Tensor, power: float, offset_rows: int = 3) -> Tensor:
    """Step 5: A' ~ max(0, A * N - O)^p, divided by its sum; O is 1, but 0 in rows that see at most `offset_rows` keys.

    A row that is uniform to rounding has nothing above the uniform weight: it stays as it is.
    """
    excess = relu(weights * seen - (seen > offset_rows).to(weights.dtype))
    peak = excess.detach().amax(-1, keepdim=True)
    flat = peak <= 32 * torch.finfo(weights.dtype).eps  # ours: what is left is a row's rounding
    # Each row by its largest entry first, which the division undoes: N^15 overflows float32, and 0.001^15 underflows.
    raised = (excess / peak.masked_fill(flat, 1)).pow(power)
    return torch.where(flat, weights, divide(raised, raised.sum(-1, keepdim=True)))


def divide(weights: Tensor, total: Tensor) -> Tensor:
    """weights / total, 0 where the total is 0."""
    return weights / total.masked_fill(total == 0, 1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    form: Form = LSSAR,
    *,
    causal: bool = False,
    scaling: float | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    block: int = BLOCK,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Step 6: queries (B, H, Q, d), keys (B, H, K, d), values (B, H, K, d_v) -> context (B, H, Q, d_v), weights (B, H, Q, K).

    mask: broadcasts to (B, H, Q, K); boolean, true where a key is seen, or added to the logits, where the lowest number of its
    type hides a key. causal: without a mask, row i sees keys 0 to i. bias: is added to the logits and hides nothing. Rows are
    computed in chunks of about `block` weights over all heads, so that memory grows with K and not with Q * K; the weights of
    more than one chunk are given back only with `keep`, else None.
    """
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    step = max(1, block // max(1, batch * heads * keys))
    keep = keep or step >= rows
    contexts, kept = [], []
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        near = slice(0, min(part.stop, keys) if causal and mask is None else keys)  # a causal chunk sees nothing beyond
        visible, added = _visible(mask, causal, part, near, query.device)
        if bias is not None:
            added = _cut(bias, part, near) + (0 if added is None else added)
        weights = attention_weights(query[:, :, part], key[:, :, near], visible, form, scaling=scaling, bias=added)
        weights = drop(weights.to(value.dtype), dropout)
        contexts.append(weights @ value[:, :, near])
        if keep:
            kept.append(pad(weights, (0, keys - near.stop)) if near.stop < keys else weights)
    return _joined(contexts), _joined(kept) if keep else None


def _visible(
    mask: Tensor | None, causal: bool, part: slice, near: slice, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """What the rows `part` see of the keys `near`, and what is to be added to their logits."""
    if mask is None:
        columns = torch.arange(near.stop, device=device)
        if not causal:
            return torch.ones_like(columns, dtype=torch.bool)[None], None
        return columns <= torch.arange(part.start, part.stop, device=device)[:, None], None
    mask = _cut(mask, part, near)
    if mask.dtype == torch.bool:
        return mask, None
    return mask > torch.finfo(mask.dtype).min / 2, mask


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _cut(of_all: Tensor, part: slice, near: slice) -> Tensor:
    return of_all[..., part if of_all.shape[-2] > 1 else slice(None), near]


# Inside models


RECORD = "softplus_attention"  # the entry of a model's config that says what its weights are trained for


def replace_attention(model: nn.Module, form: Form = LSSAR, *, retrain: bool = False) -> None:
    """Give every layer of a `transformers` model, or of one of its towers, this attention, in place.

    retrain: the model will be trained with it. Without that, ValueError for a form whose scores differ from those that the
    model is trained for (softmax, unless its config says otherwise): it would answer noise. The form is noted in the config
    and saved with it, but transformers opens every model with softmax: call this again after `from_pretrained`.
    """
    config: Any = getattr(model, "config", None)
    said = getattr(config, RECORD, None)
    trained = SOFTMAX if said is None else Form(**said)
    if not retrain and form.scores != trained.scores:
        only = ", ".join(f"{name}={value!r}" for name, value in zip(("phi", "normalise", "cosine"), trained.scores))
        raise ValueError(
            f"this {type(model).__name__} was trained for other scores ({trained.name}) and would answer noise with "
            f"{form.name}: say retrain=True if it is going to be trained, or keep the scores ({only}) and change reweight alone"
        )
    use(model, register_attention(form.name, _Attend(form), boolean_mask=True))
    setattr(config, RECORD, asdict(form))


@dataclass(frozen=True)
class _Attend:
    """A form as `transformers` calls it."""

    form: Form

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if softcap is not None or s_aux is not None:
            what = "a cap on its logits (softcap)" if softcap is not None else "attention sinks (s_aux)"
            raise ValueError(f"{type(module).__name__} wants {what}, which this attention does not have")
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal  # as for SDPA in transformers
        context, weights = attention(
            query,
            expand_groups(module, key),
            expand_groups(module, value),
            attention_mask,
            self.form,
            causal=bool(causal) and query.shape[2] > 1,  # a single query without a mask is the last one: it sees all
            scaling=scaling,
            bias=position_bias,
            dropout=dropout if module.training else 0.0,
            keep=output_attentions,
        )
        return context.transpose(1, 2).contiguous(), weights


@method(
    Paper(
        "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models",
        arxiv="2501.13428",
        year=2025,
    ),
    purpose="attention that stays sharp on inputs many times longer than those it was trained on",
    claim="trained on 64 characters and read over 1,024, loss rises less than half as much as with softmax; not without the "
    "re-weighting, and not with a power of 3",
)
@dataclass(frozen=True)
class SoftplusAttention(ModelStep):
    """LSSAR, or another `Form`, in the chosen towers; the step comes before the training.

    The settings are those of `Form`. retrain: the encoder that comes out will be trained; needed wherever scores change.
    """

    phi: Literal["exp", "softplus", "sigmoid", "relu"] = "softplus"
    normalise: bool = True
    cosine: bool = True
    reweight: float | None = 15
    offset_rows: int = 3
    towers: tuple[str, ...] = TOWERS
    retrain: bool = False

    def __post_init__(self) -> None:
        _ = self.form  # checks its settings
        if isinstance(self.towers, str) or not self.towers or set(self.towers) - set(TOWERS):
            raise ValueError(f"towers={self.towers!r}: choose from {', '.join(TOWERS)}, as a tuple")

    @property
    def form(self) -> Form:
        return Form(self.phi, self.normalise, self.cosine, self.reweight, self.offset_rows)

    @classmethod
    def tiny(cls) -> tuple[Self, list[Record]]:
        return cls(retrain=True), tiny_records()

    @classmethod
    def neutral(cls) -> Self:
        return cls(**asdict(SOFTMAX))

    def apply(self, encoder: Encoder, pairs: Pairs | None = None) -> HFEncoder:
        assert isinstance(encoder, HFEncoder)
        changed = encoder.clone()
        self._replace(changed, self.retrain)
        changed.record_step("softplus_attention", {**asdict(self.form), "towers": list(self.towers)}, reshapes=True)
        return changed

    def reshape(self, encoder: Encoder) -> HFEncoder:
        assert isinstance(encoder, HFEncoder)
        self._replace(encoder, retrain=True)  # the weights that `load` fills in belong to it
        return encoder

    def _replace(self, encoder: HFEncoder, retrain: bool) -> None:
        for tower in self.towers:
            replace_attention(getattr(encoder.anatomy, tower).module, self.form, retrain=retrain)
