"""What the benchmarks share: contenders timed in turns in one run, a small table, and one JSON line
at the end.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcache.env import env
from kdcache.user.paths import local_path

Contender = Callable[[], object]


def wall_clock(name: str, run: Contender) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def race(
    contenders: Mapping[str, Contender],
    rounds: int,
    warmups: int = 1,
    clock: Callable[[str, Contender], float] = wall_clock,
) -> dict[str, list[float]]:
    """Seconds of each round of each contender, as `clock` measures them.

    They run in turns, so that a drift of the clock or a noisy neighbour hits all alike, and the
    order turns by one from round to round, so that none always follows the same other. `warmups`
    rounds before are not counted.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmups, rounds):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            taken = clock(name, contenders[name])
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def median_ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round: what the clock did to a whole round cancels."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of the rounds."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def machine() -> dict[str, Any]:
    """Where it ran, as `kdcache env` says it, without the packages no benchmark uses and the build
    of the kernel.
    """
    found = env()
    used = ("torch", "triton", "numpy", "pyarrow", "h5py")
    return {
        **found,
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: found["packages"][name] for name in used},
    }


def command() -> str:
    """The command line of this process, the program by its bare name."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned text: the first column to the left, numbers to the right, floats to four digits."""
    cells = [
        list(heads),
        *([f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in rows),
    ]
    first, *others = (max(len(row[i]) for row in cells) for i in range(len(heads)))
    return "\n".join(
        "  ".join(
            [row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], others, strict=True))]
        )
        for row in cells
    )


def json_line(result: Mapping[str, Any]) -> str:
    """The one line a benchmark ends with."""
    return json.dumps(result, allow_nan=False)


def save(result: Mapping[str, Any], folder: Path) -> Path:
    """Keep the line in `folder`, under the benchmark's name, the device's, and the date; never over
    an older one.
    """
    gpus = result["machine"]["gpus"] if str(result.get("device", "cpu")).startswith("cuda") else []
    device = re.sub(r"[^a-z0-9]+", "-", gpus[0].lower()).strip("-") if gpus else "cpu"
    folder = local_path(folder, "--results")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['bench']}_{device}_{time.strftime('%Y-%m-%d_%H%M%S')}.json"
    with open(path, "x", encoding="ascii") as file:
        file.write(json_line(result) + "\n")
    return path


def finish(result: Mapping[str, Any], render: Callable[[Any], str]) -> None:
    """Print the table, then the JSON line."""
    print(render(result))
    print(json_line(result))
