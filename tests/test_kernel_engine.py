"""The fused kernels behind the seam of the torch engine: the same rows asked of both, the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcache.kernels.kd_launch import powers
from kdcache.kernels.kd_loss import kd_loss_rows
from kdcache.student.engine import RowLoss, torch_engine
from kdcache.student.targets import SoftTargets, targets_from_logits


def fused_engine(logits: Tensor, rows: RowLoss) -> tuple[Tensor, Tensor, Tensor]:
    """An `Engine`: RowLoss in the words of the kernels."""
    given: dict[str, Any] = {}
    if rows.targets is not None:
        t = rows.targets
        given = {"ids": t.ids_NK, "log_probs": t.log_probs_NK, "log_tail": t.log_tail_N, "row_weight": t.weight_N,
                 "temperature": t.temperature, "divergence": rows.divergence, "tail": rows.tail}
    return kd_loss_rows(logits, num_classes=rows.num_classes, labels=rows.labels_NJ, label_weight=rows.label_weight_NJ,
                        ce_scale=rows.ce_scale, kd_scale=rows.kd_scale, inplace=rows.inplace, **given)


def asked() -> Iterator[tuple[str, int, RowLoss]]:
    torch.manual_seed(0)
    rows, classes = 5, 257
    sparse = targets_from_logits(torch.randn(rows, classes) * 3, temperature=2.0, k=16)
    full = targets_from_logits(torch.randn(rows, classes) * 3, temperature=4.0)
    weighted = SoftTargets(2.0, classes, sparse.ids_NK, sparse.log_probs_NK, sparse.log_tail_N,
                           torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0]))
    labels = torch.tensor([[0], [256], [-1], [-1], [17]])
    two, weight = torch.randint(classes, (rows, 2)), torch.rand(rows, 2)
    ce, kd = torch.tensor(0.25), torch.tensor(1.0)
    for tail in ("bucket", "renormalise", "conditional"):
        yield tail, 257, RowLoss(classes, labels, None, weighted, "forward_kl", tail, ce, kd, False)
    yield "mixup-padded", 264, RowLoss(classes, two, weight, sparse, "forward_kl", "bucket", ce, kd, True)
    yield "full", 260, RowLoss(classes, labels, None, full, "forward_kl", "bucket", ce, kd, True)
    yield "labels only", 257, RowLoss(classes, labels, None, None, "forward_kl", "bucket", ce, None, False)
    yield "reported only", 257, RowLoss(classes, labels, None, sparse, "forward_kl", "bucket", None, kd, False)


@pytest.mark.parametrize(("width", "rows"), [pytest.param(w, r, id=name) for name, w, r in asked()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_answer_as_the_torch_engine_does(width: int, rows: RowLoss, dtype: torch.dtype,
                                                     device: str) -> None:
    torch.manual_seed(1)
    x = (torch.randn(5, width) * 3).to(dtype).to(device)
    factor = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.25], device=device)
    answers = []
    for engine in (torch_engine, fused_engine):
        logits = (leaf := x.clone().requires_grad_()) * 1
        out = engine(logits, _to(rows, device))
        out[0].backward(factor)
        answers.append([t.detach() for t in out] + [leaf.grad])
    unit = 3 * torch.finfo(dtype).eps
    for expected, found in zip(*answers, strict=True):
        size = float(expected.abs().max().clamp(min=1e-3))
        tolerance = unit if expected.dtype == dtype else 1e-6
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * size)


def _to(rows: RowLoss, device: str) -> RowLoss:
    moved = {n: v.to(device) if isinstance(v := getattr(rows, n), Tensor | SoftTargets) else v
             for n in RowLoss.__dataclass_fields__}
    return RowLoss(**moved)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, (1, 1)), (2.0, (2, 1)), (0.5, (1, 2)), (1.5, (3, 2)),
                                                       (4.0, (4, 1)), (0.75, (3, 4)), (5.0, None), (1.37, None),
                                                       (0.2, None), (4 / 3, (4, 3)), (2.0000001, None)])
def test_which_temperatures_share_an_exponential(temperature: float, expected: tuple[int, int] | None) -> None:
    assert powers(temperature) == expected
    if expected is not None:
        assert float(Fraction(*expected)) == temperature
