"""train_student: where numbers are reported; schedule, decay, clipping, frozen weights, the loss
scale of float16.
"""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from student_world import Net, Points, run, settings_of, write_cache
from torch import nn

from kdcache.errors import KDCacheError, UsageError
from kdcache.student.head import WholeLogits
from kdcache.student.loader import Loader
from kdcache.student.optim import (
    Schedule,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    trainable,
)
from kdcache.student.settings import filled
from kdcache.student.step import TrainStep


def test_a_missing_package_is_an_error_with_the_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="pip install wandb"):
        run(tmp_path / "run", Net(8), data=Points(8), alpha=0.0, epochs=1, report_to="wandb")
    assert not (tmp_path / "run").exists()


def test_reports_go_to_wandb_with_step_and_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[Any] = []
    session = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)),
        finish=lambda: logged.append("finished"),
    )
    started: dict[str, Any] = {}
    module = types.SimpleNamespace(init=lambda **options: started.update(options) or session)
    monkeypatch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]
    lines = run(
        tmp_path / "run",
        Net(8),
        data=Points(8),
        alpha=0.0,
        epochs=2,
        batch_size=8,
        report_to=["wandb"],
    )
    assert started["config"]["lr"] == 1e-3 and started["name"] == "run"
    assert [(line["step"], line["loss"]) for line in lines] == [
        (step, v["loss"]) for step, v in logged[:-1]
    ]
    assert logged[-1] == "finished"


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = run(
        tmp_path / "run",
        Net(8),
        data=Points(8),
        alpha=0.0,
        epochs=3,
        batch_size=8,
        report_to=["tensorboard"],
    )
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == [
        (a["step"], a["loss"]) for a in lines
    ]


# it leaves its file open then
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_under_tensorboard_names_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its writer meets it in a thread of its own, and says neither where nor to whom."""
    pytest.importorskip("tensorboard")
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(self: Any, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", full)
    before = threading.excepthook
    with pytest.raises(
        KDCacheError, match=r"run.tensorboard: disk full while reporting to tensorboard"
    ):
        run(
            tmp_path / "run",
            Net(8),
            data=Points(64),
            alpha=0.0,
            epochs=9,
            batch_size=8,
            report_to=["tensorboard"],
        )
    gc.collect()
    assert threading.excepthook is before and "Traceback" not in capfd.readouterr().err


# ---- optimizers
# ---------------------------------------------------------------------------------------------------


def test_adam_takes_decay_into_the_gradient_and_adamw_beside_it() -> None:
    """As torch's own two classes do; without a decay they are one."""
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3)) for _ in range(2))
        for p, optimizer in (
            (ours, make_optimizer(name, [("w", ours)], lr=0.1, weight_decay=0.3)),
            (theirs, kind([theirs], lr=0.1, weight_decay=0.3)),
        ):
            for _ in range(3):
                p.grad = p.detach().cos()
                optimizer.step()
        assert torch.equal(ours, theirs)


def test_the_schedule_is_a_warm_up_and_half_a_cosine() -> None:
    schedule = Schedule(2.0, 12, 4)
    assert [schedule.at(step) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert (
        schedule.at(4) == 2.0
        and schedule.at(8) == pytest.approx(1.0)
        and schedule.at(11) == pytest.approx(1 + math.cos(math.pi * 7 / 8))
    )
    # 1 is one step, and no part of them
    assert [Schedule(2.0, 12, float(n)).warmup_steps for n in (0, 1, 12)] == [0, 1, 12]
    assert Schedule(2.0, 12, 0.25).warmup_steps == 3 and Schedule(1.0, 1).at(0) == 1.0


@pytest.mark.parametrize(("name", "decay"), [("adamw", 0.01), ("adam", 0.0), ("sgd", 0.0)])
def test_vectors_are_not_decayed(name: str, decay: float) -> None:
    named = trainable(("", Net(8, norm=True)))
    assert filled({"optimizer": name}, None)["weight-decay"] == decay
    optimizer = make_optimizer(name, named, lr=0.1, weight_decay=0.3)
    by_id = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert {key: by_id[id(p)] for key, p in named} == {
        "body.0.weight": 0.3,
        "body.0.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "head.weight": 0.3,
        "head.bias": 0.0,
    }


def test_clip_is_the_largest_norm_of_a_gradient_and_the_norm_before_it_is_reported(
    tmp_path: Path,
) -> None:
    """The first step of SGD moves the weights by lr times the gradient."""
    data, moved = Points(32), {}
    for clip in (0.0, 0.01, 1e6):
        student = Net(8)
        before = nn.utils.parameters_to_vector(student.parameters()).detach().clone()
        (line,) = run(
            tmp_path / f"{clip}",
            student,
            data=data,
            alpha=0.0,
            max_steps=1,
            batch_size=32,
            optimizer="sgd",
            lr=0.5,
            clip=clip,
        )
        step = nn.utils.parameters_to_vector(student.parameters()).detach() - before
        moved[clip] = float(step.norm()) / 0.5, line["grad_norm"]
    assert moved[0.0][0] == pytest.approx(moved[0.0][1], rel=1e-4) and moved[1e6] == pytest.approx(
        moved[0.0]
    )
    assert moved[0.01] == pytest.approx((0.01, moved[0.0][1]), rel=1e-3)


def test_frozen_and_tied_parameters() -> None:
    net = Net(8)
    net.body.requires_grad_(False)
    net.again = net.head
    assert [name for name, _ in trainable(("", net))] == ["head.weight", "head.bias"]
    with pytest.raises(UsageError, match="nothing to train"):
        trainable(("", net.requires_grad_(False)))


def test_float16_scales_its_gradients(tmp_path: Path) -> None:
    # The command refuses it on the CPU, where it is slow; the arithmetic can be run there all the
    # same.
    data = Points(32)
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7))
    loader = Loader(cache, data, batch_size=8, epochs=1)
    student, numbers = Net(8), []
    settings = settings_of(
        cache.spec,
        "cuda",
        alpha=0.5,
        epochs=1,
        batch_size=8,
        optimizer="sgd",
        lr=0.1,
        clip=1.0,
        precision="float16",
    )
    named = trainable(("", student))
    step = TrainStep(
        WholeLogits(student, torch.device("cpu"), "float16"),
        loader,
        settings,
        optimizer=make_optimizer("sgd", named, lr=0.1, weight_decay=0.0),
        parameters=named,
        schedule=Schedule(0.1, 4),
    )
    for batch in loader.global_batches():
        numbers.append(dict(zip(step.names, step.run(batch).tolist(), strict=True)))
    losses = [found["loss"] for found in numbers]
    exact = run(
        tmp_path / "f32",
        Net(8),
        cache=cache,
        data=data,
        epochs=1,
        batch_size=8,
        optimizer="sgd",
        lr=0.1,
        clip=1.0,
    )
    # float16 has 11 bits: logits of order 1 are off by up to 2^-11 in each layer.
    assert losses == pytest.approx([line["loss"] for line in exact], abs=2**-8)
    assert [found["grad_norm"] for found in numbers] == pytest.approx(
        [x["grad_norm"] for x in exact], rel=0.02
    )
    assert losses != [line["loss"] for line in exact] and step.scaler is not None
    assert json.loads(json.dumps(step.scaler.state_dict()))["scale"] == 2.0**16


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_a_restored_optimizer_goes_on_as_if_it_had_never_stopped(name: str) -> None:
    """Four steps at once, and two, the tensors of the state, and two more in another optimizer: the
    same weights.
    """

    def stepped(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            for parameter in net.parameters():
                parameter.grad = torch.full_like(parameter, 0.1 * (step + 1))
            optimizer.step()

    nets = [Net(4), Net(4)]
    parameters = [trainable(("", net)) for net in nets]
    whole, first, second = (
        make_optimizer(name, own, lr=0.1, weight_decay=0.01)
        for own in (parameters[0], parameters[1], parameters[1])
    )
    stepped(nets[0], whole, range(4))
    stepped(nets[1], first, range(2))
    restore_optimizer(
        second,
        parameters[1],
        {k: v.clone() for k, v in optimizer_tensors(first, parameters[1]).items()},
    )
    stepped(nets[1], second, range(2, 4))
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(one, other)
