"""Between host and device without waiting: what is sent and fetched is under way until `wait`.

A plain copy to a GPU would first wait for all that was asked of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kdcache.data.padding import Inputs

Name = TypeVar("Name", bound=Hashable)
ALIGNMENT = 64  # bytes; of a field in a packed buffer, for the wide loads of kernels


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """What a model is given, on `device`: named tensors or the one, in one copy (see `send`)."""
    if isinstance(inputs, dict):
        return send(inputs, device)
    return send({"input": inputs}, device)["input"]


def send(fields: Mapping[Name, Tensor | None], device: torch.device) -> dict[Name, Tensor]:
    """`fields` that are not None on a device, in one copy of the host's plain tensors, whose bytes
    are put together in pinned memory; nothing waits for it.

    What is on the device already stays as it is; so does all on the CPU. What is not plain (sparse,
    a subclass, a tensor of another device) goes by itself.
    """
    given = {name: x for name, x in fields.items() if x is not None}
    if device.type == "cpu":
        return {name: x.to(device) for name, x in given.items()}
    plain = {name: x for name, x in given.items() if _is_plain(x)}
    buffer, starts = pack(list(plain.values()), pin=device.type == "cuda")
    there = buffer.to(device, non_blocking=True)
    sent = dict(zip(plain, unpack(there, starts, list(plain.values())), strict=True))
    return {
        name: sent[name] if name in sent else x.to(device, non_blocking=True)
        for name, x in given.items()
    }


def pack(tensors: Sequence[Tensor], *, pin: bool = False) -> tuple[Tensor, list[int]]:
    """(uint8 [bytes], where each begins): plain tensors of the host, one after another at multiples
    of ALIGNMENT bytes.
    """
    starts, size = [], 0
    for x in tensors:
        starts.append(size)
        size += -(-x.numel() * x.element_size() // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    for x, field in zip(tensors, unpack(buffer, starts, tensors), strict=True):
        field.copy_(x)
    return buffer, starts


def unpack(buffer: Tensor, starts: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in a packed buffer, of the dtypes, shapes and order of axes of `like`. Nothing is
    copied.

    Each is a tensor of its own over the memory of the buffer, no view of it: what a model writes
    into one of its inputs is no change of the others to autograd.
    """
    storage = buffer.untyped_storage()
    return [
        torch.empty(0, dtype=x.dtype, device=buffer.device).set_(
            storage,
            start // x.element_size(),
            x.shape,
            torch.empty_like(x, device="meta").stride(),
        )
        for start, x in zip(starts, like, strict=True)
    ]


def _is_plain(x: Tensor) -> bool:
    return (
        type(x) is Tensor
        and x.layout == torch.strided
        and x.device.type == "cpu"
        and not (x.requires_grad or x.is_quantized or x.is_conj() or x.is_neg() or x.is_nested)
    )


def fetch(x: Tensor) -> Tensor:
    """`x` on the CPU, in pinned memory if it comes from a GPU: it is there after `wait`."""
    return x.to("cpu", non_blocking=x.is_cuda)


def wait(device: torch.device) -> None:
    """Until all that was asked of `device` is done; other devices than GPUs have never put anything
    off.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
