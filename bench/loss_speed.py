"""The distillation loss with its gradient, over vocabularies: share of the copy bandwidth, against
rivals, in turns.

The floor is bytes. A row of V logits is read once, its gradient written once, and K ids and
log-probabilities, a label, a tail and three results come and go: N (2 V b + K (4 + 4) + 8 + 4 + 12)
bytes for logits of b bytes. At N = 8192, V = 128,256, K = 64 and bfloat16 that is 4.21 GB. The roof
is a device-to-device copy in the same turns, whose bytes count read and written. Every rate here is
those least bytes over the time, whatever a contender moves: the fused kernel reads a row twice, the
second time from the L2 cache while rows in flight stay in it; where none does, it moves 1.5 times
the floor and cannot pass 67 % of the copy.

The kernel is called forward and backward; its backward finds factors of 1 and moves nothing.
`kd_loss, engine triton` is the whole public call around it, and whatever that adds.
torch.compile runs at K = 64 alone: its times hardly depend on K, and each shape takes it many
seconds to compile. On a CPU the kernels cannot be timed: there the torch engine is raced against
the definition.

    kdcache bench loss [--quick] [--rounds N] [--device cuda] [--results FOLDER] [--plot FILE]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from kdcache.bench.kd_contenders import (
    contenders,
    dense_teacher,
    gradient_errors,
    has_liger,
    make_problem,
)
from kdcache.bench.race import command, finish, machine, table
from kdcache.bench.track import Track, choose_device, each_case

SAY_CPU = "the kernels were not timed: they need a CUDA device, and this run is on the CPU"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The cases: every vocabulary at every temperature with every K."""

    rows: int
    classes: tuple[int, ...]
    temperatures: tuple[float, ...] = (1.0, 2.0)
    kept: tuple[int, ...] = (16, 64, 256)
    dtype: torch.dtype = torch.bfloat16
    compiled_at: int = 64  # the K at which torch.compile takes part
    rounds: int = 15
    copy_bytes: int = 2**31
    flush_bytes: int = 2**29  # caches are smaller: 50 to 126 MB of L2

    def cases(self) -> list[tuple[int, float, int]]:
        """Those of the K that all take part in come first: a run that ends early has them."""
        return sorted(
            product(self.classes, self.temperatures, self.kept),
            key=lambda case: case[2] != self.compiled_at,
        )


CUDA = Sizes(rows=8192, classes=(1000, 4096, 10_000, 32_000, 50_257, 128_256, 151_936, 262_144))
CPU = Sizes(
    rows=256,
    classes=(1000, 32_000),
    kept=(64,),
    dtype=torch.float32,
    rounds=7,
    copy_bytes=2**26,
    flush_bytes=2**26,
)
QUICK = {
    "cuda": Sizes(
        rows=256,
        classes=(1000, 1271),
        temperatures=(2.0,),
        kept=(16,),
        compiled_at=16,
        rounds=2,
        copy_bytes=2**20,
        flush_bytes=2**20,
    ),
    "cpu": Sizes(
        rows=16,
        classes=(100, 127),
        temperatures=(2.0,),
        kept=(8,),
        dtype=torch.float32,
        rounds=2,
        copy_bytes=2**16,
        flush_bytes=2**16,
    ),
}


def model_bytes(rows: int, classes: int, kept: int, itemsize: int) -> int:
    """The least that loss and gradient must move: logits in, gradient out, and of each row its
    teacher and results.
    """
    teacher = kept * (4 + 4) + 4  # ids, log-probabilities, the tail's
    return rows * (2 * classes * itemsize + teacher + 8 + 3 * 4)


def loss_speed(
    quick: bool = False, rounds: int | None = None, device: str | None = None
) -> dict[str, Any]:
    """Race over every case and return one JSON object: cases, times, rates, shares, memory, errors,
    machine.

    "errors" holds what of our own failed or gave a wrong gradient. UsageError for a device that is
    not there.
    """
    place = choose_device(device)
    sizes = QUICK[place.type] if quick else CUDA if place.type == "cuda" else CPU
    rounds = sizes.rounds if rounds is None else rounds
    track = Track(place, sizes.copy_bytes, sizes.flush_bytes)
    cases = each_case(sizes.cases(), partial(one_case, track, sizes, rounds), progress)
    return {
        "bench": "kd_loss",
        "command": command(),
        "machine": machine(),
        "device": str(place),
        "rounds": rounds,
        "rows": sizes.rows,
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "kernels_timed": place.type == "cuda",
        "note": None if place.type == "cuda" else SAY_CPU,
        "copy_bytes": sizes.copy_bytes,
        "liger": has_liger(),
        "left_out": len(sizes.cases()) - len(cases),
        "cases": cases,
        "errors": [f"{name_of(case)}: {error}" for case in cases for error in case["errors"]],
    }


def one_case(
    track: Track, sizes: Sizes, rounds: int, classes: int, temperature: float, kept: int
) -> dict[str, Any]:
    """The race over one shape."""
    least = model_bytes(sizes.rows, classes, kept, sizes.dtype.itemsize)
    out: dict[str, Any] = {
        "num_classes": classes,
        "temperature": temperature,
        "k": kept,
        "model_bytes": least,
    }
    bound = 2 * torch.finfo(sizes.dtype).eps + 1e-5
    try:
        track.release()
        problem = make_problem(sizes.rows, classes, kept, temperature, sizes.dtype, track.device)
        q_NV = (
            dense_teacher(problem.targets, sizes.dtype)
            if has_liger() and track.device.type == "cuda"
            else None
        )
        entrants = contenders(problem, kept == sizes.compiled_at, q_NV)
        out |= track.race(entrants, rounds, least)
        for name, found in out["contenders"].items():
            if "failed" in found:
                continue
            errors = gradient_errors(problem, entrants[name].run, q_NV if name == "liger" else None)
            found["gradient_error"] = {
                key: e if math.isfinite(e) else None for key, e in errors.items()
            }
            if entrants[name].own and not all(e <= bound for e in errors.values()):
                out["errors"].append(f"{name}: its gradient is off by {errors}")
    except Exception as e:
        return out | {"failed": str(e), "errors": [f"{type(e).__name__}: {e}"]}
    return out


def name_of(case: Mapping[str, Any]) -> str:
    return f"V={case['num_classes']} T={case['temperature']:g} K={case['k']}"


def progress(case: Mapping[str, Any]) -> str:
    """One line of a case."""
    shares = ", ".join(
        f"{name} {found['share_of_copy']:.0%}" if "failed" not in found else f"{name} failed"
        for name, found in case.get("contenders", {}).items()
    )
    return f"{name_of(case)}: {case.get('failed', shares)}"


def render(result: dict[str, Any]) -> str:
    """The table: one line for each contender in each case."""
    rows: list[list[Any]] = []
    failed = []
    for case in result["cases"]:
        rows += (
            [[f"{name_of(case)}  copy", "", case["copy_bytes_per_second"] / 1e9, 100.0, "", "", ""]]
            if "failed" not in case
            else []
        )
        for name, found in case.get("contenders", {}).items():
            if "failed" in found:
                failed.append(f"{name_of(case)}  {name}: {found['failed']}")
                continue
            peak, error = found["peak_bytes"], found["gradient_error"]
            rows.append(
                [
                    f"{name_of(case)}  {name}",
                    1000 * found["seconds"]["median"],
                    found["bytes_per_second"] / 1e9,
                    100 * found["share_of_copy"],
                    "" if peak is None else f"{peak / 1e6:.0f}",
                    *(
                        "not finite" if error[key] is None else f"{error[key]:.1e}"
                        for key in ("max", "tail")
                    ),
                ]
            )
    heads = [
        f"N={result['rows']} {result['dtype']}",
        "ms",
        "GB/s",
        "% of copy",
        "peak MB",
        "error",
        "error in tail",
    ]
    notes = [
        *failed,
        *result["errors"],
        *([result["note"]] if result["note"] else []),
        *(
            []
            if result["liger"] or not result["kernels_timed"]
            else ["liger-kernel is not installed: not raced"]
        ),
    ]
    return "\n".join([table(heads, rows), *notes])


def draw(result: Mapping[str, Any], path: Path) -> None:
    """A PNG (or what the suffix says): rates over the number of classes, the roof drawn in, one
    panel a temperature.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    cases = [case for case in result["cases"] if "failed" not in case]
    kept = (
        64
        if any(case["k"] == 64 for case in cases)
        else min((case["k"] for case in cases), default=0)
    )
    temperatures = sorted({case["temperature"] for case in cases}) or [1.0]
    figure = Figure(figsize=(6 * len(temperatures), 4.5), layout="constrained")
    panels = figure.subplots(1, len(temperatures), squeeze=False, sharey=True)[0]
    for axes, temperature in zip(panels, temperatures, strict=True):
        shown = [case for case in cases if (case["temperature"], case["k"]) == (temperature, kept)]
        axes.plot(
            [case["num_classes"] for case in shown],
            [case["copy_bytes_per_second"] / 1e9 for case in shown],
            "k--",
            label="copy: the roof",
        )
        for name in dict.fromkeys(name for case in shown for name in case["contenders"]):
            points = [
                (case["num_classes"], case["contenders"][name]["bytes_per_second"] / 1e9)
                for case in shown
                if "failed" not in case["contenders"].get(name, {"failed": ""})
            ]
            axes.plot(*zip(*points, strict=True), marker="o", label=name) if points else None
        axes.set(
            xscale="log",
            xlabel="classes",
            ylabel="GB/s of the least bytes",
            ylim=(0, None),
            title=f"T = {temperature:g}, K = {kept}, N = {result['rows']}, {result['dtype']}",
        )
    axes.legend(fontsize="small")
    figure.suptitle(
        result["machine"]["gpus"][0]
        if result["kernels_timed"]
        else "CPU; the kernels were not timed"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    finish(loss_speed(quick="--quick" in sys.argv[1:]), render)
