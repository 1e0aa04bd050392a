"""What is measured on a GPU: our kernels beside fused peers, each checked before it is timed."""
