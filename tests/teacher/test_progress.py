"""One line on standard error, at the right moments."""

from __future__ import annotations

import io

import pytest

from kdcache.teacher import progress as module
from kdcache.teacher.progress import Progress, StderrProgress, readable_bytes, readable_seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def at(records: int) -> Progress:
    return Progress(
        records, 100, records / 10, 2048, {"1": 0.75, "2": 0.5}, {"1": 0.3, "2": 0.7}, 0.9
    )


def test_a_line_says_everything() -> None:
    assert str(at(25)) == (
        "25/100 records (25 %) · 10/s · 8s to go · 2.0 KiB · covered 0.7500 at T=1, 0.5000 at T=2 "
        "· truncation KL 0.3, 0.7 · accuracy 0.9000"
    )
    assert str(Progress(0, 100, 0.0, 0)) == "0/100 records (0 %) · 0/s · 0 B"


def test_without_a_terminal_a_line_a_minute_and_one_at_the_end(clock: list[float]) -> None:
    out = io.StringIO()
    show = StderrProgress(out)
    for records in range(1, 101):
        clock[0] += 1.5
        show(at(records))
    lines = out.getvalue().splitlines()
    assert [line.split("/")[0] for line in lines] == ["40", "80", "100"]


def test_on_a_terminal_one_line_is_rewritten(clock: list[float]) -> None:
    out = Terminal()
    show = StderrProgress(out)
    for records in (1, 2, 3, 100):
        show(at(records))
        clock[0] += 0.15
    shown = out.getvalue().split("\r")[1:]
    assert [line.split("/")[0] for line in shown] == ["1", "3", "100"] and out.getvalue().endswith(
        "\n"
    )


def test_other_ranks_are_quiet() -> None:
    out = io.StringIO()
    StderrProgress(out, rank=1)(at(100))
    assert out.getvalue() == ""


def test_numbers_for_people() -> None:
    sizes = [readable_bytes(n) for n in (0, 1023, 1536, 3 * 2**30, 2**45)]
    assert sizes == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB", "32.0 TiB"]
    assert [readable_seconds(s) for s in (0.4, 59.6, 125, 3725)] == [
        "0s",
        "1m00s",
        "2m05s",
        "1h02m",
    ]
