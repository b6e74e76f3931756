"""Rows as arrays: what a teacher said about N positions, and the rules every writer of them must
keep.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NoReturn

import numpy as np

from kdcache.cache.columns import Array
from kdcache.cache.spec import CacheSpec
from kdcache.errors import DataError, UsageError

MAX_POS = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """N rows of teacher output; a field is None exactly where the spec has no such column.

    topk: ids int64 [N, K] and logits float32 [N, K] in the order of a support (logit descending, then
    id ascending), K = the largest tier; tail_lse float32 [N, tiers, T] relative to logits[:, 0],
    without the labels. full: logits float32 [N, V] in id order. none: nothing but pos.
    label int64 [N, J] (-1 unknown), label_weight and label_logit (raw, topk only) float32 [N, J];
    mean, std, weight float32 [N]; pos int64 [N].
    """

    logits: Array | None = None
    ids: Array | None = None
    tail_lse: Array | None = None
    label: Array | None = None
    label_weight: Array | None = None
    label_logit: Array | None = None
    mean: Array | None = None
    std: Array | None = None
    weight: Array | None = None
    pos: Array | None = None


@dataclass(frozen=True, slots=True)
class RowNames:
    """How errors call row n: by its record, and in a ragged level (`offsets` int64 [records + 1])
    by its row there.
    """

    first_record: int = 0
    offsets: Array | None = None

    def __call__(self, n: int) -> str:
        if self.offsets is None:
            return f"record {self.first_record + n}"
        record = int(np.searchsorted(self.offsets, n, side="right")) - 1
        return f"record {self.first_record + record}, row {n - int(self.offsets[record])}"

    def require(self, good: Array, why: str) -> None:
        """DataError naming the first row of `good` bool [N, ...] that is not all true."""
        if not good.all():
            self.fail(int(np.argmin(good.reshape(len(good), -1).all(axis=1))), why)

    def fail(self, n: int, why: str) -> NoReturn:
        raise DataError(f"{self(n)}: {why}")


def row_shapes(spec: CacheSpec) -> dict[str, tuple[tuple[int, ...], str]]:
    """Field of `Rows` -> (inner shape, 'int' or 'float') for the fields that `spec` keeps."""
    out: dict[str, tuple[tuple[int, ...], str]] = {}
    if spec.has_rows:
        out["logits"] = ((spec.k,), "float")
    if spec.is_sparse:
        out["ids"] = ((spec.k,), "int")
        out["tail_lse"] = ((len(spec.tiers), len(spec.temperatures)), "float")
    if spec.labels:
        out["label"] = ((spec.labels,), "int")
        if spec.label_weights:
            out["label_weight"] = ((spec.labels,), "float")
        if spec.is_sparse:
            out["label_logit"] = ((spec.labels,), "float")
    names = {c.name for c in spec.columns() if c.level == "row"}
    out |= {name: ((), "float") for name in ("mean", "std", "weight") if name in names}
    return out | ({"pos": ((), "int")} if "pos" in names else {})


def check_shapes(spec: CacheSpec, rows: Rows) -> int:
    """N; UsageError unless `rows` has exactly the arrays of the spec, in the right dtypes and
    shapes.
    """
    shapes = row_shapes(spec)
    count = None
    for name in (f.name for f in fields(Rows)):
        array: Array | None = getattr(rows, name)
        if array is None and name not in shapes:
            continue
        if array is None or name not in shapes:
            raise UsageError(
                f"rows.{name} is {'missing' if array is None else 'given'}, and this spec "
                f"{'stores it' if array is None else 'stores no such column'}"
            )
        inner, kind = shapes[name]
        good = array.dtype == np.float32 if kind == "float" else array.dtype.kind in "iu"
        count = len(array) if count is None and array.ndim else count
        if not good or array.shape != (count, *inner):
            expected = "float32" if kind == "float" else "integers"
            raise UsageError(
                f"rows.{name}: {array.dtype} {list(array.shape)} given; expected {expected} "
                f"{[count if count is not None else 'N', *inner]}"
            )
    if count is None:
        raise UsageError("this spec keeps no row columns")
    return count


def check_rows(spec: CacheSpec, rows: Rows, names: RowNames) -> None:
    """DataError naming the first row that breaks a rule of the format; UsageError for a wrong dtype
    or shape.
    """
    check_shapes(spec, rows)
    logits = rows.logits
    if logits is not None and len(logits):
        names.require(~np.isnan(logits), "a logit is NaN")
        names.require(logits != np.inf, "a logit is +inf")
        names.require(logits.max(axis=1) != -np.inf, "every logit is -inf")
    if rows.ids is not None and logits is not None:
        _check_head(spec, rows.ids, logits, names)
    if rows.label is not None:
        low, high = -1, spec.num_classes - 1
        good = (rows.label >= low) & (rows.label <= high)
        if not good.all():
            bad = int(rows.label[~good].flat[0])
            names.require(
                good, f"label {bad} is out of range; expected {low} (unknown) or 0 to {high}"
            )
    if rows.tail_lse is not None:
        names.require(
            ~np.isnan(rows.tail_lse) & (rows.tail_lse != np.inf), "a tail_lse is NaN or +inf"
        )
        _check_tail(spec, rows, names)
    for field in ("label_weight", "std", "weight"):
        array = getattr(rows, field)
        if array is not None:
            names.require(
                np.isfinite(array) & (array >= 0), f"{field} must be finite and not negative"
            )
    if rows.mean is not None:
        names.require(
            np.isfinite(rows.mean), "mean must be finite; it is taken over the finite logits"
        )
    if rows.pos is not None:
        names.require((rows.pos >= 0) & (rows.pos < MAX_POS), f"pos must be 0 to {MAX_POS - 1}")


def _check_head(spec: CacheSpec, ids: Array, logits: Array, names: RowNames) -> None:
    good = (ids >= 0) & (ids < spec.num_classes)
    if not good.all():
        names.require(
            good,
            f"id {int(ids[~good].flat[0])} is out of range; expected 0 to {spec.num_classes - 1}",
        )
    ordered = np.sort(ids, axis=1)
    names.require(ordered[:, 1:] != ordered[:, :-1], "an id occurs twice in the support")
    falls = logits[:, :-1] > logits[:, 1:]
    ties = (logits[:, :-1] == logits[:, 1:]) & (ids[:, :-1] < ids[:, 1:])
    names.require(
        falls | ties, "the support is out of order; expected logit descending, then id ascending"
    )


def _check_tail(spec: CacheSpec, rows: Rows, names: RowNames) -> None:
    """The labels' logits agree with the support, and a tail of no ids is empty."""
    assert rows.ids is not None and rows.logits is not None and rows.tail_lse is not None
    for tier, k in enumerate(spec.tiers):
        if k + spec.labels < spec.num_classes:
            continue
        left = np.full(len(rows.ids), spec.num_classes - k)
        if rows.label is not None:
            left -= labels_outside(rows.ids[:, :k], rows.label).sum(axis=1)
        names.require(
            (left[:, None] > 0) | (rows.tail_lse[:, tier] == -np.inf),
            f"tail_lse of tier {k} must be -inf: support and labels are all {spec.num_classes} "
            "classes",
        )
    if rows.label is None or rows.label_logit is None:
        return
    known = rows.label >= 0
    names.require(
        ~known | (~np.isnan(rows.label_logit) & (rows.label_logit != np.inf)),
        "a label_logit is NaN or +inf",
    )
    in_head = np.zeros_like(known)
    for j in range(spec.labels):
        at = rows.ids == rows.label[:, j, None]
        in_head[:, j] = at.any(axis=1)
        same = ~at | (rows.logits == rows.label_logit[:, j, None])
        names.require(same, "label_logit is not the logit that the support has for this label")
        again = known[:, :j] & (rows.label[:, :j] == rows.label[:, j, None])
        names.require(
            ~again | (rows.label_logit[:, :j] == rows.label_logit[:, j, None]),
            "one label occurs with two values of label_logit",
        )
    names.require(
        ~known | in_head | (rows.label_logit <= rows.logits[:, -1:]),
        "label_logit is above the last logit of a support that lacks the label",
    )


def labels_outside(ids: Array, label: Array) -> Array:
    """bool [N, J]: the first occurrence of each known label that is not among ids [N, K]."""
    out = label >= 0
    for j in range(label.shape[1]):
        out[:, j] &= ~(ids == label[:, j, None]).any(axis=1)
        out[:, j] &= ~(label[:, :j] == label[:, j, None]).any(axis=1)
    return out


def tail_with_labels(
    tail_lse: Array, relative_label: Array, outside: Array, temperatures: tuple[str, ...]
) -> Array:
    """float64 [N, T]: tail_lse [N, T] with labels outside the support [N, J] added back at each
    temperature.

    `relative_label` float64 [N, J] is label_logit - max.
    """
    out = tail_lse.astype(np.float64)
    for t, temperature in enumerate(temperatures):
        for j in np.flatnonzero(outside.any(axis=0)):
            added = np.where(outside[:, j], relative_label[:, j] / float(temperature), -np.inf)
            out[:, t] = np.logaddexp(out[:, t], added)
    return out
