"""dump_teacher: what is refused in one line before anything is lost, and what is warned of."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from student_world import equal_weights
from teacher_world import CLASSES, WIDTH, Broken, Dump, Noisy, Points, dumper, files, mlp

import kdcache
from kdcache.data.samples import Samples
from kdcache.errors import DataError, IdentityMismatch, NotBuilt, SpecMismatch, UsageError
from kdcache.student.evaluate import evaluate
from kdcache.student.train import train_student
from kdcache.teacher.dump import LABELS_DISAGREE, _say_long_shard
from kdcache.teacher.progress import Progress


@pytest.fixture
def dump(tmp_path: Path) -> Dump:
    """dump_teacher with small defaults, into the folder "c"."""
    return dumper(tmp_path / "c")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 13}, "k is 13, but the teacher has 12 classes"),
        ({"kind": "topk", "k": 0}, "tiers"),
        ({"k": 4, "tiers": [5]}, "tier 5 is above k = 4"),
        ({"kind": "full", "k": 3}, "--k is foreign to kind full"),
        ({"kind": "full", "tiers": [3]}, "--tier is foreign to kind full"),
        ({"temperatures": [2]}, "--temperature is foreign to kind full"),
        (
            {"kind": "none", "features": ["0"], "values": "uint8"},
            "--values is foreign to kind none",
        ),
        ({"kind": "none", "features": ["0"], "moments": True}, "--moments is foreign to kind none"),
        ({"kind": "none"}, "name a feature"),
        ({"kind": "tok"}, "kind 'tok' is unknown.*'topk'"),
        ({"kind": "topk", "temperatures": [0]}, "temperature 0"),
        ({"values": "float8"}, "values 'float8' is unknown"),
        ({"container": "parquet"}, "--format 'parquet' is unknown"),
        ({"dtype": "half"}, "--dtype 'half' is unknown"),
        ({"device": "warp:1"}, "--device warp:1 cannot be used"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"views": 0}, "--views is 0"),
        ({"records_per_shard": 0}, "--records-per-shard is 0"),
        (
            {"records_per_shard": 3, "shard_size": 10**9},
            "--shard-size 1000000000 and --records-per-shard 3 both say",
        ),
        ({"teacher": 3}, "teacher is a int"),
        (
            {"teacher_args": {"a": 1}},
            "teacher arguments or weights are given, but the teacher is an object",
        ),
        ({"data_args": {"a": 1}}, "data arguments are given, but the data is an object"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(
    dump: Dump, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        dump(**options)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_names_of_later_versions_are_not_built(dump: Dump) -> None:
    with pytest.raises(NotBuilt):
        dump(kind="sampled")


def test_another_cache_at_the_place_is_refused_with_the_fields(dump: Dump, tmp_path: Path) -> None:
    dump(k=4)
    before = files(tmp_path / "c")
    with pytest.raises(SpecMismatch, match=r"spec\.tiers.*\[4\].*\[5\]"):
        dump(k=5)
    with pytest.raises(IdentityMismatch, match=r"teacher\.weights"):
        dump(k=4, teacher=mlp(seed=1))
    other = Points()
    other.x[0] += 1
    with pytest.raises(IdentityMismatch, match=r"data\.probe"):
        dump(k=4, data=other)
    other.revision = "2"
    with pytest.raises(IdentityMismatch, match=r"data\.probe"):
        dump(k=4, data=other, accept=["data.revision"])
    assert files(tmp_path / "c") == before


def test_a_difference_that_is_accepted_continues_the_cache(dump: Dump, tmp_path: Path) -> None:
    dump(k=4)
    renamed = Points()
    renamed.name = "dots"
    assert dump(k=4, data=renamed, accept=["data.name"]).already_complete


def test_a_random_transform_of_its_own_is_refused(dump: Dump) -> None:
    class Shaky(Points):
        rng = np.random.default_rng()

        def __getitem__(self, i: int) -> Any:
            return self.x[i] + float(self.rng.normal()), self.y[i]

    with pytest.raises(DataError, match="a random transform with its own generator"):
        dump(data=Shaky())


@pytest.mark.parametrize("label", [CLASSES, -2, -101])
def test_a_label_out_of_range_names_its_sample(dump: Dump, tmp_path: Path, label: int) -> None:
    data = Points()
    data.y[33] = label
    with pytest.raises(
        DataError, match=f"sample 33, view 0: its label is {label}.*expected 0 to 11"
    ):
        dump(data=data, records_per_shard=10)
    with kdcache.open(tmp_path / "c", allow_partial=True) as cache:
        assert cache.missing() == [3, 4]
    assert dump(data=data, records_per_shard=10, labels=False, out=tmp_path / "unlabelled").complete


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "NaN"), (float("inf"), r"\+inf")])
def test_a_bad_logit_names_the_record_and_the_cache_can_be_continued(
    dump: Dump, tmp_path: Path, value: float, said: str
) -> None:
    data, net = Points(), mlp()
    # so that the weights have one digest in both runs
    net.register_buffer("x", data.x[27])
    broken = Broken(net, data.x[27], value)
    with pytest.raises(
        DataError, match=f"sample 27, view 0: the teacher returned {said}.*at this sample"
    ) as caught:
        dump(teacher=broken, data=data, records_per_shard=10, batch_size=4)
    assert "\n" not in str(caught.value)
    broken.value = 0.5
    report = dump(teacher=broken, data=data, records_per_shard=10, batch_size=4)
    assert report.complete and report.shards_written == 3


def test_a_dump_that_fails_before_its_first_shard_does_not_block_the_corrected_command(
    dump: Dump, tmp_path: Path
) -> None:
    data = Points()
    # not looked at before a header is written
    data.y[33] = 99
    for change in (
        {"labels": False},
        {"k": 3, "labels": False},
        {"container": "hdf5", "labels": False},
        {"data": Points(30)},
        {"values": "float32", "data": Points()},
    ):
        out = tmp_path / "-".join(change)
        with pytest.raises(DataError, match=r"sample 33, view 0: its label is 99"):
            dump(data=data, out=out)
        assert (out / "header.json").exists()
        assert dump(**{"data": data, "out": out, **change}).complete
        assert not (out / "quarantine").exists()


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.01, ""), (1.0, "takes this teacher about 16m40s")]
)
def test_what_an_interruption_of_a_slow_teacher_can_lose_is_said(seconds: float, said: str) -> None:
    told: list[str] = []
    plan: Any = SimpleNamespace(spec=SimpleNamespace(records_per_shard=1000))
    _say_long_shard(plan, seconds, told.append)
    assert said in "".join(told) and bool(told) == bool(said)
    assert not said or "--records-per-shard 300 makes it 5m00s" in told[0]


def test_labels_of_another_order_are_a_named_warning(
    dump: Dump, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        report = dump(data=Points(shift=1))
    assert [code for code, _ in report.warnings] == [LABELS_DISAGREE] == ["labels-disagree"]
    assert "labels and teacher disagree" in caplog.text and report.accuracy == 0.0


RANDOM = """
from teacher_world import mlp as made
def mlp(classes=12):
    return made(classes)
"""


def test_a_teacher_without_weights_is_warned_of_at_the_start_and_in_the_report(
    dump: Dump, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import save_file

    (tmp_path / "mine.py").write_text(RANDOM)
    said: list[str] = []
    spec = f"{tmp_path / 'mine.py'}:mlp"
    with caplog.at_level(logging.WARNING):
        report = dump(teacher=spec, say=said.append)
    assert [code for code, _ in report.warnings] == ["random-teacher"]
    assert [
        line
        for line in said
        if line.startswith(f"warning: THE TEACHER IS NOT TRAINED, unless {spec} loads")
    ]
    assert sum("THE TEACHER IS NOT TRAINED" in line for line in said) == 1 and not caplog.records
    with caplog.at_level(logging.WARNING):
        dump(teacher=spec, out=tmp_path / "e")  # nobody to tell: it is logged, once
    assert caplog.text.count("THE TEACHER IS NOT TRAINED") == 1
    save_file(mlp().state_dict(), tmp_path / "net.safetensors")
    weights = tmp_path / "net.safetensors"
    assert dump(teacher=spec, teacher_weights=weights, out=tmp_path / "d").warnings == ()


def test_views_that_are_all_the_same_are_a_named_warning(dump: Dump) -> None:
    said: list[str] = []
    report = dump(views=2, dry_run=True, say=said.append)
    assert [code for code, _ in report.warnings] == ["views-equal"] and "leave out --views" in said[
        -1
    ]

    # random without view(): from the generators that are seeded for it
    class Global(Points):
        def __getitem__(self, i: int) -> Any:
            return self.x[i] + torch.randn(WIDTH), self.y[i]

    for data in (Noisy(), Global()):
        assert dump(data=data, views=2, dry_run=True).warnings == ()
    report = dump(data=Points(shift=1), views=2)
    assert [code for code, _ in report.warnings] == ["views-equal", LABELS_DISAGREE]


def test_what_is_asked_for_and_cannot_be_is_refused(dump: Dump, tmp_path: Path) -> None:
    class Bare(Points):
        def __getitem__(self, i: int) -> Any:
            return self.x[i], None

    with pytest.raises(UsageError, match="--labels: the data has none"):
        dump(data=Bare(), labels=True)
    with pytest.raises(UsageError, match="--labels is foreign to kind none"):
        dump(kind="none", features=["0"], labels=True)
    with pytest.raises(
        UsageError, match=r"--accept data\.nmae: no such field .*did you mean 'data\.name'"
    ):
        dump(accept=["data.nmae"])
    with pytest.raises(UsageError, match="views with seed 4; the seed here is 0"):
        dump(data=Samples(Points(), seed=4))
    assert not (tmp_path / "c").exists()
    dump(data=Bare())
    with kdcache.open(tmp_path / "c") as cache:
        assert cache.spec.labels == 0


def test_few_labels_of_many_classes_are_no_warning(dump: Dump) -> None:
    assert dump(teacher=mlp(200), data=Points(classes=200, shift=1)).warnings == ()


def test_data_that_changes_its_shape_is_named(dump: Dump) -> None:
    class Sometimes(Points):
        def __getitem__(self, i: int) -> Any:
            return (self.x[i], self.y[i]) if i != 31 else (self.x[i], None)

    with pytest.raises(DataError, match=r"no label|no labels"):
        dump(data=Sometimes(), batch_size=8)


def test_progress_counts_every_record_once(dump: Dump) -> None:
    seen: list[Progress] = []
    report = dump(k=3, batch_size=8, progress=seen.append)
    assert seen[-1].records == seen[-1].total == 50 and seen[-1].bytes == report.bytes
    assert [p.records for p in seen] == sorted(p.records for p in seen) and len(seen) == 7
    assert (
        seen[-1].covered_mass == report.covered_mass and seen[-1].accuracy == report.accuracy == 1.0
    )


ONE_HOT = torch.nn.functional.one_hot(Points(20).y.long(), CLASSES)
# labels of 20 points -> what is said of them, None where they are taken
LABELS = {
    "class": (Points(20).y, None),
    "column": (Points(20).y[:, None], None),
    "bytes": (Points(20).y.to(torch.uint8)[:, None], None),
    "three classes": (torch.stack([Points(20).y] * 3, 1), None),
    "one-hot": (
        ONE_HOT,
        r"labels are \[8, 12\], one number for each of 12 classes, which looks "
        r"one-hot.*argmax\(1\)",
    ),
    "one-hot bool": (ONE_HOT.bool(), r"which looks one-hot.*argmax\(1\)"),
    "multi-hot": (
        (ONE_HOT + ONE_HOT.roll(1, 1)),
        "several classes at once; .* one sigmoid for each class",
    ),
    "as many as classes": (
        torch.stack([Points(20).y] * CLASSES, 1),
        "if they are classes, several .* label_weight",
    ),
    "too many": (
        torch.zeros(20, 17, dtype=torch.int64),
        r"labels are \[8, 17\], for 8 records .* or up to 16",
    ),
    "a map": (
        torch.zeros(20, 4, 4, dtype=torch.int64),
        r"labels are \[8, 4, 4\], for 8 records of one row each",
    ),
    "from 12": (Points(20).y + CLASSES, "label is 22; .*are they counted from 1"),
    "scores": (ONE_HOT.float(), r"its label is \[12\] of float32; expected a class index"),
}


@pytest.mark.parametrize("name", LABELS)
def test_both_stages_and_evaluation_take_and_refuse_the_same_labels(
    dump: Dump, tmp_path: Path, name: str
) -> None:
    """Oracle: a run on labels that are one class a record has the weights of a run on these
    classes, bit for bit.
    """
    labels, said = LABELS[name]

    class Labelled(Points):
        def __getitem__(self, i: int) -> Any:
            return self.x[i], labels[i]

    def train(data: Any, out: str, **more: Any) -> torch.nn.Module:
        student = mlp(seed=4)
        train_student(
            student=student,
            data=data,
            out=tmp_path / out,
            alpha=0.5 if "cache" in more else 0.0,
            batch_size=8,
            epochs=1,
            **more,
        )
        return student

    data = Labelled(20)
    if said is not None:
        with pytest.raises(DataError, match=said):
            dump(data=data)
        assert not (tmp_path / "c").exists()
        for more in ({}, {"eval_data": data}):
            with pytest.raises(
                DataError,
                match=said if name != "from 12" else "label is (22; |..; the model has 12)",
            ):
                train(Points(20) if more else data, "r", **more)
            assert not (tmp_path / "r").exists()
        with pytest.raises(DataError, match=said if name != "from 12" else "a label is .."):
            evaluate(mlp(seed=4), data, batch_size=8)
        return
    dump(data=data)
    assert kdcache.open(tmp_path / "c").spec.labels == (3 if "three" in name else 1)
    got = train(data, "r", cache=tmp_path / "c"), train(data, "r0")
    if "three" not in name:
        dump(data=Points(20), out=tmp_path / "plain")
        wanted = train(Points(20), "p", cache=tmp_path / "plain"), train(Points(20), "p0")
        assert all(equal_weights(a, b) for a, b in zip(got, wanted, strict=True))
        assert evaluate(got[0], data) == evaluate(wanted[0], Points(20))


@pytest.mark.parametrize("problem", ["one logit", "regression", "multi_label_classification"])
def test_heads_that_are_no_softmax_are_refused_in_both_stages(
    dump: Dump, tmp_path: Path, problem: str
) -> None:
    module, said = mlp(), f"is for {problem}: its logits are .* one softmax"
    if problem == "one logit":
        module, said = mlp(1), r"gives one logit, whose softmax is always 1.* give \[0, z\]"
    else:
        module.config = SimpleNamespace(problem_type=problem)
    data = Points(20, classes=2)
    for kind in ("full", "topk"):
        with pytest.raises(UsageError, match=f"the teacher .*{said}"):
            dump(teacher=module, data=data, kind=kind)
        with pytest.raises(UsageError, match=f"the teacher .*{said}"):
            dump(teacher=module, data=data, kind=kind, labels=False)
    with pytest.raises(UsageError, match=f"the student .*{said}"):
        train_student(
            student=module, data=Points(20, classes=1), out=tmp_path / "r", alpha=0.0, epochs=1
        )
    with pytest.raises(UsageError, match=f"the student .*{said}"):
        evaluate(module, Points(20, classes=1))
    assert not (tmp_path / "r").exists() and not (tmp_path / "c").exists()
    # features are features
    assert dump(teacher=module, kind="none", features=["0"]).complete
