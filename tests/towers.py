"""Tiny random encoders of every family, built in memory in milliseconds, for tests."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.clip.configuration_clip import CLIPConfig
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
from transformers.models.siglip.configuration_siglip import SiglipConfig
from transformers.models.siglip.modeling_siglip import SiglipModel
from transformers.models.vision_text_dual_encoder.configuration_vision_text_dual_encoder import (
    VisionTextDualEncoderConfig,
)
from transformers.models.vision_text_dual_encoder.modeling_vision_text_dual_encoder import VisionTextDualEncoderModel

from ecliptic.core.encoder import HFEncoder
from ecliptic.core.preprocess import CLIP_MEAN, CLIP_STD

SIZE, PATCH, DIM, WORDS = 32, 8, 24, 32
WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
CORPUS = (
    "a photo of a cat on a mat",
    "a photo of a small dog and a red ball",
    "a drawing of a blue circle left of a green square",
    "this is the rocket, the moon and a cup of coffee",
)


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the special tokens of `kind`: clip, siglip or bert."""
    special = {
        "clip": ["<|startoftext|>", "<|endoftext|>"],
        "siglip": ["<pad>", "</s>"],
        "bert": ["[PAD]", "[CLS]", "[SEP]"],
    }[kind]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    ids = [(token, raw.token_to_id(token)) for token in special]
    form = {
        "clip": "<|startoftext|> $A <|endoftext|>",
        "siglip": "$A </s>",
        "bert": "[CLS] $A [SEP]",
    }[kind]
    raw.post_processor = processors.TemplateProcessing(single=form, special_tokens=ids)
    names = {
        "clip": {"bos_token": special[0], "eos_token": special[1], "pad_token": special[1]},
        "siglip": {"eos_token": "</s>", "pad_token": "</s>"},
        "bert": {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"},
    }[kind]
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=WORDS, **names)


def _vision() -> dict[str, Any]:
    return {**WIDTHS, "image_size": SIZE, "patch_size": PATCH, "projection_dim": DIM}


def clip_encoder(seed: int = 0) -> HFEncoder:
    words = tokenizer("clip")
    config = CLIPConfig(
        vision_config=_vision(),
        text_config={
            **WIDTHS,
            "vocab_size": len(words),
            "max_position_embeddings": WORDS,
            "projection_dim": DIM,
            "eos_token_id": words.eos_token_id,
            "bos_token_id": words.bos_token_id,
            "pad_token_id": words.pad_token_id,
        },
        projection_dim=DIM,
    )
    return HFEncoder.from_hf(_built(CLIPModel, config, seed), words, _processor(), "tiny-clip")


def siglip_encoder(seed: int = 0) -> HFEncoder:
    words = tokenizer("siglip")
    config = SiglipConfig(
        vision_config=_vision(),
        text_config={
            **WIDTHS,
            "vocab_size": len(words),
            "max_position_embeddings": WORDS,
            "projection_size": DIM,
            "pad_token_id": words.pad_token_id,
            "eos_token_id": words.eos_token_id,
            "bos_token_id": words.eos_token_id,
        },
    )
    # SigLIP has no image projection: both towers must be as wide as the joint space.
    config.vision_config.hidden_size = DIM
    config.vision_config.num_attention_heads = 4
    model = _built(SiglipModel, config, seed)
    with torch.no_grad():
        model.logit_scale.fill_(4.0)
        model.logit_bias.fill_(-10.0)
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": SIZE, "width": SIZE},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return HFEncoder.from_hf(model, words, processor, "tiny-siglip")


def dual_encoder(seed: int = 0) -> HFEncoder:
    words = tokenizer("bert")
    vision = Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, mlp_ratio=2, image_size=SIZE, patch_size=PATCH
    )
    text = BertConfig(**WIDTHS, vocab_size=len(words), max_position_embeddings=WORDS, pad_token_id=words.pad_token_id)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=DIM)
    return HFEncoder.from_hf(_built(VisionTextDualEncoderModel, config, seed), words, _processor(), "tiny-dual")


FAMILIES = {"clip": clip_encoder, "siglip": siglip_encoder, "dual": dual_encoder}


def _built(family: Any, config: Any, seed: int) -> Any:
    """A model with weights drawn from `seed`, the global generator left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = family(config)
        with torch.no_grad():  # biases and norms off their neutral values, or tests could not see them
            for value in model.parameters():
                if value.ndim == 1:
                    value.add_(0.05 * torch.randn_like(value))
    return model.eval()


def _processor() -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE},
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
