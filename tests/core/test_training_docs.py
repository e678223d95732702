"""The Python of docs/training.md runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.filterwarnings("ignore::ecliptic.core.guard.ForgettingWarning")
def test_the_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(encoding="utf-8"), re.S)
    assert len(snippets) == 4
    known: dict[str, object] = {}
    exec(compile("\n".join(snippets), "training.md", "exec"), known)  # our own file
    assert (tmp_path / "adapters" / "adapter_model.safetensors").exists()
    assert known["same"].id == known["tuned"].encoder.id
