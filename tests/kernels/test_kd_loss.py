"""The fused loss against its float64 definition: error at most twice that of plain torch and one
unit in the last place.

On the CPU the kernels run in triton's interpreter, with `-m gpu` compiled on the device: the same
cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from typing import Any

import kernel_world as world
import numpy as np
import pytest
import torch
from kernel_cases import FACTORS, Case, covering, pairs_of
from kernel_world import Problem, run, usual
from torch import Tensor

CASES = covering()
# A student with classes that the teacher has not: some of these, and what meets the part of an even
# tail.
WIDER = [wider for case in CASES[::16] if (wider := replace(case, beyond=3)).sensible] + [
    Case(beyond=3, tail="uniform", labels="alike"),
    Case(beyond=100, tail="uniform", labels="in"),
    Case(
        num_classes=1272,
        beyond=500,
        tail="uniform",
        dtype=torch.bfloat16,
        temperature=1.37,
        inplace=True,
    ),
    Case(
        num_classes=1271,
        beyond=9,
        tail="uniform",
        layout="odd",
        softcap=5.0,
        logit_scale=0.3,
        temperature=1.0,
    ),
    Case(num_classes=7, beyond=3, tail="uniform", tail_mass=0.0),
    Case(num_classes=11, beyond=3),
    Case(num_classes=7, beyond=3, tail="renormalise", labels="alike"),
    Case(num_classes=11, beyond=3, divergence="tv"),
    Case(num_classes=1272, beyond=1000, tail="conditional", temperature=1.37, kept=64),
]


def judge(
    case: Case, problem: Problem, ran: world.Ran, draw: Callable[[int], Problem] | None = None
) -> None:
    """Values and gradient at most twice as wrong as plain float32 torch is in the worst
    of six draws (one of three rows may be right by luck), and one unit in the last place; nothing
    written outside the rows."""
    out, gradient, buffer, logits = ran
    classes = case.num_classes
    assert [t.dtype for t in out] == [torch.float32] * 3 and gradient.dtype == case.dtype
    found = world.missed(problem, (*out, gradient[:, :classes].cpu()))
    draws = []
    for seed in range(6):
        drawn = world.problem(case, seed) if draw is None else draw(seed)
        *values, slope = world.define(drawn, torch.float32)
        draws.append(world.missed(drawn, (*values, slope.to(case.dtype))))
    single, own = (torch.finfo(t).eps for t in (torch.float32, case.dtype))
    # backward's factor is a rounding of its own; triton's interpreter cuts off where it rounds
    own *= 2 if case.grad_output == "each" else 1
    for name, one in found.items():
        most = max(plain[name] for plain in draws)
        assert one <= world.allowed(
            most, own if name == "gradient" else single, case.temperature
        ), name
    assert bool((gradient[:, classes:] == 0).all())
    if not case.inplace:
        assert torch.equal(logits[:, :classes].cpu(), problem.logits)
        assert bool(logits[:, classes:].isnan().all())
    buffer.as_strided(logits.shape, logits.stride(), logits.storage_offset())[:] = torch.nan
    assert bool(buffer.isnan().all()), "written outside the rows"


@pytest.mark.parametrize("case", CASES + WIDER, ids=str)
def test_the_kernel_is_as_good_as_plain_arithmetic(case: Case, device: str) -> None:
    problem = world.problem(case)
    judge(case, problem, run(problem, device))


def least_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """2^x and a / b as wrong as PTX's manual lets a device be, 2^-22, by what looks like chance; 0
    below 2^-126.
    """
    from triton.runtime import interpreter

    def off(x: Any) -> Any:
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
        chance = ((bits * np.uint64(2654435761) + np.uint64(12345)) >> np.uint64(9)) & np.uint64(
            0xFFFF
        )
        return 1 + np.where(x == np.floor(x), 0, 2.0**-22 * (chance / 32768.0 - 1))

    def exp2(self: Any, x: Any) -> Any:
        y = np.exp2(x.data.astype(np.float64)) * off(x.data)
        return interpreter.TensorHandle(
            np.where(np.abs(y) < 2.0**-126, 0, y).astype(np.float32), x.dtype.scalar
        )

    def fdiv(self: Any, x: Any, y: Any) -> Any:
        quotient = x.data.astype(np.float64) / y.data
        return interpreter.TensorHandle(
            (quotient * off(quotient)).astype(np.float32), x.dtype.scalar
        )

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_exp2", exp2)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fdiv", fdiv)


@pytest.mark.parametrize(
    "case",
    [
        Case(labels="none"),
        Case(labels="ignored", temperature=1.0),
        Case(num_classes=1271),
        Case(temperature=3.0),
        Case(labels="two", logits="constant"),
        Case(temperature=4.0, logits="constant"),
        Case(softcap=5.0),
    ],
    ids=str,
)
def test_a_device_as_wrong_as_it_may_be_keeps_the_rule_of_compiled_kernels(
    case: Case, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device != "cpu":
        pytest.skip("a device is as wrong as it is")
    problem = world.problem(case)
    least_exact(monkeypatch)
    ran = run(problem, device)
    monkeypatch.setattr(world, "compiled", lambda: True)
    judge(case, problem, ran)


def test_the_cases_cover_every_pair() -> None:
    pairs = {pair for case in CASES for pair in pairs_of(case)}
    for first in FACTORS:
        for second in (name for name in list(FACTORS)[list(FACTORS).index(first) + 1 :]):
            for a in FACTORS[first]:
                for b in FACTORS[second]:
                    if Case(**{first: a, second: b}).sensible:
                        assert ((first, a), (second, b)) in pairs


FULL = [
    Case(num_classes=123),
    Case(num_classes=1000, dtype=torch.bfloat16, inplace=True, labels="two", weights="some"),
    Case(
        num_classes=7,
        labels="none",
        divergence="jsd",
        temperature=0.5,
        layout="strided",
        grad_output="each",
    ),
    Case(
        num_classes=5000,
        labels="twice",
        divergence="reverse_kl",
        temperature=4.0,
        layout="padded",
        logit_scale=0.3,
    ),
    Case(
        num_classes=1272,
        labels="some",
        divergence="tv",
        layout="odd",
        dtype=torch.float16,
        inplace=True,
    ),
    Case(
        num_classes=10,
        labels="ignored",
        logits="apart",
        temperature=1.37,
        weights="some",
    ),
    Case(num_classes=10, logits="offset", rows=1, temperature=1.0),
    Case(num_classes=1, rows=3),
    Case(rows=0),
    Case(num_classes=123, softcap=5.0, labels="two"),
    Case(
        num_classes=1272,
        softcap=30.0,
        logit_scale=0.3,
        labels="some",
        weights="some",
        layout="padded",
    ),
    Case(num_classes=128, beyond=5, labels="alike"),
    Case(num_classes=1272, beyond=8, dtype=torch.bfloat16),
    Case(num_classes=40, beyond=33, divergence="jsd", layout="odd", temperature=1.0, softcap=5.0),
    Case(num_classes=123, beyond=5, divergence="tv", weights="some", inplace=True, logit_scale=0.3),
    Case(
        num_classes=123,
        beyond=5,
        divergence="reverse_kl",
        tail="conditional",
        logits="apart",
    ),
    Case(
        num_classes=64,
        beyond=8,
        tail="conditional",
        labels="two",
        temperature=1.37,
        dtype=torch.float16,
    ),
]


@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_teacher_over_all_classes(case: Case, device: str) -> None:
    """The same rows, given in id order, are the K = V of the definition; a wider student has a tail
    besides.
    """

    def draw(seed: int) -> Problem:
        problem = world.problem(replace(case, kept=case.num_classes), seed)
        log_q = torch.log_softmax(torch.randn(case.rows, case.taught), -1)
        ids = torch.arange(case.taught).expand(case.rows, -1)
        return replace(
            problem,
            keywords=problem.keywords
            | {"ids": ids, "log_probs": log_q, "log_tail": torch.full((case.rows,), -torch.inf)},
        )

    problem = draw(0)
    judge(case, problem, run(problem, device, ids=None, log_tail=None), draw)


@pytest.mark.parametrize(
    ("tail", "full"),
    [
        ("bucket", False),
        ("uniform", False),
        ("conditional", False),
        ("bucket", True),
        ("conditional", True),
    ],
)
def test_classes_of_the_student_alone_may_be_far_above_the_others(
    tail: str, full: bool, device: str
) -> None:
    """Their exponentials are the row's; "conditional" does not see them, and keeps all its digits."""
    case = Case(beyond=5, tail=tail, labels="alike", weights="some", kept=118 if full else 8)

    def draw(seed: int) -> Problem:
        problem = world.problem(case, seed)
        problem.logits[:, case.taught :] += 500
        if not full:
            return problem
        log_q = torch.log_softmax(torch.randn(3, case.taught), -1)
        return replace(
            problem,
            keywords=problem.keywords
            | {
                "ids": torch.arange(case.taught).expand(3, -1),
                "log_probs": log_q,
                "log_tail": torch.full((3,), -torch.inf),
            },
        )

    problem = draw(0)
    judge(
        case,
        problem,
        run(problem, device, **({"ids": None, "log_tail": None} if full else {})),
        draw,
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_logit_spoils_its_own_row_and_no_other(value: float, device: str) -> None:
    problem = usual()
    good, gradient, *_ = run(problem, device)
    problem.logits[1, 5] = value
    with pytest.MonkeyPatch.context() as patch:
        # the interpreter's warns of rows that are all NaN
        patch.setattr(np, "nanmax", np.fmax.reduce)
        bad, spoilt, *_ = run(problem, device)
    for a, b in zip(good, bad, strict=True):
        assert bool(b[1].isnan()) and torch.equal(a[[0, 2]], b[[0, 2]])
    assert torch.equal(gradient[[0, 2]], spoilt[[0, 2]]) and bool(spoilt[1].isnan().any())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_a_row_that_does_not_count_may_hold_anything(
    full: bool, inplace: bool, device: str
) -> None:
    problem = usual(labels="some", weights="some", inplace=inplace)
    problem.keywords["row_weight"][:] = torch.tensor([0.0, 1.0, 1.0])
    problem.logits[0] = torch.nan
    problem.keywords["ids"][0] = 10**9
    if full:
        problem.keywords.update(
            ids=None, log_tail=None, log_probs=torch.log_softmax(torch.randn(3, 123), -1)
        )
        problem.keywords["log_probs"][0] = torch.nan
    out, gradient, *_ = run(problem, device)
    assert [float(t[0]) for t in out] == [0, 0, 0] and bool((gradient[0] == 0).all())
    assert bool(torch.cat(out).isfinite().all()) and bool(gradient.isfinite().all())


def test_a_row_without_a_teacher_is_plain_cross_entropy_whatever_its_ids(device: str) -> None:
    problem = usual(weights="some")
    # the same id again and again, of weight 0
    problem.keywords["ids"][1] = problem.logits[1].argmax()
    out, gradient, *_ = run(problem, device)
    x = problem.logits.double().requires_grad_()
    ce = torch.nn.functional.cross_entropy(x[1], problem.keywords["labels"][1]) * float(
        problem.keywords["ce_scale"]
    )
    ce.backward()
    assert x.grad is not None and float(out[2][1]) == 0
    torch.testing.assert_close(
        out[0][1].double(), ce.detach(), rtol=1e-6, atol=0, check_dtype=False
    )
    torch.testing.assert_close(gradient[1].cpu().double(), x.grad[1], rtol=1e-5, atol=1e-7)


def test_the_tail_keeps_its_gradient_where_its_mass_underflows(device: str) -> None:
    """Student mass of the tail e^-400: off the support the gradient is -q_t times a softmax over
    the tail.
    """
    problem = usual(temperature=1.0, tail_mass=0.5, labels="none", kept=1)
    problem.logits[:] -= 400
    problem.logits.scatter_(1, problem.keywords["ids"], 0.0)
    _, gradient, *_ = run(problem, device)
    x = problem.logits.double().scatter(1, problem.keywords["ids"], -torch.inf)
    share = torch.softmax(x, -1) * -0.5 * float(problem.keywords["kd_scale"])
    off = x > -torch.inf
    torch.testing.assert_close(gradient.cpu().double()[off], share[off], rtol=1e-5, atol=0)


@pytest.mark.parametrize("mass", [0.0, 0.5])
def test_a_tail_without_a_finite_logit_takes_no_part(mass: float, device: str) -> None:
    problem = usual(tail_mass=mass, labels="in", kept=64)
    ids = problem.keywords["ids"]
    held = torch.zeros(3, 124, dtype=torch.bool).scatter(1, torch.where(ids < 0, 123, ids), True)[
        :, :123
    ]
    problem.logits[~held] = -torch.inf
    out, gradient, *_ = run(problem, device)
    assert bool((gradient.cpu()[~held] == 0).all()) and bool(gradient.isfinite().all())
    # a tail that the student excludes costs infinitely much
    assert bool(out[2].isfinite().all()) == (mass == 0)


def test_an_aligned_rows_bits_depend_on_that_row_alone(device: str) -> None:
    """A row of odd length starts anywhere within 16 bytes; where it starts decides which lane adds
    which element.
    """
    whole = usual(num_classes=1272)
    together, gradient, *_ = run(whole, device)
    for n in range(3):
        keywords = {
            name: value[n : n + 1] if isinstance(value, Tensor) and value.dim() else value
            for name, value in whole.keywords.items()
        }
        out, own, *_ = run(
            Problem(
                Case(rows=1, num_classes=1272), whole.logits[n : n + 1], keywords, torch.ones(1)
            ),
            device,
        )
        assert all(torch.equal(a[n : n + 1], b) for a, b in zip(together, out, strict=True))
        assert torch.equal(gradient[n : n + 1], own)


@pytest.mark.parametrize(
    "changed", ["labels", "log_probs", "ids", "temperature", "ce_scale", "kd_scale"]
)
def test_the_gradient_depends_on(changed: str, device: str) -> None:
    problem = usual()
    _, before, *_ = run(problem, device)
    k = problem.keywords
    ids = torch.where(k["ids"] >= 0, (k["ids"] + 1) % 123, -1)
    other = {
        "labels": k["labels"] - 1,
        "log_probs": k["log_probs"] - 0.5,
        "ids": ids,
        "temperature": 4.0,
        "ce_scale": torch.tensor(0.1),
        "kd_scale": torch.tensor(0.1),
    }
    k[changed] = other[changed]
    _, after, *_ = run(problem, device)
    assert bool((before - after).abs().amax(1).gt(1e-4).all())


SPLIT = [
    Case(
        num_classes=32000,
        temperature=1.37,
        labels="two",
        inplace=True,
        kept=64,
        tail="uniform",
    ),
    Case(num_classes=1272, labels="in"),
    Case(
        num_classes=1271,
        layout="odd",
        labels="some",
        weights="some",
        dtype=torch.bfloat16,
        grad_output="each",
        softcap=30.0,
    ),
    Case(
        num_classes=1272,
        layout="padded",
        temperature=0.5,
        labels="twice",
        divergence="jsd",
        inplace=True,
        kept=100,
    ),
    Case(num_classes=1271, layout="strided", labels="none", tail="conditional"),
    Case(num_classes=123, labels="none", tail="uniform", kept=100, softcap=5.0, temperature=3.0),
    Case(
        num_classes=1272,
        labels="ignored",
        logits="minus_inf",
        tail_mass=0.0,
        rows=1,
        dtype=torch.float16,
    ),
    Case(
        num_classes=1272,
        logits="offset",
        tail="uniform",
        logit_scale=0.3,
        temperature=1.5,
    ),
    Case(
        num_classes=1271, layout="odd", tail="uniform", labels="alike", beyond=400, temperature=1.37
    ),
    Case(num_classes=1272, tail="uniform", logits="minus_inf", tail_mass=0.0, beyond=1000),
]


@pytest.mark.parametrize(("case", "parts"), list(zip(SPLIT, cycle((5, 2)), strict=False)), ids=str)
def test_programs_may_share_a_row(case: Case, parts: int, device: str) -> None:
    problem = world.problem(case)
    judge(case, problem, run(problem, device, parts=parts))
