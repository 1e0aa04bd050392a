"""The shipped CUDA sources on the CPU."""
