"""The command line: what it answers, what it says to bad input, and that it starts at once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ecliptic.apps.cli import build, verbs
from ecliptic.apps.index import Index
from ecliptic.core.encoder import load
from ecliptic.core.method import cards
from tests.apps.conftest import picture

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "numpy", "PIL.Image", "pandas", "sklearn", "rich.console")


def start(*arguments: object, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-m", "ecliptic", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# Starting


@pytest.mark.parametrize(
    "arguments", [["--help"], ["methods"], ["methods", "labelled"], ["--version"], ["search", "--help"]]
)
def test_starts_without_heavy_imports(arguments):
    code = (
        "import sys\nfrom ecliptic.apps.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as end: assert not end.code, end.code\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\nassert not heavy, heavy"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_help_and_catalogue_start_in_time():
    """CPU time, which a busy machine does not stretch; the best of three."""
    for arguments in (["--help"], ["methods"]):
        took = []
        for _ in range(3):
            before = os.times()
            start(*arguments).communicate(timeout=30)
            after = os.times()
            took.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert min(took) < 0.4, took


def test_only_the_verb_asked_for_is_imported():
    code = (
        "import sys\nfrom ecliptic.apps.cli import main\n"
        "try: main(['methods'])\nexcept SystemExit: pass\n"
        "print(sorted(n.rpartition('.')[2] for n in sys.modules if n.startswith('ecliptic.apps.cli.')))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['_shell', 'methods']"


def test_every_verb_has_help_and_json(cli):
    names = verbs()
    assert names == sorted(
        [
            "adapt",
            "claim",
            "classify",
            "compress",
            "curate",
            "demo",
            "embed",
            "evaluate",
            "export",
            "find",
            "highlight",
            "index",
            "methods",
            "run",
            "search",
            "show",
            "train",
        ]
    )
    for name in names:
        text = cli(name, "--help").stdout
        assert "--json" in text, name
    overview = CliRunner().invoke(build(), ["--help"]).stdout
    for name in names:
        line = next(line for line in overview.splitlines() if line.startswith(f"  {name} "))
        assert not line.endswith("..."), line  # the whole sentence fits


def test_an_unknown_verb_gets_a_suggestion():
    process = start("serch", "x")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "search" in errors


# The catalogue


def test_methods_by_words_and_show(cli):
    found = json.loads(cli("methods", "--json").stdout)
    assert [card["slug"] for card in found] == [card.slug for card in cards()]
    assert "gda" in cli("methods", "labelled closed form").stdout
    shown = cli("show", "gda").stdout
    assert "Gda(" in shown
    assert "views: int = 10" in shown
    assert "arxiv.org/abs/2402.04087" in shown
    value = json.loads(cli("show", "gda", "--json").stdout)
    assert value["signature"]["Gda"].startswith("Gda(")
    assert value["documentation"]


def test_methods_by_meaning_uses_the_text_tower(cli, model):
    found = json.loads(cli("methods", "zzz qqq", "--model", model, "-k", 2, "--json").stdout)
    encoder = load(model)
    texts = encoder.encode_texts([f"{card.purpose} ({card.title})" for card in cards()], overflow="windows")
    assert len(found) == min(2, len(texts))


def test_unknown_methods_are_answered_with_the_nearest(cli):
    for verb in ("show", "claim"):
        done = cli(verb, "gdaa")
        assert done.exit_code == 2
        assert "did you mean gda?" in done.stderr
        assert done.stdout == ""


def test_claim_says_what_it_needs(cli):
    assert "name a method" in cli("claim", "--fresh").stderr
    assert "write numbers" in cli("claim", "gda", "--seeds", "one").stderr


# Index and search


def test_index_and_search(cli, model, pictures):
    first = json.loads(cli("index", pictures, "--model", model, "--json").stdout)
    assert (first["pictures"], first["added"], first["bad"]) == (12, 12, [])
    again = json.loads(cli("index", pictures, "--json").stdout)  # remembers its model
    assert (again["added"], again["unchanged"], again["embedded"]) == (0, 12, 0)

    value = json.loads(cli("search", "a cat", "--index", pictures, "-k", 5, "--json").stdout)
    encoder = load(model)
    files = sorted(pictures.rglob("*.png"))
    scores = (encoder.encode_images(files) @ encoder.encode_texts(["a cat"])[0]).numpy()
    best = [str(files[i]) for i in np.argsort(-scores)[:5]]
    assert [hit["path"] for hit in value["hits"]] == best
    assert [hit["score"] for hit in value["hits"]] == pytest.approx(sorted(scores, reverse=True)[:5], abs=2e-3)

    plain = cli("search", "a cat", "--index", pictures, "-f", "-k", 3)
    assert plain.stdout.splitlines() == best[:3]
    assert plain.stderr in ("", "nothing here matches 'a cat'; the nearest are\n")  # a random model's opinion
    like = cli("search", "--image", files[4], "--index", pictures, "-f", "-k", 1)
    assert like.stdout.strip() == str(files[4])
    mixed = json.loads(
        cli("search", "a cat", "--image", files[4], "--minus", "dog", "--index", pictures, "--json").stdout
    )
    direction = (
        encoder.encode_texts(["a cat"])[0] + encoder.encode_images([files[4]])[0] - encoder.encode_texts(["dog"])[0]
    )
    wanted = encoder.encode_images(files) @ direction / direction.norm()
    assert mixed["hits"][0]["path"] == str(files[int(wanted.argmax())])
    only = cli("search", "a cat", "--index", pictures, "--glob", "fish/*", "-f")
    assert sorted(only.stdout.splitlines()) == [str(path) for path in files if path.parent.name == "fish"]
    assert cli("search", "a cat", "--index", pictures, "--glob", "*.gif").exit_code == 1


def test_search_finds_the_index_of_the_folder_it_stands_in(cli, model, pictures, monkeypatch):
    cli("index", pictures, "--model", model)
    monkeypatch.chdir(pictures / "cat")
    assert len(cli("search", "x", "-f").stdout.splitlines()) == 10


def test_half_of_two_thousand_pictures_are_corrupt(cli, model, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    good = picture(tmp_path / "one.png", size=(8, 8)).read_bytes()
    for i in range(1000):
        (folder / f"good{i:04}.png").write_bytes(good + str(i).encode())  # trailing bytes: other content, same picture
        (folder / f"torn{i:04}.png").write_bytes(good[:40] + str(i).encode())
    done = cli("index", folder, "--model", model)
    assert done.exit_code == 0
    assert "1,000 pictures in" in done.stdout
    lines = done.stderr.splitlines()
    assert lines[0] == "1,000 pictures could not be read:"
    assert len(lines) == 7
    assert "torn0000.png" in lines[1]
    assert "995 more" in lines[-1]
    value = json.loads(cli("index", folder, "--json").stdout)
    assert len(value["bad"]) == 1000
    assert {entry["path"] for entry in value["bad"]} == {str(path) for path in folder.glob("torn*")}
    assert all(entry["reason"] for entry in value["bad"])
    assert value["embedded"] == 0
    assert len(cli("search", "x", "--index", folder, "-f", "-k", 2000).stdout.splitlines()) == 1000


def test_a_folder_of_nothing_but_corrupt_pictures(cli, model, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    done = cli("index", tmp_path, "--model", model)
    assert done.exit_code == 1
    assert "none of the 1 pictures" in done.stderr
    assert cli("search", "x", "--index", tmp_path).exit_code == 2


def test_folders_that_hold_no_pictures(cli, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    done = cli("index", empty)
    assert (done.exit_code, done.stderr) == (2, f"ecliptic: no pictures in {empty}: it is empty\n")
    for name in ("a.txt", "b.txt", "c.docx"):
        (empty / name).write_text("text")
    assert "3 other files (2 x .txt, 1 x .docx)" in cli("index", empty).stderr
    assert cli("index", tmp_path / "nowhere").stderr == f"ecliptic: no such folder: {tmp_path / 'nowhere'}\n"
    assert "is a file" in cli("index", empty / "a.txt").stderr
    assert not (empty / ".ecliptic").exists()  # nothing left behind


def test_an_unreadable_folder(cli, pictures, monkeypatch):
    """Root may read everything, so the refusal is played."""
    real = os.scandir

    def scandir(path):
        if "pictures" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    done = cli("index", pictures)
    assert done.exit_code == 2
    assert "Permission denied" in done.stderr


def test_a_query_of_ten_thousand_characters_is_cut_and_said_so(cli, model, pictures):
    cli("index", pictures, "--model", model)
    done = cli("search", "cat " * 2500, "--index", pictures, "-f")
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == 10
    assert re.match(r"note: the query has 10,000 characters, more than the 32 tokens", done.stderr)


def test_bad_queries(cli, model, pictures, tmp_path):
    assert "no index in" in cli("search", "x", "--index", pictures).stderr
    assert "no such index" in cli("search", "x", "--index", tmp_path / "none").stderr
    cli("index", pictures, "--model", model)
    for query in ("", "   "):
        done = cli("search", query, "--index", pictures)
        assert (done.exit_code, done.stderr) == (2, "ecliptic: the query is empty: say what to look for\n")
    assert "nothing to look for" in cli("search", "--index", pictures).stderr
    (tmp_path / "note.txt").write_text("text")
    assert "plain text" in cli("search", "--image", tmp_path / "note.txt", "--index", pictures).stderr
    assert "no such file" in cli("search", "--image", tmp_path / "no.png", "--index", pictures).stderr


def test_models_that_are_not_there(cli, pictures, tmp_path):
    assert "did you mean offline?" in cli("index", pictures, "--model", "ofline").stderr
    done = cli("index", pictures, "--model", tmp_path / "nothing")
    assert done.exit_code == 2
    assert "no such file or folder" in done.stderr
    assert "--model is empty" in cli("index", pictures, "--model", "").stderr
    (tmp_path / "folder").mkdir()
    assert cli("index", pictures, "--model", tmp_path / "folder").exit_code == 2


def test_the_index_of_another_model_is_refused(cli, model, pictures, tmp_path):
    from tests.towers import clip_encoder

    cli("index", pictures, "--model", model)
    clip_encoder(seed=1).save_pretrained(tmp_path / "other")
    for done in (
        cli("index", pictures, "--model", tmp_path / "other"),
        cli("search", "x", "--index", pictures, "--model", tmp_path / "other"),
    ):
        assert done.exit_code == 2
        assert load(model).id in done.stderr
        assert load(tmp_path / "other").id in done.stderr
        assert f"--model {model}" in done.stderr


def test_ctrl_c_says_how_to_go_on(tmp_path):
    """A model that takes its time, so that the signal meets it at work."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(400):
        (folder / f"{i}.png").write_text(f"{i}")
    code = """
        import sys, types
        from tests.apps.fakes import FakeEmbedder
        from ecliptic.apps.cli import _shell, main
        towers = types.ModuleType("towers")
        towers.TowerEmbedder = lambda encoder, fast: FakeEmbedder(delay=0.2)
        towers.decoded_fast = lambda signature: False
        sys.modules["ecliptic.apps.index.towers"] = towers
        _shell.open_model = lambda name: None
        main(sys.argv[1:])
    """
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), "index", folder, "--batch-size", "4"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (folder / ".ecliptic" / "vectors-0.f16").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors == "\ninterrupted; what was done is kept: run the same command again to go on\n"
    with Index.open(folder / ".ecliptic") as index:
        assert 0 < len(index) < 400


def test_a_closed_pipe_ends_quietly():
    with start("methods", "--json") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 0


# Naming, learning, measuring


def test_classify_by_words(cli, model, pictures):
    value = json.loads(cli("classify", pictures, "--labels", "cat, dog,cat", "--model", model, "--json").stdout)
    assert value["labels"] == ["cat", "dog"]
    assert len(value["pictures"]) == 12
    encoder = load(model)
    heads = encoder.encode_texts(["a photo of a cat.", "a photo of a dog."])
    rows = encoder.encode_images([entry["path"] for entry in value["pictures"]])
    shares = (encoder.scale.item() * rows @ heads.T).softmax(-1)
    for entry, row in zip(value["pictures"], shares):
        assert list(entry["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert entry["label"] == ["cat", "dog"][int(row.argmax())]
    plain = cli("classify", pictures / "cat/0.png", "--labels", "cat, dog", "--model", model)
    assert re.fullmatch(r".*0\.png  (cat|dog) [\d.]+%  (cat|dog) [\d.]+%\n", plain.stdout)


def test_classify_goes_on_past_bad_pictures(cli, model, pictures, tmp_path):
    (pictures / "cat" / "torn.png").write_bytes(b"torn")
    (tmp_path / "note.txt").write_text("text")
    arguments = [pictures, tmp_path / "note.txt", tmp_path / "gone.png", "--labels", "a,b", "--model", model]
    done = cli("classify", *arguments)
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == 12
    for name in ("torn.png", "note.txt", "gone.png"):
        assert name in done.stderr
    assert len(json.loads(cli("classify", *arguments, "--json").stdout)["bad"]) == 3


def test_labels_that_make_no_sense(cli, pictures):
    assert 'give --labels "cat, dog"' in cli("classify", pictures).stderr
    assert "holds no names" in cli("classify", pictures, "--labels", " , ").stderr
    assert "one label alone" in cli("classify", pictures, "--labels", "cat").stderr
    assert "no pictures to look at" in cli("classify", pictures / "x.png", "--labels", "a,b").stderr
    assert "no such predictor" in cli("classify", pictures, "--predictor", pictures / "none").stderr
    assert "not both" in cli("classify", pictures, "--predictor", pictures, "--labels", "a,b").stderr


def test_labels_from_a_file(cli, model, pictures, tmp_path):
    (tmp_path / "labels.txt").write_text("cat, tabby\ndog\n\n")
    found = cli("classify", pictures / "cat", "--labels", f"@{tmp_path / 'labels.txt'}", "--model", model, "--json")
    assert json.loads(found.stdout)["labels"] == ["cat, tabby", "dog"]


def test_baselines_are_listed_and_shown(cli):
    listed = json.loads(cli("methods", "--baselines", "--json").stdout)
    assert "linear_probe" in listed
    assert "zero_shot" not in cli("methods").stdout
    assert "zero_shot " in cli("methods", "--baselines").stdout
    for slug in listed:
        assert "(baseline)" in cli("show", slug).stdout
    shown = json.loads(cli("show", "linear-probe", "--json").stdout)
    assert "strength" in shown["signature"]
    assert "did you mean linear_probe" in cli("show", "linear_prob").stderr


def test_highlight_draws(cli, model, pictures, tmp_path):
    out = tmp_path / "map.png"
    done = cli("highlight", "a cat", pictures / "cat/0.png", "--out", out, "--model", model)
    assert done.stdout.strip() == str(out)
    with Image.open(out) as drawn:
        assert drawn.width == 40
    value = json.loads(cli("highlight", "a cat", pictures / "cat/1.png", "--model", model, "--json").stdout)
    assert Path(value["out"]).name == "1.a-cat.png"
    assert 0 <= value["strongest"]["x"] < 40
    assert "text is empty" in cli("highlight", " ", pictures / "cat/0.png").stderr
    assert "the picture itself" in cli("highlight", "x", out, "--out", out).stderr
    assert "must end in" in cli("highlight", "x", out, "--out", tmp_path / "map.txt").stderr


def test_adapt_learns_saves_and_classifies(cli, model, tmp_path):
    """Two classes of plainly different colours: random towers tell them apart once they have seen two of each."""
    folder = tmp_path / "colours"
    for name, colour in {"dark": 30, "light": 220}.items():
        (folder / name).mkdir(parents=True)
        for i in range(8):
            noise = np.random.default_rng(i).integers(-20, 20, (32, 32, 3))
            Image.fromarray((colour + noise).astype(np.uint8)).save(folder / name / f"{i}.png")
    (folder / "dark" / "torn.png").write_bytes(b"torn")
    out = tmp_path / "predictor"
    arguments = ["--method", "gda", "--shots", 3, "--set", "views=2", "--model", model, "--name", "dark=a dark square"]
    value = json.loads(cli("adapt", folder, *arguments, "--out", out, "--json").stdout)
    assert value["adapted.accuracy"]["value"] == 1.0
    assert value["adapted.accuracy"]["n"] + 6 + len(value["bad"]) == 17
    expected = value["adapted.accuracy"]["value"] - value["zero_shot.accuracy"]["value"]
    assert value["gain"]["value"] == pytest.approx(expected)
    assert value["most_frequent.accuracy"]["value"] >= 0.5
    assert value["gain"]["low"] <= expected <= value["gain"]["high"]
    assert value["classes"] == ["a dark square", "light"]
    assert value["shots"] == {"a dark square": 3, "light": 3}
    named = json.loads(cli("classify", folder / "light", "--predictor", out, "--json").stdout)
    assert {entry["label"] for entry in named["pictures"]} == {"light"}
    text = cli("adapt", folder, *arguments).stdout
    assert "zero_shot.accuracy" in text


def test_adapt_refuses_what_it_cannot_learn_from(cli, model, pictures, tmp_path):
    single = tmp_path / "single"
    picture(single / "only" / "a.png")
    picture(single / "only" / "b.png", 1)
    assert "one class only" in cli("adapt", single, "--model", model).stderr
    picture(single / "lonely" / "c.png", 2)
    assert "'lonely' has one picture only" in cli("adapt", single, "--method", "gda", "--model", model).stderr
    picture(tmp_path / "flat" / "a.png")
    assert "no labels" in cli("adapt", tmp_path / "flat", "--model", model).stderr
    assert "did you mean gda?" in cli("adapt", pictures, "--method", "gdaa").stderr
    assert "did you mean linear_probe?" in cli("adapt", pictures, "--method", "gda", "--method", "linear_prob").stderr
    assert "no setting 'vews'" in cli("adapt", pictures, "--method", "gda", "--set", "vews=2").stderr
    assert "write name=value" in cli("adapt", pictures, "--method", "gda", "--set", "views").stderr
    assert "--set needs one --method" in cli("adapt", pictures, "--set", "views=2").stderr
    assert "no task 'sort'" in cli("adapt", pictures, "--task", "sort").stderr
    assert "--method is for --task name" in cli("adapt", pictures, "--task", "ood", "--method", "gda").stderr
    assert "--unknown is for --task ood" in cli("adapt", pictures, "--unknown", "other").stderr
    assert "--instruction is for --task rank" in cli("adapt", pictures, "--instruction", "size").stderr
    assert "no class 'bird'" in cli("adapt", pictures, "--name", "bird=a bird", "--model", model).stderr


def test_evaluate_folder_and_table(cli, model, pictures, tmp_path):
    value = json.loads(cli("evaluate", model, pictures, "--json").stdout)
    assert value["zero_shot.accuracy"]["n"] == 12
    assert (
        value["zero_shot.accuracy"]["low"]
        <= value["zero_shot.accuracy"]["value"]
        <= value["zero_shot.accuracy"]["high"]
    )
    table = tmp_path / "pairs.csv"
    rows = [
        f"pictures/{path.relative_to(pictures)},a {path.parent.name} number {path.stem}"
        for path in pictures.rglob("*.png")
    ]
    table.write_text("image,caption\n" + "\n".join(rows) + "\n")
    page = tmp_path / "page.html"
    value = json.loads(cli("evaluate", model, table, "--json", "--html", page, "--out", tmp_path / "n.json").stdout)
    for way in ("text_to_image", "image_to_text"):
        assert [value[f"{way}.recall@{k}"]["n"] is not None for k in (1, 5, 10)] == [True] * 3
    assert "<html" in page.read_text().lower()
    assert json.loads((tmp_path / "n.json").read_text()) == value
    assert "text_to_image.recall@1" in cli("evaluate", model, table).stdout
    assert "no source 'stamp'" in cli("evaluate", model, "stamp").stderr
    assert "no task" in cli("evaluate", model, table, "--task", "magic").stderr


# Embedding and training


def test_embed_writes_rows_beside_their_metadata(cli, model, pictures, tmp_path, monkeypatch):
    (pictures / "cat" / "0a.png").write_bytes(b"torn")  # in the middle of a shard
    (pictures / "dog" / "0.txt").write_text("a dog")
    out = tmp_path / "out"
    command = ["embed", pictures, "--out", out, "--model", model, "--shard", 5, "--dtype", "float32", "--json"]
    value = json.loads(cli(*command).stdout)
    assert (value["rows"], value["shards"], value["resumed"], len(value["bad"])) == (12, 3, 0, 1)
    rows = np.concatenate([np.load(out / "img_emb" / f"img_emb_{i}.npy") for i in range(3)])
    metadata = [(out / "metadata" / f"metadata_{i}.jsonl").read_text() for i in range(3)]
    lines = [json.loads(line) for text in metadata for line in text.splitlines()]
    assert [line["label"] for line in lines] == ["cat"] * 4 + ["dog"] * 4 + ["fish"] * 4
    np.testing.assert_allclose(rows, load(model).encode_images([line["path"] for line in lines]).numpy(), atol=1e-6)
    assert json.loads((out / "errors.jsonl").read_text())["id"] == "cat/0a.png"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}

    assert json.loads(cli(*command).stdout)["resumed"] == 3
    (out / "metadata" / ".done_1.json").unlink()  # as if killed before the end of shard 1
    picture(pictures / "fish" / "3.png", 99)  # and shard 2 has changed
    value = json.loads(cli(*command).stdout)
    assert (value["rows"], value["resumed"]) == (12, 1)
    changed = {path.name for path, stamp in before.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {"img_emb_1.npy", "img_emb_2.npy"}
    other = cli(*command[:-2], "float16")
    assert other.exit_code == 2
    assert "dtype 'float32', not 'float16'" in other.stderr
    assert "no dtype" in cli("embed", pictures, "--out", tmp_path / "y", "--dtype", "int8").stderr
    assert "other files" in cli("embed", pictures, "--out", pictures, "--model", model).stderr


def test_train_makes_a_model(cli, model, pictures, tmp_path):
    table = tmp_path / "pairs.csv"
    rows = [
        f"pictures/{path.relative_to(pictures)},a {path.parent.name} {path.stem}" for path in pictures.rglob("*.png")
    ]
    table.write_text("image,caption\n" + "\n".join(rows) + "\n")
    out = tmp_path / "trained"
    command = ["train", table, "--out", out, "--model", model, "--steps", 3, "--batch-size", 4, "--json"]
    value = json.loads(cli(*command).stdout)
    trained = load(out)
    assert trained.id == value["id"] != load(model).id
    assert trained.history[-1]["step"] == "train"
    assert value["loss"]["first"] > 0
    assert (tmp_path / "trained.checkpoints" / "log.jsonl").exists()
    assert "no captions" in cli("train", pictures, "--out", tmp_path / "x", "--model", model).stderr
    assert (
        "no loss 'nce'" in cli("train", table, "--out", tmp_path / "x", "--model", model, "--objective", "nce").stderr
    )
    assert "is no loss" in cli("train", table, "--out", tmp_path / "x", "--model", model, "--objective", "gda").stderr
    assert "other files" in cli("train", table, "--out", pictures, "--model", model).stderr
