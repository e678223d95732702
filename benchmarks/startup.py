"""Start-up of the command line, in fresh processes: python -m benchmarks.startup [--rounds N]

Help and the catalogue, against importing torch; and the first hit of `ecliptic search` in words over 10,000 pictures, with the
model's exported twin, against the same search with torch. Wall time of the whole process, since that is what a user waits for;
both sides take turns, and must name the same pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Row, compare, line, save

PICTURES = 10_000
QUERY = "a red ball left of a small dog"


def run(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout


class RandomRows:
    """What an index needs of a model, without one: random unit vectors. Searching them costs what searching pictures costs."""

    def __init__(self, encoder: Any):
        from ecliptic.apps.index.towers import signature

        self.signature = signature(encoder)
        self.random = np.random.default_rng(0)

    def prepare(self, data: bytes) -> bytes:
        return data

    def embed(self, prepared: Sequence[bytes]) -> np.ndarray:
        rows = self.random.normal(size=(len(prepared), self.signature.dim)).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def index_of(folder: Path, encoder: Any, source: str) -> Path:
    """An index of 10,000 files under the encoder's signature, with all that `ecliptic index` leaves for searches."""
    from ecliptic.apps.exported import keep_twin
    from ecliptic.apps.index import Index
    from ecliptic.apps.index.relevance import of_index

    files = folder / "files"
    files.mkdir(parents=True)
    for i in range(PICTURES):
        (files / f"{i:05}.png").write_text(str(i))
    embedder = RandomRows(encoder)
    with Index.create(folder / "index", embedder.signature, root=files, source=source) as target:
        target.add(files, embedder, batch_size=1000, commit_every=1000)
        keep_twin(encoder)
        of_index(target, encoder.encode_texts)
    return folder / "index"


def first_hit(name: str, encoder: Any, source: str, work: Path, rounds: int) -> Row:
    """Search with the exported twin, and with torch, which is how a model that is named with --model is opened."""
    index = index_of(work / name, encoder, source)
    search = ("-m", "ecliptic", "search", QUERY, "--index", str(index), "--json")
    ours = json.loads(run(*search))["hits"]
    theirs = json.loads(run(*search, "--model", source))["hits"]
    assert [hit["path"] for hit in ours] == [hit["path"] for hit in theirs]
    assert len(ours) == 10
    difference = max(abs(a["score"] - b["score"]) for a, b in zip(ours, theirs, strict=True))
    assert difference < 1e-5, f"scores differ by {difference}"
    return compare(
        f"first hit of `ecliptic search` over {PICTURES:,} pictures, {name}",
        "the same search with torch",
        lambda: run(*search),
        lambda: run(*search, "--model", source),
        clock=time.perf_counter,
        rounds=rounds,
        difference=difference,
        note="wall seconds of a fresh process",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    rows = [
        compare(
            f"ecliptic {verb}",
            "python -c 'import torch'",
            lambda v=verb: run("-m", "ecliptic", v),
            lambda: run("-c", "import torch"),
            clock=time.perf_counter,
            rounds=rounds,
            note="wall seconds of a fresh process",
        )
        for verb in ("--help", "methods")
    ]
    import ecliptic
    from benchmarks.encode import build
    from ecliptic.data.cache import cache_dir

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        offline = ecliptic.load("offline")
        build().save_pretrained(work / "vit-b-32-random")
        (work / "cache").mkdir()
        (work / "cache" / "models").symlink_to(cache_dir().resolve() / "models")  # the offline model, assembled
        os.environ["ECLIPTIC_CACHE"] = str(work / "cache")
        rows.append(first_hit("offline model", offline, "offline", work, rounds))
        random = ecliptic.load(work / "vit-b-32-random")
        rows.append(first_hit("CLIP ViT-B/32", random, str(work / "vit-b-32-random"), work, rounds))
    packages = ("torch", "transformers", "onnxruntime", "tokenizers", "numpy", "typer")
    path = save("startup", rows, {"rounds": rounds, "pictures": PICTURES}, packages)
    print("\n".join(f"{line(row)}; {row.ours_seconds:.2f} s" for row in rows), f"\n{path}")


if __name__ == "__main__":
    main()
