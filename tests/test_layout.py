"""The layout: real folders at the top, relative links into the package. (Bare imports of them:
ruff, TID251.)
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKS = {"kernels": "../kernels", "bench": "../bench", "cli.py": "../cli.py"}


@pytest.mark.parametrize(("name", "target"), LINKS.items())
def test_links_are_relative_and_reach_the_top(name: str, target: str) -> None:
    link = ROOT / "kdcache" / name
    assert link.is_symlink(), (
        f"{link} became a plain file: git config core.symlinks true, and check out again"
    )
    assert os.readlink(link) == target
    assert link.resolve() == ROOT / name
    assert not (ROOT / name).is_symlink()


@pytest.mark.parametrize("folder", ["kernels", "bench", "tests"])
def test_the_top_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_package_is_typed() -> None:
    assert (ROOT / "kdcache" / "py.typed").is_file()


@pytest.mark.parametrize("folder", ["kdcache/kernels", "kdcache/bench"])
def test_setuptools_finds_what_the_links_reach(folder: str) -> None:
    # a virtual environment of Python 3.12 comes without
    setuptools = pytest.importorskip("setuptools")
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"][
        "find"
    ]["include"]
    assert folder.replace("/", ".") in setuptools.find_namespace_packages(str(ROOT), include=wanted)
