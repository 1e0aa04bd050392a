"""Hugging Face transformers models on these kernels, and without their positions."""

try:
    import transformers
except ModuleNotFoundError as error:
    raise ImportError(
        f"drope_kernels.hf works on transformers models, and {error.name} is missing: "
        "pip install 'drope_kernels[hf]'"
    ) from error

from drope_kernels.hf.apply import position_free_parameters
from drope_kernels.hf.export import export
from drope_kernels.hf.loading import load_model, load_tokenizer
from drope_kernels.hf.model import use_kernels
from drope_kernels.hf.positions import drop_positions, restore_positions
from drope_kernels.hf.state import DropState
from drope_kernels.hf.support import EXPORT_SUPPORT
from drope_kernels.hf.temperature import set_temperature
from drope_kernels.hf.verify import verify_export

__all__ = [
    "EXPORT_SUPPORT",
    "DropState",
    "drop_positions",
    "export",
    "load_model",
    "load_tokenizer",
    "position_free_parameters",
    "restore_positions",
    "set_temperature",
    "use_kernels",
    "verify_export",
]

del transformers  # only asked whether it is there
