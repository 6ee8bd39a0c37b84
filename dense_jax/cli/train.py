"""Trains a model, or goes on with a run."""

import contextlib
import dataclasses
import logging
import math
import sys
from collections.abc import Sequence

import jax
import tqdm
from etils import epath
from jax.sharding import Mesh

from dense_jax import distributed, experiment, sharding
from dense_jax.cli import common, report, run_folder
from dense_jax.cli.memory import check_memory
from dense_jax.config import ExperimentConfig, invalid
from dense_jax.data.pipeline import Datasets, TrainBatches, heldout_batches, load_datasets
from dense_jax.evaluation.perplexity import Evaluator, HeldOut
from dense_jax.files import make_path
from dense_jax.interrupt import Interrupt
from dense_jax.models.params import get_params, with_params
from dense_jax.models.registry import family
from dense_jax.ops import dispatch
from dense_jax.training.checkpoint import Checkpoints, check_name, saved_steps
from dense_jax.training.lock import RunLock
from dense_jax.training.loop import Hook, Logger, Moment, checkpoint_hook, train
from dense_jax.training.metrics import MetricsWriter, Progress
from dense_jax.training.step import Metrics, Trainer, TrainState

# The closing evaluation takes at most this many batches, spread over the held-out text.
_CLOSING_BATCHES = 2000
_EPILOG = """
Any key of the configuration is set by --config.KEY=VALUE, for example
  --config.train.steps=2000 --config.data.path='corpus/*.jsonl.zst' --config.model.dense.depth=2
A --workdir that holds a run goes on with it. A signal (Ctrl-C, SIGTERM, a closed terminal) saves
and ends with status 1; a second one, a second later or more, ends at once.
Of several processes all run this command, with one --workdir that all of them can write to.
"""


def _load_data(config: ExperimentConfig) -> Datasets:
  with tqdm.tqdm(unit="B", unit_scale=True, desc="tokenizing", leave=False,
                 disable=not sys.stderr.isatty()) as bar:
    return load_datasets(config.data, lambda done: bar.update(max(done - bar.n, 0)))


def _with_vocab(config: ExperimentConfig, data: Datasets) -> ExperimentConfig:
  """The configuration with the tokenizer's vocabulary, if it names none."""
  needed = data.tokenizer.vocab_size
  if config.model.vocab_size and config.model.vocab_size < needed:
    raise invalid(
        "config.model.vocab_size", config.model.vocab_size,
        f"0, or an integer >= the tokenizer's {needed}",
    )
  model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or needed)
  return dataclasses.replace(config, model=model)


def _say_what_runs(config: ExperimentConfig, mesh: Mesh, trainer: Trainer) -> None:
  devices = jax.devices()
  form = family(config.model.family).form
  implementation = dispatch.resolve(form, config.model.implementation)
  dense = config.model.dense
  where = f"devices: {len(devices)} x {devices[0].device_kind}"
  if jax.process_count() > 1:
    where = (f"{jax.process_count()} processes x {jax.local_device_count()} devices: "
             f"{devices[0].device_kind}")
  print(
      f"{where} | mesh: {sharding.describe_mesh(mesh.shape)}"
      f" | {config.model.family}, dense depth {dense.depth}"
      + (f" ({dense.inject})" if dense.depth else "")
      + f" | {form} states by: {implementation} | {config.model.dtype}"
  )
  print(report.parameter_table(get_params(trainer.model)), flush=True)


class _Evaluation:
  """Held-out evaluation during training; remembers the latest loss."""

  def __init__(
      self, config: ExperimentConfig, data: Datasets, trainer: Trainer, writer: MetricsWriter,
      progress: Progress, logger: Logger,
  ) -> None:
    self._config, self._data, self._trainer = config, data, trainer
    self._writer, self._progress, self._logger = writer, progress, logger
    self._evaluator = Evaluator(trainer.model, chunk=config.train.loss_chunk)
    self._latest: tuple[int, float] | None = None

  def score(self, state: TrainState, batches: int) -> tuple[HeldOut, float]:
    """Sums, and bits per byte."""
    held_out = self._evaluator(
        state.params,
        heldout_batches(
            self._data.heldout, self._config.data.seq_len, self._config.train.batch_size, batches,
            self._trainer.rows,
        ),
        self._trainer.put,
    )
    return held_out, held_out.bits_per_byte(report.targets_per_byte(self._data.heldout))

  def run(self, moment: Moment) -> None:
    """Scores and writes down, once a step."""
    if self._latest and self._latest[0] == moment.step:
      return
    self._logger.pause()
    held_out, bits = self.score(moment.state, self._config.train.eval_batches)
    self._latest = (moment.step, held_out.loss)
    self._writer.write(
        moment.step, {"heldout_loss": held_out.loss, "heldout_bits_per_byte": bits}
    )
    self._progress.line(f"step {moment.step}  {report.perplexity_line(held_out, bits)}")
    self._logger.resume()

  def loss(self, moment: Moment) -> float | None:
    """The held-out loss at that moment; None where a run that must stop has no time."""
    if moment.interrupted or not self._config.train.keep_best:
      return None
    self.run(moment)
    return self._latest[1] if self._latest else None


def _start(
    trainer: Trainer, checkpoints: Checkpoints, batches: TrainBatches, seed: int
) -> TrainState:
  """The newest checkpoint's state, or a fresh one."""
  if checkpoints.latest is None:
    return trainer.init(seed)
  state, position = checkpoints.restore(trainer.state_shapes, checkpoints.latest)
  batches.set_state(position)
  return state


def _saved(workdir: epath.Path) -> str:
  """What a process that ends now leaves, and how to go on."""
  steps = saved_steps(workdir / common.CHECKPOINTS)
  if not steps:
    return "nothing was saved; the same command begins again"
  return f"step {steps[-1]} is saved; the same command goes on from there"


def _saved_at_once(workdir: epath.Path) -> str:
  """The same, where steps or a save were under way."""
  return (
      "ended at once, without what was done since the newest checkpoint (a save that was under "
      f"way is cleared by the next start): {_saved(workdir)}"
  )


def main(arguments: Sequence[str]) -> int:
  """Trains; returns 0 when all steps are done, 1 when interrupted."""
  command = common.parser("train", "Trains a model, or goes on with a run.")
  command.epilog = _EPILOG
  command.add_argument("--config", required=True, metavar="FILE.py[:ARG]", help="an experiment")
  command.add_argument("--workdir", required=True, help="where the run is kept")
  common.add_process_arguments(command)
  options, overrides = common.split_overrides(command, arguments)
  config = experiment.load(options.config, overrides)
  workdir = make_path(options.workdir, "--workdir")
  check_name(workdir, "--workdir")
  distributed.initialize(options.coordinator, options.processes, options.process_id)
  with distributed.only_first_prints():
    status = _run(config, workdir)
    if not status and distributed.is_first():
      # Without what tells one process from another.
      changes = [f"--config.{key}={value}" for key, value in overrides]
      again = ["--config", options.config, "--workdir", options.workdir, *changes]
      print(report.next_commands(again, options.workdir, config))
  return status


def _run(config: ExperimentConfig, workdir: epath.Path) -> int:
  """`main`, once the processes have joined; returns its status."""
  with contextlib.ExitStack() as stack:
    interrupt = stack.enter_context(Interrupt(lambda: _saved(workdir)))
    lock = _take_lock(stack, workdir)
    distributed.by_first(lambda: run_folder.check_config(workdir, config))
    mesh = sharding.make_mesh(config.mesh)
    data = _load_data(config)
    config = _with_vocab(config, data)
    check_memory(config)
    trainer = Trainer(config, mesh)
    _say_what_runs(config, mesh, trainer)
    # Before the first of them writes, all have looked at the folder.
    distributed.check_same({"the configuration": config, "config.data": data.fingerprint})
    distributed.by_first(lambda: run_folder.check_data(workdir, data))
    batches = stack.enter_context(contextlib.closing(TrainBatches(
        data.train, config.data.seq_len, config.train.batch_size, config.seed, rows=trainer.rows
    )))
    checkpoints = stack.enter_context(contextlib.closing(Checkpoints(
        workdir / common.CHECKPOINTS, config.model,
        keep_last=config.train.keep_last, keep_best=config.train.keep_best,
    )))
    distributed.check_same({"--workdir (its newest checkpoint)": checkpoints.latest})
    state = _start(trainer, checkpoints, batches, config.seed)
    distributed.by_first(lambda: run_folder.begin(workdir, config, data))
    state, evaluation, logger = _train(
        config, workdir, data, trainer, state, batches, checkpoints, lock, interrupt
    )
    checkpoints.wait()
    step = int(state.step)
    if step < config.train.steps:
      done = f"saved step {step} of {config.train.steps}" if step else "no step was done yet"
      asked = interrupt.requested or "a signal to another process"
      print(f"{asked}: {done}; the same command goes on from there")
      return 1
    interrupt.obey(
        lambda: f"all {step} steps are done and saved, and the closing report is left out; the "
        "same command makes it"
    )
    _close(config, data, evaluation, state, workdir, trainer, logger)
  return 0


def _take_lock(stack: contextlib.ExitStack, workdir: epath.Path) -> RunLock | None:
  """The right to write into the folder, which the first process takes for all."""
  locks: list[RunLock] = []

  def take() -> None:
    locks.append(RunLock(workdir, lambda said: print(said, flush=True)))
    stack.callback(locks[0].release)

  distributed.by_first(take)
  return locks[0] if locks else None


def _train(
    config: ExperimentConfig, workdir: epath.Path, data: Datasets, trainer: Trainer,
    state: TrainState, batches: TrainBatches, checkpoints: Checkpoints, lock: RunLock | None,
    interrupt: Interrupt,
) -> tuple[TrainState, _Evaluation, Logger]:
  """Trains, with all that is written meanwhile; what it opens it closes, whatever happens."""
  step = int(state.step)
  print(f"from step {step} to {config.train.steps} in {workdir}", flush=True)
  with contextlib.ExitStack() as stack:
    writer = stack.enter_context(contextlib.closing(
        MetricsWriter(workdir, step, enabled=distributed.is_first())
    ))
    progress = stack.enter_context(contextlib.closing(Progress(step, config.train.steps)))
    logger = Logger(
        writer, progress, every=config.train.log_every, first_step=step,
        steps=config.train.steps, tokens_per_step=config.train.batch_size * config.data.seq_len,
    )
    evaluation = _Evaluation(config, data, trainer, writer, progress, logger)

    def heldout_loss(moment: Moment) -> float | None:
      if lock:
        lock.check()
      return evaluation.loss(moment)

    def on_metrics(step: int, metrics: Metrics) -> None:
      if lock and lock.lost:
        lock.check()
      logger(step, metrics)

    hooks = [
        Hook(config.train.eval_every, evaluation.run, if_interrupted=False),
        checkpoint_hook(checkpoints, batches, writer, config.train.checkpoint_every, heldout_loss),
    ]
    state = train(
        trainer, state, batches, steps=config.train.steps, hooks=hooks, on_metrics=on_metrics,
        interrupt=interrupt, meanwhile=lambda: _saved_at_once(workdir),
    )
  return state, evaluation, logger


def _close(
    config: ExperimentConfig, data: Datasets, evaluation: _Evaluation, state: TrainState,
    workdir: epath.Path, trainer: Trainer, logger: Logger,
) -> None:
  """What a finished run shows; all processes score and gather, the first does the rest."""
  held_out, _ = evaluation.score(state, _CLOSING_BATCHES)
  params = distributed.to_host(state.params)
  if not distributed.is_first():
    return
  dense = config.model.dense.depth
  name = f"this model ({config.model.family}, dense depth {dense})"
  print("\n" + report.comparison(held_out, data, name, logger.tokens_per_second))
  model = with_params(trainer.model, params)
  for prompt, continuation in report.samples(model, data, seed=config.seed):
    print(f"\n--- prompt\n{prompt}\n--- continuation\n{continuation}")
  print(f"\nplot      {report.plot_loss(workdir)}")
  if not math.isfinite(held_out.loss):
    logging.getLogger(__name__).warning("the loss is not finite: lower the learning rate")


if __name__ == "__main__":
  common.run(main)
