"""Checkpoints that are kept, found and read; none that is not finite replaces a good one."""

import math
import shutil

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from dense_jax.config import ModelConfig
from dense_jax.errors import InputError
from dense_jax.training.checkpoint import Checkpoints, check_name
from dense_jax.training.checkpoint_reader import CheckpointReader
from dense_jax.training.host_arrays import placed_on
from dense_jax.training.step import TrainState
from dense_jax.training.stored import saved_steps

NAN, INF = math.nan, math.inf
MODEL = ModelConfig()  # Most states here have no layers.


def state(value, moment=1.0):
  step = int(value) if math.isfinite(value) else 0
  return TrainState(
      jnp.asarray(step, jnp.int32), {"w": jnp.full(3, float(value))},
      {"m": jnp.full(3, float(moment))},
  )


def on_device(tree):
  return placed_on(tree, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def read(folder, which):
  """Returns the step, which is also the value of the parameters."""
  checkpoints = CheckpointReader(epath.Path(folder), MODEL)
  step, params, _ = checkpoints.restore_params(on_device(state(0).params), which)
  assert params["w"].tolist() == [step] * 3
  return step


def save(folder, losses, **keep):
  checkpoints = Checkpoints(epath.Path(folder), MODEL, **keep)
  for step, loss in enumerate(losses, 1):
    assert checkpoints.save(state(step), step, {"step": step}, loss)
  checkpoints.close()


@pytest.mark.parametrize(("losses", "best"), [
    ([2.0, NAN], 1),
    ([2.0, NAN, INF, -INF], 1),
    ([NAN, 2.0, NAN], 2),
    ([3.0, 2.0, NAN, 2.5], 2),
    ([-INF, 3.0, None, 3.5], 2),
    ([800.0, 900.0, INF], 1),
    ([2.0, 2.0, NAN], 2),  # Of equal ones the newest.
])
@pytest.mark.parametrize("keep_best", [1, 2])
def test_a_loss_that_is_not_finite_is_never_best(tmp_path, losses, best, keep_best):
  save(tmp_path, losses, keep_last=1, keep_best=keep_best)
  assert read(tmp_path, "best") == best
  assert read(tmp_path, "latest") == len(losses)
  assert {best, len(losses)} <= set(saved_steps(epath.Path(tmp_path)))


@pytest.mark.parametrize("losses", [[NAN], [None, None], [INF, -INF]])
def test_without_a_finite_loss_there_is_no_best(tmp_path, losses):
  save(tmp_path, losses, keep_last=1, keep_best=1)
  with pytest.raises(InputError, match="none of them has a finite held-out loss"):
    read(tmp_path, "best")
  assert read(tmp_path, "latest") == len(losses)


@pytest.mark.parametrize("bad", [
    state(NAN), state(INF), state(3, NAN), state(3, -INF),
    TrainState(jnp.zeros((), jnp.int32), {"w": jnp.array([3, 3, NAN], jnp.bfloat16)}, {}),
])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, bad):
  checkpoints = Checkpoints(epath.Path(tmp_path), MODEL, keep_last=1, keep_best=1)
  assert checkpoints.save(state(1), 1, {}, 3.0)
  assert checkpoints.save(state(2), 2, {}, 4.0)
  assert not checkpoints.save(bad, 3, {}, 1.0)
  assert checkpoints.latest == 2
  checkpoints.close()
  assert (read(tmp_path, "best"), read(tmp_path, "latest")) == (1, 2)


@pytest.mark.parametrize("damage", ["params", "params/d", "params/manifest.ocdbt", "all"])
def test_another_checkpoint_is_taken_where_one_cannot_be_read(tmp_path, damage, caplog):
  save(tmp_path, [2.0, 3.0, 1.0], keep_last=3, keep_best=1)
  for part in (tmp_path / "3").iterdir() if damage == "all" else [tmp_path / "3" / damage]:
    shutil.rmtree(part) if part.is_dir() else part.unlink()
  assert read(tmp_path, "latest") == 2
  assert "checkpoint 3 in" in caplog.text and "checkpoint 2 is taken" in caplog.text
  assert read(tmp_path, "best") == 1
  with pytest.raises(InputError, match=r"checkpoint 3 in .* cannot be read.*Others there: 1, 2"):
    read(tmp_path, "3")


def test_a_damaged_checkpoint_is_named_on_resume(tmp_path):
  save(tmp_path, [2.0, 3.0], keep_last=2, keep_best=1)
  shutil.rmtree(tmp_path / "2" / "optimizer")
  checkpoints = Checkpoints(epath.Path(tmp_path), MODEL, keep_last=2, keep_best=1)
  with pytest.raises(InputError, match=r"checkpoint 2 in .* cannot be read.*Others there: 1"):
    checkpoints.restore(on_device(state(0)), 2)
  restored, position = checkpoints.restore(on_device(state(0)), 1)
  checkpoints.close()
  assert restored.params["w"].tolist() == [1.0] * 3 and position == {"step": 1}


@pytest.mark.parametrize("which", ["4", "-1", "", "newest", "1.0", "01"])
def test_a_step_that_is_not_there_is_named_with_those_that_are(tmp_path, which):
  save(tmp_path, [2.0, 3.0], keep_last=2, keep_best=1)
  with pytest.raises(InputError, match=r"expected latest, best or one of the steps 1, 2$"):
    read(tmp_path, which)


@pytest.mark.parametrize("name", ["lr=[1e-3]", "[", "a]b[c]", "a\\b", "a[\n]", "caf\udce9"])
def test_a_folder_whose_checkpoints_could_not_be_read_is_refused(tmp_path, name, monkeypatch):
  usable = name == "["
  (tmp_path / name).mkdir()
  monkeypatch.chdir(tmp_path / name)
  for path in (tmp_path / name / "run", epath.Path("run")):
    if usable:
      check_name(epath.Path(path), "--workdir")
    else:
      with pytest.raises(InputError, match="--workdir = "):
        check_name(epath.Path(path), "--workdir")
  if usable:
    save(tmp_path / name, [2.0], keep_last=1)
    assert read(tmp_path / name, "latest") == 1
