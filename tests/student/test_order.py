"""Order kd1 against docs/order.md: a second implementation in plain integers, golden vectors, laws."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.errors import UsageError
from kdcache.student.order import Order

SPEC = Path(__file__).parents[2] / "docs" / "order.md"
WORD = 2**64 - 1


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def plain_sample(n: int, seed: int, position: int) -> int:
    """docs/order.md, line by line, in Python integers."""
    epoch, x = divmod(position, n)
    g = 0x9E3779B97F4A7C15
    state = mix(mix((seed + g) & WORD) ^ epoch)
    h = next(h for h in range(1, 64) if 1 << (2 * h) >= n)
    while True:
        left, right = x >> h, x & ((1 << h) - 1)
        for r in range(12):
            left, right = (
                right,
                left ^ (mix(mix((state + (r + 1) * g) & WORD) ^ right) & ((1 << h) - 1)),
            )
        x = (left << h) | right
        if x < n:
            return x


def golden() -> list[tuple[int, int, int, list[int]]]:
    rows = re.findall(
        r"^\| (\d+) \| (\d+) \| (\d+) to \d+ \| ([\d ]+) \|$", SPEC.read_text(), re.MULTILINE
    )
    return [
        (int(n), int(seed), int(first), [int(s) for s in samples.split()])
        for n, seed, first, samples in rows
    ]


def test_golden_vectors() -> None:
    assert len(golden()) == 7
    for n, seed, first, samples in golden():
        positions = np.arange(first, first + len(samples))
        assert Order(n, seed).sample(positions)[1].tolist() == samples
        assert [plain_sample(n, seed, int(p)) for p in positions] == samples


@settings(max_examples=150, deadline=None)
@given(
    n=st.one_of(st.integers(1, 2000), st.integers(2**20, 2**48)),
    seed=st.integers(0, WORD),
    data=st.data(),
)
def test_equals_the_plain_implementation(n: int, seed: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, min(40 * n, 2**62 - 1)), min_size=1, max_size=8))
    epochs, samples = Order(n, seed).sample(np.array(positions))
    assert epochs.tolist() == [p // n for p in positions]
    assert samples.tolist() == [plain_sample(n, seed, p) for p in positions]


def test_every_epoch_is_a_permutation_for_every_n_to_2000() -> None:
    for n in range(1, 2001):
        _, samples = Order(n, seed=n).sample(np.arange(n, 2 * n))
        assert np.array_equal(np.sort(samples), np.arange(n)), n


@pytest.mark.parametrize("n", [2**20 + 1, 2**40, 2**40 - 12345])
def test_large_orders_stay_inside_and_never_repeat(n: int) -> None:
    positions = np.concatenate([np.arange(50_000), np.arange(n - 50_000, n)])
    _, samples = Order(n, seed=3).sample(positions)
    assert len(np.unique(samples)) == len(positions)
    assert 0 <= int(samples.min()) and int(samples.max()) < n
    # A mean of 10^5 uniform draws is normal with sigma n / sqrt(12 * 10^5); 6 sigma.
    assert abs(float(samples.mean()) - n / 2) < 6 * n / np.sqrt(12e5)


@pytest.mark.parametrize("n", [5, 12, 16, 17, 100])
def test_places_and_pairs_of_places_are_uniform(n: int) -> None:
    epochs = 20_000
    samples = Order(n, seed=11).sample(np.arange(n * epochs))[1].reshape(epochs, n)
    for a, b in ((0, 1), (0, n - 1), (n // 2, n - 1)):
        pairs = np.zeros((n, n))
        np.add.at(pairs, (samples[:, a], samples[:, b]), 1)
        assert not np.diagonal(pairs).any()
        expected = epochs / (n * (n - 1))
        chi2 = float(((pairs - expected) ** 2 / expected)[~np.eye(n, dtype=bool)].sum())
        # Mean d, variance 2 d for d = n (n - 1) - 1 degrees of freedom: 5 sigma above, for a fixed
        # seed.
        d = n * (n - 1) - 1
        assert chi2 < d + 5 * np.sqrt(2 * d)


def test_seed_and_epoch_change_the_order() -> None:
    a = Order(1000, 1).sample(np.arange(2000))[1]
    b = Order(1000, 2).sample(np.arange(1000))[1]
    # A random permutation has 1 fixed point on average, Poisson: more than 12 has probability below
    # 1e-9.
    assert (
        (a[:1000] == b).sum() <= 12
        and (a[:1000] == a[1000:]).sum() <= 12
        and (b == np.arange(1000)).sum() <= 12
    )


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 50), size=st.integers(1, 130), epochs=st.integers(1, 4), shuffle=st.booleans()
)
def test_batches_join_to_whole_epochs(n: int, size: int, epochs: int, shuffle: bool) -> None:
    order = Order(n, 9, shuffle=shuffle)
    batches = list(order.batches(0, n * epochs, size))
    assert len(batches) == -(-n * epochs // size)
    assert all(len(samples) == size for _, samples in batches[:-1]) and len(batches[-1][1]) >= 1
    samples = np.concatenate([s for _, s in batches]).reshape(epochs, n)
    assert (
        np.concatenate([e for e, _ in batches]).tolist() == np.repeat(np.arange(epochs), n).tolist()
    )
    assert np.array_equal(np.sort(samples, axis=1), np.tile(np.arange(n), (epochs, 1)))
    if not shuffle:
        assert np.array_equal(samples[0], np.arange(n))
    assert not list(order.batches(n * epochs, n * epochs, size))


@settings(max_examples=50, deadline=None)
@given(start=st.integers(0, 40), size=st.integers(1, 9), base=st.integers(0, 60))
def test_batches_end_at_multiples_wherever_they_begin(start: int, size: int, base: int) -> None:
    """Whatever is asked of the order at once, which is a block of them."""
    order = Order(17, 3)
    batches = list(order.batches(start, 50, size, base))
    ends = start + np.cumsum([len(samples) for _, samples in batches])
    assert all(end % size == 0 for end in ends[:-1]) and ends[-1] == 50
    assert all(1 <= len(samples) <= size for _, samples in batches)
    expected = order.sample(np.arange(base + start, base + 50))
    for found, right in zip(zip(*batches, strict=True), expected, strict=True):
        assert np.array_equal(np.concatenate(found), right)


def test_shape_is_kept() -> None:
    positions = np.arange(24).reshape(2, 3, 4)
    epochs, samples = Order(7, 0).sample(positions)
    assert epochs.shape == samples.shape == (2, 3, 4) and samples.dtype == np.int64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Order(0), "1 to 2\\^48"),
        (lambda: Order(2**48 + 1), "1 to 2\\^48"),
        (lambda: Order(5, -1), "seed is -1"),
        (lambda: Order(5, 2**64), "seed is"),
        (lambda: Order(5).sample(np.array([3, -1])), "positions -1 to 3"),
    ],
)
def test_refusals(call: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()  # type: ignore[operator]
