"""Every wrong input we know of, through the command line: one clear error, exit code 1 or 2,
nothing lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli_world import refused, run
from click.testing import Result

USER = '''
import numpy as np
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes=4, nan_from=None, right=True):
        super().__init__()
        self.body, self.classes, self.nan_from, self.right = nn.Linear(3, 5), classes, nan_from, right
        self.head = nn.Linear(5, classes)

    def forward(self, x):
        logits = self.head(self.body(x)) * 0.01
        hint = x[:, 0].long() % self.classes
        logits = logits + 5 * nn.functional.one_hot(hint, self.classes)
        if self.nan_from is not None:
            logits = torch.where(x[:, 1:2] >= self.nan_from, torch.nan, logits)
        return logits


class Data:
    """Sample i has the label i % 4, which Net reads off its first number; its second number is i."""

    name, revision, class_names = "rows", "1", ["a", "b", "c", "d"]

    def __init__(self, n=40, shift=0, labelled=True):
        self.n, self.shift = n, shift

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.tensor([i % 4, i, 0.5]), (i + self.shift) % 4 if self.shift < 100 else self.shift


class OwnGenerator(Data):
    rng = np.random.default_rng()

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + float(self.rng.normal()), y


def broken():
    raise RuntimeError("the file of weights is gone")
'''
BIG = (
    "--kind",
    "topk",
    "--k",
    "2",
    "--temperature",
    "1",
    "--temperature",
    "2",
    "--records-per-shard",
    "8",
)


@pytest.fixture
def user(tmp_path: Path) -> Path:
    file = tmp_path / "user.py"
    file.write_text(USER)
    return file


def dump(
    user: Path, *args: Any, teacher: str = "Net", data: str = "Data", out: str = "cache"
) -> Result:
    return run(
        "dump-teacher",
        "--teacher",
        f"{user}:{teacher}",
        "--data",
        f"{user}:{data}",
        "--out",
        user.parent / out,
        *(() if "--device" in args else ("--device", "cpu")),
        *args,
    )


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--kind", "full", "--k", "2"], ["k", "full"]),
        (["--kind", "full", "--temperature", "2"], ["temperature", "full"]),
        (["--kind", "full", "--tier", "2"], ["full"]),
        (["--kind", "none", "--feature", "body", "--k", "2"], ["none"]),
        (["--kind", "none"], ["feature"]),
        (["--kind", "topk", "--k", "5"], ["5", "4"]),
        (["--kind", "topp"], ["topp", "not built yet"]),
        (["--kind", "sampled"], ["sampled", "not built yet"]),
        (["--kind", "tokp"], ["tokp", "topk"]),
        (["--kind", "topk", "--k", "2", "--temperature", "0"], ["temperature"]),
        (["--values", "float61"], ["float61", "float16"]),
        (["--feature", "boddy"], ["boddy", "body"]),
        (["--feature", "body:poool"], ["poool", "pool"]),
        (["--feature", "body:raw:float61"], ["float61"]),
        (["--like", "other"], ["No such option", "--like"]),
        (["--kind", "topk", "--k", "2", "--k", "3"], ["--k is given 2 times"]),
        (
            ["--shard-size", "1GB", "--records-per-shard", "3"],
            ["--shard-size", "--records-per-shard 3", "give one"],
        ),
        (["--teacher-arg", "clases=3"], ["clases", "classes"]),
        (["--teacher-arg", "classes"], ["--teacher-arg", "key=value"]),
        (["--teacher-weights", "none.safetensors"], ["none.safetensors"]),
        (["--device", "warp9"], ["warp9"]),
    ],
)
def test_options_a_dump_refuses(user: Path, args: list[str], said: list[str]) -> None:
    refused(dump(user, *args), 2, *said)
    assert not (user.parent / "cache").exists()


@pytest.mark.parametrize(
    ("option", "spec", "said"),
    [
        ("--teacher", "none.py:Net", ["none.py"]),
        ("--teacher", "{user}:Nett", ["Nett", "Net"]),
        ("--teacher", "{user}:broken", ["the file of weights is gone"]),
        ("--teacher", "nosuchpackage.models:Net", ["nosuchpackage"]),
        ("--teacher", "whatever", ["whatever"]),
        ("--data", "digitz", ["digitz", "digits"]),
        ("--data", "npz:none.npz", ["none.npz"]),
        ("--data", "jsonl:*.jsonl", ["jsonl", "not built yet"]),
        ("--data", "imagefolder:none", ["none"]),
    ],
)
def test_unreadable_specs(user: Path, option: str, spec: str, said: list[str]) -> None:
    specs = {"--teacher": f"{user}:Net", "--data": f"{user}:Data", option: spec.format(user=user)}
    result = run(
        "dump-teacher", *[x for pair in specs.items() for x in pair], "--out", user.parent / "cache"
    )
    assert result.exit_code in (1, 2)
    refused(result, result.exit_code, *said)
    assert not (user.parent / "cache").exists()


def test_a_dataset_of_length_0(user: Path) -> None:
    refused(dump(user, "--data-arg", "n=0"), 1, "length 0")
    assert not (user.parent / "cache").exists()


def test_labels_out_of_range(user: Path) -> None:
    refused(dump(user, "--data-arg", "shift=100", *BIG), 1, "100", "4 classes")


def test_a_random_transform_of_its_own(user: Path) -> None:
    refused(dump(user, data="OwnGenerator"), 1, "a random transform with its own generator?")
    assert not (user.parent / "cache").exists()


def test_nan_names_the_record_and_leaves_the_cache_resumable(user: Path) -> None:
    """Samples 20 and on give NaN: shards 0 and 1 (samples 0 to 15) stay, a well teacher ends the
    dump.
    """
    refused(
        dump(user, "--teacher-arg", "nan_from=20", "--batch-size", "4", *BIG), 1, "sample 20", "NaN"
    )
    cache = user.parent / "cache"
    kept = files(cache)
    assert {name for name in kept if name.startswith("commit/")} == {
        "commit/00000000.json",
        "commit/00000001.json",
    }
    refused(run("inspect", cache), 1, "2 of 5 shards are committed")
    done = dump(user, "--teacher-arg", "nan_from=1000", "--batch-size", "4", *BIG)
    assert done.exit_code == 0, done.stderr
    assert kept.items() <= files(cache).items()
    assert run("verify", cache).exit_code == 0


def test_labels_in_another_order_are_a_named_warning(user: Path) -> None:
    result = dump(user, "--data-arg", "shift=1")
    assert result.exit_code == 0
    assert "labels and teacher disagree" in result.stderr and "Error" not in result.stderr
    assert "disagree" not in dump(user, out="right").stderr


def test_another_cache_stands_at_out(user: Path) -> None:
    assert dump(user, *BIG).exit_code == 0
    cache = user.parent / "cache"
    before = files(cache)
    refused(dump(user, "--kind", "full"), 1, "kind", "'topk'", "'full'")
    refused(dump(user, *BIG, "--format", "hdf5"), 1, "container", "'arrow'", "'hdf5'")
    refused(dump(user, *BIG, "--data-arg", "shift=2", "--seed", "1"), 1, "seed")
    refused(dump(user, *BIG, "--data-arg", "n=41"), 1)
    assert files(cache) == before
    (user.parent / "mine").mkdir()
    (user.parent / "mine" / "thesis.txt").write_text("years of work")
    refused(dump(user, *BIG, out="mine"), 1, "thesis.txt")
    assert files(user.parent / "mine") == {"thesis.txt": b"years of work"}
    refused(dump(user, *BIG, out="user.py"), 2, "user.py")


def test_accept_names_a_field_that_is_not_there(user: Path) -> None:
    assert dump(user, *BIG).exit_code == 0
    refused(dump(user, *BIG, "--accept", "data.nmae"), 2, "data.nmae", "data.name")


def test_a_damaged_cache(user: Path) -> None:
    assert dump(user, *BIG).exit_code == 0
    cache = user.parent / "cache"
    victim = next((cache / "data").iterdir())
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.chmod(0o644)
    victim.write_bytes(bytes(data))
    result = run("verify", cache)
    assert (
        result.exit_code == 1
        and victim.name in result.stderr
        and result.stderr.startswith("Error: ")
    )
    refused(run("inspect", cache), 1, victim.name)
    refused(run("convert", cache, user.parent / "copy"), 1, victim.name)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-8])


def swap(path: Path) -> None:
    other = next(p for p in sorted(path.parent.iterdir()) if p != path)
    aside = path.with_name("aside")
    path.rename(aside), other.rename(path), aside.rename(other)


# there is one manifest only
HARMS = {"flipped": flip, "cut": cut, "missing": Path.unlink, "swapped": swap}


@pytest.mark.parametrize(
    ("folder", "harm"),
    [
        (folder, harm)
        for folder in ("data", "commit", "manifest")
        for harm in HARMS
        if (folder, harm) != ("manifest", "swapped")
    ],
)
def test_what_mends_a_cache_is_said_and_mends_it(user: Path, folder: str, harm: str) -> None:
    assert dump(user, *BIG).exit_code == 0
    cache = user.parent / "cache"
    before = files(cache)
    HARMS[harm](sorted((cache / folder).iterdir())[-1])
    harmed = files(cache)
    for command in ("verify", "inspect"):
        result = run(command, cache)
        assert result.exit_code == 1 and "dump-teacher command" in result.stderr, command
        assert result.stderr.count("dump-teacher command") == 1
    trained = run(
        "train-student",
        "--cache",
        cache,
        "--student",
        f"{user}:Net",
        "--data",
        f"{user}:Data",
        "--device",
        "cpu",
        "--temperature",
        "1",
        "--out",
        user.parent / "run",
        "--epochs",
        "1",
    )
    refused(trained, 1, "dump-teacher command")
    assert files(cache) == harmed  # nobody mends what was only read
    assert dump(user, *BIG).exit_code == 0
    after = {
        name: data for name, data in files(cache).items() if not name.startswith("quarantine/")
    }
    assert after == before and run("verify", cache).exit_code == 0


def test_an_argument_of_no_dataset_is_refused(user: Path) -> None:
    assert dump(user, *BIG).exit_code == 0
    refused(
        run("inspect", user.parent / "cache", "--record", "1", "--data-arg", "n=3"),
        2,
        "--data-arg n",
        "--data",
    )


def test_a_cache_is_not_converted_into_itself_or_over_another(user: Path) -> None:
    assert dump(user, *BIG).exit_code == 0
    cache = user.parent / "cache"
    before = files(cache)
    refused(run("convert", cache, cache), 2, "into itself")
    assert dump(user, "--kind", "full", out="other").exit_code == 0
    refused(run("convert", cache, user.parent / "other", "--format", "arrow"), 1, "kind")
    assert files(cache) == before


def test_dry_run_writes_nothing(user: Path) -> None:
    result = dump(user, "--dry-run", *BIG)
    assert result.exit_code == 0 and "predicted bytes" in result.stdout
    assert not (user.parent / "cache").exists()
