"""Vocabularies of two sizes, as of models whose embeddings are padded: both ways, with and without
--classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from student_world import VOCABULARY, Windows
from text_world import llama
from torch import nn

import kdcache
from kdcache.errors import SpecMismatch, UsageError
from kdcache.models.model import load_model
from kdcache.student.evaluate import evaluate

PADDED = VOCABULARY + 7


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model of each size."""
    folder = tmp_path_factory.mktemp("models")
    return {
        name: f"hf:{llama(folder / name, vocabulary=size)}"
        for name, size in (("small", VOCABULARY), ("large", PADDED))
    }


class Cut(nn.Module):
    """A model with padding that its training has pushed down."""

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.inner = load_model(spec).module

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
        out: torch.Tensor = torch.cat(
            [logits[..., :VOCABULARY], logits[..., VOCABULARY:] - 100], -1
        )
        return out


def test_a_teacher_with_padding_and_a_student_without(
    folders: dict[str, str], tmp_path: Path
) -> None:
    """Its cache is no smaller student's; cut at the dump it is."""
    teacher, data = Cut(folders["large"]), Windows(12)
    dump: dict[str, Any] = {"teacher": teacher, "data": data, "k": 4, "device": "cpu"}
    train: dict[str, Any] = {
        "student": folders["small"],
        "max_steps": 2,
        "batch_size": 4,
        "device": "cpu",
    }
    kdcache.dump_teacher(out=tmp_path / "whole", **dump)
    again = f"dump again with --classes {VOCABULARY}"
    with pytest.raises(UsageError, match=rf"gives {VOCABULARY} logits; wanted are .* {again}"):
        kdcache.train_student(out=tmp_path / "run", cache=tmp_path / "whole", **train)
    with pytest.raises(
        UsageError, match=rf"has {VOCABULARY} classes, the teacher {PADDED}; .* {again}"
    ):
        kdcache.train_student(
            out=tmp_path / "run",
            cache=tmp_path / "whole",
            **train | {"student": load_model(folders["small"]).module},
        )
    with pytest.raises(
        UsageError, match=rf"classes is {VOCABULARY}, but the cache is of {PADDED} classes"
    ):
        kdcache.train_student(
            out=tmp_path / "run", cache=tmp_path / "whole", classes=VOCABULARY, **train
        )
    kdcache.dump_teacher(out=tmp_path / "cut", classes=VOCABULARY, **dump)
    report = kdcache.train_student(
        out=tmp_path / "run", cache=tmp_path / "cut", eval_data=data, **train
    )
    saved = evaluate(tmp_path / "run" / "last", data, device="cpu")
    assert report.evaluation["loss"] == pytest.approx(saved["loss"], rel=1e-6)


@pytest.mark.parametrize("memory", [None, "4 kB"])
def test_a_student_with_padding_and_a_teacher_without(
    folders: dict[str, str], tmp_path: Path, memory: str | None
) -> None:
    """What a run says of it is what the saved model is, over all of its logits; with classes, over
    so many.
    """
    data = Windows(12)
    kdcache.dump_teacher(teacher=folders["small"], data=data, out=tmp_path / "c", k=4, device="cpu")
    train: dict[str, Any] = {
        "student": folders["large"],
        "cache": tmp_path / "c",
        "eval_data": data,
        "max_steps": 40,
        "batch_size": 4,
        "lr": 0.05,
        "device": "cpu",
        "logits_memory": memory,
    }
    ids = torch.from_numpy(data.items[0][0])[None]

    def padding(spec: str) -> float:
        """The mass on ids that do not exist, on average."""
        p = torch.softmax(load_model(spec).module(input_ids=ids).logits.detach(), -1)
        return float(p[..., VOCABULARY:].sum(-1).mean())

    for name, classes in (("whole", None), ("cut", VOCABULARY)):
        report = kdcache.train_student(out=tmp_path / name, classes=classes, **train)
        saved = evaluate(tmp_path / name / "last", data, device="cpu")
        assert report.evaluation["loss"] == pytest.approx(saved["loss"], rel=1e-5)
        own = evaluate(f"hf:{tmp_path / name / 'last'}", data, device="cpu")
        assert (own["loss"] == pytest.approx(saved["loss"], rel=1e-5)) == (classes is None)
    assert padding(f"hf:{tmp_path / 'whole' / 'last'}") < padding(folders["large"]) / 3
    with pytest.raises(UsageError, match=f"was trained with classes {VOCABULARY}: leave it out"):
        evaluate(tmp_path / "cut", data, classes=PADDED, device="cpu")
    with pytest.raises(SpecMismatch, match=f"classes: the run has {VOCABULARY}, given is nothing"):
        kdcache.train_student(out=tmp_path / "cut", **train)
