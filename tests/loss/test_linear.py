"""The public loss behind an LM head: what `kd_loss` says of whole logits, for both engines and
every option.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_world import allowed
from lm_head_world import (
    CLASSES,
    ROWS,
    THREE_ROWS,
    WIDTH,
    differentiated,
    error,
    given,
    linear,
    whole,
)
from loss_world import PAIRS, rows_by_definition, single
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kdcache
from kdcache.errors import UsageError
from kdcache.loss.kd_loss import LossParts
from kdcache.loss.torch_engine import torch_engine


@pytest.mark.parametrize(("divergence", "tail"), PAIRS)
def test_chunks_are_the_definition_of_whole_logits(divergence: str, tail: str) -> None:
    leaves, labels, targets = given(tail)
    beta = {"beta": 0.3} if divergence == "jsd" else {}

    def definition(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return rows_by_definition(
            h @ w.t() + b,
            labels,
            targets,
            alpha=0.7,
            divergence=divergence,
            tail=tail,
            beta=beta.get("beta", 0.5),
        ).mean()

    found = linear(
        leaves,
        labels,
        targets,
        alpha=0.7,
        divergence=divergence,
        tail=tail,
        engine="torch",
        memory=THREE_ROWS,
        **beta,
    )
    assert max(error(found, differentiated(definition, leaves))) <= 1e-12


@pytest.mark.parametrize(
    ("divergence", "tail"),
    [("forward_kl", "bucket"), ("jsd", "conditional"), ("forward_kl", "sampled")],
)
def test_the_kernels_are_as_good_as_plain_float32(divergence: str, tail: str, device: str) -> None:
    leaves, labels, targets = given(tail)
    options = {"divergence": divergence, "tail": tail}

    def definition(*head: Tensor) -> Tensor:
        t = single(targets).to(head[0].device)
        return rows_by_definition(
            head[0] @ head[1].t() + head[2], labels.to(head[0].device), t, **options
        ).mean()

    truth = differentiated(definition, leaves)
    narrow = tuple(t.float() for t in leaves)
    plain = error(differentiated(definition, narrow), truth)
    found = linear(
        tuple(t.to(device) for t in narrow),
        labels.to(device),
        single(targets).to(device),
        engine="triton",
        memory=THREE_ROWS // 2,
        **options,
    )
    ulp = torch.finfo(torch.float32).eps
    # float64 products of the same float32 numbers: what rounding the leaves costs is in both.
    errors = error([t.cpu() for t in found], truth)
    assert all(e <= allowed(p, 2 * ulp, 2.0) for e, p in zip(errors, plain, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"normalizer": (5, torch.tensor(3.5))},
        {"ce_weight": 2.0, "kd_weight": 0.25},
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"label_weight": torch.linspace(0, 1, ROWS, dtype=torch.float64)},
        {"ignore_index": 7},
    ],
    ids=str,
)
def test_options_mean_what_they_mean_to_kd_loss(options: dict[str, Any]) -> None:
    leaves, labels, targets = given()
    labels[2], labels[5] = 7, -1
    found = linear(leaves, labels, targets, memory=THREE_ROWS, **options)
    assert max(error(found, whole(leaves, labels, targets, **options))) <= 1e-13
    h, w, b = leaves
    parts = kdcache.kd_linear_loss_parts(
        h, w, labels, targets, bias=b, memory=THREE_ROWS, **options
    )
    expected = kdcache.kd_loss_parts(h @ w.t() + b, labels, targets, **options)
    assert isinstance(parts, LossParts)
    for name in ("loss", "ce", "kd", "ce_count", "kd_count"):
        assert float(getattr(parts, name)) == pytest.approx(
            float(getattr(expected, name)), rel=1e-13, abs=1e-300
        )


def test_labels_alone_a_teacher_alone_and_classes_beyond_the_teacher() -> None:
    (h, w, b), labels, targets = given()
    for some in ((labels, None), (None, targets)):
        assert (
            max(error(linear((h, w, b), *some, alpha=0.4), whole((h, w, b), *some, alpha=0.4)))
            <= 1e-13
        )
    wide = (
        torch.cat([w, torch.full((4, WIDTH), 5.0, dtype=torch.float64)]),
        torch.cat([b, b[:4] + 100]),
    )
    found = linear((h, *wide), labels, targets)
    assert found[2][CLASSES:].all() and found[3][CLASSES:].all(), (
        "they have probability 0 to the teacher, and a slope"
    )
    assert max(error(found, whole((h, *wide), labels, targets))) <= 1e-13
    found = linear((h, *wide), labels, targets, classes=CLASSES)
    assert not found[2][CLASSES:].any() and not found[3][CLASSES:].any()
    found = [found[0], found[1], found[2][:CLASSES], found[3][:CLASSES]]
    assert max(error(found, whole((h, w, b), labels, targets))) <= 1e-13


def test_reverse_kl_of_a_class_the_teacher_rules_out_is_refused_unless_the_bias_does_too() -> None:
    (h, w, b), labels, targets = given()
    out = targets.log_probs_NK.clone()
    out[2, 1] = -torch.inf
    assert targets.ids_NK is not None
    ruled, gone = replace(targets, log_probs_NK=out), b.clone()
    with pytest.raises(
        UsageError,
        match=f"infinite for row 2: the teacher gives class {int(targets.ids_NK[2, 1])} ",
    ):
        linear((h, w, b), labels, ruled, divergence="reverse_kl")
    gone[targets.ids_NK[2, 1]] = -torch.inf
    assert linear((h, w, gone), None, ruled, divergence="reverse_kl", alpha=1.0)[0].isfinite()


def test_a_frozen_head_and_no_gradient_at_all() -> None:
    (h, w, b), labels, targets = given()
    loss = kdcache.kd_linear_loss(h.requires_grad_(), w, labels, targets, bias=b)
    loss.backward()
    assert h.grad is not None and w.grad is None
    assert not kdcache.kd_linear_loss(h.detach(), w, labels, targets, bias=b).requires_grad


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reduction": "none"}, "reduction 'none' is not there behind a head"),
        ({"memory": "much"}, "memory is 'much'"),
        ({"memory": 100}, "the logits of a single row take 512"),
        ({"hidden": torch.zeros(2, 3, 4)}, "expected floating"),
        ({"weight": torch.zeros(7, 5, dtype=torch.float64)}, r"expected \[N, H\] and \[V, H\]"),
        (
            {"weight": torch.zeros(7, WIDTH, dtype=torch.float64)},
            "the student has 7 classes, the teacher 61",
        ),
        ({"weight": torch.zeros(CLASSES, WIDTH)}, "expected one dtype"),
        ({"engine": "cuda"}, "engine 'cuda' is unknown"),
        ({"engine": "triton"}, "logits are torch.float64"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "but 3 of labels"),
        ({"hidden": np.zeros((2, 3))}, "hidden is a numpy array"),
        ({"weight": [[1.0]]}, r"weight is \[\[1.0\]\] \(list\)"),
        ({"bias": 0.0}, r"bias is 0.0 \(float\)"),
        ({"softcap": "30"}, r"softcap is '30' \(str\)"),
        ({"memory": None}, "memory is"),
        ({"labels": [1, 2]}, r"labels is \[1, 2\] \(list\)"),
        ({"targets": torch.zeros(2, 6)}, "expected SoftTargets"),
        ({"labels": torch.zeros(ROWS, CLASSES, dtype=torch.long)}, "one for each of 61 classes"),
        ({"bias": torch.zeros(3, dtype=torch.float64)}, "bias is"),
        ({"tail": "drop"}, "tail 'drop'"),
    ],
)
def test_refusals(changed: dict[str, Any], message: str) -> None:
    (h, w, b), labels, targets = given()
    arguments = {
        "hidden": h,
        "weight": w,
        "bias": b,
        "labels": labels,
        "targets": targets,
    } | changed
    with pytest.raises(UsageError, match=message) as caught:
        kdcache.kd_linear_loss(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_runs_each_chunk_twice(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once forward, once for backward: hooks on saved tensors are not asked for those of a chunk."""
    leaves, labels, targets = given()
    calls = []
    monkeypatch.setattr(
        "kdcache.loss.kd_linear_loss.torch_engine",
        lambda *a: (calls.append(1), torch_engine(*a))[1],
    )

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return kdcache.kd_linear_loss(
            h, w, labels, targets, bias=b, engine="torch", memory=THREE_ROWS
        )

    plain = differentiated(loss, leaves)
    assert len(calls) == ROWS / 3
    again = differentiated(lambda *given: checkpoint(loss, *given, use_reentrant=reentrant), leaves)
    assert len(calls) == 3 * ROWS / 3
    assert all(map(torch.equal, plain, again))


def test_torch_compile_is_told_that_it_cannot_capture_the_torch_engine() -> None:
    leaves, labels, targets = given()

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return kdcache.kd_linear_loss(h, w, labels, targets, bias=b, engine="torch") * 2

    with pytest.raises(
        Exception, match=r"engine 'torch' behind a head is nothing that torch.compile captures"
    ):
        torch.compile(loss, backend="eager", fullgraph=True)(*leaves)
