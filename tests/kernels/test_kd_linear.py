"""The loss behind an LM head: chunks of rows against whole logits in float64 by autograd, and its
other promises.

On the CPU the kernels run in triton's interpreter, with `-m gpu` compiled on the device: the same
tests.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import kernel_world as world
import pytest
import torch
from kernel_world import kd_loss_rows
from linear_world import Found, Head, error, head, linear, whole
from torch import Tensor

from kdcache.loss.engines import fused_engine
from kdcache.loss.torch_engine import torch_engine

FACTORS: dict[str, tuple[Any, ...]] = {
    "rows": (7, 0, 1, 64),
    "width": (16, 48),
    "classes": (1000, 31, 5003),
    "kept": (8, 1, 64),
    "temperature": (2.0, 1.0),
    "labels": (1, 2),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "bias": (False, True),
    "chunks": (1, 2, 64),
    "factor": (1.0, 0.5, -3.0),
}
NAMES = ("loss", "ce", "kd", "hidden", "weight", "bias")


def cases() -> Iterator[dict[str, Any]]:
    """Each value of each factor beside the usual others, and combinations by chance."""
    usual = {name: values[0] for name, values in FACTORS.items()}
    yield from ({**usual, name: value} for name, values in FACTORS.items() for value in values[1:])
    chance = random.Random(0)
    yield from (
        {name: chance.choice(values) for name, values in FACTORS.items()} for _ in range(16)
    )


@pytest.mark.parametrize("case", list(cases()), ids=lambda c: "-".join(str(v) for v in c.values()))
def test_chunks_are_as_good_as_whole_logits(case: dict[str, Any], device: str) -> None:
    """Errors at most twice those of whole logits in the same dtype, and an ulp of it."""
    case = dict(case)
    chunks, factor = (case.pop(name) for name in ("chunks", "factor"))
    # Many rows of few ids take the torch engine as engine, without the interpreter: it takes
    # 20 ms a row.
    engine = device == "cpu" and case["rows"] == 64 and case["kept"] < 31 and chunks > 1
    given = head(**case, padding=not engine)
    found = linear(
        given,
        device,
        given.memory(chunks),
        factor=factor,
        engine=torch_engine if engine else None,
    )
    truth, dtype = whole(given, torch.float64, factor=factor), case["dtype"]
    shapes = (1, chunks, case["rows"]) if dtype == torch.float32 else (1,)
    as_good(
        found,
        truth,
        [whole(given, dtype, factor=factor, chunks=n) for n in shapes],
        torch.finfo(dtype).eps,
    )
    assert set(found) == set(NAMES[: 6 if case["bias"] else 5])
    assert all(found[k].dtype == case["dtype"] for k in ("hidden", "weight"))


def as_good(found: Found, truth: Found, plain: list[Found], eps: float) -> None:
    for name, value in truth.items():
        assert error(found[name], value) <= world.allowed(
            max(error(p[name], value) for p in plain), eps, 2.0
        ), name
    assert found.keys() == truth.keys()


def test_the_gradient_of_a_float64_head_is_that_of_whole_logits(device: str) -> None:
    """With the torch engine as engine nothing is rounded: chunking and products alone, to the
    last digits.
    """
    given = head(rows=11, classes=257, labels=2, bias=True, dtype=torch.float64, padding=False)
    for chunks in (1, 3, 11):
        found = linear(given, device, given.memory(chunks), engine=torch_engine, factor=0.7)
        truth = whole(given, torch.float64, factor=0.7)
        assert max(error(found[name], value) for name, value in truth.items()) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_engine_gives_the_same(dtype: torch.dtype, device: str) -> None:
    given = head(rows=13, classes=257, bias=True, dtype=dtype, padding=False)
    truth, plain = whole(given, torch.float64), [whole(given, dtype, chunks=n) for n in (1, 3)]
    for engine in (torch_engine, fused_engine):
        as_good(
            linear(given, device, given.memory(3), engine=engine),
            truth,
            plain,
            torch.finfo(dtype).eps,
        )


def test_a_teacher_over_all_classes_and_a_padded_vocabulary(device: str) -> None:
    """num_classes below the head's rows: those beyond get zero gradients."""
    given = head(rows=5, classes=123, bias=True, every=True)
    log_q = torch.log_softmax(torch.randn(5, 123), -1)
    keywords = {"ids": None, "log_probs": log_q, "log_tail": None}
    ids = torch.arange(123).expand(5, -1)
    given.problem.keywords.update(ids=ids, log_probs=log_q, log_tail=torch.full((5,), -torch.inf))
    truth, plain = (
        whole(given, torch.float64),
        [whole(given, torch.float32, chunks=n) for n in (1, 2)],
    )
    padded = Head(
        given.hidden,
        torch.cat([given.weight, torch.full((6, 16), 9.0)]),
        torch.cat([given.bias, torch.full((6,), 9.0)]) if given.bias is not None else None,
        given.keywords | keywords,
        given.problem,
    )
    found = linear(padded, device, padded.memory(2), num_classes=123)
    for name in ("weight", "bias"):
        assert not found[name][123:].any()
        found[name] = found[name][:123]
    as_good(found, truth, plain, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_classes_that_the_teacher_has_not(tail: str, device: str) -> None:
    given = head(rows=7, classes=123, bias=True, padding=False, tail=tail, beyond=20)
    truth, plain = (
        whole(given, torch.float64),
        [whole(given, torch.float32, chunks=n) for n in (1, 3)],
    )
    for engine in (None, torch_engine):
        as_good(
            linear(given, device, given.memory(3), engine=engine),
            truth,
            plain,
            torch.finfo(torch.float32).eps,
        )
    narrow = linear(given, device, given.memory(3), teacher_classes=None)
    assert (error(narrow["weight"], truth["weight"]) > 1e-3) == (tail == "uniform"), (
        "they have no part of its tail"
    )


@pytest.mark.parametrize(
    "asked",
    [
        {"softcap": 3.0, "logit_scale": 0.6},
        {"logit_scale": 0.3},
        {"softcap": 5.0, "logit_scale": 1.7},
    ],
    ids=str,
)
def test_capped_and_scaled_logits(asked: dict[str, float], device: str) -> None:
    given = head(rows=9, bias=True, padding=False)
    truth = whole(given, torch.float64, **asked)
    plain = [whole(given, torch.float32, chunks=n, **asked) for n in (1, 3)]
    as_good(
        linear(given, device, given.memory(3), **asked),
        truth,
        plain,
        torch.finfo(torch.float32).eps,
    )
    other = linear(given, device, given.memory(3))
    assert error(other["hidden"], plain[0]["hidden"].double()) > 1e-3
    found = linear(given, device, given.memory(3), engine=torch_engine, **asked)
    as_good(found, truth, plain, torch.finfo(torch.float32).eps)


def test_the_size_of_the_chunks_does_not_matter(device: str) -> None:
    """A product of other shape adds in another order: an error of the logits, and of the sums over
    rows or classes.
    """
    rows, width, classes = 24, 48, 1000
    given = head(rows, width, classes, padding=False)
    found = [
        linear(given, device, given.memory(chunks), engine=torch_engine) for chunks in (1, 2, 5, 24)
    ]
    k, h, w = given.keywords, given.hidden.double(), given.weight.double()
    x = h @ w.t()
    # Absolute values of what the gradient of the logits is the sum of, term by term.
    ce, kd = float(k["ce_scale"]), k["kd_scale"] * k["row_weight"][:, None].double() / 2
    size = ce * torch.softmax(x, 1) + kd * torch.softmax(x / 2, 1)
    size.scatter_add_(1, k["ids"], kd * k["log_probs"].exp())
    size.scatter_add_(1, k["labels"].clamp(min=0)[:, None], torch.full((rows, 1), ce).double())
    eps = torch.finfo(torch.float32).eps
    # Logits off by d change each probability by a factor of at most 1 + 2 d.
    shift = 4 * width * eps * float((h.abs() @ w.abs().t()).max()) + 8 * eps
    bound = {
        "hidden": (shift + classes * eps) * (size @ w.abs()),
        "weight": (shift + rows * eps) * (size.t() @ h.abs()),
    }
    for name, most in bound.items():
        assert all(
            bool(((other[name] - found[0][name]).abs() <= most).all()) for other in found[1:]
        )
        assert float(most.max()) < 0.01 * float(found[0][name].abs().max())


def test_the_gradient_of_the_head_is_summed_in_float32(device: str) -> None:
    """600 equal chunks of one row: a sum in bfloat16, of 8 bits, stops growing at about 256."""
    one = head(1, 16, 31, dtype=torch.bfloat16, every=True, padding=False)
    rows = 600
    keywords = {
        k: v.expand(rows, *v.shape[1:]) if isinstance(v, Tensor) and v.dim() else v
        for k, v in one.keywords.items()
    }
    many = Head(
        one.hidden.expand(rows, -1),
        one.weight,
        torch.zeros(31, dtype=torch.bfloat16),
        keywords,
        one.problem,
    )
    single = linear(one, device, one.memory(1), engine=torch_engine)["weight"].double()
    found = linear(many, device, many.memory(rows), engine=torch_engine)
    assert error(found["weight"], rows * single) <= 2 * torch.finfo(torch.bfloat16).eps
    total = torch.zeros_like(single, dtype=torch.bfloat16)
    for _ in range(rows):
        total += single.to(torch.bfloat16)
    assert error(total, rows * single) > 0.1


def test_a_mean_over_many_rows_does_not_underflow_in_float16(device: str) -> None:
    """1 / N of 2^22 rows, a loss scaler of 2^20: whole logits lose the gradient, in units of the
    scale it is kept.
    """
    given = head(dtype=torch.float16, every=True)
    given.keywords.update(ce_scale=torch.tensor(2.0**-23), kd_scale=torch.tensor(2.0**-21))
    scaler = 2.0**20
    truth = whole(given, torch.float64, factor=scaler)
    found = linear(given, device, given.memory(2), factor=scaler)
    logits = (given.hidden.to(device) @ given.weight.to(device).t()).requires_grad_()
    (kd_loss_rows(logits, **world.on(device, given.keywords))[0].sum() * scaler).backward()
    assert logits.grad is not None
    for name, plain in (
        ("hidden", logits.grad.cpu() @ given.weight),
        ("weight", logits.grad.cpu().t() @ given.hidden),
    ):
        assert (
            error(found[name], truth[name])
            <= 4 * torch.finfo(torch.float16).eps
            < 0.02
            < error(plain, truth[name])
        )


def test_autocast_takes_its_dtype_and_leaves_the_sums_as_they_are(device: str) -> None:
    given = head(rows=9, bias=True)
    narrow = given.to(torch.bfloat16)
    expected = linear(narrow, device, narrow.memory(2))
    with torch.autocast(device, dtype=torch.bfloat16):
        found = linear(given, device, narrow.memory(2))
    assert all(found[name].dtype == torch.float32 for name in NAMES)
    assert all(torch.equal(found[name], expected[name]) for name in ("loss", "ce", "kd"))
    assert all(
        torch.equal(found[name].bfloat16(), expected[name]) for name in ("hidden", "weight", "bias")
    )
    assert not torch.equal(found["weight"].bfloat16().float(), found["weight"])
