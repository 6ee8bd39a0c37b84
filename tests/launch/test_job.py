"""A launcher's checks before anything costs money."""

import argparse
import re
import shlex

import pytest

from dense_jax.cli import common
from dense_jax.errors import InputError
from launch import job
from tests.helpers import ROOT

PLACE = ["--tpu-type=v6e-16", "--workdir=gs://b/run"]
SMOKE = "--config=experiments/smoke.py"
ROWS = "--config.train.batch_size=64"


def parse(*arguments):
  parser = argparse.ArgumentParser()
  job.add_tpu_type_argument(parser)
  job.add_slices_argument(parser)
  job.add_job_arguments(parser)
  return job.parse_job(*common.split_overrides(parser, arguments))


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
  monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(("name", "chips", "topology"), [
    ("v6e-1", 1, "v6e:1x1"), ("v6e-8", 8, "v6e:2x4"), ("v5litepod-16", 16, "v5e:4x4"),
    ("v5litepod-32", 32, "v5e:4x8"), ("v6e-256", 256, "v6e:16x16"),
    ("v4-8", 4, "v4:2x2x1"), ("v4-16", 8, "v4:2x2x2"), ("v5p-64", 32, "v5p:2x4x4"),
    ("v5p-128", 64, "v5p:4x4x4"), ("v4-1024", 512, "v4:8x8x8"), ("v5p-384", 192, ""),
])
def test_a_type_names_chips_and_their_topology(name, chips, topology):
  tpu_type = job.parse_tpu_type(name)
  assert (tpu_type.chips, tpu_type.topology) == (chips, topology)


@pytest.mark.parametrize("name", [
    "", "v6e", "v6e-", "v6e-3", "v6e-512", "v6e-016", "v5e-16", "v5p-4", "v4-12", "h100-8",
])
def test_an_unknown_type_is_refused(name):
  with pytest.raises(InputError, match=re.escape(f"--tpu-type = {name!r} is not valid")):
    job.parse_tpu_type(name)


def test_the_command_survives_the_shell():
  path = "gs://b/a 'quoted' $HOME {x} *.jsonl"
  work = parse(*PLACE, SMOKE, ROWS, f"--config.data.path={path}", "--config.seed", "3")
  assert shlex.split(work.command("python")) == [
      "python", "-m", "dense_jax.cli.train", "--config", "experiments/smoke.py",
      "--workdir", "gs://b/run", "--config.train.batch_size=64", f"--config.data.path={path}",
      "--config.seed=3",
  ]


def test_what_is_asked_for_by_name_is_passed_on_once_it_is_known():
  work = parse(*PLACE, SMOKE, ROWS, "--allow-change", "train.steps,optimizer.beta1")
  assert work.arguments[-1] == "--allow-change=train.steps,optimizer.beta1"
  again = parse(*PLACE, SMOKE, ROWS, "--allow-change=train.steps", "--allow-change=optimizer.beta1")
  assert again.arguments == work.arguments
  with pytest.raises(InputError, match=r"--allow-change; did you mean train.steps\?"):
    parse(*PLACE, SMOKE, ROWS, "--allow-change=train.stepz")


def test_an_experiment_is_named_as_workers_find_it(monkeypatch):
  monkeypatch.chdir(ROOT / "experiments")
  work = parse(*PLACE, "--config=smoke.py:debug", ROWS)
  assert work.experiment == "experiments/smoke.py:debug"


def test_each_slice_is_compiled_with_its_part_of_the_batch():
  one = parse(*PLACE, SMOKE, ROWS).compile_command()
  assert "--topology v6e:4x4" in one and one.endswith(ROWS)
  assert parse(*PLACE, SMOKE, ROWS, "--slices=2").compile_command().endswith("batch_size=32")
  assert not parse(*PLACE, SMOKE, "--config.train.batch_size=192",
                   "--tpu-type=v5p-384").compile_command()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--config.modle.x=1"], "did you mean config.model?"),
    (["--config.train.steps=many"], "expected a value of type int"),
    (["--config=experiments/none.py"], "expected an experiment file"),
    (["--tpu-type=v6e-7"], "--tpu-type = 'v6e-7'"),
    (["--slices=0"], "--slices = 0 is not valid: expected an integer >= 1"),
    (["--config.mesh.data=3"], "whose product is 16, the devices"),
    (["--slices=2", "--config.mesh.slices=3"], "expected 0 or 2"),
    (["--config.train.batch_size=24"], "config.train.batch_size = 24"),
    (["--workdir=runs/x"], "--workdir = 'runs/x' is not valid: expected gs://BUCKET/..."),
    (["--workdir=gs://bucket"], "expected gs://BUCKET/..."),
    (["--config.data.path=pile/*.jsonl"], "expected stdlib, gs://BUCKET/... or an absolute path"),
    (["--config.data.heldout_path=x"], "config.data.heldout_path = 'x'"),
    (["--config.data.tokenizer=llama.model"], "expected train, bytes, gs://BUCKET/..."),
    (["--config.data.path=gs://b/**/x.txt"], "expected a glob without **"),
    (["--config.data.heldout_path=gs://b/**"], "config.data.heldout_path = 'gs://b/**'"),
    (["--config.data.mixture=a=1,b=1"], "config.data.mixture = 'a=1,b=1'"),
    (["--config.data.cache_dir=gs://b/cache"], "expected a local directory"),
    (["--config.eval.tasks=piqa", "--config.eval.data=tasks"], "config.eval.data = 'tasks'"),
    (["--config.eval.tasks=piqa"], "config.eval.data = ''"),
    (["--config.eval.tasks=piqqa", "--config.eval.data=/tasks"], "config.eval.tasks = 'piqqa'"),
    (["--config.watch.profile_from=10"], "expected 0 with a --workdir in a bucket"),
    (["--workdir=gs://b/run[1]"], "--workdir = 'gs://b/run[1]'"),
    (["--config.data.path=/a\nb"], "expected text in one line"),
    (["--env=1A=b"], "--env = '1A=b'"), (["--env=A"], "expected NAME=VALUE"),
    (['--env=A="b"'], "without quotes"), (["--env=A=b\nc"], "in one line"),
])
def test_bad_input_is_named(arguments, message):
  with pytest.raises(InputError, match=re.escape(message)):
    parse(*PLACE, SMOKE, ROWS, *arguments)


def test_an_experiment_that_workers_do_not_have_is_refused(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text((ROOT / "experiments" / "smoke.py").read_text())
  with pytest.raises(InputError, match="expected an experiment below"):
    parse(*PLACE, f"--config={file}", ROWS)


def test_paths_that_all_workers_have_are_accepted():
  work = parse(*PLACE, SMOKE, ROWS, "--config.data.path=/mnt/pile/*.txt",
               "--config.data.tokenizer=gs://b/llama.model", "--config.data.mixture=a=1,b=1",
               "--config.eval.tasks=piqa", "--config.eval.data=gs://b/tasks", "--env=A=b c",
               "--env=B=")
  assert work.environment == {"A": "b c", "B": ""}
