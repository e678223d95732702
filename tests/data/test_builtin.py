"""The built-in sources: counts, fields and the rules that clean them. Skipped where the packages are not on the machine."""

import os
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecliptic.data import debian
from ecliptic.data.clipart import clean_title, clipart, read_metadata, words_of_file
from ecliptic.data.debian import SourceUnavailable, package_folder
from ecliptic.data.photos import photos
from ecliptic.data.records import Records
from ecliptic.data.stamps import read_captions, stamps
from ecliptic.data.textiles import package_data, textiles
from ecliptic.data.wordnet import Synset, WordNet, parse, wordnet


def need(package: str, inside: str) -> None:
    try:
        package_folder(package, inside, fetch=False)
    except SourceUnavailable:
        pytest.skip(f"the Debian package {package} is neither installed nor in the cache")


def check(records: Records, *fields: str) -> None:
    """What every source promises."""
    ids = records.ids
    assert len(set(ids)) == len(ids) == len(records)
    assert all(id.startswith(f"{records.name}/") for id in ids)
    assert all(os.path.isfile(path) for path in records.column("image"))  # noqa: PTH113 (8,000 of them)
    for field in fields:
        assert all(records.column(field)), field
    for i in (0, len(records) // 2, -1):
        assert records[i]["image"].mode == "RGB"


# fetching


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ECLIPTIC_CACHE", str(tmp_path))
    return tmp_path


def test_a_package_installed_on_the_system_is_used(cache: Path) -> None:
    (cache / "root" / "usr" / "share" / "thing").mkdir(parents=True)
    found = package_folder("thing-data", "usr/share/thing", system=cache / "root")
    assert found == cache / "root" / "usr" / "share" / "thing"


def test_fetching_unpacks_once_without_root(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], cwd: Path, **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        if command[0] == "apt-get":
            (cwd / "thing_1.deb").touch()
        else:
            inside = Path(command[3]) / "usr" / "share" / "thing"
            inside.mkdir(parents=True)
            (inside / "data").write_text("x")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(debian.subprocess, "run", run)
    monkeypatch.setattr(debian.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    for _ in range(2):
        found = package_folder("thing", "usr/share/thing", system=cache / "none")
        assert found == cache / "debian" / "thing" / "usr" / "share" / "thing"
        assert (found / "data").read_text() == "x"
    assert [command[:2] for command in ran] == [["apt-get", "download"], ["dpkg", "-x"]]
    assert sorted(path.name for path in (cache / "debian").iterdir()) == ["thing", "thing.lock"]


def test_where_fetching_is_impossible_the_error_says_what_to_install(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = r"sudo apt-get install thing.*dpkg -x"
    monkeypatch.setattr(debian.shutil, "which", lambda tool: None)
    with pytest.raises(SourceUnavailable, match=rf"no apt-get and no dpkg.*{words}"):
        package_folder("thing", "usr/share/thing", system=cache)
    monkeypatch.setattr(debian.shutil, "which", lambda tool: tool)

    def fails(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 100, "", "W: something\nE: Unable to locate package thing\n")

    monkeypatch.setattr(debian.subprocess, "run", fails)
    with pytest.raises(SourceUnavailable, match=rf"Unable to locate package thing.*{words}"):
        package_folder("thing", "usr/share/thing", system=cache)
    with pytest.raises(SourceUnavailable, match="not asked for"):
        package_folder("thing", "usr/share/thing", fetch=False, system=cache)
    assert [path.name for path in (cache / "debian").iterdir()] == ["thing.lock"]


# clip art


def test_clipart() -> None:
    need("openclipart-png", "usr/share/openclipart/png")
    need("openclipart-svg", "usr/share/openclipart/svg")
    records = clipart()
    assert len(records) == 8121
    check(records, "caption", "label", "category", "original")
    assert len(records.classes) == 22
    assert len(clipart(duplicates=False)) == 6900
    assert set(records.column("original")) <= set(records.ids)
    titled = clipart(titled=True)
    assert 3000 < len(titled) < 4500
    by_id = dict(zip(records.ids, range(len(records))))
    saber = records.peek(by_id["clipart/tools/weapons/lightsabers"])
    assert (saber["title"], saber["caption"]) == ("Clipart by Nicu Buculei - piggybank", "lightsabers")
    muffin = records.peek(by_id["clipart/food/breads_and_carbs/muffin3_bw"])
    assert muffin["caption"] == "Blueberry Muffin (black and white)"
    assert muffin["category"] == ["food", "breads_and_carbs"]
    assert "muffin" in muffin["keywords"]
    assert not any("hash" in word for words in records.column("keywords") for word in words if word.startswith("hash("))


@pytest.mark.parametrize(
    ("title", "keywords", "shared", "expected"),
    [
        ("Turkey on Platter", [], 1, "Turkey on Platter"),
        ("magnifying_glass", [], 1, "magnifying glass"),
        ("smiley111", [], 1, "smiley"),
        ("arrow 04", [], 1, "arrow"),
        ("pill-button-green", [], 1, "pill button green"),
        ("hat - clothing", [], 5, "hat - clothing"),
        ("Muffin (B and W)", [], 1, "Muffin (black and white)"),
        ("Part of the Flat Icon Collection (Wed Aug 25 23:29:46 2004)", ["icons"], 599, ""),
        ("Clipart by Nicu Buculei - piggybank", [], 9, ""),
        ("card", ["card", "white"], 226, "card"),
        ("Sallite", ["map"], 15, ""),
        ("", [], 62, ""),
        ("12", [], 1, ""),
        ("drawn by a@b.org", [], 1, "drawn by"),
    ],
)
def test_titles(title: str, keywords: list[str], shared: int, expected: str) -> None:
    assert clean_title(title, keywords, shared) == expected


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("shapes/stars/star_63pt11step", "star"),
        ("computer/icons/flat-theme/action/text_center", "text center"),
        ("transportation/aiga-symbols/aiga_stairs_down1", "stairs down"),
        ("computer/icons/70a021", "icons"),
        ("computer/icons/fileOpen", "file Open"),
    ],
)
def test_file_names_as_words(stem: str, expected: str) -> None:
    assert words_of_file(stem) == expected


def test_svg_metadata(tmp_path: Path) -> None:
    work = (
        "<cc:Work rdf:about=''><dc:title>Chodovian&amp;#39;s\n Dog</dc:title><dc:description>x@y.org</dc:description>"
        "<rdf:li>animal</rdf:li><rdf:li></rdf:li><rdf:li>HASH(0x85)</rdf:li><rdf:li>big_dog</rdf:li><rdf:li>animal</rdf:li>"
        "<dc:publisher><dc:title>Somebody</dc:title></dc:publisher></cc:Work>"
    )
    path = tmp_path / "a.svg"
    path.write_text(f"<svg>{' ' * 20000}<metadata>{work}</metadata></svg>")
    assert read_metadata(path) == ("Chodovian's Dog", "", ["animal", "big dog"])
    path.write_text("<svg></svg>")
    assert read_metadata(path) == read_metadata(tmp_path / "gone.svg") == ("", "", [])


# stamps


def test_stamps() -> None:
    need("tuxpaint-stamps-default", "usr/share/tuxpaint/stamps")
    records = stamps()
    assert len(records) == 538
    check(records, "caption", "label", "category", "captions")
    assert Counter(records.column("label")).most_common(2) == [("animals", 146), ("town", 78)]
    assert "symbols" not in records.classes
    everything = stamps(symbols=True)
    assert len(everything) == 785
    kinds = Counter("/".join(path[:2]) for path in everything.column("category") if path[0] == "symbols")
    assert kinds["symbols/alphabets"] == 158
    assert sum(kinds.values()) == 247
    apple = records.filter(lambda record: record["id"].endswith("fruit/apple_fuji"))[0]
    assert apple["caption"] == apple["captions"]["en"] == "A “Fuji” apple."
    assert len(apple["captions"]) > 40
    image, mask = np.asarray(apple["image"]), np.asarray(apple["mask"])
    assert mask.shape == image.shape[:2]
    assert (image[mask == 0] == 255).all()
    assert 0.2 < (mask > 127).mean() < 0.95


def test_stamp_masks_are_never_empty() -> None:
    need("tuxpaint-stamps-default", "usr/share/tuxpaint/stamps")
    for record in stamps()[::20]:
        assert np.asarray(record["mask"]).max() > 200, record["id"]


def test_stamp_captions(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(
        "A cat. \nde.utf8=Eine Katze.\nca@valencia.utf8=Un gat.\nfr.utf8=\nnonsense\npt_BR.utf8=a=b\n", "utf-8"
    )
    assert read_captions(path) == {"en": "A cat.", "de": "Eine Katze.", "ca@valencia": "Un gat.", "pt_BR": "a=b"}


# photographs and textiles


def test_photos() -> None:
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    records = photos()
    assert len(records) == 22
    check(records, "caption")
    assert len(records.classes) == 22
    assert {"cat", "coffee cup", "motorcycle", "rocket", "astronaut", "photographer", "horse"} <= set(records.classes)
    assert all(image.width >= 100 for image in (record["image"] for record in records))
    assert len(photos(extras=True)) == 26


def test_textiles() -> None:
    try:
        records = textiles()
    except SourceUnavailable as error:
        pytest.skip(str(error))
    assert Counter(records.column("label")) == {"nominal": 1000, "local": 500, "global": 500}
    assert Counter(records.column("quality")) == {"good": 1000, "defect": 1000}
    check(records, "caption")
    assert records[0]["image"].size == (250, 250)


def test_what_is_not_installed_is_named() -> None:
    with pytest.raises(SourceUnavailable, match=r"come inside some-thing: pip install 'ecliptic\[pictures\]'"):
        package_data("no_such_module_here", "some-thing")


# WordNet


def test_wordnet_parsing(tmp_path: Path) -> None:
    lines = (
        "  1 This is the licence.  \n"
        "02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 002 @ 02083346 n 0000 ~ 01322604 n 0000 "
        '| a canine; "the dog barked"; "dogs bark"  \n'
        "00003131 00 s 01 adducent(p) 0 001 & 00003020 a 0000 | pulling  \n"
        "00001740 29 v 01 breathe 0 000 01 + 02 00 | draw air  \n"
        "09999999 18 n 01 Rex 0 001 @i 02084071 n 0000 | a dog  \n"
    )
    (tmp_path / "data.x").write_text(lines, encoding="utf-8")
    dog, adducent, breathe, rex = parse(tmp_path / "data.x")
    expected = ("dog", "domestic dog", "Canis familiaris")
    assert dog == Synset("n02084071", expected, "a canine", ("the dog barked", "dogs bark"), ("n02083346",))
    assert (adducent.id, adducent.lemmas, adducent.hypernyms) == ("a00003131", ("adducent",), ())
    assert (breathe.pos, rex.hypernyms) == ("v", ("n02084071",))
    net = WordNet({synset.id: synset for synset in (dog, adducent, breathe, rex)})
    assert net.find("Domestic_Dog") == [dog]
    assert net.find("cat") == []
    assert net.ancestors(rex.id) == [dog]
    assert net.descendants(dog.id) == [rex]
    assert net.words()[:2] == ["adducent", "breathe"]


def test_wordnet() -> None:
    need("wordnet-base", "usr/share/wordnet")
    nouns = wordnet("n")
    assert len(nouns) == 82115  # wnstats(7WN)
    assert "n02084071" in {synset.id for synset in nouns.find("dog")}
    up = [synset.lemmas[0] for synset in nouns.ancestors("n02123045")]  # tabby
    assert (up[0], set(up[1:3]), up[-1]) == ("domestic cat", {"cat", "domestic animal"}, "entity")
    assert "n02123045" in {synset.id for synset in nouns.descendants("n02121808")}
    with pytest.raises(ValueError, match="n, v, a and r"):
        wordnet("x")


def test_a_whole_picture_of_each_source_is_plain() -> None:
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    assert type(photos()[0]["image"]) is Image.Image
