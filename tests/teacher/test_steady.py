"""A teacher whose answers are left to chance or to its batch is found out, in a dump before its
first shard.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from teacher_world import Points, Sentences, Speaker, dumper, files, mlp
from torch import nn

from kdcache.data.collate import read_batch
from kdcache.data.samples import Samples
from kdcache.errors import DataError
from kdcache.models.checks import Question, Steadiness, explained, steadiness, unit
from kdcache.teacher.dump import dump_teacher
from kdcache.teacher.verify import verify

CPU = torch.device("cpu")


def asked(net: nn.Module, data: Any, ids: range, rows: str = "record") -> Steadiness | None:
    samples = Samples(data)
    return steadiness(
        Question(net.eval(), CPU, lambda ids: read_batch(samples, [(i, 0) for i in ids]), rows), ids
    )


class Dropping(nn.Module):
    """Dropout that nobody turns off, as F.dropout without training= is."""

    def __init__(self, part: float = 0.1) -> None:
        super().__init__()
        self.net, self.part = mlp(), part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(nn.functional.dropout(x, self.part))


class Normed(nn.Module):
    """Answers by the statistics of the batch, and cannot take a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.net = nn.BatchNorm1d(6, track_running_stats=False), mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.norm(x))


class Centred(nn.Module):
    """As Normed, and one record is taken too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x - x.mean(0))


class Wide(Speaker):
    """Attends to padding: the mean over all positions is in every answer."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return super().forward(input_ids) + self.head(self.embed(input_ids).mean(1, keepdim=True))


class Widening(nn.Module):
    """As many classes as records."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1].expand(len(x), 12 + len(x))


@pytest.mark.parametrize(
    ("teacher", "data", "said"),
    [
        (Dropping, Points, "answers differently each time: asked twice about samples 0 to 7"),
        (
            Normed,
            Points,
            r"the teacher \(Normed\) cannot be run on inputs \[1, 6\] of float32: ValueError",
        ),
        (Centred, Points, "answers by what shares its batch: the logits of sample 0"),
        (Wide, Sentences, "answers by what shares its batch: the logits of sample"),
    ],
)
def test_it_is_refused_before_anything_is_written_and_kept_where_that_is_accepted(
    tmp_path: Path, teacher: Any, data: Any, said: str
) -> None:
    dump = dumper(tmp_path / "c")
    options = {"teacher": teacher(), "data": data(), "batch_size": 8, "k": 3}
    for accept in ([], ["class_names"]):  # another name accepts no other difference
        with pytest.raises(DataError, match=said) as caught:
            dump(**options, accept=accept)
        assert "\n" not in str(caught.value) and "--accept unsteady" in str(caught.value)
        assert not (tmp_path / "c").exists()
    told: list[str] = []
    report = dump(**options, accept=["unsteady"], say=told.append)
    assert report.complete and "unsteady" in [code for code, _ in report.warnings]
    assert any(line.startswith("warning: ") and "Accepted" in line for line in told)


def test_as_many_classes_as_records_are_no_answer_either(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match="answers by what shares its batch: the logits of sample 0 differ by up to inf",
    ):
        dump_teacher(
            teacher=Widening(), data=Points(), out=tmp_path / "c", device="cpu", labels=False
        )


def test_it_is_refused_where_a_dump_goes_on_and_the_shards_there_stay(tmp_path: Path) -> None:
    class Later(Dropping):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if self.part else self.net(x)

    net, dump = Later(0.0), dumper(tmp_path / "c")
    dump(teacher=net, batch_size=10, records_per_shard=10)
    before = files(tmp_path / "c")
    sorted((tmp_path / "c/data").iterdir())[3].unlink()
    net.part = 0.1
    with pytest.raises(DataError, match="asked twice about samples 30 to 39"):
        dump(teacher=net, batch_size=10, records_per_shard=10)
    net.part = 0.0
    assert dump(teacher=net, batch_size=10, records_per_shard=10).shards_written == 1
    assert before.items() <= files(tmp_path / "c").items()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_steady_teacher_passes_with_a_difference_that_rounding_can_explain(
    dtype: torch.dtype,
) -> None:
    net, data = mlp().to(dtype), Points()
    found = asked(net, data, range(32))
    assert found is not None and found.problem is None and found.again == 0.0
    assert found.alone is not None and found.alone <= found.rounding
    with torch.inference_mode():
        size = float(net(data.x[:32].to(dtype)).float().abs().max())
    # what is kept and compared is float32 at the finest
    eps = max(torch.finfo(dtype).eps, 2.0**-23)
    assert found.rounding == pytest.approx(math.sqrt(eps) * size)


def test_padding_is_no_reason_and_the_shortest_record_is_the_one_asked_alone() -> None:
    shapes: list[tuple[int, ...]] = []

    class Heard(Speaker):
        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
        ) -> torch.Tensor:
            shapes.append(tuple(input_ids.shape))
            return super().forward(input_ids)

    found = asked(Heard(), Sentences(), range(10), "next-token")
    assert found is not None and found.problem is None
    assert shapes[:2] == [(10, 6)] * 2 and shapes[2] == (1, 2)


def test_a_batch_of_one_is_asked_twice_alone() -> None:
    found = asked(mlp(), Points(), range(3, 4))
    assert found is not None and found.problem is None and found.alone is None


def test_nan_is_left_to_what_names_its_sample_and_infinity_is_a_difference() -> None:
    class Odd(nn.Module):
        def __init__(self, *values: float) -> None:
            super().__init__()
            self.values = list(values)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full(
                (len(x), 2), self.values.pop(0) if len(self.values) > 1 else self.values[0]
            )

    found = asked(Odd(math.nan), Points(), range(4))
    assert found is not None and found.problem is None
    found = asked(Odd(1.0, -math.inf), Points(), range(4))
    assert found is not None and found.problem is not None and found.again == math.inf


def test_the_unit_is_the_coarsest_on_the_way() -> None:
    assert unit(mlp().bfloat16(), torch.float32, CPU) == 2.0**-7
    assert unit(mlp(), torch.float32, CPU) == unit(mlp().double(), torch.float64, CPU) == 2.0**-23
    assert unit(mlp(), torch.float32, torch.device("cuda")) == 2.0**-10
    assert explained(8.0, 2.0**-8) == 0.5


@pytest.mark.parametrize("teacher", [Dropping, Centred])
def test_verify_does_not_allow_for_noise_that_is_no_rounding(tmp_path: Path, teacher: Any) -> None:
    net = teacher()
    dump_teacher(teacher=net, data=Points(), out=tmp_path / "c", device="cpu", accept=["unsteady"])
    report = verify(tmp_path / "c", teacher=net, data=Points(), device="cpu")
    assert not report.ok and "rounding explains" in report.problems[0]
    # 4 sqrt(eps) of logits below 20, and the floor
    assert report.tolerance is not None and report.tolerance < 0.1


def test_verify_of_a_teacher_that_takes_no_single_record_is_a_problem_and_no_traceback(
    tmp_path: Path,
) -> None:
    dump_teacher(
        teacher=Normed(), data=Points(), out=tmp_path / "c", device="cpu", accept=["unsteady"]
    )
    report = verify(tmp_path / "c", teacher=Normed(), data=Points(), device="cpu")
    assert (
        "the teacher (Normed) cannot be run on inputs [1, 6] of float32: ValueError"
        in report.problems[0]
    )
