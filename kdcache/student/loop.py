"""The training step: forward and backward over micro-batches, one optimizer step, numbers kept on
the device.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kdcache.errors import KDCacheError, UsageError
from kdcache.loss.kd_loss import kd_loss_parts
from kdcache.models.model import Output, forward
from kdcache.student import checkpoint
from kdcache.student.batches import Micro, student_rows
from kdcache.student.head import Head
from kdcache.student.loader import Loader, LoaderBatch, Step
from kdcache.student.match import Matches
from kdcache.student.optim import Named, Schedule, set_lr
from kdcache.student.settings import PRECISIONS, Settings
from kdcache.user.guard import describe, let_through

log = logging.getLogger("kdcache")
# of an nn.Module: they are not plain attributes
NN_TABLES = ("_parameters", "_buffers", "_modules")
LOG_EVERY = 20  # steps between waits for the device, when their numbers are read


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What `on_step` is given after a step: `step` steps and `position` samples are done.

    loss: of the step's global batch, a scalar on the device; reading it waits for the device.
    model: the student.
    """

    step: int
    epoch: int
    position: int
    loss: Tensor
    model: nn.Module


class Loop:
    """Trains `student` with an optimizer on the steps of a loader.

    CE is averaged over the labelled rows and KD over the teacher's rows of the whole global batch,
    whatever the micro-batches; hint losses are averaged over its records (its rows, for features of
    level row). A loss of the student's own (`kdcache.models.model.OwnLoss`) is of each micro-batch, and
    averaged by records. With a `head` the student's logits are never whole.
    """

    def __init__(
        self,
        student: nn.Module,
        loader: Loader,
        settings: Settings,
        *,
        optimizer: Optimizer,
        parameters: Named,
        schedule: Schedule,
        matches: Matches | None = None,
        head: Head | None = None,
    ) -> None:
        self.student, self.loader, self.settings, self.head = student, loader, settings, head
        self.optimizer, self.schedule, self.matches = optimizer, schedule, matches
        self.named, self.parameters = parameters, [parameter for _, parameter in parameters]
        if matches is not None and settings.compile:
            raise UsageError(
                "compile and match cannot be used together: compiled code does not run the hooks"
            )
        levels = {feature.level for feature in loader.features}
        if len(levels) > 1 and loader.micro < loader.batch_size:
            raise UsageError(
                "features of records and of rows are averaged by different counts; with "
                "micro-batches "
                "match one or the other"
            )
        self._by_row = "row" in levels
        self._run: Any = torch.compile(student) if settings.compile else student
        device = loader.device.type
        self.scaler = torch.amp.GradScaler(device) if settings.precision == "float16" else None
        self._pending: list[tuple[dict[str, Any], Tensor, float]] = []
        # Whether anything was learned yet: decided by the first step that has rows; a run that goes
        # on has shown it.
        self._learns: bool | None = None if loader.start == 0 else True
        self._seen = 0
        self._consumed, self._since = 0, time.perf_counter()
        # whether the student has returned a loss of its own
        self._own = False

    def run_step(self, step: Step) -> StepInfo:
        """Forward, backward and optimizer step over one global batch. Nothing here waits for the
        device.
        """
        self.student.train()
        lr = self.schedule.at(step.index)
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        numbers = torch.zeros(4 + self._num_matches, device=self.loader.device)
        for micro in step.micros:
            numbers += self._backward(micro, step, self._run)
        norm = self._update()
        self._consumed += step.stop - step.start
        line = {
            "step": step.index + 1,
            "epoch": step.stop / self.loader.num_samples,
            "position": step.stop,
            "lr": lr,
        }
        counted = float("inf") if self.matches is not None else float(sum(step.counts))
        self._pending.append((line, torch.cat([numbers, norm.to(numbers)[None]]), counted))
        return StepInfo(step.index + 1, step.epoch, step.stop, numbers[0], self.student)

    def drain(self) -> list[dict[str, Any]]:
        """The metrics of the steps since the last call; one wait for the device."""
        if not self._pending:
            return []
        values = torch.stack([numbers for _, numbers, _ in self._pending]).tolist()
        now = time.perf_counter()
        rate = self._consumed / max(now - self._since, 1e-9)
        names = ["loss", "ce", "kd", *self._match_names(), "aux", "grad_norm"]
        lines = [
            {**line, **dict(zip(names, row, strict=True)), "samples_per_second": rate}
            for (line, _, _), row in zip(self._pending, values, strict=True)
        ]
        for (line, _, counted), row in zip(self._pending, values, strict=True):
            if self._learns is None and counted:
                self._learns, self._seen = bool(row[0] or row[-1]), line["step"]
        if not self._own:
            for line in lines:
                del line["aux"]
        self._pending, self._consumed, self._since = [], 0, now
        return lines

    def rehearse(self) -> None:
        """Forward and backward in training mode, as in a step, over the first micro-batch of the
        run and over its smallest; gradients are dropped, and everything else is as it was.

        KDCacheError for what the student raises, UsageError for a gradient that no optimizer here
        takes.
        """
        modules = [self.student, *([] if self.matches is None else [self.matches])]
        with unchanged():  # a collate_fn may draw
            micros = self.loader.extremes()
        for micro in micros:
            size = len(micro.piece.sample_ids)
            where = (
                f"{size} record{'s' * (size != 1)}, the "
                f"{'smallest' if micro is not micros[0] else 'first'} "
                "micro-batch of the run"
            )
            step = Step(0, 0, 0, size, [micro], micro.counts)
            with unchanged(*modules):
                self.student.train()
                try:
                    self._backward(micro, step, self.student)
                    self._check_gradients()
                except KDCacheError:
                    raise
                except Exception as e:
                    let_through(e)
                    smaller = (
                        "; give a --batch-size, --micro-batch-size or number of steps by which "
                        "every "
                        "micro-batch has more records"
                        if micro is not micros[0] or size == 1
                        else ""
                    )
                    if isinstance(e, torch.OutOfMemoryError):
                        smaller = "; give a smaller --micro-batch-size"
                    raise KDCacheError(
                        f"the student ({type(self.student).__name__}) cannot be trained on "
                        f"{where}: "
                        f"{describe(e)}{smaller}"
                    ) from e
                finally:
                    self.optimizer.zero_grad(set_to_none=True)

    def _check_gradients(self) -> None:
        for name, parameter in self.named:
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise UsageError(
                    f"the gradient of the student's {name!r} is sparse, and no optimizer or "
                    "clipping here "
                    "takes such a one; make its module without it (nn.Embedding: sparse=False)"
                )

    def check(
        self, lines: list[dict[str, Any]], saved: int | None = None, *, passed: bool = False
    ) -> None:
        """KDCacheError naming the first step whose loss is no finite number, or that nothing is
        learned.

        saved: the step of the last checkpoint. passed: the run or a whole epoch is over.
        """
        settings = self.settings
        if self._learns is False and settings.weight_kd:
            # D is 0 exactly where the two distributions are one: of a copy of the teacher that is
            # no mistake.
            log.warning(
                "warning: step %d: the loss and its gradient are exactly 0: the student says what "
                "its teacher "
                "says, to the bit, and has nothing to learn",
                self._seen,
            )
            self._learns = True
        elif self._learns is False:
            raise KDCacheError(
                f"step {self._seen}: nothing is learned: the loss and its gradient are exactly 0; "
                "has the student one class, or does none of its trained parameters reach its "
                "logits?"
            )
        if self._learns is None and passed and lines:
            raise KDCacheError(
                f"step {lines[-1]['step']}: nothing is learned: no record so far has a row or a "
                "label "
                "that counts (every label unknown or masked, or sequences of one token?)"
            )
        for line in lines:
            if not math.isfinite(line["loss"]):
                # The student may have diverged, or bytes may have changed under it after they were
                # proven.
                start = (line["position"] - 1) // settings.batch_size * settings.batch_size
                self.loader.prove(start, line["position"])
                advice = [
                    "a lower lr",
                    "a longer warmup" if settings.warmup else "a warmup",
                    "a smaller clip" if settings.clip else "a clip",
                    *(["precision float32"] if settings.precision != "float32" else []),
                ]
                last = f"the last checkpoint is of step {saved}"
                raise KDCacheError(
                    f"step {line['step']} (position {line['position']}): the loss is "
                    f"{line['loss']} (ce {line['ce']:.4g}, kd {line['kd']:.4g}); training has "
                    f"diverged: take {', '.join(advice[:-1])} or {advice[-1]}, under another --out; "
                    f"{'no checkpoint was saved' if saved is None else last}"
                )

    @property
    def pending(self) -> int:
        return len(self._pending)

    def rest_clock(self) -> None:
        """Leave the time since the last `drain` (an evaluation, a checkpoint) out of samples per
        second.
        """
        self._since = time.perf_counter()

    def _backward(self, micro: Micro, step: Step, run: Any) -> Tensor:
        """Gradients of one micro-batch, with the student as it is to `run`; its part of (loss, CE,
        KD, each match).
        """
        batch = self.loader.place(micro)
        with autocast(self.loader.device, self.settings.precision):
            output = (forward if self.head is None else self.head.trunk)(run, batch["inputs"])
        zero = torch.zeros((), device=self.loader.device)
        loss, parts = zero, [zero, zero]
        if batch["labels"] is not None or batch["targets"] is not None:
            loss, parts = self._soft_and_hard(output, micro, batch, step)
        if self.matches is not None:
            share = self._share(micro, step)
            loss = loss + share * self.matches(
                batch["features"], real=micro.collated.real, row_mask=row_mask(batch, output.logits)
            )
            parts += [share * value.to(zero) for value in self.matches.losses.values()]
        parts.append(zero)
        if output.own_loss is not None and output.own_loss.weight is not None:
            self._own, share = True, len(micro.piece.sample_ids) / (step.stop - step.start)
            loss = loss + share * output.own_loss.weight * output.own_loss.value
            parts[-1] = share * output.own_loss.value.detach().to(zero)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
        return torch.stack([loss.detach().to(zero), *parts])

    def _soft_and_hard(
        self, output: Output, micro: Micro, batch: LoaderBatch, step: Step
    ) -> tuple[Tensor, list[Tensor]]:
        # of logits, or of hidden states without the head
        rows_N = student_rows(output, micro, batch["rows"])
        asked: Any = {
            "ce_weight": self.settings.weight_ce,
            "kd_weight": self.settings.weight_kd,
            "label_weight": batch["label_weight"],
            "divergence": self.settings.divergence,
            "beta": self.settings.beta,
            "tail": self.settings.tail,
            "normalizer": step.counts,
            "engine": self.settings.engine,
            "classes": self.settings.classes,
        }
        if self.head is None:
            # a selection of rows is a copy that nobody else reads
            ours = batch["rows"] is not None
            parts = kd_loss_parts(rows_N, batch["labels"], batch["targets"], inplace=ours, **asked)
        else:
            with autocast(self.loader.device, self.settings.precision):
                parts = self.head.loss(rows_N, batch["labels"], batch["targets"], **asked)
        return parts.loss, [parts.ce.to(torch.float32), parts.kd.to(torch.float32)]

    def _update(self) -> Tensor:
        """Clip and step; the norm of the gradient before clipping."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.settings.clip:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return norm

    def _share(self, micro: Micro, step: Step) -> float:
        """The part of the global batch that a micro-batch is, as hint losses count."""
        if not self._by_row:
            return len(micro.piece.sample_ids) / (step.stop - step.start)
        rows = [0 if m.rows is None else len(m.rows[0]) for m in step.micros]
        return (0 if micro.rows is None else len(micro.rows[0])) / max(1, sum(rows))

    @property
    def _num_matches(self) -> int:
        return len(self._match_names())

    def _match_names(self) -> list[str]:
        matches = () if self.matches is None else self.matches.matches
        return [f"match {name}" for name in dict.fromkeys(map(str, matches))]


@contextlib.contextmanager
def unchanged(*modules: nn.Module) -> Iterator[None]:
    """Whatever runs inside, these modules' buffers, attributes and modes, and all generators, are
    put back bit for bit.

    Of attributes, tensors, generators and plain containers are copied; other objects are taken to
    be as they were.
    """
    every = [module for root in modules for module in root.modules()]
    kept = [
        (
            module,
            {key: _copied(value) for key, value in vars(module).items() if key not in NN_TABLES},
            {
                name: (value, None if value is None else _copied(value))
                for name, value in module._buffers.items()
            },
        )
        for module in every
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    scripted = [
        _copied(value)
        for module in every
        if isinstance(module, torch.jit.ScriptModule)
        for value in module.buffers(recurse=False)
    ]
    states = checkpoint.generators()
    try:
        yield
    finally:
        checkpoint.restore_generators(*states)
        for module, attributes, buffers in kept:
            module._buffers.clear()
            module._buffers.update(
                {name: value if back is None else back() for name, (value, back) in buffers.items()}
            )
            for key in [
                key for key in vars(module) if key not in NN_TABLES and key not in attributes
            ]:
                del vars(module)[key]
            vars(module).update({key: back() for key, back in attributes.items()})
        for back in scripted:
            back()


def _copied(value: Any) -> Callable[[], Any]:
    """A function that gives `value` back as it is now."""
    if isinstance(value, Tensor) and not value.is_inference():
        held = value.detach().clone()

        def back() -> Any:
            with torch.no_grad():
                value.copy_(held)
            return value

        return back
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: (value.set_state(state), value)[1]
    if type(value) in (list, dict, set, collections.deque):
        inside = copy.copy(value)

        def refill() -> Any:
            value.clear()
            (value.extend if type(value) in (list, collections.deque) else value.update)(inside)
            return value

        return refill
    return lambda: value


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The context of a forward pass in that precision; weights stay as they are."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, PRECISIONS[precision])


def row_mask(batch: LoaderBatch, logits: Tensor) -> Tensor | None:
    """bool (B, L): the positions that have a row; None where each record is one."""
    if batch["rows"] is None:
        return None
    mask_BL = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
    mask_BL[batch["rows"]] = True
    return mask_BL


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Refuse operations whose result varies from run to run; what was set before is put back."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    # cuBLAS reads it when it first starts
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
