"""Shapes, costs and the call itself of the GPU kernels of matrix states."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from dense_jax.ops.kernel_cost import KernelCost
from dense_jax.ops.matrix.gpu_plan import Plan
from dense_jax.ops.matrix.gpu_specs import Gate
from dense_jax.ops.recurrence import LowRankGate
from dense_jax.types import PyTree

# Warps of every program.
_WARPS = 8


def like(x: PyTree) -> PyTree:
  """Returns the shapes of a tree of arrays."""
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x)


def call_kernel(
    kernel: Callable[..., None],
    plan: Plan,
    grid: tuple[int, ...],
    inputs: Sequence[tuple[PyTree, PyTree]],
    outputs: Sequence[tuple[PyTree, PyTree]],
    *,
    matmul_flops: int,
    exponentials: int,
    stages: int,
) -> PyTree:
  """Runs a kernel that takes `plan`, then references to inputs and outputs.

  Args:
    kernel: the kernel.
    plan: the sizes.
    grid: the numbers of programs.
    inputs: trees of arrays, each with its tree of block specs.
    outputs: trees of shapes, each with its tree of block specs.
    matmul_flops: operations in matmuls.
    exponentials: exponentials, each of a difference of two sums of two parts.
    stages: turns of its loop whose loads are in shared memory at a time.

  Returns:
    The outputs.
  """
  arrays, in_specs = zip(*inputs, strict=True)
  shapes, out_specs = zip(*outputs, strict=True)
  cost = KernelCost(
      matmul_flops=matmul_flops, flops=6 * exponentials, transcendentals=exponentials,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((arrays, shapes))),
  )
  with cost.scope():
    return pl.pallas_call(
        functools.partial(kernel, plan), grid=grid, in_specs=in_specs, out_specs=out_specs,
        out_shape=shapes, interpret=plan.interpret, cost_estimate=cost.estimate(),
        compiler_params=pltriton.CompilerParams(num_warps=_WARPS, num_stages=stages),
    )(*arrays)


def float32(*shape: int) -> jax.ShapeDtypeStruct:
  """Returns the shape of a float32 array."""
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def between(plan: Plan) -> jax.ShapeDtypeStruct:
  """Returns the shape of one source's states between chunks, [B, G, H, N, P]."""
  shape = (plan.batch, plan.chunks, plan.heads, plan.state_size, plan.channels)
  return jax.ShapeDtypeStruct(shape, plan.dtype)


def rounded(plan: Plan, gates: tuple[Gate, ...]) -> tuple[Gate, ...]:
  """Returns gates with low-rank ones' matrices in the dtype in which they are multiplied."""
  return tuple(
      dataclasses.replace(gate, up_RE=gate.up_RE.astype(plan.dtype))
      if isinstance(gate, LowRankGate) else gate
      for gate in gates
  )


def gate_flops(plan: Plan, gates: tuple[Gate, ...]) -> int:
  """Returns the operations of the matmuls that make low-rank gates."""
  ranks = sum(len(gate.up_RE) for gate in gates if isinstance(gate, LowRankGate))
  return 2 * plan.batch * plan.time * plan.heads * plan.channels * ranks


def wide(plan: Plan) -> jax.ShapeDtypeStruct:
  """Returns the shape of E numbers a token."""
  return jax.ShapeDtypeStruct((plan.batch, plan.time, plan.heads * plan.channels), plan.dtype)
