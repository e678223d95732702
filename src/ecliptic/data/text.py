"""Text files as people have them: with a byte order mark, in UTF-16, or in the code page of an old spreadsheet."""

from __future__ import annotations

import codecs
import logging
import os
from pathlib import Path

_log = logging.getLogger(__name__)


def read_text(path: str | Path) -> str:
    """The content of a text file: UTF-8 (mark removed), UTF-16 or UTF-32 with a mark, else Windows-1252 with a warning."""
    data = Path(path).read_bytes()
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(mark):
            return data.decode(encoding, "replace")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        _log.warning("%s is not UTF-8 (byte %d): read as Windows-1252; save it as UTF-8", path, error.start)
        return data.decode("cp1252", "replace")


def printable(path: str | Path) -> str:
    """A path as text that can be stored anywhere, with / between folders: undecodable bytes become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace").replace(os.sep, "/")
