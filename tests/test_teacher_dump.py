"""What a dump leaves behind: spec, columns, defaults, refusals, warnings."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teacher_world import CLASSES, WIDTH, Broken, Noisy, Points, Sentences, Speaker, files, mlp
from torch import nn

import kdcache
from kdcache.cache.codec import decode_rows
from kdcache.data.samples import Samples
from kdcache.errors import DataError, IdentityMismatch, KDCacheError, NotBuilt, SpecMismatch, UsageError
from kdcache.teacher.dump import LABELS_DISAGREE, DumpReport, dump_teacher
from kdcache.teacher.progress import Progress

Dump = Callable[..., DumpReport]


@pytest.fixture
def dump(tmp_path: Path) -> Dump:
    """dump_teacher with small defaults, into the folder "c"."""

    def call(**changes: Any) -> DumpReport:
        options: dict[str, Any] = {"teacher": mlp(), "data": Points(), "out": tmp_path / "c", "device": "cpu"}
        return dump_teacher(**{**options, **changes})

    return call


def read(cache: Path, columns: list[str] | None = None) -> Any:
    with kdcache.open(cache) as opened:
        return opened.read(np.arange(opened.num_records), columns)


def test_few_classes_are_kept_whole_and_it_is_said(dump: Dump, tmp_path: Path) -> None:
    said: list[str] = []
    net, data = mlp(), Points()
    report = dump(teacher=net, data=data, values="float32", batch_size=16, say=said.append)
    assert report.kind == "full" and report.complete and report.content_id and report.shards_left == 0
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
def test_topk_with_tiers_decodes_to_the_teacher(dump: Dump, tmp_path: Path, container: str, values: str) -> None:
    net, data = mlp(), Points()
    report = dump(teacher=net, data=data, k=6, tiers=[2], temperatures=[2, 1.0, "2.0"], container=container,
                  values=values, moments=True, batch_size=50)
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
                whole = np.logaddexp(np.logaddexp.reduce(rows.relative / temperature, axis=1), rows.tail_lse[:, t])
                np.testing.assert_allclose(np.exp(rows.relative / temperature - whole[:, None]), q.numpy(), atol=bound)
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
        np.testing.assert_array_equal(batch.columns["token"][tokens[i]:tokens[i + 1]], ids.numpy())
        np.testing.assert_array_equal(batch.columns["document_start"][tokens[i]:tokens[i + 1]], start.numpy())
        own = slice(rows[i], rows[i + 1])
        pos = [p for p in range(len(ids) - 1) if not start[p + 1]]
        assert batch.columns["pos"][own].tolist() == pos
        assert batch.columns["label"][own, 0].tolist() == [int(ids[p + 1]) for p in pos]
        with torch.inference_mode():
            top = net(ids[None])[0, pos].topk(5)
        np.testing.assert_array_equal(batch.columns["ids_5"][own], top.indices.numpy())
        np.testing.assert_allclose(batch.columns["values_5"][own], top.values.numpy(), rtol=1e-5, atol=1e-5)


def test_a_language_model_of_hugging_face(dump: Dump, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32))
    data = Sentences(11)
    dump(teacher=llama, data=data, k=8, values="float32", features=["model.layers.0:raw:float32", "model.norm:last"],
         batch_size=3)
    batch = read(tmp_path / "c")
    llama.eval()
    for i, item in enumerate(data.items):
        own = slice(batch.offsets["row"][i], batch.offsets["row"][i + 1])
        with torch.inference_mode():
            out = llama(item["input_ids"][None], output_hidden_states=True)
        pos = batch.columns["pos"][own]
        np.testing.assert_allclose(batch.columns["values_8"][own], out.logits[0, pos].topk(8).values, atol=1e-5)
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
    assert batch.columns["label"][:, 0].tolist() == [label for i in range(9) for label in (i % 5, (i + 1) % 5)]
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


def test_views_are_records_of_their_own(dump: Dump, tmp_path: Path) -> None:
    net, data = mlp(), Noisy(10)
    report = dump(teacher=net, data=data, views=3, seed=5, values="float32", records_per_shard=4, batch_size=10)
    assert report.num_records == 30 and report.num_shards == 9
    batch = read(tmp_path / "c")
    assert len(set(batch.columns["view_key"].tolist())) == 30 and len(set(batch.columns["sample_key"].tolist())) == 10
    from kdcache.data.samples import Samples
    item = Samples(data, seed=5).item(7, 2)
    assert batch.columns["view_key"][27] == item.view_key
    with torch.inference_mode():
        np.testing.assert_allclose(batch.columns["values"][27], net(item.inputs[None])[0].numpy(), rtol=1e-5, atol=1e-6)


def test_limit_samples_and_dtype(dump: Dump, tmp_path: Path) -> None:
    net = mlp()
    dump(teacher=net, limit_samples=20, dtype="bfloat16", values="bfloat16")
    with kdcache.open(tmp_path / "c") as cache:
        assert cache.num_records == 20 and cache.identity.teacher["dtype"] == "bfloat16"
        assert cache.recorded["batch_size"] == "32" and cache.recorded["torch"] == torch.__version__
    assert next(net.parameters()).dtype == torch.float32        # a module given is not changed


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


# ---- sizes ----------------------------------------------------------------------------------------------------


def test_shards_have_the_size_asked_for_whatever_the_batch_size(dump: Dump, tmp_path: Path) -> None:
    specs = []
    for size in (7, 32):
        report = dump(out=tmp_path / str(size), batch_size=size, shard_size=500, values="float32")
        assert 400 < report.records_per_shard * report.predicted_bytes / report.num_records <= 500
        with kdcache.open(tmp_path / str(size)) as cache:
            specs.append(cache.spec)
            assert sum(cache.column_bytes().values()) == report.predicted_bytes == report.bytes
    assert specs[0] == specs[1]


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
    assert report.dry_run and report.predicted_bytes > 50 * CLASSES * 2 and not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_said_before_the_start(dump: Dump, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(KDCacheError, match=r"1 of 1 shards .* about 2\.0 KiB, the disk has 100 B free") as caught:
        dump()
    assert caught.value.exit_code == 1
    monkeypatch.undo()
    assert dump().complete


# ---- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "said"), [
    ({"k": 13}, "k is 13, but the teacher has 12 classes"),
    ({"kind": "topk", "k": 0}, "tiers"),
    ({"k": 4, "tiers": [5]}, "tier 5 is above k = 4"),
    ({"kind": "full", "k": 3}, "--k is foreign to kind full"),
    ({"kind": "full", "tiers": [3]}, "--tier is foreign to kind full"),
    ({"temperatures": [2]}, "--temperature is foreign to kind full"),
    ({"kind": "none", "features": ["0"], "values": "uint8"}, "--values is foreign to kind none"),
    ({"kind": "none", "features": ["0"], "moments": True}, "--moments is foreign to kind none"),
    ({"kind": "none"}, "name a feature"),
    ({"kind": "tok"}, "kind 'tok' is unknown.*'topk'"),
    ({"kind": "topk", "temperatures": [0]}, "temperature 0"),
    ({"values": "float8"}, "values 'float8' is unknown"),
    ({"container": "parquet"}, "--format 'parquet' is unknown"),
    ({"dtype": "half"}, "--dtype 'half' is unknown"),
    ({"device": "warp:1"}, "--device warp:1 cannot be used"),
    ({"batch_size": 0}, "--batch-size is 0"),
    ({"views": 0}, "--views is 0"),
    ({"records_per_shard": 0}, "--records-per-shard is 0"),
    ({"teacher": 3}, "teacher is a int"),
    ({"teacher_args": {"a": 1}}, "teacher_args and teacher_weights go with a teacher SPEC"),
    ({"data_args": {"a": 1}}, "data_args go with a data SPEC"),
])
def test_an_option_that_cannot_be_is_one_line(dump: Dump, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        dump(**options)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_names_of_later_versions_are_not_built(dump: Dump) -> None:
    for options in ({"kind": "sampled"}, {"like": "other"}):
        with pytest.raises(NotBuilt):
            dump(**options)


def test_another_cache_at_the_place_is_refused_with_the_fields(dump: Dump, tmp_path: Path) -> None:
    dump(k=4)
    before = files(tmp_path / "c")
    with pytest.raises(SpecMismatch, match=r"spec\.tiers.*\[4\].*\[5\]"):
        dump(k=5)
    with pytest.raises(IdentityMismatch, match=r"teacher\.weights"):
        dump(k=4, teacher=mlp(seed=1))
    other = Points()
    other.x[0] += 1
    with pytest.raises(IdentityMismatch, match=r"data\.probe"):
        dump(k=4, data=other)
    other.revision = "2"
    with pytest.raises(IdentityMismatch, match=r"data\.probe"):
        dump(k=4, data=other, accept=["data.revision"])
    assert files(tmp_path / "c") == before


def test_a_difference_that_is_accepted_continues_the_cache(dump: Dump, tmp_path: Path) -> None:
    dump(k=4)
    renamed = Points()
    renamed.name = "dots"
    assert dump(k=4, data=renamed, accept=["data.name"]).already_complete


def test_a_random_transform_of_its_own_is_refused(dump: Dump) -> None:
    class Shaky(Points):
        rng = np.random.default_rng()

        def __getitem__(self, i: int) -> Any:
            return self.x[i] + float(self.rng.normal()), self.y[i]

    with pytest.raises(DataError, match="a random transform with its own generator"):
        dump(data=Shaky())


@pytest.mark.parametrize("label", [CLASSES, -2, -101])
def test_a_label_out_of_range_names_its_sample(dump: Dump, tmp_path: Path, label: int) -> None:
    data = Points()
    data.y[33] = label
    with pytest.raises(DataError, match=f"sample 33, view 0: its label is {label}.*expected 0 to 11"):
        dump(data=data, records_per_shard=10)
    with kdcache.open(tmp_path / "c", allow_partial=True) as cache:
        assert cache.missing() == [3, 4]
    assert dump(data=data, records_per_shard=10, labels=False, out=tmp_path / "unlabelled").complete


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "NaN"), (float("inf"), r"\+inf")])
def test_a_bad_logit_names_the_record_and_the_cache_can_be_continued(
        dump: Dump, tmp_path: Path, value: float, said: str) -> None:
    data, net = Points(), mlp()
    net.register_buffer("x", data.x[27])                    # so that the weights have one digest in both runs
    broken = Broken(net, data.x[27], value)
    with pytest.raises(DataError, match=f"sample 27, view 0: the teacher returned {said}.*at this sample") as caught:
        dump(teacher=broken, data=data, records_per_shard=10, batch_size=4)
    assert "\n" not in str(caught.value)
    broken.value = 0.5
    report = dump(teacher=broken, data=data, records_per_shard=10, batch_size=4)
    assert report.complete and report.shards_written == 3


def test_labels_of_another_order_are_a_named_warning(dump: Dump, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        report = dump(data=Points(shift=1))
    assert [code for code, _ in report.warnings] == [LABELS_DISAGREE] == ["labels-disagree"]
    assert "labels and teacher disagree" in caplog.text and report.accuracy == 0.0


def test_views_that_are_all_the_same_are_a_named_warning(dump: Dump) -> None:
    said: list[str] = []
    report = dump(views=2, dry_run=True, say=said.append)
    assert [code for code, _ in report.warnings] == ["views-equal"] and "leave out --views" in said[-1]

    class Global(Points):               # random without view(): from the generators that are seeded for it
        def __getitem__(self, i: int) -> Any:
            return self.x[i] + torch.randn(WIDTH), self.y[i]

    for data in (Noisy(), Global()):
        assert dump(data=data, views=2, dry_run=True).warnings == ()
    report = dump(data=Points(shift=1), views=2)
    assert [code for code, _ in report.warnings] == ["views-equal", LABELS_DISAGREE]


def test_what_is_asked_for_and_cannot_be_is_refused(dump: Dump, tmp_path: Path) -> None:
    class Bare(Points):
        def __getitem__(self, i: int) -> Any:
            return self.x[i], None

    with pytest.raises(UsageError, match="--labels: the data has none"):
        dump(data=Bare(), labels=True)
    with pytest.raises(UsageError, match="--labels is foreign to kind none"):
        dump(kind="none", features=["0"], labels=True)
    with pytest.raises(UsageError, match=r"--accept data\.nmae: no such field .*did you mean 'data\.name'"):
        dump(accept=["data.nmae"])
    with pytest.raises(UsageError, match="views with seed 4; the seed here is 0"):
        dump(data=Samples(Points(), seed=4))
    assert not (tmp_path / "c").exists()
    dump(data=Bare())
    with kdcache.open(tmp_path / "c") as cache:
        assert cache.spec.labels == 0


def test_few_labels_of_many_classes_are_no_warning(dump: Dump) -> None:
    assert dump(teacher=mlp(200), data=Points(classes=200, shift=1)).warnings == ()


def test_data_that_changes_its_shape_is_named(dump: Dump) -> None:
    class Sometimes(Points):
        def __getitem__(self, i: int) -> Any:
            return (self.x[i], self.y[i]) if i != 31 else (self.x[i], None)

    with pytest.raises(DataError, match=r"no label|no labels"):
        dump(data=Sometimes(), batch_size=8)


def test_progress_counts_every_record_once(dump: Dump) -> None:
    seen: list[Progress] = []
    report = dump(k=3, batch_size=8, progress=seen.append)
    assert seen[-1].records == seen[-1].total == 50 and seen[-1].bytes == report.bytes
    assert [p.records for p in seen] == sorted(p.records for p in seen) and len(seen) == 7
    assert seen[-1].covered_mass == report.covered_mass and seen[-1].accuracy == report.accuracy == 1.0
