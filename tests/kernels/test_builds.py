"""How many builds of a kernel a training run asks for: triton's own key of a launch, without a
device.

A key is made of types, of integers that are 1 or multiples of 16, and of pointers that are
multiples of 16 bytes. What a batch's size or its place in a larger tensor changes must not be in
it: a build is seconds in the middle of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from kernel_world import kd_loss_rows
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from kdcache.kernels import kd_launch, topk_lse

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
MOST = 48  # rows that batches are slices of


class Binds:
    """A kernel that is not run: each launch leaves the key by which triton finds its build."""

    def __init__(self, kernel: Any, keys: set[str]) -> None:
        # as `triton.jit` makes it where it compiles
        built = JITFunction(kernel.fn, **kernel.kwargs)
        self.arg_names, self.name, self.keys = kernel.arg_names, kernel.fn.__name__, keys
        self.bind = create_function_from_signature(built.signature, built.params, BACKEND)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*given: Any, **constants: Any) -> None:
            _, specialisation, options = self.bind(*given, **constants)
            self.keys.add(f"{self.name} {specialisation} {sorted(options.items())}")

        return launch


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Of all launches of a test."""
    if not triton.knobs.runtime.interpret:
        pytest.skip("kernels are wrapped as the interpreter knows them")
    found: set[str] = set()
    for module, names in (
        (kd_launch, ("kd_rows", "scale_rows", "kd_full")),
        (topk_lse, ("topk_rows",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Binds(getattr(module, name), found))
    return found


def batches(width: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Logits and what belongs to their rows: 2 to 40 of each, and slices that begin at every place."""
    logits = torch.zeros(MOST, width, dtype=torch.bfloat16)
    of_rows = {
        "labels": torch.zeros(MOST, dtype=torch.int64),
        "label_weight": torch.ones(MOST),
        "ids": torch.zeros(MOST, 7, dtype=torch.int32),
        "log_probs": torch.zeros(MOST, 7),
        "log_tail": torch.zeros(MOST),
        "row_weight": torch.ones(MOST),
    }
    scales = torch.ones(3).unbind()  # two of them off 16 bytes
    slices = [slice(0, n) for n in range(2, 41)] + [slice(n, n + 5) for n in range(MOST - 5)]
    return [
        (
            logits[at],
            {name: t[at] for name, t in of_rows.items()}
            | {"ce_scale": scales[at.start % 3], "kd_scale": scales[at.stop % 3]},
        )
        for at in slices
    ]


def test_rows_of_any_number_and_place_take_one_build(keys: set[str]) -> None:
    """And one more for the factor of backward; few rows have one for each stage of those that share
    a row.
    """
    for logits, keywords in batches(1024):
        x = logits.clone().requires_grad_()
        loss = kd_loss_rows(x, **keywords, temperature=2.0)[0]
        loss.backward(torch.ones(2 * MOST)[len(x) % 3 :][: len(x)])
        loss = kd_loss_rows(x, **keywords, temperature=2.0)[0]
        loss.sum().backward()  # a factor of stride 0
    assert sorted(key.split(" ")[0] for key in keys) == ["kd_rows", "scale_rows"]
    for logits, keywords in batches(1024):
        kd_loss_rows(logits, **keywords, temperature=2.0, parts=2)
    assert sorted(key.split(" ")[0] for key in keys) == ["kd_rows"] * 3 + ["scale_rows"]


def test_a_teacher_over_all_classes_takes_one_build(keys: set[str]) -> None:
    for logits, keywords in batches(1024):
        some = {
            name: value
            for name, value in keywords.items()
            if name not in ("ids", "log_probs", "log_tail")
        }
        kd_loss_rows(logits, log_probs=torch.zeros(len(logits), 1024), **some, temperature=2.0)
    assert len(keys) == 1


def test_rows_of_a_teacher_take_one_build(keys: set[str]) -> None:
    for logits, keywords in batches(1024):
        topk_lse.topk_lse(logits, 8, (1.0, 2.0), keywords["labels"], moments=True)
    assert [key.split(" ")[0] for key in keys] == ["topk_rows"]
