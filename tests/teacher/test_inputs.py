"""Teachers, data and surroundings a dump may meet: SPECs, ranks, slow disks, models that change
their mind.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teacher_world import Points, Sentences, Speaker, files, mlp
from torch import nn

import kdcache
from kdcache.cache.writer import Writer
from kdcache.data.samples import Samples
from kdcache.errors import DataError, KDCacheError, UsageError
from kdcache.inspect import inspect, render
from kdcache.models.model import load_model
from kdcache.teacher.dump import dump_teacher
from kdcache.teacher.verify import verify

NET = """
from torch import nn

def net(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 12))
"""


def test_specs_models_and_samples_give_the_cache_that_objects_give(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    np.savez(tmp_path / "points.npz", x=Points().x.numpy(), y=Points().y.numpy())
    teacher, data = f"{tmp_path}/net.py:net", f"npz:{tmp_path}/points.npz"
    first = dump_teacher(
        teacher=teacher,
        data=data,
        out=tmp_path / "c",
        device="cpu",
        seed=3,
        teacher_args={"width": 5},
    )
    assert "random weights, seed 3" in first.teacher
    model = load_model(teacher, args={"width": 5}, seed=3)
    from kdcache.data.sources import load_data

    dump_teacher(
        teacher=model,
        data=Samples(load_data(data, {}), seed=3),
        out=tmp_path / "m",
        device="cpu",
        seed=3,
    )
    dump_teacher(
        teacher=model.module, data=load_data(data, {}), out=tmp_path / "o", device="cpu", seed=3
    )
    assert files(tmp_path / "c") == files(tmp_path / "m") == files(tmp_path / "o")
    with kdcache.open(tmp_path / "c") as cache:
        assert cache.spec.seed == 3 and cache.identity.teacher["num_classes"] == 12


def test_many_classes_keep_the_64_largest(tmp_path: Path) -> None:
    report = dump_teacher(
        teacher=mlp(1025), data=Points(5, classes=1025), out=tmp_path / "c", device="cpu"
    )
    assert (
        report.kind == "topk" and report.tiers == (64,) and report.temperatures == ("1", "2", "4")
    )
    assert report.defaults == (
        "kind topk: 1025 classes are more than 1024",
        "k 64",
        "temperatures 1, 2, 4",
    )
    report = dump_teacher(
        teacher=mlp(1024), data=Points(5, classes=1024), out=tmp_path / "f", device="cpu"
    )
    assert report.kind == "full"


@pytest.mark.parametrize(
    ("rank", "world", "said"),
    [
        ("two", "2", "RANK='two'"),
        ("2", "2", "RANK=2, WORLD_SIZE=2"),
        ("0", "0", "RANK=0, WORLD_SIZE=0"),
    ],
)
def test_ranks_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, world: str, said: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UsageError, match=said):
        dump_teacher(teacher=mlp(), data=Points(), out=tmp_path / "c", device="cpu")


def test_a_slow_disk_holds_the_teacher_back_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump_teacher(
        teacher=mlp(),
        data=Points(),
        out=tmp_path / "quick",
        device="cpu",
        batch_size=2,
        records_per_shard=25,
    )
    write, asked = Writer.write, []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            asked.append(len(x))
            return self.net(x)

    def slow(self: Writer, *args: Any) -> None:
        time.sleep(0.5)
        # the probe, the batch asked twice and once alone, the shard, the queue, one in each hand
        assert sum(asked) < 8 + 5 + 25 + 2 * 7
        monkeypatch.setattr(Writer, "write", write)
        write(self, *args)

    monkeypatch.setattr(Writer, "write", slow)
    dump_teacher(
        teacher=Counting(),
        data=Points(),
        out=tmp_path / "c",
        device="cpu",
        batch_size=2,
        records_per_shard=25,
    )
    with kdcache.open(tmp_path / "c") as one, kdcache.open(tmp_path / "quick") as other:
        for name, column in one.read(np.arange(50)).columns.items():
            np.testing.assert_array_equal(
                column, other.read(np.arange(50)).columns[name], err_msg=name
            )


class Fickle(nn.Module):
    """`first` for the probe's forward pass, `then` afterwards."""

    def __init__(self, first: Any, then: Any) -> None:
        super().__init__()
        self.first, self.then, self.asked = first, then, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        made: torch.Tensor = (self.first if self.asked == 1 else self.then)(x)
        return made


@pytest.mark.parametrize(
    ("then", "said"),
    [
        (mlp(11), "sample 0, view 0: the teacher gave 11 logits; the cache has 12"),
        (
            lambda x: torch.zeros(len(x), 2, 12),
            r"the model gave logits \[32, 2, 12\] where rows are by record",
        ),
    ],
)
def test_a_teacher_that_changes_its_shape_is_named(tmp_path: Path, then: Any, said: str) -> None:
    data = Points()
    if not isinstance(then, nn.Module):
        data.y = data.y[:, None].repeat(1, 2)
    with pytest.raises(DataError, match=said):
        dump_teacher(teacher=Fickle(mlp(), then), data=data, out=tmp_path / "c", device="cpu")


def test_a_token_that_does_not_fit_its_column_names_the_record(tmp_path: Path) -> None:
    class Deaf(Speaker):
        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
        ) -> torch.Tensor:
            return super().forward(input_ids % 40)

    data = Sentences()
    data.items[17]["input_ids"][1] = 2**16
    with pytest.raises(DataError, match="record 17: token 65536 does not fit uint16"):
        dump_teacher(teacher=Deaf(), data=data, out=tmp_path / "c", device="cpu", k=3, labels=False)


def test_a_teacher_that_says_it_has_more_classes_than_logits(tmp_path: Path) -> None:
    net = mlp()
    net.num_classes = 13
    with pytest.raises(UsageError, match="says it has 13 classes, but gives 12 logits"):
        dump_teacher(teacher=net, data=Points(), out=tmp_path / "c", device="cpu")
    net.num_classes = 10  # padded logits are cut by name alone
    with pytest.raises(
        UsageError, match=r"says it has 10 classes, but gives 12 logits; .*: --classes 10"
    ):
        dump_teacher(teacher=net, data=Points(), out=tmp_path / "c", device="cpu")


class Padded(nn.Module):
    """A teacher with columns that are no classes, and `low` in them."""

    def __init__(self, inner: nn.Module, low: float = -50.0, grows: bool = False) -> None:
        super().__init__()
        self.inner, self.low, self.grows, self.asked = inner, low, grows, 0

    def forward(self, *args: Any, **named: Any) -> torch.Tensor:
        logits = self.inner(*args, **named)
        self.asked += 1
        wide = 3 + (self.grows and self.asked > 8)
        return torch.nn.functional.pad(logits, (0, wide), value=self.low)


@pytest.mark.parametrize("kind", ["full", "topk"])
def test_classes_cuts_padding_that_nothing_uses(tmp_path: Path, kind: str) -> None:
    """The cut cache is that of the teacher without padding, but for whose it is; its header says
    what was cut.
    """
    net, data = mlp(), Points()
    given: dict[str, Any] = {
        "data": data,
        "device": "cpu",
        "kind": kind,
        **({"k": 3} if kind == "topk" else {}),
    }
    dump_teacher(teacher=net, out=tmp_path / "plain", **given)
    report = dump_teacher(teacher=Padded(net), out=tmp_path / "cut", classes=12, **given)
    assert (report.num_classes, report.cut_from) == (12, 15)
    with kdcache.open(tmp_path / "plain") as plain, kdcache.open(tmp_path / "cut") as cut:
        assert cut.spec == plain.spec
        assert (cut.identity.teacher["num_classes"], cut.identity.teacher["cut_from"]) == (12, 15)
        records = np.arange(plain.num_records)
        a, b = plain.read(records).columns, cut.read(records).columns
        assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
    assert verify(tmp_path / "cut", teacher=Padded(net), data=data, device="cpu").ok
    assert dump_teacher(
        teacher=Padded(net), out=tmp_path / "cut", classes=12, **given
    ).already_complete
    with pytest.raises(KDCacheError, match="num_classes"):
        dump_teacher(teacher=Padded(net), out=tmp_path / "cut", **given)
    with pytest.raises(DataError, match="sample 0, view 0: a logit beyond the 12 of --classes is"):
        dump_teacher(teacher=Padded(net, 50.0), out=tmp_path / "high", classes=12, **given)
    with pytest.raises(
        DataError,
        match="the teacher gave 16 logits; the cache has 12 classes, the first of 15 logits",
    ):
        dump_teacher(
            teacher=Padded(net, grows=True),
            out=tmp_path / "grows",
            classes=12,
            batch_size=2,
            **given,
        )
    with kdcache.open(tmp_path / "cut") as cut:
        assert "classes are the first of 15 logits" in render(inspect(cut.path))
    data.y[20] = 13
    with pytest.raises(
        DataError, match="sample 20, view 0: its label is 13; the teacher has 12 classes"
    ):
        dump_teacher(teacher=Padded(net), out=tmp_path / "label", classes=12, **given)


def test_classes_that_cannot_be_cut(tmp_path: Path) -> None:
    for options, message in (
        ({"classes": 13}, "--classes is 13, but the teacher gives 12 logits; expected 1 to 12"),
        ({"classes": 1}, "gives one logit, whose softmax is always 1"),
        ({"classes": 5, "kind": "none", "features": ["0"]}, "--classes is foreign to kind none"),
        ({"accept": ["nonsense"], "dry_run": True}, "--accept nonsense: no such field"),
    ):
        with pytest.raises(UsageError, match=message):
            dump_teacher(teacher=mlp(), data=Points(), out=tmp_path / "c", device="cpu", **options)
    assert not (tmp_path / "c").exists()


def test_a_token_beyond_classes_is_named(tmp_path: Path) -> None:
    class Deaf(Speaker):
        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
        ) -> torch.Tensor:
            return super().forward(input_ids % 40)

    data = Sentences()
    data.items[17]["input_ids"][0] = 41  # never a label: nothing is predicted there
    with pytest.raises(
        DataError,
        match="sample 17, view 0: its token 41 at position 0 is none of the 40 of --classes",
    ):
        dump_teacher(
            teacher=Padded(Deaf()), data=data, out=tmp_path / "c", device="cpu", k=3, classes=40
        )
