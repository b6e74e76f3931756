"""Caches that were written once and never change: today's writer makes the same bytes, two readers
read the same.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from independent_reader import Cache as IndependentCache
from make_golden import CONTAINERS, GOLDEN, IDENTITY, MADE_WITH, dense_logits, shard_columns, write

import kdcache
from kdcache.cache.codec import decode_rows
from kdcache.cache.convert import convert
from kdcache.cache.features import decode_feature
from kdcache.errors import DataError

DATA = Path(__file__).parents[1] / "golden"
PAIRS = [(name, container) for name in GOLDEN for container in CONTAINERS]
WITH_ROWS = [pair for pair in PAIRS if GOLDEN[pair[0]].spec.kind != "none"]


def files(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def promises(folder):
    """Header bytes, and everything that does not depend on the library that writes the container."""
    manifest = json.loads((folder / "manifest/00000001.json").read_bytes())
    columns = {
        key: (column["length"], column["digest"]) for key, column in manifest["columns"].items()
    }
    return (
        (folder / "header.json").read_bytes(),
        manifest["content_id"],
        columns,
        manifest["measured"],
    )


def library(container):
    if container == "arrow":
        return f"pyarrow {importlib.metadata.version('pyarrow')}"
    return f"h5py {h5py.version.version}, HDF5 {h5py.version.hdf5_version}"


@pytest.mark.parametrize(("name", "container"), PAIRS)
def test_todays_writer_makes_the_same_bytes(name, container, tmp_path):
    golden = DATA / f"{name}.{container}"
    write(tmp_path / "new", name, container)
    assert promises(tmp_path / "new") == promises(golden)
    if files(tmp_path / "new") != files(golden):
        assert library(container) != MADE_WITH[container], (
            "same libraries, other bytes: the format has changed"
        )
        pytest.skip(
            f"{library(container)} lays out files otherwise than {MADE_WITH[container]}; columns "
            "are equal"
        )


@pytest.mark.parametrize("name", GOLDEN)
def test_containers_agree_and_convert_into_each_other(name, tmp_path):
    first, second = (DATA / f"{name}.{container}" for container in CONTAINERS)
    assert promises(first)[1:] == promises(second)[1:]
    for source, other in ((first, second), (second, first)):
        assert convert(source, tmp_path / source.suffix) == promises(source)[1]
        assert promises(tmp_path / source.suffix) == promises(other)


@pytest.mark.parametrize(("name", "container"), PAIRS)
def test_golden_files_pass_every_check(name, container):
    with kdcache.open(DATA / f"{name}.{container}", expect=IDENTITY) as cache:
        assert cache.check_all() == [] and cache.spec == GOLDEN[name].spec
        assert cache.content_id == IndependentCache(DATA / f"{name}.{container}").content_id


@pytest.mark.parametrize(("name", "container"), PAIRS)
def test_two_readers_agree_to_the_last_bit(name, container):
    second = IndependentCache(DATA / f"{name}.{container}")
    with kdcache.open(DATA / f"{name}.{container}") as cache:
        for record in range(cache.num_records):
            batch = cache.read(np.array([record]))
            columns = second.columns(record)
            for column in cache.spec.columns():
                ours = batch.columns[column.name]
                theirs = np.asarray(columns[column.name])
                assert ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes(), (
                    record,
                    column.name,
                )
            for feature in cache.spec.features:
                ours, theirs = (
                    decode_feature(feature, batch.columns),
                    second.feature(record, feature.name),
                )
                assert (
                    ours.tobytes() == theirs.tobytes() and ours.dtype == theirs.dtype == np.float32
                )
            for k in cache.spec.tiers or ((None,) if cache.spec.kind == "full" else ()):
                decoded = decode_rows(cache.spec, batch.columns, k)
                ids, relative, max_N, tails = second.rows(record, k)
                assert (ids is None and decoded.ids is None) or np.array_equal(ids, decoded.ids)
                for ours, theirs in (
                    (decoded.relative, relative),
                    (decoded.max, max_N),
                    (decoded.tail_lse, tails),
                ):
                    assert (ours is None and theirs is None) or (
                        ours.dtype == theirs.dtype == np.float32
                        and ours.tobytes() == theirs.tobytes()
                    ), (record, k)


@pytest.mark.parametrize(("name", "container"), WITH_ROWS)
def test_probabilities_are_those_of_the_teacher(name, container):
    """Against a softmax over all V classes in float64; how far a value codec may be off is derived
    below.
    """
    golden, cache = GOLDEN[name], IndependentCache(DATA / f"{name}.{container}")
    spec, row = golden.spec, 0
    for record in range(spec.num_records):
        count = golden.rows_of_record[record] if golden.rows_of_record else 1
        z = dense_logits(golden, row, count).astype(np.float64)
        row += count
        for k in spec.tiers or (None,):
            for temperature in spec.temperatures or ("1", "3"):
                ids, head, tail = cache.probabilities(record, temperature, k)
                assert len(head) == count and np.abs(head.sum(1) + tail - 1).max(initial=0) < 1e-12
                T = float(temperature)
                p = np.exp((z - z.max(1, initial=-np.inf, keepdims=True)) / T)
                p /= p.sum(1, keepdims=True)
                if ids is None:
                    expected, expected_tail = p, np.zeros(count)
                else:
                    expected = np.take_along_axis(p, ids, 1)
                    expected_tail = 1 - expected.sum(1)
                # Logits are off by at most half a uint8 step (120 / 254), float16 at depth 24 and
                # bfloat16 at size 32 by 2^-7 and 2^-4; tails are rounded to 1/1024. A probability
                # moves by twice that, relatively.
                off = {"uint8": 60 / 254, "float16": 2**-7, "bfloat16": 2**-4, "float32": 0}[
                    spec.values
                ] / T + 1 / 1024
                assert (
                    np.abs(np.log(np.maximum(head, 1e-9) / np.maximum(expected, 1e-9))).max(
                        initial=0
                    )
                    < 2 * off
                )
                assert np.abs(tail - expected_tail).max(initial=0) < 2 * off


@pytest.mark.parametrize(("name", "container"), WITH_ROWS)
def test_the_students_targets_are_the_same_probabilities(name, container):
    """A third unpacking, on the device: float32 arithmetic on the same stored numbers."""
    second = IndependentCache(DATA / f"{name}.{container}")
    with kdcache.open(DATA / f"{name}.{container}") as cache:
        spec = cache.spec
        for k in spec.tiers or (None,):
            for temperature in spec.temperatures or ("1", "3"):
                targets = kdcache.soft_targets(
                    cache.read(np.arange(cache.num_records)), temperature=temperature, k=k
                )
                parts = [second.probabilities(r, temperature, k) for r in range(cache.num_records)]
                head, tail = (np.concatenate([p[i] for p in parts]) for i in (1, 2))
                assert np.abs(targets.log_probs_NK.double().exp().numpy() - head).max() < 1e-5
                if spec.kind == "topk":
                    assert np.array_equal(
                        targets.ids_NK.numpy(), np.concatenate([p[0] for p in parts])
                    )
                    assert np.abs(targets.log_tail_N.double().exp().numpy() - tail).max() < 1e-5


@pytest.mark.parametrize("name", sorted({name for name, _ in WITH_ROWS}))
def test_a_row_without_a_maximum_is_refused(name, tmp_path):
    golden = GOLDEN[name]
    columns, _ = shard_columns(golden, 0)
    at = f"values_{golden.spec.tiers[0]}" if golden.spec.tiers else "values"
    lowest = {"uint8": 255, "bfloat16": 0xFF80}.get(golden.spec.values, -np.inf)
    columns[at][1, 0 if golden.spec.tiers else slice(None)] = lowest
    writer = kdcache.create(tmp_path, golden.spec, IDENTITY)
    with pytest.raises(DataError, match=f"shard 0: column {at} has a row without a maximum"):
        writer.write(0, columns)


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_the_golden_rows_contain(container):
    """The cases they are there for are in them."""
    cache = IndependentCache(DATA / f"topk_uint8.{container}")
    ids = np.concatenate([cache.rows(r)[0] for r in range(6)])
    relative = np.concatenate([cache.rows(r)[1] for r in range(6)])
    labels = np.concatenate([cache.columns(r)["label"] for r in range(6)])
    assert (ids > 65535).any() and (ids < 65536).any() and np.isneginf(relative).any()
    assert ((relative[:, 1:] == relative[:, :-1]) & (relative[:, 1:] > -120)).any()
    inside = (ids[:, :, None] == labels[:, None, :]).any(1)
    assert (
        (inside & (labels >= 0)).any() and (~inside & (labels >= 0)).any() and (labels == -1).any()
    )
    assert (labels[:, 0] == labels[:, 1]).any()
    tokens = IndependentCache(DATA / f"tokens_float16.{container}")
    assert [len(tokens.columns(r)["pos"]) for r in range(5)] == [3, 0, 2, 4, 1]
    assert np.isneginf(IndependentCache(DATA / f"full_float32.{container}").rows(1)[1]).any()
    dropped = IndependentCache(DATA / f"full_float16.{container}")
    # below -65504, where no logit was -inf
    assert any(np.isneginf(dropped.rows(r)[1]).any() for r in (0, 2))


@pytest.mark.parametrize(("name", "container"), PAIRS)
def test_the_independent_reader_refuses_a_flipped_bit(name, container, tmp_path):
    """It is a reader and not a parser: otherwise its agreement would say nothing about digests."""
    shutil.copytree(DATA / f"{name}.{container}", tmp_path / "cache")
    for path in sorted(p for p in (tmp_path / "cache").rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 5)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
            with pytest.raises((AssertionError, ValueError, KeyError)):
                IndependentCache(tmp_path / "cache")
        path.write_bytes(whole)
