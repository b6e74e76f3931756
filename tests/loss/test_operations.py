"""How many operations the public call issues besides its engine, forward and backward: each is a
launch on a device.

A budget as one of bytes: what is counted are calls of the dispatcher that are no views and take no
memory alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from loss_world import problem, single
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdcache.kernels.row_loss import RowLoss
from kdcache.loss import kd_loss as public

FREE = {"detach", "unsqueeze", "select", "unbind", "expand", "alias", "view", "slice", "t"}


class Operations(TorchDispatchMode):
    """The names of operations, but for those inside of `paused`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.counts = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if self.counts and name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.counts = False
        yield
        self.counts = True


def counted(
    monkeypatch: pytest.MonkeyPatch, engine: str, dtype: torch.dtype, **changed: Any
) -> list[str]:
    """The operations of a call and its backward with an engine that issues none."""
    logits, labels, targets = problem(3, 6, 40, 2.0, 5)
    operations, seen = Operations(), list[Tensor]()

    def nothing(logits: Tensor, rows: RowLoss) -> tuple[Tensor, Tensor, Tensor]:
        with operations.paused():
            seen.append(torch.zeros(len(logits), device=logits.device, requires_grad=True))
            return seen[0], torch.zeros_like(seen[0]), torch.zeros_like(seen[0])

    for name in ("fused_engine", "torch_engine"):
        monkeypatch.setattr(public, name, nothing if name.startswith(engine) else None)
    monkeypatch.setattr(public, "check_fits", lambda *_: None)
    given: dict[str, Any] = {
        "labels": labels.to("meta"),
        "targets": single(targets).to("meta"),
        **changed,
    }
    x_NV = logits.to("meta", dtype)  # it stands for a device: no value is looked at
    with operations:
        run = public.kd_loss_parts if given.pop("parts", False) else public.kd_loss
        out = run(x_NV, engine="triton" if engine == "fused" else engine, **given)
        torch.autograd.grad(out if isinstance(out, Tensor) else out.loss, seen)
    return operations.names


COUNT = ["ge", "sum"]  # of the rows with a label
SCALE = ["_to_copy", "full", "div", "le", "masked_fill_"]
HOST = ["full"]  # a scale of numbers that the host knows
LOSS = ["sum", "ones_like"]  # forward; the root of backward
FACTOR = ["stack", "max", "div", "le", "masked_fill_"]
REPORT = ["full", "sum", "sum", "div", "le", "masked_fill_", "div", "le", "masked_fill_"]


@pytest.mark.parametrize(
    ("engine", "dtype", "changed", "budget"),
    [
        ("fused", torch.bfloat16, {}, COUNT + SCALE + HOST + LOSS),
        ("fused", torch.float32, {"targets": None}, COUNT + SCALE + HOST + LOSS),
        ("fused", torch.float32, {"labels": None}, HOST + HOST + LOSS),
        ("fused", torch.bfloat16, {"reduction": "sum"}, HOST + HOST + LOSS),
        ("fused", torch.bfloat16, {"normalizer": (6, 6.0)}, HOST + HOST + LOSS),
        (
            "fused",
            torch.bfloat16,
            {"ignore_index": 3},
            ["eq", "masked_fill", *COUNT, *SCALE, *HOST, *LOSS],
        ),
        ("fused", torch.bfloat16, {"parts": True}, COUNT + SCALE + HOST + LOSS + REPORT),
        ("fused", torch.float16, {}, COUNT + SCALE + HOST + FACTOR + LOSS + ["mul", "mul"]),
        ("torch", torch.float32, {}, COUNT + SCALE + HOST + FACTOR + LOSS + ["mul", "mul"]),
    ],
)
def test_a_call_issues_few_operations(
    engine: str,
    dtype: torch.dtype,
    changed: dict[str, Any],
    budget: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert sorted(counted(monkeypatch, engine, dtype, **changed)) == sorted(budget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_quotient_of_the_host_has_the_bits_of_one_of_the_device(dtype: torch.dtype) -> None:
    from kdcache.loss.kd_loss import _scale

    g = torch.Generator().manual_seed(0)
    like = torch.zeros(1, dtype=dtype)
    weights = [0.0, 1.0, 0.3, *(torch.rand(200, generator=g, dtype=torch.float64) * 10).tolist()]
    counts = [
        0.0,
        1.0,
        3.0,
        *torch.randint(1, 10**6, (180,), generator=g).tolist(),
        *(torch.rand(20, generator=g, dtype=torch.float64) * 100).tolist(),
    ]
    for weight, count in zip(weights, counts, strict=True):
        found = _scale(weight, count, dtype, like)
        a, b = torch.tensor(weight, dtype=dtype), torch.tensor(count, dtype=dtype)
        assert found.dtype == dtype and torch.equal(
            found, a / b if count else torch.zeros((), dtype=dtype)
        )
