"""Stage 1: run a teacher once over a dataset and keep what it says; the same call again continues."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

from kdcache import __version__
from kdcache.cache.catalog import Header
from kdcache.cache.identity import Identity, require_same, untold
from kdcache.cache.reader import open as open_cache
from kdcache.cache.writer import Writer, create, standing
from kdcache.data import classes
from kdcache.data.preprocessing import in_words
from kdcache.data.samples import Samples, extremes
from kdcache.data.workers import WorkerDied
from kdcache.errors import (
    DataError,
    FieldDifference,
    IdentityMismatch,
    KDCacheError,
    UsageError,
    near,
)
from kdcache.loss.engines import check_engine
from kdcache.models.checks import (
    UNSTEADY,
    Question,
    check_convention,
    padding_of,
    steadiness,
    telling_records,
)
from kdcache.models.model import Model, move, pick_device, require_tokenizer
from kdcache.process.ranks import Rank, this_rank
from kdcache.process.signals import Signals
from kdcache.teacher.agreement import ANSWERS, agreement, committed_records
from kdcache.teacher.batches import read, spans
from kdcache.teacher.features import parse_features
from kdcache.teacher.fused import check_fits
from kdcache.teacher.plan import Plan, Wanted, make_plan, temperature_names
from kdcache.teacher.progress import Progress, readable_bytes, readable_seconds
from kdcache.teacher.run import Compute, evaluating, run_teacher, running
from kdcache.teacher.sink import Totals
from kdcache.teacher.sources import pick_samples, pick_teacher
from kdcache.user.guard import callback, entrance
from kdcache.user.paths import local_path

log = logging.getLogger("kdcache")
CONTAINERS = ("arrow", "hdf5")
LABELS_DISAGREE, PREPARED_OTHERWISE = "labels-disagree", "prepared-otherwise"
SAID_AT_THE_END = (LABELS_DISAGREE,)  # the others were known when it began
# of a shard beyond its columns: container, commit, manifest; 4.5 KB for ten columns
FILE_BYTES = 8192
LONG_SHARD = 900.0  # seconds of teacher time above which a user should know
GO_ON = "the open shard was dropped, the written ones stay; give the same command again to go on"


@dataclass(frozen=True, kw_only=True, slots=True)
class DumpReport:
    """What a dump did; None or {} where there is nothing to say.

    complete: the cache is sealed, content_id is its id. already_complete: it was before this call,
    which did nothing. bytes (of the columns, before the container), means and accuracy are of the
    whole cache once it is complete, until then of what this call wrote; shards, records, rows and
    seconds are this call's. predicted_bytes: of the whole, from the columns. engine: what reduces
    rows. quantisation_kl: mean KL(teacher || decoded); defaults: sentences about what was not
    given; warnings: (code, text). cut_from: the teacher's logits, where num_classes of them are its
    classes.
    """

    out: str
    container: str
    teacher: str
    data: str
    device: str
    engine: str
    kind: str
    num_classes: int
    tiers: tuple[int, ...]
    temperatures: tuple[str, ...]
    values: str
    features: tuple[str, ...]
    num_records: int
    num_shards: int
    records_per_shard: int
    predicted_bytes: int
    defaults: tuple[str, ...]
    dry_run: bool = False
    complete: bool = False
    already_complete: bool = False
    content_id: str | None = None
    shards_written: int = 0
    shards_left: int = 0
    records_written: int = 0
    rows_written: int = 0
    bytes: int = 0
    seconds: float = 0.0
    covered_mass: Mapping[str, float] = dataclasses.field(default_factory=dict)
    truncation_kl: Mapping[str, float] = dataclasses.field(default_factory=dict)
    quantisation_kl: Mapping[str, float] = dataclasses.field(default_factory=dict)
    accuracy: float | None = None
    warnings: tuple[tuple[str, str], ...] = ()
    cut_from: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for json.dumps."""
        return {
            key: list(map(list, value))
            if key == "warnings"
            else list(value)
            if isinstance(value, tuple)
            else value
            for key, value in dataclasses.asdict(self).items()
        }


@entrance
def dump_teacher(
    *,
    teacher: Any,
    data: Any,
    out: str | Path,
    kind: str | None = None,
    k: int | None = None,
    classes: int | None = None,
    tiers: Sequence[int] | None = None,
    temperatures: Sequence[float | str] | None = None,
    features: Sequence[str] = (),
    views: int = 1,
    container: str = "arrow",
    values: str = "float16",
    batch_size: int = 32,
    dtype: str | None = None,
    engine: str = "auto",
    device: str = "auto",
    workers: int = 0,
    seed: int = 0,
    shard_size: int | None = None,
    records_per_shard: int | None = None,
    labels: bool | None = None,
    moments: bool = False,
    rows: str | None = None,
    tokens: bool | None = None,
    teacher_args: Mapping[str, Any] | None = None,
    teacher_weights: str | Path | None = None,
    data_args: Mapping[str, Any] | None = None,
    accept: Sequence[str] = (),
    limit_samples: int | None = None,
    dry_run: bool = False,
    progress: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> DumpReport:
    """Run `teacher` once over `data` and write what it says to the cache `out`; the same call again
    continues.

    teacher, data: SPECs, or a torch.nn.Module (moved to `device`) and a map-style dataset. kind:
    "full" for up to 1024 classes, else "topk" with k = 64; tiers: smaller k's that can be read
    alone. temperatures: whose tails are stored (1, 2, 4, for sequences 1, 2). classes: the
    teacher's first so many logits are its classes and the rest is padding, which is cut before any
    softmax; DataError naming the sample where a label, a token that is predicted from or a logit
    among the largest is beyond. features: `MODULE[:RECIPE[:DTYPE]]`. dtype: cast the weights to it.
    engine: what reduces the rows of kind topk, "torch" or "triton" (a fused kernel); "auto" is
    torch so far. labels: store those of the data; None: if it has any; False, like kind "none",
    does not look at them, whatever they are. rows: "record", "position" or "next-token" (see
    data/rows.py); None: as the shape of the logits, the task or a look at the teacher says. tokens:
    keep the token ids, so that stage 2 needs no data; None: where they are all that the teacher is
    given. shard_size: wanted bytes of a shard, or `records_per_shard` instead; by default a 64th of
    the dump, of 128 KiB to 256 MiB, and one for every rank. accept: fields of the identity whose
    difference is harmless; "tokenizer" also for a teacher's own, which is not the data's;
    "class_names" for classes that the teacher and the data have in another order or number;
    "unsteady" for a teacher that does not answer one question once, which costs two forward passes
    of the first batch and one of a record to find out; "answers" for one that is asked again about
    a few committed records, when a dump goes on, and says something else. progress is called after
    every batch, say with a sentence at a time. Under torchrun each rank writes a share of the
    shards.

    Raises UsageError for what cannot be used as given, SpecMismatch or IdentityMismatch when `out`
    holds another cache or the tokenizer is not the teacher's, DataError naming a sample or an
    unsteady teacher, Interrupted on SIGINT or SIGTERM, KDCacheError for a full disk and for
    whatever the code of teacher, data or callbacks raises.
    """
    rank = this_rank()
    tell, progress = _teller(rank, callback("say", say)), callback("progress", progress)
    out = local_path(out, "--out")
    _check_options(
        container, batch_size, workers, views, shard_size, records_per_shard, limit_samples
    )
    wanted = Wanted(
        kind=kind,
        k=k,
        classes=classes,
        tiers=tuple(tiers or ()),
        temperatures=temperature_names(temperatures or ()),
        features=parse_features(features),
        views=views,
        values=values,
        seed=seed,
        shard_size=shard_size,
        records_per_shard=records_per_shard,
        labels=labels,
        moments=moments,
        limit_samples=limit_samples,
        rows=rows,
        tokens=tokens,
    )
    check_convention(rows)
    found = pick_device(device, rank.local)
    compute = Compute(
        batch_size=batch_size, device=found, workers=workers, engine=check_engine(engine, found)
    )
    with Signals(GO_ON) as signals:
        model = pick_teacher(
            teacher, args=teacher_args, weights=teacher_weights, seed=seed, dtype=dtype
        )
        samples = pick_samples(
            data,
            data_args,
            seed,
            labels=labels is not False and kind != "none",
            prepared=lambda: model.preprocessing,
        )
        samples.padding = padding_of(model.module, samples.dataset)
        overlooked = require_tokenizer(
            model, samples.tokenizer_identity, role="teacher", accept=accept
        )
        move(model.module, compute.device, "teacher")
        with evaluating(model.module):
            there = standing(out)
            plan = make_plan(
                model,
                samples,
                wanted,
                compute.device,
                world=rank.world,
                standing=None if there is None else there.spec.records_per_shard,
            )
            # refuses what names no field
            require_same(plan.identity, plan.identity, accept=_of_identity(accept))
            compute = dataclasses.replace(
                _fitting(compute, plan), logits=plan.identity.teacher.get("cut_from")
            )
            report = _planned(plan, model, samples.name, Path(out), container, compute, dry_run)
            _introduce(report, plan, engine, tell)
            report, overlooked = _same_classes(report, model, samples, accept, overlooked, tell)
            report = _same_pictures(report, model, samples, tell)
            if dry_run:
                return report
            identity = _accepted(there, Path(out), plan.identity, accept, tell)
            steady = partial(
                _steady,
                model=model,
                samples=samples,
                plan=plan,
                compute=compute,
                accept=accept,
                tell=tell,
            )
            begun = there is not None
            # before anything stands there of a teacher that is refused
            if not begun:
                report = steady(report, rank.share(range(plan.spec.num_shards)))
            if "tokenizer" in overlooked:
                tell("accepted: the teacher's own tokenizer is not the data's")
            with create(
                out,
                plan.spec,
                identity,
                container=container,
                recorded=_recorded(compute, model, overlooked),
                share=(rank.rank, rank.world),
            ) as writer:
                missing = writer.missing()
                if not missing:
                    tell(f"{out} is complete; there is nothing to do")
                    return dataclasses.replace(_sealed(report, writer), already_complete=True)
                if begun:
                    report = steady(report, rank.share(missing))
                    report = _same_answers(
                        report, writer, missing, model, samples, compute, accept, tell
                    )
                _check_disk(writer, plan, missing)
                _say_start(plan, missing, rank, tell)
                _say_compute(writer, compute, model, missing, tell)
                signals.defer()
                start = monotonic()
                try:
                    totals = run_teacher(
                        model.module,
                        samples,
                        writer,
                        rank.share(missing),
                        compute,
                        signals,
                        progress,
                    )
                except WorkerDied as e:
                    raise WorkerDied(f"{e}; {GO_ON}") from e
                report = dataclasses.replace(
                    _measured(report, totals),
                    shards_written=totals.shards,
                    records_written=totals.records,
                    rows_written=totals.rows,
                    seconds=monotonic() - start,
                )
                return _finish(report, writer, rank, tell)


def _check_options(
    container: str,
    batch_size: int,
    workers: int,
    views: int,
    shard_size: int | None,
    records_per_shard: int | None,
    limit_samples: int | None,
) -> None:
    if shard_size is not None and records_per_shard is not None:
        raise UsageError(
            f"--shard-size {shard_size} and --records-per-shard {records_per_shard} both say how "
            "large a "
            "shard is; give one of them"
        )
    if container not in CONTAINERS:
        raise UsageError(f"--format {container!r} is unknown{near(container, CONTAINERS)}")
    least = {
        "--batch-size": (batch_size, 1),
        "--workers": (workers, 0),
        "--views": (views, 1),
        "--shard-size": (shard_size, 1),
        "--records-per-shard": (records_per_shard, 1),
        "limit_samples": (limit_samples, 1),
    }
    for flag, (value, low) in least.items():
        if value is not None and value < low:
            raise UsageError(f"{flag} is {value}; expected at least {low}")


def _teller(rank: Rank, say: Callable[[str], None] | None) -> Callable[[str], None]:
    def tell(text: str) -> None:
        if rank.rank == 0:
            (say or (log.warning if text.startswith("warning: ") else log.info))(text)

    return tell


def _fitting(compute: Compute, plan: Plan) -> Compute:
    """`compute` with the engine that runs: only rows of kind topk are reduced. UsageError if the
    kernel cannot.
    """
    if plan.spec.kind != "topk":
        return dataclasses.replace(compute, engine="torch")
    if compute.engine == "triton":
        check_fits(plan.spec, plan.logits_dtype, compute.device)
    return compute


def _planned(
    plan: Plan, model: Model, data: str, out: Path, container: str, compute: Compute, dry_run: bool
) -> DumpReport:
    spec = plan.spec
    return DumpReport(
        out=str(out),
        container=container,
        teacher=f"{model.spec}: {model.loaded}",
        data=data,
        device=str(compute.device),
        engine=compute.engine,
        kind=spec.kind,
        num_classes=spec.num_classes,
        tiers=spec.tiers,
        temperatures=spec.temperatures,
        values=spec.values,
        features=tuple(f.name for f in spec.features),
        num_records=spec.num_records,
        num_shards=spec.num_shards,
        records_per_shard=spec.records_per_shard,
        predicted_bytes=plan.predicted_bytes,
        defaults=plan.defaults,
        dry_run=dry_run,
        shards_left=spec.num_shards,
        warnings=plan.warnings,
        cut_from=plan.identity.teacher.get("cut_from"),
    )


def _introduce(report: DumpReport, plan: Plan, asked: str, tell: Callable[[str], None]) -> None:
    kept = {
        "full": f"all {report.num_classes} logits",
        "none": "features only",
        "topk": f"top {', '.join(map(str, report.tiers))} of {report.num_classes}, tails at temperature "
        f"{', '.join(report.temperatures)}",
    }[report.kind]
    tell(
        f"teacher {report.teacher}, in {plan.identity.teacher['dtype']} on {report.device}, engine "
        f"{report.engine}"
    )
    tell(
        f"data {report.data}: {report.num_records} records in {report.num_shards} "
        f"{'shard' if report.num_shards == 1 else 'shards'}, about "
        f"{readable_bytes(report.predicted_bytes)}"
    )
    if report.cut_from:
        tell(
            f"classes: the first {report.num_classes} of the teacher's {report.cut_from} logits; "
            "the rest is padding"
        )
    tell(
        f"keeping {kept}"
        + (f" as {report.values}" if report.kind != "none" else "")
        + (f"; features {', '.join(report.features)}" if report.features else "")
    )
    if plan.spec.kind != "none":
        tell(f"rows by {plan.rows}" + ("; tokens are kept" if plan.spec.tokens else ""))
    if asked == "triton" != report.engine:
        tell(f"kind {report.kind} leaves nothing to reduce: engine 'triton' has no part in it")
    if report.defaults:
        tell(f"not given, so: {'; '.join(report.defaults)}")
    for _, text in report.warnings:
        tell(f"warning: {text}")


def _same_pictures(
    report: DumpReport, model: Model, samples: Samples, tell: Callable[[str], None]
) -> DumpReport:
    """Say how pictures are prepared, as far as it is known, and warn where the teacher wants them
    otherwise.
    """
    theirs, ours = model.known_preprocessing, samples.preprocessing
    if ours:
        tell(f"pictures: {in_words(ours)}{', as the teacher wants them' if ours == theirs else ''}")
    elif theirs:
        tell(
            f"the teacher wants pictures {in_words(theirs)}; whether the data makes them so is not "
            "known here"
        )
    if not (ours and theirs) or ours == theirs:
        return report
    warning = (
        f"the teacher wants pictures otherwise: {in_words(theirs)}; leave out --data-arg size, "
        "mean, std and "
        "preprocessing to have them so"
    )
    tell(f"warning: {warning}")
    return dataclasses.replace(report, warnings=(*report.warnings, (PREPARED_OTHERWISE, warning)))


def _same_classes(
    report: DumpReport,
    model: Model,
    samples: Samples,
    accept: Sequence[str],
    overlooked: list[str],
    tell: Callable[[str], None],
) -> tuple[DumpReport, list[str]]:
    """Compare the class names of teacher and data, and their number with V: the report with a
    warning where they cannot be compared or the difference is accepted, and what was overlooked."""
    if report.kind == "none":  # features of any order
        return report, overlooked
    of = ("the teacher", "the data")
    found, warnings = classes.check(
        model.class_names[: report.num_classes], samples.class_names, of=of, accept=accept
    )  # those beyond --classes are padding
    if not found and not warnings:
        found = classes.check_number(samples.class_names, report.num_classes, of=of, accept=accept)
        warnings = (
            [
                f"the data names {len(samples.class_names)} classes, the teacher gives "
                f"{report.num_classes} "
                "logits. Accepted."
            ]
            if found
            else []
        )
    for text in warnings:
        tell(f"warning: {text}")
    added = tuple((classes.CLASS_NAMES, text) for text in warnings)
    return dataclasses.replace(report, warnings=(*report.warnings, *added)), [*overlooked, *found]


def _accepted(
    there: Header | None,
    out: Path,
    identity: Identity,
    accept: Sequence[str],
    tell: Callable[[str], None],
) -> Identity:
    """The identity to continue with: the cache's own where `accept` names all that differs from it."""
    accept = _of_identity(accept)
    if there is not None and (fields := untold(there.identity, identity)):
        tell(f"not compared, as the cache was made before it was kept: {', '.join(fields)}")
    if not accept or there is None:
        return identity
    found = require_same(there.identity, identity, accept=accept, where=str(out))
    tell(f"accepted differences: {', '.join(found) or 'none were found'}")
    return there.identity


def _of_identity(accept: Sequence[str]) -> list[str]:
    return [name for name in accept if name not in (UNSTEADY, ANSWERS)]


def _steady(
    report: DumpReport,
    shards: Sequence[int],
    *,
    model: Model,
    samples: Samples,
    plan: Plan,
    compute: Compute,
    accept: Sequence[str],
    tell: Callable[[str], None],
) -> DumpReport:
    """Ask the teacher about the first batch of `shards` again. DataError where chance or the batch
    decide its answer, a warning in the report where that is accepted."""
    if not shards:
        return report
    start, first = monotonic(), spans(plan.spec, shards[:1], compute.batch_size)[0]
    ids = telling_records(range(first.start, first.stop), extremes(samples))
    asked = Question(
        model.module,
        compute.device,
        lambda ids: read(samples, first.view, ids),
        plan.convention,
        collate_fn=samples.name if samples.collates else None,
        pad_id=samples.padding.pad_id,
    )
    found = steadiness(asked, ids)
    if found is None:
        return report
    _say_long_shard(plan, (monotonic() - start) / (2 * (first.stop - first.start) + 1), tell)
    if found.problem is None:
        tell(
            "the first batch asked twice and one of its records alone, in "
            f"{monotonic() - start:.1f} s: logits differ "
            f"by at most {max(found.again, found.alone or 0):.2g}; rounding may make it "
            f"{found.rounding:.2g}"
        )
        return report
    if UNSTEADY not in accept:
        raise DataError(
            found.problem
            + (
                f" A cache keeps one answer for good; to keep it all the same: --accept {UNSTEADY}"
                if found.harmless
                else ""
            )
        )
    tell(f"warning: {found.problem} Accepted.")
    return dataclasses.replace(report, warnings=(*report.warnings, (UNSTEADY, found.problem)))


def _same_answers(
    report: DumpReport,
    writer: Writer,
    missing: Sequence[int],
    model: Model,
    samples: Samples,
    compute: Compute,
    accept: Sequence[str],
    tell: Callable[[str], None],
) -> DumpReport:
    """Ask the teacher of a dump that goes on about a few committed records. IdentityMismatch for
    another answer: equal weights and equal fields of the identity do not make one teacher; a
    warning where that is accepted."""
    if UNSTEADY in accept:
        return report  # no answer of it is to be had twice
    with open_cache(writer.path, allow_partial=True) as cache:
        records = committed_records(cache, missing)
        if not records:
            return report
        start = monotonic()
        found = agreement(cache, model.module, samples, records, compute.device)
    if not found.problems:
        tell(
            f"asked again about {len(records)} of the committed records, in "
            f"{monotonic() - start:.1f} s: the same "
            "answers"
        )
        return report
    problem = found.problems[0]
    if ANSWERS not in accept:
        raise IdentityMismatch(
            f"{writer.path}: the teacher does not say again what is committed there: {problem}. It "
            "is another model "
            "with equal weights (its configuration, its code, what it is given), or it computes "
            "otherwise (dtype, "
            "device, versions); give what the cache was begun with, choose another place, or keep "
            "both answers: "
            f"--accept {ANSWERS}",
            [FieldDifference(ANSWERS, "those of its records", problem)],
        )
    tell(f"warning: {problem}. Accepted.")
    return dataclasses.replace(report, warnings=(*report.warnings, (ANSWERS, problem)))


def _say_long_shard(plan: Plan, seconds: float, tell: Callable[[str], None]) -> None:
    """Say what an interruption can lose, where that is much: a teacher that needs so many `seconds`
    for a record.
    """
    records = plan.spec.records_per_shard
    if seconds * records > LONG_SHARD and records > 1:
        tell(
            f"a shard of {records} records takes this teacher about "
            f"{readable_seconds(seconds * records)}, which is "
            "what an interruption can lose; --records-per-shard "
            f"{max(1, int(LONG_SHARD / 3 / seconds))} makes it "
            f"{readable_seconds(LONG_SHARD / 3)}"
        )


def _recorded(compute: Compute, model: Model, overlooked: Sequence[str] = ()) -> dict[str, str]:
    """What it is computed with, and what was overlooked by name: said in the cache, compared by
    nobody.
    """
    names = ["torch", "numpy", "pyarrow", "h5py"] + (
        ["triton"] if compute.engine == "triton" else []
    )
    versions = {name: importlib.metadata.version(name) for name in names}
    return {
        "kdcache": __version__,
        **versions,
        "batch_size": str(compute.batch_size),
        "device": compute.device.type,
        "engine": compute.engine,
        "compute_dtype": model.dtype,
        "autocast": "off",
        **({"accepted": ", ".join(overlooked)} if overlooked else {}),
    }


def _check_disk(writer: Writer, plan: Plan, missing: list[int]) -> None:
    needed = plan.predicted_bytes * len(missing) // plan.spec.num_shards + FILE_BYTES * len(missing)
    try:
        free = shutil.disk_usage(writer.path).free
    # some FUSE file systems cannot say: a full disk will
    except OSError as e:
        log.info(
            "how much space is free is not known there (%s); needed is about %s",
            e.strerror or e,
            readable_bytes(needed),
        )
        return
    if needed > free:
        raise KDCacheError(
            f"{writer.path}: {len(missing)} of {plan.spec.num_shards} shards are still to write "
            "and "
            f"need about {readable_bytes(needed)}, the disk has {readable_bytes(free)} free; free "
            "some "
            "space, or keep less: a smaller --k, --values uint8, fewer features"
        )


def _say_start(plan: Plan, missing: list[int], rank: Rank, tell: Callable[[str], None]) -> None:
    done = plan.spec.num_shards - len(missing)
    if done:
        tell(f"{done} of {plan.spec.num_shards} shards are there; going on with the others")
    if rank.world > 1:
        idle = max(0, rank.world - plan.spec.num_shards)
        tell(
            f"{rank.world} processes share the shards"
            + (
                f"; {idle} of them have nothing to do, as there are {plan.spec.num_shards}"
                if idle
                else ""
            )
        )


def _say_compute(
    writer: Writer, compute: Compute, model: Model, missing: list[int], tell: Callable[[str], None]
) -> None:
    """Say what the shards that are there were computed with, where it was something else."""
    if len(missing) == writer.spec.num_shards:
        return
    with open_cache(writer.path, allow_partial=True) as cache:
        before, now = cache.recorded, _recorded(compute, model)
    other = [
        f"{name} {before.get(name, '?')}, now {value}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if other:
        tell(
            f"begun with other compute: {'; '.join(other)}; allowed, but the bytes may differ from "
            "those of one run"
        )


def _measured(report: DumpReport, totals: Totals) -> DumpReport:
    """The report with the means over what was counted, and with the warnings that follow from them."""
    warnings = [warning for warning in report.warnings if warning[0] != LABELS_DISAGREE]
    chance = totals.labelled / max(report.num_classes, 1)
    # Two standard deviations of a Poisson count: few labels of many classes are often all missed by
    # chance alone.
    if totals.accuracy is not None and totals.correct + 2 * (totals.correct + 1) ** 0.5 < chance:
        warnings.append(
            (
                LABELS_DISAGREE,
                f"labels and teacher disagree: it agrees with {totals.correct} of "
                f"{totals.labelled} labels, chance would be {chance:.0f}; are the classes in the "
                "same order?",
            )
        )
    return dataclasses.replace(
        report,
        bytes=totals.bytes,
        covered_mass=running(totals, "mass"),
        truncation_kl=running(totals, "truncation"),
        quantisation_kl=running(totals, "kl"),
        accuracy=totals.accuracy,
        warnings=tuple(warnings),
    )


def _sealed(report: DumpReport, writer: Writer) -> DumpReport:
    """Seal the cache, and report on all of it: on what other calls and ranks wrote too."""
    content_id = writer.seal()
    with open_cache(writer.path) as cache:
        totals = Totals(bytes=sum(cache.column_bytes().values()), measured=cache.measured)
    return dataclasses.replace(
        _measured(report, totals), complete=True, shards_left=0, content_id=content_id
    )


def _require_rows(writer: Writer) -> None:
    """DataError for a cache without a single row, from which every student would learn nothing."""
    if writer.spec.kind == "none" or writer.spec.rows == "one":
        return
    with open_cache(writer.path, allow_partial=True) as cache:
        if not any(facts.rows["row"] for facts in cache.shards):
            raise DataError(
                f"{writer.path}: none of its {writer.spec.num_records} records has a row (every "
                "label is "
                "-100, or no record has a token to predict); it is not sealed: look at the labels "
                "and at "
                "the row_mask of the teacher, and dump to another --out"
            )


def _finish(
    report: DumpReport, writer: Writer, rank: Rank, tell: Callable[[str], None]
) -> DumpReport:
    """Seal if nothing is missing any more: whichever rank ends last does."""
    left = writer.missing()
    if not left:
        _require_rows(writer)
    report = dataclasses.replace(report, shards_left=len(left)) if left else _sealed(report, writer)
    for code, text in report.warnings:
        if code in SAID_AT_THE_END:
            log.warning("warning: %s", text)
    if left:
        tell(
            f"this process has written its {report.shards_written} shards; {len(left)} of other "
            "ranks are still "
            "missing, and the last rank to end seals the cache"
        )
    else:
        tell(
            f"{report.out} is complete: {report.num_records} records, content id "
            f"{report.content_id}"
        )
    return report
