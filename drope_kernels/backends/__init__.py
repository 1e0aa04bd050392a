"""One module per backend; `drope_kernels.call.dispatch` holds their order and their protocol."""
