"""What is wrong with few-shot tensors is named before anything is learnt."""

import math

import pytest
import torch
from torch import tensor
from torch.nn.functional import normalize

from ecliptic.data.shot_tensors import check_shots, check_unit_rows


def rows(*shape, seed=0):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def shots(**change):
    return {"features": rows(6, 5), "labels": torch.arange(6) % 3, "text": rows(3, 5, seed=1)} | change


def test_what_fits_gives_the_names():
    assert check_shots(**shots()) == ("0", "1", "2")
    more = {"views": rows(2, 6, 5), "validation": (rows(4, 5), tensor([0, 0, 1, 1])), "classes": ["a", "b", "c"]}
    assert check_shots(**shots(**more)) == ("a", "b", "c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.arange(6) % 2}, "no pictures of '2'"),
        ({"labels": torch.arange(5) % 3}, r"labels must be \(6,\) integers"),
        ({"text": rows(3, 4)}, r"text must be \(3, 5\), got \(3, 4\)"),
        ({"classes": ("a", "b")}, r"text must be \(2, 5\)"),
        ({"features": 2 * rows(6, 5)}, "features must be unit rows"),
        ({"features": rows(6, 5).index_fill(0, tensor([4]), math.nan)}, "row 4 are not finite"),
        ({"views": rows(2, 5, 5)}, r"views must be \(V, 6, 5\) with V > 0, got \(2, 5, 5\)"),
        ({"views": rows(0, 6, 5)}, "with V > 0"),
        ({"views": 3 * rows(2, 6, 5)}, "views must be unit rows"),
        ({"validation": (rows(4, 4), tensor([0, 1, 2, 0]))}, r"validation features must be \(B, 5\), got \(4, 4\)"),
        ({"validation": (rows(4, 5), tensor([0, 1, 3, 0]))}, "labels must lie in 0..2"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        check_shots(**shots(**change))


def test_unit_rows():
    check_unit_rows("captions", rows(2, 3), (2, 3))
    with pytest.raises(ValueError, match=r"captions must be \(2, 4\), got \(2, 3\)"):
        check_unit_rows("captions", rows(2, 3), (2, 4))
    with pytest.raises(ValueError, match="captions must be unit rows"):
        check_unit_rows("captions", 0 * rows(2, 3), (2, 3))
    with pytest.raises(ValueError, match="captions holds numbers that are not finite"):
        check_unit_rows("captions", rows(2, 3) / 0, (2, 3))
