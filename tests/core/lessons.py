"""Captioned pictures small enough to train on in milliseconds, for the tests of training."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image
from torch import Tensor, nn

from ecliptic.core.contracts import Record

COLOURS = {"red": (230, 20, 20), "green": (20, 200, 20), "blue": (30, 30, 230), "white": (250, 250, 250)}
PLACES = {"left": (2, 8, 14, 24), "right": (18, 8, 30, 24), "top": (8, 2, 24, 14), "bottom": (8, 18, 24, 30)}


def pictures(copies: int = 1) -> list[Record]:
    """Sixteen kinds of picture (a coloured box in a place), each `copies` times, in slightly different greys."""
    records: list[Record] = []
    for copy in range(copies):
        for colour, rgb in COLOURS.items():
            for place, box in PLACES.items():
                image = Image.new("RGB", (32, 32), (80 + 5 * copy,) * 3)
                image.paste(rgb, box)
                name = f"{colour}-{place}-{copy}"
                caption = f"a {colour} box at the {place}"
                records.append({"id": name, "image": image, "caption": caption, "label": colour})
    return records


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(before: Mapping[str, Tensor], after: nn.Module) -> set[str]:
    return {name for name, value in after.state_dict().items() if not value.equal(before[name])}


def assert_same(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].equal(right[name]), name
