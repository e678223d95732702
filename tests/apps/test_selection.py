"""Choosing among methods: honest, within its time, resumable, and for every mixture of labels."""

from __future__ import annotations

import json
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from ecliptic.apps import selection
from ecliptic.apps.adapt_unlabelled import choose_unlabelled
from ecliptic.apps.adaptation import AdaptationError
from ecliptic.apps.selection import Candidate, choose, known_candidates
from ecliptic.core.predictor_io import load_predictor, save_predictor
from ecliptic.data.folder import folder
from ecliptic.data.records import Records
from tests.apps.conftest import picture
from tests.towers import clip_encoder

QUICK = ["zero_shot", "linear_probe", "gda"]


@pytest.fixture(scope="module")
def encoder():
    return clip_encoder()


@pytest.fixture
def colours(tmp_path):
    """Three kinds that random towers tell apart once they have seen some; no name helps."""
    top = tmp_path / "colours"
    for name, colour in {"wug": (220, 30, 30), "dax": (30, 220, 30), "blick": (30, 30, 220)}.items():
        (top / name).mkdir(parents=True)
        for i in range(6):
            noise = np.random.default_rng([i, *colour]).integers(-25, 25, (32, 32, 3))
            Image.fromarray((np.array(colour) + noise).astype(np.uint8)).save(top / name / f"{i}.png")
    return top


def test_the_winner_is_fitted_on_everything_and_its_figure_is_honest(encoder, colours, tmp_path):
    (colours / "wug" / "torn.png").write_bytes(b"torn")
    done = choose(
        encoder, folder(colours), tmp_path / "work", candidates=known_candidates(QUICK), words={"wug": "a wug"}
    )
    numbers = done.report.numbers
    assert done.classes == ("a wug", "blick", "dax")
    assert done.counts == {"a wug": 6, "blick": 6, "dax": 6}
    assert numbers["adapted.accuracy"].value > 0.9
    assert numbers["adapted.accuracy"].n == 18
    assert numbers["adapted.gain"].value == pytest.approx(
        numbers["adapted.accuracy"].value - numbers["adapted.words_alone"].value
    )
    assert numbers["adapted.gain"].low > 0
    assert done.winner.name in ("linear_probe", "gda")
    assert [id for id, _ in done.bad] == ["wug/torn.png"]
    assert {entry.candidate.name: len(entry.answers) for entry in done.tried} == dict.fromkeys(QUICK, 10)
    board = next(table for table in done.report.tables if table.title == "Leaderboard")
    assert sum(row[-1] for row in board.rows) == 4
    assert done.winner.name in str(board.rows[0][0])
    save_predictor(done.judge, tmp_path / "saved", with_encoder=True)
    opened = load_predictor(tmp_path / "saved")
    pixels = encoder.preprocess([Image.open(colours / "dax" / "0.png")])
    assert opened.predict(pixels).labels == ["dax"]


def test_what_was_fitted_is_not_fitted_again(encoder, colours, tmp_path, monkeypatch):
    options = {"candidates": known_candidates(QUICK)}
    first = choose(encoder, folder(colours), tmp_path / "work", **options)
    fitted = []
    plain = selection.fit_candidate

    def counting(encoder, candidate, *rest):
        fitted.append(candidate.name)
        return plain(encoder, candidate, *rest)

    monkeypatch.setattr(selection, "fit_candidate", counting)
    again = choose(encoder, folder(colours), tmp_path / "work", **options)
    assert fitted == [again.winner.name]  # the last fit, on everything
    assert again.report.numbers == first.report.numbers
    fitted.clear()
    more = [*known_candidates(QUICK), Candidate("gda_alone", "gda", {"text": False, "views": 0})]
    choose(encoder, folder(colours), tmp_path / "work", candidates=more)
    assert Counter(fitted)["gda_alone"] >= 10
    assert Counter(fitted)["linear_probe"] <= 1
    (colours / "wug" / "0.png").rename(colours / "dax" / "moved.png")  # other labels, other fits
    fitted.clear()
    choose(encoder, folder(colours), tmp_path / "work", **options)
    assert Counter(fitted)["zero_shot"] >= 10


def test_an_interrupt_keeps_what_was_done(encoder, colours, tmp_path, monkeypatch):
    plain, fitted = selection.fit_candidate, []

    def interrupted(encoder, candidate, *rest):
        fitted.append(candidate.name)
        if len(fitted) == 14:
            raise KeyboardInterrupt
        return plain(encoder, candidate, *rest)

    monkeypatch.setattr(selection, "fit_candidate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        choose(encoder, folder(colours), tmp_path / "work", candidates=known_candidates(QUICK))
    choose(encoder, folder(colours), tmp_path / "work", candidates=known_candidates(QUICK))
    assert len(fitted) == 14 + (30 - 13) + 1


def test_methods_that_need_too_long_are_left_out(encoder, colours, tmp_path, monkeypatch):
    plain = selection.fit_candidate

    def slow(encoder, candidate, *rest):
        time.sleep(0.3 * (candidate.name == "linear_probe"))
        return plain(encoder, candidate, *rest)

    monkeypatch.setattr(selection, "fit_candidate", slow)
    names = ["zero_shot", "linear_probe"]
    done = choose(encoder, folder(colours), tmp_path / "work", candidates=known_candidates(names), minutes=0.02)
    assert done.winner.name == "zero_shot"
    assert "time left" in {entry.candidate.name: entry.problem for entry in done.tried}["linear_probe"]
    left = next(table for table in done.report.tables if table.title == "Not in the comparison")
    assert left.rows[0][0] == "linear_probe"
    assert done.report.numbers["adapted.gain"].value == 0


def test_a_method_that_fails_says_why_and_the_others_go_on(encoder, colours, tmp_path):
    failing = Candidate("gda_bad", "gda", {"shrinkage": "none"})
    done = choose(encoder, folder(colours), tmp_path / "work", candidates=[*known_candidates(QUICK), failing])
    assert "shrinkage must be one of" in {entry.candidate.name: entry.problem for entry in done.tried}["gda_bad"]


def test_shots_limit_what_is_used_and_words_alone_are_always_tried(encoder, colours, tmp_path):
    done = choose(encoder, folder(colours), tmp_path / "work", candidates=known_candidates(["linear_probe"]), shots=4)
    assert set(done.counts.values()) == {4}
    assert [entry.candidate.name for entry in done.tried] == ["zero_shot", "linear_probe"]


def test_unlabelled_pictures_are_learnt_from_and_never_judged(encoder, colours, tmp_path, monkeypatch):
    records = list(folder(colours).undecoded())
    for record in records[::3]:
        record["label"] = None
    given = []
    plain = selection.fit_candidate

    def watching(encoder, candidate, part, classes):
        given.append((candidate.name, len(part)))
        return plain(encoder, candidate, part, classes)

    monkeypatch.setattr(selection, "fit_candidate", watching)
    roster = [
        *known_candidates(["zero_shot"]),
        Candidate("gda_unlabelled", "gda:GdaUnlabelled", unlabelled=True, only_pictures=True),
    ]
    done = choose(encoder, Records.from_list(records), tmp_path / "work", candidates=roster)
    assert done.unlabelled == 6
    assert done.report.numbers["adapted.accuracy"].n == 12
    seen = dict(given)
    assert max(n for name, n in given if name == "zero_shot") <= 12
    assert max(n for name, n in given if name == "gda_unlabelled") >= 9 + 6
    assert set(seen) == {"zero_shot", "gda_unlabelled"}
    # by itself, the list of methods holds those for unlabelled pictures only where there are some
    assert not any(
        entry.candidate.unlabelled for entry in choose(encoder, folder(colours), tmp_path / "w", minutes=0.001).tried
    )


def test_what_cannot_be_chosen_on_is_refused(encoder, tmp_path):
    records = [{"id": str(i), "image": Image.new("RGB", (32, 32)), "label": name} for i, name in enumerate("ab")]
    with pytest.raises(AdaptationError, match="no class has two"):
        choose(encoder, Records.from_list(records), tmp_path / "work")
    with pytest.raises(AdaptationError, match="one class only"):
        choose(encoder, Records.from_list(records[:1] * 3), tmp_path / "work")
    with pytest.raises(AdaptationError, match="give the methods some time"):
        choose(encoder, Records.from_list(records), tmp_path / "work", minutes=0)
    with pytest.raises(AdaptationError, match="no class 'c'"):
        choose(encoder, Records.from_list(records), tmp_path / "work", words={"c": "x"})


def test_without_labels_nothing_is_measured_and_the_most_disputed_come_first(encoder, colours, tmp_path):
    records = folder(colours, labels=False)
    roster = [
        Candidate("zero_shot", "zero_shot", only_pictures=True),
        Candidate("zero_shot_again", "zero_shot", only_pictures=True),
        Candidate("other_words", "zero_shot", {"templates": "drawing"}, only_pictures=True),
        Candidate("failing", "zero_shot", {"templates": "fotos"}, only_pictures=True),
    ]
    done = choose_unlabelled(encoder, records, tmp_path / "work", ("wug", "dax", "blick"), candidates=roster)
    assert done.winner.name == "zero_shot"  # the two that are the same agree most, and the first of them is kept
    assert not any("accuracy" in key for key in done.report.numbers)
    assert done.judge.classes_ == ("wug", "dax", "blick")
    table = next(table for table in done.report.tables if table.title == "Share of pictures named alike")
    alike = {row[0]: [cell.value for cell in row[1:4]] for row in table.rows}
    assert alike["zero_shot"][:2] == [1.0, 1.0]
    both = (alike["zero_shot"][1] + alike["zero_shot"][2]) / 2
    assert done.report.numbers["agreement.of_the_winner"].value == pytest.approx(both)
    assert done.report.tables[-1].rows[0][0] == "failing"


def test_the_command_line_chooses_saves_and_classifies(cli, model, colours, tmp_path):
    picture(colours / "wug" / "torn.png").write_bytes(b"torn")
    out = tmp_path / "best"
    methods = [part for name in QUICK for part in ("--method", name)]
    value = json.loads(cli("adapt", colours, *methods, "--model", model, "--out", out, "--json").stdout)
    assert value["method"] in ("linear_probe", "gda")
    assert value["adapted.gain"]["low"] > 0
    assert [entry["method"] for entry in value["tried"]] == QUICK
    assert value["bad"][0]["path"] == "wug/torn.png"
    assert (out / "report.html").is_file()
    for option in ("--model", "--predictor"):
        named = json.loads(cli("classify", colours / "dax", option, out, "--json").stdout)
        assert {entry["label"] for entry in named["pictures"]} == {"dax"}
    text = cli("adapt", colours, *methods, "--model", model).stdout
    assert "Leaderboard" in text


def test_the_command_line_takes_pictures_of_which_some_or_none_have_labels(cli, model, colours, tmp_path):
    for i in range(2):  # beside the class folders: unlabelled
        (colours / "wug" / f"{i}.png").rename(colours / f"loose{i}.png")
    methods = [part for name in QUICK for part in ("--method", name)]
    done = cli("adapt", colours, *methods, "--model", model, "--json")
    assert done.exit_code == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["unlabelled"] == 2
    assert value["shots"] == {"wug": 4, "dax": 6, "blick": 6}
    table = tmp_path / "table.csv"
    lines = [f"{path},{path.parent.name if i % 3 else ''}" for i, path in enumerate(sorted(colours.glob("*/*.png")))]
    table.write_text("\n".join(["image,label", *lines]))
    done = cli("adapt", table, *methods, "--model", model, "--json")
    assert done.exit_code == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["unlabelled"] == len(lines) - sum(value["shots"].values()) == 6
    one = cli("adapt", table, "--method", "gda", "--shots", 2, "--set", "views=0", "--model", model)
    assert "6 pictures have no label" in one.stderr
    assert "adapted.accuracy" in one.stdout
    none = json.loads(
        cli(
            "adapt", colours / "dax", "--labels", "wug, dax", "--method", "zero_shot", "--model", model, "--json"
        ).stdout
    )
    assert none["unlabelled"] == 6
    assert none["agreement.of_all"]["value"] == 1
    assert "no labels" in cli("adapt", colours / "dax", "--model", model).stderr
