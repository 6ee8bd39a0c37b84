"""Runs the commands of launch/README.md in bash, with stand-ins for all programs.

The recorded arguments are then given to the real programs: launchers run with --dry-run, and
training commands run until they would begin to build something.
"""

import math
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from dense_jax import experiment, files, runs, sharding
from dense_jax.cli import compile, convert, evaluate, generate, train
from dense_jax.runs import compile as programs
from dense_jax.runs import compile_targets as targets
from launch import local, tpu_vm, xpk
from tests.helpers import ROOT
from tests.launch import test_dockerfile
from tests.launch.stand_ins import read_calls, write_recorders

README = (ROOT / "launch" / "README.md").read_text()
PROGRAMS = ("python", "make", "docker", "xpk", "kubectl", "gcloud", "sbatch", "ssh-add")


class ReachedError(Exception):
  """Raised when a command has parsed its arguments and would begin to work."""


def reached(*arguments, **keywords):
  raise ReachedError


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
  """The calls of the README's code blocks in bash: (program and arguments, XLA_FLAGS)."""
  folder = tmp_path_factory.mktemp("readme")
  (folder / "project" / ".venv" / "bin").mkdir(parents=True)
  (folder / "project" / ".venv" / "bin" / "activate").touch()
  write_recorders(folder / "bin", folder / "calls", *PROGRAMS)
  script = "\n".join(re.findall(r"^```bash\n(.*?)^```$", README, re.M | re.S))
  environment = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "HOME": str(folder)}
  followed = subprocess.run(
      ["bash", "-euo", "pipefail", "-c", script], cwd=folder / "project", env=environment,
      capture_output=True, text=True, timeout=60,
  )
  assert followed.returncode == 0 and not followed.stderr, followed.stderr
  return read_calls(folder / "calls")


@pytest.fixture
def dry(monkeypatch, tmp_path):
  """Makes commands stop before they begin, and paths in buckets valid without a library."""
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(files, "_reads_buckets", lambda: True)
  monkeypatch.setattr(runs, "train_run", reached)
  monkeypatch.setattr(runs, "restore", reached)
  monkeypatch.setattr(convert, "check_destination", lambda *_: None)
  monkeypatch.setattr(programs, "compile_program", reached)
  monkeypatch.setattr(targets, "topology_devices", lambda topology: range(_chips(topology)))
  monkeypatch.setattr(local, "_start", reached)
  write_recorders(tmp_path / "bin", tmp_path / "calls", "xpk")
  monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)


def _chips(topology):
  assert re.fullmatch(r"(v4|v5p):\d+x\d+x\d+|(v5e|v6e):\d+x\d+", topology)
  sizes = map(int, topology.partition(":")[2].split("x"))
  return math.prod(sizes)


def check_reached(main: Callable[[list[str]], int], arguments: list[str]) -> None:
  with pytest.raises(ReachedError):
    main(arguments)


def check_train(arguments: list[str], devices: int = 0) -> None:
  """Checks a training command, and its mesh if the number of devices is known (not 0)."""
  check_reached(train.main, arguments)
  overrides = [a.removeprefix("--config.").split("=", 1) for a in arguments if "--config." in a]
  config = experiment.load(arguments[arguments.index("--config") + 1], overrides)
  if devices:
    sizes = sharding.mesh_sizes(config.mesh, devices)
    rows = sizes["slices"] * sizes["data"] * sizes["fsdp"]
    assert config.train.batch_size % rows == 0


def check_python(arguments: list[str], xla_flags: str) -> None:
  """Checks `python ...`: launchers by a dry run, commands of dense_jax by their arguments."""
  if arguments[0] == "launch/local.py":
    first = arguments.index("--")
    check_reached(local.main, arguments[1:])
    options, command = arguments[1:first], arguments[first + 1:]
    assert command[:3] == ["python", "-m", "dense_jax.cli.train"]
    processes, each = (int(options[options.index(name) + 1])
                       for name in ("--processes", "--devices-per-process"))
    check_train(command[3:], processes * each)
    return
  dash_m, module, *rest = arguments
  assert dash_m == "-m"
  launchers = {"launch.xpk": xpk.main, "launch.tpu_vm": tpu_vm.main}
  if module in launchers:
    # A real run and its dry run must differ in nothing else.
    rest = [argument for argument in rest if argument != "--dry-run"]
    assert launchers[module]([*rest, "--dry-run"]) == 0
  elif module == "dense_jax.cli.train":
    simulated = re.search(r"device_count=(\d+)", xla_flags)
    check_train(rest, int(simulated[1]) if simulated else 0)
  else:
    mains = {"dense_jax.cli.compile": compile.main, "dense_jax.cli.evaluate": evaluate.main,
             "dense_jax.cli.generate": generate.main, "dense_jax.cli.convert": convert.main}
    check_reached(mains[module], rest)


def check_sbatch(arguments: list[str]) -> None:
  """Checks `sbatch [OPTION ...] SCRIPT ARGUMENT ...`."""
  script = next(index for index, word in enumerate(arguments) if not word.startswith("--"))
  assert (ROOT / arguments[script]).is_file()
  check_train(arguments[script + 1:])


def check_make(arguments: list[str]) -> None:
  targets = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
  assert set(arguments) <= set(targets)


def check_docker(arguments: list[str]) -> None:
  if arguments[0] == "build":
    assert (ROOT / arguments[arguments.index("-f") + 1]).is_file()
  else:
    assert arguments[0] == "push"


def test_every_command_works(calls, dry, capfd):
  for (program, *arguments), xla_flags in calls:
    print(f"{program} {arguments}", file=sys.stderr)
    if program == "python":
      check_python(arguments, xla_flags)
    elif program == "sbatch":
      check_sbatch(arguments)
    elif program == "make":
      check_make(arguments)
    elif program == "docker":
      check_docker(arguments)
  # The launchers' dry runs did get as far as their main command.
  out = capfd.readouterr().out
  assert out.count("$ xpk workload create") == 3
  assert out.count("$ gcloud compute tpus queued-resources create") == 3


def test_every_launcher_is_there(calls):
  def python(*start):
    return [call[len(start):] for call, _ in calls if call[:len(start)] == list(start)]

  assert python("python", "launch/local.py")
  dry_runs = [call for call in python("python", "-m", "launch.xpk") if "--dry-run" in call]
  assert any("--manifest" in call for call in dry_runs)
  assert any("--manifest" not in call for call in dry_runs)
  subcommands = {call[0] for call in python("python", "-m", "launch.tpu_vm")}
  assert subcommands == {"train", "create", "wait", "sync", "run", "status", "logs", "delete"}
  assert python("sbatch", "--test-only") and python("sbatch", "--nodes=4")
  assert python("docker", "build")


def test_a_dry_run_is_the_command_that_follows_it(calls):
  """Each dry run is followed by the same command without --dry-run."""
  plain = [call for call, _ in calls]
  tried = 0
  for index, call in enumerate(plain):
    if "--dry-run" in call and "--manifest" not in call:
      assert [word for word in call if word != "--dry-run"] == plain[index + 1]
      tried += 1
  assert tried == 2


def test_files_and_options_that_the_text_names_are_there():
  for name in re.findall(r"`(launch/[\w.]+)`", README):
    assert (ROOT / name).is_file()
  for target in re.findall(r"\]\(#([\w-]+)\)", README):
    headings = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
                for heading in re.findall(r"^#+ (.*)$", README, re.M)}
    assert target in headings
  sources = "".join(file.read_text() for file in pathlib.Path(ROOT / "launch").glob("*.py"))
  for option in re.findall(r"`(--[a-z-]+)", README):
    assert option in sources + "--workdir --build-arg"
  (extra,) = re.findall(r"`--build-arg EXTRA=(\w+)`", README)
  assert extra in test_dockerfile.EXTRAS
