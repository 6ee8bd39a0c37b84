"""The report's command line: refusals before it restores anything."""

import pytest
from etils import epath

from dense_jax import experiment, runs
from dense_jax.cli import report
from dense_jax.errors import InputError


@pytest.mark.parametrize("option", ["--batches=-1", "--batch-size=0"])
def test_bad_options_are_named_before_a_run_is_loaded(monkeypatch, option):
  monkeypatch.setattr(runs, "write_report", None)
  name, _, value = option.partition("=")
  with pytest.raises(InputError, match=f"^{name} = {value} is not valid: expected an integer >= "):
    report.main(["--workdir", "run", option])


def test_a_folder_without_a_run_or_a_checkpoint_is_named(tmp_path):
  with pytest.raises(InputError, match=r"expected a run with config\.json"):
    report.main(["--workdir", str(tmp_path)])
  assert not list(tmp_path.iterdir())
  experiment.save(experiment.load("experiments/smoke.py:debug"), epath.Path(tmp_path))
  for _ in range(2):  # Before the first save is begun, and while it is under way.
    with pytest.raises(InputError, match=r"it has no checkpoints yet"):
      report.main(["--workdir", str(tmp_path)])
    (tmp_path / "checkpoints").mkdir(exist_ok=True)


def test_a_folder_to_compare_with_is_refused_before_any_work(tmp_path):
  with pytest.raises(InputError, match=r"--beside = .*none' is not valid: expected a folder with"):
    report.main(["--workdir", str(tmp_path), "--beside", str(tmp_path / "none")])
