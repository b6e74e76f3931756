"""Training is a plain loop of torch: weights after a few steps, for every option that changes the
mathematics.

The loop below is written from docs and papers alone: dense probabilities, torch's autograd, SGD
with momentum and its learning rate by hand. 20 records, batches of 8 in their order for two epochs:
5 steps, of which one spans the epochs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_world import by_hand
from student_world import CLASSES, Net, Points, TinyLM, Windows
from torch import Tensor, nn

from kdcache.student.train import train_student
from kdcache.teacher.dump import dump_teacher

RECORDS, BATCH, STEPS, LR = 20, 8, 5, 0.1


class Seen(Points):
    """Every view of a sample is moved by something of its own; with `labels` a record has two of
    them.
    """

    def __init__(self, labels: str = "one") -> None:
        super().__init__(RECORDS)
        self.labels = labels
        self.share = (torch.arange(RECORDS) % 5) / 4

    def view(self, sample_id: int, view: int, rng: Any) -> Any:
        x = self.x[sample_id] + 0.3 * view
        if self.labels == "one":
            return {"x": x, "labels": self.y[sample_id]}
        two = {"x": x, "labels": torch.stack([self.y[sample_id], self.y[sample_id - 1]])}
        if self.labels == "alike":
            return two
        share = self.share[sample_id]
        return two | {"label_weight": torch.stack([share, 1 - share])}

    def __getitem__(self, i: int) -> Any:
        return self.view(i, 0, None)


class Headed(Net):
    """A student whose head may run inside the loss."""

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


@pytest.fixture(scope="module")
def teacher() -> Net:
    return Net(32, seed=7).eval()


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, teacher: Net) -> dict[str, Path]:
    """All classes, or the 4 largest of 7 with a tier of 2; two views; two labels a record; and
    features.
    """
    folder = tmp_path_factory.mktemp("caches")
    full: dict[str, Any] = {"kind": "full", "features": ["body:raw:float32"]}
    kinds: dict[str, tuple[Points, dict[str, Any]]] = {
        "full": (Seen(), full),
        "topk": (Seen(), {"k": 4, "tiers": [2], "temperatures": [1, 2]}),
        "views": (Seen(), full | {"views": 2}),
        "weighed": (Seen("weighed"), full),
        "alike": (Seen("alike"), full),
    }
    for name, (data, options) in kinds.items():
        dump_teacher(
            teacher=teacher, data=data, out=folder / name, values="float32", device="cpu", **options
        )
    return {name: folder / name for name in kinds}


def learning_rate(step: int, warmup: float) -> float:
    """Linear over the warm-up's steps, then half a cosine to 0."""
    first = round(warmup * STEPS) if warmup < 1 else round(warmup)
    if step < first:
        return LR * (step + 1) / first
    return LR * 0.5 * (1 + math.cos(math.pi * (step - first) / (STEPS - first)))


def plain_run(
    student: nn.Module,
    teacher: Net,
    data: Seen,
    *,
    views: int = 1,
    extra: list[nn.Parameter] | None = None,
    hint: Callable[[Tensor, Tensor], Tensor] | None = None,
    classes: int | None = None,
    k: int | None = None,
    temperature: float = 2.0,
    alpha: float = 0.5,
    ce_weight: float | None = None,
    kd_weight: float | None = None,
    divergence: str = "forward_kl",
    beta: float | None = None,
    tail: str = "bucket",
    clip: float = 0.0,
    weight_decay: float = 0.0,
    warmup: float = 0.0,
    precision: str = "float32",
    **same: Any,
) -> list[float]:
    """Trains `student`; the losses of its steps. `hint`: of the bodies of student and teacher."""
    assert set(same) <= {"micro_batch_size", "logits_memory", "match", "live_teacher"}, (
        "they leave the mathematics"
    )
    w_ce, w_kd = (
        (1 - alpha, alpha) if ce_weight is None or kd_weight is None else (ce_weight, kd_weight)
    )
    parameters = [*student.parameters(), *(extra or [])]
    momentum = [torch.zeros_like(p) for p in parameters]
    losses = []
    for step in range(STEPS):
        places = range(BATCH * step, BATCH * (step + 1))
        items = [data.view(i % RECORDS, i // RECORDS % views, None) for i in places]
        x, y = (torch.stack([item[name] for item in items]) for name in ("x", "labels"))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            z = student(x)[:, :classes]
        y, weight = y.reshape(BATCH, -1), torch.ones(BATCH, 1)
        if data.labels != "one":
            weight = torch.stack(
                [item.get("label_weight", torch.full((2,), 0.5)) for item in items]
            )
        ce = -(weight * torch.log_softmax(z.double(), -1).gather(1, y)).sum(1).mean()
        with torch.no_grad():
            t = teacher(x).double()
        q, ids = torch.softmax(t / temperature, -1), None if k is None else t.topk(k).indices
        kd = by_hand(
            z.double(), q, ids, temperature, divergence, tail, 0.5 if beta is None else beta
        ).mean()
        loss = w_ce * ce + w_kd * temperature**2 * kd
        if hint is not None:
            with torch.no_grad():
                wanted = teacher.body(x)
            loss = loss + hint(student.body(x), wanted)  # type: ignore[operator]
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        factor = min(1.0, clip / (float(norm) + 1e-6)) if clip else 1.0
        with torch.no_grad():
            for p, g, v in zip(parameters, gradients, momentum, strict=True):
                v.mul_(0.9).add_(factor * g + (weight_decay * p if p.dim() >= 2 else 0))
                p.sub_(learning_rate(step, warmup) * v)
        losses.append(loss.item())
    return losses


def projection(width: int, wanted: int) -> nn.Linear:
    """As `Matches` draws it: uniform within 1 / sqrt(width), of the run's seed alone."""
    layer, generator = nn.Linear(width, wanted), torch.Generator().manual_seed(0)
    for p in layer.parameters():
        nn.init.uniform_(p, -(width**-0.5), width**-0.5, generator=generator)
    return layer


CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "temperature": {"temperature": 3.0},
    "temperature 1": {"temperature": 1.0},
    "alpha": {"alpha": 0.9},
    "alpha 1": {"alpha": 1.0},
    "weights": {"ce_weight": 0.3, "kd_weight": 1.7},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd", "beta": 0.3},
    "tv": {"divergence": "tv"},
    "bucket": {"cache": "topk"},
    "tier": {"cache": "topk", "k": 2, "temperature": 1.0},
    "bucket, reverse_kl": {"cache": "topk", "divergence": "reverse_kl"},
    "conditional": {"cache": "topk", "tail": "conditional", "divergence": "jsd"},
    "renormalise": {"cache": "topk", "tail": "renormalise", "divergence": "tv"},
    "uniform": {"cache": "topk", "tail": "uniform"},
    "clip": {"clip": 0.05},
    "weight decay": {"weight_decay": 0.3},
    "warmup": {"warmup": 3},
    "warm": {"warmup": 0.4},
    "micro-batches": {"micro_batch_size": 3},
    "views": {"cache": "views"},
    "labels with weights": {"cache": "weighed", "micro_batch_size": 5},
    "labels alike": {"cache": "alike"},
    "bfloat16": {"precision": "bfloat16"},
    "live teacher": {"cache": None},
    "live top": {"cache": None, "k": 4},
    "wider": {"beyond": 3},
    "wider, cut": {"beyond": 3, "classes": CLASSES},
    "between": {"beyond": 3, "classes": 9},
    "wider, bucket": {"beyond": 3, "cache": "topk", "divergence": "jsd"},
    "wider, uniform": {"beyond": 3, "cache": "topk", "tail": "uniform", "micro_batch_size": 3},
    "wider, live": {"beyond": 3, "cache": None, "divergence": "tv"},
    "head in the loss": {"logits_memory": "300"},
    "wider, head": {"logits_memory": "300", "beyond": 3, "cache": "topk"},
    "cut, head": {"logits_memory": "300", "beyond": 3, "classes": CLASSES, "divergence": "jsd"},
    "hint": {"match": ["body=body_raw:mse:0.5"]},
    "hint by cosine": {"match": ["body=body_raw:cosine:2"], "alpha": 1.0},
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_a_plain_loop(
    name: str, caches: dict[str, Path], teacher: Net, tmp_path: Path
) -> None:
    options = dict(CASES[name])
    cache, beyond = options.pop("cache", "full"), options.pop("beyond", 0)
    data = Seen(cache if cache in ("weighed", "alike") else "one")
    student, plain, start = (Headed(8, CLASSES + beyond) for _ in range(3))
    source: dict[str, Any] = (
        {"live_teacher": teacher} if cache is None else {"cache": caches[cache]}
    )
    seen: list[float] = []
    report = train_student(
        student=student,
        data=data,
        out=tmp_path / "run",
        batch_size=BATCH,
        max_steps=STEPS,
        lr=LR,
        optimizer="sgd",
        shuffle=False,
        device="cpu",
        on_step=lambda i: seen.append(i.loss.item()),
        **source,
        **options,
    )
    mathematics: dict[str, Any] = dict(options)
    if cache == "topk":
        mathematics.setdefault("k", 4)
    if "match" in options:
        layer, loss = projection(8, 32), options["match"][0].split(":")[1]
        mathematics["extra"] = list(layer.parameters())
        mathematics["hint"] = {
            "mse": lambda ours, theirs: 0.5 * ((layer(ours) - theirs) ** 2).mean(),
            "cosine": lambda ours, theirs: (
                2
                * (
                    1
                    - (nn.functional.normalize(layer(ours)) * nn.functional.normalize(theirs)).sum(
                        -1
                    )
                ).mean()
            ),
        }[loss]
    # Without a cache epoch e has view e.
    losses = plain_run(
        plain, teacher, data, views=2 if cache in ("views", None) else 1, **mathematics
    )
    # float32 twice, from other formulas; in bfloat16 each gradient of a logit, and of a weight, is
    # rounded to 2^-9.
    coarse = options.get("precision") == "bfloat16"
    assert seen == pytest.approx(losses, rel=2e-2 if coarse else 2e-5) and report.steps == STEPS
    for (part, a), b, before in zip(
        student.named_parameters(), plain.parameters(), start.parameters(), strict=True
    ):
        moved = float((b - before).detach().abs().max())
        assert moved > 1e-4 or (beyond and part.startswith("head")), part
        wrong = float((a - b).detach().abs().max())
        assert wrong <= (2.0**-7 if coarse else 1e-4) * moved + 1e-7, (part, wrong, moved)
    if options.get("classes") == CLASSES:
        assert torch.equal(student.head.weight[CLASSES:], start.head.weight[CLASSES:])


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_batches_without_rows_are_no_loss_and_change_no_other(tmp_path: Path, loss: str) -> None:
    """Of windows of one token, which predict nothing: alone in a micro-batch, and a whole batch of
    them.
    """
    data, ended = Windows(8, equal=True), []
    data.items = [
        (ids[:length], start[:length])
        for (ids, start), length in zip(data.items, (1, 1, 1, 1, 9, 1, 5, 7), strict=True)
    ]
    dump_teacher(
        teacher=TinyLM(seed=3),
        data=data,
        out=tmp_path / "c",
        k=3,
        features=["mix:raw:float32"],
        device="cpu",
    )
    for micro in (4, 1):
        student, lines = TinyLM(seed=1), list[dict[str, Any]]()
        before = [p.detach().clone() for p in student.parameters()]
        train_student(
            student=student,
            cache=tmp_path / "c",
            out=tmp_path / f"{micro}",
            batch_size=4,
            max_steps=2,
            micro_batch_size=micro,
            match=[f"mix=mix_raw:{loss}"],
            optimizer="sgd",
            shuffle=False,
            lr=0.5,
            device="cpu",
            on_metrics=lines.append,
            on_step=lambda i, b=before: i.step > 1 or assert_same(i.model, b),
        )
        numbers = [
            lines[0][name]
            for name in ("loss", "ce", "kd", f"match mix=mix_raw:{loss}:1", "grad_norm")
        ]
        assert numbers == [0] * 5 and lines[1]["loss"] > 0
        ended.append(student)
    for a, b, start in zip(*(m.parameters() for m in ended), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert not torch.equal(a, start)


def assert_same(model: nn.Module, before: list[Tensor]) -> None:
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_adamw_decays_matrices_alone_and_is_torchs(
    caches: dict[str, Path], teacher: Net, tmp_path: Path
) -> None:
    data, student, plain = Seen(), Net(8), Net(8)
    train_student(
        student=student,
        data=data,
        cache=caches["full"],
        out=tmp_path / "run",
        batch_size=BATCH,
        max_steps=STEPS,
        lr=LR,
        weight_decay=0.2,
        shuffle=False,
        device="cpu",
        alpha=1.0,
    )
    groups: list[dict[str, Any]] = [
        {"params": [p for p in plain.parameters() if p.dim() >= 2], "weight_decay": 0.2},
        {"params": [p for p in plain.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    for step in range(STEPS):
        x = data.x[torch.arange(BATCH * step, BATCH * (step + 1)) % RECORDS]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 0)
        log_q = torch.log_softmax(teacher(x).detach() / 2, -1)
        loss = 4 * nn.functional.kl_div(
            torch.log_softmax(plain(x) / 2, -1), log_q, log_target=True, reduction="batchmean"
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for a, b in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
