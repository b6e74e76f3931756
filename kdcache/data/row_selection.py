"""Which positions of a batch are rows, and what they are to predict: the same answer in both
stages.

Three conventions, and the model decides which one holds:

    record      one row for each record: logits (B, V)
    position    logits (B, L, V), the row at p answers for position p: taggers, masked language
                models, frames of speech, the decoder of an encoder-decoder, whose labels stand
                where it gives them
    next-token  logits (B, L, V), the row at p predicts token p + 1: causal language models
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kdcache.data.collate import Collated
from kdcache.data.padding import IGNORED
from kdcache.errors import DataError

RECORD, POSITION, NEXT_TOKEN = CONVENTIONS = ("record", "position", "next-token")
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RowSelection:
    """The rows of a batch of sequences.

    mask_BL: bool, position p of record b is a row. labels_BL: int64, the hard label of each row,
    -100 for none and wherever mask_BL is false. weights_BL: float32, the weight of each label, or
    None. All are aligned with logits (B, L, V): nothing is to be shifted any more. starts_B: int64,
    the first real position of each record.
    """

    mask_BL: torch.Tensor
    labels_BL: torch.Tensor
    weights_BL: torch.Tensor | None
    starts_B: Int64s

    @property
    def counts_B(self) -> Int64s:
        """int64 [B], rows of each record."""
        return self.mask_BL.sum(1).cpu().numpy()

    @property
    def positions_N(self) -> Int64s:
        """int64 [N], the position of each row, counted from its record's first real one; records
        one after another.

        Whatever shares the batch, and on whichever side it is padded, a row has one position.
        """
        record_N, position_N = self.mask_BL.nonzero().T.cpu().numpy()
        out: Int64s = position_N - self.starts_B[record_N]
        return out

    @property
    def labels_N(self) -> torch.Tensor:
        """int64 [N], the hard label of each row, records one after another."""
        return self.labels_BL[self.mask_BL]

    @property
    def weights_N(self) -> torch.Tensor | None:
        """float32 [N], the weight of each row's label, or None."""
        return None if self.weights_BL is None else self.weights_BL[self.mask_BL]


def next_token_rows(
    collated: Collated, row_mask: torch.Tensor | None = None, num_classes: int | None = None
) -> RowSelection:
    """Rows of a causal language model: the row at p predicts token p + 1.

    A position is no row when it or the next one is padding (or has attention_mask 0), when a
    document starts at p + 1, when labels per position are given and labels[p + 1] is -100 (Hugging
    Face's convention: labels come unshifted and the loss shifts them), or when `row_mask` [B, L] is
    false. Without labels the label is the next token; one of `num_classes` or above, which the
    model can read and not predict (an image's place), makes no row.
    """
    ids_BL, real_BL = collated.ids_BL, collated.real_BL
    if ids_BL is None or real_BL is None:
        raise DataError("next-token rows need inputs with integer input_ids [B, L]")
    targets_BL = ids_BL.to(torch.int64).cpu()
    counts_BL = real_BL
    if collated.labels is not None:
        targets_BL = _per_position(collated.labels, ids_BL.shape[0], ids_BL.shape[1]).cpu()
        counts_BL = counts_BL & (targets_BL != IGNORED)
    elif num_classes is not None:
        counts_BL = counts_BL & (targets_BL < num_classes)
    if collated.document_start is not None:
        counts_BL = counts_BL & (collated.document_start.cpu() == 0)
    mask_BL = torch.zeros_like(real_BL)
    mask_BL[:, :-1] = real_BL[:, :-1] & counts_BL[:, 1:]
    weights_BL = _weights(collated, ids_BL.shape)
    if weights_BL is not None:
        weights_BL = torch.cat([weights_BL[:, 1:], torch.zeros_like(weights_BL[:, :1])], 1)
    labels_BL = torch.full_like(targets_BL, IGNORED)
    labels_BL[:, :-1] = targets_BL[:, 1:]
    return _selection(mask_BL, labels_BL, weights_BL, row_mask, _starts(real_BL, len(collated)))


def position_rows(
    collated: Collated, length: int, row_mask: torch.Tensor | None = None
) -> RowSelection:
    """Rows of a model that answers for each of `length` positions: nothing is shifted.

    `row_mask` [B, L] says which positions are rows; without it the labels [B, L] do (all but -100,
    which is also their padding); without either all that are no padding. DataError where the batch
    has padding and nothing says which of these positions it is.
    """
    shape = (len(collated), length)
    labels_BL = torch.full(shape, IGNORED)
    real_BL = collated.real.of(length, "decoder" if _decodes(collated, length) else "")
    mask_BL = torch.ones(shape, dtype=torch.bool) if real_BL is None else real_BL
    labels = collated.labels
    if labels is not None:
        labels_BL = _per_position(labels, *shape).cpu()
        mask_BL = mask_BL if row_mask is not None else mask_BL & (labels_BL != IGNORED)
    elif row_mask is None and real_BL is None and collated.real.padded:
        raise DataError(
            f"the model gave logits for {length} positions of records that were padded, and "
            f"nothing says which of these are real: let it return row_mask [B, {length}] beside "
            "its logits, or give labels per position (-100 where a position does not count)"
        )
    weights_BL = _weights(collated, torch.Size(shape))
    return _selection(mask_BL, labels_BL, weights_BL, row_mask, _starts(real_BL, len(collated)))


MOST_LABELS = 16  # of a row, as of a cache's (docs/format.md 3.1)


def record_labels(
    labels: torch.Tensor | None, weight: torch.Tensor | None, num_classes: int | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(labels, label_weight) of a batch whose records are one row each, as both stages take them:
    [B] for one label a record, which may come as [B, 1], and [B, J] for several; weights are [B, J]
    then too.

    DataError for labels that are no class indices by their shape: one number for each of
    `num_classes` classes where no label_weight says that they are J classes, more than 16, a map;
    and for weights of another shape.
    """
    if labels is None:
        if weight is not None:
            raise DataError("the data has label_weight, and no labels that they are of")
        return None, None
    labels_BJ = labels.reshape(len(labels), -1)
    count = labels_BJ.shape[1]
    if weight is not None:
        if weight.numel() != labels_BJ.numel() or len(weight) != len(labels):
            raise DataError(
                f"label_weight has the shape {list(weight.shape)}; expected that of the labels, "
                f"{list(labels.shape)}"
            )
        weight = weight.reshape(labels_BJ.shape)
    elif count == num_classes and count > 1:
        raise DataError(
            f"labels are {list(labels.shape)}, one number for each of {count} classes, "
            f"{_hot(labels_BJ)}"
        )
    if labels.dim() > 2 or count > MOST_LABELS:
        raise DataError(
            f"labels are {list(labels.shape)}, for {len(labels)} records of one row each; expected "
            f"one class index a record, or up to {MOST_LABELS} (of one-hot rows the class: "
            "labels.argmax(1))"
        )
    return labels_BJ[:, 0] if count == 1 else labels_BJ, weight


def _hot(labels_BJ: torch.Tensor) -> str:
    """What one number for each class is, by its values, and what to do."""
    if not bool(((labels_BJ == 0) | (labels_BJ == 1)).all()):
        return (
            "where a class index was expected; if they are classes, several for each record, give "
            "label_weight too"
        )
    if bool((labels_BJ.sum(1) == 1).all()):
        return "which looks one-hot; expected the class of each record: give labels.argmax(1)"
    return (
        "which looks like several classes at once; that is a matter of one sigmoid for each class, "
        "and here everything is one softmax over all of them: expected one class index a record"
    )


def select_rows(
    collated: Collated,
    logits_shape: tuple[int, ...],
    convention: str,
    row_mask: torch.Tensor | None = None,
    num_classes: int | None = None,
) -> RowSelection | None:
    """The rows of a batch whose model gave logits of `logits_shape`, by convention; None for one
    row per record.

    num_classes: of the model, whose hidden states may stand in place of logits; None does not look
    at it.
    """
    if (len(logits_shape) == 2) != (convention == RECORD):
        raise DataError(
            f"the model gave logits {list(logits_shape)} where rows are by {convention}; expected "
            f"{'(records, classes)' if convention == RECORD else '(records, positions, classes)'}"
        )
    if convention == RECORD:
        return None
    if convention == POSITION:
        return position_rows(collated, logits_shape[1], row_mask)
    selection = next_token_rows(collated, row_mask, num_classes)
    if selection.mask_BL.shape != logits_shape[:2]:
        raise DataError(
            f"the model gave logits for (records, positions) {logits_shape[:2]}; its input_ids are "
            f"{tuple(selection.mask_BL.shape)}"
        )
    return selection


def row_starts(collated: Collated) -> Int64s:
    """int64 [B]: where each record's real positions begin, on the axis along which rows are
    counted.
    """
    if not isinstance(collated.inputs, dict):
        return np.zeros(len(collated), np.int64)
    decoder = [
        value
        for name, value in collated.inputs.items()
        if name.startswith("decoder_") and value.ndim >= 2
    ]
    ids = decoder[0] if decoder else collated.ids_BL
    mask_BL = None if ids is None else collated.real.of(ids.shape[1], "decoder" if decoder else "")
    return _starts(mask_BL, len(collated))


def label_evidence(collated: Collated) -> str | None:
    """What labels per position are beside the tokens they stand at, where these are known and
    counted.

    "tokens": the very tokens, as a causal model of Hugging Face is given them. "next": the tokens
    one position on, for a loss that shifts nothing. "other": something else, as a tagger's. None
    without such labels or tokens.
    """
    ids_BL, real_BL, labels = collated.ids_BL, collated.real_BL, collated.labels
    if ids_BL is None or real_BL is None or labels is None or labels.shape != ids_BL.shape:
        return None
    ids_BL, labels_BL = ids_BL.cpu().to(torch.int64), labels.cpu()
    known_BL = real_BL & (labels_BL >= 0)
    if not bool(known_BL.any()):
        return None
    if bool((labels_BL == ids_BL)[known_BL].all()):
        return "tokens"
    follows_BL = known_BL[:, :-1] & real_BL[:, 1:]
    if bool(follows_BL.any()) and bool((labels_BL[:, :-1] == ids_BL[:, 1:])[follows_BL].all()):
        return "next"
    return "other"


def _starts(real_BL: torch.Tensor | None, records: int) -> Int64s:
    """int64 [B], the first real position of each record; 0 where nothing says, not 0 for padding on
    the left.
    """
    return (
        np.zeros(records, np.int64)
        if real_BL is None
        else real_BL.to(torch.int64).argmax(1).numpy()
    )


def _decodes(collated: Collated, length: int) -> bool:
    """Whether positions of that length are those of a decoder's inputs."""
    if not isinstance(collated.inputs, dict):
        return False
    return any(
        name.startswith("decoder_") and value.ndim >= 2 and value.shape[1] == length
        for name, value in collated.inputs.items()
    )


def _weights(collated: Collated, shape: torch.Size) -> torch.Tensor | None:
    weight = collated.label_weight
    if weight is None:
        return None
    if weight.shape != shape:
        raise DataError(
            f"label_weight has the shape {list(weight.shape)}; a model with a row per position "
            f"needs {list(shape)}, one for each label"
        )
    return weight.cpu()


def _per_position(labels: torch.Tensor, records: int, length: int) -> torch.Tensor:
    if labels.shape != (records, length):
        raise DataError(
            f"labels have the shape {tuple(labels.shape)}; a model with a row per position needs "
            f"{(records, length)}, -100 where a position does not count"
        )
    return labels


def _selection(
    mask_BL: torch.Tensor,
    labels_BL: torch.Tensor,
    weights_BL: torch.Tensor | None,
    row_mask: torch.Tensor | None,
    starts_B: Int64s,
) -> RowSelection:
    if row_mask is not None:
        if row_mask.shape != mask_BL.shape:
            raise DataError(
                f"row_mask has the shape {tuple(row_mask.shape)}; expected {tuple(mask_BL.shape)}"
            )
        mask_BL = mask_BL & (row_mask.cpu() != 0)
    return RowSelection(mask_BL, labels_BL.masked_fill(~mask_BL, IGNORED), weights_BL, starts_B)
