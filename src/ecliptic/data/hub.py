"""Hugging Face `datasets`: in memory, saved with `save_to_disk`, or by name from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecliptic.data.images import ImageError, open_image
from ecliptic.data.records import Records

if TYPE_CHECKING:
    from PIL import Image

    from ecliptic.core.contracts import Record


def hf(
    source: Any,
    split: str | None = None,
    *,
    image: str | None = None,
    caption: str | None = None,
    label: str | None = None,
) -> Records:
    """A dataset as records. Images stay encoded until a record is read.

    source: a `datasets.Dataset` or `DatasetDict`, a folder written by `save_to_disk`, or a name on the hub.
    split: which one; may be left out where there is only one.
    image, caption, label: columns to use; None takes the first column of images, one named caption or text (or the first
        of that kind), and one named label (or the first with named classes). The other columns keep their names.
    `id` is the column of that name, else the row number.
    """
    data = _pick(_opened(source, split), split)
    features = data.features
    pictures = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    picture = image or (pictures[0] if pictures else "image" if "image" in features else None)
    if picture is None or picture not in features:
        raise ValueError(f"the dataset has no column of images{_named(image)}; it has: {', '.join(features)}")
    words = caption or next((name for name in ("caption", "text", "sentence", "title") if name in features), None)
    classes = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    kind = label or ("label" if "label" in features else classes[0] if classes else None)
    for column in (words, kind):
        if column is not None and column not in features:
            raise ValueError(f"the dataset has no column{_named(column)}; it has: {', '.join(features)}")
    named = features[kind].names if kind in classes else None
    if picture in pictures:
        datasets = _datasets()
        data = data.cast_column(picture, datasets.Image(decode=False))
    fields = {picture: "image", words: "caption", kind: "label"}

    def get(i: int) -> Record:
        record: Record = {"id": str(i)}
        for name, value in data[i].items():
            record[fields.get(name, name)] = value
        record["id"] = str(record["id"])
        if kind is not None:
            value = record["label"]
            record["label"] = (
                named[value] if named is not None and isinstance(value, int) and value >= 0 else str(value)
            )
        return record

    def load(record: Record) -> Record:
        return {**record, "image": _decode(record["image"], record["id"])}

    title = source if isinstance(source, str | Path) else getattr(getattr(data, "info", None), "dataset_name", None)
    return Records(len(data), get, load=load, name=str(title or "dataset"))


def is_saved(path: Path) -> bool:
    """True for a folder written by `save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _decode(value: Any, id: str) -> Image.Image:
    if isinstance(value, dict):
        if value.get("bytes"):
            try:
                return open_image(value["bytes"])
            except ImageError as error:
                raise ImageError(value.get("path") or f"record {id}", error.reason) from error
        value = value.get("path")
    if value is None:
        raise ImageError(f"record {id}", "has no image")
    return open_image(value)


def _opened(source: Any, split: str | None) -> Any:
    if not isinstance(source, str | Path):
        return source
    datasets = _datasets()
    if Path(source).is_dir() and is_saved(Path(source)):
        return datasets.load_from_disk(str(source))
    try:
        return datasets.load_dataset(str(source), split=split)
    except Exception as error:
        raise ValueError(f"cannot load the dataset {str(source)!r}: {error}") from error


def _pick(data: Any, split: str | None) -> Any:
    if not isinstance(data, dict):
        return data
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split not in data:
        raise ValueError(f"the dataset has the splits {', '.join(data)}; choose one with split=... (got {split!r})")
    return data[split]


def _named(name: str | None) -> str:
    return f" {name!r}" if name else ""


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Hugging Face datasets need the package datasets: pip install 'ecliptic[scale]'") from error
    return datasets
