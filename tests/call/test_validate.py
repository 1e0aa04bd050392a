"""Wrong calls: each raises before anything runs, and its message has four parts.

The argument, what was expected, what came, and what to do, always in the form
`argument: expected E, got G; remedy`. A row below gives a piece of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from refusals import Bad, check_message
from torch import Tensor

import drope_kernels as dk

B, HQ, HKV, S, D = 2, 4, 2, 6, 8


def qkv() -> dict[str, Tensor]:
    return {
        "q": torch.randn(B, HQ, S, D),
        "k": torch.randn(B, HKV, S, D),
        "v": torch.randn(B, HKV, S, D),
    }


def dense(**wrong: Any) -> Callable[[], object]:
    """A correct call of `attention` with some arguments replaced."""
    return lambda: dk.attention(**{**qkv(), **wrong})


def packed(**wrong: Any) -> Callable[[], object]:
    """A correct call of `attention_varlen`, two sequences, with some arguments replaced."""
    right = {
        "q": torch.randn(S, HQ, D),
        "k": torch.randn(S, HKV, D),
        "v": torch.randn(S, HKV, D),
        "cu_seqlens_q": ints(0, 2, S),
        "cu_seqlens_k": ints(0, 2, S),
    }
    return lambda: dk.attention_varlen(**{**right, **wrong})


def merge(outs: Any = None, lses: Any = None) -> Callable[[], object]:
    """Two parts that fit, with one list replaced."""
    outs = [torch.zeros(B, HQ, S, D)] * 2 if outs is None else outs
    lses = [torch.zeros(B, HQ, S)] * 2 if lses is None else lses
    return lambda: dk.merge_attention(outs, lses)


def rope(**wrong: Any) -> Callable[[], object]:
    return lambda: dk.Rope(**wrong)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def twice_differentiated() -> None:
    q, k, v = (x.requires_grad_() for x in qkv().values())
    (dq,) = torch.autograd.grad(dk.attention(q, k, v).sum(), q, create_graph=True)
    dq.sum().backward()


def transformed(transform: Callable[..., Any]) -> Callable[[], object]:
    q, k, v = qkv().values()
    return lambda: transform(lambda x: dk.attention(x, k, v).sum())(q)


def tangent(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], object]:
    return lambda x: torch.func.jvp(function, (x,), (x,))


V, T, N = ValueError, TypeError, NotImplementedError
ZEROS = torch.zeros
META = torch.zeros(B, HKV, S, D, device="meta")
WIDE = torch.zeros(B, HKV, S, 2 * D)
YARN = {"original_max_position_embeddings": 64}

TENSORS = [
    Bad("q_rank", dense(q=ZEROS(HQ, S, D)), V, "q", "4 dim", "(4, 6, 8)", "(B, H, S, D)"),
    Bad("k_rank", dense(k=ZEROS(1, B, HKV, S, D)), V, "k", "4 dim", "(1, 2, 2", "attention"),
    Bad("v_scalar", dense(v=ZEROS(())), V, "v", "4 dim", "()", "attention_varlen"),
    Bad("q_list", dense(q=[[1.0]]), T, "q", "Tensor", "list", "torch."),
    Bad("k_none", dense(k=None), T, "k", "Tensor", "NoneType", "torch."),
    Bad("v_numpy", dense(v=np.zeros((B, HKV, S, D))), T, "v", "Tensor", "ndarray", "from_"),
    Bad("q_int", dense(q=ZEROS(B, HQ, S, D, dtype=torch.int64)), T, "q", "float32", "int64", ".to"),
    Bad("k_bool", dense(k=META.bool()), T, "k", "float32", "bool", ".to("),
    Bad("v_complex", dense(v=META.to(torch.complex64)), T, "v", "float32", "complex64", ".to("),
    Bad("q_fp8", dense(q=META.to(torch.float8_e4m3fn)), T, "q", "float16", "float8", "fp8"),
    Bad("k_mixed", dense(k=WIDE[..., :D].half()), T, "q, k, v", "one dtype", "float16", ".to("),
    Bad("v_float64", dense(v=WIDE[..., :D].double()), T, "q, k, v", "one dtype", "float64", ".to("),
    Bad("k_device", dense(k=META), V, "q, k, v", "one device", "meta", ".to("),
    Bad("v_device", dense(v=META), V, "q, k, v", "one device", "cpu, cpu, meta", ".to("),
    Bad("q_stride", dense(q=ZEROS(B, HQ, D, S).mT), V, "q", "stride 1", "strides", "contiguous"),
    Bad("k_stride", dense(k=WIDE[..., ::2]), V, "k", "stride 1", "2)", "k.contiguous()"),
    Bad("v_sparse", dense(v=WIDE[..., :D].to_sparse()), T, "v", "strided", "sparse", "to_dense"),
    Bad("no_channels", dense(q=ZEROS(B, HQ, S, 0)), V, "q", "at least 1", "0)", "nothing"),
    Bad("batch", dense(k=ZEROS(3, HKV, S, D)), V, "q, k, v", "batch", "(3, 2", "expand"),
    Bad("heads", dense(q=ZEROS(B, 3, S, D)), V, "q", "multiple", "3 and 2", "group"),
    Bad("no_heads", dense(q=ZEROS(B, 0, S, D)), V, "q", "multiple", "0 and 2", "group"),
    Bad("v_heads", dense(v=ZEROS(B, 1, S, D)), V, "v", "heads as k (2)", "1", "expand"),
    Bad("k_head_dim", dense(k=WIDE), V, "k", "head dimension of q (8)", "16", "only v"),
    Bad("v_rows", dense(v=ZEROS(B, HKV, 5, D)), V, "v", "rows as k (6)", "(2, 2, 5", "key"),
    Bad(
        "double_backward", twice_differentiated, N, "attention", "one back", "double", "scaled_dot"
    ),
    Bad("func_grad", transformed(torch.func.grad), N, "attention", "autograd", "func", "scaled"),
    Bad("forward_mode", transformed(tangent), N, "attention", "autograd", "forward-", "scaled"),
]

NUMBERS = [
    Bad("scale_nan", dense(scale=float("nan")), V, "scale", "finite", "nan", "D ** -0.5"),
    Bad("scale_inf", dense(scale=float("inf")), V, "scale", "finite", "inf", "D ** -0.5"),
    Bad("scale_huge", dense(scale=1e39), V, "scale", "3.4e+38", "1e+39", "D ** -0.5"),
    Bad("scale_tiny", dense(scale=1e-50), V, "scale", "1.18e-38", "1e-50", "D ** -0.5"),
    Bad("scale_zero", dense(scale=0.0), V, "scale", "> 0", "0.0", "D ** -0.5"),
    Bad("scale_negative", dense(scale=-1), V, "scale", "> 0", "-1", "D ** -0.5"),
    Bad("scale_string", dense(scale="1"), T, "scale", "number", "str", "D ** -0.5"),
    Bad("scale_bool", dense(scale=True), T, "scale", "number", "bool", "D ** -0.5"),
    Bad("scale_half", dense(scale=ZEROS(()).half()), T, "scale", "float32", "float16", "float()"),
    Bad("scale_shape", dense(scale=torch.ones(HQ)), V, "scale", "(2, 4, 6)", "(4,)", "(Hq, 1)"),
    Bad("scale_rank", dense(scale=torch.ones(1, 1, 1, 1)), V, "scale", "(2, 4", "(1, 1", "(Hq, 1)"),
    Bad("scale_value", dense(scale=-torch.ones(HQ, 1)), V, "scale", "> 0", "-1.0", "multiplier"),
    Bad("scale_values", dense(scale=torch.eye(S)[:1]), V, "scale", "> 0", "0.0", "multiplier"),
    Bad("scale_device", dense(scale=META[:1, 0, 0, :1]), V, "scale", "cpu", "meta", ".to("),
    Bad("window_0", dense(window=0), V, "window", "at least 1", "0", "None"),
    Bad("window_negative", dense(window=-1), V, "window", "at least 1", "-1", "None"),
    Bad("window_int128", dense(window=2**70), V, "window", "int64", str(2**70), "None"),
    Bad("window_float", dense(window=4.0), T, "window", "number of keys", "float", "None"),
    Bad("window_bool", dense(window=True), T, "window", "number of keys", "bool", "None"),
    Bad("window_list", dense(window=[4, 0]), T, "window", "number of keys", "list", "None"),
    Bad("window_three", dense(window=(4, 0, 0)), V, "window", "(left, right)", "3", "-1"),
    Bad("window_side", dense(window=(4, -2)), V, "window", "0 or more", "(4, -2)", "-1"),
    Bad("window_text", dense(window=(4, "0")), T, "window", "numbers of", "str", "-1"),
    Bad("window_sides", dense(window=(2**70, 0)), V, "window", "int64", str(2**70), "None"),
    Bad("softcap_0", dense(softcap=0.0), V, "softcap", "> 0", "0.0", "None"),
    Bad("softcap_tiny", dense(softcap=1e-50), V, "softcap", "float32", "1e-50", "None"),
    Bad("softcap_nan", dense(softcap=float("nan")), V, "softcap", "finite", "nan", "None"),
    Bad("softcap_tensor", dense(softcap=torch.ones(())), T, "softcap", "number", "Tensor", "None"),
    Bad("causal_int", dense(causal=1), T, "causal", "True or False", "int", "bool("),
    Bad("causal_none", dense(causal=None), T, "causal", "True or False", "NoneType", "bool("),
    Bad("return_lse", dense(return_lse=1), T, "return_lse", "True or False", "int", "bool("),
    Bad("backend_name", dense(backend="tpu"), V, "backend", "auto", "'tpu'", "available_backends"),
    Bad("backend_type", dense(backend=None), T, "backend", "name", "NoneType", "auto"),
    Bad(
        "backend_refuses",
        dense(backend="cpu", **{name: x.double() for name, x in qkv().items()}),
        V,
        "backend",
        "serve this call",
        "float64",
        'backend="auto"',
    ),
    Bad(
        "attn_mask", dense(attn_mask=None), T, "attn_mask", "keyword", "unknown", "attention_varlen"
    ),
    Bad("dropout_p", dense(dropout_p=0.1), T, "dropout_p", "keyword", "unknown", "dropout"),
    Bad("alibi", dense(alibi_slopes=None), T, "alibi_slopes", "keyword", "unknown", "window"),
    Bad("typo", dense(windwo=3), T, "windwo", "keyword", "unknown", "help("),
]

INDICES = [
    Bad("q_start_float", dense(q_start=1.0), T, "q_start", "int", "float", "None"),
    Bad("q_start_list", dense(q_start=[0, 1]), T, "q_start", "int32", "list", "None"),
    Bad("q_start_shape", dense(q_start=ints(0, 1, 2)), V, "q_start", "(2,)", "(3,)", "expand"),
    Bad("q_start_rank", dense(q_start=ints(0)[0]), V, "q_start", "(2,)", "()", "expand"),
    Bad("q_start_dtype", dense(q_start=ints(0, 1).long()), T, "q_start", "int32", "int64", ".to("),
    Bad("q_start_large", dense(q_start=2**40), V, "q_start", "int32", str(2**40), "keys"),
    Bad("kv_end_beyond", dense(kv_end=ints(6, 7)), V, "kv_end", "[0, 6]", "7", "keys"),
    Bad("kv_end_negative", dense(kv_end=ints(-1, 2)), V, "kv_end", "[0, 6]", "-1", "keys"),
    Bad("kv_start_beyond", dense(kv_start=ints(0, 9)), V, "kv_start", "[0, 6]", "9", "keys"),
    Bad("kv_start_dtype", dense(kv_start=ZEROS(2)), T, "kv_start", "int32", "float32", ".to("),
    Bad("kv_start_int", dense(kv_start=3), T, "kv_start", "int32", "int", "torch.tensor"),
    Bad("kv_end_shape", dense(kv_end=ints(1)), V, "kv_end", "(2,)", "(1,)", "expand"),
    Bad("kv_end_device", dense(kv_end=ints(1, 2).to("meta")), V, "kv_end", "cpu", "meta", ".to("),
    Bad("cu_first", packed(cu_seqlens_q=ints(1, 2, S)), V, "cu_seqlens_q", "0", "[1,", "cumsum"),
    Bad("cu_end", packed(cu_seqlens_k=ints(0, 2, 5)), V, "cu_seqlens_k", "6", "5]", "cumsum"),
    Bad("cu_falls", packed(cu_seqlens_q=ints(0, 7, S)), V, "cu_seqlens_q", "non", "7,", "cumsum"),
    Bad("cu_empty", packed(cu_seqlens_q=ints()), V, "cu_seqlens_q", "num_seqs", "(0,)", "cumsum"),
    Bad("cu_list", packed(cu_seqlens_q=[0, S]), T, "cu_seqlens_q", "int32", "list", "cumsum"),
    Bad("cu_count", packed(cu_seqlens_k=ints(0, S)), V, "cu_seqlens_k", "(3,)", "(2,)", "sequence"),
    Bad(
        "cu_dtype",
        packed(cu_seqlens_k=torch.tensor([0, 2, S])),
        T,
        "cu_seqlens_k",
        "int32",
        "int64",
        ".to(",
    ),
    Bad("packed_rank", packed(q=ZEROS(1, HQ, S, D)), V, "q", "3 dim", "(1, 4", "attention"),
    Bad("packed_rows", packed(v=ZEROS(5, HKV, D)), V, "v", "rows as k (6)", "(5, 2", "one value"),
    Bad("packed_range", packed(kv_end=ints(1)), T, "kv_end", "keyword", "unknown", "help("),
]

LONG = torch.arange(S).expand(B, S)
ROTATION = [
    Bad("positions_shape", dense(positions=LONG[:, :5]), V, "positions", "(2, 6)", "5)", "expand"),
    Bad("positions_rank", dense(positions=LONG[0]), V, "positions", "(2, 6)", "(6,)", "expand"),
    Bad("positions_list", dense(positions=[0]), T, "positions", "tensor", "list", "torch.tensor"),
    Bad(
        "positions_double",
        dense(positions=LONG.double()),
        T,
        "positions",
        "float32",
        "float64",
        ".to(",
    ),
    Bad(
        "positions_far",
        dense(positions=LONG + 2**24, rope=True),
        V,
        "positions",
        "2**24",
        str(2**24 + 5),
        "offset",
    ),
    Bad(
        "kv_positions_nan",
        dense(kv_positions=LONG.float() / 0, rope=True),
        V,
        "kv_positions",
        "finite",
        "NaN",
        "pad",
    ),
    Bad(
        "positions_grad",
        dense(positions=LONG.float().requires_grad_(), rope=True),
        N,
        "positions",
        "without gradient",
        "requires_grad",
        "detach",
    ),
    Bad("kv_positions", dense(kv_positions=LONG.bool()), T, "kv_positions", "int", "bool", ".to("),
    Bad("rope_far", dense(q_start=2**24, rope=True), V, "q_start", "2**24", "16777216", "origin"),
    Bad("rope_type", dense(rope="yarn"), T, "rope", "Rope", "str", "Rope("),
    Bad("rope_none", dense(rope=None), T, "rope", "False", "NoneType", "rope=False"),
    Bad("rope_wide", dense(rope=dk.Rope(dim=10)), V, "rope", "at most head_dim = 8", "10", "Rope("),
    Bad(
        "rope_rows",
        dense(rope=dk.Rope(inv_freq=ZEROS(3, 4))),
        V,
        "rope",
        "Hkv = 2",
        "3",
        "per kv head",
    ),
    Bad("dim_odd", rope(dim=7), V, "dim", "even", "7", "None"),
    Bad("dim_zero", rope(dim=0), V, "dim", ">= 2", "0", "rope=False"),
    Bad("dim_negative", rope(dim=-4), V, "dim", ">= 2", "-4", "rope=False"),
    Bad("dim_float", rope(dim=4.0), T, "dim", "even", "float", "None"),
    Bad("theta_zero", rope(theta=0.0), V, "theta", "> 0", "0.0", "10000"),
    Bad("theta_tiny", rope(theta=1e-300), V, "theta", "at least", "1e-300", "10000"),
    Bad("theta_nan", rope(theta=float("nan")), V, "theta", "finite", "nan", "10000"),
    Bad("theta_text", rope(theta="10k"), T, "theta", "number", "str", "10000"),
    Bad("interleaved", rope(interleaved=2), T, "interleaved", "True or False", "int", "pairs"),
    Bad("inv_freq_nan", rope(inv_freq=[0.1, float("nan")]), V, "inv_freq", "finite", "NaN", "0 "),
    Bad("inv_freq_huge", rope(inv_freq=[1e300]), V, "inv_freq", "at most", "1e+300", "alias"),
    Bad("inv_freq_rank", rope(inv_freq=ZEROS(1, 2, 3)), V, "inv_freq", "dim / 2", "(1, 2", "row"),
    Bad("inv_freq_empty", rope(inv_freq=[]), V, "inv_freq", "dim / 2", "[0]", "one row"),
    Bad(
        "inv_freq_ragged", rope(inv_freq=[[1.0], [1.0, 2.0]]), V, "inv_freq", "dim", "[1, 2]", "row"
    ),
    Bad("inv_freq_text", rope(inv_freq="1234"), T, "inv_freq", "number", "str", "tensor"),
    Bad("inv_freq_dim", rope(inv_freq=[1.0, 2.0], dim=8), V, "inv_freq", "4", "2", "leave dim"),
    Bad(
        "inv_freq_grad",
        rope(inv_freq=torch.ones(4, requires_grad=True)),
        N,
        "inv_freq",
        "numbers",
        "requires grad",
        "detach",
    ),
    Bad("factor_zero", rope(attention_factor=0), V, "attention_factor", "> 0", "0", "1.0"),
    Bad("pi_factor", lambda: dk.Rope.pi(0.25), V, "factor", "at least 1", "0.25", "1 / factor"),
    Bad("yarn_factor", lambda: dk.Rope.yarn(-2, **YARN), V, "factor", "> 0", "-2", "length ratio"),
    Bad(
        "yarn_length",
        lambda: dk.Rope.yarn(4.0, original_max_position_embeddings=0),
        V,
        "original_max_position_embeddings",
        "> 0",
        "0",
        "rope parameters",
    ),
    Bad(
        "yarn_betas",
        lambda: dk.Rope.yarn(4.0, beta_fast=1.0, beta_slow=32.0, **YARN),
        V,
        "beta_fast",
        "more than beta_slow",
        "1.0",
        "32",
    ),
    Bad(
        "llama3_order",
        lambda: dk.Rope.llama3(8.0, low_freq_factor=4.0, high_freq_factor=1.0, **YARN),
        V,
        "high_freq_factor",
        "more than low_freq_factor = 4.0",
        "1.0",
        "4",
    ),
    Bad("strength", lambda: dk.Rope().with_strength(1.5), V, "strength", "[0, 1]", "1.5", "0 "),
]

OTHERS = [
    Bad("merge_empty", merge([], []), V, "outs, lses", "at least 1", "0", "one lse"),
    Bad("merge_count", merge(lses=[ZEROS(B, HQ, S)]), V, "outs, lses", "as many", "2 and 1", "lse"),
    Bad(
        "merge_tensor", merge(outs=ZEROS(2, B, HQ, S, D)), T, "outs", "sequence", "Tensor", "list("
    ),
    Bad(
        "merge_shape",
        merge(outs=[ZEROS(B, HQ, S, D), ZEROS(B, HQ, S, 4)]),
        V,
        "outs[1]",
        "(2, 4, 6, 8)",
        "(2, 4, 6, 4)",
        "same queries",
    ),
    Bad("merge_lse", merge(lses=[ZEROS(B, HQ, S, 1)] * 2), V, "lses[0]", "(2, 4, 6)", "1)", "lse"),
    Bad("merge_none", merge(lses=[None, None]), T, "lses", "tensors", "NoneType", "return_lse"),
    Bad("log_c", lambda: dk.LogScale(float("nan"), 512), V, "c", ">= 0", "nan", "0 turns"),
    Bad("log_negative", lambda: dk.LogScale(-0.1, 512), V, "c", ">= 0", "-0.1", "0 turns"),
    Bad("log_text", lambda: dk.LogScale("0.4", 512), T, "c", "number", "str", "0 turns"),
    Bad("log_train", lambda: dk.LogScale(0.4, 0), V, "train_length", ">= 1", "0", "context"),
    Bad("log_length", lambda: dk.LogScale(0.4, 8)(-1, 64), V, "length", ">= 0", "-1", "tokens"),
    Bad("log_dim", lambda: dk.LogScale(0.4, 8)(9, 0), V, "head_dim", ">= 1", "0", "head"),
    Bad("log_rows", lambda: dk.LogScale(0.4, 8).rows(ZEROS(3), 64), T, "index", "int", "32", "key"),
]
BAD = TENSORS + NUMBERS + INDICES + ROTATION + OTHERS


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_error_has_its_four_parts(bad: Bad) -> None:
    check_message(bad)
