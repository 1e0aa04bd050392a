"""Hugging Face transformers models on these kernels."""

from drope_kernels.hf.model import use_kernels

__all__ = ["use_kernels"]
