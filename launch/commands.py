"""Code shared by the launchers: showing and running commands, and checking common arguments."""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from dense_jax.cli import common
from dense_jax.config import invalid
from dense_jax.errors import InputError

# A connection may hang for ever. The workers themselves answer within seconds.
_LOOK_SECONDS = 180.0


class CommandError(RuntimeError):
  """Raised if a command of another program failed.

  Attributes:
    stderr: its standard error, if that was captured; else "".
  """

  def __init__(self, message: str, stderr: str = "") -> None:
    super().__init__(message)
    self.stderr = stderr


class Runner:
  """Prints commands and runs them; in a dry run, only prints them.

  Commands are printed after `$`, and remarks after `#`, as in a shell session.
  """

  def __init__(self, *, dry_run: bool) -> None:
    self.dry_run = dry_run
    self._asked: set[str] = set()

  def say(self, text: str) -> None:
    """Prints a remark."""
    print(f"# {text}", flush=True)

  def run(self, command: Sequence[str]) -> None:
    """Prints and runs a command, with this process's input and output.

    Raises:
      InputError: the program is not installed.
      CommandError: its status is not 0.
    """
    self.show(command)
    if not self.dry_run:
      execute(command)

  def output(self, command: Sequence[str], if_dry: str) -> str:
    """Runs a command that changes nothing, and returns its standard output.

    The command is printed only the first time. It has no input, and 180 s to answer.

    Args:
      command: the program and its arguments.
      if_dry: returned in a dry run, instead of running the command.

    Raises:
      InputError: the program is not installed.
      CommandError: its status is not 0, and the error has its `stderr`; or it did not answer.
    """
    if shlex.join(command) not in self._asked:
      self.show(command)
    self._asked.add(shlex.join(command))
    if self.dry_run:
      return if_dry
    status, output, errors = _answer(_found(command))
    if status:
      reason = errors.strip() or "no reason given"
      raise CommandError(f"{shlex.join(command)} had status {status}: {reason}", errors)
    return output

  def sleep(self, seconds: float) -> None:
    """Waits for some seconds, except in a dry run."""
    if not self.dry_run:
      time.sleep(seconds)

  def show(self, command: Sequence[str]) -> None:
    """Prints a command, quoted for a shell."""
    print(f"$ {shlex.join(command)}", flush=True)


def execute(command: Sequence[str]) -> None:
  """Runs a command with this process's input and output.

  Raises:
    InputError: the program is not installed.
    CommandError: its status is not 0.
  """
  status = subprocess.run(_found(command)).returncode
  if status:
    raise CommandError(f"{shlex.join(command)} had status {status}")


def _answer(command: Sequence[str]) -> tuple[int, str, str]:
  """Runs a command in the background; returns its status, standard output and standard error.

  Raises:
    CommandError: it did not answer in time, and was killed with all that it had started.
  """
  with subprocess.Popen(
      command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      start_new_session=True,
  ) as process:
    try:
      output, errors = process.communicate(timeout=_LOOK_SECONDS)
    except BaseException as error:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      if isinstance(error, subprocess.TimeoutExpired):
        raise CommandError(
            f"{shlex.join(command)} did not answer within {_LOOK_SECONDS:g} s"
        ) from error
      raise
  return process.returncode, output, errors


def _found(command: Sequence[str]) -> Sequence[str]:
  if not shutil.which(command[0]):
    raise InputError(f"{command[0]} is not installed, or not on PATH; launch/README.md says how")
  return command


def check_name(field: str, value: str) -> str:
  """Returns `value` if it is a valid name of a cloud resource.

  Raises:
    InputError: it is not; the error names `field`.
  """
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", value):
    raise invalid(
        field, value, "at most 40 lower-case letters, digits and hyphens, from a letter on"
    )
  return value


def add_place_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds --project, --zone and --dry-run."""
  parser.add_argument("--project", required=True, help="the Google Cloud project")
  parser.add_argument("--zone", required=True, help="such as us-east5-b")
  parser.add_argument("--dry-run", action="store_true", help="show the commands; run none")


def check_place(options: argparse.Namespace) -> None:
  """Checks --project and --zone.

  Raises:
    InputError: one of them is not a valid project ID or zone.
  """
  # The IDs of old projects begin with a domain name and a colon.
  if not re.fullmatch(r"([a-z0-9.-]+:)?[a-z][-a-z0-9]*", options.project):
    raise invalid("--project", options.project, "a project's ID, such as my-project-123")
  if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z0-9]+", options.zone):
    raise invalid("--zone", options.zone, "a zone, such as us-east5-b")


def run(main: Callable[[Sequence[str]], int]) -> None:
  """Runs `main` and exits with its status; 2 on bad input, 1 if a command failed."""

  def without_traceback(arguments: Sequence[str]) -> int:
    try:
      return main(arguments)
    except CommandError as error:
      print(f"error: {error}", file=sys.stderr)
      return 1

  common.run(without_traceback)
