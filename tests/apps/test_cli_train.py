"""`ecliptic train`: adapters, chunks, averages, the guard, and what a second run does."""

from __future__ import annotations

import json
from dataclasses import replace

from ecliptic.apps.cli.train import _kept
from ecliptic.core.encoder import load
from ecliptic.core.guard import Guarded, accuracy
from ecliptic.core.lora import load_adapters
from ecliptic.data.sources import open_source


def test_train_shows_what_was_kept(cli, model, pictures, tmp_path):
    table = tmp_path / "pairs.csv"
    rows = [f"pictures/{p.relative_to(pictures)},a {p.parent.name} {p.stem}" for p in pictures.rglob("*.png")]
    table.write_text("image,caption\n" + "\n".join(rows) + "\n")
    out = tmp_path / "trained"
    command = ["train", table, "--out", out, "--model", model, "--steps", 3, "--batch-size", 4, "--lr", 0.01]
    command += ["--lora-rank", 2, "--ema", 0.5, "--chunk", 2, "--precision", "bf16", "--tensorboard"]
    done = cli(*command, "--guard", pictures, "--checkpoint-every", 1, "--json")
    value = json.loads(done.stdout)
    guard = value["guard"]
    assert guard["data"] == str(pictures)
    assert guard["before"] == accuracy(load(model), open_source(str(pictures)))
    assert guard["after"] == accuracy(load(out), open_source(str(pictures)))
    args = load(out).history[-1]["args"]
    assert (args["lora"]["rank"], args["lora"]["alpha"], args["ema"], args["precision"]) == (2, 4, 0.5, "bf16")
    assert load_adapters(load(model), tmp_path / "trained.checkpoints" / "adapters").model is not None
    assert list((tmp_path / "trained.checkpoints" / "tensorboard").iterdir())
    text = cli(*command, "--guard", pictures, "--checkpoint-every", 1).stdout  # done already: nothing is trained again
    assert f"{pictures} (not trained on): {guard['before']:.3f} before, {guard['after']:.3f} after" in text
    assert load(out).id == value["id"]
    assert "is of another run (lr: 0.01 there, 0.1 here)" in cli(*command, "--lr", 0.1).stderr
    assert cli(*command, "--lr", 0.1, "--fresh").exit_code == 0
    assert "give --guard DATA as well" in cli(*command, "--repair").stderr
    assert "precision='bf8': choose one of no, bf16, fp16" in cli(*command, "--precision", "bf8").stderr
    assert "choose from image, text" in cli(*command, "--freeze", "vision").stderr


def test_what_a_guard_found_in_a_line():
    fell = Guarded(0.8, 0.5, 0.02, {0.0: 0.8, 0.3: 0.79, 0.6: 0.6})
    assert _kept(Guarded(0.8, 0.79, 0.02), "set") == "set (not trained on): 0.800 before, 0.790 after"
    line = "set (not trained on): 0.800 before, 0.500 after; 30 % new and 70 % old weights: 0.790"
    assert _kept(fell, "set") == f"{line} (--repair saves that)"
    assert _kept(replace(fell, repaired=True), "set") == f"{line}, which is what was saved"
