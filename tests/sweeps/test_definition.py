"""Sweeps are checked when they are made, and grids have a cell for every combination."""

import pytest

from dense_jax.errors import InputError
from dense_jax.sweeps.definition import Cell, Match, Sweep, grid, load_sweep
from tests.helpers import ROOT

BASE = Cell("base")


def test_a_grid_has_every_combination_that_is_wanted():
  axes = {"model.dense.depth": (1, 2), "model.dense.gate": ("none", "channel")}
  cells = grid(axes, where=lambda values: values["model.dense.depth"] > 1 or
               values["model.dense.gate"] == "channel")
  assert [cell.name for cell in cells] == [
      "depth=1 gate=channel", "depth=2 gate=none", "depth=2 gate=channel"]
  assert cells[0].overrides == {"model.dense.depth": 1, "model.dense.gate": "channel"}


def test_overrides_are_texts_as_on_a_command_line():
  cell = Cell("a", {"model.tie_embeddings": True, "model.width": 8})
  assert cell.texts() == [("model.tie_embeddings", "true"), ("model.width", "8")]
  assert Cell("m = 2, Nearest/All").folder == "m_=_2_nearest_all"


@pytest.mark.parametrize(("change", "message"), [
    ({"cells": ()}, "a sweep needs cells and seeds"),
    ({"seeds": ()}, "a sweep needs cells and seeds"),
    ({"cells": (BASE, BASE)}, "a cell's name = 'base'"),
    ({"cells": (BASE, Cell("Base"))}, "a cell's folder = 'base'"),
    ({"cells": (BASE, Cell("..."))}, "a cell's folder = ''"),
    ({"base": "bose"}, "no cell 'bose'; did you mean base?"),
    ({"cells": (BASE, Cell("a", base="b"))}, "no cell 'b'"),
    ({"seeds": (0, 1), "more_seeds": (1,)}, "seeds and more_seeds = (0, 1, 1)"),
    ({"cells": (BASE, Cell("a", match=Match("tokens", "base")))}, "a: match.by = 'tokens'"),
    ({"cells": (BASE, Cell("a", match=Match("time", "base")), Cell("b", match=Match("time", "a")))},
     "b: match.cell = 'a'"),
])
def test_what_is_wrong_is_named(change, message):
  with pytest.raises(InputError) as raised:
    Sweep(**{"experiment": "e.py", "cells": (BASE,), "base": "base", **change})
  assert message in str(raised.value)


def test_files_that_are_no_sweeps(tmp_path):
  with pytest.raises(InputError, match="expected a sweep file"):
    load_sweep(str(tmp_path / "none.py"))
  file = tmp_path / "other.py"
  file.write_text("def get_sweep(arg): return 3")
  with pytest.raises(InputError, match="get_sweep returned int, expected a Sweep"):
    load_sweep(str(file))
  with pytest.raises(InputError, match="get_sweep"):
    load_sweep(str(ROOT / "experiments/smoke.py"))


@pytest.mark.parametrize(("text", "message"), [
    ("x = 1\nimport no_such_module\n", ":2: ModuleNotFoundError: No module named 'no_such_module'"),
    ("def get_sweep(arg):\n  return inner()\n\ndef inner():\n  return Sweap\n",
     ":5: NameError: name 'Sweap' is not defined"),
    ("def get_sweep(arg):\n  return len(3)\n", ":2: TypeError: object of type 'int' has no len()"),
    ("def get_sweep(arg):\n  return {}[arg]\n", ":2: KeyError: ''"),
    ("\ndef get_sweep(arg:\n", ":2: SyntaxError: '(' was never closed"),
])
def test_a_files_own_error_has_its_line(tmp_path, text, message):
  file = tmp_path / "own.py"
  file.write_text(text)
  with pytest.raises(InputError) as error:
    load_sweep(str(file))
  assert str(error.value) == f"{file}{message}"


@pytest.mark.parametrize("file", sorted((ROOT / "experiments/sweeps").glob("*.py")),
                         ids=lambda file: file.stem)
@pytest.mark.parametrize("argument", ["", ":debug"])
def test_every_sweep_of_the_project_loads(file, argument, monkeypatch):
  monkeypatch.chdir(ROOT)
  sweep = load_sweep(f"{file}{argument}")
  assert sweep.question.endswith("?")


def test_the_short_families_are_runs_of_the_sweep_of_parts(monkeypatch):
  """So that one repeats the other, or takes its results (`--known`)."""
  monkeypatch.chdir(ROOT)
  short, parts = (
      {cell.name: dict(cell.overrides) for cell in load_sweep(f"experiments/sweeps/{name}").cells}
      for name in ("families.py:short", "parts.py")
  )
  for family in ("gau_retnet", "mamba2"):
    assert short[family] == parts[family]
    assert short[f"{family} state m=2 no gate"] == parts[f"{family} gate none"]


def test_debug_keeps_the_last_cell_and_what_it_needs():
  cells = (
      Cell("a"), Cell("b"), Cell("c"),
      Cell("d", base="c", match=Match("flops", "b")),
  )
  found = Sweep("x.py", cells, "a", seeds=(4, 5), more_seeds=(6,)).debug()
  assert [cell.name for cell in found.cells] == ["b", "c", "d"]
  assert (found.experiment, found.base, found.seeds, found.more_seeds) == (
      "x.py:debug", "c", (4,), ())


def test_debug_keeps_what_the_cells_need_that_a_cell_needs():
  cells = (
      Cell("a"), Cell("b", base="f"), Cell("c", base="d", match=Match("flops", "b")), Cell("d"),
      Cell("e", base="c"), Cell("f"), Cell("last", base="e"),
  )
  found = Sweep("x.py", cells, "a").debug()
  assert [cell.name for cell in found.cells] == ["b", "c", "d", "e", "f", "last"]
  assert found.base == "e"
