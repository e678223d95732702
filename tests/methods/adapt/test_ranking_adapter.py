"""The ranking-aware adapter against slow loops over the concatenated patches of two pictures, its identities and its data."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import tensor
from torch.testing import assert_close

from ecliptic.data.records import Records
from ecliptic.data.shots import tiny_records
from ecliptic.eval.ranking import spearman
from ecliptic.methods.adapt.ranking_adapter import (
    InstructionBatches,
    RankAdapter,
    RankingAdapter,
    encode_patches,
    encode_words,
    pair_differences,
    presence_loss,
    quantities_of,
    rank_loss,
    regression_loss,
)
from tests.towers import FAMILIES, clip_encoder, siglip_encoder

N, P, T, DIM, WIDTH = 5, 6, 4, 12, 8


def drawn(*shape, seed=0, kind=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=kind)


def network(**settings):
    given = {"width": WIDTH, "heads": 2, "layers": 2, "text_prompts": 3, "rank_tokens": 4, **settings}
    found = RankAdapter(DIM, **given).double().eval()
    with torch.no_grad():  # biases and norms off their neutral values, or tests could not see them
        for k, parameter in enumerate(found.parameters()):
            if parameter.ndim == 1:
                parameter += 0.1 * drawn(*parameter.shape, seed=k)
    return found


# The attention, as the paper writes it


def slow_differences(net, tokens, sign=-1.0):
    """(N, N, Q, width): per head one softmax over the 2P patches of both pictures, difference, projection."""
    q = net.query_norm(net.query(net.rank_tokens))
    k = net.key_value_norm(net.key_value(tokens))
    n, size = len(tokens), WIDTH // net.heads
    found = torch.zeros(n, n, len(q), WIDTH, dtype=tokens.dtype)
    for i in range(n):
        for j in range(n):
            for head in range(net.heads):
                part = slice(head * size, (head + 1) * size)
                both = torch.cat([k[i], k[j]])[:, part]
                for r in range(len(q)):
                    a = torch.softmax(both @ q[r, part] / math.sqrt(size), 0)
                    found[i, j, r, part] = a[:P] @ k[i][:, part] + sign * (a[P:] @ k[j][:, part])
    return found @ net.out.weight.T + net.out.bias


def slow_mlp(layers, x):
    for layer in layers:
        x = layer(x)
    return x


@pytest.mark.parametrize("pair", ["difference", "sum"])
def test_pair_logits_are_the_papers(pair):
    net, tokens = network(pair=pair), drawn(N, P, WIDTH, seed=1)
    sign = {"difference": -1.0, "sum": 1.0}[pair]
    with torch.no_grad():
        slow = slow_differences(net, tokens, sign).sum(2)
        norm, head = net.pair_head
        expected = slow_mlp(head, norm(slow))[..., 0]
        assert_close(net.pairs(tokens, net.score(tokens)), expected)


def test_one_picture_pair_by_hand():
    # One token, one channel: picture 0 has patch logits ln 1, ln 3 with values 2, 4, picture 1 one patch, ln 4, value 10.
    # The joint softmax is 1/8, 3/8, 4/8: D_01 = (2 + 12) / 8 - 40 / 8 = -3.25.
    values = tensor([[[[3.5]]], [[[10.0]]]])  # (2 + 3 * 4) / 4, and 10
    evidence = tensor([[[math.log(4.0)]], [[math.log(4.0)]]])
    found = pair_differences(values, evidence)[..., 0, 0]
    assert_close(found, tensor([[0.0, -3.25], [3.25, 0.0]]))
    assert_close(pair_differences(values, evidence, sign=1.0)[..., 0, 0], tensor([[3.5, 6.75], [6.75, 10.0]]))


def test_differences_are_antisymmetric_and_vanish_on_the_diagonal():
    net, tokens = network(), drawn(N, P, WIDTH, seed=1)
    with torch.no_grad():
        values, evidence = net.attend(tokens)
        for q in range(values.shape[1]):  # for each rank token, not only for their sum
            found = pair_differences(values[:, q : q + 1], evidence[:, q : q + 1])
            assert_close(found, -found.transpose(0, 1), rtol=0, atol=1e-12)
            assert_close(found.diagonal(), torch.zeros_like(found.diagonal()), rtol=0, atol=1e-12)
        slow = slow_differences(net, tokens) - net.out.bias
        assert_close(slow, -slow.transpose(0, 1), rtol=0, atol=1e-12)
        together = pair_differences(values, evidence, sign=1.0)
        assert_close(together, together.transpose(0, 1))


def test_scores_of_any_size_are_safe():
    values, evidence = drawn(3, 1, 1, 2, kind=torch.float32), tensor([0.0, -500.0, 800.0]).reshape(3, 1, 1)
    found = pair_differences(values, evidence)
    assert found.isfinite().all()
    assert_close(found[2, 0], values[2, 0])  # all attention is with the third
    assert_close(found[1, 2], -values[2, 0])


@pytest.mark.parametrize("chunk", [1, 2, 4, 5, 9])
def test_rows_in_chunks_give_the_same(chunk):
    net, tokens = network(), drawn(N, P, WIDTH, seed=1)
    with torch.no_grad():
        assert_close(net.pairs(tokens, net.score(tokens), chunk), net.pairs(tokens, net.score(tokens)))


# The network


def slow_tokens(net, patches, words):
    """Step 2 of the method, block by block, with torch's own attention of one picture at a time."""
    said = net.read_words(words)
    prompts = torch.stack([torch.full((WIDTH,), float(number)) for number in net.text_prompts.detach()[:, 0]]).double()
    said = torch.cat([prompts, said])
    rows = []
    for picture in net.read_patches(patches):
        x = picture
        for own, cross in zip(net.own, net.cross, strict=True):
            y = own.norm1(x)
            x = x + own.attention(y, y, y)[0]
            x = x + own.mlp(own.norm2(x))
            x = x + cross.attention(cross.norm1(x), cross.norm_context(said), cross.norm_context(said))[0]
            x = x + cross.mlp(cross.norm2(x))
        x = net.project(net.norm(x))
        for layer in net.last.layers:
            x = layer.norm1(x + layer.self_attn(x, x, x)[0])
            x = layer.norm2(x + layer.linear2(torch.relu(layer.linear1(x))))
        rows.append(x)
    return torch.stack(rows)


def test_tokens_and_scores_are_the_papers():
    net, patches, words = network(), drawn(N, P, DIM), drawn(T, DIM, seed=1)
    with torch.no_grad():
        tokens = net.tokens(patches, words)
        assert_close(tokens, slow_tokens(net, patches, words))
        by_hand = torch.stack(
            [slow_mlp(net.score_head, sum(net.score_norm(x) for x in picture))[0] for picture in tokens]
        )
        assert_close(net.score(tokens), by_hand)
        score, pairs = net(patches, words)
    assert_close(score, by_hand)
    assert pairs.shape == (N, N)


def test_parts_are_of_the_papers_size():
    net = RankAdapter(64)
    assert net.rank_tokens.shape == (16, 64)
    assert net.text_prompts.shape == (32, 1)
    assert len(net.own) == len(net.cross) == 2
    assert net.heads == 8
    assert isinstance(net.read_patches, torch.nn.Identity)
    assert float(net.rank_tokens.detach().std()) == pytest.approx(64**-0.5, rel=0.1)
    assert float(RankAdapter(64, text_prompts=4000).text_prompts.detach().std()) == pytest.approx(4000**-0.5, rel=0.1)
    assert [layer.p for layer in net.last.modules() if isinstance(layer, torch.nn.Dropout)] == [0.1] * 6
    same = RankAdapter(64)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), same.parameters(), strict=True))
    assert not torch.equal(RankAdapter(64, seed=1).rank_tokens, net.rank_tokens)


def test_pictures_are_scored_by_themselves_and_pairs_follow_their_order():
    net, patches, words = network(), drawn(N, P, DIM), drawn(T, DIM, seed=1)
    order = tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        score, pairs = net(patches, words)
        turned, turned_pairs = net(patches[order], words)
        assert_close(turned, score[order])
        assert_close(turned_pairs, pairs[order][:, order])
        for i in range(N):
            assert_close(net(patches[i : i + 1], words)[0], score[i : i + 1])
        some = tensor([1, 4])
        assert_close(net(patches[some], words)[1], pairs[some][:, some])


def test_the_instruction_is_read():
    net, patches = network(), drawn(N, P, DIM)
    with torch.no_grad():
        assert not torch.allclose(net(patches, drawn(T, DIM, seed=1))[0], net(patches, drawn(T, DIM, seed=2))[0])


def test_a_pair_head_over_scores_is_their_difference():
    net, patches, words = network(pair="score"), drawn(N, P, DIM), drawn(T, DIM, seed=1)
    with torch.no_grad():
        score, pairs = net(patches, words)
    assert_close(pairs, score[:, None] - score[None])
    assert not hasattr(net, "rank_tokens")


# Losses


def test_losses_by_hand():
    # y = 2, 0, 0: of nine pairs two have target 1, two 0, five are ties
    y, zero = tensor([2.0, 0.0, 0.0]), torch.zeros(3, 3)
    for ties in ("zero", "half", "ignore"):
        assert_close(rank_loss(zero, y, ties), tensor(math.log(2.0)))
    logits = torch.full((3, 3), math.log(3.0))  # sigmoid 3/4: -log of that where the target is 1, of 1/4 where it is 0
    up, down = -math.log(0.75), -math.log(0.25)
    assert_close(rank_loss(logits, y), tensor((2 * up + 7 * down) / 9))
    assert_close(rank_loss(logits, y, "ignore"), tensor((2 * up + 2 * down) / 4))
    assert_close(rank_loss(logits, y, "half"), tensor((2 * up + 2 * down + 5 * (up + down) / 2) / 9))
    assert_close(rank_loss(logits, torch.ones(3), "ignore"), tensor(0.0))
    assert_close(regression_loss(y, y), tensor(0.0))
    # errors 0.5 and 3: 0.125 and 2.5, mean 1.3125
    assert_close(regression_loss(tensor([0.5, 3.0]), tensor([0.0, 0.0])), tensor(math.log(2.3125)))
    assert_close(presence_loss(tensor([math.log(3.0), math.log(3.0)]), tensor([5.0, 0.0])), tensor((up + down) / 2))


def test_rank_loss_is_the_loop_and_wants_the_right_order():
    y, logits = tensor([1.0, 3.0, 3.0, 0.0]), drawn(4, 4)
    slow = 0.0
    for i in range(4):
        for j in range(4):
            p = 1 / (1 + math.exp(-float(logits[i, j])))
            slow -= math.log(p if y[i] > y[j] else 1 - p) / 16
    assert_close(rank_loss(logits, y), tensor(slow, dtype=torch.float64))
    right = 4 * torch.sign(y[:, None] - y[None])
    assert rank_loss(right, y, "ignore") < rank_loss(torch.zeros(4, 4), y, "ignore") < rank_loss(-right, y, "ignore")


# Data


def values_of(columns):
    return np.array([[np.nan if v is None else v for v in row] for row in columns], dtype=float)


def test_a_batch_has_one_instruction_and_its_values():
    values = values_of([[i, None] if i < 10 else [None, 10 * i] for i in range(30)])
    draw = InstructionBatches(values, 8, [0.0, 0.0], seed=3)
    seen = set()
    for i in range(20):
        k, rows, target = draw(i)
        seen.add(k)
        assert len(rows) == len(set(rows.tolist())) == 8
        assert_close(target.double(), torch.from_numpy(values[rows, k]))
        again = InstructionBatches(values, 8, [0.0, 0.0], seed=3)(i)  # a function of (seed, number) alone
        assert (k, rows.tolist()) == (again[0], again[1].tolist())
    assert seen == {0, 1}
    assert draw(0)[1].tolist() != draw(20)[1].tolist()


def test_negatives_lack_the_instruction_and_count_as_zero():
    values = values_of([[i + 1, None] if i < 10 else [None, i] for i in range(30)])
    draw = InstructionBatches(values, 10, [0.2, 0.0])
    for i in range(20):
        k, rows, target = draw(i)
        others = np.isnan(values[rows, k])
        assert others.sum() == (2 if k == 0 else 0)
        assert (target[torch.from_numpy(others)] == 0).all()
    everywhere = InstructionBatches(values_of([[i] for i in range(30)]), 10, [0.2])
    assert not np.isnan(everywhere(0)[2].numpy()).any()  # none lacks it: all ten are its own
    assert len(set(everywhere(0)[1].tolist())) == 10


def test_balance_draws_rare_values_as_often():
    values = values_of([[0.0]] * 90 + [[1.0]] * 10)
    share = {
        b: np.mean([InstructionBatches(values, 20, [0.0], balance=b)(i)[2].numpy() for i in range(100)]) for b in (0, 1)
    }
    assert share[0] == pytest.approx(0.1, abs=0.02)
    assert share[1] == pytest.approx(0.5, abs=0.04)


def test_too_few_pictures_are_drawn_again():
    k, rows, _ = InstructionBatches(values_of([[1.0], [2.0], [3.0]]), 8, [0.0])(0)
    assert (k, len(rows)) == (0, 8)
    with pytest.raises(ValueError, match="at least two"):
        InstructionBatches(values_of([[1.0], [2.0]]), 1, [0.0])
    with pytest.raises(ValueError, match="below 1"):
        InstructionBatches(values_of([[1.0], [2.0]]), 4, [1.0])


def test_values_are_read_without_opening_pictures():
    def closed(record):
        raise AssertionError("a picture was opened")

    said = [{"quantities": {"b": 1}}, {"quantities": {"a": 2.5, "b": 2}}, {"quantities": {"a": 0}}]
    records = Records(3, lambda i: said[i], load=closed)
    names, values = quantities_of(records)
    assert names == ("a", "b")
    np.testing.assert_array_equal(values, [[np.nan, 1], [2.5, 2], [0, np.nan]])
    np.testing.assert_array_equal(quantities_of(said, ["b"])[1], [[1], [2], [np.nan]])


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no records"),
        ([{"image": 0}], "record 0 has no quantities"),
        ([{"quantities": {}}], "no record has a value"),
        ([{"quantities": {"a": 1}}, {"quantities": {"a": float("nan")}}], "record 1: the value of 'a'"),
        ([{"quantities": {"a": 1}}, {"quantities": {"a": 1}}], "no two different values"),
    ],
)
def test_wrong_records_say_what_is_wrong(records, message):
    with pytest.raises(ValueError, match=message):
        quantities_of(records)


# The whole


def lit(n, seed, start=0):
    """Squares of changing light on a dark ground, tall ones and broad ones."""
    rng = np.random.default_rng(seed)
    records = []
    for i in range(n):
        light, size = rng.uniform(40, 255), rng.integers(6, 24)
        image = Image.new("RGB", (32, 32), (10, 10, 10))
        x, y = rng.integers(0, 33 - size, 2)
        image.paste((int(light),) * 3, (int(x), int(y), int(x + size), int(y + size)))
        quantities = {"Rank the light.": light / 25, "Rank the sizes.": float(size) / 2}
        records.append({"id": str(start + i), "image": image, "quantities": quantities})
    return records


def learner(**settings):
    given = {"width": 16, "heads": 4, "layers": 1, "text_prompts": 2, "rank_tokens": 4, "batch_size": 16, "lr": 3e-3}
    return RankingAdapter(**{**given, "steps": 120, **settings})


def test_it_learns_two_orders_at_once():
    encoder = clip_encoder()
    judge = learner().fit(encoder, lit(80, 0))
    held = lit(40, 1)
    pixels = encoder.preprocess([record["image"] for record in held])
    said = judge.predict(pixels)
    assert said.classes == ("Rank the light.", "Rank the sizes.")
    for k, name in enumerate(said.classes):
        truth = [record["quantities"][name] for record in held]
        assert spearman(said.scores[:, k], truth) > 0.4  # of 40; without learning 0 +- 0.16
        assert_close(judge.score(pixels, name), said.scores[:, k])
        order = judge.rank([record["image"] for record in held], name)
        assert order == said.scores[:, k].argsort(descending=True, stable=True).tolist()
        logits = judge.compare(pixels, name)
        assert_close(judge.compare(pixels, name, chunk=7), logits, rtol=1e-4, atol=1e-5)
        wins = (logits - logits.T).sum(1)
        assert spearman(wins, truth) > 0.4


def test_patches_at_hand_serve_as_well_as_pictures():
    encoder, records = clip_encoder(), lit(20, 0)
    names, values = quantities_of(records)
    one = learner(steps=3).fit(encoder, records)
    patches = encode_patches(encoder, records, flip=True)
    two = learner(steps=3).fit_patches(encoder, patches, names, values)
    for name, weight in one.weights_.items():
        assert torch.equal(weight, two.weights_[name])
    pixels = encoder.preprocess([record["image"] for record in records])
    assert_close(two.score_patches(patches[0], names[0]), one.score(pixels, names[0]))
    assert_close(two.compare_patches(patches[0], names[0]), one.compare(pixels, names[0]))
    with pytest.raises(ValueError, match="patches must be"):
        learner().fit_patches(encoder, patches[0], names, values)


def test_a_symmetric_pair_head_orders_nothing():
    encoder, held = clip_encoder(), lit(30, 1)
    judge = learner(pair="sum", steps=40).fit(encoder, lit(60, 0))
    logits = judge.compare(encoder.preprocess([record["image"] for record in held]), "Rank the light.")
    assert_close(logits, logits.T, rtol=1e-4, atol=1e-5)


def test_the_towers_get_no_gradient_and_the_adapter_does():
    encoder = clip_encoder()
    encoder.requires_grad_(True)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    judge = learner(steps=3).fit(encoder, lit(20, 0))
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    fresh = RankAdapter(**judge.shape_).state_dict()
    moved = [name for name, value in judge.weights_.items() if not torch.equal(value, fresh[name])]
    assert {"text_prompts", "rank_tokens", "out.weight", "score_head.6.weight", "pair_head.1.9.weight"} <= set(moved)


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_each_loss_can_stand_alone(weights):
    rank, regression, presence = weights
    judge = learner(steps=2, rank_weight=rank, regression_weight=regression, presence_weight=presence, dropout=0.0)
    judge.fit(clip_encoder(), lit(20, 0))
    fresh = RankAdapter(**judge.shape_).state_dict()
    moved = {name.split(".")[0] for name, value in judge.weights_.items() if not torch.equal(value, fresh[name])}
    assert ("pair_head" in moved) == bool(rank)
    assert ("score_head" in moved) == bool(regression or presence)


def test_patches_are_those_of_the_tower_and_its_mirror():
    encoder, records = siglip_encoder(), tiny_records()
    plain, mirrored = encode_patches(encoder, records, flip=True)
    pixels = encoder.preprocess([record["image"] for record in records])
    with torch.no_grad():
        assert_close(plain, encoder.images(pixels, patches=True).tokens)
        assert_close(mirrored, encoder.images(pixels.flip(-1), patches=True).tokens)
    assert len(encode_patches(encoder, records)) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_words_come_without_padding(family):
    encoder = FAMILIES[family]()
    tokens = encoder.tokenize(["a photo of a cat"])
    rows = encode_words(encoder, "a photo of a cat")
    assert len(rows) == int(tokens.mask.sum())
    with torch.no_grad():
        assert_close(rows, encoder.texts(tokens, words=True).tokens[0, : len(rows)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "heads=3"),
        ({"pair": "product"}, "difference"),
        ({"ties": "never"}, "ties must be"),
        ({"zero_if_absent": ("Rank the cats.",)}, "Rank the cats"),
        ({"instructions": ("Rank the cats.",)}, "no two different values"),
    ],
)
def test_wrong_settings_say_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        learner(steps=1, **settings).fit(clip_encoder(), lit(20, 0))


def test_before_fit_it_says_so():
    with pytest.raises(ValueError, match="call fit"):
        RankingAdapter().predict(torch.zeros(1, 3, 32, 32))
