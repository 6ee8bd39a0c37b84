"""The commands of docs/publishing.md, one after the other, and refusals of train's new options."""

import json

import pytest

from dense_jax import runs
from dense_jax.cli import convert, evaluate, generate, report, train
from dense_jax.errors import InputError
from tests.helpers import write_text


def losses(workdir, name):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: line[name] for line in lines if name in line}


@pytest.mark.exhaustive
def test_a_model_goes_out_and_comes_back_and_is_trained_on(tmp_path, capsys):
  text = write_text(tmp_path)
  m1, hf, back, m2, mean = (tmp_path / name for name in ("m1", "hf", "back", "m2", "mean"))
  data = [f"--config.data.path={text}/*.txt", f"--config.data.cache_dir={text}/.cache",
          "--config.data.heldout_every=2", "--config.data.seq_len=32",
          "--config.train.batch_size=8", "--config.train.ema=0.9"]
  assert train.main(["--config", "experiments/smoke.py:debug", "--workdir", str(m1), *data]) == 0
  assert "held-out loss" in capsys.readouterr().out
  figures = tmp_path / "heldout.json"
  assert evaluate.main(["--workdir", str(m1), "--json", str(figures)]) == 0
  shown = ["--evaluation", str(figures)]
  assert convert.main(["--workdir", str(m1), "--output", str(hf), *shown]) == 0
  assert convert.main(["--workdir", str(m1), "--output", str(mean), "--average", "2"]) == 0
  assert convert.main(["--hf", str(hf), "--output", str(back)]) == 0

  again = tmp_path / "again.json"
  assert evaluate.main(["--workdir", str(back), "--json", str(again)]) == 0
  assert json.loads(again.read_text())["loss"] == json.loads(figures.read_text())["loss"]
  assert report.main(["--workdir", str(back), "--batches", "2"]) == 0
  assert generate.main(["--workdir", str(back), "--prompt", "line", "--max-new-tokens", "4"]) == 0
  capsys.readouterr()

  more = ["--config.model.dense.depth=2", "--config.model.dense.gate_sharing=per_source"]
  assert train.main(["--init-from", str(back), "--workdir", str(m2), *more,
                     f"--config.data.cache_dir={text}/.cache"]) == 0
  out = capsys.readouterr().out
  assert f"begins with step 0 of {back}: " in out and "that change nothing yet" in out
  assert " --config " not in out.rpartition("resume ")[2]
  heldout = losses(m2, "heldout_loss")
  assert heldout[0] == pytest.approx(losses(m1, "heldout_loss")[4], rel=0, abs=1e-6)
  assert heldout[4] < heldout[0]
  # Without --config and --init-from it goes on with its own configuration.
  assert train.main(["--workdir", str(m2), "--config.train.steps=5",
                     "--config.optimizer.schedule_steps=4"]) == 0
  run = runs.restore(m2)
  assert (run.step, run.config.model.dense.depth, run.weights) == (5, 2, "ema")


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "--config is missing: expected an experiment"),
    (["--init-checkpoint", "best"], "--init-checkpoint = 'best' is not valid: expected no value"),
    (["--init-weights", "raw"], "--init-weights = 'raw' is not valid: expected no value without"),
    (["--init-from", "nowhere"], "--init-from = 'nowhere' is not valid: expected a run's folder"),
])
def test_what_train_begins_with_has_to_be_there(tmp_path, arguments, message):
  with pytest.raises(InputError, match=message):
    train.main(["--workdir", str(tmp_path / "run"), *arguments])
  assert not (tmp_path / "run").exists()
