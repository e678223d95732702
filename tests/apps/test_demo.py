"""The demonstration with a tiny random model: every section is there, and what it says follows from what was measured."""

from __future__ import annotations

import json
import re
import warnings
from typing import Any

import pytest

from ecliptic.apps import demo
from ecliptic.apps.demo import QUERIES, STAMP_QUERIES
from ecliptic.core.encoder import TruncationWarning, load
from ecliptic.data.photos import photos


@pytest.fixture(scope="module")
def ran(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run without the Debian sources."""
    folder = tmp_path_factory.mktemp("demo")
    lines: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        report = demo.run(
            folder / "report.html",
            folder / "work",
            model,
            load=load,
            say=lines.append,
            fetch=False,
            shots=2,
            held_out=12,
            settings={"views": 1},
        )
    return {"report": report, "lines": lines, "folder": folder, "page": (folder / "report.html").read_text()}


def test_the_page_has_every_section_and_its_commands(ran):
    titles = [section.title for section in ran["report"].sections]
    assert titles == [
        "Find pictures by text",
        "Name pictures by words alone",
        "Show where in the picture",
        "Learn from a handful of labelled pictures",
        "What did not work",
    ]
    for verb in ("index", "search", "classify", "highlight", "adapt"):
        assert f"ecliptic {verb} " in ran["page"]
    assert "<script" not in ran["page"]
    assert not re.search(r'(src|href)="https?:', ran["page"])  # one file that needs nothing else


def test_failures_are_told(ran):
    """A random model names next to nothing right, and the page says so."""
    section = ran["report"].sections[-1]
    told = " ".join(str(part) for part in section.content)
    assert "Photographs that were named wrong" in told
    assert "stamps could not be had" in told


def test_numbers_are_those_of_the_sections(ran):
    report = ran["report"]
    assert report["photographs_named_right"].n == 22
    assert report["search.first_hit_right"].n == report["found_among_5_hits"].n == len(QUERIES)
    assert report["textiles_right_after_learning"].n == 12
    saved = json.loads((ran["folder"] / "work" / "report.json").read_text())
    assert saved["textiles.gain"]["value"] == report["textiles.gain"].value


def test_hits_are_judged_by_their_descriptions(ran):
    """Every picture that is shown was recognised as one of those gathered (relative and absolute names are the same)."""
    galleries = ran["report"].sections[0].content
    captions = [picture.caption for part in galleries if hasattr(part, "pictures") for picture in part.pictures]
    assert len(captions) == (len(QUERIES) + 1) * demo.SHOWN
    assert all(captions)


def test_progress_is_told_and_ends_with_the_place(ran):
    assert ran["lines"][-1].endswith(str((ran["folder"] / "report.html").resolve()))
    assert all(re.match(r"\[ *\d+\.\d s\] ", line) for line in ran["lines"])


def test_a_second_run_finds_its_pictures_again(ran):
    folder = ran["folder"] / "work" / "pictures"
    first = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    demo.gather(folder, None)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")} == first


def test_what_counts_as_right():
    """Each query is right for some photograph or textile, as a whole word and not within another."""
    captions = [*photos().column("caption"), "a grey woven textile without defects"]
    for query in QUERIES:
        assert any(query.accepts(caption) for caption in captions), query.text
    assert len(list(STAMP_QUERIES)) == 8
    insect = next(query for query in STAMP_QUERIES if query.text == "an insect")
    assert insect.accepts("A red Ant.")
    assert not insect.accepts("an elephant")


def test_demo_refuses_a_page_that_is_none(cli, tmp_path):
    assert "name a file that ends in .html" in cli("demo", "--out", tmp_path).stderr
