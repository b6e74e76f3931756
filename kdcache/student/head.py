"""How a student's logits are made: whole, or in chunks inside the loss, its head taken apart from
its trunk.

In the latter case the trunk gives hidden states. The module's forward runs as it is written, with a
stand-in where its last linear layer is, which keeps what the layer would be given. That is the same
model only if it is known what comes after the layer: nothing, or a scale and a soft cap,
softcap * tanh(scale * x / softcap) of the layer's x. The config says which, and the module has to
prove it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from kdcache.data.padding import Inputs
from kdcache.errors import UsageError
from kdcache.loss.kd_linear_loss import kd_linear_loss_parts, rows_in
from kdcache.loss.kd_loss import LossOptions, LossParts, kd_loss_parts
from kdcache.loss.targets import SoftTargets
from kdcache.loss.torch_engine import capped, wide
from kdcache.models.model import Output, forward
from kdcache.student.settings import PRECISIONS

FEW = 16  # positions of one record: what the proof makes whole logits of
# As configs of transformers name them: Gemma, RecurrentGemma, xLSTM; Cohere, Granite, which divides
# by it (HyperCLOVA X multiplies), Falcon-H1, Muse.
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
# Units of relative rounding, eps: scale, division and product are off by half of one each, tanh by
# two, and so is each constant that a module holds in its dtype, the cap twice: 5 together, and as
# many in what it is compared with.
ROUNDINGS = 10


class WholeLogits:
    """A student whose logits are made whole: its forward pass, its loss, and its logits to evaluate.

    Both this and `ChunkedLogits` run in the precision that is asked for; weights stay as they are.
    """

    # the classes of its logits, where their shape does not show them
    num_classes: int | None = None

    def __init__(self, module: nn.Module, device: torch.device, precision: str) -> None:
        self.module, self.device, self.precision = module, device, precision

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, PRECISIONS[self.precision])

    def forward(self, run: nn.Module, inputs: Inputs) -> Output:
        """Logits, or hidden states in their place; `run` is the module, or it compiled."""
        with self.autocast():
            return forward(run, inputs)

    def width(self, output: Output) -> int:
        """How many logits a row has."""
        return output.logits.shape[-1]

    def loss(
        self,
        rows_N: Tensor,
        labels: Tensor | None,
        targets: SoftTargets | None,
        *,
        inplace: bool,
        **options: Unpack[LossOptions],
    ) -> LossParts:
        """`kd_loss_parts` of rows of what `forward` gave. inplace: nobody else reads them."""
        return kd_loss_parts(rows_N, labels, targets, inplace=inplace, **options)

    def chunks(self, rows_N: Tensor, classes: int | None) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of rows, and their logits, cut to so many classes."""
        yield slice(None), rows_N[:, :classes]


class ChunkedLogits(WholeLogits):
    """A student whose head runs inside the loss: its logits are made and used chunk by chunk.

    memory: bytes of a chunk. inputs: of a few records, for the proof (see `Head`).
    """

    def __init__(
        self, module: nn.Module, device: torch.device, precision: str, memory: int, inputs: Inputs
    ) -> None:
        super().__init__(module, device, precision)
        with self.autocast():
            self.head = Head(module, memory, inputs)
        self.num_classes = self.head.linear.out_features

    def forward(self, run: nn.Module, inputs: Inputs) -> Output:
        with self.autocast():
            return self.head.trunk(run, inputs)

    def width(self, output: Output) -> int:
        return self.head.linear.out_features

    def loss(
        self,
        rows_N: Tensor,
        labels: Tensor | None,
        targets: SoftTargets | None,
        *,
        inplace: bool,
        **options: Unpack[LossOptions],
    ) -> LossParts:
        """`kd_linear_loss_parts`, which keeps the hidden states."""
        head = self.head
        with self.autocast():
            return kd_linear_loss_parts(
                rows_N,
                head.linear.weight,
                labels,
                targets,
                bias=head.linear.bias,
                memory=head.memory,
                softcap=head.softcap,
                logit_scale=head.scale,
                **options,
            )

    def chunks(self, rows_N: Tensor, classes: int | None) -> Iterator[tuple[slice, Tensor]]:
        with self.autocast():
            yield from self.head.chunks(rows_N, classes)


class Head:
    """The nn.Linear that `module.get_output_embeddings()` returns, as causal models of transformers
    do, with the memory for its logits, and the scale and soft cap that the module gives them.

    For the proof the first FEW positions of the first of `inputs` go through the module (in eval
    mode, under the caller's autocast) as it is, and with chosen logits in place of the head's, from
    2^-8 to 2^12 and of both signs. These and the head's own the module leaves as they are, bit for
    bit, or makes of them what its config says, within ROUNDINGS. UsageError if not; where there is
    no such layer, or no plain nn.Linear (an adapter, a quantised layer); and for a memory, in
    bytes, that holds no row.
    """

    def __init__(self, module: nn.Module, memory: int, inputs: Inputs) -> None:
        self.module, self.memory = module, memory
        self.linear, self.path = _find(module)
        parent, _, self._attribute = self.path.rpartition(".")
        self._parent, self._stand_in = module.get_submodule(parent), _StandIn(self.linear)
        self.scale, self.softcap = self._proven(_first(inputs))

    @property
    def after(self) -> str:
        """What comes after the layer, to be said."""
        scale = "" if self.scale == 1 else f", scale {self.scale:g}"
        return scale + ("" if self.softcap is None else f", soft cap {self.softcap:g}")

    def trunk(self, run: nn.Module, inputs: Inputs) -> Output:
        """`forward(run, inputs)` with hidden states in place of logits; `run` is the module, or it
        compiled.
        """
        output, hidden = self._without_head(run, inputs, torch.zeros_like)
        return dataclasses.replace(output, logits=hidden)

    def chunks(self, hidden_NH: Tensor, classes: int | None) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of rows, and their logits (cut to so many classes), scaled and capped, in float32
        (float64).
        """
        weight = self.linear.weight[:classes]
        bias = None if self.linear.bias is None else self.linear.bias[:classes]
        step = rows_in(self.memory, len(hidden_NH), len(weight), weight.dtype)
        for rows in (slice(at, at + step) for at in range(0, len(hidden_NH), step)):
            x_RV = nn.functional.linear(hidden_NH[rows], weight, bias)
            yield rows, capped(x_RV.to(wide(x_RV.dtype)), self.scale, self.softcap)

    def _without_head(
        self, run: nn.Module, inputs: Inputs, logits: Callable[[Tensor], Tensor]
    ) -> tuple[Output, Tensor]:
        """What the module makes of `logits` of the hidden states, and the hidden states."""
        given = self._stand_in.given = []
        self._stand_in.logits = logits
        setattr(self._parent, self._attribute, self._stand_in)
        try:
            output = forward(run, inputs)
        finally:
            setattr(self._parent, self._attribute, self.linear)
            self._stand_in.given = []
        if len(given) != 1:
            raise UsageError(
                f"logits_memory: {type(self.module).__name__} runs its head {self.path!r} "
                f"{len(given)} times in a forward pass; expected once. Leave logits_memory out for "
                "this student"
            )
        return output, given[0]

    @torch.no_grad()
    def _proven(self, inputs: Inputs) -> tuple[float, float | None]:
        """Scale and soft cap."""
        whole = forward(self.module, inputs).logits
        made, hidden = self._without_head(self.module, inputs, self._chosen)
        own = nn.functional.linear(hidden, self.linear.weight, self.linear.bias)
        rows_in(self.memory, 1, self.linear.out_features, own.dtype)
        said = _said(self.module)
        scales = [s for name in SCALES if name in said for s in (said[name], 1 / said[name])]
        caps: list[float | None] = [said[name] for name in CAPS if name in said]
        for scale, softcap in itertools.product(scales or [1.0], caps or [None]):
            if _follows(made.logits, self._chosen(hidden), scale, softcap) and _follows(
                whole, own, scale, softcap
            ):
                return scale, softcap
        names = ", ".join(f"{name} {value:g}" for name, value in said.items())
        after = (
            f"with its config's {names}"
            if said
            else "(a scale or a cap, say, that its config does not name)"
        )
        raise UsageError(
            f"logits_memory: {type(self.module).__name__} makes other logits than its head "
            f"{self.path!r} {after}, so they cannot be taken apart from it. Leave logits_memory "
            "out for this student"
        )

    def _chosen(self, hidden: Tensor) -> Tensor:
        """Logits of every size at which a cap may be met; of 8 bits, for a module that takes them
        in another dtype.
        """
        shape = *hidden.shape[:-1], self.linear.out_features
        x = torch.logspace(-8, 12, math.prod(shape), base=2, device=hidden.device)
        x[1::2] *= -1
        return x.bfloat16().to(wide(hidden.dtype)).view(shape)


class _StandIn(nn.Linear):
    """In place of the head, with its parameters, which some models look at: keeps what it is given,
    and answers with other logits."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.given: list[Tensor] = []
        self.logits: Callable[[Tensor], Tensor] = torch.zeros_like

    def forward(self, hidden: Tensor) -> Tensor:
        self.given.append(hidden)
        return self.logits(hidden)


def _find(module: nn.Module) -> tuple[nn.Linear, str]:
    """The head and its path."""
    found = getattr(module, "get_output_embeddings", lambda: None)()
    name = type(module).__name__
    if type(found) is not nn.Linear:
        what = "returns none" if found is None else f"returns a {type(found).__name__}"
        raise UsageError(
            f"logits_memory: {name}.get_output_embeddings() is not there or {what}; the head must "
            "be an nn.Linear of its own. Leave logits_memory out for this student"
        )
    places = [
        path for path, child in module.named_modules(remove_duplicate=False) if child is found
    ]
    if len(places) != 1:
        raise UsageError(
            f"logits_memory: the head stands {len(places)} times in {name}; expected once. Leave "
            "logits_memory out for this student"
        )
    return found, places[0]


def _said(module: nn.Module) -> dict[str, float]:
    """What the module's config says of a scale and a cap, by name."""
    config: Any = getattr(module, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    found = {name: getattr(config, name, None) for name in (*SCALES, *CAPS)}
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and 0 < value < math.inf
    }


def _follows(found: Tensor, x: Tensor, scale: float, softcap: float | None) -> bool:
    """Whether `found` is what scale and cap make of logits x; to the bit, if that is x itself."""
    if found.shape != x.shape:
        return False
    if scale == 1 and softcap is None:
        dtype = torch.promote_types(found.dtype, x.dtype)
        return torch.equal(found.to(dtype), x.to(dtype))
    dtypes = [torch.finfo(t.dtype) for t in (found, x)]
    eps = ROUNDINGS * max(info.eps for info in dtypes)
    # x / softcap may be subnormal
    least = ROUNDINGS * max(info.eps * info.tiny for info in dtypes) * (softcap or 1)
    return torch.allclose(found.double(), capped(x.double(), scale, softcap), rtol=eps, atol=least)


def _first(inputs: Inputs) -> Inputs:
    """The first record, and of token ids and what goes with them position by position the first
    few.
    """
    named = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    ids = named.get("input_ids")
    tokens = ids is not None and ids.dim() == 2 and not ids.is_floating_point()
    cut = {
        name: x[:1, :FEW] if tokens and ids is not None and x.shape[:2] == ids.shape else x[:1]
        for name, x in named.items()
    }
    return cut if isinstance(inputs, dict) else cut["input_ids"]
