"""Stage env: what the machine is, and its two ceilings: copy bandwidth and bf16 matmul."""

from __future__ import annotations

from typing import Any

from bench import machine
from gpu_check.report import FAILED, NOT_MEASURED, OK, Context, Outcome

COPY_BYTES = 4 << 30
MATMUL_SIZE = 8192


def properties() -> dict[str, Any]:
    """What the driver says of device 0."""
    import torch

    device = torch.cuda.get_device_properties(0)
    names = (
        "name",
        "major",
        "minor",
        "total_memory",
        "multi_processor_count",
        "L2_cache_size",
        "shared_memory_per_block",
        "shared_memory_per_block_optin",
        "shared_memory_per_multiprocessor",
        "regs_per_multiprocessor",
        "clock_rate",
        "memory_clock_rate",
        "memory_bus_width",
    )
    found = {name: getattr(device, name) for name in names if hasattr(device, name)}
    found["torch_cuda"] = torch.version.cuda
    found["cudnn"] = torch.backends.cudnn.version()
    return found


def measure_ceilings() -> dict[str, Any]:
    """Copy bandwidth (bytes read plus written) and TFLOP/s of a matmul on random data."""
    from bench.gpu import timing

    copy = timing.copy_bandwidth(COPY_BYTES)
    matmul = timing.matmul_rate(MATMUL_SIZE)
    return {"copy": copy, "matmul": matmul}


def run(context: Context) -> Outcome:
    data: dict[str, Any] = {"gpu_fields_before": machine.gpu_fields()}
    if context.dry_run:
        table = [f"{key:14} {value}" for key, value in machine.versions().items() if value]
        data |= {"properties": None, "ceilings": None}
        return Outcome(NOT_MEASURED, data, table, "dry run: no GPU is asked")
    if not data["gpu_fields_before"]:
        return Outcome(FAILED, data, [], "nvidia-smi finds no GPU")
    data["properties"] = properties()
    data["ceilings"] = measure_ceilings()
    data["gpu_fields_after"] = machine.gpu_fields()
    copy, matmul = data["ceilings"]["copy"], data["ceilings"]["matmul"]
    device = data["properties"]
    table = [
        f"{device['name']}, {device['multi_processor_count']} SMs, "
        f"L2 {device['L2_cache_size'] / 2**20:.0f} MiB, "
        f"driver {data['gpu_fields_before']['driver_version']}",
        f"copy {copy['terabytes_per_second']:.2f} TB/s (read + write)",
        f"bf16 matmul {MATMUL_SIZE}: {matmul['tflops']:.0f} TFLOP/s, "
        f"SM clock after it {data['gpu_fields_after']['clocks.sm']}",
        f"runtime {machine.runtime()}",
    ]
    return Outcome(OK, data, table)
