"""Items -> one batch: stacked, or padded where sequences differ in length; how far each record goes is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad

from kdcache.data.arrays import ArrayData
from kdcache.data.keys import arrays_of
from kdcache.data.samples import Inputs, Item, Samples, document_start_of, input_tensors, labels_of, model_fields
from kdcache.errors import DataError

IGNORED = -100                  # PyTorch's and Hugging Face's label of a position that does not count


@dataclass(slots=True)
class Collated:
    """A batch of B records.

    inputs: a tensor [B, ...] or named tensors, what the model is called with.
    labels: int64 [B], [B, J], or [B, L] per position (padding is -100); None if there are none.
    label_weight: float32 [B, J] or None. document_start: uint8 [B, L] (padding 0) or None.
    sample_key, view_key: uint64 [B] (view_key None where the samples have none).
    lengths: int64 [B], tokens of each record before padding, where the items have 1-D `input_ids`; else None.
    """

    inputs: Inputs
    labels: torch.Tensor | None
    label_weight: torch.Tensor | None
    document_start: torch.Tensor | None
    sample_key: npt.NDArray[np.uint64]
    view_key: npt.NDArray[np.uint64] | None
    lengths: npt.NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.sample_key)

    @property
    def tokens(self) -> list[npt.NDArray[np.int64]]:
        """The token ids of each record, int64 [length], without padding; [] when the items are no token sequences."""
        return self._unpadded(self.inputs["input_ids"] if isinstance(self.inputs, dict) else None)

    @property
    def document_starts(self) -> list[npt.NDArray[np.int64]]:
        """The document_start flags of each record, [length], without padding; [] when the items have none."""
        return self._unpadded(self.document_start)

    def _unpadded(self, padded_BL: torch.Tensor | None) -> list[npt.NDArray[np.int64]]:
        if self.lengths is None or padded_BL is None:
            return []
        return [row[:length] for row, length in zip(padded_BL.cpu().numpy(), self.lengths.tolist(), strict=True)]


def read_batch(samples: Samples, pairs: Sequence[tuple[int, int]]) -> Collated:
    """The batch of some (sample_id, view) pairs: what both stages read. Arrays in memory give it whole."""
    if not isinstance(samples.dataset, ArrayData):
        items = [samples.item(sample_id, view) for sample_id, view in pairs]
        return collate(items, samples.dataset, labels=samples.labels)
    sample_ids = np.array([sample_id for sample_id, _ in pairs], np.int64)
    keys = samples.keys_in_memory(sample_ids)           # first: it reads, and so checks, every item once
    raw = samples.dataset.take(sample_ids)
    fields = arrays_of(raw)
    inputs, (labels, weight) = input_tensors(raw, model_fields(fields)), labels_of(fields, samples.labels)
    lengths = None
    if isinstance(inputs, dict) and "input_ids" in inputs and inputs["input_ids"].ndim == 2:
        lengths = np.full(len(pairs), inputs["input_ids"].shape[1], np.int64)
    return Collated(inputs, labels, weight, document_start_of(fields), keys, None, lengths)


def collate(items: Sequence[Item], dataset: Any = None, *, labels: bool = True) -> Collated:
    """One batch from `items`, by the dataset's own `collate_fn` if it has one.

    A `collate_fn` gets the items as the dataset gave them, and what it returns is read as an item is: `(x, y)`, or a
    dict, its first axis counting records. Without it tensors are stacked; named ones that differ in their first axis
    are padded at its end with 0, labels with -100, and `attention_mask` is added when `input_ids` were padded.
    labels: False leaves those of a `collate_fn` unread, as `Samples` does.
    DataError names the field when items do not fit together.
    """
    if not items:
        raise DataError("a batch of no items cannot be made")
    if callable(getattr(dataset, "collate_fn", None)):
        inputs, label, weight, start = _by_collate_fn(items, dataset, labels)
    else:
        inputs, label, weight, start = _stacked(items)
    lengths = None
    if all(_is_tokens(item) for item in items) and isinstance(inputs, dict) and inputs["input_ids"].ndim == 2:
        lengths = np.array([len(_fields(item)["input_ids"]) for item in items], np.int64)
        longest = inputs["input_ids"].shape[1]
        if lengths.max() > longest:
            lengths = np.minimum(lengths, longest)      # a collate_fn may truncate
        if "attention_mask" not in inputs and lengths.min() < longest:
            at_L = torch.arange(longest)
            inputs["attention_mask"] = (at_L < torch.from_numpy(lengths)[:, None]).to(torch.int64)
    view_keys = [item.view_key for item in items]
    return Collated(inputs, label, weight, start, np.array([item.sample_key for item in items], np.uint64),
                    None if None in view_keys else np.array(view_keys, np.uint64), lengths)


def to_device(inputs: Inputs, device: torch.device | str, non_blocking: bool = False) -> Inputs:
    """`inputs` on `device`, tensor by tensor."""
    if isinstance(inputs, dict):
        return {name: value.to(device, non_blocking=non_blocking) for name, value in inputs.items()}
    return inputs.to(device, non_blocking=non_blocking)


Parts = tuple[Inputs, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _stacked(items: Sequence[Item]) -> Parts:
    first = items[0].inputs
    inputs: Inputs
    if isinstance(first, dict):
        named = [item.inputs for item in items if isinstance(item.inputs, dict)]
        if len(named) < len(items) or any(one.keys() != first.keys() for one in named):
            raise DataError(f"the items of a batch have different fields; the first has {sorted(first)}")
        inputs = {name: _together([one[name] for one in named], name, 0) for name in first}
    else:
        xs = [item.inputs for item in items if isinstance(item.inputs, torch.Tensor)]
        if len(xs) < len(items) or any(x.shape != xs[0].shape for x in xs):
            shapes = sorted({tuple(x.shape) for x in xs})
            raise DataError(f"the inputs of a batch have the shapes {shapes[:4]}; expected one shape "
                            "(give the dataset a collate_fn, or items that are dicts: those are padded)")
        inputs = torch.stack(xs)
    return (inputs, _optional([item.labels for item in items], "label", IGNORED),
            _optional([item.label_weight for item in items], "label_weight", 0),
            _optional([item.document_start for item in items], "document_start", 0))


def _by_collate_fn(items: Sequence[Item], dataset: Any, wanted: bool) -> Parts:
    batch = dataset.collate_fn([item.raw for item in items])
    batch = dict(batch) if hasattr(batch, "keys") else batch        # transformers' BatchEncoding is no Mapping
    try:
        fields = arrays_of(batch)
        inputs, (labels, weight) = input_tensors(batch, model_fields(fields)), labels_of(fields, wanted)
        start = document_start_of(fields)
    except DataError as e:
        raise DataError(f"collate_fn of {type(dataset).__name__}: {e}") from e
    named = inputs if isinstance(inputs, dict) else {"input": inputs}
    others = {"label": labels, "label_weight": weight, "document_start": start}
    for name, value in {**named, **{name: value for name, value in others.items() if value is not None}}.items():
        if value.ndim == 0 or len(value) != len(items):
            raise DataError(f"collate_fn of {type(dataset).__name__}: {name!r} has the shape {tuple(value.shape)} "
                            f"for {len(items)} items; expected the first axis to count them")
    return inputs, labels, weight, start


def _together(tensors: list[torch.Tensor], name: str, fill: int) -> torch.Tensor:
    """Tensors stacked to [B, ...]; those that differ in their first axis only are padded at its end with `fill`."""
    if all(one.shape == tensors[0].shape for one in tensors):
        return torch.stack(tensors)
    if any(one.ndim == 0 or one.shape[1:] != tensors[0].shape[1:] for one in tensors):
        shapes = sorted({tuple(one.shape) for one in tensors})
        raise DataError(f"{name!r} has the shapes {shapes[:4]} in one batch; only the first axis may differ")
    longest = max(len(one) for one in tensors)
    after = (0, 0) * (tensors[0].ndim - 1)                          # torch pads the last axis first
    return torch.stack([pad(one, (*after, 0, longest - len(one)), value=fill) for one in tensors])


def _optional(tensors: Sequence[torch.Tensor | None], name: str, fill: int) -> torch.Tensor | None:
    present = [one for one in tensors if one is not None]
    if not present:
        return None
    if len(present) < len(tensors):
        raise DataError(f"{len(tensors) - len(present)} of {len(tensors)} items of a batch have no {name}; "
                        "expected all or none (a class label of -1 is unknown)")
    return _together(present, name, fill)


def _fields(item: Item) -> Mapping[str, Any]:
    """The named inputs of an item, before any collate_fn."""
    source = item.raw if item.inputs is None else item.inputs
    return source if isinstance(source, Mapping) else {}


def _is_tokens(item: Item) -> bool:
    ids = _fields(item).get("input_ids")
    return ids is not None and np.ndim(ids) == 1
