"""Helpers of the tests of sequence forms: documents, and outputs with all gradients."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.batch import Segments
from dense_jax.types import Array, PyTree
from tests.builders import normal, packed


def documents(time: int, first_row: Sequence[int]) -> Segments:
  """Makes three rows: one that continues a document, one that ends in padding, one of padding.

  Args:
    time: T, tokens per row.
    first_row: the lengths of the first row's documents, of which those within `time` are used.
      Choose them so that some documents begin inside chunks and some at their borders.
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
  """Makes rows that are one document each, without padding."""
  return Segments(jnp.arange(time)[None])


def after_last_valid(states: Array, initial: Array, segments: Segments) -> Array:
  """Returns, from states [B, T, ...], the state after each row's last valid token."""
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
  """Returns ((y, final state) of `run`, gradients of their weighted sum for every input).

  Outputs in the padding are undefined and set to zero.
  """

  def objective(inputs: Mapping[str, PyTree]) -> tuple[Array, tuple[Array, Array]]:
    y, final = run(inputs, segments)
    if segments.valid_BT is not None:
      y = y * segments.valid_BT.reshape(*segments.valid_BT.shape, *(1,) * (y.ndim - 2))
    return jnp.sum(y * weights[0]) + jnp.sum(final * weights[1]), (y, final)

  gradients, outputs = jax.grad(objective, has_aux=True)(inputs)
  return outputs, gradients


def strong_decays(size: float, *shape: int, share: float) -> Array:
  """Makes log decays [B, T, H] of about -size in a share of the tokens, and near 0 elsewhere."""
  strong = np.random.default_rng(8).random(shape) < share
  weak = jnp.exp(normal(9, *shape) - 6)
  return -jnp.where(strong, size * jnp.exp(0.1 * normal(10, *shape)), weak)


def matrix_float64(
    inputs: Mapping[str, Array], segments: Segments, weights: tuple[Array, Array]
) -> tuple[tuple[np.ndarray, np.ndarray], dict[str, np.ndarray]]:
  """Computes `everything` of a matrix-state recurrence, token by token in float64.

  Args:
    inputs: q_BTHN, k_BTHN, v_BTHP, log_decay_BTH and the state `initial` before the first token.
    segments: the documents; reads in the padding are zero.
    weights: weights of the outputs and the final state in the sum whose gradient is taken.
  """
  x = {name: np.asarray(value, np.float64) for name, value in inputs.items()}
  d_y, d_h = (np.asarray(weight, np.float64) for weight in weights)
  batch, time = d_y.shape[:2]
  nowhere = np.zeros((batch, time), bool)
  resets, padding = (
      (nowhere, nowhere) if segments.ids_BT is None
      else (np.asarray(segments.resets_BT), ~np.asarray(segments.valid_BT))
  )
  decay = np.where(resets, 0.0, 1.0)[..., None] * np.exp(x["log_decay"])
  states, y = [x["initial"]], np.zeros_like(d_y)
  keep = padding[..., None, None, None]
  for t in range(time):
    added = x["v"][:, t, :, :, None] * x["k"][:, t, :, None, :]
    h = decay[:, t, :, None, None] * states[-1] + added
    states.append(np.where(keep[:, t], states[-1], h))
    y[:, t] = np.where(keep[:, t, ..., 0], 0.0, np.einsum("bhpn,bhn->bhp", h, x["q"][:, t]))
  gradients = {name: np.zeros_like(value) for name, value in x.items()}
  for t in reversed(range(time)):
    read = np.where(keep[:, t, ..., 0], 0.0, d_y[:, t])
    d_after = d_h + read[..., None] * x["q"][:, t, :, None, :]
    d_token = np.where(keep[:, t], 0.0, d_after)
    gradients["q"][:, t] = np.einsum("bhpn,bhp->bhn", states[t + 1], read)
    gradients["k"][:, t] = np.einsum("bhpn,bhp->bhn", d_token, x["v"][:, t])
    gradients["v"][:, t] = np.einsum("bhpn,bhn->bhp", d_token, x["k"][:, t])
    d_decay = np.einsum("bhpn,bhpn->bh", d_token, states[t])
    gradients["log_decay"][:, t] = decay[:, t] * d_decay
    d_h = np.where(keep[:, t], d_h, decay[:, t, :, None, None] * d_token)
  gradients["initial"] = d_h
  return (y, states[-1]), gradients
