"""Proofs that a checkpoint is whole: a digest of each array, made on the devices that hold it.

A digest is two sums, modulo 2**32, over an array's elements. Each term is a hash of the element's
bits and of its position, so that the digest depends on neither the mesh, the number of processes
nor the order of the sums, and a step's digests are compared wherever the step is restored. One
changed element always changes the digest; any other change does so but for one case in about 2**64.
They guard against faults, not against forgers.

The digests are made by one pass over the state before it is saved, which also finds numbers that
are not finite, and they are stored with the checkpoint, as its item `digests`. So they prove the
whole way: from the device that saved to the device that restores.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dense_jax.config import ModelConfig
from dense_jax.files import parse_json
from dense_jax.models.params import by_layer, is_stacked
from dense_jax.types import Array, PyTree

_FORMAT = 1
# The constants of MurmurHash3's finalizer, and 2**32 over the golden ratio.
_MIX = (np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35))
_GOLDEN = np.uint32(0x9E3779B1)
# The unsigned integers whose bits are those of elements of so many bytes.
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


@dataclasses.dataclass(frozen=True)
class ArrayProof:
  """The form of an array, and a digest of its content.

  Attributes:
    dtype: its dtype's name.
    shape: its shape.
    digest: 16 hex digits.
  """

  dtype: str
  shape: tuple[int, ...]
  digest: str


@dataclasses.dataclass(frozen=True)
class Proof:
  """The record of what a checkpoint was when it was saved.

  Attributes:
    step: updates done.
    arrays: name, such as "params/layers.0.mixer.a_log" -> what the array was.
    data: `digest_json` of the position in the data.
    heldout_loss: the loss that ranks the checkpoint; None means that it has none.
  """

  step: int
  arrays: Mapping[str, ArrayProof]
  data: str
  heldout_loss: float | None

  def to_json(self) -> dict[str, Any]:
    """Returns JSON values from which `parse` makes the proof again."""
    values = {
        "format": _FORMAT,
        "step": self.step,
        "arrays": {
            name: [array.dtype, list(array.shape), array.digest]
            for name, array in self.arrays.items()
        },
        "data": self.data,
        "heldout_loss": self.heldout_loss,
    }
    return {**values, "sha256": digest_json(values)}

  @classmethod
  def parse(cls, content: bytes) -> "Proof":
    """Inverts `to_json`.

    Raises:
      ValueError: the content is damaged, or of a format that is newer than this code.
    """
    values = parse_json(content)
    try:
      if values.pop("sha256") != digest_json(values):
        raise ValueError("its content is not what was written")
      if values["format"] != _FORMAT:
        raise ValueError(f"its format is {values['format']!r}: expected {_FORMAT}")
      arrays = {
          name: ArrayProof(dtype, tuple(shape), digest)
          for name, (dtype, shape, digest) in values["arrays"].items()
      }
      return cls(values["step"], arrays, values["data"], values["heldout_loss"])
    except (AttributeError, KeyError, RecursionError, TypeError) as error:
      raise ValueError("it holds no digests") from error


def digest_json(values: Mapping[str, Any]) -> str:
  """Returns the SHA-256 of JSON values; the order of keys does not matter."""
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def prove(
    tree: PyTree, model: ModelConfig | None = None
) -> tuple[dict[str, ArrayProof], list[str]]:
  """Makes the digests of a tree's arrays; all processes must call it, and all get the result.

  Args:
    tree: arrays of any dtype, keys of random generators too, with any sharding; or numpy arrays.
    model: the configuration of the model whose parameters, stacked as it scans its layers, the
      tree may hold. None means that no array is stacked.

  Returns:
    Name -> proof, with one entry for each layer's part of a stacked array; and the names of the
    arrays that hold a number that is not finite.
  """
  leaves, form = jax.tree_util.tree_flatten_with_path(
      jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf), tree)
  )
  sums = [_digest(leaf, rows=model is not None and is_stacked(path)) for path, leaf in leaves]
  for table in sums:
    table.copy_to_host_async()
  parts = [
      _Digested(str(leaf.dtype), tuple(leaf.shape), np.asarray(table))
      for (_, leaf), table in zip(leaves, sums, strict=True)
  ]
  named = jax.tree_util.tree_unflatten(form, parts)
  if model is not None:
    named = by_layer(model, named, split=lambda part, rows: part.split(rows))
  found = {_name(path): part for path, part in jax.tree_util.tree_leaves_with_path(named)}
  return (
      {name: part.proof() for name, part in found.items()},
      [name for name, part in found.items() if part.sums[2]],
  )


def names(tree: PyTree) -> dict[str, Any]:
  """Returns a tree's leaves by the names that `prove` gives them."""
  return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_named(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
  """Maps a function of (name, leaf), with the names that `prove` gives, over a tree."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: function(_name(path), leaf), tree)


def _name(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


@dataclasses.dataclass(frozen=True)
class _Digested:
  """An array's dtype, shape and sums: [3], or [R, 3] if it is R stacked arrays."""

  dtype: str
  shape: tuple[int, ...]
  sums: np.ndarray

  def split(self, rows: int) -> list["_Digested"]:
    return [_Digested(self.dtype, self.shape[1:], self.sums[row]) for row in range(rows)]

  def proof(self) -> ArrayProof:
    return ArrayProof(self.dtype, self.shape, f"{self.sums[0]:08x}{self.sums[1]:08x}")


def _digest(leaf: Array, *, rows: bool) -> Array:
  """Starts the computation of an array's sums; their copy in this process is whole."""
  placed = leaf.sharding
  if isinstance(placed, NamedSharding):
    placed = NamedSharding(placed.mesh, PartitionSpec())
  return _digester(placed, rows)(leaf)


# Cached, so that each shape and sharding is compiled once.
@functools.cache
def _digester(placed: jax.sharding.Sharding, rows: bool) -> Callable[[Array], Array]:
  return jax.jit(functools.partial(_sums, rows=rows), out_shardings=placed)


def _sums(leaf: Array, *, rows: bool) -> Array:
  """Returns uint32 [3]: two sums of hashes, and how many elements are not finite.

  With `rows`, they are those of each leaf[row]: [R, 3].
  """
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  infinite = ~jnp.isfinite(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else None
  bits = _bits(leaf)
  first = int(rows)
  if bits.ndim == first:
    bits = jnp.expand_dims(bits, -1)
  index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
  for axis in reversed(range(first, bits.ndim)):
    along = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    index, stride = index + along * np.uint32(stride % 2**32), stride * bits.shape[axis]
  place = _mix(index * _GOLDEN + np.uint32(1))
  term = _mix(bits ^ place)

  def total(values: Array, axes: range) -> Array:
    return jnp.sum(values, tuple(axes), dtype=jnp.uint32)

  axes = range(first, bits.ndim)
  sums = total(term, axes), total(term * (place | np.uint32(1)), axes)
  count = (
      jnp.zeros_like(sums[0]) if infinite is None else total(infinite, range(first, leaf.ndim))
  )
  return jnp.stack([*sums, count], -1)


def _bits(leaf: Array) -> Array:
  """Returns the bits of elements as uint32; those of 8 bytes are pairs, on an axis of their own."""
  if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
    leaf = jnp.stack([leaf.real, leaf.imag], -1)
  if leaf.dtype == jnp.bool_:
    return leaf.astype(jnp.uint32)
  unsigned = _UNSIGNED[leaf.dtype.itemsize]
  return lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)


def _mix(values: Array) -> Array:
  """Permutes the uint32 numbers so that each bit depends on all (MurmurHash3's finalizer)."""
  values = (values ^ (values >> np.uint32(16))) * _MIX[0]
  values = (values ^ (values >> np.uint32(13))) * _MIX[1]
  return values ^ (values >> np.uint32(16))
