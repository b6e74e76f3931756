"""What the losses share of torch's autograd: a gradient that forward has computed has no derivative
of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def first_derivatives_only(
    call: str,
) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """Decorates a `backward`: to differentiate what it returned under create_graph is a
    RuntimeError.

    torch's `once_differentiable` makes it one only where the incoming gradient requires a gradient,
    which that of a loss does not: a gradient penalty or a Hessian would be that of a constant, zero
    without a word. An ordinary backward runs without grad mode and is as it was. Which inputs the
    returned is of is known from what an operator saved, or from `link` in the forward of a
    Function. A backward that torch.compile has captured is torch's own: where the graph saved one
    of its inputs that is an error too ("double backward"), else there is no second derivative.
    """

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *grad_outputs: Tensor | None) -> Gradients:
            links = _links(ctx, grad_outputs) if torch.is_grad_enabled() else []
            with torch.no_grad():
                out = backward(ctx, *grad_outputs)
            if not links:
                return out
            return tuple(
                None if gradient is None else _behind_wall(gradient, call, links)
                for gradient in out
            )

        return wrapper

    return decorate


def link(ctx: Any, *inputs: Tensor | None) -> None:
    """In forward: keeps the graph of the inputs, which the node keeps anyway, and none of their
    memory.
    """
    with torch.enable_grad():
        ctx.links = tuple(t[:0].clone() for t in inputs if t is not None and t.requires_grad)


def _behind_wall(gradient: Tensor, call: str, links: list[Tensor]) -> Tensor:
    out: Tensor = _Wall.apply(gradient, call, *links)  # type: ignore[no-untyped-call]
    return out


def _links(ctx: Any, grad_outputs: tuple[Tensor | None, ...]) -> list[Tensor]:
    own = ctx.links if hasattr(ctx, "links") else ctx.saved_tensors
    return [t for t in (*own, *grad_outputs) if t is not None and t.requires_grad]


class _Wall(torch.autograd.Function):
    """The gradient as it is, a function of the links whose derivative is an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, call: str, *links: Tensor) -> Tensor:
        ctx.call = call
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Gradients:
        raise RuntimeError(
            f"{ctx.call} has first derivatives only, and one of its gradients was differentiated; "
            "for a gradient penalty or a Hessian write the loss in plain torch operations"
        )


def register_gradient(operator: Any, scale: Callable[[Tensor, Tensor], Tensor], call: str) -> None:
    """Backward of an operator (logits, ...) -> (loss_N, ..., gradient): `scale` of the gradient that
    it left and a factor per row, under the name of `call`.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(output[-1])
        ctx.inputs = len(inputs)

    @first_derivatives_only(call)
    def backward(ctx: Any, *grad_outputs: Tensor) -> Gradients:
        (gradient,) = ctx.saved_tensors
        return scale(gradient, grad_outputs[0]), *(None for _ in range(ctx.inputs - 1))

    operator.register_autograd(backward, setup_context=setup)


def split_over_devices(**tensors: Tensor | None) -> list[str]:
    """One line for each that is a DTensor, known by its placements: nothing of torch.distributed is
    imported.
    """
    return [
        f"{name} is a DTensor with placements {tensor.placements}; expected a plain tensor: give "
        f"{name}.full_tensor(), or {name}.to_local() where it is rows that are split"
        for name, tensor in tensors.items()
        if tensor is not None and hasattr(tensor, "placements")
    ]
