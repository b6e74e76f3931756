"""Items -> one batch: stacked, or padded where sequences differ in length; which positions are real
is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdcache.data.arrays import ArrayData
from kdcache.data.keys import arrays_of, sample_key
from kdcache.data.padding import (
    ATTENTION,
    IGNORED,
    Inputs,
    Padding,
    Real,
    decoder_inputs,
    padded,
    real_of,
    together,
)
from kdcache.data.samples import (
    Item,
    Samples,
    as_tensor,
    axes,
    document_start_of,
    input_tensors,
    labels_of,
    model_fields,
)
from kdcache.errors import DataError
from kdcache.user.code_errors import users_code

DECODER_IDS = "decoder_input_ids"


@dataclass(slots=True)
class Collated:
    """A batch of B records.

    inputs: a tensor [B, ...] or named tensors, what the model is called with.
    labels: int64 [B], [B, J], or [B, L] per position (padding is -100); None if there are none.
    label_weight: float32 of the shape of the labels, or None. document_start: uint8 [B, L] (padding
    0) or None. sample_key, view_key: uint64 [B] (view_key None where the samples have none).
    real: which positions of the inputs are real. raw_key: uint64 [B], the keys of the items' own
    inputs, where a collate_fn made others of them and somebody compares.
    """

    inputs: Inputs
    labels: torch.Tensor | None
    label_weight: torch.Tensor | None
    document_start: torch.Tensor | None
    sample_key: npt.NDArray[np.uint64]
    view_key: npt.NDArray[np.uint64] | None
    real: Real = field(default_factory=Real)
    raw_key: npt.NDArray[np.uint64] | None = None

    def __len__(self) -> int:
        return len(self.sample_key)

    @property
    def ids_BL(self) -> torch.Tensor | None:
        """The `input_ids` [B, L] of token sequences; None when the inputs are none."""
        ids = self.inputs.get("input_ids") if isinstance(self.inputs, dict) else None
        return None if ids is None or ids.ndim != 2 or ids.is_floating_point() else ids

    @property
    def real_BL(self) -> torch.Tensor | None:
        """bool [B, L], true where `input_ids` are tokens and no padding; None when there are none."""
        ids_BL = self.ids_BL
        if ids_BL is None:
            return None
        mask_BL = self.real.of(ids_BL.shape[1])
        return torch.ones(ids_BL.shape, dtype=torch.bool) if mask_BL is None else mask_BL

    @property
    def lengths(self) -> npt.NDArray[np.int64] | None:
        """int64 [B], the tokens of each record without padding; None when the inputs are no token
        sequences.
        """
        real_BL = self.real_BL
        return None if real_BL is None else real_BL.sum(1).numpy()

    @property
    def tokens(self) -> list[npt.NDArray[np.int64]]:
        """The token ids of each record, int64 [length], without padding; [] when the items are no
        token sequences.
        """
        return self._unpadded(self.ids_BL)

    @property
    def document_starts(self) -> list[npt.NDArray[np.int64]]:
        """The document_start flags of each record, [length], without padding; [] when the items
        have none.
        """
        return self._unpadded(self.document_start)

    def _unpadded(self, padded_BL: torch.Tensor | None) -> list[npt.NDArray[np.int64]]:
        real_BL = self.real_BL
        if real_BL is None or padded_BL is None:
            return []
        return [row[real_L].cpu().numpy() for row, real_L in zip(padded_BL, real_BL, strict=True)]


def beyond_tokens(batch: Collated) -> str | None:
    """What the model was given that the bare tokens of its records do not say, in words; None where
    they say all.

    Tokens alone say: that every one of them is attended to, that they are one document whose
    positions count from 0, and that all are of token type 0.
    """
    ids_BL, real_BL = batch.ids_BL, batch.real_BL
    if ids_BL is None or real_BL is None or not isinstance(batch.inputs, dict):
        return "inputs that are no token ids"
    length = ids_BL.shape[1]
    front_BL = torch.arange(length) < real_BL.sum(1)[:, None]
    if bool((front_BL != real_BL).any()):
        return "an attention_mask that hides tokens or pads on the left"
    plain: dict[str, torch.Tensor] = {
        "attention_mask": front_BL.to(torch.int64),
        "token_type_ids": torch.zeros(ids_BL.shape, dtype=torch.int64),
        "position_ids": torch.arange(length).expand(ids_BL.shape),
    }
    for name, value in batch.inputs.items():
        if name == "input_ids":
            continue
        if name not in plain or value.shape != ids_BL.shape:
            return f"{name} {list(value.shape)}"
        if bool((value.cpu() != plain[name])[real_BL].any()):
            return f"{name} of its own"
    return None


def read_batch(samples: Samples, pairs: Sequence[tuple[int, int]]) -> Collated:
    """The batch of some (sample_id, view) pairs: what both stages read. Arrays in memory give it
    whole.
    """
    if not isinstance(samples.dataset, ArrayData) or samples.padding.decoder_start is not None:
        items = [samples.item(sample_id, view) for sample_id, view in pairs]
        return collate(items, samples, [sample_id for sample_id, _ in pairs])
    sample_ids = np.array([sample_id for sample_id, _ in pairs], np.int64)
    # first: it reads, and so checks, every item once
    keys = samples.keys_in_memory(sample_ids)
    raw = samples.dataset.take(sample_ids)
    fields = arrays_of(raw)
    inputs, (labels, weight) = (
        input_tensors(raw, model_fields(fields)),
        labels_of(fields, samples.reads_labels),
    )
    return Collated(inputs, labels, weight, document_start_of(fields), keys, None, real_of(inputs))


def collate(
    items: Sequence[Item], samples: Samples | None = None, ids: Sequence[int] | None = None
) -> Collated:
    """One batch from `items`, by the own `collate_fn` of the dataset they are from if it has one.

    A `collate_fn` gets the items as the dataset gave them, and what it returns is read as an item
    is: `(x, y)`, or a dict, its first axis counting records. Without it tensors are stacked; named
    ones that differ in their first axis are padded at its end (see data/padding.py), labels with
    -100. Of `samples` whose labels nothing needs those of a
    `collate_fn` are left unread too.

    view_key is taken of what the model is given: of a `collate_fn`, the key of each record's inputs
    without padding. DataError names the field when items do not fit together, and the sample where
    `ids` are given.
    """
    if not items:
        raise DataError("a batch of no items cannot be made")
    view_keys, raw_keys = [item.view_key for item in items], None
    if samples is not None and samples.collates:
        inputs, labels, weight, start, real = _by_collate_fn(items, samples)
        view_keys = [_key_of(inputs, real, record) for record in range(len(items))]
        raw_keys = [_raw_key(item, real) for item in items] if samples.compares_raw else None
    else:
        inputs, labels, weight, start, real = _stacked(items, samples)
    _check_tokens(inputs, real, ids)
    return Collated(
        inputs,
        labels,
        weight,
        start,
        np.array([item.sample_key for item in items], np.uint64),
        None if None in view_keys else np.array(view_keys, np.uint64),
        real,
        None if raw_keys is None else np.array(raw_keys, np.uint64),
    )


def collated_tokens(
    ids: Sequence[torch.Tensor],
    document_start: Sequence[torch.Tensor],
    sample_key: npt.NDArray[np.uint64],
    padding: Padding,
) -> Collated:
    """A batch of bare token sequences: ids int64 [l] and document_start uint8 [l] of each record."""
    inputs, real = padded([{"input_ids": one} for one in ids], padding)
    return Collated(
        dict(inputs),
        None,
        None,
        together(document_start, "document_start", 0),
        sample_key,
        None,
        real,
    )


Parts = tuple[Inputs, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, Real]


def _stacked(items: Sequence[Item], samples: Samples | None) -> Parts:
    first = items[0].inputs
    inputs: Inputs
    real = Real()
    if isinstance(first, dict):
        named = [item.inputs for item in items if isinstance(item.inputs, dict)]
        if len(named) < len(items) or any(one.keys() != first.keys() for one in named):
            raise DataError(
                f"the items of a batch have different fields; the first has {sorted(first)}"
            )
        inputs, real = padded(
            _with_decoder(named, items, samples), samples.padding if samples else Padding()
        )
    else:
        xs = [item.inputs for item in items if isinstance(item.inputs, torch.Tensor)]
        if len(xs) < len(items) or any(x.shape != xs[0].shape for x in xs):
            shapes = sorted({tuple(x.shape) for x in xs})
            raise DataError(
                f"the inputs of a batch have the shapes {shapes[:4]}; expected one shape (give the "
                "dataset a collate_fn, or items that are dicts: those are padded)"
            )
        inputs = torch.stack(xs)
    return (
        inputs,
        _optional([item.labels for item in items], "label", IGNORED),
        _optional([item.label_weight for item in items], "label_weight", 0),
        _optional([item.document_start for item in items], "document_start", 0),
        real,
    )


def _with_decoder(
    named: list[dict[str, torch.Tensor]], items: Sequence[Item], samples: Samples | None
) -> list[dict[str, torch.Tensor]]:
    """The inputs, with decoder_input_ids of the labels where an encoder-decoder is given neither
    these nor others.
    """
    labels = [item.labels for item in items if item.labels is not None and item.labels.ndim == 1]
    if (
        samples is None
        or samples.padding.decoder_start is None
        or len(labels) < len(items)
        or any(name.startswith("decoder_") for name in named[0])
    ):
        return named
    made = decoder_inputs(labels, samples.padding)
    return [{**one, DECODER_IDS: ids} for one, ids in zip(named, made, strict=True)]


def _by_collate_fn(items: Sequence[Item], samples: Samples) -> Parts:
    where = f"collate_fn of {type(samples.dataset).__name__}"
    with users_code(f"{where}, over {len(items)} items"):
        batch = samples.dataset.collate_fn([item.raw for item in items])
        # transformers' BatchEncoding is no Mapping
        batch = dict(batch) if hasattr(batch, "keys") else batch
    try:
        fields = arrays_of(batch)
        inputs, (labels, weight) = (
            input_tensors(batch, model_fields(fields)),
            labels_of(fields, samples.reads_labels),
        )
        start = document_start_of(fields)
    except DataError as e:
        raise DataError(f"{where}: {e}") from e
    named = inputs if isinstance(inputs, dict) else {"input": inputs}
    others = {"label": labels, "label_weight": weight, "document_start": start}
    for name, value in {
        **named,
        **{name: value for name, value in others.items() if value is not None},
    }.items():
        if value.ndim == 0 or len(value) != len(items):
            raise DataError(
                f"{where}: {name!r} has the shape {tuple(value.shape)} for {len(items)} items; "
                "expected the first axis to count them"
            )
    real = real_of(inputs)
    if isinstance(inputs, dict) and not real.masks:
        real = _by_lengths(items, inputs, where)
    return inputs, labels, weight, start, real


def _by_lengths(items: Sequence[Item], inputs: dict[str, torch.Tensor], where: str) -> Real:
    """Which positions are real where a collate_fn gave no mask: those that the items have, if it
    padded at the end.

    A mask of its token ids is added to the inputs. DataError for token ids that are not the items',
    at their place.
    """
    known: dict[str, torch.Tensor] = {}
    for name, value in list(inputs.items()):
        own = [_sequence(item.raw, name) for item in items]
        lengths = [len(one) for one in own if one is not None]
        if value.ndim < 2 or len(lengths) < len(items) or min(lengths) >= value.shape[1]:
            # no sequence of the items, or all are as long as the batch, or cut
            continue
        mask = torch.arange(value.shape[1]) < torch.tensor(lengths)[:, None]
        known[f"{name} length"] = mask
        if name != "input_ids":
            continue
        for record, one in enumerate(own):
            ids = as_tensor(one, name)[: value.shape[1]]
            if not torch.equal(
                value[record, : len(ids)].cpu().to(torch.int64), ids.cpu().to(torch.int64)
            ):
                raise DataError(
                    f"{where}: it padded its records to {value.shape[1]} tokens and gave no "
                    f"attention_mask, and record {record} of the batch does not begin with its "
                    f"{len(ids)} tokens (was it padded on the left?): return the attention_mask too"
                )
        known = {ATTENTION: mask, **known}
        inputs[ATTENTION] = mask.to(torch.int64)
    return Real(known)


def _sequence(raw: Any, name: str) -> Any:
    """The field `name` of an item if it has an axis of positions."""
    value = raw.get(name) if isinstance(raw, Mapping) else None
    return (
        value
        if value is not None and not isinstance(value, str | bytes) and axes(value) >= 1
        else None
    )


def _key_of(inputs: Inputs, real: Real, record: int) -> int:
    """The key of what the model is given of one record: its inputs without padding, and without the
    masks of it.
    """
    named = inputs if isinstance(inputs, dict) else {"input": inputs}
    return sample_key(
        {name: real.trim(value, record) for name, value in named.items() if name not in real.masks}
    )


def _raw_key(item: Item, real: Real) -> int:
    """The key of an item's own inputs, as `_key_of` has that of what a collate_fn made of them."""
    named = model_fields(arrays_of(item.raw))
    return sample_key({name: value for name, value in named.items() if name not in real.masks})


def _check_tokens(inputs: Inputs, real: Real, samples: Sequence[int] | None) -> None:
    """DataError for ids that are no integers, and for a record without a token: no model can be
    asked about nothing.
    """
    ids = inputs.get("input_ids") if isinstance(inputs, dict) else None
    if ids is None:
        return
    if ids.is_floating_point():
        raise DataError(f"input_ids are {ids.dtype} {tuple(ids.shape)}; expected integers")
    mask_BL = real.of(ids.shape[1]) if ids.ndim == 2 else None
    if mask_BL is not None and not bool(mask_BL.any(1).all()):
        record = int((~mask_BL.any(1)).nonzero()[0])
        name = f"record {record} of a batch" if samples is None else f"sample {samples[record]}"
        raise DataError(f"{name} has no token, only padding; leave it out of the dataset")


def _optional(tensors: Sequence[torch.Tensor | None], name: str, fill: int) -> torch.Tensor | None:
    present = [one for one in tensors if one is not None]
    if not present:
        return None
    if len(present) < len(tensors):
        raise DataError(
            f"{len(tensors) - len(present)} of {len(tensors)} items of a batch have no {name}; "
            "expected all or none (a class label of -1 is unknown)"
        )
    return together(present, name, fill)
