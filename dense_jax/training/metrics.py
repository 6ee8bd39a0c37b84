"""What a run writes down: metrics.jsonl, TensorBoard events, and a progress bar."""

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import IO

import tqdm
from etils import epath

from dense_jax.files import is_remote, write_atomically

METRICS_FILE = "metrics.jsonl"
_UPLOAD_SECONDS = 30.0


def read_metrics(workdir: epath.Path) -> list[dict[str, float]]:
  """The lines of a run's metrics.jsonl; a last line that was cut off is left out."""
  file = workdir / METRICS_FILE
  if not file.is_file():
    return []
  lines = []
  for line in file.read_text().splitlines():
    try:
      lines.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return lines


class MetricsWriter:
  """Appends to metrics.jsonl and TensorBoard's events.

  A run that goes on from a checkpoint drops the lines of later steps: it writes them again.
  """

  def __init__(self, workdir: epath.Path, first_step: int, *, enabled: bool = True) -> None:
    """Writes nothing unless `enabled`: of several processes one is."""
    self._enabled = enabled
    if not enabled:
      return
    from tensorboardX import SummaryWriter

    kept = [line for line in read_metrics(workdir) if line["step"] <= first_step]
    file = workdir / METRICS_FILE
    self._lines = _open_lines(file, "".join(json.dumps(line) + "\n" for line in kept))
    self._events = SummaryWriter(os.fspath(workdir / "tensorboard"), purge_step=first_step + 1)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """One line; floats keep all their digits."""
    if not self._enabled:
      return
    self._lines.write(json.dumps({"step": step, **values}) + "\n")
    for name, value in values.items():
      self._events.add_scalar(name, value, step)

  def flush(self) -> None:
    """Lines that were written are there, whatever happens next."""
    if self._enabled:
      self._lines.flush()

  def close(self) -> None:
    """Flushes both."""
    if self._enabled:
      self._lines.close()
      self._events.close()


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
