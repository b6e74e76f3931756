"""What a call of `kd_loss` promises to the rest of torch: no wait for the device, autocast,
checkpointing, compilation, CUDA graphs; for both engines.

Waiting is shown without a GPU on the meta device: whatever comes from the host or reads a value is
seen and refused.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_world import same
from loss_world import DIVERGENCES, PAIRS, problem, single
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from waits import nothing_waits

from kdcache.loss.kd_loss import kd_loss, kd_loss_parts, row_counts
from kdcache.loss.targets import SoftTargets

ENGINES = ("torch", "triton")
KINDS = [(d, "bucket", None) for d in DIVERGENCES] + [(d, t, 5) for d, t in PAIRS]


def given(
    kind: tuple[str, str, int | None], device: str, seed: int = 1, temperature: float = 2.0
) -> tuple[Tensor, Tensor, SoftTargets, dict[str, str]]:
    """(logits float32, labels, targets, options) on a device; two of the rows have no label, one no
    teacher.
    """
    divergence, tail, k = kind
    logits, labels, targets = problem(seed, 6, 40, temperature, k, tail=tail)
    labels[1], labels[4] = -1, -100
    targets = replace(targets, weight_N=torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0, 1.0]))
    return (
        logits.float().to(device),
        labels.to(device),
        single(targets).to(device),
        {"divergence": divergence, "tail": tail},
    )


# ---- the device is not waited for
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: torch.as_tensor(1.0, device=x.device),
        lambda x: torch.ones(2).to(x.device),
        lambda x: x * torch.ones(2),
        lambda x: x.sum().item(),
        lambda x: bool(x[0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x.index_put_((x > 0,), x[0]),
    ],
)
def test_whatever_waits_is_seen(wait: Callable[[Tensor], Any]) -> None:
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), nothing_waits():
        wait(torch.ones(2, device="meta"))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_waits_for_the_device(
    engine: str, kind: tuple[str, str, int | None], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda":
        pytest.skip("the meta device stands for one, and only in the interpreter")
    monkeypatch.setattr("kdcache.kernels.kd_loss_rows.launch", lambda *_: None)
    monkeypatch.setattr("kdcache.kernels.kd_launch.scale_gradient", lambda *_: None)
    logits, labels, targets, options = given(kind, "meta")
    count = torch.zeros((), device="meta")
    some = replace(targets, weight_N=None)
    calls: list[dict[str, Any]] = [
        {},
        {"normalizer": (5, 7.5)},
        {"normalizer": (count, count.long())},
        {"reduction": "sum", "parts": True},
        {"reduction": "none", "alpha": 1.0},
        {"alpha": 0.0, "inplace": True},
        {"targets": some, "parts": True},
        {
            "labels": labels.int()[:, None].expand(6, 2),
            "label_weight": torch.zeros(6, 2, device="meta"),
        },
        {"labels": None, "kd_weight": 2.0, "ce_weight": 0.0},
        {"targets": None, "inplace": True},
    ]
    for dtype, call in [(torch.float32, call) for call in calls] + [
        (torch.bfloat16, {}),
        (torch.float16, {}),
    ]:
        leaf = logits.to(dtype).clone().requires_grad_()
        with nothing_waits():
            asked = {"labels": labels, "targets": targets, **options, **call}
            run = kd_loss_parts if asked.pop("parts", False) else kd_loss
            out = run(leaf * 1, **asked, engine=engine)
            loss = out if isinstance(out, Tensor) else out.loss
            loss.sum().backward()
        assert loss.device.type == "meta" and leaf.grad is not None
    with nothing_waits():
        assert all(isinstance(n, Tensor) for n in row_counts(labels, targets))
        targets.to("meta"), targets[1:]


def test_targets_move_without_waiting_if_asked() -> None:
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten._to_copy.default:
                copies.append((kwargs or {}).get("non_blocking", False))
            return func(*args, **(kwargs or {}))

    targets = given(("forward_kl", "bucket", 5), "cpu")[2]
    with Copies():
        assert targets.to("meta", non_blocking=True).log_probs_NK.device.type == "meta"
        targets.to("meta")
    assert copies == [True] * 4 + [False] * 4


# ---- autocast, checkpointing
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "kind"), [("torch", kind) for kind in KINDS] + [("triton", KINDS[0])], ids=str
)
def test_autocast_changes_no_bit(
    engine: str, kind: tuple[str, str, int | None], device: str
) -> None:
    logits, labels, targets, options = given(kind, device)
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for autocast in (False, True):
            leaf = logits.to(dtype).clone().requires_grad_()
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                loss = kd_loss(leaf, labels, targets, engine=engine, **options)
            loss.backward()
            found.append((loss.detach(), leaf.grad))
        (a, b), (c, d) = found
        assert a.dtype == c.dtype == torch.float32 and torch.equal(a, c)
        assert b is not None and d is not None and torch.equal(b, d)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_activation_checkpointing(engine: str, inplace: bool, reentrant: bool, device: str) -> None:
    _, labels, targets, _ = given(("forward_kl", "bucket", 5), device)
    hidden, weight = (
        torch.randn(6, 40, generator=torch.Generator().manual_seed(s)).to(device) for s in (2, 3)
    )

    def head(h: Tensor, weight: Tensor) -> Tensor:
        out = kd_loss(h * weight, labels, targets, engine=engine, inplace=inplace)
        assert isinstance(out, Tensor)
        return out

    found = []
    for run in (head, lambda *x: checkpoint(head, *x, use_reentrant=reentrant)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = run(h, w)
        loss.backward()
        found.append((loss.detach(), h.grad, w.grad))
    # reentrant, the value is of a pass without gradient: another build
    for a, b in zip(*found, strict=True):
        assert (
            a is not None and b is not None and (same if engine == "triton" else torch.equal)(a, b)
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_logits_that_a_checkpointed_function_was_given_are_not_quietly_overwritten(
    engine: str, device: str
) -> None:
    logits, labels, targets, _ = given(("forward_kl", "bucket", 5), device)

    def loss(z: Tensor) -> Any:
        return kd_loss(z, labels, targets, engine=engine, inplace=True)

    leaf = logits.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        checkpoint(loss, leaf * 1, use_reentrant=False).backward()
    # its first pass wants no gradient, and writes none
    checkpoint(loss, leaf * 1, use_reentrant=True).backward()
    want = logits.clone().requires_grad_()
    loss(want * 1).backward()
    assert leaf.grad is not None and want.grad is not None and torch.equal(leaf.grad, want.grad)


# ---- compiled
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [("forward_kl", "bucket", 5), ("jsd", "bucket", None), ("forward_kl", "sampled", 5)],
    ids=str,
)
@pytest.mark.parametrize("engine", ENGINES)
def test_one_graph_under_torch_compile(
    engine: str, kind: tuple[str, str, int | None], device: str
) -> None:
    """No graph break, the bits of eager, one graph for all numbers of rows."""
    torch._dynamo.reset()
    logits, labels, targets, options = given(kind, device)
    options |= {"beta": 0.3} if kind[0] == "jsd" else {}

    def loss(logits: Tensor, labels: Tensor, targets: SoftTargets) -> Any:
        parts = kd_loss_parts(
            logits * 1,
            labels,
            targets,
            alpha=0.7,
            engine=engine,
            inplace=True,
            **options,
        )
        return parts.loss, parts.ce, parts.kd, parts.kd_count

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (6, 4):
            found = []
            for run in (loss, compiled):
                leaf = logits[:rows].clone().requires_grad_()
                out = run(leaf, labels[:rows].clone(), targets[torch.arange(rows, device=device)])
                out[0].backward()
                found.append([*(t.detach() for t in out), leaf.grad])
            for a, b in zip(*found, strict=True):  # the kernel in place and beside: two builds
                assert (
                    a is not None
                    and b is not None
                    and (same if engine == "triton" else torch.equal)(a, b)
                )
    torch._dynamo.reset()


def test_the_operators_keep_their_promises_to_torch() -> None:
    from kdcache.kernels.row_loss import RowLoss
    from kdcache.loss.divergences import Divergence
    from kdcache.loss.kd_loss import _of_teacher
    from kdcache.loss.torch_engine import loss_rows_op, scale_rows_op

    logits, labels, targets, _ = given(("jsd", "bucket", 5), "cpu")
    scale = torch.tensor(0.5)
    rows = RowLoss(
        40,
        labels[:, None],
        divergence=Divergence("jsd", 0.3),
        ce_scale=scale,
        kd_scale=scale,
        **_of_teacher(targets),
    )
    inputs = (logits.requires_grad_(), *rows.arguments())
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    torch.library.opcheck(loss_rows_op, (*inputs, True), test_utils=tests)
    torch.library.opcheck(scale_rows_op, (logits.detach(), torch.rand(6)), test_utils=tests)


# ---- on a device
# --------------------------------------------------------------------------------------------------


def step(
    engine: str, logits: Tensor, labels: Tensor, targets: SoftTargets, **options: Any
) -> tuple[Tensor, Tensor]:
    loss = kd_loss(logits * 1, labels, targets, engine=engine, **options)
    assert isinstance(loss, Tensor)
    return loss, torch.autograd.grad(loss, logits)[0]


def errors_on_sync() -> AbstractContextManager[Any]:
    stack = ExitStack()
    stack.callback(torch.cuda.set_sync_debug_mode, "default")
    torch.cuda.set_sync_debug_mode("error")
    return stack


@pytest.mark.gpu
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_cuda_does_not_wait_and_its_graph_replays_other_contents(
    engine: str, kind: tuple[str, str, int | None], inplace: bool, device: str
) -> None:
    if device != "cuda":
        pytest.skip("needs a CUDA device")
    torch.use_deterministic_algorithms(False)  # its scatter sorts on the way
    *static, options = given(kind, device)
    *other, _ = given(kind, device, seed=2)
    static[0].requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles and allocates
            step(engine, *static, inplace=inplace, **options)
        with errors_on_sync():
            step(engine, *static, inplace=inplace, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = step(engine, *static, inplace=inplace, **options)
    with torch.no_grad():
        for to, content in zip(tensors(static), tensors(other), strict=True):
            to.copy_(content)
    graph.replay()
    want = step(engine, other[0].requires_grad_(), *other[1:], inplace=inplace, **options)
    assert torch.equal(loss, want[0]) and torch.equal(gradient, want[1])


def tensors(given: list[Any]) -> list[Tensor]:
    logits, labels, t = given
    return [
        x
        for x in (logits, labels, t.ids_NK, t.log_probs_NK, t.log_tail_N, t.weight_N)
        if x is not None
    ]
