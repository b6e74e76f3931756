"""Which engine computes: plain torch or the fused kernels. One choice, one check and one refusal
for both stages.
"""

from __future__ import annotations

from typing import NoReturn

import torch

from kdcache.errors import UsageError, near

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
    return meant(engine)


def meant(engine: str) -> str:
    """The engine that a name stands for."""
    return AUTO if engine == "auto" else engine


def check_name(engine: str) -> None:
    """UsageError for an engine that there is not."""
    if engine not in ENGINES:
        raise UsageError(f"engine {engine!r} is unknown{near(engine, ENGINES)}")


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
        from kdcache.kernels.kd_loss import INTERPRETED
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
