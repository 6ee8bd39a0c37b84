"""A stand-in for gcloud whose workers are folders on this machine.

It records each call, plays back the given states of a queued resource, and runs the commands for
a worker in that worker's home folder, where `python3` and the programs it installs are stand-ins
too. The stand-in for the training's python records its arguments, the environment variable A and
its folder, and exits with the given statuses, one at each start; the status "hang" means that it
runs until it is killed, and "orphan" that it has started a process by then, whose id is in the file
`orphan` of the home folder.
"""

import json
import pathlib

from tests.launch.stand_ins import read_calls, write_program

_GCLOUD = """\
import json, os, pathlib, shutil, signal, subprocess, sys
root = pathlib.Path({root!r})
arguments = sys.argv[1:]
with open(root / "calls", "a") as file:
  file.write(json.dumps([["gcloud", *arguments], ""]) + "\\n")

def take(name, default):
  file = root / name
  lines = file.read_text().splitlines() if file.exists() else []
  if len(lines) > 1:  # The last one stays.
    file.write_text("\\n".join(lines[1:]))
  return lines[0] if lines else default

def fail(message):
  print("ERROR: " + message, file=sys.stderr)
  sys.exit(1)

def homes(node):
  for worker in range(2):
    home = root / "workers" / node / str(worker)
    home.mkdir(parents=True, exist_ok=True)
    yield home

failures = int(take("network_failures", "0"))
if failures:
  (root / "network_failures").write_text(str(failures - 1))
  fail("no network")
kind, verb, *rest = arguments[2:]
positional = [argument for argument in rest if not argument.startswith("--")]
there = root / "there"
if verb == "create":
  there.touch()
elif kind == "queued-resources" and not there.exists():
  fail("NOT_FOUND: no such resource")
elif verb == "describe":
  state = take("states", "ACTIVE")
  print(f"state: {{state}} no capacity" if "yaml" in rest[-1] else state)
elif verb == "delete":
  there.unlink()
  for pid in root.glob("workers/*/*/dense_jax_job/pid"):
    try:
      os.killpg(int(pid.read_text()), signal.SIGKILL)
    except ProcessLookupError:
      pass
  shutil.rmtree(root / "workers", ignore_errors=True)
elif verb == "scp":
  archive, target = positional
  node, _, path = target.partition(":")
  for home in homes(node):
    shutil.copy(archive, home / path)
else:
  command = next(a for a in rest if a.startswith("--command=")).partition("=")[2]
  for home in homes(positional[0]):
    environment = dict(os.environ, HOME=str(home), PATH=f"{{root / 'bin'}}:{{os.environ['PATH']}}")
    subprocess.run(["bash", "-c", command], env=environment, cwd=home, check=True)
"""

_PIP = """\
import os, pathlib
uv = pathlib.Path.home() / ".local/bin/uv"
uv.parent.mkdir(parents=True, exist_ok=True)
uv.unlink(missing_ok=True)
uv.symlink_to({uv!r})
"""

_UV = """\
import pathlib, sys
if sys.argv[1] == "venv":
  python = pathlib.Path(sys.argv[-1]) / "bin/python"
  python.parent.mkdir(parents=True, exist_ok=True)
  if not python.exists():
    python.symlink_to({python!r})
else:
  project = pathlib.Path(sys.argv[-1].partition("[")[0])
  assert (project / "pyproject.toml").is_file(), project
"""

_TRAIN = """\
import json, os, pathlib, subprocess, sys, time
home = pathlib.Path.home()
record = home / "trained"
before = record.read_text().splitlines() if record.exists() else []
line = json.dumps([sys.argv[1:], os.environ.get("A"), os.getcwd()])
record.write_text("\\n".join([*before, line]))
print("training on", home.name, flush=True)
# Statuses are those of a worker's starts; machines that are new begin with the next one.
statuses = pathlib.Path({statuses!r}) / home.name
lines = statuses.read_text().splitlines()
statuses.write_text("\\n".join(lines[1:]))
if lines[0] == "orphan":
  child = subprocess.Popen([sys.executable, "-IS", "-c", "import time; time.sleep(120)"])
  (home / "orphan").write_text(str(child.pid))
if lines[0] in ("hang", "orphan"):
  time.sleep(120)
sys.exit(int(lines[0]))
"""


class Cloud:
  """Sets the answers of the stand-in, and tells how it was called."""

  def __init__(self, root: pathlib.Path) -> None:
    self._root = root
    self.bin = root / "programs"
    tools, statuses = root / "bin", root / "statuses"
    statuses.mkdir()
    write_program(self.bin, "gcloud", _GCLOUD.format(root=str(root)))
    write_program(tools, "python3", _PIP.format(uv=str(tools / "uv")))
    write_program(tools, "uv", _UV.format(python=str(tools / "trainer")))
    write_program(tools, "trainer", _TRAIN.format(statuses=str(statuses)))
    self.trains("0")

  def states(self, *states: str) -> None:
    """Sets the resource's states while it exists, one for each query; the last one stays."""
    (self._root / "states").write_text("\n".join(states))

  def trains(self, *first: str, second: tuple[str, ...] = ()) -> None:
    """Sets the statuses of training on the first and the second worker, one for each start."""
    for worker, statuses in enumerate([first, second or first]):
      (self._root / "statuses" / str(worker)).write_text("\n".join(statuses))

  def is_there(self) -> None:
    """Makes the resource exist already."""
    (self._root / "there").touch()

  def fails(self, times: int) -> None:
    """Makes the next calls fail, as without a network."""
    (self._root / "network_failures").write_text(str(times))

  @property
  def calls(self) -> list[list[str]]:
    """The arguments of all calls, without `gcloud compute tpus`."""
    return [call[3:] for call, _ in read_calls(self._root / "calls")]

  @property
  def verbs(self) -> list[str]:
    """The verbs of all calls in order, without `describe` and `ssh`."""
    return [verb for _, verb, *_ in self.calls if verb not in ("describe", "ssh")]

  def trained(self, node: str, worker: int) -> list[tuple[list[str], str | None, str]]:
    """Returns arguments, the variable A, and the folder of each start of training on a worker."""
    file = self.home(node, worker) / "trained"
    return [tuple(json.loads(line)) for line in file.read_text().splitlines()]

  def home(self, node: str, worker: int) -> pathlib.Path:
    """Returns a worker's home folder."""
    return self._root / "workers" / node / str(worker)
