"""The benchmark suite: `pytest bench/`."""
