"""`train_student`: from a cache (or hard labels alone) to a student, in a folder from which the
same call continues.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kdcache.models.model import as_model, move, pick_device
from kdcache.models.runs import plain_arguments
from kdcache.process.ranks import refuse_ranks
from kdcache.process.signals import Signals
from kdcache.student import checkpoint
from kdcache.student.cache_and_data import one_cache, open_sources
from kdcache.student.metrics import check_reporters
from kdcache.student.prepare import check_classes, check_pictures, check_text
from kdcache.student.run_folder import RunFolder
from kdcache.student.run_report import TrainReport, finished_report
from kdcache.student.settings import check_options, check_used, filled, resolve, texts
from kdcache.student.state import deterministic as deterministic_mode
from kdcache.student.state import own_generators
from kdcache.student.trainer import NOTHING_YET, StepInfo, Trainer
from kdcache.user.arguments import check_workers
from kdcache.user.code_errors import callback, entrance

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache


@entrance
def train_student(
    *,
    student: Any,
    out: str | Path,
    cache: Cache | str | Path | Sequence[Any] | None = None,
    data: Any = None,
    eval_data: Any = None,
    temperature: float | None = None,
    alpha: float | None = None,
    rows: str | None = None,
    ce_weight: float | None = None,
    kd_weight: float | None = None,
    divergence: str | None = None,
    beta: float | None = None,
    tail: str | None = None,
    k: int | None = None,
    classes: int | None = None,
    match: Sequence[str] = (),
    epochs: float | None = None,
    max_steps: int | None = None,
    batch_size: int = 128,
    micro_batch_size: int | None = None,
    optimizer: str = "adamw",
    lr: float = 1e-3,
    weight_decay: float | None = None,
    warmup: float = 0.0,
    clip: float = 0.0,
    precision: str = "float32",
    compile: bool = False,
    device: str | torch.device | None = None,
    workers: int = 0,
    seed: int = 0,
    shuffle: bool = True,
    deterministic: bool = False,
    eval_every: int | None = None,
    save_every: int | None = None,
    best_by: str | None = None,
    report_to: Sequence[str] = (),
    accept: Sequence[str] = (),
    dry_run: bool = False,
    student_args: Mapping[str, Any] | None = None,
    student_weights: str | Path | None = None,
    data_args: Mapping[str, Any] | None = None,
    eval_data_args: Mapping[str, Any] | None = None,
    engine: str = "auto",
    logits_memory: str | int | None = None,
    live_teacher: nn.Module | None = None,
    on_step: Callable[[StepInfo], object] | None = None,
    on_metrics: Callable[[dict[str, Any]], object] | None = None,
    say: Callable[[str], object] | None = None,
) -> TrainReport:
    """Train `student` on what a teacher said, and keep run and weights in the folder `out`.

    The same call again continues from the last checkpoint, inside an epoch too; on the CPU to the
    same losses and weights, bit for bit. Other options are refused (SpecMismatch lists them) but
    for those that leave the mathematics as it is: cache (the content counts, not the place),
    workers, report_to, accept, eval_every, save_every, micro_batch_size, engine, logits_memory,
    compile and deterministic; run.toml keeps what changed. Other data is a DataError. A finished
    run returns its report and puts its last weights into a student that is an object, as the first
    call did; anything else at `out` is CacheExists, and one process at a time trains there.

    cache          of `dump_teacher`, or its path; without one only alpha 0 (hard labels), on the
                   same batches
    student        a model SPEC with student_args and student_weights, a module or a `Model`
    data           a dataset or data SPEC; None takes inputs from the cache's tokens. eval_data:
                   evaluated on
    temperature    of soft targets; 2 by default, 1 for token caches. k: a tier of the cache, by
                   default the largest
    rows           "record", "position" or "next-token", as `dump_teacher` has them, where no cache
                   says so
    loss           ce_weight * CE + kd_weight * T^2 * D (alpha sets 1 - alpha and alpha: 0.5, and 1
                   where the cache keeps no labels: the data's train only where alpha or weights are
                   given), + weight * each `match`, "STUDENT_MODULE=FEATURE:LOSS[:WEIGHT]", + what a
                   mixture of experts asks for in its config. divergence, beta, tail, engine: see
                   `kd_loss`
    classes        cuts the student's logits, and a live teacher's, to the first so many, at least
                   the V of the cache. Without it all are classes: to the teacher those from V on
                   have probability 0
    logits_memory  "512 MB": the student's head runs inside the loss (see `kd_linear_loss`), its
                   logits never whole, in chunks of this size; for models whose head is an nn.Linear
                   with nothing after it but a scale or soft cap that the config names, as `Head`
                   has them prove
    epochs         or max_steps: how long. batch_size records make a step, in forward passes of
                   micro_batch_size
    optimizer      adamw, adam or sgd; biases and norms are not decayed. warmup: steps, or a part of
                   all below 1; then half a cosine to 0. clip: largest norm of the gradient, 0 for
                   none
    precision      float32, bfloat16 or float16 (autocast; float16 not on the CPU)
    seed           of initial weights, order and dropout; the caller's generators are left as they
                   were
    eval_every     steps between evaluations, save_every between checkpoints; once an epoch by
                   default, and at the end
    best_by        eval_loss, eval_accuracy, eval_accuracy_top5 or eval_perplexity: what best/ is
                   best by; by default eval_accuracy where the evaluation has one, else eval_loss
    report_to      "tensorboard", "wandb"; metrics.jsonl is always written
    accept         identity fields, "class_names" or "view_key", whose difference is harmless;
                   "unsteady" for a student whose answer depends on what shares its batch; also
                   "data.probe", "eval_data.name", ... where a run goes on with other data; recorded
                   in run.toml
    dry_run        check everything, train nothing, write nothing
    live_teacher   a module run in the loop in place of the cache's rows
    on_step        called with a `StepInfo` after each step; on_metrics with each line of
                   metrics.jsonl; say with lines for people

    IdentityMismatch for data or a tokenizer that the teacher did not see; DataError where keys,
    labels or rows are not the cache's; UsageError for options that cannot be used; KDCacheError
    naming the step if the loss is not finite; Interrupted on SIGINT or SIGTERM, once the step is
    done and saved; KDCacheError for whatever the code of student, data or callbacks raises, and
    where a worker process dies, once the steps before are saved.
    """
    given = dict(locals())  # the arguments by name: nothing else is there yet
    refuse_ranks("training")
    check_workers(workers)
    picked, say = pick_device(device), callback("say", say)
    options = check_options(given, picked)
    check_used(given)
    check_reporters(texts(report_to))
    cache = one_cache(cache)
    spec = None if cache is None else cache.spec
    settings = resolve(options, spec, live_teacher=live_teacher, evaluated=eval_data is not None)
    sources = open_sources(
        cache,
        data,
        eval_data,
        data_args=data_args,
        eval_data_args=eval_data_args,
        accept=settings.accept,
        labels=bool(settings.ce_weight),
        student=student,
    )
    sources.recorded |= {
        key: type(value).__name__
        for key, value in (("student", student), ("live-teacher", live_teacher))
        if value is not None and not isinstance(value, str | Path)
    }
    table = _table(
        {
            "student": student,
            "student-weights": student_weights,
            "data": data,
            "eval-data": eval_data,
            "cache": None if cache is None else str(cache.path),
            "report-to": texts(report_to),
        },
        {"student-arg": student_args, "data-arg": data_args, "eval-data-arg": eval_data_args},
        {"workers": workers, **settings.options},
    )
    with (
        Signals(NOTHING_YET) as signals,
        own_generators(),
        deterministic_mode(settings.deterministic),
        RunFolder(
            out,
            table,
            sources.recorded,
            accept=settings.accept,
            resolve=partial(filled, spec=spec),
        ) as folder,
    ):
        if not dry_run:
            folder.hold()
        report = None if folder.summary is None else finished_report(folder, say)
        if report is not None and (dry_run or isinstance(student, str | Path)):
            return report
        model = as_model(
            student,
            role="student",
            args=student_args,
            weights=student_weights,
            seed=seed,
            dtype="float32" if isinstance(student, str | Path) else None,
            num_classes=sources.num_classes,
        )
        check_text(model, sources, settings.accept)
        check_classes(model, sources, settings.accept, live_teacher, settings.classes)
        check_pictures(model, sources)
        move(model.module, picked, "student")
        if report is not None:
            checkpoint.load(folder.last_of_finished(), model.module)
            return report
        trainer = Trainer(
            settings,
            sources,
            model,
            folder,
            workers=workers,
            live_teacher=live_teacher,
            say=say,
            signals=signals,
        )
        with closing(trainer):
            if dry_run:
                return trainer.rehearse()
            return trainer.run(
                texts(report_to), callback("on_step", on_step), callback("on_metrics", on_metrics)
            )


def _table(
    specs: Mapping[str, Any],
    args: Mapping[str, Mapping[str, Any] | None],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What run.toml holds: SPECs and paths (objects have no text), their arguments, and the options
    that have a part."""
    return {
        **{key: value for key, value in specs.items() if isinstance(value, str | Path | tuple)},
        **{key: plain_arguments(value, f"--{key}") for key, value in args.items() if value},
        **options,
    }
