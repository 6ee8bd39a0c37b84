"""A tokenizer.json, and fine-tuning on responses, from training to conversion by the commands."""

import json

import pytest

from dense_jax import runs
from dense_jax.cli import convert, evaluate, generate, train
from dense_jax.data.hugging_face_tokenizer import HuggingFaceTokenizer
from dense_jax.data.pipeline import load_datasets
from dense_jax.data.spelling import prompt_ids
from dense_jax.data.templates import template_of
from dense_jax.data.tokenizer import load_saved_tokenizer
from dense_jax.errors import InputError
from tests.data.hugging_face import EOS, TEXT, byte_level

pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A tokenizer.json of the tokenizers library, text, and examples to fine-tune on."""
  folder = tmp_path_factory.mktemp("tokenizer_json")
  (folder / "hf").mkdir()
  (folder / "hf" / "tokenizer.json").write_bytes(byte_level(added=["    ", "né"]))
  (folder / "hf" / "tokenizer_config.json").write_text(
      json.dumps({"bos_token": EOS, "eos_token": {"content": EOS}, "add_bos_token": False}))
  for name in ("a.txt", "b.txt"):
    (folder / name).write_text("".join(TEXT) + "é 😀\r\n")
  lines = [{"prompt": f"{n} + 1", "response": f"{n + 1} né 😀"} for n in range(40)]
  (folder / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return folder


def _arguments(folder, workdir, *more):
  return ["--config", "experiments/smoke.py:debug", "--workdir", str(workdir),
          f"--config.data.tokenizer={folder}/hf", f"--config.data.cache_dir={folder}/cache",
          "--config.data.seq_len=32", "--config.model.layers=2", "--config.train.batch_size=8",
          *more]


def _held_out(workdir, tmp_path):
  assert evaluate.main(["--workdir", str(workdir), "--json", str(tmp_path / "figures.json")]) == 0
  return json.loads((tmp_path / "figures.json").read_text())


def test_it_serves_training_evaluation_generation_and_conversion(folder, tmp_path, capsys):
  workdir = tmp_path / "run"
  arguments = _arguments(
      folder, workdir, f"--config.data.path={folder}/*.txt", "--config.data.heldout_every=2")
  assert train.main(arguments) == 0
  content = (folder / "hf" / "tokenizer.json").read_bytes()
  assert (workdir / "tokenizer" / "tokenizer.json").read_bytes() == content
  run = runs.restore(workdir)
  assert isinstance(run.tokenizer, HuggingFaceTokenizer) and run.tokenizer.add_bos
  assert run.config.model.vocab_size == run.tokenizer.vocab_size == 502

  figures = _held_out(workdir, tmp_path)
  assert figures["bytes"] == len("".join(TEXT).encode()) + len("é 😀\r\n".encode())
  bits = figures["loss"] * figures["targets"] / figures["bytes"] / 0.6931471805599453
  assert figures["bits_per_byte"] == pytest.approx(bits)

  capsys.readouterr()
  prompt = "def né 😀"
  options = ["--workdir", str(workdir), "--prompt", prompt, "--max-new-tokens", "8"]
  assert generate.main(options) == 0
  assert capsys.readouterr().out.startswith(prompt)

  output = tmp_path / "saved"
  assert convert.main(["--workdir", str(workdir), "--output", str(output)]) == 0
  assert (output / "tokenizer.json").read_bytes() == content
  loaded = runs.load_folder(str(output))
  assert loaded.tokenizer.fingerprint == run.tokenizer.fingerprint
  assert prompt_ids(loaded.tokenizer, "a") == [run.tokenizer.bos_id, *run.tokenizer.encode("a")]
  assert load_saved_tokenizer(folder / "hf").fingerprint == loaded.tokenizer.fingerprint


@pytest.mark.exhaustive
def test_fine_tuning_counts_the_responses(folder, tmp_path):
  workdir = tmp_path / "tuned"
  arguments = _arguments(
      folder, workdir, f"--config.data.path={folder}/examples.jsonl",
      "--config.data.format=responses", r"--config.data.template=Q: {prompt}\nA:")
  assert train.main(arguments) == 0
  run = runs.restore(workdir)
  template = template_of(run.config.data)
  assert template.prompt("1 + 1") == "Q: 1 + 1\nA:"
  heldout = load_datasets(run.config.data).heldout
  expected = [run.tokenizer.bos_id, *run.tokenizer.encode("Q: 0 + 1\nA:")]
  assert heldout.tokens[: len(expected)].tolist() == expected
  figures = _held_out(workdir, tmp_path)
  assert figures["bytes"] == sum(len(f"{n} né 😀".encode()) for n in (1, 21))
  assert figures["targets"] == heldout.num_targets
  report = runs.write_report(workdir)
  assert [prompt for prompt, _ in report.samples] == ["Q: 0 + 1\nA:", "Q: 20 + 1\nA:"]
  for change in ("template=plain", "format=text"):
    with pytest.raises(InputError, match=r"other values of\n.*config\.data\." + change[:6]):
      train.main([*arguments, f"--config.data.{change}", "--config.train.steps=6"])
  assert train.main([*arguments, "--config.train.steps=6", "--allow-change", "train.steps"]) == 0
