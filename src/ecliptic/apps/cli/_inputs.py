"""What a user points at: folders and files of pictures, sources of records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecliptic.apps.cli._shell import Complaint

if TYPE_CHECKING:
    from torch import Tensor

    from ecliptic.core.encoder import HFEncoder
    from ecliptic.data.records import Records

Bad = list[tuple[str, str]]


def picture_folder(folder: Path) -> None:
    """Complain about a folder that holds no pictures or cannot be read, saying what is there instead."""
    from ecliptic.data.images import find_images

    if not folder.exists():
        raise Complaint(f"no such folder: {folder}")
    if not folder.is_dir():
        raise Complaint(f"{folder} is a file, not a folder of pictures")
    unreadable: Bad = []
    if find_images(folder, on_error=lambda path, reason: unreadable.append((str(path), reason))):
        return
    if unreadable:
        path, reason = unreadable[0]
        raise Complaint(f"no picture below {folder} can be read; {path}: {reason}")
    raise Complaint(f"no pictures in {folder}: {_what_else(folder)}")


def picture_files(sources: Sequence[Path]) -> tuple[list[Path], Bad]:
    """Files and folders -> picture files in order, and what was named but is none, with the reason."""
    from ecliptic.data.images import find_images, is_image

    files: dict[Path, None] = {}
    bad: Bad = []
    for source in sources:
        if source.is_dir():
            picture_folder(source)
            found = find_images(source, on_error=lambda path, reason: bad.append((str(path), reason)))
            files.update(dict.fromkeys(found))
        elif not source.exists():
            bad.append((str(source), "no such file"))
        elif not is_image(source) and not _opens(source):
            bad.append((str(source), f"not a picture ({source.suffix or 'no file ending'})"))
        else:
            files[source] = None
    if not files:
        reason = "; ".join(f"{path}: {why}" for path, why in bad[:3])
        raise Complaint(f"no pictures to look at{': ' if reason else ''}{reason}")
    return list(files), bad


def one_picture(path: Path) -> Any:
    """A picture the user named."""
    from ecliptic.data.images import open_image

    return open_image(path)


def encode_files(encoder: HFEncoder, files: Sequence[Path], title: str) -> tuple[list[Path], Tensor, Bad]:
    """Picture files -> those that opened, their unit rows (N, D), and the bad ones with the reason."""
    import torch

    from ecliptic.core.progress import Progress
    from ecliptic.data.images import ImageError, open_image

    errors: dict[int, Exception] = {}
    with Progress(title, len(files), unit="pictures") as bar:
        rows = encoder.encode_images(files, decode=open_image, errors=errors, progress=bar.advance)
    for error in errors.values():
        if not isinstance(error, ImageError | OSError):
            raise error
    good = [i for i in range(len(files)) if i not in errors]
    bad = [(str(files[i]), getattr(errors[i], "reason", None) or str(errors[i])) for i in sorted(errors)]
    return [files[i] for i in good], rows[torch.tensor(good, dtype=torch.long)], bad


def open_records(source: str, *, partly_labelled: bool = False) -> Records:
    """A built-in source, a folder, a table, shards or a hub data set, with at least one record."""
    from ecliptic.data.sources import open_source

    if not source.strip():
        raise Complaint("the data source is empty: name a built-in (stamps, photos ...), a folder, or a CSV file")
    path = Path(source)
    if path.is_dir() and not any(path.iterdir()):
        raise Complaint(f"{path} is empty")
    records = open_source(source, partly_labelled=partly_labelled)
    if len(records) == 0:
        raise Complaint(f"{source} holds no records")
    return records


def has(records: Records, key: str) -> bool:
    """Whether the records carry a field, judged by the first."""
    try:
        return records[:1].column(key)[0] not in (None, "")
    except KeyError:
        return False


def labels_of(text: str | None) -> list[str]:
    """`cat, dog` -> names without repeats; `@file` reads one a line."""
    if text is None:
        raise Complaint('no labels: give --labels "cat, dog", or --predictor with a folder that `adapt` made')
    if text.startswith("@"):
        parts = Path(text[1:]).read_text(encoding="utf-8").splitlines()
    else:
        parts = text.split(",")
    names = list(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if not names:
        raise Complaint('--labels holds no names: write them like "cat, dog"')
    if len(names) == 1:
        raise Complaint(f'one label alone wins always: add what else it could be, as in --labels "{names[0]}, other"')
    return names


def _opens(path: Path) -> bool:
    """A picture under a name that does not say so."""
    from ecliptic.data.images import ImageError, open_image

    try:
        open_image(path)
    except ImageError:
        return False
    return True


def _what_else(folder: Path) -> str:
    others = Counter(
        path.suffix.lower() or "no ending"
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not others:
        return "it is empty"
    listed = ", ".join(f"{count:,} x {ending}" for ending, count in others.most_common(4))
    return f"{sum(others.values()):,} other {'file' if sum(others.values()) == 1 else 'files'} ({listed})"
