"""`inspect` against numbers computed here in float64 from the teacher's whole logits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner

import kdcache
from kdcache.cache.codec import Encoded, encode_rows
from kdcache.cache.rows import Rows
from kdcache.cache.spec import CacheSpec, FeatureSpec
from kdcache.cli import main
from kdcache.errors import DataError, IdentityMismatch, KDCacheError, UsageError
from kdcache.inspect import coverage, inspect, render, sampled_records

Array = npt.NDArray[Any]
V, N, TIERS, TEMPERATURES = 6, 10, (2, 4), ("1", "2.5")
NAMES = ["ant", "bee", "cat", "dog", "elk", "fox"]


def teacher_logits(n: int = N) -> Array:
    return np.random.default_rng(0).normal(0, 2, (n, V)).astype(np.float32)


def labels(n: int = N) -> Array:
    """A label that is in the support for some rows and outside for others, unknown for the last."""
    out = np.random.default_rng(1).integers(0, V, (n, 1))
    out[-1] = -1
    return out


def softmax(logits: Array, temperature: str) -> Array:
    z = logits.astype(np.float64) / float(temperature)
    e = np.exp(z - z.max(1, keepdims=True))
    out: Array = e / e.sum(1, keepdims=True)
    return out


def topk_rows(spec: CacheSpec, logits: Array, label: Array) -> Rows:
    """The rows of kind topk by their definition, one at a time."""
    ids = np.stack([np.lexsort((np.arange(V), -z))[: spec.k] for z in logits])
    tail = np.full((len(logits), len(spec.tiers), len(spec.temperatures)), -np.inf, np.float32)
    for n, z in enumerate(logits.astype(np.float64)):
        for i, k in enumerate(spec.tiers):
            rest = [v for v in range(V) if v not in ids[n, :k] and v not in label[n]]
            for j, t in enumerate(spec.temperatures):
                mass = sum(np.exp((z[v] - z.max()) / float(t)) for v in rest)
                tail[n, i, j] = np.log(mass) if rest else -np.inf
    label_logit = np.where(label >= 0, np.take_along_axis(logits, np.maximum(label, 0), 1), -np.inf)
    return Rows(
        ids=ids,
        logits=np.take_along_axis(logits, ids, 1),
        tail_lse=tail,
        label=label,
        label_logit=label_logit.astype(np.float32),
    )


def identity(**data: Any) -> kdcache.Identity:
    return kdcache.Identity(
        data={
            "name": "zoo",
            "revision": "1",
            "num_samples": N,
            "class_names": NAMES,
            "probe": [],
            **data,
        },
        teacher={"weights": "sha256-state-dict:00", "dtype": "float32"},
    )


def write(
    path: Path,
    spec: CacheSpec,
    rows: Callable[[int, int], Encoded],
    container: str = "arrow",
    whose: kdcache.Identity | None = None,
    **more: Array,
) -> Path:
    """A sealed cache whose shard [a, b) of samples has the rows `rows(a, b)`; `more` are record
    columns [N, ...].
    """
    with kdcache.create(path, spec, whose or identity(), container=container) as writer:
        for shard in range(spec.num_shards):
            a, b = spec.shard(shard).start, spec.shard(shard).stop
            encoded = rows(a, b)
            columns = {name: array[a:b] for name, array in more.items()} | encoded.columns
            writer.write(
                shard, {"sample_key": np.arange(a, b, dtype=np.uint64), **columns}, encoded.measured
            )
    return path


def topk_cache(
    path: Path,
    container: str = "arrow",
    logits: Array | None = None,
    values: str = "float32",
    whose: kdcache.Identity | None = None,
) -> Path:
    spec = CacheSpec(
        kind="topk",
        num_classes=V,
        samples=(0, N),
        records_per_shard=4,
        tiers=TIERS,
        values=values,
        temperatures=TEMPERATURES,
        labels=1,
    )
    logits = teacher_logits() if logits is None else logits
    return write(
        path,
        spec,
        lambda a, b: encode_rows(spec, topk_rows(spec, logits[a:b], labels()[a:b])),
        container,
        whose,
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return topk_cache(tmp_path / "cache")


def test_covered_mass_and_truncation_kl(cache: Path) -> None:
    found = inspect(cache)["coverage"]
    assert (found["rows"], found["of_rows"]) == (N, N)
    ordered = {t: -np.sort(-softmax(teacher_logits(), t), axis=1) for t in TEMPERATURES}
    for tier in found["tiers"]:
        head_N = ordered[tier["temperature"]][:, : tier["k"]].sum(1)
        assert tier["covered_mass"] == pytest.approx(head_N.mean(), abs=1e-6)
        assert tier["truncation_kl"] == pytest.approx(-np.log(head_N).mean(), abs=1e-6)
    assert [(t["k"], t["temperature"]) for t in found["tiers"]] == [
        (k, t) for k in TIERS for t in TEMPERATURES
    ]


def test_tiny_tails_keep_their_digits(tmp_path: Path) -> None:
    """-log(covered mass) for a tail of 1e-12: 1 - mass would have kept nothing of it."""
    logits = np.tile(np.array([0, -1, -28, -29, -30, -31], np.float32), (N, 1))
    found = inspect(topk_cache(tmp_path / "c", logits=logits))["coverage"]["tiers"][0]
    p = softmax(logits, "1")[0]
    assert found["truncation_kl"] == pytest.approx(p[2:].sum() / p[:2].sum(), rel=1e-5)


@pytest.mark.parametrize("container", ["arrow", "hdf5"])
def test_facts_and_sizes(tmp_path: Path, container: str) -> None:
    path = topk_cache(tmp_path / "cache", container)
    found = inspect(path)
    assert (found["kind"], found["num_classes"], found["k"], found["tiers"]) == (
        "topk",
        V,
        4,
        list(TIERS),
    )
    assert (found["num_records"], found["num_rows"], found["num_shards"]) == (N, N, 3)
    assert found["container"] == container and len(found["content_id"]) == 64
    assert found["bytes"] == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    assert found["bytes_per_record"] == found["bytes_per_row"] == found["bytes"] / N
    assert found["column_bytes"] == {
        "sample_key": 8 * N,
        "ids_2": 2 * N,
        "values_2": 8 * N,
        "ids_4": 2 * N,
        "values_4": 8 * N,
        "tail_lse": 16 * N,
        "label": 4 * N,
        "label_logit": 4 * N,
    }
    assert (
        found["identity"]["data"]["class_names"] == NAMES
        and found["identity"]["teacher"]["dtype"] == "float32"
    )


@pytest.mark.parametrize("values", ["float32", "uint8"])
def test_quantisation_kl(tmp_path: Path, values: str) -> None:
    """A full cache: KL of the teacher to what is decoded, against softmax in float64."""
    spec = CacheSpec(kind="full", num_classes=V, samples=(0, N), records_per_shard=4, values=values)
    path = write(
        tmp_path / "c", spec, lambda a, b: encode_rows(spec, Rows(logits=teacher_logits()[a:b]))
    )
    decoded = kdcache.cache.codec.decode_rows(
        spec, kdcache.open(path).read(np.arange(N)).columns
    ).logits
    found = inspect(path)
    for t in ("1", "2", "4"):
        p, q = softmax(teacher_logits(), t), softmax(decoded, t)
        assert found["quantisation_kl"][t] == pytest.approx(
            (p * np.log(p / q)).sum(1).mean(), abs=1e-6
        )
    assert (found["quantisation_kl"]["1"] > 1e-7) == (values == "uint8")
    assert found["coverage"] is None


def test_a_large_cache_is_sampled() -> None:
    spec = CacheSpec(kind="full", num_classes=V, samples=(0, 10**6), records_per_shard=1000)
    numbers = np.concatenate(sampled_records(spec, 10**6, 2**16))
    assert 2**16 - 16 <= len(numbers) <= 2**16 + 16 and len(np.unique(numbers)) == len(numbers)
    assert numbers.min() == 0 and numbers.max() >= 10**6 - 1000
    # of 1000 records each: 16 shards would not hold so many
    assert len(np.unique(numbers // 1000)) == 66


def test_sampled_coverage_says_so(cache: Path) -> None:
    with kdcache.open(cache) as opened:
        found = coverage(opened, sample_rows=3)
    assert found is not None and found["of_rows"] == N and 3 <= found["rows"] < N


def test_a_record_with_class_names(cache: Path) -> None:
    found = inspect(cache, record=5)
    assert (found["sample_id"], found["view"], found["sample_key"]) == (5, 0, f"{5:016x}")
    (row,) = found["rows"]
    order = np.argsort(-teacher_logits()[5])
    assert [e["name"] for e in row["entries"]] == [NAMES[i] for i in order[:4]]
    assert row["labels"] == [NAMES[labels()[5, 0]]]
    for t in TEMPERATURES:
        p = softmax(teacher_logits(), t)[5]
        assert [e["probability"][t] for e in row["entries"]] == pytest.approx(
            p[order[:4]].tolist(), abs=1e-6
        )
        assert row["tail"][t] == pytest.approx(p[order[4:]].sum(), abs=1e-6)
        assert row["not_shown"][t] == 0
    assert inspect(cache, record=N - 1)["rows"][0]["labels"] == [None]
    text = render(found)
    assert NAMES[order[0]] in text and f"key {5:016x}" in text


def test_a_record_that_is_not_there(cache: Path) -> None:
    with pytest.raises(UsageError, match=f"record {N}: .* has the records 0 to {N - 1}"):
        inspect(cache, record=N)


def test_views_and_features(tmp_path: Path) -> None:
    feature = FeatureSpec(name="body", module="body", recipe="pool", dtype="float32", shape=(3,))
    spec = CacheSpec(
        kind="none",
        num_classes=0,
        samples=(10, 14),
        views=(2, 4),
        records_per_shard=4,
        features=(feature,),
    )
    with kdcache.create(tmp_path / "c", spec, identity()) as writer:
        for shard in range(2):
            writer.write(
                shard,
                {
                    "sample_key": np.arange(4, dtype=np.uint64),
                    "feature_body": np.zeros((4, 3), np.float32),
                },
            )
    found = inspect(tmp_path / "c", record=5)
    assert (found["sample_id"], found["view"]) == (11, 3)
    assert found["features"] == {"body": {"shape": [3], "dtype": "float32"}} and "rows" not in found
    whole = inspect(tmp_path / "c")
    assert whole["num_rows"] == 0
    assert [whole[name] for name in ("bytes_per_row", "coverage", "quantisation_kl")] == [None] * 3
    assert "none (features only)" in render(whole) and "feature body" in render(whole)


def token_cache(path: Path, tokenizer: dict[str, str] | None) -> Path:
    """Two windows of 4 and 3 tokens: 3 and 2 rows."""
    spec = CacheSpec(
        kind="topk",
        num_classes=V,
        samples=(0, 2),
        records_per_shard=2,
        tiers=(2,),
        values="float32",
        temperatures=("1",),
        labels=1,
        rows="ragged",
        tokens=True,
    )
    rows = topk_rows(spec, teacher_logits(5), labels(5))
    rows = dataclasses.replace(rows, pos=np.array([0, 1, 2, 0, 1]))
    offsets = np.array([0, 3, 5])
    columns = {
        "sample_key": np.arange(2, dtype=np.uint64),
        "row.offsets": offsets,
        "token": np.array([0, 1, 2, 3, 4, 5, 0], np.uint16),
        "token.offsets": np.array([0, 4, 7]),
        "document_start": np.array([1, 0, 0, 0, 1, 0, 0], np.uint8),
    }
    whose = kdcache.Identity(data={"name": "text"}, teacher={"weights": "x"}, tokenizer=tokenizer)
    with kdcache.create(path, spec, whose) as writer:
        encoded = encode_rows(spec, rows, offsets=offsets)
        writer.write(0, {**columns, **encoded.columns}, encoded.measured)
    return path


def make_tokenizer(path: Path, words: list[str]) -> Path:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])).save(
        str(path)
    )
    return path


def test_tokens_are_ids_without_their_tokenizer(tmp_path: Path) -> None:
    path = token_cache(tmp_path / "c", None)
    assert inspect(path)["num_rows"] == 5
    found = inspect(path, record=1)
    assert found["num_rows"] == 2 and found["tokens"] == ["4", "5", "0"]
    assert [row["pos"] for row in found["rows"]] == [0, 1]
    assert [e["id"] for e in found["rows"][1]["entries"]] == np.argsort(-teacher_logits(5)[4])[
        :2
    ].tolist()
    assert [e["name"] for e in found["rows"][1]["entries"]] == [
        str(e["id"]) for e in found["rows"][1]["entries"]
    ]
    assert "row at position 1" in render(found)


def test_tokens_are_text_with_their_own_tokenizer_only(tmp_path: Path) -> None:
    from kdcache.data.text import fingerprint, load_tokenizer

    own = make_tokenizer(tmp_path / "own.json", NAMES)
    other = make_tokenizer(tmp_path / "other.json", NAMES[::-1])
    mark = fingerprint(load_tokenizer(str(own)))
    path = token_cache(tmp_path / "c", {"fingerprint": mark, "template": "", "packing": ""})
    found = inspect(path, record=0, tokenizer=own)
    assert found["tokens"] == ["'ant'", "'bee'", "'cat'", "'dog'"]
    assert found["rows"][0]["entries"][0]["name"] == repr(NAMES[int(teacher_logits(5)[0].argmax())])
    with pytest.raises(IdentityMismatch, match=r"other\.json is not the one of") as error:
        inspect(path, record=0, tokenizer=other)
    assert [d.field for d in error.value.fields] == [
        "tokenizer.fingerprint"
    ] and error.value.fields[0].cached == mark
    with pytest.raises(UsageError, match=r"^--tokenizer none"):
        inspect(path, record=0, tokenizer="none.json")


def test_the_data_must_be_that_of_the_record(cache: Path) -> None:
    class Keyed:
        name, class_names = "zoo", ["a", "b", "c", "d", "e", "f"]

        def __init__(self, shift: int) -> None:
            self.shift = shift

        def __len__(self) -> int:
            return N

        def __getitem__(self, i: int) -> Any:
            return np.zeros(2, np.float32), 0

        def key(self, i: int) -> int:
            return i + self.shift

    order = np.argsort(-teacher_logits()[3])
    assert (
        inspect(cache, record=3, data=Keyed(0))["rows"][0]["entries"][0]["name"]
        == "abcdef"[order[0]]
    )
    with pytest.raises(DataError, match="sample 3"):
        inspect(cache, record=3, data=Keyed(1))


@pytest.mark.parametrize(
    "options", [{"tokenizer": "x"}, {"data": "digits"}, {"record": 0, "other": "x"}]
)
def test_options_that_do_not_go_together(cache: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        inspect(cache, **options)


def test_two_caches(tmp_path: Path, cache: Path) -> None:
    same = inspect(cache, other=topk_cache(tmp_path / "same", "hdf5"))
    assert same["same_content"] and same["fields"] == [] and "the same content" in render(same)
    assert "container: arrow | hdf5" in render(same)
    changed = teacher_logits()
    changed[6, changed[6].argmax()] += 1
    other = inspect(cache, other=topk_cache(tmp_path / "other", logits=changed))
    assert not other["same_content"] and other["fields"] == [] and other["shards"]["differ"] == [1]
    assert (
        "sample_key" not in other["shards"]["columns"] and "values_2" in other["shards"]["columns"]
    )
    far = inspect(
        cache, other=topk_cache(tmp_path / "far", values="uint8", whose=identity(name="garden"))
    )
    assert [d["field"] for d in far["fields"]] == ["spec.values", "data.name"]
    assert "spec.values: 'float32' | 'uint8'" in render(far) and "'zoo' | 'garden'" in render(far)


def test_the_command(cache: Path, tmp_path: Path) -> None:
    def run(*args: str) -> Any:
        return CliRunner().invoke(main, ["inspect", str(cache), *args])

    assert json.loads(run("--json").stdout) == json.loads(json.dumps(inspect(cache)))
    text = run().stdout
    for said in (
        "topk: the 4 largest of 6 as float32",
        "10 records, 10 rows, 3 shards",
        "1 label per row",
        "covered mass",
        "values_4",
        "zoo",
    ):
        assert said in text
    assert json.loads(run("--record", "3", "--json").stdout)["record"] == 3
    refused = run("--record", "10")
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
    missing = CliRunner().invoke(main, ["inspect", str(tmp_path / "none")])
    assert missing.exit_code == 1 and missing.stderr.startswith("Error: ") and missing.stdout == ""


def test_a_folder_that_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(KDCacheError):
        inspect(tmp_path)
