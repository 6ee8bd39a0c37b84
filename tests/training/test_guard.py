"""The guard on the device: what it decides, what a skipped step leaves, what it costs when off."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from dense_jax.config import ExperimentConfig, GuardConfig, MeshConfig, OptimizerConfig, TrainConfig
from dense_jax.sharding import make_mesh
from dense_jax.training import guard as guards
from dense_jax.training.checkpoint import Checkpoints
from dense_jax.training.optimizer import learning_rate
from dense_jax.training.step import Trainer
from tests.builders import COMPILER_OPTIONS, fast_jit, model_config, packed, random_batch

T = 9
ROWS = [[4, 5], [9], [2, 3, 4], [7]]
OFF = GuardConfig(skip="none")


def make_config(guard=OFF, **train):
  return ExperimentConfig(
      model=model_config("gau_retnet", vocab_size=16),
      optimizer=OptimizerConfig(learning_rate=0.1, warmup_fraction=0.5),
      train=TrainConfig(steps=8, batch_size=4, loss_chunk=4, **train),
      mesh=MeshConfig(data=1), guard=guard,
  )


@functools.cache
def make_trainer(guard=OFF, **train):
  config = make_config(guard, **train)
  return Trainer(config, make_mesh(config.mesh, jax.devices()[:1]))


def make_batch(seed):
  return jax.tree.map(np.asarray, random_batch(packed(ROWS, time=T), seed))


@functools.cache
def compiled(guard=OFF, **train):
  trainer = make_trainer(guard, **train)
  step = trainer.train_step.lower(trainer.state_shapes, trainer.batch_shapes(4, T))
  return step.compile(compiler_options=COMPILER_OPTIONS)


def lowered(trainer):
  return trainer.train_step.lower(trainer.state_shapes, trainer.batch_shapes(4, T)).as_text()


def poisoned(state):
  """Returns the state with a parameter that makes every number of a step NaN."""
  return dataclasses.replace(
      state, params=state.params | {"norm.scale": state.params["norm.scale"] * jnp.nan}
  )


def bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_off_it_is_no_part_of_the_program_or_of_the_state():
  trainer = make_trainer()
  assert trainer.state_shapes.guard is None
  text = lowered(trainer)
  other = make_trainer(GuardConfig("none", sigmas=2.0, window=9, in_a_row=1, returns=0))
  assert lowered(other) == text
  of_a_number = re.compile(r"is_finite \S+ : \(tensor<f32>\)")
  assert not of_a_number.search(text)
  assert len(of_a_number.findall(lowered(make_trainer(GuardConfig())))) == 2  # Loss and norm.


@pytest.mark.slow
@pytest.mark.parametrize("skip", ["nonfinite", "spikes"])
def test_where_nothing_is_wrong_it_changes_no_bit(skip):
  ends = []
  for guard in (OFF, GuardConfig(skip)):
    state, trainer = make_trainer(guard, ema=0.9).init(0), make_trainer(guard, ema=0.9)
    for seed in range(3):
      state, metrics = compiled(guard, ema=0.9)(state, trainer.put(make_batch(seed)))
    ends.append((state.params, state.opt_state, state.ema, metrics["loss"]))
    if guard.is_on:
      assert (int(state.guard.skipped), int(state.guard.in_a_row)) == (0, 0)
  assert bits(ends[0]) == bits(ends[1])


def test_a_skipped_step_leaves_everything_but_the_counts():
  trainer = make_trainer(GuardConfig(), ema=0.9)
  step = compiled(GuardConfig(), ema=0.9)
  state, _ = step(trainer.init(0), trainer.put(make_batch(0)))
  wrong = poisoned(state)
  before = bits((wrong.params, wrong.opt_state, wrong.ema))
  after, metrics = step(wrong, trainer.put(make_batch(1)))
  assert bits((after.params, after.opt_state, after.ema)) == before
  assert np.isnan(metrics["loss"])
  assert (int(after.step), int(after.updates)) == (2, 1)
  assert [float(metrics[name]) for name in ("skipped_steps", "skipped_in_a_row")] == [1, 1]
  # The schedule stands still too: the next update is number 1 (from 0).
  assert float(metrics["learning_rate"]) == pytest.approx(
      float(learning_rate(make_config().optimizer, 8)(1))
  )


def test_a_run_that_skipped_a_batch_is_one_that_never_saw_it():
  trainer, step = make_trainer(GuardConfig(), ema=0.9), compiled(GuardConfig(), ema=0.9)
  skipping, without = trainer.init(0), trainer.init(0)
  for seed in range(4):
    if seed == 2:
      wrong, _ = step(poisoned(skipping), trainer.put(make_batch(9)))
      skipping = dataclasses.replace(
          wrong, params=wrong.params | {"norm.scale": jnp.copy(without.params["norm.scale"])}
      )
    skipping, _ = step(skipping, trainer.put(make_batch(seed)))
    without, _ = step(without, trainer.put(make_batch(seed)))
  assert bits((skipping.params, skipping.opt_state, skipping.ema)) == bits(
      (without.params, without.opt_state, without.ema)
  )
  assert (int(skipping.step), int(without.step)) == (5, 4)


def decisions(config, figures):
  """Returns what the guard decides about pairs of loss and norm, its states, and the last one."""
  judge = fast_jit(functools.partial(guards.judge, config))
  state, taken, counts = guards.begin(config), [], []
  for loss, norm in figures:
    one, state = judge(state, jnp.float32(loss), jnp.float32(norm))
    taken.append(bool(one))
    counts.append((int(state.skipped), int(state.in_a_row)))
  return taken, counts, state


def test_what_is_not_finite_is_skipped_and_counted():
  nan, inf = float("nan"), float("inf")
  figures = [(1, 1), (nan, 1), (1, nan), (1, 1), (inf, 1), (1, inf), (-inf, 1), (1, 1)]
  taken, counts, _ = decisions(GuardConfig(in_a_row=5), figures)
  assert taken == [True, False, False, True, False, False, False, True]
  assert counts == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1), (4, 2), (5, 3), (5, 0)]


def test_after_so_many_in_a_row_nothing_is_taken_until_the_host_has_looked():
  figures = [(1, 1), *[(float("nan"), 1)] * 3, (1, 1), (1, 1)]
  taken, counts, _ = decisions(GuardConfig(in_a_row=3), figures)
  assert taken == [True] + [False] * 5
  assert counts[-1] == (5, 5)


def by_hand(config, figures):
  """Decides about spikes with NumPy, from the definition."""
  window, taken = [], []
  for pair in figures:
    spike = False
    if len(window) >= config.window:
      last = np.asarray(window[-config.window:], np.float64)
      mean, deviation = last.mean(axis=0), last.std(axis=0)
      least = np.maximum(deviation, 0.01 * np.abs(mean))
      spike = bool(np.any(np.asarray(pair) > mean + config.sigmas * least))
    taken.append(not spike)
    if not spike:
      window.append(pair)
  return taken


@pytest.mark.parametrize("spread", [0.3, 0.0])
def test_spikes_are_those_of_the_definition(spread):
  config = GuardConfig("spikes", sigmas=4.0, window=8, in_a_row=100)
  rng = np.random.default_rng(0)
  figures = np.stack([3 + spread * rng.standard_normal(60), 1 + spread * rng.random(60)], axis=1)
  figures[5] = 99.0  # Before the window is full nothing is a spike.
  figures[20, 0], figures[30, 1], figures[31, 1], figures[40, 0] = 6.0, 9.0, 9.0, -50.0
  taken, counts, _ = decisions(config, figures.tolist())
  expected = by_hand(config, figures.astype(np.float32).tolist())
  assert taken == expected
  assert not taken[20] and not taken[30] and not taken[31] and taken[5] and taken[40]
  assert counts[31][1] == 2 and counts[32][1] == 0


@pytest.mark.parametrize("config", [
    GuardConfig(), GuardConfig("spikes", sigmas=3.0, window=8, in_a_row=4)
])
def test_a_state_that_was_json_decides_bitwise_alike(config):
  rng = np.random.default_rng(1)
  figures = (1 + 0.5 * rng.random((30, 2)))
  figures[::7] *= 3
  _, _, whole = decisions(config, figures.tolist())
  _, _, first = decisions(config, figures[:13].tolist())
  placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), first
  )
  state = guards.from_json(shapes, json.loads(json.dumps(guards.as_json(first))))
  assert bits(state) == bits(first)
  judge = fast_jit(functools.partial(guards.judge, config))
  for loss, norm in figures[13:].tolist():
    _, state = judge(state, jnp.float32(loss), jnp.float32(norm))
  assert bits(state) == bits(whole)
  # Another window begins anew, and what is not there is zero.
  empty = guards.from_json(shapes, {})
  assert bits(empty) == bits(guards.begin(config))
  assert guards.from_json(None, guards.as_json(first)) is None


@pytest.mark.slow
def test_checkpoints_with_and_without_a_guard_are_read_by_either(tmp_path):
  checkpoints = Checkpoints(epath.Path(tmp_path), make_config().model, keep_last=9)
  spikes = GuardConfig("spikes", window=8)
  on, off = make_trainer(spikes, ema=0.9), make_trainer(OFF, ema=0.9)
  state, _ = compiled(spikes, ema=0.9)(poisoned(on.init(0)), on.put(make_batch(0)))
  state = dataclasses.replace(state, params=on.init(0).params, ema=on.init(0).ema)
  assert checkpoints.save(state, 1, {"step": 1}, None)
  assert checkpoints.save(off.init(0), 2, {"step": 0}, None)
  checkpoints.wait()
  same, position = checkpoints.restore(on.state_shapes, 1)
  assert bits(same) == bits(state) and int(same.guard.in_a_row) == 1
  assert position == {"step": 1}
  assert checkpoints.restore(off.state_shapes, 1)[0].guard is None
  later, position = checkpoints.restore(on.state_shapes, 2)
  assert bits(later.guard) == bits(guards.begin(spikes)) and position == {"step": 0}
  # Without a guard, a checkpoint is what it was before there was one.
  assert json.loads((tmp_path / "2" / "data" / "metadata").read_text()) == {"step": 0}
  checkpoints.close()
