"""Compare training runs: mean and spread over seeds of every metric, for each setting of the
options.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.errors import CacheCorrupt, DataError, UsageError, did_you_mean
from kdcache.models.runs import (
    BEST,
    LAST,
    RECORDED,
    TABLE,
    is_finished,
    is_number,
    is_run,
    read_options,
    read_summary,
)
from kdcache.user.code_errors import printable
from kdcache.user.paths import local_path

# they do not tell two settings apart
NOT_A_SETTING = ("seed", "out", "device", "workers", "report-to", "dry-run")
COUNTS = ("eval_n", "eval_tokens")  # how much an evaluation saw, not how good it was
ABSENT = "-"


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run: its options by flag name, and the numbers of its summary."""

    path: Path
    options: dict[str, Any]
    metrics: dict[str, float]


def report(
    runs: Sequence[Path | str],
    by: Sequence[str] | None = None,
    sort: str | None = None,
    plot: Path | str | None = None,
) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one run) and n of every metric of `runs` (RUN
    folders), per setting.

    `eval_accuracy` and the like are of last/, the weights that a run ended with,
    `best.eval_accuracy` of best/.

    Runs are one setting when all options but the seed are equal; with `by`, when these options are.
    `mixed` of a row then names the options in which its runs differ all the same. Rows are sorted
    by the mean of `sort`, best first (a metric with "loss" or "perplexity" in its name: smallest
    first), else by their options. Unfinished runs are listed and left out. `plot` draws the first
    metric shown over the first option. UsageError for an unknown option or metric or for no
    finished run, DataError for a folder that is no run.
    """
    found = [read_run(local_path(path, "run")) for path in runs]
    finished = [run for run in found if isinstance(run, Run)]
    unfinished = [str(run) for run in found if not isinstance(run, Run)]
    if not finished:
        raise UsageError(
            f"none of the {len(found)} runs is finished: {', '.join(unfinished)[:300]}"
        )
    differing = settings_that_differ(finished)
    keys = _checked_by(by, finished) if by else differing
    groups: dict[str, list[Run]] = {}
    for run in finished:
        groups.setdefault(
            json.dumps([run.options.get(key, ABSENT) for key in keys], default=str), []
        ).append(run)
    rows = [_row(keys, group, differing) for group in groups.values()]
    metrics = sorted({name for run in finished for name in run.metrics})
    if sort is not None:  # as the table names them
        sort = sort.replace(f"{BEST}/", f"{BEST}.").removeprefix(f"{LAST}/")
    if sort is not None and sort not in metrics:
        raise UsageError(f"--sort {sort}: no run has this metric{did_you_mean(sort, metrics)}")
    rows.sort(key=lambda row: _order(row, keys, sort))
    result = {
        "by": list(keys),
        "sort": sort,
        "metrics": metrics,
        "rows": rows,
        "unfinished": unfinished,
    }
    if plot is not None:
        draw(result, local_path(plot, "--plot"), shown_metrics(result)[0])
        result["plot"] = str(plot)
    return result


def read_run(path: Path) -> Run | Path:
    """A finished run, or its path if it has no summary.json yet. DataError for what is no run."""
    if not is_run(path):
        raise DataError(
            f"{path} is no run: it has no run.toml; expected the --out folder of train-student"
        )
    try:
        document = read_options(path)
        options = dict(document[TABLE])
        if content_id := document[RECORDED].get("cache-content-id"):
            # whose answers they are, wherever the cache lies
            options["cache"] = content_id[:12]
        if not is_finished(path):
            return path
        return Run(
            path,
            options,
            numbers({key: value for key, value in read_summary(path).items() if key != LAST}),
        )
    except (CacheCorrupt, RecursionError) as e:
        raise DataError(f"{path} is damaged: {e}") from e


def numbers(summary: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a summary by name, those of nested objects as `outer.inner`."""
    out: dict[str, float] = {}
    for name, value in summary.items():
        if isinstance(value, Mapping):
            out |= numbers(value, f"{prefix}{name}.")
        elif is_number(value) and math.isfinite(value):
            out[prefix + name] = float(value)
    return out


def settings_that_differ(runs: Sequence[Run]) -> list[str]:
    """The options in which some of the runs differ, the seed and the place of a run aside."""
    names = sorted({name for run in runs for name in run.options} - set(NOT_A_SETTING))
    return [
        name
        for name in names
        if any(run.options.get(name) != runs[0].options.get(name) for run in runs)
    ]


def _checked_by(by: Sequence[str], runs: Sequence[Run]) -> list[str]:
    known = {name for run in runs for name in run.options}
    for name in by:
        if name not in known:
            raise UsageError(f"--by {name}: no run has this option{did_you_mean(name, known)}")
    return list(by)


def _row(keys: Sequence[str], runs: Sequence[Run], differing: Sequence[str]) -> dict[str, Any]:
    mixed = [
        name
        for name in differing
        if name not in keys
        and any(run.options.get(name) != runs[0].options.get(name) for run in runs)
    ]
    metrics = {}
    for name in sorted({name for run in runs for name in run.metrics}):
        values = [run.metrics[name] for run in runs if name in run.metrics]
        metrics[name] = {
            "mean": statistics.fmean(values),
            "n": len(values),
            "sd": statistics.stdev(values) if len(values) > 1 else None,
        }
    return {
        "options": {key: runs[0].options.get(key) for key in keys},
        "n": len(runs),
        "mixed": mixed,
        "seeds": sorted(run.options.get("seed", 0) for run in runs),
        "runs": [str(run.path) for run in runs],
        "metrics": metrics,
    }


def _order(row: Mapping[str, Any], keys: Sequence[str], sort: str | None) -> Any:
    if sort is None:
        values = [row["options"][key] for key in keys]
        return [(0, v, "") if isinstance(v, int | float) else (1, 0, str(v)) for v in values]
    if sort not in row["metrics"]:
        return (1, 0.0)
    mean = row["metrics"][sort]["mean"]
    return (0, mean if smaller_is_better(sort) else -mean)


def smaller_is_better(metric: str) -> bool:
    return any(word in metric for word in ("loss", "perplexity", "error", "seconds", "ece"))


def draw(result: Mapping[str, Any], path: Path, metric: str) -> None:
    """A PNG (or what the suffix says) of the mean of `metric` with its standard deviation, over the
    first option.
    """
    try:
        import matplotlib
    except ImportError as e:
        raise UsageError(f"--plot needs matplotlib ({e}): pip install 'kdcache[plot]'") from e
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    rows = [row for row in result["rows"] if metric in row["metrics"]]
    first = result["by"][0] if result["by"] else None
    for label, members in _series(rows, result["by"][1:]).items():
        x = [row["options"][first] if first else "all runs" for row in members]
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in x):
            x = [str(value) for value in x]
        points = sorted(zip(x, members, strict=True), key=lambda point: point[0])
        axes.errorbar(
            [value for value, _ in points],
            [row["metrics"][metric]["mean"] for _, row in points],
            yerr=[row["metrics"][metric]["sd"] or 0 for _, row in points],
            marker="o",
            capsize=3,
            label=label,
        )
    axes.set_xlabel(first or "")
    axes.set_ylabel(f"{_head(metric)} (mean, sample sd)")
    if len(result["by"]) > 1:
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as e:  # an unknown suffix
        raise UsageError(f"--plot {path}: {e}") from e


def _series(
    rows: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by the values of the other options: one line of the plot each."""
    out: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        out.setdefault(", ".join(f"{key} {row['options'][key]}" for key in keys), []).append(row)
    return out


def render(result: Mapping[str, Any]) -> str:
    """The result of `report` for people: one line per setting."""
    shown = shown_metrics(result)
    heads = [*map(printable, result["by"]), "n", *map(_head, shown)]
    rows = [
        [_cell(row["options"][key]) for key in result["by"]]
        + [str(row["n"])]
        + [_spread(row["metrics"].get(name)) for name in shown]
        for row in result["rows"]
    ]
    widths = [max(len(line[i]) for line in (heads, *rows)) for i in range(len(heads))]
    out = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (heads, *rows)
    ]
    for number, row in enumerate(result["rows"], start=1):
        if row["mixed"]:
            out.append(f"line {number} mixes runs that differ in {', '.join(row['mixed'])}")
        elif len(set(row["seeds"])) < row["n"]:
            out.append(
                f"line {number} counts a seed more than once (seeds "
                f"{', '.join(map(str, row['seeds']))}): the spread is too small"
            )
    if any(name.startswith(f"{BEST}.") for name in shown):
        out.append(
            f"{LAST}/: the weights that a run ended with; {BEST}/: its best ones (by best-by), "
            "which `kdcache evaluate --student RUN` takes"
        )
    out += [f"not finished: {path}" for path in result["unfinished"]]
    return "\n".join(out + ([f"plot: {result['plot']}"] if "plot" in result else []))


def shown_metrics(result: Mapping[str, Any]) -> list[str]:
    """The metrics of the table: the sorted one first, then those of the evaluations, of last/ and
    best/ side by side (all metrics, where nothing was evaluated)."""
    chosen = [
        name
        for base in result["metrics"]
        if base.startswith("eval_") and base not in COUNTS
        for name in (base, f"{BEST}.{base}")
        if name in result["metrics"]
    ] or result["metrics"]
    first = [result["sort"]] if result["sort"] else []
    return first + [name for name in chosen if name not in first]


def _head(metric: str) -> str:
    """A metric by its checkpoint: best/eval_loss, last/eval_loss."""
    if metric.startswith(f"{BEST}.eval_"):
        return printable(metric.replace(".", "/", 1))
    return printable(f"{LAST}/{metric}" if metric.startswith("eval_") else metric)


def _cell(value: Any) -> str:
    return (
        ABSENT
        if value is None
        else printable(",".join(map(str, value)) if isinstance(value, list) else str(value))
    )


def _spread(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return ABSENT
    return f"{metric['mean']:.4f}" + (f" ± {metric['sd']:.4f}" if metric["sd"] is not None else "")
