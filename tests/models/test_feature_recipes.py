"""Feature recipes against numpy, on vectors, sequences and maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.errors import NotBuilt, UsageError
from kdcache.models.feature_recipes import RECIPES, apply_recipe


def activation(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_maps() -> None:
    x = activation(2, 3, 4, 5)
    assert torch.equal(apply_recipe("raw", x), x) and torch.equal(apply_recipe("map", x), x)
    assert np.allclose(
        apply_recipe("pool", x), x.numpy().astype(np.float64).mean((2, 3)), atol=1e-6
    )
    assert np.allclose(
        apply_recipe("energy", x), (x.numpy().astype(np.float64) ** 2).mean(1), rtol=1e-6
    )


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_tokens_of_a_square_grid_are_a_map(prefix: int) -> None:
    x = activation(2, prefix + 9, 4)
    got = apply_recipe("map", x)
    assert got.shape == (2, 4, 3, 3)
    for row in range(3):
        for column in range(3):
            assert torch.equal(got[:, :, row, column], x[:, prefix + 3 * row + column])
    assert torch.allclose(apply_recipe("energy", x), got.square().mean(1))


def test_sequences() -> None:
    x = activation(3, 4, 2)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    x[0, 2:] = torch.nan  # padding may hold anything
    assert torch.equal(apply_recipe("cls", x), x[:, 0])
    assert torch.equal(apply_recipe("cls", x, mask), torch.stack([x[0, 0], x[1, 2], x[2, 0]]))
    assert torch.equal(apply_recipe("last", x, mask), torch.stack([x[0, 1], x[1, 3], x[2, 3]]))
    assert torch.equal(apply_recipe("last", x[1:]), x[1:, 3])
    want = torch.stack([x[0, :2].mean(0), x[1, 2:].mean(0), x[2].mean(0)])
    torch.testing.assert_close(apply_recipe("pool", x, mask), want)
    torch.testing.assert_close(apply_recipe("pool", x[1:]), x[1:].mean(1))
    assert torch.equal(apply_recipe("pool", x[:, 0]), x[:, 0])
    assert apply_recipe("pool", x[1:2], torch.zeros(1, 4)).tolist() == [[0.0, 0.0]]


def test_means_of_half_precision_are_float32() -> None:
    x = activation(2, 64, 3, dtype=torch.bfloat16)
    for recipe in ("pool", "energy"):
        got = apply_recipe(recipe, x)
        assert got.dtype == torch.float32
        torch.testing.assert_close(
            got.double(), apply_recipe(recipe, x.double()), rtol=1e-5, atol=1e-6
        )
    assert apply_recipe("cls", x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("recipe", "shape", "message"),
    [
        ("map", (2, 3), "expected \\(B, C, H, W\\) or \\(B, L, F\\)"),
        ("map", (2, 15, 4), "3 x 3 after 6"),
        ("map", (2, 0, 4), "0 tokens"),
        ("energy", (2, 3), "recipe 'map'"),
        ("pool", (2, 3, 4, 5, 6), "recipe 'pool'"),
        ("cls", (2, 3), "expected \\(B, L, F\\)"),
        ("last", (2, 3, 4, 5), "expected \\(B, L, F\\)"),
        ("polo", (2, 3), "did you mean 'pool'"),
    ],
)
def test_refusals(recipe: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        apply_recipe(recipe, torch.zeros(shape))


def test_masks_of_another_shape_and_later_recipes() -> None:
    for recipe in ("pool", "last"):
        with pytest.raises(UsageError, match="has a mask \\[2, 5\\]; expected \\[2, 4\\]"):
            apply_recipe(recipe, torch.zeros(2, 4, 3), torch.ones(2, 5))
    with pytest.raises(NotBuilt, match="'gram' is not built yet"):
        apply_recipe("gram", torch.zeros(2, 3, 4, 4))
    assert set(RECIPES) == {"raw", "map", "pool", "cls", "last", "energy"}
