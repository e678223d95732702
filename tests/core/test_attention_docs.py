"""The Python of docs/attention.md runs as it stands, and its figures are those of the benchmark."""

import json
import re
from pathlib import Path

from benchmarks.outliers import MARKS, curves, with_tables

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")


def test_the_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(snippets) >= 3
    known: dict[str, object] = {}
    exec(compile("\n".join(snippets), "attention.md", "exec"), known)  # our own file
    assert known["same"].id == known["tuned"].id
    assert (tmp_path / "outliers.svg").exists()


def test_the_figures_are_the_benchmarks():
    content = json.loads((ROOT / "benchmarks" / "results" / "outliers.json").read_text(encoding="utf-8"))
    assert all(mark in PAGE for mark in MARKS)
    assert with_tables(PAGE, content) == PAGE
    assert (ROOT / "docs" / "outliers.svg").read_text(encoding="utf-8") == curves(content["found"])
