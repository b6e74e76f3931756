"""A student's head taken apart from its trunk: the trunk gives hidden states, and the logits are never whole.

While the head is bypassed the module's forward runs as it is written, with an identity where its last linear layer
stands, so that what it returns as logits are the hidden states. That is the same model only if nothing comes after
the layer; `check` runs both forms of it on a few positions and compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from kdcache.data.samples import Inputs
from kdcache.errors import UsageError
from kdcache.models import forward

FEW = 16                # positions of one record: what `check` makes whole logits of


class Head:
    """The nn.Linear that `module.get_output_embeddings()` returns, as causal models of transformers do.

    UsageError where there is none, or where it is not a plain nn.Linear (an adapter, a quantised layer).
    """

    def __init__(self, module: nn.Module) -> None:
        found = getattr(module, "get_output_embeddings", lambda: None)()
        name = type(module).__name__
        if type(found) is not nn.Linear:
            what = "returns none" if found is None else f"returns a {type(found).__name__}"
            raise UsageError(f"logits_memory: {name}.get_output_embeddings() is not there or {what}; the head must be "
                             f"an nn.Linear of its own. Leave logits_memory out for this student")
        places = [path for path, child in module.named_modules(remove_duplicate=False) if child is found]
        if len(places) != 1:
            raise UsageError(f"logits_memory: the head stands {len(places)} times in {name}; expected once. Leave "
                             f"logits_memory out for this student")
        self.linear, self.module, self.path = found, module, places[0]
        parent, _, self._attribute = self.path.rpartition(".")
        self._parent, self._identity = module.get_submodule(parent), nn.Identity()

    def classes(self, wanted: slice) -> tuple[Tensor, Tensor | None]:
        """Weight [V, H] and bias [V] of these classes; of all of them the parameters themselves, not views."""
        weight, bias = self.linear.weight, self.linear.bias
        if len(range(*wanted.indices(len(weight)))) == len(weight):
            return weight, bias
        return weight[wanted], None if bias is None else bias[wanted]

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Within, the module returns what its head would be given."""
        setattr(self._parent, self._attribute, self._identity)
        try:
            yield
        finally:
            setattr(self._parent, self._attribute, self.linear)

    @torch.no_grad()
    def check(self, inputs: Inputs) -> None:
        """UsageError unless the head's product of the hidden states is, bit for bit, what the module gives as logits.

        Two forward passes in eval mode over the first FEW positions of the first record, on inputs that are on the
        module's device and in the caller's autocast. A scale of the logits by a power of two passes, as it may: it
        scales the hidden states just as well.
        """
        inputs, training = _first(inputs), self.module.training
        self.module.eval()
        try:
            whole = forward(self.module, inputs).logits
            with self.bypassed():
                hidden = forward(self.module, inputs).logits
        finally:
            self.module.train(training)
        if hidden.shape[-1] != self.linear.in_features or not torch.equal(self.linear(hidden).float(), whole.float()):
            raise UsageError(f"logits_memory: {type(self.module).__name__} does more to its logits than its head "
                             f"{self.path!r} (a scale or a soft cap, say), so they cannot be taken apart from it. "
                             f"Leave logits_memory out for this student")


def bypassed(head: Head | None) -> AbstractContextManager[None]:
    """`head.bypassed()`, and nothing for a student whose logits are whole."""
    return nullcontext() if head is None else head.bypassed()


def _first(inputs: Inputs) -> Inputs:
    """The first record, and of token ids and what goes with them position by position the first few."""
    named = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    ids = named.get("input_ids")
    tokens = ids is not None and ids.dim() == 2 and not ids.is_floating_point()
    cut = {name: x[:1, :FEW] if tokens and ids is not None and x.shape[:2] == ids.shape else x[:1]
           for name, x in named.items()}
    return cut if isinstance(inputs, dict) else cut["input_ids"]
