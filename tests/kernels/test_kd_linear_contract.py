"""What the loss behind an LM head promises besides its numbers: rows left out, memory,
torch.compile, refusals.

On the CPU the kernels run in triton's interpreter, with `-m gpu` compiled on the device: the same
tests.
"""

from __future__ import annotations

import gc
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import kernel_world as world
import linear_world
import pytest
import torch
from kernel_world import kd_loss_rows
from linear_world import Allocations, error, head, kd_linear_loss, linear
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdcache.kernels.kd_chunks import chunk_rows, row_stride
from kdcache.kernels.kd_linear import kd_linear_op
from kdcache.kernels.row_loss import RowLoss
from kdcache.loss.torch_engine import torch_engine

NAMES = ("loss", "ce", "kd", "hidden", "weight", "bias")


@pytest.fixture(autouse=True)
def dynamo_forgets() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def test_what_is_frozen_gets_no_gradient_and_no_product(device: str) -> None:
    given, chunks = head(bias=True), 4
    full = linear(given, device, given.memory(chunks))
    for wants in ("hidden", "weight", "bias", "hidden weight", "weight bias", "hidden bias", ""):
        with Allocations() as seen:
            found = linear(given, device, given.memory(chunks), wants=wants)
        assert set(found) == {"loss", "ce", "kd", *wants.split()}
        assert all(
            (torch.equal if wants else world.same)(found[name], full[name]) for name in found
        )
        products = sum(seen.operations[name] for name in ("mm", "addmm", "addmm_"))
        assert products == chunks * (1 + ("hidden" in wants) + ("weight" in wants))
    with torch.no_grad():
        assert not kd_linear_loss(
            given.hidden.requires_grad_().to(device),
            given.weight.to(device),
            **world.on(device, given.keywords),
        )[0].requires_grad


def test_all_rows_ignored_give_zero(device: str) -> None:
    given = head(bias=True)
    given.keywords.update(labels=torch.full((7,), -100), row_weight=torch.zeros(7))
    given.keywords.update(ce_scale=0.5 / torch.tensor(0).clamp(min=1), kd_scale=torch.tensor(0.0))
    found = linear(given, device, given.memory(2))
    assert set(found) == set(NAMES) and not any(value.any() for value in found.values())


def test_nothing_waits_for_the_device(device: str) -> None:
    """No operation through which a host learns a number of the device."""
    given = head(bias=True)
    asks = (
        "_local_scalar_dense",
        "item",
        "nonzero",
        "is_nonzero",
        "equal",
        "_unique2",
        "masked_select",
    )
    with Allocations() as seen:
        linear(given, device, given.memory(3))
    assert sum(seen.operations[name] for name in asks) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_stays_within_the_budget(dtype: torch.dtype, device: str) -> None:
    """No tensor but the gradients themselves is larger than the budget, all together little more."""
    rows, width, classes = 32, 16, 5003
    given = head(rows, width, classes, dtype=dtype, bias=True)
    budget = 8 * row_stride(classes) * given.weight.element_size() + 100
    leaves = given.leaves(device)
    keywords = world.on(device, given.keywords)
    with Allocations((rows, width), (classes, width), (classes,)) as seen:
        loss = kd_linear_loss(*leaves, memory=budget, **keywords)[0]
        # triton's interpreter holds its arguments in circles
        gc.collect()
        loss.backward()
    assert 0.9 * budget < seen.largest <= budget < rows * classes * given.weight.element_size() / 3
    # The float32 sums, which backward rounds to a narrower dtype when the chunk is gone.
    sums, rounded = (sum(t.numel() * size for t in leaves) for size in (4, dtype.itemsize % 4))
    # On the CPU a quarter of the chunk's gradient is a float32 copy for the product.
    copies = budget // 2 * (device == "cpu" and dtype != torch.float32)
    assert seen.peak <= sums + max(budget + copies, rounded) + 2**15


def test_the_loss_can_be_differentiated_by_any_factor_and_again(device: str) -> None:
    given = head(dtype=torch.bfloat16)
    h, w = (t.to(device).requires_grad_() for t in (given.hidden, given.weight))
    loss = kd_linear_loss(h, w, memory=given.memory(2), **world.on(device, given.keywords))[0]
    first = torch.autograd.grad(loss * 0.5, (h, w), retain_graph=True)
    second = torch.autograd.grad(loss, (h, w), torch.tensor(2.0, device=device), retain_graph=True)
    (third,) = torch.autograd.grad(loss, w)
    assert all(torch.equal(a * 4, b) for a, b in zip(first, second, strict=True)) and torch.equal(
        third * 2, second[1]
    )
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant: bool, device: str) -> None:
    given = head(bias=True)
    expected = linear(given, device, given.memory(2))
    leaves = given.leaves(device)

    def loss(*head: Tensor) -> Tensor:
        return kd_linear_loss(*head, memory=given.memory(2), **world.on(device, given.keywords))[0]

    value = checkpoint(loss, *leaves, use_reentrant=reentrant)
    assert isinstance(value, Tensor)
    value.backward()
    # reentrant, it comes from a pass without gradient
    assert world.same(value.detach().cpu(), expected["loss"])
    for leaf, name in zip(leaves, ("hidden", "weight", "bias"), strict=True):
        assert leaf.grad is not None and torch.equal(leaf.grad.cpu(), expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_under_torch_compile(dtype: torch.dtype, device: str) -> None:
    """No graph break, the bits of eager, and one graph for all batch sizes."""
    given = head(rows=9, classes=257, bias=True, dtype=dtype)
    compiled = torch.compile(kd_linear_loss, backend="aot_eager", fullgraph=True, dynamic=True)
    leaves = given.leaves(device)
    keywords = world.on(device, given.keywords) | {"memory": given.memory(3)}
    for rows in (9, 5):
        part = {
            k: v[:rows].clone() if isinstance(v, Tensor) and v.dim() else v
            for k, v in keywords.items()
        }
        answers = []
        for function in (compiled, kd_linear_loss):
            h, w, b = (
                t.detach()[: rows if i == 0 else None].clone().requires_grad_()
                for i, t in enumerate(leaves)
            )
            with torch._dynamo.config.patch(error_on_recompile=rows == 5):
                out = function(h, w, b, **part)
            (out[0] * 0.5).backward()
            answers.append([t.detach() for t in out] + [h.grad, w.grad, b.grad])
        assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    with pytest.raises(Exception, match=r"torch.compiler.disable"):
        torch.compile(kd_linear_loss, backend="aot_eager", fullgraph=True)(
            *leaves, engine=torch_engine, **keywords
        )


# torch's own, of inductor
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_finds_the_strides_that_it_was_told(device: str) -> None:
    """It asserts them, of hidden states whose rows are apart or that are transposed too;
    `aot_eager` does not.
    """
    given = head(rows=9, classes=257, bias=True)
    keywords = world.on(device, given.keywords) | {"memory": given.memory(3)}
    compiled = torch.compile(kd_linear_loss, backend="inductor", fullgraph=True)
    leaves = given.leaves(device)
    for hidden in (
        leaves[0].detach().t().contiguous().t(),
        leaves[0].detach().repeat(1, 2)[:, : leaves[0].shape[1]],
    ):
        answers = []
        for function in (compiled, kd_linear_loss):
            h, w, b = (t.detach().requires_grad_() for t in (hidden, *leaves[1:]))
            assert h.stride() == hidden.stride() and not h.is_contiguous()
            out = function(h, w, b, **keywords)
            answers.append([*(t.detach() for t in out), *torch.autograd.grad(out[0], (h, w, b))])
        assert all(world.same(a, b) for a, b in zip(*answers, strict=True))


def test_the_operator_keeps_its_promises_to_torch(device: str) -> None:
    given = head(bias=True)
    k = world.on(device, given.keywords)
    h, w, b = given.leaves(device)
    torch.use_deterministic_algorithms(False)
    for wants in ([True, False, True],):
        torch.library.opcheck(
            kd_linear_op,
            (
                h,
                w.requires_grad_(wants[1]),
                b,
                *world.asked(h, {"num_classes": 1000, **k}).arguments(),
                given.memory(2),
                torch.float32,
                wants,
            ),
            test_utils=(
                "test_schema",
                "test_autograd_registration",
                "test_faketensor",
                "test_aot_dispatch_dynamic",
            ),
        )


@pytest.mark.parametrize(
    ("classes", "bias", "stride"), [(1000, False, 1024), (1000, True, 1000), (1002, True, 1024)]
)
def test_rows_of_a_chunk_that_a_bias_is_added_to_are_contiguous_where_vectors_stay_whole(
    classes: int, bias: bool, stride: int
) -> None:
    """Then cuBLASLt adds it within the product; 1002 float32 are no whole vectors of 16 bytes."""
    given, strides = head(rows=9, classes=classes, bias=bias, padding=False), []

    def engine(logits: Tensor, rows: RowLoss) -> tuple[Tensor, Tensor, Tensor]:
        strides.append(logits.stride())
        return torch_engine(logits, rows)

    found = linear(given, "cpu", given.memory(2), engine=engine)
    assert strides == [(stride, 1)] * 2
    assert (
        error(found["loss"], linear_world.whole(given, torch.float64)["loss"])
        <= 16 * torch.finfo(torch.float32).eps
    )


def test_rows_of_a_chunk() -> None:
    # 5 chunks: 4 of these, one of 1536
    assert chunk_rows(8192, 128_256, 2, 512 * 10**6) == 1664
    assert chunk_rows(8192, 128_256, 2, 512 * 2**20) == 2048
    assert chunk_rows(100, 128_256, 2, 512 * 10**6) == 100
    assert chunk_rows(0, 1000, 4, 10**6) == 1
    chance = random.Random(0)
    for _ in range(2000):
        rows, width, itemsize = (
            chance.randint(1, 20_000),
            chance.randint(1, 300_000),
            chance.choice((2, 4)),
        )
        row = row_stride(width) * itemsize
        memory = chance.randint(row, 10**9)
        step = chunk_rows(rows, width, itemsize, memory)
        assert 1 <= step <= rows and (step * row <= memory)
        if step < rows and memory >= 128 * row:
            assert step % 128 == 0 and -(-rows // step) == -(-rows // (memory // row // 128 * 128))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"memory": 1024 * 4 - 1},
            "memory is 4095 bytes, but the logits of a single row take 4096",
        ),
        ({"labels": torch.zeros(9, dtype=torch.long)}, "labels_NJ is .9, 1."),
        ({"bias": torch.zeros(7)}, "bias is .7.; expected .1000."),
        ({"weight": torch.zeros(1000, 17)}, "expected .N, H."),
        ({"weight": torch.zeros(1000, 16, dtype=torch.bfloat16)}, "expected one dtype"),
        ({"divergence": "forward"}, "divergence 'forward'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], message: str, device: str) -> None:
    for rows in (7, 0):
        given = head(rows)
        keywords = {"hidden": given.hidden, "weight": given.weight, **given.keywords, **changed}
        with pytest.raises(ValueError, match=message):
            kd_linear_loss(**world.on(device, keywords))


@pytest.mark.gpu
def test_a_language_model_head_on_the_device(device: str) -> None:
    """At real sizes: whole logits by the same kernels, no wait for the device, and memory as
    promised.
    """
    if device != "cuda":
        pytest.skip("needs a CUDA device")
    rows, width, classes = 4096, 1024, 50_257
    given = head(rows, width, classes, kept=64, dtype=torch.bfloat16)
    h, w = (t.cuda().requires_grad_() for t in (given.hidden, given.weight))
    keywords = world.on(device, given.keywords)
    kd_loss_rows(h @ w.t(), **keywords)[0].sum().backward()
    assert h.grad is not None and w.grad is not None
    expected = [h.grad, w.grad]
    h.grad = w.grad = None
    torch.cuda.synchronize()
    before, _ = torch.cuda.memory_allocated(), torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kd_linear_loss(h, w, memory=64 * 10**6, **keywords)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    held = torch.cuda.max_memory_allocated() - before
    # products may take a workspace
    assert held <= 64e6 + 6 * classes * width + 2 * rows * width + 64e6
    for found, value in zip((h.grad, w.grad), expected, strict=True):
        assert error(found.cpu(), value.cpu().double()) <= 0.05


def test_another_engine_does_without_triton() -> None:
    """macOS has none: nothing but the fused kernels imports it."""
    code = """if True:
        import sys; sys.modules["triton"] = None
        import torch
        from kdcache.kernels.kd_linear import kd_linear_loss
        from kdcache.kernels.row_loss import RowLoss
        from kdcache.loss.torch_engine import torch_engine
        h, one = torch.ones(2, 3, requires_grad=True), torch.ones(())
        rows = RowLoss(5, torch.tensor([[0], [1]]), ce_scale=one)
        kd_linear_loss(h, torch.ones(5, 3), None, rows, engine=torch_engine)[0].backward()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
