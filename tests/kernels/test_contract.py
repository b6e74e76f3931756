"""What the fused loss promises besides its numbers: gradients asked for again, buffers, refusals,
torch.compile, parts.

On the CPU the kernels run in triton's interpreter, with `-m gpu` compiled on the device: the same
tests.
"""

from __future__ import annotations

import os
import shutil
import warnings
from typing import Any

import kernel_world as world
import pytest
import torch
from kernel_cases import Case
from kernel_world import kd_loss_rows, on, run, same, usual
from torch import Tensor

from kdcache.kernels.kd_launch import part_length


def test_a_part_without_a_scale_is_reported_and_not_in_the_loss(device: str) -> None:
    for name, value, other in (("ce_scale", 1, 2), ("kd_scale", 2, 1)):
        out, gradient, *_ = run(usual(), device, **{name: None})
        expected, zero, *_ = run(usual(), device, **{name: 0.0})
        assert same(out[value], expected[value]) and bool((out[value] > 0).all())
        assert same(out[0], expected[0]) and same(gradient, zero)
        assert float(usual().keywords[("ce_scale", "kd_scale")[other - 1]]) * float(
            out[other][0]
        ) == pytest.approx(float(out[0][0]))


def test_without_a_gradient_only_the_values_are_computed(device: str) -> None:
    problem = usual(inplace=True)
    expected, *_ = run(problem, device)
    _, logits = world.laid_out(problem, device)
    with torch.no_grad():
        out = kd_loss_rows(logits.requires_grad_(), **on(device, problem.keywords), inplace=True)
    assert all(same(a, b.cpu()) for a, b in zip(expected, out, strict=True))
    assert torch.equal(logits.detach().cpu(), problem.logits) and not out[0].requires_grad


def test_a_kept_graph_can_be_differentiated_again_by_another_factor(device: str) -> None:
    problem = usual(dtype=torch.bfloat16)
    logits = problem.logits.to(device).requires_grad_()
    loss = kd_loss_rows(logits, **on(device, problem.keywords))[0].sum()
    (first,) = torch.autograd.grad(loss * 0.5, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss * 2, logits, retain_graph=True)
    (third,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first * 4, second) and torch.equal(second, third * 2)


def test_inplace_is_used_up_and_noticed(device: str) -> None:
    problem = usual()
    leaf = problem.logits.to(device).requires_grad_()
    logits = leaf * 1
    loss = kd_loss_rows(logits, **on(device, problem.keywords), inplace=True)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace=False"):
        loss.backward()
    logits = leaf * 1
    square = (logits**2).sum()
    kd_loss_rows(logits, **on(device, problem.keywords), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@pytest.mark.parametrize("change", ["transposed", "expanded"])
def test_rows_that_no_program_can_own_are_copied(change: str, device: str) -> None:
    problem = usual()
    if change == "expanded":
        problem.logits[:] = problem.logits[:1].clone()
    expected, gradient, *_ = run(problem, device)
    x = problem.logits.to(device)
    logits = (
        x.t().contiguous().t() if change == "transposed" else x[:1].expand(3, -1)
    ).requires_grad_()
    assert logits.stride() != x.stride()
    out = kd_loss_rows(logits, **on(device, problem.keywords), inplace=True)
    (found,) = torch.autograd.grad(out[0].sum(), logits)
    assert same(out[0].detach().cpu(), expected[0]) and same(found, gradient)
    assert torch.equal(logits.detach().cpu(), problem.logits)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"divergence": "forward"}, "divergence 'forward'"),
        ({"tail": "drop"}, "tail 'drop'"),
        ({"num_classes": 124}, "num_classes is 124"),
        (
            {"labels": None, "label_weight": None, "ids": None, "log_probs": None},
            "neither labels nor log_probs",
        ),
        ({"log_tail": None}, "log_tail belong together"),
        ({"log_probs": torch.zeros(3, 7)}, "must be alike"),
        ({"labels": torch.zeros(2, dtype=torch.long)}, "labels_NJ is .2, 1. .* does not go"),
        ({"ids": torch.zeros(3, 8)}, "ids_NK is .* expected integers"),
        ({"parts": 65}, "parts is 65"),
        ({"ids": None, "log_tail": None}, "expected .N, 123."),
        (
            {"divergence": "reverse_kl", "tail": "sampled"},
            "goes with divergence 'forward_kl' alone",
        ),
        ({"divergence": "reverse_kl", "tail": "renormalise"}, "is infinite"),
        ({"row_weight": torch.ones(2)}, "does not go"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], message: str, device: str) -> None:
    problem = usual()
    with pytest.raises(ValueError, match=message):
        kd_loss_rows(problem.logits.to(device), **on(device, problem.keywords | changed))
    with pytest.raises(ValueError, match="float64"):
        kd_loss_rows(problem.logits.double().to(device), **on(device, problem.keywords))


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_elements(device: str) -> None:
    rows, classes = 17_000, 128_256
    if device != "cuda" or torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs a CUDA device with 12 GB free")
    case = Case(rows=1, num_classes=classes, dtype=torch.bfloat16, kept=64)
    problem = world.problem(case)
    logits = problem.logits.to(device).expand(rows, -1).contiguous().requires_grad_()
    keywords = {
        k: v.expand(rows, *v.shape[1:]) if isinstance(v, Tensor) and v.dim() else v
        for k, v in on(device, problem.keywords).items()
    }
    out = kd_loss_rows(logits, **keywords, inplace=True)
    (gradient,) = torch.autograd.grad(out[0].sum(), logits)
    assert bool((out[0] == out[0][0]).all()) and torch.equal(gradient[0], gradient[-1])


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({}, 1),
        ({"layout": "strided", "tail": "uniform", "softcap": 30.0}, 1),
        ({"layout": "padded", "logit_scale": 0.3}, 2),
    ],
    ids=str,
)
def test_one_graph_under_torch_compile(changed: dict[str, Any], parts: int, device: str) -> None:
    """No graph break, the same bits as eager, and one graph for all batch sizes."""
    problem = usual(dtype=torch.bfloat16, **changed)
    expected, gradient, *_ = run(problem, device, parts=parts)
    keywords = on(device, problem.keywords) | {"parts": parts}
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def loss(logits: Tensor, keywords: dict[str, Any]) -> tuple[Tensor, ...]:
        return kd_loss_rows(logits, **keywords)

    def step(rows: int) -> tuple[tuple[Tensor, ...], Tensor]:
        _, view = world.laid_out(problem, device)
        logits = torch.empty_strided(
            (rows, view.shape[1]), view.stride(), dtype=view.dtype, device=device
        )
        logits.copy_(view[:rows]).requires_grad_()
        out = loss(
            logits,
            {
                k: v[:rows].clone() if isinstance(v, Tensor) and v.dim() else v
                for k, v in keywords.items()
            },
        )
        return out, torch.autograd.grad(out[0].sum(), logits)[0]

    for rows in (3, 2):
        out, found = step(rows)
        assert all(
            torch.equal(a.detach().cpu(), b[:rows]) for a, b in zip(out, expected, strict=True)
        )
        assert torch.equal(found, gradient[:rows])
    assert len(graphs) == 1
    torch._dynamo.reset()


LAYOUTS = ("whole", "columns from 1 on", "rows apart", "off 16 bytes", "transposed")


def rows_of(layout: str, x: Tensor) -> Tensor:
    """x [N, V] in a layout."""
    rows, classes = x.shape
    if layout == "transposed":
        return x.t().contiguous().t()
    stride, offset = {
        "whole": (classes, 0),
        "columns from 1 on": (classes + 1, 1),
        "rows apart": (classes + 6, 0),
        "off 16 bytes": (classes, 2),
    }[layout]
    out = torch.empty_strided((rows * stride + offset,), (1,), dtype=x.dtype, device=x.device)
    return out.as_strided((rows, classes), (stride, 1), offset).copy_(x)


# torch's own, of inductor
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inductor_finds_the_strides_that_it_was_told(layout: str, device: str) -> None:
    """It asserts them; `aot_eager` takes what comes."""
    torch._dynamo.reset()
    problem = usual(dtype=torch.bfloat16)
    expected, gradient, *_ = run(problem, device)
    logits = rows_of(layout, problem.logits.to(device)).requires_grad_()
    compiled = torch.compile(kd_loss_rows, backend="inductor", fullgraph=True)
    out = compiled(logits, **on(device, problem.keywords))
    (found,) = torch.autograd.grad(out[0].sum(), logits)
    # Rows that start elsewhere within 16 bytes are summed in another order, of 123 terms each; then
    # one rounding.
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a.detach().cpu(), b, rtol=16 * 2**-23, atol=16 * 2**-23)
    torch.testing.assert_close(found.cpu(), gradient.cpu(), rtol=2**-7, atol=16 * 2**-23)
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operators_keep_their_promises_to_torch(layout: str, device: str) -> None:
    from kdcache.kernels.kd_loss_rows import kd_rows_op, scale_rows_op

    problem = usual(num_classes=1272)
    logits = rows_of(layout, problem.logits.to(device)).requires_grad_()
    asked = {**on(device, problem.keywords), "logit_scale": 1.5, "softcap": 30.0}
    inputs = (logits, *world.asked(logits, asked).arguments(), None)
    torch.use_deterministic_algorithms(False)
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    torch.library.opcheck(kd_rows_op, (*inputs, True), test_utils=tests)
    gradient = kd_rows_op(*inputs, True)[3].detach()
    torch.library.opcheck(scale_rows_op, (gradient, torch.rand(3, device=device)), test_utils=tests)


def test_on_a_device_products_may_be_deterministic_and_waits_be_watched() -> None:
    """Warnings are errors here: torch says each of these once in a process, in the middle of a
    test.
    """
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
    warnings.warn(
        "Synchronization debug mode is a prototype feature and does not yet detect all",
        stacklevel=1,
    )
    warnings.warn(
        "Attempting to run cuBLAS, but there was no current CUDA context! Attempting to",
        stacklevel=1,
    )


def test_rows_are_split_only_where_they_are_few() -> None:
    assert [part_length(rows, 128_256) >= 128_256 for rows in (1, 16, 131, 132, 8192)] == [
        False
    ] * 3 + [True] * 2
    # 8192: too short gains nothing
    assert part_length(1, 32_000) == 8192 and part_length(1, 1_000) == 8192
    for rows in (1, 2, 7, 64, 131):
        assert -(-262_144 // part_length(rows, 262_144)) <= 64


@pytest.mark.parametrize(("classes", "most"), [(70_144, 285), (128_256, 155), (151_936, None)])
def test_rows_are_split_where_that_ends_sooner(classes: int, most: int | None) -> None:
    """By the work of the busiest of 132 multiprocessors, in rows: whole waves of them, or the parts
    that fall to it. All rows have to be in L2 still when the second launch reads them: none of
    151,936 classes are."""
    lengths = {rows: part_length(rows, classes) for rows in range(132, 1000)}
    parts = {rows: -(-classes // length) for rows, length in lengths.items() if length < classes}
    assert max(parts, default=None) == most and 132 not in parts
    for rows, many in parts.items():
        assert (
            rows * classes * 2 <= 40e6
            and -(-rows * many // 132) * lengths[rows] < 0.97 * -(-rows // 132) * classes
        )
    assert most is None or -(-133 * parts[133] // 132) * lengths[133] < 0.6 * 2 * classes
    # a second launch takes as long as it would save
    assert part_length(133, 64_000) >= 64_000
