"""`ecliptic run`: from a file of steps to one report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from ecliptic.apps import recipes
from ecliptic.core.encoder import load
from ecliptic.core.pipeline import RecipeError, State

TRAIN = {"objective": "infonce", "steps": 2, "batch_size": 8, "lr": "1e-4"}


@pytest.fixture
def write(tmp_path):
    def write(content):
        file = tmp_path / "small.yaml"
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return file

    return write


def steps(model):
    return [
        {"load": model},
        {"evaluate": {"source": "scenes", "part": "test", "name": "before"}},
        {"data": {"source": "scenes", "part": "train", "limit": 20}},
        {"train": TRAIN},
        {"data": {"source": "scenes", "part": "train", "shots": 2}},
        {"gda": {"views": 0}},
        {"evaluate": {"source": "scenes", "part": "test", "name": "after"}},
    ]


@pytest.mark.filterwarnings("ignore::ecliptic.core.encoder.TruncationWarning")  # of a tower that reads 32 tokens
def test_a_run_ends_in_one_report_and_leaves_what_it_made(cli, model, write, tmp_path):
    file = write({"name": "two <steps>", "steps": steps(model)})
    done = cli("run", file, "--json")
    assert done.exit_code == 0, done.stderr
    value = json.loads(done.stdout)
    assert [step["name"] for step in value["steps"]] == ["load", "evaluate", "data", "train", "data", "gda", "evaluate"]
    assert {"before: text_to_image.recall@1", "after: classification.accuracy"} <= value["numbers"].keys()
    folder = tmp_path / "small.run"
    page = (folder / "report.html").read_text()
    assert "two &lt;steps&gt;" in page
    assert "gda" in page
    assert (folder / "02-evaluate" / "report.html").exists()
    assert [step["step"] for step in load(value["model"]).history] == ["train"]
    named = cli("classify", *_pictures(tmp_path), "--predictor", value["predictor"])
    assert named.exit_code == 0, named.stderr  # the folder is all it takes
    again = json.loads(cli("run", file, "--json").stdout)
    assert [step["resumed"] for step in again["steps"]] == [False, True, False, True, False, True, True]
    assert again["numbers"] == value["numbers"]


def _pictures(tmp_path):
    from ecliptic.data.scenes import scenes

    path = tmp_path / "one.png"
    scenes("test", n=1, seed=0, size=32)[0]["image"].save(path)
    return [path]


def test_check_says_what_would_be_done_and_does_nothing(cli, write, tmp_path):
    file = write({"steps": steps("tiny")})
    done = cli("run", file, "--check", "--json")
    assert done.exit_code == 0
    assert [step["name"] for step in json.loads(done.stdout)["steps"]][3] == "train"
    assert not (tmp_path / "small.run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("steps: [", "is no YAML"),
        ("hello", "holds no list of steps; for example"),
        ("{stepz: []}", "unknown 'stepz'; did you mean steps"),
        ("- load: tiny\n- data: stampz\n", r"step 2 \(data\): no source 'stampz' .did you mean stamps"),
        ("- load: tiny\n- evaluate: nowhere.csv\n", r"step 2 \(evaluate\): no such table: nowhere.csv"),
        ("- load: tiny\n- data: {source: scenes, shots: 0}\n", "shots=0: must be at least 1"),
        ("- load: tiny\n- data: {source: scenes, part: half}\n", "'half' is none of all, train, test"),
    ],
)
def test_bad_recipes_are_refused_at_once(write, content, message):
    with pytest.raises(RecipeError, match=message):
        recipes.read(write(content))


def test_errors_reach_the_user_in_one_line(cli, write, tmp_path):
    done = cli("run", write("- load: tiny\n- gdb\n"))
    assert done.exit_code == 2
    assert done.stderr.startswith("ecliptic: step 2 (gdb): ")
    assert cli("run", tmp_path / "none.yaml").exit_code == 2


def test_train_and_test_parts_never_meet():
    records = recipes.Data("scenes").records()
    train, test = (recipes.Data("scenes", part=part).records().ids for part in ("train", "test"))
    assert not set(train) & set(test)
    assert len(train) + len(test) == len(records)
    assert 0.7 < len(train) / len(records) < 0.9


def test_shots_are_so_many_of_each_label_and_the_seed_chooses_them():
    chosen = recipes.Data("scenes", shots=3).records()
    labels = chosen.column("label")
    assert {labels.count(label) for label in labels} == {3}
    assert chosen.ids == recipes.Data("scenes", shots=3).records().ids
    assert chosen.ids != recipes.Data("scenes", shots=3, seed=1).records().ids


def test_the_documented_recipe_and_its_python_give_the_same_numbers(write, tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    (recipe,), (python,) = (re.findall(rf"```{kind}\n(.*?)```", text, re.S) for kind in ("yaml", "python"))
    outcome, _ = recipes.run(write(recipe), tmp_path / "run")
    names: dict = {}
    exec(compile(python, "recipes.md", "exec"), names)  # our own file
    by_title = dict(outcome.state.reports)
    for title in ("before", "after"):
        here = by_title[title].to_json()
        assert here == names[title].to_json()
        assert len(here) > 5


def test_other_records_under_the_same_number_are_noticed(write, tmp_path):
    file = tmp_path / "data.csv"
    said = []
    for caption in ("a dog", "a cat"):
        file.write_text(f"image,caption\n{_pictures(tmp_path)[0]},{caption}\n")
        said.append(recipes.Data(str(file)).run(State(), tmp_path))
    assert said[0] != said[1]
    assert "1 records" in said[0]


def test_the_example_is_a_recipe(write):
    assert len(recipes.read(write(recipes.EXAMPLE))[1].steps) == 4
