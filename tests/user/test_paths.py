"""Every place that takes a path: addresses with a scheme and other things that are no path are
refused, by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from faults import SPEC, dump
from strategies import IDENTITY
from teacher_world import Points, mlp

import kdcache
from kdcache.cache.convert import convert
from kdcache.cli import main
from kdcache.data.sources import load_data
from kdcache.data.text import load_tokenizer, matching_files
from kdcache.errors import NotBuilt, UsageError
from kdcache.inspect import inspect
from kdcache.models.model import load_model
from kdcache.models.weights import load_weights
from kdcache.report import report
from kdcache.student.evaluate import evaluate
from kdcache.teacher.verify import verify
from kdcache.user.paths import local_path

SCHEMES = ("s3", "gs", "hf", "http", "https", "file", "az", "hdfs", "abfss", "git+ssh")


def train(**options: Any) -> Any:
    return kdcache.train_student(
        **{"student": mlp(), "data": Points(), "alpha": 0.0, "max_steps": 1, **options}
    )


DOORS: dict[str, Callable[[Any], Any]] = {
    "dump out": lambda p: kdcache.dump_teacher(teacher=mlp(), data=Points(), out=p),
    "dump weights": lambda p: kdcache.dump_teacher(
        teacher="kdcache.demo:convnet", data=Points(), out="c", teacher_weights=p
    ),
    "open": kdcache.open,
    "create": lambda p: kdcache.create(p, SPEC, IDENTITY),
    "convert from": lambda p: convert(p, "d"),
    "convert to": lambda p: convert("c", p),
    "verify": verify,
    "inspect": lambda p: inspect(p),
    "inspect other": lambda p: inspect("c", other=p),
    "train out": lambda p: train(out=p),
    "train cache": lambda p: train(out="r", cache=p, alpha=0.5),
    "train weights": lambda p: train(out="r", student="kdcache.demo:convnet", student_weights=p),
    "loader": lambda p: kdcache.Loader(p, batch_size=2),
    "evaluate": lambda p: evaluate(p, Points()),
    "report": lambda p: report([p]),
    "weights": lambda p: load_weights(mlp(), p),
    "tokenizer": load_tokenizer,
}
SPECS: dict[str, Callable[[str], Any]] = {
    **{
        f"data {kind}": lambda p, kind=kind: load_data(f"{kind}:{p}")
        for kind in ("npz", "imagefolder")
    },
    **{
        f"model {kind}": lambda p, kind=kind: load_model(f"{kind}:{p}")
        for kind in ("hf", "hf-config")
    },
    "data text": matching_files,
    "text tokenizer": lambda p: load_data("text:*.txt", {"tokenizer": p}),
    "code": lambda p: load_model(f"{p}/net.py:Net"),
    "a data SPEC itself": load_data,
    "a model SPEC itself": load_model,
}
COMMANDS = [
    ["dump-teacher", "--teacher", "x:y", "--data", "digits", "--out"],
    ["inspect"],
    ["inspect", "c"],
    ["verify"],
    ["convert"],
    ["convert", "c"],
    ["report"],
    ["train-student", "--student", "x:y", "--out"],
    ["demo", "--out"],
    ["train-student", "--student", "x:y", "--out", "r", "--cache"],
    ["env", "--config"],
    ["report", "r", "--plot"],
    ["bench", "shard-io", "--quick", "--folder"],
    ["bench", "shard-io", "--results"],
    ["evaluate", "--data", "digits", "--student"],
]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with a cache "c" and a text."""
    dump(tmp_path / "c", "arrow")
    (tmp_path / "a.txt").write_text("hello")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_address_is_refused_at_every_door_and_becomes_no_folder(place: Path) -> None:
    before = sorted(os.listdir(place))
    for name, door in {**DOORS, **SPECS}.items():
        for scheme in SCHEMES if name in ("open", "dump out") else SCHEMES[:1]:
            address = f"{scheme}://bucket/place"
            for path in (
                (address, Path(address)) if name in DOORS and name != "tokenizer" else (address,)
            ):
                with pytest.raises(UsageError) as caught:
                    door(path)
                assert "\n" not in str(caught.value) and scheme in str(caught.value), name
                if not name.endswith("itself"):
                    assert "no folder of this machine" in str(caught.value), name
                    assert isinstance(caught.value, NotBuilt) or name == "code"
    assert sorted(os.listdir(place)) == before


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_command_line_refuses_them_too(place: Path, command: list[str]) -> None:
    for path, said in (
        ("s3://bucket/c", "s3:// is no folder of this machine"),
        ("", "is empty"),
        ("a\0b", "NUL"),
    ):
        result = CliRunner().invoke(main, [*command, path])
        if command[0] == "evaluate" and not said.startswith("s3"):
            continue
        assert (
            result.exit_code == 2 and said in result.output and "Traceback" not in result.output
        ), (path, result)
    assert sorted(os.listdir(place)) == ["a.txt", "c"]


def test_a_path_is_left_as_it_is_and_a_home_is_spelt_out(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(place))
    assert local_path("~/c", "x") == place / "c"
    for good in ("c", "a b", "C:/x", "x:y", "1:/x", "/tmp/s3://b", Path("ü")):
        assert str(local_path(good, "x")) == str(Path(good))
    for bad in (None, 5, b"c", ["c"], "~nobody-of-that-name/x", np.float64(1)):
        with pytest.raises(UsageError, match=r"^x "):
            local_path(bad, "x")  # type: ignore[arg-type]


def test_nothing_is_written_into_the_folder_of_a_cache(place: Path) -> None:
    before = sorted(str(path) for path in (place / "c").rglob("*"))
    (place / "link").symlink_to(place / "c/data")
    for inside in ("c/data/x", "c/x/y/z", "c/quarantine/x", "link/x", "link/../x"):
        for write in (
            lambda p: convert("c", p),
            lambda p: kdcache.create(p, SPEC, IDENTITY),
            lambda p: kdcache.dump_teacher(teacher=mlp(), data=Points(), out=p, device="cpu"),
            lambda p: train(out=p),
        ):
            with pytest.raises(UsageError, match="lies inside the cache"):
                write(place / inside)
    assert sorted(str(path) for path in (place / "c").rglob("*")) == before


@pytest.mark.parametrize("name", ["x" * 256, "x/" * 2048 + "x"])
def test_a_name_that_no_file_system_has_is_one_line(name: str) -> None:
    for ask in (
        lambda: local_path(name, "--out"),
        lambda: evaluate(name, "digits"),
        lambda: load_model(f"hf:{name}"),
    ):
        with pytest.raises(UsageError, match="a path has at most 4095, a name in it 255"):
            ask()
