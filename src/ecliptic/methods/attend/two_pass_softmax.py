"""Two-pass softmax: attention probabilities without the sweep that finds the maximum.

A softmax that is safe from overflow reads its input three times: for the maximum, for the sum, for the quotients. Where rows
are longer than the cache, time goes by what is moved. Exponentials kept as m * 2^n cannot overflow, and the first sweep goes.

The operator is `ecliptic.ops.softmax.two_pass_softmax`, with its kernel, its streaming form and the two three-pass forms that it
is measured against. The step here puts it into the towers of an encoder, whose answers stay the same to float32's rounding; at
the lengths that CLIP reads (50 to 600 tokens) rows lie in the cache, and nothing is to be gained but the wider range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from ecliptic.core.anatomy import TOWERS
from ecliptic.core.attention import Probabilities, register, use
from ecliptic.core.contracts import ModelStep, Pairs, Record
from ecliptic.core.encoder import Encoder, HFEncoder
from ecliptic.core.method import Paper, method
from ecliptic.data.shots import tiny_records
from ecliptic.ops.softmax import three_pass_recompute, three_pass_reload, two_pass_softmax

FORMS = {"two_pass": two_pass_softmax, "recompute": three_pass_recompute, "reload": three_pass_reload}


@method(
    Paper("The Two-Pass Softmax Algorithm", arxiv="2001.04438", year=2020),
    purpose="softmax at the memory's speed over long rows, safe from overflow at any scale of the logits",
    claim="out of the cache two passes are faster than the faster of three-pass forms, in the cache they are not; as exact, and "
    "without NaN at any scale",
)
@dataclass(frozen=True)
class TwoPassSoftmax(ModelStep):
    """Attention of the chosen towers through `ecliptic.ops.softmax`. Any form gives the same answers: every one is neutral."""

    form: Literal["two_pass", "recompute", "reload"] = "two_pass"
    towers: tuple[str, ...] = TOWERS

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r}: choose {', '.join(FORMS)}")
        if isinstance(self.towers, str) or not self.towers or set(self.towers) - set(TOWERS):
            raise ValueError(f"towers={self.towers!r}: choose from {', '.join(TOWERS)}, as a tuple")

    @classmethod
    def tiny(cls) -> tuple[Self, list[Record]]:
        return cls(), tiny_records()

    @classmethod
    def neutral(cls) -> Self:
        return cls()

    def apply(self, encoder: Encoder, pairs: Pairs | None = None) -> HFEncoder:
        assert isinstance(encoder, HFEncoder)
        changed = self.reshape(encoder.clone())
        changed.record_step("two_pass_softmax", {"form": self.form, "towers": list(self.towers)}, reshapes=True)
        return changed

    def reshape(self, encoder: Encoder) -> HFEncoder:
        assert isinstance(encoder, HFEncoder)
        name = register(f"softmax-{self.form}", _probabilities(self.form))
        for tower in self.towers:
            use(getattr(encoder.anatomy, tower).module, name)
        return encoder


def _probabilities(form: str) -> Probabilities:
    softmax = FORMS[form]
    return lambda module, scores: softmax(scores)  # hidden keys are so low that their pairs add nothing
