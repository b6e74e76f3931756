"""Both stages through the command line on a small problem: results, configs of runs, wrong inputs
of train-student.
"""

from __future__ import annotations

import inspect
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_world import refused, run
from click.testing import Result

N, CLASSES = 48, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, models and a cache of kind topk with a feature; `shuffled.npz` has the same samples in
    another order.
    """
    place = tmp_path_factory.mktemp("train")
    rng = np.random.default_rng(0)
    y = np.arange(N) % CLASSES
    x = (rng.normal(0, 0.3, (N, 6)) + np.eye(CLASSES, 6)[y]).astype(np.float32)
    np.savez(place / "data.npz", x=x, y=y)
    order = rng.permutation(N)
    np.savez(place / "shuffled.npz", x=x[order], y=y[order])
    (place / "models.py").write_text(
        "from torch import nn\n\n\ndef net(width=8):\n    return nn.Sequential(nn.Linear(6, "
        f"width), nn.ReLU(), nn.Linear(width, {CLASSES}))\n"
    )
    done = run(
        "dump-teacher",
        "--teacher",
        f"{place}/models.py:net",
        "--teacher-arg",
        "width=16",
        *data(place),
        "--out",
        place / "cache",
        "--kind",
        "topk",
        "--k",
        "3",
        "--tier",
        "2",
        "--temperature",
        "1",
        "--temperature",
        "2",
        "--feature",
        "0:raw",
        "--device",
        "cpu",
    )
    assert done.exit_code == 0, done.stderr
    return place


def data(place: Path, option: str = "data", name: str = "data") -> list[Any]:
    return [f"--{option}", f"npz:{place}/{name}.npz"]


def train(place: Path, out: Path, *args: Any, cache: bool = True) -> Result:
    return run(
        "train-student",
        *(["--cache", place / "cache"] if cache else []),
        "--student",
        f"{place}/models.py:net",
        *data(place),
        "--out",
        out,
        "--batch-size",
        "16",
        *([] if "--device" in args else ["--device", "cpu"]),
        *args,
    )


def test_the_divergence_its_beta_and_the_tail_are_options_of_a_run(
    folder: Path, tmp_path: Path
) -> None:
    asked = ("--epochs", "1", "--divergence", "jsd", "--tail", "renormalise", "--beta")
    done = train(folder, tmp_path / "a", *asked, "0.25")
    assert (
        done.exit_code == 0 and "0.5 T^2 jsd (tail renormalise, beta 0.25) at T = 2" in done.stderr
    )
    options = tomllib.loads((tmp_path / "a" / "run.toml").read_text())["train-student"]
    assert (options["divergence"], options["beta"], options["tail"]) == ("jsd", 0.25, "renormalise")
    refused(train(folder, tmp_path / "a", *asked, "0.5"), 1, "beta: the run has 0.25, given is 0.5")
    assert "finished already" in train(folder, tmp_path / "a", *asked, "0.25").stderr
    for wrong, said in (
        (("--beta", "1"), "--beta"),
        (("--beta", "0.5"), "divergence 'forward_kl' has none"),
        (("--tail", "sampled"), "needs draws of the teacher"),
        (("--divergence", "tv", "--tail", "uniform"), "goes with divergence 'forward_kl' alone"),
    ):
        refused(train(folder, tmp_path / "b", "--epochs", "1", *wrong), 2, said)
        assert not (tmp_path / "b").exists()


def test_the_whole_way(folder: Path, tmp_path: Path) -> None:
    """Train, read the result, evaluate, train again from the run's own run.toml to the same
    numbers, report.
    """
    first = train(
        folder,
        tmp_path / "a",
        "--epochs",
        "2",
        "--lr",
        "0.05",
        *data(folder, "eval-data"),
        "--json",
    )
    assert first.exit_code == 0, first.stderr
    found = json.loads(first.stdout)
    assert (found["steps"], found["finished"], found["already_finished"]) == (6, True, False)
    assert "finished" in first.stderr
    asked = (
        "evaluate",
        "--student",
        tmp_path / "a" / "last",
        *data(folder),
        "--device",
        "cpu",
        "--json",
    )
    code = f"{folder}/models.py:net"
    refused(run(*asked), 2, f"add --student-code {code}")
    told = json.loads(run(*asked, "--student-code", code).stdout)
    assert told == {
        "checkpoint": str(tmp_path / "a" / "last"),
        "step": 6,
        **found["evaluation"],
        "loss": pytest.approx(found["evaluation"]["loss"]),
    }
    second = run(
        "train-student", "--config", tmp_path / "a" / "run.toml", "--out", tmp_path / "b", "--json"
    )
    assert second.exit_code == 0, second.stderr
    assert json.loads(second.stdout)["evaluation"] == found["evaluation"]
    third = run(
        "train-student",
        "--config",
        tmp_path / "a" / "run.toml",
        "--out",
        tmp_path / "c",
        "--seed",
        "1",
    )
    assert third.exit_code == 0 and "finished" in third.stdout
    table = json.loads(run("report", tmp_path / "a", tmp_path / "c", "--json").stdout)
    assert table["by"] == [] and table["rows"][0]["seeds"] == [0, 1]
    assert table["rows"][0]["metrics"]["eval_loss"]["n"] == 2


def test_plain_training_needs_no_cache(folder: Path, tmp_path: Path) -> None:
    assert (
        train(folder, tmp_path / "a", "--alpha", "0", "--max-steps", "2", cache=False).exit_code
        == 0
    )
    refused(train(folder, tmp_path / "b", "--max-steps", "2", cache=False), 2)


def test_every_flag_reaches_the_function(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = train(
        folder,
        out,
        "--max-steps",
        "2",
        "--k",
        "2",
        "--temperature",
        "1",
        "--ce-weight",
        "0.25",
        "--kd-weight",
        "2",
        "--tail",
        "renormalise",
        "--micro-batch-size",
        "8",
        "--optimizer",
        "sgd",
        "--lr",
        "0.1",
        "--weight-decay",
        "0.01",
        "--warmup",
        "1",
        "--clip",
        "1",
        "--seed",
        "3",
        "--no-shuffle",
        "--eval-every",
        "1",
        "--save-every",
        "1",
        "--best-by",
        "eval_accuracy",
        "--engine",
        "torch",
        "--match",
        "0=0_raw:mse:0.5",
        "--student-arg",
        "width=5",
        *data(folder, "eval-data"),
    )
    if result.exit_code:  # the feature's name follows from its module and recipe
        pytest.fail(result.stderr)
    import tomllib

    written = tomllib.loads((out / "run.toml").read_text())["train-student"]
    expected = {
        "k": 2,
        "temperature": 1.0,
        "ce-weight": 0.25,
        "kd-weight": 2.0,
        "tail": "renormalise",
        "micro-batch-size": 8,
        "optimizer": "sgd",
        "lr": 0.1,
        "weight-decay": 0.01,
        "warmup": 1.0,
        "clip": 1.0,
        "seed": 3,
        "shuffle": False,
        "eval-every": 1,
        "save-every": 1,
        "best-by": "eval_accuracy",
        "engine": "torch",
        "match": ["0=0_raw:mse:0.5"],
        "student-arg": {"width": 5},
        "max-steps": 2,
    }
    assert {key: written[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--temperature", "3"], 2, ["temperature 3", "stored: 1, 2"]),
        (["--k", "4"], 2, ["k is 4", "2, 3"]),
        (["--match", "0=hint:mse"], 2, ["hint", "0_raw"]),
        (["--match", "body=0_raw:mse"], 2, ["body"]),
        (["--match", "0"], 2, ["0"]),
        (["--match", "0=0_raw:msee"], 2, ["msee", "mse"]),
        (["--tail", "buckett"], 2, ["buckett", "bucket"]),
        (["--divergence", "backward"], 2, ["backward", "forward_kl"]),
        (["--engine", "tritn"], 2, ["tritn", "triton"]),
        (["--optimizer", "adamm"], 2, ["adamm", "adam"]),
        (["--precision", "float8"], 2, ["float8"]),
        (["--best-by", "eval_acuracy"], 2, ["eval_acuracy", "eval_accuracy"]),
        (["--epochs", "1"], 2, ["epochs", "max_steps"]),
        (["--ce-weight", "1"], 2, ["kd_weight"]),
        (["--report-to", "tensorbord"], 2, ["tensorbord", "tensorboard"]),
        (["--student-arg", "widht=3"], 2, ["widht", "width"]),
        (["--student-weights", "none.safetensors"], 2, ["none.safetensors"]),
        (["--accept", "data.nmae"], 2, ["data.nmae", "data.name"]),
        (["--device", "warp9"], 2, ["warp9"]),
    ],
)
def test_options_training_refuses(
    folder: Path, tmp_path: Path, args: list[str], code: int, said: list[str]
) -> None:
    refused(train(folder, tmp_path / "run", "--max-steps", "2", *args), code, *said)
    assert not (tmp_path / "run").exists()


def test_other_data_is_refused_with_the_fields(folder: Path, tmp_path: Path) -> None:
    result = run(
        "train-student",
        "--cache",
        folder / "cache",
        "--student",
        f"{folder}/models.py:net",
        *data(folder, name="shuffled"),
        "--out",
        tmp_path / "run",
        "--max-steps",
        "1",
    )
    refused(result, 1, "data.probe")
    accepted = run(
        "train-student",
        "--cache",
        folder / "cache",
        "--student",
        f"{folder}/models.py:net",
        *data(folder, name="shuffled"),
        "--out",
        tmp_path / "run",
        "--max-steps",
        "1",
        "--accept",
        "data",
    )
    # no override for the keys of the records themselves
    refused(accepted, 1, "sample_key")


def test_what_stands_at_out_is_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused(train(folder, tmp_path, "--max-steps", "1"), 1, "is no run")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert train(folder, tmp_path / "run", "--max-steps", "1").exit_code == 0
    refused(train(folder, tmp_path / "run", "--max-steps", "2"), 1, "max-steps")
    again = train(folder, tmp_path / "run", "--max-steps", "1", "--json")
    assert again.exit_code == 0 and json.loads(again.stdout)["already_finished"]


@pytest.mark.parametrize("cache", ["none", "models.py"])
def test_no_cache_there(folder: Path, tmp_path: Path, cache: str) -> None:
    result = run(
        "train-student",
        "--cache",
        folder / cache,
        "--student",
        f"{folder}/models.py:net",
        *data(folder),
        "--out",
        tmp_path / "run",
        "--max-steps",
        "1",
    )
    refused(result, 1, cache)


def test_dry_run_trains_nothing(folder: Path, tmp_path: Path) -> None:
    result = train(folder, tmp_path / "run", "--max-steps", "1", "--dry-run", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["dry_run"]
    assert not (tmp_path / "run" / "last").exists()


def functions() -> dict[str, tuple[Callable[..., Any], dict[str, str]]]:
    """Each command's function, and the options that have another name there."""
    from kdcache.bench.end_to_end import end_to_end
    from kdcache.bench.shard_io import shard_io
    from kdcache.demo import demo
    from kdcache.inspect import inspect as inspect_cache
    from kdcache.report import report
    from kdcache.student.evaluate import evaluate
    from kdcache.student.train import train_student
    from kdcache.teacher.dump import dump_teacher
    from kdcache.teacher.verify import verify

    plural = {
        "tier": "tiers",
        "temperature": "temperatures",
        "feature": "features",
        "format": "container",
    }
    return {
        "dump-teacher": (dump_teacher, plural),
        "train-student": (train_student, {}),
        "evaluate": (evaluate, {}),
        "verify": (verify, {}),
        "inspect": (inspect_cache, {}),
        "report": (report, {}),
        "demo": (demo, {}),
        "bench shard-io": (shard_io, {}),
        "bench end-to-end": (end_to_end, {}),
    }


@pytest.mark.parametrize("name", functions())
def test_every_command_is_a_function_with_the_same_words(name: str) -> None:
    from test_cli import commands

    function, renamed = functions()[name]
    words = {
        f"{p.name}s" if str(p.name).endswith("_arg") else renamed.get(str(p.name), str(p.name))
        for p in commands()[name].params
    } - {"as_json", "config", "results"}
    assert words <= set(inspect.signature(function).parameters)
