"""Statistics of a student's rows, row by row from the formulas in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_world import double_targets, problem, single
from torch import Tensor

import kdcache
from kdcache.errors import UsageError
from kdcache.loss import torch_engine
from kdcache.loss.targets import SoftTargets


def define(logits: Tensor, targets: SoftTargets) -> list[tuple[float, float, bool]]:
    """(entropy, mass, agreement) of each row, in plain arithmetic of Python's floats."""
    out = []
    for n, row in enumerate(logits.double().tolist()):
        log_q = targets.log_probs_NK[n].tolist()
        ids = range(len(log_q)) if targets.ids_NK is None else targets.ids_NK[n].tolist()

        def softmax(row: list[float], temperature: float) -> list[float]:
            e = [math.exp((x - max(row)) / temperature) for x in row]
            return [one / sum(e) for one in e]

        entropy = -sum(p * math.log(p) for p in softmax(row, 1.0) if p > 0)
        p = softmax(row, targets.temperature)
        mass = sum(p[i] for i, q in zip(ids, log_q, strict=True) if q > -math.inf)
        best = {i for i, q in zip(ids, log_q, strict=True) if q == max(log_q)}
        agrees = any(row[i] == max(row) for i in best)
        taught = targets.weight_N is None or float(targets.weight_N[n]) != 0
        out.append((entropy, mass if taught else 0.0, agrees and taught))
    return out


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(
    ("k", "tail", "beyond"),
    [
        (None, "bucket", 0),
        (None, "bucket", 3),
        (5, "bucket", 0),
        (5, "bucket", 4),
        (5, "sampled", 0),
    ],
)
def test_they_are_the_definition(
    k: int | None, tail: str, beyond: int, weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(torch_engine.CHUNK_ELEMENTS, "cpu", 50)  # chunks of one or two rows
    logits, _, targets = problem(3, 7, 23, 2.0, k, tail=tail, beyond=beyond)
    if weights:
        targets = replace(targets, weight_N=torch.tensor([1.0, 0, 2, 0, 1, 1, 1]))
    best = (
        targets.log_probs_NK.argmax(1)
        if targets.ids_NK is None
        else targets.ids_NK.gather(1, targets.log_probs_NK.argmax(1, keepdim=True))[:, 0]
    )
    logits[torch.arange(4), best[:4]] = logits[:4].amax(1) + 1
    logits[5, 2] = -torch.inf
    found = kdcache.row_statistics(logits, targets)
    want = define(logits, targets)
    torch.testing.assert_close(
        torch.stack([found.entropy_N, found.mass_N], 1),
        torch.tensor([w[:2] for w in want], dtype=torch.float64),
        rtol=1e-13,
        atol=1e-15,
    )
    assert found.agrees_N.tolist() == [w[2] for w in want] and any(w[2] for w in want)
    # In float32 a probability is off by a few units of its own, an entropy by as many of log V.
    narrow = kdcache.row_statistics(logits.float(), single(targets))
    assert narrow.entropy_N.dtype == torch.float32
    torch.testing.assert_close(narrow.entropy_N.double(), found.entropy_N, rtol=0, atol=1e-5)
    torch.testing.assert_close(narrow.mass_N.double(), found.mass_N, rtol=1e-5, atol=0)


def test_rows_that_are_known() -> None:
    """All classes alike, one alone, two greatest logits of which the teacher prefers one, the
    greatest among the kept classes and not of all, and the other of two that are kept."""
    logits = torch.tensor(
        [[0.0] * 4, [0, 200, 0, 0], [1, 3, 3, 0], [0, 3, 2, 9], [0, 2, 3, 0]]
    ).double()
    teacher = torch.tensor([[0.0, 1, 2, 3], [0, 9, 0, 0], [0, 1, 2, 0], [0, 5, 4, 0], [0, 5, 4, 0]])
    targets = double_targets(teacher, 1.0, 2)
    found = kdcache.row_statistics(logits, targets)
    assert found.entropy_N[:2].tolist() == pytest.approx([math.log(4), 0], abs=1e-80)
    assert found.mass_N[:2].tolist() == pytest.approx([0.5, 1])
    assert found.agrees_N.tolist() == [True, True, True, False, False]
    assert kdcache.row_statistics(logits[:0], targets[:0]).mass_N.shape == (0,)


def test_no_gradient_reaches_the_student() -> None:
    logits, _, targets = problem(4, 3, 9, 2.0, 4)
    assert not kdcache.row_statistics(logits.requires_grad_(), targets).entropy_N.requires_grad


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": [[1.0]]}, "logits is .* expected floating"),
        ({"logits": torch.zeros(3, 9).long()}, "expected floating .3, V."),
        ({"logits": torch.zeros(2, 9)}, "expected floating .3, V., the rows of the targets"),
        ({"logits": torch.zeros(3, 8)}, "the student has 8 classes, the teacher 9"),
        ({"targets": torch.zeros(3, 9)}, "targets is a tensor .* expected SoftTargets"),
    ],
)
def test_refusals(changed: dict[str, Any], message: str) -> None:
    logits, _, targets = problem(4, 3, 9, 2.0, 4)
    with pytest.raises(UsageError, match=message):
        kdcache.row_statistics(**{"logits": logits, "targets": targets} | changed)
