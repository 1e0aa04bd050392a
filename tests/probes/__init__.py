"""What the hardware, or the emulator, does for each instruction wrapper of csrc/cuda/ptx."""
