"""`ecliptic classify`: name pictures, by words alone or with a predictor that `adapt` fitted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ecliptic.apps.cli._inputs import Bad, encode_files, labels_of, picture_files
from ecliptic.apps.cli._shell import DEFAULT_MODEL, Json, bad_json, bad_lines, emit, fail, load_model, warn

NEEDS = True


def classify(
    images: Annotated[list[Path], typer.Argument(help="Pictures or folders of them.")],
    labels: Annotated[str | None, typer.Option("--labels", "-l", help="'cat, dog', or @file with one a line.")] = None,
    predictor: Annotated[Path | None, typer.Option("--predictor", "-p", help="A folder that `adapt` saved.")] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            "--template",
            help="Sentence around a label, or a set: photo, drawing, ensemble, plain. Default: photo, but plain for offline.",
        ),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many labels to print per picture.")] = 3,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help=f"[{DEFAULT_MODEL}, or the predictor's own]")
    ] = None,
    json: Json = False,
) -> None:
    """Say which label fits each picture best.

    Probabilities are a softmax over the labels given: they compare those labels and say nothing about others. A predictor of
    `adapt --task ood` calls pictures of none of its classes unknown; one of `adapt --task rank` gives quantities, highest first.
    """
    if predictor is None and model is not None and (Path(model) / "predictor.json").is_file():
        predictor, model = Path(model), None  # what `adapt` saved is a model, too
    if predictor is not None and labels is not None:
        fail("give --labels or --predictor, not both: a predictor knows its labels")
    names = None if predictor is not None else labels_of(labels)
    templates: Any = template if template and "{}" in template[0] else template[0] if template else None
    if predictor is not None and not predictor.is_dir():
        fail(f"no such predictor: {predictor}")
    files, bad = picture_files(images)
    if predictor is None:
        assert names is not None
        good, shares, more = _by_words(load_model(DEFAULT_MODEL if model is None else model), files, names, templates)
        said: list[str] | None = [names[i] for i in shares.argmax(-1).tolist()]
    else:
        good, shares, names, said, more = _by_predictor(predictor, None if model is None else load_model(model), files)
    bad += more
    if said is None:
        order = shares[:, 0].argsort(descending=True, stable=True).tolist()
        good, shares = [good[i] for i in order], shares[order]
    rows = [(path, dict(zip(names, row.tolist(), strict=True))) for path, row in zip(good, shares, strict=True)]
    if said is None:
        pictures = [{"path": path, "quantities": row} for path, row in rows]
    else:
        pictures = [
            {"path": path, "label": label, "probabilities": row} for (path, row), label in zip(rows, said, strict=True)
        ]
    value = {"labels": names, "pictures": pictures, "bad": bad_json(bad)}
    if not json:
        for line in bad_lines(bad):
            warn(line)
    emit(value, json, lambda: "\n".join(_line(entry, top) for entry in pictures))
    if not good:
        fail("none of the pictures could be read", 1)


def _by_words(encoder: Any, files: list[Path], names: list[str], templates: Any) -> tuple[list[Path], Any, Bad]:
    from ecliptic.apps.naming import usual_templates
    from ecliptic.core.zeroshot import zero_shot_head, zero_shot_probabilities

    head = zero_shot_head(encoder, names, templates or usual_templates(encoder))
    good, rows, bad = encode_files(encoder, files, "classifying")
    return good, zero_shot_probabilities(encoder, rows, head), bad


def _by_predictor(
    folder: Path, encoder: Any, files: list[Path]
) -> tuple[list[Path], Any, list[str], list[str] | None, Bad]:
    """Pictures that opened, probabilities, class names, and the labels; without labels the numbers are quantities."""
    import torch

    from ecliptic.core.predictor_io import load_predictor
    from ecliptic.core.progress import track
    from ecliptic.data.images import ImageError, open_image

    judge = load_predictor(folder, encoder)
    good: list[Path] = []
    scores: list[Any] = []
    said: list[str] | None = []
    bad: Bad = []
    names: tuple[str, ...] = ()
    for start in track(range(0, len(files), 32), "classifying"):
        pictures = []
        for path in files[start : start + 32]:
            try:
                pictures.append(open_image(path))
                good.append(path)
            except ImageError as error:
                bad.append((str(path), error.reason))
        if pictures:
            answer = judge.predict(judge.encoder_.preprocess(pictures))
            if answer.scores is None or answer.classes is None:
                fail(f"{folder} holds a {type(judge).__name__}, which gives no class scores")
            scores.append(answer.scores)
            names = answer.classes
            said = None if said is None or answer.labels is None else said + answer.labels
    if not scores:
        return good, torch.empty(0, 1), list(names), said, bad
    found = torch.cat(scores)
    probable = bool((found >= 0).all() and torch.allclose(found.sum(-1), torch.ones(len(found)), atol=1e-3))
    return good, found if probable or said is None else found.softmax(-1), list(names), said, bad


def _line(entry: dict[str, Any], top: int) -> str:
    if "quantities" in entry:
        return f"{entry['path']}  " + "  ".join(f"{name} {value:.4g}" for name, value in entry["quantities"].items())
    shares = entry["probabilities"]
    best = sorted(shares, key=shares.get, reverse=True)[:top]  # of equals the first
    listed = "  ".join(f"{name} {shares[name]:.1%}" for name in best)
    return f"{entry['path']}  {listed}" if entry["label"] in shares else f"{entry['path']}  {entry['label']} ({listed})"
