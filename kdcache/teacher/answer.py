"""What a teacher says of one batch: its logits, which of them are rows, and its features.

One forward pass in eval mode, the same for the probe before a dump, for the dump itself and for
asking again what a cache holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kdcache.cache.spec import CacheSpec
from kdcache.data.collate import Collated, read_batch
from kdcache.data.padding import IGNORED
from kdcache.data.row_selection import NEXT_TOKEN, record_labels, select_rows
from kdcache.data.samples import Samples
from kdcache.errors import DataError, UsageError
from kdcache.models.model import Output, forward_on
from kdcache.teacher.hooks import FeatureHooks
from kdcache.teacher.reduce import UNKNOWN
from kdcache.user.code_errors import users_code


@dataclass(frozen=True, slots=True)
class BatchRows:
    """The rows of a batch, which the spec calls `one` per record or `ragged`.

    mask_BL bool and pos int64 [N] of ragged rows, else None; offsets int64 [B + 1]; labels int64
    [N, J], -1 unknown; label_weight float32 [N, J]; None where there are none. pos counts from a
    record's first real position.
    """

    offsets: npt.NDArray[np.int64]
    mask_BL: Tensor | None = None
    pos: npt.NDArray[np.int64] | None = None
    labels: Tensor | None = None
    label_weight: Tensor | None = None

    @property
    def count(self) -> int:
        return int(self.offsets[-1])


@dataclass(frozen=True, slots=True)
class Answer:
    """What a teacher says of one batch, on its device.

    logits: [B, V], or [B, L, V] of which `rows` says which positions count. features: float32 by
    name, [B, *shape], or [N, *shape] of `raw` ones of ragged rows.
    """

    logits: Tensor
    rows: BatchRows
    features: dict[str, Tensor]


def read(samples: Samples, view: int, ids: Sequence[int]) -> Collated:
    """One batch of some samples of a view."""
    return read_batch(samples, [(sample_id, view) for sample_id in ids])


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module` in eval mode; afterwards its submodules are as they were. UsageError for one that
    stays in training.
    """
    with users_code(f"the teacher ({type(module).__name__}) cannot be put in eval mode"):
        before = {name: part.training for name, part in module.named_modules()}
        module.eval()
    try:
        still = [
            name or type(module).__name__ for name, part in module.named_modules() if part.training
        ]
        if still:
            raise UsageError(
                f"the teacher's {still[0]} stays in training mode after eval(); a teacher must be "
                "deterministic: do not override train() or eval()"
            )
        yield
    finally:
        for name, part in module.named_modules():
            part.training = before.get(name, part.training)


@torch.inference_mode()
def answer(
    module: nn.Module,
    hooks: FeatureHooks,
    batch: Collated,
    convention: str | None,
    device: torch.device,
    where: str = "",
) -> Answer:
    """One batch through a teacher in eval mode on `device`: its logits, rows and features.

    convention: which rows count; None where features alone are kept, a nameless row for each
    record. DataError, which begins with `where`, for a model that cannot be run on the batch, and
    for labels that do not fit its rows.
    """
    output = ask(module, hooks, batch, device, where)
    try:
        rows = rows_of(batch, output, convention)
    except DataError as e:
        raise DataError(f"{where}{e}") from e
    return Answer(output.logits, rows, hooks.take(rows.mask_BL))


@torch.inference_mode()
def ask(
    module: nn.Module, hooks: FeatureHooks, batch: Collated, device: torch.device, where: str = ""
) -> Output:
    """The forward pass of one batch alone: what `hooks` keeps of it waits there to be taken."""
    hooks.start(batch.real)
    return forward_on(module, batch.inputs, device, role="teacher", where=where)


def convention_of(spec: CacheSpec) -> str | None:
    """Which rows count of the batches of a cache; None where it keeps features alone, by record."""
    return None if not spec.has_rows and spec.rows == "one" else spec.convention


def rows_of(batch: Collated, output: Output, convention: str | None) -> BatchRows:
    """The rows of a batch that a model answered with `output`. DataError when labels do not fit
    them.
    """
    one_each = np.arange(len(batch) + 1, dtype=np.int64)
    if convention is None:
        return BatchRows(one_each)
    shape = tuple(output.logits.shape)
    selection = select_rows(batch, shape, convention, output.row_mask, shape[-1])
    if selection is None:
        labels, weight = record_labels(batch.labels, batch.label_weight, shape[-1])
        if labels is not None:
            labels = torch.where(labels == IGNORED, UNKNOWN, labels).reshape(len(batch), -1)
        return BatchRows(one_each, labels=labels, label_weight=weight)
    labels = weight = None
    if convention == NEXT_TOKEN or batch.labels is not None:
        labels = torch.where(selection.labels_N == IGNORED, UNKNOWN, selection.labels_N)[:, None]
        weight = None if selection.weights_N is None else selection.weights_N[:, None]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(selection.counts_B, dtype=np.int64)])
    return BatchRows(offsets, selection.mask_BL, selection.positions_N, labels, weight)


def row_namer(view: int, sample_ids: Sequence[int], rows: BatchRows) -> Callable[[int], str]:
    """How errors call row n of a batch: by sample and view, and by its position in a sequence."""

    def name(n: int) -> str:
        record = int(np.searchsorted(rows.offsets, n, side="right")) - 1
        where = "" if rows.pos is None else f", position {int(rows.pos[n])}"
        return f"sample {sample_ids[record]}, view {view}{where}"

    return name
