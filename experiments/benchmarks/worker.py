"""A program in a process of its own that answers requests, to time it beside this process.

The program reads one JSON object a line from standard input and answers each by one on standard
output; `torch_rival.serve` is its side. Both processes take turns: each waits while the other
computes.
"""

import contextlib
import json
import os
import pathlib
import subprocess
from collections.abc import Mapping
from typing import Any

from dense_jax.errors import InputError

# How long a process may take to end when it is asked nothing more.
_END_SECONDS = 10.0


class Worker:
  """The process."""

  def __init__(
      self, python: str, script: pathlib.Path, environment: Mapping[str, str], *, option: str,
      needs: str,
  ) -> None:
    """Starts it.

    Args:
      python: the Python that runs it.
      script: the program.
      environment: its environment variables.
      option: the command-line option that names the Python, for errors.
      needs: what the program needs, for errors.

    Raises:
      InputError: the Python cannot be started.
    """
    self._script, self._needs = script, needs
    # Threads that spin while they wait would take time from this process's.
    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    try:
      self._process = subprocess.Popen(
          [python, os.fspath(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
          text=True, errors="replace", env={**environment, **quiet},
      )
    except OSError as error:
      raise InputError(f"{option} {python} cannot be started: {error.strerror}") from error

  def ask(self, what: str, number: str, **arguments: Any) -> dict[str, Any]:
    """Returns the answer to a request, which has a number of this name.

    Raises:
      InputError: the process fails, ends, or answers something else than it should.
    """
    assert self._process.stdin is not None
    assert self._process.stdout is not None
    line, answer = "", None
    with contextlib.suppress(BrokenPipeError):  # It has ended; the missing answer tells it too.
      print(json.dumps({"do": what, **arguments}), file=self._process.stdin, flush=True)
      line = self._process.stdout.readline()
    with contextlib.suppress(ValueError):
      answer = json.loads(line)
    if isinstance(answer, dict) and isinstance(answer.get(number), int | float):
      return answer
    if not line:
      why = "the process ended, see above"
    elif isinstance(answer, dict) and "error" in answer:
      why = answer["error"]
    else:
      why = f"expected a JSON object with the number {number!r}, and it answered {line[:80]!r}"
    self.close()
    raise InputError(f"{self._script.name} cannot {what}: {why} (it needs {self._needs})")

  def close(self) -> None:
    """Ends the process; one that does not end by itself is killed."""
    assert self._process.stdin is not None
    assert self._process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    try:
      self._process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()
