"""A long run with a NaN window, three kills, a flipped bit and a full disk, beside an unbroken one.

    python -m tests.faults.hour --output experiments/results/hour_DATE

trains `experiments/smoke.py` for --steps steps, twice: once with these faults; and once without
any, but told to pass over the batches that the first run has passed over. The second run begins
when these are known, and goes on beside the first. Both have to end with the same bits.

Writes OUTPUT.md, a table of what happened, and OUTPUT.html, the first run's own report. Needs root,
because a disk is mounted; the status is 1 if the runs differ. With
`--config experiments/smoke.py:debug --steps 80` it is a rehearsal.
"""

import argparse
import json
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

from etils import epath

from dense_jax.training.events import read_events
from tests.faults import damage, disks, runs
from tests.helpers import ROOT

KILL, FLIP, FULL = "kill -9", "kill -9, and a bit of the newest checkpoint flipped", "disk full"
# The share of the steps after which a fault comes.
FAULTS = ((0.1, KILL), (0.4, KILL), (0.6, FLIP), (0.8, FULL))
# The batches with NaN begin there; so many in a row make the run go back.
NAN_SHARE, IN_A_ROW = 0.25, 3
# Begins a run and ends it before it has saved, so that its folder is there.
BEGIN = """
import sys
from dense_jax import experiment, runs
from dense_jax.training.loop import Hook
path, workdir, *overrides = sys.argv[1:]
pairs = [each.removeprefix("--config.").split("=", 1) for each in overrides]
runs.train_run(experiment.load(path, pairs), workdir, hooks=[Hook(1, lambda moment: sys.exit())])
"""


class Pair:
  """Starts the two runs, in processes whose output is kept in a folder."""

  def __init__(self, folder: pathlib.Path, config: str, steps: int) -> None:
    self._folder, self._config = folder, config
    first = int(NAN_SHARE * steps)
    # Both are compiled with the faults, for the sake of the last bits; the second never meets them.
    self._faults = ",".join(f"{number}:nan" for number in range(first, first + IN_A_ROW))
    every = max(steps // 40, 1)
    self._options = [
        f"--config.train.steps={steps}", f"--config.train.checkpoint_every={every}",
        f"--config.train.eval_every={5 * every}", "--config.train.log_every=1",
        f"--config.guard.in_a_row={IN_A_ROW}",
    ]

  def start(self, name: str, workdir: pathlib.Path) -> subprocess.Popen[bytes]:
    """Starts or continues a run; its output goes to a new file of this name."""
    with open(self._folder / name, "wb") as log:
      return subprocess.Popen(
          [sys.executable, "-m", "tests.faulty", self._faults, "dense_jax.cli.train", "--config",
           self._config, "--workdir", str(workdir), *self._options],
          cwd=ROOT, stdout=log, stderr=log,
      )

  def begin(self, workdir: pathlib.Path, passed_over: dict) -> None:
    """Makes a run that has done no step, and passes over these batches."""
    subprocess.run(
        [sys.executable, "-c", BEGIN, self._config, str(workdir), *self._options], cwd=ROOT,
        check=True, stdout=subprocess.DEVNULL,
    )
    content = {**passed_over, "step": 0, "returns": 0}
    (workdir / "passed_over.json").write_text(json.dumps(content))

  def said(self, name: str) -> str:
    """Returns the output of that name."""
    return (self._folder / name).read_text(errors="replace")


def with_faults(pair: Pair, workdir: pathlib.Path, steps: int, rows: list[str]) -> None:
  """Trains to the end through all faults; adds a row of the table for each."""
  process = pair.start("0.log", workdir)
  for index, (share, fault) in enumerate(FAULTS):
    while process.poll() is None and runs.done(workdir) < share * steps:
      time.sleep(0.2)
    if fault == FULL:
      process.send_signal(signal.SIGSTOP)  # Or a short run would end meanwhile.
      ballast = disks.fill(workdir.parent, 0)
      process.send_signal(signal.SIGCONT)
      if process.wait() != 2 or "No space left on device" not in pair.said(f"{index}.log"):
        raise RuntimeError(f"on a full disk: {pair.said(f'{index}.log')[-2000:]}")
      ballast.unlink()
    else:
      process.send_signal(signal.SIGKILL)
      if process.wait() != -signal.SIGKILL:
        raise RuntimeError(f"it ended by itself: {pair.said(f'{index}.log')[-2000:]}")
    if fault == FLIP:
      newest = workdir / "checkpoints" / str(runs.saved(workdir)[-1])
      largest = max(newest.rglob("*"), key=lambda file: file.stat().st_size)
      damage.flip(largest, random.Random(0))
    reached = runs.done(workdir)
    process = pair.start(f"{index + 1}.log", workdir)
    while not (found := re.search(r"from step (\d+) to", pair.said(f"{index + 1}.log"))):
      if process.poll() is not None:
        raise RuntimeError(f"it did not go on: {pair.said(f'{index + 1}.log')[-2000:]}")
      time.sleep(0.2)
    rows.append(f"| {fault} | {reached} | {found[1]} | {reached - int(found[1])} |")
  if process.wait():
    raise RuntimeError(f"the last start failed: {pair.said(f'{len(FAULTS)}.log')[-2000:]}")


def difference(workdir: pathlib.Path, expected: pathlib.Path, steps: int) -> str:
  """Says in what two finished runs differ; "" if in no bit of losses and arrays."""
  if runs.losses(workdir) != runs.losses(expected):
    return "the losses"
  arrays = [runs.digests(folder, steps)["arrays"] for folder in (workdir, expected)]
  return "" if arrays[0] == arrays[1] else "the parameters or moments"


def main(arguments: Sequence[str]) -> int:
  """Runs both; returns 1 if they differ."""
  command = argparse.ArgumentParser(prog="python -m tests.faults.hour")
  command.add_argument("--config", default="experiments/smoke.py")
  command.add_argument("--steps", type=int, default=3000)
  command.add_argument("--output", required=True, help="the table and the page, without endings")
  options = command.parse_args(arguments)
  began = time.monotonic()
  rows: list[str] = []
  with (
      tempfile.TemporaryDirectory(prefix="hour-") as temporary,
      disks.disk(pathlib.Path(temporary) / "disk", 2**29) as place,
  ):
    workdir, expected = place / "run", pathlib.Path(temporary) / "unbroken"
    pair = Pair(pathlib.Path(temporary), options.config, options.steps)
    failed: list[BaseException] = []

    def break_it() -> None:
      try:
        with_faults(pair, workdir, options.steps, rows)
      except BaseException as error:
        failed.append(error)

    breaking = threading.Thread(target=break_it, daemon=True)
    breaking.start()
    while not (workdir / "passed_over.json").exists() and breaking.is_alive():
      time.sleep(0.2)
    if not failed:
      passed = json.loads((workdir / "passed_over.json").read_text())
      pair.begin(expected, passed)
      unbroken = pair.start("unbroken.log", expected)
    breaking.join()
    if failed:
      raise failed[0]
    minutes = (time.monotonic() - began) / 60
    if unbroken.wait():
      raise RuntimeError(f"the unbroken run failed: {pair.said('unbroken.log')[-2000:]}")
    differs = difference(workdir, expected, options.steps)
    subprocess.run([sys.executable, "-m", "dense_jax.cli.report", "--workdir", str(workdir)],
                   cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    shutil.copy(workdir / "report.html", f"{options.output}.html")
    events = read_events(epath.Path(workdir))
  end = f"they differ in {differs}" if differs else "both end with the same bits"
  text = "\n".join([
      f"# {options.steps} steps of {options.config} with faults, {minutes:.0f} minutes", "",
      f"Command `python -m tests.faults.hour {' '.join(arguments)}`.", "",
      f"Batches {passed['spans']} were passed over. An unbroken run that passes over them too was "
      f"trained beside it: {end}.", "",
      "| fault | step that was reached | went on from | steps lost |", "|---|---|---|---|", *rows,
      "", "| step | event | |", "|---|---|---|",
      *(f"| {event.step} | {event.kind} | {event.text.splitlines()[0]} |" for event in events),
  ]) + "\n"
  pathlib.Path(f"{options.output}.md").write_text(text)
  print(text)
  return 1 if differs else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
