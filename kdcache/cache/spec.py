"""What decides the content of a cache, frozen and validated: two caches with equal specs and
identities are equal.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from kdcache.cache.columns import MAX_ELEMENTS, NAME, ROOT, Array, Column, Level
from kdcache.cache.values import CODECS, ValueCodec, value_codec
from kdcache.errors import FieldDifference, NotBuilt, UsageError, did_you_mean

KINDS_LATER = ("topp", "sampled", "hybrid", "given")
RECIPES = ["raw", "map", "pool", "cls", "last", "energy"]
FEATURE_DTYPES = ("float32", "float16", "bfloat16", "int8")
ROWS = ("one", "ragged")
LEVELS = ("row", "token")  # below the root
PREDICTS = ("position", "next-token")  # what a row of ragged ones is about
# of a spec: left out of its JSON where they have their default
LATER_FIELDS = {"predicts", "vocabulary"}
MAX_CLASSES = 2**32
MAX_TIERS = 8
MAX_TEMPERATURES = 16
MAX_LABELS = 16
MAX_SAMPLES = 2**48
TEMPERATURE = re.compile(r"(0|[1-9]\d{0,2})(\.\d{0,5}[1-9])?")


def temperature_name(value: float | str) -> str:
    """The one spelling of a temperature: 2.0 -> "2", 1.50 -> "1.5". UsageError unless 0 < T < 1000,
    <= 6 decimals.
    """
    try:
        text = f"{float(value):.6f}".rstrip("0").rstrip(".")
        if (
            TEMPERATURE.fullmatch(text)
            and abs(float(text) - float(value)) < 1e-9
            and float(text) > 0
        ):
            return text
    except (ValueError, OverflowError):
        pass
    raise UsageError(
        f"temperature {value!r}: expected a number above 0 and below 1000 with at most 6 decimals"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSpec:
    """One cached activation: `module` of the teacher, reduced by `recipe`, kept as `dtype` with
    inner `shape`.
    """

    name: str
    module: str
    recipe: str
    dtype: str
    shape: tuple[int, ...]
    level: str = ROOT  # "record", or "row" for one vector per row of a token cache

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UsageError(
                f"feature name {self.name!r}: expected [a-z0-9_], at most 64 characters"
            )
        _one_of("recipe", self.recipe, (*RECIPES, "gram"), later=("gram",))
        _one_of("feature dtype", self.dtype, FEATURE_DTYPES)
        _one_of("feature level", self.level, (ROOT, "row"))
        if (
            len(self.shape) > 6
            or not all(1 <= n < MAX_ELEMENTS for n in self.shape)
            or self._width() >= MAX_ELEMENTS
        ):
            raise UsageError(
                f"feature {self.name}: shape {list(self.shape)} is empty or has 2^31 elements or "
                "more"
            )
        if self.dtype == "int8" and not self.shape:
            raise UsageError(
                f"feature {self.name}: int8 needs a last axis to scale; a scalar has none"
            )

    def _width(self) -> int:
        return int(np.prod([float(n) for n in self.shape])) if self.shape else 1

    @property
    def column(self) -> str:
        return f"feature_{self.name}"

    def columns(self) -> list[Column]:
        """The value column, and for int8 its float32 scales, one for each vector along the last
        axis.
        """
        out = [Column(self.column, self.level, self.dtype, self.shape)]
        if self.dtype == "int8":
            out.append(Column(f"{self.column}_scale", self.level, "float32", self.shape[:-1]))
        return out

    def to_json(self) -> dict[str, Any]:
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


class ShardRange(NamedTuple):
    """Samples [start, stop) of one view: what a shard holds, fixed before the first forward pass."""

    shard: int
    view: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Columns, levels and offsets of a spec by name, in the order of the spec."""

    columns: dict[str, Column]
    levels: dict[str, Level]
    offsets: dict[str, Level]  # key of the offsets buffer -> its ragged level
    names: list[str]  # the keys of a `Columns` mapping: offsets, then columns
    scales: frozenset[str]  # the columns that hold the scales of int8 features


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Everything that decides the content of a cache, except whose answers they are (`Identity`).

    `num_classes` is V, 0 for kind none. `samples` and `views` are half-open ranges. `tiers` are the
    k's of kind topk, ascending. `temperatures` are the ones whose tails are stored. `labels` is J,
    0 when no label is stored.
    `predicts` says whether ragged rows answer for their own position or for the next token; ""
    where that follows from
    `tokens`. `vocabulary` is the number of token ids that the teacher reads, 0 where it is V.
    Raises UsageError for a field that cannot be, NotBuilt for a name the design knows and this
    version does not.
    """

    kind: str
    num_classes: int
    samples: tuple[int, int]
    records_per_shard: int
    views: tuple[int, int] = (0, 1)
    seed: int = 0
    rows: str = "one"
    tiers: tuple[int, ...] = ()
    values: str = "float16"
    temperatures: tuple[str, ...] = ()
    labels: int = 0
    label_weights: bool = False
    moments: bool = False
    row_weights: bool = False
    view_keys: bool = False
    tokens: bool = False
    predicts: str = ""
    vocabulary: int = 0
    features: tuple[FeatureSpec, ...] = ()

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, tuple(KINDS), later=KINDS_LATER)
        _one_of("values", self.values, tuple(CODECS))
        _one_of("rows", self.rows, ROWS)
        _range("samples", self.samples, MAX_SAMPLES)
        _range("views", self.views, 2**31)
        _between("records_per_shard", self.records_per_shard, 1, MAX_ELEMENTS - 1)
        _between("seed", self.seed, 0, 2**53 - 1)
        _between("labels", self.labels, 0, MAX_LABELS)
        KINDS[self.kind].check(self)
        if self.label_weights and not self.labels:
            raise UsageError("label_weights needs labels of at least 1")
        if self.tokens and self.rows != "ragged":
            raise UsageError("tokens needs rows='ragged'")
        if self.predicts:
            _one_of("predicts", self.predicts, PREDICTS)
            if self.rows != "ragged" or self.predicts == (
                "next-token" if self.tokens else "position"
            ):
                raise UsageError(
                    f"predicts is {self.predicts!r}, with rows {self.rows!r} and tokens "
                    f"{self.tokens}; expected it for ragged rows, and where tokens do not say it"
                )
        _between("vocabulary", self.vocabulary, 0, MAX_CLASSES)
        if self.vocabulary and (not self.tokens or self.vocabulary == self.num_classes):
            raise UsageError(
                "vocabulary needs tokens, and is left out where it is the number of classes"
            )
        names = [f.name for f in self.features]
        if len(set(names)) != len(names):
            raise UsageError(f"feature names repeat: {names}")
        if any(f.level == "row" for f in self.features) and self.rows != "ragged":
            raise UsageError("a feature of level 'row' needs rows='ragged'")
        columns = [c.name for c in self.columns()]
        if len(set(columns)) != len(columns):
            raise UsageError(
                "two columns have the same name: "
                f"{sorted(c for c in columns if columns.count(c) > 1)[0]}"
            )

    # ---- columns
    # ----------------------------------------------------------------------------------------------

    @property
    def k(self) -> int:
        """Entries kept of a row: V for full, the largest tier for topk, 0 for none."""
        return self.tiers[-1] if self.is_sparse else self.num_classes

    @property
    def has_rows(self) -> bool:
        """Whether there are rows, and not features alone."""
        return KINDS[self.kind].rows

    @property
    def is_sparse(self) -> bool:
        """Whether a row keeps some of its classes by id, and a tail for the others."""
        return KINDS[self.kind].sparse

    @property
    def codec(self) -> ValueCodec:
        """How the values of a row are stored."""
        return value_codec(self.values)

    @property
    def id_dtype(self) -> str:
        return "uint8" if self.num_classes <= 2**8 else "uint16"

    @cached_property
    def high_bits(self) -> int:
        """Bits of the plane above the low 16: 0, 1, 2, 4, 8 or 16."""
        needed = max(0, (self.num_classes - 1).bit_length() - 16)
        return next(h for h in (0, 1, 2, 4, 8, 16) if h >= needed)

    @property
    def convention(self) -> str:
        """Which rows there are: one for each "record", or those of each "position", or of each
        "next-token".
        """
        return (
            "record"
            if self.rows == "one"
            else self.predicts or ("next-token" if self.tokens else "position")
        )

    @property
    def num_tokens(self) -> int:
        """Token ids that there are; 0 where nothing says how many."""
        return self.vocabulary or self.num_classes

    def tier_range(self, k: int) -> tuple[int, int]:
        """Entries [start, stop) that tier `k` holds."""
        at = self.tiers.index(k)
        return (self.tiers[at - 1] if at else 0, k)

    def columns(self) -> tuple[Column, ...]:
        """All columns, in the order of the file."""
        return self._columns

    @cached_property
    def layout(self) -> Layout:
        """Columns, levels and offsets by name, worked out once; not to be changed."""
        columns = {column.name: column for column in self.columns()}
        levels = {level.name: level for level in self.levels()}
        offsets = {level.offsets: level for level in levels.values() if level.ragged}
        scales = frozenset(f"{f.column}_scale" for f in self.features if f.dtype == "int8")
        return Layout(columns, levels, offsets, [*offsets, *columns], scales)

    @cached_property
    def _columns(self) -> tuple[Column, ...]:
        out = [Column("sample_key", ROOT, "uint64")]
        if self.view_keys:
            out.append(Column("view_key", ROOT, "uint64"))
        out += KINDS[self.kind].entries(self)
        out += self._row_columns()
        if self.tokens:
            out.append(
                Column("token", "token", "uint16" if 0 < self.num_tokens <= 2**16 else "uint32")
            )
            out.append(Column("document_start", "token", "uint8"))
        for feature in self.features:
            out += feature.columns()
        return tuple(out)

    def _row_columns(self) -> list[Column]:
        out = []
        if self.has_rows and self.codec.relative:
            out.append(Column("max", "row", "float32"))
            if self.codec.stepped:
                out.append(Column("step", "row", "float32"))
        if self.is_sparse:
            out.append(
                Column("tail_lse", "row", "float32", (len(self.tiers), len(self.temperatures)))
            )
        if self.labels:
            out.append(
                Column(
                    "label",
                    "row",
                    "int32" if self.num_classes <= 2**31 else "int64",
                    (self.labels,),
                )
            )
            if self.label_weights:
                out.append(Column("label_weight", "row", "float32", (self.labels,)))
            if self.is_sparse:
                out.append(Column("label_logit", "row", "float32", (self.labels,)))
        if self.moments:
            out += [Column("mean", "row", "float32"), Column("std", "row", "float32")]
        if self.row_weights:
            out.append(Column("weight", "row", "float32"))
        if self.rows == "ragged" and (
            self.has_rows or any(f.level == "row" for f in self.features)
        ):
            out.append(Column("pos", "row", "int32"))
        return out

    def levels(self) -> tuple[Level, ...]:
        """The levels below `record` that some column uses."""
        used = {c.level for c in self.columns()}
        known = (Level("row", ROOT, 1 if self.rows == "one" else None), Level("token", ROOT, None))
        return tuple(level for level in known if level.name in used)

    # ---- records and shards
    # -----------------------------------------------------------------------------------

    @property
    def num_samples(self) -> int:
        return self.samples[1] - self.samples[0]

    @property
    def num_views(self) -> int:
        return self.views[1] - self.views[0]

    @property
    def num_records(self) -> int:
        return self.num_samples * self.num_views

    @property
    def shards_per_view(self) -> int:
        return -(-self.num_samples // self.records_per_shard)

    @property
    def num_shards(self) -> int:
        return self.shards_per_view * self.num_views

    def shard(self, index: int) -> ShardRange:
        """The samples and the view of shard `index`; each view is cut into shards separately."""
        if not 0 <= index < self.num_shards:
            raise IndexError(f"shard {index}: the cache has {self.num_shards}")
        view, at = divmod(index, self.shards_per_view)
        start = self.samples[0] + at * self.records_per_shard
        return ShardRange(
            index, self.views[0] + view, start, min(start + self.records_per_shard, self.samples[1])
        )

    def record(self, view: int, sample_id: int) -> int:
        """The number of the record of one view of one sample."""
        return (view - self.views[0]) * self.num_samples + (sample_id - self.samples[0])

    def locate(self, records: Array) -> tuple[Array, Array]:
        """(shard int64 [B], index in the shard int64 [B]) of record numbers int64 [B]; IndexError
        outside the cache.
        """
        records = np.asarray(records, np.int64)
        if records.size and (int(records.min()) < 0 or int(records.max()) >= self.num_records):
            raise IndexError(
                f"records {records.min()} to {records.max()}: the cache has 0 to "
                f"{self.num_records - 1}"
            )
        view, sample = np.divmod(records, self.num_samples)
        at, index = np.divmod(sample, self.records_per_shard)
        return view * self.shards_per_view + at, index

    # ---- JSON
    # -------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        out = {
            f.name: _plain(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if f.name not in LATER_FIELDS or getattr(self, f.name) != f.default
        }
        return {**out, "features": [f.to_json() for f in self.features]}

    @classmethod
    def from_json(cls, doc: Any, where: str = "spec") -> CacheSpec:
        """The spec in a JSON value; UsageError for wrong keys, types or values."""
        fields = _typed(cls, doc, where)
        fields["features"] = tuple(
            FeatureSpec(**_typed(FeatureSpec, f, f"{where}.features")) for f in fields["features"]
        )
        return cls(**fields)


def _check_full(spec: CacheSpec) -> None:
    _between("num_classes", spec.num_classes, 1, MAX_ELEMENTS - 1)
    if spec.tiers or spec.temperatures:
        raise UsageError("kind full keeps every logit: it has no tiers and no stored temperatures")


def _check_topk(spec: CacheSpec) -> None:
    _between("num_classes", spec.num_classes, 1, MAX_CLASSES)
    if (
        not 1 <= len(spec.tiers) <= MAX_TIERS
        or list(spec.tiers) != sorted(set(spec.tiers))
        or spec.tiers[0] < 1
    ):
        raise UsageError(
            f"tiers are {list(spec.tiers)}; expected 1 to {MAX_TIERS} ascending k's of at least 1"
        )
    if spec.tiers[-1] > spec.num_classes:
        raise UsageError(
            f"k is {spec.tiers[-1]}; expected at most the number of classes, {spec.num_classes}"
        )
    if spec.tiers[-1] > 2**20:
        raise UsageError(f"k is {spec.tiers[-1]}; expected at most 2^20")
    if not 1 <= len(spec.temperatures) <= MAX_TEMPERATURES:
        raise UsageError(f"{len(spec.temperatures)} temperatures; expected 1 to {MAX_TEMPERATURES}")
    for t in spec.temperatures:
        if temperature_name(t) != t:
            raise UsageError(f"temperature {t!r} must be spelled {temperature_name(t)!r}")
    if list(spec.temperatures) != sorted(set(spec.temperatures), key=Fraction):
        raise UsageError(f"temperatures {list(spec.temperatures)} must ascend")


def _check_none(spec: CacheSpec) -> None:
    if (
        spec.num_classes
        or spec.tiers
        or spec.temperatures
        or spec.labels
        or spec.moments
        or spec.row_weights
    ):
        raise UsageError(
            "kind none keeps no rows: no classes, tiers, temperatures, labels, moments or weights"
        )
    if not spec.features:
        raise UsageError(
            "kind none without a feature is an empty cache: name a feature or another kind"
        )


def _full_entries(spec: CacheSpec) -> list[Column]:
    return [Column("values", "row", spec.codec.dtype, (spec.num_classes,))]


def _topk_entries(spec: CacheSpec) -> list[Column]:
    out = []
    for k in spec.tiers:
        start, stop = spec.tier_range(k)
        out.append(Column(f"ids_{k}", "row", spec.id_dtype, (stop - start,)))
        if spec.high_bits:
            width = -(-(stop - start) * spec.high_bits // 8)
            out.append(Column(f"ids_{k}_high", "row", "uint8", (width,)))
        out.append(Column(f"values_{k}", "row", spec.codec.dtype, (stop - start,)))
    return out


@dataclass(frozen=True, slots=True)
class Kind:
    """What a row is made of. `check` raises UsageError for a spec that cannot be of this kind,
    `entries` are the columns of what is kept of a row's logits, in the order of the file.

    rows: whether there are rows at all. sparse: whether a row keeps some classes by id; it has a
    tail then, and the logits of its labels.
    """

    check: Callable[[CacheSpec], None]
    entries: Callable[[CacheSpec], list[Column]]
    rows: bool = True
    sparse: bool = False


KINDS = {
    "full": Kind(_check_full, _full_entries),
    "topk": Kind(_check_topk, _topk_entries, sparse=True),
    "none": Kind(_check_none, lambda spec: [], rows=False),
}


def spec_difference(cached: CacheSpec, given: CacheSpec) -> list[FieldDifference]:
    """The fields in which two specs differ."""
    a, b = cached.to_json(), given.to_json()
    return [
        FieldDifference(f"spec.{key}", a.get(key), b.get(key))
        for key in {**a, **b}
        if a.get(key) != b.get(key)
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _typed(cls: type, doc: Any, where: str) -> dict[str, Any]:
    """`doc` as keyword arguments of dataclass `cls`: exactly its fields, lists as tuples, the
    annotated plain types.
    """
    fields = {f.name: str(f.type) for f in dataclasses.fields(cls)}
    later = (
        set()
        if cls is not CacheSpec
        else LATER_FIELDS - set(doc)
        if isinstance(doc, dict)
        else set()
    )
    fields = {name: kind for name, kind in fields.items() if name not in later}
    if not isinstance(doc, dict) or set(doc) != set(fields):
        found = sorted(doc) if isinstance(doc, dict) else type(doc).__name__
        raise UsageError(f"{where}: found {str(found)[:200]}, expected the keys {sorted(fields)}")
    out = {}
    for name, kind in fields.items():
        value = doc[name]
        if kind.startswith("tuple["):
            # features are objects
            item: type = {"int": int, "str": str}.get(kind[6:9], dict)
            good = isinstance(value, list) and all(type(v) is item for v in value)
            good = good and (kind != "tuple[int, int]" or len(value) == 2)
            value = tuple(value) if good else value
        else:
            good = type(value) is {"int": int, "str": str, "bool": bool}[kind]
        if not good:
            raise UsageError(f"{where}.{name}: found {str(value)[:80]!r}, expected {kind}")
        out[name] = value
    return out


def _one_of(what: str, value: str, known: Sequence[str], later: tuple[str, ...] = ()) -> None:
    if value in later:
        built = ", ".join(k for k in known if k not in later)
        raise NotBuilt(f"{what} {value!r} is not built yet; this version has {built}")
    if value not in known:
        raise UsageError(f"{what} {value!r} is unknown{did_you_mean(value, known)}")


def _between(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UsageError(f"{what} is {value}; expected {low} to {high}")


def _range(what: str, value: tuple[int, int], limit: int) -> None:
    if not 0 <= value[0] < value[1] <= limit:
        raise UsageError(
            f"{what} are [{value[0]}, {value[1]}); expected a non-empty range within [0, {limit})"
        )
