"""Other projects' checkpoint layouts."""

from dense_jax.interop.hugging_face import load_hf

__all__ = ["load_hf"]
