"""The head of a row in the one normative order, and the log-sum-exp of what is left; torch only,
same bits everywhere.

Every result of a row is a function of that row alone: not of the rows beside it, the chunk it falls
in or the number of threads. `torch.logaddexp` and a plain one-row sum do not promise that on the
CPU (vector against scalar remainder, one row split over threads), so log-sum-exps are read off the
row kernel of `log_softmax`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdcache.errors import UsageError

CHUNK_ELEMENTS = 2**22  # float32 elements of one temporary: 16 MiB


def row_chunk(num_classes: int, elements: int = CHUNK_ELEMENTS) -> int:
    """Rows worked on at a time, at least 1, so that one temporary has about `elements` elements."""
    return max(1, elements // max(1, num_classes))


def exact_topk(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, logit descending, then id ascending: (ids int64 [N, k], values
    float32 [N, k]).

    Compared as float32 (exact for bfloat16 and float16); -0.0 equals +0.0. The caller has refused
    NaN; on CUDA, where that would wait, NaN counts as +inf, and the other rows are right.
    UsageError unless logits are [N, V] and 1 <= k <= V.
    """
    if logits_NV.dim() != 2 or not 1 <= k <= logits_NV.shape[1]:
        raise UsageError(
            f"exact_topk of logits {list(logits_NV.shape)} with k = {k}: expected [N, V] and 1 <= "
            "k <= V"
        )
    rows = row_chunk(logits_NV.shape[1])
    parts = [
        _topk_chunk(logits_NV[at : at + rows].detach(), k) for at in range(0, len(logits_NV), rows)
    ]
    if not parts:
        return logits_NV.new_empty((0, k), dtype=torch.int64), logits_NV.new_empty(
            (0, k), dtype=torch.float32
        )
    return torch.cat([ids for ids, _ in parts]), torch.cat([values for _, values in parts])


def _topk_chunk(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    logits_NV = logits_NV.float()
    # a NaN is never picked below: ids of the rows after it would move up
    if logits_NV.is_cuda:
        logits_NV = logits_NV.nan_to_num(torch.inf, torch.inf, -torch.inf)
    # torch.topk does not say which of several equal logits it takes, but the k-th largest value
    # itself is unique:
    # take all above it, then the lowest ids among those equal to it.
    threshold_N1 = logits_NV.topk(k, dim=-1).values[:, -1:]
    above_NV, equal_NV = logits_NV > threshold_N1, logits_NV == threshold_N1
    wanted_N1 = k - above_NV.sum(-1, keepdim=True, dtype=torch.int32)
    picked_NV = above_NV | (equal_NV & (equal_NV.cumsum(-1, dtype=torch.int32) <= wanted_N1))
    if picked_NV.is_cuda:  # k per row are picked: a static size spares the wait for the device
        ids_NK = picked_NV.nonzero_static(size=len(picked_NV) * k)[:, 1].view(-1, k)
    # nonzero_static is 10 times slower than nonzero here (64 x 32,000: 35 ms against 3 ms)
    else:
        ids_NK = picked_NV.nonzero()[:, 1].view(-1, k)
    values_NK, order_NK = logits_NV.gather(1, ids_NK).sort(dim=-1, descending=True, stable=True)
    return ids_NK.gather(1, order_NK), values_NK


def row_logsumexp(x_NV: Tensor) -> Tensor:
    """log sum exp of each row [N, V] -> [N]; -inf for a row of -inf."""
    max_N = x_NV.amax(-1)
    # log_softmax at the maximum is -log sum exp(x - max): no cancellation.
    return torch.where(max_N == -torch.inf, max_N, max_N - torch.log_softmax(x_NV, -1).amax(-1))


def tail_lse(
    logits_NV: Tensor, excluded_NE: Tensor, max_N: Tensor, temperatures: Sequence[float]
) -> Tensor:
    """log of the sum over ids not excluded of exp((z - max) / T): float32 [N, len(temperatures)],
    -inf if none is left.

    excluded_NE int64 [N, E], E >= 1: the head, and whatever else is left out; negative ids name
    nothing.
    """
    excluded_NE = torch.where(excluded_NE < 0, excluded_NE[:, :1], excluded_NE)
    rows = row_chunk(logits_NV.shape[1])
    out_NT = logits_NV.new_empty((len(logits_NV), len(temperatures)), dtype=torch.float32)
    for at in range(0, len(logits_NV), rows):
        chunk = slice(at, at + rows)
        rest_NV = logits_NV[chunk].float() - max_N[chunk, None]
        rest_NV.scatter_(1, excluded_NE[chunk], -torch.inf)
        for t, temperature in enumerate(temperatures):
            out_NT[chunk, t] = row_logsumexp(rest_NV / temperature)
    return out_NT
