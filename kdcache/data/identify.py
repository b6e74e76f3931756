"""Whose data it is: a dataset's name, size, classes, tokenizer, and the keys of a few of its
samples.
"""

from __future__ import annotations

from typing import Any

from kdcache.data.collate import read_batch
from kdcache.data.samples import Samples, probe_ids
from kdcache.errors import DataError

PRIVATE_GENERATOR = "a random transform with its own generator?"


def identify(samples: Samples) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The `data` and `tokenizer` parts of an identity.

    data: name, revision, num_samples, class_names, window, inputs (the names of what a model is
    given), probe (16 hexadecimal digits each, of view 0). Each probed record is made twice, the
    second time in reversed order; DataError names a sample whose key or input differs.
    """
    ids = probe_ids(len(samples))
    first = {sample_id: _answer(samples, sample_id) for sample_id in ids}
    for sample_id in reversed(ids):
        if _answer(samples, sample_id) != first[sample_id]:
            raise DataError(
                f"dataset {samples.name}: the dataset answered differently when sample {sample_id} "
                f"was read a second time ({PRIVATE_GENERATOR}); its items must be a function of "
                "the index: draw from the global generators, or give the dataset view(sample_id, "
                "view, rng)"
            )
    inputs = (
        samples.item(ids[0]).inputs
        if not samples.collates
        else read_batch(samples, [(ids[0], 0)]).inputs
    )
    data = {
        "name": samples.name,
        "revision": samples.revision,
        "num_samples": len(samples),
        "class_names": samples.class_names,
        "window": samples.window,
        "inputs": sorted(inputs) if isinstance(inputs, dict) else ["input"],
        "probe": [f"{first[sample_id][0]:016x}" for sample_id in ids],
        **({"preprocessing": samples.preprocessing} if samples.preprocessing else {}),
    }
    return data, samples.tokenizer_identity


def _answer(samples: Samples, sample_id: int) -> tuple[int, int | None]:
    item = samples.item(sample_id, 0)
    return item.sample_key, item.view_key
