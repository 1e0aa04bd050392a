"""Checks of the kernels on a device: the suite's cases, repeats, graphs, streams, far memory."""

DONE = "all targets ran"  # the last line of device.target
