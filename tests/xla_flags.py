"""Flags of XLA that tests set before jax is there."""

# XLA of jax 0.12 makes one function of many small operations. It runs faster, but takes twice as
# long to compile where a whole model is small, and compiling is most of the tests' time.
FAST_TO_COMPILE = "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=0"
