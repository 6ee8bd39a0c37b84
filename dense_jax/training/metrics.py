"""Writes and reads a run's metrics: metrics.jsonl, TensorBoard events, and a progress bar."""

import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import tqdm
from etils import epath

from dense_jax.files import is_remote, parse_json, write_atomically

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"
_UPLOAD_SECONDS = 30.0
_LOG = logging.getLogger(__name__)


def read_metrics(workdir: epath.Path) -> list[dict[str, float]]:
  """Reads the records of a run's metrics.jsonl; damaged lines are left out."""
  return _read(workdir / METRICS_FILE)[0]


def _read(file: epath.Path) -> tuple[list[dict[str, float]], int, bytes]:
  """Reads a file's records, the number of its damaged lines, and its content.

  A last line without a newline that begins like a record was cut off by a kill, and does not
  count as damaged.
  """
  content = file.read_bytes() if file.is_file() else b""
  *lines, rest = content.split(b"\n")
  parsed = [_record(line) for line in lines]
  records = [record for record in parsed if record is not None]
  damaged = len(parsed) - len(records)
  last = _record(rest)
  damaged += bool(rest) and not rest.startswith(b"{")
  return records + ([last] if last is not None else []), damaged, content


def _record(line: bytes) -> dict[str, float] | None:
  """Parses a line that this module wrote; returns None for any other."""
  try:
    record = parse_json(line)
  except ValueError:
    return None
  if not isinstance(record, dict) or type(record.get("step")) is not int:
    return None
  return record if all(type(value) in (int, float) for value in record.values()) else None


class Writer(Protocol):
  """Anything that takes a run's records."""

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Takes one record."""

  def flush(self) -> None:
    """Hands all records over."""

  def close(self) -> None:
    """Hands all records over, and takes no more."""


class MetricsWriter:
  """Appends to metrics.jsonl, to TensorBoard's events, and to other writers.

  A run that resumes from a checkpoint drops the lines of later steps, which it will write again. No
  run ends for want of a record: what a full disk or a bucket refuses is warned of, and tried again
  with the next record.
  """

  def __init__(
      self, workdir: epath.Path, first_step: int, *, enabled: bool = True,
      also: Sequence[Writer] = (),
  ) -> None:
    """Opens both files; a metrics.jsonl with damaged lines is kept under another name.

    Args:
      workdir: the run's folder.
      first_step: the step from which the run starts or resumes; lines of later steps are dropped.
      enabled: false makes all methods do nothing: of several processes, only one writes.
      also: other writers, which are this one's from now on.
    """
    self._enabled = enabled
    if not enabled:
      return
    file = workdir / METRICS_FILE
    records, damaged, content = _read(file)
    if damaged:
      beside = _unused(file)
      write_atomically(beside, content)
      _LOG.warning(
          "%s: %d lines are damaged and left out; the file as it was is kept as %s", file, damaged,
          beside.name,
      )
    kept = [record for record in records if record["step"] <= first_step]
    lines = _RemoteLines if is_remote(file) else _LocalLines
    self._writers: list[Writer] = [
        lines(file, "".join(_line(**line) for line in kept)),
        _Events(workdir / EVENTS_FOLDER, first_step), *also,
    ]
    self._warned = False

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes one record; floats keep all their digits."""
    self._each(lambda writer: writer.write(step, values))

  def flush(self) -> None:
    """Hands all records over to the file system or the bucket."""
    self._each(lambda writer: writer.flush())

  def close(self) -> None:
    """Flushes and closes both files, and the other writers."""
    self._each(lambda writer: writer.close())

  def _each(self, act: Callable[[Writer], None]) -> None:
    failed = False
    for writer in self._writers if self._enabled else ():
      try:
        act(writer)
      except Exception as error:  # A bucket has errors of its own.
        failed = True
        if not self._warned:
          _LOG.warning("records cannot be written (%s): training goes on, and they are tried again",
                       error)
    if self._enabled:
      self._warned = failed


def _unused(file: epath.Path) -> epath.Path:
  """Returns a path beside `file` that does not exist."""
  numbers = (file.with_name(f"{file.name}.damaged-{n}") for n in itertools.count(1))
  return next(name for name in numbers if not name.exists())


class _Events:
  """TensorBoard's events, written in the caller's thread, so that a kill leaves whole events."""

  def __init__(self, folder: epath.Path, first_step: int) -> None:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2

    folder.mkdir(parents=True, exist_ok=True)
    self._remote = is_remote(folder)
    # The process id keeps names apart: two writers made in the same second would share one.
    self._writer = EventsWriter(os.fspath(folder / "events"), f".{os.getpid()}")
    # Tells TensorBoard that this file supersedes later steps of earlier files.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._writer.write_event(
        event_pb2.Event(wall_time=time.time(), step=first_step + 1, session_log=start)
    )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    from tensorboardX.proto import event_pb2
    from tensorboardX.summary import scalar

    for name, value in values.items():
      self._writer.write_event(
          event_pb2.Event(wall_time=time.time(), step=step, summary=scalar(name, value))
      )
    if not self._remote:  # A bucket cannot append: every flush uploads the whole file.
      self._writer.flush()

  def flush(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


def _line(step: float, **values: float) -> str:
  return json.dumps({"step": step, **values}) + "\n"


class _LocalLines:
  """A file that lines are appended to; one that a full disk refuses is appended with the next."""

  def __init__(self, file: epath.Path, text: str) -> None:
    """Replaces the file's content with `text`, and opens it."""
    write_atomically(file, text.encode())
    self._file = os.open(file, os.O_WRONLY | os.O_APPEND)
    self._waiting = b""

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self._waiting += _line(step, **values).encode()
    self.flush()

  def flush(self) -> None:
    size = os.fstat(self._file).st_size
    rest = self._waiting
    try:
      while rest:
        rest = rest[os.write(self._file, rest):]
    except OSError:
      os.ftruncate(self._file, size)  # No line is left cut off.
      raise
    self._waiting = b""

  def close(self) -> None:
    try:
      self.flush()
    finally:
      os.close(self._file)


class _RemoteLines:
  """A text file in a bucket, which cannot be appended to: it is rewritten now and then."""

  def __init__(self, file: epath.Path, text: str) -> None:
    """Replaces the file's content with `text`."""
    write_atomically(file, text.encode())
    self._file, self._text = file, text
    self._uploaded, self._time = text, time.monotonic()

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self._text += _line(step, **values)
    if time.monotonic() - self._time > _UPLOAD_SECONDS:
      self.flush()

  def flush(self) -> None:
    if self._text != self._uploaded:
      write_atomically(self._file, self._text.encode())
    self._uploaded, self._time = self._text, time.monotonic()

  def close(self) -> None:
    self.flush()


class Progress:
  """A progress bar on a terminal, plain lines elsewhere; both show loss, tokens/s and time left."""

  def __init__(self, first_step: int, steps: int) -> None:
    self._terminal = sys.stderr.isatty()
    self._steps = steps
    self._bar = tqdm.tqdm(
        total=steps, initial=first_step, unit="step", disable=not self._terminal,
        dynamic_ncols=True,
    )

  def step(self, step: int) -> None:
    """Moves the bar to `step`, the number of steps done."""
    self._bar.update(step - self._bar.n)

  def log(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
    """Shows the latest training figures."""
    if self._terminal:
      self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s")
      return
    left = tqdm.tqdm.format_interval(max(seconds_left, 0))
    self.line(
        f"step {step}/{self._steps}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  "
        f"ETA {left}"
    )

  def line(self, text: str) -> None:
    """Prints a line above the bar."""
    tqdm.tqdm.write(text)
    sys.stdout.flush()

  def close(self) -> None:
    """Closes the bar."""
    self._bar.close()
