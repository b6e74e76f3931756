"""One optimizer step: forward, loss and backward over its micro-batches, then the update, which a
loss that is no number never reaches.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from kdcache.errors import KDCacheError, UsageError
from kdcache.loss.row_statistics import row_statistics
from kdcache.loss.targets import SoftTargets
from kdcache.models.model import Output
from kdcache.student.batch import LoaderBatch, MicroBatch, student_rows
from kdcache.student.head import WholeLogits
from kdcache.student.loader import GlobalBatch, Loader
from kdcache.student.match import Matches
from kdcache.student.optim import Named, Schedule, is_fused, set_lr
from kdcache.student.settings import Settings
from kdcache.student.state import generators, restore_generators
from kdcache.user.code_errors import describe, reraise_interrupt

# What `row_statistics` says of rows, as metrics.jsonl names their means: of the first LOOK_ROWS rows
# of every LOOK_EVERY-th step. That is two softmaxes more in twenty steps.
STATISTICS = ("entropy", "support_mass", "top1_agreement")
LOOK_EVERY, LOOK_ROWS = 20, 1024
# of an nn.Module: they are not plain attributes
NN_TABLES = ("_parameters", "_buffers", "_modules")


class TrainStep:
    """Trains a student with an optimizer on the global batches of a loader.

    CE is averaged over the labelled rows and KD over the teacher's rows of the whole global batch,
    whatever the micro-batches; hint losses are averaged over its records (its rows, for features of
    level row). A loss of the student's own (`models.model.OwnLoss`) is of each micro-batch,
    and averaged by records.

    A loss that is not finite, or a gradient of NaN, stops the training before the update:
    parameters, optimizer and statistics of batch norms are then as they were before that step. On
    the CPU, where reading is free, `stopped` says so at once. With a fused optimizer a flag on the
    device turns this update and all later ones into nothing, and nobody waits.
    """

    def __init__(
        self,
        student: WholeLogits,
        loader: Loader,
        settings: Settings,
        *,
        optimizer: Optimizer,
        parameters: Named,
        schedule: Schedule,
        matches: Matches | None = None,
    ) -> None:
        self.student, self.loader, self.settings = student, loader, settings
        self.optimizer, self.schedule, self.matches = optimizer, schedule, matches
        self.named, self.parameters = parameters, [parameter for _, parameter in parameters]
        if matches is not None and settings.compile:
            raise UsageError(
                "compile and match cannot be used together: compiled code does not run the hooks"
            )
        levels = {feature.level for feature in loader.features}
        if len(levels) > 1 and loader.micro_batch_size < loader.batch_size:
            raise UsageError(
                "features of records and of rows are averaged by different counts; with "
                "micro-batches match one or the other"
            )
        self._by_row = "row" in levels
        kinds = () if matches is None else dict.fromkeys(map(str, matches.matches))
        # of the numbers that `run` gives, as metrics.jsonl has them
        names = ["loss", "ce", "kd", *(f"match {kind}" for kind in kinds), "aux", "grad_norm"]
        self.names = [*names, *STATISTICS]
        self._means: Tensor | None = None  # of STATISTICS, in a step that looks
        self._run: Any = torch.compile(student.module) if settings.compile else student.module
        device = loader.device
        self.scaler = torch.amp.GradScaler(device.type) if settings.precision == "float16" else None
        # whether the student has returned a loss of its own
        self.has_own_loss = False
        self.stopped = False
        fused = self.scaler is None and is_fused(optimizer)
        # 1 from the step on whose update was not made; None where `stopped` says it
        self._stop = torch.zeros((), device=device) if fused else None
        # the buffers that a pass in training mode changes, once `rehearse` has seen one
        self._statistics: list[tuple[nn.Module, str]] = []

    def run(self, batch: GlobalBatch) -> Tensor:
        """Forward, backward and update over one global batch; its numbers, as `names` has them, on
        the device: float32 [len(names)].

        Nothing here waits for the device but a scaler of float16, which asks whether gradients
        overflowed, the row_mask of a student that returns one of its own, which is compared with
        the teacher's rows, a match of rows or of padded sequences, and an optimizer that is not
        fused, before whose update the loss is read.
        """
        self.student.module.train()
        set_lr(self.optimizer, self.schedule.at(batch.step))
        self.optimizer.zero_grad(set_to_none=True)
        kept = [module._buffers[name] for module, name in self._statistics]
        kept = [None if value is None else value.detach().clone() for value in kept]
        numbers = torch.zeros(self.names.index("grad_norm"), device=self.loader.device)
        for at, micro in enumerate(batch.micro_batches):
            look = at == 0 and batch.step % LOOK_EVERY == 0
            numbers += self._backward(micro, batch, self._run, look=look)
        norm = self._update(numbers[0])
        self._put_back(kept)
        means, self._means = self._means, None
        if means is None:
            means = torch.full((len(STATISTICS),), math.nan, device=numbers.device)
        return torch.cat([numbers, norm.to(numbers)[None], means.to(numbers)])

    def _backward(
        self, micro: MicroBatch, batch: GlobalBatch, run: Any, *, look: bool = False
    ) -> Tensor:
        """Gradients of one micro-batch, with the student as it is to `run`; its part of (loss, CE,
        KD, each match, own loss).
        """
        there = self.loader.to_device(micro)
        output = self.student.forward(run, there["inputs"])
        zero = torch.zeros((), device=self.loader.device)
        loss, parts = zero, [zero, zero]
        if there["labels"] is not None or there["targets"] is not None:
            loss, parts = self._soft_and_hard(output, micro, there, batch, look)
        if self.matches is not None:
            share = self._share(micro, batch)
            loss = loss + share * self.matches(
                there["features"], real=micro.collated.real, row_mask=row_mask(there, output.logits)
            )
            parts += [share * value.to(zero) for value in self.matches.losses.values()]
        parts.append(zero)
        own = output.own_loss
        if own is not None and own.weight is not None:
            self.has_own_loss, share = True, len(micro.index) / len(batch)
            loss = loss + share * own.weight * own.value
            parts[-1] = share * own.value.detach().to(zero)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
        return torch.stack([loss.detach().to(zero), *parts])

    def _soft_and_hard(
        self,
        output: Output,
        micro: MicroBatch,
        there: LoaderBatch,
        batch: GlobalBatch,
        look: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        settings, targets = self.settings, there["targets"]
        rows_N = student_rows(output, micro, there["rows"])
        # before the loss, which may write its gradient over them
        if look and targets is not None and len(rows_N):
            self._means = self._look(rows_N[:LOOK_ROWS], targets[:LOOK_ROWS])
        parts = self.student.loss(
            rows_N,
            there["labels"],
            targets,
            # a selection of rows is a copy that nobody else reads
            inplace=there["rows"] is not None,
            ce_weight=settings.ce_weight,
            kd_weight=settings.kd_weight,
            label_weight=there["label_weight"],
            divergence=settings.divergence,
            normalizer=batch.counts,
            engine=settings.engine,
            classes=settings.classes,
        )
        return parts.loss, [parts.ce.to(torch.float32), parts.kd.to(torch.float32)]

    @torch.no_grad()
    def _look(self, rows_N: Tensor, targets: SoftTargets) -> Tensor:
        """Means of STATISTICS over the rows that have a teacher; NaN where none has."""
        sums: Tensor | float = 0.0
        for part, logits in self.student.chunks(rows_N, self.settings.classes):
            teacher = targets[part]
            seen = row_statistics(logits, teacher)
            each = [seen.entropy_N, seen.mass_N, seen.agrees_N, torch.ones_like(seen.agrees_N)]
            if teacher.weight_N is not None:
                each = [x.where(teacher.weight_N != 0, 0) for x in each]
            sums = sums + torch.stack([x.to(seen.entropy_N).sum() for x in each])
        assert isinstance(sums, Tensor)  # there are rows
        return sums[:-1] / sums[-1]

    def _update(self, loss: Tensor) -> Tensor:
        """Clip and step, where the loss is a number; the norm of the gradient before clipping."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.settings.clip:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self._stop is not None:
            bad = ~loss.isfinite() | norm.isnan()
            self._stop = torch.maximum(self._stop, bad.to(self._stop))
            # what a GradScaler gives a fused optimizer: where it is 1, all stays as it is
            self.optimizer.found_inf = self._stop  # type: ignore[attr-defined]
            self.optimizer.step()
        elif self.stopped or not math.isfinite(loss) or (self.scaler is None and norm.isnan()):
            self.stopped = True
        elif self.scaler is None:
            self.optimizer.step()
        else:  # which leaves out a step of infinite gradients
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return norm

    @torch.no_grad()
    def _put_back(self, kept: list[Tensor | None]) -> None:
        """The statistics as they were, where the update was not made."""
        if self._stop is None and not self.stopped:
            return
        for (module, name), before in zip(self._statistics, kept, strict=True):
            now = module._buffers[name]
            if before is not None and now is not None and now.shape == before.shape:
                now.copy_(
                    before if self._stop is None else torch.where(self._stop > 0, before, now)
                )

    def _share(self, micro: MicroBatch, batch: GlobalBatch) -> float:
        """The part of the global batch that a micro-batch is, as hint losses count."""
        if not self._by_row:
            return len(micro.index) / len(batch)
        return micro.num_rows / max(1, sum(one.num_rows for one in batch.micro_batches))

    def rehearse(self) -> None:
        """Forward and backward in training mode, as in a step, over the first micro-batch of the
        run and over its smallest; gradients are dropped, and everything else is as it was.

        KDCacheError for what the student raises, UsageError for a gradient that no optimizer here
        takes.
        """
        module = self.student.module
        modules = [module, *([] if self.matches is None else [self.matches])]
        with unchanged():  # a collate_fn may draw
            micros = self.loader.extremes()
        for micro in micros:
            size = len(micro.index)
            where = (
                f"{size} record{'s' * (size != 1)}, the "
                f"{'smallest' if micro is not micros[0] else 'first'} micro-batch of the run"
            )
            with unchanged(*modules):
                module.train()
                before = _buffers(module)
                try:
                    self._backward(micro, GlobalBatch(0, 0, 0, size, [micro], micro.counts), module)
                    self._check_gradients()
                except KDCacheError:
                    raise
                except Exception as e:
                    reraise_interrupt(e)
                    smaller = (
                        "; give a --batch-size, --micro-batch-size or number of steps by which "
                        "every micro-batch has more records"
                        if micro is not micros[0] or size == 1
                        else ""
                    )
                    if isinstance(e, torch.OutOfMemoryError):
                        smaller = "; give a smaller --micro-batch-size"
                    raise KDCacheError(
                        f"the student ({type(module).__name__}) cannot be trained on {where}: "
                        f"{describe(e)}{smaller}"
                    ) from e
                finally:
                    self.optimizer.zero_grad(set_to_none=True)
                after = _buffers(module)
                self._statistics = [
                    (one, key[1])
                    for key, (one, value) in before.items()
                    if key in after and not torch.equal(value, after[key][1])
                ]

    def _check_gradients(self) -> None:
        for name, parameter in self.named:
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise UsageError(
                    f"the gradient of the student's {name!r} is sparse, and no optimizer or "
                    "clipping here takes such a one; make its module without it (nn.Embedding: "
                    "sparse=False)"
                )


def row_mask(batch: LoaderBatch, logits: Tensor) -> Tensor | None:
    """bool (B, L): the positions that have a row; None where each record is one."""
    if batch["rows"] is None:
        return None
    mask_BL = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
    mask_BL[batch["rows"]] = True
    return mask_BL


def _buffers(module: nn.Module) -> dict[tuple[int, str], tuple[nn.Module, Tensor]]:
    """A copy of each buffer, by its module and name. Batch norms write into theirs without a change
    of the version by which autograd tells what was written to.
    """
    return {
        (id(one), name): (one, value.detach().clone())
        for one in module.modules()
        if not isinstance(one, torch.jit.ScriptModule)
        for name, value in one._buffers.items()
        if value is not None and not is_lazy(value)
    }


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
    states = generators()
    try:
        yield
    finally:
        restore_generators(*states)
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
