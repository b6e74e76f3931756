"""The torch engine against the plain definitions in float64, and the laws a distillation loss
obeys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_world import (
    DIVERGENCES,
    PAIRS,
    double,
    double_targets,
    problem,
    rows_by_definition,
    single,
    value_and_gradient,
)
from torch import Tensor

from kdcache.kernels.row_loss import RowLoss
from kdcache.loss.definitions import cross_entropy, kd_loss_reference
from kdcache.loss.divergences import Divergence
from kdcache.loss.engines import fused_engine
from kdcache.loss.kd_loss import _of_teacher, kd_loss
from kdcache.loss.targets import SoftTargets, targets_from_logits
from kdcache.loss.torch_engine import torch_engine

FINITE = [pair for pair in PAIRS if pair[0] != "reverse_kl"]  # whatever the teacher rules out


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def kinds(
    pairs: Any = PAIRS, ks: tuple[int | None, ...] = (None, 3)
) -> list[tuple[str, str, int | None]]:
    """(divergence, tail, k): each divergence over all classes (k None), each pair over some."""
    full = dict.fromkeys(d for d, _ in pairs)
    return [(d, "bucket", None) for d in full if None in ks] + [
        (d, t, k) for d, t in pairs for k in ks if k
    ]


# ---- against the definitions
# --------------------------------------------------------------------------------------


@settings(max_examples=250, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 5),
    classes=st.integers(2, 12),
    data=st.data(),
    temperature=st.sampled_from([0.5, 1.0, 1.37, 2.0, 4.0]),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    pair=st.sampled_from(PAIRS),
    beyond=st.sampled_from([0, 1, 5]),
    padding=st.sampled_from([0, 3]),
)
def test_equals_the_definition_in_float64(
    seed: int,
    rows: int,
    classes: int,
    data: st.DataObject,
    temperature: float,
    alpha: float,
    pair: tuple[str, str],
    beyond: int,
    padding: int,
) -> None:
    """Also of a student with classes `beyond` the teacher's, and with logits that `classes` cuts."""
    divergence, tail = pair
    k = data.draw(
        st.integers(1, classes) if tail == "sampled" else st.none() | st.integers(1, classes)
    )
    beta = data.draw(st.sampled_from([0.2, 0.5, 0.9])) if divergence == "jsd" else None
    if pair == ("reverse_kl", "bucket") and k in (None, classes):
        beyond = 0  # of all classes kept it is infinite, and refused
    logits, labels, targets = problem(seed, rows, classes, temperature, k, tail=tail, beyond=beyond)
    known = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    weight = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=rows, max_size=rows))
    )
    labels = torch.where(known, labels, -1)
    targets = replace(targets, weight_N=weight)
    options = {"alpha": alpha, "divergence": divergence, "tail": tail}
    want = value_and_gradient(
        kd_loss_reference, logits, labels, targets, beta=beta or 0.5, **options
    )
    wide = torch.cat([logits, torch.full((rows, padding), 99.0).double()], 1)
    cut = logits.shape[1] if padding else None
    loss, gradient = value_and_gradient(
        kd_loss, wide, labels, targets, beta=beta, classes=cut, **options
    )
    # float64 on numbers of order 100: 1e-11 is 10^3 roundings.
    torch.testing.assert_close(
        (loss, gradient[:, : classes + beyond]), want, rtol=1e-11, atol=1e-11
    )
    assert not gradient[:, classes + beyond :].any()


@pytest.mark.parametrize(("divergence", "tail", "k"), kinds(ks=(None, 1, 3)))
def test_gradcheck_per_row(divergence: str, tail: str, k: int | None) -> None:
    logits, labels, targets = problem(5, 4, 6, 2.0, k, tail=tail)
    labels[1], weight = -100, torch.tensor([1.0, 0.5, 0.0, 2.0])
    targets = replace(targets, weight_N=weight)

    def run(z: Tensor) -> Tensor:
        out = kd_loss(
            z, labels, targets, alpha=0.7, divergence=divergence, tail=tail, reduction="none"
        )
        assert isinstance(out, Tensor)
        return out

    assert torch.autograd.gradcheck(
        run, logits.requires_grad_(), eps=1e-6, atol=1e-7, nondet_tol=0.0
    )


@pytest.mark.parametrize(
    ("divergence", "tail", "k", "dtype", "scale", "temperature"),
    [
        *(
            (d, t, k, torch.float32, scale, temperature)
            for (d, t, k) in kinds(ks=(None, 20))
            for scale in (1.0, 20.0)
            for temperature in (1.0, 2.0)
        ),
        *(
            ("forward_kl", "bucket", k, dtype, scale, 2.0)
            for dtype in (torch.bfloat16, torch.float16)
            for scale in (1.0, 20.0)
            for k in (None, 20)
        ),
    ],
)
def test_is_as_good_as_plain_arithmetic(
    divergence: str, tail: str, k: int | None, dtype: torch.dtype, scale: float, temperature: float
) -> None:
    options = {"divergence": divergence, "tail": tail}
    plain_value, plain_gradient = [], []
    # plain arithmetic's worst of some draws: of one it may be right by luck
    for seed in (8, 9, 10, 7):
        logits, labels, targets = problem(seed, 32, 1001, temperature, k, scale, tail)
        # the same inputs for all three
        logits, targets = logits.to(dtype).double(), single(targets)
        truth = value_and_gradient(rows_by_definition, logits, labels, double(targets), **options)
        plain = value_and_gradient(rows_by_definition, logits.float(), labels, targets, **options)
        plain_value.append((plain[0] - truth[0]).abs().max())
        plain_gradient.append((plain[1] - truth[1]).abs().max())
    found = value_and_gradient(
        kd_loss, logits.to(dtype), labels, targets, reduction="none", **options
    )
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    # Loss: at most twice the error of plain float32, and one rounding; it is a sum of terms of
    # about 1 nat that cancel, whose unit is that of 1. Gradient: also two roundings to the dtype,
    # one when it is kept and one when backward multiplies; below its smallest normal number a
    # float16 is only 2^-24 fine.
    unit = torch.finfo(torch.float32).eps * truth[0].abs().clamp(min=1)
    assert bool(((found[0] - truth[0]).abs() <= 2 * max(plain_value) + unit).all())
    ulp = torch.finfo(dtype).eps * truth[1].abs() + (2.0**-24 if dtype == torch.float16 else 0)
    assert bool(((found[1] - truth[1]).abs() <= 2 * max(plain_gradient) + ulp).all())


@pytest.mark.parametrize("k", [None, 5])
def test_the_conditional_divergence_keeps_its_digits_below_classes_it_does_not_see(
    k: int | None,
) -> None:
    """500 above: subtracted from the kept, they would leave 2^-16 of each."""
    logits, labels, targets = problem(40, 16, 50, 2.0, k, beyond=3)
    logits[:, 50:] += 500
    logits, options = logits.float().double(), {"tail": "conditional", "alpha": 1.0}
    truth = value_and_gradient(rows_by_definition, logits, labels, targets, **options)
    found = value_and_gradient(
        kd_loss, logits.float(), labels, single(targets), reduction="none", **options
    )
    for a, b in zip(found, truth, strict=True):
        assert float((a - b).abs().max()) <= 2e-6


def test_labels_with_weights() -> None:
    logits, _, _ = problem(8, 4, 5, 1.0, None)
    labels = torch.tensor([[0, 1], [2, 2], [3, -1], [-100, -1]])
    weight = torch.tensor([[0.3, 0.7], [0.25, 0.75], [0.6, 0.4], [0.5, 0.5]], dtype=torch.float64)

    def reference(z: Tensor) -> Tensor:
        return cross_entropy(z, labels, weight).sum() / 3  # three rows have a label

    want = value_and_gradient(reference, logits)
    found = value_and_gradient(kd_loss, logits, labels, alpha=0.0, label_weight=weight)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    # no weights: the mean of those of a row
    alike = value_and_gradient(kd_loss, logits, labels, alpha=0.0)
    of_each = [[0, 1], [2, 2], [3]]

    def mean_of_means(z: Tensor) -> Tensor:
        log_p = torch.log_softmax(z, -1)
        return -torch.stack([log_p[n, ys].mean() for n, ys in enumerate(of_each)]).mean()

    torch.testing.assert_close(
        alike, value_and_gradient(mean_of_means, logits), rtol=1e-12, atol=1e-12
    )
    one = value_and_gradient(kd_loss, logits, labels[:, 0], alpha=0.0)
    torch_own = value_and_gradient(
        lambda z: torch.nn.functional.cross_entropy(z, labels[:, 0]), logits
    )
    torch.testing.assert_close(one, torch_own, rtol=1e-12, atol=1e-12)


# ---- laws
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_identical_teacher_gives_exactly_zero(temperature: float, divergence: str) -> None:
    logits = torch.randn(7, 513, generator=torch.Generator().manual_seed(1)) * 4
    for k in (None, 513):
        targets = targets_from_logits(logits, temperature=temperature, k=k)
        loss, gradient = value_and_gradient(
            kd_loss, logits, None, targets, alpha=1.0, divergence=divergence
        )
        assert loss.item() == 0.0 and not gradient.any()
    # With a tail there are roundings on both sides: of the order of eps per unit of
    # log-probability.
    truncated = targets_from_logits(logits, temperature=temperature, k=9)
    loss, gradient = value_and_gradient(
        kd_loss, logits, None, truncated, alpha=1.0, divergence=divergence
    )
    assert abs(loss.item()) < 1e-5
    assert divergence == "tv" or float(gradient.abs().max()) < 1e-6  # of tv it jumps where p = q


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(3, 15),
    data=st.data(),
    temperature=st.sampled_from([1.0, 3.0]),
    divergence=st.sampled_from(DIVERGENCES),
)
def test_bucket_is_a_lower_bound_that_grows_with_k(
    seed: int, classes: int, data: st.DataObject, temperature: float, divergence: str
) -> None:
    """Merging outcomes never raises a divergence (data processing), and no divergence is negative."""
    logits, _, full = problem(seed, 3, classes, temperature, None)
    teacher = full.log_probs_NK * temperature
    k = data.draw(st.integers(1, classes - 2))
    values = [
        kd_loss(
            logits,
            None,
            double_targets(teacher, temperature, j),
            alpha=1.0,
            reduction="none",
            divergence=divergence,
        )
        for j in (k, k + 1, None)
    ]
    assert bool((values[0] >= -1e-12).all())
    assert bool((values[0] <= values[1] + 1e-12).all()) and bool(
        (values[1] <= values[2] + 1e-12).all()
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bucket_of_all_but_one_class_is_the_full_divergence(divergence: str) -> None:
    logits, labels, full = problem(11, 5, 9, 2.0, None)
    almost = double_targets(full.log_probs_NK * 2.0, 2.0, 8)
    torch.testing.assert_close(
        value_and_gradient(kd_loss, logits, labels, almost, divergence=divergence),
        value_and_gradient(kd_loss, logits, labels, full, divergence=divergence),
        rtol=1e-11,
        atol=1e-12,
    )


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(kinds(ks=(None, 1, 3))),
    shift=st.floats(-50, 50),
)
def test_gradient_sums_to_zero_and_a_shift_changes_nothing(
    seed: int, kind: tuple[str, str, int | None], shift: float
) -> None:
    divergence, tail, k = kind
    logits, labels, targets = problem(seed, 3, 7, 2.0, k, tail=tail)
    options = {"divergence": divergence, "tail": tail}
    loss, gradient = value_and_gradient(kd_loss, logits, labels, targets, **options)
    assert float(gradient.sum(-1).abs().max()) < 1e-13
    shifted = value_and_gradient(kd_loss, logits + shift, labels, targets, **options)
    torch.testing.assert_close(shifted, (loss, gradient), rtol=1e-10, atol=1e-12)


# ---- extremes
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("divergence", "tail"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_student_tail_that_underflows(dtype: torch.dtype, divergence: str, tail: str) -> None:
    """p_t = exp(-2e4) is 0 in any float; q_t / p_t is not formed."""
    logits = torch.tensor([[1e4, 1e4 - 1.0, -1e4, -1e4 + 2.0, -1e4 + 1.0]], dtype=dtype)
    targets = replace(
        double_targets(torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]]), 1.0, 2), temperature=1.0
    )
    assert targets.log_tail_N is not None
    q_tail = float(targets.log_tail_N.exp())
    if tail == "sampled":
        targets = replace(targets, log_tail_N=None)
    loss, gradient = value_and_gradient(
        kd_loss, logits, None, targets, alpha=1.0, divergence=divergence, tail=tail
    )
    assert torch.isfinite(loss) and bool(torch.isfinite(gradient).all())
    if (divergence, tail) == ("forward_kl", "bucket"):
        within = torch.softmax(torch.tensor([0.0, 2.0, 1.0]), -1)
        torch.testing.assert_close(
            gradient[0, 2:].double(), -q_tail * within.double(), rtol=1e-6, atol=0
        )
    elif tail == "uniform":
        torch.testing.assert_close(
            gradient[0, 2:].double(), torch.full((3,), -q_tail / 3).double(), rtol=1e-6, atol=0
        )
    else:
        assert not gradient[0, 2:].any()


@pytest.mark.parametrize(("divergence", "tail"), PAIRS)
def test_a_large_common_offset_costs_no_digits(divergence: str, tail: str) -> None:
    """Logits in steps of 1/64 plus 2^14 are exact in float32, so the truncated loss must keep every
    bit.
    """
    logits, _, targets = problem(27, 6, 50, 3.0, 5, tail=tail)
    logits = (logits * 64).round().float() / 64
    did_you_mean, far = (
        value_and_gradient(kd_loss, x, None, targets, alpha=1.0, divergence=divergence, tail=tail)
        for x in (logits, logits + 2.0**14)
    )
    assert torch.equal(did_you_mean[0], far[0]) and torch.equal(did_you_mean[1], far[1])


@pytest.mark.parametrize(("divergence", "tail", "k"), kinds(FINITE, ks=(None, 2)))
def test_infinite_logits(divergence: str, tail: str, k: int | None) -> None:
    teacher = torch.tensor([[2.0, 1.0, -torch.inf, 0.0], [1.0, -torch.inf, -torch.inf, -torch.inf]])
    logits = torch.tensor([[0.5, 0.1, 0.3, -0.2], [0.5, 0.1, 0.3, -0.2]])

    def run(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        targets = targets_from_logits(teacher, temperature=temperature, k=k)
        if tail == "sampled":
            targets = replace(targets, log_tail_N=None)
        return value_and_gradient(
            kd_loss,
            logits,
            None,
            targets,
            alpha=1.0,
            reduction="none",
            divergence=divergence,
            tail=tail,
        )

    loss, gradient = run(logits, 2.0)
    assert bool(torch.isfinite(loss).all()) and bool(torch.isfinite(gradient).all())
    # the second teacher is certain: D = -log p_0
    if divergence == "forward_kl" and tail != "conditional":
        assert float(loss[1]) / 4 == pytest.approx(
            -float(torch.log_softmax(logits[1] / 2, -1)[0]), rel=1e-6
        )
    # A student that rules out what the teacher rules out, in the head and in the whole tail.
    loss, gradient = run(
        torch.tensor([[0.5, 0.1, -torch.inf, -0.2], [0.5, 0.2, -torch.inf, -torch.inf]]), 1.0
    )
    # an even tail gives such a class something: that costs infinitely much
    if tail == "uniform":
        assert (
            loss[0] == torch.inf
            and bool(torch.isfinite(gradient).all())
            and float(gradient[0, 2]) < 0
        )
        return
    assert bool(torch.isfinite(loss).all()) and bool(torch.isfinite(gradient).all())
    assert not gradient[:, 2].any()


@pytest.mark.parametrize("run", [torch_engine, fused_engine])
def test_reverse_kl_from_a_teacher_without_a_tail_is_infinite_in_that_row_alone(
    run: Any, device: str
) -> None:
    """What a device computes, where values cannot be refused without waiting for it."""
    logits, _, targets = problem(29, 3, 9, 2.0, 4)
    assert targets.log_tail_N is not None
    targets.log_tail_N[1] = -torch.inf
    rows = RowLoss(
        9,
        **_of_teacher(single(targets).to(device)),
        divergence=Divergence("reverse_kl"),
        kd_scale=torch.ones((), device=device),
    )
    loss = run(logits.float().to(device), rows)[0]
    assert [bool(x) for x in loss.isinf()] == [False, True, False] and bool(
        loss[[0, 2]].isfinite().all()
    )


@pytest.mark.parametrize(("divergence", "tail", "k"), kinds(ks=(None, 2)))
def test_no_rows_and_ignored_rows(divergence: str, tail: str, k: int | None) -> None:
    logits, labels, targets = problem(15, 4, 6, 2.0, k, tail=tail)
    options = {"divergence": divergence, "tail": tail}
    loss, gradient = value_and_gradient(kd_loss, logits[:0], labels[:0], targets[:0], **options)
    assert loss.item() == 0.0 and gradient.shape == (0, 6)
    nothing = replace(targets, weight_N=torch.zeros(4))
    poisoned = logits.clone()
    poisoned[2] = torch.nan
    loss, gradient = value_and_gradient(
        kd_loss, poisoned, torch.full((4,), -100), nothing, **options
    )
    assert loss.item() == 0.0 and not gradient.any()
    # A poisoned row that is ignored leaves the others as they are without it.
    keep = torch.tensor([0, 1, 3])
    some, ignored = replace(targets, weight_N=torch.tensor([1.0, 1.0, 0.0, 1.0])), labels.clone()
    ignored[2] = -1
    if k is not None and tail != "sampled":
        assert some.log_tail_N is not None
        some.log_tail_N[2] = -torch.inf  # reverse KL refuses such a row where it counts
    loss, gradient = value_and_gradient(kd_loss, poisoned, ignored, some, **options)
    alone = value_and_gradient(kd_loss, logits[keep], labels[keep], targets[keep], **options)
    torch.testing.assert_close((loss, gradient[keep]), alone, rtol=1e-13, atol=1e-14)
    assert not gradient[2].any()


def test_weights_that_add_up_to_one_and_nothing_left_out_are_forward_kl() -> None:
    logits, labels, full = problem(30, 3, 6, 2.0, None)
    ids = torch.argsort(torch.rand(3, 6, generator=torch.Generator().manual_seed(0)), -1)
    draws = SoftTargets(2.0, 6, ids, full.log_probs_NK.gather(1, ids), None)
    torch.testing.assert_close(
        value_and_gradient(kd_loss, logits, labels, draws, tail="sampled"),
        value_and_gradient(kd_loss, logits, labels, full),
        rtol=1e-12,
        atol=1e-13,
    )
