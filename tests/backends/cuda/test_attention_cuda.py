"""The host code of the CUDA kernels (csrc/cuda/*.cpp) on the emulated device."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from emulation.attention import (
    SM80,
    SM90A,
    Architecture,
    EmulatedBackend,
    build_module,
    load_backends,
    registered,
)
from torch import Tensor

import drope_kernels as dk
from drope_kernels.backends import reference
from drope_kernels.spec.spec import AttentionInputs, DecodeInputs, Rotation

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the emulator switches stacks in x86-64 assembly"
)

TINY = Architecture("emulated-tiny", (8, 0), 40 * 1024)  # less shared memory than any kernel needs
ONE_SM = Architecture("emulated-one-sm", (8, 0), 166912, num_sms=1)


@pytest.fixture(scope="module")
def module() -> Path:
    return build_module()


@pytest.fixture(scope="module")
def sm80(module: Path) -> EmulatedBackend:
    return load_backends(module, SM80)[0]


@pytest.fixture(scope="module")
def sm90(module: Path) -> EmulatedBackend:
    return load_backends(module, SM90A)[0]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16()


def dense(
    batch: int = 2, heads_q: int = 4, heads_kv: int = 2, rows: int = 40, keys: int = 70
) -> AttentionInputs:
    """D = 64, no rotation."""
    return AttentionInputs(
        q=normal(batch, heads_q, rows, 64),
        k=normal(batch, heads_kv, keys, 64, seed=1),
        v=normal(batch, heads_kv, keys, 64, seed=2),
        scale=0.125,
        causal=True,
        window=None,
        softcap=None,
        q_start=keys - rows,
        kv_start=None,
        kv_end=None,
        rotation=None,
    )


def rotation() -> Rotation:
    turns = dk.Rope().turns(64, torch.device("cpu"))
    return Rotation(turns, False, 1.0, None, None)


def check_forward(backend: EmulatedBackend, inputs: AttentionInputs) -> None:
    out, *_ = backend.forward(inputs, save_prepared=False)
    expected, *_ = reference.forward(inputs, save_prepared=False)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)


# ---- workspace -----------------------------------------------------------------------------------


class Recorder:
    """The bindings, with the sizes of the workspaces that they ask for."""

    def __init__(self, bindings: Any) -> None:
        self.bindings = bindings
        self.sizes: list[int] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.bindings, name)
        if not name.startswith("cuda_attention"):
            return function

        def call(*, allocate: Callable[[int], int], **arguments: Any) -> None:
            def noted(num_bytes: int) -> int:
                self.sizes.append(num_bytes)
                return allocate(num_bytes)

            function(**arguments, allocate=noted)

        return call


def asked_for(backend: EmulatedBackend, call: Callable[[], object]) -> list[int]:
    recorder = Recorder(backend.bindings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "bindings", recorder)
        call()
    return recorder.sizes


def test_forward_needs_memory_for_rotated_keys_nobody_keeps(sm80: EmulatedBackend) -> None:
    plain = dense()
    rotating = replace(plain, rotation=rotation())
    keys = 2 * 2 * 70 * 64 * 2  # bytes of k, 35 units of 1024
    for inputs, save, expected in (
        (plain, False, []),
        (plain, True, []),
        (rotating, True, []),
        (rotating, False, [keys]),
    ):
        assert (
            asked_for(sm80, lambda i=inputs, s=save: sm80.forward(i, save_prepared=s)) == expected
        )


@pytest.mark.parametrize("deterministic", [True, False])
def test_backward_needs_terms_of_queries_and_unless_deterministic_sums_of_dq(
    sm80: EmulatedBackend, deterministic: bool
) -> None:
    inputs = dense(rows=128, keys=128)
    out, _, state, _, _ = sm80.forward(inputs, save_prepared=True)
    torch.use_deterministic_algorithms(deterministic)
    sizes = asked_for(
        sm80, lambda: sm80.backward(inputs, out, state, out, None, need_grad_scale=False)
    )
    rows = 2 * 4 * 128
    terms, sums = rows * 16, rows * 64 * 4  # four float32 of each query; dq
    assert sizes == [terms if deterministic else terms + sums]


def test_decode_needs_memory_for_the_parts_of_split_rows(module: Path) -> None:
    few, many = load_backends(module, ONE_SM, replace(SM80, name="emulated-64", num_sms=64))
    inputs = decode_inputs(capacity=256)
    assert asked_for(few, lambda: few.decode(inputs)) == []
    splits = 4  # of 4 blocks of 64 keys; 64 SMs have room for all
    part = 2 * 4 * 1
    assert asked_for(many, lambda: many.decode(inputs)) == [splits * part * 64 * 4 + 256]


# ---- where TMA cannot go -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["heads", "batch", "single", "transposed"])
def test_tensor_maps_of_any_strides(sm90: EmulatedBackend, layout: str) -> None:
    """Expanded and single dimensions have strides that no tensor map takes as they are."""
    inputs = dense()
    k, v = inputs.k, inputs.v
    if layout == "heads":
        k, v = (x[:, :1].expand_as(x) for x in (k, v))
    elif layout == "batch":
        k, v = (x[:1].expand_as(x) for x in (k, v))
    elif layout == "single":
        inputs = dense(batch=1, heads_q=2, heads_kv=1, rows=1, keys=1)
        k, v = (x.as_strided(x.shape, (3, 5, 7, 1)) for x in (inputs.k, inputs.v))
    else:
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    check_forward(sm90, replace(inputs, k=k, v=v))
    assert sm90.counts["tensor_load"] > 0
    assert sm90.counts["wgmma"] > 0


@pytest.mark.parametrize("what", ["repeated_row", "no_keys", "wide"])
def test_what_tma_cannot_describe_runs_on_the_sm80_kernel(sm90: EmulatedBackend, what: str) -> None:
    inputs = dense()
    if what == "repeated_row":
        inputs = replace(inputs, k=inputs.k[:, :, :1].expand_as(inputs.k))
    elif what == "no_keys":
        inputs = replace(dense(keys=0), q_start=0)
    else:
        wide = [normal(2, heads, 20, 136, seed=heads) for heads in (4, 2)]
        inputs = replace(inputs, q=wide[0], k=wide[1], v=wide[1], q_start=0)
    check_forward(sm90, inputs)
    assert sm90.counts["wgmma"] == sm90.counts["tensor_load"] == 0


@pytest.mark.plain_memory  # of which next to nothing is ever touched
@pytest.mark.parametrize("name", ["sm80", "sm90"])
def test_elements_beyond_two_to_the_31(name: str, request: pytest.FixtureRequest) -> None:
    """Rows of k and v are 2^27 elements apart, heads and batch rows of q 2^31."""
    backend: EmulatedBackend = request.getfixturevalue(name)
    inputs = dense(batch=2, heads_q=2, heads_kv=1, rows=3, keys=20)

    def spread(x: Tensor, *strides: int) -> Tensor:
        far = torch.empty_strided(x.shape, (*strides, 1), dtype=x.dtype)
        return far.copy_(x)

    far = replace(
        inputs,
        q=spread(inputs.q, 2**32, 2**31, 64),
        k=spread(inputs.k, 64, 64, 2**27),
        v=spread(inputs.v, 64, 64, 2**27),
    )
    ours, expected = (backend.forward(x, save_prepared=False) for x in (far, inputs))
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])


# ---- errors --------------------------------------------------------------------------------------


def test_a_failed_launch_names_error_kernel_and_shape_and_the_next_call_works(
    module: Path, sm80: EmulatedBackend
) -> None:
    (tiny,) = load_backends(module, TINY)
    with registered(tiny, sm80), pytest.raises(RuntimeError) as caught:
        dk.attention(*(normal(2, 4, 40, 128) for _ in range(3)), backend=tiny.NAME)
    for piece in ("attention_forward_sm80_d128", "cudaErrorInvalidValue", "B=2 Hq=4 Hkv=4 Sq=40"):
        assert piece in str(caught.value)
    check_forward(sm80, dense())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": 0}, "float16 and bfloat16"),
    "softcap": ({"softcap": 1.0}, "softcap"),
    "head_dim": ({"shape": (1, 1, 1, 1, 1, 12, 64)}, "multiples of 8"),
    "wide": ({"shape": (1, 1, 1, 1, 1, 264, 64)}, "head_dim is 264, expected 1 to 256"),
    "groups": ({"shape": (1, 3, 2, 1, 1, 64, 64)}, "no multiple"),
    "no_heads": ({"shape": (1, 0, 0, 1, 1, 64, 64)}, "num_heads_kv is 0"),
    "long": ({"shape": (1, 1, 1, 1, 2**31, 64, 64)}, "seqlen_kv is 2147483648, expected 0 to"),
    "many": ({"shape": (2**20, 1, 1, 2**20, 1, 64, 64)}, "the size of a grid"),
    "negative": ({"shape": (-1, 1, 1, 1, 1, 64, 64)}, "batch is -1"),
    "rotary": ({"rotary_dim": 66}, "rotary_dim"),
    "half_packed": ({"cu_seqlens_q": 4096}, "both cu_seqlens"),
    "address": ({"v": (4104, 4480, 4480, 64)}, "v needs a 16-byte aligned address"),
    "stride": ({"q": (4096, 10240, 2560, 68)}, "q needs a 16-byte aligned address and strides"),
}


class Misled:
    """The bindings, called with some wrong arguments."""

    def __init__(self, bindings: Any, wrong: dict[str, Any]) -> None:
        self.bindings, self.wrong = bindings, wrong

    def cuda_device(self, index: int) -> Any:
        return self.bindings.cuda_device(index)

    def cuda_attention_forward(self, **arguments: Any) -> None:
        self.bindings.cuda_attention_forward(**(arguments | self.wrong))


@pytest.mark.parametrize("name", BAD)
def test_the_bindings_refuse_what_no_kernel_serves(
    sm80: EmulatedBackend, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    wrong, piece = BAD[name]
    monkeypatch.setattr(sm80, "bindings", Misled(sm80.bindings, wrong))
    with pytest.raises(ValueError, match="CUDA kernels: ") as caught:
        sm80.forward(dense(), save_prepared=False)
    assert piece in str(caught.value)


def test_a_refused_tensor_map_names_tensor_dimensions_strides_and_box(
    sm90: EmulatedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = {"k": (2**44, 8960, 4480, 64)}
    monkeypatch.setattr(sm90, "bindings", Misled(sm90.bindings, nowhere))
    with pytest.raises(RuntimeError, match="tensor map of k: ") as caught:
        sm90.forward(dense(), save_prepared=False)
    for piece in ("= (2, 2, 70, 64), strides (8960, 4480, 64, 1), box 128 x 64", "CUresult 1"):
        assert piece in str(caught.value)


# ---- decode --------------------------------------------------------------------------------------


def decode_inputs(capacity: int = 64, lengths: tuple[int, ...] = (5, 9)) -> DecodeInputs:
    batch = len(lengths)
    return DecodeInputs(
        q=normal(batch, 4, 1, 64),
        k_cache=normal(batch, 2, capacity, 64, seed=1),
        v_cache=normal(batch, 2, capacity, 64, seed=2),
        k=normal(batch, 2, 1, 64, seed=3),
        v=normal(batch, 2, 1, 64, seed=4),
        cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
        page_table=None,
        scale=0.125,
        window=None,
        softcap=None,
        kv_start=None,
        rotation=None,
        rotated_cache=False,
    )


def test_decode_is_one_launch_for_append_and_attention(sm80: EmulatedBackend) -> None:
    inputs = decode_inputs()
    q, caches = inputs.q, [inputs.k_cache.clone(), inputs.v_cache.clone()]
    lengths = {"cache_seqlens": inputs.cache_seqlens, "return_lse": True}
    new = {"k": inputs.k, "v": inputs.v}
    expected = dk.attention_decode(q, *caches, **new, **lengths, rope=True, backend="reference")
    with registered(sm80):
        ours = dk.attention_decode(
            q, inputs.k_cache, inputs.v_cache, **new, **lengths, rope=True, backend=sm80.NAME
        )
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
    assert torch.equal(inputs.k_cache, caches[0])
    assert torch.equal(inputs.v_cache, caches[1])


def test_rows_that_do_not_fit_are_nan_and_not_written(sm80: EmulatedBackend) -> None:
    """On a device nobody reads cache_seqlens before the launch; the op would refuse them here."""
    inputs = decode_inputs(lengths=(5, 64, -1, 63))
    before = inputs.k_cache.clone()
    out, lse = sm80.decode(inputs)
    lost = torch.tensor([False, True, True, False])
    assert out[lost].isnan().all()
    assert lse[lost].isnan().all()
    assert out[~lost].isfinite().all()
    assert torch.equal(inputs.k_cache[lost], before[lost])
    assert torch.equal(inputs.k_cache[3, :, 63], inputs.k[3, :, 0])
