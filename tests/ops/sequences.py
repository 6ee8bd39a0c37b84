"""What the tests of sequence forms share: documents, and one comparison of everything."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from dense_jax.types import Array, PyTree, Segments
from tests.builders import packed


def documents(time: int, first_row: Sequence[int]) -> Segments:
  """Three rows of `time` tokens that go on with a document, end in padding, and hold nothing.

  Args:
    time: T.
    first_row: the lengths of the first row's documents, as many of them as `time` holds:
      such that some begin inside chunks and some at their borders.
  """
  wanted = [first_row, [time // 2, time], []]
  rows = []
  for lengths in wanted:
    row: list[int] = []
    for length in lengths:
      row.append(min(length, time - sum(row)))
    rows.append([length for length in row if length])
  if time > 2:
    rows[1][-1] -= 1  # Padding.
  return packed(rows, time=time, first=[4, 0, 0])


def one_document(time: int) -> Segments:
  """Rows without segments."""
  return Segments(jnp.arange(time)[None])


def after_last_valid(states: Array, initial: Array, segments: Segments) -> Array:
  """The state that a row ends with: of states [B, T, ...], that of its last valid token."""
  if segments.valid_BT is None:
    return states[:, -1]
  states = jnp.concatenate([initial[:, None], states], axis=1)
  return states[jnp.arange(len(states)), jnp.sum(segments.valid_BT, axis=1)]


def everything(
    run: Callable[[Mapping[str, PyTree], Segments], tuple[Array, Array]],
    inputs: Mapping[str, PyTree],
    segments: Segments,
    weights: tuple[Array, Array],
) -> tuple[tuple[Array, Array], PyTree]:
  """((y, final state), gradients by every input of their weighted sum) of `run`.

  Outputs in the padding are zeroed, as nobody reads them.
  """

  def objective(inputs: Mapping[str, PyTree]) -> tuple[Array, tuple[Array, Array]]:
    y, final = run(inputs, segments)
    if segments.valid_BT is not None:
      y = y * segments.valid_BT.reshape(*segments.valid_BT.shape, *(1,) * (y.ndim - 2))
    return jnp.sum(y * weights[0]) + jnp.sum(final * weights[1]), (y, final)

  gradients, outputs = jax.grad(objective, has_aux=True)(inputs)
  return outputs, gradients
