"""Describes a run's data, to be stored with the run, and explains how two descriptions differ.

Two texts are the same if their files have the same contents in the same order; the names of
files and folders do not matter.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dense_jax.data.cache import digest
from dense_jax.data.pipeline import Datasets
from dense_jax.data.sources import TextSource

_MOST_FILES = 10_000
_MOST_NAMES = 5


def describe(datasets: Datasets) -> dict[str, Any]:
  """Returns a description of the data that can be written as JSON.

  Returns:
    fingerprint: that of `datasets`.
    tokenizer: the tokenizer's fingerprint.
    texts: the fingerprints of the training text and of the held-out text; [] of a task.
    files: for each config field that named files, their `count`, total `bytes` and common
      `digest`; if there are at most 10,000, also `files`, a list of [name, bytes, SHA-256].
  """
  if datasets.description is not None:
    return dict(datasets.description)
  fields: dict[str, list[TextSource]] = {}
  for source in datasets.sources:
    fields.setdefault(source.field, []).append(source)
  return {
      "fingerprint": datasets.fingerprint,
      "tokenizer": datasets.tokenizer.fingerprint,
      "texts": [source.fingerprint for source in datasets.sources],
      "files": {field: _files(parts) for field, parts in fields.items()},
  }


def _files(sources: Iterable[TextSource]) -> dict[str, Any]:
  """Describes the files of sources with the same root, each once even if two sources share it."""
  found: dict[str, tuple[str, int, str]] = {}
  for source in sources:
    for file, name, held in zip(source.files, source.names, source.digests, strict=True):
      found[str(file)] = (name, held.size, held.sha256)
  files = [found[file] for file in sorted(found)]
  described = {
      "count": len(files),
      "bytes": sum(size for _, size, _ in files),
      "digest": digest(*(part for name, _, sha256 in files for part in (_suffix(name), sha256))),
  }
  return described if len(files) > _MOST_FILES else {**described, "files": [*map(list, files)]}


def _suffix(name: str) -> str:
  return name.rpartition(".")[2]


def explain_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  """Explains how two descriptions of data differ.

  Args:
    before: the description that was stored with a run, as read back; if it is malformed, the
      result says that it is damaged.
    now: the present data's, from `describe`.

  Returns:
    Sentences without a full stop; [] if the data are the same.
  """
  try:
    return _differences(before, now)
  except (AttributeError, KeyError, TypeError, ValueError):
    return ["what is written down of the data that the run began with is damaged"]


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  if before["fingerprint"] == now["fingerprint"]:
    return []
  lines = []
  if before["texts"] != now["texts"]:
    for field in sorted(before["files"].keys() | now["files"].keys()):
      old, new = before["files"].get(field), now["files"].get(field)
      if old is None or new is None:
        had, has = ("named no files", "names some") if new else ("named files", "names none")
        lines.append(f"{field}: it {had} when the run began, and {has} now")
      else:
        lines += [f"{field}: {line}" for line in _file_differences(old, new)]
    if not lines:
      lines.append("config.data: another part of the same text is held out")
  if before["tokenizer"] != now["tokenizer"]:
    lines.append("config.data.tokenizer: the tokenizer is another one than that of the run")
  return lines or [
      "config.data: another part of the text, or another version of this program tokenized it"
  ]


def _file_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  if before["digest"] == now["digest"]:
    return []
  if "files" not in before or "files" not in now:
    was, now_is = (f"{d['count']:,} files of {d['bytes']:,} bytes" for d in (before, now))
    return [f"{was} have other contents" if was == now_is else f"{was} are now {now_is}"]
  old = {name: (size, sha256) for name, size, sha256 in before["files"]}
  new = {name: (size, sha256) for name, size, sha256 in now["files"]}
  gone, added = old.keys() - new.keys(), new.keys() - old.keys()
  # A content that is gone under one name and new under another was renamed.
  spare = collections.defaultdict(list)
  for name in sorted(gone, reverse=True):
    spare[old[name]].append(name)
  renamed = {name: spare[new[name]].pop() for name in sorted(added) if spare[new[name]]}
  changed = [name for name in new if name in old and old[name] != new[name]]
  lines = [_change(name, old[name][0], new[name][0]) for name in changed[:_MOST_NAMES]]
  lines += _others(len(changed) - _MOST_NAMES, "changed")
  lines += [f"{renamed[name]} is now named {name}" for name in sorted(renamed)[:_MOST_NAMES]]
  lines += _others(len(renamed) - _MOST_NAMES, "another name")
  lines += _names(sorted(added - renamed.keys()), "new")
  lines += _names(sorted(gone - {*renamed.values()}), "gone")
  return lines


def _change(name: str, before: int, now: int) -> str:
  if before == now:
    return f"{name} has other contents of the same size, {now:,} bytes"
  return f"{name} has {'grown' if now > before else 'shrunk'} from {before:,} to {now:,} bytes"


def _others(number: int, what: str) -> list[str]:
  if number <= 0:
    return []
  return [f"{number:,} other {'file has' if number == 1 else 'files have'} {what}"]


def _names(names: Sequence[str], what: str) -> list[str]:
  if not names:
    return []
  shown = [*names[:_MOST_NAMES]]
  if len(names) > _MOST_NAMES:
    shown.append(f"{len(names) - _MOST_NAMES:,} more")
  listed = " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
  return [f"{'1 file is' if len(names) == 1 else f'{len(names):,} files are'} {what}: {listed}"]
