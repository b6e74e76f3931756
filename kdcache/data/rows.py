"""Which positions of a batch are rows, and what they are to predict: the same answer in both stages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kdcache.data.collate import IGNORED, Collated
from kdcache.errors import DataError


@dataclass(frozen=True, slots=True)
class RowSelection:
    """The rows of a batch of sequences.

    mask_BL: bool, position p of record b is a row. labels_BL: int64, the hard label of each row, -100 for none and
    wherever mask_BL is false. Both are aligned with logits (B, L, V): nothing is to be shifted any more.
    """

    mask_BL: torch.Tensor
    labels_BL: torch.Tensor

    @property
    def counts_B(self) -> npt.NDArray[np.int64]:
        """int64 [B], rows of each record."""
        return self.mask_BL.sum(1).cpu().numpy()

    @property
    def positions_N(self) -> npt.NDArray[np.int32]:
        """int32 [N], the position of each row, records one after another."""
        return self.mask_BL.nonzero()[:, 1].to(torch.int32).cpu().numpy()

    @property
    def labels_N(self) -> torch.Tensor:
        """int64 [N], the hard label of each row, records one after another."""
        return self.labels_BL[self.mask_BL]


def next_token_rows(collated: Collated, row_mask: torch.Tensor | None = None) -> RowSelection:
    """Rows of a causal language model: the row at p predicts token p + 1.

    A position is no row when it or the next one is padding (or has attention_mask 0), when a document starts at
    p + 1, when labels per position are given and labels[p + 1] is -100 (Hugging Face's convention: labels come
    unshifted and the loss shifts them), or when `row_mask` [B, L] is false. Without labels the label is the next token.
    """
    if collated.lengths is None or not isinstance(collated.inputs, dict):
        raise DataError("next-token rows need items that are dicts with 1-D integer input_ids")
    ids_BL = collated.inputs["input_ids"]
    if ids_BL.is_floating_point() or ids_BL.ndim != 2:
        raise DataError(f"input_ids are {ids_BL.dtype} {tuple(ids_BL.shape)}; expected integers [B, L]")
    real_BL = torch.arange(ids_BL.shape[1]) < torch.from_numpy(collated.lengths)[:, None]
    real_BL = real_BL.to(ids_BL.device)
    if "attention_mask" in collated.inputs:
        real_BL = real_BL & (collated.inputs["attention_mask"] != 0)
    targets_BL = ids_BL.to(torch.int64)
    counts_BL = real_BL
    if collated.labels is not None:
        targets_BL = _per_position(collated.labels, ids_BL.shape[0], ids_BL.shape[1]).to(ids_BL.device)
        counts_BL = counts_BL & (targets_BL != IGNORED)
    if collated.document_start is not None:
        counts_BL = counts_BL & (collated.document_start.to(ids_BL.device) == 0)
    mask_BL = torch.zeros_like(real_BL)
    mask_BL[:, :-1] = real_BL[:, :-1] & counts_BL[:, 1:]
    labels_BL = torch.full_like(targets_BL, IGNORED)
    labels_BL[:, :-1] = targets_BL[:, 1:]
    return _selection(mask_BL, labels_BL, row_mask)


def position_rows(shape: tuple[int, int], labels: torch.Tensor | None = None,
                  row_mask: torch.Tensor | None = None, device: torch.device | str = "cpu") -> RowSelection:
    """Rows of a model that gives (B, L, V) without being a causal language model: one per position, nothing shifted.

    `row_mask` [B, L] says which positions are rows; without it the labels [B, L] do (all but -100, which is also
    their padding); without either all are.
    """
    labels_BL = torch.full(shape, IGNORED, device=device)
    mask_BL = torch.ones(shape, dtype=torch.bool, device=device)
    if labels is not None:
        labels_BL = _per_position(labels, *shape).to(device)
        mask_BL = mask_BL if row_mask is not None else labels_BL != IGNORED
    return _selection(mask_BL, labels_BL, row_mask)


MOST_LABELS = 16                # of a row, as of a cache's (docs/format.md 3.1)


def record_labels(labels: torch.Tensor | None, weight: torch.Tensor | None,
                  num_classes: int | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(labels, label_weight) of a batch whose records are one row each, as both stages take them: [B] for one label a
    record, which may come as [B, 1], and [B, J] for several; weights are [B, J] then too.

    DataError for labels that are no class indices by their shape: one number for each of `num_classes` classes where
    no label_weight says that they are J classes, more than 16, a map; and for weights of another shape.
    """
    if labels is None:
        if weight is not None:
            raise DataError("the data has label_weight, and no labels that they are of")
        return None, None
    labels_BJ = labels.reshape(len(labels), -1)
    count = labels_BJ.shape[1]
    if weight is not None:
        if weight.numel() != labels_BJ.numel() or len(weight) != len(labels):
            raise DataError(f"label_weight has the shape {list(weight.shape)}; expected that of the labels, "
                            f"{list(labels.shape)}")
        weight = weight.reshape(labels_BJ.shape)
    elif count == num_classes and count > 1:
        raise DataError(f"labels are {list(labels.shape)}, one number for each of {count} classes, {_hot(labels_BJ)}")
    if labels.dim() > 2 or count > MOST_LABELS:
        raise DataError(f"labels are {list(labels.shape)}, for {len(labels)} records of one row each; expected one "
                        f"class index a record, or up to {MOST_LABELS} (of one-hot rows the class: labels.argmax(1))")
    return labels_BJ[:, 0] if count == 1 else labels_BJ, weight


def _hot(labels_BJ: torch.Tensor) -> str:
    """What one number for each class is, by its values, and what to do."""
    if not bool(((labels_BJ == 0) | (labels_BJ == 1)).all()):
        return "where a class index was expected; if they are classes, several for each record, give label_weight too"
    if bool((labels_BJ.sum(1) == 1).all()):
        return "which looks one-hot; expected the class of each record: give labels.argmax(1)"
    return ("which looks like several classes at once; that is a matter of one sigmoid for each class, and here "
            "everything is one softmax over all of them: expected one class index a record")


def select_rows(collated: Collated, logits_shape: tuple[int, ...],
                row_mask: torch.Tensor | None = None) -> RowSelection | None:
    """The rows of a batch whose model gave logits of `logits_shape`: None for (B, V), where each record is one row;
    next-token rows for (B, L, V) and items with input_ids; else one row per position."""
    if len(logits_shape) == 2:
        return None
    if collated.lengths is None:
        return position_rows((logits_shape[0], logits_shape[1]), collated.labels, row_mask)
    selection = next_token_rows(collated, row_mask)
    if selection.mask_BL.shape != logits_shape[:2]:
        raise DataError(f"the model gave logits for (records, positions) {logits_shape[:2]}; "
                        f"its input_ids are {tuple(selection.mask_BL.shape)}")
    return selection


def _per_position(labels: torch.Tensor, records: int, length: int) -> torch.Tensor:
    if labels.shape != (records, length):
        raise DataError(f"labels have the shape {tuple(labels.shape)}; a model with a row per position needs "
                        f"{(records, length)}, -100 where a position does not count")
    return labels


def _selection(mask_BL: torch.Tensor, labels_BL: torch.Tensor, row_mask: torch.Tensor | None) -> RowSelection:
    if row_mask is not None:
        if row_mask.shape != mask_BL.shape:
            raise DataError(f"row_mask has the shape {tuple(row_mask.shape)}; expected {tuple(mask_BL.shape)}")
        mask_BL = mask_BL & (row_mask.to(mask_BL.device) != 0)
    return RowSelection(mask_BL, labels_BL.masked_fill(~mask_BL, IGNORED))
