"""train_student: the sums over micro-batches, precision, identity, what is refused, what is reported."""

from __future__ import annotations

import json
import math
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_world import PAIRS
from student_world import CLASSES, VOCABULARY, Net, Points, TinyLM, Windows, equal_weights, write_cache
from torch import nn

from kdcache.cache.spec import FeatureSpec
from kdcache.errors import DataError, IdentityMismatch, NotBuilt, UsageError
from kdcache.models import load_weights
from kdcache.student import metrics
from kdcache.student.definitions import divergence_rows
from kdcache.student.loader import Loader
from kdcache.student.loop import Loop
from kdcache.student.optim import Schedule, make_optimizer, trainable
from kdcache.student.settings import Settings
from kdcache.student.targets import targets_from_logits
from kdcache.student.train import train_student

BODY = FeatureSpec(name="body", module="body", recipe="raw", dtype="float32", shape=(32,))


def run(out: Path, student: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Train and give the metrics of the steps."""
    lines: list[dict[str, Any]] = []
    train_student(student=student, out=out, on_metrics=lines.append, **options)
    return [line for line in lines if "loss" in line]


# ---- micro-batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rows", "tokens", "features"])
def test_micro_batches_are_the_big_batch(tmp_path: Path, kind: str) -> None:
    if kind == "tokens":
        data, student, teacher = Windows(24), TinyLM, TinyLM(16, seed=3)     # ragged: 2 to 8 rows a record
        cache = write_cache(tmp_path / "cache", data, teacher, kind="topk", tiers=(5,))
    else:
        data, student, teacher = Points(48), Net, Net(32, seed=7)
        data.y[::3] = -1                                # labels are unknown: their count differs from the rows'
        cache = write_cache(tmp_path / "cache", data, teacher, features=[BODY])
    options: dict[str, Any] = {"cache": cache, "data": data, "batch_size": 12, "epochs": 2, "optimizer": "sgd",
                               "lr": 0.1}
    if kind == "features":
        options |= {"match": ["body=body:cosine"], "alpha": 0.9}
    # In float64 another order of summation leaves 2^-53 of sums of about 100 terms of order 1, in each of 8 steps.
    runs = {size: (model := student().double(), run(tmp_path / f"run{size}", model, micro_batch_size=size, **options))
            for size in (None, 5, 1)}
    whole, lines = runs[None]
    for size in (5, 1):
        model, others = runs[size]
        for a, b in zip(whole.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
        for a, b in zip(lines, others, strict=True):    # metrics are kept in float32
            assert [b[k] for k in ("loss", "ce", "kd", "grad_norm")] == pytest.approx(
                [a[k] for k in ("loss", "ce", "kd", "grad_norm")], rel=1e-5)


def test_metrics_are_the_parts_of_the_loss(tmp_path: Path) -> None:
    data = Points(40)
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7), features=[BODY])
    lines = run(tmp_path / "run", Net(8), cache=cache, data=data, ce_weight=0.3, kd_weight=2.0, temperature=4,
                match=["body=body:mse:0.5"], batch_size=16, epochs=2, warmup=0.4, clip=0.01)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5] and lines[-1]["position"] == 80
    for line in lines:
        expected = 0.3 * line["ce"] + 2 * 16 * line["kd"] + 0.5 * line["match body=body:mse:0.5"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        assert line["lr"] == Schedule(1e-3, 5, 0.4).at(line["step"] - 1)
    assert lines == [line for line in metrics.read(tmp_path / "run" / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize(("divergence", "tail"), [pair for pair in PAIRS if pair[1] != "sampled"])
def test_a_step_is_on_the_divergence_and_tail_that_were_asked_for(tmp_path: Path, divergence: str, tail: str) -> None:
    data, teacher, student = Points(24), Net(32, seed=7), Net(8)
    cache = write_cache(tmp_path / "cache", data, teacher, kind="topk", tiers=(3,))
    with torch.no_grad():
        targets = targets_from_logits(teacher.eval()(data.x), temperature=2, k=3)
        want = divergence_rows(student(data.x).double(), targets, divergence, tail, 0.3).mean()
    beta = 0.3 if divergence == "jsd" else None
    (line,) = run(tmp_path / "run", student, cache=cache, data=data, divergence=divergence, tail=tail, beta=beta,
                  batch_size=24, epochs=1)
    assert line["kd"] == pytest.approx(want.item(), rel=1e-5)


# ---- precision and engines ----------------------------------------------------------------------------------------


def test_bfloat16_computes_in_it_and_keeps_float32_weights(tmp_path: Path) -> None:
    data = Points(40)
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7))
    seen = []
    student = Net(8)
    student.head.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    lines = run(tmp_path / "bf16", student, cache=cache, data=data, precision="bfloat16", epochs=1, batch_size=16)
    assert set(seen) == {torch.bfloat16} and student.head.weight.dtype == torch.float32
    exact = run(tmp_path / "f32", Net(8), cache=cache, data=data, epochs=1, batch_size=16)
    # bfloat16 has 8 bits: logits of order 1 are off by up to 2^-8, the loss by about as much.
    assert [a["loss"] for a in lines] == pytest.approx([b["loss"] for b in exact], abs=2**-7)
    assert lines[0]["loss"] != exact[0]["loss"]
    with pytest.raises(UsageError, match="float16 is not available on the CPU"):
        run(tmp_path / "f16", Net(8), cache=cache, data=data, precision="float16", epochs=1, device="cpu")


def test_compile_compiles_and_saves_the_students_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    train_student(student=Net(8), out=tmp_path / "run", data=Points(20), alpha=0.0, epochs=1, deterministic=True,
                  on_step=lambda _: seen.append(torch.are_deterministic_algorithms_enabled()))
    assert seen == [True] and not torch.are_deterministic_algorithms_enabled()


# ---- identity and sources -----------------------------------------------------------------------------------------


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


def test_evaluation_data_of_other_classes_or_tokens_is_refused(tmp_path: Path) -> None:
    data = Points(20)
    data.class_names = data.class_names[::-1]
    with pytest.raises(DataError, match="evaluation data points has the classes"):
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


# ---- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"cache": None}, UsageError, "there is no teacher: give a cache, or alpha 0"),
    ({"epochs": None}, UsageError, "give either epochs or max_steps"),
    ({"max_steps": 3}, UsageError, "give either epochs or max_steps"),
    ({"alpha": 1.5}, UsageError, "alpha is 1.5"),
    ({"ce_weight": 1.0}, UsageError, "give both, or neither"),
    ({"ce_weight": 0.0, "kd_weight": 0.0}, UsageError, "nothing to learn from"),
    ({"optimizer": "adamwx"}, UsageError, "optimizer 'adamwx' is unknown .did you mean 'adamw'"),
    ({"precision": "float8"}, UsageError, "precision 'float8' is unknown"),
    ({"best_by": "accuracy"}, UsageError, "best_by 'accuracy' is unknown .did you mean 'eval_accuracy'"),
    ({"best_by": "eval_perplexity", "eval_data": Points(8)}, UsageError, r"best_by is eval_perplexity, but .*_loss"),
    ({"lr": -1.0}, UsageError, "lr is -1.0"),
    ({"eval_every": 0}, UsageError, "eval_every is 0"),
    ({"seed": -1}, UsageError, "seed is -1"),
    ({"warmup": 1000.0}, UsageError, "warmup is 1000.0; expected 0 to"),
    ({"temperature": 3.0, "kind": "topk"}, UsageError, "temperature 3 was not stored in the cache; stored: 1, 2"),
    ({"kind": "none"}, UsageError, "kind 'none'"),
    ({"divergence": "jds"}, UsageError, "did you mean 'jsd'"),
    ({"beta": 0.5}, UsageError, "beta is 0.5, but divergence 'forward_kl' has none"),
    ({"divergence": "reverse_kl", "tail": "renormalise"}, UsageError, "is infinite"),
    ({"divergence": "jsd", "tail": "uniform"}, UsageError, "goes with divergence 'forward_kl' alone"),
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
])
def test_bad_options_are_one_clear_line_and_leave_nothing(tmp_path: Path, options: dict[str, Any],
                                                          error: type[Exception], message: str) -> None:
    options, data = dict(options), Points(20)
    kind = options.pop("kind", "full")
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7), kind=kind, tiers=(3,) if kind == "topk" else (),
                        features=[BODY])
    with pytest.raises(error, match=message) as caught:
        train_student(**{"student": Net(8), "out": tmp_path / "run", "cache": cache, "data": data, "epochs": 1,
                         **options})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_labels_are_needed_for_the_hard_loss_only(tmp_path: Path) -> None:
    data = Points(20)
    data.y = [None] * 20                                # type: ignore[assignment]
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7), labels=False)
    with pytest.raises(UsageError, match=r"neither the cache nor the data has labels; give alpha 1"):
        run(tmp_path / "run", Net(8), cache=cache, data=data, epochs=1)
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
    report = train_student(student=student, out=tmp_path / "run", cache=cache, data=data, epochs=2.5, batch_size=16,
                           dry_run=True, say=said.append)
    assert said[0].startswith("student: Net as given") and any("7 steps of 16 records" in line for line in said)
    assert report.dry_run and report.steps == 7 and report.epochs == 2.5 and not report.finished
    assert json.loads(json.dumps(report.to_json()))["steps"] == 7
    assert not (tmp_path / "run").exists() and equal_weights(student, Net(8, norm=True))
    with pytest.raises(UsageError, match="classes"):
        train_student(student=Net(8, classes=3), out=tmp_path / "run", cache=cache, data=data, epochs=1, dry_run=True)


# ---- reports ------------------------------------------------------------------------------------------------------


def test_a_missing_package_is_an_error_with_the_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="pip install wandb"):
        run(tmp_path / "run", Net(8), data=Points(8), alpha=0.0, epochs=1, report_to="wandb")
    assert not (tmp_path / "run").exists()


def test_reports_go_to_wandb_with_step_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []
    session = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)),
                                    finish=lambda: logged.append("finished"))
    started: dict[str, Any] = {}
    module = types.SimpleNamespace(init=lambda **options: started.update(options) or session)
    monkeypatch.setitem(sys.modules, "wandb", module)   # type: ignore[arg-type]
    lines = run(tmp_path / "run", Net(8), data=Points(8), alpha=0.0, epochs=2, batch_size=8, report_to=["wandb"])
    assert started["config"]["lr"] == 1e-3 and started["name"] == "run"
    assert [(line["step"], line["loss"]) for line in lines] == [(step, v["loss"]) for step, v in logged[:-1]]
    assert logged[-1] == "finished"


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    lines = run(tmp_path / "run", Net(8), data=Points(8), alpha=0.0, epochs=3, batch_size=8, report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == [(a["step"], a["loss"]) for a in lines]


# ---- optimizers ---------------------------------------------------------------------------------------------------


def test_the_schedule_is_a_warm_up_and_half_a_cosine() -> None:
    schedule = Schedule(2.0, 12, 4)
    assert [schedule.at(step) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert schedule.at(4) == 2.0 and schedule.at(8) == pytest.approx(1.0) and schedule.at(11) == pytest.approx(
        1 + math.cos(math.pi * 7 / 8))
    assert Schedule(2.0, 12, 0.25).warmup_steps == 3 and Schedule(1.0, 1).at(0) == 1.0


@pytest.mark.parametrize(("name", "decay"), [("adamw", 0.01), ("adam", 0.0), ("sgd", 0.0)])
def test_vectors_are_not_decayed(name: str, decay: float) -> None:
    named = trainable(("", Net(8, norm=True)))
    optimizer = make_optimizer(name, named, lr=0.1)
    by_id = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {key: by_id[id(p)] for key, p in named} == {
        "body.0.weight": decay, "body.0.bias": 0.0, "norm.weight": 0.0, "norm.bias": 0.0, "head.weight": decay,
        "head.bias": 0.0}
    assert make_optimizer(name, named, lr=0.1, weight_decay=0.3).param_groups[0]["weight_decay"] == 0.3


def test_clip_is_the_largest_norm_of_a_gradient_and_the_norm_before_it_is_reported(tmp_path: Path) -> None:
    """The first step of SGD moves the weights by lr times the gradient."""
    data, moved = Points(32), {}
    for clip in (0.0, 0.01, 1e6):
        student = Net(8)
        before = nn.utils.parameters_to_vector(student.parameters()).detach().clone()
        (line,) = run(tmp_path / f"{clip}", student, data=data, alpha=0.0, max_steps=1, batch_size=32, optimizer="sgd",
                      lr=0.5, clip=clip)
        step = nn.utils.parameters_to_vector(student.parameters()).detach() - before
        moved[clip] = float(step.norm()) / 0.5, line["grad_norm"]
    assert moved[0.0][0] == pytest.approx(moved[0.0][1], rel=1e-4) and moved[1e6] == pytest.approx(moved[0.0])
    assert moved[0.01] == pytest.approx((0.01, moved[0.0][1]), rel=1e-3)


def test_frozen_and_tied_parameters() -> None:
    net = Net(8)
    net.body.requires_grad_(False)
    net.again = net.head
    assert [name for name, _ in trainable(("", net))] == ["head.weight", "head.bias"]
    with pytest.raises(UsageError, match="nothing to train"):
        trainable(("", net.requires_grad_(False)))


def test_float16_scales_its_gradients(tmp_path: Path) -> None:
    # The command refuses it on the CPU, where it is slow; the arithmetic can be run there all the same.
    data = Points(32)
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7))
    loader = Loader(cache, data, batch_size=8, epochs=1)
    student, losses = Net(8), []
    settings = Settings(
        temperature=None, k=None, alpha=0.5, ce_weight=None, kd_weight=None, divergence="forward_kl", beta=None,
        tail="bucket", match=(), engine="auto", logits_memory=None, epochs=1, max_steps=None, batch_size=8,
        micro_batch_size=None, optimizer="sgd", lr=0.1, weight_decay=None, warmup=0, clip=1.0, precision="float16",
        compile=False, device="cuda", seed=0, shuffle=True, deterministic=False, eval_every=None, save_every=None,
        best_by="eval_loss", accept=())
    named = trainable(("", student))
    loop = Loop(student, loader, settings, optimizer=make_optimizer("sgd", named, lr=0.1), parameters=named,
                schedule=Schedule(0.1, 4))
    for step in loader.steps():
        losses.append(loop.run_step(step).loss.item())
    exact = run(tmp_path / "f32", Net(8), cache=cache, data=data, epochs=1, batch_size=8, optimizer="sgd", lr=0.1,
                clip=1.0)
    # float16 has 11 bits: logits of order 1 are off by up to 2^-11 in each layer.
    assert losses == pytest.approx([line["loss"] for line in exact], abs=2**-8)
    assert [line["grad_norm"] for line in loop.drain()] == pytest.approx([x["grad_norm"] for x in exact], rel=0.02)
    assert losses != [line["loss"] for line in exact] and loop.scaler is not None
    assert json.loads(json.dumps(loop.scaler.state_dict()))["scale"] == 2.0**16
