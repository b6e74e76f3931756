"""Laws of the loss that every engine keeps, for every divergence and tail: what its gradient
depends on, and T^2.

The kernels run in triton's interpreter, with `-m gpu` compiled on the device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_world import PAIRS, problem, single, value_and_gradient
from torch import Tensor

from kdcache.kernels import row_loss
from kdcache.loss.divergences import DIVERGENCES
from kdcache.loss.kd_loss import kd_loss
from kdcache.loss.targets import SoftTargets

ENGINES = ("torch", "triton")
KINDS = [(d, "bucket", None) for d in ("forward_kl", "reverse_kl", "jsd", "tv")] + [
    (d, t, 3) for d, t in PAIRS
]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=ENGINES)
def run(request: pytest.FixtureRequest, device: str) -> Any:
    """(loss of each row, gradient) of an engine, computed in float32 on its device."""

    def call(
        logits: Tensor, labels: Tensor | None, targets: SoftTargets, **options: Any
    ) -> tuple[Tensor, Tensor]:
        out = value_and_gradient(
            kd_loss,
            logits.float().to(device),
            None if labels is None else labels.to(device),
            single(targets).to(device),
            engine=request.param,
            reduction="none",
            **options,
        )
        return out[0].cpu(), out[1].cpu()

    return call


@pytest.mark.parametrize(("divergence", "tail", "k"), KINDS)
def test_the_gradient_depends_on_teacher_temperature_alpha_and_label(
    divergence: str, tail: str, k: int | None, run: Any
) -> None:
    options = {"divergence": divergence, "tail": tail}
    logits, labels, targets = problem(13, 2, 8, 2.0, k, tail=tail)
    other = problem(14, 2, 8, 2.0, k, tail=tail)[2]
    warmer = problem(13, 2, 8, 3.0, k, tail=tail)[2]
    gradients = [
        run(logits, labels, targets, alpha=0.5, **options)[1],
        run(logits, labels, other, alpha=0.5, **options)[1],
        run(logits, labels, warmer, alpha=0.5, **options)[1],
        run(logits, labels, targets, alpha=0.6, **options)[1],
        run(logits, (labels + 1) % 8, targets, alpha=0.5, **options)[1],
    ]
    for i, a in enumerate(gradients):
        for b in gradients[i + 1 :]:
            moved_N = (a - b).abs().amax(-1) > 1e-3
            # Every row's must move; that of tv sees the teacher through signs alone, which may
            # agree in a row.
            assert bool(moved_N.any() if divergence == "tv" else moved_N.all())


@pytest.mark.parametrize(("divergence", "tail", "k"), KINDS)
def test_a_teacher_of_no_number_shows_in_the_loss_of_its_row_and_of_no_other(
    divergence: str, tail: str, k: int | None, run: Any
) -> None:
    """A loss of 0 with a gradient of NaN would pass every look at the loss."""
    logits, labels, targets = problem(13, 3, 8, 2.0, k, tail=tail)
    good = run(logits, labels, targets, alpha=0.5, divergence=divergence, tail=tail)
    log_probs = targets.log_probs_NK.clone()
    log_probs[1, 2] = torch.nan
    found = run(
        logits,
        labels,
        replace(targets, log_probs_NK=log_probs),
        alpha=0.5,
        divergence=divergence,
        tail=tail,
    )
    assert found[0].isnan().tolist() == [False, True, False]
    assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(good, found, strict=True))


def test_alpha_0_is_cross_entropy_whatever_the_teacher_and_alpha_1_whatever_the_label(
    run: Any,
) -> None:
    logits, labels, targets = problem(13, 2, 8, 2.0, 3)
    other = problem(14, 2, 8, 2.0, 3)[2]
    assert torch.equal(
        run(logits, labels, targets, alpha=0.0)[1], run(logits, labels, other, alpha=0.0)[1]
    )
    assert torch.equal(
        run(logits, labels, targets, alpha=1.0)[1],
        run(logits, (labels + 1) % 8, targets, alpha=1.0)[1],
    )


@pytest.mark.parametrize(("divergence", "tail", "k"), KINDS)
def test_temperature_squared_is_in_value_and_gradient(
    divergence: str, tail: str, k: int | None, run: Any
) -> None:
    """Both sets of logits times T at temperature T: D is unchanged, so the loss grows by T^2, its
    gradient by T.
    """
    options = {"alpha": 1.0, "divergence": divergence, "tail": tail}
    logits, _, targets = problem(12, 2, 8, 1.0, k, tail=tail)
    loss, gradient = run(logits, None, targets, **options)
    # Scores of at most 16: each is off by a few roundings of 16, and what sums them by no more;
    # slopes are those times probabilities and values of at most 16.
    unit = 4 * 16 * EPS
    assert bool((loss.abs() > 100 * unit).all()) and bool((gradient.abs() > 100 * unit).any())
    scaled = run(logits * 3, None, replace(targets, temperature=3.0), **options)
    torch.testing.assert_close(scaled[0] / 9, loss, rtol=0, atol=2 * unit)
    torch.testing.assert_close(scaled[1] / 3, gradient, rtol=0, atol=2 * unit)


def test_the_torch_engine_has_every_divergence_that_a_value_may_name() -> None:
    assert list(DIVERGENCES) == row_loss.DIVERGENCES


@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_a_tail_that_neither_has_counts_for_nothing(tail: str, run: Any) -> None:
    """Then D is that of teacher and student over the support alone; 0 times an infinite divergence
    is not NaN.
    """
    logits, _, targets = problem(31, 2, 8, 2.0, 3)
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(1, targets.ids_NK, True)
    targets = replace(
        targets,
        log_probs_NK=targets.log_probs_NK.log_softmax(1),
        log_tail_N=torch.full_like(targets.log_tail_N, -torch.inf),
    )
    found, truth = (
        run(logits.masked_fill(~kept, -torch.inf), None, targets, alpha=1.0, tail=t)
        for t in (tail, "conditional")
    )
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=8 * EPS, atol=8 * EPS)


@pytest.mark.parametrize("weights", [{"alpha": 1.0}, {"ce_weight": 0.0, "kd_weight": 0.5}], ids=str)
def test_weights_of_labels_that_are_not_in_the_loss_change_nothing(
    weights: dict[str, float], run: Any
) -> None:
    logits, labels, targets = problem(13, 2, 8, 2.0, 3)
    weighed = run(logits, labels, targets, label_weight=torch.tensor([0.5, 2.0]), **weights)
    plain = run(logits, None, targets, **weights)
    assert all(torch.equal(a, b) for a, b in zip(weighed, plain, strict=True))
