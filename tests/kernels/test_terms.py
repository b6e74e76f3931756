"""What the fused loss does besides cross-entropy and a divergence: softcap, an even tail, weights.

Their arithmetic is held against the definition in kernels/test_kd_loss.py; here are the laws and the
edges. On the CPU the kernels run in triton's interpreter, with `-m gpu` compiled on the device: the
same tests.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import kernel_world as world
import pytest
import torch
from kernel_world import Problem, kd_loss_rows, on, run, same, usual
from torch import Tensor

TINY = 8 * 2.0**-23


def test_an_even_tail_is_a_teacher_over_all_classes(device: str) -> None:
    """The sparse kernel with tail "uniform" against the one that is given the same teacher for
    every class.
    """
    problem = usual(tail="uniform", softcap=30.0, labels="two", temperature=1.5)
    k = problem.keywords
    even_N = k["log_tail"] - (123 - (k["ids"] >= 0).sum(1)).log()
    full = (
        even_N[:, None]
        .expand(3, 124)
        .scatter(1, torch.where(k["ids"] < 0, 123, k["ids"]), k["log_probs"])[:, :123]
    )
    sparse, gradient, *_ = run(problem, device)
    dense, expected, *_ = run(
        problem, device, ids=None, log_probs=full.contiguous().to(device), log_tail=None
    )
    for a, b in zip(sparse, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=TINY, atol=TINY)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=TINY * float(expected.abs().max()))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("mass", [0.0, 0.5])
def test_an_even_tail_with_a_class_the_student_excludes(
    mass: float, parts: int, device: str
) -> None:
    """It costs infinitely much, unless the teacher gives that tail nothing; the gradient is finite."""
    problem = usual(tail="uniform", tail_mass=mass, kept=1, labels="none")
    for n in range(3):
        problem.logits[n, (int(problem.keywords["ids"][n, 0]) + 50 * (n + 1)) % 123] = -torch.inf
    out, gradient, *_ = run(problem, device, parts=parts)
    assert bool(out[2].isfinite().all() if mass == 0 else (out[2] == torch.inf).all())
    assert bool(gradient.isfinite().all())
    problem.logits[:] = -torch.inf
    problem.logits.scatter_(1, problem.keywords["ids"], 1.0)  # no class of the tail is finite
    out, gradient, *_ = run(problem, device, parts=parts)
    assert bool(out[2].isfinite().all() if mass == 0 else (out[2] == torch.inf).all())
    assert bool(gradient.isfinite().all())


def test_where_every_class_is_kept_there_is_no_even_tail(device: str) -> None:
    problem = usual(num_classes=7, kept=7, labels="none")
    problem.keywords["ids"][:] = torch.arange(7)
    problem.keywords["log_probs"] = torch.log_softmax(torch.randn(3, 7), -1)
    problem.keywords["log_tail"][:] = 0.0  # of nothing
    out, gradient, *_ = run(problem, device, tail="uniform")
    expected, slope, *_ = run(problem, device, tail="sampled")
    assert bool(out[2].isfinite().all())
    torch.testing.assert_close(out[2], expected[2], rtol=TINY, atol=TINY)
    torch.testing.assert_close(gradient, slope, rtol=0, atol=TINY * float(slope.abs().max()))


@pytest.mark.parametrize("temperature", [1.37, 2.0])
def test_a_common_offset_of_the_logits_costs_no_digits(temperature: float, device: str) -> None:
    problem = usual(tail="uniform", num_classes=1271, temperature=temperature, labels="none")
    # so that the shift is exact in float32
    problem.logits[:] = (problem.logits * 1024).round() / 1024
    before, gradient, *_ = run(problem, device)
    problem.logits[:] += 4096
    after, shifted, *_ = run(problem, device)
    torch.testing.assert_close(before[2], after[2], rtol=TINY, atol=TINY)
    torch.testing.assert_close(gradient, shifted, rtol=0, atol=TINY * float(gradient.abs().max()))


@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_a_row_without_a_teacher_may_have_any_tail(tail: str, device: str) -> None:
    """NaN in its probabilities reaches nothing."""
    # row 1 has weight 0, and a label
    problem = usual(tail=tail, weights="some")
    expected, gradient, *_ = run(problem, device)
    k = problem.keywords
    k["log_probs"][1], k["log_tail"][1] = torch.nan, torch.nan
    out, again, *_ = run(problem, device)
    assert all(torch.equal(a, b) for a, b in zip(expected, out, strict=True)) and torch.equal(
        gradient, again
    )


@pytest.mark.parametrize("changed", [{"logit_scale": 0.9}, {"softcap": 20.0}], ids=str)
@pytest.mark.parametrize("full", [False, True])
def test_the_loss_and_the_gradient_depend_on(
    changed: dict[str, Any], full: bool, device: str
) -> None:
    problem = usual()
    if full:
        problem.keywords.update(
            ids=None, log_tail=None, log_probs=torch.log_softmax(torch.randn(3, 123), -1)
        )
    before, slope, *_ = run(problem, device)
    after, other, *_ = run(problem, device, **changed)
    assert bool((before[0] - after[0]).abs().gt(1e-3).all()) and bool(
        (slope - other).abs().amax(1).gt(1e-4).all()
    )
    assert not same(before[1], after[1])


def test_weights_of_labels_and_of_rows_are_their_own(device: str) -> None:
    """Labels [N] take weights [N]; either weight goes without the other, and each is a factor of
    its own part.
    """
    problem = usual()
    k = problem.keywords
    weight_N, row_weight_N = torch.tensor([0.5, 0.0, 2.0]), torch.tensor([0.0, 3.0, 0.25])
    plain, *_ = run(problem, device)
    labelled, *_ = run(problem, device, label_weight=weight_N.to(device))
    taught, *_ = run(problem, device, row_weight=row_weight_N.to(device))
    both, gradient, *_ = run(
        problem,
        device,
        label_weight=weight_N[:, None].to(device),
        row_weight=row_weight_N.to(device),
    )
    for out, w, r in (
        (labelled, weight_N, torch.ones(3)),
        (taught, torch.ones(3), row_weight_N),
        (both, weight_N, row_weight_N),
    ):
        torch.testing.assert_close(out[1], w * plain[1], rtol=TINY, atol=0)
        torch.testing.assert_close(out[2], r * plain[2], rtol=TINY, atol=TINY)
        torch.testing.assert_close(out[0], k["ce_scale"] * out[1] + k["kd_scale"] * out[2])
    weighted = replace(
        problem, keywords=k | {"label_weight": weight_N[:, None], "row_weight": row_weight_N}
    )
    expected = world.define(weighted, torch.float64)[3]
    torch.testing.assert_close(
        gradient.cpu().double(), expected, rtol=0, atol=TINY * float(expected.abs().max())
    )


def test_a_scale_folds_into_the_logits(device: str) -> None:
    """A power of two, so that the products are exact: the same values, and the gradient times it."""
    problem = usual(num_classes=1272)
    scaled = Problem(problem.case, problem.logits * 0.5, problem.keywords, problem.factor)
    out, gradient, *_ = run(scaled, device)
    folded, slope, *_ = run(problem, device, logit_scale=0.5)
    assert all(same(a, b) for a, b in zip(out, folded, strict=True)) and same(gradient * 0.5, slope)


def test_a_wide_cap_is_none(device: str) -> None:
    """tanh(z) = z - z^3 / 3: at a cap of 2^14 times the logits the difference is below their last
    place.
    """
    problem = usual()
    cap = 2.0**14 * float(problem.logits.abs().max())
    out, gradient, *_ = run(problem, device)
    capped, slope, *_ = run(problem, device, softcap=cap)
    for a, b in zip(out, capped, strict=True):
        torch.testing.assert_close(a, b, rtol=TINY, atol=TINY)
    torch.testing.assert_close(gradient, slope, rtol=0, atol=TINY * float(gradient.abs().max()))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logit_scale": 0.0}, "logit_scale is 0.0"),
        ({"logit_scale": math.inf}, "logit_scale is inf"),
        ({"softcap": -1.0}, "softcap -1.0"),
        ({"softcap": math.nan}, "softcap nan"),
        ({"tail": "uniform", "divergence": "jsd"}, "not built for an even tail"),
        ({"tail": "uniform", "log_tail": None}, "log_tail belong together"),
        ({"labels": None, "label_weight": torch.ones(3)}, "no labels are given"),
        ({"label_weight": torch.ones(3, 2)}, "must be alike"),
        ({"ce_scale": torch.ones(1)}, "without a dimension"),
        ({"labels": torch.zeros(3, 0).long()}, "at least one per row"),
        ({"ids": None, "log_probs": None, "row_weight": torch.ones(3)}, "no log_probs are given"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], message: str, device: str) -> None:
    problem = usual()
    with pytest.raises(ValueError, match=message):
        kd_loss_rows(problem.logits.to(device), **on(device, problem.keywords | changed))


def test_without_a_gradient(device: str) -> None:
    problem = usual(tail="uniform", softcap=30.0)
    expected, *_ = run(problem, device)
    with torch.no_grad():
        logits: Tensor = problem.logits.to(device)
        out = kd_loss_rows(logits, **on(device, problem.keywords))
    assert all(same(a, b.cpu()) for a, b in zip(expected, out, strict=True))
    assert torch.equal(logits.cpu(), problem.logits)
