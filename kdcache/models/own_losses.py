"""What a model adds to its loss when it trains, beside what its logits say: a router's load
balancing, known by name.

Mixtures of experts of transformers return `aux_loss` beside the logits where their config says
`output_router_logits`, and add it to the loss of their labels, which nothing here gives them, times
`router_aux_loss_coef` (JetMoE:
`aux_loss_coef`; DBRX: `ffn_config.moe_loss_weight`). The same is added here, whatever else is
trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# attributes of a module, or of its config
WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")
# Losses that models compute inside their own forward, only where it is given labels: they cannot be
# added.
INSIDE = ("router_z_loss_coef", "z_loss_coefficient")


@dataclass(frozen=True, slots=True)
class OwnLoss:
    """`weight` times `value`, a scalar with its graph, is what the model adds; None where nobody
    says its weight.
    """

    value: Tensor
    weight: float | None


def own_loss(module: Any, answer: Any) -> OwnLoss | None:
    """The `aux_loss` of what a model returned, with its weight; None where there is none, or its
    weight is 0.
    """
    value = (
        answer.get("aux_loss") if isinstance(answer, Mapping) else getattr(answer, "aux_loss", None)
    )
    if not isinstance(value, Tensor) or value.numel() != 1 or (weight := own_weight(module)) == 0:
        return None
    return OwnLoss(value.reshape(()), weight)


def own_weight(module: Any) -> float | None:
    """The weight of a module's `aux_loss`, as it or its config names it."""
    for where in (module, *_configs(module)):
        for name in WEIGHTS:
            found = getattr(where, name, None)
            if isinstance(found, int | float) and not isinstance(found, bool):
                return float(found)
    return None


def left_out(module: Any, given: OwnLoss | None) -> list[str]:
    """A sentence for each loss that a model's config names, or that it returned (`given`), and that
    is not added.
    """
    said = []
    if given is not None and given.weight is None:
        said.append(
            "the aux_loss that it returns is not trained: neither it nor its config has "
            + " or ".join(WEIGHTS)
        )
    for config in _configs(module):
        weight = own_weight(module)
        if given is None and weight:
            off = getattr(config, "output_router_logits", None) is False
            said.append(
                f"the balance loss of its router (router_aux_loss_coef {weight:g}) is not trained: "
                + ("its config has output_router_logits false" if off else "it returns no aux_loss")
            )
        for name in INSIDE:
            if isinstance(found := getattr(config, name, None), int | float) and found > 0:
                said.append(
                    f"the loss of its config's {name} {found:g} is not trained: it is computed "
                    "inside of its "
                    "forward, from labels"
                )
    return list(dict.fromkeys(said))


def _configs(module: Any) -> list[Any]:
    """The config of a model of transformers, and that of its text part."""
    config = getattr(module, "config", None)
    if config is None:
        return []
    text = (
        config.get_text_config(decoder=True)
        if callable(getattr(config, "get_text_config", None))
        else config
    )
    return [config] if text is config else [config, text]
