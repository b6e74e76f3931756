"""Where kernels are raced: one device, cold caches, a copy in the same turns as the roof, memory
and failures noted.

On CUDA a run is timed by events around it. Before each run what the last one destroyed is put back,
and a buffer larger than the caches is written and then read: what it leaves there is clean, where
lines that were only written would be written back within the timed run. Then the device waits for
some milliseconds while the run's launches queue up behind, so that what is timed is the device and
not the launching, unless a contender itself waits for the device. On a CPU the wall clock is taken,
after the same preparations.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kdcache.bench.race import Contender, median_ratio, race, spread, wall_clock
from kdcache.errors import UsageError

# about 5 ms at 2 GHz: some 35 launches from Python take about one to queue
WAIT_CYCLES = 10_000_000

SECONDS = 420.0  # of races; a machine is lent by commands of ten minutes


def each_case(
    cases: Iterable[Any],
    race_of: Callable[..., dict[str, Any]],
    told: Callable[[dict[str, Any]], str],
    seconds: float = SECONDS,
) -> list[dict[str, Any]]:
    """`race_of(*case)` of each case, told as soon as it is there: a long run says where it is, and
    what was measured is kept whatever comes.

    A case that raises is one with "failed", and the last: after an error on the device nothing can
    be measured there. Those that would begin after `seconds` are left out, and said: a killed
    benchmark keeps nothing.
    """
    found: list[dict[str, Any]] = []
    waiting, until = list(cases), time.monotonic() + seconds
    while waiting and time.monotonic() < until and not (found and "failed" in found[-1]):
        found.append(race_of(*waiting.pop(0)))
        print(told(found[-1]), flush=True)
    if waiting and "failed" not in found[-1]:
        print(f"left out, as {seconds:.0f} s are over: {waiting}", flush=True)
    return found


def nothing() -> None:
    """What is prepared where nothing was destroyed."""


@dataclass(frozen=True, slots=True)
class Entrant:
    """Something to time. `prepare` comes before every run and is not timed. `own`: a failure of it
    is an error.
    """

    run: Contender
    prepare: Contender = nothing
    own: bool = False


def choose_device(asked: str | None) -> torch.device:
    """The device asked for, by default cuda if there is one; UsageError where it is not there or
    not timed.
    """
    if asked is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", asked):
        raise UsageError(f"device is {asked!r}; expected cpu, cuda or cuda:N")
    device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"device is {asked!r}, but torch {torch.__version__} sees no CUDA device here"
        )
    if device.type == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError(
            "TRITON_INTERPRET=1 is set, so the interpreter would be timed and not the kernels; "
            "unset it"
        )
    return device if str(device) != "cuda" else torch.device("cuda", torch.cuda.current_device())


class Track:
    """A device with two buffers of `copy_bytes`, whose copy is the roof, and `flush_bytes` that
    empty the caches.

    A copy of B bytes moves 2 B: read and written.
    """

    def __init__(
        self, device: torch.device, copy_bytes: int = 2**31, flush_bytes: int = 2**29
    ) -> None:
        self.device = device
        self.source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.source)
        self.dirt = torch.zeros(-(-flush_bytes // 8), dtype=torch.int64, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def race(
        self, entrants: Mapping[str, Entrant], rounds: int, model_bytes: int, warmups: int = 2
    ) -> dict[str, Any]:
        """Race `entrants` and the copy; those that fail once beforehand are left out and the reason
        is kept.

        Returns {"copy_bytes_per_second", "contenders": {name: {"seconds", "bytes_per_second",
        "share_of_copy", "peak_bytes"} or {"failed"}}, "errors": failures of entrants of our own}.
        Rates count `model_bytes`, the least that the task moves, whatever a contender really moves;
        the share is taken within rounds. `peak_bytes`: above what was held before the run; None on
        a CPU.
        """
        found: dict[str, dict[str, Any]] = {
            name: self.rehearse(entrant) for name, entrant in entrants.items()
        }
        able = {name: entrant for name, entrant in entrants.items() if "failed" not in found[name]}

        def clock(name: str, run: Contender) -> float:
            return self.seconds(run, able[name].prepare if name in able else nothing)

        seconds = race(
            {"copy": self.copy, **{name: e.run for name, e in able.items()}}, rounds, warmups, clock
        )
        moved = 2 * self.source.numel()
        for name in able:
            found[name] |= {
                "seconds": spread(seconds[name]),
                "bytes_per_second": model_bytes / spread(seconds[name])["median"],
                "share_of_copy": median_ratio(seconds["copy"], seconds[name]) * model_bytes / moved,
            }
        return {
            "copy_bytes_per_second": moved / spread(seconds["copy"])["median"],
            "contenders": found,
            "errors": [
                f"{name}: {found[name]['failed']}"
                for name, entrant in entrants.items()
                if entrant.own and name not in able
            ],
        }

    def release(self) -> None:
        """Give memory that torch keeps for later back to the device: the next shape needs blocks of
        other sizes.
        """
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def flush(self) -> None:
        """Writes and reads more than the caches hold."""
        self.dirt.zero_()
        self.dirt.sum()

    def copy(self) -> None:
        self.target.copy_(self.source)

    def rehearse(self, entrant: Entrant) -> dict[str, Any]:
        """One run: the memory it takes on top, or why it cannot run. Compiling and tuning happen
        here.
        """
        try:
            for _ in range(2):  # the first may compile, with memory of its own
                entrant.prepare()
                before = self._memory(reset=True)
                entrant.run()
                peak = self._memory()
        except Exception as e:  # a rival that cannot run here is a result too
            text = str(e).strip().splitlines()
            failed = f"{type(e).__name__}: {text[0] if text else ''}"[:200]
        else:
            return {"peak_bytes": None if before is None or peak is None else peak - before}
        # only here, where the exception no longer holds what was allocated
        self.release()
        return {"failed": failed}

    def _memory(self, reset: bool = False) -> int | None:
        """The most bytes that tensors held since the last reset."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        if reset:
            torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    def seconds(self, run: Contender, prepare: Contender = nothing) -> float:
        """One run, timed, cold."""
        prepare()
        self.flush()
        if self.device.type != "cuda":
            return wall_clock("", run)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(WAIT_CYCLES)  # type: ignore[no-untyped-call]
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1000
