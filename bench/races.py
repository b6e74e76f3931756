"""The benchmarks by name. One entry here makes `kdcache bench NAME`, and a step of `make gpu`.

`kdcache bench NAME` calls the function `kdcache.bench.MODULE.MODULE(quick=..., rounds=..., ...)`,
which returns one JSON object, and prints `MODULE.render(object)` and the object; with `plot`,
`MODULE.draw(object, file)` draws it. What the object lists under "errors" is printed and makes the
exit code 1, after everything is kept.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Race:
    """`options`: which of device, plot and folder the function takes besides quick and rounds."""

    name: str
    module: str
    help: str
    options: tuple[str, ...] = ()


RACES = (
    Race(
        "shard-io",
        "shard_io",
        "Write and read shards of both containers, against a bare gather from memory.",
        ("folder",),
    ),
    Race(
        "end-to-end",
        "end_to_end",
        "Time of a student's step: no teacher, the cached teacher, the live teacher.",
        ("device",),
    ),
    Race(
        "loss",
        "loss_speed",
        "The distillation loss and its gradient: the fused kernel against the copy bandwidth and "
        "its rivals; on a CPU the torch engine against the definition.",
        ("device", "plot"),
    ),
    Race(
        "kd-linear",
        "lm_head_speed",
        "The loss behind an LM head, its logits never whole, against its bare products.",
        ("device",),
    ),
    Race(
        "topk-lse",
        "topk_speed",
        "What is kept of a teacher's logits: the kernel against the copy bandwidth and torch.",
        ("device",),
    ),
)
