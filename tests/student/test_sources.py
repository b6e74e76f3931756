"""train_student: whose data, tokens, labels and rows are taken, and which are refused with what
differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from student_world import (
    CLASSES,
    VOCABULARY,
    Net,
    Points,
    TinyLM,
    Windows,
    equal_weights,
    run,
    write_cache,
)
from torch import nn

import kdcache
from kdcache.errors import DataError, IdentityMismatch, UsageError
from kdcache.student.evaluate import evaluate
from kdcache.student.train import train_student
from kdcache.teacher.dump import dump_teacher
from kdcache.teacher.verify import verify


def test_other_data_is_refused_with_the_fields_and_accepted_by_name(tmp_path: Path) -> None:
    data = Points(48)
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7))
    renamed = Points(48)
    renamed.revision = "2"
    with pytest.raises(IdentityMismatch, match=r"data.revision: cache has '1', given is '2'"):
        run(tmp_path / "run", Net(8), cache=cache, data=renamed, epochs=1)
    report = train_student(
        student=Net(8),
        out=tmp_path / "run",
        cache=cache,
        data=renamed,
        epochs=1,
        accept=["data.revision", "data.name"],
    )
    assert report.accepted == ("data.revision",)
    assert 'accepted = [\n    "data.revision",\n]' in (tmp_path / "run" / "run.toml").read_text()
    with pytest.raises(IdentityMismatch, match=r"data.probe"):
        run(tmp_path / "other", Net(8), cache=cache, data=Points(48, seed=1), epochs=1)
    # even then: there is no override for the records' keys
    with pytest.raises(DataError, match="sample_key"):
        run(
            tmp_path / "other",
            Net(8),
            cache=cache,
            data=Points(48, seed=1),
            epochs=1,
            accept=["data.probe"],
        )
    with pytest.raises(UsageError, match=r"no such field.*data.revision"):
        run(tmp_path / "more", Net(8), cache=cache, data=data, epochs=1, accept=["data.revison"])
    assert not (tmp_path / "other").exists()


def test_another_tokenizer_or_window_is_refused(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", Windows(24), TinyLM(seed=3))
    data = Windows(24)
    data.window, data.tokenizer_identity = 10, {**data.tokenizer_identity, "template": "chat"}
    with pytest.raises(IdentityMismatch) as caught:
        run(tmp_path / "run", TinyLM(), cache=cache, data=data, epochs=1)
    assert [d.field for d in caught.value.fields] == ["data.window", "tokenizer.template"]


@pytest.mark.parametrize("label", [[0.1, 0.9], [{"box": (0, 0, 1, 1)}], "what was said"])
def test_labels_of_another_kind_are_unread_in_both_stages_where_nothing_needs_them(
    tmp_path: Path, label: Any
) -> None:
    """The same weights, bit for bit, as from data that has no labels."""

    class Labelled(Points):
        def __getitem__(self, i: int) -> Any:
            return self.x[i], label

    class Unlabelled(Points):
        def __getitem__(self, i: int) -> Any:
            return self.x[i], None

    students = {}
    for data, labels in ((Labelled(24), False), (Unlabelled(24), None)):
        out = tmp_path / type(data).__name__
        report = dump_teacher(
            teacher=Net(32, seed=7), data=data, out=out / "c", labels=labels, device="cpu"
        )
        assert report.accuracy is None and kdcache.open(out / "c").spec.labels == 0
        dump_teacher(
            teacher=Net(32, seed=7),
            data=data,
            out=out / "n",
            kind="none",
            features=["body"],
            device="cpu",
        )
        students[out.name] = Net(8, seed=1)
        train_student(
            student=students[out.name],
            out=out / "r",
            cache=out / "c",
            data=data,
            epochs=1,
            alpha=1.0,
        )
        assert verify(out / "c", teacher=Net(32, seed=7), data=data, device="cpu").ok
        batch = next(iter(kdcache.Loader(out / "c", data, batch_size=4, labels=False)))
        assert batch["labels"] is None and batch["targets"] is not None
    assert equal_weights(*students.values())
    said = r"sample \d+: .*(expected a class index|is a str|is a list of dtype object)"
    with pytest.raises(DataError, match=said):
        train_student(
            student=Net(8),
            out=tmp_path / "r",
            cache=out.with_name("Labelled") / "c",
            data=Labelled(24),
            epochs=1,
            alpha=0.5,
        )
    with pytest.raises(DataError, match=said):
        next(iter(kdcache.Loader(out.with_name("Labelled") / "c", Labelled(24), batch_size=4)))
    with pytest.raises(DataError, match=said):
        dump_teacher(teacher=Net(32, seed=7), data=Labelled(24), out=tmp_path / "c", device="cpu")


def test_labels_of_the_data_train_where_the_cache_keeps_none_only_if_asked_for(
    tmp_path: Path,
) -> None:
    """By alpha, or by the weights; else what was dumped without labels is learned without them."""
    data, unlabelled = Points(24), Points(24)
    unlabelled.y = [None] * 24  # type: ignore[assignment]
    report = dump_teacher(
        teacher=Net(32, seed=7), data=data, out=tmp_path / "c", labels=False, device="cpu"
    )
    dump_teacher(
        teacher=Net(32, seed=7),
        data=data,
        out=tmp_path / "n",
        kind="none",
        features=["body"],
        device="cpu",
    )
    dump_teacher(teacher=Net(32, seed=7), data=unlabelled, out=tmp_path / "u", device="cpu")
    dump_teacher(
        teacher=Net(32, seed=7),
        data=unlabelled,
        out=tmp_path / "nu",
        kind="none",
        features=["body"],
        device="cpu",
    )
    assert report.accuracy is None
    of_data, default = (
        "labels: those of the data; the cache keeps none",
        "default: alpha 1: the cache keeps no labels",
    )
    for cache, given, weights, start in (
        ("c", {}, (0, 1), default),
        ("c", {"alpha": 0.5}, (0.5, 0.5), of_data),
        ("c", {"ce_weight": 2.0, "kd_weight": 1.0}, (2, 1), of_data),
        ("c", {"alpha": 0.0}, (1, 0), of_data),
        (
            "n",
            {"match": ["body=body_raw:mse"]},
            (0, 0),
            "default: no loss of labels or rows: the cache keeps nei",
        ),
        ("n", {"match": ["body=body_raw:mse"], "alpha": 0.0}, (1, 0), of_data),
    ):
        said, out = list[str](), tmp_path / "run" / f"{cache}{given}".replace("/", "")[:200]
        options: dict[str, Any] = {"cache": tmp_path / cache, "data": data, "epochs": 1, **given}
        train_student(student=Net(8), out=out, say=said.append, **options)
        assert any(line.startswith(start) for line in said), (said, start)
        assert next(line for line in said if line.startswith("loss:")).startswith(
            f"loss: {weights[0]:g} CE + {weights[1]:g} T^2 forward_kl"
        ), said
        assert (default in "".join(said)) == (start == default)
    words = write_cache(tmp_path / "w", Windows(8), TinyLM(seed=3), tokens=True, labels=False)
    for given, weights, start in (
        ({}, (0, 1), "inputs: the tokens of the cache"),
        (
            {"alpha": 0.5},
            (0.5, 0.5),
            "inputs: the tokens of the cache, and its labels are the next of them",
        ),
    ):
        said = []
        train_student(
            student=TinyLM(),
            cache=words,
            out=tmp_path / f"words{len(given)}",
            epochs=1,
            say=said.append,
            **given,
        )
        assert start in said and any(
            line.startswith(f"loss: {weights[0]:g} CE + {weights[1]:g} T^2") for line in said
        )
    for cache, given, message in (
        (
            "n",
            {"alpha": 1.0, "match": ["body=body_raw:mse"]},
            "leave alpha and the weights out, for match alone",
        ),
        ("n", {}, "give match, which trains on them, or alpha 0 for the data's labels"),
        (
            "nu",
            {"alpha": 0.0, "match": ["body=body_raw:mse"], "data": unlabelled},
            "leave alpha and the weights",
        ),
        ("u", {"alpha": 0.5, "data": unlabelled}, "give alpha 1"),
        (None, {"alpha": 0.0, "data": unlabelled}, "nothing to learn from without a cache"),
    ):
        options = {
            "cache": None if cache is None else tmp_path / cache,
            "data": data,
            "epochs": 1,
            **given,
        }
        with pytest.raises(UsageError, match=message):
            train_student(student=Net(8), out=tmp_path / "refused", **options)


def test_an_option_that_would_do_nothing_is_refused_by_name(tmp_path: Path) -> None:
    data = Points(24)
    cache = write_cache(tmp_path / "c", data, Net(32, seed=7), kind="topk", tiers=(3,))
    plain: dict[str, Any] = {"data": data, "epochs": 1, "alpha": 0.0}
    idle: list[dict[str, Any]] = [
        {"temperature": 7.0},
        {"k": 3},
        {"divergence": "jsd", "beta": 0.3},
        {"tail": "conditional"},
        {"divergence": "forward_kl"},
        {"live_teacher": Net(32)},
    ]
    for given in idle:
        for source in (None, cache):
            with pytest.raises(
                UsageError, match=rf"^{next(iter(given))} is .*the soft loss has no weight"
            ):
                run(tmp_path / "run", Net(8), cache=source, **given, **plain)
    tokens = write_cache(tmp_path / "t", Windows(8), TinyLM(seed=3), tokens=True)
    for given, message in (
        ({"accept": ["eval_data"]}, "there is no evaluation data"),
        ({"accept": ["view_key"]}, "no view keys"),
        ({"accept": ["eval_data.nonsense"], "eval_data": data}, "no such field"),
        ({"accept": ["nonsense"]}, "no such field"),
        ({"accept": ["eval_dataXX"]}, "no such field"),
        (
            {"classes": 7, "ce_weight": 0.0, "kd_weight": 0.0, "match": ["body=f:mse"]},
            "classes is 7, but no loss and no evaluation looks at logits",
        ),
        ({"accept": ["nonsense"], "cache": tokens, "data": None}, "no such field"),
        (
            {"accept": ["data.name"], "cache": tokens, "data": None},
            "no data is given beside the cache",
        ),
    ):
        options = {"cache": cache, "data": data, "epochs": 1, **given}
        with pytest.raises(UsageError, match=message):
            run(tmp_path / "run", Net(8), **options)
    for given, message in (
        ({"accept": ["x"]}, "accept is 'x'"),
        ({"accept": ["view_key"]}, "has view keys"),
        ({"num_classes": 7}, "where a cache knows its"),
        ({"classes": 2}, "classes of the cache"),
        ({"cache": None, "num_classes": -1}, "num_classes is -1"),
        ({"cache": None, "temperature": 2.0}, "temperature is 2.0, but no soft targets are read"),
        ({"k": 3, "targets": False}, "k is 3, but no soft targets are read"),
    ):
        with pytest.raises(UsageError, match=message):
            kdcache.Loader(**{"cache": cache, "data": data, "batch_size": 4, **given})
    with pytest.raises(UsageError, match="ignore_index is 'x'"):
        kdcache.row_counts(torch.zeros(3).long(), None, ignore_index="x")  # type: ignore[arg-type]


def test_evaluation_data_of_other_classes_or_tokens_is_refused(tmp_path: Path) -> None:
    data = Points(20)
    data.class_names = data.class_names[::-1]
    with pytest.raises(IdentityMismatch, match="'class 6' for the evaluation data points"):
        run(tmp_path / "run", Net(8), data=Points(20), eval_data=data, alpha=0.0, epochs=1)
    words = Windows(8)
    words.tokenizer_identity = {"fingerprint": "1" * 64}
    with pytest.raises(DataError, match="has another tokenizer"):
        run(tmp_path / "run", TinyLM(), data=Windows(8), eval_data=words, alpha=0.0, epochs=1)


def test_evaluation_data_without_labels_is_refused_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    class Unlabelled(Points):
        def __getitem__(self, i: int) -> Any:
            return self.x[i], None

    with pytest.raises(DataError, match="evaluation data points has no labels"):
        run(
            tmp_path / "run", Net(8), data=Points(20), eval_data=Unlabelled(20), alpha=0.0, epochs=1
        )
    assert not (tmp_path / "run").exists()


def test_a_student_that_cannot_take_the_inputs_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"student \(Linear\) cannot be run on inputs \[8, 5\] of float32: Runt"
    ) as e:
        run(tmp_path / "run", nn.Linear(3, CLASSES), data=Points(20), alpha=0.0, epochs=1)
    assert "\n" not in str(e.value) and isinstance(e.value.__cause__, RuntimeError)
    assert not (tmp_path / "run").exists()


class Recurrent(nn.Module):
    """One row per record from tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.embed(input_ids).mean(1)


class Masked(nn.Module):
    """Says itself which positions are rows: not the first."""

    def __init__(self, skip: int) -> None:
        super().__init__()
        self.lm, self.skip = TinyLM(), skip

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        mask = torch.ones(input_ids.shape, dtype=torch.bool)
        mask[:, : self.skip] = False
        return {"logits": self.lm(input_ids), "row_mask": mask}


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)[:, None].expand(-1, 3, -1)


def test_rows_of_student_and_teacher_that_differ_are_refused_with_both_numbers(
    tmp_path: Path,
) -> None:
    tokens = write_cache(tmp_path / "tokens", words := Windows(24, equal=True), TinyLM(seed=3))
    points = write_cache(tmp_path / "points", data := Points(20), Net(seed=7))
    with pytest.raises(
        DataError, match=r"one row for each of 8 records, the teacher gave \d\d, one per position"
    ):
        run(tmp_path / "run", Recurrent(), cache=tokens, data=words, epochs=1)
    with pytest.raises(
        DataError, match=r"gives 24 rows \(3 positions of 8 records\), the teacher gave 8"
    ):
        run(tmp_path / "run", Sequence(), cache=points, data=data, epochs=1)
    with pytest.raises(
        DataError, match=r"sample \d+: the student has \d rows, the teacher's answers \d"
    ):
        run(tmp_path / "run", Masked(1), cache=tokens, data=words, epochs=1)
    assert (
        len(run(tmp_path / "run", Masked(0), cache=tokens, data=words, epochs=1, batch_size=8)) == 3
    )


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_wider_student_keeps_its_softmax_and_classes_cuts_it(
    tmp_path: Path, alpha: float
) -> None:
    """Its loss and evaluation are over all of its classes, so those of the teacher's empty ones are
    unlearned; with
    `classes` these are no classes, here or in an evaluation of the weights."""
    data = Points(40)
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7))
    wide, said = Net(8, classes=CLASSES + 2), list[str]()
    options: dict[str, Any] = {
        "cache": cache,
        "data": data,
        "eval_data": data,
        "weight_decay": 0.0,
        "alpha": alpha,
        "batch_size": 8,
        "epochs": 4,
        "lr": 0.05,
    }
    before = torch.softmax(wide(data.x), -1)[:, CLASSES:].sum()
    report = train_student(student=wide, out=tmp_path / "wide", say=said.append, **options)
    assert torch.softmax(wide(data.x), -1)[:, CLASSES:].sum() < before / 3
    assert report.evaluation["loss"] == pytest.approx(
        evaluate(wide, data, accept=["class_names"])["loss"], rel=1e-6
    )
    lines = [line for line in said if line.startswith("student: ") and "classes" in line]
    assert lines == [
        f"student: {CLASSES + 2} classes, the teacher has {CLASSES}: the others have teacher "
        "probability 0"
    ]
    kept = wide.head.weight[CLASSES:].detach().clone()
    report = train_student(
        student=wide, out=tmp_path / "cut", say=said.append, classes=CLASSES, **options
    )
    assert torch.equal(wide.head.weight[CLASSES:], kept)
    assert f"student: {CLASSES + 2} logits, cut to {CLASSES} classes" in said
    assert report.evaluation["loss"] == pytest.approx(
        evaluate(wide, data, classes=CLASSES)["loss"], rel=1e-6
    )
    assert report.evaluation["loss"] < evaluate(wide, data, accept=["class_names"])["loss"] - 0.01


class Padded(Net):
    """A teacher with a column of padding, which is never the largest."""

    def __init__(self) -> None:
        super().__init__(32, seed=7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(super().forward(x), (0, 1), value=-100.0)


def test_classes_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    data = Points(40)
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7))
    topk = write_cache(tmp_path / "topk", data, Net(32, seed=7), kind="topk", tiers=(3,))
    for options, message in (
        (
            {"classes": 4},
            rf"classes is 4, but the cache is of {CLASSES} classes: .* dump again with --classes 4",
        ),
        (
            {"classes": 20, "student": Net(8, classes=12)},
            "classes is 20, and the student gives 12 logits",
        ),
        (
            {"divergence": "reverse_kl", "student": Net(8, classes=12)},
            r"infinite: the student has 12 .*\(classes ",
        ),
        (
            {"live_teacher": Net(8, classes=12)},
            rf"teacher gives 12 logits, the cache is of {CLASSES} .*classes=",
        ),
        (
            {"live_teacher": Padded(), "cache": None},
            rf"the teacher {CLASSES + 1}; .* give classes {CLASSES},",
        ),
        (
            {"cache": None, "alpha": 0.0, "student": Net(8, classes=1)},
            "gives one logit, whose softmax is",
        ),
    ):
        given: dict[str, Any] = {
            "student": Net(8),
            "cache": cache,
            "data": data,
            "epochs": 1,
            **options,
        }
        with pytest.raises(UsageError, match=message):
            train_student(out=tmp_path / "run", **given)
        assert not (tmp_path / "run").exists()
    for options in (
        {"tail": "conditional", "cache": cache},
        {"cache": topk},
        {"classes": CLASSES, "cache": cache},
        {"classes": CLASSES, "cache": cache, "live_teacher": Padded()},
        {"classes": CLASSES, "live_teacher": Padded()},
    ):
        run(
            tmp_path / "run" / str(len(list(tmp_path.rglob("run.toml")))),
            Net(8, classes=12),
            data=data,
            epochs=1,
            divergence="reverse_kl",
            **options,
        )
    with pytest.raises(
        UsageError, match=rf"the student has 4 classes, the teacher {CLASSES}; .* --classes 4"
    ):
        run(tmp_path / "narrow", Net(8, classes=4), cache=cache, data=data, epochs=1)
