"""Logits that are scaled and soft-capped before the loss: both engines against float64, and what
the torch engine keeps of its promises with them (rows of their own, memory, the logits' own place).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_world import allowed
from kernel_world import asked as row_loss
from linear_world import Allocations
from lm_head_world import (
    CLASSES,
    KEPT,
    ROWS,
    THREE_ROWS,
    WIDTH,
    Leaves,
    differentiated,
    error,
    linear,
)
from lm_head_world import given as leaves_of
from loss_world import DIVERGENCES, PAIRS, problem, single
from torch import Tensor

import kdcache
from kdcache.errors import UsageError
from kdcache.loss.definitions import kd_loss_reference
from kdcache.loss.targets import SoftTargets
from kdcache.loss.torch_engine import CHUNK_ELEMENTS, torch_engine

CAPS: list[dict[str, Any]] = [
    {"softcap": 3.0},
    {"logit_scale": 0.3},
    {"softcap": 5.0, "logit_scale": 1.7},
]
KINDS = [(d, "bucket", None) for d in DIVERGENCES] + [(d, t, KEPT) for d, t in PAIRS]


def capped(z: Tensor, softcap: float | None = None, logit_scale: float = 1.0) -> Tensor:
    z = logit_scale * z
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def given(
    kind: tuple[str, str, int | None], temperature: float = 2.0
) -> tuple[Leaves, Tensor, SoftTargets]:
    """Hidden states, weight and bias in float64; one row has a label that the teacher kept, one has
    no label, one no teacher, one neither."""
    _, labels, targets = problem(3, ROWS, CLASSES, temperature, kind[2], tail=kind[1])
    if targets.ids_NK is not None:
        labels[0] = targets.ids_NK[0, 1]
    labels[2] = labels[3] = -1
    weight = torch.linspace(0.5, 2, ROWS, dtype=torch.float64)
    weight[3] = weight[5] = 0
    return leaves_of()[0], labels, replace(targets, weight_N=weight)


def truth(
    leaves: Leaves,
    labels: Tensor,
    targets: SoftTargets,
    kind: tuple[str, str, int | None],
    cap: dict[str, Any],
) -> list[Tensor]:
    """Loss and gradients by the definition and autograd, in the dtype of the leaves."""
    return differentiated(
        lambda h, w, b: kd_loss_reference(
            capped(h @ w.t() + b, **cap),
            labels,
            targets,
            alpha=0.7,
            divergence=kind[0],
            tail=kind[1],
        ),
        leaves,
    )


@pytest.mark.parametrize("temperature", [1.0, 1.37])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_torch_engine_is_the_definition(
    kind: tuple[str, str, int | None], temperature: float
) -> None:
    leaves, labels, targets = given(kind, temperature)
    for cap in CAPS:
        found = linear(
            leaves,
            labels,
            targets,
            alpha=0.7,
            divergence=kind[0],
            tail=kind[1],
            engine="torch",
            memory=THREE_ROWS,
            **cap,
        )
        assert max(error(found, truth(leaves, labels, targets, kind, cap))) <= 1e-12


@pytest.mark.parametrize(
    "kind",
    [
        ("forward_kl", "bucket", KEPT),
        ("reverse_kl", "conditional", KEPT),
        ("jsd", "bucket", None),
        ("tv", "renormalise", KEPT),
    ],
    ids=str,
)
@pytest.mark.parametrize("cap", CAPS, ids=str)
@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_both_engines_are_as_good_as_plain_float32(
    engine: str, cap: dict[str, Any], kind: tuple[str, str, int | None], device: str
) -> None:
    leaves, labels, targets = given(kind)
    narrow = tuple(t.float() for t in leaves)
    exact = truth(tuple(t.double() for t in narrow), labels, targets, kind, cap)
    plain = error(truth(narrow, labels, single(targets), kind, cap), exact)
    found = linear(
        tuple(t.to(device) for t in narrow),
        labels.to(device),
        single(targets).to(device),
        alpha=0.7,
        divergence=kind[0],
        tail=kind[1],
        engine=engine,
        memory=THREE_ROWS // 2,
        **cap,
    )
    ulp = 2 * torch.finfo(torch.float32).eps
    errors = error([t.cpu() for t in found], exact)
    assert all(e <= allowed(p, ulp, 2.0) for e, p in zip(errors, plain, strict=True))
    # without them it is another loss
    assert min(error(truth(leaves, labels, targets, kind, {}), exact)) > 0.01


@pytest.mark.parametrize("cap", CAPS, ids=str)
@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_under_autocast_the_cap_is_of_its_logits_in_float32(
    engine: str, cap: dict[str, Any], device: str
) -> None:
    """Quarters, so few of them that the logits are exact in bfloat16, in whatever order they are
    added.
    """
    _, labels, targets = given(("forward_kl", "bucket", KEPT))
    g = torch.Generator().manual_seed(2)
    h, w, b = (
        torch.randint(-n, n + 1, shape, generator=g) / by
        for n, by, shape in ((1, 1, (ROWS, WIDTH)), (4, 4, (CLASSES, WIDTH)), (4, 4, (CLASSES,)))
    )
    with torch.autocast(device, torch.bfloat16):
        found = linear(
            (h.to(device), w.to(device), b.to(device)),
            labels.to(device),
            single(targets).to(device),
            engine=engine,
            memory=THREE_ROWS // 4,
            **cap,
        )
    logits = (h @ w.t() + b).double().requires_grad_()
    assert torch.equal(logits, logits.bfloat16())
    expected = kd_loss_reference(capped(logits, **cap), labels, targets, alpha=0.5)
    (slope,) = torch.autograd.grad(expected, logits)
    assert float(found[0]) == pytest.approx(expected.item(), rel=8 * torch.finfo(torch.float32).eps)
    # The gradient of the logits is rounded once, and so is that of the hidden states.
    eps = torch.finfo(torch.bfloat16).eps
    assert (
        max(
            error(
                [t.cpu() for t in found[1:]],
                [slope @ w.double(), slope.t() @ h.double(), slope.sum(0)],
            )
        )
        <= eps
    )
    assert all(t.dtype == torch.float32 for t in found)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"softcap": 0.0}, r"softcap 0.0; expected finite numbers above 0"),
        ({"softcap": torch.inf}, "softcap inf"),
        ({"softcap": -30.0}, "softcap -30.0"),
        ({"logit_scale": 0}, "logit_scale is 0,"),
        ({"logit_scale": torch.nan}, "logit_scale is nan"),
    ],
)
@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_refusals(engine: str, changed: dict[str, Any], message: str) -> None:
    (h, w, b), labels, targets = given(("forward_kl", "bucket", KEPT))
    with pytest.raises(UsageError, match=message):
        kdcache.kd_linear_loss(
            h.float(), w.float(), labels, single(targets), bias=b.float(), engine=engine, **changed
        )


# ---- the torch engine by itself
# -----------------------------------------------------------------------------------


def asked(rows: int, classes: int, **more: Any) -> dict[str, Any]:
    _, labels, t = problem(5, rows, classes, 2.0, KEPT)
    return {
        "labels": labels,
        "ids": t.ids_NK,
        "log_probs": t.log_probs_NK,
        "log_tail": t.log_tail_N,
        "row_weight": torch.ones(rows),
        "temperature": 2.0,
        "ce_scale": torch.tensor(0.4).double(),
        "kd_scale": torch.tensor(1.5).double(),
        **more,
    }


def run(logits: Tensor, **keywords: Any) -> list[Tensor]:
    """Loss, CE, D and the gradient of the summed loss."""
    leaf = logits.detach().requires_grad_()
    loss_N, ce_N, kd_N = torch_engine(leaf, row_loss(leaf, keywords))
    return [loss_N.detach(), ce_N, kd_N, torch.autograd.grad(loss_N.sum(), leaf)[0]]


@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_a_masked_class_stays_out(cap: dict[str, Any]) -> None:
    """The last class at -inf is the loss of one class fewer; tanh alone would make it -softcap."""
    logits, _, _ = problem(6, 4, 31, 2.0, None)
    keywords = asked(4, 30)
    masked = torch.cat([logits[:, :30], torch.full((4, 1), -torch.inf).double()], 1)
    found, fewer = run(masked, **keywords, **cap), run(logits[:, :30], **keywords, **cap)
    assert (
        max(error(found[:3], fewer[:3])) <= 1e-14
        and error([found[3][:, :30]], [fewer[3]])[0] <= 1e-14
    )
    assert not found[3][:, 30].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_a_row_depends_on_itself_alone(cap: dict[str, Any], dtype: torch.dtype) -> None:
    logits, keywords = problem(7, 33, 257, 2.0, None)[0].to(dtype), asked(33, 257)
    together = run(logits, **keywords, **cap)
    for n in (0, 1, 32):
        alone = {
            k: v[n : n + 1] if isinstance(v, Tensor) and v.dim() else v for k, v in keywords.items()
        }
        assert all(
            torch.equal(a, b[n : n + 1])
            for a, b in zip(run(logits[n : n + 1].clone(), **alone, **cap), together, strict=True)
        )


@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_a_row_that_counts_for_nothing_may_hold_anything(cap: dict[str, Any]) -> None:
    logits, keywords = problem(8, 3, 31, 2.0, None)[0], asked(3, 31)
    keywords["labels"][1], keywords["row_weight"][1] = -1, 0
    logits[1, ::2], logits[1, 1::4] = torch.nan, torch.inf
    found = run(logits, **keywords, **cap)
    assert all(bool(t.isfinite().all()) and not t[1].any() and bool(t[0].any()) for t in found)


def test_the_slope_is_exact_where_tanh_is_one() -> None:
    """CE of two classes: p (1 - p) times scale / cosh(u)^2, whose error in float32 is that of
    exp(-2 |u|): 2 |u| of the rounding of u, and a few of its own. 1 - tanh^2 is 0 from u = 9 on."""
    u = torch.linspace(-40, 40, 801)
    x = torch.stack([u, torch.zeros(801)], 1)
    found = run(
        x,
        labels=torch.zeros(801, dtype=torch.long),
        ce_scale=torch.tensor(1.0),
        softcap=2.0,
        logit_scale=2.0,
    )
    p = torch.sigmoid(2 * torch.tanh(u.double()))
    expected = -(1 - p) * 2 / torch.cosh(u.double()) ** 2
    wrong = (found[3][:, 0].double() / expected - 1).abs() / 2**-24
    assert bool((wrong <= 2 * u.abs() + 16).all()) and float(found[3][0, 0]) != 0


@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_the_gradient_takes_the_place_of_the_logits(cap: dict[str, Any]) -> None:
    keywords, buffer = asked(5, 31), torch.full((5, 40), 7.0, dtype=torch.float64)
    buffer[:, :31] = problem(9, 5, 31, 2.0, None)[0]
    beside = run(buffer[:, :36].clone(), num_classes=31, **keywords, **cap)
    inside = run(buffer[:, :36], num_classes=31, inplace=True, **keywords, **cap)
    assert inside[3].data_ptr() == buffer.data_ptr() and all(map(torch.equal, beside, inside))
    assert not buffer[:, 31:36].any() and bool((buffer[:, 36:] == 7).all())


def test_a_cap_takes_one_more_temporary_of_a_chunk() -> None:
    """The capped logits; a mask of a byte an element comes and goes beside them, the slope when
    others are gone.
    """
    classes, rows = 4096, 2 * CHUNK_ELEMENTS["cpu"] // 4096
    logits, keywords, peaks = torch.randn(rows, classes), asked(rows, classes), []
    for cap in ({}, CAPS[2]):
        with Allocations() as seen:
            run(logits.clone(), **keywords, **cap, inplace=True)
        peaks.append(seen.peak)
    assert peaks[1] - peaks[0] <= 1.25 * 4 * CHUNK_ELEMENTS["cpu"]
