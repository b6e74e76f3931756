"""Activations of named modules, reduced by a recipe while the teacher runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdcache.cache.columns import ROOT
from kdcache.cache.spec import FEATURE_DTYPES, RECIPES, FeatureSpec
from kdcache.data.padding import Real
from kdcache.data.transfer import send
from kdcache.errors import DataError, NotBuilt, UsageError, did_you_mean
from kdcache.models.feature_recipes import reduce_activation
from kdcache.models.model import find_module

FORM = "MODULE[:RECIPE[:DTYPE]]"


@dataclass(frozen=True, slots=True)
class FeatureRequest:
    """A feature as it is asked for: module path, recipe, dtype. `name` is what its column is called
    after.
    """

    module: str
    recipe: str = "raw"
    dtype: str = "float16"

    @property
    def name(self) -> str:
        """The module path in [a-z0-9_] and the recipe; of a path that is too long, its end."""
        return f"{re.sub('[^a-z0-9_]', '_', self.module.lower())}_{self.recipe}"[-64:]


def parse_feature(text: str) -> FeatureRequest:
    """`MODULE[:RECIPE[:DTYPE]]`, recipe raw and dtype float16 unless given. UsageError names what
    is unknown.
    """
    module, *rest = text.split(":")
    if not module or len(rest) > 2 or not all(rest):
        raise UsageError(f"--feature {text!r}: expected {FORM}")
    request = FeatureRequest(module, *rest)
    if request.recipe == "gram":
        raise NotBuilt(
            f"--feature {text}: recipe 'gram' is not built yet; this version has "
            f"{', '.join(RECIPES)}"
        )
    if request.recipe not in RECIPES:
        raise UsageError(
            f"--feature {text}: recipe {request.recipe!r} is unknown{did_you_mean(request.recipe, RECIPES)}"
        )
    if request.dtype not in FEATURE_DTYPES:
        raise UsageError(
            f"--feature {text}: dtype {request.dtype!r} is "
            f"unknown{did_you_mean(request.dtype, FEATURE_DTYPES)}"
        )
    return request


def parse_features(texts: Sequence[str]) -> tuple[FeatureRequest, ...]:
    """All of them; UsageError when two would have one name."""
    requests = tuple(parse_feature(text) for text in texts)
    name, count = (
        Counter(request.name for request in requests).most_common(1)[0] if requests else ("", 0)
    )
    if count > 1:
        raise UsageError(
            f"--feature: {count} features would be called {name!r}; give each module and recipe "
            "once"
        )
    return requests


def requests_of(features: Iterable[FeatureSpec]) -> tuple[FeatureRequest, ...]:
    """The requests that a spec's features came from."""
    return tuple(
        FeatureRequest(feature.module, feature.recipe, feature.dtype) for feature in features
    )


@dataclass
class FeatureHooks:
    """Hooks on a teacher, as a context manager: `start(real)`, a forward pass, then `take(rows)`.

    UsageError with near names for a module that the teacher has not.
    """

    teacher: nn.Module
    requests: tuple[FeatureRequest, ...]
    _real: Real = field(default_factory=Real)
    _taken: dict[str, Tensor] = field(default_factory=dict)
    _handles: list[RemovableHandle] = field(default_factory=list)

    def __enter__(self) -> FeatureHooks:
        modules = [find_module(self.teacher, request.module) for request in self.requests]
        for request, module in zip(self.requests, modules, strict=True):
            self._handles.append(module.register_forward_hook(self._hook(request)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def start(self, real: Real) -> None:
        """Forget the last batch; `real` says which positions of the next one count."""
        self._real, self._taken = real, {}

    def take(self, rows_BL: Tensor | None = None) -> dict[str, Tensor]:
        """Name -> float32 activation [B, *shape]; with `rows_BL` (bool, on the CPU) `raw` is kept
        of its positions, [N, *shape], and else must have no padding."""
        out = {}
        for request in self.requests:
            if request.name not in self._taken:
                raise UsageError(
                    f"feature {request.name}: module {request.module!r} did not run in a forward "
                    "pass"
                )
            activation = self._taken[request.name]
            if rows_BL is None and request.recipe == "raw":
                activation = self._reduced(request, activation)
            elif rows_BL is not None and request.recipe == "raw":
                if activation.shape[:2] != rows_BL.shape:
                    raise UsageError(
                        f"feature {request.name}: the activation is {list(activation.shape)}; "
                        f"recipe 'raw' keeps the rows of {list(rows_BL.shape)} positions; use "
                        "another recipe"
                    )
                # By index: by a mask of its own device, its length would be waited for.
                rows_2N = send({"rows": rows_BL.nonzero().T}, activation.device)["rows"]
                activation = activation[rows_2N[0], rows_2N[1]]
            out[request.name] = activation.float()
        self._taken = {}
        return out

    def _reduced(self, request: FeatureRequest, activation: Tensor) -> Tensor:
        with _named(request):
            return reduce_activation(request.recipe, activation, self._real, request.module)

    def _hook(self, request: FeatureRequest) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if request.name in self._taken:
                raise UsageError(
                    f"feature {request.name}: module {request.module!r} runs more than once in a "
                    "forward pass; name a module that runs once"
                )
            with _named(request):
                activation = _tensor(output)
            # Whether `raw` keeps padding is only known with the rows: see `take`.
            kept = activation if request.recipe == "raw" else self._reduced(request, activation)
            # A later in-place operation (ReLU after a norm) would write into what is only a view.
            shared = kept.untyped_storage().data_ptr() == activation.untyped_storage().data_ptr()
            self._taken[request.name] = kept.clone() if shared else kept

        return keep


def feature_specs(
    requests: Sequence[FeatureRequest], probed: Mapping[str, Tensor], ragged: bool
) -> tuple[FeatureSpec, ...]:
    """The features with the shapes that a probe batch had; `raw` of ragged rows is kept at level
    `row`.
    """
    return tuple(
        FeatureSpec(
            name=r.name,
            module=r.module,
            recipe=r.recipe,
            dtype=r.dtype,
            shape=tuple(probed[r.name].shape[1:]),
            level="row" if ragged and r.recipe == "raw" else ROOT,
        )
        for r in requests
    )


def check_shapes(features: Sequence[FeatureSpec], taken: Mapping[str, Tensor], where: str) -> None:
    """DataError naming a feature whose shape differs from that of the spec."""
    for feature in features:
        shape = tuple(taken[feature.name].shape[1:])
        if shape != feature.shape:
            raise DataError(
                f"{where}: feature {feature.name} has the shape {list(shape)}, the first samples "
                f"gave {list(feature.shape)}; a feature has one shape: use recipe 'pool', 'last' "
                "or 'cls'"
            )


@contextmanager
def _named(request: FeatureRequest) -> Iterator[None]:
    """What cannot be kept of an activation, by the name of its feature."""
    try:
        yield
    except UsageError as e:
        raise UsageError(f"feature {request.name} of module {request.module!r}: {e}") from e


def _tensor(output: Any) -> Tensor:
    """The activation in what a module returned: a tensor, or the first one of a tuple or of a
    Hugging Face output.
    """
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.dim() < 1 or not torch.is_floating_point(output):
        raise UsageError(f"it returned a {type(output).__name__}; expected a floating-point tensor")
    return output
