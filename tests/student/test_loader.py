"""The loader: order, views, columns read, keys, rows, workers, the thread behind it."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from student_world import CLASSES, VOCABULARY, Net, Points, TinyLM, Windows, write_cache
from test_order import plain_sample

import kdcache
from kdcache.cache.codec import encode_rows
from kdcache.cache.identity import Identity
from kdcache.cache.rows import Rows
from kdcache.cache.spec import CacheSpec, FeatureSpec
from kdcache.data.reading import Prefetch
from kdcache.data.samples import Samples
from kdcache.errors import DataError, NotBuilt, UsageError
from kdcache.student import order
from kdcache.student.batch import needed_columns
from kdcache.student.loader import Loader
from kdcache.student.order import Order
from kdcache.student.train import train_student


class Noisy(Points):
    """Items draw from torch's own generator: views differ."""

    pure_items = False

    def __getitem__(self, i: int) -> Any:
        return self.x[i] + torch.randn(self.x.shape[1]), self.y[i]


class Viewed(Points):
    """Views by the dataset itself; the key is of the plain item."""

    scale = 1.0

    def view(self, sample_id: int, view: int, rng: np.random.Generator) -> Any:
        noise = torch.from_numpy(rng.normal(size=self.x.shape[1]).astype(np.float32))
        return self.scale * (self.x[sample_id] + noise), self.y[sample_id]


class Keyed(Points):
    """Keys of its own, so that they know nothing of the labels."""

    def key(self, i: int) -> int:
        return i * 1000


def prefetch_threads() -> int:
    return sum(thread.name == "kdcache-prefetch" for thread in threading.enumerate())


def test_targets_labels_and_inputs_are_those_of_the_samples(tmp_path: Path) -> None:
    data, teacher = Points(40), Net(32, seed=7)
    cache = write_cache(tmp_path / "cache", data, teacher)
    loader = Loader(cache, data, batch_size=7, temperature=3.0, seed=4)
    assert len(loader) == 6
    for batch in loader:
        ids = batch["sample_ids"]
        assert torch.equal(batch["inputs"], data.x[ids]) and torch.equal(
            batch["labels"], data.y[ids]
        )
        expected = torch.log_softmax(teacher(data.x[ids]).double() / 3, -1)
        torch.testing.assert_close(
            batch["targets"].log_probs_NK.double(), expected, atol=1e-5, rtol=0
        )
        assert (
            batch["targets"].temperature == 3.0
            and batch["rows"] is None
            and batch["views"].unique().tolist() == [0]
        )
    assert [b["epoch"] for b in Loader(cache, data, batch_size=40, epochs=3)] == [0, 1, 2]


def test_a_loader_continues_at_any_position(tmp_path: Path) -> None:
    data = Points(40)
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7))
    whole = list(Loader(cache, data, batch_size=7, epochs=2))
    for cut in (1, 5, 9):
        rest = list(Loader(cache, data, batch_size=7, epochs=2, start=whole[cut - 1]["position"]))
        assert len(rest) == len(whole) - cut
        for a, b in zip(whole[cut:], rest, strict=True):
            assert torch.equal(a["sample_ids"], b["sample_ids"]) and a["position"] == b["position"]
            assert torch.equal(a["targets"].log_probs_NK, b["targets"].log_probs_NK)
    with pytest.raises(UsageError, match="start is 81; expected a position from 0 to 80"):
        Loader(cache, data, batch_size=7, epochs=2, start=81)


def test_of_a_part_of_samples_and_views_each_record_is_its_own(tmp_path: Path) -> None:
    """12 of 20 samples, views 2 and 3 of them, in 3 shards a view: docs/order.md in plain integers."""
    data, rng = Points(20, classes=3), np.random.default_rng(0)
    said = {
        (view, i): rng.normal(size=3).astype(np.float32) for view in (2, 3) for i in range(5, 17)
    }
    spec = CacheSpec(
        kind="full",
        num_classes=3,
        samples=(5, 17),
        views=(2, 4),
        records_per_shard=5,
        values="float32",
    )
    keys = Samples(data)
    with kdcache.create(tmp_path / "cache", spec, Identity(data={}, teacher={})) as writer:
        for shard in range(6):
            view, ids = 2 + shard // 3, range(5 + shard % 3 * 5, min(10 + shard % 3 * 5, 17))
            rows = Rows(logits=np.stack([said[view, i] for i in ids]))
            writer.write(
                shard,
                {
                    "sample_key": np.array([keys.sample_key(i) for i in ids], np.uint64),
                    **encode_rows(spec, rows).columns,
                },
            )
    seen = 0
    for batch in Loader(tmp_path / "cache", data, batch_size=4, epochs=3, seed=3, temperature=1.0):
        ids = [5 + plain_sample(12, 3, position) for position in range(seen, seen + 4)]
        views = [2 + position // 12 % 2 for position in range(seen, seen + 4)]
        assert (batch["sample_ids"].tolist(), batch["views"].tolist()) == (ids, views)
        stored = torch.stack(
            [torch.from_numpy(said[record]) for record in zip(views, ids, strict=True)]
        )
        assert batch["targets"] is not None and torch.equal(batch["inputs"], data.x[ids])
        assert torch.equal(batch["targets"].log_probs_NK, torch.log_softmax(stored, -1))
        seen += 4
    assert seen == 36


def test_a_step_ends_where_the_steps_of_the_whole_run_end() -> None:
    """Also when it is gone on with inside of a step, which an earlier batch size may have left."""
    loader = Loader(None, Points(21), batch_size=8, micro_batch_size=3, epochs=2, start=11)
    steps = list(loader.global_batches())
    assert [(step.step, step.start, step.stop) for step in steps] == [
        (1, 11, 16),
        (2, 16, 24),
        (3, 24, 32),
        (4, 32, 40),
        (5, 40, 42),
    ]
    assert [sum(step.counts) for step in steps] == [5, 8, 8, 8, 2]
    (alone,) = Loader(None, Points(1), batch_size=8)
    assert alone["position"] == 1


def test_epoch_e_uses_view_e_modulo_the_views(tmp_path: Path) -> None:
    data, teacher = Viewed(20), Net(32, seed=7)
    cache = write_cache(tmp_path / "cache", data, teacher, views=2, seed=11, view_keys=True)
    samples = Samples(data, seed=11)
    seen = []
    for batch in Loader(cache, data, batch_size=20, epochs=3, temperature=1):
        view = int(batch["views"][0])
        seen.append(view)
        x = torch.stack([samples.item(i, view).inputs for i in batch["sample_ids"].tolist()])
        assert torch.equal(batch["inputs"], x)
        torch.testing.assert_close(
            batch["targets"].log_probs_NK, torch.log_softmax(teacher(x), -1), atol=1e-5, rtol=0
        )
    assert seen == [0, 1, 0]
    assert [int(b["views"][0]) for b in Loader(None, data, batch_size=20, epochs=3)] == [0, 1, 2]


def test_views_decoded_otherwise_are_refused_and_can_be_accepted_by_name(tmp_path: Path) -> None:
    data = Viewed(20)
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7), view_keys=True)
    data.scale = 1.5
    with pytest.raises(DataError, match=r"(?s)view_key in the cache is .*--accept view_key"):
        next(iter(Loader(cache, data, batch_size=4)))
    assert len(list(Loader(cache, data, batch_size=4, accept=["view_key"]))) == 5
    with pytest.raises(DataError, match="has view keys, the data gives none"):
        next(iter(Loader(cache, Points(20), batch_size=4)))


@pytest.mark.parametrize("other", ["shuffled", "other"])
def test_a_sample_that_the_teacher_did_not_see_is_named(tmp_path: Path, other: str) -> None:
    data = Points(40)
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7))
    changed = Points(40, seed=0 if other == "shuffled" else 1)
    if other == "shuffled":
        changed.x[[11, 12]], changed.y[[11, 12]] = data.x[[12, 11]], data.y[[12, 11]]
    loader = iter(Loader(cache, changed, batch_size=10, shuffle=False))
    if other == "shuffled":
        next(loader)  # samples 0 to 9 are as they were
    sample = 11 if other == "shuffled" else 0
    with pytest.raises(
        DataError, match=rf"sample {sample}: sample_key in the cache.*record {sample} of the cache"
    ):
        next(loader)
    assert prefetch_threads() == 0


def test_windows_tokenised_otherwise_are_caught(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", Windows(24), TinyLM(seed=3))
    changed = Windows(24)
    changed.items[5][0][1] += 1
    with pytest.raises(DataError, match="sample 5: sample_key"):
        list(Loader(cache, changed, batch_size=4, shuffle=False))


def test_an_answer_beyond_the_tokens_of_the_data_is_refused(tmp_path: Path) -> None:
    """Where keys do not tell, because the dataset gives its own."""

    class Named(Windows):
        def key(self, i: int) -> int:
            return i

    data = Named(12, equal=True)
    cache = write_cache(
        tmp_path / "cache", data, TinyLM(16, seed=3), kind="topk", tiers=(4,), labels=False
    )
    data.items[3] = tuple(part[:-1] for part in data.items[3])
    with pytest.raises(
        DataError, match=r"sample 3: the teacher answered at position 7, the data has 8 tokens"
    ):
        list(Loader(cache, data, batch_size=12))


def test_labels_in_another_order_are_refused(tmp_path: Path) -> None:
    data = Keyed(30)
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7), view_keys=True)
    list(Loader(cache, data, batch_size=10))
    before, data.y = data.y, CLASSES - 1 - data.y
    with pytest.raises(
        DataError,
        match=r"sample \d+: its label is \d in the cache and \d in the data.*another order",
    ):
        list(Loader(cache, data, batch_size=10))
    data.y = before + CLASSES
    with pytest.raises(DataError, match=rf"its label is \d+; expected 0 to {CLASSES - 1}"):
        list(Loader(None, data, batch_size=10, num_classes=CLASSES))


def test_token_caches_give_inputs_without_a_dataset(tmp_path: Path) -> None:
    data = Windows(24)
    cache = write_cache(
        tmp_path / "cache", data, TinyLM(seed=3), tokens=True, kind="topk", tiers=(4,)
    )
    from_tokens = list(Loader(cache, batch_size=5, seed=1))
    from_data = list(Loader(cache, data, batch_size=5, seed=1))
    for a, b in zip(from_tokens, from_data, strict=True):
        assert a["inputs"].keys() == b["inputs"].keys()
        assert all(torch.equal(a["inputs"][name], b["inputs"][name]) for name in a["inputs"])
        record_N, position_N = a["rows"]
        assert torch.equal(a["labels"], a["inputs"]["input_ids"][record_N, position_N + 1])
        assert torch.equal(a["labels"], b["labels"]) and len(a["targets"]) == len(a["labels"])
    plain = list(Loader(None, data, batch_size=5, seed=1))
    for a, b in zip(from_data, plain, strict=True):  # the data's own rows are the cache's
        assert torch.equal(torch.stack(a["rows"]), torch.stack(b["rows"])) and torch.equal(
            a["labels"], b["labels"]
        )
    classes = write_cache(tmp_path / "points", Points(20), Net(seed=7))
    with pytest.raises(UsageError, match=r"holds no tokens.*--data"):
        Loader(classes, batch_size=4)


def test_workers_change_nothing(tmp_path: Path) -> None:
    data = Noisy(30)
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7), views=2)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    runs = [
        list(Loader(cache, data, batch_size=8, epochs=2, workers=workers)) for workers in (0, 2)
    ]
    # neither this process's items nor a DataLoader drew from it
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a["inputs"], b["inputs"]) and torch.equal(
            a["sample_ids"], b["sample_ids"]
        )
    data.y = data.y[:20]  # a worker's error is one line too
    with pytest.raises(
        DataError, match=r"dataset points, sample 2\d cannot be read: IndexError"
    ) as caught:
        list(Loader(cache, data, batch_size=8, workers=2))
    assert "Traceback" not in str(caught.value)
    assert not multiprocessing.active_children()


def test_only_the_columns_of_the_tier_are_read() -> None:
    spec = CacheSpec(
        kind="topk",
        num_classes=70_000,
        samples=(0, 4),
        records_per_shard=4,
        tiers=(2, 8),
        values="uint8",
        temperatures=("1",),
        labels=1,
        moments=True,
        row_weights=True,
        view_keys=True,
        rows="ragged",
        tokens=True,
        features=(
            FeatureSpec(name="a", module="a", recipe="raw", dtype="int8", shape=(3,)),
            FeatureSpec(name="b", module="b", recipe="raw", dtype="float32", shape=(3,)),
        ),
    )
    always = {"sample_key", "view_key", "label", "pos"}
    rows = {"max", "step", "weight", "tail_lse", "label_logit", "ids_2", "ids_2_high", "values_2"}
    read = needed_columns(spec, targets=True, k=2, features=spec.features[:1], tokens=False)
    assert set(read) == always | rows | {"feature_a", "feature_a_scale"}
    assert set(needed_columns(spec, targets=False, k=None, features=(), tokens=True)) == always | {
        "token",
        "document_start",
    }
    assert "ids_8" in needed_columns(spec, targets=True, k=None, features=(), tokens=False)


def test_features_by_name(tmp_path: Path) -> None:
    data, teacher = Points(20), Net(32, seed=7)
    feature = FeatureSpec(name="body", module="body", recipe="raw", dtype="float32", shape=(32,))
    cache = write_cache(tmp_path / "cache", data, teacher, features=[feature])
    for batch in Loader(cache, data, batch_size=6, features=["body"]):
        expected = teacher.body(data.x[batch["sample_ids"]])
        torch.testing.assert_close(batch["features"]["body"], expected, atol=1e-5, rtol=0)
    with pytest.raises(UsageError, match=r"no feature 'boddy' .did you mean 'body'"):
        Loader(cache, data, batch_size=6, features=["boddy"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 3}, "temperature 3 was not stored in the cache; stored: 1, 2"),
        ({"k": 2}, "k is 2, which is no tier of the cache; tiers: 3, 5"),
        ({"epochs": 1, "max_steps": 2}, "give one of them"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"epochs": 0.001}, "less than one"),
        ({"batch_size": 0}, "batch size 0"),
        ({"micro_batch_size": 9}, "micro-batch"),
    ],
)
def test_what_cannot_be_is_refused_before_a_batch(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    data = Points(20)
    cache = write_cache(tmp_path / "cache", data, Net(8, seed=7), kind="topk", tiers=(3, 5))
    with pytest.raises(UsageError, match=message):
        Loader(cache, data, **{"batch_size": 4, **options})
    with pytest.raises(UsageError, match="neither a cache nor data"):
        Loader(batch_size=4)
    with pytest.raises(UsageError, match="has 10 samples; the cache is about samples 0 to 19"):
        Loader(cache, Points(10), batch_size=4)


def test_a_live_teacher_takes_the_place_of_the_rows(tmp_path: Path) -> None:
    data, teacher = Windows(16), TinyLM(16, seed=3)
    cache = write_cache(
        tmp_path / "cache", data, teacher, kind="topk", tiers=(4, VOCABULARY), labels=False
    )
    for cached, live in zip(
        Loader(cache, data, batch_size=16, k=4, temperature=2, shuffle=False),
        Loader(
            cache,
            data,
            batch_size=16,
            k=4,
            temperature=2,
            shuffle=False,
            live_teacher=teacher.train(),
        ),
        strict=True,
    ):
        assert torch.equal(cached["targets"].ids_NK, live["targets"].ids_NK)
        assert torch.equal(cached["targets"].log_probs_NK, live["targets"].log_probs_NK)
        assert torch.equal(cached["targets"].log_tail_N, live["targets"].log_tail_N)
    assert not teacher.training and not live["targets"].log_probs_NK.requires_grad


# ---- the thread
# ---------------------------------------------------------------------------------------------------


def test_leaving_a_loop_early_stops_the_threads(tmp_path: Path) -> None:
    data = Points(40)
    cache = write_cache(tmp_path / "cache", data, Net(8, seed=7))
    batches = iter(Loader(cache, data, batch_size=2))
    next(batches)
    assert prefetch_threads() == 1
    batches.close()
    assert prefetch_threads() == 0


def test_prefetch_is_bounded_ordered_and_raises_in_turn() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for i in range(10):
            made.append(i)
            yield i
        raise ZeroDivisionError("after the tenth")

    ahead = Prefetch(source(), depth=2)
    assert next(ahead) == 0
    for _ in range(1000):
        # one taken, two waiting, one in the thread's hand
        if len(made) == 4:
            break
        threading.Event().wait(0.001)
    threading.Event().wait(0.02)
    assert len(made) == 4
    got: list[int] = []
    with pytest.raises(ZeroDivisionError, match="after the tenth"):
        got.extend(iter(lambda: next(ahead), None))
    with pytest.raises(StopIteration):
        next(ahead)
    assert made == list(range(10)) and prefetch_threads() == 0


@pytest.mark.parametrize("block", [1, 7, 16, 1000])
@pytest.mark.parametrize("start", [0, 5, 33])
def test_the_order_is_the_same_however_many_positions_are_asked_at_once(
    monkeypatch: pytest.MonkeyPatch, block: int, start: int
) -> None:
    monkeypatch.setattr(order, "BLOCK", block)
    loader = Loader(None, Points(21), batch_size=8, micro_batch_size=3, epochs=3, start=start)
    indices = list(loader.indices())
    epochs, samples = Order(21, 0).sample(np.arange(start, 63))
    assert np.array_equal(np.concatenate([index.epochs for index in indices]), epochs)
    assert np.array_equal(np.concatenate([index.sample_ids for index in indices]), samples)


def seen(loader: Loader) -> list[int]:
    return torch.cat([batch["sample_ids"] for batch in loader]).tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_each_iteration_goes_on_to_the_next_epoch(tmp_path: Path, workers: int) -> None:
    """The passes of one loader are the epochs of another; 40 is no multiple of 7, and each pass
    begins a batch.
    """
    data = Viewed(40)
    cache = write_cache(tmp_path / "cache", data, Net(32, seed=7), views=2)
    whole = list(Loader(cache, data, batch_size=40, epochs=4))
    loader = Loader(cache, data, batch_size=7, workers=workers)
    for epoch in (0, 1, 2):
        batches = list(loader)
        assert [len(batch["sample_ids"]) for batch in batches] == [7, 7, 7, 7, 7, 5] and len(
            loader
        ) == 6
        assert {batch["epoch"] for batch in batches} == {epoch} and batches[-1]["position"] == 40
        for name in ("sample_ids", "views", "inputs", "labels"):
            assert torch.equal(torch.cat([b[name] for b in batches]), whole[epoch][name]), (
                epoch,
                name,
            )  # type: ignore[literal-required]
    loader.set_epoch(1)
    assert (
        seen(loader) == whole[1]["sample_ids"].tolist()
        and seen(loader) == whole[2]["sample_ids"].tolist()
    )
    first = iter(loader)
    # begun, or gone through
    assert next(first)["epoch"] == 3 and next(iter(loader))["epoch"] == 4
    with pytest.raises(UsageError, match="epoch is -1; expected at least 0"):
        loader.set_epoch(-1)


def test_passes_of_other_lengths_join(tmp_path: Path) -> None:
    """Of max_steps, of a part of an epoch, after a start: what one iteration leaves the next one
    begins with.
    """
    data = Points(40)
    whole = seen(Loader(None, data, batch_size=10, epochs=4, seed=3))
    for options in ({"max_steps": 3}, {"epochs": 0.75}, {"epochs": 1.5}):
        loader = Loader(None, data, batch_size=10, seed=3, **options)  # type: ignore[arg-type]
        passes = [seen(loader) for _ in range(2)]
        assert passes[0] + passes[1] == whole[: 2 * loader.total]
    continued = Loader(None, data, batch_size=10, seed=3, start=20)
    assert seen(continued) == whole[20:40] and seen(continued) == whole[40:80]


def test_a_loader_in_one_of_several_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each would see every sample; neither torchrun's environment nor a process group of torch's is
    passed over.
    """
    import torch.distributed as group

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        NotBuilt, match="WORLD_SIZE is 2: a Loader with several processes is not built yet"
    ):
        Loader(None, Points(8), batch_size=4)
    monkeypatch.delenv("WORLD_SIZE")
    group.init_process_group("gloo", store=group.HashStore(), rank=0, world_size=1)
    try:
        assert len(Loader(None, Points(8), batch_size=4)) == 2
        monkeypatch.setattr(group, "get_world_size", lambda: 2)
        with pytest.raises(NotBuilt, match="process group is 2: a Loader"):
            Loader(None, Points(8), batch_size=4)
        with pytest.raises(NotBuilt, match="process group is 2: training"):
            train_student(student=Net(8), data=Points(8), alpha=0, epochs=1, out=tmp_path / "run")
    finally:
        group.destroy_process_group()
