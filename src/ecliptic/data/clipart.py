"""Open Clip Art: 8,121 drawings with titles, keywords and category paths (Debian openclipart-png and openclipart-svg).

Public domain, and real alt-text: much of it is noisy. Titles name whole collections ("Lemon SVG theme") or were copied
from file to file ("Clipart by Nicu Buculei - piggybank" on a light sabre). `caption_source` says where a caption is from.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ecliptic.core.files import atomic_file
from ecliptic.data.cache import cache_dir, remember
from ecliptic.data.debian import package_folder
from ecliptic.data.images import ImageError, open_image
from ecliptic.data.records import Records, decode_image

if TYPE_CHECKING:
    from ecliptic.core.contracts import Record

_RULES = 3  # part of the cache's key: raise it when what is stored changes


def clipart(*, titled: bool = False, duplicates: bool = True) -> Records:
    """The drawings on white, in order of their path.

    titled: only those with a title of their own (`caption_source` "title").
    duplicates: keep the entries that are links to another drawing (an eighth of them).

    Fields: `id`; `image`; `caption` (cleaned); `caption_source`: "title", or "file name" where the title is empty or
    that of a collection; `title` as stored; `description` (often empty); `keywords`; `category`, the folders from the
    top; `label`, the top one; `original`, the id of the drawing a duplicate links to, else its own: split `by` it.
    Beware: 1,375 of them are computed stars; some 120 are blank on white (white line drawings, definitions of gradients);
    18 are of 40 to 623 megapixels and are shrunk, once, into the cache.
    """
    png = package_folder("openclipart-png", "usr/share/openclipart/png")
    svg = package_folder("openclipart-svg", "usr/share/openclipart/svg")
    key = [_RULES, str(png), png.stat().st_mtime_ns, str(svg), svg.stat().st_mtime_ns]
    rows = remember("clipart", key, lambda: parse(png, svg))
    if titled:
        rows = [row for row in rows if row["caption_source"] == "title"]
    if not duplicates:
        rows = [row for row in rows if row["original"] == row["id"]]

    def get(i: int) -> Record:
        row = rows[i]
        return {**row, "image": str(png / f"{row['id'].removeprefix('clipart/')}.png")}

    return Records(len(rows), get, load=load, name="clipart")


_HUGE = 1_000_000  # bytes; all the drawings of 40 megapixels or more have at least that


def load(record: Record) -> Record:
    """Open the picture; a huge one from a copy at most 2,048 pixels wide or high, made on first use."""
    path = Path(str(record["image"]))
    if isinstance(record["image"], Image.Image) or path.stat().st_size < _HUGE:
        return decode_image(record)
    where = f"{path.resolve()} {path.stat().st_size}"
    copy = cache_dir() / "clipart-small" / f"{hashlib.blake2b(where.encode(), digest_size=12).hexdigest()}.png"
    try:
        return {**record, "image": open_image(copy)}
    except ImageError:
        picture = open_image(path, fast=True, max_pixels=12_000_000)
    picture.thumbnail((2048, 2048), reducing_gap=3)
    with contextlib.suppress(OSError), atomic_file(copy) as handle:
        picture.save(handle, "PNG")
    return {**record, "image": picture}


def parse(png: Path, svg: Path) -> list[dict[str, Any]]:
    """Every picture below `png` with the metadata of its twin below `svg`."""
    found = []
    for folder, _, names in os.walk(png):
        for name in names:
            if name.endswith(".png"):
                path = Path(folder, name)
                found.append((path.relative_to(png).with_suffix("").as_posix(), path))
    found.sort()
    metadata = {stem: read_metadata(svg / f"{stem}.svg") for stem, _ in found}
    shared = Counter(title for title, _, _ in metadata.values())
    rows = []
    for stem, path in found:
        title, description, keywords = metadata[stem]
        target = path.resolve() if path.is_symlink() else path
        original = target.relative_to(png.resolve() if path.is_symlink() else png).with_suffix("").as_posix()
        cleaned = clean_title(title, keywords, shared[title])
        category = stem.split("/")[:-1]
        rows.append(
            {
                "id": f"clipart/{stem}",
                "caption": cleaned or words_of_file(stem),
                "caption_source": "title" if cleaned else "file name",
                "title": title,
                "description": description,
                "keywords": keywords,
                "category": category,
                "label": category[0],
                "original": f"clipart/{original}",
            }
        )
    return rows


def read_metadata(path: Path) -> tuple[str, str, list[str]]:
    """Title, description and keywords of one SVG file; empty where it has none or cannot be read."""
    try:
        with path.open("rb") as handle:
            head = handle.read(16384)
            if b"</metadata>" not in head:
                head += handle.read()
    except OSError:
        return "", "", []
    work = re.search(r"<(?:cc:)?Work\b.*?</(?:cc:)?Work>", head.decode("utf-8", "replace"), re.DOTALL)
    if not work:
        return "", "", []
    title = re.search(r"<dc:title>(.*?)</dc:title>", work[0], re.DOTALL)
    description = re.search(r"<dc:description>(.*?)</dc:description>", work[0], re.DOTALL)
    keywords = [
        _text(item).replace("_", " ").lower() for item in re.findall(r"<rdf:li>(.*?)</rdf:li>", work[0], re.DOTALL)
    ]
    kept = [word for word in dict.fromkeys(keywords) if word and not re.match(r"hash|0x|\d+$", word)]
    said = _text(description[1]) if description else ""
    return _text(title[1]) if title else "", "" if re.search(r"HASH\(|^\S+@\S+$", said) else said, kept


_COLLECTION = re.compile(
    r"(part of the|clipart by|lemon svg theme|gramastar|etiquette icons|aiga_symbol|svg (gradient|road)|various clipart|"
    r"clip art collection|r16 sib|australian maps|map symbols|simple arrows|homes clipart|pc connectors|untitled|unknown|"
    r"title$|drawing$)"
    r"|(icon ?set|theme|collection|clip ?art|illustrations?|signs|submission)$",
    re.IGNORECASE,
)


def clean_title(title: str, keywords: list[str], shared: int) -> str:
    """A title fit to be a caption, or "" where it says nothing about this drawing.

    shared: how many drawings have this very title. Ten or more means a collection, unless it is also a keyword ("card").
    """
    if _COLLECTION.search(title):
        return ""
    if shared >= 10 and not set(_words(title).lower().split()) & {word for key in keywords for word in key.split()}:
        return ""
    text = re.sub(r"\S+@\S+|https?://\S+|\.(svg|png)\b", " ", title, flags=re.IGNORECASE)
    text = re.sub(r"\s+-\s+rpg map elements$", "", text, flags=re.IGNORECASE)
    text = re.sub(r"\(b and w\)", "(black and white)", _words(text), flags=re.IGNORECASE)
    text = text if " " in text else text.replace("-", " ")
    text = re.sub(r"(?<=[^\W\d])\s*#?\d{1,3}$", "", text).strip(" -,;:")  # "smiley111", "arrow 04"
    return text if sum(character.isalpha() for character in text) >= 3 else ""


def words_of_file(stem: str) -> str:
    """What a path says in words: "computer/icons/flat-theme/action/text_center" -> "text center"."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", stem.rsplit("/", 1)[-1])
    tokens = [token for token in re.split(r"[\W_]+", name) if token and not any(c.isdigit() for c in token[:1])]
    tokens = [re.sub(r"\d.*$", "", token) for token in tokens]
    tokens = [token for token in tokens if token.lower() not in ("aiga", "rpg")]
    text = " ".join(token for token in tokens if token)
    return text if sum(c.isalpha() for c in text) >= 3 else _words(stem.split("/")[-2])


def _words(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("_", " ")).strip()


def _text(markup: str) -> str:
    """Character data of a piece of XML, white space tidied, UTF-8 that was once read as Latin-1 mended."""
    text = re.sub(r"\s+", " ", html.unescape(html.unescape(re.sub(r"<[^>]*>", "", markup)))).strip()
    if re.search("[ÃÂ][\x80-\xbf]", text):
        try:
            return text.encode("latin-1").decode("utf-8")
        except UnicodeError:
            return text
    return text
