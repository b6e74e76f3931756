"""What a dump leaves behind: spec, columns, defaults, sizes."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from teacher_world import CLASSES, Dump, Noisy, Points, Sentences, Speaker, dumper, mlp
from torch import nn

import kdcache
from kdcache.cache.codec import decode_rows
from kdcache.errors import DataError, KDCacheError, SpecMismatch, UsageError
from kdcache.teacher.plan import records_per_shard


@pytest.fixture
def dump(tmp_path: Path) -> Dump:
    """dump_teacher with small defaults, into the folder "c"."""
    return dumper(tmp_path / "c")


def read(cache: Path, columns: list[str] | None = None) -> Any:
    with kdcache.open(cache) as opened:
        return opened.read(np.arange(opened.num_records), columns)


def test_few_classes_are_kept_whole_and_it_is_said(dump: Dump, tmp_path: Path) -> None:
    said: list[str] = []
    net, data = mlp(), Points()
    report = dump(teacher=net, data=data, values="float32", batch_size=16, say=said.append)
    assert (
        report.kind == "full" and report.complete and report.content_id and report.shards_left == 0
    )
    assert any("kind full: 12 classes" in line for line in said)
    batch = read(tmp_path / "c")
    with torch.inference_mode():
        expected = torch.cat([net(x) for x in data.x.split(16)])
    np.testing.assert_array_equal(batch.columns["values"], expected.numpy())
    np.testing.assert_array_equal(batch.columns["label"][:, 0], data.y.numpy())
    assert report.accuracy == 1.0 and report.warnings == ()
    json.dumps(report.to_json())


@pytest.mark.parametrize("container", ["arrow", "hdf5"])
@pytest.mark.parametrize("values", ["float32", "float16", "bfloat16", "uint8"])
def test_topk_with_tiers_decodes_to_the_teacher(
    dump: Dump, tmp_path: Path, container: str, values: str
) -> None:
    net, data = mlp(), Points()
    report = dump(
        teacher=net,
        data=data,
        k=6,
        tiers=[2],
        temperatures=[2, 1.0, "2.0"],
        container=container,
        values=values,
        moments=True,
        batch_size=50,
    )
    assert report.tiers == (2, 6) and report.temperatures == ("1", "2") and report.kind == "topk"
    with torch.inference_mode():
        logits = net(data.x)
    with kdcache.open(tmp_path / "c") as cache:
        assert cache.container == container
        batch = cache.read(np.arange(50))
        bound = {"float32": 1e-6, "float16": 0.02, "bfloat16": 0.2, "uint8": 0.2}[values]
        for k in (2, 6):
            rows = decode_rows(cache.spec, batch.columns, k)
            top = logits.topk(k)
            np.testing.assert_array_equal(rows.ids, top.indices.numpy())
            assert rows.tail_lse is not None
            for t, temperature in enumerate((1.0, 2.0)):
                q = torch.softmax(logits.double() / temperature, 1).gather(1, top.indices)
                whole = np.logaddexp(
                    np.logaddexp.reduce(rows.relative / temperature, axis=1), rows.tail_lse[:, t]
                )
                np.testing.assert_allclose(
                    np.exp(rows.relative / temperature - whole[:, None]), q.numpy(), atol=bound
                )
    mass = torch.softmax(logits.double(), 1).topk(6).values.sum(1)
    assert report.covered_mass["1"] == pytest.approx(mass.mean().item(), rel=1e-5)
    assert report.truncation_kl["1"] == pytest.approx(-mass.log().mean().item(), rel=1e-3)


def test_a_token_cache_has_rows_tokens_and_next_tokens(dump: Dump, tmp_path: Path) -> None:
    net, data = Speaker(), Sentences()
    report = dump(teacher=net, data=data, k=5, batch_size=4, values="float32", records_per_shard=9)
    assert report.temperatures == ("1", "2") and report.num_shards == 3
    batch = read(tmp_path / "c")
    rows, tokens = batch.offsets["row"], batch.offsets["token"]
    for i, item in enumerate(data.items):
        ids, start = item["input_ids"], item["document_start"]
        np.testing.assert_array_equal(
            batch.columns["token"][tokens[i] : tokens[i + 1]], ids.numpy()
        )
        np.testing.assert_array_equal(
            batch.columns["document_start"][tokens[i] : tokens[i + 1]], start.numpy()
        )
        own = slice(rows[i], rows[i + 1])
        pos = [p for p in range(len(ids) - 1) if not start[p + 1]]
        assert batch.columns["pos"][own].tolist() == pos
        assert batch.columns["label"][own, 0].tolist() == [int(ids[p + 1]) for p in pos]
        with torch.inference_mode():
            top = net(ids[None])[0, pos].topk(5)
        np.testing.assert_array_equal(batch.columns["ids_5"][own], top.indices.numpy())
        np.testing.assert_allclose(
            batch.columns["values_5"][own], top.values.numpy(), rtol=1e-5, atol=1e-5
        )


def test_a_language_model_of_hugging_face(dump: Dump, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
        )
    )
    data = Sentences(11)
    dump(
        teacher=llama,
        data=data,
        k=8,
        values="float32",
        features=["model.layers.0:raw:float32", "model.norm:last"],
        batch_size=3,
    )
    batch = read(tmp_path / "c")
    llama.eval()
    for i, item in enumerate(data.items):
        own = slice(batch.offsets["row"][i], batch.offsets["row"][i + 1])
        with torch.inference_mode():
            out = llama(item["input_ids"][None], output_hidden_states=True)
        pos = batch.columns["pos"][own]
        np.testing.assert_allclose(
            batch.columns["values_8"][own], out.logits[0, pos].topk(8).values, atol=1e-5
        )
        kept = batch.columns["feature_model_layers_0_raw"][own]
        np.testing.assert_allclose(kept, out.hidden_states[1][0, pos], atol=1e-5)


def test_rows_by_position_of_a_model_without_tokens(dump: Dump, tmp_path: Path) -> None:
    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    class Tables(Points):
        def __getitem__(self, i: int) -> Any:
            labels = torch.tensor([i % 5, -100, (i + 1) % 5])
            return self.x[[i, 0, i]], labels

    data = Tables(9)
    dump(teacher=Grid(), data=data, values="float32")
    batch = read(tmp_path / "c")
    assert batch.columns["pos"].tolist() == [0, 2] * 9
    assert batch.columns["label"][:, 0].tolist() == [
        label for i in range(9) for label in (i % 5, (i + 1) % 5)
    ]
    assert "token" not in batch.columns


def test_two_weighted_labels_unknown_labels_and_none(dump: Dump, tmp_path: Path) -> None:
    class Mixed(Points):
        def __getitem__(self, i: int) -> Any:
            pair = torch.tensor([i % CLASSES, -100 if i % 2 else -1 if i % 3 else 4])
            return {"input": self.x[i], "labels": pair, "label_weight": torch.tensor([0.75, 0.25])}

    dump(data=Mixed(), k=3, out=tmp_path / "two")
    batch = read(tmp_path / "two", ["label", "label_weight", "label_logit"])
    assert batch.columns["label"][:4].tolist() == [[0, 4], [1, -1], [2, -1], [3, -1]]
    assert batch.columns["label_weight"][7].tolist() == [0.75, 0.25]
    dump(labels=False, k=3, out=tmp_path / "none")
    with kdcache.open(tmp_path / "none") as cache:
        assert cache.spec.labels == 0


def test_accuracy_is_over_the_rows_that_have_a_label(dump: Dump) -> None:
    """Of 50 labels 17 are unknown, and of the 33 others 5 are not what the teacher says."""
    data = Points(50)
    data.y[::3] = -1
    data.y[1::7] = torch.where(data.y[1::7] < 0, -1, (data.y[1::7] + 1) % CLASSES)
    with torch.no_grad():
        right = mlp()(data.x).argmax(1) == data.y
    known = data.y >= 0
    assert 0 < int(right.sum()) < int(known.sum()) < 50
    assert dump(data=data).accuracy == int(right.sum()) / int(known.sum())


def test_views_are_records_of_their_own(dump: Dump, tmp_path: Path) -> None:
    net, data = mlp(), Noisy(10)
    report = dump(
        teacher=net,
        data=data,
        views=3,
        seed=5,
        values="float32",
        records_per_shard=4,
        batch_size=10,
    )
    assert report.num_records == 30 and report.num_shards == 9
    batch = read(tmp_path / "c")
    assert (
        len(set(batch.columns["view_key"].tolist())) == 30
        and len(set(batch.columns["sample_key"].tolist())) == 10
    )
    from kdcache.data.samples import Samples

    item = Samples(data, seed=5).item(7, 2)
    assert batch.columns["view_key"][27] == item.view_key
    with torch.inference_mode():
        np.testing.assert_allclose(
            batch.columns["values"][27], net(item.inputs[None])[0].numpy(), rtol=1e-5, atol=1e-6
        )


def test_limit_samples_and_dtype(dump: Dump, tmp_path: Path) -> None:
    net = mlp()
    dump(teacher=net, limit_samples=20, dtype="bfloat16", values="bfloat16")
    with kdcache.open(tmp_path / "c") as cache:
        assert cache.num_records == 20 and cache.identity.teacher["dtype"] == "bfloat16"
        assert cache.recorded["batch_size"] == "32" and cache.recorded["torch"] == torch.__version__
    assert next(net.parameters()).dtype == torch.float32  # a module given is not changed


def test_the_module_is_asked_in_eval_mode_and_given_back_as_it_was(dump: Dump) -> None:
    net = nn.Sequential(mlp(), nn.Dropout(0.9)).train()
    net[0].eval()
    report = dump(teacher=net, data=Points())
    assert report.accuracy == 1.0 and net.training and net[1].training and not net[0].training

    class Stubborn(nn.Dropout):
        def train(self, mode: bool = True) -> Any:
            self.training = True
            return self

    with pytest.raises(UsageError, match="teacher's 1 stays in training mode"):
        dump(teacher=nn.Sequential(mlp(), Stubborn()))


# ---- sizes


def test_shards_have_the_size_asked_for_whatever_the_batch_size(dump: Dump, tmp_path: Path) -> None:
    specs = []
    for size in (7, 32):
        report = dump(out=tmp_path / str(size), batch_size=size, shard_size=500, values="float32")
        assert 400 < report.records_per_shard * report.predicted_bytes / report.num_records <= 500
        with kdcache.open(tmp_path / str(size)) as cache:
            specs.append(cache.spec)
            assert sum(cache.column_bytes().values()) == report.predicted_bytes == report.bytes
    assert specs[0] == specs[1]


@given(
    count=st.integers(1, 10**9),
    views=st.integers(1, 50),
    record_bytes=st.integers(1, 2**30),
    world=st.integers(1, 2000),
)
def test_a_shard_is_a_small_part_of_a_dump_and_no_crumb(
    count: int, views: int, record_bytes: int, world: int
) -> None:
    records = records_per_shard(count, views, record_bytes, world)
    shards = views * -(-count // records)
    assert 1 <= records <= count and records <= 2**17
    assert records == 1 or records * record_bytes <= 2**28
    assert shards >= min(world, count * views), "an idle rank"
    large = records >= 256 and records * record_bytes >= 2**17
    # a crumb only where ranks would be idle, or by its bytes
    if not large and records < count:
        assert shards < 2 * max(world, views) + views or records * record_bytes > 2**27
    if count * views * record_bytes >= 64 * 2**18 and count * views >= 64 * 512:
        assert shards >= 64, "an interruption loses more than a 64th"


def test_what_the_shards_of_some_dumps_are() -> None:
    # ImageNet's top 5: not one file
    assert records_per_shard(1_281_167, 1, 57, 1) == -(-1_281_167 // 64)
    assert records_per_shard(1437, 1, 43, 1) == 1437  # the demo's: one file
    assert records_per_shard(1437, 1, 43, 4) == 360
    # not a day of the teacher
    assert records_per_shard(10**8, 1, 60, 1) == 2**17
    assert records_per_shard(10**7, 1, 330_000, 8) == 2**28 // 330_000  # tokens: by bytes


def test_a_continued_dump_takes_the_size_of_shards_from_its_header(
    dump: Dump, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="sample 40"):
        dump(data=Points(600, fail_at=40), batch_size=4, records_per_shard=20, accept=["unsteady"])
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("RANK", "1")
    said: list[str] = []
    report = dump(data=Points(600), batch_size=4, say=said.append)
    assert report.records_per_shard == 20 and report.shards_written == 1  # 17; shard 1 was there
    with pytest.raises(SpecMismatch, match=r"spec\.records_per_shard: cache has 20, given is 30"):
        dump(data=Points(600), records_per_shard=30)
    monkeypatch.setenv("RANK", "0")
    said.clear()
    dump(data=Points(10), out=tmp_path / "few", say=said.append)
    assert (
        "16 processes share the shards; 6 of them have nothing to do, as there are 10"
        in "\n".join(said)
    )


def test_more_shards_than_a_cache_can_have_are_refused_at_once(dump: Dump, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        UsageError, match="1000000000 views of 50 samples in shards of 50 are 1000000000 shards"
    ):
        dump(views=10**9)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB
    assert not (tmp_path / "c").exists()


def test_a_disk_that_cannot_say_what_is_free_is_written_to(
    dump: Dump, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(*_: Any) -> Any:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "statvfs", unknown)
    with caplog.at_level(logging.INFO):
        assert dump().complete
    assert "how much space is free is not known there" in caplog.text


def test_columns_stay_below_two_to_the_31_elements(dump: Dump) -> None:
    class Wide(Points):
        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, i: int) -> Any:
            return self.x[i % 50], self.y[i % 50]

    report = dump(data=Wide(), shard_size=10**15, dry_run=True)
    assert report.records_per_shard == (2**31 - 1) // CLASSES
    with pytest.raises(UsageError, match=f"at most {(2**31 - 1) // CLASSES} keep"):
        dump(data=Wide(), records_per_shard=10**9, dry_run=True)


def test_a_dry_run_writes_nothing(dump: Dump, tmp_path: Path) -> None:
    report = dump(dry_run=True)
    assert (
        report.dry_run
        and report.predicted_bytes > 50 * CLASSES * 2
        and not list(tmp_path.iterdir())
    )


def test_a_disk_that_is_too_small_is_said_before_the_start(
    dump: Dump, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        KDCacheError, match=r"1 of 1 shards .* about 10\.0 KiB, the disk has 100 B free"
    ) as caught:
        dump()
    assert caught.value.exit_code == 1
    monkeypatch.undo()
    assert dump().complete
