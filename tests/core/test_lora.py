"""LoRA through peft: neutral at first, trained alone, merged without a trace, saved as peft does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ecliptic.core.encoder import HFEncoder, load
from ecliptic.core.lora import AdaptedEncoder, Lora, is_adapter, load_adapters, merge, save_adapters
from ecliptic.core.objectives import InfoNCE
from ecliptic.core.train import Train
from tests.core.lessons import assert_same, moved, pictures, weights
from tests.towers import FAMILIES, clip_encoder, siglip_encoder


def answers(encoder: HFEncoder) -> Tensor:
    records = pictures()[:5]
    image = encoder.encode_images([record["image"] for record in records])
    return torch.cat([image, encoder.encode_texts([record["caption"] for record in records])])


def short(**settings: Any) -> Train:
    return Train(InfoNCE(), **{"steps": 3, "batch_size": 8, "lr": 1e-2, "warmup": 0, **settings})


def shaken(encoder: HFEncoder, lora: Lora) -> AdaptedEncoder:
    """With adapters that do something."""
    adapted = lora.apply(encoder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if is_adapter(name):
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return adapted


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_change_nothing_at_first(family):
    encoder = FAMILIES[family]()
    before = weights(encoder)
    adapted = Lora(rank=4).apply(encoder)
    assert answers(adapted).equal(answers(encoder))
    assert not moved(before, encoder)
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == {
        name for name, _ in adapted.named_parameters() if is_adapter(name)
    }
    assert (
        sum(is_adapter(name) for name, _ in adapted.named_parameters()) == 2 * 2 * 3 * 2
    )  # A, B; q, v; blocks; towers
    assert adapted.history[-1]["step"] == "lora"
    state = torch.random.get_rng_state()
    assert_same(adapted, Lora(rank=4).apply(encoder))
    assert torch.random.get_rng_state().equal(state)
    assert moved(weights(adapted), Lora(rank=4, seed=1).apply(encoder))


@pytest.mark.parametrize("parts", [("q", "v"), ("k", "out", "fc1", "fc2", "projection")])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_as_unmerged_and_plain(family, parts, tmp_path):
    encoder = FAMILIES[family]()
    adapted = shaken(encoder, Lora(rank=2, parts=parts, dropout=0.1))
    merged = merge(adapted)
    assert (answers(adapted) - answers(encoder)).abs().max() > 1e-2
    assert_close(answers(merged), answers(adapted), rtol=0, atol=1e-5)
    assert merged.state_dict().keys() == encoder.state_dict().keys()
    assert type(merged) is HFEncoder
    assert all(p.requires_grad for p in merged.parameters())
    assert not any("lora" in type(module).__name__.lower() for module in merged.modules())
    adapted.save_pretrained(tmp_path / "model")
    assert_close(answers(load(tmp_path / "model")), answers(adapted), rtol=0, atol=1e-5)


def test_the_addition_by_hand():
    encoder = clip_encoder()
    adapted = shaken(encoder, Lora(rank=2, alpha=6.0, towers=("text",), parts=("q",)))
    state = adapted.state_dict()
    name = "model.text_model.encoder.layers.1.self_attn.q_proj"
    a, b = state[f"{name}.lora_A.default.weight"], state[f"{name}.lora_B.default.weight"]
    expected = encoder.state_dict()[f"{name}.weight"] + 3.0 * b @ a
    assert_close(merge(adapted).state_dict()[f"{name}.weight"], expected)
    changed = moved(weights(encoder), merge(adapted))
    assert changed == {f"model.text_model.encoder.layers.{i}.self_attn.q_proj.weight" for i in range(3)}


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_and_what_is_asked_for_are_trained(family):
    encoder = FAMILIES[family]()
    before = weights(encoder)
    done = short(lora=Lora(rank=2, towers=("text",))).run(encoder, pictures())
    changed = moved(before, done.encoder)
    assert len(changed) == 6
    assert all("text_model" in name and name.endswith("weight") for name in changed)
    assert type(done.encoder) is HFEncoder
    assert_close(answers(done.encoder), answers(done.adapters), rtol=0, atol=1e-5)
    assert [p.requires_grad for p in done.encoder.parameters()] == [p.requires_grad for p in encoder.parameters()]
    more = short(lora=Lora(rank=2, towers=("text",)), trainable="logit_scale").apply(encoder, pictures())
    assert moved(before, more) == {*changed, "model.logit_scale"}
    frozen = short(lora=Lora(rank=2), freeze=("image",)).apply(encoder, pictures())
    assert moved(before, frozen) == changed
    assert not moved(before, encoder)
    args = done.encoder.history[-1]["args"]
    assert args["lora"] == {
        "rank": 2,
        "alpha": 16.0,
        "towers": ["text"],
        "parts": ["q", "v"],
        "dropout": 0.0,
        "seed": 0,
    }


def test_adapters_learn_and_go_on_bit_for_bit(tmp_path):
    def stop(encoder: Any) -> dict[str, float]:
        if stopping:
            raise KeyboardInterrupt
        return {}

    stopping = True
    common = {"steps": 8, "lora": Lora(dropout=0.2), "ema": 0.5, "chunk": 4}
    stopped = common | {"evaluate": stop, "evaluate_every": 3, "checkpoints": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        short(**stopped).apply(clip_encoder(), pictures())
    stopping = False
    straight = short(**common).run(clip_encoder(), pictures())
    resumed = short(**stopped).run(clip_encoder(), pictures())
    assert_same(resumed.encoder, straight.encoder)
    assert_same(resumed.last, straight.last)
    assert straight.log[-1]["loss"] < straight.log[0]["loss"]
    size = next(tmp_path.glob("*.pt")).stat().st_size
    assert size < 0.7 * sum(p.numel() * 4 for p in clip_encoder().parameters())  # the adapters, not the model


PEFTS_OWN = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated"
)  # what its class asks transformers


@PEFTS_OWN
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_saved_as_peft_does(family, tmp_path):
    from peft import PeftModel

    encoder = FAMILIES[family]()
    adapted = shaken(encoder, Lora(rank=3, alpha=5.0, parts=("q", "fc1")))
    save_adapters(adapted, tmp_path / "adapters")
    assert {path.name for path in (tmp_path / "adapters").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert_same(load_adapters(encoder, tmp_path / "adapters"), adapted)
    theirs = encoder.clone()
    theirs.model = PeftModel.from_pretrained(theirs.model, str(tmp_path / "adapters")).merge_and_unload()
    assert_close(
        answers(HFEncoder(theirs.model, theirs.tokenizer, theirs.transform)), answers(adapted), rtol=0, atol=1e-5
    )


@PEFTS_OWN
def test_adapters_of_peft_are_opened(tmp_path):
    from peft import LoraConfig, get_peft_model

    encoder = clip_encoder()
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(encoder.clone().model, config)
    model.save_pretrained(tmp_path)
    opened = load_adapters(encoder, tmp_path)
    theirs = HFEncoder(model.merge_and_unload(), encoder.tokenizer, encoder.transform)
    assert (answers(opened) - answers(encoder)).abs().max() > 1e-4
    assert_close(answers(opened), answers(theirs), rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    for wrong, message in (
        ({"rank": 0}, "rank=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"towers": ("vision",)}, "choose from image, text"),
        ({"parts": "q"}, "choose from q, k, v, out, fc1, fc2, projection, as a tuple"),
        ({"parts": ()}, "parts=()"),
    ):
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
            Lora(**wrong)
    adapted = Lora(rank=2).apply(clip_encoder())
    with pytest.raises(ValueError, match="has adapters already"):
        Lora().apply(adapted)
    with pytest.raises(ValueError, match="has no adapters"):
        save_adapters(clip_encoder(), tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no adapter_config"):
        load_adapters(clip_encoder(), tmp_path)
    with pytest.raises(ValueError, match="no linear layer"):
        Lora(towers=("image",), parts=("projection",)).apply(siglip_encoder())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "else").write_text("x")
    with pytest.raises(FileExistsError, match="other files"):
        save_adapters(adapted, tmp_path / "full")
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'pip install "ecliptic\[train\]"'):
        Lora().apply(clip_encoder())
