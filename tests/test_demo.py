"""The demo in small: every number of its table is one of the runs it left behind."""

import json
import os
import signal
import statistics
from pathlib import Path

import pytest

from kdcache import demo
from kdcache.cache.reader import open as open_cache
from kdcache.errors import UsageError
from kdcache.process.signals import Interrupted
from kdcache.student.run_folder import read_summary


@pytest.mark.slow
def test_the_demo_reports_what_its_runs_say(tmp_path):
    said: list[str] = []
    result = demo.demo(tmp_path / "out", seeds=2, shorten=30, say=said.append)
    assert json.loads((tmp_path / "out" / "demo.json").read_text()) == {
        k: v for k, v in result.items() if k != "plot"
    }
    cache = open_cache(tmp_path / "out" / "cache")
    assert result["records"] == cache.num_records == 1437 and cache.check_all() == []
    assert [(s["student"], s["mode"]) for s in result["students"]] == [
        (student.name, mode) for student in demo.STUDENTS for mode in ("hard", "distilled")
    ]
    for row in result["students"]:
        runs = [
            read_summary(tmp_path / "out" / "runs" / f"{row['student']}-{row['mode']}-{seed}")
            for seed in range(2)
        ]
        assert row["accuracies"] == [run["eval_accuracy"] for run in runs]
        assert row["mean"] == pytest.approx(statistics.mean(row["accuracies"]))
        assert all(run["finished"] and run["steps"] > 0 for run in runs)
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert set(result["epoch_seconds"]) == {"no teacher", "cached", "live teacher"}
    table = demo.render(result)
    assert all(f"{100 * row['mean']:.2f}%" in table for row in result["students"])
    (tmp_path / "out" / "demo.png").unlink()
    again = demo.demo(tmp_path / "out", seeds=2, shorten=30, say=said.append)
    assert "is finished already" in said[-1] and demo.render(again) == table
    assert (tmp_path / "out" / "demo.png").exists()


@pytest.mark.slow
def test_an_interrupted_demo_goes_on_with_the_runs_that_it_has(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "STUDENTS", demo.STUDENTS[:2])
    monkeypatch.setattr(demo, "ROUNDS", 1)
    kept: dict[Path, bytes] = {}
    for stage, finished in (("1/4", 0), ("    conv-4  hard", 4), ("4/4", 5)):
        with pytest.raises(
            Interrupted, match="is not finished; give the same command again to go on"
        ) as caught:
            demo.demo(
                tmp_path / "out",
                seeds=1,
                shorten=30,
                say=lambda line, stage=stage: (
                    os.kill(os.getpid(), signal.SIGINT) if stage in line else None
                ),
            )
        assert caught.value.exit_code == 130 and not (tmp_path / "out" / "demo.json").exists()
        kept |= {path: path.read_bytes() for path in (tmp_path / "out").rglob("summary.json")}
        assert len(kept) >= finished
    result = demo.demo(tmp_path / "out", seeds=1, shorten=30)
    assert len(result["students"]) == 4 and "the rest  " in demo.render(result)
    assert all(path.read_bytes() == summary for path, summary in kept.items())


def test_a_demo_without_what_it_needs_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"sklearn and matplotlib: pip install 'kdcache\[demo\]'"):
        demo.demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()
