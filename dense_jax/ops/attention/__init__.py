"""Softmax attention over the last tokens of each document.

`reference.py` is the specification. `blockwise.py` computes the same in memory that is linear in
T, on every platform; `gpu.py` and `tpu.py` call the kernels of cuDNN and of JAX where those cover
what is asked.
"""
