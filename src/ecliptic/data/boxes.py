"""Boxes that somebody else has drawn: read from JSON or CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Box = tuple[float, float, float, float]
_CORNERS = ("x0", "y0", "x1", "y1")
_PICTURE = ("path", "image", "picture", "file")


class BoxesError(ValueError):
    """A file of boxes cannot be read; the message names the file, the place and the form that is expected."""


def read_boxes(path: Path) -> dict[str | None, list[Box]]:
    """Boxes x0, y0, x1, y1 in pixels, by the picture they are for; None stands for every picture.

    .json: a list of boxes; an object of lists by picture; or what `ecliptic find --json` prints. A box is a list of four
    numbers or an object with x0, y0, x1, y1 or with `box`. .csv: columns x0, y0, x1, y1, and `path` if they are for several
    pictures; a file without a header has just those four numbers a line. Raises BoxesError, also where there is no box.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise BoxesError(f"{path} is not text: give boxes as .json or .csv") from None
    if path.suffix.lower() == ".json":
        found = _from_json(path, text)
    elif path.suffix.lower() in (".csv", ".tsv"):
        found = _from_csv(path, text)
    else:
        raise BoxesError(f"{path}: boxes come as .json or .csv, not as {path.suffix or 'a file without an ending'}")
    if not any(found.values()):
        raise BoxesError(f"{path} holds no boxes")
    return found


def boxes_of(found: dict[str | None, list[Box]], picture: Path) -> list[Box]:
    """The boxes for a picture, by its path as given, else by its name alone, else those for every picture."""
    for key in (str(picture), picture.as_posix(), picture.name, None):
        if key in found:
            return found[key]
    return []


def _from_json(path: Path, text: str) -> dict[str | None, list[Box]]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BoxesError(f"{path} is not JSON: {error}") from None
    if isinstance(value, list):
        return {None: [_box(path, f"box {i}", item) for i, item in enumerate(value)]}
    if not isinstance(value, dict):
        raise BoxesError(f"{path} holds a {type(value).__name__}, not boxes: give a list like [[x0, y0, x1, y1], ...]")
    pictures = value.get("pictures")
    if isinstance(pictures, list):
        value = {str(entry.get("path")): entry.get("boxes") for entry in pictures if isinstance(entry, dict)}
    for name, boxes in value.items():
        if not isinstance(boxes, list):
            raise BoxesError(f"{path}: {name!r} is not a list of boxes")
    return {
        name: [_box(path, f"{name}, box {i}", item) for i, item in enumerate(boxes)] for name, boxes in value.items()
    }


def _from_csv(path: Path, text: str) -> dict[str | None, list[Box]]:
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return {}
    rows = list(csv.reader(lines, delimiter="\t" if "\t" in lines[0] else ";" if ";" in lines[0] else ","))
    header = [cell.strip().lower() for cell in rows[0]]
    if all(name in header for name in _CORNERS):
        place = [header.index(name) for name in _CORNERS]
        owner = next((header.index(name) for name in _PICTURE if name in header), None)
        first = 1
    elif len(header) == 4 and _number(header[0]) is not None:
        place, owner, first = list(range(4)), None, 0
    else:
        raise BoxesError(
            f"{path}: the first line must be x0,y0,x1,y1 (with path in front if need be), not {lines[0]!r}"
        )
    found: dict[str | None, list[Box]] = {}
    for number, row in enumerate(rows[first:], start=first + 1):
        if len(row) != len(header):
            raise BoxesError(f"{path}, line {number}: {len(row)} values, but the first line has {len(header)}")
        key = None if owner is None else row[owner].strip()
        found.setdefault(key, []).append(_box(path, f"line {number}", [row[i] for i in place]))
    return found


def _box(path: Path, where: str, item: Any) -> Box:
    if isinstance(item, dict):
        item = item["box"] if "box" in item else [item.get(name) for name in _CORNERS]
    values = [_number(value) for value in item] if isinstance(item, Sequence) and not isinstance(item, str) else []
    if len(values) != 4 or None in values:
        raise BoxesError(f"{path}, {where}: four numbers x0, y0, x1, y1 are a box, not {item!r}")
    return values[0], values[1], values[2], values[3]  # type: ignore[return-value]  # none is None


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
