"""Tests of gates that are computed together."""

from flax import nnx

from dense_jax.layers.dense.gate import low_rank_gates, make_gates
from tests.builders import model_config, normal
from tests.helpers import assert_trees_close


def test_joined_gates_are_the_same():
  config = model_config("mamba", 2, "inputs", gate_sharing="per_source", gate_init="normal")
  gates = {
      name: make_gates(config, 2, width, None, nnx.Rngs(width))
      for name, width in (("b", 3), ("x", 6))
  }
  x_BTD = normal(0, 2, 7, config.width)

  def values(joined):
    found = low_rank_gates(gates, x_BTD, joined=joined)
    return {name: [gate.value() for gate in of_name] for name, of_name in found.items()}

  assert_trees_close(values(True), values(False))
  assert all(len(of_name) == 2 for of_name in values(True).values())
