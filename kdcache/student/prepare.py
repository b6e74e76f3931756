"""The student of a run: loaded, compared with what it is to be trained on, and asked once before
anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kdcache.data import classes
from kdcache.data.collate import Collated
from kdcache.data.padding import Inputs
from kdcache.data.preprocessing import in_words
from kdcache.data.row_selection import NEXT_TOKEN
from kdcache.data.transfer import to_device
from kdcache.errors import DataError, UsageError
from kdcache.loss.divergences import check_reverse_kl
from kdcache.loss.targets import SoftTargets
from kdcache.models.checks import (
    UNSTEADY,
    Question,
    beyond_positions,
    find_rows,
    is_causal,
    padding_of,
    require_softmax,
    require_tokenizer,
    steadiness,
)
from kdcache.models.model import Model, Output, left_out, model_errors
from kdcache.student.batch import MicroBatch, student_rows
from kdcache.student.cache_and_data import Sources
from kdcache.student.evaluate import cut_width, metric_names
from kdcache.student.head import ChunkedLogits, WholeLogits
from kdcache.student.loader import Loader
from kdcache.student.match import Matches
from kdcache.student.settings import BEST_BY, Settings
from kdcache.student.step import row_mask


def check_text(model: Model, sources: Sources, accept: Sequence[str]) -> None:
    """IdentityMismatch for a student whose folder is for another tokenizer, UsageError for windows
    beyond a learned table of positions; what was accepted, and what is odd, is added to `sources`.
    """
    known, whose = sources.tokenizer, "data"
    # data of ids whose tokenizer nobody named: those the teacher was for
    if not (known or {}).get("fingerprint"):
        known, whose = sources.teachers_tokenizer, "teacher"
    found = require_tokenizer(model, known, role="student", accept=accept, whose=whose)
    sources.accepted = list(dict.fromkeys([*sources.accepted, *found]))
    said = beyond_positions(model, sources.longest, role="student")
    sources.notes += [said] if said is not None else []


def check_pictures(model: Model, sources: Sources) -> None:
    """Say, in the notes of `sources`, where a student comes with another preprocessing than it is
    trained with, and where evaluation data has another."""
    own, ours = model.known_preprocessing, sources.preprocessing
    if own and ours and own != ours:
        sources.notes.append(
            f"the student comes with another preprocessing ({in_words(own)}) than it is trained "
            f"with ({in_words(ours)}); use it with the latter, which run.toml keeps"
        )
    held = "" if sources.eval_samples is None else sources.eval_samples.preprocessing
    if held and ours and held != ours:
        sources.notes.append(
            f"evaluation pictures are prepared otherwise ({in_words(held)}) than training ones "
            f"({in_words(ours)})"
        )


def check_classes(
    model: Model,
    sources: Sources,
    accept: Sequence[str],
    live_teacher: nn.Module | None = None,
    cut: int | None = None,
) -> None:
    """IdentityMismatch for a student or live teacher that names its classes otherwise than what is
    trained on, and for evaluation data that alone names some, and another number than there are;
    what was accepted, and what cannot be compared, is added to `sources`. UsageError for a live
    teacher whose logits are no softmax. cut: the first so many of the student's classes are meant.

    The config of a Hugging Face student without names, or whose other ones were accepted, gets
    those of the data.
    """
    names, own = sources.class_names, model.class_names[:cut]
    config: Any = getattr(model.module, "config", None)
    found, said = classes.check(own, names, of=("the student", "the data"), accept=accept)
    others: list[str] = []
    if live_teacher is not None:
        # its width is looked at with its logits
        require_softmax(live_teacher, 2, role="live teacher")
        others, more = classes.check(
            classes.model_names(live_teacher),
            names or own,
            accept=accept,
            of=("the live teacher", "the data" if names else "the student"),
        )
        said += more
    held = [] if sources.eval_samples is None or names or own else sources.eval_samples.class_names
    known = sources.cache.spec.num_classes if sources.cache is not None else model.num_classes
    if known:
        others += classes.check_number(
            held,
            known,
            of=("the student" if sources.cache is None else "the teacher", "the evaluation data"),
            accept=accept,
        )
    sources.accepted = list(dict.fromkeys([*sources.accepted, *found, *others]))
    sources.notes += said
    if (found or not own) and names and len(getattr(config, "id2label", None) or ()) == len(names):
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a first look at a student gave: how its logits are made, the projections of --match, the
    metric that best/ is best by, and sentences about its logits and the losses of its own."""

    student: WholeLogits
    matches: Matches | None
    best_by: str
    said: list[str]


def prepare_student(
    model: Model, loader: Loader, settings: Settings, *, evaluated: bool, best_by: str | None
) -> Prepared:
    """Ask the student, in eval mode, about a few records of the run; its head that is to run inside
    the loss is found by it, the rows that it has, and the projections of --match are built from it.
    best_by: of the run, None for the default: eval_accuracy where there is one, else eval_loss.

    UsageError for a student with fewer classes than the teacher, for no labels under a hard loss,
    for a metric that there is not, and for a head that cannot run inside the loss as logits_memory
    asks; DataError for inputs that the student cannot take, and where its rows are not the
    teacher's.
    """
    module, dataset = model.module, None if loader.samples is None else loader.samples.dataset
    loader.padding = padding_of(module, dataset)
    first = loader.first_inputs()
    student = _student(module, settings, to_device(first.inputs, loader.device))
    _settle_rows(model, student, loader, first)
    micro = loader.peek()
    _check_labels(micro, loader, settings)
    batch = loader.to_device(micro)

    def run() -> Output:
        with _trying(module, batch["inputs"]):
            return student.forward(module, batch["inputs"])

    output = run()
    said = _check_logits(student.width(output), settings, loader, batch["targets"])
    width = cut_width(student.width(output), settings.classes)
    # nobody knew V: from here on the labels are looked at with it
    if loader.num_classes is None:
        loader.num_classes = width
        micro = loader.peek()
    if settings.ce_weight or settings.kd_weight or evaluated:
        require_softmax(module, width, role="student")
    if output.own_loss is not None and output.own_loss.weight is not None:
        said.append(
            f"own loss: + {output.own_loss.weight:g} aux, the balance of its router, as its config "
            "asks"
        )
    said += [f"own loss: {line}" for line in left_out(module, output.own_loss)]
    if micro.labels is not None or batch["targets"] is not None:
        student_rows(output, micro, batch["rows"])
    gives = [f"eval_{name}" for name in metric_names(loader.convention == NEXT_TOKEN, width)]
    best_by = _best_by(best_by, gives, evaluated)
    _check_steady(student, loader, settings)
    matches = None
    if settings.matches and loader.spec is not None:
        _check_matched_head(student, settings)
        matches = Matches(module, settings.matches, loader.spec.features, seed=settings.seed)
        matches.prepare(run, real=micro.collated.real, row_mask=row_mask(batch, output.logits))
    return Prepared(student, matches, best_by, said)


def _student(module: nn.Module, settings: Settings, inputs: Inputs) -> WholeLogits:
    with _trying(module, inputs):
        if settings.logits_memory is None:
            return WholeLogits(module, settings.device, settings.precision)
        return ChunkedLogits(
            module, settings.device, settings.precision, settings.logits_memory, inputs
        )


def _settle_rows(model: Model, student: WholeLogits, loader: Loader, first: Collated) -> None:
    """Tell the loader which rows the student has, where neither the cache nor an option says it.

    DataError for one that looks at later tokens where the rows of the cache predict them.
    """
    if loader.rows is not None or (loader.has_rows and loader.convention != NEXT_TOKEN):
        return
    module, inputs = model.module, to_device(first.inputs, loader.device)
    with _trying(module, inputs):
        output = student.forward(module, inputs)
        if not loader.has_rows:
            loader.rows, loader.why = find_rows(
                module,
                first,
                output,
                task=model.task,
                device=loader.device,
                role="student",
                run=student.forward,
                num_classes=student.num_classes,
            )
        # one row a record is another fault, which is named elsewhere
        elif (
            output.logits.dim() == 3
            and is_causal(module, first, output, loader.device, "student", student.forward) is False
        ):
            raise DataError(
                f"the student ({type(module).__name__}) looks at later tokens, and the rows of the "
                "cache predict them: it would learn to copy what it is to predict. If that is "
                "meant: --rows next-token"
            )


def _check_labels(micro: MicroBatch, loader: Loader, settings: Settings) -> None:
    """UsageError for a hard loss without labels."""
    if not settings.ce_weight or micro.labels is not None:
        return
    without = (
        "leave alpha and the weights out, for match alone"
        if loader.spec and not loader.spec.has_rows
        else "there is nothing to learn from without a cache"
        if loader.spec is None and not settings.kd_weight
        else "give alpha 1 (or ce_weight 0)"
    )
    raise UsageError(
        f"the hard loss has the weight {settings.ce_weight:g}, but neither the cache nor the data "
        f"has labels; {without}"
    )


def _best_by(wanted: str | None, gives: Sequence[str], evaluated: bool) -> str:
    """The metric that best/ is best by; UsageError for one that evaluation does not give."""
    best_by = wanted or next(name for name in ("eval_accuracy", "eval_loss") if name in gives)
    if evaluated and (best_by not in gives or best_by not in BEST_BY):
        raise UsageError(
            f"best_by is {best_by}, but evaluating this student gives "
            f"{', '.join(name for name in gives if name in BEST_BY)}"
        )
    return best_by


def _check_matched_head(student: WholeLogits, settings: Settings) -> None:
    """UsageError for a match of the head that runs inside the loss."""
    if not isinstance(student, ChunkedLogits):
        return
    path = student.head.path
    if any(match.module == path for match in settings.matches):
        raise UsageError(
            f"match names {path!r}, the head, which with logits_memory does not run as a module of "
            "its own; leave out one of them"
        )


def _check_logits(
    logits: int, settings: Settings, loader: Loader, targets: SoftTargets | None
) -> list[str]:
    """What is to be said of a student's logits beside its teacher's; UsageError where they do not
    go together.
    """
    if not settings.ce_weight and not settings.kd_weight:
        return []
    taught = loader.num_classes if targets is None else targets.num_classes
    # else they are names of the data
    taught = taught if targets is not None or loader.spec is not None else None
    if taught == 1:
        raise UsageError(
            "the teacher has one class, whose softmax is always 1 and says nothing; expected at "
            "least two (of a sigmoid's logit z the teacher is to give [0, z])"
        )
    if taught is not None and logits < taught:
        cut = (
            f"give classes {logits}, which cuts both"
            if loader.teacher is not None
            else f"dump again with --classes {logits}"
        )
        raise UsageError(
            f"the student has {logits} classes, the teacher {taught}; a student needs at least as "
            "many. Where the teacher's last ones are padding that no label and no token uses, "
            f"{cut}"
        )
    width = cut_width(logits, settings.classes)
    said = [f"student: {logits} logits, cut to {width} classes"] if width < logits else []
    if taught is not None and width > taught:
        if targets is not None and targets.log_probs_NK.shape[1] == taught:
            check_reverse_kl(width, taught, settings.divergence)
        said.append(
            f"student: {width} classes, the teacher has {taught}: the others have teacher "
            "probability 0"
        )
    return said


def _check_steady(student: WholeLogits, loader: Loader, settings: Settings) -> None:
    """DataError for a student whose answer in eval mode is left to chance, or to what shares its
    batch.
    """
    module, samples = student.module, loader.samples
    asked = Question(
        module,
        loader.device,
        loader.inputs_of,
        loader.convention,
        "student",
        run=student.forward,
        collate_fn=samples.name if samples is not None and samples.collates else None,
        pad_id=loader.padding.pad_id,
    )
    training = module.training
    module.eval()
    try:
        found = steadiness(asked, loader.telling())
    finally:
        module.train(training)
    if found is not None and found.problem is not None and UNSTEADY not in settings.accept:
        raise DataError(
            found.problem
            + (
                " It would be evaluated by chance too; to train it all the same: --accept "
                f"{UNSTEADY}"
                if found.harmless
                else ""
            )
        )


@contextmanager
def _trying(module: nn.Module, inputs: Inputs) -> Iterator[None]:
    """The user's model in eval mode, without gradients: DataError for whatever it raises."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), model_errors("student", module, inputs):
            yield
    finally:
        module.train(training)
