"""The data cache: leftovers of killed writers, concurrent writers, full disks."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest

from dense_jax.config import DataConfig
from dense_jax.data import cache, digests, packing, pipeline, sources, tokenizer
from dense_jax.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = "".join(f"{n}: a line of words, {n * n}, {n**3} and others\n" for n in range(99))

# Makes an entry of the cache and pauses in the middle, until it is killed or told to go on.
WRITER = """
import sys
from dense_jax.data import packing, sources, tokenizer
from dense_jax.config import DataConfig

def stop(*_):
  print("in the middle", flush=True)
  sys.stdin.readline()

config = DataConfig(path=sys.argv[1], cache_dir=sys.argv[2], vocab_size=300)
source = sources.find(config.path, "config.data.path", config.cache_dir)
if sys.argv[3] == "tokens":
  packing.build_store(source, tokenizer.ByteTokenizer(), config.cache_dir, stop)
else:
  tokenizer.train_sentencepiece = stop
  tokenizer.load_tokenizer(config, source)
"""


@pytest.fixture
def text(tmp_path):
  (tmp_path / "text").mkdir()
  (tmp_path / "text" / "a.txt").write_text(TEXT)
  return tmp_path / "text"


@pytest.fixture
def start(tmp_path, text):
  """Returns a function that starts a writer of tokens or tokenizers, and waits for its pause."""
  started = []

  def started_writer(kind):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(text), str(tmp_path / "cache"), kind], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    started.append(writer)
    assert writer.stdout.readline() == "in the middle\n"
    return writer

  yield started_writer
  for writer in started:
    writer.kill()
    writer.communicate()


def _make(tmp_path, text, kind):
  """Makes the same entry in this process, completely."""
  config = DataConfig(path=str(text), cache_dir=str(tmp_path / "cache"), vocab_size=300)
  source = sources.find(config.path, "config.data.path", config.cache_dir)
  if kind == "tokens":
    packing.build_store(source, tokenizer.ByteTokenizer(), config.cache_dir)
  else:
    tokenizer.load_tokenizer(config, source)


def _left(tmp_path, kind):
  return [path for path in (tmp_path / "cache" / kind).iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["tokens", "tokenizers"])
def test_what_a_killed_writer_left_is_removed_and_no_living_ones(tmp_path, text, start, kind):
  killed, living = start(kind), start(kind)
  assert len(_left(tmp_path, kind)) == 2
  killed.kill()
  killed.wait()
  os.utime(_left(tmp_path, kind)[0], (0, 0))  # Age must not matter.
  os.utime(_left(tmp_path, kind)[1], (0, 0))
  _make(tmp_path, text, kind)
  assert len(_left(tmp_path, kind)) == 1
  if kind == "tokens":
    _, errors = living.communicate("go on\n")
    assert living.returncode == 0, errors
  else:
    living.kill()
    living.wait()
    with cache.partial_folder(str(tmp_path / "cache"), kind, "x"):
      pass
  assert not _left(tmp_path, kind)


def test_a_writer_that_dies_meanwhile_is_tidied_up_at_the_end(tmp_path, text, start):
  writer = start("tokens")
  with cache.partial_folder(str(tmp_path / "cache"), "tokens", "other"):
    writer.kill()
    writer.wait()
    assert len(_left(tmp_path, "tokens")) == 2
  assert not _left(tmp_path, "tokens")


def test_leftovers_without_a_lock_are_removed(tmp_path):
  """A writer killed between making the folder and the lock leaves such folders."""
  folder = tmp_path / "tokens"
  (folder / ".a.0.partial" / "store").mkdir(parents=True)
  (folder / ".b.model.0.partial").write_text("half a model")
  (folder / "c.partial").write_text("not ours")
  (folder / ".d").write_text("not ours")
  with cache.partial_folder(str(tmp_path), "tokens", "x") as partial:
    assert sorted(folder.iterdir()) == sorted([partial, folder / "c.partial", folder / ".d"])
  assert sorted(path.name for path in folder.iterdir()) == [".d", "c.partial"]


def test_where_a_file_system_has_no_locks_nothing_is_removed(tmp_path, text, monkeypatch):
  def refuse(*_):
    raise OSError(errno.ENOTSUP, "not supported")

  monkeypatch.setattr("fcntl.flock", refuse)
  (tmp_path / "cache" / "tokens" / ".a.0.partial").mkdir(parents=True)
  _make(tmp_path, text, "tokens")
  assert [path.name for path in _left(tmp_path, "tokens")] == [".a.0.partial"]


def test_what_progress_runs_into_is_not_the_caches_fault(tmp_path, text):
  def closed(done):
    raise BrokenPipeError(errno.EPIPE, "Broken pipe")

  source = sources.find(str(text), "config.data.path")
  with pytest.raises(BrokenPipeError):
    packing.build_store(source, tokenizer.ByteTokenizer(), str(tmp_path / "cache"), closed)
  assert not list((tmp_path / "cache" / "tokens").iterdir())


def test_a_signal_leaves_nothing(tmp_path, text):
  script = "import signal\n" + textwrap.dedent("""
      def heard(*_): raise KeyboardInterrupt
      signal.signal(signal.SIGTERM, heard)
  """) + WRITER
  writer = subprocess.Popen(
      [sys.executable, "-c", script, str(text), str(tmp_path / "cache"), "tokens"], cwd=ROOT,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )
  assert writer.stdout.readline() == "in the middle\n"
  writer.send_signal(signal.SIGTERM)
  _, errors = writer.communicate(timeout=60)
  assert "KeyboardInterrupt" in errors
  assert not list((tmp_path / "cache" / "tokens").iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("kind", ["tokens", "tokenizers"])
def test_a_disk_that_refuses_is_named(tmp_path, text, monkeypatch, kind, number):
  def refuse(*_):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(os, "fsync", refuse)
  with pytest.raises(InputError) as error:
    _make(tmp_path, text, kind)
  assert str(error.value).startswith("config.data.cache_dir = ")
  assert os.strerror(number) in str(error.value)
  assert not list((tmp_path / "cache" / kind).iterdir())


def test_digests_on_a_full_disk(tmp_path, text, monkeypatch):
  os.utime(text / "a.txt", (0, 0))
  plain = pathlib.Path.open

  def opened(path, mode="r", **values):
    if path.suffix == ".digests" and "a" in mode:
      raise OSError(refusal, os.strerror(refusal))
    return plain(path, mode, **values)

  monkeypatch.setattr(pathlib.Path, "open", opened)
  refusal = errno.ENOSPC
  with pytest.raises(InputError, match=r"config\.data\.cache_dir = .*No space left"):
    digests.digest_files([text / "a.txt"], "f", str(tmp_path / "cache"))
  refusal = errno.EROFS  # A read-only cache can still be used.
  assert digests.digest_files([text / "a.txt"], "f", str(tmp_path / "cache"))[0].size == len(TEXT)


def test_a_cache_inside_the_text(text):
  """The files of a cache inside a folder of text are not taken for text."""
  config = DataConfig(path=str(text), tokenizer="train", vocab_size=300,
                      cache_dir=str(text / "cache"))
  os.utime(text / "a.txt", (0, 0))
  first = pipeline.load_datasets(config)
  assert pipeline.load_datasets(config).fingerprint == first.fingerprint
  assert [file.name for file in first.sources[0].files] == ["a.txt"]


def test_deep_json_in_a_store_is_no_store(tmp_path, text):
  _make(tmp_path, text, "tokens")
  (store,) = (tmp_path / "cache" / "tokens").iterdir()
  for meta in ("[" * 100_000, "[]", '{"tokens": 1e999}', json.dumps({"dtype": "<u2"})):
    (store / "meta.json").write_text(meta)
    _make(tmp_path, text, "tokens")
    assert json.loads((store / "meta.json").read_text())["documents"] == 1
