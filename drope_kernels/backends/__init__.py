"""One module per backend; `drope_kernels.dispatch` holds their order and their protocol."""
