"""Datasets that lie in memory as arrays: scikit-learn's digits, and `.npz` files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdcache.data.keys import UNSIGNED, array_header, byte_parts, elements
from kdcache.errors import DataError, UsageError, did_you_mean
from kdcache.user.code_errors import describe, reraise_interrupt
from kdcache.user.paths import local_path

Arrays = Mapping[str, npt.NDArray[Any]]
# four fifths, one fifth
DIGITS_SPLITS = {"train": slice(0, 1437), "test": slice(1437, 1797), "all": slice(0, 1797)}


class ArrayData:
    """A dataset of arrays with one first axis: items `(x, y)` if there is an `x`, else dicts of all
    arrays.
    """

    pure_items = True  # no generator is drawn from: see data/views.py

    def __init__(self, arrays: Arrays, *, name: str, class_names: list[str] | None = None) -> None:
        self.tensors = {
            key: torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))
            for key, array in arrays.items()
        }
        self.name, self.class_names, self.revision = name, class_names or [], content_hash(arrays)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, i: int) -> Any:
        if "x" not in self.tensors:
            return {key: tensor[i] for key, tensor in self.tensors.items()}
        return self.tensors["x"][i], self.tensors["y"][i] if "y" in self.tensors else None

    def take(self, sample_ids: npt.NDArray[np.int64]) -> Any:
        """The items of `sample_ids` as one, each field stacked."""
        at = torch.from_numpy(sample_ids)
        # Not of uint16 and wider, for which torch has no index_select.
        fields = {
            key: tensor.index_select(0, at)
            if tensor.dtype not in UNSIGNED
            else torch.from_numpy(tensor.numpy()[sample_ids])
            for key, tensor in self.tensors.items()
        }
        return fields if "x" not in fields else (fields["x"], fields.get("y"))


def content_hash(arrays: Arrays) -> str:
    """`sha256:` and 32 hexadecimal digits over named arrays, laid out as for a sample key
    (data/keys.py).
    """
    hasher = hashlib.sha256()
    for name in sorted(arrays):
        array, dtype = elements(arrays[name], name)
        hasher.update(array_header(name, dtype, array.shape))
        for part in byte_parts(array):
            hasher.update(part)
    return f"sha256:{hasher.hexdigest()[:32]}"


def digits(*, split: str = "train") -> ArrayData:
    """scikit-learn's 1797 handwritten digits: x float32 [1, 8, 8] in 0..1, y 0..9. split: train,
    test or all.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise UsageError(
            f"data digits needs scikit-learn ({e}): pip install 'kdcache[demo]'"
        ) from e
    if split not in DIGITS_SPLITS:
        raise UsageError(
            f"data digits has no split {split!r}{did_you_mean(str(split), DIGITS_SPLITS)}"
        )
    bunch, rows = load_digits(), DIGITS_SPLITS[split]
    x = (bunch.images[rows, None] / 16).astype(np.float32)  # the pixels are counts 0..16
    return ArrayData(
        {"x": x, "y": bunch.target[rows].astype(np.int64)},
        name="digits",
        class_names=[str(digit) for digit in range(10)],
    )


def _check_plain(name: str, array: Any) -> None:
    """ValueError for a member of an .npz file that is no array of numbers (or of strings, for
    class_names).
    """
    # numpy gives the bytes of members that are no .npy
    if not isinstance(array, np.ndarray):
        raise ValueError(f"its member {name!r} is no .npy")
    if name == "class_names":
        if array.ndim != 1 or array.dtype.kind != "U":
            raise ValueError(
                f"class_names is {array.dtype} {list(array.shape)}; expected strings, one for each "
                "class"
            )
    if array.dtype == np.uint64 and array.size and int(array.max()) >= 2**63:
        raise ValueError(
            f"its array {name!r} has a uint64 of 2^63 or more, which int64 cannot hold"
        )


def npz(path: str, /) -> ArrayData:
    """A numpy .npz file: arrays x and y (or x alone), or any named model inputs with `labels`; one
    first axis.

    `class_names`, an array of strings, is taken as such. DataError if the file holds anything but
    plain arrays.
    """
    file = local_path(path, "data npz")
    if not file.is_file():
        raise UsageError(f"data npz:{path}: no such file")
    try:
        # np.load leaves its own file open when the zip is damaged
        with open(file, "rb") as stream:
            opened = np.load(stream, allow_pickle=False)
            if not isinstance(opened, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array, of np.save")
            arrays = {name: opened[name] for name in opened.files}
            for name, array in arrays.items():
                _check_plain(name, array)
    # numpy, zipfile and zlib each raise their own for damaged and for foreign files
    except Exception as e:
        reraise_interrupt(e)
        raise DataError(f"{path} is no .npz file of plain arrays: {describe(e)}") from e
    names = arrays.pop("class_names", None)
    if not arrays or any(array.ndim == 0 for array in arrays.values()):
        raise DataError(
            f"{path} has the arrays {sorted(arrays)}; expected one or more, each with an axis of "
            "samples"
        )
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
            raise DataError(
                f"{path}: the array {name!r} is of dtype {array.dtype}; expected numbers of at "
                "most 64 bits (of labels the class indices, their names as class_names)"
            )
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{path}: the arrays differ in length: {lengths}")
    if "x" in arrays and not arrays.keys() <= {"x", "y"}:
        raise DataError(
            f"{path} has x and also {sorted(arrays.keys() - {'x', 'y'})}; expected x and y, or no x"
        )
    return ArrayData(
        arrays, name="npz", class_names=None if names is None else [str(name) for name in names]
    )
