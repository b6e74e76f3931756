"""The distillation loss behind an LM head, forward and backward, against its three bare products
and rivals, in turns.

The floor is operations: 6 N V H for logits and both gradients; at N = 8192, H = 4096, V = 128,256
that is 25.8 TFLOP. "three bare products" is that and nothing else, over whole logits, and the roof
here. The bytes are below it: in chunks of R rows, N V (5 b) of logits (written, read and
overwritten by the loss, read by two products), and for each chunk 2 V H b of the head and 8 V H of
its float32 gradient, and once 6 V H to round it; for logits of b = 2 bytes and 1664 rows, 43 GB.
"whole logits" is torch's product, the fused kernel over its logits in place, and autograd. Liger's
chunked distillation loss has a teacher with a head of its own, of the same size, whose logits it
computes: 2 N V H more, a dense teacher instead of ours of K classes, and another divergence; it
stands here as what people use.

On a CPU the kernels cannot be timed: there the torch engine is raced, in chunks and over whole
logits.

    python -m kdcache.bench.lm_head_speed [--quick]
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdcache.bench.kd_contenders import ALPHA, CHECKED_ROWS, sparse_loss
from kdcache.bench.race import command, finish, machine, table
from kdcache.bench.track import Entrant, Track, choose_device
from kdcache.kernels.kd_chunks import chunk_rows
from kdcache.kernels.kd_linear import kd_linear_loss
from kdcache.kernels.row_loss import Engine, RowLoss
from kdcache.loss.engines import fused_engine
from kdcache.loss.kd_linear_loss import memory_size
from kdcache.loss.torch_engine import torch_engine

SAY_CPU = "the kernels were not timed: they need a CUDA device, and this run is on the CPU"
BARE = "three bare products"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """One case, and the budgets of memory it is run with."""

    rows: int = 8192
    width: int = 4096
    classes: int = 128_256
    kept: int = 64
    temperature: float = 2.0
    dtype: torch.dtype = torch.bfloat16
    budgets: tuple[str, ...] = ("256 MB", "512 MB", "1 GB")
    rounds: int = 11
    copy_bytes: int = 2**31
    flush_bytes: int = 2**29


SIZES = {
    "cuda": Sizes(),
    "cpu": Sizes(
        rows=512,
        width=256,
        classes=8000,
        dtype=torch.float32,
        budgets=("2 MB", "8 MB"),
        rounds=5,
        copy_bytes=2**26,
        flush_bytes=2**26,
    ),
}
SMALL: dict[str, Any] = {
    "rows": 64,
    "width": 32,
    "classes": 1000,
    "kept": 8,
    "rounds": 2,
    "copy_bytes": 2**16,
    "flush_bytes": 2**16,
}
QUICK = {
    "cuda": Sizes(**SMALL, budgets=("64 KB",)),
    "cpu": Sizes(**SMALL, budgets=("64 KB",), dtype=torch.float32),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """Hidden states, a head, labels and a sparse teacher."""

    hidden_NH: Tensor
    weight_VH: Tensor
    rows: RowLoss

    @property
    def labels_N(self) -> Tensor:
        assert self.rows.labels_NJ is not None
        return self.rows.labels_NJ[:, 0]

    @staticmethod
    def of(sizes: Sizes, device: torch.device) -> Problem:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, dtype=dtype, device=device, generator=generator).mul_(scale)

        rows, classes, kept = sizes.rows, sizes.classes, sizes.kept
        start_N1 = torch.randint(classes, (rows, 1), device=device, generator=generator)
        ids_NK = (start_N1 + classes // kept * torch.arange(kept, device=device)) % classes
        outcomes = torch.log_softmax(normal(rows, kept + 1, scale=3), -1)
        labels_N = torch.randint(classes, (rows,), device=device, generator=generator)
        scales = torch.tensor(
            [(1 - ALPHA) / rows, ALPHA * sizes.temperature**2 / rows], device=device
        ).unbind()
        return Problem(
            normal(rows, sizes.width, dtype=sizes.dtype).requires_grad_(),
            normal(
                classes, sizes.width, scale=3 * sizes.width**-0.5, dtype=sizes.dtype
            ).requires_grad_(),
            RowLoss(
                classes,
                labels_N[:, None],
                ids_NK=ids_NK,
                log_probs_NK=outcomes[:, :-1].contiguous(),
                log_tail_N=outcomes[:, -1].contiguous(),
                temperature=sizes.temperature,
                ce_scale=scales[0],
                kd_scale=scales[1],
            ),
        )


Gradients = tuple[Tensor, ...]


def chunked(problem: Problem, engine: Engine, memory: str, frozen: bool = False) -> Gradients:
    """`kd_linear_loss`; `frozen`: the head gets no gradient."""
    weight_VH = problem.weight_VH.detach() if frozen else problem.weight_VH
    loss, _, _ = kd_linear_loss(
        problem.hidden_NH, weight_VH, None, problem.rows, memory=memory_size(memory), engine=engine
    )
    return torch.autograd.grad(
        loss, (problem.hidden_NH,) if frozen else (problem.hidden_NH, weight_VH)
    )


def whole(problem: Problem, engine: Engine) -> Gradients:
    """The engine in place over all logits at once, the rest by autograd."""
    logits_NV = problem.hidden_NH @ problem.weight_VH.t()
    loss_N, _, _ = engine(logits_NV, replace(problem.rows, inplace=True))
    return torch.autograd.grad(loss_N.sum(), (problem.hidden_NH, problem.weight_VH))


def bare_products(problem: Problem) -> Gradients:
    """Logits, and both gradients as if the logits were theirs."""
    hidden_NH, weight_VH = problem.hidden_NH.detach(), problem.weight_VH.detach()
    logits_NV = hidden_NH @ weight_VH.t()
    return logits_NV @ weight_VH, logits_NV.t() @ hidden_NH


def liger(problem: Problem, teacher_NH: Tensor, teacher_VH: Tensor) -> Gradients:
    """Liger's chunked loss: cross-entropy and JSD to a teacher of hidden states and a head."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - ALPHA,
        weight_soft_loss=ALPHA,
        temperature=problem.rows.temperature,
    )(problem.hidden_NH, problem.weight_VH, teacher_NH, teacher_VH, problem.labels_N)
    return torch.autograd.grad(
        loss[0] if isinstance(loss, tuple) else loss, (problem.hidden_NH, problem.weight_VH)
    )


def contenders(problem: Problem, sizes: Sizes) -> dict[str, Entrant]:
    """All that can run on the problem's device: the kernels on CUDA only."""
    cuda = problem.hidden_NH.is_cuda
    engine: Engine = fused_engine if cuda else torch_engine
    own: dict[str, Callable[[], Gradients]] = {
        f"kd_linear, {budget}": partial(chunked, problem, engine, budget)
        for budget in sizes.budgets
    }
    own[f"kd_linear, {sizes.budgets[-1]}, frozen head"] = partial(
        chunked, problem, engine, sizes.budgets[-1], True
    )
    own["whole logits"] = partial(whole, problem, engine)
    found = {name: Entrant(run, own=True) for name, run in own.items()}
    found[BARE] = Entrant(partial(bare_products, problem), own=True)
    if cuda and has_liger():
        teacher = torch.randn_like(problem.hidden_NH), torch.randn_like(problem.weight_VH)
        found["liger, dense teacher"] = Entrant(partial(liger, problem, *teacher))
    return found


def has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def gradient_error(problem: Problem, found_NH: Tensor) -> float:
    """How far a few rows of the hidden states' gradient are from float64, over the greatest entry."""
    rows = torch.linspace(0, len(found_NH) - 1, CHECKED_ROWS, device=found_NH.device).long()
    asked, weight_VH = problem.rows.rows(rows), problem.weight_VH.detach().double()
    assert asked.ids_NK is not None and asked.log_probs_NK is not None
    assert asked.log_tail_N is not None
    hidden = problem.hidden_NH.detach()[rows].double().requires_grad_()
    value = sparse_loss(
        hidden @ weight_VH.t(),
        problem.labels_N[rows],
        asked.ids_NK,
        asked.log_probs_NK.double(),
        asked.log_tail_N.double(),
        asked.temperature,
    )
    truth = torch.autograd.grad(value * (len(rows) / len(found_NH)), hidden)[0]
    return float((found_NH[rows].double() - truth).abs().max() / truth.abs().max())


def operations(sizes: Sizes) -> int:
    """Of the three products."""
    return 6 * sizes.rows * sizes.classes * sizes.width


def model_bytes(sizes: Sizes) -> int:
    """The least that moves, with chunks of the middle budget."""
    budget = memory_size(sizes.budgets[len(sizes.budgets) // 2])
    step = chunk_rows(sizes.rows, sizes.classes, sizes.dtype.itemsize, budget)
    chunks, head, size = -(-sizes.rows // step), sizes.classes * sizes.width, sizes.dtype.itemsize
    logits = 5 * sizes.rows * sizes.classes * size
    # The first chunk writes the float32 gradient without reading it; at the end it is read and
    # written rounded.
    return (
        logits
        + chunks * head * (2 * size + 8)
        - 4 * head
        + (4 + size) * head
        + 3 * sizes.rows * sizes.width * size
    )


def lm_head_speed(
    quick: bool = False, rounds: int | None = None, device: str | None = None
) -> dict[str, Any]:
    """Race and return one JSON object: times, rates, peak memory, errors, machine.

    "times_bare" is the median time over that of the three bare products. UsageError for a device
    that is not there.
    """
    place = choose_device(device)
    sizes = (QUICK if quick else SIZES)[place.type]
    rounds = sizes.rounds if rounds is None else rounds
    problem = Problem.of(sizes, place)
    entrants = contenders(problem, sizes)
    result = Track(place, sizes.copy_bytes, sizes.flush_bytes).race(
        entrants, rounds, model_bytes(sizes)
    )
    bare = result["contenders"][BARE]
    for name, found in result["contenders"].items():
        if "failed" in found:
            continue
        found["flop_per_second"] = (
            operations(sizes) * (2 / 3 if "frozen" in name else 1) / found["seconds"]["median"]
        )
        found["times_bare"] = (
            None if "failed" in bare else found["seconds"]["median"] / bare["seconds"]["median"]
        )
        if entrants[name].own and name != BARE:
            gradients = entrants[name].run()
            assert isinstance(gradients, tuple)
            error = gradient_error(problem, gradients[0])
            found["gradient_error"] = error if math.isfinite(error) else None
            if not error <= 32 * torch.finfo(sizes.dtype).eps:
                result["errors"].append(f"{name}: its gradient is off by {error}")
    return {
        "bench": "kd_linear",
        "command": command(),
        "machine": machine(),
        "device": str(place),
        "rounds": rounds,
        "rows": sizes.rows,
        "width": sizes.width,
        "num_classes": sizes.classes,
        "k": sizes.kept,
        "temperature": sizes.temperature,
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "kernels_timed": place.type == "cuda",
        "note": None if place.type == "cuda" else SAY_CPU,
        "liger": has_liger(),
        "operations": operations(sizes),
        "model_bytes": model_bytes(sizes),
        **result,
    }


def render(result: Mapping[str, Any]) -> str:
    """A row for each contender, then what failed and what to know."""
    rows, failed = [], []
    for name, found in result["contenders"].items():
        if "failed" in found:
            failed.append(f"{name} could not run: {found['failed']}")
            continue
        peak = found["peak_bytes"]
        rows.append(
            [
                name,
                found["seconds"]["median"] * 1e3,
                found["times_bare"] or "-",
                found["flop_per_second"] / 1e12,
                "-" if peak is None else round(peak / 1e6),
                found.get("gradient_error", "-"),
            ]
        )
    heads = [
        f"N={result['rows']} H={result['width']} V={result['num_classes']} {result['dtype']}",
        "ms",
        "x bare",
        "TFLOP/s",
        "peak MB",
        "error",
    ]
    notes = [
        *failed,
        *result["errors"],
        *([result["note"]] if result["note"] else []),
        *(
            []
            if result["liger"] or not result["kernels_timed"]
            else ["liger-kernel is not installed: not raced"]
        ),
    ]
    return "\n".join([table(heads, rows), *notes])


if __name__ == "__main__":
    finish(lm_head_speed(quick="--quick" in sys.argv[1:]), render)
