"""Trains a model, or resumes a run."""

import os
import pathlib
import shlex
import sys
from collections.abc import Sequence

from dense_jax import distributed, experiment, runs
from dense_jax.cli import common, config_help
from dense_jax.config import ExperimentConfig
from dense_jax.interrupt import Interrupt
from dense_jax.runs import resume

_EPILOG = f"""
Any key of the configuration is set by --config.KEY=VALUE, for example
  --config.train.steps=2000 --config.data.path='corpus/*.jsonl.zst' --config.model.dense.depth=2
A --workdir that holds a run goes on with it. Model, data and seed are then what they were. What
alters the run's course changes when it is named, as in
  --config.optimizer.learning_rate=1e-4 {resume.FLAG} optimizer.learning_rate
A signal (Ctrl-C, SIGTERM, a closed terminal) saves and ends with status 1; a second one, a second
later or more, ends at once.
Of several processes all run this command, with one --workdir that all of them can write to.
"""


def main(arguments: Sequence[str]) -> int:
  """Trains; returns status 0 when all steps are done, 1 when interrupted."""
  command = common.parser("train", "Trains a model, or goes on with a run.")
  command.epilog = _EPILOG
  command.add_argument("--config", required=True, metavar="FILE.py[:ARG]", help="an experiment")
  command.add_argument("--workdir", required=True, help="where the run is kept")
  common.add_allow_change_argument(command)
  common.add_process_arguments(command)
  config_help.add_argument(command)
  if config_help.is_asked(arguments):
    return config_help.show(command, arguments)
  options, overrides = common.split_overrides(command, arguments)
  config = experiment.load(options.config, overrides)
  allowed = common.allowed_changes(options, config)  # Before processes wait for each other.
  distributed.initialize(options.coordinator, options.processes, options.process_id)
  with Interrupt() as interrupt:
    result = runs.train_run(config, options.workdir, allow_change=allowed, interrupt=interrupt)
  if distributed.is_first():
    # Without the arguments that differ between processes.
    changes = [f"--config.{key}={value}" for key, value in overrides]
    print(_ending(result, ["--config", options.config, "--workdir", options.workdir, *changes]))
  return 1 if result.interrupted else 0


def _ending(result: runs.RunResult, arguments: Sequence[str]) -> str:
  """Says how far an interrupted run is, or which commands are next after a finished one."""
  steps = result.config.train.steps
  if result.interrupted:
    done = f"saved step {result.step} of {steps}" if result.step else "no step was done yet"
    return f"{result.interrupted}: {done}; the same command goes on from there"
  return "\n" + next_commands(arguments, arguments[3], result.config)


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
  return "\n".join([
      f"resume    {faster}{python} -m dense_jax.cli.train {again}",
      f"report    {python} -m dense_jax.cli.report --workdir {folder}",
      f"evaluate  {python} -m dense_jax.cli.evaluate --workdir {folder}",
      f"sample    {python} -m dense_jax.cli.generate --workdir {folder} --prompt 'import '",
  ])


if __name__ == "__main__":
  common.run(main)
