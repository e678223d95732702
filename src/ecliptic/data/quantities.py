"""One number a picture: how many, how large, how good. What everything that orders pictures learns from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ecliptic.core.contracts import Pairs, Record
from ecliptic.data.records import Records


def value_of(record: Record, instruction: str = "value") -> float:
    """`quantities[instruction]` of a record, or else its `value`; text such as "3.5" is read. ValueError names the record."""
    quantities = record.get("quantities")
    given: Any = record.get("value")
    if isinstance(quantities, Mapping) and instruction in quantities:
        given = quantities[instruction]
    name = record.get("id", "?")
    if given is None or given == "":
        raise ValueError(f"record {name!r} has no value: it needs a number in `value`")
    try:
        value = float(given)
    except (TypeError, ValueError):
        raise ValueError(f"record {name!r}: the value {given!r} is no number") from None
    if not math.isfinite(value):
        raise ValueError(f"record {name!r}: the value is {value}")
    return value


def values_of(pairs: Pairs, instruction: str = "value") -> NDArray[np.float64]:
    """`value_of` every record, (N,); opens no picture. ValueError for fewer than two different values."""
    walk = pairs.undecoded() if isinstance(pairs, Records) else pairs
    values = np.array([value_of({"id": i, **record}, instruction) for i, record in enumerate(walk)])
    if len(np.unique(values)) < 2:
        raise ValueError("there are no two different values: there is no order to learn")
    return values
