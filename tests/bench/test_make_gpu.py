"""`make gpu`: every step runs whatever became of the others, and the exit code and the last lines
say what failed.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from kdcache.bench import gpu
from kdcache.bench.races import RACES

ROOT = Path(__file__).resolve().parents[2]


class Steps:
    """Runs nothing: notes the commands, and fails those in which one of `failing` stands."""

    def __init__(self, *failing: str) -> None:
        self.failing = failing
        self.commands: list[str] = []

    def __call__(self, command: Sequence[str]) -> int:
        self.commands.append(" ".join(command[1:]))
        return 3 if any(word in command for word in self.failing) else 0


@pytest.fixture(autouse=True)
def all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "needed", lambda: ["torch", "pytest"])


def test_tests_and_then_every_benchmark_with_cuda_into_one_folder(tmp_path: Path) -> None:
    steps = Steps()
    assert gpu.everything(tmp_path, run=steps) == []
    install, device, tests, *races = steps.commands
    assert "cuda.is_available" in device
    assert install == "-m pip install --quiet --no-deps --no-build-isolation --editable ."
    assert tests.startswith("-m pytest -m gpu ") and " -n " in tests
    assert len(races) == len(RACES)
    for command, race in zip(races, RACES, strict=True):
        assert command.startswith(f"-m kdcache bench {race.name} --results {tmp_path}")
        assert ("--device cuda" in command) == ("device" in race.options)
        assert ("--plot" in command) == ("plot" in race.options)
    assert {"loss", "shard-io", "end-to-end"} <= {race.name for race in RACES}


def test_a_step_that_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    steps = Steps("--editable", "-c", "pytest", "loss")
    assert gpu.everything(tmp_path, run=steps) == [
        "install: pip could not install the checkout; the steps use it where it is",
        "device: torch sees no CUDA device, so the tests marked gpu skip themselves",
        "tests: pytest -m gpu ended with exit code 3",
        "bench loss: exit code 3",
    ]
    assert len(steps.commands) == 3 + len(RACES)


def test_wheels_are_installed_without_their_dependencies(tmp_path: Path) -> None:
    steps = Steps()
    assert gpu.install(tmp_path, steps) == [f"wheels: none in {tmp_path}"]
    (tmp_path / "tomli_w-1.2.0-py3-none-any.whl").touch()
    assert gpu.install(tmp_path, steps) == []
    assert (
        steps.commands[1]
        == f"-m pip install --quiet --no-deps --no-index {tmp_path}/tomli_w-1.2.0-py3-none-any.whl"
    )
    assert gpu.install(tmp_path, Steps("--no-index")) == [
        f"wheels: pip could not install those in {tmp_path}"
    ]


def test_missing_modules_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "only_a_file.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert gpu.missing(["torch", "only-a-file", "no-such-module", "pytest-xdist"]) == [
        "no-such-module"
    ]
    monkeypatch.setattr(gpu, "needed", lambda: ["torch", "no-such-module"])
    (said,) = gpu.everything(tmp_path, run=Steps())
    assert said.startswith("modules: no-such-module not installed") and "WHEELS=" in said


def test_what_is_needed_is_read_from_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    names = gpu.needed()
    assert {"torch", "triton", "xxhash", "tomli-w", "click", "h5py", "pytest"} <= set(names)
    assert gpu.missing(names) == []


def test_some_steps_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "missing", lambda names: names if "pytest-xdist" in names else [])
    steps = Steps()
    assert gpu.everything(tmp_path, steps=["tests", "loss", "tiles"], run=steps) == []
    _, _, tests, loss, tiles = steps.commands
    assert "-m gpu" in tests and " -n " not in tests and " bench loss " in loss
    assert tiles == f"-m kdcache.bench.kd_tiles --results {tmp_path}"
    assert gpu.everything(tmp_path, steps=["tiles"], run=Steps("kdcache.bench.kd_tiles")) == [
        "tiles: exit code 3"
    ]
    with pytest.raises(SystemExit) as ended:
        monkeypatch.setattr("sys.argv", ["gpu", "--steps", "tests,los"])
        gpu.main()
    assert ended.value.code == 2


@pytest.mark.parametrize(("failed", "code"), [([], 0), (["bench loss: exit code 1"], 1)])
def test_the_exit_code_says_whether_anything_failed(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    failed: list[str],
    code: int,
) -> None:
    asked: list[tuple[Path, Path | None, tuple[str, ...]]] = []
    monkeypatch.setattr(
        gpu, "everything", lambda *given: asked.append((*given[:2], tuple(given[2]))) or failed
    )
    monkeypatch.setattr("sys.argv", ["gpu", "--out", str(tmp_path), "--wheels", "", "--steps", ""])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == code and asked == [(tmp_path, None, gpu.STEPS)]
    assert capsys.readouterr().out.splitlines()[1:] == [f"FAILED {line}" for line in failed]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_the_target_hands_on_its_folders() -> None:
    done = subprocess.run(
        [
            "make",
            "--no-print-directory",
            "-n",
            "gpu",
            "PYTHON=py",
            "OUT=a b",
            "WHEELS=w",
            "STEPS=tests",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == 'py -m kdcache.bench.gpu --out "a b" --wheels "w" --steps "tests"\n'


def test_a_command_runs_at_the_top_of_the_checkout(capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu.run_command(["sh", "-c", "pwd; exit 4"]) == 4
    assert capfd.readouterr().out == f"$ sh -c 'pwd; exit 4'\n{ROOT}\n"
