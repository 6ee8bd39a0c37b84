"""Stand-ins for the programs of a cloud or a cluster."""

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
  """Writes a program with the Python source `python`."""
  folder.mkdir(exist_ok=True)
  file = folder / name
  # -I and -S make the interpreter start faster: these programs run often.
  file.write_text(f"#!{sys.executable} -IS\n{python}")
  file.chmod(0o755)


def write_recorders(folder: pathlib.Path, calls: pathlib.Path, *names: str) -> None:
  """Writes programs that only record their calls in the file `calls`; see `read_calls`."""
  for name in names:
    write_program(folder, name, _RECORDER.format(calls=str(calls)))


def read_calls(calls: pathlib.Path) -> list[tuple[list[str], str]]:
  """Returns the calls in order: (program and arguments, the value of XLA_FLAGS)."""
  lines = calls.read_text().splitlines() if calls.exists() else []
  return [(call, flags) for call, flags in map(json.loads, lines)]


def is_running(pid: int) -> bool:
  """Returns whether a process runs; one that has ended may still be in the table of processes."""
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False
