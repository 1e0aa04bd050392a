"""`drope demo`: pretrain with RoPE, drop it, recalibrate, and measure it, in minutes on CPU."""
