"""What stage 1 keeps of a teacher's logits: top-k and tails; the kernel against torch, in turns in
one run.

The floor is bytes. A row of V logits is read once; k ids and values, a sum for each of T
temperatures, a label's logit and a flag are written: N (V b + 12 k + 4 T + 4 + 8 + 4) bytes for
logits of b bytes. At N = 8192, V = 128,256, k = 64, T = 2 and bfloat16 that is 2.11 GB. The roof is
a device-to-device copy in the same turns, whose bytes count read and written. Every rate here is
those least bytes over the time, whatever a contender moves.

    topk + logsumexp    torch.topk and one torch.logsumexp for each temperature: no tail, no label,
                        no order of ties
    exact torch         kdcache.loss.topk, which the torch path of dump-teacher calls: the same answer as
                        the kernel's

A kernel's share above 100 % of the copy would not be wrong: it reads, and a copy reads and writes.
Logits of one case (16 MB at V = 1000, else 0.5 GB and more) are read by all contenders, each time
after a buffer larger than the caches was written and read: no line is left to be written back while
they are timed.

On a CPU the kernel cannot be timed: there the two torch forms are raced alone.

    kdcache bench topk-lse [--quick] [--rounds N] [--device cuda] [--results FOLDER]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from kdcache.bench.race import command, finish, machine, table
from kdcache.bench.track import Entrant, Track, choose_device, each_case
from kdcache.kernels.topk_lse import topk_lse as fused
from kdcache.loss.topk import exact_topk, tail_lse

SAY_CPU = "the kernels were not timed: they need a CUDA device, and this run is on the CPU"
TEMPERATURES = (1.0, 2.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The cases: every vocabulary with every k."""

    rows: int
    classes: tuple[int, ...]
    kept: tuple[int, ...] = (64,)
    dtype: torch.dtype = torch.bfloat16
    rounds: int = 15
    copy_bytes: int = 2**31
    flush_bytes: int = 2**29


CUDA = Sizes(
    rows=8192, classes=(1000, 32_000, 50_257, 128_256, 151_936, 262_144), kept=(16, 64, 256)
)
CPU = Sizes(rows=64, classes=(1000, 32_000), rounds=5, copy_bytes=2**26, flush_bytes=2**26)
QUICK = {
    "cuda": Sizes(rows=256, classes=(1000, 1271), rounds=2, copy_bytes=2**20, flush_bytes=2**20),
    "cpu": Sizes(
        rows=8, classes=(100, 127), kept=(8,), rounds=2, copy_bytes=2**16, flush_bytes=2**16
    ),
}


def model_bytes(rows: int, classes: int, kept: int, temperatures: int, itemsize: int) -> int:
    """The least that must move: logits in; ids, values, sums, a label and its logit, and a flag of
    each row.
    """
    return rows * (classes * itemsize + 12 * kept + 4 * temperatures + 8 + 4 + 4)


def exact(logits: Tensor, kept: int, labels: Tensor) -> tuple[Tensor, ...]:
    """(ids, values, tail lse, label logit) as the torch engine of stage 1 gets them."""
    ids, values = exact_topk(logits, kept)
    tail = tail_lse(logits, torch.cat([ids, labels[:, None]], 1), values[:, 0], TEMPERATURES)
    return ids, values, tail, logits.gather(1, labels[:, None]).float()


def common(logits: Tensor, kept: int) -> tuple[Tensor, ...]:
    """What most code does, without work it could leave out: one upcast, no division by 1."""
    top, wide = logits.topk(kept, dim=-1), logits.float()
    return (
        top.values,
        top.indices,
        *(torch.logsumexp(wide if t == 1 else wide / t, -1) for t in TEMPERATURES),
    )


def differs(logits: Tensor, kept: int, labels: Tensor) -> list[str]:
    """Where the kernel's answer is not that of `exact`: ids, values and label logits bit for bit."""
    found, (ids, values, tail, label) = (
        fused(logits, kept, TEMPERATURES, labels),
        exact(logits, kept, labels),
    )
    same = {
        "ids": torch.equal(found.ids_NK, ids),
        "values": torch.equal(found.values_NK, values),
        "label logits": found.label_logit_NJ is not None
        and torch.equal(found.label_logit_NJ, label),
        "flags": not bool(found.flag_N.any()),
        "tail lse": torch.allclose(found.tail_lse_NT, tail, rtol=1e-5, atol=1e-5),
    }
    return [f"{name} differ from the exact torch form" for name, well in same.items() if not well]


def topk_speed(
    quick: bool = False, rounds: int | None = None, device: str | None = None
) -> dict[str, Any]:
    """Race over every case and return one JSON object: cases, times, rates, shares, memory,
    machine.

    "errors" holds what of our own failed or differed. UsageError for a device that is not there.
    """
    place = choose_device(device)
    sizes = QUICK[place.type] if quick else CUDA if place.type == "cuda" else CPU
    rounds = sizes.rounds if rounds is None else rounds
    track = Track(place, sizes.copy_bytes, sizes.flush_bytes)
    # what is asked for first
    order = sorted(product(sizes.classes, sizes.kept), key=lambda case: case[1] != 64)
    cases = each_case(order, partial(one_case, track, sizes, rounds), progress)
    return {
        "bench": "topk_lse",
        "command": command(),
        "machine": machine(),
        "device": str(place),
        "rounds": rounds,
        "rows": sizes.rows,
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "temperatures": list(TEMPERATURES),
        "kernels_timed": place.type == "cuda",
        "note": None if place.type == "cuda" else SAY_CPU,
        "left_out": len(order) - len(cases),
        "cases": cases,
        "errors": [f"{name_of(case)}: {error}" for case in cases for error in case["errors"]],
    }


def one_case(track: Track, sizes: Sizes, rounds: int, classes: int, kept: int) -> dict[str, Any]:
    """The race over one shape."""
    least = model_bytes(sizes.rows, classes, kept, len(TEMPERATURES), sizes.dtype.itemsize)
    out: dict[str, Any] = {"num_classes": classes, "k": kept, "model_bytes": least}
    try:
        raced, wrong = race_shape(track, sizes, rounds, classes, kept, least)
    except Exception as e:
        return out | {"failed": str(e), "contenders": {}, "errors": [f"{type(e).__name__}: {e}"]}
    return out | raced | {"errors": [*raced["errors"], *wrong]}


def race_shape(
    track: Track, sizes: Sizes, rounds: int, classes: int, kept: int, least: int
) -> tuple[dict[str, Any], list[str]]:
    """What the track says of a shape, and where the kernel's answer is wrong."""
    generator = torch.Generator(track.device).manual_seed(0)
    logits = (
        torch.randn(
            sizes.rows, classes, generator=generator, dtype=sizes.dtype, device=track.device
        )
        * 3
    )
    labels = torch.randint(classes, (sizes.rows,), generator=generator, device=track.device)
    entrants = {
        "topk + logsumexp": Entrant(lambda: common(logits, kept)),
        "exact torch": Entrant(lambda: exact(logits, kept, labels), own=True),
    }
    wrong = []
    if track.device.type == "cuda":
        entrants = {
            "kernel": Entrant(lambda: fused(logits, kept, TEMPERATURES, labels), own=True),
            **entrants,
        }
        wrong = differs(logits, kept, labels)
    track.release()  # what the check and the last case held
    return track.race(entrants, rounds, least), wrong


def name_of(case: Mapping[str, Any]) -> str:
    return f"V={case['num_classes']} k={case['k']}"


def progress(case: Mapping[str, Any]) -> str:
    """One line of a case."""
    times = ", ".join(
        f"{name} {1000 * found['seconds']['median']:.3g} ms"
        if "failed" not in found
        else f"{name} failed"
        for name, found in case["contenders"].items()
    )
    return f"{name_of(case)}: {case.get('failed', times)}"


def render(result: Mapping[str, Any]) -> str:
    """The table: one line for each contender in each case."""
    rows: list[list[Any]] = []
    for case in result["cases"]:
        if "failed" not in case:
            rows.append(
                [f"{name_of(case)}  copy", "", case["copy_bytes_per_second"] / 1e9, 100.0, ""]
            )
        for name, found in case["contenders"].items():
            if "failed" in found:
                rows.append([f"{name_of(case)}  {name}", "failed", "", "", ""])
                continue
            peak = found["peak_bytes"]
            rows.append(
                [
                    f"{name_of(case)}  {name}",
                    1000 * found["seconds"]["median"],
                    found["bytes_per_second"] / 1e9,
                    100 * found["share_of_copy"],
                    "" if peak is None else f"{peak / 1e6:.0f}",
                ]
            )
    heads = [f"N={result['rows']} {result['dtype']}", "ms", "GB/s", "% of copy", "peak MB"]
    return "\n".join(
        [table(heads, rows), *result["errors"], *([result["note"]] if result["note"] else [])]
    )


if __name__ == "__main__":
    finish(topk_speed(quick="--quick" in sys.argv[1:]), render)
