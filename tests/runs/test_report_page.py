"""The page of a report: whole without a network, beside other runs, and nothing in it can act."""

import json

import pytest
from etils import epath

from dense_jax import experiment
from dense_jax.runs.page import Page
from dense_jax.runs.report_page import write_page


@pytest.fixture
def runs(tmp_path):
  """Two runs as training leaves them, without checkpoints."""
  folders = []
  for name, changes in (("base", []), ("dense", [("model.dense.depth", "2")])):
    folder = epath.Path(tmp_path) / name
    folder.mkdir()
    config = experiment.load(
        "experiments/smoke.py:debug", [("model.vocab_size", "258"), *changes])
    experiment.save(config, folder)
    records = [
        {"step": step, "loss": 5.0 - step, "tokens_per_second": 100.0 * step,
         "peak_memory_bytes": 2.0**30} for step in (1, 2)
    ] + [{"step": 2, "heldout_loss": 3.25, "heldout_bits_per_byte": 1.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    folders.append(folder)
  return folders


def test_one_run(runs):
  page = write_page(runs[0], [("text", "bits"), ("xz", "1.683"), ("", ""), ("context", "64")],
                    [("prompt", " <b>continued</b>")])
  content = page.read_text()
  assert page.name == "report.html" and content.startswith("<!doctype html>")
  for part in ("Report on base", "3.2500", "1.500", "<td>200</td>", "1,024",
               "bits</th></tr></thead>", "<td>1.683</td>", "further figures</th><th>value</th>",
               "<td>64</td>",
               '<span class="more">prompt</span> &lt;b&gt;continued&lt;/b&gt;',
               "model.dense.depth"):
    assert part in content
  assert content.count("data:image/png;base64,") == 2
  for part in ("http", "<script", "<b>", "Differences", "answers right"):
    assert part not in content


def test_runs_side_by_side_with_their_layers(runs):
  (runs[1] / "analysis.png").write_bytes(b"\x89PNG")
  content = write_page(runs[0], [("score", "value")], [], [runs[1]]).read_text()
  assert '<td class="words">model.dense.depth</td><td>1</td><td>2</td>' in content
  assert "model.width</td><td>32</td><td>32</td>" not in content
  assert "Layers of dense" in content and content.count("data:image/png;base64,") == 3


def test_runs_of_one_name_are_told_apart(runs, tmp_path):
  for cell in runs:
    (tmp_path / "sweep" / cell.name).mkdir(parents=True)
    cell.rename(tmp_path / "sweep" / cell.name / "seed0")
  first, second = (epath.Path(tmp_path) / "sweep" / cell.name / "seed0" for cell in runs)
  content = write_page(first, [("score", "value")], [], [second]).read_text()
  assert "Report on base/seed0" in content and "dense/seed0</th>" in content


def test_a_page_escapes_what_it_shows():
  page = Page("a < b")
  page.section("<s>")
  page.table([("<h>", "x"), ("1 & 2", "</td>")])
  page.picture(b"png", 'of "x"')
  assert "<title>a &lt; b</title>" in page.html()
  assert '1 &amp; 2</td><td class="words">&lt;/td&gt;</td>' in page.html()
  assert 'alt="of &quot;x&quot;"' in page.html()


def test_numbers_are_aligned_to_the_right_and_words_to_the_left():
  page = Page("")
  page.section("")
  page.table([("cell", "loss", "base", "p", "size"),
              ("8", "-4.20 ± 0.12", "8 layers", "< 0.001", "1,024 MiB"), ("9", "-", "", "-", "5%")])
  left = 'class="words"'
  assert (f"<tr><td {left}>8</td><td>-4.20 ± 0.12</td><td {left}>8 layers</td>"
          "<td>&lt; 0.001</td><td>1,024 MiB</td></tr>") in page.html()
