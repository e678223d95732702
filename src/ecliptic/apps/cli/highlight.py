"""`ecliptic highlight TEXT IMAGE`: where in a picture the words are meant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ecliptic.apps.cli._inputs import one_picture
from ecliptic.apps.cli._shell import DEFAULT_MODEL, Json, Model, emit, fail, load_model

NEEDS = True


def highlight(
    text: Annotated[str, typer.Argument(help="What to show.")],
    image: Annotated[Path, typer.Argument(help="A picture.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="PNG to write. [beside the picture]")] = None,
    versus: Annotated[
        list[str] | None, typer.Option("--versus", help="What else is there; sharpens the map. [the background]")
    ] = None,
    model: Model = DEFAULT_MODEL,
    json: Json = False,
) -> None:
    """Draw a heat map of where in the picture the text is meant.

    Colours run from the map's weakest to its strongest place, so they compare places in one picture, not pictures.
    """
    if not text.strip():
        fail("the text is empty: say what to show")
    target = out or image.with_name(f"{image.stem}.{_slug(text)}.png")
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        fail(f"--out {target}: the name must end in .png, .jpg or .webp")
    if target.exists() and target.samefile(image):
        fail(f"--out {target} is the picture itself: choose another name")
    picture = one_picture(image)
    from ecliptic.apps.heat import heat_of
    from ecliptic.eval.overlay import overlay

    encoder = load_model(model)
    heat = heat_of(encoder, picture, [text], versus)[0]
    target.parent.mkdir(parents=True, exist_ok=True)
    overlay(picture, heat.numpy(), legend=("less", text if len(text) <= 40 else "more")).save(target)
    row, column = divmod(int(heat.argmax()), heat.shape[1])
    value = {
        "text": text,
        "image": image,
        "out": target,
        "strongest": {"x": column, "y": row, "value": float(heat.max())},
        "mean": float(heat.mean()),
    }
    emit(value, json, str(target))


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())[:40] or "map"
