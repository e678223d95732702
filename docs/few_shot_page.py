"""The page on few shots, out of `benchmarks/results/few_shot.json`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence, Set
from typing import Any

Row = Mapping[str, Any]
KINDS = {"method": "", "baseline": " (baseline)", "peer": " (peer)"}


def few_shot(result: Mapping[str, Any]) -> str:
    """All adaptation methods side by side."""
    settings, rows = result["settings"], [row for row in result["rows"] if row["cells"]]
    counts = settings["classes"]
    judged, abroad = (sum(each[key] for each in counts.values()) for key in ("judged on", "elsewhere"))
    shared = sorted(name for name, each in counts.items() if each["elsewhere"])
    lines = [
        "# Few labelled pictures: every method, side by side",
        "",
        "*Written by `python docs/build.py` from `benchmarks/results/few_shot.json`; "
        f"`{result['command']}` measures it.*",
        "",
        *fill(
            "What papers report on a dozen code bases, data loaders and checkpoints, here on one: the same model "
            f"(`{settings['model']}`), the same pictures, the same draws, no validation set beyond the shots. {len(rows)} "
            "rows; the methods are found, not listed, and so are their costs."
        ),
        "",
        *fill(
            f"**Pictures.** Open Clip Art, {len(counts)} classes: the folders of the second level that hold most pictures "
            f"and whose names are nouns in WordNet ({', '.join(counts)}). Folders are the work of many hands and overlap: "
            f"nobody will get all of them right. {judged} pictures are set aside and judge every cell; shots are drawn from "
            f"others, {len(settings['seeds'])} seeds, and fewer shots are a part of more. Prompts: "
            f"`{settings['template']}`. Methods that learn from ten augmented views of each picture get "
            f"{settings['views']}, for the time it takes."
        ),
        "",
        *fill(
            "**What flatters words here.** The head of this model was learnt from drawings of the same collection with "
            "their titles (not their folders), so that zero-shot answers on clip art are better than on pictures it has "
            f"never seen. The other domain is free of that: {abroad} stamps, photographs mostly, of {', '.join(shared)}, "
            "answered among these alone."
        ),
        "",
        *fill(
            "Intervals: 95 %, Student over the three seeds, which makes them wide; where fewer are measured their number "
            f"stands in brackets. {judged} pictures judge, so a single figure carries a standard error of about "
            f"{100 * (0.24 / judged) ** 0.5:.1f} points for the choice of pictures, which all rows share. Differences on "
            "the same draws, in the last section but one, are what to trust."
        ),
        "",
        *accuracy(rows, settings["shots"]),
        *base_to_new(rows),
        *elsewhere(rows),
        *unknown(rows),
        *cost(rows, settings),
        *against_papers(result["pairs"], {row["name"] for row in rows if row["sees"] == "names alone"}),
        *missing(result["rows"]),
        *fill(provenance(result)),
    ]
    return "\n".join(lines) + "\n"


def accuracy(rows: Sequence[Row], shots: Sequence[int]) -> list[str]:
    most = max(shots)
    ranked = sorted(rows, key=lambda row: -value(row, f"few_shot.accuracy[{most}]", -1.0))
    told = (
        f"Percent of pictures named right, in the order of {most} shots. The time for all was limited, cheap cells came "
        "first: rows with a single figure say little, and the last section lists what was not measured."
    )
    lines = ["## Accuracy by shots", "", *fill(told), ""]
    lines += header("method", "learns from", *(f"{k} of each" for k in shots))
    for row in ranked:
        cells = [share(row, f"few_shot.accuracy[{k}]") for k in shots]
        if any(cells):
            lines.append(table_row(title(row), row["sees"], *cells))
    return [*lines, ""]


def base_to_new(rows: Sequence[Row]) -> list[str]:
    keys = [f"base_to_new.{key}" for key in ("base", "new", "harmonic_mean")]
    ranked = sorted((row for row in rows if keys[0] in row["numbers"]), key=lambda row: -value(row, keys[2], -1.0))
    lines = [
        "## New classes",
        "",
        *fill(
            "Learnt from 16 shots of the first half of the classes; pictures of either half are answered among that half. "
            "What cannot be given new classes by name leaves them to zero-shot words, and the last column says so."
        ),
        "",
        *header("method", "base", "new", "harmonic mean", "new ones by"),
    ]
    lines += [table_row(title(row), *(share(row, key) for key in keys), row["new classes by"]) for row in ranked]
    return [*lines, ""]


def elsewhere(rows: Sequence[Row]) -> list[str]:
    shots = (1, 4, 16)
    keys = [f"few_shot.elsewhere[{k}]" for k in shots]
    ranked = sorted(
        (row for row in rows if any(key in row["numbers"] for key in keys)), key=lambda row: last(row, keys)
    )
    lines = [
        "## Another domain, and calibration",
        "",
        *fill(
            "Learnt on clip art, judged on stamps: accuracy in percent. Beside it, on clip art, how far confidence is from "
            "accuracy (expected calibration error of the softmax, 15 bins, percent; lower is better)."
        ),
        "",
        *header("method", *(f"{what}, {counted(k)}" for what in ("stamps", "calibration") for k in shots)),
    ]
    for row in ranked:
        errors = (share(row, f"few_shot.ece[{k}]") for k in shots)
        lines.append(table_row(title(row), *(share(row, key) for key in keys), *errors))
    return [*lines, ""]


def unknown(rows: Sequence[Row]) -> list[str]:
    """AUROC and FPR95 by the scores that all have, and by the best of the method's own."""
    shown = ("msp", "mcm")
    common = {"msp", "mcm", "max_logit", "energy"}
    lines = [
        "## Telling unknown classes apart",
        "",
        *fill(
            "Known: pictures of the base classes, of which there were 16 shots; unknown: those of the other half. How well "
            "a score orders the two, AUROC (higher is better) and the share of unknown ones let in where 95 % of the known "
            "are (lower). MSP: the largest softmax probability; MCM: the same of plain cosines; own: the method's score "
            "for just this. Methods whose scores are probabilities have MSP alone."
        ),
        "",
        *header("method", *(f"{name.upper()} AUROC | FPR95" for name in shown), "own AUROC | FPR95"),
    ]
    lines[-1] = "|" + "---|" * (1 + 2 * (len(shown) + 1))
    ranked = sorted(
        (row for row in rows if "ood.msp.auroc" in row["numbers"]), key=lambda row: -value(row, "ood.msp.auroc")
    )
    for row in ranked:
        own = {key.split(".")[1] for key in row["numbers"] if key.startswith("ood.")} - common
        best = max(own, key=lambda name: value(row, f"ood.{name}.auroc"), default="")
        cells = [share(row, f"ood.{name}.{key}") for name in shown for key in ("auroc", "fpr95")]
        cells += [
            share(row, f"ood.{best}.{key}") + (f" ({best})" if key == "auroc" and best else "")
            for key in ("auroc", "fpr95")
        ]
        lines.append(table_row(title(row), *cells))
    return [*lines, ""]


def cost(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[str]:
    a_picture = settings["seconds a picture"]
    told = "" if a_picture is None else f" Encoding a picture takes {1000 * a_picture:.0f} ms."
    lines = [
        "## What a fit costs",
        "",
        *fill(
            "CPU seconds on one core. Features of pictures are kept, as `ecliptic adapt` keeps them: what works on frozen "
            f"features encodes each picture and each of its views once.{told} With encoding: 4 shots of each class and "
            "nothing kept. Memory: most that was resident during the fit above what was there before; what an allocator "
            "reuses does not show. Trained: numbers that gradient descent changed."
        ),
        "",
        *header("method", "4 shots", "16 shots", "4 shots with encoding", "memory, 16 shots", "trained"),
    ]
    keys = ("few_shot.seconds[4]", "few_shot.seconds[16]", "few_shot.seconds_with_encoding")
    for row in sorted(rows, key=lambda row: value(row, keys[1], value(row, keys[0], 1e9))):
        if "few_shot.seconds[1]" not in row["numbers"]:
            continue
        seconds = [f"{value(row, key):.2g} s" if key in row["numbers"] else "" for key in keys]
        held = "few_shot.memory[16]" in row["numbers"]
        memory = f"{value(row, 'few_shot.memory[16]'):.0f} MiB" if held else ""
        trained = f"{value(row, 'few_shot.trained'):,.0f}" if "few_shot.trained" in row["numbers"] else ""
        lines.append(table_row(title(row), *seconds, memory, trained))
    return [*lines, ""]


def against_papers(pairs: Sequence[Mapping[str, Any]], blind: Set[str] = frozenset()) -> list[str]:
    """What papers say of two rows, and what came out here, those that contradict first."""
    if not pairs:
        return []
    groups: dict[str, list[str]] = {"against": [], "open": [], "as said": []}
    for pair in pairs:
        gaps = pair["by shots"]
        if {pair["better"], pair["than"]} <= blind:  # they see no pictures: all seeds are one
            gaps = {k: {**gap, "seeds": 1} for k, gap in gaps.items()}
        told = "; ".join(f"{difference(gap)} at {counted(int(k))}" for k, gap in gaps.items())
        source = f" ([paper]({pair['link']}))" if pair["link"] else ""
        where = {"accuracy": "", "elsewhere": ", in the other domain", "new": ", on new classes"}
        where |= {"harmonic_mean": ", harmonic mean of base and new classes"}
        groups[verdict(list(gaps.values()))].append(
            f"- `{pair['better']}` against `{pair['than']}`{where[pair['metric']]}: {pair['says']}{source}. Here {told}."
        )
    told_of = {
        "against": "**Here it is the other way round**: lower in the mean over these shots, and clearly so somewhere.",
        "open": "**Here it is not settled**: no difference that the seeds agree on, or higher at some shots and lower at others.",
        "as said": "**Here it is as the paper says**: higher in the mean, and clearly so somewhere.",
    }
    lines = [
        "## Where this contradicts papers, and where it agrees",
        "",
        *fill(
            "Differences in points between two rows on the same draws, mean over seeds with its 95 % interval. Clearly: "
            "the interval leaves out 0. A small model on clip art is not what these papers measured on: a contradiction "
            "says that the order does not carry over to here, not that the paper is wrong."
        ),
        "",
    ]
    for key, found in groups.items():
        if found:
            lines += [told_of[key], "", *(line for entry in found for line in hanging(entry)), ""]
    return lines


def verdict(gaps: Sequence[Mapping[str, Any]]) -> str:
    """By the mean over shots, and by whether any interval of three seeds leaves out 0."""
    mean = sum(gap["mean"] for gap in gaps) / len(gaps)
    clearly_up = any(gap["seeds"] > 2 and gap["low"] > 0 for gap in gaps)
    clearly_down = any(gap["seeds"] > 2 and gap["high"] < 0 for gap in gaps)
    if mean > 0 and clearly_up and not clearly_down:
        return "as said"
    return "against" if mean < 0 and clearly_down and not clearly_up else "open"


def missing(rows: Sequence[Row]) -> list[str]:
    told = []
    for row in rows:
        if not row["cells"]:
            told.append(f"- `{row['name']}`: nothing ({'; '.join(dict.fromkeys(row['missing'].values()))}).")
            continue
        reasons: dict[str, dict[str, list[str]]] = {}
        for cell, why in row["missing"].items():
            kind, shots, seed = cell.split()
            what = {"shots": counted(int(shots)), "base_to_new": "new classes", "cold": "cost with encoding"}[kind]
            reasons.setdefault(why, {}).setdefault(what, []).append(seed)
        for why, cells in reasons.items():
            listed = "; ".join(f"{what}, seed {' and '.join(seeds)}" for what, seeds in cells.items())
            told.append(f"- `{row['name']}`: {listed} ({why}).")
    if not told:
        return []
    lines = ["## Not measured", "", "Rows that lack cells rest on fewer seeds, or shots, than the others.", ""]
    return [*lines, *(line for entry in told for line in hanging(entry)), ""]


# Cells


def title(row: Row) -> str:
    name = f"[{row['name']}]({row['link']})" if row["link"] else row["name"]
    return name + KINDS[row["kind"]]


def value(row: Row, key: str, otherwise: float = 0.0) -> float:
    found = row["numbers"].get(key)
    return otherwise if found is None or found["value"] is None else float(found["value"])


def share(row: Row, key: str) -> str:
    """`61.2 (58.0 to 64.4)`, percent, or nothing where it was not measured; of fewer than three seeds, their number instead."""
    found = row["numbers"].get(key)
    if found is None:
        return ""
    text = f"{100 * found['value']:.1f}"
    if row["sees"] == "names alone":
        return text
    seeds = row["seeds"].get(cell_of(key), 1)
    if seeds < 3:
        return f"{text} [{seeds}]"
    return f"{text} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def cell_of(key: str) -> str:
    """The kind and the shots of the cells that a number comes from."""
    shots = key.partition("[")[2].rstrip("]")
    return f"shots {shots}" if shots else "base_to_new 16"


def counted(shots: int) -> str:
    return f"{shots} shot" + "s" * (shots != 1)


def last(row: Row, keys: Sequence[str]) -> float:
    """What to rank by: the last of these that was measured, the highest first."""
    return -next((value(row, key) for key in reversed(keys) if key in row["numbers"]), -1.0)


def difference(gap: Mapping[str, Any]) -> str:
    text = f"{100 * gap['mean']:+.1f}"
    if gap["seeds"] < 3:
        return f"{text} [{gap['seeds']}]"
    return f"{text} ({100 * gap['low']:+.1f} to {100 * gap['high']:+.1f})"


def header(*names: str) -> list[str]:
    return [table_row(*names), "|" + "---|" * len(names)]


def table_row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def fill(text: str) -> list[str]:
    return textwrap.wrap(text, 128, break_long_words=False, break_on_hyphens=False)


def hanging(text: str) -> list[str]:
    return textwrap.wrap(text, 128, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def provenance(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return (
        f"Commit {result['commit'][:7]}, {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, "
        f"{versions}. A fit may take {result['settings']['limit']:.0f} s."
    )
