"""Keys: 64 bits that say which sample a record was made from, computed again when it is used.

A key is XXH3-64 (seed 0) over the arrays of a sample. The hashed bytes are, for each array, in
ascending order of the UTF-8 bytes of its name, with no padding and nothing between arrays, all
integers unsigned and little-endian:

    u32   length of the name in bytes
    ...   the name, UTF-8
    u32   length of the dtype name in bytes
    ...   the dtype name, ASCII: int64, float16, bfloat16, float32 or float64
    u32   number of axes (0 for a scalar)
    u64   length of each axis, outermost first
    ...   the elements in C order, little-endian (bfloat16 as its 16 bits)

Every integer and boolean array is widened to int64 first (uint64 keeps its 64 bits), so a label
kept as uint8 and as int32 has one key. Floats are hashed in the dtype they have, bit by bit. Names:
an item `(x, y)` gives "input" and "label", an item `(x, None)` only "input", a dict its own keys
without those whose value is None. Values: a Python int or bool is an int64 scalar, a float a
float64 scalar, a str the uint8 array of its UTF-8 bytes, bytes the uint8 array of themselves, a PIL
image the uint8 array of its pixels (palette images as RGBA), a list or tuple of numbers the array
numpy makes of it.

A dataset's own `key(i)`, an integer in 0..2^64-1 or 16 hexadecimal digits, stands in place of all
this.
"""

from __future__ import annotations

import operator
import struct
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from kdcache.errors import DataError

Array = npt.NDArray[Any]
FLOATS = ("float16", "float32", "float64")
PLAIN = {
    torch.bool,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
}
# which torch keeps, and calculates almost nothing with
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
BYTES_PER_UPDATE = 1 << 24  # bounds the copy that a non-contiguous or big-endian array needs


def array_header(name: str, dtype: str, shape: Iterable[int]) -> bytes:
    """The bytes before the elements of one array: name, dtype name and shape, as laid out above."""
    text, kind, axes = name.encode(), dtype.encode("ascii"), tuple(shape)
    return b"".join(
        (
            struct.pack("<I", len(text)),
            text,
            struct.pack("<I", len(kind)),
            kind,
            struct.pack(f"<I{len(axes)}Q", len(axes), *axes),
        )
    )


def arrays_of(item: Any) -> dict[str, Any]:
    """Name -> value of what a dataset returned: a dict as it is, `(x, y)` as input and label; None
    values are left out.

    DataError for any other shape of item.
    """
    if isinstance(item, Mapping):
        if not all(isinstance(name, str) for name in item):
            raise DataError(f"an item has the keys {list(item)[:5]!r}; expected strings")
        return {name: value for name, value in item.items() if value is not None}
    if isinstance(item, list | tuple) and len(item) == 2:
        return {
            name: value
            for name, value in zip(("input", "label"), item, strict=True)
            if value is not None
        }
    found = f"{len(item)} values" if isinstance(item, list | tuple) else f"a {type(item).__name__}"
    raise DataError(f"an item is {found}; expected (x, y), (x, None) or a dict of named arrays")


def elements(value: Any, name: str) -> tuple[Array, str]:
    """`value` as an array that can be hashed (little-endian), and the dtype name the key writes for
    it.
    """
    if isinstance(value, torch.Tensor):
        require_plain(value, name)
        tensor = value.detach().cpu()
        if tensor.dtype == torch.bfloat16:
            return _little(tensor.contiguous().view(torch.int16).numpy()), "bfloat16"
        array = tensor.resolve_conj().resolve_neg().numpy()
    elif isinstance(value, str | bytes):
        array = np.frombuffer(value.encode() if isinstance(value, str) else value, np.uint8)
    elif getattr(value, "mode", None) == "P" and hasattr(value, "convert"):
        # indices without their palette are not the picture
        array = np.asarray(value.convert("RGBA"))
    else:
        try:
            array = np.asarray(value)
        except ValueError as e:
            raise DataError(f"{name!r} is a {type(value).__name__} that is no array ({e})") from e
    if array.dtype.kind in "bi" or array.dtype.kind == "u":
        return _little(array.astype(np.int64, copy=False)), "int64"
    if array.dtype.name in FLOATS:
        return _little(array), array.dtype.name
    raise DataError(
        f"{name!r} is a {type(value).__name__} of dtype {array.dtype}; expected numbers, text or "
        "an image"
    )


def require_plain(tensor: torch.Tensor, name: str) -> None:
    """DataError for a tensor that has no elements in memory one after the other, or none that numpy
    knows.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        kind = (
            "meta"
            if tensor.is_meta
            else "quantised"
            if tensor.is_quantized
            else "nested"
            if tensor.is_nested
            else (str(tensor.layout).removeprefix("torch."))
        )
        raise DataError(
            f"{name!r} is a {kind} tensor; expected a dense one, with its elements in memory"
        )
    if tensor.dtype not in PLAIN:
        raise DataError(
            f"{name!r} is a tensor of {tensor.dtype}; expected one of "
            f"{', '.join(sorted(str(dtype).removeprefix('torch.') for dtype in PLAIN))}"
        )


def sample_key(arrays: Mapping[str, Any]) -> int:
    """The key of named arrays, 0..2^64-1. DataError for a value that has no bytes of its own
    (objects, None).
    """
    state = xxhash.xxh3_64(seed=0)
    for name in sorted(arrays, key=str.encode):
        array, dtype = elements(arrays[name], name)
        state.update(array_header(name, dtype, array.shape))
        for part in byte_parts(array):
            state.update(part)
    return state.intdigest()


def byte_parts(array: Array) -> Iterable[memoryview]:
    """The bytes of a little-endian array in C order, in parts of bounded size."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, flat.size, BYTES_PER_UPDATE):
        yield flat[start : start + BYTES_PER_UPDATE].data


def given_key(value: Any, where: str) -> int:
    """A dataset's own key as an integer; DataError naming `where` unless it is 0..2^64-1 or 16
    hexadecimal digits.
    """
    if isinstance(value, str):
        if len(value) == 16 and all(c in "0123456789abcdefABCDEF" for c in value):
            return int(value, 16)
    elif not isinstance(value, bool):
        try:
            number = operator.index(value)
        except TypeError:
            number = -1
        if 0 <= number < 2**64:
            return number
    raise DataError(
        f"{where}: key() gave {value!r}; expected an integer in 0..2^64-1 or 16 hexadecimal digits"
    )


def _little(array: Array) -> Array:
    swapped = array.dtype.byteorder == ">" or (
        array.dtype.byteorder == "=" and sys.byteorder == "big"
    )
    return array.astype(array.dtype.newbyteorder("<")) if swapped else array


def check_same_key(
    cached_u64: npt.NDArray[np.uint64],
    recomputed_u64: npt.NDArray[np.uint64],
    sample_ids: npt.NDArray[np.int64],
    *,
    what: str = "sample_key",
) -> None:
    """DataError naming the first sample whose key in the cache is not the one recomputed from the
    data.
    """
    cached, given = np.asarray(cached_u64, np.uint64), np.asarray(recomputed_u64, np.uint64)
    if cached.shape != given.shape:
        raise DataError(f"{given.shape} keys were recomputed for {cached.shape} cached ones")
    wrong = np.flatnonzero(cached != given)
    if wrong.size:
        at = int(wrong[0])
        raise DataError(
            f"sample {int(sample_ids[at])}: {what} in the cache is {int(cached[at]):016x}, the "
            f"data gives {int(given[at]):016x} ({wrong.size} of {cached.size} records of this "
            "batch differ); the data is not what the teacher saw: another order, another "
            "preprocessing, or changed files"
        )
