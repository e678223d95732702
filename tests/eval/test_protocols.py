"""Protocols against slow loops over towers that say what they are told, and against the tiny real ones."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import normalize

from ecliptic.core.contracts import Prediction, Predictor
from ecliptic.core.encoder import TruncationWarning
from ecliptic.data.records import Records
from ecliptic.eval import base_to_new, classify, evaluate, retrieval, zero_shot
from ecliptic.eval.base_to_new import harmonic_mean
from ecliptic.eval.retrieval import captions_of
from ecliptic.eval.zero_shot import classification_report
from tests.towers import clip_encoder, dual_encoder, siglip_encoder

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


class Colours(nn.Module):
    """Pictures embed as their mean colour, texts as the sum of the colours they name (grey if none)."""

    name, scale, device = "colours", torch.tensor(10.0), torch.device("cpu")

    def preprocess(self, images):
        return (
            torch.tensor([list(i.convert("RGB").resize((1, 1)).tobytes()) for i in images]).float()[..., None, None]
            / 255
        )

    def encode_images(self, images, batch_size=32, *, decode=None, errors=None, progress=None):
        rows = []
        for i, item in enumerate(images):
            try:
                rows.append(normalize(self.preprocess([decode(item)])[0, :, 0, 0] + 1e-3, dim=0))
            except Exception as error:
                errors[i] = error
                rows.append(torch.zeros(3))
        if progress:
            progress(len(rows))
        return torch.stack(rows)

    def encode_texts(self, texts, batch_size=128, overflow="truncate"):
        rows = [
            torch.tensor([COLOURS[w] for w in t.replace(".", "").split() if w in COLOURS]).float().sum(0) for t in texts
        ]
        return normalize(torch.stack([r + 1.0 if r.ndim else torch.ones(3) for r in rows]), dim=-1)

    def logits(self, image, text):
        return self.scale * image @ text.T


def paint(name, size=(16, 12)):
    return Image.new("RGB", size, COLOURS[name])


def coloured(names, **fields):
    """One picture per name; `fields` holds a list per field."""
    rows = [{"id": f"p{i}", "image": paint(n), **{k: v[i] for k, v in fields.items()}} for i, n in enumerate(names)]
    return Records.from_list(rows, name="paints")


# Base to new


def test_base_to_new_by_hand():
    names = ["red", "red", "green", "blue", "white", "white"]
    labels = ["red", "green", "green", "blue", "blue", "other"]  # the second is wrong in base; among new all is blue
    report = base_to_new(Colours(), coloured(names, label=labels), ("red", "green"), ("blue",))
    assert report["base_to_new.base"].value == pytest.approx(2 / 3)
    assert (report["base_to_new.new"].value, report["base_to_new.new"].n) == (1.0, 2)
    assert report["base_to_new.harmonic_mean"].value == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))
    assert report["base_to_new.base"].low < 2 / 3 < report["base_to_new.base"].high
    turned = base_to_new(
        Colours(),
        coloured(names, label=labels),
        ("red", "green"),
        ("blue",),
        head=lambda e, n: -e.encode_texts(list(n)),
    )
    assert turned["base_to_new.base"].value == pytest.approx(1 / 3)  # the opposite answer, two classes


def test_harmonic_mean_by_hand():
    assert harmonic_mean(0.5, 0.25) == pytest.approx(1 / 3)
    assert harmonic_mean(0.7, 0.7) == pytest.approx(0.7)
    assert harmonic_mean(0.0, 1.0) == 0.0


def test_base_to_new_needs_two_halves():
    paints = coloured(["red", "green"], label=["red", "green"])
    with pytest.raises(ValueError, match="base and new at once: 'red'"):
        base_to_new(Colours(), paints, ("red", "green"), ("red", "blue"))
    with pytest.raises(ValueError, match="no picture of the new classes"):
        base_to_new(Colours(), paints, ("red", "green"), ("blue", "white"))


# Zero-shot


def test_zero_shot_by_hand():
    names = ["red", "green", "blue", "red"]
    report = zero_shot(Colours(), coloured(names, label=["red", "green", "blue", "green"]))
    assert report["zero_shot.accuracy"].value == 0.75
    assert report["zero_shot.balanced_accuracy"].value == pytest.approx((1 + 0.5 + 1) / 3)
    assert report["zero_shot.accuracy[green]"].value == 0.5
    assert report["zero_shot.accuracy"].n == 4
    assert "zero_shot.top5" not in report.to_json()  # three classes: it would always be 1
    low, high = report["zero_shot.accuracy"].low, report["zero_shot.accuracy"].high
    assert 0 <= low < 0.75 < high <= 1
    assert report.tables[0].rows[0][0] == "green"  # the worst first
    assert report.tables[0].rows[0][3] == "red (1)"
    mistakes = report.sections[0].content[0].pictures
    assert [(p.caption, p.good, p.note.split(" (")[0]) for p in mistakes] == [("red", False, "truth: green")]
    text = report.to_html()
    assert text.count("data:image/png") == 4


@pytest.mark.parametrize("make", [clip_encoder, siglip_encoder, dual_encoder])
def test_zero_shot_on_real_towers_is_the_loop(make):
    encoder = make()
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)) for _ in range(12)]
    classes = ["cat", "dog", "ball", "circle", "square", "moon", "cup"]
    labels = [classes[i] for i in rng.integers(0, 7, 12)]
    report = zero_shot(encoder, [{"image": p, "label": t} for p, t in zip(pictures, labels, strict=True)], classes)
    right = five = 0
    confidences, hits = [], []
    for picture, label in zip(pictures, labels, strict=True):
        with torch.no_grad():
            image = encoder.images(encoder.preprocess([picture])).pooled
            text = torch.cat([encoder.texts(encoder.tokenize([f"a photo of a {c}."])).pooled for c in classes])
            p = encoder.logits(image, text)[0].double().softmax(-1)
        order = [classes[i] for i in p.argsort(descending=True)]
        right += order[0] == label
        five += label in order[:5]
        confidences.append(float(p.max()))
        hits.append(order[0] == label)
    assert report["zero_shot.accuracy"].value == pytest.approx(right / 12)
    assert report["zero_shot.top5"].value == pytest.approx(five / 12)
    bins = {}
    for c, h in zip(confidences, hits, strict=True):
        bins.setdefault(int(np.ceil(c * 15)), []).append((c, h))
    ece = sum(abs(sum(c for c, _ in b) - sum(h for _, h in b)) for b in bins.values()) / 12
    assert report["zero_shot.ece"].value == pytest.approx(ece, abs=1e-5)


def test_top5_counts_the_fifth_and_not_the_sixth():
    p = np.array([[0.3, 0.25, 0.2, 0.12, 0.08, 0.05]] * 4)
    report = classification_report(p, np.array([4, 4, 5, 0]), tuple("abcdef"), "x", resamples=10)
    assert report["x.top5"].value == 0.75
    assert report["x.accuracy"].value == 0.25


def test_classes_may_hold_more_than_occur_and_say_other_words():
    records = coloured(["red", "green"], label=["n01", "n02"])
    report = zero_shot(Colours(), records, {"n01": "red", "n02": "green", "n03": "blue"})
    assert report["zero_shot.accuracy"].value == 1.0
    assert report["zero_shot.accuracy"].low == pytest.approx(0.025**0.5)  # two of two prove little
    underscored = zero_shot(Colours(), coloured(["red", "green"], label=["red_thing", "green_thing"]))
    assert underscored["zero_shot.accuracy"].value == 1.0


def test_zero_shot_refuses_what_cannot_work():
    records = coloured(["red", "green"], label=["red", "grene"])
    with pytest.raises(ValueError, match="label outside the classes: 'grene'"):
        zero_shot(Colours(), records, ["red", "green"])
    with pytest.raises(ValueError, match="occurs twice"):
        zero_shot(Colours(), records, ["red", "red"])
    with pytest.raises(TypeError, match="one string"):
        zero_shot(Colours(), records, "red")
    with pytest.raises(ValueError, match="no 'label'"):
        zero_shot(Colours(), coloured(["red"], caption=["red"]))
    with pytest.raises(ValueError, match="no records"):
        zero_shot(Colours(), [], ["red"])


# Broken pictures


def broken_folder(tmp_path, kinds, **fields):
    """Files: a colour name paints one, 'broken' writes rubbish, 'absent' writes nothing."""
    rows = []
    for i, kind in enumerate(kinds):
        path = tmp_path / f"{i}.png"
        if kind == "broken":
            path.write_bytes(b"<html>not found</html>")
        elif kind != "absent":
            paint(kind).save(path)
        rows.append({"id": f"p{i}", "image": str(path), **{k: v[i] for k, v in fields.items()}})
    return Records.from_list(rows, name="folder")


def test_broken_pictures_are_left_out_and_counted(tmp_path):
    kinds = ["broken", "red", "absent", "green", "broken", "blue"]
    label = ["red", "red", "red", "green", "red", "blue"]
    report = zero_shot(Colours(), broken_folder(tmp_path, kinds, label=label))
    assert report["zero_shot.accuracy"].value == 1.0
    assert report["zero_shot.accuracy"].n == 3
    assert (report["pictures.used"].value, report["pictures.skipped"].value) == (3, 3)
    assert any("3 of 6 pictures could not be opened" in note and "p0" in note for note in report.notes)
    caption = ["a red", "a red", "a red", "a green", "a red", "a blue"]
    found = retrieval(Colours(), broken_folder(tmp_path, kinds, caption=caption))
    assert found["text_to_image.recall@1"].value == 1.0  # captions of broken pictures are no queries
    assert found["text_to_image.recall@1"].n == 3
    assert found["pictures.skipped"].value == 3


def test_all_pictures_broken_is_an_error_that_names_one(tmp_path):
    with pytest.raises(ValueError, match=r"none of the 2 pictures of folder can be read; first: .*0\.png"):
        zero_shot(Colours(), broken_folder(tmp_path, ["broken", "absent"], label=["red", "red"]))


def test_a_fault_in_the_program_is_not_a_broken_picture():
    def load(record):
        return {**record, "image": paint("red") if record["id"] == "1" else 1 / 0}

    records = Records(2, lambda i: {"id": str(i), "label": "red", "image": "x.png"}, load=load, name="bug")
    with pytest.raises(ZeroDivisionError):
        zero_shot(Colours(), records, ["red", "blue"])


def test_records_without_a_label_are_left_out_and_counted():
    report = zero_shot(Colours(), coloured(["red", "green", "blue"], label=["red", None, "blue"]))
    assert report["zero_shot.accuracy"].n == 2
    assert report["pictures.used"].value == 2
    assert any("1 of 3 pictures have no label" in note for note in report.notes)


# Retrieval


def test_retrieval_by_hand():
    # captions 0 and 2 are right; caption 1 names blue but belongs to the green picture
    records = coloured(
        ["red", "green", "blue"], caption=["a red", "a blue", "blue"], category=[["x", 1], ["x", 2], ["y"]]
    )
    report = retrieval(Colours(), records, ks=(1, 2, 3))
    assert report["text_to_image.recall@1"].value == pytest.approx(2 / 3)
    assert report["text_to_image.recall@3"].value == 1.0
    # both blue texts embed alike, so the blue picture finds its own in half of all tie breaks; all three texts are
    # equally green, so the green picture finds its own in a third
    assert report["image_to_text.recall@1"].value == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    assert report["text_to_image.recall@1[x]"].value == 0.5
    assert report["text_to_image.recall@1[y]"].value == 1.0
    assert [row[:2] for row in report.tables[0].rows] == [["x", 2], ["y", 1]]
    assert [s.title for s in report.sections] == ["Found by text", "Missed by text"]
    missed = report.sections[1].content[0]
    assert missed.title == "“a blue”"
    assert [p.good for p in missed.pictures].count(True) == 1


@pytest.mark.parametrize("make", [clip_encoder, siglip_encoder, dual_encoder])
def test_retrieval_on_real_towers_is_the_loop(make):
    encoder = make()
    rng = np.random.default_rng(0)
    words = ["cat", "dog", "ball", "circle", "square", "moon", "cup"]
    rows = [
        {
            "image": Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)),
            "captions": [" ".join(rng.choice(words, 4)) + " now" * j for j in range(i % 3 + 1)],
        }
        for i in range(15)
    ]
    report = retrieval(encoder, rows)
    texts = [(i, t) for i, row in enumerate(rows) for t in row["captions"]]
    assert len({t for _, t in texts}) == len(texts)  # no ties below
    with torch.no_grad():
        image = encoder.images(encoder.preprocess([row["image"] for row in rows])).pooled
        text = torch.cat([encoder.texts(encoder.tokenize([t])).pooled for _, t in texts])
    s = (image @ text.T).numpy()
    for k in (1, 5, 10):
        forth = [owner in np.argsort(-s[:, j])[:k] for j, (owner, _) in enumerate(texts)]
        back = [any(texts[j][0] == i for j in np.argsort(-s[i])[:k]) for i in range(15)]
        assert report[f"text_to_image.recall@{k}"].value == pytest.approx(np.mean(forth))
        assert report[f"image_to_text.recall@{k}"].value == pytest.approx(np.mean(back))
    rank = [1 + int((s[:, j] > s[owner, j]).sum()) for j, (owner, _) in enumerate(texts)]
    assert report["text_to_image.median_rank"].value == pytest.approx(np.median(rank))
    n = report["text_to_image.recall@1"].n, report["image_to_text.recall@1"].n
    assert n == (len(texts), 15)


def test_blocks_do_not_change_the_ranks(monkeypatch):
    rng = np.random.default_rng(1)
    rows = [{"image": paint(n), "caption": n} for n in rng.choice(list(COLOURS), 20)]
    whole = retrieval(Colours(), rows).to_json()
    monkeypatch.setattr(sys.modules["ecliptic.eval.retrieval"], "BLOCK", 30)
    assert retrieval(Colours(), rows).to_json() == whole


def test_rows_that_name_one_file_are_one_picture(tmp_path):
    records = broken_folder(tmp_path, ["red", "green"], caption=["a red", "a green"])
    rows = [*records, {**records[0], "id": "again", "caption": "a red red"}]
    for row, path in zip(rows, ("0.png", "1.png", "0.png"), strict=True):
        row["image"] = str(tmp_path / path)
    report = retrieval(Colours(), rows, ks=(1,))
    assert report["text_to_image.recall@1"].value == 1.0
    assert report["text_to_image.recall@1"].n == 3
    assert report["image_to_text.recall@1"].n == 2


def test_equal_captions_tie_exactly():
    rng = np.random.default_rng(0)
    encoder = clip_encoder()
    rows = [
        {"image": Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)), "caption": "a cat"}
        for _ in range(37)
    ]
    report = retrieval(encoder, rows)
    assert report["image_to_text.recall@1"].value == pytest.approx(1 / 37)
    assert report["image_to_text.median_rank"].value == 19
    assert any("36 captions repeat" in note for note in report.notes)


def test_captions_that_were_cut_are_mentioned():
    with pytest.warns(TruncationWarning, match="1 of 2 captions cut to 32 tokens"):
        report = retrieval(
            clip_encoder(),
            [{"image": paint("red"), "caption": "a cat"}, {"image": paint("blue"), "caption": "cat " * 50}],
        )
    assert "1 of 2 captions cut to 32 tokens." in report.notes


def test_which_captions_are_used():
    assert captions_of(["a", None, " "], [None, None, None], None) == [["a"], [], []]
    assert captions_of(["a"], [["b", "c"]], None) == [["b", "c"]]
    assert captions_of(["a"], [["b", "c"]], "caption") == [["a"]]
    assert captions_of(["a"], [{"de": "b"}], None) == [["a"]]  # translations are not more captions
    assert captions_of(["a"], [None], "captions") == [[]]
    with pytest.raises(TypeError, match="list of texts"):
        captions_of(["a"], [{"de": "b"}], "captions")


def test_pictures_without_a_caption_stay_out_of_the_gallery():
    records = coloured(["red", "blue", "green"], caption=["a red", None, "a green"])
    report = retrieval(Colours(), records, ks=(1,))
    assert report["image_to_text.recall@1"].n == 2
    assert report["pictures.used"].value == 2
    assert "1 of 3 records have no caption and were left out." in report.notes


def test_retrieval_without_captions_says_so():
    with pytest.raises(ValueError, match="retrieval needs captions"):
        retrieval(Colours(), coloured(["red"], label=["red"]))


# Dispatch


def test_evaluate_goes_by_the_fields():
    encoder, names = Colours(), ["red", "green", "blue"]
    labelled, captioned = coloured(names, label=names), coloured(names, caption=names)
    both = coloured(names, label=names, caption=names)
    assert set(evaluate(encoder, labelled).numbers) == set(zero_shot(encoder, labelled).numbers)
    assert evaluate(encoder, captioned).to_json() == retrieval(encoder, captioned).to_json()
    joined = evaluate(encoder, both)
    assert {"text_to_image.recall@1", "zero_shot.accuracy"} <= set(joined.numbers)
    assert joined["retrieval.pictures.used"].value == 3
    assert "text_to_image.recall@1" not in evaluate(encoder, both, task="zero_shot").numbers
    json.dumps(joined.to_json(), allow_nan=False)
    with pytest.raises(ValueError, match="neither 'caption'"):
        evaluate(encoder, coloured(names))
    with pytest.raises(ValueError, match="no task"):
        evaluate(encoder, both, task="guess")
    with pytest.raises(ValueError, match="no records"):
        evaluate(encoder, [])


def test_evaluate_opens_each_picture_once_for_both_protocols():
    opened = []

    def get(i):
        return {"id": str(i), "label": "red", "caption": "red"}

    def load(record):
        opened.append(record["id"])
        return {**record, "image": paint("red")}

    seen = []
    Records(5, get, load=load)
    records = Records(5, lambda i: {**get(i), "image": "x.png"}, load=load, name="n")
    evaluate(Colours(), records, classes=["red", "blue"], progress=seen.append)
    assert sum(seen) == 5


class Judge(Predictor):
    def __init__(self, scores=True, probabilities=False):
        self.scores, self.probabilities = scores, probabilities

    def fit(self, encoder, pairs):
        self.encoder_ = encoder
        return self

    def predict(self, pixels):
        names = ("red", "green", "blue")
        s = 5 * pixels[:, :, 0, 0]
        s = s.softmax(-1) if self.probabilities else s
        labels = [names[i] for i in s.argmax(-1).tolist()]
        return Prediction(scores=s, classes=names, labels=labels) if self.scores else Prediction(labels=labels)


def test_a_fitted_predictor_is_judged_by_labels(tmp_path):
    records = broken_folder(tmp_path, ["red", "broken", "green", "blue"], label=["red", "red", "green", "green"])
    report = evaluate(Judge().fit(Colours(), records), records, batch_size=2)
    assert report["classification.accuracy"].value == pytest.approx(2 / 3)
    assert report["pictures.skipped"].value == 1
    confidence = float(torch.tensor([5.0, 0, 0]).softmax(-1)[0])
    expected = abs(3 * confidence - 2) / 3
    assert report["classification.ece"].value == pytest.approx(expected)
    same = evaluate(Judge(probabilities=True).fit(Colours(), records), records)
    assert same["classification.ece"].value == pytest.approx(expected)
    bare = classify(Judge(scores=False), records, encoder=Colours())
    assert bare["classification.accuracy"].value == pytest.approx(2 / 3)
    assert "classification.ece" not in bare.to_json()
    with pytest.raises(TypeError, match="pass encoder="):
        evaluate(Judge(), records)
    with pytest.raises(ValueError, match="judged by labels"):
        evaluate(Judge().fit(Colours(), records), coloured(["red"], caption=["red"]))


def test_same_seed_same_report():
    records = coloured(["red", "green", "blue"] * 5, label=["red", "green", "green"] * 5)
    one, two = (zero_shot(Colours(), records, seed=3).to_html() for _ in range(2))
    assert one == two
    few = [zero_shot(Colours(), records, resamples=9, seed=s).to_json() for s in (3, 4)]
    assert few[0] != few[1]
