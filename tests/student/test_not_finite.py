"""A loss that is no number, or a gradient of NaN, stops before the update: weights, optimizer and
statistics are those before the step, and so is what is saved.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from student_world import Net, Points, equal_weights, settings_of
from torch import Tensor, nn

from kdcache.errors import KDCacheError
from kdcache.student import metrics, trainer
from kdcache.student.head import WholeLogits
from kdcache.student.loader import Loader
from kdcache.student.optim import Schedule, make_optimizer, optimizer_tensors, trainable
from kdcache.student.step import TrainStep
from kdcache.student.train import train_student

SIZE, BAD = 8, 2  # records of a step; the step, from 0, that has a record of NaN
NAN = float("nan")


class Spoiled(Points):
    """Points, one of which is NaN."""

    def __init__(self, value: float = NAN) -> None:
        super().__init__(48)
        self.x[BAD * SIZE + 3, 0] = value


class NoGradient(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * NAN


class Broken(Net):
    """`Net` whose gradient is NaN in the step that has a point of 1000, its loss a number."""

    def forward(self, x: Tensor) -> Tensor:
        spoiled = bool((x == 1000.0).any())
        out = super().forward(x.clamp(-4, 4))
        return NoGradient.apply(out) if spoiled else out


def made(
    student: nn.Module, data: Points, name: str, fused: bool, precision: str = "float32"
) -> tuple[TrainStep, Loader]:
    loader = Loader(None, data, batch_size=SIZE, micro_batch_size=4, shuffle=False)
    parameters = trainable(("", student))
    step = TrainStep(
        WholeLogits(student, torch.device("cpu"), precision),
        loader,
        settings_of(None, "cuda", alpha=0.0, epochs=1, precision=precision, clip=1.0),
        optimizer=make_optimizer(name, parameters, lr=0.1, weight_decay=0.1, fused=fused),
        parameters=parameters,
        schedule=Schedule(0.1, 6),
    )
    step.rehearse()
    return step, loader


def state(step: TrainStep) -> dict[str, Tensor]:
    tensors = {**step.student.module.state_dict(), **optimizer_tensors(step.optimizer, step.named)}
    return {name: value.clone() for name, value in tensors.items()}


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("fused", [False, True], ids=["read", "flag"])
def test_nothing_is_updated_from_the_first_bad_step_on(kind: str, name: str, fused: bool) -> None:
    """Batch norms too; the steps after it are of good data, and update nothing either."""
    net, data = (Net, Spoiled()) if kind == "loss" else (Broken, Spoiled(1000.0))
    step, loader = made(net(8, norm=True), data, name, fused)
    before: dict[str, Tensor] = {}
    for batch in loader.global_batches():
        if batch.step == BAD:
            before = state(step)
            assert any("running_mean" in name for name in before) and len(before) > 10
        numbers = dict(zip(step.names, step.run(batch).tolist(), strict=True))
        bad = math.isnan(numbers["loss"] if kind == "loss" else numbers["grad_norm"])
        assert bad == (batch.step == BAD)
        assert step.stopped == (batch.step >= BAD and not fused)
    after = state(step)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_a_flag_changes_no_good_step(name: str) -> None:
    """A fused optimizer told that nothing is wrong is one that was told nothing."""
    told, loader = made(Net(8, norm=True), Points(48), name, True)
    plain, _ = made(Net(8, norm=True), Points(48), name, True)
    plain._stop = None  # its loss is read
    for batch in loader.global_batches():
        # NaN: statistics of steps that do not look
        torch.testing.assert_close(
            told.run(batch), plain.run(batch), rtol=0, atol=0, equal_nan=True
        )
    assert all(
        torch.equal(a, b) for a, b in zip(state(told).values(), state(plain).values(), strict=True)
    )


def test_an_infinite_gradient_of_float16_is_the_scalers_to_skip() -> None:
    step, loader = made(Net(8), Points(48), "sgd", False, "float16")
    assert step.scaler is not None
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    for batch in loader.global_batches():
        before = copy.deepcopy(step.student.module)
        numbers = dict(zip(step.names, step.run(batch).tolist(), strict=True))
        assert math.isfinite(numbers["loss"]) and not step.stopped
        assert math.isfinite(numbers["grad_norm"]) != equal_weights(before, step.student.module)
        if batch.step == 0:
            assert step.scaler.get_scale() == 2.0**39


def test_a_loss_of_nan_stops_float16_too() -> None:
    step, loader = made(Net(8), Spoiled(), "sgd", False, "float16")
    for batch in loader.global_batches():
        before = copy.deepcopy(step.student.module)
        step.run(batch)
        if step.stopped:
            break
    assert batch.step == BAD and equal_weights(before, step.student.module)


@pytest.mark.parametrize("fused", [False, True], ids=["read", "flag"])
def test_a_run_ends_as_it_was_before_the_bad_step(
    fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU in that step; behind a flag once the numbers are read, with the first bad step
    named all the same.
    """
    if fused:

        def make(*args: Any, **options: Any) -> Any:
            return make_optimizer(*args, **{**options, "fused": True})

        monkeypatch.setattr(trainer, "make_optimizer", make)
    student, kept = Net(8, norm=True), dict[int, nn.Module]()
    saved = "no checkpoint was saved" if fused else "the last checkpoint is of step 2"
    with pytest.raises(
        KDCacheError, match=rf"^step 3 \(position 24\): the loss is nan .*; {saved}$"
    ):
        train_student(
            student=student,
            out=tmp_path / "run",
            data=Spoiled(),
            alpha=0.0,
            batch_size=SIZE,
            shuffle=False,
            epochs=1,
            save_every=5 if fused else 1,
            on_step=lambda info: kept.update({info.step: copy.deepcopy(info.model)}),
        )
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 6 if fused else 4))
    assert [line["loss"] is None for line in lines][:3] == [False, False, True]
    assert list(kept) == list(range(1, 5 if fused else 3))
    assert equal_weights(student, kept[2]) and not equal_weights(student, kept[1])


def test_a_gradient_of_nan_is_named_in_its_step(tmp_path: Path) -> None:
    with pytest.raises(
        KDCacheError,
        match=r"^step 3 \(position 24\): the gradient of the loss \d.* is nan \(ce .* last "
        r"checkpoint is of step 2$",
    ):
        train_student(
            student=(student := Broken(8)),
            out=tmp_path / "run",
            data=Spoiled(1000.0),
            alpha=0.0,
            batch_size=SIZE,
            shuffle=False,
            epochs=1,
            save_every=1,
        )
    assert all(bool(value.isfinite().all()) for value in student.state_dict().values())
    saved = json.loads((tmp_path / "run" / "last" / "state.json").read_text())
    assert saved["step"] == BAD
