"""`ecliptic curate`: what it keeps, where it writes it, and what it says about bad input."""

import csv
import json

import pytest

from ecliptic.data.records import Records
from ecliptic.data.shards import webdataset, write_shards
from ecliptic.data.sources import open_source
from ecliptic.methods.curate.metaclip import MetaClip

TEXTS = ["a dog", "a dog", "a dog in the snow", "a dog", "a cat", "IMG_12.jpg", "a red yak", "Dog"]


@pytest.fixture
def table(pictures, tmp_path):
    files = sorted(pictures.rglob("*.png"))[: len(TEXTS)]
    with (tmp_path / "pool.csv").open("w", newline="", encoding="utf-8") as handle:
        rows = csv.writer(handle)
        rows.writerow(["image", "caption"])
        # Relative, as what a step keeps depends on the id: it must not change with the folder that pytest makes.
        rows.writerows([file.relative_to(tmp_path).as_posix(), text] for file, text in zip(files, TEXTS, strict=True))
    (tmp_path / "concepts.txt").write_text("dog\ncat\nred yak\n", encoding="utf-8")
    return tmp_path / "pool.csv"


def command(table, *more):
    return ["curate", table, "--metadata", table.with_name("concepts.txt"), *more]


def test_a_dry_run_tells_and_writes_nothing(cli, table):
    before = sorted(table.parent.rglob("*"))
    said = json.loads(cli(*command(table, "-t", 1, "--dry-run", "--json")).stdout)
    assert (said["records"], said["matched"], said["t"]) == (8, 6, 1)
    assert said["head"][0]["entry"] == "dog"
    told = cli(*command(table, "-t", 1, "--dry-run")).stdout
    assert "8 records, 6 matched (75.0%)" in told
    assert "wrote" not in told
    assert sorted(table.parent.rglob("*")) == before


def test_shards_and_tables_hold_what_the_step_keeps(cli, table, tmp_path):
    step = MetaClip(["dog", "cat", "red yak"], t=2, seed=3)
    expected = [(record["id"], record["caption"]) for record in step.apply(open_source(table))]
    assert 3 <= len(expected) < 6
    said = json.loads(cli(*command(table, "-t", 2, "--seed", 3, "--out", tmp_path / "shards", "--json")).stdout)
    assert (said["kept"], said["written"], said["bad"]) == (len(expected), len(expected), [])
    again = webdataset(str(tmp_path / "shards" / "*.tar"))
    assert [(record["id"], record["caption"]) for record in again] == expected
    told = cli(*command(table, "-t", 2, "--seed", 3, "--out", tmp_path / "kept.csv")).stdout
    assert f"wrote {len(expected)} pairs to" in told
    assert [(record["id"], record["caption"]) for record in open_source(tmp_path / "kept.csv")] == expected
    inf = json.loads(cli(*command(table, "-t", "inf", "--out", tmp_path / "all.csv", "--json")).stdout)
    assert inf["written"] == 6
    assert inf["t"] is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-t", 2, "--tail-mass", 0.1, "--dry-run"], "either -t or --tail-mass"),
        (["-t", 2], "say where to write with --out, or --dry-run"),
        (["--out", "x", "--dry-run"], "leave --out away"),
        (["-t", 0, "--dry-run"], "t must be above 0"),
        (["--metadata", "nowhere.txt", "--dry-run"], "there is no file nowhere.txt"),
    ],
)
def test_bad_options_are_named(cli, table, more, message):
    done = cli(*command(table, *more))
    assert done.exit_code == 2
    assert message in done.stderr


def test_unfit_sources_are_named(cli, table, pictures, tmp_path):
    assert "no captions to choose by" in cli("curate", pictures, "--dry-run").stderr
    (tmp_path / "other.txt").write_text("zebra\n", encoding="utf-8")
    assert (
        "names any of the 1 concepts" in cli("curate", table, "--metadata", tmp_path / "other.txt", "--dry-run").stderr
    )
    assert "is there already" in cli(*command(table, "--out", table)).stderr
    rows = [{**record, "image": record["image"]} for record in open_source(table)]
    write_shards(Records.from_list(rows), tmp_path / "tars")
    done = cli(*command(table)[:1], tmp_path / "tars" / "00000.tar", *command(table)[2:], "--out", tmp_path / "x.csv")
    assert "no files of their own: give --out a folder" in done.stderr
