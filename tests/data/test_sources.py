"""Folders, tables, HF datasets and the names a user types."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecliptic.data.folder import folder
from ecliptic.data.hub import hf
from ecliptic.data.images import ImageError
from ecliptic.data.records import Records, SkipLog
from ecliptic.data.sources import BUILT_IN, open_source
from ecliptic.data.table import TableError, table
from ecliptic.data.text import read_text


def picture(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4), (value, 0, 0)).save(path)
    return path


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def red(records: Records, i: int) -> int:
    return int(np.asarray(records[i]["image"])[0, 0, 0])


# folders


def test_a_folder_per_class(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/deep/2.png", "cat/1.png", "dog/notes.md"):
        picture(tmp_path / name) if name.endswith("png") else (tmp_path / name).touch()
    records = folder(tmp_path)
    assert records.ids == ["cat/1.png", "cat/deep/2.png", "dog/1.png"]
    assert records.column("label") == ["cat", "cat", "dog"]
    assert records.classes == ("cat", "dog")
    assert "label" not in folder(tmp_path, labels=False)[0]
    assert open_source(str(tmp_path)).ids == open_source(tmp_path).ids == records.ids
    picture(tmp_path / "stray.png")
    assert "label" not in folder(tmp_path)[0]
    with pytest.raises(ValueError, match=r"stray\.png lies in no class folder"):
        folder(tmp_path, labels=True)


def test_a_flat_folder_with_captions(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.jpg")
    picture(tmp_path / "c.png")
    (tmp_path / "a.txt").write_bytes("\ufeffein  Löwe\n im Gras\n".encode())
    (tmp_path / "b.jpg.txt").write_bytes("caf\xe9".encode("latin-1"))
    records = folder(tmp_path)
    assert [record.get("caption") for record in records] == ["ein Löwe im Gras", "café", None]
    assert "label" not in records[0]
    with pytest.raises(KeyError, match=r"record 2 \(id 'c.png'\)"):
        records.column("caption")


def test_split_folders_are_not_classes(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "train/dog/1.png", "val/cat/1.png"):
        picture(tmp_path / name)
    records = folder(tmp_path)
    assert records.column("split") == ["train", "train", "val"]
    assert records.column("label") == ["cat", "dog", "cat"]


def test_folders_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no images in .*looked for files named .*png"):
        folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        folder(tmp_path / "gone")


@pytest.mark.skipif(os.name != "posix", reason="names are text on this system")
def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\xfe.png"
    Path(os.fsdecode(path)).write_bytes(png(9))
    records = folder(tmp_path)
    assert records.ids == ["\\xff\\xfe.png"]
    assert red(records, 0) == 9
    assert sum(len(part) for part in records.split(0.5)) == 1


# text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("grün – 5 €".encode(encoding))
    assert read_text(tmp_path / "a.txt") == "grün – 5 €"


# tables


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def test_csv_with_captions(tmp_path: Path) -> None:
    picture(tmp_path / "img" / "a.png", 1)
    picture(tmp_path / "img" / "b.png", 2)
    away = picture(tmp_path.parent / f"{tmp_path.name}.png", 3)
    text = f'Image , caption,year\nimg/a.png,"a ""big"", red\ncat",1999\n\nimg/b.png,a dog,2000\n{away},a cow,2001\n'
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        records = table(write(tmp_path / "t.csv", text, encoding))
        assert records.column("caption") == ['a "big", red\ncat', "a dog", "a cow"]
        assert [red(records, i) for i in range(3)] == [1, 2, 3]
        assert records.ids == ["img/a.png", "img/b.png", str(away)]
        assert records.column("year") == ["1999", "2000", "2001"]


@pytest.mark.parametrize(("mark", "name"), [(";", "t.csv"), ("\t", "t.tsv"), ("\t", "t.csv"), ("|", "t.csv")])
def test_other_delimiters(tmp_path: Path, mark: str, name: str) -> None:
    picture(tmp_path / "a.png")
    records = open_source(write(tmp_path / name, f"image{mark}label\r\na.png{mark}cat, tabby\r\n"))
    assert records.column("label") == ["cat, tabby"]


def test_several_captions_of_one_image_and_own_ids(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    records = table(write(tmp_path / "t.csv", "image,caption\na.png,one\na.png,two\na.png,three\n"))
    assert records.ids == ["a.png", "a.png#2", "a.png#3"]
    records = table(write(tmp_path / "t.csv", "image,caption,id\na.png,one,x\na.png,two,y\n"))
    assert records.ids == ["x", "y"]
    with pytest.raises(TableError, match=r"line 3: the id 'x' was used before"):
        table(write(tmp_path / "t.csv", "image,caption,id\na.png,one,x\na.png,two,x\n"))


def test_old_code_pages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "a.png")
    records = table(write(tmp_path / "t.csv", "image,caption\na.png,Käfer\n", "cp1252"))
    assert records.column("caption") == ["Käfer"]
    assert "save it as UTF-8" in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty: the first line must name the columns"),
        ("image,caption\n", "a header but no rows"),
        ("path,caption\na.png,x\n", r"no column 'image' \(it has: 'path', 'caption'\); rename"),
        ("image,words\na.png,x\n", "neither a column 'caption' nor 'label'"),
        ("image,caption\na.png,x,y\n", r"line 2: 3 fields, but the header names 2 columns .*double quotes"),
        ("image,caption\na.png\n", "line 2: 1 fields"),
        ("image,caption\na.png,\n", "line 2: the column 'caption' is empty"),
        ("image,caption\n ,x\n", "line 2: the column 'image' is empty"),
        ("image,caption,caption\na.png,x,y\n", "'caption' appears twice"),
        ("image,caption\nhttps://x.org/a.png,x\n", "line 2: .* is a web address"),
        ("image,caption\na.png,x\ngone.png,y\n", r"1 of 2 image files do not exist \(line 3: gone.png\)"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, text: str, words: str) -> None:
    picture(tmp_path / "a.png")
    path = write(tmp_path / "t.csv", text)
    with pytest.raises(TableError, match=words) as caught:
        table(path)
    assert str(path) in str(caught.value)


def test_missing_files_by_choice(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    path = write(tmp_path / "t.csv", "image,label\na.png,x\ngone.png,y\n")
    assert table(path, missing="skip").ids == ["a.png"]
    later, log = table(path, missing="later"), SkipLog()
    assert [record["id"] for record in later.iterate(on_error="skip", log=log)] == ["a.png"]
    assert [entry.id for entry in log] == ["gone.png"]
    with pytest.raises(TableError, match="no such table"):
        table(tmp_path / "no.csv")
    with pytest.raises(ValueError, match="'error', 'skip' or 'later'"):
        table(path, missing="ignore")  # type: ignore[arg-type]


def test_own_column_names(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    records = table(write(tmp_path / "t.csv", "file,alt\na.png,a cat\n"), image="file", caption="alt")
    assert records[0]["caption"] == "a cat"


def test_parquet_with_paths_and_with_images_inside(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    picture(tmp_path / "a.png", 7)
    parquet.write_table(pa.table({"image": ["a.png"], "label": [3], "n": [1.5]}), tmp_path / "paths.parquet")
    records = open_source(tmp_path / "paths.parquet")
    assert (records.column("label"), records.column("n"), red(records, 0)) == (["3"], [1.5], 7)
    stored = [{"bytes": png(i), "path": f"{i}.png"} for i in range(5)]
    inside = pa.table({"image": stored, "caption": [f"c{i}" for i in range(5)]})
    parquet.write_table(inside, tmp_path / "inside.parquet", row_group_size=2)
    records = table(tmp_path / "inside.parquet")
    assert [red(records, i) for i in (4, 0, 3, 1, 2)] == [4, 0, 3, 1, 2]
    assert records.ids[:2] == ["inside/0", "inside/1"]
    parquet.write_table(pa.table({"image": [png(5), b"junk"], "label": ["x", "y"]}), tmp_path / "raw.parquet")
    records = table(tmp_path / "raw.parquet")
    assert red(records, 0) == 5
    with pytest.raises(ImageError, match=r"raw\.parquet\[row group 0, row 1\]"):
        records[1]
    parquet.write_table(pa.table({"photo": ["a.png"], "label": ["x"]}), tmp_path / "wrong.parquet")
    with pytest.raises(TableError, match=r"no column 'image' \(it has: 'photo', 'label'\)"):
        table(tmp_path / "wrong.parquet")
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    with pytest.raises(TableError, match="not a readable Parquet file"):
        table(tmp_path / "junk.parquet")


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "t.parquet").touch()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").touch()
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'ecliptic\[scale\]'"):
        open_source(tmp_path / "t.parquet")
    with pytest.raises(ImportError, match=r"pip install 'ecliptic\[scale\]'"):
        open_source(tmp_path / "saved")


# HF datasets


def test_hf_in_memory_and_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "text": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    rows = {"picture": [{"bytes": png(i), "path": None} for i in range(3)] + [{"bytes": b"bad", "path": "x.png"}]}
    data = datasets.Dataset.from_dict({**rows, "text": list("abcd"), "kind": [0, 1, 1, 0]}, features=features)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "two"))
    for records in (hf(data), open_source(tmp_path / "one"), hf(tmp_path / "two", "train")):
        assert records.column("label") == ["cat", "dog", "dog", "cat"]
        assert records.column("caption") == list("abcd")
        assert records.ids == ["0", "1", "2", "3"]
        assert red(records, 2) == 2
        with pytest.raises(ImageError, match=r"x\.png"):
            records[3]
    with pytest.raises(ValueError, match="the splits train, test; choose one"):
        open_source(tmp_path / "two")
    with pytest.raises(ValueError, match="no column 'words'"):
        hf(data, caption="words")
    with pytest.raises(ValueError, match="no column of images"):
        hf(data.remove_columns("picture"))


# names


def test_names_a_user_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(BUILT_IN) == {"stamps", "clipart", "photos", "textiles", "scenes"}
    with pytest.raises(ValueError, match=r"no source 'stamp' \(did you mean stamps\?\); give a folder"):
        open_source("stamp")
    with pytest.raises(ValueError, match="no such file or folder"):
        open_source("/no/where/at/all")
    (tmp_path / "notes.docx").touch()
    with pytest.raises(ValueError, match=r"cannot read records from a \.docx"):
        open_source(tmp_path / "notes.docx")
    picture(tmp_path / "photos" / "cat" / "a.png")
    monkeypatch.chdir(tmp_path)
    assert open_source("./photos").ids == ["cat/a.png"]
    assert open_source(Path("photos")).ids == ["cat/a.png"]


def test_labels_may_be_missing_where_that_is_said(tmp_path):
    for name in ("cat/a.png", "dog/b.png", "c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    records = open_source(tmp_path, partly_labelled=True)
    assert dict(zip(records.ids, records.column("label"))) == {"c.png": None, "cat/a.png": "cat", "dog/b.png": "dog"}
    with pytest.raises(KeyError):
        open_source(tmp_path).column("label")
    table = tmp_path / "t.csv"
    table.write_text("image,label\ncat/a.png,cat\nc.png, \n")
    assert open_source(table, partly_labelled=True).column("label") == ["cat", None]
    with pytest.raises(ValueError, match="line 3: the column 'label' is empty"):
        open_source(table)
