"""How much a picture looks like one of the known classes, told from its class scores alone, without training.

Every function takes (..., K) and gives (...), and higher always means more like a known class (in-distribution). They order
pictures and set no threshold: where to cut is up to whoever has seen some unknown ones.
"""

from __future__ import annotations

from torch import Tensor


def msp(logits: Tensor) -> Tensor:
    """Largest softmax probability of the logits, in [1 / K, 1]. arXiv 1610.02136."""
    return logits.softmax(-1).amax(-1)


def max_logit(logits: Tensor) -> Tensor:
    """Largest logit, in units of the logits, unbounded. arXiv 1911.11132: unlike MSP it keeps how strong they are."""
    return logits.amax(-1)


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T * log sum_k exp(logit_k / T): the *negative* free energy, so that higher is known. arXiv 2010.03759.

    Between `max_logit` and that + T * log K; T -> 0 is `max_logit`.
    """
    _positive(temperature)
    return temperature * (logits / temperature).logsumexp(-1)


def mcm(cosines: Tensor, temperature: float = 1.0) -> Tensor:
    """Largest softmax probability of cosines / T (maximum concept matching), in [1 / K, 1]. arXiv 2211.13445; T = 1 there.

    T = 1 / scale is `msp` of the model's logits.
    """
    _positive(temperature)
    return (cosines / temperature).softmax(-1).amax(-1)


def _positive(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be positive")
