"""Training from Python: what a script needs, what it gets back, and what is left behind."""

import dataclasses
import json
import os
import runpy
import signal
import sys
import threading
import time

import jax
import numpy as np
import pytest
from etils import epath

from dense_jax import runs, sharding
from dense_jax.cli import analyze
from dense_jax.errors import InputError
from dense_jax.evaluation.evaluators import HeldOutLoss
from dense_jax.interrupt import Stopped
from dense_jax.models.params import with_params
from dense_jax.training.checkpoint import Checkpoints
from dense_jax.training.events import read_events
from dense_jax.training.loop import Hook
from dense_jax.training.optimizer import learning_rate
from dense_jax.training.step import Trainer
from dense_jax.training.stored import saved_steps
from tests.builders import random_like
from tests.helpers import ROOT, tiny_experiment, write_text

SCRIPT = """
import sys
from dense_jax import experiment, runs, sharding

workdir, text = sys.argv[1:]
config = experiment.load("experiments/smoke.py:debug", [
    ("data.path", text), ("data.cache_dir", text + "/.cache"), ("data.heldout_every", "2"),
    ("data.seq_len", "32"), ("train.batch_size", "8"), ("model.family", "gau_retnet"),
])
result = runs.train_run(config, workdir)
print(f"at the end: {result.step} {result.heldout_loss:.3f}")
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def config(text):
  """Returns four steps of a tiny model, each logged, with a checkpoint after every second one."""
  return tiny_experiment(text, [
      ("model.layers", "2"), ("model.dense.depth", "0"),
  ])


@pytest.fixture(autouse=True)
def nothing_is_left():
  """Checks that no thread and no signal handler of a run outlives it."""
  handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
  before = set(threading.enumerate())
  yield
  left = set(threading.enumerate()) - before
  assert not [thread for thread in left if thread.name != "tqdm_monitor"]  # One for all bars.
  assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def changed(config, **groups):
  return dataclasses.replace(config, **{
      group: dataclasses.replace(getattr(config, group), **values)
      for group, values in groups.items()
  })


def column(workdir, name):
  """Returns the numbers of one name in metrics.jsonl, by their steps."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: line[name] for line in lines if name in line}


@pytest.mark.slow
def test_a_script_of_ten_lines(text, tmp_path, monkeypatch, capsys):
  script, workdir = tmp_path / "script.py", tmp_path / "run"
  script.write_text(SCRIPT)
  assert len([line for line in SCRIPT.splitlines() if line]) <= 10
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(sys, "argv", [str(script), str(workdir), str(text)])
  runpy.run_path(str(script))
  out = capsys.readouterr().out
  assert f"from step 0 to 4 in {workdir}" in out
  assert f"at the end: 4 {column(workdir, 'heldout_loss')[4]:.3f}" in out
  assert not (workdir / "lock.json").exists()


def test_what_it_returns_and_what_goes_on_from_it(config, tmp_path, capsys):
  workdir = tmp_path / "run"
  result = runs.train_run(config, workdir)
  assert (result.step, result.interrupted, str(result.workdir)) == (4, "", str(workdir))
  assert result.config.model.vocab_size == 258
  assert result.heldout_loss == column(workdir, "heldout_loss")[4]
  assert result.metrics["loss"] == column(workdir, "loss")[4]
  assert result.metrics["peak_memory_bytes"] > 2**20
  # Nothing is left to do, and nothing is forgotten.
  assert runs.train_run(config, workdir).metrics == result.metrics
  assert f"\nall 4 steps are done in {workdir}\n" in capsys.readouterr().out

  run = runs.restore(workdir)
  assert run.step == 4
  assert run.model(np.asarray([[1, 2, 3]])).shape == (1, 3, 258)
  score = runs.evaluate_run(run)
  assert score.scored == score.windows
  part = runs.evaluate_run(run, batch_size=2, batches=3)
  assert (part.scored, part.windows) == (6, score.windows)
  assert part.held_out.loss == pytest.approx(score.held_out.loss, rel=0.05)
  report = runs.write_report(workdir, "best", batches=2)
  assert report.score.scored == 32 and "windows scored" in report.text
  assert report.plot.exists() and report.file.read_text().startswith("# Step 4 of 4\n")
  assert "tokens per second" in report.page.read_text()

  assert analyze.main(["--workdir", str(workdir), "--batches=2", "--batch-size=2", "--length=20",
                       "--samples=64"]) == 0
  assert "loss if the head follows" in capsys.readouterr().out
  seen = json.loads((workdir / "analysis.json").read_text())
  assert len(seen["loss_at"]) == 20 and len(seen["lens"]) == config.model.layers
  assert (workdir / "analysis.png").exists()


class Vowels(runs.Evaluator):
  """The probability of a vowel after nothing, as an example of a complete evaluator."""

  name, every = "vowels", 3

  def evaluate(self, snapshot):
    """Computes the probability."""
    run = with_params(snapshot.model, snapshot.params)
    tokenizer = snapshot.data.tokenizer
    probabilities_V = jax.nn.softmax(run(np.asarray([[tokenizer.bos_id]]))[0, 0])
    return {"share": sum(probabilities_V[id] for id in tokenizer.encode("aeiou"))}


def test_an_evaluator_is_one_class_and_one_line(config, tmp_path, capsys):
  result = runs.train_run(config, tmp_path / "run", evaluators=[Vowels()])
  shares = column(tmp_path / "run", "vowels_share")
  assert list(shares) == [3, 4]
  assert result.metrics["vowels_share"] == shares[4] == pytest.approx(5 / 258, rel=0.5)
  assert f"step 3  vowels: share {shares[3]:.4g}\n" in capsys.readouterr().out
  assert list(column(tmp_path / "run", "heldout_loss")) == [2, 4]


def test_a_held_out_loss_of_ones_own_ranks_the_checkpoints(config, tmp_path):
  runs.train_run(config, tmp_path / "run", evaluators=[runs.HeldOutLoss(every=3, batches=1)])
  # Checkpoints of steps 2 and 4 are ranked by it, too.
  assert list(column(tmp_path / "run", "heldout_loss")) == [2, 3, 4]


@pytest.mark.parametrize(("evaluators", "message"), [
    ([Vowels(), Vowels()], "expected one of each name, but two are 'vowels'"),
    ([runs.HeldOutLoss(every=-1)], "heldout.every = -1 is not valid: expected an integer >= 0"),
])
def test_evaluators_that_do_not_fit_are_named(config, tmp_path, evaluators, message):
  with pytest.raises(InputError, match=message):
    runs.train_run(config, tmp_path / "run", evaluators=evaluators)
  assert not (tmp_path / "run").exists()


def test_a_run_says_that_it_lives_what_it_costs_and_how_it_ended(config, tmp_path):
  workdir = tmp_path / "run"
  runs.train_run(config, workdir, hooks=[ask(1)])
  runs.train_run(config, workdir)
  events = [(event.step, event.kind) for event in read_events(epath.Path(workdir))]
  assert events == [(0, "start"), (2, "interrupted"), (2, "start"), (4, "end")]
  assert json.loads((workdir / "heartbeat.json").read_text())["doing"] == "ended"
  for name, highest in (("data_wait", 1), ("goodput", 1), ("checkpoint_seconds", 60)):
    values = column(workdir, name)
    assert list(values)[-1] == 4 and all(0 <= value <= highest for value in values.values()), name
  seconds = list(column(workdir, "train_seconds").values())
  assert seconds == sorted(seconds) and seconds[-1] > 0
  runs.train_run(config, workdir)  # Nothing is left to do, and so nothing has happened.
  assert len(read_events(epath.Path(workdir))) == 4


@pytest.mark.slow
def test_chosen_steps_are_profiled(config, tmp_path):
  watched = changed(config, watch={"profile_from": 2, "profile_steps": 2})
  runs.train_run(watched, tmp_path / "run")
  assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_an_error_in_a_hook_leaves_nothing_open(config, tmp_path):
  def fail(moment):
    raise RuntimeError(f"at step {moment.step}")

  workdir = tmp_path / "run"
  with pytest.raises(RuntimeError, match="at step 3"):
    runs.train_run(config, workdir, hooks=[Hook(3, fail)])
  assert not (workdir / "lock.json").exists()
  assert saved_steps(epath.Path(workdir) / "checkpoints") == [2]
  assert list(column(workdir, "loss")) == [1, 2, 3]
  assert runs.train_run(config, workdir).step == 4


def ask(step, times=1):
  """Makes a hook that sends the process SIGTERM after a step."""
  def send(moment):
    if moment.step == step:
      for _ in range(times):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.0 if times == 1 else 1.1)

  return Hook(1, send)


def test_a_signal_saves_and_returns_and_the_same_call_goes_on(config, tmp_path):
  runs.train_run(config, tmp_path / "whole")
  result = runs.train_run(config, tmp_path / "run", hooks=[ask(1)])
  # The step that was under way is done first.
  assert (result.interrupted, result.step) == ("SIGTERM", 2)
  assert runs.train_run(config, tmp_path / "run").interrupted == ""
  # Step 2 was to be scored: that is made up for before step 3.
  for name in ("loss", "heldout_loss"):
    assert column(tmp_path / "run", name) == column(tmp_path / "whole", name)
    assert len(column(tmp_path / "whole", name)) == {"loss": 4, "heldout_loss": 2}[name]


def test_what_was_scored_is_not_scored_again_where_a_run_goes_on(config, tmp_path):
  scored = []

  class Scored(HeldOutLoss):
    def evaluate(self, snapshot):
      scored.append(snapshot.step)
      return super().evaluate(snapshot)

  config = changed(config, optimizer={"schedule_steps": 4})
  for steps in (2, 4):
    runs.train_run(
        changed(config, train={"steps": steps}), tmp_path / "run", evaluators=[Scored()]
    )
  assert scored == [2, 4]


def test_a_second_signal_is_an_exception_and_not_the_end_of_the_process(config, tmp_path):
  with pytest.raises(Stopped, match=r"SIGTERM: ended at once.*nothing was saved"):
    runs.train_run(config, tmp_path / "run", hooks=[ask(1, times=2)])
  assert not (tmp_path / "run" / "lock.json").exists()


def test_a_thread_may_train(config, tmp_path):
  results = []
  thread = threading.Thread(
      target=lambda: results.append(runs.train_run(config, tmp_path / "run"))
  )
  thread.start()
  thread.join()
  assert [result.step for result in results] == [4]


def rates(workdir):
  return [*column(workdir, "learning_rate").values()]


@pytest.mark.slow
def test_going_on_changes_no_learning_rate_unless_it_is_asked_for(config, tmp_path):
  workdir = tmp_path / "run"
  config = changed(config, train={"steps": 6})
  runs.train_run(config, workdir)
  longer = changed(config, train={"steps": 10}, optimizer={"schedule_steps": 6})
  runs.train_run(longer, workdir)
  expected = [float(learning_rate(config.optimizer, 6)(step)) for step in range(10)]
  assert rates(workdir) == pytest.approx(expected)
  falls = np.diff(rates(workdir))
  assert np.all(falls <= 0) and np.all(falls[5:] == 0)  # No jump: they stay where they were.

  again = changed(longer, train={"steps": 12}, optimizer={"schedule": "constant"})
  with pytest.raises(InputError, match=r"config.optimizer.schedule: the run has 'cosine', now"):
    runs.train_run(again, workdir)
  runs.train_run(again, workdir, allow_change=["optimizer.schedule"])
  peak = config.optimizer.learning_rate
  assert rates(workdir) == pytest.approx([*expected, peak, peak])


ADAM = {"clip_norm": 0.0, "first_moment_dtype": "bfloat16", "second_moment_dtype": "bfloat16"}


def test_a_run_that_is_done_stays_what_it_was_trained_with(config, tmp_path):
  runs.train_run(config, tmp_path)
  before = (tmp_path / "config.json").read_bytes()
  other = changed(config, optimizer={"learning_rate": 1e-4})
  runs.train_run(other, tmp_path, allow_change=["optimizer.learning_rate"])
  assert (tmp_path / "config.json").read_bytes() == before
  assert runs.train_run(config, tmp_path).step == 4


@pytest.mark.slow
def test_clipping_and_the_dtype_of_moments_change_when_asked(config, tmp_path):
  workdir = tmp_path / "run"
  runs.train_run(config, workdir)
  names = [f"optimizer.{name}" for name in ADAM]
  other = changed(config, train={"steps": 5}, optimizer={**ADAM, "schedule_steps": 4})
  with pytest.raises(InputError, match=f"Add --allow-change {','.join(names)} to change them"):
    runs.train_run(other, workdir)
  assert runs.train_run(other, workdir, allow_change=names).step == 5
  back = changed(config, train={"steps": 6}, optimizer={"schedule_steps": 4})
  assert runs.train_run(back, workdir, allow_change=names).step == 6


def test_moments_of_another_dtype_are_the_runs_own_rounded(config, tmp_path):
  config = changed(config, model={"vocab_size": 258})
  mesh = sharding.make_mesh(config.mesh)
  state = Trainer(config, mesh).init(0)
  state = dataclasses.replace(state, opt_state=random_like(state.opt_state, 0))
  checkpoints = Checkpoints(epath.Path(tmp_path), config.model)
  checkpoints.save(state, 4, {}, None)
  checkpoints.wait()
  shapes = Trainer(changed(config, optimizer=ADAM), mesh).state_shapes
  restored, _ = checkpoints.restore(shapes, 4)
  checkpoints.close()
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(restored.opt_state)} == {"bfloat16", "int32"}
  jax.tree.map(
      lambda old, new: np.testing.assert_array_equal(old.astype(new.dtype), new),
      state.opt_state, restored.opt_state,
  )


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_file_that_is_missed_because_the_folder_is_gone(config, tmp_path, is_gone):
  workdir = tmp_path / "run"

  def reads(moment):
    if is_gone:
      workdir.rename(tmp_path / "aside")
    (workdir / "missed").read_bytes()

  expected = (InputError, "is gone while the run writes") if is_gone else (OSError, "missed")
  with pytest.raises(expected[0], match=expected[1]):
    runs.train_run(config, workdir, hooks=[Hook(1, reads)])
