"""The rules for folders and globs: no hidden names, each real file once, links followed."""

import logging
import os
import pathlib

import pytest

from dense_jax.config import DataConfig
from dense_jax.data import finding, sources
from dense_jax.errors import InputError


def _make(root, *names):
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(name)


def _names(path):
  return [document.name for document in sources.find(str(path), "config.data.path")]


def _both(root):
  """Returns the names found in a folder, and checks that its globs find the same."""
  folder = _names(root)
  assert _names(root / "**" / "*.txt") == folder
  assert _names(root / "**") == folder
  return folder


HIDDEN = (".x.txt", "._a.txt", ".git/a.txt", "sub/.b.txt", "sub/.ipynb_checkpoints/b.txt",
          ".a/.b/c.txt")


def test_hidden_names_are_no_text(tmp_path):
  _make(tmp_path, "a.txt", "sub/b.txt", *HIDDEN)
  assert _both(tmp_path) == ["a.txt", "sub/b.txt"]
  assert _names(tmp_path / "*.txt") == ["a.txt"]
  assert _names(tmp_path / "*" / "*.txt") == ["sub/b.txt"]


@pytest.mark.parametrize(("path", "names"), [
    (".git", ["a.txt"]),
    (".a", ["seen.txt"]),  # Below the folder that is spelled out, hidden names are skipped.
    (".a/.b", ["c.txt"]),
    (".a/.b/*.txt", ["c.txt"]),
    (".a/.*/*.txt", [".b/c.txt"]),
    (".x.txt", [".x.txt"]),
    (".*.txt", ["._a.txt", ".x.txt"]),
    (".[gb]*/*.txt", [".git/a.txt"]),
    ("**/.b.txt", ["sub/.b.txt"]),
    ("*/.ipynb*/*", ["sub/.ipynb_checkpoints/b.txt"]),
])
def test_a_dot_that_is_spelled_out_is_meant(tmp_path, path, names):
  _make(tmp_path, "a.txt", "sub/b.txt", ".a/seen.txt", *HIDDEN)
  assert _names(tmp_path / path) == names


def test_links_are_followed_once(tmp_path):
  corpus = tmp_path / "corpus"
  _make(corpus, "a.txt", "z/b.txt")
  _make(tmp_path, "disk/c.txt", "disk/deep/d.txt", "alone/e.txt")
  (corpus / "disk").symlink_to(tmp_path / "disk")
  (corpus / "e.txt").symlink_to(tmp_path / "alone" / "e.txt")
  expected = ["a.txt", "disk/c.txt", "disk/deep/d.txt", "e.txt", "z/b.txt"]
  assert _both(corpus) == expected
  # Links to files and folders that are found anyway, and sort before or after them, change
  # nothing.
  (corpus / "again").symlink_to(tmp_path / "disk" / "deep")
  (corpus / "before").symlink_to(corpus / "z")
  (corpus / "aa.txt").symlink_to(corpus / "z" / "b.txt")
  (corpus / "zz.txt").symlink_to("a.txt")
  assert [name for name in _both(corpus) if name not in expected] == ["again/d.txt"]
  assert _names(corpus / "*" / "*.txt") == ["again/d.txt", "disk/c.txt", "z/b.txt"]


def test_loops_end(tmp_path):
  _make(tmp_path, "corpus/a.txt", "corpus/one/b.txt", "corpus/two/c.txt")
  for number, place in enumerate(("corpus", "corpus/one", "corpus/two")):
    for target in ("corpus", "corpus/one", "corpus/two"):
      (tmp_path / place / f"loop{number}_{target[7:]}").symlink_to(tmp_path / target)
  (tmp_path / "corpus" / "self").symlink_to("self")
  assert _both(tmp_path / "corpus") == ["a.txt", "one/b.txt", "two/c.txt"]
  assert _names(tmp_path / "corpus" / "**" / "**" / "*.txt") == ["a.txt", "one/b.txt", "two/c.txt"]


def test_a_linked_folder_is_named_itself(tmp_path):
  _make(tmp_path, "disk/a.txt")
  (tmp_path / "corpus").symlink_to("disk")
  assert _both(tmp_path / "corpus") == ["a.txt"]


def test_one_file_under_two_hard_links_is_read_once(tmp_path):
  _make(tmp_path, "b.txt")
  os.link(tmp_path / "b.txt", tmp_path / "a.txt")
  assert _both(tmp_path) == ["a.txt"]
  config = DataConfig(path=str(tmp_path / "a.txt"), heldout_path=str(tmp_path / "b.txt"))
  with pytest.raises(InputError, match=r"not in config\.data\.path as well, as .*b\.txt is"):
    sources.split(config)


def test_a_link_to_nothing_is_said_once(tmp_path, caplog):
  _make(tmp_path, "a.txt")
  (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
  with caplog.at_level(logging.WARNING):
    assert _both(tmp_path) == ["a.txt"]
  assert [r.message.partition(" is ")[2] for r in caplog.records] == [
      "a link to nothing: it is passed over"
  ]


def test_brackets_that_are_a_name(tmp_path):
  _make(tmp_path, "v[1]/a[b].txt", "v[1]/c.txt", "v1/d.txt")
  assert _names(tmp_path / "v[1]") == ["a[b].txt", "c.txt"]
  assert _names(tmp_path / "v[1]" / "*.txt") == ["v[1]/a[b].txt", "v[1]/c.txt"]
  assert _names(tmp_path / "v[1]" / "a[b].txt") == ["a[b].txt"]
  assert _names(tmp_path / "v[0-9]" / "*.txt") == ["v1/d.txt"]


def test_relative_paths(tmp_path, monkeypatch):
  _make(tmp_path, "a.txt", "sub/b.txt")
  monkeypatch.chdir(tmp_path)
  for path in (".", "**/*.txt", "./**"):
    assert _names(path) == ["a.txt", "sub/b.txt"]
  assert _names("a.txt") == ["a.txt"] and _names("sub/../sub/*.txt") == ["b.txt"]


@pytest.mark.parametrize(("field", "path"), [
    ("path", ""), ("path", " "), ("path", "\t\n"), ("heldout_path", "  "),
])
def test_an_empty_path_is_refused(tmp_path, monkeypatch, field, path):
  _make(tmp_path, "a.txt", "requirements.txt")
  monkeypatch.chdir(tmp_path)
  config = DataConfig(**{"path": "a.txt", field: path})
  with pytest.raises(InputError, match=rf"^config\.data\.{field} = .* it is empty"):
    sources.split(config)


@pytest.mark.parametrize("path", ["~nosuchuser/corpus", "x" * 300, "x" * 300 + "/*.txt", "a\0b"])
def test_paths_that_cannot_be_are_named(path):
  with pytest.raises(InputError, match=r"^config\.data\.path = "):
    sources.find(path, "config.data.path")


def test_names_that_are_not_utf8(tmp_path):
  folder = os.fsencode(tmp_path) + b"/caf\xe9"
  os.mkdir(folder)
  for name in (b"na\xefve.txt", "\u00e9.txt".encode()):
    pathlib.Path(os.fsdecode(folder + b"/" + name)).write_text("text")
  (document, other) = sources.find(str(tmp_path), "config.data.path")
  assert {document.name, other.name} == {"caf\\xe9/na\\xefve.txt", "caf\\xe9/\u00e9.txt"}
  pathlib.Path(os.fsdecode(folder + b"/a.c\xe9")).write_text("text")
  with pytest.raises(InputError) as error:
    sources.find(os.fsdecode(folder + b"/*"), "config.data.path")
  assert "a.c\\xe9 has another suffix" in str(error.value)
  str(error.value).encode()


def test_folders_that_may_not_be_read_are_said(tmp_path, monkeypatch, caplog):
  _make(tmp_path, "a.txt", "lost+found/b.txt")
  listdir = os.listdir

  def refuse(folder):
    if str(folder).endswith("lost+found"):
      raise PermissionError(13, "Permission denied")
    return listdir(folder)

  monkeypatch.setattr(finding.os, "listdir", refuse)
  with caplog.at_level(logging.WARNING):
    assert _names(tmp_path) == ["a.txt"]
  assert "lost+found may not be read" in caplog.text
