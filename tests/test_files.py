"""Paths in buckets and on this machine go through the same code."""

import errno
import json
import os
import pathlib
import stat
import threading
import time

import pytest
from etils import epath
from etils.epath import backend, gpath

from dense_jax import experiment, files
from dense_jax.config import DataConfig, ExperimentConfig
from dense_jax.data import cache, finding, sources, tokenizer
from dense_jax.errors import InputError
from dense_jax.training import metrics

TEXTS = {"a.txt": "first\n", "b.txt": "second\n", "sub/c.jsonl": '{"text": "third"}\n',
         "sub/readme.md": "no text"}


def _local(path):
  """What stands for a path in the bucket."""
  bucket, _, rest = os.fspath(path).removeprefix("gs://").partition("/")
  return os.path.join(os.environ["BUCKETS"], bucket, rest).rstrip("/")


class Buckets(backend._OsPathBackend):
  """Buckets that are folders. Like real ones, they know no appending."""

  def open(self, path, mode):
    assert "a" not in mode
    return super().open(_local(path), mode)

  def exists(self, path):
    return super().exists(_local(path))

  def isdir(self, path):
    return super().isdir(_local(path))

  def listdir(self, path):
    return ["", *super().listdir(_local(path))]  # A bucket may list a folder in itself.

  def glob(self, path):
    root = os.environ["BUCKETS"]
    return ["gs://" + os.path.relpath(f, root) for f in super().glob(_local(path))]

  def makedirs(self, path, *, exist_ok=False, mode=None):
    super().makedirs(_local(path), exist_ok=exist_ok)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """A folder that is gs://bucket."""
  monkeypatch.setenv("BUCKETS", str(tmp_path))
  monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", Buckets())
  monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
  monkeypatch.setattr(files, "_reads_buckets", lambda: True)
  (tmp_path / "bucket").mkdir()
  return tmp_path / "bucket"


@pytest.fixture(params=["local", "bucket"])
def folder(request, bucket, tmp_path):
  """A new folder, here or in a bucket."""
  path = "gs://bucket/runs/one" if request.param == "bucket" else str(tmp_path / "one")
  made = files.make_path(path, "--workdir")
  made.mkdir(parents=True)
  return made


def test_a_path_in_a_bucket_keeps_its_form(bucket):
  path = files.make_path("gs://bucket/runs/one", "--workdir")
  assert str(path / "config.json") == os.fspath(path / "config.json")
  assert str(path / "config.json") == "gs://bucket/runs/one/config.json"
  assert files.is_remote(path) and files.is_remote(path.parent / "two")
  assert str(pathlib.Path("gs://bucket/x")) == "gs:/bucket/x"  # Why pathlib is not used.
  assert not files.is_remote(files.make_path("runs/one", "--workdir"))


@pytest.mark.parametrize(("path", "message"), [
    ("s3://bucket/x", "--workdir = 's3://bucket/x' is not valid: expected a local path or gs://"),
    ("gs://bucket/x", "gcsfs is missing: pip install -e '.[gcs]'"),
])
def test_what_cannot_be_reached_is_named(monkeypatch, path, message):
  monkeypatch.setattr(files, "_reads_buckets", lambda: False)
  with pytest.raises(InputError) as error:
    files.make_path(path, "--workdir")
  assert message in str(error.value)


@pytest.mark.parametrize("flushes_folders", [True, False])
def test_the_new_name_is_flushed_after_the_content(tmp_path, monkeypatch, flushes_folders):
  file, flushed, flush = tmp_path / "x.json", [], os.fsync

  def fsync(descriptor):
    is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
    flushed.append((is_folder, file.exists()))
    if is_folder and not flushes_folders:
      raise OSError(errno.EINVAL, "Invalid argument")
    flush(descriptor)

  monkeypatch.setattr(os, "fsync", fsync)
  files.write_atomically(file, b"one")
  assert flushed == [(False, False), (True, True)] and file.read_bytes() == b"one"


@pytest.mark.parametrize(("path", "message"), [
    ("a" * 5000, r"^config\.data\.path = 'a{40}\.\.\.a{40}' .* shorter than its 5,000 characters"),
    ("x/" * 2600, r"^config\.data\.path = .*File name too long"),
    ("a\0b", r"^config\.data\.path = .*null"),
])
def test_a_path_that_nothing_can_have_is_named(path, message):
  with pytest.raises(InputError, match=message):
    files.make_path(path, "config.data.path")
  with pytest.raises(InputError, match=message):
    finding.find_files(path, "config.data.path")


def test_writing_whole_files(folder):
  file = folder / "x.json"
  for content in (b"one", b"two"):
    files.write_atomically(file, content)
    assert file.read_bytes() == content
  assert [entry.name for entry in folder.iterdir() if entry != folder] == ["x.json"]


def test_configuration_and_tokenizer(folder):
  config = experiment.resolve(experiment.default_config())
  assert isinstance(config, ExperimentConfig)
  experiment.save(config, folder)
  assert experiment.read(folder) == config
  tokenizer.ByteTokenizer().save(folder / "tokenizer")
  assert tokenizer.load_saved_tokenizer(folder / "tokenizer").vocab_size == 258


class Events:
  """In place of TensorBoard's, which has a library of its own for buckets."""

  def __init__(self, prefix, suffix): ...

  def write_event(self, event): ...

  def flush(self): ...

  def close(self): ...


def test_metrics_go_on_where_a_checkpoint_was(folder, monkeypatch):
  monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter", Events)
  writer = metrics.MetricsWriter(folder, 0)
  for step in (1, 2, 3):
    writer.write(step, {"loss": float(step)})
  writer.flush()
  assert [line["step"] for line in metrics.read_metrics(folder)] == [1, 2, 3]
  writer.close()
  writer = metrics.MetricsWriter(folder, 2)
  writer.write(3, {"loss": 9.0})
  writer.close()
  losses = [line["loss"] for line in metrics.read_metrics(folder)]
  assert losses == [1.0, 2.0, 9.0]


def test_metrics_in_a_bucket_are_written_now_and_then(bucket, monkeypatch):
  monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter", Events)
  monkeypatch.setattr(metrics, "_UPLOAD_SECONDS", 0.0)
  folder = files.make_path("gs://bucket/run", "--workdir")
  folder.mkdir(parents=True)
  writer = metrics.MetricsWriter(folder, 0)
  writer.write(1, {"loss": 1.0})
  assert json.loads((bucket / "run" / "metrics.jsonl").read_text()) == {"step": 1, "loss": 1.0}


def test_a_process_that_does_not_write_leaves_nothing(tmp_path):
  writer = metrics.MetricsWriter(epath.Path(tmp_path), 0, enabled=False)
  writer.write(1, {"loss": 1.0})
  writer.flush()
  writer.close()
  assert not list(tmp_path.iterdir())


@pytest.fixture
def texts(bucket, tmp_path):
  for root in (bucket / "text", tmp_path / "text"):
    for name, content in TEXTS.items():
      (root / name).parent.mkdir(parents=True, exist_ok=True)
      (root / name).write_text(content)
  return tmp_path


@pytest.mark.parametrize("path", ["text", "text/*.txt", "text/a.txt", "text/[ab].txt"])
def test_text_in_a_bucket_is_the_text_of_the_same_folder(texts, path):
  here = sources.find(str(texts / path), "config.data.path")
  there = sources.find(f"gs://bucket/{path}", "config.data.path")
  assert list(there) == list(here) and len(list(here)) >= 1
  assert there.fingerprint == here.fingerprint


@pytest.mark.parametrize(("path", "message"), [
    ("gs://bucket/none", "no such file was found"),
    ("gs://bucket/text/**/*.jsonl", "a glob without **"),
    ("gs://bucket/text/sub/*.md", "readme.md has another suffix"),
])
def test_bad_text_in_a_bucket_is_named(texts, path, message):
  with pytest.raises(InputError) as error:
    sources.find(path, "config.data.path")
  assert message in str(error.value) and path in str(error.value)


def test_heldout_text_that_is_trained_on(texts):
  config = DataConfig(path="gs://bucket/text", heldout_path="gs://bucket/text/*.txt")
  with pytest.raises(InputError, match=r"as gs://bucket/text/a\.txt is"):
    sources.split(config)


def test_the_cache_is_local():
  with pytest.raises(InputError, match=r"config\.data\.cache_dir = 'gs://x/y' is not valid"):
    cache.cache_folder("gs://x/y", "tokens")


def test_a_file_is_changed_by_one_at_a_time(tmp_path):
  file = tmp_path / "count"
  file.write_text("0")

  def count():
    for _ in range(50):
      with files.locked(file):
        before = int(file.read_text())
        time.sleep(1e-5)
        file.write_text(str(before + 1))

  threads = [threading.Thread(target=count) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert file.read_text() == "200" and os.listdir(tmp_path) == ["count"]


@pytest.mark.parametrize(("paths", "found"), [
    ([], []),
    (["a/b"], ["b"]),
    (["a/b", "./a/b/", "c/d"], ["b", "b", "d"]),
    (["a/base/seed0", "a/dense/seed0"], ["base/seed0", "dense/seed0"]),
    (["gs://one/run", "gs://two/run/", "run"], ["one/run", "two/run", "{folder}/run"]),
])
def test_endings_tell_paths_apart(paths, found, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert files.endings(paths) == [each.format(folder=tmp_path.name) for each in found]
