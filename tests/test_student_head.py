"""A head taken apart: hidden states times head are the logits, bit for bit, or the student is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdcache.errors import UsageError
from kdcache.models import forward
from kdcache.student.head import FEW, Head

TEXT: dict[str, Any] = {"vocab_size": 61}
SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
                         "num_key_value_heads": 1}


def made(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model: nn.Module = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, **SMALL)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_embd=16, n_layer=1, n_head=2, n_positions=16, **TEXT)),
        "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(
            **TEXT, **SMALL, head_dim=8, final_logit_softcapping=30.0)),
        "cohere": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(
            **TEXT, **SMALL, eos_token_id=1, logit_scale=0.3)),
        "cohere, a quarter": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(
            **TEXT, **SMALL, eos_token_id=1, logit_scale=0.25)),
        "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, **TEXT)),
    }[name]()
    return model.train()


def inputs() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(61, (3, 7), generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere, a quarter"])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_hidden_states_times_head_are_the_logits(name: str, precision: torch.dtype | None) -> None:
    model = made(name)
    head = Head(model)
    names = dict(model.named_parameters())
    with torch.autocast("cpu", precision, enabled=precision is not None):
        head.check(inputs())
        expected = forward(model, inputs()).logits
        with head.bypassed():
            hidden = forward(model, inputs()).logits
        assert hidden.shape == (3, 7, 16)
        if name != "gpt2":              # which has drop-out: another forward pass is another mask
            assert torch.equal(nn.functional.linear(hidden, *head.classes(slice(None))), expected)
    assert model.training and dict(model.named_parameters()).keys() == names.keys()
    assert model.get_submodule(head.path) is head.linear


def test_the_head_is_back_after_a_failure() -> None:
    model = made("llama")
    head = Head(model)
    with pytest.raises(KeyError), head.bypassed():
        raise KeyError
    assert forward(model, inputs()).logits.shape == (3, 7, 61)


@pytest.mark.parametrize("name", ["gemma2", "cohere"])
def test_a_model_that_changes_its_logits_is_refused(name: str) -> None:
    model = made(name)
    with pytest.raises(UsageError, match="does more to its logits than its head 'lm_head'"):
        Head(model).check(inputs())


class Cut(nn.Module):
    """Cuts its logits, and so the hidden states too where they stand in their place."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(61, 16), nn.Linear(16, 61)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))[..., :5]


def test_a_model_that_cuts_its_logits_is_refused() -> None:
    with pytest.raises(UsageError, match="does more to its logits than its head 'head'"):
        Head(Cut()).check(inputs())


def test_a_few_positions_of_one_record_are_looked_at() -> None:
    seen = []

    class Long(Cut):
        def forward(self, input_ids: Tensor, position_ids: Tensor, scale: Tensor) -> Tensor:
            seen.append((input_ids.shape, position_ids.shape, scale.shape))
            return self.head(self.embed(input_ids))

    Head(Long()).check({"input_ids": torch.zeros(3, 40, dtype=torch.int64), "scale": torch.ones(3, 40, 2, 2),
                        "position_ids": torch.zeros(3, 40, dtype=torch.int64)})
    assert seen == [((1, FEW), (1, FEW), (1, FEW, 2, 2))] * 2


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = self.two = nn.Linear(4, 5)

    def get_output_embeddings(self) -> nn.Module:
        return self.one


class Odd(TwoHeads):
    def get_output_embeddings(self) -> nn.Module:
        return nn.Bilinear(2, 2, 2)


@pytest.mark.parametrize(("model", "message"), [
    (lambda: made("bert"), "is not there or returns none"), (lambda: nn.Linear(4, 5), "is not there or returns none"),
    (TwoHeads, "stands 2 times"), (Odd, "returns a Bilinear")])
def test_a_module_without_a_head_of_its_own_is_refused(model: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Head(model())
