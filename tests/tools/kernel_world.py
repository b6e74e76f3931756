"""Rows of logits, teachers and labels for the kernel tests, and the plain arithmetic they are held
against.

`define` gives the value and, by autograd, the gradient of a problem in any floating dtype: in
float64 it is the truth, in float32 "plain torch". It takes each row's outcomes one by one, from the
formulas; nothing is shared with a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from kernel_cases import Case
from torch import Tensor

from kdcache.kernels import kd_loss_rows as kd_loss
from kdcache.kernels.kd_launch import powers
from kdcache.kernels.row_loss import Divergence, RowLoss


@dataclass(frozen=True)
class Problem:
    """A case made concrete; `logits` [N, V'] is a leaf of its own, never the tensor a kernel may
    write.
    """

    case: Case
    logits: Tensor
    keywords: dict[str, Any] = field(default_factory=dict)
    factor: Tensor = field(default_factory=lambda: torch.ones(0))


Ran = tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]  # outputs, gradient, buffer, logits
UNIT = 2.0**-23


def asked(logits: Tensor, keywords: dict[str, Any]) -> RowLoss:
    """A `RowLoss` of the words of these tests: labels may be [N], a scale a number."""

    def matrix(name: str) -> Tensor | None:
        tensor: Tensor | None = keywords.get(name)
        return tensor[:, None] if tensor is not None and tensor.dim() == 1 else tensor

    def scale(name: str) -> Tensor | None:
        given = keywords.get(name, 1.0)
        if given is None or isinstance(given, Tensor):
            return given
        return torch.full((), given, dtype=torch.float32, device=logits.device)

    name = keywords.get("divergence", "forward_kl")
    return RowLoss(
        keywords.get("num_classes", logits.shape[-1]),
        matrix("labels"),
        matrix("label_weight"),
        ids_NK=matrix("ids"),
        log_probs_NK=keywords.get("log_probs"),
        log_tail_N=keywords.get("log_tail"),
        row_weight_N=keywords.get("row_weight"),
        teacher_classes=keywords.get("teacher_classes"),
        temperature=keywords.get("temperature", 1.0),
        divergence=Divergence(name, keywords.get("beta"), keywords.get("tail", "bucket")),
        ce_scale=scale("ce_scale"),
        kd_scale=scale("kd_scale"),
        logit_scale=keywords.get("logit_scale", 1.0),
        softcap=keywords.get("softcap"),
        inplace=keywords.get("inplace", False),
    )


def kd_loss_rows(
    logits: Tensor, *, parts: int | None = None, **keywords: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels' loss, by the words of these tests."""
    return kd_loss.kd_loss_rows(logits, asked(logits, keywords), parts=parts)


def problem(case: Case, seed: int = 0) -> Problem:
    """Random logits and targets of a case, the same for the same seed."""
    torch.manual_seed(seed)
    rows, classes = case.rows, case.num_classes
    kept = min(case.kept, case.taught)
    drawn = [torch.randperm(case.taught)[:kept] for _ in range(rows)]
    ids = torch.stack(drawn) if rows else torch.zeros(0, kept).long()
    logits = _logits(case, ids).to(case.dtype)
    ids_NK = torch.full((rows, case.kept), -1)
    ids_NK[:, :kept] = ids
    if rows and kept > 1:
        ids_NK[0, kept - 1] = -1  # padding within the support too
    log_probs, log_tail = _teacher(case, ids_NK)
    labels, label_weight = _labels(case, ids_NK)
    weight = None if case.weights is None else torch.tensor([0.5, 0.0, 2.0])[:rows]
    keywords = {
        "num_classes": classes,
        "labels": labels,
        "label_weight": label_weight,
        "ids": ids_NK,
        "log_probs": log_probs,
        "log_tail": log_tail if case.tail in ("bucket", "uniform") else None,
        "row_weight": weight,
        "temperature": case.temperature,
        "divergence": case.divergence,
        "tail": case.tail,
        "ce_scale": torch.tensor(0.7),
        "kd_scale": torch.tensor(1.3),
    }
    keywords |= {
        name: getattr(case, name)
        for name in ("softcap", "logit_scale")
        if getattr(case, name) != getattr(Case(), name)
    }
    if case.beyond:
        keywords["teacher_classes"] = case.taught
    factor = {
        "one": torch.ones(rows),
        "half": torch.full((rows,), 0.5),
        "each": torch.rand(rows) + 0.25,
    }
    return Problem(case, logits, keywords, factor[case.grad_output])


def _logits(case: Case, ids: Tensor) -> Tensor:
    x = torch.randn(case.rows, case.num_classes) * 3
    if case.logits == "apart":
        x = torch.where(x > 2, 80.0, -80.0) + torch.randn_like(x)
        x.scatter_(1, ids, 80.0)
    elif case.logits == "constant":
        x = torch.full_like(x, 1.5)
    elif case.logits == "offset":
        x += 1000
    elif case.logits == "minus_inf":
        free = torch.ones_like(x).scatter_(1, ids, 0.0)
        x[:, 0] = torch.where(free[:, 0] > 0, -torch.inf, x[:, 0])
    return x


def _teacher(case: Case, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the kept ids, NaN where an id is padding, and of the tail."""
    rows, kept = ids_NK.shape
    free = (ids_NK >= 0).sum(1) < case.taught
    mass = (
        torch.rand(rows) * 0.9 + 0.05
        if case.tail_mass is None
        else torch.full((rows,), case.tail_mass)
    )
    mass = torch.where(free, mass, 0).double()
    scores = torch.where(ids_NK >= 0, torch.randn(rows, kept).double(), -torch.inf)
    log_probs = torch.log_softmax(scores, -1) + torch.log1p(-mass)[:, None]
    return torch.where(ids_NK >= 0, log_probs, torch.nan).float(), mass.log().float()


def _labels(case: Case, ids_NK: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if case.labels == "none":
        return None, None
    rows, last = case.rows, case.num_classes - 1
    y = torch.randint(min(1, last), last + 1, (rows,))
    if case.labels == "in":
        y = ids_NK[:, 0]
    if case.labels == "ignored":
        y = torch.full((rows,), -100)
    if case.labels == "some" and rows:
        y[0] = -100
    if case.labels == "alike":  # without weights: a mean over those that are known
        return torch.stack([y, ids_NK[:, 0], torch.tensor([-1, 0, last])[:rows]], 1), None
    if case.labels in ("two", "twice"):
        other = y if case.labels == "twice" else ids_NK[:, 0]
        return torch.stack([y, other], 1), torch.tensor([[0.3, 0.7], [0.0, 0.0], [1.0, 0.25]])[
            :rows
        ]
    return y, None


def divergence_of(name: str, log_q: Tensor, log_p: Tensor) -> Tensor:
    """D(q || p) over outcomes, 0 log 0 = 0."""
    q, p = log_q.exp(), log_p.exp()
    if name == "forward_kl":
        return torch.where(q > 0, q * (log_q - log_p), 0).sum()
    if name == "reverse_kl":
        return torch.where(p > 0, p * (log_p - log_q), 0).sum()
    if name == "tv":
        return (p - q).abs().sum() / 2
    log_m = torch.logaddexp(log_q, log_p) - torch.log(torch.tensor(2.0, dtype=log_q.dtype))
    live_q, live_p = q > 0, p > 0
    return 0.5 * ((q * (log_q - log_m))[live_q].sum() + (p * (log_p - log_m))[live_p].sum())


def transformed(x: Tensor, problem: Problem) -> Tensor:
    """Logits after scale and softcap. Of tanh's ways to be written this has the derivative without
    cancellation.
    """
    scale, cap = (problem.keywords.get(name) for name in ("logit_scale", "softcap"))
    y = x if scale is None else x * scale
    if cap is None:
        return y
    y = torch.where(x == -torch.inf, 0, y) / cap
    size = torch.where(y < 0, -y, y)
    # autograd takes expm1 + 1 for the derivative of expm1: 0 where that is -1
    e = torch.exp(-2 * size)
    tanh = torch.where(size < 1, -torch.expm1(-2 * size) / (1 + e), 1 - 2 * e / (1 + e))
    return torch.where(x == -torch.inf, -torch.inf, cap * torch.where(y < 0, -tanh, tanh))


def define(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, CE, D) of each row and the gradient of sum(factor * loss), in `dtype`."""
    x = problem.logits.to(dtype, copy=True).requires_grad_()
    k = problem.keywords
    ce, kd = ([x.new_zeros(())] * problem.case.rows for _ in range(2))
    for n in range(problem.case.rows):
        row = transformed(x[n, : k["num_classes"]], problem)
        if k["labels"] is not None:
            weight = None if k["label_weight"] is None else k["label_weight"][n]
            ce[n] = _cross_entropy(row, k["labels"][n].reshape(-1), weight)
        weight = 1.0 if k["row_weight"] is None else float(k["row_weight"][n])
        if weight:
            kd[n] = weight * _distillation(row, problem, n)
    ce_N, kd_N = (torch.stack(t) if t else x.new_zeros(0) for t in (ce, kd))
    loss = k["ce_scale"].to(dtype) * ce_N + k["kd_scale"].to(dtype) * kd_N
    if not loss.requires_grad:
        return loss, ce_N, kd_N, torch.zeros_like(x)
    (gradient,) = torch.autograd.grad((problem.factor.to(dtype) * loss).sum(), x)
    return loss.detach(), ce_N.detach(), kd_N.detach(), gradient


def _cross_entropy(row: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
    log_p = torch.log_softmax(row, -1)
    total = row.new_zeros(())
    alike = 1 / max(int((labels >= 0).sum()), 1)
    for j, y in enumerate(labels.tolist()):
        w = alike if weight is None else float(weight[j])
        if y >= 0 and w:
            total = total - w * log_p[y]
    return total


def _distillation(row: Tensor, problem: Problem, n: int) -> Tensor:
    k, case = problem.keywords, problem.case
    ids = k["ids"][n]
    valid = ids >= 0
    ids, log_q = ids[valid], k["log_probs"][n][valid].to(row.dtype)
    score = row / case.temperature
    free = torch.ones_like(row, dtype=torch.bool)
    free[ids] = False
    if case.tail == "conditional":
        return divergence_of(
            case.divergence, torch.log_softmax(log_q, -1), torch.log_softmax(score[ids], -1)
        )
    scores = score[ids]
    log_tail = (
        k["log_tail"][n].to(row.dtype) if case.tail == "bucket" else row.new_tensor(-torch.inf)
    )
    if case.tail == "uniform":
        log_p = torch.log_softmax(score, -1)
        # the student's own classes have no part of the teacher's tail
        free[case.taught :] = False
        left, log_tail = int(free.sum()), k["log_tail"][n].to(row.dtype)
        value = divergence_of("forward_kl", log_q, log_p[ids])
        if left and log_tail > -torch.inf:
            value = value + log_tail.exp() * (
                log_tail - log_p.new_tensor(left).log() - log_p[free].sum() / left
            )
        return value
    if case.tail == "renormalise":
        log_q = torch.log_softmax(log_q, -1)
    if bool(free.any()):
        scores = torch.cat([scores, torch.logsumexp(score[free], 0)[None]])
        log_q = torch.cat([log_q, log_tail[None]])
    return divergence_of(case.divergence, log_q, torch.log_softmax(scores, -1))


def laid_out(problem: Problem, device: str) -> tuple[Tensor, Tensor]:
    """(buffer, logits within it) on a device: rows as the case's layout wants them, everything
    around them NaN.
    """
    case, width = problem.case, problem.case.num_classes
    stride = {"plain": width, "strided": width + 13, "padded": (width + 15) // 8 * 8, "odd": width}[
        case.layout
    ]
    columns = width + 5 if case.layout == "padded" else width
    offset = 3 if case.layout == "odd" else 64
    buffer = torch.full(
        (offset + case.rows * stride + 64,), torch.nan, dtype=case.dtype, device=device
    )
    view = buffer.as_strided((case.rows, columns), (stride, 1), offset)
    view[:, :width] = problem.logits.to(device)
    return buffer, view


def on(device: str, keywords: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in keywords.items()
    }


def run(problem: Problem, device: str, **changed: Any) -> Ran:
    """Of the kernel."""
    buffer, logits = laid_out(problem, device)
    logits = logits.detach().requires_grad_()
    keywords = on(
        device, problem.keywords | {"inplace": problem.case.inplace, "parts": 1} | changed
    )
    out = kd_loss_rows(logits, **keywords)
    (gradient,) = torch.autograd.grad(out[0], logits, problem.factor.to(device))
    return tuple(t.detach().cpu() for t in out), gradient, buffer, logits.detach()


def error(found: Tensor, truth: Tensor, least: float = 0.0) -> float:
    """Largest error relative to the largest entry of its row, but to no less than `least`."""
    if not truth.numel():
        return 0.0
    found, truth = found.double().reshape(len(truth), -1), truth.reshape(len(truth), -1)
    size = truth.abs().amax(1).clamp(min=max(least, 1e-30))
    return float((torch.where(found == truth, 0, (found - truth).abs()).amax(1) / size).max())


def missed(problem: Problem, found: tuple[Tensor, ...]) -> dict[str, float]:
    """Errors of loss, CE, D and gradient. A divergence is a sum of terms of about 1 nat that cancel:
    its unit is that of 1."""
    truth = define(problem, torch.float64)
    names = {"loss": 1.0, "CE": 1.0, "D": 1.0, "gradient": 0.0}
    out = {
        name: error(f, t, least)
        for (name, least), f, t in zip(names.items(), found, truth, strict=False)
    }
    return out


def compiled() -> bool:
    return not triton.knobs.runtime.interpret


def allowed(plain: float, unit: float, temperature: float = 1.0) -> float:
    """Twice the error of plain float32 torch and a unit in the last place: the rule, as the
    interpreter keeps it.

    Compiled, an exponential and a division are each off by 2^-22 (PTX's manual), where those of a
    CPU are by 2^-24 to 2^-23, and an exponential to the power P by P times that: so much on top,
    and twice of what else plain torch misses.
    """
    most = max(powers(temperature) or (1,))
    return (4 if compiled() else 2) * plain + unit + ((most + 2) * 2.0**-22 if compiled() else 0)


def same(found: Tensor, other: Tensor) -> bool:
    """Whether two builds of one kernel agree: to the bit in the interpreter; compiled, which
    products are fused with which sums is the compiler's choice for each: a few units of float32 of
    the largest entry (of 1 for values) may differ, and rounding to the dtype may go the other way.
    """
    if not compiled() or not found.numel() or not found.is_floating_point():
        return torch.equal(found, other)
    a, b = found.double(), other.double()
    size, unit = (
        max(float(b.abs().max()), 1.0 if b.dim() < 2 else 0.0),
        torch.finfo(other.dtype).eps,
    )
    return a.shape == b.shape and bool(((a - b).abs() <= 8 * UNIT * size + unit * b.abs()).all())


def usual(**changed: Any) -> Problem:
    return problem(Case(**changed))
