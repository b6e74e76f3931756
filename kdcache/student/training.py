"""One call's part of a run: steps, evaluations, checkpoints, and the report at the end."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from kdcache.data.workers import WorkerDied
from kdcache.errors import CacheCorrupt, KDCacheError, SpecMismatch
from kdcache.loss.engines import check_engine
from kdcache.models.model import Model
from kdcache.process.signals import Interrupted, Signals
from kdcache.runs import BEST, LAST, is_number
from kdcache.student import checkpoint
from kdcache.student.evaluate import evaluate_module
from kdcache.student.loader import Loader, Step
from kdcache.student.loop import LOG_EVERY, Loop, StepInfo
from kdcache.student.metrics import Metrics, OnMetrics
from kdcache.student.optim import (
    Schedule,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    trainable,
)
from kdcache.student.prepare import VIEW_KEY, Sources, check_student, versions
from kdcache.student.run_folder import RunFolder
from kdcache.student.settings import BEST_BY, Settings
from kdcache.user.guard import describe, passes

SAY_EVERY = 60.0  # seconds between lines of progress
CHECKED = 8  # records that are evaluated before a run begins
NOTHING_YET = "no step was trained yet; give the same command again"
SAVED = "step {} of {} is saved in {}; give the same command again to go on"
LOST = (
    "the steps since the last checkpoint in {} are lost; give the same command again to go on from "
    "it"
)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
OPTIMIZER, PROJECTIONS = "optimizer/", "projections/"  # in state.safetensors


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """What a run came to.

    finished: all steps are done. already_finished: they were before this call, which trained
    nothing. continued_from:
    the step of the checkpoint that this call began with, 0 for the beginning. training: loss, ce,
    kd, ... of the last step. evaluation: of the last weights, as `evaluate` gives it. last, best:
    step and `eval_...` of the checkpoints in last/ and best/, {} without evaluation data. best_by:
    the metric that best/ is best by. seconds: spent training, over all calls. defaults: sentences
    about what was not given.
    """

    out: str
    student: str
    device: str
    cache: str | None = None
    steps: int
    epochs: float
    position: int
    dry_run: bool = False
    finished: bool = False
    already_finished: bool = False
    continued_from: int = 0
    training: Mapping[str, float] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    last: Mapping[str, Any] = field(default_factory=dict)
    best: Mapping[str, Any] = field(default_factory=dict)
    best_by: str | None = None
    seconds: float = 0.0
    samples_per_second: float = 0.0
    accepted: tuple[str, ...] = ()
    defaults: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for json.dumps."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }


class Training:
    """One call's part of a run: the loop, when to evaluate and to save, and the state that a
    checkpoint holds.
    """

    def __init__(
        self,
        settings: Settings,
        sources: Sources,
        model: Model,
        folder: RunFolder,
        *,
        workers: int,
        live_teacher: nn.Module | None,
        say: Callable[[str], object] | None,
        signals: Signals,
    ) -> None:
        self.settings, self.sources, self.model, self.folder, self.signals = (
            settings,
            sources,
            model,
            folder,
            signals,
        )
        self.say = say or (lambda _: None)
        self.device = torch.device(settings.device)
        self.workers = workers
        names = dict.fromkeys(match.feature for match in settings.matches)
        self.loader = Loader(
            sources.cache,
            sources.samples,
            batch_size=settings.batch_size,
            micro_batch_size=settings.micro_batch_size,
            temperature=settings.temperature,
            k=settings.k,
            seed=settings.seed,
            shuffle=settings.shuffle,
            epochs=settings.epochs,
            max_steps=settings.max_steps,
            device=self.device,
            workers=workers,
            features=list(names),
            targets=bool(settings.weight_kd),
            live_teacher=live_teacher,
            rows=settings.rows,
            accept=[VIEW_KEY] * (VIEW_KEY in settings.accept),
            classes=settings.classes,
            num_classes=None
            if sources.cache is not None and sources.cache.spec.num_classes
            else sources.num_classes,
        )
        self.loader.check = signals.check
        checked = check_student(
            model,
            self.loader,
            settings,
            evaluated=sources.eval_samples is not None,
            best_by=settings.best_by or folder.options.get("best-by"),
        )
        self.head, self.matches, self.best_by, self.about = (
            checked.head,
            checked.matches,
            checked.best_by,
            checked.said,
        )
        if sources.eval_samples is not None:  # now, and not when an epoch is over
            evaluate_module(
                model.module,
                sources.eval_samples,
                batch_size=CHECKED,
                device=self.device,
                first=CHECKED,
                precision=settings.precision,
                classes=settings.classes,
                head=self.head,
                rows=self.loader.convention,
            )
            folder.options["best-by"] = self.best_by
        self._check_micro_batches()
        modules: list[tuple[str, nn.Module]] = [("", model.module)]
        modules += [] if self.matches is None else [("match:", self.matches)]
        self.parameters = trainable(*modules)
        self.optimizer = make_optimizer(
            settings.optimizer, self.parameters, lr=settings.lr, weight_decay=settings.weight_decay
        )
        schedule = Schedule(settings.lr, self.loader.total_steps, settings.warmup)
        self.loop = Loop(
            model.module,
            self.loader,
            settings,
            optimizer=self.optimizer,
            parameters=self.parameters,
            schedule=schedule,
            matches=self.matches,
            head=self.head,
        )
        self.step = self.position = self.continued_from = 0
        self.saved: int | None = None  # the step of last/
        # those that no state_dict has, before anything is trained
        self.buffers: dict[str, tuple[int, int]] = {}
        self.training: dict[str, float] = {}
        self.evaluation: dict[str, Any] = {}
        self.best: dict[str, Any] = {}
        self.seconds, self.since, self.said = 0.0, time.perf_counter(), 0.0

    def run(
        self,
        report_to: Sequence[str],
        on_step: Callable[[StepInfo], object] | None,
        on_metrics: OnMetrics | None,
    ) -> TrainReport:
        """Train to the end, from the last checkpoint if there is one. Interrupted, after saving, at
        the end of a step in which a signal came."""
        _seed(self.settings.seed)
        self.loop.rehearse()
        self.buffers = {
            name: _mark(value) for name, value in unsaved_buffers(self.model.module).items()
        }
        self.folder.create(
            {
                "loaded": self.model.loaded,
                "accepted": self._accepted(),
                "num-classes": self.loader.num_classes,
                "rows": self.loader.convention,
                "versions": versions(),
                **self._resolved(),
            }
        )
        if (last := self.folder.last()) is not None:
            self._restore(last)
        else:
            self._try_to_save()
        self._find_best()
        self.folder.amend(self.step)
        for line in self._start_block():
            self.say(line)
        metrics = Metrics(
            self.folder.path,
            step=self.step,
            report_to=report_to,
            options=self.folder.options,
            on_metrics=on_metrics,
            standing=self.folder.standing,
        )
        self.since = self.said = time.perf_counter()
        self.loop.rest_clock()
        self.signals.message = LOST.format(self.folder.path)
        self.signals.defer()
        with closing(metrics):
            self._steps(metrics, on_step)
        report = self.report(finished=True)
        self.folder.finish(_summary(report))
        self.say(
            f"finished: {self.folder.path}, {report.steps} steps, {report.samples_per_second:.0f} "
            "samples/s"
        )
        for name, found in ((LAST, report.last), (BEST, report.best)):
            if found:
                why = f" (by {self.best_by})" if name == BEST else ""
                self.say(f"{name}/{why}: step {found['step']}{_shown(found)}")
        return report

    def rehearse(self) -> TrainReport:
        """Say what would run, and report it; nothing is trained or written."""
        self.loop.rehearse()
        for line in self._start_block():
            self.say(line)
        return self.report(dry_run=True)

    def _steps(self, metrics: Metrics, on_step: Callable[[StepInfo], object] | None) -> None:
        with closing(self.loader.steps()) as steps:
            while (step := self._next(steps, metrics)) is not None:
                info = self._run_step(step)
                self.step, self.position = info.step, info.position
                self._after_step(metrics, step.start)
                if on_step is not None:
                    on_step(info)

    def _next(self, steps: Iterator[Step], metrics: Metrics) -> Step | None:
        """The next step, None after the last. While it is waited for no step is half done: what
        ends the wait (a signal, a worker that died) finds the steps before it saved."""
        try:
            return next(steps, None)
        except (Interrupted, WorkerDied) as e:
            if self.step != (self.saved or 0) and not self.signals.again:
                self._log(metrics)
                self._keep(metrics)
            if isinstance(e, WorkerDied):
                raise WorkerDied(
                    f"{e}{self.folder.standing()}; give the same command again to go on"
                ) from e
            if not self.step:
                self.signals.message = NOTHING_YET
            elif self.saved == self.step:
                self.signals.message = SAVED.format(
                    self.step, self.loader.total_steps, self.folder.path / LAST
                )
            self.signals.check()
            raise

    def _run_step(self, step: Step) -> StepInfo:
        """A step; KDCacheError naming it for whatever the student raises in it."""
        try:
            return self.loop.run_step(step)
        except BaseException as e:
            if passes(e):
                raise
            if isinstance(e, IndexError | RuntimeError) and not isinstance(
                e, torch.OutOfMemoryError
            ):
                # An id that is no class, for one, may be of bytes that changed after they were
                # proven.
                self.loader.prove(step.start, step.stop)
            advice = (
                "; give a smaller --micro-batch-size"
                if isinstance(e, torch.OutOfMemoryError)
                else ""
            )
            raise KDCacheError(
                f"step {step.index + 1}: training the student ({type(self.model.module).__name__}) "
                f"failed: {describe(e)}{advice}{self.folder.standing()}"
            ) from e

    def _keep(self, metrics: Metrics) -> None:
        """Save what is done, in last/."""
        self.folder.check()
        metrics.sync()
        self._save(LAST)
        self.saved = self.step

    def _log(self, metrics: Metrics, passed: bool = False) -> None:
        """Write the metrics of the steps since the last call. KDCacheError if a loss is no number."""
        lines = self.loop.drain()
        for line in lines:
            metrics.write(line)
        self.loop.check(lines, self.saved, passed=passed)
        if lines:
            self.training = {
                key: value
                for key, value in lines[-1].items()
                if key not in ("step", "epoch", "position")
            }

    def close(self) -> None:
        """Take the hooks off the student."""
        if self.matches is not None:
            self.matches.close()

    def report(self, **flags: bool) -> TrainReport:
        done = self.seconds + (time.perf_counter() - self.since if not flags.get("dry_run") else 0)
        cache = self.sources.cache
        return TrainReport(
            out=str(self.folder.path),
            student=self.model.loaded,
            device=str(self.device),
            cache=None if cache is None else cache.content_id,
            steps=self.loader.total_steps if flags.get("dry_run") else self.step,
            position=self.position,
            epochs=(self.loader.total if flags.get("dry_run") else self.position)
            / self.loader.num_samples,
            continued_from=self.continued_from,
            training=self.training,
            evaluation=self.evaluation,
            best=self.best,
            last=self._evaluated() if self.evaluation else {},
            best_by=self.best_by if self.best else None,
            seconds=done,
            samples_per_second=self.position / done if done and self.position else 0.0,
            accepted=tuple(self._accepted()),
            defaults=tuple(self._defaults()),
            **flags,
        )

    def _after_step(self, metrics: Metrics, start: int) -> None:
        last = self.position == self.loader.total
        evaluate = self.sources.eval_samples is not None and (
            last or self._due(self.settings.eval_every, start)
        )
        stopping = bool(self.signals.pending) and not last
        save = last or stopping or self._due(self.settings.save_every, start)
        if evaluate or save or self.loop.pending >= LOG_EVERY:
            self._log(metrics, passed=last or self.position >= self.loader.num_samples)
        if evaluate:
            self._evaluate(metrics)
        if save:
            self._keep(metrics)
        if evaluate or save:
            self.loop.rest_clock()
        if evaluate or time.perf_counter() - self.said > SAY_EVERY:
            self.said = time.perf_counter()
            self.say(
                f"step {self.step}/{self.loader.total_steps}"
                + _shown(
                    {
                        **self.training,
                        **{
                            f"eval_{key}": value
                            for key, value in (self.evaluation if evaluate else {}).items()
                        },
                    }
                )
            )
        if stopping:
            self.signals.message = SAVED.format(
                self.step, self.loader.total_steps, self.folder.path / LAST
            )
            self.signals.check()

    def _due(self, every: int | None, start: int) -> bool:
        """Whether `every` steps are over; by default, whether an epoch ended in the step that began
        at `start`.
        """
        if every is not None:
            return self.step % every == 0
        return self.position // self.loader.num_samples > start // self.loader.num_samples

    def _evaluate(self, metrics: Metrics) -> None:
        samples = self.sources.eval_samples
        if samples is None:
            return
        size = self.settings.micro_batch_size or self.settings.batch_size
        self.evaluation = evaluate_module(
            self.model.module,
            samples,
            batch_size=size,
            device=self.device,
            workers=self.workers,
            precision=self.settings.precision,
            classes=self.settings.classes,
            head=self.head,
            rows=self.loader.convention,
        )
        line, by = self._evaluated(), self.best_by
        metrics.write(
            {
                "step": self.step,
                "epoch": self.position / self.loader.num_samples,
                "position": self.position,
                **line,
            }
        )
        value = float(line[by])
        if not math.isnan(value) and (not self.best or BEST_BY[by] * (value - self.best[by]) > 0):
            self.best = line
            self.folder.check()
            metrics.sync()
            self._save(BEST)

    def _evaluated(self) -> dict[str, Any]:
        return {
            "step": self.step,
            **{f"eval_{key}": value for key, value in self.evaluation.items()},
        }

    def _save(self, name: str) -> None:
        """Save a checkpoint. KDCacheError if the folder is no longer the one in which the run
        began.
        """
        try:
            self._write(name, standing=self.folder.standing)
        except KDCacheError:
            # a folder that went away says more than the file that is missing
            self.folder.check()
            raise

    def _try_to_save(self) -> None:
        """Save what stands before the first step and read it back, so that no hour is lost to what
        cannot be saved.
        """
        try:
            self._write(checkpoint.TRIAL, standing=str)
            checkpoint.check_same(self.folder.path / checkpoint.TRIAL, self.model.module)
        finally:
            checkpoint.clear_trial(self.folder.path)

    def _write(self, name: str, *, standing: Callable[[], str]) -> None:
        tensors, values = checkpoint.generators()
        tensors |= {
            OPTIMIZER + key: value
            for key, value in optimizer_tensors(self.optimizer, self.parameters).items()
        }
        if self.matches is not None:
            tensors |= {
                PROJECTIONS + key: value
                for key, value in self.matches.projections.state_dict().items()
            }
        state = {
            "step": self.step,
            "position": self.position,
            "best": self.best,
            "evaluation": self.evaluation,
            "training": self.training,
            "seconds": self.seconds + time.perf_counter() - self.since,
            "scaler": None if self.loop.scaler is None else self.loop.scaler.state_dict(),
            "generators": values,
        }
        tensors |= {
            checkpoint.BUFFERS + key: value for key, value in self._changed_buffers().items()
        }
        checkpoint.save(self.folder.path / name, self.model, tensors, state, standing=standing)

    def _changed_buffers(self) -> dict[str, torch.Tensor]:
        """Buffers that training changed and that no state_dict has: without them a continued run
        would be another.
        """
        return {
            name: value
            for name, value in unsaved_buffers(self.model.module).items()
            if self.buffers.get(name) != _mark(value)
        }

    def _find_best(self) -> None:
        """What best/ itself says it is: after a kill it may be newer than last/, and it is what
        stays there.
        """
        values = checkpoint.values_of(self.folder.path / BEST)
        self.best = {} if values is None else checked_state(values, self.folder.path / BEST)["best"]
        if values is not None and self.best_by not in self.best:
            raise CacheCorrupt(
                f"{self.folder.path / BEST / checkpoint.VALUES} does not say its {self.best_by}; "
                "move "
                f"{self.folder.path / BEST} away to have another best/"
            )

    def _restore(self, folder: Path) -> None:
        """Go on from a checkpoint; CacheCorrupt if it is no state of this run."""
        tensors, state = checkpoint.load(folder, self.model.module)
        checked_state(state, folder)
        if not 0 < state["step"] <= self.loader.total_steps or state["position"] != min(
            state["step"] * self.loader.batch_size, self.loader.total
        ):
            raise CacheCorrupt(
                f"{folder / checkpoint.VALUES}: step {state['step']} at position "
                f"{state['position']} is "
                f"none of this run, which has {self.loader.total_steps} of {self.loader.batch_size}"
            )
        try:
            self._put_back(tensors, state)
        except (
            LookupError,
            TypeError,
            ValueError,
            RuntimeError,
            AttributeError,
            ArithmeticError,
        ) as e:
            raise CacheCorrupt(
                f"{folder} holds no state of this run ({describe(e)}); move {folder} away to begin "
                "again"
            ) from e

    def _put_back(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        restore_optimizer(self.optimizer, self.parameters, _under(OPTIMIZER, tensors))
        if self.matches is not None:
            self.matches.projections.load_state_dict(_under(PROJECTIONS, tensors))
        if self.loop.scaler is not None and state["scaler"]:
            self.loop.scaler.load_state_dict(state["scaler"])
        checkpoint.restore_generators(tensors, state["generators"])
        self.step, self.position, self.seconds = state["step"], state["position"], state["seconds"]
        self.evaluation, self.training = state["evaluation"], state["training"]
        self.loader.start, self.continued_from = self.position, self.step
        self.saved = self.step

    def _check_micro_batches(self) -> None:
        """SpecMismatch where another micro-batch size would change what is learned."""
        change = self.folder.changes.get("micro-batch-size", "").partition(":")[0]
        norms = [
            name
            for name, module in self.model.module.named_modules()
            if isinstance(module, BATCH_NORMS)
        ]
        # before a first checkpoint nothing was learned
        if change and norms and self.folder.last() is not None:
            raise SpecMismatch(
                f"{self.folder.path} is a run with another micro-batch size ({change}): batch "
                "norms, "
                f"such as the student's {norms[0]!r}, take their statistics over a micro-batch, so "
                "the "
                "same one is needed to continue; or name another --out"
            )

    def _accepted(self) -> list[str]:
        views = [VIEW_KEY] if VIEW_KEY in self.settings.accept else []
        return list(dict.fromkeys([*self.sources.accepted, *self.folder.accepted, *views]))

    def _resolved(self) -> dict[str, Any]:
        return {
            "temperature-used": self.loader.temperature,
            "ce-weight-used": self.settings.weight_ce,
            "kd-weight-used": self.settings.weight_kd,
            "total-steps": self.loader.total_steps,
        }

    def _defaults(self) -> list[str]:
        spec, said = self.loader.spec, list(self.sources.defaults)
        if self.settings.temperature is None and self.settings.weight_kd:
            kind = "one row per record" if spec is None or spec.rows == "one" else "rows of tokens"
            said.append(f"temperature {self.loader.temperature:g}, the default for {kind}")
        if (
            self.settings.k is None
            and spec is not None
            and spec.kind == "topk"
            and self.settings.weight_kd
        ):
            said.append(f"k {spec.k}, the largest tier of the cache")
        if self.settings.weight_decay is None:
            decay = self.optimizer.param_groups[0]["weight_decay"]
            said.append(f"weight decay {decay:g}, none on biases and norms")
        if self.sources.eval_samples is not None and self.settings.best_by is None:
            said.append(f"best/ is best by {self.best_by}")
        if self.sources.eval_samples is None:
            said.append("no evaluation data: no best/, only last/")
        return said

    def _start_block(self) -> Iterator[str]:
        cache, settings, loader = self.sources.cache, self.settings, self.loader
        yield (
            f"student: {self.model.loaded}, {sum(p.numel() for _, p in self.parameters):,} trained "
            "parameters"
        )
        yield from self.about
        yield from (f"warning: {note}" for note in self.sources.notes)
        yield (
            "cache: none"
            if cache is None
            else f"cache: {cache.path}, content {(cache.content_id or '')[:12]}"
        )
        cache_labels = cache is not None and bool(cache.spec.labels)
        if self.sources.samples is None:
            yield "inputs: the tokens of the cache" + (
                ", and its labels are the next of them"
                if settings.weight_ce and not cache_labels
                else ""
            )
        elif cache is not None and not cache_labels and settings.weight_ce:
            yield (
                "labels: those of the data; the cache keeps none, so that nobody compared them "
                "with the teacher's"
            )
        yield (
            f"rows by {loader.convention} ({'as in the cache' if loader.has_rows else loader.why})"
        )
        beta = "" if settings.beta is None else f", beta {settings.beta:g}"
        yield (
            f"loss: {settings.weight_ce:g} CE + {settings.weight_kd:g} T^2 {settings.divergence} "
            f"(tail {settings.tail}{beta}) at T = "
            f"{loader.temperature:g}"
            + "".join(f" + {match.weight:g} {match}" for match in settings.matches)
        )
        if self.matches is not None:
            yield from self.matches.learned()
        yield (
            f"{loader.total_steps} step{'' if loader.total_steps == 1 else 's'} of "
            f"{settings.batch_size} "
            f"record{'' if settings.batch_size == 1 else 's'}, {settings.optimizer}, "
            f"lr {settings.lr:g}, {settings.precision} on {self.device}, "
            f"engine {check_engine(settings.engine, self.device)}"
        )
        if self.head is not None:
            yield f"logits: {self.head}"
        yield from (f"default: {line}" for line in self._defaults())
        yield from (f"accepted: {name} differs" for name in self._accepted() if name != VIEW_KEY)
        if self.continued_from:
            yield f"continuing {self.folder.path} after step {self.step} (position {self.position})"
        yield from (f"from here on: {line}" for line in self.folder.changes.values())
        yield from self.folder.notes


def _summary(report: TrainReport) -> dict[str, Any]:
    """The report, evaluation and last losses at its top under the names of metrics.jsonl."""
    out = {key: value for key, value in report.to_json().items() if key != "evaluation"}
    return {**out, **{f"eval_{key}": value for key, value in report.evaluation.items()}}


def unsaved_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of `module` that its state_dict leaves out."""
    saved = module.state_dict()
    return {
        name: value
        for name, value in module.named_buffers()
        if name not in saved and not is_lazy(value)
    }


def _mark(value: torch.Tensor) -> tuple[int, int]:
    """What changes when a tensor is written to, or another takes its place."""
    return value.data_ptr(), -1 if value.is_inference() else value._version


def checked_state(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The values of a checkpoint, of the types that a run reads; CacheCorrupt naming the first that
    is not.
    """
    for name, right in STATE.items():
        if name not in values or not right(values[name]):
            raise CacheCorrupt(
                f"{folder / checkpoint.VALUES}: its {name!r} is not what a run saves; move "
                f"{folder} "
                "away to go on without this checkpoint"
            )
    return values


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(
        is_number(item) or item != item for item in value.values()
    )


def _best(value: Any) -> bool:
    return value == {} or (_numbers(value) and type(value.get("step")) is int)


def _random(value: Any) -> bool:
    """As `checkpoint.generators` gives it: of numpy three numbers, of Python a version, 625 words,
    a number or None.
    """
    return (
        isinstance(value, dict)
        and isinstance(value.get("numpy"), list)
        and len(value["numpy"]) == 3
        and all(map(is_number, value["numpy"]))
        and isinstance(value.get("python"), list)
        and len(value["python"]) == 3
        and isinstance(value["python"][1], list)
        and all(type(word) is int and 0 <= word < 2**32 for word in value["python"][1])
    )


# What state.json holds -> whether a value may stand there.
STATE: dict[str, Callable[[Any], bool]] = {
    "step": lambda value: type(value) is int,
    "position": lambda value: type(value) is int,
    "seconds": lambda value: is_number(value, 0) and value < math.inf,
    "best": _best,
    "evaluation": _numbers,
    "training": _numbers,
    "scaler": lambda value: value is None or _numbers(value),
    "generators": _random,
}


def _shown(values: Mapping[str, Any]) -> str:
    wanted = ("loss", "lr", "samples_per_second")
    return "".join(
        f", {key} {value:.4g}"
        for key, value in values.items()
        if key in wanted or key.startswith("eval_")
    )


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
