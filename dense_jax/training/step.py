"""The train step: a pure function of (state, batch), compiled with shardings and donation."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dense_jax import sharding
from dense_jax.batch import Batch, Segments
from dense_jax.config import ExperimentConfig, ModelConfig
from dense_jax.layers.metrics import Aux
from dense_jax.models.language_model import LanguageModel
from dense_jax.models.params import (
  abstract_model,
  by_layer,
  get_params,
  init_params,
  logical_axes,
  with_params,
)
from dense_jax.models.warm_start import warm_start
from dense_jax.ops import resolver
from dense_jax.training import guard as guards
from dense_jax.training.guard import GuardState
from dense_jax.training.optimizer import learning_rate, make_optimizer
from dense_jax.types import Array, Params, PyTree

_LAYERS = "layers/"

Metrics = dict[str, Array]
Step = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]

@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """The state that a step changes.

  Attributes:
    step: int32 scalar, steps done: updates, and steps that the guard has skipped.
    params: parameters by name, float32.
    opt_state: the state of the optax optimizer.
    ema: the exponential moving average of the parameters, float32, if `train.ema` is above 0.
    guard: the state by which steps are judged, if `guard.skip` is not none.
  """

  step: Array
  params: Params
  opt_state: PyTree
  ema: Params | None = None
  guard: GuardState | None = None

  @property
  def weights(self) -> Params:
    """The parameters that evaluation takes: the average, if there is one."""
    return self.params if self.ema is None else self.ema

  @property
  def updates(self) -> Array:
    """Int32 scalar, updates done. Without a guard it is `step`; the optimizer counts them too."""
    return self.step if self.guard is None else self.opt_state[-1].count


class Inside(NamedTuple):
  """The numbers of one batch, none of which changes anything.

  Attributes:
    loss: the cross-entropy, in mean nats per target.
    aux: each layer's metrics, from the first layer on.
    gradient_norms: the norm of each parameter's gradient, by its name by layer.
  """

  loss: Array
  aux: list[Aux]
  gradient_norms: dict[str, Array]


class _Gradients(NamedTuple):
  """The gradients of a batch, and its figures.

  Attributes:
    gradients: the gradients of the objective, which is a mean over all targets.
    loss: the cross-entropy, in mean nats per target.
    targets: the number of targets.
    aux: each layer's metrics.
  """

  gradients: Params
  loss: Array
  targets: Array
  aux: list[Aux]


def _gradients(
    model: LanguageModel, params: Params, batch: Batch, config: ExperimentConfig, measure: bool
) -> _Gradients:
  """Differentiates the loss of a batch, in `train.accumulate` parts.

  Each part's sums are divided by the number of targets in the whole batch, so that accumulation
  changes no result. A layer's metric is the mean over the parts.
  """
  train = config.train
  targets = jnp.maximum(jnp.sum(batch.loss_mask_BT, dtype=jnp.float32), 1.0)

  def objective(
      params: Params, part: Batch, targets: Array
  ) -> tuple[Array, tuple[Array, list[Aux]]]:
    total, nll, aux = with_params(model, params).summed_losses(
        part, z_loss=train.z_loss, chunk=train.loss_chunk, measure=measure
    )
    return total / targets, (nll / targets, aux)

  def gradient(
      whole: tuple[Params, Array], part: Batch
  ) -> tuple[tuple[Params, Array], list[Aux]]:
    params, targets = whole
    gradients, (loss, aux) = jax.grad(objective, has_aux=True)(params, part, targets)
    return (gradients, loss), aux

  gradient = sharding.sum_over_sequence(gradient, has_aux=True)
  whole = params, targets
  if train.accumulate == 1:
    (gradients, loss), aux = gradient(whole, batch)
    return _Gradients(gradients, loss, targets, aux)

  def body(carry: PyTree, part: Batch) -> tuple[PyTree, list[Aux]]:
    sums, aux = gradient(whole, part)
    return jax.tree.map(jnp.add, carry, sums), aux

  # A part takes every accumulate-th row, so that no row moves to another device.
  parts = jax.tree.map(
      lambda x: x.reshape(-1, train.accumulate, *x.shape[1:]).swapaxes(0, 1), batch
  )
  zero = (jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.float32))
  (gradients, loss), aux = jax.lax.scan(body, zero, parts)
  return _Gradients(gradients, loss, targets, jax.tree.map(jnp.mean, aux))


def _layer_metrics(config: ModelConfig, aux: list[Aux], gradients: Params) -> Metrics:
  """Returns the metrics of each layer, and its gradient's norm, named `layers/<N>/<name>`."""
  of_layer: dict[int, list[Array]] = {}
  for name, gradient in by_layer(config, gradients).items():
    if name.startswith("layers."):
      of_layer.setdefault(int(name.split(".")[1]), []).append(gradient)
  digits = len(str(config.layers))  # So that names sort as numbers do.
  return {
      f"{_LAYERS}{layer:0{digits}}/{name}": value
      for layer, recorded in enumerate(aux)
      for name, value in {
          **recorded, "gradient_norm": optax.global_norm(of_layer[layer])
      }.items()
  }


def has_layers(metrics: Metrics) -> bool:
  """Returns whether a step's metrics include those of its layers."""
  return any(name.startswith(_LAYERS) for name in metrics)


def _averaged(ema: Params, params: Params, decay: float, step: Array) -> Params:
  """Moves an average towards the parameters after update number `step`, counted from 1.

      ema <- d ema + (1 - d) params,    d = min(decay, (1 + step) / (10 + step))

  The first parameters are so forgotten early, whatever the decay.
  """
  # 1 - (1 + step) / (10 + step), without a difference of two numbers near one.
  weight = jnp.maximum(1 - decay, 9 / (10 + step.astype(jnp.float32)))
  return jax.tree.map(lambda mean, new: mean + weight * (new - mean), ema, params)


def placed_shapes(model: LanguageModel, mesh: Mesh) -> Params:
  """Returns the shapes of a model's parameters, with their shardings on a mesh.

  Raises:
    InputError: the mesh does not divide a parameter.
  """
  shapes = get_params(model)
  placed = sharding.param_shardings(
      logical_axes(model), {name: leaf.shape for name, leaf in shapes.items()}, mesh
  )
  return jax.tree.map(
      lambda leaf, sharded: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharded),
      shapes, placed,
  )


class Trainer:
  """The compiled train step of a configuration, and states for it, on a mesh.

  Attributes:
    model: the abstract model.
    state_shapes: the state's shapes, dtypes and shardings.
    train_step: (state, batch) -> (state, metrics); donates the state. The metrics are float32
      scalars: loss (mean nats per target), grad_norm, learning_rate, targets; and those of the
      guard (`dense_jax.training.guard`).
    measured_step: the same update, with the metrics of each layer in addition, named
      `layers/<N>/<name>`: what layers record (`dense_jax.layers.metrics`), and gradient_norm.
    inside: (params, batch) -> `Inside`, to find out what went wrong with a batch.
  """

  def __init__(self, config: ExperimentConfig, mesh: Mesh) -> None:
    """Prepares the step; nothing is compiled yet.

    Raises:
      InputError: the mesh does not divide the batch or a parameter.
    """
    train = config.train
    sharding.check_batch(train.batch_size, config.data.seq_len, train.accumulate, mesh)
    self.model = abstract_model(config.model)
    shapes = placed_shapes(self.model, mesh)
    by_name = {name: leaf.sharding for name, leaf in shapes.items()}
    everywhere = sharding.replicated(mesh)
    optimizer = make_optimizer(config.optimizer, train.steps, list(shapes))
    schedule = learning_rate(config.optimizer, train.steps)

    def init(key: Array) -> TrainState:
      return begin(init_params(config.model, key))

    def begin(params: Params) -> TrainState:
      ema = jax.tree.map(jnp.copy, params) if train.ema else None
      return TrainState(
          jnp.zeros((), jnp.int32), params, optimizer.init(params), ema, guards.begin(config.guard)
      )

    def step(state: TrainState, batch: Batch, measure: bool) -> tuple[TrainState, Metrics]:
      with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # Kernels ask for it.
        gradients, loss, targets, aux = _gradients(
            self.model, state.params, batch, config, measure
        )
      updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
      metrics = {
          "loss": loss,
          "grad_norm": optax.global_norm(gradients),
          "learning_rate": jnp.asarray(schedule(state.updates), jnp.float32),
          "targets": targets,
      }
      if measure:
        metrics |= _layer_metrics(config.model, aux, gradients)
      params = optax.apply_updates(state.params, updates)
      ema = state.ema
      if ema is not None:
        ema = _averaged(ema, params, train.ema, state.updates + 1)
      if state.guard is None:
        return TrainState(state.step + 1, params, opt_state, ema), metrics
      taken, guard = guards.judge(config.guard, state.guard, loss, metrics["grad_norm"])
      params, opt_state, ema = guards.keep(
          taken, (params, opt_state, ema), (state.params, state.opt_state, state.ema)
      )
      after = TrainState(state.step + 1, params, opt_state, ema, guard)
      return after, metrics | guards.metrics(guard)

    abstract = jax.eval_shape(init, jax.random.key(0))
    opt_shardings = optax.tree_map_params(
        optimizer,
        lambda _, sharded: sharded,
        abstract.opt_state,
        by_name,
        transform_non_params=lambda _: everywhere,
    )
    placed: Any = everywhere  # Shardings stand where the dataclass is annotated with arrays.
    ema_shardings = cast(Params, by_name) if train.ema else None
    guard_shardings = jax.tree.map(lambda _: everywhere, abstract.guard)
    shardings = TrainState(
        placed, cast(Params, by_name), opt_shardings, ema_shardings, guard_shardings
    )
    self.state_shapes: TrainState = jax.tree.map(
        lambda leaf, sharded: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharded),
        abstract,
        shardings,
    )
    self._batch_sharding = sharding.batch_sharding(mesh)
    self._batch_shape = (train.batch_size, config.data.seq_len)
    self._measure_every = train.layer_metrics_every
    self._init = jax.jit(init, out_shardings=shardings)

    def init_from(key: Array, params: Params, source: ModelConfig) -> TrainState:
      fresh = init_params(config.model, key)
      return begin(warm_start(source, config.model, params, fresh))

    self._init_from = jax.jit(init_from, static_argnums=2, out_shardings=shardings)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
      return step(state, batch, measure=False)

    def measured_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
      return step(state, batch, measure=True)

    compiled = functools.partial(
        jax.jit,
        in_shardings=(shardings, self._batch_sharding),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
        compiler_options=resolver.training_options(),
    )
    self.train_step: Step = compiled(train_step)
    self.measured_step: Step = compiled(measured_step)

    def inside(params: Params, batch: Batch) -> Inside:
      with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        found = _gradients(self.model, params, batch, config, measure=True)
      norms = jax.tree.map(jnp.linalg.norm, by_layer(config.model, found.gradients))
      return Inside(found.loss, found.aux, norms)

    self.inside = jax.jit(
        inside, in_shardings=(by_name, self._batch_sharding), out_shardings=everywhere,
        compiler_options=resolver.training_options(),
    )

  def step_at(self, step: int) -> Step:
    """Returns the function for update number `step`, counted from 1."""
    measured = self._measure_every and step % self._measure_every == 0
    return self.measured_step if measured else self.train_step

  def compile(self, state: TrainState, batch: Batch) -> None:
    """Compiles all functions that `step_at` may return, so that no later step has to wait."""
    functions: list[Any] = [self.train_step]
    if self._measure_every:
      functions.append(self.measured_step)
    for function in functions:
      function.lower(state, batch).compile()

  def init(self, seed: int) -> TrainState:
    """Makes a fresh state in place on its devices."""
    return self._init(jax.random.key(seed))

  def init_from(self, seed: int, source: ModelConfig, params: Params) -> TrainState:
    """Makes the state before the first step of a model that begins as another one.

    Args:
      seed: of the parameters that the other model does not have.
      source: the other model's configuration.
      params: its parameters, on the trainer's mesh (`placed_shapes`).

    Raises:
      InputError: the model cannot begin as the other one; see `warm_start`.
    """
    return self._init_from(jax.random.key(seed), params, source)

  @functools.cached_property
  def rows(self) -> slice:
    """The rows of the global batch that this process loads."""
    return sharding.local_rows(self._batch_sharding, self._batch_shape)

  def put(self, batch: Batch) -> Batch:
    """Places a host batch, which holds the `rows` of the global batch, on the mesh."""
    return jax.tree.map(
        lambda x: sharding.put_rows(x, self.rows, self._batch_shape[0], self._batch_sharding), batch
    )

  def batch_shapes(self, batch_size: int, seq_len: int) -> Batch:
    """Returns the shapes and shardings of a batch, to lower the step without one."""
    def shape(dtype: Any) -> Any:
      return jax.ShapeDtypeStruct((batch_size, seq_len), dtype, sharding=self._batch_sharding)

    return Batch(
        shape(jnp.int32), shape(jnp.int32), shape(jnp.bool_),
        Segments(shape(jnp.int32), shape(jnp.int32)),
    )
