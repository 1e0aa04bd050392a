"""Run by stage build in a fresh process: imports the installed package, checks the CPU kernels.

python -m gpu_check.smoke: prints one JSON line.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch
import torch.nn.functional as F

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative error, root mean square


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    difference = (ours.double() - reference.double()).norm()
    return float(difference / reference.double().norm())


def check(dtype: torch.dtype, causal: bool) -> dict[str, Any]:
    """Forward and gradients of GQA attention against torch's SDPA in float64."""
    from drope_kernels import attention

    torch.manual_seed(0)
    shapes = ((2, 4, 100, 64), (2, 2, 100, 64), (2, 2, 100, 64), (2, 4, 100, 64))
    q, k, v, grad = (torch.randn(shape).to(dtype) for shape in shapes)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out = attention(q, k, v, causal=causal, backend="cpu")
    q64, k64, v64 = exact
    reference = F.scaled_dot_product_attention(q64, k64, v64, is_causal=causal, enable_gqa=True)
    ours = [out, *torch.autograd.grad(out, leaves, grad)]
    theirs = [reference, *torch.autograd.grad(reference, exact, grad.double())]
    errors = [relative_error(x.detach(), y.detach()) for x, y in zip(ours, theirs, strict=True)]
    return {
        "case": f"{str(dtype).removeprefix('torch.')} {'causal' if causal else 'full'}",
        "errors_out_dq_dk_dv": errors,
        "passed": all(error <= LIMITS[dtype] for error in errors),
    }


def main() -> None:
    started = time.time()
    import drope_kernels

    report = {
        "location": drope_kernels.__file__,
        "import_seconds": round(time.time() - started, 2),
        "build_info": drope_kernels.build_info(),
        "backends": drope_kernels.available_backends(),
        "checks": [check(dtype, causal) for dtype in LIMITS for causal in (True, False)],
    }
    print(json.dumps(report, default=str))


if __name__ == "__main__":
    main()
