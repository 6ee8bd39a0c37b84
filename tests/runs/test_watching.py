"""`dense-jax watch` and the history of a run: what a folder shows, whatever state its run is in."""

import json
import time

import pytest
from etils import epath

from dense_jax import experiment
from dense_jax.cli import main as console
from dense_jax.errors import InputError
from dense_jax.runs import history
from dense_jax.runs.report_page import write_page
from dense_jax.runs.watching import duration, look
from dense_jax.training.events import KINDS, Event, read_events, record_event

NUMBERS = {"loss": 2.5, "grad_norm": 0.5, "tokens_per_second": 400.0, "data_wait": 0.012,
           "train_seconds": 60.0, "goodput": 0.75, "mfu": 0.4, "skipped_steps": 3.0,
           "skipped_in_a_row": 0.0, "peak_memory_bytes": 2.0e9}


@pytest.fixture
def folder(tmp_path):
  """Returns the folder of a run of 100 steps of 8 x 32 tokens, as training leaves it at step 40."""
  config = experiment.load("experiments/smoke.py:debug", [
      ("model.vocab_size", "258"), ("train.steps", "100"), ("train.batch_size", "8"),
      ("data.seq_len", "32"),
  ])
  folder = epath.Path(tmp_path)
  experiment.save(config, folder)
  records = [{"step": step, **NUMBERS} for step in (20, 40)] + [
      {"step": 40, "heldout_loss": 2.75}, {"step": 40, "checkpoint_seconds": 0.25}]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
  (folder / "checkpoints" / "30").mkdir(parents=True)
  record_event(folder, 0, "start", "from step 0 to 100")
  record_event(folder, 30, "returned", "back to step 30")
  return folder


def beats(folder, doing, ago=3.0, step=40):
  beat = {"time": time.time() - ago, "step": step, "steps": 100, "doing": doing, "host": "here",
          "pid": 7}
  (folder / "heartbeat.json").write_text(json.dumps(beat))


def watch(folder, capsys):
  status = console.main(["watch", "--workdir", str(folder), "--once"])
  return status, capsys.readouterr().out.splitlines()


def test_a_run_that_trains(folder, capsys):
  beats(folder, "training")
  status, lines = watch(folder, capsys)
  assert status == 0
  assert lines[0] == "step 40 of 100  [############..................] 40.0%  training"
  assert lines[1:8] == [
      "loss        2.5000, held-out 2.7500, gradient norm 0.5",
      "speed       400 tokens/s, MFU 40.0%, waits for data 1.2% of the time",
      "time        38 s left, goodput 75.0%",  # 60 steps of 256 tokens.
      "skipped     steps: 3, returns to a checkpoint: 1 (passed_over.json)",
      "memory      host 2 GB",
      "checkpoint  step 30, training stood still for 0.25 s",
      "heartbeat   3 s ago, process 7 on here",
  ]
  assert lines[8].endswith("step 0  start: from step 0 to 100")
  assert lines[9].endswith("step 30  returned: back to step 30")


@pytest.mark.parametrize(("beat", "events", "doing", "status"), [
    (None, [], "has not begun to train", 0),
    (("saving", 3, 40), [], "saving", 0),
    (("saving", 500, 40), [], "silent: killed, or it hangs (saving when it was last heard of)", 1),
    (("ended", 500, 40), [("stopped", "x")], "ended (stopped)", 1),
    (("ended", 500, 40), [("interrupted", "by SIGTERM")], "ended (interrupted)", 1),
    (("ended", 500, 100), [("end", "x")], "done", 0),
])
def test_runs_in_any_state(folder, capsys, beat, events, doing, status):
  if beat:
    beats(folder, *beat)
  for kind, text in events:
    record_event(folder, 40, kind, text)
  found, lines = watch(folder, capsys)
  assert (found, lines[0].rpartition("%  ")[2]) == (status, doing)


def test_a_run_before_its_first_record_and_one_of_before_there_were_heartbeats(folder, capsys):
  for name in ("metrics.jsonl", "events.jsonl"):
    (folder / name).unlink()
  (folder / "checkpoints" / "30").rmdir()
  beats(folder, "compiling", step=0)
  status, lines = watch(folder, capsys)
  assert status == 0 and lines[0].endswith("0.0%  compiling")
  assert [line.split()[0] for line in lines[1:]] == ["checkpoint", "heartbeat"]
  (folder / "heartbeat.json").unlink()
  (folder / "checkpoints" / "100").mkdir()
  assert watch(folder, capsys)[1][0].endswith("100.0%  done")
  # It ends by itself, as the run has.
  assert console.main(["watch", "--workdir", str(folder)]) == 0


def test_what_is_no_run_is_refused(tmp_path):
  with pytest.raises(InputError, match=r"expected a run with config\.json"):
    look(epath.Path(tmp_path))


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0 s"), (59.6, "1 min"), (3600, "1 h"), (3725, "1 h 2 min"), (90000, "1 d 1 h"),
    (-3, "0 s"),
])
def test_durations(seconds, text):
  assert duration(seconds) == text


def test_the_history_in_a_sentence_and_a_table(folder):
  record_event(folder, 41, "killed", "process 7 \x1b[31m on there")
  events = read_events(folder)
  assert history.summary(events) == "starts: 1, kills: 1, returns to a checkpoint: 1."
  rows = history.rows(events)
  assert rows[0] == ("time", "step", "what", "in words")
  assert [row[1:] for row in rows[1:]] == [
      ("0", "start", "from step 0 to 100"), ("30", "returned", "back to step 30"),
      ("41", "killed", "process 7 \ufffd[31m on there"),
  ]
  many = [Event(1.0, step, "skipped", "") for step in range(300)]
  rows = history.rows(many)
  assert rows[1][3] == "100 earlier events are left out" and len(rows) == 202
  assert all(kind in history._COUNTED for kind in KINDS if kind != "end")
  assert history.summary([]) == ""


def test_the_page_of_a_report_says_what_happened(folder):
  page = write_page(folder, [("score", "value")], []).read_text()
  assert "What happened" in page and "returns to a checkpoint: 1." in page
  assert "back to step 30" in page
