"""The fused kernels as an engine of the loss: `kernels/kd_loss.py` behind the seam that the torch
engine defines.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcache.loss.engines import check_device, refuse
from kdcache.loss.targets import SoftTargets
from kdcache.loss.torch_engine import RowLoss


def check_fits(logits: Tensor, num_classes: int, targets: SoftTargets | None) -> None:
    """UsageError where the kernels cannot take these rows; nothing falls back to another engine."""
    # a graph cannot ask for a capability; the kernels look at the device
    if not torch.compiler.is_compiling():
        check_device(logits.device)  # and whether there is triton at all
    from kdcache.kernels.kd_loss import DTYPES, MOST_FULL

    if logits.dtype not in DTYPES:
        refuse(f"the logits are {logits.dtype}")
    if targets is not None and targets.ids_NK is None and num_classes > MOST_FULL:
        refuse(
            f"a teacher over all of {targets.num_classes} classes and a student of {num_classes}; "
            "the kernels hold "
            f"at most {MOST_FULL}"
        )


def fused_engine(logits: Tensor, rows: RowLoss) -> tuple[Tensor, Tensor, Tensor]:
    """An `Engine`: a RowLoss in the words of the kernels."""
    from kdcache.kernels.kd_loss import kd_loss_rows

    return kd_loss_rows(logits, inplace=rows.inplace, **in_kernel_words(rows))


def in_kernel_words(rows: RowLoss) -> dict[str, Any]:
    """What `kd_loss_rows` and `kd_linear_loss` of the kernels take, but for `inplace`."""
    given: dict[str, Any] = {
        "num_classes": rows.num_classes,
        "labels": rows.labels_NJ,
        "label_weight": rows.label_weight_NJ,
        "ce_scale": rows.ce_scale,
        "kd_scale": rows.kd_scale,
        "logit_scale": rows.logit_scale,
        "softcap": rows.softcap,
    }
    if rows.targets is not None:
        t = rows.targets
        given |= {
            "teacher_classes": t.num_classes,
            "ids": t.ids_NK,
            "log_probs": t.log_probs_NK,
            "log_tail": t.log_tail_N,
            "row_weight": t.weight_N,
            "temperature": t.temperature,
            "divergence": rows.divergence.name,
            "tail": rows.divergence.tail,
            "beta": rows.divergence.teacher_share,
        }
    return given
