"""Compiles Pallas kernels and XLA's forms for one chip of each TPU and prints what they need.

test_tpu_compile.py runs this in a process of its own, because the tests' own jax must not find the
TPU compiler. The last line of output is JSON: for each program and TPU the bytes of arguments and
of temporaries, the counts of the cost analysis, and the bytes of HBM traffic.
"""

import dataclasses
import json
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dense_jax.costs.hlo import program_items, total
from dense_jax.ops import resolver
from dense_jax.ops.diagonal.kernel_inputs import LowRank, Source
from dense_jax.ops.diagonal.tpu import selective_finish
from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.matmul import matmul
from dense_jax.ops.matrix import kernel_inputs
from dense_jax.ops.matrix.tpu import matrix_finish
from dense_jax.ops.recurrence import LowRankGate
from dense_jax.types import Array, PyTree

# TPU -> its smallest topology.
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}

Program = tuple[Callable[..., PyTree], tuple[PyTree, ...]]
"""A function and the shapes of its arguments."""


def _shape(*shape: int, dtype: jnp.dtype = jnp.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _with_gradients(function: Callable[..., tuple[PyTree, ...]]) -> Callable[..., PyTree]:
  """Computes outputs and gradients of the first argument, for cotangents (the last argument)."""

  def run(inputs: PyTree, *others: PyTree) -> PyTree:
    *others, cotangents = others
    outputs, pullback = jax.vjp(lambda inputs: function(inputs, *others), inputs)
    return outputs, pullback(cotangents)

  return run


def selective(sources: int, *, packed: bool, gradient: bool) -> Program:
  """One layer of mamba 370M and its sources, 2 x 2048 tokens, from step sizes to the gate."""
  batch, time, width, size = 2, 2048, 2048, 16
  low = jnp.bfloat16
  channels = _shape(batch, time, width, dtype=low)
  recurrences = tuple(
      Source(
          dt=LowRank(_shape(batch, time, 64, dtype=low), _shape(64, width)),
          bias_E=_shape(width),
          a_NE=_shape(size, width),
          x_BTE=channels,
          b_BTN=_shape(batch, time, size, dtype=low),
          c_BTN=_shape(batch, time, size, dtype=low),
          initial_BNE=_shape(batch, size, width),
          gate=0 if index else None,
      )
      for index in range(sources)
  )
  gates = (LowRank(_shape(batch, time, 32, dtype=low), _shape(32, width)),) * (sources > 1)
  epilogue = Epilogue(_shape(width), None, channels, dtype=jnp.dtype(low))
  masks = (_shape(batch, time, dtype=jnp.bool_),) * 2 if packed else (None, None)

  def finish(inputs: PyTree, *masks: Array | None) -> tuple[Array, ...]:
    return selective_finish(*inputs, *masks)

  if not gradient:
    return finish, ((recurrences, gates, epilogue), *masks)
  cotangents = channels, _shape(batch, size, width)
  return _with_gradients(finish), ((recurrences, gates, epilogue), *masks, cotangents)


def selective_form(implementation: str) -> Program:
  """The gradient of one layer of mamba 370M by a form without kernels, 2 x 2048 tokens."""

  def reads(source: Source, resets_BT: Array | None) -> tuple[Array, ...]:
    states = resolver.diagonal_form(implementation, 0).sequence(
        source.dt, source.a_NE, source.x_BTE, source.b_BTN, resets_BT, source.initial_BNE, 0
    )
    return states.run(source.c_BTN)

  _, ((recurrences, *_), resets, _, (y, final)) = selective(1, packed=True, gradient=True)
  dt, y = (_shape(*x.shape) for x in (recurrences[0].x_BTE, y))
  source = dataclasses.replace(recurrences[0], dt=dt, bias_E=None)
  return _with_gradients(reads), (source, resets, (y, final))


# Layers' matrix states: heads, groups, channels of a head, state size.
MATRIX = {
    "mamba2": (32, 1, 64, 128),
    "gau_retnet": (2, 2, 1536, 384),
    "retnet": (4, 4, 512, 256),
    "wide": (4, 4, 1280, 320),
}


def matrix(family: str, sources: int, *, packed: bool, gradient: bool) -> Program:
  """One layer of a family and its sources, 2 x 2048 tokens, with what follows its reads.

  As in models, sources share a gate, and those of a retention are one recurrence.
  """
  batch, time, low = 2, 2048, jnp.bfloat16
  heads, groups, channels, size = MATRIX[family]
  width, selective = heads * channels, family == "mamba2"
  tokens = _shape(batch, time, width, dtype=low)
  recurrences = tuple(
      kernel_inputs.Source(
          q_BTJN=_shape(batch, time, groups, size, dtype=low),
          k_BTJN=_shape(batch, time, groups, size, dtype=low),
          v_BTE=tokens,
          scale_BTH=_shape(batch, time, heads) if selective else None,
          # A retention's decay is constant.
          log_decay_BTH=_shape(batch if selective else 1, time, heads),
          initial_BHPN=None if index else _shape(batch, heads, channels, size),
          gate=0 if index else None,
          joins=index > 1 and not selective,
      )
      for index in range(sources)
  )
  gate = LowRankGate(_shape(batch, time, 48, dtype=low), _shape(48, width), matmul)
  gates = (gate,) * (sources > 1)
  skip, z = (_shape(heads), tokens) if selective else (None, None)
  epilogue = Epilogue(skip, None, z, dtype=jnp.dtype(low), moments=True)
  resets = _shape(batch, time, dtype=jnp.bool_) if packed else None

  def reads(
      inputs: tuple[tuple[kernel_inputs.Source, ...], tuple[LowRankGate, ...], Epilogue],
      resets: Array | None,
  ) -> tuple[PyTree, ...]:
    sources, gates, epilogue = inputs
    output, final = matrix_finish(sources, gates, resets, epilogue)
    return output.y, output.moments, final

  if not gradient:
    return reads, ((recurrences, gates, epilogue), resets)
  cotangents = (
      tokens, _shape(batch, time, heads, 2), _shape(batch, heads, channels, size)
  )
  return _with_gradients(reads), ((recurrences, gates, epilogue), resets, cotangents)


PROGRAMS: dict[str, Program] = {
    "selective-recurrent": selective_form("recurrent"),
    "selective-associative": selective_form("associative"),
    "selective-1-forward": selective(1, packed=False, gradient=False),
    "selective-1-gradient": selective(1, packed=False, gradient=True),
    "selective-3-packed-gradient": selective(3, packed=True, gradient=True),
    "mamba2-1-forward": matrix("mamba2", 1, packed=False, gradient=False),
    "mamba2-1-gradient": matrix("mamba2", 1, packed=False, gradient=True),
} | {
    # Programs of gradients include the forward kernel, and three sources need the most VMEM.
    f"{family}-3-packed-gradient": matrix(family, 3, packed=True, gradient=True)
    for family in MATRIX
}


def compile_for(topology: str, program: Program) -> dict[str, float]:
  """Compiles a program for one chip and returns its memory and costs."""
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  mesh = Mesh(np.array(devices[:1]), ("data",))
  one_chip = NamedSharding(mesh, PartitionSpec())
  function, shapes = program
  arguments = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one_chip), shapes
  )
  # Since jax 0.12, the mesh tells a kernel for which TPU it is lowered.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = jax.jit(function).lower(*arguments).compile()
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  return {
      "arguments": memory.argument_size_in_bytes,
      "temporaries": memory.temp_size_in_bytes,
      "flops": cost["flops"],
      "transcendentals": cost["transcendentals"],
      "bytes": total(program_items(compiled.as_text(), open_trips=1)).bytes_accessed,
  }


def main(tpus: list[str]) -> None:
  found = {
      name: {tpu: compile_for(TOPOLOGIES[tpu], program) for tpu in tpus}
      for name, program in PROGRAMS.items()
  }
  print(json.dumps(found))


if __name__ == "__main__":
  main(sys.argv[1:] or list(TOPOLOGIES))
