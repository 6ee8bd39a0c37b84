"""What the launchers share: commands that are shown before they run, or only shown."""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from dense_jax.cli import common
from dense_jax.config import invalid
from dense_jax.errors import InputError


class CommandError(RuntimeError):
  """A command of another program failed.

  Attributes:
    stderr: what it wrote there, if that was read.
  """

  def __init__(self, message: str, stderr: str = "") -> None:
    super().__init__(message)
    self.stderr = stderr


class Runner:
  """Runs commands, each of which is shown first; in a dry run they are only shown.

  Commands begin with `$`, everything else with `#`: what is shown can be pasted into a shell.
  """

  def __init__(self, *, dry_run: bool) -> None:
    self.dry_run = dry_run
    self._asked: set[str] = set()

  def say(self, text: str) -> None:
    """A remark."""
    print(f"# {text}", flush=True)

  def run(self, command: Sequence[str]) -> None:
    """Runs a command, whose output is shown.

    Raises:
      InputError: the program is not installed.
      CommandError: its status is not 0.
    """
    self.show(command)
    if not self.dry_run:
      execute(command)

  def output(self, command: Sequence[str], if_dry: str) -> str:
    """Runs a command that only asks, and returns what it prints; `if_dry` in a dry run.

    It is shown the first time alone.

    Raises:
      InputError: the program is not installed.
      CommandError: its status is not 0; with its `stderr`.
    """
    if shlex.join(command) not in self._asked:
      self.show(command)
    self._asked.add(shlex.join(command))
    if self.dry_run:
      return if_dry
    result = subprocess.run(_found(command), capture_output=True, text=True)
    if result.returncode:
      reason = result.stderr.strip() or "no reason given"
      raise CommandError(
          f"{shlex.join(command)} had status {result.returncode}: {reason}", result.stderr
      )
    return result.stdout

  def sleep(self, seconds: float) -> None:
    """Waits; not in a dry run."""
    if not self.dry_run:
      time.sleep(seconds)

  def show(self, command: Sequence[str]) -> None:
    """Shows a command, as it can be pasted."""
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


def _found(command: Sequence[str]) -> Sequence[str]:
  if not shutil.which(command[0]):
    raise InputError(f"{command[0]} is not installed, or not on PATH; launch/README.md says how")
  return command


def check_name(field: str, value: str) -> str:
  """The value, if it can name a cloud resource.

  Raises:
    InputError: it cannot.
  """
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", value):
    raise invalid(
        field, value, "at most 40 lower-case letters, digits and hyphens, from a letter on"
    )
  return value


def add_place_arguments(parser: argparse.ArgumentParser) -> None:
  """--project, --zone and --dry-run."""
  parser.add_argument("--project", required=True, help="the Google Cloud project")
  parser.add_argument("--zone", required=True, help="such as us-east5-b")
  parser.add_argument("--dry-run", action="store_true", help="show the commands; run none")


def check_place(options: argparse.Namespace) -> None:
  """Checks --project and --zone.

  Raises:
    InputError: one of them cannot be a project or a zone.
  """
  # Old projects have a domain's name before a colon.
  if not re.fullmatch(r"([a-z0-9.-]+:)?[a-z][-a-z0-9]*", options.project):
    raise invalid("--project", options.project, "a project's ID, such as my-project-123")
  if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z0-9]+", options.zone):
    raise invalid("--zone", options.zone, "a zone, such as us-east5-b")


def run(main: Callable[[Sequence[str]], int]) -> None:
  """Ends the process with main's status: 2 on bad input, 1 where a command failed."""

  def without_traceback(arguments: Sequence[str]) -> int:
    try:
      return main(arguments)
    except CommandError as error:
      print(f"error: {error}", file=sys.stderr)
      return 1

  common.run(without_traceback)
