"""Compiles attention for one chip of each TPU; prints bytes of temporaries and traffic as JSON.

test_attention.py runs this in a process of its own, like tests/ops/tpu_kernels.py.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dense_jax.costs.hlo import program_items, total
from dense_jax.ops.attention.blockwise import blockwise_attention
from dense_jax.ops.attention.reference import Documents
from dense_jax.ops.attention.tpu import splash_attention
from dense_jax.runs.compile import topology_devices
from dense_jax.types import Array, PyTree

ONE_CHIP = {"v4": "v4:1x1x1", "v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1"}
FORMS = {"pallas": splash_attention, "blockwise": blockwise_attention}
LENGTHS = (8192, 16384)
WINDOW, HEADS, HEAD_DIM = 2048, 16, 64


def compile_for(form: str, kind: str, time: int) -> dict[str, float]:
  """Compiles forward and backward passes of a packed row of `time` tokens."""
  mesh = Mesh(np.array(topology_devices(ONE_CHIP[kind])[:1]), ("data",))
  placed = NamedSharding(mesh, PartitionSpec())
  row = jax.ShapeDtypeStruct((1, time, HEADS, HEAD_DIM), jnp.bfloat16, sharding=placed)
  number = jax.ShapeDtypeStruct((1, time), jnp.int32, sharding=placed)

  def passes(q: Array, k: Array, v: Array, number: Array, d_y: Array) -> PyTree:
    attend = FORMS[form]
    y, pullback = jax.vjp(
        lambda *x: attend(*x, Documents(number, number), WINDOW), q, k, v
    )
    return y, pullback(d_y)

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = jax.jit(passes).lower(row, row, row, number, row).compile()
  cost = total(program_items(compiled.as_text()))
  return {
      "temporaries": compiled.memory_analysis().temp_size_in_bytes,
      "bytes": cost.bytes_accessed,
      "row_bytes": 2 * math.prod(row.shape),
  }


def main() -> None:
  cases = [("pallas", kind, 2048) for kind in ONE_CHIP]
  cases += [(form, "v5e", time) for form in FORMS for time in LENGTHS]
  print(json.dumps({f"{form} {kind} {time}": compile_for(form, kind, time)
                    for form, kind, time in cases}))


if __name__ == "__main__":
  main()
