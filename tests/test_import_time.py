"""`import kdcache` and `kdcache --help` load nothing heavy, seen from a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "pyarrow", "h5py", "transformers", "triton", "sklearn", "matplotlib")
SHOW = f"import sys; print(','.join(sorted(set(sys.modules) & {set(HEAVY)!r})))"


def heavy_after(code: str) -> list[str]:
    """The heavy modules loaded once `code` has run in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{SHOW}"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [name for name in done.stdout.splitlines()[-1].split(",") if name]


def command(*args: str) -> str:
    return f"from kdcache.cli import main\nmain({list(args)!r}, standalone_mode=False)"


@pytest.mark.parametrize(
    "code",
    [
        "import kdcache",
        "import kdcache.errors, kdcache.cache.canonical, kdcache.cli",
        "import kdcache; kdcache.__version__; dir(kdcache)",
        command("--help"),
        command("--version"),
        command("dump-teacher", "--help"),
        command("train-student", "--help"),
    ],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    assert heavy_after(code) == []


def test_a_cache_is_read_without_torch() -> None:
    assert not {"torch", "transformers"} & set(
        heavy_after("import kdcache; kdcache.open; kdcache.create")
    )


def test_the_probe_sees_a_heavy_module() -> None:
    assert heavy_after("import numpy") == ["numpy"]


@pytest.mark.parametrize(
    "module", ["student.train", "loss.kd_linear_loss", "loss.kd_loss", "teacher.dump"]
)
def test_the_compiler_of_torch_is_not_loaded(module: str) -> None:
    """It takes as long again as torch itself."""
    code = (
        f"import sys, kdcache.{module}\nassert 'torch' in sys.modules and 'torch._dynamo' not in "
        "sys.modules"
    )
    assert "torch" in heavy_after(code)
