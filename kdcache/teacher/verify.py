"""Is a cache whole, and does its teacher still say what is in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kdcache.cache.audit import UNREAD
from kdcache.cache.identity import Identity, difference, first_lines, untold
from kdcache.cache.reader import Cache
from kdcache.cache.reader import open as open_cache
from kdcache.cache.repair import MEND
from kdcache.data.identify import identify
from kdcache.data.samples import Samples, evenly_spaced
from kdcache.data.sources import as_samples
from kdcache.errors import CacheCorrupt, DataError, UsageError
from kdcache.models.checks import padding_of
from kdcache.models.model import DTYPES, Model, as_model, move, pick_device
from kdcache.process.ranks import this_rank
from kdcache.teacher.agreement import agreement
from kdcache.teacher.answer import evaluating
from kdcache.user.code_errors import callback, entrance

SAMPLES = 32  # records that the teacher sees again


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What a check found. `problems` is empty exactly if `ok`; `notes` are no damage.

    advice: what mends it, None where nothing is damaged. With a teacher: `records` it saw again,
    the record that is worst, by how much its logits (or features) differ beyond what the codec
    rounds, the most that was allowed, and what two live runs differ by.
    """

    cache: str
    ok: bool
    quick: bool
    problems: tuple[str, ...]
    content_id: str | None
    shards: int
    notes: tuple[str, ...] = ()
    advice: str | None = None
    records: int | None = None
    worst_record: int | None = None
    worst_difference: float | None = None
    tolerance: float | None = None
    live_difference: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for json.dumps."""
        return {**asdict(self), "problems": list(self.problems), "notes": list(self.notes)}


@entrance
def verify(
    cache: str | Path,
    *,
    quick: bool = False,
    teacher: Any = None,
    data: Any = None,
    samples: int | None = None,
    teacher_args: Mapping[str, Any] | None = None,
    teacher_weights: str | Path | None = None,
    data_args: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check every digest of the cache at `cache` and that no file is foreign; `quick` stays with
    names, sizes, proofs.

    With `teacher` and `data` (SPECs or objects): compare their identity, and run the teacher again
    on up to `samples` (32) evenly spaced records, in the dtype of the cache's teacher unless
    `dtype` is given. What is cached is looked up in its logits by plain torch, whichever engine
    wrote it. A difference is a problem when it exceeds the codec's own rounding by more than 4
    times what two live runs in other batches differ by. These may differ by rounding alone: more is
    a problem of its own. UsageError for a teacher without data, CacheIncomplete if the dump has not
    ended; damage is listed, not raised.
    """
    if (teacher is None) != (data is None):
        raise UsageError(
            "verify runs the teacher on the data: give --teacher and --data, or neither"
        )
    if samples is not None and samples < 1:
        raise UsageError(f"--samples is {samples}; expected at least 1")
    if teacher is None:
        _refuse_idle(
            {
                "--samples": samples,
                "--dtype": dtype,
                "--device": device,
                "--teacher-arg": teacher_args,
                "--teacher-weights": teacher_weights,
                "--data-arg": data_args,
            }
        )
    try:
        with open_cache(cache) as opened:
            problems = opened.check_all(callback("progress", progress), quick=quick)
            report = VerifyReport(
                cache=str(cache),
                ok=not problems,
                quick=quick,
                problems=tuple(problems),
                notes=tuple(opened.notes()),
                content_id=opened.content_id,
                shards=opened.spec.num_shards,
                advice=_advice(problems),
            )
            if teacher is None or problems:
                return report
            return _ask_teacher(
                opened,
                report,
                teacher,
                data,
                samples or SAMPLES,
                dtype,
                device or "auto",
                dict(args=teacher_args, weights=teacher_weights),
                data_args,
            )
    except CacheCorrupt as e:
        return VerifyReport(
            cache=str(cache), ok=False, quick=quick, problems=(str(e),), content_id=None, shards=0
        )


def _advice(problems: Sequence[str]) -> str | None:
    """What mends a cache, None where nothing is known to be damaged."""
    return MEND if any(UNREAD not in problem for problem in problems) else None


def _refuse_idle(options: Mapping[str, Any]) -> None:
    """UsageError for an option that nothing reads when no teacher is asked."""
    for flag, value in options.items():
        if value is not None:
            raise UsageError(
                f"{flag} is about asking the teacher again: give --teacher and --data, or leave it "
                "out"
            )


def _ask_teacher(
    cache: Cache,
    report: VerifyReport,
    teacher: Any,
    data: Any,
    count: int,
    dtype: str | None,
    device: str,
    teacher_from: dict[str, Any],
    data_args: Mapping[str, Any] | None,
) -> VerifyReport:
    found = pick_device(device, this_rank().local)
    recorded = cache.identity.teacher.get("dtype")
    if dtype is None and recorded in DTYPES:
        dtype = recorded
    model = as_model(teacher, role="teacher", seed=cache.spec.seed, dtype=dtype, **teacher_from)
    samples = as_samples(
        data,
        data_args,
        seed=cache.spec.seed,
        labels=bool(cache.spec.labels),
        prepared=lambda: str(cache.identity.data.get("preprocessing", "")),
    )
    assert samples is not None
    samples.padding = padding_of(model.module, samples.dataset)
    move(model.module, found, "teacher")
    given = _identity(cache, model, samples)
    problems = [f"identity: {line}" for line in first_lines(difference(cache.identity, given))]
    notes = [
        f"identity: {field} is not compared: the cache was made before it was kept"
        for field in untold(cache.identity, given)
    ]
    records = evenly_spaced(cache.num_records, count)
    try:
        with evaluating(model.module):
            found_again = agreement(cache, model.module, samples, records, found)
    except DataError as e:
        return _with(report, [*problems, str(e)], records=len(records))
    return _with(
        report,
        [*problems, *found_again.problems],
        records=len(records),
        worst_record=found_again.worst,
        worst_difference=found_again.beyond,
        tolerance=found_again.tolerance,
        live_difference=found_again.live,
        notes=(*report.notes, *notes),
    )


def _with(report: VerifyReport, problems: Sequence[str], **found: Any) -> VerifyReport:
    return replace(report, problems=tuple(problems), ok=not problems, **found)


def _identity(cache: Cache, model: Model, samples: Samples) -> Identity:
    """Of the teacher and the data that are given, to be compared with the cache's."""
    document, tokenizer = identify(samples)
    known = cache.identity.teacher
    return Identity(
        data=document,
        tokenizer=tokenizer,
        activation=cache.identity.activation,
        teacher={
            **model.identity,
            **{name: known[name] for name in ("num_classes", "cut_from") if name in known},
        },
    )
