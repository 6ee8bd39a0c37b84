"""Trains a model, or resumes a run."""

import argparse
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence

from dense_jax import distributed, experiment, runs
from dense_jax.cli import common, config_help
from dense_jax.config import ExperimentConfig, invalid
from dense_jax.interrupt import Interrupt
from dense_jax.runs import resume

_EPILOG = f"""
Any key of the configuration is set by --config.KEY=VALUE, for example
  --config.train.steps=2000 --config.data.path='corpus/*.jsonl.zst' --config.model.dense.depth=2
A --workdir that holds a run goes on with it. Model, data and seed are then what they were. What
alters the run's course changes when it is named, as in
  --config.optimizer.learning_rate=1e-4 {resume.FLAG} optimizer.learning_rate
--init-from begins with the parameters and the tokenizer of another model, at step 0 with a fresh
optimizer; data.tokenizer=train then means that tokenizer. The new model may have more dense
connections, and begins with the same function. Without --config the configuration is that of the
run in --workdir or, before it has a checkpoint, that of the model to begin with.
A signal (Ctrl-C, SIGTERM, a closed terminal) saves and ends with status 1; a second one, a second
later or more, ends at once.
Steps that are not finite are skipped; a run that goes back for them in vain ends with status 3, on
which launchers do not start it again (docs/reliability.md).
Of several processes all run this command, with one --workdir that all of them can write to.
"""


def main(arguments: Sequence[str]) -> int:
  """Trains; returns status 0 when all steps are done, 1 when interrupted."""
  command = common.parser("train", "Trains a model, or goes on with a run.")
  command.epilog = _EPILOG
  command.add_argument("--config", metavar="FILE.py[:ARG]", help="an experiment")
  command.add_argument("--workdir", required=True, help="where the run is kept")
  _add_init_arguments(command)
  common.add_allow_change_argument(command)
  common.add_strict_argument(command)
  common.add_process_arguments(command)
  config_help.add_argument(command)
  if config_help.is_asked(arguments):
    return config_help.show(command, arguments)
  options, overrides = common.split_overrides(command, arguments)
  init_from = _init_from(options)
  processes = options.coordinator, options.processes, options.process_id
  if options.config is None:
    distributed.initialize(*processes)  # First, as reading a model's configuration needs jax.
    config = experiment.change(runs.base_config(options.workdir, init_from), overrides)
    allowed = common.allowed_changes(options, config)
  else:
    config = experiment.load(options.config, overrides)
    allowed = common.allowed_changes(options, config)  # Before processes wait for each other.
    distributed.initialize(*processes)
  with Interrupt() as interrupt:
    result = runs.train_run(
        config, options.workdir, allow_change=allowed, init_from=init_from,
        strict=options.strict, interrupt=interrupt,
    )
  if distributed.is_first():
    # Without the arguments that differ between processes.
    experiment_of = [] if options.config is None else ["--config", options.config]
    changes = [f"--config.{key}={value}" for key, value in overrides]
    again = [*experiment_of, "--workdir", options.workdir, *changes]
    print(_ending(result, again, options.workdir))
  return 1 if result.interrupted else 0


def _add_init_arguments(command: argparse.ArgumentParser) -> None:
  command.add_argument(
      "--init-from", metavar="FOLDER", help="begin with the model of this run, or of this folder "
      "in a Hugging Face layout; a run that goes on does not read it again"
  )
  command.add_argument(
      "--init-checkpoint", default=runs.InitFrom.checkpoint, metavar="WHICH",
      help="of that run: latest (default), best (held-out loss) or a step"
  )
  command.add_argument(
      "--init-weights", default=runs.InitFrom.weights, choices=("raw", "ema"), help="of that run: "
      "the parameters that were trained, or their average; left out, the average if it keeps one"
  )


def _init_from(options: argparse.Namespace) -> runs.InitFrom | None:
  if options.init_from is not None:
    return runs.InitFrom(options.init_from, options.init_checkpoint, options.init_weights)
  for option, value, usual in (
      ("--init-checkpoint", options.init_checkpoint, runs.InitFrom.checkpoint),
      ("--init-weights", options.init_weights, runs.InitFrom.weights),
  ):
    if value != usual:
      raise invalid(option, value, "no value without --init-from")
  return None


def _ending(result: runs.RunResult, arguments: Sequence[str], workdir: str) -> str:
  """Says how far an interrupted run is, or which commands are next after a finished one."""
  steps = result.config.train.steps
  if result.interrupted:
    done = f"saved step {result.step} of {steps}" if result.step else "no step was done yet"
    return f"{result.interrupted}: {done}; the same command goes on from there"
  return "\n" + next_commands(arguments, workdir, result.config)


def next_commands(arguments: Sequence[str], workdir: str, config: ExperimentConfig) -> str:
  """Returns shell commands to use after a finished run: resume, report, evaluate and sample.

  Args:
    arguments: the command-line arguments that it was trained with.
    workdir: its folder.
    config: its configuration. The resume command doubles the steps and changes no learning rate.
  """
  folder = shlex.quote(workdir)
  horizon = {"train.steps": 2 * config.train.steps}
  if resume.follows_length(config.optimizer):
    horizon["optimizer.schedule_steps"] = config.optimizer.schedule_length(config.train.steps)
  more = [a for a in arguments if not a.startswith((
      "--config.train.steps=", "--config.optimizer.schedule_steps="))]
  again = shlex.join([*more, *(f"--config.{key}={value}" for key, value in horizon.items())])
  executable = pathlib.Path(sys.executable)
  if executable.is_relative_to(pathlib.Path.cwd()):
    executable = executable.relative_to(pathlib.Path.cwd())
  python = shlex.quote(str(executable))
  # The setting for large buffers in huge pages (see Makefile), if this run had it.
  tunables = os.environ.get("GLIBC_TUNABLES", "")
  faster = f"GLIBC_TUNABLES={shlex.quote(tunables)} " if tunables else ""
  prompt = "_" if config.data.task.exists else "import "  # A task's blank.
  return "\n".join([
      f"resume    {faster}{python} -m dense_jax.cli.train {again}",
      f"report    {python} -m dense_jax.cli.report --workdir {folder}",
      f"evaluate  {python} -m dense_jax.cli.evaluate --workdir {folder}",
      f"sample    {python} -m dense_jax.cli.generate --workdir {folder} "
      f"--prompt {shlex.quote(prompt)}",
  ])


if __name__ == "__main__":
  common.run(main)
