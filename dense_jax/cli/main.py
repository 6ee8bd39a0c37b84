"""The console command `dense-jax COMMAND`, the same as `python -m dense_jax.cli.COMMAND`."""

import importlib
from collections.abc import Sequence

from dense_jax.cli import CONSOLE_COMMAND, common
from dense_jax.errors import InputError, did_you_mean

# Each is a module of dense_jax.cli with `main(arguments) -> status`, imported when it is called.
COMMANDS = {
    "train": "trains a model, or goes on with a run",
    "evaluate": "scores a model on held-out text, or on tasks from local files",
    "report": "shows a finished run: a table beside baselines, samples, the plot of its losses",
    "verify": "checks that a run's checkpoints are what was saved",
    "watch": "shows a run in the terminal: how far it is, how it does, what happened",
    "generate": "continues prompts, a file of them, or a conversation",
    "convert": "writes a run as a Hugging Face style folder, and makes a run of such a folder",
    "tokenize": "tokenizes a text into a folder, for machines that do not have the text",
    "prepare": "tokenizes a corpus into shards, in constant memory; goes on after a kill",
    "inspect_data": "shows documents, rows and the batch of a step, as text and as a picture",
    "sweep": "trains many variants of an experiment, and compares them in one table",
    "analyze": "looks into a run: what its layers share, what is lost with depth",
    "compile": "compiles a run's program for a TPU topology, without a TPU: does it fit?",
}
_HELP = ("help", "-h", "--help")


def main(arguments: Sequence[str]) -> int:
  """Runs the command that the first argument names with the other arguments; returns its status.

  Raises:
    InputError: there is no such command.
  """
  name, *rest = arguments or ["help"]
  if name in _HELP and not rest:
    print(_usage())
    return 0
  if name in _HELP:
    name, rest = rest[0], ["--help"]
  if name not in COMMANDS:
    raise InputError(_unknown(name))
  return importlib.import_module(f"dense_jax.cli.{name}").main(rest)


def _usage() -> str:
  width = max(map(len, COMMANDS))
  return "\n".join([
      f"usage: {CONSOLE_COMMAND} COMMAND [ARGUMENT ...]",
      "",
      *(f"  {name.ljust(width)}  {does}" for name, does in COMMANDS.items()),
      "",
      f"{CONSOLE_COMMAND} COMMAND --help explains a command, and",
      f"{CONSOLE_COMMAND} train --config FILE.py --help-config every key of an experiment.",
      "python -m dense_jax.cli.COMMAND is the same command.",
  ])


def _unknown(name: str) -> str:
  return f"unknown command {name}{did_you_mean(name, COMMANDS)} Commands: {', '.join(COMMANDS)}"


def run() -> None:
  """Runs `main` with the process's arguments and ends the process with its status."""
  common.run(main)


if __name__ == "__main__":
  run()
