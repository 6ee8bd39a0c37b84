"""Published models: folders that come back as the same run, cards, means of checkpoints."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from dense_jax import experiment, runs
from dense_jax.cli import convert
from dense_jax.config import DataConfig, ExperimentConfig, TrainConfig
from dense_jax.data.tokenizer import ByteTokenizer
from dense_jax.errors import InputError
from dense_jax.models.params import by_layer, with_params
from dense_jax.runs import restoring
from dense_jax.training.checkpoint import Checkpoints
from dense_jax.training.step import TrainState
from tests.builders import FAMILIES, model_config, random_params

BYTES = ByteTokenizer()
DATA = {
    "fingerprint": "f" * 32, "tokenizer": BYTES.fingerprint, "texts": ["a", "b"],
    "files": {"config.data.path": {
        "count": 2, "bytes": 1234, "digest": "d" * 32, "files": [["secret.txt", 1, "c"]],
    }},
}


def make_workdir(folder, model, seeds=(0,), ema=0.0, make_params=random_params):
  """Makes the folder of a run with a checkpoint of random parameters for each seed."""
  config = ExperimentConfig(
      model=model, data=DataConfig(path="there/*.txt", seq_len=32, cache_dir="/home/me/cache"),
      train=TrainConfig(steps=100, batch_size=4, ema=ema),
  )
  folder = epath.Path(folder)
  checkpoints = Checkpoints(folder / "checkpoints", model, keep_last=9)
  for step, seed in enumerate(seeds, 1):
    average = make_params(model, seed + 100) if ema else None
    state = TrainState(jnp.int32(10 * step), make_params(model, seed), {}, average)
    assert checkpoints.save(state, 10 * step, {}, None)
  checkpoints.close()
  experiment.save(config, folder)
  BYTES.save(folder / "tokenizer")
  (folder / "data.json").write_text(json.dumps(DATA))
  newest = 10 * len(seeds)
  lines = [{"step": newest, "loss": 3.0}, {"step": newest, "heldout_loss": 2.5},
           {"step": newest - 1, "heldout_loss": 9.0}]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(folder)


def same_bits(left, right):
  assert left.keys() == right.keys()
  for name, value in left.items():
    np.testing.assert_array_equal(value, right[name], err_msg=name)


def in_layers(run):
  return by_layer(run.model.config, run.params)


# Each layout; m = 2 of a scanned model; options that config.json of transformers does not have.
CASES = [
    *(pytest.param(family, {"depth": 0, "vocab_size": 258}, id=family,
                   marks=() if family == "mamba" else pytest.mark.exhaustive)
      for family in FAMILIES),
    pytest.param("mamba2", {"depth": 0, "vocab_size": 260, "dtype": "bfloat16", "remat": "full",
                            "dt_limit_min": 0.01, "chunk": 4}, id="mamba2-options",
                 marks=pytest.mark.slow),
    pytest.param("gau_retnet", {"depth": 2, "layers": 6, "vocab_size": 258}, id="scanned",
                 marks=pytest.mark.slow),
    pytest.param("gau_retnet", {"depth": 1, "inject": "inputs", "layers": 3, "vocab_size": 258,
                                "gate_reduction": 32}, id="released", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "options"), CASES)
def test_a_run_comes_back_with_the_same_bits(tmp_path, capsys, family, options):
  workdir = make_workdir(tmp_path / "run", model_config(family, **options))
  hf, back, again = (str(tmp_path / name) for name in ("hf", "back", "again"))
  assert convert.main(["--workdir", workdir, "--output", hf]) == 0
  assert convert.main(["--hf", hf, "--output", back]) == 0
  before, after = runs.restore(workdir), runs.restore(back)
  same_bits(in_layers(before), in_layers(after))
  assert (before.step, after.step) == (10, 0)
  assert after.tokenizer.fingerprint == before.tokenizer.fingerprint
  # Nothing of the configuration is lost but the place of this machine's cache.
  data = dataclasses.replace(before.config.data, cache_dir=DataConfig().cache_dir)
  assert after.config == dataclasses.replace(before.config, data=data)
  # Published once more, it is the same folder to the last byte.
  assert convert.main(["--workdir", back, "--output", again]) == 0
  for file in (tmp_path / "hf").iterdir():
    assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
  assert "parameters of " in capsys.readouterr().out


def test_kernels_are_tried_out_only_where_the_model_will_run(tmp_path, monkeypatch):
  checked = []

  def check(config, strict):
    checked.append(strict)
    return True

  monkeypatch.setattr(restoring, "check_kernels", check)
  workdir = make_workdir(tmp_path / "run", model_config("mamba", vocab_size=258), seeds=(0, 1))
  hf, back = str(tmp_path / "hf"), str(tmp_path / "back")
  assert convert.main(["--workdir", workdir, "--output", hf, "--average", "2"]) == 0
  assert convert.main(["--hf", hf, "--output", back]) == 0
  assert not checked
  runs.restore(workdir)
  runs.load_folder(hf, strict=True)
  assert checked == [False, True]


def test_a_folder_without_a_history_is_a_run_of_the_default_configuration(tmp_path):
  workdir = make_workdir(tmp_path / "run", model_config("mamba", vocab_size=258))
  convert.main(["--workdir", workdir, "--output", str(tmp_path / "hf")])
  (tmp_path / "hf" / "training.json").unlink()
  runs.make_run(str(tmp_path / "hf"), str(tmp_path / "back"))
  run = runs.restore(tmp_path / "back")
  same_bits(in_layers(runs.restore(workdir)), in_layers(run))
  assert run.config == ExperimentConfig(model=run.config.model)
  made = runs.publish(run, tmp_path / "back", str(tmp_path / "again"))
  assert made.layout == "mamba"
  assert "Not known here: the model came from another" in (made.folder / "README.md").read_text()


def test_the_card_says_what_the_model_is(tmp_path):
  workdir = make_workdir(tmp_path / "run", model_config("gau_retnet", 2, vocab_size=258))
  (tmp_path / "run" / "init.json").write_text(json.dumps({"model": "step 7 of `runs/m1`\n#"}))
  size = sum(leaf.size for leaf in runs.restore(workdir).params.values())
  convert.main(["--workdir", workdir, "--output", str(tmp_path / "hf")])
  card = (tmp_path / "hf" / "README.md").read_text()
  assert card.startswith("---\nlibrary_name: dense_jax\n")
  for part in (
      f"with dense connections, m = 2, {size:,} parameters\n", "depth 2, inject state",
      "| steps | 10 of 100 |", "| tokens | 1,280, in rows of 32, 4 a step |", "`there/*.txt`",
      "f" * 32, "2, 1,234 bytes", "| loss | 2.5000 |", "step 7 of runs/m1 #",
      "bytes of UTF-8, 258 rows", "Only dense_jax can load it", '"depth": 2',
      "dense-jax generate --hf FOLDER",
  ):
    assert part in card, part
  for private in ("secret.txt", "/home/me"):
    assert private not in card
    assert private not in (tmp_path / "hf" / "training.json").read_text()


def test_the_card_has_the_evaluation_that_is_given(tmp_path):
  workdir = make_workdir(tmp_path / "run", model_config("mamba", vocab_size=258))
  (tmp_path / "e.json").write_text(json.dumps({"loss": 1.25, "context": "a|b", "targets": 12345}))
  (tmp_path / "t.json").write_text(json.dumps({
      "context": "carried", "versions": {"tasks": "harness 1.2"},
      "tasks": {"piqa": {"shots": 5, "counts": {"items": 1838}, "metrics": {
          "acc": {"value": 0.6, "stderr": 0.0115}, "acc_norm": {"value": 0.5, "stderr": None}}}},
  }))
  convert.main(["--workdir", workdir, "--output", str(tmp_path / "hf"),
                "--evaluation", str(tmp_path / "e.json"), "--evaluation", str(tmp_path / "t.json")])
  card = (tmp_path / "hf" / "README.md").read_text()
  for part in ("| loss | 1.2500 |", "| targets | 12,345 |", "| context | a\\|b |",
               "| piqa | 5 | 1,838 | acc | 0.6000 | 0.0115 |", "|  |  |  | acc_norm | 0.5000 |  |",
               "Tasks as in harness 1.2; context: carried.",
               "AutoModelForCausalLM.from_pretrained", "library_name: transformers"):
    assert part in card, part
  assert "2.5000" not in card


@pytest.mark.parametrize(("weights", "seed", "said"), [
    ("raw", 0, "float32, after step 10"), ("ema", 100, "exponential moving average after step 10"),
    ("auto", 100, "exponential moving average"),
])
def test_which_parameters_are_published(tmp_path, weights, seed, said):
  model = model_config("gau_retnet", vocab_size=258)
  workdir = make_workdir(tmp_path / "run", model, ema=0.9)
  more = [] if weights == "auto" else ["--weights", weights]
  convert.main(["--workdir", workdir, "--output", str(tmp_path / "hf"), *more])
  loaded = runs.load_folder(str(tmp_path / "hf"))
  same_bits(in_layers(loaded), by_layer(model, random_params(model, seed)))
  card = (tmp_path / "hf" / "README.md").read_text()
  assert said in card
  # The held-out loss of training is that of the average.
  assert ("None was made of these parameters." in card) == (weights == "raw")


def test_a_mean_of_checkpoints_is_exact(tmp_path, capsys):
  model = model_config("mamba", vocab_size=258)
  workdir = make_workdir(tmp_path / "run", model, seeds=(0, 1, 2, 3))
  convert.main(["--workdir", workdir, "--average", "3", "--output", str(tmp_path / "hf")])
  assert "mean of steps 20, 30, 40: " in capsys.readouterr().out
  parts = [random_params(model, seed) for seed in (1, 2, 3)]
  expected = {
      name: (sum(np.asarray(part[name], np.float64) for part in parts) / 3).astype(np.float32)
      for name in parts[0]
  }
  same_bits(in_layers(runs.load_folder(str(tmp_path / "hf"))), by_layer(model, expected))
  assert "float32, mean of steps 20, 30, 40" in (tmp_path / "hf" / "README.md").read_text()
  run, steps = runs.average_checkpoints(workdir, 1)
  assert steps == [40]
  same_bits(run.params, random_params(model, 3))


@pytest.mark.parametrize(("arguments", "message"), [
    (["--average", "5"], r"--average = 5 is not valid: expected an integer from 1 to 2"),
    (["--average", "0"], r"--average = 0 is not valid"),
    (["--average", "2", "--checkpoint", "10"], r"--checkpoint = '10' is not valid"),
    (["--average", "2", "--weights", "ema"], r"--weights = 'ema' is not valid"),
    (["--weights", "ema"], r"--weights = 'ema' is not valid: expected raw"),
    (["--evaluation", "missing.json"], r"--evaluation = 'missing.json' .* \(No such file"),
    (["--evaluation", "list.json"], r"--evaluation = 'list.json' .* it holds something"),
    (["--evaluation", "tasks.json"], r"--evaluation = 'tasks.json' .* it holds something"),
    (["--evaluation", "cut.json"], r"--evaluation = 'cut.json' is not valid: expected a JSON file"),
])
def test_choices_that_do_not_fit_are_named(tmp_path, monkeypatch, arguments, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "list.json").write_text("[]")
  (tmp_path / "tasks.json").write_text('{"tasks": {"piqa": {"shots": 0}}}')
  (tmp_path / "cut.json").write_text("{")
  make_workdir(tmp_path / "run", model_config("mamba", vocab_size=258), seeds=(0, 1))
  with pytest.raises(InputError, match=message):
    convert.main(["--workdir", "run", "--output", "hf", *arguments])
  assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("option", [
    ["--checkpoint", "3"], ["--weights", "raw"], ["--average", "2"], ["--evaluation", "f.json"],
])
def test_a_folder_has_one_model_to_choose_from(tmp_path, option):
  with pytest.raises(InputError, match=f"{option[0]} = .* expected no value with --hf"):
    convert.main(["--hf", "nowhere", "--output", str(tmp_path / "run"), *option])


def _changed(folder, **changes):
  file = folder / "training.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_history_that_does_not_fit_is_refused(tmp_path):
  workdir = make_workdir(tmp_path / "run", model_config("mamba", vocab_size=258))
  folder = tmp_path / "hf"
  convert.main(["--workdir", workdir, "--output", str(folder)])
  good = json.loads((folder / "training.json").read_text())
  other = {**good["config"], "model": {**good["config"]["model"], "norm_eps": 1e-3}}
  typo = {**good["config"], "trian": {}}
  for changes, message in (
      ({"config": other}, "of another model than config.json"), ({"config": typo}, "trian"),
      ({"config": 3}, "no step and configuration"), ({"format_version": 2}, "format_version"),
      ({"config": {"model": 3}}, "is not valid"),
      ({"evaluation": [{"tasks": []}]}, "its evaluation is none"),
  ):
    (folder / "training.json").write_text(json.dumps(good))
    _changed(folder, **changes)
    with pytest.raises(InputError, match=message):
      runs.make_run(str(folder), str(tmp_path / "back"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hf", "run"]


def test_a_model_that_is_not_finite_becomes_no_run(tmp_path):
  model = model_config("mamba", vocab_size=258)
  workdir = make_workdir(tmp_path / "run", model)
  run = runs.restore(workdir)
  broken = {name: leaf * np.nan for name, leaf in run.params.items()}
  run = dataclasses.replace(
      run, params=broken, model=with_params(run.model, broken))
  runs.publish(run, workdir, str(tmp_path / "hf"))
  with pytest.raises(InputError, match="a model whose parameters are finite"):
    runs.make_run(str(tmp_path / "hf"), str(tmp_path / "back"))
  assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hf", "run"]


def test_a_run_of_a_folder_does_not_go_on(tmp_path):
  model = model_config("mamba", vocab_size=258)
  workdir = make_workdir(tmp_path / "run", model)
  convert.main(["--workdir", workdir, "--output", str(tmp_path / "hf")])
  runs.make_run(str(tmp_path / "hf"), str(tmp_path / "back"))
  with pytest.raises(InputError, match="or a new one and --init-from this one"):
    runs.train_run(runs.base_config(tmp_path / "back", None), tmp_path / "back")
