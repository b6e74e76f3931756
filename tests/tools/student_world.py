"""Small datasets, teachers, students and caches for the tests of stage 2; caches are written with
numpy alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import kdcache
from kdcache.cache.codec import encode_rows
from kdcache.cache.columns import Columns
from kdcache.cache.features import encode_feature
from kdcache.cache.identity import Identity
from kdcache.cache.reader import Cache
from kdcache.cache.rows import Rows
from kdcache.cache.spec import CacheSpec, FeatureSpec
from kdcache.data.collate import Collated, collate
from kdcache.data.identify import identify
from kdcache.data.row_selection import next_token_rows
from kdcache.data.samples import Samples
from kdcache.loss.topk import exact_topk, tail_lse
from kdcache.models.model import forward
from kdcache.student.settings import Settings, check_options, resolve
from kdcache.student.train import train_student

CLASSES, WIDTH, VOCABULARY = 7, 5, 23
BODY = FeatureSpec(name="body", module="body", recipe="raw", dtype="float32", shape=(32,))
torch.set_num_threads(1)  # these modules are far too small for two


class Points:
    """Gaussian points with the class of the nearest of some centres."""

    pure_items = True
    name = "points"
    revision = "1"

    def __init__(self, n: int = 50, seed: int = 0, classes: int = CLASSES) -> None:
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(classes, WIDTH, generator=torch.Generator().manual_seed(99))
        self.x = torch.randn(n, WIDTH, generator=generator)
        self.y = torch.cdist(self.x, centres).argmin(1)
        self.class_names = [f"class {i}" for i in range(classes)]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i], self.y[i]


class Windows:
    """Token windows of 3 to 9 ids; a document starts inside some of them."""

    pure_items = True
    name = "windows"
    revision = "1"
    window = 9

    def __init__(self, n: int = 24, seed: int = 0, equal: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.tokenizer_identity = {"fingerprint": "0" * 64, "template": "none", "packing": "given"}
        self.items = []
        for i in range(n):
            length = 9 if equal else int(rng.integers(3, 10))
            # A chain with little noise: there is something to learn.
            ids = (
                int(rng.integers(VOCABULARY)) + np.arange(length) * 3 + (rng.random(length) < 0.1)
            ) % VOCABULARY
            start = np.zeros(length, np.uint8)
            start[0] = i % 2
            start[length // 2] = i % 3 == 0
            self.items.append((ids.astype(np.int64), start))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        ids, start = self.items[i]
        return {"input_ids": torch.from_numpy(ids), "document_start": torch.from_numpy(start)}


class Net(nn.Module):
    """A small classifier with dropout and a batch norm: state and randomness that a checkpoint must
    hold.
    """

    def __init__(
        self,
        hidden: int = 16,
        classes: int = CLASSES,
        seed: int = 0,
        dropout: float = 0.0,
        norm: bool = False,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(WIDTH, hidden), nn.Tanh())
            self.norm = nn.BatchNorm1d(hidden) if norm else nn.Identity()
            self.drop = nn.Dropout(dropout)
            self.head = nn.Linear(hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.norm(self.body(x))))


class TinyLM(nn.Module):
    """Causal: position p sees tokens up to p, as a running mean of embeddings."""

    def __init__(
        self, width: int = 8, vocabulary: int = VOCABULARY, seed: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(vocabulary, width)
            self.mix = nn.Linear(2 * width, width)
            self.drop = nn.Dropout(dropout)
            self.head = nn.Linear(width, vocabulary)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = self.embed(input_ids)
        mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return self.head(self.drop(torch.tanh(self.mix(torch.cat([x, mean], -1)))))


def batches(samples: Samples, size: int, views: int = 1) -> list[tuple[int, int, Collated]]:
    """(view, first sample, batch) in the order of a dump."""
    return [
        (
            view,
            at,
            collate(
                [samples.item(i, view) for i in range(at, min(at + size, len(samples)))], samples
            ),
        )
        for view in range(views)
        for at in range(0, len(samples), size)
    ]


@torch.inference_mode()
def write_cache(
    path: Path,
    dataset: Any,
    teacher: nn.Module,
    *,
    kind: str = "full",
    values: str = "float32",
    tiers: Sequence[int] = (),
    temperatures: Sequence[str] = ("1", "2"),
    per_shard: int = 16,
    views: int = 1,
    labels: bool = True,
    tokens: bool = False,
    features: Sequence[FeatureSpec] = (),
    seed: int = 0,
    view_keys: bool = False,
) -> Cache:
    """The cache that a dump of `teacher` over `dataset` makes, in batches of `per_shard`."""
    samples = Samples(dataset, seed=seed)
    first = collate([samples.item(0)], samples)
    ragged = first.lengths is not None
    classes = 0 if kind == "none" else forward(teacher.eval(), first.inputs).logits.shape[-1]
    spec = CacheSpec(
        kind=kind,
        num_classes=classes,
        samples=(0, len(samples)),
        records_per_shard=per_shard,
        views=(0, views),
        seed=seed,
        rows="ragged" if ragged else "one",
        tiers=tuple(tiers),
        values=values,
        temperatures=tuple(temperatures) if kind == "topk" else (),
        labels=int(labels and kind != "none"),
        tokens=tokens,
        predicts="next-token" if ragged and not tokens else "",
        features=tuple(features),
        view_keys=view_keys,
    )
    data, tokenizer = identify(samples)
    identity = Identity(
        data=data, tokenizer=tokenizer, teacher={"weights": "none", "num_classes": classes}
    )
    with kdcache.create(path, spec, identity) as writer:
        for shard, (_, _, collated) in enumerate(batches(samples, per_shard, views)):
            writer.write(shard, _columns(spec, collated, teacher))
    return kdcache.open(path)


def _columns(spec: CacheSpec, collated: Collated, teacher: nn.Module) -> Columns:
    out: Columns = {"sample_key": collated.sample_key}
    if spec.view_keys:
        out["view_key"] = collated.view_key
    seen: dict[str, torch.Tensor] = {}
    modules = dict(teacher.named_modules())
    hooks = [
        modules[f.module].register_forward_hook(
            lambda _m, _i, o, name=f.name: seen.__setitem__(name, o)
        )
        for f in spec.features
    ]
    logits = forward(teacher, collated.inputs).logits
    for hook in hooks:
        hook.remove()
    rows = None
    labels = collated.labels
    if spec.rows == "ragged":
        rows = next_token_rows(collated)
        logits, labels = logits[rows.mask_BL], rows.labels_N
    for feature in spec.features:
        value = seen[feature.name][rows.mask_BL] if feature.level == "row" else seen[feature.name]
        out |= encode_feature(feature, value.float().numpy())
    if spec.kind != "none":
        out |= encode_rows(
            spec, _rows(spec, logits, labels, None if rows is None else rows.positions_N)
        ).columns
        if rows is not None:
            out["row.offsets"] = np.concatenate([[0], np.cumsum(rows.counts_B)]).astype(np.int64)
    if spec.tokens:
        out["token"] = np.concatenate(collated.tokens).astype(np.uint16)
        out["document_start"] = np.concatenate(collated.document_starts).astype(np.uint8)
        out["token.offsets"] = np.concatenate([[0], np.cumsum(collated.lengths)]).astype(np.int64)
    return out


def _rows(
    spec: CacheSpec, logits: torch.Tensor, labels: torch.Tensor | None, positions: Any
) -> Rows:
    label = None if not spec.labels else labels.numpy().astype(np.int64)[:, None]
    if spec.kind == "full":
        return Rows(logits=logits.numpy(), label=label, pos=positions)
    ids, values = exact_topk(logits, spec.k)
    tails = []
    for k in spec.tiers:
        left_out = (
            ids[:, :k] if label is None else torch.cat([ids[:, :k], torch.from_numpy(label)], 1)
        )
        tails.append(
            tail_lse(logits, left_out, values[:, 0], [float(t) for t in spec.temperatures])
        )
    label_logit = None if label is None else logits.gather(1, torch.from_numpy(label)).numpy()
    return Rows(
        ids=ids.numpy(),
        logits=values.numpy(),
        tail_lse=torch.stack(tails, 1).numpy(),
        label=label,
        label_logit=label_logit,
        pos=positions,
    )


def equal_weights(a: nn.Module, b: nn.Module) -> bool:
    """Bit for bit."""
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def run(out: Path, student: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Train and give the metrics of the steps."""
    lines: list[dict[str, Any]] = []
    train_student(student=student, out=out, on_metrics=lines.append, **options)
    return [line for line in lines if "loss" in line]


def settings_of(
    spec: CacheSpec | None,
    device: str = "cpu",
    live_teacher: nn.Module | None = None,
    **given: Any,
) -> Settings:
    """What the arguments of `train_student` come to, without evaluation data."""
    signature = inspect.signature(train_student).parameters
    arguments = {name: parameter.default for name, parameter in signature.items()} | given
    options = check_options(arguments, torch.device(device))
    return resolve(options, spec, live_teacher=live_teacher, evaluated=False)
