"""Padding: what sequences of several lengths are filled with, and which positions of a batch are
real.

A model must be able to tell padding from content, so every padded input comes with something that
says so: a mask that the items have, lengths that they have, or a mask that is added here. Nothing
else about a record may depend on what shares its batch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from kdcache.errors import DataError

# PyTorch's and Hugging Face's label of a position that does not count
IGNORED = -100
ATTENTION, DECODER = "attention_mask", "decoder_attention_mask"
# Named like masks, and about something else than padding.
NO_PADDING_MASKS = re.compile(r"(special_tokens|global_attention|loss|head)_mask$")
LENGTHS = re.compile(r"(^|_)len(gth)?s?$")
# 1 where a position is padding, as torch.nn.MultiheadAttention and fairseq have it; elsewhere 1 is
# a real position.
INVERTED = re.compile(r"pad(ding)?_mask$")
Inputs = Tensor | dict[str, Tensor]
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Padding:
    """What a model is padded with. pad_id: of input_ids. decoder_start: of an encoder-decoder, the
    first of the decoder_input_ids that are made of the labels where the items have none; None for
    any other model."""

    pad_id: int = 0
    decoder_start: int | None = None


def fill_of(name: str, padding: Padding) -> int:
    """What input `name` is filled up with."""
    if name in ("input_ids", "decoder_input_ids"):
        return padding.pad_id
    return 1 if INVERTED.search(name) else 0


def together(tensors: Sequence[Tensor], name: str, fill: int) -> Tensor:
    """Tensors stacked to [B, ...]; those that differ in their first axis only are padded at its end
    with `fill`.

    DataError where another axis differs.
    """
    if all(one.shape == tensors[0].shape for one in tensors):
        return torch.stack(list(tensors))
    if any(one.ndim == 0 or one.shape[1:] != tensors[0].shape[1:] for one in tensors):
        shapes = sorted({tuple(one.shape) for one in tensors})
        raise DataError(
            f"{name!r} has the shapes {shapes[:4]} in one batch; only the first axis may differ"
        )
    longest = max(len(one) for one in tensors)
    after = (0, 0) * (tensors[0].ndim - 1)  # torch pads the last axis first
    return torch.stack([pad(one, (*after, 0, longest - len(one)), value=fill) for one in tensors])


@dataclass(frozen=True, slots=True)
class Real:
    """Which positions of a batch are real: bool [B, L] masks, on the CPU, by the name of what says
    so.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)

    def of(self, length: int, module: str = "") -> Tensor | None:
        """bool [B, length] of the sequence of that length; None where nothing says which positions
        are real.

        module: dotted name of the module whose positions are meant. Where an encoder's and a
        decoder's sequence have one length it tells them apart.
        """
        fits = {name: mask for name, mask in self.masks.items() if mask.shape[1] == length}
        wanted = [name for name in fits if name.startswith("decoder_") == ("decoder" in module)]
        return fits[next(iter(wanted or fits))] if fits else None

    @property
    def padding_B(self) -> Int64s | None:
        """int64 [B], padded positions of each record, over all its sequences; None where there are
        no masks.
        """
        if not self.masks:
            return None
        total: Int64s = torch.stack([(~mask).sum(1) for mask in self.masks.values()]).sum(0).numpy()
        return total

    @property
    def padded(self) -> bool:
        """Whether some position of the batch is padding."""
        return any(not bool(mask.all()) for mask in self.masks.values())

    def trim(self, value: Tensor, record: int) -> Tensor:
        """What record `record` has of `value` [B, ...]: its real positions, on each axis that a
        mask is of.
        """
        own = value[record]
        for mask in self.masks.values():
            real_L, length = mask[record], mask.shape[1]
            if bool(real_L.all()) or own.ndim == 0:
                continue
            if own.shape[0] == length:
                own = own[real_L]
            # a mask of pairs of positions
            elif own.ndim >= 2 and own.shape[-2:] == (length, length):
                own = own[..., real_L, :][..., real_L]
        return own


def padded(
    named: Sequence[Mapping[str, Tensor]], padding: Padding
) -> tuple[dict[str, Tensor], Real]:
    """The named inputs of some items as one batch, with a mask for every input that had to be
    padded.

    Inputs that are padded by the same lengths share a mask. An input of theirs that is one, or that
    gives the lengths, will do; else `attention_mask` is added, for decoder inputs
    `decoder_attention_mask`. Packed `position_ids`, which begin anew at each document of a record,
    take no mask: a model that keeps the documents apart by them (transformers does while there is
    no mask) would see across them. There padding is documents of its own, after all others.
    """
    out = {
        name: together([one[name] for one in named], name, fill_of(name, padding))
        for name in named[0]
    }
    groups: dict[tuple[bool, tuple[int, ...]], list[str]] = {}
    for name in out:
        lengths = tuple(len(one[name]) if one[name].ndim else 0 for one in named)
        if len(set(lengths)) > 1:
            groups.setdefault((name.startswith("decoder_"), lengths), []).append(name)
    known = {}
    for (of_decoder, lengths), members in groups.items():
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        # for rows and keys, also where the model is given no mask
        known[f"{members[0]} length"] = mask
        if any(is_mask(name, out[name]) for name in members) or _says(out, lengths):
            continue
        if "position_ids" in members and ATTENTION not in out and _restart(named):
            continue
        added = DECODER if of_decoder else ATTENTION
        if added in out:
            other = next(length for length in lengths if length != lengths[0])
            raise DataError(
                f"{members[0]!r} has {lengths[0]} and {other} positions in one batch, and "
                f"{added!r} is a mask of something else: give the items a mask of their own for it "
                "(an input whose name ends in 'mask'), or equal lengths"
            )
        out[added] = mask.to(torch.int64)
    return out, real_of(out, known)


def real_of(inputs: Inputs, known: Mapping[str, Tensor] | None = None) -> Real:
    """Which positions are real by what the inputs say: 2-D masks of 0 and 1, integer lengths, then
    what is `known`.

    `attention_mask`, which everybody means alike, comes first.
    """
    if not isinstance(inputs, dict):
        return Real(dict(known or {}))
    found = {
        name: (value == 0 if INVERTED.search(name) else value != 0).cpu()
        for name, value in inputs.items()
        if is_mask(name, value)
    }
    if ATTENTION in found:
        found = {ATTENTION: found[ATTENTION], **found}
    for name, value in inputs.items():
        if is_lengths(name, value) and any(
            x.ndim >= 2 and x.shape[1] == int(value.max()) for x in inputs.values()
        ):
            found[name] = torch.arange(int(value.max())) < value.cpu()[:, None]
    return Real(
        {**found, **{name: mask for name, mask in (known or {}).items() if name not in found}}
    )


def decoder_inputs(labels: Sequence[Tensor], padding: Padding) -> list[Tensor]:
    """decoder_input_ids of an encoder-decoder: the labels moved one position on, behind the start
    token.

    What transformers' `prepare_decoder_input_ids_from_labels` gives; ignored labels (-100) become
    padding.
    """
    start = torch.tensor([padding.decoder_start])
    return [
        torch.cat([start, label[:-1].masked_fill(label[:-1] == IGNORED, padding.pad_id)])
        for label in labels
    ]


def is_mask(name: str, value: Tensor) -> bool:
    """Whether an input says which positions are padding: a 2-D one of 0 and 1 whose name ends in
    mask.
    """
    if (
        not name.endswith("mask")
        or NO_PADDING_MASKS.search(name)
        or value.ndim != 2
        or not value.numel()
    ):
        return False
    return value.dtype == torch.bool or bool(((value == 0) | (value == 1)).all())


def is_lengths(name: str, value: Tensor) -> bool:
    """Whether an input gives lengths of records: whole numbers that are named so."""
    return (
        bool(LENGTHS.search(name))
        and value.ndim == 1
        and value.numel() > 0
        and not value.is_floating_point()
    )


def _says(inputs: Mapping[str, Tensor], lengths: Sequence[int]) -> bool:
    """Whether an input gives the lengths of the records."""
    return any(
        is_lengths(name, value) and value.tolist() == list(lengths)
        for name, value in inputs.items()
    )


def _restart(named: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether the position_ids of some record begin anew: several documents are packed into it."""
    return any(
        one["position_ids"].ndim == 1 and bool((one["position_ids"].diff() != 1).any())
        for one in named
    )
