"""Soft targets: what the teacher said about N rows, as log-probabilities at one temperature, on the
student's device.

Probabilities sum to one by construction: a row is normalised over what is kept of it and the tail
that was stored, whatever the codec of the values. Every row is a function of that row alone, so a
record gives the same bits whichever batch it comes in, from a cache or from a teacher in the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kdcache.cache.columns import Array
from kdcache.cache.spec import CacheSpec
from kdcache.errors import UsageError
from kdcache.loss.tensor_arguments import check_device, check_temperature, check_tensor
from kdcache.loss.topk import exact_topk, row_logsumexp, tail_lse
from kdcache.user.arguments import check_integer, check_number

if TYPE_CHECKING:
    from kdcache.cache.reader import Batch


@dataclass(frozen=True, slots=True, repr=False)
class SoftTargets:
    """Teacher distributions of N rows at `temperature`, over `num_classes` = V classes.

    ids_NK int64 of 0 to V - 1, distinct within a row, or None when all V classes are kept in id
    order; log_probs_NK float32 (or float64); log_tail_N the log-probability of all ids not kept,
    None where nothing is left out; weight_N the weight of each row in the mean, 0 for a row without
    a teacher, None for 1 everywhere.

    A teacher of draws (`drawn`) has ids and no log_tail_N: log_probs_NK are then the logs of
    weights of any sum, which
    `kd_loss` takes with tail "sampled" alone. A row of fewer draws than K is filled up with other
    ids at -inf.

    UsageError for shapes that do not fit and, on the CPU, for ids that are no classes or stand
    twice in a row: the loss never looks, and on a device a look would wait. ids_checked: they are
    known to fit, as those of a cache are.
    """

    temperature: float
    num_classes: int
    ids_NK: Tensor | None
    log_probs_NK: Tensor
    log_tail_N: Tensor | None
    weight_N: Tensor | None = None
    ids_checked: bool = field(default=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        self._check_types()
        rows, kept = self.log_probs_NK.shape
        wrong = [
            f"{name} is {list(tensor.shape)}; expected {shape}"
            for name, tensor, shape in (
                ("ids_NK", self.ids_NK, [rows, kept]),
                ("log_tail_N", self.log_tail_N, [rows]),
                ("weight_N", self.weight_N, [rows]),
            )
            if tensor is not None and list(tensor.shape) != shape
        ]
        if self.ids_NK is None and self.log_tail_N is not None:
            wrong.append("log_tail_N is given without ids_NK, whose tail it is")
        if kept > self.num_classes or (self.ids_NK is None and kept != self.num_classes):
            wrong.append(
                f"{kept} entries are kept of {self.num_classes} classes, ids given: "
                f"{self.ids_NK is not None}"
            )
        if not 0 < self.temperature < math.inf:
            wrong.append(f"temperature is {self.temperature}; expected a positive number")
        if wrong:
            raise UsageError(f"soft targets of {rows} rows: {'; '.join(wrong)}")
        if not self.ids_checked and self.ids_NK is not None and readable(self.ids_NK):
            _check_ids(self.ids_NK, self.num_classes)

    def _check_types(self) -> None:
        check_tensor("log_probs_NK", self.log_probs_NK, "floating [N, K]")
        for name in ("ids_NK", "log_tail_N", "weight_N"):
            check_tensor(name, getattr(self, name), "a tensor of N rows, or None", optional=True)
        check_number("temperature", self.temperature)
        if self.log_probs_NK.dim() != 2 or not self.log_probs_NK.is_floating_point():
            raise UsageError(
                f"log_probs_NK is {list(self.log_probs_NK.shape)} of {self.log_probs_NK.dtype}; "
                "expected floating [N, K]"
            )

    def __repr__(self) -> str:
        what = "draws" if self.drawn else "all" if self.ids_NK is None else "largest and tail"
        weights = "" if self.weight_N is None else ", with weights"
        log_probs = self.log_probs_NK
        return (
            f"SoftTargets({len(self)} rows at temperature {self.temperature}, {log_probs.shape[1]} "
            f"of {self.num_classes} classes ({what}){weights}, {log_probs.dtype} on "
            f"{log_probs.device})"
        )

    def __len__(self) -> int:
        return len(self.log_probs_NK)

    @property
    def drawn(self) -> bool:
        """Whether ids are draws with weights of any sum, not the largest probabilities with a tail."""
        return self.ids_NK is not None and self.log_tail_N is None

    def __getitem__(self, rows: slice | Tensor) -> SoftTargets:
        """The targets of some rows: a slice, a bool mask [N] or an index [M]."""
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SoftTargets:
        """On a device; tensors that are there already stay as they are. non_blocking: nothing waits
        for the copies.
        """
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _each(self, change: Callable[[Tensor], Tensor]) -> SoftTargets:
        optional = (self.ids_NK, self.log_tail_N, self.weight_N)
        ids_NK, tail_N, weight_N = (
            None if tensor is None else change(tensor) for tensor in optional
        )
        checked = self.ids_checked or (self.ids_NK is not None and readable(self.ids_NK))
        return SoftTargets(
            self.temperature,
            self.num_classes,
            ids_NK,
            change(self.log_probs_NK),
            tail_N,
            weight_N,
            ids_checked=checked,
        )


def readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at: a device would be waited for, a graph that is captured
    has none.
    """
    return tensor.device.type == "cpu" and tensor.numel() > 0 and not torch.compiler.is_compiling()


def _check_ids(ids_NK: Tensor, num_classes: int) -> None:
    """UsageError naming the first row in which an id is none of the classes, or stands twice."""
    sorted_NK = ids_NK.sort(1).values
    wrong_N = (sorted_NK[:, 1:] == sorted_NK[:, :-1]).any(1)
    wrong_N |= (sorted_NK[:, 0] < 0) | (sorted_NK[:, -1] >= num_classes)
    if bool(wrong_N.any()):
        row = int(wrong_N.nonzero()[0])
        found = sorted_NK[row]
        twice = found[1:][found[1:] == found[:-1]].tolist()[:3]
        wrong = (
            f"{twice[0]} twice (of draws add up the weights)"
            if twice
            else str(next(i for i in found.tolist() if not 0 <= i < num_classes))
        )
        raise UsageError(
            f"soft targets of {len(ids_NK)} rows: row {row} has the id {wrong}; expected each of 0 "
            f"to {num_classes - 1} at most once"
        )


def soft_targets(
    batch: Batch,
    *,
    spec: CacheSpec | None = None,
    temperature: float | str,
    k: int | None = None,
    device: torch.device | str = "cpu",
) -> SoftTargets:
    """The teacher's rows in a batch of cached records, unpacked on `device`, at a stored
    temperature.

    batch: what `cache.read(records)` gives. A `full` cache takes any temperature. `k`: a tier of
    the cache, by default the largest. Temperatures are exact to 6 decimals; one of numpy's float32
    is taken as the decimal it was rounded from. UsageError for a temperature that was not stored, a
    k that is no tier, or a cache without rows.
    """
    if not hasattr(batch, "columns"):
        raise UsageError(
            f"batch is a {type(batch).__name__}; expected what cache.read(records) gives"
        )
    spec = batch.spec if spec is None else spec
    device = check_device(device)
    if not spec.has_rows:
        raise UsageError(
            "the cache is of kind 'none': it has features and no rows, so no soft targets"
        )
    return unpack_targets(
        spec, batch, stored_temperature(spec, temperature), stored_tier(spec, k), device
    )


def unpack_targets(
    spec: CacheSpec, batch: Batch, name: str, kept: int, device: torch.device
) -> SoftTargets:
    """`soft_targets` at the stored temperature of that name and of the tier `kept`, both checked."""
    unpack = _Unpack(spec, batch, device)
    weight_N = unpack.column("weight") if spec.row_weights else None
    values_NK = unpack.values(kept)
    if not spec.is_sparse:
        return _full(values_NK, float(name), weight_N)
    ids_NK = unpack.ids(kept)
    # nothing is left out: the same numbers and the same code as kind full
    if kept == spec.num_classes:
        return _full(
            torch.empty_like(values_NK).scatter_(1, ids_NK, values_NK), float(name), weight_N
        )
    tail_N = unpack.column("tail_lse")[:, spec.tiers.index(kept), spec.temperatures.index(name)]
    relative = spec.codec.relative
    max_N = unpack.column("max") if relative else values_NK[:, 0]
    if spec.labels:
        tail_N = _with_labels(
            tail_N, ids_NK, unpack.labels(), unpack.column("label_logit"), max_N, float(name)
        )
    relative_NK = values_NK if relative else values_NK - max_N[:, None]
    return _sparse(ids_NK, relative_NK, tail_N, float(name), spec.num_classes, weight_N)


@torch.no_grad()
def targets_from_logits(
    logits_NV: Tensor, *, temperature: float | str, k: int | None = None
) -> SoftTargets:
    """Targets of a teacher in the loop: all V classes, or the k largest and the tail. No gradient
    reaches the teacher.

    Equal, bit for bit on the CPU, to the targets of a cache of the same logits with float32 values
    and no label.

    logits_NV: floating [N, V]. UsageError, on the CPU, for a row with NaN or +inf, or of nothing
    but -inf, as docs/format.md 8.1 refuses it. On a device a look would wait: there the targets of
    such a row, and of no other, are NaN, and so is its loss.
    """
    check_tensor("teacher logits", logits_NV, "floating [N, V]")
    check_integer("k", k, optional=True)
    if logits_NV.dim() != 2 or not logits_NV.is_floating_point():
        raise UsageError(
            f"teacher logits are {list(logits_NV.shape)} of {logits_NV.dtype}; expected floating "
            "[N, V]: select the rows first"
        )
    value = float(check_temperature(temperature))
    num_classes = logits_NV.shape[1]
    _check_logits(logits_NV)
    if k is None or k == num_classes:
        return _full(logits_NV.float(), value, None)
    if not 1 <= k < num_classes:
        raise UsageError(f"k is {k}; expected 1 to the number of classes, {num_classes}")
    ids_NK, values_NK = exact_topk(logits_NV, k)
    max_N = values_NK[:, 0]
    tail_N = tail_lse(logits_NV, ids_NK, max_N, (value,))[:, 0]
    return _sparse(ids_NK, values_NK - max_N[:, None], tail_N, value, num_classes, None)


def _check_logits(logits_NV: Tensor) -> None:
    """UsageError naming the first row that is no distribution: its largest logit is NaN, +inf or
    -inf.
    """
    if readable(logits_NV) and not bool((finite_N := logits_NV.amax(1).isfinite()).all()):
        row = int((~finite_N).nonzero()[0])
        largest = float(logits_NV[row].amax())
        found = "are all -inf" if largest < 0 else f"have {largest}"
        raise UsageError(
            f"teacher logits of row {row} {found}; expected finite ones, or -inf for classes that "
            "are ruled out: look at the teacher's input and precision"
        )


def _full(values_NV: Tensor, temperature: float, weight_N: Tensor | None) -> SoftTargets:
    log_probs_NV = torch.log_softmax(values_NV / temperature, -1)
    return SoftTargets(temperature, values_NV.shape[1], None, log_probs_NV, None, weight_N)


def _sparse(
    ids_NK: Tensor,
    relative_NK: Tensor,
    tail_N: Tensor,
    temperature: float,
    num_classes: int,
    weight_N: Tensor | None,
) -> SoftTargets:
    """relative / T - logaddexp(lse(relative / T), tail): the softmax over the K entries and the
    tail as one more.
    """
    outcomes = torch.log_softmax(torch.cat([relative_NK / temperature, tail_N[:, None]], 1), -1)
    return SoftTargets(
        temperature,
        num_classes,
        ids_NK,
        outcomes[:, :-1].contiguous(),
        outcomes[:, -1].contiguous(),
        weight_N,
        ids_checked=True,
    )


def _with_labels(
    tail_N: Tensor,
    ids_NK: Tensor,
    label_NJ: Tensor,
    logit_NJ: Tensor,
    max_N: Tensor,
    temperature: float,
) -> Tensor:
    """The stored tail leaves labels out; add each distinct label outside the head back."""
    terms = [tail_N]
    for j in range(label_NJ.shape[1]):
        label_N = label_NJ[:, j]
        counted_N = (
            (label_N < 0)
            | (ids_NK == label_N[:, None]).any(1)
            | (label_NJ[:, :j] == label_N[:, None]).any(1)
        )
        terms.append(torch.where(counted_N, -torch.inf, (logit_NJ[:, j] - max_N) / temperature))
    return row_logsumexp(torch.stack(terms, 1))


def stored_temperature(spec: CacheSpec, temperature: float | str) -> str:
    """The name of a temperature; UsageError for one at which a cache gives no targets."""
    name = check_temperature(temperature)
    if spec.is_sparse and name not in spec.temperatures:
        raise UsageError(
            f"temperature {name} was not stored in the cache; stored: "
            f"{', '.join(spec.temperatures)}; take one of these, or dump again with --temperature "
            f"{name}"
        )
    return name


def stored_tier(spec: CacheSpec, k: int | None) -> int:
    """`k`, the largest tier of the cache if None; UsageError if it is none of them."""
    tiers = spec.tiers if spec.is_sparse else (spec.num_classes,)
    check_integer("k", k, optional=True)
    if k is not None and k not in tiers:
        raise UsageError(
            f"k is {k}, which is no tier of the cache; tiers: {', '.join(map(str, tiers))}"
        )
    return tiers[-1] if k is None else k


class _Unpack:
    """Columns of a batch as tensors on a device: the stored bytes travel, and are widened there."""

    def __init__(self, spec: CacheSpec, batch: Batch, device: torch.device) -> None:
        self.spec = spec
        self.batch = batch
        self.device = device

    def column(self, name: str) -> Tensor:
        return column_tensor(self.batch, name, self.device)

    def labels(self) -> Tensor:
        return self.column("label").to(torch.int64)

    def values(self, k: int) -> Tensor:
        """float32 [N, k]: logits, or logits minus the row's maximum where the codec is relative."""
        if self.spec.values not in UNPACKED:
            raise ValueError(
                f"value codec {self.spec.values!r} has no unpacking here; it must not be read as "
                "another"
            )
        step_N = self.column("step") if self.spec.codec.stepped else None
        return UNPACKED[self.spec.values](STORED[self.spec.kind](self, k), step_N)

    def ids(self, k: int) -> Tensor:
        """int64 [N, k]."""
        parts = []
        for tier in (t for t in self.spec.tiers if t <= k):
            low = self.column(f"ids_{tier}")
            # torch widens few unsigned dtypes, so uint16 came as int16: undo its sign.
            ids = low.to(torch.int64) & 0xFFFF
            if self.spec.high_bits:
                ids |= (
                    _plane(self.column(f"ids_{tier}_high"), self.spec.high_bits, ids.shape[1]) << 16
                )
            parts.append(ids)
        return torch.cat(parts, 1)


def _from_uint8(codes: Tensor, step_N: Tensor | None) -> Tensor:
    assert step_N is not None
    return torch.where(codes == 255, -torch.inf, 0 - codes.float() * step_N[:, None])


# value codec -> stored values [N, k] as `column_tensor` gives them, and steps [N] where the codec
# has them -> float32 [N, k]: what `decode` of cache/values.py gives, to the bit
UNPACKED: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "float32": lambda raw, step_N: raw.float(),
    "bfloat16": lambda raw, step_N: raw.view(torch.bfloat16).float(),
    "float16": lambda raw, step_N: raw.float(),
    "uint8": _from_uint8,
}
# kind -> stored values [N, k] of tier k: what `stored` of cache/codec.py gives
STORED: dict[str, Callable[[_Unpack, int], Tensor]] = {
    "full": lambda unpack, k: unpack.column("values"),
    "topk": lambda unpack, k: torch.cat(
        [unpack.column(f"values_{tier}") for tier in unpack.spec.tiers if tier <= k], 1
    ),
}


def _plane(packed: Tensor, bits: int, count: int) -> Tensor:
    """Values of `bits` = 1, 2, 4, 8 or 16 bits in a plane of bytes, least significant first: int64
    [N, count].
    """
    wide = packed.to(torch.int64)
    if bits == 16:
        return wide[:, 0::2] | (wide[:, 1::2] << 8)
    shifts = torch.arange(0, 8, bits, device=packed.device)
    values: Tensor = (wide[:, :, None] >> shifts) & (2**bits - 1)
    return values.flatten(1)[:, :count]


def column_tensor(batch: Batch, name: str, device: torch.device) -> Tensor:
    """A column of a batch on a device in its stored dtype, the 16 bits of uint16 and bfloat16 as
    int16.
    """
    if name not in batch.columns:
        raise UsageError(
            f"column {name!r} is needed and was not read from the cache; read: "
            f"{', '.join(batch.columns)}"
        )
    column: Array | Tensor = batch.columns[name]
    stored = column if isinstance(column, Tensor) else stored_tensor(column)
    return stored.to(device, non_blocking=True)


def stored_tensor(column: Array) -> Tensor:
    """A column in host memory as a tensor; the 16 bits of uint16 as int16."""
    if column.dtype == np.uint16:
        column = column.view(np.int16)
    return torch.from_numpy(np.require(column, requirements=["C", "W"]))
