"""What the teacher-side kernel keeps of a row: ids and values bit for bit, sums against float64, in
the interpreter.

With `-m gpu` the same tests run on the device. `tests/kernels/test_topk_aot.py` reads the compiled
code.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_world import allowed
from torch import Tensor

from kdcache.kernels import topk_lse as module
from kdcache.kernels.topk_lse import (
    BAD_LABEL,
    EMPTY,
    INFINITE,
    NOT_A_NUMBER,
    TopK,
    tier_tails,
    topk_lse,
)
from kdcache.loss import topk

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TEMPERATURES = (1.0, 2.0)
ULP = torch.finfo(FP32).eps


def rows_of(
    rows: int, classes: int, dtype: torch.dtype = FP32, kind: str = "normal", seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, classes, generator=generator) * 4
    if kind == "ties":
        x = x.round()
    elif kind == "equal":
        x = torch.full_like(x, -2.5)
    elif kind == "crowded":  # the greatest in one block of ids: few lanes hold them all
        x[:, classes // 3 : classes // 3 + classes // 8] += 60
    # and at a distance that is a multiple of any number of lanes
    elif kind == "one lane":
        x[:, 5::4096] += 60
    elif kind == "far":  # a tail of 1e-90 of the mass
        x = torch.where(torch.arange(classes) % 9 == 4, x, x - 220)
    elif kind == "minus_inf":
        x[:, ::3] = -torch.inf
        x[0, 3:] = -torch.inf
    elif kind == "zeros":  # -0.0 and 0.0 among negatives
        x = torch.where(x > 1, torch.where(torch.arange(classes) % 2 == 0, -0.0, 0.0), -x.abs() - 1)
    elif kind == "offset":
        x += 1000
    # more than CAP elements in 10 of 128 lanes, whose other pieces weigh as well
    elif kind == "few lanes":
        ids = torch.arange(classes)
        x = ((ids % 1024 < 80) & (ids < 2048)).float().repeat(rows, 1)
    elif kind == "one each":  # one of them in each lane of 8 columns: all lanes are tied
        x = (torch.arange(classes) % 8 == 0).float().repeat(rows, 1)
    elif kind == "subnormal":
        x *= 1e-40
    # k = 8; the rest -inf, told apart by id alone
    elif kind in ("k - 1 finite", "k finite", "k + 1 finite"):
        x[
            :,
            torch.randperm(classes, generator=generator)[
                8 + ["k -", "k f", "k +"].index(kind[:3]) - 1 :
            ],
        ] = -torch.inf
    return x.to(dtype)


def laid_out(x: Tensor, layout: str, device: str) -> tuple[Tensor, Tensor]:
    """(buffer, the logits within it): everything around them NaN."""
    rows, classes = x.shape
    stride, offset = {
        "plain": (classes, 64),
        "strided": (classes + 13, 64),
        "odd": (classes, 3),
        "padded": ((classes + 15) // 8 * 8, 64),
    }[layout]
    buffer = torch.full((offset + rows * stride + 64,), torch.nan, dtype=x.dtype, device=device)
    view = buffer.as_strided((rows, classes), (stride, 1), offset)
    view.copy_(x)
    return buffer, view


def labels_for(x: Tensor, many: int) -> Tensor | None:
    """In the head, out of it, unknown, and twice the same, over the rows."""
    if not many:
        return None
    order = x.float().argsort(dim=-1, descending=True)
    pairs = [
        (order[n, 0], order[n, -1])
        if n % 3 == 0
        else (order[n, -1], order[n, -1])
        if n % 3 == 1
        else (-1, order[n, x.shape[1] // 2])
        for n in range(len(x))
    ]
    return torch.tensor(pairs, dtype=torch.int64).reshape(len(x), 2)[:, -many:]


def tails_of(x: Tensor, out: Tensor, max_N: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Tail lse in the dtype of x, plain torch: `out` [N, V] says what the tail leaves out."""
    rest = (x - max_N[:, None]).masked_fill(out, -torch.inf)
    return torch.stack([torch.logsumexp(rest / t, -1) for t in temperatures], 1)


def worst(found: Tensor, truth: Tensor) -> float:
    """Largest difference in units of the greater of 1 and the number; infinities must be the same."""
    assert torch.equal(found.isinf(), truth.isinf()) and not bool(found.isnan().any())
    return float(
        (
            torch.where(truth.isinf(), 0, found.double() - truth).abs()
            / truth.abs().clamp(1, 1e300)
        ).max()
    )


def check(
    x: Tensor,
    k: int,
    device: str,
    layout: str = "plain",
    many: int = 1,
    moments: bool = False,
    temperatures: Sequence[float] = TEMPERATURES,
) -> TopK:
    buffer, view = laid_out(x, layout, device)
    before, labels = buffer.clone(), labels_for(x, many)
    found = topk_lse(view, k, temperatures, None if labels is None else labels.to(device), moments)
    assert torch.equal(buffer.view(torch.uint8), before.view(torch.uint8))
    found = TopK(
        *(
            getattr(found, name) if getattr(found, name) is None else getattr(found, name).cpu()
            for name in TopK.__dataclass_fields__
        )
    )
    wide = x.double()
    assert found.flag_N.tolist() == [0] * len(x)
    ids = np.stack([np.lexsort((np.arange(len(row)), -row))[:k] for row in wide.numpy()])
    assert np.array_equal(found.ids_NK.numpy(), ids)
    exact_ids, exact_values = topk.exact_topk(x, k)
    assert torch.equal(found.ids_NK, exact_ids)
    assert torch.equal(found.values_NK.view(torch.int32), exact_values.view(torch.int32))
    out = torch.zeros(x.shape, dtype=torch.bool).scatter_(1, exact_ids, True)
    if labels is not None:
        for n, row in enumerate(labels.tolist()):
            out[n, [y for y in row if y >= 0]] = True
        expected = torch.where(labels < 0, -torch.inf, x.float().gather(1, labels.clamp(min=0)))
        assert found.label_logit_NJ is not None and torch.equal(found.label_logit_NJ, expected)
    truth = tails_of(wide, out, wide.amax(-1), temperatures)
    plain = tails_of(x.float(), out, x.float().amax(-1), temperatures)
    # few rows can be lucky: an ulp
    assert worst(found.tail_lse_NT, truth) <= allowed(max(worst(plain, truth), ULP), ULP)
    if moments:
        check_moments(found, x)
    return found


def check_moments(found: TopK, x: Tensor) -> None:
    """Against float64. A lane adds V / L logits one by one, here at most 16, and 9 halvings join
    512 lanes.
    """
    assert found.mean_N is not None and found.std_N is not None
    for mean, std, row in zip(found.mean_N.double(), found.std_N.double(), x.double(), strict=True):
        true_mean, true_std = row[row.isfinite()].mean(), row[row.isfinite()].std(correction=0)
        allowed = 32 * ULP * (true_mean.abs() + true_std)
        assert bool((mean - true_mean).abs() <= allowed) and bool((std - true_std).abs() <= allowed)


SHAPES = [
    (7, 7, FP16, "odd"),
    (123, 8, FP32, "strided"),
    (123, 123, BF16, "odd"),
    (1272, 100, FP16, "padded"),
]
KINDS = ["normal", "ties", "equal", "crowded", "one lane", "far", "minus_inf", "zeros", "offset"]


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(kind, SHAPES[(n + 2 * m) % 4]) for n, kind in enumerate(KINDS) for m in range(2)],
)
def test_a_row_is_kept_exactly(
    kind: str, shape: tuple[int, int, torch.dtype, str], device: str
) -> None:
    classes, k, dtype, layout = shape
    check(
        rows_of(2 if classes < 200 else 1, classes, dtype, kind),
        k,
        device,
        layout,
        many=2,
        moments=True,
    )


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("k - 1 finite", BF16),
        ("k finite", FP32),
        ("k + 1 finite", FP16),
        ("subnormal", FP32),
        ("subnormal", FP16),
    ],
)
def test_few_finite_and_tiny_logits(kind: str, dtype: torch.dtype, device: str) -> None:
    """-inf follow by id; what is smaller than any normal number is still told apart."""
    check(rows_of(1, 123, dtype, kind), 8, device, "odd", many=1, moments=True)


@pytest.mark.parametrize(
    ("classes", "k", "dtype", "many", "kind"),
    [
        (1, 1, FP32, 1, "normal"),
        (123, 1, BF16, 0, "normal"),
        (257, 256, BF16, 1, "ties"),
        (257, 256, FP32, 0, "equal"),
        (5000, 8, BF16, 1, "few lanes"),
        (1000, 8, BF16, 0, "one each"),
        (1272, 8, FP32, 1, "equal"),
        (1271, 256, BF16, 0, "normal"),
        (32_000, 64, BF16, 2, "ties"),
        (32_000, 64, BF16, 1, "minus_inf"),
        (32_001, 100, BF16, 1, "normal"),
        (50_257, 128, FP16, 1, "normal"),
        (128_256, 64, BF16, 1, "normal"),
        (280_001, 256, BF16, 1, "normal"),
    ],
)  # the last looks again in more than 32 steps
def test_other_sizes(
    classes: int, k: int, dtype: torch.dtype, many: int, kind: str, device: str
) -> None:
    check(rows_of(1, classes, dtype, kind), k, device, many=many)


@pytest.mark.parametrize(("dtype", "layout"), [(FP32, "plain"), (BF16, "odd")])
def test_moments_of_what_float32_cannot_square(
    dtype: torch.dtype, layout: str, device: str
) -> None:
    """Logits up to the greatest float, masks of the least, one far out among ordinary ones,
    differences of 1e-30.
    """
    most, x = torch.finfo(dtype).max, rows_of(8, 1271, FP32)
    x[0] = torch.where(x[0] > 0, most, -most)
    x[1] = most
    x[2, 40:] = torch.finfo(dtype).min
    x[3, 0] = 1e10
    x[4] *= 1e-30
    x[5, 700] = -torch.inf
    x[6] *= 1e20
    x[7, 9] = -1e30
    _, view = laid_out(x.to(dtype), layout, device)
    found = topk_lse(view, 4, (1.0,), moments=True)
    assert found.mean_N is not None and found.std_N is not None
    check_moments(replace(found, mean_N=found.mean_N.cpu(), std_N=found.std_N.cpu()), x.to(dtype))


@pytest.mark.parametrize("temperatures", [(1.0,), (1.37, 1.0), (4.0, 3.0, 2.0, 1.0, 0.5, 7.0)])
def test_temperatures_in_any_number_and_order(temperatures: tuple[float, ...], device: str) -> None:
    check(rows_of(1, 1271, BF16), 8, device, temperatures=temperatures)


@pytest.mark.parametrize("seed", range(4))
def test_few_values_and_random_sizes(seed: int, device: str) -> None:
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(1, 3000))
    x = torch.from_numpy(rng.choice([0.0, -0.0, 1.0, -1.0, 2.5, -np.inf, 1.0078125], (1, classes)))
    x[:, -1] = 1.0
    layout = str(rng.choice(["plain", "strided", "odd", "padded"]))
    check(
        x.to([BF16, FP16, FP32][seed % 3]),
        int(rng.integers(1, min(classes, 256) + 1)),
        device,
        layout,
        seed % 3,
    )


def test_finite_masks_are_logits_too(device: str) -> None:
    x = rows_of(1, 1271, BF16)
    x[:, 5:] = torch.finfo(BF16).min
    found = check(x, 8, device, many=0)
    assert bool((found.tail_lse_NT < -1e37).all())


@pytest.mark.parametrize(
    ("kind", "many"), [("normal", 0), ("ties", 1), ("far", 2), ("minus_inf", 2)]
)
def test_tails_of_smaller_tiers(kind: str, many: int, device: str) -> None:
    """Against float64 over all classes; labels are in the first tier, between the tiers, beyond
    them, and unknown.
    """
    x, tiers, temperatures = rows_of(4, 300, BF16, kind), (12, 1, 6, 16), (1.0, 4.0)
    ids_NK = topk.exact_topk(x, 16)[0]
    labels = torch.stack(
        [ids_NK[[0, 1, 2, 3], [0, 9, 15, 4]], torch.tensor([-1, 299, -1, int(ids_NK[3, 12])])], 1
    )
    labels_NJ = labels[:, :many] if many else None
    found = topk_lse(
        x.to(device), 16, temperatures, None if labels_NJ is None else labels_NJ.to(device)
    )
    tails = tier_tails(
        found, tiers, temperatures, None if labels_NJ is None else labels_NJ.to(device)
    ).cpu()
    assert (
        tails.shape == (4, 4, 2)
        and tails.dtype == FP32
        and torch.equal(tails[:, 3], found.tail_lse_NT.cpu())
    )
    for at, tier in enumerate(tiers):
        excluded = (
            ids_NK[:, :tier] if labels_NJ is None else torch.cat([ids_NK[:, :tier], labels_NJ], 1)
        )
        out = torch.zeros(4, 301, dtype=torch.bool).scatter_(
            1, excluded.where(excluded >= 0, 300), True
        )[:, :300]
        truth = tails_of(x.double(), out, x.double().amax(-1), temperatures)
        plain = topk.tail_lse(x, excluded, x.float().amax(-1), temperatures)
        assert worst(tails[:, at], truth) <= allowed(max(worst(plain, truth), ULP), ULP)
    for n in range(4):
        row = TopK(
            *(
                getattr(found, name)[n : n + 1]
                for name in ("ids_NK", "values_NK", "tail_lse_NT", "flag_N")
            )
        )
        alone = tier_tails(
            row, tiers, temperatures, None if labels_NJ is None else labels_NJ[n : n + 1].to(device)
        )
        assert torch.equal(alone.cpu(), tails[n : n + 1])


def test_tails_of_smaller_tiers_of_bad_rows(device: str) -> None:
    x = rows_of(3, 50)
    x[0, 3], x[1] = torch.nan, -torch.inf
    found = topk_lse(x.to(device), 8, (1.0,), torch.tensor([-1, 2, 50], device=device))
    tails = tier_tails(found, (2, 8), (1.0,), torch.tensor([-1, 2, 50], device=device))
    assert tails.isnan().all(-1).all(-1).tolist() == [True, True, False] and bool(
        tails[2].isfinite().all()
    )
    for tiers, temperatures, labels, message in (
        ((9,), (1.0,), None, "1 to 8"),
        ((), (1.0,), None, "at least one"),
        ((0,), (1.0,), None, "tiers"),
        ((2,), (1.0, 2.0), None, "expected the 1 that"),
        ((2,), (1.0,), torch.zeros(1, 2), "labels are"),
    ):
        with pytest.raises(ValueError, match=message):
            tier_tails(found, tiers, temperatures, labels)


def test_no_rows(device: str) -> None:
    found = topk_lse(torch.zeros(0, 50, device=device), 8, (1.0, 2.0), moments=True)
    assert tier_tails(found, (2, 8), (1.0, 2.0), torch.zeros(0)).shape == (0, 2, 2)
    assert (
        found.ids_NK.shape == (0, 8)
        and found.tail_lse_NT.shape == (0, 2)
        and found.flag_N.shape == (0,)
    )


@pytest.mark.parametrize(
    ("classes", "dtype", "layout"), [(123, BF16, "odd"), (1272, FP32, "plain")]
)
def test_bad_rows_are_flagged_and_spoil_no_other(
    classes: int, dtype: torch.dtype, layout: str, device: str
) -> None:
    x = rows_of(7, classes, dtype)
    x[1, classes - 1] = torch.nan
    x[2, classes // 2] = torch.inf
    x[3, 0], x[3, classes - 2] = torch.inf, torch.nan
    x[4] = -torch.inf
    x[6, 0] = -torch.nan
    labels = torch.tensor([3, 3, 3, 3, 3, classes, -1], device=device)
    found = topk_lse(laid_out(x, layout, device)[1], 8, (1.0, 2.0), labels, moments=True)
    assert found.flag_N.tolist() == [
        0,
        NOT_A_NUMBER,
        INFINITE,
        NOT_A_NUMBER,
        EMPTY,
        BAD_LABEL,
        NOT_A_NUMBER,
    ]
    for n in (1, 2, 3, 4, 6):
        assert found.ids_NK[n].tolist() == [-1] * 8
        for values in (
            found.values_NK,
            found.tail_lse_NT,
            found.label_logit_NJ,
            found.mean_N,
        ):
            assert values is not None and bool(values[n].isnan().all())
    # where a row starts within 16 bytes decides what is summed with what
    if layout == "plain":
        alone = topk_lse(
            x[[0, 5]].to(device), 8, (1.0, 2.0), torch.tensor([3, -1], device=device), moments=True
        )
        for name in ("ids_NK", "values_NK", "tail_lse_NT", "label_logit_NJ"):
            assert torch.equal(getattr(found, name)[[0, 5]], getattr(alone, name))


def test_the_same_bits_every_time(device: str) -> None:
    x = rows_of(2, 300, BF16, "ties").to(device)
    first, second = (topk_lse(x, 16, (1.0, 2.0), moments=True) for _ in range(2))
    for name in ("ids_NK", "values_NK", "tail_lse_NT", "mean_N", "std_N"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 51}, "k is 51"),
        ({"temperatures": ()}, "at least one"),
        ({"temperatures": (0.0,)}, "temperatures"),
        ({"labels": torch.zeros(2, dtype=torch.long)}, "labels are"),
        ({"labels": torch.zeros(3)}, "labels are"),
        ({"labels": torch.zeros(3, 9, dtype=torch.long)}, "labels are"),
        ({"logits": torch.zeros(50)}, "logits are"),
        ({"logits": torch.zeros(3, 50).double()}, "float64"),
        ({"logits": torch.zeros(3, 50, device="meta")}, "CUDA device"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topk_lse(**{"logits": torch.zeros(3, 50), "k": 8, "temperatures": (1.0,), **changed})


@pytest.mark.parametrize(
    "temperatures", [(1.0, 2.0, 4.0, 0.5), (1.0,), (1.5, 1.0), (0.5, 2.0, 1.0)]
)
def test_each_temperature_is_a_power_of_its_base(temperatures: tuple[float, ...]) -> None:
    powers, groups, bases = module.plan(temperatures)
    for t, power, group in zip(temperatures, powers, groups, strict=True):
        assert power * bases[group] == pytest.approx(np.log2(np.e) / t) and power <= 4
    assert len(bases) == {(1.0, 2.0, 4.0, 0.5): 2, (1.5, 1.0): 2}.get(temperatures, 1)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_second_round_always_has_room(dtype: torch.dtype) -> None:
    """What ends the search for a bound: more than k elements may reach it, beside edges, labels and
    one more piece.
    """
    for classes, k, labels in itertools.product(
        (300, 5000, 32_001, 50_257, 400_000), range(1, 257), (0, 8)
    ):
        constants, warps, registers = module.build(classes, dtype, k, (1.0,), labels, False, False)
        edges = 2 * constants["VEC"] // constants["B"]
        assert k < constants["CAP"] - edges - labels - 1 and k <= constants["CAP"] // 4 * 3
        assert constants["L"] >= 2 * k and warps * 32 * registers <= 32_768
        assert constants["L"] * constants["B"] == warps * 32 * constants["VEC"]
