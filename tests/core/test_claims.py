"""The claim harness on small claims written to a temporary checkout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ecliptic.core import claims
from ecliptic.core.claims import Claim, ClaimError, Gate, check, effect, is_stale, judge, run_claim, table, why_stale
from ecliptic.core.method import MethodError

METHOD = """
from ecliptic.ops.gaussian import precision
@method(Paper("A | title", arxiv="1", year=2024), purpose="to test", claim="it works")
class Toy(Predictor): ...
"""
CLAIM = '''
"""Doc."""
from pathlib import Path
from ecliptic.core.claims import Claim
CLAIM = Claim("ours is twice theirs", {"ours": 2.0, "theirs": 1.0, "without": 1.05}, "ours", "theirs", 1.5,
              seeds=(0, 1, 2), control="without", control_margin=1.1)
def run(factor, seed):
    with (Path(__file__).parent / "calls.txt").open("a") as log:
        log.write(f"{factor} {seed}\\n")
    return factor * (seed + 1)
'''


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "methods/adapt/toy.py", METHOD)
    write(tmp_path / "methods/adapt/__init__.py", '"""Fit."""')
    write(tmp_path / "claims/adapt/toy.py", CLAIM)
    return tmp_path


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def run(root, **options):
    from ecliptic.core.method import _cards

    _cards.cache_clear()
    return run_claim("toy", root=root, methods=root / "methods", **options)


def calls(root):
    log = root / "claims/adapt/calls.txt"
    return log.read_text().splitlines() if log.exists() else []


# Judging


def claim(*gates, **options):
    return Claim("c", ("a", "b", "c"), gates=gates, seeds=(0, 1), **options)


VALUES = {
    "a": {0: {"acc": 0.9, "loss": 1.0}, 1: {"acc": 0.7, "loss": 2.0}},
    "b": {0: {"acc": 0.6, "loss": 2.0}, 1: {"acc": 0.5, "loss": 4.0}},
    "c": {0: {"acc": 0.5}, 1: {"acc": 0.6}},
}


def verdict(*gates, **options):
    return judge(claim(*gates, **options), VALUES, (0, 1))


def test_difference_against_the_best_rival_of_each_seed():
    found = verdict(Gate("g", "a", ("b", "c"), 0.19, "acc", mode="difference"))
    (gate,) = found["gates"]
    assert gate["effects"] == pytest.approx([0.3, 0.1])
    assert (gate["mean"], gate["value"], gate["baseline"]) == pytest.approx((0.2, 0.8, 0.6))
    assert gate["holds"]
    assert found["holds"]
    # half width: t(1) = 12.706 times the standard error 0.1
    assert (gate["low"], gate["high"]) == pytest.approx((0.2 - 1.2706, 0.2 + 1.2706))


def test_ratio_and_lower_is_better():
    assert effect(3.0, 2.0, "ratio") == 1.5
    assert effect(2.0, 3.0, "ratio", lower=True) == 1.5
    assert effect(2.0, 3.0, "difference", lower=True) == 1.0
    assert effect(1.0, 0.0, "ratio") == float("inf")
    assert effect(0.0, 0.0, "ratio") == 1.0
    gate = verdict(Gate("g", "a", "b", 2.0, "loss", lower=True))["gates"][0]
    assert gate["effects"] == [2.0, 2.0]
    assert gate["holds"]


def test_margins_are_reached_or_not():
    for margin, holds in [(0.25, True), (0.2501, False)]:  # binary fractions: the difference is exact
        values = {"a": {0: {"x": 0.75}, 1: {"x": 0.5}}, "b": {0: {"x": 0.5}, 1: {"x": 0.25}}}
        found = judge(claim(Gate("g", "a", "b", margin, "x", mode="difference")), values, (0, 1))
        assert (found["holds"], found["verdict"]) == (holds, "holds" if holds else "fails")


def test_controls_must_not_reach():
    good = Gate("effect", "a", "b", 0.1, "acc", mode="difference")
    assert verdict(good, Gate("c", "c", "b", 0.05, "acc", "control", "difference"))["holds"]
    found = verdict(good, Gate("c", "a", "b", 0.05, "acc", "control", "difference"))
    assert (found["holds"], found["verdict"]) == (False, "fails")


def test_without_headroom_nothing_is_concluded():
    found = verdict(
        Gate("effect", "a", "b", 0.1, "acc", mode="difference"),
        Gate("room", "c", "b", 0.3, "acc", "headroom", "difference"),
    )
    assert (found["holds"], found["verdict"]) == (False, "no headroom")


def test_reported_gates_do_not_decide_but_are_told():
    found = verdict(
        Gate("effect", "a", "b", 0.1, "acc", mode="difference"),
        Gate("hoped", "b", "a", 0.1, "acc", mode="difference", gate=False),
    )
    assert found["holds"]
    assert found["gates"][1]["holds"] is False


def test_missing_figures_are_not_measured_and_do_not_hold():
    found = verdict(Gate("effect", "a", "b", 0.1, "acc", mode="difference"), Gate("g", "c", "b", 0, "loss"))
    assert (found["holds"], found["verdict"]) == (False, "not fully measured")
    assert found["gates"][1]["holds"] is None


def test_the_short_form_is_an_effect_and_a_control():
    short = Claim("s", {"x": 1, "y": 2, "z": 3}, "x", "y", 1.15, control="z")
    one, two = short.all_gates
    assert (one.better, one.than, one.margin, one.kind) == ("x", "y", 1.15, "effect")
    assert (two.better, two.than, two.margin, two.kind) == ("z", "y", 1.15, "control")
    assert short.mode == "ratio"
    assert short.subject("y") == 2
    assert Claim("s", ("x", "y"), "x", "y", 1.0).subject("y") == "y"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ("x", "y"), "better": "x", "than": "z", "margin": 1.0}, "do not exist: z"),
        ({"arms": ("x", "y"), "better": "x", "than": "y"}, "needs margin="),
        ({"arms": ("x", "y")}, "either gates="),
        ({"arms": ("x", "y"), "better": "x", "than": "y", "margin": 1.0, "seeds": ()}, "seeds"),
        ({"arms": ("x", "y"), "better": "x", "than": "y", "margin": 1.0, "seeds": (1, 1)}, "seeds"),
        ({"arms": ("x", "y"), "gates": (Gate("g", "x", "y", 1.0, kind="control"),)}, "nothing to hold"),
        ({"arms": ("x", "y"), "gates": (Gate("g", "x", "y", 1.0, gate=False),)}, "nothing to hold"),
    ],
)
def test_malformed_claims_are_refused(options, message):
    with pytest.raises(ClaimError, match=message):
        Claim("s", **options)


# Running


def test_a_result_holds_what_it_takes_to_repeat_it(root):
    result = run(root)
    assert json.loads((root / "claims/results/toy.json").read_text()) == result
    assert result["holds"]
    assert result["values"]["ours"] == {"0": {"score": 2.0}, "1": {"score": 4.0}, "2": {"score": 6.0}}
    assert result["seeds"] == [0, 1, 2]
    assert result["command"] == "python -m ecliptic.core.claims run toy"
    assert any(name.endswith("ecliptic/ops/gaussian.py") for name in result["sources"])
    assert {"methods/adapt/toy.py", "claims/adapt/toy.py"} < set(result["sources"])
    assert len(result["sources"]) == 3
    assert result["versions"]["torch"]
    assert result["machine"]["cores"] >= 1
    assert result["machine"]["threads"] == 1
    assert result["finished"].startswith("20")
    assert len(calls(root)) == 9
    assert not (root / "claims/results/.partial/toy.json").exists()


def test_measured_cells_are_kept_until_the_code_changes(root):
    run(root)
    run(root)
    assert len(calls(root)) == 9
    run(root, fresh=True)
    assert len(calls(root)) == 18
    write(root / "claims/adapt/toy.py", CLAIM.replace("2.0", "3.0"))
    assert run(root)["values"]["ours"]["0"] == {"score": 3.0}
    assert len(calls(root)) == 27


def test_an_interrupted_run_resumes(root):
    broken = CLAIM.replace(
        "    return",
        "    if (Path(__file__).parent / 'stop').exists() and factor < 2: raise KeyboardInterrupt\n    return",
    )
    write(root / "claims/adapt/toy.py", broken)
    write(root / "claims/adapt/stop", "")
    with pytest.raises(KeyboardInterrupt):
        run(root)
    assert not (root / "claims/results/toy.json").exists()
    (root / "claims/adapt/stop").unlink()
    assert run(root)["holds"]
    assert len(calls(root)) == 3 + 1 + 6  # ours, the interrupted one, and the rest


def test_other_seeds_are_preliminary(root):
    result = run(root, seeds=(5,))
    assert result["holds"]
    assert result["command"].endswith("--seeds 5")
    assert not (root / "claims/results/toy.json").exists()
    assert (root / "claims/results/.partial/toy.preliminary.json").exists()
    more = run(root, seeds=(0, 1, 2, 3))  # all of its own and one more: a full result
    assert json.loads((root / "claims/results/toy.json").read_text()) == more


def test_a_failing_claim_stays_with_its_note(root):
    write(root / "claims/adapt/toy.py", CLAIM.replace("1.5,", "2.5, note='more data was tried',"))
    result = run(root)
    assert (result["holds"], result["verdict"], result["note"]) == (False, "fails", "more data was tried")
    assert "**no**" in table(root, root / "methods")


def test_bad_claim_files_are_named(root):
    for text, message in [
        ("CLAIM = 1", "must define CLAIM"),
        (CLAIM.replace("def run", "def other"), "must define CLAIM"),
        (CLAIM.replace("return factor", "return float('nan')"), "not finite for score"),
    ]:
        write(root / "claims/adapt/toy.py", text)
        with pytest.raises(ClaimError, match=message):
            run(root)
    (root / "claims/adapt/toy.py").unlink()
    with pytest.raises(ClaimError, match=r"has no claim: write claims/adapt/toy\.py"):
        run(root)
    with pytest.raises(MethodError, match="did you mean toy"):
        run_claim("toyy", root=root, methods=root / "methods")
    with pytest.raises(ClaimError, match="from a checkout"):
        run_claim("toy", root=root / "methods")


# Staleness


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("x = 1\n", "x = 2\n", False),
        ("x = 1\n", "x  =  1  # why\n\n\n", True),
        ('"""Doc."""\nx = 1\n', "x = 1\n", True),
        ('def f():\n    """Doc."""\n    return 1\n', "def f():\n    return 1\n", True),
        ('x = "text"\n', 'x = "other"\n', False),
        ("f(1, 2)\n", "f(\n    1,\n    2,\n)\n", True),
        ("if a:\n    b()\n    c()\n", "if a:\n    b()\nc()\n", False),
        ("x = f'{a} b'\n", "x = f'{a}  b'\n", False),
        ("x = f'{a:>{w}} b {f(\"c\")}'\n", "x = (f'{a:>{w}} b {f(\"c\")}')\n", False),
        ("x = 1; y = 2\n", "x = 1\ny = 2\n", False),
    ],
)
def test_the_digest_sees_code_and_nothing_else(tmp_path, old, new, same):
    write(tmp_path / "a.py", old)
    write(tmp_path / "b.py", new)
    assert (claims.code_digest(tmp_path / "a.py") == claims.code_digest(tmp_path / "b.py")) == same


def test_results_go_stale_with_method_claim_and_ops(root):
    result = run(root)
    where = {"root": root, "methods": root / "methods"}
    assert not is_stale(result, **where)
    write(root / "methods/adapt/toy.py", METHOD + "# a remark\n")
    assert not is_stale(result, **where)
    write(root / "methods/adapt/toy.py", METHOD + "more = 1\n")
    assert why_stale(result, **where) == "changed since it was measured: methods/adapt/toy.py"
    write(root / "methods/adapt/toy.py", METHOD)
    ops = next(name for name in result["sources"] if name.endswith("gaussian.py"))
    changed = result | {"sources": result["sources"] | {ops: "0"}}
    assert why_stale(changed, **where) == f"changed since it was measured: {ops}"
    (root / "claims/adapt/toy.py").unlink()
    assert why_stale(result, **where) == "claims/adapt/toy.py is gone"
    assert why_stale(result | {"slug": "nothing"}, **where) == "there is no method nothing any more"


def test_the_weights_of_a_model_count_as_its_source(root, monkeypatch):
    package = root / "package"
    write(package / "models/weights/tiny/model.safetensors", "one")
    write(package / "models/weights/offline.safetensors", "two")
    write(
        root / "claims/adapt/toy.py",
        CLAIM + "def model():\n    return core.load('tiny'), load('hub/name'), open('offline')\n",
    )
    monkeypatch.setattr(claims, "PACKAGE", package)
    where = {"root": root, "methods": root / "methods"}
    result = run(root)
    assert [name for name in result["sources"] if name.endswith("safetensors")] == [
        "package/models/weights/tiny/model.safetensors"
    ]
    write(package / "models/weights/offline.safetensors", "three")
    assert not is_stale(result, **where)
    write(package / "models/weights/tiny/model.safetensors", "four")
    assert why_stale(result, **where) == "changed since it was measured: package/models/weights/tiny/model.safetensors"


def test_check_finds_what_is_out_of_date(root):
    methods = root / "methods"
    assert [p.split(";")[0] for p in check(root, methods)] == ["toy: no result", "METHODS.md is out of date"]
    run(root)
    (root / "METHODS.md").write_text(table(root, methods))
    assert check(root, methods) == []
    write(root / "claims/adapt/toy.py", CLAIM + "x = 1\n")
    problems = check(root, methods)
    assert problems[0].startswith("toy: changed since it was measured: claims/adapt/toy.py")
    assert "(stale)" in table(root, methods)
    write(root / "claims/adapt/toy.py", CLAIM)
    write(root / "claims/results/gone.json", "{}")
    assert check(root, methods) == ["claims/results/gone.json: there is no such method"]


def test_the_table_tells_measured_figures(root):
    text = table(root, root / "methods")
    assert "| `toy` | [A \\| title](https://arxiv.org/abs/1) (2024) | to test | it works | not run yet |" in text
    run(root)
    text = table(root, root / "methods")
    assert "holds: 2 of 2 gates, 3 seeds" in text
    assert "ours is twice theirs: 4 against 2, x2 [x2, x2]" in text
    assert "| control | control without does not show it | without against theirs |" in text
    assert "at most x1.1 | yes |" in text


# The command line, on this checkout


def test_command_line_errors_are_short():
    for arguments, message in [
        (["run", "gdaa"], "error: no method 'gdaa'; did you mean gda?"),
        (["run"], "run needs either slugs or --all"),
        ([], "say run SLUG"),
    ]:
        done = subprocess.run(
            [sys.executable, "-m", "ecliptic.core.claims", *arguments],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(claims.PACKAGE.parent)},
        )
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_checking_does_not_import_torch():
    code = "import sys; from ecliptic.core.claims import check; check(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(claims.PACKAGE.parent)})


# Repeating


def test_a_published_figure_is_measured_again(root):
    run(root)
    options = {"root": root, "methods": root / "methods"}
    before = claims.result_file(root, "toy").read_bytes()
    assert claims.repeat("toy", 1, **options) == []
    assert len(calls(root)) == 9 + 3
    assert claims.result_file(root, "toy").read_bytes() == before
    result = json.loads(before)
    result["values"]["ours"]["1"]["score"] = 4.2  # measured: 2 * (1 + 1)
    claims.result_file(root, "toy").write_text(json.dumps(result))
    (difference,) = claims.repeat("toy", 1, **options)
    assert "ours, seed 1, score was 4.2000, is 4.0000" in difference
    assert claims.repeat("toy", 2, **options) == []


def test_every_published_seed_comes_round(root):
    run(root)
    days = [claims.turn(1, day, root, root / "methods") for day in range(3)]
    assert sorted(days) == [[("toy", 0)], [("toy", 1)], [("toy", 2)]]
    assert claims.turn(5, 0, root, root / "methods") == [("toy", 0), ("toy", 1), ("toy", 2)]
    claims.result_file(root, "toy").unlink()
    assert claims.turn(1, 0, root, root / "methods") == []
    assert "no published result" in claims.repeat("toy", 0, root=root, methods=root / "methods")[0]
