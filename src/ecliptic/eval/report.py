"""A report: numbers with their intervals, tables, charts and pictures, as text, as JSON and as one HTML page.

The nouns here only hold what was found; `ecliptic.eval.page` turns them into HTML. Nothing in this file needs torch.

    report = Report("Stamps", {"text_to_image.recall@1": Number(0.28, 0.24, 0.32, n=538, unit="fraction")})
    print(report); report.save("stamps.json"); report.html("stamps.html")
"""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import RenderableType

FRACTION = "fraction"
PRINTED = 40  # rows of a table in plain text; JSON and HTML hold all


@dataclass(frozen=True)
class Number:
    """A measured value and its interval.

    low, high: ends of the interval (95 % unless the report says otherwise); None where none was computed.
    n: how many pictures, captions or pairs the value rests on. unit: written after the value; `"fraction"` means that
    the value lies in [0, 1] and is shown as a percentage (JSON keeps the fraction).
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError(f"an interval needs both ends: low={self.low}, high={self.high}")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"the interval is upside down: low={self.low} > high={self.high}")

    @property
    def text(self) -> str:
        """The value alone: `28.1 %`, `0.281`, `12 ms`, `538`."""
        return _with_unit(_digits(self.value, self.unit), self.unit)

    @property
    def interval(self) -> str:
        """`24.0 to 32.0 %`, or nothing."""
        if self.low is None or self.high is None:
            return ""
        return _with_unit(f"{_digits(self.low, self.unit)} to {_digits(self.high, self.unit)}", self.unit)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return self.text
        return f"{self.text} [{_digits(self.low, self.unit)}, {_digits(self.high, self.unit)}]"

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "value": _finite(self.value),
            "low": _finite(self.low),
            "high": _finite(self.high),
            "n": None if self.n is None else int(self.n),
        }
        if self.unit:
            out["unit"] = self.unit
        return out


Cell: TypeAlias = "str | int | float | Number | None"


@dataclass(frozen=True)
class Table:
    """Rows under column names. Cells are text, numbers, `Number` (shown with its interval) or None (a dash)."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r}: row {i} has {len(row)} cells, there are {len(self.columns)} columns"
                )


@dataclass(frozen=True)
class Picture:
    """A picture with what there is to say about it.

    image: PIL image or path; one that cannot be opened becomes a grey placeholder. score: shown as it is.
    good: True draws a green tick, False a red cross, None nothing. note: a second, quieter line.
    """

    image: Image.Image | str | Path
    caption: str = ""
    score: float | Number | str | None = None
    good: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Gallery:
    """Pictures in a grid. `small` packs them tighter, for one query and its results in a row."""

    pictures: Sequence[Picture]
    title: str = ""
    small: bool = False


@dataclass(frozen=True)
class BarChart:
    """One bar per name with its interval as a whisker. `most` is the value at full width (default: 1 for fractions,
    the largest end otherwise). Values below zero are drawn as empty bars: use a table for those."""

    bars: Mapping[str, Number]
    title: str = ""
    most: float | None = None
    highlight: str | None = None


@dataclass(frozen=True)
class Heatmap:
    """A picture and one or more overlays of the same picture, by prompt (see `ecliptic.eval.overlay`)."""

    image: Image.Image | str | Path
    overlays: Mapping[str, Image.Image | str | Path]
    caption: str = ""


@dataclass(frozen=True)
class Heatmaps:
    """Heat maps, one row per picture, with a legend that runs from `low` to `high` (words)."""

    maps: Sequence[Heatmap]
    title: str = ""
    low: str = "less"
    high: str = "more"


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix, (K, K) counts: row is the truth, column is the answer."""

    matrix: Sequence[Sequence[int]]
    classes: Sequence[str]
    title: str = ""

    def __post_init__(self) -> None:
        size = len(self.classes)
        if len(self.matrix) != size or any(len(row) != size for row in self.matrix):
            raise ValueError(f"confusion {self.title!r}: the matrix must be {size} x {size}, one row per class")


@dataclass(frozen=True)
class Reliability:
    """How often answers were right, by how sure they were said to be; on the diagonal where the two agree.

    bins: per bin with anything in it (mean confidence, share that was right with its interval, whose `n` counts pictures).
    """

    bins: Sequence[tuple[float, Number]]
    title: str = ""


@dataclass(frozen=True)
class Commands:
    """Shell commands, as the reader can repeat them. Lines that begin with `#` are remarks."""

    lines: Sequence[str]
    title: str = ""


@dataclass(frozen=True)
class Numbers:
    """Named numbers as tiles; a dot in a name separates its group from its own name."""

    numbers: Mapping[str, Number]
    title: str = ""


Content: TypeAlias = "str | Gallery | Table | BarChart | Heatmaps | Confusion | Reliability | Commands | Numbers"


@dataclass
class Section:
    """A heading, a few plain sentences (blank line: new paragraph, `backticks`: code), then content in order."""

    title: str
    text: str = ""
    content: list[Content] = field(default_factory=list)

    def __init__(self, title: str, text: str = "", *content: Content) -> None:
        self.title, self.text, self.content = title, text, list(content)

    def add(self, *content: Content) -> Section:
        self.content += content
        return self


@dataclass
class Report:
    """What an evaluation found.

    numbers: the headline, by flat key such as `text_to_image.recall@1`. details: further numbers (per class, per
    category) that are stored in the JSON and not printed. figures: any content, shown before the tables.
    pictures: shown as one gallery. sections: longer stories, shown after the rest.
    """

    title: str
    numbers: dict[str, Number] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    figures: list[Content] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    details: dict[str, Number] = field(default_factory=dict)
    subtitle: str = ""

    def __getitem__(self, key: str) -> Number:
        for numbers in (self.numbers, self.details):
            if key in numbers:
                return numbers[key]
        raise KeyError(f"no number {key!r} in {self.title!r}; there are {', '.join(self.numbers) or 'none'}")

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Flat and JSON-ready: key -> {value, low, high, n[, unit]}; what is not finite becomes None."""
        return {key: number.to_json() for key, number in {**self.numbers, **self.details}.items()}

    def save(self, path: str | Path) -> Path:
        """Write `to_json()`; the file appears whole or not at all."""
        return write_whole(path, json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def html(self, path: str | Path) -> Path:
        """Write one self-contained page: no script, no link to anything outside."""
        return write_whole(path, self.to_html())

    def to_html(self) -> str:
        from ecliptic.eval.page import page

        return page(self)

    def section(self, title: str | None = None, text: str = "") -> Section:
        """This report as one section of a larger one: all it shows, except its commands and nested sections' titles."""
        section = Section(self.title if title is None else title, text or self.subtitle)
        section.add(*self.body())
        for nested in self.sections:
            section.add(*([nested.text] if nested.text else []), *nested.content)
        return section

    def body(self) -> list[Content]:
        """Numbers, notes, figures, tables and pictures, in the order in which they are shown."""
        content: list[Content] = [Numbers(self.numbers)] if self.numbers else []
        content += self.notes
        content += self.figures
        content += self.tables
        if self.pictures:
            content.append(Gallery(self.pictures))
        return content

    def __str__(self) -> str:
        """Plain text: numbers, then tables, aligned; for logs and pipes."""
        parts = [clean(self.title)]
        if self.numbers:
            parts.append(_align(*_number_rows(self.numbers)))
        for table in self.tables:
            body = _align(table.columns, _printed(table), numeric_columns(table))
            parts.append((clean(table.title) + "\n" if table.title else "") + body + _more(table))
        parts += [clean(note) for note in self.notes]
        return "\n\n".join(part for part in parts if part)

    def __rich__(self) -> RenderableType:
        """The same for `rich.print`; captions are text, never markup."""
        from rich import box
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        def grid(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[bool]) -> RichTable:
            heading = Text(clean(title), style="bold") if title else None
            table = RichTable(title=heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
            for name, numeric in zip(columns, right, strict=True):
                table.add_column(Text(clean(name)), justify="right" if numeric else "left")
            for row in rows:
                table.add_row(*(Text(clean(cell)) for cell in row))
            return table

        parts: list[RenderableType] = []
        if self.numbers:
            parts.append(grid(self.title, *_number_rows(self.numbers)))
        else:
            parts.append(Text(clean(self.title), style="bold"))
        for t in self.tables:
            parts.append(grid(t.title, t.columns, _printed(t), numeric_columns(t)))
            if more := _more(t).strip():
                parts.append(Text(more, style="dim"))
        parts += [Text(clean(note), style="dim") for note in self.notes]
        return Group(*parts)


def join(title: str, reports: Iterable[Report], subtitle: str = "") -> Report:
    """Several reports as one: all numbers side by side (a key may occur once), everything else appended in order."""
    out = Report(title, subtitle=subtitle)
    for report in reports:
        twice = sorted({*out.numbers, *out.details} & {*report.numbers, *report.details})
        for key in twice:
            if out[key] != report[key]:
                raise ValueError(f"two reports hold a different {key!r}: rename one before joining {report.title!r}")
        out.numbers.update(report.numbers)
        out.details.update(report.details)
        out.tables += report.tables
        out.pictures += report.pictures
        out.figures += report.figures
        out.notes += [note for note in report.notes if note not in out.notes]
        out.commands += report.commands
        out.sections += report.sections
    return out


def write_whole(path: str | Path, text: str) -> Path:
    """Write beside the target, then rename: an interrupted run never leaves half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def clean(text: str) -> str:
    """Text from a data set, safe for a terminal: control and direction-changing characters become spaces."""
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cs") or c in _DIRECTION else c for c in text)


_DIRECTION = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029")


def format_score(score: float | Number | str | None) -> str:
    if score is None:
        return ""
    return score if isinstance(score, str) else str(score.text if isinstance(score, Number) else _digits(score, ""))


def _digits(value: float, unit: str) -> str:
    """Three digits that matter: fractions as 28.1, counts whole, others to three significant digits below 100."""
    if value is None or math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if unit == FRACTION:
        return f"{100 * value:.1f}"
    if float(value).is_integer() and (isinstance(value, int) or abs(value) >= 2):
        return f"{int(value):,}".replace(",", "\u2009")
    size = abs(value)
    if size >= 100:
        return f"{value:.1f}"
    if size >= 10:
        return f"{value:.2f}"
    return f"{value:.3f}" if size >= 0.001 or size == 0 else f"{value:.1e}"


def _with_unit(text: str, unit: str) -> str:
    unit = "%" if unit == FRACTION else unit
    return f"{text} {unit}" if unit and text != "n/a" else text


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _cell(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    return str(cell) if isinstance(cell, Number) else _digits(cell, "")


def _printed(table: Table) -> list[list[str]]:
    return [[_cell(c) for c in row] for row in table.rows[:PRINTED]]


def _more(table: Table) -> str:
    left = len(table.rows) - PRINTED
    return f"\n... and {left} more rows" if left > 0 else ""


def numeric_columns(table: Table) -> list[bool]:
    """Which columns hold numbers only: those stand to the right."""
    return [
        any(row[i] is not None for row in table.rows) and all(not isinstance(row[i], str) for row in table.rows)
        for i in range(len(table.columns))
    ]


def _number_rows(numbers: Mapping[str, Number]) -> tuple[list[str], list[list[str]], list[bool]]:
    rows = [
        [key, number.text, number.interval, "" if number.n is None else f"{number.n}"]
        for key, number in numbers.items()
    ]
    columns = ["", "value", "95 % interval", "n"]
    keep = [i for i in range(4) if i < 2 or any(row[i] for row in rows)]
    right = [False, True, True, True]
    return [columns[i] for i in keep], [[row[i] for i in keep] for row in rows], [right[i] for i in keep]


def _align(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    lines = [[clean(cell) for cell in line] for line in (columns, *rows)]
    widths = [max(_width(line[i]) for line in lines) for i in range(len(columns))]
    out = []
    for line in lines:
        cells = []
        for cell, width, numeric in zip(line, widths, right, strict=True):
            gap = " " * (width - _width(cell))
            cells.append(gap + cell if numeric else cell + gap)
        out.append("  ".join(cells).rstrip())
    return "\n".join(out)


def _width(text: str) -> int:
    """Columns in a terminal: East Asian wide characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in ("W", "F") else 1 for c in text
    )
