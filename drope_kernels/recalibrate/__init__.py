"""Training of decoders: pretraining, recalibration after the drop, controls."""

try:
    import accelerate
    import transformers
except ImportError as error:
    raise ImportError(
        f"drope_kernels.recalibrate trains with transformers.Trainer, and {error.name} is missing: "
        "pip install 'drope_kernels[train]'"
    ) from error

from drope_kernels.recalibrate.callbacks import LengthSweep
from drope_kernels.recalibrate.config import RecalibrationConfig
from drope_kernels.recalibrate.data import TokenRows, packed_rows
from drope_kernels.recalibrate.trainer import RecalibrationResult, recalibrate

__all__ = [
    "LengthSweep",
    "RecalibrationConfig",
    "RecalibrationResult",
    "TokenRows",
    "packed_rows",
    "recalibrate",
]

del accelerate, transformers  # only asked whether they are there
