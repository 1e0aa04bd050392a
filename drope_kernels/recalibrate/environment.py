"""What launchers write into the environment: the processes, and much that accelerate reads.

A run's settings say how it computes, and its checkpoints hold it to that. A precision, a compiler
or an engine that came from the environment would be in no record, and another one on resume.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

# Of another way to spread a model: whoever asks for it has a model that needs it.
ENGINES = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)
# `accelerate launch` sets them all, to its own defaults where nothing was said.
_RULED = (
    "ACCELERATE_DOWNCAST_BF16",
    "ACCELERATE_DYNAMO_",
    "ACCELERATE_FP8_",
    "ACCELERATE_GRADIENT_",
    "ACCELERATE_MIXED_PRECISION",
)


def num_devices() -> int:
    """Processes of this run, one per device, as torchrun and accelerate tell them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def check_engines() -> None:
    """Raises ValueError for an engine that only the environment asks for."""
    for name in ENGINES:
        if os.environ.get(name, "false").lower() in ("true", "1", "yes", "on"):
            raise ValueError(
                f"{name}: expected it not to be set, got {os.environ[name]!r}; launch with "
                "torchrun or accelerate launch --multi_gpu, and set sharded to spread the model"
            )


@contextlib.contextmanager
def settings_rule() -> Iterator[None]:
    """Inside, precision, compiler and accumulation are those of the settings."""
    hidden = {name: value for name, value in os.environ.items() if name.startswith(_RULED)}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)
