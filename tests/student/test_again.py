"""The same call again: each kind of run, what it says, and the weights it leaves in the caller's
module.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_world import run as cli
from student_world import Net, Points, TinyLM, Windows, equal_weights, write_cache
from torch import nn

from kdcache.errors import CacheCorrupt, UsageError
from kdcache.student.train import train_student


def options(tmp_path: Path, kind: str) -> dict[str, Any]:
    """A run of three steps: from a cache, from its tokens alone, with hard labels, with a teacher
    in the loop.
    """
    if kind == "tokens":
        return {
            "cache": write_cache(
                tmp_path / "cache",
                Windows(24),
                TinyLM(16, seed=3),
                tokens=True,
                kind="topk",
                tiers=(4,),
            ),
            "max_steps": 3,
            "batch_size": 8,
        }
    found: dict[str, Any] = {"data": Points(24), "max_steps": 3, "batch_size": 8, "lr": 0.1}
    if kind == "cache":
        return {
            **found,
            "cache": write_cache(tmp_path / "cache", Points(24), Net(32, seed=7)),
            "eval_data": Points(9, seed=5),
        }
    return (
        {**found, "alpha": 0.0} if kind == "labels" else {**found, "live_teacher": Net(32, seed=7)}
    )


@pytest.mark.parametrize("kind", ["cache", "tokens", "labels", "live teacher"])
def test_a_finished_run_gives_its_report_and_its_weights_again(tmp_path: Path, kind: str) -> None:
    make = TinyLM if kind == "tokens" else Net
    first, again, said = make(8), make(8), list[str]()
    given = options(tmp_path, kind)
    report = train_student(student=first, out=tmp_path / "run", **given)
    repeated = train_student(student=again, out=tmp_path / "run", say=said.append, **given)
    assert repeated.already_finished and "is finished already" in said[0]
    assert {**repeated.to_json(), "already_finished": False} == report.to_json()
    assert equal_weights(first, again) and not equal_weights(again, make(8))


def test_a_finished_run_of_the_command_line_without_a_cache_says_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "data.npz", x=rng.normal(size=(16, 6)).astype(np.float32), y=np.arange(16) % 3
    )
    (tmp_path / "models.py").write_text(
        "from torch import nn\n\n\ndef net():\n    return nn.Linear(6, 3)\n"
    )
    for already in (False, True):
        done = cli(
            "train-student",
            "--student",
            f"{tmp_path}/models.py:net",
            "--data",
            f"npz:{tmp_path}/data.npz",
            "--alpha",
            "0",
            "--max-steps",
            "2",
            "--out",
            tmp_path / "run",
            "--json",
        )
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["already_finished"] is already


def test_a_finished_run_refuses_a_module_of_another_shape(tmp_path: Path) -> None:
    given = options(tmp_path, "labels")
    train_student(student=Net(8), out=tmp_path / "run", **given)
    with pytest.raises(
        UsageError,
        match=r"does not fit Net: .* of another shape: body.0.bias \(8,\), expected \(9,\)",
    ):
        train_student(student=Net(9), out=tmp_path / "run", **given)
    untouched = Net(9)
    assert train_student(
        student=untouched, out=tmp_path / "run", dry_run=True, **given
    ).already_finished
    assert equal_weights(untouched, Net(9))


class Renamed(nn.Module):
    """Saves its weights under names that are not its own, as some models of libraries do."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.net = Net(hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def save_pretrained(self, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file(
            {f"other.{name}": value for name, value in self.state_dict().items()},
            str(Path(folder) / "model.safetensors"),
        )


def test_weights_kept_under_other_names_are_loaded_and_checked_too(tmp_path: Path) -> None:
    given = options(tmp_path, "labels")
    train_student(student=(first := Renamed(8)), out=tmp_path / "run", **given)
    train_student(student=(again := Renamed(8)), out=tmp_path / "run", **given)
    assert equal_weights(first, again)
    with pytest.raises(
        UsageError, match=r"does not fit Renamed: it has no net.body.0.weight of shape \[9, 5\]"
    ):
        train_student(student=Renamed(9), out=tmp_path / "run", **given)


def test_a_finished_run_without_its_weights_or_with_another_summary_is_named(
    tmp_path: Path,
) -> None:
    given = options(tmp_path, "labels")
    train_student(student=Net(8), out=tmp_path / "run", **given)
    (tmp_path / "run" / "last").rename(tmp_path / "moved")
    with pytest.raises(CacheCorrupt, match="is finished, but its last/ is gone"):
        train_student(student=Net(8), out=tmp_path / "run", **given)
    (tmp_path / "run" / "summary.json").write_text("{}")
    with pytest.raises(CacheCorrupt, match=r"summary.json: not the summary of a run .*'student'"):
        train_student(student=Net(8), out=tmp_path / "run", **given)
