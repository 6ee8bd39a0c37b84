"""The command line that saves a run for others: every checkpoint, and its refusals."""

import json

import numpy as np
import pytest

from dense_jax.cli import common, convert, train
from dense_jax.interop import load_hf
from dense_jax.models.params import get_params, unrolled, with_params
from dense_jax.types import InputError


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run of four steps, saved after each second one."""
  folder = tmp_path_factory.mktemp("convert")
  text = [f"line {line}: {line * 7919 % 1000}\n" for line in range(80)]
  for name in ("a.txt", "b.txt"):
    (folder / name).write_text("".join(text))
  status = train.main([
      "--config", "experiments/smoke.py:debug", "--workdir", str(folder / "run"),
      f"--config.data.path={folder}/*.txt", f"--config.data.cache_dir={folder}/.cache",
      "--config.data.heldout_every=2", "--config.data.seq_len=32",
      "--config.train.batch_size=8", "--config.model.width=16", "--config.model.layers=4",
      "--config.model.dense.depth=0",
  ])
  assert status == 0
  return str(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["latest", "best", "2"])
def test_a_checkpoint_comes_back_bitwise(workdir, tmp_path, capsys, checkpoint):
  output = tmp_path / "saved"
  arguments = ["--workdir", workdir, "--checkpoint", checkpoint, "--output", str(output)]
  assert convert.main(arguments) == 0
  run = common.restore(workdir, checkpoint)
  printed = capsys.readouterr().out
  assert f"step {run.step}: " in printed
  assert printed.endswith("layout: mamba\n")
  expected = get_params(unrolled(with_params(run.model, run.params)))
  actual = get_params(load_hf(str(output)))
  assert actual.keys() == expected.keys()
  for name, value in actual.items():
    np.testing.assert_array_equal(value, expected[name], err_msg=name)
  config = json.loads((output / "config.json").read_text())
  assert config["bos_token_id"] == run.tokenizer.bos_id
  assert config["eos_token_id"] == run.tokenizer.eos_id


def test_a_folder_that_holds_something_is_refused(tmp_path):
  (tmp_path / "thing").touch()
  with pytest.raises(InputError, match=r"--output = .* is not valid: expected a folder that is"):
    convert.main(["--workdir", "a/run", "--output", str(tmp_path)])


def test_a_missing_run_is_refused_and_nothing_written(tmp_path):
  with pytest.raises(InputError, match=r"expected a run with config\.json"):
    convert.main(["--workdir", str(tmp_path), "--output", str(tmp_path / "saved")])
  assert not (tmp_path / "saved").exists()
