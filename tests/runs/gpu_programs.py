"""Compiles small programs for an H100 and prints what they cost.

test_compile_gpu.py runs this with the Python that has the GPU compiler. The last line of output is
JSON: for each program its matmul FLOPs, all FLOPs, bytes and launches; and what the kernels' author
says of all calls in a loop.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu, triton

from dense_jax.config import ModelConfig
from dense_jax.models.params import abstract_model, get_params, with_params
from dense_jax.models.registry import family
from dense_jax.ops.kernel_cost import KernelCost
from dense_jax.runs.compile import compile_function
from dense_jax.types import Array

TRIPS, ROWS, WIDTH = 5, 256, 128
COST = KernelCost(
    matmul_flops=2 * ROWS * WIDTH * WIDTH, flops=0, transcendentals=7, bytes_accessed=123456
)


def model(block_layers: int) -> dict[str, float]:
  """A model's forward pass; `block_layers` 0 scans its five layers, 5 unrolls them."""
  made = abstract_model(ModelConfig(
      family="mamba2", vocab_size=11, width=16, layers=5, block_layers=block_layers,
      mixer=family("mamba2").config(state_size=3, head_dim=8, groups=2),
  ))
  tokens = jax.ShapeDtypeStruct((2, 12), jnp.int32)
  return cost(lambda params, tokens: with_params(made, params)(tokens), get_params(made), tokens)


def triton_kernel(x: Array, weight: Array) -> Array:
  """Multiplies by the weight."""
  def kernel(x_ref, w_ref, y_ref):  # type: ignore[no-untyped-def]
    y_ref[...] = jnp.dot(
        x_ref[...], w_ref[...], preferred_element_type=jnp.float32
    ).astype(y_ref.dtype)

  rows = pl.BlockSpec((64, WIDTH), lambda i: (i, 0))
  with COST.scope():
    return pl.pallas_call(
        kernel, grid=(ROWS // 64,), in_specs=[rows, pl.BlockSpec((WIDTH, WIDTH), lambda i: (0, 0))],
        out_specs=rows, out_shape=x, compiler_params=triton.CompilerParams(num_warps=4),
        cost_estimate=COST.estimate(),
    )(x, weight)


def mosaic_kernel(x: Array, weight: Array) -> Array:
  """Doubles x, as the simplest kernel; that costs what COST says is no matter here."""
  def kernel(x_ref, y_ref, scratch):  # type: ignore[no-untyped-def]
    scratch[...] = x_ref[...] * 2
    mosaic_gpu.commit_smem()
    mosaic_gpu.copy_smem_to_gmem(scratch, y_ref)
    mosaic_gpu.wait_smem_to_gmem(0)

  del weight
  with COST.scope():
    return mosaic_gpu.kernel(
        kernel, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[mosaic_gpu.SMEM(x.shape, x.dtype)],
    )(x)


def kernels(kernel) -> dict[str, float]:  # type: ignore[no-untyped-def]
  """A loop of TRIPS calls of a kernel."""
  def loop(x: Array, weights: Array) -> Array:
    return jax.lax.scan(lambda x, weight: (kernel(x, weight), None), x, weights)[0]

  return cost(
      loop, jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16),
      jax.ShapeDtypeStruct((TRIPS, WIDTH, WIDTH), jnp.bfloat16),
  )


def cost(function, *arguments) -> dict[str, float]:  # type: ignore[no-untyped-def]
  """Returns what a function costs on an H100."""
  found = compile_function(function, arguments, "h100:1")
  assert found.cost is not None and found.fits and not found.note
  return {
      "matmul_flops": found.cost.matmul_flops, "flops": found.cost.flops,
      "transcendentals": found.cost.transcendentals, "bytes": found.cost.bytes_accessed,
      "launches": found.cost.launches,
  }


if __name__ == "__main__":
  print(json.dumps({
      "triton": kernels(triton_kernel), "mosaic": kernels(mosaic_kernel),
      "scanned": model(0), "unrolled": model(5),
      "of kernels": {name: TRIPS * value for name, value in dataclasses.asdict(COST).items()},
  }))
