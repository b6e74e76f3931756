"""All that a CUDA device is needed for, in one run: install, tests, every benchmark. `make gpu`
calls it.

    python -m kdcache.bench.gpu [--out FOLDER] [--wheels FOLDER] [--steps tests,loss,...]

The checkout is installed without dependencies: the machine's own torch stays. Wheels found in the
folder `--wheels` are installed first, without theirs. Every step runs, whatever became of the
others, each benchmark leaving its dated JSON line in `--out`; the exit code is 1 if any failed, and
the last lines say which. The tests wait for the compiler more than for the device: they share it
between processes where pytest-xdist is there. `--steps` runs some of it, where a machine is lent by
the minute; the step "tiles" runs only where it is named. Nothing but the standard library is
imported here: what is missing is what this has to say.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

from kdcache.bench.races import RACES

ROOT = Path(__file__).resolve().parent.parent
TESTS_NEED = ("pytest", "hypothesis")
STEPS = ("tests", *(race.name for race in RACES))
TUNING = ("tiles",)  # what chooses constants of the kernels, and is no result of theirs
MOST_WORKERS = 8  # each holds a context of the device
Run = Callable[[Sequence[str]], int]


def run_command(command: Sequence[str]) -> int:
    """Its exit code; what it says goes to the terminal."""
    print(f"$ {shlex.join(command)}", flush=True)
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def needed() -> list[str]:
    """Distributions that kdcache depends on, and those of its tests, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [
        re.split(r"[^A-Za-z0-9._-]", one, maxsplit=1)[0] for one in project["dependencies"]
    ] + list(TESTS_NEED)


def missing(names: Sequence[str]) -> list[str]:
    """Those that are neither installed nor importable."""
    importlib.invalidate_caches()
    return [
        name
        for name in names
        if not _installed(name) and importlib.util.find_spec(name.replace("-", "_")) is None
    ]


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def install(wheels: Path | None, run: Run) -> list[str]:
    """Wheels, then the checkout; what failed or is missing afterwards, one line each."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    failed = []
    if wheels is not None:
        found = sorted(str(wheel) for wheel in wheels.resolve().glob("*.whl"))
        if not found:
            failed.append(f"wheels: none in {wheels}")
        elif run([*pip, "--no-index", *found]):
            failed.append(f"wheels: pip could not install those in {wheels}")
    if run([*pip, "--no-build-isolation", "--editable", "."]):
        failed.append("install: pip could not install the checkout; the steps use it where it is")
    if absent := missing(needed()):
        failed.append(
            f"modules: {', '.join(absent)} not installed; put their wheels into a folder and give "
            "it: make gpu WHEELS=FOLDER"
        )
    return failed


def benchmark(name: str, module: str, options: Sequence[str], out: Path) -> list[str]:
    """The command of a benchmark."""
    command = [sys.executable, "-m", "kdcache", "bench", name, "--results", str(out)]
    if "device" in options:
        command += ["--device", "cuda"]
    if "plot" in options and not missing(["matplotlib"]):
        command += ["--plot", str(out / f"{module}_{time.strftime('%Y-%m-%d_%H%M%S')}.png")]
    return command


def gpu_tests() -> list[str]:
    """The command of the tests."""
    workers = (
        [] if missing(["pytest-xdist"]) else ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1))]
    )
    return [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        "--durations=10",
        *workers,
    ]


def everything(
    out: Path, wheels: Path | None = None, steps: Sequence[str] = STEPS, run: Run = run_command
) -> list[str]:
    """Runs these steps and returns what failed, one line each."""
    failed = install(wheels, run)
    if run([sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]):
        failed.append("device: torch sees no CUDA device, so the tests marked gpu skip themselves")
    if "tests" in steps and (code := run(gpu_tests())):
        failed.append(f"tests: pytest -m gpu ended with exit code {code}")
    for race in RACES:
        if race.name in steps and (
            code := run(benchmark(race.name, race.module, race.options, out))
        ):
            failed.append(f"bench {race.name}: exit code {code}")
    for name in TUNING:
        if name in steps and (
            code := run([sys.executable, "-m", f"kdcache.bench.kd_{name}", "--results", str(out)])
        ):
            failed.append(f"{name}: exit code {code}")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kdcache.bench.gpu", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--wheels", type=lambda given: Path(given) if given else None, default=None)
    parser.add_argument(
        "--steps",
        type=lambda given: given.split(",") if given else list(STEPS),
        default=list(STEPS),
        help=f"of {', '.join(STEPS + TUNING)}; by default all but the last",
    )
    given = parser.parse_args()
    if unknown := set(given.steps) - {*STEPS, *TUNING}:
        parser.error(
            f"--steps: {', '.join(sorted(unknown))} is none of {', '.join(STEPS + TUNING)}"
        )
    failed = everything(given.out.resolve(), given.wheels, given.steps)
    print(
        "\n".join([f"results are in {given.out}", *(f"FAILED {line}" for line in failed)]),
        flush=True,
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
