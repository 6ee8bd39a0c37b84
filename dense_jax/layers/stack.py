"""The layers of a model: the first ones apart, the rest as a scan over super-blocks.

With dense connections of depth m the first m layers have fewer than m sources, and so
other parameters; they (or all below `dense.start`), and as many more as do not fill a
super-block, are compiled apart (`head`). All others repeat one super-block of b layers,
whose parameters are stacked along a leading axis (`blocks`, b modules). The scan carries
the last m layers' shared states; with b >= m they are saved once a super-block, not once
a layer.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dense_jax.config import ModelConfig
from dense_jax.layers.dense_connection import Shared
from dense_jax.layers.linear import RMSNorm
from dense_jax.layers.mixer import Mixer, MixerOutput
from dense_jax.types import Array, PyTree, Segments

MixerFactory = Callable[..., Mixer]
Bank = tuple[Shared, ...]
LayerCall = Callable[["Layer", Array, PyTree, Bank], tuple[Array, MixerOutput]]
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
    x = x + output.y
    if hasattr(self, "feed_forward"):
      x = x + self.feed_forward(self.ffn_norm(x))
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
    return self._join(x_BD, self.mixer.step(self.norm(x_BD), position_B, state, shallow))


def block_sizes(config: ModelConfig) -> tuple[int, int, int]:
  """Layers apart, layers of a super-block, super-blocks."""
  dense, layers = config.dense, config.layers
  if dense.depth and dense.inject == "state" and dense.source == "fused":
    return layers, 0, 0  # Each layer reads a longer chain than the one below.
  apart, stride = (max(dense.depth, dense.start), dense.stride) if dense.depth else (0, 1)
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

    def make(index: int, key: Array) -> Layer:
      sources = config.dense.sources(index)
      return Layer(config, mixer, feed_forward, sources=sources, rngs=nnx.Rngs(key))

    def make_stacked(index: int) -> Layer:
      keys = jax.random.split(rngs.params(), self.num_blocks)
      graph = nnx.split(nnx.eval_shape(lambda: make(index, jax.random.key(0))))[0]
      return nnx.merge(graph, jax.vmap(lambda key: nnx.split(make(index, key))[1])(keys))

    self.head = nnx.List([make(index, rngs.params()) for index in range(head)])
    self.blocks = nnx.List([make_stacked(head + index) for index in range(block)])

  def __call__(
      self, x_BTD: Array, segments: Segments, state: PyTree | None
  ) -> tuple[Array, PyTree]:
    """Runs a sequence from `state` (None: a fresh one); returns x_BTD and the state after."""
    if state is None:
      state = {"head": [None] * len(self.head), "blocks": [None] * len(self.blocks)}
    return self._run(
        lambda layer, x, layer_state, bank: layer(x, segments, layer_state, bank), x_BTD, state
    )

  def step(self, x_BD: Array, position_B: Array, state: PyTree) -> tuple[Array, PyTree]:
    """One token of `__call__`."""
    return self._run(
        lambda layer, x, layer_state, bank: layer.step(x, position_B, layer_state, bank),
        x_BD, state,
    )

  def _run(self, call: LayerCall, x: Array, state: PyTree) -> tuple[Array, PyTree]:
    def chain(
        layers: Sequence[Layer], x: Array, bank: Bank, states: Sequence[PyTree], remat: Remat
    ) -> tuple[Array, Bank, list[PyTree]]:
      """Runs layers one after the other; the bank holds the last m, nearest first."""
      after = []
      for layer, layer_state in zip(layers, states, strict=True):
        graph, params = nnx.split(layer)

        def apply(
            params: PyTree, x: Array, layer_state: PyTree, bank: Bank, graph: Any = graph
        ) -> tuple[Array, PyTree, Shared]:
          x, output = call(nnx.merge(graph, params), x, layer_state, bank)
          return x, output.state, output.shared(self.inject)

        x, layer_state, shared = remat(apply)(params, x, layer_state, bank)
        after.append(layer_state)
        bank = (shared, *bank)[: self.depth]
      return x, bank, after

    minimal = {"policy": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    arguments = {"none": None, "minimal": minimal, "full": {}}[self.remat]
    keep: Remat = lambda f: f  # noqa: E731
    recompute: Remat = keep if arguments is None else functools.partial(jax.checkpoint, **arguments)
    x, bank, head_states = chain(self.head, x, (), state["head"], recompute)
    if not self.num_blocks:
      return x, {"head": head_states, "blocks": []}

    graph: Any
    graph, params = nnx.split(self.blocks)
    within = recompute if self.remat == "full" else keep

    def body(carry: tuple[Array, Bank], inputs: PyTree) -> tuple[tuple[Array, Bank], PyTree]:
      (x, bank), (block_params, block_states) = carry, inputs
      x, bank, after = chain(nnx.merge(graph, block_params), x, bank, block_states, within)
      return (x, bank), after

    if arguments is not None:
      # Only a scan's own body may say so: elsewhere the compiler would merge the
      # recomputation with the first computation, and nothing would be saved.
      body = jax.checkpoint(body, prevent_cse=False, **arguments)
    (x, _), block_states = jax.lax.scan(body, (x, bank), (params, state["blocks"]))
    return x, {"head": head_states, "blocks": block_states}

  def init_state(self, batch: int) -> PyTree:
    """The state before the first token."""
    stacked = [
        jax.tree.map(
            lambda x: jnp.broadcast_to(x[None], (self.num_blocks, *x.shape)),
            layer.mixer.init_state(batch),
        )
        for layer in self.blocks
    ]
    return {"head": [layer.mixer.init_state(batch) for layer in self.head], "blocks": stacked}
