"""Tux Paint stamps: photographs and drawings with alpha masks, described in up to 80 languages (tuxpaint-stamps-default).

A test set: the built-in models never train on it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecliptic.data.cache import remember
from ecliptic.data.debian import package_folder
from ecliptic.data.images import open_with_alpha
from ecliptic.data.records import Records

if TYPE_CHECKING:
    from ecliptic.core.contracts import Record

_RULES = 1  # part of the cache's key: raise it when what is stored changes


def stamps(*, symbols: bool = False) -> Records:
    """The 538 PNG stamps with a description, in order of their path, on white.

    symbols: also the 247 below `symbols` (letters and digits of four alphabets and finger spelling 158, coins 33,
    arithmetic 20, chess 12, music 12, shapes 6, faces 4, a recycling sign, a clock face), which makes 785.
    Left out always: eleven `..._mirror.png` without a description of their own, the same motif facing the other way, and
    the 165 stamps that exist only as SVG drawings, since Pillow does not render SVG.

    Fields: `id`; `image`; `mask` ("L", 0..255, the alpha channel: 255 on the object); `caption` in English; `captions`
    by language code ("de", "pt_BR", ...; English is "en"); `category`, the folders from the top; `label`, the top one.
    """
    folder = package_folder("tuxpaint-stamps-default", "usr/share/tuxpaint/stamps")
    rows = remember("stamps", [_RULES, str(folder), folder.stat().st_mtime_ns], lambda: parse(folder))
    if not symbols:
        rows = [row for row in rows if row["label"] != "symbols"]

    def get(i: int) -> Record:
        row = rows[i]
        return {**row, "image": str(folder / f"{row['id'].removeprefix('stamps/')}.png")}

    return Records(len(rows), get, load=load, name="stamps")


def load(record: Record) -> Record:
    """Open the picture and take the mask from its alpha channel (all 255 where it has none)."""
    from PIL import Image

    image = record["image"]
    if isinstance(image, Image.Image):
        return record
    picture, alpha = open_with_alpha(image)
    return {**record, "image": picture, "mask": alpha or Image.new("L", picture.size, 255)}


def parse(folder: Path) -> list[dict[str, Any]]:
    """Every PNG below `folder` that has a description beside it."""
    rows = []
    for here, _, names in os.walk(folder):
        for name in names:
            path = Path(here, name)
            text = path.with_suffix(".txt")
            if path.suffix == ".png" and text.is_file():
                stem = path.relative_to(folder).with_suffix("").as_posix()
                captions = read_captions(text)
                if captions.get("en"):
                    category = stem.split("/")[:-1]
                    row = {"id": f"stamps/{stem}", "caption": captions["en"], "captions": captions}
                    rows.append({**row, "category": category, "label": category[0]})
    return sorted(rows, key=lambda row: str(row["id"]))


def read_captions(path: Path) -> dict[str, str]:
    """Language code -> description. The first line is English; the others read `de.utf8=...`."""
    lines = path.read_text(encoding="utf-8", errors="replace").removeprefix("\ufeff").splitlines()
    captions = {"en": lines[0].strip()} if lines and lines[0].strip() else {}
    for line in lines[1:]:
        match = re.match(r"([A-Za-z_@]+)\.utf-?8=(.*)", line, re.IGNORECASE)
        if match and match[2].strip():
            captions.setdefault(match[1], match[2].strip())
    return captions
