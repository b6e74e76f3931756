"""Hint losses: a student module's activation is drawn towards a cached teacher feature (FitNets,
arXiv 1412.6550).

    STUDENT_MODULE=FEATURE:LOSS[:WEIGHT]

The student's activation goes through the recipe of the feature, then, where only the widths differ,
through a learned projection (a linear map of the last axis, a 1 x 1 convolution for maps), then
into LOSS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdcache.cache.spec import CacheSpec, FeatureSpec
from kdcache.data.padding import Real
from kdcache.errors import NotBuilt, UsageError, did_you_mean
from kdcache.loss.targets import column_tensor
from kdcache.loss.torch_engine import wide
from kdcache.models.feature_recipes import reduce_activation

if TYPE_CHECKING:
    from kdcache.cache.reader import Batch

LATER = ("at", "attention_transfer", "sp", "rkd", "rkd_distance", "rkd_angle", "pkt", "cka", "nst")


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all elements of (student - teacher)^2; FitNets sums and halves. Of no elements it
    is 0.
    """
    return _mean((student - teacher).square())


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cos over vectors: along the channels of a map (B, C, H, W), along the last axis
    otherwise. Of no vectors it is 0."""
    return _mean(
        1 - nn.functional.cosine_similarity(student, teacher, dim=1 if student.dim() == 4 else -1)
    )


def attention_map(energy: Tensor) -> Tensor:
    """Energies (B, H, W) as the attention maps (B, H W) of arXiv 1612.03928: flattened and divided
    by their L2 norms.

    With Q_S, Q_T such maps the paper's loss of a pair of layers is || Q_S - Q_T ||_2 for each
    record. `mse` of them is its square, divided by the H W elements and averaged over the records:
    what its authors' code computes. `cosine` of them is half that square: 1 - Q_S . Q_T.
    """
    return nn.functional.normalize(energy.flatten(1), dim=1)


def _mean(x: Tensor) -> Tensor:
    """The mean over all elements, 0 where there are none: a batch may have no rows."""
    return x.sum() / max(x.numel(), 1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "cosine": cosine}


@dataclass(frozen=True, slots=True)
class Match:
    """One `--match`: `weight` times `loss` between `module` of the student and the cached feature
    `feature`.
    """

    module: str
    feature: str
    loss: str
    weight: float = 1.0

    def __str__(self) -> str:
        return f"{self.module}={self.feature}:{self.loss}:{self.weight:g}"


def parse_match(text: str) -> Match:
    """The match of STUDENT_MODULE=FEATURE:LOSS[:WEIGHT]; UsageError, or NotBuilt for a loss of a
    later version.
    """
    module, equals, rest = text.partition("=")
    feature, *options = rest.split(":")
    if not (module and equals and feature and 1 <= len(options) <= 2):
        raise UsageError(
            f"--match {text!r}: expected STUDENT_MODULE=FEATURE:LOSS[:WEIGHT], e.g. "
            "body.3=layer2:mse:0.5"
        )
    loss = options[0]
    if loss in LATER:
        raise NotBuilt(
            f"--match {text!r}: loss {loss!r} is not built yet; this version has "
            f"{', '.join(LOSSES)}"
        )
    if loss not in LOSSES:
        raise UsageError(f"--match {text!r}: loss {loss!r} is unknown{did_you_mean(loss, LOSSES)}")
    try:
        weight = float(options[1]) if len(options) == 2 else 1.0
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UsageError(f"--match {text!r}: weight {options[1]!r} is not a positive number")
    return Match(module, feature, loss, weight)


class Matches(nn.Module):
    """All matches of a student; its parameters are the learned projections, and join the optimizer.

    Hooks on the student keep what its modules return while gradients are on. Build the projections
    with `prepare` before the optimizer; then, after each forward pass of the student, call with the
    cached features of the same records. Where a module runs several times in a pass, its last
    output counts. The student is not a submodule.
    """

    def __init__(
        self,
        student: nn.Module,
        matches: Sequence[Match],
        features: Sequence[FeatureSpec],
        *,
        seed: int = 0,
    ) -> None:
        """UsageError for a feature or module name that is not there, naming near ones."""
        super().__init__()
        known, modules = {f.name: f for f in features}, dict(student.named_modules())
        self.matches = tuple(matches)
        for match in self.matches:
            if match.feature not in known:
                raise UsageError(
                    f"--match {match}: the cache has no feature "
                    f"{match.feature!r}{did_you_mean(match.feature, known)}"
                )
            if match.module not in modules:
                raise UsageError(
                    f"--match {match}: the student has no module "
                    f"{match.module!r}{did_you_mean(match.module, (name for name in modules if name))}"
                )
        self.features = {match.feature: known[match.feature] for match in self.matches}
        self.seed = seed
        self.projections = nn.ModuleList()
        self.losses: dict[str, Tensor] = {}  # of the last call, unweighted, without gradient
        self._student = (student,)  # in a tuple: not a submodule
        self._seen: dict[str, Tensor] = {}
        self._preparing = False
        names = dict.fromkeys(match.module for match in self.matches)
        self._hooks = [modules[name].register_forward_hook(self._keep(name)) for name in names]

    def prepare(
        self, run: Callable[[], object], *, real: Real | None = None, row_mask: Tensor | None = None
    ) -> None:
        """Build the projections from the shapes of one forward pass of the student, `run`, in eval
        mode, no gradients.

        Neither the student nor a global random generator is changed. `real` and `row_mask` as in
        `forward`. UsageError where student and feature cannot be brought to one shape.
        """
        (student,) = self._student
        training = [module for module in student.modules() if module.training]
        student.eval()
        self._preparing = True
        try:
            with torch.no_grad():
                run()
                self.projections = nn.ModuleList(
                    self._projection(index, self._activation(match, real, row_mask))
                    for index, match in enumerate(self.matches)
                )
        finally:
            self._preparing = False
            self._seen.clear()
            for module in training:
                module.training = True

    def forward(
        self,
        features: Mapping[str, Tensor],
        *,
        real: Real | None = None,
        row_mask: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum of the losses: a scalar, in float32 (float64 for a float64 student).

        `features` by name, [B, *shape], or [N, *shape] of a feature of level row. `real` says which
        positions of the batch are no padding; `row_mask` bool (B, L) which have a row in the cache.
        """
        if len(self.projections) != len(self.matches):
            raise RuntimeError(
                "Matches.prepare has not run: the projections are built from a first forward pass"
            )
        self.losses = {}
        total = torch.zeros(())
        for match, projection in zip(self.matches, self.projections, strict=True):
            activation = self._activation(match, real, row_mask)
            weights = list(projection.parameters())
            student = projection(activation.to(weights[0].dtype) if weights else activation).to(
                wide(activation.dtype)
            )
            teacher = features[match.feature].to(student.device, student.dtype)
            if student.shape != teacher.shape:
                raise _shapes(match, student.shape, teacher.shape)
            if self.features[match.feature].recipe == "energy":
                student, teacher = attention_map(student), attention_map(teacher)
            loss = LOSSES[match.loss](student, teacher)
            self.losses[str(match)] = loss.detach()
            total = total.to(loss) + match.weight * loss
        self._seen.clear()
        return total

    def learned(self) -> list[str]:
        """A sentence about each projection that is learned."""
        found = [
            (match, list(projection.parameters()))
            for match, projection in zip(self.matches, self.projections, strict=True)
        ]
        return [
            f"match {match}: through a learned projection from {weights[0].shape[1]} to "
            f"{weights[0].shape[0]}, kept in state.safetensors and no part of the student"
            for match, weights in found
            if weights
        ]

    def close(self) -> None:
        """Take the hooks off the student."""
        for hook in self._hooks:
            hook.remove()
        self._seen.clear()

    def _keep(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._preparing or torch.is_grad_enabled():
                self._seen[name] = _tensor(name, output)

        return hook

    def _activation(self, match: Match, real: Real | None, row_mask: Tensor | None) -> Tensor:
        """The student's side of a match, through the recipe of the feature, as it entered the last
        forward pass.
        """
        if match.module not in self._seen:
            raise UsageError(
                f"--match {match}: the student's forward pass did not run module {match.module!r}"
            )
        feature, seen = self.features[match.feature], self._seen[match.module]
        if feature.level != "row":
            return reduce_activation(feature.recipe, seen, real or Real(), match.module)
        if row_mask is None or row_mask.shape != seen.shape[:2]:
            given = "none was given" if row_mask is None else f"it is {list(row_mask.shape)}"
            raise UsageError(
                f"--match {match}: the feature has one vector per row, so the activation "
                f"{list(seen.shape)} needs a row mask over its first two axes; {given}"
            )
        return seen[row_mask.to(seen.device, torch.bool)]

    def _projection(self, index: int, activation: Tensor) -> nn.Module:
        match, is_map = self.matches[index], activation.dim() == 4
        have, want = tuple(activation.shape[1:]), self.features[match.feature].shape
        if have == want:
            return nn.Identity()
        axis = 0 if is_map else len(have) - 1  # of the channels, the batch left out
        differ = [i for i, (a, b) in enumerate(zip(have, want, strict=False)) if a != b]
        if (
            len(have) != len(want)
            or differ != [axis]
            or self.features[match.feature].recipe == "energy"
        ):
            raise _shapes(match, have, want)
        dtype = wide(activation.dtype)
        sizes = (have[axis], want[axis], 1) if is_map else (have[axis], want[axis])
        layer: nn.Module = nn.utils.skip_init(
            nn.Conv2d if is_map else nn.Linear,
            *sizes,  # type: ignore[no-untyped-call]
            dtype=dtype,
        )
        # A generator of its own: projections depend on the seed alone, and nobody else's draws
        # move. Drawn on the CPU.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + index) % 2**63)
        # the bound that nn.Linear and nn.Conv2d start from
        bound = 1 / math.sqrt(have[axis])
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        return layer.to(activation.device)


def feature_tensors(
    batch: Batch,
    names: Sequence[str],
    *,
    spec: CacheSpec | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Cached features of a batch by name, float32 [B, *shape] on `device`; UsageError for a name
    the cache lacks.
    """
    known = {f.name: f for f in (batch.spec if spec is None else spec).features}
    device, out = torch.device(device), {}
    for name in names:
        if name not in known:
            raise UsageError(f"the cache has no feature {name!r}{did_you_mean(name, known)}")
        feature = known[name]
        stored = column_tensor(batch, feature.column, device)
        if feature.dtype not in ("float32", "float16", "bfloat16", "int8"):
            raise ValueError(
                f"feature dtype {feature.dtype!r} has no unpacking here; it must not be read as "
                "another"
            )
        if feature.dtype == "bfloat16":
            stored = stored.view(torch.bfloat16)
        out[name] = stored.float()
        if feature.dtype == "int8":
            out[name] *= column_tensor(batch, f"{feature.column}_scale", device)[..., None]
    return out


def _tensor(name: str, output: Any) -> Tensor:
    """The tensor of a module's output: itself, the first of a tuple, `last_hidden_state` of an
    output object.
    """
    output = getattr(output, "last_hidden_state", output)
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise UsageError(
            f"student module {name!r} returns {type(output).__name__}; expected a tensor, or a "
            "tuple that begins with one"
        )
    return output


def _shapes(match: Match, have: Sequence[int], want: Sequence[int]) -> UsageError:
    return UsageError(
        f"--match {match}: the student's activation is {list(have)} and the cached feature "
        f"{list(want)}; only the widths may differ: name another module, or cache the feature with "
        "another recipe"
    )
