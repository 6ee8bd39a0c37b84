"""Damaged checkpoints are named and passed over; saves that fail are told, and tried again."""

import dataclasses
import errno
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from dense_jax.errors import InputError
from dense_jax.training import checkpoint as checkpoints
from dense_jax.training.checkpoint import Checkpoints, clear_uncommitted
from dense_jax.training.checkpoint_reader import CheckpointReader
from dense_jax.training.host_arrays import placed_on
from dense_jax.training.stored import DamagedError, Stored, UnfitError, saved_steps
from tests.training.test_checkpoint import MODEL, on_device, read, save, state

RETRY_SECONDS = checkpoints._RETRY_SECONDS


class Told(list):
  """What was told: pairs of kind and text."""

  def __call__(self, step, kind, text):
    self.append((kind, text))


def restore_newest(folder, shapes=None):
  """Returns the step that training goes on from, and what it told."""
  told = Told()
  clear_uncommitted(epath.Path(folder), told)
  writer = Checkpoints(epath.Path(folder), MODEL, keep_last=9, tell=told)
  try:
    restored, position = writer.restore_newest(on_device(shapes or state(0)))
    assert writer.latest == position["step"]
  finally:
    writer.close()
  step = int(restored.step)
  assert restored.params["w"].tolist() == [step] * 3 and position == {"step": step}
  assert restored.opt_state["m"].tolist() == [1.0] * 3
  return step, told


def flip(file, position, bit=0):
  content = bytearray(file.read_bytes())
  content[position] ^= 1 << bit
  file.write_bytes(bytes(content))


def array_file(folder, item="params"):
  """Returns the largest file of an item's arrays."""
  return max((folder / item).rglob("d/*"), key=lambda file: file.stat().st_size)


@pytest.fixture
def three(tmp_path):
  save(tmp_path / "checkpoints", [2.0, 1.0, 3.0], keep_last=3)
  return tmp_path / "checkpoints"


def test_a_whole_one_is_taken_in_silence(three):
  assert restore_newest(three) == (3, [])


@pytest.mark.parametrize("part", ["params", "optimizer", "data/metadata", "digests/metadata"])
def test_a_flipped_bit_is_noticed_set_aside_and_costs_its_steps(three, part):
  newest = three / "3"
  if part in ("params", "optimizer"):
    for position in range(0, array_file(newest, part).stat().st_size, 3):
      flip(array_file(newest, part), position)
  else:
    content = (newest / part).read_text()
    (newest / part).write_text(content.replace("3", "2"))
  before = {file.name: file.read_bytes() for file in newest.rglob("*") if file.is_file()}
  step, [(kind, text)] = restore_newest(three)
  assert (step, kind) == (2, "set aside")
  assert f"checkpoint 3 in {three}" in text and "Others there: 1, 2." in text
  assert text.endswith("the run goes on from step 2, and does 1 steps again")
  aside = three.with_name("checkpoints.damaged") / "3"
  assert {file.name: file.read_bytes() for file in aside.rglob("*") if file.is_file()} == before
  assert saved_steps(epath.Path(three)) == [1, 2]
  # It is passed over once; a second one of the same step gets another name.
  assert restore_newest(three) == (2, [])
  save_again(three, 3)
  shutil.rmtree(three / "3" / "params")
  assert restore_newest(three)[0] == 2
  assert (three.with_name("checkpoints.damaged") / "3-2").is_dir()


def save_again(folder, step):
  writer = Checkpoints(epath.Path(folder), MODEL, keep_last=9)
  assert writer.save(state(step), step, {"step": step}, 3.0)
  writer.close()


def change_array(folder, step, value):
  """Changes one number of an array of a checkpoint, as if the storage had."""
  shutil.rmtree(folder / str(step) / "params")
  changed = {"w": jnp.full(3, float(step)).at[1].set(value)}
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(epath.Path(folder / str(step) / "params"), changed)


@pytest.mark.parametrize("value", [np.nextafter(np.float32(3), np.float32(4)), np.nan])
def test_an_array_is_named_and_readers_refuse_it(three, value):
  change_array(three, 3, value)
  for which in ("latest", "3"):
    with pytest.raises(DamagedError, match=r"checkpoint 3 in .* is damaged: params/w is not what "):
      read(three, which)
  assert saved_steps(epath.Path(three)) == [1, 2, 3]  # Who reads changes nothing.
  assert read(three, "2") == read(three, "best") == 2
  assert restore_newest(three)[0] == 2


def test_several_are_passed_over(three):
  for step in (2, 3):
    change_array(three, step, 7)
  step, told = restore_newest(three)
  assert step == 1 and len(told) == 2 and saved_steps(epath.Path(three)) == [1]


def test_with_none_left_nothing_is_changed_and_a_command_helps(three):
  for step in (1, 2, 3):
    change_array(three, step, 7)
  for _ in range(2):
    with pytest.raises(InputError, match=r"no checkpoint in .* can be gone on from") as error:
      restore_newest(three)
    for said in ("checkpoint 1 in", "checkpoint 3 in", "params/w is not what was saved",
                 f"python -m dense_jax.cli.verify --workdir {three.parent}"):
      assert said in str(error.value)
    assert saved_steps(epath.Path(three)) == [1, 2, 3]


@pytest.mark.parametrize("damage", [
    "", "{", "[]", '{"commit_timestamp_nsecs": "now"}', '{"commit_timestamp_nsecs": 1e99}', None,
])
@pytest.mark.parametrize("step", [1, 3])
def test_a_damaged_commit_file_is_named_and_the_others_are_used(three, damage, step):
  file = three / str(step) / "_CHECKPOINT_METADATA"
  if damage is None:
    file.unlink()
  else:
    file.write_text(damage)
  newest, [(kind, text)] = restore_newest(three)
  assert newest == (2 if step == 3 else 3) and kind == "set aside"
  assert f"checkpoint {step} in {three} is damaged: _CHECKPOINT_METADATA (" in text
  assert (three.with_name("checkpoints.damaged") / str(step)).is_dir()


def test_the_only_checkpoint_is_not_set_aside_for_its_commit_file(tmp_path):
  save(tmp_path / "checkpoints", [2.0])
  (tmp_path / "checkpoints" / "1" / "_CHECKPOINT_METADATA").write_text("{")
  with pytest.raises(DamagedError, match="_CHECKPOINT_METADATA"):
    restore_newest(tmp_path / "checkpoints")
  assert read(tmp_path / "checkpoints", "latest") == 1  # Its arrays are proven whole.


def without_digests(folder, step):
  """Makes a checkpoint what it was before there were digests."""
  shutil.rmtree(folder / str(step) / "digests")
  file = folder / str(step) / "_CHECKPOINT_METADATA"
  values = json.loads(file.read_text())
  del values["item_handlers"]["digests"]
  file.write_text(json.dumps(values))


def test_one_without_digests_is_taken_with_a_line_that_says_so(three, caplog):
  without_digests(three, 3)
  assert restore_newest(three) == (3, [])
  assert "checkpoint 3 in" in caplog.text and "could not be proven" in caplog.text
  assert read(three, "best") == 2  # Ranked by the file of its loss.


def test_missing_digests_are_no_older_checkpoint(three):
  shutil.rmtree(three / "3" / "digests")
  assert restore_newest(three)[0] == 2


@pytest.mark.parametrize(("params", "said"), [
    ({"v": jnp.zeros(3)}, "it lacks: params/v; it also holds: params/w"),
    ({"w": jnp.zeros(4)}, r"it holds other shapes: params/w \[3\] instead of \[4\]"),
    ({"w": jnp.zeros(3), **{f"more{n}": jnp.zeros(1) for n in range(7)}},
     "it lacks: params/more0, params/more1, params/more2, params/more3, params/more4 and 2 more"),
])
@pytest.mark.parametrize("proven", [True, False])
def test_another_models_is_no_damage_and_its_arrays_are_listed(three, params, said, proven):
  if not proven:
    without_digests(three, 3)
  with pytest.raises(UnfitError, match=said):
    restore_newest(three, dataclasses.replace(state(0), params=params))
  assert saved_steps(epath.Path(three)) == [1, 2, 3]


def test_the_position_in_the_data_is_that_of_the_state(three):
  writer = Checkpoints(epath.Path(three), MODEL, keep_last=9)
  assert writer.save(state(4), 4, {"step": 5}, None)
  writer.close()
  step, [(_, text)] = restore_newest(three)
  assert step == 3
  assert "data/metadata: the position in the data is that of step 5, the state is that of" in text


def test_a_changed_loss_does_not_change_the_ranks(three):
  file = three / "1" / "metrics" / "metrics"
  file.write_text(file.read_text().replace("2", "0"))
  assert read(three, "best") == 2
  with pytest.raises(DamagedError, match="metrics/metrics: the held-out loss is not what was"):
    checkpoint = Stored(epath.Path(three), 1)
    checkpoint.check_loss(checkpoint.proof())


@pytest.mark.parametrize("error", [
    PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"), MemoryError(),
    ValueError("UNAVAILABLE: the server does not answer"),
    ValueError("Error reading [os_error_code='13']"),
])
def test_an_error_that_may_pass_sets_nothing_aside(three, error, monkeypatch):
  def fail(*arguments, **options):
    raise error

  monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", fail)
  with pytest.raises(type(error)):
    restore_newest(three)
  assert saved_steps(epath.Path(three)) == [1, 2, 3]


@pytest.fixture
def full_disk(monkeypatch):
  """A disk that is full for so many saves: a list whose one number says how many."""
  left, whole = [0], ocp.JsonCheckpointHandler._save_fn

  async def fail(self, values, directory):
    if "arrays" in values and left[0]:  # The digests, once in a save.
      left[0] -= 1
      raise OSError(errno.ENOSPC, "No space left on device", str(directory))
    await whole(self, values, directory)

  monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", fail)
  monkeypatch.setattr(checkpoints, "_RETRY_SECONDS", (0.0, 0.0, 0.0))
  return left


def settle(writer):
  while writer._under_way and not writer.wants_save(0):
    pass


@pytest.mark.parametrize("failures", [1, 3])
def test_a_save_that_fails_is_told_at_once_and_tried_again(tmp_path, full_disk, failures):
  told = Told()
  writer = Checkpoints(epath.Path(tmp_path), MODEL, tell=told)
  assert writer.save(state(1), 1, {"step": 1}, None) and writer.is_saved()
  assert not writer.wants_save(0)
  full_disk[0] = failures
  for step in range(2, 2 + failures):
    assert writer.save(state(step), step, {"step": step}, None)
    settle(writer)
    assert writer.wants_save(0) and len(told) == step - 1
    assert told[-1][0] == "save failed" and "No space left on device" in told[-1][1]
    assert "the newest is of step 1 " in told[-1][1] and saved_steps(epath.Path(tmp_path)) == [1]
  assert writer.save(state(9), 9, {"step": 9}, None) and writer.is_saved()
  writer.close()
  assert [entry.name for entry in tmp_path.iterdir()] == ["9"]
  assert read(tmp_path, "latest") == 9


def test_saves_that_go_on_failing_stop_the_run(tmp_path, full_disk, monkeypatch):
  now, told = [100.0], Told()
  monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
  monkeypatch.setattr(checkpoints, "_RETRY_SECONDS", RETRY_SECONDS)
  writer = Checkpoints(epath.Path(tmp_path), MODEL, tell=told)
  full_disk[0] = 9
  # The seconds after which each of four saves is tried again; of the last one, to stop.
  for step, seconds in enumerate((0, 10, 60, 0), 1):
    assert writer.save(state(step), step, {"step": step}, None)
    assert not writer.is_saved()
    now[0] += max(seconds - 1, 0)
    assert writer.wants_save(0) == (seconds == 0)
    now[0] += seconds > 0
    assert writer.wants_save(0)
  with pytest.raises(OSError, match="No space left"):
    writer.save(state(5), 5, {"step": 5}, None)
  writer.close()
  assert not saved_steps(epath.Path(tmp_path))
  assert ["another save is tried" in text for _, text in told] == [True, True, True, False]


def test_a_last_save_waits_between_its_tries(tmp_path, full_disk, monkeypatch):
  now, waits = [100.0], []
  monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
  monkeypatch.setattr(checkpoints, "_RETRY_SECONDS", RETRY_SECONDS)
  monkeypatch.setattr(checkpoints, "_LOOK_SECONDS", 0.0)
  writer = Checkpoints(epath.Path(tmp_path), MODEL, tell=Told())
  full_disk[0] = 3

  def a_second_passes():
    now[0] += 1
    return False

  while writer.save(state(1), 1, {"step": 1}, None) and not writer.is_saved():
    before = now[0]
    writer.wait_to_retry(a_second_passes)
    waits.append(now[0] - before)
  assert waits == [0, 10, 60] and saved_steps(epath.Path(tmp_path)) == [1]
  writer.wait_to_retry(lambda: pytest.fail("nothing failed"))
  writer.close()


def test_whoever_asks_for_the_end_is_not_kept_waiting(tmp_path, full_disk, monkeypatch):
  monkeypatch.setattr(checkpoints, "_RETRY_SECONDS", (600.0,))
  writer = Checkpoints(epath.Path(tmp_path), MODEL, tell=Told())
  full_disk[0] = 1
  assert writer.save(state(1), 1, {"step": 1}, None) and not writer.is_saved()
  writer.wait_to_retry(lambda: True)
  assert writer.save(state(1), 1, {"step": 1}, None) and writer.is_saved()
  writer.close()


def test_minutes_since_the_last_save_ask_for_another(tmp_path, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
  writer = Checkpoints(epath.Path(tmp_path), MODEL)
  assert not writer.wants_save(2)
  now[0] += 121
  assert writer.wants_save(2) and not writer.wants_save(3) and not writer.wants_save(0)
  assert writer.save(state(1), 1, {"step": 1}, None) and writer.is_saved()
  assert not writer.wants_save(2)
  writer.close()


def test_every_nth_is_kept(tmp_path):
  save(tmp_path, [2.0, 1.0, 3.0, 4.0, 5.0, 6.0], keep_last=1, keep_best=1, keep_every=3)
  assert saved_steps(epath.Path(tmp_path)) == [2, 3, 6]
  assert not (tmp_path / "deleted").exists()


def test_devices_do_not_matter(three):
  for device in jax.devices()[:3]:
    shapes = placed_on(state(0), jax.sharding.SingleDeviceSharding(device))
    restored, _ = CheckpointReader(epath.Path(three), MODEL).restore(shapes, 3)
    assert restored.params["w"].devices() == {device}


def test_what_orbax_leaves_of_a_failed_save_is_not_told_as_well(tmp_path, caplog):
  Checkpoints(tmp_path / "checkpoints", MODEL).close()
  for package, is_told in (("orbax", False), ("others", True)):
    code = compile("raise ValueError('no space')", f"/site-packages/{package}/write.py", "exec")
    try:
      exec(code)
    except ValueError as error:
      logging.getLogger("asyncio").error("never retrieved", exc_info=error)
    assert ("no space" in caplog.text) == is_told
