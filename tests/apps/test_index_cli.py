"""`ecliptic index` with one of its options: looking after an index from the command line."""

from __future__ import annotations

import json
import shutil

import pytest

from ecliptic.apps.index import Index
from tests.apps.conftest import picture


@pytest.fixture
def indexed(cli, model, pictures):
    assert cli("index", pictures, "--model", model).exit_code == 0
    return pictures


def test_check(cli, indexed):
    value = json.loads(cli("index", indexed, "--check", "--json").stdout)
    assert (value["sound"], value["problems"], value["pictures"], value["recall_at_10"]) == (True, [], 12, 1.0)
    assert value["rows_in_graph"] == 0
    assert 0 < value["interval"][0] < value["interval"][1] == 1
    assert "12 pictures" in cli("index", "--check", "--index", indexed).stdout
    (indexed / ".ecliptic/vectors-0.f16").write_bytes(b"")
    broken = cli("index", indexed / ".ecliptic", "--check", "--json")
    assert broken.exit_code == 1
    value = json.loads(broken.stdout)
    assert not value["sound"]
    assert "has 0 bytes" in value["problems"][0]


def test_duplicates(cli, indexed, monkeypatch):
    assert cli("index", indexed, "--duplicates").stdout == "no duplicates\n"
    shutil.copy(indexed / "cat/0.png", indexed / "dog/again.png")
    cli("index", indexed)
    group = [str(indexed / "cat/0.png"), str(indexed / "dog/again.png")]
    assert cli("index", indexed, "--duplicates").stdout.splitlines() == group
    monkeypatch.chdir(indexed / "cat")  # the nearest index upwards
    value = json.loads(cli("index", "--duplicates", "--at-least", 0.9999, "--json").stdout)
    assert value["groups"] == [group]
    value = json.loads(cli("index", "--duplicates", "--at-least", -1, "--json").stdout)
    assert [len(group) for group in value["groups"]] == [13]


def test_merge_remove_and_compact(cli, model, indexed, tmp_path):
    picture(tmp_path / "more/x.png", 77)
    shutil.copy(indexed / "cat/0.png", tmp_path / "more/known.png")
    cli("index", tmp_path / "more", "--model", model)
    value = json.loads(cli("index", indexed, "--merge", tmp_path / "more", "--json").stdout)
    assert (value["pictures"], value["added"], value["known"]) == (13, 1, 1)
    with Index.open(indexed / ".ecliptic") as index:
        assert str(tmp_path / "more/x.png") in index.paths()

    value = json.loads(cli("index", indexed, "--remove", "cat/*", "--json").stdout)
    assert value["removed"] == [str(indexed / f"cat/{i}.png") for i in range(4)]
    assert value["pictures"] == 9
    none = cli("index", indexed, "--remove", "*.gif")
    assert none.exit_code == 1
    assert "no indexed path matches" in none.stderr
    value = json.loads(cli("index", indexed, "--compact", "--json").stdout)
    assert (value["dropped"], value["pictures"]) == (4, 9)
    assert "4 added" in cli("index", indexed).stdout  # the files were untouched


def test_bad_combinations_say_what_to_do(cli, indexed, tmp_path):
    for words, told in (
        (["--check", "--compact"], "name one at a time"),
        (["--at-least", 0.9], "give both"),
        (["--check", "--model", "tiny"], "leave out --model"),
        (["--merge", tmp_path / "nowhere"], "no such index"),
        (["--merge", indexed], "cannot be merged into itself"),
    ):
        done = cli("index", indexed, *words)
        assert done.exit_code == 2, words
        assert told in done.stderr
    assert "name a folder" in cli("index", "--json").stderr
    assert cli("index", tmp_path, "--check").exit_code == 2  # no index there


def test_merging_an_index_of_another_model_is_refused(cli, indexed, tmp_path):
    from ecliptic.apps.index import Signature

    Index.create(tmp_path / "other", Signature("another", "crop", 16)).close()
    done = cli("index", indexed, "--merge", tmp_path / "other")
    assert done.exit_code == 2
    assert "built with model" in done.stderr
