from __future__ import annotations

import json
from pathlib import Path

import pytest

from ecliptic.data.boxes import BoxesError, boxes_of, read_boxes

BOX = (1.0, 2.0, 30.5, 40.0)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.json", "[[1, 2, 30.5, 40]]", {None: [BOX]}),
        ("a.json", '[{"x0": 1, "y0": 2, "x1": 30.5, "y1": 40, "label": "cat"}]', {None: [BOX]}),
        ("a.json", '{"a.png": [[1, 2, 30.5, 40]], "b.png": []}', {"a.png": [BOX], "b.png": []}),
        ("a.csv", "1,2,30.5,40\n\n1,2,30.5,40\n", {None: [BOX, BOX]}),
        ("a.csv", "x0,y0,x1,y1\n1,2,30.5,40\n", {None: [BOX]}),
        ("a.csv", "\ufeffx0;y0;x1;y1\n1;2;30.5;40\n", {None: [BOX]}),
        ("a.csv", "Path, score, x0, y0, x1, y1\na.png, 0.5, 1, 2, 30.5, 40\nb.png,1,1,2,30.5,40\n",
         {"a.png": [BOX], "b.png": [BOX]}),
        ("a.tsv", "x0\ty0\tx1\ty1\n1\t2\t30.5\t40\n", {None: [BOX]}),
    ],
)  # fmt: skip
def test_forms_that_are_read(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_boxes(tmp_path / name) == expected


def test_what_find_prints_is_read_again(tmp_path):
    value = {"text": "x", "pictures": [{"path": "p/a.png", "size": [50, 50], "boxes": [{"box": BOX, "score": 0.5}]}]}
    (tmp_path / "found.json").write_text(json.dumps(value))
    assert read_boxes(tmp_path / "found.json") == {"p/a.png": [BOX]}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[[1, 2", "not JSON"),
        ("a.json", "[]", "holds no boxes"),
        ("a.json", "7", "holds a int, not boxes"),
        ("a.json", '{"a.png": 3}', "'a.png' is not a list"),
        ("a.json", "[[1, 2, 3]]", r"box 0: four numbers"),
        ("a.json", '[[1, 2, 3, 4], [1, 2, "three", 4]]', r"box 1: four numbers"),
        ("a.json", '[{"x0": 1, "y0": 2}]', r"four numbers"),
        ("a.csv", "", "holds no boxes"),
        ("a.csv", "left,top\n1,2\n", "first line must be x0,y0,x1,y1"),
        ("a.csv", "x0,y0,x1,y1\n1,2,3\n", "line 2: 3 values"),
        ("a.csv", "x0,y0,x1,y1\n1,2,3,wide\n", "line 2: four numbers"),
        ("a.xml", "<box/>", "as .json or .csv, not as .xml"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(BoxesError, match=message):
        read_boxes(tmp_path / name)


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(BoxesError, match="not text"):
        read_boxes(tmp_path / "a.csv")


def test_boxes_go_by_path_then_by_name_then_to_all():
    other = (0.0, 0.0, 1.0, 1.0)
    assert boxes_of({"p/a.png": [BOX], "a.png": [other]}, Path("p/a.png")) == [BOX]
    assert boxes_of({"a.png": [other], None: [BOX]}, Path("p/a.png")) == [other]
    assert boxes_of({None: [BOX]}, Path("p/a.png")) == [BOX]
    assert boxes_of({"b.png": [BOX]}, Path("p/a.png")) == []
