"""The command that looks into runs, with a model's figures that are made up."""

import json
import types

import pytest
from etils import epath

from dense_jax.cli import analyze
from dense_jax.errors import InputError
from tests.analysis.test_summary import seen


@pytest.fixture
def looked(monkeypatch):
  """Makes every run have the same figures; the folders that were looked into."""
  folders = []

  def restore(workdir, checkpoint, weights):
    folders.append((epath.Path(workdir).name, checkpoint, weights))
    return types.SimpleNamespace(name=f"step 9 of {workdir}", model=None)

  monkeypatch.setattr(analyze.runs, "restore", restore)
  monkeypatch.setattr(analyze.runs, "heldout_rows", lambda *_: [])
  monkeypatch.setattr(analyze, "look_into", lambda *_, samples: seen(2.0))
  monkeypatch.setattr(analyze, "plot_seen", lambda *_: None)
  return folders


def test_one_run_has_a_table_of_its_layers(looked, tmp_path, capsys):
  assert analyze.main(["--workdir", str(tmp_path / "run")]) == 0
  assert looked == [("run", "latest", "auto")]
  header, *rows = capsys.readouterr().out.splitlines()[2:6]
  assert header.startswith("layer") and header.endswith("share of sources")
  assert [row.split()[-1] for row in rows] == ["3.000", "0.50", "3.00"]
  assert json.loads((tmp_path / "run" / "analysis.json").read_text())["lens"] == [3.0, 2.5, 2.0]


def test_runs_are_compared_and_not_looked_into_again(looked, tmp_path, monkeypatch, capsys):
  folders = [str(tmp_path / name) for name in ("m=2/seed0", "m=2/seed1")]
  record = tmp_path / "layers.jsonl"
  assert analyze.main(["--workdir", folders[0], "--record", str(record)]) == 0
  assert analyze.main(["--workdir", *folders, "--record", str(record)]) == 0
  assert [folder for folder, *_ in looked] == ["seed0", "seed1"]
  monkeypatch.chdir(tmp_path)
  assert analyze.main(["--workdir", "m=2/seed0/", "./m=2/seed1", "--record", str(record)]) == 0
  assert len(looked) == 2
  out = capsys.readouterr().out
  assert "| m=2 | 1 | 9.500 |" in out and "| m=2 | 2 | 9.500 ± 0.000 |" in out
  assert f"`dense-jax analyze --workdir {folders[0]} {folders[1]} --record" in out
  assert len(record.read_text().splitlines()) == 2
  assert record.with_suffix(".md").read_text() in out
  assert record.with_suffix(".png").exists()


@pytest.mark.parametrize(("arguments", "said"), [
    (["a", "b"], r"--workdir = 'a b' is not valid: expected one folder without --record"),
    (["a", "--record=layers.json"], r"--record = '.*layers\.json' is not valid: expected a file"),
    (["a", "--samples=9"], r"--samples = 9 is not valid: expected an integer >= 64"),
])
def test_what_cannot_be_is_refused(looked, tmp_path, monkeypatch, arguments, said):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(InputError, match=said):
    analyze.main(["--workdir", *arguments])
  assert not looked and not list(tmp_path.iterdir())
