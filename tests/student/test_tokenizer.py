"""A student of another tokenizer, of more logits, of fewer positions: refused or said, in training
and evaluation.
"""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from text_world import WORDS, llama, tokenizer_file

import kdcache
from kdcache.errors import DataError, IdentityMismatch, UsageError
from kdcache.models.specs import own_tokenizer
from kdcache.student.evaluate import evaluate
from kdcache.student.train import train_student
from kdcache.teacher.dump import dump_teacher

transformers = pytest.importorskip("transformers")


@pytest.fixture
def text(tmp_path: Path) -> dict[str, Any]:
    """Data options, and a cache "c" of what a teacher of 24 tokens said of them."""
    (tmp_path / "text").mkdir()
    for i in range(8):
        (tmp_path / "text" / f"{i}.txt").write_text(" ".join((WORDS * 3)[i : i + 20]))
    file = tokenizer_file(tmp_path / "tokenizer.json", WORDS)
    data = {
        "data": f"text:{tmp_path}/text/*.txt",
        "data_args": {"tokenizer": str(file), "window": 16},
    }
    dump_teacher(
        teacher=f"hf:{llama(tmp_path / 'teacher')}", out=tmp_path / "c", k=4, device="cpu", **data
    )
    return data


def train(tmp_path: Path, folder: Path, **options: Any) -> tuple[Any, list[str]]:
    said: list[str] = []
    report = train_student(
        student=f"hf:{folder}",
        cache=tmp_path / "c",
        epochs=1,
        batch_size=4,
        device="cpu",
        **{"out": tmp_path / "run", **options},
        say=said.append,
    )
    return report, said


def test_another_tokenizer_is_refused_accepted_by_name_and_found_again_in_evaluation(
    tmp_path: Path, text: dict[str, Any]
) -> None:
    student = llama(tmp_path / "student")
    tokenizer_file(student / "tokenizer.json", WORDS[::-1])
    with pytest.raises(
        IdentityMismatch, match=r"student hf:.* is for another tokenizer(.|\n)*--accept tokenizer"
    ):
        train(tmp_path, student)
    assert not (tmp_path / "run").exists()
    report, said = train(tmp_path, student, accept=["tokenizer"])
    assert report.accepted == ("tokenizer",) and "accepted: tokenizer differs" in said
    recorded = tomllib.loads((tmp_path / "run/run.toml").read_text())["recorded"]
    assert len(recorded["tokenizer"]) == 64 and recorded["accepted"] == ["tokenizer"]
    # windows of 16 and 4 tokens
    assert evaluate(tmp_path / "run", **text)["tokens"] == 8 * 18
    other = {
        **text,
        "data_args": {**text["data_args"], "tokenizer": str(student / "tokenizer.json")},
    }
    for which in (tmp_path / "run", tmp_path / "run/last", f"hf:{tmp_path / 'run' / 'last'}"):
        with pytest.raises(IdentityMismatch, match=r"run\.toml has(.|\n)*--accept tokenizer"):
            evaluate(which, **other)
    assert evaluate(tmp_path / "run", **other, accept=["tokenizer"])["accepted"] == ["tokenizer"]


class Ids:
    """Somebody's own token ids; nobody says of which tokenizer."""

    name = "ids"

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": torch.tensor([1, 2 + i, 3, 4 + i])}


def test_teacher_and_student_are_compared_whatever_the_data_is(tmp_path: Path) -> None:
    """By SPEC and as objects; with nobody's tokenizer there is nothing to compare, as in caches of
    older versions.
    """
    for name, words in (("teacher", WORDS), ("same", WORDS), ("other", WORDS[::-1])):
        tokenizer_file(llama(tmp_path / name) / "tokenizer.json", words)
    llama(tmp_path / "bare")
    (tmp_path / "broken").mkdir()
    shutil.copytree(tmp_path / "bare", tmp_path / "broken", dirs_exist_ok=True)
    (tmp_path / "broken" / "tokenizer.json").write_text('{"a": 1}')
    fingerprint = own_tokenizer(tmp_path / "teacher")[0]
    auto = transformers.AutoModelForCausalLM

    def dump(teacher: Any, out: str, data: Any = None) -> None:
        dump_teacher(teacher=teacher, data=data or Ids(), out=tmp_path / out, k=4, device="cpu")

    dump(f"hf:{tmp_path}/teacher", "c")
    dump(auto.from_pretrained(tmp_path / "teacher"), "object")
    for out in ("c", "object"):
        assert kdcache.open(tmp_path / out).identity.teacher["tokenizer"] == fingerprint
        for student in (
            f"hf:{tmp_path}/other",
            f"hf-config:{tmp_path}/other",
            auto.from_pretrained(tmp_path / "other"),
        ):
            for data in (None, Ids()):
                with pytest.raises(
                    IdentityMismatch, match=r"tokenizer than the teacher's(.|\n)*--accept tokenizer"
                ):
                    train_student(
                        student=student,
                        cache=tmp_path / out,
                        data=data,
                        out=tmp_path / "no",
                        epochs=1,
                    )
    assert not (tmp_path / "no").exists()
    train_student(student=f"hf:{tmp_path}/same", cache=tmp_path / "c", out=tmp_path / "r", epochs=1)
    recorded = tomllib.loads((tmp_path / "r/run.toml").read_text())["recorded"]
    assert recorded["tokenizer"] == fingerprint
    report = train_student(
        student=f"hf:{tmp_path}/other",
        cache=tmp_path / "c",
        out=tmp_path / "a",
        epochs=1,
        accept=["tokenizer"],
    )
    assert report.accepted == ("tokenizer",)
    for teacher in ("bare", "broken"):
        dump(f"hf:{tmp_path}/{teacher}", f"c {teacher}")
        assert "tokenizer" not in kdcache.open(tmp_path / f"c {teacher}").identity.teacher
        train_student(
            student=f"hf:{tmp_path}/other",
            cache=tmp_path / f"c {teacher}",
            out=tmp_path / f"r {teacher}",
            epochs=1,
        )

    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(" ".join(WORDS))
    evaluated = {
        "eval_data": f"text:{tmp_path}/text/*.txt",
        "eval_data_args": {"tokenizer": f"{tmp_path}/other/tokenizer.json", "window": 8},
    }
    with pytest.raises(DataError, match="has another tokenizer than the teacher"):
        train_student(
            student=f"hf:{tmp_path}/same",
            cache=tmp_path / "c",
            out=tmp_path / "no",
            epochs=1,
            **evaluated,
        )


def test_logits_beyond_the_teachers_are_said(tmp_path: Path, text: dict[str, Any]) -> None:
    _, said = train(tmp_path, llama(tmp_path / "student", vocabulary=30))
    assert "student: 30 classes, the teacher has 24: the others have teacher probability 0" in said
    _, said = train(tmp_path, llama(tmp_path / "same"), out=tmp_path / "other")
    assert not [line for line in said if "the teacher has" in line]


def test_windows_beyond_the_positions_of_a_student(tmp_path: Path, text: dict[str, Any]) -> None:
    _, said = train(tmp_path, llama(tmp_path / "student", positions=8))
    assert [
        line
        for line in said
        if line.startswith("warning: the student") and "of up to 16 tokens" in line
    ]
    config = transformers.GPT2Config(vocab_size=24, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "learned")
    with pytest.raises(UsageError, match="take windows of at most 8"):
        train(tmp_path, tmp_path / "learned", out=tmp_path / "other")
