"""An LM head with rows of every kind, the same in whole logits by autograd, and a record of what
torch allocates.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import kernel_world as world
import torch
from kernel_world import Case, Problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdcache.kernels import kd_linear
from kdcache.kernels.kd_chunks import row_stride
from kdcache.kernels.row_loss import Engine


@dataclass(frozen=True)
class Head:
    """Leaves that nothing has touched, and what the loss is asked; `problem` has it for the
    definition.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    keywords: dict[str, Any]
    problem: Problem

    def leaves(self, device: str) -> list[Tensor]:
        """Copies of hidden, weight and, if there is one, bias, that want gradients."""
        head = (self.hidden, self.weight, self.bias)
        return [t.to(device, copy=True).requires_grad_() for t in head if t is not None]

    def to(self, dtype: torch.dtype) -> Head:
        """Hidden states and head rounded to another dtype."""
        return replace(
            self,
            hidden=self.hidden.to(dtype),
            weight=self.weight.to(dtype),
            bias=None if self.bias is None else self.bias.to(dtype),
        )

    def memory(self, chunks: int) -> int:
        """Bytes with which the rows go in so many chunks (of fewer than 128 rows)."""
        row = row_stride(len(self.weight)) * self.weight.element_size()
        return row * max(-(-len(self.hidden) // chunks), 1)


def head(
    rows: int = 7,
    width: int = 16,
    classes: int = 1000,
    *,
    kept: int = 8,
    temperature: float = 2.0,
    labels: int = 1,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    every: bool = False,
    padding: bool = True,
    tail: str = "bucket",
    beyond: int = 0,
) -> Head:
    """Rows with label and teacher, with none, with a label alone, with a teacher alone, and so on;
    `every`: all both.

    `padding`: one of the ids kept of the first row is none. `beyond`: classes that the teacher has
    not.

    Normalised as a training loop does: by counts, in tensors that stay on the device.
    """
    case = Case(
        rows=rows,
        num_classes=classes,
        kept=kept,
        temperature=temperature,
        dtype=dtype,
        tail=tail,
        beyond=beyond,
    )
    problem = world.problem(case)
    if not padding:
        _fill(problem.keywords, torch.promote_types(dtype, torch.float32))
    hidden = torch.randn(rows, width).to(dtype)
    weight = (torch.randn(classes, width) * 3 / width**0.5).to(dtype)
    kind = torch.arange(rows) % 4
    labelled, taught = (
        torch.ones(2, rows, dtype=torch.bool)
        if every
        else torch.stack([(kind == 0) | (kind == 2), (kind == 0) | (kind == 3)])
    )
    ids = torch.randint(classes, (rows, labels)).masked_fill_(~labelled[:, None], -100)
    keywords = problem.keywords | {
        "labels": ids[:, 0] if labels == 1 else ids,
        "label_weight": None if labels == 1 else torch.rand(rows, labels),
        "row_weight": (torch.rand(rows) + 0.5) * taught,
        "ce_scale": 0.5 / labelled.sum().clamp(min=1),
        "kd_scale": 0.5 * temperature**2 / taught.sum().clamp(min=1),
    }
    return Head(
        hidden,
        weight,
        torch.randn(classes).to(dtype) if bias else None,
        keywords,
        replace(problem, keywords=keywords, factor=torch.ones(rows)),
    )


def _fill(keywords: dict[str, Any], dtype: torch.dtype) -> None:
    """An id for the padding, and the teacher a distribution again."""
    ids, log_probs, log_tail = (
        keywords["ids"],
        keywords["log_probs"].to(dtype),
        keywords["log_tail"].to(dtype),
    )
    free = next(i for i in range(ids.shape[1] + 1) if i not in ids[0].tolist())
    log_probs[ids < 0] = -4.0
    ids[ids < 0] = free
    total = torch.logaddexp(torch.logsumexp(log_probs, 1), log_tail)
    keywords.update(log_probs=log_probs - total[:, None], log_tail=log_tail - total)


def kd_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    memory: int = 512 * 10**6,
    engine: Engine | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels' loss behind a head, by the words of these tests."""
    rows = world.asked(hidden, {"num_classes": len(weight), **keywords})
    return kd_linear.kd_linear_loss(hidden, weight, bias, rows, memory=memory, engine=engine)


Found = dict[str, Tensor]  # loss, ce, kd, and gradients hidden, weight, bias


def linear(
    head: Head,
    device: str,
    memory: int,
    *,
    factor: float = 1.0,
    wants: str = "hidden weight bias",
    **changed: Any,
) -> Found:
    """What kd_linear_loss gives, and the gradients of `factor` times its loss, on the CPU."""
    leaves = _leaves(head, device, head.weight.dtype, wants)
    loss, ce, kd = kd_linear_loss(
        leaves["hidden"],
        leaves["weight"],
        leaves.get("bias"),
        memory=memory,
        **world.on(device, head.keywords | changed),
    )
    return _found(leaves, loss, ce, kd, factor)


def whole(
    head: Head,
    dtype: torch.dtype,
    *,
    factor: float = 1.0,
    chunks: int = 1,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Found:
    """The same by whole logits in `dtype` and autograd; the loss from the definition in float32, or
    float64.

    `chunks`: of so many products, as a product of few rows may add in another, worse order.
    """
    leaves = _leaves(head, "cpu", dtype, "hidden weight bias")
    wide = torch.promote_types(dtype, torch.float32)
    logits = torch.cat([h @ leaves["weight"].t() for h in leaves["hidden"].chunk(max(chunks, 1))])
    logits = logits + leaves["bias"] if "bias" in leaves else logits
    y = logits.to(wide) * logit_scale
    y = y if softcap is None else softcap * torch.tanh(y / softcap)
    loss, ce, kd, slope = world.define(replace(head.problem, logits=y.detach().clone()), wide)
    # The definition has its gradient at the logits: the rest is autograd's.
    linear = loss.sum() + (slope * (y - y.detach())).sum()
    return _found(leaves, linear, ce, kd, factor)


def _leaves(head: Head, device: str, dtype: torch.dtype, wants: str) -> dict[str, Tensor]:
    given = {"hidden": head.hidden, "weight": head.weight, "bias": head.bias}
    return {
        name: t.to(device, dtype, copy=True).requires_grad_(name in wants.split())
        for name, t in given.items()
        if t is not None
    }


def _found(leaves: dict[str, Tensor], loss: Tensor, ce: Tensor, kd: Tensor, factor: float) -> Found:
    if loss.requires_grad:
        (loss * factor).backward()
    found = {"loss": loss, "ce": ce, "kd": kd} | {
        k: t.grad for k, t in leaves.items() if t.grad is not None
    }
    return {name: t.detach().cpu() for name, t in found.items()}


def error(found: Tensor, truth: Tensor) -> float:
    """Largest error, relative to the largest entry."""
    if not truth.numel():
        return 0.0
    assert bool(found.isfinite().all())
    return float((found.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


class Allocations(TorchDispatchMode):
    """Every operation, and of the storages they made: the largest of shapes not `apart`, and the
    most bytes alive.
    """

    def __init__(self, *apart: tuple[int, ...]) -> None:
        super().__init__()
        self.apart, self.operations = set(apart), Counter[str]()
        self.largest, self.alive, self.peak = 0, 0, 0
        self.seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):  # not seen before: made outside, and not counted
                self.seen.setdefault(tensor.untyped_storage()._cdata, None)
        out = func(*args, **(kwargs or {}))
        self.operations[func.overloadpacket.__name__] += 1
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._record(tensor)
        return out

    def _record(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.seen:
            return
        bytes_ = storage.nbytes()
        # The Python object of a storage lives as long as the storage while something in Python
        # refers to it.
        self.seen[key] = weakref.finalize(storage, self._freed, key, bytes_)
        self.alive += bytes_
        self.peak = max(self.peak, self.alive)
        if tuple(tensor.shape) not in self.apart:
            self.largest = max(self.largest, bytes_)

    def _freed(self, key: int, bytes_: int) -> None:
        self.alive -= bytes_
        del self.seen[key]
