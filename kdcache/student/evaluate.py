"""How good a model is on labelled data: loss, accuracy, perplexity."""

from __future__ import annotations

import logging
import math
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.data.classes import check as check_names
from kdcache.data.classes import check_number, model_names
from kdcache.data.code_specs import is_code
from kdcache.data.collate import Collated
from kdcache.data.reading import Pairs, data_batches
from kdcache.data.row_selection import CONVENTIONS, NEXT_TOKEN, record_labels, select_rows
from kdcache.data.samples import Samples
from kdcache.data.sources import as_samples
from kdcache.errors import DataError, UsageError, did_you_mean
from kdcache.models.checks import find_rows, padding_of, require_softmax, require_tokenizer
from kdcache.models.model import Model, Output, forward_on, load_model, move, pick_device
from kdcache.models.runs import BEST, LAST, OPTIONS, RECORDED, TABLE, is_run, read_options
from kdcache.models.specs import MODELS, names_in
from kdcache.student import checkpoint
from kdcache.student.head import WholeLogits
from kdcache.student.run_folder import weights_folder
from kdcache.student.settings import PRECISIONS
from kdcache.user.arguments import check_workers
from kdcache.user.code_errors import entrance, printable, users_code
from kdcache.user.paths import local_path

TOP = 5
# code SPECs of this package: a run may name them by itself
PACKAGED = ("kdcache.demo:convnet", "kdcache.demo:mlp")
OF = ("the student", "the data")
ACCEPTED = ("class_names", "tokenizer")  # what --accept of this command may name
log = logging.getLogger("kdcache")


@entrance
def evaluate(
    student: nn.Module | Model | str | Path,
    data: Any,
    *,
    student_args: Mapping[str, Any] | None = None,
    student_weights: str | Path | None = None,
    student_code: str | None = None,
    data_args: Mapping[str, Any] | None = None,
    batch_size: int = 128,
    device: str | torch.device | None = None,
    workers: int = 0,
    precision: str | None = None,
    classes: int | None = None,
    rows: str | None = None,
    accept: Sequence[str] = (),
) -> dict[str, Any]:
    """Metrics of a student on every sample of `data` (view 0), as plain numbers.

    One row per record, or per position with labels: `loss` (mean CE in nats over labelled rows),
    `accuracy`,
    `accuracy_top5` where V > 5, `n`. Token sequences: `loss` (mean CE per predicted token),
    `perplexity` = exp(loss),
    `tokens`.

    student: a module, a `Model`, a model SPEC (with `student_args` and `student_weights`), or the
    folder of a run, whose best/ (else last/) is taken, or one of these two; the result then has
    `checkpoint`, the folder, and `step`. student_code: the SPEC file.py:name or package.module:name
    of a run's student. A folder's word alone runs no code, so a run of one is refused without it,
    by a UsageError that says what to give. data: a dataset, `Samples` or data SPEC. precision:
    float32 by default, or the run's. All logits are classes, unless `classes` cuts them to the
    first so many; a run that was trained with `classes` is cut to them, and takes no others. rows:
    "record", "position" or "next-token" (data/row_selection.py); by default as a run knows, or as a dump
    finds them. accept: "class_names" or "tokenizer", whose difference is harmless; what was found
    and accepted is in the answer as
    `accepted`. IdentityMismatch where one differs and is not: the class names of a model or run, or
    its tokenizer, are not the data's. DataError if nothing is labelled, with one label a row, or
    the student cannot take it.
    """
    run = None
    if not isinstance(student, nn.Module | Model):
        run = _of_run(student, student_args, student_weights, student_code)
    if run is None and student_code is not None:
        raise UsageError(
            f"student_code {student_code} is given, but the student is no run: a SPEC is its own "
            "code; give one of them"
        )
    found, known = (
        (run.model, run.classes)
        if run is not None
        else (_student(student, student_args, student_weights), None)
    )
    if None not in (classes, known) and classes != known:
        raise UsageError(
            f"classes is {classes}; the run {student} was trained with classes {known}: leave it "
            "out"
        )
    classes = known if classes is None else classes
    precision = precision or ("float32" if run is None else run.precision)
    samples = as_samples(
        data,
        data_args,
        seed=None,
        prepared=lambda: found.preprocessing if isinstance(found, Model) else "",
    )
    if samples is None:
        raise UsageError("evaluate needs data")
    for name in accept:
        if name not in ACCEPTED:
            raise UsageError(
                f"--accept {name}: evaluation compares "
                f"{' and '.join(ACCEPTED)}{did_you_mean(name, ACCEPTED)}"
            )
    accepted: list[str] = []
    if isinstance(found, Model):
        accepted += require_tokenizer(
            found, samples.tokenizer_identity, role="student", accept=accept
        )
    module = found.module if isinstance(found, Model) else found
    # a length that is no length is found before the work, not after it
    samples.item(len(samples) - 1)
    names = found.class_names if isinstance(found, Model) else model_names(found)
    overlooked, notes = check_names(names[:classes], samples.class_names, of=OF, accept=accept)
    for note in notes:
        log.warning("warning: %s", note)

    def look(width: int) -> None:
        if not names:
            overlooked.extend(check_number(samples.class_names, width, of=OF, accept=accept))

    if precision not in PRECISIONS:
        raise UsageError(
            f"precision {precision!r} is unknown; expected one of {', '.join(PRECISIONS)}"
        )
    metrics = evaluate_module(
        WholeLogits(module, pick_device(device), precision),
        samples,
        batch_size=batch_size,
        workers=workers,
        classes=classes,
        look=look,
        rows=rows or (None if run is None else run.rows),
        task=found.task if isinstance(found, Model) else "",
    )
    accepted += overlooked
    said = {} if run is None else {"checkpoint": str(run.checkpoint), "step": run.step}
    return {**said, **metrics, **({"accepted": accepted} if accepted else {})}


def evaluate_module(
    student: WholeLogits,
    samples: Samples,
    *,
    batch_size: int,
    workers: int = 0,
    classes: int | None = None,
    first: int | None = None,
    rows: str | None = None,
    task: str = "",
    look: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """`evaluate` of a student that is there; its mode of training is put back.

    first: only so many samples, to find out before a run whether they can be evaluated on; {} if
    none of them has a label. task: what the module is for, if its SPEC says so. look: called with
    the number of classes, once it is known.
    """
    module, device = student.module, student.device
    samples.padding = padding_of(module, samples.dataset)
    check_workers(workers)
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size}; expected at least 1")
    batches = data_batches(
        samples, _in_order(min(first or len(samples), len(samples)), batch_size), workers
    )
    training = module.training
    move(module, device, "student")
    with users_code(f"the student ({type(module).__name__}) cannot be put in eval mode"):
        module.eval()
    sums, wide = torch.zeros(4, dtype=torch.float64, device=device), 0
    try:
        with torch.inference_mode():
            for collated in batches:
                output = forward_on(
                    module, collated.inputs, device, role="student", run=student.forward
                )
                wide = cut_width(student.width(output), classes)
                if look is not None:
                    look(wide)
                    look = None
                require_softmax(module, wide, role="student")
                if rows is None:
                    rows, _ = find_rows(
                        module,
                        collated,
                        output,
                        task=task,
                        device=device,
                        role="student",
                        run=student.forward,
                        num_classes=student.num_classes,
                    )
                rows_N, labels_N = _rows(output, collated, wide, rows)
                labels_N = labels_N.to(device)
                for chunk, logits_NV in student.chunks(rows_N, classes):
                    sums += _sums(logits_NV, labels_N[chunk])
    finally:
        batches.close()
        module.train(training)
    if first is not None and not float(sums[3]):
        return {}
    return _metrics(sums.tolist(), samples, rows == NEXT_TOKEN, wide)


def cut_width(logits: int, classes: int | None) -> int:
    """The classes of a student with so many logits, cut to `classes`; UsageError where it has
    fewer.
    """
    if classes is not None and not 1 <= classes <= logits:
        raise UsageError(
            f"classes is {classes}, and the student gives {logits} logits; expected 1 to {logits}"
        )
    return logits if classes is None else classes


def _rows(
    output: Output, collated: Collated, num_classes: int, convention: str
) -> tuple[Tensor, Tensor]:
    """(logits [N, V], or hidden states, and labels [N]) of the labelled rows of a batch."""
    mask = None if output.row_mask is None else output.row_mask.cpu()
    selection = select_rows(collated, tuple(output.logits.shape), convention, mask, num_classes)
    rows_N, labels = output.logits, collated.labels
    if selection is not None:
        rows_N, labels = rows_N[selection.mask_BL.to(rows_N.device)], selection.labels_N
    else:
        labels, _ = record_labels(labels, collated.label_weight, num_classes)
    if labels is None or labels.dim() != 1:
        found = "none" if labels is None else str(list(labels.shape))
        raise DataError(
            f"evaluation needs one label for each of {len(rows_N)} rows; the data gives {found}"
            + (
                " (several labels of a row are trained on as a mixture, and have no accuracy)"
                if labels is not None and labels.dim() == 2
                else ""
            )
        )
    known_N = labels >= 0
    if labels.numel() and int(labels.max()) >= num_classes:
        raise DataError(f"a label is {int(labels.max())}; the student has {num_classes} classes")
    return rows_N[known_N.to(rows_N.device)], labels[known_N]


def _sums(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """float64 [4]: cross-entropy, hits, hits among the first five, rows."""
    if not len(labels_N):
        return torch.zeros(4, dtype=torch.float64, device=logits_NV.device)
    ce_N = nn.functional.cross_entropy(logits_NV.float(), labels_N, reduction="none")
    top_NK = logits_NV.topk(min(TOP, logits_NV.shape[1]), dim=-1).indices == labels_N[:, None]
    return torch.stack(
        [
            ce_N.double().sum(),
            top_NK[:, 0].double().sum(),
            top_NK.double().sum(),
            torch.tensor(float(len(labels_N)), dtype=torch.float64, device=logits_NV.device),
        ]
    )


def _metrics(
    sums: list[float], samples: Samples, language: bool, num_classes: int
) -> dict[str, Any]:
    ce, hits, hits_top, rows = sums
    if not rows:
        raise DataError(
            f"dataset {samples.name} has no label in {len(samples)} samples; there is nothing to "
            "evaluate"
        )
    loss = ce / rows
    found = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "tokens": int(rows),
        "accuracy": hits / rows,
        f"accuracy_top{TOP}": hits_top / rows,
        "n": int(rows),
    }
    return {name: found[name] for name in metric_names(language, num_classes)}


def metric_names(language: bool, num_classes: int) -> list[str]:
    """What an evaluation gives."""
    if language:
        return ["loss", "perplexity", "tokens"]
    return ["loss", "accuracy", *([f"accuracy_top{TOP}"] if num_classes > TOP else []), "n"]


def _in_order(num_samples: int, batch_size: int) -> Callable[[], Iterable[Pairs]]:
    return lambda: (
        [(i, 0) for i in range(at, min(at + batch_size, num_samples))]
        for at in range(0, num_samples, batch_size)
    )


def _student(
    student: nn.Module | Model | str | Path,
    args: Mapping[str, Any] | None,
    weights: str | Path | None,
) -> nn.Module | Model:
    """The student that is no run."""
    if isinstance(student, nn.Module | Model):
        if args or weights is not None:
            raise UsageError(
                "student arguments or weights are given for a student that is an object"
            )
        return student
    path = _as_path(student)
    if os.path.isdir(path):
        raise UsageError(
            f"{student} is a folder, and no run of train-student (it has no {OPTIONS}); expected a "
            f"RUN, its {BEST}/ or {LAST}/, or hf:{student} for a model of Hugging Face"
        )
    try:
        return load_model(str(student), args=args, weights=weights)
    except UsageError as e:
        raise (
            UsageError(f"{e}; or a RUN, its {BEST}/ or {LAST}/") if ":" not in str(student) else e
        ) from e


@dataclass(frozen=True, slots=True)
class RunStudent:
    """The student of a run as it was trained, and the checkpoint that its weights are of. classes:
    what its logits were cut to, None where all counted."""

    model: Model
    classes: int | None
    precision: str
    checkpoint: Path
    step: int
    rows: str | None  # by which convention it was trained, None if the run does not say


def _as_path(student: str | Path) -> Path:
    """A RUN as a path; what begins as a model SPEC does is none, though `hf:/models/x` looks like
    an address.
    """
    return (
        Path(student)
        if str(student).partition(":")[0] in MODELS
        else local_path(student, "--student")
    )


def _of_run(
    student: str | Path,
    args: Mapping[str, Any] | None,
    weights: str | Path | None,
    code: str | None,
) -> RunStudent | None:
    """The student of the run that `student` is the folder of, or whose best/ or last/; None for
    what is no run.
    """
    path = _as_path(student)
    of_run = path.name in (BEST, LAST) and is_run(path.parent)
    if not (is_run(path) or of_run):
        return None
    if args or weights is not None:
        raise UsageError(f"{student} is a run: it has its own arguments and weights; give none")
    return load_run(path.parent, path.name, code=code) if of_run else load_run(path, code=code)


def load_run(path: Path, name: str | None = None, *, code: str | None = None) -> RunStudent:
    """The student of a run with the weights of its checkpoint `name` (best, else last), as it was
    trained.

    code: the SPEC of the student where that is code of the caller's; UsageError where it is needed
    and not given.
    """
    document = read_options(path)
    options, recorded = document[TABLE], document[RECORDED]
    folder, spec = weights_folder(path, name), options.get("student")
    if spec is None:
        kind = printable(str(recorded.get("student")))
        hub = f", or evaluate hf:{folder}" if (folder / "config.json").is_file() else ""
        raise UsageError(
            f"{path} trained {kind}, an object: no SPEC says how to make it again; load "
            f"{folder / checkpoint.MODEL} into one, and evaluate that{hub}"
        )
    runs_code = spec.partition(":")[0] not in MODELS and spec not in PACKAGED
    if runs_code and code is None:
        raise UsageError(
            f"{path} trained the student {printable(spec)}, and what a file names is not run on "
            "its word alone; if that is code you trust, add --student-code "
            f"{shlex.quote(printable(spec))}"
        )
    if code is not None and not (
        runs_code and is_code(code) and code.partition(":")[0] not in MODELS
    ):
        raise UsageError(
            f"student_code {code} is given, but {path} trained {printable(spec)}, which needs none"
            if not runs_code
            else f"student_code {code}: expected file.py:name or package.module:name"
        )
    args, classes = options.get("student-arg") or {}, options.get("classes")
    if spec.partition(":")[0] in ("hf", "hf-config"):
        again = {key: args[key] for key in ("task", "attn_implementation") if key in args}
        if "/" in str(again.get("attn_implementation")):
            raise UsageError(
                f"{path / OPTIONS}: attn_implementation {again['attn_implementation']!r:.80} is "
                f"code of somebody else's; evaluate hf:{folder} with arguments of your own"
            )
        values, model = checkpoint.beside_saves(
            folder,
            lambda found: (
                checkpoint.read(folder, state=False),
                load_model(f"hf:{found}", args=again, dtype="float32"),
            ),
        )
    else:
        model = load_model(
            code or spec, args=args, num_classes=recorded.get("num-classes"), dtype="float32"
        )
        values = checkpoint.load(folder, model.module)[1]
    model.folder = folder  # whose run.toml knows the tokenizer
    model.named = names_in(recorded)
    step = values.get("step")
    rows = recorded.get("rows")
    return RunStudent(
        model,
        classes if type(classes) is int else None,
        options.get("precision", "float32"),
        folder,
        step if type(step) is int else 0,
        rows if rows in CONVENTIONS else None,
    )
