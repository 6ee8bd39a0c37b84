"""Text in a bucket: hidden names are skipped, and digests are cached by size and time."""

import pathlib

import pytest
from etils.epath import gpath, stat_utils

from dense_jax import files
from dense_jax.data import digests, sources
from tests.test_files import Buckets


class TimedBuckets(Buckets):
  """A file system whose files look like those of a bucket, with sizes and times."""

  time = 1_600_000_000

  def stat(self, path):
    local = str(path).replace("gs://bucket", str(self.folder))
    return stat_utils.StatResult(
        is_directory=False, length=pathlib.Path(local).stat().st_size, mtime=self.time
    )


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  backend = TimedBuckets()
  backend.folder = tmp_path / "bucket"
  monkeypatch.setenv("BUCKETS", str(tmp_path))
  monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", backend)
  monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
  monkeypatch.setattr(files, "_reads_buckets", lambda: True)
  for name in (
      "a.txt", "sub/b.txt", ".x.txt", "._a.txt", "sub/.ipynb_checkpoints/b.txt", ".d/c.txt"
  ):
    (backend.folder / name).parent.mkdir(parents=True, exist_ok=True)
    (backend.folder / name).write_text(name)
  return backend


@pytest.mark.parametrize(("path", "names"), [
    ("", ["a.txt", "sub/b.txt"]), ("*.txt", ["a.txt"]), ("*/*.txt", ["sub/b.txt"]),
    ("sub", ["b.txt"]), (".d", ["c.txt"]), (".d/*.txt", ["c.txt"]),
    (".*.txt", ["._a.txt", ".x.txt"]),
])
def test_hidden_names_are_no_text(bucket, path, names):
  source = sources.find(f"gs://bucket/{path}", "f")
  assert [document.name for document in source] == names
  here = sources.find(str(bucket.folder / path), "f")
  assert [document.text for document in here] == [document.text for document in source]
  assert here.fingerprint == source.fingerprint


def test_digests_are_kept_by_size_and_time(bucket, tmp_path, monkeypatch):
  def fingerprint():
    return sources.find("gs://bucket/*.txt", "f", str(tmp_path / "cache")).fingerprint

  first = fingerprint()
  (bucket.folder / "a.txt").write_text("A.txt")
  assert fingerprint() == first  # Not seen: other contents of equal size and time.
  bucket.time += 1
  assert fingerprint() != first
  monkeypatch.setattr(digests.hashlib, "file_digest", None)
  fingerprint()


def test_buckets_that_tell_no_time_are_hashed(bucket, tmp_path):
  bucket.time = 0
  first = sources.find("gs://bucket", "f", str(tmp_path / "cache")).fingerprint
  (bucket.folder / "a.txt").write_text("A.txt")
  assert sources.find("gs://bucket", "f", str(tmp_path / "cache")).fingerprint != first
