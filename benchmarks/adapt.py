"""`ecliptic adapt` on a fresh folder, as a user runs it: how long, which method, and was its promise kept?

    python -m benchmarks.adapt --draws 2    # writes benchmarks/results/adapt.json

The twenty classes of Open Clip Art that `benchmarks.few_shot` finds by its rule; 8 pictures of each, at random, are written to a
folder of PNG files, and the command line is run on it in a process of its own. All other pictures of these classes, which
nothing in that process could see, then judge the saved predictor and words alone: the accuracy that nested cross-validation
promised ought to lie near theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.few_shot import drawings
from benchmarks.measure import PACKAGES, RESULTS, commit, machine
from ecliptic.data.records import Records, unit_hash

EACH = 8  # pictures of a class to learn from
SIDE = 512  # pixels; the drawings are larger


def divided(records: Records, classes: Sequence[str], draw: int) -> tuple[Records, Records]:
    """`EACH` pictures of each class, by the number of the draw, and all the others."""
    labels, ids = records.column("label"), records.ids
    taken: set[int] = set()
    for name in classes:
        own = [i for i, label in enumerate(labels) if label == name]
        taken |= set(sorted(own, key=lambda i: unit_hash(draw, f"adapt {ids[i]}"))[:EACH])
    return records[sorted(taken)], records[[i for i in range(len(records)) if i not in taken]]


def write(records: Records, folder: Path) -> None:
    """A sub-folder per class."""
    for n, record in enumerate(records):
        place = folder / record["label"]
        place.mkdir(parents=True, exist_ok=True)
        picture = record["image"].convert("RGB")
        picture.thumbnail((SIDE, SIDE))
        picture.save(place / f"{n}.png")


def measure(records: Records, classes: Sequence[str], draw: int, minutes: float, folder: Path) -> dict[str, Any]:
    """One folder: what the command said, what it took, and how its predictor does on the other pictures."""
    from ecliptic.core.encoder import load
    from ecliptic.core.predictor_io import load_predictor
    from ecliptic.eval import evaluate

    shots, others = divided(records, classes, draw)
    write(shots, folder / "pictures")
    command = [sys.executable, "-m", "ecliptic", "adapt", str(folder / "pictures"), "--minutes", str(minutes), "--json"]
    start, spent = time.perf_counter(), os.times()
    done = subprocess.run([*command, "--out", str(folder / "best")], capture_output=True, text=True, check=True)
    seconds, after = time.perf_counter() - start, os.times()
    said = json.loads(done.stdout)
    encoder = load("offline")
    judged = evaluate(load_predictor(folder / "best", encoder), others)
    from ecliptic.apps.naming import usual_templates

    words = evaluate(encoder, others, task="zero_shot", templates=usual_templates(encoder))
    return {
        "draw": draw,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(
            after.children_user + after.children_system - spent.children_user - spent.children_system, 1
        ),
        "method": said["method"],
        "tried": said["tried"],
        "promised": {key: said[f"adapted.{key}"] for key in ("accuracy", "words_alone", "gain", "ece")},
        "others": {
            "pictures": len(others),
            "accuracy": judged["classification.accuracy"].to_json(),
            "words_alone": words["zero_shot.accuracy"].to_json(),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=4.0)
    options = parser.parse_args()
    records, classes = drawings()
    rows = []
    for draw in range(options.draws):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(records, classes, draw, options.minutes, Path(folder)))
        print(json.dumps(rows[-1], indent=1), file=sys.stderr, flush=True)
    content = {
        "command": f"python -m benchmarks.adapt --draws {options.draws} --minutes {options.minutes:g}",
        "machine": machine(),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit(),
        "settings": {"classes": list(classes), "each": EACH, "minutes": options.minutes, "model": "offline"},
        "rows": rows,
    }
    (RESULTS / "adapt.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
