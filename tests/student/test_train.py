"""train_student: the sums over micro-batches, precision, what is refused before anything is
trained.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_world import PAIRS
from student_world import BODY, Net, Points, TinyLM, Windows, equal_weights, run, write_cache

from kdcache.errors import NotBuilt, UsageError
from kdcache.loss.definitions import divergence_rows
from kdcache.loss.targets import targets_from_logits
from kdcache.models.weights import load_weights
from kdcache.student import metrics
from kdcache.student.optim import Schedule
from kdcache.student.train import train_student

# ---- micro-batches
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rows", "tokens", "features"])
def test_micro_batches_are_the_big_batch(tmp_path: Path, kind: str) -> None:
    if kind == "tokens":
        # ragged: 2 to 8 rows a record
        data, student, teacher = Windows(24), TinyLM, TinyLM(16, seed=3)
        cache = write_cache(tmp_path / "cache", data, teacher, kind="topk", tiers=(5,))
    else:
        data, student, teacher = Points(48), Net, Net(32, seed=7)
        # labels are unknown: their count differs from the rows'
        data.y[::3] = -1
        cache = write_cache(tmp_path / "cache", data, teacher, features=[BODY])
    options: dict[str, Any] = {
        "cache": cache,
        "data": data,
        "batch_size": 12,
        "epochs": 2,
        "optimizer": "sgd",
        "lr": 0.1,
    }
    if kind == "features":
        options |= {"match": ["body=body:cosine"], "alpha": 0.9}
    # In float64 another order of summation leaves 2^-53 of sums of about 100 terms of order 1, in
    # each of 8 steps.
    runs = {
        size: (
            model := student().double(),
            run(tmp_path / f"run{size}", model, micro_batch_size=size, **options),
        )
        for size in (None, 5, 1)
    }
    whole, lines = runs[None]
    for size in (5, 1):
        model, others = runs[size]
        for a, b in zip(whole.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
        for a, b in zip(lines, others, strict=True):  # metrics are kept in float32
            assert [b[k] for k in ("loss", "ce", "kd", "grad_norm")] == pytest.approx(
                [a[k] for k in ("loss", "ce", "kd", "grad_norm")], rel=1e-5
            )


def test_metrics_are_the_parts_of_the_loss(tmp_path: Path) -> None:
    data = Points(40)
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7), features=[BODY])
    lines = run(
        tmp_path / "run",
        Net(8),
        cache=cache,
        data=data,
        ce_weight=0.3,
        kd_weight=2.0,
        temperature=4,
        match=["body=body:mse:0.5"],
        batch_size=16,
        epochs=2,
        warmup=0.4,
        clip=0.01,
    )
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5] and lines[-1]["position"] == 80
    for line in lines:
        expected = 0.3 * line["ce"] + 2 * 16 * line["kd"] + 0.5 * line["match body=body:mse:0.5"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        assert line["lr"] == Schedule(1e-3, 5, 0.4).at(line["step"] - 1)
    assert lines == [
        line for line in metrics.read(tmp_path / "run" / "metrics.jsonl") if "loss" in line
    ]


@pytest.mark.parametrize(("divergence", "tail"), [pair for pair in PAIRS if pair[1] != "sampled"])
def test_a_step_is_on_the_divergence_and_tail_that_were_asked_for(
    tmp_path: Path, divergence: str, tail: str
) -> None:
    data, teacher, student = Points(24), Net(32, seed=7), Net(8)
    cache = write_cache(tmp_path / "cache", data, teacher, kind="topk", tiers=(3,))
    with torch.no_grad():
        targets = targets_from_logits(teacher.eval()(data.x), temperature=2, k=3)
        want = divergence_rows(student(data.x).double(), targets, divergence, tail, 0.3).mean()
    beta = 0.3 if divergence == "jsd" else None
    (line,) = run(
        tmp_path / "run",
        student,
        cache=cache,
        data=data,
        divergence=divergence,
        tail=tail,
        beta=beta,
        batch_size=24,
        epochs=1,
    )
    assert line["kd"] == pytest.approx(want.item(), rel=1e-5)


# ---- precision and engines
# ----------------------------------------------------------------------------------------


def test_bfloat16_computes_in_it_and_keeps_float32_weights(tmp_path: Path) -> None:
    data = Points(40)
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7))
    seen = []
    student = Net(8)
    student.head.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    lines = run(
        tmp_path / "bf16",
        student,
        cache=cache,
        data=data,
        precision="bfloat16",
        epochs=1,
        batch_size=16,
    )
    assert set(seen) == {torch.bfloat16} and student.head.weight.dtype == torch.float32
    exact = run(tmp_path / "f32", Net(8), cache=cache, data=data, epochs=1, batch_size=16)
    # bfloat16 has 8 bits: logits of order 1 are off by up to 2^-8, the loss by about as much.
    assert [a["loss"] for a in lines] == pytest.approx([b["loss"] for b in exact], abs=2**-7)
    assert lines[0]["loss"] != exact[0]["loss"]
    with pytest.raises(UsageError, match="float16 is not available on the CPU"):
        run(
            tmp_path / "f16",
            Net(8),
            cache=cache,
            data=data,
            precision="float16",
            epochs=1,
            device="cpu",
        )


def test_compile_compiles_and_saves_the_students_own_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    data = Points(32)
    student, plain = Net(8), Net(8)
    run(tmp_path / "run", student, data=data, alpha=0.0, compile=True, epochs=1, batch_size=16)
    run(tmp_path / "plain", plain, data=data, alpha=0.0, epochs=1, batch_size=16)
    assert graphs
    for a, b in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    load_weights(loaded := Net(8, seed=3), tmp_path / "run" / "last")
    assert equal_weights(loaded, student)


def test_deterministic_is_set_and_put_back(tmp_path: Path) -> None:
    seen = []
    train_student(
        student=Net(8),
        out=tmp_path / "run",
        data=Points(20),
        alpha=0.0,
        epochs=1,
        deterministic=True,
        on_step=lambda _: seen.append(torch.are_deterministic_algorithms_enabled()),
    )
    assert seen == [True] and not torch.are_deterministic_algorithms_enabled()


# ---- refused
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cache": None}, UsageError, "there is no teacher: give a cache, or alpha 0"),
        ({"epochs": None}, UsageError, "give either epochs or max_steps"),
        ({"max_steps": 3}, UsageError, "give either epochs or max_steps"),
        ({"alpha": 1.5}, UsageError, "alpha is 1.5"),
        ({"ce_weight": 1.0}, UsageError, "give both, or neither"),
        ({"ce_weight": 0.0, "kd_weight": 0.0}, UsageError, "nothing to learn from"),
        (
            {"optimizer": "adamwx"},
            UsageError,
            "optimizer 'adamwx' is unknown .did you mean 'adamw'",
        ),
        ({"precision": "float8"}, UsageError, "precision 'float8' is unknown"),
        (
            {"best_by": "accuracy"},
            UsageError,
            "best_by 'accuracy' is unknown .did you mean 'eval_accuracy'",
        ),
        (
            {"best_by": "eval_perplexity", "eval_data": Points(8)},
            UsageError,
            r"best_by is eval_perplexity, but .*_loss",
        ),
        (
            {"best_by": "eval_loss"},
            UsageError,
            "best_by is eval_loss, but there is nothing to evaluate on",
        ),
        ({"eval_every": 2}, UsageError, "eval_every is 2, but there is nothing to evaluate on"),
        (
            {"alpha": 0.5, "ce_weight": 1.0, "kd_weight": 1.0},
            UsageError,
            "alpha is 0.5, beside ce_weight 1.0 and",
        ),
        (
            {"eval_data_args": {"a": 1}},
            UsageError,
            r"eval_data_args \['a'\] \(--eval-data-arg\): eval_data is not given",
        ),
        ({"lr": -1.0}, UsageError, "lr is -1.0"),
        ({"eval_every": 0}, UsageError, "eval_every is 0"),
        ({"seed": -1}, UsageError, "seed is -1"),
        ({"warmup": 1000.0}, UsageError, "warmup is 1000.0; expected 0 to"),
        (
            {"temperature": 3.0, "kind": "topk"},
            UsageError,
            "temperature 3 was not stored in the cache; stored: 1, 2",
        ),
        ({"kind": "none"}, UsageError, "kind 'none'"),
        ({"divergence": "jds"}, UsageError, "did you mean 'jsd'"),
        ({"beta": 0.5}, UsageError, "beta is 0.5, but divergence 'forward_kl' has none"),
        ({"divergence": "reverse_kl", "tail": "renormalise"}, UsageError, "is infinite"),
        (
            {"divergence": "jsd", "tail": "uniform"},
            UsageError,
            "goes with divergence 'forward_kl' alone",
        ),
        ({"tail": "sampled"}, NotBuilt, "caches of kind 'sampled' are not built yet"),
        ({"tail": "buckets"}, UsageError, "did you mean 'bucket'"),
        ({"engine": "cuda"}, UsageError, "engine 'cuda' is unknown"),
        ({"match": ["body=bdy:mse"]}, UsageError, "no feature 'bdy'"),
        ({"match": ["bdy=body:mse"]}, UsageError, "no module 'bdy'"),
        ({"cache": ["a", "b"]}, NotBuilt, "ensemble"),
        ({"device": "cuda:99"}, UsageError, "--device cuda:99 cannot be used"),
        ({"student": 3}, UsageError, "the student is a int"),
        ({"student_args": {"a": 1}}, UsageError, "the student is an object"),
        ({"data_args": {"a": 1}}, UsageError, "the data is an object"),
        ({"data": None}, UsageError, "--data"),
        ({"report_to": ["mlflow"]}, UsageError, "'mlflow' is unknown"),
        ({"compile": True, "match": ["body=body:mse"]}, UsageError, "compile and match"),
    ],
)
def test_bad_options_are_one_clear_line_and_leave_nothing(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    options, data = dict(options), Points(20)
    kind = options.pop("kind", "full")
    cache = write_cache(
        tmp_path / "cache",
        data,
        Net(32, seed=7),
        kind=kind,
        tiers=(3,) if kind == "topk" else (),
        features=[BODY],
    )
    with pytest.raises(error, match=message) as caught:
        train_student(
            **{
                "student": Net(8),
                "out": tmp_path / "run",
                "cache": cache,
                "data": data,
                "epochs": 1,
                **options,
            }
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_labels_are_needed_for_the_hard_loss_only(tmp_path: Path) -> None:
    data = Points(20)
    data.y = [None] * 20  # type: ignore[assignment]
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7), labels=False)
    with pytest.raises(
        UsageError, match=r"neither the cache nor the data has labels; give alpha 1"
    ):
        run(tmp_path / "run", Net(8), cache=cache, data=data, epochs=1, alpha=0.5)
    assert run(tmp_path / "run", Net(8), cache=cache, data=data, epochs=1, alpha=1.0)[0]["ce"] == 0


def test_several_processes_are_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(NotBuilt, match="WORLD_SIZE is 2"):
        run(tmp_path / "run", Net(8), data=Points(8), alpha=0.0, epochs=1)


def test_dry_run_checks_everything_and_writes_nothing(tmp_path: Path) -> None:
    data = Points(40)
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7))
    student = Net(8, norm=True)
    said: list[str] = []
    report = train_student(
        student=student,
        out=tmp_path / "run",
        cache=cache,
        data=data,
        epochs=2.5,
        batch_size=16,
        dry_run=True,
        say=said.append,
    )
    assert said[0].startswith("student: Net as given") and any(
        "7 steps of 16 records" in line for line in said
    )
    assert report.dry_run and report.steps == 7 and report.epochs == 2.5 and not report.finished
    assert json.loads(json.dumps(report.to_json()))["steps"] == 7
    assert not (tmp_path / "run").exists() and equal_weights(student, Net(8, norm=True))
    with pytest.raises(UsageError, match="classes"):
        train_student(
            student=Net(8, classes=3),
            out=tmp_path / "run",
            cache=cache,
            data=data,
            epochs=1,
            dry_run=True,
        )
