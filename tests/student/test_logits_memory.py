"""Training with the head inside the loss is training without: the same losses and weights, steps,
runs and refusals.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from linear_world import Allocations
from student_world import VOCABULARY, Net, Points, TinyLM, Windows, write_cache
from torch import nn

from kdcache.cache.spec import FeatureSpec
from kdcache.errors import KDCacheError, UsageError
from kdcache.student.head import FEW as FEW_POSITIONS
from kdcache.student.train import train_student

DATA = Windows(24)
FEW = "1 KiB"  # two rows of float64 logits, each a multiple of 64 elements


class Headed(TinyLM):
    """A causal model that says which layer its head is, as those of transformers do."""

    def get_output_embeddings(self) -> nn.Module:
        return self.head


class Capped(Headed):
    """With a scale and a cap that bend logits of about 1."""

    config: Any = SimpleNamespace(logit_scale=1.5, final_logit_softcapping=0.5)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return 0.5 * torch.tanh(1.5 * super().forward(input_ids, attention_mask) / 0.5)


class Silent(Capped):
    config = None


class Lying(Capped):
    config = SimpleNamespace(logit_scale=1.5, final_logit_softcapping=0.6)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("head") / "cache"
    write_cache(
        path, DATA, TinyLM(16, seed=3), kind="topk", tiers=(5,), tokens=True, labels=True
    ).close()
    return path


def trained(out: Path, student: nn.Module, cache: Any, **options: Any) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    options = {
        "batch_size": 8,
        "epochs": 2,
        "optimizer": "sgd",
        "lr": 0.1,
        "device": "cpu",
        **options,
    }
    train_student(student=student, out=out, cache=cache, on_metrics=lines.append, **options)
    return lines


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.0},
        {"alpha": 1.0, "divergence": "jsd", "beta": 0.3},
        {"micro_batch_size": 3},
        {"data": DATA},
        {"eval_data": DATA, "eval_every": 2},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("student", [Headed, Capped])
def test_the_head_inside_the_loss_changes_nothing(
    student: Callable[[], nn.Module], cache: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """In float64 another order of sums leaves 2^-53 of sums of about 100 terms of order 1, in each
    of 6 steps.
    """
    same_training(student().double(), cache, tmp_path, 1e-11, **options)


def same_training(student: nn.Module, cache: Any, path: Path, rel: float, **options: Any) -> None:
    """Six steps or more without and with the head inside the loss."""
    students = {None: student, FEW: copy.deepcopy(student)}
    lines = {
        size: trained(path / str(size), one, cache, logits_memory=size, **options)
        for size, one in students.items()
    }
    assert len(lines[None]) == len(lines[FEW]) >= 6
    for a, b in zip(lines[None], lines[FEW], strict=True):
        assert a.keys() == b.keys()
        assert all(
            a[key] == pytest.approx(b[key], rel=rel) for key in a if key != "samples_per_second"
        )
    for (name, a), (_, b) in zip(*(s.state_dict().items() for s in students.values()), strict=True):
        assert float((a - b).abs().max()) <= rel * float(a.abs().max()), name


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("Gemma2", {"final_logit_softcapping": 0.2, "head_dim": 4}),
        ("Cohere", {"logit_scale": 3.0}),
        ("Granite", {"logits_scaling": 0.4}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_models_of_transformers_that_cap_or_scale(
    model: str, said: dict[str, float], cache: Path, tmp_path: Path
) -> None:
    """Their norms are float32 whatever the weights are: what is off by 2^-53 may be rounded to the
    next of 2^-24.
    """
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{model}Config")(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **said,
    )
    same_training(
        getattr(transformers, f"{model}ForCausalLM")(config).double(),
        cache,
        tmp_path,
        1e-6,
        eval_data=DATA,
    )


def test_a_compiled_student_is_the_same(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    same_training(Capped().double(), cache, tmp_path, 1e-11, compile=True)
    torch._dynamo.reset()


def test_labels_alone_without_a_cache(tmp_path: Path) -> None:
    students = {size: Headed().double() for size in (None, FEW)}
    losses = [
        [
            line["loss"]
            for line in trained(
                tmp_path / str(size), student, None, data=DATA, alpha=0.0, logits_memory=size
            )
        ]
        for size, student in students.items()
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-11)


@pytest.mark.parametrize("student", [Headed, Capped])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_step_check_or_evaluation_makes_whole_logits(
    student: type[Headed], tmp_path: Path, precision: str
) -> None:
    """8 records of 9 tokens make some 60 rows, 4 times what the proof of a head makes of one, of a
    cap in float64; a chunk has 8."""
    classes, data = 4096, Windows(16, equal=True)
    cache = write_cache(
        tmp_path / "cache",
        data,
        Headed(vocabulary=classes, seed=3),
        kind="topk",
        tiers=(5,),
        tokens=True,
    )
    row, largest = 4 * classes, {}
    for size in (None, f"{8 * row} B"):
        with Allocations() as seen:
            trained(
                tmp_path / str(size),
                student(vocabulary=classes),
                cache,
                epochs=1,
                precision=precision,
                eval_data=data,
                logits_memory=size,
            )
        largest[size] = seen.largest
    whole, chunked = largest.values()
    assert whole > 3 * FEW_POSITIONS * row and chunked <= FEW_POSITIONS * row * (
        1 + (student is Capped)
    )


@pytest.mark.parametrize("student", [Headed, Capped])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_kernels_train_the_same_student(
    student: Callable[[], nn.Module], cache: Path, tmp_path: Path, precision: str, device: str
) -> None:
    """One step: as far from plain training as the precision makes two ways of adding."""
    options: dict[str, Any] = {
        "epochs": None,
        "max_steps": 1,
        "precision": precision,
        "device": device,
    }
    losses = [
        trained(tmp_path / str(i), student(), cache, **options, **more)[0]["loss"]
        for i, more in enumerate(({}, {"logits_memory": FEW, "engine": "triton"}))
    ]
    eps = torch.finfo(getattr(torch, precision)).eps
    assert losses[0] == pytest.approx(losses[1], rel=8 * eps) and losses[0] > 0


def test_a_run_is_continued_and_its_chunks_are_an_option_of_it(cache: Path, tmp_path: Path) -> None:
    said: list[str] = []
    whole = trained(
        tmp_path / "whole", Headed(dropout=0.2), cache, logits_memory=FEW, say=said.append
    )
    assert f"logits: never whole, in chunks of {FEW} inside the loss" in said
    trained(tmp_path / "capped", Capped(), cache, logits_memory=FEW, say=said.append, dry_run=True)
    assert (
        f"logits: never whole, in chunks of {FEW} inside the loss, scale 1.5, soft cap 0.5" in said
    )

    class Stop(Exception):
        pass

    def stop(info: Any) -> None:
        if info.step == 4:
            raise Stop

    with pytest.raises(KDCacheError, match=r"^on_step: Stop"):
        trained(
            tmp_path / "run",
            Headed(dropout=0.2),
            cache,
            logits_memory=FEW,
            save_every=1,
            on_step=stop,
        )
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    rest = trained(tmp_path / "run", Headed(dropout=0.2), cache, logits_memory=FEW, save_every=1)
    losses = [line["loss"] for line in whole]
    assert [line["loss"] for line in rest] == losses[-len(rest) :] and 0 < len(rest) < len(losses)
    other = trained(tmp_path / "other", Headed(dropout=0.2), cache, save_every=1, say=said.append)
    assert (
        f"from here on: logits-memory nothing, was '{FEW}': the same mathematics to other bits"
        in said
    )
    # Up to 64 rows are summed in another order, which moves a sum by at most 64 * 2^-24 = 4e-6 of
    # it, in up to 5 steps.
    assert [line["loss"] for line in other] == pytest.approx(losses[-len(rest) :], rel=2e-5)


def test_a_hint_from_the_head_itself_is_refused(tmp_path: Path) -> None:
    class HeadedNet(Net):
        def get_output_embeddings(self) -> nn.Module:
            return self.head

    data, body = (
        Points(16),
        FeatureSpec(name="body", module="body", recipe="raw", dtype="float32", shape=(32,)),
    )
    with_features = write_cache(tmp_path / "cache", data, Net(32, seed=7), features=[body])
    for module, refused in (("body", False), ("head", True)):
        options = {"data": data, "match": [f"{module}=body:mse"], "logits_memory": FEW}
        if refused:
            with pytest.raises(UsageError, match="match names 'head', the head"):
                trained(tmp_path / module, HeadedNet(), with_features, **options)
        else:
            assert trained(tmp_path / module, HeadedNet(), with_features, **options)


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        (
            Silent,
            {},
            r"Silent makes other logits than its head 'head' \(a scale or a cap, say, that its "
            r"config does not",
        ),
        (
            Lying,
            {},
            "Lying makes .* with its config's logit_scale 1.5, final_logit_softcapping 0.6, so "
            "they cannot",
        ),
        (TinyLM, {}, "is not there or returns none"),
        (Headed, {"logits_memory": "much"}, "memory is 'much'"),
        (Headed, {"logits_memory": "8 B"}, "the logits of a single row take"),
    ],
)
def test_what_cannot_be_is_refused(
    cache: Path, tmp_path: Path, student: type[nn.Module], options: dict[str, Any], message: str
) -> None:
    for dry_run in (True, False):
        with pytest.raises(UsageError, match=message):
            trained(
                tmp_path / "run",
                student(),
                cache,
                **{"logits_memory": FEW, **options},
                dry_run=dry_run,
            )
    # so that the same command without the option may take the place
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [None, FEW])
def test_micro_batches_and_steps_without_a_row_learn_nothing(
    tmp_path: Path, size: str | None
) -> None:
    """A record of one token predicts none: 3 of the first 4 records, the second step whole."""
    data = Windows(6)
    for i in (0, 2, 3):
        data.items[i] = (data.items[i][0][:1], data.items[i][1][:1])
    cache = write_cache(
        tmp_path / "cache", data, TinyLM(16, seed=3), kind="topk", tiers=(5,), tokens=True
    )
    lines = trained(
        tmp_path / "run",
        Headed(),
        cache,
        epochs=1,
        batch_size=2,
        micro_batch_size=1,
        shuffle=False,
        logits_memory=size,
    )
    assert (
        [line["loss"] > 0 for line in lines]
        == [line["grad_norm"] > 0 for line in lines]
        == [True, False, True]
    )
