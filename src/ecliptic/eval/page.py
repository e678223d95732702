"""A report as one HTML page that stands alone: style inline, pictures as data URIs, charts as inline SVG, no script.

Every text goes through `_e`; a content-security policy forbids whatever might slip through. Charts use percentages as
SVG coordinates, so they stretch with the page while their text keeps its size.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image, ImageOps

from ecliptic.data.images import open_image
from ecliptic.eval.overlay import COLOURS
from ecliptic.eval.report import (
    FRACTION,
    BarChart,
    Commands,
    Confusion,
    Content,
    Gallery,
    Heatmaps,
    Number,
    Numbers,
    Picture,
    Reliability,
    Report,
    Section,
    Table,
    clean,
    format_score,
    numeric_columns,
)

THUMBNAIL = 360  # longest side in pixels of a picture in a gallery
LARGE = 560  # of a heat map
CHECKED = 24  # classes up to which a confusion table is drawn whole


def page(report: Report) -> str:
    """The whole document."""
    from ecliptic import __version__

    content = report.body()
    sections = list(report.sections)
    main = "".join(_content(c) for c in content)
    body = f'<div class="flow">{main}</div>' if main else ""
    body += "".join(_section(section, i) for i, section in enumerate(sections, 1))
    if report.commands:
        body += _section(Section("Commands", "", Commands(report.commands)), len(sections) + 1)
    subtitle = f'<p class="subtitle">{_inline(report.subtitle)}</p>' if report.subtitle else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{_e(report.title)}</title>
<style>{_CSS}</style>
</head>
<body>
<header><p class="mark">{_MARK}<span>Ecliptic</span></p>
<h1>{_e(report.title)}</h1>{subtitle}{_contents(sections)}</header>
<main>{body}</main>
<footer>Made with Ecliptic {_e(__version__)}. This page stands alone: mail it, archive it, open it offline.</footer>
</body>
</html>
"""


def picture_uri(image: Image.Image | str | Path, side: int = THUMBNAIL) -> tuple[str, int, int] | None:
    """(data URI, width, height) of a picture reduced to `side` pixels, alpha on white; None if it cannot be opened.

    JPEG for photographs; PNG, which does not blur, for pictures of up to 96 pixels.
    """
    try:
        picture = ImageOps.exif_transpose(image) if isinstance(image, Image.Image) else open_image(image)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB")
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        small = max(picture.size) <= 96
        if small:
            picture.save(out, "PNG", optimize=True)
        else:
            picture.save(out, "JPEG", quality=84, optimize=True)
    except (OSError, ValueError):  # ImageError among them
        return None
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}", *picture.size


def _e(text: object) -> str:
    return escape(clean(str(text)), quote=True)


def _inline(text: str) -> str:
    """Escaped text with `backticks` as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _e(text))


def _paragraphs(text: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return "".join(f"<p{attribute}>{_inline(p)}</p>" for p in re.split(r"\n\s*\n", text) if p.strip())


def _heading(title: str) -> str:
    return f"<h3>{_inline(title)}</h3>" if title else ""


def _contents(sections: Sequence[Section]) -> str:
    if len(sections) < 3:
        return ""
    items = "".join(f'<li><a href="#s{i}">{_e(s.title)}</a></li>' for i, s in enumerate(sections, 1))
    return f'<nav aria-label="Contents"><ol>{items}</ol></nav>'


def _section(section: Section, i: int) -> str:
    content = "".join(_content(c) for c in section.content)
    heading = f"<h2>{_e(section.title)}</h2>" if section.title else ""
    return f'<section id="s{i}" class="flow">{heading}{_paragraphs(section.text, "lead")}{content}</section>'


def _content(content: Content) -> str:
    match content:
        case str():
            return _paragraphs(content, "note")
        case Numbers():
            return _numbers(content)
        case Gallery():
            return _gallery(content)
        case Table():
            return _table(content)
        case BarChart():
            return _bars(content)
        case Heatmaps():
            return _heatmaps(content)
        case Confusion():
            return _confusion(content)
        case Reliability():
            return _reliability(content)
        case Commands():
            return _commands(content)
    raise TypeError(f"a section cannot hold {type(content).__name__}; wrap it in one of the content types")


def _label(key: str) -> str:
    """`text_to_image` -> `Text to image`; names that are no identifiers stay as they are."""
    if not re.fullmatch(r"[a-z0-9_@]+", key):
        return key
    text = key.replace("_", " ")
    return _KNOWN.get(key, text[:1].upper() + text[1:])


_KNOWN = {
    "ece": "Calibration error (ECE)", "top5": "Top-5 accuracy", "brier": "Brier score", "auroc": "AUROC",
    "fpr95": "FPR at 95 % TPR", "ood": "Out of distribution", "msp": "MSP", "mcm": "MCM",
}  # fmt: skip


def _numbers(content: Numbers) -> str:
    """Tiles, one row of them per group (the part of the key before the last dot)."""
    groups: dict[str, dict[str, Number]] = {}
    for key, number in content.numbers.items():
        group, _, name = key.rpartition(".")
        groups.setdefault(group, {})[name] = number
    out = _heading(content.title)
    for group, numbers in groups.items():
        tiles = "".join(_tile(name, number) for name, number in numbers.items())
        heading = f"<h4>{_e(' · '.join(_label(part) for part in group.split('.')))}</h4>" if group else ""
        out += f'<div class="group">{heading}<div class="tiles">{tiles}</div></div>'
    return out


def _tile(name: str, number: Number) -> str:
    below = []
    if number.interval:
        below.append(f'<span class="interval">{_e(number.interval)}</span>')
    if number.n is not None:
        below.append(f'<span class="n">n = {number.n}</span>')
    gauge = _bar(number, 1.0) if number.unit == FRACTION else ""
    value, _, unit = number.text.partition(" ") if number.unit else (number.text, "", "")
    unit = f'<span class="unit">{_e(unit)}</span>' if unit else ""
    return (
        f'<div class="tile"><div class="name">{_e(_label(name))}</div><div class="value">{_e(value)}{unit}</div>'
        f'{gauge}<div class="below">{" ".join(below)}</div></div>'
    )


def _bar(number: Number, most: float, css: str = "bar") -> str:
    """A horizontal bar with its interval as a whisker; 0 at the left edge, `most` at the right."""

    def at(value: float) -> str:
        share = value / most if most > 0 and math.isfinite(value) else 0.0
        return f"{100 * min(max(share, 0.0), 1.0):.2f}%"

    whisker = ""
    if number.low is not None and number.high is not None:
        low, high = at(number.low), at(number.high)
        ends = "".join(f'<line class="whisker" x1="{x}" x2="{x}" y1="25%" y2="75%"/>' for x in (low, high))
        whisker = f'<line class="whisker" x1="{low}" x2="{high}" y1="50%" y2="50%"/>{ends}'
    return (
        f'<svg class="{css}" role="img" aria-label="{_e(number)}"><rect class="track" width="100%" height="100%"/>'
        f'<rect class="fill" width="{at(number.value)}" height="100%"/>{whisker}</svg>'
    )


def _bars(chart: BarChart) -> str:
    most = chart.most
    if most is None:
        ends = [x for n in chart.bars.values() for x in (n.value, n.high) if x is not None and math.isfinite(x)]
        fractions = all(n.unit == FRACTION for n in chart.bars.values())
        most = 1.0 if fractions else max(ends, default=1.0)
    rows = ""
    for name, number in chart.bars.items():
        kind = ' class="chosen"' if name == chart.highlight else ""
        about = f' <span class="interval">{_e(number.interval)}</span>' if number.interval else ""
        rows += (
            f'<tr{kind}><th scope="row">{_e(name)}</th><td class="plot">{_bar(number, most)}</td>'
            f'<td class="value">{_e(number.text)}{about}</td></tr>'
        )
    return f'<figure class="bars">{_caption(chart.title)}<table>{rows}</table></figure>'


def _caption(title: str) -> str:
    return f"<figcaption>{_inline(title)}</figcaption>" if title else ""


def _image(image: Image.Image | str | Path, text: str, side: int) -> str:
    found = picture_uri(image, side)
    if found is None:
        return '<div class="missing">cannot be opened</div>'
    uri, width, height = found
    pixel = ' class="pixel"' if max(width, height) <= 96 else ""
    return f'<img{pixel} src="{uri}" width="{width}" height="{height}" alt="{_e(text)}">'


def _mark(good: bool | None) -> str:
    if good is None:
        return ""
    return '<span class="good">✓</span>' if good else '<span class="bad">✗</span>'


def _picture(picture: Picture, small: bool) -> str:
    score = format_score(picture.score)
    score = f'<span class="score">{_e(score)}</span>' if score else ""
    words = f'<span class="words">{_e(picture.caption)}</span>' if picture.caption else ""
    note = f'<div class="quiet">{_e(picture.note)}</div>' if picture.note else ""
    line = f'<div class="line">{_mark(picture.good)}{words}{score}</div>'
    state = {None: "", True: " is-good", False: " is-bad"}[picture.good]
    box = _image(picture.image, picture.caption, THUMBNAIL // 2 if small else THUMBNAIL)
    text = f"<figcaption>{line}{note}</figcaption>" if words or score or note or picture.good is not None else ""
    return f'<figure class="card{state}"><div class="box">{box}</div>{text}</figure>'


def _gallery(gallery: Gallery) -> str:
    if not gallery.pictures:
        return ""
    cards = "".join(_picture(p, gallery.small) for p in gallery.pictures)
    kind = "gallery small" if gallery.small else "gallery"
    return f'<div class="group">{_heading(gallery.title)}<div class="{kind}">{cards}</div></div>'


def _heatmaps(content: Heatmaps) -> str:
    rows = ""
    for heat in content.maps:
        pictures: list[tuple[str, Image.Image | str | Path]] = [(heat.caption, heat.image), *heat.overlays.items()]
        cards = "".join(
            f'<figure class="card"><div class="box">{_image(image, name, LARGE)}</div>'
            + (
                f'<figcaption><div class="line"><span class="words">{_e(name)}</span></div></figcaption>'
                if name
                else ""
            )
            + "</figure>"
            for name, image in pictures
        )
        rows += f'<div class="heat">{cards}</div>'
    stops = ", ".join(f"rgb({r} {g} {b})" for r, g, b in COLOURS)
    ramp = f'<span class="ramp" style="background:linear-gradient(90deg, {stops})"></span>'
    legend = f'<div class="legend">{_e(content.low)}{ramp}{_e(content.high)}</div>' if rows else ""
    return f'<div class="group">{_heading(content.title)}{rows}{legend}</div>'


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col" class="{"number" if numeric else "words"}">{_e(c)}</th>'
        for c, numeric in zip(table.columns, numeric_columns(table), strict=True)
    )
    rows = "".join("<tr>" + "".join(_cell(c) for c in row) + "</tr>" for row in table.rows)
    return (
        f'<figure class="data">{_caption(table.title)}<div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></figure>"
    )


def _cell(cell: str | int | float | Number | None) -> str:
    match cell:
        case None:
            return '<td class="number">–</td>'
        case str():
            return f'<td class="words">{_e(cell)}</td>'
        case Number():
            about = f' <span class="interval">{_e(cell.interval)}</span>' if cell.interval else ""
            return f'<td class="number">{_e(cell.text)}{about}</td>'
    return f'<td class="number">{_e(format_score(cell))}</td>'


def _confusion(content: Confusion) -> str:
    """Cells shaded by their share of the row; beyond `CHECKED` classes only those that are most often confused."""
    matrix, classes = [list(row) for row in content.matrix], list(content.classes)
    note = ""
    if len(classes) > CHECKED:
        wrong = [
            sum(row) - row[i] + sum(other[i] for j, other in enumerate(matrix) if j != i)
            for i, row in enumerate(matrix)
        ]
        keep = sorted(sorted(range(len(classes)), key=lambda i: -wrong[i])[:CHECKED])
        note = (
            f"<p>The {CHECKED} of {len(classes)} classes with most confusions; pictures of the others are left out.</p>"
        )
        totals = [sum(row) for row in matrix]
        matrix, classes = [[matrix[i][j] for j in keep] for i in keep], [classes[i] for i in keep]
        totals = [totals[i] for i in keep]
    else:
        totals = [sum(row) for row in matrix]
    head = "".join(f'<th scope="col"><span>{_e(c)}</span></th>' for c in classes)
    rows = ""
    for i, (name, row, total) in enumerate(zip(classes, matrix, totals, strict=True)):
        cells = ""
        for j, count in enumerate(row):
            share = count / total if total else 0.0
            kind = "right" if i == j else "wrong"
            style = f' style="--share:{round(100 * share)}%"' if count else ""
            strong = " strong" if share > 0.55 else ""
            cells += f'<td class="{kind}{strong}"{style}>{count if count else ""}</td>'
        rows += f'<tr><th scope="row">{_e(name)}</th>{cells}</tr>'
    corner = '<td class="corner">truth ↓ answer →</td>'
    return (
        f'<figure class="confusion">{_caption(content.title)}<div class="scroll"><table>'
        f"<thead><tr>{corner}{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}</figure>"
    )


def _reliability(content: Reliability) -> str:
    """Confidence across, share right up, dots as large as there are pictures in them, the diagonal to compare with."""
    most = max((number.n or 0 for _, number in content.bins), default=0)
    marks = ""
    for confidence, number in content.bins:
        x, y = f"{100 * confidence:.2f}%", f"{100 - 100 * number.value:.2f}%"
        if number.low is not None and number.high is not None:
            ends = f'y1="{100 - 100 * number.low:.2f}%" y2="{100 - 100 * number.high:.2f}%"'
            marks += f'<line class="whisker" x1="{x}" x2="{x}" {ends}/>'
        size = 3 + 6 * math.sqrt((number.n or 0) / most) if most else 5
        about = f"said {100 * confidence:.0f} %, right {number.text} of {number.n}"
        marks += f'<circle class="dot" cx="{x}" cy="{y}" r="{size:.1f}"><title>{_e(about)}</title></circle>'
    return (
        f'<figure class="reliability">{_caption(content.title)}<div class="plot"><span class="up">right</span>'
        '<svg role="img" aria-label="how often answers were right, by how sure they were"><rect class="track" width="100%" '
        f'height="100%"/><line class="diagonal" x1="0" y1="100%" x2="100%" y2="0"/>{marks}</svg>'
        '<span class="across">how sure, from 0 to 100 %</span></div></figure>'
    )


def _commands(content: Commands) -> str:
    def line(text: str) -> str:
        return f'<span class="{"remark" if text.lstrip().startswith("#") else "command"}">{_e(text)}</span>'

    lines = "\n".join(line(part) for text in content.lines for part in text.splitlines())
    return f'<figure class="code">{_caption(content.title)}<pre><code>{lines}</code></pre></figure>'


_MARK = (  # an ellipse, the path, and a body on it
    '<svg class="logo" viewBox="0 0 32 32" aria-hidden="true"><circle cx="16" cy="16" r="5"/>'
    '<ellipse cx="16" cy="16" rx="14" ry="6" transform="rotate(-24 16 16)"/><circle cx="28.2" cy="9.2" r="2.4"/></svg>'
)

_CSS = """
:root{--bg:#fbfbfa;--panel:#fff;--ink:#1b1f24;--soft:#5c6570;--line:#e3e5e8;--well:#f1f2f3;--accent:#27598c;
--bar:#7ea3c7;
--good:#1d7a4c;--bad:#b3382c;--code:#f4f5f6;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--bg:#14171a;--panel:#1b1f23;--ink:#e7eaed;--soft:#98a2ad;--line:#2d3339;
--well:#23282d;
--accent:#8db9e4;--bar:#4a7199;--good:#5cc08d;--bad:#ef8377;--code:#1f2428}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:1120px;padding:40px 32px 64px;background:var(--bg);color:var(--ink);
font:16px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"Liberation Sans",
sans-serif}
h1{font-size:2.1rem;line-height:1.2;letter-spacing:-.015em;font-weight:650;margin:0 0 .35em;overflow-wrap:anywhere}
h2{font-size:1.35rem;line-height:1.3;letter-spacing:-.01em;font-weight:640;margin:0}
h3{font-size:1rem;font-weight:620;margin:0 0 12px}
h4{font-size:.8rem;font-weight:600;color:var(--soft);margin:0 0 8px}
p{margin:0}
header{margin-bottom:36px}
.mark{display:flex;align-items:center;gap:8px;color:var(--accent);font-weight:600;font-size:.9rem;margin-bottom:28px}
.logo{width:24px;height:24px;fill:currentColor}
.logo ellipse{fill:none;stroke:currentColor;stroke-width:1.6}
.subtitle{font-size:1.08rem;color:var(--soft);max-width:46em}
nav{margin-top:22px}
nav ol{display:flex;flex-wrap:wrap;gap:4px 22px;list-style:none;padding:0;margin:0;font-size:.9rem}
a{color:var(--accent);text-decoration:none}
a:hover,a:focus-visible{text-decoration:underline}
.flow>*+*{margin-top:26px}
.flow>h2+*{margin-top:6px}
section{border-top:1px solid var(--line);padding-top:32px;margin-top:44px}
.lead{color:var(--soft);max-width:46em}
.flow>.lead+.lead,.flow>.note+.note{margin-top:8px}
.note{font-size:.9rem;color:var(--soft);max-width:52em}
code{font:.88em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;background:var(--code);
padding:.1em .35em;border-radius:4px;overflow-wrap:anywhere}
figure{margin:0}
.group+.group{margin-top:18px}
figure>figcaption:first-child{font-weight:620;margin-bottom:12px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}
.tile{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:14px 16px 12px;min-width:0;
max-width:360px}
.tile .name{font-size:.85rem;color:var(--soft);overflow-wrap:anywhere}
.tile .value{font-size:1.75rem;line-height:1.25;font-weight:620;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.tile .unit{font-size:.55em;font-weight:500;color:var(--soft);margin-left:.25em;letter-spacing:0}
.tile .bar{height:8px;margin:8px 0 6px}
.below{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 10px;font-size:.78rem;color:var(--soft)}
.interval{font-size:.82em;color:var(--soft);font-variant-numeric:tabular-nums;white-space:nowrap}
.below .interval{font-size:1em}
.n{white-space:nowrap}
.bar{display:block;width:100%;height:16px;overflow:visible}
.track{fill:var(--well);rx:3px}
.fill{fill:var(--bar);rx:3px}
.chosen .fill{fill:var(--accent)}
.chosen th{font-weight:640}
.whisker{stroke:var(--ink);stroke-width:1.5;stroke-opacity:.85}
.chosen .whisker{stroke-opacity:1}
.bars table{width:100%;border-collapse:collapse;font-size:.92rem}
.bars th{text-align:left;font-weight:450;padding:5px 16px 5px 0;max-width:19em;overflow-wrap:anywhere}
.bars .plot{width:60%;padding:5px 0}
.bars .value{padding:5px 0 5px 16px;text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.bars .value .interval{margin-left:6px}
.scroll{overflow:auto;max-height:960px}
.data table{border-collapse:collapse;font-size:.9rem;min-width:min(100%,420px)}
.data th{text-align:left;font-weight:600;color:var(--soft);font-size:.85em}
.data th,.data td{padding:6px 20px 6px 0;border-bottom:1px solid var(--line);vertical-align:baseline}
.data td{overflow-wrap:break-word;max-width:28em}
.data .number{font-variant-numeric:tabular-nums;white-space:nowrap;text-align:right}
.data .words{min-width:8em}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:16px}
.gallery.small{grid-template-columns:repeat(auto-fill,minmax(128px,1fr));gap:10px}
.card{background:var(--panel);border:1px solid var(--line);border-radius:10px;overflow:hidden;min-width:0}
.card .box{background:var(--well);height:170px;display:flex;align-items:center;justify-content:center}
.small .card .box{height:108px}
.card img{width:100%;height:100%;object-fit:contain;display:block}
.card img.pixel{image-rendering:pixelated;padding:10px}
.card figcaption{padding:9px 12px 10px;font-size:.88rem;line-height:1.4}
.small .card figcaption{padding:6px 9px 7px;font-size:.8rem}
.line{display:flex;align-items:baseline;gap:7px}
.words{flex:1;min-width:0;overflow-wrap:anywhere}
.score{font-size:.92em;color:var(--soft);font-variant-numeric:tabular-nums;white-space:nowrap;margin-left:auto}
.quiet{color:var(--soft);font-size:.93em;overflow-wrap:anywhere}
.good{color:var(--good);font-weight:700}
.bad{color:var(--bad);font-weight:700}
.is-good{border-color:color-mix(in srgb,var(--good) 45%,var(--line))}
.is-bad{border-color:color-mix(in srgb,var(--bad) 45%,var(--line))}
.missing{color:var(--soft);font-size:.8rem}
.heat{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:12px}
.heat+.heat{margin-top:16px}
.heat .card{max-width:420px}
.heat .card .box{height:auto;aspect-ratio:4/3}
.legend{display:flex;align-items:center;gap:10px;margin-top:12px;font-size:.8rem;color:var(--soft)}
.ramp{width:150px;height:10px;border-radius:5px}
.reliability .plot{display:grid;grid-template-columns:max-content 260px;gap:6px 8px;font-size:.8rem;color:var(--soft)}
.reliability svg{width:260px;height:260px;overflow:visible}
.reliability .up{writing-mode:vertical-rl;transform:rotate(180deg);text-align:center}
.reliability .across{grid-column:2;text-align:center}
.diagonal{stroke:var(--soft);stroke-width:1;stroke-dasharray:4 4}
.dot{fill:var(--accent)}
.confusion table{border-collapse:separate;border-spacing:2px;font-size:.8rem;font-variant-numeric:tabular-nums}
.confusion th[scope=row]{text-align:right;font-weight:450;padding-right:8px;white-space:nowrap;max-width:14em;
overflow:hidden;
text-overflow:ellipsis}
.confusion th[scope=col]{font-weight:450;vertical-align:bottom;padding-bottom:6px}
.confusion th[scope=col] span{writing-mode:vertical-rl;transform:rotate(180deg);max-height:11em;overflow:hidden;
text-overflow:ellipsis;
white-space:nowrap}
.confusion td{width:34px;min-width:34px;height:30px;text-align:center;border-radius:4px;background:var(--well)}
.confusion td.right{background:color-mix(in srgb,var(--accent) var(--share,0%),var(--well))}
.confusion td.wrong{background:color-mix(in srgb,var(--bad) var(--share,0%),var(--well))}
.confusion td.strong{color:var(--panel);font-weight:600}
.confusion .corner{background:none;color:var(--soft);text-align:right;vertical-align:bottom;padding:0 8px 6px 0;
white-space:nowrap}
.confusion p{font-size:.8rem;color:var(--soft);margin-top:8px}
pre{margin:0;background:var(--code);border:1px solid var(--line);border-radius:10px;padding:14px 18px;overflow-x:auto}
pre code{background:none;padding:0;font-size:.86rem;line-height:1.7;overflow-wrap:normal}
.command::before{content:"$ ";color:var(--soft);user-select:none}
.remark{color:var(--soft)}
footer{margin-top:56px;padding-top:18px;border-top:1px solid var(--line);font-size:.82rem;color:var(--soft)}
@media (max-width:640px){
body{padding:24px 16px 40px}
h1{font-size:1.6rem}
.mark{margin-bottom:20px}
.tiles{grid-template-columns:repeat(auto-fit,minmax(104px,1fr));gap:8px}
.tile{padding:11px 12px 10px}
.tile .value{font-size:1.4rem}
.gallery{grid-template-columns:repeat(2,1fr);gap:10px}
.gallery.small{grid-template-columns:repeat(3,1fr);gap:8px}
.card .box{height:130px}
.small .card .box{height:86px}
.heat{grid-template-columns:repeat(2,1fr);gap:8px}
.heat .card .box{height:auto}
.bars table,.bars tbody{display:block}
.bars tr{display:grid;grid-template-columns:1fr auto;padding:5px 0}
.bars th,.bars .value{padding:0}
.bars .plot{grid-column:1/-1;grid-row:2;width:100%;padding:3px 0}
}
@media print{body{max-width:none;padding:0}.card,.tile,.bars,.heat{break-inside:avoid}section{break-before:auto}}
"""
