"""`ecliptic find TEXT IMAGE...`: the places in pictures that the words mean, as boxes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ecliptic.apps.cli._inputs import Bad, one_picture, picture_files
from ecliptic.apps.cli._shell import DEFAULT_MODEL, Json, Model, bad_json, bad_lines, emit, fail, load_model, warn

if TYPE_CHECKING:
    from ecliptic.apps.find import Finder, Found
    from ecliptic.data.boxes import Box

NEEDS = True
LONGEST = 40  # letters of the phrase in a drawn label
DRAWN = (".png", ".jpg", ".jpeg", ".webp")


def find(
    text: Annotated[str, typer.Argument(help="What to find, in words.")],
    images: Annotated[list[Path], typer.Argument(help="Pictures or folders of them.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Draw the boxes: a file, or a folder for several pictures.")
    ] = None,
    boxes: Annotated[
        Path | None,
        typer.Option("--boxes", "-b", help="Judge these boxes, a .json or .csv, instead of looking for some."),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many boxes at most per picture.")] = 5,
    looks: Annotated[int, typer.Option("--looks", min=1, help="How many regions to look at closely.")] = 32,
    zoom: Annotated[
        int, typer.Option("--zoom", min=1, max=4, help="How finely to look; 3 finds smaller things, and takes longer.")
    ] = 2,
    anyway: Annotated[bool, typer.Option("--anyway", help="Show the best boxes even where nothing matches.")] = False,
    files: Annotated[bool, typer.Option("--files", "-f", help="Print plain paths of pictures that have it.")] = False,
    model: Model = DEFAULT_MODEL,
    json: Json = False,
) -> None:
    """Box where in pictures something is, or say it is not there.

    Prints a line per box: score, x0 y0 x1 y1 in pixels, path; with --out, the paths of the drawn pictures. Exit status 1
    where no picture has it. Scores compare boxes for one phrase in one picture; whether the phrase is there at all is
    judged by how much better it fits one of the regions than a thousand common things do (docs/find.md).
    """
    if not text.strip():
        fail("the text is empty: say what to find")
    sources, bad = picture_files(images)
    given = _given(boxes, sources)
    targets = _targets(out, sources, text)
    from ecliptic.apps.find import Finder
    from ecliptic.core.progress import track
    from ecliptic.data.images import ImageError

    finder = Finder(load_model(model), text, looks=looks, zoom=zoom, top=top)
    entries: list[dict[str, Any]] = []
    for source in track(sources, "looking", unit="pictures") if len(sources) > 1 else sources:
        try:
            picture = one_picture(source)
        except ImageError as error:
            bad.append((str(source), error.reason))
            continue
        found = _looked(finder, picture, source, given)
        shown = found.present or anyway
        target = targets.get(source) if shown else None
        if target is not None:
            _draw(picture, found, target)
        entries.append(_entry(source, found, shown, target))
    _report(text, model, entries, bad, json, files, out is not None)
    if not any(entry["boxes"] for entry in entries):
        raise typer.Exit(1)


def _given(path: Path | None, sources: list[Path]) -> dict[Path, list[Box]] | None:
    """The user's boxes for each picture; None if there are none to read."""
    if path is None:
        return None
    from ecliptic.data.boxes import boxes_of, read_boxes

    read = read_boxes(path)
    found = {source: boxes_of(read, source) for source in sources}
    for source, some in found.items():
        if not some:
            fail(f"{path} holds no boxes for {source}")
    return found


def _targets(out: Path | None, sources: list[Path], text: str) -> dict[Path, Path]:
    """Where to draw each picture: one file, or files in a folder under names of their own."""
    if out is None:
        return {}
    if out.suffix.lower() in DRAWN and not out.is_dir():
        if len(sources) > 1:
            fail(f"--out {out} is one file, but there are {len(sources):,} pictures: name a folder")
        targets = {sources[0]: out}
    elif out.suffix and not out.is_dir():
        fail(f"--out {out}: the name must end in {', '.join(DRAWN)}, or be a folder")
    else:
        slug = "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())[:40] or "found"
        targets, taken = {}, set[str]()
        for source in sources:
            name, number = f"{source.stem}.{slug}.png", 1
            while name in taken:
                number += 1
                name = f"{source.stem}-{number}.{slug}.png"
            taken.add(name)
            targets[source] = out / name
    for target in targets.values():
        if target.exists() and any(target.samefile(source) for source in sources):
            fail(f"--out {target} is one of the pictures itself: choose another name")
    return targets


def _looked(finder: Finder, picture: Any, source: Path, given: dict[Path, list[Box]] | None) -> Found:
    import torch

    if given is None:
        return finder(picture)
    try:
        return finder(picture, torch.tensor(given[source]))
    except ValueError as error:
        fail(f"{source}: {error}")


def _draw(picture: Any, found: Found, target: Path) -> None:
    from ecliptic.eval.outlines import draw_boxes

    scores = [f"{score:.2f}" for score in found.scores.tolist()]
    name = found.text if len(found.text) <= LONGEST else found.text[: LONGEST - 1].rstrip() + "…"
    labels = [f"{name} {scores[0]}", *scores[1:]]
    target.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw_boxes(picture, found.boxes.tolist(), labels)
    if target.suffix.lower() == ".png":
        drawn.save(target)
    else:
        drawn.save(target, quality=92)


def _entry(source: Path, found: Found, shown: bool, target: Path | None) -> dict[str, Any]:
    boxes = [
        {"box": [round(value) for value in box], "score": round(score, 4)}
        for box, score in zip(found.boxes.tolist(), found.scores.tolist())
    ]
    return {
        "path": source,
        "size": list(found.size),
        "found": found.present,
        "relevance": round(found.relevance, 4),
        "boxes": boxes if shown else [],
        "considered": found.considered,
        "out": target,
    }


def _report(
    text: str, model: str, entries: list[dict[str, Any]], bad: Bad, json: bool, files: bool, drawn: bool
) -> None:
    if not json:
        for line in bad_lines(bad):
            warn(line)
        missing = [str(entry["path"]) for entry in entries if not entry["found"]]
        if missing and len(missing) == len(entries):
            warn(f"nothing here looks like {text!r}")
        elif missing and not files:
            warn(f"nothing looks like {text!r} in {len(missing):,} of {len(entries):,} pictures")
    with_boxes = [entry for entry in entries if entry["boxes"]]
    if files:
        lines = [str(entry["path"]) for entry in with_boxes]
    elif drawn:
        lines = [str(entry["out"]) for entry in with_boxes]
    else:
        lines = [_line(entry["path"], found) for entry in with_boxes for found in entry["boxes"]]
    emit({"text": text, "model": model, "pictures": entries, "bad": bad_json(bad)}, json, "\n".join(lines))
    if not entries:
        fail("none of the pictures could be read", 1)


def _line(path: Path, found: dict[str, Any]) -> str:
    return f"{found['score']:.3f}  {' '.join(f'{value:4d}' for value in found['box'])}  {path}"
