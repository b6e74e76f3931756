"""Who is raced over the distillation loss: the fused kernel, the torch engine, the definition,
compiled, and Liger.

All are asked for the same: (1 - alpha) mean CE + alpha T^2 mean KL of N rows of logits, and its
gradient with respect to the logits, which is what each returns. Their teacher is sparse, K classes
and a tail, but for Liger's, which gives the gradient in units of (1 - alpha) / N.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kdcache.bench.track import Entrant
from kdcache.kernels.row_loss import RowLoss
from kdcache.loss import definitions
from kdcache.loss import kd_loss as public
from kdcache.loss.targets import SoftTargets

ALPHA = 0.5
CHECKED_ROWS = 4


@dataclass(frozen=True, slots=True)
class Problem:
    """N rows: `logits_NV` is what contenders differentiate, and may destroy; `kept_NV` puts it
    back.
    """

    logits_NV: Tensor
    kept_NV: Tensor
    labels_N: Tensor
    targets: SoftTargets

    def restore(self) -> None:
        self.logits_NV.detach().copy_(self.kept_NV)


def make_problem(
    rows: int, classes: int, kept: int, temperature: float, dtype: torch.dtype, device: torch.device
) -> Problem:
    """Random logits and a random sparse teacher; a third of the labels are among its classes."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator).mul_(3)

    kept_NV = normal(rows, classes, dtype=dtype)
    start_N1 = torch.randint(classes, (rows, 1), device=device, generator=generator)
    # distinct, all over a row
    ids_NK = (start_N1 + classes // kept * torch.arange(kept, device=device)) % classes
    outcomes = torch.log_softmax(normal(rows, kept + 1), -1)
    targets = SoftTargets(
        temperature, classes, ids_NK, outcomes[:, :-1].contiguous(), outcomes[:, -1].contiguous()
    )
    labels_N = torch.randint(classes, (rows,), device=device, generator=generator)
    labels_N[::3] = ids_NK[::3, 0]
    return Problem(kept_NV.clone().requires_grad_(), kept_NV, labels_N, targets)


def sparse_loss(
    logits_NV: Tensor,
    labels_N: Tensor,
    ids_NK: Tensor,
    log_q_NK: Tensor,
    log_tail_N: Tensor,
    temperature: float,
) -> Tensor:
    """The loss as it is defined, in float32 or, for float64 logits, float64."""
    x_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    ce_N = definitions.cross_entropy(
        x_NV, labels_N[:, None], torch.ones_like(labels_N, dtype=x_NV.dtype)[:, None]
    )
    kd_N = definitions.bucket(x_NV, ids_NK, log_q_NK, log_tail_N, temperature)
    return ((1 - ALPHA) * ce_N + ALPHA * temperature**2 * kd_N).mean()


def define(problem: Problem, loss: Callable[..., Tensor] = sparse_loss) -> Tensor:
    """The definition, as autograd differentiates it; or the same compiled."""
    t = problem.targets
    value = loss(
        problem.logits_NV, problem.labels_N, t.ids_NK, t.log_probs_NK, t.log_tail_N, t.temperature
    )
    return torch.autograd.grad(value, problem.logits_NV)[0]


def engine(problem: Problem, inplace: bool = False, name: str = "torch") -> Tensor:
    """`kdcache.kd_loss` with the torch engine, or with another."""
    value = public.kd_loss(
        problem.logits_NV,
        problem.labels_N,
        problem.targets,
        alpha=ALPHA,
        engine=name,
        inplace=inplace,
    )
    return torch.autograd.grad(value, problem.logits_NV)[0]


@dataclass(frozen=True, slots=True)
class Fused:
    """The fused kernel: what it takes, ready on the device. 1 / N and T^2 are in its scales."""

    problem: Problem
    ids_NK: Tensor
    ce_scale: Tensor
    kd_scale: Tensor

    @staticmethod
    def of(problem: Problem) -> Fused:
        t, rows = problem.targets, len(problem.labels_N)
        assert t.ids_NK is not None
        scales = torch.tensor(
            [(1 - ALPHA) / rows, ALPHA * t.temperature**2 / rows], device=problem.labels_N.device
        )
        return Fused(problem, t.ids_NK.to(torch.int32), *scales.unbind())

    def __call__(self, inplace: bool, parts: int | None = None) -> Tensor:
        from kdcache.kernels.kd_loss_rows import kd_loss_rows

        p, t = self.problem, self.problem.targets
        rows = RowLoss(
            p.logits_NV.shape[1],
            p.labels_N[:, None],
            ids_NK=self.ids_NK,
            log_probs_NK=t.log_probs_NK,
            log_tail_N=t.log_tail_N,
            temperature=t.temperature,
            ce_scale=self.ce_scale,
            kd_scale=self.kd_scale,
            inplace=inplace,
        )
        loss_N, _, _ = kd_loss_rows(p.logits_NV, rows, parts=parts)
        return torch.autograd.grad(loss_N.sum(), p.logits_NV)[0]


def dense_teacher(targets: SoftTargets, dtype: torch.dtype) -> Tensor:
    """Probabilities of all classes [N, V]: the tail is spread evenly over what was not kept."""
    assert targets.ids_NK is not None and targets.log_tail_N is not None
    rows, kept = targets.ids_NK.shape
    each_N1 = targets.log_tail_N.exp()[:, None] / (targets.num_classes - kept)
    q_NV = each_N1.to(dtype).expand(rows, targets.num_classes).contiguous()
    return q_NV.scatter_(1, targets.ids_NK, targets.log_probs_NK.exp().to(dtype))


def liger(problem: Problem, q_NV: Tensor) -> Tensor:
    """Liger's fused cross-entropy, and its KL over torch's log-softmax, in the dtype of the logits
    throughout.

    Its teacher is dense: N V probabilities are read beside the logits. The cross-entropy reads the
    logits twice and writes their gradient over them; the log-softmax reads them and writes N V
    more, which the KL reads. A factor of either part, 1 / N among them, would be another read and
    write of N V in backward, which only one of 1 is spared:
    so both are sums, and the loss is in units of (1 - alpha) / N. What is left is alpha / (1 -
    alpha) T^2 of the KL, for which its API has no place: 1 at T = 1.
    """
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

    temperature = problem.targets.temperature
    score_NV = problem.logits_NV if temperature == 1 else problem.logits_NV / temperature
    kd = LigerKLDIVLoss(reduction="sum")(torch.log_softmax(score_NV, -1), q_NV)
    # last: it destroys the logits
    ce = LigerCrossEntropyLoss(reduction="sum")(problem.logits_NV, problem.labels_N)
    return torch.autograd.grad(ce + ALPHA / (1 - ALPHA) * temperature**2 * kd, problem.logits_NV)[0]


def contenders(problem: Problem, compiled: bool, q_NV: Tensor | None) -> dict[str, Entrant]:
    """All that can run on the problem's device: the kernels on CUDA only. `q_NV`: the teacher of
    Liger's, if wanted.
    """
    own: dict[str, Callable[[], Tensor]] = {}
    rivals: dict[str, Callable[[], Tensor]] = {"definition": partial(define, problem)}
    if problem.logits_NV.is_cuda:
        fused = Fused.of(problem)
        own = {
            "kernel, in place": partial(fused, True),
            "kernel": partial(fused, False),
            "kd_loss, engine triton, in place": partial(engine, problem, True, "triton"),
        }
        if compiled:
            torch.compiler.reset()  # every shape is compiled for itself
            rivals["definition, compiled"] = partial(
                define, problem, torch.compile(sparse_loss, dynamic=False)
            )
        if q_NV is not None:
            rivals["liger"] = partial(liger, problem, q_NV)
    own |= {
        "torch engine, in place": partial(engine, problem, True),
        "torch engine": partial(engine, problem),
    }
    # Some destroy the logits: all find them restored, so that none is timed on what another left.
    return {
        name: Entrant(run, problem.restore, own=name in own) for name, run in (own | rivals).items()
    }


def has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def gradient_errors(
    problem: Problem, run: Callable[[], object], q_NV: Tensor | None = None
) -> dict[str, float]:
    """How far a contender's gradient is from that in float64, on a few rows.

    "max": the greatest difference over the greatest entry. "tail": over the classes that are
    neither kept nor labels, whose entries are small and many, the norm of the difference over the
    norm. `q_NV`: the dense teacher of Liger's.
    """
    problem.restore()
    found_NV = run()
    assert isinstance(found_NV, Tensor) and problem.targets.ids_NK is not None
    rows = torch.linspace(0, len(found_NV) - 1, CHECKED_ROWS, device=found_NV.device).long()
    found = found_NV[rows].double()
    del found_NV
    t, labels, x = (
        problem.targets[rows],
        problem.labels_N[rows],
        problem.kept_NV[rows].double().requires_grad_(),
    )
    if q_NV is None:
        assert t.ids_NK is not None and t.log_tail_N is not None
        value = sparse_loss(
            x, labels, t.ids_NK, t.log_probs_NK.double(), t.log_tail_N.double(), t.temperature
        )
        value = value * (len(rows) / len(problem.labels_N))
    else:
        ce = definitions.cross_entropy(
            x, labels[:, None], torch.ones_like(labels, dtype=x.dtype)[:, None]
        )
        kd = definitions.full(x, q_NV[rows].double().log(), t.temperature)
        value = (ce + ALPHA / (1 - ALPHA) * t.temperature**2 * kd).sum()
    truth = torch.autograd.grad(value, x)[0]
    assert t.ids_NK is not None
    named = torch.cat([t.ids_NK, labels[:, None]], 1)
    tail = torch.ones_like(truth).scatter_(1, named, 0)
    difference = found - truth
    return {
        "max": float(difference.abs().max() / truth.abs().max()),
        "tail": float((difference * tail).norm() / (truth * tail).norm()),
    }
