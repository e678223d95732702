"""Designed features: the definition in slow loops, and what they are meant not to see."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ecliptic.ops.handcrafted import colour_histogram, handcrafted, oriented


def pictures(n=2, height=26, width=30, seed=0):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_oriented(grey, bins):
    height, width = grey.shape
    found = np.zeros((bins, height - 2, width - 2))
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            dx, dy = (grey[y, x + 1] - grey[y, x - 1]) / 2, (grey[y + 1, x] - grey[y - 1, x]) / 2
            place = (math.atan2(dy, dx) % (2 * math.pi)) / (2 * math.pi) * bins
            low = math.floor(place)
            found[low % bins, y - 1, x - 1] += math.hypot(dx, dy) * (1 - (place - low))
            found[(low + 1) % bins, y - 1, x - 1] += math.hypot(dx, dy) * (place - low)
    return found


def slow_pool(rows, size):
    height, width = rows.shape
    return np.array(
        [
            [rows[y * size : (y + 1) * size, x * size : (x + 1) * size].mean() for x in range(width // size)]
            for y in range(height // size)
        ]
    )


def slow_grid(rows, grid):
    """Means over a grid whose cells start at floor(i H / g) and end at ceil((i + 1) H / g)."""
    height, width = rows.shape

    def cut(i, n):
        return slice(i * n // grid, -(-(i + 1) * n // grid))

    return [rows[cut(i, height), cut(j, width)].mean() for i in range(grid) for j in range(grid)]


def test_gradients_by_orientation_in_loops():
    grey = pictures()[:, 0]
    found = oriented(grey, 5)
    for picture, maps in zip(grey, found):
        assert_close(maps, torch.from_numpy(slow_oriented(picture.numpy(), 5)))
    dx, dy = (grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2]) / 2, (grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]) / 2
    assert_close(found.sum(1), (dx**2 + dy**2).sqrt())


def test_a_ramp_has_one_direction():
    ramp = torch.arange(8.0).expand(8, 8)
    for grey, place in ((ramp, 0), (ramp.T, 2), (-ramp, 4), (-ramp.T, 6)):  # brighter to the right, below, left, above
        maps = oriented(grey[None], 8)[0]
        assert_close(maps[place], torch.ones(6, 6))
        assert maps.sum() == maps[place].sum()


def test_colours_by_hand():
    picture = torch.zeros(1, 3, 2, 2)
    picture[0, :, 0, 0] = torch.tensor([1.0, 0.0, 0.0])  # 1.0 belongs to the last cell
    picture[0, :, 0, 1] = torch.tensor([0.0, 0.5, 0.74])
    found = colour_histogram(picture, 4)
    expected = torch.zeros(1, 64)
    expected[0, [3 * 16, 2 * 4 + 2, 0]] = torch.tensor([0.25, 0.25, 0.5])
    assert_close(found, expected)


def test_the_whole_vector_in_loops():
    bins, grids, scales, levels = 3, (1, 2), (1, 2), 2
    found = handcrafted(pictures(), bins, grids, scales, levels)
    for picture, vector in zip(pictures().numpy(), found):
        grey = 0.299 * picture[0] + 0.587 * picture[1] + 0.114 * picture[2]
        groups = []
        for scale in scales:
            first = slow_oriented(slow_pool(grey, scale), bins)
            groups += [[value for rows in first for value in slow_grid(rows, grid)] for grid in grids]
            groups.append([rows.mean() for one in first for rows in slow_oriented(slow_pool(one, 2), bins)])
            groups.append([rows.std(ddof=1) for rows in first])
        groups.append(np.sqrt(colour_histogram(torch.from_numpy(picture)[None], levels)[0].numpy()))
        expected = np.concatenate([np.asarray(group) / np.linalg.norm(group) for group in groups])
        assert_close(vector, torch.from_numpy(expected))


def test_size_and_kind_of_the_default():
    found = handcrafted(pictures(3, 64, 64).float())
    assert found.shape == (3, 784)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert handcrafted(torch.zeros(1, 3, 48, 48)).isfinite().all()  # nothing to see


def test_contrast_and_colour_do_not_count_but_in_the_histogram():
    x = pictures(2, 48, 48)
    grey = (x * torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype)[:, None, None]).sum(1, keepdim=True).expand_as(x)
    same = slice(0, 784 - 64)
    assert_close(handcrafted(0.5 * x + 0.2)[:, same], handcrafted(x)[:, same])
    assert_close(handcrafted(grey)[:, same], handcrafted(x)[:, same])
    assert (handcrafted(grey)[:, 784 - 64 :] - handcrafted(x)[:, 784 - 64 :]).abs().max() > 0.1


def test_pictures_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\), got \(2, 1, 32, 32\)"):
        handcrafted(torch.zeros(2, 1, 32, 32))
    with pytest.raises(ValueError, match="20 pixels are too small for scale 4: at least 24"):
        handcrafted(torch.zeros(1, 3, 20, 40))
