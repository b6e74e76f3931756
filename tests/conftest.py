"""Whether triton interprets its kernels is settled when it is first imported: here, before any test
module.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--ptx",
        action="store_true",
        help="with -m gpu: run what triton compiles without a GPU, on CPU "
        "tensors, in the interpreter of PTX of ptx_machine.py",
    )
    parser.addoption(
        "--arch", type=int, default=90, help="with --ptx: what to compile for, as 80, 90 or 100"
    )


def pytest_configure(config: pytest.Config) -> None:
    """`-m gpu` runs the kernels as they are compiled; without it they run in triton's interpreter,
    on the CPU.
    """
    if not re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr") or ""):
        if config.getoption("ptx"):
            raise pytest.UsageError(
                "--ptx is a way to run the tests marked gpu: pytest -m gpu --ptx"
            )
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # as many threads in each as there are cores would wait for each other
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Deterministic mode refuses products of cuBLAS without it; torch reads it once, at a process's
    # first product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for said in (
        "Synchronization debug mode is a prototype",
        "Attempting to run cuBLAS, but there was no current",
    ):
        # torch says each once a process
        config.addinivalue_line("filterwarnings", f"ignore:{said}:UserWarning")


def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two operations that the interpreter rounds more often than a device does."""
    import numpy as np
    from triton.runtime import interpreter

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        """One rounding; the interpreter rounds the product too."""
        return interpreter.TensorHandle(
            (x.data.astype(np.float64) * y.data + z.data).astype(np.float32), z.dtype.scalar
        )

    def tree_sum(self: Any, x: Any) -> Any:
        """Halves added to halves; numpy adds one after the other along any axis but the last."""
        data, axis = x.handle.data, 0 if self.axis is None else self.axis
        while data.shape[axis] > 1:
            low, high = np.split(data, 2, axis)
            data = low + high
        return self.to_tensor(data if self.keep_dims else data.squeeze(axis), x.dtype)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
    monkeypatch.setattr(interpreter.ReduceOps, "sum", tree_sum)


def on_the_machine(monkeypatch: pytest.MonkeyPatch, arch: int) -> None:
    """Kernels take CPU tensors, and what was compiled for an architecture runs on them."""
    import ptx_driver

    from kdcache.kernels import kd_loss_rows as kd_loss
    from kdcache.kernels import topk_lse

    ptx_driver.install(arch)
    monkeypatch.setattr(ptx_driver.BENCH, "slack", ptx_driver.Slack(1.0))
    monkeypatch.setattr(ptx_driver.BENCH, "fuse", True)
    for module in (kd_loss, topk_lse):
        monkeypatch.setattr(module, "INTERPRETED", True)


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the kernels run. Memory that torch leaves as it finds it is filled with NaN: what is
    unwritten shows.
    """
    import numpy as np
    import torch
    import triton

    interprets = triton.knobs.runtime.interpret
    if request.param == "interpreter" and not interprets:
        pytest.skip("triton compiles in this process (-m gpu)")
    ptx = request.config.getoption("ptx")
    if request.param == "cuda" and (interprets or not (ptx or torch.cuda.is_available())):
        pytest.skip("no CUDA device, or triton interprets in this process: run pytest -m gpu")
    if interprets:
        as_on_a_device(monkeypatch)
    elif ptx:
        on_the_machine(monkeypatch, request.config.getoption("arch"))
    torch.use_deterministic_algorithms(True)
    with np.errstate(all="ignore"):
        yield "cpu" if interprets or ptx else "cuda"
    torch.use_deterministic_algorithms(False)
