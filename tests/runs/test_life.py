"""Signs of life: the heartbeat, how processes began and ended, the stacks of one that hangs."""

import dataclasses
import json
import os
import shutil
import time

import pytest
from etils import epath

from dense_jax.errors import DivergedError
from dense_jax.runs.life import Life, first_start, read_heartbeat
from dense_jax.training.events import read_events, record_event
from dense_jax.training.loop import Hook, Moment


@pytest.fixture
def folder(tmp_path):
  return epath.Path(tmp_path)


def said(folder):
  return [(event.step, event.kind, event.text) for event in read_events(folder)]


def test_a_process_says_that_it_lives_and_how_it_ended(folder):
  assert read_heartbeat(folder) is None
  with Life(folder, 3, 9, 0) as life:
    beat = read_heartbeat(folder)
    assert (beat.step, beat.steps, beat.doing, beat.pid) == (3, 9, "compiling", os.getpid())
    assert abs(beat.time - time.time()) < 5
    life.beat(9)
  assert dataclasses.replace(read_heartbeat(folder), time=0.0, host="") == dataclasses.replace(
      beat, time=0.0, host="", step=9, doing="ended"
  )
  (begun, ended) = said(folder)
  assert begun[:2] == (3, "start") and begun[2].startswith("from step 3 to 9, on 8 x cpu in 1 ")
  assert ended == (9, "end", "after step 9 of 9")


@pytest.mark.parametrize(("error", "expected"), [
    (KeyboardInterrupt("SIGTERM: ended at once"), ["interrupted", "SIGTERM: ended at once"]),
    (OSError("the disk\nis full"), ["failed", "OSError: the disk"]), (DivergedError("x"), []),
])
def test_how_it_ended_by_an_error(folder, error, expected):
  with pytest.raises(type(error)), Life(folder, 0, 9, 0) as life:
    life.beat(4)
    raise error
  assert [part for step, *parts in said(folder)[1:] for part in parts] == expected
  assert read_heartbeat(folder).doing == "ended"


def test_who_asked_is_said(folder):
  with Life(folder, 0, 9, 0) as life:
    life.beat(4)
    life.interrupted("SIGTERM")
  assert said(folder)[-1] == (4, "interrupted", "after step 4 of 9, by SIGTERM")


def test_a_process_that_ended_without_a_word_is_noticed_by_the_next(folder):
  beat = {"time": 1.5e9, "step": 5, "steps": 9, "doing": "saving", "host": "there", "pid": 77}
  (folder / "heartbeat.json").write_text(json.dumps(beat))
  with Life(folder, 4, 9, 0):
    pass
  step, kind, text = said(folder)[0]
  assert (step, kind) == (4, "killed")
  assert text.startswith("process 77 on there ended without a word; it was last heard of at 2017-")
  assert text.endswith(", saving after step 5")
  with Life(folder, 4, 9, 0):
    pass
  assert [kind for _, kind, _ in said(folder)].count("killed") == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"time": 1}', '{"none": 1}'])
def test_a_heartbeat_that_cannot_be_read_is_none(folder, content):
  (folder / "heartbeat.json").write_text(content)
  assert read_heartbeat(folder) is None


def test_what_takes_long_is_named_and_the_stacks_of_a_hang_are_kept(folder, monkeypatch):
  monkeypatch.setattr("dense_jax.runs.life._LEAST_SECONDS", 0.0)
  seen = []

  def hangs_here(moment):
    seen.append(read_heartbeat(folder).doing)
    time.sleep(1.3)

  with Life(folder, 0, 9, 1) as life:
    hook = life.during("evaluating", Hook(3, hangs_here))
    hook.run(Moment(3, None, False))
    assert hook.every == 3
  assert seen == ["evaluating"]
  assert "in hangs_here" in (folder / "stacks-0.txt").read_text()
  hung = [event for event in said(folder) if event[1] == "hung"]
  assert hung == [(3, "hung", "nothing was done for 1 s; the stacks of all threads are in "
                   f"{folder / 'stacks-0.txt'}")]


def test_a_run_that_does_not_hang_leaves_no_stacks(folder):
  with Life(folder, 0, 9, 60) as life:
    life.beat(1)
  assert not (folder / "stacks-0.txt").exists()


def test_a_folder_that_is_gone_is_no_error_of_its_own(tmp_path, caplog):
  folder = epath.Path(tmp_path / "run")
  folder.mkdir()
  with pytest.raises(RuntimeError, match="another"), Life(folder, 0, 9, 0):
    shutil.rmtree(folder)
    raise RuntimeError("another")
  assert "the event 'failed' could not be written" in caplog.text
  assert not folder.exists()


def test_when_the_run_began(folder):
  assert first_start(folder) == pytest.approx(time.time(), abs=5)
  record_event(folder, 0, "start", "")
  began = read_events(folder)[0].time
  record_event(folder, 0, "start", "")
  assert first_start(folder) == began
