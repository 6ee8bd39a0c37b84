"""What a run writes down: metrics.jsonl, TensorBoard events, and a progress bar."""

import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import IO

import tqdm
from etils import epath

from dense_jax.files import is_remote, parse_json, write_atomically

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"
_UPLOAD_SECONDS = 30.0
_LOG = logging.getLogger(__name__)


def read_metrics(workdir: epath.Path) -> list[dict[str, float]]:
  """The records of a run's metrics.jsonl; what cannot be read is left out."""
  return _read(workdir / METRICS_FILE)[0]


def _read(file: epath.Path) -> tuple[list[dict[str, float]], int, bytes]:
  """The records of a file, how many of its lines are none, and what it holds.

  A last line without an end is one that a kill cut off, if it begins as one, and counts as nothing.
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
  """A line that this module wrote; None for any other."""
  try:
    record = parse_json(line)
  except ValueError:
    return None
  if not isinstance(record, dict) or type(record.get("step")) is not int:
    return None
  return record if all(type(value) in (int, float) for value in record.values()) else None


class MetricsWriter:
  """Appends to metrics.jsonl and TensorBoard's events; a line is in both, or in neither.

  A run that goes on from a checkpoint drops the lines of later steps: it writes them again.
  """

  def __init__(self, workdir: epath.Path, first_step: int, *, enabled: bool = True) -> None:
    """Opens both files; a metrics.jsonl with damaged lines is kept beside the new one.

    Args:
      workdir: the run's folder.
      first_step: the step from which the run goes on.
      enabled: writes nothing if it is false: of several processes one writes.
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
    self._lines = _open_lines(file, "".join(json.dumps(line) + "\n" for line in kept))
    self._events = _Events(workdir / EVENTS_FOLDER, first_step)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """One line; floats keep all their digits."""
    if not self._enabled:
      return
    self._lines.write(json.dumps({"step": step, **values}) + "\n")
    self._events.write(step, values)

  def flush(self) -> None:
    """Lines that were written are there, whatever happens next."""
    if self._enabled:
      self._lines.flush()
      self._events.flush()

  def close(self) -> None:
    """Flushes both."""
    if self._enabled:
      self._lines.close()
      self._events.close()


def _unused(file: epath.Path) -> epath.Path:
  """A name beside `file` that nothing has."""
  numbers = (file.with_name(f"{file.name}.damaged-{n}") for n in itertools.count(1))
  return next(name for name in numbers if not name.exists())


class _Events:
  """TensorBoard's events, written by the thread that asks: what a kill finds is whole."""

  def __init__(self, folder: epath.Path, first_step: int) -> None:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2

    folder.mkdir(parents=True, exist_ok=True)
    self._remote = is_remote(folder)
    # A process of its own number: names are otherwise the same within a second.
    self._writer = EventsWriter(os.fspath(folder / "events"), f".{os.getpid()}")
    # Tells TensorBoard that later steps of earlier files are done again.
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
    if not self._remote:  # A bucket takes files whole alone.
      self._writer.flush()

  def flush(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


def _open_lines(file: epath.Path, begin: str) -> "IO[str] | _RemoteLines":
  """The file, which now holds what it begins with, open for more lines."""
  write_atomically(file, begin.encode())
  return _RemoteLines(file, begin) if is_remote(file) else open(file, "a", buffering=1)


class _RemoteLines:
  """Lines of a file in a bucket, which knows no appending: it is written again, now and then."""

  def __init__(self, file: epath.Path, text: str) -> None:
    self._file, self._text = file, text
    self._uploaded, self._time = text, time.monotonic()

  def write(self, line: str) -> None:
    self._text += line
    if time.monotonic() - self._time > _UPLOAD_SECONDS:
      self.flush()

  def flush(self) -> None:
    if self._text != self._uploaded:
      write_atomically(self._file, self._text.encode())
    self._uploaded, self._time = self._text, time.monotonic()

  def close(self) -> None:
    self.flush()


class Progress:
  """A bar on a terminal, plain lines elsewhere; both say loss, tokens/s and time left."""

  def __init__(self, first_step: int, steps: int) -> None:
    self._terminal = sys.stderr.isatty()
    self._steps = steps
    self._bar = tqdm.tqdm(
        total=steps, initial=first_step, unit="step", disable=not self._terminal,
        dynamic_ncols=True,
    )

  def step(self, step: int) -> None:
    """A step was done."""
    self._bar.update(step - self._bar.n)

  def log(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
    """The latest training figures."""
    if self._terminal:
      self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s")
      return
    left = tqdm.tqdm.format_interval(max(seconds_left, 0))
    self.line(
        f"step {step}/{self._steps}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  "
        f"ETA {left}"
    )

  def line(self, text: str) -> None:
    """A line that stays, beside the bar."""
    tqdm.tqdm.write(text)
    sys.stdout.flush()

  def close(self) -> None:
    """Ends the bar."""
    self._bar.close()
