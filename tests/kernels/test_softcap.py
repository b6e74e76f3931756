"""The capped logit and its slope against float64: small, large, masked.

On the CPU in triton's interpreter, with `-m gpu` compiled on the device: the same tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kdcache.kernels.sweeps import capped

UNIT = 2**-24


@triton.jit  # type: ignore[untyped-decorator]
def kernel(X, T, SLOPE, rate, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t, slope = capped(tl.load(X + at), rate)
    tl.store(T + at, t)
    tl.store(SLOPE + at, slope)


def run(x: torch.Tensor, rate: float, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.to(device)
    t, slope = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    kernel[(max(len(x) // 4096, 1),)](x, t, slope, rate, min(len(x), 4096))
    return t.double().cpu(), slope.double().cpu()


def test_the_error_is_relative_for_small_and_large_logits(device: str) -> None:
    """The bounds are sums of those of 2^x (2^-22), of rsqrt (2^-22.9, squared and corrected) and of
    the roundings.
    """
    one = torch.cat(
        [torch.logspace(-30, 2, 4096), torch.linspace(0.4, 0.6, 4096), torch.linspace(0, 12, 4096)]
    )
    z = torch.cat([one, -one])
    t, slope = run(z, 1.0, device)
    truth = torch.tanh(z.double())
    assert bool(((t - truth).abs() <= 8 * UNIT * truth.abs()).all())
    truth = torch.cosh(z.double()) ** -2
    # beyond, 2^x is below 2^-126: of fewer digits, or 0 on a device
    normal = truth > 2.0**-124
    assert bool(((slope - truth).abs() <= (11 + 4 * z.abs()) * UNIT * truth)[normal].all())
    assert bool((slope[~normal] <= 2.0**-123).all())


def test_masked_and_bad_logits(device: str) -> None:
    x = torch.tensor([-torch.inf, torch.inf, torch.nan, 0.0] * 16)
    t, slope = run(x, 0.1, device)
    assert t[:2].tolist() == [-torch.inf, 1.0] and slope[:2].tolist() == [0.0, 0.0]
    assert (
        bool(t[2].isnan())
        and bool(slope[2].isnan())
        and (float(t[3]), float(slope[3])) == (0.0, 1.0)
    )
