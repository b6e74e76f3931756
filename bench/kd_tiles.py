"""Which tiles the loss kernel should walk a row with: every candidate of each length of row, in
turns with a copy.

`Tiles.of` in `kernels/kd_launch.py` chooses by arithmetic: vectors in flight hide latency, rows in
flight must stay in L2 for the second read, registers decide how many programs a multiprocessor
holds. This measures it, at N = 8192 rows of bfloat16 with K = 64, in place. "second_read_misses" is
what a share f of the copy's rate means where bytes alone limit:
(2 + misses) N V b bytes moved in the time of 2 / f of them, so 2 / f - 2. The tiles in use are
raced without cache hints too, and rows that do not fit into L2 by two programs to a row. A machine
with another L2 wants another table.

    python -m kdcache.bench.kd_tiles [--rounds N] [--results FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from kdcache.bench.kd_contenders import Fused, make_problem
from kdcache.bench.loss_speed import model_bytes
from kdcache.bench.race import command, finish, machine, save, table
from kdcache.bench.track import Entrant, Track, choose_device, each_case
from kdcache.errors import UsageError
from kdcache.kernels import kd_launch
from kdcache.kernels.kd_launch import Tiles


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The cases."""

    rows: int = 8192
    classes: tuple[int, ...] = (1000, 32_000, 50_257, 128_256, 151_936, 262_144)
    temperatures: tuple[float, ...] = (1.0, 2.0)
    kept: int = 64
    dtype: torch.dtype = torch.bfloat16
    rounds: int = 9
    copy_bytes: int = 2**31
    flush_bytes: int = 2**29


SMALL = (
    (2, 1, 128),
    (2, 1, 64),
    (2, 2, 128),
    (2, 2, 64),
    (2, 4, 128),
    (2, 4, 64),
    (1, 4, 128),
    (4, 1, 128),
)
MIDDLE = (
    (2, 8, 80),
    (2, 8, 64),
    (4, 8, 80),
    (4, 8, 128),
    (8, 8, 128),
    (2, 16, 64),
    (4, 4, 128),
    (2, 4, 80),
)
LONG = (
    (8, 16, 128),
    (4, 16, 128),
    (4, 8, 128),
    (2, 16, 128),
    (2, 16, 64),
    (2, 32, 64),
    (8, 8, 168),
)


def candidates(classes: int, itemsize: int) -> list[Way]:
    """How a row of so many classes might be walked; the choice of `Tiles.of` is among them."""
    row = classes * itemsize
    few = SMALL if row <= 16_384 else MIDDLE if row <= 140_000 else LONG
    orders = (False, True) if row > 200_000 else (False,)
    found = [Way(Tiles(*one, reverse=reverse)) for one, reverse in product(few, orders)]
    found += [Way(Tiles(*one), parts=2) for one in LONG[:2] if row > 400_000]
    usual = Way(Tiles.of(classes, itemsize))
    return [usual, Way(replace(usual.tiles, hints=False)), *(way for way in found if way != usual)]


@dataclass(frozen=True, slots=True)
class Way:
    """Tiles, and how many programs share a row, if any do."""

    tiles: Tiles
    parts: int | None = None

    def __str__(self) -> str:
        tiles = self.tiles
        said = [f"{tiles.height} x {tiles.warps} warps", f"{tiles.registers} registers"]
        said += ["backwards"] * tiles.reverse + ["no cache hints"] * (not tiles.hints)
        return ", ".join(said + ([f"{self.parts} parts"] if self.parts else []))

    def run(self, fused: Fused) -> object:
        with walked_with(self.tiles):
            return fused(inplace=True, parts=self.parts)


@contextmanager
def walked_with(tiles: Tiles) -> Iterator[None]:
    """Launches within take these tiles."""
    usual = kd_launch.Tiles
    try:
        kd_launch.Tiles = type("Fixed", (), {"of": staticmethod(lambda *_: tiles)})  # type: ignore[misc, assignment]
        yield
    finally:
        kd_launch.Tiles = usual  # type: ignore[misc]


def try_case(
    track: Track, sizes: Sizes, rounds: int, classes: int, temperature: float
) -> dict[str, Any]:
    """The race over one length of row, or why there was none."""
    try:
        return one_case(track, sizes, rounds, classes, temperature)
    except Exception as e:
        return {
            "num_classes": classes,
            "temperature": temperature,
            "contenders": {},
            "chosen": "",
            "best": "",
            "failed": f"{type(e).__name__}: {e}",
        }


def progress(case: Mapping[str, Any]) -> str:
    """One line of a case."""
    best = case["contenders"].get(case["best"], {})
    said = case.get("failed", f"{case['best']} at {best.get('share_of_copy', 0):.0%} of the copy")
    return f"V={case['num_classes']} T={case['temperature']:g}: {said}"


def one_case(
    track: Track, sizes: Sizes, rounds: int, classes: int, temperature: float
) -> dict[str, Any]:
    """The race over one length of row."""
    track.release()
    problem = make_problem(sizes.rows, classes, sizes.kept, temperature, sizes.dtype, track.device)
    fused, tried = Fused.of(problem), candidates(classes, sizes.dtype.itemsize)
    least = model_bytes(sizes.rows, classes, sizes.kept, sizes.dtype.itemsize)
    out = track.race(
        {str(way): Entrant(partial(way.run, fused), problem.restore) for way in tried},
        rounds,
        least,
    )
    for way, found in zip(tried, out["contenders"].values(), strict=True):
        found["tiles"], found["parts"] = astuple(way.tiles), way.parts
        if "failed" not in found:
            found["second_read_misses"] = 2 / found["share_of_copy"] - 2
    shares = {name: found.get("share_of_copy", 0) for name, found in out["contenders"].items()}
    return {
        "num_classes": classes,
        "temperature": temperature,
        "k": sizes.kept,
        "model_bytes": least,
        **out,
        "chosen": str(Way(Tiles.of(classes, sizes.dtype.itemsize))),
        "best": max(shares, key=shares.__getitem__),
    }


def kd_tiles(sizes: Sizes, rounds: int | None = None) -> dict[str, Any]:
    """Race over every case; one JSON object. UsageError without a CUDA device: nothing else runs
    these tiles.
    """
    place = choose_device(None)
    if place.type != "cuda":
        raise UsageError(
            "bench kd_tiles times the kernel's tiles and needs a CUDA device; torch sees none here"
        )
    track = Track(place, sizes.copy_bytes, sizes.flush_bytes)
    rounds = sizes.rounds if rounds is None else rounds
    order = sorted(
        product(sizes.classes, sizes.temperatures),
        key=lambda case: case[1] != sizes.temperatures[-1],
    )
    cases = each_case(order, partial(try_case, track, sizes, rounds), progress)
    return {
        "bench": "kd_tiles",
        "command": command(),
        "machine": machine(),
        "device": str(place),
        "rounds": rounds,
        "rows": sizes.rows,
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "left_out": len(order) - len(cases),
        "cases": cases,
    }


def render(result: Mapping[str, Any]) -> str:
    """The table: candidates of each case, the fastest first; * is what `Tiles.of` chooses."""
    rows: list[list[Any]] = []
    for case in result["cases"]:
        found = sorted(
            case["contenders"].items(), key=lambda item: -item[1].get("share_of_copy", 0)
        )
        for name, one in found:
            mark = " *" if name == case["chosen"] else ""
            where = f"V={case['num_classes']} T={case['temperature']:g}  {name}{mark}"
            rows.append(
                [where, "failed", "", one["failed"]]
                if "failed" in one
                else [
                    where,
                    1000 * one["seconds"]["median"],
                    100 * one["share_of_copy"],
                    one["second_read_misses"],
                ]
            )
    return table(
        [f"N={result['rows']} {result['dtype']}", "ms", "% of copy", "second read misses"], rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kdcache.bench.kd_tiles", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument(
        "--results", type=Path, default=None, help="keep the JSON line in this folder"
    )
    given = parser.parse_args()
    try:
        result = kd_tiles(Sizes(), given.rounds)
    except UsageError as e:
        parser.error(str(e))
    if given.results is not None:
        save(result, given.results)
    finish(result, render)


if __name__ == "__main__":
    main()
