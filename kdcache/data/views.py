"""Views: one augmented version of a sample is a pure function of (seed, view, sample_id), whoever
computes it.

A dataset with `view(sample_id, view, rng)` gets a numpy generator keyed by those numbers. For any
other dataset
`dataset[sample_id]` runs while the global generators of Python, numpy and torch (CPU) are seeded
from them; they are put back afterwards. Generators that a dataset keeps for itself are out of
reach; `identify` finds them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kdcache.data.generators import seeded_generators


def view_rng(seed: int, view: int, sample_id: int) -> np.random.Generator:
    """The random stream of one view: Philox keyed by `seed`, its counter started at (view,
    sample_id).
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, view, sample_id]))


def read_view(dataset: Any, sample_id: int, view: int, seed: int) -> Any:
    """What `dataset` gives for one view of one sample.

    A dataset whose attribute `pure_items` is true promises that its items come from no generator;
    it is read as it is, without the 0.1 ms that saving and restoring the generators takes.
    """
    if callable(getattr(dataset, "view", None)):
        return dataset.view(sample_id, view, view_rng(seed, view, sample_id))
    if getattr(dataset, "pure_items", False):
        return dataset[sample_id]
    words = [int(word) for word in view_rng(seed, view, sample_id).integers(0, 2**63, size=3)]
    with seeded_generators(*words):
        return dataset[sample_id]
