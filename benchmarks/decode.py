"""Embedding a folder of 12-megapixel JPEGs with fast decoding, against decoding in full: python -m benchmarks.decode [--rounds N]

Both sides run the same model. The peer opens each picture with Pillow and prepares it with the checkpoint's own processor
from transformers. The pictures are photographs of scikit-image and scikit-learn and rendered scenes, enlarged to 4000 x 3000
with detail at several scales and the noise of a sensor: flat enlargements would decode faster than camera files do. Fast
embeddings are not equal to exact ones; the least cosine between the two over all pictures is asserted and reported.
"""

from __future__ import annotations

import argparse
import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import ecliptic
from benchmarks.measure import Row, compare, line, save
from ecliptic.core.encoder import HFEncoder

LEAST = 0.99  # cosine between fast and exact that every picture must keep
SIZE = (4000, 3000)
BATCH = 8


def pictures(photographs: int = 12, drawings: int = 4) -> Iterator[tuple[str, Image.Image]]:
    from ecliptic.data.scenes import scenes
    from ecliptic.data.sources import open_source

    for record in open_source("photos")[:photographs]:
        yield Path(record["id"]).stem, record["image"]
    for record in scenes("test", n=drawings, size=1024, kind="multi"):
        yield f"scene-{record['id'].rpartition('/')[2]}", record["image"]


def enlarged(picture: Image.Image, seed: int) -> Image.Image:
    """Filled up to 12 megapixels, with detail in cells of 2 to 16 pixels and noise in each."""
    rng = np.random.default_rng(seed)
    width, height = SIZE if picture.width >= picture.height else SIZE[::-1]
    factor = max(width / picture.width, height / picture.height)
    whole = (round(picture.width * factor), round(picture.height * factor))
    pixels = np.asarray(picture.resize(whole, Image.Resampling.BICUBIC).crop((0, 0, width, height)), np.float32)
    detail = np.zeros((height, width), np.float32)
    for cell in (2, 4, 8, 16):
        grain = rng.standard_normal((height // cell + 1, width // cell + 1), np.float32) * cell / 4
        detail += np.asarray(Image.fromarray(grain).resize((width, height), Image.Resampling.BICUBIC))
    pixels = pixels * (1 + 0.03 * detail[..., None]) + 3 * rng.standard_normal(pixels.shape, np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def peer(encoder: HFEncoder, processor: Any, files: list[Path]) -> Tensor:
    rows = []
    with torch.inference_mode():
        for start in range(0, len(files), BATCH):
            opened = [Image.open(file).convert("RGB") for file in files[start : start + BATCH]]
            rows.append(encoder.images(processor(images=opened, return_tensors="pt")["pixel_values"]).pooled)
    return torch.cat(rows)


def main() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows: list[Row] = []
    cosines: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for seed, (name, picture) in enumerate(pictures()):
            files.append(Path(folder) / f"{name}.jpg")
            enlarged(picture, seed).save(files[-1], quality=90)
        megabytes = sum(file.stat().st_size for file in files) / 1e6
        for name in ("tiny", "offline"):
            encoder = ecliptic.load(name)
            processor = CLIPImageProcessorPil(**encoder.transform.to_processor())
            exact = peer(encoder, processor, files)
            assert float((encoder.encode_images(files, BATCH) - exact).abs().max()) < 1e-5
            near = (encoder.encode_images(files, BATCH, decode="fast") * exact).sum(-1)
            least = float(near.min())
            assert least >= LEAST, f"{name}: {files[int(near.argmin())].stem} keeps a cosine of only {least}"
            cosines[name] = {file.stem: round(value, 6) for file, value in zip(files, near.tolist(), strict=True)}
            rows.append(
                compare(
                    f"{len(files)} JPEGs of 12 megapixels, fast decoding, {name} model (cosine with exact >= {least:.4f})",
                    "Pillow in full, transformers' processor",
                    lambda e=encoder: e.encode_images(files, BATCH, workers=1, decode="fast"),
                    lambda e=encoder, p=processor: peer(e, p, files),
                    rounds=rounds,
                )
            )
    settings = {"batch": BATCH, "threads": 1, "rounds": rounds, "megabytes": round(megabytes, 1), "cosines": cosines}
    path = save("decode", rows, settings)
    print("\n".join(line(row) for row in rows), f"\n{path}")


if __name__ == "__main__":
    main()
