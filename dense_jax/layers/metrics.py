"""Numbers that leave a layer, to be plotted: `record` in a layer, `collecting` around it.

A layer says `record("gate_mean", gate)`, and that is all. In every
`config.train.layer_metrics_every`-th step the stack collects what each layer records, the train
step returns it beside the loss, and metrics.jsonl and TensorBoard have it as
`layers/<N>/gate_mean`. In all other steps `record` does nothing and what it would
compute is not: the compiled program is the same as without it.
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
"""An array that the layer has anyway, or what makes one for the metric alone."""

_AUX: contextvars.ContextVar[Aux | None] = contextvars.ContextVar("aux", default=None)


@contextlib.contextmanager
def collecting() -> Iterator[Aux]:
  """Collects what is recorded inside, into the dict that it gives.

  The values belong to the trace that records them. A function under `jax.checkpoint`,
  `jax.lax.scan` or the like that records opens its own `collecting` and returns the dict, as
  the stack does for each layer.
  """
  aux: Aux = {}
  token = _AUX.set(aux)
  try:
    yield aux
  finally:
    _AUX.reset(token)


def record(name: str, value: Value) -> Array | None:
  """Adds the mean of a value to the layer's metrics, where they are collected.

  Args:
    name: the metric's, unique within a layer.
    value: an array of any shape, or what makes one; the mean is taken over all of it (padding
      counts too) and, where a row's tokens are spread over devices, over these.

  Returns:
    The metric, to make others of; None where none are collected.

  Raises:
    ValueError: the layer has a metric of that name already.
  """
  return _add(name, value, lambda mean: mean)


def record_rms(name: str, value: Value) -> Array | None:
  """As `record`, of the root of the mean square."""
  return _add(name, lambda: jnp.square(_float32(value)), jnp.sqrt)


def record_spread(name: str, value: Value) -> None:
  """As `record`, of the mean and the standard deviation: <name>_mean, <name>_std."""
  mean = record(f"{name}_mean", value)
  if mean is not None:
    record_rms(f"{name}_std", lambda: _float32(value) - mean)


def record_ratio(name: str, part: Array | None, whole: Array | None) -> None:
  """Adds the ratio of two metrics that were recorded before; nothing where none are collected."""
  if part is not None and whole is not None:
    record(name, part / whole)


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
