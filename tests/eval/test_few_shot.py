"""The few-shot protocol: how pictures are dealt, figures by hand and by loops, resuming a killed run, real predictors."""

import json
import math
import subprocess
import sys
import textwrap
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import tensor

from ecliptic.baselines.linear_probe import LinearProbe
from ecliptic.baselines.zero_shot import ZeroShot
from ecliptic.core.contracts import Prediction, Predictor
from ecliptic.core.zeroshot import zero_shot_head
from ecliptic.data.feature_store import FeatureStore, keeping
from ecliptic.data.records import Records
from ecliptic.data.shots import encode_views
from ecliptic.eval.few_shot import (
    Cell,
    Exam,
    Journal,
    Task,
    cells,
    deal,
    episode,
    few_shot,
    over_seeds,
    run_cell,
    semi_supervised_episode,
    summary,
    unlabelled_episode,
)
from ecliptic.methods.adapt.gda import Gda
from tests.towers import FAMILIES, clip_encoder

COLOURS = {"red": (250, 40, 40), "green": (40, 250, 40), "blue": (40, 40, 250), "grey": (128, 128, 128)}


def pictures(each=8, names=tuple(COLOURS), prefix=""):
    """Flat colours, each picture a little darker than the one before."""
    rows = []
    for i in range(each):
        for name in names:
            colour = tuple(max(0, c - 9 * i) for c in COLOURS[name])
            rows.append({"id": f"{prefix}{name}-{i}", "image": Image.new("RGB", (8, 8), colour), "label": name})
    return Records.from_list(rows)


class Grey:
    """An encoder that is only asked for its name and its pixels."""

    id, bias, scale, name = "grey", None, tensor(100.0), "grey"

    def preprocess(self, images):
        return tensor([[[[i.getpixel((0, 0))[0] / 255]]] * 3 for i in images])


class Oracle(Predictor):
    """Says what `said` holds for (first byte of the picture): scores over `classes`; counts its fits."""

    fits = 0

    def __init__(self, said, classes):
        self.said, self.classes = said, classes

    def fit(self, encoder, pairs):
        type(self).fits += 1
        self.encoder_, self.seen_ = encoder, [(r["id"], r.get("label")) for r in pairs.undecoded()]
        return self

    def predict(self, pixels):
        keys = (pixels[:, 0, 0, 0] * 255).round().int().tolist()
        return Prediction(scores=tensor([self.said[key] for key in keys]), classes=self.classes)


class Namer(Oracle):
    def for_classes(self, names):
        return Namer({key: row[::-1] for key, row in self.said.items()}, tuple(names)).fit(
            self.encoder_, Records.from_list([])
        )


def levels(values):
    """Grey pictures by value, labelled."""
    return Records.from_list(
        [{"id": str(v), "image": Image.new("RGB", (4, 4), (v, v, v)), "label": label} for v, label in values.items()]
    )


def task_of(values, classes, elsewhere=None):
    exam = Exam(Grey(), levels(values), batch_size=3)
    pool = levels({200 + i: classes[i % len(classes)] for i in range(2 * len(classes))})
    return Task(tuple(classes), pool, exam, elsewhere and Exam(Grey(), levels(elsewhere)))


# Dealing


def test_what_is_set_aside_is_never_drawn_and_is_the_same_for_all_shots_and_seeds():
    task = deal(clip_encoder(), pictures(8), held_out=3, shots=5)
    aside = set(task.exam.records.ids)
    assert len(aside) == 12
    assert sorted(task.exam.labels) == sorted([*COLOURS] * 3)
    for seed in range(3):
        for shots in (1, 3, 5):
            assert not aside & set(episode(task.pool, shots, seed).ids)
    assert aside | set(task.pool.ids) == set(pictures(8).ids)
    assert task.most == 5


def test_fewer_shots_are_a_part_of_more_and_seeds_differ():
    pool = pictures(8)
    draws = [set(episode(pool, k, 1).ids) for k in (1, 2, 4, 8)]
    assert [len(draw) for draw in draws] == [4, 8, 16, 32]
    assert all(few < more for few, more in pairwise(draws))
    assert set(episode(pool, 4, 0).ids) != draws[2]


def test_neither_order_nor_company_changes_who_is_dealt_where():
    few, many = pictures(8, ("red", "blue")), pictures(8)
    one, other = (deal(clip_encoder(), x, ("red", "blue"), held_out=3, shots=4) for x in (few, many[::-1]))
    assert set(one.exam.records.ids) == set(other.exam.records.ids)
    assert set(episode(one.pool, 2, 5).ids) == set(episode(other.pool, 2, 5).ids)


def test_what_is_set_aside_and_what_is_drawn_do_not_go_by_the_same_number():
    # else the first shots of seed 0 would be those that the held-out ones leave off at, in every task
    task = deal(clip_encoder(), pictures(26, ("red", "blue")), held_out=10, shots=16, seed=0)
    whole = episode(pictures(26, ("red", "blue")), 10, 0)
    assert set(whole.ids) != set(task.exam.records.ids)


def test_a_small_class_keeps_its_shots_and_gives_fewer_to_the_exam():
    task = deal(clip_encoder(), pictures(6), held_out=4, shots=5)
    assert len(task.exam.labels) == 4
    assert task.most == 5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shots": 8}, "'red' has 8 pictures: 8 shots and one"),
        ({"held_out": 0}, "held_out=0"),
        ({"shots": 0}, "shots=0"),
        ({"classes": ("red",)}, "one class only"),
        ({"classes": ("red", "pink"), "shots": 2}, "'pink' has 0"),
        ({"templates": "no place"}, "no template set"),
    ],
)
def test_what_cannot_be_dealt_is_said(change, says):
    with pytest.raises(ValueError, match=says):
        deal(clip_encoder(), pictures(8), **{"classes": tuple(COLOURS), **change})


def test_unlabelled_episodes_hold_the_same_pictures_and_no_label():
    pool = pictures(6)
    drawn = unlabelled_episode(pool, 2, 0)
    assert drawn.ids == episode(pool, 2, 0).ids
    assert set(drawn.column("label")) == {None}
    assert drawn[0]["image"].size == (8, 8)


def test_semi_supervised_episodes_add_the_rest_of_the_classes_without_labels():
    drawn = semi_supervised_episode(pictures(6), 2, 0, ("red", "blue"))
    labels = drawn.column("label")
    assert labels[:4].count("red") == labels[:4].count("blue") == 2
    assert labels[4:] == [None] * 8
    assert len(set(drawn.ids)) == 12
    assert drawn.ids[:4] == episode(pictures(6), 2, 0, ("red", "blue")).ids


def test_the_task_is_known_by_its_pictures_classes_and_model():
    make = lambda **more: deal(clip_encoder(), pictures(8), **{"held_out": 3, "shots": 4, **more})  # noqa: E731
    ids = [make().id, make(held_out=2).id, make(seed=1).id, make(classes=("red", "blue")).id, make(templates="{}").id]
    assert len(set(ids)) == 5
    assert make().id == ids[0]
    assert deal(FAMILIES["siglip"](), pictures(8), held_out=3, shots=4).id != ids[0]


# Figures by hand


def test_accuracy_and_calibration_by_hand_with_columns_in_another_order():
    # a: right at p = 0.75; b: right at 0.75; c: named a at 0.75, wrong; all in the bin around 0.75 -> |2/3 - 3/4|
    row = [math.log(3), 0.0]
    said = {1: row, 2: row[::-1], 3: row}
    task = task_of({1: "b", 2: "a", 3: "a"}, ("a", "b"))
    found = run_cell(Cell("shots", 1, 0), lambda classes, seed: Oracle(said, ("b", "a")), Grey(), task)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["ece"] == pytest.approx(3 / 4 - 2 / 3, abs=1e-6)
    assert found["trained"] is None


def test_scores_that_are_probabilities_are_taken_as_they_are():
    said = {1: [0.9, 0.1], 2: [0.9, 0.1]}
    found = run_cell(
        Cell("shots", 1, 0), lambda c, s: Oracle(said, ("a", "b")), Grey(), task_of({1: "a", 2: "a"}, ("a", "b"))
    )
    assert found["ece"] == pytest.approx(0.1, abs=1e-6)  # a softmax of them would say 0.69


def test_the_other_domain_is_answered_among_its_own_classes():
    # c would win both times, but no picture of c is there
    said = {1: [0.0, 1.0, 5.0], 2: [2.0, 1.0, 5.0]}
    task = task_of({1: "a"}, ("a", "b", "c"), elsewhere={1: "b", 2: "b"})
    task.elsewhere = Exam(Grey(), levels({1: "b", 2: "b", 3: "a"}))
    said[3] = [1.0, 0.0, 0.0]
    found = run_cell(Cell("shots", 1, 0), lambda c, s: Oracle(said, ("a", "b", "c")), Grey(), task)
    assert found["elsewhere"] == pytest.approx(2 / 3)
    assert found["accuracy"] == 0.0


def base_task():
    values = {1: "a", 2: "a", 3: "b", 4: "b", 5: "c", 6: "c", 7: "d", 8: "d"}
    said = {1: [5, 0], 2: [0, 1], 3: [0, 4], 4: [0, 3], 5: [2, 0], 6: [0, 2.5], 7: [0.5, 0], 8: [0, 0.2]}
    return task_of(values, ("a", "b", "c", "d")), {key: [float(x) for x in row] for key, row in said.items()}


def test_base_to_new_learns_the_first_half_and_asks_each_half_among_itself():
    task, said = base_task()
    made = []

    def make(classes, seed):
        made.append((classes, seed, Namer(said, classes)))
        return made[-1][2]

    found = run_cell(Cell("base_to_new", 2, 7), make, Grey(), task)
    ((classes, seed, judge),) = made
    assert (classes, seed) == (("a", "b"), 7)
    assert {label for _, label in judge.seen_} == {"a", "b"}
    assert found["base"] == 0.75  # picture 2 is taken for b
    # reversed rows: 5 -> d wrong, 6 -> c right, 7 -> d right, 8 -> c wrong
    assert found["new"] == 0.5
    assert found["harmonic_mean"] == pytest.approx(2 / (1 / 0.75 + 1 / 0.5))
    assert found["new_by"] == "the method"


def test_how_well_the_unknown_half_is_told_apart_counted_in_pairs():
    task, said = base_task()
    found = run_cell(Cell("base_to_new", 1, 0), lambda c, s: Namer(said, c), Grey(), task)["ood"]
    top = {key: max(row) for key, row in said.items()}
    pairs = [(top[k] > top[u]) + 0.5 * (top[k] == top[u]) for k in (1, 2, 3, 4) for u in (5, 6, 7, 8)]
    assert found["max_logit"]["auroc"] == pytest.approx(sum(pairs) / 16)
    assert set(found) == {"msp", "max_logit", "energy", "mcm"}
    assert found["max_logit"]["fpr95"] > 0  # two unknown ones lie above the least known one


def test_a_score_of_its_own_is_judged_too():
    class Knows(Namer):
        def ood_scores(self, pixels):
            return {"own": -pixels[:, 0, 0, 0]}  # the darker, the more known: all of the known ones are

    task, said = base_task()
    found = run_cell(Cell("base_to_new", 1, 0), lambda c, s: Knows(said, c), Grey(), task)["ood"]
    assert found["own"] == {"auroc": 1.0, "fpr95": 0.0}


def test_what_cannot_learn_by_name_leaves_new_classes_to_the_words():
    encoder = clip_encoder()
    task = deal(encoder, pictures(8), held_out=3, shots=4)
    found = run_cell(Cell("base_to_new", 2, 0), lambda c, s: LinearProbe(c, strength=1.0), encoder, task)
    assert found["new_by"] == "zero-shot"
    new = task.classes[2:]
    features, head = encode_views(encoder, task.exam.records)[0], zero_shot_head(encoder, new)
    hits = [
        new[int((features[i] @ head.T).argmax())] == label for i, label in enumerate(task.exam.labels) if label in new
    ]
    assert found["new"] == pytest.approx(sum(hits) / len(hits))


def test_a_missing_column_is_said():
    task = task_of({1: "a"}, ("a", "b"))
    with pytest.raises(ValueError, match="no column for 'b'"):
        run_cell(Cell("shots", 1, 0), lambda c, s: Oracle({1: [1.0]}, ("a",)), Grey(), task)


def test_what_gives_no_scores_is_refused():
    class Mute(Oracle):
        def predict(self, pixels):
            return Prediction(labels=["a"] * len(pixels))

    with pytest.raises(TypeError, match="Mute gives no class scores"):
        run_cell(Cell("shots", 1, 0), lambda c, s: Mute({}, c), Grey(), task_of({1: "a"}, ("a", "b")))


def test_the_mean_over_seeds_and_its_interval_by_hand():
    number = over_seeds([0.5, 0.6, 0.7])
    half = 4.303 * 0.1 / math.sqrt(3)
    assert (number.value, number.low, number.high) == pytest.approx((0.6, 0.6 - half, 0.6 + half))
    assert over_seeds([0.5]).low is None
    assert over_seeds([0.9, 1.0, 1.0]).high == 1.0
    assert over_seeds([90.0, 100.0, 100.0], "s").high > 100


def test_seeds_are_averaged_and_kinds_kept_apart():
    same = {"memory": None, "trained": 3}
    found = {
        Cell("shots", 1, 0): {"accuracy": 0.2, "ece": 0.1, "seconds": 4.0, **same},
        Cell("shots", 1, 1): {"accuracy": 0.4, "ece": 0.3, "seconds": 6.0, **same},
        Cell("shots", 2, 0): {"accuracy": 0.9, "ece": 0.0, "seconds": 8.0, **same},
        Cell("cold", 2, 0): {"seconds": 50.0, **same},
    }
    numbers = summary(found)
    assert numbers["few_shot.accuracy[1]"].value == pytest.approx(0.3)
    assert numbers["few_shot.accuracy[2]"].value == 0.9
    assert (numbers["few_shot.seconds[1]"].value, numbers["few_shot.seconds[1]"].unit) == (5.0, "s")
    assert numbers["few_shot.seconds_with_encoding"].value == 50.0
    assert numbers["few_shot.trained"].value == 3
    assert not any("memory" in key for key in numbers)


# Cost


def test_memory_and_time_of_a_block_are_seen():
    """In a process of its own: in one that has run other tests, what they leave behind may be freed meanwhile."""
    code = """
        import numpy as np
        from ecliptic.eval.few_shot import measured
        with measured() as cost:
            kept = np.ones(8_000_000)  # 61 MiB
            sum(range(200_000))
        print(cost["seconds"], cost["memory"])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    seconds, memory = done.stdout.split()
    assert float(seconds) > 0
    if memory != "None":
        assert 55 < float(memory) < 120


def test_a_fit_that_had_to_encode_is_timed_again_and_a_cold_one_never_reads_the_store():
    encoder = clip_encoder()
    task = deal(encoder, pictures(6), held_out=2, shots=4)
    fits = []

    class Counting(LinearProbe):
        def fit(self, encoder, pairs):
            fits.append(1)
            return super().fit(encoder, pairs)

    def make(classes, seed):
        return Counting(classes, strength=1.0)

    with keeping(FeatureStore()) as store:
        run_cell(Cell("shots", 2, 0), make, encoder, task)
        assert len(fits) == 2
        run_cell(Cell("shots", 2, 0), make, encoder, task)
        assert len(fits) == 3
        before = len(store)
        cold = run_cell(Cell("cold", 2, 0), make, encoder, task)
        assert (len(fits), len(store), cold["encoded"]) == (4, before, 8)


# The whole, resumed


def test_cells_come_seed_by_seed_and_cheap_ones_first():
    found = cells((4, 1), (0, 1), 4)
    kinds = [("shots", 1), ("shots", 4), ("base_to_new", 4)]
    assert found[:-1] == [Cell(kind, k, seed) for seed in (0, 1) for kind, k in kinds]
    assert found[-1] == Cell("cold", 4, 0)


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    task, said = base_task()
    path = tmp_path / "deep" / "cells.jsonl"
    arguments = {"shots": (1, 2), "seeds": (0, 1), "base_shots": 1, "name": "oracle"}

    class Killed(Exception):
        pass

    def stop(cell, found):
        if cell == Cell("shots", 2, 0):
            raise Killed

    Oracle.fits = Namer.fits = 0
    full = {key: [*row, 0.0, 0.0] for key, row in said.items()}

    def make(classes, seed):
        return Oracle(full if len(classes) == 4 else said, classes)

    stub = pytest.MonkeyPatch()
    stub.setattr("ecliptic.core.zeroshot.zero_shot_head", lambda encoder, names, templates: torch.ones(len(names), 1))
    for exam in (task.exam,):
        exam.__dict__["features"] = torch.ones(8, 1)
    with stub.context():
        with pytest.raises(Killed):
            few_shot(make, Grey(), task, journal=Journal(path), progress=stop, **arguments)
        assert Oracle.fits == 2
        path.write_bytes(path.read_bytes() + b'{"key": ["oracle", "half a li')
        report = few_shot(make, Grey(), task, journal=Journal(path), **arguments)
        assert Oracle.fits == 7  # of seven cells two were there
        again = few_shot(make, Grey(), task, journal=Journal(path), **arguments)
    stub.undo()
    assert Oracle.fits == 7
    assert again.numbers == report.numbers
    assert len(Journal(path)) == 7
    assert sum(line.startswith('{"key"') and line.endswith("}") for line in path.read_text().splitlines()) == 7
    json.dumps(report.to_json())
    assert "zero-shot words" in str(report)


def test_other_names_share_a_journal_without_meeting(tmp_path):
    journal = Journal(tmp_path / "cells.jsonl")
    journal.add(("a", "x", "shots", 1, 0), {"accuracy": 1.0})
    assert journal.get(("b", "x", "shots", 1, 0)) is None
    assert journal.get(Cell("shots", 1, 0)) is None
    assert Journal(journal.path).get(("a", "x", "shots", 1, 0)) == {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shots": (9,)}, "9 shots are asked for, but one class has only 2"),
        ({"base_shots": 3}, "3 shots"),
        ({"shots": ()}, "at least one of each"),
        ({"shots": (0, 1)}, "from 1 on"),
        ({"seeds": ()}, "at least one of each"),
    ],
)
def test_what_cannot_be_run_is_said_before_any_fit(change, says):
    task, said = base_task()
    Oracle.fits = 0
    with pytest.raises(ValueError, match=says):
        few_shot(lambda c, s: Oracle(said, c), Grey(), task, **{"shots": (1,), "base_shots": 1, **change})
    assert Oracle.fits == 0


# Real predictors


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_real_predictors_on_every_family(family):
    encoder = FAMILIES[family]()
    task = deal(encoder, pictures(7), held_out=3, shots=4, elsewhere=pictures(2, ("red", "blue"), "other "))
    makers = {
        "words": lambda c, s: ZeroShot(c),
        "probe": lambda c, s: LinearProbe(c, strength=10.0, seed=s),
        "gda": lambda c, s: Gda(c, views=0, seed=s),
    }
    with keeping(FeatureStore()):
        found = {
            name: few_shot(make, encoder, task, (1, 4), (0, 1), base_shots=4, name=name)
            for name, make in makers.items()
        }
    words = found["words"].numbers
    expected = (task.exam.features @ zero_shot_head(encoder, task.classes).T).argmax(-1)
    hits = [task.classes[k] == label for k, label in zip(expected.tolist(), task.exam.labels)]
    assert words["few_shot.accuracy[1]"].value == words["few_shot.accuracy[4]"].value == pytest.approx(np.mean(hits))
    assert words["few_shot.trained"].value == 0
    assert found["probe"].numbers["few_shot.trained"].value > 0
    assert found["probe"].numbers["few_shot.accuracy[4]"].value > 0.7  # flat colours
    for report in found.values():
        assert {"few_shot.elsewhere[4]", "base_to_new.harmonic_mean", "ood.mcm.auroc"} <= set(report.numbers)
        assert report.to_json()


def test_pixels_and_features_give_the_same_answers():
    class ByPixels(ZeroShot):
        @property
        def predict_features(self):
            raise AttributeError

        def predict(self, pixels, classes=None):
            return ZeroShot.predict_features(self, self.encoder_.images(pixels).pooled.float())

    encoder = clip_encoder()
    task = deal(encoder, pictures(7), held_out=3, shots=4)
    one, other = (
        run_cell(Cell("shots", 1, 0), lambda c, s, kind=kind: kind(c), encoder, task) for kind in (ZeroShot, ByPixels)
    )
    assert one["accuracy"] == other["accuracy"]
    assert one["ece"] == pytest.approx(other["ece"], abs=1e-5)
