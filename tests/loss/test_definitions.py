"""The plain definitions against what else is known of each loss: other forms, symmetries, limits,
expectations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain, combinations

import pytest
import torch
from loss_world import PAIRS, by_hand, double_targets, problem, value_and_gradient
from torch import Tensor

from kdcache.loss.definitions import (
    cross_entropy,
    divergence_rows,
    full,
    jsd_rows,
    kl_rows,
    reverse_kl_rows,
    sampled,
    tv_rows,
    uniform,
)
from kdcache.loss.targets import SoftTargets

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def outcomes(seed: int, rows: int = 4, count: int = 6) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.log_softmax(torch.randn(rows, count, generator=g, dtype=torch.float64) * 2, -1)


def test_total_variation_is_the_largest_difference_over_events() -> None:
    log_q, log_p = outcomes(1), outcomes(2)
    events = chain.from_iterable(combinations(range(6), n) for n in range(7))
    gaps = [
        (log_p.exp()[:, list(e)].sum(-1) - log_q.exp()[:, list(e)].sum(-1)).abs() for e in events
    ]
    torch.testing.assert_close(tv_rows(log_q, log_p), torch.stack(gaps).amax(0), **CLOSE)


def test_reverse_kl_is_forward_kl_with_the_two_exchanged() -> None:
    log_q, log_p = outcomes(3), outcomes(4)
    torch.testing.assert_close(reverse_kl_rows(log_q, log_p), kl_rows(log_p, log_q), **CLOSE)
    torch.testing.assert_close(
        kl_rows(log_q, log_p),
        torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1),
        **CLOSE,
    )


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.7])
def test_jsd_is_the_entropy_of_the_mixture_less_the_mean_entropy(beta: float) -> None:
    log_q, log_p = outcomes(5), outcomes(6)
    mixture = beta * log_q.exp() + (1 - beta) * log_p.exp()

    def entropy(p: Tensor) -> Tensor:
        return -(p * p.log()).sum(-1)

    found = jsd_rows(log_q, log_p, beta)
    torch.testing.assert_close(
        found,
        entropy(mixture) - beta * entropy(log_q.exp()) - (1 - beta) * entropy(log_p.exp()),
        **CLOSE,
    )
    torch.testing.assert_close(found, jsd_rows(log_p, log_q, 1 - beta), **CLOSE)


def test_jsd_of_a_small_beta_is_beta_times_forward_kl_and_disjoint_outcomes_give_log_2() -> None:
    log_q, log_p = outcomes(7), outcomes(8)
    torch.testing.assert_close(
        jsd_rows(log_q, log_p, 1e-7) / 1e-7, kl_rows(log_q, log_p), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        jsd_rows(log_q, log_p, 1 - 1e-7) / 1e-7, kl_rows(log_p, log_q), rtol=1e-5, atol=1e-5
    )
    apart = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    assert jsd_rows(apart, apart.flip(1)).item() == pytest.approx(math.log(2), rel=1e-15)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_uniform_is_the_full_divergence_from_a_teacher_with_an_even_tail(
    temperature: float,
) -> None:
    logits, _, t = problem(9, 3, 11, temperature, 4)
    assert t.ids_NK is not None and t.log_tail_N is not None
    dense = (t.log_tail_N - math.log(7))[:, None].expand(3, 11).scatter(1, t.ids_NK, t.log_probs_NK)
    for beyond in (0, 2):  # classes of the student alone have no part of the tail
        wide = torch.cat([logits, torch.randn(3, beyond, dtype=torch.float64)], 1)
        found = value_and_gradient(
            uniform, wide, t.ids_NK, t.log_probs_NK, t.log_tail_N, temperature, 11
        )
        torch.testing.assert_close(
            found, value_and_gradient(full, wide, dense, temperature), **CLOSE
        )


def test_the_gradient_of_draws_is_s_p_minus_w_and_in_the_mean_that_of_forward_kl() -> None:
    """Each of 5 classes drawn alone with probability q has weight 1; the mean over draws is exact,
    not sampled.
    """
    logits, _, t = problem(10, 1, 5, 2.0, None)
    q, p = t.log_probs_NK.exp(), torch.softmax(logits / 2.0, -1)
    _, want = value_and_gradient(full, logits, t.log_probs_NK, 2.0)
    one_draw = [
        value_and_gradient(sampled, logits, torch.tensor([[j]]), torch.zeros(1, 1).double(), 2.0)[1]
        for j in range(5)
    ]
    torch.testing.assert_close(
        sum(float(q[0, j]) * g for j, g in enumerate(one_draw)), want, **CLOSE
    )
    w = torch.tensor([[0.9, 0.3]], dtype=torch.float64)
    _, found = value_and_gradient(sampled, logits, torch.tensor([[3, 1]]), w.log(), 2.0)
    dense = torch.tensor([[0, 0.3, 0, 0.9, 0]], dtype=torch.float64)
    torch.testing.assert_close(found, (1.2 * p - dense) / 2.0, **CLOSE)


@pytest.mark.parametrize(("divergence", "tail"), PAIRS)
@pytest.mark.parametrize("k", [2, 6, None])
def test_definitions_pass_gradcheck(divergence: str, tail: str, k: int | None) -> None:
    if tail == "sampled" and k is None:
        k = 1
    logits, _, t = problem(6, 3, 6, 2.0, k, tail=tail)
    assert torch.autograd.gradcheck(
        lambda z: divergence_rows(z, t, divergence, tail, 0.3), logits.requires_grad_()
    )


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tv"])
def test_classes_that_both_rule_out_take_no_part(divergence: str) -> None:
    logits, _, _ = problem(12, 2, 6, 1.0, None)
    teacher = problem(13, 2, 6, 1.0, None)[0]
    logits[:, 4], teacher[:, 4] = -torch.inf, -torch.inf
    keep = torch.tensor([0, 1, 2, 3, 5])

    def rows(teacher: Tensor) -> Callable[[Tensor], Tensor]:
        t = double_targets(teacher, 1.0)
        return lambda z: divergence_rows(z, t, divergence)

    loss, gradient = value_and_gradient(rows(teacher), logits)
    alone = value_and_gradient(rows(teacher[:, keep]), logits[:, keep])
    torch.testing.assert_close((loss, gradient[:, keep]), alone, **CLOSE)
    assert not gradient[:, 4].any()


def test_cross_entropy_is_that_of_torch() -> None:
    logits, labels, _ = problem(14, 4, 5, 1.0, None)
    torch.testing.assert_close(
        cross_entropy(logits, labels[:, None], torch.ones(4, 1)),
        torch.nn.functional.cross_entropy(logits, labels, reduction="none"),
        **CLOSE,
    )


def test_kept_classes_in_any_order_and_all_of_them_are_the_full_divergence() -> None:
    logits, _, t = problem(15, 3, 6, 2.0, 6)
    assert t.log_tail_N is not None and bool((t.log_tail_N == -torch.inf).all())
    whole = double_targets(problem(15, 3, 6, 2.0, None)[2].log_probs_NK * 2.0, 2.0)
    for divergence, tail in PAIRS:
        targets: SoftTargets = (
            t if tail != "sampled" else SoftTargets(2.0, 6, t.ids_NK, t.log_probs_NK, None)
        )
        torch.testing.assert_close(
            divergence_rows(logits, targets, divergence, tail),
            divergence_rows(logits, whole, divergence),
            **CLOSE,
        )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [2, None])
@pytest.mark.parametrize(("divergence", "tail"), [pair for pair in PAIRS if pair[1] != "sampled"])
def test_classes_beyond_the_teachers_are_outcomes_of_its_tail(
    divergence: str, tail: str, k: int | None, temperature: float
) -> None:
    """Written out: as outcomes of probability 0, one by one, or as one with the tail; "conditional"
    never sees them.
    """
    if k is None and divergence == "reverse_kl" and tail != "conditional":
        pytest.skip("infinite")
    wide, _, t = problem(21, 3, 6, temperature, k, beyond=4)
    # the same, all of its classes
    teacher = problem(21, 3, 6, temperature, None)[2].log_probs_NK.exp()
    want = value_and_gradient(
        lambda z: by_hand(z, teacher, t.ids_NK, temperature, divergence, tail), wide
    )
    found = value_and_gradient(divergence_rows, wide, t, divergence, tail)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-11)
    assert bool((found[1][:, 6:] != 0).any()) == (tail != "conditional")
