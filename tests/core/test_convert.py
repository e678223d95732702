"""OpenAI and open_clip layouts, both ways. The oracle builds the original forward pass out of torch's own layers."""

import gzip
import itertools
import string

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from ecliptic.core.convert import clip_tokenizer, from_open_clip, to_open_clip
from ecliptic.core.encoder import HFEncoder, LoadError, load
from ecliptic.core.preprocess import ImagePreprocess

WIDTH, LAYERS, SIDE, PATCH, LENGTH, VOCAB, DIM = 64, 2, 16, 8, 12, 50, 16


def openai_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights in OpenAI's layout, written from the published model definition."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=0.2):
        return scale * torch.randn(*shape, generator=g)

    state = {
        "logit_scale": torch.tensor(3.0),
        "text_projection": draw(WIDTH, DIM),
        "positional_embedding": draw(LENGTH, WIDTH),
        "token_embedding.weight": draw(VOCAB, WIDTH),
        "visual.proj": draw(WIDTH, DIM),
        "visual.class_embedding": draw(WIDTH),
        "visual.positional_embedding": draw((SIDE // PATCH) ** 2 + 1, WIDTH),
        "visual.conv1.weight": draw(WIDTH, 3, PATCH, PATCH),
    }
    for name in ("ln_final", "visual.ln_pre", "visual.ln_post"):
        state |= {f"{name}.weight": 1 + draw(WIDTH), f"{name}.bias": draw(WIDTH)}
    for tower in ("visual.transformer", "transformer"):
        for i in range(LAYERS):
            block = f"{tower}.resblocks.{i}"
            state |= {
                f"{block}.ln_1.weight": 1 + draw(WIDTH), f"{block}.ln_1.bias": draw(WIDTH),
                f"{block}.ln_2.weight": 1 + draw(WIDTH), f"{block}.ln_2.bias": draw(WIDTH),
                f"{block}.attn.in_proj_weight": draw(3 * WIDTH, WIDTH), f"{block}.attn.in_proj_bias": draw(3 * WIDTH),
                f"{block}.attn.out_proj.weight": draw(WIDTH, WIDTH), f"{block}.attn.out_proj.bias": draw(WIDTH),
                f"{block}.mlp.c_fc.weight": draw(4 * WIDTH, WIDTH), f"{block}.mlp.c_fc.bias": draw(4 * WIDTH),
                f"{block}.mlp.c_proj.weight": draw(WIDTH, 4 * WIDTH), f"{block}.mlp.c_proj.bias": draw(WIDTH),
            }  # fmt: skip
    return state


def oracle(state, pixels, ids, activation):
    """CLIP's forward pass in float64 from nn.MultiheadAttention: width / 64 heads, causal text pooled at its end."""
    state = {name: value.double() for name, value in state.items()}
    act = (lambda x: x * torch.sigmoid(1.702 * x)) if activation == "quick_gelu" else nn.functional.gelu

    def norm(x, name):
        return nn.functional.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"])

    def blocks(x, tower, mask):
        for i in range(LAYERS):
            name = f"{tower}.resblocks.{i}"
            attention = nn.MultiheadAttention(WIDTH, WIDTH // 64, batch_first=True).double()
            attention.load_state_dict(
                {
                    key: state[f"{name}.attn.{key}"]
                    for key in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
                }
            )
            y = norm(x, f"{name}.ln_1")
            x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
            y = norm(x, f"{name}.ln_2")
            y = act(y @ state[f"{name}.mlp.c_fc.weight"].T + state[f"{name}.mlp.c_fc.bias"])
            x = x + y @ state[f"{name}.mlp.c_proj.weight"].T + state[f"{name}.mlp.c_proj.bias"]
        return x

    x = nn.functional.conv2d(pixels.double(), state["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    x = blocks(norm(x, "visual.ln_pre"), "visual.transformer", None)
    image = norm(x[:, 0], "visual.ln_post") @ state["visual.proj"]
    t = state["token_embedding.weight"][ids] + state["positional_embedding"][: ids.shape[1]]
    causal = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=torch.float64).triu(1)
    t = norm(blocks(t, "transformer", causal), "ln_final")
    text = t[torch.arange(len(ids)), ids.argmax(-1)] @ state["text_projection"]
    image, text = nn.functional.normalize(image, dim=-1), nn.functional.normalize(text, dim=-1)
    return state["logit_scale"].exp() * image @ text.T


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_openai_weights_compute_what_openai_computes(activation):
    state = openai_state()
    g = torch.Generator().manual_seed(5)
    pixels = torch.randn(3, 3, SIDE, SIDE, generator=g)
    ids = torch.randint(1, VOCAB - 2, (4, LENGTH), generator=g)
    ids[:, 7] = VOCAB - 1
    model = from_open_clip(state, activation=activation)
    with torch.no_grad():
        found = model(pixel_values=pixels, input_ids=ids).logits_per_image
    assert_close(found.double(), oracle(state, pixels, ids, activation), atol=1e-4, rtol=1e-4)
    other = "gelu" if activation == "quick_gelu" else "quick_gelu"
    assert (found.double() - oracle(state, pixels, ids, other)).abs().max() > 1e-3


def test_clip_goes_there_and_back_unchanged():
    state = openai_state()
    back = to_open_clip(from_open_clip(state, activation="gelu"))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_open_clips_custom_text_form_is_the_same_model():
    state = openai_state()
    words = ("positional_embedding", "token_embedding", "text_projection", "ln_final", "transformer")
    custom = {f"text.{name}" if name.split(".")[0] in words else name: value for name, value in state.items()}
    a, b = from_open_clip(state, activation="gelu"), from_open_clip(custom, activation="gelu")
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def siglip_model():
    from tests.towers import siglip_encoder

    return siglip_encoder().model


def test_siglip_goes_there_and_back_unchanged():
    model = siglip_model()
    state = to_open_clip(model)
    assert {
        "visual.trunk.attn_pool.q.weight",
        "visual.trunk.attn_pool.kv.bias",
        "text.text_projection.bias",
    } <= state.keys()
    assert state["logit_bias"].shape == ()
    assert state["visual.trunk.pos_embed"].ndim == 3
    back = from_open_clip(state, config={"text_cfg": {"heads": 4}})
    ours, theirs = model.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_siglips_attention_is_stacked_in_timms_order():
    model = siglip_model()
    state = to_open_clip(model)
    attention = model.vision_model.encoder.layers[1].self_attn
    width = attention.q_proj.weight.shape[0]
    qkv = state["visual.trunk.blocks.1.attn.qkv.weight"]
    for i, part in enumerate((attention.q_proj, attention.k_proj, attention.v_proj)):
        assert torch.equal(qkv[i * width : (i + 1) * width], part.weight)


# Files


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
def test_weight_files_open(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    state = {name: value.contiguous() for name, value in openai_state().items()}
    if suffix == ".safetensors":
        save_file(state, path)
    elif suffix == ".bin":
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, path)
    else:
        torch.save(state, path)
    with pytest.raises(LoadError, match="which GELU"):
        load(path)
    encoder = load(path, activation="quick_gelu")
    assert isinstance(encoder, HFEncoder)
    assert (encoder.dim, encoder.image_size, encoder.max_tokens) == (DIM, SIDE, LENGTH)
    encoder.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    pixels = torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        assert_close(encoder.images(pixels).pooled, again.images(pixels).pooled, atol=1e-6, rtol=0)


def test_openais_own_archives_are_known_to_use_quick_gelu(tmp_path):
    class Archive(nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in openai_state().items():
                self._add(name.split("."), value)
            for name, value in (("input_resolution", SIDE), ("context_length", LENGTH), ("vocab_size", VOCAB)):
                self.register_buffer(name, torch.tensor(value))

        def _add(self, path, value):
            at = self
            for part in path[:-1]:
                if not hasattr(at, part):
                    at.add_module(part, nn.Module())
                at = getattr(at, part)
            at.register_buffer(path[-1], value.half())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, OpenAI's archives are not
        torch.jit.save(torch.jit.trace(Archive(), torch.zeros(1)), tmp_path / "ViT-tiny.pt")
        encoder = load(tmp_path / "ViT-tiny.pt")
        with pytest.raises(LoadError, match="trained with quick_gelu"):
            load(tmp_path / "ViT-tiny.pt", activation="gelu")
    assert encoder.model.config.vision_config.hidden_act == "quick_gelu"
    assert encoder.model.dtype == torch.float32


def test_an_open_clip_folder_opens_with_its_config(tmp_path):
    save_file({k: v.contiguous() for k, v in openai_state().items()}, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(
        '{"model_cfg": {"quick_gelu": true, "vision_cfg": {}, "text_cfg": {"heads": 2}},'
        ' "preprocess_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1], "resize_mode": "squash"}}'
    )
    encoder = load(tmp_path)
    assert encoder.model.config.text_config.hidden_act == "quick_gelu"
    assert encoder.model.config.text_config.num_attention_heads == 2
    assert encoder.transform.size == (SIDE, SIDE)
    assert encoder.transform.mean == (0, 0, 0)
    with pytest.raises(LoadError, match="quick_gelu"):
        load(tmp_path, activation="gelu")


def test_incomplete_and_foreign_weights_are_refused(tmp_path):
    state = openai_state()
    for change, message in (
        ({"visual.proj": None}, "visual.proj"),
        ({"extra.weight": torch.zeros(2)}, "no place: extra.weight"),
        ({"visual.conv1.weight": None}, "neither CLIP"),
    ):
        broken = {name: value for name, value in (state | change).items() if value is not None}
        with pytest.raises(LoadError, match=message):
            from_open_clip(broken, activation="gelu")
    siglip = to_open_clip(siglip_model())
    del siglip["logit_bias"]
    with pytest.raises(LoadError, match="logit_bias"):
        from_open_clip(siglip)
    (tmp_path / "junk.pt").write_bytes(b"not weights")
    (tmp_path / "junk.safetensors").write_bytes(b"not weights")
    for name in ("junk.pt", "junk.safetensors"):
        with pytest.raises(LoadError, match="not readable as weights"):
            load(tmp_path / name)


def test_pickled_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"weights": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(LoadError, match="not readable"):
        load(tmp_path / "evil.pt")
    assert not (tmp_path / "pwned").exists()


def test_the_published_vocabulary_format(tmp_path):
    """A made-up merges file of the published length: special tokens come last, words end in </w>, merging follows the order."""
    letters = string.ascii_letters
    words = ("".join(pair) for pair in itertools.product(letters, repeat=3))
    merges = ["c a", "ca t</w>", *(f"{a} {b}" for a in letters for b in letters if a + b != "ca")]
    merges += [f"{word[:2]} {word[2]}" for word in itertools.islice(words, 49152 - 256 - 2 - len(merges))]
    path = tmp_path / "bpe.txt.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write('"bpe_simple_vocab_16e6.txt#version: 0.2\n' + "\n".join(merges) + "\n")
    words = clip_tokenizer(path)
    assert words("Cat")["input_ids"] == [49406, 513, 49407]
    assert len(words) == 49408
    model = from_open_clip(openai_state(), activation="gelu")
    assert HFEncoder(model, words, ImagePreprocess()).max_tokens == LENGTH
