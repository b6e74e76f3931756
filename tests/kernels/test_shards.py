"""Columns of logits split over ranks: values and every rank's gradient against the float64
definition of whole rows.

The rule is the kernels' own: error at most twice that of plain float32 torch and one unit in the
last place. On the CPU the kernels run in triton's interpreter, with `-m gpu` compiled on the
device: the same cases.
"""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import kernel_world as world
import numpy as np
import pytest
import torch
import torch.distributed as dist
from kernel_world import Case, Problem, on, usual
from torch import Tensor

from kdcache.kernels.kd_shards import (
    VocabShard,
    merge_sums,
    shard_sums,
    sharded_loss,
    vocab_parallel_loss,
)

GIVEN = (
    "labels",
    "label_weight",
    "ids",
    "log_probs",
    "log_tail",
    "row_weight",
    "temperature",
    "divergence",
    "tail",
    "ce_scale",
    "kd_scale",
)


def errors(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> list[float]:
    """Of loss, CE, D and gradient; a divergence is a sum of terms of about 1 nat, which is its
    unit.
    """
    return [
        world.error(f, t, least)
        for f, t, least in zip(found, truth, (1.0, 1.0, 1.0, 0.0), strict=True)
    ]


def bounds_of(case: Case) -> list[float]:
    """Twice what plain float32 torch misses the truth by in the worst of six draws, and one unit in
    the last place.
    """
    draws = []
    for problem in (world.problem(case, seed) for seed in range(6)):
        *values, gradient = world.define(problem, torch.float32)
        draws.append(
            errors((*values, gradient.to(case.dtype)), world.define(problem, torch.float64))
        )
    single, own = (torch.finfo(t).eps for t in (torch.float32, case.dtype))
    return [
        world.allowed(max(plain), unit, case.temperature)
        for *plain, unit in zip(*draws, (single, single, single, own), strict=True)
    ]


def cuts(width: int, shards: int, seed: int) -> list[int]:
    """Where shards begin, and the end: two at whole vectors, more of them anywhere, so of any width
    and parity.
    """
    chance, step = random.Random(seed), 8 if shards == 2 else 1
    return [
        0,
        *sorted(chance.randrange(width + 1) // step * step for _ in range(shards - 1)),
        width,
    ]


def shards_of(
    whole: Tensor, keywords: dict[str, Any], at: list[int]
) -> list[tuple[Tensor, VocabShard]]:
    """Slices of the logits' own memory, and what their ranks know."""
    given = {name: keywords[name] for name in GIVEN}
    return [
        (
            whole[:, a:b].detach().requires_grad_(),
            VocabShard(first_class=a, num_classes=keywords["num_classes"], **given),
        )
        for a, b in pairwise(at)
    ]


def run_shards(
    problem: Problem, device: str, at: list[int]
) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]:
    """((loss, CE, D), gradient, buffer, logits) of all shards, each of which writes its own columns
    of one buffer.
    """
    buffer, whole = world.laid_out(problem, device)
    ranks = shards_of(whole, on(device, problem.keywords), at)
    before = buffer.view(torch.uint8).clone()
    sums = [shard_sums(part, shard) for part, shard in ranks]
    assert torch.equal(buffer.view(torch.uint8), before), "the sums left the logits changed"
    sums_N8 = merge_sums(sums, ranks[0][1])
    gradient, values = torch.full_like(whole, torch.nan), []
    for (part, shard), (first, last) in zip(ranks, pairwise(at), strict=True):
        out = sharded_loss(part, sums_N8, shard, inplace=problem.case.inplace)
        (gradient[:, first:last],) = torch.autograd.grad(out[0], part, problem.factor.to(device))
        values.append([t.detach().cpu() for t in out])
    # shards of other widths add a teacher's terms in another order
    for other in values[1:]:
        for a, b in zip(values[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)
    return tuple(values[0]), gradient, buffer, whole


CASES = [
    (Case(), 1),
    (Case(), 2),
    (Case(), 3),
    (Case(), 5),
    (Case(temperature=1.0, num_classes=1272, dtype=torch.bfloat16, inplace=True, kept=64), 2),
    (
        Case(
            temperature=0.5,
            num_classes=1271,
            layout="odd",
            labels="two",
            inplace=True,
            weights="some",
        ),
        3,
    ),
    (
        Case(
            temperature=1.37,
            num_classes=32000,
            dtype=torch.bfloat16,
            labels="in",
            layout="padded",
            inplace=True,
        ),
        5,
    ),
    (Case(temperature=1.37, kept=100, logits="offset", labels="twice", grad_output="each"), 3),
    (Case(temperature=1.5, labels="some", layout="strided", dtype=torch.float16, tail_mass=0.5), 2),
    (
        Case(
            temperature=4.0,
            num_classes=1271,
            labels="two",
            logits="apart",
            inplace=True,
            grad_output="half",
        ),
        5,
    ),
    (Case(temperature=4.0, labels="none", logits="constant", kept=64), 3),
    (Case(num_classes=7, kept=1), 5),
    (Case(temperature=3.0, num_classes=7, kept=8, labels="in", layout="odd"), 3),
    (Case(rows=0), 2),
    (Case(labels="ignored", logits="minus_inf", tail_mass=0.0, rows=1), 3),
    (Case(tail_mass=1.0, labels="two"), 2),
    (Case(temperature=1.0, tail_mass=1e-9, logits="apart", labels="in", dtype=torch.bfloat16), 5),
    (Case(tail="renormalise", labels="two", weights="some", layout="padded", inplace=True), 3),
    (Case(tail="renormalise", labels="none", logits="offset", temperature=1.37, tail_mass=0.5), 2),
    (
        Case(
            tail="conditional", labels="some", num_classes=1272, dtype=torch.float16, inplace=True
        ),
        3,
    ),
    (Case(tail="conditional", labels="none", logits="apart", layout="odd", temperature=1.5), 5),
    (Case(tail="sampled", labels="in", temperature=0.5, weights="some", kept=64), 2),
    (
        Case(
            tail="sampled", labels="none", logits="constant", num_classes=1271, dtype=torch.bfloat16
        ),
        5,
    ),
    (Case(divergence="reverse_kl"), 1),
    (Case(divergence="reverse_kl", labels="none", logits="constant"), 3),
    (
        Case(
            divergence="reverse_kl",
            temperature=1.37,
            labels="two",
            logits="offset",
            kept=64,
            inplace=True,
        ),
        5,
    ),
    (
        Case(
            divergence="reverse_kl",
            temperature=4.0,
            tail_mass=1e-9,
            layout="padded",
            dtype=torch.bfloat16,
        ),
        2,
    ),
    (
        Case(
            divergence="reverse_kl",
            tail="conditional",
            labels="some",
            weights="some",
            layout="strided",
        ),
        3,
    ),
    (Case(labels="alike", beyond=5), 3),
]


@pytest.mark.parametrize(("case", "shards"), CASES, ids=lambda one: str(one) or "usual")
def test_shards_are_as_good_as_plain_arithmetic(case: Case, shards: int, device: str) -> None:
    problem, classes = world.problem(case), case.num_classes
    width = world.laid_out(problem, "cpu")[1].shape[1]
    out, gradient, buffer, whole = run_shards(problem, device, cuts(width, shards, seed=shards))
    assert [t.dtype for t in out] == [torch.float32] * 3 and gradient.dtype == case.dtype
    bounds, found = bounds_of(case), (*out, gradient[:, :classes].cpu())
    for one, bound in zip(errors(found, world.define(problem, torch.float64)), bounds, strict=True):
        assert one <= bound
    # the kernel of whole rows is held to the same rule: they differ by at most both
    if shards == 1:
        rows, rows_gradient, *_ = world.run(problem, device)
        whole_rows = tuple(t.double().cpu() for t in (*rows, rows_gradient[:, :classes]))
        assert all(
            one <= 2 * bound for one, bound in zip(errors(found, whole_rows), bounds, strict=True)
        )
    assert bool((gradient[:, classes:] == 0).all())
    if case.inplace:
        assert torch.equal(gradient, whole)
    else:
        assert torch.equal(whole[:, :classes].cpu(), problem.logits) and bool(
            whole[:, classes:].isnan().all()
        )
    buffer.as_strided(whole.shape, whole.stride(), whole.storage_offset())[:] = torch.nan
    assert bool(buffer.isnan().all()), "written outside the rows"


def defined_sums(problem: Problem, top_N: Tensor, columns: slice) -> Tensor:
    """The eight sums of a shard from their formulas in float64, relative to the given logits."""
    k, rows = problem.keywords, []
    for n, top in enumerate(top_N.double()):
        x = problem.logits[n].double() - top
        own = torch.zeros_like(x, dtype=torch.bool)
        own[columns] = True
        valid = (ids := k["ids"][n]) >= 0
        ids, log_q = ids[valid], k["log_probs"][n][valid].double()
        mine = own[ids]
        kept, log_q = ids[mine], log_q[mine]
        tail = own.clone()
        tail[kept] = False
        score, y = x / problem.case.temperature, k["labels"][n]
        cross = (
            log_q.exp() * score[kept]
            if k["divergence"] == "forward_kl"
            else score[kept].exp() * (score[kept] - log_q)
        )
        rows.append(
            torch.stack(
                [
                    top,
                    x[own].exp().sum(),
                    score[tail].exp().sum(),
                    score[kept].exp().sum(),
                    cross.sum(),
                    log_q.exp().sum(),
                    torch.where(own[y], x[y], 0),
                    own[y].double(),
                ]
            )
        )
    return torch.stack(rows)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("temperature", [0.5, 2.0, 1.37])
def test_the_eight_sums_are_what_they_are_said_to_be(
    temperature: float, divergence: str, device: str
) -> None:
    problem = usual(temperature=temperature, logits="offset", divergence=divergence)
    _, whole = world.laid_out(problem, device)
    for a, b, (part, shard) in zip(
        (0, 40),
        (40, 123),
        shards_of(whole, on(device, problem.keywords), [0, 40, 123]),
        strict=True,
    ):
        sums = shard_sums(part, shard).cpu().double()
        largest = problem.logits[:, a:b].amax(1).double()
        assert bool(
            ((sums[:, 0] - largest).abs() <= 4 * torch.finfo(torch.float32).eps * largest).all()
        )
        torch.testing.assert_close(
            sums, defined_sums(problem, sums[:, 0], slice(a, b)), rtol=3e-6, atol=3e-6
        )


def test_sums_merge_in_any_order_and_by_parts(device: str) -> None:
    problem = usual(logits="apart", labels="two")
    _, whole = world.laid_out(problem, device)
    ranks = shards_of(whole, on(device, problem.keywords), [0, 3, 40, 41, 123])
    a, b, c, d = (shard_sums(part, shard) for part, shard in ranks)
    shard = ranks[0][1]
    whole_N8 = merge_sums([a, b, c, d], shard)
    assert torch.equal(merge_sums([whole_N8], shard), whole_N8)
    for other in (
        merge_sums([d, b, a, c], shard),
        merge_sums([merge_sums([a, c], shard), merge_sums([b, d], shard)], shard),
    ):
        torch.testing.assert_close(other, whole_N8, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize(("tail", "temperature"), [("bucket", 1.37), ("conditional", 2.0)])
def test_ranks_may_own_nothing_that_counts(tail: str, temperature: float, device: str) -> None:
    """No column, none but padding, no kept id, no label, nothing but -inf: the values are those of
    one rank.
    """
    problem = usual(temperature=temperature, tail=tail, layout="padded", labels="in")
    k = problem.keywords
    k["ids"] = torch.where(k["ids"] < 0, -1, torch.arange(8) * 2 + 60)
    k["labels"] = k["ids"][:, 0]
    problem.logits[:, 100:] = -torch.inf
    expected, gradient, *_ = run_shards(problem, device, [0, 128])
    truth = world.define(problem, torch.float64)
    for at in ([0, 0, 50, 123, 128], [0, 60, 61, 101, 125, 128]):
        out, found, *_ = run_shards(problem, device, at)
        assert max(errors((*out, found[:, :123].cpu()), truth)) <= 1e-6
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-8)
    assert bool(torch.cat(expected).isfinite().all())


@pytest.mark.parametrize(("temperature", "labels"), [(1.0, "none"), (2.0, "out"), (1.37, "in")])
def test_the_tail_keeps_its_gradient_where_its_mass_underflows(
    temperature: float, labels: str, device: str
) -> None:
    """Student mass of the tail e^-400: off the support the gradient is -q_t times a softmax over
    the tail.
    """
    problem = usual(temperature=temperature, tail_mass=0.5, kept=1, labels=labels)
    problem.logits[:] -= 400 * temperature
    problem.logits.scatter_(1, problem.keywords["ids"], 0.0)
    problem.keywords["ce_scale"] = None if labels == "none" else torch.tensor(0.0)
    out, gradient, *_ = run_shards(problem, device, [0, 30, 90, 123])
    x = problem.logits.double().scatter(1, problem.keywords["ids"], -torch.inf)
    share = (
        torch.softmax(x / temperature, -1)
        * -0.5
        * float(problem.keywords["kd_scale"])
        / temperature
    )
    off = x > -torch.inf
    # The unit in the last place of -400 is 2^-15 in float32; exp makes it relative, and four
    # numbers have that size.
    torch.testing.assert_close(gradient.cpu().double()[off], share[off], rtol=2**-13, atol=0)
    torch.testing.assert_close(
        out[2].double(),
        world.define(
            replace(problem, keywords=problem.keywords | {"ce_scale": torch.tensor(0.0)}),
            torch.float64,
        )[2],
        rtol=1e-6,
        atol=0,
    )


@pytest.mark.parametrize("mass", [0.0, 0.5])
def test_a_tail_without_a_finite_logit_takes_no_part(mass: float, device: str) -> None:
    problem = usual(tail_mass=mass, labels="in", kept=64)
    ids = problem.keywords["ids"]
    held = torch.zeros(3, 124, dtype=torch.bool).scatter(1, torch.where(ids < 0, 123, ids), True)[
        :, :123
    ]
    problem.logits[~held] = -torch.inf
    out, gradient, *_ = run_shards(problem, device, [0, 41, 82, 123])
    assert bool((gradient.cpu()[~held] == 0).all()) and bool(gradient.isfinite().all())
    # a tail that the student excludes costs infinitely much
    assert bool(out[2].isfinite().all()) == (mass == 0)


@pytest.mark.parametrize(("column", "value"), [(5, torch.nan), (100, torch.inf)])
def test_a_bad_logit_spoils_its_own_row_on_every_rank(
    column: int, value: float, device: str
) -> None:
    problem, at = usual(), [0, 60, 123]
    good, gradient, *_ = run_shards(problem, device, at)
    problem.logits[1, column] = value
    with pytest.MonkeyPatch.context() as patch:
        # the interpreter's warns of rows that are all NaN
        patch.setattr(np, "nanmax", np.fmax.reduce)
        bad, spoilt, *_ = run_shards(problem, device, at)
    for a, b in zip(good, bad, strict=True):
        assert bool(b[1].isnan()) and torch.equal(a[[0, 2]], b[[0, 2]])
    assert torch.equal(gradient[[0, 2]], spoilt[[0, 2]])
    assert all(bool(spoilt[1, a:b].isnan().any()) for a, b in pairwise(at))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_row_that_does_not_count_may_hold_anything(inplace: bool, device: str) -> None:
    problem = usual(labels="some", weights="some", inplace=inplace)
    problem.keywords["row_weight"][:] = torch.tensor([0.0, 1.0, 1.0])
    problem.logits[0] = torch.nan
    problem.keywords["ids"][0] = 10**9
    out, gradient, *_ = run_shards(problem, device, [0, 60, 123])
    assert [float(t[0]) for t in out] == [0, 0, 0] and bool((gradient[0] == 0).all())
    assert bool(torch.cat(out).isfinite().all()) and bool(gradient.isfinite().all())


def test_a_graph_is_kept_or_used_up(device: str) -> None:
    problem = usual()
    (part, shard), _ = shards_of(
        problem.logits.to(device), on(device, problem.keywords), [0, 50, 123]
    )
    sums = shard_sums(part, shard)
    loss = sharded_loss(part, sums, shard)[0].sum()
    (first,) = torch.autograd.grad(loss * 0.5, part, retain_graph=True)
    (second,) = torch.autograd.grad(loss * 2, part)
    assert torch.equal(first * 4, second)
    leaf = part * 1
    loss = sharded_loss(leaf, sums, shard, inplace=True)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace=False"):
        loss.backward()
    square = ((other := part * 1) ** 2).sum()
    sharded_loss(other, sums, shard, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


# torch looks there itself where a graph breaks
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_code_calls_them_between_its_graphs(device: str) -> None:
    problem = usual()
    ((part, shard),) = shards_of(problem.logits.to(device), on(device, problem.keywords), [0, 123])
    expected = sharded_loss(part, shard_sums(part, shard), shard)[0].sum()

    @torch.compile(backend="eager")
    def step(x: Tensor) -> Tensor:
        return sharded_loss(x, merge_sums([shard_sums(x, shard)], shard), shard)[0].sum() * 2

    found = step(part)
    assert torch.equal(found, expected * 2)
    assert torch.equal(
        *(torch.autograd.grad(loss, part)[0] * scale for loss, scale in ((found, 1), (expected, 2)))
    )
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"divergence": "jsd"}, "divergence 'jsd'"),
        ({"divergence": "reverse_kl", "tail": "sampled"}, "tail 'sampled'"),
        ({"tail": "drop"}, "tail 'drop'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"first_class": -1}, "is -1"),
        ({"num_classes": 0}, "num_classes 0"),
        (
            {"labels": None, "ids": None, "log_probs": None, "log_tail": None},
            "neither labels nor ids",
        ),
        ({"ids": None}, "belong together"),
        ({"log_tail": None}, "belong together"),
        ({"log_probs": torch.zeros(3, 7)}, r"log_probs is \[3, 7\]"),
        ({"labels": torch.zeros(2).long()}, r"labels is \[2\]"),
        ({"ids": torch.zeros(3, 8)}, "ids is .* of torch.float32"),
        ({"kd_scale": torch.ones(3)}, r"kd_scale is \[3\]"),
        ({"labels": None, "label_weight": torch.ones(3)}, "label_weight without labels"),
        ({"row_weight": torch.ones(3, 1)}, r"row_weight is \[3, 1\]"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], message: str) -> None:
    problem = usual()
    ((part, shard),) = shards_of(problem.logits, problem.keywords, [0, 123])
    with pytest.raises(ValueError, match=message):
        shard_sums(part, replace(shard, **changed))
    with pytest.raises(ValueError, match=message):
        sharded_loss(part, torch.zeros(3, 8), replace(shard, **changed))


def test_logits_and_sums_that_do_not_fit_are_refused() -> None:
    problem = usual()
    ((part, shard),) = shards_of(problem.logits, problem.keywords, [0, 123])
    with pytest.raises(ValueError, match="float64"):
        shard_sums(part.double(), shard)
    with pytest.raises(ValueError, match=r"sums are \[3, 4\]"):
        sharded_loss(part, torch.zeros(3, 4), shard)
    with pytest.raises(ValueError, match=r"sums are \[3, 8\]; expected \[R, N, 8\]"):
        merge_sums(torch.zeros(3, 8), shard)


RANK = """
import sys
sys.path[:0] = ["..", "../tools", "../tools/ptx"]
import conftest, pytest, torch
from test_shards import run_rank
conftest.as_on_a_device(pytest.MonkeyPatch())
torch.use_deterministic_algorithms(True)
torch.save(run_rank(1, sys.argv[1]), f"{sys.argv[1]}/1.pt")
"""


def run_rank(rank: int, folder: str) -> list[list[Tensor]]:
    """[loss, CE, D, gradient of own columns] of one of two ranks, for three rows and for none."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = []
    with np.errstate(all="ignore"):
        for rows in (3, 0):
            problem = usual(rows=rows, labels="two")
            part, shard = shards_of(problem.logits, problem.keywords, [0, 50, 123])[rank]
            out = vocab_parallel_loss(part, shard, inplace=True)
            found.append(
                [*(t.detach() for t in out), *torch.autograd.grad(out[0], part, problem.factor)]
            )
    dist.destroy_process_group()
    return found


def test_two_processes_exchange_their_sums(tmp_path: Path, device: str) -> None:
    """A process group gives, to the bit, what the three functions give in one process."""
    if world.compiled():
        pytest.skip("gloo gathers on the CPU; one device has no second rank")
    with subprocess.Popen(
        [sys.executable, "-c", RANK, str(tmp_path)], cwd=Path(__file__).parent
    ) as other:
        own = run_rank(0, str(tmp_path))
    assert other.returncode == 0
    found = (own, torch.load(tmp_path / "1.pt"))
    for i, rows in enumerate((3, 0)):
        out, gradient, *_ = run_shards(
            usual(rows=rows, labels="two", inplace=True), device, [0, 50, 123]
        )
        for rank, columns in zip(found, (slice(0, 50), slice(50, 123)), strict=True):
            *values, slope = rank[i]
            assert all(torch.equal(a, b) for a, b in zip(values, out, strict=True))
            assert torch.equal(slope, gradient[:, columns])
