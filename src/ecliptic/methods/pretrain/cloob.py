"""CLOOB: InfoLOOB on Hopfield-retrieved embeddings, where CLIP has InfoNCE on raw ones.

InfoNCE saturates: once a pair matches, its positive fills the denominator too and the gradient fades, so the few features that
matched it are all that is learnt. InfoLOOB leaves the positive out and never stops pulling. Retrieval first replaces each
embedding by an average of similar ones from the batch, which strengthens what occurs together and enriches the covariance.
Both act in the loss only: the towers stay plain, and so does inference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ecliptic.core.contracts import Objective, Record, Views
from ecliptic.core.method import Paper, method
from ecliptic.core.objectives import same_caption
from ecliptic.ops.contrastive import leave_one_out
from ecliptic.ops.hopfield import retrieve
from ecliptic.ops.tiled_contrastive import no_autocast

if TYPE_CHECKING:
    from ecliptic.core.encoder import Encoder

LOG_INVERSE_TAU = (0.0, math.log(100))  # bounds of a learnt one, CLIP's own (arXiv 2103.00020, section 2.5)


@method(
    Paper("CLOOB: Modern Hopfield Networks with InfoLOOB Outperform CLIP", arxiv="2110.11316", year=2021),
    purpose="pretrain so that many features stay in use, not only those that first tell a batch's pairs apart",
    claim="after equal further training more directions of the image embedding are in use than with InfoNCE, and than with "
    "retrieval or InfoLOOB alone",
)
@dataclass(frozen=True)
class Cloob(Objective):
    """Loss in cosine units (nats times tau); with InfoLOOB unbounded below: negative is normal. Needs batches of 2 or more.

    objective="infonce", hopfield=False is CLIP's loss times 2 tau; the two other mixtures are the paper's ablation. The
    temperature of the loss is its own, so a fixed one leaves the encoder's `logit_scale` as it was. At the start of training
    all embeddings are alike, retrieval averages nearly all of the batch, and gradients are small: start from an encoder that
    some InfoNCE has trained, or warm up for long. The memory is the batch: a larger one wants a larger beta.
    """

    beta: float = (
        8.0  # inverse temperature of retrieval; official README, command for CC3M (14.3 is its argument default)
    )
    inverse_tau: float = 30.0  # same command
    learn_inverse_tau: bool = False  # the paper keeps it fixed, since InfoLOOB rewards moving it for its own sake
    objective: Literal["infoloob", "infonce"] = "infoloob"
    hopfield: bool = True
    skip_duplicates: bool = True  # ours: as a negative, an equal caption's pull has nothing to balance it in InfoLOOB

    needs: ClassVar[frozenset[str]] = frozenset({"image", "text"})

    def __post_init__(self) -> None:
        if self.objective not in ("infoloob", "infonce"):
            raise ValueError(f"objective={self.objective!r}: choose infoloob or infonce")
        if not self.beta >= 0:
            raise ValueError(f"beta={self.beta}: must not be negative")
        if not 1 <= self.inverse_tau <= 100:
            raise ValueError(f"inverse_tau={self.inverse_tau}: must lie between 1 and 100")

    def bind(self, encoder: Encoder) -> Objective:
        """Itself, or with a learnt temperature a module that holds it."""
        return _Learning(self) if self.learn_inverse_tau else self

    def terms(self, views: Views) -> dict[str, Tensor]:
        return self.losses(views, torch.as_tensor(self.inverse_tau))

    def losses(self, views: Views, inverse_tau: Tensor) -> dict[str, Tensor]:
        same = same_caption(views) if self.skip_duplicates else None
        x, y = views["image"].pooled, views["text"].pooled
        return cloob_loss(x, y, self.beta if self.hopfield else None, inverse_tau, self.objective, same)

    @classmethod
    def tiny(cls) -> tuple[Cloob, list[Record]]:
        from ecliptic.data.shots import tiny_records

        return cls(), tiny_records()


def cloob_loss(
    x: Tensor,
    y: Tensor,
    beta: float | None,
    inverse_tau: Tensor,
    objective: str = "infoloob",
    same: Tensor | None = None,
) -> dict[str, Tensor]:
    """x pictures, y texts, (N, d) unit rows -> the two scalars whose sum is the paper's L_CLOOB.

    beta: of the retrieval, None for none. same: (N, N) bool, pairs that are no negatives of each other. The factor tau, from the
    official code, makes the gradient's size independent of it. At least float32, whatever autocast says.
    """
    kind = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    with no_autocast(x):
        x, y, inverse_tau = x.to(kind), y.to(kind), inverse_tau.to(x.device, kind)
        if beta is None:
            image, text = (x, y), (y, x)
        else:  # pictures and texts both out of the pictures' memory, then both out of the texts': anchors come first
            image = retrieve(x, x, beta), retrieve(y, x, beta)
            text = retrieve(y, y, beta), retrieve(x, y, beta)
        return {
            "image_to_text": anchored(*image, inverse_tau, objective, same) / inverse_tau,
            "text_to_image": anchored(*text, inverse_tau, objective, same) / inverse_tau,
        }


def anchored(a: Tensor, b: Tensor, inverse_tau: Tensor, objective: str, same: Tensor | None = None) -> Tensor:
    """InfoLOOB or InfoNCE of anchors a against b, (N, d) unit rows each: a scalar in nats."""
    rows = leave_one_out(inverse_tau * a @ b.T, same)
    return (rows if objective == "infoloob" else softplus(rows)).sum() / len(a)


class _Learning(nn.Module, Objective):
    """Cloob whose inverse temperature is trained, and kept between 1 and 100."""

    def __init__(self, settings: Cloob):
        super().__init__()
        self.settings = settings
        self.log_inverse_tau = nn.Parameter(torch.tensor(math.log(settings.inverse_tau)))

    def terms(self, views: Views) -> dict[str, Tensor]:
        with torch.no_grad():  # here and not after each update, so that it holds for whoever updates it
            self.log_inverse_tau.clamp_(*LOG_INVERSE_TAU)
        return self.settings.losses(views, self.log_inverse_tau.exp())

    def extra_repr(self) -> str:
        return repr(self.settings)
