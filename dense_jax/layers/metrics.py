"""Metrics from inside layers: `record` in a layer, `collecting` around it.

A layer calls `record("gate_mean", gate)`, and nothing more. At every
`config.train.layer_metrics_every`-th step, the stack collects what each layer records, the train
step returns it beside the loss, and metrics.jsonl and TensorBoard show it as
`layers/<N>/gate_mean`. At all other steps `record` does nothing, and values that only it would
need are not computed: the compiled program is the same as without it.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from dense_jax.ops import sequence_parallel
from dense_jax.types import Array

Aux = dict[str, Array]
"""The metrics of one layer: name -> float32 scalar."""

Value = Array | Callable[[], Array]
"""An array that the layer computes anyway, or a function that makes one only for the metric."""

LONGEST_MEMORY = 2.0**24
"""The memory in tokens of the largest float32 decay below 1."""
# The square of a smaller number is no normal float32.
_LEAST_RMS = 2.0**-63

_AUX: contextvars.ContextVar[Aux | None] = contextvars.ContextVar("aux", default=None)


@contextlib.contextmanager
def collecting() -> Iterator[Aux]:
  """Collects everything that is recorded inside the context, into the dict that it yields.

  The values belong to the trace that records them. A function under `jax.checkpoint`,
  `jax.lax.scan` or the like that records must therefore open its own `collecting` and return the
  dict, as the stack does for each layer.
  """
  aux: Aux = {}
  token = _AUX.set(aux)
  try:
    yield aux
  finally:
    _AUX.reset(token)


def record(name: str, value: Value) -> Array | None:
  """Adds the mean of a value to the layer's metrics, if they are being collected.

  Args:
    name: the metric's name, unique within a layer.
    value: an array of any shape, or a function that returns one. The mean is over all of it,
      including padding, and over all devices that hold a part of a row's tokens.

  Returns:
    The metric, a float32 scalar from which others can be computed; None means that no metrics are
    being collected.

  Raises:
    ValueError: the layer already has a metric of that name.
  """
  return _add(name, value, lambda mean: mean)


def record_rms(name: str, value: Value) -> Array | None:
  """Records the root mean square of a value; see `record`."""
  return _add(name, lambda: jnp.square(_float32(value)), jnp.sqrt)


def record_spread(name: str, value: Value) -> None:
  """Records a value's mean and standard deviation, as <name>_mean and <name>_std."""
  mean = record(f"{name}_mean", value)
  if mean is not None:
    record_rms(f"{name}_std", lambda: _float32(value) - mean)


def record_memory(log_decay: Callable[[], Array]) -> None:
  """Records a recurrence's memory in tokens, 1 / (1 - a), of decays a, as `memory_tokens`.

  It counts as `LONGEST_MEMORY` at most: where a step size underflows, a is 1 and keeps everything.

  Args:
    log_decay: makes log a, float32.
  """
  def tokens() -> Array:
    return 1 / jnp.maximum(-jnp.expm1(log_decay()), 1 / LONGEST_MEMORY)

  record_spread("memory_tokens", tokens)


def record_ratio(name: str, part: Array | None, whole: Array | None) -> None:
  """Adds the ratio of two root mean squares that were recorded before, if they were collected.

  A whole of 0, as of states that nothing has entered, counts as the least number above 0 that a
  root mean square is in float32: the ratio is finite, and 0 where the part is 0 too.
  """
  if part is not None and whole is not None:
    record(name, part / jnp.maximum(whole, _LEAST_RMS))


def _float32(value: Value) -> Array:
  return (value() if callable(value) else value).astype(jnp.float32)


def _add(name: str, value: Value, finish: Callable[[Array], Array]) -> Array | None:
  aux = _AUX.get()
  if aux is None:
    return None
  if name in aux:
    raise ValueError(f"a layer records the metric {name!r} twice")
  mean = jnp.mean(jax.lax.stop_gradient(_float32(value)))
  aux[name] = finish(sequence_parallel.mean_over_shards(mean))
  return aux[name]
