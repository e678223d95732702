"""The few-shot benchmark: which pictures, in which order cells are done, what is told of pairs, and the page that tells it."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import few_shot as bench
from ecliptic.core.progress import OutOfTime
from ecliptic.data.records import Records
from ecliptic.data.wordnet import Synset, WordNet
from ecliptic.eval.few_shot import Cell, Journal

NET = WordNet(
    {
        f"n{i}": Synset(f"n{i}", words, "", (), ())
        for i, words in enumerate(
            [("bird",), ("berry",), ("map",), ("symbol",), ("glass",), ("field hockey",), ("person",)]
        )
    }
)


def page_module():
    file = Path(__file__).parents[2] / "docs" / "few_shot_page.py"
    spec = importlib.util.spec_from_file_location("few_shot_page", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGE = page_module()


@pytest.mark.parametrize("name", ["bird", "birds", "berries", "map symbols", "glasses", "field hockey"])
def test_names_that_are_words_in_one_or_many(name):
    assert bench.is_noun(name, NET)


@pytest.mark.parametrize("name", ["flat-theme", "bodypart", "birds and berries", "mapsymbol", "bir"])
def test_names_that_are_none(name):
    assert not bench.is_noun(name, NET)


def test_the_kind_of_a_drawing_is_the_second_folder():
    assert bench._kind({"category": ["animals", "map_symbols", "cats"]})["label"] == "map symbols"
    assert bench._kind({"category": ["animals"]})["label"] is None


def test_a_few_of_each_whatever_stands_beside_them():
    rows = [{"id": f"{k}{i}", "image": Image.new("L", (2, 2)), "label": k} for i in range(9) for k in "abc"]
    whole = bench.some_of_each(Records.from_list(rows), "ab", 4)
    assert Counter(whole.column("label")) == {"a": 4, "b": 4}
    few = [row for row in rows if row["label"] == "a"][::-1]
    alone = bench.some_of_each(Records.from_list(few), "ab", 4)
    assert set(alone.ids) == {id for id in whole.ids if id[0] == "a"}


# Running


class FakeTask:
    id = "task"

    class exam:
        encoder = None


def entry(name, only=""):
    return bench.Entry(name, "method", lambda classes, seed: None, "labels", (), settings=name, only=only)


@pytest.fixture
def runner(tmp_path):
    return bench.Runner(FakeTask(), Journal(tmp_path / "cells.jsonl"), limit=10.0, commit="now")


def fill(runner, what, **figures):
    """Cells by (kind, shots, seed) -> seconds."""
    for cell, seconds in figures.pop("done").items():
        runner.journal.add(runner.key(what, Cell(*cell)), {"seconds": seconds, "spent": seconds, **figures})


def test_what_tells_most_for_its_cost_comes_first(runner):
    cheap, dear = entry("cheap"), entry("dear")
    fill(runner, cheap, done={("shots", 1, 0): 1.0})
    fill(runner, dear, done={("shots", 1, 0): 1.9})
    order = []
    for _ in range(6):
        what, cell = runner.next([dear, cheap])
        order.append((what.name, cell))
        fill(runner, what, done={tuple(cell): 1.0 if what is cheap else 1.9})
    assert order[0] == ("cheap", Cell("shots", 16, 0))
    assert order[1] == ("cheap", Cell("base_to_new", 16, 0))
    assert [name for name, _ in order].index("dear") == 3
    assert len(set(order)) == 6


def test_nothing_larger_is_tried_of_what_was_stopped_or_would_take_too_long(runner):
    what = entry("slow")
    runner.journal.add(runner.key(what, Cell("shots", 4, 0)), {"stopped": 31.0, "spent": 31.0})
    fill(runner, what, done={("shots", 1, 0): 1.0})
    assert runner.why_not(what, Cell("shots", 16, 1)) == "stopped after 31 s at 4 shots"
    assert runner.why_not(what, Cell("shots", 2, 1)) == ""
    other = entry("long")
    fill(runner, other, done={("shots", 1, 0): 6.0})
    assert runner.why_not(other, Cell("shots", 4, 0)) == "would take about 12 s"
    assert runner.why_not(other, Cell("shots", 1, 1)) == ""


def test_a_changed_method_is_measured_again(runner, tmp_path):
    file = tmp_path / "method.py"
    file.write_text("x = 1\n")
    old = bench.Entry("m", "method", lambda c, s: None, "labels", (file,))
    fill(runner, old, done={("shots", 1, 0): 1.0})
    assert runner.done(old)
    file.write_text("x = 1  # said differently\n")
    assert runner.done(bench.Entry("m", "method", lambda c, s: None, "labels", (file,)))
    file.write_text("x = 2\n")
    assert not runner.done(bench.Entry("m", "method", lambda c, s: None, "labels", (file,)))


def test_failures_are_kept_as_such_and_tried_again_once_anything_has_changed(runner, monkeypatch):
    def fails(*_):
        raise RuntimeError("no such layer")

    what, cell = entry("m"), Cell("shots", 1, 0)
    monkeypatch.setattr(bench, "run_cell", fails)
    found = runner.run(what, cell)
    assert found["error"] == "RuntimeError: no such layer"
    assert runner.next([what])[1].shots != 1  # others may go
    assert runner.why_not(what, Cell("shots", 1, 2)) == "RuntimeError: no such layer"
    runner.commit = "later"
    assert runner.why_not(what, cell) == ""

    def late(*_):
        raise OutOfTime

    monkeypatch.setattr(bench, "run_cell", late)
    assert "stopped" in runner.run(what, cell)
    assert runner.next([what]) is None


def test_what_sees_no_pictures_is_measured_once_and_counts_for_all(runner):
    what = bench.Entry("words", "baseline", lambda c, s: None, bench.NAMES, ())
    assert what.cells() == [Cell("shots", 16, 0), Cell("base_to_new", 16, 0), Cell("cold", 4, 0)]
    fill(runner, what, done={("shots", 16, 0): 1.0}, accuracy=0.5)
    done = runner.done(what)
    assert len(done) == 15
    assert done[Cell("shots", 2, 1)]["accuracy"] == 0.5
    assert not any(cell.kind == "base_to_new" for cell in done)


# Pairs


def test_pairs_are_compared_on_the_same_draws():
    a = {Cell("shots", 4, seed): {"accuracy": 0.5 + 0.1 * seed} for seed in (0, 1, 2)}
    b = {Cell("shots", 4, seed): {"accuracy": 0.45 + 0.1 * seed} for seed in (0, 1)}
    gap = bench.paired(a, b, "accuracy")["4"]
    assert (gap["mean"], gap["seeds"]) == (pytest.approx(0.05), 2)
    assert gap["high"] - gap["low"] == pytest.approx(0.0, abs=1e-9)  # the seeds differ, the differences do not
    assert list(bench.paired(a, b, "accuracy")) == ["4"]
    new = {Cell("base_to_new", 16, 0): {"new": 0.4}}
    assert bench.paired(new, {Cell("base_to_new", 16, 0): {"new": 0.7}}, "new")["16"]["mean"] == pytest.approx(-0.3)


@pytest.mark.parametrize(
    ("gaps", "says"),
    [
        ([(0.1, 0.05, 0.15)], "as said"),
        ([(0.1, -0.05, 0.25)], "open"),
        ([(-0.1, -0.15, -0.05)], "against"),
        ([(-0.1, -0.25, 0.05)], "open"),
        ([(-0.2, -0.25, -0.15), (0.1, 0.05, 0.15)], "open"),
        ([(0.2, 0.15, 0.25), (-0.1, -0.15, -0.05)], "open"),
        ([(0.2, 0.1, 0.3, 2)], "open"),
        ([(-0.2, -0.3, -0.1, 2)], "open"),
    ],
)
def test_what_a_pair_comes_to(gaps, says):
    named = [dict(zip(("mean", "low", "high", "seeds"), (*gap, 3)[:4])) for gap in gaps]
    assert PAGE.verdict(named) == says


# The page


def number(value, half=0.05):
    return {"value": value, "low": value - half, "high": value + half, "n": 320, "unit": "fraction"}


def result(**more):
    numbers = {f"few_shot.accuracy[{k}]": number(0.4 + k / 100) for k in (1, 2, 4, 8, 16)}
    numbers |= {f"few_shot.{key}[{k}]": number(0.2) for key in ("ece", "elsewhere") for k in (1, 4, 16)}
    numbers |= {f"few_shot.seconds[{k}]": {"value": 0.25, "low": None, "high": None, "unit": "s"} for k in (1, 4, 16)}
    numbers |= {f"base_to_new.{key}": number(0.5) for key in ("base", "new", "harmonic_mean")}
    numbers |= {f"ood.{name}.{key}": number(0.7) for name in ("msp", "mcm", "own") for key in ("auroc", "fpr95")}
    seeds = {**{f"shots {k}": 3 for k in (1, 2, 4, 16)}, "shots 8": 2, "base_to_new 16": 3}
    row = {
        "name": "gda", "kind": "method", "link": "https://arxiv.org/abs/2402.04087", "settings": "", "sees": "labels",
        "digest": "0", "new classes by": "zero-shot", "numbers": numbers, "seeds": seeds, "missing": {}, "cells": [1],
    }  # fmt: skip
    other = {
        **row,
        "name": "zero_shot",
        "kind": "baseline",
        "link": None,
        "missing": {"shots 8 1": "no time left", "shots 8 2": "no time left"},
    }
    other["numbers"] = {**numbers, "few_shot.accuracy[16]": number(0.613)}
    gap = {"4": {"mean": -0.031, "low": -0.05, "high": -0.012, "seeds": 3}}
    pair = {"better": "gda", "than": "zero_shot", "metric": "accuracy", "link": None, "says": "it beats words"}
    return {
        "command": "python -m benchmarks.few_shot", "machine": {"cpu": "x", "cores": 2, "python": "3"}, "commit": "abcdefgh",
        "versions": {"torch": "2"}, "rows": [row, other], "pairs": [{**pair, "by shots": gap}],
        "settings": {
            "model": "offline", "classes": {"birds": {"pool": 20, "judged on": 16, "elsewhere": 3}}, "template": "{}", "views": 4,
            "shots": [1, 2, 4, 8, 16], "seeds": [0, 1, 2], "limit": 90, "task": "t", "seconds a picture": 0.045,
        },
        **more,
    }  # fmt: skip


def test_the_page_tells_what_the_result_holds():
    text = PAGE.few_shot(result())
    assert "56.0 (51.0 to 61.0)" in text
    assert text.index("zero_shot (baseline) | labels") < text.index("[gda](https://arxiv.org/abs/2402.04087) | labels")
    assert "other way round" in text
    assert "-3.1 (-5.0 to -1.2) at 4 shots" in text
    assert "`zero_shot`: 8 shots, seed 1 and 2 (no time left)" in text
    assert "| 48.0 [2] |" in text
    assert "70.0 (65.0 to 75.0) (own)" in text
    assert all(len(line) <= 130 or line.startswith("|") for line in text.splitlines())


def test_tables_of_the_page_have_as_many_cells_as_columns():
    lines = PAGE.few_shot(result()).splitlines()
    rules = [i for i, line in enumerate(lines) if line.startswith("|---")]
    assert len(rules) == 5
    for i in rules:
        columns = lines[i].count("|")
        for line in [lines[i - 1], *lines[i + 1 :]]:
            if not line.startswith("|"):
                break
            assert line.count("|") == columns, line


def test_rows_without_cells_are_left_out_of_the_tables_and_told_as_missing():
    found = result()
    found["rows"][0] |= {"cells": [], "numbers": {}, "missing": {"shots 1 0": "ValueError: no layers"}}
    text = PAGE.few_shot(json.loads(json.dumps(found)))
    assert "arxiv.org/abs/2402.04087" not in text
    assert "`gda`: nothing (ValueError: no layers)" in text


def test_what_sees_no_pictures_has_no_interval_over_seeds():
    found = result()
    found["rows"][1]["sees"] = "names alone"
    assert "| zero_shot (baseline) | names alone | 41.0 | 42.0 | 44.0 | 48.0 | 61.3 |" in PAGE.few_shot(found)
