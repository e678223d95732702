"""Where records come from: one name for each kind of source, and `open_source` for a name typed by a user."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ecliptic.data.folder import folder
from ecliptic.data.hub import hf, is_saved
from ecliptic.data.records import Records
from ecliptic.data.shards import webdataset
from ecliptic.data.table import table

__all__ = ["BUILT_IN", "folder", "hf", "open_source", "table", "webdataset"]


def _scenes() -> Records:
    from ecliptic.data.scenes import scenes

    return scenes("test", 1000, seed=0)


def _clipart() -> Records:
    from ecliptic.data.clipart import clipart

    return clipart()


def _stamps() -> Records:
    from ecliptic.data.stamps import stamps

    return stamps()


def _photos() -> Records:
    from ecliptic.data.photos import photos

    return photos()


def _textiles() -> Records:
    from ecliptic.data.textiles import textiles

    return textiles()


BUILT_IN: dict[str, Callable[[], Records]] = {
    "clipart": _clipart,
    "photos": _photos,
    "scenes": _scenes,
    "stamps": _stamps,
    "textiles": _textiles,
}
"""Sources that need no path; each is imported when it is opened."""


def open_source(spec: str | Path, *, partly_labelled: bool = False) -> Records:
    """Records from a name or path.

    A built-in (`stamps`, `clipart`, `photos`, `textiles`, `scenes`: 1,000 of the test split); a folder (per class, or
    with captions beside the pictures, or saved by HF `datasets`); a `.csv`, `.tsv` or `.parquet` table; `.tar` shards
    with braces or stars; `hf:NAME` or `hf:NAME:SPLIT` for a dataset on the hub. A folder of your own that has the name of
    a built-in is written `./stamps`.

    partly_labelled: a CSV may leave labels empty, and pictures may lie beside the class folders: their label is then None.
    """
    text = str(spec)
    if isinstance(spec, str) and text in BUILT_IN:
        return BUILT_IN[text]()
    if text.startswith("hf:"):
        name, _, split = text.removeprefix("hf:").partition(":")
        return hf(name, split or None)
    first = text.split("::")[0].lower()
    if first.endswith(".tar"):
        return webdataset(text)
    path = Path(text).expanduser()
    if path.is_dir():
        return hf(path) if is_saved(path) else folder(path, labels="some" if partly_labelled else None)
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv", ".parquet", ".pq"):
        return table(path, empty_labels=partly_labelled)
    if path.exists():
        raise ValueError(f"{text}: cannot read records from a {suffix or 'file without suffix'}; {_known()}")
    raise ValueError(f"no source {text!r}{_similar(text)}; {_known()}")


def _known() -> str:
    return f"give a folder of images, a .csv, .tsv, .parquet or .tar file, hf:NAME, or one of: {', '.join(BUILT_IN)}"


def _similar(text: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(text, BUILT_IN, 1)
    return f" (did you mean {close[0]}?)" if close else " (and no such file or folder)"
