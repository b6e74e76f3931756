"""What a call of `kd_loss` promises besides its numbers: the same bits anywhere, buffers, counts,
refusals.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from loss_world import DIVERGENCES, PAIRS, double_targets, problem, value_and_gradient
from torch import Tensor

import kdcache
from kdcache.errors import UsageError
from kdcache.loss import torch_engine as engine
from kdcache.loss.divergences import Divergence
from kdcache.loss.kd_linear_loss import kd_linear_loss, kd_linear_loss_parts
from kdcache.loss.kd_loss import (
    LossOptions,
    LossParts,
    build_row_loss,
    kd_loss,
    kd_loss_parts,
    row_counts,
)
from kdcache.loss.targets import SoftTargets, targets_from_logits

KINDS = [(d, "bucket", None) for d in DIVERGENCES] + [(d, t, 5) for d, t in PAIRS]
DRAWS = SoftTargets(2.0, 6, torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1), None)
RULED_OUT = torch.tensor([[0.0] * 6, [0, 0, -torch.inf, 0, 0, 0]])
CERTAIN = double_targets(
    torch.tensor([[1.0, 0, 0, 0, 0, 0], [1, 0, 0, -torch.inf, -torch.inf, -torch.inf]]), 2.0, 3
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("divergence", "tail", "k", "temperature"),
    [(*kind, 2.0) for kind in KINDS] + [(*kind, 1.0) for kind in KINDS if kind[0] == "forward_kl"],
)
def test_a_row_has_the_same_bits_in_every_chunk_batch_and_thread(
    divergence: str, tail: str, k: int | None, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, labels, targets = problem(16, 3, 40_007, temperature, k, tail=tail)
    logits = logits.float()

    def run(rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        return value_and_gradient(
            kd_loss,
            logits[rows],
            labels[rows],
            targets[rows],
            divergence=divergence,
            tail=tail,
            reduction="none",
        )

    whole = run()
    for elements, threads in ((1, 1), (90_000, 2), (2**30, 2), (1, 2)):
        torch.set_num_threads(threads)
        monkeypatch.setitem(engine.CHUNK_ELEMENTS, "cpu", elements)
        again = run()
        assert torch.equal(again[0], whole[0]) and torch.equal(again[1], whole[1])
    alone = run(slice(2, 3))
    assert torch.equal(alone[0], whole[0][2:]) and torch.equal(alone[1], whole[1][2:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("divergence", "tail", "k"), KINDS)
def test_cuda_equals_the_cpu_and_itself(divergence: str, tail: str, k: int | None) -> None:
    logits, labels, targets = problem(28, 40, 5003, 2.0, k, tail=tail)
    options = {"divergence": divergence, "tail": tail}
    want = value_and_gradient(kd_loss, logits, labels, targets, **options)
    runs = [
        value_and_gradient(kd_loss, logits.cuda(), labels.cuda(), targets, **options)
        for _ in range(2)
    ]
    torch.testing.assert_close((runs[0][0].cpu(), runs[0][1].cpu()), want, rtol=1e-11, atol=1e-13)
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_inplace_writes_the_same_gradient_over_the_logits(dtype: torch.dtype) -> None:
    logits, labels, targets = problem(17, 4, 6, 2.0, 3)
    padded = torch.cat([logits, torch.full((4, 2), 99.0)], 1).to(dtype)
    want_loss, want = value_and_gradient(kd_loss, padded, labels, targets)
    hidden = padded.clone().requires_grad_()
    buffer = hidden * 1
    loss = kd_loss(buffer, labels, targets, inplace=True)
    assert not torch.equal(buffer.detach(), padded)
    loss.backward(retain_graph=True)
    assert (
        hidden.grad is not None
        and torch.equal(hidden.grad, want)
        and torch.equal(loss.detach(), want_loss)
    )
    assert torch.equal(buffer.detach(), want), "the gradient lives where the logits were"
    with pytest.raises(RuntimeError, match="differentiated twice"):
        loss.backward()
    # Without a gradient there is nothing to write.
    quiet = padded.clone()
    assert torch.equal(kd_loss(quiet, labels, targets, inplace=True), want_loss) and torch.equal(
        quiet, padded
    )
    with torch.no_grad():
        kd_loss(hidden, labels, targets, inplace=True)
    assert torch.equal(hidden.detach(), padded)


def test_inplace_is_noticed_by_an_operation_that_kept_the_logits() -> None:
    logits, labels, _ = problem(18, 3, 5, 1.0, None)
    buffer = logits.requires_grad_() * 1
    other = buffer.square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (kd_loss(buffer, labels, alpha=0.0, inplace=True) + other).backward()


def test_classes_cuts_the_logits_and_nothing_else_does() -> None:
    logits, labels, targets = problem(19, 4, 6, 2.0, 3)
    want_loss, want = value_and_gradient(kd_loss, logits, labels, targets)
    wide = torch.cat([logits, torch.full((4, 3), 50.0)], 1)
    loss, gradient = value_and_gradient(kd_loss, wide, labels, targets, classes=6)
    assert (
        torch.equal(loss, want_loss)
        and torch.equal(gradient[:, :6], want)
        and not gradient[:, 6:].any()
    )
    loss, gradient = value_and_gradient(kd_loss, wide, labels, targets)
    assert float(loss) > 20 and bool((gradient[:, 6:] > 0.05).all()), "the softmax is over all nine"


def test_reductions_normalizer_and_parts() -> None:
    logits, labels, targets = problem(20, 4, 6, 2.0, 3)
    labels[0] = -1
    targets = replace(targets, weight_N=torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=torch.float64))
    parts = kd_loss_parts(logits, labels, targets, alpha=0.25)
    assert isinstance(parts, LossParts)
    assert (parts.ce_count.item(), parts.kd_count.item()) == (3, 4)
    assert parts.loss.item() == pytest.approx(
        0.75 * parts.ce.item() + 0.25 * 4 * parts.kd.item(), rel=1e-13
    )
    rows = kd_loss_parts(logits, labels, targets, alpha=0.25, reduction="none")
    assert (
        rows.loss.shape == rows.ce.shape == rows.kd.shape == (4,)
        and rows.ce[0] == 0
        and rows.kd[1] == 0
    )
    assert rows.ce.sum().item() == pytest.approx(3 * parts.ce.item(), rel=1e-13)
    assert rows.kd.sum().item() == pytest.approx(4 * parts.kd.item(), rel=1e-13)
    summed = kd_loss(logits, labels, targets, alpha=0.25, reduction="sum")
    torch.testing.assert_close(summed, rows.loss.sum(), rtol=1e-13, atol=0)
    # Two micro-batches divided by the counts of both are the batch, in value and gradient.
    counts = row_counts(labels, targets)
    whole = value_and_gradient(kd_loss, logits, labels, targets, alpha=0.25)
    halves = [
        value_and_gradient(kd_loss, logits[s], labels[s], targets[s], alpha=0.25, normalizer=counts)
        for s in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(halves[0][0] + halves[1][0], whole[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.cat([g for _, g in halves]), whole[1], rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0), (0.3, 2.5), (0.0, 0.0)])
def test_free_weights(weights: tuple[float, float]) -> None:
    logits, labels, targets = problem(21, 4, 6, 2.0, 3)
    parts = kd_loss_parts(logits, labels, targets, ce_weight=weights[0], kd_weight=weights[1])
    assert parts.ce > 0 and parts.kd > 0, "a part of weight 0 is still reported"
    want = weights[0] * parts.ce.item() + weights[1] * 4 * parts.kd.item()
    assert parts.loss.item() == pytest.approx(want, rel=1e-13)
    plain = kd_loss(logits, labels, targets, ce_weight=weights[0], kd_weight=weights[1])
    assert torch.equal(plain, parts.loss)


def test_missing_parts_are_zero() -> None:
    logits, labels, targets = problem(22, 4, 6, 2.0, 3)
    both = kd_loss_parts(logits, labels, targets, alpha=0.5)
    assert kd_loss(logits, labels).item() == pytest.approx(0.5 * both.ce.item(), rel=1e-13)
    assert kd_loss(logits, None, targets).item() == pytest.approx(
        0.5 * 4 * both.kd.item(), rel=1e-13
    )


def test_float16_gradient_survives_a_mean_over_many_rows() -> None:
    """1 / N times a small probability is below the smallest float16; kept at order 1, scaled
    gradients are right.
    """
    g = torch.Generator().manual_seed(23)
    logits, labels = torch.randn(4096, 8, generator=g), torch.randint(0, 8, (4096,), generator=g)
    half = logits.half().requires_grad_()
    (kd_loss(half, labels, alpha=0.0) * 65536.0).backward()
    exact = logits.half().double()
    truth = value_and_gradient(
        lambda z: 65536.0 * torch.nn.functional.cross_entropy(z, labels), exact
    )[1]
    assert half.grad is not None
    assert float(((half.grad - truth) / truth).abs().max()) < 2 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tail": "sampled"},
            "tail 'sampled' is for targets that are draws, these are the largest classes and a "
            "tail",
        ),
        (
            {"tail": "sampled", "targets": double_targets(torch.zeros(2, 6), 2.0)},
            "draws, these are all classes",
        ),
        (
            {"targets": DRAWS},
            "the targets are draws with weights .* expected tail 'sampled', found 'bucket'",
        ),
        ({"targets": DRAWS, "tail": "conditional"}, "expected tail 'sampled', found 'conditional'"),
        (
            {"divergence": "jsd", "tail": "uniform"},
            "tail 'uniform' goes with divergence 'forward_kl' alone, found 'jsd'",
        ),
        (
            {"divergence": "tv", "tail": "sampled", "targets": DRAWS},
            "tail 'sampled' goes with divergence 'forward_kl'",
        ),
        (
            {"divergence": "reverse_kl", "tail": "renormalise"},
            "with tail 'renormalise' is infinite",
        ),
        (
            {"divergence": "reverse_kl", "targets": CERTAIN},
            "'reverse_kl' is infinite for row 1: the teacher gives its",
        ),
        ({"beta": 0.5}, "beta is 0.5, but divergence 'forward_kl' has none"),
        ({"divergence": "jsd", "beta": 1.0}, "beta is 1.0; expected between 0 and 1"),
        ({"divergence": "jsd", "beta": float("nan")}, "beta is nan"),
        ({"engine": "tritn"}, "did you mean 'triton'"),
        ({"tail": "buckets"}, "did you mean 'bucket'"),
        ({"divergence": "kl"}, "divergence 'kl' is unknown"),
        ({"reduction": "batchmean"}, "reduction 'batchmean' is unknown"),
        ({"ce_weight": 1.0}, "give both"),
        ({"kd_weight": 1.0}, "give both"),
        ({"ce_weight": 1.0, "kd_weight": -1.0}, "at least 0"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"temperature": 4.0}, "temperature is 4.0, but the targets are at 2.0"),
        ({"normalizer": (3, 3), "reduction": "sum"}, "divides by nothing"),
        ({"normalizer": (3, -3)}, "two counts"),
        ({"normalizer": 3.0}, "two counts"),
        ({"normalizer": (3,)}, "two counts"),
        ({"normalizer": (3, None)}, "two counts"),
        ({"normalizer": (3, torch.ones(1))}, "scalar tensors"),
        ({"labels": torch.tensor([1, 6])}, "labels of row 1 are \\[6\\]; expected 0 to 5"),
        ({"labels": torch.tensor([1, -7])}, "labels of row 1 are \\[-7\\]"),
        ({"labels": torch.tensor([1, 2, 3])}, "2 rows of the student but 3 of labels"),
        ({"labels": torch.tensor([1.0, 2.0])}, "expected integers"),
        ({"labels": None, "label_weight": torch.ones(2)}, "without labels"),
        ({"label_weight": torch.ones(2, 2)}, "expected one shape"),
        (
            {"label_weight": torch.ones(2, dtype=torch.int64)},
            "of torch.int64, .* and a floating dtype",
        ),
        (
            {"label_weight": torch.tensor([1.0, -0.5])},
            r"label_weight of row 1 is \[-0.5\]; expected finite weights of at",
        ),
        ({"label_weight": torch.tensor([torch.nan, 1.0])}, r"label_weight of row 0 is \[nan\]"),
        ({"label_weight": torch.tensor([1.0, torch.inf])}, r"label_weight of row 1 is \[inf\]"),
        (
            {"targets": replace(CERTAIN, weight_N=torch.tensor([1.0, -1.0]))},
            "weight of soft targets of row 1 is -1.0",
        ),
        (
            {"labels": torch.nn.functional.one_hot(torch.tensor([1, 3]), 6)},
            r"\[2, 6\], one for each of 6 classes",
        ),
        # by the shape alone
        ({"labels": torch.zeros(2, 6, dtype=torch.int64, device="meta")}, r"labels.argmax\(1\)"),
        (
            {"labels": torch.zeros(2, 7, dtype=torch.int64), "logits": torch.zeros(2, 7)},
            "looks one-hot",
        ),
        (
            {"labels": torch.zeros(2, 17, dtype=torch.int64)},
            r"labels are \[2, 17\]; expected at most 16 labels a row",
        ),
        ({"labels": [1, 2]}, r"labels is \[1, 2\] \(list\); expected integers .*torch.as_tensor"),
        (
            {"labels": np.array([1, 2])},
            r"labels is a numpy array \[2\] of int64; expected integers \[N\] or \[N, J\]",
        ),
        (
            {"logits": np.zeros((2, 6))},
            r"logits is a numpy array \[2, 6\] of float64; expected floating \[N, V\]",
        ),
        (
            {"targets": torch.zeros(2, 6)},
            r"targets is a tensor \[2, 6\]; expected SoftTargets: .* targets_from_logits",
        ),
        ({"targets": np.zeros((2, 6))}, "targets is a numpy array .* expected SoftTargets"),
        ({"label_weight": [1.0, 1.0]}, r"label_weight is \[1.0, 1.0\] \(list\)"),
        ({"alpha": "0.5"}, r"alpha is '0.5' \(str\); expected a number"),
        (
            {"alpha": torch.tensor(0.5)},
            r"alpha is a tensor \[\] of torch.float32; expected a number",
        ),
        ({"kd_weight": "1", "ce_weight": 1.0}, r"kd_weight is '1' \(str\)"),
        ({"temperature": "2"}, r"temperature is '2' \(str\)"),
        ({"beta": "0.5", "divergence": "jsd"}, "beta is '0.5'"),
        ({"ignore_index": 1.0}, r"ignore_index is 1.0 \(float\); expected an integer"),
        ({"reduction": None}, "reduction is None"),
        ({"engine": 3}, "engine is 3"),
        ({"tail": 3}, r"tail is 3 \(int\)"),
        ({"labels": None, "targets": None}, "neither labels nor targets"),
        ({"targets": None, "temperature": 2.0}, "without targets"),
        (
            {"logits": torch.zeros(3, 6), "labels": None},
            "3 rows of the student but 2 of soft targets",
        ),
        ({"logits": torch.zeros(2, 5)}, "the student has 5 classes, the teacher 6; .* --classes 5"),
        (
            {"logits": torch.zeros(2, 8), "classes": 5},
            "classes is 5; expected at least the 6 .* at most the 8 logits",
        ),
        (
            {"classes": 7},
            "classes is 7; expected at least the 6 of the teacher, and at most the 6 logits",
        ),
        ({"classes": 6.0}, "classes is 6.0"),
        ({"classes": 0, "targets": None}, "classes is 0; expected 1 to the 6 logits"),
        (
            {"logits": torch.zeros(2, 8), "labels": torch.tensor([1, 8])},
            r"labels of row 1 are \[8\]; expected 0 to 7",
        ),
        (
            {"logits": torch.zeros(2, 8), "labels": torch.tensor([1, 7]), "classes": 7},
            r"are \[7\]; expected 0 to 6",
        ),
        *(
            (
                {"logits": torch.zeros(2, 8), "divergence": "reverse_kl", "targets": t},
                "the student has 8 classes, and the teacher gives those from its 6 on nothing; cut "
                "them .classes 6., or use tail 'conditional'",
            )
            for t in (double_targets(torch.zeros(2, 6), 2.0, k) for k in (None, 6))
        ),
        (
            {"logits": torch.zeros(2, 1), "labels": torch.zeros(2).long(), "targets": None},
            "the student has one logit, .* sigmoid or a regression head",
        ),
        (
            {"targets": double_targets(torch.zeros(2, 1), 2.0)},
            "the teacher of the targets has one logit",
        ),
        ({"inplace": "no"}, r"inplace is 'no' \(str\); expected True or False"),
        ({"divergence": Divergence("jsd", 0.3), "beta": 0.5}, "beta is 0.5 and tail None beside D"),
        ({"divergence": Divergence(), "tail": "bucket"}, "beta is None and tail 'bucket' beside D"),
        *(
            (
                {"divergence": "reverse_kl", "targets": t},
                "'reverse_kl' is infinite for row 1: the teacher gives class 2 noth",
            )
            for t in (double_targets(RULED_OUT, 2.0), double_targets(RULED_OUT, 2.0, 6))
        ),
        (
            {"classes": 1, "targets": None, "labels": torch.zeros(2).long()},
            "the student has one logit",
        ),
        ({"logits": torch.zeros(1, 2, 6)}, "never shifts labels"),
        ({"logits": torch.zeros(2, 6, dtype=torch.int64)}, "expected floating"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    logits, labels, targets = problem(25, 2, 6, 2.0, 3)
    arguments: dict[str, Any] = {"logits": logits, "labels": labels, "targets": targets, **options}
    with pytest.raises(UsageError, match=message) as caught:
        kd_loss(**arguments)
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


def test_class_0_may_be_the_label_that_is_none() -> None:
    """As torch's own cross-entropy has it."""
    logits, labels = (
        torch.randn(6, 4, generator=torch.Generator().manual_seed(1)),
        torch.arange(6) % 3,
    )
    found = kd_loss(logits, labels, alpha=0.0, ignore_index=0)
    want = torch.nn.functional.cross_entropy(logits, labels, ignore_index=0)
    assert found.item() == pytest.approx(want.item(), rel=1e-6)


def test_matching_temperature_and_ignore_index_are_taken() -> None:
    logits, labels, targets = problem(26, 3, 6, 2.0, 3)
    ignored = labels.clone()
    ignored[1] = 5
    other = labels.clone()
    other[1] = -100
    assert torch.equal(
        kd_loss(logits, ignored, targets, temperature=2.0, ignore_index=5),
        kd_loss(logits, torch.where(labels == 5, -1, other), targets),
    )


def test_two_labels_of_two_classes_are_labels_where_they_have_weights() -> None:
    logits, labels, targets = problem(32, 3, 2, 2.0, None)
    both, weight = torch.stack([labels, 1 - labels], 1), torch.full((3, 2), 0.5)
    want = (kd_loss(logits, labels, targets) + kd_loss(logits, 1 - labels, targets)) / 2
    torch.testing.assert_close(
        kd_loss(logits, both, targets, label_weight=weight), want, rtol=1e-12, atol=0
    )
    with pytest.raises(UsageError, match="one-hot"):
        kd_loss(logits, both, targets)


def test_a_temperature_of_float32_is_the_decimal_it_was_rounded_from() -> None:
    logits, labels, _ = problem(33, 3, 6, 2.0, None)
    targets = targets_from_logits(logits, temperature=np.float32(1.1))
    assert targets.temperature == 1.1
    assert torch.equal(
        *(kd_loss(logits, labels, targets, temperature=t) for t in (1.1, np.float32(1.1)))
    )
    with pytest.raises(UsageError, match="but the targets are at"):
        kd_loss(logits, labels, targets, temperature=np.float32(1.2))


def test_counts_are_two_tensors_that_add_exactly() -> None:
    targets = problem(34, 4, 6, 2.0, 3)[2]
    labels = torch.tensor([-1, 5, 2, 0])
    weighted = replace(targets, weight_N=torch.tensor([1.0, 0.0, 2.0, 2.0**-24]))
    cases: list[tuple[Any, Any, int, tuple[float, float]]] = [
        (labels, targets, -100, (3, 4)),
        (labels, None, 5, (2, 0)),
        (None, weighted, -100, (0, 3 + 2.0**-24)),
        (torch.stack([labels, labels.flip(0)], 1), weighted, -100, (4, 3 + 2.0**-24)),
    ]
    for given, teacher, ignored, want in cases:
        counts = row_counts(given, teacher, ignore_index=ignored)
        assert [(n.dtype, n.dim(), n.item()) for n in counts] == [
            (torch.float64, 0, n) for n in want
        ]
    meta = row_counts(None, targets.to("meta"))
    assert [n.device.type for n in meta] == ["meta", "meta"]
    with pytest.raises(UsageError, match="neither labels nor targets"):
        row_counts(None, None)
    # 2^24 + 1 rows, which float32 cannot count.
    assert (
        row_counts(torch.zeros(1, dtype=torch.int8).expand(2**24 + 1), None)[0].item() == 2**24 + 1
    )


def test_the_options_of_all_calls_are_those_that_are_checked() -> None:
    taken = inspect.signature(build_row_loss).parameters.values()
    named = [p.name for p in taken if p.kind is p.KEYWORD_ONLY and p.name != "report"]
    assert list(LossOptions.__annotations__) == named
    for call in (kd_loss, kd_loss_parts, kd_linear_loss, kd_linear_loss_parts):
        last = list(inspect.signature(call).parameters.values())[-1]
        assert last.kind is last.VAR_KEYWORD and "LossOptions" in str(last.annotation)
        with pytest.raises(TypeError, match="gamma"):
            call(*[torch.zeros(2, 2)] * 2, gamma=1.0)  # type: ignore[operator]


@pytest.mark.parametrize("call", [kdcache.kd_loss, kdcache.kd_loss_parts])
def test_an_option_that_there_is_not_is_named_by_the_call(call: Any) -> None:
    """As Python says it of a function that lists its options."""
    logits, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(
        TypeError, match=r"kd_loss\(\) got an unexpected .*'alhpa' \(did you mean 'alpha'"
    ):
        call(logits, labels, alhpa=0.5)
    head = torch.zeros(3, 3)
    with pytest.raises(TypeError, match=r"kd_linear_loss\(\) got an unexpected .*'return_parts'"):
        kdcache.kd_linear_loss(logits, head, labels, return_parts=True)
