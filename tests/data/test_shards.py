"""WebDataset shards: patterns, reading, atomic writing, and the same files through the `webdataset` package."""

import io
import json
import os
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ecliptic.data import shards as module
from ecliptic.data.images import ImageError
from ecliptic.data.records import Records, SkipLog
from ecliptic.data.shards import ShardError, ShardWriter, Stream, expand, index, webdataset, write_shards


def picture(value: int) -> Image.Image:
    return Image.new("RGB", (6, 4), (value % 256, 1, 2))


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    picture(value).save(buffer, "PNG")
    return buffer.getvalue()


def examples(n: int) -> Records:
    return Records.from_list(
        {"id": f"item/{i}", "image": picture(i), "caption": f"number {i}", "label": str(i % 3)} for i in range(n)
    )


def tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


# patterns


def test_braces(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i:05d}.tar").touch()
    (tmp_path / "a.tar").touch()
    names = lambda pattern: [Path(path).stem for path in expand(pattern)]  # noqa: E731
    assert names(f"{tmp_path}/{{00000..00003}}.tar") == ["00000", "00001", "00002", "00003"]
    assert names(f"{tmp_path}/{{00002..00001}}.tar") == ["00002", "00001"]
    assert names(f"{tmp_path}/{{a,00001}}.tar") == ["a", "00001"]
    assert names(f"{tmp_path}/0000*.tar") == ["00000", "00001", "00002", "00003"]
    assert names(f"{tmp_path}/a.tar::{tmp_path}/00000.tar") == ["a", "00000"]
    assert names([tmp_path / "a.tar", f"{tmp_path}/0000{{0..1}}.tar"]) == ["a", "00000", "00001"]
    assert module._braces("{8..11}") == ["8", "9", "10", "11"]
    assert module._braces("{08..11}") == ["08", "09", "10", "11"]
    assert module._braces("{a,b}{0..1}") == ["a0", "a1", "b0", "b1"]
    for pattern, words in (
        (f"{tmp_path}/{{00000..00009}}.tar", r"no such shard: .*00004\.tar"),
        (f"{tmp_path}/{{x}}.tar", "cannot understand"),
        ("pipe:cat x.tar", "only local files"),
        ("https://x.org/a.tar", "only local files"),
        ([], "names no shards"),
    ):
        with pytest.raises(ShardError, match=words):
            expand(pattern)


# reading


def test_fields_of_a_sample(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "a.tar",
        [
            ("d/0001.jpg", png(5)),
            ("d/0001.txt", b" a cat \n"),
            ("d/0001.JSON", json.dumps({"width": 6, "caption": "other", "label": "x"}).encode()),
            ("d/0001.mask.png", png(255)),
            ("d/0001.npy", b"raw"),
            ("d/__meta__.txt", b"left out"),
            ("d/0002.cls", b"1"),
            ("d/0002.webp", png(6)),
        ],
    )
    records = webdataset(path, labels=["cat", "dog"])
    first, second = records
    assert first.keys() == {"id", "image", "caption", "width", "label", "mask", "npy"}
    assert (first["id"], first["caption"], first["label"], first["npy"]) == ("d/0001", "a cat", "x", b"raw")
    assert first["image"].getpixel((0, 0)) == (5, 1, 2)
    assert first["mask"].mode == "L"
    assert (second["id"], second["label"]) == ("d/0002", "dog")
    assert webdataset(path).column("image")[0].name == f"{path}::d/0001.jpg"
    assert webdataset(path)[1]["label"] == "1"


def test_keys_that_repeat_over_shards(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tar(tmp_path / f"{name}.tar", [("0.png", png(0)), ("0.txt", b"t")])
    assert webdataset(f"{tmp_path}/{{a,b}}.tar").ids == ["a/0", "b/0"]
    tar(tmp_path / "c.tar", [("0.png", png(0)), ("0.json", b'{"id": "own"}')])
    assert webdataset(tmp_path / "c.tar").ids == ["own"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_fast_index_agrees_with_tarfile(tmp_path: Path, format: int) -> None:
    members = [(f"{i:04d}.{ext}", os.urandom(i * 37 % 1500)) for i in range(40) for ext in ("png", "txt")]
    path = tar(tmp_path / "a.tar", members, format)
    with tarfile.open(path) as reference:
        expected = [(member.name, member.offset_data, member.size) for member in reference]
    assert module._plain_members(path) == expected == module._members(path)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path: Path, format: int) -> None:
    names = ["k" * 60 + "/" + "m" * 80 + ".png", "ü" * 30 + ".png", "plain.png"]
    path = tar(tmp_path / "a.tar", [(name, png(i)) for i, name in enumerate(names)], format)
    assert webdataset(path).ids == [name[:-4] for name in names]
    assert [record["image"].getpixel((0, 0))[0] for record in webdataset(path)] == [0, 1, 2]


def test_a_shard_cut_short_gives_what_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_shards(examples(10), tmp_path)[0]
    data = path.read_bytes()
    seventh = index(path)[7][1]["png"]
    path.write_bytes(data[: seventh[0] + 10])
    assert webdataset(path).ids == [f"item/{i}" for i in range(7)]
    assert "ends early" in caplog.text


def test_what_is_no_shard(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("words " * 1000)
    (tmp_path / "empty.tar").touch()
    tar(tmp_path / "nothing.tar", [])
    tar(tmp_path / "twice.tar", [("a.png", b""), ("a.png", b"")])
    tar(tmp_path / "json.tar", [("a.png", png(0)), ("a.json", b"{")])
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as out:
        out.addfile(tarfile.TarInfo("a.png"))
    for name, words in (
        ("text", "not a tar file"),
        ("empty", "not a tar file|no samples"),
        ("nothing", "no samples"),
        ("twice", r"two members named a\.png"),
        ("packed", "compressed"),
    ):
        with pytest.raises(ShardError, match=words) as caught:
            webdataset(tmp_path / f"{name}.tar")
        assert f"{name}.tar" in str(caught.value)
    with pytest.raises(ShardError, match=r"json\.tar::a\.json: not JSON"):
        webdataset(tmp_path / "json.tar").column("id")


def test_large_indices_are_kept_and_noticed_when_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECLIPTIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_WORTH_KEEPING", 0)
    path = tar(tmp_path / "a.tar", [("a.png", png(0))])
    before = index(path)
    assert index(path) == before == [("a", {"png": (512, len(png(0)))})]
    assert len(list((tmp_path / "cache" / "parsed").iterdir())) == 1
    tar(tmp_path / "a.tar", [("a.png", png(0)), ("b.png", png(0))])
    assert [key for key, _ in index(path)] == ["a", "b"]


# writing

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
rows = st.lists(
    st.tuples(st.text(min_size=1, max_size=30), st.text(max_size=40).map(str.strip), values, st.integers(0, 255)),
    min_size=1,
    max_size=12,
    unique_by=lambda row: row[0],
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows, st.integers(1, 5), st.integers(1, 20_000))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], count: int, size: int) -> None:
    records = Records.from_list(
        {"id": key, "image": picture(red), "caption": text, "extra": extra} for key, text, extra, red in rows
    )
    folder = tmp_path_factory.mktemp("shards")
    paths = write_shards(records, folder, max_count=count, max_bytes=size)
    back = webdataset(f"{folder}/{{{paths[0].stem}..{paths[-1].stem}}}.tar")
    for written, read in zip(records, back, strict=True):
        assert np.array_equal(np.asarray(written.pop("image")), np.asarray(read.pop("image")))
        assert read == written
    for path in paths:
        inside = index(path)
        assert len(inside) <= count
        assert len(inside) == 1 or path.stat().st_size <= size + 2 * tarfile.RECORDSIZE


def test_shards_stay_below_the_byte_limit(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)  # some 30 kB that do not pack
    records = Records.from_list({"id": str(i), "image": Image.fromarray(noise)} for i in range(7))
    sample = len(noise.tobytes()) + 3000
    for limit, expected in ((3 * sample, [3, 3, 1]), (2 * sample, [2, 2, 2, 1]), (1, [1] * 7)):
        paths = write_shards(records, tmp_path / str(limit), max_bytes=limit)
        assert [len(index(path)) for path in paths] == expected


def test_masks_arrays_and_stored_files(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.jpg")
    Image.new("CMYK", (9, 9)).save(tmp_path / "b.tif")
    record = {"id": "a", "image": str(tmp_path / "a.jpg"), "mask": Image.new("L", (9, 9), 7)}
    record |= {"boxes": torch.tensor([[0, 1, 2, 3]]), "score": np.float32(0.5)}
    other = {"id": "b", "image": str(tmp_path / "b.tif")}
    path = write_shards(Records.from_list([record, other]), tmp_path / "out")[0]
    with tarfile.open(path) as out:
        assert [member.name for member in out] == [
            *("000000000.jpg", "000000000.mask.png", "000000000.json"),
            *("000000001.png", "000000001.json"),
        ]
        stored = out.extractfile("000000000.jpg")
        assert stored is not None
        assert stored.read() == (tmp_path / "a.jpg").read_bytes()  # not encoded a second time
    back = webdataset(path)[0]
    assert (back["boxes"], back["score"], back["mask"].getpixel((0, 0))) == ([[0, 1, 2, 3]], 0.5, 7)
    again = write_shards(webdataset(path), tmp_path / "again")[0]
    assert again.read_bytes() == path.read_bytes()


def test_bad_pictures_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 and so on")
    picture(1).save(tmp_path / "good.png")
    records = Records.from_list(
        {"id": name, "image": str(tmp_path / name)} for name in ("bad.jpg", "good.png", "gone.png")
    )
    log = SkipLog()
    paths = write_shards(records, tmp_path / "out", log=log)
    assert webdataset(paths).ids == ["good.png"]
    assert [entry.id for entry in log] == ["bad.jpg", "gone.png"]
    unchecked = write_shards(records[:1], tmp_path / "unchecked", check=False)
    with pytest.raises(ImageError, match=r"00000\.tar::000000000\.jpg"):
        webdataset(unchecked)[0]


def test_a_shard_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardWriter(tmp_path, max_count=2) as writer:
            for i, record in enumerate(examples(5)):
                assert (
                    sorted(path.name for path in tmp_path.glob("*.tar"))
                    == ["00000.tar", "00001.tar"][: max(0, i - 1) // 2]
                )
                writer.write(record)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar", "00001.tar"]
    assert len(webdataset(f"{tmp_path}/*.tar")) == 4
    with pytest.raises(ShardError, match="already holds shards"):
        ShardWriter(tmp_path)
    assert [path.name for path in write_shards(examples(1), tmp_path, prefix="more-")] == ["more-00000.tar"]


def test_records_that_cannot_be_written(tmp_path: Path) -> None:
    for record, words in (
        ({"image": picture(0)}, "needs 'id' and 'image'"),
        ({"id": "a", "image": picture(0), "x": object()}, "'a' cannot be stored as JSON: a value of type object"),
        ({"id": "a", "image": picture(0), "x": float("nan")}, "JSON"),
        ({"id": "a", "image": picture(0), "Mask.1": picture(0)}, "lower-case"),
    ):
        with pytest.raises(ShardError, match=words), ShardWriter(tmp_path) as writer:
            writer.write(record)
        assert list(tmp_path.iterdir()) == []
    for wrong in ({"max_count": 0}, {"encode": "gif"}):
        with pytest.raises(ValueError, match=r"max_count|encode"):
            ShardWriter(tmp_path, **wrong)  # type: ignore[arg-type]


# streaming


def test_stream_covers_everything_once_per_pass(tmp_path: Path) -> None:
    write_shards(examples(23), tmp_path, max_count=4)
    pattern = f"{tmp_path}/*.tar"
    plain = Stream(pattern)
    assert [record["id"] for record in plain] == [record["id"] for record in plain] == webdataset(pattern).ids
    everything = sorted(webdataset(pattern).ids)
    passes = [[record["id"] for record in stream] for stream in [Stream(pattern, shuffle=5, seed=1)] for _ in range(2)]
    again = Stream(pattern, shuffle=5, seed=1)
    assert [record["id"] for record in again] == passes[0]
    assert passes[0] != passes[1]
    assert sorted(passes[0]) == sorted(passes[1]) == everything
    parts = [[record["id"] for record in Stream(pattern, shuffle=3, rank=rank, world=3)] for rank in range(3)]
    assert sorted(id for part in parts for id in part) == everything
    with pytest.raises(ValueError, match="rank"):
        Stream(pattern, rank=3, world=3)


# the other implementation


@pytest.fixture
def other() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("webdataset")
        yield package


def test_the_package_reads_ours(tmp_path: Path, other: Any) -> None:
    write_shards(examples(7), tmp_path, max_count=3)
    urls = f"{tmp_path}/{{00000..00002}}.tar"
    data = other.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png", "txt", "json")
    seen = list(data)
    assert [text for _, text, _ in seen] == [f"number {i}" for i in range(7)]
    assert [fields["id"] for _, _, fields in seen] == [f"item/{i}" for i in range(7)]
    assert [image.getpixel((0, 0))[0] for image, _, _ in seen] == list(range(7))


def test_we_read_the_package(tmp_path: Path, other: Any) -> None:
    with other.ShardWriter(f"{tmp_path}/%05d.tar", maxcount=3, verbose=0) as sink:
        for i in range(7):
            fields = {"url": f"u{i}"}
            sink.write({"__key__": f"s{i:04d}", "png": picture(i), "txt": f"number {i}", "json": fields, "cls": i})
    records = webdataset(f"{tmp_path}/{{00000..00002}}.tar")
    assert records.ids == [f"s{i:04d}" for i in range(7)]
    assert records.column("caption") == [f"number {i}" for i in range(7)]
    assert records.column("url") == [f"u{i}" for i in range(7)]
    assert records.column("label") == [str(i) for i in range(7)]
    assert [record["image"].getpixel((0, 0))[0] for record in records] == list(range(7))
