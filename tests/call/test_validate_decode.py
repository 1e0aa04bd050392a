"""Wrong calls of attention_decode: four-part errors, and the caches stay as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from refusals import Bad, check_message
from torch import Tensor

import drope_kernels as dk

B, HQ, HKV, D, CAPACITY = 2, 4, 2, 8, 6


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Watched:
    """A correct decode call with some arguments replaced, and what its caches held before."""

    def __init__(self, **wrong: Any) -> None:
        self.arguments: dict[str, Any] = {
            "q": torch.zeros(B, HQ, 1, D),
            "k_cache": torch.zeros(B, HKV, CAPACITY, D),
            "v_cache": torch.zeros(B, HKV, CAPACITY, D),
            "k": torch.ones(B, HKV, 1, D),
            "v": torch.ones(B, HKV, 1, D),
            "cache_seqlens": ints(0, 3),
            **wrong,
        }
        caches = (self.arguments["k_cache"], self.arguments["v_cache"])
        self.caches = [cache for cache in caches if cache.device.type == "cpu"]
        self.before = [cache.clone() for cache in self.caches]

    def __call__(self) -> object:
        return dk.attention_decode(**self.arguments)

    def untouched(self) -> bool:
        return all(torch.equal(*pair) for pair in zip(self.before, self.caches, strict=True))


def paged(**wrong: Any) -> Watched:
    """Pages of 3 keys, 2 for each row, instead of one cache row for each."""
    right = {
        "k_cache": torch.zeros(5, HKV, 3, D),
        "v_cache": torch.zeros(5, HKV, 3, D),
        "page_table": torch.arange(4, dtype=torch.int32).reshape(2, 2),
    }
    return Watched(**{**right, **wrong})


V, T, N = ValueError, TypeError, NotImplementedError
LENGTHS, TABLE = "cache_seqlens", "page_table"
FULL, WIDE = ints(0, CAPACITY), torch.zeros(B, HKV, 1, 2 * D)
NAN = float("nan")

BAD = [
    Bad("overflow", Watched(cache_seqlens=FULL), V, LENGTHS, "[0, 5]", "6]", "nothing was"),
    Bad("negative", Watched(cache_seqlens=ints(-1, 0)), V, LENGTHS, "[0, 5]", "[-1", "nothing was"),
    Bad("lengths_shape", Watched(cache_seqlens=ints(0)), V, LENGTHS, "(2,)", "(1,)", "expand"),
    Bad("lengths_dtype", Watched(cache_seqlens=FULL.long()), T, LENGTHS, "int32", "int64", ".to("),
    Bad("lengths_none", Watched(cache_seqlens=None), T, LENGTHS, "int32", "None", "empty cache"),
    Bad("lengths_list", Watched(cache_seqlens=[0, 1]), T, LENGTHS, "int32", "list", "torch.tensor"),
    Bad(
        "page_missing", paged(page_table=ints(0, 1, 2, 9).view(2, 2)), V, TABLE, "4]", "9", "count"
    ),
    Bad("page_overflow", paged(cache_seqlens=FULL), V, LENGTHS, "[0, 5]", "6]", "nothing was"),
    Bad("page_dtype", paged(page_table=torch.zeros(2, 2)), T, TABLE, "int32", "float32", ".to("),
    Bad("page_list", paged(page_table=[[0]]), T, TABLE, "int32", "list", "torch.tensor"),
    Bad("page_rank", paged(page_table=ints(0, 1)), V, TABLE, "(B = 2", "(2,)", "per batch row"),
    Bad(
        "page_none", paged(page_table=ints().view(2, 0)), V, TABLE, "at least 1", "(2, 0)", "pages"
    ),
    Bad("cache_word", Watched(cache="foo"), V, "cache", "raw", "'foo'", "filled"),
    Bad("k_alone", Watched(v=None), V, "k, v", "both", "one", "both"),
    Bad("k_heads", Watched(k=torch.zeros(B, 1, 1, D)), V, "v", "heads as k (1)", "2", "expand"),
    Bad("k_width", Watched(k=WIDE), V, "k", "head dimension of q (8)", "16", "only v"),
    Bad("v_width", Watched(v=WIDE), V, "v", "v_cache", "16)", "Snew"),
    Bad("k_dtype", Watched(k=WIDE[..., :D].half()), T, "q, k, v", "one dtype", "float16", ".to("),
    Bad(
        "cache_dtype",
        Watched(k_cache=torch.zeros(B, HKV, CAPACITY, D).half()),
        T,
        "q, k_cache, v_cache",
        "one dtype",
        "float16",
        ".to(",
    ),
    Bad(
        "cache_device",
        Watched(v_cache=torch.zeros(B, HKV, CAPACITY, D, device="meta")),
        V,
        "q, k_cache, v_cache",
        "one device",
        "meta",
        ".to(",
    ),
    Bad(
        "cache_expanded",
        Watched(v_cache=torch.zeros(1, HKV, CAPACITY, D).expand(B, -1, -1, -1)),
        V,
        "v_cache",
        "memory of its own",
        "(0, 48, 8, 1)",
        ".contiguous()",
    ),
    Bad(
        "cache_grad",
        Watched(k_cache=torch.zeros(B, HKV, CAPACITY, D, requires_grad=True)),
        N,
        "k_cache",
        "no gradient",
        "requires_grad",
        "no_grad",
    ),
    Bad("causal", Watched(causal=True), T, "causal", "keyword", "unknown", "help("),
    # What `attention` itself refuses must be refused before the caches are written.
    Bad("window", Watched(window=0), V, "window", "at least 1", "0", "None"),
    Bad("softcap", Watched(softcap=-1.0), V, "softcap", "> 0", "-1.0", "None"),
    Bad("scale", Watched(scale=NAN), V, "scale", "finite", "nan", "D ** -0.5"),
    Bad("scale_value", Watched(scale=torch.zeros(HQ, 1)), V, "scale", "> 0", "0.0", "multiplier"),
    Bad("kv_start", Watched(kv_start=ints(0, 7)), V, "kv_start", "[0, 6]", "7", "keys"),
    Bad("rope", Watched(rope="yes"), T, "rope", "Rope", "str", "Rope("),
    Bad("rope_dim", Watched(rope=dk.Rope(dim=10)), V, "rope", "head_dim = 8", "10", "Rope("),
    Bad("backend", Watched(backend="tpu"), V, "backend", "auto", "'tpu'", "available_backends"),
    Bad("return_lse", Watched(return_lse=1), T, "return_lse", "True or False", "int", "bool("),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_error_leaves_the_caches_alone(bad: Bad) -> None:
    assert isinstance(bad.call, Watched)
    check_message(bad)
    assert bad.call.untouched(), "an error must come before anything is written"
