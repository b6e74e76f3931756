"""Arbitrary bytes and arbitrary documents with valid digests: our error or a correct answer, in
bounded memory.
"""

from __future__ import annotations

import copy
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forge import Forge
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from strategies import IDENTITY, full_seed, token_spec, write_cache

import kdcache
from kdcache.cache.canonical import MAX_INT, seal
from kdcache.cache.catalog import commit_limit, manifest_limit, parse_header
from kdcache.cache.identity import Identity
from kdcache.cache.spec import CacheSpec, FeatureSpec
from kdcache.cache.writer import create
from kdcache.errors import KDCacheError, UsageError

SPEC = token_spec(samples=(0, 3), records_per_shard=2)
# address space a hostile file may make us take; its own sizes say up to 2^62
ROOM = 2**29
FUZZ = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
INTEGERS = st.sampled_from(
    (0, 1, -1, 2, 3, 7, 8, 9, 255, 2**31 - 1, 2**31, 2**32, 2**47, 2**48, 2**53 - 1, 1 - 2**53)
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    INTEGERS,
    st.integers(1 - MAX_INT, MAX_INT - 1),
    st.text(max_size=9),
    st.sampled_from(
        ("1", "nan", "1e999", "0" * 32, "f" * 64, "topk", "none", "int8", "../x", "\0", "é")
    ),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Forge:
    path = tmp_path_factory.mktemp("whole") / "c"
    write_cache(path, SPEC, "arrow", seed=full_seed(SPEC))
    return Forge(path)


@pytest.fixture
def bounded() -> Iterator[None]:
    """Allocations far beyond what the files hold fail, as MemoryError."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def use(path: Path, allow_partial: bool = False) -> None:
    """Open and read everything a student could; every error but ours goes through."""
    try:
        with kdcache.open(path, allow_partial=allow_partial) as cache:
            assert cache.check_all(quick=True) is not None
            last = cache.num_records - 1
            for records in ([0, 1, 2], [last, 0], list(range(min(cache.num_records, 50)))):
                batch = cache.read(np.array(records))
                assert len(batch) == len(records)
                for column in cache.spec.columns():
                    assert batch.columns[column.name].shape[1:] == column.shape
            assert cache.column_bytes() and cache.measured is not None and cache.shards is not None
    except KDCacheError as e:
        assert str(e)


def places(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in a document."""
    if at:
        yield at
    for key in (
        document
        if isinstance(document, dict)
        else range(len(document))
        if isinstance(document, list)
        else ()
    ):
        yield from places(document[key], (*at, key))


def change(document: Any, place: tuple[Any, ...], how: str, value: Any) -> None:
    *above, key = place
    for step in above:
        document = document[step]
    if how == "delete":
        del document[key]
    elif how == "add" and isinstance(document, dict):
        document[f"{key}x"] = value
    elif how == "add":
        document.insert(key, value)
    elif how == "nudge" and type(document[key]) is int:
        document[key] += 1 if value else -8
    else:
        document[key] = value


def mutate(data: st.DataObject, document: dict[str, Any]) -> None:
    place = data.draw(st.sampled_from(sorted(places(document), key=repr)))
    change(
        document,
        place,
        data.draw(st.sampled_from(("replace", "replace", "delete", "add", "nudge"))),
        data.draw(VALUES),
    )


@FUZZ
@given(data=st.data())
def test_forged_documents(data: st.DataObject, whole: Forge, tmp_path: Path, bounded: None) -> None:
    """A document changed anywhere, every digest made right: only meaning is left to check."""
    forge = whole.copy()
    target = data.draw(st.sampled_from((forge.header, forge.commits[0], forge.manifest)))
    for _ in range(data.draw(st.integers(1, 3))):
        if target:
            mutate(data, target)
    try:
        forge.write(tmp_path / "c", proofs=data.draw(st.booleans()))
    except (KeyError, TypeError, IndexError, AttributeError, ValueError):
        try:  # too broken to be made right: as it is
            forge.write(tmp_path / "c", proofs=False)
        except (KeyError, TypeError, ValueError, OSError):
            return
    use(tmp_path / "c")
    (tmp_path / "c/manifest/00000001.json").unlink()
    use(tmp_path / "c", allow_partial=True)


@FUZZ
@given(data=st.data())
def test_forged_specs(data: st.DataObject, whole: Forge, tmp_path: Path, bounded: None) -> None:
    """A header with a valid other spec, over the same shards."""
    forge = whole.copy()
    spec = forge.header["spec"]
    for _ in range(data.draw(st.integers(1, 2))):
        mutate(data, spec)
    try:
        parsed = kdcache.CacheSpec.from_json(spec)
    except KDCacheError:
        pass
    else:
        forge.header |= {
            "columns": [c.to_json() for c in parsed.columns()],
            "levels": [
                {"name": x.name, "parent": x.parent, "count": x.count} for x in parsed.levels()
            ],
        }
    use(forge.write(tmp_path / "c"))


@FUZZ
@given(data=st.data())
def test_forged_columns(data: st.DataObject, whole: Forge, tmp_path: Path, bounded: None) -> None:
    """Arbitrary bytes in a column, every digest made right: ids, labels and offsets in a batch stay
    in bounds.
    """
    forge = whole.copy()
    name = data.draw(st.sampled_from(sorted(forge.commits[0]["columns"])))

    def overwrite(values: np.ndarray) -> None:
        at = data.draw(st.integers(0, len(values) - 1))
        new = data.draw(st.binary(min_size=1, max_size=16))
        values[at : at + len(new)] = np.frombuffer(new, np.uint8)[: len(values) - at]

    forge.patch(0, name, overwrite, "u1")
    try:
        with kdcache.open(forge.write(tmp_path / "c")) as cache:
            batch = cache.read(np.array([1, 0]))
    except KDCacheError as e:
        named = (
            f"column {name.removesuffix('_high')}",
            "column ids_",
            "column values_",
            "column label_logit",
        )
        assert any(column in str(e) for column in named)  # or one that is judged by it
        return
    columns = batch.columns
    high = np.array(
        [[plane >> j & 1 for j in range(2)] for plane in columns["ids_2_high"][:, 0].tolist()]
    )
    assert (columns["ids_2"] + 65536 * high.reshape(-1, 2)).max() < 100_000
    assert (
        columns["label"].min() >= -1
        and columns["label"].max() < 100_000
        and columns["token"].max() < 100_000
    )
    assert (
        np.isfinite(columns["max"]).all()
        and (columns["step"] >= 0).all()
        and columns["pos"].min() >= 0
    )


@FUZZ
@given(
    name=st.sampled_from(("header.json", "commit/00000000.json", "manifest/00000001.json")),
    content=st.binary(max_size=200)
    | st.text(max_size=60).map(str.encode)
    | st.dictionaries(st.text(max_size=4), VALUES, max_size=4).map(
        lambda d: seal({k: v for k, v in d.items() if k < "xxh3_128"})
    ),
)
@example(name="header.json", content=b"")
@example(name="header.json", content=b"[" * 100_000)
@example(name="header.json", content=b'{"a":' * 100_000)
@example(name="header.json", content=b"9" * 100_000)
@example(name="header.json", content=b'{"a":1e400,"xxh3_128":"x"}\n')
@example(name="manifest/00000001.json", content=b"\xff\xfe{}")
@example(name="commit/00000000.json", content=b"{}\n")
def test_arbitrary_bytes(
    name: str, content: bytes, whole: Forge, tmp_path: Path, bounded: None
) -> None:
    whole.copy().write(tmp_path / "c")
    (tmp_path / "c" / name).write_bytes(content)
    with pytest.raises(KDCacheError), kdcache.open(tmp_path / "c") as cache:
        cache.read(np.arange(3))


def test_a_huge_json_file_is_not_read(whole: Forge, tmp_path: Path, bounded: None) -> None:
    path = whole.copy().write(tmp_path / "c")
    for name in ("header.json", "commit/00000000.json", "manifest/00000001.json"):
        before = (path / name).read_bytes()
        with open(path / name, "r+b") as file:
            file.truncate(2**40)  # sparse
        with (
            pytest.raises(KDCacheError, match=f"{name}: file has 1099511627776 bytes"),
            kdcache.open(path) as cache,
        ):
            cache.read(np.arange(3))
        (path / name).unlink()
        (path / name).write_bytes(before)


@pytest.mark.parametrize("piece", [b"[]", b"{}", b'{"a":1}', b"1", b'"1"', b"[[]]", b"null"])
def test_a_file_of_many_small_values_is_refused_before_they_take_memory(
    piece: bytes, whole: Forge, tmp_path: Path, bounded: None
) -> None:
    """Three bytes of text can be a hundred of Python: what a file may hold is known before it is
    parsed.
    """
    path = whole.copy().write(tmp_path / "c")
    header = parse_header((path / "header.json").read_bytes(), "header")
    sizes = {
        "header.json": 2**26,
        "commit/00000000.json": commit_limit(header.spec),
        "manifest/00000001.json": manifest_limit(header.spec),
    }
    for name, size in sizes.items():
        before = (path / name).read_bytes()
        assert len(before) < size / 2
        times = (size - 100) // (len(piece) + 1)
        (path / name).write_bytes(b'{"a":[' + (piece + b",") * times + b'1],"xxh3_128":"x"}\n')
        with (
            pytest.raises(KDCacheError, match=f"{name}: (about|not|its)"),
            kdcache.open(path) as cache,
        ):
            cache.read(np.arange(3))
        (path / name).write_bytes(before)


def test_a_header_that_readers_would_not_take_is_not_written(tmp_path: Path) -> None:
    names = Identity(data={"class_names": [str(i) for i in range(2**21)]}, teacher={})
    with pytest.raises(UsageError, match="more than a reader takes"):
        create(tmp_path / "c", SPEC, names)
    assert not (tmp_path / "c").exists()


def test_the_cost_of_columns_is_linear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = tuple(
        FeatureSpec(name=f"f{i}", module="m", recipe="raw", dtype="int8", shape=(2,))
        for i in range(200)
    )
    spec = CacheSpec(
        kind="none", num_classes=0, samples=(0, 8), records_per_shard=2, features=features
    )
    columns = {"sample_key": np.zeros(2, np.uint64)}
    for feature in features:
        columns |= {
            feature.column: np.zeros((2, 2), np.int8),
            f"{feature.column}_scale": np.ones(2, np.float32),
        }
    compared = 0

    def counting(self: FeatureSpec, other: object = None) -> Any:
        nonlocal compared
        compared += 1
        return NotImplemented if other is not None else id(self)

    monkeypatch.setattr(FeatureSpec, "__eq__", counting)
    monkeypatch.setattr(FeatureSpec, "__hash__", counting)
    with create(tmp_path / "c", spec, IDENTITY) as writer:
        for shard in range(4):
            writer.write(shard, columns)
    with kdcache.open(tmp_path / "c") as cache:
        assert cache.check_all() == []
        cache.read(np.arange(8))
    assert compared < 5 * len(features)


def test_the_bound_is_felt(bounded: None) -> None:
    with pytest.raises(MemoryError):
        np.ones(2**31, np.uint8)


def test_the_forge_forges_well(whole: Forge, tmp_path: Path) -> None:
    """Unchanged documents, sealed anew, are the cache they were taken from."""
    forge = whole.copy()
    with kdcache.open(whole.path) as a, kdcache.open(forge.write(tmp_path / "c")) as b:
        assert a.content_id == b.content_id and b.check_all() == []
    assert copy.deepcopy(forge.header) == whole.header
