"""Foreign arrays that are refused: four-part errors in the caller's own terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from arrays import SHAPES, Foreign, Homeless, OnGpu, decoding, in_torch, ints, randoms
from refusals import Bad, check_message

import drope_kernels as dk


def dense(**wrong: Any) -> Callable[[], object]:
    """A correct call of `attention` on NumPy arrays with some arguments replaced."""
    return lambda: dk.attention(**{**randoms(SHAPES), **wrong})


def appending(**wrong: Any) -> Callable[[], object]:
    return lambda: dk.attention_decode(**{**decoding(), **wrong})


def merging(outs: Any, lses: Any) -> Callable[[], object]:
    return lambda: dk.merge_attention(outs, lses)


def foreign(kind: type[Foreign], **arrays: Any) -> dict[str, Foreign]:
    return {name: kind(x) for name, x in {**in_torch(randoms(SHAPES)), **arrays}.items()}


T, V = TypeError, ValueError
K = randoms(SHAPES)["k"]
TENSOR = torch.from_numpy(K)
SCALE = np.full((4, 1), 0.2)
PART, LSE = np.zeros((2, 4, 6, 12), np.float32), np.zeros((2, 4, 6), np.float32)
BAD = [
    Bad("torch_in_numpy", dense(k=TENSOR), T, "k", "numpy.ndarray like q", "torch.Tensor", "numpy"),
    Bad("numpy_in_torch", dense(q=TENSOR), T, "k", "torch.Tensor", "ndarray", "from_dlpack"),
    Bad("two_libraries", dense(v=Foreign(TENSOR)), T, "v", "numpy", "arrays.For", "asarray"),
    Bad("end_of_torch", dense(kv_end=TENSOR), T, "kv_end", "numpy.ndarray", "torch", "one kind"),
    Bad("scale_of_torch", dense(scale=TENSOR), T, "scale", "numpy.ndarray", "torch", "one kind"),
    Bad("list", dense(k=K.tolist()), T, "k", "numpy.ndarray like q", "list", "numpy.asarray"),
    Bad("q_list", dense(q=[1.0]), T, "q", "torch.Tensor", "list", "numpy.asarray"),
    Bad("q_scalar", dense(q=np.float32(1)), T, "q", "__dlpack__", "numpy.float32", "asarray"),
    Bad("int64", dense(kv_end=np.array([1, 2])), T, "kv_end", "int32", "int64", "int32"),
    Bad("double", dense(scale=SCALE), T, "scale", "float32", "float64", "float()"),
    Bad("bool", dense(positions=np.ones((2, 6), bool)), T, "positions", "int", "bool", ".to("),
    Bad("int8", dense(k=K.astype(np.int8)), T, "k", "float32", "int8", ".to("),
    Bad("complex", dense(k=K.astype(np.complex64)), T, "k", "float32", "complex64", ".to("),
    Bad("object", dense(k=K.astype(object)), T, "k", "can share", "object, refused", "float32"),
    Bad("big_endian", dense(k=K.astype(">f4")), T, "k", "can share", ">f4, refused", "native"),
    Bad("masked", dense(k=np.ma.masked_array(K)), T, "k", "mask", "numpy.MaskedArray", "kv_end"),
    Bad("reversed", dense(k=K[::-1]), T, "k", "strides of 0", "(-1152, 576", "k.copy()"),
    Bad("fortran", dense(k=np.asfortranarray(K)), V, "k", "stride 1", "strides", "contiguous"),
    Bad("rank", dense(k=K[0]), V, "k", "4 dim", "(2, 9, 16)", "unsqueeze"),
    Bad("window", dense(window=np.array(3)), T, "window", "number of keys", "ndarray", "None"),
    Bad("keyword", dense(attn_mask=K), T, "attn_mask", "keyword", "unknown", "kv_end"),
    Bad("overflow", appending(cache_seqlens=ints(3, 8)), V, "cache_seqlens", "[0, 7]", "8]", "not"),
    Bad("list_of_torch", merging([PART], [TENSOR]), T, "lses[0]", "numpy", "torch", "one kind"),
    Bad("no_array", merging([None], [LSE]), T, "outs[0]", "__dlpack__", "NoneType", "asarray"),
    Bad("stacked", merging(PART, LSE), T, "outs", "sequence", "ndarray", "list("),
    Bad(
        "foreign_reversed",
        lambda: dk.attention(**foreign(Foreign, k=K[::-1])),
        T,
        "k",
        "strides of 0",
        "(-1152, 576",
        "k.copy()",
    ),
    Bad(
        "no_home",
        lambda: dk.attention(**foreign(Homeless)),
        T,
        "q",
        "library has from_dlpack",
        "arrays.Homeless",
        "torch.from_dlpack(q)",
    ),
    Bad(
        "immutable",
        lambda: dk.attention_decode(
            **{name: Foreign(torch.from_numpy(x)) for name, x in decoding().items()}
        ),
        T,
        "k_cache",
        "may be written",
        "arrays.Foreign, refused",
        "in place",
    ),
    Bad(
        "requires_grad",
        lambda: dk.attention(**foreign(Foreign, v=torch.zeros(2, 2, 9, 12, requires_grad=True))),
        T,
        "v",
        "can share",
        "gradient",
        "copy",
    ),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_error_has_its_four_parts(bad: Bad) -> None:
    check_message(bad)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch has the device here")
def test_arrays_on_a_device_that_torch_lacks_are_refused() -> None:
    call = foreign(OnGpu)
    check_message(
        Bad("", lambda: dk.attention(**call), T, "q", "can share", "refused", "device that torch")
    )


def test_bfloat16_of_ml_dtypes_is_refused() -> None:
    """NumPy does not export it."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    call = {name: x.astype(bfloat16) for name, x in randoms(SHAPES).items()}
    check_message(
        Bad("", lambda: dk.attention(**call), T, "q", "can share", "of bfloat16", "float16")
    )


def test_errors_of_validation_say_what_a_tensor_is() -> None:
    with pytest.raises(ValueError, match="stride 1") as caught:
        dense(k=np.asfortranarray(K))()
    (note,) = caught.value.__notes__
    assert "a tensor is a numpy.ndarray" in note
    assert ".contiguous() is .copy()" in note


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_a_read_only_cache_is_refused_before_the_other_is_written(name: str) -> None:
    call = decoding()
    before = {cache: call[cache].copy() for cache in ("k_cache", "v_cache")}
    call[name].flags.writeable = False
    check_message(
        Bad(
            name,
            lambda: dk.attention_decode(**call),
            TypeError,
            name,
            "may be written",
            "numpy.ndarray, refused: assignment destination is read-only",
            "in place",
        )
    )
    for cache, held in before.items():
        np.testing.assert_array_equal(call[cache], held)
