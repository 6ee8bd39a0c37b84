"""Parts that all command lines share: arguments and exit status."""

import argparse
import contextlib
import errno
import logging
import os
import pathlib
import re
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax

from dense_jax import distributed, runs
from dense_jax.cli import CONSOLE_COMMAND, is_console_command
from dense_jax.config import ExperimentConfig, invalid
from dense_jax.errors import DivergedError, InputError
from dense_jax.formatting import printable
from dense_jax.interrupt import Interrupt, Output, Stopped
from dense_jax.runs import resume

_LATEST, _AUTO = "latest", "auto"
COMPILED = "~/.cache/dense_jax/compiled"
# The status of a run that cannot go on by itself; launchers start no run again that ends with it.
DIVERGED = 3
_DISK_ERRORS = frozenset({
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.EFBIG
})


def parser(module: str, description: str) -> argparse.ArgumentParser:
  """Makes the argument parser of a command, with the name under which it was called."""
  called = f"{CONSOLE_COMMAND} " if is_console_command() else "python -m dense_jax.cli."
  return argparse.ArgumentParser(
      prog=called + module,
      description=description,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
  )


def add_process_arguments(command: argparse.ArgumentParser) -> None:
  """Adds --coordinator, --processes and --process-id."""
  command.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 of several "
                       "listens; Slurm, Open MPI and TPU slices need none of the three")
  command.add_argument("--processes", type=int, metavar="N", help="their number")
  command.add_argument("--process-id", type=int, metavar="I", help="this one's, from 0 to N - 1")


def add_allow_change_argument(command: argparse.ArgumentParser) -> None:
  """Adds --allow-change."""
  command.add_argument(
      resume.FLAG, action="append", default=[], metavar="KEY,...",
      help="keys that may differ from the run's, though they alter its course",
  )


def allowed_changes(options: argparse.Namespace, config: ExperimentConfig) -> list[str]:
  """Returns the keys of --allow-change.

  Raises:
    InputError: a name is not a key that changes when asked; see `resume.check_allowed`.
  """
  named = ",".join(options.allow_change).split(",")
  allowed = [key.strip() for key in named if key.strip()]
  resume.check_allowed(config, allowed)
  return allowed


def split_overrides(
    command: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
  """Parses `arguments`; returns the options, and the overrides as `take_overrides` does."""
  plain, overrides = take_overrides(arguments)
  return command.parse_args(plain), overrides


def take_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
  """Takes --config.KEY=VALUE and --config.KEY VALUE out of `arguments`.

  Returns:
    The other arguments, and pairs of a dotted key without "config." and its text.

  Raises:
    InputError: a key has no value.
  """
  prefix = "--config."
  plain, overrides = [], []
  rest = iter(arguments)
  for argument in rest:
    if not argument.startswith(prefix):
      plain.append(argument)
      continue
    key, equals, value = argument.removeprefix(prefix).partition("=")
    if not equals:
      value = next(rest, "")
      if not value or value.startswith("--"):
        raise InputError(f"{argument} has no value: expected {argument}=VALUE")
    overrides.append((key, value))
  return plain, overrides


def keep_compiled_programs() -> None:
  """Keeps compiled programs in a folder for later processes, unless jax is configured otherwise.

  JAX_COMPILATION_CACHE_DIR names another folder, and JAX_ENABLE_COMPILATION_CACHE=false keeps none.
  """
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = pathlib.Path(COMPILED).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(folder))


def run(main: Callable[[Sequence[str]], int]) -> None:
  """Runs a command and ends the process with its status.

  The status is 2 on bad input, 3 if a run cannot go on (`DivergedError`), and 1 on any other error.

  A signal or a closed output ends the process with a sentence instead of a traceback. If there are
  several processes, each says which one it is.
  """
  sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)  # type: ignore[assignment]
  logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
  # orbax warns about behaviour that was asked for, and logs errors that it also raises.
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  sys.unraisablehook, threading.excepthook = _say_unraisable, _say_of_thread
  keep_compiled_programs()
  distributed.reserve_threads()
  with Interrupt() as interrupt:
    status, said = _outcome(main)
    # A request that comes now changes neither what is printed nor the status.
    with contextlib.suppress(KeyboardInterrupt):
      interrupt.wait(lambda: "its work was over")
    if said:
      print(said, file=sys.stderr)
    sys.stdout.flush()
    if not distributed.name():  # One of several processes may still wait for others.
      interrupt.done(status)
    if status:
      distributed.end(status)
  sys.exit(status)


def _say_unraisable(raised: Any) -> None:
  """Prints an error in a callback as Python does, except two that say nothing new."""
  # First, a `Stopped` by a signal, which is obeyed all the same. Second, an error of the reads of a
  # checkpoint that were under way when another one failed.
  if isinstance(raised.exc_value, Stopped) or str(raised.exc_value) == "Event loop is closed":
    return
  sys.__unraisablehook__(raised)


def _say_of_thread(raised: Any) -> None:
  """Prints an error that ends a thread as Python does, unless the main thread reports it too."""
  if not _refused_by_disk(raised.exc_value):  # orbax's, which save in the background.
    threading.__excepthook__(raised)


def _outcome(main: Callable[[Sequence[str]], int]) -> tuple[int, str]:
  """Runs `main`; returns its status, and the text to print about how it ended."""
  name = distributed.name
  try:
    status = main(sys.argv[1:])
    sys.stdout.flush()
    return status, ""
  except InputError as error:
    return 2, f"{name()}error: {printable(str(error))}"
  except DivergedError as error:
    return DIVERGED, f"{name()}error: {printable(str(error))}"
  except KeyboardInterrupt as stopped:
    return 1, f"\n{name()}{stopped or 'ended'}"
  except Exception as error:
    refused = _refused_by_disk(error)
    if refused:
      return 2, (
          f"{name()}error: {printable(refused)}. The same command goes on, or begins again, once "
          "that is mended"
      )
    said = traceback.format_exc()
    if name():
      said += (
          f"{name()}ends. If a connection was lost, another process ended before it: see there. "
          "The same command goes on from the newest checkpoint."
      )
    return 1, said


def _refused_by_disk(error: BaseException | None) -> str:
  """Returns what a disk or its permissions refused, and for which file; "" for any other error.

  Another start does not help, so the status is not the one on which launchers try again.
  """
  while error is not None:
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
      return f"{error.strerror}: {error.filename or 'a file could not be written'}"
    # The storage library below orbax raises its own errors.
    number = re.search(r"\[os_error_code='(\d+)'\]", str(error))
    if number and int(number[1]) in _DISK_ERRORS:
      file = re.search(r'file "([^"]*)"', str(error))
      return f"{os.strerror(int(number[1]))}: {file[1] if file else 'a checkpoint'}"
    error = error.__cause__ or error.__context__
  return ""


def add_model_arguments(command: argparse.ArgumentParser) -> None:
  """Adds --workdir with --checkpoint and --weights, and --hf: one of the two names the model."""
  source = command.add_mutually_exclusive_group(required=True)
  source.add_argument("--workdir", help="the folder that training wrote")
  source.add_argument(
      "--hf", metavar="FOLDER", help="a folder in a Hugging Face layout instead, with its tokenizer"
  )
  _add_checkpoint(command)


def add_strict_argument(command: argparse.ArgumentParser) -> None:
  """Adds --strict."""
  command.add_argument(
      "--strict", action="store_true", help="stop, instead of going on by a slower form, if the "
      "kernels that would run on this device do not compute what they should"
  )


def load_model(options: argparse.Namespace) -> runs.LoadedModel:
  """Loads the model that the arguments of `add_model_arguments` name.

  Raises:
    InputError: there is no such model, or --checkpoint or --weights was given with --hf.
  """
  if options.hf is None:
    return runs.restore(
        options.workdir, options.checkpoint, options.weights, strict=options.strict
    )
  check_no_choice(options)
  return runs.load_folder(options.hf, strict=options.strict)


def check_no_choice(options: argparse.Namespace) -> None:
  """Refuses what chooses among a run's parameters, for a folder that --hf names.

  Raises:
    InputError: --checkpoint or --weights was given.
  """
  for name, usual in (("checkpoint", _LATEST), ("weights", _AUTO)):
    value = getattr(options, name)
    if value != usual:
      raise invalid(f"--{name}", value, "no value with --hf, which is one model")


def add_checkpoint_arguments(command: argparse.ArgumentParser, *, several: bool = False) -> None:
  """Adds --workdir, which may take `several` folders, --checkpoint and --weights."""
  if several:
    command.add_argument("--workdir", required=True, nargs="+", help="folders that training wrote")
  else:
    command.add_argument("--workdir", required=True, help="the folder that training wrote")
  _add_checkpoint(command)


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
  command.add_argument(
      "--checkpoint", default=_LATEST, help="latest (default), best (held-out loss) or a step"
  )
  command.add_argument(
      "--weights", default=_AUTO, choices=("raw", "ema"), help="the parameters that were trained, "
      "or their average; left out, the average if the run keeps one (config.train.ema)"
  )
