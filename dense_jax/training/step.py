"""The train step: a pure function of (state, batch), compiled with shardings and donation."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dense_jax import sharding
from dense_jax.batch import Batch, Segments
from dense_jax.config import ExperimentConfig
from dense_jax.models.language_model import LanguageModel
from dense_jax.models.params import (
  abstract_model,
  get_params,
  init_params,
  logical_axes,
  with_params,
)
from dense_jax.training.losses import loss_sum
from dense_jax.training.optimizer import learning_rate, make_optimizer
from dense_jax.types import Array, Params, PyTree

Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a step changes.

  Attributes:
    step: int32, updates done.
    params: float32.
    opt_state: optax's.
  """

  step: Array
  params: Params
  opt_state: PyTree


def _gradients(
    model: LanguageModel, params: Params, batch: Batch, config: ExperimentConfig
) -> tuple[Params, Array, Array]:
  """Gradients and cross-entropy, both a mean over all targets, and the targets' number.

  Accumulation divides by the whole batch's targets, so that it changes no result.
  """
  train = config.train
  targets = jnp.maximum(jnp.sum(batch.loss_mask_BT, dtype=jnp.float32), 1.0)

  def objective(params: Params, part: Batch, targets: Array) -> tuple[Array, Array]:
    total, nll = loss_sum(
        with_params(model, params), part, z_loss=train.z_loss, chunk=train.loss_chunk
    )
    return total / targets, nll / targets

  @sharding.sum_over_sequence
  def gradient(whole: tuple[Params, Array], part: Batch) -> tuple[Params, Array]:
    params, targets = whole
    return jax.grad(objective, has_aux=True)(params, part, targets)

  whole = params, targets
  if train.accumulate == 1:
    gradients, loss = gradient(whole, batch)
    return gradients, loss, targets

  def body(carry: PyTree, part: Batch) -> tuple[PyTree, None]:
    return jax.tree.map(jnp.add, carry, gradient(whole, part)), None

  # Every accumulate-th row, so that each device keeps to the rows that it has.
  parts = jax.tree.map(
      lambda x: x.reshape(-1, train.accumulate, *x.shape[1:]).swapaxes(0, 1), batch
  )
  zero = (jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.float32))
  (gradients, loss), _ = jax.lax.scan(body, zero, parts)
  return gradients, loss, targets


class Trainer:
  """A configuration's compiled train step, and states for it, on a mesh.

  Attributes:
    model: the abstract model.
    state_shapes: the state's shapes, dtypes and shardings.
    train_step: (state, batch) -> (state, metrics); donates the state. Metrics, float32
      scalars: loss (mean nats a target), grad_norm, learning_rate, targets.
  """

  def __init__(self, config: ExperimentConfig, mesh: Mesh) -> None:
    """Compiles nothing yet.

    Raises:
      InputError: the mesh does not divide the batch or a parameter.
    """
    train = config.train
    sharding.check_batch(train.batch_size, config.data.seq_len, train.accumulate, mesh)
    self.model = abstract_model(config.model)
    shapes = get_params(self.model)
    by_name = sharding.param_shardings(
        logical_axes(self.model), {name: leaf.shape for name, leaf in shapes.items()}, mesh
    )
    everywhere = sharding.replicated(mesh)
    optimizer = make_optimizer(config.optimizer, train.steps, list(shapes))
    schedule = learning_rate(config.optimizer, train.steps)

    def init(key: Array) -> TrainState:
      params = init_params(config.model, key)
      return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
      with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # Kernels ask for it.
        gradients, loss, targets = _gradients(self.model, state.params, batch, config)
      updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
      metrics = {
          "loss": loss,
          "grad_norm": optax.global_norm(gradients),
          "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
          "targets": targets,
      }
      params = optax.apply_updates(state.params, updates)
      return TrainState(state.step + 1, params, opt_state), metrics

    abstract = jax.eval_shape(init, jax.random.key(0))
    opt_shardings = optax.tree_map_params(
        optimizer,
        lambda _, sharded: sharded,
        abstract.opt_state,
        by_name,
        transform_non_params=lambda _: everywhere,
    )
    placed: Any = everywhere  # Shardings stand where the dataclass is annotated with arrays.
    shardings = TrainState(placed, cast(Params, by_name), opt_shardings)
    self.state_shapes: TrainState = jax.tree.map(
        lambda leaf, sharded: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharded),
        abstract,
        shardings,
    )
    self._batch_sharding = sharding.batch_sharding(mesh)
    self._batch_shape = (train.batch_size, config.data.seq_len)
    self._init = jax.jit(init, out_shardings=shardings)
    self.train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]] = jax.jit(
        train_step,
        in_shardings=(shardings, self._batch_sharding),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )

  def init(self, seed: int) -> TrainState:
    """A fresh state, made in place on its devices."""
    return self._init(jax.random.key(seed))

  @functools.cached_property
  def rows(self) -> slice:
    """Of the global batch, those that this process loads."""
    return sharding.local_rows(self._batch_sharding, self._batch_shape)

  def put(self, batch: Batch) -> Batch:
    """A host batch, `rows` of the global one, on the mesh."""
    return jax.tree.map(
        lambda x: sharding.put_rows(x, self.rows, self._batch_shape[0], self._batch_sharding), batch
    )

  def batch_shapes(self, batch_size: int, seq_len: int) -> Batch:
    """A batch's shapes and shardings, to lower the step without one."""
    def shape(dtype: Any) -> Any:
      return jax.ShapeDtypeStruct((batch_size, seq_len), dtype, sharding=self._batch_sharding)

    return Batch(
        shape(jnp.int32), shape(jnp.int32), shape(jnp.bool_),
        Segments(shape(jnp.int32), shape(jnp.int32)),
    )
