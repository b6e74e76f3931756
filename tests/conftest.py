"""Whether triton interprets its kernels is settled when it is first imported: here, before any test module."""

from __future__ import annotations

import os
import re

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """`-m gpu` runs the kernels as they are compiled; without it they run in triton's interpreter, on the CPU."""
    if not re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr") or ""):
        os.environ.setdefault("TRITON_INTERPRET", "1")
