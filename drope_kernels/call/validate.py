"""Checks of shapes, dtypes, strides, devices and Python numbers, before any op is called.

A message names the argument, what was expected, what came, and what to do. Tensor values are
checked in `check_values`, inside the op, so that nothing here reads data or breaks a graph.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from drope_kernels.rope import Rope

AUTOCAST_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*AUTOCAST_DTYPES, torch.float64)
POSITION_DTYPES = (torch.float32, torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)
_FLOAT32 = torch.finfo(torch.float32)
LARGEST_SCALE = _FLOAT32.max * math.log(2)  # kernels multiply it by log2(e)
_ALTERNATIVES = {
    "dropout": "dropout on attention weights is not supported: apply it to the output",
    "dropout_p": "dropout on attention weights is not supported: apply it to the output",
    "attn_mask": "dense masks are not supported: use causal, window, q_start, kv_start and kv_end, "
    "or attention_varlen for packed sequences",
    "attention_mask": "dense masks are not supported: use causal, window, q_start, kv_start and "
    "kv_end, or attention_varlen for packed sequences",
    "attn_bias": "additive biases are not supported: use rope, scale or softcap",
    "alibi_slopes": "ALiBi is not supported: use rope, or a window with rope=False",
    "is_causal": "say causal=",
    "enable_gqa": "heads are grouped by the shapes of q and k: leave it out",
    "softmax_scale": "say scale=",
    "logits_soft_cap": "say softcap=",
    "window_size": "say window=W: W keys, the query's own included",
    "k_descale": "fp8 is not supported: pass float16 or bfloat16",
}


def refuse(function: str, keywords: dict[str, Any]) -> NoReturn:
    """TypeError for keywords a function does not have, with the alternative where one is known."""
    name = next(iter(keywords))
    advice = _ALTERNATIVES.get(name, f"see help(drope_kernels.{function})")
    raise TypeError(f"{name}: expected a keyword of {function}(), got an unknown one; {advice}")


Operands = dict[str, Tensor]  # by name in messages: queries, keys, values


def check_qkv(
    q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str] = ("q", "k", "v")
) -> None:
    """q (B, Hq, Sq, D), k (B, Hkv, Skv, D), v (B, Hkv, Skv, Dv) of one dtype and device."""
    operands = dict(zip(names, (q, k, v), strict=True))
    _check_each(operands, 4, "(B, H, S, D); packed sequences go to attention_varlen")
    _check_alike(operands)
    if k.shape[0] != q.shape[0] or v.shape[0] != q.shape[0]:
        raise ValueError(
            f"{_list(operands)}: expected one batch size, got {shape_of(q)}, {shape_of(k)}, "
            f"{shape_of(v)}; expand the smaller ones"
        )
    _check_heads(operands, -3)
    _check_rows(operands, -2)


def check_qkv_packed(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q (total_q, Hq, D), k (total_k, Hkv, D), v (total_k, Hkv, Dv) of one dtype and device."""
    operands = {"q": q, "k": k, "v": v}
    _check_each(operands, 3, "(total, H, D); batched tensors go to attention")
    _check_alike(operands)
    _check_heads(operands, -2)
    _check_rows(operands, -3)


def check_qkv_paged(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """q (B, Hq, Sq, D) and pages (num_pages, Hkv, page_size, D or Dv)."""
    operands = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    _check_each(operands, 4, "(B, H, S, D), caches (num_pages, Hkv, page_size, D)")
    _check_alike(operands)
    _check_heads(operands, -3)
    _check_rows(operands, -2)
    if k_cache.shape[0] != v_cache.shape[0]:
        raise ValueError(
            f"v_cache: expected as many pages as k_cache ({k_cache.shape[0]}), got "
            f"{shape_of(v_cache)}; one page table serves both"
        )


def _list(operands: Operands) -> str:
    return ", ".join(operands)


def _check_each(operands: Operands, ndim: int, layout: str) -> None:
    for name, x in operands.items():
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{name}: expected a torch.Tensor, got {type(x).__name__}; convert it with "
                "torch.from_dlpack or torch.as_tensor"
            )
        if x.ndim != ndim:
            raise ValueError(
                f"{name}: expected {ndim} dimensions, got {shape_of(x)}; use unsqueeze or "
                f"flatten for {layout}"
            )
        _check_storage(name, x)


def _check_alike(operands: Operands) -> None:
    q, k, v = operands.values()
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            f"{_list(operands)}: expected one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; convert "
            "with .to()"
        )
    if k.device != q.device or v.device != q.device:
        raise ValueError(
            f"{_list(operands)}: expected one device, got {q.device}, {k.device}, {v.device}; move "
            "with .to()"
        )


def _check_rows(operands: Operands, dim: int) -> None:
    _, k, v = operands.values()
    if k.shape[dim] != v.shape[dim]:
        _, k_name, v_name = operands
        raise ValueError(
            f"{v_name}: expected as many rows as {k_name} ({k.shape[dim]}), got {shape_of(v)}; "
            "each key has one value"
        )


def _check_heads(operands: Operands, dim: int) -> None:
    q, k, v = operands.values()
    q_name, k_name, v_name = operands
    num_q, num_k, num_v = q.shape[dim], k.shape[dim], v.shape[dim]
    if num_k != num_v:
        raise ValueError(
            f"{v_name}: expected as many heads as {k_name} ({num_k}), got {num_v}; expand the "
            "smaller"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{k_name}: expected the head dimension of {q_name} ({q.shape[-1]}), got "
            f"{k.shape[-1]}; only {v_name} may have another"
        )
    if num_k == 0 or num_q == 0 or num_q % num_k:
        raise ValueError(
            f"{q_name}: expected a number of heads that is a multiple of {k_name}'s, got {num_q} "
            f"and {num_k}; grouped heads are consecutive: q head h reads kv head h // (Hq / Hkv)"
        )


def _check_storage(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        hint = "fp8 is not supported; " if "float8" in str(x.dtype) else ""
        raise TypeError(
            f"{name}: expected float32, float16, bfloat16 (or float64 for the reference), got "
            f"{x.dtype}; {hint}convert with .to()"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got {x.layout}; use .to_dense()")
    if x.shape[-1] == 0:
        raise ValueError(
            f"{name}: expected at least 1 channel in the last dimension, got {shape_of(x)}; there "
            "is nothing to attend with"
        )
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        raise ValueError(
            f"{name}: expected stride 1 in the last dimension, got strides {tuple(x.stride())}; "
            f"pass {name}.contiguous()"
        )


def check_switches(causal: object, window: object, softcap: object, backend: object) -> None:
    """The Python numbers and names that shape a call."""
    check_flag("causal", causal)
    if isinstance(window, tuple):
        _check_sides(window)
    elif window is not None:
        _check_int("window", window, "a number of keys", "None turns it off")
        if window < 1:  # type: ignore[operator]
            raise ValueError(
                f"window: expected at least 1 key (the query's own), got {window}; None turns it "
                "off"
            )
        _check_int64("window", window)
    if softcap is not None:
        check_positive("softcap", softcap, "None turns it off")
    if not isinstance(backend, str):
        raise TypeError(f'backend: expected a name, got {type(backend).__name__}; try "auto"')


def _check_sides(window: tuple[object, ...]) -> None:
    """(left, right): numbers of keys beside the query's own."""
    if len(window) != 2:
        raise ValueError(
            f"window: expected a number of keys or (left, right), got {len(window)} numbers; say "
            "how many keys beside its own a query sees on either side, -1 for no limit"
        )
    for side in window:
        _check_int("window", side, "numbers of keys (left, right)", "-1 is no limit")
        if side < -1:  # type: ignore[operator]
            raise ValueError(
                f"window: expected 0 or more keys on either side, got {window}; -1 is no limit"
            )
        _check_int64("window", side)


def _check_int64(name: str, x: object) -> None:
    if isinstance(x, int) and x >= 2**63:
        raise ValueError(f"{name}: expected an int64, got {x}; None turns it off")


def check_positive(name: str, x: object, remedy: str, largest: float = _FLOAT32.max) -> None:
    """A finite Python number > 0 that float32, in which kernels compute, can hold."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{name}: expected a number > 0, got {type(x).__name__}; {remedy}")
    if not (x > 0 and x < math.inf):
        raise ValueError(f"{name}: expected a finite number > 0, got {x}; {remedy}")
    if not _FLOAT32.tiny <= x <= largest:
        raise ValueError(
            f"{name}: expected a number from {_FLOAT32.tiny:.3g} to {largest:.3g}, as float32 "
            f"holds them, got {x}; {remedy}"
        )


def check_flag(name: str, x: object) -> None:
    """True or False, nothing that merely could be read so."""
    if not isinstance(x, bool):
        raise TypeError(
            f"{name}: expected True or False, got {type(x).__name__}; pass bool({name})"
        )


def _check_int(name: str, x: object, expected: str, remedy: str) -> None:
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected {expected}, got {type(x).__name__}; {remedy}")


def check_scale(scale: object, q: Tensor, shape: tuple[int, ...], letters: str) -> None:
    """None, a number > 0, or a tensor broadcastable to `shape`."""
    if scale is None:
        return
    if not isinstance(scale, Tensor):
        remedy = "the multiplier of q.k is a number, a float32 tensor, or None for D ** -0.5"
        check_positive("scale", scale, remedy, LARGEST_SCALE)
        return
    if scale.dtype != torch.float32 and not (
        scale.dtype == torch.float64 and q.dtype == torch.float64
    ):
        raise TypeError(f"scale: expected a float32 tensor, got {scale.dtype}; use scale.float()")
    check_tensor_device("scale", scale, q)
    if scale.ndim > len(shape) or any(
        have != 1 and have != want
        for have, want in zip(reversed(scale.shape), reversed(shape), strict=False)
    ):
        raise ValueError(
            f"scale: expected a shape broadcastable to {letters} = {tuple(shape)}, got "
            f"{shape_of(scale)}; one scale per head is (Hq, 1)"
        )


def check_index(name: str, x: object, q: Tensor, size: int, expected: str) -> None:
    """None or an int32 tensor of `size` elements on q's device."""
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name}: expected {expected}, got {type(x).__name__}; "
            "use torch.tensor(..., dtype=torch.int32)"
        )
    if x.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32, got {x.dtype}; use {name}.to(torch.int32)")
    if x.ndim != 1 or x.shape[0] != size:
        raise ValueError(
            f"{name}: expected {expected} of shape ({size},), got {shape_of(x)}; use {name}.expand"
        )
    check_tensor_device(name, x, q)


def check_q_start(q_start: object, q: Tensor) -> None:
    """None, an int, or one int32 per batch row."""
    if isinstance(q_start, Tensor):
        check_index("q_start", q_start, q, q.shape[0], "an int or one int32 per batch row")
    elif q_start is not None:
        _check_int("q_start", q_start, "an int or an int32 tensor (B,)", "None for Skv - Sq")
        if not -(2**31) <= q_start < 2**31:  # type: ignore[operator]
            raise ValueError(
                f"q_start: expected an int32, got {q_start}; it counts keys of the tensors given"
            )


def check_positions(name: str, x: object, q: Tensor, shape: tuple[int, ...]) -> None:
    """None, or integers or float32 of `shape` without gradient."""
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name}: expected a tensor {shape}, got {type(x).__name__}; use torch.tensor"
        )
    if x.dtype not in POSITION_DTYPES:
        raise TypeError(
            f"{name}: expected integers or float32, got {x.dtype}; use {name}.to(torch.float32)"
        )
    if tuple(x.shape) != tuple(shape):
        raise ValueError(
            f"{name}: expected shape {tuple(shape)}, got {shape_of(x)}; use {name}.expand"
            f"{tuple(shape)}"
        )
    check_tensor_device(name, x, q)
    if x.requires_grad:
        raise NotImplementedError(
            f"{name}: expected a tensor without gradient, got requires_grad=True; positions have "
            f"no gradient here, pass {name}.detach()"
        )


def check_cu_seqlens(cu_seqlens_q: object, cu_seqlens_k: object, q: Tensor) -> None:
    """Two int32 tensors (num_seqs + 1,) of one length."""
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(x, Tensor) or x.ndim != 1 or x.shape[0] < 1:
            got = shape_of(x) if isinstance(x, Tensor) else type(x).__name__
            raise (ValueError if isinstance(x, Tensor) else TypeError)(
                f"{name}: expected an int32 tensor (num_seqs + 1,), got {got}; "
                "build it with lengths.cumsum and a leading 0"
            )
        check_index(name, x, q, x.shape[0], "an int32 tensor (num_seqs + 1,)")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:  # type: ignore[attr-defined]
        raise ValueError(
            "cu_seqlens_k: expected as many sequences as cu_seqlens_q "
            f"({shape_of(cu_seqlens_q)}), got {shape_of(cu_seqlens_k)}; "  # type: ignore[arg-type]
            "a sequence may be empty in either"
        )


def check_rope(rope: object, num_heads_kv: int) -> None:
    """A `Rope` whose table, if per head, has one row per kv head."""
    if not isinstance(rope, Rope):
        raise TypeError(
            f"rope: expected True, False or a Rope, got {type(rope).__name__}; Rope() is the plain "
            "rotation, rope=False is none"
        )
    # Two comparisons: while compiling, `in` does not find a number among symbolic sizes.
    if rope.num_tables != 1 and rope.num_tables != num_heads_kv:
        raise ValueError(
            f"rope: expected inv_freq with 1 or Hkv = {num_heads_kv} rows, got {rope.num_tables}; "
            "give one row per kv head"
        )


def check_tensor_device(name: str, x: Tensor, q: Tensor) -> None:
    """On q's device."""
    if x.device != q.device:
        raise ValueError(
            f"{name}: expected it on q's device {q.device}, got {x.device}; move it "
            "with .to(q.device)"
        )


def shape_of(x: Tensor) -> str:
    """How messages write a shape."""
    return f"shape {tuple(x.shape)}"
