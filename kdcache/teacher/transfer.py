"""Between host and device without waiting: what is sent and fetched is under way until `wait`."""

from __future__ import annotations

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """`x` of the CPU on `device`. A plain copy to a GPU would first wait for all that was asked of
    it.
    """
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def fetch(x: Tensor) -> Tensor:
    """`x` on the CPU, in pinned memory if it comes from a GPU: it is there after `wait`."""
    return x.to("cpu", non_blocking=x.is_cuda)


def wait(device: torch.device) -> None:
    """Until all that was asked of `device` is done; other devices than GPUs have never put anything
    off.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
