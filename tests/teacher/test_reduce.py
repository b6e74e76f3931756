"""What is kept of a row of logits, against float64 and against brute force."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdcache.cache.spec import CacheSpec
from kdcache.errors import DataError
from kdcache.teacher.reduce import reduce_rows

MINUS_INFINITY = -float("inf")


def spec_of(classes: int, **changes: object) -> CacheSpec:
    fields: dict[str, object] = {
        "kind": "topk",
        "num_classes": classes,
        "samples": (0, 64),
        "records_per_shard": 64,
        "tiers": (3, 8),
        "temperatures": ("1", "2.5"),
        "labels": 1,
        "moments": True,
        "values": "float32",
    }
    return CacheSpec(**{**fields, **changes})  # type: ignore[arg-type]


def normal(rows: int, classes: int, scale: float = 4.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


def oracle_order(logits_NV: torch.Tensor, k: int) -> np.ndarray:
    """Ids by (logit descending, id ascending) of the float32 upcast, by a plain sort of each row."""
    rows = logits_NV.float().numpy()
    return np.array([sorted(range(len(row)), key=lambda i: (-row[i], i))[:k] for row in rows])


def oracle_tail(row: np.ndarray, excluded: set[int], temperature: float) -> float:
    """log sum exp((z - max) / T) over the ids not excluded, in float64."""
    rest = [(row[i] - row.max()) / temperature for i in range(len(row)) if i not in excluded]
    return float(np.logaddexp.reduce(rest)) if rest else MINUS_INFINITY


def check_against_oracle(
    logits_NV: torch.Tensor, labels_NJ: torch.Tensor | None, spec: CacheSpec
) -> None:
    kept = reduce_rows(logits_NV, labels_NJ, spec)
    assert kept.ids is not None and kept.tail_lse is not None
    ids = oracle_order(logits_NV[:, : spec.num_classes], spec.k)
    wide = logits_NV[:, : spec.num_classes].float().numpy()
    np.testing.assert_array_equal(kept.ids.numpy(), ids)
    np.testing.assert_array_equal(kept.logits.numpy(), np.take_along_axis(wide, ids, 1))
    for n, row in enumerate(wide.astype(np.float64)):
        labels = set() if labels_NJ is None else {int(x) for x in labels_NJ[n] if x >= 0}
        for tier, k in enumerate(spec.tiers):
            for t, temperature in enumerate(spec.temperatures):
                expected = oracle_tail(row, {*ids[n, :k].tolist(), *labels}, float(temperature))
                # A float32 sum of V terms by a tree: a few units in the last place of its log.
                assert kept.tail_lse[n, tier, t].item() == pytest.approx(
                    expected, rel=2e-6, abs=2e-6
                )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_and_tails_are_those_of_float64_also_with_ties(dtype: torch.dtype) -> None:
    # bfloat16 keeps 8 bits: about a third of these rows have ties
    logits_NV = normal(40, 50).to(dtype)
    # from unknown over all classes: inside and outside heads
    labels_NJ = torch.arange(40)[:, None] % 51 - 1
    if dtype == torch.bfloat16:
        assert any(len(set(row.tolist())) < 50 for row in logits_NV)
    check_against_oracle(logits_NV, labels_NJ, spec_of(50))


def test_a_row_of_equal_logits_keeps_the_lowest_ids() -> None:
    kept = reduce_rows(torch.ones(2, 50, dtype=torch.bfloat16), None, spec_of(50, labels=0))
    assert kept.ids is not None and kept.tail_lse is not None
    assert kept.ids.tolist() == [list(range(8))] * 2
    assert kept.tail_lse[0, 0, 0].item() == pytest.approx(np.log(47), rel=1e-6)


def test_two_labels_leave_the_tail_once_and_keep_their_logits() -> None:
    logits_NV = normal(6, 50)
    labels_NJ = torch.tensor([[1, 2], [3, 3], [-1, 4], [5, -1], [-1, -1], [49, 0]])
    spec = spec_of(50, labels=2)
    check_against_oracle(logits_NV, labels_NJ, spec)
    kept = reduce_rows(logits_NV, labels_NJ, spec)
    assert kept.label_logit is not None
    expected = [
        [logits_NV[n, y].item() if y >= 0 else MINUS_INFINITY for y in row]
        for n, row in enumerate(labels_NJ.tolist())
    ]
    assert kept.label_logit.tolist() == expected


def test_minus_infinity_is_a_legal_logit() -> None:
    logits_NV = normal(4, 50)
    logits_NV[:, 5:] = MINUS_INFINITY  # fewer finite logits than k
    logits_NV[1, 5:30] = -1e30  # finite, and no mass at all
    labels_NJ = torch.tensor([[0], [7], [40], [-1]])
    check_against_oracle(logits_NV, labels_NJ, spec_of(50))
    kept = reduce_rows(logits_NV, labels_NJ, spec_of(50))
    assert kept.label_logit is not None and kept.mean is not None and kept.std is not None
    assert kept.label_logit[2].item() == MINUS_INFINITY
    finite = logits_NV[2, :5].double()
    assert kept.mean[2].item() == pytest.approx(finite.mean().item(), rel=1e-6)
    assert kept.std[2].item() == pytest.approx(finite.std(correction=0).item(), rel=1e-6)


def test_k_of_all_classes_leaves_an_empty_tail() -> None:
    spec = spec_of(8)
    check_against_oracle(normal(5, 8), torch.tensor([[0], [1], [2], [-1], [7]]), spec)
    kept = reduce_rows(normal(5, 8), None, spec)
    assert kept.tail_lse is not None and bool((kept.tail_lse[:, 1] == MINUS_INFINITY).all())


def test_a_far_tail_is_summed_and_not_subtracted() -> None:
    """1 - sum of the head would be 0 here: the tail's mass is 1e-26 of it."""
    logits_NV = torch.full((1, 50), -60.0)
    logits_NV[0, :8] = torch.linspace(5, 0, 8)
    kept = reduce_rows(logits_NV, None, spec_of(50, labels=0))
    assert kept.tail_lse is not None
    assert kept.tail_lse[0, 1, 0].item() == pytest.approx(-65 + np.log(42), rel=1e-6)


def test_logits_are_sliced_to_the_classes_first() -> None:
    logits_NV = normal(5, 60)
    # as the last that is kept, which stays
    logits_NV[:, 50:] = logits_NV[:, :50].topk(8, 1).values[:, 7:]
    check_against_oracle(logits_NV, torch.zeros(5, 1, dtype=torch.int64), spec_of(50))
    logits_NV[3, 57] += 0.1
    with pytest.raises(
        DataError,
        match=r"row 3: a logit beyond the 50 of --classes is among the teacher's 8 largest",
    ):
        reduce_rows(logits_NV, torch.zeros(5, 1, dtype=torch.int64), spec_of(50))
    full = spec_of(50, kind="full", tiers=(), temperatures=(), labels=0)
    # all are kept: the largest alone says that it is a class
    reduce_rows(logits_NV, None, full)
    logits_NV[2, 50] = logits_NV[2, :50].max() + 1
    with pytest.raises(
        DataError, match=r"row 2: a logit beyond .* is the teacher's largest \(1 such rows"
    ):
        reduce_rows(logits_NV, None, full)
    reduce_rows(logits_NV, None, full, index_N=torch.tensor([4, 0, 3]))


def test_full_keeps_every_logit_in_id_order_as_it_is() -> None:
    logits_NV = normal(5, 12).to(torch.bfloat16)
    logits_NV[:, 10:] -= 10
    spec = spec_of(10, kind="full", tiers=(), temperatures=(), labels=0)
    kept = reduce_rows(logits_NV, None, spec)
    assert torch.equal(kept.logits, logits_NV[:, :10].float())
    assert kept.ids is None and kept.tail_lse is None and kept.label_logit is None
    wide = logits_NV[:, :10].double()
    assert kept.mean is not None and kept.std is not None
    torch.testing.assert_close(kept.mean, wide.mean(1).float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(kept.std, wide.std(1, correction=0).float(), rtol=2e-7, atol=0)


@pytest.fixture
def threads() -> Iterator[None]:
    """Four threads of torch: enough to split one long row."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("classes", [33, 40_001])
@pytest.mark.usefixtures("threads")
def test_a_row_has_the_same_bits_in_every_chunk_and_selection(classes: int) -> None:
    logits_NV = normal(37, classes)
    labels_NJ = torch.arange(37)[:, None] % 33
    spec = spec_of(classes)
    whole = reduce_rows(logits_NV, labels_NJ, spec)
    index_N = torch.tensor([36, 4, 0])
    picked = reduce_rows(logits_NV, labels_NJ[index_N], spec, index_N=index_N)
    for name in ("ids", "logits", "tail_lse", "label_logit", "mean", "std", "top"):
        expected = getattr(whole, name)
        for rows in (1, 2, 5, 36):
            assert torch.equal(
                getattr(reduce_rows(logits_NV, labels_NJ, spec, chunk_rows=rows), name), expected
            ), name
        assert torch.equal(getattr(picked, name), expected[index_N]), name


def test_no_rows_give_empty_tensors() -> None:
    kept = reduce_rows(
        torch.zeros(4, 50),
        torch.zeros(0, 1, dtype=torch.int64),
        spec_of(50),
        index_N=torch.zeros(0, dtype=torch.int64),
    )
    assert kept.ids is not None and kept.tail_lse is not None and kept.mean is not None
    assert kept.ids.shape == (0, 8) and kept.tail_lse.shape == (0, 2, 2) and kept.mean.shape == (0,)


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "NaN"), (float("inf"), r"\+inf")])
@pytest.mark.parametrize("chunk_rows", [1, 2, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_logit_names_its_row(
    value: float, said: str, chunk_rows: int, dtype: torch.dtype
) -> None:
    logits_NV = normal(9, 50).to(dtype)
    logits_NV[5, 49] = value
    with pytest.raises(DataError, match=f"row number 5: the teacher returned {said}"):
        reduce_rows(
            logits_NV,
            None,
            spec_of(50, labels=0),
            name_row="row number {}".format,
            chunk_rows=chunk_rows,
        )


def test_bad_rows_are_counted_over_the_whole_batch_and_only_among_those_that_are_kept() -> None:
    logits_NV = normal(9, 50)
    logits_NV[0, 0] = logits_NV[8, 1] = float("nan")  # padding may hold anything
    index_N = torch.tensor([7, 5, 3, 1])
    spec = spec_of(50, labels=0)
    kept = reduce_rows(logits_NV, None, spec, index_N=index_N)
    assert torch.equal(kept.logits, reduce_rows(logits_NV[index_N], None, spec).logits)
    logits_NV[3, 4], logits_NV[1, 2] = float("inf"), float("nan")
    with pytest.raises(
        DataError, match=r"row 2: the teacher returned \+inf \(2 such rows in this batch\)"
    ):
        reduce_rows(logits_NV, None, spec, index_N=index_N, chunk_rows=1)


@pytest.mark.parametrize("label", [-2, 50])
def test_a_label_that_is_no_class_names_its_row(label: int) -> None:
    with pytest.raises(DataError, match=f"row 3: its label is {label}; the teacher has 50 classes"):
        reduce_rows(normal(4, 50), torch.tensor([[0], [-1], [49], [label]]), spec_of(50))


class Looks(TorchDispatchMode):
    """Counts the values that a program reads off tensors, for each of which it would wait for a
    GPU; and the elements of the largest tensor that it makes."""

    count = largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view and not func._schema.is_mutable:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("kind", ["full", "topk"])
def test_no_chunk_is_waited_for(kind: str) -> None:
    spec = (
        spec_of(50, labels=0)
        if kind == "topk"
        else spec_of(50, kind="full", tiers=(), temperatures=(), labels=0)
    )
    with Looks() as looks:
        reduce_rows(normal(9, 50), None, spec, chunk_rows=1)
    assert looks.count == 0


def test_a_float64_logit_beyond_float32_is_infinite() -> None:
    logits_NV = normal(3, 50).double()
    logits_NV[1, 1] = 1e300
    with pytest.raises(DataError, match=r"row 1: the teacher returned \+inf"):
        reduce_rows(logits_NV, None, spec_of(50, labels=0))


def test_a_row_without_any_finite_logit_is_refused() -> None:
    logits_NV = normal(3, 50)
    logits_NV[2] = MINUS_INFINITY
    with pytest.raises(DataError, match="row 2: the teacher returned no finite logit"):
        reduce_rows(logits_NV, None, spec_of(50, labels=0))


def test_a_float16_teacher_is_told_of_a_wider_dtype() -> None:
    logits_NV = normal(3, 8).to(torch.float16)
    logits_NV[1, 2] = 70_000
    with pytest.raises(
        DataError, match=r"row 1: the teacher returned \+inf .*above 65504: try --dtype float32"
    ):
        reduce_rows(logits_NV, None, spec_of(8, labels=0))
