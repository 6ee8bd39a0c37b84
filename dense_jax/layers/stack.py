"""The layers of a model: the first ones apart, the rest as a scan over super-blocks.

With dense connections of depth m the first m layers have fewer than m sources, and so
other parameters; they (or all below `dense.start`), and as many more as do not fill a
super-block, are compiled apart (`head`). All others repeat one pattern of `dense.stride`
layers, whose parameters are stacked along a leading axis (`blocks`, one module a layer of the
pattern), and are scanned in super-blocks of b layers with the last m layers' shared states
in the carry.

Without remat a super-block is the scan's body, and with b >= m its carry is kept once in b
layers. With remat "full" each layer is computed again, one at a time (`layer_scan.py`), and
so is each super-block: kept are what enters each super-block and, of one super-block at a
time, what enters each layer. "reads" leaves out the second level: kept are each layer's input
and what deeper layers read of it, for one forward pass less.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dense_jax.batch import Segments, Token
from dense_jax.config import ModelConfig
from dense_jax.layers.dense.connection import Shared
from dense_jax.layers.layer_scan import scan_layers
from dense_jax.layers.linear import RMSNorm
from dense_jax.layers.mixer import Mixer, MixerOutput
from dense_jax.sharding import constrain_tokens
from dense_jax.types import Array, PyTree

MixerFactory = Callable[..., Mixer]
Bank = tuple[Shared, ...]
LayerCall = Callable[["Layer", Array, PyTree, PyTree, Bank], tuple[Array, MixerOutput]]
Remat = Callable[[Callable], Callable]
FeedForwardFactory = Callable[[ModelConfig, nnx.Rngs], nnx.Module | None]


class Layer(nnx.Module):
  """x + mixer(norm(x)), and then x + feed_forward(ffn_norm(x)) in families that have one."""

  def __init__(
      self,
      config: ModelConfig,
      mixer: MixerFactory,
      feed_forward: FeedForwardFactory | None,
      *,
      sources: int,
      rngs: nnx.Rngs,
  ) -> None:
    self.norm = RMSNorm(config.width, axis="embed", epsilon=config.norm_eps, rngs=rngs)
    self.mixer = mixer(config, sources=sources, rngs=rngs)
    module = feed_forward(config, rngs) if feed_forward else None
    if module is not None:
      self.ffn_norm = RMSNorm(config.width, axis="embed", epsilon=config.norm_eps, rngs=rngs)
      self.feed_forward = module

  def _join(self, x: Array, output: MixerOutput) -> tuple[Array, MixerOutput]:
    x = constrain_tokens(x + output.y, "embed")
    if hasattr(self, "feed_forward"):
      x = constrain_tokens(x + self.feed_forward(self.ffn_norm(x)), "embed")
    return x, output

  def __call__(
      self, x_BTD: Array, segments: Segments, state: PyTree | None, shallow: Sequence[Shared]
  ) -> tuple[Array, MixerOutput]:
    """Returns the next x_BTD, and all that the mixer gave."""
    return self._join(x_BTD, self.mixer(self.norm(x_BTD), segments, state, shallow))

  def step(
      self, x_BD: Array, position_B: Array, state: PyTree, shallow: Sequence[Shared]
  ) -> tuple[Array, MixerOutput]:
    """One token of `__call__`."""
    return self._join(x_BD, self.mixer(self.norm(x_BD), Token(position_B), state, shallow))


def pattern_length(config: ModelConfig) -> int:
  """Layers after which the kinds of layers repeat."""
  return config.dense.stride if config.dense.depth else 1


def block_sizes(config: ModelConfig) -> tuple[int, int, int]:
  """Layers apart, layers of a super-block, super-blocks."""
  dense, layers = config.dense, config.layers
  if dense.depth and dense.inject == "state" and dense.source == "fused":
    return layers, 0, 0  # Each layer reads a longer chain than the one below.
  apart, stride = max(dense.depth, dense.start) if dense.depth else 0, pattern_length(config)
  block = config.block_layers or -(-max(dense.depth, 1) // stride) * stride
  blocks = (layers - apart) // block
  if blocks < 2:  # A scan of one step would only hide the layers.
    return layers, 0, 0
  return layers - blocks * block, block, blocks


class Stack(nnx.Module):
  """All layers. Its state: {"head": [a layer's state], "blocks": [the same, stacked]}."""

  def __init__(
      self,
      config: ModelConfig,
      mixer: MixerFactory,
      feed_forward: FeedForwardFactory | None,
      *,
      rngs: nnx.Rngs,
  ) -> None:
    self.inject = config.dense.inject
    self.depth = config.dense.depth
    self.remat = config.remat
    head, block, self.num_blocks = block_sizes(config)
    pattern = pattern_length(config) if block else 0
    self.repeats = block // pattern if block else 0  # of the pattern in a super-block

    def make(index: int, key: Array) -> Layer:
      sources = config.dense.sources(index)
      return Layer(config, mixer, feed_forward, sources=sources, rngs=nnx.Rngs(key))

    def make_stacked(index: int) -> Layer:
      keys = jax.random.split(rngs.params(), self.num_blocks * self.repeats)
      graph = nnx.split(nnx.eval_shape(lambda: make(index, jax.random.key(0))))[0]
      return nnx.merge(graph, jax.vmap(lambda key: nnx.split(make(index, key))[1])(keys))

    self.head = nnx.List([make(index, rngs.params()) for index in range(head)])
    self.blocks = nnx.List([make_stacked(head + index) for index in range(pattern)])

  def __call__(
      self, x_BTD: Array, segments: Segments, state: PyTree | None, *, keep_state: bool = True
  ) -> tuple[Array, PyTree]:
    """Runs a sequence from `state` (None: a fresh one).

    Returns:
      x_BTD, and the state after it or, without `keep_state`, None.
    """
    if state is None:
      state = {"head": [None] * len(self.head), "blocks": [None] * len(self.blocks)}
    x_BTD, state = self._run(Layer.__call__, x_BTD, segments, state, keep_state)
    return x_BTD, state if keep_state else None

  def step(self, x_BD: Array, position_B: Array, state: PyTree) -> tuple[Array, PyTree]:
    """One token of `__call__`."""
    return self._run(Layer.step, x_BD, position_B, state, True)

  def _run(
      self, call: LayerCall, x: Array, context: PyTree, state: PyTree, keep_state: bool
  ) -> tuple[Array, PyTree]:
    keep: Remat = lambda f: f  # noqa: E731
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    again: Any = functools.partial(
        jax.checkpoint, policy=policy if self.remat == "minimal" else None
    )
    recompute = keep if self.remat == "none" else again

    def chain(
        layers: Sequence[Layer], x: Array, context: PyTree, bank: Bank,
        states: Sequence[PyTree], remat: Remat,
    ) -> tuple[Array, Bank, list[PyTree]]:
      """Runs layers one after the other; the bank holds the last m, nearest first."""
      after = []
      for layer, layer_state in zip(layers, states, strict=True):
        graph, params = nnx.split(layer)

        def apply(
            params: PyTree, x: Array, context: PyTree, layer_state: PyTree, bank: Bank,
            graph: Any = graph,
        ) -> tuple[Array, PyTree, Shared]:
          x, output = call(nnx.merge(graph, params), x, context, layer_state, bank)
          return x, output.state if keep_state else None, output.shared

        x, layer_state, shared = remat(apply)(params, x, context, layer_state, bank)
        after.append(layer_state)
        bank = (shared, *bank)[: self.depth]
      return x, bank, after

    def head(graph: Any, params: PyTree, x: Array, context: PyTree, states: PyTree) -> PyTree:
      return chain(nnx.merge(graph, params), x, context, (), states, recompute)

    if self.remat == "full" and self.num_blocks:  # As a super-block.
      head = jax.checkpoint(head, static_argnums=0)
    x, bank, head_states = head(*nnx.split(self.head), x, context, state["head"])
    if not self.num_blocks:
      return x, {"head": head_states, "blocks": []}

    graph: Any
    graph, params = nnx.split(self.blocks)
    pattern = len(self.blocks)

    def unit(
        params: PyTree, states: PyTree, context: PyTree, x: Array, bank: Bank
    ) -> tuple[Array, Bank, PyTree]:
      within = recompute if computed_again and pattern > 1 else keep
      return chain(nnx.merge(graph, params), x, context, bank, states, within)

    def block(carry: tuple[Array, Bank], inputs: PyTree) -> tuple[tuple[Array, Bank], PyTree]:
      (x, bank), (params, states) = carry, inputs
      if computed_again:
        fresh = min(pattern, self.depth)
        x, bank, after = scan_layers(unit, params, states, context, x, bank, fresh)
        return (x, bank), after
      after = []
      for index in range(self.repeats):
        one_params, one_states = jax.tree.map(lambda leaf, i=index: leaf[i], inputs)
        x, bank, states = unit(one_params, one_states, context, x, bank)
        after.append(states)
      return (x, bank), jax.tree.map(lambda *leaves: jnp.stack(leaves), *after)

    computed_again = self.remat in ("reads", "full")
    inputs = params, state["blocks"]
    if self.remat == "reads" or (computed_again and self.repeats == 1):
      (x, _), after = block((x, bank), inputs)
      return x, {"head": head_states, "blocks": after}
    if self.remat != "none":
      # Only a scan's own body may say so: elsewhere the compiler would merge the
      # recomputation with the first computation, and nothing would be saved.
      block = functools.partial(again, prevent_cse=False)(block)
    by_block = jax.tree.map(
        lambda leaf: leaf.reshape(self.num_blocks, self.repeats, *leaf.shape[1:]), inputs
    )
    (x, _), after = jax.lax.scan(block, (x, bank), by_block)
    after = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), after)
    return x, {"head": head_states, "blocks": after}

  def init_state(self, batch: int) -> PyTree:
    """The state before the first token."""
    stacked = [
        jax.tree.map(
            lambda x: jnp.broadcast_to(x[None], (self.num_blocks * self.repeats, *x.shape)),
            layer.mixer.init_state(batch),
        )
        for layer in self.blocks
    ]
    return {"head": [layer.mixer.init_state(batch) for layer in self.head], "blocks": stacked}
