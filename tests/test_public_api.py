"""The names that `kdcache` offers, and that each of its doors says what is wrong with an argument
of a wrong type.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from student_world import Net, Points

import kdcache
from kdcache.errors import UsageError
from kdcache.loss.tensor_arguments import check_device


def test_all_is_what_init_offers_and_each_name_is_there() -> None:
    assert sorted(kdcache.__all__) == sorted(kdcache._WHERE) and set(kdcache.__all__) <= set(
        dir(kdcache)
    )
    assert all(callable(getattr(kdcache, name)) for name in kdcache.__all__)
    space: dict[str, Any] = {}
    exec("from kdcache import *", space)
    assert set(kdcache.__all__) <= set(space)
    with pytest.raises(AttributeError, match="has no attribute 'kd_los'"):
        kdcache.kd_los  # noqa: B018


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": 5}, r"cache is 5 \(int\); expected a path, or what kdcache.open gives"),
        ({"batch_size": 2.5}, r"batch_size is 2.5 \(float\); expected an integer"),
        ({"batch_size": np.float32(2)}, "batch_size is np.float32"),
        ({"batch_size": "8"}, r"batch_size is '8' \(str\)"),
        ({"micro_batch_size": 2.0}, r"micro_batch_size is 2.0 \(float\)"),
        ({"k": 5.0}, r"k is 5.0 \(float\)"),
        ({"max_steps": 2.0, "epochs": None}, r"max_steps is 2.0 \(float\)"),
        ({"epochs": "1"}, r"epochs is '1' \(str\)"),
        ({"temperature": [2]}, r"temperature is \[2\] \(list\); expected a number"),
        ({"lr": "x"}, r"lr is 'x' \(str\); expected a number"),
        ({"alpha": "0.5"}, r"alpha is '0.5' \(str\)"),
        ({"weight_decay": "0"}, "weight_decay is '0'"),
        ({"seed": 1.5}, r"seed is 1.5 \(float\); expected an integer"),
        ({"tail": 3}, r"tail is 3 \(int\)"),
        ({"classes": 5.0}, "classes is 5.0"),
        ({"eval_every": 1.5}, "eval_every is 1.5"),
    ],
)
def test_train_student_and_loader_name_an_argument_of_a_wrong_type(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"batch_size": 8, "epochs": 1, **options}
    with pytest.raises(UsageError, match=message) as caught:
        kdcache.train_student(
            student=Net(), data=Points(), out=tmp_path / "run", device="cpu", **given
        )
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    if not {"lr", "alpha", "weight_decay", "seed", "tail", "eval_every"} & set(options):
        with pytest.raises(UsageError, match=message):
            kdcache.Loader(**{"data": Points(), **given})


def test_a_device_is_refused_where_it_is_named() -> None:
    assert check_device("cpu") == torch.device("cpu") == check_device(torch.device("cpu"))
    for wrong in ("gpu", 1.5, "cuda:x"):
        with pytest.raises(UsageError, match=r"device is .*; expected one as"):
            check_device(wrong)
    if not torch.cuda.is_available():
        with pytest.raises(
            UsageError, match="device is 'cuda', and torch sees no CUDA device here"
        ):
            kdcache.Loader(data=Points(), batch_size=2, device="cuda")
