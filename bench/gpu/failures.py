"""What a call, ours or a peer's, may raise and the process that asked for it survives."""

from __future__ import annotations

from importlib.util import find_spec


def compiler_errors() -> tuple[type[Exception], ...]:
    """Triton's own have no common ancestor with Python's but Exception."""
    if find_spec("triton") is None:
        return ()
    from triton.errors import TritonError

    return (TritonError,)


# A CUDA error that sticks is among them and ends a worker all the same: see worker.answer.
CALL_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    AssertionError,
    ValueError,
    TypeError,
    ImportError,
    NotImplementedError,
    OSError,
    *compiler_errors(),
)
