"""A dataset as the two stages see it: items with tensors, labels and keys, for any (sample_id,
view).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdcache.data.attributes import read_attributes
from kdcache.data.code_specs import UserFiles
from kdcache.data.images import ImageFolder
from kdcache.data.keys import UNSIGNED, arrays_of, elements, given_key, sample_key
from kdcache.data.padding import Inputs, Padding
from kdcache.data.views import read_view
from kdcache.errors import DataError, UsageError
from kdcache.user.code_errors import users_code

SMALL = (torch.uint8, torch.int8, torch.int16)
# a dict may use either, (x, y) gives the second
LABELS = ("labels", "label")
NOT_INPUTS = (*LABELS, "label_weight", "document_start")  # what no model is given


@dataclass(slots=True)
class Item:
    """One view of one sample.

    inputs: what the model is called with, a tensor or named tensors; None when the dataset has a
    collate_fn of its own. labels: int64, [] one class, [J] several labels, or [L] one per position
    (-100 ignored); None if there are none. label_weight: float32 [J] or None. document_start: uint8
    [L] or None. raw: the item as the dataset gave it.
    """

    inputs: Inputs | None
    labels: torch.Tensor | None
    label_weight: torch.Tensor | None
    document_start: torch.Tensor | None
    sample_key: int
    view_key: int | None
    raw: Any


PROBE_SAMPLES = 256


def evenly_spaced(length: int, most: int) -> list[int]:
    """Up to `most` of the numbers below `length`, evenly spaced, the first and the last included."""
    count = min(length, most)
    return [i * (length - 1) // max(count - 1, 1) for i in range(count)]


def probe_ids(num_samples: int) -> list[int]:
    """The samples that stand for all of a dataset: up to 256."""
    return evenly_spaced(num_samples, PROBE_SAMPLES)


class Samples:
    """A map-style dataset: `item(sample_id, view)` is a pure function of its arguments and `seed`.

    Attributes: dataset, seed, name, revision, class_names (list of str, [] unknown),
    tokenizer_identity (dict or None), preprocessing (of pictures, see data/preprocessing.py, ""
    unknown), window (int, 0 none), token_lengths (int64, tokens of each sample, None unless the
    dataset knows), has_view_keys, collates (whether it has a collate_fn), padding (what batches are
    filled up with: that of the model they are for).

    labels: False leaves labels and their weights unread, so that they may be anything (boxes,
    texts, several numbers), except where they mask tokens (see `labels_of`). Keys are the same
    either way. UsageError unless the dataset has __len__ and __getitem__; DataError if empty.
    """

    def __init__(self, dataset: Any, *, seed: int = 0, labels: bool = True) -> None:
        self.dataset, self.seed, self.labels = dataset, seed, labels
        if not 0 <= seed < 2**64:
            raise UsageError(f"seed is {seed}; expected 0 <= seed < 2^64")
        said = read_attributes(dataset)
        self.name, self.revision, self._length = said.name, said.revision, said.length
        self.preprocessing = dataset.preprocessing if isinstance(dataset, ImageFolder) else ""
        self.class_names, self.window = said.class_names, said.window
        self.tokenizer_identity, self.token_lengths = said.tokenizer_identity, said.token_lengths
        self._own_key, self._own_view, self.collates = said.own_key, said.own_view, said.collates
        self.has_view_keys = self._own_key or self._own_view or self.collates
        self.padding = Padding(pad_id_of(dataset))
        # whether a collate_fn's inputs are to be compared with the items' own
        self.compares_raw = False
        # of the samples that a probe looks at: see `extremes`
        self.measured: dict[int, dict[str, int]] = {}
        self._probed = frozenset(probe_ids(self._length))
        self._keys: npt.NDArray[np.uint64] | None = None

    def __len__(self) -> int:
        return self._length

    @property
    def reads_labels(self) -> bool:
        """Whether labels are read: where they are wanted, and where inputs of an encoder-decoder
        are made of them.
        """
        return self.labels or self.padding.decoder_start is not None

    def __reduce__(self) -> tuple[Any, ...]:
        """For a worker process that is no fork of this one: with the files of users that it has to
        import.
        """
        return _revived, (UserFiles(), type(self), self.__dict__)

    def item(self, sample_id: int, view: int = 0) -> Item:
        """View `view` of sample `sample_id`. DataError names the sample when it cannot be read or
        used.
        """
        if not 0 <= sample_id < self._length:
            raise UsageError(
                f"dataset {self.name} has no sample {sample_id}; expected 0..{self._length - 1}"
            )
        raw = self._read(sample_id, view)
        try:
            fields = arrays_of(raw)
            inputs = model_fields(fields)
            own = (
                None if self._own_key or self._own_view else sample_key(self._hashed_fields(fields))
            )
            _check_length(inputs)
            view_key = sample_key(inputs) if self._own_key or self._own_view else None
            if sample_id in self._probed and sample_id not in self.measured:
                self.measured[sample_id] = measure(inputs)
            if self.collates:
                return Item(None, None, None, None, self._key(sample_id, own), view_key, raw)
            labels, weight = labels_of(fields, self.reads_labels)
            return Item(
                input_tensors(raw, inputs),
                labels,
                weight,
                document_start_of(fields),
                self._key(sample_id, own),
                view_key,
                raw,
            )
        except DataError as e:
            raise DataError(f"dataset {self.name}, sample {sample_id}: {e}") from e

    def sample_key(self, sample_id: int, view: int = 0) -> int:
        """The sample_key of one record, without making its view where the key does not depend on
        it.
        """
        if self._own_key or self._own_view:
            return self._key(sample_id, None)
        return self.item(sample_id, view).sample_key

    def keys_in_memory(self, sample_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """The sample_keys of arrays in memory, which nothing changes: each is hashed once, when it
        is first used.
        """
        if self._keys is None:
            self._keys, self._hashed = np.zeros(len(self), np.uint64), np.zeros(len(self), np.bool_)
        for sample_id in sample_ids[~self._hashed[sample_ids]].tolist():
            self._keys[sample_id] = self.item(sample_id).sample_key
            self._hashed[sample_id] = True
        out: npt.NDArray[np.uint64] = self._keys[sample_ids]
        return out

    def _key(self, sample_id: int, own: int | None) -> int:
        """`own` when the record's own item gives the key; else the dataset's key(i), else that of
        the plain item.
        """
        if own is not None:
            return own
        if self._own_key:
            where = f"dataset {self.name}, sample {sample_id}"
            with users_code(f"{where}: its key({sample_id})"):
                found = self.dataset.key(sample_id)
            return given_key(found, where)
        return sample_key(self._hashed_fields(arrays_of(self._read(sample_id, None))))

    def _hashed_fields(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields that a key is of: all, but for labels without bytes of their own, which only
        `labels` = False lets pass."""
        return (
            fields
            if self.labels
            else {
                name: value
                for name, value in fields.items()
                if name not in (*LABELS, "label_weight") or _has_bytes(value, name)
            }
        )

    def _read(self, sample_id: int, view: int | None) -> Any:
        """View `view` as the dataset gives it, or the plain item for None."""
        with users_code(lambda: f"dataset {self.name}, sample {sample_id} cannot be read"):
            return (
                self.dataset[sample_id]
                if view is None
                else read_view(self.dataset, sample_id, view, self.seed)
            )


def _revived(_: UserFiles, kind: type[Samples], state: dict[str, Any]) -> Samples:
    samples = kind.__new__(kind)
    samples.__dict__.update(state)
    return samples


def extremes(samples: Samples) -> list[int]:
    """[shortest, longest] of the samples that a probe looks at; [] where no input of theirs differs
    in length.

    The dataset's own `token_lengths` say it of every sample.
    """
    known = samples.token_lengths
    if known is not None and len(known):
        found = [int(np.argmin(known)), int(np.argmax(known))]
        return found if known[found[0]] < known[found[1]] else []
    for sample_id in probe_ids(len(samples)):
        if sample_id not in samples.measured:
            samples.item(sample_id)
        if not samples.measured[sample_id]:
            return []  # no named inputs, no text: they all have one shape
    sizes = samples.measured
    names = set.intersection(*(set(size) for size in sizes.values()))
    vary = [name for name in names if len({size[name] for size in sizes.values()}) > 1]
    total = {
        sample_id: sum(size[name] for name in vary) for sample_id, size in sorted(sizes.items())
    }
    return [min(total, key=total.__getitem__), max(total, key=total.__getitem__)] if vary else []


def measure(inputs: Mapping[str, Any]) -> dict[str, int]:
    """How long each input of an item is: its first axis, the ones of a mask, the characters of a
    text; {} for one unnamed array, which cannot be padded."""
    if inputs.keys() == {"input"} and not isinstance(inputs["input"], str | list | tuple):
        return {}
    out = {}
    for name, value in inputs.items():
        if name.endswith("mask") and axes(value) == 1:
            out[name] = int(np.count_nonzero(np.asarray(value)))
        elif isinstance(value, str | bytes) or (hasattr(value, "__len__") and axes(value) != 0):
            out[name] = len(value)
    return out


def axes(value: Any) -> int:
    """How many axes a value has as an array; -1 for lists of several lengths, which are none."""
    try:
        return int(np.ndim(value))
    except ValueError:
        return -1


def pad_id_of(dataset: Any, default: int = 0) -> int:
    """The dataset's own `pad_token_id`, what its token ids are padded with where the model does not
    say.
    """
    own = getattr(dataset, "pad_token_id", None)
    return own if type(own) is int and own >= 0 else default


def _check_length(inputs: Mapping[str, Any]) -> None:
    ids = inputs.get("input_ids")
    if ids is not None and axes(ids) == 1 and len(ids) == 0:
        raise DataError(
            "it has no tokens (input_ids is empty); leave it out of the dataset: no model can be "
            "asked about nothing"
        )


def model_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields a model is given: all but the labels, label_weight and document_start."""
    inputs = {name: value for name, value in fields.items() if name not in NOT_INPUTS}
    if not inputs:
        raise DataError(f"an item has no input, only {sorted(fields)}")
    return inputs


def as_tensor(value: Any, name: str) -> torch.Tensor:
    """A number, list or numeric array as a tensor of its own dtype; DataError for images, text and
    objects.

    Unsigned integers of more than 8 bits, with which torch calculates almost nothing, become int64,
    and so do all integers whose name ends in "ids": embeddings take no others. DataError for a
    uint64 that int64 cannot hold.
    """
    if isinstance(value, torch.Tensor):
        if value.dtype is torch.uint64 and bool((value.view(torch.int64) < 0).any()):
            raise DataError(
                f"{name!r} has a uint64 of 2^63 or more, which int64 cannot hold; no model takes "
                "it: give it as int64 or as floating point"
            )
        return (
            value.to(torch.int64)
            if value.dtype in UNSIGNED or (name.endswith("ids") and value.dtype in SMALL)
            else value
        )
    if isinstance(value, str | bytes) or hasattr(value, "convert"):
        raise DataError(
            f"{name!r} is a {type(value).__name__}; a model needs tensors: transform it in the "
            "dataset, or give the dataset a collate_fn"
        )
    try:
        array = np.asarray(value)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        return as_tensor(torch.from_numpy(array if array.flags.writeable else array.copy()), name)
    except (TypeError, ValueError) as e:
        raise DataError(f"{name!r} is a {type(value).__name__} that is no tensor ({e})") from e


def labels_of(
    fields: Mapping[str, Any], wanted: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(labels as int64, label_weight as float32) of an item or batch, shapes kept; None where there
    are none.

    DataError for two labels and for labels that are no integers. Not `wanted`: labels are looked at
    only where they say which tokens are predicted, -100 being none: integers of the shape of
    input_ids; all others are None.
    """
    if not wanted:
        ids, labels = (
            fields.get("input_ids"),
            next((fields[name] for name in LABELS if name in fields), None),
        )
        if ids is None or labels is None:
            return None, None
        try:
            mask = labels_tensor(labels)
        except DataError:
            return None, None
        return (mask if mask is not None and tuple(mask.shape) == np.shape(ids) else None), None
    weight = fields.get("label_weight")
    return (
        labels_tensor(label_of(fields)),
        None if weight is None else as_tensor(weight, "label_weight").to(torch.float32),
    )


def labels_tensor(value: Any) -> torch.Tensor | None:
    """Labels as int64, shape kept; DataError unless they are integers."""
    if value is None:
        return None
    labels = as_tensor(value, "label")
    if labels.is_floating_point() or labels.is_complex():
        found = f"{labels.tolist()} of " if labels.numel() < 5 else f"{list(labels.shape)} of "
        raise DataError(
            f"its label is {found}{str(labels.dtype).removeprefix('torch.')}; expected a class "
            "index, an integer (of one-hot or soft labels: their argmax); labels that are "
            "something else are not looked at by dump-teacher --no-labels, and by train-student "
            "with --alpha 1"
        )
    return labels.to(torch.int64)


def _has_bytes(value: Any, name: str) -> bool:
    """Whether a value can be hashed: numbers, text and images can, other objects cannot."""
    try:
        elements(value, name)
    except DataError:
        return False
    return True


def label_of(fields: Mapping[str, Any]) -> Any:
    """The label of an item or batch; None if it has none, DataError if it has two."""
    found = [fields[name] for name in LABELS if fields.get(name) is not None]
    if len(found) > 1:
        raise DataError("an item has both 'label' and 'labels'; expected one of them")
    return found[0] if found else None


def input_tensors(raw: Any, inputs: Mapping[str, Any]) -> Inputs:
    """What the model is called with: named tensors when `raw` is a dict, the one tensor x when it
    is `(x, y)`.
    """
    if isinstance(raw, Mapping):
        return {name: as_tensor(value, name) for name, value in inputs.items()}
    return as_tensor(inputs["input"], "input")


def document_start_of(fields: Mapping[str, Any]) -> torch.Tensor | None:
    """document_start as uint8, shape kept; None where an item has none."""
    start = fields.get("document_start")
    return None if start is None else as_tensor(start, "document_start").to(torch.uint8)
