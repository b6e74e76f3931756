"""One call's part of a run: steps, evaluations, checkpoints, and the report at the end."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.data.workers import WorkerDied
from kdcache.errors import CacheCorrupt, KDCacheError, SpecMismatch
from kdcache.models.model import Model
from kdcache.models.runs import BEST, LAST
from kdcache.process.signals import Interrupted, Signals
from kdcache.student import checkpoint
from kdcache.student.cache_and_data import VIEW_KEY, Sources
from kdcache.student.evaluate import evaluate_module
from kdcache.student.loader import GlobalBatch, Loader
from kdcache.student.metrics import Metrics, OnMetrics
from kdcache.student.optim import Schedule, make_optimizer, trainable
from kdcache.student.prepare import prepare_student
from kdcache.student.run_folder import RunFolder
from kdcache.student.run_report import TrainReport, numbers, start_lines, versions
from kdcache.student.settings import BEST_BY, Settings
from kdcache.student.state import Progress, RunState, checked_state, seed_generators
from kdcache.student.step import STATISTICS, TrainStep
from kdcache.user.code_errors import describe, passes

log = logging.getLogger("kdcache")
LOG_EVERY = 20  # steps between waits for the device, when their numbers are read
SAY_EVERY = 60.0  # seconds between lines of progress
CHECKED = 8  # records that are evaluated before a run begins
NOTHING_YET = "no step was trained yet; give the same command again"
SAVED = "step {} of {} is saved in {}; give the same command again to go on"
LOST = (
    "the steps since the last checkpoint in {} are lost; give the same command again to go on from "
    "it"
)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
OnStep = Callable[["StepInfo"], object]


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


@dataclass(frozen=True, slots=True)
class Due:
    """What is to be done after a step."""

    log: bool
    evaluate: bool
    save: bool
    stop: bool


class Pending:
    """The numbers of steps, left on the device until they are read together."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._steps: list[tuple[dict[str, Any], Tensor, float]] = []
        self._records, self._since = 0, time.perf_counter()

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, line: dict[str, Any], values: Tensor, records: int, count: float) -> None:
        """A step's line, with its values to come; count: of rows that its loss is about."""
        self._steps.append((line, values, count))
        self._records += records

    def read(self) -> tuple[list[dict[str, Any]], list[float]]:
        """The metrics of the steps since the last call, and their counts; one wait for the device."""
        if not self._steps:
            return [], []
        rows = torch.stack([values for _, values, _ in self._steps]).tolist()
        now = time.perf_counter()
        rate = self._records / max(now - self._since, 1e-9)
        lines = [
            {**line, **dict(zip(self.names, row, strict=True)), "samples_per_second": rate}
            for (line, _, _), row in zip(self._steps, rows, strict=True)
        ]
        counts = [count for _, _, count in self._steps]
        self._steps, self._records, self._since = [], 0, now
        return lines, counts

    def rest_clock(self) -> None:
        """Leave the time since the last `read` (an evaluation, a checkpoint) out of samples per
        second.
        """
        self._since = time.perf_counter()


class Trainer:
    """One call's part of a run: the steps, when to evaluate and to save, what is said of it."""

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
        self.settings, self.sources, self.model = settings, sources, model
        self.folder, self.signals, self.workers = folder, signals, workers
        self.say = say or (lambda _: None)
        self.loader = loader = Loader(
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
            device=settings.device,
            workers=workers,
            features=list(dict.fromkeys(match.feature for match in settings.matches)),
            targets=settings.kd_weight > 0,
            live_teacher=live_teacher,
            rows=settings.rows,
            accept=[VIEW_KEY] * (VIEW_KEY in settings.accept),
            classes=settings.classes,
            num_classes=None
            if sources.cache is not None and sources.cache.spec.num_classes
            else sources.num_classes,
        )
        loader.check = signals.check
        self.prepared = prepared = prepare_student(
            model,
            loader,
            settings,
            evaluated=sources.eval_samples is not None,
            best_by=settings.best_by or folder.options.get("best-by"),
        )
        if sources.eval_samples is not None:  # now, and not when an epoch is over
            self._evaluation(CHECKED, first=CHECKED)
            folder.options["best-by"] = prepared.best_by
        self._check_micro_batches()
        modules: list[tuple[str, nn.Module]] = [("", model.module)]
        modules += [] if prepared.matches is None else [("match:", prepared.matches)]
        parameters = trainable(*modules)
        self.train_step = TrainStep(
            prepared.student,
            loader,
            settings,
            optimizer=make_optimizer(
                settings.optimizer,
                parameters,
                lr=settings.lr,
                weight_decay=settings.weight_decay,
                fused=settings.device.type == "cuda" and settings.precision != "float16",
            ),
            parameters=parameters,
            schedule=Schedule(settings.lr, loader.total_steps, settings.warmup),
            matches=prepared.matches,
        )
        self.state = RunState(model, self.train_step)
        self.pending = Pending(self.train_step.names)
        self.progress = Progress()
        self.continued_from = 0
        self.saved: int | None = None  # the step of last/
        self.learns = False  # whether a step has shown that there is something to learn
        self.since = self.said = time.perf_counter()

    def run(
        self, report_to: Sequence[str], on_step: OnStep | None, on_metrics: OnMetrics | None
    ) -> TrainReport:
        """Train to the end, from the last checkpoint if there is one. Interrupted, after saving, at
        the end of a step in which a signal came."""
        settings, loader = self.settings, self.loader
        seed_generators(settings.seed)
        self.train_step.rehearse()
        self.state.watch_buffers()
        self.folder.create(
            {
                "loaded": self.model.loaded,
                "accepted": self.accepted(),
                "num-classes": loader.num_classes,
                "rows": loader.convention,
                "versions": versions(),
                "temperature-used": loader.temperature,
                "ce-weight-used": settings.ce_weight,
                "kd-weight-used": settings.kd_weight,
                "total-steps": loader.total_steps,
            }
        )
        if (last := self.folder.last()) is not None:
            self.progress = self.state.restore(last, loader.batch_size, loader.total)
            loader.start = self.progress.position
            self.continued_from = self.saved = self.progress.step
        else:
            self._try_to_save()
        self._find_best()
        self.folder.amend(self.progress.step)
        for line in start_lines(self):
            self.say(line)
        metrics = Metrics(
            self.folder.path,
            step=self.progress.step,
            report_to=report_to,
            options=self.folder.options,
            on_metrics=on_metrics,
            what_is_saved=self.folder.what_is_saved,
        )
        self.since = self.said = time.perf_counter()
        self.pending.rest_clock()
        self.signals.message = LOST.format(self.folder.path)
        self.signals.defer()
        with closing(metrics):
            self._steps(metrics, on_step)
        report = self.report(finished=True)
        self.folder.finish(report.summary())
        self.say(
            f"finished: {self.folder.path}, {report.steps} steps, {report.samples_per_second:.0f} "
            "samples/s"
        )
        for name, found in ((LAST, report.last), (BEST, report.best)):
            if found:
                why = f" (by {self.prepared.best_by})" if name == BEST else ""
                self.say(f"{name}/{why}: step {found['step']}{numbers(found)}")
        return report

    def rehearse(self) -> TrainReport:
        """Say what would run, and report it; nothing is trained or written."""
        self.train_step.rehearse()
        for line in start_lines(self):
            self.say(line)
        return self.report(dry_run=True)

    def close(self) -> None:
        """Take the hooks off the student."""
        if self.prepared.matches is not None:
            self.prepared.matches.close()

    # ---- steps

    def _steps(self, metrics: Metrics, on_step: OnStep | None) -> None:
        with closing(self.loader.global_batches()) as batches:
            while (batch := self._next(batches, metrics)) is not None:
                info = self._step(batch)
                self._after_step(metrics, self._due(batch.start))
                if on_step is not None:
                    on_step(info)

    def _next(self, batches: Iterator[GlobalBatch], metrics: Metrics) -> GlobalBatch | None:
        """The next batch, None after the last. While it is waited for no step is half done: what
        ends the wait (a signal, a worker that died) finds the steps before it saved."""
        try:
            return next(batches, None)
        except (Interrupted, WorkerDied) as e:
            if self.progress.step != (self.saved or 0) and not self.signals.again:
                self._log(metrics)
                self._keep(metrics)
            if isinstance(e, WorkerDied):
                raise WorkerDied(
                    f"{e}{self.folder.what_is_saved()}; give the same command again to go on"
                ) from e
            if not self.progress.step:
                self.signals.message = NOTHING_YET
            elif self.saved == self.progress.step:
                self._say_saved()
            self.signals.check()
            raise

    def _step(self, batch: GlobalBatch) -> StepInfo:
        """A step; KDCacheError naming it for whatever the student raises in it."""
        train_step, module = self.train_step, self.model.module
        try:
            values = train_step.run(batch)
        except BaseException as e:
            if passes(e):
                raise
            too_large = isinstance(e, torch.OutOfMemoryError)
            if isinstance(e, IndexError | RuntimeError) and not too_large:
                # An id that is no class, for one, may be of bytes that changed after they were
                # proven.
                self.loader.prove(batch.start, batch.stop)
            advice = "; give a smaller --micro-batch-size" if too_large else ""
            raise KDCacheError(
                f"step {batch.step + 1}: training the student ({type(module).__name__}) failed: "
                f"{describe(e)}{advice}{self.folder.what_is_saved()}"
            ) from e
        step, position = batch.step + 1, batch.stop
        line = {
            "step": step,
            "epoch": position / self.loader.num_samples,
            "position": position,
            "lr": train_step.schedule.at(batch.step),
        }
        counts = math.inf if train_step.matches is not None else sum(batch.counts)
        self.pending.add(line, values, len(batch), counts)
        self.progress.step, self.progress.position = step, position
        return StepInfo(step, batch.epoch, position, values[0], module)

    def _due(self, start: int) -> Due:
        """What is due after the step that began at position `start`."""
        settings = self.settings
        last = self.progress.position == self.loader.total
        stop = bool(self.signals.pending) and not last
        evaluate = self.sources.eval_samples is not None and (
            last or self._is_time(settings.eval_every, start)
        )
        save = last or stop or self._is_time(settings.save_every, start)
        read = len(self.pending) >= LOG_EVERY or self.train_step.stopped
        return Due(evaluate or save or read, evaluate, save, stop)

    def _is_time(self, every: int | None, start: int) -> bool:
        """Whether `every` steps are over; by default, whether an epoch ended in the step that began
        at `start`.
        """
        if every is not None:
            return self.progress.step % every == 0
        return self.progress.position // self.loader.num_samples > start // self.loader.num_samples

    def _after_step(self, metrics: Metrics, due: Due) -> None:
        # First the numbers are read and checked: a student that has diverged must not take the
        # place of the last good checkpoint, nor be evaluated.
        if due.log:
            done, loader = self.progress.position, self.loader
            self._log(metrics, passed=done == loader.total or done >= loader.num_samples)
        if due.evaluate:
            self._evaluate(metrics)
        if due.save:
            self._keep(metrics)
        if due.evaluate or due.save:
            self.pending.rest_clock()
        if due.evaluate or time.perf_counter() - self.said > SAY_EVERY:
            self.said = time.perf_counter()
            found = self._evaluated() if due.evaluate else {}
            step, total = self.progress.step, self.loader.total_steps
            self.say(f"step {step}/{total}{numbers({**self.progress.training, **found})}")
        if due.stop:
            self._say_saved()
            self.signals.check()

    def _say_saved(self) -> None:
        self.signals.message = SAVED.format(
            self.progress.step, self.loader.total_steps, self.folder.path / LAST
        )

    # ---- numbers

    def _log(self, metrics: Metrics, passed: bool = False) -> None:
        """Write the metrics of the steps since the last call. KDCacheError if a loss is no number,
        or nothing is learned.

        passed: the run or a whole epoch is over.
        """
        lines, counts = self.pending.read()
        for line in lines:
            if not self.train_step.has_own_loss:
                del line["aux"]
            for name in STATISTICS:  # of steps that looked alone
                if math.isnan(line[name]):
                    del line[name]
        for line in lines:
            metrics.write(line)
        self._check_learning(lines, counts, passed)
        for line in lines:
            self._check_finite(line)
        if lines:
            self.progress.training = {
                key: value
                for key, value in lines[-1].items()
                if key not in ("step", "epoch", "position")
            }

    def _check_learning(
        self, lines: list[dict[str, Any]], counts: list[float], passed: bool
    ) -> None:
        """KDCacheError where there is nothing to learn from; decided by the first step that has
        rows, or something to match."""
        if self.learns or not lines:
            return
        first = next((line for line, count in zip(lines, counts, strict=True) if count), None)
        if first is None:
            if passed:
                raise KDCacheError(
                    f"step {lines[-1]['step']}: nothing is learned: no record so far has a row or "
                    "a label that counts (every label unknown or masked, or sequences of one "
                    "token?)"
                )
            return
        self.learns = True
        if first["loss"] or first["grad_norm"]:
            return
        if not self.settings.kd_weight:
            raise KDCacheError(
                f"step {first['step']}: nothing is learned: the loss and its gradient are exactly "
                "0; has the student one class, or does none of its trained parameters reach its "
                "logits?"
            )
        # D is 0 exactly where the two distributions are one: of a copy of the teacher that is no
        # mistake.
        log.warning(
            "warning: step %d: the loss and its gradient are exactly 0: the student says what its "
            "teacher says, to the bit, and has nothing to learn",
            first["step"],
        )

    def _check_finite(self, line: dict[str, Any]) -> None:
        """KDCacheError naming the step whose update was not made: its loss is no finite number, or
        its gradient is NaN."""
        settings, loss, norm = self.settings, line["loss"], line["grad_norm"]
        if math.isfinite(loss) and not (math.isnan(norm) and self.train_step.scaler is None):
            return
        # The student may have diverged, or bytes may have changed under it after they were proven.
        start = (line["position"] - 1) // settings.batch_size * settings.batch_size
        self.loader.prove(start, line["position"])
        advice = [
            "a lower lr",
            "a longer warmup" if settings.warmup else "a warmup",
            "a smaller clip" if settings.clip else "a clip",
            *(["precision float32"] if settings.precision != "float32" else []),
        ]
        what = f"the loss is {loss}"
        if math.isfinite(loss):
            what = f"the gradient of the loss {loss:.4g} is {norm}"
        saved = (
            "no checkpoint was saved"
            if self.saved is None
            else f"the last checkpoint is of step {self.saved}"
        )
        raise KDCacheError(
            f"step {line['step']} (position {line['position']}): {what} (ce {line['ce']:.4g}, kd "
            f"{line['kd']:.4g}); training has diverged: take {', '.join(advice[:-1])} or "
            f"{advice[-1]}, under another --out; {saved}"
        )

    # ---- evaluation and checkpoints

    def _evaluation(
        self, batch_size: int, *, workers: int = 0, first: int | None = None
    ) -> dict[str, Any]:
        assert self.sources.eval_samples is not None
        return evaluate_module(
            self.prepared.student,
            self.sources.eval_samples,
            batch_size=batch_size,
            workers=workers,
            first=first,
            classes=self.settings.classes,
            rows=self.loader.convention,
        )

    def _evaluate(self, metrics: Metrics) -> None:
        """Evaluate the student, and save it in best/ if it is better than that."""
        progress, by = self.progress, self.prepared.best_by
        progress.evaluation = self._evaluation(self.settings.micro_batch_size, workers=self.workers)
        found = self._evaluated()
        epoch = progress.position / self.loader.num_samples
        metrics.write(
            {"step": progress.step, "epoch": epoch, "position": progress.position, **found}
        )
        value = float(found[by])
        best = progress.best.get(by)
        if not math.isnan(value) and (best is None or BEST_BY[by] * (value - best) > 0):
            progress.best = found
            self.folder.check()
            metrics.sync()
            self._save(BEST)

    def _evaluated(self) -> dict[str, Any]:
        found = {f"eval_{key}": value for key, value in self.progress.evaluation.items()}
        return {"step": self.progress.step, **found}

    def _keep(self, metrics: Metrics) -> None:
        """Save what is done, in last/."""
        self.folder.check()
        metrics.sync()
        self._save(LAST)
        self.saved = self.progress.step

    def _save(self, name: str) -> None:
        """Save a checkpoint. KDCacheError if the folder is no longer the one in which the run
        began.
        """
        now = dataclasses.replace(self.progress, seconds=self._seconds())
        try:
            self.state.save(self.folder.path / name, now, what_is_saved=self.folder.what_is_saved)
        except KDCacheError:
            # a folder that went away says more than the file that is missing
            self.folder.check()
            raise

    def _try_to_save(self) -> None:
        """Save what stands before the first step and read it back, so that no hour is lost to what
        cannot be saved.
        """
        trial = self.folder.path / checkpoint.TRIAL
        try:
            self.state.save(trial, self.progress, what_is_saved=str)
            checkpoint.check_same(trial, self.model.module)
        finally:
            checkpoint.clear_trial(self.folder.path)

    def _find_best(self) -> None:
        """What best/ itself says it is: after a kill it may be newer than last/, and it is what
        stays there.
        """
        folder, by = self.folder.path / BEST, self.prepared.best_by
        values = checkpoint.values_of(folder)
        self.progress.best = {} if values is None else checked_state(values, folder)["best"]
        if values is not None and by not in self.progress.best:
            raise CacheCorrupt(
                f"{folder / checkpoint.VALUES} does not say its {by}; move {folder} away to have "
                "another best/"
            )

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
                f"norms, such as the student's {norms[0]!r}, take their statistics over a "
                "micro-batch, so the same one is needed to continue; or name another --out"
            )

    # ---- the report

    def report(self, *, dry_run: bool = False, finished: bool = False) -> TrainReport:
        """What the run came to, or would be."""
        progress, loader, cache = self.progress, self.loader, self.sources.cache
        seconds = progress.seconds if dry_run else self._seconds()
        done = loader.total if dry_run else progress.position
        return TrainReport(
            out=str(self.folder.path),
            student=self.model.loaded,
            device=str(self.settings.device),
            cache=None if cache is None else cache.content_id,
            steps=loader.total_steps if dry_run else progress.step,
            position=progress.position,
            epochs=done / loader.num_samples,
            continued_from=self.continued_from,
            training=progress.training,
            evaluation=progress.evaluation,
            best=progress.best,
            last=self._evaluated() if progress.evaluation else {},
            best_by=self.prepared.best_by if progress.best else None,
            seconds=seconds,
            samples_per_second=progress.position / seconds if seconds else 0.0,
            accepted=tuple(self.accepted()),
            defaults=tuple(self.defaults()),
            dry_run=dry_run,
            finished=finished,
        )

    def _seconds(self) -> float:
        """Spent training, over all calls."""
        return self.progress.seconds + time.perf_counter() - self.since

    def accepted(self) -> list[str]:
        """What differs and was accepted by name."""
        views = [VIEW_KEY] if VIEW_KEY in self.settings.accept else []
        return list(dict.fromkeys([*self.sources.accepted, *self.folder.accepted, *views]))

    def defaults(self) -> list[str]:
        """Sentences about what was not given."""
        evaluated = self.sources.eval_samples is not None
        if evaluated and self.settings.best_by is None:
            return [*self.settings.defaults, f"best/ is best by {self.prepared.best_by}"]
        none = [] if evaluated else ["no evaluation data: no best/, only last/"]
        return [*self.settings.defaults, *none]
