"""Shared types and the one legend of dimension letters.

Arrays carry their axes as a suffix: ``x_BTD`` is batch, time, model width.

    B  batch                     N  state size, or query/key width of one head
    T  time (tokens)             K  query/key width of all heads together
    D  model width               C  chunk length (tokens)
    E  inner width, H * P        G  chunks in a sequence, ceil(T / C)
    H  heads                     L  layers
    P  channels of one head      S  sources: shallower layers that a layer reads
    V  vocabulary                W  taps of a short convolution
    R  rank of a low-rank map    J  groups of heads that share keys and queries
    M  conjugate pairs of a complex state, N / 2

An axis of size one that broadcasts keeps its letter. In code that serves both whole sequences and
one token, suffixes name only the trailing axes: ``x_D`` is [B, T, D] or [B, D].
"""

import dataclasses
from typing import Any, TypeAlias

import jax

from dense_jax.batch import Batch, Segments, Token

# The mesh axes that split rows, the one that splits a row's tokens, and the one that splits
# channels and heads.
BATCH_AXES = ("slices", "data", "fsdp")
SEQUENCE_AXIS = "sequence"
WIDTH_AXIS = "tensor"

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any
Params: TypeAlias = dict[str, jax.Array]
"""A model's parameters, flat: dotted path (``stack.prefix_layers.0.mixer.a_log``) to array."""


# Registered here because `dense_jax.batch` must not import jax.
for _cls in (Batch, Segments, Token):
  jax.tree_util.register_dataclass(
      _cls, [field.name for field in dataclasses.fields(_cls)], []
  )
