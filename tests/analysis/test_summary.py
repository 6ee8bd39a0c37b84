"""Lines of several runs, and the tables of their means."""

import dataclasses

import numpy as np
import pytest
from etils import epath

from dense_jax.analysis import plot
from dense_jax.analysis.model import Seen
from dense_jax.analysis.plot import plot_groups
from dense_jax.analysis.summary import (
    add_summary,
    borders,
    groups,
    markdown,
    mean,
    read_summaries,
    summarize,
)
from dense_jax.errors import InputError


def seen(loss, layers=3, states=True):
  """Figures of a model; position t has the loss `loss` + t."""
  square = np.arange(layers * layers, dtype=float).reshape(layers, layers)
  return Seen(
      similarity={"state": {"probe": square}} if states else {},
      rank={"residual": np.ones(layers)} | ({"state": np.full(layers, 7.12345)} if states else {}),
      lens=np.linspace(loss + 1, loss, layers), gradient=square, cut_gradient=square / 2,
      layers=[
          {}, {"source_1_ratio": 0.5, "other": 2.0}, {"source_1_ratio": 1, "source_2_ratio": 3}
      ],
      loss_at=loss + np.arange(64.0), targets_at=np.full(64, 2), samples=80,
  )


@pytest.fixture
def lines(tmp_path):
  """Two seeds of a cell, and one run without states; their file has all three."""
  summaries = {}
  for workdir, figures in (
      ("sweep/gau_m=2/seed0", seen(2.0)), ("sweep/gau_m=2/seed10", seen(4.0)),
      ("runs/transformer", seen(3.0, states=False)),
  ):
    summary = summarize(f"step 9 of {workdir}", workdir, 8, figures)
    add_summary(epath.Path(tmp_path / "new" / "layers.jsonl"), summaries, summary)
  return summaries, epath.Path(tmp_path / "new" / "layers.jsonl")


@pytest.mark.parametrize(("length", "expected"), [
    (8, [0, 8]), (16, [0, 16]), (17, [0, 16, 17]), (64, [0, 16, 32, 64]),
    (100, [0, 16, 32, 64, 100]),
])
def test_positions_are_averaged_between_doubled_ones(length, expected):
  assert borders(length) == expected


def test_a_mean_of_positions_is_that_of_their_targets():
  targets = np.zeros(64, int)
  targets[[0, 1, 40]] = 1, 3, 5
  losses = np.where(targets, 2.0 + np.arange(64.0), np.nan)
  figures = dataclasses.replace(seen(2.0), loss_at=losses, targets_at=targets)
  np.testing.assert_equal(summarize("a", "a", 1, figures).loss, [2.75, np.nan, 42.0])


def test_runs_of_a_cell_are_one_group():
  def of(*workdirs):
    made = {name: dataclasses.replace(summary, workdir=name) for name in workdirs}
    return {name: [run.workdir for run in runs] for name, runs in groups(made).items()}

  summary = summarize("run", "runs/smoke", 8, seen(2.0))
  assert of("a/16_layers_m=2/seed11", "a/16_layers_m=2/seed2", "a/smoke", "a/seedling") == {
      "16 layers m=2": ["a/16_layers_m=2/seed11", "a/16_layers_m=2/seed2"],
      "smoke": ["a/smoke"], "seedling": ["a/seedling"],
  }
  assert [*of("depth/base/seed0", "parts/base/seed0")] == ["depth/base", "parts/base"]


def test_positions_without_targets_have_no_mean(tmp_path):
  unseen = seen(2.0)
  unseen.targets_at[:16] = 0
  summaries = {
      name: summarize("run", name, 8, unseen) for name in ("mqar/base/seed0", "mqar/base/seed1")
  }
  assert "| base | 2 | - | 25.5 ± 0.0 |" in markdown(summaries, "command")
  plot_groups(summaries, epath.Path(tmp_path / "layers.png"))


def test_a_line_has_what_the_last_layer_tells_of_each(lines):
  summaries, file = lines
  one = summaries["sweep/gau_m=2/seed0"]
  assert one.loss == [9.5, 25.5, 49.5]  # The means of positions 0-15, 16-31 and 32-63.
  assert one.recovered == [2, 5, 8]
  assert one.gradient == [6, 7, 8] and one.cut_gradient == [3, 3.5, 4]
  assert one.rank == [7.123] * 3 and one.lens == [3, 2.5, 2]
  assert one.shares == [[], [0.5], [1, 3]]
  assert one.seen == {"length": 64, "rows": 8, "samples": 80}
  assert read_summaries(file) == summaries


def test_tables_have_means_and_standard_errors(lines):
  text = markdown(lines[0], "dense-jax analyze")
  assert "| gau m=2 | 2 | 10.5 ± 1.0 | 26.5 ± 1.0 | 50.5 ± 1.0 |" in text
  assert "| transformer | 1 | 10.5 | 26.5 | 50.5 |" in text
  # Layers at 0, 1/4, 1/2, 3/4 and all of the depth are 0, 0, 1, 2 and 2 of three.
  assert "| gau m=2 | 2.000 ± 0.000 | 2.000 ± 0.000 | 5.000 ± 0.000 | 8.000 ± 0.000 |" in text
  assert text.count("| transformer ") == 4  # Its states have no rank, and nothing recovers them.


@pytest.mark.parametrize(("values", "expected"), [
    ([0.5, 0.7], "0.600 ± 0.100"), ([20.0, 22.0], "21.0 ± 1.0"), ([200.0, 230.0], "215 ± 15"),
    ([-3.0], "-3.000"),
])
def test_a_mean_has_the_digits_of_its_size(values, expected):
  assert mean(values) == expected


def test_the_picture_has_every_group(lines, tmp_path):
  plot_groups(lines[0], epath.Path(tmp_path / "layers.png"))
  assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_a_group_has_one_color(lines, tmp_path, monkeypatch):
  figures = []
  monkeypatch.setattr(plot, "_save", lambda figure, _: figures.append(figure))
  groups_first = dict(reversed(lines[0].items()))  # The run without states, which one plot lacks.
  plot_groups(groups_first, epath.Path(tmp_path / "layers.png"))
  shown = [{label: handle[0].get_color() for handle, label in
            zip(*axes.get_legend_handles_labels(), strict=True)} for axes in figures[0].axes]
  assert shown[0] == shown[2] and [*shown[0]] == ["transformer", "gau m=2"]
  assert shown[1] == {"gau m=2": shown[0]["gau m=2"]}


def test_a_run_that_was_looked_at_otherwise_is_refused(lines):
  summaries, file = lines
  before = file.read_bytes()
  other = dataclasses.replace(summaries["runs/transformer"], workdir="b", seen={"length": 32})
  with pytest.raises(InputError, match=r"expected the same --length, --batches"):
    add_summary(file, summaries, other)
  assert file.read_bytes() == before


def test_two_processes_add_to_one_file(lines):
  summaries, file = lines
  other = dict(summaries)  # What another process knows, which began at the same time.
  for known, name in ((summaries, "a"), (other, "b"), (summaries, "c")):
    add_summary(file, known, dataclasses.replace(summaries["runs/transformer"], workdir=name))
  assert set(read_summaries(file)) == set(summaries) > {"a", "b", "c"}
  assert set(other) == set(summaries) - {"c"}


@pytest.mark.parametrize("line", ["{", "[]", '{"run": "x"}'])
def test_a_damaged_line_is_named(lines, line):
  _, file = lines
  file.write_text(file.read_text() + line + "\n")
  with pytest.raises(InputError, match=r"layers\.jsonl:4 is damaged: expected the figures"):
    read_summaries(file)
