"""Rows by their definitions, one id at a time in float64: the oracle of the codec tests."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from kdcache.cache.rows import Rows
from kdcache.cache.spec import CacheSpec, FeatureSpec

TEMPERATURES = ("0.5", "1", "4")
FAST = settings(max_examples=200, deadline=None)
VALUES = ("float32", "bfloat16", "float16", "uint8")


def topk_spec(V, tiers, values="float32", temperatures=TEMPERATURES, labels=0, **more):
    return CacheSpec(
        kind="topk",
        num_classes=V,
        samples=(0, 100),
        records_per_shard=10,
        tiers=tiers,
        values=values,
        temperatures=temperatures,
        labels=labels,
        **more,
    )


def head_order(z_V):
    """Ids by logit descending, then id ascending, by Python's own sort."""
    return sorted(range(len(z_V)), key=lambda i: (-float(z_V[i]), i))


def log_sum(terms):
    """log of the sum of exp of each term; -inf for none."""
    terms = [t for t in terms if t > -math.inf]
    return (
        max(terms) + math.log(math.fsum(math.exp(t - max(terms)) for t in terms))
        if terms
        else -math.inf
    )


def make_rows(spec, z_NV, label_NJ=None):
    """`Rows` of dense logits by the definitions, one id at a time."""
    ids = np.array([head_order(z)[: spec.k] for z in z_NV])
    tail = np.full((len(z_NV), len(spec.tiers), len(spec.temperatures)), -np.inf)
    for n, z in enumerate(z_NV.astype(float)):
        for i, k in enumerate(spec.tiers):
            left = (
                set(range(len(z)))
                - set(ids[n, :k])
                - (set() if label_NJ is None else set(label_NJ[n]))
            )
            for t, name in enumerate(spec.temperatures):
                tail[n, i, t] = log_sum([(z[j] - z.max()) / float(name) for j in left])
    # a logit of -3.4e38 at T = 0.5 is -inf in float32
    with np.errstate(over="ignore"):
        tail = tail.astype(np.float32)
    if label_NJ is None:
        return Rows(logits=np.take_along_axis(z_NV, ids, 1), ids=ids, tail_lse=tail)
    label_logit = np.take_along_axis(z_NV, np.maximum(label_NJ, 0), 1)
    return Rows(
        logits=np.take_along_axis(z_NV, ids, 1),
        ids=ids,
        tail_lse=tail,
        label=label_NJ,
        label_logit=np.where(label_NJ >= 0, label_logit, -np.inf).astype(np.float32),
    )


def total_log_mass(decoded, temperature, t):
    """log of head and tail together, relative to the maximum, float64 [N]."""
    head = decoded.relative.astype(float) / float(temperature)
    return np.array(
        [
            log_sum([*h, tail])
            for h, tail in zip(head, decoded.tail_lse[:, t].astype(float), strict=True)
        ]
    )


logit = st.one_of(
    st.floats(-40, 40, width=32), st.sampled_from([0.0, -0.0, 3.0, -200.0, -np.inf, -3.4e38])
)


@st.composite
def dense_logits(draw, max_rows=4, max_classes=12):
    shape = (draw(st.integers(1, max_rows)), draw(st.integers(2, max_classes)))
    z = np.array(
        draw(st.lists(logit, min_size=math.prod(shape), max_size=math.prod(shape))), np.float32
    )
    z = z.reshape(shape)
    # never a row of -inf
    z[:, draw(st.integers(0, shape[1] - 1))] = draw(st.floats(-20, 20, width=32))
    return z


def feature(dtype, shape):
    return FeatureSpec(name="f", module="body.3", recipe="raw", dtype=dtype, shape=shape)
