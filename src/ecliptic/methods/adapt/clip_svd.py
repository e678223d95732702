"""CLIP-SVD: write every weight of the transformer blocks as U diag(s) V' and train nothing but s, in both towers at once.

What a layer reads (V) and writes (U) was learnt from hundreds of millions of pictures; a few labelled ones only say which of
it to turn up or down. So few numbers, 92,160 for ViT-B/16, hardly overfit, and classes never shown gain with the others
where what changed is shared. Merged, the model is a plain one again and costs nothing extra.

`ClipSvd` is the whole recipe. `svd_reparametrise` gives the layers alone, for other losses; `rank_changes` tells which heads
were adapted.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from ecliptic.core.anatomy import Tower, swap
from ecliptic.core.anatomy import parts as parts_of
from ecliptic.core.contracts import ModelStep, Pairs, Record
from ecliptic.core.encoder import Encoder, HFEncoder
from ecliptic.core.method import Paper, method
from ecliptic.core.prompt_classifier import PromptClassifier
from ecliptic.core.train import Train
from ecliptic.core.zeroshot import template_set
from ecliptic.data.shots import RandomView, check_labels, labels_of, tiny_records

TOWERS = ("image", "text")
PARTS = ("q", "k", "v", "out", "fc1", "fc2")  # of a block, as `core.anatomy.Parts` names them; the paper's o and mlp
GROUPS = ("bottom", "middle", "top")  # thirds of a tower: blocks 0-3, 4-7, 8-11 of twelve, section 4
Layers = Literal["all"] | Sequence[int | str]


@method(
    Paper("Singular Value Few-shot Adaptation of Vision-Language Models", arxiv="2509.03740", year=2025),
    purpose="adapt both towers to a new domain from a few labelled pictures, without forgetting classes not shown",
    claim="under a shift of style it gains on the classes shown as much as full fine-tuning and more than a learnt prompt, "
    "and keeps or gains on classes not shown; in a random basis the same number of parameters gains clearly less",
)
@dataclass(frozen=True)
class ClipSvd(ModelStep):
    """Few-shot training of the singular values by cross-entropy over class prompts. The encoder that comes back is a plain
    one, with `merge=False` one that still holds U, s and V. Classify with it by prompts, any class names.

    Takes records with `image` and `label`. lr=0 changes nothing (but for rounding; rank_ratio < 1 drops directions even then).
    The pooling head of SigLIP, like all projections into the joint space, stays as it is.
    """

    classes: tuple[str, ...] | None = None  # names in the order wanted; None: the labels found, sorted
    templates: str | tuple[str, ...] = "photo"  # as `core.zeroshot.zero_shot_head` takes them
    towers: tuple[str, ...] = TOWERS
    parts: tuple[str, ...] = PARTS
    layers: Layers = "all"  # or numbers of blocks, negative from the end, and names of thirds (`GROUPS`)
    rank_ratio: float = 1.0  # below 1 the smallest singular values are dropped
    lr: float = 5e-4  # few-shot; the paper takes 4e-4 from base to new classes
    steps: int | None = None  # None: 200 for each picture of a class, as in the few-shot configs
    batch_size: int = 32  # fewer where there are fewer pictures
    weight_decay: float = 0.01
    decay_towards: Literal["zero", "start"] = "zero"  # "start", the pretrained values, is ours: larger rates need it
    crop: tuple[float, float] | None = (0.08, 1.0)  # share of the area that a training view keeps; None: no views
    tau: float | None = None  # see `PromptClassifier`: CLIP's 100, SigLIP's own scale
    merge: bool = True
    precision: Literal["no", "bf16", "fp16"] = "no"
    checkpoints: str | None = None  # folder, to go on from after an interrupt
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("classes", "templates", "towers", "parts", "layers", "crop"):
            if isinstance(value := getattr(self, name), list):  # from a recipe, or from a saved model's history
                object.__setattr__(self, name, tuple(value))
        template_set(self.templates)
        _check_choice(self.towers, self.parts, self.rank_ratio)
        if self.decay_towards not in ("zero", "start"):
            raise ValueError(f"decay_towards must be 'zero' or 'start', not {self.decay_towards!r}")

    def apply(self, encoder: Encoder, pairs: Pairs | None = None) -> HFEncoder:
        """Learn from labelled records; returns an adapted copy."""
        if pairs is None:
            raise ValueError("ClipSvd learns from labelled pictures: apply(encoder, pairs)")
        names, labels = labels_of(pairs, self.classes)
        check_labels(labels, len(labels), names, every_class=False)
        adapted = cast(HFEncoder, encoder).clone()
        handle = self._reparametrise(adapted)
        trained = self._trainer(adapted, names, labels).run(adapted, pairs).encoder
        handle.load_state_dict(SvdHandle(cast(HFEncoder, trained)).state_dict())
        if self.merge:
            handle.merge()
        arguments = {name: value for name, value in asdict(self).items() if name != "checkpoints"}
        adapted.record_step("clip_svd", json.loads(json.dumps(arguments)), reshapes=not self.merge)
        return adapted

    def reshape(self, encoder: Encoder) -> Encoder:
        self._reparametrise(cast(HFEncoder, encoder), decompose=False)
        return encoder

    def _reparametrise(self, encoder: HFEncoder, decompose: bool = True) -> SvdHandle:
        return svd_reparametrise(
            encoder,
            self.towers,
            self.parts,
            self.layers,
            self.rank_ratio,
            decay_towards=self.decay_towards,
            decompose=decompose,
        )

    def _trainer(self, encoder: HFEncoder, names: tuple[str, ...], labels: Tensor) -> Train:
        per_class = max(1, round(len(labels) / len(labels.unique())))  # type: ignore[no-untyped-call]
        return Train(
            PromptClassifier(names, self.templates, self.tau),
            trainable=OFFSETS,
            steps=200 * per_class if self.steps is None else self.steps,
            batch_size=min(self.batch_size, len(labels)),
            augment=None if self.crop is None else RandomView.for_encoder(encoder, self.crop),
            lr=self.lr,
            groups={OFFSETS: {"weight_decay": self.weight_decay}},
            betas=(0.9, 0.999),
            eps=1e-8,  # torch's own, as in the released code
            grad_clip=None,
            warmup=0,
            floor=min(1.0, 1e-6 / self.lr) if self.lr else 0.0,  # the cosine ends at 1e-6, few-shot configs
            precision=self.precision,
            checkpoints=self.checkpoints,
            seed=self.seed,
        )

    @classmethod
    def tiny(cls) -> tuple[ClipSvd, list[Record]]:
        return cls(steps=3, batch_size=6, lr=5e-3), tiny_records()

    @classmethod
    def neutral(cls) -> ClipSvd:
        return cls(steps=1, lr=0.0)


# The layers


class SvdLinear(nn.Module):
    """y = ((x V) * s) U' + b, where W = U diag(s) V' was a linear layer; gradients can change s, and no direction.

    left (out, r) and right (r, in): U and V', orthonormal, fixed. start (r,): the singular values of W, largest first.
    s = anchor + offset, of any sign and order; `offset` is the parameter, and weight decay pulls s towards `anchor`: 0 as in
    the paper, or `start`. digest (8,) uint8 identifies W.
    """

    left: Tensor
    right: Tensor
    start: Tensor
    anchor: Tensor
    digest: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int, bias: nn.Parameter | None, like: Tensor):
        super().__init__()
        self.in_features, self.out_features, self.rank = inputs, outputs, rank
        for name, shape in (
            ("left", (outputs, rank)),
            ("right", (rank, inputs)),
            ("start", (rank,)),
            ("anchor", (rank,)),
        ):
            self.register_buffer(name, like.new_zeros(shape))
        self.register_buffer("digest", torch.zeros(8, dtype=torch.uint8, device=like.device))
        self.offset = nn.Parameter(like.new_zeros(rank))
        self.register_parameter("bias", bias)

    @classmethod
    @torch.no_grad()
    def of(cls, layer: nn.Linear, rank: int, decay_towards: str = "zero") -> SvdLinear:
        """The best approximation of this rank: exact, but for rounding, at full rank."""
        weight = layer.weight
        found = cls(layer.in_features, layer.out_features, rank, layer.bias, weight)
        wide = weight if weight.dtype == torch.float64 else weight.float()  # never decompose in half precision
        left, values, right = torch.linalg.svd(wide, full_matrices=False)
        found.left.copy_(left[:, :rank])
        found.right.copy_(right[:rank])
        found.start.copy_(values[:rank])
        (found.anchor if decay_towards == "start" else found.offset).copy_(found.start)
        found.digest.copy_(_digest(weight))
        return found

    @property
    def s(self) -> Tensor:
        return self.anchor + self.offset

    @property
    def weight(self) -> Tensor:
        """(out, in): what the layer amounts to."""
        return (self.left * self.s) @ self.right

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > self.in_features * (self.in_features + self.out_features):
            return linear(x, self.weight, self.bias)  # type: ignore[arg-type]  # many rows: one product of x and W is cheaper than two
        return linear(linear(x, self.right) * self.s, self.left, self.bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer with the same bias that computes the same."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight = nn.Parameter(self.weight.contiguous())
        plain.bias = self.bias  # type: ignore[assignment]
        return plain

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


OFFSETS = r"\.offset$"
"""For `trainable=` of the trainer: the parameters of `SvdLinear`."""


def svd_reparametrise(
    encoder: HFEncoder,
    towers: Sequence[str] = TOWERS,
    parts: Sequence[str] = PARTS,
    layers: Layers = "all",
    rank_ratio: float = 1.0,
    *,
    decay_towards: Literal["zero", "start"] = "zero",
    decompose: bool = True,
) -> SvdHandle:
    """Put an `SvdLinear` in the place of the chosen linear layers, in place; afterwards only singular values require grad.

    towers: "image", "text". parts: "q", "k", "v", "out", "fc1", "fc2". layers: "all", or numbers of blocks and thirds of a
    tower ("bottom", "middle", "top"). rank_ratio: keeps floor(ratio * rank) directions, rounded down to a multiple of four.
    decompose: False leaves the new layers empty, to be filled from a file. ValueError, IndexError or TypeError if the choice
    is empty, does not exist in a tower, or names layers that are not plain linear ones.
    """
    _check_choice(towers, parts, rank_ratio)
    found = [
        (tower.blocks[i], layer)
        for name in towers
        for tower in [cast(Tower, getattr(encoder.anatomy, name))]
        for i in _blocks(tower, layers, name)
        for layer in _linear_layers(tower.blocks[i], parts)
    ]
    ranks = [_rank(layer, rank_ratio) for _, layer in found]  # everything is checked before anything changes
    frozen = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    for (block, layer), rank in zip(found, ranks, strict=True):
        if decompose:
            new = SvdLinear.of(layer, rank, decay_towards)
        else:
            new = SvdLinear(layer.in_features, layer.out_features, rank, layer.bias, layer.weight.detach())
        swap(block, layer, new)
    for parameter in frozen:
        parameter.requires_grad_(False)
    return SvdHandle(encoder, frozen)


class SvdHandle:
    """The decomposed layers of an encoder by tower, block and part, "image.0.q"; of a loaded one, too.

    frozen: parameters that `merge` lets train again.
    """

    def __init__(self, encoder: HFEncoder, frozen: Sequence[nn.Parameter] = ()):
        self.layers: dict[str, SvdLinear] = {}
        self._blocks: dict[str, nn.Module] = {}
        self._frozen = frozen
        for tower in TOWERS:
            for i, block in enumerate(getattr(encoder.anatomy, tower).blocks):
                for part in PARTS:
                    if isinstance(layer := getattr(parts_of(block), part), SvdLinear):
                        self.layers[f"{tower}.{i}.{part}"] = layer
                        self._blocks[f"{tower}.{i}.{part}"] = block
        if not self.layers:
            raise ValueError(f"{encoder.name} has no decomposed layers: they were merged, or never made")

    def singular_values(self) -> dict[str, Tensor]:
        """(r,) of each layer, as they are now, in the order of the pretrained ones."""
        return {name: layer.s.detach().clone() for name, layer in self.layers.items()}

    def delta(self) -> dict[str, Tensor]:
        """(r,) of each layer: by how much they changed."""
        return {name: layer.s.detach() - layer.start for name, layer in self.layers.items()}

    def trainable_count(self) -> int:
        return sum(layer.rank for layer in self.layers.values())

    def merge(self) -> None:
        """Put plain linear layers back, with the weights that training led to. The handle is empty afterwards."""
        for name, layer in self.layers.items():
            swap(self._blocks[name], layer, layer.merged())
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self.layers, self._blocks, self._frozen = {}, {}, ()

    def state_dict(self) -> dict[str, Tensor]:
        """The singular values alone, and a digest of the weights they belong to: all it takes to repeat an adaptation."""
        return {**self.singular_values(), "digest": torch.stack([layer.digest for layer in self.layers.values()])}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over values from `state_dict`. ValueError for other layers, or another model's: U and V are not in there."""
        if other := sorted((state.keys() - {"digest"}) ^ self.layers.keys()):
            raise ValueError(f"these values are of other layers, which differ in {', '.join(other[:5])}")
        own = self.state_dict()
        if not torch.equal(own["digest"].cpu(), state["digest"].cpu()):
            raise ValueError(
                "these values were learnt on a model with other weights: singular values mean nothing elsewhere"
            )
        if wrong := [name for name in self.layers if state[name].shape != own[name].shape]:
            raise ValueError(f"these values are of another rank: {', '.join(wrong[:5])}")
        for name, layer in self.layers.items():
            layer.offset.copy_(state[name].to(layer.offset) - layer.anchor)


def _check_choice(towers: Sequence[str], parts: Sequence[str], rank_ratio: float) -> None:
    for name, given, known in (("towers", towers, TOWERS), ("parts", parts, PARTS)):
        if isinstance(given, str) or not given or set(given) - set(known):
            raise ValueError(f"{name}={given!r}: give one or more of {', '.join(known)}")
    if not 0 < rank_ratio <= 1:
        raise ValueError(f"rank_ratio={rank_ratio}: it goes from above 0 to 1")


def chosen_blocks(count: int, layers: Layers) -> list[int]:
    """Numbers of the blocks, ascending, that `layers` means in a tower of `count`. IndexError for one that does not exist."""
    if layers == "all":
        return list(range(count))
    if isinstance(layers, str):
        layers = (layers,)
    bounds = [round(third * count / 3) for third in range(4)]
    found: set[int] = set()
    for layer in layers:
        if isinstance(layer, str):
            if layer not in GROUPS:
                raise ValueError(f"layers has {layer!r}: give numbers, {', '.join(GROUPS)}, or 'all'")
            found |= set(range(*bounds[GROUPS.index(layer) :][:2]))
        elif -count <= layer < count:
            found.add(layer % count)
        else:
            raise IndexError(f"layer {layer} does not exist: this tower has {count} blocks")
    return sorted(found)


def _blocks(tower: Tower, layers: Layers, name: str) -> list[int]:
    try:
        found = chosen_blocks(len(tower.blocks), layers)
    except IndexError as error:
        raise IndexError(f"{name} tower: {error}; adapt the other alone with towers=") from None
    if not found:
        raise ValueError(f"layers={layers!r} leaves nothing of the {len(tower.blocks)} blocks of the {name} tower")
    return found


def _linear_layers(block: nn.Module, chosen: Sequence[str]) -> list[nn.Linear]:
    found = [getattr(parts_of(block), part) for part in chosen]
    for part, layer in zip(chosen, found, strict=True):
        if type(layer) is not nn.Linear:
            raise TypeError(
                f"{part} of a {type(block).__name__} is a {type(layer).__name__}, not nn.Linear: merge it first"
            )
    return found


def _rank(layer: nn.Linear, ratio: float) -> int:
    full = min(layer.in_features, layer.out_features)
    rank = full if ratio == 1 else math.floor(ratio * full) // 4 * 4  # multiples of four, as in the released code
    if rank < 1:
        raise ValueError(f"rank_ratio={ratio} leaves nothing of a layer of rank {full}")
    return rank


def _digest(weight: Tensor) -> Tensor:
    data = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    return torch.tensor(list(hashlib.blake2b(data, digest_size=8).digest()), dtype=torch.uint8)  # type: ignore[arg-type]


# What was adapted


class HeadChange(NamedTuple):
    """How much one attention head changed. v, out: l2 norm of the change of the singular values; total: their sum.

    texts: where asked for, what the head now writes more or less of, the strongest first.
    """

    layer: int
    head: int
    v: float
    out: float
    total: float
    texts: tuple[str, ...] = ()


def rank_changes(
    before: HFEncoder,
    after: HFEncoder,
    tower: Literal["image", "text"] = "image",
    view: Literal["heads", "chunks"] = "heads",
    *,
    texts: Sequence[str] = (),
    top: int = 3,
) -> list[HeadChange]:
    """The heads of a tower by how much adaptation changed their values and outputs, the most changed first (section 5).

    view: "heads" compares the singular values of each head's own rows of W_v and columns of W_o. "chunks" is the released
    script's: the singular values of the whole matrix, in the order of the pretrained ones, cut into as many runs as there
    are heads; it says which part of the spectrum changed, but no head owns such a run.
    texts: a dictionary; the `top` of them along whose embeddings (less their mean) the change of the head's W_o W_v writes
    most. For towers that norm and project their last hidden state (CLIP, DINOv2).
    """
    if view not in ("heads", "chunks"):
        raise ValueError(f"view must be 'heads' or 'chunks', not {view!r}")
    old, new = (getattr(encoder.anatomy, tower) for encoder in (before, after))
    read = _reader(before, old, texts) if texts else None
    found = []
    for layer, (first, second) in enumerate(zip(old.blocks, new.blocks, strict=True)):
        a, b = parts_of(first), parts_of(second)
        v, out = ((x.weight.detach().double(), y.weight.detach().double()) for x, y in ((a.v, b.v), (a.out, b.out)))
        size = v[0].shape[0] // a.heads
        for head in range(a.heads):
            rows = slice(head * size, (head + 1) * size)
            if view == "heads":
                changes = [_values_change(*(w[rows] for w in v)), _values_change(*(w[:, rows] for w in out))]
            else:
                changes = [float(_gain_change(*pair)[rows].norm()) for pair in (v, out)]
            said: tuple[str, ...] = ()
            if read is not None:
                written = out[1][:, rows] @ v[1][rows] - out[0][:, rows] @ v[0][rows]
                strongest = (read @ written).norm(dim=-1).argsort(descending=True)[:top]
                said = tuple(texts[i] for i in strongest.tolist())
            found.append(HeadChange(layer, head, *changes, sum(changes), said))  # type: ignore[call-arg, arg-type]
    return sorted(found, key=lambda change: -change.total)


def _values_change(before: Tensor, after: Tensor) -> float:
    return float((torch.linalg.svdvals(after) - torch.linalg.svdvals(before)).norm())


def _gain_change(before: Tensor, after: Tensor) -> Tensor:
    """(r,): u_k' (W_after - W_before) v_k, the change of the singular values in the basis of the pretrained weight."""
    left, _, right = torch.linalg.svd(before, full_matrices=False)
    return torch.einsum("ok,oi,ki->k", left, after - before, right)


def _reader(encoder: HFEncoder, tower: Tower, texts: Sequence[str]) -> Tensor:
    """(T, W): how far each text's own direction, its embedding less the mean, sees a change of the last hidden state."""
    project, norm = tower.projection, tower.norm
    if project is None or norm is None or getattr(project, "in_features", None) != tower.width:
        raise ValueError(f"this tower of {encoder.name} does not norm and project its hidden states: leave texts out")
    rows = encoder.encode_texts(list(texts)).double()
    directions = normalize(rows - rows.mean(0), dim=-1)
    return directions @ project.weight.detach().double().cpu() * cast(Tensor, norm.weight).detach().double().cpu()  # type: ignore[no-any-return]
