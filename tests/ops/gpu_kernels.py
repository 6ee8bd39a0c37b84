"""Compiles the Triton kernels of recurrences and of injection for an H100 and prints their cost.

test_gpu_compile.py runs this with the Python that has the GPU compiler. The last line of output is
JSON: for each program its matmul FLOPs, and its bytes over those of one array [B, T, E] in
bfloat16.
"""

import json
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dense_jax.ops.diagonal import gpu as diagonal
from dense_jax.ops.diagonal.kernel_inputs import LowRank
from dense_jax.ops.diagonal.kernel_inputs import Source as DiagonalSource
from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.injection import Injected
from dense_jax.ops.injection_gpu import gpu_inject
from dense_jax.ops.matmul import matmul
from dense_jax.ops.matrix import gpu as matrix
from dense_jax.ops.matrix.kernel_inputs import Source as MatrixSource
from dense_jax.ops.recurrence import LowRankGate
from dense_jax.runs.compile import compile_function
from dense_jax.types import PyTree

B, T, E = 4, 1024, 1024


def _low(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _bool(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.bool_)


def _gate() -> PyTree:
  """A low-rank gate, as models have."""
  return LowRankGate(_low(B, T, 32), _float32(32, E), matmul)


def selective(sources: int) -> dict[str, float]:
  """A layer of mamba and its sources, which share a gate; packed."""
  size = 16
  recurrences = tuple(
      DiagonalSource(
          LowRank(_low(B, T, 64), _float32(64, E)), _float32(E), _float32(size, E), _low(B, T, E),
          _low(B, T, size), _low(B, T, size), _float32(B, size, E), 0 if index else None,
      )
      for index in range(sources)
  )
  gates = (LowRank(_low(B, T, 32), _float32(32, E)),) * (sources > 1)
  epilogue = Epilogue(_float32(E), None, _low(B, T, E), dtype=jnp.dtype("bfloat16"))

  def finish(sources: PyTree, gates: PyTree, epilogue: Epilogue, *masks: PyTree) -> PyTree:
    return diagonal.selective_finish(sources, gates, epilogue, *masks)

  return _cost(finish, recurrences, gates, epilogue, _bool(B, T), _bool(B, T))


def matrix_states(heads: int, size: int, *, selective: bool, sources: int) -> dict[str, float]:
  """A layer with matrix states and its sources, which share a gate; packed.

  The sources of a retention, which are not selective, are one recurrence.
  """
  groups = 1 if selective else heads
  recurrences = tuple(
      MatrixSource(
          _low(B, T, groups, size), _low(B, T, groups, size), _low(B, T, E),
          _float32(B, T, heads) if selective else None,
          _float32(B if selective else 1, T, heads),
          None if index else _float32(B, heads, E // heads, size), 0 if index else None,
          joins=index > 1 and not selective,
      )
      for index in range(sources)
  )
  gates = (_gate(),) * (sources > 1)
  epilogue = Epilogue(dtype=jnp.dtype("bfloat16"), moments=True)
  if selective:
    epilogue = Epilogue(
        _float32(heads), None, _low(B, T, E), dtype=jnp.dtype("bfloat16"), moments=True
    )

  def finish(sources: PyTree, gates: PyTree, epilogue: Epilogue, resets: PyTree) -> PyTree:
    return matrix.matrix_finish(sources, gates, resets, epilogue)

  return _cost(finish, recurrences, gates, epilogue, _bool(B, T))


def injection(sources: int) -> dict[str, float]:
  """Sources that share a gate, injected into a layer's input; the own one has other readers."""

  def run(
      own: jax.Array, shallow: tuple[jax.Array, ...], gate: LowRankGate, scale: jax.Array
  ) -> Injected:
    norm = types.SimpleNamespace(scale=scale, epsilon=1e-5)
    return gpu_inject(own, shallow, [gate] * sources, norm)

  own = _low(B, T, E)
  return _cost(
      lambda shallow, gate, arrays: run(arrays[0], shallow, gate, arrays[1]),
      (own,) * sources, _gate(), (own, _float32(E)),
  )


def _cost(finish: Callable[..., PyTree], *arguments: PyTree) -> dict[str, float]:
  """Returns what the gradient of all arguments but the masks costs."""
  inputs, masks = arguments[:3], arguments[3:]

  def run(inputs: PyTree, masks: PyTree, cotangents: PyTree) -> PyTree:
    outputs, pullback = jax.vjp(lambda inputs: finish(*inputs, *masks), inputs)
    return outputs, pullback(cotangents)

  cotangents = jax.eval_shape(finish, *arguments)
  found = compile_function(run, (inputs, masks, cotangents), "h100:1")
  assert found.cost is not None and found.fits and not found.note
  return {
      "matmul_flops": found.cost.matmul_flops,
      "arrays": found.cost.bytes_accessed / (2 * B * T * E),
  }


if __name__ == "__main__":
  print(json.dumps({
      "selective-1": selective(1),
      "selective-3": selective(3),
      "mamba2-2": matrix_states(16, 128, selective=True, sources=2),
      "injection-1": injection(1),
      "injection-2": injection(2),
      "retnet-3": matrix_states(2, 256, selective=False, sources=3),
  }))
