"""Which backend serves a call: an ordered list, one sentence for every refusal."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from typing import Any, Protocol, cast

import torch

from drope_kernels.build import cuda_unavailable_reason
from drope_kernels.spec.packed import Backward, Decode, Forward
from drope_kernels.spec.spec import AttentionInputs, AttentionSpec

# Best first. A module of this name in drope_kernels.backends follows the `Backend` protocol.
_ORDER = ("cuda", "triton", "cpu", "reference")
# Those that this build has: fixed, so that compiled graphs may look.
_BUILT = tuple(x for x in _ORDER if x != "cuda" or cuda_unavailable_reason() is None)
_registered: dict[str, Backend] = {}


class Backend(Protocol):
    """What a backend module offers; refusals are sentences, None means it can.

    `forward` and `backward` get a validated `AttentionInputs`: shapes agree, one dtype and device,
    unit last strides. Any size may be 0. `backward` gets the prepared q and k when there is a
    rotation. Results are laid out by `empty_in_order_of` after q, k and v of the same call.
    """

    NAME: str
    forward: Forward
    backward: Backward
    decode: Decode

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine at all."""
        ...

    def supports(self, spec: AttentionSpec) -> str | None:
        """Why it cannot serve this call."""
        ...

    def served_by(self, spec: AttentionSpec) -> str | None:
        """Which of its kernels serve a call that it supports; None where there is one kind."""
        ...

    def repeated(self, inputs: AttentionInputs) -> Any:
        """`call.repeat.Repeated` of a call without index tensors; None: it is checked each time."""
        ...


class BackendWarning(UserWarning):
    """`backend="auto"` had only the reference left."""


@cache
def _import(name: str) -> Backend:
    return cast(Backend, import_module(f"drope_kernels.backends.{name}"))


def _load(name: str) -> Backend:
    return _registered.get(name) or _import(name)


def register(backend: Backend) -> None:
    """Makes `backend` known by its NAME. "auto" never takes it: calls have to ask for it."""
    _registered[backend.NAME] = backend


def _known() -> list[str]:
    """Names that a call may ask for, those of this build and registered ones."""
    return [*_BUILT, *_registered]


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine, best first.

    Which of them serves a particular call is what `explain` tells.
    """
    return [name for name in _ORDER if _load(name).unavailable() is None]


def refusal(name: str, spec: AttentionSpec) -> str | None:
    """Why the named backend cannot serve the call; None when it can."""
    backend = _load(name)
    return backend.supports(spec) or backend.unavailable()


def check_name(name: str) -> None:
    """ValueError unless `name` is "auto" or a known backend."""
    if name == "auto":
        return
    known = _known()
    if name not in known:
        no_cuda = cuda_unavailable_reason() if name == "cuda" else None
        raise ValueError(
            f'backend: expected "auto" or one of {", ".join(known)}, got {name!r}; '
            f"{no_cuda or 'available_backends() lists those that can run here'}"
        )


def choose(spec: AttentionSpec, name: str) -> str:
    """The name of the backend that serves the call; a pure function of its arguments.

    Raises:
        ValueError: an unknown name, or a named backend that cannot serve the call.
    """
    check_name(name)
    if name == "auto":
        return next(candidate for candidate in _ORDER if refusal(candidate, spec) is None)
    reason = refusal(name, spec)
    if reason is not None:
        raise ValueError(
            f'backend: expected one that can serve this call, got "{name}", which cannot: '
            f'{reason.rstrip(".")}; pass backend="auto" or change what is named'
        )
    return name


def select(spec: AttentionSpec, name: str) -> Backend:
    """The backend module of `choose`; warns once when "auto" is left with the reference."""
    chosen = choose(spec, name)
    if name == "auto" and chosen == "reference" and spec.dtype != torch.float64:
        _warn_reference(spec.device)
    return _load(chosen)


@cache
def _warn_reference(device: str) -> None:
    warnings.warn(
        f"drope_kernels: only the reference backend can serve a call on {device}; it is slow and "
        "needs O(Sq * Skv) memory. drope_kernels.explain(...) says why the others cannot.",
        BackendWarning,
        stacklevel=2,
    )


def explain_spec(spec: AttentionSpec, name: str) -> str:
    """One line per backend, best first: the one that would run, and why the others would not."""
    check_name(name)
    lines = []
    chosen = None
    for candidate in dict.fromkeys([*_ORDER, *(x for x in _registered if x == name)]):
        reason = refusal(candidate, spec)
        if name not in ("auto", candidate):
            reason = f'not asked for: backend="{name}".'
        if reason is not None:
            lines.append(f"{candidate}: no, {reason}")
        elif chosen is None:
            chosen = candidate
            kernels = _load(candidate).served_by(spec)
            lines.append(f"{candidate}: runs this call{f' with {kernels}' if kernels else ''}")
        else:
            lines.append(f"{candidate}: could, but {chosen} comes first")
    return "\n".join([_describe(spec), *lines])


def _describe(spec: AttentionSpec) -> str:
    dtype = str(spec.dtype).removeprefix("torch.")
    shape = (
        f"B={spec.batch} Hq={spec.num_heads_q} Hkv={spec.num_heads_kv} Sq={spec.seqlen_q} "
        f"Skv={spec.seqlen_kv} D={spec.head_dim} Dv={spec.head_dim_v}"
    )
    traits = [
        "causal" if spec.causal else "full",
        f"rope over {spec.rotary_dim} channels" if spec.rotary_dim else "position-free",
    ]
    traits += [
        label
        for label, on in (
            ("window", spec.window),
            ("softcap", spec.softcap),
            ("key range", spec.kv_range),
            ("scale per row", spec.row_scale),
            ("packed", spec.varlen),
            ("decode", spec.decode),
            ("gradients", spec.needs_grad),
            ("deterministic", spec.deterministic),
        )
        if on
    ]
    return f"attention on {spec.device}, {dtype}, {shape}: {', '.join(traits)}"
