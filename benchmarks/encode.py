"""Encoding captions and pictures, against transformers and sentence-transformers with the same weights.

    python -m benchmarks.encode [--rounds N]

The model has the shape of CLIP ViT-B/32 with random weights (speed does not depend on them). Captions are those of rendered
scenes, cut to words; ids come from one tokenizer on both sides, and tokenising is inside the measured call. Two ways of using
transformers are compared, because both are common: captions padded to the model's 77 tokens, as CLIP pipelines and zero-shot
classifiers do, and captions padded to the longest of their batch. sentence-transformers opens the folder that
`save_pretrained` wrote and embeds with `encode`, which sorts captions by length.
"""

from __future__ import annotations

import argparse
import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

import ecliptic
from benchmarks.measure import Row, compare, line, save
from ecliptic.core.encoder import HFEncoder
from ecliptic.core.preprocess import ImagePreprocess

BATCH = 64


def build() -> HFEncoder:
    from transformers.models.clip.configuration_clip import CLIPConfig
    from transformers.models.clip.modeling_clip import CLIPModel

    words = ecliptic.load("tiny").tokenizer
    words.model_max_length = 77
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={
            "eos_token_id": words.eos_token_id,
            "bos_token_id": words.bos_token_id,
            "pad_token_id": words.pad_token_id,
        }
    )
    return HFEncoder(CLIPModel(config).eval(), words, ImagePreprocess(), "vit-b-32-random")


def captions(encoder: HFEncoder, longest: int, n: int = 256) -> list[str]:
    """Different captions of 4 to `longest` tokens, special ones included, lengths evenly mixed."""
    from ecliptic.data.scenes import scenes

    rng = np.random.default_rng(0)
    source = scenes("train", n=n, seed=0, kind="multi")
    texts = [source[i]["long_caption"] for i in range(n)]
    out = []
    for text in texts:
        words = (text.split() * 20)[: int(rng.integers(2, longest))]
        while len(encoder.tokenizer(" ".join(words))["input_ids"]) > longest:
            words.pop()
        out.append(" ".join(words))
    return out


def peer_texts(encoder: HFEncoder, texts: list[str], padding: bool | str) -> Tensor:
    rows = []
    with torch.inference_mode():
        for i in range(0, len(texts), BATCH):
            given = encoder.tokenizer(
                texts[i : i + BATCH], padding=padding, truncation=True, max_length=77, return_tensors="pt"
            )
            features = encoder.model.get_text_features(
                input_ids=given["input_ids"], attention_mask=given["attention_mask"]
            )
            rows.append(normalize(features.pooler_output, dim=-1))
    return torch.cat(rows)


def peer_images(encoder: HFEncoder, processor: object, pictures: list[Image.Image]) -> Tensor:
    rows = []
    with torch.inference_mode():
        for i in range(0, len(pictures), 16):
            pixels = processor(images=pictures[i : i + 16], return_tensors="pt")["pixel_values"]  # type: ignore[operator]
            rows.append(normalize(encoder.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1))
    return torch.cat(rows)


def sentence_transformer(encoder: HFEncoder) -> Any:
    """The same weights in sentence-transformers, which reads them from a folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Transformer

    with tempfile.TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        return SentenceTransformer(modules=[Transformer(folder)], device="cpu")


def main() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    encoder = build()
    sentences = sentence_transformer(encoder)

    def st_encode(items: list[Any], batch: int) -> Tensor:
        return sentences.encode(
            items, batch_size=batch, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False
        )

    rows: list[Row] = []
    for name, longest in (("captions of at most 16 tokens", 16), ("captions of at most 77 tokens", 77)):
        texts = captions(encoder, longest, 64 if longest == 16 else 16)
        ours = encoder.encode_texts(texts)
        peers: dict[str, Callable[[], Tensor]] = {
            "transformers padded to 77": lambda t=texts: peer_texts(encoder, t, "max_length"),
            "transformers padded to the batch": lambda t=texts: peer_texts(encoder, t, True),
            "sentence-transformers": lambda t=texts: st_encode(t, BATCH),
        }
        for peer, call in peers.items():
            difference = float((ours - call()).abs().max())
            assert difference < 1e-5, f"outputs differ by {difference}"
            rows.append(
                compare(name, peer, lambda t=texts: encoder.encode_texts(t), call, rounds=rounds, difference=difference)
            )
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)) for _ in range(8)]
    processor = CLIPImageProcessorPil()
    ours = encoder.encode_images(pictures, 16)
    for peer, call in {
        "transformers (Pillow processor)": lambda: peer_images(encoder, processor, pictures),
        "sentence-transformers": lambda: st_encode(pictures, 16),
    }.items():
        difference = float((ours - call()).abs().max())
        assert difference < 1e-5, f"outputs differ by {difference}"
        rows.append(
            compare(
                "pictures of 640 x 480, resized and encoded",
                peer,
                lambda: encoder.encode_images(pictures, 16, workers=1),
                call,
                rounds=rounds,
                difference=difference,
            )
        )
    pixels = encoder.preprocess(pictures)

    def tower() -> Tensor:
        with torch.inference_mode():
            return encoder.images(pixels).pooled

    def peer_tower() -> Tensor:
        with torch.inference_mode():
            return normalize(encoder.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    difference = float((tower() - peer_tower()).abs().max())
    assert difference < 1e-5, f"outputs differ by {difference}"
    rows.append(
        compare("pictures, tower only", "transformers", tower, peer_tower, rounds=rounds, difference=difference)
    )
    settings = {"batch": BATCH, "threads": 1, "model": "CLIP ViT-B/32 shape, random weights", "rounds": rounds}
    path = save("encode", rows, settings, ("torch", "transformers", "sentence-transformers", "numpy", "pillow"))
    print("\n".join(line(row) for row in rows), f"\n{path}")


if __name__ == "__main__":
    main()
