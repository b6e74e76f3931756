"""One teacher, one cache: equal weights under another configuration, other answers, and answers
that are none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from forge import digest_of
from teacher_world import Points, Sentences, dumper, mlp
from torch import nn

import kdcache
from kdcache.cache.canonical import seal
from kdcache.errors import IdentityMismatch, KDCacheError
from kdcache.models.fingerprint import architecture
from kdcache.teacher.agreement import committed_records
from kdcache.teacher.verify import verify

# the sample that a first dump stops at, after four shards of ten records
STOPPED = 40


class Stop(Exception):
    """Ends a dump in the middle."""


def begin(out: Path, teacher: nn.Module, data: Any, **options: Any) -> None:
    """Some shards of a dump, which something then stops."""

    def stop(progress: Any) -> None:
        if progress.records >= STOPPED // 2:
            raise Stop

    with pytest.raises(KDCacheError, match=r"^progress: Stop"):
        dumper(out)(
            teacher=teacher, data=data, batch_size=5, records_per_shard=10, progress=stop, **options
        )


def llama(**changes: Any) -> nn.Module:
    """A tiny Llama; whatever changes, its weights are the same."""
    fields = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "attn_implementation": "eager",
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**fields, **changes})).eval()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            "config.rope_parameters.rope_theta",
        ),
        ({"rms_norm_eps": 1e-2}, "config.rms_norm_eps"),
        ({"hidden_act": "gelu"}, "config.hidden_act"),
        ({"attn_implementation": "sdpa"}, "config.attn_implementation"),
        ({"max_position_embeddings": 128}, "config.max_position_embeddings"),
        ({"some_future_cap": 30.0}, "config.some_future_cap"),
    ],
)
def test_equal_weights_under_another_configuration_are_another_teacher(
    tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    out, data = tmp_path / "c", Sentences(23)
    begin(out, llama(), data, k=3)
    with pytest.raises(
        IdentityMismatch, match=rf"\n  teacher\.{field}: cache has .*, given is "
    ) as caught:
        dumper(out)(teacher=llama(**changes), data=data, batch_size=5, k=3)
    assert all(
        d.field.startswith(("teacher.config", "teacher.modules")) for d in caught.value.fields
    )
    dumper(out)(teacher=llama(), data=data, batch_size=5, k=3)
    report = verify(out, teacher=llama(**changes), data=data, device="cpu")
    assert any(f"teacher.{field}: cache has" in problem for problem in report.problems)
    assert verify(out, teacher=llama(), data=data, device="cpu").ok


def test_what_cannot_change_an_answer_is_not_part_of_who_answers() -> None:
    same = [
        {"attention_dropout": 0.5},
        {"use_cache": False},
        {"initializer_range": 1.0},
        {"id2label": {0: "a", 1: "b"}},
        {"architectures": ["X"]},
        {"_name_or_path": "/somewhere"},
        {"transformers_version": "0.1"},
    ]
    for changes in same:
        assert architecture(llama(**changes)) == architecture(llama()), changes
    json.dumps(architecture(llama()))


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.append(nn.Softplus(beta=2)),
        lambda net: setattr(net[0], "eps", 1.0),
        lambda net: net[1].__setattr__("padding", (1, 1)),
    ],
    ids=["another module", "an eps", "a padding"],
)
def test_of_other_modules_the_tree_with_what_each_says_of_itself_is_compared(
    change: Callable[[Any], None],
) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.GroupNorm(1, 4), nn.Conv2d(4, 4, 1), nn.Dropout(0.1))

    other = net()
    other[2] = nn.Dropout(0.5)
    assert architecture(other) == architecture(net())
    change(other)
    assert architecture(other) != architecture(net())


class Scaled(nn.Module):
    """A teacher whose answers depend on what is in no state_dict and no repr."""

    def __init__(self, by: float = 1.0) -> None:
        super().__init__()
        self.net, self.by = mlp(), by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.by * self.net(x)


@pytest.mark.parametrize(
    "options",
    [
        {"k": 3},
        {"kind": "full", "values": "uint8"},
        {"kind": "none", "features": ["net.2:raw:int8"]},
        {"views": 2},
    ],
)
def test_a_dump_that_goes_on_asks_again_about_what_is_committed(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    class Inside(Scaled):  # so that a feature depends on it too
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(self.by * x)

    out, dump = tmp_path / "c", dumper(tmp_path / "c")
    begin(out, Inside(), Points(), **options)
    before = {path.name for path in (out / "commit").iterdir()}
    for accept in ([], ["class_names"]):  # another name accepts no other difference
        with pytest.raises(
            IdentityMismatch,
            match=r"record \d+ \(sample \d+, view 0\): the teacher's answer differs "
            r"from the cache by .*--accept answers",
        ) as caught:
            dump(teacher=Inside(1.05), accept=accept, **options)
        assert "\n" not in str(caught.value) and before == {
            path.name for path in (out / "commit").iterdir()
        }
    said: list[str] = []
    report = dump(teacher=Inside(1.05), accept=["answers"], say=said.append, **options)
    assert report.complete and [code for code, _ in report.warnings][-1] == "answers"
    assert any(line.startswith("warning: ") and line.endswith("Accepted.") for line in said)


def test_the_right_teacher_is_asked_again_cheaply_and_said_so(tmp_path: Path) -> None:
    class Counting(Scaled):
        asked = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Counting.asked += len(x)
            return super().forward(x)

    begin(tmp_path / "c", Counting(), Points())
    with kdcache.open(tmp_path / "c", allow_partial=True) as cache:
        records = committed_records(cache, cache.missing())
        assert 1 < len(records) <= 4
        shards = {int(shard) for shard in cache.spec.locate(np.array(records))[0]}
        assert not shards & {*cache.missing()} and len(shards) == min(
            4, cache.spec.num_shards - len(cache.missing())
        )
        left = sum(
            cache.spec.shard(shard).stop - cache.spec.shard(shard).start
            for shard in cache.missing()
        )
    Counting.asked, said = 0, list[str]()
    dumper(tmp_path / "c")(teacher=Counting(), batch_size=5, say=said.append)
    assert f"asked again about {len(records)} of the committed records" in "\n".join(said)
    # the probe, the first batch, and these
    assert Counting.asked <= left + 8 + 2 * 5 + 1 + 2 * len(records)


def test_a_cache_that_does_not_say_its_configuration_is_continued_and_it_is_said(
    tmp_path: Path,
) -> None:
    out = tmp_path / "c"
    begin(out, mlp(), Points())
    header = json.loads((out / "header.json").read_bytes())
    del header["xxh3_128"], header["identity"]["teacher"]["modules"]
    (out / "header.json").write_bytes(seal(header))
    for path in (out / "commit").iterdir():
        commit = json.loads(path.read_bytes())
        del commit["xxh3_128"]
        path.write_bytes(seal({**commit, "header": digest_of((out / "header.json").read_bytes())}))
    said: list[str] = []
    assert dumper(out)(say=said.append).complete
    assert "not compared, as the cache was made before it was kept: teacher.modules" in said
    report = verify(out, teacher=mlp(), data=Points(), device="cpu")
    assert report.ok and any("teacher.modules is not compared" in note for note in report.notes)


class Odd(nn.Module):
    """Another teacher, which says something that is no number about one point; alone or in the
    large batch.
    """

    def __init__(
        self, value: float, at: torch.Tensor | None = None, *, alone: bool | None = None
    ) -> None:
        super().__init__()
        self.net, self.value, self.at, self.alone = mlp(), value, at, alone

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        said = 5 * self.net(x).flip(1)
        here = (
            torch.ones(len(x), 1, dtype=torch.bool)
            if self.at is None
            else (x == self.at).all(1, keepdim=True)
        )
        if self.alone is not None:
            here = here & (self.alone == (len(x) == 1))
        return torch.where(here, torch.full_like(said, self.value), said)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), float("-inf")])
@pytest.mark.parametrize(
    "options",
    [
        {"kind": "full"},
        {"k": 3, "values": "float32"},
        {"k": 3, "values": "uint8"},
        {"kind": "none", "features": ["net:raw:float32"]},
    ],
)
def test_an_answer_that_is_not_finite_never_hides_another(
    tmp_path: Path, value: float, options: dict[str, Any]
) -> None:
    data = Points()

    class Net(nn.Module):
        def __init__(self, after: nn.Module) -> None:
            super().__init__()
            self.net = after

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    dumper(tmp_path / "c")(teacher=Net(mlp()), data=data, **options)
    for alone in (None, True, False):
        report = verify(
            tmp_path / "c",
            teacher=Net(Odd(value, data.x[0], alone=alone)),
            data=data,
            device="cpu",
            samples=50,
        )
        assert any(
            "record 0 (sample 0, view 0): the teacher's answer has a" in p for p in report.problems
        ), report
        assert any("the teacher's answer differs from the cache by" in p for p in report.problems)
        assert report.worst_difference is not None and np.isfinite(report.worst_difference)
    every = verify(tmp_path / "c", teacher=Net(Odd(value)), data=data, device="cpu")
    assert not every.ok and "records asked about have such answers" in " ".join(every.problems)


@pytest.mark.parametrize("values", ["float32", "float16", "bfloat16", "uint8"])
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-37, 1e-20, 3e37])
@pytest.mark.parametrize("kind", [{"kind": "full"}, {"k": 2}])
def test_the_right_teacher_passes_however_small_or_large_its_logits(
    tmp_path: Path, values: str, size: float, kind: dict[str, Any]
) -> None:
    class Sized(Scaled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 100 * size

    dumper(tmp_path / "c")(teacher=Sized(), values=values, **kind)
    report = verify(tmp_path / "c", teacher=Sized(), data=Points(), device="cpu", samples=10)
    assert report.ok, report.problems
