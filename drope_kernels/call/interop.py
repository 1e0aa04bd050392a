"""Arrays of other libraries in, the same kind out: DLPack on both ways, nothing is copied.

`attention`, `attention_varlen`, `attention_decode`, `merge_attention` and `explain` take NumPy,
CuPy and JAX arrays, and any other with `__dlpack__` and `__dlpack_device__` whose library has a
`from_dlpack`. There is nothing to import from here but `Array`, the protocol, for annotations.

- Kind. All arrays of one call come from one library and lie on one device; that library's own
  `from_dlpack` builds the results. A Python list is no array. torch tensors never come here.
- Copies. None, in either direction. Read-only arrays will do, except for caches that
  `attention_decode` appends to: these are written where they are, and JAX arrays never are. NumPy
  before 2.1 cannot lend read-only arrays.
- Streams. torch tells the producer its own current stream, on which the kernels run, and the
  producer orders its work before them; on the way back the library tells torch its current stream,
  which torch orders behind them. When a call has returned, its arguments may be overwritten or
  freed on that stream and its results read, without a synchronisation.
- Gradients. None, and autocast does not apply: a call computes in the dtype of its arrays.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import DLDeviceType, from_dlpack

from drope_kernels.call.ops import without_autocast
from drope_kernels.call.options import Array

__all__ = ["Array"]

_ARRAYS = frozenset(
    {"q", "k", "v", "k_cache", "v_cache", "scale", "positions", "kv_positions", "q_start"}
    | {"kv_start", "kv_end", "cu_seqlens_q", "cu_seqlens_k", "cache_seqlens", "page_table"}
    | {"key_mask", "mask", "alibi"}
)
_LISTS_OF_ARRAYS = ("outs", "lses")
_CACHES = ("k_cache", "v_cache")
# By its standard `__dlpack__` refuses with a BufferError; producers and torch raise these as well.
_REFUSALS = (AssertionError, BufferError, RuntimeError, TypeError, ValueError)


def through_dlpack(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Calls `function`, which works on tensors, with arrays of another library.

    Args:
        function: one of the public calls.
        arguments: all of its arguments, as its `locals()` has them on the first line. The first
            says which library it is; keywords that it does not know are under `refused`.

    Returns:
        What `function` returns, its tensors as arrays of that library.

    Raises:
        TypeError: something that is no array, an array of another library, one that torch cannot
            share, or a cache that cannot be written. Nothing has run then. An error of `function`
            has a note on what its words mean for these arrays.
    """
    if torch.compiler.is_dynamo_compiling():  # it takes NumPy arrays for tensors of its own
        return torch.compiler.disable(_call_with_tensors)(function, arguments)
    return _call_with_tensors(function, arguments)


def _call_with_tensors(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """`through_dlpack` outside of any graph."""
    call = {name: x for name, x in arguments.items() if name != "refused"}
    call |= arguments.get("refused", {})
    leader = next(iter(call))
    library = _Library(*_first_array(leader, call[leader]))
    written = _CACHES if call.get("k") is not None else ()
    tensors = {name: library.lend(name, x, written=name in written) for name, x in call.items()}
    _, tensor = _first_array(leader, tensors[leader])
    try:
        with without_autocast(tensor.device.type):
            result = function(**tensors)
    except (TypeError, ValueError) as error:
        error.add_note(
            f"Here a tensor is a {library.kind} that torch reads: .to(dtype) is .astype(dtype), "
            ".contiguous() is .copy(), torch.tensor is asarray."
        )
        raise
    return library.receive(result)


class _Library:
    """Where the arrays of a call come from: tells them from others, lends them, builds results."""

    def __init__(self, name: str, array: Any) -> None:
        """`array`, the argument `name`, says which library it is."""
        if not _is_array(array):
            raise TypeError(
                f"{name}: expected a torch.Tensor or another array with __dlpack__, got "
                f"{_kind_of(array)}; convert it with torch.as_tensor or numpy.asarray"
            )
        module = _module_of(array)
        if module is None:
            raise TypeError(
                f"{name}: expected an array whose library has from_dlpack to build the result, "
                f"got {_kind_of(array)}; pass torch.from_dlpack({name}), and a tensor comes back"
            )
        self.leader = name
        self.type = type(array)
        self.kind = _kind_of(array)
        self.module = module

    def lend(self, name: str, x: Any, *, written: bool) -> Any:
        """The array `x` as a tensor on the same memory; what is no array as it is."""
        if isinstance(x, np.generic):
            return x.item()
        if name in _LISTS_OF_ARRAYS and isinstance(x, list | tuple):
            return [self._share(f"{name}[{n}]", item) for n, item in enumerate(x)]
        if name not in _ARRAYS or x is None or isinstance(x, (int, float, str)):
            return x
        tensor = self._share(name, x)
        if written and tensor.dim():
            _check_writable(name, x)
        return tensor

    def receive(self, result: Any) -> Any:
        """Tensors as arrays, also in a tuple; anything else as it is."""
        if isinstance(result, tuple):
            return tuple(self.receive(x) for x in result)
        return self.module.from_dlpack(_Result(result)) if isinstance(result, Tensor) else result

    def _share(self, name: str, x: Any) -> Tensor:
        """A tensor on the memory of `x`."""
        module = self.module
        if not _is_array(x) or (type(x) is not self.type and _module_of(x) is not module):
            raise TypeError(
                f"{name}: expected a {self.kind} like {self.leader}, got {_kind_of(x)}; all arrays "
                f"of a call are of one kind, {module.__name__}.asarray or from_dlpack converts"
            )
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(
                f"{name}: expected an array without a mask, got {_kind_of(x)}; pass {name}.data, "
                "and say what is hidden with kv_start, kv_end or attention_varlen"
            )
        strides = _strides(x)
        if any(stride < 0 for stride in strides):
            # Not left to torch, which ends the process.
            raise TypeError(
                f"{name}: expected strides of 0 or more, got {strides} bytes; torch has no "
                f"negative ones, pass {name}.copy()"
            )
        try:
            return from_dlpack(x, copy=False)
        except _REFUSALS as reason:
            raise TypeError(
                f"{name}: expected an array whose memory torch can share, got {_kind_of(x)} of "
                f"{getattr(x, 'dtype', 'unknown dtype')}, refused: {str(reason).rstrip('.')}; pass "
                "a copy in a native dtype (float32, float16, int32) on a device that torch has"
            ) from reason


class _Result:
    """A tensor for another library's `from_dlpack`: its memory outlives what that library reads."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack_device__(self) -> tuple[Any, int]:
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        """`stream` as DLPack has it: None, 0 and 1 are the default stream, -1 asks for no order."""
        tensor = self.tensor
        if not tensor.is_cuda:
            return tensor.__dlpack__(stream=stream, **options)
        with torch.cuda.device(tensor.device):
            capsule = tensor.__dlpack__(stream=stream, **options)
            if stream != -1:
                default = stream in (None, 0, 1)
                reader = (
                    torch.cuda.default_stream() if default else torch.cuda.ExternalStream(stream)
                )
                tensor.record_stream(reader)  # or torch hands the memory on while it is still read
        return capsule


def _first_array(name: str, x: Any) -> tuple[str, Any]:
    """`x` or, of a list of arrays, its first, with the name it has in messages."""
    if name in _LISTS_OF_ARRAYS and isinstance(x, list | tuple):
        return f"{name}[0]", x[0]
    return name, x


def _is_array(x: Any) -> bool:
    return hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__")


def _module_of(array: Any) -> Any:
    """The module whose `from_dlpack` builds arrays like this one; None where there is none."""
    if hasattr(array, "__array_namespace__"):
        modules = [array.__array_namespace__()]
    else:
        roots = (base.__module__.partition(".")[0] for base in type(array).__mro__)
        modules = [sys.modules.get(root) for root in roots]
    return next((module for module in modules if hasattr(module, "from_dlpack")), None)


def _strides(array: Any) -> tuple[int, ...]:
    """In bytes; () where they cannot be asked for."""
    strides = getattr(array, "strides", None)
    if isinstance(strides, list | tuple):
        return tuple(strides)
    if array.__dlpack_device__()[0] != DLDeviceType.kDLCPU:
        return ()
    try:
        return np.from_dlpack(array).strides
    except (BufferError, RuntimeError):  # no dtype of NumPy, as JAX's bfloat16
        return ()


def _kind_of(x: Any) -> str:
    """The type of `x` as messages name it: numpy.ndarray, torch.Tensor, list."""
    root = type(x).__module__.partition(".")[0]
    name = type(x).__qualname__
    return name if root == "builtins" else f"{root}.{name}"


def _check_writable(name: str, x: Any) -> None:
    """TypeError for arrays that refuse assignment: read-only ones, and kinds that never change."""
    try:
        x[:0] = x[:0]  # writes nothing, and is refused where writing is
    except (AttributeError, RuntimeError, TypeError, ValueError) as reason:
        raise TypeError(
            f"{name}: expected an array that may be written, got {_kind_of(x)}, refused: "
            f"{str(reason).rstrip('.')}; attention_decode appends k and v in place: keep the "
            "caches in writable NumPy, CuPy or torch memory"
        ) from reason
