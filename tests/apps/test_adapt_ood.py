"""Refusing what is none of the classes: chosen honestly, on given unknown pictures or on classes left out, and resumable."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecliptic.apps import adapt_ood
from ecliptic.apps.adapt_ood import ROSTER, choose_ood
from ecliptic.apps.adaptation import AdaptationError
from ecliptic.apps.selection import Candidate
from ecliptic.baselines.linear_probe import LinearProbe
from ecliptic.baselines.refusing import Refusing
from ecliptic.baselines.zero_shot import ZeroShot
from ecliptic.core.encoder import load
from ecliptic.core.known import DISTANCES
from ecliptic.core.method import baselines, cards
from ecliptic.core.predictor_io import load_predictor
from ecliptic.data.folder import folder
from ecliptic.data.records import Records
from ecliptic.eval.ood import TRAINING_FREE
from tests.towers import clip_encoder

HUES = {
    "wug": (220, 30, 30),
    "dax": (30, 220, 30),
    "blick": (30, 30, 220),
    "fep": (220, 220, 30),
    "zav": (30, 220, 220),
}
QUICK = [Candidate("zero_shot", "zero_shot"), Candidate("linear_probe", "linear_probe", {"strength": 100.0})]


def paint(top, hues, n=6):
    for name, hue in hues.items():
        (top / name).mkdir(parents=True)
        for i in range(n):
            noise = np.random.default_rng([i, *hue]).integers(-25, 25, (32, 32, 3))
            Image.fromarray((np.array(hue) + noise).astype(np.uint8)).save(top / name / f"{i}.png")
    return top


@pytest.fixture(scope="module")
def encoder():
    return clip_encoder()


@pytest.fixture
def known(tmp_path):
    return folder(paint(tmp_path / "known", HUES))


@pytest.fixture
def unknown(tmp_path):
    grey = folder(paint(tmp_path / "other", {"grey": (128, 128, 128), "black": (10, 10, 10)}))
    return grey.map(lambda r: {k: v for k, v in r.items() if k != "label"}, images=False)


def test_against_pictures_of_other_things(encoder, known, unknown, tmp_path):
    (tmp_path / "known" / "wug" / "torn.png").write_bytes(b"torn")
    (tmp_path / "other" / "grey" / "torn.png").write_bytes(b"torn")
    known, unknown = folder(tmp_path / "known"), folder(tmp_path / "other")
    done = choose_ood(encoder, known, tmp_path / "work", unknown=unknown, candidates=QUICK, words={"wug": "a wug"})
    numbers = done.report.numbers
    assert done.classes == ("a wug", "blick", "dax", "fep", "zav")
    assert done.counts == dict.fromkeys(done.classes, 6)
    assert (done.unknown, done.unlabelled) == (12, 0)
    assert sorted(id for id, _ in done.bad) == ["grey/torn.png", "wug/torn.png"]
    assert numbers["refusing.auroc"].value > 0.95
    assert numbers["refusing.unknown_refused"].value > 0.8
    assert numbers["refusing.known_named_right"].value > 0.9
    assert numbers["refusing.gain"].value == pytest.approx(
        numbers["refusing.auroc"].value - numbers["refusing.words_alone"].value
    )
    board = next(table for table in done.report.tables if table.title == "Leaderboard")
    names = {str(row[0]).removesuffix(" (winner)") for row in board.rows}
    assert names == {*DISTANCES, *(f"{c.name} + {s}" for c in QUICK for s in TRAINING_FREE)}
    assert str(board.rows[0][0]) == f"{done.winner.name} (winner)"
    assert sum(row[-1] for row in board.rows) == 4
    pixels = encoder.preprocess([r["image"] for r in folder(paint(tmp_path / "more", {"brown": (120, 60, 0)}, 2))])
    assert done.judge.keep == 0.95
    judge = load_predictor(done.judge.save(tmp_path / "judge"), encoder)
    assert judge.predict(pixels).labels == done.judge.predict(pixels).labels
    said = judge.predict(encoder.preprocess([r["image"] for r in unknown[[0, 1, 6, 7]]])).labels
    assert said.count("unknown") >= 3
    assert "never learnt from" in str(done.report)
    done.report.html(tmp_path / "report.html")


def test_classes_left_out_stand_for_the_unknown(encoder, known, tmp_path):
    done = choose_ood(encoder, known, tmp_path / "work", candidates=QUICK)
    assert done.unknown == 0
    assert done.report["refusing.auroc"].n == 30, "every picture is unknown once"
    assert done.report["refusing.auroc"].value > 0.7
    per_class = next(table for table in done.report.tables if table.title == "Hardest to refuse")
    assert {row[0]: row[1] for row in per_class.rows} == dict.fromkeys(sorted(HUES), 6)
    assert "classes of your own stood for them" in str(done.report)
    assert done.judge.classes_ == tuple(sorted(HUES)), "the predictor itself knows them all"


def test_nothing_held_out_was_learnt_or_named(encoder, known, tmp_path, monkeypatch):
    """Watch every fit of a trial: its records and classes against what it is then asked about."""
    seen = []

    def watched(encoder, candidate, records, classes):
        seen.append(({*records.ids}, {*records.column("label")}, {*classes}))
        return original(encoder, candidate, records, classes)

    original = adapt_ood.fit_candidate
    monkeypatch.setattr(adapt_ood, "fit_candidate", watched)
    done = choose_ood(encoder, known, tmp_path / "work", candidates=QUICK[:1])
    plan = list(done.tried[1].answers)
    assert len(seen) == len(plan) == 15  # five classes make five folds
    for (ids, labels, classes), left_out in zip(seen, plan):
        assert labels == classes
        assert len(labels) == len(HUES) - len(left_out)
        answers = done.tried[1].answers[left_out]["mcm"]
        assert {id for id, answer in zip(known.ids, answers) if not np.isnan(answer)} == {*known.ids} - ids


def test_a_second_call_goes_on_where_the_first_stopped(encoder, known, tmp_path, monkeypatch):
    calls = []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return original(*arguments)

    original = adapt_ood.fit_candidate
    monkeypatch.setattr(adapt_ood, "fit_candidate", stopping)
    with pytest.raises(KeyboardInterrupt):
        choose_ood(encoder, known, tmp_path / "work", candidates=QUICK)
    done = choose_ood(encoder, known, tmp_path / "work", candidates=QUICK)
    assert len(calls) == 20 + 30 - 19
    fresh = choose_ood(encoder, known, tmp_path / "fresh", candidates=QUICK)
    assert done.winner == fresh.winner
    assert done.report.numbers == fresh.report.numbers
    calls.clear()
    choose_ood(encoder, known, tmp_path / "work", candidates=QUICK, seed=0)
    assert not calls


def test_a_classifier_with_scores_of_its_own_is_tried_with_these(encoder, known, tmp_path, monkeypatch):
    class Own(LinearProbe):
        def ood_scores(self, pixels):
            return self.ood_scores_features(self.encoder_.images(pixels).pooled)

        def ood_scores_features(self, features):
            return {"own": features[:, 0].double()}

    monkeypatch.setattr(
        adapt_ood, "fit_candidate", lambda e, c, r, k: (Own if c.name == "own" else ZeroShot)().fit(e, r)
    )
    own = Candidate("own", "linear_probe")
    done = choose_ood(encoder, known, tmp_path / "work", candidates=[own], seed=1)
    board = next(table for table in done.report.tables if table.title == "Leaderboard")
    names = {str(row[0]).removesuffix(" (winner)") for row in board.rows}
    assert names == {*DISTANCES, "own + own", *(f"zero_shot + {score}" for score in TRAINING_FREE)}
    features = encoder.encode_images([record["image"] for record in known])
    for left_out, answers in done.tried[2].answers.items():
        unseen = np.isfinite(answers["own"])
        np.testing.assert_allclose(answers["own"][unseen], features[unseen, 0].numpy(), atol=1e-5)
        assert unseen.sum() > 6 * len(left_out)


def test_what_does_not_fit_into_the_time_is_left_out(encoder, known, tmp_path):
    slow = Candidate("coop", "coop")
    done = choose_ood(encoder, known, tmp_path / "work", candidates=[*QUICK[:1], slow], minutes=1e-5)
    table = next(table for table in done.report.tables if table.title == "Not in the comparison")
    assert table.rows == [["coop", "not in the time left"]]
    assert done.report["refusing.auroc"].n == 30


def test_beside_a_distance_the_most_accurate_classifier_names(encoder, known, unknown, tmp_path, monkeypatch):
    judged = adapt_ood.judge_ood

    def forced(answers, split):
        found = judged(answers, split)
        return type(found)("knn", found.chosen, found.parts, found.parts["knn"])

    monkeypatch.setattr(adapt_ood, "judge_ood", forced)
    done = choose_ood(encoder, known, tmp_path / "work", unknown=unknown, candidates=QUICK)
    assert (done.winner.name, done.winner.method) == ("knn", "linear_probe")
    assert (done.judge.method, done.judge.score) == ("linear_probe", "knn")
    assert "linear_probe names what is not refused" in str(done.report)


def test_what_cannot_be_judged_is_said_before_any_work(encoder, known, unknown, tmp_path, monkeypatch):
    monkeypatch.setattr(type(encoder), "encode_images", lambda *_, **__: pytest.fail("work was begun"))
    three = known[[i for i, label in enumerate(known.column("label")) if label in ("wug", "dax", "fep")]]
    one = known[[i for i, label in enumerate(known.column("label")) if label == "wug"]]
    first = known[[known.column("label").index(name) for name in HUES]]
    called = known.map(lambda r: {**r, "label": r["label"].replace("wug", "unknown")}, images=False)
    for records, options, why in (
        (one, {}, "one class only"),
        (three, {}, "3 classes are too few to leave some out in turn: it takes four"),
        (first, {}, "no class has two pictures"),
        (known, {"minutes": 0}, "give the methods some time"),
        (known, {"keep": 1.0}, "keep=1.0: the share"),
        (known, {"folds": 2}, "folds=2"),
        (known, {"words": {"bird": "a bird"}}, "no class 'bird'"),
        (known, {"unknown": Records.from_list([], "nothing")}, "nothing holds no pictures"),
        (known, {"unknown": unknown[:3]}, "3 unknown pictures are too few"),
        (
            known,
            {"unknown": known[:8]},
            "8 of the 8 unknown pictures are also pictures of the classes, such as 'blick/0",
        ),
        (known, {"candidates": [Candidate("x", "cloob")]}, "cloob does not learn from labelled pictures"),
        (called, {}, "a class is called 'unknown'"),
        (known, {"words": {"wug": "unknown"}}, "a class is called 'unknown'"),
    ):
        with pytest.raises(AdaptationError, match=why):
            choose_ood(encoder, records, tmp_path / "work", **options)


def test_adapt_and_classify_by_the_command_line(cli, model, known, unknown, tmp_path):
    out = tmp_path / "guard"
    arguments = ["--task", "ood", "--unknown", tmp_path / "other", "--model", model, "--minutes", 1e-4]
    value = json.loads(cli("adapt", tmp_path / "known", *arguments, "--out", out, "--json").stdout)
    assert value["classes"] == sorted(HUES)
    assert value["refusing.auroc"]["value"] > 0.5
    assert load_predictor(out).score in value["method"]
    named = json.loads(cli("classify", tmp_path / "other", "-p", out, "--json").stdout)
    assert {entry["label"] for entry in named["pictures"]} <= {"unknown", *HUES}
    assert "also pictures of the classes" in cli("adapt", tmp_path / "known", *arguments[:3], tmp_path / "known").stderr


def test_classify_says_unknown(cli, model, known, unknown, tmp_path):
    encoder = load(model)
    judge = Refusing("linear_probe", {"strength": 100.0}, score="mahalanobis").fit(encoder, known)
    judge.save(tmp_path / "judge")
    value = json.loads(cli("classify", tmp_path, "--predictor", tmp_path / "judge", "-m", model, "--json").stdout)
    said = {str(Path(entry["path"]).relative_to(tmp_path)): entry["label"] for entry in value["pictures"]}
    assert len(said) == 42
    assert {said[f"other/{name}/{i}.png"] for name in ("grey", "black") for i in range(6)} == {"unknown"}
    right = [said[f"known/{name}/{i}.png"] == name for name in HUES for i in range(6)]
    assert sum(right) > 24
    assert value["labels"] == sorted(HUES)
    assert set(value["pictures"][0]["probabilities"]) == set(HUES)
    text = cli(
        "classify", tmp_path / "other" / "grey" / "0.png", "-p", tmp_path / "judge", "-m", model, "--top", 1
    ).stdout
    assert re.fullmatch(r".*0\.png  unknown \((wug|dax|blick|fep|zav) \d+\.\d%\)\n", text)
    text = cli(
        "classify", tmp_path / "known" / "wug" / "0.png", "-p", tmp_path / "judge", "-m", model, "--top", 1
    ).stdout
    assert re.fullmatch(r".*0\.png  wug \d+\.\d%\n", text)


def test_the_roster_is_of_methods_that_are_there():
    slugs = {*baselines(), *(card.slug for card in cards())}
    assert {c.method for c in ROSTER if c.method in slugs} >= {"zero_shot", "gda", "linear_probe"}
    assert ROSTER[0].name == "zero_shot"
