"""Records of a batch, sorted out by shard, and their rows copied once from mapped columns into arrays of our own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdcache.cache.columns import Array, Column, Columns


@dataclass(frozen=True, slots=True)
class Group:
    """The rows that one shard gives: row `source[i]` of the shard goes to row `target[i]` of the batch.

    A slice stands where the rows are consecutive: then it is a plain copy, or a gather without a scatter.
    """

    shard: int
    source: Array | slice
    target: Array | slice


def groups(shard_B: Array, index_B: Array) -> list[Group]:
    """One group for each shard that a batch touches."""
    if not len(shard_B):
        return []
    sorted_already = bool((shard_B[1:] >= shard_B[:-1]).all())
    order = np.arange(len(shard_B)) if sorted_already else np.argsort(shard_B, kind="stable")
    shards, index = shard_B[order], index_B[order]
    cuts = [0, *(np.flatnonzero(shards[1:] != shards[:-1]) + 1).tolist(), len(shards)]
    return [Group(int(shards[a]), run(index[a:b]), slice(a, b) if sorted_already else run(order[a:b]))
            for a, b in itertools.pairwise(cuts)]


def run(index: Array) -> Array | slice:
    """A slice if the numbers are consecutive, else themselves."""
    first, last = int(index[0]), int(index[-1])
    if last - first == len(index) - 1 and (len(index) == 1 or bool((np.diff(index) == 1).all())):
        return slice(first, last + 1)
    return index


def gather(values: Array, group: Group, out: Array) -> None:
    """Copy the rows of one group from a shard's column [rows, ...] to the batch's [rows, ...]."""
    if isinstance(group.source, slice) or not isinstance(group.target, slice):
        out[group.target] = values[group.source]
    else:               # clip: no bounds are checked again, and numpy takes no buffer between
        np.take(values, group.source, axis=0, out=out[group.target], mode="clip")


def ragged_rows(parts: Sequence[Group], offsets: Sequence[Array], records: int) -> tuple[list[Group], Array]:
    """Groups of rows for groups of records, by the offsets of each group's shard; and the batch's offsets [B + 1]."""
    lengths = np.empty(records, np.int64)
    for part, at in zip(parts, offsets, strict=True):
        if isinstance(part.source, slice):
            lengths[part.target] = np.diff(at[part.source.start:part.source.stop + 1])
        else:
            lengths[part.target] = at[part.source + 1] - at[part.source]
    starts = np.zeros(records + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    plan = []
    for part, at in zip(parts, offsets, strict=True):
        source: Array | slice
        if isinstance(part.source, slice):
            source = slice(int(at[part.source.start]), int(at[part.source.stop]))
        else:
            source = _spread(at[part.source], lengths[part.target])
        if isinstance(part.target, slice):
            target: Array | slice = slice(int(starts[part.target.start]), int(starts[part.target.stop]))
        else:
            target = _spread(starts[part.target], lengths[part.target])
        plan.append(Group(part.shard, source, target))
    return plan, starts


def _spread(first: Array, lengths: Array) -> Array:
    """first[0], first[0] + 1, ... (lengths[0] of them), first[1], ...: the rows of many runs, one after another."""
    before = np.cumsum(lengths) - lengths
    out: Array = np.repeat(first - before, lengths)
    out += np.arange(len(out))
    return out


def gather_rows(column: Column, plan: Sequence[Group], found: Sequence[Columns], rows: int) -> Array:
    """A column of a ragged level for the whole batch, [rows, *shape]."""
    out = np.empty((rows, *column.shape), column.storage)
    for group, columns in zip(plan, found, strict=True):
        gather(columns[column.name], group, out)
    return out
