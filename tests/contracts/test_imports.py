"""Every module of the package imports, alone and without a warning of our own."""

import json
import subprocess
import sys

from ecliptic.core.method import PACKAGE

SCRIPT = """
import importlib, json, sys, warnings
seen = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name in json.loads(sys.argv[1]):
        importlib.import_module(name)
        seen.append(name)
ours = [f"{w.filename}:{w.lineno}: {w.message}" for w in caught if "ecliptic" in w.filename]
print(json.dumps({"seen": seen, "warnings": ours}))
"""


def modules() -> list[str]:
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = list(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        if parts[-1] != "__main__":
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def test_every_module_imports_without_warnings():
    names = modules()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(names)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seen"] == names
    assert len(names) == len([f for f in PACKAGE.rglob("*.py") if f.name != "__main__.py"])
    assert {"ecliptic", "ecliptic.core.method", "ecliptic.methods.adapt.gda"} <= set(names)
    assert not found["warnings"]


def test_core_and_ops_know_no_method():
    for layer, above in {
        "ops": ("core", "data", "eval", "methods", "apps"),
        "core": ("data", "eval", "methods", "apps"),
        "data": ("eval", "methods", "apps"),
        "eval": ("methods", "apps"),
        "methods": ("apps",),
    }.items():
        for file in (PACKAGE / layer).rglob("*.py"):
            for line in file.read_text(encoding="utf-8").splitlines():
                if line.lstrip().startswith(("import ecliptic", "from ecliptic")):
                    for name in above:
                        assert f"ecliptic.{name}" not in line, f"{file.relative_to(PACKAGE)}: {line.strip()}"
