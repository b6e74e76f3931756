"""What a student's rows look like beside the teacher's: numbers to watch, not to train on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.loss.divergences import row_sum
from kdcache.loss.targets import SoftTargets
from kdcache.loss.tensor_arguments import check_tensor
from kdcache.loss.torch_engine import row_chunks, wide
from kdcache.user.arguments import check_type


@dataclass(frozen=True, slots=True)
class RowStatistics:
    """Of each of N rows; no gradient reaches them.

    entropy_N   of the student at temperature 1, in nats: 0 where it is certain, log V' where all
                classes are alike to it
    mass_N      the student's probability, at the targets' temperature, of the classes that the
                teacher keeps and gives something
    agrees_N    bool: whether the class of the student's greatest logit is one to which the teacher
                gives most; of equal logits or probabilities any will do

    entropy_N and mass_N are float32, or float64 for float64 logits. Rows without a teacher (weight
    0) have mass 0 and do not agree.
    """

    entropy_N: Tensor
    mass_N: Tensor
    agrees_N: Tensor


@torch.no_grad()
def row_statistics(logits: Tensor, targets: SoftTargets) -> RowStatistics:
    """Entropy of the student's rows, its mass on the teacher's support, and top-1 agreement.

    logits [N, V'], any floating dtype, of the same rows as the targets, and of at least their V
    classes; all are on one device. Temporaries are of a chunk of rows. Nothing waits for the
    device. UsageError for what does not fit.
    """
    check_tensor("logits", logits, "floating [N, V]")
    check_type("targets", targets, SoftTargets, "SoftTargets")
    if logits.dim() != 2 or not logits.is_floating_point() or len(logits) != len(targets):
        raise UsageError(
            f"logits are {list(logits.shape)} of {logits.dtype}; expected floating "
            f"[{len(targets)}, V], the rows of the targets"
        )
    if logits.shape[1] < targets.num_classes:
        raise UsageError(
            f"the student has {logits.shape[1]} classes, the teacher {targets.num_classes}"
        )
    working = wide(logits.dtype)
    entropy_N, mass_N = logits.new_empty((2, len(logits)), dtype=working).unbind()
    agrees_N = torch.empty(len(logits), dtype=torch.bool, device=logits.device)
    for chunk in row_chunks(logits, logits.shape[1]):
        x_RV, teacher = logits[chunk].to(working), targets[chunk]
        ids_RK, log_q_RK = teacher.ids_NK, teacher.log_probs_NK
        log_p_RV = torch.log_softmax(x_RV, -1)
        # p log p is 0 where p is
        entropy_N[chunk] = -row_sum(
            torch.where(log_p_RV == -torch.inf, 0, log_p_RV.exp() * log_p_RV)
        )
        p_RV = torch.softmax(x_RV / teacher.temperature, -1)
        if ids_RK is None:
            p_RK, x_RK = (t[:, : teacher.num_classes] for t in (p_RV, x_RV))
        else:
            p_RK, x_RK = p_RV.gather(1, ids_RK), x_RV.gather(1, ids_RK)
        mass_N[chunk] = row_sum(torch.where(log_q_RK > -torch.inf, p_RK, 0))
        best_RK = log_q_RK == log_q_RK.amax(-1, keepdim=True)
        agrees_N[chunk] = (best_RK & (x_RK == x_RV.amax(-1, keepdim=True))).any(-1)
    if targets.weight_N is not None:
        absent_N = targets.weight_N == 0
        mass_N.masked_fill_(absent_N, 0)
        agrees_N.masked_fill_(absent_N, False)
    return RowStatistics(entropy_N, mass_N, agrees_N)
