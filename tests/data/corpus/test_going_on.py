"""A job of `prepare` that failed, was killed or met a full disk goes on; another job is refused."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from dense_jax.data.corpus.files import read_groups
from dense_jax.errors import InputError
from tests.data.corpus.texts import DOCUMENTS, files_of, lines, run, write_corpus
from tests.helpers import ROOT


@pytest.mark.parametrize("options", [[], ["--deduplicate"]])
def test_a_job_that_failed_goes_on_and_ends_the_same(tmp_path, monkeypatch, options):
  """It fails at every group once; each time the same command goes on."""
  text = write_corpus(tmp_path / "text")
  (text / "d.jsonl").write_bytes(lines(DOCUMENTS[30:50]))
  monkeypatch.setattr("dense_jax.data.corpus.files._GROUP_DOCUMENTS", 11)
  options = [*options, "--heldout-every", "4"]
  run(text, tmp_path / "whole", *options)
  failures = 0
  for moment in range(1, 40):
    calls = 0

    def groups(*arguments, moment=moment):
      nonlocal calls
      for group in read_groups(*arguments):
        calls += 1
        if calls == moment:
          raise KeyboardInterrupt
        yield group

    monkeypatch.setattr("dense_jax.data.corpus.job.read_groups", groups)
    with contextlib.suppress(KeyboardInterrupt):
      run(text, tmp_path / "broken", *options)
      break
    failures += 1
  assert failures >= 4
  whole, broken = files_of(tmp_path / "whole"), files_of(tmp_path / "broken")
  assert whole.keys() == broken.keys()
  assert [name for name in whole if whole[name] != broken[name]] == []


@pytest.mark.slow
def test_a_killed_job_goes_on_and_ends_the_same(tmp_path):
  text = tmp_path / "text"
  text.mkdir()
  for number in range(8):
    (text / f"{number:02d}.jsonl").write_bytes(
        lines([f"{number} {document}" * 60 for document in DOCUMENTS])
    )

  def start(output):
    return subprocess.Popen(
        [sys.executable, "-m", "dense_jax.cli.prepare", "--input", str(text), "--output",
         str(tmp_path / output), "--tokenizer", "bytes", "--workers", "2", "--deduplicate"],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True,
    )

  whole = start("whole")
  assert "train with" in whole.communicate(timeout=300)[0] and not whole.returncode
  kills = 0
  for _ in range(60):
    process = start("killed")
    results = tmp_path / "killed/files"
    before = len([*results.glob("*.json")]) if results.is_dir() else 0
    while process.poll() is None:
      if results.is_dir() and len([*results.glob("*.json")]) > before:
        process.send_signal(signal.SIGKILL)
        break
      time.sleep(0.001)
    process.communicate()
    if process.returncode == 0:
      break
    kills += 1
  assert process.returncode == 0 and kills >= 3
  assert files_of(tmp_path / "whole") == files_of(tmp_path / "killed")


def test_another_job_in_the_folder_is_refused(tmp_path):
  text = write_corpus(tmp_path / "text")
  run(text, tmp_path / "out", "--heldout-every", "4")
  before = files_of(tmp_path / "out")
  run(text, tmp_path / "out", "--heldout-every", "4")  # There is nothing left to do.
  for options, what in ((["--heldout-every", "5"], "settings"), (["--deduplicate"], "settings")):
    with pytest.raises(InputError, match=rf"^--output = .* others are: {what}"):
      run(text, tmp_path / "out", *options)
  (text / "d.jsonl").write_bytes(lines(["more"]))
  with pytest.raises(InputError, match=r"^--output = .* others are: files"):
    run(text, tmp_path / "out", "--heldout-every", "4")
  assert files_of(tmp_path / "out") == before
  with pytest.raises(InputError, match=r"^--output = .* it holds a\.jsonl"):
    run(text, text)


@pytest.mark.parametrize("is_finished", [False, True])
def test_an_input_that_changes_is_refused(tmp_path, is_finished):
  text = write_corpus(tmp_path / "text")
  run(text, tmp_path / "out", "--heldout-every", "4")
  if not is_finished:
    (tmp_path / "out/manifest.json").unlink()
  (text / "a.jsonl").write_bytes(lines(DOCUMENTS[:39]))
  with pytest.raises(InputError, match=r"--input = 'a\.jsonl' .* as it was when it was prepared"):
    run(text, tmp_path / "out", "--heldout-every", "4")
  # As the message says.
  (tmp_path / "out/files/000000.json").unlink()
  run(text, tmp_path / "out", "--heldout-every", "4")
  run(text, tmp_path / "fresh", "--heldout-every", "4")
  assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_what_follows_a_file_that_is_done_again_is_done_again(tmp_path, monkeypatch):
  """With --deduplicate; also where the job fails between the two."""
  text = tmp_path / "text"
  text.mkdir()
  for name in ("a", "b"):
    (text / f"{name}.jsonl").write_bytes(lines([f"{name} {n}" for n in range(40)] + ["shared"]))
  options = ["--deduplicate", "--heldout-every", "4"]
  run(text, tmp_path / "out", *options)
  (text / "a.jsonl").write_bytes(lines([f"a {n}" for n in range(40)]))
  (tmp_path / "out/files/000000.json").unlink()

  def fails_at_b(file, *rest):
    if file.name == "b.jsonl":
      raise KeyboardInterrupt
    yield from read_groups(file, *rest)

  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    patched.setattr("dense_jax.data.corpus.job.read_groups", fails_at_b)
    run(text, tmp_path / "out", *options)
  run(text, tmp_path / "out", *options)
  run(text, tmp_path / "fresh", *options)
  assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


class FullBase:
  """A connection to a database whose disk is full after a few documents."""

  def __init__(self):
    self._left = 20

  def execute(self, *_):
    self._left -= 1
    if not self._left:
      raise sqlite3.OperationalError("disk I/O error")
    return self

  rowcount = 1

  def close(self):
    pass


def test_a_full_disk_is_named(tmp_path, monkeypatch):
  text = write_corpus(tmp_path / "text")
  run(text, tmp_path / "whole", "--heldout-every", "4")

  def full(*_):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patched:
    patched.setattr("dense_jax.data.corpus.shards.ShardWriter.add", full)
    with pytest.raises(InputError, match=r"^--output = .*No space left on device\)\. What is done"):
      run(text, tmp_path / "out", "--heldout-every", "4")
  assert not [*(tmp_path / "out").rglob("*.partial")]
  with monkeypatch.context() as patched:  # Where documents are remembered, sqlite writes.
    patched.setattr("dense_jax.data.corpus.seen.sqlite3.connect", lambda *_, **__: FullBase())
    with pytest.raises(InputError, match=r"^--output = .*disk I/O error\)\. What is done"):
      run(text, tmp_path / "same", "--heldout-every", "4", "--deduplicate")
  run(text, tmp_path / "out", "--heldout-every", "4")
  assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
