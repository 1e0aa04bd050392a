"""The probe sources, and the instructions that the PTX of each must contain."""

from __future__ import annotations

from probes.nvcc import SM_80, SM_90A, Source

SM80_GEMM = ("cp.async.cg.shared.global", "ldmatrix.sync", "mma.sync.aligned.m16n8k16")
SOURCES = (
    Source(
        "sm80",
        SM_80,
        (
            "cp.async.cg.shared.global [",
            "cp.async.commit_group",
            "cp.async.wait_group",
            "ldmatrix.sync.aligned.m8n8.x2.shared.b16",
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
            "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16",
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
            "ex2.approx.ftz.f32",
            "cvt.rn.bf16x2.f32",
            "cvt.rn.f16x2.f32",
            "cvt.f32.f16",
            "red.global.add.f32",
            "bar.sync",
            "bar.arrive",
        ),
    ),
    Source("gemm_sm80", SM_80, SM80_GEMM),
    Source(
        "sm90_copy",
        SM_90A,
        (
            *(f"stmatrix.sync.aligned.m8n8.{x}.shared.b16" for x in ("x2", "x4")),
            *(f"stmatrix.sync.aligned.m8n8.{x}.trans.shared.b16" for x in ("x2", "x4")),
            "mbarrier.init.shared::cta.b64",
            "mbarrier.arrive.shared::cta.b64",
            "mbarrier.arrive.expect_tx.shared::cta.b64",
            "mbarrier.expect_tx.relaxed.cta.shared::cta.b64",
            "mbarrier.try_wait.parity.shared::cta.b64",
            "mbarrier.test_wait.parity.shared::cta.b64",
            "fence.mbarrier_init.release.cluster",
            "fence.proxy.async.shared::cta",
            "elect.sync",
            "prefetch.tensormap",
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
            "cp.async.bulk.global.shared::cta.bulk_group",
            "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32",
            *(f"red.global.add.v{width}.f32" for width in (2, 4)),
            "cp.async.bulk.commit_group",
            "cp.async.bulk.wait_group 0",
            "cp.async.bulk.wait_group.read",
            *(f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile" for rank in (2, 3, 4)),
            *(f"cp.async.bulk.tensor.{rank}d.global.shared::cta.tile" for rank in (2, 3, 4)),
            *(f"cp.reduce.async.bulk.tensor.{rank}d.global.shared::cta" for rank in (2, 3, 4)),
        ),
    ),
    Source(
        "sm90_wgmma",
        SM_90A,
        (
            "wgmma.fence.sync.aligned",
            "wgmma.commit_group.sync.aligned",
            "wgmma.wait_group.sync.aligned",
            *(f"m64n{n}k16.f32.bf16.bf16" for n in (64, 80, 96, 128, 176, 192, 256)),
            *(f"m64n{n}k16.f32.f16.f16" for n in (64, 128)),
        ),
    ),
    Source(
        "gemm_sm90",
        SM_90A,
        ("setmaxnreg.inc.sync.aligned.u32", "setmaxnreg.dec.sync.aligned.u32", "m64n128k16"),
    ),
)
