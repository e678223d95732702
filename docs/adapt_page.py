"""The page on `ecliptic adapt`, out of `benchmarks/results/adapt.json`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any


def adapt(result: Mapping[str, Any]) -> str:
    """What the verb does, and what it did on fresh folders."""
    settings, rows = result["settings"], result["rows"]
    lines = [
        "# Your own classes: `ecliptic adapt`",
        "",
        f"*Written by `python docs/build.py` from `benchmarks/results/adapt.json`; `{result['command']}` measures it.*",
        "",
        "```console",
        "$ ecliptic adapt parts/ --out parts-model                  # a folder per class, or a CSV of image and label",
        "$ ecliptic classify new/ --model parts-model",
        "$ ecliptic adapt parts/ --minutes 30                       # slower methods get their chance, too",
        "$ ecliptic adapt parts/ --method gda --method coop         # choose among these",
        "$ ecliptic adapt parts/ --method gda --shots 8 --set views=0    # no choice: one method, judged on the rest",
        '$ ecliptic adapt loose/ --labels "cat, dog"                # no picture has a label',
        "$ ecliptic adapt parts/ --task ood --out guard             # also refuse what is none of the classes",
        '$ ecliptic adapt ages.csv --task rank --instruction "age"  # order by a quantity',
        "```",
        "",
        *fill(
            "Every method that suits the labels present is fitted on your pictures, cheapest first, until the time is over; what "
            "does not fit into it is named, with the time it would take. A CSV may leave labels empty: those pictures then help "
            "the methods that can use them. Features and finished fits are kept in the cache, so an interrupted command, or one "
            "with more minutes, goes on where the last one stopped."
        ),
        "",
        "## Why the figure can be believed",
        "",
        *fill(
            "The best of many cross-validated accuracies is too good: it was chosen for being high. So the choice itself is "
            "repeated without each part of the pictures, and whatever was chosen there names that part (nested "
            "cross-validation). The headline, its interval, the confusions and the calibration plot are of those answers. On "
            f"{len(rows)} fresh folders of {len(settings['classes'])} classes x {settings['each']} drawings, with "
            f"`{settings['model']}` and {settings['minutes']:g} minutes, this is what was promised, and what the saved "
            "predictor then did on the other pictures of these classes, which it had never met. (It has learnt from all eight "
            "pictures of a class by then, and was judged with six: a little more than promised is to be expected.)"
        ),
        "",
        "| folder | winner | promised | on the others | words alone, promised | on the others | gain | took |",
        "|---|---|---|---|---|---|---|---|",
        *(line(row) for row in rows),
        "",
        *fill(f"Machine: {result['machine']['cores']} cores, no GPU."),
        "",
        "## What was tried",
        "",
        "| method | " + " | ".join(f"seconds a fit, folder {row['draw'] + 1}" for row in rows) + " |",
        "|---|" + "---|" * len(rows),
        *tried(rows),
        "",
        *fill(
            "Without any label nothing can be measured: the method that agrees best with the others is kept, said to be only "
            "that, and the pictures they disagree on most are shown: label those first. [few_shot.md](few_shot.md) compares all "
            "methods on more pictures, numbers of shots, new classes and unknown ones."
        ),
        "",
    ]
    return "\n".join(lines)


def line(row: Mapping[str, Any]) -> str:
    promised, others = row["promised"], row["others"]
    gain = promised["gain"]
    cells = [
        str(row["draw"] + 1),
        f"`{row['method']}`",
        share(promised["accuracy"]),
        f"{share(others['accuracy'])} of {others['pictures']}",
        share(promised["words_alone"]),
        share(others["words_alone"]),
        f"{100 * gain['value']:+.1f} [{100 * gain['low']:.1f}, {100 * gain['high']:.1f}]",
        f"{row['seconds'] / 60:.1f} min",
    ]
    return f"| {' | '.join(cells)} |"


def share(number: Mapping[str, Any]) -> str:
    return f"{100 * number['value']:.1f} % [{100 * number['low']:.1f}, {100 * number['high']:.1f}]"


def tried(rows: list[Mapping[str, Any]]) -> list[str]:
    found: dict[str, list[str]] = {}
    for row in rows:
        for entry in row["tried"]:
            told = entry["left_out"] or f"{entry['seconds']:.2f}"
            found.setdefault(entry["method"], []).append(told)
    return [f"| `{name}` | {' | '.join(told)} |" for name, told in found.items()]


def fill(text: str) -> list[str]:
    return textwrap.wrap(text, 124, break_long_words=False, break_on_hyphens=False)
