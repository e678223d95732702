"""Discovery reads files: these tests write little packages of methods and read them back."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import ecliptic
from ecliptic.core.method import STAGES, MethodError, Paper, _read_card, cards, find, get, method, stages

GOOD = """
from ecliptic.core.contracts import Predictor, Objective
import a_module_that_does_not_exist  # reading must not import

@method(Paper("A title, "
              "in two parts", arxiv="1234.56789", year=2024), purpose="to test", claim="it is found")
class Found(Predictor):
    pass

class Second(Found):
    pass

class Loss(contracts.Objective):
    pass

class _Hidden(Objective):
    pass

class Helper:
    pass
"""


def write(root: Path, stage: str, slug: str, source: str = GOOD) -> Path:
    (root / stage).mkdir(parents=True, exist_ok=True)
    file = root / stage / f"{slug}.py"
    file.write_text(source)
    return file


def test_a_card_holds_the_literals_and_the_parts(tmp_path):
    file = write(tmp_path, "adapt", "found")
    (card,) = cards(tmp_path)
    assert (card.slug, card.stage, card.name, card.kind) == ("found", "adapt", "Found", "Predictor")
    assert card.paper == Paper("A title, in two parts", "1234.56789", 2024)
    assert (card.purpose, card.claim) == ("to test", "it is found")
    assert card.link == "https://arxiv.org/abs/1234.56789"
    assert card.file == file
    assert card.parts == (("Found", "Predictor"), ("Second", "Predictor"), ("Loss", "Objective"))
    assert card.test_file == "tests/methods/adapt/test_found.py"
    assert card.claim_file == "claims/adapt/found.py"
    assert card.as_dict()["file"] == str(file)


def test_a_base_of_core_tells_its_contract_by_its_name(tmp_path):
    write(tmp_path, "adapt", "found", GOOD.replace("class Found(Predictor)", "class Found(core.TunedPredictor)"))
    (card,) = cards(tmp_path)
    assert (card.name, card.kind) == ("Found", "Predictor")


def test_a_plain_function_is_a_method(tmp_path):
    write(
        tmp_path, "detect", "op", '@method(Paper("T", url="http://x", year=1), purpose="p", claim="c")\ndef op(): ...'
    )
    (card,) = cards(tmp_path)
    assert (card.kind, card.parts, card.link) == ("function", (("op", "function"),), "http://x")


def test_a_folder_is_a_method_and_underscores_are_machinery(tmp_path):
    write(tmp_path / "adapt", "large", "__init__")
    write(tmp_path, "adapt", "_shared", "nothing = 1")
    write(tmp_path, "_private", "other", "nothing = 1")
    assert [(c.slug, c.file.name) for c in cards(tmp_path)] == [("large", "__init__.py")]


def test_order_is_that_of_the_stages_then_of_the_slugs(tmp_path):
    for stage, slug in [("zoo", "a"), ("adapt", "b"), ("adapt", "a2"), ("attend", "z")]:
        write(tmp_path, stage, slug)
    assert [c.slug for c in cards(tmp_path)] == ["z", "a2", "b", "a"]
    assert list(stages(tmp_path)) == ["attend", "adapt", "zoo"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", "found 0"),
        (GOOD + GOOD, "found 2"),
        (GOOD.replace("class Found(Predictor)", "class Found(object)"), "derives from none"),
        (GOOD.replace('"to test"', "PURPOSE"), "purpose must be a literal"),
        (GOOD.replace('"to test"', '" "'), "needs purpose="),
        (GOOD.replace(', claim="it is found"', ""), "needs purpose="),
        (GOOD.replace(', claim="it is found"', ', other="it is found"'), "needs purpose="),
        (GOOD.replace(', arxiv="1234.56789"', ""), "needs arxiv="),
        (GOOD.replace(", year=2024", ""), "title and a year"),
        (GOOD.replace("Paper(", "Journal("), "takes Paper"),
        ("def broken(:", "cannot read"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, source, message):
    write(tmp_path, "adapt", "bad", source)
    with pytest.raises(MethodError, match=message) as error:
        cards(tmp_path)
    assert "bad.py" in str(error.value)


def test_a_slug_belongs_to_one_stage(tmp_path):
    write(tmp_path, "adapt", "twin")
    write(tmp_path, "segment", "twin")
    with pytest.raises(MethodError, match="two methods are called 'twin'"):
        cards(tmp_path)


def test_errors_say_what_to_type_next(tmp_path):
    write(tmp_path, "pretrain", "cloob")
    with pytest.raises(MethodError, match=r"no method 'clob'; did you mean cloob\?"):
        find("clob", tmp_path)
    with pytest.raises(MethodError, match="`ecliptic methods` lists them"):
        find("xyzzy", tmp_path)
    assert find("CLOOB", tmp_path).slug == "cloob"


def test_get_imports_on_demand():
    from ecliptic.methods.adapt.gda import Gda, GdaUnlabelled

    assert get("gda") is Gda
    assert get("gda:GdaUnlabelled") is GdaUnlabelled
    with pytest.raises(MethodError, match="gda has no part 'Nothing'; it has Gda"):
        get("gda:Nothing")
    assert Gda.card.paper == find("gda").paper  # what runs is what the file says
    assert (Gda.card.purpose, Gda.card.claim) == (find("gda").purpose, find("gda").claim)


def test_methods_stays_callable_once_a_method_was_imported():
    get("gda")
    assert [c.slug for c in ecliptic.methods()] == [c.slug for c in cards()]


MULTILINE = """
class Base(
    Predictor,
):
    '''Body (with an odd bracket.'''
    @property
    def x(self): ...
@method(
    Paper(
        "T",
        arxiv="1",
        year=2,
    ),
    purpose="p",
    claim="c",
)
@dataclass(frozen=True)
class Main(
    Base,
):
    y: int = 3
def helper(): ...
"""
CONFUSING = (
    '''"""Docs that hold code:
@method(
class Nothing(
"""
'''
    + MULTILINE
)


@pytest.mark.parametrize(
    "source", [GOOD, MULTILINE, CONFUSING, MULTILINE.replace("class Main(\n    Base,\n)", "def main()")]
)
def test_the_quick_reading_says_what_the_whole_file_says(tmp_path, source):
    file = write(tmp_path, "adapt", "m", source)
    assert cards(tmp_path) == [_read_card(file, "adapt", "m", quick=False)]


def test_the_quick_reading_is_right_about_every_method():
    assert cards() == [_read_card(c.file, c.stage, c.slug, quick=False) for c in cards()]


def test_the_decorator_gives_back_what_it_was_given():
    def op() -> None: ...

    assert method(Paper("T", "1", 2000), purpose="p", claim="c")(op) is op


def test_every_stage_folder_is_known_and_says_what_it_is_for():
    assert set(stages()) <= set(STAGES)
    assert all(stages().values())


def test_every_method_has_its_test_and_its_claim():
    root = Path(__file__).resolve().parents[2]
    assert cards(), "discovery found nothing"
    missing = [f for card in cards() for f in (card.test_file, card.claim_file) if not (root / f).is_file()]
    assert not missing


def test_listing_imports_neither_torch_nor_a_method_and_is_quick(tmp_path):
    for i in range(65):
        write(tmp_path, "adapt", f"m{i}", GOOD + "\nx = [1, 2, 3]" * 250)
    code = (
        "import sys, pathlib; from ecliptic.core.method import cards\n"
        f"assert len(cards(pathlib.Path({str(tmp_path)!r}))) == 65 and cards()\n"
        "assert not {'torch', 'numpy', 'transformers', 'ecliptic.methods'} & set(sys.modules), sorted(sys.modules)"
    )
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(Path(ecliptic.__file__).parents[1])}
    )
    assert time.perf_counter() - start < 2.0  # 0.1 s on an idle machine; slack for a busy one
