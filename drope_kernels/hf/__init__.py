"""Hugging Face transformers models on these kernels, and without their positions."""

from drope_kernels.hf.apply import position_free_parameters
from drope_kernels.hf.loading import load_model, load_tokenizer
from drope_kernels.hf.model import use_kernels
from drope_kernels.hf.positions import drop_positions, restore_positions
from drope_kernels.hf.state import DropState
from drope_kernels.hf.temperature import set_temperature

__all__ = [
    "DropState",
    "drop_positions",
    "load_model",
    "load_tokenizer",
    "position_free_parameters",
    "restore_positions",
    "set_temperature",
    "use_kernels",
]
