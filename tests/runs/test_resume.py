"""Changes of configuration on resume: each key has one class, each refusal says what to do."""

import dataclasses
import re

import numpy as np
import pytest

from dense_jax import experiment
from dense_jax.config import ExperimentConfig
from dense_jax.errors import InputError
from dense_jax.models.registry import FAMILIES
from dense_jax.runs import resume
from dense_jax.runs.resume import CHANGES, Change, check, classify
from dense_jax.training.optimizer import learning_rate
from tests.builders import model_config

SCHEDULES = ("cosine", "polynomial", "wsd", "constant")


def config(steps=100, family="mamba", **groups):
  """Returns a configuration with these values in its groups."""
  base = ExperimentConfig(model=model_config(family))
  groups["train"] = {"steps": steps, **groups.get("train", {})}
  return dataclasses.replace(base, **{
      group: dataclasses.replace(getattr(base, group), **values)
      for group, values in groups.items()
  })


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_has_exactly_one_class(family):
  keys = resume.keys(config(family=family))
  assert {classify(key) for key in keys} == set(Change)
  assert all(classify(f"config.{key}") is classify(key) for key in keys)
  mixer = [key for key in keys if key.startswith("model.mixer.")]
  assert mixer and {classify(key) for key in mixer} == {Change.NEVER}


def test_every_row_is_about_some_key():
  keys = resume.keys(config())
  for pattern in CHANGES:
    assert any(re.fullmatch(pattern, key) for key in keys), pattern


@pytest.mark.parametrize("key", ["model.new", "train.new", "new", "seed.new", "steps"])
def test_a_key_without_a_row_is_an_error_that_names_it(key):
  with pytest.raises(ValueError, match=f"key {key} matches 0 rows"):
    classify(key)


@pytest.mark.parametrize("changes", [
    {"model": {"implementation": "recurrent", "chunk": 2, "remat": "full", "block_layers": 2}},
    {"mesh": {"data": 1, "fsdp": -1}}, {"data": {"cache_dir": "elsewhere", "path": "there"}},
    {"train": {"accumulate": 2, "loss_chunk": 8, "log_every": 1, "eval_every": 3,
               "eval_batches": 0, "checkpoint_every": 5, "keep_last": 9, "keep_best": 0}},
])
def test_what_changes_freely(changes):
  check(config(), config(**changes), 50)


@pytest.mark.parametrize(("before", "now"), [
    *(({"schedule": name}, {"schedule": name, "schedule_steps": 100}) for name in SCHEDULES),
    ({"schedule_steps": 70}, {"schedule_steps": 70}),
    ({"schedule_steps": 300}, {"schedule_steps": 300}),
    ({"schedule": "constant", "warmup_fraction": 0.0}, {"schedule": "constant",
                                                        "warmup_fraction": 0.0}),
    # Both are past their warm-up.
    ({"schedule": "constant", "warmup_fraction": 0.1}, {"schedule": "constant",
                                                        "warmup_fraction": 0.1}),
])
@pytest.mark.parametrize("steps", [60, 100, 200, 1000])
def test_steps_change_freely_where_no_learning_rate_does(before, now, steps):
  """Compared also by the rates themselves, from the saved step on."""
  step = 100 if steps > 100 else 60
  first, second = config(optimizer=before), config(steps, optimizer=now)
  if second.optimizer.schedule == "constant" and steps == 1000:
    second = config(500, optimizer=now)  # Of 1,000 steps the warm-up would not be over.
  check(first, second, step)
  rates = [
      learning_rate(c.optimizer, c.train.steps)(np.arange(step, step + 1000))
      * np.ones(1000, np.float32)
      for c in (first, second)
  ]
  np.testing.assert_array_equal(*rates)


@pytest.mark.parametrize(("before", "now", "steps", "key"), [
    *(({"schedule": name}, {"schedule": name}, 200, "train.steps") for name in SCHEDULES[:3]),
    ({}, {}, 90, "train.steps"),
    ({"schedule": "constant", "warmup_fraction": 0.7},
     {"schedule": "constant", "warmup_fraction": 0.7}, 200, "train.steps"),
    ({}, {"schedule_steps": 150}, 200, "optimizer.schedule_steps"),
    ({}, {"schedule_steps": 150}, 100, "optimizer.schedule_steps"),
    ({"schedule_steps": 100}, {}, 200, "optimizer.schedule_steps"),
    ({"schedule_steps": 100}, {"schedule_steps": 70}, 100, "optimizer.schedule_steps"),
    ({}, {"schedule": "wsd"}, 100, "optimizer.schedule"),
    ({}, {"clip_norm": 0.0}, 100, "optimizer.clip_norm"),
    ({}, {"second_moment_dtype": "bfloat16"}, 100, "optimizer.second_moment_dtype"),
])
def test_another_course_is_refused_unless_it_is_asked_for(before, now, steps, key):
  first, second = config(optimizer=before), config(steps, optimizer=now)
  with pytest.raises(InputError) as error:
    check(first, second, 70)
  old, new = resume.keys(first)[key], resume.keys(second)[key]
  lines = str(error.value).splitlines()
  assert lines[1:-1] == [f"  config.{key}: the run has {old!r}, now {new!r}"]
  assert f"Add --allow-change {key} to change them" in lines[-1]
  for name in (key, f"config.{key}"):
    check(first, second, 70, [name])


def test_the_refusal_names_all_keys_and_the_whole_flag():
  now = config(200, optimizer={"learning_rate": 0.5, "beta1": 0.5}, train={"z_loss": 0.1})
  with pytest.raises(InputError) as error:
    check(config(), now, 70, ["optimizer.beta1"])
  text = str(error.value)
  assert "config.optimizer.learning_rate: the run has 0.001, now 0.5" in text
  assert "config.train.z_loss: the run has 0.0, now 0.1" in text
  assert "config.optimizer.beta1" not in text
  flag, names = re.search(r"(--allow-change) (\S+)", text).groups()
  assert flag == resume.FLAG
  assert "With --config.optimizer.schedule_steps=100 the schedule stays as it is" in text
  check(config(), now, 70, names.split(","))


@pytest.mark.parametrize(("name", "message"), [
    ("train.step", "unknown key train.step of --allow-change; did you mean train.steps?"),
    ("config.optimizer.lerning_rate", "did you mean optimizer.learning_rate?"),
    ("", "unknown key"), ("optimizer", "unknown key optimizer of --allow-change"),
    ("model.width", "--allow-change = 'model.width' is not valid: expected a key that may change"),
    ("config.model.mixer.state_size", "this one never does"), ("seed", "this one never does"),
    ("train.log_every", "this one changes freely, without it"),
])
def test_names_that_cannot_be_asked_for(name, message):
  with pytest.raises(InputError, match=re.escape(message)):
    check(config(), config(), 70, [name])
  with pytest.raises(InputError, match=re.escape(message)):
    resume.check_allowed(config(), [name])


def test_a_key_that_was_changed_already_may_still_be_named():
  """Repeating a command resumes the run that it changed."""
  check(config(200), config(200), 70, ["train.steps", "optimizer.learning_rate"])


@pytest.mark.parametrize(("now", "message"), [
    ({"data": {"seq_len": 7}}, "config.data.seq_len: the run has 256, now 7"),
    ({"model": {"dtype": "bfloat16"}}, "config.model.dtype: the run has 'float32', now 'bfloat16'"),
    ({"train": {"batch_size": 4}}, "config.train.batch_size = 4 is not valid: expected 8, with"),
    ({"train": {"steps": 60}}, "config.train.steps = 60 is not valid: expected an integer >= 70"),
])
def test_what_never_changes(now, message):
  with pytest.raises(InputError, match=re.escape(message)):
    check(config(), config(**now), 70, ["train.steps"])


def test_all_that_never_changes_is_named_at_once():
  now = dataclasses.replace(config(model={"width": 8}, train={"batch_size": 4}), seed=3)
  with pytest.raises(InputError) as error:
    check(config(), now, 70)
  lines = str(error.value).splitlines()
  assert [line.partition(":")[0].strip() for line in lines[1:-1]] == [
      "config.model.width", "config.seed", "config.train.batch_size"
  ]
  assert "Give the same values to go on with it, or another --workdir." in lines[-1]


def test_the_tokenizers_vocabulary_is_the_runs():
  before = config()
  now = dataclasses.replace(before, model=dataclasses.replace(before.model, vocab_size=0))
  check(before, now, 70)


def test_another_family_is_named_with_its_options(tmp_path):
  before = experiment.load("experiments/smoke.py:debug")
  now = experiment.load("experiments/smoke.py:debug", [("model.family", "gau_retnet")])
  with pytest.raises(InputError, match=r"config.model.family: the run has 'mamba', now 'gau_ret"):
    check(before, now, 1)
