"""Records: lazy, re-iterable, splittable, and not stopped by one bad file."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ecliptic.data import records as module
from ecliptic.data.folder import folder
from ecliptic.data.images import ImageError
from ecliptic.data.records import MissingField, Records, SkipLog, join, unit_hash

ids = st.lists(st.text(min_size=1, max_size=12), unique=True, min_size=1, max_size=60)


def of(keys: list[str]) -> Records:
    return Records.from_list([{"id": key, "place": i} for i, key in enumerate(keys)])


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Records, list[str]]:
    """Six records with pictures on disk, and the list of paths that were decoded so far."""
    rows = []
    for i in range(6):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (4, 4), (i, 0, 0)).save(path)
        rows.append({"id": f"r{i}", "image": str(path), "label": "odd" if i % 2 else "even", "caption": f"number {i}"})
    opened: list[str] = []
    real: Callable[[Any], Image.Image] = module.open_image

    def spy(source: Any) -> Image.Image:
        opened.append(str(source))
        return real(source)

    monkeypatch.setattr(module, "open_image", spy)
    return Records.from_list(rows, name="six"), opened


def test_access_decodes_and_nothing_else_does(pictures: tuple[Records, list[str]]) -> None:
    records, opened = pictures
    assert len(records) == 6
    assert records.column("caption")[2] == "number 2"
    assert records.column("image")[2].endswith("2.png")
    assert records.classes == ("even", "odd")
    assert records[1:5][::2].ids == ["r1", "r3"]
    assert records.filter(lambda record: record["label"] == "odd").ids == ["r1", "r3", "r5"]
    assert [part.ids for part in records.split(0.5)] == [part.ids for part in records.split([0.5, 0.5])]
    assert records.peek(0)["image"].endswith("0.png")
    assert opened == []
    assert records[-1]["image"].getpixel((0, 0)) == (5, 0, 0)
    assert len(opened) == 1
    assert [record["id"] for record in records] == [record["id"] for record in records] == records.ids
    assert type(records[0]) is dict


def test_a_record_changed_by_its_reader_does_not_change_the_source(pictures: tuple[Records, list[str]]) -> None:
    records, _ = pictures
    records[0]["caption"] = "spoilt"
    records.peek(0)["caption"] = "spoilt"
    for record in records.map(lambda record: {**record, "caption": "new"}):
        record["label"] = "spoilt"
    assert records[0]["caption"] == "number 0"


def test_kinds_of_index(pictures: tuple[Records, list[str]]) -> None:
    records, _ = pictures
    for index in ([4, 0, -1], np.array([4, 0, -1]), torch.tensor([4, 0, -1])):
        assert records[index].ids == ["r4", "r0", "r5"]
    mask = [True, False, False, True, False, False]
    for index in (mask, np.array(mask), torch.tensor(mask)):
        assert records[index].ids == ["r0", "r3"]
    assert records[np.int64(2)]["id"] == records[torch.tensor(2)]["id"] == "r2"
    assert len(records[[]]) == 0
    with pytest.raises(IndexError, match="mask has 2 values, six has 6"):
        records[[True, False]]
    with pytest.raises(IndexError, match="six has 6 records, no index 6"):
        records[6]
    with pytest.raises(IndexError, match="no index -7"):
        records[[0, -7]]
    with pytest.raises(TypeError, match=r"\.column\('caption'\)"):
        records["caption"]
    with pytest.raises(TypeError):
        records[1.5]


@given(ids, st.data())
def test_slicing_is_that_of_lists(keys: list[str], data: st.DataObject) -> None:
    records = of(keys)
    for _ in range(3):  # slices of slices
        cut = data.draw(st.slices(max(1, len(keys))))
        records, keys = records[cut], keys[cut]
        assert records.ids == keys
        assert [record["id"] for record in records] == keys


def test_map_is_lazy_and_decodes_only_what_it_touches(pictures: tuple[Records, list[str]]) -> None:
    records, opened = pictures

    def shout(record: dict[str, Any]) -> dict[str, Any]:
        record["caption"] = record["caption"].upper()
        return record

    mapped = records.map(shout)
    assert opened == []
    assert mapped.map(shout).column("caption")[1] == "NUMBER 1"
    assert mapped.column("image")[1].endswith("1.png")
    assert opened == []
    assert mapped[1]["image"].getpixel((0, 0)) == (1, 0, 0)
    assert type(mapped[1]) is dict
    opened.clear()
    copied = records.map(lambda record: {**record, "extra": 1}, images=False)
    assert copied.column("extra") == [1] * 6
    assert copied.column("image")[3].endswith("3.png")
    assert opened == []
    assert copied[3]["image"].getpixel((0, 0)) == (3, 0, 0)
    assert records.map(lambda record: {"id": "x", "red": record["image"].getpixel((0, 0))[0]}).column("red")[3] == 3
    assert records.filter(lambda record: record["image"].getpixel((0, 0))[0] > 3).ids == ["r4", "r5"]
    inverted = records.map(lambda record: {**record, "image": record["image"].point(lambda value: 255 - value)})
    assert inverted[3]["image"].getpixel((0, 0)) == (252, 255, 255)
    assert records.map(lambda record: {**record, "size": record["image"].size}).column("size") == [(4, 4)] * 6


def test_the_record_a_function_sees_is_a_dict_in_every_way(pictures: tuple[Records, list[str]]) -> None:
    records, _ = pictures
    seen: list[dict[str, Any]] = []
    list(records[:1].map(lambda record: (seen.append(record), record)[1]))  # type: ignore[func-returns-value]
    for copy in (
        records.map(dict)[0],
        records.map(lambda record: {**record})[0],
        records.map(lambda record: record | {})[0],
        records.map(lambda record: record.copy())[0],
        records.map(lambda record: dict(record.items()))[0],
        records.map(lambda record: dict(zip(record.keys(), record.values())))[0],
        records.map(lambda record: pickle.loads(pickle.dumps(record)))[0],
    ):
        assert isinstance(copy["image"], Image.Image)
        assert copy["label"] == "even"
    assert records.map(lambda record: {"id": record["id"], "n": len(record)})[0]["n"] == 4
    assert records.filter(lambda record: "mask" in record).ids == []
    assert records.map(lambda record: {"id": "x", "got": record.get("mask", 7)})[0]["got"] == 7
    assert records.map(lambda record: (record.pop("label"), record)[1])[0].keys() == {"id", "image", "caption"}


def test_what_only_decoding_adds() -> None:
    records = Records(3, lambda i: {"id": str(i)}, load=lambda record: {**record, "mask": int(record["id"]) * 10})
    assert records.column("mask") == [0, 10, 20]
    assert records.filter(lambda record: record["mask"] > 5).ids == ["1", "2"]
    assert records.filter(lambda record: "mask" in record).ids == ["0", "1", "2"]
    assert records.map(lambda record: {"id": record["id"], "m": record["mask"]}).column("m") == [0, 10, 20]
    both = join([records, records[:1].map(lambda record: {**record, "id": "more"})])
    assert both.column("mask") == [0, 10, 20, 0]
    assert (both + records).ids == ["0", "1", "2", "more", "0", "1", "2"]
    assert both.map(lambda record: {**record, "k": 1}, images=False)[1] == {"id": "1", "mask": 10, "k": 1}


def test_missing_fields_are_named(pictures: tuple[Records, list[str]]) -> None:
    records, _ = pictures
    with pytest.raises(
        MissingField, match=r"record 0 \(id 'r0'\) of six has no 'boxes'; it has: 'id', 'image', 'label'"
    ):
        records.column("boxes")
    with pytest.raises(KeyError, match="has no 'label'"):
        _ = of(["a"]).classes
    assert pickle.loads(pickle.dumps(MissingField("words"))).args == ("words",)


# split


@settings(deadline=None)
@given(ids, ids, st.integers(0, 5), st.lists(st.floats(0.05, 1), min_size=1, max_size=4))
def test_new_records_never_move_old_ones(old: list[str], new: list[str], seed: int, weights: list[float]) -> None:
    fractions = [weight / sum(weights) for weight in weights]
    before = of(old).split(fractions, seed)
    grown = list(dict.fromkeys([*new, *old]))
    after = of(grown).split(fractions, seed)
    assert sorted(key for part in before for key in part.ids) == sorted(old)  # disjoint and complete
    for small, large in zip(before, after, strict=True):
        assert small.ids == [key for key in old if key in set(large.ids)]
        assert large.ids == [key for key in grown if key in set(large.ids)]  # order kept


def test_split_shares_seeds_and_groups() -> None:
    records = Records.from_list([{"id": str(i), "group": i // 4} for i in range(4000)])
    sizes = [len(part) for part in records.split((0.7, 0.2, 0.1))]
    assert sum(sizes) == 4000
    for size, expected in zip(sizes, (2800, 800, 400)):
        assert abs(size - expected) < 4 * (4000 * 0.25) ** 0.5  # four standard deviations at the most
    assert records.split(0.5, seed=0)[0].ids != records.split(0.5, seed=1)[0].ids
    assert records.split(0.3)[0].ids == records.split((0.3, 0.7))[0].ids
    assert [len(part) for part in records.split((1.0, 0.0))] == [4000, 0]
    one, two = records.split(0.5, by="group")
    assert not set(one.column("group")) & set(two.column("group"))
    for wrong in ((0.5, 0.4), (-0.1, 1.1), (), 1.5):
        with pytest.raises(ValueError, match="sum to 1"):
            records.split(wrong)


def test_hash_is_frozen() -> None:
    # Splits made with an earlier version must stay as they are: `printf '0\\0a' | b2sum -l 64`, first 53 of 64 bits.
    assert unit_hash(0, "a") == (0x15D8D767D2A6EBD3 >> 11) / 2**53
    values = [unit_hash(3, i) for i in range(2000)]
    assert 0 <= min(values) <= max(values) < 1
    assert abs(float(np.mean(values)) - 0.5) < 0.03


def test_shuffle_depends_on_ids_only() -> None:
    records = of([str(i) for i in range(50)])
    assert records.shuffle(1).ids == records[::-1].shuffle(1).ids != records.shuffle(2).ids
    assert sorted(records.shuffle(1).ids) == sorted(records.ids)


# bad files


def damage(kind: int, path: Path) -> None:
    """Ten ways for a file named .jpg to be no picture."""
    good = Image.fromarray(np.random.default_rng(kind).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    good.save(path, "PNG" if kind % 2 else "JPEG")
    data = path.read_bytes()
    if kind == 4:
        path.unlink()
        path.symlink_to(path.with_suffix(".nowhere"))
        return
    contents = {
        0: b"",
        1: data[: len(data) // 2],
        2: data[: len(data) // 2],
        3: b"words, words, words\n" * 20,
        5: b"<html><body>Not found</body></html>",
        6: b"\0" * 2000,
        7: data[:40] + bytes(len(data) - 40),
        8: b"\xff\xd8\xff" + bytes(range(256)),
        9: b"\x89PNG\r\n\x1a\n" + data[100:],
    }
    path.write_bytes(contents[kind])


@pytest.fixture(scope="module")
def half_bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("half_bad")
    for i in range(200):
        Image.new("RGB", (10, 10), (i, 0, 0)).save(top / f"good{i:03d}.png")
        damage(i % 10, top / f"bad{i:03d}.jpg")
    return top


@pytest.mark.parametrize("workers", [0, 3])
def test_half_of_a_folder_is_corrupt(half_bad: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    records = folder(half_bad)
    assert len(records) == 380  # the broken links are found out at once, and reported
    assert sum("a broken link" in message for message in caplog.messages) == 20
    log = SkipLog()
    kept = [record["id"] for record in records.iterate(on_error="skip", log=log, workers=workers)]
    assert kept == [f"good{i:03d}.png" for i in range(200)]
    assert sorted(entry.id for entry in log) == [f"bad{i:03d}.jpg" for i in range(200) if i % 10 != 4]
    assert all(entry.path == str(half_bad / entry.id) for entry in log)
    assert str(log).splitlines()[0] == "180 skipped:"
    assert "  20 x empty (0 bytes) (for example bad000.jpg)" in str(log).splitlines()
    with pytest.raises(ImageError, match=r"bad000\.jpg: empty"):
        list(records.iterate(workers=workers))


def test_a_bug_is_not_a_bad_file() -> None:
    def broken(record: dict[str, Any]) -> dict[str, Any]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(of(["a"]).map(broken).iterate(on_error="skip", log=SkipLog()))
    with pytest.raises(ValueError, match="'raise' or 'skip'"):
        list(of(["a"]).iterate(on_error="ignore"))  # type: ignore[arg-type]


def test_workers_keep_the_order_and_can_be_left_early(pictures: tuple[Records, list[str]]) -> None:
    records, _ = pictures
    assert [record["id"] for record in records.iterate(workers=2)] == records.ids
    walk = records.iterate(workers=2)
    assert next(walk)["id"] == "r0"
    walk.close()  # type: ignore[attr-defined]


def test_an_empty_log_prints() -> None:
    assert str(SkipLog()) == "0 skipped"
