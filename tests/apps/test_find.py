"""Boxes for a phrase: the library call, the verb, and what both say to bad input."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn, tensor
from torch.testing import assert_close

from ecliptic.apps import find as module
from ecliptic.apps.find import Finder, check_inside, find
from ecliptic.apps.index import background
from ecliptic.core.contracts import Features
from ecliptic.core.dense import BACKGROUND
from ecliptic.core.preprocess import ImagePreprocess
from ecliptic.ops.boxes import box_iou
from ecliptic.ops.regions import ring_contrast, soft_iou
from tests.towers import FAMILIES

ANCHORS = {
    "red": (220, 30, 30),
    "green": (30, 170, 60),
    "blue": (40, 60, 210),
    "yellow": (240, 220, 40),
    "purple": (130, 40, 160),
    "grey": (128, 128, 128),
}
EXTRA = 26


@pytest.fixture(autouse=True)
def short_background(monkeypatch):
    """A hundred common things do for colours and random towers, in a tenth of the time."""
    monkeypatch.setattr(background, "captions", lambda model="", all=background.captions: all(model)[:100])


class Colours(nn.Module):
    """Pictures and patches are described by how near they are to a few colours, texts that name a colour by that colour alone;
    all other texts lie in directions of their own, towards which pictures lean a little, each its own way."""

    name, id, image_size = "colours", "colours-1", 32
    transform = ImagePreprocess(shortest=32, crop=(32, 32), mean=(0.0,) * 3, std=(1.0,) * 3)
    scale = torch.tensor(20.0)
    any_size, encoded = True, 0

    def preprocess(self, images):
        return self.transform(images)

    def images(self, pixels, *, patches=False, layers=(), normalize=True):
        side = pixels.shape[-1] // 8
        cells = nn.functional.avg_pool2d(pixels, 8).flatten(2).transpose(1, 2)
        return Features(self._described(pixels.mean((2, 3))), tokens=self._described(cells), grid=(side, side))

    def encode_pixels(self, pixels):
        self.encoded += len(pixels)
        return self._described(torch.from_numpy(pixels).mean((2, 3))).numpy()

    def encode_texts(self, texts, batch_size=128, overflow="truncate"):
        rows = torch.zeros(len(texts), len(ANCHORS) + EXTRA)
        for row, text in zip(rows, texts):
            if text in ANCHORS:
                row[list(ANCHORS).index(text)] = 1
            else:
                generator = torch.Generator().manual_seed(sum(map(ord, text)) * 31 + len(text))
                row[len(ANCHORS) :] = torch.randn(EXTRA, generator=generator)
        return nn.functional.normalize(rows, dim=-1)

    def _described(self, colours):
        anchors = torch.tensor(list(ANCHORS.values())) / 255
        near = torch.exp(-8 * (colours[..., None, :] - anchors).norm(dim=-1))
        lean = torch.sin(colours @ torch.linspace(3, 40, 3 * EXTRA).view(3, EXTRA))
        return nn.functional.normalize(torch.cat([near, 0.05 * lean], -1), dim=-1)


def scene(size=(240, 160), box=(60, 50, 120, 110), colour="red", ground="grey"):
    image = Image.new("RGB", size, ANCHORS[ground])
    image.paste(ANCHORS[colour], box)
    return image


@pytest.fixture
def colours():
    return Colours()


# What it finds


@pytest.mark.parametrize("box", [(60, 50, 120, 110), (10, 20, 60, 70), (100, 0, 240, 160), (150, 100, 230, 150)])
def test_a_square_of_the_colour_is_boxed(colours, box):
    found = find(colours, scene(box=box), "red")
    assert found.present
    assert found.size == (240, 160)
    assert float(box_iou(found.boxes[:1], tensor([box]).float())) > 0.55
    assert bool((found.scores[1:] <= found.scores[:-1]).all())


@pytest.mark.parametrize("factor", [0.25, 1, 8])
def test_boxes_are_in_pixels_of_the_picture_at_any_size(colours, factor):
    image = scene().resize((round(240 * factor), round(160 * factor)), Image.Resampling.NEAREST)
    found = find(colours, image, "red")
    truth = factor * tensor([[60.0, 50, 120, 110]])
    assert float(box_iou(found.boxes[:1], truth)) > 0.5


def test_what_is_absent_is_said_to_be(colours):
    image = scene()
    image.paste(ANCHORS["blue"], (170, 20, 220, 70))
    assert find(colours, image, "blue").present
    for text in ("yellow", "green"):
        found = find(colours, image, text)
        assert not found.present
        assert len(found.boxes)  # the best guess is given in any case


def test_two_things_get_a_box_each_and_duplicates_none(colours):
    image = scene(box=(20, 20, 80, 80))
    image.paste(ANCHORS["red"], (150, 70, 210, 130))
    found = find(colours, image, "red")
    truth = tensor([[20.0, 20, 80, 80], [150, 70, 210, 130]])
    assert float(box_iou(truth, found.boxes).max(1).values.min()) > 0.5
    assert len(found.boxes) == 2


def test_a_picture_without_contrast_has_one_box_and_no_match(colours):
    found = find(colours, Image.new("RGB", (50, 40), ANCHORS["grey"]), "red")
    assert not found.present
    assert found.scores.max() < 0.05


@pytest.mark.parametrize("size", [(1, 1), (300, 3), (2, 90)])
def test_pictures_of_odd_shapes(colours, size):
    found = find(colours, Image.new("RGB", size, ANCHORS["red"]), "red")
    assert bool((found.boxes >= 0).all())
    assert bool((found.boxes[:, 2] <= size[0] + 1e-3).all() and (found.boxes[:, 3] <= size[1] + 1e-3).all())


# How it scores


@pytest.mark.parametrize("kind", FAMILIES)
def test_scores_are_geometric_means_of_fit_contrast_and_overlap(kind):
    encoder = FAMILIES[kind]()
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((90, 60), Image.Resampling.BICUBIC)
    found = find(encoder, image, "a red ball", looks=7)
    assert found.considered["encoded"] == len(found.proposals) == len(found.proposal_kinds) == 7
    rows, columns = found.heat.shape
    assert (found.heat.min(), found.heat.max()) == (0, 1)
    phrase = encoder.encode_texts(["a red ball"])[0].double()
    nothing = encoder.encode_texts(list(BACKGROUND)).double()
    scale = encoder.scale.item()
    for box, score in zip(found.proposals, found.proposal_scores.tolist()):
        crop = image.crop(tuple(round(v) for v in box.tolist())).resize((32, 32), Image.Resampling.BICUBIC)
        seen = encoder.encode_images([crop])[0].double()
        against = sum(math.exp(scale * float(seen @ row)) for row in nothing)
        asked = math.exp(scale * float(seen @ phrase))
        cells = (box * tensor([columns / 90, rows / 60] * 2))[None]
        held = ring_contrast(found.heat, cells).item() * soft_iou(found.heat, cells).item()
        assert score == pytest.approx((asked / (asked + against) * max(held, 0)) ** (1 / 3), rel=1e-3)
    held = ring_contrast(found.heat, found.proposals * tensor([columns / 90, rows / 60] * 2))
    assert bool((found.scores <= found.proposal_scores.max() + 1e-6).all())
    assert bool(held.isfinite().all())


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_same_call_gives_the_same_answer_in_batches_of_any_size(kind, monkeypatch):
    image = scene()
    first = find(FAMILIES[kind](), image, "a cat", looks=9)
    monkeypatch.setattr(module, "BATCH", 4)
    again = find(FAMILIES[kind](), image, "a cat", looks=9)
    assert_close(first.boxes, again.boxes)
    assert_close(first.proposal_scores, again.proposal_scores, atol=1e-5, rtol=1e-4)
    assert first.relevance == pytest.approx(again.relevance, abs=1e-4)


def test_the_ends_of_a_box_are_seen(colours):
    """CLIP's own transform crops a wide picture to its middle; a box is squeezed instead."""
    image = Image.new("RGB", (120, 30), ANCHORS["grey"])
    image.paste(ANCHORS["red"], (0, 0, 30, 30))
    finder = Finder(colours, "red")
    seen = finder._encode(image, tensor([[0.0, 0, 120, 30]]))
    share = tensor(ANCHORS["red"]) * 0.25 + tensor(ANCHORS["grey"]) * 0.75
    assert_close(seen[0], colours._described(share / 255), atol=2e-2, rtol=0)


def test_the_map_chooses_what_is_encoded(colours):
    finder = Finder(colours, "red", looks=5)
    before = colours.encoded
    found = finder(scene())
    assert colours.encoded - before == 5
    held = ring_contrast(found.heat, found.proposals * found.heat.shape[1] / 240) * soft_iou(
        found.heat, found.proposals * found.heat.shape[1] / 240
    )
    assert bool((held.diff() <= 1e-6).all())
    assert sum(count for kind, count in found.considered.items() if kind != "encoded") > 100


# Boxes of the user's own


def test_own_boxes_are_judged_and_no_others(colours):
    own = tensor([[0.0, 0, 50, 50], [60, 50, 120, 110], [200, 100, 240, 160]])
    found = Finder(colours, "red", looks=1)(scene(), own)
    assert found.considered == {"given": 3, "encoded": 3}
    assert_close(found.boxes, own[1:2], atol=1e-3, rtol=0)
    assert_close(found.proposals.sort(0).values, own.sort(0).values, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([200, 100, 300, 150], "box 0 .* lies outside the picture of 240 x 160"),
        ([-40, 0, 10, 10], "lies outside"),
        ([0.1, 0.2, 0.4, 0.9], "smaller than a pixel"),
        ([50, 10, 20, 40], "wrong way round"),
        ([0, 0, math.nan, 9], "not finite"),
    ],
)
def test_boxes_that_cannot_be_are_refused(colours, box, message):
    with pytest.raises(ValueError, match=message):
        Finder(colours, "red")(scene(), tensor([box]))


def test_rounding_beyond_the_border_is_forgiven():
    assert_close(check_inside(tensor([[-0.4, 0, 240.5, 160]]), (240, 160)), tensor([[0.0, 0, 240, 160]]))
    with pytest.raises(ValueError, match="no boxes"):
        check_inside(torch.zeros(0, 4), (9, 9))


@pytest.mark.parametrize(
    ("settings", "message"), [({"text": " "}, "empty"), ({"looks": 0}, "looks=0"), ({"zoom": 0}, "zoom=0")]
)
def test_settings_are_checked_before_any_picture(colours, settings, message):
    with pytest.raises(ValueError, match=message):
        Finder(**{"encoder": colours, "text": "red", **settings})


def test_the_page_shows_what_the_benchmark_measured():
    from benchmarks.find import PAGE, RESULTS, page

    result = json.loads((RESULTS / "find.json").read_text(encoding="utf-8"))
    assert page(result) in PAGE.read_text(encoding="utf-8")


# The verb


@pytest.fixture
def found_anything(monkeypatch):
    """Random towers match nothing: let everything count as found, where the test is about what is done with it."""
    monkeypatch.setattr(module, "LIMIT", -1e6)


def test_lines_json_and_paths(cli, model, pictures, found_anything):
    a, b = pictures / "cat/0.png", pictures / "dog/1.png"
    asked = ["find", "a cat", a, b, "--looks", 4, "--model", model]
    value = json.loads(cli(*asked, "--json").stdout)
    assert (value["text"], value["model"], value["bad"]) == ("a cat", model, [])
    assert [entry["path"] for entry in value["pictures"]] == [str(a), str(b)]
    lines = []
    for entry in value["pictures"]:
        assert entry["size"] == [40, 30]
        assert entry["found"] is True
        assert entry["considered"]["encoded"] == 4
        assert 1 <= len(entry["boxes"]) <= 5
        for found in entry["boxes"]:
            x0, y0, x1, y1 = found["box"]
            assert 0 <= x0 < x1 <= 40
            assert 0 <= y0 < y1 <= 30
            assert 0 <= found["score"] <= 1
            lines.append([f"{found['score']:.3f}", *map(str, found["box"]), entry["path"]])
    assert [line.split() for line in cli(*asked).stdout.splitlines()] == lines
    assert cli(*asked, "--files").stdout.splitlines() == [str(a), str(b)]
    assert len(json.loads(cli(*asked, "--top", 1, "--json").stdout)["pictures"][0]["boxes"]) == 1


def test_drawn_to_a_file_or_a_folder(cli, model, pictures, tmp_path, found_anything):
    one = cli("find", "a cat", pictures / "cat/0.png", "--looks", 4, "--out", tmp_path / "one.jpg", "--model", model)
    assert one.stdout.split() == [str(tmp_path / "one.jpg")]
    with Image.open(tmp_path / "one.jpg") as drawn:
        assert drawn.size == (40, 30)
    out = tmp_path / "new" / "drawn"
    done = cli("find", "a cat", pictures / "cat/0.png", pictures / "dog/0.png", "-o", out, "--looks", 4, "-m", model)
    names = ["0.a-cat.png", "0-2.a-cat.png"]  # two pictures of the same name get a drawing each
    assert done.stdout.split() == [str(out / name) for name in names]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    with Image.open(out / names[0]) as drawn, Image.open(pictures / "cat/0.png") as before:
        assert drawn.tobytes() != before.convert("RGB").tobytes()


def test_nothing_here(cli, model, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LIMIT", 1e6)
    asked = ["find", "a cat", pictures / "cat", "--looks", 4, "--model", model]
    done = cli(*asked, "--out", tmp_path / "out")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "nothing here looks like 'a cat'" in done.stderr
    assert not (tmp_path / "out").exists()
    value = json.loads(cli(*asked, "--json").stdout)
    assert {entry["found"] for entry in value["pictures"]} == {False}
    assert all(entry["boxes"] == [] and entry["out"] is None for entry in value["pictures"])
    anyway = cli(*asked, "--anyway")
    assert anyway.exit_code == 0
    assert len(anyway.stdout.splitlines()) >= 4
    assert "nothing here" in anyway.stderr


def test_own_boxes_from_files(cli, model, pictures, tmp_path, found_anything):
    a = pictures / "cat/0.png"
    (tmp_path / "own.csv").write_text("x0,y0,x1,y1\n0,0,20,20\n10,5,40,30\n")
    asked = ["find", "a cat", a, "--model", model, "--anyway", "--json", "--boxes"]
    entry = json.loads(cli(*asked, tmp_path / "own.csv").stdout)["pictures"][0]
    assert entry["considered"] == {"given": 2, "encoded": 2}
    assert next(found["box"] for found in entry["boxes"]) in ([0, 0, 20, 20], [10, 5, 40, 30])
    (tmp_path / "far.json").write_text("[[0, 0, 20, 20], [10, 5, 90, 30]]")
    done = cli(*asked, tmp_path / "far.json")
    assert done.exit_code == 2
    assert "0.png: box 1 (10, 5, 90, 30) lies outside the picture of 40 x 30" in done.stderr
    (tmp_path / "other.json").write_text(json.dumps({"somewhere.png": [[0, 0, 9, 9]]}))
    assert "holds no boxes for" in cli(*asked, tmp_path / "other.json").stderr


def test_bad_pictures_are_listed_and_skipped(cli, model, pictures, found_anything):
    torn = pictures / "cat" / "torn.png"
    torn.write_bytes(b"torn")
    asked = ["find", "a cat", torn, pictures / "cat/0.png", pictures / "none.png", "--looks", 3, "--model", model]
    done = cli(*asked)
    assert done.exit_code == 0
    assert "2 pictures could not be read" in done.stderr
    assert "torn.png" in done.stderr
    assert "none.png: no such file" in done.stderr
    bad = json.loads(cli(*asked, "--json").stdout)["bad"]
    assert sorted(entry["path"] for entry in bad) == sorted([str(torn), str(pictures / "none.png")])
    alone = cli("find", "a cat", torn, "--model", model)
    assert alone.exit_code == 1
    assert "none of the pictures could be read" in alone.stderr


def test_wrong_calls_say_what_to_do(cli, model, pictures, tmp_path):
    a, b = pictures / "cat/0.png", pictures / "cat/1.png"
    assert "text is empty" in cli("find", " ", a).stderr
    assert "no such file" in cli("find", "a cat", pictures / "none.png").stderr
    assert "2 pictures: name a folder" in cli("find", "a cat", a, b, "--out", tmp_path / "x.png").stderr
    assert "must end in" in cli("find", "a cat", a, "--out", tmp_path / "x.txt").stderr
    assert "the pictures itself" in cli("find", "a cat", a, "--out", a).stderr
    assert "No such file" in cli("find", "a cat", a, "--boxes", tmp_path / "none.json").stderr
