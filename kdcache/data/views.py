"""Views: one augmented version of a sample is a pure function of (seed, view, sample_id), whoever
computes it.

A dataset with `view(sample_id, view, rng)` gets a numpy generator keyed by those numbers. For any
other dataset `dataset[sample_id]` runs while the global generators of Python, numpy and torch (CPU)
are seeded from them; they are put back afterwards. Generators that a dataset keeps for itself are
out of reach; `identify` finds them.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


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


# ---- the global generators of Python, numpy and torch: seeded for a block, and put back

# the global generators belong to the process: two threads must not seed them at once
_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    # a thread that held it does not exist in the child
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def seeded_generators(python: int, numpy: int, torch_: int) -> Iterator[None]:
    """Run a block with the global generators of Python, numpy and torch (CPU) seeded, and put their
    states back.
    """
    with _lock:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            random.seed(python)
            np.random.seed(numpy % 2**32)
            # torch.manual_seed would touch the GPUs too
            torch.default_generator.manual_seed(torch_ % 2**63)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
