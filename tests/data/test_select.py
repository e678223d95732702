"""Choosing records before their pictures are opened, from every kind of source."""

from pathlib import Path

import pytest
from PIL import Image

from ecliptic.data.records import Records
from ecliptic.data.scenes import SceneRecords, scenes
from ecliptic.data.select import select, undecoded
from ecliptic.data.shards import Stream, webdataset, write_shards


def examples(n: int = 10) -> list[dict]:
    return [{"id": f"e{i}", "image": Image.new("RGB", (4, 4), (i, 0, 0)), "caption": f"number {i}"} for i in range(n)]


def even(record: dict) -> bool:
    return int(record["caption"].split()[1]) % 2 == 0


def loud(record: dict) -> dict:
    return {**record, "caption": record["caption"].upper()}


def shards(folder: Path) -> list[Path]:
    return write_shards(Records.from_list(examples()), folder, max_count=3)


class Opened:
    """Records whose pictures are counted as they are opened."""

    def __init__(self, n: int = 10):
        self.count = 0
        self.records = Records(n, lambda i: {**examples(n)[i], "image": f"{i}.png"}, load=self.load)

    def load(self, record: dict) -> dict:
        self.count += 1
        return {**record, "image": Image.new("RGB", (4, 4))}


def test_records_are_chosen_without_opening_a_picture():
    source = Opened()
    assert [record["image"] for record in undecoded(source.records)] == [f"{i}.png" for i in range(10)]
    chosen = select(source.records, even, loud)
    assert isinstance(chosen, Records)
    assert chosen.column("caption") == [f"NUMBER {i}" for i in range(0, 10, 2)]
    assert source.count == 0
    assert [record["image"].size for record in chosen] == [(4, 4)] * 5
    assert source.count == 5
    assert source.records[0]["caption"] == "number 0"


def test_lists_stay_lists_and_share_their_records():
    given = examples()
    chosen = select(given, even)
    assert [record["id"] for record in chosen] == ["e0", "e2", "e4", "e6", "e8"]
    assert chosen[1] is given[2]
    assert [record["caption"] for record in select(given, even, loud)][:2] == ["NUMBER 0", "NUMBER 2"]
    assert given[0]["caption"] == "number 0"


def test_scenes_can_still_be_drawn_in_batches():
    chosen = select(scenes("train", 20, size=16), lambda record: record["label"] == "circle")
    assert isinstance(chosen, SceneRecords)
    assert {record["label"] for record in chosen.batch([0, 1])} == {"circle"}


def test_anything_else_is_chosen_from_whenever_it_is_walked_over():
    walks = []

    class Pool:
        def __iter__(self):
            walks.append(1)
            return iter(examples())

    chosen = select(Pool(), even, loud)
    assert not walks
    for count in (1, 2):
        assert [record["caption"] for record in chosen] == [f"NUMBER {i}" for i in range(0, 10, 2)]
        assert len(walks) == count
    assert len(list(undecoded(Pool()))) == 10
    with pytest.raises(TypeError, match="must be re-iterable"):
        select(iter(examples()), even)


def test_a_stream_opens_only_what_was_chosen(tmp_path, monkeypatch):
    from ecliptic.data import shards as module

    paths = shards(tmp_path)
    opened = []
    real = module.open_image
    monkeypatch.setattr(module, "open_image", lambda member: opened.append(member) or real(member))
    stream = Stream(paths)
    chosen = select(stream, even, loud)
    assert [record["caption"] for record in undecoded(stream)] == [f"number {i}" for i in range(10)]
    assert not opened
    for _ in range(2):
        assert [record["caption"] for record in chosen] == [f"NUMBER {i}" for i in range(0, 10, 2)]
    assert len(opened) == 10
    assert [record["id"] for record in stream] == [f"e{i}" for i in range(10)], "the stream that was given is as it was"
    twice = select(chosen, lambda record: record["caption"] != "NUMBER 4", lambda record: {**record, "seen": True})
    assert [(record["caption"], record["seen"]) for record in twice] == [(f"NUMBER {i}", True) for i in (0, 2, 6, 8)]
    assert [record["id"] for record in select(chosen, lambda record: "2" not in record["id"])] == [
        "e0",
        "e4",
        "e6",
        "e8",
    ]


def test_processes_share_a_chosen_stream_and_all_see_the_whole_pool(tmp_path):
    paths = shards(tmp_path)
    parts = [select(Stream(paths, rank=rank, world=2), even) for rank in range(2)]
    assert sorted(record["id"] for part in parts for record in part) == ["e0", "e2", "e4", "e6", "e8"]
    assert len(list(undecoded(Stream(paths, rank=1, world=2)))) == 10
    mixed = select(Stream(paths, shuffle=4, seed=1), even)
    assert sorted(record["id"] for record in mixed) == ["e0", "e2", "e4", "e6", "e8"]
    assert [r["id"] for r in select(webdataset(paths), even)] == ["e0", "e2", "e4", "e6", "e8"]
