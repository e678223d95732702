"""Every discovered method through its contract, on every kind of tower."""

from __future__ import annotations

from pathlib import Path

import pytest

from ecliptic.core.method import CONTRACTS, PACKAGE, baselines, cards, get
from tests.contracts.checks import CHECKS, Case, run_check
from tests.towers import FAMILIES

PARTS = [(card.slug, name, kind) for card in cards() for name, kind in card.parts]
RUNS = [
    (slug, part, kind, family, rule)
    for slug, part, kind in PARTS
    for family in FAMILIES
    if kind not in ("DataStep",) or family == "clip"  # they see records, never a tower
    for rule in CHECKS[kind]
]


@pytest.mark.parametrize(("slug", "part", "kind", "family", "rule"), RUNS, ids=lambda value: str(value))
def test_contract(slug, part, kind, family, rule):
    case = Case(f"{slug}:{part}", kind, get(f"{slug}:{part}"))
    if reason := run_check(case, rule, FAMILIES[family]()):
        pytest.skip(f"waived: {reason}")


@pytest.mark.parametrize("rule", CHECKS["Predictor"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slug", baselines())
def test_contract_of_a_baseline(slug, family, rule):
    if reason := run_check(Case(slug, "Predictor", get(slug)), rule, FAMILIES[family]()):
        pytest.skip(f"waived: {reason}")


def test_a_baseline_is_no_method_and_says_what_it_is():
    assert {"zero_shot", "linear_probe"} <= set(baselines())
    assert not set(baselines()) & {card.slug for card in cards()}
    assert all(line.endswith(".") for line in baselines().values())


def test_nothing_was_left_out():
    folder = PACKAGE / "methods"
    files = [p for p in folder.glob("*/[!_]*") if p.suffix == ".py" or p.is_dir()]
    assert {card.slug for card in cards()} == {p.stem for p in files}
    assert {slug for slug, _, _ in PARTS} == {p.stem for p in files}
    assert len(PARTS) == sum(len(card.parts) for card in cards()) >= len(files) >= 1
    expected = sum(len(CHECKS[kind]) * (1 if kind == "DataStep" else 3) for _, _, kind in PARTS)
    assert len(RUNS) == expected
    assert set(FAMILIES) == {"clip", "siglip", "dual"}
    assert set(CHECKS) == {*CONTRACTS, "function"}


def test_what_is_imported_is_what_its_file_declares():
    from ecliptic.core import contracts

    for slug, part, kind in PARTS:
        subject = get(f"{slug}:{part}")
        if kind == "function":
            assert callable(subject)
        else:
            assert issubclass(subject, getattr(contracts, kind)), f"{slug}:{part} is no {kind}"
            assert subject.__module__.startswith("ecliptic.methods.")


def test_waivers_name_a_rule_and_give_a_reason():
    for slug, part, kind in PARTS:
        for rule, reason in Case(part, kind, get(f"{slug}:{part}")).waivers.items():
            assert rule in CHECKS[kind], f"{slug}:{part} waives {rule!r}, which is no rule for a {kind}"
            assert len(reason.split()) >= 4, f"{slug}:{part} waives {rule!r}: say why"


def test_methods_import_no_other_method():
    for card in cards():
        files = card.file.parent.rglob("*.py") if card.file.name == "__init__.py" else [card.file]
        for file in files:
            for line in Path(file).read_text(encoding="utf-8").splitlines():
                if "ecliptic.methods" in line and line.lstrip().startswith(("import ", "from ")):
                    assert f"ecliptic.methods.{card.stage}.{card.slug}" in line, f"{file}: {line.strip()}"
