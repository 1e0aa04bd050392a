"""ONNX Runtime's com.microsoft GroupQueryAttention as a peer (fp32, causal)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from .cases import BenchCase


def _session(case: BenchCase) -> onnxruntime.InferenceSession:
    hidden_q = case.num_heads_q * case.head_dim
    hidden_kv = case.num_heads_kv * case.head_dim
    past = [1, case.num_heads_kv, 0, case.head_dim]

    def info(
        name: str, shape: list[int | str], kind: int = TensorProto.FLOAT
    ) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    node = helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "past_k", "past_v", "seqlens_k", "total_length"],
        ["out", "present_k", "present_v"],
        domain="com.microsoft",
        num_heads=case.num_heads_q,
        kv_num_heads=case.num_heads_kv,
    )
    graph = helper.make_graph(
        [node],
        "attention",
        [
            info("q", [1, case.seqlen, hidden_q]),
            info("k", [1, case.seqlen, hidden_kv]),
            info("v", [1, case.seqlen, hidden_kv]),
            info("past_k", past),
            info("past_v", past),
            info("seqlens_k", [1], TensorProto.INT32),
            info("total_length", [1], TensorProto.INT32),
        ],
        [
            info("out", [1, case.seqlen, hidden_q]),
            info("present_k", ["b", "h", "s", "d"]),
            info("present_v", ["b", "h", "s", "d"]),
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def group_query_attention(case: BenchCase) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A callable on (1, H, S, D) tensors. Its (B, S, H*D) inputs are packed once per tensor, so
    that a timed call holds the attention alone."""
    session = _session(case)
    past = np.zeros((1, case.num_heads_kv, 0, case.head_dim), np.float32)
    fixed = {
        "past_k": past,
        "past_v": past,
        "seqlens_k": np.array([case.seqlen - 1], np.int32),
        "total_length": np.array([case.seqlen], np.int32),
    }
    packed: dict[int, np.ndarray] = {}

    def pack(x: Tensor) -> np.ndarray:
        if x.data_ptr() not in packed:
            packed[x.data_ptr()] = x.transpose(1, 2).reshape(1, case.seqlen, -1).numpy()
        return packed[x.data_ptr()]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        feeds = {"q": pack(q), "k": pack(k), "v": pack(v), **fixed}
        out = torch.from_numpy(session.run(["out"], feeds)[0])
        return out.view(1, case.seqlen, case.num_heads_q, case.head_dim).transpose(1, 2)

    return attend
