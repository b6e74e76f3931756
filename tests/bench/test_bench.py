"""The benchmarks run, in turns, and end in one JSON line; what they say of sizes is what can be
counted by hand.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kdcache.bench import race
from kdcache.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_contenders_run_in_turns_and_the_first_turn_changes() -> None:
    calls: list[str] = []
    seconds = race.race({name: partial(calls.append, name) for name in "abc"}, rounds=4, warmups=1)
    assert "".join(calls) == "cab" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(s) for name, s in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_ratios_are_taken_within_rounds() -> None:
    """A clock that drifts tenfold from round to round changes no ratio."""
    assert race.median_ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == 2.0
    assert race.median_ratio([3.0, 1.0, 8.0], [1.0, 1.0, 2.0]) == 3.0
    assert race.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_the_table_is_aligned() -> None:
    assert race.table(["", "x"], [["long name", 1.23456], ["b", 10]]) == (
        "               x\nlong name  1.235\nb             10"
    )


def test_the_command_shows_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["/home/somebody/bin/kdcache", "bench", "shard-io", "--folder", "a b"]
    )
    assert race.command() == "kdcache bench shard-io --folder 'a b'"


def bench(*args: str) -> tuple[list[str], dict[str, Any]]:
    """Lines of the table, and the object of the last line."""
    result = CliRunner().invoke(main, ["bench", *args])
    assert result.exit_code == 0, (result.stderr, result.exception)
    *lines, last = result.stdout.splitlines()
    return lines, json.loads(last)


def check_machine(found: dict[str, Any]) -> None:
    import numpy
    import torch

    assert found["machine"]["packages"]["torch"] == torch.__version__
    assert found["machine"]["packages"]["numpy"] == numpy.__version__
    assert "command" in found and found["rounds"] == 1


def test_shard_io(tmp_path: Path) -> None:
    lines, found = bench("shard-io", "--quick", "--rounds", "1", "--folder", str(tmp_path / "disk"))
    check_machine(found)
    assert len(lines) == 10
    # key 8, ids 8 x 2, values 8 x 2, max 4, tails 2 x 4, label 4, its logit 4
    assert found["record_bytes"] == 60
    for kind, records in (("write", 512), ("random", 32 * 4), ("window", 32 * 4)):
        assert set(found[kind]) == {"arrow", "hdf5", "bare"}
        for one in found[kind].values():
            assert one["rows_per_second"] == pytest.approx(records / one["seconds"]["median"])
            assert one["bytes_per_second"] == pytest.approx(60 * one["rows_per_second"])
        assert found[kind]["bare"]["times_bare"] == 1.0
    assert list((tmp_path / "disk").iterdir()) == []  # what it wrote is gone again


def test_what_shard_io_races_reads_the_same_numbers(tmp_path: Path) -> None:
    import numpy as np

    import kdcache
    from kdcache.bench import shard_io
    from kdcache.cache.spec import CacheSpec

    spec = CacheSpec(
        kind="topk",
        num_classes=100,
        samples=(0, 16),
        tiers=(4,),
        records_per_shard=8,
        temperatures=("1", "2"),
        labels=1,
    )
    columns = shard_io.shard_columns(spec)
    shard_io.write_cache(spec, columns, tmp_path / "c", "arrow")
    records = np.array([3, 15, 8])
    batch = kdcache.open(tmp_path / "c").read(records)
    for name, array in columns.items():
        np.testing.assert_array_equal(batch.columns[name], array[records % 8])
    shard_io.bare_write(spec, columns, tmp_path / "bare")
    assert sum(f.stat().st_size for f in (tmp_path / "bare").iterdir()) == 16 * sum(
        c.row_bytes for c in spec.columns()
    )


def test_end_to_end() -> None:
    lines, found = bench("end-to-end", "--quick", "--rounds", "1", "--device", "cpu")
    check_machine(found)
    assert len(lines) == 5 and set(found["contenders"]) == {"no teacher", "cached", "live teacher"}
    # key, ten float16 values, max, label
    assert found["record_bytes"] == 8 + 10 * 2 + 4 + 4
    # Kernels of 9; stages of 8 x 8, 4 x 4 and 2 x 2 pixels and widths w, 2 w, 4 w; a linear layer
    # to 10 classes.
    w = 4
    assert (
        found["multiplications"]["student"]
        == 9 * (3 * w * 64 + w * 2 * w * 16 + 2 * w * 4 * w * 4) + 4 * w * 10
    )
    w = 8
    deep = w * w * 64 + 2 * w * 2 * w * 16 + 4 * w * 4 * w * 4
    assert found["multiplications"]["teacher"] == (
        9 * (3 * w * 64 + w * 2 * w * 16 + 2 * w * 4 * w * 4 + deep) + 4 * w * 10
    )
    assert found["contenders"]["no teacher"]["times_no_teacher"] == 1.0


@pytest.mark.parametrize(("module", "name"), [("shard_io", "shard_io"), ("loss_speed", "kd_loss")])
def test_a_benchmark_runs_as_a_module_too(module: str, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"kdcache.bench.{module}", "--quick"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["bench"] == name


def test_json_alone_and_kept(tmp_path: Path) -> None:
    args = [
        "bench",
        "shard-io",
        "--quick",
        "--rounds",
        "1",
        "--json",
        "--results",
        str(tmp_path / "results"),
    ]
    result = CliRunner().invoke(main, args)
    assert json.loads(result.stdout)["bench"] == "shard_io" and result.stdout.count("\n") == 1
    (kept,) = (tmp_path / "results").iterdir()
    assert kept.name.startswith("shard_io_cpu_20") and kept.read_text() == result.stdout
    assert f"kept in {kept}" in result.stderr


@pytest.mark.parametrize(("device", "name"), [("cpu", "cpu"), ("cuda:0", "nvidia-h200")])
def test_kept_lines_are_named_by_device(tmp_path: Path, device: str, name: str) -> None:
    path = race.save(
        {"bench": "b", "device": device, "machine": {"gpus": ["NVIDIA H200"]}}, tmp_path
    )
    assert path.name.startswith(f"b_{name}_20")


@pytest.mark.parametrize("name", ["shard_io", "end_to_end", "loss_speed"])
def test_a_benchmark_says_its_floor_first(name: str) -> None:
    second = (ROOT / "bench" / f"{name}.py").read_text().split("\n\n")[1]
    assert "floor" in second and "bytes" in second
