"""Pages as a headless browser shows them: pictures, layout, nothing from a network."""

import numpy as np
import pytest
from etils import epath

from dense_jax import experiment, runs
from dense_jax.sweeps.budgets import course_digest, plan
from dense_jax.sweeps.definition import Cell, Sweep
from dense_jax.sweeps.results import Result, Results
from dense_jax.sweeps.table import write_all
from tests.browser import open_browser
from tests.helpers import ROOT, write_text

WIDE, NARROW = 1280, 400
CELLS = (
    Cell("base"), Cell("m=1", {"model.dense.depth": 1}), Cell("m=2", {"model.dense.depth": 2}),
    Cell("m=2 inputs", {"model.dense.depth": 2, "model.dense.inject": "inputs"}, base="m=2"),
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  with open_browser(tmp_path_factory.mktemp("browser")) as found:
    yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory):
  """The page of two tiny runs side by side."""
  text = write_text(tmp_path_factory.mktemp("text"))
  folders = []
  for depth in (1, 0):
    folders.append(tmp_path_factory.mktemp("run") / f"m{depth}")
    runs.train_run(experiment.load(str(ROOT / "experiments/smoke.py:debug"), [
        ("data.path", str(text)), ("data.cache_dir", f"{text}/.cache"), ("data.heldout_every", "2"),
        ("train.batch_size", "8"), ("model.width", "16"), ("model.layers", "2"),
        ("model.family", "gau_retnet"), ("model.dense.depth", str(depth)),
    ]), folders[-1])
  return runs.write_report(folders[0], batches=2, beside=folders[1:]).page


@pytest.fixture(scope="module")
def table(tmp_path_factory):
  """The page of a sweep."""
  folder = epath.Path(tmp_path_factory.mktemp("sweep"))
  sweep = Sweep(str(ROOT / "experiments/smoke.py:debug"), CELLS, "base", question="Which?")
  planned = plan(sweep, folder)
  results = Results(folder / "results.jsonl", planned, sweep.metric)
  for number, each in enumerate(planned):
    for seed in sweep.seeds:
      results.add(Result(
          each.cell.name, seed, course_digest(each), "text", each.parameters, each.tokens,
          each.flops, 1000.0, {"heldout_loss": 4 + 0.1 * seed - 0.01 * number * (seed - 2)},
      ))
  command = f"dense-jax sweep x.py --workdir {'a_long_path/' * 20} --jobs 2"
  write_all(sweep, planned, results, command, folder / "results.jsonl")
  return folder / "results.html"


@pytest.mark.slow
@pytest.mark.parametrize(("page", "pictures"), [("report", 2), ("table", 1)])
def test_a_page_is_seen_whole(browser, request, page, pictures):
  file = request.getfixturevalue(page)
  wide, narrow = (browser.open(file, width) for width in (WIDE, NARROW))
  for seen, width in ((wide, WIDE), (narrow, NARROW)):
    assert seen.broken == seen.requests == seen.complaints == [] and seen.dead_links == 0
    assert seen.width <= width and seen.screen.shape[1] == width
    assert len(seen.pictures) == pictures
    for natural, shown in seen.pictures.values():
      assert natural > 300 and shown.shape[0] > 50 and shown.shape[1] > 300
      # Lines on white, in several colors.
      assert 5 < shown.std() < 120 and len(np.unique(shown.reshape(-1, 3), axis=0)) > 9
  # Text is seen too: above the first picture some, but not most, is dark.
  dark = (wide.screen[:300].mean(axis=-1) < 128).mean()
  assert 0.002 < dark < 0.2


@pytest.mark.slow
def test_what_is_wrong_with_a_page_is_seen(browser, tmp_path):
  page = tmp_path / "page.html"
  page.write_text('''<!doctype html><title>x</title><link rel="stylesheet" href="http://a.invalid/a.css">
    <a href="#nowhere">x</a><img alt="broken" src="data:image/png;base64,AAAA">
    <img alt="blank" width="90" height="90" src="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'/>">
    <div style="width: 2000px">x</div><script>console.log("hello"); undefined.x</script>''')
  seen = browser.open(page, NARROW)
  assert seen.broken == ["broken"] and seen.requests == ["http://a.invalid/a.css"]
  assert seen.dead_links == 1 and seen.width >= 2000
  assert any("hello" in each for each in seen.complaints)
  assert any("TypeError" in each for each in seen.complaints)
  assert seen.pictures["blank"][1].std() == 0
