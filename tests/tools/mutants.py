"""Does the suite notice when a number is decided wrongly? A script, run by hand; it is no test.

    python tests/tools/mutants.py [--only REGEX] [--drawn N] [--seed N] [--jobs N] [--limit SECONDS]
    [--out FILE]

The tree is copied into a temporary folder. There one edit at a time is made, the tests that cover
the edited file are run until one fails, and the edit is taken back. mutants.txt has the tests of
each file and the mutants that have a name; others are drawn, with a seed, from the functions that
it names: + and - swapped, < and <=, `and` and `or`, 0 and 1, a `not` dropped, a statement dropped.
At the end the tests that noticed something run once on the code as it is.

One process imports torch and forks a child for each mutant, which so takes as long as its tests.
The test that noticed a mutant the last time, by the table in docs/mutants.md (or --known FILE), is
run first.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import contextlib
import importlib
import itertools
import multiprocessing
import os
import queue
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TREE = Path(__file__).resolve().parents[2]
TABLE = TREE / "docs/mutants.md"
COPIED = (
    "kdcache",
    "kernels",
    "bench",
    "cli.py",
    "tests",
    "docs",
    "examples",
    "README.md",
    "pyproject.toml",
    "Makefile",
    "constraints.txt",
)
# Imported once, before the first fork; never kdcache, which each child has of its own.
IMPORTED = (
    "torch",
    "numpy",
    "pyarrow",
    "h5py",
    "safetensors.torch",
    "hypothesis",
    "transformers",
    "pytest",
)
SWAPS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
}
SURVIVED, STALE = "SURVIVED", "NO LONGER APPLIES"

# what it is, where it begins and ends, the text in its place
Edit = tuple[str, int, int, str]


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    at: int | None = None  # where `old` begins; None: it stands there once

    def made(self, source: str) -> str | None:
        """The source with the edit, None if it cannot be made any more."""
        if self.at is None and source.count(self.old) != 1:
            return None
        at = source.index(self.old) if self.at is None else self.at
        if source[at : at + len(self.old)] != self.old:
            return None
        changed = source[:at] + self.new + source[at + len(self.old) :]
        try:
            compile(changed, self.file, "exec")
        except SyntaxError:
            return None
        return changed


@dataclass
class Covered:
    """A file, the tests that cover it, the functions of which mutants are drawn, and the named
    mutants.
    """

    file: str
    tests: list[str]
    functions: list[str]
    named: list[Mutant]


def test_file(name: str) -> str:
    """tests/FOLDER/test_NAME.py of FOLDER/NAME."""
    folder, _, last = name.rpartition("/")
    return f"tests/{folder}{'/' if folder else ''}test_{last}.py"


def covered() -> dict[str, Covered]:
    """What mutants.txt says, by file."""
    out: dict[str, Covered] = {}
    sides: dict[str, list[str]] = {}
    for line in (TREE / "tests/tools/mutants.txt").read_text(encoding="utf-8").splitlines():
        mark, text = line[:2], line[2:]
        if mark == "= ":
            here, sides = out.setdefault(text, Covered(text, [], [], [])), {}
        elif mark == "# ":
            here.tests += [test_file(name) for name in text.split()]
        elif mark == "~ ":
            here.functions += text.split()
        elif mark == "@ ":
            name, sides = text, {"- ": [], "+ ": []}
            here.named.append(Mutant(name, here.file, "", ""))
        elif mark in sides:
            sides[mark].append(text)
            here.named[-1] = Mutant(name, here.file, "\n".join(sides["- "]), "\n".join(sides["+ "]))
    return out


def drawn(files: list[Covered], count: int, seed: int) -> list[Mutant]:
    """As many mutants as that, of each kind in turn; in the order of their files."""
    kinds: dict[str, list[Mutant]] = {}
    for one in files:
        source = (TREE / one.file).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in one.functions:
                for what, begin, end, new in edits(node, source):
                    name = f"{node.name}: {what} in line {source.count(chr(10), 0, begin) + 1}"
                    mutant = Mutant(name, one.file, source[begin:end], new, begin)
                    if mutant.made(source) is not None:
                        kinds.setdefault(what, []).append(mutant)
    rng = random.Random(seed)
    for kind in kinds.values():
        rng.shuffle(kind)
    turns = [
        mutant
        for turn in itertools.zip_longest(*kinds.values())
        for mutant in turn
        if mutant is not None
    ]
    return sorted(turns[:count], key=lambda mutant: (mutant.file, mutant.at))


def edits(root: ast.AST, source: str) -> Iterator[Edit]:
    """Every edit within a function. The source is ASCII: ast counts bytes."""
    starts = [0, *itertools.accumulate(len(line) for line in source.splitlines(keepends=True))]
    known: set[str] = set()

    def span(node: Any) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[
            node.end_lineno - 1
        ] + node.end_col_offset

    def between(left: Any, right: Any, old: str, new: str) -> Iterator[Edit]:
        begin, end = span(left)[1], span(right)[0]
        if found := re.search(rf"(?<![<>=!]){re.escape(old)}(?![<>=])", source[begin:end]):
            yield f"{new} for {old}", begin + found.start(), begin + found.end(), new

    for node in ast.walk(root):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
            yield from between(
                node.left, node.right, *("+-" if isinstance(node.op, ast.Add) else "-+")
            )
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
            yield from between(node.left, node.comparators[0], *SWAPS[type(node.ops[0])])
        elif isinstance(node, ast.BoolOp):
            both = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            yield from between(node.values[0], node.values[1], *both)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield "a `not` dropped", span(node)[0], span(node)[0] + len("not "), ""
        elif isinstance(node, ast.Constant) and type(node.value) is int and node.value in (0, 1):
            yield f"{1 - node.value} for {node.value}", *span(node), str(1 - node.value)
        elif isinstance(node, ast.AugAssign) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        ):
            yield "a statement dropped", *span(node), "pass"
        # of what has a value already: else the next line fails at once
        elif isinstance(node, ast.Assign):
            target = ast.unparse(node.targets[0])
            if target in known or isinstance(node.targets[0], ast.Subscript):
                yield "a statement dropped", *span(node), "pass"
            known.add(target)


def noticed_before(table: Path) -> dict[tuple[str, str], str]:
    """(file, name) of a mutant -> the test that noticed it, by the table of an earlier run."""
    text = table.read_text(encoding="utf-8") if table.exists() else ""
    rows = re.findall(r"^\| (.+?) \| (\S+) \| ((?:\w+/)*test_\S+?\.py::.+) \| \d+ \|$", text, re.M)
    return {
        (f"kdcache/{file}", name): f"tests/{test}".replace("\\|", "|") for name, file, test in rows
    }


def outcome(
    mutant: Mutant, tests: list[str], copy: Path, limit: float, before: str | None
) -> tuple[str, float]:
    """(what noticed, seconds): the first test that fails, SURVIVED, or that the edit could not be
    made.

    before: the test that noticed it the last time, which is run first, alone.
    """
    path, began = copy / mutant.file, time.monotonic()
    source = path.read_text(encoding="utf-8")
    changed = mutant.made(source)
    if changed is None:
        return STALE, 0.0
    stood = path.stat()
    try:
        path.write_text(changed, encoding="utf-8")
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            # known by the second and the size of its source, which an edit may leave
            compiled.unlink()
        found = SURVIVED if before is None else tested(copy, [before], limit)
        if before is None or not found.startswith(before):
            found = tested(copy, tests, limit)
    finally:
        path.write_text(source, encoding="utf-8")
        os.utime(path, ns=(stood.st_atime_ns, stood.st_mtime_ns))
    return found, time.monotonic() - began


def tested(copy: Path, tests: list[str], limit: float) -> str:
    """The first of the tests that fails in a process of their own, or SURVIVED."""
    context = multiprocessing.get_context("fork")
    told, tell = context.Pipe(duplex=False)
    child = context.Process(target=run_tests, args=(copy, tests, tell))
    child.start()
    tell.close()
    try:
        found = str(told.recv()) if told.poll(limit) else f"more than {limit:.0f} s"
    except EOFError:
        found = "a crash"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid or 0, signal.SIGKILL)  # and whatever a test has started
    child.join()
    return found


def run_tests(copy: Path, tests: list[str], tell: Any) -> None:
    """In the child: run them against the copy, and tell the first that failed."""
    os.setpgrp()
    quiet = os.open(copy / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.chdir(copy)
    os.environ |= {
        "PYTHONPATH": str(copy),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    here = (TREE, TREE / "tests/tools", TREE / "tests/tools/ptx")
    sys.path[:] = [str(copy), *(p for p in sys.path if Path(p or ".").resolve() not in here)]
    import pytest

    class First:
        name = ""

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            self.name = self.name or (report.nodeid if report.failed else "")

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            self.name = self.name or (report.nodeid if report.failed else "")

    first = First()
    code = pytest.main(
        [
            "-x",
            "-q",
            "-m",
            "not slow and not gpu",
            "-p",
            "no:cacheprovider",
            "--tb=no",
            f"--basetemp={copy}/tmp",
            *tests,
        ],
        plugins=[first],
    )
    import kdcache

    assert str(kdcache.__file__).startswith(str(copy)), kdcache.__file__
    tell.send(SURVIVED if code == 0 else first.name or f"pytest ended with {code}")
    tell.close()
    os._exit(0)


def row(mutant: Mutant, found: str, seconds: float) -> str:
    noticed = found.removeprefix("tests/").replace("|", "\\|")
    return f"| {mutant.name} | {mutant.file.removeprefix('kdcache/')} | {noticed} | {seconds:.0f} |"


def copy_tree(copy: Path) -> Path:
    copy.mkdir()
    for name in COPIED:
        if (TREE / name).is_dir():
            shutil.copytree(TREE / name, copy / name, symlinks=True)
        else:
            shutil.copy2(TREE / name, copy / name)
    return copy


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the tests against mutants of the code.")
    parser.add_argument(
        "--only", default="", help="a regular expression: mutants in whose FILE: NAME it is found"
    )
    parser.add_argument(
        "--drawn", type=int, default=100, help="how many are drawn beside the named ones"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument(
        "--jobs", type=int, default=1, help="mutants at a time, each in a copy of its own"
    )
    parser.add_argument(
        "--limit", type=float, default=120.0, help="seconds for the tests of one mutant"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="a file for the lines of the table, as they come"
    )
    parser.add_argument(
        "--known", type=Path, default=TABLE, help="a table: what noticed a mutant then is run first"
    )
    parser.add_argument("--list", action="store_true", help="name the mutants, and run nothing")
    given = parser.parse_args()
    files = covered()
    every = [mutant for one in files.values() for mutant in one.named]
    every += drawn([*files.values()], given.drawn, given.seed)
    mutants = [mutant for mutant in every if re.search(given.only, f"{mutant.file}: {mutant.name}")]
    if given.list:
        print("\n".join(f"{mutant.file}: {mutant.name}" for mutant in mutants))
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    for module in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    known, results, copies = noticed_before(given.known), dict[Mutant, str](), queue.Queue[Path]()

    def one(mutant: Mutant) -> None:
        copy = copies.get()
        try:
            found, seconds = outcome(
                mutant,
                files[mutant.file].tests,
                copy,
                given.limit,
                known.get((mutant.file, mutant.name)),
            )
        finally:
            copies.put(copy)
        results[mutant] = found
        print(f"{len(results)}/{len(mutants)} {row(mutant, found, seconds)}", flush=True)
        if given.out is not None:
            with open(given.out, "a", encoding="utf-8") as lines:
                lines.write(row(mutant, found, seconds) + "\n")

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for job in range(given.jobs):
            copies.put(copy_tree(Path(folder) / str(job)))
        with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(one, mutants))
        noticing = sorted({found for found in results.values() if "::" in found})
        wrong = tested(copies.get(), noticing, 10 * given.limit) if noticing else SURVIVED
    left = [mutant for mutant, found in results.items() if not found.startswith("tests/")]
    print(*(f"{results[mutant]}: {mutant.file}: {mutant.name}" for mutant in left), sep="\n")
    if wrong != SURVIVED:
        sys.exit(f"without any edit fails, so that it has noticed nothing: {wrong}")


if __name__ == "__main__":
    main()
