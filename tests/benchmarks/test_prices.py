"""Prices: the tables and bars from compilers' reports, and cells that a file already has."""

import json

import pytest

from dense_jax import experiment
from experiments.benchmarks import cpu_dense, prices
from experiments.benchmarks.prices import Cell


def report(target, matmuls, memory, *, peak=10e9, flops=1e13, launches=1000, layers=48):
  """A compiler's report of a train step with these times, in seconds."""
  gpu = target == "h100"
  return {
      "estimate": {"matmuls": matmuls, "memory": memory} if gpu else None,
      "bound": {"compute": matmuls, "memory": memory, "collectives": 0.0},
      "bytes_accessed": 3e12 * memory, "launches": launches, "flops": flops,
      "hbm": {"peak": peak}, "compile_seconds": 60.0,
      "config": {
          "model": {"layers": layers}, "train": {"batch_size": 16}, "data": {"seq_len": 2048},
      },
  }


def rows(target, family, **reports):
  """The rows of table 1 of a family; `reports` are by kind, with _ for spaces."""
  kinds = {"base": "base", "m1": "state m=1", "m2": "state m=2", "inputs": "inputs m=1"}
  cells = [Cell(target, family, kinds[kind]) for kind in reports]
  results = {cell.name: found for cell, found in zip(cells, reports.values(), strict=True)}
  return prices.prices(cells, results)[1:]


def test_prices_of_a_gpu_are_sums():
  base, dense = rows("h100", "mamba2", base=report("h100", 0.1, 0.3), m2=report("h100", 0.12, 0.38))
  kilobytes = 3e12 * 0.3 / (16 * 2048) / 48 / 1e3
  assert base == ["h100, mamba2, base", f"{kilobytes:.0f}", "100", "300", "1,000", "400", "1.00",
                  "<= 195 ms: no"]
  assert dense[5:] == ["500", "1.25", "<= 1.3 of base: yes"]
  (mamba,) = rows("h100", "mamba", base=report("h100", 0.1, 0.1, launches=30_000))
  assert mamba[4] == "30,000" and mamba[-1] == "<= 260 ms: yes; <= 20000 launches: no"
  (alone,) = rows("h100", "mamba", inputs=report("h100", 0.1, 0.1))
  assert alone[-2:] == ["", ""]


def test_prices_of_a_tpu_are_bounds():
  base, one, two = rows(
      "v5e", "retnet", base=report("v5e", 0.2, 0.1), m1=report("v5e", 0.21, 0.24),
      m2=report("v5e", 0.21, 0.24),
  )
  assert base[4:] == ["", "200", "1.00", "<= 1 HBM / matmuls: yes"]
  assert one[5:] == ["240", "1.20", "<= 1.15 of base: no"]
  assert two[5:] == ["240", "1.20", "<= 1.25 of base: yes"]
  base, two = rows("v5e", "mamba", base=report("v5e", 0.1, 0.1), m2=report("v5e", 0.1, 0.13))
  assert (base[-1], two[-1]) == ("<= 1.1 HBM / matmuls: yes", "<= 1.35 of base: yes")


def test_memory_and_work_over_the_base():
  cells = [Cell("v5e", "mamba2", kind) for kind in ("base", "state m=2", "inputs m=1")]
  base, dense = report("v5e", 0.1, 0.1), report("v5e", 0.1, 0.1, peak=11e9, flops=1.2e13)
  found = prices.work(cells, {cells[0].name: base, cells[1].name: dense, cells[2].name: None})
  assert found[2:] == [
      ["v5e, mamba2, state m=2", "11.00", "1.100", "<= 1.18", "12.0", "1.200", "<= 1.25", "60"]
  ]
  refused = report("v5e", 0.1, 0.1) | {"flops": None, "bound": None}
  assert prices.work(cells[:1], {cells[0].name: refused})[1][4] == "refused"
  assert prices.prices(cells[:1], {cells[0].name: refused})[1:] == []


def test_decoding_over_the_bytes_of_weights_and_states():
  cell = Cell("h100", "mamba2", "base", ("model.layers=3",), decode=6)
  assert cell.name == "h100 | mamba2 | base | decode B 6 | model.layers=3"
  assert cell.label == "h100, mamba2, base, decode B 6, model.layers=3"
  command = cell.command()
  assert command[command.index("--program") + 1] == "decode"
  assert "--config.train.batch_size=6" in command
  loaded = experiment.load(f"{prices.FILE}:mamba2", [("model.layers", "3")]).model
  least = cpu_dense.step_bytes(loaded, 6)
  moved = 1.25 * (least.weights / 2 + 2 * least.states)
  values = {"layers": 3, "width": loaded.width, "vocab_size": loaded.vocab_size,
            "dtype": loaded.dtype}
  found = report("h100", 1e-6, 9.9e-5) | {"bytes_accessed": moved, "config": {"model": values}}
  (row,) = prices.decoding([cell], {cell.name: found})[1:]
  assert row[0] == cell.label and row[4:] == ["1.25", "<= 1.3: yes", "1,000", "0.10", "1.00"]


def test_the_command_of_a_cell_takes_the_targets_batch():
  command = Cell("h100", "mamba2", "inputs m=1", ("model.layers=4", "model.remat=full")).command()
  assert command[2:7] == [
      "dense_jax.cli.compile", "--config", "experiments/family_350m.py:mamba2", "--topology",
      "h100:1",
  ]
  assert {"--config.model.dense.depth=1", "--config.model.dense.inject=inputs",
          "--config.train.batch_size=16", "--config.model.layers=4",
          "--config.model.remat=full"} <= set(command)
  tpu = Cell("v5p", "mamba2", "base").command()
  assert "v5p:1x1x1" in tpu and "--config.train.batch_size=4" in tpu


def test_cells_of_the_file_are_not_compiled_again(monkeypatch, tmp_path, capsys):
  file = tmp_path / "prices.json"
  compiled = []

  def measure(cell, largest):
    compiled.append((cell.name, largest))
    return report(cell.target, 0.1, 0.3) if cell.kind == "base" else None

  monkeypatch.setattr(prices, "measure", measure)
  chosen = ["--target", "h100", "--family", "retnet", "--json", str(file), "--only"]
  prices.main([*chosen, "base"])
  prices.main([*chosen, "base", "inputs m=1"])
  names = ["h100 | retnet | base", "h100 | retnet | inputs m=1"]
  assert compiled == [(name, 0) for name in names]
  record = json.loads(file.read_text())
  assert list(record["results"]) == names and record["results"][names[1]] is None
  assert "| h100, retnet, base | 572 | 100 | 300 |" in capsys.readouterr().out
  # The instructions are not in the file.
  prices.main([*chosen, "base", "--largest", "20"])
  assert compiled[2:] == [(names[0], 20)]


def test_what_cannot_be_compiled_is_said(capsys):
  assert prices.measure(Cell("h100", "mamba2", "base", ("model.widht=3",))) is None
  assert "unknown key config.model.widht" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--target=a100", "--family=lstm", "--only=m=3"])
def test_unknown_cells_are_errors(option):
  with pytest.raises(SystemExit):
    prices.main([option])
