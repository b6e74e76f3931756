"""Every call of the loss has first derivatives only: who differentiates a gradient is told, and
nobody else pays.

The oracle of the first derivatives is the same call without `create_graph`, bit for bit. On the CPU
the kernels run in triton's interpreter, with `-m gpu` compiled on the device: the same tests.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_world import kd_loss_rows, on, usual
from linear_world import head
from linear_world import kd_linear_loss as fused_linear
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from kdcache.loss.kd_linear_loss import kd_linear_loss
from kdcache.loss.kd_loss import kd_loss
from kdcache.loss.targets import SoftTargets

Loss = Callable[..., Tensor]  # of its leaves, a scalar
SAID = "has first derivatives only"
NAMES = (
    "kd_loss torch",
    "kd_loss triton",
    "kd_linear_loss torch",
    "kd_linear_loss triton",
    "kd_loss_rows",
    "kernels' kd_linear_loss",
)


def given(name: str, device: str, **options: Any) -> tuple[Loss, tuple[Tensor, ...]]:
    """A call, and its inputs on a device."""
    problem, behind = usual(rows=3), head(rows=3, width=4, classes=40, bias=True)
    k, of_head = on(device, problem.keywords), on(device, behind.keywords)
    logits = (problem.logits.to(device),)
    inputs = tuple(
        t.detach().to(device) for t in (behind.hidden, behind.weight, behind.bias) if t is not None
    )
    outcomes = torch.log_softmax(
        torch.randn(3, 6, generator=torch.Generator().manual_seed(1)), 1
    ).to(device)
    ids_NK = torch.arange(15, device=device).reshape(3, 5)
    targets = SoftTargets(
        2.0,
        123 if name.startswith("kd_loss") else 40,
        ids_NK,
        outcomes[:, :5].contiguous(),
        outcomes[:, 5].contiguous(),
    )
    labels = torch.tensor([1, 20, -1], device=device)
    public = {"labels": labels, "targets": targets, "engine": name.split()[-1], **options}
    calls: dict[str, tuple[Loss, tuple[Tensor, ...]]] = {
        "kd_loss_rows": (lambda z: kd_loss_rows(z, **k, **options)[0].sum(), logits),
        "kernels' kd_linear_loss": (
            lambda h, w, b: fused_linear(h, w, b, **of_head, memory=1000)[0],
            inputs,
        ),
    }
    if name.startswith("kd_loss "):
        return lambda z: kd_loss(z, **public), logits
    if name.startswith("kd_linear_loss"):
        return lambda h, w, b: kd_linear_loss(h, w, bias=b, memory="1 KB", **public), inputs
    return calls[name]


def leaves_of(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in inputs]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_is_differentiated_says_so(name: str, compiled: bool, device: str) -> None:
    loss, inputs = given(name, device)
    if compiled and name == "kd_linear_loss torch":
        pytest.skip("not captured by torch.compile")
    plain = leaves_of(inputs)
    expected = torch.autograd.grad(loss(*plain), plain)
    torch._dynamo.reset()
    run = torch.compile(loss, backend="eager", fullgraph=True) if compiled else loss
    leaves = leaves_of(inputs)
    gradients = torch.autograd.grad(run(*leaves), leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    for gradient in gradients:
        for leaf in leaves:  # each gradient is of every input
            with pytest.raises(RuntimeError, match=SAID):
                torch.autograd.grad((gradient**2).sum(), leaf, retain_graph=True)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
def test_a_hessian_and_a_penalty_on_what_lies_before_say_so(name: str, device: str) -> None:
    loss, inputs = given(name, device)
    with pytest.raises(RuntimeError, match=SAID):
        torch.autograd.functional.hessian(loss, inputs if len(inputs) > 1 else inputs[0])
    factor = torch.ones((), device=device, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(*(t * factor for t in inputs)), factor, create_graph=True)
    with pytest.raises(RuntimeError, match=SAID):
        (slope**2).backward()


@pytest.mark.parametrize("name", ["kd_loss torch", "kd_loss triton", "kd_loss_rows"])
def test_in_place_too(name: str, device: str) -> None:
    loss, inputs = given(name, device, inplace=True)
    (leaf,) = leaves_of(inputs)
    (gradient,) = torch.autograd.grad(loss(leaf * 1), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=SAID):
        gradient.sum().backward()


def test_the_derivative_by_the_factor_of_the_loss_is_refused_too(device: str) -> None:
    """`once_differentiable` loses this one as well: its error hangs on nothing that leads to the
    factor.
    """
    loss, inputs = given("kd_loss_rows", device)
    (leaf,), factor = leaves_of(inputs), torch.ones((), device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(leaf) * factor, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=SAID):
        torch.autograd.grad(gradient.sum(), factor)


class Operations(TorchDispatchMode):
    """The names of all that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_an_ordinary_backward_fills_nothing_and_has_no_graph(name: str, device: str) -> None:
    loss, inputs = given(name, device)
    leaves = leaves_of(inputs)
    value = loss(*leaves)
    with Operations() as seen:
        gradients = torch.autograd.grad(value, leaves, retain_graph=True)
    assert not {"zeros", "zeros_like", "zero_", "fill_", "full", "clone"} & set(seen.names)
    assert not any(g.requires_grad for g in gradients)
    again = torch.autograd.grad(value * 2, leaves)
    assert all(torch.equal(2 * a, b) for a, b in zip(gradients, again, strict=True))


@pytest.mark.parametrize("name", ["kd_loss torch", "kd_loss triton", "kd_loss_rows"])
def test_the_logits_are_not_held_for_it(name: str, device: str) -> None:
    loss, inputs = given(name, device)
    (leaf,) = leaves_of(inputs)
    logits = leaf * 1
    held = StorageWeakRef(logits.untyped_storage())
    value = loss(logits)
    del logits
    gc.collect()  # triton's interpreter leaves cycles
    assert held.expired() and value.requires_grad


class Dropped(torch.autograd.Function):
    """The identity, without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:
        return None


@pytest.mark.parametrize("name", NAMES)
def test_where_nothing_is_asked_of_the_loss_it_adds_nothing(name: str, device: str) -> None:
    loss, inputs = given(name, device)
    leaves = leaves_of(inputs)
    (Dropped.apply(loss(*leaves)) + sum((t * 2).sum() for t in leaves)).backward()
    assert all(t.grad is not None and bool((t.grad == 2).all()) for t in leaves)


class Split(torch.Tensor):
    """Known as a DTensor by what only one has."""

    placements = ("Shard(dim=1)",)


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_split_over_devices_is_refused_by_name(name: str, device: str) -> None:
    loss, inputs = given(name, device)
    for i in range(len(inputs)):
        split = [t.as_subclass(Split) if i == j else t for j, t in enumerate(inputs)]
        what = "logits" if len(inputs) == 1 else ("hidden", "weight", "bias")[i]
        with pytest.raises(
            ValueError, match=f"{what} is a DTensor with placements .*{what}.full_tensor()"
        ):
            loss(*split)
