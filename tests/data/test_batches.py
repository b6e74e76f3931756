"""Batches of arrays in memory are those that their items give one by one."""

import numpy as np
import pytest
import torch

from kdcache.data.arrays import ArrayData
from kdcache.data.collate import collate, read_batch
from kdcache.data.samples import Samples

RNG = np.random.default_rng(0)
ARRAYS = {
    "x and y": {"x": RNG.normal(size=(9, 2, 3)).astype(np.float32), "y": np.arange(9)},
    "x alone": {"x": RNG.normal(size=(9, 4))},
    "tokens": {
        "input_ids": RNG.integers(0, 50, (9, 5)),
        "labels": RNG.integers(0, 50, (9, 5), np.int32),
    },
    "named": {
        "pixels": RNG.integers(0, 255, (9, 2), np.uint8),
        "label": np.arange(9, dtype=np.uint8),
        "label_weight": RNG.random((9, 1)),
    },
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_batch_of_arrays_is_the_batch_of_their_items(name):
    samples = Samples(ArrayData(ARRAYS[name], name=name))
    pairs = [(7, 0), (2, 3), (2, 0), (0, 1)]
    for _ in range(2):  # the second time the keys are known
        whole = read_batch(samples, pairs)
        single = collate([samples.item(sample_id, view) for sample_id, view in pairs], samples)
        for field in (
            "inputs",
            "labels",
            "label_weight",
            "document_start",
            "sample_key",
            "view_key",
            "lengths",
        ):
            torch.testing.assert_close(
                getattr(whole, field), getattr(single, field), rtol=0, atol=0, msg=field
            )


def test_the_keys_of_arrays_are_those_of_their_items():
    samples = Samples(ArrayData(ARRAYS["x and y"], name="x and y"))
    wanted = np.array([3, 3, 8, 0])
    assert samples.keys_in_memory(wanted).tolist() == [
        samples.item(i).sample_key for i in wanted.tolist()
    ]
