"""TPU kernels, each beside nothing but its own tuning knobs."""
