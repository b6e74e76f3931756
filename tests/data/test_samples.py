"""Samples and views: pure in (seed, view, sample_id), global generators untouched, unusable data
refused by name.
"""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from kdcache.data.arrays import npz
from kdcache.data.collate import collate, read_batch
from kdcache.data.identify import identify, probe_ids
from kdcache.data.keys import check_same_key, sample_key
from kdcache.data.padding import Padding
from kdcache.data.samples import Samples
from kdcache.data.views import view_rng
from kdcache.errors import DataError, UsageError


class Listed:
    """A dataset of the given items."""

    name = "listed"

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


class Noisy(Listed):
    """Draws from all three global generators, as torchvision's transforms and users' own do."""

    def __getitem__(self, i):
        return torch.tensor([i, random.random(), np.random.rand(), torch.rand(()).item()]), i % 3


class Viewed(Listed):
    """Views by the generator it is given; the plain item is the sample itself."""

    def view(self, sample_id, view, rng):
        x, y = self.items[sample_id]
        return x + torch.from_numpy(rng.normal(size=x.shape)), y


def pair(i, n=2):
    return torch.full((n,), float(i), dtype=torch.float64), i


def test_a_seeded_item_is_a_function_of_seed_view_and_sample():
    samples, again = Samples(Noisy(range(5)), seed=3), Samples(Noisy(range(5)), seed=3)
    wanted = {(i, v): samples.item(i, v).inputs for i in range(5) for v in range(2)}
    torch.rand(7)
    random.random()
    for i, v in reversed(list(wanted)):
        assert torch.equal(again.item(i, v).inputs, wanted[i, v])
    drawn = torch.stack(list(wanted.values()))[:, 1:]
    assert len(drawn.unique(dim=0)) == len(wanted) and len(drawn.unique()) == drawn.numel()
    assert not torch.equal(Samples(Noisy(range(5)), seed=4).item(0, 0).inputs, wanted[0, 0])


def test_the_global_generators_are_put_back_even_after_an_error():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    wanted = random.random(), np.random.rand(), torch.rand(())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    Samples(Noisy(range(5))).item(2, 1)
    with pytest.raises(
        DataError,
        match=r"dataset listed, sample 1 cannot be read: IndexError: .*\(test_samples",
    ):
        broken = Listed([pair(0)])
        broken.__class__ = type("Longer", (Listed,), {"__len__": lambda self: 2})
        Samples(broken).item(1, 0)
    assert (random.random(), np.random.rand(), torch.rand(())) == wanted


def test_threads_do_not_mix_their_seeds():
    samples = Samples(Noisy(range(40)))
    wanted = [samples.item(i, 0).inputs for i in range(40)]
    found = {}

    def read(ids):
        for i in ids:
            found[i] = samples.item(i, 0).inputs

    threads = [threading.Thread(target=read, args=(range(start, 40, 4),)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], wanted[i]) for i in range(40))


def test_a_view_gets_the_generator_of_its_numbers():
    samples = Samples(Viewed([pair(0), pair(1)]), seed=9)
    item = samples.item(1, 4)
    rng = np.random.Generator(np.random.Philox(key=9, counter=[0, 0, 4, 1]))
    assert np.array_equal(item.inputs.numpy(), 1.0 + rng.normal(size=2))
    assert np.array_equal(
        view_rng(9, 4, 1).integers(99, size=4),
        np.random.Generator(np.random.Philox(key=9, counter=[0, 0, 4, 1])).integers(99, size=4),
    )


def test_which_key_a_record_has():
    plain = Samples(Listed([pair(0), pair(1)]))
    assert (
        plain.item(1).sample_key
        == plain.sample_key(1)
        == sample_key({"input": pair(1)[0], "label": 1})
    )
    assert plain.item(1).view_key is None and not plain.has_view_keys

    noisy = Samples(Noisy(range(2)))
    # of that record's own item
    assert noisy.item(1, 0).sample_key != noisy.item(1, 1).sample_key

    viewed = Samples(Viewed([pair(0), pair(1)]))
    one, two = viewed.item(1, 0), viewed.item(1, 1)
    # of the unaugmented sample
    assert one.sample_key == two.sample_key == viewed.sample_key(1) == plain.sample_key(1)
    assert (
        viewed.has_view_keys and one.view_key == sample_key({"input": one.inputs}) != two.view_key
    )

    own = Listed([pair(0), pair(1)])
    own.key = lambda i: f"{i + 10:016x}"
    assert Samples(own).item(1).sample_key == 11 == Samples(own).sample_key(1)
    assert Samples(own).item(1).view_key == sample_key({"input": pair(1)[0]})


def test_labels_weights_and_document_starts_are_kept_apart_from_inputs():
    item = Samples(
        Listed(
            [
                {
                    "input_ids": [1, 2, 3],
                    "labels": np.array([-100, 2, 3], np.int32),
                    "label_weight": [0.5, 1.0],
                    "document_start": [1, 0, 0],
                    "skipped": None,
                }
            ]
        )
    ).item(0)
    assert item.inputs.keys() == {"input_ids"} and item.inputs["input_ids"].tolist() == [1, 2, 3]
    assert item.labels.dtype == torch.int64 and item.labels.tolist() == [-100, 2, 3]
    assert item.label_weight.dtype == torch.float32 and item.document_start.dtype == torch.uint8
    assert Samples(Listed([(np.zeros(2, np.float32), None)])).item(0).labels is None
    assert Samples(Listed([({"x": 1}["x"], np.uint8(200))])).item(0).labels.item() == 200
    assert Samples(Listed([{"x": [1.0], "label": 2}])).item(0).labels.item() == 2


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64"])
def test_ids_of_every_width_go_through_an_embedding(tmp_path, dtype):
    """With the key and the answer that the same numbers of 64 bits have: of numpy, torch, .npz, and
    a collate_fn.
    """
    ids = np.array([[1, 2, 99], [7, 0, 3]])
    embed = torch.nn.Embedding(100, 4)
    wanted = read_batch(Samples(Listed([{"input_ids": one} for one in ids])), [(0, 0), (1, 0)])
    np.savez(tmp_path / "a.npz", input_ids=ids.astype(dtype), labels=np.arange(2, dtype=dtype))
    collated = Listed([{"input_ids": one} for one in ids.astype(dtype)])
    collated.collate_fn = lambda items: {
        "input_ids": torch.from_numpy(np.stack([one["input_ids"] for one in items]))
    }
    for data in (
        Listed([{"input_ids": one} for one in ids.astype(dtype)]),
        collated,
        npz(f"{tmp_path}/a.npz"),
        Listed([{"input_ids": torch.from_numpy(one)} for one in ids.astype(dtype)]),
    ):
        batch = read_batch(Samples(data), [(0, 0), (1, 0)])
        assert torch.equal(embed(batch.inputs["input_ids"]), embed(wanted.inputs["input_ids"]))
        assert [one.tolist() for one in batch.tokens] == ids.tolist()
        if "labels" not in getattr(data, "tensors", {}):
            assert (batch.sample_key == wanted.sample_key).all()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((torch.zeros(2), 0.5), "sample 0: its label is 0.5 of float64; expected a class index"),
        ((torch.zeros(2), torch.tensor([0.1, 0.9])), "expected a class index"),
        ((torch.zeros(2), "cat"), "'label' is a str"),
        (("some text", 1), "'input' is a str; a model needs tensors"),
        ((torch.zeros(2), 1, 2), "an item is 3 values"),
        ({"labels": 1}, "has no input"),
        ({"x": [1], "labels": 1, "label": 1}, "both 'label' and 'labels'"),
        ((object(), 1), "'input' is a object"),
    ],
)
def test_unusable_items_are_refused_by_sample(item, message):
    with pytest.raises(DataError, match="dataset listed, sample 0: ") as caught:
        Samples(Listed([item])).item(0)
    assert message in str(caught.value)


UNREAD = {
    "boxes": [{"box": [1, 2, 3, 4], "kind": "cat"}],
    "a text": "what was said",
    "scores": torch.rand(3),
    "words": ["a", "b"],
    "a picture": Image.new("L", (3, 2)),
    "a number": 0.5,
    "a class": 3,
}


@pytest.mark.parametrize("name", UNREAD)
def test_labels_that_are_not_wanted_are_not_looked_at(name):
    """Their key is that of the samples that read them, or, where a label has no bytes to hash, of
    those without one.
    """
    x, label = torch.arange(4.0), UNREAD[name]
    for raw in ((x, label), {"values": x, "labels": label, "label_weight": object()}):
        item = Samples(Listed([raw]), labels=False).item(0)
        assert item.labels is None and item.label_weight is None
        inputs = item.inputs if isinstance(raw, tuple) else item.inputs["values"]
        assert torch.equal(inputs, x)
        hashed = (
            {}
            if name in ("boxes", "words")
            else {"label" if isinstance(raw, tuple) else "labels": label}
        )
        assert item.sample_key == sample_key(
            {"input" if isinstance(raw, tuple) else "values": x, **hashed}
        )
        collated = collate([item, item])
        assert collated.labels is None and collated.label_weight is None
        listed = Listed([raw])
        listed.collate_fn = lambda items: {"values": torch.stack([x, x]), "labels": [label] * 2}
        assert read_batch(Samples(listed, labels=False), [(0, 0), (0, 0)]).labels is None
    if name != "a class":
        with pytest.raises(DataError):
            Samples(Listed([(x, label)])).item(0)


def test_labels_that_are_not_wanted_still_make_the_inputs_of_a_decoder():
    items = [{"input_ids": torch.arange(3), "labels": torch.arange(4 + i)} for i in range(2)]
    made = []
    for labels in (True, False):
        samples = Samples(Listed(items), labels=labels)
        samples.padding = Padding(0, decoder_start=7)
        made.append(read_batch(samples, [(0, 0), (1, 0)]).inputs["decoder_input_ids"])
    assert torch.equal(*made) and made[0].tolist() == [[7, 0, 1, 2, 0], [7, 0, 1, 2, 3]]


def test_labels_that_are_not_wanted_still_mask_tokens():
    ids, mask = torch.arange(5), torch.tensor([-100, -100, 2, 3, 4])
    item = Samples(Listed([{"input_ids": ids, "labels": mask}]), labels=False).item(0)
    assert torch.equal(item.labels, mask)
    for other in (torch.tensor(1), torch.arange(4), torch.rand(5), "said"):
        assert (
            Samples(Listed([{"input_ids": ids, "labels": other}]), labels=False).item(0).labels
            is None
        )


def test_unusable_datasets_are_refused():
    class Stream(IterableDataset):
        name = "stream"

        def __iter__(self):
            return iter(())

    class NoLength(Dataset):
        def __getitem__(self, i):
            return pair(i)

    with pytest.raises(DataError, match="dataset listed has length 0"):
        Samples(Listed([]))
    with pytest.raises(UsageError, match="dataset stream has no __len__"):
        Samples(Stream())
    with pytest.raises(UsageError, match="dataset NoLength has no __len__"):
        Samples(NoLength())
    with pytest.raises(UsageError, match="dataset int has no __len__ and no __getitem__"):
        Samples(5)
    with pytest.raises(UsageError, match=r"has no sample 2; expected 0\.\.1"):
        Samples(Listed([pair(0), pair(1)])).item(2)
    with pytest.raises(UsageError, match="seed is -1"):
        Samples(Listed([pair(0)]), seed=-1)


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 1000, 10**9])
def test_the_probe_is_spread_evenly(n):
    ids = probe_ids(n)
    assert len(ids) == min(n, 256) == len(set(ids)) and ids[0] == 0 and ids[-1] == n - 1
    steps = np.diff(ids)
    assert n == 1 or steps.max() - steps.min() <= 1


def test_identity_names_the_data():
    dataset = Listed([pair(i) for i in range(300)])
    dataset.revision, dataset.class_names, dataset.window = 7, ("a", "b"), 16
    dataset.tokenizer_identity = {"fingerprint": "f", "template": "", "packing": "p"}
    data, tokenizer = identify(Samples(dataset))
    assert data | {"probe": 0} == {
        "name": "listed",
        "revision": "7",
        "num_samples": 300,
        "class_names": ["a", "b"],
        "window": 16,
        "inputs": ["input"],
        "probe": 0,
    }
    assert tokenizer == dataset.tokenizer_identity
    assert data["probe"] == [
        f"{sample_key({'input': pair(i)[0], 'label': i}):016x}" for i in probe_ids(300)
    ]
    shuffled = identify(Samples(Listed(dataset.items[::-1])))[0]
    assert shuffled["probe"] != data["probe"]


@pytest.mark.parametrize("with_view", [False, True])
def test_a_generator_of_its_own_is_found(with_view):
    class Private(Listed):
        rng = np.random.default_rng(0)

        def __getitem__(self, i):
            return pair(i) if with_view else (self.rng.random(2), i)

    if with_view:
        Private.view = lambda self, sample_id, view, rng: (self.rng.random(2), sample_id)
    with pytest.raises(
        DataError, match=r"answered differently when sample 9 .*its own generator\?"
    ):
        identify(Samples(Private(range(10))))
    identify(Samples(Noisy(range(10))))  # the global generators are fine


def test_an_item_that_depends_on_the_order_of_reading_is_found():
    class Counting(Listed):
        last = -1

        def __getitem__(self, i):
            x = torch.tensor([float(i > self.last)])
            self.last = i
            return x, 0

    with pytest.raises(DataError, match="answered differently"):
        identify(Samples(Counting(range(4))))


def test_a_key_that_differs_names_the_sample():
    keys = np.array([1, 2**63, 3], np.uint64)
    check_same_key(keys, keys.copy(), np.array([5, 6, 7]))
    with pytest.raises(
        DataError,
        match=r"sample 6: sample_key in the cache is 8000000000000000, the data gives 0{15}9 "
        r"\(1 of 3 records",
    ):
        check_same_key(keys, np.array([1, 9, 3], np.uint64), np.array([5, 6, 7]))
