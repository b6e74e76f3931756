"""A head taken apart: hidden states times head, scaled and capped, are the logits, or the student
is refused.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdcache.errors import UsageError
from kdcache.loss.kd_linear_loss import memory_size
from kdcache.models.model import forward
from kdcache.student.head import CAPS, FEW, SCALES, Head

TEXT: dict[str, Any] = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_key_value_heads": 1,
}
A_ROW = 256  # bytes: 61 float32 logits, and 3 more to a multiple of 64
# Config and model of transformers, what the config is given, scale and soft cap.
MODELS: dict[str, tuple[str, str, dict[str, Any], float, float | None]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SMALL, 1, None),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16},
        1,
        None,
    ),
    # asks its head for a dtype
    "mamba": ("MambaConfig", "MambaForCausalLM", SMALL, 1, None),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**SMALL, "head_dim": 8, "final_logit_softcapping": 30.0},
        1,
        30,
    ),
    "recurrent gemma": (
        "RecurrentGemmaConfig",
        "RecurrentGemmaForCausalLM",
        {**SMALL, "lru_width": 16, "head_dim": 8, "logits_soft_cap": 3.0},
        1,
        3,
    ),
    # caps in place, in float32
    "xlstm": (
        "xLSTMConfig",
        "xLSTMForCausalLM",
        {"hidden_size": 16, "num_heads": 2, "num_blocks": 1, "output_logit_soft_cap": 2.5},
        1,
        2.5,
    ),
    "cohere": ("CohereConfig", "CohereForCausalLM", {**SMALL, "logit_scale": 0.3}, 0.3, None),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {**SMALL, "logits_scaling": 13.0},
        1 / 13,
        None,
    ),
    "hyperclova x": (
        "HyperCLOVAXConfig",
        "HyperCLOVAXForCausalLM",
        {**SMALL, "logits_scaling": 0.7},
        0.7,
        None,
    ),
    "bert": ("BertConfig", "BertForSequenceClassification", SMALL, 1, None),
}


def made(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config, model, values, _, _ = MODELS[name]
    if not hasattr(transformers, model):
        pytest.skip(f"this transformers has no {model}")
    torch.manual_seed(0)
    out: nn.Module = getattr(transformers, model)(
        getattr(transformers, config)(**{**TEXT, **values})
    )
    return out.eval()


def inputs() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 61, (3, 7), generator=torch.Generator().manual_seed(0))}


def head_of(module: nn.Module, memory: int | str = "1 MB") -> Head:
    return Head(module, memory_size(memory), inputs())


@pytest.mark.parametrize("name", [name for name in MODELS if name != "bert"])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_hidden_states_times_head_are_the_logits(name: str, precision: torch.dtype | None) -> None:
    """Bit for bit where the module does nothing to them; a scale and a cap are three roundings of
    half a unit, and two units of tanh."""
    model = made(name)
    names = dict(model.named_parameters())
    scale, softcap = MODELS[name][3:]
    with torch.autocast("cpu", precision, enabled=precision is not None), torch.no_grad():
        head = head_of(model)
        assert (head.scale, head.softcap) == (scale, softcap)
        expected = forward(model, inputs()).logits
        hidden = head.trunk(model, inputs()).logits
        assert hidden.shape == (3, 7, 16)
        ((_, found),) = head.chunks(hidden.flatten(0, 1), None)
    eps = 0 if (scale, softcap) == (1, None) else 4 * torch.finfo(precision or torch.float32).eps
    assert bool(((found.view(3, 7, 61) - expected).abs() <= eps * expected.float().abs()).all())
    assert (
        dict(model.named_parameters()).keys() == names.keys()
        and model.get_submodule(head.path) is head.linear
    )


def test_chunks_are_of_the_rows_that_fit_and_of_the_classes_asked_for() -> None:
    model = made("gemma2").double()
    head, expected = head_of(model, 4 * A_ROW), forward(model, inputs()).logits.flatten(0, 1)
    hidden = head.trunk(model, inputs()).logits.flatten(0, 1)
    for classes in (None, 40):
        found = list(head.chunks(hidden, classes))
        assert len(found) == 11 and all(logits.dtype == torch.float64 for _, logits in found)
        for rows, logits in found:
            torch.testing.assert_close(logits, expected[rows, :classes], rtol=1e-13, atol=1e-15)
    assert not list(head.chunks(hidden[:0], None))


def test_what_is_said_of_a_head() -> None:
    for name, said in (
        ("llama", ""),
        ("gemma2", ", soft cap 30"),
        ("granite", ", scale 0.0769231"),
    ):
        assert head_of(made(name)).after == said


# ---- what a module may do, and what it may not
# --------------------------------------------------------------------


class Model(nn.Module):
    """A causal model whose logits go through `after`, with a config that says `said`."""

    def __init__(self, after: Any = lambda x: x, zeros: bool = False, **said: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.lm_head, self.after = nn.Embedding(61, 16), nn.Linear(16, 61), after
        self.config = SimpleNamespace(**said)
        if zeros:
            for parameter in self.lm_head.parameters():
                nn.init.zeros_(parameter)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.after(self.lm_head(self.embed(input_ids)))


def cap(x: Tensor, by: float = 3.0) -> Tensor:
    return by * torch.tanh(x / by)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("after", "said", "scale", "softcap"),
    [
        *((lambda x: x * 0.3, {name: 0.3}, 0.3, None) for name in SCALES),
        *((lambda x: x / 0.3, {name: 0.3}, 1 / 0.3, None) for name in SCALES),
        *((cap, {name: 3}, 1, 3.0) for name in CAPS),
        (
            lambda x: cap(x * 0.3),
            {"output_multiplier": 0.3, "final_logit_softcapping": 3.0},
            0.3,
            3.0,
        ),
        (lambda x: cap(x.float()).bfloat16(), {"final_logit_softcapping": 3.0}, 1, 3.0),
        (lambda x: cap(x).float(), {"final_logit_softcapping": 3.0}, 1, 3.0),
        (
            lambda x: torch.tanh(x * torch.tensor(1 / 3, dtype=x.dtype)) * 3,
            {"final_logit_softcapping": 3.0},
            1,
            3.0,
        ),
        (lambda x: x.double(), {"logit_scale": None, "final_logit_softcapping": None}, 1, None),
        (lambda x: x, {"logits_scaling": 1.0, "logit_scale": "inv_sqrt_d_model"}, 1, None),
        (lambda x: x, {"get_text_config": lambda decoder: None}, 1, None),
        (
            cap,
            {"get_text_config": lambda decoder: SimpleNamespace(final_logit_softcapping=3.0)},
            1,
            3.0,
        ),
    ],
)
def test_what_a_config_says_and_its_module_does(
    after: Any,
    said: dict[str, Any],
    scale: float,
    softcap: float | None,
    precision: torch.dtype | None,
) -> None:
    for zeros in (False, True):
        with torch.autocast("cpu", precision, enabled=precision is not None):
            head = head_of(Model(after, zeros, **said).eval())
        assert (head.scale, head.softcap) == (scale, softcap)


def masked(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., 7] = -1e4
    return x


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
# a head of zeros, whose logits show nothing
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("after", "said"),
    [
        (cap, {}),
        (lambda x: x * 0.25, {}),
        (lambda x: x + 0.01, {}),
        (masked, {}),
        (lambda x: x.log_softmax(-1), {}),
        (lambda x: x[..., :50], {}),
        (lambda x: x.clamp(-3, 3), {}),
        (torch.relu, {}),
        (cap, {"softcap": 3.0}),
        (lambda x: x, {"final_logit_softcapping": 3.0}),
        (lambda x: x, {"logit_scale": 0.3}),
        (lambda x: cap(x, 3.001), {"final_logit_softcapping": 3.0}),
        (lambda x: cap(x, 300.0), {"logits_soft_cap": 301.0}),
        (lambda x: x * 0.3001, {"logit_scale": 0.3}),
        (lambda x: x.clamp(-3, 3), {"final_logit_softcapping": 3.0}),
        (lambda x: 0.3 * cap(x), {"logit_scale": 0.3, "final_logit_softcapping": 3.0}),
        (lambda x: cap(masked(x)), {"final_logit_softcapping": 3.0}),
        (lambda x: cap(x), {"logit_scale": 0.3, "final_logit_softcapping": 3.0}),
        (lambda x: x * -0.3, {"logit_scale": -0.3}),
        (lambda x: x * 0, {"logit_scale": 0.0}),
    ],
)
def test_a_model_that_does_anything_else_is_refused(
    after: Any, said: dict[str, Any], zeros: bool, precision: torch.dtype | None
) -> None:
    names = ", ".join(
        f"{name} {value:g}" for name, value in said.items() if name in CAPS + SCALES and value > 0
    )
    says = f"with its config's {names}, so" if names else r"\(a scale or a cap, say"
    with (
        torch.autocast("cpu", precision, enabled=precision is not None),
        pytest.raises(UsageError) as caught,
    ):
        head_of(Model(after, zeros, **said).eval())
    assert caught.match(f"makes other logits than its head 'lm_head' {says}") and "\n" not in str(
        caught.value
    )


def test_the_heads_own_logits_are_looked_at_too() -> None:
    """What a hook on the head does, and a class masked by its bias: the loss leaves it at -inf,
    tanh makes it -3.
    """
    hooked, masked = Model(), Model(cap, final_logit_softcapping=3.0)
    hooked.lm_head.register_forward_hook(lambda _module, _given, out: out + 1)
    masked.lm_head.bias.data[7] = -torch.inf
    for model in (hooked, masked):
        with pytest.raises(UsageError, match="Model makes other logits than its head 'lm_head'"):
            head_of(model)


def test_a_module_may_turn_its_logits_into_its_own_dtype() -> None:
    assert head_of(Model(lambda x: x.bfloat16()).bfloat16()).scale == 1


def test_a_few_positions_of_one_record_are_looked_at() -> None:
    seen = []

    class Long(Model):
        def forward(self, input_ids: Tensor, position_ids: Tensor, scale: Tensor) -> Tensor:
            seen.append((input_ids.shape, position_ids.shape, scale.shape))
            return super().forward(input_ids)

    Head(
        Long(),
        A_ROW,
        {
            "input_ids": torch.zeros(3, 40, dtype=torch.int64),
            "scale": torch.ones(3, 40, 2, 2),
            "position_ids": torch.zeros(3, 40, dtype=torch.int64),
        },
    )
    assert seen == [((1, FEW), (1, FEW), (1, FEW, 2, 2))] * 2


class TwoHeads(Model):
    def __init__(self) -> None:
        super().__init__()
        self.two = self.lm_head


class Odd(Model):
    def get_output_embeddings(self) -> nn.Module:
        return nn.Bilinear(2, 2, 2)


class Twice(Model):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.embed(input_ids)) + self.lm_head(self.embed(input_ids))


class Around(Model):
    def forward(self, input_ids: Tensor) -> Tensor:
        return nn.functional.linear(self.embed(input_ids), self.lm_head.weight, self.lm_head.bias)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: made("bert"), "is not there or returns none"),
        (lambda: nn.Linear(4, 5), "is not there or returns none"),
        (TwoHeads, "stands 2 times"),
        (Odd, "returns a Bilinear"),
        (Twice, "Twice runs its head 'lm_head' 2 times"),
        (Around, "Around runs its head 'lm_head' 0 times"),
    ],
)
def test_a_module_without_a_head_of_its_own_is_refused(model: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        head_of(model())


def test_a_memory_that_holds_no_row_is_refused() -> None:
    for memory, message in (
        (A_ROW - 1, "the logits of a single row take 256"),
        ("much", "memory is 'much'"),
    ):
        with pytest.raises(UsageError, match=message):
            head_of(Model(), memory)


def test_the_head_is_back_after_a_failure() -> None:
    model = Model()
    head = head_of(model)
    with pytest.raises(IndexError):
        head.trunk(model, {"input_ids": torch.full((3, 7), 61)})
    assert model.lm_head is head.linear and forward(model, inputs()).logits.shape == (3, 7, 61)


def test_the_trunk_is_one_graph_under_torch_compile() -> None:
    """With the hidden states and their gradient, whatever follows the head, in place or not."""
    model = Model(lambda x: cap(x.mul_(0.3)), final_logit_softcapping=3.0, logit_scale=0.3)
    head, gradients = head_of(model), []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        for _ in range(2):
            with torch._dynamo.config.patch(error_on_recompile=len(gradients) == 1):
                hidden = head.trunk(run, inputs()).logits
        hidden.square().sum().backward()
        assert torch.equal(hidden, model.embed(inputs()["input_ids"]))
        gradients.append(model.embed.weight.grad)
    assert gradients[0] is not None and gradients[1] is not None and torch.equal(*gradients)
    torch._dynamo.reset()
