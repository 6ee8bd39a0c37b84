"""A scan over layers whose backward pass recomputes one layer at a time.

`jax.lax.scan` over layers saves its carry at every step. With dense connections of depth m the
carry holds what the last m layers share, so each of these values would be saved m times. Here each
is saved once, in a buffer that the backward pass reads by index. Besides, only the input of each
layer is saved.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dense_jax.types import Array, PyTree

Bank = tuple[PyTree, ...]
Unit = Callable[[PyTree, PyTree, PyTree, Array, Bank], tuple[Array, Bank, PyTree]]
"""The layers of one step, as a function: (params, states, context, x, bank) -> (x, bank, after).

The returned bank begins with what these layers share, nearest first, or is the same; `after` is any
other result, a tree of float arrays. The function must not close over arrays."""


def _is_float(leaf: Array) -> bool:
  return jnp.issubdtype(leaf.dtype, jnp.inexact)


class _Parts:
  """Splits a tree's leaves into two lists: those with gradients, and the others."""

  def __init__(self, tree: PyTree) -> None:
    leaves, self._structure = jax.tree.flatten(tree)
    self._floats = [_is_float(leaf) for leaf in leaves]

  def split(self, tree: PyTree) -> tuple[list[Any], list[Any]]:
    leaves = jax.tree.leaves(tree)
    floats = [leaf for leaf, is_float in zip(leaves, self._floats, strict=True) if is_float]
    others = [leaf for leaf, is_float in zip(leaves, self._floats, strict=True) if not is_float]
    return floats, others

  def join(self, floats: Sequence[Any], others: Sequence[Any]) -> PyTree:
    sources = iter(floats), iter(others)
    leaves = [next(sources[0] if is_float else sources[1]) for is_float in self._floats]
    return jax.tree.unflatten(self._structure, leaves)


def scan_layers(
    unit: Unit, params: PyTree, states: PyTree, context: PyTree, x: Array, bank: Bank, fresh: int
) -> tuple[Array, Bank, PyTree]:
  """Runs n steps of layers one after the other.

  Args:
    unit: the layers of one step.
    params: the steps' parameters, stacked [n, ...].
    states: their float states, stacked [n, ...], or None for a fresh start.
    context: arrays without gradients that all steps see.
    x: the first layer's input.
    bank: what the layers below share, nearest first.
    fresh: how many entries of the bank a step replaces; 0 for a bank that does not change, in any
      order.

  Returns:
    The last layer's output, the bank after it, and each step's `after`, stacked [n, ...].
  """
  count = jax.tree.leaves(params)[0].shape[0]
  depth = len(bank)
  inputs = _Parts((params, states, x, bank))
  bank_parts = _Parts(bank)

  def call(unit_params: PyTree, state: PyTree, context: PyTree, x: Array, bank: Bank) -> PyTree:
    # Without a barrier, XLA converts the parameters of all layers to the compute dtype before the
    # loop, and keeps the copies. It does the same with values that follow from the context alone,
    # such as masks, which are as large as the arrays that they mask.
    unit_params, context, x = jax.lax.optimization_barrier((unit_params, context, x))
    return unit(unit_params, state, context, x, bank)

  def bank_at(buffer: PyTree, index: Array) -> Bank:
    """Returns the bank before that step; the buffer has the oldest entry first."""
    return tuple(
        jax.tree.map(
            lambda leaf, k=k: jax.lax.dynamic_index_in_dim(
                leaf, index * fresh + k, keepdims=False
            ),
            buffer,
        )
        for k in reversed(range(depth))
    )

  def forward(
      floats: list[Array], others: list[Array], context: PyTree, save: bool
  ) -> tuple[PyTree, PyTree]:
    params, states, x, bank = inputs.join(floats, others)
    buffer = None
    if save and depth:
      # Each step writes the entries that the one below replaced, and needs those before them.
      written = jax.tree.map(
          lambda leaf: jnp.zeros((count * fresh, *leaf.shape), leaf.dtype), bank[0]
      )
      buffer = jax.tree.map(
          lambda *leaves: jnp.concatenate([*(leaf[None] for leaf in leaves[:-1]), leaves[-1]]),
          *reversed(bank[fresh:]), written,
      )

    def body(carry: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
      (x, bank, buffer), (index, unit_params, state) = carry, inputs
      for k in range(fresh if buffer is not None else 0):
        buffer = jax.tree.map(
            lambda leaf, entry, k=k: jax.lax.dynamic_update_index_in_dim(
                leaf, entry, depth + index * fresh - 1 - k, 0
            ),
            buffer, bank[k],
        )
      after_x, bank, after = call(unit_params, state, context, x, bank)
      return (after_x, bank, buffer), (after, x if save else None)

    (x, bank, buffer), (after, saved_x) = jax.lax.scan(
        body, (x, bank, buffer), (jnp.arange(count), params, states)
    )
    return (x, bank, after), (saved_x, buffer)

  @jax.custom_vjp
  def run(floats: list[Array], others: list[Array], context: PyTree) -> PyTree:
    return forward(floats, others, context, save=False)[0]

  def run_forward(floats: list[Array], others: list[Array], context: PyTree) -> PyTree:
    outputs, saved = forward(floats, others, context, save=True)
    return outputs, (floats, others, context, saved)

  def run_backward(saved: PyTree, cotangents: PyTree) -> PyTree:
    floats, others, context, (saved_x, buffer) = saved
    params, states, _, _ = inputs.join(floats, others)
    d_x, d_bank, d_after = cotangents

    def body(carry: PyTree, step: PyTree) -> tuple[PyTree, PyTree]:
      (d_x, d_bank), (index, unit_params, state, x, d_after) = carry, step
      seen = bank_at(buffer, index) if depth else ()
      seen_floats, seen_others = bank_parts.split(seen)

      def one_step(
          unit_params: PyTree, state: PyTree, x: Array, seen_floats: list[Array]
      ) -> PyTree:
        x, after_bank, after = call(
            unit_params, state, context, x, bank_parts.join(seen_floats, seen_others)
        )
        return x, bank_parts.split(after_bank)[0], after

      _, transpose = jax.vjp(one_step, unit_params, state, x, seen_floats)
      d_params, d_state, d_x, d_bank = transpose((d_x, d_bank, d_after))
      return (d_x, d_bank), (d_params, d_state)

    (d_x, d_bank), (d_params, d_states) = jax.lax.scan(
        body, (d_x, bank_parts.split(d_bank)[0]),
        (jnp.arange(count), params, states, saved_x, d_after), reverse=True,
    )
    return [*jax.tree.leaves((d_params, d_states, d_x)), *d_bank], None, None

  run.defvjp(run_forward, run_backward)
  return run(*inputs.split((params, states, x, bank)), context)
