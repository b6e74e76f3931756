"""DistributedDataParallel on two gloo processes gives the gradient of one, for both calls of the
loss.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_world import problem
from torch import Tensor, nn

import kdcache
from kdcache.loss.targets import SoftTargets

ROWS, WIDTH, CLASSES, RANKS = 9, 6, 11, 2
CUT = (slice(0, 2), slice(2, ROWS))  # rows of a rank: unequal, as are the counts
Batch = tuple[Tensor, Tensor, SoftTargets]


class Student(nn.Module):
    """Returns logits, or for `behind_head` what the head would be given."""

    def __init__(self, behind_head: bool) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(WIDTH, WIDTH).double(), nn.Linear(WIDTH, CLASSES).double()
        self.behind_head = behind_head

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.trunk(x).tanh()
        return hidden if self.behind_head else self.head(hidden)


def batch() -> Batch:
    _, labels, targets = problem(2, ROWS, CLASSES, 2.0, 4)
    labels[1], labels[5] = -100, -1
    weight = torch.linspace(0.5, 2, ROWS, dtype=torch.float64)
    return (
        torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(7)).double(),
        labels,
        replace(targets, weight_N=weight),
    )


def student(behind_head: bool) -> Student:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Student(behind_head)


def loss_of(model: nn.Module, inner: Student, given: Batch, **options: Any) -> Tensor:
    x, labels, targets = given
    if inner.behind_head:
        return kdcache.kd_linear_loss(
            model(x), inner.head.weight, labels, targets, bias=inner.head.bias, **options
        )
    return kdcache.kd_loss(model(x), labels, targets, **options)


def gradients(inner: Student) -> list[Tensor]:
    return [p.grad for p in inner.parameters() if p.grad is not None]


def run_rank(rank: int, folder: Path, behind_head: bool) -> None:
    """What README says of several ranks: counts all-reduced, the loss times the world size."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=RANKS
    )
    inner = student(behind_head)
    model = nn.parallel.DistributedDataParallel(inner)
    x, labels, targets = batch()
    mine = x[CUT[rank]], labels[CUT[rank]], targets[CUT[rank]]
    counts = kdcache.row_counts(mine[1], mine[2])
    for count in counts:
        dist.all_reduce(count)
    (dist.get_world_size() * loss_of(model, inner, mine, normalizer=counts)).backward()
    torch.save(gradients(inner), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("behind_head", [False, True])
def test_two_ranks_have_the_gradient_of_one_process(behind_head: bool, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=run_rank, args=(rank, tmp_path, behind_head))
        for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        assert process.exitcode == 0
    alone = student(behind_head)
    loss_of(alone, alone, batch()).backward()
    want = gradients(alone)
    assert len(want) == 4 and all(bool(g.abs().sum() > 0) for g in want)
    for rank in range(RANKS):
        torch.testing.assert_close(
            torch.load(tmp_path / f"{rank}.pt"), want, rtol=1e-12, atol=1e-14
        )
