"""A folder of pictures: one sub-folder per class, or flat, with or without a caption beside each picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ecliptic.data.images import EXTENSIONS, find_images
from ecliptic.data.records import Records, decode_image
from ecliptic.data.text import printable, read_text

if TYPE_CHECKING:
    from ecliptic.core.contracts import Record

SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


def folder(path: str | Path, labels: bool | Literal["some"] | None = None) -> Records:
    """Every picture below `path`, in order of its path.

    labels: None gives each record the `label` of its top sub-folder if all pictures lie in sub-folders; True insists on
        it (ValueError for a picture without sub-folder); "some" gives None to a picture without one; False gives no labels at
        all. Sub-folders that are all named like splits
        (train, val, test ...) become the field `split`, and the level below the label.
    A text file beside a picture (`cat.txt` or `cat.jpg.txt` for `cat.jpg`) is its `caption`.
    `id` is the path relative to `path`. Pictures that cannot be decoded raise `ImageError` on access, not here.
    Raises ValueError for a folder without pictures, naming what was looked for.
    """
    top = Path(path)
    images = find_images(top)
    if not images:
        kinds = ", ".join(sorted(extension.lstrip(".") for extension in EXTENSIONS))
        raise ValueError(f"no images in {top} or its sub-folders (looked for files named .{{{kinds}}})")
    parts = [image.relative_to(top).parts for image in images]
    skip = 1 if all(len(part) > 2 and part[0].lower() in SPLITS for part in parts) else 0
    loose = [part for part in parts if len(part) < 2 + skip]
    if labels is True and loose:
        raise ValueError(f"{top / Path(*loose[0])} lies in no class folder: move it into one, or use labels=False")
    labelled = bool(labels) if labels is not None else not loose

    def get(i: int) -> Record:
        record: Record = {"id": printable(Path(*parts[i])), "image": str(images[i])}
        if skip:
            record["split"] = printable(parts[i][0])
        if labelled:
            record["label"] = printable(parts[i][skip]) if len(parts[i]) > 1 + skip else None
        caption = read_caption(images[i])
        return record if caption is None else {**record, "caption": caption}

    return Records(len(images), get, load=decode_image, name=str(top))


def read_caption(image: Path) -> str | None:
    """The text beside a picture on one line, or None where there is no such file or nothing in it."""
    for path in (image.with_suffix(".txt"), image.with_name(f"{image.name}.txt")):
        try:
            return " ".join(read_text(path).split()) or None
        except OSError:
            continue
    return None
