"""What a student adds to its loss by itself: a mixture of experts its router's balance loss, as its
config asks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from student_world import TinyLM, Windows
from torch import nn

from kdcache.models.model import left_out
from kdcache.student.train import train_student

transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 24,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 1,
}
KINDS = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 3}),
    "qwen3": ("Qwen3MoeConfig", {"num_experts": 3, "moe_intermediate_size": 8, "head_dim": 4}),
}


def mixture(kind: str, **asked: Any) -> nn.Module:
    name, more = KINDS[kind]
    torch.manual_seed(3)
    config = getattr(transformers, name)(**SIZES, **more, **asked)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize("micro", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_router_is_balanced_as_its_own_loss_does(kind: str, micro: int, tmp_path: Path) -> None:
    """Two steps of SGD on the loss that the model computes itself from labels, of each micro-batch;
    `aux` without its weight."""
    asked = {"output_router_logits": True, "router_aux_loss_coef": 5.0}
    student, plain, data, said = (
        mixture(kind, **asked),
        mixture(kind, **asked),
        Windows(8, equal=True),
        list[str](),
    )
    for start in (item[1] for item in data.items):
        start[:] = 0
    lines: list[dict[str, Any]] = []
    train_student(
        student=student,
        data=data,
        out=tmp_path / "run",
        alpha=0.0,
        optimizer="sgd",
        lr=0.1,
        batch_size=8,
        micro_batch_size=micro,
        max_steps=2,
        shuffle=False,
        device="cpu",
        say=said.append,
        on_metrics=lines.append,
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    ids = torch.stack([torch.from_numpy(item[0]) for item in data.items])
    plain.train()
    for step, line in enumerate(lines[:2]):
        optimizer.param_groups[0]["lr"] = line["lr"]
        optimizer.zero_grad()
        whole = aux = 0.0
        for at in range(0, 8, micro):
            answer = plain(input_ids=ids[at : at + micro], labels=ids[at : at + micro])
            (answer.loss * micro / 8).backward()
            whole += answer.loss.item() * micro / 8
            aux += answer.aux_loss.item() * micro / 8
        optimizer.step()
        assert line["loss"] == pytest.approx(whole, rel=1e-5), step
        assert line["aux"] == pytest.approx(aux, rel=1e-5) and line["loss"] == pytest.approx(
            line["ce"] + 5 * line["aux"], rel=1e-5
        )
    for (name, a), b in zip(student.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    assert "own loss: + 5 aux, the balance of its router, as its config asks" in said


class Returning(TinyLM):
    """Returns a loss of its own beside the logits."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        logits = super().forward(input_ids, attention_mask)
        return {"logits": logits, "aux_loss": logits.square().mean()}


@pytest.mark.parametrize("weight", [None, 0.0, 0.5])
def test_a_loss_that_any_student_returns_is_added_by_its_weight_or_named(
    tmp_path: Path, weight: float | None
) -> None:
    student, said, lines = Returning(), list[str](), list[dict[str, Any]]()
    if weight is not None:
        student.router_aux_loss_coef = weight  # type: ignore[assignment]
    train_student(
        student=student,
        data=Windows(8),
        out=tmp_path / "run",
        alpha=0.0,
        max_steps=1,
        device="cpu",
        say=said.append,
        on_metrics=lines.append,
    )
    assert ("aux" in lines[0]) == bool(weight)
    assert any("the aux_loss that it returns is not trained" in line for line in said) == (
        weight is None
    )
    if weight:
        assert lines[0]["loss"] == pytest.approx(
            lines[0]["ce"] + weight * lines[0]["aux"], rel=1e-6
        )


def test_what_is_not_added_is_named(tmp_path: Path) -> None:
    said, lines = list[str](), list[dict[str, Any]]()
    train_student(
        student=mixture("mixtral"),
        data=Windows(8),
        out=tmp_path / "run",
        alpha=0.0,
        max_steps=1,
        device="cpu",
        say=said.append,
        on_metrics=lines.append,
    )
    assert "aux" not in lines[0]
    assert any(
        "the balance loss of its router (router_aux_loss_coef 0.001) is not trained: its config "
        "has "
        "output_router_logits false" in line
        for line in said
    )
    bamba = nn.Linear(1, 1)
    bamba.config = transformers.PretrainedConfig(z_loss_coefficient=0.1)  # type: ignore[assignment]
    assert "z_loss_coefficient 0.1 is not trained" in left_out(bamba, None)[0]
    assert left_out(nn.Linear(1, 1), None) == []
