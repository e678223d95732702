"""Ranking-aware adapter: put pictures in the order that an instruction asks for ("Rank the numbers of horse.").

Two towers stay frozen; a small adapter lets patches read the words of the instruction and scores each picture by itself. What
teaches it to order is a second head, used in training: learnt rank tokens attend over the patches of *two* pictures at once, one
softmax over both, and the difference of what they gather from each says which ranks higher. So evidence in one picture
competes with evidence in the other, and the features must carry quantities that compare.

`RankingAdapter` is the predictor, `RankAdapter` the network, `pair_differences` its attention in a form that needs each picture's
patches once instead of once per pair. The losses are `rank_loss`, `regression_loss` and `presence_loss`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear, smooth_l1_loss

from ecliptic.core.contracts import Pairs, Prediction, Predictor, Record
from ecliptic.core.encoder import Encoder, open_picture
from ecliptic.core.method import Paper, method
from ecliptic.core.progress import Progress
from ecliptic.core.train import Settings
from ecliptic.core.train import fit as train
from ecliptic.data.shots import tiny_records

Ties = Literal["zero", "half", "ignore"]
Pair = Literal["difference", "sum", "score"]
ENCODED = 32  # pictures encoded at a time; ours


@method(
    Paper("Ranking-aware adapter for text-driven image ordering with CLIP", arxiv="2412.06760", year=2024),
    purpose="put pictures in order of what an instruction names (count, size, quality), after seeing some with known values",
    claim="from few pictures the pair loss over both pictures' patches orders better than the same adapter with regression "
    "alone, and than similarity to words; a symmetric pair head cannot order",
)
@dataclass(eq=False)
class RankingAdapter(Predictor):
    """Learns from records with `image` and `quantities`, {instruction: value}; a record may have values for several of them.

    Values should lie within some tens (the regression loss takes them as they are): count, years, tenths. Scores of different
    instructions cannot be compared. The towers are frozen, and all patch embeddings are kept in memory during `fit`: 4 * D bytes
    a patch, twice that with `flip`. Pictures pass through the encoder's own preprocessing; where that crops, give it squares.
    """

    instructions: tuple[str, ...] | None = None  # None: all that the records have values for, sorted
    zero_if_absent: tuple[str, ...] = ()  # instructions whose value is 0 in records that name none: counts of a thing
    width: int | None = None  # None: that of the joint space, without the two linear maps into the adapter's own
    heads: int = 8
    layers: int = 2
    text_prompts: int = 32
    rank_tokens: int = 16
    dropout: float = 0.1
    rank_weight: float = 1.0
    regression_weight: float = 0.2
    presence_weight: float = 0.0  # the paper has 1, the released command leaves it out
    ties: Ties = "zero"  # see `rank_loss`; the paper's, although it biases the pair head where many are equal
    pair: Pair = "difference"  # "sum" and "score" are for comparison, see `RankAdapter`
    negatives: float = 0.2  # share of a batch that is drawn from records without the instruction, for `zero_if_absent`
    balance: bool = False  # draw rare values as often as frequent ones
    flip: bool = True  # mirror pictures half of the time; not for instructions that tell left from right
    steps: int = 1000  # ours: the paper's epochs depend on the data set
    batch_size: int = 64
    lr: float = 5e-5
    weight_decay: float = 0.01
    warmup: float = 0.1  # below 1 a share of the steps; ours
    seed: int = 0

    def fit(self, encoder: Encoder, pairs: Pairs) -> Self:
        """Train the adapter. ValueError for records without values, or values that are not finite."""
        names, values = quantities_of(pairs, self.instructions)
        draw = self._batches(names, values)  # what is wrong with settings is said before any picture is opened
        return self._learn(encoder, encode_patches(encoder, pairs, flip=self.flip), names, draw)

    def fit_patches(self, encoder: Encoder, patches: Tensor, names: Sequence[str], values: NDArray[np.float64]) -> Self:
        """The same from patches (S, N, P, D), as `encode_patches` gives them, and values (N, K) of K instructions, NaN for none.

        S views of the same pictures, of which each batch takes one at random.
        """
        if patches.ndim != 4 or values.shape != (patches.shape[1], len(names)):
            raise ValueError(
                f"patches must be (S, N, P, D) and values (N, {len(names)}), got {tuple(patches.shape)}, {values.shape}"
            )
        return self._learn(encoder, patches, tuple(names), self._batches(names, values))

    def _batches(self, names: Sequence[str], values: NDArray[np.float64]) -> InstructionBatches:
        if unknown := sorted(set(self.zero_if_absent) - set(names)):
            raise ValueError(f"zero_if_absent has {unknown[0]!r}, which is none of the instructions {tuple(names)}")
        negatives = [self.negatives if name in self.zero_if_absent else 0.0 for name in names]
        return InstructionBatches(values, self.batch_size, negatives, balance=self.balance, seed=self.seed)

    def _learn(self, encoder: Encoder, patches: Tensor, names: tuple[str, ...], draw: InstructionBatches) -> Self:
        words = [encode_words(encoder, name) for name in names]
        shape = {
            "dim": patches.shape[-1],
            "width": self.width or patches.shape[-1],
            "heads": self.heads,
            "layers": self.layers,
            "text_prompts": self.text_prompts,
            "rank_tokens": self.rank_tokens,
            "dropout": self.dropout,
            "pair": self.pair,
        }
        adapter = RankAdapter(**shape, seed=self.seed).to(patches.device)  # type: ignore[arg-type]

        def batches(i: int) -> dict[str, Any]:
            instruction, rows, target = draw(i)
            side = np.random.default_rng([self.seed, i, 1]).integers(0, len(patches), len(rows))
            return {"patches": patches[side, rows], "target": target, "words": words[instruction]}

        def loss(batch: Mapping[str, Any]) -> dict[str, Tensor]:
            tokens = adapter.tokens(batch["patches"], batch["words"])
            score, target = adapter.score(tokens), batch["target"]
            terms = {}
            if self.rank_weight:
                terms["rank"] = self.rank_weight * rank_loss(adapter.pairs(tokens, score), target, self.ties)
            if self.regression_weight:
                terms["regression"] = self.regression_weight * regression_loss(score, target)
            if self.presence_weight:
                terms["presence"] = self.presence_weight * presence_loss(score, target)
            return terms

        how = Settings(
            steps=self.steps,
            lr=self.lr,
            weight_decay=self.weight_decay,
            betas=(0.9, 0.999),
            eps=1e-8,
            warmup=self.warmup,
            seed=self.seed,
        )
        train(adapter, loss, batches, how, title="ranking adapter", unit="pictures")
        self.instructions_, self.shape_ = names, shape
        self.weights_ = {name: value.detach().clone() for name, value in adapter.state_dict().items()}
        self.encoder_ = encoder
        self._network = adapter.eval()
        return self

    @torch.no_grad()
    def predict(self, pixels: Tensor) -> Prediction:
        """Pixels (B, 3, H, W), as `encoder.preprocess` gives them -> scores (B, K), one column for each of `instructions_`."""
        patches = patches_of(self._towers(), pixels)
        scores = torch.stack([self.score_patches(patches, name) for name in self.instructions_], dim=-1)
        return Prediction(scores=scores, classes=self.instructions_)

    @torch.no_grad()
    def score(self, pixels: Tensor, instruction: str) -> Tensor:
        """Pixels (B, 3, H, W) -> (B,), in units of the values learnt from; higher means more of what the instruction names."""
        return self.score_patches(patches_of(self._towers(), pixels), instruction)

    @torch.no_grad()
    def score_patches(self, patches: Tensor, instruction: str) -> Tensor:
        """The same from patches (B, P, D)."""
        network = self._adapter()
        return network.score(network.tokens(patches, encode_words(self._towers(), instruction))).cpu()

    @torch.no_grad()
    def compare(self, pixels: Tensor, instruction: str, chunk: int | None = None) -> Tensor:
        """Pixels (B, 3, H, W) -> pair logits (B, B): positive where the row's picture ranks above the column's.

        Not antisymmetric: (compare - compare.T) / 2 is. chunk: rows at a time, for less memory.
        """
        return self.compare_patches(patches_of(self._towers(), pixels), instruction, chunk)

    @torch.no_grad()
    def compare_patches(self, patches: Tensor, instruction: str, chunk: int | None = None) -> Tensor:
        """The same from patches (B, P, D)."""
        network = self._adapter()
        tokens = network.tokens(patches, encode_words(self._towers(), instruction))
        return network.pairs(tokens, network.score(tokens), chunk).cpu()

    def rank(self, images: Iterable[Image.Image | str | Path], instruction: str) -> list[int]:
        """Pictures or paths -> their positions, those with most of what the instruction names first; equals in order."""
        pictures = list(images)
        scores = []
        for start in range(0, len(pictures), ENCODED):
            some = [_opened(picture) for picture in pictures[start : start + ENCODED]]
            scores.append(self.score(self._towers().preprocess(some), instruction))
        return torch.cat(scores).argsort(descending=True, stable=True).tolist() if scores else []

    def _towers(self) -> Encoder:
        if (encoder := getattr(self, "encoder_", None)) is None:
            raise ValueError("no encoder here: call fit(encoder, pairs) first")
        return encoder  # type: ignore[no-any-return]

    def _adapter(self) -> RankAdapter:
        """The trained network, built from what was saved where it was loaded."""
        device = next(iter(self._towers().parameters())).device
        if (found := getattr(self, "_network", None)) is None:
            found = RankAdapter(**self.shape_)  # type: ignore[arg-type]
            found.load_state_dict(self.weights_)
            self._network = found.eval()
        return cast(RankAdapter, found.to(device))

    @classmethod
    def tiny(cls) -> tuple[RankingAdapter, list[Record]]:
        settings: dict[str, Any] = {"heads": 2, "layers": 1, "text_prompts": 4, "rank_tokens": 3, "width": 8}
        records = [
            {**record, "quantities": {"Rank the light.": i / 2, **({"Rank the reds.": i} if i % 3 == 0 else {})}}
            for i, record in enumerate(tiny_records())
        ]
        judge = cls(zero_if_absent=("Rank the reds.",), steps=4, batch_size=6, lr=1e-3, **settings)
        return judge, records


# The network


class RankAdapter(nn.Module):
    """Patches (N, P, dim) and words (T, dim) of frozen towers -> a score per picture and a logit per ordered pair.

    dim: of the joint space; width: the adapter's own, reached by a linear map each where it differs. text_prompts: learnt words
    put first, each one number for all channels, as in the released code. pair: "difference" is the paper's ranking-aware
    attention; "sum" adds the two sides instead, which makes the pair symmetric, so that it cannot order; "score" takes
    score_i - score_j for the pair's logit and learns no second head. Starting values come from the seed alone.
    """

    def __init__(
        self,
        dim: int,
        width: int | None = None,
        heads: int = 8,
        layers: int = 2,
        text_prompts: int = 32,
        rank_tokens: int = 16,
        dropout: float = 0.1,
        pair: Pair = "difference",
        seed: int = 0,
    ):
        super().__init__()
        width = width or dim
        if width % heads:
            raise ValueError(f"width={width} cannot be split into heads={heads}: choose a divisor")
        if pair not in ("difference", "sum", "score"):
            raise ValueError(f"pair must be 'difference', 'sum' or 'score', not {pair!r}")
        self.heads, self.pair = heads, pair
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._build(dim, width, layers, text_prompts, rank_tokens, dropout)

    def _build(self, dim: int, width: int, layers: int, text_prompts: int, rank_tokens: int, dropout: float) -> None:
        self.read_patches: nn.Module = nn.Identity() if dim == width else nn.Linear(dim, width)
        self.read_words: nn.Module = nn.Identity() if dim == width else nn.Linear(dim, width)
        self.text_prompts = nn.Parameter(torch.randn(text_prompts, 1) * max(text_prompts, 1) ** -0.5)
        self.own = nn.ModuleList(Block(width, self.heads) for _ in range(layers))
        self.cross = nn.ModuleList(Block(width, self.heads, cross=True) for _ in range(layers))
        self.norm, self.project = nn.LayerNorm(width), nn.Linear(width, width)
        # Post-norm, unlike the blocks before, as in the released code.
        last = nn.TransformerEncoderLayer(width, self.heads, width, dropout, batch_first=True)
        self.last = nn.TransformerEncoder(last, 2, enable_nested_tensor=False)
        self.score_norm, self.score_head = nn.LayerNorm(width), mlp(width, 2)
        for module in self.score_head.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)
        if self.pair != "score":
            self.rank_tokens = nn.Parameter(torch.randn(rank_tokens, width) * width**-0.5)
            self.query, self.query_norm = nn.Linear(width, width), nn.LayerNorm(width)
            # One projection for keys and values.
            self.key_value, self.key_value_norm = (nn.Linear(width, width), nn.LayerNorm(width))
            self.out = nn.Linear(width, width)
            self.pair_head = nn.Sequential(nn.LayerNorm(width), mlp(width, 3))

    def forward(self, patches: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """patches (N, P, dim), words (T, dim) -> scores (N,) and pair logits (N, N), row i column j: i ranks above j."""
        tokens = self.tokens(patches, words)
        score = self.score(tokens)
        return score, self.pairs(tokens, score)

    def tokens(self, patches: Tensor, words: Tensor) -> Tensor:
        """-> (N, P, width): patches that have read the instruction; each picture by itself."""
        said = self.read_words(words)
        said = torch.cat([self.text_prompts.expand(-1, said.shape[-1]), said])[None].expand(len(patches), -1, -1)
        x = self.read_patches(patches)
        for own, cross in zip(self.own, self.cross, strict=True):
            x = cross(own(x), said)
        found: Tensor = self.last(self.project(self.norm(x)))
        return found

    def score(self, tokens: Tensor) -> Tensor:
        """(N, P, width) -> (N,)."""
        found: Tensor = self.score_head(self.score_norm(tokens).sum(1))
        return found[:, 0]

    def pairs(self, tokens: Tensor, score: Tensor, chunk: int | None = None) -> Tensor:
        """(N, P, width) and the scores (N,) -> (N, N) logits. chunk: rows at a time; the same for any."""
        if self.pair == "score":
            return score[:, None] - score[None]
        values, evidence = self.attend(tokens)
        sign = -1.0 if self.pair == "difference" else 1.0
        rows = torch.arange(len(tokens), device=tokens.device).split(chunk or len(tokens))  # type: ignore[no-untyped-call]
        return torch.cat([self._pair_logits(pair_differences(values, evidence, some, sign)) for some in rows])

    def attend(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(N, P, width) -> what each rank token gathers from each picture alone (N, Q, heads, width / heads), and how strongly
        it is drawn there, log sum_p exp(q k_p / sqrt(d_h)) (N, Q, heads)."""
        query = self.query_norm(self.query(self.rank_tokens)).unflatten(-1, (self.heads, -1))
        keys = self.key_value_norm(self.key_value(tokens)).unflatten(-1, (self.heads, -1))
        scores = torch.einsum("qhc,nphc->nqhp", query, keys) * query.shape[-1] ** -0.5
        return torch.einsum("nqhp,nphc->nqhc", scores.softmax(-1), keys), scores.logsumexp(-1)

    def _pair_logits(self, summed: Tensor) -> Tensor:
        """Differences summed over the rank tokens (n, N, heads, d_h) -> (n, N): projected, of which the sum is taken, and read.

        The projection is linear, so it may follow the sum, with its bias taken once for each token.
        """
        found: Tensor = self.pair_head(
            linear(summed.flatten(-2), self.out.weight, self.out.bias * len(self.rank_tokens))
        )
        return found[..., 0]


def pair_differences(values: Tensor, evidence: Tensor, rows: Tensor | None = None, sign: float = -1.0) -> Tensor:
    """Ranking-aware attention of every pair (i, j), i among `rows` -> (n, N, heads, d_h), the sum over the rank tokens of
    D_ij = a^i v_i + sign * a^j v_j.

    a is one softmax over the patches of both pictures. Its share of picture i is sigmoid(evidence_i - evidence_j), and within a
    picture it is that picture's own softmax: so values (N, Q, heads, d_h), the averages under those, and evidence (N, Q,
    heads), their log normalisers, are all it takes. Exact, and safe for scores of any size; O(N^2 Q d) instead of
    O(N^2 Q P d). With sign -1, D_ij = -D_ji and D_ii = 0.
    """
    first = (values, evidence) if rows is None else (values[rows], evidence[rows])
    margin = first[1][:, None] - evidence[None]  # (n, N, Q, heads)
    ours = torch.einsum("ijqh,iqhc->ijhc", margin.sigmoid(), first[0])
    theirs = torch.einsum("ijqh,jqhc->ijhc", (-margin).sigmoid(), values)
    return ours + sign * theirs


class Block(nn.Module):
    """Pre-norm transformer block with an MLP four times as wide; with `cross`, keys and values come from elsewhere."""

    def __init__(self, width: int, heads: int, cross: bool = False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(width) if cross else None
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        query = self.norm1(x)
        seen = query if context is None or self.norm_context is None else self.norm_context(context)
        x = x + self.attention(query, seen, seen, need_weights=False)[0]
        found: Tensor = x + self.mlp(self.norm2(x))
        return found


def mlp(width: int, hidden: int) -> nn.Sequential:
    """(..., width) -> (..., 1): `hidden` times linear, norm, ReLU, then linear."""
    layers: list[nn.Module] = []
    for _ in range(hidden):
        layers += [nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 1))


# Losses


def rank_loss(logits: Tensor, values: Tensor, ties: Ties = "zero") -> Tensor:
    """logits (N, N), values (N,) -> mean over pairs of cross-entropy with 1[y_i > y_j], in nats; log 2 for logits of 0.

    ties: what pairs of equal values, each picture with itself among them, are to say: "zero", not above (the paper's, which
    biases the logits downwards where many are equal); "half", undecided; "ignore", nothing.
    """
    if ties not in ("zero", "half", "ignore"):
        raise ValueError(f"ties must be 'zero', 'half' or 'ignore', not {ties!r}")
    margin = values[:, None] - values[None]
    target = (margin > 0).to(logits)
    if ties == "half":
        target = torch.where(margin == 0, 0.5, target)
    losses = binary_cross_entropy_with_logits(logits, target, reduction="none")
    if ties == "ignore":
        decided = margin != 0
        return (losses * decided).sum() / decided.sum().clamp(min=1)
    return losses.mean()


def regression_loss(scores: Tensor, values: Tensor) -> Tensor:
    """scores, values (N,) -> log(1 + mean smooth L1), beta 1; 0 exactly where all scores are right."""
    return smooth_l1_loss(scores, values.to(scores)).log1p()


def presence_loss(scores: Tensor, values: Tensor) -> Tensor:
    """scores, values (N,) -> mean cross-entropy, in nats, of the score as a logit with 1[y != 0]."""
    return binary_cross_entropy_with_logits(scores, (values != 0).to(scores))


# Data


def quantities_of(
    pairs: Pairs, instructions: Sequence[str] | None = None
) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """The instructions and (N, K) values of the records, NaN where a record has none; opens no picture.

    ValueError for records without `quantities`, values that are no finite numbers, or an instruction with fewer than two
    different values.
    """
    found = pairs.column("quantities") if hasattr(pairs, "column") else [record.get("quantities") for record in pairs]
    if not found:
        raise ValueError("there are no records to learn from")
    for i, given in enumerate(found):
        if not isinstance(given, Mapping):
            raise ValueError(f"record {i} has no quantities: each needs a dict, instruction -> value")
    names = (
        tuple(sorted({str(name) for given in found for name in given})) if instructions is None else tuple(instructions)  # type: ignore[union-attr]
    )
    if not names:
        raise ValueError("no record has a value for any instruction")
    values = np.array([[float(given.get(name, np.nan)) for name in names] for given in found])  # type: ignore[union-attr]
    said = np.array([[name in given for name in names] for given in found])  # type: ignore[operator]
    if not np.isfinite(values[said]).all():
        row, column = np.argwhere(said & ~np.isfinite(values))[0]
        raise ValueError(f"record {row}: the value of {names[column]!r} is {values[row, column]}")
    for k, name in enumerate(names):
        if len(np.unique(values[said[:, k], k])) < 2:
            raise ValueError(f"{name!r} has no two different values: there is no order to learn")
    return names, values


class InstructionBatches:
    """Batch number -> (instruction, rows (B,), values (B,)), a function of (seed, number) alone; one instruction a batch.

    values (N, K), NaN where a record has none. negatives (K): the share of a batch drawn from records without the instruction,
    whose value is then 0: they must be known to lack it. balance: members are drawn in inverse proportion to how many share
    their value. A record occurs twice in a batch only where there are too few.
    """

    def __init__(
        self,
        values: NDArray[np.float64],
        size: int,
        negatives: Sequence[float],
        *,
        balance: bool = False,
        seed: int = 0,
    ):
        if size < 2:
            raise ValueError(f"batch_size={size}: pairs need at least two pictures")
        if any(not 0 <= share < 1 for share in negatives):
            raise ValueError(f"negatives={max(negatives)}: a share of the batch, at least 0 and below 1")
        self.values, self.size, self.negatives, self.balance, self.seed = values, size, negatives, balance, seed
        self._members = [np.flatnonzero(~np.isnan(column)) for column in values.T]
        self._others = [np.flatnonzero(np.isnan(column)) for column in values.T]

    def __call__(self, i: int) -> tuple[int, Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, i])
        k = int(rng.integers(self.values.shape[1]))
        members, others = self._members[k], self._others[k]
        absent = round(self.negatives[k] * self.size) if len(others) else 0
        weights = None
        if self.balance:
            _, inverse, count = np.unique(self.values[members, k], return_inverse=True, return_counts=True)
            weights = 1 / count[inverse] / len(count)
        present = self.size - absent
        rows = [rng.choice(members, present, replace=self.balance or present > len(members), p=weights)]
        rows.append(rng.choice(others, absent, replace=absent > len(others)) if absent else others[:0])
        chosen = np.concatenate(rows)
        return k, torch.from_numpy(chosen), torch.from_numpy(np.nan_to_num(self.values[chosen, k])).float()


@torch.no_grad()
def encode_patches(encoder: Encoder, pairs: Pairs, *, flip: bool = False) -> Tensor:
    """Records -> (1, N, P, D) patches in the joint space, float32, or (2, N, P, D) with the mirrored pictures second."""
    sides: list[list[Tensor]] = [[], []] if flip else [[]]
    count = getattr(pairs, "__len__", None)
    with Progress("encoding pictures", count() if count else None, unit="pictures") as bar:
        for some in _groups(pairs):
            pixels = encoder.preprocess([_opened(record["image"]) for record in some])
            for k, side in enumerate(sides):
                side.append(patches_of(encoder, pixels.flip(-1) if k else pixels))
            bar.advance(len(some))
    return torch.stack([torch.cat(side) for side in sides])


def patches_of(encoder: Encoder, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, P, D): patches in the joint space, float32, cut off from the tower."""
    tokens = encoder.images(pixels, patches=True).tokens
    if tokens is None:
        raise TypeError(f"{type(encoder).__name__} gives no patch features: it must honour images(..., patches=True)")
    return tokens.detach().float()


@torch.no_grad()
def encode_words(encoder: Encoder, instruction: str) -> Tensor:
    """An instruction -> (T, D): its tokens in the joint space, without padding. TextTooLong for what cannot be read whole."""
    tokens = encoder.tokenize([instruction], overflow="error")
    found = encoder.texts(tokens, words=True).tokens
    if found is None:
        raise TypeError(f"{type(encoder).__name__} gives no word features: it must honour texts(..., words=True)")
    return found[0, tokens.mask[0, : found.shape[1]].to(found.device)].float()


def _groups(pairs: Pairs) -> Iterator[list[Record]]:
    group: list[Record] = []
    for record in pairs:
        group.append(record)
        if len(group) == ENCODED:
            yield group
            group = []
    if group:
        yield group


def _opened(image: Any) -> Image.Image:
    return open_picture(image) if isinstance(image, str | Path) else image
