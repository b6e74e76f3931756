"""The fused kernels as an engine of the loss: `kernels/kd_loss.py` behind the seam that the torch engine defines."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from kdcache.errors import UsageError
from kdcache.student.engine import RowLoss
from kdcache.student.targets import SoftTargets

CAPABILITY = (8, 0)             # sm_80: the oldest that the kernels are compiled for in the tests


def check_device(device: torch.device) -> None:
    """UsageError where the kernels cannot run on a device."""
    why = _no_device(device)
    if why:
        _refuse(why)


def _no_device(device: torch.device) -> str:
    try:
        from kdcache.kernels.kd_loss import INTERPRETED
    except ImportError as e:
        return f"triton cannot be imported ({e})"
    if INTERPRETED:                             # TRITON_INTERPRET=1: slow, on any device, for tests
        return ""
    if device.type != "cuda":
        return f"the kernels need a CUDA device, and this is {device}"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"the kernels need compute capability 8.0, {torch.cuda.get_device_name(device)} has less"
    return ""


def check_fits(logits: Tensor, targets: SoftTargets | None) -> None:
    """UsageError where the kernels cannot take these rows; nothing falls back to another engine."""
    from kdcache.kernels.kd_loss import DTYPES, MOST_FULL

    check_device(logits.device)
    if logits.dtype not in DTYPES:
        _refuse(f"the logits are {logits.dtype}")
    if targets is not None and targets.ids_NK is None and targets.num_classes > MOST_FULL:
        _refuse(f"a teacher over all of {targets.num_classes} classes; the kernels hold at most {MOST_FULL}")


def _refuse(why: str) -> NoReturn:
    raise UsageError(f"engine 'triton': {why}; use engine 'torch'")


def fused_engine(logits: Tensor, rows: RowLoss) -> tuple[Tensor, Tensor, Tensor]:
    """An `Engine`: a RowLoss in the words of the kernels."""
    from kdcache.kernels.kd_loss import kd_loss_rows

    given: dict[str, Any] = {}
    if rows.targets is not None:
        t = rows.targets
        given = {"ids": t.ids_NK, "log_probs": t.log_probs_NK, "log_tail": t.log_tail_N, "row_weight": t.weight_N,
                 "temperature": t.temperature, "divergence": rows.divergence, "tail": rows.tail}
    return kd_loss_rows(logits, num_classes=rows.num_classes, labels=rows.labels_NJ, label_weight=rows.label_weight_NJ,
                        ce_scale=rows.ce_scale, kd_scale=rows.kd_scale, inplace=rows.inplace, **given)
