"""Every experiment file loads, is valid, and has the size that its header says."""

import pathlib
import re

import pytest

from dense_jax import experiment
from dense_jax.errors import InputError
from dense_jax.models.params import abstract_model, count_params, get_params
from dense_jax.training.optimizer import decay_mask
from tests.builders import FAMILIES
from tests.helpers import ROOT

FILES = sorted((ROOT / "experiments").glob("*.py"))
PARAMETERS = {
    "dense_retnet_350m": 367_630_080,
    "dense_retnet_1p3b": 1_333_090_560,
    "dense_mamba_370m": 376_136_704,
    "family_350m": 368_338_432,
    "family_1p3b": 1_343_740_928,
    # The embedding's rows are the tokenizer's pieces, or the task's ids.
    "smoke": 2_258_880,
    "evidence": 1_181_824,
    "recall": 119_360,
}


def size(config):
  return count_params(get_params(abstract_model(config)))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_loads_with_its_published_size(file: pathlib.Path):
  vocab = {"smoke": "4096", "evidence": "2048", "recall": "64"}.get(file.stem)
  overrides = [("model.vocab_size", vocab)] if vocab else []
  config = experiment.load(str(file), overrides)
  assert size(config.model) == PARAMETERS[file.stem]
  decay_mask(list(get_params(abstract_model(config.model))))
  for part in ("Command", "Hardware", "Expected"):
    assert part in file.read_text().split('"""')[1]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_debug_is_small_enough_to_make(file: pathlib.Path):
  config = experiment.load(f"{file}:debug", [("model.vocab_size", "258")])
  assert size(config.model) < 500_000
  with pytest.raises(InputError, match="expected debug"):
    experiment.load(f"{file}:dbug")


@pytest.mark.parametrize(("family", "parameters"), [
    ("gau_retnet", 26_227_200), ("mamba2", 24_836_160)])
def test_the_models_of_the_sweep_for_a_gpu_have_about_25m_parameters(family, parameters):
  file = f"{ROOT / 'experiments' / 'evidence.py'}:25m"
  config = experiment.load(file, [("model.family", family), ("model.vocab_size", "8192")])
  assert size(config.model) == parameters
  assert abs(config.train.steps * config.train.batch_size * config.data.seq_len / 24e6 - 1) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_all_families_have_about_350m_parameters(family):
  config = experiment.load(f"{ROOT / 'experiments' / 'family_350m.py'}:{family}")
  assert abs(size(config.model) / 358e6 - 1) < 0.04
  assert config.model.family == family
  debug = experiment.load(f"{ROOT / 'experiments' / 'family_350m.py'}:{family}-debug")
  assert debug.model.width < 100


def test_base_of_dense_mamba_is_the_published_mamba_370m():
  """371,516,416 parameters, as the released checkpoint has."""
  file = ROOT / "experiments" / "dense_mamba_370m.py"
  assert size(experiment.load(str(file), [("model.dense.depth", "0")]).model) == 371_516_416


def test_another_family_brings_its_own_options():
  file = ROOT / "experiments" / "smoke.py"
  config = experiment.load(
      str(file), [("model.mixer.heads", "4"), ("model.family", "gau_retnet")]
  )
  assert config.model.mixer.heads == 4
  with pytest.raises(InputError, match=r"unknown key config.model.mixer.heads"):
    experiment.load(str(file), [("model.mixer.heads", "4")])


@pytest.mark.parametrize(("body", "message"), [
    ("  config.train.stepz = 3\n  return config\n", r"^unknown key config\.train\.stepz"),
    ("  return config.training.steps\n", r":4: AttributeError: .*training"),
    ("  return confg\n", r":4: NameError: name 'confg' is not defined"),
    ("  import no_such_module\n", r":4: ModuleNotFoundError: No module named 'no_such_module'"),
    ("  return [][0]\n", r":4: IndexError: list index out of range"),
    ("  return config.train.helper(\n", r":4: SyntaxError: '\(' was never closed"),
    ("  from wrong_helper import fails\n  return fails()\n", r":5: ZeroDivisionError: division by"),
    ("  pass\n", r": get_config returned NoneType, expected a ConfigDict"),
    ("  return type(config)()\n", r": get_config returned ConfigDict, expected a ConfigDict with"),
    ("  del config.train\n  return config\n", r"^config\.train = None .*default_config has"),
    ("  return config\ndel get_config\n", r": AttributeError: module .* no attribute 'get_config'"),
])
def test_a_bug_in_a_file_is_an_input_error_with_its_line(tmp_path, monkeypatch, body, message):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / "wrong_helper.py").write_text("def fails():\n  return 1 / 0\n")
  file = tmp_path / "wrong.py"
  file.write_text(
      "from dense_jax.experiment import default_config\n"
      "def get_config(arg=''):\n"
      "  config = default_config()\n" + body
  )
  message = message if message.startswith("^") else rf"^{re.escape(str(file))}{message}"
  with pytest.raises(InputError, match=message):
    experiment.load(str(file), [("train.steps", "3")])


def test_a_bug_in_an_experiment_that_another_begins_with(tmp_path):
  (tmp_path / "inner.py").write_text("def get_config(arg=''):\n  return arg + 1\n")
  (tmp_path / "outer.py").write_text(
      "import pathlib\nfrom dense_jax import experiment\ndef get_config(arg=''):\n"
      "  return experiment.get_config(pathlib.Path(__file__).with_name('inner.py'))\n"
  )
  with pytest.raises(InputError, match=r"^/.*/inner\.py:2: TypeError"):
    experiment.load(str(tmp_path / "outer.py"))


def test_a_file_below_the_home_directory(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "mine.py").write_text(
      "from dense_jax.experiment import default_config\n"
      "def get_config(arg=''):\n  return default_config(arg)\n"
  )
  assert experiment.load("~/mine.py:mamba2").model.family == "mamba2"
