"""Reads and writes checkpoints in the layouts of other projects."""

from dense_jax.interop.hugging_face import load_hf
from dense_jax.interop.save import save_hf

__all__ = ["load_hf", "save_hf"]
