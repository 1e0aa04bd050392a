"""Arguments that are in the schema and served by nobody yet, and windows of two sides."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from operands import int32, on_every_backend, qkv
from refusals import Bad, check_message
from torch import Tensor

import drope_kernels as dk
from drope_kernels.call import decode_op, ops

N = NotImplementedError
SEEN = torch.ones(2, 11, dtype=torch.bool)
SLOPES = torch.ones(4)


def dense(**options: Any) -> Callable[[], object]:
    return lambda: dk.attention(*qkv(), **options)


def packed(**options: Any) -> Callable[[], object]:
    rows = [x[0].transpose(0, 1) for x in qkv()]
    return lambda: dk.attention_varlen(*rows, int32(0, 9), int32(0, 11), **options)


def decode(**options: Any) -> Callable[[], object]:
    q, k, v = (x.detach() for x in qkv())
    return lambda: dk.attention_decode(q, k, v, cache_seqlens=int32(9, 11), **options)


def explain(**options: Any) -> Callable[[], object]:
    return lambda: dk.explain(*qkv(), **options)


def with_arrays(**options: Any) -> Callable[[], object]:
    return lambda: dk.attention(*(x.detach().numpy() for x in qkv()), **options)


def forward_op(at: int, value: Any, *, causal: bool = True) -> Callable[[], object]:
    """The op itself, argument `at` of those that both ops share replaced."""
    shared: list[Any] = [None, 0.25, causal, *[None] * 7, 2, None, None, None, False, 1.0]
    shared += [None] * 4
    shared[at] = value
    return lambda: ops.attention_fwd(*qkv(), *shared, False, "reference")


def backward_op(at: int, value: Any) -> Callable[[], object]:
    shared: list[Any] = [None, 0.25, True, *[None] * 7, 2, None, None, None, False, 1.0]
    shared += [None] * 4
    shared[at] = value
    out, state = torch.zeros(2, 4, 9, 12), torch.zeros(2, 2, 4, 9)
    operands = [x.detach() for x in qkv()]
    flags = (False, False, "reference")
    return lambda: ops.attention_bwd(out, None, out, state, *operands, *shared, *flags)


def op_of_decode(at: int, value: Any) -> Callable[[], object]:
    q, k, v = (x.detach() for x in qkv())
    call: list[Any] = [q, k, v, None, None, int32(9, 11), None, None, 0.25, *[None] * 7]
    call[at] = value
    return lambda: decode_op.attention_decode(*call, False, 1.0, False, "reference")


UNSERVED = [
    Bad("key_mask", dense(key_mask=SEEN), N, "key_mask", "None", "Tensor", "kv_end"),
    Bad("mask", dense(mask=SEEN[:, None, None]), N, "mask", "None", "Tensor", "scaled_dot"),
    Bad("alibi", dense(alibi=SLOPES), N, "alibi", "None", "Tensor", "rope"),
    Bad("packed_key_mask", packed(key_mask=SEEN[0]), N, "key_mask", "None", "Tensor", "varlen"),
    Bad("packed_alibi", packed(alibi=SLOPES), N, "alibi", "None", "Tensor", "rope"),
    Bad("packed_mask", packed(mask=SEEN), TypeError, "mask", "keyword", "unknown", "help("),
    Bad("decode_key_mask", decode(key_mask=SEEN), N, "key_mask", "None", "Tensor", "kv_start"),
    Bad("decode_alibi", decode(alibi=SLOPES), N, "alibi", "None", "Tensor", "rope"),
    Bad("explain_mask", explain(mask=SEEN), N, "mask", "None", "Tensor", "causal"),
    Bad("array", with_arrays(key_mask=np.ones((2, 11), bool)), N, "key_mask", "None", "T", "kv_"),
    Bad("uneven", dense(window=(4, 1), causal=False), N, "window", "left", "(4, 1)", "W - 1"),
    Bad("one_side", dense(window=(4, -1), causal=False), N, "window", "left", "(4, -1)", "W - 1"),
    Bad("packed_uneven", packed(window=(0, 2), causal=False), N, "window", "left", "(0, 2)", "W"),
    Bad("op_key_mask", forward_op(6, SEEN), N, "key_mask", "None", "Tensor", "kv_end"),
    Bad("op_mask", forward_op(7, SEEN), N, "mask", "None", "Tensor", "scaled_dot"),
    Bad("op_alibi", forward_op(8, SLOPES), N, "alibi", "None", "Tensor", "rope"),
    Bad("op_side", forward_op(4, 3, causal=False), N, "window", "left", "(-1, 3)", "W - 1"),
    Bad("backward_key_mask", backward_op(6, SEEN), N, "key_mask", "None", "Tensor", "kv_end"),
    Bad("backward_alibi", backward_op(8, SLOPES), N, "alibi", "None", "Tensor", "rope"),
    Bad("decode_op_key_mask", op_of_decode(12, SEEN), N, "key_mask", "None", "Tensor", "kv_end"),
    Bad("decode_op_alibi", op_of_decode(13, SLOPES), N, "alibi", "None", "Tensor", "rope"),
]


@pytest.mark.parametrize("bad", UNSERVED, ids=lambda bad: bad.name)
def test_what_nobody_serves_is_refused_by_name(bad: Bad) -> None:
    check_message(bad)


def test_an_unserved_argument_is_refused_while_compiling() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dk.attention(q, k, v, key_mask=SEEN)

    with pytest.raises(Exception, match="key_mask: expected None"):
        torch.compile(call, fullgraph=True, backend="eager")(*qkv())


# --- windows of two sides ------------------------------------------------------------------------

SAME: list[tuple[tuple[int, int], bool, int | None]] = [  # (left, right), causal, W
    ((3, 0), True, 4),
    ((3, 7), True, 4),
    ((3, -1), True, 4),
    ((0, 0), True, 1),
    ((-1, 0), True, None),
    ((-1, -1), True, None),
    ((3, 3), False, 4),
    ((0, 0), False, 1),
    ((-1, -1), False, None),
    ((2**62, 2**62), False, None),
]


@pytest.mark.parametrize(("sides", "causal", "window"), SAME, ids=str)
@on_every_backend
def test_a_pair_that_is_a_window_is_that_window(
    backend: str, sides: tuple[int, int], causal: bool, window: int | None
) -> None:
    options = {"causal": causal, "backend": backend}
    expected = dk.attention(*qkv(), window=window, **options)
    assert torch.equal(dk.attention(*qkv(), window=sides, **options), expected)


def test_packed_calls_and_decode_take_pairs_too() -> None:
    assert torch.equal(packed(window=(3, 0))(), packed(window=4)())
    assert torch.equal(packed(window=(3, 3), causal=False)(), packed(window=4, causal=False)())
    assert torch.equal(decode(window=(3, 0))(), decode(window=4)())
    assert torch.equal(decode(window=(3, -1))(), decode(window=4)())
    assert explain(window=(3, 0))() == explain(window=4)()


# --- exported programs ---------------------------------------------------------------------------


class Attention(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return dk.attention(q, k, v, rope=True, window=5, return_lse=True, backend="cpu")


def test_an_exported_program_is_saved_loaded_and_run() -> None:
    """With the ops of today's schema in it, and for other sizes."""
    operands = tuple(x.detach() for x in qkv())
    seqlen_q, seqlen_kv = (torch.export.Dim(name, min=2, max=100) for name in ("sq", "skv"))
    shapes = ({2: seqlen_q}, {2: seqlen_kv}, {2: seqlen_kv})
    program = torch.export.export(Attention(), operands, dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for sizes in ((9, 11), (5, 17)):
        other = tuple(x.detach() for x in qkv(2, *sizes))
        for ours, expected in zip(loaded(*other), Attention()(*other), strict=True):
            assert torch.equal(ours, expected)
