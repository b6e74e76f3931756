"""Time of a student's step: without a teacher, with the cached teacher, with the live teacher, in
turns in one run.

The floor is the step without a teacher: the same batches, forward, cross-entropy, backward,
optimizer. A cached teacher adds B R bytes read (a batch of B records of R bytes each: 100 classes
as float16 in kind full, 216 bytes), their copy to the device, and the soft part of a loss that
reads the B V logits anyway. A live teacher adds its forward pass: with T multiplications an image,
and S for the student's forward, about T / (3 S) of the floor, since backward costs twice the
forward. T and S are counted from the layers and reported.

    kdcache bench end-to-end [--quick] [--rounds N] [--device cuda]
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcache.bench.race import command, finish, machine, median_ratio, race, spread, table
from kdcache.cache.reader import Cache
from kdcache.cache.reader import open as open_cache
from kdcache.loss.kd_loss import kd_loss
from kdcache.student.loader import Loader
from kdcache.teacher.dump import dump_teacher

TEMPERATURE, ALPHA = 2.0, 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Images, models and how long they are raced."""

    samples: int = 2048
    side: int = 32
    classes: int = 100
    student_width: int = 16
    teacher_width: int = 32
    # 14 times the student's multiplications, as ResNet-50 has those of MobileNetV2
    teacher_depth: int = 2
    batch: int = 64
    steps: int = 10
    rounds: int = 7


QUICK = Sizes(
    samples=64, side=8, classes=10, student_width=4, teacher_width=8, batch=16, steps=2, rounds=2
)


class Images:
    """Random images in memory: what is timed is the step, not an image decoder."""

    name, revision = "bench-images", "1"
    pure_items = True

    def __init__(self, sizes: Sizes) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(sizes.samples, 3, sizes.side, sizes.side, generator=generator)
        self.y = torch.randint(sizes.classes, (sizes.samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[i], self.y[i]


def convnet(width: int, depth: int, classes: int) -> nn.Module:
    """Three stages of `depth` convolutions, each stage twice as wide and half as fine: (B, 3, H, W)
    -> (B, classes).
    """
    layers: list[nn.Module] = []
    channels = 3
    for stage in range(3):
        for block in range(depth):
            out = width * 2**stage
            stride = 2 if stage and not block else 1
            layers += [
                nn.Conv2d(channels, out, 3, stride, 1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(),
            ]
            channels = out
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )


def multiplications(model: nn.Module, side: int) -> int:
    """Multiplications of one forward pass of one image, of convolutions and linear layers."""
    total = 0

    def count(module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d | nn.Linear):
            total += module.weight.numel() * output[0, 0].numel()

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    with torch.inference_mode():
        model.eval()(torch.zeros(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    return total


def end_to_end(
    quick: bool = False, rounds: int | None = None, device: str | None = None
) -> dict[str, Any]:
    """Race the three steps and return one JSON object: sizes, seconds a step, ratios, machine."""
    sizes = QUICK if quick else Sizes()
    rounds = sizes.rounds if rounds is None else rounds
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(0)
    data = Images(sizes)
    teacher = convnet(sizes.teacher_width, sizes.teacher_depth, sizes.classes)
    student = convnet(sizes.student_width, 1, sizes.classes)
    work = {
        "teacher": multiplications(teacher, sizes.side),
        "student": multiplications(student, sizes.side),
    }
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as folder:
        path = Path(folder) / "cache"
        dump_teacher(
            teacher=teacher,
            data=data,
            out=path,
            kind="full",
            batch_size=sizes.batch,
            device=str(place),
        )
        cache = open_cache(path)
        step = partial(train, student, data, sizes, place)
        seconds = race(
            {
                "no teacher": partial(step, None),
                "cached": partial(step, cache),
                "live teacher": partial(step, None, teacher),
            },
            rounds,
        )
        record_bytes = sum(column.row_bytes for column in cache.spec.columns())
    steps = {
        name: {
            "step_seconds": {key: value / sizes.steps for key, value in spread(s).items()},
            "times_no_teacher": median_ratio(s, seconds["no teacher"]),
        }
        for name, s in seconds.items()
    }
    return {
        "bench": "end_to_end",
        "command": command(),
        "machine": machine(),
        "device": str(place),
        "rounds": rounds,
        "batch": sizes.batch,
        "steps": sizes.steps,
        "classes": sizes.classes,
        "side": sizes.side,
        "multiplications": work,
        "record_bytes": record_bytes,
        "contenders": steps,
    }


def train(
    student: nn.Module,
    data: Images,
    sizes: Sizes,
    device: torch.device,
    cache: Cache | None,
    teacher: nn.Module | None = None,
) -> None:
    """`sizes.steps` optimizer steps, ended by a wait for the device; the same batches whoever
    teaches, or nobody.
    """
    student.to(device).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    taught = cache is not None or teacher is not None
    loader = Loader(
        cache,
        data,
        batch_size=sizes.batch,
        temperature=TEMPERATURE if taught else None,
        max_steps=sizes.steps,
        device=device,
        live_teacher=teacher,
    )
    alpha = ALPHA if taught else 0.0
    for batch in loader:
        loss = kd_loss(student(batch["inputs"]), batch["labels"], batch["targets"], alpha=alpha)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def render(result: dict[str, Any]) -> str:
    """The table."""
    work = result["multiplications"]
    rows = [
        [name, 1000 * one["step_seconds"]["median"], one["times_no_teacher"]]
        for name, one in result["contenders"].items()
    ]
    return (
        table(["", "ms a step", "x no teacher"], rows)
        + f"\nteacher / student multiplications: {work['teacher'] / work['student']:.1f}"
    )


if __name__ == "__main__":
    finish(end_to_end(quick="--quick" in sys.argv[1:]), render)
