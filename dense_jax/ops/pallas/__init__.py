"""TPU kernels (Pallas), each beside nothing but its own tuning knobs."""
