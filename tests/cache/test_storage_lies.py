"""Lies with valid digests: refused by what they mean, naming file and column, before memory is
taken by it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from forge import Document, Forge, load
from strategies import CONTAINERS, IDENTITY, full_seed, image_spec, make_columns, write_cache
from test_storage_corruption import TINY, read_all

import kdcache
from kdcache.cache.canonical import seal
from kdcache.cache.identity import Identity
from kdcache.cache.spec import CacheSpec, FeatureSpec
from kdcache.cache.writer import create
from kdcache.cli import main
from kdcache.errors import CacheCorrupt, DataError, KDCacheError


@pytest.fixture(scope="module", params=CONTAINERS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / request.param
    write_cache(path, TINY, request.param, seed=full_seed(TINY))
    return path


LIES = [
    ("ids_3", "<u2", 0xFFFF, "outside 0 to"),
    ("row.offsets", "<i8", 2**40, "offsets"),
    ("row.offsets", "<i8", -1, "offsets"),
    ("token.offsets", "<i8", 0, "offsets"),
    ("max", "<f4", np.nan, "NaN"),
    ("max", "<f4", -np.inf, "-inf"),
    ("step", "<f4", np.inf, "inf"),
    ("step", "<f4", -1, "negative"),
    ("tail_lse", "<f4", np.nan, "NaN"),
    ("tail_lse", "<f4", np.inf, "inf"),
    ("label", "<i4", 100_000, "label outside"),
    ("label", "<i4", -2, "label outside"),
    ("label_logit", "<f4", np.nan, "NaN"),
    ("token", "<u4", 100_000, "token outside"),
    ("pos", "<i4", -1, "negative"),
]


@pytest.mark.parametrize("column,dtype,value,said", LIES)
def test_a_lie_with_valid_digests_is_refused(
    column: str, dtype: str, value: float, said: str, whole: Path, tmp_path: Path
) -> None:
    """What only the meaning gives away: the second line of defence, and the last before a kernel."""
    forge = Forge(whole)

    def change(values: np.ndarray) -> None:
        values[-1] = value

    if column == "ids_3":
        forge.patch(0, "ids_3_high", lambda high: high.fill(3), "u1")
    forge.patch(0, column, change, dtype)
    with kdcache.open(forge.write(tmp_path / "c")) as cache:
        names = [c.name for c in TINY.columns()]
        with pytest.raises(CacheCorrupt, match=f"column {column}.*{said}") as caught:
            cache.read(np.arange(3), names)
        assert forge.commits[0]["file"] in str(caught.value)
        found = cache.check_all()
        assert any(
            f"column {column}" in line and forge.commits[0]["file"] in line for line in found
        )


EXTENTS = [
    ("offset", lambda c: c["max"].update(offset=c["max"]["offset"] + 4), "not a multiple of 8"),
    ("overlap", lambda c: c["max"].update(offset=c["step"]["offset"]), "behind column"),
    ("past the end", lambda c: c["max"].update(offset=2**40), "ends at byte"),
    ("length", lambda c: c["max"].update(length=c["max"]["length"] + 4), "its rows need"),
    ("huge", lambda c: c["max"].update(length=2**50), "its rows need"),
]


@pytest.mark.parametrize("change,said", [e[1:] for e in EXTENTS], ids=[e[0] for e in EXTENTS])
def test_a_raw_map_that_cannot_be_is_refused(
    change: Callable[[Document], None], said: str, whole: Path, tmp_path: Path
) -> None:
    forge = Forge(whole)
    change(forge.commits[0]["columns"])
    for name, extent in forge.commits[0]["columns"].items():
        for key, value in extent.items():
            forge.manifest["columns"][name][key][0] = value
    with pytest.raises(CacheCorrupt, match=f"00000001.json: shard 0: column .*{said}"):
        read_all(forge.write(tmp_path / "c"))
    (tmp_path / "c/manifest/00000001.json").unlink()
    with (
        pytest.raises(CacheCorrupt, match=f"commit/00000000.json: column .*{said}"),
        kdcache.open(tmp_path / "c", allow_partial=True) as cache,
    ):
        cache.read(np.array([0]))


@pytest.mark.parametrize(
    "key,value", [("records", 3), ("rows", 10**9), ("size", 10**9), ("file", "../../etc/passwd")]
)
def test_counts_and_names_that_cannot_be_are_refused(
    key: str, value: object, whole: Path, tmp_path: Path
) -> None:
    forge = Forge(whole)
    commit, shards = forge.commits[1], forge.manifest["shards"]
    if key == "rows":
        commit["rows"]["row"] = shards["rows"]["row"][1] = value
    else:
        commit[key] = shards[key][1] = value
    path = forge.write(tmp_path / "c")
    with pytest.raises(CacheCorrupt):
        read_all(path)
    (path / "manifest/00000001.json").unlink()
    with pytest.raises(CacheCorrupt), kdcache.open(path, allow_partial=True) as cache:
        cache.read(np.array([2]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("content_id", "0" * 64),
        ("keys_digest", "0" * 32),
        ("parent", "0" * 32),
        ("generation", 2),
        ("header", "0" * 32),
    ],
)
def test_a_manifest_of_another_place_or_content_is_refused(
    key: str, value: object, whole: Path, tmp_path: Path
) -> None:
    """docs/format.md 12.2, of a manifest whose own digest is right."""
    path = Forge(whole).write(tmp_path / "c")
    file = path / "manifest/00000001.json"
    file.write_bytes(seal({**load(file), key: value}))
    with pytest.raises(CacheCorrupt, match=f"00000001.json.*{key}"):
        kdcache.open(path)


def test_a_forged_row_count_of_a_constant_level_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", image_spec())
    forge = Forge(tmp_path / "c")
    forge.commits[0]["rows"]["row"] = forge.manifest["shards"]["rows"]["row"][0] = 4
    with pytest.raises(CacheCorrupt, match="4 rows of level 'row'; expected 1 for each of 3"):
        read_all(forge.write(tmp_path / "d"))


def test_an_id_twice_is_refused_when_its_tier_is_asked_for(whole: Path, tmp_path: Path) -> None:
    forge = Forge(whole)
    first = np.frombuffer(
        forge.data[0], "<u2", offset=forge.commits[0]["columns"]["ids_1"]["offset"], count=1
    )[0]
    forge.patch(0, "ids_3", lambda ids: ids.__setitem__(0, first), "<u2")
    high = forge.data[0][forge.commits[0]["columns"]["ids_1_high"]["offset"]]
    forge.patch(0, "ids_3_high", lambda bits: bits.__setitem__(0, (bits[0] & 2) | (high & 1)), "u1")
    with kdcache.open(forge.write(tmp_path / "c")) as cache:
        cache.read(np.arange(3), ["ids_1", "ids_1_high", "values_1"])
        for name in ("ids_3", "ids_3_high"):
            with pytest.raises(CacheCorrupt, match="ids_3: row 0 has an id twice"):
                cache.read(np.arange(3), [name])


def absurd(spec: CacheSpec) -> Iterator[CacheSpec]:
    yield image_spec(samples=(0, 2**48), records_per_shard=2**31 - 1)
    yield image_spec(samples=(0, 2**31), records_per_shard=2**31 - 1, num_classes=2**31 - 1)
    yield image_spec(samples=(0, 2**40), records_per_shard=2**20)


def test_absurd_sizes_take_no_memory(whole: Path, tmp_path: Path) -> None:
    for spec in absurd(TINY):
        write_cache(tmp_path / "small", image_spec(), "arrow")
        forge = Forge(tmp_path / "small")
        forge.header |= {"spec": spec.to_json(), "columns": [c.to_json() for c in spec.columns()]}
        forge.write(tmp_path / "c")
        with pytest.raises(CacheCorrupt), kdcache.open(tmp_path / "c") as cache:
            cache.read(np.array([0, cache.num_records - 1]))
        with pytest.raises(KDCacheError), kdcache.open(tmp_path / "c", allow_partial=True) as cache:
            cache.read(np.array([0]))
        shutil.rmtree(tmp_path / "small")


# column of a spec, by how its bytes are seen, and what a forger writes into row 1 of it.
SEALED: dict[str, tuple[dict[str, object], str, str, Callable[[np.ndarray], object], str]] = {
    "a scale that overflows": (
        {"features": "int8"},
        "feature_f_scale",
        "<f4",
        lambda x: x.fill(3e38),
        "infinite",
    ),
    "a negative scale": (
        {"features": "int8"},
        "feature_f_scale",
        "<f4",
        lambda x: x.fill(-1),
        "negative",
    ),
    "a scale that is no number": (
        {"features": "int8"},
        "feature_f_scale",
        "<f4",
        lambda x: x.fill(np.nan),
        "NaN",
    ),
    "a code that no writer gives": (
        {"features": "int8"},
        "feature_f",
        "<i1",
        lambda x: x.fill(-128),
        "code -128",
    ),
    "bfloat16 that rises": (
        {"values": "bfloat16"},
        "values_4",
        "<u2",
        lambda x: put(x, [0xFF00, 0x7F00]),
        "rises",
    ),
    "float32 that rises": (
        {"values": "float32"},
        "values_4",
        "<f4",
        lambda x: put(x, [-3e38, 3e38]),
        "rises",
    ),
    "float16 that rises": (
        {"values": "float16"},
        "values_4",
        "<u2",
        lambda x: put(x, [0, 0xC000, 0xBC00]),
        "rises",
    ),
    "uint8 that rises": (
        {"values": "uint8"},
        "values_4",
        "<u1",
        lambda x: put(x, [0, 9, 3]),
        "rises",
    ),
    "a tier above the one before": (
        {"values": "float32"},
        "values_6",
        "<f4",
        lambda x: x.fill(1),
        "rises",
    ),
    "float16 that begins below": (
        {"values": "float16"},
        "values_4",
        "<u2",
        lambda x: x.fill(0xBC00),
        "do not begin",
    ),
    "uint8 that begins below": (
        {"values": "uint8"},
        "values_4",
        "<u1",
        lambda x: x.fill(9),
        "do not begin at 0",
    ),
    "full above its maximum": (
        {"kind": "full"},
        "values",
        "<u2",
        lambda x: put(x, [0x7BFF]),
        "do not begin at 0",
    ),
    "full uint8 all far below": (
        {"kind": "full", "values": "uint8"},
        "values",
        "<u1",
        lambda x: x.fill(254),
        "begin",
    ),
    "a label above all": (
        {"values": "float16"},
        "label_logit",
        "<f4",
        lambda x: x.fill(3e38),
        "above its row's",
    ),
    "a label above bfloat16": (
        {"values": "bfloat16"},
        "label_logit",
        "<f4",
        lambda x: x.fill(3e38),
        "above its row's",
    ),
    "a weight beyond all sums": (
        {"row_weights": True},
        "weight",
        "<f4",
        lambda x: x.fill(3e38),
        "weight above",
    ),
    "a label's weight": (
        {"label_weights": True},
        "label_weight",
        "<f4",
        lambda x: x.fill(3e38),
        "weight above",
    ),
}


def put(values: np.ndarray, new: list[float]) -> None:
    values[: len(new)] = new


@pytest.mark.parametrize("lie", SEALED)
def test_numbers_that_would_decode_to_infinity_or_nonsense_are_refused(
    lie: str, tmp_path: Path
) -> None:
    changes, column, dtype, change, said = SEALED[lie]
    fields: dict[str, Any] = {
        "kind": "topk",
        "num_classes": 50,
        "samples": (0, 4),
        "records_per_shard": 4,
        "labels": 1,
        **changes,
    }
    if fields["kind"] == "topk":
        fields |= {"tiers": (4, 6), "temperatures": ("1",)}
    if "features" in fields:
        fields["features"] = (
            FeatureSpec(name="f", module="m", recipe="raw", dtype="int8", shape=(2, 3)),
        )
    spec = CacheSpec(**fields)
    write_cache(tmp_path / "c", spec)
    with kdcache.open(tmp_path / "c") as cache:
        cache.read(np.arange(4))
    forge = Forge(tmp_path / "c")
    forge.patch(0, column, change, dtype)
    with kdcache.open(forge.write(tmp_path / "lie")) as cache:
        with pytest.raises(CacheCorrupt, match=f"column {column}.*{said}"):
            cache.read(np.arange(4), [column])
        assert any(f"column {column}" in problem for problem in cache.check_all())
    columns = make_columns(spec, 0)
    columns[column] = np.array(columns[column])
    change(columns[column].reshape(-1).view(dtype))
    with create(tmp_path / "writer", spec, IDENTITY) as writer:
        with pytest.raises(DataError, match=f"column {column}.*{said}"):
            writer.write(0, columns)


TYPED = (
    ("data", "class_names", list),
    ("data", "name", str),
    ("data", "num_samples", int),
    ("data", "probe", list),
    ("data", "window", int),
    ("data", "revision", str),
    ("teacher", "dtype", str),
    ("teacher", "weights", str),
    ("teacher", "num_classes", int),
    ("teacher", "config", dict),
    ("teacher", "class_names", list),
    ("tokenizer", "fingerprint", str),
)


def test_fields_of_an_identity_have_the_types_that_are_relied_on(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", TINY)
    whole = Forge(tmp_path / "c")
    for part, key, right in TYPED:
        for value in (5, None, True, "x", [1], ["x", None], {"a": 1}):
            if type(value) is right and value not in ([1], ["x", None]):
                continue
            forge = whole.copy()
            forge.header["identity"][part] = {**(forge.header["identity"][part] or {}), key: value}
            with pytest.raises(
                CacheCorrupt, match=rf"header\.json: identity\.{part}\.{key}: expected"
            ):
                kdcache.open(forge.write(tmp_path / "lie"))


def test_no_text_of_a_cache_reaches_a_terminal_as_it_is(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x9b31m\r\nforged line"
    spec = CacheSpec(
        kind="full",
        num_classes=2,
        samples=(0, 3),
        records_per_shard=2,
        features=(FeatureSpec(name="f", module=evil, recipe="raw", dtype="float32", shape=(1,)),),
    )
    identity = Identity(
        data={"name": evil, "revision": evil, "class_names": [evil, evil + "2"]},
        teacher={"weights": evil, "dtype": "float32", "config": {evil: evil}},
    )
    write_cache(tmp_path / "c", spec, identity=identity)
    write_cache(tmp_path / "d", spec)
    forge = Forge(tmp_path / "c")
    forge.header["requires"] = [evil]
    forge.write(tmp_path / "e")
    (tmp_path / f"c/{evil}").write_text("")
    for command in (
        ["inspect", "c"],
        ["inspect", "c", "--record", "1"],
        ["inspect", "d", "c"],
        ["inspect", "c", "d"],
        ["inspect", "e"],
        ["verify", "c"],
        ["verify", "e"],
        ["inspect", "c", "--json"],
        ["inspect", "c", "--record", "0", "--json"],
        ["convert", "e", "f"],
        ["verify", "c", "--json"],
    ):
        arguments = [str(tmp_path / word) if word in (*"cdef",) else word for word in command]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code in (0, 1, 2) and "owned" in result.output, (command, result.output)
        assert not set(result.output) & {*map(chr, range(32)), *map(chr, range(127, 160))} - {
            "\n"
        }, command
        assert not any(line.startswith("forged") for line in result.output.splitlines()), command
