"""Small teachers and datasets for the tests of stage 1, and what a cache of them must hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kdcache.teacher.dump import DumpReport, dump_teacher

torch.set_num_threads(1)  # nets this small only wait for each other's threads
CLASSES = 12
WIDTH = 6


class Points:
    """`count` points with their classes; `fail_at` makes one sample unreadable."""

    name = "points"
    revision = "1"

    def __init__(
        self, count: int = 50, *, fail_at: int | None = None, shift: int = 0, classes: int = CLASSES
    ) -> None:
        rng = np.random.default_rng(7)
        self.x = torch.from_numpy(rng.normal(size=(count, WIDTH)).astype(np.float32))
        with torch.no_grad():
            self.y = (mlp(classes)(self.x).argmax(1) + shift) % classes
        self.fail_at = fail_at

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        if i == self.fail_at:
            raise RuntimeError("the disk ate it")
        return self.x[i], self.y[i]


class Noisy(Points):
    """Points whose views add noise from the generator of the view."""

    def view(self, sample_id: int, view: int, rng: np.random.Generator) -> Any:
        return self.x[sample_id] + torch.from_numpy(
            rng.normal(size=WIDTH).astype(np.float32)
        ), self.y[sample_id]


class Sentences:
    """Token sequences of several lengths; a document may start within one."""

    name = "sentences"

    def __init__(self, count: int = 23, vocab: int = 40) -> None:
        rng = np.random.default_rng(3)
        self.items = []
        for i in range(count):
            ids = torch.from_numpy(rng.integers(0, vocab, 2 + i % 5))
            start = torch.zeros(len(ids), dtype=torch.uint8)
            start[[0] if i % 4 else [0, len(ids) // 2]] = 1
            self.items.append({"input_ids": ids, "document_start": start})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


def mlp(classes: int = CLASSES, seed: int = 0) -> nn.Sequential:
    """Points -> logits; module "0", "1", "2"."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, classes))
        with torch.no_grad():
            net[2].weight.mul_(6)
    return net


class Speaker(nn.Module):
    """Tokens -> logits of the next one; each position hears only itself and the one before."""

    def __init__(self, vocab: int = 40, width: int = 8) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.embed = nn.Embedding(vocab, width)
            self.head = nn.Linear(width, vocab)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = self.embed(input_ids)
        before = torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        return self.head(3 * x + before)


class Broken(nn.Module):
    """`net`, except that it says `value` somewhere in the row of the point `x`."""

    def __init__(self, net: nn.Module, x: torch.Tensor, value: float) -> None:
        super().__init__()
        self.net, self.value = net, value
        self.register_buffer("x", x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.net(x)
        logits[(x == self.x).all(1), 3] = self.value
        return logits


def files(cache: Path) -> dict[str, bytes]:
    """Every file of a cache, by its name within it."""
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file()
    }


Dump = Callable[..., DumpReport]


def dumper(out: Path) -> Dump:
    """dump_teacher with small defaults, into a folder."""

    def call(**changes: Any) -> DumpReport:
        return dump_teacher(
            **{"teacher": mlp(), "data": Points(), "out": out, "device": "cpu", **changes}
        )

    return call
