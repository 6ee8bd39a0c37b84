#!/usr/bin/env python3
"""Runs a training command as several processes on this machine.

    python launch/local.py --processes 2 --devices-per-process 4 -- \
        python -m dense_jax.cli.train --config experiments/smoke.py:debug --workdir runs/two

The processes work together as on a cluster: jax.distributed joins them over the loopback
interface, and they communicate with gloo. Their devices are simulated on the CPU. The options
--coordinator, --processes and --process-id are appended to the command.

The output of process 0 is shown unchanged, that of the others on standard error, with the number
of the process before each line, as "[1] ...". Ctrl-C, SIGTERM, a closed terminal and the signals
of schedulers are passed on. When a process fails, the others have 20 seconds to notice and to
end; then they are killed. What a process leaves behind in its process group is killed when it ends.
The exit status is that of the first process that failed, or 128 + N if signal N ended it; it is 2
if the command cannot be started.
"""

import argparse
import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from dense_jax.errors import InputError

GRACE_SECONDS = 20.0
# After the end of all processes, for their last lines.
_READ_SECONDS = 5.0
# The signals that ask a training process to save and to end.
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1,
              signal.SIGUSR2, signal.SIGXCPU)


def _integer(text: str) -> int:
  if not text.isdigit() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= 1")
  return int(text)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--processes", type=_integer, required=True, metavar="N")
  parser.add_argument("--devices-per-process", type=_integer, default=1, metavar="N")
  parser.add_argument("command", nargs="+", help="after --: the command, with its arguments")
  return parser.parse_args(arguments)


def _free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def _environment(devices: int) -> dict[str, str]:
  """Returns this process's environment, changed to simulate a number of CPU devices."""
  count = "--xla_force_host_platform_device_count"
  flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(count)]
  flags.append(f"{count}={devices}")
  return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}


def _show(number: int, child: subprocess.Popen[str]) -> None:
  """Copies a process's output to standard error, line by line."""
  assert child.stdout is not None
  for line in child.stdout:
    with contextlib.suppress(OSError):  # If nobody reads, go on: the process must not block.
      print(f"[{number}] {line}", end="", file=sys.stderr, flush=True)


class _Signals:
  """A context in which signals are passed on; those that come before `begin` wait for it.

  Thus none ends this process between the starts of two others, which would be left alone.
  """

  def __init__(self) -> None:
    self._children: Sequence[subprocess.Popen[str]] | None = None
    self._waiting: list[int] = []
    self._before: dict[int, Any] = {}

  def __enter__(self) -> "_Signals":
    for number in _PASSED_ON:
      # Under nohup SIGHUP is ignored, and must stay so for the processes too.
      if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
        self._before[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *error: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def begin(self, children: Sequence[subprocess.Popen[str]]) -> None:
    """Passes on to `children` what has come, and from now on what comes."""
    self._children = children
    for number in self._waiting:
      self._send(number, children)

  def _receive(self, number: int, frame: FrameType | None) -> None:
    del frame
    if self._children is None:
      self._waiting.append(number)
    else:
      self._send(number, self._children)

  def _send(self, number: int, children: Sequence[subprocess.Popen[str]]) -> None:
    for child in children:
      child.send_signal(number)  # Does nothing if the process has ended.


def _start(options: argparse.Namespace, children: list[subprocess.Popen[str]]) -> None:
  """Starts the processes, and appends each to `children`.

  Raises:
    InputError: the command cannot be started.
  """
  coordinator = f"127.0.0.1:{_free_port()}"
  for number in range(options.processes):
    try:
      child = subprocess.Popen(
          [*options.command, f"--coordinator={coordinator}",
           f"--processes={options.processes}", f"--process-id={number}"],
          env=_environment(options.devices_per_process),
          stdout=subprocess.PIPE if number else None,
          stderr=subprocess.STDOUT if number else None,
          text=True,
          errors="replace",
          # Otherwise a terminal's Ctrl-C would reach them twice, and a second one is obeyed
          # at once, without saving.
          start_new_session=True,
      )
    except OSError as error:
      raise InputError(
          f"{options.command[0]!r} cannot be started ({error.strerror}): expected a program "
          "after --"
      ) from error
    children.append(child)


def _kill_group(child: subprocess.Popen[str]) -> None:
  """Kills a process and those of its group, which may outlive it and hold its output open."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(child.pid, signal.SIGKILL)


def _wait(children: Sequence[subprocess.Popen[str]]) -> int:
  """Waits for all processes; returns the status of the first that failed, or 0."""
  running = dict(enumerate(children))
  status, deadline = 0, math.inf
  while running:
    for number, child in list(running.items()):
      code = child.poll()
      if code is None:
        continue
      _kill_group(child)
      del running[number]
      if not code:
        continue
      how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"had status {code}"
      print(f"process {number} {how}", file=sys.stderr, flush=True)
      if not status:
        status, deadline = code if code > 0 else 128 - code, time.monotonic() + GRACE_SECONDS
    if running and time.monotonic() > deadline:
      # Not SIGTERM, which asks for a checkpoint: without the failed process none can be saved.
      print(f"killing {', '.join(map(str, running))}: still there after {GRACE_SECONDS:g} s",
            file=sys.stderr, flush=True)
      for child in running.values():
        _kill_group(child)
      deadline = math.inf
    time.sleep(0.05)
  return status


def main(arguments: Sequence[str]) -> int:
  """Runs the command; returns the exit status.

  Raises:
    InputError: the command cannot be started.
  """
  options = _parse(arguments)
  children: list[subprocess.Popen[str]] = []
  with _Signals() as signals:
    try:
      _start(options, children)
      signals.begin(children)
      pids = (f"process {number} is {child.pid}" for number, child in enumerate(children))
      print(", ".join(pids), file=sys.stderr, flush=True)
      readers = [
          threading.Thread(target=_show, args=(number, child), daemon=True)
          for number, child in enumerate(children) if number
      ]
      for reader in readers:
        reader.start()
      status = _wait(children)
    except BaseException:
      for child in children:
        _kill_group(child)
        child.wait()
      raise
  deadline = time.monotonic() + _READ_SECONDS
  for reader in readers:  # A process that left its group may keep the output open for ever.
    reader.join(max(0.0, deadline - time.monotonic()))
  return status


def _run() -> int:
  try:
    return main(sys.argv[1:])
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(_run())
