"""The cache and the data of a run: opened, and whether they belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from kdcache.cache.identity import Identity, require_same
from kdcache.data import classes
from kdcache.data.collate import read_batch
from kdcache.data.identify import identify
from kdcache.data.samples import Samples, probe_ids
from kdcache.data.sources import as_samples
from kdcache.errors import DataError, NotBuilt, UsageError
from kdcache.models.checks import UNSTEADY
from kdcache.models.specs import own_preprocessing, spec_folder
from kdcache.student.run_folder import check_accept
from kdcache.user.arguments import check_type

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache

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


def as_cache(cache: Cache | str | Path | None) -> Cache | None:
    """An open cache; a path is opened."""
    from kdcache.cache.reader import Cache
    from kdcache.cache.reader import open as open_cache

    check_type("cache", cache, (Cache, str, Path, NoneType), "a path, or what kdcache.open gives")
    return open_cache(cache) if isinstance(cache, str | Path) else cache


def cached_preprocessing(cache: Cache | None) -> str:
    """How the pictures were prepared that a cache is about, "" unknown."""
    return "" if cache is None else str(cache.identity.data.get("preprocessing", ""))


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
                "augmented or decoded inputs, or of data with a collate_fn; leave it out"
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
            f"expected {theirs}"
        )
    return found


def names_evaluation(name: str) -> bool:
    """Whether a name that --accept is given is of the data that is evaluated on."""
    return name.partition(".")[0] == "eval_data"
