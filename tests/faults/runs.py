"""A tiny run that faults are put into, and how to tell whether it is what it would have been."""

import contextlib
import copy
import dataclasses
import json
import pathlib
import re
import socket

from tests.faults.children import Child, Start, command
from tests.helpers import ROOT, write_text

STEPS, EVERY = 16, 2


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of one fault.

  Attributes:
    row: the fault's row in the table.
    tries: the faults that were put into this run.
    wrong: what was not as it should be; "" if nothing was.
    steps_lost: steps that were done again, for each try.
  """

  row: str
  tries: int
  wrong: str = ""
  steps_lost: tuple[int, ...] = ()


class Base:
  """A folder with a text, and the command of a tiny run on it.

  Attributes:
    folder: where everything is written.
    losses, digests: of the unbroken run, once `remember` has been called.
  """

  def __init__(self, folder: pathlib.Path) -> None:
    self.folder = folder
    self.text = folder / "text"
    self.text.mkdir(parents=True)
    write_text(self.text)
    self.losses: dict[int, float] = {}
    self.digests: dict[str, object] = {}
    self._options: tuple[str, ...] = ()

  def with_options(self, unbroken: pathlib.Path, *options: str) -> "Base":
    """Returns a run with more options, which has to be equal to an unbroken one of these."""
    other = copy.copy(self)
    other._options = options
    other.remember(unbroken)
    return other

  def arguments(self, workdir: pathlib.Path, *more: str) -> tuple[str, ...]:
    """Returns the arguments of `train`."""
    return (
        "--config", str(ROOT / "experiments/smoke.py:debug"), "--workdir", str(workdir),
        f"--config.data.path={self.text}", f"--config.data.cache_dir={self.folder}/.cache/data",
        "--config.data.tokenizer=bytes", "--config.data.heldout_every=2",
        "--config.data.seq_len=32", "--config.model.family=gau_retnet", "--config.model.width=16",
        "--config.model.layers=2", "--config.model.dense.depth=0", "--config.train.batch_size=8",
        f"--config.train.steps={STEPS}", f"--config.train.checkpoint_every={EVERY}",
        "--config.train.keep_last=2", "--config.train.keep_best=1", "--config.train.log_every=1",
        "--config.train.eval_every=4", "--config.train.eval_batches=1", *self._options, *more,
    )

  def train(self, workdir: pathlib.Path, *more: str, before=None, **faults) -> Start:
    """Returns the start of the run, with faults; see `Start` and `command`."""
    return Start(command("train", *self.arguments(workdir, *more), before=before), **faults)

  def remember(self, workdir: pathlib.Path) -> None:
    """Takes a finished run as the one that others have to be equal to."""
    self.losses, self.digests = losses(workdir), digests(workdir, STEPS)

  def difference(self, workdir: pathlib.Path) -> str:
    """Says how a finished run differs from the unbroken one; "" if in no bit."""
    if repr(losses(workdir)) != repr(self.losses):  # NaN is equal to NaN here.
      return f"other losses: {losses(workdir)} instead of {self.losses}"
    if digests(workdir, STEPS) != self.digests:
      return "other parameters"
    left = [entry.name for entry in (workdir / "checkpoints").iterdir()
            if not entry.name.isdigit()]
    if left or (workdir / "lock.json").exists():
      return f"it left {left or 'its lock'}"
    return ""


def losses(workdir: pathlib.Path) -> dict[int, float]:
  """Returns the training losses by their steps."""
  return {line["step"]: line["loss"] for line in lines(workdir) if "loss" in line}


def lines(workdir: pathlib.Path) -> list[dict]:
  """Returns the whole lines of metrics.jsonl."""
  file, found = workdir / "metrics.jsonl", []
  for line in file.read_text().splitlines() if file.exists() else ():
    with contextlib.suppress(ValueError):  # A kill cut it off.
      found.append(json.loads(line))
  return found


def digests(workdir: pathlib.Path, step: int) -> dict[str, object]:
  """Returns the digests of all arrays of a checkpoint, and of its position in the data."""
  values = json.loads((workdir / "checkpoints" / str(step) / "digests" / "metadata").read_text())
  return {"arrays": values["arrays"], "data": values["data"]}


def saved(workdir: pathlib.Path) -> list[int]:
  """Returns the steps of the checkpoints that are there, in order."""
  folder = workdir / "checkpoints"
  names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
  return sorted(int(name) for name in names if name.isdigit())


def done(workdir: pathlib.Path) -> int:
  """Returns the newest step that metrics.jsonl knows."""
  return max((line["step"] for line in lines(workdir)), default=0)


def went_on_from(child: Child) -> int | None:
  """Returns the step that a training command went on from; None if it did not say."""
  found = re.search(rf"from step (\d+) to {STEPS} in|all ({STEPS}) steps are done in", child.said)
  return int(found[1] or found[2]) if found else None


def tail(child: Child) -> str:
  """Returns how a command ended, for the report of a failure."""
  return f"status {child.status}: {child.said.strip()[-600:]}"


def free_port() -> int:
  """Returns a port on which nothing listens."""
  with socket.socket() as listener:
    listener.bind(("localhost", 0))
    return listener.getsockname()[1]
