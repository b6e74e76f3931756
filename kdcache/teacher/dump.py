"""Stage 1: run a teacher once over a dataset and keep what it says; the same call goes on."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from kdcache import __version__
from kdcache.cache.catalog import SUFFIXES, Header
from kdcache.cache.identity import Identity, require_same, untold
from kdcache.cache.reader import open as open_cache
from kdcache.cache.writer import Writer, create, existing_header
from kdcache.data import classes
from kdcache.data.preprocessing import in_words
from kdcache.data.samples import Samples, extremes
from kdcache.data.sources import as_samples
from kdcache.data.workers import WorkerDied
from kdcache.errors import (
    DataError,
    FieldDifference,
    IdentityMismatch,
    KDCacheError,
    UsageError,
    did_you_mean,
)
from kdcache.loss.engines import check_engine
from kdcache.models.checks import (
    UNSTEADY,
    Question,
    check_convention,
    padding_of,
    require_tokenizer,
    steadiness,
    telling_records,
)
from kdcache.models.model import Model, as_model, move, pick_device
from kdcache.process.ranks import Rank, this_rank
from kdcache.process.signals import Signals
from kdcache.teacher.agreement import ANSWERS, agreement, committed_records
from kdcache.teacher.answer import evaluating, read
from kdcache.teacher.hooks import parse_features
from kdcache.teacher.observe import Compute, run_teacher, spans
from kdcache.teacher.plan import Plan, Wanted, make_plan, temperature_names
from kdcache.teacher.progress import DumpReport, Progress, readable_bytes, readable_seconds
from kdcache.teacher.reduce import check_fits
from kdcache.teacher.sink import Totals
from kdcache.user.code_errors import callback, entrance
from kdcache.user.paths import local_path

log = logging.getLogger("kdcache")
LABELS_DISAGREE, PREPARED_OTHERWISE = "labels-disagree", "prepared-otherwise"
SAID_AT_THE_END = (LABELS_DISAGREE,)  # the others were known when it began
# of a shard beyond its columns: container, commit, manifest; 4.5 KB for ten columns
FILE_BYTES = 8192
LONG_SHARD = 900.0  # seconds of teacher time above which a user should know
GO_ON = "the open shard was dropped, the written ones stay; give the same command again to go on"


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
    data/row_selection.py); None: as the shape of the logits, the task or a look at the teacher says. tokens:
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
    if container not in SUFFIXES:
        raise UsageError(f"--format {container!r} is unknown{did_you_mean(container, SUFFIXES)}")
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
        model = as_model(
            teacher,
            role="teacher",
            args=teacher_args,
            weights=teacher_weights,
            seed=seed,
            dtype=dtype,
        )
        samples = as_samples(
            data,
            data_args,
            seed=seed,
            labels=labels is not False and kind != "none",
            prepared=lambda: model.preprocessing,
        )
        if samples is None:
            raise UsageError("dump-teacher needs data")
        samples.padding = padding_of(model.module, samples.dataset)
        overlooked = require_tokenizer(
            model, samples.tokenizer_identity, role="teacher", accept=accept
        )
        move(model.module, compute.device, "teacher")
        with evaluating(model.module), ExitStack() as stack:
            begun = existing_header(out)
            plan = make_plan(
                model,
                samples,
                wanted,
                compute.device,
                world=rank.world,
                records_of_shards=None if begun is None else begun.spec.records_per_shard,
            )
            dump = _Dump(out, container, model, samples, plan, compute, accept, overlooked, tell)
            dump.introduce(engine)
            dump.check_classes()
            dump.check_preprocessing()
            if dry_run:
                return dump.report(dry_run=True)
            identity = dump.identity(begun)
            if "tokenizer" in overlooked:
                tell("accepted: the teacher's own tokenizer is not the data's")

            def opened() -> Writer:
                return stack.enter_context(
                    create(
                        out,
                        plan.spec,
                        identity,
                        container=container,
                        recorded=dump.recorded(),
                        share=(rank.rank, rank.world),
                    )
                )

            # A cache that stands there is opened first: what is complete needs no teacher. A new
            # one is begun last, so that nothing stands there of a teacher that is refused.
            writer = None if begun is None else opened()
            missing = range(plan.spec.num_shards) if writer is None else writer.missing()
            dump.check_steady(rank.share(missing))
            if writer is None:
                writer = opened()
                missing = writer.missing()
            if not missing:
                tell(f"{out} is complete; there is nothing to do")
                return dump.seal(writer, already_complete=True)
            if begun is not None:
                dump.check_answers(writer, missing)
            dump.check_disk(writer, missing)
            dump.say_start(writer, missing, rank)
            signals.defer()
            start = monotonic()
            try:
                totals = run_teacher(
                    model.module,
                    samples,
                    writer,
                    rank.share(missing),
                    dump.compute,
                    signals,
                    progress,
                )
            except WorkerDied as e:
                raise WorkerDied(f"{e}; {GO_ON}") from e
            return dump.finish(writer, totals, monotonic() - start)


@dataclass(slots=True)
class _Dump:
    """A dump under way: what it was given, what was decided, and the warnings so far."""

    out: Path
    container: str
    model: Model
    samples: Samples
    plan: Plan
    compute: Compute
    accept: Sequence[str]
    overlooked: list[str]  # differences that `accept` names
    tell: Callable[[str], None]
    warnings: list[tuple[str, str]] = field(default_factory=list)  # (code, text)

    def __post_init__(self) -> None:
        """UsageError where `accept` names no field of an identity, and where the fused kernel
        cannot take the rows.
        """
        spec, identity = self.plan.spec, self.plan.identity
        require_same(identity, identity, accept=self._fields)
        engine = self.compute.engine if spec.is_sparse else "torch"
        if engine == "triton":
            check_fits(spec, self.plan.logits_dtype, self.compute.device)
        # only rows of kind topk are reduced
        self.compute = dataclasses.replace(self.compute, engine=engine, logits=self._cut_from)
        self.warnings += self.plan.warnings

    @property
    def _fields(self) -> list[str]:
        """What `accept` names of the identity."""
        return [name for name in self.accept if name not in (UNSTEADY, ANSWERS)]

    @property
    def _cut_from(self) -> int | None:
        found: int | None = self.plan.identity.teacher.get("cut_from")
        return found

    def warn(self, code: str, text: str, accepted: str = "") -> None:
        self.tell(f"warning: {text}{accepted}")
        self.warnings.append((code, text))

    def introduce(self, engine: str) -> None:
        """Say what is about to be done; `engine` is the one that was asked for."""
        spec, plan, tell = self.plan.spec, self.plan, self.tell
        kept = f"all {spec.num_classes} logits" if spec.has_rows else "features only"
        if spec.is_sparse:
            kept = (
                f"top {', '.join(map(str, spec.tiers))} of {spec.num_classes}, tails at "
                f"temperature {', '.join(spec.temperatures)}"
            )
        tell(
            f"teacher {self.model.spec}: {self.model.loaded}, in {plan.identity.teacher['dtype']} "
            f"on {self.compute.device}, engine {self.compute.engine}"
        )
        shards = "1 shard" if spec.num_shards == 1 else f"{spec.num_shards} shards"
        tell(
            f"data {self.samples.name}: {spec.num_records} records in {shards}, about "
            f"{readable_bytes(plan.predicted_bytes)}"
        )
        if self._cut_from:
            tell(
                f"classes: the first {spec.num_classes} of the teacher's {self._cut_from} logits; "
                "the rest is padding"
            )
        values = f" as {spec.values}" if spec.has_rows else ""
        features = ", ".join(feature.name for feature in spec.features)
        tell(f"keeping {kept}{values}" + (f"; features {features}" if features else ""))
        if spec.has_rows:
            tell(f"rows by {plan.rows}" + ("; tokens are kept" if spec.tokens else ""))
        if engine == "triton" != self.compute.engine:
            tell(f"kind {spec.kind} leaves nothing to reduce: engine 'triton' has no part in it")
        if plan.defaults:
            tell(f"not given, so: {'; '.join(plan.defaults)}")
        for _, text in plan.warnings:
            tell(f"warning: {text}")

    def check_classes(self) -> None:
        """Compare the class names of teacher and data, and their number with V: a warning where
        they cannot be compared or the difference is accepted.
        """
        if not self.plan.spec.has_rows:  # features of any order
            return
        # names beyond --classes are padding
        width, names = self.plan.spec.num_classes, self.samples.class_names
        theirs = self.model.class_names[:width]
        of = ("the teacher", "the data")
        found, warnings = classes.check(theirs, names, of=of, accept=self.accept)
        if not found and not warnings:
            found = classes.check_number(names, width, of=of, accept=self.accept)
            if found:
                warnings = [
                    f"the data names {len(names)} classes, the teacher gives {width} logits. "
                    "Accepted."
                ]
        for text in warnings:
            self.warn(classes.CLASS_NAMES, text)
        self.overlooked = [*self.overlooked, *found]

    def check_preprocessing(self) -> None:
        """Say how pictures are prepared, as far as it is known, and warn where the teacher wants
        them otherwise.
        """
        theirs, ours = self.model.known_preprocessing, self.samples.preprocessing
        if ours:
            same = ", as the teacher wants them" if ours == theirs else ""
            self.tell(f"pictures: {in_words(ours)}{same}")
        elif theirs:
            self.tell(
                f"the teacher wants pictures {in_words(theirs)}; whether the data makes them so is "
                "not known here"
            )
        if ours and theirs and ours != theirs:
            self.warn(
                PREPARED_OTHERWISE,
                f"the teacher wants pictures otherwise: {in_words(theirs)}; leave out --data-arg "
                "size, mean, std and preprocessing to have them so",
            )

    def identity(self, begun: Header | None) -> Identity:
        """The identity to go on with: that of the cache which was `begun`, where `accept` names all
        that differs from it.
        """
        own, accept = self.plan.identity, self._fields
        if begun is None:
            return own
        if fields := untold(begun.identity, own):
            self.tell(
                f"not compared, as the cache was made before it was kept: {', '.join(fields)}"
            )
        if not accept:
            return own
        found = require_same(begun.identity, own, accept=accept, where=str(self.out))
        self.tell(f"accepted differences: {', '.join(found) or 'none were found'}")
        return begun.identity

    def check_steady(self, shards: Sequence[int]) -> None:
        """Ask the teacher about the first batch of `shards` again. DataError where chance or the
        batch decide its answer, a warning where that is accepted.
        """
        if not shards:
            return
        start = monotonic()
        first = spans(self.plan.spec, shards[:1], self.compute.batch_size)[0]
        asked = Question(
            self.model.module,
            self.compute.device,
            lambda ids: read(self.samples, first.view, ids),
            self.plan.convention,
            collate_fn=self.samples.name if self.samples.collates else None,
            pad_id=self.samples.padding.pad_id,
        )
        found = steadiness(asked, telling_records(first.ids, extremes(self.samples)))
        if found is None:
            return
        seconds = monotonic() - start
        _say_long_shard(self.plan, seconds / (2 * len(first.ids) + 1), self.tell)
        if found.problem is None:
            self.tell(
                f"the first batch asked twice and one of its records alone, in {seconds:.1f} s: "
                f"logits differ by at most {max(found.again, found.alone or 0):.2g}; rounding may "
                f"make it {found.rounding:.2g}"
            )
        elif UNSTEADY in self.accept:
            self.warn(UNSTEADY, found.problem, " Accepted.")
        else:
            raise DataError(
                found.problem
                + (
                    " A cache keeps one answer for good; to keep it all the same: --accept "
                    f"{UNSTEADY}"
                    if found.harmless
                    else ""
                )
            )

    def check_answers(self, writer: Writer, missing: Sequence[int]) -> None:
        """Ask the teacher of a dump that goes on about a few committed records. IdentityMismatch
        for another answer: equal weights and equal fields of the identity do not make one teacher;
        a warning where that is accepted.
        """
        if UNSTEADY in self.accept:
            return  # no answer of it is to be had twice
        with open_cache(writer.path, allow_partial=True) as cache:
            records = committed_records(cache, missing)
            if not records:
                return
            start = monotonic()
            found = agreement(cache, self.model.module, self.samples, records, self.compute.device)
        if not found.problems:
            self.tell(
                f"asked again about {len(records)} of the committed records, in "
                f"{monotonic() - start:.1f} s: the same answers"
            )
            return
        problem = found.problems[0]
        if ANSWERS not in self.accept:
            raise IdentityMismatch(
                f"{writer.path}: the teacher does not say again what is committed there: "
                f"{problem}. It is another model with equal weights (its configuration, its code, "
                "what it is given), or it computes otherwise (dtype, device, versions); give what "
                "the cache was begun with, choose another place, or keep both answers: --accept "
                f"{ANSWERS}",
                [FieldDifference(ANSWERS, "those of its records", problem)],
            )
        self.warn(ANSWERS, problem, ". Accepted.")

    def recorded(self) -> dict[str, str]:
        """What it is computed with, and what was overlooked by name: said in the cache, compared by
        nobody.
        """
        names = ["torch", "numpy", "pyarrow", "h5py"]
        names += ["triton"] if self.compute.engine == "triton" else []
        return {
            "kdcache": __version__,
            **{name: importlib.metadata.version(name) for name in names},
            "batch_size": str(self.compute.batch_size),
            "device": self.compute.device.type,
            "engine": self.compute.engine,
            "compute_dtype": self.model.dtype,
            "autocast": "off",
            **({"accepted": ", ".join(self.overlooked)} if self.overlooked else {}),
        }

    def check_disk(self, writer: Writer, missing: Sequence[int]) -> None:
        """KDCacheError where the disk has no room for the shards that are missing."""
        shards = self.plan.spec.num_shards
        needed = self.plan.predicted_bytes * len(missing) // shards + FILE_BYTES * len(missing)
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
                f"{writer.path}: {len(missing)} of {shards} shards are still to write and need "
                f"about {readable_bytes(needed)}, the disk has {readable_bytes(free)} free; free "
                "some space, or keep less: a smaller --k, --values uint8, fewer features"
            )

    def say_start(self, writer: Writer, missing: Sequence[int], rank: Rank) -> None:
        """Say what is there already, how it is shared, and what it was computed with, where that
        was something else.
        """
        shards = self.plan.spec.num_shards
        done = shards - len(missing)
        if done:
            self.tell(f"{done} of {shards} shards are there; going on with the others")
        if rank.world > 1:
            idle = max(0, rank.world - shards)
            nothing = f"; {idle} of them have nothing to do, as there are {shards}" if idle else ""
            self.tell(f"{rank.world} processes share the shards{nothing}")
        if not done:
            return
        with open_cache(writer.path, allow_partial=True) as cache:
            before = cache.recorded
        other = [
            f"{name} {before.get(name, '?')}, now {value}"
            for name, value in self.recorded().items()
            if name != "accepted" and before.get(name) != value
        ]
        if other:
            self.tell(
                f"begun with other compute: {'; '.join(other)}; allowed, but the bytes may differ "
                "from those of one run"
            )

    def finish(self, writer: Writer, totals: Totals, seconds: float) -> DumpReport:
        """Seal if nothing is missing any more: whichever rank ends last does. `totals` are what
        this call has written in `seconds`.
        """
        left = writer.missing()
        written = {
            "shards_written": totals.shards,
            "records_written": totals.records,
            "rows_written": totals.rows,
            "seconds": seconds,
        }
        if left:
            report = self.report(totals, shards_left=len(left), **written)
        else:
            _require_rows(writer)
            report = self.seal(writer, **written)
        for code, text in report.warnings:
            if code in SAID_AT_THE_END:
                log.warning("warning: %s", text)
        self.tell(
            f"this process has written its {totals.shards} shards; {len(left)} of other ranks are "
            "still missing, and the last rank to end seals the cache"
            if left
            else f"{self.out} is complete: {report.num_records} records, content id "
            f"{report.content_id}"
        )
        return report

    def seal(self, writer: Writer, **found: Any) -> DumpReport:
        """Seal the cache, and report on all of it: on what other calls and ranks wrote too."""
        content_id = writer.seal()
        with open_cache(writer.path) as cache:
            totals = Totals(bytes=sum(cache.column_bytes().values()), measured=cache.measured)
        return self.report(totals, complete=True, shards_left=0, content_id=content_id, **found)

    def report(self, totals: Totals | None = None, **found: Any) -> DumpReport:
        """The report, with the means over what was counted and the warnings that follow from them.
        `found`: further fields of it.
        """
        spec, warnings = self.plan.spec, list(self.warnings)
        if totals is not None:
            warnings += _labels_disagree(totals, spec.num_classes)
            found |= {
                "bytes": totals.bytes,
                "covered_mass": totals.by_temperature("mass"),
                "truncation_kl": totals.by_temperature("truncation"),
                "quantisation_kl": totals.by_temperature("kl"),
                "accuracy": totals.accuracy,
            }
        return DumpReport(
            **{
                "out": str(self.out),
                "container": self.container,
                "teacher": f"{self.model.spec}: {self.model.loaded}",
                "data": self.samples.name,
                "device": str(self.compute.device),
                "engine": self.compute.engine,
                "kind": spec.kind,
                "num_classes": spec.num_classes,
                "tiers": spec.tiers,
                "temperatures": spec.temperatures,
                "values": spec.values,
                "features": tuple(feature.name for feature in spec.features),
                "num_records": spec.num_records,
                "num_shards": spec.num_shards,
                "records_per_shard": spec.records_per_shard,
                "predicted_bytes": self.plan.predicted_bytes,
                "defaults": self.plan.defaults,
                "shards_left": spec.num_shards,
                "warnings": tuple(warnings),
                "cut_from": self._cut_from,
                **found,
            }
        )


def _teller(rank: Rank, say: Callable[[str], None] | None) -> Callable[[str], None]:
    def tell(text: str) -> None:
        if rank.rank == 0:
            (say or (log.warning if text.startswith("warning: ") else log.info))(text)

    return tell


def _say_long_shard(plan: Plan, seconds: float, tell: Callable[[str], None]) -> None:
    """Say what an interruption can lose, where that is much: a teacher that needs so many `seconds`
    for a record.
    """
    records = plan.spec.records_per_shard
    if seconds * records > LONG_SHARD and records > 1:
        tell(
            f"a shard of {records} records takes this teacher about "
            f"{readable_seconds(seconds * records)}, which is what an interruption can lose; "
            f"--records-per-shard {max(1, int(LONG_SHARD / 3 / seconds))} makes it "
            f"{readable_seconds(LONG_SHARD / 3)}"
        )


def _labels_disagree(totals: Totals, num_classes: int) -> list[tuple[str, str]]:
    """The warning that follows where the teacher agrees with fewer labels than chance would."""
    chance = totals.labelled / max(num_classes, 1)
    # Two standard deviations of a Poisson count: few labels of many classes are often all missed by
    # chance alone.
    if totals.accuracy is None or totals.correct + 2 * (totals.correct + 1) ** 0.5 >= chance:
        return []
    text = (
        f"labels and teacher disagree: it agrees with {totals.correct} of {totals.labelled} "
        f"labels, chance would be {chance:.0f}; are the classes in the same order?"
    )
    return [(LABELS_DISAGREE, text)]


def _require_rows(writer: Writer) -> None:
    """DataError for a cache without a single row, from which every student would learn nothing."""
    if not writer.spec.has_rows or writer.spec.rows == "one":
        return
    with open_cache(writer.path, allow_partial=True) as cache:
        if not any(facts.rows["row"] for facts in cache.shards):
            raise DataError(
                f"{writer.path}: none of its {writer.spec.num_records} records has a row (every "
                "label is -100, or no record has a token to predict); it is not sealed: look at "
                "the labels and at the row_mask of the teacher, and dump to another --out"
            )
