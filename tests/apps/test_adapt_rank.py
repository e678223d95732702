"""Ordering pictures by a quantity: chosen honestly, in the user's unit, within its time, and resumable."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecliptic.apps import adapt_rank
from ecliptic.apps.adapt_rank import ROSTER, SMALL, choose_rank
from ecliptic.apps.adaptation import AdaptationError
from ecliptic.apps.selection import Candidate
from ecliptic.baselines.feature_ranker import FeatureRanker
from ecliptic.core.encoder import load
from ecliptic.core.predictor_io import load_predictor
from ecliptic.data.records import Records
from ecliptic.data.table import TableError, table
from ecliptic.eval.nested_ranking import mean_srcc
from tests.towers import clip_encoder

QUICK = list(ROSTER[:3])
ADAPTER = Candidate(
    "ranking_adapter",
    "rescaled_ranker",
    {"settings": {**SMALL, "width": 8, "heads": 2, "text_prompts": 1, "rank_tokens": 2, "batch_size": 8, "steps": 3}},
)


@pytest.fixture(scope="module")
def encoder():
    return clip_encoder()


@pytest.fixture
def grey(tmp_path):
    """Twenty-four pictures and how light they are, in a table with a file that is torn and a value that is missing."""
    folder = tmp_path / "grey"
    folder.mkdir()
    lines = ["Image,Value"]
    for i in range(24):
        noise = np.random.default_rng(i).integers(-6, 7, (32, 32, 3))
        Image.fromarray((20 + 9 * i + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{100 + 5 * i}")
    (folder / "torn.png").write_bytes(b"torn")
    Image.new("RGB", (32, 32)).save(folder / "unsaid.png")
    (folder / "table.csv").write_text("\n".join([*lines, "torn.png,7", "unsaid.png,"]) + "\n")
    return table(folder / "table.csv")


def valued(values) -> Records:
    return Records.from_list(
        [{"id": str(i), "image": Image.new("RGB", (8, 8)), "value": v} for i, v in enumerate(values)]
    )


def test_a_table_of_values_is_ordered_in_its_own_unit(encoder, grey, tmp_path):
    done = choose_rank(encoder, grey, tmp_path / "work", instruction="light | dark", candidates=QUICK)
    numbers = done.report.numbers
    assert (done.pictures, done.unvalued) == (24, 1)
    assert [id for id, _ in done.bad] == ["torn.png"]
    assert done.winner.name in ("ridge", "neighbours")
    assert numbers["ranking.rank_correlation"].value > 0.85
    assert numbers["ranking.rank_correlation"].n == 24
    assert numbers["ranking.pairs_in_order"].value > 0.9
    assert numbers["ranking.mean_error"].value < done.report["ranking.median.mean_error"].value / 2
    assert numbers["ranking.gain"].value == pytest.approx(
        numbers["ranking.rank_correlation"].value - numbers["ranking.words_alone"].value
    )
    judge = load_predictor(done.judge.save(tmp_path / "judge"), encoder)
    pixels = encoder.preprocess([record["image"] for record in grey[:24]])
    said = judge.predict(pixels)
    assert said.scores.shape == (24, 1)
    assert said.classes == ("light | dark",)
    assert np.corrcoef(said.scores[:, 0].numpy(), 100 + 5 * np.arange(24))[0, 1] > 0.9
    board = next(t for t in done.report.tables if t.title == "Leaderboard")
    assert str(board.rows[0][0]) == f"{done.winner.name} (winner)"
    assert sum(row[-1] for row in board.rows) == 4
    assert {entry.candidate.name: len(entry.answers) for entry in done.tried} == dict.fromkeys(
        ("words", "neighbours", "ridge"), 10
    )
    done.report.html(tmp_path / "report.html")


def test_the_figure_is_of_pictures_that_no_fit_had_seen(encoder, grey, tmp_path, monkeypatch):
    seen = []

    def watched(self, candidate, rows):
        seen.append((candidate.name, frozenset(rows.tolist())))
        return original(self, candidate, rows)

    original = adapt_rank._Trial.fit
    monkeypatch.setattr(adapt_rank._Trial, "fit", watched)
    done = choose_rank(encoder, grey, tmp_path / "work", candidates=[ROSTER[2]])
    (entry,) = done.tried
    for (name, rows), answers in zip(seen, entry.answers.values()):
        assert name == "ridge"
        assert set(np.flatnonzero(np.isfinite(answers))) == set(range(24)) - rows
    assert len(seen) == 11
    assert seen[-1][1] == frozenset(range(24))
    fold = np.empty(24, dtype=int)
    scores = np.empty(24)
    for left_out, answers in list(entry.answers.items())[:4]:
        (k,) = left_out
        held = np.isfinite(answers)
        fold[held], scores[held] = k, answers[held]
    assert done.report["ranking.rank_correlation"].value == pytest.approx(mean_srcc(scores, np.arange(24.0), fold))
    assert "ranking.gain" not in done.report.numbers, "there are no words to gain over"


def test_the_adapter_learns_saves_and_answers(encoder, grey, tmp_path, monkeypatch):
    monkeypatch.setattr(adapt_rank, "judge_ranking", _always("ranking_adapter", adapt_rank.judge_ranking))
    done = choose_rank(encoder, grey, tmp_path / "work", instruction="how light", candidates=[ROSTER[2], ADAPTER])
    assert done.winner.name == "ranking_adapter"
    pixels = encoder.preprocess([record["image"] for record in grey[:4]])
    judge = load_predictor(done.judge.save(tmp_path / "judge"), encoder)
    assert judge.predict(pixels).scores.tolist() == done.judge.predict(pixels).scores.tolist()
    assert 50 < float(judge.predict(pixels).scores.mean()) < 300, "in the unit of the values"


def _always(name, judge_ranking):
    def judged(answers, values, fold):
        found = judge_ranking(answers, values, fold)
        return type(found)(name, found.chosen, found.scores, found.honest)

    return judged


def test_the_number_of_steps_fits_the_time_and_is_kept(encoder, grey, tmp_path, monkeypatch):
    free = Candidate("ranking_adapter", "rescaled_ranker", {"settings": {**ADAPTER.settings["settings"]}})
    del free.settings["settings"]["steps"]
    monkeypatch.setattr(adapt_rank, "LADDER", (2, 1))
    first = choose_rank(encoder, grey, tmp_path / "work", candidates=[free], minutes=5)
    board = next(t for t in first.report.tables if t.title == "Leaderboard")
    assert {row[0].removesuffix(" (winner)"): row[-2] for row in board.rows} == {"ridge": None, "ranking_adapter": 2}
    monkeypatch.setattr(adapt_rank, "LADDER", ())
    again = choose_rank(encoder, grey, tmp_path / "work", candidates=[free], minutes=5)
    assert again.report.numbers == first.report.numbers
    none = choose_rank(encoder, grey, tmp_path / "fresh", candidates=[free], minutes=5)
    table = next(t for t in none.report.tables if t.title == "Not in the comparison")
    assert table.rows == [["ranking_adapter", "not in the time left"]]


def test_a_second_call_goes_on_where_the_first_stopped(encoder, grey, tmp_path, monkeypatch):
    calls = []

    def stopping(self, candidate, rows):
        calls.append(candidate.name)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return original(self, candidate, rows)

    original = adapt_rank._Trial.fit
    monkeypatch.setattr(adapt_rank._Trial, "fit", stopping)
    with pytest.raises(KeyboardInterrupt):
        choose_rank(encoder, grey, tmp_path / "work", candidates=QUICK[1:])
    done = choose_rank(encoder, grey, tmp_path / "work", candidates=QUICK[1:])
    assert len(calls) == 15 + 20 - 14 + 1
    fresh = choose_rank(encoder, grey, tmp_path / "fresh", candidates=QUICK[1:])
    assert (done.winner, done.report.numbers) == (fresh.winner, fresh.report.numbers)


def test_quantities_by_name(encoder, grey, tmp_path):
    named = grey[:24].map(
        lambda r: {"id": r["id"], "image": r["image"], "quantities": {"grey": float(r["value"])}}, images=False
    )
    done = choose_rank(encoder, named, tmp_path / "work", candidates=QUICK)
    assert done.instruction == "grey"
    plain = choose_rank(encoder, grey[:24], tmp_path / "work", instruction="grey", candidates=QUICK)
    assert done.report.numbers == plain.report.numbers
    both = named.map(lambda r: {**r, "quantities": {**r["quantities"], "size": 1.0}}, images=False)
    with pytest.raises(AdaptationError, match="several quantities"):
        choose_rank(encoder, both, tmp_path / "work")


def test_adapt_by_the_command_line(cli, model, grey, tmp_path):
    out = tmp_path / "ranker"
    arguments = ["--task", "rank", "--instruction", "light | dark", "--model", model, "--minutes", 1e-3]
    value = json.loads(cli("adapt", tmp_path / "grey" / "table.csv", *arguments, "--out", out, "--json").stdout)
    assert value["ranking.rank_correlation"]["value"] > 0.85
    assert value["instruction"] == "light | dark"
    listed = cli("classify", tmp_path / "grey" / "23.png", tmp_path / "grey" / "0.png", "-p", out).stdout.splitlines()
    assert [Path(line.split("  ")[0]).name for line in listed] == ["23.png", "0.png"]


def test_classify_prints_quantities_highest_first(cli, model, grey, tmp_path):
    FeatureRanker("light").fit(load(model), grey[:24]).save(tmp_path / "judge")
    files = [tmp_path / "grey" / f"{i}.png" for i in (3, 20, 12)]
    value = json.loads(cli("classify", *files, "-p", tmp_path / "judge", "-m", model, "--json").stdout)
    assert [Path(entry["path"]).name for entry in value["pictures"]] == ["20.png", "12.png", "3.png"]
    said = [entry["quantities"]["light"] for entry in value["pictures"]]
    assert said == pytest.approx([200, 160, 115], abs=15)
    text = cli("classify", *files, "-p", tmp_path / "judge", "-m", model).stdout
    assert text.splitlines()[0] == f"{files[1]}  light {said[0]:.4g}"


def test_what_cannot_be_ordered_is_said_before_any_work(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(type(encoder), "encode_images", lambda *_, **__: pytest.fail("work was begun"))
    for records, options, why in (
        (valued([None] * 20), {}, "has no values: a table needs a column `value`"),
        (valued([3] * 20), {}, "all 20 values are 3: there is no order"),
        (valued(range(11)), {}, "11 pictures are too few for 4 folds: it takes 12"),
        (valued(["many", *range(19)]), {}, "record '0': the value 'many' is no number"),
        (valued([float("inf"), *range(19)]), {}, "record '0': the value is inf"),
        (valued(range(20)), {"minutes": 0}, "give the methods some time"),
        (valued(range(20)), {"folds": 2}, "folds=2"),
        (valued(range(20)), {"instruction": "a | b | c"}, "both ends as in"),
        (valued(range(20)), {"instruction": "very " * 99}, "tokens"),
        (valued(range(20)), {"candidates": [Candidate("x", "cloob")]}, "cloob does not learn"),
    ):
        with pytest.raises(AdaptationError, match=why):
            choose_rank(encoder, records, tmp_path / "work", **options)


def test_a_table_needs_a_caption_a_label_or_a_value(tmp_path):
    (tmp_path / "t.csv").write_text("image,price\na.png,3\n")
    with pytest.raises(
        TableError, match=r"neither a column 'caption' nor 'label' nor 'value' \(it has: 'image', 'price'\)"
    ):
        table(tmp_path / "t.csv")
