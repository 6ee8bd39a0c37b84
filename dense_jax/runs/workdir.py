"""A run's folder: what identifies the run in it, and whether a command may resume it."""

import json
import logging
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

from etils import epath

from dense_jax import experiment
from dense_jax.config import ExperimentConfig, invalid
from dense_jax.data import identity
from dense_jax.data.pipeline import Datasets
from dense_jax.errors import InputError
from dense_jax.files import PARTIALS, is_remote, parse_json, write_atomically
from dense_jax.runs import resume
from dense_jax.training.events import EVENTS_FILE, read_events
from dense_jax.training.lock import LOCK_FILE
from dense_jax.training.metrics import EVENTS_FOLDER, METRICS_FILE, read_metrics
from dense_jax.training.stored import saved_steps

CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
DATA_FILE = "data.json"
INIT_FILE = "init.json"
PLOT_FILE = "loss.png"
REPORT_FILE = "report.md"
PAGE_FILE = "report.html"
_LOG = logging.getLogger(__name__)
# Names that file systems and killed processes leave in a folder that is otherwise empty.
_UNFINISHED = ".orbax-checkpoint-tmp"
_NOBODYS = re.compile(rf"\..*|lost\+found|{re.escape(LOCK_FILE)}")
_FILES = (experiment.CONFIG_FILE, DATA_FILE, INIT_FILE, METRICS_FILE, EVENTS_FILE, PLOT_FILE,
          REPORT_FILE, PAGE_FILE)
# Groups of keys that every run's config.json has, those of earlier versions too.
_GROUPS = {"model", "data", "optimizer", "train", "mesh"}
_FOLDERS = (CHECKPOINTS, TOKENIZER, EVENTS_FOLDER)


def check_config(
    workdir: epath.Path, config: ExperimentConfig, allow_change: Collection[str] = ()
) -> None:
  """Checks that training with this configuration may begin or resume in a folder.

  A run that never had a checkpoint has nothing to lose, so it may begin again, even with another
  configuration. One whose checkpoints are missing, on a disk that is not mounted for example, may
  not.

  Args:
    workdir: the folder, which may not exist yet.
    config: the configuration to train with.
    allow_change: keys that may differ from the run's; see `resume.check`.

  Raises:
    InputError: the folder holds something else, or a run that cannot be resumed like this.
  """
  steps = saved_steps(workdir / CHECKPOINTS)
  if steps == [0]:
    raise invalid(
        "--workdir", str(workdir), "a folder with a run, or a new one and --init-from this one; it "
        "holds a model that convert wrote, without an optimizer to go on with",
    )
  if steps:
    resume.check(experiment.read(workdir), config, steps[-1], allow_change)
  elif holds_run(workdir):
    if had := _had_checkpoints(workdir):
      raise invalid(
          "--workdir", str(workdir), f"a folder whose checkpoints are there: its run {had}, and "
          f"{CHECKPOINTS} has none now. Put them back where they were, or name a new folder",
      )
  elif workdir.exists():
    foreign = [e.name for e in workdir.iterdir() if e != workdir and not _is_leftover(e)]
    if foreign:
      raise invalid(
          "--workdir", str(workdir),
          f"a new or empty folder, or one with a run; it holds {min(foreign)}",
      )
  for name in (*_FILES, *_FOLDERS):
    entry, kind = workdir / name, "folder" if name in _FOLDERS else "file"
    is_there = entry.exists() or os.path.islink(os.fspath(entry))  # A link may lead nowhere.
    if is_there and entry.is_dir() != (kind == "folder"):
      raise invalid("--workdir", str(workdir), f"a folder whose {name} is a {kind}")


def holds_run(workdir: epath.Path) -> bool:
  """Returns whether the folder's config.json is a run's; other programs use that name too."""
  file = workdir / experiment.CONFIG_FILE
  if not file.is_file():
    return False
  try:
    config = parse_json(file.read_bytes())
  except ValueError:  # A run's, but damaged, if a run's next file is there.
    return (workdir / DATA_FILE).is_file()
  return isinstance(config, dict) and config.keys() >= _GROUPS


def _had_checkpoints(workdir: epath.Path) -> str:
  """Returns what shows that the run in a folder without checkpoints has had some; "" if nothing."""
  kinds: dict[str, int] = {}
  for event in read_events(workdir):
    kinds[event.kind] = max(event.step, kinds.get(event.kind, 0))
  # Not "interrupted": a second request ends a run at once, without a save.
  for kind, said in (("end", "has ended"), ("start", "went on")):
    if kinds.get(kind):
      return f"{said} at step {kinds[kind]}"
  newest = max((record["step"] for record in read_metrics(workdir)), default=0)
  try:
    every = experiment.read(workdir).train.checkpoint_every
  except InputError:
    return ""
  # The first save may take long, but the second waits for it, before a later step is recorded. No
  # save may have succeeded, or been made while steps were skipped.
  if newest > 2 * every and kinds.keys().isdisjoint(("save failed", "skipped", "returned")):
    return f"has trained to step {newest} with a checkpoint every {every} steps"
  return ""


def _is_leftover(entry: epath.Path) -> bool:
  """Returns whether an entry is nobody's, or holds only unfinished saves of a killed run."""
  if entry.name == CHECKPOINTS and entry.is_dir():
    return all(_UNFINISHED in save.name for save in entry.iterdir())
  return bool(_NOBODYS.fullmatch(entry.name))


def describe_saved(workdir: epath.Path) -> str:
  """Says what the folder keeps if the process ends now, and how to go on."""
  steps = saved_steps(workdir / CHECKPOINTS)
  if not steps:
    return "nothing was saved; the same command begins again"
  return f"step {steps[-1]} is saved; the same command goes on from there"


def check_data(workdir: epath.Path, data: Datasets) -> None:
  """Checks that the run in a folder can be resumed with these data.

  Raises:
    InputError: the folder has checkpoints of a run on other data; the message says what differs.
      The paths of the data may differ.
  """
  if not saved_steps(workdir / CHECKPOINTS):
    return
  file = workdir / DATA_FILE
  try:
    before = parse_json(file.read_bytes())
    if not isinstance(before, dict) or not isinstance(before.get("fingerprint"), str):
      raise ValueError("it describes no data")
  except (OSError, ValueError) as error:
    _LOG.warning(
        "%s cannot be read and is written again (%s): the training text is still compared with "
        "the checkpoint's, the held-out text is not", file, error,
    )
    return
  lines = [f"  {line}" for line in identity.explain_difference(before, identity.describe(data))]
  if lines:
    raise InputError(
        "the run in --workdir was made with other data:\n" + "\n".join(lines)
        + "\nGive the text and the tokenizer that it began with to go on, or another --workdir."
    )


def begin(
    workdir: epath.Path, config: ExperimentConfig, data: Datasets,
    init: Mapping[str, Any] | None = None,
) -> None:
  """Writes what identifies the run, and deletes partial files that a killed process left.

  The configuration is written first: whenever the process is killed, a folder with a config.json
  is a run's. If the folder has a checkpoint, restore it with this configuration and these data
  before this call, which overwrites what the folder says about its run.

  Args:
    workdir: the folder.
    config: the run's configuration.
    data: the run's data.
    init: which model the run began with; None means fresh parameters.
  """
  if not is_remote(workdir):
    for folder in (workdir, workdir / TOKENIZER):
      for entry in folder.glob(PARTIALS) if folder.is_dir() else ():
        if entry.is_file():
          entry.unlink()
  experiment.save(config, workdir)
  write_atomically(workdir / DATA_FILE, json.dumps(identity.describe(data), indent=1).encode())
  data.tokenizer.save(workdir / TOKENIZER)
  if init is None:
    (workdir / INIT_FILE).unlink(missing_ok=True)  # Of a run that was killed and begins otherwise.
  else:
    write_atomically(workdir / INIT_FILE, json.dumps(init, indent=1).encode())
