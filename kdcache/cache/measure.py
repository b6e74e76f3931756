"""What encoding and truncation cost, summed over rows in float64: the facts behind `inspect`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from kdcache.cache.columns import Array
from kdcache.cache.rows import Rows, labels_outside, tail_with_labels
from kdcache.cache.spec import CacheSpec

# a full cache stores none and takes any: what is reported of it
FULL_TEMPERATURES = ("1", "2", "4")
CHUNK_ELEMENTS = 2**18  # float64 elements of one temporary: 2 MiB
DECIMALS = 9  # nats or rows; the noise of a million rows is below 1e-10
MINUS_INFINITY = -np.inf


def measure(spec: CacheSpec, rows: Rows, relative: Array, tail: Array | None) -> dict[str, float]:
    """Sums over the rows of `rows`, whose decoded form is `relative` float32 [N, K], `tail` float32
    [N, T] or None.

    rows: their number. kl:T: KL(original || decoded) in nats over the entries that are not -inf
    after decoding, and the rest; 0 for float32. mass:k:T: teacher probability of the support of tier
    k. truncation:k:T: -log of it. Sums are exact (fsum) and then rounded to DECIMALS, so that they
    depend neither on the order of the rows nor on the last bits of exp and log, which differ
    between CPUs: equal work gives equal commit records.
    """
    assert rows.logits is not None
    temperatures = spec.temperatures if spec.is_sparse else FULL_TEMPERATURES
    parts: dict[str, list[Array]] = {f"kl:{t}": [] for t in temperatures}
    for k in spec.tiers:
        parts |= {f"mass:{k}:{t}": [] for t in temperatures} | {
            f"truncation:{k}:{t}": [] for t in temperatures
        }
    step = max(1, CHUNK_ELEMENTS // spec.k)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for start in range(0, len(rows.logits), step):
            at = slice(start, start + step)
            for key, value in _measure_chunk(
                spec, rows, at, relative[at], None if tail is None else tail[at]
            ):
                parts[key].append(value)
    sums = {
        key: round(math.fsum(x for part in values for x in part.tolist()), DECIMALS)
        for key, values in parts.items()
    }
    return {"rows": float(len(rows.logits)), **sums}


def _measure_chunk(
    spec: CacheSpec, rows: Rows, at: slice, decoded: Array, tail: Array | None
) -> Iterator[tuple[str, Array]]:
    """(key, float64 [n]) for the rows of one slice."""
    assert rows.logits is not None
    logits = rows.logits[at].astype(np.float64)
    relative = logits - logits.max(axis=1, keepdims=True)
    kept = decoded > MINUS_INFINITY
    lossless = np.zeros(len(logits)) if spec.codec.lossless else None
    if not spec.is_sparse:
        # no tail takes what was dropped: it is left out
        relative = np.where(kept, relative, MINUS_INFINITY)
        for t in FULL_TEMPERATURES:
            yield (
                f"kl:{t}",
                _kl(relative / float(t), decoded / float(t)) if lossless is None else lossless,
            )
        return
    tails = _original_tails(spec, rows, at, logits[:, 0])
    dropped = np.where(kept, MINUS_INFINITY, relative)
    for i, name in enumerate(spec.temperatures):
        temperature = float(name)
        x = relative / temperature
        for tier, k in enumerate(spec.tiers):
            # entry 0 is 0: the sum is at least 1
            support_lse = np.log(np.exp(x[:, :k]).sum(axis=1))
            truncation = np.logaddexp(0, tails[:, tier, i] - support_lse)
            yield f"truncation:{k}:{name}", truncation
            yield f"mass:{k}:{name}", np.exp(-truncation)
        if lossless is not None:
            yield f"kl:{name}", lossless
            continue
        assert tail is not None
        rest = np.logaddexp(tails[:, -1, i], log_sum_exp(dropped / temperature))
        yield (
            f"kl:{name}",
            _kl(
                np.where(kept, x, MINUS_INFINITY),
                decoded.astype(np.float64) / temperature,
                rest,
                tail[:, i].astype(np.float64),
            ),
        )


def _original_tails(spec: CacheSpec, rows: Rows, at: slice, max_N: Array) -> Array:
    """float64 [n, tiers, T]: the tails of all tiers with the labels outside each support added back."""
    assert rows.tail_lse is not None and rows.ids is not None
    tails = rows.tail_lse[at].astype(np.float64)
    if rows.label is None or rows.label_logit is None:
        return tails
    relative_label = rows.label_logit[at].astype(np.float64) - max_N[:, None]
    for tier, k in enumerate(spec.tiers):
        outside = labels_outside(rows.ids[at, :k], rows.label[at])
        tails[:, tier] = tail_with_labels(
            tails[:, tier], relative_label, outside, spec.temperatures
        )
    return tails


def log_sum_exp(x: Array) -> Array:
    """float64 [n] of x [n, K]; -inf for a row of -inf."""
    top = x.max(axis=1, keepdims=True)
    top = np.where(top == MINUS_INFINITY, 0, top)
    out: Array = np.log(np.exp(x - top).sum(axis=1)) + top[:, 0]
    return out


def _kl(p: Array, q: Array, p_rest: Array | None = None, q_rest: Array | None = None) -> Array:
    """Sum over the outcomes of p log(p / q), of unnormalised log weights [n, K] and of one more
    outcome [n].
    """
    if p_rest is not None and q_rest is not None:
        p, q = np.concatenate([p, p_rest[:, None]], 1), np.concatenate([q, q_rest[:, None]], 1)
    log_p, log_q = p - log_sum_exp(p)[:, None], q - log_sum_exp(q)[:, None]
    weight = np.exp(log_p)
    out: Array = np.where(weight > 0, weight * (log_p - log_q), 0).sum(axis=1)
    return np.maximum(out, 0)  # below 0 only by rounding
