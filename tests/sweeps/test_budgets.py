"""Budgets: equal parameters by the width, equal FLOPs and time by the steps."""

import dataclasses

import pytest
from etils import epath

from dense_jax.errors import InputError
from dense_jax.models.flops import train_flops
from dense_jax.sweeps.budgets import describe_plan, plan
from dense_jax.sweeps.definition import Cell, Match, Sweep
from dense_jax.sweeps.timing import device_kind, time_ratio
from tests.helpers import ROOT

EXPERIMENT = str(ROOT / "experiments/smoke.py:debug")
DENSE = Cell("dense", {"model.dense.depth": 2, "model.layers": 4, "train.steps": 100})


def planned(tmp_path, *cells, measure=None, device="cpu"):
  sweep = Sweep(EXPERIMENT, (DENSE, *cells), "dense")
  found = plan(sweep, epath.Path(tmp_path), measure, lambda: device)
  return {each.cell.name: each for each in found}


def test_equal_parameters_are_as_near_as_a_width_gets(tmp_path):
  found = planned(tmp_path, Cell("wider", {"model.layers": 3}, match=Match("parameters", "dense")))
  width = found["wider"].config.model.width
  assert width % 8 == 0 and found["wider"].overrides["model.width"] == str(width)
  wanted = found["dense"].parameters
  gap = abs(found["wider"].parameters - wanted)
  for other in (width - 8, width + 8):
    cell = Cell("wider", {"model.layers": 3, "model.width": other})
    assert abs(planned(tmp_path, cell)["wider"].parameters - wanted) >= gap
  assert found["wider"].tokens == 4 * 4 * 64


def test_equal_flops_take_more_steps_of_a_cheaper_model(tmp_path):
  found = planned(tmp_path, Cell("base", {"model.layers": 4, "train.batch_size": 2,
                                          "train.eval_batches": 4},
                                 match=Match("flops", "dense")))
  dense, base = found["dense"], found["base"]
  assert base.config.train.steps > 200
  assert base.flops == pytest.approx(dense.flops, rel=0.01)
  assert dense.flops == 100 * 4 * 64 * train_flops(dense.config.model, 64)


def test_a_time_is_measured_once(tmp_path):
  calls = []

  def measure(one, other):
    calls.append((one.model.layers, other.model.layers))
    return 0.25

  base = Cell("base", {"model.layers": 3, "train.log_every": 5}, match=Match("time", "dense"))
  found = planned(tmp_path, base, measure=measure)
  assert calls == [(3, 4)] and found["base"].config.train.steps == 400
  again = planned(tmp_path, base, measure=lambda *_: pytest.fail("measured again"))
  assert again["base"].config == found["base"].config
  for key, value in (("model.width", 64), ("model.remat", "full"), ("train.accumulate", 2)):
    other = dataclasses.replace(base, overrides={**base.overrides, key: value})
    assert planned(tmp_path, other, measure=lambda *_: 0.5)["base"].config.train.steps == 200
  same = dataclasses.replace(base, overrides={**base.overrides, "train.log_every": 7})
  assert planned(tmp_path, same)["base"].config.train.steps == 400
  on_gpu = planned(tmp_path, base, measure=lambda *_: 0.1, device="NVIDIA H100 80GB HBM3")
  assert on_gpu["base"].config.train.steps == 1000
  (tmp_path / "times.json").write_text("{")
  with pytest.raises(InputError, match=r"times\.json is damaged"):
    planned(tmp_path, base)


@pytest.mark.exhaustive
def test_the_ratio_measured_in_another_process(tmp_path, monkeypatch):
  monkeypatch.delenv("XLA_FLAGS")  # One device: a step on the eight that tests have takes long.
  cells = Cell("wide", {"model.width": 256}), Cell("narrow")
  found = planned(tmp_path, *cells)
  assert device_kind() == "cpu"
  assert time_ratio(found["wide"].config, found["narrow"].config) > 1


def test_cells_that_would_be_scored_on_other_rows_are_refused(tmp_path):
  halved = {"train.batch_size": 2}
  with pytest.raises(InputError, match=r"cell 'base': train\.eval_batches = 2 is not valid: "
                                       r"expected batches of as many rows as .* 'dense', 8"):
    planned(tmp_path, Cell("base", halved))
  assert planned(tmp_path, Cell("base", halved | {"train.eval_batches": 4}))["base"].tokens


def test_a_cell_that_is_not_valid_is_named(tmp_path):
  with pytest.raises(InputError, match=r"cell 'bad': config\.model\.width = 0 is not valid"):
    planned(tmp_path, Cell("bad", {"model.width": 0}))


def test_the_table_of_budgets(tmp_path):
  sweep = Sweep(EXPERIMENT, (DENSE, Cell("base", match=Match("flops", "dense"))), "dense")
  head, dense, base = describe_plan(plan(sweep, epath.Path(tmp_path)))
  assert head == ("cell", "parameters", "tokens", "TFLOP", "equal")
  assert dense[0] == "dense" and dense[2] == "25,600" and dense[-1] == "tokens"
  assert base[-1] == "flops of dense"
