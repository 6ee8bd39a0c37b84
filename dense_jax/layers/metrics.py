"""Numbers that leave a layer, to be plotted: `record` in a layer, `collecting` around it.

A layer says `record("gate_mean", lambda: gate)`, and that is all. In every
`config.train.layer_metrics_every`-th step the stack collects what each layer records, the train
step returns it beside the loss, and metrics.jsonl and TensorBoard have it as
`layers/<N>/gate_mean`. In all other steps `record` does nothing and the value is not computed:
the compiled program is the same as without it.
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


def record(name: str, value: Callable[[], Array]) -> None:
  """Adds the mean of `value()` to the layer's metrics, where they are collected.

  Args:
    name: the metric's, unique within a layer.
    value: makes an array of any shape; the mean is taken over all of it (padding counts too)
      and, where a row's tokens are spread over devices, over these.

  Raises:
    ValueError: the layer has a metric of that name already.
  """
  _add(name, value, lambda mean: mean)


def record_rms(name: str, value: Callable[[], Array]) -> None:
  """As `record`, of the root of the mean square of `value()`."""
  _add(name, lambda: jnp.square(value().astype(jnp.float32)), jnp.sqrt)


def _add(name: str, value: Callable[[], Array], finish: Callable[[Array], Array]) -> None:
  aux = _AUX.get()
  if aux is None:
    return
  if name in aux:
    raise ValueError(f"a layer records the metric {name!r} twice")
  mean = jnp.mean(jax.lax.stop_gradient(value()).astype(jnp.float32))
  aux[name] = finish(sequence_parallel.mean_over_shards(mean))
