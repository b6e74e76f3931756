"""Evaluation: its numbers by their definitions, and what it can be asked about."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from student_world import CLASSES, VOCABULARY, Net, Points, TinyLM, Windows, write_cache
from torch import nn

from kdcache.errors import CacheCorrupt, DataError, UsageError
from kdcache.models.model import Model, load_model
from kdcache.student import evaluate as module
from kdcache.student.evaluate import evaluate
from kdcache.student.train import train_student

MODULE = """
import sys
sys.path.insert(0, {tests!r})
from student_world import Net

def net(num_classes=2, hidden=8):
    return Net(hidden, classes=num_classes)
"""


def test_classification_by_its_definition() -> None:
    """Of a student that trains too: its dropout is off, and its batch norm takes and keeps the
    statistics it has.
    """
    data, student = Points(53), Net(16, dropout=0.5, norm=True)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    data.y[5] = data.y[17] = -1  # unknown: not counted
    found = evaluate(student.train(), data, batch_size=10)
    assert all(part.training for part in student.modules())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    known = data.y >= 0
    with torch.no_grad():
        log_p = torch.log_softmax(student.eval()(data.x[known]).double(), -1)
    y = data.y[known]
    assert found["n"] == 51 and found["accuracy"] == (log_p.argmax(1) == y).double().mean().item()
    assert found["loss"] == pytest.approx(-log_p.gather(1, y[:, None]).mean().item(), rel=1e-6)
    rank = (log_p > log_p.gather(1, y[:, None])).sum(1)
    assert found["accuracy_top5"] == (rank < 5).double().mean().item()
    assert "accuracy_top5" not in evaluate(Net(16, classes=4), Points(20, classes=4))


def test_perplexity_is_exp_of_the_mean_over_tokens() -> None:
    data, student = Windows(13), TinyLM()
    total, tokens = 0.0, 0
    for ids, start in data.items:
        log_p = torch.log_softmax(student(torch.from_numpy(ids)[None]).double(), -1)[0]
        for p in range(len(ids) - 1):
            if not start[p + 1]:  # no row crosses into the next document
                total -= log_p[p, ids[p + 1]].item()
                tokens += 1
    found = evaluate(student, data, batch_size=5)  # ragged: padded positions must not count
    assert found["tokens"] == tokens
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-6)
    assert (
        found["perplexity"]
        == math.exp(found["loss"])
        == pytest.approx(math.exp(total / tokens), rel=1e-5)
    )
    # Batches of other sizes pad differently; what differs is rounding.
    assert evaluate(student, data, batch_size=1)["loss"] == pytest.approx(found["loss"], rel=1e-6)


def test_classes_alone_cuts_the_logits() -> None:
    wide, data = Net(16, classes=CLASSES + 3), Points(30)
    narrow = Net(16)
    narrow.load_state_dict(
        {k: v[:CLASSES] if k.startswith("head") else v for k, v in wide.state_dict().items()}
    )
    wide.head.bias.data[CLASSES:] += 100
    assert evaluate(wide, data, classes=CLASSES) == pytest.approx(evaluate(narrow, data))
    wide_eval = evaluate(wide, data, accept=["class_names"])
    assert wide_eval["accuracy"] == 0
    # what a model says of itself cuts nothing
    as_a_model = Model(wide, "", "", CLASSES, "", None)
    assert evaluate(as_a_model, data, accept=["class_names"]) == wide_eval
    for classes, message in (
        (CLASSES + 4, "and the student gives"),
        (0, "expected 1 to"),
        (1, "one logit"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(wide, data, classes=classes, accept=["class_names"])
    with pytest.raises(UsageError, match=r"gives one logit, whose softmax is always 1"):
        evaluate(Net(16, classes=1), data, accept=["class_names"])


def test_workers_and_precision(tmp_path: Path) -> None:
    data, student = Points(30), Net(16)
    assert evaluate(student, data, workers=2, batch_size=8) == evaluate(student, data, batch_size=8)
    half = evaluate(student, data, precision="bfloat16")
    assert half["loss"] == pytest.approx(evaluate(student, data)["loss"], abs=2**-6)


def test_what_cannot_be_evaluated() -> None:
    data = Points(10)
    data.y = torch.full((10,), -1)
    with pytest.raises(DataError, match="has no label in 10 samples"):
        evaluate(Net(), data)
    data.y = torch.full((10,), CLASSES)
    with pytest.raises(
        DataError, match=rf"a label is {CLASSES}; the student has {CLASSES} classes"
    ):
        evaluate(Net(), data)
    data.y = torch.zeros((10, 2), dtype=torch.int64)
    with pytest.raises(DataError, match=r"one label for each of 10 rows; the data gives \[10, 2\]"):
        evaluate(Net(), data)
    with pytest.raises(
        DataError,
        match=r"student \(TinyLM\) cannot be run on input_ids \[4, 9\] of int64: IndexError",
    ):
        evaluate(TinyLM(vocabulary=3), Windows(4, equal=True))
    for options, message in (
        ({"batch_size": 0}, "batch size 0"),
        ({"precision": "int8"}, "precision 'int8'"),
        ({"student_args": {"a": 1}}, "an object"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(Net(), Points(10), **options)  # type: ignore[arg-type]


def test_a_run_is_evaluated_with_its_best_weights(tmp_path: Path) -> None:
    (tmp_path / "students.py").write_text(
        MODULE.format(tests=str(Path(__file__).parents[1] / "tools"))
    )
    data, test = Points(48), Points(30, seed=5)
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7))
    spec = f"{tmp_path / 'students.py'}:net"
    report = train_student(
        student=spec,
        student_args={"hidden": 12},
        out=tmp_path / "run",
        cache=cache,
        data=data,
        eval_data=test,
        epochs=6,
        lr=0.05,
        batch_size=16,
    )
    found = evaluate(tmp_path / "run", test, student_code=spec)
    assert (
        found["checkpoint"] == str(tmp_path / "run" / "best")
        and found["step"] == report.best["step"]
    )
    assert report.best_by == "eval_accuracy"
    numbers = {key: value for key, value in found.items() if key not in ("checkpoint", "step")}
    assert {
        "step": found["step"],
        **{f"eval_{key}": value for key, value in numbers.items()},
    } == pytest.approx(report.best)
    weights = tmp_path / "run" / "best"
    assert (
        evaluate(
            spec, test, student_args={"hidden": 12, "num_classes": CLASSES}, student_weights=weights
        )
        == numbers
    )
    assert evaluate(tmp_path / "run" / "best", test, student_code=spec) == found
    last = evaluate(f"{tmp_path}/run/last/", test, student_code=spec)
    assert (
        last.pop("checkpoint") == str(tmp_path / "run" / "last")
        and last.pop("step") == report.steps
    )
    assert last == pytest.approx(report.evaluation)
    for run in (tmp_path / "run", tmp_path / "run" / "best"):
        with pytest.raises(UsageError, match="it has its own arguments"):
            evaluate(run, test, student_weights=weights)
    with pytest.raises(
        UsageError, match=r"no run of train-student .*; expected a RUN, its best/ or last/, or hf:"
    ):
        evaluate(tmp_path, test)
    with pytest.raises(
        UsageError, match=r"nowhere: no such .* SPEC; .*; or a RUN, its best/ or last/"
    ):
        evaluate("nowhere", test)
    train_student(student=Net(8), out=tmp_path / "object", data=data, alpha=0.0, max_steps=1)
    with pytest.raises(UsageError, match=r"trained Net, an object.*last/model.safetensors"):
        evaluate(tmp_path / "object", test)
    (tmp_path / "object" / "last").rename(tmp_path / "gone")
    with pytest.raises(CacheCorrupt, match="no checkpoint yet"):
        evaluate(tmp_path / "object", test)


# ---- Hugging Face
# -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of a tiny Llama with tied embeddings."""
    transformers: Any = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("given", ["spec", "object"])
def test_a_hugging_face_student_is_a_folder_from_pretrained_opens(
    tmp_path: Path, llama: Path, given: str, capfd: pytest.CaptureFixture[str]
) -> None:
    import transformers

    data = Windows(20)
    cache = write_cache(
        tmp_path / "cache", data, TinyLM(16, seed=3), tokens=True, kind="topk", tiers=(4,)
    )
    student: Any = f"hf-config:{llama}"
    if given == "object":
        student = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(llama))
    models: list[nn.Module] = []
    report = train_student(
        student=student,
        out=tmp_path / "run",
        cache=cache,
        eval_data=data,
        epochs=3,
        batch_size=5,
        lr=0.01,
        on_step=lambda info: models.append(info.model),
    )
    # no bar of transformers' for each checkpoint
    assert "shards" not in capfd.readouterr().err
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "last")
    ids = torch.from_numpy(data.items[0][0])[None]
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, models[-1].eval()(ids).logits)
    assert report.evaluation["perplexity"] < VOCABULARY
    assert report.best["step"] == report.steps  # so that best/ has the last weights
    if given == "spec":
        found = evaluate(tmp_path / "run", data, batch_size=5)
        assert found["loss"] == pytest.approx(report.evaluation["loss"], rel=1e-6)


def test_a_hugging_face_run_continues_bit_for_bit(tmp_path: Path, llama: Path) -> None:
    cache = write_cache(
        tmp_path / "cache", Windows(20), TinyLM(16, seed=3), tokens=True, kind="topk", tiers=(4,)
    )
    options: dict[str, Any] = {
        "student": f"hf-config:{llama}",
        "cache": cache,
        "epochs": 2,
        "batch_size": 5,
        "save_every": 3,
    }
    losses: dict[str, dict[int, float]] = {"whole": {}, "stopped": {}}

    def on_step(name: str, stop: int | None, info: Any) -> None:
        losses[name][info.step] = info.loss.item()
        if info.step == stop:
            raise KeyboardInterrupt

    train_student(
        out=tmp_path / "whole", on_step=lambda info: on_step("whole", None, info), **options
    )
    with pytest.raises(KeyboardInterrupt):
        train_student(
            out=tmp_path / "stopped", on_step=lambda info: on_step("stopped", 5, info), **options
        )
    train_student(
        out=tmp_path / "stopped", on_step=lambda info: on_step("stopped", None, info), **options
    )
    assert losses["whole"] == losses["stopped"] and len(losses["whole"]) == 8


def test_a_damaged_hugging_face_checkpoint_is_refused(tmp_path: Path, llama: Path) -> None:
    train_student(
        student=f"hf-config:{llama}", out=tmp_path / "run", data=Windows(8), alpha=0.0, max_steps=1
    )
    for name, refused in (("state.safetensors", False), ("model.safetensors", True)):
        path = tmp_path / "run" / "last" / name
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
        if refused:
            with pytest.raises(CacheCorrupt, match=r"last/model.safetensors is not what was saved"):
                evaluate(tmp_path / "run", Windows(8))
        else:  # the optimizer has no part in an evaluation
            assert evaluate(tmp_path / "run", Windows(8))["tokens"]


def test_a_run_is_evaluated_as_it_was_trained(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Precision, task and attention of the run, unless the caller says otherwise."""
    data, asked = Windows(8), list[dict[str, Any]]()
    args = {"task": "causal-lm", "attn_implementation": "eager"}
    report = train_student(
        student=f"hf-config:{llama}",
        student_args=args,
        out=tmp_path / "run",
        data=data,
        alpha=0.0,
        eval_data=data,
        max_steps=1,
        precision="bfloat16",
    )

    def seen(spec: str, **given: Any) -> Any:
        asked.append({"spec": spec, **given})
        return load_model(spec, **given)

    monkeypatch.setattr(module, "load_model", seen)
    found = evaluate(tmp_path / "run" / "last", data)
    assert asked == [{"spec": f"hf:{tmp_path / 'run' / 'last'}", "args": args, "dtype": "float32"}]
    assert found["loss"] == report.evaluation["loss"]
    assert evaluate(tmp_path / "run", data, precision="float32")["loss"] != found["loss"]
    train_student(
        student=load_model(f"hf-config:{llama}"),
        out=tmp_path / "object",
        data=data,
        alpha=0.0,
        max_steps=1,
    )
    with pytest.raises(
        UsageError, match=rf"trained Model, an object.* or evaluate hf:{tmp_path}/object/last$"
    ):
        evaluate(tmp_path / "object", data)
