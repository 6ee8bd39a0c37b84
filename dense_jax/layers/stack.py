"""The layers of a model: the first ones apart, the others as a scan over a repeated pattern."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dense_jax.batch import Segments, Token
from dense_jax.config import ModelConfig
from dense_jax.layers.dense.connection import Shared
from dense_jax.layers.layer import FeedForwardFactory, Layer, MixerFactory
from dense_jax.layers.layer_scan import scan_layers
from dense_jax.layers.metrics import Aux, collecting
from dense_jax.types import Array, PyTree

Bank = tuple[Shared, ...]
"""What shallow layers share: the nearest first, with dense.reads=first the lowest first."""

# The most multiplications a number of a matmul whose result remat="minimal" computes again.
LOW_RANK = 128


@dataclasses.dataclass(frozen=True)
class LayerPlan:
  """The division of a model's layers into those compiled apart and those scanned.

  Layers are numbered from 0. Layers `prefix` and above are scanned and repeat one pattern.

  Attributes:
    prefix: the number of first layers, which are compiled apart.
    pattern: the number of layers after which the kinds of layers repeat; 0 means that nothing is
      scanned.
    repeats: repetitions of the pattern in a super-block.
    super_blocks: the number of super-blocks.
  """

  prefix: int
  pattern: int = 0
  repeats: int = 0
  super_blocks: int = 0

  @property
  def rows(self) -> int:
    """R: the repetitions of the pattern, which are the leading axis of a scanned parameter."""
    return self.repeats * self.super_blocks

  def layers(self, position: int) -> range:
    """Returns the layers at a position of the pattern, in the order of the leading axis."""
    return range(self.prefix + position, self.prefix + self.rows * self.pattern, self.pattern)


def plan_layers(config: ModelConfig) -> LayerPlan:
  """Divides a model's layers into those compiled apart and super-blocks of `block_layers`.

  The layers below the first one that has all its m sources are compiled apart, because their
  parameters differ, and so are the layers that are left over when super-blocks are filled.
  """
  dense, layers = config.dense, config.layers
  if dense.depth and dense.inject == "state" and dense.source == "fused":
    return LayerPlan(layers)  # Each layer reads a longer chain than the one below.
  apart, pattern = (max(dense.first_full, dense.start), dense.stride) if dense.depth else (0, 1)
  block = config.block_layers or -(-max(dense.reach, 1) // pattern) * pattern
  super_blocks = (layers - apart) // block
  if super_blocks < 2:  # A scan of one step would only hide the layers.
    return LayerPlan(layers)
  return LayerPlan(layers - super_blocks * block, pattern, block // pattern, super_blocks)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackState:
  """The states of all mixers.

  Attributes:
    prefix_layers: the state of each layer compiled apart.
    scanned_layers: the state of each layer of the pattern, stacked [R, ...].
  """

  prefix_layers: tuple[PyTree, ...]
  scanned_layers: tuple[PyTree, ...]

  def rows(self, index_B: Array) -> "StackState":
    """Returns the state of the rows with these indices, in this order; one may occur often."""
    return StackState(
        jax.tree.map(lambda x: jnp.take(x, index_B, axis=0), self.prefix_layers),
        jax.tree.map(lambda x: jnp.take(x, index_B, axis=1), self.scanned_layers),
    )


class _After(NamedTuple):
  """The results of a layer, or of several stacked, besides x and what it shares.

  Attributes:
    state: the mixer's state; None means that it is not kept.
    aux: the layer's metrics; empty if they are not measured.
  """

  state: PyTree
  aux: Aux


@dataclasses.dataclass(frozen=True)
class _Wanted:
  """The optional results that a call returns: the state, and the metrics."""

  state: bool
  aux: bool


class Stack(nnx.Module):
  """All layers of a model.

  With dense connections of depth m the first layers have fewer than m sources, and so other
  parameters: they are compiled apart (`prefix_layers`). All others repeat one pattern of
  `dense.stride` layers. Their parameters are stacked along a leading axis (`scanned_layers`,
  one module for each layer of the pattern), and a loop runs over super-blocks of
  b = `block_layers` layers, with what the last m layers share in its carry.

  The backward pass keeps and recomputes the following, by `config.model.remat`. Here x is a layer's
  input, [B, T, D], and s is what deeper layers read of a layer.

  | remat   | kept                               | computed again            | cost             |
  |---------|------------------------------------|---------------------------|------------------|
  | none    | all intermediate values            | nothing                   | memory           |
  | minimal | per super-block: x, m times s, and | elementwise operations of | the elementwise  |
  |         | the results of its matmuls, but    | a super-block, low-rank   | part of a pass   |
  |         | low-rank ones                      | matmuls                   |                  |
  | reads   | per layer: x and s                 | one layer at a time       | one forward pass |
  | full    | per super-block: x and m times s;  | a super-block, and in it  | two forward      |
  |         | in one super-block at a time: as   | one layer at a time       | passes           |
  |         | "reads"                            |                           |                  |

  "reads" and "full" run the layers by `scan_layers`, which keeps each s once; a plain scan keeps
  its carry, m of them, at every step. If a super-block holds the pattern only once, "full" differs
  from "reads" only in the prefix, which it recomputes as a whole. In every mode but "none", prefix
  layers are checkpointed one by one.
  """

  def __init__(
      self,
      config: ModelConfig,
      mixer: MixerFactory,
      feed_forward: FeedForwardFactory | None,
      *,
      rngs: nnx.Rngs,
  ) -> None:
    self.dense = config.dense
    self.remat = config.remat
    self.plan = plan_layers(config)

    key = rngs.params()

    def make(layer: int, like: int) -> Layer:
      """Makes a layer of the kind of layer `like`, a Python int; `layer` may be traced."""
      sources = config.dense.sources(like)
      own = nnx.Rngs(jax.random.fold_in(key, layer))
      return Layer(config, mixer, feed_forward, sources=sources, rngs=own)

    def make_stacked(layers: range) -> Layer:
      first = layers[0]
      graph = nnx.split(nnx.eval_shape(lambda: make(first, first)))[0]
      params = jax.vmap(lambda layer: nnx.split(make(layer, first))[1])(jnp.asarray(layers))
      return nnx.merge(graph, params)

    self.prefix_layers = nnx.List([make(layer, layer) for layer in range(self.plan.prefix)])
    self.scanned_layers = nnx.List([
        make_stacked(self.plan.layers(position)) for position in range(self.plan.pattern)
    ])

  def __call__(
      self, x: Array, tokens: Segments | Token, state: StackState | None, *,
      keep_state: bool = True, measure: bool = False,
  ) -> tuple[Array, StackState | None, list[Aux]]:
    """Runs a sequence, or one token of decoding, through all layers.

    Args:
      x: the embedded tokens, [B, T, D], or [B, D] for a Token.
      tokens: the sequence's documents, or the token's position.
      state: the state before the first token; None means a fresh one, and is not allowed for a
        Token.
      keep_state: whether to return the state after the last token.
      measure: collects what layers record (`dense_jax.layers.metrics`).

    Returns:
      The residual stream after the last layer; the state, or None without `keep_state`; and
      each layer's metrics, which are empty without `measure`.
    """
    if state is None:
      state = StackState((None,) * len(self.prefix_layers), (None,) * len(self.scanned_layers))
    wanted = _Wanted(keep_state, measure)
    x, bank, prefix = self._prefix(x, tokens, state.prefix_layers, wanted)
    scanned: tuple[_After, ...] = ()
    if self.scanned_layers:
      run = self._recomputed if self.remat in ("reads", "full") else self._scanned
      x, scanned = run(x, tokens, bank, state.scanned_layers, wanted)
    after = StackState(
        tuple(layer.state for layer in prefix), tuple(layer.state for layer in scanned)
    )
    return x, after if keep_state else None, self._by_layer(prefix, scanned)

  def _unrolled(
      self, layers: Sequence[Layer], x: Array, tokens: Segments | Token, bank: Bank,
      states: Sequence[PyTree], wanted: _Wanted, *, checkpoint: bool,
  ) -> tuple[Array, Bank, tuple[_After, ...]]:
    """Runs layers one after the other; `checkpoint` recomputes each in the backward pass."""
    after = []
    for layer, state in zip(layers, states, strict=True):
      graph, params = nnx.split(layer)
      run: Callable[..., Any] = functools.partial(_run_layer, graph, wanted)
      if checkpoint:
        run = jax.checkpoint(run, policy=self._policy)
      x, shared, layer_after = run(params, x, tokens, state, self._read(bank))
      after.append(layer_after)
      bank = self._with(bank, shared)
    return x, bank, tuple(after)

  def _read(self, bank: Bank) -> Bank:
    """Returns the entries of the bank that the next layer reads."""
    if self.dense.reads == "first":
      return bank
    return tuple(bank[distance - 1] for distance in self.dense.distances if distance <= len(bank))

  def _with(self, bank: Bank, shared: Shared) -> Bank:
    """Returns the bank after a layer, with what later layers may read."""
    if self.dense.reads == "first":
      return (*bank, shared)[: self.dense.depth]
    return (shared, *bank)[: self.dense.reach]

  def _prefix(
      self, x: Array, tokens: Segments | Token, states: Sequence[PyTree], wanted: _Wanted
  ) -> tuple[Array, Bank, tuple[_After, ...]]:
    """Runs the layers that are compiled apart."""
    graph: Any
    graph, params = nnx.split(self.prefix_layers)

    def run(params: PyTree, x: Array, tokens: Segments | Token, states: PyTree) -> PyTree:
      return self._unrolled(
          nnx.merge(graph, params), x, tokens, (), states, wanted,
          checkpoint=self.remat != "none",
      )

    if self.remat == "full" and self.scanned_layers:
      run = jax.checkpoint(run)  # Like a super-block.
    return run(params, x, tokens, states)

  def _scanned(
      self, x: Array, tokens: Segments | Token, bank: Bank, states: PyTree, wanted: _Wanted
  ) -> tuple[Array, tuple[_After, ...]]:
    """Runs the scanned layers with remat "none" or "minimal": a loop over super-blocks."""
    graph: Any
    graph, params = nnx.split(self.scanned_layers)

    def super_block(
        carry: tuple[Array, Bank], inputs: PyTree
    ) -> tuple[tuple[Array, Bank], tuple[_After, ...]]:
      x, bank = carry
      after = []
      for repeat in range(self.plan.repeats):
        row_params, row_states = jax.tree.map(lambda leaf, i=repeat: leaf[i], inputs)
        x, bank, row_after = self._unrolled(
            nnx.merge(graph, row_params), x, tokens, bank, row_states, wanted, checkpoint=False
        )
        after.append(row_after)
      return (x, bank), jax.tree.map(lambda *leaves: jnp.stack(leaves), *after)

    return self._over_super_blocks(super_block, x, bank, (params, states))

  def _recomputed(
      self, x: Array, tokens: Segments | Token, bank: Bank, states: PyTree, wanted: _Wanted
  ) -> tuple[Array, tuple[_After, ...]]:
    """Runs the scanned layers with remat "reads" (one loop) or "full" (a loop in a loop)."""
    graph: Any
    graph, params = nnx.split(self.scanned_layers)
    pattern = self.plan.pattern

    def row(
        params: PyTree, states: PyTree, tokens: Segments | Token, x: Array, bank: Bank
    ) -> tuple[Array, Bank, tuple[_After, ...]]:
      # `scan_layers` recomputes a whole row; `checkpoint` recomputes one layer of it at a time.
      return self._unrolled(
          nnx.merge(graph, params), x, tokens, bank, states, wanted, checkpoint=pattern > 1
      )

    def rows(
        carry: tuple[Array, Bank], inputs: PyTree
    ) -> tuple[tuple[Array, Bank], tuple[_After, ...]]:
      (x, bank), (params, states) = carry, inputs
      fresh = min(pattern, self.dense.reach)  # 0 with reads=first: the bank no longer changes.
      x, bank, after = scan_layers(row, params, states, tokens, x, bank, fresh)
      return (x, bank), after

    if self.remat == "full" and self.plan.repeats > 1:
      return self._over_super_blocks(rows, x, bank, (params, states))
    (x, _), after = rows((x, bank), (params, states))
    return x, after

  def _over_super_blocks(
      self, super_block: Callable[..., Any], x: Array, bank: Bank, inputs: PyTree
  ) -> tuple[Array, tuple[_After, ...]]:
    """Scans over super-blocks; `inputs` are stacked [R, ...]."""
    fixed = self.dense.reads == "first"

    def body(carry: tuple[Array, Bank], inputs: PyTree) -> tuple[tuple[Array, Bank], PyTree]:
      # The carry is kept for each super-block: a bank that does not change is no part of it.
      x, moving = carry
      (x, moving), after = super_block((x, bank if fixed else moving), inputs)
      return (x, () if fixed else moving), after

    if self.remat != "none":
      # Only a scan's own body may have prevent_cse=False: elsewhere the compiler would merge the
      # recomputation with the first computation, and nothing would be saved.
      body = jax.checkpoint(body, policy=self._policy, prevent_cse=False)
    shape = self.plan.super_blocks, self.plan.repeats
    inputs = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), inputs)
    (x, _), after = jax.lax.scan(body, (x, () if fixed else bank), inputs)
    return x, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), after)

  @property
  def _policy(self) -> Callable[..., bool] | None:
    """The policy of `jax.checkpoint`; None means that it keeps nothing but its arguments."""
    return wide_products if self.remat == "minimal" else None

  def _by_layer(self, prefix: Sequence[_After], scanned: Sequence[_After]) -> list[Aux]:
    """Returns the metrics of each layer, in order."""
    aux = [layer.aux for layer in prefix]
    for row in range(self.plan.rows):
      aux += [{name: value[row] for name, value in layer.aux.items()} for layer in scanned]
    return aux

  def init_state(self, batch: int) -> StackState:
    """Returns the state before the first token."""
    stacked = tuple(
        jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf[None], (self.plan.rows, *leaf.shape)),
            layer.mixer.init_state(batch),
        )
        for layer in self.scanned_layers
    )
    return StackState(
        tuple(layer.mixer.init_state(batch) for layer in self.prefix_layers), stacked
    )


def wide_products(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
  """Returns whether a checkpoint keeps an operation's result: that of a matmul, but a low-rank one.

  For at most LOW_RANK multiplications a number, as in maps to gates and step sizes, computing it
  again costs less than moving it to memory and back.
  """
  if not jax.checkpoint_policies.dots_with_no_batch_dims_saveable(
      primitive, *arguments, **parameters
  ):
    return False
  (contracted, _), _ = parameters["dimension_numbers"]
  return math.prod(arguments[0].shape[axis] for axis in contracted) > LOW_RANK


def _run_layer(
    graph: Any, wanted: _Wanted, params: PyTree, x: Array, tokens: Segments | Token,
    state: PyTree, bank: Bank,
) -> tuple[Array, Shared, _After]:
  """Runs one layer, given as its nnx graph definition and its parameters."""
  layer = nnx.merge(graph, params)
  if not wanted.aux:
    x, state, shared = layer(x, tokens, state, bank)
    return x, shared, _After(state if wanted.state else None, {})
  with collecting() as aux:
    x, state, shared = layer(x, tokens, state, bank)
  return x, shared, _After(state if wanted.state else None, aux)
