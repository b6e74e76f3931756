"""The fused loss against its float64 definition: error at most twice that of plain torch and one unit in the last
place.

On the CPU the kernels run in triton's interpreter, with `-m gpu` compiled on the device: the same cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import kernel_world as world
import numpy as np
import pytest
import torch
from kernel_world import Case, Problem
from torch import Tensor

from kdcache.kernels.kd_loss import kd_loss_rows

CASES = world.covering()


def on(device: str, keywords: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in keywords.items()}


def run(problem: Problem, device: str, **changed: Any) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]:
    """((loss, CE, D), gradient, buffer, logits) of the kernel."""
    buffer, logits = world.laid_out(problem, device)
    logits = logits.detach().requires_grad_()
    keywords = on(device, problem.keywords | {"inplace": problem.case.inplace} | changed)
    out = kd_loss_rows(logits, **keywords)
    (gradient,) = torch.autograd.grad(out[0], logits, problem.factor.to(device))
    return tuple(t.detach().cpu() for t in out), gradient, buffer, logits.detach()


def error(found: Tensor, truth: Tensor, least: float = 0.0) -> float:
    """Largest error relative to the largest entry of its row, but to no less than `least`."""
    if not truth.numel():
        return 0.0
    found, truth = found.double().reshape(len(truth), -1), truth.reshape(len(truth), -1)
    size = truth.abs().amax(1).clamp(min=max(least, 1e-30))
    return float((torch.where(found == truth, 0, (found - truth).abs()).amax(1) / size).max())


def errors(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> list[float]:
    """Of loss, CE, D and gradient. A divergence is a sum of terms of about 1 nat that cancel: its unit is that of 1."""
    return [error(f, t, least) for f, t, least in zip(found, truth, (1.0, 1.0, 1.0, 0.0), strict=True)]


def plain_errors(case: Case, draw: Callable[[int], Problem] | None = None) -> list[float]:
    """What plain float32 torch misses the truth by, at most, in some draws: one of three rows may be right by luck."""
    draws = []
    for seed in range(6):
        problem = world.problem(case, seed) if draw is None else draw(seed)
        *values, gradient = world.define(problem, torch.float32)
        draws.append(errors((*values, gradient.to(case.dtype)), world.define(problem, torch.float64)))
    return [max(each) for each in zip(*draws, strict=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_as_good_as_plain_arithmetic(case: Case, device: str) -> None:
    problem = world.problem(case)
    classes = case.num_classes
    out, gradient, buffer, logits = run(problem, device)
    assert [t.dtype for t in out] == [torch.float32] * 3 and gradient.dtype == case.dtype
    found = errors((*out, gradient[:, :classes].cpu()), world.define(problem, torch.float64))
    single, own = (torch.finfo(t).eps for t in (torch.float32, case.dtype))
    for one, plain, unit in zip(found, plain_errors(case), (single, single, single, own), strict=True):
        assert one <= 2 * plain + unit
    assert bool((gradient[:, classes:] == 0).all())
    kept = buffer.clone()
    kept.as_strided(logits.shape, logits.stride(), logits.storage_offset())[:] = torch.nan
    assert bool(kept.isnan().all()), "written outside the rows"
    if not case.inplace:
        assert torch.equal(logits[:, :classes].cpu(), problem.logits)
        assert bool(logits[:, classes:].isnan().all())


def test_the_cases_cover_every_pair() -> None:
    pairs = {pair for case in CASES for pair in world._pairs(case)}
    for first in world.FACTORS:
        for second in (name for name in list(world.FACTORS)[list(world.FACTORS).index(first) + 1 :]):
            for a in world.FACTORS[first]:
                for b in world.FACTORS[second]:
                    if Case(**{first: a, second: b}).sensible:
                        assert ((first, a), (second, b)) in pairs


FULL = [
    Case(num_classes=123), Case(num_classes=1000, dtype=torch.bfloat16, inplace=True, labels="two", weights="some"),
    Case(num_classes=7, labels="none", divergence="jsd", temperature=0.5, layout="strided", grad_output="each"),
    Case(num_classes=5000, labels="twice", divergence="reverse_kl", temperature=4.0, layout="padded"),
    Case(num_classes=1272, labels="some", divergence="tv", layout="odd", dtype=torch.float16, inplace=True),
    Case(num_classes=10, labels="ignored", logits="apart", temperature=1.37, weights="some"),
    Case(num_classes=10, logits="offset", rows=1, temperature=1.0), Case(num_classes=1, rows=3), Case(rows=0),
]


@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_teacher_over_all_classes(case: Case, device: str) -> None:
    """The same rows, given in id order, are the K = V of the definition."""
    def draw(seed: int) -> Problem:
        problem = world.problem(replace(case, kept=case.num_classes), seed)
        log_q = torch.log_softmax(torch.randn(case.rows, case.num_classes), -1)
        ids = torch.arange(case.num_classes).expand(case.rows, -1)
        return replace(problem, keywords=problem.keywords | {"ids": ids, "log_probs": log_q,
                                                             "log_tail": torch.full((case.rows,), -torch.inf)})

    problem = draw(0)
    out, gradient, buffer, logits = run(problem, device, ids=None, log_tail=None)
    found = errors((*out, gradient[:, : case.num_classes].cpu()), world.define(problem, torch.float64))
    single, own = (torch.finfo(t).eps for t in (torch.float32, case.dtype))
    for one, plain, unit in zip(found, plain_errors(case, draw), (single, single, single, own), strict=True):
        assert one <= 2 * plain + unit
    assert bool((gradient[:, case.num_classes :] == 0).all())
    kept = buffer.clone()
    kept.as_strided(logits.shape, logits.stride(), logits.storage_offset())[:] = torch.nan
    assert bool(kept.isnan().all()), "written outside the rows"


def usual(**changed: Any) -> Problem:
    return world.problem(Case(**changed))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_logit_spoils_its_own_row_and_no_other(value: float, device: str) -> None:
    problem = usual()
    good, gradient, *_ = run(problem, device)
    problem.logits[1, 5] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "nanmax", np.fmax.reduce)             # the interpreter's warns of rows that are all NaN
        bad, spoilt, *_ = run(problem, device)
    for a, b in zip(good, bad, strict=True):
        assert bool(b[1].isnan()) and torch.equal(a[[0, 2]], b[[0, 2]])
    assert torch.equal(gradient[[0, 2]], spoilt[[0, 2]]) and bool(spoilt[1].isnan().any())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_a_row_that_does_not_count_may_hold_anything(full: bool, inplace: bool, device: str) -> None:
    problem = usual(labels="some", weights="some", inplace=inplace)
    problem.keywords["row_weight"][:] = torch.tensor([0.0, 1.0, 1.0])
    problem.logits[0] = torch.nan
    problem.keywords["ids"][0] = 10**9
    if full:
        problem.keywords.update(ids=None, log_tail=None, log_probs=torch.log_softmax(torch.randn(3, 123), -1))
        problem.keywords["log_probs"][0] = torch.nan
    out, gradient, *_ = run(problem, device)
    assert [float(t[0]) for t in out] == [0, 0, 0] and bool((gradient[0] == 0).all())
    assert bool(torch.cat(out).isfinite().all()) and bool(gradient.isfinite().all())


def test_a_row_without_a_teacher_is_plain_cross_entropy_whatever_its_ids(device: str) -> None:
    problem = usual(weights="some")
    problem.keywords["ids"][1] = 3                              # the same id again and again, of weight 0
    out, gradient, *_ = run(problem, device)
    x = problem.logits.double().requires_grad_()
    ce = torch.nn.functional.cross_entropy(x[1], problem.keywords["labels"][1]) * float(problem.keywords["ce_scale"])
    ce.backward()
    assert x.grad is not None and float(out[2][1]) == 0
    torch.testing.assert_close(out[0][1].double(), ce.detach(), rtol=1e-6, atol=0, check_dtype=False)
    torch.testing.assert_close(gradient[1].cpu().double(), x.grad[1], rtol=1e-5, atol=1e-7)


def test_the_tail_keeps_its_gradient_where_its_mass_underflows(device: str) -> None:
    """Student mass of the tail e^-400: off the support the gradient is -q_t times a softmax over the tail."""
    problem = usual(temperature=1.0, tail_mass=0.5, labels="none", kept=1)
    problem.logits[:] -= 400
    problem.logits.scatter_(1, problem.keywords["ids"], 0.0)
    _, gradient, *_ = run(problem, device)
    x = problem.logits.double().scatter(1, problem.keywords["ids"], -torch.inf)
    share = torch.softmax(x, -1) * -0.5 * float(problem.keywords["kd_scale"])
    off = x > -torch.inf
    torch.testing.assert_close(gradient.cpu().double()[off], share[off], rtol=1e-5, atol=0)


def test_an_aligned_rows_bits_depend_on_that_row_alone(device: str) -> None:
    """A row of odd length starts anywhere within 16 bytes; where it starts decides which lane adds which element."""
    whole = usual(num_classes=1272)
    together, gradient, *_ = run(whole, device)
    for n in range(3):
        keywords = {name: value[n : n + 1] if isinstance(value, Tensor) and value.dim() else value
                    for name, value in whole.keywords.items()}
        out, own, *_ = run(Problem(Case(rows=1, num_classes=1272), whole.logits[n : n + 1], keywords, torch.ones(1)),
                           device)
        assert all(torch.equal(a[n : n + 1], b) for a, b in zip(together, out, strict=True))
        assert torch.equal(gradient[n : n + 1], own)


@pytest.mark.parametrize("changed", ["labels", "log_probs", "ids", "temperature", "ce_scale", "kd_scale"])
def test_the_gradient_depends_on(changed: str, device: str) -> None:
    problem = usual()
    _, before, *_ = run(problem, device)
    k = problem.keywords
    ids = torch.where(k["ids"] >= 0, (k["ids"] + 1) % 123, -1)
    other = {"labels": k["labels"] - 1, "log_probs": k["log_probs"] - 0.5, "ids": ids,
             "temperature": 4.0, "ce_scale": torch.tensor(0.1), "kd_scale": torch.tensor(0.1)}
    k[changed] = other[changed]
    _, after, *_ = run(problem, device)
    assert bool((before - after).abs().amax(1).gt(1e-4).all())


def test_a_part_without_a_scale_is_reported_and_not_in_the_loss(device: str) -> None:
    for name, value, other in (("ce_scale", 1, 2), ("kd_scale", 2, 1)):
        out, gradient, *_ = run(usual(), device, **{name: None})
        expected, zero, *_ = run(usual(), device, **{name: 0.0})
        assert torch.equal(out[value], expected[value]) and bool((out[value] > 0).all())
        assert torch.equal(out[0], expected[0]) and torch.equal(gradient, zero)
        assert float(usual().keywords[("ce_scale", "kd_scale")[other - 1]]) * float(out[other][0]) == pytest.approx(
            float(out[0][0]))


def test_without_a_gradient_only_the_values_are_computed(device: str) -> None:
    problem = usual(inplace=True)
    expected, *_ = run(problem, device)
    _, logits = world.laid_out(problem, device)
    with torch.no_grad():
        out = kd_loss_rows(logits.requires_grad_(), **on(device, problem.keywords), inplace=True)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, out, strict=True))
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
    logits = (x.t().contiguous().t() if change == "transposed" else x[:1].expand(3, -1)).requires_grad_()
    assert logits.stride() != x.stride()
    out = kd_loss_rows(logits, **on(device, problem.keywords), inplace=True)
    (found,) = torch.autograd.grad(out[0].sum(), logits)
    assert torch.equal(out[0].detach().cpu(), expected[0]) and torch.equal(found, gradient)
    assert torch.equal(logits.detach().cpu(), problem.logits)


@pytest.mark.parametrize(("changed", "message"), [
    ({"temperature": 0.0}, "temperature is 0.0"), ({"divergence": "forward"}, "divergence 'forward'"),
    ({"tail": "drop"}, "tail 'drop'"), ({"num_classes": 124}, "num_classes is 124"),
    ({"labels": None, "label_weight": None, "ids": None, "log_probs": None}, "neither labels nor log_probs"),
    ({"log_tail": None}, "log_tail belong together"), ({"log_probs": torch.zeros(3, 7)}, "must be alike"),
    ({"labels": torch.zeros(2, dtype=torch.long)}, "labels is"), ({"ids": torch.zeros(3, 8)}, "ids is"),
    ({"ids": None, "log_tail": None}, "expected .N, 123."),
    ({"divergence": "reverse_kl", "tail": "sampled"}, "is infinite"), ({"row_weight": torch.ones(2)}, "does not go"),
])
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
    keywords = {k: v.expand(rows, *v.shape[1:]) if isinstance(v, Tensor) and v.dim() else v
                for k, v in on(device, problem.keywords).items()}
    out = kd_loss_rows(logits, **keywords, inplace=True)
    (gradient,) = torch.autograd.grad(out[0].sum(), logits)
    assert bool((out[0] == out[0][0]).all()) and torch.equal(gradient[0], gradient[-1])


@pytest.mark.parametrize("layout", ["plain", "strided", "padded"])
def test_one_graph_under_torch_compile(layout: str, device: str) -> None:
    """No graph break, the same bits as eager, and one graph for all batch sizes."""
    problem = usual(layout=layout, dtype=torch.bfloat16)
    expected, gradient, *_ = run(problem, device)
    keywords = on(device, problem.keywords)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def loss(logits: Tensor, keywords: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        return kd_loss_rows(logits, **keywords)

    def step(rows: int) -> tuple[tuple[Tensor, ...], Tensor]:
        _, view = world.laid_out(problem, device)
        logits = torch.empty_strided((rows, view.shape[1]), view.stride(), dtype=view.dtype, device=device)
        logits.copy_(view[:rows]).requires_grad_()
        out = loss(logits, {k: v[:rows].clone() if isinstance(v, Tensor) and v.dim() else v
                            for k, v in keywords.items()})
        return out, torch.autograd.grad(out[0].sum(), logits)[0]

    for rows in (3, 2):
        out, found = step(rows)
        assert all(torch.equal(a.detach().cpu(), b[:rows]) for a, b in zip(out, expected, strict=True))
        assert torch.equal(found, gradient[:rows])
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_the_operators_keep_their_promises_to_torch(device: str) -> None:
    from kdcache.kernels.kd_ops import kd_rows_op, scale_rows_op

    problem = usual(num_classes=1272)
    k = on(device, problem.keywords)
    logits = problem.logits.to(device).requires_grad_()
    inputs = (logits, k["labels"][:, None], None, k["ids"], k["log_probs"], k["log_tail"], None, k["ce_scale"],
              k["kd_scale"], 1272, 2.0, "forward_kl", "bucket", 0.5)
    torch.use_deterministic_algorithms(False)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(kd_rows_op, (*inputs, True), test_utils=tests)
    torch.library.opcheck(scale_rows_op, (logits.detach(), torch.rand(3, device=device)), test_utils=tests)
