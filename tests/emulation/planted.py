"""Bugs planted in copies of the kernels: each a small edit that a tired author could have made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .library import KERNELS

GEMM_SM80, GEMM_SM90 = "gemm_sm80.cu", "gemm_sm90.cu"
SM80, COPY, WGMMA = "sm80.cu", "sm90_copy.cu", "sm90_wgmma.cu"


@dataclass(frozen=True)
class Bug:
    """Replaces `before`, which stands once in the source, by `after`; `probe` runs it.

    message: what the emulator says, in every mode; empty: caught, but not always in the same way.
    """

    name: str
    source: str
    before: str
    after: str
    probe: str
    message: str = ""

    def planted(self) -> dict[Path, str]:
        """The source with the bug."""
        path = next(path for path in KERNELS if path.name == self.source)
        text = path.read_text()
        if text.count(self.before) != 1:
            raise ValueError(f"{self.name}: not exactly one place in {self.source}")
        return {path: text.replace(self.before, self.after)}


def _sm80(name: str, before: str, after: str, message: str = "") -> Bug:
    return Bug(f"sm80 {name}", GEMM_SM80, before, after, "gemm_sm80", message)


def _sm90(name: str, before: str, after: str, message: str = "") -> Bug:
    return Bug(f"sm90 {name}", GEMM_SM90, before, after, "gemm_sm90", message)


SM80_WAIT = "ptx::cp_async_wait_group<kStages - 2>();"
SM90_ARRIVE = "if (threadIdx.x % 128 == 0) ptx::mbarrier_arrive(&ring.empty[stage]);"
SM90_FULL = "wait_or_give_up(&ring.full[stage], parity);"
SM90_DESCRIPTOR = "b_tile + 32 * step, 0, 1024)"
WGMMA_FENCE = "if (test.with_proxy_fence) ptx::fence_proxy_async_shared();"
MN_DESCRIPTOR = """\
                               ptx::smem_address(b_smem) + test.b.step_offset[step],
                               test.b.leading_bytes, test.b.stride_bytes);"""

BUGS = [
    _sm80(
        "missing barrier",
        "__syncthreads();  // the tile is visible to all, and all have left the stage loaded next",
        "",
        "race:",
    ),
    _sm80("early stage release", "next % kStages * kStageBytes", "tile % kStages * kStageBytes"),
    _sm80("stage too few", "stages + next % kStages", "stages + next % (kStages - 1)", "race:"),
    _sm80("missing wait", SM80_WAIT, ""),
    _sm80("wait one group short", SM80_WAIT, "ptx::cp_async_wait_group<kStages - 1>();"),
    _sm80(
        "missing commit",
        "ptx::cp_async_commit_group();  // also when empty: the wait counts groups",
        "",
    ),
    _sm80(
        "misaligned row",
        "ptx::ldmatrix_x4(a[i], stage + swizzled(row, 2 * step + lane / 16));",
        "ptx::ldmatrix_x4(a[i], stage + swizzled(row, 2 * step + lane / 16) + 8);",
        "not a multiple of 16",
    ),
    _sm80(
        "divergent mma",
        "for (int j = 0; j < 4; ++j) {\n        ptx::mma",
        "for (int j = 0; j < (lane == 3 ? 3 : 4); ++j) {\n        ptx::mma",
    ),
    _sm80(
        "read past the matrix",
        "ptx::cp_async_16(stage + swizzled(row, chunk), a_from, a_row < m ? 16 : 0);",
        "ptx::cp_async_16(stage + swizzled(row, chunk), a + int64_t(a_row) * k + column, 16);",
        "no allocation holds",
    ),
    _sm80(
        "write past the matrix",
        "if (row < m && column < n) c[",
        "if (column < n) c[",
        "no allocation holds",
    ),
    _sm90(
        "missing barrier",
        "    ptx::fence_mbarrier_init();\n  }\n  __syncthreads();",
        "    ptx::fence_mbarrier_init();\n  }",
    ),
    _sm90("missing mbarrier fence", "ptx::fence_mbarrier_init();", "", "fence.mbarrier_init"),
    _sm90("release also before reading", SM90_FULL, f"{SM90_FULL}\n    {SM90_ARRIVE}", "race:"),
    _sm90(
        "early stage release",
        f"ptx::wgmma_wait_group<0>();\n    {SM90_ARRIVE}",
        f"{SM90_ARRIVE}\n    ptx::wgmma_wait_group<0>();",
        "race:",
    ),
    _sm90("missing wgmma wait", "ptx::wgmma_wait_group<0>();", ""),
    _sm90("wgmma wait one group short", "wgmma_wait_group<0>", "wgmma_wait_group<1>"),
    _sm90("missing wgmma commit", "ptx::wgmma_commit_group();", ""),
    _sm90("missing wgmma fence", "ptx::wgmma_fence();", "", "without wgmma.fence"),
    _sm90("wrong consumer parity", SM90_FULL, SM90_FULL.replace("parity", "parity ^ 1")),
    _sm90(
        "wrong producer parity",
        "wait_or_give_up(&ring.empty[stage], parity ^ 1);",
        "wait_or_give_up(&ring.empty[stage], parity);",
        "deadlock",
    ),
    _sm90("missing full wait", SM90_FULL, ""),
    _sm90("missing empty wait", "wait_or_give_up(&ring.empty[stage], parity ^ 1);", ""),
    _sm90("missing release", SM90_ARRIVE, "", "deadlock"),
    _sm90(
        "too few bytes expected",
        "ptx::mbarrier_arrive_expect_tx(&ring.full[stage], kABytes + kBBytes);",
        "ptx::mbarrier_arrive_expect_tx(&ring.full[stage], kABytes);",
    ),
    _sm90(
        "too many bytes expected",
        "ptx::mbarrier_arrive_expect_tx(&ring.full[stage], kABytes + kBBytes);",
        "ptx::mbarrier_arrive_expect_tx(&ring.full[stage], kABytes + 2 * kBBytes);",
        "deadlock",
    ),
    _sm90("LBO and SBO exchanged", SM90_DESCRIPTOR, SM90_DESCRIPTOR.replace("0, 1024", "1024, 0")),
    _sm90("wrong swizzle code", "k128Bytes, b_tile", "k64Bytes, b_tile"),
    _sm90(
        "divergent warpgroup",
        "ptx::wgmma_commit_group();",
        "if (threadIdx.x % 128 != 5) ptx::wgmma_commit_group();",
        "divergent warpgroup",
    ),
    Bug(
        "named barrier missing arrival",
        SM80,
        "ptx::bar_arrive(1, 128);",
        "",
        "named_barrier",
        "threads 0-63 wait for bar.sync 2 of 128 threads; threads 64-127 wait for bar.sync 1",
    ),
    Bug(
        "named barrier counts differ",
        SM80,
        "ptx::bar_arrive(1, 128);",
        "ptx::bar_arrive(1, 96);",
        "named_barrier",
        "bar: barrier 1 is used with",
    ),
    Bug(
        "bulk skipped proxy fence",
        COPY,
        "values[i] *= 2.0f;\n  ptx::fence_proxy_async_shared();",
        "values[i] *= 2.0f;",
        "bulk",
        "fence.proxy.async",
    ),
    Bug(
        "bulk missing commit",
        COPY,
        "ptx::cp_async_bulk_commit_group();\n    ptx::cp_async_bulk_wait_group_read<0>();",
        "ptx::cp_async_bulk_wait_group_read<0>();",
        "bulk",
        "did not wait for",
    ),
    Bug(
        "wgmma proxy fence behind the barrier",
        WGMMA,
        f"{WGMMA_FENCE}\n  __syncthreads();",
        f"__syncthreads();\n  {WGMMA_FENCE}",
        "wgmma_scale_d",
        "fence.proxy.async of thread",
    ),
    Bug(
        "wgmma missing barrier between warps",
        WGMMA,
        f"{WGMMA_FENCE}\n  __syncthreads();",
        WGMMA_FENCE,
        "wgmma_scale_d",
        "race: wgmma reads",
    ),
    Bug(
        "wgmma LBO and SBO exchanged",
        WGMMA,
        MN_DESCRIPTOR,
        MN_DESCRIPTOR.replace(
            "test.b.leading_bytes, test.b.stride_bytes", "test.b.stride_bytes, test.b.leading_bytes"
        ),
        "wgmma_scale_d",
    ),
    Bug(
        "unknown PTX",
        COPY,
        "ptx::fence_proxy_async_shared();\n  __syncthreads();\n  if (threadIdx.x < 32",
        'asm volatile("fence.proxy.alias;" ::: "memory");\n  __syncthreads();\n'
        "  if (threadIdx.x < 32",
        "bulk",
        "PTX that is not emulated: fence.proxy.alias",
    ),
]
