"""Arrows point down: who imports whom, read from the source of every module, late imports included."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "kdcache"
LAYER = {
    "kernels": 0,
    "errors": 1,
    "process": 1,
    "user": 1,
    "cache": 1,
    "data": 2,
    "loss": 2,
    "models": 2,
    "teacher": 3,
    "student": 3,
    "hf": 3,
    "inspect": 3,
    "report": 3,
    "env": 3,
    "demo": 4,
    "bench": 4,
    "console": 5,
    "cli": 5,
    "__main__": 6,
}
STDLIB_AND_NUMPY = {"numpy", "xxhash", *sys.stdlib_module_names}
MAY_IMPORT = {  # part or file -> the only other distributions that it may import
    "kernels": {"torch", "triton", *sys.stdlib_module_names},
    "errors": set(sys.stdlib_module_names),
    "process": set(sys.stdlib_module_names),
    "user": set(sys.stdlib_module_names),
    "cache": {"pyarrow", "h5py", *STDLIB_AND_NUMPY},
    "inspect": {"tokenizers", *STDLIB_AND_NUMPY},
    "models/runs.py": STDLIB_AND_NUMPY,
    "report": {"matplotlib", *STDLIB_AND_NUMPY},
}


def files() -> list[Path]:
    """Every module of the package but `__init__`, whose names are lazy and load on use. (rglob
    follows no links.)
    """
    found = {*PACKAGE.rglob("*.py"), *PACKAGE.glob("kernels/*.py"), *PACKAGE.glob("bench/*.py")}
    return sorted(found - {PACKAGE / "__init__.py"})


def part(path: Path) -> str:
    """The part of the house a file belongs to: the first name below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(source: str) -> Iterator[str]:
    """Full dotted names a source imports, wherever the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            base = node.module or ""
            yield from (
                (f"{base}.{alias.name}" for alias in node.names) if base == "kdcache" else (base,)
            )


def parts_imported(source: str) -> set[str]:
    """Parts of the package a source imports; `kdcache.__version__` and the like are no part."""
    names = (name.split(".")[1] for name in imported(source) if name.startswith("kdcache."))
    return {name for name in names if not name.startswith("__")}


def test_every_part_has_a_layer() -> None:
    assert {part(path) for path in files()} <= set(LAYER)


def test_imports_point_down() -> None:
    up = []
    for path in files():
        own, found = part(path), parts_imported(path.read_text(encoding="utf-8"))
        up += [f"{path} imports {p}" for p in sorted(found) if LAYER[p] > LAYER[own]]
        if LAYER[own] <= 3 and {own, *found} >= {"teacher", "student"}:
            up.append(f"{path}: teacher and student know each other")
        # a kernel knows its neighbours, and nothing else of the package
        if own == "kernels":
            up += [f"{path} imports {p}" for p in found - {"kernels"}]
    assert up == []


def test_the_lower_layers_need_few_libraries() -> None:
    more, found = [], set[str]()
    for path in files():
        name = path.relative_to(PACKAGE).as_posix()
        rule = name if name in MAY_IMPORT else part(path)
        if rule in MAY_IMPORT:
            found.add(rule)
            roots = {full.split(".")[0] for full in imported(path.read_text(encoding="utf-8"))}
            more += [f"{path} imports {x}" for x in roots - {"kdcache"} - MAY_IMPORT[rule]]
    assert sorted(more) == [] and found == set(MAY_IMPORT)


def test_parts_do_not_import_in_circles() -> None:
    graph: dict[str, set[str]] = {}
    for path in files():
        graph.setdefault(part(path), set()).update(
            parts_imported(path.read_text(encoding="utf-8")) - {part(path)}
        )
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as e:
        pytest.fail(f"parts import each other: {' -> '.join(e.args[1])}")
    assert order.index("errors") < order.index("cache")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from kdcache.loss.kd_loss import kd_loss", {"loss"}),
        ("import kdcache.teacher.dump", {"teacher"}),
        ("from kdcache import cli, __version__", {"cli"}),
        ("def f():\n    from kdcache.cache import reader", {"cache"}),
        ("import torch", set()),
    ],
)
def test_the_reader_of_imports_sees_every_form(source: str, expected: set[str]) -> None:
    assert parts_imported(source) == expected
