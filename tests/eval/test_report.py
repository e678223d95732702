"""The report as text, JSON and HTML: what is written is what was given, and nothing a data set says can act on the page."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ecliptic.eval import page
from ecliptic.eval.report import (
    BarChart,
    Commands,
    Confusion,
    Gallery,
    Heatmap,
    Heatmaps,
    Number,
    Numbers,
    Picture,
    Reliability,
    Report,
    Section,
    Table,
    join,
)

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&\x1b[31m\u202e[red]"


def photo(size=(120, 90), mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def everything(text="plain", path="missing.png"):
    """A report that uses every content type, with `text` wherever text can stand."""
    number = Number(0.5, 0.4, 0.6, n=10, unit="fraction")
    pictures = [Picture(photo(), text, 0.25, good, text) for good in (True, False, None)]
    return Report(
        text,
        {text: number, "speed.images": Number(12.5, unit=text)},
        tables=[Table([text, "n"], [[text, 3], [None, number]], text)],
        pictures=[*pictures, Picture(path, text, text)],
        figures=[BarChart({text: number, "other": Number(0.2, unit="fraction")}, text, highlight=text)],
        notes=[text],
        commands=[f"ecliptic search '{text}'", f"# {text}"],
        sections=[
            Section(
                text,
                f"{text}\n\n`{text}`",
                text,
                Gallery(pictures, text, small=True),
                Heatmaps([Heatmap(photo(), {text: photo()}, text)], text, text, text),
                Confusion([[3, 1], [0, 2]], [text, "b"], text),
                Reliability([(0.5, number)], text),
                Commands([text], text),
                Numbers({text: number}, text),
            )
            for _ in range(3)
        ],
        subtitle=text,
    )


class Reader(HTMLParser):
    """Collects tags with attributes and visible text; checks that what opens is closed in order."""

    VOID = frozenset({"meta", "img"})
    SELF_CLOSED = frozenset({"rect", "line", "circle", "ellipse"})

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.text = [], [], ""
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in self.SELF_CLOSED
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def test_hostile_text_stays_text_everywhere():
    html = everything(HOSTILE, path=HOSTILE).to_html()
    read = Reader(html)
    assert {tag for tag, _ in read.tags} == {tag for tag, _ in Reader(everything("plain").to_html()).tags}
    assert not [a for _, attributes in read.tags for a in attributes if a.startswith("on")]
    assert read.text.count("<script>alert(1)</script>") >= 20  # shown, in each of the places
    assert "\x1b" not in html
    assert "\u202e" not in html


def test_the_page_needs_nothing_from_outside():
    html = everything().to_html()
    for _, attributes in Reader(html).tags:
        for key in ("src", "href", "action", "srcset", "xlink:href", "data"):
            assert attributes.get(key, "#").startswith(("#", "data:image/"))
    assert not re.search(r"https?:|@import|url\(|<script|<link|<iframe", html)
    assert "default-src 'none'" in html


def test_page_shows_what_it_was_given():
    text = Reader(everything("a red tractor").to_html()).text
    for expected in ("a red tractor", "50.0", "40.0 to 60.0 %", "n = 10", "✓", "✗", "0.250", "cannot be opened"):
        assert expected in text
    assert [a["href"] for tag, a in Reader(everything().to_html()).tags if tag == "a"] == ["#s1", "#s2", "#s3"]


def test_bars_stand_where_the_numbers_are():
    section = Section("s", "", BarChart({"a": Number(3.0, 2.0, 4.0)}, most=8.0))
    read = Reader(Report("t", sections=[section]).to_html())
    fill = next(a for tag, a in read.tags if tag == "rect" and a["class"] == "fill")
    whiskers = [a for tag, a in read.tags if tag == "line"]
    assert fill["width"] == "37.50%"
    assert (whiskers[0]["x1"], whiskers[0]["x2"]) == ("25.00%", "50.00%")
    assert "100.00%" in page._bar(Number(5.0), 1.0)  # beyond the axis: full, not wider
    assert 'width="0.00%"' in page._bar(Number(float("nan")), 1.0)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "CMYK", "1", "I;16", "F"])
def test_pictures_of_any_mode(mode):
    picture = Image.new("I;16", (120, 90)) if mode == "I;16" else photo(mode=mode)
    uri, width, height = page.picture_uri(picture, 60)
    assert uri.startswith("data:image/png;base64,")
    assert (width, height) == (60, 45)


def test_transparency_becomes_white_and_large_pictures_shrink(tmp_path):
    clear = Image.new("RGBA", (400, 200), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    uri, width, height = page.picture_uri(tmp_path / "clear.png", 100)
    assert (width, height) == (100, 50)
    assert uri.startswith("data:image/jpeg")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    assert page.picture_uri(tmp_path / "broken.png") is None
    assert clear.size == (400, 200)  # the given picture is left alone
    import base64
    import io

    seen = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert min(seen.getpixel((50, 25))) > 250


def test_large_confusion_tables_keep_the_classes_that_are_confused():
    n = page.CHECKED + 6
    matrix = np.eye(n, dtype=int) * 5
    matrix[n - 1, n - 2] = 4
    text = Reader(page._confusion(Confusion(matrix.tolist(), [f"class{i}" for i in range(n)]))).text
    assert f"class{n - 1}" in text
    assert f"class{n - 2}" in text
    assert f"class{page.CHECKED}" not in text


def test_numbers_read_well():
    assert str(Number(0.2811, 0.24, 0.32, unit="fraction")) == "28.1 % [24.0, 32.0]"
    assert Number(12.345, unit="ms").text == "12.35 ms"
    assert Number(1234567).text == "1\u2009234\u2009567"
    assert Number(0.0004).text == "4.0e-04"
    assert Number(1.0).text == "1.000"
    assert Number(6.0).text == "6"
    assert Number(float("nan"), unit="fraction").text == "n/a"
    with pytest.raises(ValueError, match="both ends"):
        Number(1, low=0)
    with pytest.raises(ValueError, match="upside down"):
        Number(1, low=2, high=0)


def test_json_is_flat_and_strict(tmp_path):
    report = Report("t", {"text_to_image.recall@1": Number(0.25, 0.2, 0.3, 538, "fraction"), "x": Number(np.nan)})
    report.details["per.class"] = Number(np.float32(0.5), n=np.int64(4))
    path = report.save(tmp_path / "sub" / "r.json")
    assert json.loads(path.read_text()) == {
        "text_to_image.recall@1": {"value": 0.25, "low": 0.2, "high": 0.3, "n": 538, "unit": "fraction"},
        "x": {"value": None, "low": None, "high": None, "n": None},
        "per.class": {"value": 0.5, "low": None, "high": None, "n": 4},
    }
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]  # no draft left behind
    assert report["per.class"].n == 4
    with pytest.raises(KeyError, match=re.escape("text_to_image.recall@1")):
        report["missing"]


def test_plain_text_is_aligned_and_safe_for_a_terminal():
    table = Table(["name", "n"], [["猫", 3], ["dog", 12], [HOSTILE, None]])
    text = str(Report("T", {"a": Number(0.5, 0.4, 0.6, unit="fraction"), "longer": Number(3.0)}, tables=[table]))
    assert "a       50.0 %  40.0 to 60.0 %\nlonger       3" in text
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[-3].startswith("猫 ")
    assert lines[-2].index("12") == lines[-3].index("3")  # one column less in text, one more on screen, right-aligned


def test_long_tables_are_printed_in_part_and_shown_whole():
    report = Report("t", tables=[Table(["name"], [[f"row{i}"] for i in range(50)])])
    assert "row39\n... and 10 more rows" in str(report)
    assert "row49" in report.to_html()


def test_rich_prints_markup_as_text():
    console = Console(width=100, file=open("/dev/null", "w"), record=True)  # noqa: SIM115, PTH123
    with console.file:
        console.print(everything("[red]stop[/red]"))
        assert "[red]stop[/red]" in console.export_text()


def test_tables_and_confusions_check_their_shape():
    with pytest.raises(ValueError, match="row 1 has 1 cells"):
        Table(["a", "b"], [[1, 2], [3]])
    with pytest.raises(ValueError, match="2 x 2"):
        Confusion([[1]], ["a", "b"])


def test_join_keeps_all_and_refuses_to_mix_up_numbers():
    one, two = everything("one"), everything("two")
    one.numbers, two.numbers = {"a": Number(1.0)}, {"b": Number(2.0), "a": Number(1.0)}
    both = join("both", [one, two])
    assert set(both.to_json()) == {"a", "b"}
    assert len(both.sections) == 6
    assert len(both.pictures) == 8
    two.numbers["a"] = Number(3.0)
    with pytest.raises(ValueError, match="different 'a'"):
        join("both", [one, two])


def test_a_report_becomes_a_section_of_a_larger_one(tmp_path):
    inner = everything("inner words")
    page_path = Report("outer", sections=[inner.section("Inner title")]).html(tmp_path / "r.html")
    text = Reader(page_path.read_text(encoding="utf-8")).text
    assert "Inner title" in text
    assert text.count("inner words") > 10


def test_reports_need_no_torch():
    code = (
        "import sys, ecliptic.eval as e; e.Report('t').to_html(); "
        "from ecliptic.eval import zero_shot, retrieval, evaluate, metrics, report; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": "src"}).returncode == 0


def test_a_reliability_diagram_has_its_dots_where_they_belong():
    bins = [(0.25, Number(0.5, 0.25, 0.75, n=4)), (1.0, Number(0.75, n=16))]
    text = Report("Sure", figures=[Reliability(bins, "How sure, how right")]).to_html()
    assert re.findall(r'<circle class="dot" cx="([\d.]+)%" cy="([\d.]+)%" r="([\d.]+)"', text) == [
        ("25.00", "50.00", "6.0"),  # a quarter of the most pictures: half the radius above the least
        ("100.00", "25.00", "9.0"),
    ]
    assert '<line class="whisker" x1="25.00%" x2="25.00%" y1="75.00%" y2="25.00%"/>' in text
    assert text.count('class="whisker"') == 1
    assert "said 25 %, right 0.500 of 4" in text
    assert Report("Sure", figures=[Reliability([], "Nothing")]).to_html()
