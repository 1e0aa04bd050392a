"""Bugs planted in copies of the attention kernels: missing waits, barriers and fences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .attention import INSTANTIATIONS
from .library import ROOT

CUDA = ROOT / "csrc/cuda"


@dataclass(frozen=True)
class AttentionBug:
    """Replaces `before`, which stands once in a file of csrc/cuda, by `after`.

    kernel: the instantiation that is built with the bug; `call` runs it, "forward", "backward" or
    "decode"; rotates: only when queries and keys rotate; shapes: of test_emulated_races, those
    where no other barrier orders what the bug leaves open.
    message: what the emulator says, in every mode; empty: caught, but not always in the same way.
    """

    name: str
    kernel: str
    call: str
    file: str
    before: str
    after: str
    message: str = ""
    rotates: bool = False
    shapes: tuple[int, ...] = (0, 1, 2)

    @property
    def architecture(self) -> str:
        return "emulated-sm90a" if "sm90" in self.kernel else "emulated-sm80"

    def kernels(self) -> tuple[Path, ...]:
        return tuple(path for path in INSTANTIATIONS if path.stem == self.kernel)

    @property
    def path(self) -> Path:
        return CUDA / self.file

    def has_its_place(self) -> bool:
        """Whether `before` stands in the file once; the kernels change."""
        return self.path.read_text(encoding="utf-8").count(self.before) == 1

    def planted(self) -> dict[Path, str]:
        """The file with the bug, and a launch of nothing but the instance that `call` runs."""
        text = self.path.read_text(encoding="utf-8")
        return {self.path: text.replace(self.before, self.after)} | self.one_instance()

    def one_instance(self) -> dict[Path, str]:
        """The kernel's launch with the same instance in every place: the others, which no planted
        call runs, would be three quarters of what is compiled for each bug.
        """
        stem = self.kernel.removesuffix("_d64")
        path = CUDA / "attention" / stem.split("_")[0] / f"launch_{stem}.h"
        text = path.read_text(encoding="utf-8")
        position, other = ("Rotary", "NoPosition") if self.rotates else ("NoPosition", "Rotary")
        for spare, used in (("ptx::Float16>", "ptx::BFloat16>"), (f", {other}>", f", {position}>")):
            if text.count(spare) != 1 or text.count(used) != 1:
                raise ValueError(f"{path}: expected one {spare} and one {used}")
            text = text.replace(spare, used)
        return {path: text}


def _forward_sm80(
    name: str, before: str, after: str, file: str = "attention/forward/forward_sm80.h", **rest: Any
) -> AttentionBug:
    return AttentionBug(
        f"forward sm80 {name}", "forward_sm80_d64", "forward", file, before, after, **rest
    )


def _backward(name: str, before: str, after: str, **rest: Any) -> AttentionBug:
    file = "attention/backward/backward_sm80.h"
    return AttentionBug(
        f"backward {name}", "backward_sm80_d64", "backward", file, before, after, **rest
    )


def _decode(name: str, before: str, after: str, **rest: Any) -> AttentionBug:
    file = "attention/decode/decode_sm80.h"
    return AttentionBug(f"decode {name}", "decode_sm80_d64", "decode", file, before, after, **rest)


def _sm90(name: str, file: str, before: str, after: str, **rest: Any) -> AttentionBug:
    return AttentionBug(
        f"forward sm90 {name}", "forward_sm90_d64", "forward", file, before, after, **rest
    )


COPY = "tile/copy_rows.h"
KERNEL, CONSUMER = "attention/forward/forward_sm90.h", "attention/forward/forward_sm90_consumer.h"
PRODUCER = "attention/forward/forward_sm90_producer.h"
PIPELINE, WGMMA = "tile/pipeline.h", "tile/wgmma.h"

SM80_WAIT = "  ptx::cp_async_wait_group<0>();\n  __syncthreads();\n"
COPY_NEXT_KEYS = (
    "    if (kv_block + 1 < end) copy(smem.k, plan.k, (kv_block + 1) * BLOCK_KV, head_dim);\n"
)
WAIT_FOR_VALUES = "    tile::wait_for_copies();  // v is there, and all warps have left k\n"
DECODE_WAIT = "    ptx::cp_async_wait_group<kStages - 2>();\n    __syncwarp();"
LAST_USE_OF_KEYS = "      tile::wait_products<1>(acc_s);\n      k_pipeline.release();"
LAST_USE_OF_VALUES = "      tile::wait_products<0>(acc_o);\n      v_pipeline.release();"
ROTATED = """\
      ptx::fence_proxy_async_shared();
      ptx::bar_sync(Config::kWarpgroupBarrier + index, kNumThreads);
"""
EXPECT = "ptx::mbarrier_arrive_expect_tx(pipeline.full_barrier(), Smem::KvTile::kBytes);"
PRODUCTS = "  const uint64_t a = descriptor_k_major(a_tile), b = descriptor_k_major(b_tile);\n"

BUGS = [
    _forward_sm80(
        "missing barrier", SM80_WAIT, "  ptx::cp_async_wait_group<0>();\n", COPY, message="race:"
    ),
    _forward_sm80("missing wait", SM80_WAIT, "  __syncthreads();\n", COPY),
    _forward_sm80("wait one group short", SM80_WAIT, SM80_WAIT.replace("<0>", "<1>"), COPY),
    _forward_sm80("missing commit", "    ptx::cp_async_commit_group();\n", ""),
    _forward_sm80(
        "keys copied too early",
        WAIT_FOR_VALUES + COPY_NEXT_KEYS,
        COPY_NEXT_KEYS + WAIT_FOR_VALUES,
        message="race:",
    ),
    _forward_sm80(
        "plan read too early",
        "smem.plan = computed;\n  }\n  __syncthreads();",
        "smem.plan = computed;\n  }",
    ),
    AttentionBug(
        "forward sm80 missing barrier after rotation",
        "forward_sm80_d64",
        "backward",  # which keeps the rotated queries: they are read before the next barrier
        "attention/forward/forward_sm80.h",
        "work.num_rows, thread);\n  __syncthreads();",
        "work.num_rows, thread);",
        message="race:",
        rotates=True,
    ),
    _forward_sm80("missing barrier in the end", "  __syncwarp();\n", "", message="race:"),
    _backward(
        "missing barrier before dq",
        "    __syncthreads();  // dS is complete",
        "    // dS is complete",
        message="race:",
    ),
    AttentionBug(
        "backward missing wait",
        "backward_sm80_d64",
        "backward",
        COPY,
        SM80_WAIT,
        "  __syncthreads();\n",
    ),
    _backward("missing commit", "    ptx::cp_async_commit_group();\n", ""),
    _backward(
        "queries copied too early",
        "    __syncthreads();  // dS is complete",
        "    if (num_left > 1) copy_queries(at);\n    __syncthreads();  // dS is complete",
        message="race:",
    ),
    _backward(
        "missing barrier between dv and dk",
        "RestoreNothing{});\n  __syncthreads();",
        "RestoreNothing{});",
        message="race:",
    ),
    _decode(
        "missing warp barrier",
        DECODE_WAIT,
        DECODE_WAIT.replace("__syncwarp();", ""),
        message="race:",
    ),
    _decode("wait one group short", DECODE_WAIT, DECODE_WAIT.replace("- 2", "- 1")),
    _decode(
        "ring left too early",
        "  __syncthreads();  // all warps have left the ring",
        "  // all warps have left the ring",
        message="race:",
    ),
    _decode(
        "parts read too early",
        "acc_o[m], softmax[m]);\n  __syncthreads();",
        "acc_o[m], softmax[m]);",
        message="race:",
    ),
    _sm90(
        "missing block barrier",
        KERNEL,
        "  }\n  __syncthreads();",
        "  }",
    ),
    _sm90(
        "missing mbarrier fence",
        KERNEL,
        "ptx::fence_mbarrier_init();",
        "",
        message="fence.mbarrier_init",
    ),
    _sm90("wrong producer parity", PIPELINE, "stage], parity ^ 1)", "stage], parity)"),
    _sm90("wrong consumer parity", PIPELINE, "full[stage], parity)", "full[stage], parity ^ 1)"),
    _sm90("missing release", PIPELINE, "if (lane_index() == 0) ptx", "if (false) ptx"),
    _sm90(
        "release without the warp",
        PIPELINE,
        "    __syncwarp();\n    if (lane_index() == 0)",
        "    if (lane_index() == 0)",
        message="race:",
        shapes=(3,),
    ),
    _sm90(
        "keys released too early",
        CONSUMER,
        LAST_USE_OF_KEYS,
        "\n".join(reversed(LAST_USE_OF_KEYS.split("\n"))),
    ),
    _sm90(
        "values released too early",
        CONSUMER,
        LAST_USE_OF_VALUES,
        "\n".join(reversed(LAST_USE_OF_VALUES.split("\n"))),
    ),
    _sm90(
        "missing wgmma wait",
        CONSUMER,
        LAST_USE_OF_VALUES,
        "      v_pipeline.release();",
    ),
    _sm90(
        "wgmma wait one group short",
        CONSUMER,
        LAST_USE_OF_KEYS,
        LAST_USE_OF_KEYS.replace("<1>", "<2>"),
    ),
    _sm90(
        "missing wgmma fence",
        WGMMA,
        PRODUCTS + "  ptx::wgmma_fence();",
        PRODUCTS,
        message="without wgmma.fence",
    ),
    _sm90(
        "missing wgmma commit",
        WGMMA,
        "step > 0);\n  }\n  ptx::wgmma_commit_group();",
        "step > 0);\n  }",
    ),
    _sm90(
        "missing proxy fence after rotation",
        CONSUMER,
        ROTATED,
        ROTATED.replace("ptx::fence_proxy_async_shared();", ""),
        message="without fence.proxy.async",
        rotates=True,
    ),
    _sm90(
        "missing barrier after rotation",
        CONSUMER,
        ROTATED,
        "      ptx::fence_proxy_async_shared();\n",
        message="wgmma reads",
        rotates=True,
    ),
    _sm90("too few bytes expected", PRODUCER, EXPECT, EXPECT.replace("kBytes", "kBytes / 2")),
    _sm90(
        "values copied without waiting",
        PRODUCER,
        "    const Sequence& s = work.sequence;\n    pipeline.wait_empty();",
        "    const Sequence& s = work.sequence;",
    ),
]
