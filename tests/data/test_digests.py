"""Fingerprints of whole contents, and the cache of digests."""

import os
import pathlib
import time

import pytest

from dense_jax.config import DataConfig
from dense_jax.data import digests, pipeline, sources
from dense_jax.errors import InputError


@pytest.fixture
def hashed(monkeypatch):
  """A list to which the name of each file is added when it is hashed."""
  names = []
  plain = digests.hashlib.file_digest

  def counting(handle, kind):
    names.append(os.path.basename(handle.name))
    return plain(handle, kind)

  monkeypatch.setattr(digests.hashlib, "file_digest", counting)
  return names


def _write(file, content, age=60.0):
  """Writes a file whose modification time is `age` seconds ago."""
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(content)
  os.utime(file, ns=(time.time_ns(), time.time_ns() - int(age * 1e9)))


def _fingerprint(tmp_path, path=None) -> str:
  return sources.find(str(path or tmp_path / "text"), "f", str(tmp_path / "cache")).fingerprint


def test_a_file_is_hashed_once(tmp_path, hashed):
  _write(tmp_path / "text" / "a.txt", "a")
  _write(tmp_path / "text" / "sub" / "b.txt", "b")
  first = _fingerprint(tmp_path)
  assert hashed == ["a.txt", "b.txt"]
  assert _fingerprint(tmp_path) == _fingerprint(tmp_path, f"{tmp_path}/text/**/*.txt") == first
  _write(tmp_path / "text" / "c.txt", "c")  # One more file, and one that changed.
  _write(tmp_path / "text" / "sub" / "b.txt", "B", age=50.0)
  assert _fingerprint(tmp_path) != first
  assert hashed == ["a.txt", "b.txt", "c.txt", "b.txt"]
  (tmp_path / "link").symlink_to(tmp_path / "text")
  _fingerprint(tmp_path, tmp_path / "link")
  assert len(hashed) == 4


def test_a_file_that_may_change_unseen_is_hashed_again(tmp_path, hashed):
  """Within a tick of the file system's clock, contents can change and the times stay the same."""
  file = tmp_path / "text" / "a.txt"
  for age in (0.0, 1.5, -3600.0):
    _write(file, "first", age)
    before, times = _fingerprint(tmp_path), os.stat(file)
    file.write_text("other")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert _fingerprint(tmp_path) != before
  assert len(hashed) == 6


def test_an_edit_that_hides_its_time_is_seen(tmp_path):
  file = tmp_path / "text" / "a.txt"
  _write(file, "first")
  before, times = _fingerprint(tmp_path), os.stat(file)
  time.sleep(0.02)  # Longer than a tick, so that the inode's change time differs.
  file.write_text("other")
  os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
  assert _fingerprint(tmp_path) != before


@pytest.mark.parametrize("place", [0, 65_535, 65_536, 100_000, 199_999])
def test_an_edit_anywhere_is_other_text(tmp_path, place):
  text = "x" * 200_000
  _write(tmp_path / "text" / "a.txt", text)
  before = _fingerprint(tmp_path)
  _write(tmp_path / "text" / "a.txt", text[:place] + "y" + text[place + 1 :], age=30.0)
  assert _fingerprint(tmp_path) != before


def test_names_and_folders_do_not_matter_but_order_and_kind_do(tmp_path):
  def fingerprint(**files):
    folder = tmp_path / str(time.time_ns())
    for name, content in files.items():
      _write(folder / name.replace("_", ".").replace("SUB", "sub/"), content)
    return _fingerprint(tmp_path, folder)

  same = fingerprint(a_txt="1", b_txt="2")
  assert same == fingerprint(x_txt="1", y_txt="2") == fingerprint(SUBa_txt="1", z_txt="2")
  assert same != fingerprint(a_txt="2", b_txt="1")
  assert same != fingerprint(a_txt="12") != fingerprint(a_txt="1", b_txt="2", c_txt="")
  assert fingerprint(a_txt='{"text": "a"}') != fingerprint(a_jsonl='{"text": "a"}')


@pytest.mark.parametrize("damage", [
    lambda content: content[:-30],
    lambda content: b"",
    lambda content: b"\xff\0" * 100,
    lambda content: content.replace(b"a.txt", b"b.txt"),
    lambda content: b"\n[]\n{}\n[1, 2, 3, 4]\n" + b"[" * 9999 + b"\n[\"a.txt\", 7, \"0\", \"0\"]",
    lambda content: content[:60] + b"0000" + content[64:],
])
def test_damage_costs_a_second_look(tmp_path, hashed, damage):
  for name in "ab":
    _write(tmp_path / "text" / f"{name}.txt", name)
  first = _fingerprint(tmp_path)
  (kept,) = (tmp_path / "cache" / "digests").iterdir()
  kept.write_bytes(damage(kept.read_bytes()))
  assert _fingerprint(tmp_path) == first
  assert len(hashed) > 2
  count = len(hashed)  # The digests written after the damage are valid.
  assert _fingerprint(tmp_path) == first and len(hashed) == count


def test_text_that_changes_while_it_is_read_is_named(tmp_path):
  for name in "ab":
    _write(tmp_path / f"{name}.txt", "line\n" * 100)
  config = DataConfig(path=str(tmp_path), tokenizer="bytes", cache_dir=str(tmp_path / "cache"),
                      heldout_every=2)

  def append(done):
    with (tmp_path / "b.txt").open("a") as file:
      file.write("more\n")

  with pytest.raises(InputError, match=r"= 'b\.txt' .*does not change while it is read"):
    pipeline.load_datasets(config, append)
  assert not list((tmp_path / "cache" / "tokens").iterdir())
  pipeline.load_datasets(config)


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
  _write(tmp_path / "text" / "a.txt", "a")
  source = sources.find(str(tmp_path / "text"), "config.data.path")
  (tmp_path / "text" / "a.txt").unlink()
  with pytest.raises(InputError, match=r"^config\.data\.path = '.*a\.txt' .*can be read"):
    _ = source.fingerprint


def test_names_that_are_not_utf8(tmp_path, hashed):
  file = pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/text\xe9/\xff.txt"))
  _write(file, "a")
  first = _fingerprint(tmp_path, file)
  assert _fingerprint(tmp_path, file.parent) == first and len(hashed) == 1
