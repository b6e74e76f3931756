"""What is kept of an activation: one small function per recipe, the same for the teacher's and the
student's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kdcache.data.padding import Real
from kdcache.errors import NotBuilt, UsageError, did_you_mean

# A class token and four registers: the most that a ViT of wide use puts before its grid (arXiv
# 2309.16588).
MAX_PREFIX = 5


def _raw(activation: Tensor, mask_BL: Tensor | None) -> Tensor:
    return activation


def _map(activation: Tensor, mask_BL: Tensor | None) -> Tensor:
    """(B, C, H, W) as it is; (B, L, F) tokens without their prefix as (B, F, h, h)."""
    if activation.dim() == 4:
        return activation
    if activation.dim() != 3:
        raise _refused("map", activation, "(B, C, H, W) or (B, L, F)")
    batch, length, width = activation.shape
    side = math.isqrt(length)
    prefix = length - side * side
    if side == 0 or prefix > MAX_PREFIX:
        raise UsageError(
            f"recipe 'map' of {length} tokens: expected a square grid after at most {MAX_PREFIX} "
            f"prefix tokens, the nearest is {side} x {side} after {prefix}; use recipe 'raw' or "
            "'pool'"
        )
    return activation[:, prefix:].transpose(1, 2).reshape(batch, width, side, side)


def _pool(activation: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Mean over positions: (B, C, H, W) -> (B, C); (B, L, F) -> (B, F), masked; (B, F) as it is."""
    if activation.dim() == 4:
        return _at_least_float32(activation).mean((2, 3))
    if activation.dim() == 2:
        return activation
    if activation.dim() != 3:
        raise _refused("pool", activation, "(B, C, H, W), (B, L, F) or (B, F)")
    activation = _at_least_float32(activation)
    if mask_BL is None:
        return activation.mean(1)
    valid_BL1 = _positions("pool", activation, mask_BL)[:, :, None]
    # where: a padded position may hold anything
    total_BF = torch.where(valid_BL1, activation, 0).sum(1)
    return total_BF / valid_BL1.sum(1).clamp(min=1)


def _cls(activation: Tensor, mask_BL: Tensor | None) -> Tensor:
    """The first position that the mask calls valid, 0 without one: (B, L, F) -> (B, F)."""
    if activation.dim() != 3:
        raise _refused("cls", activation, "(B, L, F)")
    if mask_BL is None:
        return activation[:, 0]
    first_B = _positions("cls", activation, mask_BL).to(torch.int8).argmax(1)
    return activation[torch.arange(len(activation), device=activation.device), first_B]


def _last(activation: Tensor, mask_BL: Tensor | None) -> Tensor:
    """The last position that the mask calls valid: (B, L, F) -> (B, F)."""
    if activation.dim() != 3:
        raise _refused("last", activation, "(B, L, F)")
    if mask_BL is None:
        return activation[:, -1]
    valid_BL = _positions("last", activation, mask_BL)
    position_L = torch.arange(activation.shape[1], device=activation.device)
    last_B = torch.where(valid_BL, position_L, 0).amax(1)
    return activation[torch.arange(len(activation), device=activation.device), last_B]


def _energy(activation: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Mean over channels of the squares of the map, (B, H, W): the attention map of arXiv
    1612.03928.
    """
    return _at_least_float32(_map(activation, mask_BL)).square().mean(1)


MASKED = ("pool", "cls", "last")  # recipes that leave padding out
RECIPES: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "raw": _raw,
    "map": _map,
    "pool": _pool,
    "cls": _cls,
    "last": _last,
    "energy": _energy,
}


def apply_recipe(recipe: str, activation: Tensor, mask: Tensor | None = None) -> Tensor:
    """What `recipe` keeps of an activation whose first axis is the batch.

    `mask` (B, L), nonzero where a position is valid, is used by `pool`, `cls` and `last` on (B, L,
    F) activations. Means of half-precision activations are taken and returned in float32.
    UsageError for an unknown recipe or a shape that the recipe cannot take.
    """
    if recipe == "gram":
        raise NotBuilt(f"recipe 'gram' is not built yet; this version has {', '.join(RECIPES)}")
    if recipe not in RECIPES:
        raise UsageError(f"recipe {recipe!r} is unknown{did_you_mean(recipe, RECIPES)}")
    return RECIPES[recipe](activation, mask)


def reduce_activation(recipe: str, activation: Tensor, real: Real, module: str) -> Tensor:
    """`apply_recipe` where padding is known: the activation of `module`, in a batch whose real
    positions are `real`.

    A record's value never depends on how far its batch was padded. UsageError for a recipe that
    would keep padding: of an activation (B, L, ...) of padded records where nothing says which of
    its L positions are real, and `raw`, `map` and `energy`, which keep every position.
    """
    mask_BL = real.of(activation.shape[1], module) if activation.dim() == 3 else None
    if real.padded and activation.dim() == 3:
        if mask_BL is None:
            raise UsageError(
                f"recipe {recipe!r} of an activation {list(activation.shape)}: the records of the "
                f"batch were padded, and no mask of {activation.shape[1]} positions says which of "
                "these are real; name a module that keeps the length of its input, or give equal "
                "lengths"
            )
        if recipe not in MASKED and not bool(mask_BL.all()):
            raise UsageError(
                f"recipe {recipe!r} of an activation {list(activation.shape)} would keep the "
                "padding of shorter records; use 'pool', 'cls' or 'last', or give equal lengths"
            )
    return apply_recipe(recipe, activation, mask_BL)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _positions(recipe: str, activation: Tensor, mask_BL: Tensor) -> Tensor:
    """The mask as bool (B, L) on the activation's device; UsageError if it is of another shape."""
    if mask_BL.shape != activation.shape[:2]:
        raise UsageError(
            f"recipe {recipe!r}: activation {list(activation.shape)} has a mask "
            f"{list(mask_BL.shape)}; expected {list(activation.shape[:2])}"
        )
    return mask_BL.to(device=activation.device, dtype=torch.bool)


def _refused(recipe: str, activation: Tensor, expected: str) -> UsageError:
    return UsageError(
        f"recipe {recipe!r} of an activation {list(activation.shape)}: expected {expected}; use "
        "recipe 'raw', or name another module"
    )
