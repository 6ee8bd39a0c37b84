"""Programs that stand in for those of a cloud or a cluster."""

import json
import pathlib
import sys

_RECORDER = """\
import json, os, sys
call = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open({calls!r}, "a") as file:
  file.write(json.dumps([call, os.environ.get("XLA_FLAGS", "")]) + "\\n")
"""


def write_program(folder: pathlib.Path, name: str, python: str) -> None:
  """A program of that name, of which `python` is the source."""
  folder.mkdir(exist_ok=True)
  file = folder / name
  # Without what the interpreter reads when it starts: these programs run often.
  file.write_text(f"#!{sys.executable} -IS\n{python}")
  file.chmod(0o755)


def write_recorders(folder: pathlib.Path, calls: pathlib.Path, *names: str) -> None:
  """Programs that only write down how they were called; see `read_calls`."""
  for name in names:
    write_program(folder, name, _RECORDER.format(calls=str(calls)))


def read_calls(calls: pathlib.Path) -> list[tuple[list[str], str]]:
  """The calls in order: program and arguments, and the XLA_FLAGS that it got."""
  lines = calls.read_text().splitlines() if calls.exists() else []
  return [(call, flags) for call, flags in map(json.loads, lines)]
