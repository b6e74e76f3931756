"""Which engine computes: plain torch or the fused kernels. One choice, one check and one refusal
for both stages.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from kdcache.errors import UsageError, did_you_mean
from kdcache.kernels.row_loss import RowLoss

ENGINES = ("auto", "torch", "triton")
AUTO = "torch"  # on every device, until the kernels have passed `make gpu` on one
CAPABILITY = (8, 0)  # sm_80: the oldest that the kernels are compiled for in the tests


def check_engine(engine: str, device: torch.device) -> str:
    """The engine that runs for `engine` on a device. UsageError for an unknown one, or one that
    cannot run there.
    """
    check_name(engine)
    if engine == "triton":
        check_device(device)
    return resolve_engine(engine)


def resolve_engine(engine: str) -> str:
    """The engine that a name stands for."""
    return AUTO if engine == "auto" else engine


def check_name(engine: str) -> None:
    """UsageError for an engine that there is not."""
    if engine not in ENGINES:
        raise UsageError(f"engine {engine!r} is unknown{did_you_mean(engine, ENGINES)}")


def check_device(device: torch.device) -> None:
    """UsageError where the kernels cannot run on a device."""
    why = _no_device(device)
    if why:
        refuse(why)


def refuse(why: str) -> NoReturn:
    """UsageError: the kernels cannot do what was asked. Nothing falls back to another engine."""
    raise UsageError(f"engine 'triton': {why}; use engine 'torch'")


def _no_device(device: torch.device) -> str:
    try:
        from kdcache.kernels.kd_loss_rows import INTERPRETED
    except ImportError as e:
        return f"triton cannot be imported ({e})"
    if INTERPRETED:  # TRITON_INTERPRET=1: slow, on any device, for tests
        return ""
    if device.type != "cuda":
        return f"the kernels need a CUDA device, and this is {device}"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return (
            f"the kernels need compute capability 8.0, {torch.cuda.get_device_name(device)} has "
            "less"
        )
    return ""


def check_fits(logits: Tensor, rows: RowLoss) -> None:
    """UsageError where the kernels cannot take these rows; nothing falls back to another engine."""
    # a graph cannot ask for a capability; the kernels look at the device
    if not torch.compiler.is_compiling():
        check_device(logits.device)  # and whether there is triton at all
    from kdcache.kernels.kd_loss_rows import DTYPES, MOST_FULL

    if logits.dtype not in DTYPES:
        refuse(f"the logits are {logits.dtype}")
    if rows.log_probs_NK is not None and rows.ids_NK is None and rows.num_classes > MOST_FULL:
        refuse(
            f"a teacher over all of {rows.taught} classes and a student of {rows.num_classes}; the "
            f"kernels hold at most {MOST_FULL}"
        )


def fused_engine(logits: Tensor, rows: RowLoss) -> tuple[Tensor, Tensor, Tensor]:
    """The fused kernels as an `Engine`; triton is imported here."""
    from kdcache.kernels.kd_loss_rows import kd_loss_rows

    return kd_loss_rows(logits, rows)
