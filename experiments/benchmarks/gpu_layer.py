"""A layer's recurrence at full size, and its kernels' errors: cases of `gpu`."""

from typing import Any

import jax
import jax.numpy as jnp

from dense_jax import experiment
from dense_jax.models.registry import FAMILIES
from dense_jax.ops import resolver
from dense_jax.ops.epilogue import Epilogue
from dense_jax.ops.kernel_check import kernel_errors, make_case
from dense_jax.ops.recurrence import Read, Sizes
from dense_jax.runs.kernels import state_sizes
from dense_jax.types import Array, PyTree
from experiments.benchmarks import common, kernel_times

EXPERIMENT = common.ROOT / "experiments" / "family_350m.py"
ROWS, TIME = 16, 2048
TOY_ROWS, TOY_TIME = 2, 32
REPEATS = 10


def layer_sizes(family: str, *, toy: bool) -> Sizes:
  """Returns the sizes of the states of a family's model of 350M parameters, or of its `:debug`."""
  spec = f"{EXPERIMENT}:{family}{'-debug' if toy else ''}"
  return state_sizes(experiment.load(spec, [("model.vocab_size", "64")]).model)


def errors(family: str, *, toy: bool) -> dict[str, dict[str, float]]:
  """Compares what `implementation=auto` runs here with the specification, in bfloat16.

  Returns:
    The implementation -> the relative errors of results and gradients (`kernel_errors`).
  """
  form = FAMILIES[family].form
  chosen = resolver.resolve(form, "auto")
  return {chosen: kernel_errors(form, chosen, layer_sizes(family, toy=toy), "bfloat16")}


def times(family: str, sources: int, *, toy: bool) -> dict[str, Any]:
  """Measures a layer's recurrence with its epilogue, forward and backward, kernel by kernel.

  Args:
    family: the family, whose layer has the sizes of 350M parameters; 16 rows of 2048 tokens.
    sources: shallow sources, which share a gate.
    toy: whether sizes are those of a smoke test.
  """
  form, dtype = FAMILIES[family].form, jnp.dtype("bfloat16")
  rows, time = (TOY_ROWS, TOY_TIME) if toy else (ROWS, TIME)
  make, row = make_case(form, layer_sizes(family, toy=toy), dtype, (1, time))
  inputs = jax.tree.map(
      lambda x: jnp.repeat(x, rows, 0) if x.ndim > 2 and len(x) == 1 else x, row
  )
  segments = common.batch(
      common.config("mamba2", common.Size(32, 1, 64, rows, time)), documents=2
  ).segments

  def total(inputs: PyTree) -> Array:
    epilogue = Epilogue(
        inputs["skip"], inputs["own"]["x"], inputs["z"], dtype=dtype, moments=form == "matrix"
    )
    reads = [
        Read(make("auto", inputs["source"], segments), inputs["query"], inputs["gate"], dtype=dtype)
        for _ in range(sources)
    ]
    output, final = make("auto", inputs["own"], segments).finish(inputs["query"], reads, epilogue)
    sums = [x.astype(jnp.float32) for x in jax.tree.leaves((output, final))]
    return sum((jnp.sum(x * x) for x in sums), jnp.zeros(()))

  gradients = jax.jit(jax.grad(total))
  call = common.timed(lambda: gradients(inputs))
  call()
  return {"seconds": common.median(call, REPEATS), **kernel_times.trace(call)}
