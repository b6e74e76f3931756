"""The head's normative order and the tail's log-sum-exp, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.errors import UsageError
from kdcache.loss import topk
from kdcache.loss.topk import exact_topk, row_logsumexp, tail_lse


def sorted_head(logits: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The oracle: a full sort by (logit descending, id ascending)."""
    z = logits.double().numpy()
    ids = (
        np.stack([np.lexsort((np.arange(len(row)), -row))[:k] for row in z])
        if len(z)
        else np.empty((0, k), np.int64)
    )
    return ids, np.take_along_axis(z, ids, 1)


@settings(max_examples=120, deadline=None)
@given(
    data=st.data(),
    rows=st.integers(0, 5),
    classes=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    chunk=st.integers(1, 100),
)
def test_order_is_logit_then_id_with_many_ties(
    data: st.DataObject, rows: int, classes: int, dtype: torch.dtype, chunk: int
) -> None:
    few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -np.inf, 1.0078125])
    values = data.draw(
        st.lists(st.lists(few, min_size=classes, max_size=classes), min_size=rows, max_size=rows)
    )
    logits = torch.tensor(values, dtype=torch.float64).reshape(rows, classes).to(dtype)
    k = data.draw(st.integers(1, classes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk.row_chunk, "__defaults__", (chunk,))
        ids, head = exact_topk(logits, k)
    want_ids, want = sorted_head(logits, k)
    assert ids.dtype == torch.int64 and head.dtype == torch.float32
    assert np.array_equal(ids.numpy(), want_ids)
    assert np.array_equal(head.numpy(), want.astype(np.float32))


def test_bfloat16_rows_of_a_real_size() -> None:
    logits = torch.randn(6, 5003, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids, _ = exact_topk(logits, 300)
    assert np.array_equal(ids.numpy(), sorted_head(logits, 300)[0])
    # The tie at the border is what torch.topk leaves open; without one this test would show
    # nothing.
    border = logits.float().sort(-1, descending=True).values
    assert bool((border[:, 299] == border[:, 300]).any())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_head() -> None:
    logits = torch.randn(6, 5003, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, want = exact_topk(logits.cuda(), 300), exact_topk(logits, 300)
    assert torch.equal(found[0].cpu(), want[0]) and torch.equal(found[1].cpu(), want[1])


@pytest.mark.parametrize(("shape", "k"), [((2, 3), 0), ((2, 3), 4), ((3,), 1)])
def test_refusals(shape: tuple[int, ...], k: int) -> None:
    with pytest.raises(UsageError, match="expected"):
        exact_topk(torch.zeros(shape), k)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 4),
    classes=st.integers(2, 30),
    scale=st.sampled_from([1.0, 30.0]),
)
def test_tail_is_the_sum_over_what_is_left(
    seed: int, rows: int, classes: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(
        rng.normal(size=(rows, classes)).astype(np.float32) * np.float32(scale)
    )
    logits[rng.random((rows, classes)) < 0.1] = -torch.inf
    logits[:, 0] = 3.0
    k = int(rng.integers(1, classes))
    ids, head = exact_topk(logits, k)
    label = torch.from_numpy(rng.integers(-1, classes, (rows, 1)))
    found = tail_lse(logits, torch.cat([ids, label], 1), head[:, 0], (1.0, 2.0, 4.0))
    for n in range(rows):
        left = sorted(set(range(classes)) - set(ids[n].tolist()) - set(label[n].tolist()))
        z = (logits[n].double().numpy() - float(head[n, 0]))[left]
        for t, temperature in enumerate((1.0, 2.0, 4.0)):
            with np.errstate(divide="ignore"):
                want = np.log(np.exp(z / temperature).sum()) if left else -np.inf
            # z - max, the division and the sum each round: a few units in the last place of the
            # largest term.
            assert found[n, t] == pytest.approx(want, rel=1e-6, abs=2e-6)


def test_logsumexp_of_a_row_does_not_depend_on_its_neighbours() -> None:
    x = torch.randn(5, 40_001, generator=torch.Generator().manual_seed(1)) * 5
    x[2] = -torch.inf
    together = row_logsumexp(x)
    assert torch.equal(together, torch.cat([row_logsumexp(row[None].clone()) for row in x]))
    torch.testing.assert_close(
        together.double(), torch.logsumexp(x.double(), -1), rtol=1e-6, atol=1e-6
    )
