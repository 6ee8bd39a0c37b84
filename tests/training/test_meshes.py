"""Every mesh of eight devices trains as one device does, even if it splits a row's tokens."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from dense_jax.config import (
  DataConfig,
  ExperimentConfig,
  MeshConfig,
  OptimizerConfig,
  TrainConfig,
)
from dense_jax.errors import InputError
from dense_jax.sharding import make_mesh
from dense_jax.training.step import Trainer
from tests.builders import (
  COMPILER_OPTIONS,
  FAMILIES,
  model_config,
  packed,
  random_batch,
  random_params,
)
from tests.helpers import assert_trees_close
from tests.programs import program_cost

T = 24
# Documents that begin and end inside a device's tokens, cross several devices, and end in
# padding; a document's border where devices meet (multiples of 3), and one right behind it.
ROWS = [[24], [6, 18], [7, 2, 15], [1, 2, 1, 9], [8], [22, 2], [12, 1, 11], [3, 3, 3]]
AXES = ("data", "fsdp", "sequence", "tensor")
SHAPES = [
    shape for shape in itertools.product((1, 2, 4, 8), repeat=len(AXES))
    if np.prod(shape) == 8 and shape[3] <= 4
]
SSM = [family for family in FAMILIES if family != "transformer"]
# The others' programs are much like one of these.
each_ssm = pytest.mark.parametrize("family", [
    pytest.param(family, marks=getattr(pytest.mark, "slow" if family == "mamba2" else "exhaustive"))
    for family in SSM
])


def config(family, mesh=None, *, depth=2, length=T, implementation="auto", inject="state"):
  model = model_config(
      family, depth, inject, vocab_size=16, layers=3, implementation=implementation
  )
  return ExperimentConfig(
      model=model,
      # The update is nearly the gradient itself.
      optimizer=OptimizerConfig(
          learning_rate=1.0, schedule="constant", warmup_fraction=0.0, epsilon=10.0,
          clip_norm=0.0, weight_decay=0.0,
      ),
      data=DataConfig(seq_len=length),
      train=TrainConfig(steps=4, batch_size=8, loss_chunk=3),
      mesh=mesh or MeshConfig(data=1),
  )


def make_trainer(settings):
  mesh = settings.mesh
  sizes = [mesh.slices or 1, mesh.data, mesh.fsdp, mesh.sequence, mesh.tensor]
  return Trainer(settings, make_mesh(mesh, jax.devices()[: np.prod(sizes)]))


@functools.cache
def after_a_step(settings):
  """Returns the metrics and the parameters after one update, on the host."""
  trainer = make_trainer(settings)
  shapes = trainer.state_shapes
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
  state = dataclasses.replace(zeros, params=random_params(settings.model))
  state = jax.tree.map(lambda leaf, shape: jax.device_put(leaf, shape.sharding), state, shapes)
  batch = trainer.put(jax.tree.map(np.asarray, random_batch(packed(ROWS, time=T), 0)))
  step = trainer.train_step.lower(state, batch).compile(compiler_options=COMPILER_OPTIONS)
  state, metrics = step(state, batch)
  return jax.device_get(metrics), jax.device_get(state.params)


def _mesh_id(shape):
  return "-".join(f"{axis}{size}" for axis, size in zip(AXES, shape, strict=True) if size > 1)


def _mark(family, shape):
  """Marks a case: mamba2's mixed axes are quick, and its tokens that are split alone are slow."""
  if (family, shape) == ("mamba2", (2, 1, 2, 2)):
    return ()
  slow = (family, shape) == ("mamba2", (1, 1, 8, 1))
  return pytest.mark.slow if slow else pytest.mark.exhaustive


@pytest.mark.parametrize(("family", "shape"), [
    pytest.param(family, shape, id=f"{family}-{_mesh_id(shape)}", marks=_mark(family, shape))
    for family in SSM for shape in SHAPES
])
def test_a_mesh_of_eight_devices_changes_nothing(family, shape):
  expected = after_a_step(config(family))
  start = random_params(config(family).model)
  assert min(np.abs(expected[1][name] - value).max() for name, value in start.items()) > 1e-6
  mesh = MeshConfig(**dict(zip(AXES, shape, strict=True)))
  assert_trees_close(after_a_step(config(family, mesh)), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "implementation", "inject"), [
    (MeshConfig(slices=2, data=2, fsdp=2), "auto", "state"),
    (MeshConfig(data=2, sequence=2, tensor=2), "pallas", "state"),
    *(pytest.param(mesh, "triton", inject, marks=pytest.mark.exhaustive) for mesh, inject in (
        (MeshConfig(data=2, sequence=2, tensor=2), "state"),
        (MeshConfig(data=2, sequence=2), "inputs"),
    )),
    # Its norm is over channels of both.
    pytest.param(MeshConfig(data=1, tensor=2), "triton", "inputs", marks=pytest.mark.exhaustive),
])
def test_slices_and_kernels_change_nothing(mesh, implementation, inject):
  actual = after_a_step(config("mamba2", mesh, implementation=implementation, inject=inject))
  assert_trees_close(actual, after_a_step(config("mamba2", inject=inject)))


@pytest.mark.slow
def test_maps_of_states_are_not_split_with_the_heads():
  """With one group there is one map, which two devices cannot share out."""
  options = {"depth": 1, "groups": 1, "transition": "linear", "fusion": "concat"}
  settings = config("mamba2")
  settings = dataclasses.replace(
      settings, model=model_config("mamba2", vocab_size=16, layers=3, **options)
  )
  actual = after_a_step(dataclasses.replace(settings, mesh=MeshConfig(data=1, tensor=2)))
  assert_trees_close(actual, after_a_step(settings))


@functools.cache
def collectives(settings):
  """Returns kind -> (count, bytes) of the collectives in a step's program."""
  trainer = make_trainer(settings)
  batch = trainer.batch_shapes(settings.train.batch_size, settings.data.seq_len)
  compiled = trainer.train_step.lower(trainer.state_shapes, batch).compile(
      compiler_options=COMPILER_OPTIONS
  )
  cost = program_cost(compiled.as_text(), open_trips=1)
  return {each.kind: (each.count, each.bytes) for each in cost.collectives}


@each_ssm
def test_what_devices_exchange_does_not_depend_on_the_length(family):
  mesh = MeshConfig(data=1, sequence=8)
  short, long = (collectives(config(family, mesh, length=length)) for length in (T, 4 * T))
  # States and halos go to neighbours, sums of losses and gradients to all.
  assert short.keys() == {"collective-permute", "all-reduce"}
  assert long == short


@each_ssm
def test_dense_reads_stay_on_their_heads_devices(family):
  mesh = MeshConfig(data=1, tensor=2)
  dense, base = (collectives(config(family, mesh, depth=depth)) for depth in (2, 0))
  for kind in (base.keys() | dense.keys()) - {"all-reduce"}:
    moved, before = (found.get(kind, (0, 0))[1] for found in (dense, base))
    # S4's input has its channels' split: its gradient is gathered, or summed, as XLA likes.
    assert moved <= before if family in ("s4d", "s4") else moved == before, kind
  # Gates and shared queries have gradients that are summed over heads: N and D / 32 numbers a
  # token. The three reads have E, and stay where they are.
  reads = 3 * 8 * T * 2 * config(family).model.width * 4
  assert dense["all-reduce"][1] - base["all-reduce"][1] < reads / 2


def test_attention_takes_no_part_of_a_row():
  with pytest.raises(InputError, match=r"config\.mesh\.sequence = 2 .*transformer"):
    collectives(config("transformer", MeshConfig(data=1, sequence=2), depth=0))


@pytest.mark.parametrize(("mesh", "word"), [
    (MeshConfig(data=1, sequence=5), r"config\.data\.seq_len = 24"),
    (MeshConfig(data=1, sequence=8), r"config\.mesh\.sequence = 8"),
    (MeshConfig(data=1, slices=3), r"config\.train\.batch_size = 8"),
])
def test_a_mesh_that_does_not_divide_the_batch(mesh, word):
  settings = config("mamba2", mesh, length=16 if mesh.sequence == 8 else T)
  with pytest.raises(InputError, match=word):
    collectives(settings)
