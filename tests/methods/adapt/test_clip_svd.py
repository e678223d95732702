"""CLIP-SVD: the six invariants of the reparametrisation in float64, the recipe, and what interpretation says."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn, tensor
from torch.testing import assert_close

from ecliptic.core.anatomy import parts as parts_of
from ecliptic.core.anatomy import swap
from ecliptic.core.batches import collate
from ecliptic.core.encoder import load
from ecliptic.core.prompt_classifier import PromptClassifier
from ecliptic.core.train import Settings, fit
from ecliptic.data.shots import tiny_records
from ecliptic.methods.adapt.clip_svd import (
    PARTS,
    TOWERS,
    ClipSvd,
    SvdHandle,
    SvdLinear,
    chosen_blocks,
    rank_changes,
    svd_reparametrise,
)
from tests.towers import FAMILIES, clip_encoder, dual_encoder, siglip_encoder

NAMES = ("red", "green", "blue")


@pytest.fixture(params=FAMILIES)
def encoder(request):
    return FAMILIES[request.param]()


def layer_of(out=6, inside=9, seed=0, bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(inside, out, bias=bias, dtype=torch.float64)


def rows(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linears(encoder):
    """Every layer that can be decomposed, by the name that the handle gives it."""
    return {
        f"{tower}.{i}.{part}": getattr(parts_of(block), part)
        for tower in TOWERS
        for i, block in enumerate(getattr(encoder.anatomy, tower).blocks)
        for part in PARTS
    }


def answers(encoder, dtype=torch.float32):
    """Logits (12, 3) of pictures against captions, in any precision."""
    encoder = copy.deepcopy(encoder).to(dtype)
    with torch.no_grad():
        pixels = encoder.preprocess([r["image"] for r in tiny_records()]).to(dtype)
        return encoder.logits(encoder.images(pixels).pooled, encoder.texts(encoder.tokenize(list(NAMES))).pooled)


def shake(handle, size=0.05, seed=5):
    """Change every singular value a little, as training might."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in handle.layers.values():
            layer.offset += size * torch.randn(layer.rank, generator=generator).to(layer.offset)


# One layer


@pytest.mark.parametrize(("out", "inside"), [(6, 9), (9, 6), (5, 5)])
@pytest.mark.parametrize("towards", ["zero", "start"])
def test_a_layer_is_its_decomposition(out, inside, towards):
    layer = layer_of(out, inside)
    svd = SvdLinear.of(layer, min(out, inside), towards)
    left, values, right = np.linalg.svd(layer.weight.detach().numpy(), full_matrices=False)
    assert_close(svd.start, torch.from_numpy(values))
    assert_close(svd.s.detach(), torch.from_numpy(values))
    assert (svd.left.shape, svd.right.shape) == ((out, min(out, inside)), (min(out, inside), inside))
    for k in range(min(out, inside)):  # each rank-one part, whatever its sign
        assert_close(torch.outer(svd.left[:, k], svd.right[k]), torch.from_numpy(np.outer(left[:, k], right[k])))
    assert_close(svd.weight, layer.weight, rtol=1e-12, atol=1e-12)
    x = rows(4, inside)
    assert_close(svd(x), layer(x), rtol=1e-12, atol=1e-12)


def test_both_ways_to_multiply_agree():
    svd = SvdLinear.of(layer_of(), 6)
    with torch.no_grad():
        svd.offset *= rows(6)
    few, many = rows(2, 9), rows(3, 40, 9)  # the weight is put together where there are more rows than 15
    slow = torch.stack(
        [sum(svd.left[:, k] * svd.s[k] * (svd.right[k] @ x) for k in range(6)) + svd.bias for x in many[1]]
    )
    assert_close(svd(many)[1], slow)
    assert_close(svd(many)[1, :2], svd(many[1, :2]))
    assert_close(svd(few), few @ svd.weight.T + svd.bias)
    for x in (few, many):
        svd.zero_grad()
        svd(x).square().sum().backward()
        found = svd.offset.grad.clone()
        expected = torch.autograd.grad((x @ svd.weight.T + svd.bias).square().sum(), svd.offset)[0]
        assert_close(found, expected)


@pytest.mark.parametrize("batch", [2, 50])
def test_gradient_is_the_diagonal_of_u_g_v(batch):
    layer = layer_of()
    svd = SvdLinear.of(layer, 6)
    x, target = rows(batch, 9), rows(batch, 6, seed=2)
    ((svd(x) - target) ** 3).sum().backward()
    gradient = torch.zeros(6, 9, dtype=torch.float64)  # dL/dW of the plain layer, sample by sample
    for sample, wanted in zip(x, target):
        error = layer.weight.detach() @ sample + layer.bias.detach() - wanted
        gradient += torch.outer(3 * error**2, sample)
    expected = [float(svd.left[:, k] @ gradient @ svd.right[k]) for k in range(6)]
    assert_close(svd.offset.grad, tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-8)
    assert layer.weight.grad is None


@pytest.mark.parametrize("rank", [4, 1])
def test_lower_rank_is_the_best_approximation(rank):
    layer = layer_of(8, 10)
    values = torch.linalg.svdvals(layer.weight)
    error = (SvdLinear.of(layer, rank).weight - layer.weight).norm()
    assert_close(error, values[rank:].square().sum().sqrt())


def test_merged_layer_by_hand():
    plain = nn.Linear(2, 2, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(tensor([[0.0, 2.0], [1.0, 0.0]]))
    svd = SvdLinear.of(plain, 2)
    with torch.no_grad():
        svd.offset.copy_(tensor([5.0, -3.0]))  # turn the first direction up, and the second round
    assert_close(svd.merged().weight, tensor([[0.0, 5.0], [-3.0, 0.0]], dtype=torch.float64))
    assert svd.merged().bias is plain.bias


def test_half_precision_is_decomposed_in_float32():
    layer = layer_of().to(torch.bfloat16)
    exact = torch.linalg.svdvals(layer.weight.float())
    assert_close(SvdLinear.of(layer, 6).start.float(), exact, rtol=0.01, atol=0)
    assert SvdLinear.of(layer, 6).left.dtype == torch.bfloat16


# A whole encoder


def test_answers_stay_the_same_before_and_after(encoder):  # invariants 1 and 2
    for dtype, close in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        changed = encoder.clone().to(dtype)
        before = answers(changed, dtype)
        count = sum(p.numel() for p in changed.parameters())
        kinds = [type(module) for module in changed.modules()]
        handle = svd_reparametrise(changed)
        assert_close(answers(changed, dtype), before, rtol=0, atol=close * float(changed.scale.detach()))
        shake(handle)
        moved = answers(changed, dtype)
        assert (moved - before).abs().max() > 1e-3
        handle.merge()
        assert_close(answers(changed, dtype), moved, rtol=0, atol=close * float(changed.scale.detach()))
        assert [type(module) for module in changed.modules()] == kinds
        assert sum(p.numel() for p in changed.parameters()) == count
        assert all(p.requires_grad for p in changed.parameters())
        assert changed.state_dict().keys() == encoder.state_dict().keys()


def test_only_singular_values_train(encoder):  # invariant 3
    handle = svd_reparametrise(encoder)
    expected = sum(min(layer.in_features, layer.out_features) for layer in handle.layers.values())
    assert len(handle.layers) == 2 * 3 * 6
    assert handle.trainable_count() == expected == sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    objective = PromptClassifier(NAMES).bind(encoder)
    batch = collate(encoder, tiny_records(), objective)
    fit(
        encoder,
        lambda b: objective.terms(objective.encode(encoder, b)),
        [batch],
        Settings(steps=10, lr=1e-2, warmup=0),
    )
    after = encoder.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(".offset")}


def test_count_of_a_vit_b_16():
    # 12 blocks, 6 layers of rank 768 and of rank 512: 12 * 6 * (768 + 512), table 1's 0.09 M
    widths = [(768, 3072), (512, 2048)]
    assert sum(12 * (4 * w + 2 * min(w, m)) for w, m in widths) == 92_160


def test_distance_of_the_weights_is_that_of_the_values(encoder):  # invariant 5
    encoder = encoder.to(torch.float64)
    old = {name: layer.weight.detach().clone() for name, layer in linears(encoder).items()}
    handle = svd_reparametrise(encoder)
    shake(handle)
    delta = handle.delta()
    handle.merge()
    for name, layer in linears(encoder).items():
        assert_close((layer.weight - old[name]).norm(), delta[name].norm(), rtol=1e-10, atol=1e-12)


def test_half_of_the_rank(encoder):  # invariant 6
    encoder = encoder.to(torch.float64)
    old = {name: layer.weight.detach().clone() for name, layer in linears(encoder).items()}
    handle = svd_reparametrise(encoder, rank_ratio=0.5)
    for name, layer in handle.layers.items():
        full = min(old[name].shape)
        assert layer.rank == full // 2 // 4 * 4
        rest = torch.linalg.svdvals(old[name])[layer.rank :]
        assert_close((layer.weight - old[name]).norm(), rest.square().sum().sqrt())


def test_towers_parts_and_layers_can_be_chosen(encoder):
    def chosen(**options):
        return set(svd_reparametrise(encoder.clone(), **options).layers)

    assert chosen(towers=("text",), parts=("v",), layers=(0, -1)) == {"text.0.v", "text.2.v"}
    assert chosen(parts=("fc1", "fc2"), layers=("top",)) == {f"{t}.2.{p}" for t in TOWERS for p in ("fc1", "fc2")}
    assert chosen(layers="bottom") == {f"{t}.0.{p}" for t in TOWERS for p in PARTS}
    changed = encoder.clone()
    svd_reparametrise(changed, ("image",), ("q",))
    plain = {name for name, layer in linears(changed).items() if type(layer) is nn.Linear}
    assert plain == set(linears(encoder)) - {f"image.{i}.q" for i in range(3)}


def test_thirds_of_a_tower():
    assert [chosen_blocks(12, (third,)) for third in ("bottom", "middle", "top")] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11],
    ]  # fmt: skip
    assert chosen_blocks(12, ("top", "bottom", 5)) == [0, 1, 2, 3, 5, 8, 9, 10, 11]
    assert chosen_blocks(4, "all") == [0, 1, 2, 3]
    for count in range(3, 40):  # every block is in one third
        found = [block for third in ("bottom", "middle", "top") for block in chosen_blocks(count, (third,))]
        assert found == list(range(count))


def test_the_pooling_head_of_siglip_stays():
    encoder = siglip_encoder()
    head = {name: value.clone() for name, value in encoder.model.vision_model.head.state_dict().items()}
    svd_reparametrise(encoder).merge()
    after = encoder.model.vision_model.head.state_dict()
    assert head.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in head.items())


def test_what_cannot_be_decomposed_is_said_before_anything_changes():
    encoder = clip_encoder()
    for error, message, options in (
        (ValueError, "towers='image': give one or more of image, text", {"towers": "image"}),
        (ValueError, r"parts=\('o',\)", {"parts": ("o",)}),
        (ValueError, "rank_ratio=0", {"rank_ratio": 0.0}),
        (ValueError, "leaves nothing of a layer of rank 32", {"rank_ratio": 0.1}),
        (IndexError, "image tower: layer 3 does not exist: this tower has 3 blocks", {"layers": (3,)}),
        (ValueError, "layers has 'upper'", {"layers": ("upper",)}),
        (ValueError, "leaves nothing of the 3 blocks", {"layers": ()}),
    ):
        with pytest.raises(error, match=message):
            svd_reparametrise(encoder, **options)
    block = encoder.anatomy.text.blocks[2]
    swap(block, parts_of(block).fc2, nn.Sequential())
    with pytest.raises(TypeError, match=r"fc2 of a CLIPEncoderLayer is a Sequential, not nn\.Linear"):
        svd_reparametrise(encoder)
    assert not any(isinstance(module, SvdLinear) for module in encoder.modules())
    assert all(p.requires_grad for p in encoder.parameters())
    svd_reparametrise(encoder, ("image",))
    with pytest.raises(TypeError, match="SvdLinear"):
        svd_reparametrise(encoder, ("image",))
    with pytest.raises(ValueError, match="does not hold that"):
        swap(block, nn.Linear(2, 2), nn.Linear(2, 2))


# The handle


def test_values_alone_repeat_an_adaptation(encoder):
    first = svd_reparametrise(one := encoder.clone())
    shake(first)
    second = svd_reparametrise(two := encoder.clone(), decay_towards="start")  # however they are stored
    second.load_state_dict(first.state_dict())
    assert_close(answers(two), answers(one))
    assert first.singular_values().keys() == second.delta().keys()
    for name, values in first.singular_values().items():
        assert_close(second.singular_values()[name], values)
        assert_close(second.delta()[name], values - first.layers[name].start)
    stored = first.state_dict()
    assert sum(value.numel() for name, value in stored.items() if name != "digest") == first.trainable_count()


def test_values_of_another_model_are_refused():
    handle = svd_reparametrise(clip_encoder())
    with pytest.raises(ValueError, match="other weights"):
        handle.load_state_dict(svd_reparametrise(clip_encoder(seed=1)).state_dict())
    with pytest.raises(ValueError, match=r"other layers, which differ in image\.0\.fc1"):
        handle.load_state_dict(svd_reparametrise(clip_encoder(), parts=("q",)).state_dict())
    with pytest.raises(ValueError, match="another rank"):
        handle.load_state_dict(svd_reparametrise(clip_encoder(), rank_ratio=0.5).state_dict())
    handle.merge()
    with pytest.raises(ValueError, match="no decomposed layers"):
        SvdHandle(clip_encoder())


# The step


def step(**settings):
    return ClipSvd(**({"steps": 6, "batch_size": 12, "lr": 2e-2, "crop": None} | settings))


def loss_of(encoder):
    objective = PromptClassifier(NAMES).bind(encoder)
    with torch.no_grad():
        views = objective.encode(encoder, collate(encoder, tiny_records(), objective))
    return objective.terms(views)["cross_entropy"]


@pytest.mark.parametrize("family", ["clip", "siglip"])  # the random dual encoder's pictures are nearly all the same
@pytest.mark.parametrize("crop", [None, (0.5, 1.0)])
def test_it_learns_the_classes(family, crop):
    encoder = FAMILIES[family]()
    assert loss_of(step(steps=20, crop=crop).apply(encoder, tiny_records())) < 0.8 * loss_of(encoder)


def test_only_directions_of_the_pretrained_weights_change(encoder):
    changed = step().apply(encoder, tiny_records())
    moved = 0
    for name, layer in linears(encoder).items():
        assert type(linears(changed)[name]) is nn.Linear
        old, new = layer.weight.detach().double(), linears(changed)[name].weight.detach().double()
        left, _, right = torch.linalg.svd(old, full_matrices=False)
        inner = left.T @ (new - old) @ right.T
        rest = inner - inner.diagonal().diag()
        assert rest.norm() < 1e-4
        moved += inner.diagonal().norm() > 1e-2
    assert moved >= len(linears(encoder)) - 1  # BERT's keys hardly matter to a random tower
    names = {name: value for name, value in encoder.state_dict().items() if name.endswith("bias") or "norm" in name}
    assert all(torch.equal(value, changed.state_dict()[name]) for name, value in names.items())


@pytest.mark.parametrize("options", [{}, {"decay_towards": "start"}, {"rank_ratio": 0.5, "layers": ("top",)}])
def test_unmerged_it_loads_again_and_merges(encoder, tmp_path, options):
    changed = step(merge=False, **options).apply(encoder, tiny_records())
    plain = step(**options).apply(encoder, tiny_records())
    assert_close(answers(changed), answers(plain), rtol=1e-4, atol=1e-4)
    assert "reshapes" not in plain.history[-1]
    changed.save_pretrained(tmp_path / "a")
    again = load(tmp_path / "a")
    assert torch.equal(answers(again), answers(changed))
    handle = SvdHandle(again)
    assert handle.layers.keys() == SvdHandle(changed).layers.keys()
    assert all(torch.equal(d, SvdHandle(changed).delta()[name]) for name, d in handle.delta().items())
    handle.merge()
    assert_close(answers(again), answers(plain), rtol=1e-4, atol=1e-4)


def test_decay_pulls_towards_what_was_asked_for():
    """At AdamW's first steps: s shrinks by lr * decay * (s - anchor) each, beside the same sign step."""
    encoder, decay = clip_encoder(), 50.0
    start = svd_reparametrise(encoder.clone()).singular_values()["image.0.q"]
    ends = {}
    for towards, wd in (("zero", 0.0), ("zero", decay), ("start", decay)):
        settings = {"steps": 1, "lr": 1e-3, "merge": False, "weight_decay": wd, "decay_towards": towards}
        changed = step(**settings).apply(encoder, tiny_records())
        ends[towards, wd] = SvdHandle(changed).singular_values()["image.0.q"]
    assert_close(ends["zero", decay], ends["zero", 0.0] - 1e-3 * decay * start, rtol=1e-4, atol=1e-6)
    assert_close(ends["start", decay], ends["zero", 0.0], rtol=1e-4, atol=1e-6)


def test_the_recipe_of_the_paper():
    trainer = ClipSvd(lr=5e-4)._trainer(clip_encoder(), NAMES, tensor([0, 1, 2] * 16))
    assert (trainer.steps, trainer.batch_size, trainer.betas) == (3200, 32, (0.9, 0.999))
    assert trainer.floor * trainer.lr == pytest.approx(1e-6)
    assert (trainer.schedule, trainer.warmup, trainer.grad_clip) == ("cosine", 0, None)
    assert trainer.augment.crop == (0.08, 1.0)
    few = ClipSvd()._trainer(clip_encoder(), NAMES, tensor([0, 1, 2]))
    assert (few.steps, few.batch_size) == (200, 3)


def test_settings_may_come_from_a_recipe():
    assert ClipSvd(towers=["text"], parts=["q"], layers=[0], crop=[0.5, 1]) == ClipSvd(
        towers=("text",), parts=("q",), layers=(0,), crop=(0.5, 1)
    )


def test_what_is_wrong_is_said_before_training():
    with pytest.raises(ValueError, match=r"apply\(encoder, pairs\)"):
        ClipSvd().apply(clip_encoder())
    with pytest.raises(ValueError, match="none of the classes: 'blue'"):
        ClipSvd(classes=("red", "green")).apply(clip_encoder(), tiny_records())
    with pytest.raises(ValueError, match="decay_towards must be"):
        ClipSvd(decay_towards="s0")
    with pytest.raises(ValueError, match=r"holds no \{\}"):
        ClipSvd(templates="a photo")
    with pytest.raises(ValueError, match="parts="):
        ClipSvd(parts=("mlp",))


# Interpretation


def test_the_head_that_changed_comes_first(encoder):
    after = encoder.clone()
    with torch.no_grad():
        attention = parts_of(after.anatomy.image.blocks[1])
        size = attention.v.weight.shape[0] // attention.heads
        attention.v.weight[2 * size : 3 * size] *= 1.5
        attention.out.weight[:, 2 * size : 3 * size] *= 0.5
    changes = rank_changes(encoder, after)
    assert len(changes) == 3 * 4
    first = changes[0]
    assert (first.layer, first.head) == (1, 2)
    old = parts_of(encoder.anatomy.image.blocks[1])
    for found, weight in (
        (first.v, old.v.weight[2 * size : 3 * size]),
        (first.out, old.out.weight[:, 2 * size : 3 * size]),
    ):
        assert found == pytest.approx(0.5 * float(torch.linalg.svdvals(weight.detach()).norm()), rel=1e-4)
    assert first.total == first.v + first.out
    assert all(change.total < 1e-6 for change in changes[1:])
    assert all(change.total < 1e-6 for change in rank_changes(encoder, after, "text"))


def test_chunks_are_of_the_spectrum_of_the_whole_matrix(encoder):
    after = encoder.clone()
    handle = svd_reparametrise(after, ("text",), ("v", "out"))
    size = handle.layers["text.0.v"].rank // 4
    with torch.no_grad():
        handle.layers["text.0.v"].offset[size : 2 * size] += 0.3
        handle.layers["text.2.out"].offset[-1] -= 0.1
    for merged in (False, True):
        if merged:
            handle.merge()
        first, second, *rest = rank_changes(encoder, after, "text", "chunks")
        assert (first.layer, first.head, first.v) == (0, 1, pytest.approx(0.3 * math.sqrt(size), rel=1e-3))
        assert (second.layer, second.head, second.out) == (2, 3, pytest.approx(0.1, rel=1e-3))
        assert all(change.total < 1e-4 for change in rest)


@pytest.mark.parametrize("make", [clip_encoder, dual_encoder])
def test_texts_say_what_a_head_now_writes(make):
    """A head made to write along one text's direction is described by that text."""
    encoder, texts = make(), ("red", "a cat on a mat", "the moon and a rocket", "a blue circle")
    after, tower = encoder.clone(), encoder.anatomy.image
    directions = encoder.encode_texts(list(texts))
    directions = directions - directions.mean(0)
    for wanted in (1, 2):
        back = torch.linalg.pinv(tower.projection.weight.detach()) @ directions[wanted] / tower.norm.weight.detach()
        with torch.no_grad():
            parts_of(after.anatomy.image.blocks[2]).out.weight[:, 8:16] = (
                parts_of(tower.blocks[2]).out.weight[:, 8:16] + 10 * back[:, None] / back.norm()
            )
        change = next(c for c in rank_changes(encoder, after, texts=texts) if (c.layer, c.head) == (2, 1))
        assert change.texts[0] == texts[wanted]
        assert len(change.texts) == 3


def test_views_and_texts_that_do_not_exist():
    with pytest.raises(ValueError, match="view must be 'heads' or 'chunks'"):
        rank_changes(clip_encoder(), clip_encoder(), view="layers")
    with pytest.raises(ValueError, match="leave texts out"):
        rank_changes(siglip_encoder(), siglip_encoder(), texts=("a", "b"))
