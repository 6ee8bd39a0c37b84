"""Places for results: refused before work is done, and nothing left where they were tried."""

import json
import math
import os
import pathlib

import pytest

from dense_jax.errors import InputError
from dense_jax.outputs import check_destination, check_file, check_folder, write_json


@pytest.fixture
def here(tmp_path, monkeypatch):
  """The current folder, which is the home directory too, with things in it."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "file").write_text("text")
  (tmp_path / "empty").mkdir()
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "thing").touch()
  (tmp_path / "loop").symlink_to("loop")
  (tmp_path / "to_file").symlink_to("file")
  (tmp_path / "to_empty").symlink_to("empty")
  return tmp_path


def _tree(folder):
  return sorted(os.path.relpath(path, folder) for path in pathlib.Path(folder).rglob("*"))


@pytest.mark.parametrize(("path", "place"), [
    ("new.json", "new.json"), ("a/deep/new.json", "a/deep/new.json"), ("file", "file"),
    ("~/new.json", "new.json"), ("~/a/new.json", "a/new.json"), ("to_file", "file"),
    ("a/../new.json", "new.json"), ("to_empty/new.json", "empty/new.json"),
])
def test_a_file_that_can_be_written(here, path, place):
  before = _tree(here)
  file = check_file(path, "--json")
  assert _tree(here) == before
  write_json(file, {"a": 1}, "--json")
  assert json.loads((here / place).read_text()) == {"a": 1}
  assert (here / "to_file").is_symlink()
  assert len([entry for entry in _tree(here) if "partial" in entry]) == 0


@pytest.mark.parametrize("path", [
    "", "  ", "full", "empty", "empty/", "new/", "file/new.json", "file/a/new.json", "/", "..",
    "loop", "loop/new.json", "to_empty", "/proc/new.json", "/proc/a/new.json", "/dev/null",
    "/dev/full", "~nobody_of_that_name/new.json", "s3://bucket/new.json", "nul\0byte",
])
def test_a_file_that_cannot_be_written_is_named(here, path):
  before = _tree(here)
  with pytest.raises(InputError) as error:
    check_file(path, "--json")
  assert f"--json = {path!r} is not valid: " in str(error.value)
  assert _tree(here) == before


@pytest.mark.parametrize(("path", "place"), [
    ("new", "new"), ("a/deep/new", "a/deep/new"), ("new/", "new"), ("empty", "empty"),
    ("to_empty", "empty"), ("~/new", "new"), ("~", None),
])
def test_a_folder_that_can_be_made(here, path, place):
  before = _tree(here)
  if place is None:  # The home directory is not empty.
    with pytest.raises(InputError, match="is empty or does not exist yet"):
      check_destination(path, "--output")
  else:
    assert check_destination(path, "--output") == (here / place).resolve()
  assert _tree(here) == before


@pytest.mark.parametrize("path", [
    "", "file", "full", "to_file", "file/new", "/proc/new", "/proc", "loop", "gs://bucket/new",
])
def test_a_folder_that_cannot_be_made_is_named(here, path, monkeypatch):
  monkeypatch.setattr("dense_jax.files._reads_buckets", lambda: True)
  before = _tree(here)
  with pytest.raises(InputError) as error:
    check_destination(path, "--output")
  assert f"--output = {path!r} is not valid: expected a " in str(error.value)
  assert _tree(here) == before


@pytest.mark.parametrize("path", ["new", "a/deep/new", "full", "empty", "to_empty", "~/new"])
def test_a_folder_that_can_be_written(here, path):
  before = _tree(here)
  assert str(check_folder(path, "--output")) == os.path.expanduser(path)
  assert _tree(here) == before


@pytest.mark.parametrize("path", ["", "file", "to_file", "file/new", "/proc/new", "loop"])
def test_a_folder_that_cannot_be_written_is_named(here, path):
  before = _tree(here)
  with pytest.raises(InputError) as error:
    check_folder(path, "--output")
  assert f"--output = {path!r} is not valid: expected a " in str(error.value)
  assert _tree(here) == before


def test_what_the_file_system_says_is_told(here, monkeypatch):
  def full(*args):
    raise OSError(28, "No space left on device")

  file = check_file("new/figures.json", "--json")
  monkeypatch.setattr(os, "fsync", full)
  message = r"^--json = .*No space left on device"
  with pytest.raises(InputError, match=message):
    check_file("new/figures.json", "--json")
  with pytest.raises(InputError, match=message):
    write_json(file, 1, "--json")
  assert not list(here.glob("**/*figures*"))


def test_json_has_null_for_what_is_not_finite(here):
  content = {"a": math.nan, "b": [math.inf, -math.inf, 1.5, 3, True, None], "c": {"d": (1e308,)},
             "e": "NaN"}
  write_json(check_file("x.json", "--json"), content, "--json")
  text = (here / "x.json").read_text()

  def refuse(token):
    raise AssertionError(token)

  assert json.loads(text, parse_constant=refuse) == {
      "a": None, "b": [None, None, 1.5, 3, True, None], "c": {"d": [1e308]}, "e": "NaN"}
