"""Results of a sweep: kept whole, of these settings only, and added up as by hand."""

import dataclasses
import json
import math

import pytest
from etils import epath

from dense_jax import experiment
from dense_jax.errors import InputError
from dense_jax.sweeps.budgets import course_digest, plan
from dense_jax.sweeps.definition import Cell, Sweep, load_sweep
from dense_jax.sweeps.differences import difference, undecided
from dense_jax.sweeps.results import Result, Results, collect, read_results
from dense_jax.sweeps.table import markdown, picture, rows, write_all
from tests.helpers import ROOT

SWEEP = Sweep(
    str(ROOT / "experiments/smoke.py:debug"),
    (Cell("base"), Cell("dense", {"model.dense.depth": 2}), Cell("wide", {"model.width": 40})),
    "base", seeds=(0, 1, 2), more_seeds=(3,), question="Which?",
)
LOSSES = {"base": (4.0, 4.2, 4.4), "dense": (3.9, 4.1, 4.3), "wide": (4.1, 4.1, 4.5)}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
  return plan(SWEEP, epath.Path(tmp_path_factory.mktemp("times")))


def result(planned, name, seed, loss, **change):
  each = next(each for each in planned if each.cell.name == name)
  values = Result(name, seed, course_digest(each), "text order 1", each.parameters, each.tokens,
                  each.flops, 1000.0, {"heldout_loss": loss}, each.scored_rows)
  return dataclasses.replace(values, **change)


@pytest.fixture
def full(planned, tmp_path):
  results = Results(epath.Path(tmp_path) / "deep" / "results.jsonl", planned, SWEEP.metric)
  for name, losses in LOSSES.items():
    for seed, loss in enumerate(losses):
      results.add(result(planned, name, seed, loss))
  return results


def test_results_that_were_recorded_before_a_key_existed_stay_valid(tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  record = epath.Path("experiments/results/evidence_sources.jsonl")
  known = {result.cell: result.course for _, result in read_results(record)}
  cells = [each for each in plan(load_sweep("experiments/sweeps/sources.py"), epath.Path(tmp_path))
           if each.cell.name in known]
  assert len(cells) > 3
  for each in cells:
    assert course_digest(each) == known[each.cell.name], each.cell.name
  guard = dataclasses.replace(cells[0].config.guard, skip="none")
  other = dataclasses.replace(cells[0].config, guard=guard)
  changed = dataclasses.replace(cells[0], config=other)
  assert course_digest(changed) != course_digest(cells[0])
  assert changed.course == cells[0].course | {"guard.skip": "none"}


@pytest.mark.parametrize(("order", "data"), [
    ({"order": {"version": 3, "digest": "d"}}, "text order 3"), ({}, "text"),
])
def test_a_finished_run_tells_the_order_of_its_rows(planned, tmp_path, order, data):
  """The order is that of the run's checkpoint, not of the program that collects."""
  cell, folder = planned[0], epath.Path(tmp_path)
  assert collect(cell, 0, folder) is None
  steps = cell.config.train.steps
  experiment.save(cell.config, folder)
  (folder / "data.json").write_text('{"fingerprint": "text"}')
  (folder / "metrics.jsonl").write_text(
      "".join(json.dumps({"step": steps, name: value}) + "\n"
              for name, value in (("tokens_per_second", 5.0), ("heldout_loss", 4.0))))
  saved = folder / "checkpoints" / str(steps) / "data"
  saved.mkdir(parents=True)
  (saved / "metadata").write_text(json.dumps({"step": steps, **order}))
  found = collect(cell, 0, folder)
  assert found == result(planned, "base", 0, 4.0, data=data, tokens_per_second=5.0)


def test_differences_by_hand(full):
  dense = difference(SWEEP, full, SWEEP.cell("dense"))  # Each seed differs by 0.1: no spread.
  assert dense.mean == pytest.approx(-0.1) and dense.error == pytest.approx(0, abs=1e-12)
  wide = difference(SWEEP, full, SWEEP.cell("wide"))
  assert wide.mean == pytest.approx(0.1 / 3) and wide.error == pytest.approx(
      math.sqrt(0.01333333 / 3))
  assert undecided(SWEEP, full) == {"wide"}


def test_only_seeds_that_both_have_are_compared(planned, tmp_path):
  results = Results(epath.Path(tmp_path) / "r.jsonl", planned, SWEEP.metric)
  for seed, loss in ((0, 4.0), (5, 1.0)):
    results.add(result(planned, "base", seed, loss))
  results.add(result(planned, "dense", 0, 3.5))
  found = difference(SWEEP, results, SWEEP.cell("dense"))
  assert (found.mean, found.count) == (-0.5, 1)


def test_the_file_is_read_again(full, planned, tmp_path):
  file = tmp_path / "deep" / "results.jsonl"
  again = Results(epath.Path(file), planned, SWEEP.metric)
  assert all(again.of(name) == full.of(name) for name in LOSSES)
  assert ("wide", 2) in again and ("wide", 3) not in again
  whole = file.read_bytes()
  file.write_bytes(whole + whole[:40])  # As a kill, of a program that appends, would leave it.
  assert len(Results(epath.Path(file), planned, SWEEP.metric).of("wide")) == 3


def test_two_sweeps_with_one_record_keep_each_others_lines(planned, tmp_path):
  file = epath.Path(tmp_path) / "results.jsonl"
  first, second = (Results(file, planned, SWEEP.metric) for _ in range(2))
  first.add(result(planned, "base", 0, 4.0))
  second.add(result(planned, "dense", 0, 3.9))
  first.add(result(planned, "wide", 0, 4.1))
  assert [each.cell for _, each in read_results(file)] == ["base", "dense", "wide"]
  assert ("dense", 0) in first and ("wide", 0) not in second
  assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


@pytest.mark.parametrize(("change", "message"), [
    (lambda line: "{" + line, r"results\.jsonl:9 is damaged"),
    (lambda line: line.replace('"seed"', '"sead"'), r"results\.jsonl:9 is damaged: expected"),
    (lambda line: line.replace('"course": "', '"course": "0'), "'wide' was run with other setting"),
    (lambda line: line.replace('"data": "text', '"data": "other'), "saw other text"),
    (lambda line: line.replace('"scored_rows": 8', '"scored_rows": 0'),
     r"cell 'wide' \(seed 2\) is of all held-out rows, that of 'base' \(seed 0\) of 8: expected"),
    (lambda line: line.replace("heldout_loss", "accuracy"), "metric = 'heldout_loss' is not valid"),
])
def test_a_line_that_is_not_the_sweeps_is_named(full, planned, tmp_path, change, message):
  del full
  file = tmp_path / "deep" / "results.jsonl"
  *lines, last = file.read_text().splitlines()
  file.write_text("\n".join([*lines, change(last)]) + "\n")
  with pytest.raises(InputError, match=message):
    Results(epath.Path(file), planned, SWEEP.metric)


@pytest.mark.slow
def test_the_table_and_the_picture(full, planned, tmp_path):
  head, base, dense, wide = (dict(zip(rows(SWEEP, planned, full)[0], row, strict=True))
                             for row in rows(SWEEP, planned, full))
  assert list(head)[8:] == ["heldout_loss", "less base", "p", "verdict", "base", "equal"]
  assert base["seeds"] == "3" and base["heldout_loss"] == "4.2000 ± 0.1155"
  assert [base[name] for name in ("less base", "p", "verdict", "base")] == [""] * 4
  assert [dense[name] for name in ("less base", "p", "verdict", "base")] == [
      "-0.1000 ± 0.0000", "< 0.001", "better", "base"]
  t = 0.5  # 1/30 over 1/15.
  assert [wide[name] for name in ("less base", "p", "verdict")] == [
      "+0.0333 ± 0.0667", f"{1 - t / math.sqrt(t**2 + 2):.3f}", "undecided"]
  text = markdown(SWEEP, planned, full, "dense-jax sweep x.py")
  assert text.startswith("# Which?\n") and text.count("\n| ") == 5 and "`dense-jax sweep" in text
  assert "26 % get a verdict" in text
  assert "26 %" not in markdown(dataclasses.replace(SWEEP, more_seeds=()), planned, full, "x")
  assert "82 % of such means with three seeds and 88 % with five" in text
  higher = dataclasses.replace(SWEEP, higher_is_better=True)
  assert rows(higher, planned, full)[2][11] == "worse"
  more = dataclasses.replace(SWEEP, seeds=(0, 1, 2, 3), more_seeds=())
  assert rows(more, planned, full)[2][11] == "too few seeds"
  files = write_all(SWEEP, planned, full, "dense-jax sweep x.py", epath.Path(tmp_path) / "r.jsonl")
  assert [file.name for file in files] == ["r.md", "r.png", "r.html"]
  assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
  page = (tmp_path / "r.html").read_text()
  assert "-0.1000 ± 0.0000" in page and "dense-jax sweep x.py" in page
  assert "<td class=\"words\">model.dense.depth=2</td>" in page and "data:image/png;base64," in page
  assert "http" not in page


def test_times_as_measured_and_by_flops(planned, tmp_path):
  results = Results(epath.Path(tmp_path) / "r.jsonl", planned, SWEEP.metric)
  for name, speeds in (("base", (8.0, 64.0, 4.0)), ("dense", (2.0,))):
    for seed, speed in enumerate(speeds):
      results.add(result(planned, name, seed, 4.0, tokens_per_second=speed))
  _, base, dense, wide = rows(SWEEP, planned, results)
  assert planned[0].tokens == planned[1].tokens == 1024
  assert base[4:7] == ("8.00", "128", "128")
  assert dense[4:7] == ("2.00", "512", f"{128 * planned[1].flops / planned[0].flops:.0f}")
  assert wide[4:7] == ("-", "-", f"{128 * planned[2].flops / planned[0].flops:.0f}")
  assert planned[2].flops > planned[0].flops


@pytest.mark.slow
def test_what_all_cells_share_is_said_once(planned, tmp_path):
  shared = [dataclasses.replace(each, overrides={**each.overrides, "data.path": "novels"})
            for each in planned]
  results = Results(epath.Path(tmp_path) / "r.jsonl", planned, SWEEP.metric)
  write_all(SWEEP, shared, results, "", epath.Path(tmp_path) / "r.jsonl")
  page = (tmp_path / "r.html").read_text()
  assert page.count("data.path") == 1 and "All cells have data.path=novels." in page


def test_a_table_before_anything_is_done(planned, tmp_path):
  results = Results(epath.Path(tmp_path) / "r.jsonl", planned, SWEEP.metric)
  table = rows(SWEEP, planned, results)
  assert [row[4:9] for row in table[1:]] == [("-", "-", "-", "0", "-")] * 3
  assert table[2][9:13] == ("-", "-", "too few seeds", "base")
  assert picture(SWEEP, results).startswith(b"\x89PNG")


def test_runs_of_another_sweep_are_taken_over(full, planned, tmp_path):
  """Cells are recognised by their settings; what is there already, and other seeds, stay out."""
  record = epath.Path(tmp_path) / "deep" / "results.jsonl"
  sweep = dataclasses.replace(
      SWEEP, cells=(Cell("plain"), Cell("wider", {"model.width": 48})), base="plain")
  others = plan(sweep, epath.Path(tmp_path))
  results = Results(epath.Path(tmp_path) / "r.jsonl", others, SWEEP.metric)
  assert results.adopt(record, seeds={0, 2}) == 2
  assert results.values("plain") == {0: 4.0, 2: 4.4} and not results.of("wider")
  assert results.adopt(record, seeds={0, 2}) == 0
  again = Results(epath.Path(tmp_path) / "r.jsonl", others, SWEEP.metric)
  assert again.values("plain") == {0: 4.0, 2: 4.4}

  elsewhere = Results(epath.Path(tmp_path) / "e.jsonl", planned, SWEEP.metric)
  elsewhere.add(result(planned, "dense", 1, 4.0, data="other"))
  with pytest.raises(InputError, match="saw other text"):
    elsewhere.adopt(record, seeds={0})
  record.write_text(record.read_text().replace(" order 1", ""))  # As an order of grain's has it.
  unlike = Results(epath.Path(tmp_path) / "other.jsonl", others, SWEEP.metric)
  with pytest.raises(InputError, match=r"cell 'plain' \(seed 0\) had its rows in another order"):
    unlike.adopt(record, seeds={0, 2})
  record.write_text("{}\n")
  with pytest.raises(InputError, match=r"results\.jsonl:1 is damaged: expected an object with"):
    results.adopt(record, seeds={0})


def test_a_record_from_before_scored_rows_were_kept(full, planned, tmp_path):
  file = tmp_path / "deep" / "results.jsonl"
  file.write_text(file.read_text().replace(', "scored_rows": 8', ""))
  again = Results(epath.Path(file), planned, SWEEP.metric)
  again.add(result(planned, "base", 3, 4.0))
  assert [each.scored_rows for each in again.of("base").values()] == [None] * 3 + [8]
  assert again.values("wide") == full.values("wide")
