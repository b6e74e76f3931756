"""The meta device in place of a GPU: what would wait for it, or copy between it and the host, is
seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {
    "_local_scalar_dense",
    "nonzero",
    "nonzero_static",
    "masked_select",
    "unique_consecutive",
    "_unique2",
    "is_nonzero",
    "equal",
    "lift_fresh",
}
HOST = {torch.tensor, torch.as_tensor, torch.from_numpy, torch.asarray}


class NoHostTensors(TorchFunctionMode):
    """Refuses tensors made of host data: on a device that is a copy, which waits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in HOST or isinstance(args[0], Tensor), f"{func.__name__} of host data"
        return func(*args, **(kwargs or {}))


class NoWaiting(TorchDispatchMode):
    """Refuses operations between the host and the device, and those that read a value or have a
    shape of values.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in READS, f"{name} waits for the device"
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        assert all(t.device.type == "meta" for t in tensors), f"{func} between host and device"
        assert not (
            name.startswith("index")
            and any(t.dtype == torch.bool for t in tree_leaves(args[1:]) if isinstance(t, Tensor))
        ), f"{func} counts the rows of a mask"
        return out


@contextmanager
def nothing_waits() -> Iterator[None]:
    with NoHostTensors(), NoWaiting():
        yield


class NoHostTensorsThere(NoHostTensors):
    """`NoHostTensors`, where the host has tensors of its own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.device((kwargs or {}).get("device") or "cpu").type == "cpu":
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


class Crossings(NoWaiting):
    """Where the host works too: its own operations pass, copies from it to the device are kept in
    `copies`, and all else between the two is refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        to = (kwargs or {}).get("device", torch.device("cpu"))
        if all(t.device.type == "cpu" for t in given) and to.type == "cpu":
            return func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "empty_like":  # of a shape: no value goes anywhere
            return func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "_to_copy" and given[0].device.type == "cpu":
            assert kwargs["non_blocking"], "a copy that waits"
            self.copies.append(given[0])
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)
