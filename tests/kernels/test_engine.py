"""The fused kernels behind the seam of the torch engine: the same rows asked of both, the same
answers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_world import compiled
from loss_world import PAIRS
from student_world import Net, Points, write_cache

from kdcache.errors import UsageError
from kdcache.kernels.kd_launch import powers
from kdcache.kernels.row_loss import PER_ROW, SCALES, RowLoss
from kdcache.loss.divergences import Divergence
from kdcache.loss.engines import check_engine, fused_engine
from kdcache.loss.kd_linear_loss import kd_linear_loss
from kdcache.loss.kd_loss import _of_teacher, kd_loss, kd_loss_parts
from kdcache.loss.targets import SoftTargets, targets_from_logits
from kdcache.loss.torch_engine import torch_engine


def asked() -> Iterator[tuple[str, int, RowLoss]]:
    torch.manual_seed(0)
    rows, classes = 5, 257
    sparse = targets_from_logits(torch.randn(rows, classes) * 3, temperature=2.0, k=16)
    full = targets_from_logits(torch.randn(rows, classes) * 3, temperature=4.0)
    weighted = replace(sparse, weight_N=torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0]))
    labels = torch.tensor([[0], [256], [-1], [-1], [17]])
    two, weight = torch.randint(classes, (rows, 2)), torch.rand(rows, 2)
    draws = replace(weighted, log_probs_NK=sparse.log_probs_NK + 0.2, log_tail_N=None)

    def of(teacher: SoftTargets | None, **others: Any) -> RowLoss:
        scales = {"ce_scale": torch.tensor(0.25), "kd_scale": torch.tensor(1.0)}
        said = {} if teacher is None else _of_teacher(teacher)
        return RowLoss(classes, **{"labels_NJ": labels, **scales, **said, **others})

    def named(name: str, tail: str = "bucket") -> Divergence:
        return Divergence(name, 0.3 if name == "jsd" else None, tail)

    for divergence, tail in PAIRS:
        teacher = draws if tail == "sampled" else weighted
        yield f"{divergence}-{tail}", 257, of(teacher, divergence=named(divergence, tail))
    for divergence in ("reverse_kl", "jsd", "tv"):
        rows_ = of(full, divergence=named(divergence), inplace=True)
        yield f"full-{divergence}", 260, rows_
    yield "mixup-padded", 264, of(sparse, labels_NJ=two, label_weight_NJ=weight, inplace=True)
    yield "full", 260, of(full, inplace=True)
    for name, teacher, width in (("capped", weighted, 257), ("capped full", full, 260)):
        yield name, width, of(teacher, logit_scale=0.6, softcap=4.0, inplace=True)
    yield "labels only", 257, of(None, kd_scale=None)
    yield "reported only", 257, of(sparse, ce_scale=None)


@pytest.mark.parametrize(
    ("width", "rows", "dtype"),
    [
        pytest.param(w, r, dtype, id=f"{name}-{dtype}")
        for name, w, r in asked()
        for dtype in (
            (torch.float32,)
            if r.divergence.name != "forward_kl"
            else (torch.float32, torch.bfloat16)
        )
    ],
)
def test_the_kernels_answer_as_the_torch_engine_does(
    width: int, rows: RowLoss, dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(1)
    x = (torch.randn(5, width) * 3).to(dtype).to(device)
    factor = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.25], device=device)
    answers = []
    for engine in (torch_engine, fused_engine):
        logits = (leaf := x.clone().requires_grad_()) * 1
        out = engine(logits, _to(rows, device))
        out[0].backward(factor)
        answers.append([t.detach() for t in out] + [leaf.grad])
    # two exponentials' and a division's, see `allowed`
    more = 4 * 2.0**-22 if compiled() else 0.0
    unit = 3 * torch.finfo(dtype).eps + more
    for expected, found in zip(*answers, strict=True):
        # A divergence is a sum of terms of about 1 nat that cancel: its unit is that of 1.
        size = float(expected.abs().max().clamp(min=1.0 if expected.dim() == 1 else 1e-3))
        tolerance = unit if expected.dtype == dtype else 1e-6 + more
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * size)


def _to(rows: RowLoss, device: str) -> RowLoss:
    return rows.each(lambda tensor: tensor.to(device), (*PER_ROW, *SCALES))


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1.0, (1, 1)),
        (2.0, (2, 1)),
        (0.5, (1, 2)),
        (1.5, (3, 2)),
        (4.0, (4, 1)),
        (0.75, (3, 4)),
        (5.0, None),
        (1.37, None),
        (0.2, None),
        (4 / 3, (4, 3)),
        (2.0000001, None),
    ],
)
def test_which_temperatures_share_an_exponential(
    temperature: float, expected: tuple[int, int] | None
) -> None:
    assert powers(temperature) == expected
    if expected is not None:
        assert float(Fraction(*expected)) == temperature


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kd_loss_is_the_same_on_both_engines(
    reduction: str, dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(2)
    x = (torch.randn(6, 40) * 2).to(dtype).to(device)
    labels = torch.tensor([3, -100, 39, 0, -1, 7], device=device)
    targets = targets_from_logits(torch.randn(6, 40, device=device) * 2, temperature=2.0, k=8)
    answers = []
    for engine in ("torch", "triton"):
        leaf = x.clone().requires_grad_()
        parts = kd_loss_parts(leaf, labels, targets, alpha=0.7, reduction=reduction, engine=engine)
        parts.loss.sum().backward()
        answers.append(
            [parts.loss.detach(), parts.ce, parts.kd, parts.ce_count, parts.kd_count, leaf.grad]
        )
    for expected, found in zip(*answers, strict=True):
        unit = 8 * torch.finfo(expected.dtype).eps + (4 * 2.0**-22 if compiled() else 0.0)
        torch.testing.assert_close(
            found, expected, rtol=unit, atol=unit * float(expected.abs().max())
        )


@pytest.mark.parametrize(
    ("dtype", "classes", "k", "said"),
    [
        (torch.float64, 40, 8, "the logits are torch.float64"),
        (torch.float32, 20_000, None, "a teacher over all of 20000 classes"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_and_not_computed_otherwise(
    dtype: torch.dtype, classes: int, k: int | None, said: str
) -> None:
    x = torch.zeros(2, classes, dtype=dtype)
    targets = targets_from_logits(torch.zeros(2, classes), temperature=1.0, k=k)
    with pytest.raises(UsageError, match=f"engine 'triton': {said}.*use engine 'torch'"):
        kd_loss(x, None, targets, alpha=1.0, engine="triton")


def test_without_a_device_the_kernels_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdcache.student.train import train_student

    monkeypatch.setattr("kdcache.kernels.kd_loss_rows.INTERPRETED", False)
    assert check_engine("auto", torch.device("cpu")) == "torch"
    cache = write_cache(tmp_path / "cache", Points(16), Net(8))
    with pytest.raises(UsageError, match="need a CUDA device, and this is cpu; use engine 'torch'"):
        train_student(
            student=Net(4),
            cache=cache,
            data=Points(16),
            out=tmp_path / "run",
            epochs=1,
            engine="triton",
            device="cpu",
        )
    assert not (tmp_path / "run").exists()


def test_a_run_on_the_kernels_is_the_run_on_torch(tmp_path: Path, device: str) -> None:
    from kdcache.student.train import train_student

    cache = write_cache(tmp_path / "cache", Points(32), Net(8, seed=1))
    losses = {
        engine: train_student(
            student=Net(4),
            cache=cache,
            data=Points(32),
            out=tmp_path / engine,
            epochs=2,
            batch_size=16,
            engine=engine,
            device=device,
        ).training["loss"]
        for engine in ("torch", "triton")
    }
    assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-5)


def test_without_triton_the_kernels_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """None in sys.modules is how an import fails where a package is not installed."""
    monkeypatch.setitem(sys.modules, "kdcache.kernels.kd_loss_rows", None)
    logits, head, labels = torch.randn(3, 7), torch.randn(7, 4), torch.tensor([1, -1, 6])
    for call in (
        lambda engine: kd_loss(logits, labels, engine=engine),
        lambda engine: kd_linear_loss(logits[:, :4], head, labels, engine=engine),
    ):
        assert call("torch").isfinite()
        with pytest.raises(
            UsageError, match=r"engine 'triton': triton cannot be imported .*use engine 'torch'"
        ):
            call("triton")
