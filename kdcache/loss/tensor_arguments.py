"""Types at the door of the library: one UsageError that says what was found, before anything inside
meets it.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.cache.spec import temperature_name
from kdcache.errors import UsageError
from kdcache.user.arguments import seen


def check_tensor(name: str, value: Any, expected: str, *, optional: bool = False) -> None:
    """UsageError for what is no tensor: a list, an array of numpy."""
    if not (isinstance(value, Tensor) or (optional and value is None)):
        raise UsageError(
            f"{name} is {seen(value)}; expected {expected}: torch.as_tensor makes a tensor of it"
        )


def check_device(device: Any) -> torch.device:
    """The device; UsageError for a name that is none, or for CUDA where there is none."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as e:
        raise UsageError(
            f'device is {seen(device)}; expected one as "cpu" or "cuda:0" ({_line(e)})'
        ) from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f'device is {str(found)!r}, and torch sees no CUDA device here; use "cpu"')
    return found


def plain_temperature(value: Any) -> float:
    """A temperature; one of a narrower dtype is the decimal it was rounded from, as 1.1 of
    np.float32(1.1).
    """
    if not isinstance(value, np.floating):
        return float(value)
    shortest = float(str(value))
    decimal = round(shortest, 6)
    return decimal if abs(decimal - shortest) <= np.finfo(value.dtype).eps * shortest else shortest


def check_temperature(value: Any) -> str:
    """The name of a temperature, given as a number or as text; UsageError for what is none."""
    if not isinstance(value, Real | str):
        raise UsageError(f"temperature is {seen(value)}; expected a number")
    return temperature_name(value if isinstance(value, str) else plain_temperature(value))


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:120]
