"""A micro-batch goes to the device in one copy that nothing waits for, bit for bit, and the rest of
a step is made there.

The meta device stands for a GPU: it has shapes and no values, and refuses whatever would read one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from student_world import BODY, Net, Points, TinyLM, Windows, settings_of, write_cache
from torch import Tensor
from waits import Crossings, NoHostTensorsThere

from kdcache.data.transfer import ALIGNMENT, pack, send, unpack
from kdcache.student import batch as batches
from kdcache.student.batch import to_device
from kdcache.student.head import WholeLogits
from kdcache.student.loader import Loader
from kdcache.student.optim import Schedule, make_optimizer, trainable
from kdcache.student.step import TrainStep

DTYPES = [
    torch.uint8,
    torch.bool,
    torch.int16,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
]


def bits(x: Tensor) -> list[int]:
    return torch.empty(x.shape, dtype=x.dtype).copy_(x).reshape(-1).view(torch.uint8).tolist()


@st.composite
def host_tensors(draw: st.DrawFn) -> Tensor:
    """Of any dtype and bits, empty or odd; as it is, transposed, expanded or of every other row."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 5), max_size=4))
    x = torch.zeros(shape, dtype=dtype)
    raw = x.reshape(-1).view(torch.uint8)
    high = 2 if dtype == torch.bool else 256
    raw.copy_(
        torch.tensor(
            draw(st.lists(st.integers(0, high - 1), min_size=raw.numel(), max_size=raw.numel())),
            dtype=torch.uint8,
        )
    )
    view = draw(st.sampled_from(["whole", "transposed", "expanded", "every other"]))
    if view == "transposed" and x.dim() > 1:
        return x.transpose(0, -1)
    if view == "expanded":
        return x[None].expand(3, *shape)
    return x[::2] if view == "every other" and x.dim() else x


@settings(max_examples=200, deadline=None)
@given(st.lists(host_tensors(), max_size=6))
def test_what_was_packed_comes_out_bit_for_bit(tensors: list[Tensor]) -> None:
    """As `.to(device)` gives them one by one: dtype, shape and strides too."""
    buffer, starts = pack(tensors)
    assert buffer.dtype == torch.uint8 and buffer.dim() == 1
    assert all(start % ALIGNMENT == 0 for start in starts)
    assert len(buffer) <= sum(x.numel() * x.element_size() + ALIGNMENT for x in tensors)
    for x, out in zip(tensors, unpack(buffer.clone(), starts, tensors), strict=True):
        one = x.to("meta")
        assert (out.dtype, out.shape, out.stride()) == (one.dtype, one.shape, one.stride())
        assert bits(out) == bits(x)


def test_a_write_into_one_field_is_no_change_of_another() -> None:
    """To autograd, which keeps an embedding's ids for the backward pass."""
    ids, mask = torch.tensor([0, 1, 1]), torch.ones(3)
    weight = torch.ones(2, 4, requires_grad=True)
    buffer, starts = pack([ids, mask])
    ids, mask = unpack(buffer, starts, [ids, mask])
    out = torch.nn.functional.embedding(ids, weight).sum(1)
    (out * mask.mul_(2).clone()).sum().backward()
    assert weight.grad is not None and weight.grad[:, 0].tolist() == [2.0, 4.0]
    assert mask.tolist() == [2.0, 2.0, 2.0] and ids.tolist() == [0, 1, 1]


def test_on_the_cpu_nothing_is_copied() -> None:
    fields = {"a": torch.arange(3), "b": torch.ones(2, 2)[:, 0]}
    assert all(send(fields, torch.device("cpu"))[name] is x for name, x in fields.items())


def test_what_is_not_plain_goes_by_itself() -> None:
    class Named(Tensor):
        pass

    fields = {
        "plain": torch.arange(3),
        "also": torch.ones(5),
        "sparse": torch.eye(3).to_sparse(),
        "subclass": torch.ones(2).as_subclass(Named),
        "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
    }
    with Crossings() as seen:
        sent = send(fields, torch.device("meta"))
    assert [x.dtype for x in seen.copies].count(torch.uint8) == 1 and len(seen.copies) == 4
    assert all(x.device.type == "meta" and x.shape == fields[n].shape for n, x in sent.items())
    assert sent["sparse"].layout == torch.sparse_coo and type(sent["subclass"]) is Named


def loaders(path: Path, device: str) -> dict[str, tuple[Loader, torch.nn.Module]]:
    """Of every kind of rows, with labels and weights, features, tokens, and none of them."""
    points, windows = Points(24), Windows(12)
    full = write_cache(path / "full", points, Net(32, seed=7), features=[BODY])
    top = write_cache(
        path / "top", points, Net(32, seed=7), kind="topk", tiers=(2, 4), values="uint8"
    )
    tokens = write_cache(
        path / "tokens", windows, TinyLM(16, seed=3), kind="topk", tiers=(5,), tokens=True
    )
    common: dict[str, Any] = {"batch_size": 8, "micro_batch_size": 3, "device": device}
    return {
        "full": (Loader(full, points, features=["body"], **common), Net(8, norm=True)),
        "topk": (Loader(top, points, k=2, **common), Net(8)),
        "tokens": (Loader(tokens, **common), Meta()),
        "tokens of data": (Loader(tokens, windows, **common), Meta()),
        "labels": (Loader(None, points, **common), Net(8)),
        "live": (Loader(None, points, live_teacher=Net(4), **common), Net(8)),
    }


class Meta(TinyLM):
    """`TinyLM`, whose positions are counted where its input is."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        count = torch.arange(1, x.shape[1] + 1, device=x.device)
        mean = x.cumsum(1) / count[:, None]
        return self.head(torch.tanh(self.mix(torch.cat([x, mean], -1))))


KINDS = ["full", "topk", "tokens", "tokens of data", "labels", "live"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_the_same_by_one_copy(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every field of what a Loader gives, sent field by field and in a packed buffer."""

    def packed(fields: Any, device: torch.device) -> Any:
        buffer, starts = pack(list(fields.values()))
        there = unpack(buffer.clone(), starts, list(fields.values()))
        return dict(zip(fields, there, strict=True))

    plain = list(loaders(tmp_path / "a", "cpu")[kind][0])
    monkeypatch.setattr(batches, "send", packed)
    for one, other in zip(plain, loaders(tmp_path / "b", "cpu")[kind][0], strict=True):
        assert same(one, other)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "log_probs_NK"):
        names = ("ids_NK", "log_probs_NK", "log_tail_N", "weight_N", "temperature")
        return all(same(getattr(a, name), getattr(b, name)) for name in names)
    return bool(a == b)


def a_step(kind: str, path: Path, device: str, name: str) -> TrainStep:
    """Of a student and a loader of that kind, with the optimizer that CUDA has."""
    loader, student = loaders(path, device)[kind]
    student.to(device)
    parameters = trainable(("", student))
    step = TrainStep(
        WholeLogits(student, torch.device(device), "float32"),
        loader,
        settings_of(
            None if loader.cache is None else loader.cache.spec,
            live_teacher=Net(4) if kind == "live" else None,
            epochs=1,
            clip=1.0,
            alpha=0.0 if kind == "labels" else 0.5,
        ),
        optimizer=make_optimizer(name, parameters, lr=0.1, weight_decay=0.1, fused=True),
        parameters=parameters,
        schedule=Schedule(0.1, 4),
    )
    if isinstance(student, Net) and kind == "full":  # as a rehearsal finds them
        step._statistics = [(student.norm, name) for name in ("running_mean", "running_var")]
    return step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_a_step_copies_each_micro_batch_once_and_waits_for_nothing(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys.modules["torch.optim.optimizer"],
        "_get_fused_kernels_supported_devices",
        lambda: ["meta"],
    )
    # else a student of the meta device is refused, which answers nothing
    monkeypatch.setattr(Tensor, "is_meta", property(lambda self: False), raising=False)
    step = a_step(kind, tmp_path, "meta", name)
    for batch in list(step.loader.global_batches()):
        with NoHostTensorsThere(), Crossings() as seen:
            numbers = step.run(batch)
        assert (
            numbers.shape == (len(step.names),)
            and numbers.device.type == "meta"
            and not step.stopped
        )
        assert [x.dtype for x in seen.copies] == [torch.uint8] * len(batch.micro_batches)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_cuda_is_not_waited_for(kind: str, name: str, tmp_path: Path) -> None:
    """As torch itself notices it, once the first step has set up what there is once."""
    step = a_step(kind, tmp_path, "cuda", name)
    first, *others = step.loader.global_batches()
    step.run(first)
    torch.cuda.set_sync_debug_mode("error")
    try:
        numbers = [step.run(batch) for batch in others]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(values.isfinite().all()) for values in numbers)


def test_labels_cross_once(tmp_path: Path) -> None:
    """Also where the targets of a cache that left them out of its tail ask for them."""
    loader, _ = loaders(tmp_path, "cpu")["topk"]
    micro = loader.peek()
    assert micro.cached is not None and "label" in micro.cached.columns
    there, columns = to_device(micro, torch.device("cpu"))
    assert there["labels"] is not None
    assert columns["label"].data_ptr() == there["labels"].data_ptr()
    assert columns["label"].shape == (3, 1)
    assert not {"sample_key", "pos", "token"} & set(columns)
    assert np.array_equal(there["labels"].numpy(), micro.cached.columns["label"][:, 0])
