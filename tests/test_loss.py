"""The torch engine against the plain definitions in float64, and the laws a distillation loss obeys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcache.errors import NotBuilt, UsageError
from kdcache.student import definitions, engine
from kdcache.student.definitions import kd_loss_reference
from kdcache.student.loss import LossParts, kd_loss, row_counts
from kdcache.student.targets import SoftTargets, targets_from_logits

TAILS = ("bucket", "renormalise", "conditional")


def double_targets(teacher_NV: Tensor, temperature: float, k: int | None = None) -> SoftTargets:
    """Targets in float64, from the definition of softmax."""
    log_q_NV = torch.log_softmax(teacher_NV.double() / temperature, -1)
    if k is None:
        return SoftTargets(temperature, teacher_NV.shape[1], None, log_q_NV, None)
    head_NK, ids_NK = log_q_NV.topk(k, -1)
    tail_N = torch.logsumexp(log_q_NV.scatter(1, ids_NK, -torch.inf), -1)
    return SoftTargets(temperature, teacher_NV.shape[1], ids_NK, head_NK, tail_N)


def problem(seed: int, rows: int, classes: int, temperature: float, k: int | None,
            scale: float = 3.0) -> tuple[Tensor, Tensor, SoftTargets]:
    """(student logits float64 [N, V], labels [N], targets float64)"""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=g, dtype=torch.float64) * scale
    teacher = torch.randn(rows, classes, generator=g, dtype=torch.float64) * scale
    labels = torch.randint(0, classes, (rows,), generator=g)
    return logits, labels, double_targets(teacher, temperature, k)


def value_and_gradient(loss_of: Any, logits: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = loss_of(leaf, *args, **options)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- against the definitions --------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 5), classes=st.integers(2, 12), data=st.data(),
       temperature=st.sampled_from([0.5, 1.0, 2.0, 4.0]), alpha=st.sampled_from([0.0, 0.3, 1.0]),
       tail=st.sampled_from(TAILS))
def test_equals_the_definition_in_float64(seed: int, rows: int, classes: int, data: st.DataObject, temperature: float,
                                          alpha: float, tail: str) -> None:
    k = data.draw(st.one_of(st.none(), st.integers(1, classes - 1)))
    logits, labels, targets = problem(seed, rows, classes, temperature, k)
    known = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    weight = torch.tensor(data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=rows, max_size=rows)))
    labels = torch.where(known, labels, -1)
    targets = replace(targets, weight_N=weight)
    want = value_and_gradient(kd_loss_reference, logits, labels, targets, alpha=alpha, tail=tail)
    found = value_and_gradient(kd_loss, logits, labels, targets, alpha=alpha, tail=tail)
    # float64 on numbers of order 100: 1e-11 is 10^3 roundings.
    torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("k", [None, 1, 3])
def test_gradcheck_per_row(k: int | None, tail: str) -> None:
    logits, labels, targets = problem(5, 4, 6, 2.0, k)
    labels[1], weight = -100, torch.tensor([1.0, 0.5, 0.0, 2.0])
    targets = replace(targets, weight_N=weight)

    def run(z: Tensor) -> Tensor:
        out = kd_loss(z, labels, targets, alpha=0.7, tail=tail, reduction="none")
        assert isinstance(out, Tensor)
        return out

    assert torch.autograd.gradcheck(run, logits.requires_grad_(), eps=1e-6, atol=1e-7, nondet_tol=0.0)


def test_definitions_pass_gradcheck() -> None:
    logits, _, t = problem(6, 3, 6, 2.0, 2)
    logits.requires_grad_()
    assert t.ids_NK is not None and t.log_tail_N is not None
    ids, tail = t.ids_NK, t.log_tail_N
    assert torch.autograd.gradcheck(lambda z: definitions.bucket(z, ids, t.log_probs_NK, tail, 2.0), logits)
    assert torch.autograd.gradcheck(lambda z: definitions.renormalise(z, ids, t.log_probs_NK, 2.0), logits)
    assert torch.autograd.gradcheck(lambda z: definitions.conditional(z, ids, t.log_probs_NK, 2.0), logits)


@pytest.mark.parametrize("k", [None, 20])
@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_as_good_as_plain_arithmetic(dtype: torch.dtype, scale: float, k: int | None) -> None:
    logits, labels, targets = problem(7, 32, 1001, 2.0, k, scale)
    logits = logits.to(dtype).double()                  # the same inputs for all three
    single = SoftTargets(2.0, 1001, targets.ids_NK, targets.log_probs_NK.float(),
                         None if targets.log_tail_N is None else targets.log_tail_N.float())
    exact = SoftTargets(2.0, 1001, targets.ids_NK, single.log_probs_NK.double(),
                        None if single.log_tail_N is None else single.log_tail_N.double())
    truth = value_and_gradient(kd_loss_reference, logits, labels, exact, alpha=0.5)
    plain = value_and_gradient(kd_loss_reference, logits.float(), labels, single, alpha=0.5)
    found = value_and_gradient(kd_loss, logits.to(dtype), labels, single, alpha=0.5)
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    # Loss: at most twice the error of plain float32, and one rounding. Gradient: also two roundings to the dtype, one
    # when it is kept and one when backward multiplies; below its smallest normal number a float16 is only 2^-24 fine.
    assert abs(found[0] - truth[0]) <= 2 * abs(plain[0] - truth[0]) + torch.finfo(torch.float32).eps * truth[0]
    ulp = torch.finfo(dtype).eps * truth[1].abs() + (2.0**-24 if dtype == torch.float16 else 0)
    worst = (plain[1] - truth[1]).abs().max()
    assert bool(((found[1] - truth[1]).abs() <= 2 * worst + ulp).all())


def test_labels_with_weights() -> None:
    logits, _, _ = problem(8, 4, 5, 1.0, None)
    labels = torch.tensor([[0, 1], [2, 2], [3, -1], [-100, -1]])
    weight = torch.tensor([[0.3, 0.7], [0.25, 0.75], [0.6, 0.4], [0.5, 0.5]], dtype=torch.float64)

    def reference(z: Tensor) -> Tensor:
        return definitions.cross_entropy(z, labels, weight).sum() / 3       # three rows have a label

    want = value_and_gradient(reference, logits)
    found = value_and_gradient(kd_loss, logits, labels, alpha=0.0, label_weight=weight)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    one = value_and_gradient(kd_loss, logits, labels[:, 0], alpha=0.0)
    torch_own = value_and_gradient(lambda z: torch.nn.functional.cross_entropy(z, labels[:, 0]), logits)
    torch.testing.assert_close(one, torch_own, rtol=1e-12, atol=1e-12)


# ---- laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_identical_teacher_gives_exactly_zero(temperature: float) -> None:
    logits = torch.randn(7, 513, generator=torch.Generator().manual_seed(1)) * 4
    for k in (None, 513):
        loss, gradient = value_and_gradient(kd_loss, logits, None,
                                            targets_from_logits(logits, temperature=temperature, k=k), alpha=1.0)
        assert loss.item() == 0.0 and not gradient.any()
    # With a tail there are roundings on both sides: of the order of eps per unit of log-probability.
    truncated = targets_from_logits(logits, temperature=temperature, k=9)
    loss, gradient = value_and_gradient(kd_loss, logits, None, truncated, alpha=1.0)
    assert abs(loss.item()) < 1e-5 and float(gradient.abs().max()) < 1e-6


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(3, 15), data=st.data(), temperature=st.sampled_from([1.0, 3.0]))
def test_bucket_is_a_lower_bound_that_grows_with_k(seed: int, classes: int, data: st.DataObject,
                                                   temperature: float) -> None:
    """Merging outcomes never raises a divergence (data processing), and no divergence is negative."""
    logits, _, full = problem(seed, 3, classes, temperature, None)
    teacher = full.log_probs_NK * temperature
    k = data.draw(st.integers(1, classes - 2))
    values = [kd_loss(logits, None, double_targets(teacher, temperature, j), alpha=1.0, reduction="none")
              for j in (k, k + 1, None)]
    assert bool((values[0] >= -1e-12).all())
    assert bool((values[0] <= values[1] + 1e-12).all()) and bool((values[1] <= values[2] + 1e-12).all())


def test_bucket_of_all_but_one_class_is_the_full_divergence() -> None:
    logits, labels, full = problem(11, 5, 9, 2.0, None)
    almost = double_targets(full.log_probs_NK * 2.0, 2.0, 8)
    torch.testing.assert_close(value_and_gradient(kd_loss, logits, labels, almost),
                               value_and_gradient(kd_loss, logits, labels, full), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("k", [None, 4])
def test_temperature_squared_is_in_value_and_gradient(k: int | None) -> None:
    """Both sets of logits times T at temperature T: D is unchanged, so the loss grows by T^2, its gradient by T."""
    logits, _, targets = problem(12, 4, 8, 1.0, k)
    loss, gradient = value_and_gradient(kd_loss, logits, None, targets, alpha=1.0)
    for t in (2.0, 4.0, 5.0):
        scaled = value_and_gradient(kd_loss, logits * t, None, replace(targets, temperature=t), alpha=1.0)
        torch.testing.assert_close(scaled, (loss * t**2, gradient * t), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("k", [None, 3])
def test_gradient_depends_on_teacher_temperature_alpha_and_label(k: int | None) -> None:
    logits, labels, targets = problem(13, 4, 8, 2.0, k)
    other = problem(14, 4, 8, 2.0, k)[2]
    warmer = problem(13, 4, 8, 3.0, k)[2]
    gradients = [
        value_and_gradient(kd_loss, logits, labels, targets, alpha=0.5)[1],
        value_and_gradient(kd_loss, logits, labels, other, alpha=0.5)[1],
        value_and_gradient(kd_loss, logits, labels, warmer, alpha=0.5)[1],
        value_and_gradient(kd_loss, logits, labels, targets, alpha=0.6)[1],
        value_and_gradient(kd_loss, logits, (labels + 1) % 8, targets, alpha=0.5)[1],
    ]
    for i, a in enumerate(gradients):
        for b in gradients[i + 1:]:
            assert bool(((a - b).abs().amax(-1) > 1e-3).all()), "every row's gradient must move"
    # Alpha 0 is plain cross-entropy whatever the teacher, alpha 1 whatever the label.
    assert torch.equal(value_and_gradient(kd_loss, logits, labels, targets, alpha=0.0)[1],
                       value_and_gradient(kd_loss, logits, labels, other, alpha=0.0)[1])
    assert torch.equal(value_and_gradient(kd_loss, logits, labels, targets, alpha=1.0)[1],
                       value_and_gradient(kd_loss, logits, (labels + 1) % 8, targets, alpha=1.0)[1])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), tail=st.sampled_from(TAILS), k=st.sampled_from([None, 1, 3]),
       shift=st.floats(-50, 50))
def test_gradient_sums_to_zero_and_a_shift_changes_nothing(seed: int, tail: str, k: int | None, shift: float) -> None:
    logits, labels, targets = problem(seed, 3, 7, 2.0, k)
    loss, gradient = value_and_gradient(kd_loss, logits, labels, targets, tail=tail)
    assert float(gradient.sum(-1).abs().max()) < 1e-13
    shifted = value_and_gradient(kd_loss, logits + shift, labels, targets, tail=tail)
    torch.testing.assert_close(shifted, (loss, gradient), rtol=1e-10, atol=1e-12)


# ---- extremes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_student_tail_that_underflows(dtype: torch.dtype, tail: str) -> None:
    """p_t = exp(-2e4) is 0 in any float; q_t / p_t is not formed."""
    logits = torch.tensor([[1e4, 1e4 - 1.0, -1e4, -1e4 + 2.0, -1e4 + 1.0]], dtype=dtype)
    targets = replace(double_targets(torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]]), 1.0, 2), temperature=1.0)
    loss, gradient = value_and_gradient(kd_loss, logits, None, targets, alpha=1.0, tail=tail)
    assert torch.isfinite(loss) and bool(torch.isfinite(gradient).all())
    if tail == "bucket":
        assert targets.log_tail_N is not None
        q_tail = float(targets.log_tail_N.exp())
        within = torch.softmax(torch.tensor([0.0, 2.0, 1.0]), -1)
        torch.testing.assert_close(gradient[0, 2:].double(), -q_tail * within.double(), rtol=1e-6, atol=0)
    else:
        assert not gradient[0, 2:].any()


def test_a_large_common_offset_costs_no_digits() -> None:
    """Logits in steps of 1/64 plus 2^14 are exact in float32, so the truncated loss must keep every bit."""
    logits, _, targets = problem(27, 6, 50, 3.0, 5)
    logits = (logits * 64).round().float() / 64
    for tail in TAILS:
        near = value_and_gradient(kd_loss, logits, None, targets, alpha=1.0, tail=tail)
        far = value_and_gradient(kd_loss, logits + 2.0**14, None, targets, alpha=1.0, tail=tail)
        assert torch.equal(near[0], far[0]) and torch.equal(near[1], far[1])


def test_infinite_logits() -> None:
    teacher = torch.tensor([[2.0, 1.0, -torch.inf, 0.0], [1.0, -torch.inf, -torch.inf, -torch.inf]])
    logits = torch.tensor([[0.5, 0.1, 0.3, -0.2], [0.5, 0.1, 0.3, -0.2]])
    for k in (None, 2):
        loss, gradient = value_and_gradient(kd_loss, logits, None, targets_from_logits(teacher, temperature=2.0, k=k),
                                            alpha=1.0, reduction="none")
        assert bool(torch.isfinite(loss).all()) and bool(torch.isfinite(gradient).all())
        # The second teacher is certain: D = -log p_0.
        assert float(loss[1]) / 4 == pytest.approx(-float(torch.log_softmax(logits[1] / 2, -1)[0]), rel=1e-6)
    # A student that rules out what the teacher rules out, in the head and in the whole tail.
    masked = torch.tensor([[0.5, 0.1, -torch.inf, -0.2], [0.5, 0.2, -torch.inf, -torch.inf]])
    for k in (None, 2):
        loss, gradient = value_and_gradient(kd_loss, masked, None, targets_from_logits(teacher, temperature=1.0, k=k),
                                            alpha=1.0, reduction="none")
        assert bool(torch.isfinite(loss).all()) and bool(torch.isfinite(gradient).all())
        assert not gradient[:, 2].any()


@pytest.mark.parametrize("k", [None, 2])
def test_no_rows_and_ignored_rows(k: int | None) -> None:
    logits, labels, targets = problem(15, 4, 6, 2.0, k)
    loss, gradient = value_and_gradient(kd_loss, logits[:0], labels[:0], targets[:0])
    assert loss.item() == 0.0 and gradient.shape == (0, 6)
    nothing = replace(targets, weight_N=torch.zeros(4))
    poisoned = logits.clone()
    poisoned[2] = torch.nan
    loss, gradient = value_and_gradient(kd_loss, poisoned, torch.full((4,), -100), nothing)
    assert loss.item() == 0.0 and not gradient.any()
    # A poisoned row that is ignored leaves the others as they are without it.
    keep = torch.tensor([0, 1, 3])
    some, ignored = replace(targets, weight_N=torch.tensor([1.0, 1.0, 0.0, 1.0])), labels.clone()
    ignored[2] = -1
    loss, gradient = value_and_gradient(kd_loss, poisoned, ignored, some)
    alone = value_and_gradient(kd_loss, logits[keep], labels[keep], targets[keep])
    torch.testing.assert_close((loss, gradient[keep]), alone, rtol=1e-13, atol=1e-14)
    assert not gradient[2].any()


# ---- the contract of the call ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_in_every_chunk_batch_and_thread(k: int | None, threads: int,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels, targets = problem(16, 5, 40_007, 2.0, k)
    logits = logits.float()

    def run(rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        return value_and_gradient(kd_loss, logits[rows], labels[rows], targets[rows], reduction="none")

    whole = run()
    torch.set_num_threads(threads)
    for elements in (1, 40_007, 90_000, 2**30):
        monkeypatch.setitem(engine.CHUNK_ELEMENTS, "cpu", elements)
        again = run()
        assert torch.equal(again[0], whole[0]) and torch.equal(again[1], whole[1])
    single = [run(slice(i, i + 1)) for i in range(5)]
    assert torch.equal(torch.cat([loss for loss, _ in single]), whole[0])
    assert torch.equal(torch.cat([gradient for _, gradient in single]), whole[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("k", [None, 50])
def test_cuda_equals_the_cpu_and_itself(k: int | None) -> None:
    logits, labels, targets = problem(28, 40, 5003, 2.0, k)
    want = value_and_gradient(kd_loss, logits, labels, targets)
    runs = [value_and_gradient(kd_loss, logits.cuda(), labels.cuda(), targets) for _ in range(2)]
    torch.testing.assert_close((runs[0][0].cpu(), runs[0][1].cpu()), want, rtol=1e-11, atol=1e-13)
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_inplace_writes_the_same_gradient_over_the_logits(dtype: torch.dtype) -> None:
    logits, labels, targets = problem(17, 4, 6, 2.0, 3)
    padded = torch.cat([logits, torch.full((4, 2), 99.0)], 1).to(dtype)
    want_loss, want = value_and_gradient(kd_loss, padded, labels, targets)
    hidden = padded.clone().requires_grad_()
    buffer = hidden * 1
    loss = kd_loss(buffer, labels, targets, inplace=True)
    assert not torch.equal(buffer.detach(), padded)
    loss.backward(retain_graph=True)
    assert hidden.grad is not None and torch.equal(hidden.grad, want) and torch.equal(loss.detach(), want_loss)
    assert torch.equal(buffer.detach(), want), "the gradient lives where the logits were"
    with pytest.raises(RuntimeError, match="differentiated twice"):
        loss.backward()
    # Without a gradient there is nothing to write.
    quiet = padded.clone()
    assert torch.equal(kd_loss(quiet, labels, targets, inplace=True), want_loss) and torch.equal(quiet, padded)
    with torch.no_grad():
        kd_loss(hidden, labels, targets, inplace=True)
    assert torch.equal(hidden.detach(), padded)


def test_inplace_is_noticed_by_an_operation_that_kept_the_logits() -> None:
    logits, labels, _ = problem(18, 3, 5, 1.0, None)
    buffer = logits.requires_grad_() * 1
    other = buffer.square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (kd_loss(buffer, labels, alpha=0.0, inplace=True) + other).backward()


def test_padded_vocabulary_is_cut_off() -> None:
    logits, labels, targets = problem(19, 4, 6, 2.0, 3)
    want_loss, want = value_and_gradient(kd_loss, logits, labels, targets)
    loss, gradient = value_and_gradient(kd_loss, torch.cat([logits, torch.full((4, 3), 50.0)], 1), labels, targets)
    assert torch.equal(loss, want_loss) and torch.equal(gradient[:, :6], want) and not gradient[:, 6:].any()


def test_reductions_normalizer_and_parts() -> None:
    logits, labels, targets = problem(20, 4, 6, 2.0, 3)
    labels[0] = -1
    targets = replace(targets, weight_N=torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=torch.float64))
    parts = kd_loss(logits, labels, targets, alpha=0.25, return_parts=True)
    assert isinstance(parts, LossParts)
    assert (parts.ce_count.item(), parts.kd_count.item()) == (3, 4)
    assert parts.loss.item() == pytest.approx(0.75 * parts.ce.item() + 0.25 * 4 * parts.kd.item(), rel=1e-13)
    rows = kd_loss(logits, labels, targets, alpha=0.25, return_parts=True, reduction="none")
    assert rows.loss.shape == rows.ce.shape == rows.kd.shape == (4,) and rows.ce[0] == 0 and rows.kd[1] == 0
    assert rows.ce.sum().item() == pytest.approx(3 * parts.ce.item(), rel=1e-13)
    assert rows.kd.sum().item() == pytest.approx(4 * parts.kd.item(), rel=1e-13)
    summed = kd_loss(logits, labels, targets, alpha=0.25, reduction="sum")
    torch.testing.assert_close(summed, rows.loss.sum(), rtol=1e-13, atol=0)
    # Two micro-batches divided by the counts of both are the batch, in value and gradient.
    counts = row_counts(labels, targets)
    whole = value_and_gradient(kd_loss, logits, labels, targets, alpha=0.25)
    halves = [value_and_gradient(kd_loss, logits[s], labels[s], targets[s], alpha=0.25, normalizer=counts)
              for s in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(halves[0][0] + halves[1][0], whole[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.cat([g for _, g in halves]), whole[1], rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0), (0.3, 2.5), (0.0, 0.0)])
def test_free_weights(weights: tuple[float, float]) -> None:
    logits, labels, targets = problem(21, 4, 6, 2.0, 3)
    parts = kd_loss(logits, labels, targets, ce_weight=weights[0], kd_weight=weights[1], return_parts=True)
    assert parts.ce > 0 and parts.kd > 0, "a part of weight 0 is still reported"
    want = weights[0] * parts.ce.item() + weights[1] * 4 * parts.kd.item()
    assert parts.loss.item() == pytest.approx(want, rel=1e-13)
    plain = kd_loss(logits, labels, targets, ce_weight=weights[0], kd_weight=weights[1])
    assert torch.equal(plain, parts.loss)


def test_missing_parts_are_zero() -> None:
    logits, labels, targets = problem(22, 4, 6, 2.0, 3)
    both = kd_loss(logits, labels, targets, alpha=0.5, return_parts=True)
    assert kd_loss(logits, labels).item() == pytest.approx(0.5 * both.ce.item(), rel=1e-13)
    assert kd_loss(logits, None, targets).item() == pytest.approx(0.5 * 4 * both.kd.item(), rel=1e-13)


def test_float16_gradient_survives_a_mean_over_many_rows() -> None:
    """1 / N times a small probability is below the smallest float16; kept at order 1, scaled gradients are right."""
    g = torch.Generator().manual_seed(23)
    logits, labels = torch.randn(4096, 8, generator=g), torch.randint(0, 8, (4096,), generator=g)
    half = logits.half().requires_grad_()
    (kd_loss(half, labels, alpha=0.0) * 65536.0).backward()
    exact = logits.half().double()
    truth = value_and_gradient(lambda z: 65536.0 * torch.nn.functional.cross_entropy(z, labels), exact)[1]
    assert half.grad is not None
    assert float(((half.grad - truth) / truth).abs().max()) < 2 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "tv"])
def test_later_divergences_are_refused_by_name(name: str) -> None:
    logits, labels, targets = problem(24, 2, 6, 2.0, 3)
    with pytest.raises(NotBuilt, match=f"divergence '{name}' is not built yet"):
        kd_loss(logits, labels, targets, divergence=name)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"tail": "uniform"}, NotBuilt, "tail 'uniform' is not built yet"),
    ({"tail": "sampled"}, NotBuilt, "tail 'sampled' is not built yet"),
    ({"engine": "tritn"}, UsageError, "did you mean 'triton'"),
    ({"tail": "buckets"}, UsageError, "did you mean 'bucket'"),
    ({"divergence": "kl"}, UsageError, "divergence 'kl' is unknown"),
    ({"reduction": "batchmean"}, UsageError, "reduction 'batchmean' is unknown"),
    ({"ce_weight": 1.0}, UsageError, "give both"),
    ({"kd_weight": 1.0}, UsageError, "give both"),
    ({"ce_weight": 1.0, "kd_weight": -1.0}, UsageError, "at least 0"),
    ({"alpha": 1.5}, UsageError, "alpha is 1.5"),
    ({"temperature": 4.0}, UsageError, "temperature is 4.0, but the targets are at 2.0"),
    ({"normalizer": (3, 3), "reduction": "sum"}, UsageError, "divides by nothing"),
    ({"normalizer": (3, -3)}, UsageError, "two counts"),
    ({"labels": torch.tensor([1, 6])}, UsageError, "labels of row 1 are \\[6\\]; expected 0 to 5"),
    ({"labels": torch.tensor([1, -7])}, UsageError, "labels of row 1 are \\[-7\\]"),
    ({"labels": torch.tensor([1, 2, 3])}, UsageError, "2 rows of logits but 3 of labels"),
    ({"labels": torch.tensor([1.0, 2.0])}, UsageError, "expected integers"),
    ({"labels": None, "label_weight": torch.ones(2)}, UsageError, "without labels"),
    ({"label_weight": torch.ones(2, 2)}, UsageError, "expected one shape"),
    ({"labels": None, "targets": None}, UsageError, "neither labels nor targets"),
    ({"targets": None, "temperature": 2.0}, UsageError, "without targets"),
    ({"logits": torch.zeros(3, 6), "labels": None}, UsageError, "3 rows of student logits but 2 of soft targets"),
    ({"logits": torch.zeros(2, 5)}, UsageError, "the student has 5 classes, the teacher 6"),
    ({"logits": torch.zeros(1, 2, 6)}, UsageError, "never shifts labels"),
    ({"logits": torch.zeros(2, 6, dtype=torch.int64)}, UsageError, "expected floating"),
])
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    logits, labels, targets = problem(25, 2, 6, 2.0, 3)
    arguments: dict[str, Any] = {"logits": logits, "labels": labels, "targets": targets, **options}
    with pytest.raises(error, match=message) as caught:
        kd_loss(**arguments)
    assert isinstance(caught.value, ValueError)


def test_matching_temperature_and_ignore_index_are_taken() -> None:
    logits, labels, targets = problem(26, 3, 6, 2.0, 3)
    ignored = labels.clone()
    ignored[1] = 5
    other = labels.clone()
    other[1] = -100
    assert torch.equal(kd_loss(logits, ignored, targets, temperature=2.0, ignore_index=5),
                       kd_loss(logits, torch.where(labels == 5, -1, other), targets))
