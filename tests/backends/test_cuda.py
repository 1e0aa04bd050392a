"""The CUDA backend without a GPU: what it refuses, which kernels it picks, what it sends.

`Device` stands for the compiled bindings; cuda/test_attention_cuda.py runs them, emulated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from specs import SERVED

import drope_kernels as dk
from drope_kernels.backends.cuda import CudaBackend, family_of, runs_on
from drope_kernels.build import cuda_unavailable_reason
from drope_kernels.call import dispatch
from drope_kernels.spec.layout import is_aligned
from drope_kernels.spec.spec import AttentionInputs, DecodeInputs, Rotation


class Device:
    """Bindings that keep what they are called with. `error`: what asking for devices raises."""

    def __init__(self, *capabilities: tuple[int, int], error: str | None = None) -> None:
        self.capabilities = capabilities
        self.error = error
        self.workspace_bytes = 0
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def cuda_device_count(self) -> int:
        if self.error is not None:
            raise RuntimeError(self.error)
        return len(self.capabilities)

    def cuda_device(self, index: int) -> dict[str, Any]:
        return {"capability": self.capabilities[index]}

    def cuda_attention_forward(self, **arguments: Any) -> None:
        self.keep("forward", arguments)

    def cuda_attention_backward(self, **arguments: Any) -> None:
        self.keep("backward", arguments)

    def cuda_attention_decode(self, **arguments: Any) -> None:
        self.keep("decode", arguments)

    def keep(self, name: str, arguments: dict[str, Any]) -> None:
        if self.workspace_bytes:
            arguments["workspace"] = arguments["allocate"](self.workspace_bytes)
        self.calls.append((name, arguments))


class Untouchable:
    """Bindings of a machine whose driver must not be woken."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"asked for {name}")


# ---- refusals ----------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "cpu": ({"device": "cpu"}, "it computes on CUDA devices and the tensors are on cpu."),
    "meta": ({"device": "meta"}, "it computes on CUDA devices and the tensors are on meta."),
    "float32": ({"dtype": torch.float32}, "it computes float16 and bfloat16, not float32."),
    "softcap": ({"softcap": True}, "its kernels have no softcap."),
    "odd_dim": ({"head_dim": 12}, "its head_dim is a multiple of 8, got 12 (q, k) and 128 (v)."),
    "odd_dim_v": ({"head_dim_v": 7}, "its head_dim is a multiple of 8, got 128 (q, k) and 7 (v)."),
    "wide": ({"head_dim": 264}, "its head_dim is at most 256, got 264 (q, k) and 128 (v)."),
    "alignment": ({"aligned": False}, "it reads 16 bytes at a time, and a tensor starts or steps"),
    "long": ({"seqlen_kv": 2**30 + 1}, "its sequences have at most 1073741824 rows."),
    "many": ({"batch": 2**14, "seqlen_q": 2**20}, "its grids have at most 2**31 - 1 tiles"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_is_a_sentence(name: str) -> None:
    changes, sentence = REFUSED[name]
    reason = CudaBackend(Device((8, 0))).supports(replace(SERVED, **changes))
    assert reason is not None
    assert reason.startswith(sentence)
    assert reason.endswith(".")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": torch.float16, "head_dim": 256},
        {"head_dim": 8, "head_dim_v": 72},
        {"varlen": True, "kv_range": False},
        {"decode": True, "needs_grad": False},
        {"seqlen_q": 0, "seqlen_kv": 0, "batch": 0},
    ],
    ids=str,
)
def test_served(changes: dict[str, Any]) -> None:
    assert CudaBackend(Device((8, 0))).supports(replace(SERVED, **changes)) is None


def test_other_tensors_are_refused_without_waking_the_driver() -> None:
    reason = CudaBackend(Untouchable()).supports(replace(SERVED, device="cpu"))
    assert reason == "it computes on CUDA devices and the tensors are on cpu."


MACHINES = {
    "no_kernels": (CudaBackend(Untouchable(), missing="built without."), "built without."),
    "no_driver": (CudaBackend(Device(error="cudaErrorInsufficientDriver")), "NVIDIA driver"),
    "no_gpu": (CudaBackend(Device(error="cudaErrorNoDevice")), "this machine has no NVIDIA GPU"),
    "broken": (CudaBackend(Device(error="cudaErrorSystemNotReady")), "cudaErrorSystemNotReady."),
    "turing": (
        CudaBackend(Device((7, 5))),
        "need compute capability 8.0 or later, the GPU has 7.5",
    ),
    "other_build": (
        CudaBackend(Device((8, 0)), architectures=["sm_90", "sm_90a"]),
        "TORCH_CUDA_ARCH_LIST=8.0",
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_machine_that_cannot_run_it_says_why(name: str) -> None:
    backend, piece = MACHINES[name]
    reason = backend.unavailable()
    assert reason is not None
    assert piece in reason
    assert backend.supports(SERVED) == reason


def test_one_gpu_of_several_may_be_too_old() -> None:
    backend = CudaBackend(Device((7, 5), (8, 6)))
    assert backend.unavailable() is None
    assert "7.5" in str(backend.supports(SERVED))
    assert backend.supports(replace(SERVED, device_index=1)) is None


# ---- selection ---------------------------------------------------------------------------------


def test_auto_prefers_cuda_on_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._registered, "cuda", CudaBackend(Device((8, 0))))
    assert dispatch.choose(SERVED, "auto") == "cuda"
    assert dispatch.choose(replace(SERVED, softcap=True), "auto") == "reference"
    assert dispatch.choose(replace(SERVED, device="cpu"), "auto") == "cpu"
    text = dispatch.explain_spec(SERVED, "auto").splitlines()[1:]
    assert text[0] == "cuda: runs this call"
    assert text[1].startswith("triton: no, ")
    assert text[2] == "cpu: no, it computes on the CPU and the tensors are on cuda."


def test_a_registered_backend_has_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    other = CudaBackend(Device((8, 0)), "cpu", name="other")
    monkeypatch.setattr(dispatch, "_registered", {})
    dispatch.register(other)
    spec = replace(SERVED, device="cpu")
    assert dispatch.choose(spec, "auto") == "cpu"
    assert dispatch.choose(spec, "other") == "other"
    assert "other: runs this call" in dispatch.explain_spec(spec, "other")
    with pytest.raises(ValueError, match=r'"other", which cannot: its kernels have no softcap; '):
        dispatch.choose(replace(spec, softcap=True), "other")


@pytest.mark.skipif(cuda_unavailable_reason() is None, reason="this build has CUDA kernels")
def test_a_build_without_cuda_says_so_when_asked_for_it() -> None:
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="cuda") as caught:
        dk.attention(q, q, q, backend="cuda")
    assert str(cuda_unavailable_reason()) in str(caught.value)
    assert "cuda" not in dk.available_backends()
    assert "cuda: no, it computes on CUDA devices" in dk.explain(q, q, q)


FULL_BUILD = ["sm_80", "sm_90", "compute_80", "sm_90a"]
FAMILIES = {
    ((8, 0), 64): 80,
    ((8, 9), 128): 80,
    ((9, 0), 64): 90,
    ((9, 0), 128): 90,
    ((9, 0), 136): 80,
    ((10, 0), 64): 80,  # wgmma is Hopper's alone
    ((12, 0), 64): 80,
}


@pytest.mark.parametrize("device", FAMILIES, ids=str)
def test_family_by_capability_and_head_dim(device: tuple[tuple[int, int], int]) -> None:
    assert family_of(*device, FULL_BUILD) == FAMILIES[device]
    assert family_of(*device, ["sm_80", "compute_80"]) == 80


def test_machine_code_runs_within_its_generation_and_ptx_everywhere() -> None:
    built = ["sm_80", "sm_90", "sm_90a"]
    assert [c for c in ((8, 0), (8, 6), (9, 0), (10, 0)) if runs_on(c, built)] == [
        *((8, 0), (8, 6), (9, 0)),
    ]
    assert not runs_on((8, 0), ["sm_86"])
    assert runs_on((12, 0), ["sm_80", "compute_80"])


# ---- alignment ---------------------------------------------------------------------------------


def test_alignment_is_of_the_base_and_of_every_step() -> None:
    x = torch.zeros(4, 6, 10, 16, dtype=torch.bfloat16)
    assert is_aligned(x)
    assert is_aligned(x.transpose(1, 2))
    assert is_aligned(x[:, :1].expand(-1, 6, -1, -1))
    assert is_aligned(x[..., 8:])
    assert not is_aligned(x[..., 4:12])  # 8 bytes in
    odd = torch.zeros(2, 3, 5, 12, dtype=torch.bfloat16)[..., :8]
    assert not is_aligned(odd)
    assert is_aligned(odd[:1, :1, :1])  # a step that nobody takes may be anything
    assert is_aligned(torch.zeros(2, 3, 5, 12)[..., :8])  # of float32, 12 are 48 bytes
    assert is_aligned(x[:0])


# ---- what is sent ------------------------------------------------------------------------------


def call_inputs(**changes: Any) -> AttentionInputs:
    inputs = AttentionInputs(
        q=torch.zeros(2, 4, 5, 16, dtype=torch.bfloat16),
        k=torch.zeros(2, 2, 7, 16, dtype=torch.bfloat16),
        v=torch.zeros(2, 2, 7, 8, dtype=torch.bfloat16),
        scale=0.25,
        causal=True,
        window=None,
        softcap=None,
        q_start=-3,
        kv_start=None,
        kv_end=None,
        rotation=None,
    )
    return replace(inputs, **changes)


def forward_arguments(
    inputs: AttentionInputs, *, device: Device | None = None, save_prepared: bool = False
) -> dict[str, Any]:
    device = device or Device((9, 0))
    CudaBackend(device, "cpu").forward(inputs, save_prepared=save_prepared)
    ((name, arguments),) = device.calls
    assert name == "forward"
    return arguments


def test_a_number_as_q_start_needs_no_tensor() -> None:
    sent = forward_arguments(call_inputs())
    assert (sent["q_start"], sent["q_offset"]) == (0, -3)
    starts = torch.tensor([1, 2], dtype=torch.int32)
    sent = forward_arguments(call_inputs(q_start=starts))
    assert (sent["q_start"], sent["q_offset"]) == (starts.data_ptr(), 0)


def test_prepared_keys_are_kept_only_for_backward() -> None:
    turns = torch.zeros(2, 1, 8)
    positions = torch.arange(10.0).view(2, 5)
    rotating = call_inputs(rotation=Rotation(turns, False, 1.0, positions, None))
    for inputs, save in ((rotating, False), (call_inputs(), True)):
        sent = forward_arguments(inputs, save_prepared=save)
        assert (sent["q_prepared"], sent["k_prepared"]) == (0, 0)
    sent = forward_arguments(rotating, save_prepared=True)
    assert sent["q_prepared"]
    assert sent["k_prepared"]
    assert sent["positions"] == positions.data_ptr()
    assert sent["kv_positions"] == 0


def test_packed_calls_go_whole() -> None:
    ends_q, ends_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 5], [0, 7, 7]))
    one = call_inputs()
    packed = replace(
        one, q=one.q[:1], k=one.k[:1], v=one.v[:1], cu_seqlens_q=ends_q, cu_seqlens_k=ends_k
    )
    sent = forward_arguments(packed)
    assert (sent["cu_seqlens_q"], sent["cu_seqlens_k"]) == (ends_q.data_ptr(), ends_k.data_ptr())
    assert sent["num_seqs"] == 2


def test_workspace_is_torchs_memory() -> None:
    device = Device((9, 0))
    device.workspace_bytes = 1000
    sent = forward_arguments(call_inputs(), device=device)
    assert sent["workspace"] % 16 == 0
    assert sent["stream"] == 0


@pytest.mark.parametrize("deterministic", [True, False])
def test_backward_sends_aligned_gradients_and_the_switch(deterministic: bool) -> None:
    device, inputs = Device((9, 0)), call_inputs()
    backend = CudaBackend(device, "cpu")
    out, state = torch.zeros(2, 4, 5, 8, dtype=torch.bfloat16), torch.zeros(2, 2, 4, 5)
    odd = torch.zeros(2, 4, 5, 12, dtype=torch.bfloat16)[..., :8]
    expanded = torch.zeros(8, dtype=torch.bfloat16).expand(2, 4, 5, 8)
    torch.use_deterministic_algorithms(deterministic)
    for grad_out in (odd, expanded):
        backend.backward(inputs, out, state, grad_out, None, need_grad_scale=False)
    (_, of_odd), (_, of_expanded) = device.calls
    assert of_odd["grad_out"][1:] == (160, 40, 8)
    assert of_expanded["grad_out"] == (expanded.data_ptr(), 0, 0, 0)
    assert of_odd["deterministic"] is deterministic
    assert (of_odd["family"], of_odd["grad_lse"], of_odd["grad_scale"]) == (80, 0, 0)


def test_decode_sends_aligned_copies_of_the_few_new_rows() -> None:
    device = Device((8, 0))
    odd = torch.zeros(2, 4, 3, 20, dtype=torch.bfloat16)[..., :16]
    pages = torch.zeros(6, 2, 4, 16, dtype=torch.bfloat16)
    table = torch.zeros(2, 5, dtype=torch.int32)
    inputs = DecodeInputs(
        q=odd,
        k_cache=pages,
        v_cache=pages[..., :8],
        k=odd[:, :2],
        v=odd[:, 2:, :, :8],
        cache_seqlens=torch.zeros(2, dtype=torch.int32),
        page_table=table[:, :3],
        scale=0.25,
        window=None,
        softcap=None,
        kv_start=None,
        rotation=None,
        rotated_cache=True,
    )
    out, lse = CudaBackend(device, "cpu").decode(inputs)
    ((name, sent),) = device.calls
    assert (name, out.shape, lse.shape) == ("decode", (2, 4, 3, 8), (2, 4, 3))
    assert sent["shape"] == (2, 4, 2, 3, 12, 16, 8)
    assert (sent["q"][1:], sent["k_new"][1:]) == ((192, 48, 16), (96, 48, 16))
    assert sent["v_new"][1:] == (48, 24, 8)
    assert sent["k"] == (pages.data_ptr(), 128, 64, 16)
    assert (sent["pages"], sent["stride_page_table_batch"]) == ((6, 4, 3), 3)
    assert (sent["rotated_cache"], sent["seqlen_new"]) == (True, 3)
