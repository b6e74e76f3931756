"""The command line as a test runs it, and what a refusal of it looks like."""

from __future__ import annotations

from typing import Any

from click.testing import CliRunner, Result

from kdcache.cli import main


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def refused(result: Result, code: int, *said: str) -> None:
    """One error, with this code, that says this; no traceback, nothing on standard output."""
    assert result.exit_code == code, (result.stderr, result.exception)
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and result.stdout == ""
    after = result.stderr[result.stderr.index("Error: ") :]
    for words in said:
        assert words in after
