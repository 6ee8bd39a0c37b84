"""What another project's checkpoint looks like, seen from ours."""

import dataclasses
from typing import Any, TypeAlias

from dense_jax.config import ModelConfig

Tensor: TypeAlias = Any
"""A host array: numpy's or JAX's."""


@dataclasses.dataclass(frozen=True)
class Layout:
  """One checkpoint's layout.

  Attributes:
    config: the model it describes.
    names: our parameter -> their tensor.
    unused: their tensors that the model does not use, which may be there or not.
  """

  config: ModelConfig
  names: dict[str, str]
  unused: frozenset[str]
