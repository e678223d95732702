"""Where a few labelled pictures can help `tiny`: headroom over Tip-Adapter under many shifts. Nothing here has seen GDA.

    python -m benchmarks.gda_headroom [--json FILE]

Chooses the task on which GDA's claim asks for its margins over Tip-Adapter (+0.08 at 16 shots). A margin can only be asked for
where there is room for it, so the rule, fixed before the first figure: zero-shot accuracy between 0.35 and 0.55, as in the
published pilot (0.44), and a linear probe with plenty of pictures at least 0.16 (twice the margin) above Tip-Adapter with 16
shots; of those that pass, the one with the most headroom. All candidates are screened on the first pilot seed, by
their zero-shot accuracy first; those within 0.04 of passing are measured on all five. The claim itself runs on other seeds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, commit
from ecliptic.core.encoder import load
from ecliptic.core.zeroshot import zero_shot_head
from ecliptic.data.scenes import BACKGROUNDS, SHAPES, SIZES, TEXTURES, scenes
from ecliptic.data.shots import encode_views, labels_of

SEEDS = (200, 201, 202, 203, 204)
ZERO_SHOT = (0.35, 0.55)
HEADROOM = 0.16
SCREEN = 0.04  # how far from passing one seed may lie for the other four to be measured
ARMS = ("zero_shot", "tip", "linear_probe")
EACH_SHAPE = tuple(f"a {{}} {shape}" for shape in SHAPES)


def claim() -> Any:
    """The claim's file as a module: its tasks and arms are the ones measured here."""
    file = Path(__file__).parents[1] / "claims" / "adapt" / "gda.py"
    spec = importlib.util.spec_from_file_location("gda_claim", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def candidates(shift: Any) -> dict[str, Any]:
    """Candidates by name; shapes where nothing else is said."""
    textures, large = TEXTURES[:4], {"size_range": (0.40, 0.45)}  # `tiny` learnt radii from 0.14 to 0.34
    drawn = {"style": "drawing"}
    return {
        "as_learnt": shift({}),
        "drawings": shift(drawn),
        "largest": shift({"size_range": (0.44, 0.45)}),
        "small": shift({"size_range": (0.08, 0.11)}),
        "smallest": shift({"size_range": (0.05, 0.08)}),
        "noise": shift({"noise": 0.2}),
        "much_noise": shift({"noise": 0.4}),
        "clutter": shift({"clutter": 60, "clutter_contrast": 0.15}),
        "much_clutter": shift({"clutter": 60, "clutter_contrast": 0.4}),
        "turned": shift({"rotation": 180.0}),
        "odd_colours": shift({"jitter": 0.3}),
        "new_textures": shift({"textures": TEXTURES[4:]}),
        "new_backgrounds": shift({"backgrounds": BACKGROUNDS[3:]}),
        "dim": shift({"lightings": ("dim", "backlit")}),
        "turned_drawings": shift({**drawn, "rotation": 180.0}),
        "noisy_drawings": shift({**drawn, "noise": 0.2}),
        "cluttered_drawings": shift({**drawn, "clutter": 60, "clutter_contrast": 0.15}),
        "large_drawings": shift({**drawn, **large}),
        "small_drawings": shift({**drawn, "size_range": (0.10, 0.14)}),
        "large_noise": shift({**large, "noise": 0.4}),
        "first_of_pair": shift({"kind": "pair"}),
        "first_of_several": shift({"kind": "multi"}),
        "textures": shift({}, "texture", textures, EACH_SHAPE),
        "textures_large": shift(large, "texture", textures, EACH_SHAPE),
        "textures_of_drawings": shift(drawn, "texture", textures, EACH_SHAPE),
        "all_textures": shift({"textures": TEXTURES}, "texture", TEXTURES, EACH_SHAPE),
        "all_textures_large": shift({"textures": TEXTURES, **large}, "texture", TEXTURES, EACH_SHAPE),
        "sizes": shift({}, "size", tuple(SIZES), EACH_SHAPE),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS / "gda_headroom.json")
    args = parser.parse_args()
    module = claim()
    encoder = load("tiny")

    def measure(shift: Any, seed: int) -> list[float]:
        task = module.encode_scenes(shift, seed)
        return [round(module.accuracy(arm, task), 4) for arm in ARMS]

    def zero_shot(shift: Any, seed: int) -> float:
        """The same figure as `measure`'s first, at a fifth of the price."""
        more = {"label": shift.label, "holdout": (), **shift.options}
        test = scenes("test", 600, seed + 1000, size=encoder.image_size, **more)
        head = zero_shot_head(encoder, shift.classes, shift.templates)
        best = (encode_views(encoder, test)[0] @ head.T).argmax(-1)
        return round(float((best == labels_of(test, shift.classes)[1]).double().mean()), 4)

    rows: dict[str, dict[str, Any]] = {}
    for name, shift in candidates(module.Shift).items():
        rows[name] = {"asks": shift.label, **shift.options, "zero_shot": zero_shot(shift, SEEDS[0]), "passes": False}
        if not ZERO_SHOT[0] - SCREEN <= rows[name]["zero_shot"] <= ZERO_SHOT[1] + SCREEN:
            print(name, rows[name], flush=True)
            continue
        figures = [measure(shift, SEEDS[0])]
        if near(figures[0]):
            figures += [measure(shift, seed) for seed in SEEDS[1:]]
        mean = [round(sum(column) / len(column), 4) for column in zip(*figures)]
        rows[name] |= {
            **dict(zip(ARMS, mean)),
            "headroom": round(mean[2] - mean[1], 4),
            "seeds": len(figures),
            "passes": len(figures) == len(SEEDS) and near(mean, 0.0),
        }
        print(name, rows[name], flush=True)
    passing = [name for name, row in rows.items() if row["passes"]]
    chosen = max(passing, key=lambda name: rows[name]["headroom"], default=None)
    print("chosen:", chosen)
    report = {
        "command": "python -m benchmarks.gda_headroom", "rule": " ".join((__doc__ or "").split("\n\n")[2].split()),
        "commit": commit(), "seeds": SEEDS, "shots": 16, "arms": ARMS, "candidates": rows, "chosen": chosen,
    }  # fmt: skip
    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def near(figures: list[float], slack: float = SCREEN) -> bool:
    """Whether [zero-shot, Tip-Adapter, probe] satisfies the rule, within `slack`."""
    zero_shot, tip, probe = figures
    return ZERO_SHOT[0] - slack <= zero_shot <= ZERO_SHOT[1] + slack and probe - tip >= HEADROOM - slack


if __name__ == "__main__":
    main()
