"""What is said of a run: before it begins, and what it came to, in summary.json and as a report."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from kdcache.errors import CacheCorrupt
from kdcache.loss.engines import check_engine
from kdcache.models.runs import SUMMARY, is_number, is_texts
from kdcache.student.cache_and_data import VIEW_KEY
from kdcache.student.head import ChunkedLogits
from kdcache.student.run_folder import RunFolder

if TYPE_CHECKING:
    from kdcache.student.trainer import Trainer

# of which run.toml keeps the versions
PACKAGES = ("kdcache", "torch", "numpy", "safetensors", "transformers")


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

    def summary(self) -> dict[str, Any]:
        """What summary.json holds: the report, the evaluation at its top under the names of
        metrics.jsonl.
        """
        out = {key: value for key, value in self.to_json().items() if key != "evaluation"}
        return {**out, **{f"eval_{key}": value for key, value in self.evaluation.items()}}


def finished_report(folder: RunFolder, say: Callable[[str], object] | None) -> TrainReport:
    """The report of a run that is finished; CacheCorrupt if its summary.json is none."""
    summary = folder.summary or {}
    evaluation = {name: value for name, value in summary.items() if name.startswith("eval_")}
    wrong = [
        *(
            name
            for name, right in SUMMARISED.items()
            if name in summary and not right(summary[name])
        ),
        *(name for name, value in evaluation.items() if not is_number(value)),
    ]
    if wrong:
        raise CacheCorrupt(
            f"{folder.path / SUMMARY}: its {wrong[0]!r} is not what a run writes; move it away to "
            "train on from last/"
        )
    if say is not None:
        say(f"{folder.path} is finished already; name another --out to train again")
    known = {field.name for field in dataclasses.fields(TrainReport)}
    values = {name: value for name, value in summary.items() if name in known}
    values |= {
        "accepted": tuple(summary.get("accepted", ())),
        "defaults": tuple(summary.get("defaults", ())),
        "evaluation": {name.removeprefix("eval_"): value for name, value in evaluation.items()},
        "already_finished": True,
        "out": str(folder.path),
    }
    try:
        return TrainReport(**values)
    except TypeError as e:
        raise CacheCorrupt(
            f"{folder.path / SUMMARY}: not the summary of a run ({e}); move it away to train on "
            "from last/"
        ) from e


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(
        item is None or is_number(item) for item in value.values()
    )


# What summary.json holds -> whether a value may stand there.
SUMMARISED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("out", "student", "device", "cache", "best_by"), _is_text),
    **dict.fromkeys(
        ("steps", "epochs", "position", "continued_from", "seconds", "samples_per_second"),
        is_number,
    ),
    **dict.fromkeys(("training", "best", "last"), _is_table),
    **dict.fromkeys(("accepted", "defaults"), is_texts),
    **dict.fromkeys(
        ("dry_run", "finished", "already_finished"), lambda value: isinstance(value, bool)
    ),
}


def numbers(values: Mapping[str, Any]) -> str:
    """The numbers of a step, or of an evaluation, that people look at, to end a line with."""
    wanted = ("loss", "lr", "samples_per_second")
    return "".join(
        f", {key} {value:.4g}"
        for key, value in values.items()
        if key in wanted or key.startswith("eval_")
    )


def start_lines(trainer: Trainer) -> Iterator[str]:
    """What a run will do, for people."""
    settings, sources, loader = trainer.settings, trainer.sources, trainer.loader
    cache = sources.cache
    count = sum(p.numel() for _, p in trainer.train_step.named)
    yield f"student: {trainer.model.loaded}, {count:,} trained parameters"
    yield from trainer.prepared.said
    yield from (f"warning: {note}" for note in sources.notes)
    yield (
        "cache: none"
        if cache is None
        else f"cache: {cache.path}, content {(cache.content_id or '')[:12]}"
    )
    own_labels = settings.ce_weight and not (cache is not None and cache.spec.labels)
    if sources.samples is None:
        yield "inputs: the tokens of the cache" + (
            ", and its labels are the next of them" if own_labels else ""
        )
    elif cache is not None and own_labels:
        yield (
            "labels: those of the data; the cache keeps none, so that nobody compared them with "
            "the teacher's"
        )
    yield f"rows by {loader.convention} ({'as in the cache' if loader.has_rows else loader.why})"
    divergence = settings.divergence
    beta = "" if divergence.beta is None else f", beta {divergence.beta:g}"
    yield (
        f"loss: {settings.ce_weight:g} CE + {settings.kd_weight:g} T^2 {divergence.name} (tail "
        f"{divergence.tail}{beta}) at T = {loader.temperature:g}"
        + "".join(f" + {match.weight:g} {match}" for match in settings.matches)
    )
    if trainer.prepared.matches is not None:
        yield from trainer.prepared.matches.learned()
    steps, records = loader.total_steps, settings.batch_size
    yield (
        f"{steps} step{'' if steps == 1 else 's'} of {records} "
        f"record{'' if records == 1 else 's'}, {settings.optimizer}, lr {settings.lr:g}, "
        f"{settings.precision} on {settings.device}, engine "
        f"{check_engine(settings.engine, settings.device)}"
    )
    if isinstance(student := trainer.prepared.student, ChunkedLogits):
        memory = settings.options["logits-memory"]
        yield f"logits: never whole, in chunks of {memory} inside the loss{student.head.after}"
    yield from (f"default: {line}" for line in trainer.defaults())
    yield from (f"accepted: {name} differs" for name in trainer.accepted() if name != VIEW_KEY)
    if trainer.continued_from:
        step, position = trainer.progress.step, trainer.progress.position
        yield f"continuing {trainer.folder.path} after step {step} (position {position})"
    yield from (f"from here on: {line}" for line in trainer.folder.changes.values())
    yield from trainer.folder.notes


def versions() -> dict[str, str]:
    """Of Python and the packages whose arithmetic or files a run depends on."""
    out = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            out[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return out
