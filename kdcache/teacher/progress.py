"""How far a dump has come and what it did: values for any caller, one line on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

from kdcache.process.streams import Forgiving

SECONDS_BETWEEN = 60.0  # without a terminal
REFRESHES_A_SECOND = 5.0


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of a dump, of this process alone.

    `records` of `total` are done after `seconds`; `bytes` were encoded. covered_mass and
    truncation_kl are means over the rows so far, by temperature, for the largest k; accuracy is the
    teacher's on the labels, None without any.
    """

    records: int
    total: int
    seconds: float
    bytes: int
    covered_mass: Mapping[str, float] = field(default_factory=dict)
    truncation_kl: Mapping[str, float] = field(default_factory=dict)
    accuracy: float | None = None

    @property
    def records_per_second(self) -> float:
        return self.records / self.seconds if self.seconds > 0 else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Seconds to go, None before the first record."""
        return (
            (self.total - self.records) / self.records_per_second
            if self.records_per_second
            else None
        )

    def __str__(self) -> str:
        percent = 100 * self.records / max(self.total, 1)
        parts = [
            f"{self.records}/{self.total} records ({percent:.0f} %)",
            f"{self.records_per_second:.0f}/s",
            f"{readable_bytes(self.bytes)}",
        ]
        if self.eta_seconds is not None and self.records < self.total:
            parts.insert(2, f"{readable_seconds(self.eta_seconds)} to go")
        if self.covered_mass:
            parts.append(
                "covered " + ", ".join(f"{m:.4f} at T={t}" for t, m in self.covered_mass.items())
            )
            parts.append(
                "truncation KL " + ", ".join(f"{kl:.2g}" for kl in self.truncation_kl.values())
            )
        if self.accuracy is not None:
            parts.append(f"accuracy {self.accuracy:.4f}")
        return " · ".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class DumpReport:
    """What a dump did; None or {} where there is nothing to say.

    complete: the cache is sealed, content_id is its id. already_complete: it was before this call,
    which did nothing. bytes (of the columns, before the container), means and accuracy are of the
    whole cache once it is complete, until then of what this call wrote; shards, records, rows and
    seconds are this call's. predicted_bytes: of the whole, from the columns. engine: what reduces
    rows. quantisation_kl: mean KL(teacher || decoded); defaults: sentences about what was not
    given; warnings: (code, text). cut_from: the teacher's logits, where num_classes of them are its
    classes.
    """

    out: str
    container: str
    teacher: str
    data: str
    device: str
    engine: str
    kind: str
    num_classes: int
    tiers: tuple[int, ...]
    temperatures: tuple[str, ...]
    values: str
    features: tuple[str, ...]
    num_records: int
    num_shards: int
    records_per_shard: int
    predicted_bytes: int
    defaults: tuple[str, ...]
    dry_run: bool = False
    complete: bool = False
    already_complete: bool = False
    content_id: str | None = None
    shards_written: int = 0
    shards_left: int = 0
    records_written: int = 0
    rows_written: int = 0
    bytes: int = 0
    seconds: float = 0.0
    covered_mass: Mapping[str, float] = field(default_factory=dict)
    truncation_kl: Mapping[str, float] = field(default_factory=dict)
    quantisation_kl: Mapping[str, float] = field(default_factory=dict)
    accuracy: float | None = None
    warnings: tuple[tuple[str, str], ...] = ()
    cut_from: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for json.dumps."""
        return {
            key: list(map(list, value))
            if key == "warnings"
            else list(value)
            if isinstance(value, tuple)
            else value
            for key, value in asdict(self).items()
        }


class StderrProgress:
    """A callback for `progress=`: a line that is rewritten on a terminal, a line a minute
    elsewhere.

    Where there is no standard error, or it goes away, nothing is said any more.
    """

    def __init__(self, stream: TextIO | None = None, *, rank: int = 0) -> None:
        stream = stream if stream is not None else sys.stderr
        self.stream = None if stream is None else Forgiving(stream)
        self.quiet = rank != 0
        self.terminal = stream is not None and not self.quiet and stream.isatty()
        self._due = time.monotonic() + (0 if self.terminal else SECONDS_BETWEEN)
        self._width = 0

    def __call__(self, now: Progress) -> None:
        """Print `now` if a line is due, and always when it is the end."""
        done = now.records >= now.total
        if self.stream is None or self.quiet or (time.monotonic() < self._due and not done):
            return
        self._due = time.monotonic() + (
            1 / REFRESHES_A_SECOND if self.terminal else SECONDS_BETWEEN
        )
        line = str(now)
        if self.terminal:
            self.stream.write("\r" + line.ljust(self._width) + ("\n" if done else ""))
            self._width = 0 if done else len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()


def readable_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def readable_seconds(seconds: float) -> str:
    """3725 -> "1h02m"."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{left:02d}s" if minutes else f"{left}s"
    )
