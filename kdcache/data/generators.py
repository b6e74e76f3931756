"""The global generators of Python, numpy and torch: seeded for a block, and put back."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

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
