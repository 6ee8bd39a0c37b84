"""Arrays from inside layers, for analysis: `observe` in a layer, `observing` around a model.

Unlike metrics (`dense_jax.layers.metrics`), which training records, these are whole arrays, and
what passes a place can be changed on its way: a perturbation is added to it, whose gradient is that
of the place. All of it does nothing outside of `observing`, and then the compiled program is the
same as without it. The layers must be compiled apart (`models.params.unrolled`), without
rematerialisation, because values belong to the trace that makes them.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator

import jax

from dense_jax.types import Array, PyTree


@dataclasses.dataclass
class Observer:
  """A record of what is seen, and what to change.

  Attributes:
    seen: name -> the arrays of that name, one a layer, in the order of the layers.
    wanted: the names to see.
    added: what is added to the residual stream after each layer; () adds nothing.
    cut: true keeps gradients from passing from a layer to those that it reads.
  """

  wanted: frozenset[str] = frozenset()
  added: tuple[Array, ...] = ()
  cut: bool = False
  seen: dict[str, list[Array]] = dataclasses.field(default_factory=dict)


_OBSERVER: contextvars.ContextVar[Observer | None] = contextvars.ContextVar("seen", default=None)


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[Observer]:
  """Shows the observer what models do inside the context."""
  token = _OBSERVER.set(observer)
  try:
    yield observer
  finally:
    _OBSERVER.reset(token)


def observe(name: str, value: Callable[[], Array]) -> None:
  """Shows a value, which is computed only if it is wanted."""
  observer = _OBSERVER.get()
  if observer is not None and name in observer.wanted:
    observer.seen.setdefault(name, []).append(value())


def observe_residual(x: Array) -> Array:
  """Shows the residual stream after a layer, and returns it with what is to be added."""
  observer = _OBSERVER.get()
  if observer is None:
    return x
  if observer.added:
    x = x + observer.added[len(observer.seen.get("residual", ()))]
  observer.seen.setdefault("residual", []).append(x)
  return x


def observe_shallow(shallow: PyTree) -> PyTree:
  """Returns what a layer reads of others, without gradients if they are cut."""
  observer = _OBSERVER.get()
  if observer is None or not observer.cut:
    return shallow
  return jax.tree.map(jax.lax.stop_gradient, shallow)
