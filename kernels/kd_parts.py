"""Device functions for programs that share a row within one launch: who takes which part, and where
they meet.

Each program sums its part, leaves the sums in memory, waits until those of its row are all there,
and goes on. Waiting for another program needs three things that a launch does not promise by
itself:

**No deadlock.** Which program starts when is the device's business, so a program takes its part as
it starts, by one atomic addition: parts are taken in order, row by row. A program waits for parts
of its own row only. Rows of which all parts are taken are in the hands of running programs and end;
of the one row, at most, of which some are not, at most
`parts` - 1 programs wait. So where a device holds `parts` programs at once, a place is free for the
next part, or becomes free when a row ends, and the launch ends: no cooperative launch, no grid that
has to fit. `launch` refuses more parts than multiprocessors. Launches on several streams at once
share the places: all their `parts` - 1 together have to leave one.

**Order of memory.** What all warps stored comes before the barrier, the barrier before the arrival,
which releases it to the device; the addition that finds all parts there acquires it, and the
barrier behind hands that on to all warps, whose ordinary loads then see what every part stored.

**Counters at zero**, int32 [1 + N]: parts taken, and those that arrived, of each row. They belong
to one launch; a memset before it on the same stream sets them, and nothing waits for the device.

None of this can run in Triton's interpreter, where a program begins when the one before has ended.
"""

# mypy: ignore-errors
# Device code: its arguments are pointers and blocks, which have no types of their own.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def take_part(COUNTERS, parts):
    """(row, part) for the program that asks, in the order in which programs start."""
    place = tl.atomic_add(COUNTERS, 1, sem="relaxed")
    return (place // parts).to(tl.int64), place % parts


@triton.jit
def await_parts(ARRIVED, parts):
    """Returns when all parts of a row have called it; what they stored before can be loaded after."""
    tl.debug_barrier()
    arrived = tl.atomic_add(ARRIVED, 1, sem="acq_rel") + 1
    while arrived < parts:
        arrived = tl.atomic_add(ARRIVED, 0, sem="acquire")
    tl.debug_barrier()
