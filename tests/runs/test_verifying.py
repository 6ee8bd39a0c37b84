"""`verify` says of each checkpoint of a run whether it is what was saved, and changes nothing."""

import json
import shutil

import pytest
from etils import epath

from dense_jax import experiment, runs
from dense_jax.cli import verify
from dense_jax.errors import InputError
from dense_jax.training.stored import saved_steps
from tests.helpers import write_text
from tests.training.test_damage import array_file, flip, without_digests


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  text = write_text(tmp_path_factory.mktemp("text"))
  return experiment.load("experiments/smoke.py:debug", [
      ("data.path", str(text)), ("data.cache_dir", f"{text}/.cache"), ("data.heldout_every", "2"),
      ("data.seq_len", "32"), ("train.batch_size", "8"), ("model.width", "16"),
      ("model.layers", "2"), ("model.family", "gau_retnet"), ("model.dense.depth", "0"),
      ("train.ema", "0.5"),
  ])


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("finished") / "run"
  runs.train_run(config, workdir)
  return workdir


@pytest.fixture
def workdir(finished, tmp_path):
  return shutil.copytree(finished, tmp_path / "run")


def contents(folder):
  return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_is_whole_is_proven(workdir, capsys):
  before = contents(workdir)
  assert verify.main(["--workdir", str(workdir)]) == 0
  two, four = capsys.readouterr().out.splitlines()
  assert two.startswith("step 2: whole: ") and four.startswith("step 4: whole: ")
  assert "arrays, " in four and "all numbers finite, as they were saved" in four
  saved = json.loads((workdir / "checkpoints/4/digests/metadata").read_text())["arrays"]
  [verdict] = runs.verify(workdir, "latest")
  assert verdict.arrays == len(saved) and verdict.proven
  # Parameters, their average and two moments, of float32; counts.
  assert {name.partition("/")[0] for name in saved} == {"params", "ema", "optimizer"}
  numbers = runs.restore(workdir, runs_model=False).params
  size = 4 * sum(leaf.size for leaf in numbers.values())
  assert 4 * size < verdict.num_bytes < 4 * size + 100
  assert contents(workdir) == before


@pytest.mark.parametrize("item", ["params", "ema", "optimizer"])
def test_a_flipped_bit_is_found_and_training_passes_over_it(workdir, config, capsys, item):
  folder = workdir / "checkpoints"
  file = array_file(folder / "4", item)
  for position in range(0, file.stat().st_size, 101):
    flip(file, position)
  assert verify.main(["--workdir", str(workdir)]) == 2
  two, four = capsys.readouterr().out.splitlines()
  assert two.startswith("step 2: whole") and four.startswith("step 4: DAMAGED: ")
  assert saved_steps(epath.Path(folder)) == [2, 4]
  if item == "ema":  # What is evaluated.
    with pytest.raises(InputError, match="checkpoint 4 in "):
      runs.restore(workdir, "4")
  assert runs.train_run(config, workdir).step == 4
  assert "from step 2 to 4" in capsys.readouterr().out
  assert (workdir / "checkpoints.damaged" / "4").is_dir()
  assert not [verdict for verdict in runs.verify(workdir) if verdict.damage]


def test_older_checkpoints_are_read_but_not_proven(workdir, capsys):
  without_digests(workdir / "checkpoints", 2)
  assert verify.main(["--workdir", str(workdir), "--checkpoint", "2"]) == 0
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith("step 2: readable, but saved without digests, so not proven: ")


@pytest.mark.parametrize(("damaged", "said"), [
    ("data/metadata", "data/metadata: the position in the data is not what was saved"),
    ("metrics/metrics", "metrics/metrics: the held-out loss is not what was saved"),
    ("digests/metadata", "digests/metadata (its content is not what was written)"),
])
def test_a_changed_digit_in_a_small_file_is_found(workdir, damaged, said):
  file = workdir / "checkpoints" / "4" / damaged
  text = file.read_text()
  # The first, for the last one of a number may be beyond its precision.
  index = min(text.find(digit) for digit in "123456789" if digit in text)
  file.write_text(text[:index] + ("1" if text[index] != "1" else "2") + text[index + 1 :])
  [verdict] = runs.verify(workdir, "4")
  assert verdict.damage == said


@pytest.mark.parametrize(("options", "message"), [
    (["--checkpoint", "3"], "--checkpoint = '3' is not valid: expected all, latest or one of 2, 4"),
    (["--workdir", "nowhere"], "--workdir = 'nowhere' is not valid: expected a run that has a "),
])
def test_what_is_not_there_is_named(workdir, options, message):
  with pytest.raises(InputError, match=message):
    verify.main(["--workdir", str(workdir), *options])
