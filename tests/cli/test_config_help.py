"""`--help-config` and docs/configuration.md: every key, with its value and its meaning."""

import re

import pytest

from dense_jax import experiment
from dense_jax.cli import compile, config_help, train
from dense_jax.errors import InputError
from dense_jax.models.registry import FAMILIES
from tests.helpers import ROOT

SMOKE = str(ROOT / "experiments" / "smoke.py")


def paths(config):
  return {f"{group.path}.{key.name}" for group in config_help.groups(config) for key in group.keys}


def test_the_document_is_what_the_code_writes():
  written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
  assert written == config_help.document(), (
      "run: python -m dense_jax.cli.config_help > docs/configuration.md"
  )


def test_the_document_has_every_key_of_every_family():
  sections = re.split(r"^## ", config_help.document(), flags=re.M)
  for name in FAMILIES:
    config = experiment.resolve({"model": {"family": name}})
    for group in config_help.groups(config):
      title = f"{group.path} of {name}" if group.path.endswith("mixer") else group.path
      (section,) = [part for part in sections if part.startswith(title + "\n")]
      for key in group.keys:
        assert f"| `{key.name}` |" in section


@pytest.mark.parametrize("main", [train.main, compile.main], ids=["train", "compile"])
def test_the_listing_is_of_the_experiment_that_is_given(main, capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  arguments = ["--help-config", "--config.model.family", "gau_retnet", "--config", SMOKE,
               "--config.model.mixer.heads=4"]
  assert main(arguments) == 0
  out = capsys.readouterr().out
  assert all(len(line) <= 80 for line in out.splitlines())
  words = " ".join(out.split())
  for line in ("width = 192 D: channels of the residual stream [an integer >= 1; resume: never]",
               "heads = 4 H: heads; N = K / H [an integer >= 1; resume: never]",
               "heldout_path = '' held-out text; empty",
               "config.model.dense: dense hidden connections; docs/dense.md depth = 1 m: how many",
               "tie_embeddings = true whether the head is the embedding's transpose [true or"):
    assert line in words
  assert "dt_rank" not in out
  config = experiment.load(SMOKE, [("model.family", "gau_retnet")])
  names = re.findall(r"^  (\w+) = ", out, re.M)
  assert sorted(names) == sorted(path.rpartition(".")[2] for path in paths(config))


def test_a_long_value_takes_a_line_of_its_own():
  path = "corpus/" + "x" * 90 + ".txt"
  config = experiment.load(SMOKE, [("data.path", path)])
  lines = config_help.listing(config, 60).splitlines()
  at = lines.index(f"  path = {path}")
  assert lines[at + 1].strip().startswith("text to train on")
  assert all(len(line) <= 60 for line in lines if path not in line)


def test_what_is_wrong_is_refused(capsys):
  with pytest.raises(InputError, match=r"did you mean config\.model\.width"):
    train.main(["--help-config", "--config", SMOKE, "--config.model.widht=3"])
  with pytest.raises(SystemExit, match="2"):
    train.main(["--help-config"])
  assert "--help-config: error: the following arguments are required: --config" in (
      capsys.readouterr().err
  )
