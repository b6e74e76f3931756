"""Everything that is checked and built before a run begins: sources, identity, student,
projections.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kdcache.cache.identity import Identity, require_same
from kdcache.data import classes
from kdcache.data.collate import read_batch, to_device
from kdcache.data.identify import identify
from kdcache.data.padding import Inputs
from kdcache.data.preprocessing import in_words
from kdcache.data.rows import NEXT_TOKEN
from kdcache.data.samples import Samples, probe_ids
from kdcache.errors import DataError, NotBuilt, UsageError
from kdcache.loss.divergences import Divergence, check_reverse_kl
from kdcache.loss.engines import meant
from kdcache.loss.targets import SoftTargets
from kdcache.models.checks import (
    UNSTEADY,
    Question,
    Run,
    beyond_positions,
    find_rows,
    is_causal,
    padding_of,
    require_softmax,
    require_tokenizer,
    steadiness,
)
from kdcache.models.model import Model, Output, forward, left_out, load_model, trying
from kdcache.models.specs import own_preprocessing, spec_folder
from kdcache.student.batches import student_rows
from kdcache.student.evaluate import cut_width, metric_names
from kdcache.student.head import Head
from kdcache.student.loader import Loader, as_cache, as_samples, cached_preprocessing
from kdcache.student.loop import autocast, row_mask
from kdcache.student.match import Matches
from kdcache.student.optim import OPTIMIZERS
from kdcache.student.run_folder import check_accept
from kdcache.student.settings import ALPHA, BEST_BY, Settings
from kdcache.user.guard import attribute

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.cache.spec import CacheSpec

PACKAGES = ("kdcache", "torch", "numpy", "safetensors", "transformers")
# --accept it: no field of the identity, but a column compared while training
VIEW_KEY = "view_key"


@dataclass(slots=True)
class Sources:
    """The cache and the data of a run, known to belong together; what of that was overlooked by
    name.
    """

    cache: Cache | None
    samples: Samples | None
    eval_samples: Samples | None
    accepted: list[str]
    recorded: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    defaults: list[str] = field(default_factory=list)  # sentences about what was not given

    @property
    def tokenizer(self) -> dict[str, Any] | None:
        """The `tokenizer` part of the identity of what is trained on, None if it is no text or does
        not say.
        """
        if self.samples is not None:
            return self.samples.tokenizer_identity
        return None if self.cache is None else self.cache.identity.tokenizer

    @property
    def teachers_tokenizer(self) -> dict[str, Any] | None:
        """What the teacher's own folder said, as part of an identity; None where it said nothing."""
        known = None if self.cache is None else self.cache.identity.teacher.get("tokenizer")
        return None if known is None else {"fingerprint": known}

    @property
    def preprocessing(self) -> str:
        """Of the pictures that are trained on, "" unknown."""
        known = "" if self.samples is None else self.samples.preprocessing
        return known or cached_preprocessing(self.cache)

    @property
    def class_names(self) -> list[str]:
        """Of what is trained on, by number: the data's, else the teacher's; [] where neither says."""
        if self.samples is not None and self.samples.class_names:
            return self.samples.class_names
        identity = None if self.cache is None else self.cache.identity
        return (
            []
            if identity is None
            else list(identity.data.get("class_names") or identity.teacher.get("class_names") or ())
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest record, as far as data or cache say; 0 where they do not."""
        if self.samples is None:
            return 0 if self.cache is None else int(self.cache.identity.data.get("window") or 0)
        known = self.samples.token_lengths
        return self.samples.window if known is None else int(known.max())

    @property
    def num_classes(self) -> int | None:
        """V of the cache, else the number of named classes."""
        if self.cache is not None and self.cache.spec.num_classes:
            return self.cache.spec.num_classes
        return None if self.samples is None else len(self.samples.class_names) or None


def one_cache(cache: Any) -> Cache | None:
    """The cache of a run, open; NotBuilt for several."""
    if isinstance(cache, list | tuple):
        if len(cache) > 1:
            raise NotBuilt(
                f"{len(cache)} caches are given: an ensemble of teachers is not built yet; give "
                "one --cache"
            )
        cache = cache[0] if cache else None
    return as_cache(cache)


def default_weights(
    settings: Settings, spec: CacheSpec | None, live_teacher: nn.Module | None
) -> tuple[Settings, list[str]]:
    """The settings with the weights of the loss where neither alpha nor weights are given, and a
    sentence if they are not alpha 0.5: that is where the cache keeps labels, or there is none.

    Of a cache without labels those of the data train only where they are asked for: alpha 1, and no
    loss of rows at all where it has none.
    """
    if (
        settings.alpha is not None
        or settings.ce_weight is not None
        or settings.kd_weight is not None
    ):
        return settings, []
    if spec is None or spec.labels:
        return dataclasses.replace(settings, alpha=ALPHA), []
    if spec.kind != "none" or live_teacher is not None:
        return dataclasses.replace(settings, alpha=1.0), [
            f"alpha 1: the cache keeps no labels; alpha {ALPHA:g} would train on the data's too"
        ]
    if not settings.match:
        raise UsageError(
            "the cache is of kind 'none': it has features and no rows; give match, which trains on "
            "them, "
            "or alpha 0 for the data's labels alone"
        )
    return dataclasses.replace(settings, ce_weight=0.0, kd_weight=0.0), [
        "no loss of labels or rows: the cache keeps neither; alpha 0 trains on the data's labels "
        "too"
    ]


def check_idle(
    settings: Settings, live_teacher: nn.Module | None, given: Mapping[str, Any], *, evaluated: bool
) -> None:
    """UsageError for an option of the soft loss that is given where that has no weight, and for
    classes of logits that nobody looks at."""
    if settings.weight_kd:
        return
    if settings.classes is not None and not settings.weight_ce and not evaluated:
        raise UsageError(
            f"classes is {settings.classes}, but no loss and no evaluation looks at logits; leave "
            "it out"
        )
    for name, value in {**given, "live_teacher": live_teacher}.items():
        if value is not None:
            shown = f"is {value}" if name != "live_teacher" else "is given"
            raise UsageError(
                f"{name} {shown}, but the soft loss has no weight (alpha 0, kd_weight 0, or a "
                "cache "
                "without rows), so it would do nothing; leave it out"
            )


def check_used(
    *,
    alpha: Any,
    ce_weight: Any,
    kd_weight: Any,
    data: Any,
    data_args: Any,
    eval_data: Any,
    eval_data_args: Any,
    eval_every: Any,
    best_by: Any,
) -> None:
    """UsageError for an option that beside, or without, another one would have no effect."""
    if alpha is not None and ce_weight is not None and kd_weight is not None:
        raise UsageError(
            f"alpha is {alpha}, beside ce_weight {ce_weight} and kd_weight {kd_weight}, which say "
            "all; "
            "give alpha, or the two weights"
        )
    for name, given, value in (("data", data, data_args), ("eval_data", eval_data, eval_data_args)):
        if value and not isinstance(given, str):
            found = "is not given" if given is None else f"is an object, the {name} is an object"
            raise UsageError(
                f"{name}_args {sorted(value)} (--{name.replace('_', '-')}-arg): {name} {found}; "
                "arguments "
                "belong to a SPEC"
            )
    for name, value in (("eval_every", eval_every), ("best_by", best_by)):
        if value is not None and eval_data is None:
            raise UsageError(
                f"{name} is {value}, but there is nothing to evaluate on; give eval_data, or leave "
                "it out"
            )


def open_sources(
    cache: Cache | None,
    data: Any,
    eval_data: Any,
    *,
    data_args: Mapping[str, Any] | None,
    eval_data_args: Mapping[str, Any] | None,
    accept: Sequence[str],
    labels: bool = True,
    student: Any = None,
) -> Sources:
    """Open what a run reads. IdentityMismatch lists the fields in which the data is not what the
    teacher saw.

    labels: whether the loss has a part for those of the data; if not, they are read only to be
    compared with the cache's, where it has some. Pictures are prepared as the cache's were; without
    one, as the `student` wants them.
    """

    def prepared() -> str:
        if samples is not None and samples.preprocessing:  # of evaluation data
            return samples.preprocessing
        folder = None if cache is not None else spec_folder(student)
        found = None if folder is None else own_preprocessing(folder)
        return cached_preprocessing(cache) if found is None else found.to_text()

    samples: Samples | None = None
    samples = as_samples(
        data,
        data_args,
        seed=0 if cache is None else cache.spec.seed,
        labels=labels or (cache is not None and bool(cache.spec.labels)),
        prepared=prepared,
    )
    eval_samples = as_samples(eval_data, eval_data_args, seed=None, prepared=prepared)
    accepted: list[str] = []
    if cache is not None and samples is not None:
        identity, tokenizer = identify(samples)
        given = Identity(
            data=identity,
            tokenizer=tokenizer,
            teacher=cache.identity.teacher,
            activation=cache.identity.activation,
        )
        of_identity = [
            name
            for name in accept
            if name not in (VIEW_KEY, UNSTEADY) and not names_evaluation(name)
        ]
        accepted = require_same(
            cache.identity,
            given,
            accept=of_identity,
            parts=("data", "tokenizer"),
            where=str(cache.path),
        )
    _check_accept(accept, cache, samples, eval_samples)
    recorded: dict[str, Any] = {
        "cache-content-id": None if cache is None else cache.content_id,
        "data": None if samples is None else _about(samples),
        "eval-data": None if eval_samples is None else _about(eval_samples),
    }
    sources = Sources(cache, samples, eval_samples, accepted, recorded)
    recorded["tokenizer"] = (sources.tokenizer or sources.teachers_tokenizer or {}).get(
        "fingerprint"
    )
    recorded["class-names"] = sources.class_names or None
    recorded["preprocessing"] = sources.preprocessing or None
    accepted += [name for name in _check_eval(sources, accept) if name not in accepted]
    return sources


def resolved(options: Mapping[str, Any], spec: CacheSpec | None) -> dict[str, Any]:
    """The options of a run (as `Settings.table` gives them, or as run.toml has them) with what they
    stand for.
    """
    out = dict(options)
    if spec is not None and spec.kind in ("topk", "full"):
        out.setdefault("k", spec.k if spec.kind == "topk" else spec.num_classes)
    out.setdefault("temperature", 1.0 if spec is not None and spec.rows == "ragged" else 2.0)
    out.setdefault("weight-decay", OPTIMIZERS.get(out.get("optimizer", ""), (None, None))[1])
    out.setdefault("micro-batch-size", out.get("batch-size"))
    out["engine"] = meant(out.get("engine", "auto"))
    if out.get("divergence") == "jsd":
        out.setdefault("beta", 0.5)
    alpha = out.pop("alpha", None)
    if isinstance(alpha, int | float):
        out = {"ce-weight": 1 - alpha, "kd-weight": alpha, **out}
    return out


def _about(samples: Samples) -> dict[str, Any]:
    """Whose data it is, as run.toml keeps it: `probe` are the keys of the samples that a cache's
    identity keeps.
    """
    return {
        "name": samples.name,
        "revision": samples.revision,
        "num-samples": len(samples),
        "probe": " ".join(f"{samples.sample_key(i):016x}" for i in probe_ids(len(samples))),
    }


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
            "with "
            f"({in_words(ours)}); use it with the latter, which run.toml keeps"
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


def check_weights(settings: Settings, sources: Sources, live_teacher: nn.Module | None) -> None:
    """UsageError for a part of the loss that has nothing to learn from."""
    spec = None if sources.cache is None else sources.cache.spec
    if settings.weight_kd and live_teacher is None:
        if spec is None:
            raise UsageError(
                "the soft loss has a weight but there is no teacher: give a cache, or alpha 0 for "
                "training on hard labels alone"
            )
        if spec.kind == "none":
            raise UsageError(
                f"the soft loss has the weight {settings.weight_kd:g}, but the cache is of kind "
                "'none': "
                "it has features and no rows; leave alpha and the weights out, for match alone"
            )
    if settings.classes is not None and spec is not None and spec.num_classes > settings.classes:
        raise UsageError(
            f"classes is {settings.classes}, but the cache is of {spec.num_classes} classes: its "
            f"answers are shares of all of them; dump again with --classes {settings.classes}"
        )
    if settings.match and spec is None:
        raise UsageError("match needs a cache with features; no cache is given")


def load_student(
    student: Any,
    sources: Sources,
    *,
    args: Mapping[str, Any] | None,
    weights: str | Path | None,
    seed: int,
) -> Model:
    """The student from a SPEC (weights in float32), or a module or `Model` as it is."""
    if isinstance(student, str | Path):
        return load_model(
            str(student),
            args=args,
            weights=weights,
            seed=seed,
            dtype="float32",
            num_classes=sources.num_classes,
        )
    if args or weights is not None:
        raise UsageError(
            "student arguments or weights are given, but the student is an object; they belong to "
            "a SPEC"
        )
    if isinstance(student, Model):
        return student
    if not isinstance(student, nn.Module):
        raise UsageError(
            f"the student is a {type(student).__name__}; expected a model SPEC or a torch.nn.Module"
        )
    # Of Hugging Face models: a folder that from_pretrained opens.
    save = attribute(student, "save_pretrained", f"the student ({type(student).__name__})")
    return Model(student, "", f"{type(student).__name__} as given", None, "", save)


@dataclass(frozen=True, slots=True)
class Checked:
    """What a first look at a student gave: the head that runs inside the loss, the projections of
    --match, the metric that best/ is best by, and sentences about its logits and the losses of its
    own."""

    head: Head | None
    matches: Matches | None
    best_by: str
    said: list[str]


def check_student(
    model: Model,
    loader: Loader,
    settings: Settings,
    *,
    evaluated: bool = False,
    best_by: str | None = None,
) -> Checked:
    """One forward pass over a few records in eval mode; the head that is to run inside the loss is
    found by it, and the projections of --match are built from it. best_by: of the run, None for the
    default: eval_accuracy where there is one, else eval_loss.

    UsageError for a student with fewer classes than the teacher, for no labels under a hard loss,
    for a metric that there is not, and for a head that cannot run inside the loss as logits_memory
    asks; DataError for inputs that the student cannot take, and where its rows are not the
    teacher's.
    """
    module, dataset = model.module, None if loader.samples is None else loader.samples.dataset
    loader.padding = padding_of(module, dataset)
    first = loader.first_inputs()
    inputs = to_device(first.inputs, loader.device)
    with _trying(module, inputs), autocast(loader.device, settings.precision):
        head = (
            None if settings.logits_memory is None else Head(module, settings.logits_memory, inputs)
        )
    ask = forward if head is None else head.trunk
    if loader.rows is None and not loader.has_rows:
        with _trying(module, inputs), autocast(loader.device, settings.precision):
            loader.rows, loader.why = find_rows(
                module,
                first,
                ask(module, inputs),
                task=model.task,
                device=loader.device,
                role="student",
                run=ask,
                num_classes=None if head is None else head.num_classes,
            )
    elif loader.rows is None and loader.convention == NEXT_TOKEN:
        with _trying(module, inputs), autocast(loader.device, settings.precision):
            # one row a record is another fault, which is named below
            answer = ask(module, inputs)
            if (
                answer.logits.dim() == 3
                and is_causal(module, first, answer, loader.device, "student", ask) is False
            ):
                raise DataError(
                    f"the student ({type(module).__name__}) looks at later tokens, and the rows of "
                    "the "
                    "cache predict them: it would learn to copy what it is to predict. If that is "
                    "meant: "
                    "--rows next-token"
                )
    micro = loader.peek()
    if settings.weight_ce and micro.labels is None:
        without = (
            "leave alpha and the weights out, for match alone"
            if loader.spec and loader.spec.kind == "none"
            else "there is nothing to learn from without a cache"
            if loader.spec is None and not settings.weight_kd
            else "give alpha 1 (or ce_weight 0)"
        )
        raise UsageError(
            f"the hard loss has the weight {settings.weight_ce:g}, but neither the cache nor the "
            "data has "
            f"labels; {without}"
        )
    batch = loader.place(micro)

    def run() -> Output:
        with _trying(module, batch["inputs"]), autocast(loader.device, settings.precision):
            return ask(module, batch["inputs"])

    output = run()
    logits = output.logits.shape[-1] if head is None else head.num_classes
    said, width = (
        _check_logits(logits, settings, loader, batch["targets"]),
        cut_width(logits, settings.classes),
    )
    # nobody knew V: from here on the labels are looked at with it
    if loader.num_classes is None:
        loader.num_classes = width
        micro = loader.peek()
    if settings.weight_ce or settings.weight_kd or evaluated:
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
    best_by = best_by or next(name for name in ("eval_accuracy", "eval_loss") if name in gives)
    if evaluated and (best_by not in gives or best_by not in BEST_BY):
        raise UsageError(
            f"best_by is {best_by}, but evaluating this student gives "
            f"{', '.join(name for name in gives if name in BEST_BY)}"
        )
    _check_steady(module, loader, settings, ask)
    if not settings.match or loader.spec is None:
        return Checked(head, None, best_by, said)
    if head is not None and any(match.module == head.path for match in settings.matches):
        raise UsageError(
            f"match names {head.path!r}, the head, which with logits_memory does not run as a "
            "module of "
            "its own; leave out one of them"
        )
    matches = Matches(module, settings.matches, loader.spec.features, seed=settings.seed)
    matches.prepare(run, real=micro.collated.real, row_mask=row_mask(batch, output.logits))
    return Checked(head, matches, best_by, said)


def _check_logits(
    logits: int, settings: Settings, loader: Loader, targets: SoftTargets | None
) -> list[str]:
    """What is to be said of a student's logits beside its teacher's; UsageError where they do not
    go together.
    """
    if not settings.weight_ce and not settings.weight_kd:
        return []
    taught = loader.num_classes if targets is None else targets.num_classes
    # else they are names of the data
    taught = taught if targets is not None or loader.spec is not None else None
    if taught == 1:
        raise UsageError(
            "the teacher has one class, whose softmax is always 1 and says nothing; expected at "
            "least two "
            "(of a sigmoid's logit z the teacher is to give [0, z])"
        )
    if taught is not None and logits < taught:
        cut = (
            f"give classes {logits}, which cuts both"
            if loader.teacher is not None
            else f"dump again with --classes {logits}"
        )
        raise UsageError(
            f"the student has {logits} classes, the teacher {taught}; a student needs at least as "
            "many. "
            f"Where the teacher's last ones are padding that no label and no token uses, {cut}"
        )
    width = cut_width(logits, settings.classes)
    said = [f"student: {logits} logits, cut to {width} classes"] if width < logits else []
    if taught is not None and width > taught:
        if targets is not None and targets.log_probs_NK.shape[1] == taught:
            check_reverse_kl(
                width, taught, Divergence(settings.divergence, settings.beta, settings.tail)
            )
        said.append(
            f"student: {width} classes, the teacher has {taught}: the others have teacher "
            "probability 0"
        )
    return said


def names_evaluation(name: str) -> bool:
    """Whether a name that --accept is given is of the data that is evaluated on."""
    return name.partition(".")[0] == "eval_data"


def _check_accept(
    accept: Sequence[str], cache: Cache | None, samples: Samples | None, evaluation: Samples | None
) -> None:
    """UsageError for a name that overlooks nothing here, whatever the data."""
    view_keys = (
        cache is not None and samples is not None and (cache.spec.view_keys or samples.collates)
    )
    for name in accept:
        if name == VIEW_KEY and not view_keys:
            raise UsageError(
                f"accept {name!r}: there are no view keys to compare: they are of a cache of "
                "augmented or "
                "decoded inputs, or of data with a collate_fn; leave it out"
            )
        if names_evaluation(name) and evaluation is None:
            raise UsageError(f"accept {name!r}: there is no evaluation data; leave it out")
        if name == "data" or name.startswith("data."):
            if samples is None:
                raise UsageError(
                    f"accept {name!r}: no data is given beside the cache; leave it out"
                )
    named = [name for name in accept if name not in (VIEW_KEY, UNSTEADY)]
    check_accept([name for name in named if cache is None or names_evaluation(name)])
    # else the identity's were looked at where it was compared
    if cache is not None and samples is None:
        require_same(
            cache.identity,
            cache.identity,
            accept=[name for name in named if not names_evaluation(name)],
        )


def _check_steady(module: nn.Module, loader: Loader, settings: Settings, run: Run) -> None:
    """DataError for a student whose answer in eval mode is left to chance, or to what shares its
    batch.
    """
    samples = loader.samples
    asked = Question(
        module,
        loader.device,
        loader.inputs_of,
        loader.convention,
        "student",
        run=run,
        collate_fn=samples.name if samples is not None and samples.collates else None,
        pad_id=loader.padding.pad_id,
        context=lambda: autocast(loader.device, settings.precision),
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
                f" It would be evaluated by chance too; to train it all the same: --accept "
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
        with torch.no_grad(), trying("student", module, inputs):
            yield
    finally:
        module.train(training)


def versions() -> dict[str, str]:
    """Of Python and the packages whose arithmetic or files a run depends on."""
    out = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            out[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return out


def _check_eval(sources: Sources, accept: Sequence[str]) -> list[str]:
    """What was accepted. DataError for evaluation data without labels, or whose tokenizer is not
    that of training; IdentityMismatch where the classes are not."""
    cache, samples, evaluation = sources.cache, sources.samples, sources.eval_samples
    if evaluation is None:
        return []
    first = read_batch(evaluation, [(0, 0)])
    if first.labels is None and first.lengths is None:
        raise DataError(
            f"evaluation data {evaluation.name} has no labels; there is nothing to evaluate on"
        )
    # Two data sets of one run are somebody's own; a teacher's names may be those of another naming.
    of_data = cache is None or sources.class_names != cache.identity.teacher.get("class_names")
    found, said = classes.check(
        sources.class_names,
        evaluation.class_names,
        accept=accept,
        strict=of_data,
        of=("the training data", f"the evaluation data {evaluation.name}"),
    )
    sources.notes += said
    tokens = (
        samples.tokenizer_identity
        if samples is not None
        else None
        if cache is None
        else cache.identity.tokenizer
    )
    if tokens and evaluation.tokenizer_identity and tokens != evaluation.tokenizer_identity:
        raise DataError(
            f"evaluation data {evaluation.name} has another tokenizer than training: "
            f"{evaluation.tokenizer_identity}, expected {tokens}"
        )
    theirs, own = sources.teachers_tokenizer, evaluation.tokenizer_identity
    if (
        not tokens
        and theirs
        and own
        and own.get("fingerprint") not in (None, theirs["fingerprint"])
    ):
        raise DataError(
            f"evaluation data {evaluation.name} has another tokenizer than the teacher: {own}, "
            "expected "
            f"{theirs}"
        )
    return found
