"""Draws what `look_into` has seen: heat maps of pairs of layers, and lines over layers and runs."""

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from dense_jax.analysis.model import Seen
from dense_jax.analysis.summary import Summary, borders, groups
from dense_jax.files import write_atomically
from dense_jax.statistics import Estimate

_TITLES = {
    "cosine": "cosine similarity", "cka": "linear CKA (debiased)",
    "information": "Gaussian information, nats", "probe": "row recovered from column, $R^2$",
}


def plot_seen(seen: Seen, file: epath.Path) -> None:
  """Draws all figures into one PNG file."""
  from matplotlib.figure import Figure

  maps: list[tuple[str, np.ndarray, tuple[int | None, int | None]]] = [
      (f"{kind}: {_TITLES[name]}", matrix, (0, 1) if name != "information" else (None, None))
      for kind, figures in seen.similarity.items() for name, matrix in figures.items()
  ]
  maps += [
      ("gradient: from row to column", seen.gradient, (0, None)),
      ("gradient without dense paths", seen.cut_gradient, (0, None)),
  ]
  columns = 4
  rows = -(-len(maps) // columns) + 1
  figure = Figure(figsize=(4 * columns, 3.4 * rows), layout="constrained")
  axes = figure.subplots(rows, columns)
  for place, (title, matrix, (low, high)) in zip(axes.flat, maps, strict=False):
    shown = np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix) if high is None else matrix
    image = place.imshow(shown, vmin=low, vmax=high, cmap="viridis")
    place.set_title(title, fontsize=10)
    place.set_xlabel("layer")
    place.set_ylabel("layer")
    figure.colorbar(image, ax=place, shrink=0.8)
  for place in axes.flat[len(maps) : -columns]:
    place.axis("off")
  _lines(axes[-1], seen)
  _save(figure, file)


def plot_groups(summaries: Mapping[str, Summary], file: epath.Path) -> None:
  """Draws the means of each group of runs, with their standard errors, into one PNG file."""
  from matplotlib.figure import Figure

  by_group = groups(summaries)
  edges = borders(next(iter(summaries.values())).seen["length"])
  figure = Figure(figsize=(15, 4.2), layout="constrained")
  loss, recovered, lens = figure.subplots(1, 3)
  for number, (name, runs) in enumerate(by_group.items()):
    style = {"label": name, "color": f"C{number}"}  # A model without states is not on all axes.
    places = np.sqrt([max(begin, 1) * end for begin, end in itertools.pairwise(edges)])
    _error_line(loss, places, [run.loss for run in runs], style)
    depth = np.linspace(0, 1, len(runs[0].lens))
    if runs[0].recovered:
      _error_line(recovered, depth[:-1], [run.recovered[:-1] for run in runs], style)
    _error_line(lens, depth, [run.lens for run in runs], style)
  loss.set_xscale("log", base=2)
  for axes, title, label in (
      (loss, "loss by position in a row, nats", "position"),
      (recovered, "state recovered from the last layer's, $R^2$", "depth"),
      (lens, "loss if the head follows the layer, nats", "depth"),
  ):
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)
  figure.legend(*loss.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
  _save(figure, file)


def _save(figure: Any, file: epath.Path) -> None:
  content = io.BytesIO()
  figure.savefig(content, dpi=110)
  write_atomically(file, content.getvalue())


def _error_line(
    axes: Any, places: np.ndarray, runs: Sequence[Sequence[float]], style: Mapping[str, str]
) -> None:
  found = [Estimate.of(values) for values in zip(*runs, strict=True)]
  errors = [each.error for each in found] if len(runs) > 1 else None
  means = [each.mean for each in found]
  axes.errorbar(places, means, yerr=errors, fmt="o-", markersize=3, **style)


def _lines(axes: np.ndarray, seen: Seen) -> None:
  """Draws the lines over layers and over positions into the last row."""
  layers = np.arange(len(seen.lens))
  for kind, ranks in seen.rank.items():
    axes[0].plot(layers, ranks, "o-", label=kind)
  axes[0].set_title("effective rank", fontsize=10)
  axes[0].legend()
  axes[1].plot(layers, seen.lens, "o-")
  axes[1].set_title("loss if the head follows layer, nats", fontsize=10)
  sources = sorted({name for layer in seen.layers for name in layer if name.endswith("_ratio")})
  for name in sources:
    axes[2].plot(layers, [layer.get(name, np.nan) for layer in seen.layers], "o-",
                 label=name.removesuffix("_ratio"))
  axes[2].set_title("read of a source over the own read (RMS)", fontsize=10)
  if sources:
    axes[2].legend()
  axes[3].plot(np.arange(len(seen.loss_at)), seen.loss_at)
  axes[3].set_title("loss by position in a row, nats", fontsize=10)
  for place in axes[:3]:
    place.set_xlabel("layer")
  axes[3].set_xlabel("position")
  for place in axes:
    place.grid(alpha=0.3)
