"""Calls with another library's arrays: CuPy's on the device, NumPy's in a dry run.

The arrays are written on a stream of the library behind work that takes a while, and overwritten
as soon as the call returns: a call that does not order itself behind the one, or lets the other
overtake it, gives something else than the same call with tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

import drope_kernels as dk
from bench.gpu.accelerator import StandIn

DELAY_ELEMENTS, DELAY_PASSES = 1 << 28, 32  # 1 GiB: a third of a millisecond a pass
SHAPE_Q, SHAPE_KV = (2, 4, 70, 64), (2, 2, 70, 64)
Arrays = dict[str, Any]


@contextmanager
def other_stream(library: Any) -> Iterator[None]:
    """A stream that waits for no other; NumPy has none."""
    if not hasattr(library, "cuda"):
        yield
        return
    with library.cuda.Stream(non_blocking=True) as stream:
        yield
        stream.synchronize()


def written_late(library: Any, tensors: Arrays, where: StandIn) -> Arrays:
    """Copies of the tensors that hold NaN (integers: 0) until the stream comes to them."""
    values = {name: library.from_dlpack(x) for name, x in tensors.items()}
    arrays = {name: library.zeros_like(x) for name, x in values.items()}
    for x in arrays.values():
        if x.dtype.kind == "f":
            x.fill(library.nan)
    where.synchronize()
    delay = library.zeros(DELAY_ELEMENTS if where.device == "cuda" else 1, library.float32)
    for _ in range(DELAY_PASSES):
        delay += 1
    for name, x in arrays.items():
        x[...] = values[name]
    return arrays


def compare(given: Arrays, expected: dict[str, Tensor], library: Any) -> None:
    """Bit for bit."""
    for name, x in given.items():
        wanted = expected[name]
        found = from_dlpack(library.ascontiguousarray(x)).to(wanted.device)
        differing = int((found != wanted).sum())
        assert differing == 0, f"{name}: {differing} elements differ from the call with tensors"


def attends(library: Any, backend: str, where: StandIn) -> None:
    names = {"q": SHAPE_Q, "k": SHAPE_KV, "v": SHAPE_KV}
    tensors: Arrays = {name: normal(shape, where) for name, shape in names.items()}
    with torch.no_grad():
        out, lse = dk.attention(**tensors, rope=True, return_lse=True, backend=backend)
    with other_stream(library):
        arrays = written_late(library, tensors, where)
        results = dk.attention(**arrays, rope=True, return_lse=True, backend=backend)
        for x in arrays.values():
            x.fill(library.nan)
        kinds = {type(x) for x in (*results, *arrays.values())}
        assert kinds == {library.ndarray}, f"got {kinds}"
        copies = [x.copy() for x in results]
    pairs = zip(("out", "lse"), copies, strict=True)
    compare(dict(pairs), {"out": out, "lse": lse}, library)


def decodes(library: Any, backend: str, where: StandIn) -> None:
    """The caches of the caller are written in place."""
    tokens = {"q": (2, 4, 1, 64), "k": (2, 2, 1, 64), "v": (2, 2, 1, 64)}
    caches = {"k_cache": SHAPE_KV, "v_cache": SHAPE_KV}
    tensors: Arrays = {name: normal(shape, where) for name, shape in (tokens | caches).items()}
    lengths = torch.tensor([3, 69], dtype=torch.int32, device=where.device)
    tensors["cache_seqlens"] = lengths
    own: Arrays = {name: x.clone() for name, x in tensors.items()}
    with torch.no_grad():
        out = dk.attention_decode(**own, rope=True, backend=backend)
    with other_stream(library):
        arrays = written_late(library, tensors, where)
        result = dk.attention_decode(**arrays, rope=True, backend=backend)
        found = {name: arrays[name].copy() for name in caches} | {"out": result.copy()}
    compare(found, {"out": out} | {name: own[name] for name in caches}, library)


def normal(shape: tuple[int, ...], where: StandIn) -> Tensor:
    generator = torch.Generator(where.device).manual_seed(sum(shape))
    return torch.randn(shape, device=where.device, dtype=torch.float16, generator=generator)


def on_foreign(check: Callable[[Any, str, StandIn], None]) -> Callable[[str, StandIn], Arrays]:
    def run(backend: str, where: StandIn) -> dict[str, Any]:
        name = "cupy" if where.device == "cuda" else "numpy"
        if find_spec(name) is None:
            return {"not_run": f"{name} is not on this machine"}
        check(import_module(name), backend, where)
        return {}

    return run


CHECKS = {"foreign_attention": on_foreign(attends), "foreign_decode": on_foreign(decodes)}
