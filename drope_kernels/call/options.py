"""The keyword arguments of the public calls, by name and type: `**options: Unpack[...]`."""

from __future__ import annotations

from typing import Any, Generic, Literal, Protocol, TypedDict, TypeVar

from drope_kernels.rope import Rope


class Array(Protocol):
    """What a call takes beside torch tensors: an array with DLPack's two methods."""

    def __dlpack__(self, *, stream: Any = ...) -> Any:
        """A capsule of the array, ordered behind its producer's work for `stream`."""
        ...

    def __dlpack_device__(self) -> tuple[Any, int]:
        """DLPack's device type and the device's index."""
        ...


Window = int | tuple[int, int] | None  # W keys, its own included, or (left, right) beside it
A = TypeVar("A", bound=Array)  # all arrays of one call are one kind, its results too


class PackedOptions(TypedDict, Generic[A], total=False):
    """What `attention` and `attention_varlen` have in common."""

    rope: Rope | bool
    causal: bool
    scale: float | A | None
    window: Window
    softcap: float | None
    key_mask: A | None
    alibi: A | None
    positions: A | None
    kv_positions: A | None
    backend: str


class AttentionOptions(PackedOptions[A], Generic[A], total=False):
    """The keyword arguments of `attention`, apart from return_lse."""

    mask: A | None
    q_start: int | A | None
    kv_start: A | None
    kv_end: A | None


class DecodeOptions(TypedDict, Generic[A], total=False):
    """The keyword arguments of `attention_decode`, apart from return_lse and cache_seqlens."""

    k: A | None
    v: A | None
    page_table: A | None
    rope: Rope | bool
    cache: Literal["raw", "rotated"]
    scale: float | A | None
    window: Window
    softcap: float | None
    key_mask: A | None
    alibi: A | None
    kv_start: A | None
    backend: str
