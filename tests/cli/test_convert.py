"""The command line that saves a run for others: every checkpoint, and its refusals."""

import json
import os

import numpy as np
import pytest
from flax import nnx

from dense_jax import experiment, runs
from dense_jax.cli import convert, train
from dense_jax.data.tokenizer import (
  ByteTokenizer,
  SentencePieceTokenizer,
  load_saved_tokenizer,
  train_sentencepiece,
)
from dense_jax.errors import InputError
from dense_jax.interop import load_hf
from dense_jax.models.language_model import LanguageModel
from dense_jax.models.params import get_params, unrolled, with_params

# The mode that the umask gives a new file.
os.umask(UMASK := os.umask(0o022))
MODE = 0o666 & ~UMASK


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """Trains a run of four steps, saved after every second one."""
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
@pytest.mark.parametrize("checkpoint", [
    *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("latest", "2")), "best",
])
def test_a_checkpoint_comes_back_bitwise(workdir, tmp_path, capsys, checkpoint):
  output = tmp_path / "saved"
  arguments = ["--workdir", workdir, "--checkpoint", checkpoint, "--output", str(output)]
  assert convert.main(arguments) == 0
  run = runs.restore(workdir, checkpoint)
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
  assert load_saved_tokenizer(output).fingerprint == run.tokenizer.fingerprint
  assert {file.stat().st_mode & 0o777 for file in output.iterdir()} == {MODE}


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_the_tokenizer_is_written_too(tmp_path, monkeypatch, capsys, kind):
  tokenizer = ByteTokenizer()
  if kind == "sentencepiece":
    lines = [f"def f_{i}(x): return {i * 37}\n" for i in range(300)]
    train_sentencepiece(lines, 320, tmp_path / "x.model")
    tokenizer = SentencePieceTokenizer((tmp_path / "x.model").read_bytes())
  overrides = [("model.vocab_size", str(tokenizer.vocab_size)), ("model.width", "16"),
               ("model.layers", "2")]
  config = experiment.load("experiments/smoke.py:debug", overrides)
  model = LanguageModel(config.model, rngs=nnx.Rngs(0))
  run = runs.Run("a run", tokenizer, model, get_params(model), config, 4)
  monkeypatch.setattr(runs, "restore", lambda workdir, which, weights, runs_model: run)
  monkeypatch.setenv("HOME", str(tmp_path))
  assert convert.main(["--workdir", "run", "--output", "~/a/saved"]) == 0
  output = tmp_path / "a" / "saved"
  assert str(output) in capsys.readouterr().out
  files = {"config.json", "model.safetensors", "tokenizer_config.json", "README.md",
           "training.json"}
  files |= {"tokenizer.model"} if kind == "sentencepiece" else set()
  assert {file.name: file.stat().st_mode & 0o777 for file in output.iterdir()} == dict.fromkeys(
      files, MODE)
  again = load_saved_tokenizer(output)
  assert (type(again), again.fingerprint) == (type(tokenizer), tokenizer.fingerprint)
  assert load_hf(str(output)).config.vocab_size == again.vocab_size


@pytest.mark.parametrize("output", ["", "file/saved", "/proc/saved", "gs://bucket/saved"])
def test_an_output_that_cannot_be_written_is_named_before_a_run_is_loaded(
    tmp_path, monkeypatch, output
):
  (tmp_path / "file").touch()
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(runs, "restore", None)
  monkeypatch.setattr("dense_jax.files._reads_buckets", lambda: True)
  with pytest.raises(InputError, match=f"^--output = '{output}' is not valid: expected a "):
    convert.main(["--workdir", "run", "--output", output])


def test_a_folder_that_holds_something_is_refused(tmp_path):
  (tmp_path / "thing").touch()
  with pytest.raises(InputError, match=r"--output = .* is not valid: expected a folder that is"):
    convert.main(["--workdir", "a/run", "--output", str(tmp_path)])


def test_a_missing_run_is_refused_and_nothing_written(tmp_path):
  with pytest.raises(InputError, match=r"expected a run with config\.json"):
    convert.main(["--workdir", str(tmp_path), "--output", str(tmp_path / "saved")])
  assert not (tmp_path / "saved").exists()
