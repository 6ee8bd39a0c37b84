"""A run's events, beside its numbers: events.jsonl, one JSON object a line.

A line has `time` (seconds since 1970), `step` (steps done), `kind` (one of `KINDS`) and `text` (a
sentence for people). Lines are only ever appended: a run that goes back, or resumes from an
earlier step, keeps what it has met.
"""

import dataclasses
import json
import logging
import os
import time

from etils import epath

from dense_jax import distributed
from dense_jax.files import is_remote, parse_json, write_atomically

EVENTS_FILE = "events.jsonl"
_LOG = logging.getLogger(__name__)

# Kind -> what it says. A reader counts kinds; the rest is in the text.
KINDS = {
    "start": "a process began to train, from its first step or from a checkpoint",
    "killed": "the process before this one ended without a word",
    "end": "all steps were done",
    "interrupted": "a request to end was obeyed",
    "failed": "an error ended the process",
    "skipped": "steps were skipped",
    "returned": "the run went back to a checkpoint, and passes over batches",
    "stopped": "the run gave up: it would have to go back again and again",
    "set aside": "a checkpoint was damaged and is no longer used",
    "save failed": "a checkpoint could not be written",
    "hung": "no step was done for so long that all stacks were written",
}


@dataclasses.dataclass(frozen=True)
class Event:
  """A line of events.jsonl.

  Attributes:
    time: when it was written, in seconds since 1970 by the clock of the first process.
    step: steps done by then.
    kind: one of `KINDS`.
    text: a sentence for people.
  """

  time: float
  step: int
  kind: str
  text: str


def record_event(workdir: epath.Path, step: int, kind: str, text: str) -> None:
  """Appends an event to a run's events.jsonl, on the disk when it returns.

  Of several processes only the first one writes.

  Raises:
    ValueError: `kind` is not one of `KINDS`.
    OSError: the file cannot be written.
  """
  _check_kind(kind)
  if not distributed.is_first():
    return
  event = Event(time.time(), step, kind, text)
  line = json.dumps(dataclasses.asdict(event)).encode() + b"\n"
  file = workdir / EVENTS_FILE
  if is_remote(file):  # A bucket cannot append.
    before = file.read_bytes() if file.exists() else b""
    write_atomically(file, before + line)
    return
  with open(file, "ab+") as lines:
    if lines.tell():
      lines.seek(-1, os.SEEK_END)
      if lines.read(1) != b"\n":  # A kill, or a full disk, cut the last line off.
        line = b"\n" + line
    lines.write(line)
    lines.flush()
    os.fsync(lines.fileno())


def _check_kind(kind: str) -> None:
  if kind not in KINDS:
    raise ValueError(f"unknown kind of event {kind!r}: expected one of {', '.join(KINDS)}")


def note_event(workdir: epath.Path, step: int, kind: str, text: str) -> None:
  """Records an event, and only warns if that fails: a run does not end for want of a line.

  Raises:
    ValueError: `kind` is not one of `KINDS`.
  """
  _check_kind(kind)
  try:
    record_event(workdir, step, kind, text)
  except Exception as error:  # A bucket has errors of its own.
    _LOG.warning("%s: the event %r could not be written: %s", EVENTS_FILE, kind, error)


def read_events(workdir: epath.Path) -> list[Event]:
  """Reads a run's events, the oldest first; damaged lines are left out."""
  file = workdir / EVENTS_FILE
  lines = file.read_bytes().split(b"\n") if file.is_file() else []
  return [event for line in lines if (event := _parsed(line)) is not None]


def _parsed(line: bytes) -> Event | None:
  """Parses a line that `record_event` wrote; returns None for any other."""
  try:
    event = Event(**parse_json(line))
  except (TypeError, ValueError):
    return None
  types = [type(value) for value in (event.time, event.step, event.kind, event.text)]
  return event if types == [float, int, str, str] else None
