"""Runs on a corpus in shards: mixtures, packed rows, and how they go on."""

import dataclasses
import json

import pytest

from dense_jax import experiment, runs
from dense_jax.data.batches import TrainBatches
from dense_jax.errors import InputError
from tests.data.corpus.texts import run, write_corpus


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """Returns four steps of a tiny model on a corpus of three parts."""
  folder = tmp_path_factory.mktemp("corpus")
  run(write_corpus(folder / "text"), folder / "out", "--heldout-every", "4", "--part-field",
      "meta.pile_set_name")
  return experiment.load("experiments/smoke.py:debug", [
      ("data.path", str(folder / "out")), ("data.cache_dir", str(folder / "cache")),
      ("data.seq_len", "32"), ("train.batch_size", "8"), ("model.width", "16"),
      ("model.layers", "2"), ("model.family", "gau_retnet"), ("model.dense.depth", "0"),
      ("optimizer.schedule_steps", "4"), ("data.mixture", "Books3=3,Github=1"),
  ])


def _with(config, mixture=None, steps=4, packing="stream"):
  data = dataclasses.replace(
      config.data, mixture=config.data.mixture if mixture is None else mixture, packing=packing
  )
  return dataclasses.replace(
      config, data=data, train=dataclasses.replace(config.train, steps=steps)
  )


def _losses(workdir):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_rows_or_with_another_mixture_of_later_ones(
    config, tmp_path, capsys
):
  whole = runs.train_run(config, tmp_path / "whole")
  assert "| mixture: Books3=3,Github=1\n" in capsys.readouterr().out
  for steps in (2, 4):
    part = runs.train_run(_with(config, steps=steps), tmp_path / "parts")
  assert part.heldout_loss == whole.heldout_loss
  assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")

  runs.train_run(_with(config, steps=2), tmp_path / "changed")
  later = _with(config, "Books3=3,Github=1; 2: Pile-CC=1")
  with pytest.raises(InputError, match=r"--allow-change data\.mixture"):
    runs.train_run(later, tmp_path / "changed")
  with pytest.raises(InputError, match=r"expected 0: Books3=3,Github=1 for the 2 steps that are"):
    runs.train_run(_with(config, "Pile-CC=1"), tmp_path / "changed",
                   allow_change=["data.mixture"])
  runs.train_run(later, tmp_path / "changed", allow_change=["data.mixture"])
  changed, same = _losses(tmp_path / "changed"), _losses(tmp_path / "whole")
  assert [changed[step] == same[step] for step in (1, 2, 3, 4)] == [True, True, False, False]


@pytest.mark.slow
def test_packed_rows_are_trained_on_and_their_padding_is_told(config, tmp_path, capsys):
  result = runs.train_run(_with(config, packing="best_fit"), tmp_path / "run")
  assert result.step == 4
  out = capsys.readouterr().out
  assert "rows: " in out and "% padding | mixture" in out
  with pytest.raises(InputError, match=r"config\.data\.packing: the run has 'best_fit'"):
    runs.train_run(config, tmp_path / "run")


@pytest.mark.slow
def test_a_run_of_the_order_of_grain_is_refused(config, tmp_path, monkeypatch):
  def old_position(self, get_state=TrainBatches.get_state):
    return {k: v for k, v in get_state(self).items() if k not in ("order", "mixtures")}

  with monkeypatch.context() as patched:
    patched.setattr(TrainBatches, "get_state", old_position)
    runs.train_run(_with(config, steps=2), tmp_path / "run")
  with pytest.raises(InputError, match="an earlier version of this program, in which the library"):
    runs.train_run(config, tmp_path / "run")
