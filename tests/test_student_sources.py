"""train_student: whose data, tokens, labels and rows are taken, and which are refused with what differs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from student_world import CLASSES, VOCABULARY, Net, Points, TinyLM, Windows, equal_weights, run, write_cache
from torch import nn

import kdcache
from kdcache.errors import DataError, IdentityMismatch, UsageError
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
    report = train_student(student=Net(8), out=tmp_path / "run", cache=cache, data=renamed, epochs=1,
                           accept=["data.revision", "data.name"])
    assert report.accepted == ("data.revision",)
    assert 'accepted = [\n    "data.revision",\n]' in (tmp_path / "run" / "run.toml").read_text()
    with pytest.raises(IdentityMismatch, match=r"data.probe"):
        run(tmp_path / "other", Net(8), cache=cache, data=Points(48, seed=1), epochs=1)
    with pytest.raises(DataError, match="sample_key"):  # even then: there is no override for the records' keys
        run(tmp_path / "other", Net(8), cache=cache, data=Points(48, seed=1), epochs=1, accept=["data.probe"])
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
def test_labels_of_another_kind_are_unread_in_both_stages_where_nothing_needs_them(tmp_path: Path, label: Any) -> None:
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
        report = dump_teacher(teacher=Net(32, seed=7), data=data, out=out / "c", labels=labels, device="cpu")
        assert report.accuracy is None and kdcache.open(out / "c").spec.labels == 0
        dump_teacher(teacher=Net(32, seed=7), data=data, out=out / "n", kind="none", features=["body"],
                     device="cpu")
        students[out.name] = Net(8, seed=1)
        train_student(student=students[out.name], out=out / "r", cache=out / "c", data=data, epochs=1, alpha=1.0)
        assert verify(out / "c", teacher=Net(32, seed=7), data=data, device="cpu").ok
    assert equal_weights(*students.values())
    said = r"sample \d+: .*(expected a class index|is a str|is a list of dtype object)"
    with pytest.raises(DataError, match=said):
        train_student(student=Net(8), out=tmp_path / "r", cache=out.with_name("Labelled") / "c", data=Labelled(24),
                      epochs=1)
    with pytest.raises(DataError, match=said):
        dump_teacher(teacher=Net(32, seed=7), data=Labelled(24), out=tmp_path / "c", device="cpu")


def test_that_hard_labels_are_not_the_caches_is_said(tmp_path: Path) -> None:
    report = dump_teacher(teacher=Net(32, seed=7), data=Points(24), out=tmp_path / "c", labels=False, device="cpu")
    assert report.accuracy is None
    said: list[str] = []
    train_student(student=Net(8), out=tmp_path / "run", cache=tmp_path / "c", data=Points(24), epochs=1,
                  say=said.append)
    assert any(line.startswith("labels: those of the data; the cache keeps none") for line in said)


def test_evaluation_data_of_other_classes_or_tokens_is_refused(tmp_path: Path) -> None:
    data = Points(20)
    data.class_names = data.class_names[::-1]
    with pytest.raises(IdentityMismatch, match="'class 6' for the evaluation data points"):
        run(tmp_path / "run", Net(8), data=Points(20), eval_data=data, alpha=0.0, epochs=1)
    words = Windows(8)
    words.tokenizer_identity = {"fingerprint": "1" * 64}
    with pytest.raises(DataError, match="has another tokenizer"):
        run(tmp_path / "run", TinyLM(), data=Windows(8), eval_data=words, alpha=0.0, epochs=1)


def test_evaluation_data_without_labels_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    class Unlabelled(Points):
        def __getitem__(self, i: int) -> Any:
            return self.x[i], None

    with pytest.raises(DataError, match="evaluation data points has no labels"):
        run(tmp_path / "run", Net(8), data=Points(20), eval_data=Unlabelled(20), alpha=0.0, epochs=1)
    assert not (tmp_path / "run").exists()


def test_a_student_that_cannot_take_the_inputs_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"student \(Linear\) cannot be run on inputs \[8, 5\] of float32: Runt") as e:
        run(tmp_path / "run", nn.Linear(3, CLASSES), data=Points(20), alpha=0.0, epochs=1)
    assert "\n" not in str(e.value) and isinstance(e.value.__cause__, RuntimeError)
    assert not (tmp_path / "run").exists()


class Recurrent(nn.Module):
    """One row per record from tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.embed(input_ids).mean(1)


class Masked(nn.Module):
    """Says itself which positions are rows: not the first."""

    def __init__(self, skip: int) -> None:
        super().__init__()
        self.lm, self.skip = TinyLM(), skip

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        mask = torch.ones(input_ids.shape, dtype=torch.bool)
        mask[:, : self.skip] = False
        return {"logits": self.lm(input_ids), "row_mask": mask}


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)[:, None].expand(-1, 3, -1)


def test_rows_of_student_and_teacher_that_differ_are_refused_with_both_numbers(tmp_path: Path) -> None:
    tokens = write_cache(tmp_path / "tokens", words := Windows(24, equal=True), TinyLM(seed=3))
    points = write_cache(tmp_path / "points", data := Points(20), Net(seed=7))
    with pytest.raises(DataError, match=r"one row for each of 8 records, the teacher gave \d\d, one per position"):
        run(tmp_path / "run", Recurrent(), cache=tokens, data=words, epochs=1)
    with pytest.raises(DataError, match=r"gives 24 rows \(3 positions of 8 records\), the teacher gave 8"):
        run(tmp_path / "run", Sequence(), cache=points, data=data, epochs=1)
    with pytest.raises(DataError, match=r"sample \d+: the student has \d rows, the teacher's answers \d"):
        run(tmp_path / "run", Masked(1), cache=tokens, data=words, epochs=1)
    assert len(run(tmp_path / "run", Masked(0), cache=tokens, data=words, epochs=1, batch_size=8)) == 3


def test_a_wider_student_is_cut_to_the_teachers_classes_and_a_narrower_refused(tmp_path: Path) -> None:
    data = Points(40)
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7))
    wide = Net(8, classes=CLASSES + 2)
    before = wide.head.weight[CLASSES:].detach().clone()
    for alpha in (0.0, 0.5):
        lines = run(tmp_path / f"wide{alpha}", wide, cache=cache, data=data, epochs=1, weight_decay=0.0, alpha=alpha)
        assert torch.equal(wide.head.weight[CLASSES:], before)
        assert lines[0]["ce"] < math.log(CLASSES + 1)
    with pytest.raises(UsageError, match=rf"the student has 4 classes, the teacher {CLASSES}"):
        run(tmp_path / "narrow", Net(8, classes=4), cache=cache, data=data, epochs=1)
