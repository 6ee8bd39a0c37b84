"""Plots the training and held-out loss of runs."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from dense_jax.files import write_atomically
from dense_jax.runs.workdir import PLOT_FILE
from dense_jax.training.metrics import read_metrics

# matplotlib computes with far larger numbers than it draws, and those must not overflow.
_LARGEST_DRAWN = 1e100


def plot_loss(workdir: epath.Path) -> epath.Path:
  """Draws a run's training and held-out loss into loss.png, and returns its path.

  A loss that is not finite, or whose size is 1e100 or more, leaves a gap. The loss axis is
  logarithmic unless a loss is 1e-100 or less.
  """
  # Not pyplot, whose backend may be a notebook's.
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4), layout="constrained")
  draw_losses(figure.subplots(), {"": read_metrics(workdir)})
  file = workdir / PLOT_FILE
  image = io.BytesIO()
  figure.savefig(image, dpi=120)
  write_atomically(file, image.getvalue())
  return file


def draw_losses(axes: Any, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
  """Draws the losses of runs on matplotlib axes; see `plot_loss`.

  Args:
    axes: the axes.
    runs: name -> records of metrics.jsonl. A name of "" is left out of the legend.
  """
  drawn: list[float] = []
  for number, (name, lines) in enumerate(runs.items()):
    for key, label, style in (("loss", "training", "-"), ("heldout_loss", "held-out", "o-")):
      points = [(line["step"], line[key]) for line in lines if key in line]
      losses = [loss if abs(loss) < _LARGEST_DRAWN else math.nan for _, loss in points]
      finite = [loss for loss in losses if not math.isnan(loss)]
      if finite:
        color = f"C{2 * number + (key != 'loss')}"
        axes.plot([step for step, _ in points], losses, style, label=f"{name} {label}".strip(),
                  markersize=4, color=color)
        drawn += finite
  axes.set_xlabel("step")
  axes.set_ylabel("loss (nats per token)")
  axes.grid(alpha=0.3, which="both")
  if drawn:
    axes.legend()
  else:
    axes.text(0.5, 0.5, "no finite loss", ha="center", transform=axes.transAxes)
  if drawn and min(drawn) > 1 / _LARGEST_DRAWN:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    # If the axis spans few powers of ten, label the ticks between them too.
    axes.yaxis.set_minor_formatter("{x:g}" if max(drawn) < 1e3 * min(drawn) else "")
