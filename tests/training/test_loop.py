"""The end of the loop, and the hooks that are then called; nothing is trained here."""

import dataclasses
import itertools

import jax.numpy as jnp
import pytest

from dense_jax.interrupt import Interrupt
from dense_jax.training.loop import DataWait, Hook, Logger, train
from dense_jax.training.step import TrainState


class Counter:
  """A stand-in for a trainer: a step counts."""

  def put(self, batch):
    return batch

  def __init__(self):
    self.asked = []

  def compile(self, state, batch):
    pass

  def step_at(self, step):
    self.asked.append(step)
    return lambda state, batch: (dataclasses.replace(state, step=state.step + 1), {})


def _run(steps, hooks, interrupt, on_metrics=lambda step, metrics: None, trainer=None, first=0):
  state = TrainState(first, {}, jnp.zeros(()))
  return train(
      trainer or Counter(), state, itertools.repeat(None), steps=steps, hooks=hooks,
      on_metrics=on_metrics, interrupt=interrupt, data_wait=DataWait(),
  ).step


def _recorder(every, **options):
  calls = []
  hook = Hook(every, lambda moment: calls.append((moment.step, moment.interrupted)), **options)
  return calls, hook


def test_hooks_are_called_after_their_steps_and_the_last():
  calls, hook = _recorder(3)
  assert _run(7, [hook], Interrupt()) == 7
  assert calls == [(3, False), (6, False), (7, False)]


def test_a_run_that_is_asked_before_it_begins_does_no_step():
  interrupt = Interrupt()
  interrupt.requested = "SIGTERM"
  calls, hook = _recorder(1)
  assert _run(5, [hook], interrupt) == 0
  assert not calls


@pytest.mark.parametrize(("asked_in", "stops_at"), [("step", 4), ("hook", 5)])
def test_who_is_asked_saves_before_it_stops(asked_in, stops_at):
  """It also does so if the signal comes in a hook, after which nothing else would be saved."""
  interrupt = Interrupt()

  def ask(step):
    if step == 4:
      interrupt.requested = "SIGTERM"

  # The metrics of step 3 are handed over while step 4 runs.
  on_metrics = (lambda step, _: ask(step + 1)) if asked_in == "step" else (lambda *_: None)
  asking = Hook(2, lambda moment: ask(moment.step) if asked_in == "hook" else None)
  evaluations, evaluate = _recorder(1, if_interrupted=False)
  saves, save = _recorder(100)
  assert _run(9, [asking, evaluate, save], interrupt, on_metrics) == stops_at
  assert saves == [(stops_at, True)]
  assert [step for step, _ in evaluations] == list(range(1, stops_at))


def test_each_step_is_asked_for_by_its_number():
  trainer = Counter()
  assert _run(7, [], Interrupt(), trainer=trainer, first=3) == 7
  assert trainer.asked == [4, 5, 6, 7]


class Lines:
  """A stand-in for a writer and for a progress bar."""

  def __init__(self):
    self.written, self.logged = [], []

  def write(self, step, values):
    self.written.append((step, sorted(values)))

  def step(self, step):
    pass

  def log(self, step, *figures):
    self.logged.append(step)


def test_steps_whose_layers_were_measured_are_written_whenever_it_logs():
  lines = Lines()
  logger = Logger(
      lines, lines, every=4, first_step=0, steps=7, tokens_per_step=1, data_wait=DataWait()
  )
  for step in range(1, 8):
    measured = {} if step % 2 else {"layers/0/residual_rms": jnp.ones(())}
    logger(step, {"loss": jnp.ones(())} | measured)
  with_layers, speeds = ["layers/0/residual_rms", "loss"], ["tokens_per_second", "train_seconds"]
  assert lines.written == [
      (2, with_layers), (4, ["data_wait", *with_layers, *speeds]), (6, with_layers),
      (7, ["data_wait", "loss", *speeds]),
  ]
  assert lines.logged == [4, 7]
