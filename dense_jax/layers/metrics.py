"""Numbers that leave a layer, to be plotted: `record` in a layer, `collecting` around it.

A layer says `record("gate_mean", lambda: gate)`, and that is all: the stack collects what each
of its layers records, the train step returns it beside the loss, and the loop writes it down
(`config.train.layer_metrics_every`). In all other steps `record` does nothing and the value is
not computed, so that the compiled program is the same as without it.
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

_AUX: contextvars.ContextVar[Aux | None] = contextvars.ContextVar("aux", default=None)


@contextlib.contextmanager
def collecting() -> Iterator[Aux]:
  """Collects what is recorded inside, into the dict that it gives.

  The values belong to the trace that records them: a function under `jax.checkpoint`,
  `jax.lax.scan` or the like opens its own and returns it.
  """
  aux: Aux = {}
  token = _AUX.set(aux)
  try:
    yield aux
  finally:
    _AUX.reset(token)


def record(name: str, value: Callable[[], Array]) -> Array | None:
  """Adds the mean of `value()` to the layer's metrics, where they are collected.

  Args:
    name: the metric's, unique within a layer.
    value: makes an array of any shape; the mean is taken over all of it (padding counts too)
      and, where a row's tokens are spread over devices, over these.

  Returns:
    The metric, to make others of; None where none are collected.

  Raises:
    ValueError: the layer has a metric of that name already.
  """
  return _add(name, value, lambda mean: mean)


def record_rms(name: str, value: Callable[[], Array]) -> Array | None:
  """As `record`, of the root of the mean square of `value()`."""
  return _add(name, lambda: jnp.square(value().astype(jnp.float32)), jnp.sqrt)


def record_spread(name: str, value: Callable[[], Array]) -> None:
  """As `record`, of the mean and the standard deviation of `value()`: <name>_mean, <name>_std."""
  mean = record(f"{name}_mean", value)
  record_rms(f"{name}_std", lambda: value().astype(jnp.float32) - mean)


def _add(
    name: str, value: Callable[[], Array], finish: Callable[[Array], Array]
) -> Array | None:
  aux = _AUX.get()
  if aux is None:
    return None
  if name in aux:
    raise ValueError(f"a layer records the metric {name!r} twice")
  mean = jnp.mean(jax.lax.stop_gradient(value()).astype(jnp.float32))
  aux[name] = finish(sequence_parallel.mean_over_shards(mean))
  return aux[name]
