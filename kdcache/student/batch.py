"""A micro-batch: put together in host memory from what the cache holds and what the data gives,
keys compared, rows and labels aligned; then sent to the device, in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.cache.codec import row_columns
from kdcache.cache.spec import CacheSpec, FeatureSpec
from kdcache.data.collate import Collated
from kdcache.data.keys import check_same_key
from kdcache.data.padding import IGNORED, Inputs
from kdcache.data.row_selection import (
    NEXT_TOKEN,
    RECORD,
    RowSelection,
    next_token_rows,
    position_rows,
    record_labels,
    row_starts,
    select_rows,
)
from kdcache.data.transfer import send
from kdcache.errors import DataError, UsageError, did_you_mean
from kdcache.loss.targets import SoftTargets, stored_tensor
from kdcache.models.model import Output

if TYPE_CHECKING:
    from kdcache.cache.reader import Batch

Int64s = npt.NDArray[np.int64]
# (record, position) of each row, int64 [N]: logits[rows] is [N, V]
RowPlaces = tuple[Tensor, Tensor]
# columns that are used on the host, or are part of a micro-batch in another form
OF_THE_HOST = {
    "sample_key",
    "view_key",
    "label",
    "label_weight",
    "pos",
    "token",
    "document_start",
}


@dataclass(frozen=True, slots=True)
class BatchIndex:
    """Which records a micro-batch is of: int64 [B] each; `stop` is the position after them."""

    epochs: Int64s
    sample_ids: Int64s
    views: Int64s
    stop: int
    ends_step: bool

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list(zip(self.sample_ids.tolist(), self.views.tolist(), strict=True))

    def first(self, records: int) -> BatchIndex:
        """A batch of the first few of the records."""
        few = slice(0, records)
        epochs, sample_ids, views = self.epochs[few], self.sample_ids[few], self.views[few]
        return BatchIndex(epochs, sample_ids, views, min(records, self.stop), True)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A micro-batch in host memory, whose rows are by `convention` (data/row_selection.py).

    selection: the rows of the data, None where each record is one or its labels do not say them.
    rows: those of the cache, else of the data; None where each record is one. labels [N] or [N, J],
    negative where unknown. counts: as `kd_loss` divides by them.
    """

    index: BatchIndex
    collated: Collated
    cached: Batch | None
    from_data: bool
    convention: str
    num_classes: int | None
    selection: RowSelection | None
    rows: RowPlaces | None
    labels: Tensor | None
    label_weight: Tensor | None
    counts: tuple[float, float]

    @property
    def num_rows(self) -> int:
        """RowPlaces, where a record has several of them, or none; else 0."""
        return 0 if self.rows is None else len(self.rows[0])


class LoaderBatch(TypedDict):
    """What a `Loader` yields; tensors on its device.

    inputs: a tensor, or named tensors for `model(**inputs)`. labels: int64 [N] or [N, J], negative
    where unknown, or None. label_weight: float32 [N, J] or None. targets: SoftTargets of N rows, or
    None. features: float32 by name. rows: None where each record is one row; for logits (B, L, V)
    the (record, position) of each row, int64 [N]:
    `logits[rows]` is [N, V], aligned with labels and targets. sample_ids, views: int64 [B], on the
    CPU. epoch: of the first record. position: samples of this iteration consumed after this batch,
    the `start` of a Loader that continues.
    """

    inputs: Inputs
    labels: Tensor | None
    label_weight: Tensor | None
    targets: SoftTargets | None
    features: dict[str, Tensor]
    rows: RowPlaces | None
    sample_ids: Tensor
    views: Tensor
    epoch: int
    position: int


def needed_columns(
    spec: CacheSpec, *, targets: bool, k: int | None, features: Sequence[FeatureSpec], tokens: bool
) -> list[str]:
    """The columns a student reads: nothing of the rows for `targets` False, and of topk only the
    tiers up to `k`.
    """
    wanted = {"sample_key", "view_key", "label", "label_weight", "pos"}
    if targets:
        wanted |= {*row_columns(spec, k)} - {"mean", "std"}
    for feature in features:
        wanted |= {column.name for column in feature.columns()}
    if tokens:
        wanted |= {"token", "document_start"}
    return [column.name for column in spec.columns() if column.name in wanted]


def find_features(spec: CacheSpec, names: Sequence[str]) -> list[FeatureSpec]:
    """The features with these names; UsageError with near names."""
    known = {feature.name: feature for feature in spec.features}
    for name in names:
        if name not in known:
            raise UsageError(
                f"the cache has no feature {name!r}{did_you_mean(name, known) or ' (it has none)'}"
            )
    return [known[name] for name in names]


def check_keys(index: BatchIndex, cached: Batch, collated: Collated, accept: Sequence[str]) -> None:
    """DataError naming sample and record where the data's keys are not those the teacher's answers
    were filed under.
    """
    try:
        check_same_key(cached.columns["sample_key"], collated.sample_key, index.sample_ids)
    except DataError as e:
        raise DataError(
            f"{e}; {_where(index, cached, cached.columns['sample_key'], collated.sample_key)}"
        ) from None
    if "view_key" in accept:
        return
    if "view_key" not in cached.columns:
        _check_raw(index, cached, collated)
        return
    if collated.view_key is None:
        raise DataError(
            "the cache has view keys, the data gives none; it is not the dataset the teacher saw"
        )
    try:
        check_same_key(
            cached.columns["view_key"], collated.view_key, index.sample_ids, what="view_key"
        )
    except DataError as e:
        where = _where(index, cached, cached.columns["view_key"], collated.view_key)
        raise DataError(
            f"{e}; {where}\n  the same samples, but decoded or augmented otherwise (another "
            "library version?); if that is known to be harmless: --accept view_key"
        ) from None


def _check_raw(index: BatchIndex, cached: Batch, collated: Collated) -> None:
    """DataError where a collate_fn makes other inputs of the items, whose own the teacher was
    given.
    """
    if collated.raw_key is None or collated.view_key is None:
        return
    wrong = np.flatnonzero(collated.raw_key != collated.view_key)
    if wrong.size:
        raise DataError(
            f"sample {int(index.sample_ids[wrong[0]])}: the collate_fn of the data changes what "
            f"the model is given ({wrong.size} of {len(collated)} records of this batch), and the "
            "teacher was given the items as they are; use the dataset that it saw. If the change "
            "is known to be harmless: --accept view_key"
        )


def cached_rows(spec: CacheSpec, cached: Batch, collated: Collated) -> RowPlaces | None:
    """Where the rows of a batch stand in its padded inputs; None for one row per record."""
    if "pos" not in cached.columns:
        return None
    counts_B = np.diff(cached.offsets["row"])
    record_N = np.repeat(np.arange(len(counts_B), dtype=np.int64), counts_B)
    position_N = cached.columns["pos"].astype(np.int64) + row_starts(collated)[record_N]
    return torch.from_numpy(record_N), torch.from_numpy(position_N)


def assemble(
    index: BatchIndex,
    collated: Collated,
    cached: Batch | None,
    *,
    spec: CacheSpec | None,
    from_data: bool,
    convention: str,
    targets: bool,
    num_classes: int | None,
) -> MicroBatch:
    """A batch whose rows are the cache's where it has any, else the data's; its labels must be the
    same in both.
    """
    rows = None if cached is None or spec is None else cached_rows(spec, cached, collated)
    selection = _selection(collated, convention, num_classes)
    if selection is not None and rows is None:
        rows = cast(RowPlaces, selection.mask_BL.nonzero(as_tuple=True))
    _check_positions(index, collated, rows, convention)
    labels, weight = collated.labels, collated.label_weight
    if rows is not None and selection is not None:
        labels = selection.labels_BL[rows]
        weight = None if selection.weights_BL is None else selection.weights_BL[rows]
    elif rows is not None:
        labels = weight = None
    else:
        labels, weight = record_labels(labels, weight, num_classes)
    if cached is not None and "label" in cached.columns:
        labels = _cached_labels(index, cached, labels if from_data else None, rows)
        stored = cached.columns.get("label_weight")
        if stored is None and from_data and weight is not None:
            raise DataError(
                "the data has label_weight and the cache has labels without weights; dump again, "
                "or leave label_weight out of the data"
            )
        weight = None if stored is None else torch.from_numpy(stored).reshape(labels.shape)
    if labels is not None and num_classes is not None:
        _check_range(index, labels, rows, num_classes)
    teacher = 0.0
    if targets:
        teacher = float(len(index) if rows is None else len(rows[0]))
        if cached is not None and "weight" in cached.columns:
            teacher = float(cached.columns["weight"].sum(dtype=np.float64))
    return MicroBatch(
        index,
        collated,
        cached,
        from_data,
        convention,
        num_classes,
        selection,
        rows,
        labels,
        weight,
        (_labelled(labels), teacher),
    )


def student_rows(output: Output, micro: MicroBatch, rows: RowPlaces | None) -> Tensor:
    """The logits [N, V] of the rows of a batch, or hidden states [N, H] in their place.

    rows: those of `micro`, on the device. DataError with both numbers when the student has other
    rows. Only a row_mask of the student's own has to be waited for.
    """
    logits = output.logits
    if logits.dim() == 2:
        if rows is not None:
            raise DataError(
                f"the student gives one row for each of {len(logits)} records, the teacher gave "
                f"{len(rows[0])}, one per position; expected logits (records, positions, classes)"
            )
        return logits
    if rows is None or micro.rows is None:
        raise DataError(
            f"the student gives {logits.shape[0] * logits.shape[1]} rows ({logits.shape[1]} "
            f"positions of {logits.shape[0]} records), the teacher gave {len(logits)}, one for "
            "each record"
        )
    if micro.from_data:
        _check_counts(output, micro, micro.rows[0])
    if len(micro.rows[1]) and int(micro.rows[1].max()) >= logits.shape[1]:
        raise DataError(
            f"the student gives {logits.shape[1]} positions, the teacher's answers reach position "
            f"{int(micro.rows[1].max())}"
        )
    record_N, position_N = rows
    # index_select, not logits[rows]: its gradient is written row by row, without the sort that
    # CUDA's index_put needs.
    return logits.flatten(0, 1).index_select(0, record_N * logits.shape[1] + position_N)


def _check_counts(output: Output, micro: MicroBatch, record_N: Tensor) -> None:
    """DataError where a record of the data has another number of rows for the student than for the
    teacher.
    """
    shape, selection = output.logits.shape, micro.selection
    # else the rows depend on the student too
    if selection is None or output.row_mask is not None or selection.mask_BL.shape != shape[:2]:
        mask_BL = None if output.row_mask is None else output.row_mask.cpu()
        selection = select_rows(
            micro.collated, tuple(shape), micro.convention, mask_BL, micro.num_classes
        )
        assert selection is not None  # logits of three axes have rows
    counts_B = np.bincount(record_N.numpy(), minlength=len(output.logits))
    wrong = np.flatnonzero(counts_B != selection.counts_B)
    if len(wrong):
        raise DataError(
            f"sample {int(micro.index.sample_ids[wrong[0]])}: the student has "
            f"{int(selection.counts_B[wrong[0]])} rows, the teacher's answers "
            f"{int(counts_B[wrong[0]])} ({len(wrong)} of {len(counts_B)} records differ)"
        )


def to_device(micro: MicroBatch, device: torch.device) -> tuple[LoaderBatch, dict[str, Tensor]]:
    """A micro-batch on the device, without targets and features yet, and the columns of the cache
    that these are made of, as they are stored; in one copy that nobody waits for.

    The labels cross once, also where the targets ask for them.
    """
    inputs = micro.collated.inputs
    named = inputs if isinstance(inputs, dict) else {"": inputs}
    cached = {} if micro.cached is None else micro.cached.columns
    rows = dict(zip(("record", "position"), micro.rows or (), strict=False))
    other = {"label": micro.labels, "label_weight": micro.label_weight, **rows}
    fields = {("input", name): x for name, x in named.items()}
    fields |= {
        ("column", name): stored_tensor(column)
        for name, column in cached.items()
        if name not in OF_THE_HOST
    }
    fields |= {("", name): x for name, x in other.items() if x is not None}
    sent = send(fields, device)
    named = {name: x for (part, name), x in sent.items() if part == "input"}
    columns = {name: x for (part, name), x in sent.items() if part == "column"}
    label = sent.get(("", "label"))
    if label is not None and "label" in cached:
        columns["label"] = label if label.dim() == 2 else label[:, None]
    batch = LoaderBatch(
        inputs=named if isinstance(inputs, dict) else named[""],
        labels=label,
        label_weight=sent.get(("", "label_weight")),
        targets=None,
        features={},
        rows=(sent["", "record"], sent["", "position"]) if rows else None,
        sample_ids=torch.from_numpy(micro.index.sample_ids),
        views=torch.from_numpy(micro.index.views),
        epoch=int(micro.index.epochs[0]),
        position=micro.index.stop,
    )
    return batch, columns


def _where(index: BatchIndex, cached: Batch, a: npt.NDArray[Any], b: npt.NDArray[Any]) -> str:
    at = int(np.flatnonzero(a != b)[0])
    return (
        f"record {int(cached.records[at])} of the cache is view {int(index.views[at])} of that "
        "sample"
    )


def _selection(collated: Collated, convention: str, num_classes: int | None) -> RowSelection | None:
    if convention == RECORD:
        return None
    if convention == NEXT_TOKEN:
        return next_token_rows(collated, None, num_classes)
    labels = collated.labels
    return None if labels is None or labels.dim() != 2 else position_rows(collated, labels.shape[1])


def _check_positions(
    index: BatchIndex, collated: Collated, rows: RowPlaces | None, convention: str
) -> None:
    """DataError for a row of the teacher's at a place where the data has no token, or none after it
    to predict.
    """
    real_BL = collated.real_BL
    if rows is None or real_BL is None or convention != NEXT_TOKEN:
        return
    record_N, position_N = rows
    outside_N = position_N + 1 >= real_BL.shape[1]
    for place_N in (position_N, position_N + 1):
        outside_N |= ~real_BL[record_N, place_N.clamp(max=real_BL.shape[1] - 1)]
    if bool(outside_N.any()):
        row = int(outside_N.nonzero()[0])
        at = int(record_N[row])
        raise DataError(
            f"sample {int(index.sample_ids[at])}: the teacher answered at position "
            f"{int(position_N[row])}, the data has {int(real_BL[at].sum())} tokens"
        )


def _cached_labels(
    index: BatchIndex, cached: Batch, given: Tensor | None, rows: RowPlaces | None
) -> Tensor:
    """The cache's labels, [N] where J is 1. DataError naming the first that the data has otherwise."""
    labels_NJ = torch.from_numpy(cached.columns["label"].astype(np.int64))
    labels = labels_NJ[:, 0] if labels_NJ.shape[1] == 1 else labels_NJ
    if given is None:
        return labels
    given = torch.where(given == IGNORED, -1, given)
    if given.shape != labels.shape:
        raise DataError(
            f"the data has labels {list(given.shape)}, the cache {list(labels.shape)} for the same "
            "records"
        )
    wrong = _in_any(given != labels).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"sample {_sample(index, rows, row)}: its label is {labels[row].tolist()} in the cache "
            f"and {given[row].tolist()} in the data ({len(wrong)} of {len(labels)} rows of this "
            "batch differ); are the classes in another order than the teacher's?"
        )
    return labels


def _check_range(
    index: BatchIndex, labels: Tensor, rows: RowPlaces | None, num_classes: int
) -> None:
    if not labels.numel() or (int(labels.max()) < num_classes and int(labels.min()) >= IGNORED):
        return
    row = int(_in_any((labels >= num_classes) | (labels < IGNORED)).nonzero()[0])
    raise DataError(
        f"sample {_sample(index, rows, row)}: its label is {labels[row].tolist()}; expected 0 to "
        f"{num_classes - 1} (or -1 or {IGNORED}, unknown)"
    )


def _sample(index: BatchIndex, rows: RowPlaces | None, row: int) -> str:
    if rows is None:
        return str(int(index.sample_ids[row]))
    return f"{int(index.sample_ids[int(rows[0][row])])}, position {int(rows[1][row])}"


def _labelled(labels: Tensor | None) -> float:
    return 0.0 if labels is None else float(_in_any(labels >= 0).sum())


def _in_any(x: Tensor) -> Tensor:
    """[N] or [N, J] -> [N]: in any of the J. N may be 0."""
    return x if x.dim() == 1 else x.any(1)
