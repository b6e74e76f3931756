"""`report`: means and spreads against the statistics module, groups, order, what is mixed and what
is not finished.
"""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from click.testing import CliRunner

from kdcache.cli import main
from kdcache.errors import DataError, UsageError
from kdcache.report import numbers, render, report

BASE = {"student": "s.py:net", "alpha": 0.5, "lr": 0.1, "match": ["a=b:mse"], "compile": False}


def make_run(
    folder: Path,
    name: str,
    metrics: dict[str, Any] | None,
    recorded: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """A RUN folder as train-student leaves it; without metrics an unfinished one."""
    path = folder / name
    path.mkdir(parents=True)
    table = {**BASE, "out": str(path), "seed": 0, **options}
    (path / "run.toml").write_text(
        tomli_w.dumps({"train-student": table, "recorded": recorded or {"torch": "2"}})
    )
    if metrics is not None:
        (path / "summary.json").write_text(json.dumps(metrics))
    return path


@pytest.fixture
def grid(tmp_path: Path) -> list[Path]:
    """Temperatures 1, 2, 10 with 3, 3 and 1 seeds."""
    rng = random.Random(0)
    return [
        make_run(
            tmp_path,
            f"t{t}-{seed}",
            {"eval_accuracy": rng.random(), "eval_loss": rng.random(), "best": "x"},
            temperature=float(t),
            seed=seed,
        )
        for t, seeds in ((10, 1), (2, 3), (1, 3))
        for seed in range(seeds)
    ]


def values(runs: list[Path], metric: str) -> list[float]:
    return [json.loads((run / "summary.json").read_text())[metric] for run in runs]


def test_mean_and_spread_are_those_of_the_statistics_module(grid: list[Path]) -> None:
    result = report(grid)
    assert result["by"] == ["temperature"]
    # numbers, not text
    assert [row["options"]["temperature"] for row in result["rows"]] == [1.0, 2.0, 10.0]
    for row, runs in zip(result["rows"], (grid[4:], grid[1:4], grid[:1]), strict=True):
        assert (
            row["n"] == len(runs) and row["seeds"] == list(range(len(runs))) and row["mixed"] == []
        )
        for metric in ("eval_accuracy", "eval_loss"):
            found = row["metrics"][metric]
            assert found["mean"] == statistics.fmean(values(runs, metric))
            assert found["sd"] == (
                statistics.stdev(values(runs, metric)) if len(runs) > 1 else None
            )
            assert found["n"] == len(runs)


@pytest.mark.parametrize(("metric", "descending"), [("eval_accuracy", True), ("eval_loss", False)])
def test_sort_puts_the_best_first(grid: list[Path], metric: str, descending: bool) -> None:
    means = [row["metrics"][metric]["mean"] for row in report(grid, sort=metric)["rows"]]
    assert means == sorted(means, reverse=descending) and len(set(means)) == 3


def test_runs_that_differ_only_in_seed_and_place_are_one_setting(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, str(i), {"a": i}, seed=i, workers=i) for i in range(3)]
    result = report(runs)
    assert result["by"] == [] and len(result["rows"]) == 1
    assert result["rows"][0]["metrics"]["a"] == {"mean": 1.0, "sd": 1.0, "n": 3}


def test_by_an_option_says_what_it_mixes(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path, f"{t}-{lr}", {"a": t + lr}, temperature=t, lr=lr)
        for t in (1.0, 2.0)
        for lr in (0.1, 0.3)
    ]
    result = report(runs, by=["temperature"])
    assert [row["n"] for row in result["rows"]] == [2, 2]
    assert [row["mixed"] for row in result["rows"]] == [["lr"], ["lr"]]
    assert "line 1 mixes runs that differ in lr" in render(result)
    assert report(runs)["by"] == ["lr", "temperature"]


def test_a_seed_that_counts_twice_is_said(tmp_path: Path) -> None:
    metrics = {"eval_loss": 1.0, "eval_n": 5, "eval_tokens": 9, "steps": 3}
    runs = [make_run(tmp_path, str(i), metrics, seed=i % 2) for i in range(3)]
    lines = render(report(runs)).splitlines()
    assert lines[0].split() == ["n", "last/eval_loss"]
    assert (
        lines[-1] == "line 1 counts a seed more than once (seeds 0, 0, 1): the spread is too small"
    )


def test_another_cache_is_another_setting_wherever_it_lies(tmp_path: Path) -> None:
    ids = ("a" * 64, "a" * 64, "b" * 64)
    runs = [
        make_run(tmp_path, str(i), {"a": i}, {"cache-content-id": content}, cache=[f"cache-{i}"])
        for i, content in enumerate(ids)
    ]
    result = report(runs)
    assert result["by"] == ["cache"]
    assert [(row["options"]["cache"], row["n"]) for row in result["rows"]] == [
        ("a" * 12, 2),
        ("b" * 12, 1),
    ]


def test_an_option_that_some_runs_lack(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "none", {"a": 1}), make_run(tmp_path, "some", {"a": 2}, k=8)]
    result = report(runs)
    assert result["by"] == ["k"] and {row["options"]["k"] for row in result["rows"]} == {None, 8}
    assert render(result).splitlines()[0].split() == ["k", "n", "a"]


def test_unfinished_runs_are_said_and_left_out(grid: list[Path], tmp_path: Path) -> None:
    open_run = make_run(tmp_path, "open", None, temperature=2.0, seed=9)
    result = report([*grid, open_run])
    assert result["unfinished"] == [str(open_run)]
    assert sum(row["n"] for row in result["rows"]) == len(grid)
    assert f"not finished: {open_run}" in render(result)
    with pytest.raises(UsageError, match="none of the 1 runs is finished"):
        report([open_run])


def test_numbers_of_a_summary() -> None:
    assert numbers(
        {"a": 1, "b": {"c": 2.5, "d": {"e": 3}}, "text": "x", "flag": True, "list": [1]}
    ) == {"a": 1.0, "b.c": 2.5, "b.d.e": 3.0}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"by": ["temprature"]},
            r"--by temprature: no run has this option \(did you mean 'temperature'",
        ),
        (
            {"sort": "accuracy_eval"},
            r"--sort accuracy_eval: no run has this metric \(did you mean 'eval_accuracy'",
        ),
        ({"plot": "out.nonsense"}, "--plot"),
    ],
)
def test_unknown_names(
    grid: list[Path], tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    if "plot" in options:
        options = {"plot": tmp_path / options["plot"]}
    with pytest.raises(UsageError, match=said):
        report(grid, **options)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run.toml", "[train-student\n"),
        ("run.toml", "[other]\n"),
        ("run.toml", "train-student = 3\n"),
        ("summary.json", "{"),
        ("summary.json", "[]"),
        (None, ""),
    ],
)
def test_what_is_no_run(tmp_path: Path, file: str | None, content: str) -> None:
    path = make_run(tmp_path, "run", {"a": 1}) if file else tmp_path
    if file:
        (path / file).write_text(content)
    with pytest.raises(DataError, match=r"is no run|is damaged"):
        report([path])


@pytest.mark.parametrize("by", [["temperature"], ["temperature", "lr"], ["student"]])
def test_the_plot_is_a_picture(grid: list[Path], tmp_path: Path, by: list[str]) -> None:
    out = tmp_path / "plots" / "out.png"
    result = report(grid, by=by, sort="eval_accuracy", plot=out)
    assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and out.stat().st_size > 5000
    assert render(result).endswith(f"plot: {out}")


def test_a_missing_matplotlib_is_named(
    grid: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'kdcache\[plot\]'"):
        report(grid, plot=tmp_path / "x.png")


def test_the_command(grid: list[Path], tmp_path: Path) -> None:
    args = ["report", *map(str, grid), "--by", "temperature", "--sort", "eval_accuracy"]
    found = json.loads(CliRunner().invoke(main, [*args, "--json"]).stdout)
    assert found == json.loads(json.dumps(report(grid, by=["temperature"], sort="eval_accuracy")))
    text = CliRunner().invoke(main, args).stdout.splitlines()
    assert (
        text[0].split() == ["temperature", "n", "last/eval_accuracy", "last/eval_loss"]
        and len(text) == 4
    )
    best = found["rows"][0]
    assert text[1].split()[:3] == [
        str(best["options"]["temperature"]),
        str(best["n"]),
        f"{best['metrics']['eval_accuracy']['mean']:.4f}",
    ]
    failed = CliRunner().invoke(main, ["report", str(tmp_path / "none")])
    assert (
        failed.exit_code == 1
        and failed.stderr.startswith("Error: ")
        and failed.stderr.count("\n") == 1
    )
