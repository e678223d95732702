import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from ecliptic.core import dense
from ecliptic.core.contracts import Features
from ecliptic.core.dense import patch_scores, picture_heatmaps, text_heatmap
from tests.towers import clip_encoder, dual_encoder, siglip_encoder

ENCODERS = {"clip": clip_encoder, "siglip": siglip_encoder, "dual": dual_encoder}


class Colours(nn.Module):
    """A tower whose patches say exactly their mean colour, 4 x 4 patches whatever the size: embeddings are (r, g, b)."""

    scale = torch.tensor(20.0)
    device = torch.device("cpu")

    def preprocess(self, images):
        arrays = [
            torch.tensor(list(i.resize((32, 32), Image.Resampling.BOX).tobytes())).view(32, 32, 3) for i in images
        ]
        return torch.stack(arrays).permute(0, 3, 1, 2) / 255

    def images(self, pixels, *, patches=False, layers=(), normalize=True):
        tokens = nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(2).transpose(1, 2)
        return Features(tokens.mean(1), tokens=3.0 * tokens if patches else None, grid=(4, 4))  # length must not matter

    def encode_texts(self, texts, batch_size=128, overflow="truncate"):
        table = {
            "red": (1.0, 0, 0),
            "green": (0, 1.0, 0),
            "blue": (0, 0, 1.0),
            "grey": (0.577350269, 0.577350269, 0.577350269),
        }
        return torch.tensor([table[t] for t in texts])


def two_colours(width, height, left="red", right="blue"):
    image = Image.new("RGB", (width, height), right)
    image.paste(Image.new("RGB", (width // 2, height), left), (0, 0))
    return image


@pytest.mark.parametrize("kind", ENCODERS)
def test_scores_are_cosines_patch_by_patch(kind):
    encoder = ENCODERS[kind]()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    text = encoder.encode_texts(["a cat", "a red ball", "the moon"])
    with torch.no_grad():
        scores = patch_scores(encoder, pixels, text)
        features = encoder.images(pixels, patches=True)
    rows, columns = features.grid
    assert scores.shape == (2, 3, rows, columns)
    for b in range(2):
        for k in range(3):
            for r in range(rows):
                for c in range(columns):
                    patch = features.tokens[b, r * columns + c]
                    expected = torch.cosine_similarity(patch, text[k], dim=0)
                    assert_close(scores[b, k, r, c], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ENCODERS)
def test_tokens_and_their_embeddings_give_the_same_map(kind):
    encoder = ENCODERS[kind]()
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    tokens = encoder.tokenize(["a cat", "the moon"])
    with torch.no_grad():
        heat = text_heatmap(encoder, pixels, tokens)
        assert heat.shape == (1, 2, 32, 32)
        assert_close(heat, text_heatmap(encoder, pixels, encoder.texts(tokens).pooled))
        assert text_heatmap(encoder, pixels, tokens, size=(10, 20)).shape == (1, 2, 10, 20)


def test_background_is_a_softmax_of_each_text_against_all_of_it():
    encoder = clip_encoder()
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    text, rest = encoder.encode_texts(["a cat", "the moon"]), encoder.encode_texts(["a mat", "coffee", "a ball"])
    with torch.no_grad():
        cosine, against = patch_scores(encoder, pixels, text), patch_scores(encoder, pixels, rest)
        got = patch_scores(encoder, pixels, text, background=rest, scale=7.0)
        for k in range(2):
            expected = (7.0 * torch.cat([cosine[:, k : k + 1], against], 1)).softmax(1)[:, 0]
            assert_close(got[:, k], expected)
        one = patch_scores(encoder, pixels, text, background=rest[:1])
        assert_close(one, torch.sigmoid(encoder.scale * (cosine - against[:, :1])))
        assert_close(
            patch_scores(encoder, pixels, text[:1], background=rest),
            patch_scores(encoder, pixels, text, background=rest)[:, :1],
        )


def test_gradients_reach_the_pixels():
    encoder = clip_encoder()
    pixels = torch.zeros(1, 3, 32, 32, requires_grad=True)
    text_heatmap(encoder, pixels, encoder.encode_texts(["a cat"])).sum().backward()
    assert pixels.grad.abs().sum() > 0


@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 40), (31, 80), (1, 9)])
def test_maps_cover_the_whole_picture_and_point_at_the_colour(width, height):
    encoder = Colours()
    maps = picture_heatmaps(encoder, two_colours(width, height), ["red", "blue"], background=())
    assert maps.shape == (2, height, width)
    if width > 1:
        left, right = maps[:, :, : width // 4].mean((1, 2)), maps[:, :, -(width // 4) :].mean((1, 2))
        assert left[0] > right[0] + 0.3
        assert right[1] > left[1] + 0.3


def test_upright_pictures_keep_their_rows():
    image = Image.new("RGB", (20, 60), "blue")
    image.paste(Image.new("RGB", (20, 30), "red"), (0, 0))
    red = picture_heatmaps(Colours(), image, ["red"], background=("grey",))[0]
    assert red[5, 10] > 0.9
    assert red[55, 10] < 0.1


def test_padding_takes_the_colour_of_the_border():
    square, corner = dense._squared(Image.new("RGB", (10, 4), (250, 240, 230)))
    assert (square.size, corner) == ((10, 10), (0, 3))
    assert square.getcolors() == [(100, (250, 240, 230))]


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"\(K, D\)"):
        patch_scores(clip_encoder(), torch.zeros(1, 3, 32, 32), torch.zeros(24))

    class Blind(Colours):
        def images(self, pixels, **options):
            return Features(torch.zeros(1, 3))

    with pytest.raises(TypeError, match="patch features"):
        patch_scores(Blind(), torch.zeros(1, 3, 32, 32), torch.zeros(1, 3))


@pytest.mark.parametrize("kind", ENCODERS)
def test_zoom_shows_the_tower_a_larger_picture(kind):
    encoder = ENCODERS[kind]()
    image = two_colours(64, 64)
    seen = []
    hook = encoder.anatomy.image.module.register_forward_pre_hook(
        lambda module, args, options: seen.append(tuple(options["pixel_values"].shape)), with_kwargs=True
    )
    maps = picture_heatmaps(encoder, image, ["a cat"], zoom=2)
    hook.remove()
    assert seen == [(1, 3, 64, 64)]  # the tower's own size is 32
    pixels = encoder.transform.zoomed(2)([image])
    head, rest = encoder.encode_texts(["a cat"]), encoder.encode_texts(list(dense.BACKGROUND))
    with torch.no_grad():
        assert_close(maps[None], text_heatmap(encoder, pixels, head, background=rest))
    assert_close(picture_heatmaps(encoder, image, ["a cat"]), picture_heatmaps(encoder, image, ["a cat"], zoom=1))
