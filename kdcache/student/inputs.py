"""Where a batch's inputs come from: the user's dataset, by this process or by workers, or the
cache's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdcache.data.collate import Collated, collated_tokens, read_batch
from kdcache.data.padding import Padding
from kdcache.data.samples import Samples
from kdcache.data.workers import by_workers
from kdcache.errors import DataError
from kdcache.guard import users_code
from kdcache.student.prefetch import Prefetch

if TYPE_CHECKING:
    from kdcache.cache.reader import Batch

Pairs = list[tuple[int, int]]  # (sample_id, view) of each record of a batch


class Fetch:
    """Pairs -> a batch; the whole of what a worker process does."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __call__(self, pairs: Pairs) -> Collated:
        return read_batch(self.samples, pairs)


def data_batches(
    samples: Samples,
    plan: Callable[[], Iterable[Pairs]],
    workers: int,
    check: Callable[[], object] | None = None,
) -> Generator[Collated, None, None]:
    """The planned batches in order; the same whatever the number of workers. Close it to stop what
    it started.

    check: called while a worker or a thread is waited for; what it raises ends the wait.
    """
    fetch = Fetch(samples)
    if workers:
        yield from by_workers(fetch, plan, workers, check)
    elif prefetchable(samples.dataset):
        with Prefetch(map(fetch, plan()), check=check) as ahead:
            yield from ahead
    else:
        yield from map(fetch, plan())


def prefetchable(dataset: Any) -> bool:
    """Whether a thread may build items while the student trains.

    An item that draws from the process's generators is built with them seeded and put back
    (data/views.py); a dropout that draws meanwhile would disturb both. Such items are built between
    steps, or by worker processes.
    """
    with users_code("the dataset's pure_items"):
        return hasattr(dataset, "view") or bool(getattr(dataset, "pure_items", False))


def token_batch(batch: Batch, padding: Padding) -> Collated:
    """Inputs from the tokens of a cache: input_ids, attention_mask where lengths differ,
    document_start.
    """
    offsets = batch.offsets["token"]
    tokens, starts = batch.columns["token"].astype(np.int64), batch.columns["document_start"]
    spans = [slice(a, b) for a, b in pairwise(offsets.tolist())]
    for at, span in enumerate(spans):
        if span.start == span.stop:
            raise DataError(f"record {int(batch.records[at])} of the cache has no tokens")
    return collated_tokens(
        [torch.from_numpy(tokens[span]) for span in spans],
        [torch.from_numpy(np.array(starts[span], np.uint8)) for span in spans],
        batch.columns["sample_key"],
        padding,
    )
