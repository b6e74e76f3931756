"""What a dump will write, decided before its first shard: a pure function of teacher, data and
options.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.cache.catalog import check_shards
from kdcache.cache.columns import MAX_ELEMENTS, ROOT
from kdcache.cache.identity import Identity
from kdcache.cache.spec import KINDS, CacheSpec, temperature_name
from kdcache.data.code_specs import is_code
from kdcache.data.collate import Collated, beyond_tokens
from kdcache.data.identify import identify
from kdcache.data.row_selection import NEXT_TOKEN, POSITION, next_token_rows, position_rows
from kdcache.data.samples import Samples, evenly_spaced, extremes, probe_ids
from kdcache.errors import DataError, UsageError
from kdcache.models.checks import beyond_positions, find_rows, require_softmax
from kdcache.models.model import Model
from kdcache.models.specs import RANDOM
from kdcache.teacher.answer import BatchRows, ask, read, row_namer, rows_of
from kdcache.teacher.hooks import FeatureHooks, FeatureRequest, feature_specs
from kdcache.teacher.reduce import check_labels
from kdcache.user.arguments import at_least

# classes: 2 KiB a row in float16, about what k = 64 with two tails saves little of
FULL_UP_TO = 1024
DEFAULT_K = 64
DEFAULT_TEMPERATURES = {"one": ("1", "2", "4"), "ragged": ("1", "2")}
DEFAULT_SHARD_SIZE = 256 * 2**20
# What an interruption can lose of a dump is one shard of each rank, so that a shard is a small part
# of it: of bytes, of records, of teacher time. The time is not measured: equal commands would then
# give unequal caches. 2^17 records are minutes of a teacher that answers a few hundred a second;
# dump.py says so where it looks like much longer.
PARTS = 64  # shards that a dump is cut into, if they are not too small:
# and so many for each rank, so that the last ones do not wait long for each other
PARTS_A_RANK = 4
MOST_RECORDS = 2**17
# of a shard; its container, commit record and line in the manifest are about 5 KiB
LEAST_BYTES = 2**17
LEAST_RECORDS = 256  # several forward passes: batches end where a shard does
# a number of its own: the batch size is compute, and must not decide a cache's content
PROBE_RECORDS = 8
VIEWS_EQUAL, RANDOM_TEACHER, BEYOND_POSITIONS = "views-equal", "random-teacher", "beyond-positions"
# how many times more rows a record may have than any of the probe, if no window says
LONGER_THAN_PROBED = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What the caller asks of a cache; None and empty mean the default."""

    kind: str | None = None
    k: int | None = None
    tiers: tuple[int, ...] = ()
    temperatures: tuple[str, ...] = ()
    features: tuple[FeatureRequest, ...] = ()
    views: int = 1
    values: str = "float16"
    seed: int = 0
    shard_size: int | None = None
    records_per_shard: int | None = None
    labels: bool | None = None
    moments: bool = False
    limit_samples: int | None = None
    rows: str | None = None
    tokens: bool | None = None
    classes: int | None = None

    def __post_init__(self) -> None:
        """UsageError for sizes that cannot be."""
        if self.shard_size is not None and self.records_per_shard is not None:
            raise UsageError(
                f"--shard-size {self.shard_size} and --records-per-shard {self.records_per_shard} "
                "both say how large a shard is; give one of them"
            )
        at_least("--views", self.views, 1)
        at_least("--shard-size", self.shard_size, 1)
        at_least("--records-per-shard", self.records_per_shard, 1)
        at_least("limit_samples", self.limit_samples, 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """The spec and identity of the cache, the defaults that were taken (sentences), its predicted
    size, what is odd about it: (code, text), the dtype in which the teacher gives its logits, and
    which rows count (None: features alone are kept), also in words that say why."""

    spec: CacheSpec
    identity: Identity
    defaults: tuple[str, ...]
    record_bytes: int
    warnings: tuple[tuple[str, str], ...]
    logits_dtype: torch.dtype
    convention: str | None
    rows: str

    @property
    def predicted_bytes(self) -> int:
        return self.record_bytes * self.spec.num_records


@dataclass(frozen=True, slots=True)
class Probe:
    """What a few samples, `ids`, showed; `usual_B` are the evenly spaced ones, without the shortest
    and the longest.
    """

    num_classes: int  # of so many logits
    logits: int
    batch: Collated
    rows: BatchRows
    features: dict[str, Tensor]
    dtype: torch.dtype
    warning: str | None
    convention: str | None
    why: str
    vocabulary: int
    ids: list[int]
    usual_B: npt.NDArray[np.bool_]

    @property
    def ragged(self) -> bool:
        return self.convention in (POSITION, NEXT_TOKEN)


def temperature_names(values: Sequence[float | str]) -> tuple[str, ...]:
    """Temperatures in their one spelling, ascending, each once."""
    return tuple(sorted({temperature_name(value) for value in values}, key=Fraction))


def make_plan(
    model: Model,
    samples: Samples,
    wanted: Wanted,
    device: torch.device,
    *,
    world: int = 1,
    records_of_shards: int | None = None,
) -> Plan:
    """The plan of a dump by `world` ranks. The teacher is in eval mode and on `device`.

    records_of_shards: records_per_shard of the cache that is continued, which holds unless a size
    is wanted by name.

    UsageError for an option that is foreign to the kind or does not fit the teacher, DataError for
    data that cannot be used. Runs one forward pass over at most 8 samples.
    """
    count = (
        len(samples) if wanted.limit_samples is None else min(wanted.limit_samples, len(samples))
    )
    probed = _probe(model, samples, wanted, count, device)
    data, tokenizer = identify(samples)
    teacher = {**model.identity, "num_classes": probed.num_classes}
    if probed.num_classes < probed.logits:
        teacher["cut_from"] = probed.logits
    kept, defaults = _kept(model, wanted, probed)
    if kept["kind"] != "none":
        _check_some_row(samples, probed, count)
    specs = feature_specs(wanted.features, probed.features, probed.ragged)
    if kept["kind"] == "none" and not any(feature.level == "row" for feature in specs):
        kept |= {"rows": "one", "tokens": False, "predicts": "", "vocabulary": 0}
    spec = CacheSpec(
        samples=(0, count),
        views=(0, wanted.views),
        seed=wanted.seed,
        view_keys=samples.has_view_keys,
        records_per_shard=1,
        features=specs,
        **kept,
    )
    if spec.labels and probed.rows.labels is not None:
        check_labels(probed.rows.labels, spec.num_classes, row_namer(0, probed.ids, probed.rows))
    record_bytes, most = _record_bytes(
        spec, probed, samples.window, _usual_length(samples, probed.batch, count)
    )
    chosen = wanted.records_per_shard
    if chosen is None and wanted.shard_size is not None:
        chosen = min(max(1, wanted.shard_size // record_bytes), most)
    if chosen is None:
        chosen = records_of_shards or min(
            records_per_shard(count, wanted.views, record_bytes, world), most
        )
    if wanted.records_per_shard is not None and wanted.records_per_shard > most:
        raise UsageError(
            f"--records-per-shard is {chosen}; at most {most} keep every column below 2^31 elements"
        )
    spec = dataclasses.replace(spec, records_per_shard=min(chosen, count))
    check_shards(spec)
    warnings = _warn_of_random(model)
    if probed.warning is not None:
        warnings += ((BEYOND_POSITIONS, probed.warning),)
    if wanted.views > 1:
        warnings += _warn_of_equal_views(samples, count)
    return Plan(
        spec,
        Identity(data=data, tokenizer=tokenizer, teacher=teacher),
        defaults,
        record_bytes,
        warnings,
        probed.dtype,
        probed.convention,
        f"{probed.convention} ({probed.why})",
    )


def records_per_shard(count: int, views: int, record_bytes: int, world: int) -> int:
    """Records of a shard where nobody says: a function of the dump's size and of the ranks that
    share it.

    A 64th of the dump, or a quarter of a rank's part, if that is at least 256 records and 128 KiB;
    at most 256 MiB and 2^17 records; and never so many that a rank has no shard, as long as there
    is a record for each.
    """
    part = -(-count * views // max(PARTS, PARTS_A_RANK * world))
    least = max(LEAST_RECORDS, -(-LEAST_BYTES // record_bytes))
    most = min(MOST_RECORDS, max(1, DEFAULT_SHARD_SIZE // record_bytes))
    shares = min(count, -(-world // views))  # shards that each view needs
    each = -(-count // shares)
    if -(-count // each) < shares:
        each = count // shares
    return min(max(part, least), most, each)


def _warn_of_random(model: Model) -> tuple[tuple[str, str], ...]:
    if RANDOM not in model.loaded:
        return ()
    unless = f", unless {model.spec} loads weights of its own" if is_code(model.spec) else ""
    return (
        (
            RANDOM_TEACHER,
            f"THE TEACHER IS NOT TRAINED{unless}: {model.loaded}, so that its answers are noise; "
            "give --teacher-weights, or a SPEC that names trained weights",
        ),
    )


def _warn_of_equal_views(samples: Samples, count: int) -> tuple[tuple[str, str], ...]:
    ids = evenly_spaced(count, PROBE_RECORDS)
    for sample_id in ids:
        first, second = (samples.item(sample_id, view) for view in (0, 1))
        if (first.sample_key, first.view_key) != (second.sample_key, second.view_key):
            return ()
    return (
        (
            VIEWS_EQUAL,
            f"views 0 and 1 of all {len(ids)} samples looked at are equal: more views of "
            f"{samples.name} only repeat the same answers; give it random views (imagefolder: "
            "--data-arg augment=true, your own dataset: view(sample_id, view, rng)) or leave out "
            "--views",
        ),
    )


def _probe(
    model: Model, samples: Samples, wanted: Wanted, count: int, device: torch.device
) -> Probe:
    # The shortest and the longest are among them: what a model cannot do with padding shows here.
    ids = sorted(
        {*evenly_spaced(count, PROBE_RECORDS), *(i for i in extremes(samples) if i < count)}
    )
    batch = read(samples, 0, ids)
    longest, warning = _longest(samples, batch, count), None
    if longest:
        warning = beyond_positions(model, longest, role="teacher")
    with FeatureHooks(model.module, wanted.features) as hooks:
        output = ask(model.module, hooks, batch, device)
    convention, why = None, "features alone"
    raw = any(f.recipe == "raw" for f in wanted.features)
    if wanted.kind != "none" or (raw and output.logits.ndim == 3):
        convention, why = find_rows(
            model.module,
            batch,
            output,
            asked=wanted.rows,
            task=model.task,
            device=device,
            role="teacher",
        )
    rows = rows_of(batch, output, convention)
    features = hooks.take(rows.mask_BL)
    width = output.logits.shape[-1]
    classes = _classes(model, wanted, width)
    return Probe(
        classes,
        width,
        batch,
        rows,
        features,
        output.logits.dtype,
        warning,
        convention,
        why,
        _vocabulary(model.module, samples, convention, classes),
        ids,
        np.isin(ids, evenly_spaced(count, PROBE_RECORDS)),
    )


def _classes(model: Model, wanted: Wanted, width: int) -> int:
    """V: all logits, or as many as --classes says; UsageError where a teacher has other ones."""
    if wanted.kind == "none":
        if wanted.classes is not None:
            raise UsageError(
                "--classes is foreign to kind none, which keeps features and no rows; drop it"
            )
        return width
    says = f"teacher {model.spec} says it has {model.num_classes} classes, but gives {width} logits"
    if wanted.classes is None and model.num_classes not in (None, width):
        raise UsageError(
            says
            + (
                f"; where the rest is padding that nothing uses: --classes {model.num_classes}"
                if (model.num_classes or 0) < width
                else ""
            )
        )
    if wanted.classes is not None and not 1 <= wanted.classes <= width:
        raise UsageError(
            f"--classes is {wanted.classes}, but the teacher gives {width} logits; expected 1 to "
            f"{width}"
        )
    return wanted.classes or width


def _vocabulary(
    module: torch.nn.Module, samples: Samples, convention: str | None, classes: int
) -> int:
    """Token ids that the teacher reads: those of its input embeddings, else of the dataset; 2^32
    where neither says so and its classes are no tokens."""
    embedding = getattr(module, "get_input_embeddings", lambda: None)
    with contextlib.suppress(NotImplementedError, AttributeError, TypeError):
        rows = getattr(embedding(), "num_embeddings", None)
        if type(rows) is int and rows > 0:
            return max(rows, classes) if convention == NEXT_TOKEN else rows
    own = getattr(samples.dataset, "vocab_size", None)
    if convention == NEXT_TOKEN:
        return max(own, classes) if type(own) is int else classes
    return own if type(own) is int and own > 0 else 2**32


def _check_some_row(samples: Samples, probed: Probe, count: int) -> None:
    """DataError where none of the samples that a probe looks at has a row: there is nothing to ask
    the teacher.
    """
    if probed.rows.count or probed.num_classes < 1:
        return
    ids = [i for i in probe_ids(len(samples)) if i < count]
    length = 0 if probed.rows.mask_BL is None else probed.rows.mask_BL.shape[1]
    for at in range(0, len(ids), PROBE_RECORDS):
        batch = read(samples, 0, ids[at : at + PROBE_RECORDS])
        if probed.convention == POSITION and (batch.labels is None or batch.labels.ndim != 2):
            return  # its rows are the model's to say
        selection = (
            next_token_rows(batch, None, probed.num_classes)
            if probed.convention == NEXT_TOKEN
            else position_rows(batch, batch.labels.shape[1] if batch.labels is not None else length)
        )
        if selection.counts_B.any():
            return
    raise DataError(
        f"dataset {samples.name} has no row in any of the {len(ids)} samples looked at, of "
        f"{count}: every label is -100, or no record has a token to predict; there is nothing to "
        "ask the teacher"
    )


def _longest(samples: Samples, batch: Collated, count: int) -> int:
    """Tokens of the longest sample, as far as it is known: to the dataset, by its window, or of
    `batch`.
    """
    if batch.lengths is None:
        return 0
    if samples.token_lengths is not None:
        return int(np.max(samples.token_lengths[:count]))
    return samples.window or int(batch.lengths.max())


def _usual_length(samples: Samples, batch: Collated, count: int) -> float:
    """Mean tokens of a sample: exact where the dataset knows, else over those that an identity
    probes.
    """
    if batch.lengths is None:
        return 0.0
    if samples.token_lengths is not None:
        return float(np.mean(samples.token_lengths[:count]))
    lengths = read(samples, 0, probe_ids(count)).lengths
    return 0.0 if lengths is None else float(np.mean(lengths))


def _kept(model: Model, wanted: Wanted, probed: Probe) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields of a spec that say what is kept of a row, and the defaults that were taken."""
    classes, rows = probed.num_classes, "ragged" if probed.ragged else "one"
    kind, defaults = _kind(wanted, classes)
    _refuse_foreign(wanted, kind, classes)
    if kind != "none":
        require_softmax(model.module, classes, role="teacher")
    tokens = _tokens(wanted, probed)
    kept: dict[str, Any] = {"kind": kind, "rows": rows, "values": wanted.values, "tokens": tokens}
    if probed.ragged:
        kept["predicts"] = (
            "" if probed.convention == (NEXT_TOKEN if tokens else POSITION) else probed.convention
        )
    if tokens and probed.vocabulary != (0 if kind == "none" else probed.num_classes):
        kept["vocabulary"] = probed.vocabulary
    if kind == "none":
        return kept | {"num_classes": 0}, tuple(defaults)
    kept |= {"num_classes": classes, "moments": wanted.moments}
    if kind in KINDS and KINDS[kind].sparse:
        kept["tiers"] = _tiers(wanted, classes, defaults)
        kept["temperatures"] = wanted.temperatures or DEFAULT_TEMPERATURES[rows]
        if not wanted.temperatures:
            defaults.append(f"temperatures {', '.join(DEFAULT_TEMPERATURES[rows])}")
    if wanted.labels and probed.rows.labels is None:
        raise UsageError("--labels: the data has none; leave it out")
    if wanted.labels is not False and probed.rows.labels is not None:
        kept["labels"] = probed.rows.labels.shape[1]
        kept["label_weights"] = probed.rows.label_weight is not None
    return kept, tuple(defaults)


def _tokens(wanted: Wanted, probed: Probe) -> bool:
    """Whether the cache keeps the tokens, to train on them alone: where they are all that the
    teacher was given.
    """
    if not probed.ragged:
        beyond: str | None = "records with one row each"
    else:
        beyond = beyond_tokens(probed.batch)
    if wanted.tokens and beyond is not None:
        raise UsageError(
            f"--tokens: the teacher was given {beyond}, which tokens alone do not say; leave it "
            "out: students then take their inputs from --data"
        )
    return beyond is None if wanted.tokens is None else wanted.tokens


def _kind(wanted: Wanted, classes: int) -> tuple[str, list[str]]:
    if wanted.kind is not None:
        return wanted.kind, []
    if wanted.k is not None or wanted.tiers:
        return "topk", ["kind topk, as k is given"]
    if classes <= FULL_UP_TO:
        return "full", [f"kind full: {classes} classes are at most {FULL_UP_TO}"]
    return "topk", [f"kind topk: {classes} classes are more than {FULL_UP_TO}"]


def _refuse_foreign(wanted: Wanted, kind: str, classes: int) -> None:
    if kind not in KINDS or KINDS[kind].sparse:
        return  # an unknown kind is refused by the spec
    given = {"--k": wanted.k, "--tier": wanted.tiers, "--temperature": wanted.temperatures}
    why = (
        f"keeps all {classes} logits and takes any temperature later; drop it, or give --kind topk"
    )
    if kind == "none":
        given |= {
            "--labels": wanted.labels,
            "--moments": wanted.moments,
            "--values": wanted.values != "float16",
        }
        why = "keeps features and no rows; drop it"
    for flag, value in given.items():
        if value:
            raise UsageError(f"{flag} is foreign to kind {kind}, which {why}")


def _tiers(wanted: Wanted, classes: int, defaults: list[str]) -> tuple[int, ...]:
    k = wanted.k if wanted.k is not None else max(wanted.tiers, default=min(DEFAULT_K, classes))
    if wanted.k is None and not wanted.tiers:
        defaults.append(f"k {k}")
    if k > classes:
        raise UsageError(
            f"k is {k}, but the teacher has {classes} classes; give --k of at most {classes}"
            + (", or --kind full" if classes < MAX_ELEMENTS else "")
        )
    above = [tier for tier in wanted.tiers if tier > k]
    if above:
        raise UsageError(
            f"tier {above[0]} is above k = {k}; a tier is a smaller k that can be read alone"
        )
    return tuple(sorted({*wanted.tiers, k}))


def _record_bytes(
    spec: CacheSpec, probed: Probe, window: int, usual_length: float
) -> tuple[int, int]:
    """Predicted bytes of a record, and the most records of a shard that keep every column below
    2^31 elements.

    usual_length: mean tokens of a record, 0 without any; eight records are too few to tell it, the
    last window of a document being shorter than the others.
    """
    lengths = (
        probed.batch.lengths
        if probed.batch.lengths is not None
        else np.zeros(len(probed.batch), np.int64)
    )
    # A record has as many rows fewer than tokens as those of the probe: one, where each position
    # predicts the next.
    longer, rows_B = (
        usual_length - float(lengths[probed.usual_B].mean()),
        np.diff(probed.rows.offsets),
    )
    usual = {
        ROOT: 1.0,
        "row": max(0.0, float(rows_B[probed.usual_B].mean()) + longer),
        "token": usual_length,
    }
    rows_most = int(rows_B.max(initial=1))
    most = {ROOT: 1, "row": 1, "token": window or int(max(lengths)) * LONGER_THAN_PROBED}
    if spec.rows == "ragged":
        most["row"] = window or rows_most * LONGER_THAN_PROBED
    total = sum(column.row_bytes * usual[column.level] for column in spec.columns())
    total += sum(8 for level in spec.levels() if level.ragged)
    limit = min(
        (MAX_ELEMENTS - 1) // max(1, column.width * most[column.level]) for column in spec.columns()
    )
    if limit < 1:
        raise UsageError(
            "one record alone would fill a column with 2^31 elements; keep less, or take shorter "
            "samples"
        )
    return max(1, math.ceil(total)), limit
