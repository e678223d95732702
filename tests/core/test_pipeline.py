"""Recipes: what is refused before anything starts, and that an interrupted run goes on without doing anything twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ecliptic.core.contracts import DataStep, Pairs
from ecliptic.core.encoder import load
from ecliptic.core.objectives import InfoNCE, Sigmoid
from ecliptic.core.pipeline import Action, Recipe, RecipeError, State, construct, named_objective
from ecliptic.core.train import Train
from ecliptic.data.scenes import scenes
from tests.towers import clip_encoder

TRAIN = {"train": {"objective": "infonce", "steps": 2, "batch_size": 8, "lr": "1e-3", "warmup": 0}}


class Give(Action):
    """Records for a test."""

    gives = "pairs"
    kept = False

    def __init__(self, n: int = 16):
        self.n = n

    def run(self, state: State, folder: Path) -> str:
        state.pairs = scenes("train", n=self.n, seed=0, size=32)
        return f"{self.n}"


class Odd(DataStep):
    """Every second record."""

    def apply(self, pairs: Pairs) -> Pairs:
        return [record for i, record in enumerate(pairs) if i % 2]


class Measure(Action):
    """How many records there are now, and what the encoder is called; counts how often it was done."""

    needs = ("encoder", "pairs")
    gives = "report"
    times = 0

    def __init__(self, fail: bool = False):
        self.fail = fail

    def run(self, state: State, folder: Path) -> str:
        type(self).times += 1
        if self.fail:
            raise KeyboardInterrupt
        self.restore(state, folder)
        return "measured"

    def restore(self, state: State, folder: Path) -> None:
        assert state.encoder is not None
        assert state.pairs is not None
        state.reports.append((state.encoder.name, len(list(state.pairs))))


VERBS = {"give": Give, "odd": Odd, "measure": Measure}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    clip_encoder().save_pretrained(folder)
    return str(folder)


def recipe(*lines):
    return Recipe(lines, VERBS)


def test_steps_hand_on_records_model_and_predictor(model, tmp_path):
    done = recipe({"load": model}, {"give": 24}, "odd", TRAIN, {"gda": {"views": 0}}, "measure").run(tmp_path)
    assert [step.step.name for step in done.steps] == ["load", "give", "odd", "train", "gda", "measure"]
    assert done.state.reports == [("tiny-clip+train", 12)]
    assert type(done.state.judge).__name__ == "Gda"
    assert done.model == tmp_path / "04-train" / "model"
    assert done.predictor == tmp_path / "05-gda" / "predictor"
    assert not (tmp_path / "04-train" / "checkpoints").exists()
    assert (tmp_path / "04-train" / "log.jsonl").exists()


def test_a_recipe_does_what_the_same_calls_in_python_do(model, tmp_path):
    ran = recipe({"load": model}, "give", TRAIN).run(tmp_path).state.encoder
    step = Train(InfoNCE(), steps=2, batch_size=8, lr=1e-3, warmup=0)
    by_hand = step.apply(load(model), scenes("train", n=16, seed=0, size=32))
    for name, value in by_hand.state_dict().items():
        assert torch.equal(value, ran.state_dict()[name]), name


def test_a_model_saved_after_several_steps_says_what_was_done_to_it(model, tmp_path):
    again = {"train": {**TRAIN["train"], "objective": {"sigmoid": {"bias": -5.0}}}}
    done = recipe({"load": model}, "give", TRAIN, again).run(tmp_path)
    opened = load(done.model)
    assert opened.name == "tiny-clip+train+train"
    assert [step["step"] for step in opened.history] == ["train", "train"]
    assert opened.history[1]["args"]["objective"]["bias"] == -5.0
    assert opened.id == done.state.encoder.id


def test_a_finished_run_is_not_done_again(model, tmp_path):
    lines = [{"load": model}, "give", TRAIN, "measure"]
    first = recipe(*lines).run(tmp_path)
    before = Measure.times
    second = recipe(*lines).run(tmp_path)
    assert Measure.times == before
    assert [step.resumed for step in second.steps] == [False, False, True, True]  # the first two are cheap
    assert second.state.encoder.id == first.state.encoder.id
    assert second.state.reports == first.state.reports


def test_an_interrupted_run_goes_on_where_it_was(model, tmp_path, monkeypatch):
    lines = [{"load": model}, "give", TRAIN, "measure"]
    monkeypatch.setattr(Measure, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        recipe(*lines).run(tmp_path)
    monkeypatch.undo()
    done = recipe(*lines).run(tmp_path)
    assert [step.resumed for step in done.steps] == [False, False, True, False]


def test_a_training_goes_on_from_its_last_checkpoint(model, tmp_path, monkeypatch):
    lines = [{"load": model}, "give", {"train": {**TRAIN["train"], "steps": 6, "checkpoint_every": 2}}]
    whole = recipe(*lines).run(tmp_path / "whole").state.encoder
    computed, terms = [], InfoNCE.terms

    def counted(self, views):
        computed.append(1)
        if len(computed) == 4:
            raise OSError("the machine went away")
        return terms(self, views)

    monkeypatch.setattr(InfoNCE, "terms", counted)
    with pytest.raises(OSError, match="went away"):
        recipe(*lines).run(tmp_path / "cut")
    resumed = recipe(*lines).run(tmp_path / "cut").state.encoder
    assert len(computed) == 4 + 4  # three steps and a failure, then the four after the checkpoint at step 2
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_what_changes_is_repeated_with_all_that_follows(model, tmp_path):
    recipe({"load": model}, "give", TRAIN, "measure").run(tmp_path)
    longer = {"train": {**TRAIN["train"], "steps": 3}}
    done = recipe({"load": model}, "give", longer, "measure").run(tmp_path)
    assert [step.resumed for step in done.steps] == [False, False, False, False]
    done = recipe({"load": model}, {"give": 17}, longer, "measure").run(tmp_path)
    assert [step.resumed for step in done.steps] == [False, False, False, False]


def test_another_model_under_the_same_name_is_noticed(model, tmp_path):
    place = tmp_path / "model"
    clip_encoder(0).save_pretrained(place)
    recipe({"load": str(place)}, "give", "measure").run(tmp_path / "run")
    clip_encoder(1).save_pretrained(place)
    done = recipe({"load": str(place)}, "give", "measure").run(tmp_path / "run")
    assert not done.steps[-1].resumed


def test_a_damaged_note_repeats_the_step(model, tmp_path):
    recipe({"load": model}, "give", "measure").run(tmp_path)
    (tmp_path / "03-measure" / "step.json").write_text("{half")
    assert not recipe({"load": model}, "give", "measure").run(tmp_path).steps[-1].resumed


def test_a_step_that_was_cut_short_is_not_taken_for_done(model, tmp_path):
    recipe({"load": model}, "give", "measure").run(tmp_path)
    note = tmp_path / "03-measure" / "step.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "done": False}))
    assert not recipe({"load": model}, "give", "measure").run(tmp_path).steps[-1].resumed


def test_fresh_does_everything_again(model, tmp_path):
    recipe({"load": model}, "give", TRAIN).run(tmp_path)
    done = recipe({"load": model}, "give", TRAIN).run(tmp_path, fresh=True)
    assert not any(step.resumed for step in done.steps)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no steps"),
        (["gdaa"], "did you mean gda"),
        (["lod"], "did you mean load"),
        ([{"load": "tiny", "give": 1}], "write `- slug`"),
        ([{"load": "tiny"}, "gda"], "step 2 .gda. needs records: put a `data` step before it"),
        (["give", "measure"], r"step 2 \(measure\) needs a model: put a `load` step"),
        ([{"load": {}}], "the argument 'model' is missing"),
        ([{"load": "tiny"}, {"train": {"objective": "infonce", "step": 3}}], "no argument 'step'; did you mean steps"),
        ([{"load": "tiny"}, {"train": {"objective": "infonce", "steps": "many"}}], "steps: 'many' is no whole number"),
        ([{"load": "tiny"}, {"train": {"objective": "infonce", "steps": True}}], "True is no whole number"),
        ([{"load": "tiny"}, {"train": {"objective": "infonce", "steps": 0}}], "steps=0: must be at least 1"),
        ([{"load": "tiny"}, {"train": {"objective": "infonce", "lr": "fast"}}], "lr: 'fast' is no number"),
        ([{"load": "tiny"}, {"train": {"objective": "infonce", "schedule": "cosin"}}], "'cosin' is none of cosine"),
        ([{"load": "tiny"}, {"train": {"objective": "infonse"}}], "no loss 'infonse'; choose one of infonce, sigmoid"),
        ([{"load": "tiny"}, {"train": {"objective": {"sigmoid": {"bais": 1}}}}], "did you mean bias"),
        ([{"load": "tiny"}, {"train": {"objective": "infonce", "freeze": "image"}}], "freeze: 'image' is no list"),
        ([{"load": "tiny"}, {"train": {"objective": "infonce", "resume": False}}], "resume cannot be set"),
        ([{"gda": {"alfa": 1}}], "did you mean alpha"),
        ([3], "write `- slug`"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(lines, message):
    with pytest.raises(RecipeError, match=message):
        recipe(*lines)


def test_a_recipe_is_a_list():
    with pytest.raises(RecipeError, match="list of steps"):
        Recipe("gda")


def test_a_predictor_does_not_outlive_the_model_it_was_fitted_on(model):
    class NeedsJudge(Measure):
        needs = ("judge",)

    verbs = {**VERBS, "needs_judge": NeedsJudge}
    Recipe([{"load": model}, "give", "gda", "needs_judge"], verbs)
    with pytest.raises(RecipeError, match="after the last step that changes the model"):
        Recipe([{"load": model}, "give", "gda", TRAIN, "needs_judge"], verbs)


def test_values_come_out_as_annotated():
    def step(rate: float, sizes: tuple[int, ...] = (), loss: InfoNCE | None = None) -> tuple:
        return rate, sizes, loss

    assert construct(step, {"rate": 1, "sizes": [1, 2]}, "here") == (1.0, (1, 2), None)
    assert isinstance(construct(step, {"rate": 1}, "here")[0], float)


def test_objectives_by_name():
    assert named_objective("InfoNCE") is InfoNCE
    assert named_objective("sigmoid") is Sigmoid
