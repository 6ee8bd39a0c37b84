"""One language model for all families: embedding, stack, norm, head."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dense_jax.batch import Batch, Segments, Token
from dense_jax.config import ModelConfig, invalid
from dense_jax.layers.linear import RMSNorm, normal, parameter
from dense_jax.layers.metrics import Aux
from dense_jax.layers.mixer import cast_recurrences
from dense_jax.layers.stack import Stack, StackState
from dense_jax.models.registry import family
from dense_jax.ops import resolver
from dense_jax.ops.cross_entropy import (
  chunked_argmax,
  chunked_cross_entropy,
  summed_cross_entropy,
)
from dense_jax.sharding import constrain, constrain_tokens
from dense_jax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelState:
  """The state that a model carries from one token to the next; its size does not grow.

  Attributes:
    position_B: int32, the next token's position in its document.
    layers: the stack's state, recurrences' in `config.model.state_dtype`; None means that it was
      not kept.
  """

  position_B: Array
  layers: StackState | None

  def rows(self, index_B: Array) -> "ModelState":
    """Returns the state of the rows with these indices, in this order; one may occur often.

    A state that several continuations share is copied in this way.
    """
    layers = None if self.layers is None else self.layers.rows(index_B)
    return ModelState(jnp.take(self.position_B, index_B, axis=0), layers)


def _check_shape(tokens: Array, axes: str) -> None:
  if tokens.ndim != axes.count(",") + 1 or not tokens.size:
    raise invalid("the tokens' shape", tokens.shape, f"{axes}, none of them 0")


class LanguageModel(nnx.Module):
  """A language model: token ids to next-token logits.

  Its methods are pure functions, which work with and without jit. They raise an InputError if the
  tokens have another number of axes, or none are there. Ids are not checked, as only the device
  knows their values: one from V on is taken as V - 1.

  Example:
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    logits_BTV = model(tokens_BT)
    state, logits_BV = model.step(model.init_state(batch_size), tokens_B)
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
    if not config.vocab_size:
      raise invalid("config.model.vocab_size", 0, "an integer >= 1 (a tokenizer's size)")
    self.config = config
    self.dtype, self.state_dtype = jnp.dtype(config.dtype), jnp.dtype(config.state_dtype)
    self.logit_form = resolver.logit_form()
    self.embedding = parameter(
        rngs, (config.vocab_size, config.width), ("vocab", "embed"), normal(0.02)
    )
    chosen = family(config.family)
    self.stack = Stack(config, chosen.mixer, chosen.feed_forward, rngs=rngs)
    self.norm = RMSNorm(config.width, axis="embed", epsilon=config.norm_eps, rngs=rngs)
    if not config.tie_embeddings:
      self.head = parameter(
          rngs, (config.width, config.vocab_size), ("embed", "vocab"), normal(0.02)
      )

  def __call__(self, tokens_BT: Array, segments: Segments | None = None) -> Array:
    """Returns float32 logits_BTV of sequences; without segments each row is one document."""
    hidden_BTD, _ = self.hidden(tokens_BT, segments)
    return self.logits(hidden_BTD)

  def hidden(
      self, tokens_BT: Array, segments: Segments | None = None, state: ModelState | None = None
  ) -> tuple[Array, ModelState]:
    """Runs sequences; returns the last norm's output hidden_BTD, and the state to go on from.

    Args:
      tokens_BT: int32 token ids.
      segments: documents and padding; None means that each row is one document, which continues
        from `state`.
      state: the state before the first token; None means a fresh one.
    """
    hidden_BTD, state, _ = self._run(tokens_BT, segments, state)
    return hidden_BTD, state

  def _run(
      self, tokens_BT: Array, segments: Segments | None, state: ModelState | None, *,
      keep_state: bool = True, measure: bool = False,
  ) -> tuple[Array, ModelState, list[Aux]]:
    """Runs `hidden`, and returns each layer's metrics too; the two flags are the stack's."""
    _check_shape(tokens_BT, "[B, T]")
    batch, time = tokens_BT.shape
    before_B = jnp.zeros(batch, jnp.int32) if state is None else state.position_B
    if segments is None:
      first_B1 = jnp.zeros((1, 1), jnp.int32) if state is None else before_B[:, None]
      segments = Segments(first_B1 + jnp.arange(time, dtype=jnp.int32)[None])
    # Gathered: XLA cannot look up rows of a sharded table while another mesh axis is manual.
    table_VD = constrain(self.embedding[...].astype(self.dtype), None, None)
    x_BTD = constrain_tokens(table_VD[tokens_BT], "embed")
    x_BTD, layers, aux = self.stack(
        x_BTD, segments, None if state is None else cast_recurrences(state.layers, jnp.float32),
        keep_state=keep_state, measure=measure,
    )
    if keep_state:
      layers = cast_recurrences(layers, self.state_dtype)
    position_B = before_B + time
    if segments.valid_BT is not None:
      # Padding does not count: the last token that is not padding has the last position.
      last_B1 = jnp.sum(segments.valid_BT, axis=1, keepdims=True) - 1
      last_position_B = jnp.take_along_axis(segments.positions_BT, last_B1, axis=1)[:, 0]
      position_B = jnp.where(last_B1[:, 0] < 0, before_B, last_position_B + 1)
    return constrain_tokens(self.norm(x_BTD), "embed"), ModelState(position_B, layers), aux

  def head_DV(self) -> Array:
    """Returns the head's matrix, float32 [D, V]."""
    return self.embedding[...].T if self.config.tie_embeddings else self.head[...]

  def logits(self, hidden: Array) -> Array:
    """Maps [..., D] to float32 logits [..., V]."""
    head_DV = self.head_DV().astype(hidden.dtype)
    return jnp.dot(hidden, head_DV, preferred_element_type=jnp.float32)

  def token_losses(self, batch: Batch, *, chunk: int) -> tuple[Array, Array]:
    """Returns nll_BT and log_z_BT in nats, float32, making `chunk` tokens of logits at a time."""
    hidden_BTD, _, _ = self._run(batch.tokens_BT, batch.segments, None, keep_state=False)
    return chunked_cross_entropy(
        hidden_BTD, self.head_DV(), batch.targets_BT, chunk=chunk, form=self.logit_form
    )

  def most_likely(self, batch: Batch, *, chunk: int) -> Array:
    """Returns the most likely next id at each token, int32 [B, T]; `chunk` as `token_losses`."""
    hidden_BTD, _, _ = self._run(batch.tokens_BT, batch.segments, None, keep_state=False)
    return chunked_argmax(hidden_BTD, self.head_DV(), chunk=chunk)

  def summed_losses(
      self, batch: Batch, *, z_loss: float, chunk: int, measure: bool = False
  ) -> tuple[Array, Array, list[Aux]]:
    """Sums the objective, and the cross-entropy in it, over a batch's targets, in nats.

    The objective is cross-entropy + z_loss * (log Z)^2 for each target (arXiv 2204.02311,
    section 5).

    Args:
      batch: rows of tokens; targets outside its loss mask are left out.
      z_loss: the weight of (log Z)^2.
      chunk: tokens of a row whose logits exist at one time.
      measure: collects each layer's metrics.

    Returns:
      Both sums, float32 scalars, of which the second has no gradient; and each layer's metrics,
      which are empty without `measure`.
    """
    hidden_BTD, _, aux = self._run(
        batch.tokens_BT, batch.segments, None, keep_state=False, measure=measure
    )
    total, nll = summed_cross_entropy(
        hidden_BTD, self.head_DV(), batch.targets_BT, batch.loss_mask_BT.astype(jnp.float32),
        z_loss=z_loss, chunk=chunk, form=self.logit_form,
    )
    return total, nll, aux

  def prefill(
      self, tokens_BT: Array, segments: Segments | None = None, state: ModelState | None = None
  ) -> tuple[ModelState, Array]:
    """Reads prompts in parallel; returns the state after them and the next token's logits_BV.

    Prompts of different lengths are padded on the right with segment id 0.
    """
    hidden_BTD, state = self.hidden(tokens_BT, segments, state)
    last_BD = hidden_BTD[:, -1]
    if segments is not None and segments.valid_BT is not None:
      index_B = jnp.maximum(jnp.sum(segments.valid_BT, axis=1) - 1, 0)
      last_BD = jnp.take_along_axis(hidden_BTD, index_B[:, None, None], axis=1)[:, 0]
    return state, self.logits(last_BD)

  def init_state(self, batch_size: int) -> ModelState:
    """Returns the state before a document's first token."""
    layers = cast_recurrences(self.stack.init_state(batch_size), self.state_dtype)
    return ModelState(jnp.zeros(batch_size, jnp.int32), layers)

  def step(self, state: ModelState, tokens_B: Array) -> tuple[ModelState, Array]:
    """Reads one token of each row; returns the next state and float32 logits_BV."""
    _check_shape(tokens_B, "[B]")
    x_BD = self.embedding[...].astype(self.dtype)[tokens_B]
    layers = cast_recurrences(state.layers, jnp.float32)
    x_BD, layers, _ = self.stack(x_BD, Token(state.position_B), layers)
    layers = cast_recurrences(layers, self.state_dtype)
    return ModelState(state.position_B + 1, layers), self.logits(self.norm(x_BD))
