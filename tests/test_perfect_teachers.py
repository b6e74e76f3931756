"""A teacher that is always right, of every task: its cache is right too, and it has nothing to
learn from its cache.

Labels are what the teacher itself says of each record alone, unpadded, by plain torch: its accuracy
is 1 by construction. A wrong shift, a lost input, a padding that is looked at or a row that is none
shows as an accuracy below 1, another number of rows, or a divergence of the teacher from its own
cached answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kdcache
from kdcache.student.evaluate import evaluate
from kdcache.student.train import train_student
from kdcache.teacher.dump import dump_teacher

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
COUNT, V, PAD, START = 14, 23, 2, 1
LENGTHS = [3 + (7 * i) % 9 for i in range(COUNT)]  # 3 to 11, in no order


class Listed(list):  # type: ignore[type-arg]
    name = "listed"


@dataclass
class Case:
    """A module, its dataset, how many rows that has, and whether its tokens are all the teacher was
    asked with.
    """

    module: nn.Module
    data: Any
    rows: int
    tokens: bool
    rows_by: str
    options: Any = ()


def ids_of(i: int, length: int | None = None) -> Tensor:
    rng = np.random.default_rng(i)
    return torch.from_numpy(rng.integers(3, V, LENGTHS[i] if length is None else length))


def spread(module: nn.Module) -> Any:
    """Random weights far enough apart that every answer depends on what was asked."""
    torch.manual_seed(3)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.4)
    return module.eval()


def llama(kind: str = "LlamaForCausalLM", **more: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=PAD,
        **more,
    )
    return spread(getattr(transformers, kind)(config))


def bert(kind: str, **more: Any) -> Any:
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=PAD,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **more,
    )
    return spread(getattr(transformers, kind)(config))


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=V,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        pad_token_id=PAD,
        decoder_start_token_id=START,
        dropout_rate=0.0,
    )
    return spread(transformers.T5ForConditionalGeneration(config))


@torch.inference_mode()
def spoken(module: nn.Module, length: int, seed: int) -> Tensor:
    """A sequence that the model itself continues from its first token, token by token."""
    ids = ids_of(seed, 1)
    while len(ids) < length:
        ids = torch.cat([ids, module(ids[None]).logits[0, -1:].argmax(-1)])
    return ids


def causal() -> Case:
    module = llama()
    return Case(
        module,
        Listed({"input_ids": spoken(module, n, i)} for i, n in enumerate(LENGTHS)),
        sum(LENGTHS) - COUNT,
        True,
        "next-token",
    )


def left_padded_items() -> Case:
    module, width = llama(), max(LENGTHS) + 2
    items = Listed()
    for i, n in enumerate(LENGTHS):
        ids = spoken(module, n, i)
        items.append(
            {
                "input_ids": torch.cat([torch.full((width - n,), PAD), ids]),
                "attention_mask": (torch.arange(width) >= width - n).long(),
            }
        )
    return Case(module, items, sum(LENGTHS) - COUNT, False, "next-token")


class LeftCollated(Listed):
    @staticmethod
    def collate_fn(items: list[Any]) -> Any:
        width = max(len(item["input_ids"]) for item in items)
        pad = [width - len(item["input_ids"]) for item in items]
        return {
            "input_ids": torch.stack(
                [
                    torch.cat([torch.full((n,), PAD), item["input_ids"]])
                    for n, item in zip(pad, items, strict=True)
                ]
            ),
            "attention_mask": torch.stack([(torch.arange(width) >= n).long() for n in pad]),
        }


def left_padded_by_collate_fn() -> Case:
    case = causal()
    return Case(case.module, LeftCollated(case.data), case.rows, False, "next-token")


def right_padded_items() -> Case:
    module, width = llama(), max(LENGTHS) + 2
    items = Listed(
        {
            "input_ids": torch.cat([spoken(module, n, i), torch.full((width - n,), PAD)]),
            "attention_mask": (torch.arange(width) < n).long(),
        }
        for i, n in enumerate(LENGTHS)
    )
    return Case(module, items, sum(LENGTHS) - COUNT, True, "next-token")


def packed() -> Case:
    """Two documents a record, which transformers keeps apart by position_ids while there is no
    mask.
    """
    module, items = llama(), Listed()
    for i, n in enumerate(LENGTHS):
        first, second = spoken(module, n, i), spoken(module, 2 + i % 3, i + 50)
        starts = torch.zeros(n + len(second), dtype=torch.uint8)
        starts[[0, n]] = 1
        items.append(
            {
                "input_ids": torch.cat([first, second]),
                "document_start": starts,
                "position_ids": torch.cat([torch.arange(n), torch.arange(len(second))]),
            }
        )
    return Case(
        module,
        items,
        sum(n - 1 + 2 + i % 3 - 1 for i, n in enumerate(LENGTHS)),
        False,
        "next-token",
    )


def masked() -> Case:
    module, items, rows = bert("BertForMaskedLM"), Listed(), 0
    for i in range(COUNT):
        ids = ids_of(i)
        hidden = torch.arange(len(ids)) % 3 == i % 3
        rows += int(hidden.sum())
        ids = ids.masked_fill(hidden, 0)
        with torch.inference_mode():
            said = module(ids[None]).logits[0].argmax(-1)
        items.append({"input_ids": ids, "labels": said.masked_fill(~hidden, -100)})
    return Case(module, items, rows, True, "position")


def tagged() -> Case:
    """Fewer tags than words."""
    module, items = bert("BertForTokenClassification", num_labels=5), Listed()
    for i in range(COUNT):
        with torch.inference_mode():
            items.append(
                {"input_ids": ids_of(i), "labels": module(ids_of(i)[None]).logits[0].argmax(-1)}
            )
    return Case(module, items, sum(LENGTHS), True, "position")


class Bidirectional(nn.Module):
    """A tagger that nobody's library knows, with as many tags as words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(V, 12), nn.Linear(24, V)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        x = x if attention_mask is None else x * attention_mask[..., None]
        return self.mix(torch.cat([x, x.sum(1, keepdim=True).expand_as(x)], -1))


def tagged_by_own_model() -> Case:
    module, items = spread(Bidirectional()), Listed()
    for i in range(COUNT):
        with torch.inference_mode():
            items.append({"input_ids": ids_of(i), "labels": module(ids_of(i)[None])[0].argmax(-1)})
    return Case(module, items, sum(LENGTHS), True, "position")


def translated(equal: bool) -> Case:
    module, items, rows = t5(), Listed(), 0
    for i, n in enumerate(LENGTHS):
        target = n if equal else 2 + (5 * i) % 6
        labels = torch.zeros(0, dtype=torch.int64)
        with torch.inference_mode():
            for _ in range(target):
                decoder = torch.cat([torch.tensor([START]), labels])
                answer = module(input_ids=ids_of(i)[None], decoder_input_ids=decoder[None])
                labels = torch.cat([labels, answer.logits[0, -1:].argmax(-1)])
        rows += target
        items.append({"input_ids": ids_of(i), "labels": labels})
    return Case(module, items, rows, False, "position")


def classified_by_a_decoder() -> Case:
    module = llama("LlamaForSequenceClassification", num_labels=6)
    items = Listed()
    for i in range(COUNT):
        with torch.inference_mode():
            items.append(
                {"input_ids": ids_of(i), "labels": module(ids_of(i)[None]).logits[0].argmax()}
            )
    return Case(module, items, COUNT, False, "record")


def pictures() -> Case:
    module = spread(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 9))
    )
    x = torch.from_numpy(np.random.default_rng(0).random((COUNT, 1, 8, 8), np.float32))
    with torch.inference_mode():
        return Case(
            module, Listed(zip(x, module(x).argmax(1), strict=True)), COUNT, False, "record"
        )


class Hearing(nn.Module):
    """Speech: every second frame is heard, with the one before it; says itself which of its rows
    are real.
    """

    def __init__(self) -> None:
        super().__init__()
        self.listen = nn.Conv1d(4, 7, 2, stride=2)

    def forward(self, frames: Tensor, frame_mask: Tensor) -> Any:
        logits_BLV = self.listen((frames * frame_mask[..., None]).transpose(1, 2)).transpose(1, 2)
        lengths_B = frame_mask.sum(1) // 2
        return SimpleNamespace(
            logits=logits_BLV, row_mask=torch.arange(logits_BLV.shape[1]) < lengths_B[:, None]
        )


def frames(labelled: bool) -> Case:
    module, items = spread(Hearing()), Listed()
    for i, n in enumerate(LENGTHS):
        x = torch.from_numpy(np.random.default_rng(i).random((n, 4), np.float32))
        item = {"frames": x, "frame_mask": torch.ones(n)}
        with torch.inference_mode():
            said = module(x[None], torch.ones(1, n)).logits[0].argmax(-1)
        items.append({**item, "labels": said} if labelled else item)
    return Case(module, items, sum(n // 2 for n in LENGTHS), False, "position")


CASES: dict[str, Callable[[], Case]] = {
    "causal language model": causal,
    "left padding in the items": left_padded_items,
    "left padding by a collate_fn": left_padded_by_collate_fn,
    "right padding in the items": right_padded_items,
    "packed documents with position_ids": packed,
    "masked language model": masked,
    "token classification": tagged,
    "a tagger of one's own": tagged_by_own_model,
    "seq2seq of unequal lengths": lambda: translated(False),
    "seq2seq of equal lengths": lambda: translated(True),
    "sequence classification by a decoder": classified_by_a_decoder,
    "images": pictures,
    "speech with row_mask": lambda: frames(False),
    "labelled speech with row_mask": lambda: frames(True),
}


@pytest.mark.parametrize("name", CASES)
def test_the_cache_of_a_perfect_teacher_is_perfect(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    report = dump_teacher(
        teacher=case.module,
        data=case.data,
        out=tmp_path / "c",
        values="float32",
        batch_size=5,
        records_per_shard=6,
        device="cpu",
    )
    with kdcache.open(tmp_path / "c") as cache:
        assert cache.spec.convention == case.rows_by and cache.spec.tokens == case.tokens
        assert sum(facts.rows.get("row", facts.records) for facts in cache.shards) == case.rows
    assert report.accuracy == (None if name == "speech with row_mask" else 1.0)
    for data in [case.data, None] if case.tokens else [case.data]:
        lines: list[dict[str, Any]] = []
        train_student(
            student=case.module,
            cache=tmp_path / "c",
            data=data,
            out=tmp_path / f"run-{data is None}",
            alpha=1.0,
            temperature=1.0,
            lr=0.0,
            optimizer="sgd",
            epochs=1,
            batch_size=4,
            device="cpu",
            on_metrics=lines.append,
        )
        assert len(lines) == -(-COUNT // 4) and max(line["kd"] for line in lines) < 1e-6
        for batch in kdcache.Loader(
            tmp_path / "c", data, batch_size=6, temperature=1.0, model=case.module
        ):
            inputs = batch["inputs"]
            with torch.inference_mode():
                # with a cache of its own transformers looks at no position_ids
                if name.startswith("packed"):
                    inputs = {**inputs, "use_cache": False}
                answer = case.module(**inputs) if isinstance(inputs, dict) else case.module(inputs)
            logits = getattr(answer, "logits", answer)
            logits = logits if batch["rows"] is None else logits[batch["rows"]]
            assert float(kdcache.kd_loss(logits, None, batch["targets"], alpha=1.0)) < 1e-6
    for size in (1, 5) if report.accuracy is not None else ():
        found = evaluate(case.module, case.data, batch_size=size, device="cpu")
        assert (
            found.get("accuracy", 1.0) == 1.0 and found.get("n", found.get("tokens")) == case.rows
        )
