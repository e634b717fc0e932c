"""Each check against a small program that does what it must report, and one beside it that does not."""

import numpy as np
import pytest
import torch

from tests.gpu_emulator.errors import Defect
from tests.gpu_emulator.programs import run_ptx
from tests.gpu_emulator.settings import SETTINGS
from tests.gpu_emulator.uninitialised import marking

OWN_WORD = "mad.wide.u32 %rd1, %r100, 4, %rd101;"
OWN_SHARED = "shl.b32 %r1, %r100, 2;"
NEIGHBOUR = "add.s32 %r2, %r100, 1; and.b32 %r2, %r2, 63; shl.b32 %r2, %r2, 2;"
OTHER_WARP = "xor.b32 %r2, %r100, 32; shl.b32 %r2, %r2, 2;"


def run_pair(good, bad, message, *tensors, **options):
    run_ptx(good, *tensors, **options)
    with pytest.raises(Defect, match=message):
        run_ptx(bad, *tensors, **options)


@pytest.mark.parametrize("access", ["ld.global.b32 %r5, [%rd1{}];", "st.global.b32 [%rd1{}], %r100;"])
def test_out_of_bounds(access):
    numbers = torch.zeros(32, dtype=torch.int32)
    run_pair(OWN_WORD + access.format(""), OWN_WORD + access.format("+4"), "access out of bounds: byte 128", numbers)
    with pytest.raises(Defect, match=r"access out of bounds: address .* is in no tensor"):
        run_ptx(OWN_WORD + access.format("+-4"), numbers)


def test_between_the_elements_of_a_view():
    numbers = torch.zeros(32, 2, dtype=torch.int32)[:, 0]
    every_second = "mad.wide.u32 %rd1, %r100, 8, %rd101; ld.global.b32 %r5, [%rd1];"
    run_pair(every_second, OWN_WORD + "ld.global.b32 %r5, [%rd1];", "out of bounds: byte 4 ", numbers)


def test_an_offset_that_overflows_32_bits():
    """2^30 elements of 4 bytes: the offset in bytes is 0 in 32 bits."""
    numbers = torch.zeros(1, dtype=torch.int32)
    good = "mov.b64 %rd2, 0; add.s64 %rd1, %rd101, %rd2; ld.global.b32 %r5, [%rd1];"
    run_pair(good, good.replace("0;", f"{2**32};", 1), "access out of bounds: byte 4294967296", numbers)


def test_misaligned():
    numbers = torch.zeros(130, dtype=torch.int32)
    wide = "mad.wide.u32 %rd1, %r100, 16, %rd101; ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd1];"
    run_pair(wide, wide.replace("[%rd1]", "[%rd1+8]"), "misaligned access: 16 bytes", numbers)
    shared = OWN_SHARED + "st.shared.b32 [%r1], %r100; {} ld.shared.b32 %r5, [%r1{}];"
    with pytest.raises(Defect, match="misaligned access"):
        run_ptx(shared.format("", "+2"), numbers, shared_bytes=256)


def test_uninitialised_global_memory():
    numbers = marking(torch.empty)(32, dtype=torch.int32)
    with pytest.raises(Defect, match="read of uninitialised memory"):
        run_ptx(OWN_WORD + "ld.global.b32 %r5, [%rd1];", numbers)
    run_ptx(OWN_WORD + "st.global.b32 [%rd1], %r100; ld.global.b32 %r5, [%rd1];", numbers)
    halves = marking(torch.empty)(64, dtype=torch.bfloat16)
    halves[::2] = 1.0
    with pytest.raises(Defect, match="read of uninitialised memory"):
        run_ptx(OWN_WORD + "ld.global.b32 %r5, [%rd1];", halves)


def test_shared_memory():
    store = OWN_SHARED + "st.shared.b32 [%r1], %r100;"
    run_pair(
        store + "ld.shared.b32 %r5, [%r1];", OWN_SHARED + "ld.shared.b32 %r5, [%r1];", "uninitialised", shared_bytes=128
    )
    run_pair(store, store.replace("[%r1]", "[%r1+4]"), "access out of bounds: 4 bytes at 128 of 128", shared_bytes=128)


@pytest.mark.parametrize(
    "other, order, race",
    [
        (NEIGHBOUR, "bar.warp.sync -1;", "within a warp|between warps"),
        (OTHER_WARP, "", "between warps"),
    ],
)
def test_races_in_shared_memory(other, order, race):
    """A thread reads, or overwrites, what another wrote; a barrier puts them in order."""
    for access in ("ld.shared.b32 %r5, [%r2];", "st.shared.b32 [%r2], %r100;"):
        body = OWN_SHARED + other + "st.shared.b32 [%r1], %r100; {} " + access
        run_ptx(body.format("bar.sync 0;"), threads=64, shared_bytes=256)
        for missing in ("", order):
            with pytest.raises(Defect, match=f"shared write-(read|write) race ({race})"):
                run_ptx(body.format(missing), threads=64, shared_bytes=256)


def test_a_barrier_of_the_warp_orders_the_threads_of_a_warp_alone():
    inside = NEIGHBOUR.replace("63", "31")
    body = OWN_SHARED + inside + "st.shared.b32 [%r1], %r100; {} ld.shared.b32 %r5, [%r2];"
    run_pair(body.format("bar.warp.sync -1;"), body.format(""), "write-read race within a warp", shared_bytes=128)


@pytest.mark.parametrize("reader", ["0", "5", "40"])
def test_a_write_after_reads_of_several_threads(reader):
    """All read one word; one of them then writes it: the last reader may be that thread itself."""
    body = (
        "setp.eq.s32 %p1, %r100, " + reader + "; mov.b32 %r1, 0; @%p1 st.shared.b32 [%r1], %r100; bar.sync 0;"
        "ld.shared.b32 %r5, [%r1]; {} @%p1 st.shared.b32 [%r1], %r100;"
    )
    run_pair(body.format("bar.sync 0;"), body.format(""), "read-write race", threads=64, shared_bytes=16)


def test_races_in_global_memory():
    numbers = torch.zeros(128, dtype=torch.int32)
    cta = "mov.u32 %r3, %ctaid.x; mad.lo.s32 %r4, %r3, 32, %r100;"
    good = cta + "mad.wide.u32 %rd1, %r4, 4, %rd101; st.global.b32 [%rd1], %r3;"
    run_pair(
        good,
        OWN_WORD + "mov.u32 %r3, %ctaid.x; st.global.b32 [%rd1], %r3;",
        "race between CTAs|different values",
        numbers,
        ctas=4,
    )
    read = (
        OWN_WORD
        + "mov.u32 %r3, %ctaid.x; ld.global.b32 %r5, [%rd101]; setp.eq.s32 %p1, %r3, 3; @%p1 st.global.b32 [%rd1], %r3;"
    )
    with pytest.raises(Defect, match="global read-write race between CTAs"):
        run_ptx(read, numbers, ctas=4)
    in_place = OWN_WORD + "ld.global.b32 %r5, [%rd1]; st.global.b32 [%rd1], %r5;"
    run_ptx(in_place, numbers, threads=128)


def test_threads_that_store_different_values_to_one_place():
    numbers = torch.zeros(1, dtype=torch.int32)
    run_pair("st.global.b32 [%rd101], 7;", "st.global.b32 [%rd101], %r100;", "different values to one place", numbers)


def test_warps_that_store_the_same_value_do_not_race():
    body = "setp.lt.s32 %p1, %r100, 32;\n@%p1 bra $L1;\nst.shared.b32 [global_smem], {};\n$L1:\nmov.b32 %r1, 0;"
    body += "\n@!%p1 bra $L2;\nst.shared.b32 [global_smem], 7;\n$L2:\nmov.b32 %r1, 0;"
    run_pair(body.format(7), body.format(8), "shared write-write race between warps", threads=64, shared_bytes=16)


def test_barriers_that_part_of_a_cta_reaches():
    good = "setp.lt.s32 %p1, %r100, 32;\n@%p1 bra $L1;\nmov.b32 %r1, 0;\n$L1:\nbar.sync 0;"
    bad = "setp.lt.s32 %p1, %r100, 32;\n@%p1 bra $L1;\nbar.sync 0;\nbra $L2;\n$L1:\nbar.sync 0;\n$L2:\nmov.b32 %r1, 0;"
    run_pair(good, bad, "divergent barriers: a CTA waits at", threads=64)
    ended = "setp.lt.s32 %p1, %r100, 32;\n@%p1 ret;\nbar.sync 0;"
    with pytest.raises(Defect, match="divergent barriers: 32 threads have ended"):
        run_ptx(ended, threads=64)


def test_a_shuffle_that_part_of_a_warp_reaches():
    bad = "setp.lt.s32 %p1, %r100, 7;\n@%p1 bra $L1;\nshfl.sync.idx.b32 %r2, %r100, 0, 31, -1;\n$L1:\nmov.b32 %r1, 0;"
    run_pair(bad.replace("7", "32", 1), bad, "part of a warp", threads=64)


def test_loops_end_at_a_count_of_each_thread():
    numbers = torch.zeros(64, dtype=torch.int32)
    loop = "mov.b32 %r1, 0;\n$L1:\nadd.s32 %r1, %r1, 2;\nsetp.lt.s32 %p1, %r1, %r100;\n@%p1 bra $L1;\n" + OWN_WORD
    run_ptx(loop + "st.global.b32 [%rd1], %r1;", numbers, threads=64)
    assert (numbers.numpy() == np.maximum(-(-np.arange(64) // 2) * 2, 2)).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_random_order_of_warps(monkeypatch, seed):
    """A barrier orders the warps in each; without it one reads what another writes, before or after."""
    monkeypatch.setattr(SETTINGS, "chaos", True)
    monkeypatch.setattr(SETTINGS, "random", np.random.default_rng(seed))
    numbers = torch.zeros(128, dtype=torch.int32)
    other = "xor.b32 %r2, %r100, 96; shl.b32 %r2, %r2, 2;"
    body = OWN_SHARED + other + "st.shared.b32 [%r1], %r100;\nbar.sync 0;\nld.shared.b32 %r5, [%r2];\n" + OWN_WORD
    run_ptx(body + "st.global.b32 [%rd1], %r5;", numbers, threads=128, shared_bytes=512)
    assert (numbers.numpy() == np.arange(128) ^ 96).all()
    with pytest.raises(Defect, match=r"race between warps|uninitialised"):
        run_ptx(
            (body + "st.global.b32 [%rd1], %r5;").replace("bar.sync 0;", ""), numbers, threads=128, shared_bytes=512
        )
