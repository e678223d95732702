"""A tiny saved model and folders of small pictures, for the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ecliptic.apps.cli import build
from tests.towers import clip_encoder


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of our own: indexing leaves exported models there."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECLIPTIC_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a saved encoder of 32 pixels."""
    folder = tmp_path_factory.mktemp("models") / "small"
    clip_encoder().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def cli() -> Callable[..., Any]:
    """Run a command line in this process: `.exit_code`, `.stdout`, `.stderr`. A traceback fails the test."""

    def run(*arguments: object) -> Any:
        words = [str(argument) for argument in arguments]
        done = CliRunner().invoke(build(words[0]), words)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert "Traceback" not in done.stderr
        return done

    return run


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (40, 30)) -> Path:
    """A picture of random squares that depends on the seed alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(cells).resize(size, Image.Resampling.NEAREST).save(path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three kinds of four pictures each, in folders per class."""
    folder = tmp_path / "pictures"
    for kind, name in enumerate(("cat", "dog", "fish")):
        for i in range(4):
            picture(folder / name / f"{i}.png", 10 * kind + i)
    return folder
