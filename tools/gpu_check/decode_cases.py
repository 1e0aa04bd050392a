"""attention_decode on the device, at sizes of its own; calls and checks of the suite, `decodes`."""

from __future__ import annotations

from typing import Any

import torch
from cases import RopeCase
from decodes import DecodeCall, DecodeCase, check_results
from torch import Tensor

import drope_kernels as dk

from .accelerator import StandIn
from .device_calls import moved, run_in

SPARE_KEYS = 70  # that a cache could still take


def decode(name: str, lengths: tuple[int, ...], num_new: int = 1, **given: Any) -> DecodeCase:
    """A case with capacity to spare, of 8 heads that share 2 and 128 channels unless given."""
    page = given.get("page_size") or 1
    most = max(lengths) + num_new + SPARE_KEYS
    sizes = {"num_heads_q": 8, "num_heads_kv": 2, "head_dim": 128}
    sizes["capacity"] = -(-most // page) * page
    return DecodeCase(name, lengths, num_new, **(sizes | given))


PLAIN = RopeCase()
PAIRS = RopeCase(dim=32, interleaved=True, attention_factor=1.2)
CASES = (
    decode("decode", (1000, 0, 4097, 63)),
    decode("decode_mha", (777, 4096), num_heads_kv=8, head_dim=64),
    decode("decode_mqa_256", (300, 2049), num_heads_kv=1, head_dim=256),
    decode("decode_long_row", (70_000,), num_heads_q=4, num_heads_kv=1),
    decode("decode_rope", (1000, 1, 4097), rope=PLAIN),
    decode("decode_rotated", (1000, 1, 4097), rope=PLAIN, cache="rotated"),
    decode("decode_pairs", (130, 517), num_new=3, num_queries=3, rope=PAIRS),
    decode("decode_chunk", (511, 64), num_new=16, num_queries=16, head_dim=64),
    decode("decode_window", (3000, 40), window=256),
    decode("decode_rows", (200, 300), num_new=2, num_queries=2, scale="row"),
    decode("decode_nothing_new", (128, 1), num_new=0),
    decode("decode_pages", (1000, 0, 4097, 63), page_size=16, rope=PLAIN),
    decode("decode_pages_64", (640, 4095), page_size=64, num_new=5, num_queries=5),
    decode("decode_pages_rotated", (99, 700), page_size=16, rope=PAIRS, cache="rotated"),
)
BY_NAME = {case.name: case for case in CASES}


def check(backend: str, dtype: torch.dtype, mode: str, name: str, where: StandIn) -> dict[str, Any]:
    """{} when out and lse pass; MismatchError when they do not."""
    call = DecodeCall(BY_NAME[name], dtype)
    there = {key: moved(value, where.device) for key, value in call.arguments().items()}

    def decoded() -> dict[str, Tensor]:
        with torch.no_grad():
            out, lse = dk.attention_decode(**there, return_lse=True, backend=backend)
        return {"out": out, "lse": lse}

    check_results(call, run_in(mode, where, decoded))
    return {}
