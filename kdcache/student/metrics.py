"""A run's metrics: one JSON object a line, always; TensorBoard and Weights & Biases where asked for."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcache.cache.store import explain
from kdcache.errors import UsageError, near

FILE = "metrics.jsonl"
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
OnMetrics = Callable[[dict[str, Any]], None]
Report = Callable[[int, Mapping[str, float]], None]


def check_reporters(names: Sequence[str]) -> None:
    """UsageError for an unknown name, or with the pip line for a package that is not installed."""
    for name in names:
        if name not in PACKAGES:
            raise UsageError(f"--report-to {name!r} is unknown{near(name, PACKAGES)}")
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError as e:
            raise UsageError(f"--report-to {name}: {e}; pip install {PACKAGES[name]}") from e


class Metrics:
    """Where the lines of a run go. Lines of steps after `step` are dropped first: they will be written again."""

    def __init__(self, folder: Path, *, step: int, report_to: Sequence[str] = (),
                 options: Mapping[str, Any] | None = None, on_metrics: OnMetrics | None = None,
                 standing: Callable[[], str] = str) -> None:
        self.path, self._standing = folder / FILE, standing
        with explain(self.path, "writing metrics", standing):
            truncate(self.path, step)
            self._file = open(self.path, "a", encoding="utf-8")
        self._on_metrics = on_metrics
        self._reports = [REPORTERS[name](folder, step, options or {}) for name in report_to]

    def write(self, line: dict[str, Any]) -> None:
        """One line: `step` and numbers. What is not finite stands as null in the file."""
        plain = {key: None if isinstance(v, float) and not abs(v) < float("inf") else v for key, v in line.items()}
        with explain(self.path, "writing metrics", self._standing):
            self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        numbers = {key: v for key, v in line.items() if isinstance(v, int | float) and key != "step"}
        for report, _ in self._reports:
            report(int(line["step"]), numbers)
        if self._on_metrics is not None:
            self._on_metrics(line)

    def sync(self) -> None:
        """Flush the lines to disk: before a checkpoint that counts on them."""
        with explain(self.path, "writing metrics", self._standing):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):      # what a checkpoint counts on is on disk; the rest will be written again
            self._file.close()
        for _, close in self._reports:
            close()


def truncate(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and a last line that a crash cut short."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if _step(line) <= step]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _tensorboard(folder: Path, step: int, options: Mapping[str, Any]) -> tuple[Report, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter
    writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def report(at: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, at)

    return report, writer.close


def _wandb(folder: Path, step: int, options: Mapping[str, Any]) -> tuple[Report, Callable[[], None]]:
    wandb = importlib.import_module("wandb")
    run = wandb.init(project="kdcache", name=folder.name, dir=str(folder), config=dict(options))
    return lambda at, values: run.log(dict(values), step=at), run.finish


REPORTERS: dict[str, Callable[[Path, int, Mapping[str, Any]], tuple[Report, Callable[[], None]]]] = {
    "tensorboard": _tensorboard, "wandb": _wandb,
}
