"""Forms of recurrences against their specification, and the rates of a card: cases of `gpu`.

Every implementation that runs as itself on this machine is compared with the token-by-token
specification, in a small model with two documents a row: its logits, and the gradients of all
parameters.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.config import ExperimentConfig
from dense_jax.models.language_model import LanguageModel
from dense_jax.models.params import abstract_model, init_params, with_params
from dense_jax.models.registry import FAMILIES
from dense_jax.ops import resolver
from dense_jax.ops.resolver import diagonal_form, matrix_form
from dense_jax.types import Array, Params, PyTree
from experiments.benchmarks import common
from experiments.benchmarks.common import Size

SPECIFICATION = "recurrent"
# Family -> options of its mixer, in that size and in the toy's. Heads are as large as those of
# experiments/family_350m.py, or nearly so.
CHECKED: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "mamba2": ({}, {}),
    "retnet": ({"heads": 1}, {"heads": 2}),
    "gau_retnet": ({"heads": 1, "key_dim": 384}, {"heads": 1, "key_dim": 16}),
    "mamba": ({}, {}),
}
SIZE = Size(width=256, layers=3, vocabulary=512, batch_size=2, time_steps=301)
TOY = Size(width=32, layers=3, vocabulary=64, batch_size=2, time_steps=37)
REPEATS = 10
IN_A_ROW = 16


def forms(family: str) -> list[str]:
  """Returns the implementations of a family's form of state that run as themselves here."""
  form = FAMILIES[family].form
  return [
      name for name in resolver.IMPLEMENTATIONS[form]
      if name != SPECIFICATION and resolver.resolve(form, name) == name
  ]


def errors(family: str, *, toy: bool) -> dict[str, dict[str, float]]:
  """Compares all forms of a family with the specification, in a dense model with m = 2.

  Its first layer reads no other one, so that this covers base models too.

  Returns:
    Form -> the largest difference of a logit and of a gradient over the largest value of the
    specification in float32, for the form in float32 and in bfloat16. The form "recurrent" is the
    specification in bfloat16: what bfloat16 alone does.
  """
  exact_logits, exact_gradients = _run(_config(family, SPECIFICATION, "float32", toy=toy))
  found: dict[str, dict[str, float]] = {}
  for form in (SPECIFICATION, *forms(family)):
    found[form] = {}
    for dtype in ("bfloat16",) if form == SPECIFICATION else ("float32", "bfloat16"):
      logits, gradients = _run(_config(family, form, dtype, toy=toy))
      found[form][f"{dtype} logits"] = _difference(logits, exact_logits)
      found[form][f"{dtype} gradients"] = max(
          _difference(gradients[name], exact) for name, exact in exact_gradients.items()
      )
  return found


def _config(family: str, form: str, dtype: str, *, toy: bool) -> ExperimentConfig:
  return common.config(
      family, TOY if toy else SIZE, dense={"depth": 2}, mixer=CHECKED[family][toy],
      implementation=form, dtype=dtype,
  )


def _run(settings: ExperimentConfig) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Returns logits of a batch, and the gradients of a random sum of them; both float32."""
  model: LanguageModel = abstract_model(settings.model)
  batch = common.batch(settings, documents=2)
  shape = (*batch.tokens_BT.shape, settings.model.vocab_size)
  weights_BTV = np.random.default_rng(1).normal(size=shape).astype(np.float32)

  def weighted(params: Params) -> tuple[Array, Array]:
    logits_BTV = with_params(model, params)(batch.tokens_BT, batch.segments).astype(jnp.float32)
    return jnp.sum(logits_BTV * weights_BTV), logits_BTV

  params = init_params(settings.model, jax.random.key(0))
  with jax.default_matmul_precision("highest"):
    (_, logits), gradients = jax.jit(jax.value_and_grad(weighted, has_aux=True))(params)
  return np.asarray(logits), {name: np.asarray(leaf) for name, leaf in gradients.items()}


def _difference(actual: np.ndarray, expected: np.ndarray) -> float:
  """Returns the largest difference, over the largest expected value."""
  scale = float(np.max(np.abs(expected))) or 1.0
  return float(np.max(np.abs(actual.astype(np.float64) - expected))) / scale


def rates(*, toy: bool) -> dict[str, float]:
  """Measures the ceilings of the estimate: a large matmul's FLOP/s, and a copy's bytes/s."""
  size = 128 if toy else 8192
  # Random numbers: a card multiplies equal ones faster, for it switches fewer bits.
  matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
  long = jax.random.normal(jax.random.key(1), (16 * size * size,), jnp.bfloat16)

  # Many in one program: a launch from Python takes as long as a quarter of one of them.
  @jax.jit
  def multiply(x: Array) -> Array:
    return jax.lax.fori_loop(0, IN_A_ROW, lambda _, y: (x @ y) / size**0.5, x)

  @jax.jit
  def copy(x: Array) -> Array:
    return jax.lax.fori_loop(0, IN_A_ROW, lambda _, y: y + 1, x)

  multiplied = common.timed(lambda: multiply(matrix))
  copied = common.timed(lambda: copy(long))
  multiplied(), copied()
  return {
      "matmul_flops_per_second": IN_A_ROW * 2 * size**3 / common.median(multiplied, REPEATS),
      "copied_bytes_per_second": IN_A_ROW * 2 * long.nbytes / common.median(copied, REPEATS),
  }


def operation(name: str, *, toy: bool) -> dict[str, float]:
  """Measures forward and backward passes of one recurrence, at the size of op_rival.py's.

  Args:
    name: "ssd" (matrix states of mamba2) or "scan" (diagonal states of mamba).
    toy: whether the sizes are those of a smoke test.
  """
  batch, time, heads, channels, size = (1, 64, 2, 8, 8) if toy else (16, 2048, 32, 64, 128)
  width, states = heads * channels, 4 if toy else 16
  keys = iter(jax.random.split(jax.random.key(0), 4))
  segments = common.batch(
      common.config("mamba2", Size(32, 1, 64, batch, time)), documents=1
  ).segments

  def normal(*shape: int) -> Array:
    return jax.random.normal(next(keys), shape, jnp.bfloat16)

  def ssd(k: Array, v: Array, q: Array, log_decay: Array) -> Array:
    return matrix_form("auto", 0)(k, v, None, log_decay, segments, None).run(q)[0]

  def scan(x: Array, b: Array, c: Array, dt: Array) -> Array:
    a_NE = -jnp.broadcast_to(1.0 + jnp.arange(states)[:, None], (states, width))
    return diagonal_form("auto", 0)(dt, a_NE, x, b, segments, None).run(c)[0]

  inputs: tuple[Array, ...]
  if name == "ssd":
    inputs = (normal(batch, time, 1, size), normal(batch, time, heads, channels),
              normal(batch, time, 1, size), jnp.full((batch, time, heads), -0.1))
  else:
    inputs = (normal(batch, time, width), normal(batch, time, states),
              normal(batch, time, states), jnp.full((batch, time, width), 0.01))
  function = ssd if name == "ssd" else scan

  @jax.jit
  def gradients(inputs: PyTree) -> PyTree:
    return jax.grad(lambda inputs: jnp.sum(function(*inputs) ** 2))(inputs)

  call = common.timed(functools.partial(gradients, inputs))
  call()
  return {"seconds": common.median(call, REPEATS)}


def run(kind: str, name: str, *, toy: bool) -> dict[str, Any]:
  """Runs a case: "check" of a family, "rates", or "operation" of that name."""
  if kind == "operation":
    return operation(name, toy=toy)
  return {"errors": errors(name, toy=toy)} if kind == "check" else rates(toy=toy)
