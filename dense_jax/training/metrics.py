"""What a run writes down: metrics.jsonl, TensorBoard events, and a progress bar."""

import json
import pathlib
import sys
from collections.abc import Mapping

import tqdm

from dense_jax.files import write_atomically

METRICS_FILE = "metrics.jsonl"


def read_metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
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

  def __init__(self, workdir: pathlib.Path, first_step: int) -> None:
    from tensorboardX import SummaryWriter

    kept = [line for line in read_metrics(workdir) if line["step"] <= first_step]
    file = workdir / METRICS_FILE
    write_atomically(file, "".join(json.dumps(line) + "\n" for line in kept).encode())
    self._lines = file.open("a", buffering=1)
    self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """One line; floats keep all their digits."""
    self._lines.write(json.dumps({"step": step, **values}) + "\n")
    for name, value in values.items():
      self._events.add_scalar(name, value, step)

  def close(self) -> None:
    """Flushes both."""
    self._lines.close()
    self._events.close()


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
