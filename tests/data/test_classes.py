"""Class names: of data, models, runs and caches are compared in every command, by what they mean."""

from __future__ import annotations

import json
import logging
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from student_world import Net, Points
from torch.utils.data import Subset

import kdcache
from kdcache.data.classes import CLASS_NAMES, compare, dataset_names, model_names
from kdcache.data.samples import Samples
from kdcache.errors import IdentityMismatch, UsageError
from kdcache.inspect import inspect
from kdcache.student.evaluate import evaluate
from kdcache.student.train import train_student
from kdcache.teacher.dump import dump_teacher

OF = ("the teacher", "the data")
NLI = ["entailment", "neutral", "contradiction"]


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (NLI, NLI, None),
        (NLI, [], None),
        (NLI, ["Entailment", "NEUTRAL ", "contradiction"], None),
        (["golden_retriever", "siamese-cat"], ["Golden Retriever", "Siamese Cat"], None),
        (
            ["tench, Tinca tinca", "goldfish, Carassius auratus"],
            ["tench", "Carassius auratus"],
            None,
        ),
        (["C", "C++", "C#"], ["c", "c++", "c#"], None),
        (
            NLI,
            NLI[::-1],
            "class 0 is 'entailment' for the teacher and 'contradiction' for the data (2 of 3 "
            "differ)",
        ),
        (
            ["C", "C++", "C#"],
            ["C++", "C", "C#"],
            "class 0 is 'C' for the teacher and 'C++' for the data (2 of 3 differ)",
        ),
        (
            ["cat", "dog", "eel"],
            ["cat", "eel"],
            "the teacher has 3 classes, the data 2; class 1 is 'dog' for the teacher and 'eel' for "
            "the data; only the teacher has 'dog'",
        ),
        (
            ["cat", "dog", "eel"],
            ["dog", "eel", "zcat"],
            "; only the teacher has 'cat'; only the data has 'zcat'",
        ),
        (
            [str(i) for i in range(11)],
            sorted(str(i) for i in range(11)),
            "class 2 is '2' for the teacher and '10' for",
        ),
        (["a", "b"], ["one", "two", "three"], "the teacher has 2 classes, the data 3"),
        (["tench", "goldfish"], ["n01440764", "n01443537"], "not one in common"),
    ],
)
def test_names_are_compared_by_what_they_mean(
    first: list[str], second: list[str], said: str | None
) -> None:
    found = compare(first, second, of=OF)
    assert (found is None) == (said is None)
    if found is not None and said is not None:
        assert said in found.text and found.comparable == ("in common" not in said)


def test_every_other_order_of_some_names_is_found() -> None:
    """Oracle: the classes that change places, counted by hand."""
    names = [f"class {i}" for i in range(9)] + ["C", "C++", "crane, bird", "crane, machine"]
    for seed in range(50):
        order = random.Random(seed).sample(range(len(names)), len(names))
        found, moved = (
            compare(names, [names[i] for i in order], of=OF),
            [i for i, j in enumerate(order) if i != j],
        )
        assert found is not None and found.comparable
        assert f"class {moved[0]} is {names[moved[0]]!r} for the teacher" in found.text
        assert f"({len(moved)} of {len(names)} differ)" in found.text


def test_where_names_are_found() -> None:
    listed = Points(5, classes=3)
    assert (
        dataset_names(listed, "d")
        == ["class 0", "class 1", "class 2"]
        == dataset_names(Subset(listed, [0, 2]), "d")
    )
    label = SimpleNamespace(names=["no", "yes"])
    for data, names in [
        (SimpleNamespace(class_names={1: "b", 0: "a"}), ["a", "b"]),
        (SimpleNamespace(class_names=np.array(["a", "b"])), ["a", "b"]),
        # datasets.ClassLabel
        (SimpleNamespace(features={"text": 1, "label": label}), ["no", "yes"]),
        (SimpleNamespace(features={"labels": SimpleNamespace(feature=label)}), ["no", "yes"]),
        # torchvision
        (SimpleNamespace(classes=["cat", "dog"]), ["cat", "dog"]),
        (SimpleNamespace(classes=10), []),
        (SimpleNamespace(class_names=None), []),
        (SimpleNamespace(), []),
    ]:
        assert dataset_names(data, "d") == names
    for wrong in (lambda: ["a"], "cat", {0: "a", 2: "b"}, 3):
        with pytest.raises(UsageError, match="dataset d: class_names is a "):
            dataset_names(SimpleNamespace(class_names=wrong), "d")
    for module, names in [
        (SimpleNamespace(class_names=["a", "b"]), ["a", "b"]),
        (SimpleNamespace(config=SimpleNamespace(id2label={0: "a", 1: "b"})), ["a", "b"]),
        (SimpleNamespace(config=SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"})), []),
        (SimpleNamespace(pretrained_cfg={"label_names": ("a", "b")}), ["a", "b"]),
        (SimpleNamespace(), []),
    ]:
        assert model_names(module) == names


def named(names: list[str] | None, n: int = 20) -> Points:
    data = Points(n, classes=3)
    data.class_names = names
    return data


def teacher(names: list[str] | None = None, classes: int = 3) -> Any:
    net = Net(8, classes, seed=3)
    net.config = SimpleNamespace(
        id2label=dict(enumerate(names or [f"LABEL_{i}" for i in range(classes)]))
    )
    return net


def test_a_teacher_is_compared_with_its_data(tmp_path: Path) -> None:
    def dump(net: Any, data: Any, out: str, **more: Any) -> Any:
        return dump_teacher(
            teacher=net, data=data, out=tmp_path / out, device="cpu", labels=False, **more
        )

    for net, data, said in [
        (
            teacher(NLI),
            named(NLI[::-1]),
            r"class 0 is 'entailment' for the teacher .*: --accept class_names",
        ),
        (
            teacher(NLI),
            named(NLI[:2]),
            r"the teacher has 3 classes, the data 2; only the teacher has 'contrad",
        ),
        (
            teacher(),
            named(NLI[:2]),
            r"names 2 classes \('entailment', 'neutral'\), the teacher gives 3 logits",
        ),
    ]:
        with pytest.raises(IdentityMismatch, match=said) as caught:
            dump(net, data, "no")
        assert caught.value.fields[0].field == CLASS_NAMES and not (tmp_path / "no").exists()
        out = f"accepted {said[:20]}"
        report = dump(net, data, out, accept=[CLASS_NAMES])
        assert report.complete and [code for code, _ in report.warnings] == [CLASS_NAMES]
        assert kdcache.open(tmp_path / out).recorded["accepted"] == CLASS_NAMES
        # features of any order
        assert dump(net, data, f"{out} none", kind="none", features=["body"]).complete
    assert dump(teacher(), named(NLI), "c").warnings == ()
    report = dump(teacher(["a", "b", "c"]), named(NLI), "w")
    assert [code for code, _ in report.warnings] == [
        CLASS_NAMES
    ] and "not one in common" in report.warnings[0][1]
    with kdcache.open(tmp_path / "w") as cache:
        assert (
            cache.identity.teacher["class_names"] == ["a", "b", "c"]
            and cache.identity.data["class_names"] == NLI
        )


def test_students_runs_and_evaluation_data_are_compared_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # it alone
    dump_teacher(teacher=teacher(NLI), data=named(None), out=tmp_path / "c", device="cpu")
    # the data alone
    dump_teacher(teacher=teacher(), data=named(NLI), out=tmp_path / "d", device="cpu")

    def train(net: Any, out: str, **more: Any) -> Any:
        return train_student(student=net, out=tmp_path / out, epochs=1, **more)

    for more in (
        {"cache": tmp_path / "c", "data": named(None)},
        {"cache": tmp_path / "d", "data": named(NLI)},
        {"data": named(NLI), "alpha": 0.0},
    ):
        for names, said in [
            (NLI[::-1], "0 is 'contradiction' for the student"),
            (["a", *NLI[1:]], "only the stu"),
        ]:
            with pytest.raises(IdentityMismatch, match=said):
                train(teacher(names), "no", **more)
        with pytest.raises(IdentityMismatch, match="'neutral' for the evaluation data"):
            train(teacher(NLI), "no", eval_data=named([NLI[1], NLI[0], NLI[2]]), **more)
        if more.get("cache") != tmp_path / "c":  # data against data: refused
            with pytest.raises(IdentityMismatch, match="not one in common"):
                train(teacher(NLI), "no", eval_data=named(["x", "y", "z"]), **more)
        assert not (tmp_path / "no").exists()
    with pytest.raises(IdentityMismatch, match=r"data.class_names: cache has .*'entailment' at 0"):
        train(teacher(), "no", cache=tmp_path / "d", data=named(NLI[::-1]))
    with pytest.raises(IdentityMismatch, match=r"3 entries, of them alone \['contradiction'\]"):
        train(teacher(), "no", cache=tmp_path / "d", data=named(NLI[:2]))
    report = train(
        teacher(NLI[::-1]),
        "r",
        cache=tmp_path / "d",
        data=named(NLI),
        accept=[CLASS_NAMES],
        eval_data=named(NLI[::-1]),
    )
    assert (
        report.accepted == (CLASS_NAMES,)
        and CLASS_NAMES in (tmp_path / "r" / "run.toml").read_text()
    )
    assert (
        train(teacher(NLI), "r2", data=named(NLI), alpha=0.0, accept=[CLASS_NAMES]).accepted == ()
    )

    net = teacher(NLI)
    want = evaluate(net, named(NLI))
    for data, said in (
        (named(NLI[::-1]), "'entailment' for the student"),
        (named(NLI[:2]), "the data 2"),
    ):
        with pytest.raises(IdentityMismatch, match=f"{said}.*--accept class_names"):
            evaluate(net, data)
        assert evaluate(net, data, accept=[CLASS_NAMES]) == {**want, "accepted": [CLASS_NAMES]}
    with pytest.raises(
        IdentityMismatch, match=r"the data names 2 classes .*, the student gives 3 logits"
    ):
        evaluate(teacher(), named(NLI[:2]))
    assert evaluate(net, named(NLI), accept=[CLASS_NAMES]) == want
    caplog.set_level(logging.WARNING, logger="kdcache")
    assert evaluate(net, named(["x", "y", "z"])) == want and "not one in common" in caplog.text
    with pytest.raises(UsageError, match=r"--accept class_name: evaluation compares .*class_names"):
        evaluate(net, named(NLI), accept=["class_name"])


def test_a_live_teacher_evaluation_data_and_inspect_are_compared(tmp_path: Path) -> None:
    def train(out: str, **more: Any) -> Any:
        return train_student(student=Net(8, 3), out=tmp_path / out, epochs=1, **more)

    live = {"data": named(NLI), "alpha": 1.0}
    with pytest.raises(
        IdentityMismatch, match="'contradiction' for the live teacher and 'entailment' for the data"
    ):
        train("no", live_teacher=teacher(NLI[::-1]), **live)
    assert train("l", live_teacher=teacher(NLI[::-1]), accept=[CLASS_NAMES], **live).accepted == (
        CLASS_NAMES,
    )
    sigmoid = teacher(NLI)
    sigmoid.config.problem_type = "multi_label_classification"
    with pytest.raises(UsageError, match=r"the live teacher .* is for multi_label"):
        train("no", live_teacher=sigmoid, **live)
    with pytest.raises(UsageError, match="the teacher has one class, whose softmax is always 1"):
        train("no", live_teacher=Net(8, 1), **live)
    dump_teacher(teacher=teacher(), data=named(None), out=tmp_path / "c", device="cpu")
    two = {"cache": tmp_path / "c", "data": named(None), "eval_data": named(NLI[:2])}
    with pytest.raises(
        IdentityMismatch,
        match=r"the evaluation data names 2 classes .*, the teacher gives 3 logits",
    ):
        train("no", **two)
    assert train("e", accept=[CLASS_NAMES], **two).accepted == (CLASS_NAMES,)
    assert not (tmp_path / "no").exists()
    dump_teacher(teacher=teacher(), data=named(NLI), out=tmp_path / "d", device="cpu")
    assert inspect(tmp_path / "d", record=1, data=named(NLI))
    with pytest.raises(IdentityMismatch, match="'contradiction' for the data"):
        inspect(tmp_path / "d", record=1, data=named(NLI[::-1]))


def test_names_beyond_the_classes_that_are_meant_do_not_count(tmp_path: Path) -> None:
    wide = teacher([*NLI, "padding"], classes=4)
    with torch.no_grad():
        # as a padded head has it: --classes has the logits prove it
        wide.head.bias[3] = -1e4
    cut = {"classes": 3, "alpha": 0.0, "epochs": 1}
    for data, said in ((named(NLI), None), (named(NLI[::-1]), "0 is 'entailment' for the student")):
        for call in (
            lambda data: train_student(
                student=wide, data=data, out=tmp_path / data.class_names[0], **cut
            ),
            lambda data: evaluate(wide, data, classes=3),
        ):
            if said is None:
                call(data)
            else:
                with pytest.raises(IdentityMismatch, match=said):
                    call(data)
    assert dump_teacher(
        teacher=wide, data=named(NLI), out=tmp_path / "c", k=1, classes=3, device="cpu"
    ).complete


def test_a_run_remembers_the_classes_of_a_student_that_cannot(tmp_path: Path) -> None:
    """Evaluated, and as a teacher by its weights: a folder that is missing or renamed would be
    scored as another.
    """
    (tmp_path / "net.py").write_text("import torch\ndef net(): return torch.nn.Linear(5, 3)\n")
    for names in (NLI, NLI[::-1]):
        np.savez(
            tmp_path / f"{names[0]}.npz",
            x=Points(12).x.numpy(),
            y=np.arange(12) % 3,
            class_names=names,
        )
    spec, right, wrong = (
        f"{tmp_path}/net.py:net",
        *(f"npz:{tmp_path}/{name}.npz" for name in (NLI[0], NLI[2])),
    )
    train_student(student=spec, data=right, alpha=0.0, epochs=1, out=tmp_path / "r")
    assert Samples(kdcache.data.sources.load_data(right)).class_names == NLI
    assert evaluate(tmp_path / "r", right, student_code=spec)["n"] == 12
    with pytest.raises(
        IdentityMismatch, match="'entailment' for the student and 'contradiction' for the data"
    ):
        evaluate(tmp_path / "r", wrong, student_code=spec)
    for weights in (tmp_path / "r" / "last", tmp_path / "r" / "last" / "model.safetensors"):
        dump = {"teacher": spec, "teacher_weights": weights, "out": tmp_path / "c", "device": "cpu"}
        with pytest.raises(
            IdentityMismatch, match="'entailment' for the teacher and 'contradiction' for the data"
        ):
            dump_teacher(data=wrong, **dump)
    assert dump_teacher(data=right, **dump).complete


def test_a_hugging_face_student_is_saved_with_the_names_of_its_data(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        num_labels=3,
    )

    class Said:
        class_names = NLI
        name = "said"
        __len__ = lambda self: 6  # noqa: E731
        __getitem__ = lambda self, i: {"input_ids": torch.tensor([1, i]), "labels": i % 3}  # noqa: E731

    for names in (None, NLI[::-1]):
        config.id2label = dict(enumerate(names or [f"LABEL_{i}" for i in range(3)]))
        os.makedirs(tmp_path / "b", exist_ok=True)
        (tmp_path / "b" / "config.json").write_text(
            json.dumps({**config.to_dict(), "architectures": ["BertForSequenceClassification"]})
        )
        out = tmp_path / f"r{len(names or ())}"
        train_student(
            student=f"hf-config:{tmp_path}/b",
            data=Said(),
            alpha=0.0,
            epochs=1,
            out=out,
            accept=[CLASS_NAMES] if names else [],
        )
        saved = json.loads((out / "last" / "config.json").read_text())
        assert saved["id2label"] == {str(i): name for i, name in enumerate(NLI)}
        assert saved["label2id"] == {name: i for i, name in enumerate(NLI)}
    assert evaluate(out, Said())["n"] == 6
