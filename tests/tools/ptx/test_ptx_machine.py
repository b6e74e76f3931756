"""The machine that runs PTX in the tests of the kernels: it computes what the manual says, and it
notices what a device would not survive. Each program here is written by hand, with what it must
give beside it."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import ptx_code
import pytest
import torch
from ptx_driver import run_all
from ptx_machine import Machine
from ptx_memory import Array, Buffer, Clock, Fault
from ptx_ops import Slack, from_bf16, to_bf16

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry test(
    .param .u64 .ptr .global .align 1 test_param_0
)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<32>;
    .reg .b64 %d<9>;
    ld.param.b64 %d0, [test_param_0];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %d1, %r0, 4;
    add.s64 %d2, %d0, %d1;
    mul.lo.s32 %r1, %r0, 4;
    xor.b32 %r2, %r1, 128;
"""


def run(
    body: str,
    data: Array,
    threads: int = 64,
    programs: int = 1,
    resident: int = 1,
    fuse: bool = False,
    slack: float = 0.0,
    warps: list[int] | None = None,
) -> Array:
    """Runs a body over a buffer of 32-bit words: %d0 is where it starts, %d2 thread's own word, %r1
    its place in shared memory, %r2 that of the thread in the other warp. Gives the buffer."""
    kernel = ptx_code.read(HEAD.format(threads=threads) + body + "\n    ret;\n}\n")
    clock, base = Clock(programs), 4096
    buffer = Buffer("words", base, np.ascontiguousarray(data).view(np.uint8).copy(), clock)
    machines = [
        Machine(
            ptx_code.fused(kernel) if fuse else kernel,
            {"test_param_0": struct.pack("<Q", base)},
            [buffer],
            1024,
            Slack(slack),
            clock,
            warps,
        )
        for _ in range(resident)
    ]
    with np.errstate(all="ignore"):
        run_all(machines, (programs, 1, 1), list(range(programs)))
    return buffer.data.view(data.dtype)


EXCHANGE = """
    ld.global.b32 %r3, [%d2];
    st.shared.b32 [%r1], %r3;
    {barrier}
    ld.shared.b32 %r4, [%r2];
    st.global.b32 [%d2], %r4;"""


@pytest.mark.parametrize("warps", [None, [0, 1], [1, 0]])
def test_a_barrier_makes_an_exchange_between_warps(warps: list[int] | None) -> None:
    words = np.arange(64, dtype=np.uint32)
    assert run(EXCHANGE.format(barrier="bar.sync 0;"), words, warps=warps).tolist() == [
        i ^ 32 for i in range(64)
    ]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            EXCHANGE.format(barrier=""),
            "race in shared memory at byte .* reads what thread .* wrote",
        ),
        (EXCHANGE.format(barrier="bar.warp.sync -1;"), "race in shared memory"),
        (
            "ld.global.b32 %r3, [%d0+4]; \n st.global.b32 [%d2], %r0;",
            "race in words at byte 4: thread 1 writes over",
        ),
        ("st.global.b32 [%d0], %r0;", "threads of one instruction write different values"),
        (
            "ld.global.b32 %r3, [%d2+4];",
            "thread 63 accesses 4 bytes at byte 256 of words, which has 256",
        ),
        ("ld.global.b32 %r3, [%d2+2];", "not at a multiple of 4"),
        ("ld.global.v2.b32 {%r3, %r4}, [%d2];", "not at a multiple of 8|at byte 252"),
        ("ld.shared.b32 %r3, [%r1];", "shared memory is read where nothing was written"),
        (
            "setp.lt.u32 %p1, %r0, 7; \n @%p1 shfl.sync.bfly.b32 %r3, %r0, 1, 31, -1;",
            "not all lanes of a warp",
        ),
        (
            "setp.lt.u32 %p1, %r0, 32; \n @%p1 bra $L1; \n bar.sync 0; \n $L1: \n bar.sync 0;",
            "2 different barriers",
        ),
    ],
)
def test_what_no_device_would_do_reliably_is_a_fault(body: str, said: str) -> None:
    with pytest.raises(Fault, match=said):
        run(body.replace(" \n ", "\n"), np.zeros(64, np.uint32))


def test_copies_of_one_place_may_be_read_by_all_and_written_by_the_first() -> None:
    """Threads 0 to 31 hold copies of word 0; thread 0 stores. Thread 1 in its place is a race."""
    body = """
    ld.global.b32 %r3, [%d0];
    add.s32 %r3, %r3, 5;
    setp.eq.b32 %p1, %r0, {first};
    @%p1 st.global.b32 [%d0], %r3;"""
    assert run(body.format(first=0), np.ones(32, np.uint32), threads=32)[0] == 6
    with pytest.raises(Fault, match="thread 1 writes over what thread 0 read"):
        run(body.format(first=1), np.ones(32, np.uint32), threads=32)


@pytest.mark.parametrize("warps", [None, [1, 0]])
def test_ways_that_part_meet_again(warps: list[int] | None) -> None:
    """Collatz: each thread loops as often as its number asks."""
    body = """
    ld.global.b32 %r3, [%d2];
    mov.b32 %r4, 0;
$L_loop:
    setp.eq.b32 %p1, %r3, 1;
    @%p1 bra $L_out;
    add.s32 %r4, %r4, 1;
    and.b32 %r5, %r3, 1;
    setp.eq.b32 %p2, %r5, 0;
    @%p2 bra $L_even;
    mad.lo.s32 %r3, %r3, 3, 1;
    bra.uni $L_loop;
$L_even:
    shr.u32 %r3, %r3, 1;
    bra.uni $L_loop;
$L_out:
    shfl.sync.idx.b32 %r6, %r4, 31, 31, -1;
    bar.sync 0;
    sub.s32 %r4, %r4, %r6;
    st.global.b32 [%d2], %r4;"""

    def steps(n: int) -> int:
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    truth = [steps(i + 1) - steps(i // 32 * 32 + 32) for i in range(64)]
    assert run(body, np.arange(1, 65, dtype=np.int32), warps=warps).tolist() == truth


def test_lanes_see_each_other() -> None:
    x = np.random.default_rng(0).integers(-9, 9, 64).astype(np.int32)
    warps, lane = x.reshape(2, 32), np.arange(32)
    for text, truth in {
        "shfl.sync.bfly.b32 %r4, %r3, 5, 31, -1;": warps[:, lane ^ 5],
        "shfl.sync.idx.b32 %r4, %r3, 9, 31, -1;": warps[:, [9] * 32],
        "shfl.sync.up.b32 %r4, %r3, 3, 0, -1;": warps[:, np.where(lane < 3, lane, lane - 3)],
        "redux.sync.max.s32 %r4, %r3, -1;": warps.max(1, keepdims=True).repeat(32, 1),
        "redux.sync.add.s32 %r4, %r3, -1;": warps.sum(1, keepdims=True).repeat(32, 1),
    }.items():
        found = run(f"ld.global.b32 %r3, [%d2];\n{text}\nst.global.b32 [%d2], %r4;", x)
        assert found.tolist() == truth.ravel().tolist(), text


def test_matrices_of_eight_by_eight() -> None:
    """ldmatrix: 4 matrices of 16-bit elements, row r of matrix i where lane 8 i + r says; here one
    after the other.
    """
    body = """
    mul.lo.s32 %r3, %r0, 16;
    ld.global.b32 %r4, [%d2];
    st.shared.v4.b32 [%r3], {%r4, %r4, %r4, %r0};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r3];
    st.global.b32 [%d2], %r7;"""
    words = np.arange(100, 132, dtype=np.uint32)
    # of 8 elements each
    rows = np.stack([words, words, words, np.arange(32, dtype=np.uint32)], 1)
    assert run(body, words, threads=32).tolist() == [
        int(rows[16 + lane // 4, lane % 4]) for lane in range(32)
    ]


def test_numbers_of_sixteen_bits_are_those_of_torch() -> None:
    bits = np.random.default_rng(1).integers(0, 2**32, 4096, np.uint32)
    x = np.concatenate(
        [bits, (np.arange(65536, dtype=np.uint32) << 16) | 0x8000, np.uint32([0x7F800000])]
    ).view("f4")
    truth = torch.from_numpy(x.copy()).bfloat16()
    nan = np.isnan(x)
    assert np.array_equal(to_bf16(x)[~nan], truth.view(torch.int16).numpy().view(np.uint16)[~nan])
    assert (to_bf16(x)[nan] == 0x7FFF).all()
    assert np.array_equal(from_bf16(to_bf16(x))[~nan], truth.float().numpy()[~nan])


@pytest.mark.parametrize("fuse", [False, True])
def test_a_product_and_a_difference_may_be_one_operation(fuse: bool) -> None:
    """x x - round(x x) is 0, or what the rounding left; a mul.rn is never fused."""
    body = """
    ld.global.b32 %r3, [%d2];
    {mul} %r4, %r3, %r3;
    {mul} %r5, %r3, %r3;
    max.f32 %r5, %r5, 0fFF800000;
    sub.f32 %r6, %r4, %r5;
    st.global.b32 [%d2], %r6;"""
    x = np.full(32, 1 + 2.0**-12, np.float32)
    assert (run(body.format(mul="mul.f32"), x, 32, fuse=fuse) == (2.0**-24 if fuse else 0)).all()
    assert (run(body.format(mul="mul.rn.f32"), x, 32, fuse=fuse) == 0).all()


def test_slack_moves_results_within_the_bounds_of_the_manual() -> None:
    x = np.linspace(-20, 20, 64, dtype=np.float32)
    body = "ld.global.b32 %r3, [%d2];\n{op} %r4, %r3;\nst.global.b32 [%d2], %r4;"
    for op, data, truth in (
        ("ex2.approx.ftz.f32", x, np.exp2(x.astype(float))),
        ("lg2.approx.f32", np.exp2(x), x),
    ):
        exact, moved = (
            run(body.format(op=op), data, slack=part).astype(float) for part in (0.0, 1.0)
        )
        size = np.maximum(np.abs(truth), 1.0 if op[0] == "l" else 0.0)
        assert (np.abs(exact - truth) <= 2.0**-24 * size + 1e-6 * (op[0] == "l")).all()
        assert (np.abs(moved - exact) <= 2.0**-22 * size * 1.3).all() and (
            moved != exact
        ).mean() > 0.5
        assert np.array_equal(moved, run(body.format(op=op), data, slack=1.0).astype(float))


MESSAGE = """
    setp.eq.b32 %p1, %r0, 0;
    mov.u32 %r3, %ctaid.x;
    setp.eq.b32 %p2, %r3, {sender};
    @%p2 bra $L_send;
    mov.b32 %r5, 0;
$L_wait:
    @%p1 atom.global.gpu.{take}.add.u32 %r5, [ %d0 + 0 ], 0;
    @%p1 st.shared.b32 [global_smem], %r5;
    bar.sync 0;
    ld.shared.b32 %r6, [global_smem];
    bar.sync 0;
    setp.eq.b32 %p3, %r6, 0;
    @%p3 bra $L_wait;
    ld.global.b32 %r7, [%d2+256];
    st.global.b32 [%d2+512], %r7;
    bra.uni $L_end;
$L_send:
    st.global.b32 [%d2+256], %r0;
    {barrier}
    @%p1 atom.global.gpu.{give}.add.u32 %r5, [ %d0 + 0 ], 1;
$L_end:"""


@pytest.mark.parametrize("sender", [0, 1])
def test_programs_may_wait_for_each_other(sender: int) -> None:
    body = MESSAGE.format(sender=sender, take="acquire", give="acq_rel", barrier="bar.sync 0;")
    assert run(body, np.zeros(192, np.uint32), programs=2, resident=2)[128:].tolist() == list(
        range(64)
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"take": "relaxed"}, "of another program wrote"),
        ({"give": "relaxed"}, "of another program wrote"),
        ({"barrier": ""}, "of another program wrote"),
        ({"sender": 7}, "2 programs wait for others, 0 have not begun"),
    ],
)
def test_a_message_without_its_order_is_a_race_and_one_never_sent_a_deadlock(
    changed: dict[str, Any], said: str
) -> None:
    words = {"sender": 0, "take": "acquire", "give": "acq_rel", "barrier": "bar.sync 0;"} | changed
    with pytest.raises(Fault, match=said):
        run(MESSAGE.format(**words), np.zeros(192, np.uint32), programs=2, resident=2)


def test_a_waiting_program_keeps_its_place() -> None:
    body = MESSAGE.format(sender=1, take="acquire", give="acq_rel", barrier="bar.sync 0;")
    with pytest.raises(Fault, match="1 programs wait for others, 1 have not begun"):
        run(body, np.zeros(192, np.uint32), programs=2, resident=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("wgmma.fence.sync.aligned;", "wgmma"),
        ("tanh.approx.f32 %r3, %r1;", "tanh"),
        ("!!;", "'!!;' is not understood"),
    ],
)
def test_what_is_not_known_is_said(text: str, said: str) -> None:
    with pytest.raises((NotImplementedError, ValueError, IndexError), match=said):
        run(text, np.zeros(64, np.uint32))
